//! Behind the proxies of a service mesh, which end streams that are old or silent, and send each to another coordinator than the
//! last: jobs, their watchers and workers go on as if nothing were.

use std::fs::File;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Image, json_of};
use occy_tests::layer::Layer;
use occy_tests::mesh::Mesh;
use occy_tests::nats::Nats;
use occy_tests::occyctl::locally;
use occy_tests::proxy::{FaultProxy, slow};
use occy_tests::registry::Registry;
use occy_tests::tools::read;
use occy_tests::worker::Worker;
use serde_json::json;

use crate::scratch;

/// How old a stream becomes, and for how long one may be silent. `tests/soak/run` says 15 and 60.
fn seconds(variable: &str, default: u64) -> Duration {
    let said = std::env::var(variable).ok();
    Duration::from_secs(said.map_or(default, |text| text.parse().expect("a number of seconds")))
}

/// Submits a job and follows it, as a user does; its events are written there.
fn follow(mesh: &Mesh, source: &str, destination: &str, events: &Path) -> Child {
    let run = locally(["job", "submit", source, destination, "--watch", "-f", "normalize-timestamps"])
        .env("OCCYSTRAP_OUTPUT_FORMAT", "json")
        .env("OCCYSTRAP_COORDINATOR", mesh.url());
    run.start_writing(File::create(events).expect("a file").into())
}

/// Checks that it ended well, and saw every event once.
#[track_caller]
fn saw_everything(mut watcher: Child, events: &Path) {
    let status = watcher.wait().expect("a child can be waited for");
    let text = String::from_utf8(read(events)).expect("text");
    assert!(status.success(), "{status}: {text}");
    let sequences: Vec<_> = text
        .lines()
        .map(|line| json_of(line.as_bytes()))
        .filter_map(|event| event["sequence"].as_u64())
        .collect();
    let events: Vec<_> = sequences.into_iter().filter(|&sequence| sequence > 0).collect();
    assert_eq!(events, (1..=events.len() as u64).collect::<Vec<_>>(), "once, and in order: {text}");
}

#[test]
fn streams_that_are_cut_and_sent_elsewhere_cost_nothing() {
    let age = seconds("OCCY_TEST_STREAM_AGE", 4);
    let (nats, from, to) = (Nats::start(), Registry::start(), Registry::start());
    let before = FaultProxy::before(from.host());
    let images = [0, 10, 20]
        .map(|first| Image::docker((first..first + 4).map(|seed| Layer::noise(seed, 100_000)).collect()));
    // A layer takes longer than any stream lives.
    before.fault(usize::MAX, "GET", "*/blobs/*", slow(10, age / 7));
    let engine = nats.url();
    let replica =
        || Coordinator::start(&["--embedded-workers", "0", "--engine", &engine, "--max-attempts", "1"]);
    let (one, two) = (replica(), replica());
    let silent = Duration::from_secs(60);
    // Clients have one address for both, and workers each coordinator's own.
    let mesh = Mesh::before(&[one.address(), two.address()], silent);
    let own = [&one, &two].map(|coordinator| Mesh::before(&[coordinator.address()], silent));
    let urls = format!("{},{}", own[0].url(), own[1].url());
    let workers: Vec<_> = ["a", "b"].map(|name| Worker::at(&urls, &["--name", name, "--slots", "4"])).into();
    let directory = scratch();
    let events = |number: usize| directory.path().join(format!("events-{number}"));
    let has_ended = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| {
            while !has_ended.load(Ordering::Relaxed) {
                sleep(age);
                [&mesh, &own[0], &own[1]].into_iter().for_each(Mesh::cut);
            }
        });
        let watchers = images.iter().enumerate().map(|(number, image)| {
            let source = from.push(image, "app", &number.to_string()).replace(from.host(), &before.host());
            follow(&mesh, &source, &to.uri(&format!("app:{number}")), &events(number))
        });
        for (number, watcher) in watchers.collect::<Vec<_>>().into_iter().enumerate() {
            saw_everything(watcher, &events(number));
        }
        has_ended.store(true, Ordering::Relaxed);
    });
    let jobs = one.ask("ListJobs", &json!({})).one();
    for job in jobs["jobs"].as_array().expect("jobs") {
        assert_eq!((&job["state"], &job["attempts"]), (&json!("JOB_STATE_SUCCEEDED"), &json!(1)), "{job}");
    }
    for (number, image) in images.iter().enumerate() {
        to.pull("app", &number.to_string());
        for layer in image.layer_digests() {
            // Once to see what the filter changes in it, and once to change that: nothing is begun anew.
            assert_eq!(before.count("GET", &format!("*/blobs/{layer}")), 2, "{}", before.story());
        }
    }
    assert!(mesh.streams().iter().all(|&streams| streams > 2), "{:?}", mesh.streams());
    drop(workers);
}

#[test]
fn a_stream_on_which_nothing_is_said_may_be_ended() {
    let silent = seconds("OCCY_TEST_STREAM_IDLE", 5);
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&crate::small(), "app", "1");
    let lease = (silent * 2).as_secs().to_string();
    let coordinator = Coordinator::start(&["--embedded-workers", "0", "--lease", &lease]);
    let mesh = Mesh::before(&[coordinator.address()], silent);
    let directory = scratch();
    let events = directory.path().join("events");
    // Nobody can do it yet.
    let watcher = follow(&mesh, &source, &to.uri("app:1"), &events);
    sleep(silent * 2 + silent / 2);
    let streams = mesh.streams()[0];
    assert!(streams >= 3, "the watcher has come {streams} times only");
    let worker = Worker::at(&mesh.url(), &["--name", "a"]);
    saw_everything(watcher, &events);
    // A worker says that it is there before anybody could think that it is not.
    sleep(silent + silent / 2);
    assert!(!worker.log().contains("connecting again"), "{}", worker.log());
    to.pull("app", "1");
}
