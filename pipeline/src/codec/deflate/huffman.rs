//! Huffman codes of limited length (RFC 1951, 3.2.2).

use super::symbols::LITLENS;

/// Codes of one alphabet: of each symbol the length of its code in bits, zero where it has none, and the code's bits in the
/// order in which they are written.
#[derive(Clone, Debug)]
pub(super) struct Codes<const N: usize> {
    pub(super) lengths: [u8; N],
    pub(super) bits: [u16; N],
}

impl<const N: usize> Codes<N> {
    /// The shortest codes for symbols that occur so often, none longer than `limit` bits.
    ///
    /// A symbol that occurs alone has a code of one bit.
    pub(super) fn new(counts: &[u32; N], limit: usize) -> Self {
        let mut sorted = [0; LITLENS];
        let mut used = 0;
        for (symbol, &count) in counts.iter().enumerate() {
            if count != 0 {
                sorted[used] = u64::from(count) << 16 | symbol as u64;
                used += 1;
            }
        }
        let sorted = &mut sorted[..used];
        sorted.sort_unstable();
        let mut lengths = [0; N];
        // The rarest symbols have the longest codes.
        let mut symbols = sorted.iter().map(|entry| (entry & 0xffff) as usize);
        for (length, leaves) in leaves(sorted, limit).into_iter().enumerate().rev() {
            for symbol in symbols.by_ref().take(leaves as usize) {
                lengths[symbol] = length as u8;
            }
        }
        Self::of_lengths(lengths)
    }

    /// The canonical codes of these lengths.
    pub(super) fn of_lengths(lengths: [u8; N]) -> Self {
        let mut next = [0_u16; 17];
        for &length in &lengths {
            next[usize::from(length) + 1] += u16::from(length != 0);
        }
        for length in 2..16 {
            next[length] = (next[length] + next[length - 1]) << 1;
        }
        // Now `next[n]` is the first code of n bits: the number of shorter ones, in n bits.
        let mut bits = [0; N];
        for (bits, &length) in bits.iter_mut().zip(&lengths) {
            if length != 0 {
                let code = &mut next[usize::from(length)];
                *bits = code.reverse_bits() >> (16 - length);
                *code += 1;
            }
        }
        Self { lengths, bits }
    }
}

/// How many codes there are of each length, for symbols sorted by how often they occur (in the high bits of an entry).
fn leaves(sorted: &[u64], limit: usize) -> [u32; 16] {
    let mut leaves = [0; 16];
    let count = sorted.len();
    if count < 2 {
        leaves[1] = count as u32;
        return leaves;
    }
    // Huffman's algorithm with two queues: leaves by weight, and inner nodes, which come into being by weight.
    let mut weights = [0_u64; LITLENS];
    let mut parents = [0_u16; LITLENS];
    let (mut leaf, mut inner) = (0, 0);
    for node in 0..count - 1 {
        for _ in 0..2 {
            if leaf < count && (inner >= node || sorted[leaf] >> 16 <= weights[inner]) {
                weights[node] += sorted[leaf] >> 16;
                leaf += 1;
            } else {
                weights[node] += weights[inner];
                parents[inner] = node as u16;
                inner += 1;
            }
        }
    }
    // The root is the last node; a parent stands after its children.
    let mut depths = [0_u8; LITLENS];
    let mut inner_at = [0_u32; 65];
    inner_at[0] = 1;
    for node in (0..count - 2).rev() {
        // Beyond the limit, depths matter no more; with these weights none is over 63.
        let depth = (depths[usize::from(parents[node])] + 1).min(63);
        depths[node] = depth;
        inner_at[usize::from(depth)] += 1;
    }
    // Both children of an inner node are a level deeper: those that are not inner nodes are leaves.
    let mut too_deep = 0;
    for depth in 1..65 {
        let here = 2 * inner_at[depth - 1] - inner_at[depth];
        if depth <= limit {
            leaves[depth] = here;
        } else {
            too_deep += here;
        }
    }
    leaves[limit] += too_deep;
    // Where that overfills the code, a leaf above the limit moves down and takes one from the limit as its sibling.
    let space =
        |leaves: &[u32; 16]| -> u32 { (1..=limit).map(|depth| leaves[depth] << (limit - depth)).sum() };
    for _ in 0..space(&leaves).saturating_sub(1 << limit) {
        let depth = (1..limit).rev().find(|&depth| leaves[depth] > 0).expect("a code of few symbols fits");
        leaves[depth] -= 1;
        leaves[depth + 1] += 2;
        leaves[limit] -= 1;
    }
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(counts: &[u32; 286], limit: usize) -> Codes<286> {
        let codes = Codes::new(counts, limit);
        let used = counts.iter().filter(|&&count| count > 0).count();
        let space: u32 = codes
            .lengths
            .iter()
            .filter(|&&length| length > 0)
            .map(|&length| 1 << (limit - usize::from(length)))
            .sum();
        if used > 1 {
            assert_eq!(space, 1 << limit, "the code is complete");
        }
        for (count, length) in counts.iter().zip(codes.lengths) {
            assert_eq!(*count > 0, length > 0);
        }
        codes
    }

    #[test]
    fn codes_are_complete_and_within_their_limit() {
        let mut fibonacci = [0; 286];
        let (mut a, mut b) = (1, 1);
        for count in fibonacci.iter_mut().take(40) {
            *count = a;
            (a, b) = (b, a + b);
        }
        for limit in [9, 14, 15] {
            check(&fibonacci, limit);
        }
        check(&[1; 286], 9);
        check(&std::array::from_fn(|i| i as u32), 14);
        check(&std::array::from_fn(|i| u32::from(i == 77)), 14);
        check(&[0; 286], 14);
    }

    #[test]
    fn what_occurs_more_often_has_no_longer_code() {
        let counts = std::array::from_fn(|i| (i as u32 * 7919) % 1009 + 1);
        let codes = check(&counts, 14);
        for (i, &a) in counts.iter().enumerate() {
            for (j, &b) in counts.iter().enumerate() {
                assert!(a <= b || codes.lengths[i] <= codes.lengths[j]);
            }
        }
    }
}
