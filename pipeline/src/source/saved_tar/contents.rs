//! The members of a saved tar, each a region of a file that can be read again.
//!
//! A plain file is indexed where it lies: only headers are read, members are skipped. What cannot be sought in (a pipe, a
//! tar that is compressed as a whole) is read once, and its members are kept in one spool.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use async_compression::tokio::bufread::{BzDecoder, GzipDecoder, XzDecoder, ZstdDecoder};
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};
use tokio::runtime::Handle;

use crate::blob::CHUNK;
use crate::source::manifest_json::SavedImageError;
use crate::spool::{FileRegion, SpoolDir};
use crate::tar::{BLOCK, Kind, Limits, Member, TarError, Walker};
use crate::thread;

/// Links are followed this many times; more is a loop.
const MAX_LINKS: usize = 16;
/// A saved tar has a handful of members a layer; this many is an attack.
const MAX_MEMBERS: usize = 1 << 14;

/// The members of a saved tar, by their cleaned names.
#[derive(Debug, Default)]
pub(in crate::source) struct Contents(HashMap<String, Content>);

#[derive(Debug)]
enum Content {
    File(FileRegion),
    /// A symbolic or hard link, as a cleaned name from the top.
    Link(String),
}

/// Why the members could not be found.
#[derive(Debug)]
pub(in crate::source) enum ContentsError {
    Io(io::Error),
    Tar(String),
}

impl From<io::Error> for ContentsError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl ContentsError {
    pub(super) fn into_saved_image_error(self, path: String) -> SavedImageError {
        match self {
            Self::Io(source) => SavedImageError::Io { path, source },
            Self::Tar(reason) => SavedImageError::NotATar { path, reason },
        }
    }
}

/// How the whole file is compressed, of the forms that `docker load` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outer {
    Plain,
    Gzip,
    Zstd,
    Bzip2,
    Xz,
}

impl Outer {
    const SNIFFED: usize = 6;

    fn sniff(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [b'B', b'Z', b'h', ..] => Self::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            _ => Self::Plain,
        }
    }
}

impl Contents {
    /// Finds the members of the tar at `path`, or on standard input when that is `-`.
    pub(in crate::source) async fn open(path: &Path, spools: &SpoolDir) -> Result<Self, ContentsError> {
        let (path, spools, runtime) = (path.to_owned(), spools.clone(), Handle::current());
        // To open a pipe waits for whoever writes it, and all else here is reading.
        on_thread(move || {
            let mut file = if path == Path::new("-") {
                File::from(io::stdin().as_fd().try_clone_to_owned()?)
            } else {
                File::open(&path)?
            };
            // A directory opens, and only its first read would fail, with a stranger message.
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                return Err(io::Error::from(io::ErrorKind::IsADirectory).into());
            }
            let name = path.display().to_string();
            let mut start = Vec::new();
            (&mut file).take(Outer::SNIFFED as u64).read_to_end(&mut start)?;
            let outer = Outer::sniff(&start);
            if metadata.is_file() && outer == Outer::Plain {
                return Self::index(&Arc::new(file), &name);
            }
            let stream = AsyncReadExt::chain(io::Cursor::new(start), tokio::fs::File::from_std(file));
            Self::spool(Waiting { stream: decoded(outer, stream), runtime }, &name, &spools)
        })
        .await
    }

    /// Keeps the members of a tar that comes in a stream.
    pub(super) async fn read(
        stream: impl AsyncRead + Send + Unpin + 'static,
        name: &str,
        spools: &SpoolDir,
    ) -> Result<Self, ContentsError> {
        let (name, spools) = (name.to_owned(), spools.clone());
        let stream = Waiting { stream: Box::pin(stream), runtime: Handle::current() };
        on_thread(move || Self::spool(stream, &name, &spools)).await
    }

    /// The content of a member, links followed.
    pub(in crate::source) fn region(&self, member: &str) -> Option<FileRegion> {
        let mut name = clean(member);
        for _ in 0..MAX_LINKS {
            match self.0.get(&name)? {
                Content::File(region) => return Some(region.clone()),
                Content::Link(target) => name.clone_from(target),
            }
        }
        None
    }

    /// The cleaned names of all members.
    pub(in crate::source) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Reads the headers only. Each member has a walker of its own, from where the last member ended.
    fn index(file: &Arc<File>, name: &str) -> Result<Self, ContentsError> {
        let length = file.metadata()?.len();
        let mut contents = Self::default();
        let mut position = 0;
        for _ in 0..=MAX_MEMBERS {
            (&**file).seek(SeekFrom::Start(position))?;
            let mut walker = Walker::new(io::BufReader::new(&**file), Limits::default());
            let mut member = Member::default();
            if !walker.read_member(&mut member).map_err(|error| at(position, error))? {
                return Ok(contents);
            }
            let offset = position + walker.header().len() as u64;
            let path = plain_path(&member)?;
            let size = member.stored_size();
            let region = FileRegion::new(Arc::clone(file), format!("{name}: {path}"), offset, size);
            contents.insert(member.kind(), &path, &String::from_utf8_lossy(member.link()), region);
            match offset.checked_add(size) {
                Some(end) if end <= length => position = end.next_multiple_of(BLOCK as u64),
                _ => {
                    let inside = format!("it ends at offset {length}, inside {path:?} of {size} bytes");
                    return Err(ContentsError::Tar(inside));
                }
            }
        }
        Err(ContentsError::Tar(format!("more than {MAX_MEMBERS} members")))
    }

    fn spool(stream: impl Read, name: &str, spools: &SpoolDir) -> Result<Self, ContentsError> {
        let mut spool = spools.create()?;
        let mut members = Vec::new();
        let limits = Limits { members: MAX_MEMBERS as u64, ..Limits::default() };
        let mut walker = Walker::unhashed(io::BufReader::with_capacity(CHUNK, stream), limits);
        let mut member = Member::default();
        while walker.read_member(&mut member).map_err(|error| at(0, error))? {
            let path = plain_path(&member)?;
            let link = String::from_utf8_lossy(member.link()).into_owned();
            let offset = spool.size();
            while let Some(chunk) = walker.next_chunk().map_err(|error| at(0, error))? {
                spool.write_all(chunk.data())?;
            }
            members.push((member.kind(), path, link, offset, spool.size() - offset));
        }
        let spool = Arc::new(spool);
        let mut contents = Self::default();
        for (kind, path, link, offset, size) in members {
            let region = FileRegion::of_spool(Arc::clone(&spool), format!("{name}: {path}"), offset, size)?;
            contents.insert(kind, &path, &link, region);
        }
        Ok(contents)
    }

    /// A later member of the same name replaces an earlier one, as unpacking would.
    fn insert(&mut self, kind: Kind, path: &str, link: &str, region: FileRegion) {
        let path = clean(path);
        let content = match kind {
            Kind::Regular => Content::File(region),
            Kind::HardLink => Content::Link(clean(link)),
            Kind::Symlink if link.starts_with('/') => Content::Link(clean(link)),
            Kind::Symlink => {
                let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
                Content::Link(clean(&format!("{directory}/{link}")))
            }
            _ => return,
        };
        self.0.insert(path, content);
    }
}

