//! Saved tars as a source, in every form that savers write.

use occy_tests::certificates::text;
use occy_tests::image::{Family, Image};
use occy_tests::judge;
use occy_tests::layer::{Member, tar};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::saved::{self, read_saved};
use occy_tests::tools::{Packing, hex, read, tool, write};

use crate::{layers, scratch, small, tar_uri};

/// Every way to save an image, by name.
fn forms(image: &Image) -> Vec<(&'static str, Vec<Member>)> {
    let named: &saved::Named<'_> = &[(image, &["app:1"])];
    let mut first = saved::docker_v12(named);
    first.rotate_right(2);
    vec![
        ("docker before 25", saved::docker_v12(named)),
        ("docker since 25", saved::docker_v25(named)),
        ("containerd's store", saved::containerd(named)),
        ("manifest.json first", first),
    ]
}

#[test]
fn every_form_gives_the_same_image() {
    let registry = Registry::start();
    let image = small();
    for (form, members) in forms(&image) {
        let directory = scratch();
        let (input, output) = (directory.path().join("in.tar"), directory.path().join("out.tar"));
        write(&input, tar(&members));
        occyctl(["process", &tar_uri(&input), &tar_uri(&output)]).ok();
        let saved = read_saved(&output);
        assert_eq!(saved.config, image.config, "{form}");
        assert_eq!(
            saved.tars,
            image.layers.iter().map(|layer| layer.tar.clone()).collect::<Vec<_>>(),
            "{form}"
        );
        assert_eq!(saved.names, ["app:1"], "{form}");

        occyctl(["process", &tar_uri(&input), &registry.uri("app:1")]).ok();
        let pushed = registry.pull("app", "1");
        assert_eq!(pushed.config, image.config, "{form}");
        assert!(pushed.blobs.iter().all(|blob| blob[..2] == [0x1f, 0x8b]), "{form}: a registry gets gzip");
        judge::skopeo_reads(&format!("docker://{}/app:1", registry.host()));
    }
}

#[test]
fn containerds_layers_and_manifest_are_pushed_as_they_were_pulled() {
    let registry = Registry::start();
    let image = Image::oci(layers());
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, tar(&saved::containerd(&[(&image, &["app:1"])])));
    occyctl(["process", &tar_uri(&path), &registry.uri("app:1")]).ok();
    let pushed = registry.pull("app", "1");
    assert_eq!(pushed.blobs, image.layers.iter().map(occy_tests::layer::Layer::blob).collect::<Vec<_>>());
    assert_eq!(pushed.document["mediaType"], Family::Oci.manifest());
}

#[test]
fn what_real_tools_save_is_read() {
    let registry = Registry::start();
    let mut list = layers();
    list.push(list[0].clone());
    let image = Image::docker(list);
    let source = registry.push(&image, "app", "1").replace("registry://", "docker://");
    let directory = scratch();
    let (path, output) = (directory.path().join("in.tar"), directory.path().join("out.tar"));
    let archive = format!("docker-archive:{}:example.com/app:1", text(&path));
    tool("skopeo", ["copy", "--quiet", "--src-tls-verify=false", &source, &archive]);
    occyctl(["process", &tar_uri(&path), &tar_uri(&output)]).ok();
    let saved = read_saved(&output);
    assert_eq!((saved.config, saved.names), (image.config.clone(), vec!["example.com/app:1".to_owned()]));
    // The engine's own, which the project carries.
    let hello = concat!("tar://", env!("CARGO_MANIFEST_DIR"), "/images/hello.tar");
    occyctl(["process", hello, &tar_uri(&output)]).ok();
    assert_eq!(read_saved(&output).tars.len(), 4);
    occyctl(["check", hello]).ok();
}

#[test]
fn the_whole_file_may_be_compressed_and_may_come_through_a_pipe() {
    let image = small();
    let plain = tar(&saved::docker_v12(&[(&image, &["app:1"])]));
    let directory = scratch();
    let expected = directory.path().join("expected.tar");
    let path = directory.path().join("in");
    write(&path, &plain);
    occyctl(["process", &tar_uri(&path), &tar_uri(&expected)]).ok();
    for packing in
        [Packing::Plain, Packing::Gzip, Packing::GzipMembers, Packing::Zstd, Packing::Xz, Packing::Bzip2]
    {
        let packed = packing.pack(&plain);
        write(&path, &packed);
        let from_file = occyctl(["process", &tar_uri(&path), "tar://-"]).ok();
        assert_eq!(from_file.stdout, read(&expected), "{packing:?}");
        let from_pipe = occyctl(["process", "tar://-", "tar://-"]).input(&packed).ok();
        assert_eq!(from_pipe.stdout, read(&expected), "{packing:?} through a pipe");
    }
}

