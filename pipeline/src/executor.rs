//! Who brings the layers of an image to their destination: the one seam between this process and a fleet.
//!
//! [`process`](crate::process::process) hands each distinct layer to an [`Executor`] and places what comes back by its index.
//! Here is the executor that works in this process; a coordinator has others, which wait for a worker first, or which know
//! what an earlier attempt at the same job has done, and a coordinator's client has one to which layers come as they are to be.

use std::sync::Arc;

use bytes::Bytes;

use crate::element::{Layer, WrittenLayer};
use crate::error::Error;
use crate::output::ImageOutput;
use crate::progress::{LayerProgress, Progress};
use crate::task::LayerPlan;

/// One layer's way to its destination, not begun.
#[derive(Clone)]
pub struct LayerTask {
    /// The layer.
    pub layer: Layer,
    /// What is done with it.
    pub plan: Arc<LayerPlan>,
    /// Where it goes.
    pub output: Arc<dyn ImageOutput>,
    /// Of all layers of its image.
    pub progress: Progress,
}

impl LayerTask {
    /// Runs it in this process, trying again when the network fails. Dropped, it stops.
    pub async fn run(&self) -> Result<WrittenLayer, Error> {
        self.plan.run(self.output.as_ref(), &self.layer, self.layer_progress()).await
    }

    /// What the output has of it already, so that there is nothing to run; [`run`](Self::run) asks this first.
    pub async fn known(&self) -> Result<Option<WrittenLayer>, Error> {
        self.plan.known(self.output.as_ref(), &self.layer, self.layer_progress()).await
    }

    /// The layer's own progress.
    pub fn layer_progress(&self) -> &LayerProgress {
        &self.progress.layers()[self.layer.index]
    }
}

/// Runs layers.
#[async_trait::async_trait]
pub trait Executor: Send + Sync {
    /// How many layers of one image are handed over at once.
    fn at_once(&self) -> usize;

    /// Whether layers have to be handed over by index, whatever order their output would like.
    fn by_index(&self) -> bool {
        false
    }

    /// Whether a layer may be lost on its way and come again from its first byte, whatever its filters: where workers may be lost.
    fn may_begin_anew(&self) -> bool {
        false
    }

    /// Called when all layers are done: the final config, from an executor whose layers pass their filters elsewhere.
    async fn final_config(&self) -> Result<Option<Bytes>, Error> {
        Ok(None)
    }

    /// Brings a layer to its destination. A caller that drops the future wants the work to stop.
    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error>;
}

impl std::fmt::Debug for dyn Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "an executor of {} layers at once", self.at_once())
    }
}

/// Runs layers in this process, so many at once.
#[derive(Clone, Copy, Debug)]
pub struct LocalExecutor {
    parallel: usize,
}

impl LocalExecutor {
    /// At most `parallel` layers at once, and at least one.
    pub fn new(parallel: usize) -> Arc<Self> {
        Arc::new(Self { parallel: parallel.max(1) })
    }
}

#[async_trait::async_trait]
impl Executor for LocalExecutor {
    fn at_once(&self) -> usize {
        self.parallel
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        task.run().await
    }
}
