//! Who runs jobs: so many at once, the oldest first; those that an earlier coordinator left behind before all others.
//!
//! A job waits here for its turn, is claimed when it comes, and run as long as the claim holds: whoever else has claimed it meanwhile
//! has it, and whatever this one still does to it changes nothing.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use occy_pipeline::filter::OutputFormat;
use occy_pipeline::open;
use occy_pipeline::output::ImageOutput;
use occy_pipeline::reference::Reference;
use occy_pipeline::source::ImageSource;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::whole::{Wanted, process_whole};
use occy_pipeline::wire::convert;
use occy_proto::v1::{Job, JobState, MirrorSpec, PipelineSpec};
use occy_worker::telemetry;
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;
use tracing::Instrument as _;

use super::mirror;
use super::output::{Attempt, JobOutput, JobWatcher, Places};
use super::state::Change;
use super::watch::{Live, LiveJobs};
use crate::admit::{Ends, Gate};
use crate::client::Client;
use crate::credentials::{Logins, SecretKeys};
use crate::engine::{Applied, Claim, Engine, Submission, Submitted};
use crate::error::ServiceError;
use crate::executor::FleetExecutor;
use crate::fleet::{Fleet, FleetQueue, Origin, Patience};
use crate::schedule::{Capabilities, Standing, Tenant};
use crate::share::elsewhere::Elsewhere;

/// Bytes of what filters print or append that one job may leave.
const FOUND_MAX: usize = 64 * 1024 * 1024;
/// How long an attempt may go on that has lost its claim. Its own end takes the claim away too, and may be heard of in another
/// way before.
const GRACE: Duration = Duration::from_secs(1);

/// How often jobs without an owner are looked for, at least.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What an attempt at a job is made of.
pub(crate) struct Opened {
    /// Where its image comes from.
    pub(crate) source: Box<dyn ImageSource>,
    /// Where it goes.
    pub(crate) output: Arc<dyn ImageOutput>,
    /// Layers at once.
    pub(crate) at_once: usize,
    /// What is done with each.
    pub(crate) plan: Arc<LayerPlan>,
    /// What a worker must offer for that.
    pub(crate) needs: Capabilities,
    /// What workers are told of all of them.
    pub(crate) origin: Origin,
    /// What is wanted besides the image itself.
    pub(crate) wanted: Wanted,
    /// How what filters find is printed.
    pub(crate) findings: OutputFormat,
    /// Whose limits hold for as long as it is there.
    pub(crate) client: Option<Arc<Client>>,
}

/// Who opens the ends of jobs.
#[async_trait::async_trait]
pub(crate) trait Opener: std::fmt::Debug + Send + Sync {
    /// Opens those of a job that was accepted. What is allowed may have changed since.
    async fn open(&self, job: &Job, logins: &Logins) -> Result<Opened, ServiceError>;
}

#[async_trait::async_trait]
impl Opener for Arc<Gate> {
    async fn open(&self, job: &Job, logins: &Logins) -> Result<Opened, ServiceError> {
        let spec = job.spec.clone().unwrap_or_default();
        let work = self.admit_again(&spec, &job.tenant.as_str().into(), logins).await?;
        let source = open::source(&work.source, &work.settings)?;
        let opened = open::output(&work.destination, &work.settings)?;
        let output = opened.end;
        Ok(Opened {
            at_once: source.max_workers.max(opened.max_workers).unwrap_or(work.settings.parallel),
            source: source.end,
            needs: work.needs(output.form()),
            output,
            origin: work.origin(),
            wanted: work.wanted,
            findings: work.findings,
            plan: work.plan,
            client: Some(work.client),
        })
    }
}

/// The jobs of a coordinator. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Jobs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// What this coordinator is called among others, as long as it is there.
    name: String,
    engine: Arc<dyn Engine>,
    live: LiveJobs,
    gate: Arc<Gate>,
    opener: Arc<dyn Opener>,
    /// What credentials of jobs are sealed with. None: there are none.
    keys: Option<SecretKeys>,
    fleet: Fleet,
    /// Places for jobs that run at once, which are given by the rule by which workers are.
    turns: Fleet,
    tasks: Mutex<BTreeMap<String, Task>>,
    finalizing: Arc<AtomicUsize>,
    is_draining: AtomicBool,
    /// Whether a job was left before its end since jobs without an owner were last looked for.
    has_left: AtomicBool,
}

