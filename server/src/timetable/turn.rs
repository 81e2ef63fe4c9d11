//! What becomes of a schedule: pure, on its record alone, so that each step is one change of that.
//!
//! A time that is due is *begun* first: the record says so, with the id of the job that there will be, and what is due next. Then the job is
//! submitted, and the record says that it was *accepted*; or that it was *refused*. Whoever begins it, anybody may go on: the job's id and
//! its key make one job of it, however often it is submitted.

use jiff::Timestamp;
use occy_pipeline::mirror::schedule::Schedule as Timing;
use occy_proto::v1::{JobState, ScheduleRun, ScheduleSkip, ScheduleSkipReason};

use crate::engine::schedules::{ScheduleRecord, time_for, time_of};
use crate::job::state::is_final;

/// What is to be done about a schedule now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing, until then. None: until it is changed.
    Wait(Option<Timestamp>),
    /// A time is due, and the run before has ended, if there was one.
    Begin(Timestamp),
    /// A time is due, and the run before goes on.
    Skip(Timestamp),
    /// A run was begun, and is not known to be accepted.
    Submit,
}

/// What is to be done, where the last run's job is in that state; None: it is not there.
pub fn turn(record: &ScheduleRecord, last: Option<JobState>, now: Timestamp) -> Turn {
    if record.pending().is_some() {
        return Turn::Submit;
    }
    let schedule = record.schedule();
    let (Some(due), Some(start)) = (schedule.due_time.map(time_of), schedule.start_time.map(time_of)) else {
        return Turn::Wait(None);
    };
    match last {
        _ if start > now => Turn::Wait(Some(start)),
        Some(state) if !is_final(state) => Turn::Skip(due),
        _ => Turn::Begin(due),
    }
}

/// Whether a time is due beside a run that was begun.
pub fn is_due(record: &ScheduleRecord, now: Timestamp) -> bool {
    record.schedule().start_time.is_some_and(|start| time_of(start) <= now)
}

/// Its times are those of `timing` from `now` on, and nothing of before is due any more.
pub fn plan(record: &mut ScheduleRecord, timing: &Timing, now: Timestamp) {
    let since = record.since.map_or(now, time_of);
    let due = timing.following(&record.unique, since, now, now);
    set_due(record, timing, due);
}

/// Nothing is due any more.
pub fn unplan(record: &mut ScheduleRecord) {
    let schedule = record.schedule.get_or_insert_default();
    (schedule.due_time, schedule.start_time) = (None, None);
}

/// A run is begun, of a time that was due, with a job of that id.
pub fn begin(record: &mut ScheduleRecord, timing: &Timing, due: Timestamp, job: String, now: Timestamp) {
    advance(record, timing, due, now);
    begin_run(record, ScheduleRun { job_id: job, due_time: Some(time_for(due)), ..ScheduleRun::default() });
}

/// The same, because somebody wants it now. What is due stays due.
pub fn begin_by_hand(record: &mut ScheduleRecord, job: String, now: Timestamp) {
    let due_time = Some(time_for(now));
    begin_run(record, ScheduleRun { job_id: job, due_time, by_hand: true, ..ScheduleRun::default() });
}

fn begin_run(record: &mut ScheduleRecord, run: ScheduleRun) {
    let schedule = record.schedule.get_or_insert_default();
    record.former = schedule.last_run.replace(run);
}

/// The job of the run that was begun is there.
pub fn accepted(record: &mut ScheduleRecord, now: Timestamp) {
    record.former = None;
    let schedule = record.schedule.get_or_insert_default();
    schedule.runs += 1;
    if let Some(run) = &mut schedule.last_run {
        run.start_time = Some(time_for(now));
    }
}

/// There is no job of the run that was begun, and will be none. What somebody wanted was not due, and is not skipped.
pub fn refused(record: &mut ScheduleRecord, message: String) {
    let former = record.former.take();
    let schedule = record.schedule.get_or_insert_default();
    let Some(run) = std::mem::replace(&mut schedule.last_run, former) else { return };
    if !run.by_hand {
        let skip = ScheduleSkip { due_time: run.due_time, message, ..ScheduleSkip::default() };
        skipped(record, skip, ScheduleSkipReason::Refused);
    }
}

/// A time that was due is passed over, because the last run goes on.
pub fn skip(record: &mut ScheduleRecord, timing: &Timing, due: Timestamp, now: Timestamp) {
    advance(record, timing, due, now);
    let job_id = record.schedule().last_run.as_ref().map(|run| run.job_id.clone()).unwrap_or_default();
    let message = format!("the run before goes on, as job {job_id}");
    let skip = ScheduleSkip { due_time: Some(time_for(due)), message, job_id, ..ScheduleSkip::default() };
    skipped(record, skip, ScheduleSkipReason::Overlap);
}

fn skipped(record: &mut ScheduleRecord, skip: ScheduleSkip, reason: ScheduleSkipReason) {
    let schedule = record.schedule.get_or_insert_default();
    schedule.skips += 1;
    schedule.last_skip = Some(ScheduleSkip { reason: reason.into(), ..skip });
}

/// What is due is what comes after that which was, and has not begun by now.
fn advance(record: &mut ScheduleRecord, timing: &Timing, due: Timestamp, now: Timestamp) {
    let since = record.since.map_or(due, time_of);
    let next = timing.following(&record.unique, since, due, now);
    set_due(record, timing, next);
}

fn set_due(record: &mut ScheduleRecord, timing: &Timing, due: Option<Timestamp>) {
    let start = due.map(|due| time_for(timing.start(&record.unique, due)));
    let schedule = record.schedule.get_or_insert_default();
    (schedule.due_time, schedule.start_time) = (due.map(time_for), start);
}

