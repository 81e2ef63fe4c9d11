//! Runs one schedule: two registries behind proxies, a coordinator, workers, clients with jobs, and what befalls them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::text;
use occy_tests::coordinator::Coordinator;
use occy_tests::nats::Nats;
use occy_tests::occyctl::locally;
use occy_tests::proxy::FaultProxy;
use occy_tests::registry::Registry;
use occy_tests::tools::{read, sha256};
use occy_tests::worker::Worker;
use serde_json::Value;
use tempfile::TempDir;

use super::client::{Clients, End, Rules};
use super::image::{CHAINS, Expected, images, old};
use super::plan::{ENGINE_LEASE, Event, LEASE, Place, Plan, Source, Target};
use super::prober::{Prober, Tag, WholeFile};
use super::weather::Weather;

/// How long it may take until all is well again when the last fault is over.
const LIMIT: Duration = Duration::from_secs(45);

/// How long a job may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How far one of several coordinators may be behind.
const BEHIND: Duration = Duration::from_secs(3);

/// What came of a schedule in which nothing happened that may not.
pub(super) struct Outcome {
    /// How many jobs were accepted.
    pub(super) jobs: usize,
    /// How many of them a registry's fault had ended, so that they were submitted once more.
    pub(super) again: usize,
    /// How often jobs were begun.
    pub(super) attempts: u64,
    /// How many manifests were read meanwhile.
    pub(super) readings: u64,
}

/// A registry, and what stands before it.
struct Side {
    registry: Registry,
    proxy: FaultProxy,
    weather: Weather,
}

/// All that there is, and may be struck.
struct Stage<'a> {
    plan: &'a Plan,
    expected: &'a Expected,
    from: Side,
    to: Side,
    /// Of two coordinators.
    engine: Option<Nats>,
    is_engine_away: bool,
    coordinators: Vec<Coordinator>,
    workers: Vec<Worker>,
    /// How many workers there have been.
    names: usize,
    directory: TempDir,
}

/// Runs a schedule.
pub(super) fn run(plan: &Plan, expected: &Expected) -> Outcome {
    let mut stage = Stage::start(plan, expected);
    let clients = stage.clients();
    let (places, files) = stage.wanted(&clients);
    let prober = Prober::new(places, files);
    stage.from.weather.slow();
    stage.to.weather.slow();
    let stop = AtomicBool::new(false);
    let (ends, prober) = std::thread::scope(|scope| {
        // However this ends: the scope waits for those who look.
        let _stopping = SetWhenDropped(&stop);
        let probing = scope.spawn(|| prober.run(&stop));
        let start = Instant::now();
        let (clients, numbers) = (&clients, 0..plan.jobs.len());
        let jobs: Vec<_> =
            numbers.map(|number| scope.spawn(move || clients.see_through(number, start))).collect();
        for (at, event) in &plan.events {
            sleep(at.saturating_sub(start.elapsed()));
            stage.apply(*event);
        }
        stage.from.weather.heal();
        stage.to.weather.heal();
        clients.is_over.store(true, Ordering::Relaxed);
        let ends: Vec<End> = jobs.into_iter().map(|job| job.join().expect("a client is content")).collect();
        stop.store(true, Ordering::Relaxed);
        (ends, probing.join().expect("what is under a tag is whole"))
    });
    stage.check(&clients, &ends);
    Outcome {
        jobs: ends.iter().map(|end| end.submissions).sum(),
        again: ends.iter().map(|end| end.submissions - 1).sum(),
        attempts: ends.iter().map(|end| end.attempts).sum(),
        readings: prober.readings,
    }
}

