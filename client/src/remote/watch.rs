//! A job's events, followed to its end: also over the end of the coordinator that began it.

use std::sync::Arc;
use std::time::Duration;

use occy_pipeline::error::Error;
use occy_pipeline::filter::{FilterChain, Rendering, Target};
use occy_pipeline::mirror::{Counts, MirrorProgress};
use occy_pipeline::process::Summary;
use occy_pipeline::progress::{LayerProgress, LayerState, Progress};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::path::printable;
use occy_pipeline::wire::mirror::{of_image, of_progress};
use occy_proto::v1::job_event::Event;
use occy_proto::v1::{
    self, FilterOutput, ImageResult, JobError, JobEvent, JobState, JobStateChanged, WatchJobRequest,
};
use serde_json::json;

use super::connect::Coordinator;
use super::error::RemoteError;
use super::findings::{self, Findings};
use super::mirror::Images;
use super::tell_place;
use crate::commands::job::{error_document, result_document, word};
use crate::commands::process::{deliver, image_count, pushed, tell_beside};
use crate::commands::{self, print_bytes};
use crate::display::{Display, ImagePicture, Picture};
use crate::options::{Global, OutputFormat};
use crate::{Exit, Untold, say};

/// So often in a row a coordinator that is not there is asked again, the pauses growing to the longest one: some five minutes.
const RECONNECTS: u32 = 60;
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Says, when it is dropped, that a job goes on although nobody watches it here any more.
struct GoesOn(Option<String>);

impl GoesOn {
    /// What became of the job is known, or that there is none.
    fn settle(mut self) {
        self.0 = None;
    }
}

impl Drop for GoesOn {
    fn drop(&mut self) {
        if let Some(id) = self.0.take() {
            let id = printable(id.as_bytes());
            say(&format!(
                "job {id} goes on; `occyctl job watch {id}` follows it, `occyctl job cancel {id}` stops it"
            ));
        }
    }
}

/// A job that is watched.
pub(crate) struct Watch<'a> {
    coordinator: &'a Coordinator,
    id: String,
    /// The last event that was seen.
    after: u64,
    global: &'a Global,
    /// Of the image whose layers were told last, and how many there are before them in the job.
    progress: Progress,
    layers_before: usize,
    display: Option<Display>,
    findings: Findings,
    /// The filters of whoever submitted the job, whose files are written; others only get to read.
    chain: Option<FilterChain>,
    /// Of a mirror.
    images: Images,
    mirror: MirrorProgress,
    /// Whether events are printed as they come, and not what came of them at the end.
    prints_events: bool,
}

/// A job, which is an image's or a mirror: that is known once its coordinator tells how far it is.
struct JobPicture {
    image: ImagePicture,
    mirror: MirrorProgress,
}

impl JobPicture {
    fn is_mirror(&self) -> bool {
        self.mirror.get().images > 0
    }
}

impl Picture for JobPicture {
    fn line(&self) -> String {
        if self.is_mirror() { self.mirror.line() } else { self.image.line() }
    }

    fn lines(&self, columns: usize, rows: usize) -> Vec<String> {
        if self.is_mirror() { Vec::new() } else { self.image.lines(columns, rows) }
    }
}

/// How a job ended.
enum End {
    Succeeded(Box<ImageResult>),
    Failed(JobError),
    Cancelled,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(coordinator: &'a Coordinator, id: &str, after: u64, global: &'a Global) -> Self {
        Self {
            coordinator,
            id: id.to_owned(),
            after,
            global,
            progress: Progress::default(),
            layers_before: 0,
            display: None,
            findings: Findings::default(),
            chain: None,
            images: Images::default(),
            mirror: MirrorProgress::default(),
            prints_events: global.output_format == OutputFormat::Json,
        }
    }

    /// For whoever submitted the job: what its filters append to files is appended.
    pub(crate) fn for_submitter(mut self, filters: &[String]) -> Result<Self, Error> {
        self.chain = Some(findings::chain(filters)?);
        Ok(self)
    }

    /// For whoever wants to know what came of a mirror, and not how.
    pub(crate) fn for_report(self) -> Self {
        Self { prints_events: false, ..self }
    }

