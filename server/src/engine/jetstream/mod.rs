//! The engine of several coordinators: NATS JetStream, which keeps, replicates and orders; nothing of that is made here.
//!
//! | what | where |
//! |---|---|
//! | the connection and the buckets | `connect` |
//! | what stands there of one job | `record` |
//! | what every coordinator has in memory of all jobs | `index` |
//! | whose image becomes visible at a destination | `lock` |
//! | schedules | `schedules` |
//! | what is left of registries' quotas | `quotas` |
//! | whose turn it is to do a layer | `layer` |
//! | the values themselves, and how they are asked for | `values` |
//!
//! A job is one value, and every change of it is a compare-and-set on the revision that was read: so of two coordinators one is
//! refused, reads again, and finds its claim stale. An owner is alive while its lease, a value of its own, has not reached the
//! bucket's age: NATS's clock decides, and no coordinator's.
//!
//! Limits on numbers of jobs are held against what this coordinator has heard of, so that several which accept at the same
//! moment may pass them by a few.

pub mod connect;
mod index;
mod layer;
mod lock;
mod quotas;
mod record;
mod schedules;
#[cfg(test)]
pub(crate) mod simulated;
mod values;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use occy_proto::v1::{Job, JobEvent, JobState};
use prost::Message;
use ring::digest::{Context as Hash, SHA256};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use self::connect::{Place as Where, bucket, connect};
use self::index::{Entry, Index};
use self::record::{Events, Place, Record, since};
use self::values::{Value, Values, WriteError};
use super::layers::{SeenLayer, Sharer};
use super::{Applied, Claim, Engine, EngineError, Limits, Submission, Submitted, Written, accepted, changed};
use crate::job::state::{Change, is_final};
use crate::schedule::{Standing, Tenant};

/// Bytes of a job as it is accepted: a record has to hold its layers and events beside it.
const SUBMITTED_MAX: usize = 256 * 1024;
/// Bytes of what an attempt wrote of a layer. What has more is not kept, and its layer done again.
const WRITTEN_MAX: usize = 768 * 1024;
/// How long NATS is tried again that does not answer, as while it elects a leader, or is not there, as while it starts too.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two of these.
const PAUSE: Duration = Duration::from_millis(200);
/// How long the second part of a submission may be on its way when the first one is there.
const SUBMISSION: Duration = Duration::from_secs(3);
/// How often a change is tried that another one comes before.
const CONFLICTS: usize = 64;
/// Jobs that are read at once for a page.
const READ_AT_ONCE: usize = 8;
/// Changes that are under way at once in this process, of different jobs; those of one job come one after the other.
const LANES: usize = 64;

/// Why JetStream could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JetStreamError {
    /// The engine's address cannot be read.
    #[error("the engine {uri:?} cannot be used: {problem}")]
    Uri {
        /// What was given.
        uri: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The file of credentials cannot be used.
    #[error("failed to read the credentials in {}: {cause}", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// No server can be reached, or none wants us.
    #[error("failed to connect to NATS at {servers}: {cause}")]
    Connect {
        /// Where they should be.
        servers: String,
        /// Why not.
        cause: async_nats::ConnectError,
    },
    /// The server is none that can be used.
    #[error("the NATS server of version {version} cannot be used: {problem}")]
    Server {
        /// Its version.
        version: String,
        /// Why not.
        problem: &'static str,
    },
    /// A bucket cannot be made, or is there in another shape.
    #[error("the bucket occystrap_{name} cannot be used: {problem}")]
    Bucket {
        /// Which.
        name: &'static str,
        /// Why not.
        problem: String,
    },
    /// It did not do what it was asked for, however often.
    #[error("failed to {what} in JetStream: {cause}")]
    Unreachable {
        /// What it was asked for.
        what: &'static str,
        /// What it said last.
        cause: String,
    },
    /// A value does not fit.
    #[error("{what} would have more bytes than JetStream takes in one value")]
    TooLarge {
        /// Of what.
        what: &'static str,
    },
    /// What stands there was not written by a coordinator of this version or an earlier one.
    #[error("the record of {0} cannot be read")]
    Foreign(String),
}

