//! Saved tars as an output.

use occy_tests::certificates::text;
use occy_tests::image::{Image, json_of};
use occy_tests::judge::{self, Engine};
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::saved::{self, read_saved};
use occy_tests::tools::{Packing, hex, read, sha256, tool, write};

use crate::{layers, scratch, small, tar_uri};

#[test]
fn an_image_is_saved_with_its_own_config_bytes_and_its_full_name() {
    let registry = Registry::start();
    for (name, packing) in [
        ("gzip", Packing::Gzip),
        ("members", Packing::GzipMembers),
        ("zstd", Packing::Zstd),
        ("frames", Packing::ZstdFrames),
        ("plain", Packing::Plain),
    ] {
        let image = Image::oci(layers().into_iter().map(|layer| layer.packed(packing)).collect());
        let source = registry.push(&image, &format!("team/{name}"), "v1");
        let directory = scratch();
        let path = directory.path().join("out.tar");
        let ended = occyctl(["process", &source, &tar_uri(&path)]).ok();
        assert!(ended.stdout.is_empty(), "{}", ended.text());
        let saved = read_saved(&path);
        assert_eq!(saved.config, image.config);
        assert_eq!(saved.names, [format!("{}/team/{name}:v1", registry.host())]);
        assert_eq!(saved.tars, image.layers.iter().map(|layer| layer.tar.clone()).collect::<Vec<_>>());
        let bytes: usize = saved.tars.iter().map(Vec::len).sum();
        ended.says(&[&format!("Processed {bytes} bytes in 2 layers in ")]);
        judge::skopeo_reads(&format!("docker-archive:{}", text(&path)));
    }
}

#[test]
fn members_stand_in_manifest_order_with_no_times_and_layers_by_their_hash() {
    let registry = Registry::start();
    let image = Image::docker((0..4).map(|seed| Layer::noise(seed, 50_000)).collect());
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let path = directory.path().join("out.tar");
    occyctl(["process", &source, &tar_uri(&path), "-j", "8"]).ok();
    let saved = read_saved(&path);
    let mut expected: Vec<String> =
        image.diff_ids().iter().map(|id| format!("{}/layer.tar", hex(id))).collect();
    assert_eq!(saved.paths, expected);
    expected.push(format!("{}.json", hex(&image.config_digest())));
    expected.push("manifest.json".to_owned());
    let files: Vec<String> = saved.members.into_iter().filter(|name| !name.ends_with('/')).collect();
    assert_eq!(files, expected);
    for member in judge::members(&read(&path)) {
        assert_eq!(member["mtime"], 0, "{member}");
        assert_eq!((&member["uid"], &member["uname"]), (&0.into(), &"".into()), "{member}");
    }
}

#[test]
fn the_same_input_gives_the_same_bytes_every_time_to_files_and_to_standard_output() {
    let registry = Registry::start();
    let source =
        registry.push(&Image::docker((0..5).map(|seed| Layer::noise(seed, 90_000)).collect()), "app", "1");
    for filter in [None, Some("normalize-timestamps:ts=7")] {
        let filter: Vec<&str> = filter.iter().flat_map(|filter| ["-f", filter]).collect();
        let mut hashes = Vec::new();
        for parallel in ["1", "3", "8"] {
            let directory = scratch();
            let path = directory.path().join("out.tar");
            let uri = tar_uri(&path);
            occyctl([&["process", &source, &uri, "-j", parallel], &filter[..]].concat()).ok();
            hashes.push(sha256(&read(&path)));
            let piped =
                occyctl([&["process", &source, "tar://-", "-j", parallel], &filter[..]].concat()).ok();
            hashes.push(sha256(&piped.stdout));
        }
        hashes.dedup();
        assert_eq!(hashes.len(), 1, "{filter:?}");
    }
}

#[test]
fn a_repeated_layer_is_written_once() {
    let registry = Registry::start();
    let mut list = layers();
    list.push(list[0].clone());
    let source = registry.push(&Image::docker(list), "app", "1");
    let directory = scratch();
    let path = directory.path().join("out.tar");
    for filter in [&[][..], &["-f", "normalize-timestamps"]] {
        occyctl([&["process", &source, &tar_uri(&path)], filter].concat()).ok();
        let saved = read_saved(&path);
        assert_eq!((saved.paths.len(), &saved.paths[0]), (3, &saved.paths[2]));
        assert_eq!(saved.members.iter().filter(|name| name.ends_with("layer.tar")).count(), 2);
        judge::skopeo_reads(&format!("docker-archive:{}", text(&path)));
    }
}

