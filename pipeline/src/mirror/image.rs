//! The two ends of one image on its way: what was read of a source is kept, and what is known of a target is not asked again.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use super::blobs::Blobs;
use super::origin::Origin;
use super::plan::Need;
use super::{Ends, TagLocks, locked};
use crate::blob::{BlobRef, ByteCount};
use crate::digest::Digest;
use crate::element::{Image, ImageName, Layer};
use crate::error::Error;
use crate::manifest::Descriptor;
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::output::Moved;
use crate::output::content::ContentOutput;
use crate::output::registry::RegistryOutput;
use crate::platform::PlatformChoice;
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::{Access, FetchedManifest, Repository};
use crate::source::ImageSource;
use crate::source::stored::{self, SourceIndex, Store};

/// What a document that was read takes beside its bytes, and an entry of a list, about.
const DOCUMENT_BYTES: usize = 512;

/// Documents of one repository that have been read.
#[derive(Debug, Default)]
pub(super) struct Documents {
    manifests: Mutex<HashMap<Digest, FetchedManifest>>,
    referrers: Mutex<HashMap<Digest, Vec<Descriptor>>>,
    tagged: Mutex<HashMap<String, Option<FetchedManifest>>>,
}

impl Documents {
    /// Nothing but a manifest, if it was read.
    pub(super) fn only(&self, digest: &Digest) -> Self {
        let manifests = self.manifests.lock().unwrap_or_else(PoisonError::into_inner);
        let read = manifests.get(digest).map(|manifest| (digest.clone(), manifest.clone()));
        Self { manifests: Mutex::new(read.into_iter().collect()), ..Self::default() }
    }

    /// What they take in memory, about.
    pub(super) fn size(&self) -> usize {
        let manifests = self.manifests.lock().unwrap_or_else(PoisonError::into_inner);
        let tagged = self.tagged.lock().unwrap_or_else(PoisonError::into_inner);
        let referrers = self.referrers.lock().unwrap_or_else(PoisonError::into_inner);
        let documents = manifests.values().chain(tagged.values().flatten());
        let listed: usize = referrers.values().map(Vec::len).sum();
        documents.map(|document| document.bytes.len()).sum::<usize>()
            + DOCUMENT_BYTES * (manifests.len() + tagged.len() + referrers.len() + listed)
    }

    /// The digest of the manifest that a tag names, which is read and kept.
    pub(super) async fn named(&self, origin: &Origin, source: &Reference) -> Result<Option<Digest>, Error> {
        let Origin::Registries(client) = origin else { return origin.digest_of(source).await };
        let repository = client.repository(source, Access::Pull);
        let Some(fetched) = repository.find_manifest(&source.manifest(), &ACCEPTED_MANIFESTS).await? else {
            return Ok(None);
        };
        let digest = fetched.digest.clone();
        self.manifests.lock().unwrap_or_else(PoisonError::into_inner).insert(digest.clone(), fetched);
        Ok(Some(digest))
    }
}

/// A manifest of a repository by its digest, with all that it names.
pub(super) struct MirrorSource {
    inner: Box<dyn Store>,
    origin: Origin,
    reference: Reference,
    digest: Digest,
    documents: Arc<Documents>,
}

impl MirrorSource {
    pub(super) fn new(
        origin: &Origin,
        source: &Reference,
        digest: Digest,
        documents: Arc<Documents>,
    ) -> Self {
        let inner = origin.store(source, &digest);
        Self { inner, origin: origin.clone(), reference: source.clone(), digest, documents }
    }
}

/// What is kept under a key, or what `ask` brings, which is kept then. An error is not.
async fn kept<K: Eq + Hash, V: Clone>(
    map: &Mutex<HashMap<K, V>>,
    key: K,
    ask: impl Future<Output = Result<V, Error>>,
) -> Result<V, Error> {
    if let Some(value) = map.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return Ok(value.clone());
    }
    let value = ask.await?;
    map.lock().unwrap_or_else(PoisonError::into_inner).insert(key, value.clone());
    Ok(value)
}

#[async_trait::async_trait]
impl Store for MirrorSource {
    fn shown(&self) -> String {
        self.inner.shown()
    }

