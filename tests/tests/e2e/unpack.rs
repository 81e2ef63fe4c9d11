//! Trees of files: `dir://PATH?expand=true` and `oci://PATH`, beside what umoci makes of the same image, and under runc.

use std::path::Path;

use occy_tests::certificates::text;
use occy_tests::image::{Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, noise};
use occy_tests::occyctl::{Ended, kills, moment, occyctl, whole};
use occy_tests::registry::Registry;
use occy_tests::tools::{Packing, hex, read, run, tool, write};
use serde_json::{Value, json};

use crate::{names, scratch};

/// A capability set as the kernel stores it: CAP_NET_RAW, permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn unpacked(image: &Image, scheme: &str, into: &Path, more: &str) -> Ended {
    let registry = Registry::start();
    let source = registry.push(image, "app", "1");
    occyctl(["process", &source, &format!("{scheme}://{}{more}", text(into))]).ok()
}

/// The tree of an image as `oci://` makes it, having found that umoci's and `dir://`'s are the same.
#[track_caller]
fn agreed(image: &Image) -> Value {
    agreed_but(image, &[])
}

/// The same, but for the times of directories that umoci leaves at the moment when it hid something in them.
#[track_caller]
fn agreed_but(image: &Image, touched: &[&str]) -> Value {
    let registry = Registry::start();
    let source = registry.push(image, "app", "1");
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    occyctl(["process", &source, &format!("oci://{}", text(&at("ours")))]).ok();
    occyctl(["process", &source, &format!("dir://{}?expand=true", text(&at("dir"))), "-j", "1"]).ok();
    judge::umoci_unpacks(&format!("docker://{}/app:1", registry.host()), &at("theirs"));
    let ours = judge::tree(&at("ours/rootfs"));
    let dir = judge::tree(&at("dir/manifest"));
    assert_eq!(ours, dir, "both of ours are one");
    let theirs = judge::tree(&at("theirs/rootfs"));
    let names = |tree: &Value| tree.as_object().expect("a tree").keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs));
    for name in names(&ours) {
        let (mut our, mut their) = (ours[&name].clone(), theirs[&name].clone());
        if name == "." || touched.contains(&name.as_str()) {
            // umoci leaves the root the time at which its last entry was made; ours has the layer's.
            our["mtime"] = Value::Null;
            their["mtime"] = Value::Null;
        }
        assert_eq!(our, their, "{name}");
    }
    assert_eq!(ours["."]["mtime"], 1_600_000_000_000_000_000_i64);
    ours
}

fn root() -> Member {
    Member::dir("./").mtime(1_600_000_000)
}

#[test]
fn every_kind_of_file_with_all_that_it_has() {
    let tree = agreed(&Image::docker(vec![Layer::of(&[
        root(),
        Member::dir("d").mode(0o1777).owner(3, 4).mtime(1_500_000_000).xattr("user.d", "on a directory"),
        Member::file("d/plain", "data").mode(0o640).owner(1000, 2000).mtime(1_400_000_000),
        Member::file("d/empty", ""),
        Member::file("d/setuid", "x").mode(0o4755).owner(7, 8),
        Member::file("d/setgid", "x").mode(0o2755).owner(7, 8),
        Member::file("d/capable", "x").mode(0o755).owner(5, 5).xattr("security.capability", CAPABILITY),
        Member::file("d/attributes", "x")
            .xattr("user.a", "1")
            .xattr("user.b", "\0\u{1}")
            .xattr("trusted.t", "2"),
        Member::file("d/precise", "x").pax("mtime", "1234567890.123456789"),
        Member::file("d/before", "x").pax("mtime", "-1.5"),
        Member::symlink("d/link", "plain").owner(9, 9).mtime(1_300_000_000),
        Member::symlink("d/dangling", "/no/such/file"),
        Member::hardlink("d/hard", "d/plain"),
        Member::hardlink("hard", "./d/plain"),
        Member::device("d/null", 1, 3).mode(0o666).owner(2, 2),
        Member::fifo("d/pipe").mode(0o600),
        Member::dir("sealed").mode(0o000),
        Member::file("sealed/inside", "x"),
        Member::file(&format!("long/{}/{}", "n".repeat(120), "m".repeat(200)), "x"),
        Member::file("größe/名前", "x"),
        Member::dir("long").mtime(5),
        Member::dir(&format!("long/{}", "n".repeat(120))).mtime(6),
        Member::dir("größe").mtime(7),
    ])]));
    assert_eq!(tree["d/plain"]["links"], 3);
    assert_eq!(tree["d/precise"]["mtime"], 1_234_567_890_123_456_789_i64);
    assert_eq!(tree["d"]["mtime"], 1_500_000_000_000_000_000_i64, "although files came after it");
    assert_eq!(tree["d/setuid"]["mode"], "4755");
    assert_eq!(tree["sealed"]["mode"], "0");
}

