//! Whole images, indexes and artifacts as they are: every manifest and blob by its digest, bit for bit.
//!
//! [`gather`] reads the manifests that are wanted, and with them learns of every blob; [`subset`] makes an index of some of another's
//! platforms. Then the blobs are copied, in parallel; then the manifests, those that others name before those; then what names the
//! manifests as its subject ([`referrers`]); and the tag last.
//!
//! What a manifest says of its content is not looked at: no config is read and no layer decompressed, so that artifacts of any
//! media type are copied like images. Images that change on their way are [`crate::process`]'s.

mod gather;
mod referrers;
pub(crate) mod subset;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use tokio::task::JoinSet;

use self::gather::{Gathered, Gathering};
use crate::digest::Digest;
use crate::element::Layer;
use crate::error::Error;
use crate::output::Moved;
use crate::output::content::ContentOutput;
use crate::platform::Platform;
use crate::progress::{LayerState, Progress};
use crate::registry::FetchedManifest;
use crate::source::stored::Store;

/// Requests for documents that are under way at once.
const DOCUMENTS_AT_ONCE: usize = 8;
/// How often one blob's way is begun.
const ATTEMPTS: u32 = 3;

/// What is copied, and how.
#[derive(Clone, Debug, Default)]
pub struct CopyPlan {
    /// Of an index, the images for these platforms alone; all, where none is named.
    pub platforms: Vec<Platform>,
    /// Keep an index as it is although not all of its images are copied: those for other platforms, and those that the source
    /// does not have.
    pub sparse: bool,
    /// Copy what names the copied manifests as its subject, and what cosign keeps under tags that are called like their digests.
    pub referrers: bool,
    /// Fail rather than write a manifest that the source does not have.
    pub preserve_digests: bool,
    /// Blobs at once.
    pub parallel: usize,
}

/// What came of a copy.
#[derive(Clone, Debug, PartialEq)]
pub struct Copied {
    /// Of the manifest that was named.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// What is there now, for people.
    pub destination: String,
    /// Manifests that were written, those that make a subset included.
    pub manifests: usize,
    /// Manifests that were there already.
    pub manifests_found: usize,
    /// Blobs that were moved.
    pub blobs: usize,
    /// Blobs that were there, were mounted, or are foreign and stay where they are.
    pub blobs_found: usize,
    /// Bytes of the blobs that were moved.
    pub bytes: u64,
    /// What was copied because it names a manifest as its subject.
    pub referrers: Vec<CopiedReferrer>,
    /// Tags that were copied because they are called like a digest.
    pub digest_tags: Vec<String>,
    /// Entries of indexes that stay named and were not copied.
    pub left_out: Vec<Digest>,
    /// From the first request to the tag.
    pub elapsed: Duration,
}

/// Something that names a manifest as its subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopiedReferrer {
    /// Of the manifest that it is.
    pub digest: Digest,
    /// What it names.
    pub subject: Digest,
    /// What it is, where the source says it.
    pub artifact_type: Option<String>,
    /// Whether the destination lists it by itself. Otherwise it is in the index under the subject's tag.
    pub is_listed: bool,
}

/// Copies what `source` is named for to where `output` is named for.
///
/// A failure at any point leaves the destination's name meaning what it meant before. What is there then stays there, without a
/// name, and is not copied again.
pub async fn copy(
    source: Arc<dyn Store>,
    output: Arc<dyn ContentOutput>,
    plan: &CopyPlan,
    progress: &Progress,
) -> Result<Copied, Error> {
    let start = Instant::now();
    output.open().await?;
    let root = source.first().await?;
    let gathered = Gathering::new(source.as_ref(), output.as_ref(), plan).all_of(root).await?;
    progress.begin(gathered.blobs.iter().map(|blob| (blob.label(), blob.blob.size())));
    let moved = copy_blobs(&gathered.blobs, &output, plan.parallel, progress).await?;
    put_manifests(&gathered, output.as_ref()).await?;
    let referrers = referrers::put(&gathered, output.as_ref()).await?;
    if plan.preserve_digests && output.wanted().is_none() && gathered.root.digest.is_rare() {
        // A registry files what it gets under a tag by its usual algorithm.
        in_copy(&gathered.root.digest, output.put_manifest(&gathered.root).await)?;
    }
    if !gathered.is_named {
        output.put_named(&gathered.root, &source.name()).await?;
    }
    let bytes = moved.iter().flatten().sum();
    let blobs = moved.iter().flatten().count();
    Ok(Copied {
        digest: gathered.root.digest.clone(),
        media_type: gathered.root.media_type.clone(),
        destination: output.destination(),
        manifests: gathered.manifests.len() + usize::from(!gathered.is_named) + referrers.len(),
        manifests_found: gathered.manifests_found,
        blobs,
        blobs_found: gathered.blobs.len() - blobs,
        bytes,
        referrers,
        digest_tags: gathered.digest_tags.iter().map(|(tag, _)| tag.to_string()).collect(),
        left_out: gathered.left_out,
        elapsed: start.elapsed(),
    })
}

