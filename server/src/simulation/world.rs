//! What is the same everywhere in a simulation: chance, drawn from the seed; what happened; what should not have.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use occy_tests::random::Random;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

/// Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct World(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    start: Instant,
    state: Mutex<State>,
    is_loud: bool,
}

#[derive(Debug)]
struct State {
    random: Random,
    log: DefaultHasher,
    violations: Vec<String>,
    counts: std::collections::BTreeMap<&'static str, u64>,
    /// The destination's blobs, by digest.
    blobs: BTreeSet<String>,
}

impl World {
    pub(crate) fn new(seed: u64, is_loud: bool) -> Self {
        let state = State {
            random: Random::new(seed),
            log: DefaultHasher::new(),
            violations: Vec::new(),
            counts: std::collections::BTreeMap::new(),
            blobs: BTreeSet::new(),
        };
        Self(Arc::new(Inner { start: Instant::now(), state: Mutex::new(state), is_loud }))
    }

    pub(crate) fn below(&self, end: u64) -> u64 {
        self.lock().random.below(end)
    }

    pub(crate) fn between(&self, start: u64, end: u64) -> u64 {
        self.lock().random.between(start, end)
    }

    pub(crate) fn index(&self, length: usize) -> usize {
        self.lock().random.index(length)
    }

    /// One of so many times.
    pub(crate) fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn milliseconds(&self, start: u64, end: u64) -> Duration {
        Duration::from_millis(self.between(start, end))
    }

    /// Something happened. What happened, and when, is the same for the same seed.
    pub(crate) fn event(&self, what: &str) {
        let at = self.0.start.elapsed();
        let mut state = self.lock();
        state.log.write_u128(at.as_millis());
        state.log.write(what.as_bytes());
        if self.0.is_loud {
            println!("{:>9} ms  {what}", at.as_millis());
        }
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.lock().counts.entry(what).or_default() += 1;
    }

    pub(crate) fn counts(&self) -> std::collections::BTreeMap<&'static str, u64> {
        self.lock().counts.clone()
    }

    /// A rule was broken.
    pub(crate) fn violated(&self, what: &str) {
        self.event(&format!("VIOLATION {what}"));
        self.lock().violations.push(what.to_owned());
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Everything that happened, in a number.
    pub(crate) fn log(&self) -> u64 {
        self.lock().log.finish()
    }

    pub(crate) fn put_blob(&self, digest: &str) {
        self.lock().blobs.insert(digest.to_owned());
    }

    pub(crate) fn has_blob(&self, digest: &str) -> bool {
        self.lock().blobs.contains(digest)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }
}

/// How a coordinator reaches everybody else. A coordinator that is killed is one that reaches nobody any more, for ever.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    world: World,
    coordinator: usize,
    state: watch::Sender<Condition>,
}

#[derive(Clone, Copy, Debug)]
struct Condition {
    is_dead: bool,
    /// Until then nothing passes, and then all of it.
    held: Instant,
    /// Until then what is sent is lost.
    cut: Instant,
}

/// After which a request that has no answer has failed.
const ANSWER: Duration = Duration::from_secs(2);

impl Link {
    pub(crate) fn new(world: &World, coordinator: usize) -> Self {
        let now = Instant::now();
        let state = watch::Sender::new(Condition { is_dead: false, held: now, cut: now });
        Self { world: world.clone(), coordinator, state }
    }

    pub(crate) fn coordinator(&self) -> usize {
        self.coordinator
    }

    pub(crate) fn kill(&self) {
        self.state.send_modify(|state| state.is_dead = true);
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.now().is_dead
    }

    pub(crate) fn hold(&self, time: Duration) {
        self.state.send_modify(|state| state.held = Instant::now() + time);
    }

    pub(crate) fn cut(&self, time: Duration) {
        self.state.send_modify(|state| state.cut = Instant::now() + time);
    }

    fn now(&self) -> Condition {
        *self.state.borrow()
    }

    /// Waits until the coordinator is killed: what others see of it then is that their connections break.
    pub(crate) async fn dead(&self) {
        // The sender is here.
        let _ = self.state.subscribe().wait_for(|state| state.is_dead).await;
    }

    /// Waits as long as everything takes that leaves or reaches the coordinator.
    pub(crate) async fn delay(&self) {
        let slow = if self.world.once_in(200) { 3000 } else { 15 };
        sleep(self.world.milliseconds(1, slow)).await;
        loop {
            let Condition { is_dead, held, .. } = self.now();
            if is_dead {
                return std::future::pending().await;
            }
            if held <= Instant::now() {
                return;
            }
            sleep_until(held).await;
        }
    }

    /// One way between the coordinator and the engine or a registry.
    pub(crate) async fn pass(&self) -> Result<(), String> {
        self.delay().await;
        if self.now().cut > Instant::now() || self.world.once_in(300) {
            sleep(ANSWER).await;
            self.delay().await;
            return Err("no answer".to_owned());
        }
        Ok(())
    }
}
