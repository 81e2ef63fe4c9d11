//! What each client has of the coordinator at once, so that no one has all of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use occy_pipeline::spool::SpoolDir;
use tokio::sync::Semaphore;

use crate::schedule::Tenant;

/// What one client may have at once.
#[derive(Clone, Copy, Debug)]
pub struct ClientLimits {
    /// Calls.
    pub calls: usize,
    /// Bytes of temporary files.
    pub spool: u64,
}

/// The clients that have something now.
#[derive(Debug)]
pub struct Clients {
    limits: ClientLimits,
    spools: SpoolDir,
    present: Mutex<HashMap<Tenant, Weak<Client>>>,
}

/// One of them, while it has something.
#[derive(Debug)]
pub struct Client {
    /// Who it is.
    pub tenant: Tenant,
    /// Calls that it may yet begin.
    pub calls: Arc<Semaphore>,
    /// Where its temporary files go.
    pub spools: SpoolDir,
}

impl Clients {
    /// Each may have this; all of their temporary files are in `spools`.
    pub fn new(spools: SpoolDir, limits: ClientLimits) -> Self {
        Self { limits, spools, present: Mutex::default() }
    }

    /// What one may have.
    pub fn limits(&self) -> ClientLimits {
        self.limits
    }

    /// A tenant's client: the same one for everybody who has it now.
    pub fn get(&self, tenant: &Tenant) -> Arc<Client> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = present.get(tenant).and_then(Weak::upgrade) {
            return client;
        }
        let client = Arc::new(Client {
            tenant: Arc::clone(tenant),
            calls: Arc::new(Semaphore::new(self.limits.calls)),
            spools: self.spools.limited(self.limits.spool),
        });
        present.retain(|_, client| client.strong_count() > 0);
        present.insert(Arc::clone(tenant), Arc::downgrade(&client));
        client
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_client_is_one_while_anybody_has_it_and_then_forgotten() {
        let spools = SpoolDir::new(std::env::temp_dir(), 10);
        let clients = Clients::new(spools, ClientLimits { calls: 1, spool: 6 });
        let (one, other): (Tenant, Tenant) = ("one".into(), "other".into());
        let mut spool = clients.get(&one).spools.create().unwrap();
        spool.write_all(b"12345").unwrap();
        let held = clients.get(&one);
        let _call = Arc::clone(&held.calls).try_acquire_owned().unwrap();
        assert!(clients.get(&one).calls.try_acquire().is_err());
        assert!(clients.get(&other).calls.try_acquire().is_ok());
        drop(held);
        clients.get(&other);
        assert_eq!(clients.present.lock().unwrap().len(), 1);
    }
}
