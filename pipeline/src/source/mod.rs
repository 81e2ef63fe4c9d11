//! Where images come from. A source finds the manifest and config and offers the layers as openers; it reads no layer itself.
//! One that can be read only once, from front to back, says besides which layer is coming ([`arrivals`]).

pub mod arrivals;
pub mod dir;
pub mod docker;
pub(crate) mod for_platform;
pub mod manifest_json;
pub mod oci_layout;
pub mod registry;
pub mod saved_tar;
pub mod stored;

use self::arrivals::Arrivals;
use self::stored::{SourceIndex, Store};
use crate::check::Finding;
use crate::element::Image;
use crate::error::Error;
use crate::manifest::Descriptor;

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
pub const SOURCES: &[SourceKind] =
    &[registry::KIND, docker::KIND, saved_tar::KIND, dir::KIND, oci_layout::KIND];

/// A source of one image.
#[async_trait::async_trait]
pub trait ImageSource: Send + Sync {
    /// Finds the image: its manifest, its config, and an opener for each layer.
    async fn image(&self) -> Result<Image, Error>;

    /// For a source that sends its layers in an order of its own, that order, once, when the image is known: a layer is best
    /// opened when it arrives. None where any order is as good.
    fn arrivals(&self) -> Option<Arrivals> {
        None
    }

    /// Called when no layer is wanted any more: tells what only the end of the source does, the config's exact bytes above all,
    /// and why layers did not arrive.
    async fn settle(&self, _image: &mut Image) -> Result<(), Error> {
        Ok(())
    }

    /// The index that the source is named for, if that is one: [`image`](Self::image) gives one image of it.
    async fn index(&self) -> Result<Option<SourceIndex>, Error> {
        Ok(None)
    }

    /// What is wrong with what holds the image, beside the image itself; every byte of it is read if that is to be `deep`.
    async fn audit(&self, deep: bool) -> Result<Vec<Finding>, Error> {
        let _ = deep;
        Ok(Vec::new())
    }

    /// What an entry of [`index`](Self::index) names, as a source of its own. None where there are no indexes.
    fn entry(&self, entry: &Descriptor) -> Option<Box<dyn ImageSource>> {
        let _ = entry;
        None
    }

    /// The manifests and blobs that the source is one image of, where it is: only there can anything belong to an image.
    fn store(&self) -> Option<&dyn Store> {
        None
    }
}
