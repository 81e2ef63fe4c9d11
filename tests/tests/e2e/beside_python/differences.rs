//! Where the Python tool goes wrong, or elsewhere on purpose: an image for each, and what both make of it.

use std::path::Path;

use occy_tests::certificates::text;
use occy_tests::image::{Family, Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, header_types, tar};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::saved::{self, read_saved};
use occy_tests::tools::{Packing, hex, read, sha256, write};

use super::Python;
use crate::{layers, scratch, small, tar_uri};

/// The layers' tars that ours and the Python tool write to a saved tar.
#[track_caller]
fn rewritten(python: &Python, image: &Image, filters: &[&str]) -> [Vec<Vec<u8>>; 2] {
    let registry = Registry::start();
    let source = registry.push(image, "app", "1");
    let directory = scratch();
    let [ours, theirs] = ["ours.tar", "theirs.tar"].map(|name| directory.path().join(name));
    let arguments: Vec<&str> = filters.iter().flat_map(|filter| ["-f", filter]).collect();
    occyctl([&["process", &source, &tar_uri(&ours)], &arguments[..]].concat()).ok();
    python.process(&source, &tar_uri(&theirs), filters);
    [ours, theirs].map(|path| read_saved(&path).tars)
}

/// The same for an image of one layer, as names of members.
#[track_caller]
fn names(python: &Python, members: &[Member], filter: &str) -> [Vec<String>; 2] {
    rewritten(python, &Image::docker(vec![Layer::of(members)]), &[filter]).map(|tars| judge::names(&tars[0]))
}

#[test]
fn it_stops_behind_the_first_member_of_a_gzip_file() {
    let Some(python) = Python::find("it_stops_behind_the_first_member_of_a_gzip_file") else { return };
    let image = Image::docker(vec![Layer::noise(1, 50_000).packed(Packing::GzipMembers)]);
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let [ours, theirs] = ["ours", "theirs"].map(|name| directory.path().join(name));
    occyctl(["process", &source, &format!("dir://{}", text(&ours))]).ok();
    python.process(&source, &format!("dir://{}", text(&theirs)), &[]);
    assert!(read(ours.join(hex(&image.diff_ids()[0])).join("layer.tar")) == image.layers[0].tar);
    let half = read(theirs.join(hex(&image.layer_digests()[0])).join("layer.tar"));
    assert!(
        half.len() < image.layers[0].tar.len(),
        "it says that all is well, and half of the layer is gone"
    );
}

#[test]
fn it_believes_a_config_that_lies_about_its_layers() {
    let Some(python) = Python::find("it_believes_a_config_that_lies_about_its_layers") else { return };
    let image = small().edit_config(|config| config["rootfs"]["diff_ids"][1] = sha256(b"another").into());
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let [ours, theirs] = ["ours.tar", "theirs.tar"].map(|name| directory.path().join(name));
    occyctl(["process", &source, &tar_uri(&ours)]).fails(1).says(&["layer 2 of 2", "diff_id mismatch"]);
    python.process(&source, &tar_uri(&theirs), &[]);
    assert!(!ours.exists() && theirs.exists());
}

#[test]
fn its_exclude_rewrites_layers_that_it_does_not_touch() {
    let Some(python) = Python::find("its_exclude_rewrites_layers_that_it_does_not_touch") else { return };
    let image = small();
    let [ours, theirs] = rewritten(&python, &image, &["exclude:pattern=no/such/file"]);
    for (index, layer) in image.layers.iter().enumerate() {
        assert!(ours[index] == layer.tar);
        assert!(theirs[index] != layer.tar);
        assert_eq!(judge::members(&theirs[index]), judge::members(&layer.tar));
    }
}

#[test]
fn its_exclude_lets_deleted_files_reappear() {
    let Some(python) = Python::find("its_exclude_lets_deleted_files_reappear") else { return };
    let members = [Member::file("etc/.wh.secret.log", ""), Member::file("etc/a.log", "")];
    let [ours, theirs] = names(&python, &members, "exclude:pattern=*.log");
    assert_eq!(ours, ["etc/.wh.secret.log"]);
    assert_eq!(theirs, [""; 0], "with the whiteout goes what hid a file of the layer below");
}

