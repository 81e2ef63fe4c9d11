//! Layouts of the client's own machine that a coordinator works with: what one process makes of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::text;
use occy_tests::conforming::Conforming;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image, Index};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::{Ended, Run, locally};
use occy_tests::older::Older;
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::{read, sha256, write};
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::service_whole::attested;
use crate::{scratch, small, tar_uri};

const FILTER: &str = "exclude:pattern=*.key";
const NOTATION: &str = "application/vnd.cncf.notary.signature";
/// How long anything is waited for.
const LIMIT: Duration = Duration::from_secs(30);

/// A registry with a signed index, a coordinator with a worker elsewhere, and room for layouts.
struct Stage {
    from: Conforming,
    index: Index,
    coordinator: Coordinator,
    worker: Worker,
    directory: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let from = Conforming::start();
        let index = signed_index(&from);
        let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
        let worker = Worker::start(&coordinator, &["--slots", "2"]);
        Self { from, index, coordinator, worker, directory: scratch() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn layout(&self, name: &str) -> String {
        format!("oci-layout://{}", text(&self.at(name)))
    }

    /// The signed index in a layout, with all that belongs to it.
    fn saved(&self) -> String {
        let layout = self.layout("saved");
        if !self.at("saved").exists() {
            locally(["copy", &self.from.uri("app:1"), &layout, "--referrers"]).ok();
        }
        layout
    }

    fn through(&self, arguments: &[&str]) -> Run {
        locally(arguments).env("OCCYSTRAP_COORDINATOR", self.coordinator.url())
    }

    fn by(&self, who: &str, arguments: &[&str]) -> Run {
        if who == "here" { locally(arguments) } else { self.through(arguments) }
    }
}

/// An index of two images, of which a filter changes both, an attestation of the first, and signatures of it and of an image.
fn signed_index(registry: &Conforming) -> Index {
    let image = |architecture: &str| {
        let own = Layer::of(&[Member::file("own.key", architecture), Member::file("name", architecture)]);
        Image::on(Family::Oci, ("linux", architecture, None), vec![own, Layer::noise(3, 2_000_000)])
    };
    let images = ["amd64", "arm64"].map(image);
    let index = attested(&images);
    for image in &index.images {
        registry.add_image("app", &image.digest(), image);
    }
    registry.add_manifest("app", "1", Family::Oci.index(), &index.manifest);
    registry.add_artifact("app", NOTATION, &index.manifest, Family::Oci.index());
    registry.add_artifact("app", NOTATION, &images[0].manifest, Family::Oci.manifest());
    let signature = Image::oci(vec![Layer::noise(8, 100)]);
    registry.add_image("app", &format!("{}.sig", sha256(&index.manifest).replace(':', "-")), &signature);
    index
}

/// What is printed and said, without what no two runs have in common.
fn told(ended: &Ended, names: &[(&str, &str)]) -> (String, String) {
    let text = ended.text();
    let mut documents: Vec<Value> =
        serde_json::Deserializer::from_str(&text).into_iter::<Value>().map_while(Result::ok).collect();
    let printed = if documents.is_empty() {
        text.lines().map(|line| line.split(" in ").take(1).collect::<String>()).collect()
    } else {
        documents.iter_mut().for_each(strip);
        serde_json::to_string_pretty(&documents).expect("JSON")
    };
    // How long it took is said last.
    let said = ended.stderr.lines().map(|line| line.split(" seconds").next().unwrap_or_default());
    let said: Vec<_> = said.map(|line| line.rsplit_once(" in ").map_or(line, |(start, _)| start)).collect();
    let alike = |text: String| names.iter().fold(text, |text, (name, alike)| text.replace(name, alike));
    (alike(printed), alike(said.join("\n")))
}

fn strip(told: &mut Value) {
    if let Some(told) = told.as_object_mut() {
        told.remove("seconds");
        told.values_mut().for_each(strip);
    }
    told.as_array_mut().into_iter().flatten().for_each(strip);
}

/// Every file of a layout, by its digest; the index as it is.
fn files(root: &Path) -> BTreeMap<String, Value> {
    let tree = judge::tree(root);
    let entries = tree.as_object().expect("a tree").iter();
    entries.map(|(path, entry)| (path.clone(), entry["sha256"].clone())).collect()
}

/// All that a registry has of a repository: its tags and what they mean, and who refers to what.
fn held(registry: &Conforming, digests: &[String]) -> Value {
    let tags = registry.tags("app");
    let tags: BTreeMap<_, _> = tags
        .iter()
        .map(|tag| (tag.clone(), sha256(&registry.manifest("app", tag).expect("a manifest").1)))
        .collect();
    let referrers: BTreeMap<_, _> =
        digests.iter().map(|digest| (digest.clone(), registry.referrers("app", digest))).collect();
    json!({"tags": tags, "referrers": referrers, "digests": registry.digests("app")})
}

#[test]
fn a_copy_to_or_from_a_layout_is_as_without_a_coordinator() {
    let stage = Stage::new();
    let source = stage.from.uri("app:1");
    let saved = stage.saved();
    let digests =
        [vec![sha256(&stage.index.manifest)], stage.index.images.iter().map(Image::digest).collect()];
    for (number, options) in [
        &[][..],
        &["--referrers"],
        &["--platform", "linux/arm64", "--signatures", "drop"],
        &["--platform", "linux/amd64", "--signatures", "keep"],
        &["--platform", "linux/amd64", "--sparse", "--referrers"],
        &["--platform", "linux/s390x"],
        &["--platform", "linux/amd64"],
        &["--platform", "linux/arm64", "--preserve-digests", "--signatures", "drop"],
    ]
    .iter()
    .enumerate()
    {
        let down = |who: &str| {
            let name = format!("{who}{number}");
            let layout = stage.layout(&name);
            let run = [&["copy", &source, &layout, "--output-format", "json", "-j", "1"], *options].concat();
            let ended = stage.by(who, &run).run();
            let made = stage.at(&name).exists().then(|| files(&stage.at(&name)));
            (ended.status.code(), told(&ended, &[(&name, "NAME")]), made)
        };
        assert_eq!(down("there"), down("here"), "from a registry {options:?}");
        let up = |who: &str| {
            let to = Conforming::start();
            let uri = to.uri("app:new");
            // One after the other, so that what is there twice is found the second time.
            let run = [&["copy", &saved, &uri, "--output-format", "json", "-j", "1"], *options].concat();
            let ended = stage.by(who, &run).run();
            (ended.status.code(), told(&ended, &[(&to.host(), "HOST")]), held(&to, &digests.concat()))
        };
        assert_eq!(up("there"), up("here"), "from a layout {options:?}");
    }
    // Again, what is there moves no more; and in words.
    let again = |who: &str| {
        let layout = format!("{}?tag=other", stage.layout(&format!("{who}0")));
        told(&stage.by(who, &["copy", &source, &layout]).ok(), &[(who, "WHO")])
    };
    assert_eq!(again("there"), again("here"));
    assert_eq!(files(&stage.at("there0")), files(&stage.at("here0")));
    // A tar is one, and the same.
    for who in ["here", "there"] {
        stage.by(who, &["copy", &source, &stage.layout(&format!("{who}.tar"))]).ok();
    }
    assert_eq!(sha256(&read(stage.at("there.tar"))), sha256(&read(stage.at("here.tar"))));
    let back = Conforming::start();
    stage.through(&["copy", &stage.layout("there.tar"), &back.uri("app:1")]).ok();
    assert_eq!(back.manifest("app", "1").expect("it").1, stage.index.manifest);
    // Between two layouts nobody else is needed.
    stage.through(&["copy", &saved, &stage.layout("between"), "--referrers"]).ok();
    assert_eq!(files(&stage.at("between")), files(&stage.at("saved")));
}

#[test]
fn an_index_passes_filters_to_or_from_a_layout_as_without_a_coordinator() {
    let stage = Stage::new();
    let (source, saved) = (stage.from.uri("app:1"), stage.saved());
    for (number, options) in [
        &["--all", "--signatures", "drop"][..],
        &["--all"],
        &["--all", "--attestations", "retarget", "--signatures", "keep", "--provenance"],
        &["--architecture", "arm64", "--provenance"],
        &["--architecture", "amd64", "--signatures", "refuse"],
        &["--architecture", "arm64", "--signatures", "keep", "--compression", "zstd:3"],
    ]
    .iter()
    .enumerate()
    {
        for filters in [&[][..], &["-f", FILTER, "-f", "search:pattern=name"]] {
            let case = format!("{number}{}", filters.len());
            let options = [&["--output-format", "json"], *options, filters].concat();
            let down = |who: &str, source: &str| {
                let name = format!("{who}-{case}-{}", source.starts_with("oci"));
                let ended =
                    stage.by(who, &[&["process", source, &stage.layout(&name)], &options[..]].concat());
                let ended = ended.run();
                let made = stage.at(&name).exists().then(|| files(&stage.at(&name)));
                (ended.status.code(), told(&ended, &[(&name, "NAME")]), made)
            };
            assert_eq!(down("there", &source), down("here", &source), "down {options:?}");
            assert_eq!(down("there", &saved), down("here", &saved), "beside {options:?}");
            let up = |who: &str| {
                let to = Conforming::start();
                let uri = to.uri("app:new");
                let run = [&["process", &saved, &uri], &options[..]].concat();
                let ended = stage.by(who, &run).run();
                let said = told(&ended, &[(&to.host(), "HOST")]);
                (ended.status.code(), said, held(&to, &[]))
            };
            assert_eq!(up("there"), up("here"), "up {options:?}");
        }
    }
    assert!(stage.worker.log().contains("task begins"), "{}", stage.worker.log());
}

#[test]
fn an_image_in_a_layout_or_made_of_one_is_verified_as_without_a_coordinator() {
    let stage = Stage::new();
    let (source, saved) = (stage.from.uri("app:1"), stage.saved());
    let (made, far) = (stage.layout("made"), stage.from.uri("made:1"));
    let options = ["--all", "-f", FILTER, "--provenance", "--signatures", "drop"];
    locally([&["process", &source, &made], &options[..]].concat()).ok();
    locally([&["process", &saved, &far], &options[..]].concat()).ok();
    for (arguments, code) in [
        (&["verify", &made][..], 0),
        (&["verify", &made, "--source", &source], 0),
        (&["verify", &made, "--source", &saved], 0),
        (&["verify", &far, "--source", &saved], 0),
        (&["verify", &far, "--source", &source], 0),
        // Something else, and what was not made so.
        (&["verify", &far, "--source", &made], 1),
        (&["verify", &saved], 1),
        (&["verify", &stage.layout("nowhere")], 1),
        (&["verify", &tar_uri(&stage.at("a.tar"))], 2),
        // What has no manifests is no source, wherever it would be read.
        (&["verify", &far, "--source", &tar_uri(&stage.at("a.tar"))], 1),
        (&["verify", &far, "--source", &format!("dir://{}", text(&stage.at("a")))], 1),
        (&["verify", &far, "--source", "docker://app:1"], 1),
        (&["verify", &made, "--source", "docker://app:1"], 1),
        (&["verify", &far, "--source", "tar://a.tar?tag=1"], 2),
        (&["verify", &far, "--source", "oci://a"], 2),
    ] {
        for format in ["text", "json"] {
            let arguments = [arguments, &["--output-format", format]].concat();
            let run = |who: &str| {
                // Whom a statement names may be reached as this coordinator's operator says.
                let allowed: &[&str] = if who == "here" { &["--allow-network", "127.0.0.0/8"] } else { &[] };
                let ended = stage.by(who, &[&arguments[..], allowed].concat()).run();
                (ended.status.code(), ended.text(), ended.stderr)
            };
            let here = run("here");
            assert_eq!(run("there"), here, "{arguments:?}");
            assert_eq!(here.0, Some(code), "{arguments:?}: {}", here.2);
        }
    }
    assert!(stage.worker.log().contains("task begins"), "{}", stage.worker.log());
}

#[test]
fn what_an_end_has_no_room_for_is_refused_as_without_a_coordinator() {
    let stage = Stage::new();
    let (source, saved) = (stage.from.uri("app:1"), stage.saved());
    stage.from.add_image("one", "1", &small());
    let one = stage.from.uri("one:1");
    locally(["process", &one, &tar_uri(&stage.at("one.tar"))]).ok();
    let tar = tar_uri(&stage.at("one.tar"));
    let none = stage.from.uri("none:1");
    for from in [&source, &saved, &one, &tar, &none] {
        for to in ["tar", "dir", "oci-layout"] {
            for options in [
                &["--all"][..],
                &["--all", "--provenance"],
                &["--provenance"],
                &["--signatures", "keep"],
                &["--signatures", "refuse"],
                &["--signatures", "drop"],
            ] {
                let run = |who: &str| {
                    let name = stage.at(&format!("{who}-out"));
                    let to = format!("{to}://{}", text(&name));
                    let run = [&["process", from, &to, "--architecture", "amd64"], options].concat();
                    let ended = stage.by(who, &run).run();
                    let made = name.is_dir().then(|| files(&name));
                    drop(std::fs::remove_file(&name));
                    drop(std::fs::remove_dir_all(&name));
                    (ended.status.code(), told(&ended, &[(who, "WHO")]), made)
                };
                assert_eq!(run("there"), run("here"), "{from} {to} {options:?}");
            }
        }
    }
    let up = |who: &str, option: &[&str]| {
        let to = Conforming::start();
        let ended = stage.by(who, &[&["process", &tar, &to.uri("app:1")], option].concat()).run();
        (ended.status.code(), told(&ended, &[(&to.host(), "HOST")]), held(&to, &[]))
    };
    for option in [&["--all"][..], &["--provenance"], &["--signatures", "keep"], &["--signatures", "refuse"]]
    {
        assert_eq!(up("there", option), up("here", option), "{option:?}");
    }
}

#[test]
fn what_is_wrong_with_a_layout_is_told_as_without_a_coordinator_and_nothing_is_named() {
    let stage = Stage::new();
    let saved = stage.saved();
    let image = &stage.index.images[1];
    let blob = |name: &str, digest: &str| stage.at(name).join("blobs").join(digest.replace(':', "/"));
    let spoiled = |name: &str, spoil: &dyn Fn(&Path)| {
        locally(["copy", &saved, &stage.layout(name), "--referrers"]).ok();
        spoil(&blob(name, &image.layer_digests()[1]));
        stage.layout(name)
    };
    let flip = |path: &Path| {
        let mut bytes = read(path);
        bytes[1_000_000] ^= 1;
        write(path, bytes);
    };
    let broken = [
        spoiled("flipped", &flip),
        spoiled("short", &|path| write(path, b"short")),
        // Of one image alone: registries are told of manifests in no order.
        spoiled("missing", &|_| {
            std::fs::remove_file(blob("missing", &image.layer_digests()[0])).expect("a blob");
        }),
        spoiled("config", &|_| write(blob("config", &image.config_digest()), b"{}")),
        spoiled("manifest", &|_| {
            std::fs::remove_file(blob("manifest", &image.digest())).expect("a manifest");
        }),
        spoiled("unmarked", &|_| std::fs::remove_file(stage.at("unmarked/oci-layout")).expect("a marker")),
        format!("{saved}?tag=other"),
        stage.layout("nowhere"),
    ];
    for source in &broken {
        for command in [
            &["copy"][..],
            &["copy", "--sparse"],
            &["process", "--all", "-f", FILTER, "--signatures", "drop"],
        ] {
            let run = |who: &str| {
                let to = Conforming::start();
                let uri = to.uri("app:1");
                let run = [&command[..1], &[source, &uri, "-j", "1"], &command[1..]].concat();
                let ended = stage.by(who, &run).run();
                (ended.status.code(), told(&ended, &[(&to.host(), "HOST")]), to.tags("app"))
            };
            let (here, there) = (run("here"), run("there"));
            if source.ends_with("flipped") {
                // One process may hear first of a registry that this is not what it is called, or of a decoder.
                assert!(there.1.1.contains("digest mismatch"), "{}", there.1.1);
                assert_eq!((here.0, &here.2), (there.0, &there.2), "{command:?}");
            } else {
                assert_eq!(there, here, "{source} {command:?}");
            }
            assert_eq!(here.2.is_empty(), here.0 != Some(0), "{source} {command:?}");
        }
    }
    let source = stage.from.uri("app:1");
    std::fs::create_dir(stage.at("taken")).expect("a directory");
    write(stage.at("taken/file"), b"x");
    write(stage.at("file"), b"x");
    for to in ["oci-layout:///proc/nowhere".to_owned(), stage.layout("taken"), stage.layout("file/below")] {
        for command in [&["copy"][..], &["process", "--all", "--signatures", "keep"]] {
            let run = |who: &str| {
                let run = [&command[..1], &[&source, &to], &command[1..]].concat();
                let ended = stage.by(who, &run).fails(1);
                told(&ended, &[])
            };
            assert_eq!(run("there"), run("here"), "{to} {command:?}");
        }
    }
}

/// Waits until it holds.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "not in time: {what}");
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_client_that_is_killed_takes_its_call_with_it_and_nothing_is_named() {
    let stage = Stage::new();
    let saved = stage.saved();
    let coordinator = Coordinator::start(&["--embedded-workers", "1", "--max-calls", "1"]);
    let to = Registry::start();
    let proxy = FaultProxy::before(to.host());
    for run in [&["copy"][..], &["process", "--all", "-f", FILTER, "--signatures", "drop"]] {
        let barrier = Barrier::default();
        proxy.fault(1, "PUT", "*/blobs/uploads/*", barrier.fault());
        let uri = format!("registry://{}/app:1", proxy.host());
        let run = [&run[..1], &[&saved, &uri], &run[1..]].concat();
        let mut client = locally(run).env("OCCYSTRAP_COORDINATOR", coordinator.url()).start();
        wait_until("a blob is on its way", || proxy.pending() == 0);
        let other = json!({"image": stage.from.uri("app:1")});
        coordinator.ask("ResolveImage", &other).fails("RESOURCE_EXHAUSTED", "TOO_MANY");
        client.kill().expect("it runs");
        client.wait().expect("it ends");
        wait_until("its call has ended", || coordinator.ask("ResolveImage", &other).error.is_none());
        barrier.open();
        assert!(!to.has("app", "1"));
    }
}

#[test]
fn a_coordinator_that_is_killed_leaves_a_layout_as_it_was() {
    let mut stage = Stage::new();
    let layout = stage.layout("out");
    stage.from.add_image("one", "0", &small());
    locally(["copy", &stage.from.uri("one:0"), &layout]).ok();
    let before = files(&stage.at("out"));
    let proxy = FaultProxy::before(&stage.from.host());
    let barrier = Barrier::default();
    let last = &stage.index.images[1].layer_digests()[0];
    proxy.fault(1, "GET", &format!("*/blobs/{last}"), barrier.fault());
    let source = format!("registry://{}/app:1", proxy.host());
    let client = stage.through(&["copy", &source, &layout, "-j", "2"]);
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| client.fails(1));
        wait_until("the last blob is on its way", || proxy.pending() == 0);
        stage.coordinator.kill();
        let ended = ended.join().expect("it fails");
        ended.says(&["lost the coordinator", &stage.coordinator.url(), "hint: "]);
    });
    barrier.open();
    let after = files(&stage.at("out"));
    assert_eq!(after["index.json"], before["index.json"]);
    for (path, digest) in &after {
        // Blobs that nothing names yet may have come, each of them whole.
        if let Some((_, name)) = path.split_once("blobs/sha256/") {
            assert_eq!(*digest, name);
        } else {
            assert!(before.contains_key(path), "{path}");
        }
    }
    stage.coordinator.restart();
    stage.through(&["copy", &source, &layout]).ok();
    locally(["check", &format!("{layout}?tag=1")]).ok();
}

