//! Where a layout lies that is written: on this machine, as a directory or as one tar.
//!
//! Or on another one, which lends it: `wire/lend/borrow.rs`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde_json::{Map, Value};

use super::archive::Archive;
use super::directory::Directory;
use crate::blob::{BlobSummary, ByteCount, LayerStream};
use crate::digest::Digest;
use crate::error::Error;
use crate::output::OutputError;
use crate::registry::FetchedManifest;
use crate::spool::SpoolDir;
use crate::thread::blocking;

/// Keeps blobs by their digests, and names for them.
#[async_trait::async_trait]
pub trait Place: fmt::Debug + Send + Sync {
    /// Called before anything else, once or several times.
    async fn open(&self) -> Result<(), Error>;

    /// Whether it can name more than one image. Only when it is open, as all that follows.
    fn names_many(&self) -> bool;

    /// Whether a blob is there, with that size in bytes.
    async fn has(&self, digest: &Digest, size: u64) -> Result<bool, Error>;

    /// Stores what a stream yields under the digest that it turns out to have.
    async fn store(&self, stream: LayerStream, progress: ByteCount) -> Result<BlobSummary, Error>;

    /// Stores a config or a manifest.
    async fn put(&self, digest: &Digest, bytes: Bytes) -> Result<(), Error>;

    /// The manifest of the entry of `index.json` that has this annotation.
    async fn named(&self, annotation: &str, name: &str) -> Result<Option<FetchedManifest>, Error>;

    /// Adds an entry to `index.json`, in the place of one with the same name: its name in full, or its tag alone (`by_tag`).
    async fn name(&self, entry: Map<String, Value>, by_tag: bool) -> Result<(), Error>;
}

/// On this machine.
#[derive(Clone, Debug)]
pub(super) struct Local {
    path: PathBuf,
    /// As a tar, even where the path does not look like one.
    tar: bool,
    /// Read the blobs that are there already, to see that they are whole.
    verify: bool,
    spools: SpoolDir,
    opened: Arc<Mutex<Option<Arc<Opened>>>>,
}

#[derive(Debug)]
enum Opened {
    Directory(Directory),
    Archive(Box<Archive>),
}

impl Local {
    pub(super) fn new(path: PathBuf, tar: bool, verify: bool, spools: SpoolDir) -> Self {
        Self { path, tar, verify, spools, opened: Arc::default() }
    }

    fn look(&self) -> Result<Opened, OutputError> {
        let path = &self.path;
        let is_named_so = path.extension().is_some_and(|extension| extension == "tar");
        let is_tar = self.tar
            || path == Path::new("-")
            || match std::fs::metadata(path) {
                // Another file is none to be replaced unless somebody says so; a pipe or a device has nothing to lose.
                Ok(metadata) => !metadata.is_dir() && (is_named_so || !metadata.is_file()),
                Err(_) => is_named_so,
            };
        match is_tar {
            true => Archive::create(path, &self.spools).map(|archive| Opened::Archive(archive.into())),
            false => Directory::open(path, self.verify).map(Opened::Directory),
        }
    }

    fn opened(&self) -> Arc<Opened> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(opened.as_ref().expect("it is opened before anything else"))
    }
}

#[async_trait::async_trait]
impl Place for Local {
    async fn open(&self) -> Result<(), Error> {
        let local = self.clone();
        let opened = blocking(move || {
            let mut opened = local.opened.lock().unwrap_or_else(PoisonError::into_inner);
            if opened.is_none() {
                *opened = Some(Arc::new(local.look()?));
            }
            Ok::<_, OutputError>(())
        });
        Ok(opened.await?)
    }

    fn names_many(&self) -> bool {
        matches!(self.opened().as_ref(), Opened::Directory(_))
    }

    async fn has(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        let (opened, digest) = (self.opened(), digest.clone());
        let has = blocking(move || match opened.as_ref() {
            Opened::Directory(directory) => directory.has(&digest, size),
            Opened::Archive(archive) => archive.has(&digest),
        });
        Ok(has.await)
    }

    async fn store(&self, mut stream: LayerStream, progress: ByteCount) -> Result<BlobSummary, Error> {
        let opened = self.opened();
        blocking(move || match opened.as_ref() {
            Opened::Directory(directory) => directory.store(&mut stream, &progress),
            Opened::Archive(archive) => archive.store(&mut stream, &progress),
        })
        .await
    }

    async fn put(&self, digest: &Digest, bytes: Bytes) -> Result<(), Error> {
        let (opened, digest) = (self.opened(), digest.clone());
        let put = blocking(move || match opened.as_ref() {
            Opened::Directory(directory) => directory.put(&digest, &bytes),
            Opened::Archive(archive) => archive.put(&digest, &bytes),
        });
        Ok(put.await?)
    }

    async fn named(&self, annotation: &str, name: &str) -> Result<Option<FetchedManifest>, Error> {
        let (opened, annotation, name) = (self.opened(), annotation.to_owned(), name.to_owned());
        let named = blocking(move || match opened.as_ref() {
            Opened::Directory(directory) => directory.named(&annotation, &name),
            Opened::Archive(_) => Ok(None),
        });
        Ok(named.await?)
    }

    async fn name(&self, entry: Map<String, Value>, by_tag: bool) -> Result<(), Error> {
        let opened = self.opened();
        let named = blocking(move || match opened.as_ref() {
            Opened::Directory(directory) => directory.name(&entry, by_tag),
            Opened::Archive(archive) => archive.publish(&entry),
        });
        Ok(named.await?)
    }
}
