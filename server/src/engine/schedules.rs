//! Schedules, as an engine keeps them: each is a record of its own, which is changed by compare-and-set, by any coordinator.
//!
//! Nobody owns a schedule. Who wants to change one reads it, and writes what it becomes if it still is what was read: so of several
//! coordinators that find the same time due, one is the first to say what becomes of it, and the others see what that was.
//!
//! Not here: what is due when, and what is done then, which is `timetable`'s.

use std::fmt::Debug;

use jiff::Timestamp;
use occy_proto::v1::{Schedule, ScheduleRun};
use prost::Message;

use super::EngineError;
use crate::schedule::Tenant;

/// What is known of schedules, durable: what a call has returned survives the process.
#[async_trait::async_trait]
pub trait Schedules: Debug + Send + Sync {
    /// All schedules, by name, and when each has to be looked at.
    async fn appointments(&self) -> Result<Vec<Appointment>, EngineError>;

    /// What is kept of a schedule, and its revision.
    async fn schedule(&self, name: &ScheduleName) -> Result<Option<(ScheduleRecord, u64)>, EngineError>;

    /// Writes what is kept of a schedule, if it still has the revision; 0: if there is none of that name. False: it has another one.
    async fn put_schedule(
        &self,
        name: &ScheduleName,
        record: ScheduleRecord,
        revision: u64,
    ) -> Result<bool, EngineError>;

    /// Removes a schedule with all that is kept of it, and gives what that was. None: there is none.
    async fn remove_schedule(&self, name: &ScheduleName) -> Result<Option<ScheduleRecord>, EngineError>;

    /// The schedules of `tenant`, or of all, behind the name `after`, by name, at most so many; and whether there are more.
    async fn list_schedules(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&ScheduleName>,
        count: usize,
    ) -> Result<(Vec<ScheduleRecord>, bool), EngineError>;
}

/// Which schedule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ScheduleName {
    /// Whose it is.
    pub tenant: Tenant,
    /// What its tenant calls it.
    pub id: String,
}

/// When a schedule has to be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appointment {
    /// Which.
    pub name: ScheduleName,
    /// At what time. None: at none.
    pub at: Option<Timestamp>,
}

/// What is kept of a schedule.
#[derive(Clone, PartialEq, Message)]
pub struct ScheduleRecord {
    /// As the API has it, with the file of its mirror.
    #[prost(message, optional, tag = "1")]
    pub schedule: Option<Schedule>,
    /// What nothing else is called, nor a later schedule of its name: what its secrets are sealed as, and its jobs begin with.
    #[prost(string, tag = "2")]
    pub unique: String,
    /// Since when it is as it is, from which intervals are counted.
    #[prost(message, optional, tag = "3")]
    pub since: Option<prost_types::Timestamp>,
    /// What its jobs log in with, sealed.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub sealed: Option<Vec<u8>>,
    /// While the last run is about to be submitted, the one before.
    #[prost(message, optional, tag = "5")]
    pub former: Option<ScheduleRun>,
    /// The name of the change that made it what it is, by which whoever made it knows that it did.
    #[prost(string, tag = "6")]
    pub change: String,
}

impl ScheduleRecord {
    /// As the API has it.
    pub fn schedule(&self) -> &Schedule {
        self.schedule.as_ref().expect("a record has a schedule from its beginning")
    }

    /// The run that is about to be submitted, if one is.
    pub fn pending(&self) -> Option<&ScheduleRun> {
        self.schedule().last_run.as_ref().filter(|run| run.start_time.is_none())
    }

    /// When it has to be looked at: at once, while a run is about to be submitted.
    pub fn appointment(&self) -> Option<Timestamp> {
        let at = self.pending().map_or(self.schedule().start_time, |run| run.due_time);
        at.map(time_of)
    }

    /// Which schedule it is of.
    pub fn name(&self) -> ScheduleName {
        let Schedule { id, tenant, .. } = self.schedule();
        ScheduleName { tenant: tenant.as_str().into(), id: id.clone() }
    }
}

/// A time of the API's. What is none, which nobody has written, is the beginning of time.
pub fn time_of(time: prost_types::Timestamp) -> Timestamp {
    Timestamp::new(time.seconds, time.nanos).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A time as the API has it.
pub fn time_for(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() }
}

#[cfg(test)]
pub(super) mod contract {
    //! What every engine must do with schedules, as tests over a place.

    use super::*;
    use crate::engine::contract::{LIMITS, Place};

    /// All of the tests for a place.
    macro_rules! schedules_contract {
        ($place:expr => $($name:ident),+ $(,)?) => {
            $(
                #[tokio::test]
                async fn $name() {
                    crate::engine::schedules::contract::$name(&$place).await;
                }
            )+
        };
        ($place:expr) => {
            crate::engine::schedules::contract::schedules_contract!($place =>
                a_schedule_is_changed_by_one_who_knows_it_as_it_is,
                schedules_are_listed_by_name_and_tenant,
                a_schedule_that_is_removed_leaves_nothing,
                schedules_are_there_for_the_next_coordinator,
            );
        };
    }
    pub(in crate::engine) use schedules_contract;

    fn name(tenant: &str, id: &str) -> ScheduleName {
        ScheduleName { tenant: tenant.into(), id: id.to_owned() }
    }

    fn record(name: &ScheduleName, at: i64) -> ScheduleRecord {
        let schedule = Schedule {
            id: name.id.clone(),
            tenant: name.tenant.to_string(),
            start_time: (at > 0).then(|| time_for(Timestamp::from_millisecond(at).unwrap())),
            ..Schedule::default()
        };
        ScheduleRecord {
            schedule: Some(schedule),
            unique: format!("{at}"),
            sealed: Some(b"sealed".to_vec()),
            ..ScheduleRecord::default()
        }
    }

