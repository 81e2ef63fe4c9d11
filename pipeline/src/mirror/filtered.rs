//! Images that pass filters on their way, each at its target alone, whose manifest says what it was made of: so it is known there
//! without a record of our own.
//!
//! A layer that several images have passes the filters once in the whole mirror. Everywhere else it is mounted, or copied from
//! where it was brought to first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tokio::sync::Semaphore;

use super::blobs::Blobs;
use super::config::Mirror;
use super::image::MirrorOutput;
use super::lists::Wanted;
use super::plan::Need;
use super::progress::MirrorProgress;
use super::run::Outcome;
use super::survey::Making;
use super::{Ends, TagLocks, locked};
use crate::blob::{ByteCount, LayerStream};
use crate::codec::Pool;
use crate::compression::Format;
use crate::copy::SignaturePolicy;
use crate::copy::signatures::SOURCE_DIGEST;
use crate::digest::Digest;
use crate::element::{Image, Layer, StoredLayer, WrittenLayer};
use crate::error::Error;
use crate::executor::{Executor, LayerTask, LocalExecutor};
use crate::index::{IndexPlan, process_index};
use crate::manifest::Annotations;
use crate::named::{Beside, process_named};
use crate::output::content::ContentOutput;
use crate::output::manifest::ManifestFormat;
use crate::output::registry::RegistryOutput;
use crate::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, Permit, Receipt};
use crate::process;
use crate::progress::{LayerState, Progress};
use crate::reference::Reference;
use crate::registry::Repository;
use crate::source::stored::SourceIndex;
use crate::task::LayerPlan;

/// The annotation that says how an image was made of its source: a digest of the filters, of what else changes it and of what is wanted
/// beside it, and not of the versions that did it. An image that an earlier version has made stays.
const RECIPE: &str = "dev.occystrap.recipe";

/// What an image was made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MadeOf {
    source: Digest,
    recipe: Digest,
}

impl MadeOf {
    /// What a manifest says, if it does.
    pub(super) fn told(manifest: &[u8]) -> Option<Self> {
        let manifest: Value = serde_json::from_slice(manifest).ok()?;
        let digest = |key| manifest["annotations"][key].as_str()?.parse().ok();
        Some(Self { source: digest(SOURCE_DIGEST)?, recipe: digest(RECIPE)? })
    }

    /// What an entry of the configuration makes of a source.
    pub(super) fn wanted(mirror: &Mirror, source: &Digest) -> Self {
        let mut platforms: Vec<_> = mirror.platforms.iter().map(ToString::to_string).collect();
        platforms.sort();
        let mut recipe = serde_json::json!({
            "filters": mirror.filters.specs(),
            "platforms": platforms,
            "attestations": mirror.attestations.to_string(),
        });
        // Only where it is wanted: what was made before it could be, and would be the same now, stays.
        for (key, is_wanted) in [("referrers", mirror.referrers), ("provenance", mirror.provenance)] {
            if is_wanted {
                recipe[key] = true.into();
            }
        }
        Self { source: source.clone(), recipe: Digest::sha256(recipe.to_string()) }
    }

    pub(super) fn annotations(&self) -> Annotations {
        [(SOURCE_DIGEST, &self.source), (RECIPE, &self.recipe)]
            .map(|(key, digest)| (key.to_owned(), digest.to_string()))
            .into()
    }
}

