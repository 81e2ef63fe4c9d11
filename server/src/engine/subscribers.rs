//! Who waits for a job's next event in this process: only woken here, since what happened is read from the engine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Those who wait, by job. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Subscribers(Arc<Mutex<HashMap<String, watch::Sender<u64>>>>);

impl Subscribers {
    /// Hears of everything that happens to the job from now on.
    pub(super) fn subscribe(&self, id: &str) -> watch::Receiver<u64> {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // There are as many as somebody listens to.
        jobs.retain(|_, job| job.receiver_count() > 0);
        jobs.entry(id.to_owned()).or_default().subscribe()
    }

    /// The job has changed.
    pub(super) fn wake(&self, id: &str) {
        let jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.get(id) {
            job.send_modify(|changes| *changes += 1);
        }
    }
}
