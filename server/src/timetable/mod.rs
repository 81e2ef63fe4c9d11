//! Mirrors that are made at certain times.
//!
//! | what | where |
//! |---|---|
//! | what becomes of a schedule, pure | `turn` |
//! | the API's calls | `api` |
//! | what is counted | `metrics` |
//!
//! Each coordinator looks after all schedules of its engine: when a time is due, those that are there come to it together, and the
//! first to write down what becomes of it has decided that. Whoever was killed in between is stood in for by the others, or by itself when
//! it is back.

pub mod api;
pub mod metrics;
#[cfg(test)]
mod tests;
pub mod turn;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use occy_pipeline::mirror::schedule::Schedule as Timing;
use occy_proto::v1::{Job, MirrorSpec, PipelineSpec, Schedule, ScheduleRun};
use prost::Message as _;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use self::metrics::Counted;
use self::turn::Turn;
use crate::credentials::Logins;
use crate::engine::Engine;
use crate::engine::schedules::{ScheduleName, ScheduleRecord, time_for, time_of};
use crate::error::ServiceError;
use crate::job::runner::Jobs;
use crate::job::state::is_final;
use crate::schedule::Tenant;

/// How often it is looked what other coordinators have made of schedules, at least.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long a schedule is left alone that could not be looked after.
const RETRY: Duration = Duration::from_secs(5);
/// How often a change is tried that another one comes before.
const CONFLICTS: usize = 64;
/// Bytes of a schedule as it is put: its jobs have to be stored too.
const RECORD_MAX: usize = 240 * 1024;
/// Characters of a schedule's id.
const ID_MAX: usize = 64;

/// How many schedules there may be.
#[derive(Clone, Copy, Debug)]
pub struct ScheduleLimits {
    /// In all.
    pub all: usize,
    /// Of one client.
    pub each: usize,
}

/// The schedules of an engine, as a coordinator looks after them. Clones are handles on the same.
#[derive(Clone, Debug)]
pub struct Timetable(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    jobs: Jobs,
    limits: ScheduleLimits,
    counted: Counted,
    /// Wakes who looks after schedules when one has changed here.
    changed: Notify,
}

/// When a schedule is looked at next.
#[derive(Clone, Copy, Debug)]
struct Next {
    /// When it has to be. None: at no time.
    at: Option<Timestamp>,
    /// It could not be looked after, and is not tried again before.
    not_before: Instant,
}

impl Timetable {
    /// Those of the jobs' engine.
    pub fn new(jobs: Jobs, limits: ScheduleLimits) -> Self {
        Self(Arc::new(Inner { jobs, limits, counted: Counted::default(), changed: Notify::new() }))
    }

    fn engine(&self) -> &dyn Engine {
        self.0.jobs.engine()
    }

    /// What is counted of them.
    pub fn counted(&self) -> &Counted {
        &self.0.counted
    }

    /// Begins what is due, until the coordinator is stopped.
    pub async fn keep_running(&self, mut draining: watch::Receiver<bool>) -> Infallible {
        let look_every = (self.engine().lease() / 2).min(LOOK_EVERY);
        let mut known = BTreeMap::new();
        let mut looked = None::<Instant>;
        loop {
            if *draining.borrow() {
                return std::future::pending().await;
            }
            if looked.is_none_or(|looked| looked.elapsed() >= look_every) {
                match self.look(&mut known).await {
                    Ok(()) => looked = Some(Instant::now()),
                    Err(error) => tracing::warn!(%error, "schedules could not be read"),
                }
            }
            self.attend(&mut known).await;
            let wait = known.values().filter_map(Next::wait).min().unwrap_or(look_every);
            tokio::select! {
                // Losing a branch loses nothing: all that is due is looked for anew.
                () = tokio::time::sleep(wait.min(look_every)) => {}
                () = self.0.changed.notified() => looked = None,
                _ = draining.wait_for(|&draining| draining) => {}
            }
        }
    }

    /// Finds out which schedules there are.
    async fn look(&self, known: &mut BTreeMap<ScheduleName, Next>) -> Result<(), ServiceError> {
        let found = self.engine().appointments().await?;
        let before = std::mem::take(known);
        for appointment in found {
            let not_before = before.get(&appointment.name).map_or_else(Instant::now, |next| next.not_before);
            known.insert(appointment.name, Next { at: appointment.at, not_before });
        }
        self.count(known);
        Ok(())
    }

