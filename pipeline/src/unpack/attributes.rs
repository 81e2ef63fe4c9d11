//! What a file has beside its contents: owner, mode, extended attributes, times. In that order: a change of owner takes
//! set-user-ID bits and capabilities away.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, fchmod, fchown, flistxattr,
    fremovexattr, fsetxattr, futimens, lsetxattr, utimensat,
};
use rustix::io::Errno;

use super::root::Directory;
use super::{MOST_ACLS, Pending, UnpackError, Unpacker};
use crate::tar::{Kind, Member, Time};

/// The key of an extended attribute in PAX records.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// The attribute of a directory that everything created in it gets.
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

impl Unpacker {
    /// Completes a regular file through its descriptor.
    pub(super) fn complete_file(&mut self, file: &OwnedFd, member: &Member) -> Result<(), UnpackError> {
        let fail = |what| move |errno| UnpackError::io(what, member.path(), errno);
        if let Some((user, group)) = self.owner(member)? {
            let changed = fchown(file, Some(user), Some(group));
            self.allow_owner(changed).map_err(fail("change the owner of"))?;
        }
        fchmod(file, permissions(member)).map_err(fail("change the mode of"))?;
        self.set_xattrs(member, |name, value| fsetxattr(file, name, value, XattrFlags::empty()))?;
        futimens(file, &times(member.mtime())).map_err(fail("set the time of"))
    }

    /// Gives a directory all but its time and default ACL, which wait until its contents are complete.
    pub(super) fn complete_directory(
        &mut self,
        directory: &Directory,
        is_new: bool,
        member: &Member,
    ) -> Result<(), UnpackError> {
        let fail = |what| move |errno| UnpackError::io(what, member.path(), errno);
        if let Some((user, group)) = self.owner(member)? {
            let changed = fchown(&directory.fd, Some(user), Some(group));
            self.allow_owner(changed).map_err(fail("change the owner of"))?;
        }
        let mode = permissions(member);
        let shuts_out = !self.is_root_user && !mode.contains(Mode::RWXU);
        let now = if shuts_out { mode | Mode::RWXU } else { mode };
        fchmod(&directory.fd, now).map_err(fail("change the mode of"))?;
        if !is_new {
            remove_xattrs(directory.fd.as_fd());
        }
        let mut default_acl = None;
        self.set_xattrs(member, |name, value| match name {
            DEFAULT_ACL => {
                default_acl = Some(value.into());
                Ok(())
            }
            name => fsetxattr(&directory.fd, name, value, XattrFlags::empty()),
        })?;
        let mode = shuts_out.then(|| mode.as_raw_mode());
        self.note_directory(directory.inode, Pending { mtime: member.mtime(), mode, default_acl }, member)
    }

    /// A directory is there now, for which something is pending.
    fn note_directory(&mut self, inode: u64, pending: Pending, member: &Member) -> Result<(), UnpackError> {
        self.default_acls += pending.default_acl.as_ref().map_or(0, |acl| acl.len());
        if self.default_acls > MOST_ACLS {
            return Err(UnpackError::refused(member, "the image has more default ACLs than are allowed"));
        }
        self.directories.insert(inode, pending);
        Ok(())
    }

    /// Completes a link, device or pipe by its name.
    pub(super) fn complete_special(
        &mut self,
        parent: &Directory,
        name: &[u8],
        member: &Member,
    ) -> Result<(), UnpackError> {
        let fail = |what| move |errno| UnpackError::io(what, member.path(), errno);
        if let Some((user, group)) = self.owner(member)? {
            let changed = chownat(&parent.fd, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW);
            self.allow_owner(changed).map_err(fail("change the owner of"))?;
        }
        if member.kind() != Kind::Symlink {
            let changed = chmodat(&parent.fd, name, permissions(member), AtFlags::empty());
            changed.map_err(fail("change the mode of"))?;
        }
        // There is no call that takes a directory and a name.
        let mut path = format!("/proc/self/fd/{}/", parent.fd.as_raw_fd()).into_bytes();
        path.extend_from_slice(name);
        self.set_xattrs(member, |name, value| lsetxattr(&path[..], name, value, XattrFlags::empty()))?;
        utimensat(&parent.fd, name, &times(member.mtime()), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(fail("set the time of"))
    }

    /// The owner that a member gets; None where it stays ours.
    fn owner(&mut self, member: &Member) -> Result<Option<(Uid, Gid)>, UnpackError> {
        let id = |id: i64| u32::try_from(id).ok().filter(|&id| id != u32::MAX);
        let (Some(user), Some(group)) = (id(member.uid()), id(member.gid())) else {
            return Err(UnpackError::refused(member, "its owner is no number that a user can have"));
        };
        if self.options.owners && self.is_root_user {
            return Ok(Some((Uid::from_raw(user), Gid::from_raw(group))));
        }
        let is_ours =
            user == rustix::process::geteuid().as_raw() && group == rustix::process::getegid().as_raw();
        self.left_out.owners += u64::from(!is_ours);
        Ok(None)
    }

    /// An owner that we may not give is left out.
    fn allow_owner(&mut self, changed: Result<(), Errno>) -> Result<(), Errno> {
        match changed {
            // EINVAL: an owner that the user namespace does not have.
            Err(Errno::PERM | Errno::INVAL) => {
                self.left_out.owners += 1;
                Ok(())
            }
            result => result,
        }
    }

    fn set_xattrs(
        &mut self,
        member: &Member,
        mut set: impl FnMut(&[u8], &[u8]) -> Result<(), Errno>,
    ) -> Result<(), UnpackError> {
        if member.records().is_empty() {
            return Ok(());
        }
        for (key, value) in member.records().iter() {
            let Some(name) = key.strip_prefix(XATTR) else { continue };
            if is_machines_own(name) {
                self.left_out.xattrs += 1;
                continue;
            }
            let is_set = allowed(set(name, value));
            let is_set = is_set
                .map_err(|errno| UnpackError::io("set an extended attribute of", member.path(), errno))?;
            self.left_out.xattrs += u64::from(!is_set);
        }
        Ok(())
    }
}

/// Whether an attribute was set, where it may be left out.
fn allowed(set: Result<(), Errno>) -> Result<bool, Errno> {
    match set {
        Ok(()) => Ok(true),
        // Not ours to set, or nothing that this file system or kind of file can have.
        Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Sets the default ACL of a directory that is complete; false where it has to be left out.
pub(super) fn set_default_acl(directory: &OwnedFd, acl: &[u8]) -> Result<bool, Errno> {
    allowed(fsetxattr(directory, DEFAULT_ACL, acl, XattrFlags::empty()))
}

/// Attributes that say something to the machine that unpacks: labels of its own policy, and what would make an overlay
/// file system hide or redirect files.
fn is_machines_own(name: &[u8]) -> bool {
    name == b"security.selinux" || name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// A directory of a lower layer keeps none of its attributes.
fn remove_xattrs(directory: BorrowedFd<'_>) {
    let mut names = vec![0; 64 * 1024];
    let Ok(length) = flistxattr(directory, &mut names[..]) else { return };
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        if !is_machines_own(name) {
            let _ = fremovexattr(directory, name);
        }
    }
}

fn permissions(member: &Member) -> Mode {
    Mode::from_raw_mode(member.mode() & 0o7777)
}

/// A modification time as the kernel takes it, and the same for the last access: a tree depends on its layers alone.
pub(super) fn times(time: Time) -> Timestamps {
    let time = Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}
