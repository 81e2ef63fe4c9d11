//! OCI image layouts, read and written: directories and tars, beside skopeo, umoci and podman.

use std::path::Path;
use std::thread::sleep;

use occy_tests::certificates::text;
use occy_tests::image::{Family, Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::{kills, moment, occyctl, whole};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::{Packing, hex, read, sha256, tool, write};
use serde_json::{Value, json};

use crate::{layers, scratch, small, tar_uri};

fn layout_uri(path: &Path) -> String {
    format!("oci-layout://{}", text(path))
}

fn index(layout: &Path) -> Value {
    json_of(&read(layout.join("index.json")))
}

fn blob(layout: &Path, digest: &str) -> std::path::PathBuf {
    layout.join("blobs/sha256").join(hex(digest))
}

/// Every blob of a layout hashes to its name, and nothing else lies there.
fn assert_sound(layout: &Path) {
    for entry in std::fs::read_dir(layout.join("blobs/sha256")).expect("blobs") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        assert_eq!(hex(&sha256(&read(&path))), name);
    }
}

#[test]
fn an_unfiltered_copy_keeps_every_byte_and_both_forms_are_read_back() {
    let registry = Registry::start();
    for (family, packing) in
        [(Family::Docker, Packing::Gzip), (Family::Oci, Packing::Gzip), (Family::Oci, Packing::Zstd)]
    {
        let image = Image::new(family, layers().into_iter().map(|layer| layer.packed(packing)).collect());
        let source = registry.push(&image, "app", "1");
        let directory = scratch();
        for name in ["layout", "layout.tar"] {
            let uri = layout_uri(&directory.path().join(name));
            occyctl(["process", &source, &uri]).ok();
            let back = registry.uri("back:1");
            occyctl(["process", &uri, &back]).ok();
            let pulled = registry.pull("back", "1");
            assert_eq!(pulled.digest, image.digest(), "{family:?} {packing:?} {name}");
            assert_eq!(pulled.config, image.config);
            occyctl(["check", &uri]).ok();
            let info = occyctl(["info", &uri, "--output-format", "json"]).ok().json();
            assert_eq!(info["manifest"]["digest"], image.digest());
        }
        assert_sound(&directory.path().join("layout"));
    }
}

#[test]
fn skopeo_and_umoci_read_what_we_write() {
    let registry = Registry::start();
    let source = registry.push(&Image::oci(layers()), "app", "1");
    let directory = scratch();
    let layout = directory.path().join("layout");
    occyctl(["process", &source, &layout_uri(&layout)]).ok();
    judge::skopeo_reads(&format!("oci:{}:1", text(&layout)));
    tool("umoci", ["stat", "--image", &format!("{}:1", text(&layout))]);
    let bundle = directory.path().join("bundle");
    tool("umoci", ["unpack", "--rootless", "--image", &format!("{}:1", text(&layout)), &text(&bundle)]);
    assert_eq!(read(bundle.join("rootfs/etc/late")), b"three");
    assert!(!bundle.join("rootfs/etc/draft.conf").exists());
    let archive = directory.path().join("layout.tar");
    occyctl(["process", &source, &layout_uri(&archive)]).ok();
    judge::skopeo_reads(&format!("oci-archive:{}:1", text(&archive)));
    let converted = directory.path().join("converted");
    let docker = registry.push(&small(), "docker", "1");
    occyctl(["process", &docker, &layout_uri(&converted), "--format", "oci"]).ok();
    judge::skopeo_reads(&format!("oci:{}:1", text(&converted)));
    assert_eq!(index(&converted)["manifests"][0]["mediaType"], Family::Oci.manifest());
}