/// Runs on a thread of its own: it may wait for somebody for as long as it takes.
async fn on_thread(
    work: impl FnOnce() -> Result<Contents, ContentsError> + Send + 'static,
) -> Result<Contents, ContentsError> {
    thread::run("members", work).await.unwrap_or_else(|error| Err(io::Error::other(error).into()))
}

/// An async stream, read from a thread that may wait.
struct Waiting {
    stream: Pin<Box<dyn AsyncRead + Send>>,
    runtime: Handle,
}

impl Read for Waiting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.runtime.block_on(self.stream.read(buffer))
    }
}

/// A member's path, if its bytes in the tar are its content.
fn plain_path(member: &Member) -> Result<String, ContentsError> {
    let path = String::from_utf8_lossy(member.path()).into_owned();
    if member.sparse().is_some() {
        return Err(ContentsError::Tar(format!("{path:?} is a sparse file")));
    }
    Ok(path)
}

fn decoded(outer: Outer, stream: impl AsyncRead + Send + 'static) -> Pin<Box<dyn AsyncRead + Send>> {
    let stream = BufReader::with_capacity(crate::blob::CHUNK, stream);
    match outer {
        Outer::Plain => Box::pin(stream),
        // All members and frames: the default of these decoders is to stop after the first.
        Outer::Gzip => {
            let mut decoder = GzipDecoder::new(stream);
            decoder.multiple_members(true);
            Box::pin(decoder)
        }
        Outer::Zstd => {
            let mut decoder = ZstdDecoder::new(stream);
            decoder.multiple_members(true);
            Box::pin(decoder)
        }
        Outer::Bzip2 => {
            let mut decoder = BzDecoder::new(stream);
            decoder.multiple_members(true);
            Box::pin(decoder)
        }
        Outer::Xz => {
            let mut decoder = XzDecoder::new(stream);
            decoder.multiple_members(true);
            Box::pin(decoder)
        }
    }
}

/// A member's name without `./`, `//`, `..` and a leading slash; a name that climbs stays at the top.
pub(in crate::source) fn clean(name: &str) -> String {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// An error of a walker that began at `position` of the whole tar.
fn at(position: u64, error: TarError) -> ContentsError {
    match (position, error) {
        // These kinds are what decoders say of bytes; the others are the machine's.
        (_, TarError::Read { source, .. })
            if !matches!(
                source.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
            ) =>
        {
            ContentsError::Io(source)
        }
        (0, error) => ContentsError::Tar(error.to_string()),
        (position, error) => ContentsError::Tar(format!("in the member at offset {position}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: tokio_tar::EntryType, size: u64) -> Vec<u8> {
        let mut header = tokio_tar::Header::new_gnu();
        header.set_path("a").unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    async fn refusal(tar: Vec<u8>) -> String {
        let dir = tempfile::tempdir().unwrap();
        let spools = SpoolDir::new(dir.path(), 1 << 30);
        match Contents::read(io::Cursor::new(tar), "test", &spools).await {
            Err(ContentsError::Tar(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_name_without_end_is_not_kept_in_memory() {
        const SIZE: usize = 8 << 20;
        let mut tar = header(tokio_tar::EntryType::GNULongName, SIZE as u64);
        tar.resize(tar.len() + SIZE, b'x');
        tar.extend(header(tokio_tar::EntryType::Regular, 0));
        let reason = refusal(tar).await;
        assert!(reason.contains("limit of 1048576 bytes"), "{reason}");
    }

    #[tokio::test]
    async fn members_are_counted_while_they_come() {
        let directory = header(tokio_tar::EntryType::Directory, 0);
        let reason = refusal(directory.repeat(MAX_MEMBERS + 1)).await;
        assert!(reason.contains("limit of 16384 members"), "{reason}");
    }
}
