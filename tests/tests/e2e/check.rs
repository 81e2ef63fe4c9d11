//! `check` and `info`.

use occy_tests::fixed::Fixed;
use occy_tests::http::Response;
use occy_tests::image::{Family, Image, json_of};
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::{Ended, occyctl};
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::tools::{Packing, sha256, write};
use serde_json::Value;

use crate::{layers, scratch, small, tar_uri};

fn checked(image: &Image, arguments: &[&str], code: i32) -> Ended {
    let registry = Registry::start();
    let source = registry.push(image, "app", "1");
    let run = occyctl([&["check", &source], arguments].concat());
    if code == 0 { run.ok() } else { run.fails(code) }
}

/// The findings as JSON, of a check that has to end with the code.
fn findings(image: &Image, code: i32) -> Vec<Value> {
    let report = checked(image, &["--output-format", "json"], code).json();
    report["findings"].as_array().expect("a list of findings").clone()
}

#[track_caller]
fn finds(image: &Image, layer: Option<usize>, parts: &[&str]) {
    let found = findings(image, 3);
    let fits = |finding: &Value| {
        let message = finding["message"].as_str().unwrap_or_default();
        finding["severity"] == "error"
            && finding["layer"] == Value::from(layer)
            && parts.iter().all(|part| message.contains(part))
    };
    assert!(found.iter().any(fits), "{layer:?} {parts:?} is not among {found:#?}");
}

#[test]
fn a_sound_image_is_found_sound_in_every_packing() {
    for packing in [Packing::Plain, Packing::Gzip, Packing::GzipMembers, Packing::Zstd, Packing::ZstdFrames] {
        let image = Image::oci(layers().into_iter().map(|layer| layer.packed(packing)).collect());
        let ended = checked(&image, &[], 0);
        assert!(ended.text().contains("OK"), "{}", ended.text());
        assert_eq!(findings(&image, 0), [Value::Null; 0], "{packing:?}");
        checked(&image, &["--fast"], 0);
    }
}

#[test]
fn a_wrong_diff_id_is_found() {
    let image = small().edit_config(|config| config["rootfs"]["diff_ids"][1] = sha256(b"other").into());
    finds(&image, Some(1), &["diff_id", &sha256(b"other"), &image.diff_ids()[1]]);
    checked(&image, &["--fast"], 0);
}

#[test]
fn swapped_diff_ids_are_found_on_both_layers() {
    let ids = small().diff_ids();
    let image = small().edit_config(|config| {
        config["rootfs"]["diff_ids"] = Value::from(vec![ids[1].clone(), ids[0].clone()]);
    });
    finds(&image, Some(0), &["diff_id"]);
    finds(&image, Some(1), &["diff_id"]);
}

#[test]
fn a_history_of_other_layers_is_found_without_reading_any() {
    let image = small().edit_config(|config| config["history"][0]["empty_layer"] = true.into());
    finds(&image, None, &["history"]);
    checked(&image, &["--fast"], 3);
}

#[test]
fn a_media_type_that_lies_about_the_compression_is_found() {
    let image = Image::oci(layers()).edit_manifest(|manifest| {
        manifest["layers"][1]["mediaType"] = Family::Oci.layer(Packing::Zstd, false).into();
    });
    finds(&image, Some(1), &["zstd", "gzip"]);
}

#[test]
fn a_layer_cut_short_in_its_gzip_is_found() {
    let mut image = small();
    let blob = image.layers[1].blob();
    let cut = blob[..blob.len() - 9].to_vec();
    image.blobs.insert(sha256(&cut), cut.clone());
    let image = image.edit_manifest(|manifest| {
        manifest["layers"][1]["digest"] = sha256(&cut).into();
        manifest["layers"][1]["size"] = cut.len().into();
    });
    finds(&image, Some(1), &[]);
}

#[test]
fn blobs_that_are_gone_or_changed_in_storage_are_found() {
    let registry = Registry::start();
    let image = small();
    let source = registry.push(&image, "app", "1");
    let digest = image.layer_digests().remove(0);
    let hex = &digest[7..];
    let data = registry.storage().join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
    let mut bytes = occy_tests::tools::read(&data);
    bytes[40] ^= 1;
    write(&data, &bytes);
    let ended = occyctl(["check", &source]).fails(3);
    assert!(ended.text().contains("layer 1 of 2"), "{}", ended.text());
    occyctl(["check", &source, "--fast"]).ok();
    bytes.pop();
    write(&data, &bytes);
    assert!(occyctl(["check", &source, "--fast"]).fails(3).text().contains("layer 1 of 2"));
    std::fs::remove_file(&data).expect("the blob is there");
    for fast in [&[][..], &["--fast"]] {
        let ended = occyctl([&["check", &source], fast].concat()).fails(3);
        assert!(ended.text().contains("layer 1 of 2"), "{}", ended.text());
    }
}

#[test]
fn several_findings_are_all_reported() {
    let image = Image::docker((0..4).map(|seed| Layer::noise(seed, 1000)).collect()).edit_config(|config| {
        config["rootfs"]["diff_ids"][0] = sha256(b"x").into();
        config["rootfs"]["diff_ids"][3] = sha256(b"y").into();
        config["history"] = serde_json::json!([{"created_by": "one"}]);
    });
    let found = findings(&image, 3);
    let places: Vec<&Value> = found.iter().map(|finding| &finding["layer"]).collect();
    assert_eq!(
        places,
        [&Value::Null, &0.into(), &3.into()],
        "the image's own first, then in layer order: {found:#?}"
    );
}

#[test]
fn foreign_layers_are_a_warning_only() {
    let mut list = layers();
    list[0] = list[0].clone().foreign("https://example.com/base");
    let found = findings(&Image::docker(list), 0);
    assert_eq!(found.len(), 1);
    assert_eq!((&found[0]["severity"], &found[0]["layer"]), (&"warning".into(), &0.into()));
}

