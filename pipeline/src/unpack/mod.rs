//! From layers to a tree of files: image-spec's `layer.md`, with nothing that a tar says able to leave the tree.
//!
//! - [`Unpacker::apply`] takes one layer after the other, the lowest first, each in one pass over its tar.
//! - Every parent is resolved below the root by the kernel (`openat2`), or by a walk without links where that is refused
//!   ([`root`]); what a member creates, it creates new, by name in that parent, following nothing.
//! - Whiteouts hide what lower layers put there, wherever in their layer they stand ([`whiteout`]). What AUFS kept its own
//!   books in is no part of the tree.
//! - Owners, modes, extended attributes and times are [`attributes`]. The times of directories are set at the very end.
//!
//! The tree belongs to the unpacker alone while it works: it must be in a directory that nobody else writes to. Without
//! the rights for it, devices, owners and some extended attributes are left out and counted ([`LeftOut`]).
//!
//! All of this computes and waits for the disk: it belongs on a blocking thread.

mod attributes;
mod error;
mod place;
mod root;
mod small;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod tree;
mod whiteout;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

pub use self::error::UnpackError;
use self::root::Root;
pub(crate) use self::small::read_in_root;
use self::whiteout::Bookkeeping;
use crate::blob::CHUNK;
use crate::tar::{Limits, Member, Time, Walker};

/// Entries that have to be remembered at once, so that a layer of nothing but names cannot take all memory.
const MOST_ENTRIES: usize = 4_000_000;

/// Bytes of default ACLs that are remembered at once.
const MOST_ACLS: usize = 64 * 1024 * 1024;

/// How a tree is unpacked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Give files the owners that the layers say, as far as this process may, and make devices. Without it everything
    /// belongs to the user that unpacks.
    pub owners: bool,
    /// What a tar may demand.
    pub limits: Limits,
}

/// A tree that layers are unpacked into.
pub struct Unpacker {
    root: Root,
    options: Options,
    is_root_user: bool,
    /// Layers that were applied before.
    layers: usize,
    /// What the layer at hand has put where: the directory's inode and a hash of the name. Not kept for the lowest layer,
    /// below which there is nothing to hide.
    upper: HashSet<(u64, u64)>,
    hasher: RandomState,
    /// What every directory gets when its contents are complete, by inode.
    directories: HashMap<u64, Pending>,
    /// Where devices were left out, as in `upper`: more links to them are left out as well.
    absent: HashSet<(u64, u64)>,
    /// Bytes of default ACLs that wait for the end.
    default_acls: usize,
    /// Bytes of holes in sparse files so far.
    holes: u64,
    left_out: LeftOut,
}

/// What a directory gets at the end.
#[derive(Clone, Debug, Default)]
struct Pending {
    mtime: Time,
    /// Where it would have kept us from writing into it.
    mode: Option<u32>,
    /// What the kernel would have given to everything that was created in it.
    default_acl: Option<Box<[u8]>>,
}

/// What could not be unpacked for want of rights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Device files, and more links to them.
    pub devices: u64,
    /// Files that belong to another user or group than the layer says.
    pub owners: u64,
    /// Extended attributes, those included that would command the machine's own overlay file systems.
    pub xattrs: u64,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { devices, owners, xattrs } = self;
        write!(f, "{devices} devices, the owners of {owners} files, {xattrs} extended attributes")
    }
}

impl LeftOut {
    /// Whether anything was.
    pub fn is_some(&self) -> bool {
        *self != Self::default()
    }
}

impl Unpacker {
    /// Unpacks into the directory at `path`, which must exist and be empty.
    pub fn new(path: &Path, options: Options) -> Result<Self, UnpackError> {
        let fail = |errno| UnpackError::io("open", b"", errno);
        Self::in_root(Root::open_at(path).map_err(fail)?, options)
    }

