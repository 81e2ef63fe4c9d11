//! Schedules in the file.
//!
//! | table | key | value |
//! |---|---|---|
//! | `schedules` | tenant, id | revision, the record |
//! | `appointments` | tenant, id | when it has to be looked at, in milliseconds since 1970; `i64::MAX`: at no time |

use jiff::Timestamp;
use prost::Message as _;
use redb::{ReadableDatabase, ReadableTable, TableDefinition};

use super::file::{During, StoreError};
use super::{Store, decode};
use crate::engine::EngineError;
use crate::engine::schedules::{Appointment, ScheduleName, ScheduleRecord, Schedules};
use crate::schedule::Tenant;

const SCHEDULES: TableDefinition<'_, (&str, &str), (u64, &[u8])> = TableDefinition::new("schedules");
const APPOINTMENTS: TableDefinition<'_, (&str, &str), i64> = TableDefinition::new("appointments");

/// Makes the tables, where they are not there.
pub(super) fn open(write: &redb::WriteTransaction) -> Result<(), StoreError> {
    write.open_table(SCHEDULES).during("open")?;
    write.open_table(APPOINTMENTS).during("open")?;
    Ok(())
}

#[async_trait::async_trait]
impl Schedules for Store {
    async fn appointments(&self) -> Result<Vec<Appointment>, EngineError> {
        self.blocking(|_, database| {
            let read = database.begin_read().during("read")?;
            let appointments = read.open_table(APPOINTMENTS).during("read")?;
            let all = appointments.iter().during("read")?.map(|entry| {
                let (name, at) = entry.during("read")?;
                let (tenant, id) = name.value();
                let name = ScheduleName { tenant: tenant.into(), id: id.to_owned() };
                let at = Some(at.value()).filter(|&at| at != i64::MAX);
                Ok(Appointment { name, at: at.and_then(|at| Timestamp::from_millisecond(at).ok()) })
            });
            all.collect()
        })
        .await
    }

    async fn schedule(&self, name: &ScheduleName) -> Result<Option<(ScheduleRecord, u64)>, EngineError> {
        let name = name.clone();
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let schedules = read.open_table(SCHEDULES).during("read")?;
            let found = schedules.get((&*name.tenant, &*name.id)).during("read")?;
            Ok(found.map(|found| {
                let (revision, record) = found.value();
                (decode(record), revision)
            }))
        })
        .await
    }

    async fn put_schedule(
        &self,
        name: &ScheduleName,
        record: ScheduleRecord,
        revision: u64,
    ) -> Result<bool, EngineError> {
        let name = name.clone();
        self.blocking(move |_, database| {
            let write = database.begin_write().during("write")?;
            let key = (&*name.tenant, &*name.id);
            {
                let mut schedules = write.open_table(SCHEDULES).during("write")?;
                let found = schedules.get(key).during("read")?.map_or(0, |found| found.value().0);
                if found != revision {
                    return Ok(false);
                }
                // Of a schedule that is made anew none is one that the earlier one had.
                let now = u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0);
                schedules.insert(key, (now.max(found + 1), &*record.encode_to_vec())).during("write")?;
                let at = record.appointment().map_or(i64::MAX, Timestamp::as_millisecond);
                write.open_table(APPOINTMENTS).during("write")?.insert(key, at).during("write")?;
            }
            write.commit().during("write")?;
            Ok(true)
        })
        .await
    }

    async fn remove_schedule(&self, name: &ScheduleName) -> Result<Option<ScheduleRecord>, EngineError> {
        let name = name.clone();
        self.blocking(move |_, database| {
            let write = database.begin_write().during("write")?;
            let key = (&*name.tenant, &*name.id);
            let removed = {
                let mut schedules = write.open_table(SCHEDULES).during("write")?;
                let removed = schedules.remove(key).during("write")?;
                removed.map(|removed| decode(removed.value().1))
            };
            if removed.is_some() {
                write.open_table(APPOINTMENTS).during("write")?.remove(key).during("write")?;
                write.commit().during("write")?;
            }
            Ok(removed)
        })
        .await
    }

    async fn list_schedules(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&ScheduleName>,
        count: usize,
    ) -> Result<(Vec<ScheduleRecord>, bool), EngineError> {
        let (tenant, after) = (tenant.cloned(), after.cloned());
        self.blocking(move |_, database| {
            let read = database.begin_read().during("read")?;
            let schedules = read.open_table(SCHEDULES).during("read")?;
            let first = tenant.as_deref().unwrap_or_default();
            let mut page = Vec::new();
            for entry in schedules.range((first, "")..).during("read")? {
                let (name, found) = entry.during("read")?;
                let (of, id) = name.value();
                if tenant.as_deref().is_some_and(|tenant| tenant != of) {
                    break;
                }
                if after.as_ref().is_some_and(|after| (of, id) <= (&*after.tenant, &*after.id)) {
                    continue;
                }
                if page.len() == count {
                    return Ok((page, true));
                }
                page.push(decode(found.value().1));
            }
            Ok((page, false))
        })
        .await
    }
}
