//! `SubmitMirror`: a mirror as a job, with the report and the exit code of one that `occyctl` makes by itself.

use std::thread;
use std::time::Duration;

use occy_tests::certificates::text;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::nats::Nats;
use occy_tests::occyctl::{Ended, occyctl};
use occy_tests::proxy::{Barrier, FaultProxy, status};
use occy_tests::registry::Registry;
use occy_tests::tools::write;
use serde_json::{Value, json};

use crate::mirror::{JSON, mirror, report};
use crate::service_credentials::login;
use crate::service_jobs::{events, job, state};
use crate::{scratch, small};

/// No worker: a mirror needs none.
const ALONE: [&str; 2] = ["--embedded-workers", "0"];

/// An image of one layer that all have, and one of its own.
fn image(seed: u64) -> Image {
    Image::oci(vec![Layer::noise(1000, 50_000), Layer::noise(seed, 10_000)])
}

fn config(from: &str, to: &str, more: &str) -> String {
    format!("mirrors:\n  - sources: ['{from}/app']\n    targets: ['{to}/app']\n{more}")
}

fn submit(coordinator: &Coordinator, spec: &Value) -> Value {
    let job = coordinator.ask("SubmitMirror", &json!({"spec": spec})).one();
    json!({"job_id": job["job"]["id"]})
}

/// The images that a job's events tell of: source, and what came of them.
fn images(events: &[&Value]) -> Vec<Value> {
    let told = events.iter().filter_map(|event| event.get("mirror_images"));
    told.flat_map(|told| told["images"].as_array().expect("images").clone()).collect()
}

fn states(events: &[&Value]) -> Vec<String> {
    let states = events.iter().filter_map(|event| event["state_changed"]["state"].as_str());
    states.map(|state| state.trim_start_matches("JOB_STATE_").to_owned()).collect()
}

fn sequences(events: &[&Value]) -> Vec<u64> {
    let number = |event: &&Value| event["sequence"].as_str().expect("a number").parse().expect("a number");
    events.iter().map(number).collect()
}

/// What was said, without what is another one's by nature: how long it took, the name of the job, and of the target.
fn said(ended: &Ended, target: &str) -> (String, String) {
    let line = |line: &str| match line.split_once(" blobs in ") {
        Some((before, after)) if after.ends_with(" seconds") => format!("{before} blobs"),
        _ => line.replace(target, "TARGET"),
    };
    let is_same = |line: &&str| !line.starts_with("Submitted job ") && !line.contains("\"seconds\"");
    let lines = |text: &str| text.lines().filter(is_same).map(|text| line(text) + "\n").collect();
    (lines(&ended.text()), lines(&ended.stderr))
}

#[test]
fn a_coordinators_mirror_says_and_does_what_a_local_one_does() {
    let (from, here, there) = (Registry::start(), Registry::start(), Registry::start());
    let coordinator = Coordinator::start(&ALONE);
    let url = coordinator.url();
    for to in [&here, &there] {
        to.push(&image(9), "app", "kept");
        to.push(&image(9), "app", "old");
    }
    for (seed, tag) in ["1", "2", "old", "kept"].iter().enumerate() {
        from.push(&image(seed as u64), "app", tag);
    }
    let directory = scratch();
    let rules = "    immutable: [kept]\n    backup: 'before-{tag}'\n";
    let run = |more: &[&str], code: i32| {
        let local = mirror(directory.path(), &config(from.host(), here.host(), rules), more).run();
        let remote = [more, &["--coordinator", &url]].concat();
        let remote = mirror(directory.path(), &config(from.host(), there.host(), rules), &remote).run();
        assert_eq!(
            (local.status.code(), remote.status.code()),
            (Some(code), Some(code)),
            "{}",
            remote.stderr
        );
        assert_eq!(said(&remote, there.host()), said(&local, here.host()));
        (local, remote)
    };
    // The price, the report of a partial failure, and that there is no more to do.
    for format in [&[][..], &JSON] {
        run(&[format, &["--dry-run"]].concat(), 5);
        assert!(!there.has("app", "1"));
    }
    let (_, remote) = run(&JSON, 5);
    let told = remote.json();
    assert_eq!((&told["done"], &told["failed"]), (&json!(3), &json!(1)), "{told}");
    for tag in ["1", "2", "old"] {
        assert_eq!(there.digest("app", tag), from.digest("app", tag));
    }
    assert_eq!(there.digest("app", "before-old"), image(9).digest());
    assert_eq!(there.digest("app", "kept"), image(9).digest());
    let (_, again) = run(&[], 5);
    assert!(again.text().contains("0 done, 3 unchanged, 1 failed or refused"), "{}", again.text());
    run(&JSON, 5);
}

