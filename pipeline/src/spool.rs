//! Temporary files that leave nothing behind when the process is killed, under one cap.
//!
//! A spool is unlinked from the moment that it exists: made with `O_TMPFILE`, or, where the file system has no such thing,
//! created and unlinked at once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;

use crate::blob::{Blob, BlobError, ByteStream, CHUNK};
use crate::digest::{Algorithm, Digest, Hasher};

/// Where temporary files go, and how many bytes of them there may be at once.
#[derive(Clone, Debug)]
pub struct SpoolDir {
    path: PathBuf,
    /// It is beside a destination, and not where temporary files were told to go.
    is_beside: bool,
    cap: u64,
    used: Arc<AtomicU64>,
}

impl SpoolDir {
    /// Spools in `path`, at most `cap` bytes in all.
    pub fn new(path: impl Into<PathBuf>, cap: u64) -> Self {
        Self { path: path.into(), is_beside: false, cap, used: Arc::default() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that temporary files hold now.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The same cap and count, in a directory beside a destination.
    pub fn at(&self, path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), is_beside: true, ..self.clone() }
    }

    /// An empty spool.
    pub fn create(&self) -> io::Result<Spool> {
        let file = unlinked(&self.path).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot create a temporary file in {}: {error}", self.path.display()),
            )
        })?;
        Ok(Spool { file, size: 0, dir: self.clone() })
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) <= self.cap {
            return Ok(());
        }
        self.release(bytes);
        Err(io::Error::new(
            io::ErrorKind::StorageFull,
            format!(
                "temporary files would exceed their cap of {} bytes; raise it with --spool-limit",
                self.cap
            ),
        ))
    }

    /// What an error of the disk means for who may choose another one.
    fn explained(&self, error: io::Error) -> io::Error {
        if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return error;
        }
        let way_out = if self.is_beside { "" } else { "; choose a larger place with --temp-dir" };
        let path = self.path.display();
        io::Error::new(error.kind(), format!("no room for temporary files in {path}: {error}{way_out}"))
    }

    fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

fn unlinked(dir: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    match rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))
    {
        Ok(fd) => Ok(File::from(fd)),
        // EOPNOTSUPP from the file system, EISDIR from a kernel that does not know the flag.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => tempfile::tempfile_in(dir),
        Err(errno) => Err(errno.into()),
    }
}

/// A temporary file that is being written. Its share of the cap is given back when it goes.
#[derive(Debug)]
pub struct Spool {
    file: File,
    size: u64,
    dir: SpoolDir,
}

impl Spool {
    /// Bytes written so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file, to read from.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl io::Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.dir.reserve(bytes.len() as u64)?;
        match self.file.write_all_at(bytes, self.size) {
            Ok(()) => {
                self.size += bytes.len() as u64;
                Ok(bytes.len())
            }
            Err(error) => {
                self.dir.release(bytes.len() as u64);
                Err(self.dir.explained(error))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.dir.release(self.size);
    }
}

/// A part of a file that can be opened again and again: a member of a saved tar, or a spool.
#[derive(Clone, Debug)]
pub struct FileRegion {
    file: Arc<File>,
    /// Keeps a spool's share of the cap for as long as somebody may read it.
    _spool: Option<Arc<Spool>>,
    name: String,
    offset: u64,
    size: u64,
    /// What the bytes have to hash to, where somebody said it.
    digest: Option<Digest>,
}

impl FileRegion {
    /// `size` bytes of `file` from `offset`; `name` is for messages and must tell this content from any other of its source.
    pub fn new(file: Arc<File>, name: String, offset: u64, size: u64) -> Self {
        Self { file, _spool: None, name, offset, size, digest: None }
    }

    /// A part of a finished spool.
    pub fn of_spool(spool: Arc<Spool>, name: String, offset: u64, size: u64) -> io::Result<Self> {
        let file = Arc::new(spool.file.try_clone()?);
        Ok(Self { file, _spool: Some(spool), name, offset, size, digest: None })
    }

    /// The bytes from `offset` of the region on, at most `length` of them. For small documents only: it is read at once.
    pub fn read_small(&self, cap: u64) -> io::Result<Vec<u8>> {
        if self.size > cap {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is {} bytes long; the cap is {cap}", self.name, self.size),
            ));
        }
        let mut bytes = vec![0; usize::try_from(self.size).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        Ok(bytes)
    }

