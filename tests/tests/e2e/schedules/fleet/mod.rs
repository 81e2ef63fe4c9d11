//! A whole fleet, each process on a node of its own: three servers of the engine, two coordinators, five workers, two registries. Any
//! of them is killed, stopped or told to end, and any two are cut off from each other, also in one direction alone, while clients have
//! jobs done without a pause; or all of it is replaced, one after the other, as by an upgrade.
//!
//! `OCCY_TEST_SEED` is the seed of the faults, and `OCCY_TEST_FLEET_JOBS` how many jobs there are.

mod faults;
mod mirror;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::coordinator::Coordinator;
use occy_tests::nats::Nats;
use occy_tests::network::{Network, Node};
use occy_tests::random::Random;
use occy_tests::registry::{Registry, Setup};
use occy_tests::worker::Worker;

use super::client::{Clients, End, Rules};
use super::image::{CHAINS, Expected, IMAGES, images};
use super::number;
use super::plan::{ENGINE_LEASE, Job, LEASE, Place, Source, Target};
use super::prober::{Prober, Tag};
use faults::{Faults, Member, Step};

const ENGINES: usize = 3;
const COORDINATORS: usize = 2;
const WORKERS: usize = 5;
const REGISTRIES: usize = 2;

/// Jobs that are under way at once.
const CLIENTS: usize = 12;
/// How many jobs there are for each tag.
const JOBS_A_TAG: usize = 8;
/// How often a job may fail by the fault of a registry before it is done.
const FAILURES: usize = 20;
/// How long a job may take.
const LIMIT: Duration = Duration::from_secs(240);

#[test]
fn a_fleet_does_every_job_whoever_fails_and_whoever_is_cut_off() {
    let Some(mut fleet) = Fleet::start("a_fleet_does_every_job_whoever_fails") else { return };
    let (seed, count) = (number("OCCY_TEST_SEED", 1), number("OCCY_TEST_FLEET_JOBS", 24));
    eprintln!("--- OCCY_TEST_SEED={seed} OCCY_TEST_FLEET_JOBS={count} runs it again");
    let jobs = jobs(seed, count);
    let mut happened = Happened::new();
    let outcome =
        fleet.have_done(&jobs, FAILURES, |fleet, is_over| fleet.suffer(seed, is_over, &mut happened));
    println!("| of a fleet with {count} jobs | times |\n|---|---|");
    print_faults(&happened);
    outcome.print();
}

#[test]
fn a_fleet_is_replaced_one_after_the_other_and_nobody_notices() {
    let Some(mut fleet) = Fleet::start("a_fleet_is_replaced_one_after_the_other") else { return };
    let count = number("OCCY_TEST_FLEET_JOBS", 24);
    let jobs = jobs(number("OCCY_TEST_SEED", 1), count);
    let mut replaced = 0;
    let outcome = fleet.have_done(&jobs, 0, |fleet, is_over| {
        // Again and again, for as long as there is work.
        while !is_over.load(Ordering::Relaxed) || replaced < COORDINATORS + WORKERS {
            for member in (0..COORDINATORS).map(Member::Coordinator).chain((0..WORKERS).map(Member::Worker)) {
                fleet.take(Step::Drain(member));
                fleet.take(Step::Start(member));
                replaced += 1;
                sleep(Duration::from_millis(300));
            }
        }
    });
    assert_eq!(outcome.again, 0, "no job failed");
    assert_eq!(outcome.disturbed, 0, "every watch came to its end by itself");
    println!("| of a fleet that was replaced, with {count} jobs | times |\n|---|---|");
    println!("| coordinators and workers replaced | {replaced} |");
    outcome.print();
}

/// How often which fault has happened.
type Happened = BTreeMap<&'static str, u64>;

fn print_faults(happened: &Happened) {
    for (name, times) in happened {
        println!("| {name} | {times} |");
    }
}

/// What came of all jobs, all of which were done.
#[derive(Default)]
struct Outcome {
    jobs: usize,
    /// Jobs that failed by a registry's fault, and said so.
    again: usize,
    /// Jobs of which a watch broke off.
    disturbed: usize,
    /// How often jobs were begun.
    attempts: u64,
    /// Blobs that were uploaded, and how often layers were begun.
    uploads: usize,
    begun: usize,
    readings: u64,
    seconds: f64,
}

impl Outcome {
    fn print(&self) {
        println!("| jobs done | {} |", self.jobs);
        println!("| jobs that said that a registry failed, and were submitted again | {} |", self.again);
        println!("| jobs begun | {} |", self.attempts);
        println!("| watches that broke off | {} |", self.disturbed);
        println!(
            "| layers begun or taken; blobs uploaded, configs included | {}; {} |",
            self.begun, self.uploads
        );
        println!("| images read from tags meanwhile | {} |", self.readings);
        println!("| seconds | {:.0} |", self.seconds);
    }
}

