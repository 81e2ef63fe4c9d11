//! Who may call, whose work it is, and how much of it one client may have.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::{Certificates, text};
use occy_tests::client::{Answers, Call};
use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::proxy::{Barrier, FaultProxy, status};
use occy_tests::registry::Registry;
use occy_tests::tools::{sha256, write};
use occy_tests::worker::Worker;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{scratch, small};

/// A file of tokens, each of which is its name with an ending that makes it long enough.
struct Tokens(TempDir);

impl Tokens {
    fn of(tokens: &[(&str, &[&str])]) -> Self {
        let file = Self(scratch());
        file.change(tokens);
        file
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("tokens.toml")
    }

    /// Every second one by its digest.
    fn change(&self, tokens: &[(&str, &[&str])]) {
        let line = |(at, (name, scopes)): (usize, &(&str, &[&str]))| {
            let known = match at % 2 {
                0 => format!("value = {:?}", token(name)),
                _ => format!("sha256 = {:?}", sha256(token(name).as_bytes()).trim_start_matches("sha256:")),
            };
            format!("[[token]]\nname = {name:?}\n{known}\nscopes = {scopes:?}\n")
        };
        write(self.path(), tokens.iter().enumerate().map(line).collect::<String>());
    }
}

fn token(name: &str) -> String {
    format!("{name}-hunter2-hunter2")
}

fn start(tokens: &Path, more: &[&str]) -> Coordinator {
    Coordinator::start(&[&["--tokens-file", &text(tokens), "--embedded-workers", "2"], more].concat())
}

fn call_as(name: &str, call: Call) -> Answers {
    call.with("token", token(name)).run()
}

fn ask_as(name: &str, coordinator: &Coordinator, method: &str, request: &Value) -> Answers {
    call_as(name, coordinator.call(method, request))
}

fn submit_as(name: &str, coordinator: &Coordinator, spec: &Value) -> Value {
    let job = ask_as(name, coordinator, "SubmitJob", &json!({"spec": spec})).one();
    json!({"job_id": job["job"]["id"]})
}

/// How a job ends, as its owner hears of it.
fn end_as(name: &str, coordinator: &Coordinator, id: &Value) -> Value {
    let events = ask_as(name, coordinator, "WatchJob", id).all();
    events.last().expect("an end")["event"]["state_changed"].clone()
}

