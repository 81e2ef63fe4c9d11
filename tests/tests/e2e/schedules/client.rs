//! Clients: they submit a job until it is accepted, watch it to its end, and submit it again where a registry's fault has ended it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::image::json_of;
use occy_tests::occyctl::{Ended, locally};
use serde_json::Value;

use super::image::CHAINS;
use super::plan::Job;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(50);

pub(super) struct Clients<'a> {
    jobs: &'a [Job],
    rules: Rules,
    /// Of all coordinators.
    urls: Vec<String>,
    /// How often one was asked.
    asked: AtomicUsize,
    /// Of each job.
    pub(super) sources: Vec<String>,
    targets: Vec<String>,
    have_ended: Vec<AtomicBool>,
    /// Whether the last fault is.
    pub(super) is_over: AtomicBool,
}

/// What clients put up with.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// How long a job may take, from its submission to its end, and a question.
    pub(super) limit: Duration,
    /// How often a job may fail by the fault of a registry, and say so.
    pub(super) failures: usize,
    /// Whether it is submitted again only when the last fault is over.
    pub(super) waits: bool,
}

/// What came of a job.
pub(super) struct End {
    /// How often it was submitted.
    pub(super) submissions: usize,
    /// How often it was begun, of all submissions.
    pub(super) attempts: u64,
    /// How often each of its layers was begun, likewise, by its index.
    begun: BTreeMap<u64, usize>,
    /// Whether every watch of it came to its end by itself.
    pub(super) is_undisturbed: bool,
    /// As it is told in the end.
    pub(super) job: Value,
}

impl<'a> Clients<'a> {
    pub(super) fn new(
        jobs: &'a [Job],
        rules: Rules,
        urls: Vec<String>,
        sources: Vec<String>,
        targets: Vec<String>,
    ) -> Self {
        let have_ended = jobs.iter().map(|_| AtomicBool::new(false)).collect();
        let (asked, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { jobs, rules, urls, asked, sources, targets, have_ended, is_over }
    }

    /// Has a job done, from its time on.
    pub(super) fn see_through(&self, number: usize, start: Instant) -> End {
        let job = &self.jobs[number];
        sleep(job.at.saturating_sub(start.elapsed()));
        if let Some(before) = job.after {
            self.wait_until("the job before has ended", || self.have_ended[before].load(Ordering::Relaxed));
        }
        let mut end = End {
            submissions: 0,
            attempts: 0,
            begun: BTreeMap::new(),
            is_undisturbed: true,
            job: Value::Null,
        };
        loop {
            end.submissions += 1;
            let id = self.submit(number, end.submissions);
            end.job = self.watch(&id, &mut end);
            end.attempts += end.job["attempts"].as_u64().expect("a number");
            if end.job["state"] == "succeeded" {
                break;
            }
            let is_explained =
                end.submissions <= self.rules.failures && end.job["error"]["retryable"] == true;
            assert!(is_explained, "job {number} has failed: {}", end.job);
            if self.rules.waits {
                self.wait_until("the faults are over", || self.is_over.load(Ordering::Relaxed));
            }
        }
        self.have_ended[number].store(true, Ordering::Relaxed);
        end
    }

    /// A question that is answered, as JSON.
    pub(super) fn ask(&self, arguments: &[&str]) -> Value {
        self.run(arguments).json()
    }

    fn submit(&self, number: usize, time: usize) -> String {
        let key = format!("job {number}, {time}");
        let (source, target) = (&self.sources[number], &self.targets[number]);
        let arguments = ["job", "submit", source, target, "--idempotency-key", &key];
        let arguments = [&arguments, CHAINS[self.jobs[number].chain]].concat();
        // Whether an answer that was lost was a yes is for the key to say.
        let accepted = self.run(&arguments).json();
        accepted["id"].as_str().expect("an id").to_owned()
    }

    /// Follows a job over all that becomes of its coordinator; gives it as it is in the end.
    fn watch(&self, id: &str, end: &mut End) -> Value {
        let start = Instant::now();
        loop {
            let watched = self.attempt(&["job", "watch", id]);
            let text = watched.text();
            let events: Vec<Value> = text.lines().map(|line| json_of(line.as_bytes())).collect();
            let sequences: Vec<u64> = events
                .iter()
                .filter_map(|event| event["sequence"].as_u64())
                .filter(|number| *number > 0)
                .collect();
            let dense = (1..).take(sequences.len());
            assert!(sequences.iter().copied().eq(dense), "each event once, in order: {text}");
            let job = self.run(&["job", "get", id]).json();
            let is_end =
                |state: &Value| ["succeeded", "failed", "cancelled"].iter().any(|end| *state == **end);
            // One that broke off may not have heard of the end, and is begun anew.
            if is_end(&job["state"]) && events.last().is_some_and(|event| is_end(&event["state"])) {
                end.count(&events);
                return job;
            }
            // One that could not begin, because its coordinator was not there, has broken off nothing.
            end.is_undisturbed &= events.is_empty();
            assert!(start.elapsed() < self.rules.limit, "{id} does not end: {job}");
            sleep(PAUSE);
        }
    }

    /// Asks until there is an answer.
    fn run(&self, arguments: &[&str]) -> Ended {
        let start = Instant::now();
        loop {
            let ended = self.attempt(arguments);
            if ended.status.success() {
                return ended;
            }
            // What it says when there is no coordinator, or none any more, or none that has an engine.
            let is_lost = ["the coordinator", "JetStream"].iter().any(|word| ended.stderr.contains(word));
            assert!(is_lost && start.elapsed() < self.rules.limit, "{}: {}", ended.what, ended.stderr);
            sleep(PAUSE);
        }
    }

    /// Asks one coordinator, and the next one the next time: each knows all jobs.
    fn attempt(&self, arguments: &[&str]) -> Ended {
        let json = ["--output-format", "json"];
        let url = &self.urls[self.asked.fetch_add(1, Ordering::Relaxed) % self.urls.len()];
        locally([arguments, &json].concat()).env("OCCYSTRAP_COORDINATOR", url).run()
    }

    fn wait_until(&self, what: &str, is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < self.rules.limit, "{what}");
            sleep(PAUSE);
        }
    }
}

impl End {
    /// Counts how often layers were begun, of the events of one submission from the first to the last. One that is done without, was
    /// taken from where another job has brought it.
    fn count(&mut self, events: &[Value]) {
        let mut running = BTreeSet::new();
        for event in events {
            let layer = &event["layer"];
            match (layer["index"].as_u64(), layer["state"].as_str()) {
                (Some(index), Some("running")) => {
                    running.insert(index);
                    *self.begun.entry(index).or_default() += 1;
                }
                (Some(index), Some("done")) if !running.remove(&index) => {
                    *self.begun.entry(index).or_default() += 1;
                }
                _ => {}
            }
            if event["state"] == "running" {
                running.clear();
            }
        }
    }

    /// How often each layer was begun, by the digest that it has at the destination.
    pub(super) fn begun(&self) -> impl Iterator<Item = (&str, usize)> {
        self.job["layers"].as_array().into_iter().flatten().filter_map(|layer| {
            let times = self.begun.get(&layer["index"].as_u64()?).copied().unwrap_or(0);
            Some((layer["digest"].as_str()?, times))
        })
    }
}
