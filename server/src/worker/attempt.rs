//! Layers that connected workers have. Each attempt at one has a token that nobody guesses: the worker's right to its bytes, and the
//! only name under which a result is taken. When the attempt ends, in whatever way, the token is worth nothing.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use occy_pipeline::blob::{BlobError, ByteCount, LayerStream, LayerWriter};
use occy_pipeline::compression::Format;
use occy_pipeline::digest::{Digest, Hasher};
use occy_pipeline::element::{StoredLayer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::executor::LayerTask;
use occy_pipeline::filter::Report;
use occy_pipeline::output::{LayerForm, Moved};
use occy_pipeline::progress::LayerState;
use occy_pipeline::registry::Repository;
use occy_pipeline::wire::convert;
use occy_proto::v1::task_result::Outcome;
use occy_proto::v1::{
    CoordinatorBlob, RegistryRepository, Task, TaskDestination, TaskDone, TaskError, TaskFault, TaskResult,
    TaskSource, UploadState, task_destination, task_source,
};
use occy_worker::convert::task_form;
use occy_worker::telemetry;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::seat::{NotTold, RemoteSeat};
use super::upload::Upload;
use crate::error::{RemoteError, ServiceError};
use crate::fleet::Origin;

/// How an attempt failed.
#[derive(Debug)]
pub enum Failure {
    /// As it would anywhere.
    Task(Error),
    /// By the worker's fault, or because the worker was lost.
    Worker(String),
    /// The worker has nothing of it, and gets no more: it is being stopped, or was lost before it could be told.
    HandedBack,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Task(error)
    }
}

/// The attempts that have not ended, by their tokens. Clones are handles on the same ones.
#[derive(Clone, Debug, Default)]
pub struct Attempts(Arc<Mutex<HashMap<String, Arc<Attempt>>>>);

/// An attempt that a worker has.
pub struct Attempt {
    /// Whose.
    worker: u64,
    /// Where that is.
    seat: RemoteSeat,
    /// As the worker is told it.
    message: Task,
    /// What it is about.
    pub(super) task: LayerTask,
    /// Taken by the first that ends it.
    end: Mutex<Option<oneshot::Sender<End>>>,
    closed: watch::Sender<bool>,
    /// Of the layer, not of the attempt alone.
    upload: Upload,
    /// To whoever has them stored.
    writes: mpsc::Sender<Write>,
    /// The layer that is written, where the coordinator stores it. Held by the stream that brings it.
    pub(super) layer: tokio::sync::Mutex<Incoming<LayerSink>>,
    /// What the filters report.
    pub(super) reports: tokio::sync::Mutex<Incoming<Vec<u8>>>,
}

/// A blob that comes from a worker, maybe in several streams.
#[derive(Debug)]
pub(super) enum Incoming<S> {
    /// Nothing has come, or nothing of it counts any more.
    Nothing,
    /// What has come went there.
    Open { sink: S, hasher: Box<Hasher> },
    /// All of it.
    Complete { sink: S, size: u64 },
}

/// Where the bytes of a layer go.
#[derive(Debug)]
pub(super) struct LayerSink {
    /// None when all have passed.
    pub(super) writer: Option<LayerWriter>,
    /// Hears when they are stored. Dropped, they could not be.
    pub(super) stored: oneshot::Receiver<()>,
}

/// A layer that is to be stored.
struct Write {
    stream: LayerStream,
    format: Format,
    stored: oneshot::Sender<()>,
}

/// A layer that is being stored, and who hears of it.
type Storing<'a> = (BoxFuture<'a, Result<StoredLayer, Error>>, oneshot::Sender<()>);

/// What ends an attempt.
enum End {
    /// The worker says so.
    Result(Outcome),
    /// Its source failed.
    Source(Error),
    /// The worker is lost.
    Lost(String),
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt")
            .field("worker", &self.worker)
            .field("layer", &self.task.layer)
            .finish_non_exhaustive()
    }
}

impl Attempt {
    /// Whether it is a worker's.
    pub(super) fn is_of(&self, worker: u64) -> bool {
        self.worker == worker
    }

