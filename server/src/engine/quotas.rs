//! What is left of registries' quotas, as an engine keeps it: all coordinators draw from it, a few requests at a time, and one that
//! starts anew finds what was drawn before.
//!
//! A quota's time begins with the first request that is drawn, and is measured by coordinators' clocks. Who is killed loses what it
//! had drawn and not begun: so no more is begun than the quota allows, and at most a little less.
//!
//! Not here: who asks for requests and when they begin, which is `budget`'s.

use std::fmt::Debug;
use std::time::Duration;

use jiff::Timestamp;
use prost::Message;

use super::EngineError;

/// What is known of quotas, durable: what was drawn once is not drawn again by anybody.
#[async_trait::async_trait]
pub trait Quotas: Debug + Send + Sync {
    /// Draws so many requests, or as many as are left.
    async fn draw(&self, quota: &Quota, wanted: u64) -> Result<Drawn, EngineError>;

    /// Puts back what was drawn and not begun, once at most: what fails may have been put back, or not, and is not to be tried again.
    /// What was drawn in a time that has ended is not put back.
    async fn put_back(&self, quota: &Quota, drawn: Drawn) -> Result<(), EngineError>;
}

/// Requests that may begin in a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quota {
    /// What no other quota is called.
    pub name: String,
    /// So many.
    pub limit: u64,
    /// In a time of that length, which begins with the first of them.
    pub time: Duration,
}

/// Requests that were drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// How many. Fewer than were wanted: there are none left.
    pub count: u64,
    /// When the time began for which they are: two times of a quota never began at once. 1970: it is not known.
    pub began: Timestamp,
    /// When it ends, as whoever drew last has found it: clocks differ.
    pub ends: Timestamp,
}

impl Drawn {
    /// Whether both are of one time. When that began is not known where a coordinator of the release before has drawn last: then
    /// its end tells.
    pub fn is_of_the_time_of(&self, other: &Self) -> bool {
        self.began == other.began && (self.began != Timestamp::UNIX_EPOCH || self.ends == other.ends)
    }
}

/// What is kept of a quota.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct QuotaRecord {
    /// When its time ends, in milliseconds since 1970.
    #[prost(int64, tag = "1")]
    ends: i64,
    /// How many were drawn in it.
    #[prost(uint64, tag = "2")]
    drawn: u64,
    /// When that time began, in milliseconds since 1970. 0: it is not known.
    #[prost(int64, tag = "3")]
    began: i64,
}

impl QuotaRecord {
    /// Draws what there is, at that moment.
    pub(crate) fn draw(&mut self, quota: &Quota, wanted: u64, now: Timestamp) -> Drawn {
        let began = now.as_millisecond();
        let longest = began.saturating_add(i64::try_from(quota.time.as_millis()).unwrap_or(i64::MAX));
        if self.has_ended(now) {
            // Whoever began the last one may have a clock that is ahead.
            *self = Self { ends: longest, drawn: 0, began: began.max(self.began + 1) };
        }
        // What was configured may have been longer.
        self.ends = self.ends.min(longest);
        let count = wanted.min(quota.limit.saturating_sub(self.drawn));
        self.drawn += count;
        self.drawn(count)
    }

    /// So many of its time.
    fn drawn(&self, count: u64) -> Drawn {
        Drawn { count, began: self.began(), ends: self.ends() }
    }

    /// Puts back what was drawn, if its time goes on.
    pub(super) fn put_back(&mut self, drawn: Drawn) {
        if drawn.is_of_the_time_of(&self.drawn(0)) {
            self.drawn = self.drawn.saturating_sub(drawn.count);
        }
    }

    /// Whether nothing has to be remembered of it.
    pub(super) fn has_ended(&self, now: Timestamp) -> bool {
        self.ends <= now.as_millisecond()
    }

    pub(crate) fn began(&self) -> Timestamp {
        Timestamp::from_millisecond(self.began).unwrap_or(Timestamp::MAX)
    }

    fn ends(&self) -> Timestamp {
        Timestamp::from_millisecond(self.ends).unwrap_or(Timestamp::MAX)
    }
}

#[cfg(test)]
pub(super) mod contract {
    use super::*;
    use crate::engine::contract::{LIMITS, Place};

    /// All of the contract's tests of quotas for a place.
    macro_rules! quotas_contract {
        ($place:expr) => {
            #[tokio::test]
            async fn what_is_drawn_of_a_quota_is_drawn_once() {
                crate::engine::quotas::contract::what_is_drawn_of_a_quota_is_drawn_once(&$place).await;
            }
        };
    }
    pub(in crate::engine) use quotas_contract;

