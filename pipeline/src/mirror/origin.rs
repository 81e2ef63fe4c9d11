//! Where images come from: their registries, or a layout in which they were carried here.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::OnceCell;

use super::image::{Documents, MirrorSource};
use super::save::layout_uri;
use crate::blob::BlobRef;
use crate::catalog::digest_of;
use crate::digest::Digest;
use crate::element::{Image, ImageName};
use crate::error::Error;
use crate::layout::{Choice, IMAGE_NAME};
use crate::manifest::media_type::OCI_INDEX;
use crate::manifest::{self, Descriptor, ManifestError, ParsedManifest};
use crate::platform::PlatformChoice;
use crate::reference::{ManifestRef, Reference, RegistryName, Tag};
use crate::registry::{Access, Client, FetchedManifest, Repository, fallback_tag};
use crate::source::ImageSource;
use crate::source::oci_layout::LayoutSource;
use crate::source::registry::RegistrySource;
use crate::source::stored::{self, SourceIndex, Store};
use crate::spool::SpoolDir;
use crate::uri::UriError;

/// Where images come from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// The registries that their names say.
    Registries(Client),
    /// A layout that holds them under these names.
    Carried(Arc<Carried>),
}

/// A layout, directory or tar, that [`super::save`] has written.
#[derive(Debug)]
pub struct Carried {
    path: String,
    layout: LayoutSource,
    names: OnceCell<Names>,
}

/// By `HOST/REPOSITORY` and tag, what is there.
type Names = HashMap<String, BTreeMap<String, Descriptor>>;

impl Carried {
    /// The layout at an `oci-layout://PATH`. Nothing is read yet.
    pub fn parse(text: &str, spools: SpoolDir) -> Result<Self, UriError> {
        let path = layout_uri(text, &[])?.rest;
        let layout = LayoutSource::new(&path, Choice::default(), PlatformChoice::default(), spools);
        Ok(Self { path, layout, names: OnceCell::new() })
    }

    fn manifest(self: &Arc<Self>, source: &Reference, digest: &Digest) -> CarriedSource {
        let layout = self.layout.at(Choice { tag: None, digest: Some(digest.clone()) });
        CarriedSource { carried: Arc::clone(self), layout, repository: source.name() }
    }

    async fn names(&self) -> Result<&Names, Error> {
        let read = async {
            let mut names = Names::new();
            for entry in self.layout.entries().await? {
                let name = entry.annotations.get(IMAGE_NAME);
                let Some(name) = name.and_then(|name| name.parse::<Reference>().ok()) else { continue };
                let Some(tag) = name.tag() else { continue };
                names.entry(name.name()).or_default().insert(tag.to_string(), entry.clone());
            }
            Ok(names)
        };
        self.names.get_or_try_init(|| read).await
    }

    async fn entry(&self, repository: &str, tag: &Tag) -> Result<Option<&Descriptor>, Error> {
        Ok(self.names().await?.get(repository).and_then(|tags| tags.get(tag.as_str())))
    }
}

impl Origin {
    /// Whether a registry that is a source and a target can take blobs from one of its repositories to another.
    pub(super) fn can_mount(&self) -> bool {
        matches!(self, Self::Registries(_))
    }

    pub(super) async fn repositories(&self, registry: &RegistryName) -> Result<Vec<String>, Error> {
        match self {
            Self::Registries(client) => Ok(client.repositories(registry).all().await?),
            Self::Carried(carried) => {
                let prefix = format!("{registry}/");
                let names = carried.names().await?.keys();
                let mut names: Vec<String> =
                    names.filter_map(|name| name.strip_prefix(&prefix)).map(str::to_owned).collect();
                names.sort();
                Ok(names)
            }
        }
    }

    pub(super) async fn tags(&self, repository: &Reference) -> Result<Vec<String>, Error> {
        match self {
            Self::Registries(client) => Ok(client.repository(repository, Access::Pull).tags().all().await?),
            Self::Carried(carried) => match carried.names().await?.get(&repository.name()) {
                Some(tags) => Ok(tags.keys().cloned().collect()),
                None => Err(Error::Host(format!("{} has nothing of it", carried.path).into())),
            },
        }
    }