#[test]
fn a_call_needs_a_token_that_is_known_and_has_its_scope() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let tokens = Tokens::of(&[
        ("reader", &["read"]),
        ("writer", &["write"]),
        ("deleter", &["delete"]),
        ("jobs", &["jobs"]),
        ("admin", &["admin"]),
        ("worker", &["worker"]),
    ]);
    let coordinator = start(&tokens.path(), &[]);
    coordinator.ask("Health", &json!({})).one();
    coordinator.ask("Services", &json!({})).one();
    let read = json!({"source": source});
    let both = json!({"source": source, "destination": registry.uri("copy:1")});
    let filter = json!({"filters": ["normalize-timestamps"]});
    let job = json!({"spec": both});
    let host = registry.host();
    let mirror = |more: &str| {
        let text = format!("mirrors: [{{sources: [{host}/none], targets: [{host}/copy]{more}}}]");
        json!({"spec": {"config": text}})
    };
    let (mirror, deleting) = (mirror(""), mirror(", deletion: {max: 1}"));
    let unknown = json!({"job_id": "00000000-0000-7000-8000-000000000000"});
    let search = json!({"source": source, "pattern": "*"});
    let write = json!({"destination": registry.uri("copy:1")});
    let nothing = json!({"source": registry.uri("app:none")});
    let list = json!({"place": format!("registry://{}", registry.host())});
    let resolve = json!({"image": nothing["source"]});
    let none = json!({});
    let lent = json!({"path": "lent"});
    // Allowed to nobody, so that nothing is asked of what is lent.
    let lend_source = json!({"copy": {"destination": "docker://copy:1"}, "source": lent});
    let lend_destination = json!({"copy": {"source": "docker://app:1"}, "destination": lent});
    for (method, request, scopes) in [
        ("ReadImage", &read, &["reader"][..]),
        ("SearchImage", &search, &["reader"]),
        ("InspectImage", &nothing, &["reader"]),
        ("CheckImage", &read, &["reader"]),
        ("VerifyImage", &resolve, &["reader"]),
        ("ListNames", &list, &["reader"]),
        ("ResolveImage", &resolve, &["reader"]),
        ("WriteImage", &write, &["writer"]),
        ("DeleteImage", &resolve, &["deleter"]),
        ("CopyImage", &both, &["admin"]),
        ("ProcessImage", &read, &["reader"]),
        ("ProcessImage", &filter, &["reader"]),
        ("ProcessImage", &write, &["writer"]),
        ("ProcessImage", &both, &["admin"]),
        ("LendLayout", &lend_source, &["writer"]),
        ("LendLayout", &lend_destination, &["reader"]),
        ("SubmitJob", &job, &["jobs"]),
        ("SubmitMirror", &mirror, &["jobs"]),
        ("SubmitMirror", &deleting, &["admin"]),
        ("GetJob", &unknown, &["jobs"]),
        ("WatchJob", &unknown, &["jobs"]),
        ("CancelJob", &unknown, &["jobs"]),
        ("ListJobs", &none, &["jobs"]),
        ("ListCapabilities", &none, &["worker", "reader", "writer", "deleter", "jobs"]),
    ] {
        coordinator.ask(method, request).fails("UNAUTHENTICATED", "UNAUTHENTICATED");
        let all = ["reader", "writer", "deleter", "jobs", "worker"];
        let other = all.into_iter().find(|name| !scopes.contains(name));
        if let Some(other) = other {
            ask_as(other, &coordinator, method, request).fails("PERMISSION_DENIED", "SCOPE_MISSING");
        }
        let answers = ask_as(scopes[0], &coordinator, method, request);
        let reason = answers.error.as_ref().map(|error| &error["details"]["ErrorInfo"]["reason"]);
        assert_ne!(reason, Some(&json!("SCOPE_MISSING")), "{method} {request} as {}", scopes[0]);
    }
    // One that deletes nothing needs no more.
    ask_as("jobs", &coordinator, "SubmitMirror", &deleting).fails("PERMISSION_DENIED", "SCOPE_MISSING");
    ask_as("stranger", &coordinator, "ListJobs", &none).fails("UNAUTHENTICATED", "UNAUTHENTICATED");
    assert!(!coordinator.log().contains("hunter2"));
}

