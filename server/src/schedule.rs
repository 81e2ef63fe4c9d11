//! Which waiting layer goes to which free worker: a pure function of queue and fleet.
//!
//! A layer goes only where everything that it needs is offered. Among jobs, the one with the fewest layers at work is next; of
//! two, the one whose last turn, or whose arrival, was longer ago. So a job of a thousand layers takes turns with one of a single
//! layer, who comes later stands behind who waits already, and nobody waits for ever. Within a job the largest layer is next:
//! the small ones then fill the gaps at the end. Among workers, the one with the most free slots is next.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;

/// What a worker must offer, or offers: `filter:exclude`, `output:registry`, `codec:gzip`.
pub type Capabilities = Arc<BTreeSet<String>>;

/// A layer that waits. Larger ones come first, and of equal ones the one that came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WaitingLayer {
    /// Bytes to read; 0 where nobody knows.
    pub size: Reverse<u64>,
    /// Its place in the order of arrival, unique in the fleet.
    pub ticket: u64,
}

/// The layers of one job, or of one call.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Its name, unique in the fleet.
    pub id: u64,
    /// When it arrived, or had its last turn, in the fleet's count.
    pub turn: u64,
    /// What its layers need.
    pub needs: Capabilities,
    /// How many of its layers workers have now.
    pub running: usize,
    /// Its layers that wait.
    pub waiting: BTreeSet<WaitingLayer>,
}

/// A worker.
#[derive(Clone, Debug)]
pub struct Worker {
    /// What it offers.
    pub offers: Capabilities,
    /// How many more layers it can take now.
    pub free: usize,
}

/// A layer and its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The job's [`Queue::id`].
    pub queue: u64,
    /// The layer's ticket.
    pub ticket: u64,
    /// The worker's place in the list.
    pub worker: usize,
}

