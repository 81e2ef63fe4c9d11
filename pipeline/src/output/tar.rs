//! `tar://PATH`: one saved tar, docker's v1.2 form, that `docker load` and `podman load` read.
//!
//! The members stand in a fixed order (layers lowest first, the config, `manifest.json`) with fixed metadata, so the same
//! image always gives the same bytes. Layers arrive in any order. A layer whose place is known, because those before it are
//! whole or their sizes are foreseen, goes straight into the file, and its header is patched in when it is whole; the others
//! wait in unlinked spools beside it. Should a size turn out other than foreseen, the pieces are put together anew.
//!
//! The file has no name until it is whole, so a killed run leaves nothing. Standard output, or any path that is not a
//! regular file, cannot be patched: there every layer waits in a spool of its own.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::target::{Target, shown};
use super::{ExpectedLayer, FinishedImage, LayerForm, OutputError, OutputKind, Receipt, refuse_artifact};
use crate::blob::{BlobError, BlobSummary, ByteCount, LayerStream};
use crate::compression::Format;
use crate::digest::Digest;
use crate::element::{Image, StoredLayer};
use crate::error::Error;
use crate::spool::{Spool, SpoolDir};
use crate::tar::{self, ZEROS, padding};
use crate::thread;

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "tar",
    syntax: "tar://PATH",
    about: "a saved tar for `docker load`; tar://- is standard output",
    options: &[],
};

const BLOCK: u64 = tar::BLOCK as u64;

/// An image that is being written as a saved tar.
#[derive(Debug)]
pub struct TarOutput {
    path: PathBuf,
    /// What the image is called in the tar; None for the names that it has at its source.
    name: Option<String>,
    spools: SpoolDir,
    assembly: Arc<Mutex<Option<Assembly>>>,
}

#[derive(Debug)]
struct Assembly {
    target: Target,
    /// Where layers wait.
    spools: SpoolDir,
    /// Where the next member's header goes.
    position: u64,
    /// Layers that are not in the tar yet, in its order.
    pending: VecDeque<ExpectedLayer>,
    /// Where the data of layers begins that are written in place.
    placed: HashMap<usize, u64>,
    /// Layers that are whole and wait for their turn.
    finished: HashMap<usize, (BlobSummary, Whole)>,
    /// Layers that are in the tar.
    present: HashSet<Digest>,
    /// Members whose data is not where the tar has to have it: from the first of them on, in order.
    misplaced: Vec<(BlobSummary, Whole)>,
}

/// Where a whole layer is.
#[derive(Debug)]
enum Whole {
    /// In the file, its data from this offset on.
    Placed(u64),
    /// In a spool.
    Spooled(Spool),
    /// Both: it was larger than its place in the file.
    Split {
        /// Where it begins.
        offset: u64,
        /// What fitted in there.
        placed: u64,
        /// What did not.
        rest: Spool,
    },
}

/// Where one layer's bytes go while they arrive.
enum Place {
    /// Into the file, up to a bound if another layer begins there.
    Direct { file: File, start: u64, filled: u64, room: Option<u64> },
    /// Into a spool, with what went into the file before.
    Spool { spool: Spool, before: Option<(u64, u64)> },
}

impl TarOutput {
    /// A saved tar at `path`, or on standard output when that is `-`. Spools of a file go beside it, others into `spools`.
    pub fn new(path: impl Into<PathBuf>, spools: SpoolDir) -> Self {
        Self { path: path.into(), name: None, spools, assembly: Arc::default() }
    }

    /// A saved tar of an image that is to be called `name`, for a pipe that [`begin_pipe`](Self::begin_pipe) is given.
    /// `shown` is what messages call it.
    pub(super) fn to_pipe(shown: String, name: String, spools: SpoolDir) -> Self {
        Self { path: shown.into(), name: Some(name), spools, assembly: Arc::default() }
    }

    /// [`begin`](super::ImageOutput::begin), into a pipe.
    pub(super) fn begin_pipe(
        &self,
        image: &Image,
        expected: &[ExpectedLayer],
        pipe: io::PipeWriter,
    ) -> Result<(), Error> {
        refuse_artifact(image, self.destination())?;
        self.begin_at(Target::Stream(OwnedFd::from(pipe).into()), self.spools.clone(), expected);
        Ok(())
    }

