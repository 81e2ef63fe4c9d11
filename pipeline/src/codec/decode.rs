//! Reads stored bytes: all members of gzip (RFC 1952), all frames of zstd (RFC 8878), or a plain tar.
//!
//! Input that ends early, or goes on with anything but zero padding, is an error: a layer is never silently shorter than
//! what was stored.

use std::fmt;
use std::io::{self, BufRead, Read};

use flate2::{Crc, Decompress, FlushDecompress, Status};
use zstd::zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer};

use super::CodecError;
use crate::compression::Format;

/// The largest window of a zstd frame that is accepted, as a power of two: 128 MiB, the zstd tool's own default limit.
pub const MAX_WINDOW_LOG: u32 = 27;

/// How much is decompressed at a time, in bytes.
const BUFFER: usize = 256 * 1024;

/// Decompresses a layer.
///
/// Errors of its own are [`CodecError`]s inside [`io::Error`]s; errors of the reader pass through as they are. After an error,
/// every further read fails too or gives nothing.
pub struct Decoder<R> {
    input: Input<R>,
    state: State,
    /// Decompressed and not yet read: `out[start..end]`.
    out: Box<[u8]>,
    start: usize,
    end: usize,
    uncompressed: u64,
    limit: u64,
}

/// The reader, with the bytes that were taken to sniff its format put back.
struct Input<R> {
    reader: R,
    /// Bytes that stand before those of the reader.
    head: Vec<u8>,
    offset: u64,
}

enum State {
    /// The format is in the first bytes.
    Unknown,
    Plain,
    Gzip(Box<Gzip>),
    Zstd {
        context: DCtx<'static>,
        between_frames: bool,
    },
    End(Format),
    Failed(CodecError),
}

/// A gzip member.
struct Gzip {
    inflate: Decompress,
    crc: Crc,
    size: u32,
    at: Member,
}

enum Member {
    First,
    Body,
    Next,
}

impl<R: BufRead> Decoder<R> {
    /// Reads whichever format the first bytes are of.
    pub fn new(reader: R) -> Self {
        Self {
            input: Input { reader, head: Vec::new(), offset: 0 },
            state: State::Unknown,
            out: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            uncompressed: 0,
            limit: u64::MAX,
        }
    }

    /// Reads a known format; anything else is an error.
    pub fn with_format(reader: R, format: Format) -> io::Result<Self> {
        let mut decoder = Self::new(reader);
        decoder.state = State::new(format)?;
        Ok(decoder)
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
            State::Zstd { .. } => Format::Zstd,
            State::End(format) => *format,
            State::Failed(error) => return Err(error.clone().into()),
        })
    }

    /// Bytes of input that were used.
    pub fn compressed(&self) -> u64 {
        self.input.offset
    }

    /// Bytes that have come out, with those that are buffered.
    pub fn uncompressed(&self) -> u64 {
        self.uncompressed
    }

    /// Decompresses into the empty buffer. Leaves it empty at the end of the stream.
    fn refill(&mut self) -> io::Result<()> {
        self.format()?;
        let result = match &mut self.state {
            State::Unknown | State::End(_) => Ok(0),
            State::Plain => self.input.take(&mut self.out),
            State::Gzip(gzip) => gzip.read(&mut self.input, &mut self.out, self.uncompressed),
            State::Zstd { context, between_frames } => {
                read_zstd(context, between_frames, &mut self.input, &mut self.out, self.uncompressed)
            }
            State::Failed(error) => Err(error.clone().into()),
        };
        let format = self.format()?;
        let result = result.and_then(|read| {
            self.uncompressed += read as u64;
            if self.uncompressed > self.limit {
                let compressed = self.input.offset;
                return Err(CodecError::TooLarge { format, limit: self.limit, compressed }.into());
            }
            Ok(read)
        });
        match result {
            Ok(read) => {
                (self.start, self.end) = (0, read);
                if read == 0 {
                    self.state = State::End(format);
                }
                Ok(())
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
        if self.start == self.end {
            self.refill()?;
        }
        Ok(&self.out[self.start..self.end])
    }

    fn consume(&mut self, amount: usize) {
        self.start = self.end.min(self.start + amount);
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
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
            .field("compressed", &self.input.offset)
            .field("uncompressed", &self.uncompressed)
            .finish_non_exhaustive()
    }
}

impl State {
    fn new(format: Format) -> io::Result<Self> {
        Ok(match format {
            Format::None => Self::Plain,
            Format::Gzip => Self::Gzip(Box::new(Gzip {
                inflate: Decompress::new(false),
                crc: Crc::new(),
                size: 0,
                at: Member::First,
            })),
            Format::Zstd => {
                let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
                context
                    .set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))
                    .map_err(|code| io::Error::other(zstd_safe::get_error_name(code)))?;
                Self::Zstd { context, between_frames: true }
            }
        })
    }
}

