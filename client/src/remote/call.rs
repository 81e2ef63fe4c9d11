//! One image through a coordinator.
//!
//! An image that goes to the coordinator's own end leaves only a [`Summary`] here. One that comes back is processed here like any
//! other, with the call as its source *and* as its executor: layers come filtered and compressed, by index, and are only put
//! where the output wants them.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use occy_pipeline::blob::{BlobError, BlobSummary, BufferPool, ByteCount, LayerStream, LayerWriter};
use occy_pipeline::compression::Format;
use occy_pipeline::digest::{Algorithm, Digest, Hasher};
use occy_pipeline::element::{Image, StoredLayer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::executor::{Executor, LayerTask};
use occy_pipeline::filter::{FilterChain, Rendering};
use occy_pipeline::output::{ImageOutput, LayerForm};
use occy_pipeline::process::{Outcome, process};
use occy_pipeline::progress::{LayerState, Progress};
use occy_pipeline::source::ImageSource;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::wire::document::Document;
use occy_pipeline::wire::head::Head;
use occy_pipeline::wire::{WireError, convert};
use occy_proto::v1::image_element::Element;
use occy_proto::v1::process_image_response::Part;
use occy_proto::v1::{ImageResult, LayerEnd, LayerStart, LayerStatus, PipelineSpec, ProcessImageResponse};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::connect::Coordinator;
use super::error::RemoteError;
use super::findings::Findings;
use super::{show, upload};

/// Requests that wait to be sent: about a megabyte.
const REQUESTS: usize = 4;
/// Chunks of a layer between the stream and the output.
const CHUNKS: usize = 4;

/// What a call is about.
pub(crate) struct Plan {
    /// What is asked for.
    pub(crate) spec: PipelineSpec,
    /// Where the image comes from, if it is here.
    pub(crate) source: Option<Box<dyn ImageSource>>,
    /// What the upload is done with: no filter.
    pub(crate) sending: Arc<LayerPlan>,
    /// The filters, as far as they are known here.
    pub(crate) chain: FilterChain,
    /// What is shown.
    pub(crate) progress: Progress,
}

/// What came of an image that went to the coordinator's own end, or nowhere.
pub(crate) struct Sent {
    /// All of it.
    pub(crate) result: ImageResult,
    /// Its layers, by index.
    pub(crate) layers: Vec<LayerStatus>,
    /// What filters found.
    pub(crate) renderings: Vec<Rendering>,
    /// Since the call was begun.
    pub(crate) elapsed: std::time::Duration,
}

/// An image to the coordinator's own end, or nowhere.
pub(crate) async fn send(coordinator: &Coordinator, plan: Plan) -> anyhow::Result<Sent> {
    let start = Instant::now();
    let chain = plan.chain.clone();
    let mut answers = Answers::begin(coordinator, plan).await?;
    let (mut layers, mut findings) = (Vec::new(), Findings::default());
    let result = loop {
        match answers.next().await.map_err(RemoteError::told)? {
            Part::Layer(layer) => layers.push(layer),
            Part::FilterOutput(piece) => findings.take(piece)?,
            Part::Result(result) => break result,
            Part::Element(_) | Part::Progress(_) => {}
        }
    };
    Ok(Sent { result, layers, renderings: findings.renderings(&chain)?, elapsed: start.elapsed() })
}

/// An image to an output that is here. `layers` is what the output is told of the filters, which have been passed elsewhere.
pub(crate) async fn receive(
    coordinator: &Coordinator,
    plan: Plan,
    layers: Arc<LayerPlan>,
    output: Arc<dyn ImageOutput>,
) -> anyhow::Result<(Outcome, Vec<Rendering>)> {
    let (chain, progress) = (plan.chain.clone(), plan.progress.clone());
    let answers = Answers::begin(coordinator, plan).await?;
    let call = Arc::new(Call(Mutex::new(answers)));
    let executor = Arc::clone(&call);
    let outcome = process(call.as_ref(), layers, output, executor, &progress).await;
    let outcome = outcome.map_err(RemoteError::told)?;
    let findings = std::mem::take(&mut call.0.lock().await.findings);
    Ok((outcome, findings.renderings(&chain)?))
}

/// What the coordinator answers.
struct Answers {
    coordinator: Coordinator,
    stream: Streaming<ProcessImageResponse>,
    upload: Option<Upload>,
    progress: Progress,
    /// Whether bytes are counted by the coordinator: nothing is sent from here.
    counts_bytes: bool,
    /// An element that was looked at and not used.
    pending: Option<Element>,
    findings: Findings,
    /// The config as the source has it, and in the end as it is.
    config: Option<Bytes>,
}

/// What is being sent, for as long as it is wanted.
struct Upload(JoinHandle<Result<(), Error>>);

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Answers {
    async fn begin(coordinator: &Coordinator, plan: Plan) -> anyhow::Result<Self> {
        let Plan { spec, source, sending, progress, .. } = plan;
        let counts_bytes = source.is_none();
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let sent = upload::send(spec, source, sending, requests, progress.clone());
        let upload = Upload(tokio::spawn(sent));
        let coordinator = coordinator.clone();
        let answered = coordinator.client.clone().process_image(ReceiverStream::new(receiver)).await;
        let stream = match answered {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let error = failure(coordinator.error(status), Some(upload)).await;
                return Err(RemoteError::told(error));
            }
        };
        Ok(Self {
            coordinator,
            stream,
            upload: Some(upload),
            progress,
            counts_bytes,
            pending: None,
            findings: Findings::default(),
            config: None,
        })
    }

    /// The next part that is no progress.
    async fn next(&mut self) -> Result<Part, Error> {
        loop {
            let failed = match self.stream.message().await {
                Ok(Some(ProcessImageResponse { part: Some(Part::Progress(told)) })) => {
                    show(&self.progress, &told, self.counts_bytes);
                    continue;
                }
                Ok(Some(ProcessImageResponse { part: Some(part) })) => return Ok(part),
                // A kind of a later version.
                Ok(Some(ProcessImageResponse { part: None })) => continue,
                Ok(None) => RemoteError::truncated(&self.coordinator.url),
                Err(status) => self.coordinator.error(status),
            };
            return Err(failure(failed, self.upload.take()).await);
        }
    }

    /// The next element.
    async fn element(&mut self) -> Result<Element, Error> {
        if let Some(element) = self.pending.take() {
            return Ok(element);
        }
        loop {
            if let Part::Element(element) = self.next().await? {
                match element.element {
                    Some(element) => return Ok(element),
                    // Within a layer nothing may be skipped, but then the layer's digest is not the promised one.
                    None => continue,
                }
            }
        }
    }

    /// Everything up to the first layer.
    async fn image(&mut self) -> Result<Image, Error> {
        let mut head = Head::default();
        loop {
            let element = self.element().await?;
            if let Some(other) = head.take(element)? {
                self.pending = Some(other);
                break;
            }
        }
        let image = head.finish()?.into_image()?;
        self.config.clone_from(&image.config.original);
        Ok(image)
    }

    /// Everything behind the last layer.
    async fn end(&mut self) -> Result<(), Error> {
        let mut config = Document::default();
        loop {
            match self.element().await? {
                Element::FinalConfigFile(chunk) => config.take(&chunk, "the final config")?,
                Element::FilterOutput(piece) => {
                    self.findings.take(piece).map_err(|error| WireError::elements(error.to_string()))?;
                }
                // Layers that stand in the image twice.
                Element::LayerStart(start) if start.same_as.is_some() => {}
                Element::LayerEnd(_) => {}
                Element::End(_) => break,
                _ => return Err(WireError::elements("something follows its layers").into()),
            }
        }
        if let Some(config) = config.finish("the final config")? {
            self.config = Some(config);
        }
        Ok(())
    }

    /// The start of a layer, behind the ends of those that repeat others.
    async fn layer_start(&mut self, index: usize) -> Result<LayerStart, Error> {
        loop {
            match self.element().await? {
                Element::LayerStart(start) if start.same_as.is_some() => {}
                Element::LayerEnd(_) => {}
                Element::LayerStart(start) if start.index as usize == index => return Ok(start),
                _ => {
                    return Err(
                        WireError::elements(format!("layer {index} does not come in its turn")).into()
                    );
                }
            }
        }
    }

    /// The bytes of a layer into `writer`, which is left without an end if the layer begins again. None: it does.
    async fn layer_bytes(&mut self, mut writer: Option<LayerWriter>) -> Result<Option<LayerEnd>, Error> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        loop {
            match self.element().await? {
                Element::LayerChunk(chunk) => {
                    hasher.update(&chunk.data);
                    let Some(writer) = &writer else { continue };
                    writer.send(chunk.data).await.map_err(|_| BlobError::Interrupted)?;
                }
                Element::LayerEnd(end) => {
                    let size = hasher.size();
                    let summary = BlobSummary { digest: hasher.finish(), size };
                    let Some(writer) = writer.take() else { return Ok(Some(end)) };
                    if end.digest != summary.digest.to_string() {
                        let expected = end
                            .digest
                            .parse::<Digest>()
                            .map_err(|error| WireError::elements(format!("layer {}: {error}", end.index)))?;
                        let computed = summary.digest;
                        return Err(BlobError::Digest { expected, computed, size }.into());
                    }
                    writer.finish(summary).await.map_err(|_| BlobError::Interrupted)?;
                    return Ok(Some(end));
                }
                again @ Element::LayerStart(_) => {
                    self.pending = Some(again);
                    return Ok(None);
                }
                _ => return Err(WireError::elements("an unknown element within a layer").into()),
            }
        }
    }
}

