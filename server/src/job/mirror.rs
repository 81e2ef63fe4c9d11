//! A mirror as a job: it has no layers of its own, and this coordinator moves the bytes by itself, but for those that pass filters: they
//! are for workers.
//!
//! What comes of its images is written down about once a second, many together. An attempt begins anew, whatever an earlier one did:
//! registries say what is there, and nothing of that is moved again.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use occy_pipeline::element::{Layer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::executor::Executor;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::mirror::{Detail, MirrorProgress, Outcome, Plan, Report, Survey, TagLocks, What};
use occy_pipeline::reference::Reference;
use occy_pipeline::wire;
use occy_proto::v1::{ImageResult, MirrorImage, MirrorImages, MirrorSpec};
use prost::Message;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

use super::output::Attempt;
use super::runner::place_of;
use super::state::Change;
use crate::admit::MirrorWork;
use crate::error::ServiceError;
use crate::executor::{FleetExecutor, LayerWatcher};
use crate::fleet::FleetQueue;

/// Images of one mirror, at all its targets: what events can tell of, and a plan can hold.
const IMAGES_MAX: usize = 50_000;
/// How often what has come of images is written down.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Bytes of images in one event, and with one image more at most.
const EVENT_BYTES: usize = 48 * 1024;

/// What has layers that pass filters run by workers.
pub(crate) fn executor(queue: FleetQueue, parallel: usize) -> Arc<dyn Executor> {
    FleetExecutor::new(queue, parallel, Arc::new(Unwatched))
}

/// Hears nothing of layers: a mirror tells of whole images.
struct Unwatched;

#[async_trait::async_trait]
impl LayerWatcher for Unwatched {
    async fn done(&self, _: &Layer, _: &FilterChain, _: &WrittenLayer) -> Result<(), ServiceError> {
        Ok(())
    }
}

/// Does what a mirror comes to now, or tells what that would be.
pub async fn run(
    attempt: &Attempt,
    spec: &MirrorSpec,
    work: MirrorWork,
    progress: &MirrorProgress,
) -> Result<(), ServiceError> {
    let MirrorWork { client: _client, config, mut ends, .. } = work;
    let owner = Arc::new(Owner { attempt: attempt.clone(), lost: Mutex::default() });
    ends.progress = progress.clone();
    ends.locks = Some(Arc::clone(&owner) as Arc<dyn TagLocks>);
    let start = Instant::now();
    let detail = if spec.dry_run { Detail::Price } else { Detail::Need };
    let survey = Survey::make(&config, &ends, detail).await;
    let plan = Plan::of(&config, &survey);
    if plan.actions.len() > IMAGES_MAX {
        let problem = format!("comes to {} images, more than {IMAGES_MAX}", plan.actions.len());
        return Err(ServiceError::Field { field: "config", problem });
    }
    let teller =
        Teller { owner: &owner, plan: &plan, tells_unchanged: spec.tell_unchanged, untold: Mutex::default() };
    let report = if spec.dry_run {
        (0..plan.actions.len()).for_each(|index| teller.take(index, None));
        None
    } else {
        let work = survey.run(&config, &plan, &ends, |index, outcome| teller.take(index, Some(outcome)));
        Some(teller.while_telling(work).await?)
    };
    teller.tell().await?;
    let elapsed = report.as_ref().map_or_else(|| start.elapsed(), |report| report.elapsed);
    let result = ImageResult {
        elapsed_millis: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        mirror: Some(wire::mirror::result(&plan, report.as_ref())),
        ..ImageResult::default()
    };
    attempt.apply(vec![Change::Finalize, Change::Succeed(Box::new(result))], None).await
}

/// The right to change tags, which ends with the claim, and which one job at a time has of each.
#[derive(Debug)]
struct Owner {
    attempt: Attempt,
    /// Why it could not be had: then the job is another's, or waits until it can be written down, and no image is at fault.
    lost: Mutex<Option<ServiceError>>,
}

