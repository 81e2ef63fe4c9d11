//! Layers that run on workers in processes of their own: the same images as without them, and only where what they need is offered.

use std::io::{BufRead as _, BufReader};
use std::time::{Duration, Instant};

use occy_tests::certificates::{Certificates, text};
use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::token::basic_header;
use occy_tests::tools::{read, sha256};
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::service_calls::{CHAINS, images, in_process, locally};
use crate::service_jobs::{job, state, submit};
use crate::{scratch, small, tar_uri};

/// A coordinator without workers of its own.
fn bare(arguments: &[&str]) -> Coordinator {
    Coordinator::start(&[&["--embedded-workers", "0"], arguments].concat())
}

/// Runs a job to its end; gives the manifest's digest, where it has one.
#[track_caller]
fn run(coordinator: &Coordinator, spec: &Value) -> Value {
    let id = submit(coordinator, spec);
    coordinator.ask("WatchJob", &id).all();
    let job = job(coordinator, &id);
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job}");
    for layer in job["layers"].as_array().expect("layers") {
        let worker = layer["worker"].as_str().expect("text");
        assert!(worker.is_empty() || worker.starts_with("remote"), "{worker}");
    }
    job["result"]["manifest_digest"].clone()
}

#[test]
fn registries_are_copied_and_filtered_as_in_one_process() {
    let (from, to) = (Registry::start(), Registry::start());
    for count in [1, 2] {
        let coordinator = bare(&[]);
        let start = |_| Worker::start(&coordinator, &["--name", "remote", "--slots", "2"]);
        let workers: Vec<_> = (0..count).map(start).collect();
        for (number, image) in images().iter().enumerate() {
            let source = from.push(image, "app", &number.to_string());
            for (chain, filters) in CHAINS.iter().enumerate() {
                let tag = format!("{number}-{chain}-{count}");
                let expected = in_process(&source, &to, &tag, filters);
                let destination = to.uri(&format!("remote:{tag}"));
                let mut spec = json!({"source": source, "destination": destination, "filters": filters});
                assert_eq!(run(&coordinator, &spec), expected);
                assert_eq!(to.digest("remote", &tag), expected);
                // Within one registry, where blobs are mounted, and with another compression.
                spec["destination"] = json!(from.uri(&format!("mounted:{tag}")));
                assert_eq!(run(&coordinator, &spec), expected);
                spec["compression"] = json!("zstd:5");
                spec["destination"] = json!(to.uri(&format!("zstd:{tag}")));
                let local = to.uri(&format!("zstd-local:{tag}"));
                locally(&source, &local, filters, &["--compression", "zstd:5"]);
                assert_eq!(run(&coordinator, &spec), to.digest("zstd-local", &tag));
            }
        }
        drop(workers);
    }
}

