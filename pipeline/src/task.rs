//! One layer from its blob to its destination: fetch, decompress, filters in one pass, hash, compress, hash, store.
//!
//! Reading and storing wait on the network and are async; everything that computes runs on two threads of each layer's own
//! (one decompresses, one walks the tar and hashes) and on the compression pool. Bounded channels join them, so a slow
//! destination slows the source, and a layer of any size needs the same few megabytes.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use crate::blob::{BlobError, BlobSummary, BufferPool, ByteCount, ConsumerGone, LayerStream, LayerWriter};
use crate::codec::{Compressor, Decoder, Pool};
use crate::compression::{Compression, Format};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::element::{Layer, StoredLayer, WrittenLayer};
use crate::error::Error;
use crate::filter::FilterChain;
use crate::layer::{LayerError, LayerPass, LayerResult, Mode, PassOutcome, Plan};
use crate::manifest::Annotations;
use crate::output::{ImageOutput, LayerForm, Moved};
use crate::progress::{LayerProgress, LayerState};
use crate::spool::SpoolDir;
use crate::tar::Limits;
use crate::thread;

/// Chunks between two stages: about a megabyte.
const CHANNEL: usize = 4;
/// A layer is begun this often at most, when its upload is lost.
const ATTEMPTS: u32 = 3;

/// What is done with every layer of a job.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    /// The filters, in their order.
    pub chain: FilterChain,
    /// What the manifest gets besides: that of the image, or, where all of an index is meant, that of the index.
    pub annotations: Annotations,
    /// Where compression runs.
    pub pool: Pool,
    /// Where what has to wait is kept.
    pub spools: SpoolDir,
    /// What a tar may demand of its reader.
    pub limits: Limits,
    /// No layer may be larger than this uncompressed, in bytes.
    pub max_layer_size: u64,
    /// Decompress and check also what could be copied as it is.
    pub verify_diff_ids: bool,
}

/// How a layer gets to its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Its blob as it is, unread.
    Copy,
    /// Its blob as it is, and read on the way.
    CopyObserved,
    /// Filters look for something to edit first: without an edit, its blob as it is; else [`Way::Rewrite`].
    ScanFirst(Option<Compression>),
    /// A new tar, and compressed if so told.
    Rewrite(Option<Compression>),
    /// Read only; nothing is stored.
    Observe,
}

impl LayerPlan {
    /// Whether a layer that no filter edits can go to such an output as it is.
    pub fn may_keep(&self, form: LayerForm, layer: &Layer) -> bool {
        match form {
            LayerForm::Nothing => true,
            LayerForm::Tar => false,
            LayerForm::Stored { compression } => {
                layer.keep_stored && compression.is_none_or(|wanted| wanted.format() == layer.format)
            }
        }
    }

    fn way(&self, form: LayerForm, layer: &Layer) -> Way {
        let compression = match form {
            LayerForm::Nothing => return Way::Observe,
            LayerForm::Tar => return Way::Rewrite(None),
            LayerForm::Stored { compression } => compression,
        };
        if layer.is_foreign() && self.chain.is_empty() {
            // Its bytes are elsewhere, whatever they are compressed with.
            return Way::Copy;
        }
        let stored = layer.format;
        let keep = self.may_keep(form, layer);
        let edited = compression.or(match stored {
            Format::Gzip => Some(Compression::GZIP),
            Format::Zstd => Some(Compression::ZSTD),
            Format::None if layer.keep_stored => None,
            Format::None => Some(Compression::GZIP),
        });
        if !keep {
            Way::Rewrite(edited)
        } else if self.chain.edits() {
            Way::ScanFirst(edited)
        } else if !self.chain.is_empty()
            || (self.verify_diff_ids || layer.known_by_diff_id_alone) && layer.diff_id.is_some()
            || layer.lacks_diff_id()
        {
            Way::CopyObserved
        } else {
            Way::Copy
        }
    }

