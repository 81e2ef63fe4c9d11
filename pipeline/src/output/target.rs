//! Where one tar goes: into a file that gets its name when it is whole, or into what can only be written from front to back.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::OutputError;
use super::staging::fail;
use crate::atomic::UnnamedFile;
use crate::spool::SpoolDir;

#[derive(Debug)]
pub(super) enum Target {
    /// A regular file that has no name yet.
    File(UnnamedFile),
    /// Something that can only be written from front to back.
    Stream(File),
}

impl Target {
    /// The tar at `path`, or on standard output when that is `-`, and where what waits for its turn is kept: beside a file, else in
    /// `spools`. Opening a pipe waits for its reader.
    pub(super) fn open(path: &Path, spools: &SpoolDir) -> Result<(Self, SpoolDir), OutputError> {
        let fail = |what| fail(what, &shown(path));
        if path == Path::new("-") {
            let stdout = rustix::io::dup(io::stdout()).map_err(|errno| fail("write to")(errno.into()))?;
            return Ok((Self::Stream(stdout.into()), spools.clone()));
        }
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Err(fail("write to")(io::ErrorKind::IsADirectory.into())),
            Ok(metadata) if !metadata.is_file() => {
                let file = File::options().write(true).open(path).map_err(fail("open"))?;
                Ok((Self::Stream(file), spools.clone()))
            }
            _ => {
                let file = UnnamedFile::create(path).map_err(fail("create"))?;
                let spools = spools.at(file.directory());
                Ok((Self::File(file), spools))
            }
        }
    }
}

/// The path of a tar as messages have it.
pub(super) fn shown(path: &Path) -> PathBuf {
    if path == Path::new("-") { PathBuf::from("standard output") } else { path.to_owned() }
}