#[test]
fn ends_that_only_the_coordinator_or_the_client_has_are_streamed() {
    let (from, to) = (Registry::start(), Registry::start());
    let directory = scratch();
    let root = text(directory.path());
    let coordinator = bare(&["--allow-path", &root]);
    let _workers = [0, 1].map(|_| Worker::start(&coordinator, &["--name", "remote", "--slots", "2"]));
    let path = |name: &str| directory.path().join(name);
    for (number, image) in images().iter().enumerate() {
        let source = from.push(image, "app", &number.to_string());
        let saved = path(&format!("{number}.tar"));
        occyctl(["process", &source, &tar_uri(&saved)]).ok();
        for (chain, filters) in CHAINS.iter().enumerate() {
            let tag = format!("{number}-{chain}");
            let spec = |source: &str, destination: &str| json!({"source": source, "destination": destination, "filters": filters});
            // From a file to a registry.
            let expected = in_process(&tar_uri(&saved), &to, &format!("saved-{tag}"), filters);
            assert_eq!(
                run(&coordinator, &spec(&tar_uri(&saved), &to.uri(&format!("saved:{tag}")))),
                expected
            );
            // From a registry to files: byte for byte.
            let [local, remote] = ["local", "remote"].map(|who| path(&format!("{who}-{tag}.tar")));
            locally(&source, &tar_uri(&local), filters, &[]);
            run(&coordinator, &spec(&source, &tar_uri(&remote)));
            assert_eq!(sha256(&read(&remote)), sha256(&read(&local)), "{tag}");
            let [local, remote] = ["local", "remote"].map(|who| path(&format!("{who}-{tag}")));
            let layout = |path: &std::path::Path| format!("oci-layout://{}", text(path));
            locally(&source, &layout(&local), filters, &[]);
            run(&coordinator, &spec(&source, &layout(&remote)));
            assert_eq!(read(remote.join("index.json")), read(local.join("index.json")), "{tag}");
            occyctl(["check", &layout(&remote)]).ok();
            // From a client, and to one.
            let expected = in_process(&source, &to, &format!("direct-{tag}"), filters);
            let elements = text(&path(&format!("elements-{tag}")));
            let asked = json!({"source": source, "filters": filters});
            let answer = coordinator.call("ReadImage", &asked).with("save", &elements).run().one();
            assert_eq!(answer["complete"], true);
            let plain = json!({"destination": to.uri(&format!("read:{tag}"))});
            coordinator.call("WriteImage", &plain).with("elements", &elements).run().one();
            assert_eq!(to.digest("read", &tag), expected);
            let unfiltered = text(&path(&format!("plain-{tag}")));
            coordinator.call("ReadImage", &json!({"source": source})).with("save", &unfiltered).run().one();
            let written = json!({"destination": to.uri(&format!("written:{tag}")), "filters": filters});
            coordinator.call("WriteImage", &written).with("elements", &unfiltered).run().one();
            assert_eq!(to.digest("written", &tag), expected);
        }
    }
    let hits =
        coordinator.ask("SearchImage", &json!({"source": from.uri("app:0"), "pattern": "*.conf"})).all();
    assert_eq!(hits.iter().map(|page| page["hits"].as_array().map_or(0, Vec::len)).sum::<usize>(), 3);
}

#[test]
fn a_search_finds_what_no_text_of_a_filter_could_say() {
    let from = Registry::start();
    let odd = "etc/a:regex=true";
    let layers = vec![Layer::of(&[Member::file(odd, ""), Member::file("etc/a", "")])];
    let source = from.push(&Image::docker(layers), "app", "1");
    let coordinator = bare(&[]);
    let _worker = Worker::start(&coordinator, &[]);
    let hits = coordinator.ask("SearchImage", &json!({"source": source, "pattern": odd})).all();
    let paths: Vec<_> =
        hits.iter().flat_map(|page| page["hits"].as_array()).flatten().map(|hit| &hit["path"]).collect();
    assert_eq!(paths, [odd]);
}