    /// Looks after those whose time has come.
    async fn attend(&self, known: &mut BTreeMap<ScheduleName, Next>) {
        let (now, instant) = (now(), Instant::now());
        let is_due = |next: &Next| next.at.is_some_and(|at| at <= now) && next.not_before <= instant;
        let due: Vec<_> =
            known.iter().filter(|(_, next)| is_due(next)).map(|(name, _)| name.clone()).collect();
        for name in due {
            let next = match self.take_turn(&name).await {
                Ok(at) => Next { at, not_before: instant },
                Err(error) => {
                    tracing::warn!(tenant = &*name.tenant, schedule = name.id, %error, "a schedule could not be looked after");
                    let is_away = error.is_of_engine();
                    known.entry(name).and_modify(|next| next.not_before = Instant::now() + RETRY);
                    if is_away {
                        // So it is with the others.
                        break;
                    }
                    continue;
                }
            };
            known.insert(name, next);
        }
        self.count(known);
    }

    fn count(&self, known: &BTreeMap<ScheduleName, Next>) {
        self.0.counted.known(known.len(), known.values().filter_map(|next| next.at).min());
    }

    /// Does what is due for a schedule, and says when it has to be looked at again.
    async fn take_turn(&self, name: &ScheduleName) -> Result<Option<Timestamp>, ServiceError> {
        for _ in 0..CONFLICTS {
            let Some((record, revision)) = self.engine().schedule(name).await? else { return Ok(None) };
            let (now, last) = (now(), self.last_job(&record).await?);
            let mut after = record.clone();
            match turn::turn(&record, last.map(|job| job.state()), now) {
                Turn::Wait(at) => return Ok(at),
                Turn::Begin(due) => {
                    turn::begin(&mut after, &timing(&record).await?, due, new_job(), now);
                    self.write(name, after, revision).await?;
                }
                Turn::Skip(due) => {
                    turn::skip(&mut after, &timing(&record).await?, due, now);
                    self.write_skip(name, after, revision).await?;
                }
                Turn::Submit => match self.submit(&record).await {
                    Ok(_) => {
                        self.write_accepted(name, &record, revision).await?;
                    }
                    Err(error) if error.is_of_engine() => return Err(error),
                    Err(error) if error.verdict().retryable && !turn::is_due(&record, now) => {
                        return Err(error);
                    }
                    Err(error) => {
                        turn::refused(&mut after, error.job_error().message);
                        self.write_skip(name, after, revision).await?;
                    }
                },
            }
        }
        Ok(Some(now()))
    }

    /// The job of the last run. None: it is not there.
    async fn last_job(&self, record: &ScheduleRecord) -> Result<Option<Job>, ServiceError> {
        match &record.schedule().last_run {
            Some(run) => Ok(self.engine().get(&run.job_id).await?),
            None => Ok(None),
        }
    }

    /// Submits the job of the run that was begun, or finds that it was.
    async fn submit(&self, record: &ScheduleRecord) -> Result<Job, ServiceError> {
        let schedule = record.schedule();
        let run = schedule.last_run.clone().unwrap_or_default();
        if let Some(job) = self.engine().get(&run.job_id).await? {
            return Ok(job);
        }
        let logins = self.0.jobs.open_sealed(&seal_of(record), record.sealed.as_deref())?;
        let spec = PipelineSpec { mirror: schedule.spec.clone(), ..PipelineSpec::default() };
        let due = run.due_time.map(time_of).unwrap_or_default().as_millisecond();
        let key = format!("schedule:{}:{due}", record.unique);
        let tenant: Tenant = schedule.tenant.as_str().into();
        self.0.jobs.submit_as(run.job_id, &tenant, spec, &logins, key).await
    }

    async fn write(
        &self,
        name: &ScheduleName,
        record: ScheduleRecord,
        revision: u64,
    ) -> Result<bool, ServiceError> {
        Ok(self.engine().put_schedule(name, record, revision).await?)
    }

    async fn write_skip(
        &self,
        name: &ScheduleName,
        record: ScheduleRecord,
        revision: u64,
    ) -> Result<(), ServiceError> {
        let skip = record.schedule().last_skip.clone().unwrap_or_default();
        if self.write(name, record, revision).await? {
            self.0.counted.skipped();
            let due = skip.due_time.map(|due| due.to_string()).unwrap_or_default();
            tracing::warn!(
                tenant = &*name.tenant,
                schedule = name.id,
                due,
                reason = skip.message,
                "a scheduled run is skipped"
            );
        }
        Ok(())
    }

