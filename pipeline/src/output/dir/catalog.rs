//! `catalog.json`: which manifest belongs to which image and tag. The Python tool's form:
//! `{"IMAGE": {"TAG": "manifest-IMAGE-TAG.json"}}`, with the image's `/` as `_` in the file's name.
//!
//! An image that is unpacked too consists of two things, a manifest and a tree, which cannot be replaced in one step. Their name
//! then ends with a part of the config's digest, so that those of a new image stand beside those of the old one until the
//! catalog's line, and it alone, leads from the one to the other. What no line leads to any more is removed.
//!
//! Any number of processes may add images at once. Each reads and replaces the catalog under a lock that the kernel takes
//! away from a process that dies; a reader needs no lock, because the file is replaced in one step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::atomic::{self, parent, write_durably};
use crate::digest::Digest;
use crate::output::OutputError;
use crate::output::staging::{fail, remove};

/// The catalog's name.
pub const CATALOG: &str = "catalog.json";
/// What is locked. It also marks a directory as one of ours before the first image is in the catalog.
pub(super) const LOCK: &str = "catalog.lock";
/// A file name may have this many bytes.
const LONGEST_NAME: usize = 255;
/// So many digits of a config's digest tell the versions of an unpacked image apart.
const VERSION: usize = 16;

/// A catalog, locked against every other writer until it is dropped.
#[derive(Debug)]
pub(super) struct Catalog {
    path: PathBuf,
    images: BTreeMap<String, BTreeMap<String, String>>,
    _lock: File,
}

impl Catalog {
    /// Waits for the lock and reads the catalog of `directory`, where there is one.
    pub(super) fn lock(directory: &Path) -> Result<Self, OutputError> {
        let path = directory.join(LOCK);
        let lock = File::options().create(true).append(true).open(&path).map_err(fail("open", &path))?;
        atomic::lock(&lock).map_err(fail("lock", &path))?;
        let path = directory.join(CATALOG);
        let images = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| OutputError::Catalog { path: path.clone(), reason: error.to_string() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(fail("read", &path)(error)),
        };
        Ok(Self { path, images, _lock: lock })
    }

    /// The name of the manifest of an image, without `.json`, that no other image has; of its tree, too, where `unpacked` is the
    /// digest of the config that tells it from the image's earlier ones.
    pub(super) fn manifest_name(&self, image: &str, tag: &str, unpacked: Option<&Digest>) -> String {
        let version = unpacked.map(|config| format!("-{:.VERSION$}", config.hex())).unwrap_or_default();
        // `a/b` and `a_b`, or `a` with the tag `b-c` and `a-b` with the tag `c`, would have one name.
        let [plain, unique] = stems(image, tag).map(|stem| format!("{stem}{version}"));
        let others = self.lines().filter(|(name, _)| *name != (image, tag));
        let is_taken = others.map(|(_, manifest)| manifest).any(|manifest| stem_of(manifest) == Some(&plain));
        if plain.len() + ".json".len() <= LONGEST_NAME && !is_taken { plain } else { unique }
    }

    /// Makes a manifest that is there, with its tree if it has one, the image's. What the image had before is removed, and so is
    /// what a run left that was killed before it came so far.
    pub(super) fn publish(mut self, image: &str, tag: &str, manifest: String) -> Result<(), OutputError> {
        self.images.entry(image.to_owned()).or_default().insert(tag.to_owned(), manifest);
        let value = serde_json::to_value(&self.images).expect("strings are always JSON");
        write_durably(&self.path, &to_json(&value)).map_err(fail("write", &self.path))?;
        self.remove_unnamed(&stems(image, tag));
        Ok(())
    }

    /// Every image and tag with its manifest.
    fn lines(&self) -> impl Iterator<Item = ((&str, &str), &str)> {
        self.images.iter().flat_map(|(image, tags)| {
            tags.iter().map(|(tag, manifest)| ((image.as_str(), tag.as_str()), manifest.as_str()))
        })
    }

    /// Removes the manifests and trees of these names, in any version, that no line leads to. Whoever writes one holds the lock.
    fn remove_unnamed(&self, stems: &[String]) {
        let is_version = |rest: &str| {
            let hex = rest.strip_prefix('-').unwrap_or_default();
            hex.len() == VERSION && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        let is_own = |name: &str| {
            let mut rests = stems.iter().filter_map(|stem| name.strip_prefix(stem.as_str()));
            rests.any(|rest| rest.is_empty() || is_version(rest))
        };
        for entry in std::fs::read_dir(parent(&self.path)).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().map(|name| stem_of(name).unwrap_or(name)) else { continue };
            if is_own(name) && self.lines().all(|(_, manifest)| stem_of(manifest) != Some(name)) {
                remove(&entry.path());
            }
        }
    }
}

/// The names that a manifest of an image can have, before what tells its versions apart: the Python tool's, and one that is no
/// other image's.
fn stems(image: &str, tag: &str) -> [String; 2] {
    let plain = plain_name(image, tag);
    let hash = Digest::sha256(format!("{image}:{tag}"));
    let unique = format!("{:.96}-{:.32}", plain, hash.hex());
    [plain, unique]
}

