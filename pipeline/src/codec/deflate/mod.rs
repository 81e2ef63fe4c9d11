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
use symbols::Histogram;
use window::DICTIONARY;
pub use window::{BLOCK, Window};

/// How much input is compressed before it is decided whether its symbols are still distributed as those before it.
const SEGMENT: usize = 8 * 1024;

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

/// A deflate block that is not yet written.
struct Open {
    /// Where it begins.
    start: usize,
    /// Its sequences.
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
        let mut writer = Position::default();
        let mut open: Option<Open> = None;
        let searched = end.saturating_sub(TAIL);
        let (mut position, mut base) = (start, 0);
        loop {
            let segment = position;
            let first = self.found.len();
            self.found.histogram = Histogram::EMPTY;
            let stop = searched.min(segment + SEGMENT);
            while position < stop {
                while position >= base + SEARCHED {
                    base += DICTIONARY;
                    self.finder.slide();
                }
                let view = window.view(base);
                position =
                    base + self.finder.find(view, position - base, stop - base, end - base, &mut self.found);
            }
            let is_end = position >= searched;
            if is_end && position < end {
                self.found.count_literals(&window.bytes()[position..end]);
                self.found.literals += end - position;
                position = end;
            }
            self.found.close(first);
            let cost = self.found.histogram.cost();
            open = Some(match open {
                None => Open {
                    start: segment,
                    sequences: self.found.len(),
                    histogram: self.found.histogram.clone(),
                    cost,
                },
                Some(mut open) => {
                    let mut joined = open.histogram.clone();
                    joined.add(&self.found.histogram);
                    let joined_cost = joined.cost();
                    if joined_cost <= open.cost + cost && self.found.len() + SEGMENT / 4 + 2 < Found::CAPACITY
                    {
                        Open { sequences: self.found.len(), histogram: joined, cost: joined_cost, ..open }
                    } else {
                        self.write(window, &mut open, segment, false, &mut writer);
                        Open {
                            start: segment,
                            sequences: self.found.len(),
                            histogram: self.found.histogram.clone(),
                            cost,
                        }
                    }
                }
            });
            if is_end {
                break;
            }
        }
        if let Some(mut open) = open {
            self.write(window, &mut open, end, last, &mut writer);
        }
        self.out.resize(self.out.len().max(writer.bytes() + 64), 0);
        let mut bits = BitWriter::at(writer, &mut self.out);
        if last {
            bits.align();
        } else {
            block::write_stored(&mut bits, &[], false);
        }
        let written = bits.position().bytes();
        &self.out[..written]
    }

    /// Writes a block up to `end`, and drops its sequences.
    fn write(&mut self, window: &Window, open: &mut Open, end: usize, last: bool, position: &mut Position) {
        let needed = position.bytes() + (end - open.start) + block::overhead(end - open.start);
        if self.out.len() < needed {
            self.out.resize(needed, 0);
        }
        let mut writer = BitWriter::at(*position, &mut self.out);
        let sequences = self.found.sequences(open.sequences);
        block::write(&mut writer, window.bytes(), (open.start, end), sequences, &mut open.histogram, last);
        *position = writer.position();
        self.found.drop_before(open.sequences);
    }
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
