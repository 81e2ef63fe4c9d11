//! Coordinators that look after one schedule, over the engine of a file.

use occy_pipeline::mirror::config::Config;
use occy_pipeline::registry;
use occy_pipeline::spool::SpoolDir;
use occy_proto::v1::RegistryCredentials;
use occy_proto::v1::registry_credentials::Login;
use tempfile::TempDir;

use super::*;
use crate::admit::Gate;
use crate::client::{ClientLimits, Clients};
use crate::credentials::SecretKeys;
use crate::engine::Limits;
use crate::engine::embedded::Store;
use crate::engine::schedules::Schedules as _;
use crate::fleet::{Fleet, Patience};
use crate::schedule::Capabilities;

/// Nobody answers there, so that its jobs go on for a while.
const FILE: &str =
    "mirrors: [{sources: ['127.0.0.1:9/x'], targets: ['127.0.0.1:9/y']}]\nschedule: {interval: 1d}\n";

/// One engine, and what is of several coordinators that have it.
struct Place {
    store: Store,
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let limits = Limits { active: 2, active_each: 2, kept: 9 };
        Self { store: Store::open(&directory.path().join("jobs"), limits).unwrap(), directory }
    }

    fn coordinator(&self) -> Timetable {
        // Who runs tests has a provider of cryptography, or has just got one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let file = self.directory.path().join("keys");
        std::fs::write(&file, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n").unwrap();
        let fleet = Fleet::embedded(0, &Capabilities::default(), &[], Patience::default());
        let gate = Gate {
            roots: Vec::new(),
            registry: registry::Options::default(),
            clients: Clients::new(SpoolDir::new("/tmp", 0), ClientLimits { calls: 1, spool: 0 }),
            max_layer_size: 0,
            parallel: 1,
            fleet: fleet.clone(),
        };
        let keys = Some(SecretKeys::read(&file).unwrap());
        let jobs = Jobs::new(Arc::new(self.store.clone()), Arc::new(gate), keys, fleet, 9);
        Timetable::new(jobs, ScheduleLimits { all: 9, each: 9 })
    }

    async fn record(&self) -> (ScheduleRecord, u64) {
        self.store.schedule(&name()).await.unwrap().unwrap()
    }

    /// The schedule's record after something was done to it.
    async fn edit(&self, edit: impl FnOnce(&mut ScheduleRecord)) -> ScheduleRecord {
        let (mut record, revision) = self.record().await;
        edit(&mut record);
        assert!(self.store.put_schedule(&name(), record.clone(), revision).await.unwrap());
        record
    }

    async fn jobs(&self) -> Vec<String> {
        let (jobs, _) = self.store.list(None, None, Vec::new(), 9).await.unwrap();
        jobs.into_iter().map(|job| job.id).collect()
    }
}

fn name() -> ScheduleName {
    ScheduleName { tenant: "one".into(), id: "daily".to_owned() }
}

async fn put(timetable: &Timetable, logins: &Logins) -> Result<Schedule, ServiceError> {
    let spec = MirrorSpec { config: FILE.to_owned(), ..MirrorSpec::default() };
    let timing = Config::parse(FILE).unwrap().schedule.unwrap();
    timetable.put(&name().tenant, name().id, spec, &timing, logins).await
}

/// It has been due for an hour.
fn overdue(record: &mut ScheduleRecord) {
    let due = now().checked_sub(SignedDuration::from_hours(1)).unwrap();
    let schedule = record.schedule.as_mut().unwrap();
    (schedule.due_time, schedule.start_time) = (Some(time_for(due)), Some(time_for(due)));
}

