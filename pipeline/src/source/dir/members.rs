//! The files of a directory that its documents may name: those below it, reached by no symbolic link.
//!
//! Documents may be anybody's. So a name is opened one component after the other, each below the one before it: what is not
//! of the directory is not even looked at, whatever changes in the meantime.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use super::python_config;
use crate::source::manifest_json::{MemberError, Members};
use crate::spool::FileRegion;

/// A directory, open.
pub(super) struct DirMembers {
    directory: OwnedFd,
    path: String,
}

impl DirMembers {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let directory = rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { directory, path: path.display().to_string() })
    }

    fn file(&self, name: &str) -> Result<File, MemberError> {
        let parts = parts(name)?;
        let (last, directories) = parts.split_last().ok_or(MemberError::Missing)?;
        let mut parent = None;
        for directory in directories {
            let at = parent.as_ref().unwrap_or(&self.directory);
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            parent = Some(openat(at, *directory, flags, Mode::empty()).map_err(refused)?);
        }
        let at = parent.as_ref().unwrap_or(&self.directory);
        // A pipe without a writer would hold up an open that may block.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(openat(at, *last, flags, Mode::empty()).map_err(refused)?);
        if file.metadata().map_err(MemberError::Io)?.is_file() {
            Ok(file)
        } else {
            Err(refused(Errno::NOTDIR))
        }
    }
}

impl Members for DirMembers {
    fn get(&self, name: &str) -> Result<FileRegion, MemberError> {
        let file = self.file(name)?;
        let size = file.metadata().map_err(MemberError::Io)?.len();
        Ok(FileRegion::new(Arc::new(file), format!("{}/{name}", self.path), 0, size))
    }

    fn is_rewritten(&self, config: &[u8]) -> bool {
        let is_rewritten = python_config::is_rewritten(config);
        if is_rewritten {
            tracing::warn!(
                "{}: the config was written anew by the Python occystrap: its own bytes and digest are lost",
                self.path
            );
        }
        is_rewritten
    }
}

/// The components of a name that stays below.
fn parts(name: &str) -> Result<Vec<&str>, MemberError> {
    const OUT: MemberError = MemberError::Unsafe("leads out of the directory");
    if name.starts_with('/') {
        return Err(OUT);
    }
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(OUT),
            // No file has such a name.
            part if part.contains('\0') => return Err(MemberError::Missing),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn refused(errno: Errno) -> MemberError {
    match errno {
        Errno::NOENT | Errno::NAMETOOLONG => MemberError::Missing,
        // What is no directory may be a link to one.
        Errno::LOOP | Errno::NOTDIR => {
            MemberError::Unsafe("is no regular file below the directory; symbolic links are not followed")
        }
        errno => MemberError::Io(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_name_leads_out_and_no_link_is_followed() {
        let outer = tempfile::tempdir().unwrap();
        std::fs::write(outer.path().join("secret"), "s").unwrap();
        let inner = outer.path().join("inner");
        std::fs::create_dir_all(inner.join("d")).unwrap();
        std::fs::write(inner.join("d/file"), "content").unwrap();
        symlink("d", inner.join("link")).unwrap();
        symlink("d/file", inner.join("alias")).unwrap();
        symlink("../secret", inner.join("out")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            inner.join("pipe"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        let members = DirMembers::open(&inner).unwrap();
        for name in ["d/file", "./d//file", "d/./file"] {
            assert_eq!(members.get(name).unwrap().read_small(100).unwrap(), b"content", "{name}");
        }
        let secret = outer.path().join("secret");
        for name in [
            "../secret",
            "d/../../secret",
            "d/../d/file",
            secret.to_str().unwrap(),
            "/",
            "..",
            "link/file",
            "alias",
            "out",
            "pipe",
            "d",
        ] {
            assert!(matches!(members.get(name), Err(MemberError::Unsafe(_))), "{name}");
        }
        for name in ["", ".", "missing", "d/missing", "a\0b", &"x".repeat(300)] {
            assert!(matches!(members.get(name), Err(MemberError::Missing)), "{name:?}");
        }
    }
}
