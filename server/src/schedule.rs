//! Which waiting layer goes to which free worker: no lock, no clock, no waiting, so that every order of events can be tried.
//!
//! A layer goes only where everything that it needs is offered. Among tenants, the one with the fewest layers at work is next; of
//! two, the one whose last turn, or whose arrival, was longer ago. Among a tenant's jobs those of the greatest priority are next, and
//! among these it is the same. So a tenant of a thousand jobs takes turns with one of a single job, a job of a thousand layers with one
//! of a single layer; who comes later stands behind who waits already, and nobody waits for ever but for what the same tenant says is
//! more urgent: a priority takes nothing from others. Within a job the largest layer is next: the small ones then fill the gaps at the
//! end. Among workers, the one with the most free slots is next.
//!
//! The tests say the same in one expression, which looks at everything. What is kept here finds that answer without looking:
//! layers that need the same stand in one line, workers that offer the same in another, and both in the order of the rule.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use occy_proto::v1::Job;

/// What a worker must offer, or offers: `filter:exclude`, `output:registry`, `codec:gzip`.
pub type Capabilities = Arc<BTreeSet<String>>;

/// Whose a job or a call is.
pub type Tenant = Arc<str>;

/// Where a job or a call stands among others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whose it is.
    pub tenant: Tenant,
    /// Among its tenant's, the greatest comes first.
    pub priority: i32,
}

impl Standing {
    /// That of a job.
    pub fn of(job: &Job) -> Self {
        let priority = job.spec.as_ref().map_or(0, |spec| spec.priority);
        Self { tenant: job.tenant.as_str().into(), priority }
    }
}

/// A layer that waits. Larger ones come first, and of equal ones the one that came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WaitingLayer {
    /// Bytes to read; 0 where nobody knows.
    pub size: Reverse<u64>,
    /// Its place in the order of arrival, unique in the fleet.
    pub ticket: u64,
}

/// A layer and its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Whose layer.
    pub queue: u64,
    /// The layer's ticket.
    pub ticket: u64,
    /// The worker.
    pub worker: u64,
}

/// Who waits, who works, and what is next.
#[derive(Debug, Default)]
pub struct Schedule {
    tenants: HashMap<Tenant, Share>,
    queues: HashMap<u64, Queue>,
    workers: HashMap<u64, Worker>,
    needs: BTreeMap<u64, Need>,
    offers: BTreeMap<u64, Offer>,
    count: u64,
}

/// What a tenant has of the fleet.
#[derive(Debug)]
struct Share {
    queues: usize,
    running: usize,
    turn: u64,
}

/// The layers of one job, or of one call.
#[derive(Debug)]
struct Queue {
    standing: Standing,
    need: u64,
    /// Its layers that workers have now.
    running: usize,
    /// When it arrived, or had its last turn.
    turn: u64,
    waiting: BTreeSet<WaitingLayer>,
    /// Whether none of its layers is begun any more.
    is_held: bool,
    /// Whether it is only here until its last layer ends.
    has_left: bool,
}

#[derive(Debug)]
struct Worker {
    offer: u64,
    free: usize,
    /// Whether it cannot be given anything.
    is_away: bool,
}

/// A tenant's place in every line: layers at work, then its turn, which is nobody else's.
type TenantPlace = (usize, u64);
/// A queue's place among its tenant's in a line: its priority, layers at work, its turn, its id.
type QueuePlace = (Reverse<i32>, usize, u64, u64);

/// The line of those that need the same.
#[derive(Debug)]
struct Need {
    needs: Capabilities,
    queues: usize,
    /// The offers that meet it.
    offers: Vec<u64>,
    line: BTreeMap<TenantPlace, BTreeSet<QueuePlace>>,
}

/// The workers that offer the same.
#[derive(Debug)]
struct Offer {
    offers: Capabilities,
    workers: usize,
    /// Those with free slots, the one with the most first.
    free: BTreeSet<(Reverse<usize>, u64)>,
}

impl Share {
    fn place(&self) -> TenantPlace {
        (self.running, self.turn)
    }
}

impl Queue {
    /// Its place, if it has a layer to begin.
    fn place(&self, id: u64) -> Option<QueuePlace> {
        let priority = Reverse(self.standing.priority);
        (!self.is_held && !self.waiting.is_empty()).then_some((priority, self.running, self.turn, id))
    }
}

