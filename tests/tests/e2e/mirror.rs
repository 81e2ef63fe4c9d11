//! `occyctl mirror`: many images, kept elsewhere as they are.

use std::path::Path;

use occy_tests::image::{Family, Image, Index};
use occy_tests::layer::Layer;
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::server::Seen;
use serde_json::{Value, json};

use crate::{scratch, small};

/// An image of one layer that all have, and one of its own.
fn image(seed: u64) -> Image {
    Image::oci(vec![Layer::noise(1000, 50_000), Layer::noise(seed, 10_000)])
}

/// An index of images for these architectures, each of a layer of its own.
pub(crate) fn index(images: [(&str, u64); 3]) -> Index {
    let entry = |(architecture, seed)| {
        let image = Image::on(Family::Oci, ("linux", architecture, None), vec![Layer::noise(seed, 5000)]);
        (json!({"os": "linux", "architecture": architecture}), image)
    };
    Index::new(Family::Oci, images.into_iter().map(entry).collect())
}

/// What names another image as its subject.
pub(crate) fn about(image: Image, subject: &Image) -> Image {
    let (digest, size) = (subject.digest(), subject.manifest.len());
    let subject = json!({"mediaType": Family::Oci.manifest(), "digest": digest, "size": size});
    image.edit_manifest(|manifest| manifest["subject"] = subject)
}

fn write(directory: &Path, text: &str) -> String {
    let path = directory.join("mirror.yaml");
    std::fs::write(&path, text).expect("a file");
    path.display().to_string()
}

/// `mirror` with a file, and more options.
pub(crate) fn mirror(directory: &Path, text: &str, more: &[&str]) -> Run {
    let file = write(directory, text);
    occyctl(["mirror", "-c", &file].iter().chain(more))
}

/// The report of a run that ends with this code.
#[track_caller]
pub(crate) fn report(run: Run, code: i32) -> Value {
    let ended = run.run();
    assert_eq!(ended.status.code(), Some(code), "{}\n{}", ended.text(), ended.stderr);
    ended.json()
}

fn tags(registry: &Registry, name: &str) -> Vec<String> {
    let listed = occyctl(["tags", &format!("{}/{name}", registry.host()), "--sort", "version"]).run();
    listed.text().lines().map(str::to_owned).collect()
}

pub(crate) const JSON: [&str; 2] = ["--output-format", "json"];

#[test]
fn tags_are_chosen_and_go_to_two_registries_with_one_download_of_each_blob() {
    let (from, one, two) = (Registry::start(), Registry::start(), Registry::start());
    let all = ["1.9", "1.10", "1.10-rc1", "1.11", "2.0", "latest", "nightly"];
    for (seed, tag) in all.iter().enumerate() {
        from.push(&image(seed as u64), "team/app", tag);
        from.push(&image(seed as u64), "team/other", tag);
    }
    from.push(&image(50), "team/old-app", "1.9");
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(one.host()));
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{}/team/*']\n    exclude_repositories: ['**/old-*']\n    targets: \
         ['{}/copy/{{name}}', '{}/{{repository}}']\n    tags:\n      - names: [latest]\n      - semver: ['>=1.9, \
         <2']\n        newest: 2\n      - globs: ['*-rc*', 'nightly']\n        exclude: [nightly]\n",
        near.host(),
        far.host(),
        two.host()
    );
    let plan = report(mirror(directory.path(), &config, &[&JSON[..], &["--dry-run"]].concat()), 0);
    assert!(!one.has("copy/app", "latest"));
    assert_eq!(near.count("GET", "*/blobs/*"), 0, "{}", near.story());
    near.forget();
    far.forget();
    let done = report(mirror(directory.path(), &config, &JSON), 0);
    let expected = ["1.10-rc1", "1.10", "1.11", "latest"];
    for (registry, names) in [(&one, ["copy/app", "copy/other"]), (&two, ["team/app", "team/other"])] {
        for name in names {
            assert_eq!(tags(registry, name), expected, "{name}");
            for tag in expected {
                assert_eq!(registry.pull(name, tag).digest, from.digest("team/app", tag));
            }
        }
        assert!(tags(registry, "team/old-app").is_empty());
    }
    // A layer that all share, and of each of four images another and a config.
    assert_eq!(near.count("GET", "*/blobs/*"), 9, "{}", near.story());
    assert_eq!(far.count("PUT", "*/blobs/uploads/*"), 9, "{}", far.story());
    // From its own repository, one asks whether a blob is there.
    let is_mount = |seen: &&Seen| {
        let from = seen.request.query("from").concat();
        !from.is_empty() && !seen.request.path.starts_with(&format!("/v2/{from}/"))
    };
    assert_eq!(far.seen().iter().filter(is_mount).count(), 8 + 1, "{}", far.story());
    // The price was right.
    let price = &plan["price"];
    assert_eq!(price["fetch"]["blobs"], 9, "{plan}");
    assert_eq!(price["fetch"]["bytes"], done["bytes"]["fetched"]);
    assert_eq!(price["upload"]["bytes"], done["bytes"]["uploaded"]);
    assert_eq!(price["mount"]["blobs"], done["blobs_mounted"]);
    for what in ["fetch", "upload", "mount", "filter", "manifests"] {
        assert_eq!(price[what], done["moved"][what], "{what}: {plan} {done}");
    }
    assert_eq!((&done["done"], &done["failed"]), (&json!(16), &json!(0)), "{done}");
}

