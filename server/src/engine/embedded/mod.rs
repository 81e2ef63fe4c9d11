//! The engine of one coordinator: one file, one write at a time, each synced before anybody hears of it.
//!
//! | table | key | value |
//! |---|---|---|
//! | `jobs` | id | the `Job` of the API |
//! | `active` | id of a job that has not ended | its tenant |
//! | `active_of` | tenant | how many jobs of its have not ended |
//! | `ended` | id of a job that has ended | |
//! | `keys` | tenant, idempotency key | id |
//! | `keyed` | id | its idempotency key, if it has one |
//! | `events` | id, sequence | the `JobEvent` of the API |
//! | `credentials` | id of a job that has not ended | its credentials, sealed |
//! | `layers` | id, source's name of a layer | what an attempt wrote of it |
//! | `traces` | id of a job that has not ended | the `traceparent` of its submission |
//!
//! Those of schedules are in `schedules`, and that of quotas in `quotas`.
//!
//! Ids are UUIDs of version 7: their order is that of their time. `active_of`, `ended` and `keyed` say nothing new: they are there so
//! that a submission costs the same however many jobs there are, and are made anew of the others when the file is opened.
//!
//! Who owns a job is in memory, and so is whose turn it is to do a layer. The file is one process's, so an owner is gone when the process is, and until then its claim does
//! not run out: a coordinator that was stopped for a while goes on where it was.

mod file;
mod layers;
mod quotas;
mod schedules;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use occy_proto::v1::{Job, JobEvent, JobState};
use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use tokio::sync::watch;

pub use self::file::StoreError;
use self::file::{During, StoreFile};
use self::layers::Layers;
use super::layers::{SeenLayer, Sharer};
use super::subscribers::Subscribers;
use super::{Applied, Claim, Engine, EngineError, Limits, Submission, Submitted, Written, accepted, changed};
use crate::job::state::{self, Change};
use crate::schedule::{Standing, Tenant};

const JOBS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("jobs");
const ACTIVE: TableDefinition<'_, &str, &str> = TableDefinition::new("active");
const ACTIVE_OF: TableDefinition<'_, &str, u64> = TableDefinition::new("active_of");
const ENDED: TableDefinition<'_, &str, ()> = TableDefinition::new("ended");
const KEYED: TableDefinition<'_, &str, &str> = TableDefinition::new("keyed");
const KEYS: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("keys");
const CREDENTIALS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("credentials");
const EVENTS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("events");
const LAYERS: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("layers");
const TRACES: TableDefinition<'_, &str, &str> = TableDefinition::new("traces");

/// Events that are read at once.
const EVENTS_AT_ONCE: usize = 64;

/// How often owners say that they are there, which nobody asks for here; and look whether they are.
const LEASE: Duration = Duration::from_secs(30);

/// How often one who waits for a lock looks whether its holder still has it.
const LOCK_POLL: Duration = Duration::from_millis(250);

/// The store. Clones are handles on the same file.
#[derive(Clone, Debug)]
pub struct Store {
    file: Arc<StoreFile>,
    limits: Limits,
    owners: Arc<Mutex<Owners>>,
    subscribers: Subscribers,
}

/// Who owns which job.
#[derive(Debug, Default)]
struct Owners {
    /// Grows with every claim.
    epoch: u64,
    /// The epoch of the job's claim, by its id.
    claims: HashMap<String, u64>,
    /// Who makes an image visible where.
    locks: HashMap<String, Claim>,
    /// Who does which layer.
    layers: Layers,
}

/// Who changes a job.
enum By<'a> {
    /// Its owner.
    Owner(&'a Claim),
    /// Who becomes its owner with that.
    Claimer,
    /// Who has found it without an owner.
    Finder,
    /// Who asked for it.
    Client,
}

impl Store {
    /// Opens the file, or makes it. Blocks.
    pub fn open(path: &Path, limits: Limits) -> Result<Self, StoreError> {
        let file = StoreFile::open(path)?;
        file.using(|database| {
            let write = database.begin_write().during("open")?;
            write.open_table(CREDENTIALS).during("open")?;
            write.open_table(EVENTS).during("open")?;
            write.open_table(LAYERS).during("open")?;
            write.open_table(TRACES).during("open")?;
            schedules::open(&write)?;
            quotas::open(&write)?;
            index(&write)?;
            write.commit().during("open")
        })?;
        let (owners, subscribers) = (Arc::default(), Subscribers::default());
        Ok(Self { file: Arc::new(file), limits, owners, subscribers })
    }