    /// How far it is.
    pub(super) fn progress(&self, bytes: u64) {
        self.task.layer_progress().bytes.set(bytes);
    }

    /// How far its upload is, for the next attempt. Only one to a registry can be gone on with.
    pub(super) fn uploaded(&self, state: UploadState) {
        if self.task.output.repository().is_some() {
            self.upload.set(state);
        }
    }

    /// Its source failed: that is why the attempt fails, whatever the worker makes of it.
    pub(super) fn source_failed(&self, error: BlobError) {
        self.end(End::Source(error.into()));
    }

    /// Waits until it has ended.
    pub(super) async fn closed(&self) {
        // The sender is ours, so that this cannot fail.
        let _ = self.closed.subscribe().wait_for(|&closed| closed).await;
    }

    /// Has the bytes stored that are going to come. What came of them before is void.
    pub(super) async fn begin_layer(&self, format: Format) -> Option<LayerSink> {
        let (writer, stream) = LayerStream::channel(CHANNEL, occy_pipeline::blob::BufferPool::default());
        let (stored, is_stored) = oneshot::channel();
        self.writes.send(Write { stream, format, stored }).await.ok()?;
        Some(LayerSink { writer: Some(writer), stored: is_stored })
    }

    fn is_going_on(&self) -> bool {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn end(&self, end: End) {
        if let Some(sender) = self.end.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Nobody hears of an attempt that was given up in this moment.
            let _ = sender.send(end);
        }
    }
}

/// Chunks between a worker's stream and the destination: about a megabyte.
const CHANNEL: usize = 4;

impl Attempts {
    /// The attempt with this token.
    pub(super) fn find(&self, token: &str) -> Option<Arc<Attempt>> {
        self.lock().get(token).cloned()
    }

    /// Whether a result under that token would be taken.
    #[cfg(test)]
    pub(crate) fn counts(&self, token: &str) -> bool {
        self.find(token).is_some_and(|attempt| attempt.is_going_on())
    }

    /// Where the worker is that has the first of these which has not ended.
    pub(super) fn seat(&self, tokens: &[String]) -> Option<RemoteSeat> {
        tokens.iter().find_map(|token| self.find(token)).map(|attempt| attempt.seat.clone())
    }

    /// Those of a worker's whose end has not come: what it was told.
    pub(super) fn of(&self, worker: u64) -> Vec<Task> {
        let attempts = self.lock();
        let its = attempts.values().filter(|attempt| attempt.is_of(worker) && attempt.is_going_on());
        let mut its: Vec<_> = its.map(|attempt| attempt.message.clone()).collect();
        its.sort_by(|one, other| (&one.job_id, one.layer_index).cmp(&(&other.job_id, other.layer_index)));
        its
    }

    /// What a worker says came of an attempt. One that is not its own, or not any more, changes nothing.
    pub(super) fn finish(&self, worker: u64, result: TaskResult) {
        let Some(attempt) = self.find(&result.attempt).filter(|attempt| attempt.is_of(worker)) else {
            tracing::debug!(worker, "a result of an attempt that has ended");
            return;
        };
        attempt.end(End::Result(result.outcome.unwrap_or_else(|| Outcome::Error(TaskError::default()))));
    }

    /// All attempts of a worker are lost.
    pub fn lose(&self, worker: u64, reason: &str) {
        let mut lost: Vec<_> =
            self.lock().values().filter(|attempt| attempt.is_of(worker)).cloned().collect();
        // In an order that is the same for the same fleet.
        lost.sort_by_key(|attempt| (attempt.message.job_id.clone(), attempt.message.layer_index));
        lost.iter().for_each(|attempt| attempt.end(End::Lost(reason.to_owned())));
    }

