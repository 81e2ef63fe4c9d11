//! A disk that a test can fill: a file system in memory, mounted for it.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::certificates::text;
use crate::tools::run;

/// A file system of its own. It is unmounted with the value.
#[derive(Debug)]
pub struct SmallDisk {
    directory: TempDir,
}

impl SmallDisk {
    /// One with room for so many bytes; None, which is said, where this user may mount none.
    pub fn mount(bytes: u64, test: &str) -> Option<Self> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (size, path) = (format!("size={bytes}"), text(directory.path()));
        let mounted = run("mount", ["-t", "tmpfs", "-o", &size, "tmpfs", &path], b"");
        if !mounted.status.success() {
            eprintln!("NOT RUN: {test}: {}", String::from_utf8_lossy(&mounted.stderr).trim());
            return None;
        }
        Some(Self { directory })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Leaves no room on it.
    pub fn fill(&self) {
        let mut file = File::options().create(true).append(true).open(self.filler()).expect("a file");
        let piece = [0; 4096];
        loop {
            match file.write_all(&piece) {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
                    return;
                }
            }
        }
    }

    /// Leaves room for so many bytes on it.
    pub fn fill_but(&self, bytes: u64) {
        self.fill();
        let file = File::options().write(true).open(self.filler()).expect("it is there");
        let size = file.metadata().expect("a size").len();
        file.set_len(size - bytes).expect("a file can be cut");
    }

    /// Makes room again.
    pub fn free(&self) {
        std::fs::remove_file(self.filler()).expect("what was filled can be freed");
    }

    fn filler(&self) -> PathBuf {
        self.directory.path().join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Also where a process that a failed test leaves behind still has a file there.
        drop(run("umount", ["--lazy", &text(self.directory.path())], b""));
    }
}
