//! `tar://PATH`: an image out of a saved tar, in every form that `docker save`, `podman save` and their kin write.
//!
//! All of them have a `manifest.json` that names a config and layers (docker's v1.2); Docker 25 and later put these under
//! `blobs/sha256/`, and a save from containerd's store keeps the layers compressed and the registry's own manifest beside
//! them. [`contents`] finds the members; this file decides which image is meant and what its layers are.

mod contents;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub(super) use self::contents::clean;
use self::contents::{Contents, ContentsError};
use super::SourceKind;
use crate::blob::Blob;
use crate::compression::Format;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::manifest::{
    self, Descriptor, Family, ImageManifest, LayerType, MAX_DOCUMENT, ParsedManifest, media_type,
};
use crate::reference::Reference;
use crate::spool::{FileRegion, SpoolDir};

/// This source's line in the table.
pub const KIND: SourceKind = SourceKind {
    scheme: "tar",
    syntax: "tar://PATH[?image=NAME:TAG]",
    about: "a saved tar, plain or compressed; tar://- is standard input",
    options: &["image"],
};

/// Why a saved tar could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SavedTarError {
    /// The operating system said no, or the outer compression is broken.
    #[error("failed to read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What happened.
        source: std::io::Error,
    },
    /// The outer tar is damaged.
    #[error("{path} is not a tar that can be read: {reason}")]
    NotATar {
        /// The file.
        path: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// It is a tar, but nobody's saved image.
    #[error("{path} has no manifest.json: it is not a saved image")]
    NoManifest {
        /// The file.
        path: String,
    },
    /// `manifest.json` is not what it should be.
    #[error("{path}: manifest.json: {reason}")]
    BadManifest {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A member that `manifest.json` names is missing, or a link leads nowhere.
    #[error("{path}: manifest.json names {member:?}, which is not in the tar")]
    Missing {
        /// The file.
        path: String,
        /// The member.
        member: String,
    },
    /// A member whose name is its digest has other bytes.
    #[error("{path}: {member} is damaged: its bytes are {computed}")]
    Damaged {
        /// The file.
        path: String,
        /// The member.
        member: String,
        /// What its bytes hash to.
        computed: Digest,
    },
    /// There are several images, or none by the given name.
    #[error("{path} holds {}: choose one with ?image=NAME:TAG{}", .images.join(", "), .wanted.as_ref().map(|wanted| format!(" ({wanted:?} is none of them)")).unwrap_or_default())]
    WhichImage {
        /// The file.
        path: String,
        /// What was asked for.
        wanted: Option<String>,
        /// What there is.
        images: Vec<String>,
    },
}

impl SavedTarError {
    /// Whether the machine failed, rather than the file's content.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

/// A saved tar.
#[derive(Debug)]
pub struct SavedTarSource {
    path: PathBuf,
    image: Option<String>,
    /// Only an image with these layers is the right one.
    diff_ids: Option<Vec<Digest>>,
    spools: SpoolDir,
}

/// The image with these diff_ids out of a saved tar that comes in a stream and is kept in `spools`; `name` is for messages.
pub(super) async fn from_stream(
    stream: impl tokio::io::AsyncRead + Send + Unpin + 'static,
    name: &str,
    diff_ids: &[Digest],
    spools: SpoolDir,
) -> Result<Image, Error> {
    let fail = |error: ContentsError| error.into_saved_tar_error(name.to_owned());
    let contents = Contents::read(stream, name, &spools).await.map_err(fail)?;
    let diff_ids = Some(diff_ids.to_vec());
    SavedTarSource { diff_ids, ..SavedTarSource::new(Path::new(name), None, spools) }.find(&contents)
}

/// One image of `manifest.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl SavedTarSource {
    /// The image called `image`, or the only one, of the tar at `path`, or of standard input when that is `-`. What cannot
    /// be read twice from where it is (a pipe, a compressed file) is kept in `spools`.
    pub fn new(path: impl Into<PathBuf>, image: Option<String>, spools: SpoolDir) -> Self {
        Self { path: path.into(), image, diff_ids: None, spools }
    }

    fn path(&self) -> String {
        if self.path.as_os_str() == "-" {
            "standard input".to_owned()
        } else {
            self.path.display().to_string()
        }
    }

    fn choose(&self, images: Vec<SavedImage>) -> Result<(SavedImage, Option<String>), SavedTarError> {
        let which = |images: &[SavedImage]| SavedTarError::WhichImage {
            path: self.path(),
            wanted: self.image.clone(),
            images: images.iter().map(SavedImage::label).collect(),
        };
        let Some(wanted) = &self.image else {
            return match <[SavedImage; 1]>::try_from(images) {
                Ok([image]) => {
                    let tag = image.tags().first().cloned();
                    Ok((image, tag))
                }
                Err(images) => Err(which(&images)),
            };
        };
        let found = images.iter().find_map(|image| {
            let tag = image.tags().iter().find(|tag| same_name(tag, wanted))?;
            Some((image.clone(), Some(tag.clone())))
        });
        found.ok_or_else(|| which(&images))
    }

    fn read(&self, contents: &Contents, member: &str) -> Result<Vec<u8>, SavedTarError> {
        let region = self.region(contents, member)?;
        region
            .read_small(MAX_DOCUMENT as u64)
            .map_err(|source| SavedTarError::Io { path: self.path(), source })
    }

    fn region(&self, contents: &Contents, member: &str) -> Result<FileRegion, SavedTarError> {
        contents
            .get(member)
            .ok_or_else(|| SavedTarError::Missing { path: self.path(), member: member.to_owned() })
    }

    fn config(&self, contents: &Contents, member: &str) -> Result<ConfigFile, Error> {
        let bytes = self.read(contents, member)?;
        let digest = Digest::sha256(&bytes);
        if named_digest(member).is_some_and(|named| named != digest) {
            let (path, member) = (self.path(), member.to_owned());
            return Err(SavedTarError::Damaged { path, member, computed: digest }.into());
        }
        let fail = |source| Error::Config { image: self.path(), source };
        Ok(ConfigFile {
            document: Some(ImageConfig::parse(&bytes).map_err(fail)?),
            original: Some(bytes.into()),
            media_type: media_type::DOCKER_CONFIG.to_owned(),
        })
    }

    fn layer(
        &self,
        contents: &Contents,
        index: usize,
        member: &str,
        diff_id: Option<&Digest>,
    ) -> Result<Layer, SavedTarError> {
        let fail = |source| SavedTarError::Io { path: self.path(), source };
        let mut region = self.region(contents, member)?;
        let format = Format::sniff(region.peek(&mut [0; 4]).map_err(fail)?);
        let mut descriptor = None;
        if format != Format::None {
            let digest = match named_digest(member) {
                Some(digest) => digest,
                None => region.hash().map_err(fail)?,
            };
            let size = region.size().expect("a region knows its size");
            region = region.verified(digest.clone());
            let media_type = LayerType::new(Family::Oci, format).name().expect("oci has every format");
            descriptor = Some(Descriptor::new(media_type, &digest, size));
        }
        Ok(Layer {
            index,
            blob: std::sync::Arc::new(region),
            descriptor,
            format,
            diff_id: diff_id.cloned(),
            origin: None,
            keep_stored: format != Format::None,
        })
    }

    /// The registry's own manifest of this image, where the tar kept it: the one under `index.json` with that config.
    fn original_manifest(&self, contents: &Contents, config: &Digest) -> Option<SourceManifest> {
        let mut documents = vec![(contents.get("index.json")?, None, 0)];
        while let Some((region, digest, depth)) = documents.pop() {
            let bytes = region.read_small(MAX_DOCUMENT as u64).ok()?;
            if digest.is_some_and(|digest| digest != Digest::sha256(&bytes)) || depth > MAX_INDEX_DEPTH {
                continue;
            }
            match manifest::parse(&bytes, None) {
                Ok(ParsedManifest::Index(index)) => {
                    for entry in index.manifests {
                        if let Some(region) = contents.get(&blob_member(&entry.digest)) {
                            documents.push((region, Some(entry.digest), depth + 1));
                        }
                    }
                }
                Ok(ParsedManifest::Image(parsed)) if parsed.config.digest == *config => {
                    return Some(SourceManifest {
                        digest: Digest::sha256(&bytes),
                        media_type: parsed.family.manifest().to_owned(),
                        bytes: bytes.into(),
                        parsed,
                    });
                }
                _ => {}
            }
        }
        None
    }

    fn find(&self, contents: &Contents) -> Result<Image, Error> {
        if contents.get("manifest.json").is_none() {
            return Err(SavedTarError::NoManifest { path: self.path() }.into());
        }
        let bad = |reason: String| SavedTarError::BadManifest { path: self.path(), reason };
        let mut images: Vec<SavedImage> = serde_json::from_slice(&self.read(contents, "manifest.json")?)
            .map_err(|error| bad(error.to_string()))?;
        if let (Some(wanted), 2..) = (&self.diff_ids, images.len()) {
            // One for each platform, of which the Engine has told which one is meant.
            let has_layers = |image: &SavedImage| -> Option<bool> {
                let config = self.config(contents, &image.config).ok()?.document?;
                Some(config.diff_ids().iter().flatten().eq(wanted))
            };
            images.retain(|image| has_layers(image) == Some(true));
        }
        let (saved, tag) = self.choose(images)?;
        let mut config = self.config(contents, &saved.config)?;
        let diff_ids = config.document.as_ref().map(ImageConfig::diff_ids).unwrap_or_default();
        let members = saved.layers.as_deref().unwrap_or_default();
        if members.len() != diff_ids.len() {
            let reason = format!("{} layers, but the config has {} diff_ids", members.len(), diff_ids.len());
            return Err(bad(reason).into());
        }
        let mut layers = Vec::with_capacity(members.len());
        for (index, (member, diff_id)) in members.iter().zip(diff_ids).enumerate() {
            layers.push(self.layer(contents, index, member, diff_id.as_ref())?);
        }
        let mut family = Family::Docker;
        let digest = config.digest().expect("a saved config has its bytes");
        let manifest = self.original_manifest(contents, &digest).filter(|manifest| is_of(manifest, &layers));
        if let Some(manifest) = &manifest {
            family = manifest.parsed.family;
            config.media_type.clone_from(&manifest.parsed.config.media_type);
            for (layer, descriptor) in layers.iter_mut().zip(&manifest.parsed.layers) {
                layer.descriptor = Some(descriptor.clone());
            }
        }
        let name = match &tag {
            Some(tag) => image_name(tag),
            None => ImageName { repository: self.stem(), tag: None },
        };
        let aliases = saved.tags().iter().filter(|alias| Some(*alias) != tag.as_ref()).cloned().collect();
        Ok(Image { name, aliases, manifest, family, config, layers })
    }

    fn stem(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        if stem == "-" { "stdin".to_owned() } else { stem.into_owned() }
    }
}

#[async_trait::async_trait]
impl super::ImageSource for SavedTarSource {
    async fn image(&self) -> Result<Image, Error> {
        let contents = Contents::open(&self.path, &self.spools)
            .await
            .map_err(|error| error.into_saved_tar_error(self.path()))?;
        self.find(&contents)
    }
}

impl SavedImage {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }

    fn label(&self) -> String {
        self.tags().first().cloned().unwrap_or_else(|| format!("an untagged image ({})", self.config))
    }
}