#[test]
fn a_warm_run_asks_once_for_each_tag_at_each_end_and_moves_nothing() {
    let (from, to) = (Registry::start(), Registry::start());
    for tag in ["1", "2", "3"] {
        from.push(&image(tag.parse().expect("a number")), "app", tag);
    }
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{0}/app']\n    targets: ['{1}/a', '{1}/b']\n  - sources: ['{0}/app']\n    targets: \
         ['{1}/c']\n    tags: [{{names: ['1']}}]\n",
        near.host(),
        far.host()
    );
    mirror(directory.path(), &config, &[]).ok();
    near.forget();
    far.forget();
    let again = report(mirror(directory.path(), &config, &JSON), 0);
    assert_eq!((&again["done"], &again["failed"]), (&json!(0), &json!(0)), "{again}");
    let asked = |proxy: &FaultProxy| {
        let seen = proxy.seen();
        seen.iter().filter(|seen| seen.request.path != "/v2/").count()
    };
    assert_eq!(near.count("HEAD", "/v2/app/manifests/*"), 3, "{}", near.story());
    assert_eq!(near.count("GET", "/v2/app/tags/list"), 1);
    assert_eq!(asked(&near), 4, "{}", near.story());
    assert_eq!(far.count("HEAD", "*/manifests/*"), 7, "{}", far.story());
    assert_eq!(asked(&far), 7, "{}", far.story());
}

#[test]
fn what_a_tag_named_is_kept_under_another_before_it_is_given_away() {
    let (from, to) = (Registry::start(), Registry::start());
    let (old, new) = (image(1), image(2));
    from.push(&old, "app", "1");
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    backup: 'before-{{tag}}-{{digest}}'\n    \
         deletion: {{max: 9}}\n",
        from.host(),
        to.host()
    );
    mirror(directory.path(), &config, &[]).ok();
    assert_eq!(tags(&to, "app"), ["1"]);
    from.push(&new, "app", "1");
    let plan = mirror(directory.path(), &config, &["--dry-run"]).ok().text();
    let kept = format!("before-1-{}", &old.digest()["sha256:".len()..][..12]);
    for part in ["update", &old.digest(), &new.digest(), &kept, "1 to update"] {
        assert!(plan.contains(part), "{plan}");
    }
    mirror(directory.path(), &config, &[]).ok();
    // The backup is none of the source's tags, and is not deleted for that.
    mirror(directory.path(), &config, &[]).ok();
    assert_eq!(to.pull("app", "1").digest, new.digest());
    assert_eq!(to.pull("app", &kept).digest, old.digest());
}

#[test]
fn a_tag_stays_where_its_backup_fails() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&image(1), "app", "1");
    let proxy = FaultProxy::before(to.host());
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    backup: 'before-{{tag}}'\n",
        from.host(),
        proxy.host()
    );
    mirror(directory.path(), &config, &[]).ok();
    from.push(&image(2), "app", "1");
    proxy.fault(usize::MAX, "PUT", "*/manifests/before-1", proxy::status(403));
    mirror(directory.path(), &config, &[]).fails(1).says(&["app:1", "403"]);
    assert_eq!(to.digest("app", "1"), image(1).digest());
}