/// The processes, and the nodes on which they are.
struct Fleet {
    // In the order in which they end.
    workers: Vec<(Node, Worker)>,
    coordinators: Vec<(Node, Coordinator)>,
    engines: Vec<(Node, Nats)>,
    registries: Vec<(Node, Registry)>,
    expected: Expected,
    /// How many workers there have been.
    names: usize,
    network: Network,
}

/// Jobs for the tags of both registries, several for each.
fn jobs(seed: u64, count: u64) -> Vec<Job> {
    let mut random = Random::new(seed);
    let count = usize::try_from(count).expect("a number of jobs");
    let tags = count.div_ceil(JOBS_A_TAG);
    let mut last: Vec<Option<usize>> = vec![None; tags];
    let job = |number: usize| {
        let tag = number % tags;
        // Of every second tag one job follows the other, so that the last one has the last word.
        let after = last[tag].filter(|_| tag.is_multiple_of(2));
        last[tag] = Some(number);
        let end = if tag.is_multiple_of(3) { Place::From } else { Place::To };
        Job {
            at: Duration::ZERO,
            after,
            source: Source::Registry,
            image: random.index(IMAGES),
            chain: random.index(CHAINS.len()),
            target: Target::Tag(end, random.pick(&["one", "two"]), format!("t{tag}")),
        }
    };
    let mut jobs: Vec<Job> = (0..count).map(job).collect();
    // Jobs for the same tag go to the same repository.
    for number in tags..count {
        jobs[number].target = jobs[number - tags].target.clone();
    }
    jobs
}

fn place(end: Place) -> usize {
    match end {
        Place::From => 0,
        Place::To => 1,
    }
}

impl Fleet {
    fn start(test: &str) -> Option<Self> {
        let mut network = Network::start(test)?;
        let mut nodes = |count: usize| (0..count).map(|_| network.node()).collect::<Vec<_>>();
        let (engines, coordinators, workers) = (nodes(ENGINES), nodes(COORDINATORS), nodes(WORKERS));
        let registries = nodes(REGISTRIES);
        let registries: Vec<_> = registries
            .into_iter()
            .map(|node| {
                let registry = Registry::with(Setup { node: Some(&node), ..Setup::default() });
                (node, registry)
            })
            .collect();
        for (number, image) in images().iter().enumerate() {
            registries[0].1.push(image, "app", &number.to_string());
        }
        let engines: Vec<_> = engines.iter().cloned().zip(Nats::cluster(&engines)).collect();
        let mut fleet = Self {
            workers: Vec::new(),
            coordinators: Vec::new(),
            engines,
            registries,
            expected: Expected::new(),
            names: 0,
            network,
        };
        let addresses: Vec<_> = fleet.engines.iter().map(|(_, engine)| engine.address()).collect();
        let engine = format!("jetstream://{}", addresses.join(","));
        let (lease, engine_lease) = (LEASE.to_string(), ENGINE_LEASE.to_string());
        let own = ["--engine", &engine, "--engine-replicas", "3", "--engine-lease", &engine_lease];
        // As many attempts as there may be faults of workers: none of these is the layer's own.
        let rules = ["--embedded-workers", "0", "--max-attempts", "100", "--lease", &lease];
        let network = fleet.access();
        let network: Vec<&str> = network.iter().map(String::as_str).collect();
        let arguments = [&own[..], &rules, &network].concat();
        for node in coordinators {
            let coordinator = Coordinator::on_node(&node, &arguments);
            fleet.coordinators.push((node, coordinator));
        }
        for node in workers {
            let worker = fleet.worker(&node);
            fleet.workers.push((node, worker));
        }
        Some(fleet)
    }

    /// How registries on the network's nodes are reached.
    fn access(&self) -> Vec<String> {
        let range = ["--allow-network".to_owned(), self.network.range()];
        let hosts = self.registries.iter();
        range
            .into_iter()
            .chain(hosts.flat_map(|(_, registry)| ["--insecure".to_owned(), registry.host().to_owned()]))
            .collect()
    }

    /// Where its coordinators are reached.
    fn urls(&self) -> Vec<String> {
        self.coordinators.iter().map(|(_, coordinator)| coordinator.url()).collect()
    }

