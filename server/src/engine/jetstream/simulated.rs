//! JetStream's values in a simulation: kept in memory, in the simulation's time, behind links that are slow, lose requests and answers,
//! and break. Every record that is written is held against what may happen to a job, whoever writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use occy_proto::v1::{Job, JobState, LayerState};
use prost::Message as _;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};

use super::connect::bucket;
use super::index::{Entry, Index};
use super::record::Record;
use super::values::{Value, Values, WriteError};
use super::{JetStream, JetStreamError};
use crate::engine::layers::LayerRecord;
use crate::engine::{Claim, Limits};
use crate::job::state::is_final;
use crate::simulation::world::{Link, World};

/// What all coordinators share.
#[derive(Clone, Debug)]
pub(crate) struct Nats {
    world: World,
    lease: Duration,
    state: Arc<Mutex<State>>,
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    revision: u64,
    values: BTreeMap<String, Stored>,
    jobs: BTreeMap<String, History>,
}

#[derive(Debug)]
struct Stored {
    revision: u64,
    payload: Bytes,
    headers: Option<async_nats::HeaderMap>,
    at: Instant,
}

/// What became of a job.
#[derive(Debug, Default)]
struct History {
    /// Who claimed it, by epoch.
    owners: BTreeMap<u64, usize>,
    /// From when on it was whose: the attempt, while it had an owner.
    owned: Vec<(Instant, Option<u32>)>,
    job: Job,
}

impl Nats {
    pub(crate) fn new(world: &World, lease: Duration) -> Self {
        Self { world: world.clone(), lease, state: Arc::default(), revision: watch::Sender::new(0) }
    }

    /// The engine of a coordinator.
    pub(crate) async fn open(&self, link: &Link, limits: Limits) -> Result<JetStream, JetStreamError> {
        JetStream::over(Arc::new(Behind { nats: self.clone(), link: link.clone() }), self.lease, limits).await
    }

    /// The jobs that there are.
    pub(crate) fn jobs(&self) -> Vec<Job> {
        self.lock().jobs.values().map(|history| history.job.clone()).collect()
    }

    /// Whether the attempt had the job at any moment since then.
    pub(crate) fn was_owned(&self, id: &str, attempt: u32, since: Instant) -> bool {
        let state = self.lock();
        let Some(history) = state.jobs.get(id) else { return false };
        let ends = history.owned.iter().skip(1).map(|(at, _)| Some(*at)).chain([None]);
        let mut periods = history.owned.iter().zip(ends);
        periods.any(|((_, owner), end)| *owner == Some(attempt) && end.is_none_or(|end| end >= since))
    }

    /// Which coordinator owns the job now.
    pub(crate) fn owner(&self, id: &str) -> Option<usize> {
        let state = self.lock();
        let history = state.jobs.get(id)?;
        let is_owned = history.owned.last().is_some_and(|(_, owner)| owner.is_some());
        history.owners.values().next_back().copied().filter(|_| is_owned)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn write(&self, coordinator: usize, subject: &str, value: Value) -> Result<u64, WriteError> {
        let mut state = self.lock();
        let before = self.live(&state, subject).map(|stored| (stored.revision, stored.payload.clone()));
        let found = before.as_ref().map_or(0, |(revision, _)| *revision);
        if value.after.is_some_and(|expected| expected != found) {
            return Err(WriteError::Conflict);
        }
        if let Some(id) = subject.strip_prefix(&bucket("jobs")) {
            let before = before.as_ref().map(|(_, payload)| payload);
            self.look_at(state.jobs.entry(id.to_owned()).or_default(), coordinator, before, &value.payload);
        }
        if subject.starts_with(&bucket("layers")) {
            let before = before.as_ref().map(|(_, payload)| payload);
            self.look_at_layer(&state, subject, before, &value.payload);
        }
        state.revision += 1;
        let revision = state.revision;
        let stored = Stored { revision, payload: value.payload, headers: value.headers, at: Instant::now() };
        state.values.insert(subject.to_owned(), stored);
        drop(state);
        self.revision.send_replace(revision);
        Ok(revision)
    }

    fn live<'a>(&self, state: &'a State, subject: &str) -> Option<&'a Stored> {
        let is_lease = subject.starts_with(&bucket("leases"));
        state.values.get(subject).filter(|stored| !is_lease || stored.at.elapsed() < self.lease)
    }

    /// Holds what stands of a layer against what stood there before: one job has the turn, and while its claim holds, it alone ends it.
    fn look_at_layer(&self, state: &State, subject: &str, before: Option<&Bytes>, after: &Bytes) {
        let read = |bytes: &Bytes| LayerRecord::decode(bytes.clone()).expect("a layer was written");
        let (old, new) = (before.map(read).unwrap_or_default(), read(after));
        let (held, holders) = (old.holders(), new.holders());
        self.world.event(&format!("layer {subject} is held by {holders:?}"));
        let violated = |what: &str| self.world.violated(&format!("{what}: {old:?} became {new:?}"));
        if let Some(both) = new.at_once() {
            violated(&format!("{both:?} have the turn at a layer at once"));
        }
        let holds = |claim: &Claim| {
            state.jobs.get(&claim.id).is_some_and(|history| {
                let is_owned = history.owned.last().is_some_and(|(_, owner)| owner.is_some());
                is_owned && history.owners.last_key_value().is_some_and(|(epoch, _)| *epoch == claim.epoch)
            })
        };
        let lost = held.iter().filter(|claim| !holders.contains(claim) && !new.was_ended_by(claim));
        for claim in lost.filter(|claim| holds(claim)) {
            violated(&format!("the turn at a layer was taken from {claim:?}"));
        }
        if holders.iter().any(|holder| !held.contains(holder)) {
            self.world.count("turns at layers");
        }
    }

    /// Holds a new record against the one before.
    fn look_at(&self, history: &mut History, coordinator: usize, before: Option<&Bytes>, after: &Bytes) {
        let read = |bytes: &Bytes| Record::decode(bytes.clone()).expect("a record was written");
        let (old, new) = (before.map(read), read(after));
        let job = new.job();
        let (state, id) = (job.state(), &job.id);
        let violated = |what: &str| self.world.violated(&format!("{what}: {old:?} became {new:?}"));
        self.world.event(&format!("record {id} {state:?} epoch {} by {coordinator}", new.epoch));
        let is_owned = |state| matches!(state, JobState::Running | JobState::Finalizing);
        if let Some(old) = &old {
            let was = old.job();
            if is_final(was.state()) {
                violated("a job changed after its end");
            }
            if new.epoch < old.epoch || job.last_sequence <= was.last_sequence {
                violated("a job went back");
            }
            if state == JobState::Succeeded && (was.state() != JobState::Finalizing || new.epoch != old.epoch)
            {
                violated("a job succeeded that was not finalized");
            }
            let done =
                |job: &Job| job.layers.iter().filter(|layer| layer.state() == LayerState::Done).count();
            if is_owned(was.state()) && is_owned(state) && done(&job) < done(&was) {
                violated("a layer that was done is not any more");
            }
            if was.state() == JobState::Queued && state == JobState::Running {
                if new.epoch == old.epoch {
                    violated("a job was claimed under the epoch of another claim");
                }
                history.owners.insert(new.epoch, coordinator);
            } else if is_owned(was.state())
                && !matches!(state, JobState::Queued | JobState::Cancelled)
                && history.owners.get(&old.epoch) != Some(&coordinator)
            {
                violated("a job was changed by one who is not its owner");
            }
        }
        let owner = is_owned(state).then_some(job.attempts);
        if history.owned.last().is_none_or(|(_, before)| *before != owner) {
            history.owned.push((Instant::now(), owner));
        }
        history.job = job;
    }
}

