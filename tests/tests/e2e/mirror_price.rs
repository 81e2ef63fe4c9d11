//! What a mirror says that it will take, and what it says that it took, through filters: the same, and what registries have seen.

use std::collections::BTreeSet;

use occy_tests::conforming::Conforming;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image, json_of, pretty};
use occy_tests::layer::{Layer, Member};
use occy_tests::proxy::FaultProxy;
use occy_tests::registry::Registry;
use occy_tests::server::Seen;
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::mirror::{JSON, mirror, report};
use crate::scratch;

/// What compression does not make small.
fn noise(seed: u64) -> String {
    let number = |number: u64| (number + seed * 1000).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..400).map(|at| format!("{:x}", number(at))).collect()
}

/// Layers that filters change, of which all images have the first, and one that they do not.
fn image(architecture: &str, seed: u64) -> Image {
    let shared = Layer::of(&[Member::file("secret.key", noise(0)), Member::file("kept", "x".repeat(9000))]);
    let own = Layer::of(&[Member::file("own.key", noise(seed)), Member::file("name", seed.to_string())]);
    Image::on(Family::Oci, ("linux", architecture, None), vec![shared, own, Layer::noise(seed, 10_000)])
}

fn entry(image: &Image, platform: &Value, annotations: &Value) -> Value {
    json!({"mediaType": Family::Oci.manifest(), "digest": image.digest(), "size": image.manifest.len(),
           "platform": platform, "annotations": annotations})
}

/// Two images, and an index of two with an attestation and an artifact.
fn source() -> Registry {
    let from = Registry::start();
    from.push(&image("amd64", 1), "app", "1");
    from.push(&image("amd64", 2), "app", "2");
    let images = [image("amd64", 3), image("arm64", 4)];
    let attestation = Image::on(
        Family::Oci,
        ("unknown", "unknown", None),
        vec![Layer::of(&[Member::file("statement", images[0].digest())])],
    );
    let chart = Image::oci(vec![Layer::noise(5, 700)]).edit_manifest(|manifest| {
        manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
    });
    let platform = |os: &str, architecture: &str| json!({"os": os, "architecture": architecture});
    let attests = json!({"vnd.docker.reference.type": "attestation-manifest",
                         "vnd.docker.reference.digest": images[0].digest()});
    let index = pretty(&json!({
        "schemaVersion": 2, "mediaType": Family::Oci.index(),
        "manifests": [
            entry(&images[0], &platform("linux", "amd64"), &json!({})),
            entry(&images[1], &platform("linux", "arm64"), &json!({})),
            entry(&attestation, &platform("unknown", "unknown"), &attests),
            entry(&chart, &platform("linux", "s390x"), &json!({})),
        ],
    }));
    for image in images.iter().chain([&attestation, &chart]) {
        from.push(image, "app", &image.digest());
    }
    from.push_manifest("app", "many", Family::Oci.index(), &index);
    from
}

fn config(from: &str, targets: &[String], more: &str) -> String {
    let targets: Vec<_> = targets.iter().map(|target| format!("'{target}'")).collect();
    format!(
        "mirrors:\n  - sources: ['{from}/app']\n    targets: [{}]\n    filters: ['exclude:pattern=*.key']\n{more}",
        targets.join(", ")
    )
}

const ALL: &str = "    provenance: true\n    attestations: retarget\n";

/// The bytes that went up as blobs.
fn uploaded(proxies: &[&FaultProxy]) -> u64 {
    let seen = proxies.iter().flat_map(|proxy| proxy.seen());
    seen.filter(|seen| seen.request.path.contains("/blobs/uploads/")).map(|seen| seen.body as u64).sum()
}

/// Blobs that were mounted.
fn mounted(proxies: &[&FaultProxy]) -> u64 {
    let seen = proxies.iter().flat_map(|proxy| proxy.seen());
    let is_mount = |seen: &Seen| {
        let from = seen.request.query("from").concat();
        // From its own repository, one asks whether a blob is there.
        let is_other = !from.is_empty() && !seen.request.path.starts_with(&format!("/v2/{from}/"));
        is_other && seen.status == 201
    };
    seen.filter(is_mount).count() as u64
}

