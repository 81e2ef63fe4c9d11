//! An image as elements, its layers one after the other: an output for whoever is at the other end of a stream.
//!
//! A layer that has to be begun again, because its source was lost in the middle, is begun again on the stream too.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt;
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{self, ImageElement, LayerChunk, LayerEnd, LayerReport, LayerStart};
use tokio::sync::mpsc;

use super::convert::{self, count};
use super::{CHUNK, WireError, document, head};
use crate::blob::{ByteCount, LayerPiece, LayerStream};
use crate::compression::{Compression, Format};
use crate::digest::Digest;
use crate::element::{Image, Layer, StoredLayer, WrittenLayer, distinct_layers};
use crate::error::Error;
use crate::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, Receipt};

/// The form in which layers are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Plain tars.
    Tar,
    /// Blobs as they are stored.
    Stored {
        /// What every layer becomes; unset, it keeps what it has.
        compression: Option<Compression>,
        /// Send the bytes of foreign layers too; otherwise they stay where their manifest says.
        foreign_layers: bool,
    },
}

/// The other end of one stream. Elements go into a bounded channel: who reads slowly slows the source.
#[derive(Debug)]
pub struct ElementOutput<T> {
    elements: mpsc::Sender<T>,
    message: fn(ImageElement) -> T,
    form: Form,
    has_reports: bool,
    state: Mutex<State>,
}

/// What was sent.
#[derive(Debug, Default)]
struct State {
    /// For each layer, the first one with the same content.
    first: Vec<usize>,
    /// The ends of those that were sent, by index.
    ends: Vec<Option<LayerEnd>>,
    has_config: bool,
}

impl<T: Send> ElementOutput<T> {
    /// Sends elements, each made a message.
    pub fn new(elements: mpsc::Sender<T>, message: fn(ImageElement) -> T, form: Form) -> Self {
        Self { elements, message, form, has_reports: false, state: Mutex::default() }
    }

    /// Sends what filters report of each layer too, if `wanted`.
    #[must_use]
    pub fn with_reports(self, wanted: bool) -> Self {
        Self { has_reports: wanted, ..self }
    }

    /// Passes over a layer that the other side does not want.
    pub async fn pass_over(&self, layer: &Layer) -> Result<WrittenLayer, WireError> {
        self.begin_layer(layer.index, layer.format, true).await?;
        let written = WrittenLayer {
            index: layer.index,
            stored: StoredLayer::Original,
            diff_id: layer.diff_id.clone(),
            edited: false,
            reports: Vec::new(),
        };
        self.layer_done(layer, &written).await?;
        Ok(written)
    }

    /// Sends one element, waiting for room.
    pub async fn send(&self, element: Element) -> Result<(), WireError> {
        let message = (self.message)(ImageElement { element: Some(element) });
        self.elements.send(message).await.map_err(|_| WireError::Gone)
    }

    /// Ends a layer, and sends those after it that have the same content. To be called when it has been written.
    pub async fn layer_done(&self, layer: &Layer, written: &WrittenLayer) -> Result<(), WireError> {
        let (digest, size, format) = match (&written.stored, &layer.descriptor) {
            (StoredLayer::Written { digest, size, format }, _) => (digest.to_string(), *size, *format),
            (StoredLayer::Original, Some(descriptor)) => {
                (descriptor.digest.to_string(), descriptor.size, layer.format)
            }
            // Nobody has computed it.
            (StoredLayer::Original, None) => (String::new(), 0, layer.format),
        };
        let end = LayerEnd {
            index: count(layer.index),
            digest,
            size,
            diff_id: written.diff_id.as_ref().map(Digest::to_string).unwrap_or_default(),
            changed: written.edited,
            compression: convert::compression(format).into(),
            kept: written.stored == StoredLayer::Original,
        };
        if self.has_reports {
            for (filter, report) in written.reports.iter().enumerate() {
                let Some(report) = report else { continue };
                let report = serde_json::to_vec(report).expect("a report is plain data");
                for piece in document::pieces(report.into()) {
                    let report = LayerReport { filter: count(filter), report: Some(piece) };
                    self.send(Element::LayerReport(report)).await?;
                }
            }
        }
        for (same_as, end) in self.ends(layer.index, end) {
            if same_as.is_some() {
                let start =
                    LayerStart { index: end.index, same_as, compression: end.compression, absent: false };
                self.send(Element::LayerStart(start)).await?;
            }
            self.send(Element::LayerEnd(end)).await?;
        }
        Ok(())
    }

