//! What sources have in common that hold manifests and blobs by their digests: the way from a name through indexes to one
//! image, and the image with its openers.

use futures_util::TryStreamExt;

use crate::blob::{Blob, BlobError, BlobRef};
use crate::compression::Format;
use crate::config::{ConfigError, ImageConfig};
use crate::digest::Digest;
use crate::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::manifest::{
    self, Descriptor, Family, ImageManifest, Index, MAX_DOCUMENT, ParsedManifest, media_type,
};
use crate::platform::{self, PlatformChoice};
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::{FetchedManifest, Repository};
use crate::schema1::Schema1Manifest;

/// Holds manifests and blobs by their digests.
#[async_trait::async_trait]
pub trait Store: Send + Sync {
    /// How messages call what is being read.
    fn shown(&self) -> String;

    /// What the image is called.
    fn name(&self) -> ImageName;

    /// The manifest that the source was named for.
    async fn first(&self) -> Result<FetchedManifest, Error>;

    /// The manifest that an entry of an index names, its digest checked.
    async fn manifest(&self, entry: &Descriptor) -> Result<FetchedManifest, Error>;

    /// A blob, which may turn out not to be there when it is opened.
    fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<BlobRef, Error>;

    /// A layer's blob likewise; of a foreign one, wherever its bytes are.
    fn layer(&self, descriptor: &Descriptor) -> Result<BlobRef, Error> {
        self.blob(&descriptor.digest, Some(descriptor.size))
    }

    /// The repository that layers can be mounted from.
    fn origin(&self) -> Option<Repository> {
        None
    }

    /// The repository of a registry that all of it comes from, whether that can be asked or not.
    fn repository(&self) -> Option<Reference> {
        let origin = self.origin()?;
        format!("{}/{}", origin.host(), origin.name()).parse().ok()
    }

    /// What the manifest that the source was named for is asked by, in a registry.
    fn wanted(&self) -> Option<ManifestRef> {
        None
    }

    /// The manifest that a tag names beside the one that the source was named for.
    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error>;

    /// What names this manifest as its subject.
    async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error>;
}

/// An index, byte for byte, with what it says.
#[derive(Clone, Debug)]
pub struct SourceIndex {
    /// What it is called.
    pub name: ImageName,
    /// Its exact bytes with their media type and digest.
    pub manifest: FetchedManifest,
    /// What they say.
    pub parsed: Index,
}

/// The image that a source is named for: where that is an index, the one for the wanted platform.
pub(crate) async fn image(store: &dyn Store, platform: &PlatformChoice) -> Result<Image, Error> {
    let mut fetched = store.first().await?;
    let wanted = platform.resolve();
    let (mut is_labelled, mut is_chosen) = (true, false);
    for _ in 0..=MAX_INDEX_DEPTH {
        match parse(store, &fetched)? {
            ParsedManifest::Index(index) => {
                let chosen = platform::select(&index.manifests, &wanted)?;
                (is_labelled, is_chosen) = (chosen.platform.is_some(), true);
                fetched = store.manifest(chosen).await?;
            }
            ParsedManifest::Image(parsed) => {
                let image = image_of(store, fetched, parsed).await?;
                let config = image.config.document.as_ref();
                if !is_chosen {
                    platform.admit(config)?;
                } else if !is_labelled {
                    // Chosen because nothing else was there, and only its config says what it is for.
                    platform::confirm(&[wanted], config)?;
                }
                return Ok(image);
            }
            ParsedManifest::Schema1(schema1) => {
                let image = image_of_schema1(store, schema1)?;
                platform.admit(image.config.document.as_ref().filter(|_| !is_chosen))?;
                return Ok(image);
            }
        }
    }
    Err(Error::IndexDepth(store.shown()))
}

/// The index that a source is named for, if that is one.
pub(crate) async fn index(store: &dyn Store) -> Result<Option<SourceIndex>, Error> {
    let manifest = store.first().await?;
    match parse(store, &manifest)? {
        ParsedManifest::Index(parsed) => Ok(Some(SourceIndex { name: store.name(), manifest, parsed })),
        ParsedManifest::Image(_) | ParsedManifest::Schema1(_) => Ok(None),
    }
}

