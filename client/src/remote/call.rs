//! One image through a coordinator.
//!
//! An image that goes to the coordinator's own end leaves only a [`Summary`] here. One that comes back is processed here like any
//! other, with the call as its source *and* as its executor: layers come filtered and compressed, by index, and are only put
//! where the output wants them, decompressed where they come as their source has them and the output wants tars.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use occy_pipeline::blob::{
    Blob, BlobError, BlobRef, BlobSummary, BufferPool, ByteCount, ByteStream, LayerPiece, LayerStream,
    LayerWriter,
};
use occy_pipeline::compression::Format;
use occy_pipeline::digest::{Algorithm, Digest, Hasher};
use occy_pipeline::element::{Image, Layer, StoredLayer, WrittenLayer, distinct_layers};
use occy_pipeline::error::Error;
use occy_pipeline::executor::{Executor, LayerTask};
use occy_pipeline::filter::{FilterChain, OutputFormat, Rendering, Report};
use occy_pipeline::named::{Attached, Beside, process_named};
use occy_pipeline::output::{ImageOutput, LayerForm};
use occy_pipeline::process::Outcome;
use occy_pipeline::progress::{LayerState, Progress};
use occy_pipeline::source::ImageSource;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::wire::document::Document;
use occy_pipeline::wire::head::Head;
use occy_pipeline::wire::{WireError, convert};
use occy_proto::v1::image_element::Element;
use occy_proto::v1::lend_start::Work;
use occy_proto::v1::process_image_response::Part;
use occy_proto::v1::{
    self as v1, ImageElement, ImageResult, LayerChoice, LayerEnd, LayerReport, LayerStart, LayerStatus,
    PipelineSpec, ProcessImageRequest, ProcessImageResponse, RegistryCredentials, lend_layout_response,
    process_image_request,
};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::connect::Coordinator;
use super::error::RemoteError;
use super::findings::Findings;
use super::lend::{Answered, Lending, Lent};
use super::{show, upload};
use crate::display::Begin;

/// Requests that wait to be sent: about a megabyte.
const REQUESTS: usize = 4;
/// Chunks of a layer between the stream and the output.
const CHUNKS: usize = 4;
/// Filters of one call, and bytes that one may report of a layer: as many as a coordinator of ours allows.
const MOST_FILTERS: usize = 65;
const REPORT_MAX: usize = 128 * 1024 * 1024;

/// What a call is about.
pub(crate) struct Plan {
    /// What is asked for.
    pub(crate) spec: PipelineSpec,
    /// What registries are logged in to with.
    pub(crate) logins: Vec<RegistryCredentials>,
    /// Where the image comes from, if it is here and is sent.
    pub(crate) source: Option<Box<dyn ImageSource>>,
    /// What is here and is lent.
    pub(crate) lent: Option<Lent>,
    /// What the upload is done with: no filter.
    pub(crate) sending: Arc<LayerPlan>,
    /// The filters, as far as they are known here.
    pub(crate) chain: FilterChain,
    /// How what filters found is printed.
    pub(crate) format: OutputFormat,
    /// Begins to show an image: the one, or each of an index.
    pub(crate) begin: Begin,
}

/// What came of an image or index that went to the coordinator's own end, or nowhere.
pub(crate) struct Sent {
    /// All of it.
    pub(crate) result: ImageResult,
    /// Its layers, by index; of an index none.
    pub(crate) layers: Vec<LayerStatus>,
    /// The images of an index, with the layers of each.
    pub(crate) images: Vec<(ImageResult, Vec<LayerStatus>)>,
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
    let (mut layers, mut images, mut findings) = (Vec::new(), Vec::new(), Findings::default());
    let result = loop {
        match answers.next().await.map_err(RemoteError::told)? {
            Part::Layer(layer) => layers.push(layer),
            Part::FilterOutput(piece) => findings.take(piece)?,
            Part::Image(image) => images.push((image, std::mem::take(&mut layers))),
            Part::Result(result) => break result,
            Part::Element(_) | Part::Progress(_) => {}
        }
    };
    let (renderings, elapsed) = (findings.renderings(&chain)?, start.elapsed());
    Ok(Sent { result, layers, images, renderings, elapsed })
}

