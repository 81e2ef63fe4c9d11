//! The worker at work: connects, registers, runs what it is given, and comes back when the connection is lost.
//!
//! Tasks outlive a connection: the worker comes back with their attempts, and is told which of them count still. A coordinator that has
//! not heard of it for the lease has given them to others, and so they end here by then, too. A worker that was stopped for a while, or
//! cut off, cannot be in anybody's way.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join_all, try_join_all};
use occy_pipeline::filter::{ENCODER_VERSION, FILTERS};
use occy_pipeline::output::OUTPUTS;
use occy_pipeline::progress::Progress;
use occy_pipeline::registry::{Budget, Client, Options, Traffic};
use occy_proto::v1::blob_service_client::BlobServiceClient;
use occy_proto::v1::connect_request::Message as Said;
use occy_proto::v1::connect_response::Message as Told;
use occy_proto::v1::task_result::Outcome;
use occy_proto::v1::worker_service_client::WorkerServiceClient;
use occy_proto::v1::{
    Compression, ConnectRequest, ConnectResponse, Draining, FilterCapability, Heartbeat, Register, Task,
    TaskError, TaskFault, TaskProgress, TaskResult, Welcome,
};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status, Streaming};
use tracing::Instrument as _;

use crate::access::Desk;
use crate::budget::Leases;
use crate::settings::Settings;
use crate::task::Bench;
use crate::uploads::Uploads;
use crate::{connect, metrics, telemetry};

/// The largest message, in bytes, in either direction.
pub const MESSAGE_MAX: usize = 1024 * 1024;
/// How often the coordinator hears how far tasks are.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long the coordinator may take to say welcome.
const WELCOME: Duration = Duration::from_secs(15);
/// How long the last words of a worker that goes may take to arrive, and before them the last pieces of uploads.
const GOODBYE: Duration = Duration::from_secs(5);
/// The waits between attempts to connect: from about so long to about so long.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Messages that wait for the connection.
const OUTGOING: usize = 16;
/// So many uploads are told in one heartbeat, which has to fit into a message; the others in the next.
const UPLOADS_MAX: usize = 128;

/// Works for all its coordinators until `stop`, and then until the tasks that it has are done or handed back. `registered` hears its
/// name each time that a coordinator has welcomed it.
pub async fn work(
    settings: &Settings,
    stop: impl Future<Output = ()>,
    registered: impl Fn(&str),
) -> anyhow::Result<()> {
    let traffic = Traffic::default();
    let listener = metrics::listen(settings.telemetry.metrics_listen).await?;
    let registries = Client::new(Options {
        upload_chunk: usize::try_from(settings.upload_chunk)?,
        resumable_from: settings.resumable_from,
        ..settings.registry.options(&traffic)
    })?;
    let register = register(settings);
    let slots = Arc::new(Semaphore::new(register.slots as usize));
    let mut workers = Vec::new();
    for url in &settings.coordinator {
        let endpoint = connect::endpoint(url, settings).await?;
        // Of its own, whose first call connects it.
        let blobs = BlobServiceClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        let budget = Leases::default();
        workers.push(Worker {
            bench: Bench {
                registries: registries.budgeted_by(&leases(&budget), None),
                budget: leases(&budget),
                blobs,
                spools: settings.spool.directory(),
                slots: Arc::clone(&slots),
            },
            budget,
            register: register.clone(),
            endpoint,
            token_file: settings.token_file.clone(),
            patience: Duration::from_secs(settings.drain_timeout),
        });
    }
    let (stopping, is_stopping) = watch::channel(false);
    let working = try_join_all(workers.iter().map(|worker| worker.work(is_stopping.clone(), &registered)));
    let working = async {
        let mut working = std::pin::pin!(working);
        tokio::select! {
            result = &mut working => return result,
            () = stop => {}
        }
        stopping.send_replace(true);
        working.await
    };
    tokio::select! {
        result = working => result.map(drop),
        result = metrics::serve(listener, metrics::registry(traffic)) => result,
    }
}

fn leases(budget: &Leases) -> Arc<dyn Budget> {
    Arc::new(budget.clone())
}