#[test]
fn a_layer_goes_only_where_all_that_it_needs_is_offered() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let coordinator = bare(&["--unoffered-deadline", "60"]);
    let few = Worker::start(
        &coordinator,
        &["--name", "remote-few", "--filters", "search", "--outputs", "registry"],
    );
    let can = coordinator.ask("ListCapabilities", &json!({})).one();
    let filters: Vec<_> =
        can["filters"].as_array().into_iter().flatten().map(|filter| &filter["name"]).collect();
    assert_eq!(filters, ["search"]);
    let destination = to.uri("app:1");
    run(
        &coordinator,
        &json!({"source": source, "destination": destination, "filters": ["search:pattern=*"]}),
    );
    // What it lacks is told, and waited for.
    let filters = ["normalize-timestamps", "search:pattern=*"];
    let id = submit(&coordinator, &json!({"source": source, "destination": destination, "filters": filters}));
    let mut watcher = coordinator.call("WatchJob", &id).start();
    let waits = watcher.wait_for(|message| {
        message["event"]["layer_changed"]["waiting_reason"] != Value::Null
            && message["event"]["layer_changed"]["waiting_reason"] != ""
    });
    assert_eq!(
        waits["event"]["layer_changed"]["waiting_reason"],
        "no worker offers filter:normalize-timestamps"
    );
    let waiting = job(&coordinator, &id);
    assert_eq!(waiting["layers"][0]["state"], "LAYER_STATE_WAITING");
    // Whoever waits for it is told as well, of a job and of a call.
    let name = id["job_id"].as_str().expect("an id");
    let elsewhere = to.uri("elsewhere:1");
    let watch = ["job", "watch", name];
    let process = ["process", &source, &elsewhere, "-f", filters[0]];
    let watching = [&watch[..], &process]
        .map(|arguments| occyctl(arguments).env("OCCYSTRAP_COORDINATOR", coordinator.url()).start_saying());
    let said = watching.map(|mut child| {
        let said = BufReader::new(child.stderr.take().expect("piped")).lines().next();
        (child, said.expect("a line").expect("text"))
    });
    let all = Worker::start(&coordinator, &["--name", "remote-all"]);
    for (mut child, said) in said {
        // Nobody reads what it says any more, which stops no work.
        assert_eq!(child.wait().expect("it ends").code(), Some(0));
        let reason = "waits: no worker offers filter:normalize-timestamps";
        assert!(said.starts_with("warning: layer ") && said.ends_with(reason), "{said}");
    }
    coordinator.ask("WatchJob", &id).all();
    let done = job(&coordinator, &id);
    assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}");
    assert_eq!(done["layers"][0]["waiting_reason"], "");
    assert_eq!(done["layers"][0]["worker"], all.name());
    drop(few);
}

#[test]
fn what_nobody_offers_in_time_fails_with_the_reason() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let coordinator = bare(&["--unoffered-deadline", "0.5"]);
    let spec = json!({"source": source, "destination": to.uri("app:1"), "filters": ["normalize-timestamps"]});
    let fails = |part: &str| {
        let id = submit(&coordinator, &spec);
        coordinator.ask("WatchJob", &id).all();
        let job = job(&coordinator, &id);
        assert_eq!(
            (&job["error"]["code"], &job["error"]["reason"]),
            (&json!(9), &json!("NOT_OFFERED")),
            "{job}"
        );
        assert!(job["error"]["message"].as_str().is_some_and(|message| message.contains(part)), "{job}");
    };
    fails("no worker is connected");
    let _worker = Worker::start(&coordinator, &["--filters", "exclude"]);
    fails("no worker offers filter:normalize-timestamps");
    let read = json!({"source": source, "filters": ["search:pattern=*"]});
    coordinator.ask("ReadImage", &read).fails("FAILED_PRECONDITION", "NOT_OFFERED");
    assert!(!to.has("app", "1"));
}

#[test]
fn errors_are_those_of_one_process() {
    let from = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 100_000)]);
    let source = from.push(&image, "app", "1");
    let broken = small()
        .edit_config(|config| config["rootfs"]["diff_ids"][0] = config["rootfs"]["diff_ids"][1].clone());
    let broken = from.push(&broken, "broken", "1");
    let protected = Registry::with_htpasswd("user", "hunter2");
    let here = Coordinator::start(&["--embedded-workers", "1", "--max-layer-size", "50000"]);
    let elsewhere = bare(&["--max-layer-size", "50000"]);
    let worker = Worker::start(&elsewhere, &[]);
    let write = |source: &str, destination: &str, filters: &[&str]| {
        let spec = json!({"source": source, "destination": destination, "filters": filters});
        let [here, there] = [&here, &elsewhere].map(|coordinator| {
            let id = submit(coordinator, &spec);
            coordinator.ask("WatchJob", &id).all();
            job(coordinator, &id)["error"].clone()
        });
        assert!(here["code"].as_u64().is_some_and(|code| code > 0), "{here}");
        assert_eq!(here, there);
    };
    let filters = ["normalize-timestamps"];
    write(&source, &from.uri("copy:1"), &filters);
    let foreign = Image::docker(vec![Layer::noise(1, 1000).foreign("https://example.com/layer")]);
    write(&from.push(&foreign, "foreign", "1"), &from.uri("copy:1"), &filters);
    write(&broken, &from.uri("copy:1"), &filters);
    write(&source, &protected.uri("copy:1"), &[]);
    drop(worker);
}

