//! `process --provenance` and `verify`: what says how an image was made, and making it again.

use occy_tests::conforming::{Conforming, Ways};
use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::registry::Registry;
use occy_tests::tools::{pipe, sha256};
use serde_json::{Value, json};

use crate::scratch;

const TYPE: &str = "https://occystrap.dev/provenance/v1";
const STATEMENT: &str = "application/vnd.in-toto+json";

fn image(architecture: &str) -> Image {
    let changed = Layer::of(&[Member::file("secret.key", "k"), Member::file("name", architecture)]);
    Image::on(Family::Oci, ("linux", architecture, None), vec![Layer::noise(1, 3000), changed])
}

fn process(source: &str, destination: &str, more: &[&str]) -> Run {
    let run = ["process", source, destination, "--provenance", "-f", "exclude:pattern=*.key"];
    occyctl([&run[..], more].concat())
}

pub(crate) fn verify(image: &str, more: &[&str]) -> Run {
    occyctl([&["verify", image, "--output-format", "json"][..], more].concat())
}

/// The one statement about a manifest, as bytes, with its artifact.
pub(crate) fn statement(registry: &Conforming, name: &str, subject: &str) -> (Value, Vec<u8>) {
    let [artifact] = &registry.referrers(name, subject)[..] else { panic!("one referrer of {subject}") };
    let artifact = json_of(&registry.manifest(name, artifact).expect("it").1);
    let layer = artifact["layers"][0]["digest"].as_str().expect("a layer");
    let statement = registry.blob(name, layer).expect("the statement");
    (artifact, statement)
}

/// Puts another statement in the place of the one about a manifest, in the same clothes.
pub(crate) fn forge(registry: &Conforming, name: &str, subject: &str, edit: impl Fn(&mut Value)) {
    let (mut artifact, statement) = statement(registry, name, subject);
    for old in registry.referrers(name, subject) {
        registry.delete_manifest(name, &old);
    }
    put_forged(registry, name, &mut artifact, &statement, edit);
}

/// Puts an image or index under the tag, and a statement about it that is made of one about another.
fn replace(registry: &Conforming, name: &str, (old, new): (&str, &[u8]), edit: impl Fn(&mut Value)) {
    let (mut artifact, statement) = statement(registry, name, old);
    let media_type = artifact["subject"]["mediaType"].as_str().expect("a type").to_owned();
    registry.add_manifest(name, "1", &media_type, new);
    artifact["subject"]["digest"] = sha256(new).into();
    artifact["subject"]["size"] = new.len().into();
    put_forged(registry, name, &mut artifact, &statement, |told| {
        told["subject"] = json!([{"digest": {"sha256": sha256(new)["sha256:".len()..]}}]);
        edit(told);
    });
}

fn put_forged(
    registry: &Conforming,
    name: &str,
    artifact: &mut Value,
    statement: &[u8],
    edit: impl Fn(&mut Value),
) {
    let mut forged = json_of(statement);
    edit(&mut forged);
    let forged = forged.to_string();
    registry.add_blob(name, &sha256(forged.as_bytes()), forged.as_bytes());
    artifact["layers"][0]["digest"] = sha256(forged.as_bytes()).into();
    artifact["layers"][0]["size"] = forged.len().into();
    let artifact = artifact.to_string().into_bytes();
    registry.add_manifest(name, &sha256(&artifact), Family::Oci.manifest(), &artifact);
}

const VERSION: &str = "/predicate/runDetails/builder/version";

/// What in-toto's Statement v1 and its digest sets ask for, and that each diff_id is its layer's, by Python.
const CHECK: &str = r#"
import gzip, hashlib, json, sys
s, blobs = json.load(sys.stdin)
assert s["_type"] == "https://in-toto.io/Statement/v1", s["_type"]
assert isinstance(s["subject"], list) and s["subject"]
for one in s["subject"] + s["predicate"]["buildDefinition"]["resolvedDependencies"]:
    assert one["digest"] and all(int(v, 16) >= 0 and len(v) == 64 for k, v in one["digest"].items() if k == "sha256")
assert s["predicateType"].startswith("https://") and isinstance(s["predicate"], dict)
for image in s["predicate"]["images"]:
    for layer in image["layers"]:
        for side in ("source", "result"):
            told = layer[side]
            blob = bytes.fromhex(blobs[told["digest"]])
            assert len(blob) == told["size"] and "sha256:" + hashlib.sha256(blob).hexdigest() == told["digest"]
            assert "sha256:" + hashlib.sha256(gzip.decompress(blob)).hexdigest() == told["diffId"]
        assert layer["edited"] == (layer["source"]["diffId"] != layer["result"]["diffId"])
print("right")
"#;