#[test]
fn a_client_that_does_not_read_costs_the_coordinator_no_memory() {
    let from = Registry::start();
    let image = Image::oci(vec![Layer::noise(1, 96 << 20)]);
    let source = from.push(&image, "app", "1");
    let directory = scratch();
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let layout = format!("oci-layout://{}", text(&directory.path().join("layout")));
    let before = coordinator.peak_memory();
    let mut client =
        locally(["copy", &source, &layout]).env("OCCYSTRAP_COORDINATOR", coordinator.url()).start();
    let is_begun = || std::fs::read_dir(directory.path().join("layout/blobs")).is_ok();
    wait_until("the layout is open", is_begun);
    let signal = |name: &str| {
        occy_tests::tools::tool("kill", [format!("-{name}"), client.id().to_string()]);
    };
    signal("STOP");
    // What could come by then has come.
    let (mut peak, mut same) = (0, 0);
    wait_until("its memory stays as it is", || {
        let now = coordinator.peak_memory();
        (peak, same) = (now, if now == peak { same + 1 } else { 0 });
        same == 50
    });
    signal("CONT");
    assert!(client.wait().expect("it ends").success());
    let peak = coordinator.peak_memory();
    assert!(peak - before < 48 << 20, "{before} became {peak}");
    locally(["check", &layout]).ok();
}

