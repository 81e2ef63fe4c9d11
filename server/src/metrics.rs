//! What a coordinator counts: what happens, when it happens; what is the case in the fleet, when somebody asks.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use occy_proto::v1::{Job, JobState};
use occy_worker::metrics::put;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::budget::Limited;
use crate::fleet::Fleet;

/// One label with one of a few values.
type Label = [(&'static str, &'static str); 1];

/// Who had a layer done that another one wanted too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedBy {
    /// This coordinator.
    Same,
    /// Another one.
    Other,
}

/// What happens, counted. Clones count into the same.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    jobs: Family<Label, Counter>,
    job_seconds: Histogram,
    layers: Family<Label, Counter>,
    wait_seconds: Histogram,
    layer_seconds: Histogram,
    layers_shared: Family<Label, Counter>,
    layers_repeated: Counter,
    refusals: Counter,
    budget_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        // From 5 ms to 3 hours, and from 5 ms to 23 minutes.
        let (long, short) = (exponential_buckets(0.005, 4.0, 12), exponential_buckets(0.005, 4.0, 10));
        let layers_shared = Family::<Label, Counter>::default();
        // What has not happened yet is zero, and not unknown.
        for by in [SharedBy::Same, SharedBy::Other] {
            drop(layers_shared.get_or_create(&by.label()));
        }
        Self(Arc::new(Counted {
            jobs: Family::default(),
            job_seconds: Histogram::new(long.collect::<Vec<_>>()),
            layers: Family::default(),
            wait_seconds: Histogram::new(short.collect::<Vec<_>>()),
            layer_seconds: Histogram::new(exponential_buckets(0.005, 4.0, 12)),
            layers_shared,
            layers_repeated: Counter::default(),
            refusals: Counter::default(),
            budget_seconds: Histogram::new(exponential_buckets(0.005, 4.0, 10)),
        }))
    }
}

impl SharedBy {
    fn label(self) -> Label {
        let coordinator = match self {
            Self::Same => "same",
            Self::Other => "other",
        };
        [("coordinator", coordinator)]
    }
}

impl Metrics {
    /// A job has changed. It counts if that was its last change.
    pub fn job_changed(&self, job: &Job) {
        let state = match job.state() {
            JobState::Succeeded => "succeeded",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
            _ => return,
        };
        self.0.jobs.get_or_create(&[("state", state)]).inc();
        if let (Some(from), Some(to)) = (&job.create_time, &job.update_time) {
            let seconds = (to.seconds - from.seconds) as f64 + f64::from(to.nanos - from.nanos) / 1e9;
            self.0.job_seconds.observe(seconds);
        }
    }

    /// A layer was not done, for somebody else had it done.
    pub fn layer_shared(&self, by: SharedBy) {
        self.0.layers_shared.get_or_create(&by.label()).inc();
    }

    /// A layer is done here while another coordinator is at work on it, which takes too long.
    pub fn layer_repeated(&self) {
        self.0.layers_repeated.inc();
    }

    /// Registries refused so many requests of the fleet.
    pub fn budget_refused(&self, count: usize) {
        self.0.refusals.inc_by(count as u64);
    }

    /// A request has got its turn at a registry after so long.
    pub fn budget_waited(&self, wait: Duration) {
        self.0.budget_seconds.observe(wait.as_secs_f64());
    }

    /// A layer has got a worker's slot after so long.
    pub fn layer_waited(&self, wait: Duration) {
        self.0.wait_seconds.observe(wait.as_secs_f64());
    }

    /// A worker is done with a layer after so long.
    pub fn layer_ended(&self, succeeded: bool, after: Duration) {
        let result = if succeeded { "done" } else { "failed" };
        self.0.layers.get_or_create(&[("result", result)]).inc();
        self.0.layer_seconds.observe(after.as_secs_f64());
    }
}

/// Adds what a coordinator counts.
pub fn register(all: &mut Registry, fleet: Fleet) {
    let counted = Arc::clone(&fleet.metrics().0);
    all.register("jobs", "Jobs that have come to their end", counted.jobs.clone());
    let help = "From a job's acceptance to its end";
    all.register_with_unit("job_duration", help, Unit::Seconds, counted.job_seconds.clone());
    all.register("layers", "Layers that workers are done with", counted.layers.clone());
    let help = "How long layers waited for a worker";
    all.register_with_unit("layer_wait", help, Unit::Seconds, counted.wait_seconds.clone());
    let help = "How long workers had a layer";
    all.register_with_unit("layer_duration", help, Unit::Seconds, counted.layer_seconds.clone());
    let help = "Layers that were not done again, by whose workers had done them";
    all.register("layers_shared", help, counted.layers_shared.clone());
    let help = "Layers that were begun although another coordinator was at work on them";
    all.register("layers_repeated", help, counted.layers_repeated.clone());
    let help =
        "Requests of the coordinator and its workers that registries refused because there were too many";
    all.register("budget_refusals", help, counted.refusals.clone());
    let help = "How long requests of the coordinator waited for their turn at a registry";
    all.register_with_unit("budget_wait", help, Unit::Seconds, counted.budget_seconds.clone());
    all.register_collector(Box::new(Live(fleet)));
}

/// What is the case now.
#[derive(Debug)]
struct Live(Fleet);

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (to, load) = (&mut encoder, self.0.load());
        put(to, "layers_waiting", "Layers that wait for a worker", None, &ConstGauge::new(load.waiting))?;
        put(to, "layers_running", "Layers that workers have", None, &ConstGauge::new(load.running))?;
        let (help, age) = ("How long the layer that came first has been waiting", load.oldest.as_secs_f64());
        put(to, "queue_age", help, Some(&Unit::Seconds), &ConstGauge::new(age))?;
        put(to, "workers", "Workers", None, &ConstGauge::new(load.workers))?;
        put(
            to,
            "worker_slots",
            "Layers that all workers can have at once",
            None,
            &ConstGauge::new(load.slots),
        )?;
        put(to, "worker_slots_free", "How many more they can take", None, &ConstGauge::new(load.free))?;
        let limited = self.0.budgets().limited();
        let waiting: usize = limited.iter().map(|limited| limited.waiting).sum();
        let help = "Requests that wait for their turn at a registry";
        put(to, "budget_waiting", help, None, &ConstGauge::new(waiting as u64))?;
        let help = "Requests a second that an account may send to a registry, where that is limited";
        let mut rates = to.encode_descriptor("budget_rate", help, None, MetricType::Gauge)?;
        for Limited { host, account, rate, .. } in &limited {
            if let Some(rate) = rate {
                let labels = [("registry", host.as_str()), ("account", account.as_str())];
                ConstGauge::new(*rate).encode(rates.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
