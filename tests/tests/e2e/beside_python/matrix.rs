//! Every source with every output and every filter that both tools have.
//!
//! Each cell costs a start of the Python tool. So only as many are run as hold every source, output and filter, unless
//! `OCCY_TEST_ALL` is set.

use std::path::{Path, PathBuf};

use occy_tests::certificates::text;
use occy_tests::engine::Engine;
use occy_tests::image::{Image, json_of};
use occy_tests::judge;
use occy_tests::layer::tar;
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::saved::{self, read_saved};
use occy_tests::tools::{read, write};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Python;
use crate::{scratch, small, tar_uri};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Registry,
    Tar,
    Docker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Tar,
    Dir,
    SharedDir,
    ExpandedDir,
    Oci,
    Registry,
    Docker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    None,
    Normalize,
    Exclude,
    Search,
    Inspect,
}

impl Filter {
    fn edits(self) -> bool {
        matches!(self, Self::Normalize | Self::Exclude)
    }
}

const SOURCES: [Source; 3] = [Source::Registry, Source::Tar, Source::Docker];
const OUTPUTS: [Output; 7] = [
    Output::Tar,
    Output::Dir,
    Output::SharedDir,
    Output::ExpandedDir,
    Output::Oci,
    Output::Registry,
    Output::Docker,
];
const FILTERS: [Filter; 5] =
    [Filter::None, Filter::Normalize, Filter::Exclude, Filter::Search, Filter::Inspect];

/// The image in every source, and room for outputs.
struct Stage {
    python: Python,
    registry: Registry,
    engine: Engine,
    directory: TempDir,
    image: Image,
    /// Without a registry and a tag. No other test has it.
    name: String,
}

/// What one tool made.
struct Made {
    names: Vec<String>,
    config: Vec<u8>,
    tars: Vec<Vec<u8>>,
    tree: Option<Value>,
    printed: String,
    inspected: Option<Value>,
}

#[test]
fn both_tools_make_the_same_of_the_same_image() {
    let test = "both_tools_make_the_same_of_the_same_image";
    let (Some(python), Some(mut engine)) = (Python::find(test), Engine::docker(test)) else { return };
    let image = small();
    let full = engine.name("beside");
    engine.load_as(&image, &full);
    let name = full.trim_start_matches("localhost/").trim_end_matches(":1").to_owned();
    let (registry, directory) = (Registry::start(), scratch());
    registry.push(&image, &name, "1");
    write(directory.path().join("in.tar"), tar(&saved::docker_v12(&[(&image, &[&full])])));
    let mut stage = Stage { python, registry, engine, directory, image, name };
    let all = std::env::var_os("OCCY_TEST_ALL").is_some();
    for (s, &source) in SOURCES.iter().enumerate() {
        for (o, &output) in OUTPUTS.iter().enumerate() {
            for (f, &filter) in FILTERS.iter().enumerate() {
                let every_filter = source == Source::Registry && output == Output::Tar;
                // Trees are compared without a filter only.
                let has_tree = matches!(output, Output::ExpandedDir | Output::Oci) && filter == Filter::None;
                let turn = f == (2 * o + s) % FILTERS.len() || has_tree;
                let every_output = (s + o) % SOURCES.len() == 0 && turn;
                if all || every_filter || every_output {
                    stage.compare(source, output, filter);
                }
            }
        }
    }
}

impl Stage {
    fn source(&self, source: Source) -> String {
        match source {
            Source::Registry => self.registry.uri(&format!("{}:1", self.name)),
            Source::Tar => tar_uri(&self.directory.path().join("in.tar")),
            Source::Docker => self.engine.uri(&format!("localhost/{}:1", self.name)),
        }
    }

    fn place(&self, who: &str) -> PathBuf {
        self.directory.path().join(who)
    }

