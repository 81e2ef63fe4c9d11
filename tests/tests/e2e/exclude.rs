//! `exclude`.

use occy_tests::image::{Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::{Pulled, Registry};

fn excluded(image: &Image, patterns: &str) -> Pulled {
    let registry = Registry::start();
    let source = registry.push(image, "in", "1");
    occyctl(["process", &source, &registry.uri("out:1"), "-f", &format!("exclude:pattern={patterns}")]).ok();
    judge::skopeo_reads(&format!("docker://{}/out:1", registry.host()));
    registry.pull("out", "1")
}

#[track_caller]
fn check(members: &[Member], patterns: &str, expected: &[&str]) {
    let copied = excluded(&Image::docker(vec![Layer::of(members)]), patterns);
    assert_eq!(judge::names(&copied.tars[0]), expected, "{patterns}");
}

#[test]
fn several_patterns_are_separated_by_commas() {
    let members = [Member::file("a.pyc", ""), Member::file("b.py", ""), Member::file("c.log", "")];
    check(&members, "*.pyc,*.log", &["b.py"]);
}

#[test]
fn a_directory_goes_with_all_that_is_in_it() {
    let members = [
        Member::dir("src"),
        Member::dir("src/.git"),
        Member::file("src/.git/HEAD", ""),
        Member::dir("src/.git/refs"),
        Member::file("src/.git/refs/x", ""),
        Member::file("src/.gitignore", ""),
        Member::file("src/main.rs", ""),
    ];
    check(&members, "**/.git", &["src", "src/.gitignore", "src/main.rs"]);
    check(&members, "src", &[]);
}

#[test]
fn contents_of_a_directory_may_go_while_it_stays() {
    let members = [
        Member::dir("var"),
        Member::dir("var/cache"),
        Member::file("var/cache/a", ""),
        Member::dir("var/cache/d"),
        Member::file("var/cache/d/b", ""),
    ];
    check(&members, "var/cache/**", &["var", "var/cache"]);
}

#[test]
fn globs_are_matched_with_the_cleaned_path() {
    let members = [
        Member::dir("./"),
        Member::dir("./etc"),
        Member::file("./etc/a.conf", ""),
        Member::file("/etc/b.conf", ""),
        Member::file("etc//c.conf", ""),
        Member::file("./etc/keep", ""),
    ];
    let copied = excluded(&Image::docker(vec![Layer::of(&members)]), "etc/*.conf");
    let names = judge::names(&copied.tars[0]);
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names.iter().any(|name| name == "./etc/keep"), "names stay as they are written: {names:?}");
}

#[test]
fn exclude_keeps_hardlinks_to_surviving_files() {
    let members = [
        Member::file("gone", "data").mode(0o755).owner(7, 8).xattr("user.x", "y"),
        Member::hardlink("first", "gone"),
        Member::hardlink("second", "gone"),
    ];
    let copied = excluded(&Image::docker(vec![Layer::of(&members)]), "gone");
    let found = judge::members(&copied.tars[0]);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(
        (&found[0]["name"], &found[0]["type"]),
        (&"first".into(), &"0".into()),
        "the first survivor is the file"
    );
    assert_eq!(found[0]["sha256"], occy_tests::tools::sha256(b"data")[7..]);
    assert_eq!(
        (&found[0]["mode"], &found[0]["uid"], &found[0]["gid"]),
        (&0o755.into(), &7.into(), &8.into())
    );
    assert_eq!(found[0]["pax"]["SCHILY.xattr.user.x"], "y");
    assert_eq!((&found[1]["type"], &found[1]["link"]), (&"1".into(), &"first".into()));
}

#[test]
fn a_removed_hardlink_leaves_its_target_alone() {
    check(
        &[Member::file("a", "data"), Member::hardlink("b", "a"), Member::hardlink("c", "a")],
        "b",
        &["a", "c"],
    );
}

#[test]
fn whiteouts_stay_or_deleted_files_would_reappear() {
    let base = Layer::of(&[Member::dir("etc"), Member::file("etc/secret", "s")]);
    let top = Layer::of(&[
        Member::file("etc/.wh.secret", ""),
        Member::file("etc/.wh..wh..opq", ""),
        Member::file("etc/x.log", ""),
    ]);
    let copied = excluded(&Image::docker(vec![base, top]), "**/*.log,etc/.wh.secret,.wh.*");
    assert_eq!(judge::names(&copied.tars[1]), ["etc/.wh.secret", "etc/.wh..wh..opq"]);
}

#[test]
fn layers_without_a_match_keep_their_digests() {
    let image = Image::oci(vec![Layer::of(&[Member::file("a", "")]), Layer::of(&[Member::file("b", "")])]);
    let copied = excluded(&image, "b");
    assert_eq!(copied.document["layers"][0]["digest"], image.layer_digests()[0]);
    assert!(judge::names(&copied.tars[1]).is_empty());
    assert_eq!(
        json_of(&copied.config)["rootfs"]["diff_ids"].as_array().map(Vec::len),
        Some(2),
        "an empty layer stays"
    );
}

#[test]
fn without_any_match_the_image_is_untouched() {
    let image = crate::small();
    assert_eq!(excluded(&image, "no/such/file,**/*.exe").digest, image.digest());
}

#[test]
fn everything_but_names_may_be_excluded_by_other_alphabets() {
    let members = [Member::file("データ/名前.txt", "x"), Member::file("データ/残る", "y")];
    check(&members, "データ/*.txt", &["データ/残る"]);
}

#[test]
fn a_tar_inside_a_layer_is_a_file() {
    let inner = occy_tests::layer::tar(&[Member::file("a.conf", "inner"), Member::file("b", "x")]);
    let copied = excluded(
        &Image::docker(vec![Layer::of(&[Member::file("inner.tar", &inner), Member::file("z.conf", "")])]),
        "*.conf",
    );
    let found = judge::members(&copied.tars[0]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["sha256"], occy_tests::tools::sha256(&inner)[7..]);
}

#[test]
fn patterns_are_needed_and_must_be_globs() {
    for filter in ["exclude", "exclude:pattern=", "exclude:pattern=[", "exclude:glob=x"] {
        occyctl(["process", "tar:///nonexistent", "tar://-", "-f", filter]).fails(2);
    }
}