#[test]
fn layers_hide_and_replace_what_is_below_them() {
    let base = Layer::of(&[
        root(),
        Member::dir("gone"),
        Member::file("gone/a", "a"),
        Member::dir("gone/b"),
        Member::file("gone/b/c", "c"),
        Member::dir("etc").mtime(1_111_111_111),
        Member::file("etc/removed", "x"),
        Member::file("etc/kept", "x"),
        Member::dir("etcetera"),
        Member::file("etcetera/kept", "a name that only begins like etc"),
        Member::dir("opaque").owner(1, 1).xattr("user.old", "1"),
        Member::file("opaque/old", "x"),
        Member::dir("opaque/deep"),
        Member::file("opaque/deep/old", "x"),
        Member::dir("was-dir"),
        Member::file("was-dir/x", "x"),
        Member::file("was-file", "x"),
        Member::symlink("was-link", "etc"),
        Member::file("shared", "one inode"),
        Member::hardlink("shared-too", "shared"),
        Member::symlink("etc-link", "etc"),
    ])
    .packed(Packing::GzipMembers);
    let top = Layer::of(&[
        Member::file(".wh.gone", ""),
        Member::file("etc/.wh.removed", ""),
        Member::file("etc/.wh.never-was", ""),
        Member::file("no/such/.wh.thing", ""),
        Member::dir("opaque").owner(2, 2).mode(0o700).xattr("user.new", "2"),
        Member::file("opaque/new", "stays although it stands before the whiteout"),
        Member::dir("opaque/deep"),
        Member::file("opaque/deep/new", "likewise"),
        Member::file("opaque/.wh..wh..opq", ""),
        Member::file("opaque/later", "x"),
        Member::file("was-dir", "now a file"),
        Member::dir("was-file"),
        Member::file("was-file/x", "x"),
        Member::dir("was-link"),
        Member::file("shared", "another inode"),
        Member::file("etc-link/through", "a link is followed inside the tree"),
        Member::file("etc-link/.wh.kept", ""),
        Member::dir("gone-and-back"),
    ]);
    let tree = agreed_but(&Image::docker(vec![base, top]), &["etc", "opaque", "opaque/deep"]);
    let is = |name: &str| !tree[name].is_null();
    assert!(!is("gone") && !is("etc/removed") && is("etcetera/kept") && !is("opaque/old"));
    assert!(is("opaque/new") && is("opaque/later") && is("opaque/deep/new") && !is("opaque/deep/old"));
    assert_eq!(tree["etc"]["mtime"], 1_111_111_111_000_000_000_i64, "files came and went");
    assert!(is("etc/through") && !is("etc/kept"));
    assert_eq!(tree["shared-too"]["links"], 1);
}

#[test]
fn a_layer_that_stands_twice_is_merged_twice() {
    let base = Layer::of(&[root(), Member::file("a", "1"), Member::file("b", "2")]);
    let middle = Layer::of(&[Member::file(".wh.a", ""), Member::file("b", "3")]);
    let tree = agreed(&Image::docker(vec![base.clone(), middle.clone(), base, middle.clone(), middle]));
    assert!(tree["a"].is_null());
    let base = Layer::of(&[root(), Member::file("a", "1"), Member::file("b", "2")]);
    let middle = Layer::of(&[Member::file(".wh.a", ""), Member::file("b", "3")]);
    let tree = agreed(&Image::docker(vec![base.clone(), middle, base]));
    assert!(!tree["a"].is_null());
}

#[test]
fn many_layers_are_merged_in_their_order_however_they_arrive() {
    let layers = (0..12)
        .map(|at| {
            let data = occy_tests::layer::noise(at, if at % 3 == 0 { 900_000 } else { 1000 });
            Layer::of(&[root(), Member::file("same", &data), Member::file(&format!("own-{at}"), &data)])
        })
        .collect();
    let image = Image::docker(layers);
    let expected = agreed(&image);
    for parallel in ["1", "3", "12"] {
        let directory = scratch();
        let registry = Registry::start();
        let source = registry.push(&image, "app", "1");
        let into = directory.path().join("out");
        occyctl(["process", &source, &format!("oci://{}", text(&into)), "-j", parallel]).ok();
        assert_eq!(judge::tree(&into.join("rootfs")), expected, "-j {parallel}");
    }
}

