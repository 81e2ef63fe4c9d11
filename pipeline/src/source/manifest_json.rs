//! Images that a `manifest.json` describes (docker's v1.2), wherever its members lie: in a saved tar or in a directory.
//!
//! This file decides which image is meant and what its layers are. Where members are found, and which names lead to them, is
//! the business of [`Members`].

use std::collections::HashSet;

use serde::Deserialize;

use crate::blob::Blob;
use crate::compression::Format;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::layout::MARKER;
use crate::manifest::{
    self, Descriptor, Family, ImageManifest, LayerType, MAX_DOCUMENT, ParsedManifest, media_type,
};
use crate::reference::Reference;
use crate::spool::FileRegion;

/// What the document is called, unless a catalog names another.
pub(super) const MANIFEST: &str = "manifest.json";
/// So many documents are searched for an image's own manifest.
const MAX_DOCUMENTS: usize = 1 << 10;
/// What names a document that no other document names.
pub(super) const FORM: &str = "the form of a saved image";

/// Why a saved image could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SavedImageError {
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
    /// It can be read, but is nobody's saved image.
    #[error("{path} is not a saved image: {reason}")]
    NotSaved {
        /// The file or directory.
        path: String,
        /// What is wrong with its `manifest.json`.
        reason: String,
        /// It says that it is an OCI image layout.
        is_layout: bool,
    },
    /// A manifest or `catalog.json` is not what it should be.
    #[error("{path}: {document}: {reason}")]
    BadDocument {
        /// The file or directory.
        path: String,
        /// Which document in it.
        document: String,
        /// What is wrong.
        reason: String,
    },
    /// A member that a document names is missing, or a link leads nowhere.
    #[error("{path}: {document} names {member:?}, which is not there")]
    Missing {
        /// The file or directory.
        path: String,
        /// Which document.
        document: String,
        /// The member.
        member: String,
    },
    /// A document names what must not be opened in its name.
    #[error("{path}: {document} names {member:?}, which {reason}")]
    Unsafe {
        /// The directory.
        path: String,
        /// Which document.
        document: String,
        /// The member.
        member: String,
        /// Why not.
        reason: &'static str,
    },
    /// A member whose name is its digest has other bytes.
    #[error("{path}: {member} is damaged: its bytes are {computed}")]
    Damaged {
        /// The file or directory.
        path: String,
        /// The member.
        member: String,
        /// What its bytes hash to.
        computed: Digest,
    },
    /// There are several images, or none by the given name.
    #[error("{path} holds {}: choose one with ?image=NAME:TAG{}", list(.images), .wanted.as_ref().map(|wanted| format!(" ({wanted:?} is none of them)")).unwrap_or_default())]
    WhichImage {
        /// The file or directory.
        path: String,
        /// What was asked for.
        wanted: Option<String>,
        /// What there is.
        images: Vec<String>,
    },
}

fn list(images: &[String]) -> String {
    if images.is_empty() { "no image".to_owned() } else { images.join(", ") }
}

impl SavedImageError {
    /// Whether another source or another of its images is meant: nothing is wrong with what is there.
    pub fn is_choice(&self) -> bool {
        matches!(self, Self::WhichImage { .. } | Self::NotSaved { .. })
    }

    /// Whether the machine failed, rather than the content.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

/// Where the members lie that documents name.
pub(super) trait Members {
    /// The content of a member.
    fn get(&self, name: &str) -> Result<FileRegion, MemberError>;

    /// Whether bytes are the very config of that digest, although they hash to another one.
    fn is_rewritten(&self, _config: &[u8]) -> bool {
        false
    }
}

/// Why there is no content.
#[derive(Debug)]
pub(super) enum MemberError {
    /// Nothing is there.
    Missing,
    /// What is there must not be read, because it does this.
    Unsafe(&'static str),
    /// The operating system said no.
    Io(std::io::Error),
}

/// A document and what it names.
pub(super) struct SavedImages<'a> {
    /// Where all of it is, for messages.
    pub(super) path: String,
    /// What an image is called that has no name.
    pub(super) stem: String,
    /// The document's name.
    pub(super) document: &'a str,
    /// What has led to it.
    pub(super) named_by: &'a str,
    /// What it names.
    pub(super) members: &'a dyn Members,
}

/// Which image of a document is meant. The only one, unless this says more.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted<'a> {
    /// The one of this name.
    pub(super) image: Option<&'a str>,
    /// The one with these layers.
    pub(super) diff_ids: Option<&'a [Digest]>,
}

