//! The elements of an image: one config file and its layers, as a source offers them and as an output stores them.
//!
//! A layer's content is an opener ([`crate::blob::Blob`]), so that every attempt at it can start from the first byte.

use std::collections::HashMap;

use bytes::Bytes;

use crate::blob::BlobRef;
use crate::compression::Format;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::filter::Report;
use crate::manifest::{Descriptor, Family, ImageManifest, LayerType};
use crate::registry::Repository;

/// An image as its source offers it.
#[derive(Debug)]
pub struct Image {
    /// What it is called.
    pub name: ImageName,
    /// Its other names, in a saved tar.
    pub aliases: Vec<String>,
    /// The manifest, where the source has one; a saved tar of docker's has none.
    pub manifest: Option<SourceManifest>,
    /// Whose media types it speaks.
    pub family: Family,
    /// CONFIG_FILE.
    pub config: ConfigFile,
    /// Every IMAGE_LAYER, lowest first.
    pub layers: Vec<Layer>,
}

impl Image {
    /// False for an artifact: its config is not an image's, and its layers have neither diff_id nor history.
    pub fn is_image(&self) -> bool {
        self.config.document.is_some()
    }
}

/// What an image is called: in `RepoTags`, in a search's results, in what `inspect` writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// Without the tag, for example `localhost:5000/app`.
    pub repository: String,
    /// None for an image that is named by digest alone.
    pub tag: Option<String>,
}

impl ImageName {
    /// A name as a file has it: `hello:1.0` stays that.
    pub fn of_tagged(name: &str) -> Self {
        match name.rsplit_once(':') {
            // A colon before a slash belongs to a port.
            Some((repository, tag)) if !tag.contains('/') => {
                Self { repository: repository.to_owned(), tag: Some(tag.to_owned()) }
            }
            _ => Self { repository: name.to_owned(), tag: None },
        }
    }
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.tag {
            Some(tag) => write!(f, "{}:{tag}", self.repository),
            None => f.write_str(&self.repository),
        }
    }
}

/// A manifest, byte for byte.
#[derive(Clone, Debug)]
pub struct SourceManifest {
    /// The exact bytes.
    pub bytes: Bytes,
    /// Their Content-Type.
    pub media_type: String,
    /// Their digest.
    pub digest: Digest,
    /// What they say.
    pub parsed: ImageManifest,
}

/// CONFIG_FILE: an image's configuration.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    /// The exact bytes. None for docker's schema 1, whose history becomes a config here, once the layers are read.
    pub original: Option<Bytes>,
    /// Their media type.
    pub media_type: String,
    /// What they say; None for an artifact's.
    pub document: Option<ImageConfig>,
}

impl ConfigFile {
    /// The digest of the source's bytes.
    pub fn digest(&self) -> Option<Digest> {
        self.original.as_ref().map(Digest::sha256)
    }
}

/// IMAGE_LAYER: one layer, not yet read.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its place, the lowest layer being 0.
    pub index: usize,
    /// Its bytes as stored.
    pub blob: BlobRef,
    /// Media type, digest and size of the stored bytes, where the source knows them.
    pub descriptor: Option<Descriptor>,
    /// What the stored bytes are compressed with, as their media type says, or as they show where they lie at hand.
    pub format: Format,
    /// The digest of its uncompressed tar, where the config says it.
    pub diff_id: Option<Digest>,
    /// The repository that it can be mounted from.
    pub origin: Option<Repository>,
    /// Whether an output that stores blobs may keep the stored form when no filter edits it. False for the plain layers of
    /// a saved tar, which were uncompressed only to be saved.
    pub keep_stored: bool,
    /// Whether nothing but the diff_id says what its bytes should be: no manifest names the blob, so that the digest in the
    /// descriptor was made here, of whatever lies there, or is the name of a file. It is checked on its way.
    pub known_by_diff_id_alone: bool,
}

impl Layer {
    /// How messages call it: its digest, or the name that its source has for it.
    pub fn label(&self) -> String {
        match (&self.descriptor, &self.diff_id) {
            (Some(descriptor), _) => descriptor.digest.to_string(),
            (None, Some(diff_id)) => diff_id.to_string(),
            (None, None) => self.blob.identity(),
        }
    }