#[test]
fn a_generated_client_submits_watches_and_lists_a_mirror() {
    let (from, to) = (Registry::start(), Registry::start());
    for tag in ["1", "2", "3"] {
        from.push(&image(tag.parse().expect("a number")), "app", tag);
    }
    let coordinator = Coordinator::start(&ALONE);
    let text = config(from.host(), to.host(), "");
    let submission = json!({"spec": {"config": text}, "idempotency_key": "one"});
    let first = coordinator.ask("SubmitMirror", &submission).one();
    assert_eq!(first["job"]["spec"]["mirror"]["config"], text);
    let again = coordinator.ask("SubmitMirror", &submission).one();
    assert_eq!(again["job"]["id"], first["job"]["id"]);
    let other = json!({"spec": {"config": text, "dry_run": true}, "idempotency_key": "one"});
    coordinator.ask("SubmitMirror", &other).fails("ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED");

    let id = json!({"job_id": first["job"]["id"]});
    let messages = coordinator.ask("WatchJob", &id).all();
    let told = events(&messages);
    assert_eq!(sequences(&told), (1..=told.len() as u64).collect::<Vec<_>>(), "dense");
    assert_eq!(states(&told), ["RUNNING", "FINALIZING", "SUCCEEDED"]);
    let mut copied = images(&told);
    copied.sort_by_key(|image| image["index"].as_u64());
    let expected = ["1", "2", "3"].map(|tag| format!("{}/app:{tag}", to.host()));
    let targets: Vec<_> = copied.iter().map(|image| image["target"].clone()).collect();
    assert_eq!(targets, expected);
    for image in &copied {
        assert_eq!(image["action"], "MIRROR_ACTION_CREATE");
        assert_eq!(image["outcome"], "MIRROR_OUTCOME_COPIED");
    }
    let result = &job(&coordinator, &id)["result"]["mirror"];
    assert_eq!(
        (&result["done"], &result["failed"], &result["images"]),
        (&json!("3"), &json!("0"), &json!("3"))
    );

    // What is as it should be is counted, and told of to those who ask for it.
    for (tell, expected) in [(false, 0), (true, 3)] {
        let id = submit(&coordinator, &json!({"config": text, "tell_unchanged": tell}));
        let messages = coordinator.ask("WatchJob", &id).all();
        let unchanged = images(&events(&messages));
        assert_eq!(unchanged.len(), expected);
        assert!(unchanged.iter().all(|image| image["outcome"] == "MIRROR_OUTCOME_UNCHANGED"));
        let result = &job(&coordinator, &id)["result"]["mirror"];
        assert_eq!((&result["done"], &result["images"]), (&json!("0"), &json!("3")), "{result}");
    }

    // The same job for people.
    let name = id["job_id"].as_str().expect("an id");
    let shown =
        |arguments: &[&str]| occyctl([arguments, &["--coordinator", &coordinator.url()]].concat()).ok();
    let listed = format!(" mirror of {} to {}\n", from.host(), to.host());
    assert!(shown(&["job", "list"]).text().contains(&listed));
    let watched = shown(&["job", "watch", name]).text();
    assert!(watched.contains("done: create") && watched.contains("3 done, 0 unchanged"), "{watched}");
    let got = shown(&["job", "get", name]).text();
    assert!(got.contains("3 of 3 images done, 0 failed or refused"), "{got}");
}

#[test]
fn a_mirror_is_submitted_once_under_its_key() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let coordinator = Coordinator::start(&ALONE);
    let directory = scratch();
    let text = config(from.host(), to.host(), "");
    let url = coordinator.url();
    let key = ["--idempotency-key", "nightly"];
    let run = || mirror(directory.path(), &text, &[&key[..], &["--coordinator", &url]].concat()).ok();
    let (first, second) = (run(), run());
    assert!(first.text().contains("1 done"), "{}", first.text());
    assert_eq!((first.text(), first.stderr), (second.text(), second.stderr), "the same job");
    mirror(directory.path(), &text, &key).fails(2).says(&["--idempotency-key", "--coordinator"]);
}

