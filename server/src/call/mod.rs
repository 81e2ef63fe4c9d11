//! Calls: images that travel on the caller's own stream.
//!
//! | what | where |
//! |---|---|
//! | the caller as a source: elements into spools | `source` |
//! | the caller as a destination: elements out of the pipeline | [`ElementOutput`] |
//! | layers that such a caller has already | `choice` |
//! | how far a call is | `progress` |
//! | what an image is made of, and what is wrong with it | `look` |
//! | whether an image is what its provenance says | `verify` |
//! | whole images, indexes and artifacts, bit for bit | `copy` |
//! | all of these with layouts that the caller lends | `lend` |
//! | images by name: lists, digests, deletion | `names` |
//! | one call, whichever ends are the caller's | here |

mod choice;
pub mod copy;
pub mod lend;
pub mod look;
pub mod names;
mod progress;
pub mod source;
pub mod verify;

use std::sync::Arc;

use futures_util::stream::BoxStream;
use occy_pipeline::element::{Layer, WrittenLayer};
use occy_pipeline::executor::Executor;
use occy_pipeline::filter::{FilterChain, Report};
use occy_pipeline::index::DoneImage;
use occy_pipeline::open;
use occy_pipeline::output::nothing::NoOutput;
use occy_pipeline::output::{ImageOutput, LayerForm};
use occy_pipeline::process::{Outcome, process};
use occy_pipeline::progress::{ImagesProgress, Progress};
use occy_pipeline::source::ImageSource;
use occy_pipeline::whole::{Done, process_whole};
use occy_pipeline::wire::convert;
use occy_pipeline::wire::output::{ElementOutput, Form};
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{
    self, CallProgress, FilterOutput, ImageElement, ImageEnd, ImageResult, LayerStatus, SearchHit,
};
use tokio::sync::mpsc;
use tonic::Status;

use self::choice::Choosing;
use self::progress::Workers;
use crate::admit::Work;
use crate::error::ServiceError;
use crate::executor::{FleetExecutor, LayerWatcher};
use crate::fleet::Fleet;

/// Bytes of what filters print or append that one call may send.
const FOUND_MAX: usize = 64 * 1024 * 1024;
/// Hits in one message: with paths of the length that file systems know, it stays far below a message's size.
const HITS_AT_ONCE: usize = 64;
/// Bytes of hits in one message.
const HIT_BYTES_AT_ONCE: usize = 512 * 1024;

/// Elements that a caller sends.
pub type Elements = BoxStream<'static, Result<ImageElement, Status>>;

/// What a caller is sent.
#[derive(Clone, Debug)]
pub enum Answer {
    /// A piece of the image.
    Element(ImageElement),
    /// What a filter found, where the destination is not the caller.
    Found(FilterOutput),
    /// What came of a layer, where the destination is not the caller.
    Layer(LayerStatus),
    /// How far the call is.
    Progress(CallProgress),
    /// What came of an image of an index, behind its layers and what filters found in it.
    Image(ImageResult),
    /// What came of the image, or index. Nothing follows.
    Result(ImageResult),
}

/// Where a caller's answers go. Bounded: a slow caller slows the source.
pub type Answers = mpsc::Sender<Answer>;

/// Sends an answer, waiting for room.
async fn send(answers: &Answers, answer: Answer) -> Result<(), ServiceError> {
    answers.send(answer).await.map_err(|_| ServiceError::CallerGone)
}

