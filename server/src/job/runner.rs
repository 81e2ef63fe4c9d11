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
use tokio::task::AbortHandle;
use tracing::Instrument as _;

use super::output::{Attempt, INSISTENCE, JobOutput, JobWatcher};
use super::state::{Change, is_final};
use super::store::{Applied, Store, Submission, Submitted};
use super::watch::{LiveJob, LiveJobs};
use crate::admit::{Ends, Gate};
use crate::credentials::{Logins, SecretKeys};
use crate::error::ServiceError;
use crate::executor::FleetExecutor;
use crate::fleet::{Fleet, FleetQueue, Origin, Patience};
use crate::schedule::{Capabilities, Tenant};

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
    /// What credentials of jobs are sealed with. None: there are none.
    keys: Option<SecretKeys>,
    fleet: Fleet,
    /// Places for jobs that run at once, which are given by the rule by which workers are.
    turns: Fleet,
    tasks: Mutex<HashMap<String, AbortHandle>>,
    finalizing: Arc<AtomicUsize>,
}

impl Jobs {
    /// Runs at most `at_once` jobs at once.
    pub fn new(
        store: Store,
        gate: Arc<Gate>,
        keys: Option<SecretKeys>,
        fleet: Fleet,
        at_once: usize,
    ) -> Self {
        Self(Arc::new(Inner {
            store,
            live: LiveJobs::default(),
            gate,
            keys,
            fleet,
            turns: Fleet::embedded(at_once, &Capabilities::default(), &[], Patience::default()),
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
        let jobs = tokio::task::spawn_blocking(move || store.active());
        let jobs = jobs.await.map_err(|error| ServiceError::Panicked(error.to_string()))??;
        for (id, tenant) in &jobs {
            // One that was only queued refuses to be queued again, and that is right.
            self.0.store.apply(id, vec![Change::Requeue], None).await?;
            self.start(id, tenant);
        }
        Ok(jobs.len())
    }

    /// Accepts a job, and runs it when its turn comes.
    pub async fn submit(
        &self,
        tenant: &Tenant,
        spec: PipelineSpec,
        logins: &Logins,
        key: String,
    ) -> Result<Job, ServiceError> {
        let work = self.0.gate.admit(&spec, Ends::BothNamed, tenant, logins)?;
        // What is written wrongly is said now, to the one who wrote it.
        open::source(&work.source, &work.settings)?;
        open::output(&work.destination, &work.settings)?;
        let id = uuid::Uuid::now_v7().to_string();
        let sealed = match &self.0.keys {
            _ if logins.is_empty() => None,
            Some(keys) => Some(keys.seal(&id, logins)?),
            None => return Err(ServiceError::NoSecretKey),
        };
        let limits = self.0.store.limits();
        let submission = Submission {
            id,
            tenant: Arc::clone(tenant),
            spec,
            key: key.clone(),
            sealed,
            trace: telemetry::traceparent(),
        };
        match self.0.store.submit(submission).await? {
            Submitted::New(job) => {
                self.start(&job.id, tenant);
                Ok(job)
            }
            Submitted::Earlier(job) => Ok(job),
            Submitted::KeyReused => Err(ServiceError::KeyReused(key)),
            Submitted::Full => {
                Err(ServiceError::TooMany { what: "jobs that have not ended", limit: limits.active })
            }
            Submitted::FullForTenant => Err(ServiceError::TooMany {
                what: "jobs of this client that have not ended",
                limit: limits.active_each,
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

    fn start(&self, id: &str, tenant: &Tenant) {
        let live = self.0.live.insert(id);
        // Here, and not in the task: jobs stand in the order in which they came.
        let turn = self.0.turns.queue(tenant, &Capabilities::default(), false);
        let (jobs, owned) = (self.clone(), id.to_owned());
        // Under the lock, so that the task cannot end before it is known.
        let mut tasks = self.0.tasks();
        let task = tokio::spawn(async move { jobs.run(owned, live, turn).await });
        tasks.insert(id.to_owned(), task.abort_handle());
    }

    async fn run(&self, id: String, live: LiveJob, turn: FleetQueue) {
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
        let mut wait = INSISTENCE.0;
        loop {
            let work = self.attempt(&attempt, &live, &turn).instrument(span.clone());
            let result = AssertUnwindSafe(work).catch_unwind().await;
            let result = result.unwrap_or_else(|_| Err(ServiceError::Panicked("see its log".to_owned())));
            match result {
                Ok(()) | Err(ServiceError::JobEnded) => break,
                // Our own disk is no end of a job: it is begun again when its record can be written, as by a later coordinator.
                Err(ServiceError::Store(error)) => {
                    tracing::warn!(job = id, %error, "a job waits until its record can be written");
                    // One that was only queued refuses to be queued again; one whose end is there after all has ended.
                    match attempt.insist(Change::Requeue).await {
                        Applied::Refused(job) if is_final(job.state()) => break,
                        Applied::Missing => break,
                        Applied::Done(_) | Applied::Refused(_) => {}
                    }
                    // There may be room for this and not for more.
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(INSISTENCE.1);
                }
                Err(error) => {
                    tracing::info!(job = id, %error, "job failed");
                    attempt.insist(Change::Fail(error.job_error())).await;
                    break;
                }
            }
        }
        self.0.tasks().remove(&id);
        self.0.live.remove(&id);
    }

    /// The credentials that a job has brought.
    async fn logins(&self, id: &str) -> Result<Logins, ServiceError> {
        match (self.0.store.sealed(id).await?, &self.0.keys) {
            (None, _) => Ok(Logins::default()),
            (Some(sealed), Some(keys)) => Ok(keys.open(id, &sealed)?),
            (Some(_), None) => Err(ServiceError::NoSecretKey),
        }
    }

    async fn attempt(
        &self,
        attempt: &Attempt,
        live: &LiveJob,
        turn: &FleetQueue,
    ) -> Result<(), ServiceError> {
        let _turn = turn.lease(None).await;
        attempt.apply(vec![Change::Begin], None).await?;
        let job = self.0.store.get(&attempt.id).await?.ok_or(ServiceError::JobEnded)?;
        debug_assert_eq!(job.state(), JobState::Running);
        // Once more: what is allowed may have changed since it was submitted.
        let spec = job.spec.unwrap_or_default();
        let logins = self.logins(&attempt.id).await?;
        let work = self.0.gate.admit_again(&spec, &job.tenant.into(), &logins)?;
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
            .queue(&work.client.tenant, &work.needs(output.form()), true)
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
