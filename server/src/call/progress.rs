//! How far a call is, for its caller: told now and then, and never waited for.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use occy_pipeline::progress::{Current, ImagesProgress, LayerState, Progress};
use occy_pipeline::wire::convert;
use occy_proto::v1::{self, CallProgress, LayerStatus};

/// How often a caller hears of it.
const EVERY: Duration = Duration::from_millis(200);
/// Layers of which one message tells, so that it has a message's size: an index may have any number.
const LAYERS_AT_ONCE: usize = 1000;

/// Which worker has which layer of the image that is on its way, or why it waits.
#[derive(Clone, Debug, Default)]
pub(super) struct Workers(Arc<Mutex<HashMap<usize, At>>>);

#[derive(Clone, Debug, Default)]
struct At {
    worker: String,
    waiting_reason: String,
}

impl Workers {
    pub(super) fn note(&self, layer: usize, worker: &str) {
        let at = At { worker: worker.to_owned(), waiting_reason: String::new() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, at);
    }

    /// It waits, or its worker does; empty when that is over.
    pub(super) fn note_waiting(&self, layer: usize, reason: &str) {
        let mut layers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reason.clone_into(&mut layers.entry(layer).or_default().waiting_reason);
    }

    /// The next image begins.
    pub(super) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn of(&self, layer: usize) -> At {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&layer).cloned().unwrap_or_default()
    }
}

/// What begins each of the images that a call is about.
pub(super) fn begin_each(
    images: &ImagesProgress,
    workers: &Workers,
) -> Arc<dyn Fn() -> Progress + Send + Sync> {
    let (images, workers) = (images.clone(), workers.clone());
    Arc::new(move || {
        workers.forget();
        images.begin()
    })
}

/// Tells whatever has changed, for as long as it is polled. What could not be sent is part of what is told next.
pub(super) async fn tell(
    images: &ImagesProgress,
    workers: &Workers,
    mut send: impl FnMut(CallProgress) -> bool,
) -> Infallible {
    let mut told: Vec<Option<LayerStatus>> = Vec::new();
    let mut bytes = Vec::new();
    let mut image = 0;
    loop {
        tokio::time::sleep(EVERY).await;
        let Current { image: now, progress, .. } = images.current();
        if now != image {
            image = now;
            told.clear();
        }
        told.resize(progress.layers().len(), None);
        let now: Vec<_> = (0..told.len()).map(|index| status(&progress, workers, index)).collect();
        let running = convert::running(&progress, 0);
        let changed = now.iter().zip(&told).filter(|(now, told)| Some(*now) != told.as_ref());
        let changed: Vec<_> = changed.map(|(now, _)| now.clone()).take(LAYERS_AT_ONCE).collect();
        if (!changed.is_empty() || running != bytes)
            && send(CallProgress {
                layers: changed.clone(),
                running: running.clone(),
                image: convert::count(image),
            })
        {
            for status in changed {
                let index = status.index as usize;
                told[index] = Some(status);
            }
            bytes = running;
        }
    }
}

fn status(progress: &Progress, workers: &Workers, index: usize) -> LayerStatus {
    let layer = &progress.layers()[index];
    let At { worker, waiting_reason } = workers.of(index);
    LayerStatus {
        index: convert::count(index),
        state: match layer.state() {
            LayerState::Waiting => v1::LayerState::Waiting,
            LayerState::Running => v1::LayerState::Running,
            LayerState::Done => v1::LayerState::Done,
            LayerState::Reused => v1::LayerState::Reused,
        }
        .into(),
        label: layer.label.clone(),
        source_size: layer.total,
        worker,
        waiting_reason,
        ..LayerStatus::default()
    }
}
