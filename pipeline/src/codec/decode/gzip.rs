//! Members of gzip (RFC 1952).

use std::io::{self, BufRead};

use flate2::Crc;

use super::input::Input;
use crate::codec::CodecError;
use crate::codec::inflate::{Inflate, Invalid, Status};
use crate::compression::Format;

/// Flags of a header (RFC 1952, 2.3.1).
const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;
const RESERVED: u8 = 0xe0;

/// All members, one after the other.
pub(super) struct Gzip {
    inflate: Inflate,
    /// How much of what came out is in the checksum and may be read, in bytes.
    ready: usize,
    /// Of the member so far.
    crc: Crc,
    /// Of the member so far, modulo 2^32.
    size: u32,
    at: Place,
}

enum Place {
    FirstHeader,
    Body,
    AfterMember,
}

impl Gzip {
    pub(super) fn new() -> Self {
        Self { inflate: Inflate::new(), ready: 0, crc: Crc::new(), size: 0, at: Place::FirstHeader }
    }

    /// What has come out and is not read yet.
    pub(super) fn unread(&self) -> &[u8] {
        &self.inflate.unread()[..self.ready]
    }

    pub(super) fn consume(&mut self, amount: usize) {
        let amount = amount.min(self.ready);
        self.inflate.consume(amount);
        self.ready -= amount;
    }

    /// Decompresses, once everything is read, what comes next in a member, as much as there is room for, and says how much that
    /// is: nothing at the end of the last member. `before` says how much came out before.
    pub(super) fn fill<R: BufRead>(&mut self, input: &mut Input<R>, before: u64) -> io::Result<usize> {
        loop {
            match self.at {
                Place::FirstHeader => read_header(input, before)?,
                Place::AfterMember => {
                    if !is_followed_by_member(input, before)? {
                        return Ok(0);
                    }
                    read_header(input, before)?;
                    self.inflate.restart();
                    self.crc.reset();
                    self.size = 0;
                }
                Place::Body => {}
            }
            self.at = Place::Body;
            let filled = self.read_body(input, before)?;
            if filled > 0 {
                return Ok(filled);
            }
        }
    }

    fn read_body<R: BufRead>(&mut self, input: &mut Input<R>, before: u64) -> io::Result<usize> {
        let ended = loop {
            let available = input.fill()?;
            let is_end = available.is_empty();
            let (used, status) = self.inflate.inflate(available);
            input.consume(used);
            let uncompressed = before + self.inflate.unread().len() as u64;
            match status {
                Ok(Status::Ended) => break true,
                Ok(Status::Full) => break false,
                Ok(Status::NeedsInput) if is_end => return Err(input.truncated(Format::Gzip, uncompressed)),
                Ok(Status::NeedsInput) => {}
                Err(Invalid) => {
                    return Err(input.corrupt(Format::Gzip, uncompressed, "invalid deflate data"));
                }
            }
        };
        let out = self.inflate.unread();
        let filled = out.len();
        self.crc.update(out);
        self.size = self.size.wrapping_add(u32::try_from(filled).unwrap_or(u32::MAX));
        if ended {
            self.read_trailer(input, before + filled as u64)?;
            self.at = Place::AfterMember;
        }
        self.ready = filled;
        Ok(filled)
    }

    fn read_trailer<R: BufRead>(&self, input: &mut Input<R>, uncompressed: u64) -> io::Result<()> {
        let crc = u32::from_le_bytes(input.bytes(Format::Gzip, uncompressed)?);
        let size = u32::from_le_bytes(input.bytes(Format::Gzip, uncompressed)?);
        if crc != self.crc.sum() {
            return Err(input.corrupt(Format::Gzip, uncompressed, "the member's CRC does not match"));
        }
        if size != self.size {
            return Err(input.corrupt(Format::Gzip, uncompressed, "the member's size does not match"));
        }
        Ok(())
    }
}

/// Reads a member's header, all of whose fields are of no interest.
fn read_header<R: BufRead>(input: &mut Input<R>, uncompressed: u64) -> io::Result<()> {
    let mut crc = Crc::new();
    let mut next = |input: &mut Input<R>| {
        let [byte] = input.bytes(Format::Gzip, uncompressed)?;
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

/// Whether another member follows. Zero padding up to the end is read past; anything else is an error.
fn is_followed_by_member<R: BufRead>(input: &mut Input<R>, uncompressed: u64) -> io::Result<bool> {
    let end = input.offset();
    loop {
        let is_padded = input.offset() > end;
        let available = input.fill()?;
        match available.iter().position(|&byte| byte != 0) {
            Some(0) if !is_padded && available[0] == 0x1f => return Ok(true),
            Some(_) => {
                return Err(
                    CodecError::Trailing { format: Format::Gzip, compressed: end, uncompressed }.into()
                );
            }
            None if available.is_empty() => return Ok(false),
            None => {
                let zeros = available.len();
                input.consume(zeros);
            }
        }
    }
}
