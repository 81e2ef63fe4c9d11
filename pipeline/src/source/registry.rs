//! `registry://HOST/IMAGE[:TAG|@DIGEST]`: an image in a registry, or the one for the wanted platform of an index.

use futures_util::TryStreamExt;

use super::SourceKind;
use crate::blob::{Blob, BlobRef};
use crate::compression::Format;
use crate::config::{ConfigError, ImageConfig};
use crate::digest::Digest;
use crate::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::manifest::{self, Family, ImageManifest, MAX_DOCUMENT, ParsedManifest, media_type};
use crate::platform::{self, PlatformChoice};
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::{Access, Client, FetchedManifest, Repository};
use crate::schema1::Schema1Manifest;

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
        Self { repository: client.repository(&reference, Access::Pull), reference, platform }
    }

    /// The manifest of one image, having followed indexes to it.
    async fn resolve(&self) -> Result<(FetchedManifest, ParsedManifest), Error> {
        let mut wanted = self.reference.manifest();
        for _ in 0..=MAX_INDEX_DEPTH {
            let fetched = self.repository.manifest(&wanted, &ACCEPTED_MANIFESTS).await?;
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
        let document = match manifest.is_artifact() {
            true => None,
            false => Some(ImageConfig::parse(&bytes).map_err(|source| self.config_error(source))?),
        };
        Ok(ConfigFile { original: Some(bytes.into()), media_type: descriptor.media_type.clone(), document })
    }

    fn config_error(&self, source: ConfigError) -> Error {
        Error::Config { image: self.reference.to_string(), source }
    }

    fn layers(&self, manifest: &ImageManifest, diff_ids: &[Option<Digest>]) -> Vec<Layer> {
        let layers = manifest.layers.iter().enumerate();
        layers
            .map(|(index, descriptor)| Layer {
                index,
                blob: self.repository.blob(&descriptor.digest, Some(descriptor.size)),
                descriptor: Some(descriptor.clone()),
                format: descriptor.layer_type().map_or(Format::None, |layer_type| layer_type.format),
                diff_id: diff_ids.get(index).cloned().flatten(),
                origin: Some(self.repository.clone()),
                keep_stored: true,
            })
            .collect()
    }

    fn name(&self) -> ImageName {
        ImageName { repository: self.reference.name(), tag: self.reference.tag().map(Tag::to_string) }
    }

    async fn image_of(&self, fetched: FetchedManifest, parsed: ImageManifest) -> Result<Image, Error> {
        let config = self.config_file(&parsed).await?;
        let diff_ids = config.document.as_ref().map(ImageConfig::diff_ids).unwrap_or_default();
        if config.document.is_some() && diff_ids.len() != parsed.layers.len() {
            let (diff_ids, layers) = (diff_ids.len(), parsed.layers.len());
            return Err(Error::LayerCount { image: self.reference.to_string(), diff_ids, layers });
        }
        Ok(Image {
            name: self.name(),
            aliases: Vec::new(),
            family: parsed.family,
            layers: self.layers(&parsed, diff_ids),
            config,
            manifest: Some(SourceManifest {
                bytes: fetched.bytes,
                media_type: fetched.media_type,
                digest: fetched.digest,
                parsed,
            }),
        })
    }

    fn image_of_schema1(&self, schema1: Schema1Manifest) -> Image {
        let layers = schema1.layers.iter().enumerate().map(|(index, digest)| Layer {
            index,
            blob: self.repository.blob(digest, None),
            descriptor: None,
            format: Format::Gzip,
            diff_id: None,
            origin: Some(self.repository.clone()),
            keep_stored: true,
        });
        Image {
            name: self.name(),
            aliases: Vec::new(),
            manifest: None,
            family: Family::Docker,
            layers: layers.collect(),
            config: ConfigFile {
                original: None,
                media_type: media_type::DOCKER_CONFIG.to_owned(),
                document: Some(schema1.config),
            },
        }
    }
}

#[async_trait::async_trait]
impl super::ImageSource for RegistrySource {
    async fn image(&self) -> Result<Image, Error> {
        let (fetched, parsed) = self.resolve().await?;
        match parsed {
            ParsedManifest::Image(parsed) => self.image_of(fetched, parsed).await,
            ParsedManifest::Schema1(schema1) => Ok(self.image_of_schema1(schema1)),
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
