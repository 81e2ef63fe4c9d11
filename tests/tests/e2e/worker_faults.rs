//! Workers that are killed, stopped, cut off and sent away, in the middle of layers; and coordinators that are.

use occy_tests::certificates::text;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member, noise};
use occy_tests::proxy::{self, Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::relay::Relay;
use occy_tests::tools::read;
use occy_tests::worker::{PythonWorker, Worker};
use serde_json::{Value, json};

use crate::service_jobs::{Halfway, events, job, state, submit};
use crate::small;

fn bare(arguments: &[&str]) -> Coordinator {
    Coordinator::start(&[&["--embedded-workers", "0"], arguments].concat())
}

/// The worker that has the layer which waits behind the barrier.
fn holder(coordinator: &Coordinator, id: &Value) -> String {
    job(coordinator, id)["layers"][0]["worker"].as_str().expect("text").to_owned()
}

/// Two workers, the first of which has the layer behind the barrier: the second came later.
fn two(coordinator: &Coordinator, case: &Halfway) -> (Worker, Worker, Value) {
    let first = Worker::start(coordinator, &["--name", "first", "--slots", "4"]);
    let id = submit(coordinator, &case.spec);
    Halfway::wait_for_four(coordinator, &id);
    assert_eq!(holder(coordinator, &id), "first");
    let second = Worker::start(coordinator, &["--name", "second", "--slots", "1"]);
    (first, second, id)
}

#[test]
fn a_killed_workers_layer_is_done_by_another() {
    let case = Halfway::new();
    let coordinator = bare(&["--lease", "3"]);
    let (mut first, _second, id) = two(&coordinator, &case);
    first.kill();
    coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    assert_eq!(holder(&coordinator, &id), "second");
    case.barrier.open();
}

#[test]
fn what_a_worker_says_behind_its_lease_changes_nothing() {
    let case = Halfway::new();
    let coordinator = bare(&["--lease", "3"]);
    let (mut first, _second, id) = two(&coordinator, &case);
    first.signal("STOP");
    let messages = coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    let before = job(&coordinator, &id);
    assert_eq!(holder(&coordinator, &id), "second");
    let reasons = reasons(&messages);
    assert_eq!(reasons, ["attempt 1 failed: first: it was lost: it was not heard of for 3s"]);
    // It goes on where it was, and comes to the end of a layer that is not its own any more.
    case.barrier.open();
    first.signal("CONT");
    first.registers_again();
    assert_eq!(job(&coordinator, &id), before);
    case.check(&coordinator, &id);
}

/// Why layers waited.
fn reasons(messages: &[Value]) -> Vec<String> {
    let reasons =
        events(messages).into_iter().filter_map(|event| event["layer_changed"]["waiting_reason"].as_str());
    reasons.filter(|reason| !reason.is_empty()).map(str::to_owned).collect()
}

#[test]
fn a_worker_whose_stream_breaks_comes_back_to_the_layer_that_it_has() {
    let case = Halfway::new();
    let coordinator = bare(&["--max-attempts", "1"]);
    let relay = Relay::before(coordinator.address());
    let mut first = Worker::at(&relay.url(), &["--name", "first", "--slots", "4"]);
    let id = submit(&coordinator, &case.spec);
    Halfway::wait_for_four(&coordinator, &id);
    let _second = Worker::start(&coordinator, &["--name", "second", "--slots", "1"]);
    for _ in 0..3 {
        relay.cut();
        first.registers_again();
        assert_eq!(first.name(), "first");
    }
    case.barrier.open();
    let messages = coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    assert_eq!((holder(&coordinator, &id), reasons(&messages)), ("first".to_owned(), Vec::new()));
    assert_eq!(job(&coordinator, &id)["attempts"], 1);
    // It has its four slots again.
    assert_eq!(free(&coordinator, "first"), Some(4));
}

#[test]
fn a_stream_that_is_cut_every_2_seconds_costs_no_attempt() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = Image::docker((0..6).map(|seed| Layer::noise(seed, 100_000)).collect());
    let source = from.push(&image, "app", "1");
    let before = FaultProxy::before(from.host());
    // A layer is on its way for longer than the stream ever holds.
    before.fault(usize::MAX, "GET", "*/blobs/*", proxy::slow(10, std::time::Duration::from_millis(300)));
    let coordinator = bare(&["--max-attempts", "1"]);
    let relay = Relay::before(coordinator.address());
    let mut worker = Worker::at(&relay.url(), &["--name", "one", "--slots", "2"]);
    let source = source.replace(from.host(), &before.host());
    let spec = json!({"source": source, "destination": to.uri("app:1"), "filters": ["normalize-timestamps"]});
    let id = submit(&coordinator, &spec);
    let mut cuts = 0;
    while state(&coordinator, &id) != "JOB_STATE_SUCCEEDED" {
        std::thread::sleep(std::time::Duration::from_secs(2));
        relay.cut();
        worker.registers_again();
        cuts += 1;
        assert!(cuts < 30, "{}", coordinator.log());
    }
    assert!(cuts > 3, "it was cut {cuts} times only");
    let job = job(&coordinator, &id);
    assert_eq!(job["attempts"], 1);
    for layer in image.layer_digests() {
        assert_eq!(before.count("GET", &format!("*/blobs/{layer}")), 2, "{}", before.story());
    }
    let spec = json!({"source": from.uri("app:1"), "destination": to.uri("again:1"), "filters": ["normalize-timestamps"]});
    coordinator.ask("WatchJob", &submit(&coordinator, &spec)).all();
    assert_eq!(to.digest("app", "1"), to.digest("again", "1"));
    to.pull("app", "1");
}

