//! Coordinators, workers and what they share, in one thread and in a time of its own: everything that may go wrong does, as a seed says.
//!
//! What is tried is what runs: the engine over JetStream, jobs and their runner, the fleet, its schedule, attempts, workers' streams
//! and watchers. Simulated are what lies around them: JetStream's values ([`simulated`](crate::engine::jetstream::simulated)), the
//! registry ([`ends`]), the workers' processes ([`worker`]), and all that is between them, which is slow, cut, and held up
//! ([`world`]).
//!
//! Coordinators are killed, held up past their leases, drained, and cut off from the engine; workers are killed, stopped past their
//! leases and cut off. However that goes: every job that was accepted ends, once, as its layers say, and its watcher hears of all
//! that happened, once and in order; its record is changed by its owner alone; its manifest is put while it is owned, when every
//! blob is there, and not beside another's to the same tag; no two attempts at a layer count at once; no two jobs have
//! the turn at what is the same layer, and none is taken from one whose claim holds; no worker has more than its slots, or what it does
//! not offer.
//!
//! A seed that fails is run again, with all that happens, by `OCCY_TEST_SEED=N OCCY_TEST_SEEDS=1 tests/simulate`. The order in which
//! tokio wakes those who wait for the same is chance too, and follows the seed only where tokio is built to let it (`--cfg
//! tokio_unstable`, which that script does): elsewhere a seed says what goes wrong, and not all that happens.

mod ends;
mod worker;
pub(crate) mod world;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use occy_pipeline::registry;
use occy_pipeline::spool::SpoolDir;
use occy_proto::v1::job_event::Event;
use occy_proto::v1::{Job, JobState, Task};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use self::ends::{Ends, Fate, Registry, digest, spec};
use self::worker::{Process, Runs};
use self::world::{Link, World};
use crate::access::Access;
use crate::admit::Gate;
use crate::client::{ClientLimits, Clients};
use crate::engine::jetstream::simulated::Nats;
use crate::engine::{Limits, Submission};
use crate::error::ServiceError;
use crate::fleet::{Fleet, Patience};
use crate::job::runner::Jobs;
use crate::job::state::is_final;
use crate::job::watch::follow;
use crate::schedule::Capabilities;
use crate::worker::connect::Workers;

/// After which who is not heard of is lost: coordinators and workers.
const LEASE: Duration = Duration::from_secs(10);
const PATIENCE: Patience = Patience { lease: LEASE, attempts: 3, unoffered: Duration::from_secs(120) };
const LIMITS: Limits = Limits { active: 1000, active_each: 1000, kept: 1000 };
/// Within which everything has ended once nothing goes wrong any more.
const SETTLED: Duration = Duration::from_secs(600);
/// After which a client asks somebody else.
const ASKED: Duration = Duration::from_secs(20);

/// A coordinator that is there.
#[derive(Clone)]
struct Coordinator {
    /// No other one, not even the one before at the same place, has it.
    number: usize,
    link: Link,
    jobs: Jobs,
    workers: Workers,
}

/// All coordinators, by place.
#[derive(Clone)]
struct Coordinators {
    world: World,
    nats: Nats,
    present: Arc<Mutex<Vec<Option<Coordinator>>>>,
    /// Every layer by its digest: what becomes of it, and what a worker must offer.
    layers: Arc<BTreeMap<String, (Fate, String)>>,
}

impl Coordinators {
    /// Where a balancer sends whoever comes.
    fn any(&self) -> Option<Coordinator> {
        let present = self.present.lock().unwrap();
        let alive: Vec<_> = present.iter().flatten().collect();
        (!alive.is_empty()).then(|| alive[self.world.index(alive.len())].clone())
    }

    /// Whether the result of an attempt would change anything.
    fn counts(&self, coordinator: usize, task: &Task) -> bool {
        let present = self.present.lock().unwrap();
        let its = present.iter().flatten().find(|present| present.number == coordinator);
        its.is_some_and(|its| its.workers.fleet.attempts().counts(&task.attempt))
            && self.nats.owner(&task.job_id) == Some(coordinator)
    }

    fn layer(&self, digest: &str) -> (Fate, String) {
        self.layers[digest].clone()
    }
}

/// What a simulation is made of.
struct Simulation {
    world: World,
    nats: Nats,
    registry: Registry,
    coordinators: Coordinators,
    count: AtomicU64,
}

/// What a client wants.
#[derive(Clone)]
struct Wanted {
    number: usize,
    tenant: String,
    layers: Vec<String>,
    needs: &'static str,
    tag: String,
    is_cancelled: bool,
}

