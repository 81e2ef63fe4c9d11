//! Raw deflate (RFC 1951), a block at a time, each with the bytes before it as preset dictionary.

// Bits and positions are cut to size on purpose everywhere below.
#![allow(clippy::cast_possible_truncation)]

mod bits;
mod block;
mod buckets;
mod chains;
mod finder;
mod huffman;
mod symbols;
#[cfg(test)]
mod tests;
mod window;

use std::cell::RefCell;
use std::mem;

use bits::{BitWriter, Position};
use buckets::Buckets;
use chains::{Chains, Effort};
use finder::{Finder, Found, SEARCHED};
use symbols::{Histogram, MIN_LENGTH};
use window::DICTIONARY;
pub use window::{BLOCK, Window};

/// How much input is compressed before it is decided whether its symbols are still distributed as those before it.
const SEGMENT: usize = 8 * 1024;

/// The most sequences that a segment has: one for each match, and one for the literals after the last.
const SEGMENT_SEQUENCES: usize = SEGMENT / MIN_LENGTH + 2;

/// The last bytes of the input are literals or parts of matches that began before, so that eight bytes can be loaded everywhere.
const TAIL: usize = 12;

/// Deflates blocks at one level. What it writes depends on the block, its dictionary and the level only.
#[derive(Debug)]
pub struct Encoder {
    level: u8,
    finder: Box<dyn Finder>,
    found: Found,
    out: Vec<u8>,
}

/// How much of the input has been searched.
struct Place {
    position: usize,
    /// Where the finder's view begins.
    base: usize,
}

/// A deflate block that is not yet written.
struct Open {
    /// Where it begins.
    start: usize,
    /// Its sequences are those before this one.
    sequences: usize,
    histogram: Histogram,
    cost: u64,
}

impl Encoder {
    /// An encoder at a level of 1 to 9; other levels are taken for the nearest.
    pub fn new(level: u8) -> Self {
        let level = level.clamp(1, 9);
        let finder: Box<dyn Finder> = match level {
            1 => Box::new(Buckets::<u32, 8192, 4, 8>::new()),
            2 => Box::new(Buckets::<u32, 16384, 8, 2>::new()),
            3 => Box::new(Buckets::<u64, 8192, 8, 2>::new()),
            4 => Box::new(Buckets::<u128, 8192, 8, 2>::new()),
            5 => Box::new(Chains::new(Effort { depth: 6, nice: 24, lazy: 1 })),
            6 => Box::new(Chains::new(Effort { depth: 16, nice: 48, lazy: 1 })),
            7 => Box::new(Chains::new(Effort { depth: 40, nice: 96, lazy: 1 })),
            8 => Box::new(Chains::new(Effort { depth: 120, nice: 258, lazy: 2 })),
            _ => Box::new(Chains::new(Effort { depth: 600, nice: 258, lazy: 2 })),
        };
        Self { level, finder, found: Found::new(), out: Vec::new() }
    }

    /// The level.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// Deflates a window's input. The result ends on a byte boundary: with the final block if this is the `last` piece of
    /// its stream, with an empty stored block if it is not.
    pub fn compress_block(&mut self, window: &Window, last: bool) -> &[u8] {
        let (start, end) = window.range();
        self.finder.clear();
        self.finder.prime(window.view(0), start);
        let mut written = Position::default();
        let mut place = Place { position: start, base: 0 };
        let mut open = self.next_segment(window, &mut place);
        while place.position < end {
            let segment = self.next_segment(window, &mut place);
            let joined = open.joined(&segment);
            // The next segment has to find room too.
            if joined.cost <= open.cost + segment.cost
                && joined.sequences + SEGMENT_SEQUENCES <= Found::CAPACITY
            {
                open = joined;
            } else {
                written = self.write(window, &open, segment.start, false, written);
                open = Open { sequences: self.found.len(), ..segment };
            }
        }
        written = self.write(window, &open, end, last, written);
        let mut writer = writer(&mut self.out, written, block::overhead(0));
        if last {
            writer.align();
        } else {
            block::write_stored(&mut writer, &[], false);
        }
        let size = writer.position().bytes();
        &self.out[..size]
    }

    /// Finds what the next part of the input consists of: at least [`SEGMENT`] bytes, or what there is.
    fn next_segment(&mut self, window: &Window, place: &mut Place) -> Open {
        let (_, end) = window.range();
        let start = place.position;
        let first = self.found.len();
        self.found.histogram = Histogram::EMPTY;
        let searched = end.saturating_sub(TAIL);
        let stop = searched.min(start + SEGMENT);
        while place.position < stop {
            while place.position >= place.base + SEARCHED {
                place.base += DICTIONARY;
                self.finder.slide();
            }
            let (base, view) = (place.base, window.view(place.base));
            let after =
                self.finder.find(view, place.position - base, stop - base, end - base, &mut self.found);
            place.position = base + after;
        }
        if place.position >= searched {
            self.found.add_literals(&window.bytes()[place.position..end]);
            place.position = end;
        }
        self.found.close(first);
        let histogram = self.found.histogram.clone();
        Open { start, sequences: self.found.len(), cost: histogram.cost(), histogram }
    }

    /// Writes a block up to `end`, and drops its sequences.
    fn write(&mut self, window: &Window, open: &Open, end: usize, last: bool, from: Position) -> Position {
        let size = end - open.start;
        // Taken out, so that the sequences can be read meanwhile.
        let mut out = mem::take(&mut self.out);
        let mut writer = writer(&mut out, from, size + block::overhead(size));
        let sequences = self.found.sequences(open.sequences);
        block::write(&mut writer, window.bytes(), (open.start, end), sequences, &open.histogram, last);
        let position = writer.position();
        self.out = out;
        self.found.drop_before(open.sequences);
        position
    }
}

impl Open {
    /// This block with the segment that follows it.
    fn joined(&self, segment: &Self) -> Self {
        let mut histogram = self.histogram.clone();
        histogram.add(&segment.histogram);
        Self { start: self.start, sequences: segment.sequences, cost: histogram.cost(), histogram }
    }
}

/// A writer that has room for so many bytes.
fn writer(out: &mut Vec<u8>, from: Position, room: usize) -> BitWriter<'_> {
    let needed = from.bytes() + room;
    if out.len() < needed {
        out.resize(needed, 0);
    }
    BitWriter::at(from, out)
}

/// Calls `work` with the calling thread's own encoder at `level`.
pub(super) fn with_encoder<T>(level: u8, work: impl FnOnce(&mut Encoder) -> T) -> T {
    thread_local! {
        static ENCODER: RefCell<Option<Encoder>> = const { RefCell::new(None) };
    }
    ENCODER.with_borrow_mut(|slot| {
        // Taken out while in use: an encoder that panicked is not used again.
        let mut encoder =
            mem::take(slot).filter(|encoder| encoder.level() == level).unwrap_or_else(|| Encoder::new(level));
        let result = work(&mut encoder);
        *slot = Some(encoder);
        result
    })
}
