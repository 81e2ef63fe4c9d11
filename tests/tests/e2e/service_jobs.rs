//! Jobs: accepted once, watched from anywhere, cancelled, and gone on with whatever becomes of their coordinator.

use std::sync::Arc;
use std::time::Duration;

use occy_tests::coordinator::Coordinator;
use occy_tests::http::Request;
use occy_tests::image::Image;
use occy_tests::judge;
use occy_tests::layer::Layer;
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{Barrier, Fault, FaultProxy, change, status};
use occy_tests::registry::Registry;
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::small;

pub(crate) fn submit(coordinator: &Coordinator, spec: &Value) -> Value {
    let job = coordinator.ask("SubmitJob", &json!({"spec": spec})).one();
    json!({"job_id": job["job"]["id"]})
}

pub(crate) fn state(coordinator: &Coordinator, id: &Value) -> String {
    job(coordinator, id)["state"].as_str().expect("a state").to_owned()
}

pub(crate) fn job(coordinator: &Coordinator, id: &Value) -> Value {
    coordinator.ask("GetJob", id).one()["job"].clone()
}

/// Events with a sequence, which progress has not.
pub(crate) fn events(messages: &[Value]) -> Vec<&Value> {
    messages.iter().map(|message| &message["event"]).filter(|event| sequence(event) > 0).collect()
}

fn sequence(event: &Value) -> u64 {
    event["sequence"].as_str().and_then(|number| number.parse().ok()).unwrap_or_default()
}

#[test]
fn a_job_is_accepted_once_and_tells_all_that_happens_to_it() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let filters = ["normalize-timestamps", "search:pattern=*.conf", "inspect:file=out.jsonl"];
    let spec = json!({"source": source, "destination": to.uri("app:1"), "filters": filters});
    let coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let submission = json!({"spec": spec, "idempotency_key": "one"});
    let first = coordinator.ask("SubmitJob", &submission).one();
    let second = coordinator.ask("SubmitJob", &submission).one();
    assert_eq!(first["job"]["id"], second["job"]["id"]);
    let other = json!({"spec": {"source": source, "destination": to.uri("app:2")}, "idempotency_key": "one"});
    coordinator.ask("SubmitJob", &other).fails("ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED");

    let id = json!({"job_id": first["job"]["id"]});
    let messages = coordinator.ask("WatchJob", &id).all();
    let told = events(&messages);
    let sequences: Vec<_> = told.iter().map(|event| sequence(event)).collect();
    assert_eq!(sequences, (1..=sequences.len() as u64).collect::<Vec<_>>(), "dense");
    let states: Vec<_> = told.iter().filter_map(|event| event["state_changed"]["state"].as_str()).collect();
    assert_eq!(states, ["JOB_STATE_RUNNING", "JOB_STATE_FINALIZING", "JOB_STATE_SUCCEEDED"]);
    let found: Vec<_> = told.iter().filter_map(|event| event.get("filter_output")).collect();
    assert!(found[0]["text"].as_str().expect("text").contains("etc/app.conf"));
    assert_eq!((&found[0]["filter"], found[0].get("append_to")), (&json!(1), None));
    assert_eq!((&found[1]["filter"], &found[1]["append_to"]), (&json!(2), &json!("out.jsonl")));

    // Who comes back gets the rest and nothing twice.
    for after in [0, 3, sequences.len()] {
        let request = json!({"job_id": id["job_id"], "after_sequence": after});
        let rest = coordinator.ask("WatchJob", &request).all();
        assert_eq!(events(&rest), told[after..]);
    }
    let beyond = json!({"job_id": id["job_id"], "after_sequence": 1000});
    coordinator.ask("WatchJob", &beyond).fails("OUT_OF_RANGE", "BEYOND_EVENTS");

    let job = job(&coordinator, &id);
    assert_eq!(job["result"]["manifest_digest"], to.digest("app", "1"));
    for layer in job["layers"].as_array().expect("layers") {
        assert_eq!((&layer["state"], &layer["changed"]), (&json!("LAYER_STATE_DONE"), &json!(true)));
        assert!(to.has_blob("app", layer["digest"].as_str().expect("a digest")));
    }
    judge::skopeo_reads(&format!("docker://{}/app:1", to.host()));
}

