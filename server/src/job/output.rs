//! A job's destination: the real one, behind what the job's record has to know and already knows.
//!
//! Every step is durable before the next begins, so that a coordinator which is killed at any moment leaves a record that says
//! no more than what is at the destination.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use occy_pipeline::blob::{ByteCount, LayerStream};
use occy_pipeline::compression::Format;
use occy_pipeline::digest::Digest;
use occy_pipeline::element::{Image, ImageName, Layer, StoredLayer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::output::content::ContentOutput;
use occy_pipeline::output::manifest::ManifestFormat;
use occy_pipeline::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, Permit, Receipt};
use occy_pipeline::reference::Tag;
use occy_pipeline::registry::{FetchedManifest, Repository};
use occy_pipeline::source::stored::SourceIndex;
use occy_pipeline::wire::convert;
use occy_proto::v1::{LayerState, LayerStatus};
use tokio::sync::OnceCell;

use super::state::Change;
use crate::engine::{Applied, Claim, Engine, Written};
use crate::error::ServiceError;
use crate::executor::LayerWatcher;
use crate::metrics::Metrics;
use crate::other::Versions;
use crate::written::Record;

/// Layers that a job may have, of all its images together: all that a record can list in one message.
const MAX_LAYERS: usize = 2048;
/// Images that an index of a job may have.
const MAX_IMAGES: usize = 256;

/// One attempt at a job: the right to it, and where its record is.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The job, and the right to change it.
    pub claim: Claim,
    /// Where its record is.
    pub engine: Arc<dyn Engine>,
    /// Where its image becomes visible: one job's at a time.
    pub place: String,
    /// Where the ends of jobs are counted.
    pub metrics: Metrics,
    /// How many jobs are making their image visible.
    pub finalizing: Arc<AtomicUsize>,
}

impl Attempt {
    /// Makes changes durable.
    pub async fn apply(&self, changes: Vec<Change>, written: Option<Written>) -> Result<(), ServiceError> {
        match self.engine.change(&self.claim, changes, written).await? {
            Applied::Done(job) => {
                self.metrics.job_changed(&job);
                Ok(())
            }
            Applied::Refused(_) | Applied::Stale | Applied::Missing => Err(ServiceError::JobEnded),
        }
    }

    /// Waits until no other job makes an image visible there, and writes down that this one does, with these changes before.
    async fn begin_visibly(&self, mut changes: Vec<Change>) -> Result<Counted, ServiceError> {
        // Before it is finalizing: a job that waits here can be cancelled.
        if !self.engine.lock(&self.claim, &self.place).await? {
            return Err(ServiceError::JobEnded);
        }
        let counted = Counted::new(&self.finalizing);
        changes.push(Change::Finalize);
        match self.apply(changes, None).await {
            Ok(()) => Ok(counted),
            Err(error) => {
                self.end_visibly().await;
                Err(error)
            }
        }
    }

    /// The image is visible there, or will not be.
    async fn end_visibly(&self) {
        let Self { claim, engine, place, .. } = self;
        if let Err(error) = engine.unlock(claim, place).await {
            // Its end is the end of the job, which is near.
            tracing::debug!(job = claim.id, %error, "a lock could not be given back");
        }
    }
}

#[async_trait::async_trait]
impl Permit for Attempt {
    async fn check(&self) -> Result<(), Error> {
        match self.engine.holds(&self.claim).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(ServiceError::JobEnded.into()),
            Err(error) => Err(ServiceError::from(error).into()),
        }
    }
}

/// Where layers stand in a job's record. Those of an index's images follow each other, as these do on their way.
#[derive(Debug, Default)]
pub struct Places(Mutex<Begun>);

#[derive(Debug, Default)]
struct Begun {
    images: usize,
    /// The place of the lowest layer of the image that is on its way.
    first: usize,
    /// Of all images so far.
    layers: usize,
}