/// The filters that there are in this program.
pub fn filters() -> Vec<FilterCapability> {
    let filters = FILTERS.iter().map(|filter| FilterCapability {
        name: filter.name.to_owned(),
        about: filter.help.to_owned(),
        options: filter.keys.iter().map(|key| key.names[0].to_owned()).collect(),
        // That of all of them is the encoder's.
        version: String::new(),
    });
    filters.collect()
}

fn register(settings: &Settings) -> Register {
    let offers =
        |chosen: &[String], name: &str| chosen.is_empty() || chosen.iter().any(|chosen| chosen == name);
    let filters = filters().into_iter().filter(|filter| offers(&settings.filters, &filter.name));
    let outputs =
        OUTPUTS.iter().map(|output| output.scheme).filter(|scheme| offers(&settings.outputs, scheme));
    let cores = || std::thread::available_parallelism().map_or(2, usize::from);
    Register {
        name: settings.name.clone().unwrap_or_else(host_name),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        encoder_version: ENCODER_VERSION.to_string(),
        filters: filters.collect(),
        outputs: outputs.map(str::to_owned).collect(),
        codecs: vec![Compression::Gzip.into(), Compression::Zstd.into()],
        asks_for_access: true,
        attempts: Vec::new(),
        slots: settings.slots.map_or_else(|| u32::try_from(cores()).unwrap_or(1), u32::from),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "worker".to_owned(),
        name => name.to_owned(),
    }
}

/// The worker of one coordinator. Those of several share their slots.
struct Worker {
    bench: Bench,
    budget: Leases,
    register: Register,
    endpoint: Endpoint,
    token_file: Option<PathBuf>,
    /// How long tasks may take to come to their end when the worker is stopped.
    patience: Duration,
}