    fn worker(&mut self, node: &Node) -> Worker {
        self.names += 1;
        let name = format!("worker-{}", self.names);
        let urls = self.urls();
        let own = ["--name", &name, "--slots", "2", "--drain-timeout", "1"];
        let access = self.access();
        let arguments: Vec<&str> = own.into_iter().chain(access.iter().map(String::as_str)).collect();
        Worker::begin_on(Some(node), &urls.join(","), &arguments)
    }

    fn node(&self, member: Member) -> &Node {
        match member {
            Member::Engine(number) => &self.engines[number].0,
            Member::Coordinator(number) => &self.coordinators[number].0,
            Member::Worker(number) => &self.workers[number].0,
            Member::Registry(number) => &self.registries[number].0,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Cut(one, two, lost) => self.node(one).cut(self.node(two), lost),
            Step::Join(one, two, lost) => self.node(one).join(self.node(two), lost),
            Step::Stop(member) => self.signal(member, "STOP"),
            Step::Continue(member) => self.signal(member, "CONT"),
            Step::Kill(Member::Engine(number)) => self.engines[number].1.kill(),
            Step::Kill(Member::Coordinator(number)) => self.coordinators[number].1.kill(),
            Step::Kill(Member::Worker(number)) => self.workers[number].1.kill(),
            Step::Kill(Member::Registry(number)) => self.registries[number].1.kill(),
            Step::Drain(member) => self.signal(member, "TERM"),
            Step::Start(Member::Engine(number)) => self.engines[number].1.restart(),
            Step::Start(Member::Registry(number)) => self.registries[number].1.restart(),
            Step::Start(Member::Coordinator(number)) => {
                let coordinator = &mut self.coordinators[number].1;
                if coordinator.is_running() {
                    let status = coordinator.ended();
                    assert!(status.success(), "{status}:\n{}", coordinator.log());
                }
                // It may have to wait for the engine.
                coordinator.begin_there();
            }
            Step::Start(Member::Worker(number)) => {
                let node = self.workers[number].0.clone();
                let another = self.worker(&node);
                let mut before = std::mem::replace(&mut self.workers[number].1, another);
                if before.is_running() {
                    let status = before.ended();
                    // One that was told to stop before it could hear of it, which says nothing, is ended by the signal itself.
                    assert!(status.success() || before.log().is_empty(), "{status}:\n{}", before.log());
                }
            }
        }
    }

    fn signal(&self, member: Member, name: &str) {
        match member {
            Member::Engine(number) => self.engines[number].1.signal(name),
            Member::Coordinator(number) => self.coordinators[number].1.signal(name),
            Member::Worker(number) => self.workers[number].1.signal(name),
            Member::Registry(number) => self.registries[number].1.signal(name),
        }
    }

