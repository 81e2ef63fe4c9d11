//! Which image of an index is meant.

use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use serde_json::{Value, json};

fn image(family: Family, os: &str, architecture: &str, variant: Option<&str>) -> (Value, Image) {
    let name = format!("{os}-{architecture}-{}", variant.unwrap_or("none"));
    let mut platform = json!({"os": os, "architecture": architecture});
    if let Some(variant) = variant {
        platform["variant"] = variant.into();
    }
    (platform, Image::on(family, (os, architecture, variant), vec![Layer::of(&[Member::file(&name, "")])]))
}

fn attestation() -> (Value, Image) {
    (json!({"os": "unknown", "architecture": "unknown"}), Image::oci(vec![Layer::of(&[])]))
}

fn push(registry: &Registry, family: Family) -> (String, Index) {
    let index = Index::new(
        family,
        vec![
            attestation(),
            image(family, "windows", "amd64", None),
            image(family, "linux", "amd64", None),
            image(family, "linux", "arm64", Some("v8")),
            image(family, "linux", "arm", Some("v6")),
            image(family, "linux", "arm", Some("v7")),
            image(family, "linux", "s390x", None),
        ],
    );
    (registry.push_index(&index, "multi", "1"), index)
}

#[test]
fn options_and_queries_choose_from_both_kinds_of_index() {
    for family in [Family::Docker, Family::Oci] {
        let registry = Registry::start();
        let (source, index) = push(&registry, family);
        for (options, query, expected) in [
            (&["--architecture", "amd64"][..], "?arch=amd64", 2),
            (&["--architecture", "arm64"], "?arch=arm64", 3),
            (&["--architecture", "arm64", "--variant", "v8"], "?arch=arm64&variant=v8", 3),
            (&["--architecture", "arm"], "?arch=arm", 5),
            (&["--architecture", "arm", "--variant", "v6"], "?arch=arm&variant=v6", 4),
            (&["--architecture", "s390x", "--os", "linux"], "?os=linux&arch=s390x", 6),
            (&["--os", "windows", "--architecture", "amd64"], "?os=windows&arch=amd64", 1),
        ] {
            let expected = index.images[expected].digest();
            let digest = |info: Value| info["manifest"]["digest"].clone();
            let by_options =
                occyctl([&["info", &source, "--output-format", "json"], options].concat()).ok().json();
            assert_eq!(digest(by_options), expected, "{options:?}");
            let uri = format!("{source}{query}");
            let by_query = occyctl(["info", &uri, "--output-format", "json"]).ok().json();
            assert_eq!(digest(by_query), expected, "{query}");
            let over =
                occyctl(["info", &uri, "--output-format", "json", "--os", "plan9", "--architecture", "mips"])
                    .run();
            assert!(!query.contains("os=") || digest(over.json()) == expected, "the query wins");
        }
    }
}

#[test]
fn the_environment_chooses_too() {
    let registry = Registry::start();
    let (source, index) = push(&registry, Family::Oci);
    let info =
        occyctl(["info", &source, "--output-format", "json"]).env("OCCYSTRAP_ARCHITECTURE", "s390x").ok();
    assert_eq!(info.json()["manifest"]["digest"], index.images[6].digest());
}

#[test]
fn the_default_is_linux_on_this_machine() {
    let registry = Registry::start();
    let (source, index) = push(&registry, Family::Docker);
    let expected = match std::env::consts::ARCH {
        "x86_64" => 2,
        "aarch64" => 3,
        _ => return,
    };
    let info = occyctl(["info", &source, "--output-format", "json"]).ok().json();
    assert_eq!(info["manifest"]["digest"], index.images[expected].digest());
}

#[test]
fn what_there_is_is_listed_when_nothing_fits() {
    let registry = Registry::start();
    let (source, _) = push(&registry, Family::Oci);
    let ended = occyctl(["info", &source, "--architecture", "riscv64"]).fails(1).says(&[
        "linux/riscv64",
        "linux/amd64",
        "linux/arm64/v8",
        "linux/arm/v7",
        "windows/amd64",
        "hint: ",
        "--architecture",
    ]);
    assert!(!ended.stderr.contains("unknown"), "{}", ended.stderr);
}

#[test]
fn an_image_that_stands_alone_is_refused_only_to_who_asks_for_another_platform() {
    let registry = Registry::start();
    let (_, arm) = image(Family::Oci, "linux", "arm64", Some("v8"));
    let pushed = registry.push(&arm, "alone", "1");
    let directory = crate::scratch();
    let saved = format!("tar://{}", directory.path().join("saved.tar").display());
    occyctl(["process", &pushed, &saved]).ok();
    for source in [&pushed, &saved] {
        occyctl(["info", source]).ok();
        occyctl(["info", source, "--architecture", "arm64"]).ok();
        let words = ["linux/s390x", "linux/arm64/v8", "hint: "];
        occyctl(["info", source, "--architecture", "s390x"]).fails(1).says(&words);
        occyctl(["search", source, "*", "--os", "windows"]).fails(1).says(&["windows/"]);
    }
    occyctl(["check", &format!("{pushed}?arch=s390x")]).fails(1).says(&["linux/s390x"]);
}

#[test]
fn entries_may_lack_a_platform_and_indexes_may_be_nested() {
    let registry = Registry::start();
    let plain = Image::oci(vec![Layer::of(&[Member::file("a", "")])]);
    let index = Index::new(Family::Oci, vec![(Value::Null, plain.clone()), attestation()]);
    let source = registry.push_index(&index, "bare", "1");
    let amd64 = ["--output-format", "json", "--architecture", "amd64"];
    let info = occyctl([&["info", &source][..], &amd64].concat()).ok().json();
    assert_eq!(info["manifest"]["digest"], plain.digest());

    let inner = index.manifest.clone();
    registry.push_manifest("bare", &occy_tests::tools::sha256(&inner), Family::Oci.index(), &inner);
    let outer = json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": [
        {"mediaType": Family::Oci.index(), "digest": occy_tests::tools::sha256(&inner), "size": inner.len()}]});
    registry.push_manifest("bare", "outer", Family::Oci.index(), outer.to_string().as_bytes());
    let info = occyctl([&["info", &registry.uri("bare:outer")][..], &amd64].concat()).ok().json();
    assert_eq!(info["manifest"]["digest"], plain.digest());
    // What it is for, its config says.
    let uris = [source, registry.uri("bare:outer")];
    for uri in &uris {
        occyctl(["info", uri, "--architecture", "s390x"]).fails(1).says(&["linux/s390x", "linux/amd64"]);
    }
}

#[test]
fn a_chosen_image_is_copied_alone() {
    let (from, to) = (Registry::start(), Registry::start());
    let (source, index) = push(&from, Family::Oci);
    occyctl(["process", &source, &to.uri("one:1"), "--architecture", "arm64"]).ok();
    let copied = to.pull("one", "1");
    assert_eq!(copied.digest, index.images[3].digest());
    assert_eq!(json_of(&copied.config)["architecture"], "arm64");
}

#[test]
fn an_image_that_is_no_index_is_taken_whatever_it_is_for() {
    let registry = Registry::start();
    let (_, other) = image(Family::Oci, "linux", "s390x", None);
    let source = registry.push(&other, "single", "1");
    let info = occyctl(["info", &source, "--output-format", "json"]).ok().json();
    assert_eq!(info["manifest"]["digest"], other.digest());
}
