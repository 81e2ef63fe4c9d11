//! What the coordinator does not do for strangers, and how its operator allows it.

use occy_tests::certificates::{Certificates, text};
use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::registry::Registry;
use occy_tests::token::basic_header;
use serde_json::{Value, json};

use crate::{scratch, small};

#[test]
fn paths_sockets_and_private_networks_are_refused_unless_allowed() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let inside = |name: &str| format!("tar://{}", text(&directory.path().join(name)));
    let strict = Coordinator::strict(&[], &[]);
    let read =
        |coordinator: &Coordinator, source: &str| coordinator.ask("ReadImage", &json!({"source": source}));
    let write = |coordinator: &Coordinator, destination: &str| {
        let spec = json!({"source": source, "destination": destination});
        coordinator.ask("SubmitJob", &json!({"spec": spec}))
    };
    for end in ["tar:///etc/passwd", "tar://-", "docker://app", "oci:///tmp/x", &inside("image.tar")] {
        read(&strict, end).fails("PERMISSION_DENIED", "NOT_ALLOWED_HERE");
        write(&strict, end).fails("PERMISSION_DENIED", "NOT_ALLOWED_HERE");
    }
    let networks = ["169.254.169.254", "10.0.0.1", "[::1]", "localhost", registry.host()];
    for host in networks {
        let error = read(&strict, &format!("registry://{host}/app:1"));
        let error = error.fails("PERMISSION_DENIED", "NETWORK_NOT_ALLOWED");
        assert!(
            error["details"]["ErrorInfo"]["metadata"]["hint"]
                .as_str()
                .is_some_and(|h| h.contains("--allow-network"))
        );
    }
    let root = text(directory.path());
    let open = Coordinator::start(&["--allow-path", &root]);
    let job = write(&open, &inside("image.tar")).one();
    let events = open.ask("WatchJob", &json!({"job_id": job["job"]["id"]})).all();
    assert_eq!(
        events.last().expect("events")["event"]["state_changed"]["state"],
        "JOB_STATE_SUCCEEDED",
        "{events:?}"
    );
    read(&open, &inside("image.tar")).one();
    read(&open, &inside("../../etc/passwd")).fails("PERMISSION_DENIED", "NOT_ALLOWED_HERE");
    let outside = scratch();
    std::os::unix::fs::symlink(outside.path(), directory.path().join("link")).expect("a link");
    write(&open, &inside("link/image.tar")).fails("PERMISSION_DENIED", "NOT_ALLOWED_HERE");
}

#[test]
fn filters_that_take_long_to_compile_keep_nobody_waiting_and_have_their_limits() {
    let coordinator = Coordinator::start(&[]);
    let spec = |filters: &[String]| {
        let ends = json!({"source": "registry://x.invalid/a", "destination": "registry://x.invalid/b"});
        let mut spec = json!({"spec": ends});
        spec["spec"]["filters"] = json!(filters);
        spec
    };
    // As much as there may be, more of them at once than this machine can have cores for the calls.
    let long = format!("exclude:pattern={}", "?a[b-d]".repeat(570));
    let slow = vec![long.clone(); 4];
    let mut submissions: Vec<_> =
        (0..8).map(|_| coordinator.call("SubmitJob", &spec(&slow)).start()).collect();
    for _ in 0..3 {
        coordinator.call("ListCapabilities", &json!({})).with("timeout", 5).run().one();
    }
    for submission in &mut submissions {
        let job = submission.next_message().expect("an answer");
        assert!(job["job"]["id"].is_string(), "{job}");
    }
    // More than that is not even begun.
    let too_long = vec![long; 5];
    let error = coordinator.ask("SubmitJob", &spec(&too_long)).fails("INVALID_ARGUMENT", "INVALID_FIELD");
    assert!(
        error["message"].as_str().is_some_and(|message| message.contains("16384 bytes together")),
        "{error}"
    );
    let large = [r"search:pattern=\w{500},regex=true".to_owned()];
    let error = coordinator.ask("SubmitJob", &spec(&large)).fails("INVALID_ARGUMENT", "MALFORMED");
    assert!(error["message"].as_str().is_some_and(|message| message.contains("size limit")), "{error}");
}

#[test]
fn a_file_that_a_filter_names_is_the_clients_and_is_not_written_here() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let file = directory.path().join("layers.jsonl");
    let filters = [format!("inspect:file={}", text(&file))];
    let coordinator = Coordinator::start(&[]);
    let read = coordinator.ask("ReadImage", &json!({"source": source, "filters": filters})).one();
    assert_eq!(read["found"][0]["append_to"], text(&file));
    assert!(read["found"][0]["text"].as_str().is_some_and(|line| line.contains("DiffId")));
    assert!(!file.exists());
}

