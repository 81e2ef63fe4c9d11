//! The workers and who has them: layers wait here for a slot, and give it back by dropping their [`Lease`].
//!
//! What goes where is [`crate::schedule`]'s decision; here are the lock, the waiting and the giving back. A lease is the right to
//! run one layer: in this process, or on a worker that is connected ([`crate::worker`]).

mod queue;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use occy_pipeline::element::WrittenLayer;
use occy_pipeline::executor::LayerTask;
use occy_pipeline::registry::Repository;
use occy_proto::v1::{FilterCapability, SearchSpec};
use tokio::sync::{oneshot, watch};

pub use self::queue::FleetQueue;
use crate::budget::{Budgets, HERE};
use crate::error::ServiceError;
use crate::metrics::Metrics;
use crate::other::{self, Versions};
use crate::schedule::{Assignment, Capabilities, Schedule, Standing};
use crate::share::SharedLayers;
use crate::worker::attempt::{Attempts, Failure};
use crate::worker::seat::{RemoteSeat, Seat};
use crate::worker::upload::Upload;

/// Workers that may be connected at once.
const WORKERS_MAX: usize = 2048;

/// The workers. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Fleet(Arc<Shared>);

/// How patient a fleet is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// A worker that was not heard of for so long is lost.
    pub lease: Duration,
    /// How often a layer is begun that fails by its workers' fault.
    pub attempts: usize,
    /// How long a layer waits while no worker offers what it needs.
    pub unoffered: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { lease: Duration::from_secs(30), attempts: 3, unoffered: Duration::from_secs(300) }
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    layers: SharedLayers,
    running: watch::Sender<usize>,
    /// Counts how often workers came and went.
    members: watch::Sender<u64>,
    closed: watch::Sender<bool>,
    attempts: Attempts,
    patience: Patience,
    metrics: Metrics,
    budgets: Budgets,
}

#[derive(Debug, Default)]
struct State {
    schedule: Schedule,
    members: BTreeMap<u64, Member>,
    /// The queues whose layers can be done by a later coordinator too.
    durable: HashSet<u64>,
    /// By ticket, so the one that came first is the first.
    waiters: BTreeMap<u64, Waiter>,
    /// Since when layers wait that have no ticket yet, because no worker has been there that could have them.
    early: BTreeMap<u64, Instant>,
    running: usize,
    draining: bool,
}

/// What is known of a worker.
#[derive(Debug)]
struct Member {
    about: About,
    /// Nothing any more, when it is being stopped.
    offers: Capabilities,
    seat: Arc<Seat>,
}

/// A worker, as it describes itself.
#[derive(Clone, Debug, PartialEq)]
pub struct About {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The filters that it has.
    pub filters: Vec<FilterCapability>,
    /// Layers that it works on at once.
    pub slots: usize,
}

/// A worker, as others see it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerStatus {
    /// What it says of itself.
    pub about: About,
    /// How many of its slots are free.
    pub free: usize,
}

/// Who waits for a worker.
#[derive(Debug)]
struct Waiter {
    since: Instant,
    lease: oneshot::Sender<Lease>,
}

/// How much there is to do, and to do it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Layers that wait for a worker.
    pub waiting: u64,
    /// Layers that workers have.
    pub running: u64,
    /// How long the layer that came first has been waiting.
    pub oldest: Duration,
    /// Workers.
    pub workers: u64,
    /// Layers that they can have at once.
    pub slots: u64,
    /// How many more they can take.
    pub free: u64,
}

impl Fleet {
    /// So many workers in this process, each with one slot, all of which offer the same.
    pub fn embedded(
        workers: usize,
        offers: &Capabilities,
        filters: &[FilterCapability],
        patience: Patience,
    ) -> Self {
        let metrics = Metrics::default();
        let fleet = Self(Arc::new(Shared {
            state: Mutex::default(),
            layers: SharedLayers::new(metrics.clone()),
            running: watch::Sender::new(0),
            members: watch::Sender::new(0),
            closed: watch::Sender::new(false),
            attempts: Attempts::default(),
            patience,
            budgets: Budgets::new(metrics.clone()),
            metrics,
        }));
        for number in 1..=workers {
            let about = About {
                name: format!("embedded-{number}"),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                filters: filters.to_vec(),
                slots: 1,
            };
            fleet.lock().add(about, Arc::clone(offers), Seat::Here);
        }
        fleet
    }