#[test]
fn what_cannot_be_understood_or_had_is_refused_at_once() {
    let coordinator = Coordinator::start(&ALONE);
    let refused = |text: &str, place: &str| {
        let answer = coordinator.ask("SubmitMirror", &json!({"spec": {"config": text}}));
        let error = answer.fails("INVALID_ARGUMENT", "INVALID_FIELD");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains("config: ") && message.contains(place), "{error}");
    };
    refused("mirrors:\n  - sources: [a.example/x]\n    target: b.example/x\n", "line 3, column 5: ");
    refused(
        &config("oci-layout:///etc", "b.example", ""),
        "line 2, column 15: oci-layout:// names no registry",
    );
    refused(
        &config("a.example", "oci-layout:///etc", ""),
        "line 3, column 15: oci-layout:// names no registry",
    );
    refused("", "line ");
    let fails = |method: &str, spec: &Value| {
        coordinator.ask(method, &json!({"spec": spec})).fails("INVALID_ARGUMENT", "INVALID_FIELD");
    };
    let text = config("a.example", "b.example", "");
    fails("SubmitMirror", &json!({"config": text, "parallel": 257}));
    let job = json!({"source": "registry://a.example/x", "destination": "registry://b.example/x"});
    let both =
        json!({"source": job["source"], "destination": job["destination"], "mirror": {"config": text}});
    fails("SubmitJob", &both);
    assert_eq!(coordinator.ask("ListJobs", &json!({})).one()["jobs"], json!([]));

    let directory = scratch();
    let url = coordinator.url();
    let run = |text: &str, more: &[&str]| {
        mirror(directory.path(), text, &[more, &["--coordinator", &url]].concat())
    };
    let long = format!("{text}#{}\n", "x".repeat(128 * 1024));
    run(&long, &[]).fails(2).says(&["config: has more than 131072 bytes"]);
    run("mirrors: []\n", &[]).fails(2).says(&["mirror.yaml: line 1, column 1: "]);
    for option in ["--from", "--to"] {
        run(&text, &[option, "oci-layout:///x"]).fails(2).says(&[option, "--coordinator"]);
    }
    run(&text, &["--insecure", "a.example"]).fails(2).says(&["--insecure", "--coordinator"]);
}

#[test]
fn registries_that_are_not_allowed_are_asked_nothing() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
    let coordinator = Coordinator::strict(&ALONE, &[]);
    let directory = scratch();
    let url = coordinator.url();
    let text = config(&near.host(), &far.host(), "    tags: [{names: ['1']}]\n");
    let ended = mirror(directory.path(), &text, &["--coordinator", &url]).fails(1);
    let ended = ended.says(&["refused to connect to 127.0.0.1", "not a public address"]);
    assert!(ended.text().contains("0 done, 0 unchanged, 1 failed or refused"), "{}", ended.text());
    assert!(near.seen().is_empty() && far.seen().is_empty(), "{}{}", near.story(), far.story());
}