#[test]
fn jobs_are_listed_in_pages_the_newest_first() {
    let from = Registry::start();
    let source = from.push(&small(), "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let mut ids = Vec::new();
    for tag in 0..5 {
        let id =
            submit(&coordinator, &json!({"source": source, "destination": from.uri(&format!("app:{tag}"))}));
        coordinator.ask("WatchJob", &id).all();
        ids.insert(0, id["job_id"].clone());
    }
    let mut listed = Vec::new();
    let mut token = String::new();
    loop {
        let page = coordinator.ask("ListJobs", &json!({"page_size": 2, "page_token": token})).one();
        let jobs = page["jobs"].as_array().expect("jobs");
        assert!(jobs.len() <= 2);
        listed.extend(jobs.iter().map(|job| job["id"].clone()));
        token = page["next_page_token"].as_str().expect("text").to_owned();
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, ids);
    let none = coordinator.ask("ListJobs", &json!({"states": ["JOB_STATE_FAILED"]})).one();
    assert_eq!(none["jobs"], json!([]));
    coordinator.ask("ListJobs", &json!({"page_token": "x"})).fails("INVALID_ARGUMENT", "INVALID_FIELD");
    let unknown = json!({"job_id": "00000000-0000-7000-8000-000000000000"});
    for method in ["GetJob", "WatchJob", "CancelJob"] {
        coordinator.ask(method, &unknown).fails("NOT_FOUND", "NO_SUCH_JOB");
    }
}

#[test]
fn jobs_have_their_turn_by_priority() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "0", "--running-jobs", "1"]);
    let submitted = |tag: &str, priority: i32| {
        let destination = registry.uri(&format!("out:{tag}"));
        submit(&coordinator, &json!({"source": source, "destination": destination, "priority": priority}))
    };
    // The first has its turn at once, and waits for a worker.
    let first = submitted("first", -100);
    while state(&coordinator, &first) == "JOB_STATE_QUEUED" {
        std::thread::sleep(Duration::from_millis(20));
    }
    let (late, middle, urgent) = (submitted("late", -1), submitted("middle", 0), submitted("urgent", 2));
    let _worker = Worker::start(&coordinator, &["--slots", "1"]);
    let jobs = [first, urgent, middle, late].map(|id| {
        coordinator.ask("WatchJob", &id).all();
        job(&coordinator, &id)
    });
    let ended: Vec<_> = jobs.iter().map(|job| job["update_time"].as_str().expect("a time")).collect();
    assert!(ended.is_sorted(), "{ended:?}");
    let beyond = json!({"spec": {"source": source, "destination": registry.uri("out:x"), "priority": 101}});
    coordinator.ask("SubmitJob", &beyond).fails("INVALID_ARGUMENT", "INVALID_FIELD");
}

#[test]
fn a_job_that_fails_says_why_and_leaves_the_tag_as_it_was() {
    let (from, to) = (Registry::start(), Registry::start());
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let old = to.push(&small(), "app", "1");
    let id = submit(&coordinator, &json!({"source": from.uri("app:none"), "destination": old}));
    let last = coordinator.ask("WatchJob", &id).all().pop().expect("an event");
    let error = &last["event"]["state_changed"]["error"];
    assert_eq!((&error["code"], &error["reason"]), (&json!(5), &json!("NOT_IN_REGISTRY")), "{error}");
    assert_eq!((&job(&coordinator, &id)["error"], &error["retryable"]), (error, &json!(false)));
    assert_eq!(to.digest("app", "1"), small().digest());
}

#[test]
fn a_blob_that_the_registry_loses_before_the_end_fails_the_job_and_leaves_the_tag_as_it_was() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let filter = "normalize-timestamps";
    occyctl(["process", &source, &to.uri("local:1"), "-f", filter]).ok();
    let expected = to.pull("local", "1");
    let digest = |part: &Value| part["digest"].as_str().expect("a digest").to_owned();
    let (config, layer) = (digest(&expected.document["config"]), digest(&expected.document["layers"][1]));
    let proxy = FaultProxy::before(to.host());
    let on = |digest: &str| format!("/v2/app/blobs/{digest}");
    let old = to.push(&Image::docker(vec![Layer::noise(1, 100)]), "app", "1");
    let old = (old, to.digest("app", "1"));
    let spec = json!({
        "source": source,
        "destination": old.0.replace(to.host(), &proxy.host()),
        "filters": [filter],
    });
    // The config is asked for when all layers are there, and once more when it is.
    let lose: Fault = {
        let path = on(&layer);
        Arc::new(move |request, upstream| {
            assert_eq!(upstream(&Request::new("DELETE", &path)).status, 202);
            upstream(request)
        })
    };
    let shrink = change(|response| response.replace("Content-Length", "7"));
    for (skip, at, fault, lost) in
        [(0, &config, lose, &layer), (0, &layer, shrink, &layer), (1, &config, status(404), &config)]
    {
        proxy.fault_after(skip, 1, "HEAD", &on(at), fault);
        // One that knows of no earlier job, and asks for no layer before the end.
        let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
        let id = submit(&coordinator, &spec);
        coordinator.ask("WatchJob", &id).all();
        assert_eq!(proxy.pending(), 0, "{}", proxy.story());
        let error = &job(&coordinator, &id)["error"];
        assert_eq!((&error["code"], &error["reason"]), (&json!(14), &json!("BLOB_LOST")), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(lost.as_str())), "{error}");
        assert_eq!(error["retryable"], true);
        assert_eq!(to.digest("app", "1"), old.1);
        proxy.heal();
    }
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let again = submit(&coordinator, &spec);
    coordinator.ask("WatchJob", &again).all();
    assert_eq!(to.pull("app", "1").digest, expected.digest);
}