/// Why a connection ended before the worker wanted it to.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("cannot connect: {}", cause(.0))]
    Connect(#[source] tonic::transport::Error),
    #[error("{}", .0.message())]
    Status(#[from] Box<Status>),
    #[error("{0:#}")]
    Token(anyhow::Error),
    #[error("it ended the connection")]
    Ended,
    #[error("it says nothing")]
    Silent,
}

/// The innermost reason: tonic's own words are "transport error".
fn cause(error: &tonic::transport::Error) -> String {
    let mut error: &dyn std::error::Error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

impl From<Status> for Lost {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl Worker {
    async fn work(
        &self,
        mut stopping: watch::Receiver<bool>,
        registered: &impl Fn(&str),
    ) -> anyhow::Result<()> {
        let mut wait = BACKOFF.0;
        let mut session = Session::default();
        // One that is being stopped does not come back: its tasks are others' when the lease has run out.
        while !*stopping.borrow() {
            let mut welcomed = false;
            let mut heard = |name: &str| {
                welcomed = true;
                registered(name);
            };
            let lost = match self.connection(&mut session, &mut stopping, &mut heard).await {
                Ok(()) => return Ok(()),
                Err(Lost::Status(status)) if is_final(&status) => {
                    return Err(anyhow::anyhow!("{}", status.message())).with_context(|| {
                        format!("the coordinator {} refuses this worker", self.endpoint.uri())
                    });
                }
                Err(lost) => lost,
            };
            if welcomed {
                wait = BACKOFF.0;
            }
            // Workers that lost the same coordinator come back one by one.
            let jittered = wait.mul_f64(0.5 + fastrand::f64());
            tracing::warn!(coordinator = %self.endpoint.uri(), "{lost}; connecting again in {jittered:.1?}");
            wait = (wait * 2).min(BACKOFF.1);
            session.disconnect();
            let expiry = session.expiry;
            tokio::select! {
                () = tokio::time::sleep(jittered) => {}
                _ = stopping.wait_for(|&stopping| stopping) => {}
                () = until(expiry) => session.give_up(),
            }
        }
        Ok(())
    }

    /// Connects and registers, as one that has these attempts.
    async fn open(
        &self,
        attempts: Vec<String>,
    ) -> Result<(Outgoing, Streaming<ConnectResponse>, Welcome), Lost> {
        let channel = self.endpoint.connect().await.map_err(Lost::Connect)?;
        let mut client = WorkerServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        let said = Outgoing(outgoing);
        said.send(Said::Register(Register { attempts, ..self.register.clone() })).await?;
        let mut request = Request::new(ReceiverStream::new(requests));
        if let Some(path) = &self.token_file {
            let token = connect::token(path).await.map_err(Lost::Token)?;
            request.metadata_mut().insert("authorization", token);
        }
        let answers = timeout(WELCOME, client.connect(request));
        let mut answers = answers.await.map_err(|_| Lost::Silent)??.into_inner();
        let first = timeout(WELCOME, answers.message()).await.map_err(|_| Lost::Silent)??;
        match first.ok_or(Lost::Ended)?.message {
            Some(Told::Welcome(welcome)) => Ok((said, answers, welcome)),
            _ => Err(Lost::Silent),
        }
    }

    /// One connection, until the worker is stopped and has drained. Its tasks outlive whatever else ends it.
    async fn connection(
        &self,
        session: &mut Session,
        stopping: &mut watch::Receiver<bool>,
        registered: &mut impl FnMut(&str),
    ) -> Result<(), Lost> {
        let (said, mut answers, welcome) = tokio::select! {
            opened = self.open(session.tasks.attempts()) => opened?,
            _ = stopping.wait_for(|&stopping| stopping) => return Ok(()),
        };
        tracing::info!(coordinator = %self.endpoint.uri(), name = welcome.worker_id, "registered");
        registered(&welcome.worker_id);
        let every = welcome.heartbeat_interval.and_then(|every| Duration::try_from(every).ok());
        let every = every.filter(|every| !every.is_zero()).unwrap_or(PROGRESS_EVERY);
        let (mut beat, mut told_progress) = (ticks(every), ticks(PROGRESS_EVERY.min(every)));
        session.lease = welcome.lease.and_then(|lease| Duration::try_from(lease).ok());
        session.expiry = None;
        session.tasks.keep(&welcome.attempts);
        session.tasks.resumes_uploads = welcome.resumes_uploads;
        session.desk.connect(&said.0).await;
        // Before the first heartbeat: what the coordinator does not hear of by then is not leased any more.
        self.budget.connect(welcome.leases_budgets);
        for used in self.budget.uses() {
            said.send(Said::Budget(used)).await?;
        }
        session.tasks.running.values().for_each(|running| running.uploads.tell_again());
        for result in session.tasks.results() {
            said.send(Said::Result(result)).await?;
        }
        let Session { tasks, desk, until, .. } = session;
        let keeps_results = welcome.lease.is_some();
        let mut is_told = false;
        let uploads_changed = Arc::clone(&tasks.uploads_changed);
        // When the time is up, until uploads can be left to whoever goes on with them.
        let mut pausing: Option<BoxFuture<'static, ()>> = None;
        while until.is_none() || tasks.is_wanted_until(*until) {
            tokio::select! {
                // Whichever branch is lost is there again in the next round: none takes anything before it is ready.
                answer = answers.message() => match answer?.ok_or(Lost::Ended)?.message {
                    Some(Told::Task(task)) => tasks.start(&self.bench, task, desk),
                    Some(Told::Access(answer)) => desk.answer(answer),
                    Some(Told::Cancel(cancel)) => tasks.cancel(&cancel.attempt, Wanted::Nowhere),
                    Some(Told::Taken(taken)) => tasks.forget(&taken.attempt),
                    Some(Told::Budget(lease)) => self.budget.lease(&lease),
                    Some(Told::Drain(_)) => tracing::info!("the coordinator is being stopped"),
                    Some(Told::Welcome(_)) | None => {}
                },
                Some(result) = tasks.ended() => if let Some(result) = result {
                    if keeps_results {
                        tasks.remember(result.clone());
                    }
                    said.send(Said::Result(result)).await?;
                },
                () = self.budget.changed() => for used in self.budget.uses() {
                    said.send(Said::Budget(used)).await?;
                },
                _ = beat.tick() => said.send(Said::Heartbeat(tasks.heartbeat())).await?,
                _ = told_progress.tick(), if !tasks.is_empty() => said.send(Said::Heartbeat(tasks.heartbeat())).await?,
                () = uploads_changed.notified() => said.send(Said::Heartbeat(tasks.heartbeat())).await?,
                _ = stopping.wait_for(|&stopping| stopping), if !is_told => {
                    tracing::info!(tasks = tasks.running.len(), "stopping: tasks come to their end");
                    said.send(Said::Draining(Draining {})).await?;
                    is_told = true;
                    until.get_or_insert_with(|| Instant::now() + self.patience);
                },
                () = self::until(*until), if until.is_some() && pausing.is_none() => pausing = Some(tasks.pause()),
                () = async { pausing.as_mut().expect("checked").await }, if pausing.is_some() => {
                    pausing = None;
                    said.send(Said::Heartbeat(tasks.heartbeat())).await?;
                    for attempt in tasks.abort() {
                        said.send(Said::Result(handed_back(attempt))).await?;
                    }
                }
            }
        }
        desk.disconnect();
        drop(said);
        // The coordinator ends its side when it has read everything.
        let read = async { while let Ok(Some(_)) = answers.message().await {} };
        // In time or not: a task whose result is lost is begun again elsewhere.
        let _ = timeout(GOODBYE, read).await;
        Ok(())
    }
}

/// Whether the coordinator will never take this worker.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument | Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated
    )
}

fn ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// What the worker says.
struct Outgoing(mpsc::Sender<ConnectRequest>);

impl Outgoing {
    async fn send(&self, message: Said) -> Result<(), Lost> {
        let message = ConnectRequest { message: Some(message) };
        self.0.send(message).await.map_err(|_| Lost::Ended)
    }
}

/// Waits until then; for ever, where it is not said.
async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// What outlives a connection.
#[derive(Default)]
struct Session {
    tasks: Tasks,
    desk: Desk,
    /// How long the coordinator keeps the tasks of a worker that it does not hear of. None: not at all.
    lease: Option<Duration>,
    /// When it has given them to others. None while there is a connection.
    expiry: Option<Instant>,
    /// How long tasks may go on. Set when the worker is being stopped.
    until: Option<Instant>,
}

impl Session {
    /// The connection is lost.
    fn disconnect(&mut self) {
        self.desk.disconnect();
        match self.lease {
            Some(lease) => self.expiry = Some(self.expiry.unwrap_or_else(|| Instant::now() + lease)),
            None => self.give_up(),
        }
    }

    /// The tasks are others' now.
    fn give_up(&mut self) {
        self.expiry = None;
        self.lease = None;
        self.tasks = Tasks::default();
    }
}

/// The tasks that a coordinator has given, which end with the value.
#[derive(Default)]
struct Tasks {
    set: JoinSet<TaskResult>,
    running: HashMap<Id, Running>,
    /// Results of which nobody has said that they were taken, by their attempts.
    untaken: HashMap<String, TaskResult>,
    /// Woken when there is something to tell of a task's upload.
    uploads_changed: Arc<Notify>,
    /// Whether the coordinator passes on how far they are.
    resumes_uploads: bool,
}

/// Who wants a layer that is not to be worked on here any more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Nobody, as far as is known.
    Nowhere,
    /// Another worker may have it, and go on with its upload.
    Elsewhere,
}