    /// A queue for the layers of one job, or of one call. `durable` says that a later coordinator can do what this
    /// one does not: while the fleet drains, such layers wait.
    pub fn queue(&self, standing: &Standing, needs: &Capabilities, durable: bool) -> FleetQueue {
        FleetQueue::new(self, standing, needs, durable)
    }

    /// The workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let state = self.lock();
        let worker = |(&id, member): (&u64, &Member)| WorkerStatus {
            about: member.about.clone(),
            free: state.schedule.free_slots(id),
        };
        state.members.iter().map(worker).collect()
    }

    /// How much there is to do now.
    pub fn load(&self) -> Load {
        let state = self.lock();
        let free: usize = state.members.keys().map(|&worker| state.schedule.free_slots(worker)).sum();
        let slots: usize = state.members.values().map(|member| member.about.slots).sum();
        let first = state.waiters.values().next().map(|waiter| waiter.since);
        let oldest = first.into_iter().chain(state.early.values().copied()).min();
        Load {
            waiting: (state.waiters.len() + state.early.len()) as u64,
            running: state.running as u64,
            oldest: oldest.map(|since| since.elapsed()).unwrap_or_default(),
            workers: state.members.len() as u64,
            slots: slots as u64,
            free: free as u64,
        }
    }

    /// Waits until a worker could begin a layer at once.
    pub async fn room(&self) {
        let (mut running, mut members) = (self.running(), self.0.members.subscribe());
        // The senders are this fleet's.
        while self.load().free == 0 {
            tokio::select! {
                biased;
                _ = running.changed() => {}
                _ = members.changed() => {}
            }
        }
    }

    /// Where is counted what happens to its layers.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// What all of it may ask of registries.
    pub fn budgets(&self) -> &Budgets {
        &self.0.budgets
    }

    /// Whether a worker offers this.
    pub fn offers(&self, capability: &str) -> bool {
        self.lock().members.values().any(|member| member.offers.contains(capability))
    }

    /// How patient it is.
    pub fn patience(&self) -> Patience {
        self.0.patience
    }

    /// The layers that connected workers have.
    pub fn attempts(&self) -> &Attempts {
        &self.0.attempts
    }

    /// Adds a worker that connected, under its name or one that nobody else has. It leaves by dropping what it gets.
    pub fn join(
        &self,
        about: About,
        offers: Capabilities,
        seat: RemoteSeat,
    ) -> Result<Membership, ServiceError> {
        let mut state = self.lock();
        if state.members.len() >= WORKERS_MAX {
            return Err(ServiceError::TooMany { what: "workers", limit: WORKERS_MAX });
        }
        let taken = |name: &str| state.members.values().any(|member| member.about.name == name);
        let mut name = about.name.clone();
        let mut number = 1;
        while taken(&name) {
            number += 1;
            name = format!("{}-{number}", about.name);
        }
        let seat = Seat::Remote(seat);
        let id = state.add(About { name: name.clone(), ..about }, offers, seat);
        let seat = Arc::clone(&state.members[&id].seat);
        drop(state);
        self.changed();
        Ok(Membership { fleet: self.clone(), id, name, seat })
    }

    /// Begins no layer of a durable job any more, and tells the workers.
    pub fn drain(&self) {
        let mut state = self.lock();
        let State { schedule, durable, draining, members, .. } = &mut *state;
        *draining = true;
        durable.iter().for_each(|queue| schedule.hold(*queue));
        members.values().for_each(|member| member.seat.drain());
    }

    /// Whether it begins no layer of a durable job any more.
    pub fn is_draining(&self) -> bool {
        self.lock().draining
    }

    /// Sends connected workers away.
    pub fn close(&self) {
        self.0.closed.send_replace(true);
    }

    /// Hears when they are sent away.
    pub fn closed(&self) -> watch::Receiver<bool> {
        self.0.closed.subscribe()
    }

    /// How many layers are running, whenever that changes.
    pub fn running(&self) -> watch::Receiver<usize> {
        self.0.running.subscribe()
    }

    /// Workers have come or gone.
    fn changed(&self) {
        self.0.members.send_modify(|changes| *changes += 1);
        self.dispatch();
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
    fn add(&mut self, about: About, offers: Capabilities, seat: Seat) -> u64 {
        let id = self.schedule.add_worker(&offers, about.slots);
        self.members.insert(id, Member { about, offers, seat: Arc::new(seat) });
        id
    }

    fn assign(&mut self, fleet: &Fleet) -> Vec<Lease> {
        let mut returned = Vec::new();
        while let Some(assignment) = self.schedule.begin_next() {
            self.running += 1;
            let member = &self.members[&assignment.worker];
            let (name, seat) = (member.about.name.clone(), Arc::clone(&member.seat));
            let lease = Lease { fleet: fleet.clone(), assignment, name, seat };
            let waiter =
                self.waiters.remove(&assignment.ticket).expect("who waits has a place to hear of it");
            // The lease must not be dropped here, under the lock that it needs.
            fleet.0.metrics.layer_waited(waiter.since.elapsed());
            returned.extend(waiter.lease.send(lease).err());
        }
        fleet.0.running.send_replace(self.running);
        returned
    }

    /// The versions of those filters that are needed and that only workers have, which the most slots are for. None: no worker offers all
    /// that is needed.
    fn versions(&self, needs: &Capabilities) -> Option<Versions> {
        if !other::are_needed(needs) {
            return Some(Versions::default());
        }
        let mut slots = BTreeMap::<_, usize>::new();
        for About { filters, slots: its, .. } in self.able(needs).map(|member| &member.about) {
            *slots.entry(Versions::of(needs, filters)).or_default() += its;
        }
        slots.into_iter().max_by_key(|(_, slots)| *slots).map(|(versions, _)| versions)
    }

    /// The workers that offer all of that.
    fn able(&self, needs: &Capabilities) -> impl Iterator<Item = &Member> {
        self.members.values().filter(move |member| needs.is_subset(&member.offers))
    }

    /// What of these needs no worker offers, for people. None where one offers all of them.
    fn missing(&self, needs: &Capabilities) -> Option<String> {
        if self.able(needs).next().is_some() {
            return None;
        }
        let members = self.members.values();
        if self.members.is_empty() {
            return Some("no worker is connected".to_owned());
        }
        let nowhere = |need: &&String| !members.clone().any(|member| member.offers.contains(*need));
        let nowhere: Vec<_> = needs.iter().filter(nowhere).cloned().collect();
        Some(match nowhere.as_slice() {
            [] => {
                format!("no worker offers all of {}", needs.iter().cloned().collect::<Vec<_>>().join(", "))
            }
            nowhere => format!("no worker offers {}", nowhere.join(", ")),
        })
    }
}

