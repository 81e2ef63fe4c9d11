//! Reads raw deflate (RFC 1951), in whatever pieces it comes.
//!
//! The technique is that of libdeflate: 64 bits of the stream in a register, table entries that say everything about a symbol, and
//! a fast loop as long as input and room are ample. Where input ends, symbols are decoded one by one, each only when all its bits
//! are there: what is left between two pieces is a few bits, never half a symbol. Room never ends within a symbol, since the
//! output is a [`Window`] of our own, out of which it is read.
//!
//! What is valid is what zlib takes for valid. Headers, checksums and members are not known here.

// Bits are cut to size on purpose everywhere below.
#![allow(clippy::cast_possible_truncation)]

mod tables;
#[cfg(test)]
mod tests;
mod window;

use std::fmt;

use tables::{
    DISTANCE_BITS, DistanceTable, END, EXCEPTIONAL, LITERAL, LITLEN_BITS, LitlenTable, PRECODE_BITS,
    PrecodeTable, SUBTABLE,
};
use window::{FULL, Window};

/// The stream is not what deflate allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid deflate data")]
pub struct Invalid;

/// Why the decoder stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All input was used.
    NeedsInput,
    /// What came out has to be read before more can; some input may be left.
    Full,
    /// The stream ended in the last byte that was used of the input.
    Ended,
}

/// How much input one turn of the fast loop may load, in bytes: with the refill before the first turn, two that use up to seven
/// bytes each, and a whole word for the third.
const AMPLE: usize = 7 + 7 + 8;

/// A code of a distance and its extra bits are no longer than this.
const MAX_DISTANCE_BITS: u32 = 15 + 13;

/// The order in which a header has the lengths of the precode (RFC 1951, 3.2.7).
const PRECODE_ORDER: [u8; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// The most lengths that a header has, of both codes.
const MAX_LENGTHS: usize = 286 + 30;

/// Decodes one stream after another.
///
/// Needs about 180 KiB, whatever the stream.
pub struct Inflate {
    window: Window,
    bits: Bits,
    place: Place,
    is_last: bool,
    /// Whether the tables are those of fixed codes.
    is_fixed: bool,
    header: Header,
    precode: PrecodeTable,
    litlen: LitlenTable,
    distance: DistanceTable,
}

/// Bits of the stream that are not decoded yet, lowest first; those above `count` are zero between calls.
#[derive(Clone, Copy, Default)]
struct Bits {
    word: u64,
    count: u32,
}

/// What comes next in the stream.
#[derive(Clone, Copy, Debug)]
enum Place {
    BlockHeader,
    StoredLength,
    /// So many bytes of a stored block.
    Stored(usize),
    /// A dynamic block's counts of lengths.
    Counts,
    PrecodeLengths,
    CodeLengths,
    Symbols,
    Ended,
}

/// A dynamic block's header, as far as it is read.
struct Header {
    litlens: usize,
    distances: usize,
    precodes: usize,
    /// How many lengths are read.
    read: usize,
    lengths: [u8; MAX_LENGTHS],
}

/// A piece of input, as far as it is used.
struct Piece<'a> {
    all: &'a [u8],
    used: usize,
}

