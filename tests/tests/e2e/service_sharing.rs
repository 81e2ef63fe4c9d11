//! A layer that several want is done once, wherever they run, and by whoever is there when the one who did it is not any more.

use std::thread::sleep;
use std::time::Duration;

use occy_tests::coordinator::Coordinator;
use occy_tests::http::Request;
use occy_tests::judge;
use occy_tests::nats::Nats;
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{Barrier, FaultProxy, status};
use occy_tests::registry::Registry;
use occy_tests::worker::PythonWorker;
use serde_json::{Value, json};

use crate::service_telemetry::{metrics, value};
use crate::small;

const FILTERS: [&str; 2] = ["normalize-timestamps", "search:pattern=*.conf"];

/// A source and a destination, each behind a proxy.
struct Setting {
    _from: Registry,
    to: Registry,
    source: FaultProxy,
    destination: FaultProxy,
    /// What every job's image has to become.
    expected: String,
    layers: Vec<String>,
    /// How often each layer is read for one job: looking for something to edit, and then again.
    once: Vec<usize>,
}

impl Setting {
    fn new() -> Self {
        let (from, to) = (Registry::start(), Registry::start());
        let uri = from.push(&small(), "app", "1");
        let (source, destination) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
        let (uri, local) = (uri.replace(from.host(), &source.host()), to.uri("local:1"));
        let filters = FILTERS.iter().flat_map(|filter| ["-f", filter]);
        occyctl(["process", &uri, &local].into_iter().chain(filters)).ok();
        let expected = to.digest("local", "1");
        let layers = small().layer_digests();
        let mut setting = Self { _from: from, to, source, destination, expected, layers, once: Vec::new() };
        setting.once = setting.reads();
        setting.source.forget();
        setting
    }

    fn spec(&self, to: &str) -> Value {
        json!({
            "source": format!("registry://{}/app:1", self.source.host()),
            "destination": format!("registry://{}/{to}:1", self.destination.host()),
            "filters": FILTERS,
        })
    }

    /// Submits a job, and waits until its layers are known.
    fn submit(&self, coordinator: &Coordinator, to: &str) -> Value {
        let job = coordinator.ask("SubmitJob", &json!({"spec": self.spec(to)})).one();
        let id = json!({"job_id": job["job"]["id"]});
        let mut watcher = coordinator.call("WatchJob", &id).start();
        watcher.wait_for(|message| message["event"].get("layers_planned").is_some());
        id
    }

    /// How often each layer was read.
    fn reads(&self) -> Vec<usize> {
        let reads = |digest: &String| self.source.count("GET", &format!("*/blobs/{digest}"));
        self.layers.iter().map(reads).collect()
    }

    fn is_there(&self, name: &str) {
        assert_eq!(self.to.pull(name, "1").digest, self.expected);
        judge::skopeo_reads(&format!("docker://{}/{name}:1", self.to.host()));
    }
}

/// The state in which a job ends, and what its filters found.
fn end(coordinator: &Coordinator, id: &Value) -> (String, String) {
    let events = coordinator.ask("WatchJob", id).all();
    let found = events.iter().filter_map(|message| message["event"]["filter_output"]["text"].as_str());
    let found = found.collect::<Vec<_>>().concat();
    let last = &events.last().expect("an end")["event"]["state_changed"]["state"];
    (last.as_str().expect("a state").to_owned(), found)
}

