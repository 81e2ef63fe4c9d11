//! What is known of jobs, durable: one file, one write at a time, each synced before anybody hears of it.
//!
//! | table | key | value |
//! |---|---|---|
//! | `jobs` | id | the `Job` of the API |
//! | `active` | id of a job that has not ended | its tenant |
//! | `keys` | tenant, idempotency key | id |
//! | `events` | id, sequence | the `JobEvent` of the API |
//! | `credentials` | id of a job that has not ended | its credentials, sealed |
//! | `layers` | id, source's name of a layer | what an attempt wrote of it |
//! | `traces` | id of a job that has not ended | the `traceparent` of its submission |
//!
//! Ids are UUIDs of version 7: their order is that of their time.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use occy_proto::v1::{Job, JobEvent, JobState, PipelineSpec};
use prost::Message;
use prost_types::Timestamp;
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

pub use super::file::StoreError;
use super::file::{During, StoreFile};
use super::state::{self, Change, Refused};
use crate::schedule::Tenant;

const JOBS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("jobs");
const ACTIVE: TableDefinition<'_, &str, &str> = TableDefinition::new("active");
const KEYS: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("keys");
const CREDENTIALS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("credentials");
const EVENTS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("events");
const LAYERS: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("layers");
const TRACES: TableDefinition<'_, &str, &str> = TableDefinition::new("traces");

/// Events that are read at once.
const EVENTS_AT_ONCE: usize = 64;

/// The store. Clones are handles on the same file.
#[derive(Clone, Debug)]
pub struct Store {
    file: Arc<StoreFile>,
    limits: Limits,
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
#[derive(Debug)]
pub struct Submission {
    /// Its id, if it is new.
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
    /// There is no such job.
    Missing,
}

impl Store {
    /// Opens the file, or makes it. Blocks.
    pub fn open(path: &Path, limits: Limits) -> Result<Self, StoreError> {
        let file = StoreFile::open(path)?;
        file.using(|database| {
            let write = database.begin_write().during("open")?;
            write.open_table(JOBS).during("open")?;
            write.open_table(ACTIVE).during("open")?;
            write.open_table(KEYS).during("open")?;
            write.open_table(CREDENTIALS).during("open")?;
            write.open_table(EVENTS).during("open")?;
            write.open_table(LAYERS).during("open")?;
            write.open_table(TRACES).during("open")?;
            write.commit().during("open")
        })?;
        Ok(Self { file: Arc::new(file), limits })
    }