#[test]
fn bytes_for_a_file_of_the_coordinators_go_on_where_the_stream_was_cut() {
    let from = Registry::start();
    let image = Image::docker(vec![Layer::of(&[Member::file("noise", noise(1, 12_000_000))])]);
    let source = from.push(&image, "app", "1");
    let before = FaultProxy::before(from.host());
    before.fault(usize::MAX, "GET", "*/blobs/*", proxy::slow(12, std::time::Duration::from_millis(500)));
    let directory = crate::scratch();
    let coordinator = bare(&["--max-attempts", "1", "--allow-path", &text(directory.path())]);
    let relay = Relay::before(coordinator.address());
    let mut worker = Worker::at(&relay.url(), &["--name", "one"]);
    let path = directory.path().join("image.tar");
    let spec = json!({
        "source": source.replace(from.host(), &before.host()),
        "destination": format!("tar://{}", text(&path)),
        "filters": ["normalize-timestamps"],
    });
    let id = submit(&coordinator, &spec);
    let mut cuts = 0;
    while !["JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"].contains(&&*state(&coordinator, &id)) {
        std::thread::sleep(std::time::Duration::from_secs(1));
        relay.cut();
        worker.registers_again();
        cuts += 1;
    }
    let done = job(&coordinator, &id);
    assert_eq!((&done["state"], &done["attempts"]), (&json!("JOB_STATE_SUCCEEDED"), &json!(1)), "{done}");
    assert!(cuts > 3, "it was cut {cuts} times only");
    let expected = directory.path().join("expected.tar");
    // Read once: nothing was begun again.
    let layer = format!("*/blobs/{}", image.layer_digests()[0]);
    assert_eq!(before.count("GET", &layer), 1, "{}", before.story());
    before.heal();
    let through = source.replace(from.host(), &before.host());
    let local = ["process", &through, &crate::tar_uri(&expected), "-f", "normalize-timestamps"];
    occy_tests::occyctl::locally(local).ok();
    assert!(read(&path) == read(&expected), "other bytes than of one process");
}

#[test]
fn a_worker_that_does_not_come_back_within_its_lease_loses_its_layer() {
    let case = Halfway::new();
    let coordinator = bare(&["--lease", "3"]);
    let relay = Relay::before(coordinator.address());
    let mut first = Worker::at(&relay.url(), &["--name", "first", "--slots", "4"]);
    let id = submit(&coordinator, &case.spec);
    Halfway::wait_for_four(&coordinator, &id);
    let _second = Worker::start(&coordinator, &["--name", "second", "--slots", "1"]);
    relay.refuse();
    let messages = coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    let before = job(&coordinator, &id);
    assert_eq!(holder(&coordinator, &id), "second");
    let reasons = reasons(&messages);
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(
        reasons[0].starts_with("attempt 1 failed: first: it was lost: its connection broke"),
        "{reasons:?}"
    );
    assert!(reasons[0].ends_with("; it was not heard of for 3s"), "{reasons:?}");
    // What it comes back with is nobody's business any more.
    case.barrier.open();
    relay.accept();
    first.registers_again();
    assert_eq!(first.name(), "first");
    assert_eq!(job(&coordinator, &id), before);
    case.check(&coordinator, &id);
}

#[test]
fn a_worker_that_is_stopped_finishes_what_it_has() {
    let case = Halfway::new();
    let coordinator = bare(&[]);
    let (mut first, _second, id) = two(&coordinator, &case);
    first.signal("TERM");
    while free(&coordinator, "first") != Some(0) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // It gets nothing new, though it has three slots that are free.
    let other = submit(
        &coordinator,
        &json!({"source": case.to.uri("local:1"), "destination": case.to.uri("other:1")}),
    );
    coordinator.ask("WatchJob", &other).all();
    assert_eq!(holder(&coordinator, &other), "second");
    case.barrier.open();
    assert!(first.ended().success());
    coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    assert_eq!(holder(&coordinator, &id), "first");
}

