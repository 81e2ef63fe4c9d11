//! Why a layer could not be unpacked.

use std::io;

use rustix::io::Errno;

use crate::tar::{Member, TarError, path};

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The tar is corrupt, hostile or incomplete, or its bytes did not come.
    #[error("{source} (member {member}, near {path})")]
    Tar {
        /// How many members were read before.
        member: u64,
        /// The path of that member or the one before.
        path: String,
        /// What is wrong, and at which offset.
        source: TarError,
    },
    /// A member that no tree can have.
    #[error("cannot unpack {path:?} (at offset {offset}): {reason}")]
    Refused {
        /// The member's, as written.
        path: String,
        /// In the tar.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The operating system said no.
    #[error("failed to {what} {path:?} in the tree: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file, from the root of the tree.
        path: String,
        /// Its answer.
        source: io::Error,
    },
}

impl UnpackError {
    pub(super) fn tar(member: u64, near: &Member, source: TarError) -> Self {
        Self::Tar { member, path: path::printable(near.path()), source }
    }

    pub(super) fn refused(member: &Member, reason: &'static str) -> Self {
        Self::Refused { path: path::printable(member.path()), offset: member.offset(), reason }
    }

    pub(super) fn io(what: &'static str, at: &[u8], errno: Errno) -> Self {
        Self::Io { what, path: format!("/{}", path::printable(at)), source: errno.into() }
    }

    /// Whether this machine is at fault rather than the layer: a disk, a right that is missing.
    pub fn is_machine(&self) -> bool {
        match self {
            Self::Tar { .. } | Self::Refused { .. } => false,
            // Loops, files where directories should be, and names that are too long are the layer's own.
            Self::Io { source, .. } => {
                !matches!(
                    source.kind(),
                    io::ErrorKind::NotADirectory | io::ErrorKind::NotFound | io::ErrorKind::InvalidFilename
                ) && source.raw_os_error() != Some(Errno::LOOP.raw_os_error())
            }
        }
    }
}
