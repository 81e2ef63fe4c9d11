//! Where images go. An output is two things: a place that layers are written to, in any order and several at a time, and
//! [`ImageOutput::finalize`], which runs once, after all of them, and only then makes the image visible.

pub mod bundle;
pub mod content;
pub mod derived;
pub mod dir;
pub mod docker;
pub mod manifest;
mod merged;
pub mod nothing;
pub mod oci_layout;
pub mod registry;
mod staging;
pub mod tar;
mod target;

use std::sync::Arc;

use self::content::ContentOutput;
use self::manifest::ManifestFormat;
pub use self::staging::remove_unpublished;
use crate::blob::{ByteCount, LayerStream};
use crate::compression::{Compression, Format};
use crate::digest::Digest;
use crate::element::{Image, Layer, StoredLayer, WrittenLayer};
use crate::error::Error;
use crate::filter::FilterChain;
use crate::manifest::Annotations;
use crate::registry::Repository;
use crate::source::stored::SourceIndex;

/// One kind of output, for help texts and the parser.
#[derive(Debug)]
pub struct OutputKind {
    /// What stands before `://`.
    pub scheme: &'static str,
    /// How its URI is written.
    pub syntax: &'static str,
    /// One line of help.
    pub about: &'static str,
    /// The keys of its options.
    pub options: &'static [&'static str],
}

/// Every output there is.
pub const OUTPUTS: &[OutputKind] =
    &[registry::KIND, docker::KIND, tar::KIND, dir::KIND, bundle::KIND, oci_layout::KIND];

/// The form in which an output takes layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerForm {
    /// Plain tars.
    Tar,
    /// Blobs as they are stored.
    Stored {
        /// What every layer must be compressed with; None keeps what a layer has, and gives an edited one the same again.
        compression: Option<Compression>,
    },
    /// No bytes at all: the layers are only looked at.
    Nothing,
}

/// What it took to have a layer at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Its bytes went there.
    Bytes,
    /// It was there, or was mounted from another repository of the same registry.
    Nothing,
}

/// A layer that an output is going to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpectedLayer {
    /// Its place in the image.
    pub index: usize,
    /// What it will probably measure as a plain tar, in bytes. It may be wrong.
    pub tar_size: Option<u64>,
    /// Whether filters may find in the middle of its stream that it has to begin again: until the stream's end, nothing of
    /// it counts.
    pub may_restart: bool,
}

/// The final state of an image, when every layer is stored.
#[derive(Debug)]
pub struct FinishedImage<'a> {
    /// As the source offered it.
    pub image: &'a Image,
    /// The filters that it has passed.
    pub chain: &'a FilterChain,
    /// What its manifest gets besides.
    pub annotations: &'a Annotations,
    /// The final config, byte for byte: the source's own unless a layer's diff_id or a filter changed it.
    pub config: bytes::Bytes,
    /// Every layer, by index.
    pub layers: &'a [WrittenLayer],
    /// Who is asked whether it still may become visible, immediately before it does. None: it may.
    pub permit: Option<&'a dyn Permit>,
}

/// The right to make an image visible, which may be lost while its layers are written.
#[async_trait::async_trait]
pub trait Permit: std::fmt::Debug + Send + Sync {
    /// Fails if it was lost.
    async fn check(&self) -> Result<(), Error>;
}

/// What an output says of a finished image.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Receipt {
    /// The digest of the manifest, where the output has one.
    pub manifest_digest: Option<crate::digest::Digest>,
    /// The media type of that manifest.
    pub manifest_media_type: Option<String>,
    /// Its size in bytes.
    pub manifest_size: Option<u64>,
    /// The manifest itself.
    #[serde(skip)]
    pub manifest: Option<bytes::Bytes>,
    /// Bytes of its config, where they had to go there by themselves.
    #[serde(skip)]
    pub config_moved: Option<u64>,
    /// What is there now, for people.
    pub destination: String,
}