    /// Whether it has to be read to learn its diff_id, which no config has told.
    pub fn lacks_diff_id(&self) -> bool {
        self.diff_id.is_none() && self.descriptor.is_none()
    }

    /// A non-distributable layer, whose bytes stay where its `urls` say.
    pub fn is_foreign(&self) -> bool {
        self.descriptor.as_ref().is_some_and(Descriptor::is_foreign)
    }
}

impl Layer {
    /// Equal for layers that are the same in all respects, of which what was found right of one is right of the other.
    ///
    /// The same bytes are another layer where they are said to be foreign, of another size or form, or of another tar: what was found
    /// right of the first would be said of the second, which was never looked at.
    pub fn sameness(&self) -> String {
        let descriptor = self.descriptor.as_ref();
        let size = descriptor.map(|descriptor| descriptor.size.to_string()).unwrap_or_default();
        let diff_id = self.diff_id.as_ref().map(Digest::to_string).unwrap_or_default();
        let (identity, format, is_foreign) = (self.blob.identity(), self.format, self.is_foreign());
        format!("{identity} {size} {format} {is_foreign} {diff_id}")
    }
}

/// For each layer, the first one that is the same: a layer that stands twice is read and written once.
pub fn distinct_layers(layers: &[Layer]) -> Vec<usize> {
    let mut first = HashMap::new();
    layers.iter().map(|layer| *first.entry(layer.sameness()).or_insert(layer.index)).collect()
}

/// A layer that its output has.
#[derive(Clone, Debug)]
pub struct WrittenLayer {
    /// Its place, as [`Layer::index`].
    pub index: usize,
    /// What the output stored: for an output of plain tars, the digest is the diff_id.
    pub stored: StoredLayer,
    /// The digest of its uncompressed tar: computed here when the layer was decompressed, and otherwise what the config says.
    pub diff_id: Option<Digest>,
    /// Whether a filter edited it.
    pub edited: bool,
    /// What each filter reports of it, in the filters' order.
    pub reports: Vec<Option<Report>>,
}

/// What an output stored of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredLayer {
    /// The source's blob as it is, under its own descriptor.
    Original,
    /// Bytes that were written here.
    Written {
        /// Of the bytes as stored.
        digest: Digest,
        /// In bytes.
        size: u64,
        /// What they are compressed with.
        format: Format,
    },
}

impl StoredLayer {
    /// Media type, in OCI's words, digest and size of what the output has of `layer`, where they are known.
    pub fn descriptor(&self, layer: &Layer) -> Option<Descriptor> {
        match self {
            Self::Original => layer.descriptor.clone(),
            Self::Written { digest, size, format } => {
                let media_type = LayerType::new(Family::Oci, *format).name().ok()?;
                Some(Descriptor::new(media_type, digest, *size))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::blob::MemoryBlob;

    const NORMAL: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

    fn layer(index: usize, media_type: &str, size: u64, diff_id: &str) -> Layer {
        Layer {
            index,
            blob: Arc::new(MemoryBlob::new(Bytes::new())),
            descriptor: Some(Descriptor::new(media_type, &Digest::sha256(""), size)),
            format: Format::Gzip,
            diff_id: Some(Digest::sha256(diff_id)),
            origin: None,
            keep_stored: true,
            known_by_diff_id_alone: false,
        }
    }

    #[test]
    fn a_layer_that_stands_twice_is_done_once() {
        let layers = [layer(0, NORMAL, 9, "a"), layer(1, NORMAL, 9, "b"), layer(2, NORMAL, 9, "a")];
        assert_eq!(distinct_layers(&layers), [0, 1, 0]);
    }

    #[test]
    fn the_same_bytes_under_another_description_are_another_layer() {
        let others =
            [layer(1, FOREIGN, 9, "a"), layer(1, NORMAL, 8, "a"), layer(1, NORMAL, 9, "another tar")];
        for other in others {
            assert_eq!(distinct_layers(&[layer(0, NORMAL, 9, "a"), other]), [0, 1]);
        }
    }
}