    /// Brings one layer to the output, trying again when the network fails.
    pub(crate) async fn run(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        if let Some(known) = self.known(output, layer, progress).await? {
            return Ok(known);
        }
        let mut attempt = 1;
        loop {
            progress.set(LayerState::Running);
            match self.run_once(output, layer, progress).await {
                Err(error) if error.is_worth_a_new_attempt() && attempt < ATTEMPTS => {
                    tracing::warn!(layer = layer.label(), attempt, %error, "layer failed; starting it again");
                    progress.bytes.reset();
                    let jitter = Duration::from_millis(fastrand::u64(0..500));
                    tokio::time::sleep(Duration::from_secs(1 << attempt) + jitter).await;
                    attempt += 1;
                }
                Ok(written) => {
                    if progress.state() == LayerState::Running {
                        progress.set(LayerState::Done);
                    }
                    return Ok(written);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What the output has of the layer from an earlier time.
    pub(crate) async fn known(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        progress: &LayerProgress,
    ) -> Result<Option<WrittenLayer>, Error> {
        let known = output.known_layer(layer, &self.chain).await?;
        if known.is_some() {
            progress.set(LayerState::Reused);
            tracing::info!("layer {} is there already, and is not fetched", layer.label());
        }
        Ok(known)
    }

    /// Brings one layer to the output, at one try.
    pub async fn run_once(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        let way = self.way(output.form(), layer);
        // What filters make of a foreign layer would be stored where its owner does not want it to be.
        let is_pushed = matches!(output.form(), LayerForm::Stored { .. });
        if layer.is_foreign() && is_pushed && matches!(way, Way::ScanFirst(_) | Way::Rewrite(_)) {
            let urls = layer.descriptor.iter().flat_map(|descriptor| descriptor.urls.iter().cloned());
            return Err(Error::Foreign(urls.collect::<Vec<_>>().join(", ")));
        }
        match way {
            Way::Copy => self.copy(output, layer, progress).await,
            Way::CopyObserved => self.copy_observed(output, layer, progress).await,
            Way::ScanFirst(compression) => self.scan_first(output, layer, compression, progress).await,
            Way::Rewrite(compression) => self.rewrite(output, layer, compression, progress).await,
            Way::Observe => {
                // Nothing is made of what is read, and the blob's own digest says that it is the right one.
                let is_vouched = layer.descriptor.is_some() && !layer.known_by_diff_id_alone;
                let known = layer.diff_id.clone().filter(|_| is_vouched && !self.verify_diff_ids);
                let (summary, _) = self.observe(layer, None, known, progress).await?;
                written(layer, StoredLayer::Original, summary)
            }
        }
    }

    async fn copy(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        if output.copy_layer(layer, &progress.bytes).await? == Moved::Nothing {
            progress.set(LayerState::Reused);
            tracing::info!(
                "layer {} is there already, or was mounted from another repository",
                layer.label()
            );
        }
        Ok(WrittenLayer {
            index: layer.index,
            stored: StoredLayer::Original,
            diff_id: layer.diff_id.clone(),
            edited: false,
            reports: Vec::new(),
        })
    }

    /// Stores the blob as it is while a pass reads it.
    async fn copy_observed(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        if output.has_layer(layer).await? {
            let (summary, _) = self.observe(layer, None, None, progress).await?;
            progress.set(LayerState::Reused);
            tracing::info!("layer {} is there already", layer.label());
            return written(layer, StoredLayer::Original, summary);
        }
        let (writer, mut stream) = LayerStream::channel(CHANNEL, BufferPool::default());
        if let Some(descriptor) = &layer.descriptor {
            stream = stream.by(descriptor.digest.algorithm());
        }
        let ignored = ByteCount::default();
        let (summary, stored) = tokio::join!(
            self.observe(layer, Some(writer), None, progress),
            output.write_layer(layer.index, stream, layer.format, &ignored),
        );
        let ((summary, _), stored) = both(summary, stored)?;
        let stored = if layer.descriptor.is_some() { StoredLayer::Original } else { stored };
        written(layer, stored, summary)
    }

    /// Finds out whether any filter edits the layer before anything is compressed.
    async fn scan_first(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        compression: Option<Compression>,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        let (input, feed) = self.feed(layer, None, &progress.bytes);
        let (decoded, decoder) = self.decode(input, BufferPool::default());
        let ((), _, outcome) = tokio::join!(feed, decoder, self.walk(decoded, Mode::Scan, None));
        progress.bytes.reset();
        match outcome? {
            PassOutcome::Done(summary) => {
                verify_diff_id(layer, &summary)?;
                let mut copied = match &layer.descriptor {
                    Some(_) => self.copy(output, layer, progress).await?,
                    // How large it is, and so what is to be said of it in a manifest, is known when it has gone by. The filters have seen it.
                    None => self.without_filters().copy_observed(output, layer, progress).await?,
                };
                copied.diff_id = Some(summary.input.digest.clone());
                copied.reports = summary.reports;
                Ok(copied)
            }
            PassOutcome::NeedsRewrite { .. } | PassOutcome::NeedsRestart(_) => {
                self.rewrite(output, layer, compression, progress).await
            }
        }
    }

    fn without_filters(&self) -> Self {
        Self { chain: FilterChain::default(), ..self.clone() }
    }

    /// A new tar through all filters, begun again if a filter has to know of something that lies behind.
    async fn rewrite(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        compression: Option<Compression>,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        let mut tar_plan = Plan::default();
        for _ in 0..=Plan::most_restarts(&self.chain) {
            let buffers = BufferPool::default();
            let (writer, stream) = LayerStream::channel(CHANNEL, buffers.clone());
            let (input, feed) = self.feed(layer, None, &progress.bytes);
            let (tar, decoder) = self.decode(input, buffers.clone());
            let walk = self.write_tar(tar, tar_plan, compression, buffers, writer);
            let format = compression.map_or(Format::None, Compression::format);
            let ignored = ByteCount::default();
            let store = output.write_layer(layer.index, stream, format, &ignored);
            let ((), _, outcome, stored) = tokio::join!(feed, decoder, walk, store);
            match outcome {
                Ok(PassOutcome::NeedsRestart(next)) => {
                    tar_plan = next;
                    progress.bytes.reset();
                }
                Ok(PassOutcome::NeedsRewrite { .. }) => unreachable!("only a scan asks for a rewrite"),
                Ok(PassOutcome::Done(result)) => {
                    let (result, stored) = both(Ok(result), stored)?;
                    return written(layer, stored, result);
                }
                Err(error) => return Err(both::<(), _>(Err(error), stored).expect_err("one half has failed")),
            }
        }
        Err(LayerError::Restarts { passes: Plan::most_restarts(&self.chain) + 1 }.into())
    }

    /// Walks a tar on a thread of its own and writes what the filters leave of it, compressed if so told.
    async fn write_tar(
        &self,
        tar: Tar,
        tar_plan: Plan,
        compression: Option<Compression>,
        buffers: BufferPool,
        writer: LayerWriter,
    ) -> Result<PassOutcome, Error> {
        let (chain, limits, spools) = (self.chain.clone(), self.limits.clone(), self.spools.clone());
        let pool = self.pool.clone();
        thread::run("walk", move || {
            let pass = LayerPass::new(&chain, Mode::Rewrite, &limits, &spools).with_plan(tar_plan);
            match compression {
                // Without filters nothing needs to know what is in the tar.
                None if chain.is_empty() => forward(tar, writer),
                None => {
                    let mut out = Chunks::new(buffers, writer);
                    let outcome = pass.run(tar, &mut out)?;
                    out.finish(outcome)
                }
                Some(compression) => {
                    let mut out = Compressed::new(compression, &pool, writer)?;
                    let outcome =
                        if chain.is_empty() { hash_into(tar, &mut out)? } else { pass.run(tar, &mut out)? };
                    out.finish(outcome)
                }
            }
        })
        .await?
    }

    /// Reads a layer without storing it: what the filters report of it, and what it is really compressed with. A diff_id that is
    /// `known` is not computed.
    pub(crate) async fn observe(
        &self,
        layer: &Layer,
        copy: Option<LayerWriter>,
        known: Option<Digest>,
        progress: &LayerProgress,
    ) -> Result<(LayerResult, Format), Error> {
        let (input, feed) = self.feed(layer, copy, &progress.bytes);
        let (decoded, decoder) = self.decode(input, BufferPool::default());
        let ((), format, outcome) = tokio::join!(feed, decoder, self.walk(decoded, Mode::Observe, known));
        match outcome? {
            PassOutcome::Done(summary) => Ok((summary, format.unwrap_or(Format::None))),
            PassOutcome::NeedsRewrite { .. } | PassOutcome::NeedsRestart(_) => {
                unreachable!("a pass that only observes edits nothing")
            }
        }
    }

    /// Reads the stored bytes of a layer to their end, which checks their digest and size.
    pub(crate) async fn read_blob(&self, layer: &Layer, progress: &LayerProgress) -> Result<(), Error> {
        let mut stream = layer.blob.open().await?;
        while let Some(bytes) = stream.next().await {
            progress.bytes.add(bytes?.len() as u64);
        }
        Ok(())
    }
}

// --- The stages, from the blob's bytes to the writer of the output. ---

impl LayerPlan {
    /// Reads the stored bytes into a bounded channel, counting them, and passes them on to `copy` if there is one.
    fn feed(
        &self,
        layer: &Layer,
        mut copy: Option<LayerWriter>,
        count: &ByteCount,
    ) -> (Input, impl Future<Output = ()> + use<>) {
        let (sender, receiver) = mpsc::channel(CHANNEL);
        let (layer, count) = (layer.clone(), count.clone());
        let feed = async move {
            if let Err(error) = feed_into(&layer, &sender, &mut copy, &count).await {
                // The reader's end of this channel reports it; when that is gone, it has its own error.
                let _ = sender.send(Feed::Failed(error)).await;
            }
        };
        (Input { pieces: receiver, current: Bytes::new(), ended: false }, feed)
    }

    /// Decompresses on a thread of its own, so that one layer can use two cores.
    fn decode(
        &self,
        input: Input,
        buffers: BufferPool,
    ) -> (Tar, impl Future<Output = Option<Format>> + use<>) {
        let (sender, receiver) = sync_channel(CHANNEL);
        let limit = self.max_layer_size;
        let tar = Tar {
            pieces: receiver,
            current: Bytes::new(),
            position: 0,
            buffers: buffers.clone(),
            ended: false,
        };
        let task = async move {
            let failed = sender.clone();
            let decoded = thread::run("decode", move || {
                let mut decoder = Decoder::new(input).limit(limit);
                if let Err(error) = decode_into(&mut decoder, &buffers, &sender) {
                    let _ = sender.send(Decoded::Failed(error));
                }
                decoder.format().ok()
            });
            decoded.await.unwrap_or_else(|error| {
                // No thread, so nothing was sent, and there is room for this.
                let _ = failed.try_send(Decoded::Failed(io::Error::other(error)));
                None
            })
        };
        (tar, task)
    }

    /// One pass over a tar, on a thread of its own. A digest that is `known` is not computed.
    async fn walk(&self, tar: Tar, mode: Mode, known: Option<Digest>) -> Result<PassOutcome, Error> {
        let (chain, limits, spools) = (self.chain.clone(), self.limits.clone(), self.spools.clone());
        thread::run("walk", move || {
            let pass = LayerPass::new(&chain, mode, &limits, &spools).with_known(known);
            Ok(pass.run(tar, &mut io::sink())?)
        })
        .await?
    }
}

async fn feed_into(
    layer: &Layer,
    sender: &mpsc::Sender<Feed>,
    copy: &mut Option<LayerWriter>,
    count: &ByteCount,
) -> Result<(), BlobError> {
    let mut stream = layer.blob.open().await?;
    // Only an old image without descriptors has to be hashed here: the blob itself has checked its bytes.
    let mut hasher = (copy.is_some() && layer.descriptor.is_none()).then(|| Hasher::new(Algorithm::Sha256));
    while let Some(bytes) = stream.next().await {
        let bytes = bytes?;
        count.add(bytes.len() as u64);
        if let Some(hasher) = &mut hasher {
            hasher.update(&bytes);
        }
        if let Some(writer) = copy {
            writer.send(bytes.clone()).await.map_err(|ConsumerGone| BlobError::Interrupted)?;
        }
        if sender.send(Feed::Data(bytes)).await.is_err() {
            return Err(BlobError::Interrupted);
        }
    }
    if let Some(writer) = copy.take() {
        let summary = match (hasher, &layer.descriptor) {
            (Some(hasher), _) => BlobSummary { size: hasher.size(), digest: hasher.finish() },
            (None, Some(descriptor)) => {
                BlobSummary { digest: descriptor.digest.clone(), size: descriptor.size }
            }
            (None, None) => unreachable!("a copy without a descriptor is hashed"),
        };
        writer.finish(summary).await.map_err(|ConsumerGone| BlobError::Interrupted)?;
    }
    let _ = sender.send(Feed::End).await;
    Ok(())
}

enum Feed {
    Data(Bytes),
    Failed(BlobError),
    End,
}

/// The stored bytes of a layer, for a blocking thread.
struct Input {
    pieces: mpsc::Receiver<Feed>,
    current: Bytes,
    ended: bool,
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Feed::Data(bytes)) => self.current = bytes,
                Some(Feed::Failed(error)) => return Err(io::Error::other(error)),
                Some(Feed::End) => self.ended = true,
                // A dropped feed is a cancelled job, never an end.
                None => return Err(io::Error::other(BlobError::Interrupted)),
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, count: usize) {
        self.current.advance(count);
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

enum Decoded {
    Data(Bytes),
    Failed(io::Error),
    End,
}

fn decode_into(
    decoder: &mut impl Read,
    buffers: &BufferPool,
    sender: &SyncSender<Decoded>,
) -> io::Result<()> {
    loop {
        let mut buffer = buffers.take();
        let mut filled = 0;
        while filled < buffer.len() {
            match decoder.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            let _ = sender.send(Decoded::End);
            return Ok(());
        }
        buffer.truncate(filled);
        if sender.send(Decoded::Data(buffer.freeze())).is_err() {
            // The walker stopped early: it has found what it looked for, or its own error.
            return Ok(());
        }
    }
}

/// The uncompressed bytes of a layer, for the thread that walks them.
struct Tar {
    pieces: Receiver<Decoded>,
    /// Kept whole until it is read, so that its buffer can go round.
    current: Bytes,
    position: usize,
    buffers: BufferPool,
    ended: bool,
}

impl Tar {
    /// The next chunk; None at the end of the layer.
    fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        if self.ended {
            return Ok(None);
        }
        match self.pieces.recv() {
            Ok(Decoded::Data(bytes)) => Ok(Some(bytes)),
            Ok(Decoded::Failed(error)) => Err(error),
            Ok(Decoded::End) => {
                self.ended = true;
                Ok(None)
            }
            Err(_) => Err(io::Error::other(BlobError::Interrupted)),
        }
    }
}

impl BufRead for Tar {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.current.len() {
            self.buffers.give(std::mem::take(&mut self.current));
            self.position = 0;
            self.current = self.chunk()?.unwrap_or_default();
        }
        Ok(&self.current[self.position..])
    }

    fn consume(&mut self, count: usize) {
        self.position += count;
    }
}

impl Read for Tar {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// Passes a plain tar on as it is, hashed: without filters nothing needs to know what is in it.
fn forward(mut tar: Tar, writer: LayerWriter) -> Result<PassOutcome, Error> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    while let Some(bytes) = tar.chunk().map_err(|error| LayerError::read(hasher.size(), error))? {
        hasher.update(&bytes);
        writer.blocking_send(bytes).map_err(gone)?;
    }
    let summary = BlobSummary { size: hasher.size(), digest: hasher.finish() };
    writer.blocking_finish(summary.clone()).map_err(gone)?;
    Ok(PassOutcome::Done(LayerResult::untouched(summary)))
}

/// The same into a compressor.
fn hash_into(mut tar: Tar, out: &mut Compressed) -> Result<PassOutcome, Error> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    while let Some(bytes) = tar.chunk().map_err(|error| LayerError::read(hasher.size(), error))? {
        hasher.update(&bytes);
        out.write_all(&bytes).map_err(LayerError::Output)?;
        tar.buffers.give(bytes);
    }
    let summary = BlobSummary { size: hasher.size(), digest: hasher.finish() };
    Ok(PassOutcome::Done(LayerResult::untouched(summary)))
}

fn gone(ConsumerGone: ConsumerGone) -> Error {
    Error::Blob(BlobError::Interrupted)
}

fn interrupted(ConsumerGone: ConsumerGone) -> io::Error {
    io::Error::other(BlobError::Interrupted)
}

/// Gathers a tar into chunks for the output.
struct Chunks {
    buffers: BufferPool,
    writer: LayerWriter,
    current: BytesMut,
    filled: usize,
}

impl Chunks {
    fn new(buffers: BufferPool, writer: LayerWriter) -> Self {
        Self { current: buffers.take(), buffers, writer, filled: 0 }
    }