/// A connected worker's place in the fleet. Dropped, the worker is lost, and its layers with it.
#[derive(Debug)]
pub struct Membership {
    fleet: Fleet,
    id: u64,
    name: String,
    seat: Arc<Seat>,
}

impl Membership {
    /// What the worker is called here.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which worker it is, in this fleet.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The worker gets no more layers, and keeps those that it has.
    pub fn retire(&self) {
        let mut state = self.fleet.lock();
        state.schedule.remove_worker(self.id);
        if let Some(member) = state.members.get_mut(&self.id) {
            member.offers = Capabilities::default();
        }
        drop(state);
        self.fleet.changed();
    }

    /// The worker gets no more layers until it is back, and keeps those that it has.
    pub fn set_away(&self, is_away: bool) {
        self.fleet.lock().schedule.set_away(self.id, is_away);
        self.fleet.changed();
    }

    /// The worker is gone, for that reason.
    pub fn leave(self, reason: &str) {
        self.lose(reason);
    }

    fn lose(&self, reason: &str) {
        // In this order: a layer that is given to the worker meanwhile is in the one or finds the other.
        self.seat.lose();
        self.fleet.attempts().lose(self.id, reason);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.fleet.lock();
        state.schedule.remove_worker(self.id);
        state.members.remove(&self.id);
        drop(state);
        // Of those that were not told before, when it left for a reason.
        self.lose("it is gone");
        self.fleet.changed();
    }
}

