//! What happens in one schedule, and when: drawn from its seed before anything starts, so that the same seed gives the same again.
//!
//! Here nothing is done. `stage.rs` does it; `image.rs` knows the images and what has to come of them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use occy_tests::random::Random;

use super::image::{CHAINS, IMAGES};

/// When the last fault begins, in milliseconds.
const WINDOW: u64 = 2400;
/// How long a worker may be silent, in seconds.
pub(super) const LEASE: u64 = 1;
/// How long a coordinator may be silent that shares its jobs with another, in seconds.
pub(super) const ENGINE_LEASE: u64 = 2;
/// Between two faults of the same process, which has to start, in milliseconds.
const PAUSE: u64 = 500;

/// One schedule.
pub(super) struct Plan {
    /// What it was drawn from.
    pub(super) seed: u64,
    pub(super) workers: usize,
    /// One, with its jobs in a file, or two, with their jobs in JetStream.
    pub(super) coordinators: usize,
    pub(super) jobs: Vec<Job>,
    /// What happens, in the order of time.
    pub(super) events: Vec<(Duration, Event)>,
}

/// A job that is submitted.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) at: Duration,
    /// The job that has to have ended before.
    pub(super) after: Option<usize>,
    pub(super) source: Source,
    /// Which image, of `IMAGES`.
    pub(super) image: usize,
    /// Which filters and options, of `CHAINS`.
    pub(super) chain: usize,
    pub(super) target: Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Registry,
    /// A file that only the coordinator has.
    File,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A repository and a tag in one of the registries.
    Tag(Place, &'static str, String),
    /// A file of the coordinator's.
    File,
}

/// One of the two registries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    From,
    To,
}

/// What happens at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    KillWorker(usize),
    DrainWorker(usize),
    /// Another one in the place of one that was killed, or has drained.
    StartWorker(usize),
    StopWorker(usize),
    ContinueWorker(usize),
    KillCoordinator(usize),
    StartCoordinator(usize),
    StopCoordinator(usize),
    ContinueCoordinator(usize),
    /// Where two coordinators have their jobs.
    KillEngine,
    StartEngine,
    KillRegistry(Place),
    StartRegistry(Place),
    /// The next so many requests that come to a registry's proxy meet it.
    Strike(Place, Strike, u64),
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Strike {
    /// The answer breaks off in its middle.
    Cut,
    /// The registry never hears of it.
    Reset,
    /// The registry does it, and nobody hears of that.
    LoseAnswer,
    /// 429.
    TooMany,
    /// 500, 502 or 503.
    Status(u16),
}

/// Who is out of order at a time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Worker(usize),
    Coordinator(usize),
    Engine,
    Registry(Place),
}

impl Plan {
    pub(super) fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let workers = 2 + random.index(2);
        let coordinators = 1 + random.index(2);
        let jobs = jobs(&mut random);
        let mut events = Vec::new();
        let mut busy = BTreeMap::new();
        for _ in 0..random.between(6, 11) {
            let at = random.between(100, WINDOW);
            let (subject, faults) = fault(&mut random, workers, coordinators);
            // One that is out of order already, or has not come back yet, is left alone.
            let until = at + faults.last().map_or(0, |(after, _)| *after) + PAUSE;
            if let Some(subject) = subject {
                let spans: &mut Vec<(u64, u64)> = busy.entry(subject).or_default();
                if spans.iter().any(|&(start, end)| at < end && start < until) {
                    continue;
                }
                spans.push((at, until));
            }
            events
                .extend(faults.into_iter().map(|(after, event)| (Duration::from_millis(at + after), event)));
        }
        events.sort_by_key(|(at, _)| *at);
        Self { seed, workers, coordinators, jobs, events }
    }

    /// Whether a job may fail by the fault of a registry, and say so.
    pub(super) fn strikes_registries(&self) -> bool {
        self.events.iter().any(|(_, event)| matches!(event, Event::KillRegistry(_) | Event::Strike(..)))
    }
}

