//! The root of a tree, and directories below it: no name leads out of it.
//!
//! Links are followed as a process would that has the tree for its root: an absolute one begins at the root, and `..` at
//! the root stays there. The kernel does that by `openat2` with `RESOLVE_IN_ROOT`. Where it cannot, because it is old or a
//! sandbox forbids the call, each component is opened by itself without following it, and links are read and resolved here.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, openat, openat2, readlinkat};
use rustix::io::Errno;

/// Directories that are kept open: the parents of what came last.
const KEPT: usize = 64;
/// As many links may lead to links as in the kernel.
const MOST_LINKS: usize = 40;
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The root of a tree.
#[derive(Debug)]
pub(super) struct Root {
    top: Arc<Directory>,
    openat2: bool,
    kept: HashMap<Vec<u8>, Arc<Directory>>,
}

/// A directory of the tree.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) fd: OwnedFd,
    pub(super) inode: u64,
}

impl Directory {
    pub(super) fn new(fd: OwnedFd) -> Result<Arc<Self>, Errno> {
        let inode = fstat(&fd)?.st_ino;
        Ok(Arc::new(Self { fd, inode }))
    }
}

impl Root {
    pub(super) fn open_at(path: &Path) -> Result<Self, Errno> {
        let top = Directory::new(openat(CWD, path, DIRECTORY, Mode::empty())?)?;
        let probe = openat2(&top.fd, ".", DIRECTORY, Mode::empty(), resolution());
        Ok(Self { top, openat2: probe.is_ok(), kept: HashMap::new() })
    }

    /// Resolves every name by itself, as where the kernel does not help.
    #[cfg(test)]
    pub(super) fn without_openat2(self) -> Self {
        Self { openat2: false, ..self }
    }

    pub(super) fn inode(&self) -> u64 {
        self.top.inode
    }

    /// Another descriptor of the root.
    pub(super) fn reopen(&self) -> Result<OwnedFd, Errno> {
        openat(&self.top.fd, ".", DIRECTORY, Mode::empty())
    }

    /// The directory at a cleaned path; None where there is nothing.
    pub(super) fn open(&mut self, path: &[u8]) -> Result<Option<Arc<Directory>>, Errno> {
        if path.is_empty() {
            return Ok(Some(Arc::clone(&self.top)));
        }
        if let Some(kept) = self.kept.get(path) {
            return Ok(Some(Arc::clone(kept)));
        }
        let found = match self.resolve(path) {
            // Too long for one call, or raced with renames elsewhere in the system.
            Err(Errno::NAMETOOLONG | Errno::AGAIN | Errno::NOSYS | Errno::PERM) => self.walk(path, None),
            Err(Errno::NOENT) => Ok(None),
            result => result.map(Some),
        }?;
        let Some(fd) = found else { return Ok(None) };
        let directory = Directory::new(fd)?;
        self.keep(path, &directory);
        Ok(Some(directory))
    }

    /// The same; what is missing is created, and `created` hears of each inode.
    pub(super) fn open_or_create(
        &mut self,
        path: &[u8],
        created: &mut dyn FnMut(u64),
    ) -> Result<Arc<Directory>, Errno> {
        if let Some(directory) = self.open(path)? {
            return Ok(directory);
        }
        let fd = self.walk(path, Some(created))?.ok_or(Errno::NOENT)?;
        let directory = Directory::new(fd)?;
        self.keep(path, &directory);
        Ok(directory)
    }

    /// Keeps a directory that is known to be at `path`.
    pub(super) fn keep(&mut self, path: &[u8], directory: &Arc<Directory>) {
        if self.kept.len() >= KEPT {
            self.kept.clear();
        }
        self.kept.insert(path.to_owned(), Arc::clone(directory));
    }

    /// A directory or link went: paths may lead elsewhere now.
    pub(super) fn forget(&mut self) {
        self.kept.clear();
    }

    fn resolve(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        if !self.openat2 {
            return Err(Errno::NOSYS);
        }
        openat2(&self.top.fd, path, DIRECTORY, Mode::empty(), resolution())
    }

    /// Goes component by component. One descriptor is held at a time, so depth costs nothing.
    fn walk(&self, path: &[u8], mut created: Option<&mut dyn FnMut(u64)>) -> Result<Option<OwnedFd>, Errno> {
        let mut pending: Vec<Vec<u8>> = components(path);
        let mut at = self.reopen()?;
        let mut depth = 0_usize;
        let mut links = 0;
        let step =
            |at: &OwnedFd, name: &[u8]| openat(at.as_fd(), name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
        while let Some(name) = pending.pop() {
            if name == b".." {
                if depth > 0 {
                    at = step(&at, b"..")?;
                    depth -= 1;
                }
                continue;
            }
            at = match step(&at, &name) {
                Ok(next) => next,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let target = match readlinkat(&at, &name[..], Vec::new()) {
                        Ok(target) => target.into_bytes(),
                        Err(Errno::INVAL) => return Err(Errno::NOTDIR),
                        Err(errno) => return Err(errno),
                    };
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(Errno::LOOP);
                    }
                    if target.starts_with(b"/") {
                        at = self.reopen()?;
                        depth = 0;
                    }
                    pending.extend(components(&target));
                    continue;
                }
                Err(Errno::NOENT) => {
                    let Some(created) = &mut created else { return Ok(None) };
                    mkdirat(&at, &name[..], Mode::from_raw_mode(0o755))?;
                    let next = step(&at, &name)?;
                    fchmod(&next, Mode::from_raw_mode(0o755))?;
                    created(fstat(&next)?.st_ino);
                    next
                }
                Err(errno) => return Err(errno),
            };
            depth += 1;
        }
        Ok(Some(at))
    }
}

fn resolution() -> ResolveFlags {
    ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS
}

/// The components of a path, the last one first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let components = path.split(|&byte| byte == b'/').rev();
    components.filter(|name| !name.is_empty() && *name != b".").map(<[u8]>::to_owned).collect()
}
