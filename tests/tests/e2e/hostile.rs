//! Images that were made to do harm: a clear error, and the destination as it was.

use std::time::{Duration, Instant};

use occy_tests::fixed::Fixed;
use occy_tests::http::Response;
use occy_tests::image::{Family, Image, pretty};
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::tools::{Packing, hex, pipe, sha256, write};
use serde_json::{Value, json};

use crate::{scratch, small, tar_uri};

/// Serves a manifest and expects that nobody takes it for an image.
#[track_caller]
fn refused(content_type: &str, manifest: &[u8], says: &[&str]) {
    let server =
        Fixed::default().image("app", "other", &small()).manifest("app", "1", content_type, manifest).serve();
    let source = format!("registry://{}/app:1", server.host());
    let directory = scratch();
    let out = directory.path().join("out.tar");
    occyctl(["process", &source, &tar_uri(&out), "--retries", "0"]).fails(1).says(says);
    assert!(!out.exists());
    let to = Registry::start();
    occyctl(["process", &source, &to.uri("app:1"), "--retries", "0"]).fails(1).says(says);
    assert!(!to.has("app", "1"));
}

#[test]
fn a_manifest_that_is_two_things_is_refused() {
    let both = small().edit_manifest(|manifest| manifest["manifests"] = json!([]));
    refused(Family::Docker.manifest(), &both.manifest, &["ambiguous"]);
    let index = Image::oci(vec![]).edit_manifest(|manifest| {
        manifest["mediaType"] = Family::Oci.index().into();
        manifest["manifests"] = json!([]);
    });
    refused(Family::Oci.index(), &index.manifest, &["ambiguous"]);
}

#[test]
fn a_media_type_that_is_not_the_content_type_is_refused() {
    refused(Family::Oci.manifest(), &small().manifest, &[Family::Docker.manifest(), Family::Oci.manifest()]);
    refused("text/html", b"<html></html>", &["manifest"]);
}

#[test]
fn digests_that_are_paths_are_refused() {
    for digest in [
        "sha256:../../../../etc/passwd",
        "../../etc/passwd",
        "sha256:ABC",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
    ] {
        let image = small().edit_manifest(|manifest| manifest["layers"][1]["digest"] = digest.into());
        refused(Family::Docker.manifest(), &image.manifest, &["layers[1].digest"]);
    }
}

#[test]
fn documents_over_four_mebibytes_are_refused() {
    let image = small().edit_manifest(|manifest| manifest["x"] = "x".repeat(5 << 20).into());
    refused(Family::Docker.manifest(), &image.manifest, &[]);
    let image = small().edit_config(|config| config["x"] = "x".repeat(5 << 20).into());
    let server = Fixed::default().image("app", "1", &image).serve();
    occyctl(["info", &format!("registry://{}/app:1", server.host())]).fails(1);
}

#[test]
fn an_endless_body_is_cut_off_at_the_stated_size() {
    let image = small();
    let digest = image.layer_digests().remove(0);
    let body = vec![0; 40 << 20];
    let server = Fixed::default()
        .image("app", "1", &image)
        .at(&format!("/v2/app/blobs/{digest}"), Response::ok("application/octet-stream", body))
        .serve();
    let source = format!("registry://{}/app:1", server.host());
    occyctl(["process", &source, "tar://-", "--retries", "0"]).fails(1).says(&["layer 1 of 2", &digest]);
}

#[test]
fn a_layer_that_unpacks_to_too_much_is_stopped() {
    // 300 MB of zeros in 300 KB.
    let bomb = Layer::from_tar(tar(&[Member::file("zeros", vec![0; 300 << 20])]));
    let image = Image::docker(vec![bomb]);
    let server = Fixed::default().image("app", "1", &image).serve();
    let source = format!("registry://{}/app:1", server.host());
    let directory = scratch();
    let out = directory.path().join("out.tar");
    occyctl(["process", &source, &tar_uri(&out), "--max-layer-size", "100M"])
        .fails(1)
        .says(&["layer 1 of 1", "104857600"]);
    assert!(!out.exists());
}