#[test]
fn clients_see_their_own_jobs_and_an_administrator_everybodys() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let tokens = Tokens::of(&[("one", &["jobs"]), ("two", &["jobs"]), ("admin", &["admin"])]);
    let coordinator = start(&tokens.path(), &[]);
    // The same key is another one for everybody.
    let ids = ["one", "two"].map(|name| {
        let spec = json!({"source": source, "destination": registry.uri(&format!("{name}:1"))});
        let submission = json!({"spec": spec, "idempotency_key": "key"});
        let job = ask_as(name, &coordinator, "SubmitJob", &submission).one()["job"].clone();
        assert_eq!(job["tenant"], format!("token:{name}"));
        let again = ask_as(name, &coordinator, "SubmitJob", &submission).one();
        assert_eq!(again["job"]["id"], job["id"]);
        job["id"].clone()
    });
    assert_ne!(ids[0], ids[1]);
    let listed = |name: &str| {
        let page = ask_as(name, &coordinator, "ListJobs", &json!({})).one();
        page["jobs"].as_array().expect("jobs").iter().map(|job| job["id"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(listed("one"), [ids[0].clone()]);
    assert_eq!(listed("two"), [ids[1].clone()]);
    assert_eq!(listed("admin"), [ids[1].clone(), ids[0].clone()]);
    let (own, other) = (json!({"job_id": ids[0]}), json!({"job_id": ids[1]}));
    for method in ["GetJob", "WatchJob", "CancelJob"] {
        ask_as("one", &coordinator, method, &other).fails("NOT_FOUND", "NO_SUCH_JOB");
        ask_as("one", &coordinator, method, &own).all();
        ask_as("admin", &coordinator, method, &own).all();
    }
    assert_eq!(end_as("two", &coordinator, &other)["state"], "JOB_STATE_SUCCEEDED");
}

#[test]
fn the_file_of_tokens_is_read_again_and_one_that_is_broken_changes_nothing() {
    let tokens = Tokens::of(&[("old", &["read"])]);
    let coordinator = start(&tokens.path(), &[]);
    let ask = |name| ask_as(name, &coordinator, "ListCapabilities", &json!({}));
    let wait = |what: &str, is_so: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}: {}", coordinator.log());
            sleep(Duration::from_millis(50));
        }
    };
    ask("old").one();
    tokens.change(&[("new", &["read"]), ("newer", &["read"])]);
    wait("the new token", &|| ask("new").error.is_none());
    ask("newer").one();
    ask("old").fails("UNAUTHENTICATED", "UNAUTHENTICATED");
    write(tokens.path(), format!("[[token]]\nname = \"bad\"\nvalue = {}\n", token("secret")));
    wait("an error", &|| coordinator.log().contains("line 3"));
    ask("new").one();
    assert!(!coordinator.log().contains("hunter2"));
}

#[test]
fn a_client_has_its_own_limits_for_calls_jobs_and_bytes() {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 3_000_000)]);
    let source = registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let barrier = Barrier::default();
    proxy.fault(9, "GET", &format!("*/blobs/{}", image.layer_digests()[0]), barrier.fault());
    let tokens = Tokens::of(&[("one", &["admin"]), ("two", &["admin"])]);
    let limits = ["--client-calls", "1", "--client-jobs", "1", "--client-spool", "2M"];
    let coordinator = start(&tokens.path(), &limits);
    let other = Registry::start();
    let spec = json!({
        "source": source.replace(registry.host(), &proxy.host()),
        "destination": other.uri("copy:1"),
    });
    let id = submit_as("one", &coordinator, &spec);
    ask_as("one", &coordinator, "SubmitJob", &json!({"spec": spec})).fails("RESOURCE_EXHAUSTED", "TOO_MANY");
    let theirs = submit_as("two", &coordinator, &spec);
    let mut watcher = coordinator.call("WatchJob", &id).with("token", token("one")).start();
    watcher.next_message().expect("an event");
    let read = json!({"source": source});
    ask_as("one", &coordinator, "ReadImage", &read).fails("RESOURCE_EXHAUSTED", "TOO_MANY");
    let directory = scratch();
    let file = text(&directory.path().join("elements"));
    call_as("two", coordinator.call("ReadImage", &read).with("save", &file)).one();
    let written = json!({"destination": other.uri("written:1")});
    let written = coordinator.call("WriteImage", &written).with("elements", &file);
    call_as("two", written).fails("RESOURCE_EXHAUSTED", "STORAGE_FULL");
    barrier.open();
    drop(watcher);
    for (name, id) in [("one", &id), ("two", &theirs)] {
        assert_eq!(end_as(name, &coordinator, id)["state"], "JOB_STATE_SUCCEEDED");
    }
    // What has ended does not count.
    submit_as("one", &coordinator, &spec);
}

