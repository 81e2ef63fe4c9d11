//! `registry://HOST/IMAGE[:TAG]`: an image in a registry.
//!
//! Blobs go up in any order, several at a time, and stay invisible: the tag is the last thing that is written, after all
//! of them, so whoever pulls it gets the old image or the whole new one.

use super::{ExpectedLayer, FinishedImage, LayerForm, Moved, OutputError, OutputKind, Receipt};
use crate::blob::{BlobSummary, ByteCount, LayerStream, MemoryBlob};
use crate::compression::{Compression, Format};
use crate::digest::Digest;
use crate::element::{Image, Layer, StoredLayer, WrittenLayer};
use crate::error::Error;
use crate::manifest::{Family, ManifestLayer, build_image_manifest, family_for};
use crate::reference::Reference;
use crate::registry::{Access, Client, Mount, Repository, UploadSession};

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "registry",
    syntax: "registry://HOST/IMAGE[:TAG]",
    about: "an image in a registry",
    options: &["compression", "format", "max_workers"],
};

/// The format of the manifest that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ManifestFormat {
    /// The source's; OCI where a layer is zstd, which docker schema2 cannot name.
    #[default]
    Keep,
    /// Always this one.
    Always(Family),
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

/// An image that is being pushed.
#[derive(Debug)]
pub struct RegistryOutput {
    reference: Reference,
    repository: Repository,
    compression: Option<Compression>,
    format: ManifestFormat,
}

impl RegistryOutput {
    /// Pushes to `reference`. Every layer becomes `compression`, if one is given; otherwise it keeps what it has.
    pub fn new(
        client: &Client,
        reference: Reference,
        compression: Option<Compression>,
        format: ManifestFormat,
    ) -> Self {
        Self { repository: client.repository(&reference, Access::Push), reference, compression, format }
    }

    /// Whether the destination has a layer, or can be given it from another of its repositories.
    async fn find(&self, layer: &Layer) -> Result<Found, Error> {
        if layer.is_foreign() {
            return Ok(Found::Here);
        }
        let Some(descriptor) = &layer.descriptor else { return Ok(Found::Not(None)) };
        if self.repository.blob_head(&descriptor.digest).await? == Some(descriptor.size) {
            return Ok(Found::Here);
        }
        match &layer.origin {
            Some(origin)
                if origin.host() == self.repository.host() && origin.name() != self.repository.name() =>
            {
                match self.repository.mount(&descriptor.digest, origin.name()).await {
                    Mount::Mounted => Ok(Found::Here),
                    Mount::Session(session) => Ok(Found::Not(Some(session))),
                    Mount::Unsupported => Ok(Found::Not(None)),
                }
            }
            _ => Ok(Found::Not(None)),
        }
    }

    /// The bytes, media type and digest of the final manifest: the source's own where nothing changed.
    fn manifest(&self, finished: &FinishedImage<'_>) -> Result<(bytes::Bytes, String, Digest), Error> {
        let image = finished.image;
        let untouched = image.config.original.as_ref() == Some(&finished.config)
            && finished.layers.iter().all(|layer| layer.stored == StoredLayer::Original);
        let keeps_family = match self.format {
            ManifestFormat::Keep => true,
            ManifestFormat::Always(family) => family == image.family,
        };
        if let (Some(source), true, true) = (&image.manifest, untouched, keeps_family) {
            return Ok((source.bytes.clone(), source.media_type.clone(), source.digest.clone()));
        }
        let layers: Vec<_> = finished.layers.iter().map(|layer| manifest_layer(image, layer)).collect();
        let family = match self.format {
            ManifestFormat::Keep => family_for(image.family, &layers),
            ManifestFormat::Always(family) => family,
        };
        let config =
            BlobSummary { digest: Digest::sha256(&finished.config), size: finished.config.len() as u64 };
        let source = image.manifest.as_ref().map(|manifest| &manifest.parsed);
        let bytes = build_image_manifest(family, source, &config, &layers)?;
        let digest = Digest::sha256(&bytes);
        Ok((bytes, family.manifest().to_owned(), digest))
    }
}

/// Whether a blob is at the destination.
enum Found {
    /// It is.
    Here,
    /// It is not; a registry that did not mount it may have opened an upload for it.
    Not(Option<UploadSession>),
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

#[async_trait::async_trait]
impl super::ImageOutput for RegistryOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Stored { compression: self.compression }
    }

    async fn begin(&self, _image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        // Docker schema2 cannot name zstd; said now, not after the layers have been uploaded.
        let docker = self.format == ManifestFormat::Always(Family::Docker);
        match self.compression {
            Some(compression) if docker && compression.format() == Format::Zstd => {
                Err(OutputError::ZstdInDocker.into())
            }
            _ => Ok(()),
        }
    }

    async fn has_layer(&self, layer: &Layer) -> Result<bool, Error> {
        Ok(matches!(self.find(layer).await?, Found::Here))
    }

    async fn copy_layer(&self, layer: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        let session = match self.find(layer).await? {
            Found::Here => return Ok(Moved::Nothing),
            Found::Not(session) => session,
        };
        let descriptor = layer.descriptor.as_ref().expect("only a layer with a descriptor is copied");
        let (digest, size) = (&descriptor.digest, descriptor.size);
        self.repository.upload_blob(layer.blob.as_ref(), digest, size, session, progress).await?;
        Ok(Moved::Bytes)
    }

    async fn write_layer(
        &self,
        _index: usize,
        stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        let summary = self.repository.upload_stream(stream, progress).await?;
        Ok(StoredLayer::Written { digest: summary.digest, size: summary.size, format })
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let (bytes, media_type, digest) = self.manifest(&finished)?;
        if let Some(expected) = self.reference.digest()
            && *expected != digest
        {
            return Err(OutputError::ByDigest { expected: expected.clone(), actual: digest }.into());
        }
        let config = &finished.config;
        let config_digest = Digest::sha256(config);
        if self.repository.blob_head(&config_digest).await? != Some(config.len() as u64) {
            let blob = MemoryBlob::new(config.clone());
            let size = config.len() as u64;
            self.repository.upload_blob(&blob, &config_digest, size, None, &ByteCount::default()).await?;
        }
        let target = self.reference.manifest();
        self.repository.put_manifest(&target, &media_type, bytes).await?;
        Ok(Receipt {
            manifest_digest: Some(digest),
            manifest_media_type: Some(media_type),
            destination: format!("registry://{}", self.reference),
        })
    }
}
