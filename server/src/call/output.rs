//! The caller as a destination: an image as elements, its layers by index.
//!
//! A layer that has to be begun again, because its source was lost in the middle, is begun again on the stream too.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt;
use occy_pipeline::blob::{ByteCount, LayerPiece, LayerStream};
use occy_pipeline::compression::Format;
use occy_pipeline::digest::Digest;
use occy_pipeline::element::{Image, Layer, StoredLayer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, Receipt};
use occy_proto::v1;
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{DocumentChunk, ImageElement, ImageStart, LayerChunk, LayerEnd, LayerStart, Platform};

use super::{Answer, Answers, send};
use crate::convert::{self, CHUNK, count};
use crate::error::ServiceError;
use crate::executor::LayerWatcher;

/// The caller of one call.
#[derive(Debug)]
pub struct ClientOutput {
    answers: Answers,
    form: v1::LayerForm,
    layers: Mutex<Layers>,
}

/// What was sent.
#[derive(Debug, Default)]
struct Layers {
    /// For each layer, the first one with the same content.
    first: Vec<usize>,
    /// The ends of those that were sent, by index.
    ends: Vec<LayerEnd>,
}

impl ClientOutput {
    /// Sends layers in this form.
    pub fn new(answers: Answers, form: v1::LayerForm) -> Self {
        Self { answers, form, layers: Mutex::default() }
    }

    async fn send(&self, element: Element) -> Result<(), ServiceError> {
        send(&self.answers, Answer::Element(ImageElement { element: Some(element) })).await
    }

    async fn send_document(
        &self,
        mut document: Bytes,
        element: fn(DocumentChunk) -> Element,
    ) -> Result<(), ServiceError> {
        loop {
            let data = document.split_to(CHUNK.min(document.len()));
            let last = document.is_empty();
            self.send(element(DocumentChunk { data, last })).await?;
            if last {
                return Ok(());
            }
        }
    }

    async fn begin_layer(&self, index: usize) -> Result<(), ServiceError> {
        self.send(Element::LayerStart(LayerStart { index: count(index), same_as: None })).await
    }

    async fn send_bytes(&self, mut bytes: Bytes) -> Result<(), ServiceError> {
        while !bytes.is_empty() {
            let data = bytes.split_to(CHUNK.min(bytes.len()));
            self.send(Element::LayerChunk(LayerChunk { data })).await?;
        }
        Ok(())
    }

    /// Remembers a layer's end, and gives the ends that follow it: its own, and those of layers behind it that were sent before
    /// under another index.
    fn ends(&self, end: LayerEnd) -> Vec<(Option<u32>, LayerEnd)> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.ends.push(end.clone());
        let mut ends = vec![(None, end)];
        while let Some(&first) =
            layers.first.get(layers.ends.len()).filter(|&&first| first < layers.ends.len())
        {
            let repeated = LayerEnd { index: count(layers.ends.len()), ..layers.ends[first].clone() };
            layers.ends.push(repeated.clone());
            ends.push((Some(count(first)), repeated));
        }
        ends
    }
}

#[async_trait::async_trait]
impl ImageOutput for ClientOutput {
    fn form(&self) -> LayerForm {
        match self.form {
            v1::LayerForm::Tar => LayerForm::Tar,
            v1::LayerForm::Stored | v1::LayerForm::Unspecified => LayerForm::Stored { compression: None },
        }
    }

    fn takes_any_order(&self) -> bool {
        false
    }

    async fn begin(&self, image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        let mut first = HashMap::new();
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).first = image
            .layers
            .iter()
            .map(|layer| *first.entry(layer.blob.identity()).or_insert(layer.index))
            .collect();
        let platform = image.config.document.as_ref().and_then(|config| config.platform());
        let start = ImageStart {
            repository: image.name.repository.clone(),
            tag: image.name.tag.clone(),
            manifest_media_type: image.manifest.as_ref().map(|manifest| manifest.media_type.clone()),
            config_media_type: image.config.media_type.clone(),
            family: convert::family(image.family).into(),
            layer_form: self.form.into(),
            layer_count: count(image.layers.len()),
            platform: platform.map(|platform| Platform {
                os: platform.os,
                architecture: platform.architecture,
                variant: platform.variant.unwrap_or_default(),
            }),
        };
        self.send(Element::Start(start)).await?;
        if let Some(manifest) = &image.manifest {
            self.send_document(manifest.bytes.clone(), Element::Manifest).await?;
        }
        if let Some(config) = &image.config.original {
            self.send_document(config.clone(), Element::ConfigFile).await?;
        }
        Ok(())
    }

    async fn copy_layer(&self, layer: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        if layer.is_foreign() {
            let urls = layer.descriptor.iter().flat_map(|descriptor| descriptor.urls.iter().cloned());
            return Err(Error::Foreign(urls.collect::<Vec<_>>().join(", ")));
        }
        self.begin_layer(layer.index).await?;
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
        self.begin_layer(index).await?;
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
        if finished.image.config.original.as_ref() != Some(&finished.config) {
            self.send_document(finished.config, Element::FinalConfigFile).await?;
        }
        Ok(Receipt::default())
    }
}

#[async_trait::async_trait]
impl LayerWatcher for ClientOutput {
    async fn done(&self, layer: &Layer, written: &WrittenLayer) -> Result<(), ServiceError> {
        let (digest, size, format) = match (&written.stored, &layer.descriptor) {
            (StoredLayer::Written { digest, size, format }, _) => (digest.to_string(), *size, *format),
            (StoredLayer::Original, Some(descriptor)) => {
                (descriptor.digest.to_string(), descriptor.size, layer.format)
            }
            (StoredLayer::Original, None) => unreachable!("only a layer with a descriptor is kept as it is"),
        };
        let end = LayerEnd {
            index: count(layer.index),
            digest,
            size,
            diff_id: written.diff_id.as_ref().map(Digest::to_string).unwrap_or_default(),
            changed: written.edited,
            compression: convert::compression(format).into(),
        };
        for (same_as, end) in self.ends(end) {
            if same_as.is_some() {
                self.send(Element::LayerStart(LayerStart { index: end.index, same_as })).await?;
            }
            self.send(Element::LayerEnd(end)).await?;
        }
        Ok(())
    }
}
