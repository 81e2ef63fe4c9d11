//! A gzip member (RFC 1952) whose blocks are compressed in parallel.
//!
//! The input is cut into blocks of [`BLOCK`] bytes, whatever the writes were. Each is deflated on the pool with the 32 KiB
//! before it as preset dictionary and ends on a byte boundary, so that their concatenation is one deflate stream.

use std::collections::VecDeque;
use std::mem;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};

use bytes::Bytes;
use flate2::Crc;

use super::deflate::{self, BLOCK, Window};
use super::{CodecError, Pool};

/// Magic, deflate, no flags, no time, no extra flags, unknown operating system.
///
/// XFL and OS are fixed whatever the level and the machine, as is the time: the same content has the same bytes.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];

/// How many bytes of input may be in flight for one layer.
const IN_FLIGHT: usize = 6 * 1024 * 1024;

/// Compresses one layer.
#[derive(Debug)]
pub(super) struct GzipWriter {
    level: u8,
    pool: Pool,
    /// The block that is being filled.
    window: Window,
    /// Windows to use again.
    spare: Vec<Window>,
    /// What the pool still owes, oldest first; filled in as answers come.
    pending: VecDeque<Option<Block>>,
    /// The number of the block at the front of `pending`.
    front: u64,
    max_pending: usize,
    answers: (SyncSender<Answer>, Receiver<Answer>),
    cancelled: Arc<AtomicBool>,
    crc: Crc,
    header_sent: bool,
    size: u64,
}

/// A block that the pool has compressed.
#[derive(Debug)]
struct Block {
    deflated: Vec<u8>,
    crc: Crc,
    window: Window,
}

#[derive(Debug)]
struct Answer {
    number: u64,
    /// None when the encoder panicked.
    block: Option<Block>,
}

impl GzipWriter {
    pub(super) fn new(level: u8, pool: &Pool) -> Self {
        // One block is being compressed and one waits for each thread; past the bound, threads of a large machine
        // serve other layers.
        let max_pending = (2 * pool.threads() + 1).min(IN_FLIGHT / BLOCK);
        Self {
            level,
            pool: pool.clone(),
            window: Window::new(),
            spare: Vec::new(),
            pending: VecDeque::with_capacity(max_pending),
            front: 0,
            max_pending,
            // An answer never waits for room, so that threads of the pool never wait for a layer's caller.
            answers: sync_channel(max_pending),
            cancelled: Arc::default(),
            crc: Crc::new(),
            header_sent: false,
            size: 0,
        }
    }

    pub(super) fn write<E: From<CodecError>>(
        &mut self,
        mut bytes: &[u8],
        out: &mut dyn FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            // A full block waits for the byte after it: only then is it known not to be the last.
            if self.window.is_full() {
                while self.pending.len() >= self.max_pending {
                    self.wait(out)?;
                }
                self.dispatch(false);
                self.collect(out)?;
            }
            let taken = self.window.fill(bytes);
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    pub(super) fn finish<E: From<CodecError>>(
        mut self,
        out: &mut dyn FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.pending.len() >= self.max_pending {
            self.wait(out)?;
        }
        self.dispatch(true);
        while !self.pending.is_empty() {
            self.wait(out)?;
        }
        let mut trailer = Vec::with_capacity(8);
        trailer.extend_from_slice(&self.crc.sum().to_le_bytes());
        // ISIZE is the size modulo 2^32 (RFC 1952, 2.3.1).
        trailer.extend_from_slice(&self.size.to_le_bytes()[..4]);
        out(trailer.into())
    }

    /// Gives the current block to the pool and starts the next one.
    fn dispatch(&mut self, last: bool) {
        let mut next = self.spare.pop().unwrap_or_default();
        next.restart(&self.window);
        let window = mem::replace(&mut self.window, next);
        let number = self.front + self.pending.len() as u64;
        self.pending.push_back(None);
        self.size += window.input().len() as u64;
        let (level, answers) = (self.level, self.answers.0.clone());
        let cancelled = Arc::clone(&self.cancelled);
        self.pool.spawn(move || {
            if cancelled.load(Ordering::Relaxed) {
                return;
            }
            let block = panic::catch_unwind(AssertUnwindSafe(|| compress(level, window, last))).ok();
            // The writer may be gone; then nobody wants the block.
            let _ = answers.send(Answer { number, block });
        });
    }

    /// Passes on what is ready.
    fn collect<E: From<CodecError>>(&mut self, out: &mut dyn FnMut(Bytes) -> Result<(), E>) -> Result<(), E> {
        loop {
            match self.answers.1.try_recv() {
                Ok(answer) => self.accept(answer, out)?,
                // The writer holds a sender itself.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Waits for one answer of the pool.
    fn wait<E: From<CodecError>>(&mut self, out: &mut dyn FnMut(Bytes) -> Result<(), E>) -> Result<(), E> {
        let answer = self.answers.1.recv().map_err(|_| CodecError::Panicked)?;
        self.accept(answer, out)
    }

    fn accept<E: From<CodecError>>(
        &mut self,
        answer: Answer,
        out: &mut dyn FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        let block = answer.block.ok_or(CodecError::Panicked)?;
        let place = usize::try_from(answer.number - self.front).unwrap_or(usize::MAX);
        self.pending[place] = Some(block);
        while let Some(Some(block)) = self.pending.front_mut().map(Option::take) {
            self.pending.pop_front();
            self.front += 1;
            self.crc.combine(&block.crc);
            self.spare.push(block.window);
            if !mem::replace(&mut self.header_sent, true) {
                out(Bytes::from_static(&HEADER))?;
            }
            out(block.deflated.into())?;
        }
        Ok(())
    }
}

impl Drop for GzipWriter {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

fn compress(level: u8, window: Window, last: bool) -> Block {
    let mut crc = Crc::new();
    crc.update(window.input());
    let deflated = deflate::with_encoder(level, |encoder| encoder.compress_block(&window, last).to_vec());
    Block { deflated, crc, window }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_on_the_pool_is_an_error_of_the_writer() {
        let mut writer = GzipWriter::new(1, Pool::shared());
        writer.pending.push_back(None);
        writer.answers.0.send(Answer { number: 0, block: None }).expect("there is room");
        let mut out = |_: Bytes| Ok::<_, CodecError>(());
        assert_eq!(writer.finish(&mut out), Err(CodecError::Panicked));
    }
}
