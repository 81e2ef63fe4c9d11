//! Tables that decode the codes of a deflate block (RFC 1951, 3.2), laid out as libdeflate lays out its own.
//!
//! A table has `2^BITS` main entries, one for whatever the next bits of the stream are, and behind them the subtables of longer
//! codes. An entry says everything about its symbol:
//!
//! | bits  | literal       | length or distance               | end, or no symbol | pointer to a subtable     |
//! |-------|---------------|----------------------------------|-------------------|---------------------------|
//! | 0-7   | bits to drop  | bits to drop, with its extra bits | bits to drop     | bits to drop              |
//! | 8-12  | the same      | bits before its extra bits       | the same          | bits that index the subtable |
//! | 13-15 | 0             | 0                                | a flag and [`EXCEPTIONAL`] | [`SUBTABLE`] and [`EXCEPTIONAL`] |
//! | 16-30 | the byte      | its base                         | 0                 | where the subtable begins |
//! | 31    | [`LITERAL`]   | 0                                | 0                 | 0                         |
//!
//! In a subtable, the bits of the main entry do not count.

use super::Invalid;

pub(super) const LITERAL: u32 = 1 << 31;
pub(super) const EXCEPTIONAL: u32 = 1 << 15;
pub(super) const SUBTABLE: u32 = 1 << 14;
pub(super) const END: u32 = 1 << 13;

/// Bits that index the main tables.
pub(super) const LITLEN_BITS: u32 = 11;
pub(super) const DISTANCE_BITS: u32 = 8;
pub(super) const PRECODE_BITS: u32 = 7;

/// The most entries that a table needs, as zlib's `enough` computes them: of 288 symbols, 11 bits and lengths up to 15; of 32
/// and 8; of 19 and 7 with lengths up to 7.
pub(super) type LitlenTable = [u32; 2342];
pub(super) type DistanceTable = [u32; 402];
pub(super) type PrecodeTable = [u32; 128];

const LITLENS: usize = 288;
const DISTANCES: usize = 32;
const PRECODES: usize = 19;
const MAX_LENGTH: usize = 15;

/// Which codes may be incomplete.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Incomplete {
    Refused,
    /// No symbol at all, or one of one bit, as zlib has it; the other bits then stand for no symbol.
    OneSymbol,
}

pub(super) fn build_precode(table: &mut PrecodeTable, lengths: &[u8]) -> Result<(), Invalid> {
    build(table, PRECODE_BITS, lengths, &PRECODE_SYMBOLS, Incomplete::Refused)
}

pub(super) fn build_litlen(table: &mut LitlenTable, lengths: &[u8]) -> Result<(), Invalid> {
    build(table, LITLEN_BITS, lengths, &LITLEN_SYMBOLS, Incomplete::OneSymbol)
}

pub(super) fn build_distance(table: &mut DistanceTable, lengths: &[u8]) -> Result<(), Invalid> {
    build(table, DISTANCE_BITS, lengths, &DISTANCE_SYMBOLS, Incomplete::OneSymbol)
}

/// The codes of blocks with fixed codes (RFC 1951, 3.2.6).
pub(super) fn build_fixed(litlen: &mut LitlenTable, distance: &mut DistanceTable) -> Result<(), Invalid> {
    let mut lengths = [8; LITLENS];
    lengths[144..256].fill(9);
    lengths[256..280].fill(7);
    build_litlen(litlen, &lengths)?;
    build_distance(distance, &[5; DISTANCES])
}