#[test]
fn what_a_filtered_mirror_takes_is_what_its_plan_said() {
    let (from, one, two) = (source(), Registry::start(), Registry::start());
    let near = FaultProxy::before(from.host());
    let far = [&one, &two].map(|registry| FaultProxy::before(registry.host()));
    let far = far.each_ref();
    let directory = scratch();
    let targets =
        [format!("{}/a", far[0].host()), format!("{}/b", far[0].host()), format!("{}/c", far[1].host())];
    let text = config(&near.host(), &targets, ALL);
    let run = |more: &[&str]| report(mirror(directory.path(), &text, &[&JSON[..], more].concat()), 0);
    let plan = run(&["--dry-run"]);
    assert_eq!(near.count("GET", "*/blobs/*"), 0, "{}", near.story());
    near.forget();
    far.iter().for_each(|proxy| proxy.forget());
    let done = run(&[]);
    assert_eq!((&done["done"], &done["failed"]), (&json!(9), &json!(0)), "{done}");
    let (price, moved) = (&plan["price"], &done["moved"]);
    for what in ["fetch", "filter", "manifests"] {
        assert_eq!(moved[what], price[what], "{what}: {done}");
    }
    for what in ["upload", "mount"] {
        assert_eq!(moved[what]["blobs"], price[what]["blobs"], "{what}: {done}");
    }
    // Of four images one layer that all share, and two more of each.
    assert_eq!(moved["filter"]["blobs"], 1 + 4 * 2);
    // A file less in each of the layers that changed.
    let bytes = |document: &Value| document["upload"]["bytes"].as_u64().expect("a number");
    let (planned, came) = (bytes(price), bytes(moved));
    assert!(came < planned && came > planned / 2, "{came} of {planned}");
    // The plan of each image is in the report as it was before.
    for (action, image) in
        plan["actions"].as_array().expect("actions").iter().zip(done["images"].as_array().expect("images"))
    {
        assert_eq!(action["price"], image["price"]);
        assert_eq!(action["price"]["manifests"], image["copied"]["manifests"], "{image}");
    }
    // What registries have seen: each layer once, at least, and a config for each image at each target.
    let configs = BTreeSet::from_iter(
        (1..=4).map(|seed| image(if seed == 4 { "arm64" } else { "amd64" }, seed).config_digest()),
    );
    let read = near.seen().into_iter().filter(|seen| seen.is("GET", "*/blobs/*"));
    let read: Vec<String> =
        read.filter_map(|seen| Some(seen.request.path.rsplit('/').next()?.to_owned())).collect();
    let of_images = read.iter().filter(|digest| configs.contains(*digest)).count() as u64;
    assert_eq!(of_images, 4 * 3, "{}", near.story());
    let layers: BTreeSet<&String> = read.iter().filter(|digest| !configs.contains(*digest)).collect();
    // Beside the layers that pass filters, one of the attestation and of the chart, and of each of these two a config, for each target.
    assert_eq!(layers.len() as u64, 9 + 2 + 2, "{}", near.story());
    assert_eq!(moved["fetch"]["blobs"], of_images + 9 + 2 + 2 * 3);
    assert_eq!(bytes(moved), uploaded(&far), "{}", far[0].story());
    assert_eq!(moved["mount"]["blobs"], mounted(&far), "{}", far[0].story());
    // No manifest of the source was read twice for that.
    let manifests = near.seen().into_iter().filter(|seen| seen.is("GET", "*/manifests/*"));
    let is_list = |path: &String| path.contains("/sha256-");
    let manifests: Vec<String> =
        manifests.map(|seen| seen.request.path).filter(|path| !is_list(path)).collect();
    assert_eq!(manifests.len(), BTreeSet::from_iter(&manifests).len(), "{}", near.story());
    let text = mirror(directory.path(), &text.replace("*.key", "name"), &[]).ok().text();
    assert!(
        text.contains("of them through filters, uploaded ") && text.contains(" manifests, mounted "),
        "{text}"
    );
}

#[test]
fn what_belongs_to_images_is_counted_and_no_more_comes_than_the_plan_said() {
    let (from, to) = (Conforming::start(), Conforming::start());
    let kept = Image::on(Family::Oci, ("linux", "arm64", None), vec![Layer::noise(9, 3000)]);
    let changed = image("amd64", 1);
    let index = pretty(&json!({
        "schemaVersion": 2, "mediaType": Family::Oci.index(),
        "manifests": [
            entry(&changed, &json!({"os": "linux", "architecture": "amd64"}), &json!({})),
            entry(&kept, &json!({"os": "linux", "architecture": "arm64"}), &json!({})),
        ],
    }));
    for image in [&changed, &kept] {
        from.add_image("app", &image.digest(), image);
        from.add_artifact("app", "application/spdx+json", &image.manifest, Family::Oci.manifest());
    }
    from.add_manifest("app", "1", Family::Oci.index(), &index);
    let directory = scratch();
    let text = config(&from.host(), &[format!("{}/app", to.host())], "    referrers: true\n");
    let run = |more: &[&str]| report(mirror(directory.path(), &text, &[&JSON[..], more].concat()), 0);
    let plan = run(&["--dry-run"])["price"].clone();
    let moved = run(&[])["moved"].clone();
    // The SBOM of the image that changed stays, and the rest comes: a manifest, and its layer; the config was there.
    assert_eq!(plan["manifests"], 3 + 2);
    assert_eq!(moved["manifests"], 3 + 1);
    let number = |document: &Value, what: &str| document[what]["blobs"].as_u64().expect("a number");
    for what in ["fetch", "upload"] {
        assert_eq!(number(&plan, what), number(&moved, what) + 1, "{what}: {plan} {moved}");
    }
    assert_eq!(plan["filter"], moved["filter"]);
    let (_, made) = to.manifest("app", "1").expect("an index");
    assert_eq!(json_of(&made)["manifests"][1]["digest"], kept.digest());
}

#[test]
fn a_fleet_counts_as_one_process_does() {
    let (from, here, there) = (source(), Registry::start(), Registry::start());
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let _workers = [(); 2].map(|()| Worker::start(&coordinator, &["--slots", "1"]));
    let directory = scratch();
    let run = |to: &Registry, more: &[&str]| {
        let targets = ["a", "b"].map(|name| format!("{}/{name}", to.host()));
        let text = config(from.host(), &targets, ALL);
        report(mirror(directory.path(), &text, &[&JSON[..], more].concat()), 0)["moved"].clone()
    };
    let local = run(&here, &[]);
    assert!(local["filter"]["blobs"].as_u64().is_some_and(|blobs| blobs > 0), "{local}");
    assert_eq!(run(&there, &["--coordinator", &coordinator.url()]), local);
}
