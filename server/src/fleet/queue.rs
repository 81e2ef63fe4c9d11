//! The layers of one job or call, on their way to workers: all of them to the same versions of filters that only workers have.
//!
//! Which these are is decided when the first worker is there that could have one of the layers. A queue whose versions nobody has any more
//! is of no use, and so are its layers: whoever has it begins again.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use occy_pipeline::error::Error;
use occy_pipeline::executor::LayerTask;
use tokio::sync::{oneshot, watch};

use super::{Fleet, Lease, Origin, Patience, Seat, Waiter};
use crate::other::Versions;
use crate::schedule::{Capabilities, Standing, WaitingLayer};
use crate::share::elsewhere::Elsewhere;
use crate::share::{Leader, Turn, Wants};

/// The layers of one job. Dropped, it leaves the fleet.
#[derive(Debug)]
pub struct FleetQueue {
    fleet: Fleet,
    standing: Standing,
    is_durable: bool,
    /// What its layers need, in whatever version.
    needs: Capabilities,
    /// Where they wait, as soon as it is known in which.
    line: OnceLock<Line>,
    /// What is set with it.
    versions: Arc<OnceLock<Versions>>,
    origin: Origin,
    elsewhere: Option<Elsewhere>,
}

/// Where the layers of a queue wait.
#[derive(Debug)]
struct Line {
    /// Its id in the schedule.
    id: u64,
    /// What they need, in the versions that were chosen.
    needs: Capabilities,
}

impl FleetQueue {
    pub(super) fn new(fleet: &Fleet, standing: &Standing, needs: &Capabilities, is_durable: bool) -> Self {
        let queue = Self {
            fleet: fleet.clone(),
            standing: standing.clone(),
            is_durable,
            needs: Arc::clone(needs),
            line: OnceLock::new(),
            versions: Arc::default(),
            origin: Origin::default(),
            elsewhere: None,
        };
        // Now, if it can be: queues stand in the order in which they came.
        queue.line();
        queue
    }

    /// Waits for a worker by `lease`, or for somebody else who does the same as is to be done for this layer. Nobody is known to do the same
    /// as long as no worker has been there that could have it.
    ///
    /// # Cancel safety
    /// As `lease`.
    pub async fn turn<F: Future<Output = Result<Lease, Error>>>(
        &self,
        task: &LayerTask,
        lease: impl Fn() -> F,
    ) -> Result<Turn<Lease>, Error> {
        let Some(versions) = self.line().and_then(|_| self.versions.get()) else {
            return Ok(Turn::Lead(lease().await?, Leader::alone()));
        };
        let others = versions.in_chain(&task.plan.chain);
        let wants = Wants { tenant: &self.standing.tenant, others, elsewhere: self.elsewhere.as_ref() };
        self.fleet.0.layers.turn(wants, task, lease).await
    }

    /// The same, of that origin.
    #[must_use]
    pub fn of(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }

    /// The same, whose layers are shared with other coordinators too.
    #[must_use]
    pub fn and_elsewhere(mut self, elsewhere: Elsewhere) -> Self {
        self.elsewhere = Some(elsewhere);
        self
    }

    /// Whose layers they are.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// How patient the fleet is.
    pub fn patience(&self) -> Patience {
        self.fleet.0.patience
    }

    /// The versions of filters that only workers have, by which all of its layers are made: known before any of them has a worker.
    pub fn versions(&self) -> Arc<OnceLock<Versions>> {
        Arc::clone(&self.versions)
    }

    /// Where its layers wait. None as long as no worker has been there that offers what they need.
    fn line(&self) -> Option<&Line> {
        if let Some(line) = self.line.get() {
            return Some(line);
        }
        // Under the lock, so that there is one.
        let mut state = self.fleet.lock();
        let versions = state.versions(&self.needs)?;
        Some(self.line.get_or_init(|| {
            let needs = versions.with(&self.needs);
            let id = state.schedule.add_queue(&self.standing, &needs);
            if self.is_durable {
                state.durable.insert(id);
                if state.draining {
                    state.schedule.hold(id);
                }
            }
            self.versions.get_or_init(|| versions);
            Line { id, needs }
        }))
    }

    /// The same, as soon as there is one.
    async fn begun(&self) -> &Line {
        if let Some(line) = self.line() {
            return line;
        }
        let mut members = self.members();
        let _counted = Early::new(&self.fleet);
        loop {
            if let Some(line) = self.line() {
                return line;
            }
            // The fleet, which is ours, holds the other end.
            let _ = members.changed().await;
        }
    }

    /// Whether its layers would wait in vain: no worker has the versions any more that were chosen, and there are others.
    pub fn is_outdated(&self) -> bool {
        let Some(line) = self.line.get().filter(|line| !Arc::ptr_eq(&line.needs, &self.needs)) else {
            return false;
        };
        let state = self.fleet.lock();
        let is_offered = |needs: &Capabilities| state.able(needs).next().is_some();
        !is_offered(&line.needs) && is_offered(&self.needs)
    }

