//! `tar://PATH`: one saved tar, docker's v1.2 form, that `docker load` and `podman load` read.
//!
//! The members stand in a fixed order (layers lowest first, the config, `manifest.json`) with fixed metadata, so the same
//! image always gives the same bytes. Layers arrive in any order: the one whose turn it is goes straight into the file, its
//! header patched in afterwards when its name and size are known; the others wait in unlinked spools beside it.
//!
//! The file has no name until it is whole, so a killed run leaves nothing. Standard output, or any path that is not a
//! regular file, cannot be patched: there every layer waits in a spool of its own.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FinishedImage, LayerForm, Moved, OutputError, OutputKind, Receipt};
use crate::blob::{BlobSummary, ByteCount, LayerPiece, LayerStream};
use crate::compression::Format;
use crate::digest::Digest;
use crate::element::{Image, Layer, StoredLayer};
use crate::error::Error;
use crate::spool::{Spool, SpoolDir};

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "tar",
    syntax: "tar://PATH",
    about: "a saved tar for `docker load`; tar://- is standard output",
    options: &[],
};

const BLOCK: u64 = 512;

/// An image that is being written as a saved tar.
#[derive(Debug)]
pub struct TarOutput {
    path: PathBuf,
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
    pending: VecDeque<usize>,
    /// The layer that is being written in place, behind the header at `position`.
    direct: Option<usize>,
    /// Layers that are whole and wait for their turn; None for one that is in place.
    finished: HashMap<usize, (BlobSummary, Option<Spool>)>,
    /// Layers that are in the tar.
    present: HashSet<Digest>,
}

#[derive(Debug)]
enum Target {
    /// A regular file that has no name yet.
    File(crate::atomic::UnnamedFile),
    /// Something that can only be written from front to back.
    Stream(File),
}

/// Where one layer's bytes go while they arrive.
enum Place {
    Direct { file: File, offset: u64 },
    Spool(Spool),
}

impl TarOutput {
    /// A saved tar at `path`, or on standard output when that is `-`. Spools of a file go beside it, others into `spools`.
    pub fn new(path: impl Into<PathBuf>, spools: SpoolDir) -> Self {
        Self { path: path.into(), spools, assembly: Arc::default() }
    }

    fn open(&self) -> Result<(Target, SpoolDir), OutputError> {
        let fail = |what| move |source| OutputError::Io { what, path: self.path.clone(), source };
        if self.path == Path::new("-") {
            let stdout = rustix::io::dup(io::stdout()).map_err(|errno| fail("write to")(errno.into()))?;
            return Ok((Target::Stream(File::from(stdout)), self.spools.clone()));
        }
        match std::fs::metadata(&self.path) {
            Ok(metadata) if metadata.is_dir() => {
                return Err(fail("write to")(io::Error::from(io::ErrorKind::IsADirectory)));
            }
            Ok(metadata) if !metadata.is_file() => {
                let file = File::options().write(true).open(&self.path).map_err(fail("open"))?;
                return Ok((Target::Stream(file), self.spools.clone()));
            }
            _ => {}
        }
        let file = crate::atomic::UnnamedFile::create(&self.path).map_err(fail("create"))?;
        let spools = self.spools.at(file.directory());
        Ok((Target::File(file), spools))
    }

    fn error(&self, what: &'static str, source: io::Error) -> Error {
        OutputError::Io { what, path: self.path.clone(), source }.into()
    }
}