#[test]
fn the_operators_credentials_are_used_only_where_he_grants_them() {
    let registry = Registry::with_htpasswd("user", "hunter2");
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let header = basic_header("user", "hunter2");
    let auth = header.strip_prefix("Basic ").expect("basic");
    let config = json!({"auths": {registry.host(): {"auth": auth}}});
    let path = directory.path().join("config.json");
    std::fs::write(&path, config.to_string()).expect("a file");
    let networks = ["--allow-network", "127.0.0.0/8"];
    let ambient = Coordinator::strict(&networks, &[("DOCKER_CONFIG", &text(directory.path()))]);
    let refused =
        ambient.ask("ReadImage", &json!({"source": source})).fails("PERMISSION_DENIED", "REGISTRY_REFUSED");
    assert_eq!(refused["details"]["ErrorInfo"]["metadata"]["http_status"], "401");
    let granted = Coordinator::strict(&[&networks[..], &["--docker-config", &text(&path)]].concat(), &[]);
    granted.ask("ReadImage", &json!({"source": source})).one();
    assert!(!granted.log().contains("hunter2"));
}

#[test]
fn what_a_request_gets_wrong_is_named() {
    let coordinator = Coordinator::start(&[]);
    let submit = |spec: Value| coordinator.ask("SubmitJob", &json!({"spec": spec}));
    let good = json!({"source": "registry://x.invalid/a", "destination": "registry://x.invalid/b"});
    let with = |key: &str, value: Value| {
        let mut spec = good.clone();
        spec[key] = value;
        spec
    };
    for (spec, reason, part) in [
        (json!({}), "INVALID_FIELD", "source"),
        (with("destination", json!("")), "INVALID_FIELD", "destination"),
        (with("source", json!("nonsense")), "MALFORMED", "nonsense"),
        (with("source", json!("registry://UPPER/Case/")), "MALFORMED", "Case"),
        (with("filters", json!(["strip"])), "MALFORMED", "strip"),
        (with("filters", json!(vec!["normalize-timestamps"; 65])), "INVALID_FIELD", "filters"),
        (with("compression", json!("lz4")), "INVALID_FIELD", "lz4"),
        (with("parallel", json!(1000)), "INVALID_FIELD", "parallel"),
        (
            with("source", json!(format!("registry://x.invalid/{}", "a".repeat(5000)))),
            "INVALID_FIELD",
            "source",
        ),
    ] {
        let error = submit(spec).fails("INVALID_ARGUMENT", reason);
        assert!(error["message"].as_str().is_some_and(|message| message.contains(part)), "{part}: {error}");
    }
    let first = coordinator.ask(
        "WriteImage",
        &json!({"source": "registry://x.invalid/a", "destination": "registry://x.invalid/b"}),
    );
    first.fails("INVALID_ARGUMENT", "INVALID_FIELD");
    assert_eq!(coordinator.ask("ListJobs", &json!({})).one()["jobs"], json!([]), "none was accepted");
}

#[test]
fn the_spool_has_a_cap() {
    let registry = Registry::start();
    let source = registry.push(&Image::docker(vec![Layer::noise(1, 3_000_000)]), "app", "1");
    let directory = scratch();
    let file = text(&directory.path().join("elements"));
    let coordinator = Coordinator::start(&["--spool-limit", "2M"]);
    coordinator.call("ReadImage", &json!({"source": source})).with("save", &file).run().one();
    let spec = json!({"destination": registry.uri("copy:1")});
    let write = || coordinator.call("WriteImage", &spec).with("elements", &file).run();
    for _ in 0..2 {
        write().fails("RESOURCE_EXHAUSTED", "STORAGE_FULL");
    }
    assert!(!registry.has("copy", "1"));
}

#[test]
fn clients_without_a_certificate_are_turned_away_where_one_is_asked_for() {
    let path = |name| text(&Certificates::shared().path(name));
    let (certificate, key, authority) = (path("server.crt"), path("server.key"), path("ca.crt"));
    let tls = ["--tls-cert", &certificate, "--tls-key", &key];
    let secure = Coordinator::start(&tls);
    let ask = |coordinator: &Coordinator| {
        coordinator.call("ListCapabilities", &json!({})).with("ca", &authority).with("timeout", 5)
    };
    ask(&secure).run().one();
    assert!(secure.call("ListCapabilities", &json!({})).with("timeout", 5).run().error.is_some());
    let mutual = Coordinator::start(&[&tls[..], &["--tls-client-ca", &authority]].concat());
    assert!(ask(&mutual).run().error.is_some());
    ask(&mutual).with("certificate", path("client.crt")).with("key", path("client.key")).run().one();
}

#[test]
fn a_file_and_variables_configure_it_too() {
    let directory = scratch();
    let file = directory.path().join("server.toml");
    std::fs::write(&file, "embedded-workers = 3\nallow-network = [\"127.0.0.0/8\"]\n").expect("a file");
    let workers = |coordinator: &Coordinator| {
        coordinator.ask("ListCapabilities", &json!({})).one()["workers"].as_array().map(Vec::len)
    };
    let file = text(&file);
    let from_file = Coordinator::strict(&["--config", &file], &[]);
    assert_eq!(workers(&from_file), Some(3));
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    from_file.ask("ReadImage", &json!({"source": source})).one();
    let variables = [("OCCYSTRAP_EMBEDDED_WORKERS", "4"), ("OCCYSTRAP_CONFIG", &file)];
    assert_eq!(workers(&Coordinator::strict(&[], &variables)), Some(4));
    assert_eq!(workers(&Coordinator::strict(&["--embedded-workers", "5"], &variables)), Some(5));
}
