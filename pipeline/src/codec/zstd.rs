//! One zstd frame (RFC 8878), compressed by the library's own threads.
//!
//! What the library writes depends on how it cuts the input into jobs, so job size, window and overlap are fixed here, and
//! there is always at least one worker: without any, the library does not cut at all and writes other bytes.

use std::fmt;

use bytes::Bytes;
use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{self, CCtx, CParameter, InBuffer, OutBuffer};

use super::{CodecError, Pool};
use crate::blob::CHUNK;

/// How far back matches reach, as a power of two, and with it the input of one job: at the lower levels 1 MiB, so that a layer takes no
/// more than about 16 MiB of memory with two workers. RFC 8878 (3.1.1.1.2) asks every decoder for 8 MiB, which the highest levels use.
fn window_log(level: u8) -> u32 {
    match level {
        ..=9 => 20,
        10..=15 => 21,
        16.. => 23,
    }
}

/// Each job sees the last half window of the one before it.
const OVERLAP: u32 = 8;

/// More workers than this for one layer would cost more memory than they are worth.
const MAX_WORKERS: usize = 4;

/// Compresses one layer.
pub(super) struct ZstdWriter {
    context: CCtx<'static>,
    out: Vec<u8>,
}

impl ZstdWriter {
    pub(super) fn new(level: u8, pool: &Pool) -> Result<Self, CodecError> {
        let workers = pool.threads().clamp(1, MAX_WORKERS);
        let mut context = CCtx::try_create().ok_or(CodecError::Zstd("not enough memory"))?;
        for parameter in [
            CParameter::CompressionLevel(level.into()),
            CParameter::WindowLog(window_log(level)),
            CParameter::ChecksumFlag(true),
            CParameter::ContentSizeFlag(false),
            CParameter::NbWorkers(u32::try_from(workers).unwrap_or(1)),
            CParameter::JobSize(1 << window_log(level)),
            CParameter::OverlapSizeLog(OVERLAP),
        ] {
            context.set_parameter(parameter).map_err(refused)?;
        }
        Ok(Self { context, out: Vec::with_capacity(CHUNK) })
    }

    pub(super) fn write<E: From<CodecError>>(
        &mut self,
        bytes: &[u8],
        out: &mut dyn FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut input = InBuffer::around(bytes);
        while input.pos() < bytes.len() {
            self.step(&mut input, ZSTD_EndDirective::ZSTD_e_continue, out)?;
        }
        Ok(())
    }

    pub(super) fn finish<E: From<CodecError>>(
        mut self,
        out: &mut dyn FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut nothing = InBuffer::around(&[]);
        while self.step(&mut nothing, ZSTD_EndDirective::ZSTD_e_end, out)? > 0 {}
        if !self.out.is_empty() {
            out(self.out.into())?;
        }
        Ok(())
    }

    /// Lets the library take and give what it can, and says how much it still holds when it is to end.
    fn step<E: From<CodecError>>(
        &mut self,
        input: &mut InBuffer<'_>,
        directive: ZSTD_EndDirective,
        out: &mut dyn FnMut(Bytes) -> Result<(), E>,
    ) -> Result<usize, E> {
        let written = self.out.len();
        let mut output = OutBuffer::around_pos(&mut self.out, written);
        let held = self.context.compress_stream2(&mut output, input, directive).map_err(refused)?;
        if self.out.len() == self.out.capacity() {
            out(std::mem::replace(&mut self.out, Vec::with_capacity(CHUNK)).into())?;
        }
        Ok(held)
    }
}

impl fmt::Debug for ZstdWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZstdWriter").finish_non_exhaustive()
    }
}

fn refused(code: zstd_safe::ErrorCode) -> CodecError {
    CodecError::Zstd(zstd_safe::get_error_name(code))
}