#[test]
fn a_layer_may_be_a_symbolic_link_to_an_earlier_one() {
    let mut list = layers();
    list.push(list[0].clone());
    let image = Image::docker(list);
    let mut members = saved::docker_v12(&[(&image, &["app:1"])]);
    let paths: Vec<String> =
        judge::names(&tar(&members)).into_iter().filter(|name| name.ends_with("layer.tar")).collect();
    let at = judge::names(&tar(&members)).iter().position(|name| *name == paths[2]).expect("the third layer");
    members[at] = Member::symlink(&paths[2], &format!("../{}", paths[0]));
    let directory = scratch();
    let path = directory.path().join("in.tar");
    write(&path, tar(&members));
    let piped = occyctl(["process", "tar://-", "tar://-"]).input(&tar(&members)).ok();
    let output = directory.path().join("out.tar");
    occyctl(["process", &tar_uri(&path), &tar_uri(&output)]).ok();
    let saved = read_saved(&output);
    assert_eq!(saved.tars[2], image.layers[0].tar);
    assert_eq!(piped.stdout, read(&output));
}

#[test]
fn of_several_images_one_must_be_chosen() {
    let (one, two) = (small(), Image::docker(vec![layers()[1].clone()]));
    for members in [
        saved::docker_v12(&[(&one, &["one:1", "uno:1"]), (&two, &["example.com/two:2"])]),
        saved::docker_v25(&[(&one, &["one:1", "uno:1"]), (&two, &["example.com/two:2"])]),
    ] {
        let directory = scratch();
        let (path, output) = (directory.path().join("in.tar"), directory.path().join("out.tar"));
        write(&path, tar(&members));
        occyctl(["process", &tar_uri(&path), &tar_uri(&output)]).fails(1).says(&[
            "one:1",
            "example.com/two:2",
            "?image=",
        ]);
        for (name, image) in
            [("one:1", &one), ("uno:1", &one), ("example.com/two:2", &two), ("docker.io/library/one:1", &one)]
        {
            occyctl(["process", &format!("{}?image={name}", tar_uri(&path)), &tar_uri(&output)]).ok();
            assert_eq!(read_saved(&output).config, image.config, "{name}");
        }
        let wrong = format!("{}?image=three:3", tar_uri(&path));
        occyctl(["process", &wrong, &tar_uri(&output)]).fails(1).says(&["three:3"]);
    }
}

#[test]
fn what_is_a_layout_and_no_saved_image_is_told_with_the_way_to_read_it() {
    let directory = scratch();
    let path = directory.path().join("in.tar");
    let marker = Member::file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
    for (manifest, says) in [
        (None, "it has no manifest.json"),
        (Some("[]"), "its manifest.json lists no image"),
        (Some("nothing"), "no list of images"),
    ] {
        let manifest = manifest.map(|text| Member::file("manifest.json", text));
        let members: Vec<_> = manifest.into_iter().chain([Member::file("other", "x")]).collect();
        write(&path, tar(&members));
        let ended = occyctl(["info", &tar_uri(&path)]).fails(1).says(&[&text(&path), "manifest.json", says]);
        assert!(!ended.stderr.contains("oci-layout"), "{}", ended.stderr);
        write(&path, tar(&[&members[..], std::slice::from_ref(&marker)].concat()));
        occyctl(["info", &tar_uri(&path)]).fails(1).says(&[
            "not a saved image",
            says,
            "hint: ",
            "oci-layout://",
        ]);
    }
}

#[test]
fn all_names_of_a_saved_image_are_kept() {
    let image = small();
    let directory = scratch();
    let (path, output) = (directory.path().join("in.tar"), directory.path().join("out.tar"));
    let names = ["localhost:5000/a/b:1", "localhost:5000/a/b:2", "example.com/c:3"];
    write(&path, tar(&saved::docker_v12(&[(&image, &names)])));
    occyctl(["process", &tar_uri(&path), &tar_uri(&output)]).ok();
    let mut found = read_saved(&output).names;
    found.sort_unstable();
    assert_eq!(found, ["example.com/c:3", "localhost:5000/a/b:1", "localhost:5000/a/b:2"]);
}

#[test]
fn an_untagged_image_is_read() {
    let image = small();
    let directory = scratch();
    let (path, output) = (directory.path().join("in.tar"), directory.path().join("out.tar"));
    write(&path, tar(&saved::docker_v12(&[(&image, &[])])));
    occyctl(["process", &tar_uri(&path), &tar_uri(&output)]).ok();
    assert_eq!(read_saved(&output).config, image.config);
}

