//! What finds the matches in a piece of input, and what it finds.

use super::block::Sequence;
use super::symbols::{END, Histogram, LENGTH_CODE, MIN_LENGTH, distance_code};
use super::window::{SPAN, View, load64};

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

/// Bytes that stood before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Match {
    pub(super) length: usize,
    pub(super) distance: usize,
}

impl Match {
    /// How many bits are saved, roughly, by this match instead of another: four for each byte that it is longer, less what a
    /// larger distance takes more.
    #[inline(always)]
    pub(super) fn gain_over(self, other: Self) -> i32 {
        let longer = self.length as i32 - other.length as i32;
        4 * longer + other.distance.ilog2() as i32 - self.distance.ilog2() as i32
    }

    /// Finds out how long the match is, of which so many bytes are known, up to `most`.
    #[inline(always)]
    pub(super) fn length(view: &View, candidate: usize, position: usize, known: usize, most: usize) -> usize {
        let mut length = known;
        while length < most {
            let different = load64(view, candidate + length) ^ load64(view, position + length);
            if different != 0 {
                length += (different.trailing_zeros() / 8) as usize;
                break;
            }
            length += 8;
        }
        length.min(most)
    }
}

/// What a match at the next position has to save, so that a literal before it is worth its while.
pub(super) const LITERAL: i32 = 2;

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
    pub(super) fn push(&mut self, literals: usize, found: Match) {
        self.push_sequence(Sequence::new(literals, found.length, found.distance));
    }

    #[inline(always)]
    fn push_sequence(&mut self, sequence: Sequence) {
        self.sequences[self.count] = sequence;
        self.count += 1;
    }

    pub(super) fn count_literals(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.histogram.litlen[usize::from(byte)] += 1;
        }
    }

    /// Appends literals to those since the last match.
    pub(super) fn add_literals(&mut self, bytes: &[u8]) {
        self.count_literals(bytes);
        self.literals += bytes.len();
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
            self.push_sequence(Sequence::new(self.literals, 0, 0));
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
