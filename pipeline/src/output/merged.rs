//! The layers of an image as one tree of files, unpacked in order although they arrive in any.
//!
//! The layer whose turn it is goes from its stream right into the tree, while those above it are fetched and decompressed
//! into files. Nobody waits for a turn: whoever brings a layer whose turn has not come leaves its file behind, and whoever
//! ends a turn takes the next one whose file is there. So nothing can block, and what is in memory is a few chunks a layer.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes};

use super::ExpectedLayer;
use crate::blob::{BlobError, BlobSummary, ByteCount, LayerPiece, LayerStream};
use crate::element::{Image, Layer, distinct_layers};
use crate::error::Error;
use crate::spool::{Spool, SpoolDir};
use crate::unpack::{LeftOut, Options, Unpacker};

/// A tree that layers are merged into.
#[derive(Debug)]
pub(super) struct Merged {
    state: Mutex<State>,
    order: Order,
    cancelled: AtomicBool,
}

/// In which order layers are merged.
#[derive(Clone, Debug)]
pub(super) struct Order {
    /// For each position of the image, the first one with the same layer, which is the one that arrives.
    first: Vec<usize>,
    /// How messages call each layer.
    labels: Vec<String>,
    /// Layers that cannot go from their stream into the tree: their streams may begin anew, or they stand twice.
    kept_whole: HashSet<usize>,
}

impl Order {
    /// That of an image's layers.
    pub(super) fn of(image: &Image, expected: &[ExpectedLayer]) -> Self {
        let first = distinct_layers(&image.layers);
        let may_restart = expected.iter().filter(|layer| layer.may_restart).map(|layer| layer.index);
        let repeated = first.iter().enumerate().filter(|(at, first)| at != *first).map(|(_, first)| *first);
        let kept_whole = may_restart.chain(repeated).collect();
        Self { first, labels: image.layers.iter().map(Layer::label).collect(), kept_whole }
    }
}

#[derive(Debug)]
struct State {
    /// The position whose turn it is.
    next: usize,
    /// None while somebody unpacks.
    unpacker: Option<Unpacker>,
    /// Layers that are whole in a file, by the position at which they arrive.
    ready: HashMap<usize, Arc<Content>>,
    /// The layer that was lost in the middle of its way into the tree, which is void since.
    spoiled: Option<usize>,
}

/// A whole layer in a file.
#[derive(Debug)]
pub(super) enum Content {
    /// A file that stays.
    Stays(PathBuf),
    /// One that goes when it is not needed any more.
    Spooled(Spool),
}