impl Places {
    /// The next image begins.
    fn begin(&self, layers: usize) -> Result<(), ServiceError> {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *begun = Begun { images: begun.images + 1, first: begun.layers, layers: begun.layers + layers };
        if begun.layers > MAX_LAYERS {
            return Err(ServiceError::TooMany { what: "layers in an image or index", limit: MAX_LAYERS });
        }
        if begun.images > MAX_IMAGES {
            return Err(ServiceError::TooMany { what: "images in an index", limit: MAX_IMAGES });
        }
        Ok(())
    }

    /// The place of a layer of the image that is on its way.
    fn of(&self, index: usize) -> u32 {
        convert::count(self.0.lock().unwrap_or_else(PoisonError::into_inner).first + index)
    }

    /// A layer of that image, as the record has it.
    fn status(&self, layer: &Layer, written: &WrittenLayer) -> LayerStatus {
        LayerStatus { index: self.of(written.index), ..convert::layer_status(layer, written) }
    }
}

/// A job's destination.
pub struct JobOutput {
    attempt: Attempt,
    places: Arc<Places>,
    /// Of the filters that only workers have.
    versions: Arc<OnceLock<Versions>>,
    /// Whether the destination keeps layers before the image is visible: what an earlier attempt wrote may be there.
    keeps_layers: bool,
    /// Of an index, and found by its digest alone: it makes nothing visible.
    is_entry: bool,
    begun: Mutex<HashSet<usize>>,
    inner: Arc<dyn ImageOutput>,
}

impl JobOutput {
    /// The destination of an attempt, whose watcher has the same places and versions.
    pub fn new(
        attempt: Attempt,
        inner: Arc<dyn ImageOutput>,
        keeps_layers: bool,
        places: Arc<Places>,
        versions: Arc<OnceLock<Versions>>,
    ) -> Self {
        Self { attempt, places, versions, keeps_layers, is_entry: false, begun: Mutex::default(), inner }
    }

    fn entry_of(&self, inner: Arc<dyn ImageOutput>) -> Arc<dyn ImageOutput> {
        let (attempt, keeps_layers) = (self.attempt.clone(), self.keeps_layers);
        let (places, versions) = (Arc::clone(&self.places), Arc::clone(&self.versions));
        let begun = Mutex::default();
        Arc::new(Self { attempt, places, versions, keeps_layers, is_entry: true, begun, inner })
    }
}

#[async_trait::async_trait]
impl ImageOutput for JobOutput {
    fn form(&self) -> LayerForm {
        self.inner.form()
    }

    fn format(&self) -> ManifestFormat {
        self.inner.format()
    }

    fn takes_any_order(&self) -> bool {
        self.inner.takes_any_order()
    }