    fn submit_now(&self, database: &Database, submission: Submission) -> Result<Submitted, StoreError> {
        let Submission { id, tenant, spec, key, sealed, trace } = submission;
        let write = database.begin_write().during("write")?;
        let submitted = {
            let mut jobs = write.open_table(JOBS).during("write")?;
            let mut active = write.open_table(ACTIVE).during("write")?;
            let mut keys = write.open_table(KEYS).during("write")?;
            let earlier = match keys.get((&*tenant, &*key)).during("read")? {
                Some(id) if !key.is_empty() => {
                    jobs.get(id.value()).during("read")?.map(|job| decode::<Job>(job.value()))
                }
                _ => None,
            };
            match earlier {
                Some(job) if job.spec.as_ref() == Some(&spec) => return Ok(Submitted::Earlier(job)),
                Some(_) => return Ok(Submitted::KeyReused),
                None if active.len().during("read")? >= self.limits.active as u64 => {
                    return Ok(Submitted::Full);
                }
                None => {}
            }
            let mut active_of = write.open_table(ACTIVE_OF).during("write")?;
            let own = active_of.get(&*tenant).during("read")?.map_or(0, |own| own.value());
            if own >= self.limits.active_each as u64 {
                return Ok(Submitted::FullForTenant);
            }
            let job = accepted(id, &tenant, spec);
            jobs.insert(&*job.id, &*job.encode_to_vec()).during("write")?;
            active.insert(&*job.id, &*tenant).during("write")?;
            active_of.insert(&*tenant, own + 1).during("write")?;
            if let Some(sealed) = sealed {
                let mut credentials = write.open_table(CREDENTIALS).during("write")?;
                credentials.insert(&*job.id, &*sealed).during("write")?;
            }
            if !key.is_empty() {
                keys.insert((&*tenant, &*key), &*job.id).during("write")?;
                write.open_table(KEYED).during("write")?.insert(&*job.id, &*key).during("write")?;
            }
            if let Some(trace) = trace {
                write.open_table(TRACES).during("write")?.insert(&*job.id, &*trace).during("write")?;
            }
            job
        };
        self.forget(&write)?;
        write.commit().during("write")?;
        Ok(Submitted::New(submitted))
    }

    /// Forgets the oldest jobs that have ended, beyond the number that is kept.
    fn forget(&self, write: &redb::WriteTransaction) -> Result<(), StoreError> {
        let mut jobs = write.open_table(JOBS).during("write")?;
        let excess = jobs.len().during("read")?.saturating_sub(self.limits.kept as u64);
        if excess == 0 {
            return Ok(());
        }
        let mut ended = write.open_table(ENDED).during("write")?;
        let mut events = write.open_table(EVENTS).during("write")?;
        let mut keys = write.open_table(KEYS).during("write")?;
        let mut keyed = write.open_table(KEYED).during("write")?;
        for _ in 0..excess {
            let oldest = ended.pop_first().during("write")?.map(|(id, _)| id.value().to_owned());
            let Some(id) = oldest else { break };
            let tenant = jobs.remove(&*id).during("write")?.map(|job| decode::<Job>(job.value()).tenant);
            events.retain_in((&*id, 0)..=(&*id, u64::MAX), |_, _| false).during("write")?;
            let key = keyed.remove(&*id).during("write")?.map(|key| key.value().to_owned());
            if let (Some(tenant), Some(key)) = (tenant, key) {
                keys.remove((&*tenant, &*key)).during("write")?;
            }
        }
        Ok(())
    }

