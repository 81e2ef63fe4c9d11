//! What a coordinator counts of schedules: the runs and skips that it has written down itself, and how late what is due is.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use occy_worker::metrics::put;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// What is counted. Clones count into the same.
#[derive(Clone, Debug)]
pub struct Counted {
    runs: Counter,
    skips: Counter,
    late: Histogram,
    known: Arc<Mutex<Known>>,
}

/// What is known of the schedules of the engine.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    count: usize,
    /// When the first of them has to be looked at.
    first: Option<Timestamp>,
}

impl Default for Counted {
    fn default() -> Self {
        Self {
            runs: Counter::default(),
            skips: Counter::default(),
            // From 10 ms to 12 hours.
            late: Histogram::new(exponential_buckets(0.01, 4.0, 12)),
            known: Arc::default(),
        }
    }
}

impl Counted {
    /// A run has begun, so long after it should have.
    pub(super) fn begun(&self, late: Option<Duration>) {
        self.runs.inc();
        if let Some(late) = late {
            self.late.observe(late.as_secs_f64());
        }
    }

    /// A time that was due was skipped.
    pub(super) fn skipped(&self) {
        self.skips.inc();
    }

    /// So many schedules there are, and then the first of them has to be looked at.
    pub(super) fn known(&self, count: usize, first: Option<Timestamp>) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Known { count, first };
    }
}

/// Adds what is counted of schedules.
pub fn register(all: &mut Registry, counted: &Counted) {
    all.register("schedule_runs", "Runs of schedules that were begun", counted.runs.clone());
    let help = "Times of schedules that were due and skipped";
    all.register("schedule_skips", help, counted.skips.clone());
    let help = "How long after their time runs of schedules were begun";
    all.register_with_unit("schedule_lateness", help, Unit::Seconds, counted.late.clone());
    all.register_collector(Box::new(Live(counted.clone())));
}

/// What is the case now.
#[derive(Debug)]
struct Live(Counted);

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Known { count, first } = *self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let to = &mut encoder;
        put(
            to,
            "schedules",
            "Schedules, of all coordinators with this engine",
            None,
            &ConstGauge::new(count as u64),
        )?;
        let overdue =
            first.map_or(0.0, |first| Timestamp::now().duration_since(first).as_secs_f64().max(0.0));
        let help = "For how long a schedule has been due that was neither begun nor skipped";
        put(to, "schedule_overdue", help, Some(&Unit::Seconds), &ConstGauge::new(overdue))
    }
}
