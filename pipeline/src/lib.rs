//! The pipeline: reads container images from a source, passes their elements through filters, writes them to an output.
//!
//! Start at [`process`], which is the product on one screen; [`task`] is the way of one layer; [`source`], [`filter`] and
//! [`output`] are the tables of what there is. Nothing here prints, and nothing here knows of a command line.

pub mod atomic;
pub mod blob;
pub mod catalog;
pub mod check;
pub mod codec;
pub mod compression;
pub mod config;
pub mod copy;
pub mod digest;
pub mod duration;
pub mod element;
pub mod engine;
pub mod error;
pub mod executor;
pub mod filter;
pub mod index;
pub mod layer;
pub mod layout;
pub mod lent;
pub mod manifest;
pub mod mirror;
pub mod named;
pub mod open;
pub mod output;
pub mod platform;
pub mod process;
pub mod progress;
pub mod provenance;
pub mod reference;
pub mod registry;
pub mod schema1;
pub mod size;
pub mod source;
pub mod spool;
pub mod tar;
pub mod task;
mod thread;
pub mod unpack;
pub mod uri;
pub mod verify;
pub mod whole;
pub mod wire;