impl Schedule {
    /// A worker with so many slots; its id is greater than those of the workers before it.
    pub fn add_worker(&mut self, offers: &Capabilities, slots: usize) -> u64 {
        let known = self.offers.iter().find(|(_, offer)| offer.offers == *offers).map(|(&id, _)| id);
        let offer = known.unwrap_or_else(|| {
            let id = self.next_number();
            for need in self.needs.values_mut().filter(|need| need.needs.is_subset(offers)) {
                need.offers.push(id);
            }
            let offer = Offer { offers: Arc::clone(offers), workers: 0, free: BTreeSet::new() };
            self.offers.insert(id, offer);
            id
        });
        let id = self.next_number();
        self.workers.insert(id, Worker { offer, free: 0, is_away: false });
        self.offer_mut(offer).workers += 1;
        self.free(id, |free| free + slots);
        id
    }

    /// Takes a worker away. The layers that it has are at work until each is said to have ended.
    pub fn remove_worker(&mut self, id: u64) {
        self.free(id, |_| 0);
        let Some(worker) = self.workers.remove(&id) else { return };
        let offer = self.offer_mut(worker.offer);
        offer.workers -= 1;
        if offer.workers == 0 {
            self.offers.remove(&worker.offer);
            for need in self.needs.values_mut() {
                need.offers.retain(|offer| *offer != worker.offer);
            }
        }
    }

