//! Quotas in the file.
//!
//! | table | key | value |
//! |---|---|---|
//! | `quotas` | name | the record |

use jiff::Timestamp;
use prost::Message as _;
use redb::{Database, ReadableTable, TableDefinition};

use super::file::{During, StoreError};
use super::{Store, decode};
use crate::engine::EngineError;
use crate::engine::quotas::{Drawn, Quota, QuotaRecord, Quotas};

const QUOTAS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("quotas");

/// Makes the table, where it is not there, and forgets what has ended.
pub(super) fn open(write: &redb::WriteTransaction) -> Result<(), StoreError> {
    let now = Timestamp::now();
    let mut quotas = write.open_table(QUOTAS).during("open")?;
    quotas.retain(|_, record| !decode::<QuotaRecord>(record).has_ended(now)).during("open")
}

/// Changes a quota's record, durably if it is another one then.
fn change<T>(
    database: &Database,
    name: &str,
    change: impl FnOnce(&mut QuotaRecord) -> T,
) -> Result<T, StoreError> {
    let write = database.begin_write().during("write")?;
    let (changed, is_new) = {
        let mut quotas = write.open_table(QUOTAS).during("write")?;
        let found: Option<QuotaRecord> =
            quotas.get(name).during("read")?.map(|record| decode(record.value()));
        let mut record = found.clone().unwrap_or_default();
        let changed = change(&mut record);
        let is_new = found.unwrap_or_default() != record;
        if is_new {
            quotas.insert(name, &*record.encode_to_vec()).during("write")?;
        }
        (changed, is_new)
    };
    if is_new {
        write.commit().during("write")?;
    }
    Ok(changed)
}

#[async_trait::async_trait]
impl Quotas for Store {
    async fn draw(&self, quota: &Quota, wanted: u64) -> Result<Drawn, EngineError> {
        let quota = quota.clone();
        self.blocking(move |_, database| {
            change(database, &quota.name, |record| record.draw(&quota, wanted, Timestamp::now()))
        })
        .await
    }

    async fn put_back(&self, quota: &Quota, drawn: Drawn) -> Result<(), EngineError> {
        let name = quota.name.clone();
        self.blocking(move |_, database| change(database, &name, |record| record.put_back(drawn))).await
    }
}
