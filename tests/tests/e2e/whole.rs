//! `copy`: whole images, indexes, artifacts, and what belongs to them.

use occy_tests::certificates::text;
use occy_tests::conforming::{Conforming, Ways};
use occy_tests::http::Request;
use occy_tests::image::{Family, Image, json_of, pretty};
use occy_tests::judge;
use occy_tests::layer::Layer;
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::{sha256, tool};
use serde_json::{Value, json};

use crate::{layers, scratch, small};

/// An index as buildkit makes it: two images, each with its attestation, annotations, and a key that nobody knows.
struct Multi {
    images: Vec<Image>,
    index: Vec<u8>,
}

fn multi() -> Multi {
    let image = |architecture, seed| {
        let layers = vec![Layer::noise(0, 3000), Layer::noise(seed, 3000)];
        Image::on(Family::Oci, ("linux", architecture, None), layers)
    };
    let mut images = vec![image("amd64", 1), image("arm64", 2), image("s390x", 3)];
    let entry = |image: &Image| json!({"mediaType": Family::Oci.manifest(), "digest": image.digest(), "size": image.manifest.len()});
    let mut entries: Vec<Value> = Vec::new();
    for (image, architecture) in images.iter().zip(["amd64", "arm64", "s390x"]) {
        let mut entry = entry(image);
        entry["platform"] = json!({"architecture": architecture, "os": "linux"});
        entry["annotations"] = json!({"of": architecture});
        entries.push(entry);
    }
    for at in 0..3 {
        let attestation =
            Image::on(Family::Oci, ("unknown", "unknown", None), vec![Layer::noise(10 + at, 200)]);
        let mut entry = entry(&attestation);
        entry["platform"] = json!({"architecture": "unknown", "os": "unknown"});
        entry["annotations"] = json!({
            "vnd.docker.reference.type": "attestation-manifest",
            "vnd.docker.reference.digest": images[usize::try_from(at).expect("small")].digest(),
        });
        entries.push(entry);
        images.push(attestation);
    }
    let index = pretty(&json!({
        "x-first": 1, "schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": entries,
        "annotations": {"a": "b"},
    }));
    Multi { images, index }
}

fn push(registry: &Registry, multi: &Multi, name: &str, tag: &str) -> String {
    for image in &multi.images {
        registry.push(image, name, &image.digest());
    }
    registry.push_manifest(name, tag, Family::Oci.index(), &multi.index);
    format!("{}/{name}:{tag}", registry.host())
}

fn entries(index: &[u8]) -> Vec<Value> {
    json_of(index)["manifests"].as_array().expect("entries").clone()
}

#[test]
fn an_index_is_copied_bit_for_bit_and_not_again() {
    let (from, to) = (Registry::start(), Registry::start());
    let multi = multi();
    let source = push(&from, &multi, "app", "1");
    let proxy = FaultProxy::before(to.host());
    let destination = format!("{}/team/app:1", proxy.host());
    let said = occyctl(["copy", &source, &destination, "--output-format", "json"]).ok().json();
    assert_eq!(said["manifest_digest"], sha256(&multi.index));
    assert_eq!(said["manifests"], json!({"written": 7, "found": 0}));
    assert_eq!(said["blobs"]["found"], 0);
    assert_eq!(to.manifest("team/app", "1").body, multi.index);
    for image in &multi.images {
        assert_eq!(to.pull("team/app", &image.digest()).manifest, image.manifest);
    }
    judge::skopeo_reads(&format!("docker://{}/team/app:1", to.host()));
    // The layer that all images share went up once; and the tag last.
    let puts: Vec<_> = proxy.seen().into_iter().filter(|seen| seen.request.method == "PUT").collect();
    assert!(puts.last().is_some_and(|last| last.is("PUT", "/v2/team/app/manifests/1")), "{}", proxy.story());
    let blobs: usize = multi.images.iter().map(|image| image.blobs.len()).sum();
    let uploads = puts.iter().filter(|seen| seen.is("PUT", "*/blobs/uploads/*")).count();
    assert!(uploads < blobs, "{uploads} of {blobs}");
    proxy.forget();
    let said = occyctl(["copy", &source, &destination, "--output-format", "json"]).ok().json();
    assert_eq!((&said["bytes"], &said["manifests"]["written"]), (&json!(0), &json!(0)));
    for method in ["POST", "PUT", "PATCH"] {
        assert_eq!(proxy.count(method, "*"), 0, "{}", proxy.story());
    }
}

