//! `dir://` as a destination: plain, and shared by images.

use std::path::Path;

use occy_tests::certificates::text;
use occy_tests::image::{Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::FaultProxy;
use occy_tests::registry::Registry;
use occy_tests::tools::{hex, read, run, sha256, write};
use serde_json::{Value, json};

use crate::{layers, names, scratch, small};

fn dir_uri(path: &Path) -> String {
    format!("dir://{}", text(path))
}

fn shared_uri(path: &Path) -> String {
    format!("{}?unique_names=true", dir_uri(path))
}

/// Checks that a manifest's image is there, byte for byte.
#[track_caller]
fn holds(directory: &Path, manifest: &str, image: &Image) -> Value {
    let manifest = json_of(&read(directory.join(manifest)));
    let config = manifest[0]["Config"].as_str().expect("a config");
    assert_eq!(read(directory.join(config)), image.config);
    assert_eq!(config, format!("{}.json", hex(&image.config_digest())));
    let layers = manifest[0]["Layers"].as_array().expect("layers");
    assert_eq!(layers.len(), image.layers.len());
    for (path, layer) in layers.iter().zip(&image.layers) {
        let path = path.as_str().expect("a path");
        assert_eq!(path, format!("{}/layer.tar", hex(&sha256(&layer.tar))));
        assert!(read(directory.join(path)) == layer.tar, "{path}");
    }
    manifest[0].clone()
}

#[test]
fn a_directory_holds_the_image_as_the_python_tool_lays_it_out() {
    let registry = Registry::start();
    let source = registry.push(&small(), "a/app", "1");
    let directory = scratch();
    let ours = directory.path().join("ours");
    occyctl(["process", &source, &dir_uri(&ours)]).ok().says(&["Processed ", " bytes in 2 layers in "]);
    let manifest = holds(&ours, "manifest.json", &small());
    let name = format!("{}/a/app", registry.host());
    assert_eq!(manifest["RepoTags"], json!([format!("{name}:1")]));
    assert_eq!(json_of(&read(ours.join("catalog.json"))), json!({ &name: { "1": "manifest.json" } }));
    assert_eq!(names(directory.path()), ["ours"], "nothing is left beside it");

    let Some(python) = judge::python_occystrap("dir:// side by side") else { return };
    let theirs = directory.path().join("theirs");
    let program = text(&python);
    let ended = run(&program, ["--insecure", "process", &source, &dir_uri(&theirs)], b"");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let other = json_of(&read(theirs.join("manifest.json")));
    // Theirs names layers by the digests of the compressed blobs, writes the config anew under the name of the bytes that
    // it was, and leaves the registry out of the image's name; in all else the two are equal.
    let tars: Vec<Vec<u8>> = other[0]["Layers"]
        .as_array()
        .expect("layers")
        .iter()
        .map(|path| read(theirs.join(path.as_str().expect("a path"))))
        .collect();
    assert_eq!(tars, small().layers.iter().map(|layer| layer.tar.clone()).collect::<Vec<_>>());
    assert_eq!(other[0]["Config"], manifest["Config"]);
    assert_eq!(other[0]["RepoTags"], json!(["app:1"]));
    assert_eq!(names(&ours).len(), names(&theirs).len());
    let catalog = json_of(&read(theirs.join("catalog.json")));
    assert_eq!(catalog, json!({"a/app": {"1": "manifest.json"}}));
}

#[test]
fn a_directory_that_has_the_source_in_it_is_not_replaced() {
    let directory = crate::scratch();
    let (store, file) = (directory.path().join("store"), directory.path().join("store/image.tar"));
    std::fs::create_dir(&store).expect("a directory");
    write(&file, occy_tests::layer::tar(&occy_tests::saved::docker_v25(&[(&small(), &["app:1"])])));
    for (destination, force) in [
        (dir_uri(&store), &["--force"][..]),
        (dir_uri(directory.path()), &["--force"]),
        (format!("{}?force=true", dir_uri(&store)), &[]),
        (dir_uri(&store).replace("dir://", "oci://"), &["--force"]),
    ] {
        let source = crate::tar_uri(&file);
        occyctl([&["process", &source, &destination], force].concat())
            .fails(2)
            .says(&["the source is in it"]);
        assert!(file.exists());
    }
}

#[test]
fn a_directory_that_is_not_empty_is_refused_unless_forced() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let path = directory.path().join("out");
    write(path.join("precious"), "data");
    for uri in [dir_uri(&path), shared_uri(&path)] {
        occyctl(["process", &source, &uri]).fails(1).says(&[&text(&path), "not empty", "hint: ", "--force"]);
        assert_eq!(names(&path), ["precious"]);
    }
    occyctl(["process", &source, &dir_uri(&path), "--force"]).ok();
    holds(&path, "manifest.json", &small());
    assert!(!path.join("precious").exists());
    assert_eq!(names(directory.path()), ["out"]);
    occyctl(["process", &source, &format!("{}?force=true", dir_uri(&path))]).ok();
    occyctl(["process", &source, &dir_uri(&path)]).env("OCCYSTRAP_FORCE", "true").ok();
    std::fs::remove_dir_all(&path).expect("a directory");
    std::fs::create_dir(&path).expect("a directory");
    occyctl(["process", &source, &dir_uri(&path)]).ok();
    holds(&path, "manifest.json", &small());
}

