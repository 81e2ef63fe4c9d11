//! `process --all` with filters: every platform's image of an index, in one transaction.

use occy_tests::certificates::text;
use occy_tests::image::{Family, Image, json_of, pretty};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::{read, sha256};
use serde_json::{Value, json};

use crate::scratch;

const TYPE: &str = "vnd.docker.reference.type";
const OF: &str = "vnd.docker.reference.digest";

fn image(architecture: &str, secret: bool) -> Image {
    let mut members = vec![Member::file("name", architecture)];
    if secret {
        members.push(Member::file("secret.key", "k"));
    }
    Image::on(Family::Oci, ("linux", architecture, None), vec![Layer::noise(1, 2000), Layer::of(&members)])
}

fn attestation(of: &Image) -> Image {
    Image::on(
        Family::Oci,
        ("unknown", "unknown", None),
        vec![Layer::of(&[Member::file("statement", of.digest())])],
    )
}

fn entry(image: &Image, platform: &Value, annotations: &Value) -> Value {
    json!({"mediaType": Family::Oci.manifest(), "digest": image.digest(), "size": image.manifest.len(),
           "platform": platform, "annotations": annotations})
}

/// An attestation before its image; an image with a file to exclude, and one without; a chart.
fn push(registry: &Registry) -> ([Image; 5], Vec<u8>, String) {
    let (changed, kept) = (image("amd64", true), image("arm64", false));
    let (of_changed, of_kept) = (attestation(&changed), attestation(&kept));
    let chart =
        Image::oci(vec![Layer::of(&[Member::file("secret.key", "chart")])]).edit_manifest(|manifest| {
            manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
        });
    let unknown = || json!({"os": "unknown", "architecture": "unknown"});
    let attests = |image: &Image| json!({TYPE: "attestation-manifest", OF: image.digest()});
    let mut chart_entry = entry(&chart, &json!(null), &json!({"chart": "yes"}));
    chart_entry.as_object_mut().expect("an object").remove("platform");
    let index = pretty(&json!({
        "schemaVersion": 2, "x-unknown": [1], "mediaType": Family::Oci.index(),
        "manifests": [
            entry(&of_changed, &unknown(), &attests(&changed)),
            entry(&changed, &json!({"os": "linux", "architecture": "amd64"}), &json!({"of": "amd64"})),
            entry(&kept, &json!({"os": "linux", "architecture": "arm64", "os.features": ["x"]}), &json!({"of": "arm64"})),
            chart_entry,
            entry(&of_kept, &unknown(), &attests(&kept)),
        ],
        "annotations": {"all": "kept"},
    }));
    let images = [of_changed, changed, kept, chart, of_kept];
    for image in &images {
        registry.push(image, "app", &image.digest());
    }
    registry.push_manifest("app", "1", Family::Oci.index(), &index);
    (images, index, registry.uri("app:1"))
}

#[test]
fn every_platforms_image_passes_the_filters_and_the_index_is_rebuilt() {
    let (from, to) = (Registry::start(), Registry::start());
    let (images, index, source) = push(&from);
    let proxy = FaultProxy::before(to.host());
    let destination = format!("registry://{}/clean:1", proxy.host());
    let run =
        ["process", &source, &destination, "--all", "-f", "exclude:pattern=*.key", "--output-format", "json"];
    let ended = occyctl(run).ok();
    let said = ended.json();
    let rebuilt = to.manifest("clean", "1").body;
    assert_eq!(said["manifest_digest"], sha256(&rebuilt));
    let (old, new) = (json_of(&index), json_of(&rebuilt));
    assert_eq!((&new["annotations"], &new["x-unknown"]), (&json!({"all": "kept"}), &json!([1])));
    let entries = new["manifests"].as_array().expect("entries");
    // Without the attestation of the image that changed; everything else that did not is as it was, the chart's file too.
    assert_eq!(entries[1..], old["manifests"].as_array().expect("entries")[2..]);
    let mut expected = old["manifests"][1].clone();
    let changed = entries[0]["digest"].as_str().expect("a digest");
    let pulled = to.pull("clean", changed);
    expected["digest"] = changed.into();
    expected["size"] = pulled.manifest.len().into();
    assert_eq!(entries[0], expected);
    assert_ne!(changed, images[1].digest());
    assert_eq!(judge::names(&pulled.tars[1]), ["name"]);
    assert_eq!(
        pulled.document["layers"][0]["digest"],
        images[1].layer_digests()[0],
        "a layer that nothing was found in"
    );
    for image in &images[2..] {
        assert_eq!(to.manifest("clean", &image.digest()).body, image.manifest);
    }
    let dropped = json!([{"digest": images[0].digest(), "image": images[1].digest(), "became": changed}]);
    assert_eq!(said["attestations"], json!({"dropped": dropped, "retargeted": []}));
    ended.says(&["left out the attestation", &images[0].digest()]);
    assert!(!to.has("clean", &images[0].digest()));
    judge::skopeo_reads(&format!("docker://{}/clean:1", to.host()));
    let puts: Vec<_> = proxy.seen().into_iter().filter(|seen| seen.request.method == "PUT").collect();
    assert!(puts.last().is_some_and(|last| last.is("PUT", "/v2/clean/manifests/1")), "{}", proxy.story());
}