/// An image to an output that is here. `layers` is what the output is told of the filters, which have been passed elsewhere, and
/// `beside` what is wanted besides the image.
pub(crate) async fn receive(
    coordinator: &Coordinator,
    plan: Plan,
    layers: Arc<LayerPlan>,
    output: Arc<dyn ImageOutput>,
    beside: Beside,
) -> anyhow::Result<((Outcome, Attached), Vec<Rendering>)> {
    let (chain, format) = (plan.chain.clone(), plan.format);
    let unpacks = output.form() == LayerForm::Tar && plan.spec.layer_form() == v1::LayerForm::Stored;
    let mut answers = Answers::begin(coordinator, plan).await?;
    answers.counts_bytes &= !unpacks;
    let progress = answers.progress.clone();
    let call = Arc::new(Call { answers: Mutex::new(answers), unpacks });
    let executor = Arc::clone(&call);
    let processed = process_named(call.as_ref(), layers, output, executor, beside, &progress).await;
    let (outcome, attached) = processed.map_err(RemoteError::told)?;
    let own = outcome.placed_renderings(&chain, format);
    let renderings = call.answers.lock().await.findings.renderings_with(&chain, own)?;
    Ok(((outcome, attached), renderings))
}

/// What the coordinator answers.
struct Answers {
    coordinator: Coordinator,
    stream: Answered<ProcessImageResponse>,
    /// What is being sent, if something is.
    upload: Option<Upload>,
    /// Where the choice of layers goes, if it has not yet, and nothing else is sent before it.
    requests: Option<mpsc::Sender<ProcessImageRequest>>,
    begin: Begin,
    /// Of the image that was begun last, and which of an index it is.
    progress: Progress,
    image: u32,
    /// Whether bytes are counted by the coordinator: nothing is sent from here.
    counts_bytes: bool,
    /// An element that was looked at and not used.
    pending: Option<Element>,
    findings: Findings,
    /// The layers, until it was said which of them are wanted.
    layers: Option<Vec<Layer>>,
    /// What the output has of them from earlier.
    known: HashMap<usize, WrittenLayer>,
    /// The config as the source has it, and in the end as it is.
    config: Option<Bytes>,
}

/// What is being sent, for as long as it is wanted.
struct Upload(JoinHandle<Result<mpsc::Sender<ProcessImageRequest>, Error>>);

