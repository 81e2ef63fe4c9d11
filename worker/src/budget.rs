//! Requests to registries, which the coordinator leases: all its workers, and it, share what a registry takes.
//!
//! What is asked for is counted here, and told over the worker's stream by whoever owns that: [`Leases::changed`], [`Leases::uses`].
//! Where nothing limits a registry requests are free: they go without a lease, and only what became of them is told.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use occy_pipeline::registry::{Action, Answer, Budget, Permit, Purpose, RateLimit};
use occy_proto::v1::{BudgetAction, BudgetKey, BudgetLease, BudgetLimit, BudgetRefusal, BudgetUse};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

/// How long a request waits for its lease.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// What nobody waits for is told so late at most.
const LAZY: Duration = Duration::from_millis(250);
/// Refusals in one message.
const REFUSALS_MAX: usize = 64;

/// The leases of one coordinator. Clones are handles on the same ones.
#[derive(Clone, Debug, Default)]
pub struct Leases(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    /// Something has to be told now; soon.
    urgent: Notify,
    soon: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Whether the coordinator leases anything.
    is_there: bool,
    lines: HashMap<Purpose, Line>,
    /// When what nobody waits for has to be told.
    due: Option<Instant>,
}

/// The requests of one purpose.
#[derive(Debug, Default)]
struct Line {
    waiting: VecDeque<oneshot::Sender<Permit>>,
    /// Leased and not ended.
    open: u32,
    free_until: Option<Instant>,
    /// Whether this stream has heard of it.
    is_known: bool,
    untold: Untold,
}

/// What the coordinator has not been told.
#[derive(Debug, Default)]
struct Untold {
    asked: u32,
    ended: u32,
    unused: u32,
    taken: u32,
    refusals: Vec<(Instant, Option<Duration>)>,
    limit: Option<RateLimit>,
}

impl Leases {
    /// A stream has begun, whose coordinator leases requests or does not.
    pub fn connect(&self, leases_budgets: bool) {
        let mut state = self.lock();
        state.is_there = leases_budgets;
        if !leases_budgets {
            // They keep a pace of their own; nobody counts them.
            for waiting in state.lines.drain().flat_map(|(_, line)| line.waiting) {
                // Who has stopped waiting needs no permit.
                let _ = waiting.send(Permit::new(|| {}));
            }
        }
        for line in state.lines.values_mut() {
            line.is_known = false;
            line.untold = Untold { asked: count(line.waiting.len()), ..Untold::default() };
        }
        drop(state);
        self.0.urgent.notify_one();
    }