    /// What was written, whatever the engine has written beside it.
    async fn read(engine: &dyn Schedules, name: &ScheduleName) -> Option<(ScheduleRecord, u64)> {
        let read = engine.schedule(name).await.unwrap();
        read.map(|(record, revision)| (ScheduleRecord { change: String::new(), ..record }, revision))
    }

    pub(in crate::engine) async fn a_schedule_is_changed_by_one_who_knows_it_as_it_is(place: &impl Place) {
        let engine = place.open(LIMITS).await;
        let nightly = name("", "nightly");
        assert_eq!(engine.schedule(&nightly).await.unwrap(), None);
        assert!(!engine.put_schedule(&nightly, record(&nightly, 1), 7).await.unwrap(), "there is none");
        assert!(engine.put_schedule(&nightly, record(&nightly, 1), 0).await.unwrap());
        assert!(!engine.put_schedule(&nightly, record(&nightly, 2), 0).await.unwrap(), "there is one");
        let (found, revision) = read(&*engine, &nightly).await.unwrap();
        assert_eq!(found, record(&nightly, 1));
        // Of several who have read the same, one is first.
        let put = |at| engine.put_schedule(&nightly, record(&nightly, at), revision);
        let (one, two, three) = tokio::join!(put(10), put(20), put(30));
        let won: Vec<_> = [one, two, three].into_iter().map(Result::unwrap).collect();
        assert_eq!(won.iter().filter(|&&won| won).count(), 1, "{won:?}");
        let (found, later) = read(&*engine, &nightly).await.unwrap();
        let first = won.iter().position(|&won| won).unwrap();
        assert_eq!(found, record(&nightly, [10, 20, 30][first]));
        assert_ne!(later, revision);
        assert!(!put(40).await.unwrap(), "it is not as it was");
    }

    pub(in crate::engine) async fn schedules_are_listed_by_name_and_tenant(place: &impl Place) {
        let engine = place.open(LIMITS).await;
        let names = [name("", "b"), name("one", "a"), name("one", "b.2"), name("token:\u{fc} \n", "a")];
        for (name, at) in names.iter().rev().zip([0, 5, 9, 7]) {
            assert!(engine.put_schedule(name, record(name, at), 0).await.unwrap());
        }
        let listed = async |tenant: Option<&str>, after: Option<&ScheduleName>, count| {
            let tenant = tenant.map(Tenant::from);
            let (records, more) = engine.list_schedules(tenant.as_ref(), after, count).await.unwrap();
            (records.iter().map(ScheduleRecord::name).collect::<Vec<_>>(), more)
        };
        assert_eq!(listed(None, None, 9).await, (names.to_vec(), false));
        assert_eq!(listed(None, None, 3).await, (names[..3].to_vec(), true));
        assert_eq!(listed(None, Some(&names[2]), 3).await, (names[3..].to_vec(), false));
        assert_eq!(listed(Some("one"), None, 2).await, (names[1..3].to_vec(), false));
        assert_eq!(listed(Some("one"), Some(&names[1]), 9).await, (names[2..3].to_vec(), false));
        assert_eq!(listed(Some("two"), None, 9).await, (Vec::new(), false));
        let all = engine.appointments().await.unwrap();
        let at = |at: i64| (at > 0).then(|| Timestamp::from_millisecond(at).unwrap());
        let expected = names
            .iter()
            .zip([7, 9, 5, 0])
            .map(|(name, millis)| Appointment { name: name.clone(), at: at(millis) });
        assert_eq!(all, expected.collect::<Vec<_>>());
    }

    pub(in crate::engine) async fn a_schedule_that_is_removed_leaves_nothing(place: &impl Place) {
        let engine = place.open(LIMITS).await;
        let (gone, other) = (name("one", "a"), name("two", "a"));
        for name in [&gone, &other] {
            assert!(engine.put_schedule(name, record(name, 1), 0).await.unwrap());
        }
        let (_, revision) = read(&*engine, &gone).await.unwrap();
        let removed = engine.remove_schedule(&gone).await.unwrap().unwrap();
        assert_eq!(removed.unique, "1");
        assert_eq!(engine.schedule(&gone).await.unwrap(), None);
        assert_eq!(engine.remove_schedule(&gone).await.unwrap(), None);
        assert!(
            !engine.put_schedule(&gone, record(&gone, 2), revision).await.unwrap(),
            "who knew it cannot bring it back"
        );
        assert_eq!(engine.schedule(&gone).await.unwrap(), None);
        assert_eq!(engine.appointments().await.unwrap().len(), 1);
        assert!(engine.put_schedule(&gone, record(&gone, 3), 0).await.unwrap(), "another of its name");
        assert!(!engine.put_schedule(&gone, record(&gone, 4), revision).await.unwrap());
        assert_eq!(read(&*engine, &gone).await.unwrap().0, record(&gone, 3));
    }

    pub(in crate::engine) async fn schedules_are_there_for_the_next_coordinator(place: &impl Place) {
        let engine = place.open(LIMITS).await;
        let nightly = name("", "nightly");
        assert!(engine.put_schedule(&nightly, record(&nightly, 1), 0).await.unwrap());
        let (_, revision) = read(&*engine, &nightly).await.unwrap();
        let engine = place.replace(engine).await;
        assert_eq!(read(&*engine, &nightly).await, Some((record(&nightly, 1), revision)));
        assert!(engine.put_schedule(&nightly, record(&nightly, 2), revision).await.unwrap());
        assert_eq!(engine.appointments().await.unwrap()[0].at, Some(Timestamp::from_millisecond(2).unwrap()));
    }
}