#[cfg(test)]
mod tests {
    use occy_pipeline::mirror::config::Config;
    use occy_proto::v1::Schedule;

    use super::*;

    fn timing(text: &str) -> Timing {
        let file =
            format!("mirrors: [{{sources: [a.example/x], targets: [b.example/x]}}]\nschedule: {{{text}}}\n");
        Config::parse(&file).unwrap().schedule.unwrap()
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    /// One that was made at 0.
    fn made(timing: &Timing) -> ScheduleRecord {
        let mut record = ScheduleRecord {
            schedule: Some(Schedule::default()),
            since: Some(time_for(at(0))),
            ..ScheduleRecord::default()
        };
        plan(&mut record, timing, at(0));
        record
    }

    fn due(record: &ScheduleRecord) -> Option<i64> {
        record.schedule().due_time.map(|time| time.seconds)
    }

    #[test]
    fn a_time_that_is_due_becomes_one_run_in_two_steps() {
        let timing = timing("interval: 10s");
        let mut record = made(&timing);
        assert_eq!(turn(&record, None, at(9)), Turn::Wait(Some(at(10))));
        assert_eq!(turn(&record, None, at(10)), Turn::Begin(at(10)));
        begin(&mut record, &timing, at(10), "one".to_owned(), at(10));
        assert_eq!((turn(&record, None, at(10)), due(&record)), (Turn::Submit, Some(20)));
        assert_eq!(record.appointment(), Some(at(10)), "it has to be looked at at once");
        assert_eq!(record.schedule().runs, 0);
        accepted(&mut record, at(11));
        assert_eq!((record.schedule().runs, record.pending()), (1, None));
        assert_eq!(
            (turn(&record, Some(JobState::Succeeded), at(20)), record.appointment()),
            (Turn::Begin(at(20)), Some(at(20)))
        );
    }

    #[test]
    fn a_time_that_is_due_while_a_run_goes_on_is_skipped() {
        let timing = timing("interval: 10s");
        let mut record = made(&timing);
        begin(&mut record, &timing, at(10), "one".to_owned(), at(10));
        accepted(&mut record, at(10));
        for state in [JobState::Queued, JobState::Running, JobState::Finalizing] {
            assert_eq!(turn(&record, Some(state), at(20)), Turn::Skip(at(20)));
        }
        skip(&mut record, &timing, at(20), at(20));
        let schedule = record.schedule();
        assert_eq!((schedule.runs, schedule.skips, due(&record)), (1, 1, Some(30)));
        let skip = schedule.last_skip.as_ref().unwrap();
        assert_eq!((skip.reason(), skip.job_id.as_str()), (ScheduleSkipReason::Overlap, "one"));
        // Its job has ended, or ended so long ago that nobody knows it.
        for state in [Some(JobState::Failed), Some(JobState::Cancelled), None] {
            assert_eq!(turn(&record, state, at(30)), Turn::Begin(at(30)));
        }
    }

    #[test]
    fn what_was_missed_is_made_up_for_once() {
        let timing = timing("interval: 10s");
        let mut record = made(&timing);
        assert_eq!(turn(&record, None, at(1234)), Turn::Begin(at(10)));
        begin(&mut record, &timing, at(10), "one".to_owned(), at(1234));
        accepted(&mut record, at(1234));
        assert_eq!(turn(&record, Some(JobState::Succeeded), at(1239)), Turn::Wait(Some(at(1240))));
        // An expression's too.
        let timing = self::timing("cron: '0 0 * * *', timezone: Europe/Berlin");
        let mut record = made(&timing);
        begin(&mut record, &timing, at(82_800), "one".to_owned(), at(1_000_000_000));
        assert!(due(&record) > Some(1_000_000_000) && due(&record) <= Some(1_000_086_400));
    }

    #[test]
    fn a_run_that_is_refused_is_a_skip_and_the_last_run_is_the_one_before() {
        let timing = timing("interval: 10s");
        let mut record = made(&timing);
        begin(&mut record, &timing, at(10), "one".to_owned(), at(10));
        accepted(&mut record, at(10));
        begin(&mut record, &timing, at(20), "two".to_owned(), at(20));
        assert!(!is_due(&record, at(29)) && is_due(&record, at(30)));
        refused(&mut record, "no room".to_owned());
        let schedule = record.schedule();
        assert_eq!(schedule.last_run.as_ref().unwrap().job_id, "one");
        let skip = schedule.last_skip.as_ref().unwrap();
        assert_eq!((skip.reason(), skip.message.as_str()), (ScheduleSkipReason::Refused, "no room"));
        assert_eq!((skip.due_time.unwrap().seconds, schedule.runs, schedule.skips), (20, 1, 1));
        // What was asked for was not due.
        begin_by_hand(&mut record, "three".to_owned(), at(25));
        assert_eq!((turn(&record, None, at(25)), due(&record)), (Turn::Submit, Some(30)));
        refused(&mut record, "no room".to_owned());
        assert_eq!((record.schedule().skips, record.pending()), (1, None));
    }

    #[test]
    fn nothing_is_due_while_it_is_paused_and_nothing_is_made_up_for() {
        let timing = timing("interval: 10s");
        let mut record = made(&timing);
        unplan(&mut record);
        assert_eq!((turn(&record, None, at(99)), record.appointment()), (Turn::Wait(None), None));
        plan(&mut record, &timing, at(99));
        assert_eq!(turn(&record, None, at(99)), Turn::Wait(Some(at(100))), "as it was counted before");
    }
}
