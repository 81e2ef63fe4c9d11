//! Members become files. What is created is created new, by name in its parent, following nothing.

use std::fs::File;
use std::hash::BuildHasher;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, Dev, FileType, Mode, OFlags, linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;

use super::root::Directory;
use super::{UnpackError, Unpacker, tree, whiteout};
use crate::tar::{Kind, Member, Walker, path};

impl Unpacker {
    /// Puts the member at hand in its place.
    pub(super) fn place<R: BufRead>(
        &mut self,
        walker: &mut Walker<R>,
        member: &Member,
    ) -> Result<(), UnpackError> {
        let cleaned = path::cleaned(member.path());
        if cleaned.is_empty() {
            return self.root_directory(member);
        }
        let (parent, name) = (path::parent(&cleaned).unwrap_or_default(), path::basename(&cleaned));
        if name.starts_with(whiteout::PREFIX) {
            return self.whiteout(parent, name, member);
        }
        let directories = &mut self.directories;
        let opened = self.root.open_or_create(parent, &mut |inode| {
            directories.insert(inode, super::Pending::default());
        });
        let parent = opened.map_err(|errno| UnpackError::io("open the parent of", &cleaned, errno))?;
        match member.kind() {
            Kind::Regular => self.regular(walker, &parent, name, member)?,
            Kind::Directory => self.directory(&parent, &cleaned, name, member)?,
            Kind::Symlink => {
                let link = || symlinkat(member.link(), &parent.fd, name);
                self.create(&parent, name, member, link)?;
                self.complete_special(&parent, name, member)?;
            }
            Kind::HardLink => self.hard_link(&parent, name, member)?,
            Kind::Fifo => {
                let make = || mknodat(&parent.fd, name, FileType::Fifo, Mode::RUSR, Dev::default());
                self.create(&parent, name, member, make)?;
                self.complete_special(&parent, name, member)?;
            }
            Kind::CharacterDevice => self.device(&parent, name, FileType::CharacterDevice, member)?,
            Kind::BlockDevice => self.device(&parent, name, FileType::BlockDevice, member)?,
            Kind::Other(_) => return Err(UnpackError::refused(member, "an unknown kind of file")),
            Kind::Global => unreachable!("global headers are no files"),
        }
        self.mark(parent.inode, name, member)
    }

    /// The root of the tree gets its attributes.
    fn root_directory(&mut self, member: &Member) -> Result<(), UnpackError> {
        if member.kind() != Kind::Directory {
            return Err(UnpackError::refused(member, "the root of the tree can be a directory only"));
        }
        let root = self.root.open(b"").map_err(|errno| UnpackError::io("open", b"", errno))?;
        let root = root.expect("the root is always there");
        self.complete_directory(&root, false, member)
    }