/// Copies blobs; gives the bytes of each that moved.
async fn copy_blobs(
    blobs: &[Layer],
    output: &Arc<dyn ContentOutput>,
    parallel: usize,
    progress: &Progress,
) -> Result<Vec<Option<u64>>, Error> {
    let mut running = JoinSet::new();
    let mut waiting = blobs.iter().cloned().enumerate();
    let mut moved = vec![None; blobs.len()];
    loop {
        while running.len() < parallel.max(1)
            && let Some((index, blob)) = waiting.next()
        {
            let (output, progress) = (Arc::clone(output), progress.clone());
            running.spawn(async move {
                let result = copy_blob(index, &blob, output.as_ref(), &progress).await;
                result.map(|moved| (index, moved)).map_err(|error| in_copy_error(&blob.label(), error))
            });
        }
        match running.join_next().await {
            None => return Ok(moved),
            Some(Ok(Ok((index, bytes)))) => moved[index] = bytes,
            Some(Ok(Err(error))) => {
                running.shutdown().await;
                return Err(error);
            }
            Some(Err(panicked)) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

async fn copy_blob(
    index: usize,
    blob: &Layer,
    output: &dyn ContentOutput,
    progress: &Progress,
) -> Result<Option<u64>, Error> {
    let shown = &progress.layers()[index];
    shown.set(LayerState::Running);
    let mut attempt = 1;
    loop {
        match output.put_blob(blob, &shown.bytes).await {
            Ok(Moved::Nothing) => {
                shown.set(LayerState::Reused);
                return Ok(None);
            }
            Ok(Moved::Bytes) => {
                shown.set(LayerState::Done);
                return Ok(blob.blob.size());
            }
            Err(error) if error.is_worth_a_new_attempt() && attempt < ATTEMPTS => {
                tracing::warn!(blob = blob.label(), attempt, %error, "blob failed; starting it again");
                shown.bytes.reset();
                tokio::time::sleep(Duration::from_secs(1 << attempt)).await;
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Puts the manifests that others name, the deepest first: registries refuse an index before its images.
async fn put_manifests(gathered: &Gathered, output: &dyn ContentOutput) -> Result<(), Error> {
    let deepest = gathered.manifests.iter().map(|(depth, _)| *depth).max().unwrap_or_default();
    for depth in (0..=deepest).rev() {
        let level = gathered.manifests.iter().filter(|(at, _)| *at == depth).map(|(_, manifest)| manifest);
        put_all(level, output).await?;
    }
    Ok(())
}

async fn put_all<'a>(
    manifests: impl Iterator<Item = &'a FetchedManifest>,
    output: &dyn ContentOutput,
) -> Result<(), Error> {
    let put = manifests.map(|manifest| async move {
        in_copy(&manifest.digest, output.put_manifest(manifest).await).map(drop)
    });
    futures_util::stream::iter(put.collect::<Vec<_>>()).buffer_unordered(DOCUMENTS_AT_ONCE).try_collect().await
}

fn in_copy<T>(digest: &Digest, result: Result<T, Error>) -> Result<T, Error> {
    result.map_err(|error| in_copy_error(&digest.to_string(), error))
}

fn in_copy_error(what: &str, error: Error) -> Error {
    Error::Copy { what: what.to_owned(), source: Box::new(error) }
}