#[test]
fn filters_stand_before_the_tree() {
    let layers = vec![
        Layer::of(&[root(), Member::file("target", "data"), Member::hardlink("link", "target")]),
        Layer::of(&[Member::file("late", "x")]),
    ];
    let registry = Registry::start();
    let source = registry.push(&Image::docker(layers), "app", "1");
    let directory = scratch();
    for uri in ["oci://", "dir://"] {
        let into = directory.path().join(&uri[..3]);
        let uri = format!("{uri}{}{}", text(&into), if uri == "dir://" { "?expand=true" } else { "" });
        let filters = ["-f", "exclude:pattern=target", "-f", "normalize-timestamps:ts=7"];
        occyctl([&["process", &source, &uri], &filters[..]].concat()).ok();
        let root = if uri.starts_with("oci") { "rootfs" } else { "manifest" };
        let tree = judge::tree(&into.join(root));
        assert!(tree["target"].is_null());
        assert_eq!((&tree["link"]["size"], &tree["link"]["links"]), (&json!(4), &json!(1)));
        assert_eq!(tree["late"]["mtime"], 7_000_000_000_i64);
    }
}

/// What is tried on a tree in `PATH/out/rootfs` must leave `PATH/secret` alone; whether the image is refused or not.
#[track_caller]
fn escapes(name: &str, lower: &[Member], upper: &[Member], code: i32) {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::of(lower), Layer::of(upper)]);
    let source = registry.push(&image, "app", "1");
    for (scheme, root, more) in [("oci", "rootfs", ""), ("dir", "manifest", "?expand=true")] {
        let directory = scratch();
        let outside = directory.path().join("secret");
        write(outside.join("file"), "secret");
        write(outside.join("victim"), "victim");
        let before = judge::tree(&outside);
        let out = directory.path().join("out");
        let ended = occyctl(["process", &source, &format!("{scheme}://{}{more}", text(&out))]).run();
        assert_eq!(ended.status.code(), Some(code), "{name}: {}", ended.stderr);
        assert_eq!(judge::tree(&outside), before, "{name}");
        assert_eq!(
            names(directory.path()),
            if code == 0 { vec!["out", "secret"] } else { vec!["secret"] },
            "{name}"
        );
        if code == 0 {
            let tree = judge::tree(&out.join(root)).to_string();
            assert!(!tree.contains(&occy_tests::tools::sha256(b"secret")[7..]), "{name}: {tree}");
        }
    }
}

#[test]
fn dots_and_absolute_names_stay_inside() {
    let up = "../".repeat(12);
    escapes(
        "..",
        &[],
        &[Member::file("../secret/file", "evil"), Member::file("../../secret/new", "evil")],
        0,
    );
    escapes("many ..", &[], &[Member::file(&format!("{up}tmp/occy-evil"), "evil")], 0);
    escapes(
        "absolute",
        &[],
        &[Member::file("/occy-evil", "evil"), Member::file("//x//y/../../occy-evil", "e")],
        0,
    );
    assert!(!Path::new("/occy-evil").exists() && !Path::new("/tmp/occy-evil").exists());
    escapes(
        "dots within",
        &[Member::dir("a"), Member::file("a/file", "")],
        &[Member::file("a/../../secret/file", "evil"), Member::dir("a/..")],
        0,
    );
}

#[test]
fn symlinks_are_followed_inside_only() {
    let to_secret = [
        Member::symlink("relative", "../../secret"),
        Member::symlink("absolute", "/secret"),
        Member::symlink("up", "../../../../../../../../../../.."),
        Member::symlink("chain", "relative"),
        Member::symlink("magic", "/proc/self/root"),
    ];
    for name in ["relative", "absolute", "up", "chain", "magic"] {
        let through = [
            Member::file(&format!("{name}/file"), "evil"),
            Member::dir(&format!("{name}/sub")),
            Member::symlink(&format!("{name}/link"), "x"),
            Member::file(&format!("{name}/.wh.victim"), ""),
            Member::file(&format!("{name}/.wh..wh..opq"), ""),
        ];
        escapes(name, &to_secret, &through, 0);
        escapes("in one layer", &[], &[&to_secret[..], &through].concat(), 0);
    }
    // A file is written in place of a link, never through it.
    escapes(
        "over a link",
        &[Member::symlink("link", "../../secret/file"), Member::symlink("dir", "../../secret")],
        &[
            Member::file("link", "evil"),
            Member::dir("dir").mode(0o700).owner(9, 9),
            Member::file("dir/file", "evil"),
        ],
        0,
    );
    escapes("a loop", &[Member::symlink("a", "b"), Member::symlink("b", "a")], &[Member::file("a/x", "")], 1);
}

