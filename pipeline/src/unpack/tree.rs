//! Walks of trees of any depth: neither the stack nor the number of open files grows with it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, chmodat, fchmod, fstat, openat, statat, unlinkat,
};
use rustix::io::Errno;

/// A name in a directory.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    /// The directory.
    pub(crate) directory: &'a OwnedFd,
    /// Its inode.
    pub(crate) inode: u64,
    /// The name.
    pub(crate) name: &'a CString,
}

/// What is done on a walk, which goes to the contents of a directory before the directory itself.
pub(crate) trait Visitor {
    /// A directory that was opened, the top one included, before anything in it is visited.
    fn entered(&mut self, _directory: &OwnedFd, _stat: &Stat) {}

    /// Something that is no directory.
    fn file(&mut self, place: &Place<'_>) -> io::Result<()>;

    /// A directory whose contents were visited, while it is open.
    fn complete(&mut self, directory: &OwnedFd, inode: u64) -> io::Result<()>;

    /// The same directory from outside, with its inode.
    fn left(&mut self, place: &Place<'_>, inode: u64) -> io::Result<()>;
}

/// A directory on the way down.
struct Level {
    inode: u64,
    /// What has yet to be visited, and whether it is a directory.
    entries: Vec<(CString, bool)>,
    /// Its name in the level above.
    name: CString,
}

/// Visits everything in `top`, but not `top` itself. Links are not followed.
pub(crate) fn walk(top: OwnedFd, inode: u64, visitor: &mut impl Visitor) -> io::Result<()> {
    let mut at = top;
    visitor.entered(&at, &fstat(&at)?);
    let mut levels = vec![Level { inode, entries: entries(&at)?, name: CString::default() }];
    while let Some(level) = levels.last_mut() {
        match level.entries.pop() {
            Some((name, false)) => {
                visitor.file(&Place { directory: &at, inode: level.inode, name: &name })?;
            }
            Some((name, true)) => {
                at = open(&at, &name)?;
                let stat = fstat(&at)?;
                visitor.entered(&at, &stat);
                levels.push(Level { inode: stat.st_ino, entries: entries(&at)?, name });
            }
            None => {
                let left = levels.pop().expect("it was there just now");
                let Some(level) = levels.last() else { break };
                // Completed, the directory may not let its own owner look for `..` in it.
                let outer = openat(&at, "..", DIRECTORY, Mode::empty())?;
                visitor.complete(&at, left.inode)?;
                at = outer;
                visitor.left(&Place { directory: &at, inode: level.inode, name: &left.name }, left.inode)?;
            }
        }
    }
    Ok(())
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a directory, letting its owner in where he has shut himself out.
fn open(at: &OwnedFd, name: &CString) -> io::Result<OwnedFd> {
    match openat(at, name, DIRECTORY, Mode::empty()) {
        Err(Errno::ACCESS) => {
            chmodat(at, name, Mode::RWXU, AtFlags::empty())?;
            Ok(openat(at, name, DIRECTORY, Mode::empty())?)
        }
        result => Ok(result?),
    }
}

fn entries(directory: &OwnedFd) -> io::Result<Vec<(CString, bool)>> {
    let mut entries = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                FileType::from_raw_mode(statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
            }
            kind => kind,
        };
        entries.push((name.to_owned(), kind == FileType::Directory));
    }
    Ok(entries)
}

/// Removes a directory with all that is in it, also where its owner has no right to.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let top = match openat(CWD, path, DIRECTORY, Mode::empty()) {
        Err(Errno::ACCESS) => {
            chmodat(CWD, path, Mode::RWXU, AtFlags::empty())?;
            openat(CWD, path, DIRECTORY, Mode::empty())?
        }
        result => result?,
    };
    remove_contents(top, &mut |_| ())?;
    std::fs::remove_dir(path)
}

/// Removes what is in a directory; `gone` hears of the inode of each directory that went.
pub(crate) fn remove_contents(top: OwnedFd, gone: &mut dyn FnMut(u64)) -> io::Result<()> {
    struct Removal<'a>(&'a mut dyn FnMut(u64));
    impl Visitor for Removal<'_> {
        fn entered(&mut self, directory: &OwnedFd, stat: &Stat) {
            // Where this fails, what needs the right says so.
            if !Mode::from_raw_mode(stat.st_mode).contains(Mode::RWXU) {
                let _ = fchmod(directory, Mode::RWXU);
            }
        }

        fn file(&mut self, place: &Place<'_>) -> io::Result<()> {
            unlink(place, AtFlags::empty())
        }

        fn complete(&mut self, _: &OwnedFd, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn left(&mut self, place: &Place<'_>, inode: u64) -> io::Result<()> {
            (self.0)(inode);
            unlink(place, AtFlags::REMOVEDIR)
        }
    }
    let inode = fstat(&top)?.st_ino;
    walk(top, inode, &mut Removal(gone))
}

fn unlink(place: &Place<'_>, flags: AtFlags) -> io::Result<()> {
    match unlinkat(place.directory.as_fd(), place.name, flags) {
        // Somebody else removes the same.
        Err(Errno::NOENT) => Ok(()),
        result => Ok(result?),
    }
}
