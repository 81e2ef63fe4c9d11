//! Schedules in JetStream: each one value, in whose headers is what every coordinator has to know of all.
//!
//! Who removes a schedule purges what was read. A change that another one makes meanwhile finds that it is not what it had read, or is found by
//! looking again.

use async_nats::HeaderMap;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use prost::Message as _;
use tokio::time::{Instant, sleep};

use super::connect::bucket;
use super::values::{Value, WriteError};
use super::{
    CONFLICTS, JetStream, JetStreamError, PATIENCE, PAUSE, READ_AT_ONCE, hash, patiently, unreachable,
};
use crate::engine::EngineError;
use crate::engine::schedules::{Appointment, ScheduleName, ScheduleRecord, Schedules};
use crate::schedule::Tenant;

const TENANT: &str = "Occystrap-Tenant";
const ID: &str = "Occystrap-Schedule";
const AT: &str = "Occystrap-At";

impl JetStream {
    async fn read_schedule(
        &self,
        name: &ScheduleName,
    ) -> Result<Option<(ScheduleRecord, u64)>, JetStreamError> {
        let Some((revision, value)) = self.value(&subject(name)).await? else { return Ok(None) };
        let record = ScheduleRecord::decode(value);
        let record = record.ok().filter(|record| record.schedule.is_some());
        let record = record.ok_or_else(|| JetStreamError::Foreign(format!("schedule {}", name.id)))?;
        Ok(Some((record, revision)))
    }

    async fn write_schedule(
        &self,
        name: &ScheduleName,
        mut record: ScheduleRecord,
        revision: u64,
    ) -> Result<bool, JetStreamError> {
        record.change = uuid::Uuid::new_v4().to_string();
        let start = Instant::now();
        loop {
            let value = Value {
                headers: Some(headers(name, record.appointment())),
                ..Value::after(revision, record.encode_to_vec().into())
            };
            match self.0.values.write(&subject(name), value).await {
                Ok(_) => return Ok(true),
                Err(WriteError::Conflict) => {
                    // Ours it may be all the same: the answer to an earlier attempt was lost.
                    let found = self.read_schedule(name).await?;
                    return Ok(found.is_some_and(|(found, _)| found.change == record.change));
                }
                Err(WriteError::TooLarge) => return Err(JetStreamError::TooLarge { what: "the schedule" }),
                Err(_) if start.elapsed() < PATIENCE => sleep(PAUSE).await,
                Err(error) => return Err(unreachable("write a schedule", &error)),
            }
        }
    }

    async fn purge_schedule(&self, name: &ScheduleName) -> Result<Option<ScheduleRecord>, JetStreamError> {
        let subject = subject(name);
        let mut removed = None;
        for _ in 0..CONFLICTS {
            let Some((record, revision)) = self.read_schedule(name).await? else { return Ok(removed) };
            removed = Some(record);
            patiently("remove a schedule", || self.0.values.purge(&subject, Some(revision))).await?;
        }
        Err(unreachable("remove a schedule", &"too many others write too"))
    }

    async fn all_appointments(&self) -> Result<Vec<Appointment>, JetStreamError> {
        let all = bucket("schedules") + ">";
        let heads = patiently("list schedules", || self.0.values.heads(&all)).await?;
        let mut all: Vec<_> = heads.iter().filter_map(appointment).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(all)
    }
}

#[async_trait::async_trait]
impl Schedules for JetStream {
    async fn appointments(&self) -> Result<Vec<Appointment>, EngineError> {
        Ok(self.all_appointments().await?)
    }

    async fn schedule(&self, name: &ScheduleName) -> Result<Option<(ScheduleRecord, u64)>, EngineError> {
        Ok(self.read_schedule(name).await?)
    }

    async fn put_schedule(
        &self,
        name: &ScheduleName,
        record: ScheduleRecord,
        revision: u64,
    ) -> Result<bool, EngineError> {
        Ok(self.write_schedule(name, record, revision).await?)
    }

    async fn remove_schedule(&self, name: &ScheduleName) -> Result<Option<ScheduleRecord>, EngineError> {
        Ok(self.purge_schedule(name).await?)
    }

    async fn list_schedules(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&ScheduleName>,
        count: usize,
    ) -> Result<(Vec<ScheduleRecord>, bool), EngineError> {
        let all = self.all_appointments().await?.into_iter().map(|appointment| appointment.name);
        let wanted = all.filter(|name| {
            tenant.is_none_or(|tenant| *tenant == name.tenant) && after.is_none_or(|after| name > after)
        });
        let mut names: Vec<_> = wanted.take(count + 1).collect();
        let more = names.len() > count;
        names.truncate(count);
        let records = stream::iter(names).map(|name| async move {
            // One may just have been removed.
            Ok::<_, JetStreamError>(self.read_schedule(&name).await?.map(|(record, _)| record))
        });
        let records = records.buffered(READ_AT_ONCE).try_filter_map(async |record| Ok(record)).try_collect();
        Ok((records.await?, more))
    }
}

/// Where a schedule is, whose tenant's name may have any characters.
fn subject(name: &ScheduleName) -> String {
    bucket("schedules") + &hash(&[&name.tenant, &name.id])
}

fn headers(name: &ScheduleName, at: Option<Timestamp>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(TENANT, BASE64_URL_SAFE_NO_PAD.encode(&*name.tenant));
    headers.insert(ID, BASE64_URL_SAFE_NO_PAD.encode(&name.id));
    headers.insert(AT, at.map(|at| at.as_millisecond().to_string()).unwrap_or_default());
    headers
}

/// None for what is not the record of a schedule.
fn appointment(headers: &HeaderMap) -> Option<Appointment> {
    let get = |name| headers.get(name).map(async_nats::HeaderValue::as_str);
    let text = |name| String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(get(name)?).ok()?).ok();
    let name = ScheduleName { tenant: text(TENANT)?.into(), id: text(ID)? };
    let at = Some(get(AT)?).filter(|at| !at.is_empty());
    let at = at.map(|at| at.parse().ok().and_then(|at| Timestamp::from_millisecond(at).ok()));
    Some(Appointment { name, at: at.map_or(Some(None), |at| at.map(Some))? })
}
