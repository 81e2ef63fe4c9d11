//! The executor of a coordinator: each layer waits for a worker's slot, then runs; unless somebody else brings it there.

use std::sync::Arc;
use std::time::Duration;

use occy_pipeline::element::{Layer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::executor::{Executor, LayerTask};
use occy_pipeline::filter::FilterChain;
use tokio::time::Instant;
use tracing::Instrument as _;

use crate::error::ServiceError;
use crate::fleet::{FleetQueue, Lease};
use crate::share::Turn;
use crate::worker::attempt::Failure;
use crate::worker::upload::Upload;

/// How often it is looked whether a worker waits for a registry's patience.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Hears what becomes of the layers of one image.
#[async_trait::async_trait]
pub trait LayerWatcher: Send + Sync {
    /// A worker has the layer.
    async fn begun(&self, layer: &Layer, worker: &str) -> Result<(), ServiceError> {
        let _ = (layer, worker);
        Ok(())
    }

    /// The layer waits, for that reason.
    async fn waiting(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        let _ = (layer, reason);
        Ok(())
    }

    /// The worker that has the layer waits, for that reason; empty when that is over.
    async fn held(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        let _ = (layer, reason);
        Ok(())
    }

    /// The layer has passed these filters and is at its destination.
    async fn done(
        &self,
        layer: &Layer,
        chain: &FilterChain,
        written: &WrittenLayer,
    ) -> Result<(), ServiceError>;
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

    fn may_begin_anew(&self) -> bool {
        self.queue.has_connected_workers()
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        let (index, layer) = (task.layer.index, task.layer.label());
        let span = tracing::info_span!("layer", index, layer);
        self.attempts(&task).instrument(span).await
    }
}

impl FleetExecutor {
    /// Runs the layer on one worker after the other, as often as that may help.
    async fn attempts(&self, task: &LayerTask) -> Result<WrittenLayer, Error> {
        let lease = || async { self.lease(&task.layer).await.map_err(Error::from) };
        let (mut lease, leader) = match self.queue.turn(task, lease).await? {
            Turn::Lead(lease, leader) => (lease, leader),
            Turn::Taken(written) => {
                self.watcher.done(&task.layer, &task.plan.chain, &written).await?;
                return Ok(written);
            }
        };
        let (mut reasons, upload) = (Vec::new(), Upload::default());
        loop {
            task.layer_progress().set_worker(lease.worker());
            self.watcher.begun(&task.layer, lease.worker()).await?;
            let span = tracing::info_span!("attempt", worker = lease.worker());
            match self.run_on(&lease, task, &upload).instrument(span).await? {
                Ok(written) => {
                    drop(lease);
                    leader.done(&written).await;
                    self.watcher.done(&task.layer, &task.plan.chain, &written).await?;
                    return Ok(written);
                }
                Err(Failure::Task(error)) => return Err(error),
                // It gets no more layers, so that this ends.
                Err(Failure::HandedBack) => drop(lease),
                Err(Failure::Worker(reason)) => {
                    tracing::warn!(
                        layer = task.layer.label(),
                        worker = lease.worker(),
                        reason,
                        "an attempt failed"
                    );
                    reasons.push(format!("{}: {reason}", lease.worker()));
                    if reasons.len() >= self.queue.patience().attempts {
                        return Err(ServiceError::Attempts { reasons }.into());
                    }
                    let told = format!("attempt {} failed: {}", reasons.len(), reasons[reasons.len() - 1]);
                    drop(lease);
                    self.watcher.waiting(&task.layer, &told).await?;
                }
            }
            lease = self.lease(&task.layer).await?;
        }
    }

    /// Runs the layer on a worker, and says why where that has to wait for a registry's patience.
    async fn run_on(
        &self,
        lease: &Lease,
        task: &LayerTask,
        upload: &Upload,
    ) -> Result<Result<WrittenLayer, Failure>, ServiceError> {
        let mut work = std::pin::pin!(lease.run(task, self.queue.origin(), upload));
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut is_held = false;
        loop {
            tokio::select! {
                result = &mut work => return Ok(result),
                // It only looks.
                _ = look.tick() => {
                    let reason = lease.waits(task);
                    if reason.is_some() != is_held {
                        is_held = reason.is_some();
                        self.watcher.held(&task.layer, &reason.unwrap_or_default()).await?;
                    }
                }
            }
        }
    }

    /// Waits for a worker, and says why where no worker that is there offers what the layer needs. Where none has the versions of filters any
    /// more by which the layers before were made, all of them have to be made again by others.
    async fn lease(&self, layer: &Layer) -> Result<Lease, ServiceError> {
        let lease = self.queue.lease(layer.blob.size());
        let mut lease = std::pin::pin!(lease);
        let after = self.queue.patience().unoffered;
        let mut members = self.queue.members();
        // What nobody offers, and since when.
        let mut unoffered: Option<(String, Instant)> = None;
        loop {
            if self.queue.is_outdated() {
                return Err(ServiceError::VersionsGone);
            }
            unoffered = match (self.queue.missing(), unoffered) {
                (None, None) => None,
                (None, Some(_)) => {
                    self.watcher.waiting(layer, "").await?;
                    None
                }
                (Some(missing), before) => {
                    if before.as_ref().is_none_or(|(told, _)| *told != missing) {
                        self.watcher.waiting(layer, &missing).await?;
                    }
                    Some((missing, before.map_or_else(Instant::now, |(_, since)| since)))
                }
            };
            let until = unoffered.as_ref().map(|(_, since)| *since + after);
            let too_late = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                lease = &mut lease => return Ok(lease),
                () = too_late => {
                    let missing = unoffered.map(|(missing, _)| missing).unwrap_or_default();
                    return Err(ServiceError::Unoffered { missing, after });
                }
                // The fleet, which is ours, holds the other end.
                _ = members.changed() => {}
            }
        }
    }
}