impl Simulation {
    fn new(world: &World, places: usize) -> Self {
        let nats = Nats::new(world, LEASE);
        let mut known = BTreeMap::new();
        for number in 0..12 {
            known.insert(format!("layer-{number}"), (Fate::Good, "registry".to_owned()));
            known.insert(format!("special-{number}"), (Fate::Good, "special".to_owned()));
        }
        known.insert("poisonous".to_owned(), (Fate::Poisonous, "registry".to_owned()));
        known.insert("broken".to_owned(), (Fate::Broken, "registry".to_owned()));
        let layers = known.into_iter().map(|(name, fate)| (digest(&name).to_string(), fate)).collect();
        let coordinators = Coordinators {
            world: world.clone(),
            nats: nats.clone(),
            present: Arc::new(Mutex::new(vec![None; places])),
            layers: Arc::new(layers),
        };
        Self {
            world: world.clone(),
            nats,
            registry: Registry::default(),
            coordinators,
            count: AtomicU64::new(0),
        }
    }

    /// Starts a coordinator at a place, as soon as the engine lets it.
    async fn start(&self, place: usize) {
        let number = usize::try_from(self.count.fetch_add(1, Ordering::Relaxed)).unwrap();
        let link = Link::new(&self.world, number);
        let engine = loop {
            if let Ok(engine) = self.nats.open(&link, LIMITS).await {
                break Arc::new(engine);
            }
        };
        let fleet = Fleet::embedded(0, &Capabilities::default(), &[], PATIENCE);
        let gate = Gate {
            roots: Vec::new(),
            registry: registry::Options::default(),
            clients: Clients::new(SpoolDir::new("/tmp", 0), ClientLimits { calls: 1, spool: 0 }),
            max_layer_size: 0,
            parallel: 1,
            fleet: fleet.clone(),
        };
        let ends = Ends {
            world: self.world.clone(),
            link: link.clone(),
            nats: self.nats.clone(),
            registry: self.registry.clone(),
        };
        let at_once = self.world.index(4) + 1;
        let jobs = Jobs::opened_by(engine, Arc::new(gate), Arc::new(ends), None, fleet.clone(), at_once);
        // What it does not find now it finds later.
        let _ = jobs.resume().await;
        let looking = jobs.clone();
        tokio::spawn(async move { match looking.keep_looking().await {} });
        let access = Arc::new(Access::new(None).await.expect("there are no tokens"));
        let workers = Workers { fleet, access };
        self.world.event(&format!("coordinator {number} is there"));
        let coordinator = Coordinator { number, link, jobs, workers };
        self.coordinators.present.lock().unwrap()[place] = Some(coordinator);
    }

    fn kill(&self, place: usize) {
        if let Some(killed) = self.coordinators.present.lock().unwrap()[place].take() {
            killed.link.kill();
            killed.workers.fleet.close();
            self.world.event(&format!("coordinator {} is killed", killed.number));
        }
    }

    /// Has a job done: gives its id when somebody has accepted it.
    async fn submit(&self, wanted: &Wanted) -> String {
        for attempt in 0.. {
            let Some(coordinator) = self.coordinators.any() else {
                sleep(Duration::from_secs(1)).await;
                continue;
            };
            let submission = Submission {
                id: format!("job-{:03}-{attempt:03}", wanted.number),
                tenant: wanted.tenant.as_str().into(),
                spec: spec(&wanted.layers, wanted.needs, &wanted.tag),
                key: format!("key {}", wanted.number),
                sealed: None,
                trace: None,
            };
            if let Ok(Ok(job)) = timeout(ASKED, coordinator.jobs.accept(submission)).await {
                self.world.event(&format!("{} is accepted by {}", job.id, coordinator.number));
                return job.id;
            }
            sleep(self.world.milliseconds(100, 2000)).await;
        }
        unreachable!("it tries for ever")
    }