/// The values, as a coordinator reaches them.
#[derive(Debug)]
struct Behind {
    nats: Nats,
    link: Link,
}

impl Behind {
    /// There, and back again: either may be lost.
    async fn ask<T>(&self, question: impl FnOnce(&Nats) -> T) -> Result<T, String> {
        self.link.pass().await?;
        let answer = question(&self.nats);
        self.link.pass().await?;
        Ok(answer)
    }
}

#[async_trait::async_trait]
impl Values for Behind {
    async fn last(&self, subject: &str) -> Result<Option<(u64, Bytes)>, String> {
        self.ask(|nats| {
            let state = nats.lock();
            nats.live(&state, subject).map(|stored| (stored.revision, stored.payload.clone()))
        })
        .await
    }

    async fn write(&self, subject: &str, value: Value) -> Result<u64, WriteError> {
        let coordinator = self.link.coordinator();
        let written = self.ask(|nats| nats.write(coordinator, subject, value)).await;
        written.map_err(WriteError::Unanswered)?
    }

    async fn purge(&self, subject: &str, up_to: Option<u64>) -> Result<(), String> {
        self.ask(|nats| {
            let is_meant = |name: &str| match subject.strip_suffix('>') {
                Some(prefix) => name.starts_with(prefix),
                None => name == subject,
            };
            nats.lock().values.retain(|name, stored| {
                !is_meant(name) || up_to.is_some_and(|revision| stored.revision > revision)
            });
        })
        .await
    }

    async fn subjects(&self, pattern: &str) -> Result<BTreeSet<String>, String> {
        let prefix = pattern.trim_end_matches('>');
        self.ask(|nats| {
            let state = nats.lock();
            let names = state.values.keys().filter(|name| name.starts_with(prefix));
            names.filter(|name| nats.live(&state, name).is_some()).cloned().collect()
        })
        .await
    }

    async fn heads(&self, pattern: &str) -> Result<Vec<async_nats::HeaderMap>, String> {
        let prefix = pattern.trim_end_matches('>');
        self.ask(|nats| {
            let state = nats.lock();
            let values = state.values.iter().filter(|(name, _)| name.starts_with(prefix));
            values.filter_map(|(_, stored)| stored.headers.clone()).collect()
        })
        .await
    }

    async fn follow(&self, index: &Index, known: oneshot::Sender<()>) {
        let (mut known, mut seen) = (Some(known), 0);
        let mut changed = self.nats.revision.subscribe();
        loop {
            let read = self.ask(|nats| {
                let state = nats.lock();
                let mut entries: Vec<_> = state
                    .values
                    .iter()
                    .filter(|(_, stored)| stored.revision > seen)
                    .filter_map(|(subject, stored)| {
                        let id = subject.strip_prefix(&bucket("jobs"))?;
                        let entry = Entry::read(stored.headers.as_ref()?, stored.revision)?;
                        Some((id.to_owned(), entry))
                    })
                    .collect();
                entries.sort_by_key(|(_, entry)| entry.revision);
                entries
            });
            match read.await {
                Ok(entries) => {
                    for (id, entry) in entries {
                        seen = entry.revision;
                        index.put(&id, entry);
                    }
                    if let Some(known) = known.take() {
                        // Nobody who waits is gone before that.
                        let _ = known.send(());
                    }
                    // The sender is beside it.
                    let _ = changed.changed().await;
                }
                Err(_) => sleep(Duration::from_secs(1)).await,
            }
        }
    }
}