/// Runs the pipeline for one call. Empty ends are the caller: its elements come from `elements`, and go to `answers`.
pub async fn run(
    work: Work,
    fleet: &Fleet,
    mut elements: Elements,
    answers: Answers,
) -> Result<(), ServiceError> {
    let opened;
    let (source, source_workers): (&dyn ImageSource, _) = if work.source.is_empty() {
        opened =
            Box::new(source::receive(&mut elements, &work.settings.spools).await?) as Box<dyn ImageSource>;
        (opened.as_ref(), None)
    } else {
        let source = open::source(&work.source, &work.settings)?;
        opened = source.end;
        (opened.as_ref(), source.max_workers)
    };
    let at_once = |output_workers| source_workers.max(output_workers).unwrap_or(work.settings.parallel);
    let is_callers = work.destination.is_empty() && work.form != v1::LayerForm::None;
    let (output, to_caller, at_once): (Arc<dyn ImageOutput>, _, _) = if is_callers {
        let form = match work.form {
            v1::LayerForm::Tar => Form::Tar,
            _ => Form::Stored {
                compression: work.settings.compression,
                foreign_layers: work.settings.foreign_layers,
            },
        };
        let output = ElementOutput::new(answers.clone(), Answer::Element, form);
        let output = Arc::new(output.with_reports(work.caller_chooses));
        // One at a time: the caller gets the layers by index.
        (Arc::clone(&output) as _, Some(output), 1)
    } else if work.destination.is_empty() {
        (Arc::new(NoOutput), None, at_once(None))
    } else {
        let output = open::output(&work.destination, &work.settings)?;
        (output.end, None, at_once(output.max_workers))
    };
    let workers = Workers::default();
    let watcher = CallWatcher { workers: workers.clone(), to_caller: to_caller.clone() };
    let executor = executor(&work, fleet, output.form(), at_once, watcher);
    let executor = match to_caller {
        Some(output) if work.caller_chooses => Choosing::new(executor, output, elements),
        _ => executor,
    };
    let done = whole(&work, source, output, executor, &workers, &answers).await?;
    match &done {
        Done::Image(outcome, _) if is_callers => {
            for found in work.found(outcome, FOUND_MAX)? {
                let found = Element::FilterOutput(found);
                send(&answers, Answer::Element(ImageElement { element: Some(found) })).await?;
            }
            let result = convert::whole_result(&done);
            let end = ImageEnd { layer_count: result.layer_count };
            send(&answers, Answer::Element(ImageElement { element: Some(Element::End(end)) })).await?;
            send(&answers, Answer::Result(result)).await
        }
        _ => told_whole(&work, &done, &answers).await,
    }
}

/// What has the layers of a call run, so many at once.
fn executor(
    work: &Work,
    fleet: &Fleet,
    form: LayerForm,
    at_once: usize,
    watcher: CallWatcher,
) -> Arc<dyn Executor> {
    let queue = fleet.queue(&work.standing(), &work.needs(form), false).of(work.origin());
    FleetExecutor::new(queue, at_once, Arc::new(watcher))
}

/// Runs the pipeline, and tells how far it is.
async fn whole(
    work: &Work,
    source: &dyn ImageSource,
    output: Arc<dyn ImageOutput>,
    executor: Arc<dyn Executor>,
    workers: &Workers,
    answers: &Answers,
) -> Result<Done, ServiceError> {
    let progress = ImagesProgress::default();
    let telling =
        progress::tell(&progress, workers, |progress| answers.try_send(Answer::Progress(progress)).is_ok());
    let begin = progress::begin_each(&progress, workers);
    let plan = Arc::clone(&work.plan);
    tokio::select! {
        done = process_whole(source, plan, output, executor, work.wanted, begin) => Ok(done?),
        never = telling => match never {},
    }
}

/// Tells what came of an image or index that is not the caller's.
async fn told_whole(work: &Work, done: &Done, answers: &Answers) -> Result<(), ServiceError> {
    match done {
        Done::Image(outcome, _) => told(answers, outcome, work.found(outcome, FOUND_MAX)?).await?,
        Done::Index(_, done) => {
            let mut room = FOUND_MAX;
            for DoneImage { outcome, is_filtered } in &done.images {
                let found: Vec<_> =
                    if *is_filtered { work.found(outcome, room)?.collect() } else { Vec::new() };
                room -= found.iter().map(|piece| piece.text.len()).sum::<usize>();
                told(answers, outcome, found.into_iter()).await?;
                send(answers, Answer::Image(convert::image_result(outcome))).await?;
            }
        }
    }
    send(answers, Answer::Result(convert::whole_result(done))).await
}

