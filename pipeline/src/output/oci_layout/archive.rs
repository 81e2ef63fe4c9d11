//! A layout that is one tar: blobs wait in spools until all are there, and then stand in a fixed order with fixed metadata, so
//! that the same image always gives the same bytes.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};

use super::empty_index;
use crate::atomic::{UnnamedFile, copy_to_stream};
use crate::blob::{BlobSummary, ByteCount, LayerStream};
use crate::digest::Digest;
use crate::error::Error;
use crate::layout::{INDEX, MARKER, MARKER_CONTENT, blob_path};
use crate::manifest::{self, ParsedManifest};
use crate::output::OutputError;
use crate::output::staging::fail;
use crate::output::tar::{header, header_of};
use crate::output::target::{Target, shown};
use crate::spool::{Spool, SpoolDir};
use crate::tar::{BLOCK, ZEROS, padding};

/// The longest name that a header has room for.
const NAME: usize = 100;

#[derive(Debug)]
pub(super) struct Archive {
    path: PathBuf,
    target: Mutex<Option<Target>>,
    spools: SpoolDir,
    blobs: Mutex<Blobs>,
}

#[derive(Debug)]
struct Blobs {
    layers: HashMap<Digest, Spool>,
    /// Configs and manifests, in the order in which images were finished: an index may lead to thousands.
    documents: Vec<Document>,
    /// Their bytes, one after the other.
    bytes: Spool,
}

/// A small blob.
#[derive(Debug)]
struct Document {
    digest: Digest,
    offset: u64,
    size: usize,
}

impl Archive {
    /// A tar that is to be at `path`, or on standard output when that is `-`. Spools of a file go beside it, others into `spools`.
    pub(super) fn create(path: &Path, spools: &SpoolDir) -> Result<Self, OutputError> {
        let (target, spools) = Target::open(path, spools)?;
        let bytes = spools.create().map_err(fail("write", path))?;
        let blobs = Blobs { layers: HashMap::new(), documents: Vec::new(), bytes };
        let (target, blobs) = (Mutex::new(Some(target)), Mutex::new(blobs));
        Ok(Self { path: shown(path), target, spools, blobs })
    }

    fn blobs(&self) -> MutexGuard<'_, Blobs> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.blobs().layers.contains_key(digest)
    }

    pub(super) fn store(&self, stream: &mut LayerStream, progress: &ByteCount) -> Result<BlobSummary, Error> {
        let mut spool = self.spools.create().map_err(fail("write", &self.path))?;
        let summary = stream.blocking_store::<Error>(progress, |bytes| {
            spool.write_all(bytes).map_err(fail("write", &self.path))?;
            Ok(())
        })?;
        self.blobs().layers.insert(summary.digest.clone(), spool);
        Ok(summary)
    }

    pub(super) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), OutputError> {
        let mut blobs = self.blobs();
        if blobs.documents.iter().all(|document| document.digest != *digest) {
            let document = Document { digest: digest.clone(), offset: blobs.bytes.size(), size: bytes.len() };
            blobs.bytes.write_all(bytes).map_err(fail("write", &self.path))?;
            blobs.documents.push(document);
        }
        Ok(())
    }

    /// Writes the tar: what says that it is a layout, `index.json`, configs and manifests as the images were finished, and then
    /// their layers in the manifests' order.
    pub(super) fn publish(&self, entry: &Map<String, Value>) -> Result<(), OutputError> {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner).take();
        let written = match target.expect("a layout is named once") {
            Target::Stream(mut file) => self.write(&mut file, entry).and_then(|()| file.flush()),
            Target::File(file) => {
                let mut out = Counted { file: file.file(), written: 0 };
                let written = self.write(&mut out, entry);
                let size = out.written;
                written.and_then(|()| file.publish(size))
            }
        };
        written.map_err(fail("finish", &self.path))
    }

    fn write(&self, out: &mut impl Write, entry: &Map<String, Value>) -> io::Result<()> {
        let blobs = self.blobs();
        let mut index = empty_index();
        index.insert("manifests".to_owned(), Value::Array(vec![entry.clone().into()]));
        small(out, MARKER, MARKER_CONTENT.as_bytes())?;
        small(out, INDEX, &serde_json::to_vec(&index).expect("a JSON map can be written"))?;
        let mut layers = Vec::new();
        let mut present = HashSet::new();
        for Document { digest, offset, size } in &blobs.documents {
            let mut bytes = vec![0; *size];
            blobs.bytes.file().read_exact_at(&mut bytes, *offset)?;
            small(out, &blob_path(digest), &bytes)?;
            if let Ok(ParsedManifest::Image(image)) = manifest::parse(&bytes, None) {
                // A config that was copied as it is came as a blob; one of ours is a document.
                let named = [image.config].into_iter().chain(image.layers).map(|blob| blob.digest);
                // A foreign layer is named, and is elsewhere.
                let here = named.filter_map(|digest| blobs.layers.get_key_value(&digest));
                layers.extend(here.filter(|(digest, _)| present.insert(*digest)));
            }
        }
        for (digest, spool) in layers {
            begin(out, &blob_path(digest), spool.size())?;
            copy_to_stream(spool.file(), 0, out, spool.size())?;
            out.write_all(&ZEROS[..padding(spool.size())])?;
        }
        out.write_all(&ZEROS[..2 * BLOCK])
    }
}

