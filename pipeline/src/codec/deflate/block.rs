//! One deflate block (RFC 1951, 3.2): stored, or with the static codes, or with its own, whichever is shortest.

use super::bits::{BitWriter, Position};
use super::huffman::Codes;
use super::symbols::{
    DISTANCE_BASE, DISTANCE_EXTRA, DISTANCES, END, Histogram, LENGTH_BASE, LENGTH_CODE, LENGTH_EXTRA,
    LITLENS, MIN_LENGTH, distance_code,
};
use super::window::load32;

/// The longest code of a literal or length, so that four literals fit a word. The format would allow 15 bits.
const LITLEN_LIMIT: usize = 14;
const DISTANCE_LIMIT: usize = 15;
const PRECODE_LIMIT: usize = 7;

/// The most that a stored block holds.
const STORED: usize = 65535;

/// Some literals and then a match, or none at the end of a stretch of input.
///
/// In one word: literals in the high 32 bits, the length in 16, the distance in 16.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sequence(u64);

impl Sequence {
    #[inline(always)]
    pub(super) fn new(literals: usize, length: usize, distance: usize) -> Self {
        Self((literals as u64) << 32 | (length as u64) << 16 | distance as u64)
    }

    #[inline(always)]
    pub(super) fn literals(self) -> usize {
        (self.0 >> 32) as usize
    }

    /// Zero where there is no match.
    #[inline(always)]
    pub(super) fn length(self) -> usize {
        (self.0 >> 16 & 0xffff) as usize
    }

    #[inline(always)]
    pub(super) fn distance(self) -> usize {
        (self.0 & 0xffff) as usize
    }
}

/// What a block may take more than its input, at most: headers of stored blocks, of which there may be one for each 64 KiB,
/// or the header of one with codes.
pub(super) fn overhead(input: usize) -> usize {
    input / STORED * 5 + 512
}

/// Appends a block.
///
/// `bytes[start..end]` is what it holds, `sequences` say how, and `histogram` counts their symbols without the end of the block;
/// some bytes after `end` must be there, whatever they are.
pub(super) fn write(
    writer: &mut BitWriter<'_>,
    bytes: &[u8],
    (start, end): (usize, usize),
    sequences: &[Sequence],
    histogram: &Histogram,
    last: bool,
) {
    let histogram = &histogram.ended();
    let own = Own::new(histogram);
    let extra = extra_bits(histogram);
    let own_size =
        own.header_size + own.litlen.size(&histogram.litlen) + own.distance.size(&histogram.distance) + extra;
    let fixed = fixed_codes();
    let fixed_size = fixed.0.size(&histogram.litlen) + fixed.1.size(&histogram.distance) + extra;
    let length = end - start;
    // The header is 3 bits, up to 7 to the next byte, and two lengths.
    let stored_size = 8 * length as u64 + 40 * (length / STORED + 1) as u64;
    if stored_size <= own_size.min(fixed_size) {
        write_stored(writer, &bytes[start..end], last);
    } else if fixed_size <= own_size {
        writer.put(u64::from(last) | 1 << 1, 3);
        let words = Words::new(&fixed.0, &fixed.1);
        writer.with_copy(|writer| write_sequences(writer, &bytes[start..], sequences, &words));
    } else {
        writer.put(u64::from(last) | 2 << 1, 3);
        own.write_header(writer);
        let words = Words::new(&own.litlen, &own.distance);
        writer.with_copy(|writer| write_sequences(writer, &bytes[start..], sequences, &words));
    }
}

/// Appends stored blocks.
pub(super) fn write_stored(writer: &mut BitWriter<'_>, bytes: &[u8], last: bool) {
    let mut rest = bytes;
    loop {
        let (piece, after) = rest.split_at(rest.len().min(STORED));
        rest = after;
        writer.put(u64::from(last && rest.is_empty()), 3);
        writer.align();
        let length = piece.len() as u64;
        writer.put(length | (length ^ 0xffff) << 16, 32);
        writer.put_bytes(piece);
        if rest.is_empty() {
            return;
        }
    }
}

/// The bits that follow the codes of lengths and distances.
fn extra_bits(histogram: &Histogram) -> u64 {
    let lengths = histogram.litlen[END + 1..].iter().zip(LENGTH_EXTRA);
    let distances = histogram.distance.iter().zip(DISTANCE_EXTRA);
    lengths.chain(distances).map(|(&count, bits)| u64::from(count) * u64::from(bits)).sum()
}