#[test]
fn a_layer_that_several_want_is_read_once_and_mounted_for_the_others() {
    let setting = Setting::new();
    let barrier = Barrier::default();
    for layer in &setting.layers {
        setting.source.fault(1, "GET", &format!("*/blobs/{layer}"), barrier.fault());
    }
    let coordinator = Coordinator::start(&["--embedded-workers", "4"]);
    let at_once = ["one", "two", "three"];
    let ids = at_once.map(|name| setting.submit(&coordinator, name));
    barrier.open();
    let ends = ids.map(|id| end(&coordinator, &id));
    assert!(ends[0].1.contains("etc/app.conf"));
    for (state, found) in &ends {
        assert_eq!((state.as_str(), found), ("JOB_STATE_SUCCEEDED", &ends[0].1), "each knows what was found");
    }
    // One after the other, and a call as well as a job.
    let later = setting.submit(&coordinator, "later");
    assert_eq!(end(&coordinator, &later), ends[0]);
    coordinator.ask("ProcessImage", &setting.spec("call")).all();
    assert_eq!(setting.reads(), setting.once, "{}", setting.source.story());
    for name in at_once.iter().chain(&["later", "call"]) {
        setting.is_there(name);
    }
    let moved = setting.destination.count("PUT", "*/blobs/uploads/*");
    assert_eq!(moved, 2 + 5, "two layers and five configs:\n{}", setting.destination.story());
}

#[test]
fn whoever_waited_goes_on_when_the_one_at_work_is_cancelled_or_fails() {
    for is_cancelled in [true, false] {
        let setting = Setting::new();
        let barrier = Barrier::default();
        for layer in &setting.layers {
            setting.source.fault(1, "GET", &format!("*/blobs/{layer}"), barrier.fault());
        }
        let coordinator = Coordinator::start(&["--embedded-workers", "4"]);
        let first = setting.submit(&coordinator, "one");
        let mut watcher = coordinator.call("WatchJob", &first).start();
        watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_RUNNING");
        let second = setting.submit(&coordinator, "two");
        if is_cancelled {
            coordinator.ask("CancelJob", &first).one();
        } else {
            setting.destination.fault(9, "POST", "/v2/one/*", status(403));
            barrier.open();
            assert_eq!(end(&coordinator, &first).0, "JOB_STATE_FAILED");
        }
        assert_eq!(end(&coordinator, &second).0, "JOB_STATE_SUCCEEDED");
        setting.is_there("two");
        assert!(!setting.to.has("one", "1"));
        barrier.open();
    }
}

#[test]
fn what_the_destination_does_not_have_any_more_is_done_again() {
    let setting = Setting::new();
    let coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let first = setting.submit(&coordinator, "one");
    assert_eq!(end(&coordinator, &first).0, "JOB_STATE_SUCCEEDED");
    for layer in setting.to.pull("one", "1").document["layers"].as_array().expect("layers") {
        let path = format!("/v2/one/blobs/{}", layer["digest"].as_str().expect("a digest"));
        assert_eq!(setting.to.send(Request::new("DELETE", &path)).status, 202);
    }
    for name in ["one", "two"] {
        let again = setting.submit(&coordinator, name);
        assert_eq!(end(&coordinator, &again).0, "JOB_STATE_SUCCEEDED");
        setting.is_there(name);
    }
    let twice: Vec<_> = setting.once.iter().map(|reads| 2 * reads).collect();
    assert_eq!(setting.reads(), twice, "and shared again:\n{}", setting.source.story());
}

/// One of several coordinators.
fn replica(nats: &Nats) -> Coordinator {
    let url = nats.url();
    let engine = ["--engine", &url, "--engine-lease", "2"];
    Coordinator::start(
        &[&engine[..], &["--embedded-workers", "4", "--metrics-listen", "127.0.0.1:0"]].concat(),
    )
}