/// One image of a document.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl SavedImages<'_> {
    /// The image that is wanted.
    pub(super) fn find(&self, wanted: Wanted<'_>) -> Result<Image, Error> {
        let bytes = match self.members.get(self.document) {
            Err(MemberError::Missing) if self.document == MANIFEST => {
                return Err(self.not_saved(format!("it has no {MANIFEST}")).into());
            }
            region => self.document_bytes(&self.found(self.named_by, self.document, region)?)?,
        };
        let bad = |error: serde_json::Error| match self.is_layout() {
            true => self.not_saved(format!("its {} is no list of images: {error}", self.document)),
            false => self.bad(format!("no list of images: {error}")),
        };
        let mut images: Vec<SavedImage> = serde_json::from_slice(&bytes).map_err(bad)?;
        if images.is_empty() {
            return Err(self.not_saved(format!("its {} lists no image", self.document)).into());
        }
        if let (Some(wanted), 2..) = (wanted.diff_ids, images.len()) {
            // One for each platform, of which the Engine has told which one is meant.
            let has_layers = |image: &SavedImage| -> Option<bool> {
                let config = self.config(&image.config).ok()?.document?;
                Some(config.diff_ids().iter().flatten().eq(wanted))
            };
            images.retain(|image| has_layers(image) == Some(true));
        }
        let (saved, tag) = self.choose(images, wanted.image)?;
        let mut config = self.config(&saved.config)?;
        let diff_ids = config.document.as_ref().map(ImageConfig::diff_ids).unwrap_or_default();
        let members = saved.layers.as_deref().unwrap_or_default();
        if members.len() != diff_ids.len() {
            let reason = format!("{} layers, but the config has {} diff_ids", members.len(), diff_ids.len());
            return Err(self.bad(reason).into());
        }
        let mut layers = Vec::with_capacity(members.len());
        for (index, (member, diff_id)) in members.iter().zip(diff_ids).enumerate() {
            layers.push(self.layer(index, member, diff_id.as_ref())?);
        }
        let mut family = Family::Docker;
        let digest = config.digest().expect("a saved config has its bytes");
        let manifest = self.original_manifest(&digest).filter(|manifest| is_of(manifest, &layers));
        if let Some(manifest) = &manifest {
            family = manifest.parsed.family;
            config.media_type.clone_from(&manifest.parsed.config.media_type);
            for (layer, descriptor) in layers.iter_mut().zip(&manifest.parsed.layers) {
                layer.descriptor = Some(descriptor.clone());
                layer.known_by_diff_id_alone = false;
            }
        }
        let name = match &tag {
            Some(tag) => ImageName::of_tagged(tag),
            None => ImageName { repository: self.stem.clone(), tag: None },
        };
        let aliases = saved.tags().iter().filter(|alias| Some(*alias) != tag.as_ref()).cloned().collect();
        Ok(Image { name, aliases, manifest, family, config, layers })
    }

    fn is_layout(&self) -> bool {
        self.members.get(MARKER).is_ok()
    }

    fn not_saved(&self, reason: String) -> SavedImageError {
        SavedImageError::NotSaved { path: self.path.clone(), reason, is_layout: self.is_layout() }
    }

    fn bad(&self, reason: String) -> SavedImageError {
        let (path, document) = (self.path.clone(), self.document.to_owned());
        SavedImageError::BadDocument { path, document, reason }
    }

    fn choose(
        &self,
        images: Vec<SavedImage>,
        wanted: Option<&str>,
    ) -> Result<(SavedImage, Option<String>), SavedImageError> {
        let which = |images: &[SavedImage]| SavedImageError::WhichImage {
            path: self.path.clone(),
            wanted: wanted.map(str::to_owned),
            images: images.iter().map(SavedImage::label).collect(),
        };
        let Some(wanted) = wanted else {
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

    /// The content of a member that the document names.
    fn region(&self, member: &str) -> Result<FileRegion, SavedImageError> {
        self.found(self.document, member, self.members.get(member))
    }

    fn found(
        &self,
        named_by: &str,
        member: &str,
        region: Result<FileRegion, MemberError>,
    ) -> Result<FileRegion, SavedImageError> {
        region.map_err(|error| error.into_saved_image_error(&self.path, named_by, member))
    }

    fn document_bytes(&self, region: &FileRegion) -> Result<Vec<u8>, SavedImageError> {
        region.read_small(MAX_DOCUMENT as u64).map_err(|source| self.io(source))
    }

    fn io(&self, source: std::io::Error) -> SavedImageError {
        SavedImageError::Io { path: self.path.clone(), source }
    }

    fn config(&self, member: &str) -> Result<ConfigFile, Error> {
        let bytes = self.document_bytes(&self.region(member)?)?;
        let digest = Digest::sha256(&bytes);
        let is_other = named_digest(member).is_some_and(|named| named != digest);
        if is_other && !self.members.is_rewritten(&bytes) {
            let (path, member) = (self.path.clone(), member.to_owned());
            return Err(SavedImageError::Damaged { path, member, computed: digest }.into());
        }
        let fail = |source| Error::Config { image: self.path.clone(), source };
        Ok(ConfigFile {
            document: Some(ImageConfig::parse(&bytes).map_err(fail)?),
            original: Some(bytes.into()),
            media_type: media_type::DOCKER_CONFIG.to_owned(),
        })
    }

    fn layer(&self, index: usize, member: &str, diff_id: Option<&Digest>) -> Result<Layer, Error> {
        let mut region = self.region(member)?;
        let format = Format::sniff(region.peek(&mut [0; 4]).map_err(|source| self.io(source))?);
        let mut descriptor = None;
        if format != Format::None {
            let digest = match named_digest(member) {
                Some(digest) => digest,
                None => region.hash().map_err(|source| self.io(source))?,
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
            known_by_diff_id_alone: true,
        })
    }

    /// The registry's own manifest of this image, where it was kept: the one under `index.json` with that config.
    fn original_manifest(&self, config: &Digest) -> Option<SourceManifest> {
        let mut documents = vec![(self.members.get("index.json").ok()?, None, 0)];
        // Each is read once, however many indexes lead to it.
        let mut seen = HashSet::new();
        while let Some((region, digest, depth)) = documents.pop() {
            let Ok(bytes) = region.read_small(MAX_DOCUMENT as u64) else { continue };
            if digest.is_some_and(|digest| digest != Digest::sha256(&bytes)) || depth > MAX_INDEX_DEPTH {
                continue;
            }
            match manifest::parse(&bytes, None) {
                Ok(ParsedManifest::Index(index)) => {
                    for entry in index.manifests {
                        if seen.len() < MAX_DOCUMENTS
                            && seen.insert(entry.digest.clone())
                            && let Ok(region) = self.members.get(&blob_member(&entry.digest))
                        {
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
}

impl MemberError {
    /// With what it was that named the member, and where.
    pub(super) fn into_saved_image_error(self, path: &str, document: &str, member: &str) -> SavedImageError {
        let (path, document, member) = (path.to_owned(), document.to_owned(), member.to_owned());
        match self {
            Self::Missing => SavedImageError::Missing { path, document, member },
            Self::Unsafe(reason) => SavedImageError::Unsafe { path, document, member, reason },
            Self::Io(source) => SavedImageError::Io { path: format!("{path}/{member}"), source },
        }
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

/// Whether two names mean the same image, `busybox` and `docker.io/library/busybox:latest` being one.
pub(super) fn same_name(one: &str, other: &str) -> bool {
    match (one.parse::<Reference>(), other.parse::<Reference>()) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}