    /// Hears all events of a job, from whoever is there, until the last one.
    async fn watch(&self, id: &str) {
        let mut after = 0;
        loop {
            let Some(coordinator) = self.coordinators.any() else {
                sleep(Duration::from_secs(1)).await;
                continue;
            };
            let (events, mut heard) = mpsc::channel(4);
            let following = {
                let (coordinator, id) = (coordinator.clone(), id.to_owned());
                async move {
                    let (engine, live) = (coordinator.jobs.engine(), coordinator.jobs.live());
                    follow(engine, live, &id, after, &events).await
                }
            };
            let mut following = tokio::spawn(following);
            while let Ok(Some(event)) = timeout(ASKED, heard.recv()).await {
                if coordinator.link.is_dead() {
                    break;
                }
                if event.sequence == 0 {
                    continue;
                }
                if event.sequence != after + 1 {
                    self.world.violated(&format!("event {} of {id} came after {after}", event.sequence));
                }
                after = event.sequence;
                if matches!(&event.event, Some(Event::StateChanged(change)) if is_final(change.state())) {
                    return;
                }
            }
            let ended = timeout(Duration::ZERO, &mut following).await;
            following.abort();
            if let Ok(Ok(Err(error @ (ServiceError::NoSuchJob(_) | ServiceError::BeyondEvents { .. })))) =
                ended
            {
                self.world.violated(&format!("the watcher of {id} is told: {error}"));
                return;
            }
            sleep(self.world.milliseconds(10, 500)).await;
        }
    }

    /// One job from its submission to its end.
    async fn job(&self, wanted: &Wanted) {
        let id = self.submit(wanted).await;
        let cancelled = async {
            if wanted.is_cancelled {
                sleep(self.world.milliseconds(0, 8000)).await;
                if let Some(coordinator) = self.coordinators.any() {
                    let _ = timeout(ASKED, coordinator.jobs.cancel(&id)).await;
                }
            }
        };
        tokio::join!(self.watch(&id), cancelled);
        let jobs = self.nats.jobs();
        let its = jobs.iter().filter(|job| job.id.starts_with(&format!("job-{:03}-", wanted.number)));
        let its: Vec<_> = its.collect();
        match its.as_slice() {
            [job] if job.id == id => self.judge(wanted, job),
            others => self.world.violated(&format!("{} jobs have one key", others.len())),
        }
    }

    /// Whether a job's end is the true one.
    fn judge(&self, wanted: &Wanted, job: &Job) {
        let (id, state) = (&job.id, job.state());
        let reason = job.error.as_ref().map(|error| error.message.clone()).unwrap_or_default();
        self.world.event(&format!("{id} has ended: {state:?} {reason}"));
        let fates = wanted.layers.iter().map(|layer| self.coordinators.layer(&digest(layer).to_string()).0);
        let fates: Vec<_> = fates.collect();
        let is_right = match state {
            JobState::Succeeded => {
                self.world.count("succeeded");
                fates.iter().all(|fate| *fate == Fate::Good) && self.registry.has(&job_tag(job), job)
            }
            JobState::Failed => {
                self.world.count("failed");
                // What its layers say; or that workers were lost three times over, or were elsewhere for too long.
                let is_bad = fates.iter().any(|fate| *fate != Fate::Good);
                is_bad
                    || reason.matches("it was lost").count() == PATIENCE.attempts
                    || reason.contains("no worker ")
            }
            JobState::Cancelled => {
                self.world.count("cancelled");
                wanted.is_cancelled
            }
            _ => false,
        };
        if !is_right {
            self.world.violated(&format!("{id} is {state:?}: {reason}"));
        }
    }

    /// Things go wrong, one after the other.
    async fn faults(&self, until: Instant, workers: &[Process]) {
        let world = &self.world;
        let places = self.coordinators.present.lock().unwrap().len();
        while Instant::now() < until {
            sleep(world.milliseconds(500, 9000)).await;
            let (place, worker) = (world.index(places), &workers[world.index(workers.len())]);
            let present = self.coordinators.present.lock().unwrap()[place].clone();
            let time = world.milliseconds(500, 30_000);
            match (world.below(10), present) {
                (0 | 1, Some(_)) => {
                    self.kill(place);
                    sleep(time.min(Duration::from_secs(8))).await;
                    self.start(place).await;
                }
                (2 | 3, Some(held)) => {
                    world.event(&format!("coordinator {} is held up for {time:?}", held.number));
                    held.link.hold(time);
                }
                (4, Some(cut)) => {
                    world.event(&format!("coordinator {} is cut off for {time:?}", cut.number));
                    cut.link.cut(time);
                }
                (5, Some(drained)) => {
                    world.event(&format!("coordinator {} is drained", drained.number));
                    let _ =
                        timeout(Duration::from_secs(15), drained.jobs.drain(Duration::from_secs(5))).await;
                    self.kill(place);
                    self.start(place).await;
                }
                (6, _) => worker.kill(),
                (7 | 8, _) => {
                    world.event(&format!("worker {} is stopped for {time:?}", worker.number));
                    worker.stop(time);
                }
                _ => {
                    world.event(&format!("the stream of worker {} is cut", worker.number));
                    worker.cut();
                }
            }
        }
    }

