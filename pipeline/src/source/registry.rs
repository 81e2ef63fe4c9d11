//! `registry://HOST/IMAGE[:TAG|@DIGEST]`: an image in a registry, or the one for the wanted platform of an index.

use super::stored::{self, SourceIndex, Store};
use super::{ImageSource, SourceKind};
use crate::blob::BlobRef;
use crate::digest::Digest;
use crate::element::{Image, ImageName};
use crate::error::Error;
use crate::manifest::Descriptor;
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::platform::PlatformChoice;
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::{Access, Client, FetchedManifest, Repository};

/// This source's line in the table.
pub const KIND: SourceKind = SourceKind {
    scheme: "registry",
    syntax: "registry://HOST/IMAGE[:TAG|@DIGEST]",
    about: "an image in a registry",
    options: &["os", "arch", "variant", "max_workers"],
};

/// An image in a registry.
#[derive(Clone, Debug)]
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
}

#[async_trait::async_trait]
impl Store for RegistrySource {
    fn shown(&self) -> String {
        self.reference.to_string()
    }

    fn name(&self) -> ImageName {
        ImageName { repository: self.reference.name(), tag: self.reference.tag().map(Tag::to_string) }
    }

    async fn first(&self) -> Result<FetchedManifest, Error> {
        Ok(self.repository.manifest(&self.reference.manifest(), &ACCEPTED_MANIFESTS).await?)
    }

    async fn manifest(&self, entry: &Descriptor) -> Result<FetchedManifest, Error> {
        let wanted = ManifestRef::Digest(entry.digest.clone());
        Ok(self.repository.manifest(&wanted, &ACCEPTED_MANIFESTS).await?)
    }

    fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<BlobRef, Error> {
        Ok(self.repository.blob(digest, size))
    }

    fn layer(&self, descriptor: &Descriptor) -> Result<BlobRef, Error> {
        Ok(self.repository.layer(descriptor))
    }

    fn origin(&self) -> Option<Repository> {
        Some(self.repository.clone())
    }

    fn wanted(&self) -> Option<ManifestRef> {
        Some(self.reference.manifest())
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        Ok(self.repository.find_manifest(&ManifestRef::Tag(tag.clone()), &ACCEPTED_MANIFESTS).await?)
    }

    async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        Ok(self.repository.referrers(subject).await?.manifests)
    }
}

#[async_trait::async_trait]
impl ImageSource for RegistrySource {
    async fn image(&self) -> Result<Image, Error> {
        stored::image(self, &self.platform).await
    }

    async fn index(&self) -> Result<Option<SourceIndex>, Error> {
        stored::index(self).await
    }

    fn entry(&self, entry: &Descriptor) -> Option<Box<dyn ImageSource>> {
        let reference = self.reference.with_digest(entry.digest.clone());
        // It is the entry that is wanted, whatever platform it is for.
        Some(Box::new(Self { reference, platform: PlatformChoice::default(), ..self.clone() }))
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }
}
