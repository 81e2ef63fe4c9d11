//! New image manifests: the source's document with its config and layers replaced, or one from nothing.

use serde_json::{Map, Value, json};

use super::media_type::{DOCKER_CONFIG, OCI_CONFIG};
use super::{Descriptor, Family, ImageManifest, LayerType, ZstdInDocker};
use crate::blob::BlobSummary;
use crate::compression::Format;

/// Keys that OCI has and docker schema2 does not; they go when a document becomes docker's.
const OCI_ONLY: [&str; 3] = ["annotations", "artifactType", "subject"];

/// A layer of the new manifest.
#[derive(Clone, Debug)]
pub enum ManifestLayer<'a> {
    /// As the source has it: its descriptor stays, with annotations, `urls` and keys that we do not know.
    Kept(&'a Descriptor),
    /// With bytes of ours. Annotations that a source had for the position are gone: they described other bytes.
    Written {
        /// What the bytes are compressed with.
        format: Format,
        /// Of the bytes as stored.
        blob: BlobSummary,
    },
}

impl ManifestLayer<'_> {
    fn is_zstd(&self) -> bool {
        match self {
            Self::Kept(descriptor) => {
                descriptor.layer_type().is_some_and(|layer| layer.format == Format::Zstd)
            }
            Self::Written { format, .. } => *format == Format::Zstd,
        }
    }
}

/// Why a manifest cannot be written as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Docker schema2 was asked for.
    #[error(transparent)]
    Zstd(#[from] ZstdInDocker),
    /// The layer has a media type, such as an encrypted layer's, that the other family has no name for.
    #[error(
        "layer {index} has the media type {media_type:?}, which has no counterpart in the {family} format"
    )]
    NoCounterpart {
        /// Which layer, the lowest being 0.
        index: usize,
        /// The source's.
        media_type: String,
        /// The family that was asked for.
        family: Family,
    },
}

/// The family that these layers can be written in: the preferred one, unless that is docker's and a layer is zstd.
pub fn family_for(preferred: Family, layers: &[ManifestLayer<'_>]) -> Family {
    if layers.iter().any(ManifestLayer::is_zstd) { Family::Oci } else { preferred }
}

/// An image manifest.
///
/// With a `source`, its document is kept, in its key order, with only config and layers replaced; in another `family`,
/// media types are converted too, and keys that docker schema2 does not have go. Without one, a minimal document
/// is made.
pub fn build_image_manifest(
    family: Family,
    source: Option<&ImageManifest>,
    config: &BlobSummary,
    layers: &[ManifestLayer<'_>],
) -> Result<Map<String, Value>, BuildError> {
    let layers = layers
        .iter()
        .enumerate()
        .map(|(index, layer)| layer_json(family, index, layer))
        .collect::<Result<Vec<_>, _>>()?;
    let mut document = match source {
        Some(source) if source.family == family => source.raw.clone(),
        Some(source) => converted(&source.raw, family),
        None => named(Map::new(), family),
    };
    document.insert("config".to_owned(), config_json(family, source, config));
    document.insert("layers".to_owned(), layers.into());
    Ok(document)
}

/// The document under the other family's name.
fn converted(raw: &Map<String, Value>, family: Family) -> Map<String, Value> {
    let mut document = raw.clone();
    drop_oci_only(&mut document, family);
    named(document, family)
}

/// The document with its `schemaVersion` and `mediaType`, at its head where they were missing.
fn named(mut document: Map<String, Value>, family: Family) -> Map<String, Value> {
    if !document.contains_key("schemaVersion") {
        document.shift_insert(0, "schemaVersion".to_owned(), 2.into());
    }
    if document.contains_key("mediaType") {
        document.insert("mediaType".to_owned(), family.manifest().into());
    } else {
        document.shift_insert(1, "mediaType".to_owned(), family.manifest().into());
    }
    document
}

fn drop_oci_only(map: &mut Map<String, Value>, family: Family) {
    if family == Family::Docker {
        map.retain(|key, _| !OCI_ONLY.contains(&key.as_str()));
    }
}

fn config_json(family: Family, source: Option<&ImageManifest>, config: &BlobSummary) -> Value {
    let mut map = source.map(|source| source.config.raw().clone()).unwrap_or_default();
    // An artifact's config keeps its type: it is what says which artifact it is.
    let is_image =
        matches!(map.get("mediaType").and_then(Value::as_str), None | Some("" | DOCKER_CONFIG | OCI_CONFIG));
    if is_image {
        map.insert("mediaType".to_owned(), family.config().into());
    }
    if map.get("digest").and_then(Value::as_str) != Some(&config.digest.to_string()) {
        // Both are other bytes: an inline copy and where the old ones can be had.
        map.retain(|key, _| key != "data" && key != "urls");
    }
    map.insert("size".to_owned(), config.size.into());
    map.insert("digest".to_owned(), config.digest.to_string().into());
    if source.is_some_and(|source| source.family != family) {
        drop_oci_only(&mut map, family);
    }
    map.into()
}

fn layer_json(family: Family, index: usize, layer: &ManifestLayer<'_>) -> Result<Value, BuildError> {
    match layer {
        ManifestLayer::Written { format, blob } => Ok(json!({
            "mediaType": LayerType::new(family, *format).name()?,
            "size": blob.size,
            "digest": blob.digest,
        })),
        ManifestLayer::Kept(descriptor) => {
            let mut map = descriptor.raw().clone();
            match descriptor.layer_type() {
                // Also for the same family: containerd's docker zstd is not a name that may be written on.
                Some(layer) => {
                    let name = layer.in_family(family).name()?;
                    if layer.family != family {
                        map.insert("mediaType".to_owned(), name.into());
                        drop_oci_only(&mut map, family);
                    }
                }
                // Another family's layer list cannot hold it; in an OCI manifest any media type may stand.
                None if family == Family::Docker => {
                    return Err(BuildError::NoCounterpart {
                        index,
                        media_type: descriptor.media_type.chars().take(160).collect(),
                        family,
                    });
                }
                None => {}
            }
            Ok(map.into())
        }
    }
}
