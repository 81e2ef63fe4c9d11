//! What a registry gets: how blobs get there, what they are compressed to, and under which name.

use occy_tests::image::{Family, Image};
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::token::TokenServer;
use occy_tests::tools::{Packing, run, sha256, write};

use crate::{layers, scratch, small, tar_uri};

#[test]
fn a_mount_that_became_an_upload_goes_on_as_one() {
    let registry = Registry::start();
    let image = small();
    registry.push(&image, "old/app", "1");
    let proxy = FaultProxy::before(registry.host());
    // The registry does not know the blob there, and opens a session instead.
    let unknown: proxy::Fault = std::sync::Arc::new(|request, upstream| {
        let mut request = request.clone();
        request.path = "/v2/new/app/blobs/uploads/".to_owned();
        upstream(&request)
    });
    proxy.fault(usize::MAX, "POST", "/v2/new/app/blobs/uploads/", unknown);
    let uri = |name: &str| format!("registry://{}/{name}:1", proxy.host());
    occyctl(["process", &uri("old/app"), &uri("new/app")]).ok();
    assert_eq!(registry.pull("new/app", "1").digest, image.digest());
    assert_eq!(proxy.count("POST", "*"), 3, "no session but those: {}", proxy.story());
}

#[test]
fn a_mount_asks_for_a_token_that_may_read_the_other_repository() {
    let tokens = TokenServer::with_user("ann", "secret");
    let registry = Registry::with_tokens(&tokens);
    let image = small();
    registry.push(&image, "old/app", "1");
    let proxy = FaultProxy::before(registry.host());
    let uri = |name: &str| format!("registry://{}/{name}:1", proxy.host());
    occyctl(["process", &uri("old/app"), &uri("new/app"), "--username", "ann", "--password", "secret"]).ok();
    assert_eq!(registry.pull("new/app", "1").digest, image.digest());
    for digest in image.layer_digests() {
        assert_eq!(proxy.count("GET", &format!("/v2/old/app/blobs/{digest}")), 0, "{}", proxy.story());
    }
}

#[test]
fn a_destination_may_be_named_by_the_digest_that_it_will_have() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = small();
    let source = from.push(&image, "app", "1");
    let target = to.uri(&format!("app@{}", image.digest()));
    occyctl(["process", &source, &target]).ok();
    assert!(to.has("app", &image.digest()));
    let ended = occyctl(["process", &source, &target, "-f", "normalize-timestamps"]).fails(1);
    ended.says(&[&image.digest()]);
}

#[test]
fn a_tag_that_exists_moves_to_the_new_image() {
    let (from, to) = (Registry::start(), Registry::start());
    to.push(&Image::docker(vec![Layer::noise(1, 100)]), "app", "1");
    let source = from.push(&small(), "app", "1");
    occyctl(["process", &source, &to.uri("app:1")]).ok();
    assert_eq!(to.digest("app", "1"), small().digest());
}

#[test]
fn an_image_may_be_rewritten_in_its_place() {
    let registry = Registry::start();
    let uri = registry.push(&small(), "app", "1");
    occyctl(["process", &uri, &uri]).ok();
    assert_eq!(registry.digest("app", "1"), small().digest());
    occyctl(["process", &uri, &uri, "-f", "exclude:pattern=etc/late"]).ok();
    assert_eq!(registry.pull("app", "1").tars[0], small().layers[0].tar);
    assert_ne!(registry.digest("app", "1"), small().digest());
}

#[test]
fn a_wrong_diff_id_is_found_in_a_copy_only_when_asked() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = small().edit_config(|config| config["rootfs"]["diff_ids"][0] = sha256(b"other").into());
    let source = from.push(&image, "app", "1");
    let checked = to.uri("app:checked");
    occyctl(["process", &source, &checked, "--verify-diff-ids"]).fails(1).says(&["layer 1 of 2", "diff_id"]);
    assert!(!to.has("app", "checked"));
    occyctl(["process", &source, &to.uri("app:copied")]).ok();
    assert_eq!(to.digest("app", "copied"), image.digest());
}

