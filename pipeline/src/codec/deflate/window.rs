//! The bytes that an encoder looks at: a block of input and the dictionary before it.

/// How many bytes of input a block has at most.
pub const BLOCK: usize = 512 * 1024;

/// How far back a match may reach (RFC 1951, 3.2.5).
pub(super) const DICTIONARY: usize = 32 * 1024;

/// Bytes after the input that the encoder may load, though never use.
pub(super) const PADDING: usize = 16;

/// A block of input behind its dictionary, in one buffer.
#[derive(Debug)]
pub struct Window {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Window {
    /// An empty block without a dictionary.
    pub fn new() -> Self {
        Self { bytes: vec![0; DICTIONARY + BLOCK + PADDING].into_boxed_slice(), start: 0, end: 0 }
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
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}
