//! Content that can be opened as often as asked, and the streams of bytes that come out of it.
//!
//! A [`Blob`] is an opener, never a one-shot stream: any retry can start again. Bytes travel in bounded chunks
//! ([`CHUNK`]), and the end of what a pipeline produces is explicit ([`LayerStream`]): a dropped producer is never an end.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio::sync::mpsc;

use crate::digest::{Algorithm, Digest, Hasher};
use crate::engine::EngineError;
use crate::lent::LentError;
use crate::registry::RegistryError;

/// The size of the chunks that our own readers and writers pass on, in bytes.
pub const CHUNK: usize = 256 * 1024;

/// Bytes in order; the first error ends the stream.
pub type ByteStream = BoxStream<'static, Result<Bytes, BlobError>>;

/// Content that can be opened again.
#[async_trait::async_trait]
pub trait Blob: Send + Sync + fmt::Debug {
    /// Starts to read from the first byte.
    ///
    /// The stream ends without an error only after all bytes were delivered and, where the blob knows them, its size and
    /// digest were found right.
    async fn open(&self) -> Result<ByteStream, BlobError>;

    /// Starts to read behind the bytes that `read` has taken, and ends as [`open`](Self::open) does, which counts for all bytes. None
    /// where it is read from the first byte or not at all.
    async fn open_behind(&self, read: &Hasher) -> Result<Option<ByteStream>, BlobError> {
        let _ = read;
        Ok(None)
    }

    /// The size of the stored bytes, where it is known before they are read.
    fn size(&self) -> Option<u64>;

    /// A name under which two blobs of one source are equal exactly when their bytes are.
    fn identity(&self) -> String;

    /// Whether its bytes are in memory, so that they need not be fetched.
    fn is_at_hand(&self) -> bool {
        false
    }

    /// The last four bytes, not checked against anything: only ever a hint. None where they would cost more than they help.
    async fn tail(&self) -> Option<[u8; 4]> {
        None
    }
}

/// A shared opener.
pub type BlobRef = Arc<dyn Blob>;

/// Content that is at hand.
#[derive(Clone, Debug)]
pub struct MemoryBlob(Bytes);

impl MemoryBlob {
    /// These bytes, which are few: a config, a manifest.
    pub fn new(bytes: Bytes) -> Self {
        Self(bytes)
    }
}

#[async_trait::async_trait]
impl Blob for MemoryBlob {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        Ok(futures_util::stream::iter([Ok(self.0.clone())]).boxed())
    }

    fn size(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }

    fn is_at_hand(&self) -> bool {
        true
    }

    fn identity(&self) -> String {
        Digest::sha256(&self.0).to_string()
    }
}

/// Why content could not be read or stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// The registry or the way to it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A container engine or the way to it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A file or a spool.
    #[error("{what}: {source}")]
    Io {
        /// What was being done to which file.
        what: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file that another file names does not exist.
    #[error("{what} is missing")]
    Missing {
        /// Which.
        what: String,
    },
    /// The bytes are not those that were asked for.
    #[error("digest mismatch: expected {expected}, computed {computed} over {size} bytes")]
    Digest {
        /// What the descriptor says.
        expected: Digest,
        /// What the bytes hash to.
        computed: Digest,
        /// How many bytes were hashed.
        size: u64,
    },
    /// More or fewer bytes than the descriptor says.
    #[error("size mismatch: expected {expected} bytes, got {actual}")]
    Size {
        /// What the descriptor says.
        expected: u64,
        /// What came, at least.
        actual: u64,
    },
    /// The side that produces the bytes stopped before their end; its own error says why.
    #[error("the producer stopped before the end of the layer")]
    Interrupted,
    /// Who lends the content could not give or keep it.
    #[error(transparent)]
    Lent(#[from] LentError),
    /// What runs the pipeline in a service of its own moves bytes by means of its own, and those failed.
    #[error(transparent)]
    Host(Box<dyn std::error::Error + Send + Sync>),
}

/// The digest and size of bytes that have all passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobSummary {
    /// Of the bytes as stored.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
}

/// Buffers of [`CHUNK`] bytes that go round between the stages of one layer, so that none is allocated and cleared anew.
#[derive(Clone, Debug, Default)]
pub struct BufferPool(Arc<Mutex<Vec<BytesMut>>>);

impl BufferPool {
    /// Buffers kept for reuse; what comes back beyond it is freed.
    const KEPT: usize = 16;

    /// A buffer of [`CHUNK`] bytes with arbitrary content.
    pub fn take(&self) -> BytesMut {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffer = kept.unwrap_or_default();
        buffer.resize(CHUNK, 0);
        buffer
    }

