//! What is known of jobs, and whose they are: behind one trait, so that one coordinator and several are the same program.
//!
//! | what | where |
//! |---|---|
//! | a file, for one coordinator | `embedded` |
//! | NATS JetStream, for several | `jetstream` |
//! | schedules, which every coordinator may change | `schedules` |
//! | registries' quotas, from which all coordinators draw | `quotas` |
//! | who waits for a job's next event | `subscribers` |
//! | whose turn it is to do a layer | `layers` |
//! | what every engine must do, as tests | `contract` |
//!
//! A job is *owned* by the coordinator that has claimed it, from its claim to its end. The claim has an epoch, which grows with every
//! change of owner, and everything that an owner writes is written under its epoch or not at all. An owner that is not heard of
//! for a lease has lost its jobs: [`Engine::unowned`] finds and queues them again.
//!
//! Not here: what may happen to a job in which state, which is `job::state`'s, pure, and the same for every engine.

#[cfg(test)]
mod contract;
pub mod embedded;
pub mod jetstream;
pub mod layers;
pub mod quotas;
pub mod schedules;
mod subscribers;

use std::fmt::Debug;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use occy_proto::v1::{Job, JobEvent, JobState, PipelineSpec};
use prost_types::Timestamp;
use tokio::sync::watch;

use self::embedded::StoreError;
use self::jetstream::JetStreamError;
use self::layers::{SeenLayer, Sharer};
use self::quotas::Quotas;
use self::schedules::Schedules;
use crate::job::state::{self, Change, Refused};
use crate::schedule::{Standing, Tenant};

/// What is known of jobs, durable: what a call has returned survives the process. So it is with schedules and quotas.
#[async_trait::async_trait]
pub trait Engine: Schedules + Quotas + Debug + Send + Sync {
    /// How much is kept.
    fn limits(&self) -> Limits;

    /// For how long an owner need not be heard of.
    fn lease(&self) -> Duration;

    /// Whether other coordinators have it too, whose jobs may be left to this one at any time.
    fn is_shared(&self) -> bool;

    /// Says that the coordinator of that name is there, which holds for a lease, and gives how many are.
    async fn coordinators(&self, name: &str) -> Result<usize, EngineError> {
        let _ = name;
        Ok(1)
    }

    /// Accepts a job, once for each key of a tenant.
    async fn submit(&self, submission: Submission) -> Result<Submitted, EngineError>;

    /// A job as it is now.
    async fn get(&self, id: &str) -> Result<Option<Job>, EngineError>;

    /// The jobs of `tenant`, or of all, before the id `before`, the newest first, at most so many, without their layers; and whether
    /// there are more.
    async fn list(
        &self,
        tenant: Option<Tenant>,
        before: Option<String>,
        states: Vec<JobState>,
        count: usize,
    ) -> Result<(Vec<Job>, bool), EngineError>;

    /// The first events after a sequence, in order and without a gap. None: it has no more yet.
    async fn events(&self, id: &str, after: u64) -> Result<Vec<JobEvent>, EngineError>;

    /// Changes whenever a job may have more events, or another owner. It may change more often.
    fn subscribe(&self, id: &str) -> watch::Receiver<u64>;

    /// The jobs that wait for an owner, the oldest first, and whose they are. Those whose owner is gone are queued again before.
    async fn unowned(&self) -> Result<Vec<(String, Standing)>, EngineError>;

    /// Takes a job that waits for an owner: it is running then, in its next attempt. None: it waits no more.
    async fn claim(&self, id: &str) -> Result<Option<(Claim, Job)>, EngineError>;

    /// Says that the owner is there, which holds for another lease; and whether it still is the owner.
    async fn extend(&self, claim: &Claim) -> Result<bool, EngineError>;

    /// Whether the claim holds at this moment, not at an earlier one.
    async fn holds(&self, claim: &Claim) -> Result<bool, EngineError>;

    /// Gives a job back before its end: it waits for an owner again.
    async fn release(&self, claim: &Claim) -> Result<(), EngineError>;

    /// Makes an owner's changes, all of them or none, and with them keeps what an attempt wrote of a layer.
    async fn change(
        &self,
        claim: &Claim,
        changes: Vec<Change>,
        written: Option<Written>,
    ) -> Result<Applied, EngineError>;

    /// Cancels a job, whoever owns it.
    async fn cancel(&self, id: &str) -> Result<Applied, EngineError>;