    fn apply_now(
        &self,
        database: &Database,
        id: &str,
        by: &By<'_>,
        changes: Vec<Change>,
        written: Option<&Written>,
    ) -> Result<Applied, StoreError> {
        // Writes come one after the other, and owners change while the file is held: what is found here holds to the end.
        let write = database.begin_write().during("write")?;
        let may = match by {
            By::Owner(claim) => self.is_owner(claim),
            By::Claimer | By::Finder => !self.owners().claims.contains_key(id),
            By::Client => true,
        };
        if !may {
            return Ok(Applied::Stale);
        }
        let job = {
            let mut jobs = write.open_table(JOBS).during("write")?;
            let Some(before) = jobs.get(id).during("read")?.map(|job| decode::<Job>(job.value())) else {
                return Ok(Applied::Missing);
            };
            let Some((job, made)) = changed(&before, changes) else {
                return Ok(Applied::Refused(before));
            };
            let mut events = write.open_table(EVENTS).during("write")?;
            for event in made {
                events.insert((id, event.sequence), &*event.encode_to_vec()).during("write")?;
            }
            jobs.insert(id, &*job.encode_to_vec()).during("write")?;
            let mut layers = write.open_table(LAYERS).during("write")?;
            if let Some(Written { layer, record }) = written {
                layers.insert((id, &**layer), &**record).during("write")?;
            }
            if state::is_final(job.state()) {
                end(&write, id, &job.tenant)?;
                write.open_table(CREDENTIALS).during("write")?.remove(id).during("write")?;
                write.open_table(TRACES).during("write")?.remove(id).during("write")?;
                // An idle end of the range: no name of a layer sorts behind it.
                layers.retain_in((id, "")..=(id, "\u{10ffff}"), |_, _| false).during("write")?;
            }
            job
        };
        let before = self.change_owner(id, by, job.state());
        if let Err(error) = write.commit() {
            // Nothing happened, to the owner neither.
            let mut owners = self.owners();
            match before {
                Some(epoch) => owners.claims.insert(id.to_owned(), epoch),
                None => owners.claims.remove(id),
            };
            return Err(error).during("write");
        }
        Ok(Applied::Done(job))
    }

    /// Gives the job the owner that it has after a change, and says which claim it had before.
    fn change_owner(&self, id: &str, by: &By<'_>, state: JobState) -> Option<u64> {
        let mut owners = self.owners();
        let before = owners.claims.get(id).copied();
        if matches!(by, By::Claimer) {
            owners.epoch += 1;
            let epoch = owners.epoch;
            owners.claims.insert(id.to_owned(), epoch);
        } else if state::is_final(state) || state == JobState::Queued {
            owners.claims.remove(id);
        }
        before
    }

    fn claim_now(&self, database: &Database, id: &str) -> Result<Option<(Claim, Job)>, StoreError> {
        let Applied::Done(job) = self.apply_now(database, id, &By::Claimer, vec![Change::Begin], None)?
        else {
            return Ok(None);
        };
        // Cancelled at once, it has no owner any more.
        let epoch = self.owners().claims.get(id).copied();
        Ok(epoch.map(|epoch| (Claim { id: id.to_owned(), epoch }, job)))
    }

    fn unowned_now(&self, database: &Database) -> Result<Vec<(String, Standing)>, StoreError> {
        let read = database.begin_read().during("read")?;
        let active = read.open_table(ACTIVE).during("read")?;
        let mut ids = Vec::new();
        for entry in active.iter().during("read")? {
            ids.push(entry.during("read")?.0.value().to_owned());
        }
        ids.retain(|id| !self.owners().claims.contains_key(id));
        let mut unowned = Vec::new();
        for id in ids {
            // One that was only queued refuses to be queued again, and that is right.
            let applied = self.apply_now(database, &id, &By::Finder, vec![Change::Requeue], None)?;
            if let Applied::Done(job) | Applied::Refused(job) = applied {
                unowned.push((id, Standing::of(&job)));
            }
        }
        Ok(unowned)
    }

    /// Takes the lock if nobody has it who still is an owner, or gives who has it.
    fn try_lock(&self, claim: &Claim, place: &str) -> Option<Claim> {
        let mut owners = self.owners();
        let Owners { claims, locks, .. } = &mut *owners;
        locks.retain(|_, holder| holds(claims, holder));
        let holder = locks.entry(place.to_owned()).or_insert_with(|| claim.clone());
        (holder != claim).then(|| holder.clone())
    }

    fn is_owner(&self, claim: &Claim) -> bool {
        holds(&self.owners().claims, claim)
    }

