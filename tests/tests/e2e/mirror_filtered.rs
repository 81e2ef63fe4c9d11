//! `occyctl mirror` with filters on the way: made once, known again by what it says that it was made of.

use occy_tests::certificates::text;
use occy_tests::conforming::Conforming;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{FaultProxy, status};
use occy_tests::registry::Registry;
use occy_tests::tools::{sha256, write};
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::mirror::{JSON, mirror, report};
use crate::scratch;

const SOURCE: &str = "dev.occystrap.source.digest";
const RECIPE: &str = "dev.occystrap.recipe";

/// An image of a layer that all have and filters change, one of its own that they change, and one that they do not.
fn image(seed: u64) -> Image {
    let shared = Layer::of(&[Member::file("secret.key", "k"), Member::file("kept", "x".repeat(9000))]);
    let own = Layer::of(&[Member::file("own.key", "k"), Member::file("name", seed.to_string())]);
    Image::oci(vec![shared, own, Layer::noise(seed, 10_000)])
}

fn config(from: &str, targets: &[String], more: &str) -> String {
    let targets: Vec<_> = targets.iter().map(|target| format!("'{target}'")).collect();
    format!(
        "mirrors:\n  - sources: ['{from}/app']\n    targets: [{}]\n    filters: ['exclude:pattern=*.key']\n{more}",
        targets.join(", ")
    )
}

fn annotation(manifest: &[u8], key: &str) -> String {
    json_of(manifest)["annotations"][key].as_str().unwrap_or_default().to_owned()
}

#[test]
fn every_layer_passes_once_and_a_warm_run_asks_once_at_each_end() {
    let (from, one, two) = (Registry::start(), Registry::start(), Registry::start());
    for tag in ["1", "2", "3"] {
        from.push(&image(tag.parse().expect("a number")), "app", tag);
    }
    let (near, far) = (FaultProxy::before(from.host()), FaultProxy::before(one.host()));
    let directory = scratch();
    let targets = [format!("{}/a", far.host()), format!("{}/b", far.host()), format!("{}/c", two.host())];
    let config = |more: &str| config(&near.host(), &targets, more);
    let run = |more: &str, options: &[&str]| {
        report(mirror(directory.path(), &config(more), &[&JSON[..], options].concat()), 0)
    };
    let plan = run("", &["--dry-run"]);
    assert_eq!(near.count("GET", "*/blobs/*"), 0, "{}", near.story());
    assert_eq!(plan["actions"][0]["filtered"], true, "{plan}");
    // Of three images one layer that all share, and two more of each; of each target's images a config, which passes no filters.
    assert_eq!(plan["price"]["filter"]["blobs"], 1 + 3 * 2, "{plan}");
    assert_eq!(plan["price"]["fetch"]["blobs"], 1 + 3 * 2 + 3 * 3, "{plan}");
    let text = mirror(directory.path(), &config(""), &["--dry-run"]).ok().text();
    assert!(text.contains(" through its filters\n") && text.contains(" of them through filters"), "{text}");
    near.forget();
    far.forget();
    let done = run("", &[]);
    assert_eq!((&done["done"], &done["failed"]), (&json!(9), &json!(0)), "{done}");
    assert_eq!(done["images"][0]["becomes"], one.digest("a", "1"), "{done}");
    for tag in ["1", "2", "3"] {
        let source = image(tag.parse().expect("a number"));
        let local = one.uri(&format!("local:{tag}"));
        let by_hand =
            occyctl(["process", &from.uri(&format!("app:{tag}")), &local, "-f", "exclude:pattern=*.key"]);
        by_hand.ok();
        let expected = one.pull("local", tag);
        for (registry, name) in [(&one, "a"), (&one, "b"), (&two, "c")] {
            let pulled = registry.pull(name, tag);
            assert_eq!(pulled.document["layers"], expected.document["layers"], "{name}:{tag}");
            assert_eq!(pulled.document["config"], expected.document["config"], "{name}:{tag}");
            assert_eq!(annotation(&pulled.manifest, SOURCE), source.digest());
            assert!(annotation(&pulled.manifest, RECIPE).starts_with("sha256:"));
            judge::skopeo_reads(&format!("docker://{}/{name}:{tag}", registry.host()));
        }
    }
    // Once for the filters to look, and once to be changed or copied; nothing for the other targets.
    for layer in [0, 1, 2] {
        let digest = image(1).layer_digests()[layer].clone();
        let fetched = near.count("GET", &format!("*/blobs/{digest}"));
        assert!((1..=2).contains(&fetched), "{fetched} of {digest}: {}", near.story());
    }
    // Each layer goes up once: one that all share, two of each image; and at each of two repositories three configs.
    assert_eq!(far.count("PUT", "*/blobs/uploads/*"), 1 + 2 * 3 + 2 * 3, "{}", far.story());
    assert!(done["blobs_mounted"].as_u64().expect("a number") >= 7, "{done}");
    near.forget();
    far.forget();
    let warm = run("", &[]);
    assert_eq!((&warm["done"], &warm["bytes"]["fetched"]), (&json!(0), &json!(0)), "{warm}");
    assert_eq!(near.count("HEAD", "*/manifests/*"), 3, "{}", near.story());
    assert_eq!(near.count("GET", "*/manifests/*") + near.count("GET", "*/blobs/*"), 0, "{}", near.story());
    assert_eq!(far.count("GET", "*/manifests/*"), 6, "{}", far.story());
    assert_eq!(far.count("PUT", "*") + far.count("POST", "*") + far.count("HEAD", "*"), 0, "{}", far.story());
    // What was made of another source, or by other filters, is made again; what is immutable stays.
    from.push(&image(4), "app", "1");
    let was = one.digest("a", "2");
    let changed = run("    backup: 'old-{tag}'\n", &[]);
    assert_eq!((&changed["done"], &changed["failed"]), (&json!(3), &json!(0)), "{changed}");
    assert_eq!(annotation(&one.manifest("a", "1").body, SOURCE), image(4).digest());
    assert_eq!(annotation(&one.manifest("a", "old-1").body, SOURCE), image(1).digest());
    assert_eq!(one.digest("a", "2"), was);
    let others = config("    immutable: ['2']\n").replace("*.key", "name");
    let refused = report(mirror(directory.path(), &others, &JSON), 5);
    assert_eq!((&refused["done"], &refused["failed"]), (&json!(6), &json!(3)), "{refused}");
    assert_eq!(one.digest("a", "2"), was);
    assert_eq!(judge::names(&one.pull("a", "1").tars[1]), ["own.key"]);
}

