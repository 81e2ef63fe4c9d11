//! `registry://HOST/IMAGE[:TAG]`: an image in a registry.
//!
//! Blobs go up in any order, several at a time, and stay invisible: the tag is the last thing that is written, after all
//! of them, so whoever pulls it gets the old image or the whole new one.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt};

use super::content::ContentOutput;
use super::manifest::{FinalManifest, ManifestFormat};
use super::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, OutputError, OutputKind, Receipt};
use crate::blob::{ByteCount, LayerStream, MemoryBlob};
use crate::compression::{Compression, Format};
use crate::digest::Digest;
use crate::element::{Image, ImageName, Layer, StoredLayer};
use crate::error::Error;
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::{Access, Client, FetchedManifest, Mount, Repository, UploadLog, UploadSession};
use crate::source::stored::SourceIndex;

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "registry",
    syntax: "registry://HOST/IMAGE[:TAG]",
    about: "an image in a registry",
    options: &["compression", "format", "max_workers"],
};

/// Blobs that are asked for at once.
const CONFIRMED_AT_ONCE: usize = 8;

/// An image that is being pushed.
#[derive(Debug)]
pub struct RegistryOutput {
    reference: Reference,
    repository: Repository,
    compression: Option<Compression>,
    format: ManifestFormat,
    foreign_layers: bool,
    confirm: bool,
    /// An entry of an index, that is put under whatever digest it has.
    is_entry_to_be: bool,
}

impl RegistryOutput {
    /// Pushes to `reference`. Every layer becomes `compression`, if one is given; otherwise it keeps what it has.
    pub fn new(
        client: &Client,
        reference: Reference,
        compression: Option<Compression>,
        format: ManifestFormat,
    ) -> Self {
        Self {
            repository: client.repository(&reference, Access::Push),
            reference,
            compression,
            format,
            foreign_layers: false,
            confirm: false,
            is_entry_to_be: false,
        }
    }

    /// Pushes the bytes of foreign layers too, if `wanted`; otherwise only their descriptors are in the manifest.
    #[must_use]
    pub fn with_foreign_layers(self, wanted: bool) -> Self {
        Self { foreign_layers: wanted, ..self }
    }

    /// Asks the registry for every blob before the manifest is put, if `wanted`.
    #[must_use]
    pub fn with_confirmation(self, wanted: bool) -> Self {
        Self { confirm: wanted, ..self }
    }

    /// Records the upload of a layer in `log`, and goes on with what was recorded there: of an output that gets one layer.
    #[must_use]
    pub fn with_upload_log(self, log: Arc<dyn UploadLog>) -> Self {
        Self { repository: self.repository.logging_to(log), ..self }
    }