impl Upload {
    async fn ended(mut self) -> Result<mpsc::Sender<ProcessImageRequest>, Error> {
        match (&mut self.0).await {
            Ok(ended) => ended,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn process_answer(part: lend_layout_response::Part) -> Option<ProcessImageResponse> {
    match part {
        lend_layout_response::Part::Process(answer) => Some(answer),
        _ => None,
    }
}

impl Answers {
    async fn begin(coordinator: &Coordinator, plan: Plan) -> anyhow::Result<Self> {
        let Plan { spec, logins, source, lent, sending, begin, .. } = plan;
        let progress = begin();
        let counts_bytes = source.is_none();
        let foreign_layers = spec.foreign_layers;
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let spec =
            ProcessImageRequest { part: Some(process_image_request::Part::Spec(spec)), credentials: logins };
        let coordinator = coordinator.clone();
        let stream = match lent {
            Some(lent) => {
                let lending = Lending::begin(&coordinator, lent, Work::Process(spec)).await?;
                Answered::Lent(Box::new(lending), process_answer)
            }
            None => {
                requests.try_send(spec).expect("there is room for the first");
                // Answered when the spec was looked at: what is refused is not even opened here.
                let answered = coordinator.client.clone().process_image(ReceiverStream::new(receiver)).await;
                Answered::Plain(Box::new(answered.map_err(|status| coordinator.error(status))?.into_inner()))
            }
        };
        let (upload, requests) = match source {
            None => (None, Some(requests)),
            Some(source) => {
                let sent = upload::send(source, foreign_layers, sending, requests, progress.clone());
                (Some(Upload(tokio::spawn(sent))), None)
            }
        };
        Ok(Self {
            coordinator,
            stream,
            upload,
            requests,
            begin,
            progress,
            image: 0,
            counts_bytes,
            pending: None,
            findings: Findings::default(),
            layers: None,
            known: HashMap::new(),
            config: None,
        })
    }

    /// The next part that is no progress.
    async fn next(&mut self) -> Result<Part, Error> {
        loop {
            let failed = match self.stream.message().await {
                Ok(Some(ProcessImageResponse { part: Some(Part::Progress(told)) })) => {
                    if told.image != self.image {
                        self.image = told.image;
                        self.progress = (self.begin)();
                    }
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
        // The first layer comes only when it was chosen.
        while !head.is_whole() {
            let element = self.element().await?;
            if let Some(other) = head.take(element)? {
                self.pending = Some(other);
                break;
            }
        }
        let image = head.finish()?.into_image()?;
        self.config.clone_from(&image.config.original);
        self.layers = Some(image.layers.clone());
        Ok(image)
    }

    /// Says which layers are not wanted, once.
    async fn choose(&mut self, plan: &LayerPlan, output: &dyn ImageOutput) -> Result<(), Error> {
        let Some(layers) = self.layers.take() else { return Ok(()) };
        let distinct = distinct_layers(&layers);
        for layer in layers.iter().filter(|layer| distinct[layer.index] == layer.index) {
            if let Some(known) = known(layer, plan, output).await? {
                self.known.insert(layer.index, known);
            }
        }
        let unwanted = self.known.keys().map(|&index| convert::count(index)).collect();
        let choice = Element::LayerChoice(LayerChoice { unwanted });
        let requests = match self.upload.take() {
            Some(upload) => Some(upload.ended().await?),
            None => self.requests.take(),
        };
        if let Some(requests) = requests {
            // Whoever does not read it any more says why in its answer.
            drop(requests.send(upload::message(ImageElement { element: Some(choice) })).await);
        }
        Ok(())
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
    async fn layer_bytes(&mut self, mut writer: Option<LayerWriter>) -> Result<Option<Ended>, Error> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut reports: Vec<Document> = Vec::new();
        loop {
            match self.element().await? {
                Element::LayerChunk(chunk) => {
                    hasher.update(&chunk.data);
                    let Some(writer) = &writer else { continue };
                    writer.send(chunk.data).await.map_err(|_| BlobError::Interrupted)?;
                }
                Element::LayerReport(LayerReport { filter, report }) => {
                    let filter = filter as usize;
                    if filter >= MOST_FILTERS {
                        return Err(WireError::elements("it has too many filters").into());
                    }
                    reports.resize_with(reports.len().max(filter + 1), Document::default);
                    let report = report.unwrap_or_default();
                    reports[filter].take_up_to(REPORT_MAX, &report, "what a filter reports")?;
                }
                Element::LayerEnd(end) => {
                    let size = hasher.size();
                    let summary = BlobSummary { digest: hasher.finish(), size };
                    let ended = Ended { end, reports };
                    let Some(writer) = writer.take() else { return Ok(Some(ended)) };
                    let end = &ended.end;
                    if end.digest != summary.digest.to_string() {
                        let expected = end
                            .digest
                            .parse::<Digest>()
                            .map_err(|error| WireError::elements(format!("layer {}: {error}", end.index)))?;
                        let computed = summary.digest;
                        return Err(BlobError::Digest { expected, computed, size }.into());
                    }
                    writer.finish(summary).await.map_err(|_| BlobError::Interrupted)?;
                    return Ok(Some(ended));
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

/// A layer that has come to its end.
struct Ended {
    end: LayerEnd,
    /// What filters report of it, in JSON, by their places.
    reports: Vec<Document>,
}

impl Ended {
    /// The reports of a chain of filters; what one says that we do not have is left out.
    fn reports(self, chain: &FilterChain) -> Result<Vec<Option<Report>>, WireError> {
        let mut reports = Vec::new();
        for document in self.reports {
            let bytes = document.finish("what a filter reports")?;
            reports.push(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()));
        }
        reports.resize(chain.filters().len(), None);
        Ok(reports)
    }
}

/// What an output has of a layer, so that it need not come.
async fn known(
    layer: &Layer,
    plan: &LayerPlan,
    output: &dyn ImageOutput,
) -> Result<Option<WrittenLayer>, Error> {
    if let Some(known) = output.known_layer(layer, &plan.chain).await? {
        return Ok(Some(known));
    }
    // A blob that would be copied unread.
    let is_copied = output.form() == LayerForm::Stored { compression: None }
        && plan.chain.is_empty()
        && !plan.verify_diff_ids
        && !layer.known_by_diff_id_alone
        && layer.descriptor.is_some();
    let has = is_copied && output.has_layer(layer).await?;
    Ok(has.then(|| WrittenLayer {
        index: layer.index,
        stored: StoredLayer::Original,
        diff_id: layer.diff_id.clone(),
        edited: false,
        reports: Vec::new(),
    }))
}

/// What a call really failed with: where the coordinator only says that the stream ended, whoever sent it knows why.
async fn failure(remote: RemoteError, upload: Option<Upload>) -> Error {
    if let Some(upload) = upload
        && (upload.0.is_finished() || remote.is_truncated_upload())
        && let Err(own) = upload.ended().await
        && !is_gone(&own)
    {
        return own;
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

/// A layer's stored bytes, while they come.
#[derive(Debug)]
struct Arriving {
    stream: std::sync::Mutex<Option<LayerStream>>,
    /// What the source has.
    stored: BlobRef,
}

#[async_trait]
impl Blob for Arriving {
    /// Once: if they are lost the coordinator sends them again, as another layer's.
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = stream.ok_or(BlobError::Interrupted)?;
        let pieces = futures_util::stream::try_unfold(stream, |mut stream| async {
            match stream.next().await? {
                LayerPiece::Data(bytes) => Ok(Some((bytes, stream))),
                LayerPiece::End(_) => Ok(None),
            }
        });
        Ok(pieces.boxed())
    }

    fn size(&self) -> Option<u64> {
        self.stored.size()
    }

    fn identity(&self) -> String {
        self.stored.identity()
    }
}

/// A call as the source and the executor of the image that it answers with.
struct Call {
    answers: Mutex<Answers>,
    /// Whether layers come as they are stored, and the output wants tars.
    unpacks: bool,
}

impl Call {
    /// Puts a layer that comes as `stream` where the output wants it. Gives its diff_id, if it is known here.
    async fn store(
        &self,
        task: &LayerTask,
        stream: LayerStream,
        format: Format,
    ) -> Result<(StoredLayer, Option<Digest>), Error> {
        let LayerTask { layer, plan, output, .. } = task;
        if !self.unpacks {
            let stored = output.write_layer(layer.index, stream, format, &ByteCount::default()).await?;
            return Ok((stored, None));
        }
        let stream = std::sync::Mutex::new(Some(stream));
        let blob = Arc::new(Arriving { stream, stored: Arc::clone(&layer.blob) });
        let arriving = Layer { blob, format, ..layer.clone() };
        let written = plan.run_once(output.as_ref(), &arriving, task.layer_progress()).await?;
        Ok((written.stored, written.diff_id))
    }
}

#[async_trait]
impl ImageSource for Call {
    async fn image(&self) -> Result<Image, Error> {
        self.answers.lock().await.image().await
    }

    async fn settle(&self, _image: &mut Image) -> Result<(), Error> {
        self.answers.lock().await.end().await
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
        Ok(self.answers.lock().await.config.clone())
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        let LayerTask { layer, plan, output, .. } = &task;
        let progress = task.layer_progress();
        let mut answers = self.answers.lock().await;
        answers.choose(plan, output.as_ref()).await?;
        let known = answers.known.remove(&layer.index);
        progress.set(LayerState::Running);
        loop {
            let start = answers.layer_start(layer.index).await?;
            // Only a blob that its source describes can be at the destination without having come.
            let may_stay = matches!(output.form(), LayerForm::Stored { .. }) && layer.descriptor.is_some();
            if start.absent && known.is_none() && !may_stay {
                return Err(WireError::elements(format!("layer {} does not come", layer.index)).into());
            }
            let is_wanted = known.is_none() && !start.absent;
            let (writer, stream) = LayerStream::channel(CHUNKS, BufferPool::default());
            let format = convert::format(start.compression()).unwrap_or(Format::None);
            let (read, stored) = match is_wanted {
                false => (answers.layer_bytes(None).await, Ok((StoredLayer::Original, None))),
                true => tokio::join!(answers.layer_bytes(Some(writer)), self.store(&task, stream, format),),
            };
            let (ended, (stored, diff_id)) = match (read, stored) {
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
                (Ok(Some(ended)), Ok(stored)) => (ended, stored),
            };
            progress.set(if is_wanted { LayerState::Done } else { LayerState::Reused });
            if let Some(known) = known {
                return Ok(known);
            }
            let end = &ended.end;
            let diff_id = match end.diff_id.as_str() {
                _ if diff_id.is_some() => diff_id,
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
                reports: ended.reports(&plan.chain)?,
            });
        }
    }
}