#[test]
fn a_warm_copy_of_an_image_costs_one_request_at_each_end() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
    let run = || occyctl(["copy", &format!("{}/app:1", near.host()), &format!("{}/app:1", far.host())]).ok();
    run();
    near.forget();
    far.forget();
    run();
    // One more is the question whether anybody is there.
    assert_eq!((near.seen().len(), far.seen().len()), (2, 2), "{}\n{}", near.story(), far.story());
}

#[test]
fn within_a_registry_blobs_are_mounted() {
    let registry = Registry::start();
    push(&registry, &multi(), "old/app", "1");
    let proxy = FaultProxy::before(registry.host());
    let uri = |name: &str| format!("{}/{name}:1", proxy.host());
    let said = occyctl(["copy", &uri("old/app"), &uri("new/app"), "--output-format", "json"]).ok().json();
    assert_eq!(said["bytes"], 0);
    assert_eq!(registry.manifest("new/app", "1").body, multi().index);
    assert_eq!(proxy.count("GET", "/v2/old/app/blobs/*"), 0, "{}", proxy.story());
    // Under another tag of the same repository nothing has to be mounted.
    proxy.forget();
    occyctl(["copy", &uri("new/app"), &format!("{}/new/app:2", proxy.host())]).ok();
    assert_eq!(proxy.count("POST", "*"), 0, "{}", proxy.story());
    assert_eq!(registry.manifest("new/app", "2").body, multi().index);
}

#[test]
fn some_platforms_make_a_new_index_with_their_attestations() {
    let (from, to) = (Registry::start(), Registry::start());
    let multi = multi();
    let source = push(&from, &multi, "app", "1");
    let destination = format!("{}/app:1", to.host());
    let wanted = ["--platform", "linux/s390x", "--platform", "linux/amd64"];
    let said = occyctl([&["copy", &source, &destination, "--output-format", "json"][..], &wanted].concat());
    let said = said.ok().json();
    let index = to.manifest("app", "1").body;
    assert_eq!(said["manifest_digest"], sha256(&index));
    let all = entries(&multi.index);
    assert_eq!(entries(&index), [0, 2, 3, 5].map(|at| all[at].clone()), "in the index's own order");
    let document = json_of(&index);
    assert_eq!((&document["x-first"], &document["annotations"]), (&json!(1), &json!({"a": "b"})));
    assert_eq!(to.manifest("app", "1").get("Content-Type"), Some(Family::Oci.index()));
    for at in [0, 2, 3, 5] {
        assert_eq!(to.pull("app", &multi.images[at].digest()).config, multi.images[at].config);
    }
    assert!(!to.has("app", &multi.images[1].digest()));
    judge::skopeo_reads(&format!("docker://{destination}"));
    // The same again is the same index.
    occyctl([&["copy", &source, &destination][..], &wanted].concat()).ok();
    assert_eq!(to.manifest("app", "1").body, index);
    // All of them are the index as it is.
    let whole = format!("{}/app:2", to.host());
    let every = ["--platform", "linux/amd64", "--platform", "linux/arm64", "--platform", "linux/s390x"];
    let run = [&["copy", &source, &whole, "--preserve-digests"][..], &every].concat();
    occyctl(run).ok();
    assert_eq!(to.manifest("app", "2").body, multi.index);
}