    pub(in crate::engine) async fn what_is_drawn_of_a_quota_is_drawn_once(place: &impl Place) {
        let engine = place.open(LIMITS).await;
        let quota = |name: &str| Quota { name: name.to_owned(), limit: 10, time: Duration::from_secs(3600) };
        let (one, other) = (quota("one \u{fc}\n"), quota("other"));
        let (first, second, third) =
            tokio::join!(engine.draw(&one, 3), engine.draw(&one, 3), engine.draw(&one, 3));
        let drawn = [first, second, third].map(Result::unwrap);
        assert_eq!(drawn.map(|drawn| drawn.count), [3; 3]);
        assert!(drawn.iter().all(|each| each.began == drawn[0].began), "{drawn:?}");
        assert_eq!(engine.draw(&other, 11).await.unwrap().count, 10, "each has its own");

        let short = Quota { time: Duration::from_millis(50), ..quota("short") };
        assert_eq!(engine.draw(&short, 10).await.unwrap().count, 10);
        tokio::time::sleep(short.time).await;

        let engine = place.replace(engine).await;
        let left = engine.draw(&one, 3).await.unwrap();
        assert_eq!((left.count, left.began), (1, drawn[0].began));
        assert_eq!(engine.draw(&one, 3).await.unwrap().count, 0);
        engine.put_back(&one, Drawn { count: 2, ..drawn[0] }).await.unwrap();
        let earlier = Drawn { count: 5, began: Timestamp::UNIX_EPOCH, ..drawn[0] };
        engine.put_back(&one, earlier).await.unwrap();
        assert_eq!(engine.draw(&one, 9).await.unwrap().count, 2);
        assert_eq!(engine.draw(&short, 10).await.unwrap().count, 10, "its time has ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_begins_with_the_first_and_ends() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let quota = |limit, seconds| Quota { name: String::new(), limit, time: Duration::from_secs(seconds) };
        let drawn = |count, began, ends| Drawn { count, began: at(began), ends: at(ends) };
        let mut record = QuotaRecord::default();
        assert_eq!(record.draw(&quota(5, 60), 4, at(1000)), drawn(4, 1000, 1060));
        assert_eq!(record.draw(&quota(5, 60), 4, at(1059)), drawn(1, 1000, 1060));
        assert_eq!(record.draw(&quota(5, 60), 4, at(1059)).count, 0);
        // Another is configured: what was drawn counts, and no time is longer than it says.
        assert_eq!(record.draw(&quota(6, 10), 4, at(1020)), drawn(1, 1000, 1030));
        assert_eq!(record.draw(&quota(3, 60), 4, at(1021)).count, 0);
        let next = record.draw(&quota(5, 60), 4, at(1030));
        assert_eq!(next, drawn(4, 1030, 1090));
        record.put_back(drawn(4, 1000, 1060));
        record.put_back(Drawn { count: 2, ..next });
        assert_eq!(record.draw(&quota(5, 60), 4, at(1031)).count, 3);
    }

    #[test]
    fn what_was_drawn_is_not_put_back_to_another_time_when_the_release_before_has_drawn_too() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let quota = Quota { name: String::new(), limit: 10, time: Duration::from_secs(60) };
        // It keeps no beginning.
        let draw = |record: &mut QuotaRecord, now| {
            record.draw(&quota, 5, at(now));
            record.began = 0;
            record.draw(&quota, 1, at(now))
        };
        let mut record = QuotaRecord::default();
        let first = draw(&mut record, 1000);
        draw(&mut record, 1060);
        record.put_back(first);
        assert_eq!(record.draw(&quota, 10, at(1061)).count, 4);
    }

    #[test]
    fn coordinators_whose_clocks_differ_draw_from_the_same_time() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let quota = Quota { name: String::new(), limit: 10, time: Duration::from_secs(60) };
        let mut record = QuotaRecord::default();
        let ahead = record.draw(&quota, 4, at(1003));
        // By the clock of the other one it ends sooner.
        let behind = record.draw(&quota, 4, at(1000));
        assert_eq!((behind.began, behind.ends), (ahead.began, at(1060)));
        record.put_back(Drawn { count: 3, ..ahead });
        assert_eq!(record.draw(&quota, 9, at(1001)).count, 5);
        // And what comes after it is another one, although that began by a clock that is behind.
        let short = Quota { time: Duration::from_secs(1), ..quota };
        let last = record.draw(&short, 9, at(1002));
        assert_eq!((last.began, last.ends), (ahead.began, at(1003)));
        let next = record.draw(&short, 9, at(1003));
        assert!(next.began > ahead.began && next.count == 9, "{next:?}");
    }
}