    /// What a tag names.
    pub(super) async fn digest_of(&self, reference: &Reference) -> Result<Option<Digest>, Error> {
        let tag = match reference.manifest() {
            ManifestRef::Tag(tag) => tag,
            ManifestRef::Digest(digest) => return Ok(Some(digest)),
        };
        match self {
            Self::Registries(client) => digest_of(&client.repository(reference, Access::Pull), &tag).await,
            Self::Carried(carried) => {
                let entry = carried.entry(&reference.name(), &tag).await?;
                Ok(entry.map(|entry| entry.digest.clone()))
            }
        }
    }

    /// A manifest of a repository as a source of images that pass filters. What is among the documents is not asked for again.
    pub(super) fn source(
        &self,
        source: &Reference,
        digest: &Digest,
        documents: Arc<Documents>,
    ) -> Box<dyn ImageSource> {
        match self {
            Self::Registries(_) => Box::new(MirrorSource::new(self, source, digest.clone(), documents)),
            Self::Carried(carried) => Box::new(carried.manifest(source, digest)),
        }
    }

    /// A manifest of a repository, with all that it names.
    pub(super) fn store(&self, source: &Reference, digest: &Digest) -> Box<dyn Store> {
        match self {
            Self::Registries(client) => {
                let reference = source.with_digest(digest.clone());
                Box::new(RegistrySource::new(client, reference, PlatformChoice::default()))
            }
            Self::Carried(carried) => Box::new(carried.manifest(source, digest)),
        }
    }
}

/// A manifest in a layout where names are full: what belongs to it is called by its repository too.
struct CarriedSource {
    carried: Arc<Carried>,
    layout: LayoutSource,
    repository: String,
}

#[async_trait::async_trait]
impl Store for CarriedSource {
    fn shown(&self) -> String {
        format!("{} in {}", self.repository, self.layout.shown())
    }

    fn name(&self) -> ImageName {
        ImageName { repository: self.repository.clone(), tag: None }
    }

    async fn first(&self) -> Result<FetchedManifest, Error> {
        self.layout.first().await
    }

    async fn manifest(&self, entry: &Descriptor) -> Result<FetchedManifest, Error> {
        Store::manifest(&self.layout, entry).await
    }

    fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<BlobRef, Error> {
        self.layout.blob(digest, size)
    }

    fn origin(&self) -> Option<Repository> {
        None
    }

    fn repository(&self) -> Option<Reference> {
        self.repository.parse().ok()
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        match self.carried.entry(&self.repository, tag).await? {
            Some(entry) => Ok(Some(Store::manifest(&self.layout, entry).await?)),
            None => Ok(None),
        }
    }

    async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        let tag = fallback_tag(subject);
        let Some(tagged) = self.tagged(&tag).await? else { return Ok(Vec::new()) };
        let fail = |source| Error::Manifest { image: format!("{}:{tag}", self.repository), source };
        match manifest::parse(&tagged.bytes, Some(OCI_INDEX)).map_err(fail)? {
            ParsedManifest::Index(index) => Ok(index.manifests),
            _ => Err(fail(ManifestError::Unknown(tagged.media_type))),
        }
    }
}

#[async_trait::async_trait]
impl ImageSource for CarriedSource {
    async fn image(&self) -> Result<Image, Error> {
        stored::image(self, &PlatformChoice::default()).await
    }

    async fn index(&self) -> Result<Option<SourceIndex>, Error> {
        stored::index(self).await
    }

    fn entry(&self, entry: &Descriptor) -> Option<Box<dyn ImageSource>> {
        let (carried, layout) = (Arc::clone(&self.carried), self.layout.within(entry));
        Some(Box::new(Self { carried, layout, repository: self.repository.clone() }))
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }
}