/// The digest that a member is named by, in any of the forms that savers use.
fn named_digest(member: &str) -> Option<Digest> {
    let name = member.rsplit('/').next()?;
    Digest::from_sha256_hex(name.strip_suffix(".json").unwrap_or(name)).ok()
}

fn blob_member(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// Whether the saved layers are the very blobs that the manifest names.
fn is_of(manifest: &SourceManifest, layers: &[Layer]) -> bool {
    let named: &ImageManifest = &manifest.parsed;
    named.layers.len() == layers.len()
        && named.layers.iter().zip(layers).all(|(descriptor, layer)| {
            layer
                .descriptor
                .as_ref()
                .is_some_and(|own| own.digest == descriptor.digest && own.size == descriptor.size)
        })
}

/// A name as the tar has it: `hello:1.0` stays that.
fn image_name(name: &str) -> ImageName {
    match name.rsplit_once(':') {
        // A colon before a slash belongs to a port.
        Some((repository, tag)) if !tag.contains('/') => {
            ImageName { repository: repository.to_owned(), tag: Some(tag.to_owned()) }
        }
        _ => ImageName { repository: name.to_owned(), tag: None },
    }
}

/// Whether two names mean the same image, `busybox` and `docker.io/library/busybox:latest` being one.
fn same_name(one: &str, other: &str) -> bool {
    match (one.parse::<Reference>(), other.parse::<Reference>()) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}