#[test]
fn a_digest_that_is_to_be_preserved_is_or_nothing_is_written() {
    let from = Registry::start();
    let to = Conforming::start();
    let multi = multi();
    let source = push(&from, &multi, "app", "1");
    let run =
        ["copy", &source, &format!("{}/app:1", to.host()), "--platform", "linux/arm64", "--preserve-digests"];
    occyctl(run).fails(1).says(&["would become sha256:", "--sparse"]);
    assert!(to.tags("app").is_empty() && to.count("POST", "*") == 0);
    // A registry that takes an index without all of its images gets it as it is.
    let said = occyctl([&run[..], &["--sparse", "--output-format", "json"]].concat()).ok().json();
    assert_eq!(to.manifest("app", "1").expect("an index").1, multi.index);
    assert_eq!(said["left_out"].as_array().map(Vec::len), Some(4));
    assert!(to.manifest("app", &multi.images[1].digest()).is_some());
    assert!(to.manifest("app", &multi.images[4].digest()).is_some(), "its attestation");
    assert!(to.manifest("app", &multi.images[0].digest()).is_none());
    // A destination that is called by a digest takes nothing else.
    let other = format!("{}/app@{}", to.host(), sha256(b"other"));
    occyctl(["copy", &source, &other]).fails(1).says(&["the destination asks for"]);
    let own = format!("{}/own@{}", to.host(), sha256(&multi.index));
    occyctl(["copy", &source, &own]).ok();
    assert_eq!(to.manifest("own", &sha256(&multi.index)).expect("an index").1, multi.index);
}

#[test]
fn platforms_are_found_in_indexes_of_indexes_and_missed_with_words() {
    let (from, to) = (Conforming::start(), Conforming::start());
    let nested =
        occy_tests::conformance::all().into_iter().find(|data| data.name == "nested-index").expect("it");
    nested.put_into(&from);
    let source = from.uri("nested-index:index-of-index");
    let destination = to.uri("app:1");
    // Its entries have no platforms: which of them is meant nobody can say without looking into all.
    occyctl(["copy", &source, &destination, "--platform", "linux/arm64"]).fails(1).says(&["linux/arm64"]);
    assert!(to.tags("app").is_empty());
    // One that is alone is looked into.
    let inner = nested
        .manifests
        .iter()
        .find(|(_, media_type, _)| *media_type == Family::Oci.index())
        .expect("an index");
    let outer = json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": [
        {"mediaType": Family::Oci.index(), "digest": inner.0, "size": inner.2.len()}]});
    from.add_manifest("nested-index", "one", Family::Oci.index(), outer.to_string().as_bytes());
    occyctl(["copy", &from.uri("nested-index:one"), &destination, "--platform", "linux/arm64"]).ok();
    let found = entries(&to.manifest("app", "1").expect("an index").1);
    let within =
        to.manifest("app", found[0]["digest"].as_str().expect("a digest")).expect("the inner index").1;
    assert_eq!(entries(&within).len(), 1);
    assert_eq!(entries(&within)[0]["platform"]["architecture"], "arm64");
    let image = Image::on(Family::Oci, ("linux", "arm64", None), layers());
    let one = Registry::start();
    let source = one.push(&image, "app", "1");
    occyctl(["copy", &source, &destination, "--platform", "linux/arm64"]).ok();
    occyctl(["copy", &source, &destination, "--platform", "linux/amd64"])
        .fails(1)
        .says(&["no image for linux/amd64"]);
}

/// An image with an SBOM, a signature of the SBOM, and cosign's tags; gives the three manifests beside it.
fn signed(registry: &Conforming) -> (Image, [Vec<u8>; 3]) {
    let image = Image::oci(layers());
    registry.add_image("app", "1", &image);
    let sbom = registry.add_artifact("app", "example/sbom", &image.manifest, Family::Oci.manifest());
    let signature = registry.add_artifact("app", "example/signature", &sbom, Family::Oci.manifest());
    let cosign = Image::oci(vec![Layer::noise(9, 100)]);
    registry.add_image("app", &format!("{}.sig", image.digest().replace(':', "-")), &cosign);
    (image, [sbom, signature, cosign.manifest])
}

