//! Where images come from. A source finds the manifest and config and offers the layers as openers; it reads no layer itself.

pub mod registry;
pub mod saved_tar;

use crate::element::Image;
use crate::error::Error;

/// One kind of source, for help texts and the parser.
#[derive(Debug)]
pub struct SourceKind {
    /// What stands before `://`.
    pub scheme: &'static str,
    /// How its URI is written.
    pub syntax: &'static str,
    /// One line of help.
    pub about: &'static str,
    /// The keys of its options.
    pub options: &'static [&'static str],
}

/// Every source there is.
pub const SOURCES: &[SourceKind] = &[registry::KIND, saved_tar::KIND];

/// A source of one image.
#[async_trait::async_trait]
pub trait ImageSource: Send + Sync {
    /// Finds the image: its manifest, its config, and an opener for each layer.
    async fn image(&self) -> Result<Image, Error>;
}