#[test]
fn hard_links_link_inside_only() {
    for target in
        ["../secret/file", "/secret/file", "../../../../../../../etc/hostname", "/etc/hostname", "missing"]
    {
        escapes(target, &[], &[Member::hardlink("link", target)], 1);
    }
    let through = Member::symlink("out", "../../secret");
    escapes("through a link", &[through], &[Member::hardlink("link", "out/file")], 1);
    let link = Member::symlink("out", "../../secret/file");
    escapes("to a link", &[link], &[Member::hardlink("link", "out"), Member::file("link", "evil")], 0);
    escapes("to the root", &[], &[Member::hardlink("link", "/")], 1);
    escapes("to a directory", &[Member::dir("d")], &[Member::hardlink("link", "d")], 1);
}

#[test]
fn whiteouts_hide_inside_only() {
    for name in [".wh.", ".wh..", ".wh...", "d/.wh...", "d/.wh.."] {
        escapes(name, &[Member::dir("d")], &[Member::file(name, "")], 1);
    }
    escapes(
        "..",
        &[],
        &[Member::file("../secret/.wh.file", ""), Member::file("../secret/.wh..wh..opq", "")],
        0,
    );
    escapes("a link", &[Member::symlink("l", "../../secret")], &[Member::file(".wh.l", "")], 0);
    escapes(
        "links in a hidden tree",
        &[Member::dir("d"), Member::symlink("d/l", "../../../secret"), Member::hardlink("d/h", "d/l")],
        &[Member::file(".wh.d", "")],
        0,
    );
    escapes(
        "links in a replaced tree",
        &[Member::dir("d"), Member::symlink("d/l", "../../../secret")],
        &[Member::file("d", "")],
        0,
    );
}

#[test]
fn the_root_is_a_directory_and_nothing_else() {
    for name in [".", "./", "/", "a/.."] {
        escapes(name, &[], &[Member::symlink(name, "../../secret"), Member::file("file", "evil")], 1);
        escapes(name, &[], &[Member::hardlink(name, "x")], 1);
    }
}

#[test]
fn bombs_of_names_and_holes_are_refused() {
    let directory = scratch();
    let deep = "d/".repeat(1500);
    let image = Image::docker(vec![
        Layer::of(&[Member::dir(&deep), Member::symlink("s", &deep)]),
        Layer::of(&[Member::file(&format!("s/{deep}x"), "deep"), Member::file("a".repeat(300).as_str(), "")]),
    ]);
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let uri = format!("oci://{}", text(&directory.path().join("out")));
    occyctl(["process", &source, &uri]).fails(1).says(&["failed to create"]);
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0, "however deep it is");

    let holes = Member::file("sparse", "")
        .pax("GNU.sparse.major", "1")
        .pax("GNU.sparse.minor", "0")
        .pax("GNU.sparse.name", "sparse")
        .pax("GNU.sparse.realsize", (1_u64 << 62).to_string());
    let source = registry.push(&Image::docker(vec![Layer::of(&[holes])]), "holes", "1");
    occyctl(["process", &source, &uri]).fails(1);
}

#[test]
fn a_file_in_the_way_of_a_directory_is_an_error_that_names_it() {
    let image = Image::docker(vec![Layer::of(&[Member::file("a", ""), Member::file("a/b", "")])]);
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let uri = format!("oci://{}", text(&directory.path().join("out")));
    occyctl(["process", &source, &uri]).fails(1).says(&["\"/a/b\"", "layer 1 of 1"]);
}

fn hello() -> String {
    let tar = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/hello.tar");
    crate::tar_uri(&tar)
}