    fn destination(&self, output: Output, who: &str) -> String {
        let path = text(&self.place(who));
        match output {
            Output::Tar => format!("tar://{path}"),
            Output::Dir => format!("dir://{path}"),
            Output::SharedDir => format!("dir://{path}?unique_names=true"),
            Output::ExpandedDir => format!("dir://{path}?expand=true"),
            Output::Oci => format!("oci://{path}"),
            Output::Registry => self.registry.uri(&format!("{who}:1")),
            Output::Docker => self.engine.uri(&format!("localhost/{}-{who}:1", self.name)),
        }
    }

    fn filter(&self, filter: Filter, who: &str) -> Vec<String> {
        let spec = match filter {
            Filter::None => return Vec::new(),
            Filter::Normalize => "normalize-timestamps:ts=5".to_owned(),
            Filter::Exclude => "exclude:pattern=etc/app.conf".to_owned(),
            Filter::Search => "search:pattern=*.conf".to_owned(),
            Filter::Inspect => format!("inspect:file={}", text(&self.place(&format!("{who}.jsonl")))),
        };
        vec![spec]
    }

    fn compare(&mut self, source: Source, output: Output, filter: Filter) {
        let cell = format!("{source:?} {output:?} {filter:?}");
        let from = self.source(source);
        let [to, theirs_to] = ["ours", "theirs"].map(|who| self.destination(output, who));
        let specs = self.filter(filter, "ours");
        let arguments: Vec<&str> = specs.iter().flat_map(|spec| ["-f", spec]).collect();
        let printed = occyctl([&["process", &from, &to], &arguments[..]].concat()).ok().text();
        // A Docker Engine gives the image the name that the tar has.
        let loaded = [format!("localhost/{}-ours:1", self.name), format!("{}:1", self.name)];
        let ours = self.made(output, filter, "ours", &loaded[0], printed);
        let specs = self.filter(filter, "theirs");
        let specs: Vec<&str> = specs.iter().map(String::as_str).collect();
        let theirs = if output == Output::Oci {
            // It looks for a manifest.json in the bundle, and finds its own work wrong.
            let filters: Vec<&str> = specs.iter().flat_map(|spec| ["-f", spec]).collect();
            let ended = self.python.run(&[&["process", &from, &theirs_to], &filters[..]].concat());
            let printed = String::from_utf8_lossy(&ended.stdout).into_owned();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert!(!ended.status.success() && said.contains("Manifest file missing"), "{cell}: {said}");
            self.made(output, filter, "theirs", &loaded[1], printed)
        } else {
            let printed = self.python.process(&from, &theirs_to, &specs);
            self.made(output, filter, "theirs", &loaded[1], printed)
        };
        self.names(source, output, &ours, &theirs, &cell);
        self.layers(filter, &ours, &theirs, &cell);
        if !ours.config.is_empty() {
            self.configs(output, filter, &ours, &theirs, &cell);
        }
        // Behind a filter it never unpacks.
        let has_tree = matches!(output, Output::ExpandedDir | Output::Oci);
        assert_eq!(ours.tree.is_some(), has_tree, "{cell}");
        assert_eq!(theirs.tree.is_some(), has_tree && filter == Filter::None, "{cell}");
        if let (Some(ours), Some(theirs)) = (&ours.tree, &theirs.tree) {
            assert_eq!(comparable(ours), comparable(theirs), "{cell}");
        }
        match filter {
            Filter::Search => assert_eq!(found(&ours.printed), found(&theirs.printed), "{cell}"),
            Filter::Inspect => self.inspected(source, &ours, &theirs, &cell),
            _ => {}
        }
        if (source, output, filter.edits()) == (Source::Registry, Output::Registry, false) {
            assert_eq!(self.registry.digest("ours", "1"), self.image.digest(), "{cell}: a copy is exact");
            assert_ne!(self.registry.digest("theirs", "1"), self.image.digest(), "{cell}: compressed anew");
        }
        self.clean(output, &loaded);
    }