/// What a call really failed with: where the coordinator only says that the stream ended, whoever sent it knows why.
async fn failure(remote: RemoteError, upload: Option<Upload>) -> Error {
    if let Some(mut upload) = upload
        && (upload.0.is_finished() || remote.is_truncated_upload())
    {
        match (&mut upload.0).await {
            Ok(Err(own)) if !is_gone(&own) => return own,
            Err(panicked) if panicked.is_panic() => std::panic::resume_unwind(panicked.into_panic()),
            _ => {}
        }
    }
    Error::Host(Box::new(remote))
}

/// Whether a sender only says that nobody reads it any more.
fn is_gone(error: &Error) -> bool {
    match error {
        Error::Layer { source, .. } => is_gone(source),
        Error::Host(inner) => matches!(inner.downcast_ref(), Some(WireError::Gone)),
        _ => false,
    }
}

/// A call as the source and the executor of the image that it answers with.
struct Call(Mutex<Answers>);

#[async_trait]
impl ImageSource for Call {
    async fn image(&self) -> Result<Image, Error> {
        self.0.lock().await.image().await
    }

    async fn settle(&self, _image: &mut Image) -> Result<(), Error> {
        self.0.lock().await.end().await
    }
}

#[async_trait]
impl Executor for Call {
    fn at_once(&self) -> usize {
        // Layers come one after the other.
        1
    }