#[test]
fn a_worker_that_cannot_finish_in_time_hands_back_what_it_has() {
    let case = Halfway::new();
    // One attempt: what is handed back does not count as one.
    let coordinator = bare(&["--max-attempts", "1"]);
    let first = Worker::start(&coordinator, &["--name", "first", "--slots", "4", "--drain-timeout", "0"]);
    let id = submit(&coordinator, &case.spec);
    Halfway::wait_for_four(&coordinator, &id);
    let _second = Worker::start(&coordinator, &["--name", "second"]);
    let mut first = first;
    first.signal("TERM");
    assert!(first.ended().success());
    coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    assert_eq!(holder(&coordinator, &id), "second");
    case.barrier.open();
}

#[test]
fn a_layer_that_fails_everywhere_ends_with_every_reason() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let coordinator = bare(&["--max-attempts", "2", "--lease", "2"]);
    let id = {
        let mut worker = PythonWorker::start(&coordinator, &["--hold"]);
        let spec =
            json!({"source": source, "destination": to.uri("app:1"), "filters": ["shout"], "parallel": 1});
        let id = submit(&coordinator, &spec);
        worker.wait_for("task");
        id
    };
    let mut worker = PythonWorker::start(&coordinator, &["--hold"]);
    worker.wait_for("task");
    drop(worker);
    coordinator.ask("WatchJob", &id).all();
    let job = job(&coordinator, &id);
    let error = &job["error"];
    assert_eq!(error["reason"], "ATTEMPTS_EXHAUSTED", "{job}");
    let message = error["message"].as_str().expect("text");
    assert!(message.contains("2 attempts") && message.matches("it was lost").count() == 2, "{message}");
    assert!(!to.has("app", "1"));
}

#[test]
fn workers_come_back_to_a_coordinator_that_was_killed_and_its_jobs_go_on() {
    let case = Halfway::new();
    let mut coordinator = bare(&[]);
    let mut worker = Worker::start(&coordinator, &["--name", "one", "--slots", "4"]);
    let id = submit(&coordinator, &case.spec);
    Halfway::wait_for_four(&coordinator, &id);
    coordinator.kill();
    case.barrier.open();
    case.source.heal();
    coordinator.restart_there();
    worker.registers_again();
    coordinator.ask("WatchJob", &id).all();
    case.check(&coordinator, &id);
    assert_eq!(job(&coordinator, &id)["attempts"], 2);
    // Stopped politely, too.
    coordinator.terminate();
    assert!(coordinator.ended().success());
    coordinator.restart_there();
    worker.registers_again();
    assert_eq!(state(&coordinator, &id), "JOB_STATE_SUCCEEDED");
}

#[test]
fn a_worker_that_is_lost_in_the_middle_of_a_layer_spoils_no_file() {
    let from = Registry::start();
    let image = Image::docker(vec![Layer::of(&[Member::file("noise", noise(1, 3_000_000))])]);
    let source = from.push(&image, "app", "1");
    for scheme in ["tar", "oci"] {
        let before = FaultProxy::before(from.host());
        let barrier = Barrier::default();
        // A part of the layer comes, and the rest is asked for in vain.
        let layer = format!("*/blobs/{}", image.layer_digests()[0]);
        before.fault(1, "GET", &layer, proxy::truncate(2_000_000));
        before.fault(1, "GET", &layer, barrier.fault());
        let directory = crate::scratch();
        let root = text(directory.path());
        let coordinator = bare(&["--allow-path", &root, "--lease", "3"]);
        let mut first = Worker::start(&coordinator, &["--name", "first"]);
        let path = directory.path().join("image");
        let through = source.replace(from.host(), &before.host());
        let destination = format!("{scheme}://{}", text(&path));
        let id = submit(&coordinator, &json!({"source": through, "destination": destination}));
        while before.pending() > 0 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let _second = Worker::start(&coordinator, &["--name", "second"]);
        first.kill();
        coordinator.ask("WatchJob", &id).all();
        let done = job(&coordinator, &id);
        assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{scheme}: {done}");
        assert_eq!(holder(&coordinator, &id), "second");
        match scheme {
            "tar" => assert_eq!(occy_tests::saved::read_saved(&path).config, image.config),
            _ => assert_eq!(read(path.join("rootfs/noise")), noise(1, 3_000_000)),
        }
        barrier.open();
    }
}

/// A worker's slots that are free.
fn free(coordinator: &Coordinator, name: &str) -> Option<u64> {
    let can = coordinator.ask("ListCapabilities", &json!({})).one();
    can["workers"].as_array()?.iter().find(|worker| worker["name"] == name)?["free_slots"].as_u64()
}
