//! What GNU tar made, rewritten, as Python's tarfile and GNU tar read it: entry by entry the same but for what was asked.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use occy_tests::certificates::text;
use occy_tests::image::Image;
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::saved::read_saved;
use occy_tests::tools::{read, run, tool, write};
use serde_json::Value;

use crate::{scratch, tar_uri};

/// A tree with one of everything that a layer may hold.
fn tree(root: &Path) {
    let at = |name: &str| text(&root.join(name));
    write(at("removed/me"), "x");
    write(at("etc/app.conf"), "conf");
    write(at("bin/tool"), vec![1; 70_000]);
    write(at(&format!("{}/{}/deep", "d".repeat(120), "e".repeat(120))), "deep");
    write(at("ünï/codé/ファイル"), "utf-8");
    std::fs::hard_link(at("bin/tool"), at("bin/zz-link")).expect("a hard link");
    std::os::unix::fs::symlink("../etc/app.conf", at("bin/soft")).expect("a link");
    std::os::unix::fs::symlink("/t".repeat(80), at("bin/far")).expect("a link");
    tool("mkfifo", [at("pipe")]);
    tool("truncate", ["-s", "300000", &at("sparse")]);
    tool(
        "dd",
        [
            "if=/dev/zero",
            &format!("of={}", at("sparse")),
            "bs=1",
            "count=5",
            "seek=200000",
            "conv=notrunc",
            "status=none",
        ],
    );
    tool("chmod", ["4755", &at("bin/tool")]);
    tool("touch", ["-d", "@1600000000.123456789", &at("etc/app.conf")]);
    let latin = std::ffi::OsStr::from_bytes(b"caf\xe9");
    std::fs::write(root.join(latin), "not UTF-8").expect("a file");
    // Not everybody may: then the archive has less to keep, and the comparison holds all the same.
    for (program, arguments) in [
        ("mknod", vec![at("null"), "c".into(), "1".into(), "3".into()]),
        ("chown", vec!["1234:5678".into(), at("etc/app.conf")]),
        ("setcap", vec!["cap_net_raw+ep".into(), at("bin/tool")]),
        (
            "setfattr",
            vec!["-n".into(), "user.note".into(), "-v".into(), "0sAP8KdHdv".into(), at("etc/app.conf")],
        ),
    ] {
        run(program, arguments, b"");
    }
}

fn archive(root: &Path, arguments: &[&str]) -> Vec<u8> {
    let root = text(root);
    let fixed = ["--sort=name", "-cf", "-", "-C", &root, "."];
    occy_tests::tools::pipe("tar", [arguments, &fixed].concat(), b"")
}

fn rewritten(tar: &[u8], filter: &str) -> Vec<u8> {
    all_rewritten(&[tar.to_vec()], filter).remove(0)
}

/// Each of the tars as a layer of one image.
fn all_rewritten(tars: &[Vec<u8>], filter: &str) -> Vec<Vec<u8>> {
    let registry = Registry::start();
    let layers = tars.iter().map(|tar| Layer::from_tar(tar.clone())).collect();
    let source = registry.push(&Image::oci(layers), "in", "1");
    let directory = scratch();
    let path = directory.path().join("out.tar");
    occyctl(["process", &source, &tar_uri(&path), "-f", filter]).ok();
    read_saved(&path).tars
}

const FORMATS: [&[&str]; 13] = [
    &["--format=gnu"],
    &["--format=gnu", "--sparse"],
    &["--format=posix", "--xattrs", "--xattrs-include=*", "--acls"],
    &["--format=posix", "--sparse", "--xattrs", "--xattrs-include=*"],
    &["--format=oldgnu"],
    &["--format=posix", "--sparse", "--sparse-version=0.0"],
    &["--format=posix", "--sparse", "--sparse-version=0.1"],
    // Records for all members that follow, a volume's name, and a blocking factor of one.
    &["--format=posix", "--pax-option=globexthdr.name=g,comment=for all,SCHILY.xattr.user.all=x"],
    &["--format=posix", "--pax-option=mtime=12345,atime=5,ctime=6"],
    &["--format=gnu", "--label=a volume", "--blocking-factor=1"],
    &["--format=posix", "--label=a volume", "--pax-option=delete=mtime"],
    // Numbers that no octal field holds.
    &["--format=gnu", "--owner=u:5000000", "--group=g:6000000", "--mtime=@-5"],
    &["--format=posix", "--owner=u:5000000", "--group=g:6000000", "--mtime=@99999999999.5"],
];

#[test]
fn what_exclude_leaves_is_as_it_was_in_every_format() {
    let directory = scratch();
    let root = directory.path().join("root");
    tree(&root);
    let originals = FORMATS.map(|arguments| archive(&root, arguments));
    let rewritten = all_rewritten(&originals, "exclude:pattern=removed");
    for ((original, rewritten), arguments) in originals.iter().zip(&rewritten).zip(FORMATS) {
        let mut expected = judge::members(original);
        expected.retain(|member| !member["name"].as_str().is_some_and(|name| name.starts_with("./removed")));
        assert_eq!(judge::members(rewritten), expected, "{arguments:?}");
    }
}

