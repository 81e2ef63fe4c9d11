//! A worker written in Python from the .proto files alone: its own filter, its bytes, and its lies.

use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::registry::Registry;
use occy_tests::saved::read_saved;
use occy_tests::tools::pipe;
use occy_tests::worker::{PythonWorker, Worker};
use serde_json::{Value, json};

use crate::service_jobs::{job, submit};
use crate::{scratch, tar_uri};

fn image() -> Image {
    let filler = "filler ".repeat(100_000);
    Image::docker(vec![
        Layer::of(&[
            Member::dir("etc"),
            Member::file("etc/motd", "hello\n"),
            Member::file("etc/filler", filler),
        ]),
        Layer::of(&[Member::file("etc/late", "more\n")]),
    ])
}

fn content(tar: &[u8], name: &str) -> String {
    String::from_utf8(pipe("tar", ["-xO", name], tar)).expect("text")
}

fn run(coordinator: &Coordinator, spec: &Value) -> Value {
    let id = submit(coordinator, spec);
    coordinator.ask("WatchJob", &id).all();
    job(coordinator, &id)
}

#[test]
fn a_filter_that_only_a_worker_has_is_run_by_it() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&image(), "app", "1");
    let directory = scratch();
    let root = directory.path().to_str().expect("UTF-8").to_owned();
    // The coordinator has workers of its own, which have other filters.
    let coordinator = Coordinator::start(&["--embedded-workers", "1", "--allow-path", &root]);
    let spec = |source: &str, destination: &str| json!({"source": source, "destination": destination, "filters": ["shout"], "compression": "gzip"});
    let unknown = coordinator.ask("SubmitJob", &json!({"spec": spec(&source, &to.uri("app:1"))}));
    let error = unknown.fails("INVALID_ARGUMENT", "MALFORMED");
    assert!(error["message"].as_str().is_some_and(|message| message.contains("shout")));
    let _worker = PythonWorker::start(&coordinator, &["--halves"]);
    let can = coordinator.ask("ListCapabilities", &json!({})).one();
    assert!(
        can["filters"]
            .as_array()
            .is_some_and(|filters| filters.iter().any(|filter| filter["name"] == "shout"))
    );

    // Between registries it moves the bytes itself.
    let done = run(&coordinator, &spec(&source, &to.uri("app:1")));
    assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}");
    for layer in done["layers"].as_array().expect("layers") {
        assert_eq!((&layer["worker"], &layer["changed"]), (&json!("snake"), &json!(true)));
    }
    let pulled = to.pull("app", "1");
    assert_eq!(content(&pulled.tars[0], "etc/motd"), "HELLO\n");
    assert_eq!(content(&pulled.tars[1], "etc/late"), "MORE\n");
    judge::skopeo_reads(&format!("docker://{}/app:1", to.host()));
    // What it reports is told to the client.
    let id = json!({"job_id": done["id"]});
    let told = coordinator.ask("WatchJob", &id).all();
    let found: Vec<_> =
        told.iter().filter_map(|message| message["event"]["filter_output"]["text"].as_str()).collect();
    assert_eq!(found.concat(), "etc!\netc/motd!\netc/filler!\netc/late!\n");

    // Where only the coordinator has a source or a destination, its bytes come from there and go there.
    let saved = directory.path().join("shouted.tar");
    let done = run(&coordinator, &spec(&source, &tar_uri(&saved)));
    assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}");
    assert_eq!(content(&read_saved(&saved).tars[1], "etc/late"), "MORE\n");
    let again = run(&coordinator, &spec(&tar_uri(&saved), &to.uri("again:1")));
    assert_eq!(again["state"], "JOB_STATE_SUCCEEDED", "{again}");
    judge::skopeo_reads(&format!("docker://{}/again:1", to.host()));
}

