//! When a mirror is made by itself: at the times of a cron expression, or every so often.
//!
//! All of it is pure: what is due follows from the file, from when the schedule was made, and from what time it is. Each time that is
//! due is begun some time later, up to the *jitter*: always the same for one schedule and one time, so that whoever asks gets one
//! answer.

use std::fmt;
use std::time::Duration;

use croner::Cron;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_saphyr::Spanned;
use sha2::{Digest as _, Sha256};

use super::config::{ConfigError, fail};
use crate::duration;

/// The most that a time which is due may be begun later, beside an interval's own length.
const JITTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes of a cron expression.
const CRON_MAX: usize = 256;

/// When a mirror is made.
#[derive(Clone, Debug)]
pub struct Schedule {
    when: When,
    /// Each time that is due is begun up to so much later.
    jitter: Duration,
}

#[derive(Clone, Debug)]
enum When {
    /// At the times of an expression, as the clocks of a place show them.
    Cron { cron: Box<Cron>, text: String, zone: TimeZone, zone_name: String },
    /// Every so often, counted from when the schedule was made.
    Every(Duration),
}

/// As it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    cron: Option<Spanned<String>>,
    timezone: Option<Spanned<String>>,
    interval: Option<Spanned<String>>,
    jitter: Option<Spanned<String>>,
}

impl Schedule {
    pub(super) fn of(entry: Spanned<Entry>) -> Result<Self, ConfigError> {
        let Spanned { value: Entry { cron, timezone, interval, jitter }, referenced: at, .. } = entry;
        let jitter = jitter.as_ref().map(|text| Ok((length(text)?, text.referenced))).transpose()?;
        let (when, limit) = match (cron, interval) {
            (Some(cron), None) => (When::cron(&cron, timezone.as_ref())?, JITTER_MAX),
            (None, Some(interval)) => {
                if let Some(zone) = timezone {
                    return Err(fail(zone.referenced, "timezone says nothing without cron"));
                }
                let every = length(&interval)?;
                (When::Every(every), every.min(JITTER_MAX))
            }
            (Some(_), Some(second)) => {
                return Err(fail(second.referenced, "cron and interval exclude each other"));
            }
            (None, None) => return Err(fail(at, "expected cron or interval")),
        };
        match jitter {
            Some((jitter, at)) if jitter > limit => {
                let limit = duration::text(limit).unwrap_or_default();
                Err(fail(at, format!("is more than {limit}, which is the most that it can be here")))
            }
            jitter => Ok(Self { when, jitter: jitter.map_or(Duration::ZERO, |(jitter, _)| jitter) }),
        }
    }

    /// The first time that is due after `after`, of a schedule that was made at `since`. None: there is none any more.
    pub fn next(&self, since: Timestamp, after: Timestamp) -> Option<Timestamp> {
        match &self.when {
            When::Cron { cron, zone, .. } => next_of(cron, zone, after),
            When::Every(every) => {
                let every = i64::try_from(every.as_millis()).ok()?;
                let (since, after) = (since.as_millisecond(), after.as_millisecond());
                let number = (after - since).max(0) / every + 1;
                Timestamp::from_millisecond(since.checked_add(number.checked_mul(every)?)?).ok()
            }
        }
    }

    /// When that which is due then is begun, of the schedule of that name.
    pub fn start(&self, name: &str, due: Timestamp) -> Timestamp {
        let mut hash = Sha256::new();
        hash.update(name.as_bytes());
        hash.update(due.as_millisecond().to_be_bytes());
        let [first @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _]: [u8; 32] = hash.finalize().into();
        // Of milliseconds from 0 to the jitter itself.
        let choices = self.jitter.as_millis() + 1;
        let later = u128::from_be_bytes(first) % choices;
        let later = SignedDuration::from_millis(i64::try_from(later).unwrap_or(0));
        due.checked_add(later).unwrap_or(due)
    }

    /// What is due after `due`, when it is `now`: of all that should have begun by now, nothing any more.
    pub fn following(
        &self,
        name: &str,
        since: Timestamp,
        due: Timestamp,
        now: Timestamp,
    ) -> Option<Timestamp> {
        // What is due before that has begun by now, whatever its jitter; so however long nobody looked, there are few to go through.
        let jitter = SignedDuration::try_from(self.jitter).unwrap_or(SignedDuration::ZERO);
        let mut after = now.checked_sub(jitter).map_or(due, |begun| begun.max(due));
        loop {
            let next = self.next(since, after)?;
            if self.start(name, next) > now {
                return Some(next);
            }
            after = next;
        }
    }
}