/// Runs a bundle without a terminal.
fn runc(bundle: &Path) -> String {
    let path = bundle.join("config.json");
    let mut config = json_of(&read(&path));
    config["process"]["terminal"] = false.into();
    write(&path, config.to_string());
    let name = judge::unique_name("runc");
    let state = scratch();
    let arguments = ["--root", &text(state.path()), "run", "--bundle", &text(bundle), &name];
    let output = run("runc", arguments, b"");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "runc run: {said}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn runc_runs_a_bundle() {
    let directory = scratch();
    for more in ["", "?rootless=true"] {
        let bundle = directory.path().join(format!("bundle{}", more.len()));
        occyctl(["process", &hello(), &format!("oci://{}{more}", text(&bundle))]).ok();
        let said = runc(&bundle);
        assert!(said.to_lowercase().contains("hello"), "{said}");
    }
}

#[test]
fn a_bundles_config_is_converted_as_umoci_does() {
    let registry = Registry::start();
    let image = crate::small().edit_config(|config| {
        config["config"] = json!({
            "Entrypoint": ["/bin/app"], "Cmd": ["x", "y"], "Env": ["PATH=/bin", "A=b"], "WorkingDir": "/etc",
            "User": "1000:50", "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGINT", "Labels": {"a": "b"},
            "Volumes": {"/data": {}},
        });
        config["author"] = "somebody".into();
    });
    registry.push(&image, "app", "1");
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    let source = format!("registry://{}/app:1", registry.host());
    occyctl(["process", &source, &format!("oci://{}", text(&at("ours")))]).ok();
    judge::umoci_unpacks(&format!("docker://{}/app:1", registry.host()), &at("theirs"));
    let (ours, theirs) = (json_of(&read(at("ours/config.json"))), json_of(&read(at("theirs/config.json"))));
    for key in ["args", "cwd", "user"] {
        assert_eq!(ours["process"][key], theirs["process"][key], "{key}");
    }
    let annotations = theirs["annotations"].as_object().expect("annotations");
    for (name, value) in annotations {
        assert_eq!(&ours["annotations"][name], value, "{name}");
    }
    let env: Vec<_> = theirs["process"]["env"].as_array().expect("a list").iter().collect();
    for variable in env {
        let list = ours["process"]["env"].as_array().expect("a list");
        assert!(list.contains(variable), "{variable}: {list:?}");
    }
}

#[test]
fn an_unknown_user_is_named_and_nothing_is_left() {
    let image = crate::small().edit_config(|config| config["config"]["User"] = "nobody-here".into());
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let uri = format!("oci://{}", text(&directory.path().join("out")));
    occyctl(["process", &source, &uri]).fails(1).says(&["nobody-here", "etc/passwd"]);
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);
}

#[test]
fn a_shared_directory_has_a_tree_for_each_image() {
    let registry = Registry::start();
    let first = Image::docker(crate::layers());
    let more = Layer::of(&[Member::file("new", "x"), Member::file("etc/.wh.app.conf", "")]);
    let second = Image::docker([crate::layers(), vec![more]].concat());
    let directory = scratch();
    let path = directory.path().join("images");
    let uri = format!("dir://{}?unique_names=true&expand=true", text(&path));
    for (name, image) in [("first", &first), ("second", &second), ("first", &second)] {
        let source = registry.push(image, name, "1");
        occyctl(["process", &source, &uri]).ok();
    }
    let mut names = names(&path);
    names.retain(|name| name.starts_with("manifest-") || name.contains("partial"));
    assert_eq!(names.len(), 4, "two manifests and two trees: {names:?}");
    for name in names.iter().filter(|name| !name.ends_with(".json")) {
        let tree = judge::tree(&path.join(name));
        assert!(tree["etc/app.conf"].is_null() && !tree["etc/late"].is_null() && !tree["new"].is_null());
    }
}

