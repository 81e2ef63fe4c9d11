//! The bytes that an encoder looks at: a block of input behind its dictionary, in one buffer.

/// How many bytes of input a block has at most.
pub const BLOCK: usize = 256 * 1024;

/// How far back a match may reach (RFC 1951, 3.2.5), so how much of what stands before a block is of use.
pub(super) const DICTIONARY: usize = 32 * 1024;

/// How many bytes of a window a [`View`] shows from its start: positions in it fit a `u16`.
pub(super) const SPAN: usize = 64 * 1024;

/// Bytes after a position that may be loaded, whether or not they belong to the input: the longest match and one load.
const LOOKAHEAD: usize = 288;

/// A part of a window, whose positions below [`SPAN`] can be read without a check of bounds.
pub(super) type View = [u8; SPAN + LOOKAHEAD];

/// A block of input behind its dictionary.
#[derive(Debug)]
pub struct Window {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Window {
    /// An empty block without a dictionary.
    pub fn new() -> Self {
        Self { bytes: vec![0; DICTIONARY + BLOCK + LOOKAHEAD].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Begins the block that follows `previous`.
    pub fn restart(&mut self, previous: &Self) {
        let from = previous.end.saturating_sub(DICTIONARY);
        self.start = previous.end - from;
        self.end = self.start;
        self.bytes[..self.start].copy_from_slice(&previous.bytes[from..previous.end]);
    }

    /// Takes as many of the bytes as there is room for, and says how many.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.start + BLOCK - self.end);
        self.bytes[self.end..self.end + taken].copy_from_slice(&bytes[..taken]);
        self.end += taken;
        taken
    }

    /// Whether there is no room left.
    pub fn is_full(&self) -> bool {
        self.end == self.start + BLOCK
    }

    /// What stands before the block, at most 32 KiB.
    pub fn dictionary(&self) -> &[u8] {
        &self.bytes[..self.start]
    }

    /// The block.
    pub fn input(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Where the input begins and ends in [`bytes`](Self::bytes).
    pub(super) fn range(&self) -> (usize, usize) {
        (self.start, self.end)
    }

    /// Dictionary, input, and bytes without meaning.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The part that begins at `base`, which is at most the input's end less [`SPAN`], rounded up to 32 KiB.
    pub(super) fn view(&self, base: usize) -> &View {
        self.bytes[base..].first_chunk().expect("the buffer ends a whole lookahead after the input")
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

/// The four bytes at `at`.
#[inline(always)]
pub(super) fn load32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The eight bytes at `at`.
#[inline(always)]
pub(super) fn load64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
