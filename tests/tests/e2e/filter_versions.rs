//! A filter that only workers have, of which there are several versions: all layers of an image are made by one.

use std::time::Duration;

use occy_tests::coordinator::Coordinator;
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::worker::PythonWorker;
use serde_json::{Value, json};

use crate::service_jobs::{job, submit};
use crate::small;

/// A job whose first layer was made by version 1, while the other one waits at its source.
struct Case {
    source: FaultProxy,
    barrier: Barrier,
    /// The first layer, at its source.
    made: String,
    coordinator: Coordinator,
    id: Value,
    _ends: (Registry, Registry),
}

impl Case {
    fn begin() -> (Self, PythonWorker) {
        let (from, to) = (Registry::start(), Registry::start());
        let uri = from.push(&small(), "app", "1");
        let source = FaultProxy::before(from.host());
        let [made, held] = &small().layer_digests()[..] else { panic!("two layers") };
        let (made, barrier) = (format!("*/blobs/{made}"), Barrier::default());
        source.fault(1, "GET", &format!("*/blobs/{held}"), barrier.fault());
        let coordinator = Coordinator::start(&["--embedded-workers", "0", "--lease", "2"]);
        let worker = worker(&coordinator, "1");
        let spec = json!({
            "source": uri.replace(from.host(), &source.host()),
            "destination": to.uri("app:1"),
            "filters": ["shout"],
        });
        let id = submit(&coordinator, &spec);
        let mut watcher = coordinator.call("WatchJob", &id).start();
        watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_DONE");
        let case = Self { source, barrier, made, coordinator, id, _ends: (from, to) };
        assert_eq!(case.reads(), 1);
        (case, worker)
    }

    /// How often the first layer was read.
    fn reads(&self) -> usize {
        self.source.count("GET", &self.made)
    }

    /// The job, when it has come to its end.
    fn done(&self) -> Value {
        self.coordinator.ask("WatchJob", &self.id).all();
        self.barrier.open();
        let done = job(&self.coordinator, &self.id);
        assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}\n{}", self.coordinator.log());
        done
    }
}

fn worker(coordinator: &Coordinator, version: &str) -> PythonWorker {
    PythonWorker::start(coordinator, &["--filter-version", version])
}

#[test]
fn what_an_earlier_attempt_made_by_another_version_is_made_again() {
    for (version, reads) in [("1", 1), ("2", 2)] {
        let (mut case, old) = Case::begin();
        case.coordinator.kill();
        drop(old);
        case.coordinator.restart();
        let _new = worker(&case.coordinator, version);
        let done = case.done();
        assert_eq!((&done["attempts"], case.reads()), (&json!(2), reads), "{version}: {done}");
    }
}

#[test]
fn a_job_whose_workers_have_only_another_version_is_begun_again() {
    for is_there_before in [true, false] {
        let (case, old) = Case::begin();
        let new = || worker(&case.coordinator, "2");
        let before = is_there_before.then(new);
        drop(old);
        case.coordinator.wait_for_log("a worker has gone", Duration::from_secs(20));
        let _new = before.unwrap_or_else(new);
        let done = case.done();
        assert_eq!((&done["attempts"], case.reads()), (&json!(2), 2), "{done}");
    }
}

#[test]
fn all_layers_go_to_workers_of_one_version() {
    let (from, to) = (Registry::start(), Registry::start());
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let _workers = ["1", "2"].map(|version| worker(&coordinator, version));
    let spec = json!({
        "source": from.push(&small(), "app", "1"), "destination": to.uri("app:1"), "filters": ["shout"]
    });
    let id = submit(&coordinator, &spec);
    coordinator.ask("WatchJob", &id).all();
    let done = job(&coordinator, &id);
    assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}");
    let layers = done["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 2);
    assert!(layers.iter().all(|layer| layer["worker"] == layers[0]["worker"]), "{done}");
}
