//! Whiteouts (image-spec, `layer.md`): what a layer hides of those below it.
//!
//! They hide what lower layers put there, wherever in their own layer they stand, and nothing of that layer itself. So a
//! directory that is hidden stays as long as anything of the layer is in it.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, statat, unlinkat};
use rustix::io::Errno;

use super::tree::{self, Place, Visitor};
use super::{Pending, UnpackError, Unpacker};
use crate::tar::{Kind, Member, path};

/// What the names of whiteouts begin with.
pub(super) const PREFIX: &[u8] = b".wh.";
/// The name of one that hides all that is in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What names of the files begin with in which AUFS, an old storage of Docker's, kept its own books.
const BOOKS: &[u8] = b".wh..wh.";
/// AUFS's directory of files with several links: members behind them are hard links into it.
pub(super) const PARKED: &[u8] = b".wh..wh.plnk";

/// What a member is that the tree does not keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bookkeeping {
    /// Nothing that anybody needs.
    Dropped,
    /// A file that others of the layer are links to. It goes when the layer is complete.
    Parked,
}

/// Whether a member is of AUFS's books.
pub(super) fn bookkeeping(member: &Member) -> Option<Bookkeeping> {
    let is_book = |name: &[u8]| name.starts_with(BOOKS);
    // Nearly no path has any, which is seen without a copy.
    if !member.path().split(|&byte| byte == b'/').any(is_book) {
        return None;
    }
    let cleaned = path::cleaned(member.path());
    let (parent, name) = (path::parent(&cleaned).unwrap_or_default(), path::basename(&cleaned));
    if parent == PARKED && !name.starts_with(PREFIX) && member.kind() == Kind::Regular {
        return Some(Bookkeeping::Parked);
    }
    let is_in_books = parent.split(|&byte| byte == b'/').any(is_book);
    (is_in_books || is_book(name) && name != OPAQUE).then_some(Bookkeeping::Dropped)
}

impl Unpacker {
    /// Hides what a whiteout called `name` in the directory at `parent` says.
    pub(super) fn whiteout(
        &mut self,
        parent: &[u8],
        name: &[u8],
        member: &Member,
    ) -> Result<(), UnpackError> {
        let hidden = &name[PREFIX.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(UnpackError::refused(member, "a whiteout of nothing that a layer can have"));
        }
        if self.layers == 0 {
            return Ok(());
        }
        let directory = match self.root.open(parent) {
            Ok(Some(directory)) => directory,
            // What is not there need not be hidden.
            Ok(None) | Err(Errno::NOTDIR) => return Ok(()),
            Err(errno) => return Err(UnpackError::io("open", parent, errno)),
        };
        let fail = |source| UnpackError::Io {
            what: "hide",
            path: crate::tar::path::printable(member.path()),
            source,
        };
        self.root.forget();
        let mut hiding =
            Hiding { upper: &self.upper, hasher: &self.hasher, directories: &mut self.directories };
        if name == OPAQUE {
            let top = open(&directory.fd, b".").map_err(fail)?;
            return tree::walk(top, directory.inode, &mut hiding).map_err(fail);
        }
        let name = std::ffi::CString::new(hidden).expect("names in tars hold no NUL");
        let place = Place { directory: &directory.fd, inode: directory.inode, name: &name };
        match statat(&directory.fd, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(fail(errno.into())),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                let top = open(&directory.fd, hidden).map_err(fail)?;
                tree::walk(top, stat.st_ino, &mut hiding).map_err(fail)?;
                hiding.left(&place, stat.st_ino).map_err(fail)
            }
            Ok(_) => hiding.file(&place).map_err(fail),
        }
    }
}

fn open(at: &OwnedFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

/// Removes what the layer at hand has not put there.
struct Hiding<'a> {
    upper: &'a HashSet<(u64, u64)>,
    hasher: &'a RandomState,
    directories: &'a mut HashMap<u64, Pending>,
}

impl Hiding<'_> {
    fn is_upper(&self, place: &Place<'_>) -> bool {
        self.upper.contains(&(place.inode, self.hasher.hash_one(place.name.to_bytes())))
    }
}

impl Visitor for Hiding<'_> {
    fn file(&mut self, place: &Place<'_>) -> io::Result<()> {
        if self.is_upper(place) {
            return Ok(());
        }
        Ok(unlinkat(place.directory, place.name, AtFlags::empty())?)
    }

    fn complete(&mut self, _: &OwnedFd, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn left(&mut self, place: &Place<'_>, inode: u64) -> io::Result<()> {
        if self.is_upper(place) {
            return Ok(());
        }
        match unlinkat(place.directory, place.name, AtFlags::REMOVEDIR) {
            Ok(()) => {
                self.directories.remove(&inode);
                Ok(())
            }
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