#[test]
fn we_read_what_skopeo_umoci_and_podman_write() {
    let registry = Registry::start();
    let image = Image::oci(layers());
    registry.push(&image, "app", "1");
    let directory = scratch();
    let layout = directory.path().join("layout");
    let source = format!("docker://{}/app:1", registry.host());
    for transport in [format!("oci:{}:one", text(&layout)), format!("oci-archive:{}.tar:one", text(&layout))]
    {
        tool("skopeo", ["copy", "--quiet", "--src-tls-verify=false", &source, &transport]);
    }
    for path in [layout.clone(), directory.path().join("layout.tar")] {
        let uri = format!("{}?tag=one", layout_uri(&path));
        occyctl(["check", &uri]).ok();
        let info = occyctl(["info", &uri, "--output-format", "json"]).ok().json();
        assert_eq!(info["manifest"]["digest"], image.digest());
    }
    let name = format!("{}:two", text(&layout));
    let bundle = directory.path().join("bundle");
    tool("umoci", ["unpack", "--rootless", "--image", &format!("{}:one", text(&layout)), &text(&bundle)]);
    write(bundle.join("rootfs/new"), "added");
    tool("umoci", ["repack", "--image", &name, &text(&bundle)]);
    let found = occyctl(["search", &format!("{}?tag=two", layout_uri(&layout)), "new"]).ok();
    assert!(found.text().contains("  new (file, 5 bytes)"), "{}", found.text());
    occyctl(["check", &format!("{}?tag=two", layout_uri(&layout))]).ok();
    // Podman's store from the saved tar, and out again as an OCI archive.
    let storage = directory.path().join("podman");
    let saved = directory.path().join("saved.tar");
    occyctl(["process", &registry.uri("app:1"), &tar_uri(&saved)]).ok();
    let run = directory.path().join("run");
    let podman = |arguments: &[&str]| {
        let fixed = ["--root", &text(&storage), "--runroot", &text(&run), "--storage-driver", "vfs"];
        tool("podman", [&fixed[..], arguments].concat())
    };
    podman(&["load", "--quiet", "--input", &text(&saved)]);
    let archive = directory.path().join("podman.tar");
    let name = registry.host().to_owned() + "/app:1";
    podman(&["save", "--quiet", "--format", "oci-archive", "--output", &text(&archive), &name]);
    occyctl(["check", &layout_uri(&archive)]).ok();
    let compressed = directory.path().join("podman.tar.gz");
    write(&compressed, Packing::Gzip.pack(&read(&archive)));
    occyctl(["check", &layout_uri(&compressed)]).ok();
    occyctl(["check", "oci-layout://-"]).input(&read(&archive)).ok();
}

#[test]
fn images_share_a_layout_and_a_tag_moves() {
    let registry = Registry::start();
    let first = registry.push(&Image::oci(layers()), "app", "1");
    let other = Image::oci(vec![layers().remove(0), Layer::noise(7, 1000)]);
    let second = registry.push(&other, "app", "2");
    let directory = scratch();
    let layout = directory.path().join("layout");
    occyctl(["process", &first, &layout_uri(&layout)]).ok();
    let proxy = FaultProxy::before(registry.host());
    let through = format!("registry://{}/app:2", proxy.host());
    occyctl(["process", &through, &layout_uri(&layout)]).ok();
    let shared = &other.layer_digests()[0];
    assert_eq!(proxy.count("GET", &format!("/v2/app/blobs/{shared}")), 0, "it is there already");
    assert_eq!(index(&layout)["manifests"].as_array().map(Vec::len), Some(2));
    occyctl(["info", &layout_uri(&layout)]).fails(1).says(&["app:1", "app:2", "?tag="]);
    occyctl(["check", &format!("{}?tag=2", layout_uri(&layout))]).ok();
    occyctl(["process", &second, &format!("{}?tag=1", layout_uri(&layout))]).ok();
    let entries = index(&layout)["manifests"].clone();
    assert_eq!(entries.as_array().map(Vec::len), Some(2), "the tag moved: {entries}");
    assert!((0..2).all(|at| entries[at]["digest"] == other.digest()));
    assert_sound(&layout);
}

