//! Layers to bytes and back: parallel gzip and zstd whose output depends on content and level only, and a decoder that
//! reads every gzip member and every zstd frame.
//!
//! - [`Compressor`] takes a layer's tar and gives compressed chunks in order; the work is done on a [`Pool`].
//! - [`Decoder`] is a [`Read`](std::io::Read) and [`BufRead`](std::io::BufRead) over stored bytes.
//! - [`deflate`] is our own encoder of raw deflate, which the gzip writer feeds block by block, and [`inflate`] our own decoder.
//!
//! Nothing here is async and nothing hashes but the checksums of the formats: callers run it on blocking threads and hash
//! what goes in and what comes out.

mod compressor;
mod decode;
pub mod deflate;
mod gzip;
pub mod inflate;
mod pool;
#[cfg(test)]
mod tests;
mod zstd;

use std::io;

pub use compressor::Compressor;
pub use decode::{Decoder, MAX_WINDOW_LOG};
pub use pool::Pool;

use crate::compression::Format;

/// Why bytes could not be compressed or decompressed.
///
/// A [`Decoder`] reports it inside an [`io::Error`], out of which [`CodecError::inside`] takes it again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The input ends within a member or frame.
    #[error("truncated {format}: the input ends at byte {compressed}, {uncompressed} bytes uncompressed")]
    Truncated {
        /// What was being read.
        format: Format,
        /// Bytes of input until the end.
        compressed: u64,
        /// Bytes that came out before.
        uncompressed: u64,
    },
    /// The input is not what its format allows, or a checksum is wrong.
    #[error("corrupt {format} near byte {compressed}, {uncompressed} bytes uncompressed: {reason}")]
    Corrupt {
        /// What was being read.
        format: Format,
        /// Where in the input, to within a buffer.
        compressed: u64,
        /// Bytes that came out before.
        uncompressed: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// After the last member or frame stand bytes that are neither another one nor zero padding.
    #[error(
        "garbage after the end of the {format} stream at byte {compressed}, {uncompressed} bytes uncompressed"
    )]
    Trailing {
        /// What was being read.
        format: Format,
        /// Where the garbage begins.
        compressed: u64,
        /// Bytes that came out before.
        uncompressed: u64,
    },
    /// More came out than the caller allows.
    #[error("more than {limit} bytes uncompressed, from the first {compressed} bytes of {format}")]
    TooLarge {
        /// What was being read.
        format: Format,
        /// The caller's limit in bytes.
        limit: u64,
        /// Bytes of input that were read so far.
        compressed: u64,
    },
    /// A zstd frame that needs more memory than we give to one layer.
    #[error("zstd frame at byte {compressed} needs a window of more than {} MiB", 1 << (max_log - 20))]
    Window {
        /// The largest window that is accepted, as a power of two.
        max_log: u32,
        /// Where in the input.
        compressed: u64,
    },
    /// The zstd library refused to compress.
    #[error("failed to compress with zstd: {0}")]
    Zstd(&'static str),
    /// A block's compression panicked; the panic's own message has been printed.
    #[error("a compression thread panicked")]
    Panicked,
}

impl CodecError {
    /// The codec's error that an I/O error carries, if it carries one.
    pub fn inside(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<CodecError> for io::Error {
    fn from(error: CodecError) -> Self {
        let kind = match &error {
            CodecError::Truncated { .. } => io::ErrorKind::UnexpectedEof,
            CodecError::Corrupt { .. } | CodecError::Trailing { .. } | CodecError::Window { .. } => {
                io::ErrorKind::InvalidData
            }
            CodecError::TooLarge { .. } => io::ErrorKind::FileTooLarge,
            CodecError::Zstd(_) | CodecError::Panicked => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
