//! The blobs of a whole mirror: each is fetched once, goes up once to each registry that lacks it, and is mounted everywhere else.
//!
//! Whoever needs a blob first brings it to all registries that the plan says need it: from the source's stream, or, where they are
//! several, from a temporary file that is gone when the last has it. A registry that does not mount gets the bytes again.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use tokio::sync::Semaphore;

use super::plan::Need;
use super::progress::MirrorProgress;
use crate::blob::{Blob, BlobError, ByteCount};
use crate::digest::Digest;
use crate::element::Layer;
use crate::error::Error;
use crate::manifest::Descriptor;
use crate::output::Moved;
use crate::registry::{Mount, Repository, UploadSession};
use crate::spool::{FileRegion, Spool, SpoolDir};

/// How often a blob is begun for one registry, by all images together.
const ATTEMPTS: u32 = 3;

/// Where a blob is: `HOST/REPOSITORY`, and which.
pub(super) type Place = (String, Digest);

pub(super) fn place(repository: &Repository, digest: &Digest) -> Place {
    (format!("{}/{}", repository.host(), repository.name()), digest.clone())
}

pub(super) struct Blobs {
    /// What targets were found to have.
    present: HashSet<Place>,
    /// Repositories from which others of their registry can mount a blob, found to have it.
    holders: HashMap<(String, Digest), String>,
    /// For each blob that has to be fetched, one repository of each registry where the same images need it.
    uploads: HashMap<(Need, Digest), Vec<Repository>>,
    known: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<Known>>>>,
    slots: Semaphore,
    spools: SpoolDir,
    progress: MirrorProgress,
}

/// What the run has found out of one blob.
#[derive(Default)]
struct Known {
    /// Repositories that got it.
    brought: HashSet<String>,
    /// By host, the repository to mount from.
    holders: HashMap<String, String>,
    /// By host, how often it failed, and why the last time.
    failed: HashMap<String, (u32, String)>,
}

impl Blobs {
    pub(super) fn new(
        present: HashSet<Place>,
        holders: HashMap<(String, Digest), String>,
        uploads: HashMap<(Need, Digest), Vec<Repository>>,
        spools: SpoolDir,
        parallel: usize,
        progress: MirrorProgress,
    ) -> Self {
        let (known, slots) = (Mutex::default(), Semaphore::new(parallel.max(1)));
        Self { present, holders, uploads, known, slots, spools, progress }
    }

    /// Has a repository have a blob, and with it the other registries where these images need it.
    ///
    /// Whoever asks for the same blob waits meanwhile. Cancelled, it leaves nothing but blobs that nobody names.
    pub(super) async fn bring(
        &self,
        layer: &Layer,
        repository: &Repository,
        need: &Need,
        progress: &ByteCount,
    ) -> Result<Moved, Error> {
        let Some(descriptor) = layer.descriptor.as_ref().filter(|_| !layer.is_foreign()) else {
            return Ok(Moved::Nothing);
        };
        let digest = &descriptor.digest;
        if self.present.contains(&place(repository, digest)) {
            return Ok(Moved::Nothing);
        }
        let known = self.known(digest);
        let mut known = known.lock().await;
        let (host, name) = (repository.host().to_owned(), repository.name().to_owned());
        let path = format!("{host}/{name}");
        if known.brought.contains(&path) {
            return Ok(Moved::Nothing);
        }
        let holder = self.holder(layer, &host, digest, &known);
        if holder.is_none()
            && let Some((ATTEMPTS.., why)) = known.failed.get(&host)
        {
            return Err(Error::Host(why.clone().into()));
        }
        let is_due = |other: &&Repository| {
            other.host() != host
                && self.holder(layer, other.host(), digest, &known).is_none()
                && !known.failed.contains_key(other.host())
        };
        let needed = self.uploads.get(&(need.clone(), digest.clone()));
        let others = needed.into_iter().flatten().filter(is_due).cloned();
        let others: Vec<Repository> = if holder.is_none() { others.collect() } else { Vec::new() };
        let mut session = None;
        // Where several get it, all were asked before, and a session would wait while the blob comes.
        if others.is_empty() {
            match repository.mount(digest, holder.as_deref().unwrap_or(&name)).await {
                Mount::Mounted => {
                    known.brought.insert(path);
                    if holder.is_some() {
                        self.progress.mounted(descriptor.size);
                    }
                    known.holders.entry(host).or_insert(name);
                    return Ok(Moved::Nothing);
                }
                Mount::Session(open) => session = Some(open),
                Mount::Unsupported => {}
            }
        }
        let _slot = self.slots.acquire().await.expect("it is never closed");
        if holder.is_some() {
            let size = descriptor.size;
            repository.upload_blob(layer.blob.as_ref(), digest, size, session, progress).await?;
            self.count_fetched(layer, size);
            self.progress.uploaded(size);
            known.brought.insert(path);
            return Ok(Moved::Bytes);
        }
        let to: Vec<Repository> = [repository.clone()].into_iter().chain(others).collect();
        let ends = self.upload(layer, descriptor, &to, session, progress).await?;
        let mut own = Ok(Moved::Bytes);
        for (repository, end) in to.iter().zip(ends) {
            match end {
                Ok(()) => {
                    known.brought.insert(format!("{}/{}", repository.host(), repository.name()));
                    known.holders.insert(repository.host().to_owned(), repository.name().to_owned());
                }
                Err(error) => {
                    let failed = known.failed.entry(repository.host().to_owned()).or_default();
                    *failed = (failed.0 + 1, error.to_string());
                    if repository.host() == host {
                        own = Err(error);
                    }
                }
            }
        }
        own
    }