#[test]
fn immutable_tags_stay_what_they_are_and_are_told_of() {
    let (from, to) = (Registry::start(), Registry::start());
    for tag in ["v1", "latest"] {
        from.push(&image(1), "app", tag);
    }
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    immutable: ['v*']\n",
        from.host(),
        to.host()
    );
    mirror(directory.path(), &config, &[]).ok();
    for tag in ["v1", "latest"] {
        from.push(&image(2), "app", tag);
    }
    mirror(directory.path(), &config, &["--dry-run"]).fails(5).says(&["app:v1", "immutable"]);
    let told = report(mirror(directory.path(), &config, &JSON), 5);
    assert_eq!(told["failed"], 1, "{told}");
    assert_eq!(to.digest("app", "v1"), image(1).digest());
    assert_eq!(to.digest("app", "latest"), image(2).digest());
}

#[test]
fn what_the_source_lost_is_deleted_only_where_that_is_wanted_and_no_more_than_allowed() {
    let (from, to) = (Registry::start(), Registry::start());
    for (seed, tag) in ["1.0", "1.1", "1.2", "keep"].iter().enumerate() {
        from.push(&image(seed as u64), "app", tag);
    }
    let directory = scratch();
    let config = |more: &str| {
        format!(
            "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    immutable: [keep]\n{more}",
            from.host(),
            to.host()
        )
    };
    mirror(directory.path(), &config(""), &[]).ok();
    to.push(&image(9), "app", "1.9-own");
    for (seed, tag) in ["1.0", "1.1", "keep"].iter().enumerate() {
        let seed = if *tag == "keep" { 3 } else { seed as u64 };
        occyctl(["delete", &format!("{}/app@{}", from.host(), image(seed).digest()), "--yes"]).ok();
        assert!(!from.has("app", tag), "{tag}");
    }
    let all = ["1.0", "1.1", "1.2", "1.9-own", "keep"];
    let mut sorted = tags(&to, "app");
    sorted.sort();
    mirror(directory.path(), &config(""), &[]).ok();
    assert_eq!(sorted, all, "nobody asked for it");
    // More than may be: none.
    let own = "    tags: [{globs: ['*'], exclude: ['*-own']}]\n";
    let one = config(&format!("{own}    deletion: {{max: 1}}\n"));
    mirror(directory.path(), &one, &[]).fails(5).says(&["2 tags", "no more than 1", "app:1.0", "app:1.1"]);
    assert_eq!(tags(&to, "app").len(), 5);
    let two = config(&format!("{own}    deletion: {{max: 2}}\n"));
    let plan = mirror(directory.path(), &two, &["--dry-run"]).ok().text();
    assert!(plan.contains("2 to delete") && plan.contains("delete "), "{plan}");
    assert_eq!(tags(&to, "app").len(), 5);
    let told = report(mirror(directory.path(), &two, &JSON), 0);
    assert_eq!(told["done"], 2, "{told}");
    let mut left = tags(&to, "app");
    left.sort();
    assert_eq!(left, ["1.2", "1.9-own", "keep"]);
}

#[test]
fn a_tag_whose_manifest_an_index_is_made_of_takes_nothing_from_it() {
    let (from, to) = (Registry::start(), Registry::start());
    let index = Index::new(Family::Oci, vec![(json!({"os": "linux", "architecture": "amd64"}), small())]);
    from.push_index(&index, "app", "1");
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    deletion: {{max: 9}}\n",
        from.host(),
        to.host()
    );
    mirror(directory.path(), &config, &[]).ok();
    to.push(&small(), "app", "gone");
    mirror(directory.path(), &config, &[]).run();
    assert_eq!(to.pull("app", &small().digest()).digest, small().digest());
    assert!(to.has("app", "1"));
}

