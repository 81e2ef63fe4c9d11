//! Calls: images that travel on the caller's own stream.
//!
//! | what | where |
//! |---|---|
//! | the caller as a source: elements into spools | `source` |
//! | the caller as a destination: elements out of the pipeline | `output` |
//! | one call, whichever ends are the caller's | here |

pub mod output;
pub mod source;

use std::sync::Arc;

use futures_util::stream::BoxStream;
use occy_pipeline::element::{Layer, WrittenLayer};
use occy_pipeline::filter::search::Search;
use occy_pipeline::filter::{FilterChain, Report};
use occy_pipeline::open;
use occy_pipeline::output::ImageOutput;
use occy_pipeline::output::nothing::NoOutput;
use occy_pipeline::process::process;
use occy_pipeline::progress::Progress;
use occy_pipeline::source::ImageSource;
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{FilterOutput, ImageElement, ImageEnd, ImageResult, SearchHit};
use tokio::sync::mpsc;
use tonic::Status;

use self::output::ClientOutput;
use crate::admit::{Gate, Work};
use crate::convert;
use crate::error::ServiceError;
use crate::executor::{FleetExecutor, LayerWatcher, Unwatched};
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
    /// What came of the image. Nothing follows.
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
    elements: Elements,
    answers: Answers,
) -> Result<(), ServiceError> {
    let opened;
    let (source, source_workers): (&dyn ImageSource, _) = if work.source.is_empty() {
        opened = Box::new(source::receive(elements, &work.settings.spools).await?) as Box<dyn ImageSource>;
        (opened.as_ref(), None)
    } else {
        let source = open::source(&work.source, &work.settings)?;
        opened = source.end;
        (opened.as_ref(), source.max_workers)
    };
    let queue = fleet.queue(&"".into(), &work.needs(), false);
    let is_callers = work.destination.is_empty();
    let (output, executor): (Arc<dyn ImageOutput>, _) = if is_callers {
        let output = Arc::new(ClientOutput::new(answers.clone(), work.form));
        // One at a time: the caller gets the layers by index.
        (Arc::clone(&output) as _, FleetExecutor::new(queue, 1, output))
    } else {
        let output = open::output(&work.destination, &work.settings)?;
        let at_once = source_workers.max(output.max_workers).unwrap_or(work.settings.parallel);
        (output.end, FleetExecutor::new(queue, at_once, Arc::new(Unwatched)))
    };
    let outcome = process(source, Arc::clone(&work.plan), output, executor, &Progress::default()).await?;
    for found in convert::filter_outputs(&outcome, &work.plan.chain, FOUND_MAX)? {
        let answer = match is_callers {
            true => Answer::Element(ImageElement { element: Some(Element::FilterOutput(found)) }),
            false => Answer::Found(found),
        };
        send(&answers, answer).await?;
    }
    let result = convert::image_result(&outcome);
    if is_callers {
        let end = ImageEnd { layer_count: result.layer_count };
        send(&answers, Answer::Element(ImageElement { element: Some(Element::End(end)) })).await?;
    }
    send(&answers, Answer::Result(result)).await
}

/// Sends what a search finds, layer by layer.
pub async fn search(
    work: Work,
    gate: &Gate,
    fleet: &Fleet,
    search: Search,
    hits: mpsc::Sender<Vec<SearchHit>>,
) -> Result<(), ServiceError> {
    let plan = gate.plan(FilterChain::new(vec![Arc::new(search)]), false);
    let work = Work { plan, ..work };
    let source = open::source(&work.source, &work.settings)?;
    let at_once = source.max_workers.unwrap_or(work.settings.parallel);
    let queue = fleet.queue(&"".into(), &work.needs(), false);
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
    async fn done(&self, layer: &Layer, written: &WrittenLayer) -> Result<(), ServiceError> {
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