/// A manifest's name without `.json`, which is its tree's.
fn stem_of(manifest: &str) -> Option<&str> {
    manifest.strip_suffix(".json")
}

/// The Python tool's name for a manifest.
fn plain_name(image: &str, tag: &str) -> String {
    format!("manifest-{}-{}", image.replace('/', "_"), tag.replace('/', "_"))
}

/// JSON as the Python tool writes it: keys sorted, four spaces a level.
pub(crate) fn to_json(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    let mut sorted = value.clone();
    sorted.sort_all_objects();
    serde::Serialize::serialize(&sorted, &mut serializer).expect("a JSON value can be written");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(directory: &Path, image: &str, tag: &str) -> String {
        add_unpacked(directory, image, tag, None)
    }

    /// Adds an image, with a tree if `config` is given.
    fn add_unpacked(directory: &Path, image: &str, tag: &str, config: Option<&str>) -> String {
        let catalog = Catalog::lock(directory).unwrap();
        let stem = catalog.manifest_name(image, tag, config.map(Digest::sha256).as_ref());
        let name = format!("{stem}.json");
        std::fs::write(directory.join(&name), "").unwrap();
        if config.is_some() {
            std::fs::create_dir_all(directory.join(stem).join("etc")).unwrap();
        }
        catalog.publish(image, tag, name.clone()).unwrap();
        name
    }

    fn manifests_and_trees(directory: &Path) -> Vec<String> {
        let mut names = atomic::tests::names(directory);
        names.retain(|name| name.starts_with("manifest-"));
        names
    }

    #[test]
    fn the_versions_of_an_unpacked_image_stand_side_by_side_until_the_catalog_leads_to_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        // As it was before versions had names of their own.
        let plain = add(dir.path(), "a/b", "1");
        std::fs::create_dir(dir.path().join("manifest-a_b-1")).unwrap();
        let others = [add(dir.path(), "a/b", "1-0123456789abcdef"), add(dir.path(), "a_b", "1")];
        let first = add_unpacked(dir.path(), "a/b", "1", Some("first"));
        let there = |own: &[&str]| {
            let mut names: Vec<_> = own.iter().copied().chain(others.iter().map(String::as_str)).collect();
            names.sort_unstable();
            assert_eq!(manifests_and_trees(dir.path()), names);
        };
        assert!(first.starts_with("manifest-a_b-1-") && first != plain, "{first}");
        there(&[&first, first.strip_suffix(".json").unwrap()]);

        let catalog = Catalog::lock(dir.path()).unwrap();
        let killed = catalog.manifest_name("a/b", "1", Some(&Digest::sha256("killed")));
        std::fs::create_dir(dir.path().join(&killed)).unwrap();
        std::fs::write(dir.path().join(format!("{killed}.json")), "").unwrap();
        drop(catalog);
        let second = add_unpacked(dir.path(), "a/b", "1", Some("second"));
        there(&[&second, second.strip_suffix(".json").unwrap()]);
        assert_eq!(add(dir.path(), "a/b", "1"), plain);
        there(&[&plain]);
    }

    #[test]
    fn images_whose_names_look_alike_have_manifests_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let names = [("a/b", "1"), ("a_b", "1"), ("a", "b-1"), ("a-b", "1"), ("a/b", "2")];
        let manifests: Vec<String> = names.iter().map(|(image, tag)| add(dir.path(), image, tag)).collect();
        assert_eq!(manifests[0], "manifest-a_b-1.json");
        let distinct: std::collections::BTreeSet<&String> = manifests.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{manifests:?}");
        for ((image, tag), manifest) in names.iter().zip(&manifests) {
            assert_eq!(&add(dir.path(), image, tag), manifest, "an image keeps the name that it has");
        }
        let long = add(dir.path(), &"x/".repeat(120), &"t".repeat(128));
        assert!(long.len() <= LONGEST_NAME, "{long}");
    }

    #[test]
    fn writers_at_once_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let dir = dir.path();
                scope.spawn(move || {
                    for tag in 0..10 {
                        add(dir, &format!("image{writer}"), &tag.to_string());
                    }
                });
            }
        });
        let catalog = Catalog::lock(dir.path()).unwrap();
        assert_eq!(catalog.images.len(), 8);
        assert!(catalog.images.values().all(|tags| tags.len() == 10));
    }

    #[test]
    fn a_catalog_that_is_none_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CATALOG), "{broken").unwrap();
        assert!(matches!(Catalog::lock(dir.path()), Err(OutputError::Catalog { .. })));
        assert_eq!(std::fs::read(dir.path().join(CATALOG)).unwrap(), b"{broken");
    }

    #[test]
    fn the_form_is_the_python_tools() {
        let dir = tempfile::tempdir().unwrap();
        add(dir.path(), "b", "2");
        add(dir.path(), "a/x", "1");
        let text = std::fs::read_to_string(dir.path().join(CATALOG)).unwrap();
        let expected = "{\n    \"a/x\": {\n        \"1\": \"manifest-a_x-1.json\"\n    },\n    \"b\": {\n        \
                        \"2\": \"manifest-b-2.json\"\n    }\n}";
        assert_eq!(text, expected);
    }
}