    fn wants_tar_sizes(&self) -> bool {
        self.inner.wants_tar_sizes()
    }

    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error> {
        self.places.begin(image.layers.len())?;
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) =
            expected.iter().map(|layer| layer.index).collect();
        let layers = image.layers.iter().map(|layer| LayerStatus {
            index: self.places.of(layer.index),
            state: LayerState::Waiting.into(),
            label: layer.label(),
            source_size: layer.blob.size(),
            ..LayerStatus::default()
        });
        self.attempt.apply(vec![Change::Plan(layers.collect())], None).await?;
        self.inner.begin(image, expected).await
    }

    /// What an earlier attempt wrote, if it still is at the destination.
    async fn known_layer(&self, layer: &Layer, chain: &FilterChain) -> Result<Option<WrittenLayer>, Error> {
        if let Some(known) = self.inner.known_layer(layer, chain).await? {
            return Ok(Some(known));
        }
        if !self.keeps_layers {
            return Ok(None);
        }
        let key = key(layer, chain, &self.versions);
        let record = self.attempt.engine.written(&self.attempt.claim.id, &key).await;
        let record = record.map_err(ServiceError::from)?;
        let Some(written) = record.and_then(|record| Record::parse(&record)?.layer(layer.index)) else {
            return Ok(None);
        };
        let origin = match &written.stored {
            StoredLayer::Original => layer.origin.clone(),
            StoredLayer::Written { .. } => None,
        };
        let stored = Layer { descriptor: written.stored.descriptor(layer), origin, ..layer.clone() };
        Ok(self.inner.has_layer(&stored).await?.then_some(written))
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
        // Layers that stand in the image twice have been done once; their other places are done now.
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let others = finished.layers.iter().filter(|layer| !begun.contains(&layer.index));
        let changes: Vec<_> = others
            .map(|written| {
                Change::LayerDone(self.places.status(&finished.image.layers[written.index], written))
            })
            .collect();
        let finished = FinishedImage { permit: Some(&self.attempt), ..finished };
        if self.is_entry {
            if !changes.is_empty() {
                self.attempt.apply(changes, None).await?;
            }
            return self.inner.finalize(finished).await;
        }
        let _counted = self.attempt.begin_visibly(changes).await?;
        let finalized = self.inner.finalize(finished).await;
        self.attempt.end_visibly().await;
        finalized
    }

    fn entry(&self, digest: &Digest) -> Option<Arc<dyn ImageOutput>> {
        Some(self.entry_of(self.inner.entry(digest)?))
    }

    fn entry_to_be(&self) -> Option<Arc<dyn ImageOutput>> {
        Some(self.entry_of(self.inner.entry_to_be()?))
    }

    fn content(&self) -> Option<Arc<dyn ContentOutput>> {
        let (attempt, inner) = (self.attempt.clone(), self.inner.content()?);
        Some(Arc::new(JobContent { attempt, inner, begun: OnceCell::new() }))
    }

    async fn put_index(&self, index: &SourceIndex) -> Result<Receipt, Error> {
        if self.is_entry {
            self.attempt.check().await?;
            return self.inner.put_index(index).await;
        }
        let _counted = self.attempt.begin_visibly(Vec::new()).await?;
        let put = async {
            self.attempt.check().await?;
            self.inner.put_index(index).await
        };
        let put = put.await;
        self.attempt.end_visibly().await;
        put
    }
}

/// What belongs to a job's image, and its name, which it gets last. All of it is written while no other job makes an image visible
/// there, and each manifest only as long as the job is this attempt's.
struct JobContent {
    attempt: Attempt,
    inner: Arc<dyn ContentOutput>,
    /// Whether the job is making its image visible.
    begun: OnceCell<Counted>,
}

impl JobContent {
    async fn may_write(&self) -> Result<(), Error> {
        self.begun.get_or_try_init(|| self.attempt.begin_visibly(Vec::new())).await?;
        self.attempt.check().await
    }
}

#[async_trait::async_trait]
impl ContentOutput for JobContent {
    fn destination(&self) -> String {
        self.inner.destination()
    }

    fn wanted(&self) -> Option<&Digest> {
        self.inner.wanted()
    }

    fn names_many(&self) -> bool {
        self.inner.names_many()
    }

    async fn open(&self) -> Result<(), Error> {
        self.inner.open().await
    }

    async fn is_named(&self, digest: &Digest) -> Result<bool, Error> {
        self.inner.is_named(digest).await
    }

    async fn has_manifest(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        self.inner.has_manifest(digest, size).await
    }

    async fn put_blob(&self, blob: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        self.inner.put_blob(blob, progress).await
    }

    async fn put_manifest(&self, manifest: &FetchedManifest) -> Result<Option<Digest>, Error> {
        self.may_write().await?;
        self.inner.put_manifest(manifest).await
    }

    /// What is read here may be written back with a change.
    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        self.may_write().await?;
        self.inner.tagged(tag).await
    }

    async fn put_tagged(&self, tag: &Tag, manifest: &FetchedManifest) -> Result<(), Error> {
        self.may_write().await?;
        self.inner.put_tagged(tag, manifest).await
    }

    async fn put_named(&self, manifest: &FetchedManifest, name: &ImageName) -> Result<(), Error> {
        self.may_write().await?;
        let named = self.inner.put_named(manifest, name).await;
        self.attempt.end_visibly().await;
        named
    }
}

