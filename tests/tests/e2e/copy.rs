//! From registry to registry.

use std::time::Duration;

use occy_tests::fixed::Fixed;
use occy_tests::http::Response;
use occy_tests::image::{Family, Image};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::server::Server;
use occy_tests::tools::{Packing, sha256};

use crate::{layers, small};

#[test]
fn an_unfiltered_copy_keeps_every_byte_of_every_kind_of_image() {
    let (from, to) = (Registry::start(), Registry::start());
    for (family, packing) in [
        (Family::Docker, Packing::Gzip),
        (Family::Docker, Packing::Plain),
        (Family::Oci, Packing::Gzip),
        (Family::Oci, Packing::GzipMembers),
        (Family::Oci, Packing::Zstd),
        (Family::Oci, Packing::ZstdFrames),
        (Family::Oci, Packing::Plain),
    ] {
        let layers = layers().into_iter().map(|layer| layer.packed(packing)).collect();
        let image = Image::new(family, layers).edit_manifest(|manifest| {
            manifest["x-unknown"] = "kept".into();
            manifest["annotations"]["a"] = "b".into();
        });
        let tag = format!("{family:?}-{packing:?}");
        let source = from.push(&image, "app", &tag);
        occyctl(["process", &source, &to.uri(&format!("copies/app:{tag}"))]).ok();
        let copied = to.pull("copies/app", &tag);
        assert_eq!((copied.manifest, copied.config), (image.manifest, image.config), "{tag}");
        judge::skopeo_reads(&format!("docker://{}/copies/app:{tag}", to.host()));
    }
}

#[test]
fn a_finished_copy_again_moves_no_blob() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    occyctl(["process", &source, &to.uri("app:1")]).ok();
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
    let again = [format!("registry://{}/app:1", near.host()), format!("registry://{}/app:1", far.host())];
    let ended = occyctl(["process", &again[0], &again[1]]).ok();
    // The config is read, since it says what the layers are.
    assert!(near.count("GET", "/v2/app/blobs/*") <= 1, "{}", near.story());
    for method in ["POST", "PATCH"] {
        assert_eq!(far.count(method, "*"), 0, "{}\n{}", ended.stderr, far.story());
    }
    assert_eq!(far.count("PUT", "*/blobs/*"), 0);
}

#[test]
fn within_a_registry_layers_are_mounted() {
    let registry = Registry::start();
    let image = small();
    registry.push(&image, "old/app", "1");
    let proxy = FaultProxy::before(registry.host());
    let uri = |name: &str| format!("registry://{}/{name}:1", proxy.host());
    occyctl(["process", &uri("old/app"), &uri("new/app")]).ok();
    assert_eq!(registry.pull("new/app", "1").digest, image.digest());
    let mounts = proxy.seen().iter().filter(|seen| !seen.request.query("mount").is_empty()).count();
    assert!(mounts >= image.layers.len(), "{}", proxy.story());
    assert_eq!(proxy.count("GET", "/v2/old/app/blobs/*"), 1, "only the config: {}", proxy.story());
}

#[test]
fn a_mount_that_is_refused_becomes_an_upload() {
    let registry = Registry::start();
    let image = small();
    registry.push(&image, "old/app", "1");
    for (tag, status) in [("u", 401), ("f", 403), ("m", 405), ("n", 404), ("s", 500)] {
        let proxy = FaultProxy::before(registry.host());
        let new = format!("new-{tag}/app");
        proxy.fault(
            usize::MAX,
            "POST",
            "*/blobs/uploads/",
            std::sync::Arc::new(move |request, upstream| {
                if request.query("mount").is_empty() { upstream(request) } else { Response::status(status) }
            }),
        );
        let uri = |name: &str| format!("registry://{}/{name}:1", proxy.host());
        occyctl(["process", &uri("old/app"), &uri(&new), "--retries", "0"]).ok();
        assert_eq!(registry.pull(&new, "1").digest, image.digest(), "{status}");
    }
}

#[test]
fn a_repeated_layer_is_moved_once_and_keeps_its_places() {
    let (from, to) = (Registry::start(), Registry::start());
    let mut list = layers();
    list.push(list[0].clone());
    list.push(list[1].clone());
    let image = Image::oci(list);
    let source = from.push(&image, "app", "1");
    let proxy = FaultProxy::before(to.host());
    for (tag, filter) in [("plain", None), ("filtered", Some("normalize-timestamps"))] {
        let target = format!("registry://{}/{tag}:1", proxy.host());
        let mut command = vec!["process", &source, &target];
        command.extend(filter.iter().flat_map(|filter| ["-f", filter]));
        occyctl(command).ok();
        let copied = to.pull(tag, "1");
        assert_eq!(copied.tars.len(), 4);
        assert_eq!(copied.tars[0], copied.tars[2]);
        assert_eq!(copied.tars[1], copied.tars[3]);
        let puts = proxy.count("PUT", &format!("/v2/{tag}/blobs/uploads/*"));
        assert_eq!(puts, 3, "two layers and the config: {}", proxy.story());
    }
}

