//! Finds matches through chains: each position leads to the one before it that has the same hash.
//!
//! Slower than buckets and more thorough: it looks at as many positions as it is told to, and finds matches of three bytes.

use super::finder::{Finder, Found, LITERAL, Match, SEARCHED};
use super::symbols::MAX_LENGTH;
use super::window::{DICTIONARY, View, load32};

/// How many heads of chains there are.
const HEADS: usize = 1 << 15;
/// How many places there are for matches of three bytes.
const HEADS3: usize = 1 << 13;

/// A match of three bytes is worth less than its literals if it is farther away.
const NEAR: usize = 4096;

/// After so many literals in a row, every second position is looked at, after as many more every third, and so on.
const SKIM: usize = 512;
const MAX_STEP: usize = 16;

/// How much is done for a match.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// How many positions are looked at.
    pub(super) depth: usize,
    /// A match of this length is taken without a look for a better one.
    pub(super) nice: usize,
    /// At how many positions after it a better match is looked for.
    pub(super) lazy: usize,
}

#[derive(Debug)]
pub(super) struct Chains {
    effort: Effort,
    /// The shortest match that is taken, which depends on how well literals are compressed.
    least: usize,
    /// The last position with a hash of four bytes. Zero is none, so position zero is not found.
    heads: Box<[u16; HEADS]>,
    /// The last position with a hash of three bytes.
    heads3: Box<[u16; HEADS3]>,
    /// By position modulo 32 KiB, the position before it with the same hash of four bytes.
    before: Box<[u16; DICTIONARY]>,
}

impl Chains {
    pub(super) fn new(effort: Effort) -> Self {
        fn zeros<const N: usize>() -> Box<[u16; N]> {
            vec![0; N].into_boxed_slice().try_into().expect("as many zeros")
        }
        Self { effort, least: 3, heads: zeros(), heads3: zeros(), before: zeros() }
    }

    /// Puts a position into its chains. Gives what has the same hash of four bytes, and of three.
    #[inline(always)]
    fn remember(&mut self, view: &View, position: usize) -> (usize, usize) {
        let bytes = load32(view, position);
        let head = &mut self.heads[slot::<HEADS>(bytes)];
        let head3 = &mut self.heads3[slot::<HEADS3>(bytes << 8)];
        let (first, near) = (*head, *head3);
        self.before[position % DICTIONARY] = first;
        *head = position as u16;
        *head3 = position as u16;
        (first.into(), near.into())
    }

    /// Looks for a match of at least `least` bytes and remembers the position.
    #[inline(always)]
    fn search(
        &mut self,
        view: &View,
        position: usize,
        least: usize,
        depth: usize,
        end: usize,
    ) -> Option<Match> {
        let (mut candidate, near) = self.remember(view, position);
        let bytes = load32(view, position);
        let most = MAX_LENGTH.min(end - position);
        let mut best = None;
        let mut longest = least.max(4) - 1;
        if least <= 3 && near != 0 && position - near <= NEAR && (load32(view, near) ^ bytes) << 8 == 0 {
            best = Some(Match { length: 3, distance: position - near });
        }
        let nice = self.effort.nice.min(most);
        let mut tail = load32(view, position + longest - 3);
        for _ in 0..depth {
            // One that is as far away as a chain is long has been overwritten.
            if candidate == 0 || position - candidate >= DICTIONARY {
                break;
            }
            if load32(view, candidate + longest - 3) == tail && load32(view, candidate) == bytes {
                let length = Match::length(view, candidate, position, 4, most);
                if length > longest {
                    longest = length;
                    best = Some(Match { length, distance: position - candidate });
                    if length >= nice {
                        break;
                    }
                    tail = load32(view, position + longest - 3);
                }
            }
            candidate = self.before[candidate % DICTIONARY].into();
        }
        best
    }
}

#[inline(always)]
fn slot<const SIZE: usize>(bytes: u32) -> usize {
    (bytes.wrapping_mul(0x9e37_79b1) >> (32 - SIZE.ilog2())) as usize
}

impl Finder for Chains {
    fn clear(&mut self) {
        self.heads.fill(0);
        self.heads3.fill(0);
        self.before.fill(0);
        self.least = 3;
    }

    fn slide(&mut self) {
        // Table by table, so that the compiler makes vectors of it.
        for table in [&mut self.heads[..], &mut self.heads3[..], &mut self.before[..]] {
            for position in table {
                *position = position.saturating_sub(DICTIONARY as u16);
            }
        }
    }

    fn prime(&mut self, view: &View, length: usize) {
        for position in 0..length.min(DICTIONARY) {
            self.remember(view, position);
        }
    }

    fn find(&mut self, view: &View, from: usize, stop: usize, end: usize, found: &mut Found) -> usize {
        let Effort { depth, nice, lazy } = self.effort;
        let stop = stop.min(SEARCHED);
        let mut position = from;
        let mut first_literal = position.wrapping_sub(found.literals);
        while position < stop {
            let Some(mut best) = self.search(view, position, self.least, depth, end) else {
                // Where there are only literals, what stands here can hardly be compressed: fewer and fewer positions are looked at.
                let literals = position.wrapping_sub(first_literal);
                let step = (1 + literals / SKIM).min(MAX_STEP).min(stop - position);
                found.count_literals(&view[position..position + step]);
                position += step;
                continue;
            };
            // The next position that is not remembered.
            let mut next = position + 1;
            let mut ahead = 1;
            while best.length < nice && ahead <= lazy && next < stop {
                // Farther ahead, less effort, and more literals to make up for.
                let better = self.search(view, next, best.length, depth >> ahead, end);
                match better {
                    Some(better) if better.gain_over(best) > LITERAL + 4 * (ahead as i32 - 1) => {
                        found.count_literals(&view[position..next]);
                        position = next;
                        best = better;
                        ahead = 1;
                    }
                    _ => ahead += 1,
                }
                next += 1;
            }
            found.push(position.wrapping_sub(first_literal), best);
            position += best.length;
            first_literal = position;
            for skipped in next..position.min(SEARCHED) {
                self.remember(view, skipped);
            }
        }
        found.literals = position.wrapping_sub(first_literal);
        position
    }
}