#[test]
fn an_image_is_made_again_as_its_provenance_says() {
    let (from, to) = (Registry::start(), Conforming::start());
    let image = image("amd64");
    let source = from.push(&image, "app", "1");
    let said = process(&source, &to.uri("clean:1"), &["--output-format", "json"]).ok().json();
    let new = said["manifest_digest"].as_str().expect("a digest").to_owned();
    let (artifact, bytes) = statement(&to, "clean", &new);
    assert_eq!(to.referrers("clean", &new), [said["provenance"].as_str().expect("a digest")]);
    assert_eq!(artifact["artifactType"], STATEMENT);
    assert_eq!(artifact["annotations"]["in-toto.io/predicate-type"], TYPE);
    assert_eq!(artifact["annotations"]["dev.occystrap.source.digest"], image.digest());
    let told = json_of(&bytes);
    assert_eq!(told["subject"], json!([{"digest": {"sha256": new["sha256:".len()..]}}]));
    let definition = &told["predicate"]["buildDefinition"];
    assert_eq!(definition["externalParameters"]["filters"], json!(["exclude:pattern=*.key"]));
    let dependency = &definition["resolvedDependencies"][0];
    assert_eq!(dependency["digest"]["sha256"], image.digest()["sha256:".len()..]);
    assert_eq!(dependency["uri"], format!("registry://{}/app", from.host()));
    // Python reads it, and the blobs that it names.
    let mut blobs = serde_json::Map::new();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for blob in image.blobs.values() {
        blobs.insert(sha256(blob), hex(blob).into());
    }
    for layer in told["predicate"]["images"][0]["layers"].as_array().expect("layers") {
        let digest = layer["result"]["digest"].as_str().expect("a digest");
        blobs.insert(digest.to_owned(), hex(&to.blob("clean", digest).expect("it")).into());
    }
    let right = pipe("python3", ["-c", CHECK], json!([told, blobs]).to_string().as_bytes());
    assert_eq!(right, b"right\n");
    let verdict = verify(&to.uri("clean:1"), &["--source", &source]).ok().json();
    assert_eq!(verdict["statements"][0]["verdict"], "same", "{verdict}");
    judge::skopeo_reads(&format!("docker://{}/clean:1", to.host()));
    // The same work says the same, and filters that only look are not told of.
    let directory = scratch();
    let lines = format!("inspect:file={}", directory.path().join("lines").display());
    process(&source, &to.uri("clean:1"), &["-f", &lines]).ok();
    assert_eq!(statement(&to, "clean", &new).1, bytes);
}

#[test]
fn what_was_done_otherwise_than_told_is_found_out() {
    let (from, to) = (Conforming::start(), Conforming::start());
    let image = image("amd64");
    from.add_image("app", "1", &image);
    let source = from.uri("app:1");
    let said = process(&source, &to.uri("clean:1"), &["--output-format", "json"]).ok().json();
    let new = said["manifest_digest"].as_str().expect("a digest").to_owned();
    let (own, name) = (to.uri("clean:1"), "clean");
    let given = ["--source", &source];
    let verdict = |code: i32| {
        let ended = match code {
            0 => verify(&own, &given).ok(),
            code => verify(&own, &given).fails(code),
        };
        ended.json()["statements"][0].clone()
    };
    // Which version has made what is the same bit for bit does not matter.
    forge(&to, name, &new, |told| told.pointer_mut(VERSION).expect("it")["encoder"] = "99".into());
    assert_eq!(verdict(0)["made_by"]["encoder"], "99");
    let diff_id = "/predicate/images/0/layers/1/result/diffId";
    forge(&to, name, &new, |told| *told.pointer_mut(diff_id).expect("it") = sha256(b"other").into());
    let told = verdict(3);
    assert_eq!(told["verdict"], "differs");
    assert!(told["differences"][0]["place"].as_str().expect("a place").contains("layers[1].result.diffId"));
    // A right statement excuses no wrong one.
    process(&source, &own, &[]).ok();
    let both = verify(&own, &given).fails(3).json();
    assert_eq!(both["statements"].as_array().expect("two").len(), 2, "{both}");
    // Other filters than were told of.
    process(&source, &to.uri("other:1"), &[]).ok();
    let other = "/predicate/buildDefinition/externalParameters/filters";
    forge(&to, "other", &new, |told| *told.pointer_mut(other).expect("it") = json!(["exclude:pattern=name"]));
    let told = verify(&to.uri("other:1"), &given).fails(3).json();
    let places: Vec<_> = told["statements"][0]["differences"].as_array().expect("some").clone();
    assert!(
        places.iter().any(|one| one["place"] == "the manifest's digest" && one["found"] == new),
        "{told}"
    );
    forge(&to, "other", &new, |told| *told.pointer_mut(other).expect("it") = json!(["grep:x"]));
    verify(&to.uri("other:1"), &given).fails(1).says(&["grep"]);
    let directory = scratch();
    let file = directory.path().join("lines");
    let looks = format!("inspect:file={}", file.display());
    forge(&to, "other", &new, |told| *told.pointer_mut(other).expect("it") = json!([looks]));
    verify(&to.uri("other:1"), &given).fails(1).says(&["inspect", "changes nothing"]);
    assert!(!file.exists());
    let uri = "/predicate/buildDefinition/resolvedDependencies/0/uri";
    forge(&to, "other", &new, |told| *told.pointer_mut(uri).expect("it") = json!("tar:///etc/passwd"));
    verify(&to.uri("other:1"), &[]).fails(1).says(&["tar:///etc/passwd", "registry://HOST/REPOSITORY"]);
    // A statement about something else, in this image's clothes.
    process(&source, &to.uri("third:1"), &[]).ok();
    forge(&to, "third", &new, |told| told["subject"][0]["digest"]["sha256"] = json!("0".repeat(64)));
    let told = verify(&to.uri("third:1"), &given).fails(3).json();
    assert_eq!(told["statements"][0]["differences"][0]["place"], "the statement's subject", "{told}");
    // One that is gone, and one that never had any.
    verify(&source, &[]).fails(1).says(&["no provenance"]);
    process(&source, &to.uri("fourth:1"), &[]).ok();
    let lie = Image::oci(vec![Layer::noise(1, 3000)]).manifest;
    from.add_manifest("app", &image.digest(), Family::Oci.manifest(), &lie);
    verify(&to.uri("fourth:1"), &given).fails(1).says(&[&image.digest()]);
    from.delete_manifest("app", &image.digest());
    verify(&to.uri("fourth:1"), &given).fails(1).says(&[&image.digest()]);
}

