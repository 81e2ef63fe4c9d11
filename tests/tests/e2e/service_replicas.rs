//! Several coordinators with one engine: each accepts, lists, watches and cancels any job, and one runs it, whoever dies.

use std::time::{Duration, Instant};

use occy_tests::coordinator::{self, Coordinator};
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::nats::Nats;
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::service_jobs::{Halfway, events, job, state, submit};
use crate::small;

/// For how long an owner need not be heard of, in seconds.
const LEASE: &str = "2";

/// With workers of its own.
fn replica(nats: &Nats, arguments: &[&str]) -> Coordinator {
    replica_with(nats, "2", arguments)
}

fn replica_with(nats: &Nats, workers: &str, arguments: &[&str]) -> Coordinator {
    let url = nats.url();
    let all = ["--engine", &url, "--engine-lease", LEASE, "--embedded-workers", workers];
    Coordinator::start(&[&all, arguments].concat())
}

fn sequences(events: &[&Value]) -> Vec<u64> {
    let number = |event: &&Value| event["sequence"].as_str().expect("a number").parse().expect("a number");
    events.iter().map(number).collect()
}

fn states(events: &[&Value]) -> Vec<String> {
    let states = events.iter().filter_map(|event| event["state_changed"]["state"].as_str());
    states.map(|state| state.trim_start_matches("JOB_STATE_").to_owned()).collect()
}

#[test]
fn every_coordinator_accepts_lists_watches_and_cancels_every_job() {
    let nats = Nats::start();
    let case = Halfway::new();
    let one = replica(&nats, &[]);
    let submission = json!({"spec": case.spec, "idempotency_key": "key"});
    let id = json!({"job_id": one.ask("SubmitJob", &submission).one()["job"]["id"]});
    Halfway::wait_for_four(&one, &id);
    let two = replica(&nats, &[]);
    let again = two.ask("SubmitJob", &submission).one();
    assert_eq!(again["job"]["id"], id["job_id"]);
    let reused = json!({"spec": {"source": case.spec["source"], "destination": case.to.uri("x:1")}, "idempotency_key": "key"});
    two.ask("SubmitJob", &reused).fails("ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED");
    assert_eq!(state(&two, &id), "JOB_STATE_RUNNING");
    let listed = two.ask("ListJobs", &json!({})).one();
    assert_eq!(listed["jobs"][0]["id"], id["job_id"]);
    // The other one sees how it ends, and the same as who runs it.
    let mut watcher = two.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_DONE");
    case.barrier.open();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_SUCCEEDED");
    case.check(&two, &id);
    let (here, there) = (one.ask("WatchJob", &id).all(), two.ask("WatchJob", &id).all());
    assert_eq!(events(&here), events(&there));

    // Cancelled at one, it stops at the other, and gives its worker back.
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let (proxy, barrier) = (FaultProxy::before(from.host()), Barrier::default());
    proxy.fault(1, "GET", "*/blobs/*", barrier.fault());
    let stalled = source.replace(from.host(), &proxy.host());
    let id = submit(
        &one,
        &json!({"source": stalled, "destination": to.uri("app:1"), "filters": ["normalize-timestamps"]}),
    );
    let mut watcher = two.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_RUNNING");
    assert_eq!(two.ask("CancelJob", &id).one()["job"]["state"], "JOB_STATE_CANCELLED");
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_CANCELLED");
    assert_eq!(watcher.next_message(), None, "the stream ends with the job");
    barrier.open();
    assert_eq!(state(&one, &id), "JOB_STATE_CANCELLED");
    assert!(!to.has("app", "1"));
}

#[test]
fn another_coordinator_finishes_the_job_of_one_that_is_killed_and_a_watcher_sees_every_event_once() {
    let nats = Nats::start();
    let case = Halfway::new();
    let mut one = replica(&nats, &[]);
    let id = submit(&one, &case.spec);
    Halfway::wait_for_four(&one, &id);
    let two = replica(&nats, &[]);
    let mut watcher = two.call("WatchJob", &id).start();
    let mut seen = Vec::new();
    // What has happened up to now comes from the engine: the watcher's coordinator was not there.
    while seen.iter().filter(|event: &&Value| event["layer_changed"]["state"] == "LAYER_STATE_DONE").count()
        < 4
    {
        seen.push(watcher.next_message().expect("an event")["event"].clone());
    }
    one.kill();
    case.barrier.open();
    case.source.heal();
    case.source.forget();
    while let Some(message) = watcher.next_message() {
        seen.push(message["event"].clone());
    }
    let seen: Vec<_> =
        seen.iter().filter(|event| event["sequence"].as_str().is_some_and(|number| number != "0")).collect();
    assert_eq!(sequences(&seen), (1..=seen.len() as u64).collect::<Vec<_>>(), "once, and in order");
    assert_eq!(states(&seen), ["RUNNING", "QUEUED", "RUNNING", "FINALIZING", "SUCCEEDED"]);
    case.check(&two, &id);
    assert_eq!(job(&two, &id)["attempts"], 2);
    for done in &case.done {
        let read = case.source.count("GET", &format!("*/blobs/{done}"));
        assert_eq!(read, 0, "{done} was read again:\n{}", case.source.story());
    }
}

