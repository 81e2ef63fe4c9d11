//! Layouts of the client's own machine that a coordinator works with: what one process makes of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::text;
use occy_tests::conforming::Conforming;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::{Ended, Run, locally};
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::{read, sha256, write};
use occy_tests::worker::Worker;
use serde_json::{Value, json};

use crate::{layers, scratch, small, tar_uri};

const FILTER: &str = "exclude:pattern=*.key";
const NOTATION: &str = "application/vnd.cncf.notary.signature";
const OF: &str = "vnd.docker.reference.digest";
const TYPE: &str = "vnd.docker.reference.type";
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
    let about = Image::oci(vec![Layer::noise(7, 500)]);
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let mut index = Index::new(
        Family::Oci,
        vec![
            (platform("amd64"), images[0].clone()),
            (platform("arm64"), images[1].clone()),
            (json!({"os": "unknown", "architecture": "unknown"}), about),
        ],
    );
    let mut document = json_of(&index.manifest);
    document["manifests"][2]["annotations"] = json!({TYPE: "attestation-manifest", OF: images[0].digest()});
    index.manifest = document.to_string().into_bytes();
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
            let run = [&["copy", &source, &layout, "--output-format", "json"], *options].concat();
            let ended = stage.by(who, &run).run();
            let made = stage.at(&name).exists().then(|| files(&stage.at(&name)));
            (ended.status.code(), told(&ended, &[(&name, "NAME")]), made)
        };
        assert_eq!(down("there"), down("here"), "from a registry {options:?}");
        let up = |who: &str| {
            let to = Conforming::start();
            let uri = to.uri("app:new");
            let run = [&["copy", &saved, &uri, "--output-format", "json"], *options].concat();
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
