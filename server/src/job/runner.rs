//! Who runs jobs: so many at once, the oldest first; those that an earlier coordinator left behind before all others.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use occy_pipeline::open;
use occy_pipeline::output::ImageOutput;
use occy_pipeline::process::process;
use occy_pipeline::wire::convert;
use occy_proto::v1::{Job, JobState, PipelineSpec};
use occy_worker::telemetry;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tracing::Instrument as _;

use super::output::{Attempt, JobOutput, JobWatcher};
use super::state::Change;
use super::store::{Applied, Store, Submitted};
use super::watch::{LiveJob, LiveJobs};
use crate::admit::{Ends, Gate};
use crate::error::ServiceError;
use crate::executor::FleetExecutor;
use crate::fleet::{Fleet, Origin};

/// Bytes of what filters print or append that one job may leave.
const FOUND_MAX: usize = 64 * 1024 * 1024;

/// The jobs of a coordinator. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Jobs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    live: LiveJobs,
    gate: Arc<Gate>,
    fleet: Fleet,
    turns: Semaphore,
    tasks: Mutex<HashMap<String, AbortHandle>>,
    finalizing: Arc<AtomicUsize>,
}

impl Jobs {
    /// Runs at most `at_once` jobs at once.
    pub fn new(store: Store, gate: Arc<Gate>, fleet: Fleet, at_once: usize) -> Self {
        Self(Arc::new(Inner {
            store,
            live: LiveJobs::default(),
            gate,
            fleet,
            turns: Semaphore::new(at_once),
            tasks: Mutex::default(),
            finalizing: Arc::default(),
        }))
    }

    /// What is known of them.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// Those who wait for their events.
    pub fn live(&self) -> &LiveJobs {
        &self.0.live
    }

    /// Goes on with the jobs that have not ended.
    pub async fn resume(&self) -> Result<usize, ServiceError> {
        let store = self.0.store.clone();
        let ids = tokio::task::spawn_blocking(move || store.active());
        let ids = ids.await.map_err(|error| ServiceError::Panicked(error.to_string()))??;
        for id in &ids {
            // One that was only queued refuses to be queued again, and that is right.
            self.0.store.apply(id, vec![Change::Requeue], None).await?;
            self.start(id);
        }
        Ok(ids.len())
    }

    /// Accepts a job, and runs it when its turn comes.
    pub async fn submit(&self, spec: PipelineSpec, key: String) -> Result<Job, ServiceError> {
        let work = self.0.gate.admit(&spec, Ends::BothNamed)?;
        // What is written wrongly is said now, to the one who wrote it.
        open::source(&work.source, &work.settings)?;
        open::output(&work.destination, &work.settings)?;
        match self.0.store.submit(spec, key.clone(), telemetry::traceparent()).await? {
            Submitted::New(job) => {
                self.start(&job.id);
                Ok(job)
            }
            Submitted::Earlier(job) => Ok(job),
            Submitted::KeyReused => Err(ServiceError::KeyReused(key)),
            Submitted::Full => Err(ServiceError::TooMany {
                what: "jobs that have not ended",
                limit: self.0.store.limits().active,
            }),
        }
    }

    /// Cancels a job that can be cancelled, and gives what it is then.
    pub async fn cancel(&self, id: &str) -> Result<Job, ServiceError> {
        match self.0.store.apply(id, vec![Change::Cancel], None).await? {
            Applied::Done(job) => {
                self.0.fleet.metrics().job_changed(&job);
                self.0.live.wake(id, job.last_sequence);
                if let Some(task) = self.0.tasks().remove(id) {
                    task.abort();
                }
                self.0.live.remove(id);
                Ok(job)
            }
            Applied::Refused(job) => Ok(job),
            Applied::Missing => Err(ServiceError::NoSuchJob(id.to_owned())),
        }
    }

