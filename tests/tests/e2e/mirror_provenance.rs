//! `provenance: true` of a mirror: every image that passed filters is made again by what stands beside it, bit for bit.

use std::path::Path;

use occy_tests::conforming::Conforming;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::tools::{pipe, sha256};
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::mirror::{JSON, mirror, report};
use crate::provenance::{forge, statement, verify};
use crate::scratch;

/// The registries that statements name are those of the tests, on this machine.
const NEAR: [&str; 2] = ["--allow-network", "127.0.0.0/8"];

fn image(architecture: &str, secret: bool) -> Image {
    let mut members = vec![Member::file("name", architecture)];
    if secret {
        members.push(Member::file("secret.key", "k"));
    }
    Image::on(Family::Oci, ("linux", architecture, None), vec![Layer::noise(1, 3000), Layer::of(&members)])
}

/// An image as `one`, and as `many` an index of three, of which filters change two.
fn source() -> Conforming {
    let from = Conforming::start();
    from.add_image("app", "one", &image("amd64", true));
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let images = [("amd64", true), ("arm64", false), ("s390x", true)];
    let entries = images.map(|(name, secret)| (platform(name), image(name, secret))).to_vec();
    let index = Index::new(Family::Oci, entries);
    for image in &index.images {
        from.add_image("app", &image.digest(), image);
    }
    from.add_manifest("app", "many", Family::Oci.index(), &index.manifest);
    from
}

fn run(directory: &Path, from: &str, to: &[&str], more: &str, options: &[&str]) -> Value {
    let targets: Vec<_> = to.iter().map(|target| format!("'{target}'")).collect();
    let text = format!(
        "mirrors:\n  - sources: ['{from}/app']\n    targets: [{}]\n    filters: ['exclude:pattern=*.key']\n{more}",
        targets.join(", ")
    );
    report(mirror(directory, &text, &[&JSON[..], options].concat()), 0)
}

const PROVENANCE: &str = "    provenance: true\n";

/// The one artifact that names a manifest, where clients keep the list.
fn listed(registry: &Registry, name: &str, digest: &str) -> String {
    let list = json_of(&registry.manifest(name, &digest.replace(':', "-")).body);
    let [one] = &list["manifests"].as_array().expect("a list")[..] else { panic!("{list}") };
    one["digest"].as_str().expect("a digest").to_owned()
}

#[test]
fn every_image_of_a_mirror_that_passed_filters_is_made_again_bit_for_bit() {
    let (from, lists, other) = (source(), Conforming::start(), Registry::start());
    let directory = scratch();
    let targets = [format!("{}/a", lists.host()), format!("{}/b", other.host())];
    let targets = targets.each_ref().map(String::as_str);
    let mirrored = |more: &str| run(directory.path(), &from.host(), &targets, more, &[]);
    assert_eq!(mirrored("")["done"], 4);
    verify(&lists.uri("a:one"), &NEAR).fails(1).says(&["no provenance"]);
    // What is wanted now was not then: it is made again, and once.
    let done = mirrored(PROVENANCE);
    assert_eq!((&done["done"], &done["failed"]), (&json!(4), &json!(0)), "{done}");
    from.forget();
    assert_eq!(mirrored(PROVENANCE)["done"], 0);
    assert_eq!(from.count("GET", "*/manifests/*") + from.count("GET", "*/blobs/*"), 0, "{}", from.story());
    for tag in ["one", "many"] {
        let (_, manifest) = lists.manifest("a", tag).expect("it");
        let digest = sha256(&manifest);
        assert_eq!(other.digest("b", tag), digest);
        for uri in [lists.uri(&format!("a:{tag}")), other.uri(&format!("b:{tag}"))] {
            let told = verify(&uri, &NEAR).ok().json();
            assert_eq!(told["statements"].as_array().map(Vec::len), Some(1), "{told}");
            let told = &told["statements"][0];
            assert_eq!((&told["verdict"], &told["platforms"]), (&json!("same"), &json!([])), "{uri}: {told}");
            assert_eq!(told["source"]["uri"], format!("registry://{}/app", from.host()));
            judge::skopeo_reads(&uri.replace("registry://", "docker://"));
        }
        let (artifact, bytes) = statement(&lists, "a", &digest);
        assert_eq!(listed(&other, "b", &digest), lists.referrers("a", &digest)[0]);
        let images = done["images"].as_array().expect("images");
        let of_tag =
            images.iter().filter(|image| image["source"].as_str().is_some_and(|name| name.ends_with(tag)));
        let told: Vec<_> = of_tag.map(|image| image["copied"]["provenance"].clone()).collect();
        assert_eq!(told, vec![json!(lists.referrers("a", &digest)[0]); 2], "{done}");
        assert_eq!(artifact["subject"]["digest"], digest);
        let parameters = &json_of(&bytes)["predicate"]["buildDefinition"]["externalParameters"];
        assert_eq!(parameters["annotations"], json_of(&manifest)["annotations"]);
        assert_eq!(parameters["filters"], json!(["exclude:pattern=*.key"]));
        // Of each layer what it was and what it became, in the bytes that it names.
        for image in json_of(&bytes)["predicate"]["images"].as_array().expect("images") {
            let layers = image["layers"].as_array().expect("layers");
            for layer in layers {
                let blob = |registry: &Conforming, name: &str, side: &str| {
                    let digest = layer[side]["digest"].as_str().expect("a digest");
                    sha256(&pipe("gzip", ["-dc"], &registry.blob(name, digest).expect("a layer")))
                };
                assert_eq!(layer["source"]["diffId"], blob(&from, "app", "source"));
                assert_eq!(layer["result"]["diffId"], blob(&lists, "a", "result"));
            }
        }
    }
    // Each image of the index that changed has its own, and what did not change has none.
    let index = json_of(&lists.manifest("a", "many").expect("it").1);
    for (entry, is_changed) in index["manifests"].as_array().expect("entries").iter().zip([true, false, true])
    {
        let digest = entry["digest"].as_str().expect("a digest");
        let one = verify(&lists.uri(&format!("a@{digest}")), &NEAR);
        if is_changed {
            assert_eq!(one.ok().json()["statements"][0]["verdict"], "same");
        } else {
            one.fails(1).says(&["no provenance"]);
        }
    }
    // It is the annotations too that are compared.
    let digest = sha256(&lists.manifest("a", "one").expect("it").1);
    let recipe = "/predicate/buildDefinition/externalParameters/annotations/dev.occystrap.recipe";
    forge(&lists, "a", &digest, |told| *told.pointer_mut(recipe).expect("it") = sha256(b"another").into());
    let told = verify(&lists.uri("a:one"), &NEAR).fails(3).json();
    let differences = told["statements"][0]["differences"].as_array().expect("some").clone();
    let is_told =
        |one: &Value| one["place"].as_str().is_some_and(|place| place.ends_with("dev.occystrap.recipe"));
    assert!(differences.iter().any(is_told), "{told}");
}