struct Running {
    attempt: String,
    progress: Progress,
    uploads: Uploads,
    handle: AbortHandle,
}

impl Tasks {
    fn is_empty(&self) -> bool {
        self.running.is_empty() && self.untaken.is_empty()
    }

    /// Whether there is something to wait for. Results that were sent are not waited for any longer than tasks are.
    fn is_wanted_until(&self, until: Option<Instant>) -> bool {
        !self.running.is_empty()
            || (!self.untaken.is_empty() && until.is_none_or(|until| Instant::now() < until))
    }

    /// All of which the coordinator may not know the end.
    fn attempts(&self) -> Vec<String> {
        let running = self.running.values().map(|running| &running.attempt);
        running.chain(self.untaken.keys()).cloned().collect()
    }

    /// Ends all but these.
    fn keep(&mut self, attempts: &[String]) {
        for attempt in self.attempts().iter().filter(|attempt| !attempts.contains(attempt)) {
            self.cancel(attempt, Wanted::Elsewhere);
            self.forget(attempt);
        }
    }

    /// Keeps a result until it was taken.
    fn remember(&mut self, result: TaskResult) {
        self.untaken.insert(result.attempt.clone(), result);
    }

    fn forget(&mut self, attempt: &str) {
        self.untaken.remove(attempt);
    }