    fn made(&self, output: Output, filter: Filter, who: &str, loaded: &str, printed: String) -> Made {
        let place = self.place(who);
        let lines = |path: PathBuf| json_of(&read(path));
        let inspected = (filter == Filter::Inspect).then(|| lines(self.place(&format!("{who}.jsonl"))));
        let made = |names, config, tars| Made { names, config, tars, tree: None, printed, inspected };
        match output {
            Output::Tar => {
                let saved = read_saved(&place);
                made(saved.names, saved.config, saved.tars)
            }
            Output::Docker => {
                let saved = self.engine.save(loaded);
                made(saved.names, saved.config, saved.tars)
            }
            Output::Registry => {
                let pulled = self.registry.pull(who, "1");
                made(vec![], pulled.config, pulled.tars)
            }
            Output::Oci => Made { tree: tree(&place.join("rootfs")), ..made(vec![], vec![], vec![]) },
            Output::Dir | Output::SharedDir | Output::ExpandedDir => {
                let catalog = json_of(&read(place.join("catalog.json")));
                let (name, tags) =
                    catalog.as_object().and_then(|images| images.iter().next()).expect("an image");
                let manifest = json_of(&read(place.join(tags["1"].as_str().expect("a manifest"))));
                let file = |name: &Value| read(place.join(name.as_str().expect("a name")));
                let layers = manifest[0]["Layers"].as_array().expect("layers");
                let names =
                    vec![name.clone(), manifest[0]["RepoTags"][0].as_str().expect("a name").to_owned()];
                let tars = layers.iter().map(file).collect();
                let tree = tree(&place.join("manifest"));
                Made { tree, ..made(names, file(&manifest[0]["Config"]), tars) }
            }
        }
    }

    /// Ours are the names in full. Theirs lack the registry, and in `RepoTags` all but the last component.
    fn names(&self, source: Source, output: Output, ours: &Made, theirs: &Made, cell: &str) {
        let host = if source == Source::Registry { self.registry.host() } else { "localhost" };
        let (full, short) = (format!("{host}/{}", self.name), self.name.as_str());
        let catalogued = if source == Source::Registry { short.to_owned() } else { full.clone() };
        let (our, their) = match output {
            Output::Tar => (vec![format!("{full}:1")], vec![format!("{short}:1")]),
            // The name in the destination is ours alone.
            Output::Docker => (vec![format!("localhost/{}-ours:1", self.name)], vec![format!("{short}:1")]),
            Output::Dir | Output::SharedDir | Output::ExpandedDir => {
                (vec![full.clone(), format!("{full}:1")], vec![catalogued, format!("{short}:1")])
            }
            Output::Oci | Output::Registry => (vec![], vec![]),
        };
        assert_eq!((&ours.names, &theirs.names), (&our, &their), "{cell}");
    }

    fn layers(&self, filter: Filter, ours: &Made, theirs: &Made, cell: &str) {
        assert_eq!(ours.tars.len(), theirs.tars.len(), "{cell}");
        for (index, (our, their)) in ours.tars.iter().zip(&theirs.tars).enumerate() {
            let original = &self.image.layers[index].tar;
            let is_edited = filter == Filter::Normalize || (filter == Filter::Exclude && index == 0);
            assert_eq!(our == original, !is_edited, "{cell}: what no filter edits is as it was");
            assert_eq!(judge::members(our), judge::members(their), "{cell}, layer {index}");
            // It writes every tar anew behind such a filter, with blocks of 10 KiB.
            assert_eq!(their == original, !filter.edits(), "{cell}");
        }
    }