#[test]
fn a_worker_logs_in_with_what_its_own_operator_gave_it() {
    let (from, to) = (Registry::start(), Registry::with_htpasswd("user", "hunter2"));
    let source = from.push(&small(), "app", "1");
    let directory = scratch();
    let header = basic_header("user", "hunter2");
    let auth = header.strip_prefix("Basic ").expect("basic");
    let config = text(&directory.path().join("config.json"));
    std::fs::write(&config, json!({"auths": {to.host(): {"auth": auth}}}).to_string()).expect("a file");
    let coordinator = bare(&["--docker-config", &config]);
    let worker =
        Worker::start(&coordinator, &["--name", "remote", "--docker-config", &config, "--log", "debug"]);
    run(
        &coordinator,
        &json!({"source": source, "destination": to.uri("app:1"), "filters": ["normalize-timestamps"]}),
    );
    assert!(!worker.log().contains("hunter2") && !worker.log().contains(auth));
}

#[test]
fn a_cancelled_job_stops_on_its_worker_within_a_second() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&Image::docker(vec![Layer::noise(1, 400_000)]), "app", "1");
    let proxy = occy_tests::proxy::FaultProxy::before(from.host());
    proxy.fault(9, "GET", "*/blobs/*", occy_tests::proxy::slow(100, Duration::from_millis(200)));
    let coordinator = bare(&[]);
    let worker = Worker::start(&coordinator, &["--name", "remote", "--slots", "1", "--log", "debug"]);
    let slow = source.replace(from.host(), &proxy.host());
    let id = submit(
        &coordinator,
        &json!({"source": slow, "destination": to.uri("app:1"), "filters": ["normalize-timestamps"]}),
    );
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| {
        message["event"]["progress"]["layers"][0]["bytes"].as_str().is_some_and(|bytes| bytes != "0")
    });
    coordinator.ask("CancelJob", &id).one();
    let start = Instant::now();
    // The only slot is free again, for something that takes no time.
    run(&coordinator, &json!({"source": from.uri("app:1"), "destination": to.uri("app:2")}));
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(state(&coordinator, &id), "JOB_STATE_CANCELLED");
    drop(worker);
}

#[test]
fn workers_show_certificates_and_check_them() {
    let path = |name| text(&Certificates::shared().path(name));
    let (certificate, key, authority) = (path("server.crt"), path("server.key"), path("ca.crt"));
    let tls = ["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &authority];
    let coordinator = bare(&tls);
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let url = format!("https://{}", coordinator.address());
    let (client, client_key) = (path("client.crt"), path("client.key"));
    let trusted = ["--name", "remote", "--tls-ca", &authority];
    let _worker =
        Worker::at(&url, &[&trusted[..], &["--tls-cert", &client, "--tls-key", &client_key]].concat());
    let spec = json!({"source": source, "destination": to.uri("app:1"), "filters": ["normalize-timestamps"]});
    let call = |method: &str, request: &Value| {
        let call = coordinator.call(method, request).with("ca", &authority);
        call.with("certificate", &client).with("key", &client_key).run()
    };
    let submitted = call("SubmitJob", &json!({"spec": spec})).one();
    call("WatchJob", &json!({"job_id": submitted["job"]["id"]})).all();
    assert_eq!(to.digest("app", "1"), in_process(&source, &to, "1", &["normalize-timestamps"]));
}