    /// Waits until there is something to tell.
    ///
    /// # Cancel safety
    /// Cancelled, it has forgotten nothing: `uses` has all of it.
    pub async fn changed(&self) {
        loop {
            let due = self.lock().due;
            let due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.0.urgent.notified() => return,
                () = due => return,
                // It is known when, now.
                () = self.0.soon.notified() => {}
            }
        }
    }

    /// What there is to tell. It counts as told.
    pub fn uses(&self) -> Vec<BudgetUse> {
        let now = Instant::now();
        let mut state = self.lock();
        state.due = None;
        let uses = state.lines.iter_mut().filter_map(|(purpose, line)| line.told(purpose, now)).collect();
        state.lines.retain(|_, line| {
            !line.waiting.is_empty() || line.open > 0 || line.free_until.is_some_and(|until| until > now)
        });
        uses
    }

    /// What the coordinator has leased.
    pub fn lease(&self, lease: &BudgetLease) {
        let Some(purpose) = lease.key.as_ref().and_then(purpose) else { return };
        let mut state = self.lock();
        let free_for = lease.free_for.and_then(|time| Duration::try_from(time).ok());
        let line = state.lines.entry(purpose.clone()).or_default();
        line.free_until = free_for.map(|time| Instant::now() + time);
        let mut unclaimed = Vec::new();
        let mut give = |line: &mut Line, mut permit: Permit| {
            while let Some(waiting) = line.waiting.pop_front() {
                match waiting.send(permit) {
                    Ok(()) => return true,
                    Err(back) => permit = back,
                }
            }
            unclaimed.push(permit);
            false
        };
        for _ in 0..lease.requests {
            line.open += 1;
            let permit = self.permit(&purpose);
            if !give(line, permit) {
                line.untold.unused += 1;
            }
        }
        while free_for.is_some() && !line.waiting.is_empty() {
            give(line, Permit::new(|| {}));
        }
        drop(state);
        // Their ends are told, for which the lock is needed.
        drop(unclaimed);
    }

    fn permit(&self, purpose: &Purpose) -> Permit {
        let (leases, purpose) = (self.clone(), purpose.clone());
        Permit::new(move || {
            if let Some(line) = leases.lock().lines.get_mut(&purpose) {
                line.open = line.open.saturating_sub(1);
                line.untold.ended += 1;
            }
            leases.0.urgent.notify_one();
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn told(&mut self, purpose: &Purpose, now: Instant) -> Option<BudgetUse> {
        let Untold { asked, ended, unused, taken, refusals, limit } = std::mem::take(&mut self.untold);
        let is_new = !std::mem::replace(&mut self.is_known, true) && (self.open > 0 || asked > 0);
        let is_nothing = asked == 0 && ended == 0 && taken == 0 && refusals.is_empty() && limit.is_none();
        if is_nothing && !is_new {
            return None;
        }
        let duration = |time: Duration| time.try_into().ok();
        let refusals = refusals.into_iter().map(|(sent, retry_after)| BudgetRefusal {
            age: duration(now.saturating_duration_since(sent)),
            retry_after: retry_after.and_then(duration),
        });
        Some(BudgetUse {
            key: Some(key(purpose)),
            asked,
            ended,
            unused,
            taken,
            refusals: refusals.collect(),
            limit: limit.map(|RateLimit { remaining, reset }| BudgetLimit {
                remaining,
                reset: reset.and_then(duration),
            }),
            open: is_new.then_some(self.open),
        })
    }
}

#[async_trait::async_trait]
impl Budget for Leases {
    fn is_there(&self) -> bool {
        self.lock().is_there
    }

    async fn begin(&self, purpose: &Purpose) -> Result<Permit, String> {
        let leased = {
            let mut state = self.lock();
            let line = state.lines.entry(purpose.clone()).or_default();
            if line.free_until.is_some_and(|until| until > Instant::now()) {
                return Ok(Permit::new(|| {}));
            }
            let (sender, leased) = oneshot::channel();
            line.waiting.push_back(sender);
            line.untold.asked += 1;
            leased
        };
        self.0.urgent.notify_one();
        match timeout(PATIENCE, leased).await {
            Ok(Ok(permit)) => Ok(permit),
            // What waits is kept until it is served or has stopped waiting.
            Ok(Err(_)) => Err("the coordinator's leases are gone".to_owned()),
            Err(_) => Err(format!("the coordinator leased no request to it within {PATIENCE:?}")),
        }
    }

    fn answered(&self, purpose: &Purpose, answer: Answer) {
        let mut state = self.lock();
        let line = state.lines.entry(purpose.clone()).or_default();
        if let Some(limit) = answer.left {
            line.untold.limit = Some(limit);
        }
        if !answer.is_refusal {
            line.untold.taken += 1;
        } else if line.untold.refusals.len() < REFUSALS_MAX {
            line.untold.refusals.push((answer.sent, answer.retry_after));
        }
        state.due.get_or_insert_with(|| Instant::now() + LAZY);
        drop(state);
        if answer.is_refusal { self.0.urgent.notify_one() } else { self.0.soon.notify_one() }
    }
}

/// As the API has it.
pub fn key(purpose: &Purpose) -> BudgetKey {
    let action = match purpose.action {
        Action::Manifest => BudgetAction::Manifest,
        Action::Pull => BudgetAction::Pull,
        Action::Push => BudgetAction::Push,
    };
    BudgetKey { host: purpose.host.clone(), account: purpose.account.clone(), action: action.into() }
}

/// And back. None for what is not known.
pub fn purpose(key: &BudgetKey) -> Option<Purpose> {
    let action = match key.action() {
        BudgetAction::Manifest => Action::Manifest,
        BudgetAction::Pull => Action::Pull,
        BudgetAction::Push => Action::Push,
        BudgetAction::Unspecified => return None,
    };
    Some(Purpose { host: key.host.clone(), account: key.account.clone(), action })
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pull() -> Purpose {
        Purpose { host: "registry".to_owned(), account: String::new(), action: Action::Pull }
    }

    fn lease(leases: &Leases, requests: u32, free_for: Option<u64>) {
        let free_for = free_for.and_then(|seconds| Duration::from_secs(seconds).try_into().ok());
        leases.lease(&BudgetLease { key: Some(key(&pull())), requests, free_for });
    }

    /// Asked, ended, unused, open.
    fn told(leases: &Leases) -> Vec<(u32, u32, u32, Option<u32>)> {
        let uses = leases.uses();
        uses.iter().map(|told| (told.asked, told.ended, told.unused, told.open)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn requests_wait_for_leases_and_what_is_not_needed_is_given_back() {
        let leases = Leases::default();
        leases.connect(true);
        let begin = || {
            let leases = leases.clone();
            tokio::spawn(async move { leases.begin(&pull()).await })
        };
        let (one, two, three) = (begin(), begin(), begin());
        tokio::task::yield_now().await;
        leases.changed().await;
        assert_eq!(told(&leases), [(3, 0, 0, Some(0))]);
        one.abort();
        assert!(one.await.is_err());
        lease(&leases, 1, None);
        let permit = two.await.unwrap().unwrap();
        assert_eq!(told(&leases), []);
        // One is there for the third, and one for whoever has gone.
        lease(&leases, 2, None);
        assert_eq!(told(&leases), [(0, 1, 1, None)]);
        drop(permit);
        assert_eq!(told(&leases), [(0, 1, 0, None)]);
        // On another stream, it says again what it has.
        let waiting = begin();
        tokio::task::yield_now().await;
        leases.connect(true);
        assert_eq!(told(&leases), [(1, 0, 0, Some(1))]);
        drop(three.await.unwrap().unwrap());
        // Free, nobody is asked.
        lease(&leases, 0, Some(5));
        drop(waiting.await.unwrap().unwrap());
        drop(leases.begin(&pull()).await.unwrap());
        assert_eq!(told(&leases), [(0, 1, 0, None)]);
        lease(&leases, 0, None);
        let error = leases.begin(&pull()).await.unwrap_err();
        assert!(error.contains("600"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_coordinator_that_leases_nothing_keeps_nobody_waiting() {
        let leases = Leases::default();
        leases.connect(true);
        let waiting = {
            let leases = leases.clone();
            tokio::spawn(async move { leases.begin(&pull()).await })
        };
        tokio::task::yield_now().await;
        leases.connect(false);
        assert!(waiting.await.unwrap().is_ok());
        assert!(!leases.is_there());
    }
}