    /// Waits for a worker for a layer of that size.
    ///
    /// # Cancel safety
    /// Dropped before it returns, the layer has left the queue, or its slot is given back.
    pub async fn lease(&self, size: Option<u64>) -> Lease {
        let since = Instant::now();
        let line = self.begun().await.id;
        let (sender, receiver) = oneshot::channel();
        let layer = {
            let mut state = self.fleet.lock();
            let layer = state.schedule.push(line, size.unwrap_or(0));
            state.waiters.insert(layer.ticket, Waiter { since, lease: sender });
            layer
        };
        let _place = Place { fleet: &self.fleet, line, layer };
        self.fleet.dispatch();
        receiver.await.expect("the fleet keeps a waiter until it is served, or until its place is given up")
    }

    /// Why no worker that is there can ever have one of the layers; None where one can.
    pub fn missing(&self) -> Option<String> {
        self.fleet.lock().missing(&self.needs)
    }

    /// Whether there are workers that could be lost.
    pub fn has_connected_workers(&self) -> bool {
        self.fleet.lock().members.values().any(|member| matches!(*member.seat, Seat::Remote(_)))
    }

    /// Hears when workers come and go.
    pub fn members(&self) -> watch::Receiver<u64> {
        self.fleet.0.members.subscribe()
    }
}

impl Drop for FleetQueue {
    fn drop(&mut self) {
        let Some(Line { id, .. }) = self.line.get() else { return };
        let mut state = self.fleet.lock();
        state.schedule.remove_queue(*id);
        state.durable.remove(id);
    }
}

/// A layer that waits, and has no place yet.
struct Early<'a> {
    fleet: &'a Fleet,
    number: u64,
}

impl<'a> Early<'a> {
    fn new(fleet: &'a Fleet) -> Self {
        let mut state = fleet.lock();
        let number = state.schedule.next_number();
        state.early.insert(number, Instant::now());
        Self { fleet, number }
    }
}

impl Drop for Early<'_> {
    fn drop(&mut self) {
        self.fleet.lock().early.remove(&self.number);
    }
}

/// A layer's place in its queue.
struct Place<'a> {
    fleet: &'a Fleet,
    line: u64,
    layer: WaitingLayer,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.fleet.lock();
        let waiter = state.waiters.remove(&self.layer.ticket);
        state.schedule.withdraw(self.line, self.layer);
        drop(state);
        drop(waiter);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use occy_proto::v1::FilterCapability;
    use tokio::time::timeout;

    use super::*;
    use crate::fleet::{About, Membership};
    use crate::other;
    use crate::worker::seat::RemoteSeat;

    const SOON: Duration = Duration::from_millis(20);

    fn fleet() -> Fleet {
        Fleet::embedded(0, &Capabilities::default(), &[], Patience::default())
    }

    fn queue(fleet: &Fleet, is_durable: bool) -> FleetQueue {
        let standing = Standing { tenant: "anybody".into(), priority: 0 };
        fleet.queue(&standing, &Arc::new(["filter:shout".to_owned()].into()), is_durable)
    }

    fn join_with(fleet: &Fleet, name: &str, version: &str, slots: usize) -> Membership {
        let filter = FilterCapability {
            name: "shout".to_owned(),
            version: version.to_owned(),
            ..FilterCapability::default()
        };
        let offers = ["filter:shout".to_owned(), other::offered_version(&filter).unwrap()];
        let about = About { name: name.to_owned(), version: String::new(), filters: vec![filter], slots };
        fleet.join(about, Arc::new(offers.into()), RemoteSeat::new(tokio::sync::mpsc::channel(1).0)).unwrap()
    }

    #[tokio::test]
    async fn layers_of_one_queue_go_to_one_version_of_a_workers_filter() {
        let fleet = fleet();
        let waiting = queue(&fleet, false);
        {
            let mut lease = std::pin::pin!(waiting.lease(None));
            assert!(timeout(SOON, &mut lease).await.is_err());
            assert!(fleet.load().waiting == 1 && fleet.load().oldest >= SOON);
        }
        assert_eq!(fleet.load().waiting, 0);
        assert!(waiting.versions().get().is_none() && !waiting.is_outdated());
        let old = join_with(&fleet, "old", "1", 2);
        let first = timeout(SOON, waiting.lease(None)).await.unwrap();
        let _new = join_with(&fleet, "new", "2", 3);
        let second = timeout(SOON, waiting.lease(None)).await.unwrap();
        assert_eq!([first.worker(), second.worker()], ["old", "old"]);
        assert!(timeout(SOON, waiting.lease(None)).await.is_err(), "the other one's slots are for others");
        // Whoever comes now gets the version of which there is most.
        let later = queue(&fleet, false);
        assert_eq!(timeout(SOON, later.lease(None)).await.unwrap().worker(), "new");
        assert_ne!(later.versions().get(), waiting.versions().get());
        assert!(!waiting.is_outdated());
        old.retire();
        assert!(waiting.is_outdated() && !later.is_outdated());
        // As it was before.
        let _again = join_with(&fleet, "again", "1", 1);
        assert!(!waiting.is_outdated());
        assert_eq!(timeout(SOON, waiting.lease(None)).await.unwrap().worker(), "again");
    }

    #[tokio::test]
    async fn a_draining_fleet_begins_no_durable_layer_whose_worker_comes_late() {
        let fleet = fleet();
        let queue = queue(&fleet, true);
        fleet.drain();
        let _worker = join_with(&fleet, "late", "1", 1);
        assert!(timeout(SOON, queue.lease(None)).await.is_err());
    }
}
