//! The stored bytes, with a count of those that were used.

use std::io::{self, BufRead};

use crate::codec::CodecError;
use crate::compression::Format;

/// A reader, before which stand the bytes that were taken out of it to sniff their format.
pub(super) struct Input<R> {
    reader: R,
    head: Vec<u8>,
    offset: u64,
}

impl<R> Input<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, head: Vec::new(), offset: 0 }
    }

    /// Bytes that were used.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn corrupt(&self, format: Format, uncompressed: u64, reason: &'static str) -> io::Error {
        CodecError::Corrupt { format, compressed: self.offset, uncompressed, reason }.into()
    }

    pub(super) fn truncated(&self, format: Format, uncompressed: u64) -> io::Error {
        CodecError::Truncated { format, compressed: self.offset, uncompressed }.into()
    }
}

impl<R: BufRead> Input<R> {
    /// What is at hand; nothing at the end.
    pub(super) fn fill(&mut self) -> io::Result<&[u8]> {
        if !self.head.is_empty() {
            return Ok(&self.head);
        }
        loop {
            match self.reader.fill_buf() {
                // Asked again, since a borrow cannot leave a loop on one branch only.
                Ok(_) => return self.reader.fill_buf(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn consume(&mut self, amount: usize) {
        if self.head.is_empty() {
            self.reader.consume(amount);
        } else {
            self.head.drain(..amount);
        }
        self.offset += amount as u64;
    }

    /// What the first four bytes say, which stay in the input.
    pub(super) fn sniff(&mut self) -> io::Result<Format> {
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
        self.head = start;
        Ok(Format::sniff(&self.head))
    }

    /// Copies what is at hand.
    pub(super) fn take(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill()?;
        let taken = available.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&available[..taken]);
        self.consume(taken);
        Ok(taken)
    }

    /// The next bytes of a header or trailer.
    pub(super) fn bytes<const N: usize>(&mut self, format: Format, uncompressed: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            let Some(&next) = self.fill()?.first() else {
                return Err(self.truncated(format, uncompressed));
            };
            *byte = next;
            self.consume(1);
        }
        Ok(bytes)
    }
}
