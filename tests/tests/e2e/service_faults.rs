//! Callers that are slow, or go away; deadlines.

use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member};
use occy_tests::proxy::{FaultProxy, slow};
use occy_tests::registry::Registry;
use occy_tests::worker::Worker;
use serde_json::json;

/// Slots that are free.
fn free(coordinator: &Coordinator) -> u64 {
    let can = coordinator.ask("ListCapabilities", &json!({})).one();
    can["workers"].as_array().into_iter().flatten().filter_map(|worker| worker["free_slots"].as_u64()).sum()
}

/// A registry with an image whose layer comes slowly through the proxy, and where it is there.
fn slow_layer() -> (Registry, FaultProxy, String) {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 400_000)]);
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let layer = format!("*/blobs/{}", image.layer_digests()[0]);
    proxy.fault(9, "GET", &layer, slow(100, Duration::from_millis(200)));
    let source = format!("registry://{}/app:1", proxy.host());
    (registry, proxy, source)
}

#[test]
fn a_caller_that_goes_away_stops_its_work_within_a_second() {
    let (_registry, _proxy, source) = slow_layer();
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    for (method, request) in [
        ("ReadImage", json!({"source": source})),
        ("SearchImage", json!({"source": source, "pattern": "*"})),
        ("ProcessImage", json!({"source": source})),
    ] {
        let running = coordinator.call(method, &request).start();
        let start = Instant::now();
        while free(&coordinator) > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "{method} does not begin");
            sleep(Duration::from_millis(20));
        }
        // Killed, as a client's machine would be.
        drop(running);
        let start = Instant::now();
        while free(&coordinator) == 0 {
            // A look takes the Python client up to a second by itself.
            assert!(start.elapsed() < Duration::from_secs(2), "{method} goes on");
        }
        // Politely.
        let stopped = coordinator.call(method, &request).with("stop-after", 1).with("timeout", 3);
        drop(stopped.run());
        assert_eq!(free(&coordinator), 1);
    }
}

#[test]
fn a_callers_worker_reads_nothing_more_within_a_second_after_it_has_gone() {
    let (registry, proxy, source) = slow_layer();
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let _worker = Worker::start(&coordinator, &[]);
    let copy = json!({"source": source, "destination": registry.uri("copy:1")});
    for (method, request) in [("ReadImage", json!({"source": source})), ("ProcessImage", copy)] {
        let flows = |pause| {
            let before = proxy.sent();
            sleep(Duration::from_millis(pause));
            proxy.sent() > before
        };
        let asked = proxy.sent();
        let running = coordinator.call(method, &request).start();
        let start = Instant::now();
        // More than the documents.
        while proxy.sent() < asked + 20_000 || !flows(500) {
            assert!(start.elapsed() < Duration::from_secs(20), "{method} does not begin");
        }
        // Killed, as a client's machine would be.
        drop(running);
        sleep(Duration::from_secs(1));
        assert!(!flows(600), "{method}: its layer is still read");
    }
    assert!(!registry.has("copy", "1"));
}

#[test]
fn a_deadline_ends_a_call_and_its_work() {
    let (_registry, _proxy, source) = slow_layer();
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let late = coordinator.call("ReadImage", &json!({"source": source})).with("timeout", 0.5).run();
    assert_eq!(late.error.expect("an error")["code"], "DEADLINE_EXCEEDED");
    assert_eq!(free(&coordinator), 1);
}

#[test]
fn a_slow_reader_slows_the_source_and_memory_stays_bounded() {
    const SIZE: usize = 320 * 1024 * 1024;
    let registry = Registry::start();
    let source = registry.push(
        &Image::docker(vec![
            Layer::of(&[Member::file("zeros", vec![0; SIZE])]).packed(occy_tests::tools::Packing::Plain),
        ]),
        "app",
        "1",
    );
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let before = coordinator.peak_memory();
    for form in ["LAYER_FORM_STORED", "LAYER_FORM_TAR"] {
        let request = json!({"source": source, "layer_form": form});
        let call = coordinator.call("ReadImage", &request).with("pause", 0.002);
        assert_eq!(call.run().one()["complete"], true);
    }
    let grown = coordinator.peak_memory() - before;
    assert!(grown < 40 * 1024 * 1024, "{grown} bytes for a layer of {SIZE}");
}