#[test]
fn a_file_that_is_no_tar_by_name_is_not_replaced() {
    let directory = crate::scratch();
    let (file, image) = (directory.path().join("notes"), directory.path().join("image.tar"));
    write(&file, b"mine");
    write(&image, tar(&occy_tests::saved::docker_v25(&[(&small(), &["app:1"])])));
    let destination = format!("oci-layout://{}", text(&file));
    occyctl(["process", &tar_uri(&image), &destination]).fails(1).says(&[&text(&file)]);
    assert_eq!(read(&file), b"mine");
    occyctl(["process", &tar_uri(&image), &format!("{destination}?tar=true")]).ok();
}

#[test]
fn several_processes_add_to_one_layout_and_lose_nothing() {
    let registry = Registry::start();
    let directory = scratch();
    let layout = layout_uri(&directory.path().join("layout"));
    let children: Vec<_> = (0..8u64)
        .map(|number| {
            let image = Image::oci(vec![Layer::noise(1, 10_000), Layer::noise(number, 10_000)]);
            let source = registry.push(&image, "app", &format!("t{number}"));
            occyctl(["process", &source, &layout]).start()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().expect("a child can be waited for").success());
    }
    for number in 0..8 {
        occyctl(["check", &format!("{layout}?tag=t{number}")]).ok();
    }
}

#[test]
fn a_tar_is_the_same_every_time_and_for_any_number_of_layers_at_once() {
    let registry = Registry::start();
    let image = Image::oci((0..5).map(|seed| Layer::noise(seed, 40_000)).collect());
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let mut written = Vec::new();
    for parallel in ["1", "4"] {
        let path = directory.path().join(format!("{parallel}.tar"));
        occyctl(["process", &source, &layout_uri(&path), "-j", parallel]).ok();
        written.push(read(&path));
    }
    written.push(occyctl(["process", &source, "oci-layout://-?tar=true"]).ok().stdout);
    assert!(written.iter().all(|tar| *tar == written[0]));
    assert_eq!(&judge::names(&written[0])[..2], ["oci-layout", "index.json"]);
}

#[test]
fn filters_work_on_the_way_in_and_out() {
    let registry = Registry::start();
    let source = registry.push(&Image::oci(layers()), "app", "1");
    let directory = scratch();
    let uri = layout_uri(&directory.path().join("layout"));
    occyctl(["process", &source, &uri, "-f", "normalize-timestamps", "-f", "exclude:pattern=**/draft.conf"])
        .ok();
    occyctl(["check", &uri]).ok();
    let found = occyctl(["search", &uri, "draft.conf", "--script-friendly"]).ok().text();
    assert_eq!(found, "");
    let again = registry.uri("again:1");
    occyctl(["process", &uri, &again, "-f", "normalize-timestamps"]).ok();
    let direct = registry.uri("direct:1");
    occyctl([
        "process",
        &source,
        &direct,
        "-f",
        "normalize-timestamps",
        "-f",
        "exclude:pattern=**/draft.conf",
    ])
    .ok();
    assert_eq!(registry.digest("again", "1"), registry.digest("direct", "1"));
}