/// Builds a table out of the lengths of its symbols' codes, 0 where a symbol has none.
fn build(
    table: &mut [u32],
    bits: u32,
    lengths: &[u8],
    symbols: &[u32],
    incomplete: Incomplete,
) -> Result<(), Invalid> {
    let mut counts = [0_u32; MAX_LENGTH + 1];
    for &length in lengths {
        counts[usize::from(length)] += 1;
    }
    let mut starts = [0_u32; MAX_LENGTH + 2];
    let mut left = 1_u32;
    for length in 1..=MAX_LENGTH {
        starts[length + 1] = starts[length] + counts[length];
        left = (left << 1).checked_sub(counts[length]).ok_or(Invalid)?;
    }
    let used = starts[MAX_LENGTH + 1] as usize;
    let mut sorted = [0_u16; LITLENS];
    for (symbol, &length) in (0..).zip(lengths) {
        if length != 0 {
            let start = &mut starts[usize::from(length)];
            sorted[*start as usize] = symbol;
            *start += 1;
        }
    }
    let main = 1_usize << bits;
    if left > 0 {
        if incomplete == Incomplete::Refused || used > counts[1] as usize || used > 1 {
            return Err(Invalid);
        }
        table[..main].fill(entry(EXCEPTIONAL, 1));
        if used == 1 {
            let entry = entry(symbols[usize::from(sorted[0])], 1);
            table[..main].iter_mut().step_by(2).for_each(|place| *place = entry);
        }
        return Ok(());
    }

    // The code is complete: its codewords in lexicographic order, bit-reversed, up to the one that is all ones. The table begins
    // with as many entries as the shortest codes index, and is doubled whenever codes become longer; so each symbol is written once.
    let mut sorted = sorted[..used].iter().map(|&symbol| symbols[usize::from(symbol)]);
    let mut codeword = 0_usize;
    let mut size = 1_usize;
    for length in 1..=bits {
        table.copy_within(..size, size);
        size <<= 1;
        for symbol in sorted.by_ref().take(counts[length as usize] as usize) {
            table[codeword] = entry(symbol, length);
            codeword = next(codeword, size);
        }
    }

    let mut prefix = usize::MAX;
    let mut start = 0;
    let mut end = main;
    for length in bits + 1..=MAX_LENGTH as u32 {
        let mut remaining = counts[length as usize];
        for symbol in sorted.by_ref().take(remaining as usize) {
            if codeword & (main - 1) != prefix {
                prefix = codeword & (main - 1);
                start = end;
                // As many bits as fill the subtable with what codes there are.
                let mut sub_bits = length - bits;
                let mut filled = remaining;
                while filled < 1 << sub_bits {
                    sub_bits += 1;
                    filled = (filled << 1) + counts[(bits + sub_bits) as usize];
                }
                end = start + (1 << sub_bits);
                table[prefix] = (start as u32) << 16 | EXCEPTIONAL | SUBTABLE | sub_bits << 8 | bits;
            }
            let first = start + (codeword >> bits);
            let entry = entry(symbol, length - bits);
            table[first..end].iter_mut().step_by(1 << (length - bits)).for_each(|place| *place = entry);
            codeword = next(codeword, 1 << length);
            remaining -= 1;
        }
    }
    Ok(())
}

/// A symbol whose code has so many bits.
fn entry(symbol: u32, bits: u32) -> u32 {
    symbol + (bits << 8) + bits
}

/// The bit-reversed codeword after this one, of a power of two of codewords; 0 after the last.
fn next(codeword: usize, codewords: usize) -> usize {
    let zeros = codeword ^ (codewords - 1);
    let Some(highest) = zeros.checked_ilog2() else { return 0 };
    codeword & ((1 << highest) - 1) | 1 << highest
}

const LITLEN_SYMBOLS: [u32; LITLENS] = {
    let mut symbols = [0; LITLENS];
    let mut byte = 0;
    while byte < 256 {
        symbols[byte as usize] = LITERAL | byte << 16;
        byte += 1;
    }
    symbols[256] = EXCEPTIONAL | END;
    let (mut code, mut base) = (0, 3);
    while code < 28 {
        // Codes of eight lengths without extra bits, then of four with one, four with two and so on.
        let extra = if code < 8 { 0 } else { code / 4 - 1 };
        symbols[257 + code] = base << 16 | extra as u32;
        base += 1 << extra;
        code += 1;
    }
    symbols[285] = 258 << 16;
    symbols[286] = EXCEPTIONAL;
    symbols[287] = EXCEPTIONAL;
    symbols
};

const DISTANCE_SYMBOLS: [u32; DISTANCES] = {
    let mut symbols = [0; DISTANCES];
    let (mut code, mut base) = (0, 1);
    while code < 30 {
        let extra = if code < 4 { 0 } else { code / 2 - 1 };
        symbols[code] = base << 16 | extra as u32;
        base += 1 << extra;
        code += 1;
    }
    symbols[30] = EXCEPTIONAL;
    symbols[31] = EXCEPTIONAL;
    symbols
};

const PRECODE_SYMBOLS: [u32; PRECODES] = {
    let mut symbols = [0; PRECODES];
    let mut symbol = 0;
    while symbol < PRECODES {
        symbols[symbol] = (symbol as u32) << 16;
        symbol += 1;
    }
    symbols
};