#[test]
fn without_root_what_is_left_out_is_said_once() {
    let layer = Layer::of(&[
        root(),
        Member::dir("d").mode(0o500).owner(3, 4).mtime(1_500_000_000),
        Member::file("d/file", "data").owner(1000, 2000).mode(0o4755).mtime(9),
        Member::device("d/null", 1, 3),
        Member::fifo("d/pipe"),
        Member::hardlink("d/hard", "d/file"),
        Member::file("d/capable", "x").xattr("security.capability", CAPABILITY).xattr("user.a", "b"),
    ]);
    let upper = Layer::of(&[Member::file("d/late", "x"), Member::file("d/.wh.pipe", "")]);
    let directory = scratch();
    let registry = Registry::start();
    let source = registry.push(&Image::docker(vec![layer, upper]), "app", "1");
    tool_as_nobody(&source, directory.path());
    let tree = judge::tree(&directory.path().join("open/out/rootfs"));
    assert_eq!(
        (&tree["d"]["mode"], &tree["d"]["mtime"]),
        (&json!("500"), &json!(1_500_000_000_000_000_000_i64))
    );
    assert_eq!((&tree["d/file"]["mode"], &tree["d/file"]["links"]), (&json!("4755"), &json!(2)));
    assert!(tree["d/null"].is_null() && tree["d/pipe"].is_null() && !tree["d/late"].is_null());
    assert_eq!(tree["d/capable"]["xattrs"], json!({"user.a": "62"}));
}

/// Makes a bundle as a user who is nobody.
fn tool_as_nobody(source: &str, directory: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let open = directory.join("open");
    std::fs::create_dir(&open).expect("a directory");
    for path in [directory, &open] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("permissions");
    }
    let program = open.join("occyctl");
    // By another process: a copy that is open for writing here is so in every child that another test starts meanwhile, and what
    // is open for writing cannot be run.
    tool("cp", [occy_tests::occyctl::path(), &program]);
    let uri = format!("oci://{}", text(&open.join("out")));
    let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let program = text(&program);
    let temp = text(&open);
    let output = run(
        "setpriv",
        [&nobody[..], &[&program, "process", source, &uri, "--temp-dir", &temp]].concat(),
        b"",
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 devices") && said.contains("extended attributes"), "{said}");
    assert_eq!(said.matches("unpacked without").count(), 1, "{said}");
}

#[test]
fn a_real_image_unpacks_as_umoci_has_it() {
    let registry = Registry::start();
    occyctl(["process", &hello(), &registry.uri("hello:1")]).ok();
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    let source = registry.uri("hello:1");
    occyctl(["process", &source, &format!("oci://{}", text(&at("ours")))]).ok();
    judge::umoci_unpacks(&format!("docker://{}/hello:1", registry.host()), &at("theirs"));
    let (mut ours, mut theirs) = (judge::tree(&at("ours/rootfs")), judge::tree(&at("theirs/rootfs")));
    // No layer says what the root is; umoci leaves it the time of the unpacking.
    for tree in [&mut ours, &mut theirs] {
        tree["."]["mtime"] = Value::Null;
    }
    assert_eq!(ours, theirs);
}

#[test]
fn a_bundle_replaces_another_only_by_force() {
    let directory = scratch();
    let out = directory.path().join("out");
    let image = crate::small();
    unpacked(&image, "oci", &out, "");
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let uri = format!("oci://{}", text(&out));
    occyctl(["process", &source, &uri]).fails(1).says(&["not empty", "--force"]);
    let before = judge::tree(&out.join("rootfs"));
    occyctl(["process", &source, &uri, "--force"]).ok();
    assert_eq!(judge::tree(&out.join("rootfs")), before);
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 1);
}

/// Kills runs to a destination at many moments: it is as before or complete, and the next run removes what they left.
fn killed(scheme: &str, more: &str, tree: &str) {
    let layers = (0..3)
        .map(|at| {
            let mut members =
                vec![root(), Member::dir("d"), Member::file(&format!("noise-{at}"), noise(at, 300_000))];
            members.extend((0..150).map(|file| Member::file(&format!("d/{at}-{file}"), "data")));
            Layer::of(&members)
        })
        .collect();
    let registry = Registry::start();
    let source = registry.push(&Image::docker(layers), "app", "1");
    let directory = scratch();
    let out = directory.path().join("out");
    let uri = format!("{scheme}://{}{more}", text(&out));
    let time = whole(|| occyctl(["process", &source, &uri, "--force"]).ok());
    let complete = judge::tree(&out.join(tree));
    for kill in 0..kills() {
        std::fs::remove_dir_all(&out).expect("a directory");
        write(out.join("catalog.json"), "{}");
        let mut child = occyctl(["process", &source, &uri, "--force"]).start();
        std::thread::sleep(moment(time, kill));
        drop(child.kill());
        child.wait().expect("a child can be waited for");
        if out.join(tree).exists() {
            assert_eq!(judge::tree(&out.join(tree)), complete, "{scheme}{more}: kill {kill}");
        } else {
            assert_eq!(read(out.join("catalog.json")), b"{}", "{scheme}{more}: kill {kill}");
        }
        occyctl(["process", &source, &uri, "--force"]).ok();
        assert_eq!(judge::tree(&out.join(tree)), complete, "after kill {kill}");
        let left = [names(directory.path()), names(&out)].concat();
        assert!(left.iter().all(|name| !name.contains("partial")), "{scheme}{more}: kill {kill}: {left:?}");
    }
}