#[test]
fn nothing_is_deleted_while_a_list_cannot_be_had() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&image(1), "app", "1");
    from.push(&image(2), "other", "1");
    to.push(&image(3), "app", "gone");
    let proxy = FaultProxy::before(from.host());
    proxy.fault(usize::MAX, "GET", "/v2/other/tags/list", proxy::status(403));
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{0}/app', '{0}/other']\n    targets: ['{1}/{{name}}']\n    deletion: {{max: 9}}\n",
        proxy.host(),
        to.host()
    );
    mirror(directory.path(), &config, &[]).fails(5).says(&["/other", "app:gone", "nothing is deleted"]);
    assert_eq!(tags(&to, "app"), ["1", "gone"]);
    proxy.heal();
    mirror(directory.path(), &config, &[]).ok();
    assert_eq!(tags(&to, "app"), ["1"]);
}

#[test]
fn one_failure_is_none_of_the_others() {
    let (from, one, two) = (Registry::start(), Registry::start(), Registry::start());
    let (good, bad) = (image(1), image(2));
    from.push(&good, "app", "good");
    from.push(&bad, "app", "bad");
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(two.host()));
    near.fault(usize::MAX, "GET", &format!("*/blobs/{}", bad.layer_digests()[1]), proxy::status(404));
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app', '{}/app']\n    tags: [{{names: [good, bad, gone]}}]\n",
        near.host(),
        one.host(),
        far.host()
    );
    let told = report(mirror(directory.path(), &config, &JSON), 5);
    assert_eq!((&told["done"], &told["failed"]), (&json!(2), &json!(4)), "{told}");
    for registry in [&one, &two] {
        assert_eq!(registry.pull("app", "good").digest, good.digest());
        assert!(!registry.has("app", "bad"));
    }
    let of = |tag: &str| {
        let images = told["images"].as_array().expect("images");
        let image =
            images.iter().find(|image| image["source"].as_str().is_some_and(|name| name.ends_with(tag)));
        image.expect(tag).clone()
    };
    assert_eq!(of(":good")["result"], "copied");
    assert!(of(":bad")["problem"].as_str().expect("a problem").contains(&bad.layer_digests()[1]));
    assert!(of(":gone")["problem"].as_str().expect("a problem").contains("does not exist"));
    // A target that does not answer is the loss of its own images alone.
    near.heal();
    far.fault(usize::MAX, "*", "*", proxy::status(403));
    let told = report(mirror(directory.path(), &config, &JSON), 5);
    assert_eq!(told["done"], 1, "{told}");
    assert_eq!(one.pull("app", "bad").digest, bad.digest());
    far.heal();
    mirror(directory.path(), &config, &[]).fails(5);
    assert_eq!(two.pull("app", "bad").digest, bad.digest());
}

#[test]
fn platforms_and_referrers_go_with_their_index_and_nothing_moves_twice() {
    let (from, to) = (Registry::start(), Registry::start());
    let index = index([("amd64", 1), ("arm64", 2), ("s390x", 3)]);
    from.push_index(&index, "app", "1");
    let signature = about(small(), &index.images[0]);
    let tag = index.images[0].digest().replace(':', "-");
    from.push(&signature, "app", &format!("{tag}.sig"));
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(to.host()));
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    platforms: [linux/amd64, linux/arm64]\n    \
         referrers: true\n",
        near.host(),
        far.host()
    );
    mirror(directory.path(), &config, &[]).ok();
    let copied: Value = serde_json::from_slice(&to.manifest("app", "1").body).expect("an index");
    let platforms: Vec<_> = copied["manifests"].as_array().expect("entries").iter().collect();
    assert_eq!(platforms.len(), 2, "{copied}");
    assert_eq!(to.pull("app", &index.images[1].digest()).digest, index.images[1].digest());
    assert_eq!(to.digest("app", &format!("{tag}.sig")), signature.digest());
    near.forget();
    far.forget();
    mirror(directory.path(), &config, &[]).ok();
    assert_eq!(near.count("*", "*/blobs/*"), 0, "{}", near.story());
    assert_eq!(far.count("PUT", "*") + far.count("POST", "*"), 0, "{}", far.story());
}