    /// Watches the job to its end.
    pub(crate) async fn run(mut self) -> anyhow::Result<Exit> {
        let goes_on = GoesOn(Some(self.id.clone()));
        self.begin_display();
        let mut lost = 0;
        let end = loop {
            let seen = self.after;
            let error = match self.follow().await {
                Ok(end) => break end,
                Err(error) => error,
            };
            match error.downcast_ref::<RemoteError>() {
                Some(remote) if remote.is_lost() => {}
                Some(_) => {
                    goes_on.settle();
                    return Err(error);
                }
                None => return Err(error),
            }
            lost = if self.after > seen { 1 } else { lost + 1 };
            if lost > RECONNECTS {
                return Err(error);
            }
            tracing::info!("{error:#}; asking again");
            tokio::time::sleep(LONGEST_PAUSE.min(Duration::from_millis(250) * lost)).await;
        };
        goes_on.settle();
        drop(self.display.take());
        match end {
            End::Succeeded(result) => self.succeeded(&result),
            End::Failed(error) => Err(RemoteError::of_job(&self.coordinator.url, error).into()),
            End::Cancelled => {
                say(&format!("error: job {} was cancelled", self.id));
                Ok(Exit::Failed)
            }
        }
    }

    /// Shows what there is to be shown now, in the place of what was.
    fn begin_display(&mut self) {
        drop(self.display.take());
        if !self.prints_events {
            let what = format!("job {}", self.id);
            // Nothing is kept here before the layers are known.
            let spools = SpoolDir::new("", 0);
            let image = ImagePicture::new(self.progress.clone(), &what, &spools);
            let picture = JobPicture { image, mirror: self.mirror.clone() };
            self.display = Some(Display::of(self.global, Arc::new(picture)));
        }
    }

    /// A layer of the image that is shown, by its place in the job.
    fn layer(&self, index: u32) -> Option<&LayerProgress> {
        self.progress.layers().get((index as usize).checked_sub(self.layers_before)?)
    }

    async fn follow(&mut self) -> anyhow::Result<End> {
        let request = WatchJobRequest { job_id: self.id.clone(), after_sequence: self.after };
        let error = |status| self.coordinator.error(status);
        let answered = self.coordinator.client.clone().watch_job(request).await;
        let mut events = answered.map_err(error)?.into_inner();
        while let Some(answer) = events.message().await.map_err(|status| self.coordinator.error(status))? {
            let Some(event) = answer.event else { continue };
            self.after = self.after.max(event.sequence);
            if self.prints_events {
                print_bytes(format!("{}\n", document(&event)).as_bytes())?;
            }
            if let Some(end) = self.take(event.event)? {
                return Ok(end);
            }
        }
        // Whoever begins behind the last event hears nothing more; the job itself tells how it ended.
        let request = v1::GetJobRequest { job_id: self.id.clone() };
        let answered = self.coordinator.client.clone().get_job(request).await;
        let job = answered.map_err(|status| self.coordinator.error(status))?.into_inner().job;
        let job = job.unwrap_or_default();
        end(job.state(), job.result, job.error)
            .ok_or_else(|| RemoteError::truncated(&self.coordinator.url).into())
    }

    fn take(&mut self, event: Option<Event>) -> anyhow::Result<Option<End>> {
        match event {
            Some(Event::StateChanged(JobStateChanged { state, result, error })) => {
                let state = JobState::try_from(state).unwrap_or(JobState::Unspecified);
                if state == JobState::Running {
                    self.images.begin();
                }
                return Ok(end(state, result, error));
            }
            Some(Event::LayersPlanned(planned)) => {
                let first = planned.layers.first().map_or(0, |layer| layer.index as usize);
                if first != self.layers_before {
                    // Another image of an index, or the first one once more.
                    self.layers_before = first;
                    self.progress = Progress::default();
                    self.begin_display();
                }
                if self.progress.layers().is_empty() {
                    let layers = planned.layers.iter();
                    self.progress.begin(layers.map(|layer| (layer.label.clone(), layer.source_size)));
                }
                planned.layers.iter().for_each(|layer| self.show(layer));
            }
            Some(Event::LayerChanged(layer)) => self.show(&layer),
            Some(Event::FilterOutput(piece)) => self.findings.take(piece)?,
            Some(Event::MirrorImages(images)) => self.images.take(images),
            Some(Event::Progress(progress)) => {
                if let Some(mirror) = &progress.mirror {
                    self.mirror.set(of_progress(mirror));
                }
                for running in progress.layers {
                    if let Some(layer) = self.layer(running.index) {
                        layer.bytes.set(running.bytes);
                    }
                }
            }
            None => {}
        }
        Ok(None)
    }

    fn show(&self, status: &v1::LayerStatus) {
        let Some(layer) = self.layer(status.index) else { return };
        match status.state() {
            // Of a coordinator that began the job again.
            v1::LayerState::Waiting | v1::LayerState::Unspecified => {
                layer.set(LayerState::Waiting);
                layer.bytes.reset();
            }
            v1::LayerState::Running => layer.set(LayerState::Running),
            v1::LayerState::Done | v1::LayerState::Reused => {
                layer.set(LayerState::Done);
                layer.bytes.set(layer.total.unwrap_or(0));
            }
        }
        tell_place(layer, status);
    }