    async fn begin_layer(&self, index: usize, format: Format, absent: bool) -> Result<(), WireError> {
        let compression = convert::compression(format).into();
        let start = LayerStart { index: count(index), same_as: None, compression, absent };
        self.send(Element::LayerStart(start)).await
    }

    async fn send_bytes(&self, mut bytes: Bytes) -> Result<(), WireError> {
        while !bytes.is_empty() {
            let data = bytes.split_to(CHUNK.min(bytes.len()));
            self.send(Element::LayerChunk(LayerChunk { data })).await?;
        }
        Ok(())
    }

    /// Remembers a layer's end, and gives the ends that follow it: its own, and those of layers that were waiting for nothing
    /// else, their content having been sent under another index.
    fn ends(&self, index: usize, end: LayerEnd) -> Vec<(Option<u32>, LayerEnd)> {
        let mut state = self.state();
        let State { first, ends, .. } = &mut *state;
        ends[index] = Some(end.clone());
        let mut following = vec![(None, end)];
        // The lowest that is missing repeats a lower one, or is yet to be written.
        while let Some(next) = ends.iter().position(Option::is_none)
            && let Some(earlier) = ends[first[next]].clone()
        {
            let repeated = LayerEnd { index: count(next), ..earlier };
            ends[next] = Some(repeated.clone());
            following.push((Some(count(first[next])), repeated));
        }
        following
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl<T: Send> ImageOutput for ElementOutput<T> {
    fn form(&self) -> LayerForm {
        match self.form {
            Form::Tar => LayerForm::Tar,
            Form::Stored { compression, .. } => LayerForm::Stored { compression },
        }
    }

    fn takes_any_order(&self) -> bool {
        false
    }

    async fn begin(&self, image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        *self.state() = State {
            first: distinct_layers(&image.layers),
            ends: vec![None; image.layers.len()],
            has_config: image.config.original.is_some(),
        };
        let form = match self.form {
            Form::Tar => v1::LayerForm::Tar,
            Form::Stored { .. } => v1::LayerForm::Stored,
        };
        for element in head::elements(image, form) {
            self.send(element).await?;
        }
        Ok(())
    }

    async fn copy_layer(&self, layer: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        let is_absent = layer.is_foreign() && !matches!(self.form, Form::Stored { foreign_layers: true, .. });
        self.begin_layer(layer.index, layer.format, is_absent).await?;
        if is_absent {
            return Ok(Moved::Nothing);
        }
        let mut stream = layer.blob.open().await?;
        while let Some(bytes) = stream.next().await {
            let bytes = bytes?;
            progress.add(bytes.len() as u64);
            self.send_bytes(bytes).await?;
        }
        Ok(Moved::Bytes)
    }

    async fn has_layer(&self, _layer: &Layer) -> Result<bool, Error> {
        Ok(false)
    }

    async fn write_layer(
        &self,
        index: usize,
        mut stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        self.begin_layer(index, format, false).await?;
        loop {
            match stream.next().await? {
                LayerPiece::Data(bytes) => {
                    progress.add(bytes.len() as u64);
                    self.send_bytes(bytes).await?;
                }
                LayerPiece::End(summary) => {
                    return Ok(StoredLayer::Written { digest: summary.digest, size: summary.size, format });
                }
            }
        }
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let has_config = self.state().has_config;
        if !has_config || finished.image.config.original.as_ref() != Some(&finished.config) {
            for piece in document::pieces(finished.config) {
                self.send(Element::FinalConfigFile(piece)).await?;
            }
        }
        Ok(Receipt::default())
    }
}
