//! A layout that is a directory.
//!
//! A blob gets its name when it is whole and on the disk, so one that is there in its size is trusted and not fetched again.
//! `index.json` is read and replaced under a lock on the directory itself, which the kernel takes away from a process that
//! dies. What a killed run leaves is blobs that nothing names, which the next run may need.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::empty_index;
use crate::atomic::{self, UnnamedFile, write_durably};
use crate::blob::{BlobSummary, ByteCount, LayerStream};
use crate::digest::{Digest, Hasher};
use crate::error::Error;
use crate::layout::{IMAGE_NAME, INDEX, MARKER, MARKER_CONTENT, REF_NAME, blob_path};
use crate::manifest::MAX_DOCUMENT;
use crate::output::OutputError;
use crate::output::staging::fail;
use crate::registry::FetchedManifest;

/// What a blob is called until it is whole.
const PARTIAL: &str = "blob";

#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    verify: bool,
}

impl Directory {
    /// The layout at `path`, which is made if there is none. A directory that holds other things is refused.
    pub(super) fn open(path: &Path, verify: bool) -> Result<Self, OutputError> {
        std::fs::create_dir_all(path).map_err(fail("create", path))?;
        let directory = Self { path: path.to_owned(), verify };
        match std::fs::read(path.join(MARKER)) {
            Ok(marker) if is_version_1(&marker) => {}
            Ok(_) => return Err(directory.not_a_layout(&format!("{MARKER} does not say version 1"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => directory.refuse_others()?,
            Err(error) => return Err(fail("read", &path.join(MARKER))(error)),
        }
        let blobs = path.join("blobs");
        std::fs::create_dir_all(&blobs).map_err(fail("create", &blobs))?;
        // What cannot be written or read later would make all the work be in vain.
        directory.new_blob()?;
        directory.index()?;
        Ok(directory)
    }

    /// A directory without a marker may be what a run left that was killed: blobs, and what is not whole. Nothing else.
    fn refuse_others(&self) -> Result<(), OutputError> {
        for entry in std::fs::read_dir(&self.path).map_err(fail("read", &self.path))? {
            let name = entry.map_err(fail("read", &self.path))?.file_name();
            let is_ours = name == "blobs" || name.to_string_lossy().ends_with(atomic::PARTIAL);
            if !is_ours {
                return Err(self.not_a_layout(&format!("it is not empty and has no {MARKER}")));
            }
        }
        Ok(())
    }

    fn new_blob(&self) -> Result<UnnamedFile, OutputError> {
        UnnamedFile::create_in(&self.path, PARTIAL).map_err(fail("create a blob in", &self.path))
    }

    pub(super) fn has(&self, digest: &Digest, size: u64) -> bool {
        let path = self.path.join(blob_path(digest));
        let Ok(file) = File::open(&path) else { return false };
        if file.metadata().map(|metadata| metadata.len()).ok() != Some(size) {
            return false;
        }
        let whole = !self.verify || hash(&file, digest).is_ok_and(|computed| computed == *digest);
        if !whole {
            tracing::warn!("{} is not what its name says; fetching it again", path.display());
        }
        whole
    }

    pub(super) fn store(&self, stream: &mut LayerStream, progress: &ByteCount) -> Result<BlobSummary, Error> {
        let file = self.new_blob()?;
        let mut written = file.file();
        let summary = stream.blocking_store::<Error>(progress, |bytes| {
            written.write_all(bytes).map_err(fail("write a blob to", &self.path))?;
            Ok(())
        })?;
        self.publish(file, &summary)?;
        Ok(summary)
    }

    pub(super) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), OutputError> {
        if self.has(digest, bytes.len() as u64) {
            return Ok(());
        }
        let file = self.new_blob()?;
        file.file().write_all_at(bytes, 0).map_err(fail("write a blob to", &self.path))?;
        self.publish(file, &BlobSummary { digest: digest.clone(), size: bytes.len() as u64 })
    }

    fn publish(&self, file: UnnamedFile, summary: &BlobSummary) -> Result<(), OutputError> {
        let path = self.path.join(blob_path(&summary.digest));
        let directory = path.parent().expect("a blob lies in a directory");
        std::fs::create_dir_all(directory).map_err(fail("create", directory))?;
        file.file().sync_data().map_err(fail("write", &path))?;
        file.destined(path.clone()).publish(summary.size).map_err(fail("create", &path))?;
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(fail("write", directory))
    }

    /// Adds an image that is there to `index.json`, in the place of one that had its name: its name in full, or `by_tag` alone.
    pub(super) fn name(&self, entry: &Map<String, Value>, by_tag: bool) -> Result<(), OutputError> {
        let lock = File::open(&self.path).map_err(fail("open", &self.path))?;
        atomic::lock(&lock).map_err(fail("lock", &self.path))?;
        let marker = self.path.join(MARKER);
        if !marker.exists() {
            write_durably(&marker, MARKER_CONTENT.as_bytes()).map_err(fail("write", &marker))?;
        }
        let mut index = self.index()?;
        let entries = index.entry("manifests").or_insert_with(|| Value::Array(Vec::new()));
        let entries = entries.as_array_mut().ok_or_else(|| self.not_a_layout("manifests is not a list"))?;
        let replaced =
            |other: &Value| other.as_object().is_some_and(|other| is_same_name(other, entry, by_tag));
        let position = entries.iter().position(replaced).unwrap_or(entries.len());
        entries.retain(|other| !replaced(other));
        entries.insert(position.min(entries.len()), entry.clone().into());
        let path = self.path.join(INDEX);
        let bytes = serde_json::to_vec(&index).expect("a JSON map can be written");
        if bytes.len() > MAX_DOCUMENT {
            let problem = format!("{INDEX} would have more than {MAX_DOCUMENT} bytes, which nobody reads");
            return Err(self.not_a_layout(&problem));
        }
        write_durably(&path, &bytes).map_err(fail("write", &path))
    }

    /// The manifest of the entry whose annotation `key` is `name`.
    pub(super) fn named(&self, key: &str, name: &str) -> Result<Option<FetchedManifest>, OutputError> {
        let index = self.index()?;
        let entries = index.get("manifests").and_then(Value::as_array).into_iter().flatten();
        let mut entries = entries.filter_map(Value::as_object);
        let Some(entry) = entries.find(|entry| annotation(entry, key) == Some(name)) else {
            return Ok(None);
        };
        let text = |key| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let digest: Digest =
            text("digest").parse().map_err(|error| self.not_a_layout(&format!("{INDEX}: {error}")))?;
        let path = self.path.join(blob_path(&digest));
        let size = std::fs::metadata(&path).map_err(fail("read", &path))?.len();
        if size > MAX_DOCUMENT as u64 {
            return Err(self.not_a_layout(&format!(
                "{digest}, which {INDEX} names, is no manifest: it has {size} bytes"
            )));
        }
        let bytes = std::fs::read(&path).map_err(fail("read", &path))?;
        Ok(Some(FetchedManifest { bytes: bytes.into(), media_type: text("mediaType"), digest }))
    }

    fn index(&self) -> Result<Map<String, Value>, OutputError> {
        let path = self.path.join(INDEX);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| self.not_a_layout(&format!("{INDEX}: {error}"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(empty_index()),
            Err(error) => Err(fail("read", &path)(error)),
        }
    }

    fn not_a_layout(&self, reason: &str) -> OutputError {
        OutputError::NotALayout { path: self.path.clone(), reason: reason.to_owned() }
    }
}

/// Whether one entry of `index.json` takes another's place: those that have a name in full are told apart by it, others by
/// their tags, and those without any by what they are.
fn is_same_name(one: &Map<String, Value>, other: &Map<String, Value>, by_tag: bool) -> bool {
    match (annotation(one, IMAGE_NAME), annotation(other, IMAGE_NAME)) {
        (Some(one), Some(other)) if !by_tag => one == other,
        _ => match (annotation(one, REF_NAME), annotation(other, REF_NAME)) {
            (None, None) => one.get("digest") == other.get("digest"),
            (one, other) => one == other,
        },
    }
}

fn annotation<'a>(entry: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    entry.get("annotations")?.get(key)?.as_str()
}

fn is_version_1(marker: &[u8]) -> bool {
    let marker: Option<Value> = serde_json::from_slice(marker).ok();
    let version = marker.as_ref().and_then(|marker| marker.get("imageLayoutVersion")?.as_str());
    version.is_some_and(|version| version.starts_with("1."))
}

fn hash(file: &File, expected: &Digest) -> io::Result<Digest> {
    let mut hasher = Hasher::new(expected.algorithm());
    let mut buffer = vec![0; crate::blob::CHUNK];
    loop {
        match file.read_at(&mut buffer, hasher.size())? {
            0 => return Ok(hasher.finish()),
            count => hasher.update(&buffer[..count]),
        }
    }
}