#[test]
fn filtered_layers_stay_in_order_however_late_the_first_comes() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = Image::oci((0..6).map(|seed| Layer::noise(seed, 200_000)).collect());
    from.push(&image, "app", "1");
    let mut digests = Vec::new();
    for parallel in ["1", "8"] {
        let proxy = FaultProxy::before(from.host());
        // The first layer is asked for first and comes last.
        let slow = proxy::slow(10, Duration::from_millis(20));
        let first = image.layer_digests()[0].clone();
        proxy.fault(1, "GET", "/v2/app/blobs/*", proxy::change(|answer| answer));
        proxy.fault(
            1,
            "GET",
            "/v2/app/blobs/*",
            std::sync::Arc::new(move |request, upstream| {
                if request.path.ends_with(&first) { slow(request, upstream) } else { upstream(request) }
            }),
        );
        let source = format!("registry://{}/app:1", proxy.host());
        let tag = format!("app:{parallel}");
        occyctl(["process", &source, &to.uri(&tag), "-f", "normalize-timestamps", "-j", parallel]).ok();
        let copied = to.pull("app", parallel);
        let names: Vec<_> = copied.tars.iter().map(|tar| judge::names(tar)[1].clone()).collect();
        assert_eq!(names, (0..6).map(|seed| format!("data/noise-{seed}")).collect::<Vec<_>>());
        digests.push(copied.digest);
    }
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn foreign_layers_keep_their_urls_and_are_not_moved() {
    let (from, to) = (Registry::start(), Registry::start());
    for family in [Family::Docker, Family::Oci] {
        let mut list = layers();
        list[0] = list[0].clone().foreign("https://example.com/base.tar.gz");
        let image = Image::new(family, list);
        let source = from.push(&image, "app", "1");
        occyctl(["process", &source, &to.uri("app:1")]).ok();
        assert_eq!(to.manifest("app", "1").body, image.manifest);
        assert!(!to.has_blob("app", &image.layer_digests()[0]));
        let filtered = to.uri("app:2");
        occyctl(["process", &source, &filtered, "-f", "normalize-timestamps"])
            .fails(1)
            .says(&["layer 1 of 2"]);
        assert!(!to.has("app", "2"));
    }
}

#[test]
fn foreign_layers_are_moved_when_that_is_asked_for() {
    let (from, to) = (Registry::start(), Registry::start());
    let mut list = layers();
    // Not a public address.
    list[0] = list[0].clone().foreign("https://10.0.0.1/base.tar.gz");
    let image = Image::oci(list);
    let (source, base) = (from.push(&image, "app", "1"), &image.layer_digests()[0]);
    let run = |destination: &str| occyctl(["process", &source, destination, "--foreign-layers"]);
    run(&to.uri("app:1")).fails(1).says(&["layer 1 of 2", base]);
    assert!(!to.has("app", "1"));
    from.push_blob("app", &image.layers[0].packing.pack(&image.layers[0].tar));
    run(&to.uri("app:1")).ok();
    assert_eq!(to.manifest("app", "1").body, image.manifest);
    assert!(to.has_blob("app", base));
    let directory = crate::scratch();
    let layout = directory.path().join("layout");
    run(&format!("oci-layout://{}", layout.display())).ok();
    assert!(layout.join("blobs/sha256").join(occy_tests::tools::hex(base)).exists());
}

#[test]
fn foreign_layers_are_fetched_from_their_addresses_where_their_bytes_are_needed() {
    let layer = layers()[0].clone();
    let blob = layer.packing.pack(&layer.tar);
    let owner = Server::start(move |_| Response::ok("application/octet-stream", blob.clone()));
    // A name that is not the registry's.
    let url = format!("http://localhost:{}/base.tar.gz", owner.port());
    let registry = Registry::start();
    let image = Image::docker(vec![layer.foreign(&url), layers()[1].clone()]);
    let source = registry.push(&image, "app", "1");
    let directory = crate::scratch();
    let at = |name: &str| directory.path().join(name).display().to_string();
    for destination in [format!("tar://{}", at("out.tar")), format!("oci://{}", at("out"))] {
        // Here, where nobody has allowed it; the kit's coordinator may reach this machine.
        occyctl(["process", &source, &destination]).here().fails(1).says(&["localhost", "--allow-network"]);
    }
    assert!(owner.seen().is_empty());
    let allowed = ["--allow-network", "localhost"];
    let search = ["search", &source, "*.conf"];
    assert!(occyctl([&search[..], &allowed].concat()).ok().text().contains("etc/app.conf"));
    for destination in [
        format!("tar://{}", at("out.tar")),
        format!("dir://{}", at("dir")),
        format!("oci://{}", at("bundle")),
        registry.uri("copy:1"),
    ] {
        let found =
            [&["process", &source, &destination, "-f", "search:pattern=*.conf"][..], &allowed].concat();
        assert!(occyctl(found).ok().text().contains("etc/app.conf"), "{destination}");
    }
    assert_eq!(occy_tests::saved::read_saved(std::path::Path::new(&at("out.tar"))).config, image.config);
    assert_eq!(registry.manifest("copy", "1").body, image.manifest, "there it stays where it is");
    let edited = ["process", &source, &registry.uri("copy:2"), "-f", "normalize-timestamps"];
    occyctl([&edited[..], &allowed].concat()).fails(1).says(&["not distributable"]);
}

