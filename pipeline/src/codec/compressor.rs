//! One layer's compressor, whichever the format.

use bytes::Bytes;

use super::gzip::GzipWriter;
use super::zstd::ZstdWriter;
use super::{CodecError, Pool};
use crate::compression::Compression;

/// Compresses one layer. Its output depends on the bytes written and the [`Compression`] only: not on the pool's threads,
/// and not on how the bytes were cut into writes.
///
/// For a blocking thread: [`write`](Self::write) waits while too many blocks are in flight, so that a layer holds some
/// 10 MiB at most. Dropped before [`finish`](Self::finish), it abandons what is queued.
#[derive(Debug)]
pub struct Compressor(Writer);

#[derive(Debug)]
enum Writer {
    Gzip(GzipWriter),
    Zstd(ZstdWriter),
}

impl Compressor {
    /// A compressor that works on the threads of `pool`.
    pub fn new(compression: Compression, pool: &Pool) -> Result<Self, CodecError> {
        Ok(Self(match compression {
            Compression::Gzip { level } => Writer::Gzip(GzipWriter::new(level, pool)),
            Compression::Zstd { level } => Writer::Zstd(ZstdWriter::new(level, pool)?),
        }))
    }

    /// Takes the next bytes, and calls `out` with compressed chunks, in order, as far as they are ready.
    ///
    /// After an error, the compressor's own or `out`'s, nothing more may be asked of it.
    pub fn write<E: From<CodecError>>(
        &mut self,
        bytes: &[u8],
        out: &mut dyn FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        match &mut self.0 {
            Writer::Gzip(writer) => writer.write(bytes, out),
            Writer::Zstd(writer) => writer.write(bytes, out),
        }
    }

    /// Says that all bytes have been written, and calls `out` with what remains.
    pub fn finish<E: From<CodecError>>(self, out: &mut dyn FnMut(Bytes) -> Result<(), E>) -> Result<(), E> {
        match self.0 {
            Writer::Gzip(writer) => writer.finish(out),
            Writer::Zstd(writer) => writer.finish(out),
        }
    }
}
