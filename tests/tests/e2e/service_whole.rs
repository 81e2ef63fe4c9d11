//! Whole indexes, signatures and provenance by a coordinator and its workers: what one process makes of them.

use occy_tests::certificates::text;
use occy_tests::conforming::Conforming;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::{Run, locally};
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::{read, sha256};
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::scratch;
use crate::service_jobs::{events, job, state, submit};

const FILTER: &str = "exclude:pattern=*.key";
const NOTATION: &str = "application/vnd.cncf.notary.signature";
const OF: &str = "vnd.docker.reference.digest";
const TYPE: &str = "vnd.docker.reference.type";

fn by(coordinator: &Coordinator, arguments: &[&str]) -> Run {
    locally(arguments).env("OCCYSTRAP_COORDINATOR", coordinator.url())
}

/// An index of two images, for amd64 and arm64, and an attestation of the first.
pub(crate) fn attested(images: &[Image; 2]) -> Index {
    let about = Image::oci(vec![Layer::noise(7, 500)]);
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let mut index = Index::new(
        Family::Oci,
        vec![
            (platform("amd64"), images[0].clone()),
            (platform("arm64"), images[1].clone()),
            (json!({"os": "unknown", "architecture": "unknown"}), about),
        ],
    );
    let mut document = json_of(&index.manifest);
    document["manifests"][2]["annotations"] = json!({TYPE: "attestation-manifest", OF: images[0].digest()});
    index.manifest = document.to_string().into_bytes();
    index
}

/// An index of two images, of which a filter changes both, and an attestation of the first. A layer stands in both.
fn index(registry: &Registry, name: &str) -> (Index, String) {
    let secret = Layer::of(&[Member::file("secret.key", "k"), Member::file("both", "b")]);
    let image = |architecture: &str| {
        let own = Layer::of(&[Member::file("own.key", architecture), Member::file("name", architecture)]);
        Image::on(
            Family::Oci,
            ("linux", architecture, None),
            vec![secret.clone(), own, Layer::noise(3, 9000)],
        )
    };
    let index = attested(&["amd64", "arm64"].map(image));
    let source = registry.push_index(&index, name, "1");
    (index, source)
}

/// Without what differs from run to run, and from place to place.
fn comparable(mut told: Value) -> Value {
    fn strip(told: &mut Value) {
        if let Some(told) = told.as_object_mut() {
            told.retain(|key, _| key != "seconds" && key != "destination");
            told.values_mut().for_each(strip);
        }
        told.as_array_mut().into_iter().flatten().for_each(strip);
    }
    strip(&mut told);
    told
}

#[test]
fn a_fleet_makes_of_an_index_what_one_process_makes_of_it() {
    let (from, to) = (Registry::start(), Registry::start());
    let (index, source) = index(&from, "app");
    let directory = scratch();
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let workers = [(); 2].map(|()| Worker::start(&coordinator, &["--slots", "1"]));
    for attestations in ["drop", "retarget"] {
        let lines = |who: &str| directory.path().join(format!("{who}-{attestations}"));
        let run = |who: &str| {
            let inspect = format!("inspect:file={}", text(&lines(who)));
            let destination = to.uri(&format!("{who}-{attestations}:1"));
            let all = ["--all", "--attestations", attestations, "--output-format", "json"];
            let filters = ["-f", FILTER, "-f", "search:pattern=name", "-f", &inspect];
            let run = [&["process", &source, &destination], &all[..], &filters].concat();
            let run = if who == "here" { locally(run) } else { by(&coordinator, &run) }.ok();
            let printed = run.text();
            // What filters print comes before the document.
            let (found, document) = printed.split_at(printed.find("{\n").expect("a document"));
            (found.to_owned(), comparable(json_of(document.as_bytes())), run)
        };
        let (here, there) = (run("here"), run("there"));
        assert_eq!((&here.0, &here.1), (&there.0, &there.1));
        assert_eq!(here.0.matches("name").count(), 2, "in each of the two images: {}", here.0);
        assert_eq!(
            here.1["images"].as_array().expect("images").len(),
            if attestations == "drop" { 2 } else { 3 }
        );
        let verb = if attestations == "drop" { "left out" } else { "kept" };
        there.2.says(&[verb, "the attestation", &index.images[2].digest()]);
        assert_eq!(read(lines("here")), read(lines("there")));
        let manifest = |who: &str| to.manifest(&format!("{who}-{attestations}"), "1").body;
        assert_eq!(manifest("here"), manifest("there"));
        assert_ne!(manifest("here"), index.manifest);
        let text = by(&coordinator, &["process", &source, &to.uri("text:1"), "--all", "-f", FILTER]).ok();
        text.says(&["Pushed registry://", &sha256(&to.manifest("text", "1").body), ", 2 images"]);
    }
    // One image is one image, whatever was asked for.
    let one = from.push(&index.images[0], "one", "1");
    let run = ["process", &one, &to.uri("one:1"), "--all", "--output-format", "json"];
    let told = by(&coordinator, &run).ok().json();
    assert_eq!((&told["manifest_digest"], told.get("images")), (&json!(index.images[0].digest()), None));
    for worker in workers {
        assert!(worker.log().contains("task begins"), "{}", worker.log());
    }
}

