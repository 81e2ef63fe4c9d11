//! Destinations of manifests and blobs as they are, whatever they are: what [`crate::copy`] writes to.

use super::Moved;
use crate::blob::ByteCount;
use crate::digest::Digest;
use crate::element::{ImageName, Layer};
use crate::error::Error;
use crate::reference::Tag;
use crate::registry::FetchedManifest;

/// Keeps manifests and blobs by their digests, and gives manifests names.
#[async_trait::async_trait]
pub trait ContentOutput: Send + Sync {
    /// What is there in the end, for people.
    fn destination(&self) -> String;

    /// The digest that the destination is named by, if it is: nothing else may be written there.
    fn wanted(&self) -> Option<&Digest>;

    /// Whether it can name more than one manifest.
    fn names_many(&self) -> bool;

    /// Called before anything else.
    async fn open(&self) -> Result<(), Error>;

    /// Whether the destination's own name means this manifest already.
    async fn is_named(&self, digest: &Digest) -> Result<bool, Error>;

    /// Whether there is a manifest with this digest.
    async fn has_manifest(&self, digest: &Digest, size: u64) -> Result<bool, Error>;

    /// Stores a blob, unless it is there, is foreign, or can be mounted.
    async fn put_blob(&self, blob: &Layer, progress: &ByteCount) -> Result<Moved, Error>;

    /// Stores a manifest under its digest, all of whose content is there. Gives the subject among whose referrers the
    /// destination lists it now, if it does so by itself.
    async fn put_manifest(&self, manifest: &FetchedManifest) -> Result<Option<Digest>, Error>;

    /// The manifest that a tag names.
    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error>;

    /// Has a tag name a manifest.
    async fn put_tagged(&self, tag: &Tag, manifest: &FetchedManifest) -> Result<(), Error>;

    /// Has the destination's own name mean a manifest that is called `name` where it comes from.
    async fn put_named(&self, manifest: &FetchedManifest, name: &ImageName) -> Result<(), Error>;
}