#[test]
fn of_an_image_by_another_version_all_is_compared_that_can_be() {
    let (from, to) = (Conforming::start(), Conforming::start());
    let words: String = (0..20_000).map(|number| format!("{} ", number * number % 977)).collect();
    let changed = Layer::of(&[Member::file("secret.key", "k"), Member::file("words", &words)]);
    from.add_image("app", "1", &Image::on(Family::Oci, ("linux", "amd64", None), vec![changed]));
    let (source, own) = (from.uri("app:1"), to.uri("clean:1"));
    let made = process(&source, &own, &["--compression", "gzip:1", "--output-format", "json"]).ok().json();
    let new = made["manifest_digest"].as_str().expect("a digest").to_owned();
    // What this version makes with another level stands for what another version would have made.
    let otherwise = |what: &'static str| {
        move |told: &mut Value| {
            told["predicate"]["buildDefinition"]["externalParameters"]["compression"] = "gzip:9".into();
            told.pointer_mut(VERSION).expect("it")[what] = "99".into();
        }
    };
    let verdict = |code: i32| {
        let told = verify(&own, &["--source", &source]).fails(code).json();
        (told["statements"][0]["verdict"].as_str().expect("a word").to_owned(), told)
    };
    forge(&to, "clean", &new, |told| {
        told["predicate"]["buildDefinition"]["externalParameters"]["compression"] = "gzip:9".into();
    });
    assert_eq!(verdict(3).0, "differs");
    forge(&to, "clean", &new, otherwise("encoder"));
    let (same, told) = verdict(6);
    assert_eq!(same, "same-content", "{told}");
    let text = occyctl(["verify", &own, "--source", &source]).fails(6).text();
    assert!(text.contains("by version 99 of the encoder"), "{text}");
    let manifest = to.manifest("clean", "1").expect("it").1;
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut document = json_of(&manifest);
        edit(&mut document);
        document.to_string().into_bytes()
    };
    // Other content in the layer, under the same config.
    let evil = Layer::of(&[Member::file("words", "evil")]).blob();
    to.add_blob("clean", &sha256(&evil), &evil);
    let other = edited(&|document| {
        document["layers"][0]["digest"] = sha256(&evil).into();
        document["layers"][0]["size"] = evil.len().into();
    });
    replace(&to, "clean", (&new, &other), |_| {});
    let (differs, told) = verdict(3);
    assert_eq!(differs, "differs");
    assert_eq!(told["statements"][0]["differences"][0]["place"], "the layer 0", "{told}");
    // Another manifest about the same content.
    replace(&to, "clean", (&new, &edited(&|document| document["annotations"] = json!({"a": "b"}))), |_| {});
    assert_eq!(verdict(3).1["statements"][0]["differences"][0]["place"], "the manifest.annotations");
    // What another rewriter makes of it, nobody here knows.
    to.add_manifest("clean", "1", Family::Oci.manifest(), &to.manifest("clean", &new).expect("it").1);
    forge(&to, "clean", &new, otherwise("rewriter"));
    assert_eq!(verdict(6).0, "unknown");
}