#[test]
fn a_whole_index_is_copied_bit_for_bit_in_every_direction() {
    use occy_tests::image::Index;
    let image = |architecture: &str, seed| {
        let layers = vec![Layer::noise(0, 5_000), Layer::noise(seed, 5_000)];
        (
            json!({"os": "linux", "architecture": architecture}),
            Image::on(Family::Oci, ("linux", architecture, None), layers),
        )
    };
    let attestation = (
        json!({"os": "unknown", "architecture": "unknown"}),
        Image::oci(vec![Layer::of(&[Member::file("provenance", "{}")])]),
    );
    let index = Index::new(Family::Oci, vec![image("amd64", 1), image("arm64", 2), attestation]);
    let (one, two) = (Registry::start(), Registry::start());
    let source = one.push_index(&index, "multi", "1");
    let directory = scratch();
    let (layout, archive) = (directory.path().join("layout"), directory.path().join("layout.tar"));
    let ways = [
        (source.clone(), two.uri("direct:1")),
        (source.clone(), layout_uri(&layout)),
        (layout_uri(&layout), layout_uri(&archive)),
        (layout_uri(&archive), two.uri("back:1")),
    ];
    for (from, to) in &ways {
        let said = occyctl(["process", from, to, "--all", "--output-format", "json"]).ok().json();
        assert_eq!(said["manifest_digest"], sha256(&index.manifest), "{from} to {to}");
        assert_eq!(said["images"].as_array().map(Vec::len), Some(3));
    }
    for name in ["direct", "back"] {
        assert_eq!(two.manifest(name, "1").body, index.manifest);
        for image in &index.images {
            assert_eq!(two.pull(name, &image.digest()).config, image.config);
        }
    }
    assert_sound(&layout);
    for architecture in ["amd64", "arm64"] {
        occyctl(["check", &layout_uri(&layout), "--architecture", architecture]).ok();
        occyctl(["check", &layout_uri(&archive), "--architecture", architecture]).ok();
    }
    let inspected = tool("skopeo", ["inspect", "--raw", &format!("oci:{}:1", text(&layout))]);
    assert_eq!(inspected.as_bytes(), index.manifest);
    // A second time nothing moves.
    let proxy = FaultProxy::before(two.host());
    let through = format!("registry://{}/direct:1", proxy.host());
    occyctl(["process", &source, &through, "--all"]).ok();
    assert_eq!(proxy.count("POST", "*"), 0, "no upload was begun");
}

#[test]
fn an_index_is_not_written_where_one_image_belongs() {
    use occy_tests::image::Index;
    let registry = Registry::start();
    let entry = (json!({"os": "linux", "architecture": "amd64"}), Image::oci(layers()));
    let source = registry.push_index(&Index::new(Family::Oci, vec![entry]), "multi", "1");
    let directory = scratch();
    let (tar, layout) = (directory.path().join("out.tar"), directory.path().join("layout"));
    occyctl(["process", &source, &tar_uri(&tar), "--all"]).fails(1).says(&["index of several images"]);
    assert!(!tar.exists());
    occyctl(["process", &source, &layout_uri(&layout), "--all", "--format", "oci"]).fails(2);
}

#[test]
fn an_index_whose_entry_is_missing_names_it_and_moves_no_tag() {
    use occy_tests::fixed::Fixed;
    let missing = format!("sha256:{}", "7".repeat(64));
    let index = json!({
        "schemaVersion": 2, "mediaType": Family::Oci.index(),
        "manifests": [{"mediaType": Family::Oci.manifest(), "digest": missing, "size": 10,
                       "platform": {"os": "linux", "architecture": "amd64"}}],
    });
    let server =
        Fixed::default().manifest("multi", "1", Family::Oci.index(), index.to_string().as_bytes()).serve();
    let directory = scratch();
    let layout = directory.path().join("layout");
    let source = format!("registry://{}/multi:1", server.host());
    occyctl(["process", &source, &layout_uri(&layout), "--all"]).fails(1).says(&[&missing]);
    assert!(!layout.join("index.json").exists());
}

