//! Random schedules of faults: whatever is killed, stopped, cut off or sent away, and whenever, no job is lost and no tag is ever at
//! an image that is not whole and expected.
//!
//! `plan.rs` draws a schedule from a seed, `stage.rs` runs it; `client.rs` has jobs done meanwhile, `prober.rs` looks at what is
//! visible, `weather.rs` is what requests to registries meet, and `image.rs` what has to come of it all. `fleet/` has a larger stage, on
//! which processes are also cut off from each other, and replaced under load. Faults that are aimed at one
//! moment are in `worker_faults.rs` and `service_jobs.rs`.
//!
//! `OCCY_TEST_SEED` is the first seed, and `OCCY_TEST_SCHEDULES` how many schedules there are, each with a seed of its own.

mod client;
mod fleet;
mod image;
mod plan;
mod prober;
mod stage;
mod weather;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use image::Expected;
use plan::{Event, Plan, Strike};
use stage::Outcome;

/// How many schedules run at once: mostly they wait.
const AT_ONCE: usize = 2;

/// What came of all schedules.
#[derive(Default)]
struct Table {
    schedules: u64,
    shared: u64,
    faults: BTreeMap<&'static str, u64>,
    jobs: usize,
    again: usize,
    attempts: u64,
    readings: u64,
    slowest: f64,
    failed: Vec<u64>,
}

#[test]
fn no_job_is_lost_and_no_tag_is_ever_wrong_whatever_fails() {
    let first = number("OCCY_TEST_SEED", 1);
    let end = first + number("OCCY_TEST_SCHEDULES", 4);
    let (expected, next, table) = (Expected::new(), AtomicU64::new(first), Mutex::new(Table::default()));
    let start = Instant::now();
    let lane = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            let plan = Plan::of(seed);
            let start = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| stage::run(&plan, &expected)));
            let seconds = start.elapsed().as_secs_f64();
            let ended = if outcome.is_ok() { "passed" } else { "FAILED" };
            eprintln!("schedule {seed}: {ended} in {seconds:.1} s");
            if outcome.is_err() {
                eprintln!(
                    "--- it failed in {plan}\n--- OCCY_TEST_SEED={seed} OCCY_TEST_SCHEDULES=1 runs it again"
                );
            }
            table.lock().unwrap_or_else(PoisonError::into_inner).add(&plan, outcome.ok(), seconds);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(lane);
        }
    });
    let table = table.into_inner().unwrap_or_else(PoisonError::into_inner);
    table.print(start.elapsed().as_secs_f64());
    assert!(table.failed.is_empty(), "schedules with these seeds failed: {:?}", table.failed);
    assert!(table.readings > table.schedules, "tags were looked at");
}

#[test]
fn a_seed_gives_the_same_schedule_again() {
    for seed in 1..50 {
        assert_eq!(Plan::of(seed).to_string(), Plan::of(seed).to_string());
    }
    assert_ne!(Plan::of(1).events, Plan::of(2).events);
}

fn number(variable: &str, default: u64) -> u64 {
    let given = std::env::var(variable).ok();
    given.map_or(default, |number| number.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

impl Table {
    fn add(&mut self, plan: &Plan, outcome: Option<Outcome>, seconds: f64) {
        self.schedules += 1;
        self.shared += u64::from(plan.coordinators > 1);
        self.slowest = self.slowest.max(seconds);
        for name in plan.events.iter().filter_map(|(_, event)| name(*event)) {
            *self.faults.entry(name).or_default() += 1;
        }
        match outcome {
            Some(outcome) => {
                self.jobs += outcome.jobs;
                self.again += outcome.again;
                self.attempts += outcome.attempts;
                self.readings += outcome.readings;
            }
            None => self.failed.push(plan.seed),
        }
    }

    /// For `tests/soak/run`, which shows it.
    fn print(&self, seconds: f64) {
        println!("| of {} schedules | times |\n|---|---|", self.schedules);
        let faults = self.faults.iter().map(|(name, times)| (*name, *times));
        let counts = [
            ("schedules with two coordinators", self.shared),
            ("jobs accepted", self.jobs as u64),
            ("jobs that said that a registry failed, and were submitted again", self.again as u64),
            ("jobs begun, with those that went on with another coordinator", self.attempts),
            ("images read from tags meanwhile", self.readings),
            ("schedules failed", self.failed.len() as u64),
        ];
        for (name, times) in faults.chain(counts) {
            println!("| {name} | {times} |");
        }
        let mean = seconds * AT_ONCE as f64 / self.schedules as f64;
        println!("| seconds, {AT_ONCE} at once | {seconds:.0} |");
        println!("| seconds of one schedule: mean, most | {mean:.1}, {:.1} |", self.slowest);
    }
}

/// What a fault is called; None for the end of one.
fn name(event: Event) -> Option<&'static str> {
    match event {
        Event::KillWorker(_) => Some("SIGKILL of a worker"),
        Event::DrainWorker(_) => Some("SIGTERM of a worker"),
        Event::StopWorker(_) => Some("SIGSTOP of a worker past its lease"),
        Event::KillCoordinator(_) => Some("SIGKILL of a coordinator"),
        Event::StopCoordinator(_) => Some("SIGSTOP of a coordinator past its lease"),
        Event::KillEngine => Some("SIGKILL of the engine of two coordinators"),
        Event::KillRegistry(_) => Some("SIGKILL of a registry"),
        Event::Strike(_, Strike::Cut, _) => Some("answers cut off"),
        Event::Strike(_, Strike::Reset, _) => Some("connections reset"),
        Event::Strike(_, Strike::LoseAnswer, _) => Some("answers lost"),
        Event::Strike(_, Strike::TooMany, _) => Some("429"),
        Event::Strike(_, Strike::Status(_), _) => Some("5xx"),
        Event::StartWorker(_)
        | Event::ContinueWorker(_)
        | Event::StartCoordinator(_)
        | Event::ContinueCoordinator(_)
        | Event::StartEngine
        | Event::StartRegistry(_) => None,
    }
}
