//! What befalls a fleet, one fault after the other without end: drawn from a seed, so that the same seed gives the same again.
//!
//! Nothing is done here, and nobody is struck twice at once. Of the engine's servers one at a time is out of order or cut off from
//! another: with two of three it goes on.

use std::collections::BTreeMap;
use std::time::Duration;

use occy_tests::network::Lost;
use occy_tests::random::Random;

use super::{COORDINATORS, ENGINES, REGISTRIES, WORKERS};
use crate::schedules::plan::{ENGINE_LEASE, LEASE};

/// A process of the fleet, which has a node of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Member {
    Engine(usize),
    Coordinator(usize),
    Worker(usize),
    Registry(usize),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Kill(Member),
    /// SIGTERM, for one that ends by itself then.
    Drain(Member),
    /// Again, after it was killed or drained.
    Start(Member),
    Stop(Member),
    Continue(Member),
    Cut(Member, Member, Lost),
    Join(Member, Member, Lost),
}

/// Who is struck by a fault, with the engine as one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Engine,
    Other(Member),
}

/// A fault: what it is called, and its steps, each with the time after the fleet has begun.
pub(super) struct Fault {
    pub(super) name: &'static str,
    pub(super) steps: Vec<(Duration, Step)>,
}

/// All faults of a seed, by the time of their first steps.
pub(super) struct Faults {
    random: Random,
    at: u64,
    /// Until when somebody is out of order, or has not come back yet.
    busy: BTreeMap<Subject, u64>,
}

impl Faults {
    pub(super) fn of(seed: u64) -> Self {
        Self { random: Random::new(seed), at: 0, busy: BTreeMap::new() }
    }
}

impl Iterator for Faults {
    type Item = Fault;

    fn next(&mut self) -> Option<Fault> {
        loop {
            self.at += self.random.between(300, 1200);
            let (name, subjects, steps) = fault(&mut self.random);
            let is_busy = |subject| self.busy.get(subject).is_some_and(|until| *until > self.at);
            if subjects.iter().any(is_busy) {
                continue;
            }
            // It has to find its way back before the next one.
            let until = self.at + steps.last().map_or(0, |(after, _)| *after) + 2000;
            self.busy.extend(subjects.into_iter().map(|subject| (subject, until)));
            let steps = steps.into_iter().map(|(after, step)| (Duration::from_millis(self.at + after), step));
            return Some(Fault { name, steps: steps.collect() });
        }
    }
}

/// What it is called, who is struck, and what happens how many milliseconds after it begins.
fn fault(random: &mut Random) -> (&'static str, Vec<Subject>, Vec<(u64, Step)>) {
    let worker = Member::Worker(random.index(WORKERS));
    let coordinator = Member::Coordinator(random.index(COORDINATORS));
    let registry = Member::Registry(random.index(REGISTRIES));
    let engine = random.index(ENGINES);
    let another = Member::Engine((engine + 1 + random.index(ENGINES - 1)) % ENGINES);
    let engine = Member::Engine(engine);
    let down = random.between(100, 1500);
    let silence = LEASE * 1000 + random.between(300, 1500);
    let long_silence = ENGINE_LEASE * 1000 + random.between(500, 2000);
    let killed = |member| vec![(0, Step::Kill(member)), (down, Step::Start(member))];
    let drained = |member| vec![(0, Step::Drain(member)), (long_silence, Step::Start(member))];
    let stopped = |member, silence| vec![(0, Step::Stop(member)), (silence, Step::Continue(member))];
    let other = Subject::Other;
    match random.below(16) {
        0 => ("SIGKILL of a worker", vec![other(worker)], killed(worker)),
        1 => ("SIGTERM of a worker", vec![other(worker)], drained(worker)),
        2 => ("SIGSTOP of a worker past its lease", vec![other(worker)], stopped(worker, silence)),
        3 => ("SIGKILL of a coordinator", vec![other(coordinator)], killed(coordinator)),
        4 => ("SIGTERM of a coordinator", vec![other(coordinator)], drained(coordinator)),
        5 => {
            let steps = stopped(coordinator, long_silence);
            ("SIGSTOP of a coordinator past its lease", vec![other(coordinator)], steps)
        }
        6 => ("SIGKILL of a server of the engine", vec![Subject::Engine], killed(engine)),
        7 => ("SIGSTOP of a server of the engine", vec![Subject::Engine], stopped(engine, silence)),
        8 => ("SIGKILL of a registry", vec![other(registry)], killed(registry)),
        9 => ("SIGSTOP of a registry", vec![other(registry)], stopped(registry, down)),
        number => {
            let (name, one, two) = match number {
                10 => ("engine and engine cut off", engine, another),
                11 | 12 => ("coordinator and engine cut off", coordinator, engine),
                13 => ("worker and coordinator cut off", worker, coordinator),
                14 => ("worker and registry cut off", worker, registry),
                _ => ("coordinator and registry cut off", coordinator, registry),
            };
            let lost = random.pick(&[Lost::All, Lost::There, Lost::Back]);
            let subject = |member| match member {
                Member::Engine(_) => Subject::Engine,
                member => Subject::Other(member),
            };
            let steps = vec![(0, Step::Cut(one, two, lost)), (long_silence, Step::Join(one, two, lost))];
            (name, vec![subject(one), subject(two)], steps)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_faults_again_and_every_kind_of_them() {
        let names = |seed| Faults::of(seed).take(400).map(|fault| fault.name).collect::<Vec<_>>();
        assert_eq!(names(1), names(1));
        assert_ne!(names(1), names(2));
        let kinds: std::collections::BTreeSet<_> = names(1).into_iter().collect();
        assert_eq!(kinds.len(), 15);
    }
}