#[test]
fn a_saved_tar_that_lies_is_refused_and_says_where() {
    let image = small();
    let good = saved::docker_v12(&[(&image, &["app:1"])]);
    let names = judge::names(&tar(&good));
    let layer = names.iter().position(|name| name.ends_with("layer.tar")).expect("a layer");
    let list = names.iter().position(|name| name == "manifest.json").expect("manifest.json");
    let config = format!("{}.json", hex(&image.config_digest()));

    let without = |at: usize| {
        let mut members = good.clone();
        members.remove(at);
        tar(&members)
    };
    let with = |at: usize, member: Member| {
        let mut members = good.clone();
        members[at] = member;
        tar(&members)
    };
    let short = format!(r#"[{{"Config":"{config}","RepoTags":[],"Layers":["{}"]}}]"#, names[layer]);
    let whole = tar(&good);
    let (layer, member): (usize, &str) = (layer, &names[layer]);
    for (what, bytes, says) in [
        ("no manifest.json", without(list), "manifest.json"),
        ("a missing layer", without(layer), member),
        ("a layer of other bytes", with(layer, Member::file(member, tar(&[]))), "layer 1 of 2"),
        ("a layer that is no tar", with(layer, Member::file(member, vec![7; 700])), "layer 1 of 2"),
        ("a link to nowhere", with(layer, Member::symlink(member, "../x/layer.tar")), member),
        ("a link to itself", with(layer, Member::symlink(member, "layer.tar")), member),
        ("a link out of the tar", with(layer, Member::symlink(member, "../../../../etc/passwd")), member),
        ("fewer layers than diff_ids", with(list, Member::file("manifest.json", short)), "diff_ids"),
        ("a manifest.json that is none", with(list, Member::file("manifest.json", "{}")), "manifest.json"),
        ("half a file", whole[..whole.len() / 2].to_vec(), "tar"),
        ("no tar", b"#!/bin/sh\necho hello\n".to_vec(), "tar"),
        ("nothing", Vec::new(), "not a saved image"),
    ] {
        let directory = scratch();
        let (path, output) = (directory.path().join("in.tar"), directory.path().join("out.tar"));
        write(&path, &bytes);
        occyctl(["process", &tar_uri(&path), &tar_uri(&output)]).fails(1).says(&[says]);
        assert!(!output.exists(), "{what}");
        occyctl(["process", "tar://-", &tar_uri(&output)]).input(&bytes).fails(1).says(&[says]);
        assert!(!output.exists(), "{what}, through a pipe");
    }
    occyctl(["process", "tar:///nonexistent/in.tar", "tar://-"]).fails(1).says(&["/nonexistent/in.tar"]);
}

#[test]
fn a_compressed_layer_that_no_manifest_names_is_checked_against_its_diff_id() {
    let registry = Registry::start();
    let image = small();
    let good = saved::docker_v12(&[(&image, &["app:1"])]);
    let names = judge::names(&tar(&good));
    let layer = names.iter().rposition(|name| name.ends_with("layer.tar")).expect("a layer");
    let gzip = Packing::Gzip.pack(&image.layers[1].tar);
    let mut flipped = gzip.clone();
    flipped[gzip.len() / 2] ^= 1;
    let other = Packing::Gzip.pack(&tar(&[Member::file("other", "1")]));
    let directory = scratch();
    let path = directory.path().join("in.tar");
    let saved_with = |bytes: &[u8]| {
        let mut members = good.clone();
        members[layer] = Member::file(&names[layer], bytes);
        write(&path, tar(&members));
        tar_uri(&path)
    };
    for (what, bytes) in [("cut", &gzip[..gzip.len() - 9]), ("flipped", &flipped), ("other", &other)] {
        let destination = registry.uri(&format!("{what}:1"));
        occyctl(["process", &saved_with(bytes), &destination]).fails(1).says(&["layer 2 of 2"]);
        occyctl(["info", &destination]).fails(1).says(&["404"]);
    }
    let source = saved_with(&gzip);
    occyctl(["process", &source, &registry.uri("app:1")]).ok();
    occyctl(["process", &source, &registry.uri("app:1")]).ok();
    let pushed = registry.pull("app", "1");
    assert_eq!((&pushed.config, &pushed.blobs[1]), (&image.config, &gzip), "kept as it was saved");
    judge::skopeo_reads(&format!("docker://{}/app:1", registry.host()));
}