#[test]
fn an_attestation_can_be_kept_for_the_new_image() {
    let (from, to) = (Registry::start(), Registry::start());
    let (images, _, source) = push(&from);
    let run = ["process", &source, &to.uri("clean:1"), "--all", "-f", "exclude:pattern=*.key"];
    let ended = occyctl([&run[..], &["--attestations", "retarget"]].concat()).ok();
    ended.says(&["kept the attestation", "still name", &images[1].digest()]);
    let index = json_of(&to.manifest("clean", "1").body);
    assert_eq!(index["manifests"][0]["digest"], images[0].digest());
    assert_eq!(index["manifests"][0]["annotations"][OF], index["manifests"][1]["digest"]);
    assert_eq!(index["manifests"][0]["annotations"][TYPE], "attestation-manifest");
    assert_eq!(to.manifest("clean", &images[0].digest()).body, images[0].manifest);
    // All platforms are meant, whichever is wanted otherwise.
    let other = to.uri("other:1");
    let run = ["process", &source, &other, "--all", "-f", "exclude:pattern=*.key", "--architecture", "s390x"];
    occyctl([&run[..], &["--attestations", "retarget"]].concat()).ok();
    assert_eq!(to.manifest("other", "1").body, to.manifest("clean", "1").body);
    occyctl(["process", &source, &to.uri("clean:1"), "--attestations", "drop"]).fails(2).says(&["--all"]);
}

#[test]
fn an_index_that_no_filter_changes_stays_bit_for_bit_and_what_is_found_is_told_of_each_image() {
    let (from, to) = (Registry::start(), Registry::start());
    let (images, index, source) = push(&from);
    let directory = scratch();
    let layout = format!("oci-layout://{}", text(&directory.path().join("layout")));
    let lines = directory.path().join("lines");
    let inspect = format!("inspect:file={}", text(&lines));
    for (from, to) in [(&source, &layout), (&layout, &to.uri("same:1"))] {
        let ended =
            occyctl(["process", from, to, "--all", "-f", "search:pattern=*.key", "-f", &inspect]).ok();
        assert!(ended.text().contains("secret.key"), "{}", ended.text());
        assert_eq!(ended.text().matches("secret.key").count(), 1, "of the image, and not of the chart");
    }
    assert_eq!(to.manifest("same", "1").body, index);
    let written = String::from_utf8(read(&lines)).expect("JSON");
    assert_eq!(written.lines().count(), 4, "two images, twice");
    assert!(to.has("same", &images[0].digest()));
}

#[test]
fn an_index_in_an_index_is_rebuilt_too() {
    let (from, to) = (Registry::start(), Registry::start());
    let (_, inner, _) = push(&from);
    let outer = pretty(&json!({
        "schemaVersion": 2, "mediaType": Family::Oci.index(), "annotations": {"outer": "yes"},
        "manifests": [{"mediaType": Family::Oci.index(), "digest": sha256(&inner), "size": inner.len()}],
    }));
    from.push_manifest("app", "outer", Family::Oci.index(), &outer);
    let run = ["process", &from.uri("app:outer"), &to.uri("clean:1"), "--all", "-f", "exclude:pattern=*.key"];
    occyctl(run).ok();
    let rebuilt = json_of(&to.manifest("clean", "1").body);
    assert_eq!(rebuilt["annotations"], json!({"outer": "yes"}));
    let within = to.manifest("clean", rebuilt["manifests"][0]["digest"].as_str().expect("a digest"));
    assert_eq!(rebuilt["manifests"][0]["size"], within.body.len());
    assert_eq!(json_of(&within.body)["manifests"].as_array().map(Vec::len), Some(4));
    // Once more, through the same filters, gives the same.
    let first = to.digest("clean", "1");
    occyctl(run).ok();
    assert_eq!(to.digest("clean", "1"), first);
}

#[test]
fn an_image_that_cannot_be_filtered_leaves_the_tag_where_it_was() {
    let (from, to) = (Registry::start(), Registry::start());
    let (images, _, _) = push(&from);
    to.push(&images[2], "clean", "1");
    let near = FaultProxy::before(from.host());
    let last = images[2].layer_digests()[1].clone();
    near.fault(usize::MAX, "GET", &format!("/v2/app/blobs/{last}"), proxy::status(404));
    let source = format!("registry://{}/app:1", near.host());
    let run = ["process", &source, &to.uri("clean:1"), "--all", "-f", "exclude:pattern=*.key"];
    occyctl(run).fails(1).says(&["404", &last]);
    assert_eq!(to.digest("clean", "1"), images[2].digest());
}