#[test]
fn an_index_of_some_platforms_is_made_again_of_these() {
    let (from, to) = (source(), Conforming::start());
    let directory = scratch();
    let more =
        format!("{PROVENANCE}    platforms: [linux/s390x, linux/arm64]\n    tags: [{{names: [many]}}]\n");
    let target = format!("{}/app", to.host());
    assert_eq!(run(directory.path(), &from.host(), &[&target], &more, &[])["done"], 1);
    let index = json_of(&to.manifest("app", "many").expect("it").1);
    assert_eq!(index["manifests"].as_array().map(Vec::len), Some(2));
    let told = verify(&to.uri("app:many"), &NEAR).ok().json();
    let told = &told["statements"][0];
    assert_eq!(told["platforms"], json!(["linux/arm64", "linux/s390x"]));
    assert_eq!(told["verdict"], "same", "{told}");
    let text = occyctl([&["verify", &to.uri("app:many")][..], &NEAR].concat()).ok().text();
    assert!(text.contains("of its images those for linux/arm64, linux/s390x alone"), "{text}");
    // Of other platforms it would be another.
    let digest = sha256(&to.manifest("app", "many").expect("it").1);
    let platforms = "/predicate/buildDefinition/externalParameters/platforms";
    forge(&to, "app", &digest, |told| *told.pointer_mut(platforms).expect("it") = json!(["linux/s390x"]));
    assert_eq!(verify(&to.uri("app:many"), &NEAR).fails(3).json()["statements"][0]["verdict"], "differs");
}

#[test]
fn whichever_way_an_image_came_its_provenance_is_the_same() {
    let from = source();
    let directory = scratch();
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let _workers = [(); 2].map(|()| Worker::start(&coordinator, &["--slots", "1"]));
    let url = coordinator.url();
    let layout = format!("oci-layout://{}", directory.path().join("carried").display());
    let [here, there, carried] = [(); 3].map(|()| Conforming::start());
    let run = |to: &Conforming, options: &[&str]| {
        let target = format!("{}/app", to.host());
        run(directory.path(), &from.host(), &[&target], PROVENANCE, options)
    };
    assert_eq!(run(&here, &[])["done"], 2);
    let remote = run(&there, &["--coordinator", &url]);
    assert_eq!(remote["done"], 2, "{remote}");
    run(&carried, &["--to", &layout]);
    assert_eq!(run(&carried, &["--from", &layout])["done"], 2);
    for tag in ["one", "many"] {
        let manifest = here.manifest("app", tag).expect("it");
        let digest = sha256(&manifest.1);
        let own = statement(&here, "app", &digest);
        for to in [&there, &carried] {
            assert_eq!(to.manifest("app", tag).as_ref(), Some(&manifest));
            assert_eq!(statement(to, "app", &digest), own);
        }
        let is_told = |image: &Value| image["copied"]["provenance"] == here.referrers("app", &digest)[0];
        assert!(remote["images"].as_array().expect("images").iter().any(is_told), "{remote}");
        // The fleet makes it again too, and a layout holds what the statement names.
        let uri = there.uri(&format!("app:{tag}"));
        verify(&uri, &["--coordinator", &url]).ok();
        verify(&uri, &NEAR).ok();
        let source = from.uri(&format!("app:{tag}"));
        verify(&carried.uri(&format!("app:{tag}")), &["--source", &source]).ok();
    }
}

#[test]
fn provenance_without_filters_is_refused_with_its_place() {
    let directory = scratch();
    let text = "mirrors:\n  - sources: [a.example/x]\n    targets: [b.example/x]\n    provenance: true\n";
    mirror(directory.path(), text, &[])
        .fails(2)
        .says(&["line 4, column 17", "provenance says nothing without filters"]);
}