    async fn run(self: Arc<Self>) {
        let world = &self.world;
        for place in 0..self.coordinators.present.lock().unwrap().len() {
            let one = Arc::clone(&self);
            tokio::spawn(async move { one.start(place).await });
        }
        let runs = Runs::default();
        let mut workers = Vec::new();
        for number in 0..usize::try_from(world.between(2, 6)).unwrap() {
            let mut offers = vec!["registry".to_owned()];
            if number % 2 == 0 {
                offers.push("special".to_owned());
            }
            let process = Process::new(number, world.index(3) + 1, offers);
            tokio::spawn(process.clone().run(world.clone(), self.coordinators.clone(), runs.clone()));
            workers.push(process);
        }
        let end = world.milliseconds(20_000, 90_000);
        let mut jobs = JoinSet::new();
        for number in 0..usize::try_from(world.between(4, 16)).unwrap() {
            let wanted = wanted(world, number);
            let (one, wait) =
                (Arc::clone(&self), world.milliseconds(0, u64::try_from(end.as_millis()).unwrap()));
            jobs.spawn(async move {
                sleep(wait).await;
                one.job(&wanted).await;
            });
        }
        self.faults(Instant::now() + end, &workers).await;
        world.event("nothing goes wrong any more");
        let settled = async { while jobs.join_next().await.is_some() {} };
        if timeout(SETTLED, settled).await.is_err() {
            for job in self.nats.jobs().iter().filter(|job| !is_final(job.state())) {
                world.violated(&format!("{} does not end: it is {:?}", job.id, job.state()));
            }
            world.violated("clients wait for ever");
        }
    }
}

fn job_tag(job: &Job) -> String {
    job.spec.as_ref().map(|spec| spec.destination.clone()).unwrap_or_default()
}

fn wanted(world: &World, number: usize) -> Wanted {
    let needs = if world.once_in(4) { "special" } else { "registry" };
    let kind = if needs == "special" { "special" } else { "layer" };
    let count = world.index(4) + 1;
    let mut layers = Vec::new();
    while layers.len() < count {
        let layer = format!("{kind}-{}", world.below(12));
        if !layers.contains(&layer) {
            layers.push(layer);
        }
    }
    if needs == "registry" {
        match world.below(20) {
            0 => layers.push("poisonous".to_owned()),
            1 => layers.push("broken".to_owned()),
            _ => {}
        }
    }
    Wanted {
        number,
        tenant: format!("tenant {}", world.below(3)),
        layers,
        needs,
        tag: format!("app-{}", world.below(4)),
        is_cancelled: world.once_in(12),
    }
}

/// One simulation: what happened in it, as a number, and what should not have.
fn simulate(seed: u64, is_loud: bool) -> World {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
    let runtime = builder.build().expect("a runtime");
    runtime.block_on(async {
        let world = World::new(seed, is_loud);
        let places = usize::try_from(world.between(1, 4)).unwrap();
        Arc::new(Simulation::new(&world, places)).run().await;
        world
    })
}

fn number_in(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// So many seeds, on all cores; the first of them, and how many, as the environment says.
#[test]
fn whatever_goes_wrong_no_rule_is_broken() {
    let (first, count) = (number_in("OCCY_TEST_SEED", 1), number_in("OCCY_TEST_SEEDS", 60));
    let (next, failed) = (AtomicU64::new(first), Mutex::new(BTreeMap::new()));
    let counts = Mutex::new(BTreeMap::<&str, u64>::new());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let world = simulate(seed, count == 1);
                    for (what, number) in world.counts() {
                        *counts.lock().unwrap().entry(what).or_default() += number;
                    }
                    if let Some(violation) = world.violations().into_iter().next() {
                        failed.lock().unwrap().insert(seed, violation);
                    }
                }
            });
        }
    });
    println!("| simulations | {count} | {:?} |", counts.into_inner().unwrap());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {count} seeds failed, by seed: {failed:#?}", failed.len());
}

#[cfg(tokio_unstable)]
#[test]
fn the_same_seed_is_the_same_simulation() {
    for seed in 1..=6 {
        let (once, again) = (simulate(seed, false), simulate(seed, false));
        assert_eq!(once.log(), again.log(), "seed {seed}");
    }
    assert_ne!(simulate(1, false).log(), simulate(2, false).log());
}