/// What a manifest says.
pub(crate) fn parse(store: &dyn Store, fetched: &FetchedManifest) -> Result<ParsedManifest, Error> {
    manifest::parse(&fetched.bytes, Some(&fetched.media_type))
        .map_err(|source| Error::Manifest { image: store.shown(), source })
}

async fn image_of(
    store: &dyn Store,
    fetched: FetchedManifest,
    parsed: ImageManifest,
) -> Result<Image, Error> {
    let config = config_file(store, &parsed).await?;
    let diff_ids = config.document.as_ref().map(ImageConfig::diff_ids).unwrap_or_default();
    if config.document.is_some() && diff_ids.len() != parsed.layers.len() {
        let (diff_ids, layers) = (diff_ids.len(), parsed.layers.len());
        return Err(Error::LayerCount { image: store.shown(), diff_ids, layers });
    }
    Ok(Image {
        name: store.name(),
        aliases: Vec::new(),
        family: parsed.family,
        layers: layers(store, &parsed, diff_ids)?,
        config,
        manifest: Some(SourceManifest {
            bytes: fetched.bytes,
            // Some servers name no type, or one that says nothing: what the document is has been found out by now.
            media_type: parsed.family.manifest().to_owned(),
            digest: fetched.digest,
            parsed,
        }),
    })
}

async fn config_file(store: &dyn Store, manifest: &ImageManifest) -> Result<ConfigFile, Error> {
    let descriptor = &manifest.config;
    let blob = store.blob(&descriptor.digest, Some(descriptor.size))?;
    let bytes = read_document(&blob, descriptor.size).await?;
    let fail = |source: ConfigError| Error::Config { image: store.shown(), source };
    let document = match manifest.is_artifact() {
        true => None,
        false => Some(ImageConfig::parse(&bytes).map_err(fail)?),
    };
    Ok(ConfigFile { original: Some(bytes.into()), media_type: descriptor.media_type.clone(), document })
}

fn layers(
    store: &dyn Store,
    manifest: &ImageManifest,
    diff_ids: &[Option<Digest>],
) -> Result<Vec<Layer>, Error> {
    let layers = manifest.layers.iter().enumerate();
    layers
        .map(|(index, descriptor)| {
            Ok(Layer {
                index,
                blob: store.layer(descriptor)?,
                descriptor: Some(descriptor.clone()),
                format: descriptor.layer_type().map_or(Format::None, |layer_type| layer_type.format),
                diff_id: diff_ids.get(index).cloned().flatten(),
                origin: store.origin(),
                keep_stored: true,
                known_by_diff_id_alone: false,
            })
        })
        .collect()
}

fn image_of_schema1(store: &dyn Store, schema1: Schema1Manifest) -> Result<Image, Error> {
    let layers = schema1.layers.iter().enumerate().map(|(index, digest)| {
        Ok(Layer {
            index,
            blob: store.blob(digest, None)?,
            descriptor: None,
            format: Format::Gzip,
            diff_id: None,
            origin: store.origin(),
            keep_stored: true,
            known_by_diff_id_alone: false,
        })
    });
    Ok(Image {
        name: store.name(),
        aliases: Vec::new(),
        manifest: None,
        family: Family::Docker,
        layers: layers.collect::<Result<_, Error>>()?,
        config: ConfigFile {
            original: None,
            media_type: media_type::DOCKER_CONFIG.to_owned(),
            document: Some(schema1.config),
        },
    })
}

/// The whole of a small document: a config.
pub(crate) async fn read_document(blob: &BlobRef, size: u64) -> Result<Vec<u8>, Error> {
    if size > MAX_DOCUMENT as u64 {
        let actual = size;
        return Err(BlobError::Size { expected: MAX_DOCUMENT as u64, actual }.into());
    }
    let stream = Blob::open(blob.as_ref()).await?;
    Ok(stream
        .try_fold(Vec::new(), |mut document, bytes| async move {
            document.extend_from_slice(&bytes);
            Ok(document)
        })
        .await?)
}