#[test]
fn a_cancelled_job_stops_and_gives_its_worker_back() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let proxy = FaultProxy::before(from.host());
    let barrier = Barrier::default();
    let image = small();
    let first = format!("*/blobs/{}", image.layer_digests()[0]);
    proxy.fault(1, "GET", &first, barrier.fault());
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let stalled = source.replace(from.host(), &proxy.host());
    let spec =
        json!({"source": stalled, "destination": to.uri("app:1"), "filters": ["normalize-timestamps"]});
    let id = submit(&coordinator, &spec);
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_RUNNING");
    let cancelled = coordinator.ask("CancelJob", &id).one();
    assert_eq!(cancelled["job"]["state"], "JOB_STATE_CANCELLED");
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_CANCELLED");
    assert_eq!(watcher.next_message(), None, "the stream ends with the job");
    // The one worker is free for another job, though the registry still does not answer.
    let next = submit(&coordinator, &json!({"source": source, "destination": to.uri("app:2")}));
    coordinator.ask("WatchJob", &next).all();
    assert_eq!(state(&coordinator, &next), "JOB_STATE_SUCCEEDED");
    assert!(!to.has("app", "1"));
    assert_eq!(coordinator.ask("CancelJob", &next).one()["job"]["state"], "JOB_STATE_SUCCEEDED");
    barrier.open();
}

/// An image of which all layers but one, which waits behind the barrier, come to the destination.
pub(crate) struct Halfway {
    from: Registry,
    pub(crate) to: Registry,
    pub(crate) source: FaultProxy,
    destination: FaultProxy,
    pub(crate) barrier: Barrier,
    /// The layers that come to the destination while the barrier is shut.
    pub(crate) done: Vec<String>,
    expected: String,
    pub(crate) spec: Value,
}

impl Halfway {
    pub(crate) fn new() -> Self {
        let (from, to) = (Registry::start(), Registry::start());
        let layers: Vec<_> = (0..5).map(|seed| Layer::noise(seed as u64, 40_000 + 1000 * seed)).collect();
        let image = Image::docker(layers);
        let uri = from.push(&image, "app", "1");
        occyctl(["process", &uri, &to.uri("local:1"), "-f", "normalize-timestamps"]).ok();
        let (source, destination) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
        let barrier = Barrier::default();
        // The smallest, so the last one to be begun.
        source.fault(1, "GET", &format!("*/blobs/{}", image.layer_digests()[0]), barrier.fault());
        let spec = json!({
            "source": format!("registry://{}/app:1", source.host()),
            "destination": format!("registry://{}/app:1", destination.host()),
            "filters": ["normalize-timestamps", "inspect:file=x"],
            "verify_diff_ids": true,
        });
        let expected = to.digest("local", "1");
        let done = image.layer_digests().split_off(1);
        Self { from, to, source, destination, barrier, done, expected, spec }
    }

    /// Waits until four of five layers are done.
    pub(crate) fn wait_for_four(coordinator: &Coordinator, id: &Value) {
        let mut watcher = coordinator.call("WatchJob", id).start();
        for _ in 0..4 {
            watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_DONE");
        }
    }

    pub(crate) fn check(&self, coordinator: &Coordinator, id: &Value) {
        let job = job(coordinator, id);
        assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job}");
        assert_eq!(job["result"]["manifest_digest"], self.expected);
        assert_eq!(self.to.digest("app", "1"), self.expected);
        judge::skopeo_reads(&format!("docker://{}/app:1", self.to.host()));
    }
}