/// Everything that can be begun now.
pub fn assign<'a>(queues: impl IntoIterator<Item = &'a Queue>, workers: &[Worker]) -> Vec<Assignment> {
    let mut free: Vec<usize> = workers.iter().map(|worker| worker.free).collect();
    let mut assignments = Vec::new();
    // By layers at work, then by turn; those who have a turn now stand behind all others, in order. A queue whose needs nobody
    // meets any more leaves the set.
    let mut next: BTreeSet<(usize, usize, u64, usize)> = BTreeSet::new();
    let queues: Vec<_> = queues.into_iter().filter(|queue| !queue.waiting.is_empty()).collect();
    let mut layers: Vec<_> = queues.iter().map(|queue| queue.waiting.iter()).collect();
    next.extend(queues.iter().enumerate().map(|(at, queue)| (queue.running, 0, queue.turn, at)));
    while free.iter().any(|&free| free > 0) {
        let Some((running, _, turn, at)) = next.pop_first() else { break };
        let fits = |worker: &usize| free[*worker] > 0 && queues[at].needs.is_subset(&workers[*worker].offers);
        let Some(worker) = (0..workers.len()).filter(fits).max_by_key(|&w| (free[w], Reverse(w))) else {
            continue;
        };
        if let Some(layer) = layers[at].next() {
            free[worker] -= 1;
            assignments.push(Assignment { queue: queues[at].id, ticket: layer.ticket, worker });
            next.insert((running + 1, assignments.len(), turn, at));
        }
    }
    assignments
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    fn set(words: &[usize]) -> Capabilities {
        Arc::new(words.iter().map(|word| format!("filter:{word}")).collect())
    }

    prop_compose! {
        fn any_queues()(
            jobs in prop::collection::vec(
                (prop::collection::vec(0usize..3, 0..3), prop::collection::vec(0u64..5, 0..8), 0usize..3),
                0..8,
            )
        ) -> Vec<Queue> {
            let mut ticket = 0;
            jobs.into_iter().enumerate().map(|(id, (needs, sizes, running))| Queue {
                id: id as u64,
                turn: id as u64,
                needs: set(&needs),
                running,
                waiting: sizes.into_iter().map(|size| {
                    ticket += 1;
                    WaitingLayer { size: Reverse(size), ticket }
                }).collect(),
            }).collect()
        }
    }

    prop_compose! {
        fn any_workers()(
            workers in prop::collection::vec((prop::collection::vec(0usize..3, 0..4), 0usize..4), 0..6)
        ) -> Vec<Worker> {
            workers.into_iter().map(|(offers, free)| Worker { offers: set(&offers), free }).collect()
        }
    }

    proptest! {
        #[test]
        fn slots_and_capabilities_are_respected_and_no_layer_goes_twice(
            queues in any_queues(), workers in any_workers()
        ) {
            let assignments = assign(&queues, &workers);
            let mut used = vec![0; workers.len()];
            let mut seen = HashSet::new();
            for assignment in &assignments {
                let queue = queues.iter().find(|queue| queue.id == assignment.queue).unwrap();
                prop_assert!(queue.waiting.iter().any(|layer| layer.ticket == assignment.ticket));
                prop_assert!(queue.needs.is_subset(&workers[assignment.worker].offers));
                prop_assert!(seen.insert(assignment.ticket));
                used[assignment.worker] += 1;
            }
            for (used, worker) in used.iter().zip(&workers) {
                prop_assert!(*used <= worker.free);
            }
        }

        #[test]
        fn nothing_waits_that_a_free_worker_could_do(queues in any_queues(), workers in any_workers()) {
            let assignments = assign(&queues, &workers);
            for (at, worker) in workers.iter().enumerate() {
                let used = assignments.iter().filter(|assignment| assignment.worker == at).count();
                for queue in &queues {
                    let begun = assignments.iter().filter(|assignment| assignment.queue == queue.id).count();
                    let waits = begun < queue.waiting.len() && queue.needs.is_subset(&worker.offers);
                    prop_assert!(!waits || used == worker.free, "queue {} and worker {at}", queue.id);
                }
            }
        }

        #[test]
        fn the_largest_layer_of_a_job_is_first(queues in any_queues(), workers in any_workers()) {
            let assignments = assign(&queues, &workers);
            for queue in &queues {
                let begun: Vec<_> = assignments.iter().filter(|a| a.queue == queue.id).map(|a| a.ticket).collect();
                let first: Vec<_> = queue.waiting.iter().take(begun.len()).map(|layer| layer.ticket).collect();
                prop_assert_eq!(begun, first);
            }
        }

        /// Workers finish in any order, a layer a step, and new jobs keep coming: who has no layer at work gets one after so many
        /// steps at most as there were jobs that waited when it began to.
        #[test]
        fn no_job_starves_and_every_layer_is_done(
            queues in any_queues(), slots in 1usize..3, finish in prop::collection::vec(0usize..100, 400)
        ) {
            let all = set(&[0, 1, 2]);
            let total: usize = queues.iter().map(|queue| queue.waiting.len()).sum();
            let mut queues: BTreeMap<u64, Queue> =
                queues.into_iter().map(|queue| (queue.id, Queue { running: 0, ..queue })).collect();
            let old: Vec<u64> = queues.keys().copied().collect();
            let mut running: Vec<(u64, u64)> = Vec::new();
            let mut done = HashSet::new();
            let mut turn = old.len() as u64;
            let mut waited: HashMap<u64, (usize, usize)> = HashMap::new();
            for (step, choice) in finish.iter().enumerate() {
                // An intruder a step, larger than everything.
                let id = 1000 + step as u64;
                if step < 100 {
                    let layer = WaitingLayer { size: Reverse(1000), ticket: id };
                    let queue = Queue { id, turn, needs: all.clone(), running: 0, waiting: [layer].into() };
                    turn += 1;
                    queues.insert(id, queue);
                }
                let workers = [Worker { offers: all.clone(), free: slots - running.len() }];
                for assignment in assign(queues.values(), &workers) {
                    let queue = queues.get_mut(&assignment.queue).unwrap();
                    queue.waiting.retain(|layer| layer.ticket != assignment.ticket);
                    queue.running += 1;
                    queue.turn = turn;
                    turn += 1;
                    running.push((assignment.queue, assignment.ticket));
                }
                let line = queues.values().filter(|queue| !queue.waiting.is_empty()).count();
                for id in &old {
                    let queue = &queues[id];
                    if queue.running > 0 || queue.waiting.is_empty() {
                        waited.remove(id);
                        continue;
                    }
                    let (since, before) = *waited.entry(*id).or_insert((step, line));
                    prop_assert!(step - since <= before, "job {id} starves");
                }
                if !running.is_empty() {
                    let (id, ticket) = running.swap_remove(choice % running.len());
                    queues.get_mut(&id).unwrap().running -= 1;
                    done.insert(ticket);
                }
            }
            prop_assert_eq!(done.len(), total + 100);
        }
    }
}