/// Who it strikes, and what happens how many milliseconds after it begins.
fn fault(random: &mut Random, workers: usize, coordinators: usize) -> (Option<Subject>, Vec<(u64, Event)>) {
    let (worker, coordinator) = (random.index(workers), random.index(coordinators));
    let end = random.pick(&[Place::From, Place::To]);
    let silence = LEASE * 1000 + random.between(300, 900);
    let down = random.between(50, 600);
    match random.below(12) {
        0 | 1 => (
            Some(Subject::Worker(worker)),
            vec![(0, Event::KillWorker(worker)), (down, Event::StartWorker(worker))],
        ),
        2 => (
            Some(Subject::Worker(worker)),
            vec![(0, Event::StopWorker(worker)), (silence, Event::ContinueWorker(worker))],
        ),
        3 => (
            Some(Subject::Worker(worker)),
            vec![(0, Event::DrainWorker(worker)), (silence + 500, Event::StartWorker(worker))],
        ),
        4 | 5 => (
            Some(Subject::Coordinator(coordinator)),
            vec![(0, Event::KillCoordinator(coordinator)), (down, Event::StartCoordinator(coordinator))],
        ),
        6 => (
            Some(Subject::Coordinator(coordinator)),
            vec![
                (0, Event::StopCoordinator(coordinator)),
                (silence + (ENGINE_LEASE - LEASE) * 1000, Event::ContinueCoordinator(coordinator)),
            ],
        ),
        7 if coordinators > 1 => {
            (Some(Subject::Engine), vec![(0, Event::KillEngine), (down, Event::StartEngine)])
        }
        8 => (
            Some(Subject::Registry(end)),
            vec![(0, Event::KillRegistry(end)), (down, Event::StartRegistry(end))],
        ),
        _ => {
            let status = Strike::Status(random.pick(&[500, 502, 503]));
            let strikes = [Strike::Cut, Strike::Reset, Strike::LoseAnswer, Strike::TooMany, status];
            let strike = random.pick(&strikes);
            (None, vec![(0, Event::Strike(end, strike, random.between(1, 5)))])
        }
    }
}

/// Four or five jobs of different kinds, of which two want the same tag.
fn jobs(random: &mut Random) -> Vec<Job> {
    let at = |random: &mut Random| Duration::from_millis(random.below(1500));
    let mut jobs = Vec::new();
    for number in 0..random.between(2, 4) {
        let end = random.pick(&[Place::To, Place::To, Place::From]);
        let repository = random.pick(&["one", "two"]);
        jobs.push(Job {
            at: at(random),
            after: None,
            source: random.pick(&[Source::Registry, Source::Registry, Source::File]),
            image: random.index(IMAGES),
            chain: random.index(CHAINS.len()),
            target: Target::Tag(end, repository, format!("t{number}")),
        });
    }
    if random.below(3) == 0 {
        // The last one compresses, which means nothing there.
        let (image, chain) = (random.index(IMAGES), random.index(CHAINS.len() - 1));
        let (source, target) = (Source::Registry, Target::File);
        jobs.push(Job { at: at(random), after: None, source, image, chain, target });
    }
    // One after the other, so that the second has the last word, or both at once.
    let first = jobs.len();
    let after = random.pick(&[None, Some(first)]);
    let (image, chain) = (random.index(IMAGES), random.index(CHAINS.len()));
    let target = Target::Tag(Place::To, "one", "latest".to_owned());
    let source = Source::Registry;
    jobs.push(Job { at: at(random), after: None, source, image, chain, target: target.clone() });
    // Another image, so that the outcomes differ.
    let image = (image + 1) % IMAGES;
    jobs.push(Job { at: at(random), after, source, image, chain, target });
    jobs
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "the schedule of seed {}, with {} workers and {} coordinators:",
            self.seed, self.workers, self.coordinators
        )?;
        for (number, job) in self.jobs.iter().enumerate() {
            writeln!(f, "  job {number}: {job:?}, {:?}", CHAINS[job.chain])?;
        }
        for (at, event) in &self.events {
            writeln!(f, "  {at:>8.2?} {event:?}")?;
        }
        Ok(())
    }
}