    fn owners(&self) -> MutexGuard<'_, Owners> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file is read and synced where that keeps nobody waiting.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self, &Database) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let store = self.clone();
        match tokio::task::spawn_blocking(move || store.file.using(|database| work(&store, database))).await {
            Ok(result) => Ok(result?),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

#[async_trait::async_trait]
impl Engine for Store {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    fn is_shared(&self) -> bool {
        false
    }

    async fn submit(&self, submission: Submission) -> Result<Submitted, EngineError> {
        self.blocking(move |store, database| store.submit_now(database, submission)).await
    }

    async fn get(&self, id: &str) -> Result<Option<Job>, EngineError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let jobs = read.open_table(JOBS).during("read")?;
            Ok(jobs.get(&*id).during("read")?.map(|job| decode(job.value())))
        })
        .await
    }

    async fn list(
        &self,
        tenant: Option<Tenant>,
        before: Option<String>,
        states: Vec<JobState>,
        count: usize,
    ) -> Result<(Vec<Job>, bool), EngineError> {
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let jobs = read.open_table(JOBS).during("read")?;
            let range = match &before {
                Some(before) => jobs.range::<&str>(..&**before),
                None => jobs.range::<&str>(..),
            };
            let mut page = Vec::new();
            for entry in range.during("read")?.rev() {
                let (_, job) = entry.during("read")?;
                let job: Job = decode(job.value());
                let is_wanted = states.is_empty() || states.contains(&job.state());
                if !is_wanted || tenant.as_ref().is_some_and(|tenant| **tenant != *job.tenant) {
                    continue;
                }
                if page.len() == count {
                    return Ok((page, true));
                }
                page.push(Job { layers: Vec::new(), ..job });
            }
            Ok((page, false))
        })
        .await
    }

    async fn events(&self, id: &str, after: u64) -> Result<Vec<JobEvent>, EngineError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let events = read.open_table(EVENTS).during("read")?;
            let range = events.range((&*id, after + 1)..=(&*id, u64::MAX)).during("read")?;
            range.take(EVENTS_AT_ONCE).map(|entry| Ok(decode(entry.during("read")?.1.value()))).collect()
        })
        .await
    }

    fn subscribe(&self, id: &str) -> watch::Receiver<u64> {
        self.subscribers.subscribe(id)
    }

    async fn unowned(&self) -> Result<Vec<(String, Standing)>, EngineError> {
        let unowned = self.blocking(Self::unowned_now).await?;
        for (id, _) in &unowned {
            self.subscribers.wake(id);
        }
        Ok(unowned)
    }

    async fn claim(&self, id: &str) -> Result<Option<(Claim, Job)>, EngineError> {
        let job = id.to_owned();
        let claim = self.blocking(move |store, database| store.claim_now(database, &job)).await?;
        self.subscribers.wake(id);
        Ok(claim)
    }

    async fn extend(&self, claim: &Claim) -> Result<bool, EngineError> {
        Ok(self.is_owner(claim))
    }

    async fn holds(&self, claim: &Claim) -> Result<bool, EngineError> {
        Ok(self.is_owner(claim))
    }

    async fn release(&self, claim: &Claim) -> Result<(), EngineError> {
        {
            let mut owners = self.owners();
            if owners.claims.get(&claim.id) != Some(&claim.epoch) {
                return Ok(());
            }
            // First, whether or not the rest can be written: whoever looks for jobs without an owner does it then.
            owners.claims.remove(&claim.id);
        }
        let job = claim.id.clone();
        let work = move |store: &Self, database: &Database| {
            store.apply_now(database, &job, &By::Finder, vec![Change::Requeue], None)
        };
        self.blocking(work).await?;
        self.subscribers.wake(&claim.id);
        Ok(())
    }

    async fn change(
        &self,
        claim: &Claim,
        changes: Vec<Change>,
        written: Option<Written>,
    ) -> Result<Applied, EngineError> {
        let owner = claim.clone();
        let work = move |store: &Self, database: &Database| {
            store.apply_now(database, &owner.id, &By::Owner(&owner), changes, written.as_ref())
        };
        let applied = self.blocking(work).await?;
        self.subscribers.wake(&claim.id);
        Ok(applied)
    }

    async fn cancel(&self, id: &str) -> Result<Applied, EngineError> {
        let job = id.to_owned();
        let work = move |store: &Self, database: &Database| {
            store.apply_now(database, &job, &By::Client, vec![Change::Cancel], None)
        };
        let applied = self.blocking(work).await?;
        self.subscribers.wake(id);
        Ok(applied)
    }

    async fn lock(&self, claim: &Claim, place: &str) -> Result<bool, EngineError> {
        loop {
            if !self.is_owner(claim) {
                return Ok(false);
            }
            let Some(holder) = self.try_lock(claim, place) else {
                return Ok(true);
            };
            // What happens to the holder from now on is heard of, and what has just happened is seen by looking again.
            let mut changed = self.subscribers.subscribe(&holder.id);
            let _ = tokio::time::timeout(LOCK_POLL, changed.changed()).await;
        }
    }

    async fn unlock(&self, claim: &Claim, place: &str) -> Result<(), EngineError> {
        self.owners().locks.retain(|locked, holder| locked != place || holder != claim);
        self.subscribers.wake(&claim.id);
        Ok(())
    }

    async fn layer_turn(&self, layer: &str, who: &Sharer) -> Result<SeenLayer, EngineError> {
        let owners = self.owners();
        Ok(owners.layers.look(layer, who, |claim| holds(&owners.claims, claim)))
    }

    async fn take_layer(&self, seen: SeenLayer, who: &Sharer) -> Result<bool, EngineError> {
        let Owners { claims, layers, .. } = &mut *self.owners();
        Ok(layers.begin(seen, who, |claim| holds(claims, claim)))
    }

    async fn end_layer(&self, layer: &str, who: &Sharer, result: Option<String>) -> Result<(), EngineError> {
        let Owners { claims, layers, .. } = &mut *self.owners();
        layers.end(layer, who, result, |claim| holds(claims, claim));
        Ok(())
    }

    async fn written(&self, id: &str, layer: &str) -> Result<Option<String>, EngineError> {
        let (id, layer) = (id.to_owned(), layer.to_owned());
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let layers = read.open_table(LAYERS).during("read")?;
            Ok(layers.get((&*id, &*layer)).during("read")?.map(|record| record.value().to_owned()))
        })
        .await
    }

    async fn sealed(&self, id: &str) -> Result<Option<Vec<u8>>, EngineError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let credentials = read.open_table(CREDENTIALS).during("read")?;
            Ok(credentials.get(&*id).during("read")?.map(|sealed| sealed.value().to_owned()))
        })
        .await
    }

    async fn trace(&self, id: &str) -> Result<Option<String>, EngineError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let traces = read.open_table(TRACES).during("read")?;
            Ok(traces.get(&*id).during("read")?.map(|trace| trace.value().to_owned()))
        })
        .await
    }
}