#[test]
fn a_layer_that_jobs_of_two_coordinators_want_is_read_and_written_once() {
    let (setting, nats) = (Setting::new(), Nats::start());
    let barrier = Barrier::default();
    for layer in &setting.layers {
        setting.source.fault(1, "GET", &format!("*/blobs/{layer}"), barrier.fault());
    }
    let (one, two) = (replica(&nats), replica(&nats));
    let at_once = [(&one, "one"), (&two, "two"), (&one, "three"), (&two, "four")];
    let ids = at_once.map(|(coordinator, name)| (coordinator, setting.submit(coordinator, name)));
    sleep(Duration::from_millis(500));
    barrier.open();
    let ends = ids.map(|(coordinator, id)| end(coordinator, &id));
    assert!(ends[0].1.contains("etc/app.conf"));
    for (state, found) in &ends {
        assert_eq!((state.as_str(), found), ("JOB_STATE_SUCCEEDED", &ends[0].1), "each knows what was found");
    }
    // And who comes later, wherever it was done.
    for (coordinator, name) in [(&one, "five"), (&two, "six")] {
        assert_eq!(end(coordinator, &setting.submit(coordinator, name)), ends[0]);
    }
    assert_eq!(setting.reads(), setting.once, "{}", setting.source.story());
    for name in ["one", "two", "three", "four", "five", "six"] {
        setting.is_there(name);
    }
    let moved = setting.destination.count("PUT", "*/blobs/uploads/*");
    assert_eq!(moved, 2 + 6, "two layers and six configs:\n{}", setting.destination.story());
    let told = [&one, &two].map(metrics);
    let shared = |by| {
        let name = format!("occystrap_layers_shared_total{{coordinator=\"{by}\"}}");
        told.iter().map(|told| value(told, &name)).sum::<f64>()
    };
    // Of two layers in each of six jobs; of one coordinator at least, each job has to hear of each from the other one.
    assert_eq!(shared("same") + shared("other"), 10.0);
    assert!(shared("other") >= 2.0, "{told:?}");
    for told in &told {
        assert_eq!(value(told, "occystrap_layers_repeated_total"), 0.0);
    }
}

#[test]
fn a_layer_whose_coordinator_is_killed_at_work_is_done_by_the_one_that_waited() {
    let (setting, nats) = (Setting::new(), Nats::start());
    let barrier = Barrier::default();
    for layer in &setting.layers {
        setting.source.fault(1, "GET", &format!("*/blobs/{layer}"), barrier.fault());
    }
    let mut one = replica(&nats);
    let first = setting.submit(&one, "one");
    while setting.source.pending() > 0 {
        sleep(Duration::from_millis(10));
    }
    let two = replica(&nats);
    let second = setting.submit(&two, "two");
    sleep(Duration::from_secs(1));
    assert_eq!(setting.reads(), [0, 0], "nobody else reads them:\n{}", setting.source.story());
    one.kill();
    for (id, name) in [(&second, "two"), (&first, "one")] {
        assert_eq!(end(&two, id).0, "JOB_STATE_SUCCEEDED");
        setting.is_there(name);
    }
    assert_eq!(setting.reads(), setting.once, "{}", setting.source.story());
    let moved = setting.destination.count("PUT", "*/blobs/uploads/*");
    assert_eq!(moved, 2 + 2, "two layers and two configs:\n{}", setting.destination.story());
    barrier.open();
}

#[test]
fn a_new_version_of_a_workers_filter_is_not_given_what_an_old_one_made() {
    let (from, to) = (Registry::start(), Registry::start());
    let uri = from.push(&small(), "app", "1");
    let source = FaultProxy::before(from.host());
    let coordinator = Coordinator::start(&["--embedded-workers", "0", "--lease", "2"]);
    let read = |name: &str| {
        let spec = json!({
            "source": uri.replace(from.host(), &source.host()),
            "destination": to.uri(&format!("{name}:1")),
            "filters": ["shout"],
            "compression": "gzip",
        });
        source.forget();
        let job = coordinator.ask("SubmitJob", &json!({"spec": spec})).one();
        assert_eq!(end(&coordinator, &json!({"job_id": job["job"]["id"]})).0, "JOB_STATE_SUCCEEDED");
        small()
            .layer_digests()
            .iter()
            .map(|layer| source.count("GET", &format!("*/blobs/{layer}")))
            .sum::<usize>()
    };
    let old = PythonWorker::start(&coordinator, &["--filter-version", "1"]);
    assert_eq!(read("one"), 2);
    assert_eq!(read("two"), 0);
    drop(old);
    coordinator.wait_for_log("a worker has gone", Duration::from_secs(20));
    let _new = PythonWorker::start(&coordinator, &["--filter-version", "2"]);
    assert_eq!(read("three"), 2);
    assert_eq!(read("four"), 0);
}
