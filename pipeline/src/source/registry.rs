//! `registry://HOST/IMAGE[:TAG|@DIGEST]`: an image in a registry, or the one for the wanted platform of an index.

use futures_util::TryStreamExt;

use super::SourceKind;
use crate::blob::{Blob, BlobRef};
use crate::config::Config;
use crate::digest::Digest;
use crate::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::manifest::{self, Family, ImageManifest, MAX_DOCUMENT, ParsedManifest, media_type};
use crate::platform::{self, PlatformChoice};
use crate::reference::Reference;
use crate::registry::{Client, FetchedManifest, ManifestRef, Repository};
use crate::schema1::Schema1;

/// This source's line in the table.
pub const KIND: SourceKind = SourceKind {
    scheme: "registry",
    syntax: "registry://HOST/IMAGE[:TAG|@DIGEST]",
    about: "an image in a registry",
    options: &["os", "arch", "variant", "max_workers"],
};

/// An image in a registry.
#[derive(Debug)]
pub struct RegistrySource {
    reference: Reference,
    repository: Repository,
    platform: PlatformChoice,
}

impl RegistrySource {
    /// The image that `reference` names, in the variant for `platform` if it names an index.
    pub fn new(client: &Client, reference: Reference, platform: PlatformChoice) -> Self {
        Self { repository: client.repository(&reference), reference, platform }
    }

    /// The manifest of one image, having followed indexes to it.
    async fn resolve(&self) -> Result<(FetchedManifest, ParsedManifest), Error> {
        let mut wanted = ManifestRef::from(&self.reference);
        for _ in 0..=MAX_INDEX_DEPTH {
            let fetched = self.repository.manifest(&wanted).await?;
            let parsed = manifest::parse(&fetched.bytes, Some(&fetched.media_type))
                .map_err(|source| Error::Manifest { image: self.reference.to_string(), source })?;
            match parsed {
                ParsedManifest::Index(index) => {
                    let chosen = platform::select(&index.manifests, &self.platform.resolve())?;
                    wanted = ManifestRef::Digest(chosen.digest.clone());
                }
                parsed => return Ok((fetched, parsed)),
            }
        }
        Err(Error::IndexDepth(self.reference.to_string()))
    }

    async fn config_file(&self, manifest: &ImageManifest) -> Result<ConfigFile, Error> {
        let descriptor = &manifest.config;
        let blob = self.repository.blob(&descriptor.digest, Some(descriptor.size));
        let bytes = read_document(&blob, descriptor.size).await?;
        Ok(ConfigFile {
            bytes: bytes.into(),
            digest: descriptor.digest.clone(),
            media_type: descriptor.media_type.clone(),
        })
    }

    fn layers(&self, manifest: &ImageManifest, diff_ids: &[Digest]) -> Vec<Layer> {
        let layers = manifest.layers.iter().enumerate();
        layers
            .map(|(index, descriptor)| Layer {
                index,
                blob: self.repository.blob(&descriptor.digest, Some(descriptor.size)),
                descriptor: Some(descriptor.clone()),
                diff_id: diff_ids.get(index).cloned(),
                origin: Some(self.repository.clone()),
                keep_stored: true,
            })
            .collect()
    }

    fn name(&self) -> ImageName {
        ImageName { repository: self.reference.name(), tag: self.reference.tag().map(str::to_owned) }
    }

    async fn from_manifest(&self, fetched: FetchedManifest, parsed: ImageManifest) -> Result<Image, Error> {
        let config = self.config_file(&parsed).await?;
        let is_image = !parsed.is_artifact();
        let mut diff_ids = Vec::new();
        if is_image {
            let fail = |source| Error::Config { digest: config.digest.clone(), source };
            let document = Config::parse(&config.bytes).map_err(fail)?;
            diff_ids = document.diff_ids().map_err(fail)?;
            document.check_layer_count(parsed.layers.len()).map_err(fail)?;
        }
        Ok(Image {
            name: self.name(),
            family: parsed.family,
            layers: self.layers(&parsed, &diff_ids),
            config,
            is_image,
            manifest: Some(SourceManifest {
                bytes: fetched.bytes,
                media_type: fetched.media_type,
                digest: fetched.digest,
                parsed,
            }),
        })
    }

    fn from_schema1(&self, schema1: &Schema1) -> Image {
        let bytes = bytes::Bytes::from(schema1.config.clone());
        let layers = schema1.layers.iter().enumerate().map(|(index, digest)| Layer {
            index,
            blob: self.repository.blob(digest, None),
            descriptor: None,
            diff_id: None,
            origin: Some(self.repository.clone()),
            keep_stored: true,
        });
        Image {
            name: self.name(),
            manifest: None,
            family: Family::Docker,
            layers: layers.collect(),
            config: ConfigFile {
                digest: Digest::sha256(&bytes),
                bytes,
                media_type: media_type::DOCKER_CONFIG.to_owned(),
            },
            is_image: true,
        }
    }
}

#[async_trait::async_trait]
impl super::ImageSource for RegistrySource {
    async fn image(&self) -> Result<Image, Error> {
        let (fetched, parsed) = self.resolve().await?;
        match parsed {
            ParsedManifest::Image(parsed) => self.from_manifest(fetched, parsed).await,
            ParsedManifest::Schema1(schema1) => Ok(self.from_schema1(&schema1)),
            ParsedManifest::Index(_) => unreachable!("resolve follows every index"),
        }
    }
}

/// The whole of a small document: a config.
async fn read_document(blob: &BlobRef, size: u64) -> Result<Vec<u8>, Error> {
    if size > MAX_DOCUMENT as u64 {
        let actual = size;
        return Err(crate::blob::BlobError::Size { expected: MAX_DOCUMENT as u64, actual }.into());
    }
    let stream = Blob::open(blob.as_ref()).await?;
    Ok(stream
        .try_fold(Vec::new(), |mut document, bytes| async move {
            document.extend_from_slice(&bytes);
            Ok(document)
        })
        .await?)
}
