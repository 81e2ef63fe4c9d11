//! Mirrors where no way leads from source to target: `occyctl mirror --to`, what is carried, and `--from`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::proxy::FaultProxy;
use occy_tests::registry::Registry;
use serde_json::{Value, json};

use crate::mirror::{JSON, about, index, report};
use crate::scratch;

/// An image of one layer that all have, and one of its own.
fn image(seed: u64) -> Image {
    Image::oci(vec![Layer::noise(2000, 60_000), Layer::noise(seed, 10_000)])
}

fn mirror(directory: &Path, text: &str, more: &[&str]) -> Run {
    crate::mirror::mirror(directory, text, &[&JSON[..], more].concat())
}

/// The names of a tar's members under `blobs/`, as GNU tar lists them.
fn blobs_in(tar: &Path) -> BTreeSet<String> {
    let listed = Command::new("tar").arg("-tf").arg(tar).output().expect("tar runs");
    assert!(listed.status.success(), "{listed:?}");
    let names = String::from_utf8(listed.stdout).expect("names");
    names.lines().filter_map(|name| name.strip_prefix("blobs/sha256/")).map(str::to_owned).collect()
}

fn hex(digest: &str) -> String {
    digest.trim_start_matches("sha256:").to_owned()
}

#[test]
fn what_is_carried_in_a_tar_arrives_whole_and_the_next_time_only_what_is_new_is_carried() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&image(1), "team/app", "1");
    from.push(&image(2), "team/other", "1");
    let index = index([("amd64", 10), ("arm64", 11), ("s390x", 12)]);
    from.push_index(&index, "team/many", "1");
    let sbom = about(image(20), &index.images[0]);
    let signature = index.images[0].digest().replace(':', "-");
    from.push(&sbom, "team/many", &format!("{signature}.sig"));
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    let uri = |name: &str| format!("oci-layout://{}", at(name).display());
    let config = format!(
        "mirrors:\n  - sources: ['{0}/team/*']\n    exclude_repositories: ['**/many']\n    targets: \
         ['{1}/here/{{name}}']\n    deletion: {{max: 5}}\n  - sources: ['{0}/team/many']\n    targets: \
         ['{1}/here/{{name}}']\n    platforms: [linux/amd64, linux/arm64]\n    referrers: true\n",
        from.host(),
        to.host()
    );
    let priced = report(mirror(directory.path(), &config, &["--to", &uri("first.tar"), "--dry-run"]), 0);
    assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 1, "only the configuration");
    let saved = report(mirror(directory.path(), &config, &["--to", &uri("first.tar")]), 0);
    assert_eq!(saved["bytes"]["fetched"], priced["price"]["fetch"]["bytes"], "{priced}");
    assert_eq!(saved["done"], 3, "{saved}");
    assert!(!at("first.tar.parts").exists());
    assert!(!blobs_in(&at("first.tar")).contains(&hex(&index.images[2].digest())), "s390x was not wanted");
    // Once more gives the same bytes.
    mirror(directory.path(), &config, &["--to", &uri("again.tar")]).ok();
    assert!(fs::read(at("first.tar")).expect("a tar") == fs::read(at("again.tar")).expect("a tar"));

    let no_way = FaultProxy::before(from.host());
    to.push(&image(99), "here/app", "only-here");
    let arrived = report(mirror(directory.path(), &config, &["--from", &uri("first.tar")]), 0);
    assert!(no_way.seen().is_empty());
    assert_eq!(arrived["done"], 3, "{arrived}");
    assert_eq!(to.pull("here/app", "1").digest, image(1).digest());
    assert_eq!(to.pull("here/other", "1").digest, image(2).digest());
    assert!(to.has("here/app", "only-here"), "a layout does not say what its source has lost");
    let subset: Value = serde_json::from_slice(&to.manifest("here/many", "1").body).expect("an index");
    assert_eq!(subset["manifests"].as_array().map(Vec::len), Some(2), "{subset}");
    assert_eq!(to.pull("here/many", &index.images[1].digest()).digest, index.images[1].digest());
    assert_eq!(to.digest("here/many", &format!("{signature}.sig")), sbom.digest());
    let again = report(mirror(directory.path(), &config, &["--from", &uri("first.tar")]), 0);
    assert_eq!((&again["done"], &again["bytes"]["uploaded"]), (&json!(0), &json!(0)), "{again}");

    // What is new is carried alone: the layer that all have is mounted into a repository that has not had it.
    from.push(&image(3), "team/third", "1");
    let list = occyctl(["mirror", "digests", to.host()]).ok().text();
    assert!(list.contains(&format!("{} {}/here/app\n", image(1).config_digest(), to.host())), "{list}");
    fs::write(at("have"), &list).expect("a file");
    let have = at("have").display().to_string();
    mirror(directory.path(), &config, &["--to", &uri("second.tar"), "--have", &have]).ok();
    let carried = blobs_in(&at("second.tar"));
    let [all, own] = &image(3).layer_digests()[..] else { panic!("two layers") };
    assert!(carried.contains(&hex(own)) && !carried.contains(&hex(all)), "{carried:?}");
    assert!(!carried.contains(&hex(&image(1).config_digest())), "{carried:?}");
    mirror(directory.path(), &config, &["--from", &uri("second.tar")]).fails(5).says(&["here/third", all]);
    assert!(!to.has("here/third", "1"));
    let arrived =
        report(mirror(directory.path(), &config, &["--from", &uri("second.tar"), "--have", &have]), 0);
    assert_eq!((&arrived["done"], &arrived["blobs_mounted"]), (&json!(1), &json!(1)), "{arrived}");
    assert_eq!(to.pull("here/third", "1").digest, image(3).digest());
}