/// Makes an image of a source at a target, under its tag or not at all.
pub(super) async fn make(
    ends: &Ends,
    mirror: &Mirror,
    wanted: &Wanted,
    making: &Making,
    (layers, blobs): (&Arc<OncePerLayer>, &Arc<Blobs>),
) -> Result<Outcome, Error> {
    let Wanted { source, target, .. } = wanted;
    let origin = ends.source.source(source, &making.source, Arc::clone(&making.documents));
    let origin = origin.as_ref();
    let annotations = MadeOf::wanted(mirror, &making.source).annotations();
    let plan = LayerPlan {
        chain: mirror.filters.clone(),
        annotations,
        pool: Pool::shared().clone(),
        spools: ends.spools.clone(),
        max_layer_size: ends.max_layer_size,
        limits: crate::tar::Limits::default(),
        verify_diff_ids: false,
    };
    let need = Need::Made(wanted.mirror, making.source.clone());
    let output = Arc::new(TargetOutput::new(ends, target, (Arc::clone(blobs), need)));
    let executor = Arc::clone(layers) as Arc<dyn Executor>;
    let index = origin.index().await?;
    let signatures = match mirror.signatures {
        // It was found not to be signed, and nothing else of it can be.
        SignaturePolicy::Refuse if index.is_none() => SignaturePolicy::Drop,
        signatures => signatures,
    };
    let beside = Beside { signatures, provenance: mirror.provenance, referrers: mirror.referrers };
    let begun = Arc::new(Mutex::new(Vec::<Progress>::new()));
    let begin = {
        let begun = Arc::clone(&begun);
        move || {
            let progress = Progress::default();
            begun.lock().unwrap_or_else(PoisonError::into_inner).push(progress.clone());
            progress
        }
    };
    let (receipt, manifests, attestations_dropped, attached) = match index {
        None => {
            let (done, attached) =
                process_named(origin, Arc::new(plan), output, executor, beside, &begin()).await?;
            count_config(&ends.progress, &done);
            (done.receipt, 1, 0, attached)
        }
        Some(index) => {
            let (layers, platforms, attestations) =
                (Arc::new(plan), mirror.platforms.clone(), mirror.attestations);
            let begin = Arc::new(move |_: &_| begin());
            let plan = IndexPlan { layers, platforms, attestations, beside, executor, begin };
            let done = process_index(origin, &index, &plan, output.as_ref()).await?;
            done.images.iter().for_each(|image| count_config(&ends.progress, &image.outcome));
            (done.receipt, done.manifests, done.dropped.len(), done.attached)
        }
    };
    let begun = std::mem::take(&mut *begun.lock().unwrap_or_else(PoisonError::into_inner));
    let states = || begun.iter().flat_map(|image| image.layers()).map(|layer| layer.state());
    let blobs = states().filter(|state| *state == LayerState::Done).count();
    let blobs_found = states().filter(|state| *state == LayerState::Reused).count();
    Ok(Outcome::Copied {
        blobs,
        blobs_found,
        manifests: manifests + attached.manifests,
        made: receipt.manifest_digest,
        attestations_dropped,
        signatures_kept: attached.kept.len(),
        provenance: attached.provenance,
    })
}

/// Counts an image's config, which was read for it, and written where it was not there.
fn count_config(progress: &MirrorProgress, done: &process::Outcome) {
    if let Some(config) = &done.image.config.original {
        progress.fetched(config.len() as u64);
    }
    if let Some(size) = done.receipt.config_moved {
        progress.uploaded(size);
    }
}

/// A tag of a target.
struct TargetOutput {
    inner: RegistryOutput,
    ends: Ends,
    target: Reference,
    /// What brings what belongs to images, beside their layers, and to which.
    blobs: (Arc<Blobs>, Need),
}

impl TargetOutput {
    fn new(ends: &Ends, target: &Reference, blobs: (Arc<Blobs>, Need)) -> Self {
        let inner = RegistryOutput::new(&ends.target, target.clone(), None, ManifestFormat::Keep);
        // What this process has not brought there itself is asked for.
        let inner = inner.with_confirmation(ends.executor.is_some());
        Self { inner, ends: ends.clone(), target: target.clone(), blobs }
    }

    fn locks(&self) -> Option<&Arc<dyn TagLocks>> {
        self.ends.locks.as_ref()
    }
}

#[async_trait::async_trait]
impl ImageOutput for TargetOutput {
    fn form(&self) -> LayerForm {
        self.inner.form()
    }

    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error> {
        self.inner.begin(image, expected).await
    }

    async fn copy_layer(&self, layer: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        self.inner.copy_layer(layer, progress).await
    }

    async fn has_layer(&self, layer: &Layer) -> Result<bool, Error> {
        self.inner.has_layer(layer).await
    }

    async fn write_layer(
        &self,
        index: usize,
        stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        self.inner.write_layer(index, stream, format, progress).await
    }