#[test]
fn of_an_index_by_another_version_nothing_is_said() {
    let (from, to) = (Registry::start(), Conforming::start());
    let entries = vec![(json!({"os": "linux", "architecture": "amd64"}), image("amd64"))];
    let source = from.push_index(&Index::new(Family::Oci, entries), "app", "1");
    let own = to.uri("clean:1");
    let made = process(&source, &own, &["--all", "--output-format", "json"]).ok().json();
    let old = made["manifest_digest"].as_str().expect("a digest");
    let mut index = json_of(&to.manifest("clean", "1").expect("it").1);
    index["manifests"][0]["platform"]["architecture"] = "arm64".into();
    let index = index.to_string().into_bytes();
    replace(&to, "clean", (old, &index), |told| {
        told.pointer_mut(VERSION).expect("it")["encoder"] = "99".into();
    });
    let told = verify(&own, &["--source", &source]).fails(6).json();
    assert_eq!(told["statements"][0]["verdict"], "unknown", "{told}");
}

#[test]
fn an_index_and_each_image_in_it_are_made_again() {
    let (from, to) = (Registry::start(), Registry::start());
    let lists = Conforming::with(Ways { referrers_page: 1, ..Ways::default() });
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let entries = ["amd64", "arm64"].map(|name| (platform(name), image(name))).to_vec();
    let source = from.push_index(&Index::new(Family::Oci, entries), "app", "1");
    let directory = scratch();
    let layout = format!("oci-layout://{}", directory.path().join("layout").display());
    for destination in [to.uri("clean:1"), lists.uri("clean:1"), layout] {
        process(&source, &destination, &["--all", "--output-format", "json"]).ok();
        let told = verify(&destination, &["--source", &source]).ok().json();
        assert_eq!(told["statements"][0]["verdict"], "same", "{destination}: {told}");
    }
    // Filters that only look are not told of, and change nothing of what is.
    let looked = lists.uri("looked:1");
    occyctl(["process", &source, &looked, "--all", "--provenance", "-f", "search:pattern=name"]).ok();
    verify(&looked, &["--source", &source]).ok();
    let index = json_of(&to.manifest("clean", "1").body);
    for entry in index["manifests"].as_array().expect("entries") {
        let one = to.uri(&format!("clean@{}", entry["digest"].as_str().expect("a digest")));
        verify(&one, &["--source", &source]).ok();
        // It goes with the image, wherever that goes.
        let copied = lists.uri("copied:1");
        occyctl(["copy", &one, &copied, "--referrers"]).ok();
        verify(&copied, &["--source", &source]).ok();
    }
}

#[test]
fn other_forms_are_made_again_in_these() {
    let (from, to) = (Registry::start(), Conforming::start());
    let source = from.push(&Image::docker(image("amd64").layers), "app", "1");
    for (name, more) in [("zstd", ["--compression", "zstd:5"]), ("oci", ["--format", "oci"])] {
        let destination = to.uri(&format!("{name}:1"));
        process(&source, &destination, &more).ok();
        verify(&destination, &["--source", &source]).ok();
    }
    // From the layout that it was made of, which has no name that others would understand.
    let directory = scratch();
    let layout = format!("oci-layout://{}", directory.path().join("layout").display());
    occyctl(["copy", &source, &layout]).ok();
    let destination = to.uri("local:1");
    process(&layout, &destination, &[]).ok();
    verify(&destination, &[]).fails(2).says(&["--source"]);
    verify(&destination, &["--source", &layout]).ok();
    let tar = format!("tar://{}", directory.path().join("a.tar").display());
    occyctl(["process", &source, &tar]).ok();
    process(&tar, &to.uri("tar:1"), &[]).fails(1).says(&["no manifest"]);
    assert!(to.manifest("tar", "1").is_none());
    process(&source, &format!("{tar}.tar"), &[]).fails(1).says(&["keeps no manifests"]);
    verify(&destination, &["--source", &tar]).fails(1).says(&["no manifest", "OCI image layout"]);
}

#[test]
fn a_registry_that_only_a_statement_names_is_no_door_into_a_private_network() {
    let (from, to) = (Conforming::start(), Conforming::start());
    from.add_image("app", "1", &image("amd64"));
    process(&from.uri("app:1"), &to.uri("clean:1"), &[]).ok();
    from.forget();
    verify(&to.uri("clean:1"), &["--username", "u", "--password", "s3cr3t"]).fails(1).keeps("s3cr3t");
    assert!(from.seen().is_empty(), "{}", from.story());
    verify(&to.uri("clean:1"), &["--allow-network", "127.0.0.0/8,::1"]).ok();
}