#[test]
fn an_index_is_rebuilt_whole_or_of_some_platforms_and_its_tag_comes_last() {
    let (from, to) = (Conforming::start(), Registry::start());
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let of = |architecture: &str| {
        let layer = Layer::of(&[Member::file("a.key", "k"), Member::file("name", architecture)]);
        Image::on(Family::Oci, ("linux", architecture, None), vec![layer])
    };
    let entries = ["amd64", "arm64", "s390x"].map(|name| (platform(name), of(name))).to_vec();
    let index = Index::new(Family::Oci, entries);
    for image in &index.images {
        from.add_image("app", &image.digest(), image);
    }
    from.add_manifest("app", "1", Family::Oci.index(), &index.manifest);
    let source = sha256(&index.manifest);
    let proxy = FaultProxy::before(to.host());
    let directory = scratch();
    let run = |name: &str, more: &str, code: i32| {
        let text = config(&from.host(), &[format!("{}/{name}", proxy.host())], more);
        report(mirror(directory.path(), &text, &JSON), code)
    };
    // The second image cannot be put: the tag is not there, and the next run goes on.
    proxy.fault_after(1, 1, "PUT", "/v2/all/manifests/sha256*", status(400));
    let failed = run("all", "", 1);
    assert!(
        failed["images"][0]["problem"].as_str().is_some_and(|problem| problem.contains("400")),
        "{failed}"
    );
    assert!(!to.has("all", "1"));
    run("all", "", 0);
    let rebuilt = json_of(&to.manifest("all", "1").body);
    assert_eq!(rebuilt["annotations"][SOURCE], source);
    assert_eq!(rebuilt["manifests"].as_array().map(Vec::len), Some(3));
    for entry in rebuilt["manifests"].as_array().expect("entries") {
        let image = to.pull("all", entry["digest"].as_str().expect("a digest"));
        assert_eq!(judge::names(&image.tars[0]), ["name"]);
        assert_eq!(image.document.get("annotations"), None, "the index says it");
    }
    let puts: Vec<_> = proxy.seen().into_iter().filter(|seen| seen.request.method == "PUT").collect();
    assert!(puts.last().is_some_and(|last| last.is("PUT", "/v2/all/manifests/1")), "{}", proxy.story());
    let some = "    platforms: [linux/arm64, linux/amd64]\n";
    run("some", some, 0);
    let subset = json_of(&to.manifest("some", "1").body);
    let named: Vec<_> = subset["manifests"].as_array().expect("entries").iter().collect();
    let names: Vec<_> = named.iter().map(|entry| entry["platform"]["architecture"].clone()).collect();
    assert_eq!(names, ["amd64", "arm64"]);
    assert_eq!(named[0]["digest"], rebuilt["manifests"][0]["digest"]);
    assert_eq!(subset["annotations"][SOURCE], source);
    assert_eq!(run("some", some, 0)["done"], 0);
    // It is another recipe than all platforms.
    assert_eq!(run("some", "", 0)["done"], 1);
    // A signed index is not changed unless that is wanted, and said before anything is moved.
    let bundle = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let signature = from.add_artifact("app", bundle, &index.manifest, Family::Oci.index());
    let text = config(&from.host(), &[format!("{}/signed", proxy.host())], "");
    let planned = mirror(directory.path(), &text, &[&JSON[..], &["--dry-run"]].concat()).fails(1);
    planned.says(&["is signed as", bundle]);
    from.forget();
    let refused = run("signed", "", 1);
    assert_eq!(from.count("GET", "*/blobs/*"), 0, "{}", from.story());
    assert!(refused["images"][0]["problem"].as_str().is_some_and(|problem| problem.contains("is signed")));
    assert!(!to.has("signed", "1"));
    let lists = Conforming::start();
    let text = config(&from.host(), &[format!("{}/signed", lists.host())], "    signatures: keep\n");
    let kept = report(mirror(directory.path(), &text, &JSON), 0);
    assert_eq!(kept["images"][0]["copied"]["signatures_kept"], 1, "{kept}");
    assert_eq!(lists.referrers("signed", &source), [sha256(&signature)]);
    let made = lists.manifest("signed", "1").expect("it").1;
    assert_eq!(annotation(&made, SOURCE), source);
    assert_eq!(lists.referrers("signed", &sha256(&made)).len(), 1, "the way to the original");
}

