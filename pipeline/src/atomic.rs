//! Files that appear whole or not at all, and the copies between files that the kernel can do alone.

use std::ffi::{OsStr, OsString};
use std::fs::{DirEntry, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, StatxAttributes, StatxFlags, flock, statx};
use rustix::io::Errno;

use crate::blob::CHUNK;

/// How partial names end.
pub(crate) const PARTIAL: &str = ".occystrap-partial";
/// So many bytes of a name are in its partial names. File systems take 255 or, few of them, 143.
const PARTIAL_STEM: usize = 96;

/// A file that gets its name only when it is complete. Dropped or killed before, it is gone.
///
/// Where the file system knows no unnamed files it has a name from the start: `.NAME.PID-N.occystrap-partial` beside the
/// final one. It is locked by the process that writes it, wherever that runs. The lock dies with the process, so the next run with
/// the same destination can tell what a killed one left, and removes it.
#[derive(Debug)]
pub struct UnnamedFile {
    file: File,
    destination: PathBuf,
    directory: PathBuf,
    partial: PathBuf,
    /// Whether `partial` exists.
    named: bool,
}

impl UnnamedFile {
    /// A new file that is to become `destination`. When that is a symbolic link, its target is what gets replaced.
    /// What could not be replaced in the end is refused now.
    pub fn create(destination: &Path) -> io::Result<Self> {
        let destination = replaceable(destination)?;
        let directory = parent(&destination);
        let name = destination.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?;
        remove_abandoned(&directory, name);
        Self::open(destination, directory)
    }

    fn open(destination: PathBuf, directory: PathBuf) -> io::Result<Self> {
        let name = destination.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?;
        let next = || directory.join(partial_name(name, std::process::id()));
        let mode = Mode::from_raw_mode(0o666);
        match rustix::fs::open(&directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
            Ok(fd) => {
                let file = File::from(fd);
                // It has no name by which anybody else could have locked it; a file system without locks has none for others either.
                let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
                Ok(Self { file, partial: next(), destination, directory, named: false })
            }
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
                let (file, partial) = named(next)?;
                Ok(Self { file, destination, directory, partial, named: true })
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// A new file in `directory` that is to become a file of that name, there or wherever [`destined`](Self::destined) says.
    pub fn create_in(directory: &Path, name: &str) -> io::Result<Self> {
        remove_abandoned(directory, name.as_ref());
        Self::open(directory.join(name), directory.to_owned())
    }

    /// The same file, to become `destination`, which must lie in the same file system.
    #[must_use]
    pub fn destined(mut self, destination: PathBuf) -> Self {
        self.destination = destination;
        self
    }

    /// Another file that is to become the same destination, in this one's place.
    pub fn another(&self) -> io::Result<Self> {
        Self::open(self.destination.clone(), self.directory.clone())
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The directory that it will stand in.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Cuts the file to `size` bytes and gives it its name, replacing in one step what had it before.
    pub fn publish(mut self, size: u64) -> io::Result<()> {
        self.file.set_len(size)?;
        if let Ok(replaced) = std::fs::metadata(&self.destination) {
            self.file.set_permissions(replaced.permissions())?;
        }
        if !self.named {
            // A name cannot be taken over by linkat, only by rename; so link beside it first.
            let fd = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            loop {
                match rustix::fs::linkat(CWD, &fd, CWD, &self.partial, AtFlags::SYMLINK_FOLLOW) {
                    Ok(()) => break,
                    // On another machine a process may have our number.
                    Err(Errno::EXIST) => {
                        let name = self.destination.file_name().unwrap_or_default();
                        self.partial = self.directory.join(partial_name(name, std::process::id()));
                    }
                    Err(errno) => return Err(errno.into()),
                }
            }
            self.named = true;
        }
        std::fs::rename(&self.partial, &self.destination)?;
        self.named = false;
        Ok(())
    }
}

impl Drop for UnnamedFile {
    fn drop(&mut self) {
        if self.named {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Writes a small file that appears whole or not at all. It is on the disk, its name included, when this returns.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?;
    let directory = parent(path);
    remove_abandoned(&directory, name);
    let file = UnnamedFile::open(path.to_owned(), directory.clone())?;
    file.file().write_all_at(bytes, 0)?;
    file.file().sync_data()?;
    file.publish(bytes.len() as u64)?;
    File::open(directory)?.sync_all()
}

/// Waits until nobody else holds a file's lock, and takes it, for as long as the file is open.
pub(crate) fn lock(file: &File) -> io::Result<()> {
    loop {
        match flock(file, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            locked => return Ok(locked?),
        }
    }
}

/// The directory that `path` stands in.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Where something will be put that is to be called `path`: behind the links that lead there. What a rename could not replace is
/// an error, so that it is told before any work and not after it.
pub(crate) fn replaceable(path: &Path) -> io::Result<PathBuf> {
    let existing = match std::fs::canonicalize(path) {
        Ok(existing) => existing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let is_link = path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink());
            let dangling = || io::Error::new(error.kind(), "it is a symbolic link to what is not there");
            return if is_link { Err(dangling()) } else { Ok(path.to_owned()) };
        }
        Err(error) => return Err(error),
    };
    // A kernel that does not know of mount points tells it in the end.
    let is_mounted = statx(CWD, &existing, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    if is_mounted {
        let reason = "it is a mount point, which nothing can take the place of";
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, reason));
    }
    Ok(existing)
}

/// The name beside `name` of what is not whole yet: no other process and no other call gets the same.
pub(crate) fn partial_name(name: &OsStr, pid: u32) -> OsString {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}{pid}-{number}{PARTIAL}", partial_prefix(name)).into()
}

/// How partial names of `name` begin: with so much of it that there is room for the rest in a name that a file system takes.
fn partial_prefix(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    let fits = name.char_indices().take_while(|(at, char)| at + char.len_utf8() <= PARTIAL_STEM);
    format!(".{}.", fits.map(|(_, char)| char).collect::<String>())
}

/// What has a partial name of `name`.
pub(crate) fn partials(directory: &Path, name: &OsStr) -> impl Iterator<Item = DirEntry> {
    let prefix = partial_prefix(name);
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(move |entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let numbers = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(PARTIAL)?.split_once('-'));
        numbers.is_some_and(|(pid, number)| pid.parse::<u32>().is_ok() && number.parse::<u32>().is_ok())
    })
}