#[test]
fn broken_layers_are_errors_that_say_which_and_where() {
    let good = tar(&[Member::file("a", vec![1; 5000]), Member::file("b", "b")]);
    let mut bad_checksum = good.clone();
    bad_checksum[512 * 11 + 5] ^= 1;
    let gzip = Packing::Gzip.pack(&good);
    let mut bad_crc = gzip.clone();
    let at = bad_crc.len() - 6;
    bad_crc[at] ^= 1;
    let zstd = Packing::Zstd.pack(&good);
    for (what, blob) in [
        ("gzip cut short", gzip[..gzip.len() - 20].to_vec()),
        ("gzip with a wrong checksum", bad_crc),
        ("gzip with garbage behind it", [&gzip[..], b"garbage"].concat()),
        ("zstd cut short", zstd[..zstd.len() - 10].to_vec()),
        ("zstd with garbage behind it", [&zstd[..], b"garbage"].concat()),
        ("a tar cut short in a member", Packing::Gzip.pack(&good[..2000])),
        ("a tar with a wrong checksum", Packing::Gzip.pack(&bad_checksum)),
        ("no tar", Packing::Gzip.pack(b"hello, world")),
    ] {
        let registry = Registry::start();
        // The descriptor is true of the stored bytes, and so would the diff_id be.
        let unpacked = if what.contains("gzip") || what.contains("zstd") {
            good.clone()
        } else {
            pipe("gzip", ["-dc"], &blob)
        };
        let mut image = Image::oci(vec![Layer::of(&[Member::file("first", "")]), Layer::from_tar(unpacked)]);
        let old = image.layer_digests().remove(1);
        image.blobs.remove(&old);
        image.blobs.insert(sha256(&blob), blob.clone());
        let zstd = what.contains("zstd");
        let image = image.edit_manifest(|manifest| {
            manifest["layers"][1]["digest"] = sha256(&blob).into();
            manifest["layers"][1]["size"] = blob.len().into();
            if zstd {
                manifest["layers"][1]["mediaType"] = Family::Oci.layer(Packing::Zstd, false).into();
            }
        });
        let source = registry.push(&image, "in", "1");
        let digest = sha256(&blob);
        for filter in ["normalize-timestamps", "search:pattern=*"] {
            let ended = occyctl(["process", &source, &registry.uri("out:1"), "-f", filter]).run();
            assert_eq!(ended.status.code(), Some(1), "{what}, {filter}: {}", ended.stderr);
            ended.says(&["layer 2 of 2", &digest]);
            assert!(!registry.has("out", "1"), "{what}");
        }
        occyctl(["check", &source]).fails(3);
    }
}

#[test]
fn hostile_configs_and_manifests_never_panic() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for config in
        [&b"null"[..], b"[]", b"{}", b"{\"rootfs\":{\"diff_ids\":{}}}", deep.as_bytes(), b"\xff\xfe", b""]
    {
        let image = small();
        let mut manifest: Value = serde_json::from_slice(&image.manifest).expect("json");
        manifest["config"]["digest"] = sha256(config).into();
        manifest["config"]["size"] = config.len().into();
        let fixed = Fixed::default().image("app", "0", &image).blob("app", config);
        let server = fixed.manifest("app", "1", Family::Docker.manifest(), &pretty(&manifest)).serve();
        occyctl(["info", &format!("registry://{}/app:1", server.host())]).fails(1);
        occyctl(["check", &format!("registry://{}/app:1", server.host())]).fails(3);
    }
    for manifest in ["null", "[]", "{}", "", &deep, r#"{"schemaVersion":1e999}"#] {
        refused(Family::Docker.manifest(), manifest.as_bytes(), &[]);
    }
}

#[test]
fn an_index_that_leads_to_itself_ends() {
    // A digest cannot hold itself, so a registry that lies about it is needed.
    let entry = |digest: &str| {
        pretty(&json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": [
            {"mediaType": Family::Oci.index(), "digest": digest, "size": 1, "platform": {"os": "linux", "architecture": "amd64"}}]}))
    };
    let mut fixed = Fixed::default();
    let mut digest = sha256(b"the end");
    for _ in 0..50 {
        let index = entry(&digest);
        digest = sha256(&index);
        fixed = fixed.manifest("app", "1", Family::Oci.index(), &index);
    }
    let server = fixed.serve();
    occyctl(["info", &format!("registry://{}/app:1", server.host()), "--architecture", "amd64"])
        .fails(1)
        .says(&["nested"]);
    assert!(server.seen().len() < 20);
}

#[test]
fn more_layers_than_diff_ids_are_an_error() {
    let image = small()
        .edit_config(|config| drop(config["rootfs"]["diff_ids"].as_array_mut().expect("a list").pop()));
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    occyctl(["process", &source, "tar://-"]).fails(1).says(&["2 layers", "1 diff_ids"]);
}

#[test]
fn indexes_that_all_lead_to_each_other_are_each_read_once() {
    let image = small();
    let mut members = saved::docker_v12(&[(&image, &["app:1"])]);
    let mut entries = Vec::new();
    // Sixty ways from each of five depths to the next.
    for depth in 0..5 {
        let indexes: Vec<_> = (0..60)
            .map(|number| {
                pretty(&json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": entries,
                    "annotations": {"is": format!("{depth} {number}")}}))
            })
            .collect();
        entries = Vec::new();
        for index in indexes {
            let digest = sha256(&index);
            entries.push(json!({"mediaType": Family::Oci.index(), "digest": digest, "size": index.len()}));
            members.push(Member::file(&format!("blobs/sha256/{}", hex(&digest)), index));
        }
    }
    let top = json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": entries});
    members.push(Member::file("index.json", top.to_string()));
    let directory = scratch();
    let path = directory.path().join("nested.tar");
    write(&path, tar(&members));
    let start = Instant::now();
    occyctl(["info", &tar_uri(&path)]).ok();
    assert!(start.elapsed() < Duration::from_secs(20));
}