/// Why a destination could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The operating system said no.
    #[error("failed to {what} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: std::path::PathBuf,
        /// Its answer.
        source: std::io::Error,
    },
    /// There is something already.
    #[error("{} exists and is not empty", .path.display())]
    Taken {
        /// The destination.
        path: std::path::PathBuf,
    },
    /// A layer was lost when a part of it was in the tree already, so it cannot begin again there.
    #[error("the connection was lost in the middle of a layer that was being unpacked")]
    Spoiled,
    /// The catalog of a shared directory is none.
    #[error("{} is not a catalog of images: {reason}", .path.display())]
    Catalog {
        /// Its path.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Whom a bundle's container runs as is not known.
    #[error(transparent)]
    User(#[from] bundle::UserError),
    /// An artifact has nothing that a saved tar could hold.
    #[error("{destination} can hold images only, and this is an artifact")]
    NotAnImage {
        /// Where it was to go.
        destination: String,
    },
    /// An Engine finds images by their names.
    #[error("docker://{name} names no tag that the image could get: write docker://IMAGE:TAG")]
    NoTag {
        /// What was given.
        name: String,
    },
    /// Only a destination that keeps manifests can keep an index of them.
    #[error("{index} is an index of several images, and the destination can hold one")]
    NoIndexes {
        /// The source's.
        index: String,
    },
    /// What belongs to an image has names of its own.
    #[error("{destination} can name one image only, and not what belongs to it: a directory can")]
    OneName {
        /// The destination.
        destination: String,
    },
    /// Signatures and provenance are manifests themselves.
    #[error("the destination keeps no manifests, and so nothing that belongs to one")]
    NoBelongings,
    /// A directory that is something else must not become a layout as well.
    #[error("{} is not an OCI image layout: {reason}", .path.display())]
    NotALayout {
        /// The destination.
        path: std::path::PathBuf,
        /// Why not.
        reason: String,
    },
    /// A blob that the destination took is not there, or is another one.
    #[error(
        "{destination} has lost blob {digest} of {size} bytes{}",
        .found.map(|found| format!(": the one there has {found}")).unwrap_or_default()
    )]
    BlobLost {
        /// The destination.
        destination: String,
        /// The blob.
        digest: crate::digest::Digest,
        /// How many bytes were written.
        size: u64,
        /// How many it has now. None: it is not there.
        found: Option<u64>,
    },
    /// A destination that names a digest gets exactly that manifest or nothing.
    #[error("the destination asks for {expected}, and the image is {actual}")]
    ByDigest {
        /// What the destination names.
        expected: crate::digest::Digest,
        /// What would be written.
        actual: crate::digest::Digest,
    },
}

/// Refuses what is no image, where layers go into a tar or a tree: an artifact has none.
fn refuse_artifact(image: &Image, destination: String) -> Result<(), OutputError> {
    match image.is_image() {
        true => Ok(()),
        false => Err(OutputError::NotAnImage { destination }),
    }
}

/// A destination of one image.
#[async_trait::async_trait]
pub trait ImageOutput: Send + Sync {
    /// The form in which it takes layers.
    fn form(&self) -> LayerForm;

    /// What is done to a layer that goes there, for messages: "failed to … layer".
    fn action(&self) -> &'static str {
        match self.form() {
            LayerForm::Tar => "write",
            LayerForm::Stored { .. } => "push",
            LayerForm::Nothing => "read",
        }
    }

    /// The format of the manifests that it keeps.
    fn format(&self) -> ManifestFormat {
        ManifestFormat::Keep
    }

    /// Whether layers may come in any order: the largest first then. Where not, they are begun by index. A plain tar is
    /// written from its start on.
    fn takes_any_order(&self) -> bool {
        !matches!(self.form(), LayerForm::Tar)
    }

    /// Whether it wants to know [`ExpectedLayer::tar_size`], which may cost a request a layer.
    fn wants_tar_sizes(&self) -> bool {
        false
    }

    /// Called before any layer: checks that the image can be written, so that nothing is fetched in vain. `expected` lists
    /// the layers that [`write_layer`](Self::write_layer) or [`copy_layer`](Self::copy_layer) will be called for, in order;
    /// a layer that stands twice in an image is stored once.
    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error>;

    /// What the layer becomes behind these filters, if the output has just that from an earlier image. Asked before anything
    /// is fetched; such a layer is neither read nor written, and its reports are those of the earlier time.
    async fn known_layer(&self, layer: &Layer, chain: &FilterChain) -> Result<Option<WrittenLayer>, Error> {
        let _ = (layer, chain);
        Ok(None)
    }

    /// Stores a layer's blob as it is, if it is not there yet. Only for [`LayerForm::Stored`]; its descriptor is known.
    async fn copy_layer(&self, layer: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        let _ = (layer, progress);
        unreachable!("an output that takes {:?} is given no blob as it is", self.form())
    }

    /// Whether the output holds this layer's blob already, or can be given it without moving its bytes.
    async fn has_layer(&self, layer: &Layer) -> Result<bool, Error> {
        let _ = layer;
        Ok(false)
    }

    /// Stores a layer from a stream of its bytes, which have that format. May be called again for the same index when an
    /// attempt failed; the last success counts. It may not wait for another layer of the image: there are sources that send
    /// one after the other, in an order of their own.
    async fn write_layer(
        &self,
        index: usize,
        stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error>;

    /// The repository that layers go to, where the output is one: who may write there can do in this output's place all that is
    /// done with a single layer.
    fn repository(&self) -> Option<&Repository> {
        None
    }

    /// Makes the image visible, whole. Runs once.
    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error>;

    /// Where an entry of an index goes before the index does: an image or index that is found by that digest alone, and must
    /// have it. None where no indexes can be.
    fn entry(&self, digest: &Digest) -> Option<Arc<dyn ImageOutput>> {
        let _ = digest;
        None
    }

    /// The same for an entry whose digest turns out when it is finished.
    fn entry_to_be(&self) -> Option<Arc<dyn ImageOutput>> {
        None
    }

    /// Its side that takes manifests and blobs as they are. None where there are none.
    fn content(&self) -> Option<Arc<dyn ContentOutput>> {
        None
    }

    /// Makes an index visible, all of whose entries are there. Only where [`entry`](Self::entry) gives something; then it runs
    /// in the place of [`finalize`](Self::finalize).
    async fn put_index(&self, index: &SourceIndex) -> Result<Receipt, Error> {
        Err(OutputError::NoIndexes { index: index.name.to_string() }.into())
    }
}
