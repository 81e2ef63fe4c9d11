//! Finds matches through a table of buckets: for each hash of four bytes the last few positions that had it.
//!
//! A bucket is one integer with a position in every 16 bits, so that a load, a shift and a store remember a position and forget the
//! oldest. All positions of a bucket are compared at once, without a branch between them.

use std::mem;

use super::finder::{Finder, Found, LITERAL, Match, SEARCHED};
use super::symbols::MAX_LENGTH;
use super::window::{DICTIONARY, View, load32, load64};

/// The shortest match that is searched for.
const MIN_MATCH: usize = 4;

/// Matches at least this long are taken without a look at the next position.
const NICE_LENGTH: usize = 16;

/// After so many literals in a row, the search begins to leave out positions.
const SKIM: usize = 256;

/// The last positions with one hash, the latest in the lowest bits.
pub(super) trait Bucket: Copy + Default + std::fmt::Debug + Send {
    /// How many positions there are.
    const WAYS: usize;
    /// Remembers a position below 65536.
    fn push(self, position: usize) -> Self;
    /// One of the positions, the latest being the first.
    fn get(self, way: usize) -> usize;
    /// Moves all positions back by 32 KiB. Those that would be negative become zero.
    fn slide(self) -> Self;
}

macro_rules! bucket {
    ($integer:ty) => {
        impl Bucket for $integer {
            const WAYS: usize = size_of::<$integer>() / 2;

            #[inline(always)]
            fn push(self, position: usize) -> Self {
                self << 16 | position as $integer
            }

            #[inline(always)]
            fn get(self, way: usize) -> usize {
                usize::from((self >> (16 * way)) as u16)
            }

            #[inline(always)]
            fn slide(self) -> Self {
                const ONES: $integer = <$integer>::MAX / 0xffff;
                let high = self & (ONES << 15);
                // Of a position in the upper half all bits but the highest stay, of one in the lower half none.
                self & (high - (high >> 15))
            }
        }
    };
}
const MAX_WAYS: usize = 8;
bucket!(u32);
bucket!(u64);
bucket!(u128);

/// The table of buckets.
///
/// Of a match, the first `DENSE` positions are remembered, then every `STEP`th: the longer a match, the less likely that what
/// stands in its middle is looked for.
#[derive(Debug)]
pub(super) struct Buckets<B, const SIZE: usize, const DENSE: usize, const STEP: usize> {
    table: Box<[B; SIZE]>,
}

impl<B: Bucket, const SIZE: usize, const DENSE: usize, const STEP: usize> Buckets<B, SIZE, DENSE, STEP> {
    pub(super) fn new() -> Self {
        let table = vec![B::default(); SIZE].into_boxed_slice();
        Self { table: table.try_into().expect("as many buckets") }
    }

    /// Which bucket four bytes belong to.
    #[inline(always)]
    fn slot(bytes: u32) -> usize {
        (bytes.wrapping_mul(0x9e37_79b1) >> (32 - SIZE.ilog2())) as usize
    }

    /// Puts a position into its bucket, and gives those that were there before.
    #[inline(always)]
    fn remember(&mut self, view: &View, position: usize) -> B {
        let bucket = &mut self.table[Self::slot(load32(view, position))];
        mem::replace(bucket, bucket.push(position))
    }

    /// Looks at fewer and fewer positions, since what stands here can hardly be compressed, until one has a match.
    #[cold]
    #[inline(never)]
    fn skim(
        &mut self,
        view: &View,
        from: usize,
        literals: usize,
        stop: usize,
        end: usize,
    ) -> (usize, Option<Match>) {
        let mut position = from;
        while position < stop {
            let bytes = load64(view, position);
            let candidates = self.remember(view, position);
            if any(view, candidates, 0, bytes as u32)
                && let Some(mut best) = longest(view, candidates, position, bytes, end)
            {
                // It may have begun at a position that was left out.
                let is_equal = |at: usize| at > best.distance && view[at - 1] == view[at - 1 - best.distance];
                while position > from && best.length < MAX_LENGTH && is_equal(position) {
                    position -= 1;
                    best.length += 1;
                }
                return (position, Some(best));
            }
            position += 1 + ((literals + position - from) / SKIM).min(32);
        }
        (position.min(stop), None)
    }
}

