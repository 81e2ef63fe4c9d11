//! No destination at all, but for the digests: what an output that keeps manifests would have put there.

use std::sync::Arc;

use super::manifest::{FinalManifest, ManifestFormat};
use super::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, Receipt};
use crate::blob::{ByteCount, LayerPiece, LayerStream};
use crate::compression::{Compression, Format};
use crate::element::{Image, Layer, StoredLayer};
use crate::error::Error;
use crate::source::stored::SourceIndex;

/// Takes images and indexes, and says what they became.
#[derive(Clone, Copy, Debug)]
pub struct DerivedOutput {
    /// As an output's: what every layer becomes, or nothing.
    pub compression: Option<Compression>,
    /// Of the manifest.
    pub format: ManifestFormat,
}

impl DerivedOutput {
    fn receipt(manifest: FinalManifest) -> Receipt {
        Receipt {
            manifest_size: Some(manifest.bytes.len() as u64),
            manifest: Some(manifest.bytes),
            manifest_digest: Some(manifest.digest),
            manifest_media_type: Some(manifest.media_type),
            ..Receipt::default()
        }
    }
}

#[async_trait::async_trait]
impl ImageOutput for DerivedOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Stored { compression: self.compression }
    }

    fn action(&self) -> &'static str {
        "derive"
    }

    fn format(&self) -> ManifestFormat {
        self.format
    }

    async fn begin(&self, image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        Ok(FinalManifest::foresee(image, self.format, self.compression)?)
    }

    async fn has_layer(&self, _layer: &Layer) -> Result<bool, Error> {
        Ok(true)
    }

    async fn copy_layer(&self, _layer: &Layer, _progress: &ByteCount) -> Result<Moved, Error> {
        Ok(Moved::Nothing)
    }

    async fn write_layer(
        &self,
        _index: usize,
        mut stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        loop {
            match stream.next().await? {
                LayerPiece::Data(bytes) => {
                    progress.add(bytes.len() as u64);
                    stream.recycle(bytes);
                }
                LayerPiece::End(summary) => {
                    return Ok(StoredLayer::Written { digest: summary.digest, size: summary.size, format });
                }
            }
        }
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        Ok(Self::receipt(FinalManifest::of(&finished, self.format)?))
    }

    fn entry(&self, _digest: &crate::digest::Digest) -> Option<Arc<dyn ImageOutput>> {
        Some(Arc::new(*self))
    }

    fn entry_to_be(&self) -> Option<Arc<dyn ImageOutput>> {
        Some(Arc::new(*self))
    }

    async fn put_index(&self, index: &SourceIndex) -> Result<Receipt, Error> {
        Ok(Self::receipt(FinalManifest::of_index(index)))
    }
}