/// The engine. Clones share a connection.
#[derive(Clone, Debug)]
pub struct JetStream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    values: Arc<dyn Values>,
    limits: Limits,
    lease: Duration,
    index: Index,
    lanes: Vec<tokio::sync::Mutex<()>>,
    following: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.following.abort();
    }
}

/// What becomes of a change the answer to which was lost, so that nobody knows whether it was made.
#[derive(Clone, Copy)]
enum Lost {
    /// It is made again, and twice then, perhaps.
    Again,
    /// It fails.
    Fail,
}

/// Who changes a job.
enum By<'a> {
    /// Its owner.
    Owner(&'a Claim),
    /// Who becomes its owner with that.
    Claimer,
    /// Who has found that its owner may be gone.
    Finder,
    /// Who asked for it.
    Client,
}

impl JetStream {
    /// Connects, and waits until all jobs are known.
    pub async fn open(place: &Where, limits: Limits) -> Result<Self, JetStreamError> {
        Self::over(Arc::new(connect(place).await?), place.lease, limits).await
    }

    /// The engine whose values are these.
    async fn over(values: Arc<dyn Values>, lease: Duration, limits: Limits) -> Result<Self, JetStreamError> {
        let index = Index::default();
        let (known, is_known) = oneshot::channel();
        let (followed, all) = (Arc::clone(&values), index.clone());
        let following = async move {
            tokio::join!(followed.follow(&all, known), quotas::forget_ended(&*followed, Timestamp::now()));
        };
        let following = tokio::spawn(following).abort_handle();
        let lanes = std::iter::repeat_with(Default::default).take(LANES).collect();
        let engine = Inner { values, limits, lease, index, lanes, following };
        let gone = |cause: &str| JetStreamError::Unreachable { what: "list jobs", cause: cause.to_owned() };
        match tokio::time::timeout(PATIENCE, is_known).await {
            Ok(Ok(())) => Ok(Self(Arc::new(engine))),
            Ok(Err(_)) => Err(gone("the follower ended")),
            Err(_) => Err(gone("no answer in time")),
        }
    }

    async fn read(&self, id: &str) -> Result<Option<(Record, u64)>, JetStreamError> {
        let Some(message) = self.value(&(bucket("jobs") + id)).await? else {
            return Ok(None);
        };
        if message.1.is_empty() {
            // The place of a submission that came to nothing.
            return Ok(None);
        }
        let (revision, record) = message;
        let record = Record::decode(record).map_err(|_| JetStreamError::Foreign(format!("job {id}")))?;
        self.0.index.refresh(id, || Entry::of(&record.job(), revision), revision);
        Ok(Some((record, revision)))
    }

    /// The value at a subject and its revision.
    async fn value(&self, subject: &str) -> Result<Option<(u64, bytes::Bytes)>, JetStreamError> {
        patiently("read a value", || self.0.values.last(subject)).await
    }

    /// Writes a value that nobody else writes.
    async fn put(&self, subject: &str, value: Vec<u8>) -> Result<(), JetStreamError> {
        let value = bytes::Bytes::from(value);
        patiently("write a value", || async {
            let written = self.0.values.write(subject, Value::anyway(value.clone())).await;
            written.map_err(|error| error.to_string())
        })
        .await
        .map(drop)
    }

