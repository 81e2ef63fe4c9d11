//! Credentials that clients bring: used where they are for, and shown and left nowhere.

use std::path::Path;

use occy_tests::certificates::text;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::token::basic_header;
use occy_tests::tools::write;
use serde_json::{Value, json};

use crate::{scratch, small};

const OLD: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
const NEW: &str = "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

fn private() -> Registry {
    Registry::with_htpasswd("user", "hunter2")
}

pub(crate) fn login(host: &str) -> Value {
    json!({"host": host, "password": {"username": "user", "password": "hunter2"}})
}

/// No file below holds the password, nor what goes over the wire in its place.
pub(crate) fn is_clean(directory: &Path) {
    let header = basic_header("user", "hunter2");
    let secrets = ["hunter2", header.trim_start_matches("Basic ")];
    for entry in std::fs::read_dir(directory).expect("a directory").flatten() {
        if entry.path().is_dir() {
            is_clean(&entry.path());
            continue;
        }
        let bytes = occy_tests::tools::read(entry.path());
        for secret in secrets {
            let is_there = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!is_there, "{secret} is in {}", entry.path().display());
        }
    }
}

#[test]
fn a_calls_credentials_are_used_at_the_registry_that_they_are_for() {
    let (from, to) = (private(), private());
    let source = from.push(&small(), "app", "1");
    let coordinator = Coordinator::start(&[]);
    let read = |credentials: Value| {
        coordinator.ask("ReadImage", &json!({"source": source, "credentials": credentials}))
    };
    read(json!([])).fails("PERMISSION_DENIED", "REGISTRY_REFUSED");
    read(json!([login("localhost:1"), login(to.host())])).fails("PERMISSION_DENIED", "REGISTRY_REFUSED");
    read(json!([login(from.host())])).one();
    read(json!([{"host": from.host()}])).fails("INVALID_ARGUMENT", "INVALID_FIELD");
    let search = json!({"source": source, "pattern": "*", "credentials": [login(from.host())]});
    coordinator.ask("SearchImage", &search).all();
    let spec = json!({"source": source, "destination": to.uri("copy:1")});
    let process = |credentials: Value| {
        let call = coordinator.call("ProcessImage", &spec);
        call.with("credentials", json!({"credentials": credentials})).run()
    };
    process(json!([login(from.host())])).fails("PERMISSION_DENIED", "REGISTRY_REFUSED");
    process(json!([login(from.host()), login(to.host())])).all();
    assert_eq!(to.digest("copy", "1"), small().digest());
    is_clean(coordinator.directory());
}

#[test]
fn a_jobs_credentials_are_sealed_outlive_the_coordinator_and_are_shown_nowhere() {
    let (from, to) = (private(), private());
    let image = Image::docker(vec![Layer::noise(1, 10_000), Layer::noise(2, 20_000)]);
    from.push(&image, "app", "1");
    let proxy = FaultProxy::before(from.host());
    let barrier = Barrier::default();
    proxy.fault(1, "GET", &format!("*/blobs/{}", image.layer_digests()[0]), barrier.fault());
    let directory = scratch();
    let file = directory.path().join("keys");
    write(&file, format!("{OLD}\n"));
    let submission = json!({
        "spec": {"source": format!("registry://{}/app:1", proxy.host()), "destination": to.uri("copy:1")},
        "credentials": [login(&proxy.host()), login(to.host())],
    });
    let keyless = Coordinator::start(&[]);
    keyless.ask("SubmitJob", &submission).fails("FAILED_PRECONDITION", "NO_SECRET_KEY");
    let mut coordinator = Coordinator::start(&["--secret-key-file", &text(&file), "--log", "debug"]);
    let submit = |coordinator: &Coordinator| {
        let job = coordinator.ask("SubmitJob", &submission).one();
        assert!(!job.to_string().contains("hunter2"));
        json!({"job_id": job["job"]["id"]})
    };
    let id = submit(&coordinator);
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"].get("layers_planned").is_some());
    // Killed in the middle, with its credentials in the store; then the key is another one, and the old one only opens.
    coordinator.kill();
    is_clean(coordinator.directory());
    barrier.open();
    write(&file, format!("{NEW}\n# until all jobs before it have ended\n{OLD}\n"));
    coordinator.restart();
    let events = coordinator.ask("WatchJob", &id).all();
    let last = events.last().expect("events");
    assert_eq!(last["event"]["state_changed"]["state"], "JOB_STATE_SUCCEEDED", "{last}");
    assert!(!json!(events).to_string().contains("hunter2"));
    assert!(!coordinator.ask("GetJob", &id).one().to_string().contains("hunter2"));
    assert_eq!(to.digest("copy", "1"), image.digest());
    is_clean(coordinator.directory());

    // Without the key that sealed them there is nothing to log in with.
    let barrier = Barrier::default();
    proxy.fault(1, "GET", "/v2/app/manifests/1", barrier.fault());
    let id = submit(&coordinator);
    coordinator.kill();
    barrier.open();
    write(&file, format!("{OLD}\n"));
    coordinator.restart();
    let events = coordinator.ask("WatchJob", &id).all();
    let error = &events.last().expect("events")["event"]["state_changed"]["error"];
    assert_eq!(error["reason"], "SECRET_KEY_GONE", "{error}");
    is_clean(coordinator.directory());
}
