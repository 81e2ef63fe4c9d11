//! Somebody who pulls from the destinations all the time: whatever is under a tag at any moment has to be a whole image that is
//! expected there.
//!
//! It asks the registries themselves, past the proxies, and only cannot ask one that was killed.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use occy_tests::http::{Request, Response};
use occy_tests::image::{Family, json_of};
use occy_tests::tools::sha256;

/// A tag, and what may be under it.
pub(super) struct Tag {
    pub(super) host: String,
    pub(super) repository: String,
    pub(super) tag: String,
    /// Digests of manifests.
    pub(super) allowed: HashSet<String>,
    /// Whether there has been an image: then there has to be one for ever.
    pub(super) is_there: bool,
}

/// A file that is whole or is not there.
pub(super) struct WholeFile {
    pub(super) path: PathBuf,
    /// Its digest.
    pub(super) expected: String,
}

/// What to look at, and what has been found to be whole.
pub(super) struct Prober {
    pub(super) tags: Vec<Tag>,
    pub(super) files: Vec<WholeFile>,
    whole: HashSet<String>,
    /// How many manifests were read.
    pub(super) readings: u64,
}

impl Prober {
    pub(super) fn new(tags: Vec<Tag>, files: Vec<WholeFile>) -> Self {
        Self { tags, files, whole: HashSet::new(), readings: 0 }
    }

    /// Looks until it is told to stop, and then once more.
    pub(super) fn run(mut self, stop: &AtomicBool) -> Self {
        while !stop.load(Ordering::Relaxed) {
            self.look();
            sleep(Duration::from_millis(30));
        }
        self.look();
        self
    }

    fn look(&mut self) {
        for tag in &mut self.tags {
            if tag.look(&mut self.whole).is_ok() {
                self.readings += 1;
            }
        }
        for file in &self.files {
            if let Ok(bytes) = std::fs::read(&file.path) {
                assert_eq!(sha256(&bytes), file.expected, "{} is not whole", file.path.display());
            }
        }
    }
}

impl Tag {
    /// Fails where the registry could not be asked.
    fn look(&mut self, whole: &mut HashSet<String>) -> io::Result<()> {
        let name = format!("{}/{}:{}", self.host, self.repository, self.tag);
        let Some(manifest) = self.manifest(&name)? else { return Ok(()) };
        self.is_there = true;
        let digest = sha256(&manifest);
        assert!(self.allowed.contains(&digest), "{name} is at {digest}, which is none of {:?}", self.allowed);
        let document = json_of(&manifest);
        let layers = document["layers"].as_array().into_iter().flatten();
        for part in layers.chain([&document["config"]]) {
            let digest = part["digest"].as_str().expect("a digest");
            let path = format!("/v2/{}/blobs/{digest}", self.repository);
            let known = format!("{}{path}", self.host);
            if whole.contains(&known) {
                continue;
            }
            let blob = Request::new("GET", &path).send(&self.host)?;
            assert_eq!(blob.status, 200, "{name} names {digest}, which is not there");
            assert_eq!(sha256(&blob.body), digest, "{name} names {digest}, which is something else");
            whole.insert(known);
        }
        Ok(())
    }

    /// None where there is none, and never was.
    fn manifest(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let mut answer = Response::default();
        // The registry empties the file of a tag before it writes it anew: who reads in between is told of no such tag.
        for _ in 0..5 {
            let path = format!("/v2/{}/manifests/{}", self.repository, self.tag);
            let accept = format!("{}, {}", Family::Docker.manifest(), Family::Oci.manifest());
            answer = Request::new("GET", &path).header("Accept", &accept).send(&self.host)?;
            match answer.status {
                200 => return Ok(Some(answer.body)),
                404 if !self.is_there => return Ok(None),
                _ => sleep(Duration::from_millis(20)),
            }
        }
        let body = String::from_utf8_lossy(&answer.body);
        panic!("{name} was there and is not any more: {} {body}", answer.status);
    }
}