    fn results(&self) -> Vec<TaskResult> {
        self.untaken.values().cloned().collect()
    }

    fn start(&mut self, bench: &Bench, task: Task, desk: &Desk) {
        if self.attempts().contains(&task.attempt) {
            // Told twice, where it could have been lost.
            return;
        }
        tracing::info!(job = task.job_id, layer = task.layer_index, "task begins");
        let (bench, progress, attempt) = (bench.clone(), Progress::default(), task.attempt.clone());
        let (shared, desk) = (progress.clone(), desk.clone());
        let uploads = Uploads::of(&task, &self.uploads_changed, self.resumes_uploads);
        let recorded = uploads.clone();
        let span = tracing::info_span!("task", job = task.job_id, layer = task.layer_index);
        telemetry::go_on(&span, &task.traceparent);
        let handle =
            self.set.spawn(async move { bench.run(task, shared, &desk, &recorded).await }.instrument(span));
        self.running.insert(handle.id(), Running { attempt, progress, uploads, handle });
    }

    fn cancel(&mut self, attempt: &str, wanted: Wanted) {
        // Its end is nobody's business any more.
        self.running.retain(|_, running| {
            let is_meant = running.attempt == attempt;
            if is_meant {
                if wanted == Wanted::Nowhere {
                    running.uploads.give_up();
                }
                running.handle.abort();
            }
            !is_meant
        });
    }

    /// Lets uploads come to the end of the piece that is on its way, if that is soon.
    fn pause(&self) -> BoxFuture<'static, ()> {
        let uploads: Vec<_> = self.running.values().map(|running| running.uploads.clone()).collect();
        let pause = async move {
            // In time or not: where a piece is cut, some registries begin anew.
            let _ = timeout(GOODBYE, join_all(uploads.iter().map(Uploads::pause))).await;
        };
        pause.boxed()
    }

    /// Ends all of them, and gives their attempts.
    fn abort(&mut self) -> Vec<String> {
        self.set.abort_all();
        self.running.drain().map(|(_, running)| running.attempt).collect()
    }

    /// Waits until a task has ended, and gives its result unless it was cancelled. Pending while there are none.
    ///
    /// # Cancel safety
    /// Cancelled before it returns, it has taken nothing.
    async fn ended(&mut self) -> Option<Option<TaskResult>> {
        let (id, result) = match self.set.join_next_with_id().await? {
            Ok((id, result)) => (id, Ok(result)),
            Err(error) => (error.id(), Err(error)),
        };
        let Some(Running { attempt, .. }) = self.running.remove(&id) else { return Some(None) };
        Some(Some(result.unwrap_or_else(|error| {
            tracing::error!(%error, "a task panicked");
            failed(attempt, TaskFault::Worker, "its part of the worker panicked")
        })))
    }

    /// How far they are. What it says of their uploads counts as told.
    fn heartbeat(&self) -> Heartbeat {
        let mut room = UPLOADS_MAX;
        let progress = |running: &Running| {
            let upload = if room > 0 { running.uploads.untold() } else { None };
            room -= usize::from(upload.is_some());
            if room == 0 {
                self.uploads_changed.notify_one();
            }
            TaskProgress {
                attempt: running.attempt.clone(),
                bytes: running.progress.layers().first().map_or(0, |layer| layer.bytes.get()),
                upload,
            }
        };
        Heartbeat { tasks: self.running.values().map(progress).collect() }
    }
}

fn handed_back(attempt: String) -> TaskResult {
    failed(attempt, TaskFault::HandedBack, "the worker was stopped")
}

fn failed(attempt: String, fault: TaskFault, message: &str) -> TaskResult {
    let error = TaskError { fault: fault.into(), message: message.to_owned(), ..TaskError::default() };
    TaskResult { attempt, outcome: Some(Outcome::Error(error)) }
}