    fn begin_at(&self, target: Target, spools: SpoolDir, expected: &[ExpectedLayer]) {
        *lock(&self.assembly) = Some(Assembly {
            target,
            spools,
            position: 0,
            pending: expected.iter().copied().collect(),
            placed: HashMap::new(),
            finished: HashMap::new(),
            present: HashSet::new(),
            misplaced: Vec::new(),
        });
    }

    fn destination(&self) -> String {
        match self.name {
            Some(_) => self.path.display().to_string(),
            None => format!("tar://{}", self.path.display()),
        }
    }

    fn error(&self, what: &'static str, source: io::Error) -> Error {
        OutputError::Io { what, path: shown(&self.path), source }.into()
    }
}

#[async_trait::async_trait]
impl super::ImageOutput for TarOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Tar
    }

    fn wants_tar_sizes(&self) -> bool {
        true
    }

    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error> {
        refuse_artifact(image, self.destination())?;
        let (path, spools) = (self.path.clone(), self.spools.clone());
        let (target, spools) = thread::run("open", move || Target::open(&path, &spools)).await??;
        self.begin_at(target, spools, expected);
        Ok(())
    }

    async fn write_layer(
        &self,
        index: usize,
        mut stream: LayerStream,
        _format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        let assembly = Arc::clone(&self.assembly);
        let progress = progress.clone();
        let task = move || -> Result<BlobSummary, WriteError> {
            let mut place = begun(&mut lock(&assembly)).claim(index)?;
            let spools = begun(&mut lock(&assembly)).spools.clone();
            let summary = place.fill(&mut stream, &spools, &progress)?;
            begun(&mut lock(&assembly)).settle(index, place, summary.clone())?;
            Ok(summary)
        };
        match thread::run("write", task).await? {
            Ok(summary) => {
                Ok(StoredLayer::Written { digest: summary.digest, size: summary.size, format: Format::None })
            }
            Err(WriteError::Io(source)) => Err(self.error("write", source)),
            Err(WriteError::Stream(error)) => Err(error.into()),
        }
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let mut assembly = lock(&self.assembly).take().expect("begin ran before finalize");
        debug_assert!(assembly.pending.is_empty(), "every layer is in the tar before it is finalized");
        let config = finished.config.clone();
        let config_name = format!("{}.json", Digest::sha256(&config).hex());
        let layers: Vec<String> =
            finished.layers.iter().map(|layer| member_name(stored_digest(&layer.stored))).collect();
        let image = finished.image;
        let repo_tags: Vec<String> = match &self.name {
            Some(name) => vec![name.clone()],
            None => {
                let own = image.name.tag.iter().map(|_| image.name.to_string());
                own.chain(image.aliases.iter().cloned()).collect()
            }
        };
        let manifest = serde_json::json!([{
            "Config": config_name,
            "RepoTags": repo_tags,
            "Layers": layers,
        }]);
        let task = move || -> io::Result<()> {
            assembly.reassemble()?;
            assembly.append_small(&config_name, &config)?;
            assembly.append_small("manifest.json", manifest.to_string().as_bytes())?;
            assembly.write(&ZEROS[..2 * tar::BLOCK])?;
            match assembly.target {
                Target::File(file) => file.publish(assembly.position),
                Target::Stream(mut file) => file.flush(),
            }
        };
        tokio::task::spawn_blocking(task)
            .await
            .expect("finishing a tar does not panic")
            .map_err(|source| self.error("finish", source))?;
        Ok(Receipt { destination: self.destination(), ..Receipt::default() })
    }
}

enum WriteError {
    Io(io::Error),
    Stream(BlobError),
}

impl From<BlobError> for WriteError {
    fn from(error: BlobError) -> Self {
        Self::Stream(error)
    }
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn lock(assembly: &Mutex<Option<Assembly>>) -> MutexGuard<'_, Option<Assembly>> {
    assembly.lock().unwrap_or_else(PoisonError::into_inner)
}

fn begun(assembly: &mut Option<Assembly>) -> &mut Assembly {
    assembly.as_mut().expect("begin ran before any layer")
}

fn stored_digest(stored: &StoredLayer) -> &Digest {
    match stored {
        StoredLayer::Written { digest, .. } => digest,
        StoredLayer::Original => unreachable!("a saved tar stores every layer as a plain tar"),
    }
}

fn member_name(diff_id: &Digest) -> String {
    format!("{}/layer.tar", diff_id.hex())
}

impl Place {
    fn fill(
        &mut self,
        stream: &mut LayerStream,
        spools: &SpoolDir,
        progress: &ByteCount,
    ) -> Result<BlobSummary, WriteError> {
        stream.blocking_store(progress, |bytes| Ok(self.write(bytes, spools)?))
    }