#[test]
fn docker_loads_and_runs_what_we_save() {
    let Some(engine) = Engine::find("docker_loads_and_runs_what_we_save") else { return };
    let name = judge::unique_name("run");
    let hello = concat!(env!("CARGO_MANIFEST_DIR"), "/images/hello.tar");
    let list = json_of(tool("tar", ["-xOf", hello, "manifest.json"]).as_bytes());
    let directory = scratch();
    // The engine's own save, through a registry and back, under a name of this run.
    let registry = Registry::start();
    let remote = registry.uri(&format!("{name}:1"));
    occyctl(["process", &format!("tar://{hello}"), &remote]).ok();
    let filters: [&[&str]; 2] = [&[], &["-f", "normalize-timestamps", "-f", "exclude:pattern=**/NOTICE"]];
    for filters in filters {
        let path = directory.path().join("out.tar");
        occyctl([&["process", &remote, &tar_uri(&path)], filters].concat()).ok();
        let saved = read_saved(&path);
        assert_eq!(saved.paths.len(), list[0]["Layers"].as_array().expect("a list").len());
        let loaded = engine.load(&path, &saved.names[0]);
        assert_eq!(loaded.diff_ids(), saved.tars.iter().map(|tar| sha256(tar)).collect::<Vec<_>>());
        if engine == Engine::Docker {
            assert_eq!(loaded.inspected["Id"], sha256(&saved.config));
        }
        assert!(!loaded.run().is_empty());
    }
}

#[test]
fn a_tar_that_exists_is_replaced_whole_or_left_alone() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let path = directory.path().join("out.tar");
    write(&path, "what was there");
    let missing = registry.uri("app:missing");
    occyctl(["process", &missing, &tar_uri(&path)]).fails(1);
    assert_eq!(read(&path), b"what was there");
    occyctl(["process", &source, &tar_uri(&path)]).ok();
    assert_eq!(read_saved(&path).paths.len(), 2);
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 1, "nothing else is left");
}

#[test]
fn relative_paths_and_names_with_escapes_are_written_where_they_say() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    occyctl(["process", &source, "tar://plain.tar"]).directory(directory.path()).ok();
    occyctl(["process", &source, "tar://what%3F.tar"]).directory(directory.path()).ok();
    assert_eq!(read(directory.path().join("plain.tar")), read(directory.path().join("what?.tar")));
    let nowhere = tar_uri(&directory.path().join("missing/out.tar"));
    occyctl(["process", &source, &nowhere]).fails(1).says(&["missing/out.tar"]);
}

#[test]
fn pipes_and_links_are_written_through_and_a_tar_may_replace_itself() {
    let hello = concat!("tar://", env!("CARGO_MANIFEST_DIR"), "/images/hello.tar");
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    occyctl(["process", hello, &tar_uri(&at("plain"))]).ok();
    let expected = sha256(&read(at("plain")));
    tool("mkfifo", [text(&at("pipe"))]);
    let reader = std::thread::spawn({
        let pipe = at("pipe");
        move || read(pipe)
    });
    occyctl(["process", hello, &tar_uri(&at("pipe"))]).ok();
    assert_eq!(sha256(&reader.join().expect("it read")), expected);
    std::os::unix::fs::symlink("target", at("link")).expect("a link");
    write(at("target"), "old");
    occyctl(["process", hello, &tar_uri(&at("link"))]).ok();
    assert!(at("link").is_symlink());
    assert_eq!(sha256(&read(at("target"))), expected);
    let itself = tar_uri(&at("plain"));
    occyctl(["process", &itself, &itself, "-f", "normalize-timestamps"]).ok();
    occyctl(["check", &itself]).ok();
    occyctl(["process", hello, "tar:///dev/null"]).ok();
}

#[test]
fn several_runs_that_write_one_tar_leave_one_of_theirs() {
    let registry = Registry::start();
    let images: Vec<Image> = (0..4).map(|seed| Image::docker(vec![Layer::noise(seed, 300_000)])).collect();
    let directory = scratch();
    let uri = tar_uri(&directory.path().join("out.tar"));
    std::thread::scope(|scope| {
        for (tag, image) in images.iter().enumerate() {
            let source = registry.push(image, "app", &tag.to_string());
            let uri = &uri;
            scope.spawn(move || occyctl(["process", &source, uri]).ok());
        }
    });
    let saved = read_saved(&directory.path().join("out.tar"));
    assert!(images.iter().any(|image| image.config == saved.config));
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 1);
}

#[test]
fn the_python_tool_finds_nothing_wrong_with_what_we_save() {
    let Some(occystrap) = judge::python_occystrap("the_python_tool_finds_nothing_wrong_with_what_we_save")
    else {
        return;
    };
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let path = directory.path().join("out.tar");
    occyctl(["process", &source, &tar_uri(&path), "-f", "normalize-timestamps"]).ok();
    judge::python_checks(&occystrap, &tar_uri(&path));
}

#[test]
fn a_saved_tar_through_a_registry_and_back_is_the_same() {
    let registry = Registry::start();
    let directory = scratch();
    let (first, second) = (directory.path().join("1.tar"), directory.path().join("2.tar"));
    let image = Image::docker(vec![Layer::of(&[Member::file("a", "a")]), Layer::noise(2, 1000)]);
    let name = format!("{}/app:1", registry.host());
    write(&first, occy_tests::layer::tar(&saved::docker_v12(&[(&image, &[&name])])));
    occyctl(["process", &tar_uri(&first), &registry.uri("app:1")]).ok();
    assert_eq!(registry.pull("app", "1").config, image.config);
    occyctl(["process", &registry.uri("app:1"), &tar_uri(&second)]).ok();
    let third = directory.path().join("3.tar");
    occyctl(["process", &tar_uri(&first), &tar_uri(&third)]).ok();
    assert_eq!(read(&second), read(&third));
}