/// Whether a claim is its job's latest, by the epochs of all.
fn holds(claims: &HashMap<String, u64>, claim: &Claim) -> bool {
    claims.get(&claim.id) == Some(&claim.epoch)
}

/// Takes a job out of those that have not ended.
fn end(write: &redb::WriteTransaction, id: &str, tenant: &str) -> Result<(), StoreError> {
    if write.open_table(ACTIVE).during("write")?.remove(id).during("write")?.is_none() {
        return Ok(());
    }
    write.open_table(ENDED).during("write")?.insert(id, ()).during("write")?;
    let mut active_of = write.open_table(ACTIVE_OF).during("write")?;
    let own = active_of.remove(tenant).during("write")?.map_or(0, |own| own.value());
    if own > 1 {
        active_of.insert(tenant, own - 1).during("write")?;
    }
    Ok(())
}

/// Makes the tables anew that follow from others, which an earlier version may have written without them.
fn index(write: &redb::WriteTransaction) -> Result<(), StoreError> {
    write.delete_table(ACTIVE_OF).during("open")?;
    write.delete_table(ENDED).during("open")?;
    write.delete_table(KEYED).during("open")?;
    let active = write.open_table(ACTIVE).during("open")?;
    let mut active_of = write.open_table(ACTIVE_OF).during("open")?;
    let mut own = HashMap::<String, u64>::new();
    for entry in active.iter().during("open")? {
        *own.entry(entry.during("open")?.1.value().to_owned()).or_default() += 1;
    }
    for (tenant, own) in own {
        active_of.insert(&*tenant, own).during("open")?;
    }
    let mut ended = write.open_table(ENDED).during("open")?;
    for entry in write.open_table(JOBS).during("open")?.iter().during("open")? {
        let id = entry.during("open")?.0;
        if active.get(id.value()).during("open")?.is_none() {
            ended.insert(id.value(), ()).during("open")?;
        }
    }
    let mut keyed = write.open_table(KEYED).during("open")?;
    for entry in write.open_table(KEYS).during("open")?.iter().during("open")? {
        let (key, id) = entry.during("open")?;
        keyed.insert(id.value(), key.value().1).during("open")?;
    }
    Ok(())
}