    /// Creates something, having removed what has its name.
    fn create<T>(
        &mut self,
        parent: &Directory,
        name: &[u8],
        member: &Member,
        create: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, UnpackError> {
        let created = match create() {
            Err(Errno::EXIST) => {
                self.remove(parent, name, member)?;
                create()
            }
            result => result,
        };
        created.map_err(|errno| UnpackError::io("create", member.path(), errno))
    }

    /// Removes whatever has that name.
    fn remove(&mut self, parent: &Directory, name: &[u8], member: &Member) -> Result<(), UnpackError> {
        let fail = |errno| UnpackError::io("replace", member.path(), errno);
        let stat = match statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            result => result.map_err(fail)?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                self.root.forget();
                let top = open_directory(parent, name).map_err(fail)?;
                let directories = &mut self.directories;
                let removed = tree::remove_contents(top, &mut |inode| {
                    directories.remove(&inode);
                });
                let path = path::printable(member.path());
                removed.map_err(|source| UnpackError::Io { what: "replace", path, source })?;
                self.directories.remove(&stat.st_ino);
                unlinkat(&parent.fd, name, AtFlags::REMOVEDIR).map_err(fail)
            }
            kind => {
                if kind == FileType::Symlink {
                    self.root.forget();
                }
                unlinkat(&parent.fd, name, AtFlags::empty()).map_err(fail)
            }
        }
    }

    fn regular<R: BufRead>(
        &mut self,
        walker: &mut Walker<R>,
        parent: &Directory,
        name: &[u8],
        member: &Member,
    ) -> Result<(), UnpackError> {
        if member.sparse().is_some() {
            self.holes = self.holes.saturating_add(member.size().saturating_sub(member.stored_size()));
            if self.holes > self.options.limits.holes {
                return Err(UnpackError::refused(member, "sparse files have more holes than are allowed"));
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            self.create(parent, name, member, || openat(&parent.fd, name, flags, Mode::RUSR | Mode::WUSR))?;
        let mut file = File::from(fd);
        let fail = |source| UnpackError::Io { what: "write", path: path::printable(member.path()), source };
        let mut expander = member.expander(&self.options.limits);
        let mut holey = Holey { file: &file, position: 0 };
        loop {
            let chunk = walker.next_chunk();
            let chunk = chunk.map_err(|source| UnpackError::tar(0, member, source))?;
            let Some(chunk) = chunk else { break };
            match &mut expander {
                None => (&file).write_all(chunk.data()).map_err(fail)?,
                Some(expander) => expander
                    .feed(chunk.data(), &mut |bytes| holey.write(bytes))
                    .map_err(|error| error.into_error(member))?,
            }
        }
        if let Some(expander) = expander {
            let finished = expander.finish(&mut |bytes| holey.write(bytes));
            finished.map_err(|error| error.into_error(member))?;
            file.set_len(member.size()).map_err(fail)?;
        }
        file.flush().map_err(fail)?;
        self.complete_file(&OwnedFd::from(file), member)
    }

    fn directory(
        &mut self,
        parent: &Directory,
        cleaned: &[u8],
        name: &[u8],
        member: &Member,
    ) -> Result<(), UnpackError> {
        let fail = |errno| UnpackError::io("create", member.path(), errno);
        let make = || mkdirat(&parent.fd, name, Mode::RWXU);
        let mut is_new = true;
        match make() {
            Err(Errno::EXIST) => {
                let stat = statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
                is_new = FileType::from_raw_mode(stat.st_mode) != FileType::Directory;
                if is_new {
                    self.remove(parent, name, member)?;
                    make().map_err(fail)?;
                }
            }
            result => result.map_err(fail)?,
        }
        let directory = open_directory(parent, name).and_then(Directory::new).map_err(fail)?;
        self.complete_directory(&directory, is_new, member)?;
        self.root.keep(cleaned, &directory);
        Ok(())
    }

    /// Another name for a file that is there: of this layer or a lower one, by a path that is resolved like every other.
    fn hard_link(
        &mut self,
        parent: &Arc<Directory>,
        name: &[u8],
        member: &Member,
    ) -> Result<(), UnpackError> {
        let target = path::cleaned(member.link());
        if target.is_empty() {
            return Err(UnpackError::refused(member, "a hard link to the root"));
        }
        let (directory, target_name) = (path::parent(&target).unwrap_or_default(), path::basename(&target));
        let fail = |errno| UnpackError::io("link to the target of", member.path(), errno);
        let missing = "a hard link to a file that is not there";
        let directory = self.root.open(directory).map_err(fail)?;
        let directory = directory.ok_or_else(|| UnpackError::refused(member, missing))?;
        let link = || linkat(&directory.fd, target_name, &parent.fd, name, AtFlags::empty());
        let linked = match link() {
            Err(Errno::EXIST) => {
                let find = |directory: &Directory, name: &[u8]| {
                    statat(&directory.fd, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| stat.st_ino)
                };
                if find(&directory, target_name).map_err(fail)? == find(parent, name).map_err(fail)? {
                    return Ok(());
                }
                self.remove(parent, name, member)?;
                link()
            }
            result => result,
        };
        match linked {
            Err(Errno::NOENT)
                if self.absent.contains(&(directory.inode, self.hasher.hash_one(target_name))) =>
            {
                self.leave_out_device(parent, name, member)
            }
            Err(Errno::NOENT) => Err(UnpackError::refused(member, missing)),
            Err(Errno::PERM) if is_directory(&directory, target_name) => {
                Err(UnpackError::refused(member, "a hard link to a directory"))
            }
            result => result.map_err(fail),
        }
    }

    fn device(
        &mut self,
        parent: &Directory,
        name: &[u8],
        kind: FileType,
        member: &Member,
    ) -> Result<(), UnpackError> {
        let (major, minor) = member.device();
        let (Ok(major), Ok(minor)) = (u32::try_from(major), u32::try_from(minor)) else {
            return Err(UnpackError::refused(member, "its device numbers are none"));
        };
        let make = || match self.options.owners && self.is_root_user {
            true => mknodat(&parent.fd, name, kind, Mode::RUSR, makedev(major, minor)),
            false => Err(Errno::PERM),
        };
        let made = match make() {
            Err(Errno::EXIST) => {
                self.remove(parent, name, member)?;
                mknodat(&parent.fd, name, kind, Mode::RUSR, makedev(major, minor))
            }
            result => result,
        };
        match made {
            Err(Errno::PERM) => self.leave_out_device(parent, name, member),
            result => {
                result.map_err(|errno| UnpackError::io("create", member.path(), errno))?;
                self.complete_special(parent, name, member)
            }
        }
    }

    /// There is to be a device that we may not make.
    fn leave_out_device(
        &mut self,
        parent: &Directory,
        name: &[u8],
        member: &Member,
    ) -> Result<(), UnpackError> {
        self.left_out.devices += 1;
        self.absent.insert((parent.inode, self.hasher.hash_one(name)));
        // What a lower layer has there is not what the image has.
        self.remove(parent, name, member)
    }

    /// The layer is complete, so nothing more is a link to what AUFS had parked.
    pub(super) fn remove_parked(&mut self) -> Result<(), UnpackError> {
        let root = self.root.open(b"").map_err(|errno| UnpackError::io("open", b"", errno))?;
        let root = root.expect("the root is always there");
        self.remove(&root, whiteout::PARKED, &Member::default())
    }
}

fn open_directory(parent: &Directory, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(&parent.fd, name, flags, Mode::empty())
}

fn is_directory(parent: &Directory, name: &[u8]) -> bool {
    let stat = statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW);
    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// A sparse file: zeros are not written.
struct Holey<'a> {
    file: &'a File,
    position: u64,
}

/// What goes wrong with one.
enum SparseError {
    Tar(crate::tar::TarError),
    Io(std::io::Error),
}

impl From<crate::tar::TarError> for SparseError {
    fn from(error: crate::tar::TarError) -> Self {
        Self::Tar(error)
    }
}

impl SparseError {
    fn into_error(self, member: &Member) -> UnpackError {
        match self {
            Self::Tar(source) => UnpackError::tar(0, member, source),
            Self::Io(source) => {
                UnpackError::Io { what: "write", path: path::printable(member.path()), source }
            }
        }
    }
}

impl Holey<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), SparseError> {
        if bytes.iter().any(|&byte| byte != 0) {
            self.file.write_all_at(bytes, self.position).map_err(SparseError::Io)?;
        }
        self.position += bytes.len() as u64;
        Ok(())
    }
}