    /// Whether the destination has a layer, or can be given it from another of its repositories.
    async fn find(&self, layer: &Layer) -> Result<Found, Error> {
        if layer.is_foreign() && !self.foreign_layers {
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

    /// A destination that names a digest gets exactly that manifest or nothing.
    fn refuse_other(&self, digest: &Digest) -> Result<(), OutputError> {
        match self.reference.digest() {
            Some(expected) if expected != digest && !self.is_entry_to_be => {
                Err(OutputError::ByDigest { expected: expected.clone(), actual: digest.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Whether the destination has every blob of an image, as it was written. What layers become may have been said by others than
    /// this process, and a registry may have lost what it took.
    async fn confirm_blobs(&self, finished: &FinishedImage<'_>, config: &Digest) -> Result<(), Error> {
        let layers = finished.layers.iter().filter_map(|written| {
            let layer = &finished.image.layers[written.index];
            match (&written.stored, &layer.descriptor) {
                (StoredLayer::Written { digest, size, .. }, _) => Some((digest.clone(), *size)),
                (StoredLayer::Original, Some(_)) if layer.is_foreign() && !self.foreign_layers => None,
                (StoredLayer::Original, Some(descriptor)) => {
                    Some((descriptor.digest.clone(), descriptor.size))
                }
                (StoredLayer::Original, None) => None,
            }
        });
        let mut blobs: Vec<_> = layers.chain([(config.clone(), finished.config.len() as u64)]).collect();
        let mut asked = HashSet::new();
        blobs.retain(|blob| asked.insert(blob.clone()));
        let confirmed = blobs.into_iter().map(|(digest, size)| async move {
            let found = match self.repository.find_blob(&digest).await? {
                None => None,
                Some(Some(found)) if found != size => Some(found),
                Some(_) => return Ok(()),
            };
            let destination = self.reference.to_string();
            Err(Error::from(OutputError::BlobLost { destination, digest, size, found }))
        });
        futures_util::stream::iter(confirmed).buffered(CONFIRMED_AT_ONCE).try_collect().await
    }

    /// Makes a manifest visible, all of whose blobs are there.
    async fn put(&self, manifest: FinalManifest) -> Result<Receipt, Error> {
        let FinalManifest { bytes, media_type, digest } = manifest;
        let reference = match self.is_entry_to_be {
            true => self.reference.with_digest(digest.clone()),
            false => self.reference.clone(),
        };
        let size = bytes.len() as u64;
        self.repository.put_manifest(&reference.manifest(), &media_type, bytes.clone()).await?;
        Ok(Receipt {
            manifest: Some(bytes),
            manifest_digest: Some(digest),
            manifest_media_type: Some(media_type),
            manifest_size: Some(size),
            destination: format!("registry://{reference}"),
            ..Receipt::default()
        })
    }
}

/// Whether a blob is at the destination.
enum Found {
    /// It is.
    Here,
    /// It is not; a registry that did not mount it may have opened an upload for it.
    Not(Option<UploadSession>),
}

#[async_trait::async_trait]
impl ImageOutput for RegistryOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Stored { compression: self.compression }
    }

    fn format(&self) -> ManifestFormat {
        self.format
    }

    async fn begin(&self, image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        Ok(FinalManifest::foresee(image, self.format, self.compression)?)
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

    fn repository(&self) -> Option<&Repository> {
        Some(&self.repository)
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let FinalManifest { bytes, media_type, digest } = FinalManifest::of(&finished, self.format)?;
        self.refuse_other(&digest)?;
        let config = &finished.config;
        let config_digest = Digest::sha256(config);
        let size = config.len() as u64;
        let is_there = self.repository.blob_head(&config_digest).await? == Some(size);
        if !is_there {
            let blob = MemoryBlob::new(config.clone());
            self.repository.upload_blob(&blob, &config_digest, size, None, &ByteCount::default()).await?;
        }
        if self.confirm {
            self.confirm_blobs(&finished, &config_digest).await?;
        }
        if let Some(permit) = finished.permit {
            permit.check().await?;
        }
        let receipt = self.put(FinalManifest { bytes, media_type, digest }).await?;
        Ok(Receipt { config_moved: (!is_there).then_some(size), ..receipt })
    }

    fn entry(&self, digest: &Digest) -> Option<Arc<dyn ImageOutput>> {
        let reference = self.reference.with_digest(digest.clone());
        Some(Arc::new(Self {
            reference,
            repository: self.repository.clone(),
            is_entry_to_be: false,
            ..*self
        }))
    }

    fn entry_to_be(&self) -> Option<Arc<dyn ImageOutput>> {
        let (reference, repository) = (self.reference.clone(), self.repository.clone());
        Some(Arc::new(Self { reference, repository, is_entry_to_be: true, ..*self }))
    }

    fn content(&self) -> Option<Arc<dyn ContentOutput>> {
        let (reference, repository) = (self.reference.clone(), self.repository.clone());
        Some(Arc::new(Self { reference, repository, ..*self }))
    }

    async fn put_index(&self, index: &SourceIndex) -> Result<Receipt, Error> {
        self.refuse_other(&index.manifest.digest)?;
        self.put(FinalManifest::of_index(index)).await
    }
}

#[async_trait::async_trait]
impl ContentOutput for RegistryOutput {
    fn destination(&self) -> String {
        format!("registry://{}", self.reference)
    }

    fn wanted(&self) -> Option<&Digest> {
        self.reference.digest()
    }

    fn names_many(&self) -> bool {
        true
    }

    async fn open(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn is_named(&self, digest: &Digest) -> Result<bool, Error> {
        let head = self.repository.manifest_head(&self.reference.manifest(), &ACCEPTED_MANIFESTS).await?;
        Ok(head.is_some_and(|head| head.digest.as_ref() == Some(digest)))
    }

    async fn has_manifest(&self, digest: &Digest, _size: u64) -> Result<bool, Error> {
        let wanted = ManifestRef::Digest(digest.clone());
        Ok(self.repository.manifest_head(&wanted, &ACCEPTED_MANIFESTS).await?.is_some())
    }

    async fn put_blob(&self, blob: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        self.copy_layer(blob, progress).await
    }

    async fn put_manifest(&self, manifest: &FetchedManifest) -> Result<Option<Digest>, Error> {
        let wanted = ManifestRef::Digest(manifest.digest.clone());
        let put = self.repository.put_manifest(&wanted, &manifest.media_type, manifest.bytes.clone()).await?;
        Ok(put.subject)
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        Ok(self.repository.find_manifest(&ManifestRef::Tag(tag.clone()), &ACCEPTED_MANIFESTS).await?)
    }

    async fn put_tagged(&self, tag: &Tag, manifest: &FetchedManifest) -> Result<(), Error> {
        let tag = ManifestRef::Tag(tag.clone());
        self.repository.put_manifest(&tag, &manifest.media_type, manifest.bytes.clone()).await?;
        Ok(())
    }

    async fn put_named(&self, manifest: &FetchedManifest, _name: &ImageName) -> Result<(), Error> {
        let named = self.reference.manifest();
        self.repository.put_manifest(&named, &manifest.media_type, manifest.bytes.clone()).await?;
        Ok(())
    }
}
