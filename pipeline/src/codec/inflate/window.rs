//! What came out of a deflate stream: what matches may refer to, and what is not read yet.

use super::Invalid;

/// How far back a match may refer, in bytes.
const HISTORY: usize = 32 * 1024;

/// How much is decompressed before it is read, in bytes.
const FRESH: usize = 128 * 1024;

/// Up to here there is room for what one turn of the fast loop writes.
pub(super) const FULL: usize = HISTORY + FRESH;

/// Two literals, a match of 258 bytes, and less than 32 that its copy writes past it.
const MARGIN: usize = 2 + 258 + 32;

const SIZE: usize = FULL + MARGIN;

/// Bytes in one piece, of which the last 32 KiB move to the front whenever it is full.
pub(super) struct Window {
    bytes: Box<[u8; SIZE]>,
    /// Where the member begins, as far as it is still there.
    floor: usize,
    /// Read up to here.
    read: usize,
    /// Written up to here.
    end: usize,
}

impl Window {
    pub(super) fn new() -> Self {
        let bytes = vec![0; SIZE].into_boxed_slice().try_into().expect("as many zeros");
        Self { bytes, floor: 0, read: 0, end: 0 }
    }

    /// Begins another member, whose matches do not refer to what is before.
    pub(super) fn restart(&mut self) {
        self.floor = self.end;
    }

    /// What is not read yet.
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.read..self.end]
    }

    pub(super) fn consume(&mut self, amount: usize) {
        self.read = self.end.min(self.read + amount);
    }

    /// Makes room if there is none and everything has been read.
    pub(super) fn slide(&mut self) {
        if self.end > FULL && self.read == self.end {
            let by = self.end - HISTORY;
            self.bytes.copy_within(by..self.end, 0);
            self.floor = self.floor.saturating_sub(by);
            self.read = HISTORY;
            self.end = HISTORY;
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.end > FULL
    }

    /// Where the next byte goes. [`put`](Self::put) and [`repeat`](Self::repeat) are told it, so that a loop has it in a register.
    #[inline]
    pub(super) fn end(&self) -> usize {
        self.end
    }

    /// What [`put`](Self::put) and [`repeat`](Self::repeat) wrote counts up to here.
    #[inline]
    pub(super) fn set_end(&mut self, end: usize) {
        self.end = end;
    }

    #[inline(always)]
    pub(super) fn put(&mut self, at: usize, byte: u8) {
        self.bytes[at] = byte;
    }

    /// Appends as much of a stored block as there is room for.
    pub(super) fn append(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(SIZE - self.end);
        self.bytes[self.end..self.end + taken].copy_from_slice(&bytes[..taken]);
        self.end += taken;
        taken
    }

    /// Repeats what is `distance` bytes before; may write anything into the bytes after it.
    #[inline(always)]
    pub(super) fn repeat(&mut self, at: usize, distance: usize, length: usize) -> Result<(), Invalid> {
        if distance > at - self.floor {
            return Err(Invalid);
        }
        let bytes = &mut *self.bytes;
        let (mut from, mut to) = (at - distance, at);
        let end = at + length;
        if distance >= 16 {
            copy::<16>(bytes, from, to);
            copy::<16>(bytes, from + 16, to + 16);
            while to + 32 < end {
                from += 32;
                to += 32;
                copy::<16>(bytes, from, to);
                copy::<16>(bytes, from + 16, to + 16);
            }
        } else if distance == 1 {
            let byte = bytes[from];
            if length <= 32 {
                bytes[to..to + 32].fill(byte);
            } else {
                bytes[to..end].fill(byte);
            }
        } else if distance >= 8 {
            while to < end {
                copy::<8>(bytes, from, to);
                copy::<8>(bytes, from + 8, to + 8);
                from += 16;
                to += 16;
            }
        } else {
            // A word too many each time, of which as much is right as the distance is.
            while to < end {
                copy::<8>(bytes, from, to);
                from += distance;
                to += distance;
            }
        }
        Ok(())
    }
}

/// Copies so many bytes, as one word.
#[inline(always)]
fn copy<const N: usize>(bytes: &mut [u8; SIZE], from: usize, to: usize) {
    bytes.copy_within(from..from + N, to);
}