#[test]
fn a_coordinator_that_was_stopped_for_longer_than_its_lease_changes_nothing() {
    let nats = Nats::start();
    let (from, to) = (Registry::start(), Registry::start());
    let image = small();
    let source = from.push(&image, "app", "1");
    let (proxy, barrier) = (FaultProxy::before(to.host()), Barrier::default());
    // All layers are there, and the image is about to be put.
    let config = image.config_digest();
    proxy.fault(1, "HEAD", &format!("*/blobs/{config}"), barrier.fault());
    let one = replica(&nats, &[]);
    let id = submit(
        &one,
        &json!({"source": source, "destination": to.uri("app:1").replace(to.host(), &proxy.host())}),
    );
    let mut watcher = one.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_FINALIZING");
    let start = Instant::now();
    while proxy.pending() > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "{}", proxy.story());
        std::thread::sleep(Duration::from_millis(10));
    }
    one.pause();
    let two = replica(&nats, &[]);
    two.ask("WatchJob", &id).all();
    assert_eq!(state(&two, &id), "JOB_STATE_SUCCEEDED");
    assert_eq!(proxy.count("PUT", "*/manifests/1"), 1, "{}", proxy.story());
    let told = two.ask("WatchJob", &id).all();
    let record = job(&two, &id);
    // What somebody has put there since must stay.
    to.push(&Image::docker(vec![Layer::noise(1, 100)]), "app", "1");
    let newer = to.digest("app", "1");
    assert_ne!(newer, image.digest());
    barrier.open();
    one.proceed();
    one.wait_for_log("is another coordinator's now", Duration::from_secs(20));
    assert_eq!(proxy.count("PUT", "*/manifests/1"), 1, "{}", proxy.story());
    assert_eq!(to.digest("app", "1"), newer);
    assert_eq!(job(&one, &id), record);
    assert_eq!(events(&two.ask("WatchJob", &id).all()), events(&told));
}

#[test]
fn jobs_go_on_when_the_engine_is_killed_and_started_again() {
    let mut nats = Nats::start();
    let case = Halfway::new();
    // Long enough for its owner to be heard of again.
    let one = Coordinator::start(&["--engine", &nats.url(), "--embedded-workers", "2"]);
    let id = submit(&one, &case.spec);
    Halfway::wait_for_four(&one, &id);
    let mut watcher = one.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_DONE");
    nats.kill();
    // What becomes of the last layer cannot be written down yet.
    case.barrier.open();
    std::thread::sleep(Duration::from_millis(500));
    nats.restart();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_SUCCEEDED");
    assert_eq!(watcher.next_message(), None, "the watch has gone through it");
    let messages = one.ask("WatchJob", &id).all();
    let told = events(&messages);
    assert_eq!(sequences(&told), (1..=told.len() as u64).collect::<Vec<_>>());
    assert_eq!(states(&told), ["RUNNING", "FINALIZING", "SUCCEEDED"]);
    case.check(&one, &id);
}

#[test]
fn jobs_for_one_tag_wait_for_each_other_wherever_they_run() {
    let nats = Nats::start();
    let (from, to) = (Registry::start(), Registry::start());
    let (first, second) = (small(), Image::docker(vec![Layer::noise(1, 100)]));
    let (proxy, barrier) = (FaultProxy::before(to.host()), Barrier::default());
    proxy.fault(1, "PUT", "*/manifests/latest", barrier.fault());
    let (one, two) = (replica(&nats, &[]), replica(&nats, &[]));
    let destination = format!("registry://{}/app", proxy.host());
    let id = submit(&one, &json!({"source": from.push(&first, "app", "1"), "destination": destination}));
    let mut watcher = two.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_FINALIZING");
    // The same tag, in other words.
    let source = from.push(&second, "app", "2");
    let later = submit(&two, &json!({"source": source, "destination": format!("{destination}:latest")}));
    let mut later_watcher = one.call("WatchJob", &later).start();
    later_watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_DONE");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(state(&one, &later), "JOB_STATE_RUNNING", "it waits");
    // The first one's is on its way, and counts when it is answered.
    assert_eq!(proxy.count("PUT", "*/manifests/latest"), 0, "{}", proxy.story());
    barrier.open();
    for mut watcher in [watcher, later_watcher] {
        watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_SUCCEEDED");
    }
    assert_eq!(to.digest("app", "latest"), second.digest());
}

