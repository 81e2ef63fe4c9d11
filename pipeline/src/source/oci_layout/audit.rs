//! What is wrong with a layout as a whole, beside the one image that was asked for: blobs that its images name and that are
//! missing or damaged, and blobs that nothing names.

use std::collections::{BTreeMap, HashSet};

use futures_util::StreamExt;

use super::{Files, LayoutSource, Opened, Store};
use crate::blob::{Blob, BlobError};
use crate::check::{Finding, Severity};
use crate::digest::Digest;
use crate::error::{Blame, Error, MAX_INDEX_DEPTH, MAX_MANIFESTS};
use crate::layout::blob_path;
use crate::manifest::{self, Descriptor, ParsedManifest};

impl LayoutSource {
    /// Follows every entry of `index.json` to its blobs, and reads all of them if it is to be `deep`.
    pub(super) async fn audited(&self, deep: bool) -> Result<Vec<Finding>, Error> {
        let opened = self.opened().await?;
        let mut audit = Audit { findings: Vec::new(), manifests: HashSet::new(), blobs: BTreeMap::new() };
        let entries = opened.index.manifests.iter().cloned().map(|entry| (entry, 0)).collect();
        self.follow(entries, &mut audit).await?;
        for (digest, size) in std::mem::take(&mut audit.blobs) {
            let blob = self.found(opened, &digest, Some(size));
            let read = async {
                let blob = blob?;
                // Opening it tells whether it is there in its size; its end, whether it is what it is called.
                let mut stream = Blob::open(blob.as_ref()).await?;
                while deep && let Some(bytes) = stream.next().await {
                    bytes?;
                }
                Ok(())
            };
            audit.note(&digest, read.await)?;
            audit.manifests.insert(digest);
        }
        let named: HashSet<String> = audit.manifests.iter().map(blob_path).collect();
        audit.findings.append(&mut strangers(opened, &named).await?);
        Ok(audit.findings)
    }

    /// Reads manifests, those that they name, and notes which blobs have to be there.
    async fn follow(&self, mut waiting: Vec<(Descriptor, usize)>, audit: &mut Audit) -> Result<(), Error> {
        while let Some((entry, depth)) = waiting.pop() {
            if !audit.manifests.insert(entry.digest.clone()) {
                continue;
            }
            if depth > MAX_INDEX_DEPTH {
                return Err(Error::IndexDepth(self.path()));
            }
            if audit.manifests.len() > MAX_MANIFESTS {
                return Err(Error::IndexSize(self.path()));
            }
            let fetched = match self.manifest(&entry).await {
                Ok(fetched) => fetched,
                Err(error) => {
                    audit.note(&entry.digest, Err(error))?;
                    continue;
                }
            };
            match manifest::parse(&fetched.bytes, Some(&fetched.media_type)) {
                Ok(ParsedManifest::Image(image)) => {
                    let layers = image.layers.into_iter().filter(|layer| !layer.is_foreign());
                    audit.blobs.extend(layers.map(|layer| (layer.digest, layer.size)));
                    audit.blobs.insert(image.config.digest, image.config.size);
                }
                Ok(ParsedManifest::Index(index)) => {
                    waiting.extend(index.manifests.into_iter().map(|entry| (entry, depth + 1)));
                }
                // Nothing else is known to name anything.
                Ok(ParsedManifest::Schema1(_)) => {}
                Err(error) => audit.find(Severity::Error, format!("{}: {error}", entry.digest)),
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Audit {
    findings: Vec<Finding>,
    /// Manifests that were read, and at last every blob that is named.
    manifests: HashSet<Digest>,
    blobs: BTreeMap<Digest, u64>,
}

impl Audit {
    fn find(&mut self, severity: Severity, message: String) {
        self.findings.push(Finding { severity, layer: None, message });
    }

    /// What is wrong with a blob is a finding; that it could not be looked at is an error.
    fn note(&mut self, digest: &Digest, read: Result<(), Error>) -> Result<(), Error> {
        match read {
            Ok(()) => Ok(()),
            Err(Error::Blob(BlobError::Missing { .. })) => {
                self.find(Severity::Error, format!("{digest} is named and is missing"));
                Ok(())
            }
            Err(error) if error.blame() == Blame::Image => {
                self.find(Severity::Error, format!("{digest}: {error}"));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// What lies among the blobs and is named by nothing.
async fn strangers(opened: &Opened, named: &HashSet<String>) -> Result<Vec<Finding>, Error> {
    let names: Vec<String> = match &opened.files {
        Files::Tar(contents) => {
            contents.names().filter(|name| name.starts_with("blobs/")).map(str::to_owned).collect()
        }
        Files::Directory(path) => {
            let path = path.clone();
            tokio::task::spawn_blocking(move || listed(&path)).await.expect("listing does not panic")?
        }
        // What nothing names is not lent.
        Files::Lent(_) => Vec::new(),
    };
    let strangers: Vec<_> = names.into_iter().filter(|name| !named.contains(name)).collect();
    let Some(first) = strangers.iter().min() else { return Ok(Vec::new()) };
    let message = match strangers.len() {
        1 => format!("nothing names {first}"),
        count => format!("nothing names {first} and {} more blobs", count - 1),
    };
    Ok(vec![Finding { severity: Severity::Warning, layer: None, message }])
}

/// The files under `blobs/`, as a layout calls them.
fn listed(layout: &std::path::Path) -> Result<Vec<String>, Error> {
    let fail = |source| super::LayoutError::Io { path: layout.join("blobs").display().to_string(), source };
    let mut names = Vec::new();
    for algorithm in std::fs::read_dir(layout.join("blobs")).map_err(fail)? {
        let algorithm = algorithm.map_err(fail)?;
        let directory = algorithm.file_name().to_string_lossy().into_owned();
        for blob in std::fs::read_dir(algorithm.path()).map_err(fail)? {
            names.push(format!("blobs/{directory}/{}", blob.map_err(fail)?.file_name().to_string_lossy()));
        }
    }
    Ok(names)
}