#[test]
fn layouts_that_lie_are_refused_and_say_where() {
    let registry = Registry::start();
    let image = Image::oci(layers());
    let source = registry.push(&image, "app", "1");
    let layer = &image.layer_digests()[1];
    let spoil = |spoil: &dyn Fn(&Path), words: &[&str]| {
        let directory = scratch();
        let layout = directory.path().join("layout");
        occyctl(["process", &source, &layout_uri(&layout)]).ok();
        spoil(&layout);
        let to = registry.uri("spoilt:1");
        occyctl(["process", &layout_uri(&layout), &to]).fails(1).says(words);
        assert!(!registry.has("spoilt", "1"));
    };
    spoil(&|layout| std::fs::remove_file(layout.join("oci-layout")).expect("it was there"), &["oci-layout"]);
    spoil(&|layout| write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#), &["version 1"]);
    spoil(&|layout| write(layout.join("index.json"), "{"), &["index.json"]);
    spoil(
        &|layout| write(layout.join("index.json"), r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#),
        &["ambiguous"],
    );
    spoil(
        &|layout| std::fs::remove_file(blob(layout, layer)).expect("it was there"),
        &["missing", hex(layer)],
    );
    spoil(
        &|layout| {
            let mut bytes = read(blob(layout, layer));
            let last = bytes.len() - 9;
            bytes[last] ^= 1;
            write(blob(layout, layer), bytes);
        },
        &["digest", layer],
    );
    spoil(&|layout| write(blob(layout, layer), "short"), &["size mismatch"]);
    spoil(&|layout| write(blob(layout, &image.digest()), "{}"), &["size mismatch"]);
    spoil(
        &|layout| {
            let text = String::from_utf8(read(layout.join("index.json"))).expect("JSON");
            write(layout.join("index.json"), text.replace("sha256:", "../../etc/passwd:"));
        },
        &["digest"],
    );
    let directory = scratch();
    let cut = directory.path().join("cut.tar");
    occyctl(["process", &source, &layout_uri(&cut)]).ok();
    let bytes = read(&cut);
    write(&cut, &bytes[..bytes.len() / 2]);
    occyctl(["check", &layout_uri(&cut)]).run();
    occyctl(["process", &layout_uri(&cut), &registry.uri("spoilt:1")]).fails(1);
    assert!(!registry.has("spoilt", "1"));
    write(&cut, tar(&[Member::file("something", "else")]));
    occyctl(["info", &layout_uri(&cut)]).fails(1).says(&["not an OCI image layout"]);
}

#[test]
fn a_directory_that_is_something_else_stays_so() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    for (name, content) in [("precious", "mine"), ("index.json", "{}"), ("oci-layout", "{}")] {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.join("blobs")).expect("a directory");
        write(path.join(name), content);
        occyctl(["process", &source, &layout_uri(&path)]).fails(1).says(&["not an OCI image layout"]);
        assert_eq!(std::fs::read_dir(&path).expect("a directory").count(), 2, "{name}");
        assert_eq!(read(path.join(name)), content.as_bytes());
    }
}

#[test]
fn images_of_two_names_may_have_one_tag() {
    let registry = Registry::start();
    let directory = scratch();
    let layout = layout_uri(&directory.path().join("layout"));
    for name in ["one", "two", "two"] {
        let source = registry.push(&Image::oci(layers()), name, "latest");
        occyctl(["process", &source, &layout]).ok();
    }
    assert_eq!(index(&directory.path().join("layout"))["manifests"].as_array().map(Vec::len), Some(2));
    for name in ["one", "two"] {
        occyctl(["check", &format!("{layout}?tag={}/{name}:latest", registry.host())]).ok();
    }
    // A tag that is given is the image's only name.
    for name in ["one", "two"] {
        occyctl(["process", &registry.uri(&format!("{name}:latest")), &format!("{layout}?tag=mine")]).ok();
    }
    assert_eq!(index(&directory.path().join("layout"))["manifests"].as_array().map(Vec::len), Some(3));
    occyctl(["check", &format!("{layout}?tag=mine")]).ok();
}

#[test]
fn a_damaged_blob_is_fetched_again_when_asked_to_verify() {
    let registry = Registry::start();
    let image = Image::oci(layers());
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let layout = directory.path().join("layout");
    occyctl(["process", &source, &layout_uri(&layout)]).ok();
    let damaged = blob(&layout, &image.layer_digests()[0]);
    let mut bytes = read(&damaged);
    bytes[20] ^= 1;
    write(&damaged, bytes);
    occyctl(["process", &source, &layout_uri(&layout), "--verify"]).ok();
    assert_sound(&layout);
}