    /// Writes a value, if the subject still has the revision. False: it has not.
    async fn put_if(
        &self,
        subject: &str,
        value: impl Into<bytes::Bytes>,
        revision: u64,
    ) -> Result<bool, String> {
        match self.0.values.write(subject, Value::after(revision, value.into())).await {
            Ok(_) => Ok(true),
            Err(WriteError::Conflict) => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Changes what stands at a subject, if it is another one then, whoever else does. `what` is done to it, for an error.
    async fn change_value<R: Message, T>(
        &self,
        what: &'static str,
        subject: &str,
        lost: Lost,
        read: impl Fn(Option<bytes::Bytes>) -> Result<R, JetStreamError>,
        change: impl Fn(&mut R) -> T,
    ) -> Result<T, JetStreamError> {
        for _ in 0..CONFLICTS {
            let (revision, before) = self.value(subject).await?.unzip();
            let mut record = read(before.clone())?;
            let changed = change(&mut record);
            let value = bytes::Bytes::from(record.encode_to_vec());
            if value == before.unwrap_or_default() {
                return Ok(changed);
            }
            let put = || self.put_if(subject, value.clone(), revision.unwrap_or_default());
            let is_written = match lost {
                Lost::Again => patiently(what, put).await?,
                Lost::Fail => put().await.map_err(|cause| unreachable(what, &cause))?,
            };
            if is_written {
                return Ok(changed);
            }
        }
        Err(unreachable(what, &"too many others write too"))
    }

    /// Writes the record, if it still has the revision. None: it has not.
    async fn put_record(&self, id: &str, record: &Record, revision: u64) -> Result<Option<u64>, WriteError> {
        let job = record.job();
        let value = Value {
            headers: Some(Entry::of(&job, 0).headers()),
            ..Value::after(revision, record.encode_to_vec().into())
        };
        match self.0.values.write(&(bucket("jobs") + id), value).await {
            Ok(revision) => {
                self.0.index.put(id, Entry::of(&job, revision));
                Ok(Some(revision))
            }
            Err(WriteError::Conflict) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn is_alive(&self, id: &str, epoch: u64) -> Result<bool, JetStreamError> {
        let lease = self.value(&lease(id, epoch)).await?;
        Ok(lease.is_some())
    }

    async fn apply(
        &self,
        id: &str,
        by: &By<'_>,
        changes: Vec<Change>,
        written: Option<Written>,
    ) -> Result<Applied, JetStreamError> {
        let lane =
            id.bytes().fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into())) % LANES;
        let _lane = self.0.lanes[lane].lock().await;
        let change = uuid::Uuid::new_v4().to_string();
        let (mut written, start, mut conflicts) = (written, Instant::now(), 0);
        loop {
            let Some((mut record, revision)) = self.read(id).await? else { return Ok(Applied::Missing) };
            let before = record.job();
            if record.change == change {
                // The answer to an earlier attempt was lost.
                return Ok(Applied::Done(before));
            }
            let is_owned = matches!(before.state(), JobState::Running | JobState::Finalizing);
            let may = match by {
                By::Owner(claim) => is_owned && record.epoch == claim.epoch,
                By::Finder => is_owned && !self.is_alive(id, record.epoch).await?,
                By::Claimer | By::Client => true,
            };
            if !may {
                return Ok(Applied::Stale);
            }
            let Some((job, events)) = changed(&before, changes.clone()) else {
                return Ok(Applied::Refused(before));
            };
            if matches!(by, By::Claimer) {
                // Before anybody can look for it.
                self.put(&lease(id, record.epoch + 1), Vec::new()).await?;
            }
            if matches!(by, By::Claimer) || (is_owned && job.state() == JobState::Queued) {
                record.epoch += 1;
            }
            if is_final(job.state()) {
                (record.sealed, record.trace) = (None, None);
            }
            record.change.clone_from(&change);
            let name = || format!("{id}.events.{}", uuid::Uuid::new_v4());
            let pages = record.become_of(job.clone(), events, name);
            let pages = pages.map_err(|_| JetStreamError::TooLarge { what: "the events of the job" })?;
            for (name, page) in pages {
                self.put(&(bucket("parts") + &name), page.encode_to_vec()).await?;
            }
            if let Some(Written { layer, record }) =
                written.take().filter(|new| new.record.len() <= WRITTEN_MAX)
            {
                self.put(&part(id, &layer), record.into_bytes()).await?;
            }
            match self.put_record(id, &record, revision).await {
                Ok(Some(_)) => {
                    if is_final(job.state()) {
                        self.purge(&format!("{}{id}.layers.>", bucket("parts")), None).await;
                    }
                    return Ok(Applied::Done(job));
                }
                Ok(None) if conflicts < CONFLICTS => conflicts += 1,
                Err(WriteError::TooLarge) => {
                    return Err(JetStreamError::TooLarge { what: "the record of the job" });
                }
                Err(_) if start.elapsed() < PATIENCE => sleep(PAUSE).await,
                Ok(None) => return Err(unreachable("write a job", &"too many others write too")),
                Err(error) => return Err(unreachable("write a job", &error)),
            }
        }
    }

    async fn submit_new(&self, submission: Submission) -> Result<Submitted, JetStreamError> {
        let Submission { id, tenant, spec, key, sealed, trace } = submission;
        let key = Some(key).filter(|key| !key.is_empty()).map(|key| key_name(&tenant, &key));
        let mut record = Record::new(accepted(id, &tenant, spec));
        (record.sealed, record.trace) = (sealed, trace);
        record.key.clone_from(&key);
        record.change = uuid::Uuid::new_v4().to_string();
        let spec = record.job().spec;
        if record.encoded_len() > SUBMITTED_MAX {
            return Err(JetStreamError::TooLarge { what: "the spec of the job" });
        }
        let mut revision = 0;
        if let Some(key) = &key {
            let Some((number, earlier)) = self.key(key).await? else {
                return self.submit_at(record, spec, Some((key, 0))).await;
            };
            if earlier == record.job().id {
                // An attempt at this very submission took it, and may not have come further.
                return self.submit_at(record, spec, Some((key, number))).await;
            }
            if let Some(earlier) = self.earlier(&earlier).await? {
                return Ok(if earlier.spec == spec {
                    Submitted::Earlier(earlier)
                } else {
                    Submitted::KeyReused
                });
            }
            // Its submission came to nothing, and cannot come to anything any more.
            revision = number;
        }
        self.submit_at(record, spec, key.as_deref().map(|key| (key, revision))).await
    }

    /// Takes the key, if there is one, and then writes the record.
    async fn submit_at(
        &self,
        record: Record,
        spec: Option<occy_proto::v1::PipelineSpec>,
        key: Option<(&str, u64)>,
    ) -> Result<Submitted, JetStreamError> {
        let job = record.job();
        let tenant = Tenant::from(job.tenant.as_str());
        let (active, own) = self.0.index.active(&tenant);
        if active >= self.0.limits.active {
            return Ok(Submitted::Full);
        }
        if own >= self.0.limits.active_each {
            return Ok(Submitted::FullForTenant);
        }
        if let Some((key, revision)) = key {
            let subject = bucket("keys") + key;
            let taken = patiently("write a value", || self.put_if(&subject, job.id.clone(), revision));
            // Ours it may be all the same: the answer to an earlier attempt was lost.
            if !taken.await? && self.key(key).await?.is_none_or(|(_, id)| id != job.id) {
                let Some((_, id)) = self.key(key).await? else {
                    return Err(unreachable("write a job", &"the idempotency key was taken and given back"));
                };
                return match self.earlier(&id).await? {
                    Some(earlier) if earlier.spec == spec => Ok(Submitted::Earlier(earlier)),
                    Some(_) => Ok(Submitted::KeyReused),
                    None => {
                        Err(unreachable("write a job", &"another submission with this key came to nothing"))
                    }
                };
            }
        }
        let start = Instant::now();
        loop {
            match self.put_record(&job.id, &record, 0).await {
                Ok(Some(_)) => break,
                Ok(None) => match self.read(&job.id).await? {
                    Some(_) => break,
                    None => return Err(unreachable("write a job", &"the submission took too long")),
                },
                Err(_) if start.elapsed() < PATIENCE => sleep(PAUSE).await,
                Err(error) => return Err(unreachable("write a job", &error)),
            }
        }
        self.forget().await?;
        Ok(Submitted::New(job))
    }

    /// What stands under a key, and its revision.
    async fn key(&self, key: &str) -> Result<Option<(u64, String)>, JetStreamError> {
        let value = self.value(&(bucket("keys") + key)).await?;
        Ok(value.map(|(revision, id)| (revision, String::from_utf8_lossy(&id).into_owned())))
    }

    /// The job whose id stands under a key. None: it never will be.
    async fn earlier(&self, id: &str) -> Result<Option<Job>, JetStreamError> {
        let start = Instant::now();
        loop {
            if let Some((record, _)) = self.read(id).await? {
                return Ok(Some(record.job()));
            }
            let subject = bucket("jobs") + id;
            if self.value(&subject).await?.is_some_and(|(_, value)| value.is_empty()) {
                return Ok(None);
            }
            if start.elapsed() > SUBMISSION {
                // Whoever is still on the way there finds the place taken.
                match self.put_if(&subject, "", 0).await {
                    Ok(true) => return Ok(None),
                    Ok(false) => continue,
                    Err(error) => return Err(unreachable("write a job", &error)),
                }
            }
            sleep(PAUSE).await;
        }
    }

    /// Forgets the oldest jobs that have ended, beyond the number that is kept.
    async fn forget(&self) -> Result<(), JetStreamError> {
        for id in self.0.index.excess(self.0.limits.kept) {
            if let Some((record, _)) = self.read(&id).await?
                && let Some(key) = record.key
                && let Some((revision, owner)) = self.key(&key).await?
                && owner == id
            {
                // What is written there later is another job's.
                self.purge(&(bucket("keys") + &key), Some(revision)).await;
            }
            self.purge(&format!("{}{id}.>", bucket("parts")), None).await;
            self.purge(&(bucket("jobs") + &id), None).await;
            self.0.index.remove(&id);
        }
        Ok(())
    }

    /// Takes values away that nobody needs: what is left of them by a failure costs nothing but space.
    async fn purge(&self, subject: &str, up_to: Option<u64>) {
        if let Err(error) = self.0.values.purge(subject, up_to).await {
            tracing::warn!(subject, error, "values that nobody needs could not be removed");
        }
    }

    async fn unowned_ids(&self) -> Result<Vec<(String, Standing)>, JetStreamError> {
        let mut unended = self.0.index.unended();
        let is_owned = |entry: &Entry| entry.state != JobState::Queued;
        if unended.iter().any(|(_, entry)| is_owned(entry)) {
            let alive = self.alive().await?;
            let prefix = bucket("leases");
            for (id, entry) in unended.iter_mut().filter(|(_, entry)| is_owned(entry)) {
                let of_job = format!("{prefix}{id}.");
                // Only a hint: a job that has just got an owner is found to have one below.
                if alive.range(of_job.clone()..).next().is_some_and(|lease| lease.starts_with(&of_job)) {
                    continue;
                }
                if let Applied::Done(job) = self.apply(id, &By::Finder, vec![Change::Requeue], None).await? {
                    tracing::info!(job = id, "the owner of a job is gone; it is queued again");
                    entry.state = job.state();
                }
            }
        }
        unended.retain(|(_, entry)| !is_owned(entry));
        Ok(unended.into_iter().map(|(id, entry)| (id, entry.standing)).collect())
    }

    /// The leases that there are.
    async fn alive(&self) -> Result<std::collections::BTreeSet<String>, JetStreamError> {
        let all = bucket("leases") + ">";
        patiently("list the owners of jobs", || self.0.values.subjects(&all)).await
    }

    async fn claim_job(&self, id: &str) -> Result<Option<(Claim, Job)>, JetStreamError> {
        let Applied::Done(job) = self.apply(id, &By::Claimer, vec![Change::Begin], None).await? else {
            return Ok(None);
        };
        // Nobody but its owner, who knows nothing of it yet, brings it back to this sequence.
        match self.read(id).await? {
            Some((record, _)) if record.job().attempts == job.attempts => {
                Ok(Some((Claim { id: id.to_owned(), epoch: record.epoch }, job)))
            }
            _ => Ok(None),
        }
    }

    async fn holds_now(&self, claim: &Claim) -> Result<bool, JetStreamError> {
        let is_owned = |job: &Job| matches!(job.state(), JobState::Running | JobState::Finalizing);
        let record = self.read(&claim.id).await?;
        Ok(record.is_some_and(|(record, _)| record.epoch == claim.epoch && is_owned(&record.job())))
    }

    async fn events_after(&self, id: &str, after: u64) -> Result<Vec<JobEvent>, JetStreamError> {
        if self.0.index.get(id).is_some_and(|job| job.sequence <= after) {
            return Ok(Vec::new());
        }
        let Some((record, _)) = self.read(id).await? else { return Ok(Vec::new()) };
        let name = match record.after(after) {
            Place::Here(events) => return Ok(events),
            Place::Page(name) => name,
        };
        match self.value(&(bucket("parts") + &name)).await? {
            Some((_, page)) => {
                let page = Events::decode(page).map_err(|_| JetStreamError::Foreign(format!("job {id}")))?;
                Ok(since(&page.events, after))
            }
            // It has just been forgotten.
            None => Ok(Vec::new()),
        }
    }
}

#[async_trait::async_trait]
impl Engine for JetStream {
    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn lease(&self) -> Duration {
        self.0.lease
    }

    fn is_shared(&self) -> bool {
        true
    }

    async fn coordinators(&self, name: &str) -> Result<usize, EngineError> {
        let prefix = format!("{}coordinator.", bucket("leases"));
        self.put(&format!("{prefix}{name}"), Vec::new()).await?;
        let alive = self.alive().await?;
        Ok(alive.range(prefix.clone()..).take_while(|lease| lease.starts_with(&prefix)).count())
    }

    async fn submit(&self, submission: Submission) -> Result<Submitted, EngineError> {
        Ok(self.submit_new(submission).await?)
    }

    async fn get(&self, id: &str) -> Result<Option<Job>, EngineError> {
        Ok(self.read(id).await?.map(|(record, _)| record.job()))
    }

    async fn list(
        &self,
        tenant: Option<Tenant>,
        before: Option<String>,
        states: Vec<JobState>,
        count: usize,
    ) -> Result<(Vec<Job>, bool), EngineError> {
        let mut ids = self.0.index.page(tenant.as_ref(), before.as_deref(), &states, count + 1);
        let more = ids.len() > count;
        ids.truncate(count);
        let jobs = stream::iter(ids).map(|id| async move {
            let job = self.read(&id).await?.map(|(record, _)| Job { layers: Vec::new(), ..record.job() });
            if job.is_none() {
                // Another coordinator has forgotten it.
                self.0.index.remove(&id);
            }
            Ok::<_, JetStreamError>(job)
        });
        let jobs = jobs.buffered(READ_AT_ONCE).try_filter_map(async |job| Ok(job)).try_collect().await?;
        Ok((jobs, more))
    }

    async fn events(&self, id: &str, after: u64) -> Result<Vec<JobEvent>, EngineError> {
        Ok(self.events_after(id, after).await?)
    }

    fn subscribe(&self, id: &str) -> watch::Receiver<u64> {
        self.0.index.subscribers.subscribe(id)
    }

    async fn unowned(&self) -> Result<Vec<(String, Standing)>, EngineError> {
        Ok(self.unowned_ids().await?)
    }

    async fn claim(&self, id: &str) -> Result<Option<(Claim, Job)>, EngineError> {
        Ok(self.claim_job(id).await?)
    }

    async fn extend(&self, claim: &Claim) -> Result<bool, EngineError> {
        let holds = self.holds_now(claim).await?;
        if holds {
            self.put(&lease(&claim.id, claim.epoch), Vec::new()).await?;
        }
        Ok(holds)
    }

    async fn holds(&self, claim: &Claim) -> Result<bool, EngineError> {
        Ok(self.holds_now(claim).await?)
    }

    async fn release(&self, claim: &Claim) -> Result<(), EngineError> {
        self.apply(&claim.id, &By::Owner(claim), vec![Change::Requeue], None).await?;
        Ok(())
    }

    async fn change(
        &self,
        claim: &Claim,
        changes: Vec<Change>,
        written: Option<Written>,
    ) -> Result<Applied, EngineError> {
        Ok(self.apply(&claim.id, &By::Owner(claim), changes, written).await?)
    }

    async fn cancel(&self, id: &str) -> Result<Applied, EngineError> {
        Ok(self.apply(id, &By::Client, vec![Change::Cancel], None).await?)
    }

    async fn lock(&self, claim: &Claim, place: &str) -> Result<bool, EngineError> {
        Ok(self.lock_place(claim, place).await?)
    }

    async fn unlock(&self, claim: &Claim, place: &str) -> Result<(), EngineError> {
        Ok(self.unlock_place(claim, place).await?)
    }

    async fn layer_turn(&self, layer: &str, who: &Sharer) -> Result<SeenLayer, EngineError> {
        Ok(self.look_at_layer(layer, who).await?)
    }

    async fn take_layer(&self, seen: SeenLayer, who: &Sharer) -> Result<bool, EngineError> {
        Ok(self.begin_layer(seen, who).await?)
    }

    async fn end_layer(&self, layer: &str, who: &Sharer, result: Option<String>) -> Result<(), EngineError> {
        Ok(self.finish_layer(layer, who, result).await?)
    }

    async fn written(&self, id: &str, layer: &str) -> Result<Option<String>, EngineError> {
        let written = self.value(&part(id, layer)).await?;
        Ok(written.map(|(_, record)| String::from_utf8_lossy(&record).into_owned()))
    }

    async fn sealed(&self, id: &str) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.read(id).await?.and_then(|(record, _)| record.sealed))
    }