/// What we wrote ourselves; redb's checksums say that it is what we wrote.
fn decode<M: Message + Default>(bytes: &[u8]) -> M {
    M::decode(bytes).expect("the store holds what was encoded for it")
}

#[cfg(test)]
mod tests {
    use occy_proto::v1::PipelineSpec;
    use tempfile::TempDir;

    use super::*;
    use crate::engine::contract::{Place, contract};
    use crate::engine::quotas::contract::quotas_contract;
    use crate::engine::schedules::contract::schedules_contract;

    /// A file in a directory of its own.
    struct File(TempDir, Mutex<Option<Limits>>);

    impl File {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap(), Mutex::default())
        }
    }

    #[async_trait::async_trait]
    impl Place for File {
        async fn open(&self, limits: Limits) -> Arc<dyn Engine> {
            *self.1.lock().unwrap() = Some(limits);
            Arc::new(Store::open(&self.0.path().join("jobs"), limits).unwrap())
        }

        async fn replace(&self, killed: Arc<dyn Engine>) -> Arc<dyn Engine> {
            drop(killed);
            let limits = self.1.lock().unwrap().expect("it was open");
            self.open(limits).await
        }
    }

    contract!(File::new());
    schedules_contract!(File::new());
    quotas_contract!(File::new());

    #[tokio::test]
    async fn a_file_of_an_earlier_version_has_all_tables_once_it_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs");
        let limits = Limits { active: 9, active_each: 2, kept: 3 };
        let submission = |tenant: &str, key: &str| Submission {
            id: uuid::Uuid::now_v7().to_string(),
            tenant: tenant.into(),
            spec: PipelineSpec::default(),
            key: key.to_owned(),
            sealed: None,
            trace: None,
        };
        let store = Store::open(&path, limits).unwrap();
        for key in ["a", "b"] {
            let Submitted::New(job) = store.submit(submission("one", key)).await.unwrap() else {
                panic!("it is new");
            };
            store.cancel(&job.id).await.unwrap();
        }
        store.submit(submission("one", "c")).await.unwrap();
        let removed = store.file.using(|database| {
            let write = database.begin_write().during("write")?;
            for table in [write.delete_table(ACTIVE_OF), write.delete_table(ENDED), write.delete_table(KEYED)]
            {
                assert!(table.during("write")?);
            }
            write.commit().during("write")
        });
        removed.unwrap();
        drop(store);

        let store = Store::open(&path, limits).unwrap();
        assert!(matches!(store.submit(submission("one", "d")).await.unwrap(), Submitted::New(_)));
        assert!(matches!(store.submit(submission("one", "e")).await.unwrap(), Submitted::FullForTenant));
        // The first of those that have ended is forgotten, and its key with it; the second's is known.
        assert!(matches!(store.submit(submission("one", "b")).await.unwrap(), Submitted::Earlier(_)));
        assert_eq!(store.list(None, None, Vec::new(), 9).await.unwrap().0.len(), limits.kept);
        let keys = store.file.using(|database| {
            let read = database.begin_read().during("read")?;
            let keys = read.open_table(KEYS).during("read")?;
            Ok((keys.len().during("read")?, keys.get(("one", "a")).during("read")?.is_none()))
        });
        assert_eq!(keys.unwrap(), (3, true));
    }
}