#[test]
fn a_killed_run_leaves_the_directory_as_it_was() {
    killed("dir", "?expand=true", "manifest");
}

#[test]
fn a_killed_run_leaves_a_shared_directory_consistent() {
    let registry = Registry::start();
    let image = Image::docker((0..3).map(|seed| Layer::noise(seed, 600_000)).collect());
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let out = directory.path().join("out");
    let uri = format!("dir://{}?unique_names=true&expand=true", text(&out));
    let time = whole(|| occyctl(["process", &source, &uri]).ok());
    for kill in 0..kills() {
        std::fs::remove_dir_all(&out).expect("a directory");
        let mut child = occyctl(["process", &source, &uri]).start();
        std::thread::sleep(moment(time, kill));
        drop(child.kill());
        child.wait().expect("a child can be waited for");
        for again in [false, true] {
            if again {
                occyctl(["process", &source, &uri]).ok();
            }
            let Ok(catalog) = std::fs::read(out.join("catalog.json")) else {
                assert!(!again, "the next run completes it");
                continue;
            };
            let catalog = json_of(&catalog);
            let name =
                catalog[format!("{}/app", registry.host())]["1"].as_str().expect("an entry").to_owned();
            let manifest = json_of(&read(out.join(&name)));
            for (path, layer) in manifest[0]["Layers"].as_array().expect("layers").iter().zip(&image.layers) {
                assert!(read(out.join(path.as_str().expect("a path"))) == layer.tar, "kill {kill}");
            }
            let tree = judge::tree(&out.join(name.trim_end_matches(".json")));
            assert!(!tree["data/noise-2"].is_null(), "kill {kill}");
        }
        let left = names(&out);
        assert!(left.iter().all(|name| !name.contains("partial")), "kill {kill}: {left:?}");
    }
}

#[test]
fn a_killed_update_of_a_shared_image_leaves_its_manifest_and_its_tree_the_old_or_the_new_ones() {
    let images = ["one", "two"].map(|name| {
        let files = (0..200).map(|file| Member::file(&format!("d/{name}-{file}"), "data"));
        let members = [root(), Member::dir("d")].into_iter().chain(files);
        Image::docker(vec![Layer::of(&members.collect::<Vec<_>>())])
    });
    let registry = Registry::start();
    let directory = scratch();
    let out = directory.path().join("out");
    let uri = format!("dir://{}?unique_names=true&expand=true", text(&out));
    let process = |image: &Image| occyctl(["process", &registry.push(image, "app", "1"), &uri]);
    process(&images[1]).ok();
    let time = whole(|| process(&images[0]).ok());
    // Which image the catalog leads to; its tree has to be the same one's.
    let found = || {
        let catalog = json_of(&read(out.join("catalog.json")));
        let name = catalog[format!("{}/app", registry.host())]["1"].as_str().expect("an entry").to_owned();
        let config = json_of(&read(out.join(&name)))[0]["Config"].clone();
        let is_its = |image: &&Image| config == format!("{}.json", hex(&image.config_digest()));
        let image = images.iter().position(|image| is_its(&image)).expect("it is one of the two");
        let tree = judge::tree(&out.join(name.trim_end_matches(".json")));
        for file in 0..200 {
            assert!(!tree[format!("d/{}-{file}", ["one", "two"][image])].is_null(), "{name}");
        }
        image
    };
    for (kill, next) in (0..kills()).zip([1, 0].into_iter().cycle()) {
        let mut child = process(&images[next]).start();
        std::thread::sleep(moment(time, kill));
        drop(child.kill());
        child.wait().expect("a child can be waited for");
        found();
        process(&images[next]).ok();
        assert_eq!(found(), next);
        let mut left = names(&out);
        left.retain(|name| name.contains("manifest-"));
        assert_eq!(left.len(), 2, "kill {kill}: {left:?}");
    }
}

#[test]
fn a_killed_run_leaves_the_bundle_as_it_was() {
    killed("oci", "", "rootfs");
}