impl When {
    fn cron(cron: &Spanned<String>, timezone: Option<&Spanned<String>>) -> Result<Self, ConfigError> {
        let text = cron.value.split_whitespace().collect::<Vec<_>>().join(" ");
        let bad = |problem: CronError| {
            let problem = problem.to_string();
            let problem =
                problem.trim_start_matches("Component error: ").trim_end_matches('.').to_lowercase();
            fail(cron.referenced, format!("{text:?} is no time of 5 fields, as `0 3 * * *`: {problem}"))
        };
        if text.len() > CRON_MAX {
            return Err(fail(cron.referenced, format!("has more than {CRON_MAX} bytes")));
        }
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let parsed = parser.parse(&text).map_err(bad)?;
        if next_of(&parsed, &TimeZone::UTC, Timestamp::UNIX_EPOCH).is_none() {
            return Err(fail(cron.referenced, format!("{text:?} never comes")));
        }
        let (zone, zone_name) = match timezone {
            None => (TimeZone::UTC, "UTC".to_owned()),
            Some(name) => {
                let zone = TimeZone::get(&name.value);
                let unknown = |_| fail(name.referenced, format!("there is no time zone {:?}", name.value));
                (zone.map_err(unknown)?, name.value.clone())
            }
        };
        Ok(Self::Cron { cron: Box::new(parsed), text, zone, zone_name })
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |length| duration::text(length).unwrap_or_default();
        match &self.when {
            When::Cron { text, zone_name, .. } => write!(f, "{text} {zone_name}")?,
            When::Every(every) => write!(f, "every {}", shown(*every))?,
        }
        if self.jitter.is_zero() { Ok(()) } else { write!(f, ", up to {} later", shown(self.jitter)) }
    }
}

/// `interval` and `jitter`, as they are written.
fn length(text: &Spanned<String>) -> Result<Duration, ConfigError> {
    let bad =
        || fail(text.referenced, format!("{:?} is no length of time, as 90s, 15m, 6h or 1d", text.value));
    duration::parse(&text.value).ok_or_else(bad)
}

