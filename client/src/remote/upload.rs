//! The caller's own image on its way to a coordinator: its blobs as they are, in the order in which its source has them.

use std::sync::Arc;

use occy_pipeline::element::{StoredLayer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::executor::{Executor, LayerTask};
use occy_pipeline::process::process;
use occy_pipeline::progress::{LayerState, Progress};
use occy_pipeline::source::ImageSource;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::wire::convert;
use occy_pipeline::wire::output::{ElementOutput, Form};
use occy_proto::v1::image_element::Element;
use occy_proto::v1::process_image_request::Part;
use occy_proto::v1::{ImageElement, ImageEnd, ProcessImageRequest};
use tokio::sync::mpsc;

/// Sends an image, and gives back where more can be sent to. Dropped before its end, or failed, the stream has none either, and has
/// changed nothing.
pub(super) async fn send(
    source: Box<dyn ImageSource>,
    foreign_layers: bool,
    plan: Arc<LayerPlan>,
    requests: mpsc::Sender<ProcessImageRequest>,
    progress: Progress,
) -> Result<mpsc::Sender<ProcessImageRequest>, Error> {
    let form = Form::Stored { compression: None, foreign_layers };
    let output = Arc::new(ElementOutput::new(requests.clone(), message, form));
    let sender = Arc::new(Sender(Arc::clone(&output)));
    let outcome = process(source.as_ref(), plan, Arc::clone(&output) as _, sender, &progress).await?;
    let end = ImageEnd { layer_count: convert::count(outcome.layers.len()) };
    output.send(Element::End(end)).await?;
    Ok(requests)
}

pub(super) fn message(element: ImageElement) -> ProcessImageRequest {
    ProcessImageRequest { part: Some(Part::Element(element)) }
}

/// Sends layers as they are stored, whatever that is: what is to become of them is not decided here.
struct Sender(Arc<ElementOutput<ProcessImageRequest>>);

#[async_trait::async_trait]
impl Executor for Sender {
    fn at_once(&self) -> usize {
        // There is one stream.
        1
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        let layer = &task.layer;
        let progress = task.layer_progress();
        progress.set(LayerState::Running);
        task.output.copy_layer(layer, &progress.bytes).await?;
        let written = WrittenLayer {
            index: layer.index,
            stored: StoredLayer::Original,
            diff_id: layer.diff_id.clone(),
            edited: false,
            reports: Vec::new(),
        };
        self.0.layer_done(layer, &written).await?;
        Ok(written)
    }
}