#[test]
fn every_level_unpacks_to_the_same_and_says_nothing_of_time_or_machine() {
    let to = Registry::start();
    let text = "the quick brown fox jumps over the lazy dog\n".repeat(40_000);
    let image = Image::docker(vec![Layer::of(&[Member::file("fox", text), Member::file("late", "x")])]);
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, occy_tests::layer::tar(&saved::docker_v12(&[(&image, &["app:1"])])));
    for level in ["gzip", "gzip:1", "gzip:6", "gzip:9", "zstd", "zstd:1", "zstd:19"] {
        occyctl(["process", &tar_uri(&path), &to.uri("app:1"), "--compression", level]).ok();
        let pushed = to.pull("app", "1");
        assert_eq!(pushed.config, image.config, "{level}");
        let blob = &pushed.blobs[0];
        assert!(blob.len() < image.layers[0].tar.len() / 10, "{level}: {}", blob.len());
        if level.starts_with("gzip") {
            // RFC 1952: no name or other field, no time, an unknown system.
            assert_eq!((blob[3], &blob[4..8], blob[9]), (0, &[0; 4][..], 255), "{level}");
        }
    }
}

#[test]
fn compressed_bytes_depend_on_neither_threads_nor_cores() {
    let to = Registry::start();
    let mut data = occy_tests::layer::noise(5, 2_000_000);
    data.extend("some text that repeats ".repeat(200_000).bytes());
    let image = Image::docker(vec![Layer::of(&[Member::file("data", data)]), Layer::noise(6, 100_000)]);
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, occy_tests::layer::tar(&saved::docker_v12(&[(&image, &["app:1"])])));
    for compression in ["gzip", "zstd"] {
        let mut digests = Vec::new();
        for parallel in ["1", "8"] {
            let uri = to.uri(&format!("app:{compression}-{parallel}"));
            occyctl(["process", &tar_uri(&path), &uri, "--compression", compression, "-j", parallel]).ok();
            digests.push(to.pull("app", &format!("{compression}-{parallel}")).digest);
        }
        let program = occy_tests::certificates::text(occy_tests::occyctl::path());
        let uri = to.uri("app:one-core");
        let one_core = ["-c", "0", &program, "process", &tar_uri(&path), &uri, "--compression", compression];
        assert!(run("taskset", one_core, b"").status.success());
        digests.push(to.digest("app", "one-core"));
        digests.dedup();
        assert_eq!(digests.len(), 1, "{compression}");
    }
}

#[test]
fn a_registry_gets_gzip_of_what_has_no_compression_and_keeps_what_has() {
    let (from, to) = (Registry::start(), Registry::start());
    let mut list = layers();
    list[0] = list[0].clone().packed(Packing::Zstd);
    list[1] = list[1].clone().packed(Packing::GzipMembers);
    let image = Image::oci(list);
    let source = from.push(&image, "app", "1");
    occyctl(["process", &source, &to.uri("app:1"), "-f", "normalize-timestamps"]).ok();
    let pushed = to.pull("app", "1");
    let kinds: Vec<_> = (0..2).map(|layer| pushed.document["layers"][layer]["mediaType"].clone()).collect();
    assert_eq!(kinds, [Family::Oci.layer(Packing::Zstd, false), Family::Oci.layer(Packing::Gzip, false)]);
}

#[test]
fn an_oci_manifest_needs_no_media_type() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = Image::oci(layers()).edit_manifest(|manifest| {
        manifest.as_object_mut().expect("an object").shift_remove("mediaType");
    });
    let source = from.push(&image, "app", "1");
    occyctl(["process", &source, &to.uri("app:1")]).ok();
    assert_eq!(to.digest("app", "1"), image.digest());
    occyctl(["process", &source, &to.uri("app:2"), "-f", "normalize-timestamps"]).ok();
    assert_eq!(to.manifest("app", "2").get("Content-Type"), Some(Family::Oci.manifest()));
    occyctl(["process", &source, &to.uri("app:3"), "--format", "docker"]).ok();
    assert_eq!(to.pull("app", "3").config, image.config);
    for tag in ["1", "2", "3"] {
        occyctl(["check", &to.uri(&format!("app:{tag}"))]).ok();
    }
}

#[test]
fn an_artifact_is_checked_without_diff_ids() {
    let registry = Registry::start();
    let artifact = Image::oci(vec![Layer::from_tar(b"no tar".to_vec()).packed(Packing::Plain)])
        .edit_config(|config| *config = serde_json::json!({}))
        .edit_manifest(|manifest| {
            manifest["config"]["mediaType"] = "application/vnd.oci.empty.v1+json".into();
            manifest["artifactType"] = "application/vnd.example".into();
            manifest["layers"][0]["mediaType"] = "application/octet-stream".into();
        });
    let source = registry.push(&artifact, "artifact", "1");
    occyctl(["check", &source]).ok();
    occyctl(["info", &source]).ok();
}