    /// A worker gets no layers while it is away, and keeps those that it has.
    pub fn set_away(&mut self, id: u64, is_away: bool) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.is_away = is_away;
        }
        self.free(id, |free| free);
    }

    /// A worker's free slots: none while it is away.
    pub fn free_slots(&self, worker: u64) -> usize {
        self.workers.get(&worker).map_or(0, |worker| if worker.is_away { 0 } else { worker.free })
    }

    /// A queue without layers.
    pub fn add_queue(&mut self, standing: &Standing, needs: &Capabilities) -> u64 {
        let known = self.needs.iter().find(|(_, need)| need.needs == *needs).map(|(&id, _)| id);
        let need = known.unwrap_or_else(|| {
            let id = self.next_number();
            let offers = self.offers.iter().filter(|(_, offer)| needs.is_subset(&offer.offers));
            let offers = offers.map(|(&id, _)| id).collect();
            let need = Need { needs: Arc::clone(needs), queues: 0, offers, line: BTreeMap::new() };
            self.needs.insert(id, need);
            id
        });
        self.need_mut(need).queues += 1;
        let turn = self.next_number();
        let share = self.tenants.entry(Arc::clone(&standing.tenant));
        share.or_insert(Share { queues: 0, running: 0, turn }).queues += 1;
        let queue = Queue {
            standing: standing.clone(),
            need,
            running: 0,
            turn,
            waiting: BTreeSet::new(),
            is_held: false,
            has_left: false,
        };
        self.queues.insert(turn, queue);
        turn
    }

    /// Takes a queue away, and the layers that wait in it. Those at work count for its tenant until each is said to have ended.
    pub fn remove_queue(&mut self, id: u64) {
        self.change(id, |_, queue| {
            queue.waiting.clear();
            queue.has_left = true;
        });
        self.forget(id);
    }

    /// Begins no layer of this queue any more.
    pub fn hold(&mut self, queue: u64) {
        self.change(queue, |_, queue| queue.is_held = true);
    }

    /// A layer waits from now on.
    ///
    /// # Panics
    /// If the queue is not there.
    pub fn push(&mut self, queue: u64, size: u64) -> WaitingLayer {
        let layer = WaitingLayer { size: Reverse(size), ticket: self.next_number() };
        let pushed = self.change(queue, |_, queue| queue.waiting.insert(layer));
        assert_eq!(pushed, Some(true), "layers are pushed to a queue that is there");
        layer
    }

    /// A layer does not wait any more, if it still did.
    pub fn withdraw(&mut self, queue: u64, layer: WaitingLayer) {
        self.change(queue, |_, queue| queue.waiting.remove(&layer));
    }

    /// Begins what is to be begun next, if anything can be.
    pub fn begin_next(&mut self) -> Option<Assignment> {
        let (queue, worker) = self.choose()?;
        let turn = self.next_number();
        let layer = self.change(queue, |share, queue| {
            share.running += 1;
            share.turn = turn;
            queue.running += 1;
            queue.turn = turn;
            queue.waiting.pop_first()
        });
        let ticket = layer.flatten().expect("a queue in a line has a layer").ticket;
        self.free(worker, |free| free - 1);
        Some(Assignment { queue, ticket, worker })
    }

    /// A layer that was begun has ended.
    pub fn end(&mut self, assignment: Assignment) {
        self.change(assignment.queue, |share, queue| {
            share.running -= 1;
            queue.running -= 1;
        });
        self.forget(assignment.queue);
        self.free(assignment.worker, |free| free + 1);
    }

    /// Of each line for which there is a free worker, its first; and of these the first.
    fn choose(&self) -> Option<(u64, u64)> {
        let firsts = self.needs.values().filter_map(|need| {
            let (tenant, queues) = need.line.first_key_value()?;
            let free = need.offers.iter().filter_map(|offer| self.offers[offer].free.first()).min()?;
            Some((tenant, queues.first()?, free))
        });
        let (_, &(.., queue), &(_, worker)) = firsts.min()?;
        Some((queue, worker))
    }

    /// Changes a queue and its tenant's share, and puts both where they then stand.
    fn change<T>(&mut self, id: u64, change: impl FnOnce(&mut Share, &mut Queue) -> T) -> Option<T> {
        let queue = self.queues.get_mut(&id)?;
        let share =
            self.tenants.get_mut(&queue.standing.tenant).expect("a tenant stays as long as its queues");
        let (tenant_before, before) = (share.place(), queue.place(id));
        let result = change(share, queue);
        let (tenant, after, need) = (share.place(), queue.place(id), queue.need);
        if let Some(before) = before {
            let line = &mut self.need_mut(need).line;
            if let Some(queues) = line.get_mut(&tenant_before) {
                queues.remove(&before);
                if queues.is_empty() {
                    line.remove(&tenant_before);
                }
            }
        }
        if tenant != tenant_before {
            for need in self.needs.values_mut() {
                if let Some(queues) = need.line.remove(&tenant_before) {
                    need.line.insert(tenant, queues);
                }
            }
        }
        if let Some(after) = after {
            self.need_mut(need).line.entry(tenant).or_default().insert(after);
        }
        Some(result)
    }

    /// Forgets a queue that has left, once none of its layers is at work; and whatever only it needed.
    fn forget(&mut self, id: u64) {
        if !self.queues.get(&id).is_some_and(|queue| queue.has_left && queue.running == 0) {
            return;
        }
        let Some(queue) = self.queues.remove(&id) else { return };
        let need = self.need_mut(queue.need);
        need.queues -= 1;
        if need.queues == 0 {
            self.needs.remove(&queue.need);
        }
        if let Some(share) = self.tenants.get_mut(&queue.standing.tenant) {
            share.queues -= 1;
            if share.queues == 0 {
                self.tenants.remove(&queue.standing.tenant);
            }
        }
    }

    /// Changes the number of a worker's free slots, and puts it where it then stands.
    fn free(&mut self, id: u64, change: impl FnOnce(usize) -> usize) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let (before, after, offer) = (worker.free, change(worker.free), worker.offer);
        worker.free = after;
        let is_away = worker.is_away;
        let offer = self.offer_mut(offer);
        offer.free.remove(&(Reverse(before), id));
        if after > 0 && !is_away {
            offer.free.insert((Reverse(after), id));
        }
    }

    fn need_mut(&mut self, id: u64) -> &mut Need {
        self.needs.get_mut(&id).expect("a need stays as long as its queues")
    }

    fn offer_mut(&mut self, id: u64) -> &mut Offer {
        self.offers.get_mut(&id).expect("an offer stays as long as its workers")
    }

    /// A number that nothing has had before: ids, tickets, turns.
    pub fn next_number(&mut self) -> u64 {
        self.count += 1;
        self.count
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    fn set(words: &[usize]) -> Capabilities {
        Arc::new(words.iter().map(|word| format!("filter:{word}")).collect())
    }

    fn tenant(number: usize, priority: i32) -> Standing {
        Standing { tenant: format!("tenant {number}").into(), priority }
    }

    /// Something that happens to a fleet.
    #[derive(Clone, Debug)]
    enum Event {
        WorkerCame { offers: Vec<usize>, slots: usize },
        WorkerWent(Index),
        WorkerAway(Index, bool),
        JobCame { tenant: usize, priority: i32, needs: Vec<usize> },
        JobWent(Index),
        JobHeld(Index),
        LayerCame(Index, u64),
        LayerWent(Index),
        LayerEnded(Index),
        Next,
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let words = || prop::collection::vec(0usize..3, 0..3);
        let any = any::<Index>;
        prop_oneof![
            2 => (words(), 0usize..4).prop_map(|(offers, slots)| Event::WorkerCame { offers, slots }),
            1 => any().prop_map(Event::WorkerWent),
            1 => (any(), prop::bool::ANY).prop_map(|(worker, away)| Event::WorkerAway(worker, away)),
            3 => (0usize..3, -1..2, words())
                .prop_map(|(tenant, priority, needs)| Event::JobCame { tenant, priority, needs }),
            1 => any().prop_map(Event::JobWent),
            1 => any().prop_map(Event::JobHeld),
            9 => (any(), 0u64..5).prop_map(|(queue, size)| Event::LayerCame(queue, size)),
            1 => any().prop_map(Event::LayerWent),
            4 => any().prop_map(Event::LayerEnded),
            8 => Just(Event::Next),
        ]
    }

    /// A job, as plainly as it goes.
    #[derive(Debug)]
    struct PlainQueue {
        id: u64,
        tenant: usize,
        priority: i32,
        needs: Capabilities,
        turn: u64,
        waiting: Vec<WaitingLayer>,
        is_held: bool,
        has_left: bool,
    }

    /// The same fleet without any index: lists, searched through for every answer.
    #[derive(Debug, Default)]
    struct Plain {
        turn: u64,
        /// A tenant's turn, while it has a job.
        tenants: BTreeMap<usize, u64>,
        queues: Vec<PlainQueue>,
        /// Id, what it offers, its slots.
        workers: Vec<(u64, Capabilities, usize)>,
        away: HashSet<u64>,
        running: Vec<Assignment>,
        began: HashSet<u64>,
    }

    impl Plain {
        fn running(&self, of: impl Fn(&Assignment) -> bool) -> usize {
            self.running.iter().filter(|assignment| of(assignment)).count()
        }

        fn tenant_running(&self, tenant: usize) -> usize {
            let is_its = |queue: &&PlainQueue| queue.tenant == tenant;
            let queues = self.queues.iter().filter(is_its);
            queues.map(|queue| self.running(|at| at.queue == queue.id)).sum()
        }

        fn free(&self, worker: u64, slots: usize) -> usize {
            if self.away.contains(&worker) { 0 } else { slots - self.running(|at| at.worker == worker) }
        }

        /// The rule.
        fn next(&self) -> Option<Assignment> {
            let pairs =
                self.queues.iter().flat_map(|queue| self.workers.iter().map(move |worker| (queue, worker)));
            let possible = pairs.filter(|(queue, (worker, offers, slots))| {
                !queue.is_held
                    && !queue.waiting.is_empty()
                    && queue.needs.is_subset(offers)
                    && self.free(*worker, *slots) > 0
            });
            let (queue, (worker, ..)) = possible.min_by_key(|(queue, (worker, _, slots))| {
                let tenant = (self.tenant_running(queue.tenant), self.tenants[&queue.tenant]);
                let job = (Reverse(queue.priority), self.running(|at| at.queue == queue.id), queue.turn);
                (tenant, job, Reverse(self.free(*worker, *slots)), *worker)
            })?;
            let layer = queue.waiting.iter().max_by_key(|layer| (layer.size.0, Reverse(layer.ticket)))?;
            Some(Assignment { queue: queue.id, ticket: layer.ticket, worker: *worker })
        }

        fn begin(&mut self, assignment: Assignment) {
            self.turn += 1;
            let queue = self.queues.iter_mut().find(|queue| queue.id == assignment.queue).unwrap();
            queue.waiting.retain(|layer| layer.ticket != assignment.ticket);
            queue.turn = self.turn;
            self.tenants.insert(queue.tenant, self.turn);
            assert!(self.began.insert(assignment.ticket), "a layer was begun twice");
            self.running.push(assignment);
        }

        /// Queues that have left go with their last layer, and tenants with their last queue.
        fn tidy(&mut self) {
            let running: HashSet<u64> = self.running.iter().map(|at| at.queue).collect();
            self.queues.retain(|queue| !queue.has_left || running.contains(&queue.id));
            let left: HashSet<usize> = self.queues.iter().map(|queue| queue.tenant).collect();
            self.tenants.retain(|tenant, _| left.contains(tenant));
        }

        /// Lets the event happen here and there.
        fn apply(&mut self, schedule: &mut Schedule, event: &Event) {
            let open: Vec<usize> = (0..self.queues.len()).filter(|&at| !self.queues[at].has_left).collect();
            let pick = |index: &Index, of: &[usize]| (!of.is_empty()).then(|| of[index.index(of.len())]);
            match event {
                Event::WorkerCame { offers, slots } => {
                    let offers = set(offers);
                    self.workers.push((schedule.add_worker(&offers, *slots), offers, *slots));
                }
                Event::WorkerWent(index) if !self.workers.is_empty() => {
                    let (id, ..) = self.workers.remove(index.index(self.workers.len()));
                    schedule.remove_worker(id);
                }
                Event::WorkerAway(index, is_away) if !self.workers.is_empty() => {
                    let id = self.workers[index.index(self.workers.len())].0;
                    schedule.set_away(id, *is_away);
                    match is_away {
                        true => self.away.insert(id),
                        false => self.away.remove(&id),
                    };
                }
                Event::JobCame { tenant: number, priority, needs } => {
                    let needs = set(needs);
                    self.turn += 1;
                    let id = schedule.add_queue(&tenant(*number, *priority), &needs);
                    self.tenants.entry(*number).or_insert(self.turn);
                    self.queues.push(PlainQueue {
                        id,
                        tenant: *number,
                        priority: *priority,
                        needs,
                        turn: self.turn,
                        waiting: Vec::new(),
                        is_held: false,
                        has_left: false,
                    });
                }
                Event::JobWent(index) => {
                    let Some(at) = pick(index, &open) else { return };
                    schedule.remove_queue(self.queues[at].id);
                    self.queues[at].waiting.clear();
                    self.queues[at].has_left = true;
                    self.tidy();
                }
                Event::JobHeld(index) => {
                    let Some(at) = pick(index, &open) else { return };
                    schedule.hold(self.queues[at].id);
                    self.queues[at].is_held = true;
                }
                Event::LayerCame(index, size) => {
                    let Some(at) = pick(index, &open) else { return };
                    let layer = schedule.push(self.queues[at].id, *size);
                    self.queues[at].waiting.push(layer);
                }
                Event::LayerWent(index) => {
                    let Some(at) = pick(index, &open) else { return };
                    if let Some(layer) = self.queues[at].waiting.pop() {
                        schedule.withdraw(self.queues[at].id, layer);
                    }
                }
                Event::LayerEnded(index) if !self.running.is_empty() => {
                    let assignment = self.running.remove(index.index(self.running.len()));
                    schedule.end(assignment);
                    self.tidy();
                }
                Event::Next => {
                    let next = schedule.begin_next();
                    assert_eq!(next, self.next());
                    if let Some(next) = next {
                        self.begin(next);
                    }
                }
                Event::WorkerWent(_) | Event::WorkerAway(..) | Event::LayerEnded(_) => {}
            }
        }
    }

    proptest! {
        /// Whatever comes, goes, begins and ends in whatever order: slots, capabilities, turns and sizes are the rule's.
        #[test]
        fn every_decision_is_the_rules(events in prop::collection::vec(any_event(), 0..120)) {
            let (mut plain, mut schedule) = (Plain::default(), Schedule::default());
            for event in &events {
                plain.apply(&mut schedule, event);
                for (worker, _, slots) in &plain.workers {
                    prop_assert_eq!(schedule.free_slots(*worker), plain.free(*worker, *slots));
                }
            }
            // Then everything that can be done is done, each once.
            plain.apply(&mut schedule, &Event::WorkerCame { offers: vec![0, 1, 2], slots: 1 });
            let open = plain.queues.iter().filter(|queue| !queue.is_held);
            let left: usize = open.map(|queue| queue.waiting.len()).sum();
            let before = plain.began.len();
            for _ in 0..=left {
                plain.apply(&mut schedule, &Event::Next);
                while let Some(assignment) = plain.running.pop() {
                    schedule.end(assignment);
                }
                plain.tidy();
            }
            prop_assert_eq!(plain.began.len() - before, left, "a layer was lost");
            // And nothing is kept of who has gone.
            for queue in &plain.queues {
                schedule.remove_queue(queue.id);
            }
            for (worker, ..) in &plain.workers {
                schedule.remove_worker(*worker);
            }
            let Schedule { tenants, queues, workers, needs, offers, .. } = &schedule;
            prop_assert!(tenants.is_empty() && queues.is_empty() && workers.is_empty());
            prop_assert!(needs.is_empty() && offers.is_empty());
        }

        /// Others keep coming, one for each layer that ends and each larger than everything before, as jobs of the same tenants or
        /// as tenants of their own: everybody who was there first comes to the end.
        #[test]
        fn neither_jobs_nor_tenants_starve(
            jobs in prop::collection::vec((0usize..3, prop::collection::vec(0u64..5, 1..4)), 1..5),
            slots in 1usize..4,
            others_are_tenants in any::<bool>(),
        ) {
            let mut schedule = Schedule::default();
            schedule.add_worker(&set(&[]), slots);
            let mut old = HashSet::new();
            for (number, sizes) in &jobs {
                let queue = schedule.add_queue(&tenant(*number, 0), &set(&[]));
                old.extend(sizes.iter().map(|size| schedule.push(queue, *size).ticket));
            }
            // As many wait at any time as at first, and each of the three tenants goes round at least once in that time.
            let bound = 3 * old.len() * (old.len() + jobs.len() + slots + 2);
            let mut running = VecDeque::new();
            for step in 0..bound {
                let whose = if others_are_tenants { 100 + step } else { step % 3 };
                let queue = schedule.add_queue(&tenant(whose, 0), &set(&[]));
                schedule.push(queue, 1000);
                running.extend(std::iter::from_fn(|| schedule.begin_next()));
                let ended: Assignment = running.pop_front().unwrap();
                old.remove(&ended.ticket);
                schedule.end(ended);
            }
            prop_assert!(old.is_empty(), "{} layers starve", old.len());
        }
    }

    #[test]
    fn a_tenant_of_many_jobs_takes_turns_with_one_of_a_single_job() {
        let mut schedule = Schedule::default();
        schedule.add_worker(&set(&[]), 3);
        for _ in 0..10 {
            let queue = schedule.add_queue(&tenant(1, 0), &set(&[]));
            schedule.push(queue, 9);
        }
        let small = schedule.add_queue(&tenant(2, 0), &set(&[]));
        schedule.push(small, 1);
        let begun: Vec<_> =
            std::iter::from_fn(|| schedule.begin_next()).map(|at| at.queue == small).collect();
        assert_eq!(begun, [false, true, false]);
    }

    #[test]
    fn the_largest_layer_of_a_job_is_first() {
        let mut schedule = Schedule::default();
        schedule.add_worker(&set(&[]), 4);
        let queue = schedule.add_queue(&tenant(1, 0), &set(&[]));
        let tickets: Vec<_> = [3, 9, 0, 3].map(|size| schedule.push(queue, size).ticket).into();
        let begun: Vec<_> = std::iter::from_fn(|| schedule.begin_next()).map(|at| at.ticket).collect();
        assert_eq!(begun, [tickets[1], tickets[0], tickets[3], tickets[2]]);
    }

    #[test]
    fn a_priority_goes_before_its_tenants_others_and_before_nobody_elses() {
        let mut schedule = Schedule::default();
        let mut waits = |number, priority| {
            let queue = schedule.add_queue(&tenant(number, priority), &set(&[]));
            schedule.push(queue, 1);
            schedule.push(queue, 1);
            queue
        };
        let (low, other, high) = (waits(1, -1), waits(2, 0), waits(1, 7));
        schedule.add_worker(&set(&[]), 6);
        let begun: Vec<_> = std::iter::from_fn(|| schedule.begin_next()).map(|at| at.queue).collect();
        assert_eq!(begun, [high, other, high, other, low, low]);
    }
}
