//! Layers of clients with credentials of their own, on workers in processes of their own: these get rights and no credentials.

use std::sync::Arc;

use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::proxy::{Fault, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::token::{TokenServer, mint};
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::service_credentials::{is_clean, login};
use crate::{scratch, small};

const PASSWORD: &str = "hunter2";

/// A coordinator without workers of its own that takes credentials.
fn bare() -> (Coordinator, tempfile::TempDir) {
    let directory = scratch();
    let keys = directory.path().join("keys");
    occy_tests::tools::write(&keys, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n");
    let keys = occy_tests::certificates::text(&keys);
    (
        Coordinator::start(&["--embedded-workers", "0", "--secret-key-file", &keys, "--log", "debug"]),
        directory,
    )
}

/// Runs a job that may log in to these hosts; gives how it ended.
#[track_caller]
fn run(coordinator: &Coordinator, spec: &Value, hosts: &[&str]) -> Value {
    let credentials: Vec<_> = hosts.iter().map(|host| login(host)).collect();
    let job = coordinator.ask("SubmitJob", &json!({"spec": spec, "credentials": credentials})).one();
    let id = json!({"job_id": job["job"]["id"]});
    coordinator.ask("WatchJob", &id).all();
    coordinator.ask("GetJob", &id).one()["job"].clone()
}

#[test]
fn a_worker_gets_tokens_where_the_registry_knows_them_and_never_the_password() {
    let tokens = TokenServer::with_user("user", PASSWORD);
    let (from, to) = (Registry::with_tokens(&tokens), Registry::with_tokens(&tokens));
    let image = Image::docker(vec![Layer::noise(1, 10_000), Layer::noise(2, 20_000)]);
    let source = from.push(&image, "app", "1");
    let (coordinator, _directory) = bare();
    let worker = Worker::start(&coordinator, &["--name", "remote-with-a-name", "--log", "debug"]);
    let spec = json!({"source": source, "destination": to.uri("copy:1")});
    let job = run(&coordinator, &spec, &[from.host(), to.host()]);
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job}\n{}", worker.log());
    assert_eq!(to.digest("copy", "1"), image.digest());
    // Filtered, and to the same registry, where one token reads and writes.
    let spec = json!({
        "source": source, "destination": from.uri("filtered:1"), "filters": ["normalize-timestamps"],
    });
    let job = run(&coordinator, &spec, &[from.host()]);
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job}\n{}", worker.log());
    assert!(
        job["layers"].as_array().expect("layers").iter().all(|layer| layer["worker"] == "remote-with-a-name")
    );
    assert!(worker.remembers("remote-with-a-name"), "whoever looks finds what is there");
    assert!(!worker.remembers(PASSWORD), "the worker has the password");
    is_clean(coordinator.directory());
    for log in [worker.log(), coordinator.log()] {
        assert!(!log.contains(PASSWORD) && !log.contains("eyJ"), "{log}");
    }
}

#[test]
fn a_worker_mounts_with_the_clients_rights() {
    let tokens = TokenServer::with_user("user", PASSWORD);
    let registry = Registry::with_tokens(&tokens);
    let image = small();
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let at = |name: &str| format!("registry://{}/{name}:1", proxy.host());
    let (coordinator, _directory) = bare();
    let worker = Worker::start(&coordinator, &[]);
    let spec = json!({"source": at("app"), "destination": at("copy")});
    let job = run(&coordinator, &spec, &[&proxy.host()]);
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job}\n{}", worker.log());
    assert_eq!(registry.digest("copy", "1"), image.digest());
    for digest in image.layer_digests() {
        assert_eq!(proxy.count("GET", &format!("*/blobs/{digest}")), 0, "{}", proxy.story());
    }
}

#[test]
fn a_token_that_has_run_out_is_renewed_by_the_coordinator() {
    let tokens = TokenServer::with_user("user", PASSWORD);
    let (from, to) = (Registry::with_tokens(&tokens), Registry::with_tokens(&tokens));
    let image = Image::docker(vec![Layer::noise(1, 10_000)]);
    from.push(&image, "app", "1");
    let proxy = FaultProxy::before(from.host());
    // As if the token had run out on its way, once: the registry itself refuses it.
    let late: Fault = Arc::new(|request, upstream| {
        let mut request = request.clone();
        if request.get("Authorization").is_some() {
            request.remove("Authorization");
            let token = mint(&["repository:app:pull"], false, -3600);
            request = request.header("Authorization", &format!("Bearer {token}"));
        }
        upstream(&request)
    });
    let blob = format!("*/blobs/{}", image.layer_digests()[0]);
    // The first time it has no token yet.
    proxy.fault(2, "GET", &blob, late);
    let (coordinator, _directory) = bare();
    let worker = Worker::start(&coordinator, &[]);
    let source = format!("registry://{}/app:1", proxy.host());
    let spec =
        json!({"source": source, "destination": to.uri("copy:1"), "filters": ["normalize-timestamps"]});
    let job = run(&coordinator, &spec, &[&proxy.host(), to.host()]);
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job}\n{}\n{}", worker.log(), proxy.story());
    assert_eq!(proxy.pending(), 0);
    // Without a token, with the one that has run out, and never again.
    let refused = proxy
        .seen()
        .iter()
        .filter(|seen| seen.status == 401 && seen.request.path.contains("/blobs/"))
        .count();
    assert_eq!(refused, 2, "{}", proxy.story());
    assert!(!worker.remembers(PASSWORD));
}

#[test]
fn a_worker_gets_a_password_where_the_registry_knows_nothing_else() {
    let (from, to) = (Registry::with_htpasswd("user", PASSWORD), Registry::with_htpasswd("user", PASSWORD));
    let image = small();
    let source = from.push(&image, "app", "1");
    let (coordinator, _directory) = bare();
    let worker = Worker::start(&coordinator, &["--log", "debug"]);
    let spec = json!({"source": source, "destination": to.uri("copy:1")});
    let job = run(&coordinator, &spec, &[from.host(), to.host()]);
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job}\n{}", worker.log());
    assert_eq!(to.digest("copy", "1"), image.digest());
    // For one of them alone: it is not shown to the other.
    let spec = json!({"source": source, "destination": to.uri("other:1")});
    let job = run(&coordinator, &spec, &[from.host()]);
    assert_eq!(job["error"]["reason"], "REGISTRY_REFUSED", "{job}");
    let log = worker.log();
    assert!(!log.contains(PASSWORD), "{log}");
    is_clean(coordinator.directory());
}