/// Writes a tar of a directory that is a layout, with these of its blobs: the same ones always give the same bytes.
pub(super) fn pack(directory: &Path, blobs: &BTreeSet<Digest>, to: &Path) -> Result<(), OutputError> {
    let file = UnnamedFile::create(to).map_err(fail("create", to))?;
    let mut out = Counted { file: file.file(), written: 0 };
    let written = write_packed(directory, blobs, &mut out);
    let size = out.written;
    written.and_then(|()| file.publish(size)).map_err(fail("finish", to))
}

fn write_packed(directory: &Path, blobs: &BTreeSet<Digest>, out: &mut impl Write) -> io::Result<()> {
    let mut index: Map<String, Value> = match std::fs::read(directory.join(INDEX)) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => empty_index(),
        Err(error) => return Err(error),
    };
    if let Some(entries) = index.get_mut("manifests").and_then(Value::as_array_mut) {
        // They stand in the order in which images were done.
        entries.sort_by_cached_key(Value::to_string);
    }
    small(out, MARKER, MARKER_CONTENT.as_bytes())?;
    small(out, INDEX, &serde_json::to_vec(&index)?)?;
    for digest in blobs {
        let path = blob_path(digest);
        let file = File::open(directory.join(&path))?;
        let size = file.metadata()?.len();
        begin(out, &path, size)?;
        copy_to_stream(&file, 0, out, size)?;
        out.write_all(&ZEROS[..padding(size)])?;
    }
    out.write_all(&ZEROS[..2 * BLOCK])
}

/// Counts what goes into a file.
struct Counted<'a> {
    file: &'a File,
    written: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn small(out: &mut impl Write, name: &str, content: &[u8]) -> io::Result<()> {
    begin(out, name, content.len() as u64)?;
    out.write_all(content)?;
    out.write_all(&ZEROS[..padding(content.len() as u64)])
}

/// The header of a member; a SHA-512 digest is too long for one without a PAX record.
fn begin(out: &mut impl Write, name: &str, size: u64) -> io::Result<()> {
    if name.len() <= NAME {
        return out.write_all(&header(name, size));
    }
    let record = record(name);
    out.write_all(&header_of(b'x', "pax", record.len() as u64))?;
    out.write_all(record.as_bytes())?;
    out.write_all(&ZEROS[..padding(record.len() as u64)])?;
    out.write_all(&header(&name[..NAME], size))
}

/// `LENGTH path=NAME\n`, whose length counts its own digits (POSIX, pax).
fn record(name: &str) -> String {
    let rest = format!(" path={name}\n");
    let mut length = rest.len();
    loop {
        let record = format!("{length}{rest}");
        if record.len() == length {
            return record;
        }
        length = record.len();
    }
}