    /// Lets the layers that workers have come to their end, and images become visible, for so long at most; then stops. What is
    /// left is for a later coordinator.
    pub async fn drain(&self, patience: Duration) {
        self.0.fleet.drain();
        let settled = async {
            let mut running = self.0.fleet.running();
            loop {
                if running.wait_for(|&running| running == 0).await.is_err() {
                    return;
                }
                // Between its last layer and its end a job has no layer, so it is given a moment to begin that end.
                tokio::time::sleep(Duration::from_millis(50)).await;
                if *running.borrow() == 0 && self.0.finalizing.load(Ordering::Relaxed) == 0 {
                    return;
                }
            }
        };
        if tokio::time::timeout(patience, settled).await.is_err() {
            tracing::warn!(
                "layers are still running after {patience:?}; a later coordinator begins them again"
            );
        }
        for (_, task) in self.0.tasks().drain() {
            task.abort();
        }
    }

    fn start(&self, id: &str) {
        let live = self.0.live.insert(id);
        let (jobs, owned) = (self.clone(), id.to_owned());
        // Under the lock, so that the task cannot end before it is known.
        let mut tasks = self.0.tasks();
        let task = tokio::spawn(async move { jobs.run(owned, live).await });
        tasks.insert(id.to_owned(), task.abort_handle());
    }

    async fn run(&self, id: String, live: LiveJob) {
        let attempt = Attempt {
            id: id.clone(),
            store: self.0.store.clone(),
            live: self.0.live.clone(),
            metrics: self.0.fleet.metrics().clone(),
            finalizing: Arc::clone(&self.0.finalizing),
        };
        let span = tracing::info_span!("job", id);
        if let Ok(Some(trace)) = self.0.store.trace(&id).await {
            telemetry::go_on(&span, &trace);
        }
        let work = self.attempt(&attempt, &live).instrument(span);
        let result = AssertUnwindSafe(work).catch_unwind().await;
        let result = result.unwrap_or_else(|_| Err(ServiceError::Panicked("see its log".to_owned())));
        if let Err(error) = result
            && !matches!(error, ServiceError::JobEnded)
        {
            tracing::info!(job = id, %error, "job failed");
            if let Err(error) = attempt.apply(vec![Change::Fail(error.job_error())], None).await
                && !matches!(error, ServiceError::JobEnded)
            {
                // The job stays as it is in the store, and is begun again by the next coordinator.
                tracing::error!(job = id, %error, "the end of a job could not be written down");
            }
        }
        self.0.tasks().remove(&id);
        self.0.live.remove(&id);
    }

    async fn attempt(&self, attempt: &Attempt, live: &LiveJob) -> Result<(), ServiceError> {
        let _turn = self.0.turns.acquire().await.map_err(|_| ServiceError::Draining)?;
        attempt.apply(vec![Change::Begin], None).await?;
        let job = self.0.store.get(&attempt.id).await?.ok_or(ServiceError::JobEnded)?;
        debug_assert_eq!(job.state(), JobState::Running);
        // Once more: what is allowed may have changed since it was submitted.
        let work = self.0.gate.admit_again(&job.spec.unwrap_or_default())?;
        let source = open::source(&work.source, &work.settings)?;
        let opened = open::output(&work.destination, &work.settings)?;
        let keeps_layers = work.destination.starts_with("registry://");
        let output: Arc<dyn ImageOutput> =
            Arc::new(JobOutput::new(attempt.clone(), opened.end, keeps_layers));
        let at_once = source.max_workers.max(opened.max_workers).unwrap_or(work.settings.parallel);
        let watcher = JobWatcher { attempt: attempt.clone(), chain: work.plan.chain.clone() };
        let queue = self
            .0
            .fleet
            .queue(&"".into(), &work.needs(output.form()), true)
            .of(Origin { job: attempt.id.clone(), ..work.origin() });
        let executor = FleetExecutor::new(queue, at_once, Arc::new(watcher));
        let outcome =
            process(source.end.as_ref(), work.plan.clone(), output, executor, &live.progress).await?;
        let mut changes: Vec<_> =
            convert::filter_outputs(&outcome, &work.plan.chain, work.findings, FOUND_MAX)?
                .map(Change::Found)
                .collect();
        changes.push(Change::Succeed(convert::image_result(&outcome)));
        attempt.apply(changes, None).await
    }
}

impl Inner {
    fn tasks(&self) -> MutexGuard<'_, HashMap<String, AbortHandle>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