    /// How much is kept.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Accepts a job.
    pub async fn submit(&self, submission: Submission) -> Result<Submitted, StoreError> {
        self.blocking(move |store, database| store.submit_now(database, submission)).await
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
            let mut own = 0;
            for entry in active.iter().during("read")? {
                own += usize::from(entry.during("read")?.1.value() == &*tenant);
            }
            if own >= self.limits.active_each {
                return Ok(Submitted::FullForTenant);
            }
            let now = Some(now());
            let job = Job {
                id,
                state: JobState::Queued.into(),
                tenant: tenant.to_string(),
                spec: Some(spec),
                create_time: now,
                update_time: now,
                ..Job::default()
            };
            jobs.insert(&*job.id, &*job.encode_to_vec()).during("write")?;
            active.insert(&*job.id, &*tenant).during("write")?;
            if let Some(sealed) = sealed {
                let mut credentials = write.open_table(CREDENTIALS).during("write")?;
                credentials.insert(&*job.id, &*sealed).during("write")?;
            }
            if !key.is_empty() {
                keys.insert((&*tenant, &*key), &*job.id).during("write")?;
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
        let active = write.open_table(ACTIVE).during("write")?;
        let excess = jobs.len().during("read")?.saturating_sub(self.limits.kept as u64);
        if excess == 0 {
            return Ok(());
        }
        let mut old = Vec::new();
        for entry in jobs.iter().during("read")? {
            let (id, _) = entry.during("read")?;
            if old.len() as u64 == excess {
                break;
            }
            if active.get(id.value()).during("read")?.is_none() {
                old.push(id.value().to_owned());
            }
        }
        let mut events = write.open_table(EVENTS).during("write")?;
        for id in &old {
            jobs.remove(&**id).during("write")?;
            events.retain_in((&**id, 0)..=(&**id, u64::MAX), |_, _| false).during("write")?;
        }
        let mut keys = write.open_table(KEYS).during("write")?;
        keys.retain(|_, id| !old.iter().any(|old| old == id)).during("write")
    }

    /// Makes changes, all of them or none, and what an attempt wrote of a layer with them.
    pub async fn apply(
        &self,
        id: &str,
        changes: Vec<Change>,
        written: Option<(String, String)>,
    ) -> Result<Applied, StoreError> {
        let id = id.to_owned();
        self.blocking(move |_, database| apply_now(database, &id, changes, written.as_ref())).await
    }

    /// A job as it is now.
    pub async fn get(&self, id: &str) -> Result<Option<Job>, StoreError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let jobs = read.open_table(JOBS).during("read")?;
            Ok(jobs.get(&*id).during("read")?.map(|job| decode(job.value())))
        })
        .await
    }

    /// The jobs of `tenant`, or of all, before `before`, the newest first, at most so many, without their layers; and whether there are more.
    pub async fn list(
        &self,
        tenant: Option<Tenant>,
        before: Option<String>,
        states: Vec<JobState>,
        count: usize,
    ) -> Result<(Vec<Job>, bool), StoreError> {
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

    /// The ids of all jobs that have not ended, the oldest first, and whose they are. Blocks.
    pub fn active(&self) -> Result<Vec<(String, Tenant)>, StoreError> {
        self.file.using(|database| {
            let read = database.begin_read().during("read")?;
            let active = read.open_table(ACTIVE).during("read")?;
            let jobs = active.iter().during("read")?.map(|entry| {
                let (id, tenant) = entry.during("read")?;
                Ok((id.value().to_owned(), tenant.value().into()))
            });
            jobs.collect()
        })
    }

    /// The first events after a sequence.
    pub async fn events(&self, id: &str, after: u64) -> Result<Vec<JobEvent>, StoreError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let events = read.open_table(EVENTS).during("read")?;
            let range = events.range((&*id, after + 1)..=(&*id, u64::MAX)).during("read")?;
            range.take(EVENTS_AT_ONCE).map(|entry| Ok(decode(entry.during("read")?.1.value()))).collect()
        })
        .await
    }

    /// The `traceparent` of a job that has not ended, if it was submitted with one.
    pub async fn trace(&self, id: &str) -> Result<Option<String>, StoreError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let traces = read.open_table(TRACES).during("read")?;
            Ok(traces.get(&*id).during("read")?.map(|trace| trace.value().to_owned()))
        })
        .await
    }

    /// What an earlier attempt wrote of a layer.
    pub async fn written(&self, id: &str, layer: &str) -> Result<Option<String>, StoreError> {
        let (id, layer) = (id.to_owned(), layer.to_owned());
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let layers = read.open_table(LAYERS).during("read")?;
            Ok(layers.get((&*id, &*layer)).during("read")?.map(|record| record.value().to_owned()))
        })
        .await
    }

    /// A job's credentials, sealed.
    pub async fn sealed(&self, id: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let id = id.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let credentials = read.open_table(CREDENTIALS).during("read")?;
            Ok(credentials.get(&*id).during("read")?.map(|sealed| sealed.value().to_owned()))
        })
        .await
    }

    /// The file is read and synced where that keeps nobody waiting.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self, &Database) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        match tokio::task::spawn_blocking(move || store.file.using(|database| work(&store, database))).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

fn apply_now(
    database: &Database,
    id: &str,
    changes: Vec<Change>,
    written: Option<&(String, String)>,
) -> Result<Applied, StoreError> {
    let write = database.begin_write().during("write")?;
    let job = {
        let mut jobs = write.open_table(JOBS).during("write")?;
        let Some(before) = jobs.get(id).during("read")?.map(|job| decode::<Job>(job.value())) else {
            return Ok(Applied::Missing);
        };
        let mut events = write.open_table(EVENTS).during("write")?;
        let mut job = before.clone();
        for change in changes {
            let time = now();
            let event = match state::apply(&mut job, change, time) {
                Ok(event) => event,
                Err(Refused(_)) => return Ok(Applied::Refused(before)),
            };
            let event = JobEvent { sequence: job.last_sequence, time: Some(time), event: Some(event) };
            events.insert((id, event.sequence), &*event.encode_to_vec()).during("write")?;
        }
        jobs.insert(id, &*job.encode_to_vec()).during("write")?;
        let mut layers = write.open_table(LAYERS).during("write")?;
        if let Some((layer, record)) = written {
            layers.insert((id, &**layer), &**record).during("write")?;
        }
        if state::is_final(job.state()) {
            write.open_table(ACTIVE).during("write")?.remove(id).during("write")?;
            write.open_table(CREDENTIALS).during("write")?.remove(id).during("write")?;
            write.open_table(TRACES).during("write")?.remove(id).during("write")?;
            // An idle end of the range: no name of a layer sorts behind it.
            layers.retain_in((id, "")..=(id, "\u{10ffff}"), |_, _| false).during("write")?;
        }
        job
    };
    write.commit().during("write")?;
    Ok(Applied::Done(job))
}

/// What we wrote ourselves; redb's checksums say that it is what we wrote.
fn decode<M: Message + Default>(bytes: &[u8]) -> M {
    M::decode(bytes).expect("the store holds what was encoded for it")
}