    fn write(&mut self, bytes: &[u8], spools: &SpoolDir) -> io::Result<()> {
        match self {
            Self::Direct { start, filled, room: Some(room), .. } if *filled + bytes.len() as u64 > *room => {
                let before = Some((*start, *filled));
                let mut spool = spools.create()?;
                spool.write_all(bytes)?;
                *self = Self::Spool { spool, before };
                Ok(())
            }
            Self::Direct { file, start, filled, .. } => {
                file.write_all_at(bytes, *start + *filled)?;
                *filled += bytes.len() as u64;
                Ok(())
            }
            Self::Spool { spool, .. } => spool.write_all(bytes),
        }
    }

    fn whole(self) -> Whole {
        match self {
            Self::Direct { start, .. } => Whole::Placed(start),
            Self::Spool { spool, before: None } => Whole::Spooled(spool),
            Self::Spool { spool, before: Some((offset, placed)) } => {
                Whole::Split { offset, placed, rest: spool }
            }
        }
    }
}

impl Assembly {
    /// Where a layer's bytes are to go.
    fn claim(&mut self, index: usize) -> io::Result<Place> {
        let Target::File(file) = &self.target else {
            return Ok(Place::Spool { spool: self.spools.create()?, before: None });
        };
        let file = file.file().try_clone()?;
        let known = self.placed.get(&index).copied().or_else(|| self.place_of(index));
        let Some(start) = known else {
            return Ok(Place::Spool { spool: self.spools.create()?, before: None });
        };
        self.placed.insert(index, start);
        let size = self.pending.iter().find(|layer| layer.index == index).and_then(|layer| layer.tar_size);
        Ok(Place::Direct { file, start, filled: 0, room: size.map(|size| size.next_multiple_of(BLOCK)) })
    }

    /// Where a layer's data begins, if the layers before it are whole or their sizes foreseen.
    ///
    /// None besides where one of them turned out other than foreseen, or equal to another and was dropped: what was placed by
    /// the old reckoning lies where the new one would put other layers.
    fn place_of(&self, index: usize) -> Option<u64> {
        if !self.misplaced.is_empty() {
            return None;
        }
        let mut position = self.position;
        let mut own = None;
        for layer in &self.pending {
            let start = position + BLOCK;
            let placed = self.placed.get(&layer.index);
            if own.is_none() && placed.is_some_and(|placed| *placed != start) {
                return None;
            }
            // A layer behind this one that has its place leaves it as much room as was foreseen.
            if own.is_some() && placed.is_some_and(|placed| *placed < start) {
                return None;
            }
            if layer.index == index {
                own = Some(start);
            }
            let size = match self.finished.get(&layer.index) {
                Some((summary, _)) => summary.size,
                None if own.is_some() && layer.tar_size.is_none() => break,
                None => layer.tar_size?,
            };
            position = start + size.next_multiple_of(BLOCK);
        }
        own
    }

    /// Takes a whole layer, and puts into the tar all whose turn it is now.
    fn settle(&mut self, index: usize, place: Place, summary: BlobSummary) -> io::Result<()> {
        self.finished.insert(index, (summary, place.whole()));
        while let Some(next) = self.pending.front().map(|layer| layer.index) {
            let Some((summary, whole)) = self.finished.remove(&next) else { break };
            self.pending.pop_front();
            // Two layers that differed at the source can be equal behind the filters. The second is not kept.
            if !self.present.insert(summary.digest.clone()) {
                continue;
            }
            let header = header(&member_name(&summary.digest), summary.size);
            match whole {
                whole if !self.misplaced.is_empty() => self.misplaced.push((summary, whole)),
                Whole::Placed(offset) if offset == self.position + BLOCK => {
                    self.write_at(&header, self.position)?;
                    self.position += BLOCK + summary.size;
                    self.pad(summary.size)?;
                }
                // Appending is safe only where nothing has been placed.
                Whole::Spooled(spool) if self.is_free_behind(summary.size) => {
                    self.write(&header)?;
                    self.append(spool.file(), 0, spool.size())?;
                    self.pad(summary.size)?;
                }
                whole => self.misplaced.push((summary, whole)),
            }
        }
        Ok(())
    }