    fn send(&mut self) -> io::Result<()> {
        let mut full = std::mem::replace(&mut self.current, self.buffers.take());
        full.truncate(self.filled);
        self.filled = 0;
        self.writer.blocking_send(full.freeze()).map_err(interrupted)
    }

    fn finish(mut self, outcome: PassOutcome) -> Result<PassOutcome, Error> {
        if let PassOutcome::Done(summary) = &outcome {
            if self.filled > 0 {
                self.send().map_err(LayerError::Output)?;
            }
            self.writer.blocking_finish(summary.output.clone()).map_err(gone)?;
        }
        Ok(outcome)
    }
}

impl Write for Chunks {
    fn write(&mut self, written: &[u8]) -> io::Result<usize> {
        let mut bytes = written;
        while !bytes.is_empty() {
            let count = bytes.len().min(self.current.len() - self.filled);
            self.current[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled == self.current.len() {
                self.send()?;
            }
        }
        Ok(written.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Compresses a tar for the output, and hashes what comes of it.
struct Compressed {
    compressor: Compressor,
    hasher: Hasher,
    writer: LayerWriter,
}

impl Compressed {
    fn new(compression: Compression, pool: &Pool, writer: LayerWriter) -> Result<Self, Error> {
        let compressor =
            Compressor::new(compression, pool).map_err(|error| LayerError::Output(error.into()))?;
        Ok(Self { compressor, hasher: Hasher::new(Algorithm::Sha256), writer })
    }

    fn finish(mut self, outcome: PassOutcome) -> Result<PassOutcome, Error> {
        if let PassOutcome::Done(_) = &outcome {
            let (hasher, writer) = (&mut self.hasher, &self.writer);
            self.compressor
                .finish(&mut |bytes| send_hashed(hasher, writer, bytes))
                .map_err(LayerError::Output)?;
            let summary = BlobSummary { size: self.hasher.size(), digest: self.hasher.finish() };
            self.writer.blocking_finish(summary).map_err(gone)?;
        }
        Ok(outcome)
    }
}

impl Write for Compressed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (hasher, writer) = (&mut self.hasher, &self.writer);
        self.compressor.write(bytes, &mut |bytes| send_hashed(hasher, writer, bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn send_hashed(hasher: &mut Hasher, writer: &LayerWriter, bytes: Bytes) -> io::Result<()> {
    hasher.update(&bytes);
    writer.blocking_send(bytes).map_err(interrupted)
}

/// Both halves of a layer, or the error of the half that failed first: the other's then is only that it was interrupted.
pub(crate) fn both<A, B>(produced: Result<A, Error>, stored: Result<B, Error>) -> Result<(A, B), Error> {
    match (produced, stored) {
        (Ok(produced), Ok(stored)) => Ok((produced, stored)),
        (Err(error), Err(other)) => Err(if error.is_interrupted() { other } else { error }),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
    }
}

fn verify_diff_id(layer: &Layer, summary: &LayerResult) -> Result<(), Error> {
    match &layer.diff_id {
        Some(expected) if *expected != summary.input.digest => {
            Err(Error::DiffId { expected: expected.clone(), computed: summary.input.digest.clone() })
        }
        _ => Ok(()),
    }
}

fn written(layer: &Layer, stored: StoredLayer, summary: LayerResult) -> Result<WrittenLayer, Error> {
    verify_diff_id(layer, &summary)?;
    Ok(WrittenLayer {
        index: layer.index,
        stored,
        diff_id: Some(summary.output.digest),
        edited: summary.edited,
        reports: summary.reports,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::blob::MemoryBlob;
    use crate::manifest::{Descriptor, Family, LayerType};
    use crate::output::nothing::NoOutput;
    use crate::progress::Progress;

    fn plan(filters: &[&str]) -> LayerPlan {
        LayerPlan {
            annotations: Annotations::default(),
            chain: FilterChain::parse(filters).unwrap(),
            pool: Pool::shared().clone(),
            spools: SpoolDir::new(std::env::temp_dir(), 1 << 20),
            limits: Limits::default(),
            max_layer_size: 1 << 20,
            verify_diff_ids: false,
        }
    }

    fn layer(format: Format) -> Layer {
        let media_type = LayerType::new(Family::Oci, format).name().unwrap();
        Layer {
            index: 0,
            blob: Arc::new(MemoryBlob::new(Bytes::new())),
            descriptor: Some(Descriptor::new(media_type, &Digest::sha256(b""), 0)),
            format,
            diff_id: Some(Digest::sha256(b"")),
            origin: None,
            keep_stored: true,
            known_by_diff_id_alone: false,
        }
    }

    const KEEP: LayerForm = LayerForm::Stored { compression: None };
    const ZSTD: LayerForm = LayerForm::Stored { compression: Some(Compression::ZSTD) };

    #[test]
    fn an_unfiltered_layer_is_copied_unread() {
        for format in [Format::Gzip, Format::Zstd, Format::None] {
            assert_eq!(plan(&[]).way(KEEP, &layer(format)), Way::Copy);
        }
        assert_eq!(plan(&[]).way(ZSTD, &layer(Format::Zstd)), Way::Copy);
    }

    #[test]
    fn a_layer_is_recompressed_only_to_another_format_or_when_it_was_unpacked_to_be_saved() {
        assert_eq!(plan(&[]).way(ZSTD, &layer(Format::Gzip)), Way::Rewrite(Some(Compression::ZSTD)));
        let saved = Layer { descriptor: None, keep_stored: false, ..layer(Format::None) };
        assert_eq!(plan(&[]).way(KEEP, &saved), Way::Rewrite(Some(Compression::GZIP)));
    }

    #[test]
    fn filters_that_only_observe_keep_the_blob() {
        let filters = ["search:pattern=*", "inspect:file=x"];
        assert_eq!(plan(&filters).way(KEEP, &layer(Format::Gzip)), Way::CopyObserved);
        assert_eq!(plan(&filters).way(LayerForm::Nothing, &layer(Format::Gzip)), Way::Observe);
    }

    #[test]
    fn filters_that_edit_look_first_and_keep_the_format() {
        let plan = plan(&["exclude:pattern=x"]);
        assert_eq!(plan.way(KEEP, &layer(Format::Gzip)), Way::ScanFirst(Some(Compression::GZIP)));
        assert_eq!(plan.way(KEEP, &layer(Format::Zstd)), Way::ScanFirst(Some(Compression::ZSTD)));
        assert_eq!(plan.way(KEEP, &layer(Format::None)), Way::ScanFirst(None));
        assert_eq!(plan.way(LayerForm::Tar, &layer(Format::Gzip)), Way::Rewrite(None));
    }

    #[test]
    fn an_old_image_is_read_to_learn_its_diff_ids_and_an_artifact_is_not() {
        let old = Layer { descriptor: None, diff_id: None, ..layer(Format::Gzip) };
        assert_eq!(plan(&[]).way(KEEP, &old), Way::CopyObserved);
        let verifying = LayerPlan { verify_diff_ids: true, ..plan(&[]) };
        assert_eq!(verifying.way(KEEP, &layer(Format::Gzip)), Way::CopyObserved);
        let saved = Layer { known_by_diff_id_alone: true, ..layer(Format::Gzip) };
        assert_eq!(
            plan(&[]).way(KEEP, &saved),
            Way::CopyObserved,
            "only its diff_id tells whether it is the right one"
        );
        let artifact = Layer { diff_id: None, ..layer(Format::None) };
        assert_eq!(verifying.way(KEEP, &artifact), Way::Copy);
    }

    #[test]
    fn a_foreign_layer_stays_where_it_is() {
        let media_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        let descriptor = Some(Descriptor::new(media_type, &Digest::sha256(b""), 0));
        let foreign = Layer { descriptor, ..layer(Format::Gzip) };
        assert_eq!(plan(&[]).way(ZSTD, &foreign), Way::Copy);
    }

    /// Each stage has a thread of its own, so no number of layers can keep the next stage of any from beginning.
    #[test]
    fn a_pool_without_free_threads_holds_no_layer_up() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_time()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let (release, held) = sync_channel::<()>(0);
        runtime.spawn_blocking(move || held.recv());
        let blob = Arc::new(MemoryBlob::new(Bytes::from(vec![0; 4 << 20])));
        let layer = Layer { blob, descriptor: None, diff_id: None, ..layer(Format::None) };
        let plan = LayerPlan { max_layer_size: 8 << 20, ..plan(&[]) };
        let progress = Progress::default();
        progress.begin([(layer.label(), None)].into_iter());
        let observed = runtime.block_on(async {
            let observing = plan.observe(&layer, None, None, &progress.layers()[0]);
            tokio::time::timeout(Duration::from_secs(20), observing).await
        });
        drop(release);
        runtime.shutdown_background();
        assert_eq!(observed.expect("it is read").unwrap().0.input.size, 4 << 20);
    }

    /// A layer that is only read is the right one when its blob's digest says so; where nothing but a diff_id says it, that is computed.
    #[tokio::test]
    async fn one_digest_is_enough_for_a_layer_that_is_only_read() {
        let tar = Bytes::from(vec![0; 1024]);
        let lied = Some(Digest::sha256(b"of something else"));
        let mut layer = Layer { blob: Arc::new(MemoryBlob::new(tar.clone())), ..layer(Format::None) };
        let progress = Progress::default();
        progress.begin([(layer.label(), None)].into_iter());
        let progress = &progress.layers()[0];
        let (searching, inspecting) = (plan(&["search:pattern=*"]), plan(&["inspect:file=-"]));

        layer.diff_id = lied;
        assert!(searching.run_once(&NoOutput, &layer, progress).await.is_ok());
        let is_wrong = |result| matches!(result, Err(Error::DiffId { .. }));
        assert!(is_wrong(inspecting.run_once(&NoOutput, &layer, progress).await), "it tells digests");
        let verifying = LayerPlan { verify_diff_ids: true, ..searching.clone() };
        assert!(is_wrong(verifying.run_once(&NoOutput, &layer, progress).await));
        let told = Layer { known_by_diff_id_alone: true, ..layer.clone() };
        assert!(is_wrong(searching.run_once(&NoOutput, &told, progress).await));
        layer.descriptor = None;
        assert!(is_wrong(searching.run_once(&NoOutput, &layer, progress).await));
        layer.diff_id = Some(Digest::sha256(&tar));
        assert!(searching.run_once(&NoOutput, &layer, progress).await.is_ok());
    }

    #[test]
    fn a_cancelled_feed_is_not_an_end() {
        let (sender, pieces) = mpsc::channel(1);
        drop(sender);
        let mut input = Input { pieces, current: Bytes::new(), ended: false };
        let error = input.read(&mut [0]).unwrap_err();
        assert!(matches!(error.get_ref().and_then(|e| e.downcast_ref()), Some(BlobError::Interrupted)));
    }
}