#[test]
fn a_failed_run_leaves_the_directory_as_it_was() {
    let registry = Registry::start();
    let image = small().edit_config(|config| {
        config["rootfs"]["diff_ids"][1] = sha256(b"another").into();
    });
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let path = directory.path().join("out");
    occyctl(["process", &source, &dir_uri(&path)]).fails(1).says(&["diff_id mismatch"]);
    assert!(names(directory.path()).is_empty());
    write(path.join("precious"), "data");
    occyctl(["process", &source, &dir_uri(&path), "--force"]).fails(1);
    assert_eq!(names(directory.path()), ["out"]);
    assert_eq!(names(&path), ["precious"]);
}

#[test]
fn a_second_image_fetches_no_layer_that_it_shares() {
    let registry = Registry::start();
    let base = layers();
    let first = Image::docker(base.clone());
    let second = Image::docker([base, vec![Layer::of(&[Member::file("new", "n")])]].concat());
    registry.push(&first, "first", "1");
    registry.push(&second, "second", "2");
    let proxy = FaultProxy::before(registry.host());
    let directory = scratch();
    let path = directory.path().join("images");
    let source = |name: &str| format!("registry://{}/{name}", proxy.host());
    let filter = ["-f", "search:pattern=*.conf"];
    let process = |name: &str, more: &[&str]| {
        occyctl([&["process", &source(name), &shared_uri(&path)], more].concat()).ok()
    };
    let found = process("first:1", &filter).text();
    assert!(found.contains("app.conf"), "{found}");
    let blobs = |name: &str| proxy.count("GET", &format!("/v2/{name}/blobs/*"));
    assert_eq!(blobs("first"), 3, "a config and two layers: {}", proxy.story());

    let again = process("second:2", &filter).text();
    assert_eq!(blobs("second"), 2, "a config and the new layer: {}", proxy.story());
    assert_eq!(again.replace("second", "first"), found, "a layer that is not fetched reports all the same");

    // Other filters may give another result.
    process("second:2", &["-f", "exclude:pattern=etc/draft.conf"]);
    assert!(blobs("second") > 3, "{}", proxy.story());

    let host = proxy.host();
    let catalog = json_of(&read(path.join("catalog.json")));
    let underscored = |name: &str, tag: &str| format!("manifest-{host}_{name}-{tag}.json");
    assert_eq!(
        catalog,
        json!({ format!("{host}/first"): {"1": underscored("first", "1")}, format!("{host}/second"): {"2": underscored("second", "2")} })
    );
    let manifest = holds(&path, &underscored("first", "1"), &first);
    assert_eq!(manifest["ImageName"], format!("{host}/first"));
}