/// A new file with one of these names, which nobody else has taken for abandoned before it was locked.
fn named(next: impl Fn() -> PathBuf) -> io::Result<(File, PathBuf)> {
    loop {
        let partial = next();
        let file = match File::options().read(true).write(true).create_new(true).open(&partial) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            file => file?,
        };
        let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
        // Without locks in the file system, nothing is ever taken for abandoned.
        if locked != Err(Errno::WOULDBLOCK) && file.metadata()?.nlink() > 0 {
            return Ok((file, partial));
        }
    }
}

/// Removes files that nobody holds a lock of: what killed runs with the same destination left.
fn remove_abandoned(directory: &Path, name: &OsStr) {
    for entry in partials(directory, name) {
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        // NFS grants exclusive locks only of what is open for writing.
        let Ok(file) = File::options().read(true).write(true).open(entry.path()) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Copies `size` bytes of `from` at `offset` to `to` at `position`.
///
/// By reading and writing: measured on ext4, `copy_file_range` took several times as long, and it is refused between file systems.
pub fn copy_range(from: &File, offset: u64, to: &File, position: u64, size: u64) -> io::Result<()> {
    copy_chunks(from, offset, size, |bytes, done| to.write_all_at(bytes, position + done))
}

/// Writes `size` bytes of `from` at `offset` to `to`.
pub fn copy_to_stream(from: &File, offset: u64, to: &mut impl Write, size: u64) -> io::Result<()> {
    copy_chunks(from, offset, size, |bytes, _| to.write_all(bytes))
}

fn copy_chunks(
    from: &File,
    offset: u64,
    size: u64,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    while done < size {
        let length = CHUNK.min(usize::try_from(size - done).unwrap_or(CHUNK));
        from.read_exact_at(&mut buffer[..length], offset + done)?;
        write(&buffer[..length], done)?;
        done += length as u64;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What is in a directory.
    pub(crate) fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_only_when_it_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("out");
        std::fs::write(&destination, "old").unwrap();
        let file = UnnamedFile::create(&destination).unwrap();
        file.file().write_all_at(b"new content", 0).unwrap();
        assert_eq!(std::fs::read(&destination).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["out"]);
        file.publish(3).unwrap();
        assert_eq!(std::fs::read(&destination).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_what_a_living_one_has_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let dead = dir.path().join(partial_name("out".as_ref(), std::process::id()));
        std::fs::write(&dead, "").unwrap();
        // No process here has this number, which is above the kernel's largest: one on another machine may.
        let (_held, alive) = named(|| dir.path().join(partial_name("out".as_ref(), 4_194_305))).unwrap();
        drop(UnnamedFile::create(&dir.path().join("out")).unwrap());
        assert!(!dead.exists() && alive.exists());
    }

    #[test]
    fn what_cannot_be_replaced_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("nothing", &link).unwrap();
        let long = dir.path().join("x".repeat(256));
        for (path, reason) in
            [(&*link, "symbolic link"), (Path::new("/proc"), "mount point"), (&*long, "too long")]
        {
            let error = UnnamedFile::create(path).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(names(dir.path()), ["link"]);
    }

    #[test]
    fn the_longest_name_has_room_for_its_partial_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["x".repeat(255), "\u{65e5}".repeat(85)] {
            let dead = dir.path().join(partial_name(name.as_ref(), 1));
            std::fs::write(&dead, "").unwrap();
            UnnamedFile::create(&dir.path().join(&name)).unwrap().publish(0).unwrap();
            assert_eq!(names(dir.path()), [&*name]);
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
    }

    #[test]
    fn a_link_is_followed_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("real"), "old").unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        UnnamedFile::create(&dir.path().join("link")).unwrap().publish(0).unwrap();
        assert_eq!(std::fs::read(dir.path().join("real")).unwrap(), b"");
        assert!(dir.path().join("link").symlink_metadata().unwrap().is_symlink());
    }
}
