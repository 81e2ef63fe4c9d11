//! A job's events, those of the past and those to come.
//!
//! Events are read from the engine and from nowhere else; what is kept in memory only wakes those who wait. So a watcher misses
//! nothing and gets nothing twice, whenever it comes and however slow it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use occy_pipeline::mirror::MirrorProgress;
use occy_pipeline::progress::{Current, ImagesProgress};
use occy_pipeline::wire::{self, convert};
use occy_proto::v1::job_event::Event;
use occy_proto::v1::{JobEvent, JobProgress};
use tokio::sync::mpsc;

use super::state::is_final;
use crate::engine::Engine;
use crate::error::ServiceError;

/// How often a watcher hears how far a job is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How often a watcher of a silent job looks whether it has been forgotten.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// How far the jobs are that this coordinator runs or is about to. Of others nobody knows it here.
#[derive(Clone, Debug, Default)]
pub struct LiveJobs(Arc<Mutex<HashMap<String, Live>>>);

/// How far a job is. Clones are handles on the same one.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// Of its image, or of those of its index.
    pub layers: ImagesProgress,
    /// If it is a mirror.
    pub mirror: MirrorProgress,
}

impl LiveJobs {
    /// The job is there from now on.
    pub fn insert(&self, id: &str) -> Live {
        let live = Live::default();
        self.lock().insert(id.to_owned(), live.clone());
        live
    }

    /// It is not run here any more.
    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// What is to be told of the job now, if anything is.
    fn progress(&self, id: &str) -> Option<JobProgress> {
        let Live { layers, mirror } = self.lock().get(id).cloned()?;
        let Current { progress, layers_before, .. } = layers.current();
        let layers = convert::running(&progress, layers_before);
        let now = JobProgress { layers, mirror: wire::mirror::progress(mirror.get()) };
        (now != JobProgress::default()).then_some(now)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Live>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a job's events after a sequence, until the one that ends it.
pub async fn follow(
    engine: &dyn Engine,
    live: &LiveJobs,
    id: &str,
    mut after: u64,
    events: &mpsc::Sender<JobEvent>,
) -> Result<(), ServiceError> {
    // Before the job is read: what happens from now on is heard of.
    let mut changed = engine.subscribe(id);
    let record = engine.get(id).await?.ok_or_else(|| ServiceError::NoSuchJob(id.to_owned()))?;
    if after > record.last_sequence {
        return Err(ServiceError::BeyondEvents { job: id.to_owned(), last: record.last_sequence, after });
    }
    let had_ended = is_final(record.state());
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.tick().await;
    let mut told = None;
    loop {
        let page = engine.events(id, after).await?;
        let is_empty = page.is_empty();
        for event in page {
            after = event.sequence;
            let ends = matches!(&event.event, Some(Event::StateChanged(change)) if is_final(change.state()));
            events.send(event).await.map_err(|_| ServiceError::CallerGone)?;
            if ends {
                return Ok(());
            }
        }
        if !is_empty {
            continue;
        }
        if had_ended {
            // Its last event was among those that the caller has, or it has just been forgotten.
            return Ok(());
        }
        tokio::select! {
            biased;
            _ = look.tick() => if engine.get(id).await?.is_none() {
                return Ok(());
            },
            // Losing this branch loses nothing: the engine is asked again in any case.
            _ = changed.changed() => {}
            () = tokio::time::sleep(PROGRESS_EVERY) => {
                if let Some(now) = live.progress(id).filter(|now| told.as_ref() != Some(now)) {
                    let event = JobEvent { sequence: 0, time: None, event: Some(Event::Progress(now.clone())) };
                    events.send(event).await.map_err(|_| ServiceError::CallerGone)?;
                    told = Some(now);
                }
            }
        }
    }
}