    /// Says that the run's job is there, unless another coordinator has.
    async fn write_accepted(
        &self,
        name: &ScheduleName,
        record: &ScheduleRecord,
        revision: u64,
    ) -> Result<bool, ServiceError> {
        let (now, mut after) = (now(), record.clone());
        turn::accepted(&mut after, now);
        let run = record.pending().cloned().unwrap_or_default();
        let is_written = self.write(name, after, revision).await?;
        if !is_written {
            // It was removed meanwhile, or somebody else has found the run refused: then it was passed over, and is none.
            let found = self.engine().schedule(name).await?;
            let last = found.and_then(|(record, _)| record.schedule().last_run.clone());
            if last.is_none_or(|last| last.job_id != run.job_id) {
                self.0.jobs.cancel(&run.job_id).await?;
            }
        }
        if is_written {
            let late = self.lateness(record, &run, now).await;
            self.0.counted.begun(late);
            tracing::info!(
                tenant = &*name.tenant,
                schedule = name.id,
                job = run.job_id,
                "a scheduled run begins"
            );
        }
        Ok(is_written)
    }

    /// How long after its start a run was accepted. None: nobody said when it should.
    async fn lateness(&self, record: &ScheduleRecord, run: &ScheduleRun, now: Timestamp) -> Option<Duration> {
        let due = run.due_time.filter(|_| !run.by_hand).map(time_of)?;
        let start = timing(record).await.ok()?.start(&record.unique, due);
        Some(Duration::try_from(now.duration_since(start)).unwrap_or_default())
    }

    /// Makes a schedule, or another one of it.
    pub async fn put(
        &self,
        tenant: &Tenant,
        id: String,
        spec: MirrorSpec,
        timing: &Timing,
        logins: &Logins,
    ) -> Result<Schedule, ServiceError> {
        check_id(&id)?;
        let name = ScheduleName { tenant: Arc::clone(tenant), id };
        for _ in 0..CONFLICTS {
            let now = now();
            let (mut record, revision) = match self.engine().schedule(&name).await? {
                Some(found) => found,
                None => (self.new_record(&name, now).await?, 0),
            };
            record.sealed = self.0.jobs.seal(&seal_of(&record), logins)?;
            let schedule = record.schedule.get_or_insert_default();
            schedule.update_time = Some(time_for(now));
            schedule.timing = timing.to_string();
            let is_paused = schedule.paused;
            if schedule.spec.as_ref() != Some(&spec) {
                schedule.spec = Some(spec.clone());
                record.since = Some(time_for(now));
                if !is_paused {
                    turn::plan(&mut record, timing, now);
                }
            }
            if record.encoded_len() > RECORD_MAX {
                return Err(ServiceError::TooLarge {
                    what: "the schedule with its credentials",
                    limit: RECORD_MAX,
                });
            }
            if self.write(&name, record.clone(), revision).await? {
                self.0.changed.notify_one();
                return self.shown(record).await;
            }
        }
        Err(too_busy())
    }

    async fn new_record(&self, name: &ScheduleName, now: Timestamp) -> Result<ScheduleRecord, ServiceError> {
        let all = self.engine().appointments().await?;
        let ScheduleLimits { all: limit, each } = self.0.limits;
        if all.len() >= limit {
            return Err(ServiceError::TooMany { what: "schedules", limit });
        }
        if all.iter().filter(|other| other.name.tenant == name.tenant).count() >= each {
            return Err(ServiceError::TooMany { what: "schedules of this client", limit: each });
        }
        let schedule = Schedule {
            id: name.id.clone(),
            tenant: name.tenant.to_string(),
            create_time: Some(time_for(now)),
            ..Schedule::default()
        };
        let unique = uuid::Uuid::now_v7().to_string();
        Ok(ScheduleRecord { schedule: Some(schedule), unique, ..ScheduleRecord::default() })
    }

    /// A schedule as it is now.
    pub async fn get(&self, name: &ScheduleName) -> Result<Schedule, ServiceError> {
        let found = self.engine().schedule(name).await?;
        let (record, _) = found.ok_or_else(|| no_such(name))?;
        self.shown(record).await
    }

    /// The schedules of a tenant, or of all, behind the name `after`, without their files; and whether there are more.
    pub async fn list(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&ScheduleName>,
        count: usize,
    ) -> Result<(Vec<Schedule>, bool), ServiceError> {
        let (records, more) = self.engine().list_schedules(tenant, after, count).await?;
        let mut schedules = Vec::new();
        for record in records {
            let mut schedule = self.shown(record).await?;
            if let Some(spec) = &mut schedule.spec {
                spec.config.clear();
            }
            schedules.push(schedule);
        }
        Ok((schedules, more))
    }

    /// Removes a schedule, and gives what it was.
    pub async fn delete(&self, name: &ScheduleName) -> Result<Schedule, ServiceError> {
        let removed = self.engine().remove_schedule(name).await?;
        self.0.changed.notify_one();
        self.shown(removed.ok_or_else(|| no_such(name))?).await
    }