/// Whose layers they are, and what workers are told of all of them.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// The job's id; empty for a call.
    pub job: String,
    /// The search that is the last filter of their chain, where the request has it as [`SearchSpec`] and not as a text.
    pub search: Option<SearchSpec>,
    /// Whether registries get the bytes of foreign layers too.
    pub foreign_layers: bool,
}

/// A worker's slot. Dropped, it is free again.
#[derive(Debug)]
pub struct Lease {
    fleet: Fleet,
    assignment: Assignment,
    name: String,
    seat: Arc<Seat>,
}

impl Lease {
    /// The worker's name.
    pub fn worker(&self) -> &str {
        &self.name
    }

    /// What of a registry's limits the worker waits for, to go on with a layer.
    pub fn waits(&self, task: &LayerTask) -> Option<String> {
        let ends = [task.layer.origin.as_ref(), task.output.repository()];
        let hosts: Vec<_> = ends.into_iter().flatten().map(Repository::host).collect();
        let who = match &*self.seat {
            Seat::Here => HERE,
            Seat::Remote(_) => self.assignment.worker,
        };
        self.fleet.budgets().waits(who, &hosts)
    }

    /// Runs a layer there. A connected worker goes on with its `upload`. Dropped, it stops.
    pub async fn run(
        &self,
        task: &LayerTask,
        origin: &Origin,
        upload: &Upload,
    ) -> Result<WrittenLayer, Failure> {
        let start = Instant::now();
        let result = match &*self.seat {
            Seat::Here => task.run().await.map_err(Failure::Task),
            Seat::Remote(seat) => {
                self.fleet.attempts().run(self.assignment.worker, seat, task, origin, upload).await
            }
        };
        self.fleet.metrics().layer_ended(result.is_ok(), start.elapsed());
        result
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
        Fleet::embedded(workers, &Capabilities::default(), &[], Patience::default())
    }

    fn anybody() -> Standing {
        Standing { tenant: "anybody".into(), priority: 0 }
    }

    fn queue(fleet: &Fleet, is_durable: bool) -> FleetQueue {
        fleet.queue(&anybody(), &Capabilities::default(), is_durable)
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
        let queue = fleet.queue(&anybody(), &needs, false);
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

    fn needs(what: &[&str]) -> Capabilities {
        Arc::new(what.iter().map(|need| (*need).to_owned()).collect())
    }

    fn join(fleet: &Fleet, name: &str, offers: &[&str]) -> Membership {
        let about = About { name: name.to_owned(), version: String::new(), filters: Vec::new(), slots: 1 };
        let (returns, _) = tokio::sync::mpsc::channel(1);
        fleet.join(about, needs(offers), RemoteSeat::new(returns)).unwrap()
    }

    #[tokio::test]
    async fn a_worker_that_comes_gets_what_waits_and_one_that_goes_frees_nothing() {
        let fleet = fleet(0);
        let queue = fleet.queue(&anybody(), &needs(&["a"]), false);
        assert_eq!(queue.missing().as_deref(), Some("no worker is connected"));
        let _other = join(&fleet, "one", &["b"]);
        assert_eq!(queue.missing().as_deref(), Some("no worker offers a"));
        let mut changes = queue.members();
        changes.mark_unchanged();
        let (lease, member) = tokio::join!(queue.lease(None), async { join(&fleet, "one", &["a", "b"]) });
        assert!(changes.has_changed().unwrap());
        assert_eq!((queue.missing(), lease.worker(), member.name()), (None, "one-2", "one-2"));
        member.leave("it is tried");
        assert_eq!((fleet.workers().len(), *fleet.running().borrow()), (1, 1));
        drop(lease);
        assert_eq!((fleet.workers()[0].free, *fleet.running().borrow()), (1, 0));
    }

    #[tokio::test]
    async fn a_worker_that_is_being_stopped_gets_no_more() {
        let fleet = fleet(0);
        let member = join(&fleet, "one", &[]);
        let queue = queue(&fleet, false);
        let lease = queue.lease(None).await;
        member.retire();
        drop(lease);
        assert!(timeout(SOON, queue.lease(None)).await.is_err());
    }
}
