//! The executor of a coordinator: each layer waits for a worker's slot, then runs.

use std::sync::Arc;

use occy_pipeline::element::{Layer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::executor::{Executor, LayerTask};

use crate::error::ServiceError;
use crate::fleet::FleetQueue;

/// Hears what becomes of the layers of one image.
#[async_trait::async_trait]
pub trait LayerWatcher: Send + Sync {
    /// A worker has the layer.
    async fn begun(&self, layer: &Layer, worker: &str) -> Result<(), ServiceError> {
        let _ = (layer, worker);
        Ok(())
    }

    /// The layer is at its destination.
    async fn done(&self, layer: &Layer, written: &WrittenLayer) -> Result<(), ServiceError>;
}

/// Runs the layers of one image on the workers of a fleet.
pub struct FleetExecutor {
    queue: FleetQueue,
    at_once: usize,
    watcher: Arc<dyn LayerWatcher>,
}

impl FleetExecutor {
    /// At most `at_once` of the layers wait for a worker or have one at the same time.
    pub fn new(queue: FleetQueue, at_once: usize, watcher: Arc<dyn LayerWatcher>) -> Arc<Self> {
        Arc::new(Self { queue, at_once, watcher })
    }
}

#[async_trait::async_trait]
impl Executor for FleetExecutor {
    fn at_once(&self) -> usize {
        self.at_once
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        let lease = self.queue.lease(task.layer.blob.size()).await;
        self.watcher.begun(&task.layer, lease.worker()).await?;
        let written = task.run().await?;
        drop(lease);
        self.watcher.done(&task.layer, &written).await?;
        Ok(written)
    }
}
