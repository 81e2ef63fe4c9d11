//! The pipeline: reads container images from a source, passes their elements through filters, writes them to an output.

pub mod blob;
pub mod codec;
pub mod compression;
pub mod config;
pub mod digest;
pub mod manifest;
pub mod platform;
pub mod registry;
pub mod schema1;