/// Is set when the value is dropped.
pub(super) struct SetWhenDropped<'a>(pub(super) &'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'a> Stage<'a> {
    fn start(plan: &'a Plan, expected: &'a Expected) -> Self {
        let side = |number: u64| {
            let registry = Registry::start();
            let (proxy, weather) = Weather::before(&registry, plan.seed.wrapping_mul(2) + number);
            Side { registry, proxy, weather }
        };
        let (from, to) = (side(0), side(1));
        for (number, image) in images().iter().enumerate() {
            if plan.jobs.iter().any(|job| job.source == Source::Registry && job.image == number) {
                from.registry.push(image, "app", &number.to_string());
            }
        }
        to.registry.push(old(), "one", "latest");
        let directory = crate::scratch();
        let lease = LEASE.to_string();
        let paths = format!("{},{}", text(directory.path()), text(expected.directory()));
        // As many attempts as there may be faults of workers: none of these is the layer's own.
        let arguments = ["--embedded-workers", "0", "--max-attempts", "100", "--lease", &lease];
        let arguments = [&arguments[..], &["--allow-path", &paths]].concat();
        let engine = (plan.coordinators > 1).then(Nats::start);
        let (url, lease) = (engine.as_ref().map(Nats::url), ENGINE_LEASE.to_string());
        let arguments = match &url {
            Some(url) => [&arguments[..], &["--engine", url, "--engine-lease", &lease]].concat(),
            None => arguments,
        };
        let coordinators = (0..plan.coordinators).map(|_| Coordinator::start(&arguments)).collect();
        let workers = Vec::new();
        let mut stage = Self {
            plan,
            expected,
            from,
            to,
            engine,
            is_engine_away: false,
            coordinators,
            workers,
            names: 0,
            directory,
        };
        stage.workers = (0..plan.workers).map(|_| stage.another_worker()).collect();
        stage
    }

    fn another_worker(&mut self) -> Worker {
        self.names += 1;
        let name = format!("worker-{}", self.names);
        let arguments = ["--name", &name, "--slots", "2", "--drain-timeout", "1"];
        Worker::begin(&self.urls().join(","), &arguments)
    }

    fn urls(&self) -> Vec<String> {
        self.coordinators.iter().map(Coordinator::url).collect()
    }

    fn side(&mut self, end: Place) -> &mut Side {
        match end {
            Place::From => &mut self.from,
            Place::To => &mut self.to,
        }
    }

    fn file(&self, number: usize) -> PathBuf {
        self.directory.path().join(format!("{number}.tar"))
    }

