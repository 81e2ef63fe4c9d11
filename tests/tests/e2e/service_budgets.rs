//! What a fleet asks of a registry: together as much as one polite client may, whoever runs what.

use std::time::{Duration, Instant};

use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member};
use occy_tests::limited::{Count, LimitedRegistry, Limits};
use occy_tests::nats::Nats;
use occy_tests::registry::Registry;
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::service_jobs::{job, state, submit};

/// An image of so many small layers that no other image has.
fn image(name: usize, layers: usize) -> Image {
    let layer =
        |layer| Layer::of(&[Member::file(&format!("etc/{name}"), format!("{name} {layer}").repeat(100))]);
    Image::docker((0..layers).map(layer).collect())
}

/// Stores images, and gives their names behind the registry's limits.
fn sources(registry: &Registry, limited: &LimitedRegistry, images: usize, layers: usize) -> Vec<String> {
    let push = |number| registry.push(&image(number, layers), "app", &number.to_string());
    (0..images).map(push).map(|uri| uri.replace(registry.host(), &limited.host())).collect()
}

/// Submits a job for each, which edits every layer and writes it to the same registry; waits for all, and checks what came of them.
fn run_all(
    coordinators: &[&Coordinator],
    registry: &Registry,
    limited: &LimitedRegistry,
    sources: &[String],
) {
    let submitted = sources.iter().enumerate().map(|(number, source)| {
        let destination = format!("registry://{}/out:{number}", limited.host());
        let spec = json!({"source": source, "destination": destination, "filters": ["normalize-timestamps:ts=7"], "parallel": 8});
        submit(coordinators[number % coordinators.len()], &spec)
    });
    let submitted: Vec<Value> = submitted.collect();
    for (number, id) in submitted.iter().enumerate() {
        coordinators[0].ask("WatchJob", id).all();
        assert_eq!(state(coordinators[0], id), "JOB_STATE_SUCCEEDED", "{}", job(coordinators[0], id));
        registry.pull("out", &number.to_string());
    }
}

fn workers(coordinator: &Coordinator) -> Vec<Worker> {
    (0..4)
        .map(|number| Worker::start(coordinator, &["--slots", "4", "--name", &format!("w{number}")]))
        .collect()
}

fn bare(arguments: &[&str]) -> Coordinator {
    Coordinator::start(&[&["--embedded-workers", "0"], arguments].concat())
}

/// For `tests/bench/budgets`: how long it took, and how long the registry's rate alone takes for what it took.
fn tell(what: &str, start: Instant, limits: Limits, count: &Count) {
    let (seconds, taken) = (start.elapsed().as_secs_f64(), (count.requests - count.refused) as f64);
    let ideal = (taken - limits.burst) / limits.rate;
    let (requests, refused) = (count.requests, count.refused);
    println!(
        "{what}: {requests} requests, {refused} refused, {seconds:.1} s, ideal {ideal:.1} s, ratio {:.2}",
        seconds / ideal
    );
}

#[test]
fn four_workers_and_their_coordinator_pass_no_limit_that_is_configured() {
    let registry = Registry::start();
    let limits = Limits { rate: 100.0, burst: 25.0, latency: Duration::from_millis(20) };
    let limited = LimitedRegistry::before(registry.host(), limits);
    let sources = sources(&registry, &limited, 6, 8);
    let rule = format!("{} rate=95 concurrency=3", limited.host());
    let coordinator = bare(&["--registry-budget", &rule]);
    let _workers = workers(&coordinator);
    let start = Instant::now();
    run_all(&[&coordinator], &registry, &limited, &sources);
    let count = limited.counted();
    tell("configured", start, limits, &count);
    assert!(count.reading <= 3 && count.writing <= 3, "{count:?}");
    assert!(count.refused * 50 < count.requests, "{count:?}");
}

#[test]
fn what_one_of_them_is_refused_all_of_them_heed() {
    let registry = Registry::start();
    // Less than a busy machine asks for, too.
    let limits = Limits { rate: 30.0, burst: 20.0, latency: Duration::from_millis(5) };
    let limited = LimitedRegistry::before(registry.host(), limits);
    let sources = sources(&registry, &limited, 24, 8);
    let coordinator = bare(&[]);
    let _workers = workers(&coordinator);
    let start = Instant::now();
    run_all(&[&coordinator], &registry, &limited, &sources);
    let count = limited.counted();
    tell("found out", start, limits, &count);
    assert!(count.refused > 0, "the registry was too patient: {count:?}");
    assert!(count.refused * 50 < count.requests, "{count:?}");
}

