//! A job's events, those of the past and those to come.
//!
//! Events are read from the store and from nowhere else; what is kept in memory only wakes those who wait. So a watcher misses
//! nothing and gets nothing twice, whenever it comes and however slow it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use occy_pipeline::progress::Progress;
use occy_pipeline::wire::convert;
use occy_proto::v1::job_event::Event;
use occy_proto::v1::{JobEvent, JobProgress};
use tokio::sync::{mpsc, watch};

use super::state::is_final;
use super::store::Store;
use crate::error::ServiceError;

/// How often a watcher hears how far layers are.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// The jobs that have not ended, as those who wait for them see them.
#[derive(Clone, Debug, Default)]
pub struct LiveJobs(Arc<Mutex<HashMap<String, LiveJob>>>);

/// A job that has not ended.
#[derive(Clone, Debug)]
pub struct LiveJob {
    /// The sequence of its latest event.
    pub sequence: watch::Sender<u64>,
    /// How far its layers are, in this attempt.
    pub progress: Progress,
}

impl LiveJobs {
    /// The job is there from now on.
    pub fn insert(&self, id: &str) -> LiveJob {
        let job = LiveJob { sequence: watch::Sender::new(0), progress: Progress::default() };
        self.lock().insert(id.to_owned(), job.clone());
        job
    }

    /// It has another event.
    pub fn wake(&self, id: &str, sequence: u64) {
        if let Some(job) = self.lock().get(id) {
            job.sequence.send_replace(sequence);
        }
    }

    /// It has ended: those who wait look a last time.
    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    fn get(&self, id: &str) -> Option<LiveJob> {
        self.lock().get(id).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, LiveJob>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a job's events after a sequence, until the one that ends it.
pub async fn follow(
    store: &Store,
    live: &LiveJobs,
    id: &str,
    mut after: u64,
    events: &mpsc::Sender<JobEvent>,
) -> Result<(), ServiceError> {
    // Before the job is read: what happens from now on is heard of.
    let job = live.get(id);
    let mut wake = job.as_ref().map(|job| job.sequence.subscribe());
    // A receiver of its own keeps no sender alive, so that the end of the job ends the waiting.
    let progress = job.map(|job| job.progress);
    let record = store.get(id).await?.ok_or_else(|| ServiceError::NoSuchJob(id.to_owned()))?;
    if after > record.last_sequence {
        return Err(ServiceError::BeyondEvents { job: id.to_owned(), last: record.last_sequence, after });
    }
    let mut told = None;
    loop {
        let page = store.events(id, after).await?;
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
        let Some(wake) = &mut wake else {
            // It had ended before we came, and its last event was among those that the caller has.
            return Ok(());
        };
        tokio::select! {
            // Losing this branch loses nothing: the store is read again in any case.
            changed = wake.changed() => if changed.is_err() && store.events(id, after).await?.is_empty() {
                return Ok(());
            },
            () = tokio::time::sleep(PROGRESS_EVERY) => {
                let now = progress.as_ref().map(|progress| JobProgress { layers: convert::running(progress) });
                if let Some(now) = now.filter(|now| !now.layers.is_empty() && told.as_ref() != Some(now)) {
                    let event = JobEvent { sequence: 0, time: None, event: Some(Event::Progress(now.clone())) };
                    events.send(event).await.map_err(|_| ServiceError::CallerGone)?;
                    told = Some(now);
                }
            }
        }
    }
}