#[test]
fn credentials_go_to_the_registries_that_they_are_for() {
    let private = || Registry::with_htpasswd("user", "hunter2");
    let (from, to) = (private(), private());
    from.push(&small(), "app", "1");
    let directory = scratch();
    let keys = directory.path().join("keys");
    write(&keys, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n");
    let spec = json!({"config": config(from.host(), to.host(), "")});
    let submission = |hosts: &[&str]| {
        let credentials: Vec<_> = hosts.iter().map(|host| login(host)).collect();
        json!({"spec": spec, "credentials": credentials})
    };
    let keyless = Coordinator::start(&ALONE);
    keyless.ask("SubmitMirror", &submission(&[from.host()])).fails("FAILED_PRECONDITION", "NO_SECRET_KEY");
    let coordinator = Coordinator::start(&[&ALONE[..], &["--secret-key-file", &text(&keys)]].concat());
    for (hosts, done) in [(&[from.host()][..], "0"), (&[from.host(), to.host()], "1")] {
        let job = coordinator.ask("SubmitMirror", &submission(hosts)).one();
        let id = json!({"job_id": job["job"]["id"]});
        let messages = coordinator.ask("WatchJob", &id).all();
        assert!(!json!(messages).to_string().contains("hunter2"));
        let result = &self::job(&coordinator, &id)["result"]["mirror"];
        assert_eq!(result["done"], done, "{result} {messages:?}");
    }
    assert_eq!(to.digest("app", "1"), small().digest());

    // The same of the command line, each at its end.
    let other = private();
    let given = ["source", "destination"].map(|end| {
        [format!("--{end}-username"), "user".to_owned(), format!("--{end}-password"), "hunter2".to_owned()]
    });
    let url = coordinator.url();
    let given: Vec<&str> =
        given.iter().flatten().map(String::as_str).chain(["--coordinator", &url]).collect();
    let file = config(from.host(), other.host(), "");
    mirror(directory.path(), &file, &given).ok().keeps("hunter2");
    assert_eq!(other.digest("app", "1"), small().digest());
    let two = format!("{file}  - sources: ['{}/app']\n    targets: ['{}/x']\n", to.host(), other.host());
    mirror(directory.path(), &two, &given).fails(2).says(&["several source registries", to.host()]);
}

/// A mirror of four images, one of which waits behind the barrier for a blob of its own.
struct Halfway {
    from: Registry,
    to: Registry,
    source: FaultProxy,
    target: FaultProxy,
    barrier: Barrier,
    text: String,
}

impl Halfway {
    fn new() -> Self {
        let (from, to) = (Registry::start(), Registry::start());
        for tag in ["1", "2", "3", "4"] {
            from.push(&image(tag.parse().expect("a number")), "app", tag);
        }
        let (source, target) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
        let barrier = Barrier::default();
        source.fault(1, "GET", &format!("*/blobs/{}", image(4).layer_digests()[1]), barrier.fault());
        let text = config(&source.host(), &target.host(), "");
        Self { from, to, source, target, barrier, text }
    }

    /// Waits until three images are told of.
    fn wait_for_three(coordinator: &Coordinator, id: &Value) -> Vec<Value> {
        let mut watcher = coordinator.call("WatchJob", id).start();
        let mut seen = Vec::new();
        while images(&events(&seen)).len() < 3 {
            seen.push(watcher.next_message().expect("an event"));
        }
        seen
    }

    /// What was waited for can be had, and nothing has been asked yet.
    fn heal(&self) {
        self.barrier.open();
        self.source.heal();
        self.source.forget();
        self.target.forget();
    }

    /// All is there, after a second attempt that moved what was missing alone.
    fn check(&self, coordinator: &Coordinator, id: &Value, messages: &[Value]) {
        let told = events(messages);
        assert_eq!(sequences(&told), (1..=told.len() as u64).collect::<Vec<_>>(), "once, and in order");
        assert_eq!(states(&told), ["RUNNING", "QUEUED", "RUNNING", "FINALIZING", "SUCCEEDED"]);
        let mut images = images(&told);
        images.retain(|image| image["outcome"] != "MIRROR_OUTCOME_UNCHANGED");
        assert!(images.iter().all(|image| image["outcome"] == "MIRROR_OUTCOME_COPIED"), "{images:?}");
        let mut targets: Vec<_> = images.iter().map(|image| image["target"].to_string()).collect();
        targets.sort();
        targets.dedup();
        assert_eq!((images.len(), targets.len()), (4, 4), "each once: {images:?}");
        assert_eq!(job(coordinator, id)["attempts"], 2);
        for tag in ["1", "2", "3", "4"] {
            assert_eq!(self.to.pull("app", tag).digest, self.from.digest("app", tag));
        }
        let read = self.source.count("GET", "*/blobs/*");
        assert!((1..=2).contains(&read), "a layer, and perhaps the config:\n{}", self.source.story());
    }
}

/// What a watcher is told next of how far a mirror is.
fn how_far(coordinator: &Coordinator, id: &Value) -> Value {
    let mut watcher = coordinator.call("WatchJob", id).start();
    loop {
        let message = watcher.next_message().expect("an event");
        let told = &message["event"]["progress"]["mirror"];
        if told.is_object() {
            return told.clone();
        }
    }
}

fn only_job(coordinator: &Coordinator) -> Value {
    loop {
        let jobs = coordinator.ask("ListJobs", &json!({})).one()["jobs"].clone();
        if let Some(job) = jobs.get(0) {
            return json!({"job_id": job["id"]});
        }
    }
}

#[test]
fn a_cancelled_mirror_stops_between_whole_images() {
    let case = Halfway::new();
    let coordinator = Coordinator::start(&ALONE);
    let directory = scratch();
    let url = coordinator.url();
    thread::scope(|scope| {
        let run = scope.spawn(|| mirror(directory.path(), &case.text, &["--coordinator", &url]).fails(1));
        let id = only_job(&coordinator);
        Halfway::wait_for_three(&coordinator, &id);
        let told = how_far(&coordinator, &id);
        assert_eq!((&told["images"], &told["images_done"]), (&json!("4"), &json!("3")), "{told}");
        assert_eq!(told["bytes_fetched"], told["bytes_uploaded"], "{told}");
        assert_eq!(coordinator.ask("CancelJob", &id).one()["job"]["state"], "JOB_STATE_CANCELLED");
        run.join().expect("a run").says(&["was cancelled"]);
        case.barrier.open();
        assert_eq!(state(&coordinator, &id), "JOB_STATE_CANCELLED");
    });
    assert!(case.to.has("app", "3") && !case.to.has("app", "4"));
    // Another one does the rest.
    let done =
        report(mirror(directory.path(), &case.text, &[&JSON[..], &["--coordinator", &url]].concat()), 0);
    assert_eq!((&done["done"], &done["failed"]), (&json!(1), &json!(0)), "{done}");
    assert_eq!(case.to.digest("app", "4"), image(4).digest());
}

#[test]
fn a_coordinator_that_is_killed_goes_on_with_its_mirror_and_its_client_sees_one_whole_report() {
    let case = Halfway::new();
    let mut coordinator = Coordinator::start(&ALONE);
    let directory = scratch();
    let url = coordinator.url();
    let (id, done) = thread::scope(|scope| {
        let arguments = [&JSON[..], &["--coordinator", &url]].concat();
        let (directory, text) = (directory.path(), &case.text);
        let run = scope.spawn(move || report(mirror(directory, text, &arguments), 0));
        let id = only_job(&coordinator);
        Halfway::wait_for_three(&coordinator, &id);
        coordinator.kill();
        case.heal();
        coordinator.restart_there();
        (id, run.join().expect("a run"))
    });
    let results: Vec<_> =
        done["images"].as_array().expect("images").iter().map(|image| &image["result"]).collect();
    assert_eq!(results, ["copied"; 4], "{done}");
    case.check(&coordinator, &id, &coordinator.ask("WatchJob", &id).all());
}

#[test]
fn another_coordinator_goes_on_with_the_mirror_of_one_that_is_killed() {
    let nats = Nats::start();
    let engine = nats.url();
    let arguments = [&ALONE[..], &["--engine", &engine, "--engine-lease", "2"]].concat();
    let case = Halfway::new();
    let mut one = Coordinator::start(&arguments);
    let id = submit(&one, &json!({"config": case.text}));
    Halfway::wait_for_three(&one, &id);
    let two = Coordinator::start(&arguments);
    let mut watcher = two.call("WatchJob", &id).start();
    one.kill();
    case.heal();
    let mut messages = Vec::new();
    while let Some(message) = watcher.next_message() {
        messages.push(message);
    }
    case.check(&two, &id, &messages);
}

#[test]
fn a_coordinator_that_was_stopped_for_longer_than_its_lease_changes_no_tag() {
    let nats = Nats::start();
    let engine = nats.url();
    let arguments = [&ALONE[..], &["--engine", &engine, "--engine-lease", "2"]].concat();
    let case = Halfway::new();
    let one = Coordinator::start(&arguments);
    let id = submit(&one, &json!({"config": case.text}));
    Halfway::wait_for_three(&one, &id);
    one.pause();
    case.source.heal();
    case.from.push(&image(5), "app", "4");
    let two = Coordinator::start(&arguments);
    two.ask("WatchJob", &id).all();
    assert_eq!(case.to.digest("app", "4"), image(5).digest());
    // It gets the blob that it waits for, and has all of the older image.
    case.target.forget();
    one.proceed();
    case.barrier.open();
    one.wait_for_log("is another coordinator's now", Duration::from_secs(30));
    assert_eq!(case.target.count("PUT", "*/manifests/4"), 0, "{}", case.target.story());
    assert_eq!(case.to.digest("app", "4"), image(5).digest());
    assert_eq!(state(&two, &id), "JOB_STATE_SUCCEEDED");
}

#[test]
fn a_mirror_goes_on_when_the_engine_is_killed_and_started_again() {
    let mut nats = Nats::start();
    let case = Halfway::new();
    // Long enough for its owner to be heard of again.
    let coordinator = Coordinator::start(&[&ALONE[..], &["--engine", &nats.url()]].concat());
    let id = submit(&coordinator, &json!({"config": case.text}));
    Halfway::wait_for_three(&coordinator, &id);
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"].get("mirror_images").is_some());
    nats.kill();
    // Whether the last tag may be changed cannot be known yet.
    case.barrier.open();
    thread::sleep(Duration::from_millis(1500));
    assert!(!case.to.has("app", "4"));
    nats.restart();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_SUCCEEDED");
    let messages = coordinator.ask("WatchJob", &id).all();
    let told = events(&messages);
    assert_eq!(sequences(&told), (1..=told.len() as u64).collect::<Vec<_>>());
    let told = images(&told);
    assert!(told.iter().all(|image| image["outcome"] == "MIRROR_OUTCOME_COPIED"), "{told:?}");
    assert_eq!(told.len(), 4);
    assert_eq!(case.to.digest("app", "4"), image(4).digest());
}

#[test]
fn a_tag_is_changed_by_a_job_or_a_mirror_and_not_by_both_at_once() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "other", "1");
    from.push(&image(1), "app", "1");
    let (proxy, barrier) = (FaultProxy::before(to.host()), Barrier::default());
    proxy.fault(1, "PUT", "*/manifests/1", barrier.fault());
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let spec = json!({"source": source, "destination": format!("registry://{}/app:1", proxy.host())});
    let first = coordinator.ask("SubmitJob", &json!({"spec": spec})).one();
    let first = json!({"job_id": first["job"]["id"]});
    let mut watcher = coordinator.call("WatchJob", &first).start();
    watcher.wait_for(|message| message["event"]["state_changed"]["state"] == "JOB_STATE_FINALIZING");
    let id = submit(&coordinator, &json!({"config": config(from.host(), &proxy.host(), "")}));
    while !to.has_blob("app", &image(1).config_digest()) {
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(500));
    assert_eq!(state(&coordinator, &id), "JOB_STATE_RUNNING", "it waits");
    assert!(!to.has("app", "1"));
    barrier.open();
    for id in [&first, &id] {
        coordinator.ask("WatchJob", id).all();
        assert_eq!(state(&coordinator, id), "JOB_STATE_SUCCEEDED");
    }
    assert_eq!(to.digest("app", "1"), image(1).digest());
}

