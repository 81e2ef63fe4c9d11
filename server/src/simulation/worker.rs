//! A worker of a simulation: it speaks `proto/occy/v1/worker.proto`, and its layers take their time and nothing else.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use occy_proto::v1::connect_request::Message as Said;
use occy_proto::v1::connect_response::Message as Told;
use occy_proto::v1::task_result::Outcome;
use occy_proto::v1::{
    ConnectRequest, ConnectResponse, Heartbeat, Register, Task, TaskDone, TaskError, TaskFault, TaskProgress,
    TaskResult,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Coordinators;
use super::ends::Fate;
use super::world::World;

/// How long a layer takes, in milliseconds.
const WORK: (u64, u64) = (50, 4000);
const BACKOFF: (u64, u64) = (200, 3000);

/// What is being worked on, everywhere.
#[derive(Clone, Debug, Default)]
pub(super) struct Runs(Arc<Mutex<Vec<Run>>>);

#[derive(Clone, Debug)]
struct Run {
    number: u64,
    worker: usize,
    coordinator: usize,
    task: Task,
}

/// A worker's process, as others change it.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) number: usize,
    pub(super) slots: usize,
    pub(super) offers: Vec<String>,
    /// Grows when it is killed.
    killed: watch::Sender<u64>,
    /// Until when it is stopped.
    stopped: watch::Sender<Instant>,
    /// Grows when its stream is cut.
    cut: watch::Sender<u64>,
}

impl Process {
    pub(super) fn new(number: usize, slots: usize, offers: Vec<String>) -> Self {
        let stopped = watch::Sender::new(Instant::now());
        Self { number, slots, offers, killed: watch::Sender::new(0), stopped, cut: watch::Sender::new(0) }
    }

    pub(super) fn kill(&self) {
        self.killed.send_modify(|times| *times += 1);
    }

    pub(super) fn stop(&self, time: Duration) {
        self.stopped.send_replace(Instant::now() + time);
    }

    pub(super) fn cut(&self) {
        self.cut.send_modify(|times| *times += 1);
    }

    /// Runs it, again and again.
    pub(super) async fn run(self, world: World, coordinators: Coordinators, runs: Runs) {
        loop {
            let mut killed = self.killed.subscribe();
            let mut life = Life {
                process: self.clone(),
                world: world.clone(),
                coordinators: coordinators.clone(),
                runs: runs.clone(),
                coordinator: 0,
                running: JoinSet::new(),
                tasks: BTreeMap::new(),
                untaken: BTreeMap::new(),
                expiry: None,
            };
            tokio::select! {
                biased;
                _ = killed.changed() => {}
                () = life.live() => {}
            }
            drop(life);
            runs.0.lock().unwrap().retain(|run| run.worker != self.number);
            world.event(&format!("worker {} is killed", self.number));
            sleep(world.milliseconds(500, 8000)).await;
        }
    }