    /// Gives a buffer back, if nobody else holds a part of it.
    pub fn give(&self, bytes: Bytes) {
        if let Ok(buffer) = bytes.try_into_mut() {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if buffer.capacity() >= CHUNK && kept.len() < Self::KEPT {
                kept.push(buffer);
            }
        }
    }
}

/// Bytes of a layer as a pipeline produces them, whose digest is known only once they have all passed.
#[derive(Debug)]
pub struct LayerStream {
    pieces: mpsc::Receiver<Piece>,
    pool: BufferPool,
    algorithm: Algorithm,
}

/// The producing side of a [`LayerStream`]. Dropped without [`LayerWriter::finish`], the stream fails.
#[derive(Debug)]
pub struct LayerWriter {
    pieces: mpsc::Sender<Piece>,
}

#[derive(Debug)]
enum Piece {
    Data(Bytes),
    End(BlobSummary),
}

/// What a [`LayerStream`] yields.
#[derive(Debug)]
pub enum LayerPiece {
    /// The next bytes.
    Data(Bytes),
    /// All bytes have passed; this was their sum. Nothing follows.
    End(BlobSummary),
}

/// The consumer of a [`LayerStream`] is gone; its own error says why.
#[derive(Debug, thiserror::Error)]
#[error("the consumer of the layer's bytes stopped")]
pub struct ConsumerGone;

impl LayerStream {
    /// A stream that holds at most `chunks` chunks between its two sides. Its consumer may give buffers back to `pool`.
    pub fn channel(chunks: usize, pool: BufferPool) -> (LayerWriter, Self) {
        let (sender, receiver) = mpsc::channel(chunks);
        (LayerWriter { pieces: sender }, Self { pieces: receiver, pool, algorithm: Algorithm::Sha256 })
    }

    /// The same, of a blob whose digest is by that algorithm.
    #[must_use]
    pub fn by(self, algorithm: Algorithm) -> Self {
        Self { algorithm, ..self }
    }

    /// The algorithm of the digest with which it ends.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Gives a chunk back that the consumer is done with.
    pub fn recycle(&self, bytes: Bytes) {
        self.pool.give(bytes);
    }

    /// The next piece.
    ///
    /// # Cancel safety
    /// Cancelled before it returns, it has taken nothing.
    pub async fn next(&mut self) -> Result<LayerPiece, BlobError> {
        Self::piece(self.pieces.recv().await)
    }

    /// The next piece, on a blocking thread.
    pub fn blocking_next(&mut self) -> Result<LayerPiece, BlobError> {
        Self::piece(self.pieces.blocking_recv())
    }

    /// Hands all bytes to `store`, on a blocking thread, and counts them as they pass.
    pub fn blocking_store<E: From<BlobError>>(
        &mut self,
        progress: &ByteCount,
        mut store: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<BlobSummary, E> {
        loop {
            match self.blocking_next()? {
                LayerPiece::Data(bytes) => {
                    store(&bytes)?;
                    progress.add(bytes.len() as u64);
                    self.recycle(bytes);
                }
                LayerPiece::End(summary) => return Ok(summary),
            }
        }
    }

    fn piece(piece: Option<Piece>) -> Result<LayerPiece, BlobError> {
        match piece {
            Some(Piece::Data(bytes)) => Ok(LayerPiece::Data(bytes)),
            Some(Piece::End(summary)) => Ok(LayerPiece::End(summary)),
            None => Err(BlobError::Interrupted),
        }
    }
}

impl LayerWriter {
    /// Hands over the next bytes, waiting for room.
    pub async fn send(&self, bytes: Bytes) -> Result<(), ConsumerGone> {
        self.pieces.send(Piece::Data(bytes)).await.map_err(|_| ConsumerGone)
    }

    /// [`send`](Self::send), on a blocking thread.
    pub fn blocking_send(&self, bytes: Bytes) -> Result<(), ConsumerGone> {
        self.pieces.blocking_send(Piece::Data(bytes)).map_err(|_| ConsumerGone)
    }

    /// Says that all bytes have passed.
    pub async fn finish(self, summary: BlobSummary) -> Result<(), ConsumerGone> {
        self.pieces.send(Piece::End(summary)).await.map_err(|_| ConsumerGone)
    }

    /// [`finish`](Self::finish), on a blocking thread.
    pub fn blocking_finish(self, summary: BlobSummary) -> Result<(), ConsumerGone> {
        self.pieces.blocking_send(Piece::End(summary)).map_err(|_| ConsumerGone)
    }
}

/// A count of bytes that one side adds to and another reads for its progress display.
#[derive(Clone, Debug, Default)]
pub struct ByteCount(Arc<AtomicU64>);

impl ByteCount {
    /// Adds bytes that have passed.
    pub fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes back bytes of an attempt that has to start again.
    pub fn reset(&self) {
        self.set(0);
    }

    /// Says how many bytes there are, where another process counts them.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    /// Bytes so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