    /// Whether a member of this size, put at the current position, would run into no layer that is in its place already.
    fn is_free_behind(&self, size: u64) -> bool {
        let end = self.position + BLOCK + size.next_multiple_of(BLOCK);
        let waiting = |index: &usize| self.pending.iter().any(|layer| layer.index == *index);
        self.placed.iter().all(|(index, start)| !waiting(index) || *start >= end + BLOCK)
    }

    /// Puts the tar together in a new file, where layers are not in the places that they have to have.
    fn reassemble(&mut self) -> io::Result<()> {
        let misplaced = std::mem::take(&mut self.misplaced);
        if misplaced.is_empty() {
            return Ok(());
        }
        let Target::File(file) = &self.target else { unreachable!("only a file has places") };
        let new = file.another()?;
        let Target::File(old) = std::mem::replace(&mut self.target, Target::File(new)) else {
            unreachable!("it was a file just now")
        };
        let end = std::mem::take(&mut self.position);
        self.append(old.file(), 0, end)?;
        for (summary, whole) in misplaced {
            self.write(&header(&member_name(&summary.digest), summary.size))?;
            match whole {
                Whole::Placed(offset) => self.append(old.file(), offset, summary.size)?,
                Whole::Spooled(spool) => self.append(spool.file(), 0, spool.size())?,
                Whole::Split { offset, placed, rest } => {
                    self.append(old.file(), offset, placed)?;
                    self.append(rest.file(), 0, rest.size())?;
                }
            }
            self.pad(summary.size)?;
        }
        Ok(())
    }

    fn append_small(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.write(&header(name, content.len() as u64))?;
        self.write(content)?;
        self.pad(content.len() as u64)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        self.write(&ZEROS[..padding(size)])
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.target {
            Target::File(_) => self.write_at(bytes, self.position)?,
            Target::Stream(file) => file.write_all(bytes)?,
        }
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn write_at(&mut self, bytes: &[u8], position: u64) -> io::Result<()> {
        match &self.target {
            Target::File(file) => file.file().write_all_at(bytes, position),
            Target::Stream(_) => unreachable!("only a file is written in place"),
        }
    }

    /// Appends a part of a file.
    fn append(&mut self, from: &File, offset: u64, size: u64) -> io::Result<()> {
        match &mut self.target {
            Target::File(file) => crate::atomic::copy_range(from, offset, file.file(), self.position, size)?,
            Target::Stream(file) => crate::atomic::copy_to_stream(from, offset, file, size)?,
        }
        self.position += size;
        Ok(())
    }
}

/// A USTAR header of a regular file, mode 0644, owner 0:0, mtime 0. A size of 8 GiB or more is written in base 256, which
/// GNU tar, Go and Python read: it must fit into the one block that was left free for it.
pub(super) fn header(name: &str, size: u64) -> [u8; 512] {
    header_of(b'0', name, size)
}

/// The header of a member of any kind; `name` has at most 100 bytes.
pub(super) fn header_of(kind: u8, name: &str, size: u64) -> [u8; 512] {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].fill(b' ');
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::BufferPool;

    /// Writes layers that arrive whole in `arrival`, all of them begun before the first arrives, and gives the tar's bytes.
    fn assembled(contents: &[&[u8]], foreseen: &[Option<u64>], arrival: &[usize]) -> Vec<u8> {
        assembled_at_once(contents, foreseen, arrival, contents.len())
    }