#[test]
fn saved_tars_are_checked() {
    let image = small();
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, tar(&saved::docker_v12(&[(&image, &["app:1"])])));
    occyctl(["check", &tar_uri(&path)]).ok();
    let bad = small().edit_config(|config| config["rootfs"]["diff_ids"][1] = sha256(b"other").into());
    for members in [saved::docker_v12(&[(&bad, &["app:1"])]), saved::containerd(&[(&bad, &["app:1"])])] {
        write(&path, tar(&members));
        let ended = occyctl(["check", &tar_uri(&path)]).fails(3);
        assert!(ended.text().contains("layer 2 of 2"), "{}", ended.text());
    }
    write(&path, "not a tar");
    occyctl(["check", &tar_uri(&path)]).fails(3);
    occyctl(["check", "tar:///nonexistent"]).fails(1);
}

#[test]
fn what_says_nothing_against_an_image_is_a_failure_and_no_finding() {
    let image = small();
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, tar(&saved::docker_v12(&[(&image, &["app:1"]), (&image, &["other:1"])])));
    occyctl(["check", &tar_uri(&path)]).fails(1).says(&["?image="]);
    write(&path, tar(&[Member::file("readme", "hello")]));
    occyctl(["check", &tar_uri(&path)]).fails(1).says(&["not a saved image"]);
    write(&path, tar(&saved::docker_v12(&[(&image, &["app:1"])])));
    let small_limit = occyctl(["check", &tar_uri(&path), "--max-layer-size", "1K"]).fails(1);
    // Either layer may be the first to fail.
    small_limit.says(&[
        "failed to check layer",
        " of 2 (sha256:",
        "more than 1024 bytes",
        "--max-layer-size",
    ]);
}

#[test]
fn saved_tars_that_are_cut_short_are_found() {
    let directory = scratch();
    let path = directory.path().join("in.tar");
    let whole = tar(&saved::docker_v12(&[(&small(), &["app:1"])]));
    for bytes in [&whole[..], &Packing::Gzip.pack(&whole)] {
        write(&path, &bytes[..bytes.len() / 2]);
        let ended = occyctl(["check", &tar_uri(&path)]).fails(3);
        assert!(ended.text().contains("offset"), "{}", ended.text());
    }
}

#[test]
fn a_config_that_is_gone_and_a_manifest_of_other_bytes_are_found() {
    let image = small();
    let mut without = image.clone();
    without.blobs.remove(&image.config_digest());
    let server = Fixed::default().image("app", "1", &without).serve();
    let ended = occyctl(["check", &format!("registry://{}/app:1", server.host())]).fails(3);
    assert!(ended.text().contains(&image.config_digest()), "{}", ended.text());

    let at = format!("/v2/app/manifests/{}", image.digest());
    let other = Response::ok(image.family.manifest(), [&image.manifest[..], b" "].concat());
    let server = Fixed::default().image("app", "1", &image).at(&at, other).serve();
    let ended = occyctl(["check", &format!("registry://{}/app@{}", server.host(), image.digest())]).fails(3);
    assert!(ended.text().contains("digest mismatch"), "{}", ended.text());
}

#[test]
fn a_registry_that_cannot_be_reached_is_a_failure_and_no_finding() {
    let registry = Registry::start();
    occyctl(["check", &registry.uri("missing:1")]).fails(1);
    let source = registry.uri("app:1");
    drop(registry);
    occyctl(["check", &source, "--retries", "0"]).fails(1);
}

#[test]
fn info_tells_what_an_image_is_made_of_without_reading_layers() {
    let registry = Registry::start();
    let image = small();
    registry.push(&image, "app", "1");
    let proxy = occy_tests::proxy::FaultProxy::before(registry.host());
    let source = format!("registry://{}/app:1", proxy.host());
    let text = occyctl(["info", &source]).ok().text();
    let digests = [image.digest(), image.config_digest(), image.layer_digests().remove(0)];
    for part in digests.iter().map(String::as_str).chain(["linux/amd64", "ADD layer 1"]) {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let info = occyctl(["info", &source, "--output-format", "json"]).ok().json();
    assert_eq!(info["manifest"]["digest"], image.digest());
    assert_eq!(info["layers"][1]["digest"], image.layer_digests()[1]);
    assert_eq!(info["layers"][1]["diff_id"], image.diff_ids()[1]);
    assert_eq!(info["layers"][1]["size"], image.layers[1].blob().len());
    assert_eq!(info["platform"]["architecture"], json_of(&image.config)["architecture"]);
    assert_eq!(proxy.count("GET", "/v2/app/blobs/*"), 2, "the config, twice");
}

#[test]
fn what_an_image_says_of_itself_commands_no_terminal() {
    let image = small().edit_config(|config| {
        config["history"][0]["created_by"] = "a\u{1b}]0;title\u{7}".into();
        config["created"] = "\u{1b}[2J".into();
    });
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let text = occyctl(["info", &source]).ok().text();
    assert!(text.contains("title") && !text.contains(['\u{1b}', '\u{7}']), "{text:?}");
    let entry = serde_json::json!({"mediaType": Family::Oci.manifest(), "digest": sha256(b""), "size": 0,
        "platform": {"os": "\u{1b}[2J", "architecture": "x"}});
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": [entry]});
    let index = index.to_string().into_bytes();
    let server = Fixed::default().manifest("app", "1", Family::Oci.index(), &index).serve();
    let ended = occyctl(["info", &format!("registry://{}/app:1", server.host())]).fails(1);
    assert!(ended.stderr.contains("[2J") && !ended.stderr.contains('\u{1b}'), "{:?}", ended.stderr);
}
