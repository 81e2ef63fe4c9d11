//! The manifest of a finished image, for outputs that keep manifests: the source's own, byte for byte, where nothing changed.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::FinishedImage;
use crate::blob::BlobSummary;
use crate::compression::Compression;
use crate::digest::Digest;
use crate::element::{Image, StoredLayer, WrittenLayer};
use crate::manifest::{
    Annotations, BuildError, Family, ManifestLayer, annotate, build_image_manifest, family_for, to_bytes,
};
use crate::source::stored::SourceIndex;

/// The format of the manifest that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ManifestFormat {
    /// The source's; OCI where a layer is zstd, which docker schema2 cannot name.
    #[default]
    Keep,
    /// Always this one.
    Always(Family),
}

impl std::fmt::Display for ManifestFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Always(Family::Docker) => "docker",
            Self::Always(Family::Oci) => "oci",
        })
    }
}

impl std::str::FromStr for ManifestFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "keep" => Ok(Self::Keep),
            "docker" => Ok(Self::Always(Family::Docker)),
            "oci" => Ok(Self::Always(Family::Oci)),
            _ => Err("expected keep, docker or oci"),
        }
    }
}

/// A manifest that is to be written.
#[derive(Clone, Debug)]
pub(super) struct FinalManifest {
    /// Its exact bytes.
    pub(super) bytes: Bytes,
    /// What they are.
    pub(super) media_type: String,
    /// What they hash to.
    pub(super) digest: Digest,
}

impl FinalManifest {
    /// The manifest of a finished image: the source's own where nothing changed.
    pub(super) fn of(finished: &FinishedImage<'_>, format: ManifestFormat) -> Result<Self, BuildError> {
        let image = finished.image;
        let untouched = image.config.original.as_ref() == Some(&finished.config)
            && finished.layers.iter().all(|layer| layer.stored == StoredLayer::Original);
        let keeps_family = match format {
            ManifestFormat::Keep => true,
            ManifestFormat::Always(family) => family == image.family,
        };
        if let (Some(source), true, true) = (&image.manifest, untouched, keeps_family) {
            return Ok(match finished.annotations.is_empty() {
                true => Self {
                    bytes: source.bytes.clone(),
                    media_type: source.media_type.clone(),
                    digest: source.digest.clone(),
                },
                false => {
                    Self::new(source.parsed.raw().clone(), finished.annotations, source.media_type.clone())
                }
            });
        }
        let layers: Vec<_> = finished.layers.iter().map(|layer| manifest_layer(image, layer)).collect();
        let family = match format {
            ManifestFormat::Keep => family_for(image.family, &layers),
            ManifestFormat::Always(family) => family,
        };
        let config =
            BlobSummary { digest: Digest::sha256(&finished.config), size: finished.config.len() as u64 };
        let source = image.manifest.as_ref().map(|manifest| &manifest.parsed);
        let document = build_image_manifest(family, source, &config, &layers)?;
        Ok(Self::new(document, finished.annotations, family.manifest().to_owned()))
    }

    fn new(mut document: Map<String, Value>, annotations: &Annotations, media_type: String) -> Self {
        annotate(&mut document, annotations);
        let bytes = to_bytes(&document);
        let digest = Digest::sha256(&bytes);
        Self { bytes, media_type, digest }
    }

    /// Whether an image whose family is chosen can be named in it, as far as its source tells: said before its layers are stored,
    /// and not after.
    pub(super) fn foresee(
        image: &Image,
        format: ManifestFormat,
        compression: Option<Compression>,
    ) -> Result<(), BuildError> {
        let ManifestFormat::Always(family) = format else { return Ok(()) };
        if family == image.family && compression.is_none() {
            return Ok(());
        }
        let layers = image.layers.iter().map(|layer| {
            let format = compression.map_or(layer.format, Compression::format);
            let is_kept = layer.is_foreign() || format == layer.format;
            match &layer.descriptor {
                Some(descriptor) if is_kept && image.manifest.is_some() => ManifestLayer::Kept(descriptor),
                _ => ManifestLayer::Written { format, blob: nothing() },
            }
        });
        let source = image.manifest.as_ref().map(|manifest| &manifest.parsed);
        build_image_manifest(family, source, &nothing(), &layers.collect::<Vec<_>>()).map(drop)
    }

    /// An index as its source has it.
    pub(super) fn of_index(index: &SourceIndex) -> Self {
        Self {
            bytes: index.manifest.bytes.clone(),
            media_type: index.parsed.family.index().to_owned(),
            digest: index.manifest.digest.clone(),
        }
    }
}

/// What stands for a blob that is not known yet.
fn nothing() -> BlobSummary {
    BlobSummary { digest: Digest::sha256(""), size: 0 }
}

/// A layer as the manifest is to name it.
fn manifest_layer<'a>(image: &'a Image, written: &WrittenLayer) -> ManifestLayer<'a> {
    let layer = &image.layers[written.index];
    match (&written.stored, &layer.descriptor) {
        (StoredLayer::Written { digest, size, format }, _) => ManifestLayer::Written {
            format: *format,
            blob: BlobSummary { digest: digest.clone(), size: *size },
        },
        // Without a manifest of the source's, the descriptor is one of ours, in no family yet.
        (StoredLayer::Original, Some(descriptor)) if image.manifest.is_none() => ManifestLayer::Written {
            format: layer.format,
            blob: BlobSummary { digest: descriptor.digest.clone(), size: descriptor.size },
        },
        (StoredLayer::Original, Some(descriptor)) => ManifestLayer::Kept(descriptor),
        (StoredLayer::Original, None) => unreachable!("only a layer with a descriptor is kept as it is"),
    }
}
