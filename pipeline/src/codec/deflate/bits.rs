//! Bits into bytes, the first bit in the lowest place (RFC 1951, 3.1.1).

/// Bits that are appended to a buffer that is long enough for them and a word more.
#[derive(Debug)]
pub(super) struct BitWriter<'a> {
    out: &'a mut [u8],
    position: Position,
}

/// Where a writer stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Position {
    /// Whole bytes that were written.
    pub(super) bytes: usize,
    /// Bits that were not; above `count` they are zero.
    bits: u64,
    count: u32,
}

impl<'a> BitWriter<'a> {
    /// Goes on where another writer stopped.
    pub(super) fn at(position: Position, out: &'a mut [u8]) -> Self {
        Self { out, position }
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    /// The same writer in other variables, which can live in registers where a parameter lives in memory.
    #[inline(always)]
    pub(super) fn renewed(self) -> Self {
        let Self { out, position: Position { bytes, bits, count } } = self;
        Self { out, position: Position { bytes, bits, count } }
    }

    /// Lets `work` write with a copy of this writer, which can live in registers, and goes on where it stopped.
    pub(super) fn with_copy(&mut self, work: impl FnOnce(BitWriter<'_>) -> Position) {
        self.position = work(BitWriter { out: self.out, position: self.position });
    }

    /// Appends bits that [`flush`](Self::flush) will store: the low `count` ones of a value that has no others.
    ///
    /// After a flush there is room for 56.
    #[inline(always)]
    pub(super) fn add(&mut self, value: u64, count: u32) {
        self.position.bits |= value << (self.position.count & 63);
        self.position.count += count;
    }

    /// Stores the whole bytes.
    #[inline(always)]
    pub(super) fn flush(&mut self) {
        let Position { bytes, bits, count } = &mut self.position;
        self.out[*bytes..*bytes + 8].copy_from_slice(&bits.to_le_bytes());
        *bytes += (*count >> 3) as usize;
        *bits >>= *count & 56;
        *count &= 7;
    }

    /// Appends and stores at most 56 bits.
    pub(super) fn put(&mut self, value: u64, count: u32) {
        self.add(value, count);
        self.flush();
    }

    /// Fills the last byte with zero bits.
    pub(super) fn align(&mut self) {
        self.put(0, self.position.count.wrapping_neg() & 7);
    }

    /// Appends whole bytes to whole bytes.
    pub(super) fn put_bytes(&mut self, bytes: &[u8]) {
        debug_assert_eq!(self.position.count, 0, "aligned");
        let at = self.position.bytes;
        self.out[at..at + bytes.len()].copy_from_slice(bytes);
        self.position.bytes += bytes.len();
    }
}