#[test]
fn what_was_carried_passes_its_filters_where_it_arrives() {
    let (from, to, direct) = (Registry::start(), Registry::start(), Registry::start());
    from.push(&image(1), "app", "1");
    from.push(&Image::docker(image(2).layers), "app", "2");
    let directory = scratch();
    let layout = format!("oci-layout://{}", directory.path().join("carried.tar").display());
    let run = |target: &Registry, more: &[&str]| {
        let text = config(from.host(), &[format!("{}/app", target.host())], "");
        report(mirror(directory.path(), &text, &[&JSON[..], more].concat()), 0)
    };
    run(&to, &["--to", &layout]);
    let arrived = run(&to, &["--from", &layout]);
    assert_eq!(arrived["done"], 2, "{arrived}");
    run(&direct, &[]);
    for tag in ["1", "2"] {
        assert_eq!(to.manifest("app", tag).body, direct.manifest("app", tag).body);
        assert_eq!(judge::names(&to.pull("app", tag).tars[0]), ["kept"]);
    }
    assert_eq!(run(&to, &["--from", &layout])["done"], 0);
    // Which way it came is all the same.
    assert_eq!(run(&to, &[])["done"], 0);
    // What the target has is carried all the same where filters have to read it.
    let kept = image(1).layers[2].clone();
    from.push(&Image::oci(vec![kept, image(1).layers[0].clone()]), "app", "1");
    let have = directory.path().join("have");
    let digests = occyctl(["mirror", "digests", &format!("{}/app", to.host())]).ok();
    write(&have, digests.text());
    let (again, have) = (layout.replace("carried", "again"), text(&have));
    run(&to, &["--to", &again, "--have", &have]);
    let arrived = run(&to, &["--from", &again, "--have", &have]);
    assert_eq!((&arrived["done"], &arrived["failed"]), (&json!(1), &json!(0)), "{arrived}");
}

#[test]
fn a_coordinators_workers_do_what_passes_filters() {
    let (from, here, there) = (Registry::start(), Registry::start(), Registry::start());
    for tag in ["1", "2"] {
        from.push(&image(tag.parse().expect("a number")), "app", tag);
    }
    let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
    let workers = [(); 2].map(|()| Worker::start(&coordinator, &["--slots", "1"]));
    let directory = scratch();
    let run = |to: &Registry, more: &[&str]| {
        let text = config(from.host(), &[format!("{}/app", to.host())], "");
        report(mirror(directory.path(), &text, &[&JSON[..], more].concat()), 0)
    };
    let local = run(&here, &[]);
    let remote = run(&there, &["--coordinator", &coordinator.url()]);
    assert_eq!((&local["done"], &remote["done"]), (&json!(2), &json!(2)), "{remote}");
    for image in remote["images"].as_array().expect("images") {
        assert_eq!(image["filtered"], true, "{remote}");
    }
    for tag in ["1", "2"] {
        assert_eq!(here.manifest("app", tag).body, there.manifest("app", tag).body);
    }
    assert!(workers.iter().any(|worker| worker.log().contains("task begins")));
    assert_eq!(run(&there, &["--coordinator", &coordinator.url()])["done"], 0);
    // Nobody is there who could: the image fails with that reason, and the tag stays.
    drop(workers);
    let alone = Coordinator::start(&["--embedded-workers", "0", "--unoffered-deadline", "1"]);
    from.push(&image(3), "app", "1");
    let text = config(from.host(), &[format!("{}/app", there.host())], "");
    let was = there.digest("app", "1");
    let failed = mirror(directory.path(), &text, &[&JSON[..], &["--coordinator", &alone.url()]].concat());
    let failed = report(failed, 5);
    let problem = failed["images"][0]["problem"].as_str().expect("a problem");
    assert!(problem.contains("no worker"), "{failed}");
    assert_eq!(there.digest("app", "1"), was);
}