    /// Runs a layer on a connected worker, which goes on with its `upload`, where there is one, and says how far it has come.
    ///
    /// # Cancel safety
    /// Dropped, it tells the worker to stop, and the attempt's token is worth nothing any more.
    pub async fn run(
        &self,
        worker: u64,
        seat: &RemoteSeat,
        task: &LayerTask,
        origin: &Origin,
        upload: &Upload,
    ) -> Result<WrittenLayer, Failure> {
        if let Some(known) = task.known().await? {
            return Ok(known);
        }
        let is_copied = task.plan.chain.is_empty() && matches!(task.output.form(), LayerForm::Stored { .. });
        if task.layer.is_foreign() && is_copied {
            // Its bytes are elsewhere, and stay there.
            return Ok(task.run().await?);
        }
        let (end, ended) = oneshot::channel();
        let (writes, written) = mpsc::channel(1);
        let token = Uuid::new_v4().to_string();
        let attempt = Arc::new(Attempt {
            worker,
            seat: seat.clone(),
            message: Task { resume: upload.get(), ..message(&token, task, origin) },
            upload: upload.clone(),
            task: task.clone(),
            end: Mutex::new(Some(end)),
            closed: watch::Sender::new(false),
            writes,
            layer: tokio::sync::Mutex::new(Incoming::Nothing),
            reports: tokio::sync::Mutex::new(Incoming::Nothing),
        });
        let progress = task.layer_progress();
        progress.bytes.reset();
        progress.set(LayerState::Running);
        let mut open = Open::new(self, token, Arc::clone(&attempt));
        // Lost since the lease was given: nobody will say so any more.
        if seat.is_lost() {
            return Err(Failure::HandedBack);
        }
        seat.give(attempt.message.clone())
            .map_err(|NotTold| Failure::Worker("it does not read what it is told".to_owned()))?;
        let (end, stored) = open.follow(ended, written).await?;
        let outcome = match end {
            End::Source(error) => return Err(error.into()),
            End::Lost(reason) => return Err(Failure::Worker(format!("it was lost: {reason}"))),
            End::Result(outcome) => outcome,
        };
        open.is_done = true;
        let done = match outcome {
            Outcome::Done(done) => done,
            Outcome::Error(error) => return Err(failure(error)),
        };
        let reports = match std::mem::replace(&mut *attempt.reports.lock().await, Incoming::Nothing) {
            Incoming::Complete { sink, .. } => Some(sink),
            Incoming::Nothing | Incoming::Open { .. } => None,
        };
        let written = believe(task, &done, stored, reports.as_deref()).map_err(Failure::Worker)?;
        let is_kept = written.stored == StoredLayer::Original;
        let is_ours = task.output.repository().is_none() && task.output.form() != LayerForm::Nothing;
        let mut reused = done.reused;
        if is_kept && is_ours {
            reused = task.output.copy_layer(&task.layer, &ByteCount::default()).await? == Moved::Nothing;
        }
        progress.set(if reused { LayerState::Reused } else { LayerState::Done });
        Ok(written)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Attempt>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attempt that is going on. Dropped, it has ended.
struct Open<'a> {
    attempts: &'a Attempts,
    token: String,
    attempt: Arc<Attempt>,
    /// The worker has nothing to do with it any more.
    is_done: bool,
}

impl<'a> Open<'a> {
    fn new(attempts: &'a Attempts, token: String, attempt: Arc<Attempt>) -> Self {
        attempts.lock().insert(token.clone(), Arc::clone(&attempt));
        Self { attempts, token, attempt, is_done: false }
    }

    /// Stores what the worker writes until the attempt ends; gives its end, and what was stored last.
    async fn follow(
        &self,
        mut ended: oneshot::Receiver<End>,
        mut writes: mpsc::Receiver<Write>,
    ) -> Result<(End, Option<StoredLayer>), Failure> {
        let task = &self.attempt.task;
        let ignored = ByteCount::default();
        let mut storing: Option<Storing<'_>> = None;
        let mut last = None;
        let end = loop {
            tokio::select! {
                biased;
                // A layer that begins anew has dropped what came before, so that this ends first.
                stored = async { storing.as_mut().expect("checked").0.as_mut().await }, if storing.is_some() => {
                    let told = storing.take();
                    match (stored, told) {
                        (Ok(stored), Some((_, told))) => {
                            last = Some(stored);
                            // Who brought it may have gone.
                            let _ = told.send(());
                        }
                        (Err(error), _) if !error.is_interrupted() => return Err(error.into()),
                        _ => last = None,
                    }
                }
                Some(write) = writes.recv(), if storing.is_none() => {
                    last = None;
                    let Write { stream, format, stored } = write;
                    storing = Some((task.output.write_layer(task.layer.index, stream, format, &ignored), stored));
                }
                end = &mut ended => break end.unwrap_or_else(|_| End::Lost("it is gone".to_owned())),
            }
        };
        self.close();
        if let Some((storing, told)) = storing {
            drop(told);
            // What is half written ends, before anybody else writes the same layer.
            *self.attempt.layer.lock().await = Incoming::Nothing;
            let _ = storing.await;
        }
        Ok((end, last))
    }