#[test]
fn a_killed_run_leaves_the_layout_as_it_was_or_complete() {
    let registry = Registry::start();
    let before = registry.push(&Image::oci(layers()), "app", "1");
    let after = Image::oci((0..4).map(|seed| Layer::noise(seed, 400_000)).collect());
    registry.push(&after, "app", "2");
    let proxy = FaultProxy::before(registry.host());
    proxy.fault(usize::MAX, "GET", "/v2/app/blobs/*", proxy::slow(10, std::time::Duration::from_millis(10)));
    let source = format!("registry://{}/app:2", proxy.host());
    for form in ["layout", "layout.tar"] {
        let directory = scratch();
        let path = directory.path().join(form);
        let uri = format!("{}?tag=1", layout_uri(&path));
        let time = whole(|| occyctl(["process", &source, &uri]).ok());
        for kill in 0..kills() / 2 {
            let _ = std::fs::remove_dir_all(&path);
            let _ = std::fs::remove_file(&path);
            occyctl(["process", &before, &uri]).ok();
            let old = occyctl(["info", &uri, "--output-format", "json"]).ok().json();
            let mut child = occyctl(["process", &source, &uri]).start();
            sleep(moment(time, kill));
            let _ = child.kill();
            child.wait().expect("a child can be waited for");
            let now = occyctl(["info", &uri, "--output-format", "json"]).ok().json();
            assert!(
                now["manifest"] == old["manifest"] || now["manifest"]["digest"] == after.digest(),
                "{form}, kill {kill}: {now}"
            );
            occyctl(["check", &uri]).ok();
            occyctl(["process", &source, &uri]).ok();
            occyctl(["check", &uri]).ok();
            let left: Vec<_> = std::fs::read_dir(directory.path())
                .expect("a directory")
                .map(|entry| entry.expect("an entry").file_name())
                .collect();
            assert_eq!(left, [form], "kill {kill}");
            if form == "layout" {
                assert_sound(&path);
            }
        }
    }
}

#[test]
fn check_looks_at_the_whole_layout() {
    let registry = Registry::start();
    let (one, two) = (Image::oci(layers()), Image::oci(vec![Layer::noise(3, 1000)]));
    let sources = [registry.push(&one, "app", "1"), registry.push(&two, "app", "2")];
    let directory = scratch();
    let layout = directory.path().join("layout");
    for source in &sources {
        occyctl(["process", source, &layout_uri(&layout)]).ok();
    }
    let uri = format!("{}?tag=1", layout_uri(&layout));
    let check = || occyctl(["check", &uri]);
    assert!(check().ok().text().starts_with("OK: "));
    let stranger = sha256(b"nobody's");
    write(blob(&layout, &stranger), "nobody's");
    assert!(check().ok().text().contains(&format!("warning: nothing names blobs/sha256/{}", hex(&stranger))));
    // The other image's layer.
    let other = blob(&layout, &two.layer_digests()[0]);
    let bytes = read(&other);
    write(&other, [&bytes[..bytes.len() - 1], b"!"].concat());
    assert!(check().fails(3).text().contains(&format!("error: {}: digest mismatch", two.layer_digests()[0])));
    occyctl(["check", &uri, "--fast"]).ok();
    std::fs::remove_file(&other).expect("it was there");
    let report = occyctl(["check", &uri, "--fast", "--output-format", "json"]).fails(3).json();
    let message = format!("{} is named and is missing", two.layer_digests()[0]);
    assert!(
        report["findings"].as_array().is_some_and(|all| all.iter().any(|one| one["message"] == message)),
        "{report}"
    );
}

#[test]
fn info_lists_what_an_index_holds() {
    use occy_tests::image::Index;
    let registry = Registry::start();
    let entry = |architecture| {
        let platform = json!({"os": "linux", "architecture": architecture});
        (platform, Image::on(Family::Oci, ("linux", architecture, None), layers()))
    };
    let index = Index::new(Family::Oci, vec![entry("amd64"), entry("s390x")]);
    let source = registry.push_index(&index, "multi", "1");
    let info = occyctl(["info", &source, "--output-format", "json"]).ok().json();
    assert_eq!(info["index"]["digest"], sha256(&index.manifest));
    assert_eq!(info["index"]["manifests"][1]["platform"], "linux/s390x");
    assert_eq!(info["index"]["manifests"][1]["digest"], index.images[1].digest());
    let text = occyctl(["info", &source]).ok().text();
    assert!(text.contains(&format!("linux/s390x      {}", index.images[1].digest())), "{text}");
}
