//! All jobs, by id, with what every coordinator has to know of each: in memory, read from the headers of their records as they
//! change. What a job is has to be asked of the engine all the same: this may be a moment behind.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::HeaderMap;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use occy_proto::v1::{Job, JobState};

use super::super::subscribers::Subscribers;
use crate::job::state::is_final;
use crate::schedule::{Standing, Tenant};

const STATE: &str = "Occystrap-State";
const TENANT: &str = "Occystrap-Tenant";
const PRIORITY: &str = "Occystrap-Priority";
const SEQUENCE: &str = "Occystrap-Sequence";

/// What is known of a job without asking.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// The record's place in the order of all changes.
    pub(super) revision: u64,
    pub(super) state: JobState,
    pub(super) standing: Standing,
    /// Of its last event.
    pub(super) sequence: u64,
}

impl Entry {
    pub(super) fn of(job: &Job, revision: u64) -> Self {
        Self { revision, state: job.state(), standing: Standing::of(job), sequence: job.last_sequence }
    }

    /// For the headers of the record. A tenant's name may have any characters, and a header may not.
    pub(super) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(STATE, self.state.as_str_name());
        headers.insert(TENANT, BASE64_URL_SAFE_NO_PAD.encode(&*self.standing.tenant));
        headers.insert(PRIORITY, self.standing.priority.to_string());
        headers.insert(SEQUENCE, self.sequence.to_string());
        headers
    }

    /// None for what is not the record of a job.
    pub(super) fn read(headers: &HeaderMap, revision: u64) -> Option<Self> {
        let get = |name| headers.get(name).map(async_nats::HeaderValue::as_str);
        let name = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(get(TENANT)?).ok()?).ok()?;
        Some(Self {
            revision,
            state: JobState::from_str_name(get(STATE)?)?,
            standing: Standing {
                tenant: name.into(),
                // A coordinator that knows of no priorities does not write it.
                priority: get(PRIORITY).map_or(Some(0), |text| text.parse().ok())?,
            },
            sequence: get(SEQUENCE)?.parse().ok()?,
        })
    }
}

/// All jobs. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    jobs: Arc<Mutex<BTreeMap<String, Entry>>>,
    pub(super) subscribers: Subscribers,
}

impl Index {
    /// The job is like that, unless something later is known of it.
    pub(super) fn put(&self, id: &str, entry: Entry) {
        {
            let mut jobs = self.lock();
            if jobs.get(id).is_some_and(|known| known.revision >= entry.revision) {
                return;
            }
            jobs.insert(id.to_owned(), entry);
        }
        self.subscribers.wake(id);
    }

    /// What was read of a job now, which may be later than what is known; of one that is not known, nothing: it may have been
    /// forgotten meanwhile.
    pub(super) fn refresh(&self, id: &str, entry: impl FnOnce() -> Entry, revision: u64) {
        if self.get(id).is_some_and(|known| known.revision < revision) {
            self.put(id, entry());
        }
    }

    /// The job is not there any more.
    pub(super) fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    pub(super) fn get(&self, id: &str) -> Option<Entry> {
        self.lock().get(id).cloned()
    }

    /// How many jobs have not ended, and how many of these are the tenant's.
    pub(super) fn active(&self, tenant: &Tenant) -> (usize, usize) {
        let jobs = self.lock();
        let active = || jobs.values().filter(|job| !is_final(job.state));
        (active().count(), active().filter(|job| job.standing.tenant == *tenant).count())
    }

    /// Those that have not ended, the oldest first.
    pub(super) fn unended(&self) -> Vec<(String, Entry)> {
        let jobs = self.lock();
        jobs.iter()
            .filter(|(_, job)| !is_final(job.state))
            .map(|(id, job)| (id.clone(), job.clone()))
            .collect()
    }

    /// The oldest that have ended, as many as there are jobs beyond `kept`.
    pub(super) fn excess(&self, kept: usize) -> Vec<String> {
        let jobs = self.lock();
        let excess = jobs.len().saturating_sub(kept);
        jobs.iter().filter(|(_, job)| is_final(job.state)).map(|(id, _)| id.clone()).take(excess).collect()
    }

    /// The ids before `before`, the newest first, of a tenant and in some of the states, at most so many.
    pub(super) fn page(
        &self,
        tenant: Option<&Tenant>,
        before: Option<&str>,
        states: &[JobState],
        count: usize,
    ) -> Vec<String> {
        let jobs = self.lock();
        let end = before.map_or(Bound::Unbounded, Bound::Excluded);
        let wanted = jobs.range::<str, _>((Bound::Unbounded, end)).rev().filter(|(_, job)| {
            (states.is_empty() || states.contains(&job.state))
                && tenant.is_none_or(|tenant| *tenant == job.standing.tenant)
        });
        wanted.map(|(id, _)| id.clone()).take(count).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_back_out_of_its_headers() {
        let standing = Standing { tenant: "a\r\nb ü".into(), priority: -3 };
        let entry = Entry { revision: 7, state: JobState::Running, standing, sequence: 9 };
        assert_eq!(Entry::read(&entry.headers(), 7), Some(entry));
        assert_eq!(Entry::read(&HeaderMap::new(), 7), None);
    }

    #[test]
    fn what_comes_late_changes_nothing() {
        let index = Index::default();
        let standing = Standing { tenant: "".into(), priority: 0 };
        let entry = |revision, state| Entry { revision, state, standing: standing.clone(), sequence: 0 };
        index.put("a", entry(2, JobState::Succeeded));
        index.put("a", entry(1, JobState::Running));
        assert_eq!(index.get("a").unwrap().state, JobState::Succeeded);
        index.refresh("a", || panic!("it is known"), 2);
    }

    #[test]
    fn what_is_read_wakes_who_waits_if_nobody_has_told_of_it() {
        let index = Index::default();
        let standing = Standing { tenant: "".into(), priority: 0 };
        let entry = |revision, sequence| Entry {
            revision,
            state: JobState::Running,
            standing: standing.clone(),
            sequence,
        };
        let mut woken = index.subscribers.subscribe("a");
        index.refresh("a", || entry(1, 1), 1);
        assert_eq!(index.get("a"), None, "it may have been forgotten");
        index.put("a", entry(1, 1));
        woken.mark_unchanged();
        index.refresh("a", || entry(2, 4), 2);
        assert_eq!((index.get("a").unwrap().sequence, woken.has_changed().unwrap()), (4, true));
    }
}