/// Where the bytes of a layer are kept beside the tree.
pub(super) enum Keep<'a> {
    /// In this file, all of them.
    File(&'a File),
    /// In a spool, as far as they cannot be unpacked at once.
    Spool(&'a SpoolDir),
}

impl Merged {
    /// An empty tree at `path`, where there is nothing yet or an empty directory.
    pub(super) fn create(path: &Path, order: Order, options: Options) -> Result<Self, Error> {
        let create = || {
            std::fs::create_dir_all(path)?;
            std::fs::set_permissions(path, Permissions::from_mode(0o755))
        };
        create().map_err(super::staging::fail("create", path))?;
        let unpacker = Some(Unpacker::new(path, options)?);
        let state = State { next: 0, unpacker, ready: HashMap::new(), spoiled: None };
        Ok(Self { state: Mutex::new(state), order, cancelled: AtomicBool::new(false) })
    }

    /// Nothing of it is wanted any more: whoever unpacks stops.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Takes the layer at `index` from its stream. `kept` is given all that was put into a file that stays.
    pub(super) fn write(
        &self,
        index: usize,
        stream: &mut LayerStream,
        keep: Keep<'_>,
        progress: &ByteCount,
    ) -> Result<BlobSummary, Error> {
        let mut store = Store::new(keep);
        let may_pass = !self.order.kept_whole.contains(&index);
        loop {
            if may_pass && let Some(mut unpacker) = self.take_turn(index)? {
                let mut reader = Reader {
                    merged: self,
                    store,
                    read: 0,
                    stream,
                    progress,
                    current: Bytes::new(),
                    end: None,
                };
                let applied = unpacker.apply(&mut reader);
                // An error of the file that a copy goes to is the machine's; it looks like one of the tar from inside.
                let end = reader.end.take();
                match (applied, end) {
                    (Ok(()), Some(summary)) => {
                        self.end_turn(unpacker);
                        self.advance()?;
                        return Ok(summary);
                    }
                    (result, _) => {
                        self.state().spoiled = Some(index);
                        return Err(result.err().map_or(Error::Blob(BlobError::Interrupted), Error::from));
                    }
                }
            }
            match stream.blocking_next()? {
                LayerPiece::Data(bytes) => {
                    store.append(&bytes)?;
                    progress.add(bytes.len() as u64);
                    stream.recycle(bytes);
                }
                LayerPiece::End(summary) => {
                    if let Some(content) = store.into_content()? {
                        self.arrived(index, content)?;
                    }
                    return Ok(summary);
                }
            }
        }
    }

    /// A layer is whole in a file.
    pub(super) fn arrived(&self, index: usize, content: Content) -> Result<(), Error> {
        self.state().ready.insert(index, Arc::new(content));
        self.advance()
    }

    /// All layers are there: unpacks what is left, and completes the tree.
    pub(super) fn finish(&self) -> Result<LeftOut, Error> {
        self.advance()?;
        let mut state = self.state();
        debug_assert_eq!(
            state.next,
            self.order.first.len(),
            "every layer arrived before the tree is finished"
        );
        let unpacker = state.unpacker.take().expect("nobody unpacks any more");
        drop(state);
        Ok(unpacker.finish()?)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The unpacker, if it is the turn of the layer that arrives at `index`.
    fn take_turn(&self, index: usize) -> Result<Option<Unpacker>, Error> {
        let mut state = self.state();
        if state.spoiled == Some(index) {
            return Err(super::OutputError::Spoiled.into());
        }
        let is_next = self.order.first.get(state.next) == Some(&index);
        Ok(if is_next { state.unpacker.take() } else { None })
    }

    fn end_turn(&self, unpacker: Unpacker) {
        let mut state = self.state();
        state.unpacker = Some(unpacker);
        state.next += 1;
    }

    /// Unpacks layers whose turn has come and whose files are there.
    fn advance(&self) -> Result<(), Error> {
        loop {
            let mut state = self.state();
            let position = state.next;
            let Some(&index) = self.order.first.get(position) else { return Ok(()) };
            let Some(content) = state.ready.get(&index).cloned() else { return Ok(()) };
            let Some(mut unpacker) = state.unpacker.take() else { return Ok(()) };
            if !self.order.first[position + 1..].contains(&index) {
                state.ready.remove(&index);
            }
            drop(state);
            let applied = content.open().and_then(|file| {
                let reader = Whole { merged: self, file, position: 0 };
                unpacker.apply(reader).map_err(Error::from)
            });
            if let Err(error) = applied {
                self.state().spoiled = Some(index);
                let (total, label) = (self.order.first.len(), self.order.labels[position].clone());
                return Err(Error::in_layer("unpack", position, total, label, error));
            }
            self.end_turn(unpacker);
        }
    }
}

impl Content {
    fn open(&self) -> Result<File, Error> {
        let file = match self {
            Self::Stays(path) => File::open(path).map_err(super::staging::fail("open", path))?,
            Self::Spooled(spool) => {
                let what = "failed to read a temporary file".to_owned();
                spool.file().try_clone().map_err(|source| BlobError::Io { what, source })?
            }
        };
        Ok(file)
    }
}

/// What was kept of a layer so far.
struct Store<'a> {
    keep: Keep<'a>,
    spool: Option<Spool>,
    size: u64,
}

impl<'a> Store<'a> {
    fn new(keep: Keep<'a>) -> Self {
        Self { keep, spool: None, size: 0 }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        let written = match self.keep {
            Keep::File(file) => file.write_all_at(bytes, self.size),
            Keep::Spool(spools) => self.append_to_spool(spools, bytes),
        };
        let what = || "failed to keep a layer until its turn".to_owned();
        written.map_err(|source| BlobError::Io { what: what(), source })?;
        self.size += bytes.len() as u64;
        Ok(())
    }

    fn append_to_spool(&mut self, spools: &SpoolDir, bytes: &[u8]) -> io::Result<()> {
        use io::Write as _;
        if self.spool.is_none() {
            self.spool = Some(spools.create()?);
        }
        self.spool.as_mut().expect("it was made just now").write_all(bytes)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match (&self.keep, &self.spool) {
            (Keep::File(file), _) => file.read_at(buffer, offset),
            (Keep::Spool(_), Some(spool)) => spool.file().read_at(buffer, offset),
            (Keep::Spool(_), None) => Ok(0),
        }
    }

    /// The whole layer, where the spool holds it. A file that stays is the caller's.
    fn into_content(self) -> Result<Option<Content>, BlobError> {
        match (self.keep, self.spool) {
            (Keep::File(_), _) => Ok(None),
            (Keep::Spool(_), Some(spool)) => Ok(Some(Content::Spooled(spool))),
            (Keep::Spool(spools), None) => {
                let what = "failed to create a temporary file".to_owned();
                let spool = spools.create().map_err(|source| BlobError::Io { what, source })?;
                Ok(Some(Content::Spooled(spool)))
            }
        }
    }
}

/// A layer on its way into the tree: first what was kept of it, then its stream.
struct Reader<'a> {
    merged: &'a Merged,
    store: Store<'a>,
    /// Bytes of the store that were read.
    read: u64,
    stream: &'a mut LayerStream,
    progress: &'a ByteCount,
    current: Bytes,
    end: Option<BlobSummary>,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() && self.end.is_none() {
            if self.merged.cancelled.load(Ordering::Relaxed) {
                return Err(io::Error::other(BlobError::Interrupted));
            }
            if self.read < self.store.size {
                let length =
                    usize::try_from(self.store.size - self.read).unwrap_or(usize::MAX).min(buffer.len());
                let count = self.store.read_at(&mut buffer[..length], self.read)?;
                self.read += count as u64;
                return if count > 0 { Ok(count) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            match self.stream.blocking_next().map_err(io::Error::other)? {
                LayerPiece::Data(bytes) => {
                    if matches!(self.store.keep, Keep::File(_)) {
                        self.store.append(&bytes).map_err(io::Error::other)?;
                        self.read = self.store.size;
                    }
                    self.progress.add(bytes.len() as u64);
                    self.current = bytes;
                }
                LayerPiece::End(summary) => self.end = Some(summary),
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current[..count]);
        if count == self.current.len() {
            self.stream.recycle(std::mem::take(&mut self.current));
        } else {
            self.current.advance(count);
        }
        Ok(count)
    }
}

/// A layer that is whole in a file.
struct Whole<'a> {
    merged: &'a Merged,
    file: File,
    position: u64,
}

impl Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.merged.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other(BlobError::Interrupted));
        }
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

/// Says once what an unpacked tree lacks.
pub(super) fn report(left_out: LeftOut) {
    if left_out.is_some() {
        tracing::warn!("unpacked without {left_out}, which this user or file system may not have");
    }
}