#[async_trait::async_trait]
impl super::ImageOutput for TarOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Tar
    }

    async fn begin(&self, image: &Image, written: &[usize]) -> Result<(), Error> {
        if !image.is_image() {
            return Err(OutputError::NotAnImage { destination: format!("tar://{}", self.path.display()) }.into());
        }
        let (target, spools) = self.open()?;
        *lock(&self.assembly) = Some(Assembly {
            target,
            spools,
            position: 0,
            pending: written.iter().copied().collect(),
            direct: None,
            finished: HashMap::new(),
            present: HashSet::new(),
        });
        Ok(())
    }

    async fn copy_layer(&self, _layer: &Layer, _progress: &ByteCount) -> Result<Moved, Error> {
        unreachable!("a saved tar takes layers as plain tars")
    }

    async fn has_layer(&self, _layer: &Layer) -> Result<bool, Error> {
        Ok(false)
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
            let summary = place.fill(&mut stream, &progress)?;
            begun(&mut lock(&assembly)).settle(index, place, summary.clone())?;
            Ok(summary)
        };
        match tokio::task::spawn_blocking(task).await.expect("writing a layer does not panic") {
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
        let layers: Vec<String> = finished.layers.iter().map(|layer| member_name(stored_digest(&layer.stored))).collect();
        let image = finished.image;
        let mut repo_tags: Vec<String> = image.name.tag.iter().map(|_| image.name.to_string()).collect();
        repo_tags.extend(image.aliases.iter().cloned());
        let manifest = serde_json::json!([{
            "Config": config_name,
            "RepoTags": repo_tags,
            "Layers": layers,
        }]);
        let task = move || -> io::Result<()> {
            assembly.append_small(&config_name, &config)?;
            assembly.append_small("manifest.json", manifest.to_string().as_bytes())?;
            assembly.write(&[0; 2 * BLOCK as usize])?;
            match assembly.target {
                Target::File(file) => file.publish(assembly.position),
                Target::Stream(mut file) => file.flush(),
            }
        };
        tokio::task::spawn_blocking(task)
            .await
            .expect("finishing a tar does not panic")
            .map_err(|source| self.error("finish", source))?;
        Ok(Receipt { destination: format!("tar://{}", self.path.display()), ..Receipt::default() })
    }
}

enum WriteError {
    Io(io::Error),
    Stream(crate::blob::BlobError),
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
    fn fill(&mut self, stream: &mut LayerStream, progress: &ByteCount) -> Result<BlobSummary, WriteError> {
        loop {
            match stream.blocking_next().map_err(WriteError::Stream)? {
                LayerPiece::Data(bytes) => {
                    match self {
                        Self::Direct { file, offset } => {
                            file.write_all_at(&bytes, *offset)?;
                            *offset += bytes.len() as u64;
                        }
                        Self::Spool(spool) => spool.write_all(&bytes)?,
                    }
                    progress.add(bytes.len() as u64);
                    stream.recycle(bytes);
                }
                LayerPiece::End(summary) => return Ok(summary),
            }
        }
    }
}

impl Assembly {
    fn claim(&mut self, index: usize) -> io::Result<Place> {
        if let Target::File(file) = &self.target {
            let is_next = self.pending.front() == Some(&index);
            if is_next && self.direct.is_none_or(|direct| direct == index) {
                self.direct = Some(index);
                return Ok(Place::Direct { file: file.file().try_clone()?, offset: self.position + BLOCK });
            }
        }
        Ok(Place::Spool(self.spools.create()?))
    }

    /// Takes a whole layer, and puts into the tar all whose turn it is now.
    fn settle(&mut self, index: usize, place: Place, summary: BlobSummary) -> io::Result<()> {
        let spool = match place {
            Place::Direct { .. } => None,
            Place::Spool(spool) => Some(spool),
        };
        self.finished.insert(index, (summary, spool));
        while let Some(next) = self.pending.front().copied() {
            let Some((summary, spool)) = self.finished.remove(&next) else { break };
            self.pending.pop_front();
            self.direct = None;
            // Two layers that differed at the source can be equal behind the filters. The second is not kept: the next
            // member overwrites what was written in place.
            if !self.present.insert(summary.digest.clone()) {
                continue;
            }
            let header = header(&member_name(&summary.digest), summary.size);
            match spool {
                None => {
                    self.write_at(&header, self.position)?;
                    self.position += BLOCK + summary.size;
                }
                Some(spool) => {
                    self.write(&header)?;
                    self.append_spool(&spool)?;
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
        let padding = usize::try_from(size.next_multiple_of(BLOCK) - size).expect("less than a block");
        self.write(&[0; BLOCK as usize][..padding])
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

    fn append_spool(&mut self, spool: &Spool) -> io::Result<()> {
        match &mut self.target {
            Target::File(file) => crate::atomic::copy_range(spool.file(), file.file(), self.position, spool.size())?,
            Target::Stream(file) => crate::atomic::copy_to_stream(spool.file(), file, spool.size())?,
        }
        self.position += spool.size();
        Ok(())
    }
}

/// A USTAR header of a regular file, mode 0644, owner 0:0, mtime 0. A size of 8 GiB or more is written in base 256, which
/// GNU tar, Go and Python read: it must fit into the one block that was left free for it.
fn header(name: &str, size: u64) -> [u8; BLOCK as usize] {
    let mut header = [0; BLOCK as usize];
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
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