    fn close(&self) {
        self.attempts.lock().remove(&self.token);
        self.attempt.closed.send_replace(true);
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.close();
        if !self.is_done {
            self.attempt.seat.cancel(&self.token);
        }
    }
}

/// The task as the worker is told it.
fn message(token: &str, task: &LayerTask, origin: &Origin) -> Task {
    let LayerTask { layer, plan, output, .. } = task;
    let at = |repository: &Repository| RegistryRepository {
        host: repository.host().to_owned(),
        repository: repository.name().to_owned(),
        ask_for_access: repository.has_credentials(),
        account: if repository.has_credentials() { repository.account() } else { String::new() },
    };
    let (digest, size) = match &layer.descriptor {
        Some(descriptor) => (descriptor.digest.to_string(), Some(descriptor.size)),
        // Docker's schema 1 names its layers by digest alone.
        None if layer.origin.is_some() => (layer.blob.identity(), layer.blob.size()),
        None => (String::new(), layer.blob.size()),
    };
    let source = TaskSource {
        content: Some(match &layer.origin {
            Some(origin) => task_source::Content::Registry(at(origin)),
            None => task_source::Content::Coordinator(CoordinatorBlob {}),
        }),
        digest,
        size,
        media_type: layer
            .descriptor
            .as_ref()
            .map(|descriptor| descriptor.media_type.clone())
            .unwrap_or_default(),
        compression: convert::compression(layer.format).into(),
        diff_id: layer.diff_id.as_ref().map(Digest::to_string).unwrap_or_default(),
        keep_stored: layer.keep_stored,
        known_by_diff_id_alone: layer.known_by_diff_id_alone,
        urls: layer.descriptor.as_ref().map(|descriptor| descriptor.urls.clone()).unwrap_or_default(),
    };
    let (form, compression) = task_form(output.form());
    let destination = TaskDestination {
        content: Some(match output.repository() {
            Some(repository) => task_destination::Content::Registry(at(repository)),
            None => task_destination::Content::Coordinator(CoordinatorBlob {}),
        }),
        form: form.into(),
        compression,
        foreign_layers: origin.foreign_layers,
    };
    let mut filters = plan.chain.specs();
    // What passes no filters, in an index whose images do, is not searched either.
    let search = origin.search.clone().filter(|_| filters.pop().is_some());
    Task {
        attempt: token.to_owned(),
        job_id: origin.job.clone(),
        layer_index: convert::count(layer.index),
        source: Some(source),
        destination: Some(destination),
        filters,
        search,
        verify_diff_id: plan.verify_diff_ids,
        max_layer_size: plan.max_layer_size,
        traceparent: telemetry::traceparent().unwrap_or_default(),
        resume: None,
    }
}

/// Whether a worker gives a task back because it is being stopped.
pub(super) fn is_handed_back(result: &TaskResult) -> bool {
    matches!(&result.outcome, Some(Outcome::Error(error)) if error.fault() == TaskFault::HandedBack)
}

/// Why a worker says that it failed.
fn failure(error: TaskError) -> Failure {
    match error.fault() {
        TaskFault::Task => Failure::Task(ServiceError::Remote(RemoteError::from(error)).into()),
        TaskFault::HandedBack => Failure::HandedBack,
        TaskFault::Worker | TaskFault::Unspecified => Failure::Worker(error.message),
    }
}

/// What a worker says that it did, checked against what is known here. What is in a registry is looked at there, before the image is
/// made visible.
fn believe(
    task: &LayerTask,
    done: &TaskDone,
    stored: Option<StoredLayer>,
    reports: Option<&[u8]>,
) -> Result<WrittenLayer, String> {
    let LayerTask { layer, plan, output, .. } = task;
    let digest = |text: &str| text.parse::<Digest>().map_err(|error| format!("it gave no digest: {error}"));
    let diff_id = match done.diff_id.as_str() {
        "" => None,
        text => Some(digest(text)?),
    };
    let is_kept = done.original || output.form() == LayerForm::Nothing;
    let stored = if is_kept {
        if done.changed || !plan.may_keep(output.form(), layer) {
            return Err("it left a layer as it is that cannot stay so".to_owned());
        }
        StoredLayer::Original
    } else {
        let (claimed, claimed_size) = (digest(&done.digest)?, done.size);
        match stored {
            _ if output.repository().is_some() => {
                let format = convert::format(done.compression()).unwrap_or(Format::None);
                StoredLayer::Written { digest: claimed, size: claimed_size, format }
            }
            Some(StoredLayer::Written { digest, size, .. })
                if (&digest, size) != (&claimed, claimed_size) =>
            {
                return Err(format!(
                    "it wrote {digest} of {size} bytes and says {claimed} of {claimed_size} bytes"
                ));
            }
            Some(stored) => stored,
            None => return Err("it says that it wrote a layer, and did not".to_owned()),
        }
    };
    match (&stored, &diff_id, &layer.diff_id) {
        (StoredLayer::Written { digest, .. }, Some(diff_id), _)
            if output.form() == LayerForm::Tar && digest != diff_id =>
        {
            return Err(format!("it wrote the tar {digest} and says that it is {diff_id}"));
        }
        (StoredLayer::Written { .. }, None, _) => {
            return Err("it does not say the diff_id of what it wrote".to_owned());
        }
        (_, Some(diff_id), Some(expected)) if !done.changed && diff_id != expected => {
            return Err(format!("it says that an unchanged layer is {diff_id}, which is {expected}"));
        }
        _ => {}
    }
    let reports: Vec<Option<Report>> = match reports {
        Some(document) => serde_json::from_slice(document)
            .map_err(|error| format!("its reports cannot be read: {error}"))?,
        None => vec![None; plan.chain.filters().len()],
    };
    if reports.len() != plan.chain.filters().len() {
        return Err(format!(
            "it reports of {} filters, and there are {}",
            reports.len(),
            plan.chain.filters().len()
        ));
    }
    let diff_id = diff_id.or_else(|| layer.diff_id.clone());
    Ok(WrittenLayer { index: layer.index, stored, diff_id, edited: done.changed, reports })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use occy_pipeline::blob::MemoryBlob;
    use occy_pipeline::codec::Pool;
    use occy_pipeline::element::Layer;
    use occy_pipeline::filter::FilterChain;
    use occy_pipeline::manifest::Annotations;
    use occy_pipeline::output::nothing::NoOutput;
    use occy_pipeline::progress::Progress;
    use occy_pipeline::spool::SpoolDir;
    use occy_pipeline::tar::Limits;
    use occy_pipeline::task::LayerPlan;
    use occy_proto::v1::connect_response::Message;
    use occy_proto::v1::{ConnectResponse, Welcome};
    use tokio::time::timeout;
    use tonic::Status;

    use super::*;
    use crate::worker::seat::Seat;

    const SOON: Duration = Duration::from_millis(50);

    type Told = mpsc::Receiver<Result<ConnectResponse, Status>>;

    fn task() -> LayerTask {
        let layer = Layer {
            index: 0,
            blob: Arc::new(MemoryBlob::new("tar".into())),
            descriptor: None,
            format: Format::None,
            diff_id: None,
            origin: None,
            keep_stored: false,
            known_by_diff_id_alone: false,
        };
        let progress = Progress::default();
        progress.begin([(layer.label(), None)].into_iter());
        let plan = LayerPlan {
            annotations: Annotations::default(),
            chain: FilterChain::default(),
            pool: Pool::shared().clone(),
            spools: SpoolDir::new("/tmp", 0),
            limits: Limits::default(),
            max_layer_size: 1,
            verify_diff_ids: false,
        };
        LayerTask { layer, plan: Arc::new(plan), output: Arc::new(NoOutput), progress }
    }

    fn seat() -> (RemoteSeat, Told) {
        let (messages, told) = mpsc::channel(4);
        let seat = RemoteSeat::new(mpsc::channel(1).0);
        seat.connect(messages, Welcome::default());
        (seat, told)
    }

    /// What it is told next, behind the welcome.
    async fn told(told: &mut Told) -> Message {
        match told.recv().await.unwrap().unwrap().message.unwrap() {
            Message::Welcome(_) => told.recv().await.unwrap().unwrap().message.unwrap(),
            other => other,
        }
    }

    fn done(attempt: &str) -> TaskResult {
        let done = TaskDone { original: true, ..TaskDone::default() };
        TaskResult { attempt: attempt.to_owned(), outcome: Some(Outcome::Done(done)) }
    }

    #[tokio::test]
    async fn a_worker_that_is_lost_before_it_has_its_layer_is_not_waited_for() {
        let attempts = Attempts::default();
        let (seat, _told) = seat();
        Seat::Remote(seat.clone()).lose();
        attempts.lose(1, "it is tried");
        let result =
            timeout(SOON, attempts.run(1, &seat, &task(), &Origin::default(), &Upload::default())).await;
        assert!(matches!(result.unwrap(), Err(Failure::HandedBack)));
        assert!(attempts.lock().is_empty());
    }

    #[tokio::test]
    async fn only_who_has_an_attempt_ends_it_and_only_once() {
        let attempts = Attempts::default();
        let (seat, mut heard) = seat();
        let (task, origin, upload) = (task(), Origin::default(), Upload::default());
        let running = attempts.run(1, &seat, &task, &origin, &upload);
        let ending = async {
            let Message::Task(given) = told(&mut heard).await else { panic!("a task comes first") };
            attempts.finish(2, done(&given.attempt));
            attempts.finish(1, done("another"));
            assert!(attempts.find(&given.attempt).is_some());
            attempts.finish(1, done(&given.attempt));
            attempts.lose(1, "too late");
            given.attempt
        };
        let (result, attempt) = tokio::join!(running, ending);
        assert_eq!(result.unwrap().stored, StoredLayer::Original);
        assert!(attempts.find(&attempt).is_none());
        attempts.finish(1, done(&attempt));
    }

    #[tokio::test]
    async fn a_worker_without_a_stream_keeps_its_attempt_and_is_found_by_it() {
        let attempts = Attempts::default();
        let (seat, mut heard) = seat();
        let (task, origin, upload) = (task(), Origin::default(), Upload::default());
        let running = attempts.run(1, &seat, &task, &origin, &upload);
        let returning = async {
            let Message::Task(given) = told(&mut heard).await else { panic!("a task comes first") };
            seat.disconnect();
            let token = given.attempt.clone();
            assert!(attempts.seat(&["another".to_owned(), token.clone()]).is_some());
            assert!(attempts.seat(&["another".to_owned()]).is_none());
            // Whoever comes back without it gets it once more.
            assert_eq!(attempts.of(1), [given]);
            assert!(attempts.of(2).is_empty());
            attempts.finish(1, done(&token));
            assert!(attempts.of(1).is_empty());
        };
        let (result, ()) = tokio::join!(running, returning);
        assert_eq!(result.unwrap().stored, StoredLayer::Original);
    }

    #[tokio::test]
    async fn a_layer_that_nobody_wants_any_more_is_taken_from_its_worker() {
        let attempts = Attempts::default();
        let (seat, mut heard) = seat();
        assert!(
            timeout(SOON, attempts.run(1, &seat, &task(), &Origin::default(), &Upload::default()))
                .await
                .is_err()
        );
        let Message::Task(given) = told(&mut heard).await else { panic!("a task comes first") };
        let Message::Cancel(cancel) = told(&mut heard).await else { panic!("then its end") };
        assert_eq!(cancel.attempt, given.attempt);
        assert!(attempts.lock().is_empty());
    }
}
