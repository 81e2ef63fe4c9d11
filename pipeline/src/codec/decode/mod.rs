//! Reads stored bytes: all members of gzip (RFC 1952), all frames of zstd (RFC 8878), or a plain tar.
//!
//! Input that ends early, or goes on with anything but zero padding, is an error: a layer is never silently shorter than
//! what was stored.

mod gzip;
mod input;
#[cfg(test)]
mod tests;
mod zstd;

use std::fmt;
use std::io::{self, BufRead, Read};
use std::mem;

use gzip::Gzip;
use input::Input;
pub use zstd::MAX_WINDOW_LOG;
use zstd::Zstd;

use super::CodecError;
use crate::compression::Format;

/// How much is decompressed at a time, in bytes.
const BUFFER: usize = 128 * 1024;

/// Buffers of readers that are at least so large are decompressed into directly.
const DIRECT: usize = 16 * 1024;

/// Decompresses a layer.
///
/// Errors of its own are [`CodecError`]s inside [`io::Error`]s; errors of the reader pass through as they are. After an error of
/// its own, every further read fails with it again.
pub struct Decoder<R> {
    input: Input<R>,
    state: State,
    /// Decompressed and not yet read: `out[start..end]`, but for gzip, which has a buffer of its own. Made when it is first needed.
    out: Box<[u8]>,
    start: usize,
    end: usize,
    uncompressed: u64,
    limit: u64,
}

enum State {
    /// The format is in the first bytes.
    Unknown,
    Plain,
    Gzip(Box<Gzip>),
    Zstd(Zstd),
    Ended(Format),
    Failed(CodecError),
}

impl<R: BufRead> Decoder<R> {
    /// Reads whichever format the first bytes are of.
    pub fn new(reader: R) -> Self {
        Self {
            input: Input::new(reader),
            state: State::Unknown,
            out: Box::default(),
            start: 0,
            end: 0,
            uncompressed: 0,
            limit: u64::MAX,
        }
    }

    /// Reads a known format; anything else is an error.
    pub fn with_format(reader: R, format: Format) -> io::Result<Self> {
        Ok(Self { state: State::new(format)?, ..Self::new(reader) })
    }

    /// Fails once more than this many bytes have come out.
    #[must_use]
    pub fn limit(mut self, bytes: u64) -> Self {
        self.limit = bytes;
        self
    }

    /// The format that is being read, for which it may have to read the first bytes.
    pub fn format(&mut self) -> io::Result<Format> {
        if let State::Unknown = self.state {
            self.state = State::new(self.input.sniff()?)?;
        }
        Ok(match &self.state {
            State::Plain | State::Unknown => Format::None,
            State::Gzip(_) => Format::Gzip,
            State::Zstd(_) => Format::Zstd,
            State::Ended(format) => *format,
            State::Failed(error) => return Err(error.clone().into()),
        })
    }

    /// Bytes of input that were used.
    pub fn compressed(&self) -> u64 {
        self.input.offset()
    }

    /// Bytes that have come out, with those that are buffered.
    pub fn uncompressed(&self) -> u64 {
        self.uncompressed
    }

    /// What is decompressed and not yet read.
    fn unread(&self) -> &[u8] {
        match &self.state {
            State::Gzip(gzip) => gzip.unread(),
            _ => &self.out[self.start..self.end],
        }
    }

    /// Decompresses into the empty buffer, and leaves it empty at the end of the stream.
    fn refill(&mut self) -> io::Result<()> {
        if self.format()? == Format::Gzip {
            return self.decompress(&mut []).map(drop);
        }
        if self.out.is_empty() {
            self.out = vec![0; BUFFER].into_boxed_slice();
        }
        let mut out = mem::take(&mut self.out);
        let result = self.decompress(&mut out);
        self.out = out;
        (self.start, self.end) = (0, result?);
        Ok(())
    }

    /// Decompresses what comes next, nothing at the end of the stream. Gzip decompresses into its own buffer.
    fn decompress(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let format = self.format()?;
        let (input, before) = (&mut self.input, self.uncompressed);
        let result = match &mut self.state {
            State::Plain => input.take(out),
            State::Gzip(gzip) => gzip.fill(input, before),
            State::Zstd(zstd) => zstd.read(input, out, before),
            State::Unknown | State::Ended(_) | State::Failed(_) => Ok(0),
        };
        let result = result.and_then(|read| {
            self.uncompressed += read as u64;
            if self.uncompressed > self.limit {
                let compressed = self.input.offset();
                return Err(CodecError::TooLarge { format, limit: self.limit, compressed }.into());
            }
            Ok(read)
        });
        match result {
            Ok(read) => {
                if read == 0 {
                    self.state = State::Ended(format);
                }
                Ok(read)
            }
            Err(error) => {
                if let Some(error) = CodecError::inside(&error) {
                    self.state = State::Failed(error.clone());
                }
                Err(error)
            }
        }
    }
}

impl<R: BufRead> BufRead for Decoder<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.unread().is_empty() {
            self.refill()?;
        }
        Ok(self.unread())
    }

    fn consume(&mut self, amount: usize) {
        match &mut self.state {
            State::Gzip(gzip) => gzip.consume(amount),
            _ => self.start = self.end.min(self.start + amount),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if buffer.len() >= DIRECT && self.unread().is_empty() && self.format()? != Format::Gzip {
            return self.decompress(buffer);
        }
        let available = self.fill_buf()?;
        let read = available.len().min(buffer.len());
        buffer[..read].copy_from_slice(&available[..read]);
        self.consume(read);
        Ok(read)
    }
}

impl<R> fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("compressed", &self.input.offset())
            .field("uncompressed", &self.uncompressed)
            .finish_non_exhaustive()
    }
}

impl State {
    fn new(format: Format) -> io::Result<Self> {
        Ok(match format {
            Format::None => Self::Plain,
            Format::Gzip => Self::Gzip(Box::new(Gzip::new())),
            Format::Zstd => Self::Zstd(Zstd::new()?),
        })
    }
}