/// Tells of the layers of an image that is not the caller's, and of what filters found in it.
async fn told(
    answers: &Answers,
    outcome: &Outcome,
    found: impl Iterator<Item = FilterOutput>,
) -> Result<(), ServiceError> {
    for (layer, written) in outcome.image.layers.iter().zip(&outcome.layers) {
        send(answers, Answer::Layer(convert::layer_status(layer, written))).await?;
    }
    for found in found {
        send(answers, Answer::Found(found)).await?;
    }
    Ok(())
}

/// Hears of the layers of a call, for its caller.
struct CallWatcher {
    workers: Workers,
    /// Where the caller is the destination.
    to_caller: Option<Arc<ElementOutput<Answer>>>,
}

#[async_trait::async_trait]
impl LayerWatcher for CallWatcher {
    async fn begun(&self, layer: &Layer, worker: &str) -> Result<(), ServiceError> {
        self.workers.note(layer.index, worker);
        Ok(())
    }

    async fn waiting(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        self.workers.note_waiting(layer.index, reason);
        Ok(())
    }

    async fn held(&self, layer: &Layer, reason: &str) -> Result<(), ServiceError> {
        self.workers.note_waiting(layer.index, reason);
        Ok(())
    }

    async fn done(&self, layer: &Layer, _: &FilterChain, written: &WrittenLayer) -> Result<(), ServiceError> {
        self.workers.note_waiting(layer.index, "");
        match &self.to_caller {
            Some(output) => Ok(output.layer_done(layer, written).await?),
            None => Ok(()),
        }
    }
}

/// Sends what a search finds, layer by layer.
pub async fn search(
    work: Work,
    fleet: &Fleet,
    hits: mpsc::Sender<Vec<SearchHit>>,
) -> Result<(), ServiceError> {
    let source = open::source(&work.source, &work.settings)?;
    let at_once = source.max_workers.unwrap_or(work.settings.parallel);
    let queue = fleet.queue(&work.standing(), &work.needs(NoOutput.form()), false).of(work.origin());
    let executor = FleetExecutor::new(queue, at_once, Arc::new(HitWatcher { hits }));
    process(source.end.as_ref(), work.plan, Arc::new(NoOutput), executor, &Progress::default()).await?;
    Ok(())
}

/// Sends the hits of each layer as soon as it has been read.
struct HitWatcher {
    hits: mpsc::Sender<Vec<SearchHit>>,
}

#[async_trait::async_trait]
impl LayerWatcher for HitWatcher {
    async fn done(&self, layer: &Layer, _: &FilterChain, written: &WrittenLayer) -> Result<(), ServiceError> {
        let Some(Some(Report::Search(found))) = written.reports.first() else { return Ok(()) };
        let label = match &layer.diff_id {
            Some(diff_id) => diff_id.to_string(),
            None => layer.label(),
        };
        let mut page = Vec::new();
        let mut bytes = 0;
        for hit in convert::hits(layer.index, &label, &found.hits) {
            bytes += hit.path.len() + hit.target.len() + label.len();
            if !page.is_empty() && (page.len() == HITS_AT_ONCE || bytes > HIT_BYTES_AT_ONCE) {
                self.send(std::mem::take(&mut page)).await?;
                bytes = hit.path.len() + hit.target.len() + label.len();
            }
            page.push(hit);
        }
        if page.is_empty() { Ok(()) } else { self.send(page).await }
    }
}

impl HitWatcher {
    async fn send(&self, page: Vec<SearchHit>) -> Result<(), ServiceError> {
        self.hits.send(page).await.map_err(|_| ServiceError::CallerGone)
    }
}