#[test]
fn a_job_whose_filter_is_a_workers_waits_for_it_after_a_restart() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&image(), "app", "1");
    let mut coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let id = {
        let mut held = PythonWorker::start(&coordinator, &["--hold"]);
        let spec = json!({"source": source, "destination": to.uri("app:1"), "filters": ["shout"]});
        let id = submit(&coordinator, &spec);
        held.wait_for("task");
        coordinator.kill();
        id
    };
    coordinator.restart();
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| {
        message["event"]["layer_changed"]["waiting_reason"] == "no worker offers filter:shout"
    });
    let _worker = PythonWorker::start(&coordinator, &[]);
    coordinator.ask("WatchJob", &id).all();
    assert_eq!(job(&coordinator, &id)["state"], "JOB_STATE_SUCCEEDED");
}

#[test]
fn a_worker_that_lies_is_not_believed() {
    let from = Registry::start();
    let source = from.push(&image(), "app", "1");
    for (lie, part) in [
        ("written", "others are committed"),
        ("claimed", "and says"),
        ("unwritten", "and did not"),
        ("diff-id", "says that it is"),
        ("kept", "cannot stay so"),
    ] {
        let directory = scratch();
        let root = directory.path().to_str().expect("UTF-8").to_owned();
        let coordinator =
            Coordinator::start(&["--embedded-workers", "0", "--allow-path", &root, "--max-attempts", "2"]);
        let _worker = PythonWorker::start(&coordinator, &["--lie", lie]);
        let path = directory.path().join("image.tar");
        let spec = json!({"source": source, "destination": tar_uri(&path), "filters": ["shout"]});
        let failed = run(&coordinator, &spec);
        assert_eq!(failed["error"]["reason"], "ATTEMPTS_EXHAUSTED", "{lie}: {failed}");
        let message = failed["error"]["message"].as_str().expect("text");
        assert_eq!(message.matches(part).count(), 2, "{lie}: {message}");
        assert!(!path.exists());
    }
}

#[test]
fn a_lie_about_what_is_in_a_registry_changes_no_tag_and_is_shared_with_nobody() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&image(), "app", "1");
    let old = Image::docker(vec![Layer::noise(1, 100)]);
    to.push(&old, "app", "1");
    for (lie, reason) in [
        // What it says is not there, or is not so.
        ("claimed", "BLOB_LOST"),
        ("unwritten", "BLOB_LOST"),
        ("size", "BLOB_LOST"),
        // The registry has not believed it either.
        ("written", "ATTEMPTS_EXHAUSTED"),
    ] {
        let coordinator = Coordinator::start(&["--embedded-workers", "0", "--max-attempts", "2"]);
        let spec = |tag: &str| json!({"source": source, "destination": to.uri(tag), "filters": ["shout"], "compression": "gzip"});
        let liar = PythonWorker::start(&coordinator, &["--lie", lie]);
        let failed = run(&coordinator, &spec("app:1"));
        assert_eq!(failed["error"]["reason"], reason, "{lie}: {failed}");
        assert_eq!(to.digest("app", "1"), old.digest(), "{lie}");
        drop(liar);
        // The next one wants the same layers, of which there is a result that nobody has to believe.
        let _honest = PythonWorker::start(&coordinator, &[]);
        let done = run(&coordinator, &spec(&format!("app:{lie}")));
        assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{lie}: {done}");
        assert_eq!(content(&to.pull("app", lie).tars[0], "etc/motd"), "HELLO\n");
    }
}

#[test]
fn our_workers_do_not_take_what_another_one_has_to_do() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&image(), "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let _snake = PythonWorker::start(&coordinator, &[]);
    let ours = Worker::start(&coordinator, &["--name", "ours"]);
    for (filters, worker) in [(vec!["shout"], "snake"), (vec!["normalize-timestamps"], ours.name())] {
        let spec = json!({"source": source, "destination": to.uri("app:1"), "filters": filters});
        let done = run(&coordinator, &spec);
        assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}");
        for layer in done["layers"].as_array().expect("layers") {
            assert_eq!(layer["worker"], worker);
        }
    }
}