    /// Has the faults of a seed befall it until it is over, and those that have begun come to their end.
    fn suffer(&mut self, seed: u64, is_over: &AtomicBool, happened: &mut Happened) {
        let start = Instant::now();
        let mut faults = Faults::of(seed).peekable();
        let mut steps: Vec<(Duration, Step)> = Vec::new();
        loop {
            let is_over = is_over.load(Ordering::Relaxed);
            let fault = faults.peek().and_then(|fault| fault.steps.first()).expect("a fault").0;
            let next = (0..steps.len()).min_by_key(|&index| steps[index].0);
            let step = next.map(|index| steps[index].0);
            match next {
                None if is_over => return,
                Some(next) if start.elapsed() >= steps[next].0 && (is_over || steps[next].0 <= fault) => {
                    self.take(steps.remove(next).1);
                }
                _ if !is_over && start.elapsed() >= fault && step.is_none_or(|step| fault < step) => {
                    let fault = faults.next().expect("a fault");
                    *happened.entry(fault.name).or_default() += 1;
                    steps.extend(fault.steps);
                }
                _ => sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Has clients do all jobs, while `meanwhile` happens until they are; and checks what came of it.
    fn have_done(
        &mut self,
        jobs: &[Job],
        failures: usize,
        meanwhile: impl FnOnce(&mut Self, &AtomicBool),
    ) -> Outcome {
        let start = Instant::now();
        let urls = self.urls();
        let source = |job: &Job| self.registries[0].1.uri(&format!("app:{}", job.image));
        let sources = jobs.iter().map(source).collect();
        let target = |job: &Job| {
            let Target::Tag(end, repository, tag) = &job.target else { unreachable!("all go to registries") };
            self.registries[place(*end)].1.uri(&format!("{repository}:{tag}"))
        };
        let targets = jobs.iter().map(target).collect();
        let rules = Rules { limit: LIMIT, failures, waits: false };
        let clients = Clients::new(jobs, rules, urls, sources, targets);
        let prober = Prober::new(self.tags(jobs), Vec::new());
        let (next, left) = (AtomicUsize::new(0), AtomicUsize::new(CLIENTS));
        let (is_over, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        let (ends, prober) = std::thread::scope(|scope| {
            // However this ends: the scope waits for those who look.
            let _stopping = super::stage::SetWhenDropped(&stop);
            let probing = scope.spawn(|| prober.run(&stop));
            let lane = || {
                let _leaving = Leaving { left: &left, is_over: &is_over };
                let mut ends = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= jobs.len() {
                        return ends;
                    }
                    ends.push((number, clients.see_through(number, start)));
                }
            };
            let lanes: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(lane)).collect();
            meanwhile(self, &is_over);
            let ends = lanes.into_iter().flat_map(|lane| lane.join().expect("a client is content"));
            let ends: BTreeMap<usize, End> = ends.collect();
            stop.store(true, Ordering::Relaxed);
            (ends, probing.join().expect("what is under a tag is whole"))
        });
        let mut outcome = Outcome {
            jobs: ends.len(),
            readings: prober.readings,
            seconds: start.elapsed().as_secs_f64(),
            ..Outcome::default()
        };
        for end in ends.values() {
            outcome.again += end.submissions - 1;
            outcome.attempts += end.attempts;
            outcome.disturbed += usize::from(!end.is_undisturbed);
            outcome.begun += end.begun().map(|(_, times)| times).sum::<usize>();
        }
        self.check(jobs, &ends);
        outcome.uploads = self.check_uploads(jobs, &ends);
        outcome
    }

    /// What may be under the tags.
    fn tags(&self, jobs: &[Job]) -> Vec<Tag> {
        let mut tags: Vec<Tag> = Vec::new();
        for job in jobs {
            let Target::Tag(end, repository, tag) = &job.target else { unreachable!("all go to registries") };
            let host = self.registries[place(*end)].1.host();
            let digest = self.expected.digest(job);
            match tags.iter_mut().find(|known| known.host == host && known.tag == *tag) {
                Some(known) => drop(known.allowed.insert(digest)),
                None => tags.push(Tag {
                    host: host.to_owned(),
                    repository: (*repository).to_owned(),
                    tag: tag.clone(),
                    allowed: HashSet::from([digest]),
                    is_there: false,
                }),
            }
        }
        tags
    }

    /// Each job gave what it had to, and what it left under its tag is right.
    fn check(&self, jobs: &[Job], ends: &BTreeMap<usize, End>) {
        for (number, job) in jobs.iter().enumerate() {
            let Target::Tag(end, repository, tag) = &job.target else { unreachable!("all go to registries") };
            let digest = self.expected.digest(job);
            assert_eq!(ends[&number].job["result"]["manifest_digest"], digest, "job {number}");
            let is_last = !jobs[number + 1..].iter().any(|later| later.target == job.target);
            if is_last && job.after.is_some() {
                let pulled = self.registries[place(*end)].1.pull(repository, tag);
                assert_eq!(pulled.digest, digest, "job {number} has the last word at {repository}:{tag}");
            }
        }
    }

    /// No blob was uploaded more often than layers, or jobs with such a config, were begun that have it; gives the number.
    fn check_uploads(&self, jobs: &[Job], ends: &BTreeMap<usize, End>) -> usize {
        let mut explained: BTreeMap<(usize, &str, &str), usize> = BTreeMap::new();
        let mut begun: BTreeMap<(usize, &str), u64> = BTreeMap::new();
        for (number, end) in ends {
            let Target::Tag(at, repository, _) = &jobs[*number].target else { unreachable!() };
            *begun.entry((place(*at), *repository)).or_default() += end.attempts;
            for (digest, times) in end.begun() {
                *explained.entry((place(*at), *repository, digest)).or_default() += times;
            }
        }
        let mut all = 0;
        for (at, (_, registry)) in self.registries.iter().enumerate() {
            for ((repository, digest), times) in registry.uploads() {
                // What the test itself has pushed.
                if repository == "app" {
                    continue;
                }
                let of_jobs = begun[&(at, &*repository)];
                let layers = explained.get(&(at, &*repository, &*digest)).copied();
                let most = layers.unwrap_or(usize::try_from(of_jobs).expect("a number"));
                assert!(
                    times <= most,
                    "{repository}@{digest} was uploaded {times} times, begun {most} times"
                );
                all += times;
            }
        }
        assert!(all > 0, "uploads are counted");
        all
    }
}

/// One client fewer; after the last one it is over.
struct Leaving<'a> {
    left: &'a AtomicUsize,
    is_over: &'a AtomicBool,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.is_over.store(true, Ordering::Relaxed);
        }
    }
}