    /// Lets nothing be due, or again what is to come.
    pub async fn pause(&self, name: &ScheduleName, paused: bool) -> Result<Schedule, ServiceError> {
        for _ in 0..CONFLICTS {
            let found = self.engine().schedule(name).await?;
            let (mut record, revision) = found.ok_or_else(|| no_such(name))?;
            if record.schedule().paused == paused {
                return self.shown(record).await;
            }
            let now = now();
            let timing = timing(&record).await?;
            let schedule = record.schedule.get_or_insert_default();
            (schedule.paused, schedule.update_time) = (paused, Some(time_for(now)));
            match paused {
                true => turn::unplan(&mut record),
                false => turn::plan(&mut record, &timing, now),
            }
            if self.write(name, record.clone(), revision).await? {
                self.0.changed.notify_one();
                return self.shown(record).await;
            }
        }
        Err(too_busy())
    }

    /// Makes the mirror now, unless a run goes on; and gives the job, and whether it is a new one.
    pub async fn run(&self, name: &ScheduleName) -> Result<(Job, bool), ServiceError> {
        let mut begun = None::<String>;
        for _ in 0..CONFLICTS {
            let found = self.engine().schedule(name).await?;
            let (record, revision) = found.ok_or_else(|| no_such(name))?;
            let mut after = record.clone();
            let Some(run) = record.pending() else {
                if let Some(job) = self.last_job(&record).await? {
                    let is_ours = begun.as_ref() == Some(&job.id);
                    if is_ours || !is_final(job.state()) {
                        return Ok((job, is_ours));
                    }
                }
                let job = new_job();
                turn::begin_by_hand(&mut after, job.clone(), now());
                if self.write(name, after, revision).await? {
                    begun = Some(job);
                }
                continue;
            };
            let is_ours = begun.as_ref() == Some(&run.job_id);
            match self.submit(&record).await {
                Ok(job) => {
                    self.write_accepted(name, &record, revision).await?;
                    self.0.changed.notify_one();
                    return Ok((job, is_ours));
                }
                Err(error) => {
                    if is_ours && !error.is_of_engine() {
                        turn::refused(&mut after, error.job_error().message);
                        self.write(name, after, revision).await?;
                    }
                    return Err(error);
                }
            }
        }
        Err(too_busy())
    }

    /// As the API has it: with where its last job is now, and what came of it.
    async fn shown(&self, record: ScheduleRecord) -> Result<Schedule, ServiceError> {
        let job = self.last_job(&record).await?.unwrap_or_default();
        let mut schedule = record.schedule.unwrap_or_default();
        if let Some(run) = &mut schedule.last_run {
            run.state = job.state;
            run.result = job.result.and_then(|result| result.mirror);
        }
        Ok(schedule)
    }
}

impl Next {
    /// How long until it is looked at. None: it is not.
    fn wait(&self) -> Option<Duration> {
        let until = self.at?.duration_since(now()).max(SignedDuration::ZERO);
        let until = Duration::try_from(until).unwrap_or_default();
        Some(until.max(self.not_before.saturating_duration_since(Instant::now())))
    }
}

/// When a schedule's file says.
async fn timing(record: &ScheduleRecord) -> Result<Timing, ServiceError> {
    let text = record.schedule().spec.clone().unwrap_or_default().config;
    let parse = move || occy_pipeline::mirror::config::Config::parse(&text);
    let config = match tokio::task::spawn_blocking(parse).await {
        Ok(config) => config,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    let bad = |problem| ServiceError::Field { field: "config", problem };
    let config = config.map_err(|error| bad(error.to_string()))?;
    config.schedule.ok_or_else(|| bad(NO_TIMING.to_owned()))
}

/// What is wrong with a file that says no schedule.
const NO_TIMING: &str = "it says no schedule: write `schedule` with cron or interval";

/// The time in milliseconds, which is what engines keep of it.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

fn new_job() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// As what a schedule's credentials are sealed: no job is called that.
fn seal_of(record: &ScheduleRecord) -> String {
    format!("schedule:{}", record.unique)
}

fn check_id(id: &str) -> Result<(), ServiceError> {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let begins = id.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric());
    if begins && id.len() <= ID_MAX && id.bytes().all(is_known) {
        return Ok(());
    }
    let problem =
        format!("expected 1 to {ID_MAX} letters, digits, `-`, `_` and `.`, the first a letter or digit");
    Err(ServiceError::Field { field: "schedule_id", problem })
}

fn no_such(name: &ScheduleName) -> ServiceError {
    ServiceError::NoSuchSchedule(name.id.clone())
}

fn too_busy() -> ServiceError {
    ServiceError::Contended { what: "the schedule" }
}