/// A job that is run here, or waits for its turn.
#[derive(Debug)]
struct Task {
    abort: AbortHandle,
    /// Set when its turn has come.
    claim: Arc<OnceLock<Claim>>,
}

impl Jobs {
    /// Runs at most `at_once` jobs at once.
    pub fn new(
        engine: Arc<dyn Engine>,
        gate: Arc<Gate>,
        keys: Option<SecretKeys>,
        fleet: Fleet,
        at_once: usize,
    ) -> Self {
        let opener = Arc::new(Arc::clone(&gate));
        Self::opened_by(engine, gate, opener, keys, fleet, at_once)
    }

    /// The same, where another one opens the ends of those that were accepted.
    pub(crate) fn opened_by(
        engine: Arc<dyn Engine>,
        gate: Arc<Gate>,
        opener: Arc<dyn Opener>,
        keys: Option<SecretKeys>,
        fleet: Fleet,
        at_once: usize,
    ) -> Self {
        Self(Arc::new(Inner {
            name: uuid::Uuid::new_v4().to_string(),
            engine,
            live: LiveJobs::default(),
            gate,
            opener,
            keys,
            fleet,
            turns: Fleet::embedded(at_once, &Capabilities::default(), &[], Patience::default()),
            tasks: Mutex::default(),
            finalizing: Arc::default(),
            is_draining: AtomicBool::new(false),
            has_left: AtomicBool::new(false),
        }))
    }

    /// What is known of them.
    pub fn engine(&self) -> &dyn Engine {
        &*self.0.engine
    }

    /// How far they are.
    pub fn live(&self) -> &LiveJobs {
        &self.0.live
    }

    /// Goes on with the jobs that have not ended and that nobody has.
    pub async fn resume(&self) -> Result<usize, ServiceError> {
        let jobs = self.0.engine.unowned().await?;
        for (id, standing) in &jobs {
            self.start(id, standing);
        }
        Ok(jobs.len())
    }