impl<B: Bucket, const SIZE: usize, const DENSE: usize, const STEP: usize> Finder
    for Buckets<B, SIZE, DENSE, STEP>
{
    fn clear(&mut self) {
        self.table.fill(B::default());
    }

    fn slide(&mut self) {
        for bucket in self.table.iter_mut() {
            *bucket = bucket.slide();
        }
    }

    fn prime(&mut self, view: &View, length: usize) {
        for position in 0..length.min(DICTIONARY) {
            self.remember(view, position);
        }
    }

    fn find(&mut self, view: &View, from: usize, stop: usize, end: usize, found: &mut Found) -> usize {
        let stop = stop.min(SEARCHED);
        let mut position = from;
        let mut first_literal = position.wrapping_sub(found.literals);
        while position < stop {
            let run_end = stop.min(position + SKIM);
            let mut bytes = load32(view, position);
            let mut slot = Self::slot(bytes);
            let mut bucket = self.table[slot];
            let mut hit = false;
            while position < run_end {
                self.table[slot] = bucket.push(position);
                // The next position's bucket is loaded before it is known whether it will be looked at: the load takes time.
                let next_bytes = load32(view, position + 1);
                let next_slot = Self::slot(next_bytes);
                let next_bucket = self.table[next_slot];
                if any(view, bucket, 0, bytes) {
                    hit = true;
                    break;
                }
                found.histogram.litlen[bytes as usize & 0xff] += 1;
                position += 1;
                (bytes, slot, bucket) = (next_bytes, next_slot, next_bucket);
            }
            if hit {
                let Some(mut best) = longest(view, bucket, position, load64(view, position), end) else {
                    // It is out of reach.
                    found.histogram.litlen[bytes as usize & 0xff] += 1;
                    position += 1;
                    continue;
                };
                let mut next_bucket = self.remember(view, position + 1);
                // A better match at the next position is worth a literal; one that is not shorter has the same tail.
                while best.length < NICE_LENGTH && position + 2 < stop {
                    let next = position + 1;
                    let tail = best.length - MIN_MATCH;
                    if !any(view, next_bucket, tail, load32(view, next + tail)) {
                        break;
                    }
                    match longest(view, next_bucket, next, load64(view, next), end) {
                        Some(better) if better.gain_over(best) > LITERAL => best = better,
                        _ => break,
                    }
                    found.histogram.litlen[usize::from(view[position])] += 1;
                    position = next;
                    next_bucket = self.remember(view, position + 1);
                }
                found.push(position.wrapping_sub(first_literal), best);
                // The two positions after the first two are part of every match.
                self.remember(view, position + 2);
                self.remember(view, position + 3);
                let after = position + best.length;
                let known = after.min(SEARCHED);
                for position in position + 4..known.min(position + DENSE) {
                    self.remember(view, position);
                }
                for position in (position + DENSE..known).step_by(STEP) {
                    self.remember(view, position);
                }
                position = after;
                first_literal = position;
            } else if position < stop {
                let literals = position.wrapping_sub(first_literal);
                let (next, best) = self.skim(view, position, literals, stop, end);
                found.count_literals(&view[position..next]);
                position = next;
                if let Some(best) = best {
                    found.push(position.wrapping_sub(first_literal), best);
                    position += best.length;
                    first_literal = position;
                }
            }
        }
        found.literals = position.wrapping_sub(first_literal);
        position
    }
}

/// Whether any of the positions has these four bytes, so many bytes after it.
#[inline(always)]
fn any<B: Bucket>(view: &View, bucket: B, after: usize, bytes: u32) -> bool {
    (0..B::WAYS).any(|way| load32(view, bucket.get(way) + after) == bytes)
}

/// The longest match of at least four bytes at a position that has these eight bytes; of several, the latest.
#[inline(always)]
fn longest<B: Bucket>(view: &View, bucket: B, position: usize, bytes: u64, end: usize) -> Option<Match> {
    /// As many equal bytes as one comparison can tell, in bits.
    const ALL: u32 = 56;
    let mut equal = [0; MAX_WAYS];
    let (mut best, mut start) = (0, 0);
    for (way, equal) in equal.iter_mut().enumerate().take(B::WAYS) {
        let candidate = bucket.get(way);
        // What was forgotten, or was never there, is position zero, which is in reach or not like any other.
        if (1..=DICTIONARY).contains(&position.wrapping_sub(candidate)) {
            // The highest bit is set so that there is one.
            let different = load64(view, candidate) ^ bytes | 1 << 63;
            *equal = different.trailing_zeros() & !7;
        }
        if *equal > best {
            (best, start) = (*equal, candidate);
        }
    }
    let mut length = (best / 8) as usize;
    if best == ALL {
        let most = MAX_LENGTH.min(end - position);
        length = 0;
        for (way, &equal) in equal.iter().enumerate().take(B::WAYS) {
            let candidate = bucket.get(way);
            if equal == ALL {
                let longer = Match::length(view, candidate, position, 7, most);
                if longer > length {
                    (length, start) = (longer, candidate);
                }
            }
        }
    }
    (length >= MIN_MATCH).then(|| Match { length, distance: position - start })
}
