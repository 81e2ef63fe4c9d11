//! The pipeline: reads container images from a source, passes their elements through filters, writes them to an output.

pub mod blob;
pub mod compression;
pub mod digest;
pub mod filter;
pub mod layer;
pub mod registry;
pub mod tar;