#[tokio::test]
async fn what_is_due_is_begun_once_whoever_comes_to_it_and_skipped_while_it_goes_on() {
    let place = Place::new();
    let (one, two) = (place.coordinator(), place.coordinator());
    // A registry that takes connections and never answers: the run goes on for as long as that is waited for.
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let config = FILE.replace("127.0.0.1:9/x", &format!("{}/x", silent.local_addr().unwrap()));
    let spec = MirrorSpec { config, ..MirrorSpec::default() };
    let timing = Config::parse(FILE).unwrap().schedule.unwrap();
    one.put(&name().tenant, name().id, spec, &timing, &Logins::default()).await.unwrap();
    place.edit(overdue).await;
    let name = name();
    let (first, second, third) =
        tokio::join!(one.take_turn(&name), two.take_turn(&name), two.take_turn(&name));
    let next = first.unwrap().unwrap();
    assert!(next > now() && second.unwrap() == Some(next) && third.unwrap() == Some(next));
    let schedule = two.get(&name).await.unwrap();
    assert_eq!((schedule.runs, schedule.skips), (1, 0));
    assert_eq!(place.jobs().await, [schedule.last_run.unwrap().job_id]);

    place.edit(overdue).await;
    let (first, second) = tokio::join!(one.take_turn(&name), two.take_turn(&name));
    assert!(first.unwrap() > Some(now()) && second.unwrap() > Some(now()));
    let schedule = one.get(&name).await.unwrap();
    assert_eq!((schedule.runs, schedule.skips, place.jobs().await.len()), (1, 1, 1));
}

#[tokio::test]
async fn who_is_killed_after_any_step_is_stood_in_for_by_another() {
    for has_submitted in [false, true] {
        let place = Place::new();
        let (killed, other) = (place.coordinator(), place.coordinator());
        put(&killed, &Logins::default()).await.unwrap();
        let timing = Config::parse(FILE).unwrap().schedule.unwrap();
        let job = new_job();
        let begun = place.edit(|record| turn::begin(record, &timing, now(), job.clone(), now())).await;
        if has_submitted {
            killed.submit(&begun).await.unwrap();
        }
        other.take_turn(&name()).await.unwrap();
        other.take_turn(&name()).await.unwrap();
        assert_eq!(place.jobs().await, std::slice::from_ref(&job), "{has_submitted}");
        let schedule = other.get(&name()).await.unwrap();
        assert_eq!((schedule.runs, schedule.skips), (1, 0));
        let run = schedule.last_run.unwrap();
        assert!(run.job_id == job && run.start_time.is_some());
    }
}

#[tokio::test]
async fn what_is_put_again_stays_due_and_what_has_changed_is_counted_from_then() {
    let place = Place::new();
    let timetable = place.coordinator();
    let first = put(&timetable, &Logins::default()).await.unwrap();
    place.edit(overdue).await;
    let again = put(&timetable, &Logins::default()).await.unwrap();
    assert!(again.due_time.unwrap().seconds < first.create_time.unwrap().seconds, "it still is overdue");
    let spec = MirrorSpec { config: format!("{FILE}#\n"), ..MirrorSpec::default() };
    let timing = Config::parse(FILE).unwrap().schedule.unwrap();
    let other = timetable.put(&name().tenant, name().id, spec, &timing, &Logins::default()).await.unwrap();
    let seconds = |time: Option<prost_types::Timestamp>| time.unwrap().seconds;
    assert!(seconds(other.due_time) > seconds(first.create_time));
    assert_eq!(other.create_time, first.create_time);
}

#[tokio::test]
async fn each_run_has_the_schedules_login_and_what_was_put_last_is_all_that_is_kept() {
    let place = Place::new();
    let timetable = place.coordinator();
    let token = Login::RegistryToken("hunter2".to_owned());
    let login = RegistryCredentials { host: "r.io".to_owned(), login: Some(token) };
    put(&timetable, &Logins::of(vec![login]).unwrap()).await.unwrap();
    let (record, _) = place.record().await;
    let sealed = record.sealed.clone().unwrap();
    assert!(!record.encode_to_vec().windows(7).any(|bytes| bytes == b"hunter2"));
    // By hand, and again while it goes on.
    let (job, started) = timetable.run(&name()).await.unwrap();
    let (same, again) = timetable.run(&name()).await.unwrap();
    assert_eq!((&job.id, started, again), (&same.id, true, false));
    let of_job = place.store.sealed(&job.id).await.unwrap().unwrap();
    let jobs = &timetable.0.jobs;
    assert!(jobs.open_sealed(&job.id, Some(&of_job)).unwrap().for_host("r.io").is_some());
    // Neither is the other's.
    assert!(jobs.open_sealed(&job.id, Some(&sealed)).is_err());
    put(&timetable, &Logins::default()).await.unwrap();
    assert_eq!(place.record().await.0.sealed, None);
    timetable.delete(&name()).await.unwrap();
    assert!(matches!(timetable.get(&name()).await, Err(ServiceError::NoSuchSchedule(_))));
}
