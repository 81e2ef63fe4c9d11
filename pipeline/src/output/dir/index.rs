//! What became of layers that are in a shared directory: the digest of a layer and the filters that it passed lead to its
//! diff_id, its size and the filters' reports, so that it need not be fetched again.
//!
//! An entry is a file of its own in `layer-index/`, named by the hash of its key and replaced in one step: any number of
//! processes may write at once without a lock. An entry is a hint only. It is believed after a look at the layer's file,
//! and without it the layer is fetched.

use std::path::{Path, PathBuf};

use crate::atomic::write_durably;
use crate::digest::Digest;
use crate::element::{Layer, StoredLayer, WrittenLayer};
use crate::filter::{FilterChain, Report};
use crate::output::OutputError;
use crate::output::staging::fail;

/// Where entries are.
const DIRECTORY: &str = "layer-index";

/// What an entry is found by.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Key {
    /// The digest of the layer as the source stores it; the diff_id where it stores plain tars and knows no other.
    layer: Digest,
    /// [`FilterChain::fingerprint`].
    filters: String,
}

/// A layer that the directory has.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Entry {
    #[serde(flatten)]
    key: Key,
    /// Of the tar as the source has it, where it was told or not edited.
    source_diff_id: Option<Digest>,
    /// Of the tar in the directory.
    pub(super) diff_id: Digest,
    /// Its size in bytes.
    pub(super) size: u64,
    edited: bool,
    reports: Vec<Option<Report>>,
}

impl Key {
    fn of(layer: &Layer, chain: &FilterChain) -> Option<Self> {
        let descriptor = layer.descriptor.as_ref().map(|descriptor| &descriptor.digest);
        let layer = descriptor.or(layer.diff_id.as_ref())?.clone();
        Some(Self { layer, filters: chain.fingerprint() })
    }

    fn path(&self, directory: &Path) -> PathBuf {
        let hash = Digest::sha256(format!("{} {}", self.layer, self.filters));
        directory.join(DIRECTORY).join(format!("{}.json", hash.hex()))
    }
}

impl Entry {
    /// The entry of a layer behind these filters. One that cannot be read, or that says anything else than the image's own
    /// config, is none.
    pub(super) fn find(directory: &Path, layer: &Layer, chain: &FilterChain) -> Option<Self> {
        let key = Key::of(layer, chain)?;
        let bytes = std::fs::read(key.path(directory)).ok()?;
        let entry: Self = serde_json::from_slice(&bytes).ok()?;
        let agrees = layer.diff_id.is_none() || layer.diff_id == entry.source_diff_id;
        (entry.key == key && agrees && entry.reports.len() == chain.filters().len()).then_some(entry)
    }

    /// Notes what became of a layer.
    pub(super) fn note(
        directory: &Path,
        layer: &Layer,
        chain: &FilterChain,
        written: &WrittenLayer,
    ) -> Result<(), OutputError> {
        let (Some(key), StoredLayer::Written { digest, size, .. }) = (Key::of(layer, chain), &written.stored)
        else {
            return Ok(());
        };
        let unedited = (!written.edited).then(|| digest.clone());
        let mut reports = written.reports.clone();
        reports.resize(chain.filters().len(), None);
        let entry = Self {
            source_diff_id: layer.diff_id.clone().or(unedited),
            diff_id: digest.clone(),
            size: *size,
            edited: written.edited,
            reports,
            key,
        };
        let path = entry.key.path(directory);
        let bytes = serde_json::to_vec(&entry).expect("an entry is always JSON");
        if std::fs::read(&path).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        std::fs::create_dir_all(directory.join(DIRECTORY)).map_err(fail("create", &path))?;
        write_durably(&path, &bytes).map_err(fail("write", &path))
    }

    /// The layer as it was written then, at its place in this image.
    pub(super) fn into_written(self, index: usize) -> WrittenLayer {
        WrittenLayer {
            index,
            stored: StoredLayer::Written {
                digest: self.diff_id.clone(),
                size: self.size,
                format: crate::compression::Format::None,
            },
            diff_id: Some(self.diff_id),
            edited: self.edited,
            reports: self.reports,
        }
    }
}