#[test]
fn a_coordinator_that_is_stopped_leaves_its_mirror_for_later() {
    let case = Halfway::new();
    let mut coordinator = Coordinator::start(&ALONE);
    let id = submit(&coordinator, &json!({"config": case.text}));
    Halfway::wait_for_three(&coordinator, &id);
    coordinator.terminate();
    assert!(coordinator.ended().success());
    case.heal();
    coordinator.restart();
    case.check(&coordinator, &id, &coordinator.ask("WatchJob", &id).all());
}

#[test]
fn a_thousand_images_are_told_of_in_few_events_by_every_engine() {
    let nats = Nats::start();
    let engine = nats.url();
    let (from, to) = (Registry::start(), Registry::start());
    let proxy = FaultProxy::before(to.host());
    proxy.fault(usize::MAX, "HEAD", "*", status(404));
    let names: Vec<_> = (0..1000).map(|number| format!("v{number}")).collect();
    let tags = format!("    tags: [{{names: [{}]}}]\n", names.join(", "));
    let text = config(from.host(), &proxy.host(), &tags);
    for engine in [&[][..], &["--engine", &engine]] {
        let coordinator = Coordinator::start(&[&ALONE, engine].concat());
        let id = submit(&coordinator, &json!({"config": text}));
        let messages = coordinator.ask("WatchJob", &id).all();
        let told = events(&messages);
        let mut all: Vec<_> = images(&told).iter().map(|image| image["index"].as_u64()).collect();
        all.sort_unstable();
        assert_eq!(all, (0..1000).map(Some).collect::<Vec<_>>());
        assert!((5..30).contains(&told.len()), "{} events", told.len());
        let result = &job(&coordinator, &id)["result"]["mirror"];
        assert_eq!((&result["failed"], &result["images"]), (&json!("1000"), &json!("1000")));
        // From the middle of them, as one who comes back.
        let rest = json!({"job_id": id["job_id"], "after_sequence": 3});
        assert_eq!(events(&coordinator.ask("WatchJob", &rest).all()), told[3..]);
    }
}