#[test]
fn what_a_file_says_of_filters_is_checked_with_its_place() {
    let directory = scratch();
    let error = |more: &str, words: &[&str]| {
        let text = format!("mirrors:\n  - sources: [a.example/x]\n    targets: [b.example/x]\n{more}");
        mirror(directory.path(), &text, &[]).fails(2).says(words);
    };
    error("    filters: ['grep:x']\n", &["line 4, column 15", "grep"]);
    error("    filters: ['search:pattern=x']\n", &["line 4, column 15", "changes nothing"]);
    error("    filters: ['exclude:patern=x']\n", &["line 4, column 15", "patern"]);
    let sparse = "    filters: [normalize-timestamps]\n    platforms: [linux/amd64]\n    sparse: true\n";
    error(
        sparse,
        &["line 6, column 13", "sparse keeps an index", "can only name images that have passed them"],
    );
    // It would be another one each time.
    let registry = Registry::start();
    registry.push(&image(1), "app", "1");
    let own = config(registry.host(), &[format!("{}/app", registry.host())], "");
    mirror(directory.path(), &own, &[]).fails(1).says(&["its target is its source"]);
    assert_eq!(registry.digest("app", "1"), image(1).digest());
    error("    attestations: drop\n", &["line 2", "attestations says nothing without filters"]);
    let schema: Value = occyctl(["mirror", "schema"]).ok().json();
    let keys = &schema["properties"]["mirrors"]["items"]["properties"];
    assert!(keys["filters"].is_object() && keys["attestations"].is_object(), "{schema}");
}

#[test]
fn of_a_tag_that_is_no_index_one_of_the_platforms_is_enough_with_filters_and_without() {
    let (from, to) = (Registry::start(), Registry::start());
    for architecture in ["arm64", "s390x"] {
        let layer = Layer::of(&[Member::file("a.key", "k"), Member::file("name", architecture)]);
        let image = Image::on(Family::Oci, ("linux", architecture, None), vec![layer]);
        from.push(&image, "app", architecture);
    }
    let directory = scratch();
    for (name, is_filtered) in [("filtered", true), ("whole", false)] {
        let platforms = "    platforms: [linux/amd64, linux/arm64]\n";
        let mut text = config(from.host(), &[format!("{}/{name}", to.host())], platforms);
        if !is_filtered {
            text = text.replace("    filters: ['exclude:pattern=*.key']\n", "");
        }
        let told = report(mirror(directory.path(), &text, &JSON), 5);
        assert_eq!((&told["done"], &told["failed"]), (&json!(1), &json!(1)), "{told}");
        let problems: Vec<_> =
            told["images"].as_array().expect("images").iter().map(|image| &image["problem"]).collect();
        let problem = "no image for linux/amd64 or linux/arm64; there is linux/s390x";
        assert_eq!(problems, [&Value::Null, &json!(problem)], "{told}");
        assert_eq!(json_of(&to.manifest(name, "arm64").body)["annotations"].is_object(), is_filtered);
        assert!(!to.has(name, "s390x"));
    }
}

#[test]
fn what_waits_of_an_image_counts_once_whatever_number_of_targets_it_has() {
    let (from, to) = (Registry::start(), Registry::start());
    let noise = "0123456789abcdef".repeat(3_500_000 / 16);
    // Of 4 with 3.5 MB each all are kept, and of 12 it would be 9.
    for seed in 0..4 {
        let large =
            image(seed).edit_manifest(|manifest| manifest["annotations"] = json!({"noise": noise.clone()}));
        from.push(&large, "app", &seed.to_string());
    }
    let near = FaultProxy::before(from.host());
    let directory = scratch();
    let targets = ["a", "b", "c"].map(|name| format!("{}/{name}", to.host()));
    let text = config(&near.host(), &targets, "    signatures: drop\n");
    assert_eq!(report(mirror(directory.path(), &text, &JSON), 0)["done"], 12);
    assert_eq!(near.count("GET", "*/manifests/*"), 4, "{}", near.story());
}
