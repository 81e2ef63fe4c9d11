//! What finds the matches in a piece of input, and what it finds.

use super::block::Sequence;
use super::symbols::{END, Histogram, LENGTH_CODE, MIN_LENGTH, distance_code};
use super::window::{SPAN, View};

/// Where the positions of a [`View`] that are searched and remembered end. With the one before and the four that a hash covers,
/// a later one might not fit 16 bits.
pub(super) const SEARCHED: usize = SPAN - 4;

/// Finds matches in a view, and remembers what stands where.
pub(super) trait Finder: std::fmt::Debug + Send {
    /// Forgets everything.
    fn clear(&mut self);

    /// Moves on to the view that begins 32 KiB later.
    fn slide(&mut self);

    /// Remembers the first positions of a view, those of a dictionary, without a search.
    fn prime(&mut self, view: &View, length: usize);

    /// Finds literals and matches from a position up to `stop`, and says where they end, which a match may make a little later.
    ///
    /// `stop` is at least 12 bytes before `end`, where the input ends.
    fn find(&mut self, view: &View, from: usize, stop: usize, end: usize, found: &mut Found) -> usize;
}

/// Sequences that wait to be written, and the symbols that they consist of.
#[derive(Debug)]
pub(super) struct Found {
    sequences: Box<[Sequence; Found::CAPACITY]>,
    count: usize,
    /// How many literals there are since the last match.
    pub(super) literals: usize,
    /// The literals of the current segment.
    pub(super) histogram: Histogram,
}

impl Found {
    pub(super) const CAPACITY: usize = 1 << 14;

    pub(super) fn new() -> Self {
        let sequences = vec![Sequence::default(); Self::CAPACITY].into_boxed_slice();
        Self {
            sequences: sequences.try_into().expect("as many sequences"),
            count: 0,
            literals: 0,
            histogram: Histogram::EMPTY,
        }
    }

    #[inline(always)]
    pub(super) fn push(&mut self, literals: usize, length: usize, distance: usize) {
        self.sequences[self.count % Self::CAPACITY] = Sequence::new(literals, length, distance);
        self.count += 1;
    }

    pub(super) fn count_literals(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.histogram.litlen[usize::from(byte)] += 1;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn sequences(&self, until: usize) -> &[Sequence] {
        &self.sequences[..until]
    }

    /// Ends a segment, whose sequences began at `since`: the literals after the last match become a sequence of their own, and
    /// the histogram counts the matches too.
    pub(super) fn close(&mut self, since: usize) {
        if self.literals > 0 {
            self.push(self.literals, 0, 0);
            self.literals = 0;
        }
        for sequence in &self.sequences[since..self.count] {
            let length = sequence.length();
            if length > 0 {
                self.histogram.litlen[END + 1 + usize::from(LENGTH_CODE[(length - MIN_LENGTH) & 0xff])] += 1;
                self.histogram.distance[distance_code(sequence.distance())] += 1;
            }
        }
    }

    /// Drops the sequences that were written.
    pub(super) fn drop_before(&mut self, written: usize) {
        self.sequences.copy_within(written..self.count, 0);
        self.count -= written;
    }
}
