//! Quotas in JetStream: each one value, drawn from by compare-and-set.
//!
//! Where the answer to a write was lost it is drawn once more: what was drawn then is nobody's until the quota's time ends.

use jiff::Timestamp;
use prost::Message as _;

use super::connect::bucket;
use super::{CONFLICTS, JetStream, JetStreamError, hash, patiently, unreachable};
use crate::engine::EngineError;
use crate::engine::quotas::{Drawn, Quota, QuotaRecord, Quotas};

impl JetStream {
    /// Changes a quota's record, if it is another one then.
    async fn change_quota<T>(
        &self,
        quota: &Quota,
        change: impl Fn(&mut QuotaRecord) -> T,
    ) -> Result<T, JetStreamError> {
        let subject = subject(quota);
        for _ in 0..CONFLICTS {
            let found = self.value(&subject).await?;
            let (revision, before) = match found {
                None => (0, QuotaRecord::default()),
                Some((revision, value)) => {
                    let record = QuotaRecord::decode(value);
                    let foreign = |_| JetStreamError::Foreign(format!("quota {}", quota.name.escape_debug()));
                    (revision, record.map_err(foreign)?)
                }
            };
            let mut record = before.clone();
            let changed = change(&mut record);
            let value = bytes::Bytes::from(record.encode_to_vec());
            if record == before
                || patiently("draw from", || self.put_if(&subject, value.clone(), revision)).await?
            {
                return Ok(changed);
            }
        }
        Err(unreachable("draw from", &"too many others write too"))
    }
}

#[async_trait::async_trait]
impl Quotas for JetStream {
    async fn draw(&self, quota: &Quota, wanted: u64) -> Result<Drawn, EngineError> {
        Ok(self.change_quota(quota, |record| record.draw(quota, wanted, Timestamp::now())).await?)
    }

    async fn put_back(&self, quota: &Quota, drawn: Drawn) -> Result<(), EngineError> {
        Ok(self.change_quota(quota, |record| record.put_back(drawn)).await?)
    }
}

/// Where a quota is, whose name may have any characters.
fn subject(quota: &Quota) -> String {
    bucket("quotas") + &hash(&[&quota.name])
}