#[test]
fn coordinators_with_one_engine_share_a_budget() {
    let nats = Nats::start();
    let registry = Registry::start();
    let limits = Limits { rate: 1000.0, burst: 1000.0, latency: Duration::from_millis(20) };
    let limited = LimitedRegistry::before(registry.host(), limits);
    let sources = sources(&registry, &limited, 6, 6);
    let (rule, url) = (format!("{} concurrency=4", limited.host()), nats.url());
    let replica = || bare(&["--registry-budget", &rule, "--engine", &url, "--engine-lease", "3"]);
    let (one, two) = (replica(), replica());
    for coordinator in [&one, &two] {
        coordinator.wait_for_log("coordinators=2", Duration::from_secs(20));
    }
    let _workers = [workers(&one), workers(&two)];
    run_all(&[&one, &two], &registry, &limited, &sources);
    let count = limited.counted();
    assert!(count.reading <= 4 && count.writing <= 4, "{count:?}");
}

/// Submits a job that writes more than a quota of a few requests allows, and waits until it says that they are used up.
fn use_up(coordinator: &Coordinator, limited: &LimitedRegistry, source: &str, name: &str) -> Value {
    let destination = format!("registry://{}/out:{name}", limited.host());
    let spec =
        json!({"source": source, "destination": destination, "filters": ["normalize-timestamps:ts=7"]});
    let id = submit(coordinator, &spec);
    wait_until_used_up(coordinator, &id);
    id
}

fn wait_until_used_up(coordinator: &Coordinator, id: &Value) {
    let mut watcher = coordinator.call("WatchJob", id).start();
    watcher.wait_for(|message| {
        let layer = &message["event"]["layer_changed"];
        let reason = layer["waiting_reason"].as_str().unwrap_or_default();
        layer["state"] == "LAYER_STATE_RUNNING" && reason.contains("requests in 600 s are used up")
    });
}

fn written(limited: &LimitedRegistry) -> usize {
    ["POST", "PATCH", "PUT"].map(|method| limited.count(method, "*")).iter().sum()
}

#[test]
fn who_waits_for_a_quota_says_so_and_the_next_coordinator_knows_what_is_used_up() {
    let registry = Registry::start();
    let limits = Limits { rate: 1000.0, burst: 1000.0, latency: Duration::ZERO };
    let limited = LimitedRegistry::before(registry.host(), limits);
    let sources = sources(&registry, &limited, 1, 6);
    let rule = format!("{}/push quota=4/600s", limited.host());
    let mut coordinator = bare(&["--registry-budget", &rule]);
    let _workers = workers(&coordinator);
    let id = use_up(&coordinator, &limited, &sources[0], "0");
    assert_eq!(written(&limited), 4);
    coordinator.kill();
    coordinator.restart_there();
    wait_until_used_up(&coordinator, &id);
    assert_eq!(written(&limited), 4);
    coordinator.ask("CancelJob", &id).one();
}

#[test]
fn coordinators_with_one_engine_draw_from_one_quota() {
    let nats = Nats::start();
    let registry = Registry::start();
    let limits = Limits { rate: 1000.0, burst: 1000.0, latency: Duration::ZERO };
    let limited = LimitedRegistry::before(registry.host(), limits);
    let sources = sources(&registry, &limited, 2, 9);
    let (rule, url) = (format!("{}/push quota=7/600s", limited.host()), nats.url());
    let replica = || bare(&["--registry-budget", &rule, "--engine", &url, "--engine-lease", "3"]);
    let coordinators = [replica(), replica()];
    let _workers = [workers(&coordinators[0]), workers(&coordinators[1])];
    // Whichever of them runs these, what one has begun is not another's.
    let ids: Vec<_> = coordinators
        .iter()
        .zip(&sources)
        .enumerate()
        .map(|(number, (coordinator, source))| use_up(coordinator, &limited, source, &number.to_string()))
        .collect();
    assert_eq!(written(&limited), 7);
    for id in &ids {
        coordinators[0].ask("CancelJob", id).one();
    }
}