impl<const N: usize> Codes<N> {
    /// How many bits these symbols take.
    fn size(&self, counts: &[u32; N]) -> u64 {
        counts.iter().zip(self.lengths).map(|(&count, length)| u64::from(count) * u64::from(length)).sum()
    }
}

/// The codes that every decoder knows (RFC 1951, 3.2.6).
fn fixed_codes() -> (Codes<LITLENS>, Codes<DISTANCES>) {
    // The code has two symbols more than ever occur.
    let mut lengths = [8; 288];
    lengths[144..256].fill(9);
    lengths[256..280].fill(7);
    let all = Codes::of_lengths(lengths);
    let litlen = Codes {
        lengths: std::array::from_fn(|symbol| all.lengths[symbol]),
        bits: std::array::from_fn(|symbol| all.bits[symbol]),
    };
    (litlen, Codes::of_lengths([5; DISTANCES]))
}

/// The codes made for a block, and the header that tells them (RFC 1951, 3.2.7).
struct Own {
    litlen: Codes<LITLENS>,
    distance: Codes<DISTANCES>,
    precode: Codes<19>,
    /// How many codes the header has of each alphabet.
    litlens: usize,
    distances: usize,
    precodes: usize,
    /// The code lengths, run by run: the symbol of the precode, and in the high bits what follows its code.
    items: [u16; LITLENS + DISTANCES],
    item_count: usize,
    /// In bits.
    header_size: u64,
}

/// In this order stand the lengths of the precode.
const PRECODE_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// The bits that follow a code of the precode.
fn precode_extra(symbol: usize) -> u32 {
    match symbol {
        16 => 2,
        17 => 3,
        18 => 7,
        _ => 0,
    }
}

impl Own {
    fn new(histogram: &Histogram) -> Self {
        let litlen = Codes::new(&histogram.litlen, LITLEN_LIMIT);
        let mut distance = Codes::new(&histogram.distance, DISTANCE_LIMIT);
        if distance.lengths == [0; DISTANCES] {
            // Some decoders want a code even when there is no distance.
            distance.lengths[0] = 1;
        }
        let used = |lengths: &[u8], least: usize| {
            lengths.iter().rposition(|&length| length != 0).map_or(least, |last| least.max(last + 1))
        };
        let litlens = used(&litlen.lengths, END + 1);
        let distances = used(&distance.lengths, 1);
        let mut own = Self {
            precode: Codes { lengths: [0; 19], bits: [0; 19] },
            litlens,
            distances,
            precodes: 0,
            items: [0; LITLENS + DISTANCES],
            item_count: 0,
            header_size: 0,
            litlen,
            distance,
        };
        let counts = own.find_runs();
        own.precode = Codes::new(&counts, PRECODE_LIMIT);
        let is_used = |&symbol: &usize| own.precode.lengths[symbol] != 0;
        own.precodes = PRECODE_ORDER.iter().rposition(is_used).map_or(4, |last| last + 1).max(4);
        let extra = |symbol: usize| u64::from(counts[symbol]) * u64::from(precode_extra(symbol));
        own.header_size =
            14 + 3 * own.precodes as u64 + own.precode.size(&counts) + extra(16) + extra(17) + extra(18);
        own
    }

    /// Writes the code lengths as runs, which may go on from one alphabet to the other, and counts the symbols of the precode.
    fn find_runs(&mut self) -> [u32; 19] {
        let mut lengths = [0; LITLENS + DISTANCES];
        lengths[..self.litlens].copy_from_slice(&self.litlen.lengths[..self.litlens]);
        lengths[self.litlens..][..self.distances].copy_from_slice(&self.distance.lengths[..self.distances]);
        let mut counts = [0; 19];
        let mut item = |symbol: usize, following: usize| {
            self.items[self.item_count] = (symbol | following << 5) as u16;
            self.item_count += 1;
            counts[symbol] += 1;
        };
        for run in lengths[..self.litlens + self.distances].chunk_by(|a, b| a == b) {
            let length = usize::from(run[0]);
            let mut rest = run.len();
            if length == 0 {
                while rest >= 11 {
                    let some = rest.min(138);
                    item(18, some - 11);
                    rest -= some;
                }
                if rest >= 3 {
                    item(17, rest - 3);
                    rest = 0;
                }
            } else if rest > 3 {
                item(length, 0);
                rest -= 1;
                while rest >= 3 {
                    let some = rest.min(6);
                    item(16, some - 3);
                    rest -= some;
                }
            }
            for _ in 0..rest {
                item(length, 0);
            }
        }
        counts
    }