#[test]
fn normalizing_changes_times_and_nothing_else_in_every_format() {
    let directory = scratch();
    let root = directory.path().join("root");
    tree(&root);
    let originals = FORMATS.map(|arguments| archive(&root, arguments));
    let rewritten = all_rewritten(&originals, "normalize-timestamps");
    for ((original, rewritten), arguments) in originals.iter().zip(&rewritten).zip(FORMATS) {
        let timeless = |tar: &[u8]| -> Vec<Value> {
            let mut members = judge::members(tar);
            for member in &mut members {
                member["mtime"] = 0.into();
                // An edited sparse file becomes a regular one with its data; names and sizes have no record when ustar holds them.
                if member["type"] == "S" {
                    member["type"] = "0".into();
                }
                member["sparse"] = Value::Null;
                let pax = member["pax"].as_object_mut().expect("an object");
                pax.retain(|key, _| key.starts_with("SCHILY."));
            }
            members
        };
        assert_eq!(timeless(rewritten), timeless(original), "{arguments:?}");
        let listing = judge::gnu_listing(rewritten);
        // A volume's line shows the time of its header, which is of no file.
        let mut files = listing.lines().filter(|line| !line.starts_with('V'));
        assert!(files.all(|line| line.contains(" 1970-01-01 00:00:00")), "{arguments:?}\n{listing}");
        assert_eq!(listing.lines().count(), judge::gnu_listing(original).lines().count());
    }
}

#[test]
fn a_rewritten_layer_unpacks_to_the_same_tree() {
    let directory = scratch();
    let root = directory.path().join("root");
    tree(&root);
    let rewritten = rewritten(&archive(&root, &["--format=posix", "--sparse"]), "normalize-timestamps");
    let (layer, unpacked) = (directory.path().join("layer.tar"), directory.path().join("unpacked"));
    write(&layer, rewritten);
    std::fs::create_dir(&unpacked).expect("a directory");
    tool("tar", ["-xpf", &text(&layer), "-C", &text(&unpacked)]);
    let differences = run("diff", ["-r", "--no-dereference", &text(&root), &text(&unpacked)], b"");
    let said = String::from_utf8_lossy(&differences.stdout);
    // diff does not compare pipes and devices; it says so of each.
    assert!(said.lines().all(|line| line.contains("is a fifo") || line.contains("special file")), "{said}");
}

#[test]
fn order_duplicates_prefixes_and_unknown_types_survive() {
    let original = tar(&[
        Member::file("./b", "1"),
        Member::file("a", "2"),
        Member::file("./b", "3"),
        Member::raw("odd", b'7', "contiguous"),
        Member::file("removed", ""),
        Member::dir("./"),
        Member::file("no-padding-needed", [9; 512]),
    ]);
    let rewritten = rewritten(&original, "exclude:pattern=removed");
    let mut expected = judge::members(&original);
    expected.retain(|member| member["name"] != "removed");
    assert_eq!(judge::members(&rewritten), expected);
}

#[test]
fn a_size_in_a_pax_record_wins_over_the_header_as_everywhere() {
    // CVE-2025-62518: who believes the header reads the data as members.
    let hidden = tar(&[Member::file("smuggled", "x")]);
    let original = tar(&[
        Member::file("outer", &hidden).stating_size(0).pax("size", hidden.len().to_string()),
        Member::file("removed", ""),
        Member::file("after", "y"),
    ]);
    assert_eq!(judge::names(&original), ["outer", "removed", "after"]);
    let rewritten = rewritten(&original, "exclude:pattern=removed");
    assert_eq!(judge::names(&rewritten), ["outer", "after"]);
    assert_eq!(judge::members(&rewritten)[0]["size"], hidden.len());
    assert_eq!(judge::gnu_listing(&rewritten).lines().count(), 2);
}

#[test]
fn records_before_a_long_name_are_of_the_member_behind_it() {
    let name = "long/".repeat(40);
    let data = "data".repeat(300);
    let size = format!("{} size={}\n", 13, data.len());
    let original = tar(&[
        Member::raw("x", b'x', &size),
        Member::raw("././@LongLink", b'L', format!("{name}file\0")),
        Member::file("short", &data).stating_size(0),
        Member::file("removed", ""),
        Member::file("after", "y"),
    ]);
    assert_eq!(judge::names(&original), [&format!("{name}file"), "removed", "after"]);
    let rewritten = rewritten(&original, "exclude:pattern=removed");
    assert_eq!(judge::names(&rewritten), [&format!("{name}file"), "after"]);
    assert_eq!(judge::members(&rewritten)[0]["size"], data.len());
}

#[test]
fn bytes_behind_the_end_marker_belong_to_the_layer() {
    let registry = Registry::start();
    let mut long = tar(&[Member::file("a", "a")]);
    long.resize(long.len() + 20_000, 0);
    let image = Image::docker(vec![Layer::from_tar(long.clone())]);
    let source = registry.push(&image, "in", "1");
    let directory = scratch();
    let path = directory.path().join("out.tar");
    occyctl(["process", &source, &tar_uri(&path)]).ok();
    assert_eq!(read_saved(&path).tars[0], long);
    occyctl(["process", &source, &tar_uri(&path), "-f", "search:pattern=a"]).ok();
    assert_eq!(read_saved(&path).tars[0], long);
    occyctl(["check", &source]).ok();
    assert!(read(&path).len() > 20_000);
}