#[test]
fn what_is_signed_is_refused_dropped_or_kept_by_calls_and_jobs_alike() {
    let from = Conforming::start();
    let signed = Image::oci(vec![Layer::of(&[Member::file("a.key", "k")])]);
    from.add_image("app", "1", &signed);
    let signature = from.add_artifact("app", NOTATION, &signed.manifest, Family::Oci.manifest());
    let coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    for how in [&["process"][..], &["job", "submit", "--watch"]] {
        let to = Conforming::start();
        let (source, destination) = (from.uri("app:1"), to.uri("app:1"));
        let run =
            |more: &[&str]| by(&coordinator, &[how, &[&source, &destination, "-f", FILTER], more].concat());
        from.forget();
        run(&[]).ok();
        assert_eq!(from.count("GET", "*/referrers/*"), 0, "{}", from.story());
        let new = sha256(&to.manifest("app", "1").expect("it").1);
        assert!(to.referrers("app", &new).is_empty());
        to.delete_manifest("app", &new);
        assert!(to.manifest("app", "1").is_none());
        run(&["--signatures", "refuse"]).fails(1).says(&["is signed as", NOTATION, "--signatures drop"]);
        assert!(to.tags("app").is_empty());
        // Without filters nothing changes.
        by(&coordinator, &[how, &[&source, &to.uri("same:1"), "--signatures", "refuse"]].concat()).ok();
        let kept = run(&["--signatures", "keep", "--provenance"]).ok();
        kept.says(&["kept the signature", &sha256(&signature)]);
        assert_eq!(to.referrers("app", &signed.digest()), [sha256(&signature)]);
        assert_eq!(to.referrers("app", &new).len(), 1, "how it was made, which leads to the original too");
        assert_eq!(to.tags("app"), ["1"]);
        let verdict =
            locally(["verify", &destination, "--source", &source, "--output-format", "json"]).ok().json();
        assert_eq!(verdict["statements"][0]["verdict"], "same", "{verdict}");
    }
    let to = Conforming::start();
    let spec = json!({
        "source": from.uri("app:1"),
        "destination": to.uri("app:1"),
        "filters": [FILTER],
        "signatures": "SIGNATURE_POLICY_KEEP",
        "provenance": true,
    });
    let id = submit(&coordinator, &spec);
    let told = coordinator.ask("WatchJob", &id).all();
    let result = &told.last().expect("an end")["event"]["state_changed"]["result"];
    assert_eq!(result["signatures_kept"][0]["digest"], sha256(&signature), "{result}");
    let new = result["manifest_digest"].as_str().expect("a digest");
    assert!(to.referrers("app", new).iter().any(|one| result["provenance"] == *one));
}

#[test]
fn a_job_of_an_index_goes_on_from_the_layers_that_are_there_when_its_coordinator_was_killed() {
    let (from, to) = (Registry::start(), Registry::start());
    let (index, source) = index(&from, "app");
    let here = to.uri("here:1");
    locally(["process", &source, &here, "--all", "-f", FILTER, "--provenance"]).ok();
    let proxy = FaultProxy::before(from.host());
    let barrier = Barrier::default();
    let [first, second] = [0, 1].map(|image: usize| index.images[image].layer_digests()[1].clone());
    proxy.fault(1, "GET", &format!("*/blobs/{second}"), barrier.fault());
    let mut coordinator = Coordinator::start(&["--embedded-workers", "2"]);
    let spec = json!({
        "source": source.replace(from.host(), &proxy.host()),
        "destination": to.uri("app:1"),
        "filters": [FILTER],
        "all": true,
        "provenance": true,
    });
    let id = submit(&coordinator, &spec);
    let mut watcher = coordinator.call("WatchJob", &id).start();
    // The layers of the second image stand behind those of the first, all of which are done.
    watcher.wait_for(|message| message["event"]["layers_planned"]["layers"][0]["index"] == 3);
    let seen = |digest: &str| {
        let pattern = format!("/v2/app/blobs/{digest}");
        proxy.seen().iter().filter(|seen| seen.is("GET", &pattern)).count()
    };
    watcher.wait_for(|message| {
        let layer = &message["event"]["layer_changed"];
        layer["index"] == 4 && layer["state"] == "LAYER_STATE_RUNNING"
    });
    let layers = job(&coordinator, &id)["layers"].clone();
    assert_eq!(layers.as_array().expect("layers").len(), 6);
    for layer in &layers.as_array().expect("layers")[..3] {
        assert_eq!(layer["state"], "LAYER_STATE_DONE", "{layers}");
    }
    assert!(!to.has("app", "1"));
    let fetched = seen(&first);
    coordinator.kill();
    barrier.open();
    coordinator.restart();
    let told = coordinator.ask("WatchJob", &id).all();
    assert_eq!(state(&coordinator, &id), "JOB_STATE_SUCCEEDED", "{:?}", events(&told).last());
    assert_eq!(seen(&first), fetched, "{}", proxy.story());
    let job = job(&coordinator, &id);
    assert_eq!(job["result"]["index"]["image_count"], 2);
    assert_eq!(job["result"]["index"]["dropped"][0]["digest"], index.images[2].digest());
    let (expected, made) = (to.manifest("here", "1").body, to.manifest("app", "1").body);
    assert_eq!(made, expected);
    assert_eq!(job["result"]["manifest_digest"], sha256(&made));
    locally(["verify", &to.uri("app:1"), "--source", &source]).ok();
}

