//! Raw deflate (RFC 1951), a block at a time, each with the bytes before it as preset dictionary.

use std::cell::RefCell;

use flate2::{Compress, FlushCompress};

mod window;
pub use window::{BLOCK, Window};

/// Deflates blocks at one level. What it writes depends on the block, its dictionary and the level only.
#[derive(Debug)]
pub struct Encoder {
    level: u8,
    deflate: Compress,
}

impl Encoder {
    /// An encoder at a level of 1 to 9; other levels are taken for the nearest.
    pub fn new(level: u8) -> Self {
        let level = level.clamp(1, 9);
        Self { level, deflate: Compress::new(flate2::Compression::new(level.into()), false) }
    }

    /// The level.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// Deflates a window's input. The result ends on a byte boundary: with the final block if this is the `last` piece of
    /// its stream, with an empty stored block if it is not.
    pub fn compress_block(&mut self, window: &Window, last: bool) -> Vec<u8> {
        self.deflate.reset();
        if !window.dictionary().is_empty() {
            self.deflate.set_dictionary(window.dictionary()).expect("a fresh stream takes a dictionary");
        }
        let mut out = Vec::with_capacity(window.input().len() + window.input().len() / 100 + 64);
        let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
        self.deflate.compress_vec(window.input(), &mut out, flush).expect("deflate takes any input");
        out
    }
}

/// Calls `work` with the calling thread's own encoder at `level`.
pub(super) fn with_encoder<T>(level: u8, work: impl FnOnce(&mut Encoder) -> T) -> T {
    thread_local! {
        static ENCODER: RefCell<Option<Encoder>> = const { RefCell::new(None) };
    }
    ENCODER.with_borrow_mut(|slot| {
        // Taken out while in use: an encoder that panicked is not used again.
        let mut encoder =
            slot.take().filter(|encoder| encoder.level() == level).unwrap_or_else(|| Encoder::new(level));
        let result = work(&mut encoder);
        *slot = Some(encoder);
        result
    })
}