    fn by_index(&self) -> bool {
        true
    }

    async fn final_config(&self) -> Result<Option<Bytes>, Error> {
        Ok(self.0.lock().await.config.clone())
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        let LayerTask { layer, plan, output, .. } = &task;
        let progress = task.layer_progress();
        let mut answers = self.0.lock().await;
        let known = output.known_layer(layer, &plan.chain).await?;
        progress.set(LayerState::Running);
        loop {
            let start = answers.layer_start(layer.index).await?;
            // Only a blob that its source describes can be at the destination without having come.
            let may_stay = matches!(output.form(), LayerForm::Stored { .. }) && layer.descriptor.is_some();
            if start.absent && !may_stay {
                return Err(WireError::elements(format!("layer {} does not come", layer.index)).into());
            }
            let is_wanted = known.is_none() && !start.absent;
            let (writer, stream) = LayerStream::channel(CHUNKS, BufferPool::default());
            let format = convert::format(start.compression()).unwrap_or(Format::None);
            let ignored = ByteCount::default();
            let (read, stored) = match is_wanted {
                false => (answers.layer_bytes(None).await, Ok(StoredLayer::Original)),
                true => tokio::join!(
                    answers.layer_bytes(Some(writer)),
                    output.write_layer(layer.index, stream, format, &ignored),
                ),
            };
            let (end, stored) = match (read, stored) {
                // It begins again, and what the output has of it is void.
                (Ok(None), _) => {
                    progress.bytes.reset();
                    continue;
                }
                // An output that gave up says why; one that was given up does not know.
                (Err(Error::Blob(BlobError::Interrupted)), Err(error)) | (Ok(_), Err(error)) => {
                    return Err(error);
                }
                (Err(error), _) => return Err(error),
                (Ok(Some(end)), Ok(stored)) => (end, stored),
            };
            progress.set(if is_wanted { LayerState::Done } else { LayerState::Reused });
            if let Some(known) = known {
                return Ok(known);
            }
            let diff_id = match end.diff_id.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|error| {
                    WireError::elements(format!("diff_id of layer {}: {error}", end.index))
                })?),
            };
            return Ok(WrittenLayer {
                index: layer.index,
                stored: if end.kept && may_stay { StoredLayer::Original } else { stored },
                diff_id,
                edited: end.changed,
                reports: Vec::new(),
            });
        }
    }
}