    fn known(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<Known>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(known.entry(digest.clone()).or_default())
    }

    /// Counts a blob that came from a source, unless it was made here.
    fn count_fetched(&self, layer: &Layer, size: u64) {
        if !layer.blob.is_at_hand() {
            self.progress.fetched(size);
        }
    }

    /// A repository of a host that a blob can be mounted from.
    fn holder(&self, layer: &Layer, host: &str, digest: &Digest, known: &Known) -> Option<String> {
        let origin = layer.origin.as_ref().filter(|origin| origin.host() == host);
        let found = || self.holders.get(&(host.to_owned(), digest.clone())).cloned();
        known.holders.get(host).cloned().or_else(found).or_else(|| Some(origin?.name().to_owned()))
    }

    /// Fetches a blob, and stores it in repositories of several registries at once; `session` is the first one's. An error is the
    /// source's, or this machine's.
    async fn upload(
        &self,
        layer: &Layer,
        descriptor: &Descriptor,
        to: &[Repository],
        mut session: Option<UploadSession>,
        progress: &ByteCount,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        let (digest, size) = (&descriptor.digest, descriptor.size);
        let spooled: Option<Arc<FileRegion>> = match to {
            [_] => None,
            _ => {
                let region = self.spool(layer.blob.as_ref(), digest).await?;
                self.count_fetched(layer, size);
                Some(Arc::new(region))
            }
        };
        let passes_on = spooled.is_none();
        let uploads = to.iter().enumerate().map(|(index, repository)| {
            let blob: &dyn Blob = match &spooled {
                Some(region) => region.as_ref(),
                None => layer.blob.as_ref(),
            };
            // What is shown is the way to the one who asked.
            let progress = if index == 0 { progress.clone() } else { ByteCount::default() };
            let session = session.take();
            async move {
                repository.upload_blob(blob, digest, size, session, &progress).await?;
                if passes_on {
                    self.count_fetched(layer, size);
                }
                self.progress.uploaded(size);
                Ok(())
            }
        });
        Ok(futures_util::future::join_all(uploads).await)
    }

    async fn spool(&self, blob: &dyn Blob, digest: &Digest) -> Result<FileRegion, Error> {
        let fail = |source| {
            let what = format!("failed to keep {digest} for several registries");
            Error::Blob(BlobError::Io { what, source })
        };
        let mut spool = self.spools.create().map_err(fail)?;
        let mut stream = blob.open().await?;
        while let Some(bytes) = stream.next().await {
            let bytes = bytes?;
            spool = tokio::task::spawn_blocking(move || spool.write_all(&bytes).map(|()| spool))
                .await
                .expect("writing a file does not panic")
                .map_err(fail)?;
        }
        let spool: Arc<Spool> = Arc::new(spool);
        let size = spool.size();
        let region = FileRegion::of_spool(spool, digest.to_string(), 0, size).map_err(fail)?;
        Ok(region.verified(digest.clone()))
    }
}