#[async_trait::async_trait]
impl TagLocks for Owner {
    async fn lock(&self, tag: &Reference) -> Result<(), Error> {
        let Attempt { engine, claim, .. } = &self.attempt;
        let error = match engine.lock(claim, &place_of(tag)).await {
            Ok(true) => return Ok(()),
            Ok(false) => ServiceError::JobEnded,
            Err(error) => error.into(),
        };
        *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        Err(ServiceError::JobEnded.into())
    }

    async fn unlock(&self, tag: &Reference) {
        let Attempt { engine, claim, .. } = &self.attempt;
        if let Err(error) = engine.unlock(claim, &place_of(tag)).await {
            // It ends with the job.
            tracing::debug!(job = claim.id, %error, "a lock could not be given back");
        }
    }
}

/// Writes down what comes of images.
struct Teller<'a> {
    owner: &'a Owner,
    plan: &'a Plan,
    tells_unchanged: bool,
    untold: Mutex<Vec<MirrorImage>>,
}

impl Teller<'_> {
    /// Takes note of an image, and what came of it, if anything has.
    fn take(&self, index: usize, outcome: Option<&Outcome>) {
        let action = &self.plan.actions[index];
        let is_unchanged = match outcome {
            Some(outcome) => *outcome == Outcome::Nothing,
            None => action.what == What::Nothing,
        };
        if !is_unchanged || self.tells_unchanged {
            let image = wire::mirror::image(index, action, outcome);
            self.untold.lock().unwrap_or_else(PoisonError::into_inner).push(image);
        }
    }

    /// Writes down what was taken note of.
    async fn tell(&self) -> Result<(), ServiceError> {
        let lost = self.owner.lost.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(error) = lost {
            return Err(error);
        }
        let images = mem::take(&mut *self.untold.lock().unwrap_or_else(PoisonError::into_inner));
        if images.is_empty() {
            return Ok(());
        }
        self.owner.attempt.apply(events(images).into_iter().map(Change::Mirrored).collect(), None).await
    }

    /// Does work, and writes down meanwhile what is taken note of.
    async fn while_telling(&self, work: impl Future<Output = Report>) -> Result<Report, ServiceError> {
        let (done, mut is_done) = oneshot::channel();
        let work = async {
            let report = work.await;
            // Whoever would hear it has failed, and is told of below.
            let _ = done.send(());
            Ok::<_, ServiceError>(report)
        };
        let telling = async {
            let mut tick = tokio::time::interval(TELL_EVERY);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                // What is told is told to its end: only waiting is given up.
                tokio::select! {
                    _ = &mut is_done => return Ok(()),
                    _ = tick.tick() => {}
                }
                self.tell().await?;
            }
        };
        let (report, ()) = tokio::try_join!(work, telling)?;
        Ok(report)
    }
}

/// Images in messages of a bounded size.
fn events(images: Vec<MirrorImage>) -> Vec<MirrorImages> {
    let mut events = Vec::new();
    let (mut event, mut bytes) = (MirrorImages::default(), 0);
    for image in images {
        bytes += image.encoded_len();
        event.images.push(image);
        if bytes > EVENT_BYTES {
            events.push(mem::take(&mut event));
            bytes = 0;
        }
    }
    if !event.images.is_empty() {
        events.push(event);
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_of_in_events_of_a_bounded_size_each_once_and_none_is_empty() {
        let image = |index| MirrorImage {
            index,
            problem: "x".repeat(index as usize % 1024),
            ..MirrorImage::default()
        };
        for count in [0, 1, 10_000] {
            let events = events((0..count).map(image).collect());
            assert!(events.iter().all(|event| !event.images.is_empty() && event.encoded_len() <= 64 * 1024));
            let told = events.iter().flat_map(|event| &event.images).map(|image| image.index);
            assert_eq!(told.collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
        }
    }
}
