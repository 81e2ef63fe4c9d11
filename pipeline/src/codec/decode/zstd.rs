//! Frames of zstd (RFC 8878), with skippable ones between them.

use std::io::{self, BufRead};

use zstd::zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer};

use super::input::Input;
use crate::codec::CodecError;
use crate::compression::Format;

/// The largest window of a frame that is accepted, as a power of two: 128 MiB, the zstd tool's own default limit.
pub const MAX_WINDOW_LOG: u32 = 27;

/// All frames, one after the other.
pub(super) struct Zstd {
    context: DCtx<'static>,
    /// Where the current frame begins, while there is one.
    frame: Option<u64>,
    /// Whether a frame has been read.
    is_read: bool,
}

impl Zstd {
    pub(super) fn new() -> io::Result<Self> {
        let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        context
            .set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))
            .map_err(|code| io::Error::other(zstd_safe::get_error_name(code)))?;
        Ok(Self { context, frame: None, is_read: false })
    }

    /// Fills the buffer as far as the frames go. `before` says how much came out before.
    pub(super) fn read<R: BufRead>(
        &mut self,
        input: &mut Input<R>,
        out: &mut [u8],
        before: u64,
    ) -> io::Result<usize> {
        let mut filled = 0;
        while filled < out.len() {
            let offset = input.offset();
            let available = input.fill()?;
            let is_end = available.is_empty();
            if is_end && self.is_read && self.frame.is_none() {
                break;
            }
            let start = *self.frame.get_or_insert(offset);
            let mut source = InBuffer::around(available);
            let mut sink = OutBuffer::around_pos(out, filled);
            let result = self.context.decompress_stream(&mut sink, &mut source);
            let given = sink.pos() - filled;
            let taken = source.pos();
            filled += given;
            input.consume(taken);
            let uncompressed = before + filled as u64;
            match result {
                Ok(0) => (self.frame, self.is_read) = (None, true),
                Ok(_) if is_end && given == 0 => return Err(input.truncated(Format::Zstd, uncompressed)),
                Ok(_) => {}
                Err(code) => return Err(self.explain(code, input, start, uncompressed)),
            }
        }
        Ok(filled)
    }

    fn explain<R>(&self, code: usize, input: &Input<R>, start: u64, uncompressed: u64) -> io::Error {
        let is = |kind| zstd_safe::is_error_kind(code, kind);
        if is(ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge) {
            CodecError::Window { max_log: MAX_WINDOW_LOG, compressed: start }.into()
        } else if is(ZSTD_ErrorCode::ZSTD_error_prefix_unknown) && self.is_read {
            CodecError::Trailing { format: Format::Zstd, compressed: start, uncompressed }.into()
        } else {
            input.corrupt(Format::Zstd, uncompressed, zstd_safe::get_error_name(code))
        }
    }
}
