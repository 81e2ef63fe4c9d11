//! `catalog.json`: which manifest belongs to which image and tag. The Python tool's form:
//! `{"IMAGE": {"TAG": "manifest-IMAGE-TAG.json"}}`, with the image's `/` as `_` in the file's name.
//!
//! Any number of processes may add images at once. Each reads and replaces the catalog under a lock that the kernel takes
//! away from a process that dies; a reader needs no lock, because the file is replaced in one step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use crate::atomic::write_durably;
use crate::digest::Digest;
use crate::output::OutputError;
use crate::output::staging::fail;

/// The catalog's name.
pub const CATALOG: &str = "catalog.json";
/// What is locked. It also marks a directory as one of ours before the first image is in the catalog.
pub(super) const LOCK: &str = "catalog.lock";
/// A file name may have this many bytes.
const LONGEST_NAME: usize = 255;

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
        loop {
            match flock(&lock, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result.map_err(|errno| fail("lock", &path)(errno.into()))?,
            }
        }
        let path = directory.join(CATALOG);
        let images = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| OutputError::Catalog { path: path.clone(), reason: error.to_string() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(fail("read", &path)(error)),
        };
        Ok(Self { path, images, _lock: lock })
    }

    /// The name of the manifest of an image, without `.json`: the one that it has, or one that no other image has.
    pub(super) fn manifest_name(&self, image: &str, tag: &str) -> String {
        if let Some(name) = self.images.get(image).and_then(|tags| tags.get(tag))
            && let Some(stem) = name.strip_suffix(".json")
            && !stem.contains('/')
        {
            return stem.to_owned();
        }
        let plain = plain_name(image, tag);
        let is_taken = |name: &str| {
            let mut names = self.images.values().flat_map(BTreeMap::values);
            names.any(|taken| taken.strip_suffix(".json") == Some(name))
        };
        if plain.len() + ".json".len() <= LONGEST_NAME - 64 && !is_taken(&plain) {
            return plain;
        }
        // `a/b` and `a_b`, or `a` with the tag `b-c` and `a-b` with the tag `c`, would have one name.
        let hash = Digest::sha256(format!("{image}:{tag}"));
        format!("{:.96}-{:.32}", plain, hash.hex())
    }

    /// Adds an image, or replaces what it had, and writes the catalog.
    pub(super) fn add(mut self, image: &str, tag: &str, manifest: String) -> Result<(), OutputError> {
        self.images.entry(image.to_owned()).or_default().insert(tag.to_owned(), manifest);
        let value = serde_json::to_value(&self.images).expect("strings are always JSON");
        write_durably(&self.path, &to_json(&value)).map_err(fail("write", &self.path))
    }
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
        let catalog = Catalog::lock(directory).unwrap();
        let name = format!("{}.json", catalog.manifest_name(image, tag));
        catalog.add(image, tag, name.clone()).unwrap();
        name
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