    /// The same with no more than `parallel` layers begun at any time.
    fn assembled_at_once(
        contents: &[&[u8]],
        foreseen: &[Option<u64>],
        arrival: &[usize],
        parallel: usize,
    ) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let spools = SpoolDir::new(dir.path(), 1 << 30);
        let (target, spools) = Target::open(&dir.path().join("out.tar"), &spools).unwrap();
        let mut assembly = Assembly {
            target,
            spools: spools.clone(),
            position: 0,
            pending: (0..contents.len())
                .map(|index| ExpectedLayer { index, tar_size: foreseen[index], may_restart: false })
                .collect(),
            placed: HashMap::new(),
            finished: HashMap::new(),
            present: HashSet::new(),
            misplaced: Vec::new(),
        };
        let mut places = HashMap::new();
        let mut begun = 0;
        for index in arrival {
            // Layers are begun in their order, and one that arrives was begun.
            while begun <= *index || begun < contents.len() && places.len() < parallel {
                places.insert(begun, assembly.claim(begun).unwrap());
                begun += 1;
            }
            let mut place = places.remove(index).unwrap();
            for piece in contents[*index].chunks(700) {
                place.write(piece, &spools).unwrap();
            }
            let digest = Digest::sha256(contents[*index]);
            let summary = BlobSummary { digest, size: contents[*index].len() as u64 };
            assembly.settle(*index, place, summary).unwrap();
        }
        assembly.reassemble().unwrap();
        assembly.append_small("manifest.json", b"[]").unwrap();
        let Target::File(file) = assembly.target else { unreachable!() };
        file.publish(assembly.position).unwrap();
        std::fs::read(dir.path().join("out.tar")).unwrap()
    }

    #[test]
    fn the_bytes_do_not_depend_on_the_order_of_arrival_or_on_what_was_foreseen() {
        let (a, b, c) = (vec![b'a'; 1024], vec![b'b'; 3000], vec![b'c'; 512]);
        let contents: [&[u8]; 4] = [&a, &b, &c, &b[..2048]];
        let orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1], [1, 3, 0, 2]];
        let right: Vec<_> = contents.iter().map(|content| Some(content.len() as u64)).collect();
        let expected = assembled(&contents, &[None; 4], &[0, 1, 2, 3]);
        let mut guesses = vec![right.clone(), vec![None; 4]];
        for layer in 0..4 {
            for wrong in [Some(0), Some(512), Some(10_240), None] {
                let mut guess = right.clone();
                guess[layer] = wrong;
                guesses.push(guess);
            }
        }
        for guess in guesses {
            for order in orders {
                for parallel in 1..=4 {
                    let tar = assembled_at_once(&contents, &guess, &order, parallel);
                    assert!(tar == expected, "{guess:?} {order:?} {parallel}");
                }
            }
        }
    }

    #[test]
    fn layers_that_turn_out_equal_are_written_once() {
        let contents: [&[u8]; 3] = [&[1; 512], &[1; 512], &[2; 512]];
        let once = assembled(&[&[1; 512], &[2; 512]], &[None; 2], &[0, 1]);
        for order in [[0, 1, 2], [2, 1, 0]] {
            assert!(assembled(&contents, &[Some(512); 3], &order) == once);
            assert!(assembled(&contents, &[None; 3], &order) == once);
        }
    }

    #[test]
    fn a_layer_begun_after_an_equal_one_was_dropped_overwrites_none() {
        let (a, b, c, d) = ([1; 1024], [2; 512], [3; 2048], [4; 1536]);
        let contents: [&[u8]; 6] = [&a, &b, &a, &c, &d, &b];
        let right: Vec<_> = contents.iter().map(|content| Some(content.len() as u64)).collect();
        let expected = assembled(&[&a, &b, &c, &d], &[None; 4], &[0, 1, 2, 3]);
        let orders = [
            [0, 1, 2, 3, 4, 5],
            [2, 0, 1, 3, 5, 4],
            [3, 0, 1, 2, 4, 5],
            [1, 0, 3, 2, 5, 4],
            [0, 3, 1, 2, 5, 4],
        ];
        for order in orders {
            for parallel in 1..=6 {
                let tar = assembled_at_once(&contents, &right, &order, parallel);
                assert!(tar == expected, "{order:?} {parallel}");
            }
        }
    }

    #[test]
    fn a_member_of_8_gib_has_its_size_in_base_256() {
        let header = header("x", 10_000_005_120);
        assert_eq!(header[124], 0x80);
        assert_eq!(u64::from_be_bytes(header[128..136].try_into().unwrap()), 10_000_005_120);
    }

    #[tokio::test]
    async fn a_stream_that_stops_is_no_layer() {
        let dir = tempfile::tempdir().unwrap();
        let output = TarOutput::new(dir.path().join("out.tar"), SpoolDir::new(dir.path(), 1 << 30));
        let (target, spools) = Target::open(&output.path, &output.spools).unwrap();
        *lock(&output.assembly) = Some(Assembly {
            target,
            spools,
            position: 0,
            pending: [ExpectedLayer { index: 0, tar_size: None, may_restart: false }].into(),
            placed: HashMap::new(),
            finished: HashMap::new(),
            present: HashSet::new(),
            misplaced: Vec::new(),
        });
        let (writer, stream) = LayerStream::channel(4, BufferPool::default());
        writer.send(bytes::Bytes::from_static(b"part of a layer")).await.unwrap();
        drop(writer);
        let result =
            super::super::ImageOutput::write_layer(&output, 0, stream, Format::None, &ByteCount::default())
                .await;
        assert!(result.unwrap_err().is_interrupted());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
