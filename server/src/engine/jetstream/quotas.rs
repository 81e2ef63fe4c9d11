//! Quotas in JetStream: each one value, drawn from by compare-and-set.
//!
//! Where the answer to a write was lost it is drawn once more, and what was drawn then is nobody's until the quota's time ends; but
//! nothing is put back twice.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use prost::{DecodeError, Message as _};

use super::connect::bucket;
use super::values::Values;
use super::{JetStream, JetStreamError, Lost, READ_AT_ONCE, hash};
use crate::engine::EngineError;
use crate::engine::quotas::{Drawn, Quota, QuotaRecord, Quotas};

/// So long after its time a quota is kept: whoever's clock is ahead must not end one that goes on.
const FORGOTTEN: Duration = Duration::from_secs(24 * 60 * 60);

impl JetStream {
    async fn change_quota<T>(
        &self,
        what: &'static str,
        quota: &Quota,
        lost: Lost,
        change: impl Fn(&mut QuotaRecord) -> T,
    ) -> Result<T, JetStreamError> {
        let foreign = |_| JetStreamError::Foreign(format!("quota {}", quota.name.escape_debug()));
        let read = |value: Option<Bytes>| read(value.unwrap_or_default()).map_err(foreign);
        self.change_value(what, &(bucket("quotas") + &hash(&[&quota.name])), lost, read, change).await
    }
}

#[async_trait::async_trait]
impl Quotas for JetStream {
    async fn draw(&self, quota: &Quota, wanted: u64) -> Result<Drawn, EngineError> {
        let draw = |record: &mut QuotaRecord| record.draw(quota, wanted, Timestamp::now());
        Ok(self.change_quota("draw from a quota", quota, Lost::Again, draw).await?)
    }

    async fn put_back(&self, quota: &Quota, drawn: Drawn) -> Result<(), EngineError> {
        let put_back = |record: &mut QuotaRecord| record.put_back(drawn);
        Ok(self.change_quota("put back to a quota", quota, Lost::Fail, put_back).await?)
    }
}

/// Removes what there is of quotas whose time ended long before that moment. What cannot be removed stays until the next coordinator
/// starts.
pub(super) async fn forget_ended(values: &dyn Values, now: Timestamp) {
    let forget = async |subject: String| {
        let Some((revision, value)) = values.last(&subject).await? else { return Ok(()) };
        if read(value).is_ok_and(|record| record.has_ended(now - FORGOTTEN)) {
            values.purge(&subject, Some(revision)).await?;
        }
        Ok(())
    };
    let forget_all = async {
        let subjects = values.subjects(&(bucket("quotas") + ">")).await?;
        stream::iter(subjects).map(Ok).try_for_each_concurrent(READ_AT_ONCE, forget).await
    };
    let forgotten: Result<(), String> = forget_all.await;
    if let Err(cause) = forgotten {
        tracing::warn!(cause, "quotas that have ended could not be removed from JetStream");
    }
}

fn read(value: Bytes) -> Result<QuotaRecord, DecodeError> {
    QuotaRecord::decode(value)
}

#[cfg(test)]
mod tests {
    use super::super::simulated::Nats;
    use super::*;
    use crate::engine::contract::LIMITS;
    use crate::simulation::world::{Link, World};

    fn quota(name: &str, time: Duration) -> Quota {
        Quota { name: name.to_owned(), limit: 10, time }
    }

    #[tokio::test(start_paused = true)]
    async fn whichever_answers_are_lost_no_more_is_drawn_than_there_is() {
        let world = World::new(1, false);
        let nats = Nats::new(&world, Duration::from_secs(30));
        let engine = nats.open(&Link::new(&world, 0), LIMITS).await.unwrap();
        let mut lost = 0;
        for number in 0..200 {
            let quota = quota(&number.to_string(), Duration::from_secs(3600));
            let mut held = 0;
            for _ in 0..20 {
                let drawn = engine.draw(&quota, 10).await.unwrap();
                held += drawn.count;
                assert!(held <= 10, "{held} of {}", quota.name);
                let count = held.min(1);
                held -= count;
                lost += u64::from(engine.put_back(&quota, Drawn { count, ..drawn }).await.is_err());
            }
        }
        assert!(lost > 9, "{lost} answers were lost");
    }

    #[tokio::test(start_paused = true)]
    async fn what_ended_long_ago_is_forgotten() {
        let world = World::new(2, false);
        let nats = Nats::new(&world, Duration::from_secs(30));
        let engine = nats.open(&Link::new(&world, 0), LIMITS).await.unwrap();
        for (name, time) in [("short", 1), ("long", 3_600_000)] {
            engine.draw(&quota(name, Duration::from_millis(time)), 1).await.unwrap();
        }
        let left = async |now| {
            forget_ended(&*engine.0.values, now).await;
            engine.0.values.subjects(&(bucket("quotas") + ">")).await.unwrap()
        };
        let now = Timestamp::now();
        assert_eq!(left(now).await.len(), 2, "another clock may say that they go on");
        let later = left(now + FORGOTTEN + Duration::from_secs(60)).await;
        assert_eq!(later.into_iter().collect::<Vec<_>>(), [bucket("quotas") + &hash(&["long"])]);
    }
}