#[test]
fn an_image_is_verified_by_workers_as_by_one_process() {
    let (from, to) = (Registry::start(), Registry::start());
    let (index, source) = index(&from, "app");
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let worker = Worker::start(&coordinator, &["--slots", "1"]);
    locally(["process", &source, &to.uri("all:1"), "--all", "-f", FILTER, "--provenance"]).ok();
    let one = from.push(&index.images[0], "one", "1");
    locally(["process", &one, &to.uri("one:1"), "-f", FILTER, "--compression", "zstd:3", "--provenance"])
        .ok();
    for (name, source) in [("all", &source), ("one", &one)] {
        let image = to.uri(&format!("{name}:1"));
        let run = ["verify", &image, "--source", source, "--output-format", "json"];
        let (here, there) = (locally(run).ok().json(), by(&coordinator, &run).ok().json());
        assert_eq!(here, there);
        assert_eq!(there["statements"][0]["verdict"], "same", "{there}");
        let text = by(&coordinator, &["verify", &image, "--source", source]).ok().text();
        assert_eq!(text, locally(["verify", &image, "--source", source]).ok().text());
        // Where the statement says that its source is: a registry that this coordinator is allowed to reach.
        by(&coordinator, &["verify", &image]).ok();
    }
    assert!(worker.log().contains("task begins"), "{}", worker.log());
    // Another source is not what was told of, and an image without a statement has none.
    let other = from.push(&index.images[1], "other", "1");
    by(&coordinator, &["verify", &to.uri("one:1"), "--source", &other])
        .fails(1)
        .says(&[&index.images[0].digest()]);
    by(&coordinator, &["verify", &source]).fails(1).says(&["has no provenance"]);
    let none = json!({"image": source});
    coordinator.ask("VerifyImage", &none).fails("NOT_FOUND", "NO_PROVENANCE");
    // A stranger's statement leads this one nowhere that its operator has not allowed.
    let strict = Coordinator::strict(&["--embedded-workers", "1"], &[]);
    strict
        .ask("VerifyImage", &json!({"image": to.uri("one:1")}))
        .fails("PERMISSION_DENIED", "NETWORK_NOT_ALLOWED");
}

#[test]
fn what_cannot_be_wished_for_is_refused_and_says_which_field() {
    let registry = Registry::start();
    let (_, source) = index(&registry, "app");
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let destination = registry.uri("new:1");
    for (field, more) in [
        ("compression", json!({"all": true, "compression": "zstd"})),
        ("manifest_family", json!({"all": true, "manifest_family": "FAMILY_OCI"})),
        ("attestations", json!({"attestations": "ATTESTATION_POLICY_RETARGET"})),
    ] {
        let mut spec = json!({"source": source, "destination": destination});
        spec.as_object_mut().expect("one").extend(more.as_object().expect("one").clone());
        let refused = coordinator.ask("SubmitJob", &json!({"spec": spec}));
        let details = refused.fails("INVALID_ARGUMENT", "INVALID_FIELD");
        assert!(details.to_string().contains(field), "{details}");
    }
    for wish in
        [json!({"all": true}), json!({"provenance": true}), json!({"signatures": "SIGNATURE_POLICY_KEEP"})]
    {
        let mut spec = json!({"source": source});
        spec.as_object_mut().expect("one").extend(wish.as_object().expect("one").clone());
        coordinator.ask("ProcessImage", &spec).fails("INVALID_ARGUMENT", "INVALID_FIELD");
    }
    let said = coordinator.ask("ListCapabilities", &json!({})).one();
    assert_eq!(said["spec_fields"], json!(["signatures", "provenance", "all"]));
    // Where there is nothing to put it beside.
    let directory = scratch();
    let tar = format!("tar://{}", text(&directory.path().join("a.tar")));
    by(&coordinator, &["process", &source, &tar, "--all"]).fails(1).says(&["is an index of several images"]);
    by(&coordinator, &["process", &source, &tar, "--provenance"]).fails(1).says(&["keeps no manifests"]);
    assert!(!registry.has("new", "1"));
}
