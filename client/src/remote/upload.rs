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
use occy_proto::v1::{ImageElement, ImageEnd, PipelineSpec, ProcessImageRequest};
use tokio::sync::mpsc;

/// Sends the spec, and the image if there is one. Dropped before its end, the stream has none either, and has changed nothing.
pub(super) async fn send(
    spec: PipelineSpec,
    source: Option<Box<dyn ImageSource>>,
    plan: Arc<LayerPlan>,
    requests: mpsc::Sender<ProcessImageRequest>,
    progress: Progress,
) -> Result<(), Error> {
    let form = Form::Stored { compression: None, foreign_layers: spec.foreign_layers };
    let request = ProcessImageRequest { part: Some(Part::Spec(spec)) };
    if requests.send(request).await.is_err() {
        // Whoever does not want the call any more knows why.
        return Ok(());
    }
    let Some(source) = source else { return Ok(()) };
    let output = Arc::new(ElementOutput::new(requests, message, form));
    let sender = Arc::new(Sender(Arc::clone(&output)));
    let outcome = process(source.as_ref(), plan, Arc::clone(&output) as _, sender, &progress).await?;
    let end = ImageEnd { layer_count: convert::count(outcome.layers.len()) };
    Ok(output.send(Element::End(end)).await?)
}

fn message(element: ImageElement) -> ProcessImageRequest {
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