#[test]
fn a_coordinator_that_is_killed_goes_on_from_the_layers_that_are_written() {
    let case = Halfway::new();
    let mut coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let id = submit(&coordinator, &case.spec);
    Halfway::wait_for_four(&coordinator, &id);
    let seen = events(&coordinator.call("WatchJob", &id).with("timeout", 1).run().messages).len();
    coordinator.kill();
    case.barrier.open();
    case.source.heal();
    case.source.forget();
    case.destination.forget();
    coordinator.restart();
    // The watcher goes on where it was.
    let request = json!({"job_id": id["job_id"], "after_sequence": seen});
    let rest = coordinator.ask("WatchJob", &request).all();
    let rest = events(&rest);
    assert_eq!(sequence(rest[0]), seen as u64 + 1);
    assert_eq!(rest[0]["state_changed"]["state"], "JOB_STATE_QUEUED");
    case.check(&coordinator, &id);
    assert_eq!(job(&coordinator, &id)["attempts"], 2);
    for done in &case.done {
        let read = case.source.count("GET", &format!("*/blobs/{done}"));
        assert_eq!(read, 0, "{done} was read again:\n{}", case.source.story());
    }
    let uploads = case.destination.count("POST", "*/blobs/uploads/");
    assert_eq!(uploads, 2, "a layer and the config:\n{}", case.destination.story());
    // What the filters found in layers that were not read again is there all the same.
    let found: Vec<_> = rest.iter().filter_map(|event| event["filter_output"]["text"].as_str()).collect();
    assert_eq!(found.concat().matches("\"DiffId\"").count(), 5, "{found:?}");
}

#[test]
fn a_coordinator_that_is_killed_while_it_finalizes_finishes_later() {
    let case = Halfway::new();
    case.barrier.open();
    let put = Barrier::default();
    case.destination.fault(1, "PUT", "*/manifests/*", put.fault());
    let mut coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let id = submit(&coordinator, &case.spec);
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_FINALIZING");
    let refused = coordinator.ask("CancelJob", &id).one();
    assert_eq!(refused["job"]["state"], "JOB_STATE_FINALIZING", "too late to cancel");
    coordinator.kill();
    assert!(!case.to.has("app", "1"), "nothing is visible yet");
    put.open();
    case.destination.heal();
    case.source.forget();
    coordinator.restart();
    coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    assert_eq!(case.source.count("GET", "*/blobs/*"), 1, "the config:\n{}", case.source.story());
}

#[test]
fn a_coordinator_that_is_stopped_lets_layers_end_and_leaves_the_rest_for_later() {
    let case = Halfway::new();
    let mut coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let waiting = json!({"source": case.from.uri("app:1"), "destination": case.to.uri("later:1")});
    let id = submit(&coordinator, &case.spec);
    Halfway::wait_for_four(&coordinator, &id);
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_DONE");
    // It has the only worker.
    let later = submit(&coordinator, &waiting);
    coordinator.terminate();
    let error = watcher.wait_for(|message| message.get("error").is_some());
    assert_eq!(error["error"]["code"], "UNAVAILABLE");
    case.barrier.open();
    assert!(coordinator.ended().success());
    coordinator.restart();
    for id in [&id, &later] {
        coordinator.ask("WatchJob", id).all();
    }
    case.check(&coordinator, &id);
    assert_eq!(state(&coordinator, &later), "JOB_STATE_SUCCEEDED");
    assert_eq!(case.to.digest("later", "1"), case.from.digest("app", "1"));
}

#[test]
fn too_many_jobs_are_refused_and_a_full_queue_runs_dry() {
    let case = Halfway::new();
    let coordinator =
        Coordinator::start(&["--embedded-workers", "1", "--max-jobs", "2", "--running-jobs", "1"]);
    let first = submit(&coordinator, &case.spec);
    let second = json!({"source": case.from.uri("app:1"), "destination": case.to.uri("second:1")});
    let second = submit(&coordinator, &second);
    let third = json!({"spec": case.spec});
    coordinator.ask("SubmitJob", &third).fails("RESOURCE_EXHAUSTED", "TOO_MANY");
    assert_eq!(state(&coordinator, &second), "JOB_STATE_QUEUED");
    case.barrier.open();
    for id in [&first, &second] {
        coordinator.ask("WatchJob", id).all();
        assert_eq!(state(&coordinator, id), "JOB_STATE_SUCCEEDED");
    }
    assert_eq!(coordinator.ask("SubmitJob", &third).error, None);
}
