//! The bytes of a tar through one buffer, hashed on their way in large pieces.

use std::io::{self, Read};

use super::TarError;
use crate::digest::{Algorithm, Hasher};

/// Bytes held at once, unless one member's headers need more.
const BUFFER: usize = 256 * 1024;

/// A reader whose next bytes can be looked at before they are consumed.
///
/// Consumed bytes go into the hash when their room is needed or someone asks: large updates, and each byte once.
pub(super) struct Input<R> {
    reader: R,
    buffer: Vec<u8>,
    /// The first byte that is not consumed.
    start: usize,
    /// The end of what was read.
    end: usize,
    /// Of `start` in the tar.
    offset: u64,
    hasher: Hasher,
    hashing: bool,
    /// Up to where, at most `start`, bytes are in the hash.
    hashed: usize,
    ended: bool,
}

impl<R: Read> Input<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            offset: 0,
            hasher: Hasher::new(Algorithm::Sha256),
            hashing: true,
            hashed: 0,
            ended: false,
        }
    }

    /// One that hashes nothing.
    pub(super) fn unhashed(reader: R) -> Self {
        Self { hashing: false, ..Self::new(reader) }
    }

    /// The offset of the next byte.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next bytes: `wanted` of them, fewer only at the end of the input.
    pub(super) fn peek(&mut self, wanted: usize) -> Result<&[u8], TarError> {
        if self.end - self.start < wanted && !self.ended {
            self.refill(wanted)?;
        }
        Ok(&self.buffer[self.start..self.end.min(self.start + wanted)])
    }

    /// Bytes that were looked at before.
    pub(super) fn peeked(&self, length: usize) -> &[u8] {
        &self.buffer[self.start..self.start + length]
    }

    /// Consumes bytes that were looked at before.
    pub(super) fn consume(&mut self, length: usize) {
        debug_assert!(self.end - self.start >= length);
        self.start += length;
        self.offset += length as u64;
    }

    /// Consumes and yields what is there, `most` bytes at most; none at the end of the input only.
    pub(super) fn take(&mut self, most: u64) -> Result<&[u8], TarError> {
        if self.start == self.end && !self.ended {
            self.refill(1)?;
        }
        let there = self.end - self.start;
        let length = usize::try_from(most).map_or(there, |most| most.min(there));
        self.consume(length);
        Ok(&self.buffer[self.start - length..self.start])
    }

    /// The state of the hash after all consumed bytes.
    pub(super) fn fork_hasher(&mut self) -> Hasher {
        self.hash();
        self.hasher.clone()
    }

    /// The hash of all consumed bytes.
    pub(super) fn into_hasher(mut self) -> Hasher {
        self.hash();
        self.hasher
    }

    fn hash(&mut self) {
        if self.hashing {
            self.hasher.update(&self.buffer[self.hashed..self.start]);
        }
        self.hashed = self.start;
    }

    /// Makes room and reads until the buffer is full or the input at its end.
    fn refill(&mut self, wanted: usize) -> Result<(), TarError> {
        self.hash();
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        self.hashed = 0;
        if self.buffer.len() < wanted {
            self.buffer.resize(wanted.next_multiple_of(BUFFER), 0);
        }
        while self.end < self.buffer.len() {
            match self.reader.read(&mut self.buffer[self.end..]) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(length) => self.end += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(TarError::Read { offset: self.offset + self.end as u64, source });
                }
            }
        }
        Ok(())
    }
}
