//! Whole images, indexes and artifacts as they are: every manifest and blob by its digest, bit for bit.
//!
//! [`gather`] reads the manifests that are wanted, and with them learns of every blob; [`subset`] makes an index of some of another's
//! platforms, whose signatures [`signatures`] is about. Then the blobs are copied, in parallel; then the manifests, those that others name before those; then what names the
//! manifests as its subject ([`referrers`]); and the tag last.
//!
//! What a manifest says of its content is not looked at: no config is read and no layer decompressed, so that artifacts of any
//! media type are copied like images. Images that change on their way are [`crate::process`]'s.

mod gather;
mod referrers;
pub mod signatures;
pub(crate) mod subset;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use tokio::task::JoinSet;

pub use self::gather::Gathered;
use self::gather::Gathering;
pub use self::signatures::{Artifact, Signature, SignaturePolicy};
use crate::digest::Digest;
use crate::element::{ImageName, Layer};
use crate::error::Error;
use crate::output::content::ContentOutput;
use crate::output::{Moved, OutputError};
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
    /// Whether one of them is enough of an image that no index offers. Otherwise it has to be for each.
    pub any_platform: bool,
    /// Keep manifests as they are although not all that they name is copied: of an index the images for other platforms, and
    /// whatever the source does not have.
    pub sparse: bool,
    /// Copy what names the copied manifests as its subject, and what cosign keeps under tags that are called like their digests.
    pub referrers: bool,
    /// Fail rather than write a manifest that the source does not have.
    pub preserve_digests: bool,
    /// What becomes of the signatures of an index of which some platforms are copied. They are asked for when the destination does not
    /// have the new index by its name, unless they are dropped: three or four requests for each index.
    pub signatures: SignaturePolicy,
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
    /// Of these two, the signatures of what became something else.
    pub kept: Vec<Signature>,
    /// What stays named and was not copied.
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
    let gathered = gather(source.as_ref(), output.as_ref(), plan).await?;
    let copied = write(gathered, &source.name(), &output, plan, progress).await?;
    Ok(Copied { elapsed: start.elapsed(), ..copied })
}

/// What a copy consists of, of which the destination is asked what it has. Nothing is written.
pub async fn gather(
    source: &dyn Store,
    output: &dyn ContentOutput,
    plan: &CopyPlan,
) -> Result<Gathered, Error> {
    output.open().await?;
    if plan.referrers && !output.names_many() {
        return Err(OutputError::OneName { destination: output.destination() }.into());
    }
    let root = source.first().await?;
    Gathering::new(source, output, plan).all_of(root).await
}

/// Copies what was gathered for the same output and plan, from what is called `name` where it comes from.
pub async fn write(
    gathered: Gathered,
    name: &ImageName,
    output: &Arc<dyn ContentOutput>,
    plan: &CopyPlan,
    progress: &Progress,
) -> Result<Copied, Error> {
    let start = Instant::now();
    progress.begin(gathered.blobs.iter().map(|blob| (blob.label(), blob.blob.size())));
    let moved = copy_blobs(&gathered.blobs, output, plan, progress).await?;
    put_manifests(&gathered, output.as_ref()).await?;
    let referrers = referrers::put(&gathered, output.as_ref()).await?;
    if plan.preserve_digests && output.wanted().is_none() && gathered.root.digest.is_rare() {
        // A registry files what it gets under a tag by its usual algorithm.
        in_copy(&gathered.root.digest, output.put_manifest(&gathered.root).await)?;
    }
    if !gathered.is_named {
        output.put_named(&gathered.root, name).await?;
    }
    let moved_bytes =
        moved.iter().filter_map(|moved| if let Way::Moved(size) = moved { Some(*size) } else { None });
    let (bytes, blobs) =
        moved_bytes.fold((0_u64, 0), |(bytes, blobs), size| (bytes.saturating_add(size), blobs + 1));
    let lost = gathered.blobs.iter().zip(&moved).filter(|(_, moved)| **moved == Way::Missing);
    let lost: Vec<Digest> =
        lost.filter_map(|(blob, _)| Some(blob.descriptor.as_ref()?.digest.clone())).collect();
    Ok(Copied {
        digest: gathered.root.digest.clone(),
        media_type: gathered.root.media_type.clone(),
        destination: output.destination(),
        manifests: gathered.manifests.len() + usize::from(!gathered.is_named) + referrers.len(),
        manifests_found: gathered.manifests_found,
        blobs,
        blobs_found: gathered.blobs.len() - blobs - lost.len(),
        bytes,
        referrers,
        digest_tags: gathered.digest_tags.iter().map(|(tag, _)| tag.to_string()).collect(),
        kept: gathered.kept,
        left_out: gathered.left_out.into_iter().chain(lost).collect(),
        elapsed: start.elapsed(),
    })
}

/// What became of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// So many bytes went to the destination.
    Moved(u64),
    /// It was there, was mounted, or is foreign.
    Found,
    /// The source does not have it, and need not.
    Missing,
}

/// Copies blobs; gives what became of each.
async fn copy_blobs(
    blobs: &[Layer],
    output: &Arc<dyn ContentOutput>,
    plan: &CopyPlan,
    progress: &Progress,
) -> Result<Vec<Way>, Error> {
    let mut running = JoinSet::new();
    let mut waiting = blobs.iter().cloned().enumerate();
    let mut ways = vec![Way::Found; blobs.len()];
    loop {
        while running.len() < plan.parallel.max(1)
            && let Some((index, blob)) = waiting.next()
        {
            let (output, progress, sparse) = (Arc::clone(output), progress.clone(), plan.sparse);
            running.spawn(async move {
                match copy_blob(index, &blob, output.as_ref(), &progress).await {
                    Ok(way) => Ok((index, way)),
                    Err(error) if sparse && error.is_missing_blob() => Ok((index, Way::Missing)),
                    Err(error) => Err(in_copy_error(&blob.label(), error)),
                }
            });
        }
        match running.join_next().await {
            None => return Ok(ways),
            Some(Ok(Ok((index, way)))) => ways[index] = way,
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
) -> Result<Way, Error> {
    let shown = &progress.layers()[index];
    shown.set(LayerState::Running);
    let mut attempt = 1;
    loop {
        match output.put_blob(blob, &shown.bytes).await {
            Ok(Moved::Nothing) => {
                shown.set(LayerState::Reused);
                return Ok(Way::Found);
            }
            Ok(Moved::Bytes) => {
                shown.set(LayerState::Done);
                return Ok(Way::Moved(blob.blob.size().unwrap_or_default()));
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
    // A tar keeps them in the order in which they come, and of the same image it is always the same.
    let at_once = if output.names_many() { DOCUMENTS_AT_ONCE } else { 1 };
    futures_util::stream::iter(put.collect::<Vec<_>>()).buffer_unordered(at_once).try_collect().await
}

pub(crate) fn in_copy<T>(digest: &Digest, result: Result<T, Error>) -> Result<T, Error> {
    result.map_err(|error| in_copy_error(&digest.to_string(), error))
}

fn in_copy_error(what: &str, error: Error) -> Error {
    Error::Copy { what: what.to_owned(), source: Box::new(error) }
}
