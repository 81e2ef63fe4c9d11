//! Tar archives as layers hold them: one raw reader, and the encoder of members that a filter has edited.
//!
//! - [`Walker`] reads a tar once, forward, and yields each [`Member`] with the raw bytes of all its header blocks and the
//!   metadata that they resolve to. It reads v7, ustar, PAX, GNU and star headers in any mixture.
//! - [`encode::header`] writes the headers of a member that was edited. A member that was not is copied raw.
//! - [`sparse::Expander`] turns the stored data of a sparse file into its contents.
//!
//! # One meaning, or an error
//! A tar that two readers read differently is an attack (CVE-2025-62518: a PAX size ignored by one of them hides files
//! from it). The walker follows Go's `archive/tar`, which container engines use, and Python's `tarfile`; where those two
//! would part, it refuses the archive: see [`TarError::Ambiguous`]. In particular:
//! - a PAX `size` is the member's, wherever it stands among the extension headers before it;
//! - links, directories, devices and fifos have no data, whatever size their headers claim;
//! - a GNU header whose atime and ctime fields hold text has a ustar prefix there (archives written by Go before 1.8).
//!
//! Names alone are Go's where Python's reading is a known defect: it takes a GNU header's atime for a prefix.
//!
//! # The end
//! Two zero blocks end an archive; so does one at the end of the input, and the end of the input where a header could
//! begin (as in Go and Python). One zero block with something else behind it is an error (as in Go). Everything after the
//! end is handed out as the tail: digests cover it. The last member's padding may be missing (as in Go).

pub mod encode;
mod error;
mod extension;
mod header;
mod input;
mod member;
mod number;
pub mod path;
mod pax;
mod resolve;
pub mod sparse;
mod sparse_header;
mod time;
mod walker;

pub use error::TarError;
pub use member::{Content, Kind, Member};
pub use pax::{InvalidRecords, Records};
pub use time::Time;
pub use walker::{Chunk, Walker};

/// The unit of a tar, in bytes.
pub const BLOCK: usize = 512;

pub(crate) static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// What an archive may demand of its reader.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Members, global headers included.
    pub members: u64,
    /// Bytes of one extension: PAX records, a GNU long name, the map of a sparse file. Go and libarchive stop at 1 MiB too.
    pub extension: u64,
    /// Bytes of a path or link target.
    pub path: usize,
    /// Bytes of holes written for the sparse files that became regular ones in one layer.
    pub holes: u64,
    /// Bytes kept aside for hard links whose target is removed, in one layer.
    pub kept: u64,
    /// Bytes that one filter may report or remember in one layer.
    pub report: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            members: 10_000_000,
            extension: 1024 * 1024,
            path: 64 * 1024,
            holes: 64 << 30,
            kept: 8 << 30,
            report: 64 * 1024 * 1024,
        }
    }
}

/// The number of bytes that follow `size` bytes of data up to the next block.
pub(crate) fn padding(size: u64) -> usize {
    const BLOCK_U64: u64 = BLOCK as u64;
    ((BLOCK_U64 - size % BLOCK_U64) % BLOCK_U64) as usize
}
