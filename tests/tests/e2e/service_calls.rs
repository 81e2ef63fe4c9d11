//! The service's calls: images on the caller's own stream, asked for by a client that is not ours.

use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image};
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::tools::{Packing, sha256};
use serde_json::{Value, json};

use crate::{layers, scratch, small};

/// The chains that every way of the service is tried with: none, one that edits, one that observes.
pub(crate) const CHAINS: [&[&str]; 3] = [
    &[],
    &["exclude:pattern=*.conf", "normalize-timestamps:ts=1000"],
    &["search:pattern=*.conf", "inspect:file=layers.jsonl"],
];

/// Images whose manifests are compared: a small one with a layer that stands twice, and one with zstd.
pub(crate) fn images() -> [Image; 2] {
    let zstd = Layer::noise(1, 300_000).packed(Packing::Zstd);
    [
        Image::docker([layers(), layers()].concat()),
        Image::oci(vec![zstd, Layer::noise(2, 9), Layer::of(&[Member::file("app.conf", "x")])]),
    ]
}

/// Processes an image without the service; gives the manifest's digest.
pub(crate) fn in_process(source: &str, to: &Registry, tag: &str, filters: &[&str]) -> String {
    locally(source, &to.uri(&format!("local:{tag}")), filters, &[]);
    to.digest("local", tag)
}

/// Processes an image without the service, with more options.
pub(crate) fn locally(source: &str, destination: &str, filters: &[&str], options: &[&str]) {
    let directory = scratch();
    let flags = filters.iter().flat_map(|filter| ["-f", filter]);
    let arguments = ["process", source, destination].into_iter().chain(options.iter().copied()).chain(flags);
    occyctl(arguments).directory(directory.path()).ok();
}

#[test]
fn jobs_give_the_same_manifests_as_one_process_with_any_number_of_workers() {
    let (from, to) = (Registry::start(), Registry::start());
    let coordinators = ["1", "2", "5"].map(|workers| Coordinator::start(&["--embedded-workers", workers]));
    for (number, image) in images().iter().enumerate() {
        let source = from.push(image, "app", &number.to_string());
        for (chain, filters) in CHAINS.iter().enumerate() {
            let expected = in_process(&source, &to, &format!("{number}-{chain}"), filters);
            for (workers, coordinator) in coordinators.iter().enumerate() {
                let destination = to.uri(&format!("job:{number}-{chain}-{workers}"));
                let spec = json!({"source": source, "destination": destination, "filters": filters});
                let job = coordinator.ask("SubmitJob", &json!({"spec": spec})).one();
                let events = coordinator.ask("WatchJob", &json!({"job_id": job["job"]["id"]})).all();
                let last = &events.last().expect("events")["event"]["state_changed"];
                assert_eq!(last["result"]["manifest_digest"], expected, "{last}");
                assert_eq!(to.digest("job", &format!("{number}-{chain}-{workers}")), expected);
            }
        }
    }
}

#[test]
fn calls_give_the_same_manifests_as_one_process_whichever_end_is_the_callers() {
    let (from, to) = (Registry::start(), Registry::start());
    let coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let directory = scratch();
    let [plain, filtered] =
        ["plain", "filtered"].map(|name| directory.path().join(name).display().to_string());
    for (number, image) in images().iter().enumerate() {
        let source = from.push(image, "app", &number.to_string());
        coordinator.call("ReadImage", &json!({"source": source})).with("save", &plain).run().one();
        for (chain, filters) in CHAINS.iter().enumerate() {
            let tag = format!("{number}-{chain}");
            let expected = in_process(&source, &to, &tag, filters);
            let read = json!({"source": source, "filters": filters});
            coordinator.call("ReadImage", &read).with("save", &filtered).run().one();
            for (file, filters) in [(&plain, *filters), (&filtered, &[][..])] {
                let spec = json!({"destination": to.uri(&format!("written:{tag}")), "filters": filters});
                let written = coordinator.call("WriteImage", &spec).with("elements", file).run().one();
                assert_eq!(written["result"]["manifest_digest"], expected, "{file} {filters:?}");
                assert_eq!(to.digest("written", &tag), expected);
            }
            let destination = to.uri(&format!("both:{tag}"));
            let spec = json!({"source": source, "destination": destination, "filters": filters});
            let parts = coordinator.ask("ProcessImage", &spec).all();
            let last = parts.last().expect("a result");
            assert_eq!(last["result"]["manifest_digest"], expected, "neither end is the caller's");
        }
    }
}