/// Writes down what becomes of a job's layers.
#[derive(Debug)]
pub struct JobWatcher {
    /// Whose layers.
    pub attempt: Attempt,
    /// Where they stand in the record.
    pub places: Arc<Places>,
    /// Of the filters that only workers have, known when a layer has begun.
    pub versions: Arc<OnceLock<Versions>>,
}

#[async_trait::async_trait]
impl LayerWatcher for JobWatcher {
    async fn begun(&self, layer: &Layer, worker: &str) -> Result<(), ServiceError> {
        let change = Change::LayerBegun { index: self.places.of(layer.index), worker: worker.to_owned() };
        self.attempt.apply(vec![change], None).await
    }

    async fn waiting(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        let change = Change::LayerWaiting { index: self.places.of(layer.index), reason: reason.to_owned() };
        self.attempt.apply(vec![change], None).await
    }

    async fn held(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        let change = Change::LayerHeld { index: self.places.of(layer.index), reason: reason.to_owned() };
        self.attempt.apply(vec![change], None).await
    }

    async fn done(
        &self,
        layer: &Layer,
        chain: &FilterChain,
        written: &WrittenLayer,
    ) -> Result<(), ServiceError> {
        let record =
            Written { layer: key(layer, chain, &self.versions), record: Record::from(written).text() };
        let done = Change::LayerDone(self.places.status(layer, written));
        self.attempt.apply(vec![done], Some(record)).await
    }
}

/// A place that counts for as long as it is held.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Under which name an attempt's result is kept: the content, what it passed through, and which version of it.
fn key(layer: &Layer, chain: &FilterChain, versions: &OnceLock<Versions>) -> String {
    let own = format!("{} {}", layer.sameness(), chain.fingerprint());
    match versions.get().map(|versions| versions.in_chain(chain)).unwrap_or_default() {
        others if others.is_empty() => own,
        others => format!("{own} {}", serde_json::Value::from(others)),
    }
}

#[cfg(test)]
mod tests {
    use occy_pipeline::blob::MemoryBlob;
    use occy_pipeline::manifest::Descriptor;
    use occy_proto::v1::FilterCapability;

    use super::*;
    use crate::admit::filter_need;
    use crate::other;

    #[test]
    fn what_the_last_release_has_kept_of_a_layer_counts_where_no_filter_has_a_version_of_its_own() {
        let descriptor =
            Descriptor::new("application/vnd.oci.image.layer.v1.tar", &Digest::sha256("layer"), 9);
        let layer = Layer {
            index: 0,
            blob: Arc::new(MemoryBlob::new(Default::default())),
            descriptor: Some(descriptor),
            format: Format::None,
            diff_id: None,
            origin: None,
            keep_stored: true,
            known_by_diff_id_alone: false,
        };
        let chain = |text: &str| other::chain(&[text.to_owned()], |_| true).unwrap();
        let needs = Arc::new([filter_need("other")].into());
        let of_worker = |chain: &FilterChain, version: &str| {
            let has = FilterCapability {
                name: "other".to_owned(),
                version: version.to_owned(),
                ..FilterCapability::default()
            };
            key(&layer, chain, &OnceLock::from(Versions::of(&needs, &[has])))
        };
        // The last release kept all of them under these words.
        let last = |chain: &FilterChain| format!("{} {}", layer.sameness(), chain.fingerprint());
        let (others, ours) = (chain("other:x=1"), chain("exclude:pattern=a"));
        let keys = ["1", "2", ""].map(|version| of_worker(&others, version));
        assert_eq!(HashSet::from([&keys[0], &keys[1], &keys[2], &last(&others)]).len(), 4, "{keys:?}");
        assert_eq!(of_worker(&others, "1"), keys[0]);
        assert_eq!(of_worker(&ours, "1"), last(&ours));
    }
}
