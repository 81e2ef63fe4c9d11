//! No destination at all: layers are read for what filters report of them.

use super::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Receipt};
use crate::blob::{ByteCount, LayerStream};
use crate::compression::Format;
use crate::element::{Image, StoredLayer};
use crate::error::Error;

/// Takes nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoOutput;

#[async_trait::async_trait]
impl ImageOutput for NoOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Nothing
    }

    async fn begin(&self, _image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        Ok(())
    }

    async fn write_layer(
        &self,
        _index: usize,
        _stream: LayerStream,
        _format: Format,
        _progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        unreachable!("nothing is stored here")
    }

    async fn finalize(&self, _finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        Ok(Receipt::default())
    }
}