impl Inflate {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self {
            window: Window::new(),
            bits: Bits::default(),
            place: Place::BlockHeader,
            is_last: false,
            is_fixed: false,
            header: Header { litlens: 0, distances: 0, precodes: 0, read: 0, lengths: [0; MAX_LENGTHS] },
            precode: [0; 128],
            litlen: [0; 2342],
            distance: [0; 402],
        }
    }

    /// Begins another stream, also after an error; what came out of the last one can still be read.
    pub fn restart(&mut self) {
        self.window.restart();
        self.bits = Bits::default();
        self.place = Place::BlockHeader;
    }

    /// What has come out and is not read yet.
    pub fn unread(&self) -> &[u8] {
        self.window.unread()
    }

    /// Marks so many of the bytes as read.
    pub fn consume(&mut self, amount: usize) {
        self.window.consume(amount);
    }

    /// Decodes until the input or the room ends, and says how many bytes of the input were used, which must not come again.
    ///
    /// Up to about 128 KiB have come out when there is no more room. After an error, what came before it can be read, and the only
    /// way to go on is [`restart`](Self::restart).
    pub fn inflate(&mut self, input: &[u8]) -> (usize, Result<Status, Invalid>) {
        self.window.slide();
        let mut piece = Piece { all: input, used: 0 };
        let result = self.run(&mut piece);
        if let Ok(Status::Full | Status::Ended) = result {
            self.bits.give_back(&mut piece);
        }
        (piece.used, result)
    }

    fn run(&mut self, piece: &mut Piece<'_>) -> Result<Status, Invalid> {
        loop {
            let is_enough = match self.place {
                Place::BlockHeader => self.block_header(piece)?,
                Place::StoredLength => self.stored_length(piece)?,
                Place::Stored(left) => {
                    if self.window.is_full() {
                        return Ok(Status::Full);
                    }
                    let rest = piece.rest();
                    let taken = self.window.append(&rest[..rest.len().min(left)]);
                    piece.used += taken;
                    self.place = if taken == left { self.after_block() } else { Place::Stored(left - taken) };
                    taken == left || self.window.is_full()
                }
                Place::Counts => self.counts(piece)?,
                Place::PrecodeLengths => self.precode_lengths(piece)?,
                Place::CodeLengths => self.code_lengths(piece)?,
                Place::Symbols => {
                    if self.window.is_full() {
                        return Ok(Status::Full);
                    }
                    if piece.rest().len() >= AMPLE {
                        self.fast_symbols(piece)?;
                        true
                    } else {
                        self.symbol(piece)?
                    }
                }
                Place::Ended => return Ok(Status::Ended),
            };
            if !is_enough {
                return Ok(Status::NeedsInput);
            }
        }
    }

    fn after_block(&self) -> Place {
        if self.is_last { Place::Ended } else { Place::BlockHeader }
    }

    fn block_header(&mut self, piece: &mut Piece<'_>) -> Result<bool, Invalid> {
        let Some(header) = self.bits.take(piece, 3) else { return Ok(false) };
        self.is_last = header & 1 != 0;
        self.place = match header >> 1 {
            0 => {
                // The length begins at the next byte.
                self.bits.drop(self.bits.count % 8);
                Place::StoredLength
            }
            1 => {
                if !self.is_fixed {
                    tables::build_fixed(&mut self.litlen, &mut self.distance)?;
                    self.is_fixed = true;
                }
                Place::Symbols
            }
            2 => Place::Counts,
            _ => return Err(Invalid),
        };
        Ok(true)
    }

    fn stored_length(&mut self, piece: &mut Piece<'_>) -> Result<bool, Invalid> {
        let Some(lengths) = self.bits.take(piece, 32) else { return Ok(false) };
        let (length, complement) = (lengths & 0xffff, lengths >> 16);
        if length != complement ^ 0xffff {
            return Err(Invalid);
        }
        self.bits.give_back(piece);
        self.place = if length == 0 { self.after_block() } else { Place::Stored(length as usize) };
        Ok(true)
    }

    fn counts(&mut self, piece: &mut Piece<'_>) -> Result<bool, Invalid> {
        let Some(counts) = self.bits.take(piece, 14) else { return Ok(false) };
        let header = &mut self.header;
        header.litlens = 257 + (counts & 31) as usize;
        header.distances = 1 + (counts >> 5 & 31) as usize;
        header.precodes = 4 + (counts >> 10) as usize;
        if header.litlens > 286 || header.distances > 30 {
            return Err(Invalid);
        }
        header.read = 0;
        header.lengths[..19].fill(0);
        self.place = Place::PrecodeLengths;
        Ok(true)
    }

    fn precode_lengths(&mut self, piece: &mut Piece<'_>) -> Result<bool, Invalid> {
        let header = &mut self.header;
        while header.read < header.precodes {
            let Some(length) = self.bits.take(piece, 3) else { return Ok(false) };
            header.lengths[usize::from(PRECODE_ORDER[header.read])] = length as u8;
            header.read += 1;
        }
        tables::build_precode(&mut self.precode, &header.lengths[..19])?;
        header.read = 0;
        self.place = Place::CodeLengths;
        Ok(true)
    }

    fn code_lengths(&mut self, piece: &mut Piece<'_>) -> Result<bool, Invalid> {
        let header = &mut self.header;
        let total = header.litlens + header.distances;
        while header.read < total {
            self.bits.refill(piece);
            let entry = self.precode[self.bits.low(PRECODE_BITS) as usize];
            let (bits, symbol) = (entry & 0xff, entry >> 16);
            let (extra, base) = match symbol {
                0..16 => (0, 1),
                16 => (2, 3),
                17 => (3, 3),
                _ => (7, 11),
            };
            if self.bits.count < bits + extra {
                return Ok(false);
            }
            self.bits.drop(bits);
            let repeated = base + self.bits.low(extra) as usize;
            self.bits.drop(extra);
            let length = match symbol {
                0..16 => symbol as u8,
                16 => header.lengths[header.read.checked_sub(1).ok_or(Invalid)?],
                _ => 0,
            };
            if repeated > total - header.read {
                return Err(Invalid);
            }
            header.lengths[header.read..header.read + repeated].fill(length);
            header.read += repeated;
        }
        // A block without an end is of no use.
        if header.lengths[256] == 0 {
            return Err(Invalid);
        }
        let (litlens, distances) = header.lengths[..total].split_at(header.litlens);
        self.is_fixed = false;
        tables::build_litlen(&mut self.litlen, litlens)?;
        tables::build_distance(&mut self.distance, distances)?;
        self.place = Place::Symbols;
        Ok(true)
    }

    /// Decodes one literal or match, if all of its bits are there.
    fn symbol(&mut self, piece: &mut Piece<'_>) -> Result<bool, Invalid> {
        self.bits.refill(piece);
        let bits = &mut self.bits;
        let (entry, litlen_bits) = lookup(&self.litlen, LITLEN_BITS, bits.word);
        let mut used = litlen_bits + (entry & 0xff);
        if bits.count < used {
            return Ok(false);
        }
        let at = self.window.end();
        if entry & LITERAL != 0 {
            self.window.put(at, (entry >> 16) as u8);
            self.window.set_end(at + 1);
        } else if entry & EXCEPTIONAL != 0 {
            if entry & END == 0 {
                return Err(Invalid);
            }
            self.place = self.after_block();
            self.bits.drop(used);
            return Ok(true);
        } else {
            let length = value(entry, bits.word >> litlen_bits);
            let word = bits.word >> used;
            let (entry, distance_bits) = lookup(&self.distance, DISTANCE_BITS, word);
            used += distance_bits + (entry & 0xff);
            if bits.count < used {
                return Ok(false);
            }
            if entry & EXCEPTIONAL != 0 {
                return Err(Invalid);
            }
            let distance = value(entry, word >> distance_bits);
            self.window.repeat(at, distance, length)?;
            self.window.set_end(at + length);
        }
        self.bits.drop(used);
        Ok(true)
    }

    /// Decodes symbols as long as input and room are ample, for which they have to be when it is called.
    ///
    /// A refill leaves at least 56 bits. Two literals need up to 22, a third symbol up to 20 with its extra bits, and what is
    /// looked up next another 11, of which nothing is dropped before the next refill.
    fn fast_symbols(&mut self, piece: &mut Piece<'_>) -> Result<(), Invalid> {
        let Self { window, litlen, distance, .. } = self;
        let Bits { mut word, mut count } = self.bits;
        let mut input = piece.rest();
        let mut end = window.end();
        // Only the low byte of `count` counts, so that a whole entry can be subtracted.
        macro_rules! refill {
            () => {
                let next = u64::from_le_bytes(*input.first_chunk().expect("ample input"));
                word |= next.wrapping_shl(count);
                input = &input[7 - (count >> 3 & 7) as usize..];
                count |= 56;
            };
        }
        macro_rules! drop {
            ($entry:expr) => {
                word = word.wrapping_shr($entry);
                count = count.wrapping_sub($entry);
            };
        }
        macro_rules! next {
            () => {
                litlen[(word & ((1 << LITLEN_BITS) - 1)) as usize]
            };
        }
        refill!();
        let mut entry = next!();
        let result = loop {
            let mut before = word;
            drop!(entry);
            if entry & LITERAL != 0 {
                let literal = (entry >> 16) as u8;
                entry = next!();
                before = word;
                drop!(entry);
                window.put(end, literal);
                end += 1;
                if entry & LITERAL != 0 {
                    let literal = (entry >> 16) as u8;
                    entry = next!();
                    before = word;
                    drop!(entry);
                    window.put(end, literal);
                    end += 1;
                    if entry & LITERAL != 0 {
                        let literal = (entry >> 16) as u8;
                        entry = next!();
                        refill!();
                        window.put(end, literal);
                        end += 1;
                        if input.len() < AMPLE || end > FULL {
                            break Ok(());
                        }
                        continue;
                    }
                }
            }
            if entry & EXCEPTIONAL != 0 {
                if entry & SUBTABLE != 0 {
                    entry =
                        litlen[(entry >> 16) as usize + (word & ((1 << (entry >> 8 & 0xf)) - 1)) as usize];
                    before = word;
                    drop!(entry);
                    if entry & LITERAL != 0 {
                        window.put(end, (entry >> 16) as u8);
                        end += 1;
                        entry = next!();
                        refill!();
                        if input.len() < AMPLE || end > FULL {
                            break Ok(());
                        }
                        continue;
                    }
                }
                if entry & EXCEPTIONAL != 0 {
                    if entry & END == 0 {
                        break Err(Invalid);
                    }
                    self.place = if self.is_last { Place::Ended } else { Place::BlockHeader };
                    break Ok(());
                }
            }
            let length = value(entry, before);
            entry = distance[(word & ((1 << DISTANCE_BITS) - 1)) as usize];
            // The next symbol is looked up before the next refill.
            if count & 0xff < MAX_DISTANCE_BITS + LITLEN_BITS {
                refill!();
            }
            if entry & EXCEPTIONAL != 0 {
                if entry & SUBTABLE == 0 {
                    break Err(Invalid);
                }
                drop!(DISTANCE_BITS);
                entry = distance[(entry >> 16) as usize + (word & ((1 << (entry >> 8 & 0xf)) - 1)) as usize];
            }
            let before = word;
            drop!(entry);
            let distance = value(entry, before);
            entry = next!();
            refill!();
            if window.repeat(end, distance, length).is_err() {
                break Err(Invalid);
            }
            end += length;
            if input.len() < AMPLE || end > FULL {
                break Ok(());
            }
        };
        window.set_end(end);
        piece.used = piece.all.len() - input.len();
        // A refill loads more than it counts.
        count &= 63;
        self.bits = Bits { word: word & ((1 << count) - 1), count };
        if result.is_ok() {
            self.bits.give_back(piece);
        }
        result
    }
}