    /// Waits until no other job makes an image visible at that place, and keeps others waiting: until `unlock`, or until the claim
    /// does not hold any more. False: it does not hold now.
    async fn lock(&self, claim: &Claim, place: &str) -> Result<bool, EngineError>;

    /// Lets others make an image visible there.
    async fn unlock(&self, claim: &Claim, place: &str) -> Result<(), EngineError>;

    /// Whose turn it is to do a layer, for a job that wants it: of jobs that may share it, one has the turn, for as long as its claim
    /// holds or until it has ended it.
    async fn layer_turn(&self, layer: &str, who: &Sharer) -> Result<SeenLayer, EngineError>;

    /// Takes the turn at a layer that was seen to be nobody's, or what came of whose last turn is of no use. False: it is not as it
    /// was seen any more.
    async fn take_layer(&self, seen: SeenLayer, who: &Sharer) -> Result<bool, EngineError>;

    /// Ends the turn at a layer. What came of it is there for a while, for those who may share it; None: they cannot use it. It is
    /// there too if somebody else has the turn.
    async fn end_layer(&self, layer: &str, who: &Sharer, result: Option<String>) -> Result<(), EngineError>;

    /// What an earlier attempt at a job that has not ended wrote of a layer.
    async fn written(&self, id: &str, layer: &str) -> Result<Option<String>, EngineError>;

    /// The credentials of a job that has not ended, sealed.
    async fn sealed(&self, id: &str) -> Result<Option<Vec<u8>>, EngineError>;

    /// The `traceparent` of a job that has not ended, if it was submitted with one.
    async fn trace(&self, id: &str) -> Result<Option<String>, EngineError>;
}

/// The right to change a job, until somebody else has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The job.
    pub id: String,
    /// Which of its owners this is.
    pub epoch: u64,
}

/// What an attempt wrote of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The source's name of the layer.
    pub layer: String,
    /// What a later attempt has to know.
    pub record: String,
}

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Jobs that have not ended. More are not accepted.
    pub active: usize,
    /// Of these, one tenant's.
    pub active_each: usize,
    /// Jobs in all. Beyond it the oldest that have ended are forgotten.
    pub kept: usize,
}

/// A job that is to be accepted.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Its id, if it is new: a UUID of version 7, so that ids are in the order of their time.
    pub id: String,
    /// Whose it is.
    pub tenant: Tenant,
    /// What is to be done.
    pub spec: PipelineSpec,
    /// Under which its tenant finds it again. Empty: under none.
    pub key: String,
    /// Its credentials, sealed.
    pub sealed: Option<Vec<u8>>,
    /// The `traceparent` that it goes on with.
    pub trace: Option<String>,
}

/// What came of a submission.
#[derive(Debug)]
pub enum Submitted {
    /// A new job.
    New(Job),
    /// The job that was made by an earlier submission with the same key.
    Earlier(Job),
    /// The key was used for another spec.
    KeyReused,
    /// There are as many jobs as there may be.
    Full,
    /// The tenant has as many jobs as it may have.
    FullForTenant,
}

/// What came of changes.
#[derive(Debug)]
pub enum Applied {
    /// They are durable.
    Done(Job),
    /// One of them cannot happen to the job as it is; none did.
    Refused(Job),
    /// The job is not owned under that claim: none did.
    Stale,
    /// There is no such job.
    Missing,
}

/// Why the engine could not be used.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// JetStream.
    #[error(transparent)]
    JetStream(#[from] JetStreamError),
}

/// The record of a job that was just accepted.
fn accepted(id: String, tenant: &Tenant, spec: PipelineSpec) -> Job {
    let now = Some(now());
    Job {
        id,
        state: JobState::Queued.into(),
        tenant: tenant.to_string(),
        spec: Some(spec),
        create_time: now,
        update_time: now,
        ..Job::default()
    }
}

/// The job after all of the changes, and their events; None if one of them is refused.
fn changed(before: &Job, changes: Vec<Change>) -> Option<(Job, Vec<JobEvent>)> {
    let mut job = before.clone();
    let events = changes.into_iter().map(|change| {
        let time = now();
        let event = state::apply(&mut job, change, time)?;
        Ok(JobEvent { sequence: job.last_sequence, time: Some(time), event: Some(event) })
    });
    let events = events.collect::<Result<_, Refused>>().ok()?;
    Some((job, events))
}

fn now() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(elapsed.subsec_nanos()).unwrap_or(0),
    }
}