    fn repository(&self) -> Option<&Repository> {
        self.inner.repository()
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let Some(locks) = self.locks() else { return self.inner.finalize(finished).await };
        // What is asked of the registry before the manifest takes its time.
        let permit = TagPermit { locks, tag: &self.target };
        let finished = FinishedImage { permit: Some(&permit), ..finished };
        locked(Some(locks), &self.target, self.inner.finalize(finished)).await
    }

    fn entry(&self, digest: &Digest) -> Option<Arc<dyn ImageOutput>> {
        self.inner.entry(digest)
    }

    fn entry_to_be(&self) -> Option<Arc<dyn ImageOutput>> {
        self.inner.entry_to_be()
    }

    fn content(&self) -> Option<Arc<dyn ContentOutput>> {
        Some(Arc::new(MirrorOutput::new(&self.ends, &self.target, None, Some(self.blobs.clone()))))
    }

    async fn put_index(&self, index: &SourceIndex) -> Result<Receipt, Error> {
        locked(self.locks(), &self.target, self.inner.put_index(index)).await
    }
}

/// The right to change a tag, which is asked for once more when it is changed.
#[derive(Debug)]
struct TagPermit<'a> {
    locks: &'a Arc<dyn TagLocks>,
    tag: &'a Reference,
}

#[async_trait::async_trait]
impl Permit for TagPermit<'_> {
    async fn check(&self) -> Result<(), Error> {
        self.locks.lock(self.tag).await
    }
}

/// Runs the layers of a whole mirror: those that are the same once.
pub(super) struct OncePerLayer {
    inner: Arc<dyn Executor>,
    /// Whether layers run in this process.
    is_here: bool,
    /// By what has to be the same.
    done: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Done>>>>>,
    slots: Semaphore,
    progress: MirrorProgress,
}

/// A layer that is at targets.
struct Done {
    written: WrittenLayer,
    /// The repositories that have it, at least one.
    holders: Vec<Repository>,
}

impl OncePerLayer {
    pub(super) fn new(ends: &Ends) -> Self {
        let inner = ends.executor.clone().unwrap_or_else(|| LocalExecutor::new(ends.parallel));
        let slots = Semaphore::new(ends.parallel.max(1));
        let is_here = ends.executor.is_none();
        Self { inner, is_here, done: Mutex::default(), slots, progress: ends.progress.clone() }
    }

    /// Counts a layer that was not done before.
    fn count(&self, task: &LayerTask, written: &WrittenLayer) {
        let (progress, is_filtered) = (task.layer_progress(), task.plan.chain.edits());
        let is_moved = progress.state() == LayerState::Done;
        // One that filters left as it was can be there, or be mounted, and they have read it all the same; unless another job had it
        // brought there, and no worker of ours.
        let is_looked_at = is_filtered && (self.is_here || progress.worker().is_some());
        let size = task.layer.blob.size().unwrap_or_default();
        if is_moved || is_looked_at {
            self.progress.fetched(size);
            if is_filtered {
                self.progress.filtered(size);
            }
        }
        if is_moved {
            self.progress.uploaded(match &written.stored {
                StoredLayer::Original => size,
                StoredLayer::Written { size, .. } => *size,
            });
        }
    }

    fn known(&self, task: &LayerTask) -> Arc<tokio::sync::Mutex<Option<Done>>> {
        let LayerTask { layer, plan, .. } = task;
        let media_type = layer.descriptor.as_ref().map(|descriptor| descriptor.media_type.as_str());
        let key = format!(
            "{} {} {} {}",
            layer.sameness(),
            media_type.unwrap_or_default(),
            layer.keep_stored,
            plan.chain.fingerprint()
        );
        Arc::clone(self.done.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default())
    }