#[test]
fn its_exclude_leaves_links_to_nothing() {
    let Some(python) = Python::find("its_exclude_leaves_links_to_nothing") else { return };
    let members = [Member::file("gone", "data"), Member::hardlink("kept", "gone")];
    let image = Image::docker(vec![Layer::of(&members)]);
    let [ours, theirs] =
        rewritten(&python, &image, &["exclude:pattern=gone"]).map(|tars| judge::members(&tars[0]));
    assert_eq!(
        (&ours[0]["name"], &ours[0]["type"], &ours[0]["size"]),
        (&"kept".into(), &"0".into(), &4.into())
    );
    assert_eq!(
        (&theirs[0]["name"], &theirs[0]["type"], &theirs[0]["link"]),
        (&"kept".into(), &"1".into(), &"gone".into())
    );
}

#[test]
fn its_exclude_takes_a_directory_from_its_files() {
    let Some(python) = Python::find("its_exclude_takes_a_directory_from_its_files") else { return };
    let members =
        [Member::dir("src/.git"), Member::file("src/.git/HEAD", ""), Member::file("src/main.rs", "")];
    let [ours, theirs] = names(&python, &members, "exclude:pattern=**/.git");
    assert_eq!(ours, ["src/main.rs"]);
    assert_eq!(theirs, ["src/.git/HEAD", "src/main.rs"]);
}

#[test]
fn its_exclude_knows_no_commas() {
    let Some(python) = Python::find("its_exclude_knows_no_commas") else { return };
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, tar(&saved::docker_v12(&[(&small(), &["app:1"])])));
    let filter = "exclude:pattern=*.pyc,etc/app.conf";
    let out = tar_uri(&directory.path().join("out.tar"));
    occyctl(["process", &tar_uri(&path), &out, "-f", filter]).ok();
    let ended = python.run(&["process", &tar_uri(&path), &out, "-f", filter]);
    assert!(!ended.status.success(), "its documentation has this form");
}

#[test]
fn it_takes_the_first_of_several_images() {
    let Some(python) = Python::find("it_takes_the_first_of_several_images") else { return };
    let directory = scratch();
    let (path, out) = (directory.path().join("in.tar"), directory.path().join("out.tar"));
    let other = Image::docker(vec![layers()[1].clone()]);
    write(&path, tar(&saved::docker_v12(&[(&small(), &["one:1"]), (&other, &["two:2"])])));
    occyctl(["process", &tar_uri(&path), &tar_uri(&out)]).fails(1).says(&["one:1", "two:2"]);
    python.process(&tar_uri(&path), &tar_uri(&out), &[]);
    assert_eq!(read_saved(&out).names, ["one:1"]);
}

#[test]
fn it_forgets_all_names_but_one() {
    let Some(python) = Python::find("it_forgets_all_names_but_one") else { return };
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, tar(&saved::docker_v12(&[(&small(), &["localhost:5000/a/app:1", "b:2"])])));
    let [ours, theirs] = ["ours.tar", "theirs.tar"].map(|name| directory.path().join(name));
    occyctl(["process", &tar_uri(&path), &tar_uri(&ours)]).ok();
    python.process(&tar_uri(&path), &tar_uri(&theirs), &[]);
    assert_eq!(read_saved(&ours).names, ["localhost:5000/a/app:1", "b:2"]);
    assert_eq!(read_saved(&theirs).names, ["app:1"]);
}

#[test]
fn it_writes_into_directories_that_have_something_else() {
    let Some(python) = Python::find("it_writes_into_directories_that_have_something_else") else { return };
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let path = directory.path().join("out");
    write(path.join("manifest.json"), "precious");
    let uri = format!("dir://{}", text(&path));
    occyctl(["process", &source, &uri]).fails(1).says(&["not empty", "--force"]);
    assert_eq!(read(path.join("manifest.json")), b"precious");
    python.process(&source, &uri, &[]);
    assert_ne!(read(path.join("manifest.json")), b"precious");
}