#[test]
fn another_clients_layer_is_shared_only_with_who_has_read_of_it_at_its_source() {
    let (registry, evil, to) = (Registry::start(), Registry::start(), Registry::start());
    let image = small();
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let source = format!("registry://{}/app:1", proxy.host());
    let tokens = Tokens::of(&[("one", &["jobs"]), ("two", &["jobs"]), ("three", &["jobs"])]);
    let coordinator = start(&tokens.path(), &[]);
    let run = |name: &str, source: &str, tag: &str| {
        let filters = ["normalize-timestamps", "search:pattern=*"];
        let spec = json!({"source": source, "destination": to.uri(tag), "filters": filters});
        end_as(name, &coordinator, &submit_as(name, &coordinator, &spec))
    };
    assert_eq!(run("one", &source, "one:1")["state"], "JOB_STATE_SUCCEEDED");
    let reads = || proxy.count("GET", "*/blobs/*") - proxy.count("GET", &config(&image));
    let before = reads();
    assert!(before > 0);
    // Two may read the image where one has read it.
    assert_eq!(run("two", &source, "two:1")["state"], "JOB_STATE_SUCCEEDED");
    assert_eq!(reads(), before, "{}", proxy.story());
    assert_eq!(proxy.count("GET", "/v2/app/manifests/1"), 2, "each has asked for the manifest");
    // Three may not, and has a registry that names the layers and does not have them.
    proxy.fault(9, "*", "/v2/app/manifests/*", status(401));
    let refused = run("three", &source, "three:1");
    assert_eq!(refused["error"]["reason"], "REGISTRY_REFUSED", "{refused}");
    let trap = FaultProxy::before(evil.host());
    evil.push(&image, "mine", "1");
    for digest in image.layer_digests() {
        trap.fault(9, "*", &format!("*/blobs/{digest}"), status(404));
    }
    let refused = run("three", &format!("registry://{}/mine:1", trap.host()), "three:1");
    assert_eq!(refused["error"]["reason"], "NOT_IN_REGISTRY", "{refused}");
    assert!(!to.has("three", "1"));
}

fn config(image: &Image) -> String {
    let manifest: Value = serde_json::from_slice(&image.manifest).expect("a manifest");
    format!("*/blobs/{}", manifest["config"]["digest"].as_str().expect("a digest"))
}

#[test]
fn a_certificates_subject_is_whose_a_job_is() {
    let path = |name| text(&Certificates::shared().path(name));
    let (certificate, key, authority) = (path("server.crt"), path("server.key"), path("ca.crt"));
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let tls = ["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &authority];
    let coordinator = Coordinator::start(&tls);
    let spec = json!({"source": source, "destination": registry.uri("copy:1")});
    let call = coordinator.call("SubmitJob", &json!({"spec": spec})).with("ca", &authority);
    let job = call.with("certificate", path("client.crt")).with("key", path("client.key")).run().one();
    assert_eq!(job["job"]["tenant"], "certificate:CN=occy test client");
}

#[test]
fn a_worker_needs_a_token_for_workers() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let tokens = Tokens::of(&[("jobs", &["jobs"]), ("worker", &["worker"])]);
    let coordinator =
        Coordinator::start(&["--tokens-file", &text(&tokens.path()), "--embedded-workers", "0"]);
    let file = |name: &str| {
        let path = tokens.0.path().join(name);
        write(&path, format!("{}\n", token(name)));
        text(&path)
    };
    for arguments in [vec![], vec!["--token-file".to_owned(), file("jobs")]] {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let refused = std::panic::catch_unwind(|| Worker::start(&coordinator, &arguments));
        assert!(refused.is_err(), "it was let in with {arguments:?}");
    }
    let _worker = Worker::start(&coordinator, &["--token-file", &file("worker")]);
    let spec = json!({"source": source, "destination": registry.uri("copy:1")});
    let id = submit_as("jobs", &coordinator, &spec);
    assert_eq!(end_as("jobs", &coordinator, &id)["state"], "JOB_STATE_SUCCEEDED");
}

#[test]
fn a_file_that_cannot_be_used_is_told_of_at_the_start() {
    let directory = scratch();
    let file = directory.path().join("tokens.toml");
    write(&file, "[[token]]\nname = \"x\"\nvalue = \"short\"\nscopes = [\"read\"]\n");
    let mut server = occy_tests::coordinator::command();
    let output =
        server.args(["--state-dir", &text(directory.path()), "--tokens-file", &text(&file)]).output();
    let output = output.expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("token 1 has a value of less than 16 bytes"), "{said}");
}