    fn configs(&self, output: Output, filter: Filter, ours: &Made, theirs: &Made, cell: &str) {
        let (mut our, mut their) = (json_of(&ours.config), json_of(&theirs.config));
        if filter.edits() {
            our["rootfs"]["diff_ids"].take();
            their["rootfs"]["diff_ids"].take();
        } else {
            assert_eq!(ours.config, self.image.config, "{cell}");
            let is_rewritten = matches!(output, Output::Dir | Output::SharedDir | Output::ExpandedDir);
            assert_eq!(theirs.config != self.image.config, is_rewritten, "{cell}");
        }
        if filter == Filter::Normalize {
            // The times in the config are no times of files, and it leaves them.
            let original = json_of(&self.image.config);
            for key in ["created", "history"] {
                assert_ne!(our[key].take(), original[key], "{cell}");
                assert_eq!(their[key].take(), original[key], "{cell}");
            }
        }
        assert_eq!(our, their, "{cell}");
    }

    /// Where a layer was not edited, the Python tool's `Id` is what the source calls it, and ours the diff_id.
    fn inspected(&self, source: Source, ours: &Made, theirs: &Made, cell: &str) {
        let (our, their) =
            (ours.inspected.clone().expect("a line"), theirs.inspected.clone().expect("a line"));
        let host =
            if source == Source::Registry { format!("{}/", self.registry.host()) } else { String::new() };
        assert_eq!(our["name"], format!("{host}{}", their["name"].as_str().expect("a name")), "{cell}");
        let theirs = their["layers"].as_array().expect("a list");
        for (place, index) in [(0, 1), (1, 0)] {
            let our = &our["layers"][place];
            assert_eq!(our["Id"], self.image.diff_ids()[index], "{cell}");
            assert_eq!(our["Tags"].is_null(), place == 1, "{cell}");
            assert_eq!(our["CreatedBy"], format!("ADD layer {index}"), "{cell}");
            // Out of a registry, its layers stand as they happened to arrive, beside the history of others.
            let id = Value::from(self.image.layer_digests()[index].as_str());
            let arrived = theirs.iter().find(|layer| layer["Id"] == id);
            assert_eq!(arrived.is_some(), source == Source::Registry, "{cell}");
            let their = arrived.unwrap_or(&theirs[place]);
            assert_eq!(our["Size"], their["Size"], "{cell}");
            for key in ["Created", "CreatedBy", "Comment"] {
                assert_eq!(our[key], theirs[place][key], "{cell}");
            }
            assert_eq!(our["Tags"].is_null(), theirs[place]["Tags"].is_null(), "{cell}");
            assert_ne!(our["Id"], their["Id"], "{cell}");
        }
    }

    fn clean(&self, output: Output, loaded: &[String]) {
        for who in ["ours", "theirs"] {
            for path in [self.place(who), self.place(&format!("{who}.jsonl"))] {
                remove(&path);
            }
        }
        if output == Output::Docker {
            for name in loaded {
                // The image itself stays under the name of the source.
                self.engine.client(["image", "rm", name]);
            }
        }
    }
}

fn remove(path: &Path) {
    if path.is_dir() {
        std::fs::remove_dir_all(path).expect("a directory");
    } else if path.exists() {
        std::fs::remove_file(path).expect("a file");
    }
}

/// The tree below a directory that is there.
fn tree(path: &Path) -> Option<Value> {
    path.is_dir().then(|| judge::tree(path))
}

/// A tree but for its top, for the times of directories, which the Python tool sets before it is done with them, and for those
/// of symbolic links, which it does not set.
fn comparable(tree: &Value) -> Value {
    let mut tree = tree.clone();
    tree["."] = Value::Null;
    for (_, entry) in tree.as_object_mut().expect("a tree") {
        if entry["type"] == json!("40000") || entry["type"] == json!("120000") {
            entry["mtime"] = Value::Null;
        }
    }
    tree
}

/// The findings, without what layers are called: ours is the diff_id, theirs what the source has. Out of a registry, its
/// layers stand as they happened to arrive.
fn found(printed: &str) -> Vec<&str> {
    let is_finding = |line: &&str| line.starts_with("  etc/") || line.starts_with("Found ");
    let mut lines: Vec<&str> = printed.lines().filter(is_finding).collect();
    lines.sort_unstable();
    lines
}
