//! What the service says of its work: metrics, spans, logs.

use occy_tests::collector::Collector;
use occy_tests::coordinator::Coordinator;
use occy_tests::http;
use occy_tests::image::json_of;
use occy_tests::proxy::{FaultProxy, too_many};
use occy_tests::registry::Registry;
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::small;

/// Runs a job to its end.
fn run(coordinator: &Coordinator, spec: &Value, metadata: &[&str]) {
    let mut submit = coordinator.call("SubmitJob", &json!({"spec": spec}));
    for pair in metadata {
        submit = submit.with("metadata", pair);
    }
    let id = submit.run().one()["job"]["id"].clone();
    let events = coordinator.ask("WatchJob", &json!({"job_id": id})).all();
    assert_eq!(events.last().expect("events")["event"]["state_changed"]["state"], "JOB_STATE_SUCCEEDED");
}

pub(crate) fn metrics(coordinator: &Coordinator) -> String {
    metrics_in(&coordinator.log())
}

/// Those of the program that has logged where they are.
pub(crate) fn metrics_in(log: &str) -> String {
    let line = log.lines().find(|line| line.contains("/metrics")).expect("it says where they are");
    let address = line.split("address=").nth(1).and_then(|rest| rest.split(' ').next()).expect("an address");
    let answer = http::Request::new("GET", "/metrics").send(address).expect("it answers");
    assert!(answer.get("content-type").is_some_and(|kind| kind.starts_with("application/openmetrics-text")));
    String::from_utf8(answer.body).expect("text")
}

/// The value of a metric.
pub(crate) fn value(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not in\n{metrics}")).parse().expect("a number")
}

#[test]
fn prometheus_is_told_what_happened_and_what_is_the_case() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let proxy = FaultProxy::before(from.host());
    proxy.fault(1, "GET", "/v2/app/manifests/1", too_many("0"));
    let source = format!("registry://{}/app:1", proxy.host());
    let coordinator = Coordinator::start(&["--embedded-workers", "3", "--metrics-listen", "127.0.0.1:0"]);
    let before = metrics(&coordinator);
    assert_eq!(value(&before, "occystrap_worker_slots"), 3.0);
    assert_eq!(value(&before, "occystrap_registry_requests_total"), 0.0);
    run(&coordinator, &json!({"source": source, "destination": to.uri("app:1")}), &[]);
    let after = metrics(&coordinator);
    let image = small();
    let blobs: usize = image.layers.iter().map(|layer| layer.blob().len()).sum();
    for (name, expected) in [
        ("occystrap_jobs_total{state=\"succeeded\"}", 1.0),
        ("occystrap_job_duration_seconds_count", 1.0),
        ("occystrap_layers_total{result=\"done\"}", image.layers.len() as f64),
        ("occystrap_layer_wait_seconds_count", image.layers.len() as f64),
        ("occystrap_layers_waiting", 0.0),
        ("occystrap_layers_running", 0.0),
        ("occystrap_queue_age_seconds", 0.0),
        ("occystrap_worker_slots_free", 3.0),
        ("occystrap_registry_throttled_total", 1.0),
        ("occystrap_registry_retries_total", 1.0),
    ] {
        assert_eq!(value(&after, name), expected, "{name} in\n{after}");
    }
    for name in ["occystrap_registry_received_bytes_total", "occystrap_registry_sent_bytes_total"] {
        assert!(value(&after, name) >= blobs as f64, "{name} in\n{after}");
    }
    assert!(after.ends_with("# EOF\n"));
}

#[test]
fn a_trace_goes_from_the_caller_through_a_job_to_the_registry() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let proxy = FaultProxy::before(from.host());
    let source = format!("registry://{}/app:1", proxy.host());
    let collector = Collector::start();
    let otlp = ["--otlp-endpoint", collector.endpoint()];
    let mut coordinator = Coordinator::start(&[&otlp[..], &["--embedded-workers", "0"]].concat());
    let mut worker = Worker::start(&coordinator, &otlp);
    let parent = format!("traceparent:00-{TRACE}-00f067aa0ba902b7-01");
    run(&coordinator, &json!({"source": source, "destination": to.uri("app:1")}), &[&parent]);
    // The last spans are sent at the end.
    worker.signal("TERM");
    worker.ended();
    coordinator.terminate();
    coordinator.ended();
    let spans = collector.spans();
    let named = |name: &str| {
        let ours = |span: &&Value| span["name"] == name && span["trace"] == TRACE;
        let found: Vec<_> = spans.iter().filter(ours).cloned().collect();
        assert!(!found.is_empty(), "no span {name} in {spans:#?}");
        found
    };
    let call = &named("occy.v1.PipelineService/SubmitJob")[0];
    assert_eq!((&call["service"], &call["parent"]), (&json!("occy-server"), &json!("00f067aa0ba902b7")));
    let job = &named("job")[0];
    assert_eq!(job["parent"], call["span"]);
    let layers = named("layer");
    assert_eq!(layers.len(), small().layers.len());
    assert!(layers.iter().all(|layer| layer["parent"] == job["span"]));
    let (attempts, tasks) = (named("attempt"), named("task"));
    let child_of =
        |parents: &[Value], child: &Value| parents.iter().any(|parent| parent["span"] == child["parent"]);
    assert!(attempts.iter().all(|attempt| child_of(&layers, attempt)));
    assert!(tasks.iter().all(|task| child_of(&attempts, task) && task["service"] == "occy-worker"));
    let requests = named("registry request");
    let blob = proxy
        .seen()
        .into_iter()
        .find(|seen| seen.request.path.ends_with(&small().layer_digests()[0]))
        .unwrap();
    let parent = blob.request.get("traceparent").expect("the registry is told");
    let span = parent.split('-').nth(2).unwrap();
    assert_eq!(parent.split('-').nth(1), Some(TRACE));
    let of_a_task = |request: &&Value| request["span"] == span && child_of(&tasks, request);
    assert!(requests.iter().any(|request| of_a_task(&request)), "{parent} is not in {requests:#?}");
}

#[test]
fn logs_can_be_json() {
    let mut coordinator = Coordinator::start(&["--log-format", "json"]);
    coordinator.terminate();
    coordinator.ended();
    let log = coordinator.log();
    let lines: Vec<_> = log.lines().map(|line| json_of(line.as_bytes())).collect();
    assert!(
        lines.iter().any(|line| line["level"] == "INFO" && line["fields"]["message"].is_string()),
        "{log}"
    );
}