#[test]
fn a_layer_that_is_damaged_is_fetched_again() {
    let registry = Registry::start();
    registry.push(&small(), "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let source = format!("registry://{}/app:1", proxy.host());
    let directory = scratch();
    let path = directory.path().join("images");
    occyctl(["process", &source, &shared_uri(&path)]).ok();
    let blobs = || proxy.count("GET", "/v2/app/blobs/*");
    let before = blobs();
    let layer = path.join(format!("{}/layer.tar", hex(&small().diff_ids()[0])));
    let tar = read(&layer);

    write(&layer, &tar[..512]);
    occyctl(["process", &source, &shared_uri(&path)]).ok();
    assert_eq!(blobs(), before + 2, "the size tells: {}", proxy.story());
    assert!(read(&layer) == tar);

    let mut damaged = tar.clone();
    damaged[700] ^= 1;
    write(&layer, &damaged);
    occyctl(["process", &source, &shared_uri(&path), "--verify"]).ok().says(&["is not what its name says"]);
    assert_eq!(blobs(), before + 4, "the hash tells: {}", proxy.story());
    assert!(read(&layer) == tar);
}

#[test]
fn a_wrong_config_is_found_although_the_layer_is_there() {
    let registry = Registry::start();
    registry.push(&small(), "app", "1");
    let wrong = small().edit_config(|config| {
        config["rootfs"]["diff_ids"][0] = sha256(b"another").into();
    });
    registry.push(&wrong, "app", "2");
    let directory = scratch();
    let uri = shared_uri(&directory.path().join("images"));
    occyctl(["process", &format!("registry://{}/app:1", registry.host()), &uri]).ok();
    occyctl(["process", &format!("registry://{}/app:2", registry.host()), &uri])
        .fails(1)
        .says(&["diff_id mismatch"]);
}

#[test]
fn the_index_is_no_more_than_a_hint() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let path = directory.path().join("images");
    occyctl(["process", &source, &shared_uri(&path)]).ok();
    for name in names(&path.join("layer-index")) {
        write(path.join("layer-index").join(name), r#"{"diff_id":"sha256:../../../etc/passwd"}"#);
    }
    occyctl(["process", &source, &shared_uri(&path)]).ok();
    std::fs::remove_dir_all(path.join("layer-index")).expect("a directory");
    occyctl(["process", &source, &shared_uri(&path)]).ok();
    assert_eq!(names(&path.join("layer-index")).len(), 2);
}

#[test]
fn many_writers_of_one_catalog_lose_nothing_although_one_is_killed() {
    let registry = Registry::start();
    let images: Vec<Image> =
        (0..6).map(|seed| Image::docker([layers(), vec![Layer::noise(seed, 300_000)]].concat())).collect();
    for (at, image) in images.iter().enumerate() {
        registry.push(image, &format!("app{at}"), "1");
    }
    let directory = scratch();
    let path = directory.path().join("images");
    let uri = shared_uri(&path);
    let source = |at: usize| format!("registry://{}/app{at}:1", registry.host());
    std::thread::scope(|scope| {
        let mut killed = occyctl(["process", &source(0), &uri]).start();
        for at in 1..images.len() {
            let (uri, source) = (&uri, source(at));
            scope.spawn(move || occyctl(["process", &source, uri]).ok());
        }
        std::thread::sleep(std::time::Duration::from_millis(60));
        drop(killed.kill());
        drop(killed.wait());
    });
    // The lock of the one that was killed stands in nobody's way.
    occyctl(["process", &source(0), &uri]).ok();
    let catalog = json_of(&read(path.join("catalog.json")));
    for (at, image) in images.iter().enumerate() {
        let manifest = catalog[format!("{}/app{at}", registry.host())]["1"].as_str().expect("an entry");
        holds(&path, manifest, image);
    }
    assert!(names(&path).iter().all(|name| !name.contains("partial")), "{:?}", names(&path));
}

#[test]
fn filters_and_a_saved_tar_give_the_same_directory_each_time() {
    let directory = scratch();
    let (tar, path) = (directory.path().join("in.tar"), directory.path().join("images"));
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    occyctl(["process", &source, &crate::tar_uri(&tar)]).ok();
    let filter = "normalize-timestamps";
    let mut seen = Vec::new();
    for at in 0..2 {
        let path = directory.path().join(format!("plain{at}"));
        occyctl(["process", &crate::tar_uri(&tar), &dir_uri(&path), "-f", filter]).ok();
        seen.push(names(&path));
        occyctl([
            "process",
            &crate::tar_uri(&tar),
            &shared_uri(&directory.path().join("images")),
            "-f",
            filter,
        ])
        .ok();
    }
    assert_eq!(seen[0], seen[1]);
    for layer in names(&path).iter().filter(|name| name.len() == 64) {
        assert_eq!(&sha256(&read(path.join(layer).join("layer.tar")))[7..], layer);
    }
}