    fn in_root(root: Root, options: Options) -> Result<Self, UnpackError> {
        let directories = [(root.inode(), Pending::default())].into();
        Ok(Self {
            root,
            options,
            is_root_user: rustix::process::geteuid().is_root(),
            layers: 0,
            upper: HashSet::new(),
            hasher: RandomState::new(),
            directories,
            absent: HashSet::new(),
            default_acls: 0,
            holes: 0,
            left_out: LeftOut::default(),
        })
    }

    /// Applies the next layer. After an error the tree is void.
    pub fn apply(&mut self, tar: impl Read) -> Result<(), UnpackError> {
        let mut walker = Walker::unhashed(BufReader::with_capacity(CHUNK, tar), self.options.limits.clone());
        let mut member = Member::default();
        self.upper.clear();
        let mut has_parked = false;
        loop {
            let more = walker.read_member(&mut member);
            let more = more.map_err(|source| UnpackError::tar(walker.members(), &member, source))?;
            if !more {
                break;
            }
            if member.is_global() {
                continue;
            }
            match whiteout::bookkeeping(&member) {
                Some(Bookkeeping::Dropped) => {}
                Some(Bookkeeping::Parked) => {
                    self.place(&mut walker, &member)?;
                    has_parked = true;
                }
                None => self.place(&mut walker, &member)?,
            }
        }
        if has_parked {
            self.remove_parked()?;
        }
        // The digest covers what is behind the end of the archive, and whoever computes it waits for us to read it.
        while walker.next_tail().map_err(|source| UnpackError::tar(0, &Member::default(), source))?.is_some()
        {
        }
        self.layers += 1;
        Ok(())
    }

    /// All layers are applied: completes the directories, and says what is missing.
    pub fn finish(mut self) -> Result<LeftOut, UnpackError> {
        let top = self.root.reopen().map_err(|errno| UnpackError::io("open", b"", errno))?;
        let mut completion = Completion { directories: &self.directories, left_out: &mut self.left_out };
        let fail = |source| UnpackError::Io { what: "complete", path: "/".to_owned(), source };
        tree::walk(top, self.root.inode(), &mut completion).map_err(fail)?;
        let top = self.root.reopen().map_err(|errno| UnpackError::io("open", b"", errno))?;
        completion.complete(&top, self.root.inode()).map_err(fail)?;
        Ok(self.left_out)
    }

    /// Remembers that this layer has put something there.
    fn mark(&mut self, directory: u64, name: &[u8], member: &Member) -> Result<(), UnpackError> {
        if self.layers > 0 {
            self.upper.insert((directory, self.hasher.hash_one(name)));
        }
        if self.upper.len() + self.directories.len() + self.absent.len() > MOST_ENTRIES {
            return Err(UnpackError::refused(member, "the layer has more entries than are allowed"));
        }
        Ok(())
    }
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").field("layers", &self.layers).finish_non_exhaustive()
    }
}

/// Sets what directories could not have while they were written to.
struct Completion<'a> {
    directories: &'a HashMap<u64, Pending>,
    left_out: &'a mut LeftOut,
}

impl Completion<'_> {
    fn complete(&mut self, directory: &OwnedFd, inode: u64) -> std::io::Result<()> {
        let Some(pending) = self.directories.get(&inode) else { return Ok(()) };
        if let Some(acl) = &pending.default_acl
            && !attributes::set_default_acl(directory, acl)?
        {
            self.left_out.xattrs += 1;
        }
        rustix::fs::futimens(directory, &attributes::times(pending.mtime))?;
        if let Some(mode) = pending.mode {
            rustix::fs::fchmod(directory, mode.into())?;
        }
        Ok(())
    }
}

impl tree::Visitor for Completion<'_> {
    fn file(&mut self, _: &tree::Place<'_>) -> std::io::Result<()> {
        Ok(())
    }

    fn complete(&mut self, directory: &OwnedFd, inode: u64) -> std::io::Result<()> {
        Self::complete(self, directory, inode)
    }

    fn left(&mut self, _: &tree::Place<'_>, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}