    async fn trace(&self, id: &str) -> Result<Option<String>, EngineError> {
        Ok(self.read(id).await?.and_then(|(record, _)| record.trace))
    }
}

/// Asks until there is an answer, for a while.
async fn patiently<T, F: Future<Output = Result<T, String>>>(
    what: &'static str,
    ask: impl Fn() -> F,
) -> Result<T, JetStreamError> {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(cause) if start.elapsed() > PATIENCE => return Err(unreachable(what, &cause)),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

fn unreachable(what: &'static str, cause: &dyn ToString) -> JetStreamError {
    JetStreamError::Unreachable { what, cause: cause.to_string() }
}

/// Where an owner's lease is.
fn lease(id: &str, epoch: u64) -> String {
    format!("{}{id}.{epoch}", bucket("leases"))
}

/// Where is what an attempt wrote of a layer, whose name may have any characters.
fn part(id: &str, layer: &str) -> String {
    format!("{}{id}.layers.{}", bucket("parts"), hash(&[layer]))
}

/// Under which name an idempotency key stands, which may have any characters too.
fn key_name(tenant: &Tenant, key: &str) -> String {
    hash(&[tenant, key])
}

fn hash(words: &[&str]) -> String {
    let mut hash = Hash::new(&SHA256);
    for word in words {
        hash.update(&(word.len() as u64).to_be_bytes());
        hash.update(word.as_bytes());
    }
    hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_nats::jetstream::context::PublishErrorKind;
    use async_nats::jetstream::message::PublishMessage;
    use occy_tests::nats::Nats;

    use super::*;
    use crate::engine::contract::{Place as Contract, contract};
    use crate::engine::quotas::contract::quotas_contract;
    use crate::engine::schedules::contract::schedules_contract;

    const LEASE: Duration = Duration::from_secs(2);

    /// A server of its own.
    struct Server(Mutex<Nats>, Mutex<Option<Limits>>);

    impl Server {
        fn new() -> Self {
            Self(Mutex::new(Nats::start()), Mutex::default())
        }
    }

    #[async_trait::async_trait]
    impl Contract for Server {
        async fn open(&self, limits: Limits) -> Arc<dyn Engine> {
            *self.1.lock().unwrap() = Some(limits);
            // Who runs tests has a provider of cryptography, or has just got one.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let place = Where {
                servers: vec![self.0.lock().unwrap().address().to_owned()],
                tls: false,
                ca_cert: None,
                identity: None,
                credentials: None,
                replicas: 1,
                lease: LEASE,
            };
            Arc::new(JetStream::open(&place, limits).await.unwrap())
        }

        async fn replace(&self, killed: Arc<dyn Engine>) -> Arc<dyn Engine> {
            drop(killed);
            // So is the server: what was answered is there all the same.
            {
                let mut nats = self.0.lock().unwrap();
                nats.kill();
                nats.restart();
            }
            sleep(LEASE + Duration::from_millis(500)).await;
            let limits = self.1.lock().unwrap().expect("it was open");
            self.open(limits).await
        }
    }

    contract!(Server::new());
    schedules_contract!(Server::new());
    quotas_contract!(Server::new());

    #[tokio::test]
    async fn what_one_coordinator_does_all_hear_of() {
        let server = Server::new();
        let limits = Limits { active: 3, active_each: 3, kept: 3 };
        let (one, two) = (server.open(limits).await, server.open(limits).await);
        let submission = |key: &str| Submission {
            id: uuid::Uuid::now_v7().to_string(),
            tenant: "".into(),
            spec: occy_proto::v1::PipelineSpec::default(),
            key: key.to_owned(),
            sealed: None,
            trace: None,
        };
        // The same submission through both at once is one job.
        let (here, there) = tokio::join!(one.submit(submission("key")), two.submit(submission("key")));
        let (here, there) = (here.unwrap(), there.unwrap());
        let job = match (&here, &there) {
            (Submitted::New(job), Submitted::Earlier(same))
            | (Submitted::Earlier(same), Submitted::New(job)) => {
                assert_eq!(job.id, same.id);
                job
            }
            other => panic!("{other:?}"),
        };
        let mut changed = two.subscribe(&job.id);
        // Both claim, one gets it, and the other hears of all that it does.
        let (here, there) = tokio::join!(one.claim(&job.id), two.claim(&job.id));
        let claims: Vec<_> = [here, there].into_iter().filter_map(|claim| claim.unwrap()).collect();
        assert_eq!(claims.len(), 1);
        one.change(&claims[0].0, vec![Change::Plan(Vec::new())], None).await.unwrap();
        let mut told = Vec::new();
        while told.len() < 2 {
            tokio::time::timeout(Duration::from_secs(10), changed.changed()).await.unwrap().unwrap();
            told.extend(
                two.events(&job.id, told.len() as u64).await.unwrap().into_iter().map(|event| event.sequence),
            );
        }
        assert_eq!(told, [1, 2]);
        assert_eq!(two.list(None, None, Vec::new(), 9).await.unwrap().0.len(), 1);
    }

    /// A job with the key `key`.
    fn keyed() -> Submission {
        Submission {
            id: uuid::Uuid::now_v7().to_string(),
            tenant: "".into(),
            spec: occy_proto::v1::PipelineSpec::default(),
            key: "key".to_owned(),
            sealed: None,
            trace: None,
        }
    }

    /// What is left of a submission of such a job whose coordinator was killed when it had taken the key.
    async fn take_key(server: &Server, id: &str) -> async_nats::jetstream::Context {
        let address = server.0.lock().unwrap().address().to_owned();
        let jetstream = async_nats::jetstream::new(async_nats::connect(address).await.unwrap());
        let subject = bucket("keys") + &key_name(&"".into(), "key");
        jetstream.publish(subject, id.to_owned().into()).await.unwrap().await.unwrap();
        jetstream
    }

    #[tokio::test]
    async fn a_submission_that_is_tried_again_comes_to_something() {
        let server = Server::new();
        let engine = server.open(Limits { active: 3, active_each: 3, kept: 3 }).await;
        let submission = keyed();
        // Whoever began it was killed when it had taken the key.
        take_key(&server, &submission.id).await;
        for _ in 0..2 {
            let (Submitted::New(job) | Submitted::Earlier(job)) =
                engine.submit(submission.clone()).await.unwrap()
            else {
                panic!("it is accepted")
            };
            assert_eq!(job.id, submission.id);
        }
        let (jobs, _) = engine.list(None, None, Vec::new(), 9).await.unwrap();
        assert_eq!(jobs.len(), 1);
    }

    #[tokio::test]
    async fn a_submission_that_came_to_nothing_does_not_keep_its_key() {
        let server = Server::new();
        let limits = Limits { active: 3, active_each: 3, kept: 3 };
        let engine = server.open(limits).await;
        let submission = keyed();
        // Its coordinator was killed when it had taken the key.
        let dead = uuid::Uuid::now_v7().to_string();
        let jetstream = take_key(&server, &dead).await;
        let Submitted::New(job) = engine.submit(submission.clone()).await.unwrap() else {
            panic!("it is new")
        };
        let again = engine.submit(Submission { id: uuid::Uuid::now_v7().to_string(), ..submission }).await;
        assert!(matches!(again.unwrap(), Submitted::Earlier(earlier) if earlier.id == job.id));
        assert_eq!(engine.get(&dead).await.unwrap(), None);
        // And cannot come to anything any more.
        let late = PublishMessage::build().payload("late".into()).expected_last_subject_sequence(0);
        let late = jetstream.send_publish(bucket("jobs") + &dead, late).await.unwrap().await;
        assert_eq!(late.unwrap_err().kind(), PublishErrorKind::WrongLastSequence);
    }
}
