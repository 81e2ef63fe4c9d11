//! The workers and who has them: layers wait here for a slot, and give it back by dropping their [`Lease`].
//!
//! What goes where is [`crate::schedule`]'s decision; here are the lock, the waiting and the giving back. The workers of this
//! fleet live in this process: a lease is the right to run one layer in it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};

use crate::schedule::{self, Capabilities, Queue, WaitingLayer};

/// The workers. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Fleet(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    running: watch::Sender<usize>,
}

#[derive(Debug)]
struct State {
    workers: Vec<schedule::Worker>,
    names: Vec<String>,
    queues: BTreeMap<u64, Queue>,
    /// Whether a queue's layers can be done by a later coordinator too.
    durable: HashMap<u64, bool>,
    waiters: HashMap<u64, oneshot::Sender<Lease>>,
    running: usize,
    draining: bool,
    next: u64,
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
        let state = State {
            workers: vec![schedule::Worker { offers: Arc::clone(offers), free: SLOTS }; workers],
            names: (1..=workers).map(|number| format!("embedded-{number}")).collect(),
            queues: BTreeMap::new(),
            durable: HashMap::new(),
            waiters: HashMap::new(),
            running: 0,
            draining: false,
            next: 0,
        };
        Self(Arc::new(Shared { state: Mutex::new(state), running: watch::Sender::new(0) }))
    }

    /// A queue for the layers of one job, or of one call. `durable` says that a later coordinator can do what this one does not:
    /// while the fleet drains, such layers wait.
    pub fn queue(&self, needs: Capabilities, durable: bool) -> FleetQueue {
        let mut state = self.lock();
        let id = state.ticket();
        let queue = Queue { id, turn: id, needs, running: 0, waiting: std::collections::BTreeSet::new() };
        state.queues.insert(id, queue);
        state.durable.insert(id, durable);
        FleetQueue { fleet: self.clone(), id }
    }

    /// The workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let state = self.lock();
        let workers = state.names.iter().zip(&state.workers);
        workers
            .map(|(name, worker)| WorkerStatus { name: name.clone(), slots: SLOTS, free: worker.free })
            .collect()
    }

    /// Begins no layer of a durable job any more.
    pub fn drain(&self) {
        self.lock().draining = true;
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
    fn ticket(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn assign(&mut self, fleet: &Fleet) -> Vec<Lease> {
        let Self { queues, durable, draining, .. } = self;
        let open = queues.values().filter(|queue| !(*draining && durable[&queue.id]));
        let mut returned = Vec::new();
        for assignment in schedule::assign(open, &self.workers) {
            let queue = self.queues.get_mut(&assignment.queue).expect("it was just chosen");
            queue.waiting.retain(|layer| layer.ticket != assignment.ticket);
            queue.running += 1;
            self.next += 1;
            queue.turn = self.next;
            self.workers[assignment.worker].free -= 1;
            self.running += 1;
            let lease = Lease {
                fleet: fleet.clone(),
                queue: assignment.queue,
                worker: assignment.worker,
                name: self.names[assignment.worker].clone(),
            };
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
            let layer = WaitingLayer { size: Reverse(size.unwrap_or(0)), ticket: state.ticket() };
            state.waiters.insert(layer.ticket, sender);
            state.queues.get_mut(&self.id).expect("it is there until it is dropped").waiting.insert(layer);
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
        state.queues.remove(&self.id);
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
        if let Some(queue) = state.queues.get_mut(&self.queue.id) {
            queue.waiting.remove(&self.layer);
        }
        drop(state);
        drop(waiter);
    }
}

/// A worker's slot. Dropped, it is free again.
#[derive(Debug)]
pub struct Lease {
    fleet: Fleet,
    queue: u64,
    worker: usize,
    name: String,
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
        state.workers[self.worker].free += 1;
        state.running -= 1;
        if let Some(queue) = state.queues.get_mut(&self.queue) {
            queue.running -= 1;
        }
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

    #[tokio::test]
    async fn a_slot_is_given_back_by_dropping_its_lease() {
        let fleet = fleet(1);
        let queue = fleet.queue(Capabilities::default(), false);
        let first = queue.lease(Some(1)).await;
        assert!(timeout(SOON, queue.lease(Some(1))).await.is_err(), "there is one slot");
        drop(first);
        let _second = queue.lease(Some(1)).await;
        assert_eq!(fleet.workers()[0].free, 0);
    }

    #[tokio::test]
    async fn who_gives_up_waiting_keeps_no_slot() {
        let fleet = fleet(1);
        let queue = fleet.queue(Capabilities::default(), false);
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
        let queue = fleet.queue(needs, false);
        assert!(timeout(SOON, queue.lease(None)).await.is_err());
    }

    #[tokio::test]
    async fn a_draining_fleet_begins_only_what_cannot_be_done_later() {
        let fleet = fleet(2);
        let (job, call) =
            (fleet.queue(Capabilities::default(), true), fleet.queue(Capabilities::default(), false));
        fleet.drain();
        assert!(timeout(SOON, job.lease(None)).await.is_err());
        let _lease = call.lease(None).await;
    }
}
