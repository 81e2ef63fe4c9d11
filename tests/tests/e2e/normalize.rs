//! `normalize-timestamps`.

use occy_tests::image::{Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, header_types};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::{Pulled, Registry};
use occy_tests::tools::read;
use serde_json::Value;

use crate::{scratch, small, tar_uri};

fn normalized(image: &Image, filter: &str) -> Pulled {
    let registry = Registry::start();
    let source = registry.push(image, "in", "1");
    occyctl(["process", &source, &registry.uri("out:1"), "-f", filter]).ok();
    judge::skopeo_reads(&format!("docker://{}/out:1", registry.host()));
    registry.pull("out", "1")
}

fn times(tar: &[u8]) -> Vec<Value> {
    judge::members(tar).iter().map(|member| member["mtime"].clone()).collect()
}

#[test]
fn every_time_becomes_the_given_one_in_layers_and_config() {
    for (filter, seconds, text) in [
        ("normalize-timestamps", 0, "1970-01-01T00:00:00Z"),
        ("normalize-timestamps:ts=1000000000", 1_000_000_000, "2001-09-09T01:46:40Z"),
        ("normalize-timestamps:ts=2000000000,mode=set", 2_000_000_000, "2033-05-18T03:33:20Z"),
    ] {
        let copied = normalized(&small(), filter);
        for tar in &copied.tars {
            assert!(times(tar).iter().all(|time| *time == seconds), "{filter}: {:?}", times(tar));
        }
        let config = json_of(&copied.config);
        assert_eq!(config["created"], text);
        assert!(
            config["history"].as_array().expect("a list").iter().all(|step| step["created"] == text),
            "{config}"
        );
    }
}

#[test]
fn clamp_changes_later_times_only() {
    let image = Image::docker(vec![Layer::of(&[
        Member::file("early", "").mtime(5),
        Member::file("late", "").mtime(2_000_000_000),
    ])]);
    let copied = normalized(&image, "normalize-timestamps:ts=1000,mode=clamp");
    assert_eq!(times(&copied.tars[0]), [5, 1000]);
    assert_eq!(json_of(&copied.config)["created"], "1970-01-01T00:16:40Z");
}

/// A saved tar has places for its layers before they are there, by the sizes that they have at the source.
#[test]
fn layers_that_get_shorter_are_saved_as_well_as_those_that_do_not() {
    let registry = Registry::start();
    let directory = scratch();
    let plain = |name: &str| Layer::of(&[Member::file(name, name.repeat(5000))]);
    let longer = |name: &str| Layer::of(&[Member::file(name, "").pax("mtime", "1700000000.123456789")]);
    for (number, layers) in [
        vec![plain("a"), plain("b"), plain("c")],
        vec![longer("a"), plain("b"), plain("c")],
        vec![plain("a"), longer("b"), longer("c"), plain("d")],
        vec![plain("a"), plain("b"), longer("c")],
    ]
    .into_iter()
    .enumerate()
    {
        let source = registry.push(&Image::docker(layers), "app", &number.to_string());
        let file = directory.path().join(format!("{number}.tar"));
        occyctl(["process", &source, &tar_uri(&file), "-f", "normalize-timestamps"]).ok();
        occyctl(["check", &tar_uri(&file)]).ok();
        // On a pipe nothing has a place before it is whole.
        let piped = occyctl(["process", &source, "tar://-", "-f", "normalize-timestamps"]).ok();
        assert_eq!(read(&file), piped.stdout, "{number}");
    }
}

#[test]
fn records_of_other_times_go_and_all_other_records_stay() {
    let member = Member::file("f", "data")
        .pax("mtime", "1700000000.123456789")
        .pax("atime", "1700000001.5")
        .pax("ctime", "1700000002.5")
        .pax("LIBARCHIVE.creationtime", "1700000003")
        .pax("comment", "stays")
        .xattr(
            "security.capability",
            b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        );
    let copied = normalized(&Image::docker(vec![Layer::of(&[member])]), "normalize-timestamps");
    let found = &judge::members(&copied.tars[0])[0];
    assert_eq!(found["mtime"], 0);
    let keys: Vec<&String> = found["pax"].as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["SCHILY.xattr.security.capability", "comment"]);
}