#[test]
fn a_directory_takes_what_is_new_and_what_was_damaged_on_the_way_does_not_arrive() {
    let (from, to) = (Registry::start(), Registry::start());
    for (seed, tag) in [(1, "1"), (2, "2")] {
        from.push(&image(seed), "app", tag);
    }
    let near = FaultProxy::before(from.host());
    let directory = scratch();
    let path = directory.path().join("carried");
    let uri = format!("oci-layout://{}", path.display());
    let config =
        format!("mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n", near.host(), to.host());
    mirror(directory.path(), &config, &["--to", &uri]).ok();
    assert_eq!(near.count("GET", "*/blobs/*"), 2 * 2 + 1, "{}", near.story());
    from.push(&image(3), "app", "3");
    near.forget();
    mirror(directory.path(), &config, &["--to", &uri]).ok();
    assert_eq!(near.count("GET", "*/blobs/*"), 2, "{}", near.story());
    let checked = occyctl(["check", &format!("{uri}?tag={}/app:3", near.host())]).ok().text();
    assert!(!checked.contains("nothing names"), "{checked}");

    let own = &image(2).layer_digests()[1];
    fs::write(path.join("blobs/sha256").join(hex(own)), vec![0; image(2).layers[1].blob().len()])
        .expect("a blob");
    near.forget();
    mirror(directory.path(), &config, &["--from", &uri]).fails(5).says(&["app:2", own]);
    assert!(near.seen().is_empty(), "{}", near.story());
    assert!(!to.has("app", "2"));
    for (seed, tag) in [(1, "1"), (3, "3")] {
        assert_eq!(to.pull("app", tag).digest, image(seed).digest());
    }
}

#[test]
fn what_cannot_be_carried_is_said_before_anything_is_asked() {
    let registry = Registry::start();
    let proxy = FaultProxy::before(registry.host());
    let directory = scratch();
    let config = format!("mirrors: [{{sources: ['{0}/app'], targets: ['{0}/copy']}}]", proxy.host());
    mirror(directory.path(), &config, &["--to", "dir:///tmp/x"])
        .fails(2)
        .says(&["dir://", "oci-layout://PATH"]);
    mirror(directory.path(), &config, &["--from", "oci-layout://-"]).fails(2).says(&["names nothing"]);
    mirror(directory.path(), &config, &["--from", "oci-layout:///nonexistent"])
        .fails(1)
        .says(&["/nonexistent"]);
    fs::write(directory.path().join("list"), "sha256:1 x\n").expect("a file");
    let list = directory.path().join("list").display().to_string();
    mirror(directory.path(), &config, &["--have", &list]).fails(2).says(&["list", "line 1"]);
    assert!(proxy.seen().is_empty(), "{}", proxy.story());
}