impl<R: BufRead> Input<R> {
    fn fill(&mut self) -> io::Result<&[u8]> {
        if !self.head.is_empty() {
            return Ok(&self.head);
        }
        loop {
            match self.reader.fill_buf() {
                // Asked again, since a borrow cannot leave the loop on one branch only.
                Ok(_) => return self.reader.fill_buf(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn consume(&mut self, amount: usize) {
        if self.head.is_empty() {
            self.reader.consume(amount);
        } else {
            self.head.drain(..amount);
        }
        self.offset += amount as u64;
    }

    /// What the first four bytes say, which stay in the input.
    fn sniff(&mut self) -> io::Result<Format> {
        let mut start = Vec::with_capacity(4);
        while start.len() < 4 {
            let available = self.fill()?;
            if available.is_empty() {
                break;
            }
            let taken = available.len().min(4 - start.len());
            start.extend_from_slice(&available[..taken]);
            self.reader.consume(taken);
        }
        let format = Format::sniff(&start);
        self.head = start;
        Ok(format)
    }

    /// Copies what is at hand.
    fn take(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill()?;
        let taken = available.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&available[..taken]);
        self.consume(taken);
        Ok(taken)
    }

    /// The next byte of a header or trailer.
    fn byte(&mut self, format: Format, uncompressed: u64) -> io::Result<u8> {
        match self.fill()?.first() {
            Some(&byte) => {
                self.consume(1);
                Ok(byte)
            }
            None => Err(CodecError::Truncated { format, compressed: self.offset, uncompressed }.into()),
        }
    }

    fn bytes<const N: usize>(&mut self, format: Format, uncompressed: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            *byte = self.byte(format, uncompressed)?;
        }
        Ok(bytes)
    }

    fn corrupt(&self, format: Format, uncompressed: u64, reason: &'static str) -> io::Error {
        CodecError::Corrupt { format, compressed: self.offset, uncompressed, reason }.into()
    }
}

/// Flags of a gzip header (RFC 1952, 2.3.1).
const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;
const RESERVED: u8 = 0xe0;

impl Gzip {
    fn read<R: BufRead>(&mut self, input: &mut Input<R>, out: &mut [u8], before: u64) -> io::Result<usize> {
        loop {
            match self.at {
                Member::First => {
                    header(input, before)?;
                    self.at = Member::Body;
                }
                Member::Next => {
                    if !another_member(input, before)? {
                        return Ok(0);
                    }
                    header(input, before)?;
                    self.inflate.reset(false);
                    self.crc.reset();
                    self.size = 0;
                    self.at = Member::Body;
                }
                Member::Body => {
                    let read = self.body(input, out, before)?;
                    if read > 0 {
                        return Ok(read);
                    }
                }
            }
        }
    }

    /// Fills the buffer, or reads to the end of the member.
    fn body<R: BufRead>(&mut self, input: &mut Input<R>, out: &mut [u8], before: u64) -> io::Result<usize> {
        let mut filled = 0;
        let ended = loop {
            let available = input.fill()?;
            let (taken, given) = (self.inflate.total_in(), self.inflate.total_out());
            let status = self.inflate.decompress(available, &mut out[filled..], FlushDecompress::None);
            let taken = usize::try_from(self.inflate.total_in() - taken).unwrap_or(usize::MAX);
            let given = usize::try_from(self.inflate.total_out() - given).unwrap_or(usize::MAX);
            let starved = available.is_empty();
            input.consume(taken);
            filled += given;
            let uncompressed = before + filled as u64;
            match status {
                Ok(Status::StreamEnd) => break true,
                Ok(Status::Ok | Status::BufError) if filled == out.len() => break false,
                Ok(Status::Ok | Status::BufError) if starved && given == 0 => {
                    let compressed = input.offset;
                    return Err(
                        CodecError::Truncated { format: Format::Gzip, compressed, uncompressed }.into()
                    );
                }
                Ok(Status::Ok | Status::BufError) => {}
                Err(_) => return Err(input.corrupt(Format::Gzip, uncompressed, "invalid deflate data")),
            }
        };
        self.crc.update(&out[..filled]);
        // The trailer's size is modulo 2^32.
        self.size = self.size.wrapping_add(u32::try_from(filled).unwrap_or(u32::MAX));
        if ended {
            let uncompressed = before + filled as u64;
            let crc = u32::from_le_bytes(input.bytes(Format::Gzip, uncompressed)?);
            let size = u32::from_le_bytes(input.bytes(Format::Gzip, uncompressed)?);
            if crc != self.crc.sum() {
                return Err(input.corrupt(Format::Gzip, uncompressed, "the member's CRC does not match"));
            }
            if size != self.size {
                return Err(input.corrupt(Format::Gzip, uncompressed, "the member's size does not match"));
            }
            self.at = Member::Next;
        }
        Ok(filled)
    }
}

/// Reads a member's header.
fn header<R: BufRead>(input: &mut Input<R>, uncompressed: u64) -> io::Result<()> {
    let mut crc = Crc::new();
    let mut next = |input: &mut Input<R>| {
        let byte = input.byte(Format::Gzip, uncompressed)?;
        crc.update(&[byte]);
        Ok::<_, io::Error>(byte)
    };
    let mut fixed = [0; 10];
    for byte in &mut fixed {
        *byte = next(input)?;
    }
    let [0x1f, 0x8b, 8, flags, ..] = fixed else {
        return Err(input.corrupt(Format::Gzip, uncompressed, "not a gzip header"));
    };
    if flags & RESERVED != 0 {
        return Err(input.corrupt(Format::Gzip, uncompressed, "reserved flags in the gzip header"));
    }
    if flags & FEXTRA != 0 {
        let length = u16::from_le_bytes([next(input)?, next(input)?]);
        for _ in 0..length {
            next(input)?;
        }
    }
    for flag in [FNAME, FCOMMENT] {
        if flags & flag != 0 {
            while next(input)? != 0 {}
        }
    }
    if flags & FHCRC != 0 {
        let expected = crc.sum().to_le_bytes();
        if input.bytes::<2>(Format::Gzip, uncompressed)? != expected[..2] {
            return Err(input.corrupt(Format::Gzip, uncompressed, "the header's CRC does not match"));
        }
    }
    Ok(())
}

/// Whether another member follows, past any zero padding. Zeros after which something else comes are an error too.
fn another_member<R: BufRead>(input: &mut Input<R>, uncompressed: u64) -> io::Result<bool> {
    let end = input.offset;
    loop {
        let padded = input.offset > end;
        let available = input.fill()?;
        match available.iter().position(|&byte| byte != 0) {
            _ if available.is_empty() => return Ok(false),
            Some(0) if !padded && available[0] == 0x1f => return Ok(true),
            Some(_) => {
                return Err(
                    CodecError::Trailing { format: Format::Gzip, compressed: end, uncompressed }.into()
                );
            }
            None => {
                let zeros = available.len();
                input.consume(zeros);
            }
        }
    }
}

fn read_zstd<R: BufRead>(
    context: &mut DCtx<'_>,
    between_frames: &mut bool,
    input: &mut Input<R>,
    out: &mut [u8],
    before: u64,
) -> io::Result<usize> {
    let mut filled = 0;
    while filled < out.len() {
        let started = input.offset > 0;
        let available = input.fill()?;
        let starved = available.is_empty();
        if starved && *between_frames && started {
            break;
        }
        let mut source = InBuffer::around(available);
        let mut sink = OutBuffer::around_pos(out, filled);
        let result = context.decompress_stream(&mut sink, &mut source);
        let given = sink.pos() - filled;
        let taken = source.pos();
        filled += given;
        input.consume(taken);
        let uncompressed = before + filled as u64;
        let compressed = input.offset;
        match result {
            Ok(0) => *between_frames = true,
            Ok(_) if starved && given == 0 => {
                return Err(CodecError::Truncated { format: Format::Zstd, compressed, uncompressed }.into());
            }
            Ok(_) => *between_frames = false,
            Err(code)
                if zstd_safe::is_error_kind(
                    code,
                    ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge,
                ) =>
            {
                return Err(CodecError::Window { max_log: MAX_WINDOW_LOG, compressed }.into());
            }
            Err(code)
                if *between_frames
                    && compressed > 0
                    && zstd_safe::is_error_kind(code, ZSTD_ErrorCode::ZSTD_error_prefix_unknown) =>
            {
                return Err(CodecError::Trailing { format: Format::Zstd, compressed, uncompressed }.into());
            }
            Err(code) => {
                return Err(input.corrupt(Format::Zstd, uncompressed, zstd_safe::get_error_name(code)));
            }
        }
    }
    Ok(filled)
}
