//! The alphabets of deflate (RFC 1951, 3.2.5), and a count of their symbols.

/// Literals and lengths: 256 literals, the end of a block, 29 codes of lengths.
pub(super) const LITLENS: usize = 286;
/// Codes of distances.
pub(super) const DISTANCES: usize = 30;
/// The symbol that ends a block.
pub(super) const END: usize = 256;

/// The shortest and the longest match.
pub(super) const MIN_LENGTH: usize = 3;
pub(super) const MAX_LENGTH: usize = 258;

/// Of each length code, the shortest length.
pub(super) const LENGTH_BASE: [u16; 29] = [
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
    227, 258,
];
/// Of each length code, how many bits follow it.
pub(super) const LENGTH_EXTRA: [u8; 29] =
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
/// Of each distance code, the shortest distance.
pub(super) const DISTANCE_BASE: [u16; DISTANCES] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073,
    4097, 6145, 8193, 12289, 16385, 24577,
];
/// Of each distance code, how many bits follow it.
pub(super) const DISTANCE_EXTRA: [u8; DISTANCES] =
    [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];

/// The length code of each length less [`MIN_LENGTH`].
pub(super) static LENGTH_CODE: [u8; 256] = {
    let mut codes = [0; 256];
    let (mut length, mut code) = (0, 0);
    while length < 256 {
        while code < 28 && LENGTH_BASE[code + 1] as usize <= length + MIN_LENGTH {
            code += 1;
        }
        codes[length] = code as u8;
        length += 1;
    }
    codes
};

/// The codes of distances up to 256, then those of every 128 distances.
static DISTANCE_CODE: [u8; 512] = {
    let mut codes = [0; 512];
    let (mut index, mut code) = (0, 0);
    while index < 512 {
        let distance = if index < 256 { index + 1 } else { ((index - 256) << 7) + 1 };
        if index == 256 {
            code = 0;
        }
        while code < 29 && DISTANCE_BASE[code + 1] as usize <= distance {
            code += 1;
        }
        codes[index] = code as u8;
        index += 1;
    }
    codes
};

/// The code of a distance, 1 to 32768.
#[inline(always)]
pub(super) fn distance_code(distance: usize) -> usize {
    let distance = distance.wrapping_sub(1);
    let index = if distance < 256 { distance } else { 256 + (distance >> 7) };
    DISTANCE_CODE[index & 511].into()
}

/// How often each symbol occurs.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    pub(super) litlen: [u32; LITLENS],
    pub(super) distance: [u32; DISTANCES],
}

impl Histogram {
    pub(super) const EMPTY: Self = Self { litlen: [0; LITLENS], distance: [0; DISTANCES] };

    pub(super) fn add(&mut self, other: &Self) {
        for (count, more) in self.litlen.iter_mut().zip(&other.litlen) {
            *count += more;
        }
        for (count, more) in self.distance.iter_mut().zip(&other.distance) {
            *count += more;
        }
    }

    /// With the end of the block.
    pub(super) fn ended(&self) -> Self {
        let mut ended = self.clone();
        ended.litlen[END] = 1;
        ended
    }

    /// An estimate of the bits that a block of these symbols takes with codes of its own, in 1/4096 of a bit.
    pub(super) fn cost(&self) -> u64 {
        /// What a block's header takes besides the lengths of its codes.
        const HEADER: u64 = 60 << 12;
        entropy(&self.litlen) + entropy(&self.distance) + HEADER
    }
}

/// The entropy of so many symbols, with what the length of each one's code takes in a header.
fn entropy(counts: &[u32]) -> u64 {
    const LENGTH: u64 = 4 << 12;
    let (mut total, mut used, mut saved) = (0, 0, 0);
    for &count in counts {
        total += count;
        used += u64::from(count != 0);
        saved += information(count);
    }
    information(total) - saved + used * LENGTH
}

/// A count times its logarithm.
#[inline(always)]
fn information(count: u32) -> u64 {
    /// Of the counts that are most common.
    static SMALL: [u32; 1024] = {
        let mut table = [0; 1024];
        let mut count = 1;
        while count < 1024 {
            table[count as usize] = count * log2(count);
            count += 1;
        }
        table
    };
    match SMALL.get(count as usize) {
        Some(&information) => information.into(),
        None => u64::from(count) * u64::from(log2(count)),
    }
}

/// The binary logarithm in 1/4096, rounded down; zero of zero. No floating point, whose library functions differ between machines.
const fn log2(value: u32) -> u32 {
    let value = if value == 0 { 1 } else { value };
    let whole = value.ilog2();
    let fraction = (((value as u64) << 8) >> whole) as usize & 255;
    (whole << 12) + LOG2[fraction] as u32
}

/// log2(1 + i/256) in 1/4096.
static LOG2: [u16; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        // A bit of the logarithm for each squaring of a fixed-point number, one being 2^30.
        let mut value = (256 + index as u64) << 22;
        let mut bits = 0;
        let mut step = 0;
        while step < 12 {
            value = (value * value) >> 30;
            bits <<= 1;
            if value >= 2 << 30 {
                value >>= 1;
                bits |= 1;
            }
            step += 1;
        }
        table[index] = bits;
        index += 1;
    }
    table
};