#[test]
fn what_is_read_unfiltered_is_byte_for_byte_what_the_source_has() {
    let from = Registry::start();
    let image = Image::new(Family::Oci, [layers(), layers()].concat());
    let source = from.push(&image, "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "3"]);
    let read = coordinator.ask("ReadImage", &json!({"source": source})).one();
    assert_eq!(read["documents"]["manifest"], image.digest());
    assert_eq!(read["documents"]["config_file"], image.config_digest());
    assert_eq!(read["documents"]["final_config_file"], Value::Null);
    assert_eq!(read["complete"], true);
    for (layer, expected) in read["layers"].as_array().expect("layers").iter().zip(image.layer_digests()) {
        assert_eq!(layer["digest"], expected);
    }
    assert_eq!(read["layers"][2]["same_as"], 0, "a layer that stands twice is sent once");
    assert_eq!(read["start"]["tag"], "1");
    assert_eq!(read["start"]["platform"]["os"], "linux");

    let read = coordinator.ask("ReadImage", &json!({"source": source, "layer_form": "LAYER_FORM_TAR"})).one();
    for (layer, expected) in read["layers"].as_array().expect("layers").iter().zip(image.diff_ids()) {
        assert_eq!((&layer["digest"], &layer["diff_id"]), (&json!(expected), &json!(expected)));
    }
}

#[test]
fn the_caller_may_be_both_ends() {
    let from = Registry::start();
    let source = from.push(&small(), "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let directory = scratch();
    let file = directory.path().join("elements").display().to_string();
    coordinator.call("ReadImage", &json!({"source": source})).with("save", &file).run().all();
    let spec =
        json!({"filters": ["normalize-timestamps", "search:pattern=*.conf"], "layer_form": "LAYER_FORM_TAR"});
    let call = || coordinator.call("ProcessImage", &spec).with("elements", &file);
    let parts = call().run().all();
    let image = parts.iter().find(|part| part.get("layers").is_some()).expect("elements");
    assert_eq!(image["complete"], true);
    assert_eq!(image["layers"][0]["changed"], true);
    assert!(image["found"][0]["text"].as_str().expect("text").contains("etc/app.conf"));
    let direct =
        json!({"source": source, "filters": ["normalize-timestamps"], "layer_form": "LAYER_FORM_TAR"});
    let direct = coordinator.ask("ReadImage", &direct).one();
    assert_eq!(image["layers"], direct["layers"]);
    // Who sends everything before it reads anything harms nobody.
    assert_eq!(call().switch("wait-first").with("pause", 0.01).run().error, None);
}

#[test]
fn an_image_without_its_end_or_with_other_bytes_has_never_been_there() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let directory = scratch();
    let file = directory.path().join("elements").display().to_string();
    coordinator.call("ReadImage", &json!({"source": source})).with("save", &file).run().all();
    let spec = json!({"destination": to.uri("app:1")});
    let call = |method: &str| coordinator.call(method, &spec).with("elements", &file);
    for method in ["WriteImage", "ProcessImage"] {
        call(method).switch("without-end").run().fails("ABORTED", "STREAM_TRUNCATED");
        let error = call(method).switch("corrupt").run().fails("INVALID_ARGUMENT", "INVALID_ELEMENTS");
        assert!(error["message"].as_str().expect("text").contains("layer 0 is sha256:"), "{error}");
        assert!(!to.has("app", "1"));
    }
    assert_eq!(call("WriteImage").run().error, None);
    assert!(to.has("app", "1"));
}

#[test]
fn hits_are_streamed_with_their_layers() {
    let from = Registry::start();
    let image = small();
    let source = from.push(&image, "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let pages = coordinator.ask("SearchImage", &json!({"source": source, "pattern": "*.conf"})).all();
    let mut hits: Vec<&Value> =
        pages.iter().flat_map(|page| page["hits"].as_array().expect("hits")).collect();
    hits.sort_by_key(|hit| hit["layer_index"].as_u64());
    let names: Vec<_> = hits.iter().map(|hit| (hit["layer"].as_str(), hit["path"].as_str())).collect();
    let [first, second] = [0, 1].map(|index| Some(image.diff_ids()[index].clone()));
    assert_eq!(
        names,
        [
            (first.as_deref(), Some("etc/app.conf")),
            (first.as_deref(), Some("etc/draft.conf")),
            (second.as_deref(), Some("etc/.wh.draft.conf")),
        ]
    );
    assert_eq!((&hits[0]["kind"], &hits[0]["size"]), (&json!("FILE_KIND_REGULAR"), &json!("4")));
    let bad = coordinator.ask("SearchImage", &json!({"source": source, "pattern": "(", "regex": true}));
    bad.fails("INVALID_ARGUMENT", "INVALID_FIELD");
}

#[test]
fn many_hits_come_in_messages_that_fit() {
    let from = Registry::start();
    let files: Vec<_> = (0..3000).map(|number| Member::file(&format!("d/{number:0>200}"), "")).collect();
    let source = from.push(&Image::oci(vec![Layer::of(&files)]), "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let pages = coordinator.ask("SearchImage", &json!({"source": source, "pattern": "*"})).all();
    assert_eq!(pages.iter().map(|page| page["hits"].as_array().map_or(0, Vec::len)).sum::<usize>(), 3000);
    assert!(pages.len() > 10);
    let filters = ["search:pattern=*,script-friendly=true"];
    let read = coordinator.ask("ReadImage", &json!({"source": source, "filters": filters})).one();
    let text: String =
        read["found"].as_array().expect("pieces").iter().filter_map(|piece| piece["text"].as_str()).collect();
    assert_eq!(text.lines().count(), 3000);
}

#[test]
fn a_probe_and_reflection_are_answered() {
    let coordinator = Coordinator::start(&["--embedded-workers", "3"]);
    for service in ["", "occy.v1.PipelineService"] {
        let health = coordinator.ask("Health", &json!({"service": service})).one();
        assert_eq!(health["status"], "SERVING");
    }
    let services = coordinator.ask("Services", &json!({})).one();
    let names: Vec<_> =
        services["services"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    assert!(
        names.contains(&"occy.v1.PipelineService") && names.contains(&"grpc.health.v1.Health"),
        "{names:?}"
    );
    assert_eq!(services["described"], true);
    let can = coordinator.ask("ListCapabilities", &json!({})).one();
    assert_eq!(can["workers"].as_array().map(Vec::len), Some(3));
    let names = |list: &str, key: &str| {
        let list = can[list].as_array().cloned().unwrap_or_default();
        list.iter().map(|item| item[key].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("filters", "name"), ["normalize-timestamps", "exclude", "search", "inspect"]);
    assert_eq!(names("sources", "scheme"), ["registry"], "paths are not allowed here");
    assert_eq!(names("destinations", "scheme"), ["registry"]);
}

#[test]
fn a_source_that_is_lost_in_the_middle_shows_as_a_layer_that_begins_again() {
    let from = Registry::start();
    let noise = Layer::noise(1, 2_000_000).packed(Packing::Gzip);
    let source = from.push(&Image::oci(vec![noise]), "app", "1");
    let proxy = occy_tests::proxy::FaultProxy::before(from.host());
    proxy.fault(1, "GET", "*/blobs/*", occy_tests::proxy::truncate(1_000_000));
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let through = source.replace(from.host(), &proxy.host());
    let lost = coordinator.ask("ReadImage", &json!({"source": through})).one();
    let direct = coordinator.ask("ReadImage", &json!({"source": source})).one();
    assert_eq!(lost["layers"], direct["layers"]);
    assert_eq!(lost["documents"]["manifest"], sha256(&from.manifest("app", "1").body));
}