    /// The same bytes, whose readers find out at their end whether they are the promised ones.
    #[must_use]
    pub fn verified(self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self }
    }

    /// The digest of the bytes, all of which are read for it.
    pub fn hash(&self) -> io::Result<Digest> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut buffer = vec![0; CHUNK];
        let mut position = 0;
        while position < self.size {
            let length = CHUNK.min(usize::try_from(self.size - position).unwrap_or(CHUNK));
            self.file.read_exact_at(&mut buffer[..length], self.offset + position)?;
            hasher.update(&buffer[..length]);
            position += length as u64;
        }
        Ok(hasher.finish())
    }

    /// The first bytes, as many as there are up to `buffer`'s length.
    pub fn peek<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let length = buffer.len().min(usize::try_from(self.size).unwrap_or(usize::MAX));
        self.file.read_exact_at(&mut buffer[..length], self.offset)?;
        Ok(&buffer[..length])
    }
}

#[async_trait::async_trait]
impl Blob for FileRegion {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let hasher = self.digest.as_ref().map(|digest| Hasher::new(digest.algorithm()));
        let reading = Reading { region: self.clone(), position: 0, hasher };
        Ok(stream::try_unfold(reading, |reading| async move {
            tokio::task::spawn_blocking(move || reading.next()).await.expect("reading a file does not panic")
        })
        .boxed())
    }

    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn identity(&self) -> String {
        format!("{}@{}+{}", self.name, self.offset, self.size)
    }

    async fn tail(&self) -> Option<[u8; 4]> {
        let mut tail = [0; 4];
        let start = self.size.checked_sub(4)?;
        self.file.read_exact_at(&mut tail, self.offset + start).ok()?;
        Some(tail)
    }
}

/// A region that is being read.
struct Reading {
    region: FileRegion,
    position: u64,
    hasher: Option<Hasher>,
}

impl Reading {
    fn next(mut self) -> Result<Option<(Bytes, Self)>, BlobError> {
        let region = &self.region;
        if self.position == region.size {
            return match (self.hasher.map(Hasher::finish), &region.digest) {
                (Some(computed), Some(expected)) if computed != *expected => {
                    Err(BlobError::Digest { expected: expected.clone(), computed, size: region.size })
                }
                _ => Ok(None),
            };
        }
        let length = CHUNK.min(usize::try_from(region.size - self.position).unwrap_or(CHUNK));
        let mut bytes = vec![0; length];
        region
            .file
            .read_exact_at(&mut bytes, region.offset + self.position)
            .map_err(|source| BlobError::Io { what: format!("failed to read {}", region.name), source })?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&bytes);
        }
        self.position += length as u64;
        Ok(Some((bytes.into(), self)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use rustix::io::Errno;

    use super::*;

    #[test]
    fn the_cap_counts_all_spools_and_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let spools = SpoolDir::new(dir.path(), 10);
        let mut one = spools.create().unwrap();
        one.write_all(b"123456").unwrap();
        let mut two = spools.at(dir.path()).create().unwrap();
        assert_eq!(two.write_all(b"12345").unwrap_err().kind(), io::ErrorKind::StorageFull);
        drop(one);
        two.write_all(b"12345").unwrap();
    }

    #[test]
    fn a_full_disk_is_told_with_its_directory_and_the_way_out() {
        let spools = SpoolDir::new("/chosen", 10);
        let full = || Errno::NOSPC.into();
        let told = spools.explained(full()).to_string();
        assert!(
            told.contains("/chosen") && told.contains("--temp-dir") && told.contains("No space left"),
            "{told}"
        );
        let told = spools.at("/beside").explained(full()).to_string();
        assert!(told.contains("/beside") && !told.contains("--temp-dir"), "{told}");
        assert_eq!(spools.explained(Errno::IO.into()).raw_os_error(), Some(5));
    }

    #[test]
    fn a_spool_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let _spool = SpoolDir::new(dir.path(), 10).create().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_region_is_read_as_often_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = SpoolDir::new(dir.path(), 1 << 20).create().unwrap();
        spool.write_all(b"before content after").unwrap();
        let region = FileRegion::of_spool(Arc::new(spool), "test".into(), 7, 7).unwrap();
        for _ in 0..2 {
            let chunks: Vec<_> = region.open().await.unwrap().collect().await;
            let bytes: Vec<u8> = chunks.into_iter().flat_map(|chunk| chunk.unwrap().to_vec()).collect();
            assert_eq!(bytes, b"content");
        }
    }
}