    /// Takes jobs that nobody has: that this coordinator could not go on with, that others leave behind, or have accepted and not
    /// begun.
    pub async fn keep_looking(&self) -> Infallible {
        let engine = &self.0.engine;
        let mut tick = tokio::time::interval((engine.lease() / 2).min(LOOK_EVERY));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if self.0.is_draining.load(Ordering::Relaxed) {
                return std::future::pending().await;
            }
            let has_left = self.0.has_left.swap(false, Ordering::Relaxed);
            if !has_left && !engine.is_shared() {
                continue;
            }
            if let Err(error) = self.resume().await {
                tracing::warn!(%error, "jobs without an owner could not be found");
                self.0.has_left.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Says that this coordinator is there, and counts those with which it shares what registries take.
    pub async fn keep_counting(&self) -> Infallible {
        let engine = &self.0.engine;
        if !engine.is_shared() {
            return std::future::pending().await;
        }
        let mut tick = tokio::time::interval(engine.lease() / 3);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            match engine.coordinators(&self.0.name).await {
                Ok(coordinators) => self.0.fleet.budgets().share(coordinators.max(1)),
                Err(error) => tracing::warn!(%error, "coordinators could not be counted"),
            }
        }
    }

    /// Accepts a job, and runs it when its turn comes.
    pub async fn submit(
        &self,
        tenant: &Tenant,
        spec: PipelineSpec,
        logins: &Logins,
        key: String,
    ) -> Result<Job, ServiceError> {
        let work = self.0.gate.admit(&spec, Ends::BothNamed, tenant, logins).await?;
        // What is written wrongly is said now, to the one who wrote it.
        open::source(&work.source, &work.settings)?;
        open::output(&work.destination, &work.settings)?;
        self.submit_admitted(tenant, spec, logins, key).await
    }

    /// Accepts a job whose spec was found allowed, and runs it when its turn comes.
    pub async fn submit_admitted(
        &self,
        tenant: &Tenant,
        spec: PipelineSpec,
        logins: &Logins,
        key: String,
    ) -> Result<Job, ServiceError> {
        self.submit_as(uuid::Uuid::now_v7().to_string(), tenant, spec, logins, key).await
    }

    /// The same, with an id that was chosen for it.
    pub(crate) async fn submit_as(
        &self,
        id: String,
        tenant: &Tenant,
        spec: PipelineSpec,
        logins: &Logins,
        key: String,
    ) -> Result<Job, ServiceError> {
        let sealed = self.seal(&id, logins)?;
        let tenant = Arc::clone(tenant);
        self.accept(Submission { id, tenant, spec, key, sealed, trace: telemetry::traceparent() }).await
    }

    /// Seals credentials as those of what has that name, where there are any.
    pub(crate) fn seal(&self, name: &str, logins: &Logins) -> Result<Option<Vec<u8>>, ServiceError> {
        match &self.0.keys {
            _ if logins.is_empty() => Ok(None),
            Some(keys) => Ok(Some(keys.seal(name, logins)?)),
            None => Err(ServiceError::NoSecretKey),
        }
    }

    /// Opens what was sealed, if anything was.
    pub(crate) fn open_sealed(&self, name: &str, sealed: Option<&[u8]>) -> Result<Logins, ServiceError> {
        match (sealed, &self.0.keys) {
            (None, _) => Ok(Logins::default()),
            (Some(sealed), Some(keys)) => Ok(keys.open(name, sealed)?),
            (Some(_), None) => Err(ServiceError::NoSecretKey),
        }
    }

    /// Accepts what was found allowed.
    pub(crate) async fn accept(&self, submission: Submission) -> Result<Job, ServiceError> {
        let limits = self.0.engine.limits();
        let key = submission.key.clone();
        match self.0.engine.submit(submission).await? {
            Submitted::New(job) => {
                self.start(&job.id, &Standing::of(&job));
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
        match self.0.engine.cancel(id).await? {
            Applied::Done(job) => {
                self.0.fleet.metrics().job_changed(&job);
                if let Some(task) = self.0.tasks().remove(id) {
                    task.abort.abort();
                }
                self.0.live.remove(id);
                Ok(job)
            }
            Applied::Refused(job) => Ok(job),
            Applied::Stale | Applied::Missing => Err(ServiceError::NoSuchJob(id.to_owned())),
        }
    }

    /// Lets the layers that workers have come to their end, and images become visible, for so long at most; then stops. What is
    /// left is for a later coordinator.
    pub async fn drain(&self, patience: Duration) {
        self.0.is_draining.store(true, Ordering::Relaxed);
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
        let tasks = std::mem::take(&mut *self.0.tasks());
        for (id, task) in tasks {
            task.abort.abort();
            if let Some(claim) = task.claim.get()
                && let Err(error) = self.0.engine.release(claim).await
            {
                tracing::warn!(job = id, %error, "a job could not be given back; it waits until its lease has run out");
            }
        }
    }

    fn start(&self, id: &str, standing: &Standing) {
        // Under the lock, so that the task cannot end before it is known.
        let mut tasks = self.0.tasks();
        if tasks.contains_key(id) {
            return;
        }
        let live = self.0.live.insert(id);
        // Here, and not in the task: jobs stand in the order in which they came.
        let turn = self.0.turns.queue(standing, &Capabilities::default(), false);
        let (jobs, owned, claim) = (self.clone(), id.to_owned(), Arc::default());
        let known = Arc::clone(&claim);
        let task = tokio::spawn(async move {
            let left = jobs.run(&owned, &live, &turn, &known).await;
            jobs.0.tasks().remove(&owned);
            jobs.0.live.remove(&owned);
            // Not the job's fault: whoever can write it down first goes on with it.
            if let Err(error) = left {
                tracing::warn!(job = owned, %error, "a job is left, and is begun again");
                jobs.0.has_left.store(true, Ordering::Relaxed);
            }
        });
        tasks.insert(id.to_owned(), Task { abort: task.abort_handle(), claim });
    }

    /// Runs a job to its end, or to somebody else's turn; or says why it could not, which has nothing to do with the job.
    async fn run(
        &self,
        id: &str,
        live: &Live,
        turn: &FleetQueue,
        known: &OnceLock<Claim>,
    ) -> Result<(), ServiceError> {
        let _turn = turn.lease(None).await;
        // An attempt is large, and there may be very many jobs that wait.
        Box::pin(self.run_in_turn(id, live, known)).await
    }

    /// The same, once its turn has come.
    async fn run_in_turn(&self, id: &str, live: &Live, known: &OnceLock<Claim>) -> Result<(), ServiceError> {
        if self.0.engine.is_shared() && !self.waits_until_there_is_room(id).await? {
            return Ok(());
        }
        let Some((claim, job)) = self.0.engine.claim(id).await? else {
            // It was cancelled, or is another's.
            return Ok(());
        };
        let claim = known.get_or_init(|| claim);
        let attempt = Attempt {
            claim: claim.clone(),
            engine: Arc::clone(&self.0.engine),
            place: String::new(),
            metrics: self.0.fleet.metrics().clone(),
            finalizing: Arc::clone(&self.0.finalizing),
        };
        let span = tracing::info_span!("job", id);
        if let Ok(Some(trace)) = self.0.engine.trace(id).await {
            telemetry::go_on(&span, &trace);
        }
        tracing::info!(job = id, attempt = job.attempts, "job begins");
        let work = self.attempt(&attempt, job, live).instrument(span);
        let mut work = std::pin::pin!(AssertUnwindSafe(work).catch_unwind());
        let result = tokio::select! {
            biased;
            result = &mut work => result,
            () = lost(&*self.0.engine, claim) => {
                tokio::time::timeout(GRACE, work).await.unwrap_or(Ok(Err(ServiceError::JobEnded)))
            }
        };
        let result = result.unwrap_or_else(|_| Err(ServiceError::Panicked("see its log".to_owned())));
        let ended = match result {
            Err(error) if !matches!(error, ServiceError::JobEnded) && !error.begins_again() => {
                tracing::info!(job = id, %error, "job failed");
                attempt.apply(vec![Change::Fail(error.job_error())], None).await
            }
            Ok(()) => {
                tracing::info!(job = id, "job succeeded");
                return Ok(());
            }
            left => left,
        };
        match ended {
            Ok(()) => Ok(()),
            Err(ServiceError::JobEnded) => {
                tracing::info!(job = id, "the job was ended, or is another coordinator's now");
                Ok(())
            }
            Err(error) => {
                if let Err(error) = self.0.engine.release(claim).await {
                    tracing::debug!(job = id, %error, "a job could not be given back; its owner is found to be gone later");
                }
                Err(error)
            }
        }
    }

    /// Waits until a worker could begin a layer of the job: until then another coordinator, which has one, may take it. False: one has.
    /// A mirror without filters needs no worker.
    async fn waits_until_there_is_room(&self, id: &str) -> Result<bool, ServiceError> {
        let mut changed = self.0.engine.subscribe(id);
        loop {
            let job = self.0.engine.get(id).await?;
            let Some(job) = job.filter(|job| job.state() == JobState::Queued) else { return Ok(false) };
            // What its file says exactly is seen when its turn comes; a word too many costs no more than waiting for a worker.
            let needs_none = |mirror: MirrorSpec| !mirror.config.contains("filters");
            if job.spec.and_then(|spec| spec.mirror).is_some_and(needs_none) {
                return Ok(true);
            }
            tokio::select! {
                biased;
                () = self.0.fleet.room() => return Ok(true),
                // The sender may be gone; it is subscribed to anew then.
                result = changed.changed() => if result.is_err() { changed = self.0.engine.subscribe(id); },
            }
        }
    }

    /// The credentials that a job has brought.
    async fn logins(&self, id: &str) -> Result<Logins, ServiceError> {
        self.open_sealed(id, self.0.engine.sealed(id).await?.as_deref())
    }

    /// A queue for the layers of a job, which other coordinators' jobs share.
    fn queue(
        &self,
        attempt: &Attempt,
        standing: &Standing,
        needs: &Capabilities,
        origin: Origin,
    ) -> FleetQueue {
        let Attempt { engine, claim, .. } = attempt;
        let queue = self.0.fleet.queue(standing, needs, true).of(Origin { job: claim.id.clone(), ..origin });
        let (engine, claim, coordinator) = (Arc::clone(engine), claim.clone(), self.0.name.clone());
        queue.and_elsewhere(Elsewhere { engine, claim, coordinator })
    }

    async fn attempt(&self, attempt: &Attempt, job: Job, live: &Live) -> Result<(), ServiceError> {
        let logins = self.logins(&job.id).await?;
        if let Some(spec) = job.spec.as_ref().and_then(|spec| spec.mirror.as_ref()) {
            let mut work = self.0.gate.admit_mirror(spec, &job.tenant.as_str().into(), &logins).await?;
            if let Some(needs) = work.needs() {
                let queue = self.queue(attempt, &Standing::of(&job), &needs, Origin::default());
                work.ends.executor = Some(mirror::executor(queue, work.ends.parallel));
            }
            return mirror::run(attempt, spec, work, &live.mirror).await;
        }
        let opened = self.0.opener.open(&job, &logins).await?;
        let Opened { source, output, at_once, plan, needs, origin, wanted, findings, client: _client } =
            opened;
        let standing = Standing::of(&job);
        let destination = job.spec.unwrap_or_default().destination;
        let keeps_layers = destination.starts_with("registry://");
        let attempt = &Attempt { place: place(&destination), ..attempt.clone() };
        let queue = self.queue(attempt, &standing, &needs, origin);
        let (places, versions) = (Arc::<Places>::default(), queue.versions());
        let watcher = JobWatcher {
            attempt: attempt.clone(),
            places: Arc::clone(&places),
            versions: Arc::clone(&versions),
        };
        let output = Arc::new(JobOutput::new(attempt.clone(), output, keeps_layers, places, versions));
        let executor = FleetExecutor::new(queue, at_once, Arc::new(watcher));
        let begin = {
            let layers = live.layers.clone();
            Arc::new(move || layers.begin())
        };
        let done = process_whole(source.as_ref(), Arc::clone(&plan), output, executor, wanted, begin).await?;
        let mut found = Vec::new();
        let mut room = FOUND_MAX;
        for outcome in done.filtered() {
            let pieces: Vec<_> = convert::filter_outputs(outcome, &plan.chain, findings, room)?.collect();
            room -= pieces.iter().map(|piece| piece.text.len()).sum::<usize>();
            found.extend(pieces.into_iter().map(Change::Found));
        }
        attempt
            .apply([found, vec![Change::Succeed(Box::new(convert::whole_result(&done)))]].concat(), None)
            .await
    }
}

/// Where an image becomes visible, which one destination may name in several ways.
fn place(destination: &str) -> String {
    let end = destination.split('?').next().unwrap_or_default();
    match end.strip_prefix("registry://").and_then(|name| name.parse::<Reference>().ok()) {
        Some(reference) => place_of(&reference),
        None => end.to_owned(),
    }
}

/// The same, of an image at a registry.
pub(super) fn place_of(reference: &Reference) -> String {
    format!("{} {}", reference.name(), reference.manifest())
}

/// Says that the owner of a job is there, and returns when it is not its owner any more.
async fn lost(engine: &dyn Engine, claim: &Claim) {
    let mut changed = engine.subscribe(&claim.id);
    let mut tick = tokio::time::interval(engine.lease() / 3);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let holds = tokio::select! {
            biased;
            // Losing a branch loses nothing: either asks for what is the case. However often the job changes, the lease is extended.
            _ = tick.tick() => engine.extend(claim).await,
            _ = changed.changed() => engine.holds(claim).await,
        };
        match holds {
            Ok(true) => {}
            Ok(false) => return,
            // What it writes down next will tell.
            Err(error) => tracing::warn!(job = claim.id, %error, "a claim could not be extended"),
        }
    }
}

impl Inner {
    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, Task>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
