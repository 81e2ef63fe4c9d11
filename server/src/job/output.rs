//! A job's destination: the real one, behind what the job's record has to know and already knows.
//!
//! Every step is durable before the next begins, so that a coordinator which is killed at any moment leaves a record that says
//! no more than what is at the destination.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use occy_pipeline::blob::{ByteCount, LayerStream};
use occy_pipeline::compression::Format;
use occy_pipeline::element::{Image, Layer, StoredLayer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, Permit, Receipt};
use occy_pipeline::registry::Repository;
use occy_pipeline::wire::convert;
use occy_proto::v1::{LayerState, LayerStatus};

use super::state::Change;
use crate::engine::{Applied, Claim, Engine, Written};
use crate::error::ServiceError;
use crate::executor::LayerWatcher;
use crate::metrics::Metrics;
use crate::written::Record;

/// Layers that an image of a job may have: all that a record can list in one message.
const MAX_LAYERS: usize = 2048;

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

/// A job's destination.
#[derive(Debug)]
pub struct JobOutput<O: ?Sized> {
    attempt: Attempt,
    /// Whether the destination keeps layers before the image is visible: what an earlier attempt wrote may be there.
    keeps_layers: bool,
    begun: Mutex<HashSet<usize>>,
    inner: Arc<O>,
}

impl<O: ImageOutput + ?Sized> JobOutput<O> {
    /// The destination of an attempt.
    pub fn new(attempt: Attempt, inner: Arc<O>, keeps_layers: bool) -> Self {
        Self { attempt, keeps_layers, begun: Mutex::default(), inner }
    }
}

#[async_trait::async_trait]
impl<O: ImageOutput + ?Sized> ImageOutput for JobOutput<O> {
    fn form(&self) -> LayerForm {
        self.inner.form()
    }

    fn takes_any_order(&self) -> bool {
        self.inner.takes_any_order()
    }

    fn wants_tar_sizes(&self) -> bool {
        self.inner.wants_tar_sizes()
    }

    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error> {
        if image.layers.len() > MAX_LAYERS {
            return Err(ServiceError::TooMany { what: "layers in an image", limit: MAX_LAYERS }.into());
        }
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) =
            expected.iter().map(|layer| layer.index).collect();
        let layers = image.layers.iter().map(|layer| LayerStatus {
            index: place(layer.index),
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
        let record = self.attempt.engine.written(&self.attempt.claim.id, &key(layer, chain)).await;
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
        let mut changes: Vec<_> = others
            .map(|written| {
                Change::LayerDone(convert::layer_status(&finished.image.layers[written.index], written))
            })
            .collect();
        changes.push(Change::Finalize);
        let Attempt { claim, engine, place, .. } = &self.attempt;
        // Before it is finalizing: a job that waits here can be cancelled.
        if !engine.lock(claim, place).await.map_err(ServiceError::from)? {
            return Err(ServiceError::JobEnded.into());
        }
        let _finalizing = Counted::new(&self.attempt.finalizing);
        let finalized = async {
            self.attempt.apply(changes, None).await?;
            self.inner.finalize(FinishedImage { permit: Some(&self.attempt), ..finished }).await
        };
        let finalized = finalized.await;
        if let Err(error) = engine.unlock(claim, place).await {
            // Its end is the end of the job, which is near.
            tracing::debug!(job = claim.id, %error, "a lock could not be given back");
        }
        finalized
    }
}

/// Writes down what becomes of a job's layers.
#[derive(Debug)]
pub struct JobWatcher {
    /// Whose layers.
    pub attempt: Attempt,
    /// What they pass through.
    pub chain: FilterChain,
}

#[async_trait::async_trait]
impl LayerWatcher for JobWatcher {
    async fn begun(&self, layer: &Layer, worker: &str) -> Result<(), ServiceError> {
        let change = Change::LayerBegun { index: place(layer.index), worker: worker.to_owned() };
        self.attempt.apply(vec![change], None).await
    }

    async fn waiting(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        let change = Change::LayerWaiting { index: place(layer.index), reason: reason.to_owned() };
        self.attempt.apply(vec![change], None).await
    }

    async fn held(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        let change = Change::LayerHeld { index: place(layer.index), reason: reason.to_owned() };
        self.attempt.apply(vec![change], None).await
    }

    async fn done(&self, layer: &Layer, written: &WrittenLayer) -> Result<(), ServiceError> {
        let record = Written { layer: key(layer, &self.chain), record: Record::from(written).text() };
        self.attempt.apply(vec![Change::LayerDone(convert::layer_status(layer, written))], Some(record)).await
    }
}

/// A place that counts for as long as it is held.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn place(index: usize) -> u32 {
    u32::try_from(index).expect("an image has fewer layers than that")
}

/// Under which name an attempt's result is kept: the content, what it passed through, and which version of it.
fn key(layer: &Layer, chain: &FilterChain) -> String {
    format!("{} {}", layer.blob.identity(), chain.fingerprint())
}