#[test]
fn what_belongs_to_an_image_goes_with_it_if_asked_also_through_layouts() {
    let from = Conforming::start();
    let (image, [sbom, signature, cosign]) = signed(&from);
    let directory = scratch();
    let layout = format!("oci-layout://{}", text(&directory.path().join("layout")));
    let through = Registry::start();
    let to = Conforming::start();
    let ways = [
        (from.uri("app:1"), layout.clone()),
        (layout, through.uri("app:1")),
        (through.uri("app:1"), to.uri("app:1")),
    ];
    let sig = format!("{}.sig", image.digest().replace(':', "-"));
    for (source, destination) in &ways {
        let said =
            occyctl(["copy", source, destination, "--referrers", "--output-format", "json"]).ok().json();
        assert_eq!(said["manifest_digest"], image.digest(), "{source}");
        let kinds: Vec<_> = said["referrers"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|one| one["artifact_type"].clone())
            .collect();
        assert_eq!(kinds, ["example/sbom", "example/signature"], "{source}");
        assert_eq!(said["digest_tags"], json!([sig]), "{source}");
    }
    assert_eq!(to.referrers("app", &image.digest()), [sha256(&sbom)]);
    assert_eq!(to.referrers("app", &sha256(&sbom)), [sha256(&signature)]);
    assert_eq!(to.manifest("app", &sig).expect("cosign's").1, cosign);
    assert_eq!(through.digest("app", &sig), sha256(&cosign));
    // Without being asked for it does not.
    let bare = Conforming::start();
    occyctl(["copy", &from.uri("app:1"), &bare.uri("app:1")]).ok();
    assert!(bare.referrers("app", &image.digest()).is_empty() && bare.tags("app") == ["1"]);
    // A tar has one name.
    let tar = format!("oci-layout://{}", text(&directory.path().join("layout.tar")));
    occyctl(["copy", &from.uri("app:1"), &tar, "--referrers"]).fails(1).says(&["a directory can"]);
    assert!(!directory.path().join("layout.tar").exists());
}

#[test]
fn the_index_of_referrers_keeps_what_others_put_there_also_at_the_same_time() {
    let from = Conforming::start();
    let (image, [sbom, ..]) = signed(&from);
    let to = Conforming::with(Ways { no_referrers: true, ..Ways::default() });
    let tag = image.digest().replace(':', "-");
    let others = |names: &[&str]| {
        let entries: Vec<_> = names
            .iter()
            .map(|name| json!({"mediaType": Family::Oci.manifest(), "digest": sha256(name.as_bytes()), "size": 3}))
            .collect();
        json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": entries, "annotations": {"x": "y"}})
            .to_string()
    };
    to.add_manifest("app", &tag, Family::Oci.index(), others(&["one"]).as_bytes());
    let proxy = FaultProxy::before(&to.host());
    // Somebody else, who has read the same index, writes theirs right behind ours.
    let theirs = others(&["one", "two"]);
    let late = move |request: &Request, upstream: &proxy::Upstream<'_>| {
        let answer = upstream(request);
        upstream(&Request { body: theirs.clone().into_bytes(), ..request.clone() });
        answer
    };
    let at = format!("/v2/app/manifests/{tag}");
    proxy.fault(1, "PUT", &at, std::sync::Arc::new(late));
    let destination = format!("{}/app:1", proxy.host());
    occyctl(["copy", &from.uri("app:1"), &destination, "--referrers"]).ok();
    let index = json_of(&to.manifest("app", &tag).expect("the index").1);
    let found: Vec<_> =
        entries(&index.to_string().into_bytes()).iter().map(|entry| entry["digest"].clone()).collect();
    assert_eq!(found, [sha256(b"one"), sha256(b"two"), sha256(&sbom)]);
    assert_eq!(index["annotations"], json!({"x": "y"}));
    assert_eq!(proxy.count("PUT", &at), 2, "{}", proxy.story());
    // What is listed is not listed again.
    proxy.forget();
    occyctl(["copy", &from.uri("app:1"), &destination, "--referrers"]).ok();
    assert_eq!(proxy.count("PUT", &at), 0, "{}", proxy.story());
}