#[test]
fn manifests_that_are_too_many_to_wait_are_read_again_when_their_turn_comes() {
    let (from, to) = (Registry::start(), Registry::start());
    let noise = "0123456789abcdef".repeat(3_500_000 / 16);
    let large =
        |seed| image(seed).edit_manifest(|manifest| manifest["annotations"] = json!({"noise": noise}));
    // Of 11 with 3.5 MB each, 9 are kept.
    for seed in 0..11 {
        from.push(&large(seed), "app", &seed.to_string());
    }
    let near = FaultProxy::before(from.host());
    let directory = scratch();
    let config = format!("mirrors: [{{sources: ['{}/app'], targets: ['{}/app']}}]", near.host(), to.host());
    mirror(directory.path(), &config, &[]).ok();
    assert_eq!(near.count("GET", "*/manifests/*"), 11 + 2, "{}", near.story());
    for tag in (0..11).map(|seed| seed.to_string()) {
        assert_eq!(to.digest("app", &tag), from.digest("app", &tag));
    }
}

#[test]
fn within_a_registry_everything_is_mounted() {
    let registry = Registry::start();
    let image = small();
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let directory = scratch();
    let config = format!(
        "mirrors:\n  - sources: ['{0}/app']\n    targets: ['{0}/copy/{{name}}:{{tag}}-x']\n",
        proxy.host()
    );
    let told = report(mirror(directory.path(), &config, &JSON), 0);
    assert_eq!(told["bytes"], json!({"fetched": 0, "uploaded": 0}), "{told}");
    assert_eq!(registry.pull("copy/app", "1-x").digest, image.digest());
    assert_eq!(proxy.count("GET", "*/blobs/*"), 0, "{}", proxy.story());
}

#[test]
fn a_file_that_is_wrong_is_told_of_by_line_and_column_before_anything_is_asked() {
    let registry = Registry::start();
    let proxy = FaultProxy::before(registry.host());
    let directory = scratch();
    let config =
        format!("mirrors:\n  - sources: ['{0}/app']\n    targets: ['{0}/x']\n    tag: [a]\n", proxy.host());
    mirror(directory.path(), &config, &[]).fails(2).says(&["mirror.yaml", "line 4, column 5", "tags"]);
    assert!(proxy.seen().is_empty());
    occyctl(["mirror", "-c", "/nonexistent.yaml"]).fails(1).says(&["/nonexistent.yaml"]);
    occyctl(["mirror"]).fails(2).says(&["--config"]);
    let schema = occyctl(["mirror", "schema"]).ok().json();
    assert_eq!(schema["required"], json!(["mirrors"]));
    let config = "mirrors: [{sources: [a.example/x, b.example/x], targets: ['c.example/{name}']}]";
    let named = mirror(directory.path(), config, &["--username", "u", "--password", "s3cr3t"]);
    named.fails(2).says(&["a.example, b.example"]).keeps("s3cr3t");
}

#[test]
fn files_of_others_become_ours() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1.0");
    from.push(&image(1), "app", "2.0");
    let directory = scratch();
    let file = directory.path().join("sync.yml");
    let write = |text: String| std::fs::write(&file, text).expect("a file");
    let path = file.display().to_string();
    write(format!("{}:\n  tls-verify: false\n  images-by-semver: {{app: '<2'}}\n", from.host()));
    let ended = occyctl(["mirror", "import-skopeo", &path, "--to", &format!("{}/s", to.host())]).ok();
    let ended = ended.says(&["tls-verify is not carried over"]);
    mirror(directory.path(), &ended.text(), &[]).ok();
    assert_eq!(tags(&to, "s/app"), ["1.0"]);
    write(format!(
        "sync:\n  - {{source: '{}/app', target: '{}/r/app', type: repository, interval: 1h, tags: {{allow: ['2.*']}}}}\n",
        from.host(),
        to.host()
    ));
    let ended = occyctl(["mirror", "import-regsync", &path]).ok();
    assert!(ended.text().contains("schedule: {\"interval\":\"1h\"}"), "{}", ended.text());
    mirror(directory.path(), &ended.text(), &[]).ok();
    assert_eq!(tags(&to, "r/app"), ["2.0"]);
    write("sync: [\n".to_owned());
    occyctl(["mirror", "import-regsync", &path]).fails(2).says(&["sync.yml", "line 1"]);
}
