//! The workers and who has them: layers wait here for a slot, and give it back by dropping their [`Lease`].
//!
//! What goes where is [`crate::schedule`]'s decision; here are the lock, the waiting and the giving back. The workers of this
//! fleet live in this process: a lease is the right to run one layer in it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};

use crate::schedule::{Assignment, Capabilities, Schedule, Tenant, WaitingLayer};

/// The workers. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Fleet(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    running: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct State {
    schedule: Schedule,
    /// Their names.
    workers: BTreeMap<u64, Arc<str>>,
    /// The queues whose layers can be done by a later coordinator too.
    durable: HashSet<u64>,
    waiters: HashMap<u64, oneshot::Sender<Lease>>,
    running: usize,
    draining: bool,
}

/// A worker, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerStatus {
    /// Its name.
    pub name: String,
    /// Layers that it works on at once.
    pub slots: usize,
    /// How many of these are free.
    pub free: usize,
}

/// Slots of an embedded worker.
const SLOTS: usize = 1;

impl Fleet {
    /// So many workers in this process, each with one slot, all of which offer the same.
    pub fn embedded(workers: usize, offers: &Capabilities) -> Self {
        let mut state = State::default();
        for number in 1..=workers {
            let id = state.schedule.add_worker(offers, SLOTS);
            state.workers.insert(id, format!("embedded-{number}").into());
        }
        Self(Arc::new(Shared { state: Mutex::new(state), running: watch::Sender::new(0) }))
    }

    /// A queue for the layers of one job, or of one call, of a tenant's. `durable` says that a later coordinator can do what this
    /// one does not: while the fleet drains, such layers wait.
    pub fn queue(&self, tenant: &Tenant, needs: &Capabilities, durable: bool) -> FleetQueue {
        let mut state = self.lock();
        let id = state.schedule.add_queue(tenant, needs);
        if durable {
            state.durable.insert(id);
            if state.draining {
                state.schedule.hold(id);
            }
        }
        FleetQueue { fleet: self.clone(), id }
    }

    /// The workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let state = self.lock();
        let worker = |(&id, name): (&u64, &Arc<str>)| WorkerStatus {
            name: name.to_string(),
            slots: SLOTS,
            free: state.schedule.free_slots(id),
        };
        state.workers.iter().map(worker).collect()
    }

    /// Begins no layer of a durable job any more.
    pub fn drain(&self) {
        let mut state = self.lock();
        let State { schedule, durable, draining, .. } = &mut *state;
        *draining = true;
        durable.iter().for_each(|queue| schedule.hold(*queue));
    }

    /// How many layers are running, whenever that changes.
    pub fn running(&self) -> watch::Receiver<usize> {
        self.0.running.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out what can be handed out. Leases whose waiter has gone give their slot back, so it goes round until none does.
    fn dispatch(&self) {
        loop {
            let returned = self.lock().assign(self);
            if returned.is_empty() {
                return;
            }
            // Each of these dispatches too when it is dropped, now that the lock is free.
            drop(returned);
        }
    }
}

impl State {
    fn assign(&mut self, fleet: &Fleet) -> Vec<Lease> {
        let mut returned = Vec::new();
        while let Some(assignment) = self.schedule.begin_next() {
            self.running += 1;
            let name = Arc::clone(&self.workers[&assignment.worker]);
            let lease = Lease { fleet: fleet.clone(), assignment, name };
            let waiter =
                self.waiters.remove(&assignment.ticket).expect("who waits has a place to hear of it");
            // The lease must not be dropped here, under the lock that it needs.
            returned.extend(waiter.send(lease).err());
        }
        fleet.0.running.send_replace(self.running);
        returned
    }
}

/// The layers of one job. Dropped, it leaves the fleet.
#[derive(Debug)]
pub struct FleetQueue {
    fleet: Fleet,
    id: u64,
}

impl FleetQueue {
    /// Waits for a worker for a layer of that size.
    ///
    /// # Cancel safety
    /// Dropped before it returns, the layer has left the queue, or its slot is given back.
    pub async fn lease(&self, size: Option<u64>) -> Lease {
        let (sender, receiver) = oneshot::channel();
        let layer = {
            let mut state = self.fleet.lock();
            let layer = state.schedule.push(self.id, size.unwrap_or(0));
            state.waiters.insert(layer.ticket, sender);
            layer
        };
        let _place = Place { queue: self, layer };
        self.fleet.dispatch();
        receiver.await.expect("the fleet keeps a waiter until it is served, or until its place is given up")
    }
}

impl Drop for FleetQueue {
    fn drop(&mut self) {
        let mut state = self.fleet.lock();
        state.schedule.remove_queue(self.id);
        state.durable.remove(&self.id);
    }
}

/// A layer's place in its queue.
struct Place<'a> {
    queue: &'a FleetQueue,
    layer: WaitingLayer,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.fleet.lock();
        let waiter = state.waiters.remove(&self.layer.ticket);
        state.schedule.withdraw(self.queue.id, self.layer);
        drop(state);
        drop(waiter);
    }
}

/// A worker's slot. Dropped, it is free again.
#[derive(Debug)]
pub struct Lease {
    fleet: Fleet,
    assignment: Assignment,
    name: Arc<str>,
}

impl Lease {
    /// The worker's name.
    pub fn worker(&self) -> &str {
        &self.name
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.fleet.lock();
        state.schedule.end(self.assignment);
        state.running -= 1;
        drop(state);
        self.fleet.dispatch();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    fn fleet(workers: usize) -> Fleet {
        Fleet::embedded(workers, &Capabilities::default())
    }

    fn queue(fleet: &Fleet, is_durable: bool) -> FleetQueue {
        fleet.queue(&"anybody".into(), &Capabilities::default(), is_durable)
    }

    #[tokio::test]
    async fn a_slot_is_given_back_by_dropping_its_lease() {
        let fleet = fleet(1);
        let queue = queue(&fleet, false);
        let first = queue.lease(Some(1)).await;
        assert!(timeout(SOON, queue.lease(Some(1))).await.is_err(), "there is one slot");
        drop(first);
        let _second = queue.lease(Some(1)).await;
        assert_eq!(fleet.workers()[0].free, 0);
    }

    #[tokio::test]
    async fn who_gives_up_waiting_keeps_no_slot() {
        let fleet = fleet(1);
        let queue = queue(&fleet, false);
        let first = queue.lease(None).await;
        for _ in 0..3 {
            assert!(timeout(SOON, queue.lease(None)).await.is_err());
        }
        drop(first);
        assert_eq!(fleet.workers()[0].free, 1);
        assert_eq!(*fleet.running().borrow(), 0);
    }

    #[tokio::test]
    async fn what_nobody_offers_waits() {
        let fleet = fleet(1);
        let needs = Arc::new(["filter:unknown".to_owned()].into());
        let queue = fleet.queue(&"anybody".into(), &needs, false);
        assert!(timeout(SOON, queue.lease(None)).await.is_err());
    }

    #[tokio::test]
    async fn a_draining_fleet_begins_only_what_cannot_be_done_later() {
        let fleet = fleet(2);
        let (job, call) = (queue(&fleet, true), queue(&fleet, false));
        fleet.drain();
        assert!(timeout(SOON, job.lease(None)).await.is_err());
        let _lease = call.lease(None).await;
    }
}
