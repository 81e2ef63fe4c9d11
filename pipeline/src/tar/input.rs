//! The bytes of a tar, hashed on their way in large pieces, and copied only where a header lies across two of the reader's.

use std::io::{self, BufRead};

use super::TarError;
use crate::digest::{Algorithm, Hasher};

/// A reader whose next bytes can be looked at before they are consumed.
///
/// Consumed bytes go into the hash when the reader is to let go of them or someone asks: large updates, and each byte once.
pub(super) struct Input<R> {
    reader: R,
    /// Bytes that the reader does not hold in one piece.
    joined: Vec<u8>,
    /// Whether it is they that are next; otherwise it is what the reader holds.
    is_joined: bool,
    /// The first byte of them that is not consumed.
    start: usize,
    /// Their end.
    end: usize,
    /// Of `start` in the tar.
    offset: u64,
    hasher: Hasher,
    hashing: bool,
    /// Up to where, at most `start`, bytes are in the hash.
    hashed: usize,
    ended: bool,
}

impl<R: BufRead> Input<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            joined: Vec::new(),
            is_joined: false,
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
        Ok(self.peeked(wanted.min(self.end - self.start)))
    }

    /// Bytes that were looked at before.
    pub(super) fn peeked(&mut self, length: usize) -> &[u8] {
        let (start, end) = (self.start, self.start + length);
        &self.held()[start..end]
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
        let (start, end) = (self.start - length, self.start);
        Ok(&self.held()[start..end])
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

    /// What is next, with what was consumed of it.
    fn held(&mut self) -> &[u8] {
        held(&self.joined, self.is_joined, &mut self.reader)
    }

    fn hash(&mut self) {
        if self.hashing && self.hashed < self.start {
            let held = held(&self.joined, self.is_joined, &mut self.reader);
            self.hasher.update(&held[self.hashed..self.start]);
        }
        self.hashed = self.start;
    }

    /// Reads until there are so many bytes, or the input is at its end.
    fn refill(&mut self, wanted: usize) -> Result<(), TarError> {
        self.hash();
        let left = self.end - self.start;
        if self.is_joined {
            self.joined.drain(..self.start);
        } else {
            self.joined.clear();
            if left > 0 {
                self.joined.extend_from_slice(&held(&[], false, &mut self.reader)[self.start..self.end]);
            }
            self.reader.consume(self.end);
        }
        (self.start, self.end, self.hashed) = (0, left, 0);
        self.is_joined = true;
        while self.end < wanted {
            let there = match self.reader.fill_buf() {
                Ok(there) => there,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(TarError::Read { offset: self.offset + self.end as u64, source });
                }
            };
            if there.is_empty() {
                self.ended = true;
                break;
            }
            if self.end == 0 && there.len() >= wanted {
                self.is_joined = false;
                self.end = there.len();
                break;
            }
            let taken = there.len().min(wanted - self.end);
            self.joined.extend_from_slice(&there[..taken]);
            self.reader.consume(taken);
            self.end += taken;
        }
        Ok(())
    }
}

fn held<'a>(joined: &'a [u8], is_joined: bool, reader: &'a mut impl BufRead) -> &'a [u8] {
    // What a reader holds it gives again, without reading.
    if is_joined { joined } else { reader.fill_buf().unwrap_or_default() }
}
