//! Small files of a tree, read as a process would read them whose root it is.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;

use super::root::Root;

/// As many links may lead to links as in the kernel.
const MOST_LINKS: usize = 40;

/// What the file at `file` in the tree at `root` holds, at most `cap` bytes; None where there is none. Links are followed
/// inside the tree only.
pub(crate) fn read_in_root(root: &Path, file: &[u8], cap: u64) -> io::Result<Option<Vec<u8>>> {
    let mut root = Root::open_at(root)?;
    let mut at = file.to_owned();
    for _ in 0..=MOST_LINKS {
        // Only the last component is resolved here; `..` before it is the parent's business.
        let (parent, name) = match at.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => at.split_at(slash),
            None => (&b""[..], &at[..]),
        };
        let name = name.strip_prefix(b"/").unwrap_or(name);
        let directory = match root.open(parent) {
            Ok(Some(directory)) => directory,
            Ok(None) | Err(Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // A pipe must not make us wait for its other end.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match openat(&directory.fd, name, flags, Mode::empty()) {
            Ok(fd) => {
                let file = File::from(fd);
                if !file.metadata()?.is_file() {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
                }
                let mut bytes = Vec::new();
                file.take(cap + 1).read_to_end(&mut bytes)?;
                if bytes.len() as u64 > cap {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
                return Ok(Some(bytes));
            }
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => {
                let target = readlinkat(&directory.fd, name, Vec::new())?.into_bytes();
                at = if target.starts_with(b"/") { target } else { [parent, b"/", &target].concat() };
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Errno::LOOP.into())
}