    fn write_header(&self, writer: &mut BitWriter<'_>) {
        let counts = [(self.litlens - 257, 5), (self.distances - 1, 5), (self.precodes - 4, 4)];
        for (count, bits) in counts {
            writer.put(count as u64, bits);
        }
        for &symbol in &PRECODE_ORDER[..self.precodes] {
            writer.put(self.precode.lengths[symbol].into(), 3);
        }
        for &item in &self.items[..self.item_count] {
            let symbol = usize::from(item & 31);
            writer.put(self.precode.bits[symbol].into(), self.precode.lengths[symbol].into());
            writer.put((item >> 5).into(), precode_extra(symbol));
        }
    }
}

/// What to write for each literal, length and distance.
struct Words {
    /// Bits and, in the low byte, how many.
    literals: [u32; 256],
    /// The same by length less [`MIN_LENGTH`], with the bits that follow a length's code.
    lengths: [u32; 256],
    /// By code: how many bits, how many bits follow, the code's bits and the shortest distance, of 8, 8, 16 and 16 bits.
    distances: [u64; 32],
    end: u32,
}

impl Words {
    fn new(litlen: &Codes<LITLENS>, distance: &Codes<DISTANCES>) -> Self {
        let word = |symbol: usize| u32::from(litlen.bits[symbol]) << 8 | u32::from(litlen.lengths[symbol]);
        let mut distances = [0; 32];
        for (code, word) in distances.iter_mut().enumerate().take(DISTANCES) {
            *word = u64::from(distance.lengths[code])
                | u64::from(DISTANCE_EXTRA[code]) << 8
                | u64::from(distance.bits[code]) << 16
                | u64::from(DISTANCE_BASE[code]) << 32;
        }
        Self {
            literals: std::array::from_fn(word),
            lengths: std::array::from_fn(|length| {
                let code = usize::from(LENGTH_CODE[length]);
                let following = (length + MIN_LENGTH) as u32 - u32::from(LENGTH_BASE[code]);
                let word = word(END + 1 + code);
                (word + u32::from(LENGTH_EXTRA[code])) | following << (8 + (word & 0xff))
            }),
            distances,
            end: word(END),
        }
    }
}

/// By how many literals are left below four, which of the next three there are.
const LEFT: [[u32; 3]; 4] = [[0, 0, 0], [!0, 0, 0], [!0, !0, 0], [!0, !0, !0]];

fn write_sequences(writer: BitWriter<'_>, bytes: &[u8], sequences: &[Sequence], words: &Words) -> Position {
    fn add(writer: &mut BitWriter<'_>, word: u32) {
        writer.add(u64::from(word >> 8), word & 0xff);
    }
    let mut writer = writer.renewed();
    // 32 bits, so that a sum with a few more cannot overflow.
    let mut at = 0_u32;
    for sequence in sequences {
        let mut literals = sequence.literals() as u32;
        while literals >= 4 {
            for byte in load32(bytes, at as usize).to_le_bytes() {
                add(&mut writer, words.literals[usize::from(byte)]);
            }
            writer.flush();
            at += 4;
            literals -= 4;
        }
        // Whether there are none, one, two or three more is hard to foretell, so no branch depends on it.
        let rest = load32(bytes, at as usize).to_le_bytes();
        for (byte, mask) in rest.into_iter().zip(LEFT[literals as usize & 3]) {
            add(&mut writer, words.literals[usize::from(byte)] & mask);
        }
        writer.flush();
        let length = sequence.length();
        if length == 0 {
            at += literals;
            continue;
        }
        at += literals + length as u32;
        add(&mut writer, words.lengths[(length - MIN_LENGTH) & 0xff]);
        let distance = sequence.distance();
        let word = words.distances[distance_code(distance) & 31];
        writer.add(word >> 16 & 0xffff, word as u32 & 0xff);
        writer.add(distance as u64 - (word >> 32), word as u32 >> 8 & 0xff);
        writer.flush();
    }
    add(&mut writer, words.end);
    writer.flush();
    writer.position()
}