#[test]
fn an_artifact_is_copied_whole_and_not_filtered() {
    let (from, to) = (Registry::start(), Registry::start());
    let mut artifact = Image::oci(vec![Layer::from_tar(b"not a tar at all".to_vec()).packed(Packing::Plain)]);
    artifact = artifact.edit_config(|config| *config = serde_json::json!({"name": "chart"})).edit_manifest(
        |manifest| {
            manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
            manifest["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart.content.v1.tar+gzip".into();
        },
    );
    let source = from.push(&artifact, "chart", "1");
    occyctl(["process", &source, &to.uri("chart:1")]).ok();
    assert_eq!(to.manifest("chart", "1").body, artifact.manifest);
    let filtered = to.uri("chart:2");
    occyctl(["process", &source, &filtered, "-f", "normalize-timestamps"]).fails(1).says(&["artifact"]);
    let directory = crate::scratch();
    let tar = crate::tar_uri(&directory.path().join("chart.tar"));
    occyctl(["process", &source, &tar]).fails(1).says(&["artifact"]);
}

#[test]
fn a_filtered_copy_keeps_family_unknown_keys_and_untouched_layers() {
    let (from, to) = (Registry::start(), Registry::start());
    for family in [Family::Docker, Family::Oci] {
        let mut list = layers();
        list[1] = list[1].clone().annotated("kept", "yes");
        let image = Image::new(family, list).edit_manifest(|manifest| manifest["x-unknown"] = "kept".into());
        let source = from.push(&image, "app", "1");
        occyctl(["process", &source, &to.uri("app:1"), "-f", "exclude:pattern=etc/app.conf"]).ok();
        let copied = to.pull("app", "1");
        assert_eq!(copied.document["mediaType"], family.manifest());
        assert_eq!(copied.document["x-unknown"], "kept");
        assert_ne!(copied.document["layers"][0]["digest"], image.layer_digests()[0]);
        assert_eq!(copied.document["layers"][0]["mediaType"], family.layer(Packing::Gzip, false));
        let original: serde_json::Value = serde_json::from_slice(&image.manifest).expect("json");
        assert_eq!(copied.document["layers"][1], original["layers"][1], "untouched");
        let config = String::from_utf8(copied.config).expect("json");
        assert!(config.contains(r#""x-unknown":{"b":1,"a":[1.5]}"#), "{config}");
        assert!(config.starts_with(r#"{"os":"linux","architecture":"amd64","#), "{config}");
    }
}

#[test]
fn zstd_makes_a_docker_image_oci() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = small();
    let source = from.push(&image, "app", "1");
    for target in [
        vec![to.uri("app:1"), "--compression".into(), "zstd:5".into()],
        vec![to.uri("app:1?compression=zstd:5")],
    ] {
        occyctl(["process", &source].into_iter().chain(target.iter().map(String::as_str))).ok();
        let copied = to.pull("app", "1");
        assert_eq!(copied.document["mediaType"], Family::Oci.manifest());
        assert_eq!(copied.document["config"]["mediaType"], Family::Oci.config());
        assert_eq!(copied.document["layers"][0]["mediaType"], Family::Oci.layer(Packing::Zstd, false));
        assert_eq!(copied.blobs[0][..4], [0x28, 0xb5, 0x2f, 0xfd]);
        assert_eq!(copied.config, image.config, "the same tars, so the same config");
        judge::skopeo_reads(&format!("docker://{}/app:1", to.host()));
    }
    let docker = to.uri("app:2");
    let command = ["process", &source, &docker, "--compression", "zstd", "--format", "docker"];
    occyctl(command).fails(2).says(&["zstd"]);
    assert!(!to.has("app", "2"));
}

#[test]
fn a_format_can_be_asked_for() {
    let (from, to) = (Registry::start(), Registry::start());
    for (family, format, expected) in [
        (Family::Docker, "oci", Family::Oci),
        (Family::Oci, "docker", Family::Docker),
        (Family::Oci, "keep", Family::Oci),
    ] {
        let image = Image::new(family, layers());
        let source = from.push(&image, "app", format);
        occyctl(["process", &source, &to.uri(&format!("app:{format}")), "--format", format]).ok();
        let copied = to.pull("app", format);
        assert_eq!(copied.document["mediaType"], expected.manifest());
        assert_eq!(copied.document["config"]["mediaType"], expected.config());
        assert_eq!(copied.document["layers"][1]["mediaType"], expected.layer(Packing::Gzip, false));
        assert_eq!(copied.config, image.config);
        judge::skopeo_reads(&format!("docker://{}/app:{format}", to.host()));
    }
}

#[test]
fn a_layer_that_has_the_wanted_format_is_not_compressed_again() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = small();
    let source = from.push(&image, "app", "1");
    occyctl(["process", &source, &to.uri("app:1"), "--compression", "gzip:9"]).ok();
    assert_eq!(to.digest("app", "1"), image.digest());
}

#[test]
fn a_digest_names_an_image_and_wins_over_a_tag() {
    let (from, to) = (Registry::start(), Registry::start());
    let (old, new) = (small(), Image::docker(vec![Layer::noise(1, 100)]));
    from.push(&old, "app", "1");
    from.push(&new, "app", "1");
    for reference in [format!("app@{}", old.digest()), format!("app:1@{}", old.digest())] {
        occyctl(["process", &from.uri(&reference), &to.uri("app:old")]).ok();
        assert_eq!(to.digest("app", "old"), old.digest());
    }
    let missing = from.uri(&format!("app@{}", sha256(b"nothing")));
    occyctl(["process", &missing, &to.uri("app:none")]).fails(1);
}

#[test]
fn layers_of_an_empty_tar_and_of_no_bytes_but_the_end_stay() {
    let (from, to) = (Registry::start(), Registry::start());
    let image = Image::oci(vec![Layer::of(&[]), Layer::of(&[Member::file("a", "a")]), Layer::of(&[])]);
    let source = from.push(&image, "app", "1");
    occyctl(["process", &source, &to.uri("app:1"), "-f", "normalize-timestamps"]).ok();
    let copied = to.pull("app", "1");
    assert_eq!(copied.tars.len(), 3);
    assert_eq!(copied.document["layers"][0]["digest"], image.layer_digests()[0], "nothing to edit in it");
}

#[test]
fn the_python_tool_finds_nothing_wrong_with_what_we_push() {
    let Some(occystrap) = judge::python_occystrap("the_python_tool_finds_nothing_wrong_with_what_we_push")
    else {
        return;
    };
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&small(), "app", "1");
    occyctl(["process", &source, &to.uri("app:1"), "-f", "normalize-timestamps"]).ok();
    judge::python_checks(&occystrap, &to.uri("app:1"));
}

#[test]
fn a_format_that_cannot_name_a_layer_is_refused_before_anything_is_sent() {
    let (from, to) = (Registry::start(), Registry::start());
    let layers = layers().into_iter().map(|layer| layer.packed(Packing::Zstd)).collect();
    let source = from.push(&Image::oci(layers), "app", "1");
    let proxy = FaultProxy::before(to.host());
    let target = format!("registry://{}/app:1?format=docker", proxy.host());
    occyctl(["process", &source, &target]).fails(2).says(&["zstd"]);
    assert_eq!(proxy.count("POST", "*"), 0, "{}", proxy.story());
    occyctl(["process", &source, &target, "--compression", "gzip"]).ok();
}

#[test]
fn the_same_blob_as_a_foreign_and_a_normal_layer_is_moved() {
    let (from, to) = (Registry::start(), Registry::start());
    let layer = Layer::noise(1, 10_000);
    let image = Image::oci(vec![layer.clone().foreign("https://example.com/base"), layer]);
    let source = from.push(&image, "app", "1");
    occyctl(["process", &source, &to.uri("app:1")]).ok();
    assert!(to.has_blob("app", &image.layer_digests()[0]));
    assert_eq!(to.digest("app", "1"), image.digest());
}

#[test]
fn a_content_type_that_says_nothing_is_not_passed_on() {
    let (image, to) = (small(), Registry::start());
    let server = Fixed::default().image("app", "0", &image);
    let server = server.manifest("app", "1", "application/json", &image.manifest).serve();
    occyctl(["process", &format!("registry://{}/app:1", server.host()), &to.uri("app:1")]).ok();
    assert_eq!(to.pull("app", "1").digest, image.digest());
}