    fn succeeded(self, result: &ImageResult) -> anyhow::Result<Exit> {
        match &result.mirror {
            None if self.prints_events => Ok(Exit::Done),
            None => self.tell(result),
            Some(mirror) if self.prints_events => Ok(commands::mirror::exit(mirror.failed, mirror.images)),
            Some(mirror) => {
                let (plan, report) = self.images.report(result, mirror).map_err(Error::from)?;
                let report = (!mirror.dry_run).then_some(&report);
                commands::mirror::tell(&plan, report, mirror.images, self.global)
            }
        }
    }

    /// Prints what came of the job, as `process` does.
    fn tell(&self, result: &ImageResult) -> anyhow::Result<Exit> {
        for rendering in self.renderings().map_err(Untold)? {
            deliver(&rendering, false).map_err(Untold)?;
        }
        if !self.global.quiet {
            tell_beside(result)?;
            if !result.manifest_digest.is_empty() {
                say(&pushed(&result.destination, &result.manifest_digest, image_count(result)));
            }
            let elapsed = Duration::from_millis(result.elapsed_millis);
            say(&Summary { bytes: result.bytes, layers: result.layer_count as usize, elapsed }.to_string());
        }
        Ok(Exit::Done)
    }

    fn renderings(&self) -> anyhow::Result<Vec<Rendering>> {
        match &self.chain {
            Some(chain) => self.findings.renderings(chain),
            None => Ok(self.findings.texts().map(|text| Rendering { to: Target::Stdout, text }).collect()),
        }
    }
}

fn end(state: JobState, result: Option<ImageResult>, error: Option<JobError>) -> Option<End> {
    match state {
        JobState::Succeeded => Some(End::Succeeded(Box::new(result.unwrap_or_default()))),
        JobState::Failed => Some(End::Failed(error.unwrap_or_default())),
        JobState::Cancelled => Some(End::Cancelled),
        JobState::Unspecified | JobState::Queued | JobState::Running | JobState::Finalizing => None,
    }
}

fn document(event: &JobEvent) -> serde_json::Value {
    let mut document = json!({
        "sequence": event.sequence,
        "time": event.time.as_ref().map(ToString::to_string),
    });
    let (kind, what) = match &event.event {
        Some(Event::StateChanged(change)) => {
            document["result"] = change.result.as_ref().map(result_document).into();
            document["error"] = change.error.as_ref().map(error_document).into();
            ("state", word(change.state()).into())
        }
        Some(Event::LayersPlanned(planned)) => {
            ("layers", planned.layers.iter().map(layer_document).collect())
        }
        Some(Event::LayerChanged(layer)) => ("layer", layer_document(layer)),
        Some(Event::FilterOutput(FilterOutput { filter, append_to, text, last })) => {
            ("found", json!({"filter": filter, "append_to": append_to, "text": text, "last": last}))
        }
        Some(Event::MirrorImages(told)) => ("images", told.images.iter().map(image_document).collect()),
        Some(Event::Progress(progress)) => {
            document["mirror"] = progress.mirror.map(|told| counts_document(&of_progress(&told))).into();
            let layers = progress.layers.iter();
            ("progress", layers.map(|layer| json!({"index": layer.index, "bytes": layer.bytes})).collect())
        }
        None => ("unknown", serde_json::Value::Null),
    };
    document[kind] = what;
    document
}

fn image_document(image: &v1::MirrorImage) -> serde_json::Value {
    match of_image(image.clone()) {
        Ok((action, Some(outcome))) => commands::mirror::image_document(&action, &outcome),
        Ok((action, None)) => commands::mirror::action_document(&action),
        Err(error) => json!({"source": image.source, "target": image.target, "problem": error.to_string()}),
    }
}

fn counts_document(counts: &Counts) -> serde_json::Value {
    let Counts { images, done, failed, moved } = counts;
    json!({
        "images": images,
        "done": done,
        "failed": failed,
        "bytes_fetched": moved.bytes_fetched,
        "bytes_uploaded": moved.bytes_uploaded,
        "mounted": moved.mounted,
    })
}

/// A layer as it is printed for programs.
pub(crate) fn layer_document(layer: &v1::LayerStatus) -> serde_json::Value {
    let named = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    json!({
        "index": layer.index,
        "state": layer.state().as_str_name().trim_start_matches("LAYER_STATE_").to_lowercase(),
        "label": layer.label,
        "source_size": layer.source_size,
        "digest": named(&layer.digest),
        "size": layer.size,
        "diff_id": named(&layer.diff_id),
        "edited": layer.changed,
        "worker": named(&layer.worker),
        "waiting_reason": named(&layer.waiting_reason),
    })
}