#[test]
fn layers_that_have_the_time_already_keep_their_digests() {
    let old = Layer::of(&[Member::file("a", "a").mtime(0), Member::dir("d").mtime(0)]);
    let image = Image::docker(vec![old, Layer::of(&[Member::file("b", "b")])]);
    let copied = normalized(&image, "normalize-timestamps");
    assert_eq!(copied.document["layers"][0]["digest"], image.layer_digests()[0]);
    assert_ne!(copied.document["layers"][1]["digest"], image.layer_digests()[1]);
    let diff_ids = &json_of(&copied.config)["rootfs"]["diff_ids"];
    assert_eq!(diff_ids[0], image.diff_ids()[0]);
    assert_ne!(diff_ids[1], image.diff_ids()[1]);
}

#[test]
fn images_that_differ_in_times_only_become_one() {
    let at = |time: u64| {
        let layer = Layer::of(&[Member::dir("d").mtime(time), Member::file("d/f", "data").mtime(time + 1)]);
        Image::docker(vec![layer]).edit_config(|config| {
            config["created"] = format!("2020-01-01T00:00:{:02}Z", time % 60).into();
        })
    };
    let (one, two) =
        (normalized(&at(100), "normalize-timestamps"), normalized(&at(2_000_000), "normalize-timestamps"));
    assert_eq!(one.digest, two.digest);
}

#[test]
fn headers_for_all_members_have_no_time_of_their_own_either() {
    let at = |time: u64| {
        let record = "13 comment=x\n";
        let layer =
            Layer::of(&[Member::raw("g", b'g', record).mtime(time), Member::file("f", "data").mtime(time)]);
        Image::docker(vec![layer])
    };
    let (one, two) = (normalized(&at(5), "normalize-timestamps"), normalized(&at(6), "normalize-timestamps"));
    assert_eq!(one.digest, two.digest);
}

#[test]
fn a_second_pass_changes_nothing() {
    let registry = Registry::start();
    let source = registry.push(&small(), "in", "1");
    occyctl(["process", &source, &registry.uri("out:1"), "-f", "normalize-timestamps"]).ok();
    let (once, twice) = (registry.uri("out:1"), registry.uri("out:2"));
    occyctl(["process", &once, &twice, "-f", "normalize-timestamps"]).ok();
    assert_eq!(registry.digest("out", "1"), registry.digest("out", "2"));
}

#[test]
fn edited_members_are_ustar_or_pax_and_never_gnu_long_names() {
    let long = format!("{}/{}/{}", "a".repeat(100), "b".repeat(100), "c".repeat(100));
    let link = "../".repeat(60);
    let directory = crate::scratch();
    let layer = directory.path().join("layer.tar");
    occy_tests::tools::write(directory.path().join("root").join(&long), "data");
    std::os::unix::fs::symlink(&link, directory.path().join("root/link")).expect("a link");
    let layer_path = occy_tests::certificates::text(&layer);
    let root = occy_tests::certificates::text(&directory.path().join("root"));
    occy_tests::tools::tool("tar", ["--format=gnu", "-cf", &layer_path, "-C", &root, "."]);
    let tar = occy_tests::tools::read(&layer);
    assert!(header_types(&tar).contains('L') && header_types(&tar).contains('K'));
    let copied = normalized(&Image::docker(vec![Layer::from_tar(tar.clone())]), "normalize-timestamps");
    let types = header_types(&copied.tars[0]);
    assert!(!types.contains(['L', 'K']), "{types}");
    assert_eq!(judge::names(&copied.tars[0]), judge::names(&tar));
    let target = judge::members(&copied.tars[0]).into_iter().find(|member| member["name"] == "./link");
    assert_eq!(
        target.expect("the link")["link"],
        link.trim_end_matches('/').to_owned() + if link.ends_with('/') { "/" } else { "" }
    );
}

#[test]
fn wrong_options_are_usage_errors_that_say_what_is_expected() {
    for (filter, says) in [
        ("normalize-timestamps:ts=yesterday", "ts"),
        ("normalize-timestamps:mode=later", "mode"),
        ("normalize-timestamps:color=red", "color"),
        ("normalise", "normalise"),
        ("", "filter"),
    ] {
        occyctl(["process", "tar:///nonexistent", "tar://-", "-f", filter]).fails(2).says(&[says]);
    }
}