#[test]
fn a_coordinator_without_a_worker_leaves_jobs_to_one_that_has_some() {
    let nats = Nats::start();
    let (from, to) = (Registry::start(), Registry::start());
    let image = small();
    let spec = json!({"source": from.push(&image, "app", "1"), "destination": to.uri("app:1")});
    let (idle, _busy) = (replica_with(&nats, "0", &[]), replica(&nats, &[]));
    let id = submit(&idle, &spec);
    idle.ask("WatchJob", &id).all();
    assert_eq!(state(&idle, &id), "JOB_STATE_SUCCEEDED");
    assert_eq!(job(&idle, &id)["attempts"], 1, "it was not taken to be given back");
    assert_eq!(to.digest("app", "1"), image.digest());
}

#[test]
fn a_worker_of_two_coordinators_has_its_slots_once() {
    let nats = Nats::start();
    let (from, to) = (Registry::start(), Registry::start());
    let (mut one, two) = (replica_with(&nats, "0", &[]), replica_with(&nats, "0", &[]));
    let mut worker = Worker::at(&format!("{},{}", one.url(), two.url()), &["--slots", "1"]);
    worker.registers_again();
    let (first, second) =
        (Image::docker(vec![Layer::noise(1, 1000)]), Image::docker(vec![Layer::noise(2, 1000)]));
    let (proxy, barrier) = (FaultProxy::before(from.host()), Barrier::default());
    let stalled = |image: &Image, tag: &str| {
        let source = from.push(image, "app", tag).replace(from.host(), &proxy.host());
        json!({"source": source, "destination": to.uri(&format!("app:{tag}"))})
    };
    let specs = [stalled(&first, "1"), stalled(&second, "2")];
    let blob = |image: &Image| format!("*/blobs/{}", image.layer_digests()[0]);
    proxy.fault(1, "GET", &blob(&first), barrier.fault());
    // Each runs one job, and each gives the worker a layer.
    let first_id = submit(&one, &specs[0]);
    let running = |event: &Value| event["event"]["layer_changed"]["state"] == "LAYER_STATE_RUNNING";
    one.call("WatchJob", &first_id).start().wait_for(running);
    while proxy.pending() > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let second_id = submit(&two, &specs[1]);
    two.call("WatchJob", &second_id).start().wait_for(running);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(proxy.count("GET", &blob(&second)), 0, "it has one slot:\n{}", proxy.story());
    // What it does for a coordinator that dies, it does for the other one then.
    one.kill();
    barrier.open();
    for (id, tag, image) in [(&first_id, "1", &first), (&second_id, "2", &second)] {
        two.ask("WatchJob", id).all();
        assert_eq!(state(&two, id), "JOB_STATE_SUCCEEDED");
        assert_eq!(to.digest("app", tag), image.digest());
    }
    worker.signal("TERM");
    assert!(worker.ended().success(), "one coordinator is gone, and that keeps it from nothing");
}

#[test]
fn an_engine_that_cannot_be_used_is_named_at_the_start() {
    let fails = |arguments: &[&str]| {
        let output = coordinator::command().args(["--listen", "127.0.0.1:0"]).args(arguments).output();
        let output = output.expect("it runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let nats = Nats::start();
    let url = nats.url();
    let coordinator = replica(&nats, &[]);
    for (arguments, said) in [
        (["--engine", "postgres://x", "--engine-lease", LEASE], "does not begin with jetstream://"),
        (
            ["--engine", "jetstream://127.0.0.1:1", "--engine-lease", LEASE],
            "failed to connect to NATS at 127.0.0.1:1",
        ),
        (
            ["--engine", url.as_str(), "--engine-lease", "7"],
            "the bucket occystrap_leases cannot be used: its maximum age is 2s, and 7s was asked for",
        ),
        (["--engine", url.as_str(), "--engine-replicas", "3"], "occystrap_jobs cannot be used"),
    ] {
        let error = fails(&arguments);
        assert!(error.contains(said), "{arguments:?}: {error}");
    }
    drop(coordinator);
    let small = Nats::with("max_payload: 65536\n");
    let error = fails(&["--engine", &small.url()]);
    assert!(error.contains("its max_payload is less than 1 MiB"), "{error}");
}