#[test]
fn a_coordinator_of_an_earlier_version_is_told_apart() {
    let older = Older::start();
    let directory = scratch();
    let layout = format!("oci-layout://{}", text(&directory.path().join("layout")));
    locally(["process", &Registry::start().push(&small(), "app", "1"), &layout]).ok();
    for run in [
        &["copy", &layout, "registry://localhost:1/a:1"][..],
        &["process", &layout, "registry://localhost:1/a:1", "--all"],
    ] {
        let ended = locally(run).env("OCCYSTRAP_COORDINATOR", older.url()).fails(2);
        ended.says(&[&older.url(), "is of a version that cannot use image layouts of this machine"]);
    }
}

/// A start of LendLayout that copies what is lent.
fn copy_of(source: Option<&str>, destination: Option<&str>) -> Value {
    let lent = |end: Option<&str>| if end.is_none() { json!({"path": "lent"}) } else { Value::Null };
    let copy = json!({"source": source.unwrap_or_default(), "destination": destination.unwrap_or_default()});
    json!({"copy": copy, "source": lent(source), "destination": lent(destination)})
}

#[test]
fn a_client_in_another_language_lends_layouts_too() {
    let stage = Stage::new();
    stage.saved();
    let to = Conforming::start();
    let lend = |start: &Value, layout: &str| {
        stage.coordinator.call("LendLayout", start).with("layout", text(&stage.at(layout)))
    };
    let up = lend(&copy_of(None, Some(&to.uri("app:1"))), "saved").run().all();
    let result = &up.last().expect("a result")["copy"]["result"];
    assert_eq!(result["manifest_digest"], sha256(&stage.index.manifest), "{up:?}");
    assert_eq!(to.manifest("app", "1").expect("it").1, stage.index.manifest);
    let down = lend(&copy_of(Some(&stage.from.uri("app:1")), None), "down").run().all();
    assert_eq!(down.last().expect("a result")["copy"]["result"]["destination"], "oci-layout://lent");
    let back = Conforming::start();
    locally(["copy", &stage.layout("down"), &back.uri("app:1")]).ok();
    assert_eq!(back.manifest("app", "1").expect("it").1, stage.index.manifest);
    let spec =
        json!({"filters": [FILTER], "all": true, "provenance": true, "signatures": "SIGNATURE_POLICY_KEEP"});
    let both = json!({"path": "lent"});
    let start = json!({"process": {"spec": spec}, "source": both, "destination": both});
    let processed = lend(&start, "saved").run().all();
    let result = &processed.last().expect("a result")["process"]["result"];
    assert_eq!(result["index"]["image_count"], 2, "{result}");
    locally([
        "verify",
        &format!("{}?digest={}", stage.layout("saved"), result["manifest_digest"].as_str().expect("one")),
        "--source",
        &stage.layout("saved"),
    ])
    .ok();

    // One that does not keep to it ends its own call, and nothing has a name.
    let none = Conforming::start();
    let start = copy_of(None, Some(&none.uri("app:1")));
    lend(&start, "saved").switch("corrupt").run().fails("FAILED_PRECONDITION", "IMAGE_BROKEN");
    lend(&start, "saved").switch("unasked").run().fails("INVALID_ARGUMENT", "INVALID_ELEMENTS");
    let missing = lend(&start, "nowhere").run().fails("FAILED_PRECONDITION", "IMAGE_BROKEN");
    assert!(missing.to_string().contains("index.json is missing"), "{missing}");
    for (bad, field) in [
        (json!({"copy": {"source": "registry://a/b", "destination": "registry://a/c"}}), "start"),
        (json!({"source": both}), "start"),
        (
            json!({"copy": {"source": "registry://a/b", "destination": "registry://a/c"}, "source": both}),
            "source",
        ),
        (json!({"copy": {}, "source": {"path": "x".repeat(5000)}}), "source"),
    ] {
        let details = lend(&bad, "saved").run().fails("INVALID_ARGUMENT", "INVALID_FIELD");
        assert!(details.to_string().contains(field), "{details}");
    }
    assert!(none.tags("app").is_empty());
}