/// The first time of an expression after `after`.
///
/// Where clocks are put forward, what is due in the hour that there is not is due behind it; where they are put back, what names its
/// hour is due once, and what comes every so many minutes goes on.
fn next_of(cron: &Cron, zone: &TimeZone, after: Timestamp) -> Option<Timestamp> {
    let next = cron.find_next_occurrence(&after.to_zoned(zone.clone()), false).ok()?.timestamp();
    // A time of whole minutes, which none before it was.
    Some(next).filter(|next| *next > after)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mirror::config::Config;

    fn schedule(text: &str) -> Schedule {
        let file = format!(
            "mirrors:\n  - sources: [a.example/x]\n    targets: [b.example/x]\nschedule: {{{text}}}\n"
        );
        Config::parse(&file).unwrap().schedule.unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[track_caller]
    fn due(text: &str, after: &str, expected: &[&str]) {
        let schedule = schedule(text);
        let (since, mut now) = (at("2026-01-01T00:00:00Z"), at(after));
        let mut times = Vec::new();
        for _ in expected {
            now = schedule.next(since, now).expect("it comes again");
            times.push(now);
        }
        assert_eq!(times, expected.iter().map(|time| at(time)).collect::<Vec<_>>(), "{text}");
    }

    #[test]
    fn times_of_an_expression_come_in_order() {
        due("cron: '0 3 * * *'", "2026-11-27T03:00:00Z", &["2026-11-28T03:00:00Z", "2026-11-29T03:00:00Z"]);
        due("cron: '0 3 * * *'", "2026-11-27T02:59:59.999Z", &["2026-11-27T03:00:00Z"]);
        due(
            "cron: '*/20 22 * * FRI'",
            "2026-11-27T22:10:00Z",
            &["2026-11-27T22:20:00Z", "2026-11-27T22:40:00Z", "2026-12-04T22:00:00Z"],
        );
        due("cron: '@monthly'", "2026-11-27T00:00:00Z", &["2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"]);
        // The last day of each month, and the day that three years of four have not.
        due("cron: '0 0 L * *'", "2028-02-01T00:00:00Z", &["2028-02-29T00:00:00Z", "2028-03-31T00:00:00Z"]);
        due("cron: '0 0 29 2 *'", "2026-01-01T00:00:00Z", &["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]);
        due("cron: '0 0 29 2 *'", "2096-03-01T00:00:00Z", &["2104-02-29T00:00:00Z"]);
    }

    #[test]
    fn where_clocks_change_nothing_is_left_out_and_what_names_its_hour_comes_once() {
        // In Berlin clocks went from 2 to 3 on the 29th of March of 2026, at 1 by UTC, and from 3 to 2 on the 25th of October.
        let berlin = |cron: &str| format!("cron: '{cron}', timezone: Europe/Berlin");
        due(&berlin("30 2 * * *"), "2026-03-28T12:00:00Z", &["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
        due(&berlin("30 2 * * *"), "2026-10-24T12:00:00Z", &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
        due(&berlin("0 3 * * *"), "2026-03-28T12:00:00Z", &["2026-03-29T01:00:00Z", "2026-03-30T01:00:00Z"]);
        due(
            &berlin("*/30 * * * *"),
            "2026-10-25T00:00:00Z",
            &["2026-10-25T00:30:00Z", "2026-10-25T01:00:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:00:00Z"],
        );
        due(
            &berlin("*/30 * * * *"),
            "2026-03-29T00:30:00Z",
            &["2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z"],
        );
    }

    #[test]
    fn an_interval_is_counted_from_the_beginning() {
        due("interval: 6h", "2026-01-01T00:00:00Z", &["2026-01-01T06:00:00Z", "2026-01-01T12:00:00Z"]);
        due("interval: 6h", "2026-03-29T07:00:00.001Z", &["2026-03-29T12:00:00Z"]);
        due("interval: 1s", "2025-12-31T00:00:00Z", &["2026-01-01T00:00:01Z"]);
    }

    #[test]
    fn of_what_was_missed_nothing_is_due_any_more() {
        let (since, missed) = (at("2026-01-01T00:00:00Z"), at("2026-01-02T03:00:00Z"));
        for (text, now, expected) in [
            ("cron: '0 3 * * *'", "2026-01-02T03:00:01Z", "2026-01-03T03:00:00Z"),
            ("cron: '0 3 * * *'", "2027-05-05T03:00:00Z", "2027-05-06T03:00:00Z"),
            ("cron: '* * * * *', jitter: 1d", "2031-05-05T03:00:30Z", "2031-05-04T03:00:00Z"),
            ("interval: 1h", "2026-09-09T09:09:09Z", "2026-09-09T10:00:00Z"),
        ] {
            let (schedule, now) = (schedule(text), at(now));
            let next = schedule.following("a", since, missed, now).unwrap();
            assert!(schedule.start("a", next) > now, "{text}");
            // With a jitter, one of those that may still begin.
            let expected = at(expected);
            assert!(next >= expected && (!schedule.jitter.is_zero() || next == expected), "{text}: {next}");
        }
    }

    proptest! {
        /// Whatever its name and whatever is due, it begins within the jitter, and always then; and names differ.
        #[test]
        fn the_jitter_is_within_its_bounds_and_always_the_same(seconds in 1_u64..=86_400, due in 0_i64..4_000_000_000, name in "[a-z]{1,9}") {
            let schedule = schedule(&format!("interval: 1d, jitter: {}", duration::text(Duration::from_secs(seconds.min(10_000))).unwrap()));
            let due = Timestamp::from_second(due).unwrap();
            let start = schedule.start(&name, due);
            prop_assert!(start >= due && start.duration_since(due) <= SignedDuration::try_from(schedule.jitter).unwrap());
            prop_assert_eq!(start, schedule.start(&name, due));
        }
    }

    #[test]
    fn schedules_of_one_time_do_not_begin_together() {
        let schedule = schedule("cron: '0 3 * * *', jitter: 1h");
        let due = at("2026-11-27T03:00:00Z");
        let starts: std::collections::BTreeSet<_> =
            (0..100).map(|name| schedule.start(&name.to_string(), due).as_second() / 360).collect();
        assert!(starts.len() >= 8, "each tenth of the hour has some: {starts:?}");
        let days: std::collections::BTreeSet<_> = (0..100)
            .map(|day| due.checked_add(SignedDuration::from_hours(24 * day)).unwrap())
            .map(|due| schedule.start("a", due).duration_since(due).as_secs() / 360)
            .collect();
        assert!(days.len() >= 8, "{days:?}");
    }
}