    /// Those who have the plan's jobs done.
    fn clients(&mut self) -> Clients<'a> {
        let plan = self.plan;
        let sources = plan.jobs.iter().map(|job| match job.source {
            Source::Registry => format!("registry://{}/app:{}", self.from.proxy.host(), job.image),
            Source::File => crate::tar_uri(&self.expected.file(job.image)),
        });
        let sources = sources.collect();
        let targets = plan.jobs.iter().enumerate().map(|(number, job)| match &job.target {
            Target::Tag(end, repository, tag) => {
                format!("registry://{}/{repository}:{tag}", self.side(*end).proxy.host())
            }
            Target::File => crate::tar_uri(&self.file(number)),
        });
        let targets = targets.collect();
        let rules = Rules { limit: PATIENCE, failures: usize::from(plan.strikes_registries()), waits: true };
        Clients::new(&plan.jobs, rules, self.urls(), sources, targets)
    }

    /// What may be at the destinations, as the local tool says.
    fn wanted(&mut self, clients: &Clients<'_>) -> (Vec<Tag>, Vec<WholeFile>) {
        let (mut tags, mut files): (Vec<Tag>, Vec<WholeFile>) = (Vec::new(), Vec::new());
        for (number, job) in self.plan.jobs.iter().enumerate() {
            let Target::Tag(end, repository, tag) = &job.target else {
                let local = self.directory.path().join("local.tar");
                let arguments = ["process", &clients.sources[number], &crate::tar_uri(&local)];
                locally([&arguments, CHAINS[job.chain]].concat()).ok();
                files.push(WholeFile { path: self.file(number), expected: sha256(&read(&local)) });
                continue;
            };
            let digest = self.expected.digest(job);
            let registry = &self.side(*end).registry;
            let host = registry.host().to_owned();
            let same = |known: &&mut Tag| {
                (&known.host, &known.repository, &known.tag) == (&host, &(*repository).to_owned(), tag)
            };
            match tags.iter_mut().find(same) {
                Some(known) => drop(known.allowed.insert(digest)),
                None => {
                    let is_there = registry.has(repository, tag);
                    let old = is_there.then(|| registry.digest(repository, tag));
                    let allowed = old.into_iter().chain([digest]).collect();
                    let (repository, tag) = ((*repository).to_owned(), tag.clone());
                    tags.push(Tag { host, repository, tag, allowed, is_there });
                }
            }
        }
        (tags, files)
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::KillWorker(number) => self.workers[number].kill(),
            Event::DrainWorker(number) => self.workers[number].signal("TERM"),
            Event::StartWorker(number) => {
                let another = self.another_worker();
                let mut before = std::mem::replace(&mut self.workers[number], another);
                if before.is_running() {
                    let status = before.ended();
                    // One that was told to stop before it could hear of it, which says nothing, is ended by the signal itself.
                    assert!(status.success() || before.log().is_empty(), "{status}:\n{}", before.log());
                }
            }
            Event::StopWorker(number) => self.workers[number].signal("STOP"),
            Event::ContinueWorker(number) => self.workers[number].signal("CONT"),
            Event::KillCoordinator(number) => self.coordinators[number].kill(),
            // It waits for the engine, and nobody for it.
            Event::StartCoordinator(number) if self.is_engine_away => self.coordinators[number].begin_there(),
            Event::StartCoordinator(number) => self.coordinators[number].restart_there(),
            Event::StopCoordinator(number) => self.coordinators[number].pause(),
            Event::ContinueCoordinator(number) => self.coordinators[number].proceed(),
            Event::KillEngine => {
                self.engine.as_mut().expect("there is one").kill();
                self.is_engine_away = true;
            }
            Event::StartEngine => {
                self.engine.as_mut().expect("there is one").restart();
                self.is_engine_away = false;
                self.coordinators.iter_mut().for_each(Coordinator::has_begun);
            }
            Event::KillRegistry(end) => self.side(end).registry.kill(),
            Event::StartRegistry(end) => self.side(end).registry.restart(),
            Event::Strike(end, strike, times) => self.side(end).weather.strike(strike, times),
        }
    }

    /// Everything is where it has to be, and nobody has a slot any more.
    fn check(&mut self, clients: &Clients<'_>, ends: &[End]) {
        for (number, job) in self.plan.jobs.iter().enumerate() {
            let Target::Tag(end, repository, tag) = &job.target else { continue };
            let digest = self.expected.digest(job);
            assert_eq!(ends[number].job["result"]["manifest_digest"], digest, "job {number}");
            // Of two that write a tag at once, either may be the last one.
            let rivals: Vec<_> = self.plan.jobs.iter().filter(|rival| rival.target == job.target).collect();
            let last = match rivals[..] {
                [_, second] if second.after.is_some() => vec![self.expected.digest(second)],
                _ => rivals.iter().map(|rival| self.expected.digest(rival)).collect(),
            };
            let pulled = self.side(*end).registry.pull(repository, tag);
            assert!(
                last.contains(&pulled.digest),
                "{repository}:{tag} is {}, and not {last:?}",
                pulled.digest
            );
        }
        let accepted: usize = ends.iter().map(|end| end.submissions).sum();
        let start = Instant::now();
        // Of several coordinators, one may be a moment behind.
        loop {
            let listed = clients.ask(&["job", "list", "--limit", "1000"]);
            let listed = listed.as_array().expect("jobs").len();
            if listed == accepted {
                break;
            }
            assert!(
                self.plan.coordinators > 1 && start.elapsed() < BEHIND,
                "{listed} jobs are listed of {accepted}"
            );
            sleep(Duration::from_millis(50));
        }
        let is_idle = |worker: &Value| worker["free_slots"] == worker["slots"];
        // Of each coordinator, one after the other.
        let mut left = self.plan.coordinators;
        while left > 0 {
            let workers = clients.ask(&["workers"]);
            let workers = workers.as_array().expect("workers");
            if workers.len() == self.plan.workers && workers.iter().all(is_idle) {
                left -= 1;
                continue;
            }
            left = self.plan.coordinators;
            assert!(start.elapsed() < LIMIT, "all workers are there and free: {workers:?}");
            sleep(Duration::from_millis(50));
        }
    }
}