fn now() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(elapsed.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { active: 3, active_each: 3, kept: 4 };

    fn submission(tenant: &str, source: &str, key: &str) -> Submission {
        Submission {
            id: uuid::Uuid::now_v7().to_string(),
            tenant: tenant.into(),
            spec: spec(source),
            key: key.to_owned(),
            sealed: Some(b"sealed".to_vec()),
            trace: None,
        }
    }

    fn spec(source: &str) -> PipelineSpec {
        PipelineSpec { source: source.to_owned(), ..PipelineSpec::default() }
    }

    async fn submit(store: &Store, source: &str, key: &str) -> Job {
        match store.submit(submission("", source, key)).await.unwrap() {
            Submitted::New(job) => job,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_key_makes_one_job_and_keeps_its_meaning() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("jobs"), LIMITS).unwrap();
        let job = submit(&store, "a", "key").await;
        let again = store.submit(submission("", "a", "key")).await.unwrap();
        assert!(matches!(again, Submitted::Earlier(earlier) if earlier == job));
        assert!(matches!(store.submit(submission("", "b", "key")).await.unwrap(), Submitted::KeyReused));
        assert_ne!(submit(&store, "a", "").await.id, submit(&store, "a", "").await.id);
        assert!(matches!(store.submit(submission("", "a", "")).await.unwrap(), Submitted::Full));
    }

    #[tokio::test]
    async fn tenants_have_keys_and_limits_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let limits = Limits { active_each: 1, ..LIMITS };
        let store = Store::open(&directory.path().join("jobs"), limits).unwrap();
        let submit = async |tenant: &str, source: &str| store.submit(submission(tenant, source, "key")).await;
        let Submitted::New(job) = submit("one", "a").await.unwrap() else { panic!("it is new") };
        assert_eq!(job.tenant, "one");
        assert!(matches!(submit("two", "b").await.unwrap(), Submitted::New(_)));
        assert!(matches!(submit("two", "b").await.unwrap(), Submitted::Earlier(_)));
        let more = store.submit(submission("one", "a", "")).await.unwrap();
        assert!(matches!(more, Submitted::FullForTenant));
        let (jobs, _) = store.list(Some("one".into()), None, Vec::new(), 10).await.unwrap();
        assert_eq!(jobs, [job]);
    }

    #[tokio::test]
    async fn changes_are_there_when_the_file_is_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs");
        let id = {
            let store = Store::open(&path, LIMITS).unwrap();
            let job = submit(&store, "a", "").await;
            let written = Some(("layer".to_owned(), "record".to_owned()));
            store.apply(&job.id, vec![Change::Begin, Change::Plan(Vec::new())], written).await.unwrap();
            let refused = store.apply(&job.id, vec![Change::Finalize, Change::Begin], None).await.unwrap();
            assert!(matches!(refused, Applied::Refused(_)));
            job.id
        };
        let store = Store::open(&path, LIMITS).unwrap();
        assert_eq!(store.active().unwrap(), [(id.clone(), "".into())]);
        let job = store.get(&id).await.unwrap().unwrap();
        assert_eq!((job.state(), job.last_sequence), (JobState::Running, 2));
        assert_eq!(store.written(&id, "layer").await.unwrap().as_deref(), Some("record"));
        let sequences = |events: Vec<JobEvent>| events.iter().map(|event| event.sequence).collect::<Vec<_>>();
        assert_eq!(
            sequences(store.events(&id, 0).await.unwrap()),
            [1, 2],
            "none of a change that was refused"
        );
        assert_eq!(sequences(store.events(&id, 1).await.unwrap()), [2]);
        assert_eq!(store.sealed(&id).await.unwrap().as_deref(), Some(&b"sealed"[..]));
        store.apply(&id, vec![Change::Cancel], None).await.unwrap();
        assert_eq!(store.sealed(&id).await.unwrap(), None);
        assert!(store.active().unwrap().is_empty());
        assert_eq!(store.written(&id, "layer").await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_oldest_that_have_ended_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("jobs"), LIMITS).unwrap();
        let running = submit(&store, "running", "").await;
        let mut ended = Vec::new();
        for number in 0..6 {
            let job = submit(&store, "a", &format!("key {number}")).await;
            store.apply(&job.id, vec![Change::Cancel], None).await.unwrap();
            ended.push(job.id);
        }
        let (jobs, more) = store.list(None, None, Vec::new(), 10).await.unwrap();
        let ids: Vec<_> = jobs.iter().map(|job| &job.id).collect();
        assert_eq!(ids, [&ended[5], &ended[4], &ended[3], &running.id]);
        assert!(!more);
        assert!(store.events(&ended[0], 0).await.unwrap().is_empty());
        submit(&store, "another", "key 0").await;
        let (page, more) =
            store.list(None, Some(ended[5].clone()), vec![JobState::Cancelled], 1).await.unwrap();
        assert_eq!((page[0].id.clone(), more), (ended[4].clone(), false));
    }
}