    /// Has a layer that is somewhere be here too. None: that did not help.
    async fn take(&self, task: &LayerTask, done: &mut Done) -> Result<Option<WrittenLayer>, Error> {
        let LayerTask { layer, output, .. } = task;
        let Some(own) = output.repository() else { return Ok(None) };
        let Some(descriptor) = done.written.stored.descriptor(layer) else { return Ok(None) };
        let (digest, size) = (descriptor.digest.clone(), descriptor.size);
        let on_host = || done.holders.iter().filter(|holder| holder.host() == own.host());
        let itself = on_host().find(|holder| holder.name() == own.name());
        let is_mounted = itself.is_none();
        let near = itself.or_else(|| on_host().next());
        let holder = near.unwrap_or(&done.holders[0]);
        let stored = Layer {
            blob: holder.blob(&digest, Some(size)),
            descriptor: Some(descriptor),
            origin: Some(holder.clone()),
            ..layer.clone()
        };
        let progress = task.layer_progress();
        let written = WrittenLayer { index: layer.index, ..done.written.clone() };
        if near.is_some() {
            if !output.has_layer(&stored).await? {
                return Ok(None);
            }
            if is_mounted {
                self.progress.mounted(size);
                done.holders.push(own.clone());
            }
            progress.set(LayerState::Reused);
            return Ok(Some(written));
        }
        let _slot = self.slots.acquire().await.expect("it is never closed");
        progress.set(LayerState::Running);
        let moved = match output.copy_layer(&stored, &progress.bytes).await {
            Ok(moved) => moved,
            // Which of the two it was will be seen.
            Err(error) => {
                tracing::warn!(layer = layer.label(), %error, "a layer could not be copied from where it is; it is made again");
                progress.bytes.reset();
                return Ok(None);
            }
        };
        if moved == Moved::Bytes {
            self.progress.uploaded(size);
        }
        progress.set(if moved == Moved::Bytes { LayerState::Done } else { LayerState::Reused });
        done.holders.push(own.clone());
        Ok(Some(written))
    }
}

#[async_trait::async_trait]
impl Executor for OncePerLayer {
    fn at_once(&self) -> usize {
        self.inner.at_once()
    }

    fn may_begin_anew(&self) -> bool {
        self.inner.may_begin_anew()
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        let Some(repository) = task.output.repository().filter(|_| !task.layer.is_foreign()).cloned() else {
            return self.inner.run(task).await;
        };
        let known = self.known(&task);
        let mut known = known.lock().await;
        if let Some(done) = &mut *known
            && let Some(written) = self.take(&task, done).await?
        {
            return Ok(written);
        }
        let _slot = self.slots.acquire().await.expect("it is never closed");
        let written = self.inner.run(task.clone()).await?;
        self.count(&task, &written);
        // What filters that only look would report is not kept: a mirror has none.
        match &mut *known {
            // It was made again, because this registry could not have it otherwise.
            Some(done) if done.written.stored == written.stored => done.holders.push(repository),
            _ => *known = Some(Done { written: written.clone(), holders: vec![repository] }),
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Config;
    use super::*;

    fn wanted(more: &str) -> MadeOf {
        let text = format!("mirrors: [{{sources: [a.example/x], targets: [b.example/x]{more}}}]");
        MadeOf::wanted(&Config::parse(&text).unwrap().mirrors[0], &Digest::sha256(b"source"))
    }

    #[test]
    fn a_manifest_says_what_it_was_made_of_and_by_which_filters() {
        let made = wanted(", filters: ['exclude:pattern=*.key']");
        let manifest = serde_json::json!({"annotations": made.annotations()}).to_string();
        assert_eq!(MadeOf::told(manifest.as_bytes()), Some(made.clone()));
        assert_eq!(MadeOf::told(b"{}"), None);
        assert_eq!(MadeOf::told(b"none"), None);
        for other in [
            ", filters: ['exclude:pattern=*.pem']",
            ", filters: ['exclude:pattern=*.key', normalize-timestamps]",
            ", filters: ['exclude:pattern=*.key'], attestations: retarget",
            ", filters: ['exclude:pattern=*.key'], platforms: [linux/amd64]",
            ", filters: ['exclude:pattern=*.key'], referrers: true",
            ", filters: ['exclude:pattern=*.key'], provenance: true",
        ] {
            assert_ne!(wanted(other), made, "{other}");
        }
        // Written otherwise it is the same.
        assert_eq!(
            wanted(", filters: ['exclude:pattern=*.key'], attestations: drop, referrers: false"),
            made
        );
    }
}