#[test]
fn it_puts_zstd_into_dockers_format() {
    let Some(python) = Python::find("it_puts_zstd_into_dockers_format") else { return };
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let zstd = |name: &str| format!("{}?compression=zstd", registry.uri(name));
    occyctl(["process", &source, &zstd("ours:1")]).ok();
    python.process(&source, &zstd("theirs:1"), &[]);
    let [ours, theirs] = ["ours", "theirs"].map(|name| registry.pull(name, "1"));
    assert!([&ours, &theirs].iter().all(|image| image.blobs[0][..4] == [0x28, 0xb5, 0x2f, 0xfd]));
    assert_eq!(ours.document["mediaType"], Family::Oci.manifest());
    assert_eq!(theirs.document["mediaType"], Family::Docker.manifest());
    judge::skopeo_reads(&format!("docker://{}/ours:1", registry.host()));
}

#[test]
fn its_opaque_whiteouts_hide_neighbours_too() {
    let Some(python) = Python::find("its_opaque_whiteouts_hide_neighbours_too") else { return };
    let image = Image::docker(vec![
        Layer::of(&[
            Member::dir("etc"),
            Member::file("etc/old", ""),
            Member::dir("etcetera"),
            Member::file("etcetera/mine", ""),
        ]),
        Layer::of(&[Member::dir("etc"), Member::file("etc/.wh..wh..opq", ""), Member::file("etc/new", "")]),
    ]);
    let [ours, theirs] = expanded(&python, &image);
    assert_eq!(ours, ["etc", "etc/new", "etcetera", "etcetera/mine"]);
    assert_eq!(theirs, ["etc", "etc/new"]);
}

#[test]
fn its_files_land_outside_of_the_directory() {
    let Some(python) = Python::find("its_files_land_outside_of_the_directory") else { return };
    let image = Image::docker(vec![Layer::of(&[Member::file("../../evil", "x"), Member::file("good", "y")])]);
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    for (who, evil) in [("ours", false), ("theirs", true)] {
        // `manifest/` is in `out`, so two levels up is `who`.
        let path = directory.path().join(who).join("out");
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        let uri = format!("dir://{}?expand=true", text(&path));
        match who {
            "ours" => drop(occyctl(["process", &source, &uri]).run()),
            _ => drop(python.run(&["process", &source, &uri])),
        }
        assert_eq!(directory.path().join(who).join("evil").exists(), evil, "{who}");
    }
}

#[track_caller]
fn expanded(python: &Python, image: &Image) -> [Vec<String>; 2] {
    let registry = Registry::start();
    let source = registry.push(image, "app", "1");
    let directory = scratch();
    let [ours, theirs] = ["ours", "theirs"].map(|name| directory.path().join(name));
    let uri = |path: &Path| format!("dir://{}?expand=true", text(path));
    occyctl(["process", &source, &uri(&ours)]).ok();
    python.process(&source, &uri(&theirs), &[]);
    [ours, theirs].map(|path| {
        let tree = judge::tree(&path.join("manifest"));
        tree.as_object().expect("a tree").keys().filter(|name| *name != ".").cloned().collect()
    })
}

#[test]
fn its_rewritten_members_differ_in_form_alone() {
    let Some(python) = Python::find("its_rewritten_members_differ_in_form_alone") else { return };
    let long = "n".repeat(150);
    let members = [
        Member::dir("d"),
        Member::file(&format!("{long}/{long}"), "long").xattr("user.a", "x"),
        Member::file("ünï", "utf-8"),
        Member::symlink("l", &"/t".repeat(80)),
        Member::device("null", 1, 3),
        Member::fifo("pipe"),
        Member::file("pax", "p").pax("mtime", "1700000000.5").pax("atime", "5"),
    ];
    let image = Image::docker(vec![Layer::of(&members)]);
    let [ours, theirs] = rewritten(&python, &image, &["normalize-timestamps"]).map(|mut tars| tars.remove(0));
    let plain = |tar: &[u8]| {
        let mut members = judge::members(tar);
        for member in &mut members {
            for mirrored in ["path", "linkpath", "mtime"] {
                member["pax"].as_object_mut().expect("records").remove(mirrored);
            }
        }
        members
    };
    assert_eq!(plain(&ours), plain(&theirs));
    assert_eq!(
        header_types(&ours),
        header_types(&theirs),
        "both write PAX where USTAR does not do, and only there"
    );
    assert_eq!(theirs.len() % 10_240, 0, "it ends with a record of 20 blocks");
    assert_eq!(json_of(&image.config)["rootfs"]["diff_ids"].as_array().map(Vec::len), Some(1));
}