    fn name(&self) -> ImageName {
        self.inner.name()
    }

    async fn first(&self) -> Result<FetchedManifest, Error> {
        kept(&self.documents.manifests, self.digest.clone(), self.inner.first()).await
    }

    async fn manifest(&self, entry: &Descriptor) -> Result<FetchedManifest, Error> {
        kept(&self.documents.manifests, entry.digest.clone(), self.inner.manifest(entry)).await
    }

    fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<BlobRef, Error> {
        self.inner.blob(digest, size)
    }

    fn layer(&self, descriptor: &Descriptor) -> Result<BlobRef, Error> {
        self.inner.layer(descriptor)
    }

    fn origin(&self) -> Option<Repository> {
        self.inner.origin()
    }

    fn wanted(&self) -> Option<ManifestRef> {
        self.inner.wanted()
    }

    fn repository(&self) -> Option<Reference> {
        self.inner.repository()
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        kept(&self.documents.tagged, tag.to_string(), self.inner.tagged(tag)).await
    }

    async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        kept(&self.documents.referrers, subject.clone(), self.inner.referrers(subject)).await
    }
}

#[async_trait::async_trait]
impl ImageSource for MirrorSource {
    async fn image(&self) -> Result<Image, Error> {
        stored::image(self, &PlatformChoice::default()).await
    }

    async fn index(&self) -> Result<Option<SourceIndex>, Error> {
        stored::index(self).await
    }

    fn entry(&self, entry: &Descriptor) -> Option<Box<dyn ImageSource>> {
        let documents = Arc::clone(&self.documents);
        Some(Box::new(Self::new(&self.origin, &self.reference, entry.digest.clone(), documents)))
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }
}

/// A tag of a target.
pub(super) struct MirrorOutput {
    inner: RegistryOutput,
    repository: Repository,
    /// What the tag names now.
    named: Option<Digest>,
    /// What brings blobs, and for which images.
    blobs: Option<(Arc<Blobs>, Need)>,
    target: Reference,
    locks: Option<Arc<dyn TagLocks>>,
}

impl MirrorOutput {
    /// `blobs` brings the blobs of the whole mirror; without it nothing is meant to be written.
    pub(super) fn new(
        ends: &Ends,
        target: &Reference,
        named: Option<Digest>,
        blobs: Option<(Arc<Blobs>, Need)>,
    ) -> Self {
        let format = crate::output::manifest::ManifestFormat::Keep;
        Self {
            inner: RegistryOutput::new(&ends.target, target.clone(), None, format),
            repository: ends.target.repository(target, Access::Push),
            named,
            blobs,
            target: target.clone(),
            locks: ends.locks.clone(),
        }
    }
}

#[async_trait::async_trait]
impl ContentOutput for MirrorOutput {
    fn destination(&self) -> String {
        self.inner.destination()
    }

    fn wanted(&self) -> Option<&Digest> {
        self.inner.wanted()
    }

    fn names_many(&self) -> bool {
        true
    }

    async fn open(&self) -> Result<(), Error> {
        self.inner.open().await
    }

    async fn is_named(&self, digest: &Digest) -> Result<bool, Error> {
        Ok(self.named.as_ref() == Some(digest))
    }

    async fn has_manifest(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        self.inner.has_manifest(digest, size).await
    }

    async fn put_blob(&self, blob: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        match &self.blobs {
            Some((blobs, need)) => blobs.bring(blob, &self.repository, need, progress).await,
            None => self.inner.put_blob(blob, progress).await,
        }
    }

    async fn put_manifest(&self, manifest: &FetchedManifest) -> Result<Option<Digest>, Error> {
        self.inner.put_manifest(manifest).await
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        self.inner.tagged(tag).await
    }

    async fn put_tagged(&self, tag: &Tag, manifest: &FetchedManifest) -> Result<(), Error> {
        self.inner.put_tagged(tag, manifest).await
    }

    async fn put_named(&self, manifest: &FetchedManifest, name: &ImageName) -> Result<(), Error> {
        locked(self.locks.as_ref(), &self.target, self.inner.put_named(manifest, name)).await
    }
}