#[test]
fn a_copy_that_fails_leaves_the_tag_where_it_was() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = push(&from, &multi(), "app", "1");
    to.push(&small(), "app", "1");
    let before = to.digest("app", "1");
    let proxy = FaultProxy::before(to.host());
    let destination = format!("{}/app:1", proxy.host());
    for (method, pattern) in
        [("PUT", "*/blobs/uploads/*"), ("PUT", "/v2/app/manifests/sha256:*"), ("PUT", "/v2/app/manifests/1")]
    {
        proxy.fault(usize::MAX, method, pattern, proxy::status(403));
        occyctl(["copy", &source, &destination, "--retries", "0"]).fails(1).says(&["403"]);
        proxy.heal();
        assert_eq!(to.digest("app", "1"), before, "{pattern}");
    }
    let near = FaultProxy::before(from.host());
    near.fault(usize::MAX, "GET", "/v2/app/blobs/*", proxy::corrupt(20));
    let fresh = to.uri("fresh:1");
    let damaged = occyctl(["copy", &format!("{}/app:1", near.host()), &fresh, "--retries", "0"]).fails(1);
    assert!(damaged.stderr.contains("failed to copy sha256:"), "{}", damaged.stderr);
    assert!(!to.has("fresh", "1"));
    assert_eq!(to.digest("app", "1"), before);
    occyctl(["copy", &source, &destination]).ok();
    assert_eq!(to.digest("app", "1"), sha256(&multi().index));
}

#[test]
fn foreign_layers_stay_where_they_are_unless_asked_for() {
    let (from, to) = (Registry::start(), Registry::start());
    let layer = Layer::noise(1, 10_000);
    let image = Image::oci(vec![layer.clone().foreign("https://example.com/base"), Layer::noise(2, 100)]);
    let source = from.push(&image, "app", "1");
    from.push_blob("app", &layer.blob());
    let foreign = image.layer_digests()[0].clone();
    occyctl(["copy", &source, &to.uri("app:1")]).ok();
    assert_eq!(to.digest("app", "1"), image.digest());
    assert!(!to.has_blob("app", &foreign));
    occyctl(["copy", &source, &to.uri("all:1"), "--foreign-layers"]).ok();
    assert!(to.has_blob("all", &foreign));
}

#[test]
fn what_cannot_be_copied_as_it_is_is_said() {
    let to = Registry::start();
    let schema1 = json!({"schemaVersion": 1, "name": "app", "tag": "1", "architecture": "amd64",
        "fsLayers": [{"blobSum": sha256(b"x")}], "history": [{"v1Compatibility": "{}"}]});
    let server = occy_tests::fixed::Fixed::default()
        .manifest(
            "app",
            "1",
            "application/vnd.docker.distribution.manifest.v1+json",
            schema1.to_string().as_bytes(),
        )
        .serve();
    let run = occyctl(["copy", &format!("{}/app:1", server.host()), &to.uri("app:1")]);
    run.fails(1).says(&["schema 1", "occyctl process"]);
    for (source, destination, words) in [
        ("tar://x", "localhost:1/x", "unknown source of whole images tar://"),
        ("localhost:1/x", "docker://x", "unknown destination of whole images docker://"),
        ("localhost:1/x?os=linux", "localhost:1/x", "no option \"os\""),
        ("localhost:1", "localhost:1/x", "names a registry and no image"),
    ] {
        let ended = occyctl(["copy", source, destination]).fails(2);
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
    }
}

#[test]
fn helm_charts_and_the_like_are_copied_and_skopeo_agrees() {
    let (from, to) = (Registry::start(), Registry::start());
    let chart = Image::oci(vec![Layer::noise(1, 500)]).edit_manifest(|manifest| {
        manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
        manifest["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart.content.v1.tar+gzip".into();
    });
    let source = from.push(&chart, "charts/app", "1.2.3");
    occyctl(["copy", &source, &to.uri("charts/app:1.2.3")]).ok();
    let raw = tool(
        "skopeo",
        ["inspect", "--raw", "--tls-verify=false", &format!("docker://{}/charts/app:1.2.3", to.host())],
    );
    assert_eq!(raw.as_bytes(), chart.manifest);
    for digest in chart.layer_digests().iter().chain([&chart.config_digest()]) {
        assert!(to.has_blob("charts/app", digest));
    }
}