    /// Waits while the process is stopped.
    async fn awake(&self) {
        loop {
            let until = *self.stopped.borrow();
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}

/// A process from its start to its end.
struct Life {
    process: Process,
    world: World,
    coordinators: Coordinators,
    runs: Runs,
    coordinator: usize,
    running: JoinSet<TaskResult>,
    /// By attempt.
    tasks: BTreeMap<String, (Task, tokio::task::AbortHandle)>,
    /// Results that nobody said to have taken, the oldest first.
    untaken: BTreeMap<u64, TaskResult>,
    /// When others have its tasks.
    expiry: Option<Instant>,
}

impl Life {
    async fn live(&mut self) {
        loop {
            self.connection().await;
            // Without a stream for longer than a lease, its tasks are others'.
            let lease = super::LEASE;
            let expiry = *self.expiry.get_or_insert_with(|| Instant::now() + lease);
            sleep(self.world.milliseconds(BACKOFF.0, BACKOFF.1)).await;
            self.process.awake().await;
            if Instant::now() >= expiry {
                self.keep(&[]);
                self.expiry = None;
            }
        }
    }

    /// One stream, until it breaks.
    async fn connection(&mut self) {
        let Some(coordinator) = self.coordinators.any() else { return };
        let (said, requests) = mpsc::channel::<ConnectRequest>(64);
        let attempts = self.attempts();
        let register = Register {
            name: format!("worker-{}", self.process.number),
            outputs: self.process.offers.clone(),
            slots: u32::try_from(self.process.slots).unwrap(),
            attempts,
            ..Register::default()
        };
        let say = async |message| said.send(ConnectRequest { message: Some(message) }).await.is_ok();
        say(Said::Register(register)).await;
        let (link, mut cut) = (coordinator.link.clone(), self.process.cut.subscribe());
        // There, each message after a while, in order; until the stream breaks.
        let (there, arrived) = mpsc::channel(64);
        let (mut broken, arriving) = (self.process.cut.subscribe(), link.clone());
        let process = self.process.clone();
        tokio::spawn(async move {
            let mut requests = ReceiverStream::new(requests);
            loop {
                let request = tokio::select! {
                    biased;
                    _ = broken.changed() => break,
                    request = requests.next() => request,
                };
                let Some(request) = request else { break };
                process.awake().await;
                arriving.delay().await;
                if there.send(Ok(request)).await.is_err() {
                    return;
                }
            }
            let _ = there.send(Err(Status::unavailable("the stream is broken"))).await;
        });
        let accepted = coordinator.workers.accept(ReceiverStream::new(arrived).boxed());
        let answers = tokio::time::timeout(super::LEASE, accepted).await;
        let Ok(Ok(mut answers)) = answers else { return };
        self.coordinator = coordinator.number;
        let mut beat = tokio::time::interval(super::LEASE / 3);
        let mut silent = Instant::now() + super::LEASE * 2;
        loop {
            tokio::select! {
                biased;
                _ = cut.changed() => return,
                () = link.dead() => return,
                ended = self.running.join_next(), if !self.running.is_empty() => {
                    self.process.awake().await;
                    let Some(Ok(result)) = ended else { continue };
                    if self.end(&result) {
                        let number = self.untaken.last_key_value().map_or(0, |(last, _)| last + 1);
                        self.untaken.insert(number, result.clone());
                        if !say(Said::Result(result)).await {
                            return;
                        }
                    }
                }
                _ = beat.tick() => {
                    self.process.awake().await;
                    let progress =
                        |attempt: &String| TaskProgress { attempt: attempt.clone(), bytes: 1, upload: None };
                    let tasks = self.tasks.keys().map(progress).collect();
                    if Instant::now() > silent || !say(Said::Heartbeat(Heartbeat { tasks })).await {
                        return;
                    }
                }
                message = next(&mut answers) => {
                    let Some(message) = message else { return };
                    tokio::select! {
                        biased;
                        () = link.dead() => return,
                        () = link.delay() => {}
                    }
                    self.process.awake().await;
                    silent = Instant::now() + super::LEASE * 2;
                    match message {
                        Told::Welcome(welcome) => {
                            self.expiry = None;
                            self.keep(&welcome.attempts);
                            for result in self.untaken.values().cloned().collect::<Vec<_>>() {
                                say(Said::Result(result)).await;
                            }
                            silent = Instant::now() + super::LEASE * 1000;
                        }
                        Told::Task(task) => self.begin(task),
                        Told::Cancel(cancel) => self.cancel(&cancel.attempt),
                        Told::Taken(taken) => self.untaken.retain(|_, result| result.attempt != taken.attempt),
                        Told::Drain(_) | Told::Access(_) | Told::Budget(_) => {}
                    }
                }
            }
        }
    }

    fn attempts(&self) -> Vec<String> {
        let untaken = self.untaken.values().map(|result| &result.attempt);
        self.tasks.keys().chain(untaken).cloned().collect()
    }

    fn keep(&mut self, attempts: &[String]) {
        for attempt in self.attempts().iter().filter(|attempt| !attempts.contains(attempt)) {
            self.cancel(attempt);
            self.untaken.retain(|_, result| result.attempt != **attempt);
        }
    }

    fn begin(&mut self, task: Task) {
        if self.attempts().contains(&task.attempt) {
            return;
        }
        let (world, worker) = (self.world.clone(), self.process.number);
        if self.tasks.len() >= self.process.slots {
            world.violated(&format!("worker {worker} has more layers than slots"));
        }
        world.count("attempts");
        world.event(&format!("worker {worker} begins layer {} of {}", task.layer_index, task.job_id));
        let mut runs = self.runs.0.lock().unwrap();
        let same = |run: &&Run| (&run.task.job_id, run.task.layer_index) == (&task.job_id, task.layer_index);
        // One that was lost on its way here is begun, and comes to nothing.
        let counts = self.coordinators.counts(self.coordinator, &task);
        for other in runs.iter().filter(same) {
            if counts && self.coordinators.counts(other.coordinator, &other.task) {
                let what = (worker, other.worker, &task.job_id, task.layer_index);
                world.violated(&format!("two attempts at a layer count at once: {what:?}"));
            }
        }
        let number = runs.last().map_or(0, |run| run.number + 1);
        runs.push(Run { number, worker, coordinator: self.coordinator, task: task.clone() });
        drop(runs);
        let (attempt, process) = (task.attempt.clone(), self.process.clone());
        let name = task.source.as_ref().map(|source| source.digest.clone()).unwrap_or_default();
        let (fate, need) = self.coordinators.layer(&name);
        if !self.process.offers.contains(&need) {
            self.world.violated(&format!("worker {worker} does not offer {need}"));
        }
        let time = world.milliseconds(WORK.0, if world.once_in(20) { WORK.1 * 8 } else { WORK.1 });
        let handle = self.running.spawn(async move {
            sleep(time).await;
            process.awake().await;
            let error = |fault: TaskFault| {
                let message = format!("{fault:?}");
                Outcome::Error(TaskError { fault: fault.into(), code: 13, message, ..TaskError::default() })
            };
            let outcome = match fate {
                Fate::Good => {
                    world.put_blob(&name);
                    Outcome::Done(TaskDone { original: true, ..TaskDone::default() })
                }
                Fate::Poisonous => error(TaskFault::Worker),
                Fate::Broken => error(TaskFault::Task),
            };
            TaskResult { attempt, outcome: Some(outcome) }
        });
        self.tasks.insert(task.attempt.clone(), (task, handle));
    }

    fn cancel(&mut self, attempt: &str) {
        if let Some((_, handle)) = self.tasks.remove(attempt) {
            handle.abort();
        }
        self.forget(attempt);
    }

    /// Whether the task was not cancelled meanwhile.
    fn end(&mut self, result: &TaskResult) -> bool {
        self.forget(&result.attempt);
        self.tasks.remove(&result.attempt).is_some()
    }

    fn forget(&self, attempt: &str) {
        let worker = self.process.number;
        self.runs.0.lock().unwrap().retain(|run| run.worker != worker || run.task.attempt != attempt);
    }
}

async fn next(answers: &mut BoxStream<'static, Result<ConnectResponse, Status>>) -> Option<Told> {
    answers.next().await?.ok()?.message
}
