//! The clients of one schedule, a thread each: they submit a job until it is accepted, watch it to its end, and submit it once more
//! where a registry's fault has ended it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::image::json_of;
use occy_tests::occyctl::{Ended, locally};
use serde_json::Value;

use super::image::CHAINS;
use super::plan::Plan;

/// How long a job may take, from its submission to its end.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(50);

pub(super) struct Clients<'a> {
    plan: &'a Plan,
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

/// What came of a job.
pub(super) struct End {
    /// How often it was submitted.
    pub(super) submissions: usize,
    /// How often it was begun, of all submissions.
    pub(super) attempts: u64,
    /// As it is told in the end.
    pub(super) job: Value,
}

impl<'a> Clients<'a> {
    pub(super) fn new(plan: &'a Plan, urls: Vec<String>, sources: Vec<String>, targets: Vec<String>) -> Self {
        let have_ended = plan.jobs.iter().map(|_| AtomicBool::new(false)).collect();
        let (asked, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { plan, urls, asked, sources, targets, have_ended, is_over }
    }

    /// Has a job done, from its time on.
    pub(super) fn see_through(&self, number: usize, start: Instant) -> End {
        let job = &self.plan.jobs[number];
        sleep(job.at.saturating_sub(start.elapsed()));
        if let Some(before) = job.after {
            wait_until("the job before has ended", || self.have_ended[before].load(Ordering::Relaxed));
        }
        let mut end = End { submissions: 0, attempts: 0, job: Value::Null };
        loop {
            end.submissions += 1;
            let id = self.submit(number, end.submissions);
            end.job = self.watch(&id);
            end.attempts += end.job["attempts"].as_u64().expect("a number");
            if end.job["state"] == "succeeded" {
                break;
            }
            let is_explained = self.plan.strikes_registries() && end.job["error"]["retryable"] == true;
            let is_first = end.submissions == 1;
            assert!(is_explained && is_first, "job {number} has failed: {}", end.job);
            wait_until("the faults are over", || self.is_over.load(Ordering::Relaxed));
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
        let arguments = [&arguments, CHAINS[self.plan.jobs[number].chain]].concat();
        // Whether an answer that was lost was a yes is for the key to say.
        let accepted = self.run(&arguments).json();
        accepted["id"].as_str().expect("an id").to_owned()
    }

    /// Follows a job over all that becomes of its coordinator; gives it as it is in the end.
    fn watch(&self, id: &str) -> Value {
        let start = Instant::now();
        loop {
            let watched = self.attempt(&["job", "watch", id]);
            let text = watched.text();
            let events = text.lines().map(|line| json_of(line.as_bytes()));
            let sequences: Vec<u64> =
                events.filter_map(|event| event["sequence"].as_u64()).filter(|number| *number > 0).collect();
            let dense = (1..).take(sequences.len());
            assert!(sequences.iter().copied().eq(dense), "each event once, in order: {text}");
            let job = self.run(&["job", "get", id]).json();
            if ["succeeded", "failed", "cancelled"].iter().any(|state| job["state"] == *state) {
                return job;
            }
            assert!(start.elapsed() < LIMIT, "{id} does not end: {job}");
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
            assert!(is_lost && start.elapsed() < LIMIT, "{}: {}", ended.what, ended.stderr);
            sleep(PAUSE);
        }
    }

    /// Asks one coordinator, and the next one the next time: each knows all jobs.
    fn attempt(&self, arguments: &[&str]) -> Ended {
        let json = ["--output-format", "json"];
        let url = &self.urls[self.asked.fetch_add(1, Ordering::Relaxed) % self.urls.len()];
        locally([arguments, &json].concat()).env("OCCYSTRAP_COORDINATOR", url).run()
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "{what}");
        sleep(PAUSE);
    }
}