/// The base of a length or distance, and its extra bits, which come after those of its code.
#[inline(always)]
fn value(entry: u32, word: u64) -> usize {
    let extra = word & 1_u64.wrapping_shl(entry).wrapping_sub(1);
    (entry >> 16) as usize + extra.wrapping_shr(entry >> 8) as usize
}

/// The entry that the bits stand for, and how many bits come before those that it counts itself.
#[inline]
fn lookup(table: &[u32], bits: u32, word: u64) -> (u32, u32) {
    let entry = table[(word & ((1 << bits) - 1)) as usize];
    if entry & SUBTABLE == 0 {
        return (entry, 0);
    }
    let index = word >> bits & ((1 << (entry >> 8 & 0xf)) - 1);
    (table[(entry >> 16) as usize + index as usize], bits)
}

impl Bits {
    /// Takes whole bytes out of the input, as many as fit.
    #[inline]
    fn refill(&mut self, piece: &mut Piece<'_>) {
        while self.count <= 56 {
            let Some(&byte) = piece.all.get(piece.used) else { return };
            self.word |= u64::from(byte) << self.count;
            self.count += 8;
            piece.used += 1;
        }
    }

    /// The next bits, if they are there.
    fn take(&mut self, piece: &mut Piece<'_>, count: u32) -> Option<u64> {
        self.refill(piece);
        if self.count < count {
            return None;
        }
        let bits = self.low(count);
        self.drop(count);
        Some(bits)
    }

    #[inline]
    fn low(&self, count: u32) -> u64 {
        self.word & ((1 << count) - 1)
    }

    #[inline]
    fn drop(&mut self, count: u32) {
        self.word >>= count;
        self.count -= count;
    }

    /// Gives whole bytes back to the piece of input. None of them is of an earlier piece: what was left of that were bits of a
    /// symbol that was not complete, which has been dropped since.
    fn give_back(&mut self, piece: &mut Piece<'_>) {
        let bytes = (self.count / 8) as usize;
        piece.used -= bytes;
        self.count %= 8;
        self.word &= (1 << self.count) - 1;
    }
}

impl Default for Inflate {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Inflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflate").field("place", &self.place).finish_non_exhaustive()
    }
}

impl<'a> Piece<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.all[self.used..]
    }
}
