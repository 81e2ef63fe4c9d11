//! One layer from its blob to its destination: fetch, decompress, filters in one pass, hash, compress, hash, store.
//!
//! Reading and storing wait on the network and are async; everything that computes runs on two blocking threads a layer
//! (one decompresses, one walks the tar and hashes) and on the compression pool. Bounded channels join them, so a slow
//! destination slows the source, and a layer of any size needs the same few megabytes.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use crate::blob::{BlobError, BlobSummary, BufferPool, ByteCount, ConsumerGone, LayerStream, LayerWriter};
use crate::codec::{CodecError, Compressor, Decoder, Pool};
use crate::compression::{Compression, Format};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::element::{Layer, StoredLayer, WrittenLayer};
use crate::error::Error;
use crate::filter::Chain;
use crate::layer::{LayerError, LayerPass, Mode, PassOutcome, PassSummary, Restart, TarOut};
use crate::output::{ImageOutput, LayerForm};
use crate::progress::{LayerProgress, LayerState};
use crate::spool::SpoolDir;

/// Chunks between two stages: about a megabyte.
const CHANNEL: usize = 4;
/// A layer is begun this often at most, when the network fails it.
const ATTEMPTS: u32 = 3;

/// What is done with every layer of a job.
#[derive(Debug)]
pub struct LayerPlan {
    /// The filters, in their order.
    pub chain: Chain,
    /// Where compression runs.
    pub pool: Pool,
    /// Where what has to wait is kept.
    pub spools: SpoolDir,
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
    /// Filters look for something to edit first: without an edit, [`Way::CopyObserved`]; else [`Way::Rewrite`].
    ScanFirst(Option<Compression>),
    /// A new tar, and compressed if so told.
    Rewrite(Option<Compression>),
    /// Read only; nothing is stored.
    Observe,
}

impl LayerPlan {
    fn way(&self, form: LayerForm, layer: &Layer) -> Way {
        let compression = match form {
            LayerForm::Nothing => return Way::Observe,
            LayerForm::Tar => return Way::Rewrite(None),
            LayerForm::Stored { compression } => compression,
        };
        let stored = layer.format();
        let keep = layer.keep_stored && compression.is_none_or(|wanted| wanted.format() == stored);
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
        } else if !self.chain.is_empty() || self.verify_diff_ids || layer.diff_id_is_wanted() {
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
        let mut attempt = 1;
        loop {
            progress.set(LayerState::Running);
            match self.attempt(output, layer, progress).await {
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
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

    async fn attempt(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        let way = self.way(output.form(), layer);
        if layer.is_foreign() && way != Way::Copy {
            let urls = layer.descriptor.iter().flat_map(|descriptor| descriptor.urls.iter().cloned());
            return Err(Error::Foreign(urls.collect::<Vec<_>>().join(", ")));
        }
        match way {
            Way::Copy => self.copy(output, layer, progress).await,
            Way::CopyObserved => self.copy_observed(output, layer, progress).await,
            Way::ScanFirst(compression) => self.scan_first(output, layer, compression, progress).await,
            Way::Rewrite(compression) => self.rewrite(output, layer, compression, progress).await,
            Way::Observe => {
                let summary = self.observe(layer, None, Mode::Observe, progress).await?;
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
        if output.has_layer(layer).await? {
            progress.set(LayerState::Reused);
        } else {
            output.copy_layer(layer, &progress.bytes).await?;
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
            let summary = self.observe(layer, None, Mode::Observe, progress).await?;
            progress.set(LayerState::Reused);
            return written(layer, StoredLayer::Original, summary);
        }
        let (writer, stream) = LayerStream::channel(CHANNEL, BufferPool::default());
        let ignored = ByteCount::default();
        let (summary, stored) = tokio::join!(
            self.observe(layer, Some(writer), Mode::Observe, progress),
            output.write_layer(layer.index, stream, layer.format(), &ignored),
        );
        let (summary, stored) = both(summary, stored)?;
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
        let (decoded, decoder) = self.decode(input);
        let pass = self.pass(Mode::Scan, Restart::default());
        let walk = blocking(move || pass.run(decoded, &mut Discard));
        let ((), (), outcome) = tokio::join!(feed, decoder, walk);
        progress.bytes.reset();
        match outcome? {
            PassOutcome::Finished(summary) => {
                verify_diff_id(layer, &summary)?;
                let mut copied = self.copy(output, layer, progress).await?;
                copied.diff_id = Some(summary.input.digest.clone());
                copied.reports = summary.reports;
                Ok(copied)
            }
            PassOutcome::NeedsRewrite | PassOutcome::NeedsRestart(_) => {
                self.rewrite(output, layer, compression, progress).await
            }
        }
    }

    /// A new tar through all filters, begun again if a filter has to know of something that lies behind.
    async fn rewrite(
        &self,
        output: &dyn ImageOutput,
        layer: &Layer,
        compression: Option<Compression>,
        progress: &LayerProgress,
    ) -> Result<WrittenLayer, Error> {
        let mut restart = Restart::default();
        loop {
            let buffers = BufferPool::default();
            let (writer, stream) = LayerStream::channel(CHANNEL, buffers.clone());
            let (input, feed) = self.feed(layer, None, &progress.bytes);
            let (decoded, decoder) = self.decode(input);
            let pass = self.pass(Mode::Rewrite, restart);
            let pool = self.pool.clone();
            let passes = !self.chain.is_empty();
            let walk = blocking(move || match compression {
                None if !passes => forward(decoded, writer),
                None => {
                    let mut out = Chunks::new(buffers, writer);
                    let outcome = pass.run(decoded, &mut out)?;
                    out.finish(outcome)
                }
                Some(compression) => {
                    let mut out = Compressed::new(compression, &pool, writer)?;
                    let outcome = if passes { pass.run(decoded, &mut out)? } else { hash_into(decoded, &mut out)? };
                    out.finish(outcome)
                }
            });
            let format = compression.map_or(Format::None, Compression::format);
            let ignored = ByteCount::default();
            let store = output.write_layer(layer.index, stream, format, &ignored);
            let ((), (), outcome, stored) = tokio::join!(feed, decoder, walk, store);
            match outcome {
                Ok(PassOutcome::NeedsRestart(next)) => {
                    restart = next;
                    progress.bytes.reset();
                }
                outcome => {
                    let (outcome, stored) = both(outcome, stored)?;
                    let PassOutcome::Finished(summary) = outcome else { unreachable!("a rewrite never asks for another") };
                    return written(layer, stored, summary);
                }
            }
        }
    }

    /// Reads a layer, and passes its stored bytes on to `copy` if there is one.
    async fn observe(
        &self,
        layer: &Layer,
        copy: Option<LayerWriter>,
        mode: Mode,
        progress: &LayerProgress,
    ) -> Result<PassSummary, Error> {
        let (input, feed) = self.feed(layer, copy, &progress.bytes);
        let (decoded, decoder) = self.decode(input);
        let pass = self.pass(mode, Restart::default());
        let walk = blocking(move || pass.run(decoded, &mut Discard));
        let ((), (), outcome) = tokio::join!(feed, decoder, walk);
        match outcome? {
            PassOutcome::Finished(summary) => Ok(summary),
            PassOutcome::NeedsRewrite | PassOutcome::NeedsRestart(_) => {
                unreachable!("a pass that only observes edits nothing")
            }
        }
    }
}
