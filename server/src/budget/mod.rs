//! What all processes of a fleet together ask of registries: the coordinator has a budget for each account at each registry, and
//! leases requests to its workers, and to itself.
//!
//! | what | where |
//! |---|---|
//! | what is configured | `rules` |
//! | what one account may ask of one registry, and who is next | `ledger`, pure |
//! | who waits for it: this process, and workers behind their streams | here |
//!
//! Coordinators that share their jobs share what is configured as well: from a quota all of them draw, and of all else each has its part,
//! by how many there are. What a registry was found to refuse each of them finds out for itself, and comes to its part of that, as processes do that know nothing of each other.

pub mod ledger;
pub mod rules;

use std::collections::{HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, FuturesUnordered, StreamExt};
use jiff::Timestamp;
use occy_pipeline::registry::{Answer, Budget, Permit, Purpose, RateLimit};
use occy_proto::v1::{BudgetLease, BudgetUse};
use occy_worker::budget::{PATIENCE, key, purpose};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use self::ledger::{Ledger, LineName, Obstacle, Want};
use self::rules::Rules;
use crate::engine::quotas::{Drawn, Quota, Quotas};
use crate::metrics::Metrics;
use crate::worker::seat::RemoteSeat;

/// Who this process is in the ledgers; workers' numbers are greater.
pub const HERE: u64 = 0;
/// How long requests may go without being asked for, where nothing limits them.
const FREE: Duration = Duration::from_secs(60);
/// How often a lease is told again that its worker could not take.
const AGAIN: Duration = Duration::from_millis(20);
/// A wait is told of that is longer than that.
const NOTICED: Duration = Duration::from_secs(2);
/// Ledgers beyond which those are forgotten that nothing has to be remembered of.
const LEDGERS_MAX: usize = 1024;
/// Quotas to which something is put back at once.
const PUT_BACK_AT_ONCE: usize = 8;
/// Bytes of a worker's names.
const NAME_MAX: usize = 256;

/// The budgets of a coordinator. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Budgets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    changed: Notify,
    metrics: Metrics,
}

/// A registry, and whose account there.
type Account = (String, String);

#[derive(Debug)]
struct State {
    rules: Rules,
    /// Coordinators that share what is configured.
    coordinators: usize,
    ledgers: HashMap<Account, Ledger>,
    /// Requests of this process that wait.
    waiting: HashMap<Purpose, VecDeque<(Instant, oneshot::Sender<Permit>)>>,
    seats: HashMap<u64, RemoteSeat>,
    /// What workers have to be told: begun requests, and whether others are free.
    untold: HashMap<(u64, Purpose), u32>,
    /// Who was told that requests are free.
    free: HashSet<(u64, Purpose)>,
    /// Of workers that have come back: what they have said what they have of.
    returned: HashMap<u64, HashSet<Purpose>>,
    /// Nothing more is drawn from quotas.
    is_closed: bool,
}

/// What is limited, for whoever watches.
#[derive(Clone, Debug)]
pub struct Limited {
    /// The registry.
    pub host: String,
    /// Whose requests.
    pub account: String,
    /// Requests a second, where that is limited.
    pub rate: Option<f64>,
    /// Requests that wait.
    pub waiting: usize,
}

impl Budgets {
    /// Without any limits, which counts there.
    pub fn new(metrics: Metrics) -> Self {
        let state = State {
            rules: Rules::default(),
            coordinators: 1,
            ledgers: HashMap::new(),
            waiting: HashMap::new(),
            seats: HashMap::new(),
            untold: HashMap::new(),
            free: HashSet::new(),
            returned: HashMap::new(),
            is_closed: false,
        };
        Self(Arc::new(Inner { state: Mutex::new(state), changed: Notify::new(), metrics }))
    }

    /// With these limits.
    pub fn configure(&self, rules: Rules) {
        let mut state = self.lock();
        state.rules = rules;
        state.share();
    }

    /// So many coordinators share what is configured.
    pub fn share(&self, coordinators: usize) {
        let mut state = self.lock();
        if state.coordinators == coordinators {
            return;
        }
        tracing::info!(coordinators, "limits of registries are shared by as many coordinators");
        state.coordinators = coordinators;
        state.share();
        drop(state);
        self.0.changed.notify_one();
    }

    /// Begins what may begin, whenever it may, and draws from quotas what is wanted of them.
    pub async fn keep_leasing(&self, quotas: &dyn Quotas) -> Infallible {
        let mut draws = FuturesUnordered::new();
        loop {
            let next = self.lease();
            draws.extend(self.wants().into_iter().map(|(whose, want)| self.draw(quotas, whose, want)));
            let due = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.0.changed.notified() => {}
                Some(()) = draws.next() => {}
                () = due => {}
            }
        }
    }

    /// Draws nothing more from quotas, and puts back what was drawn and has not begun; what is being drawn is put back when it has come,
    /// as long as [`Budgets::keep_leasing`] goes on.
    pub async fn close(&self, quotas: &dyn Quotas) {
        let undrawn: Vec<_> = {
            let mut state = self.lock();
            state.is_closed = true;
            let each = state.ledgers.iter_mut().flat_map(|(whose, ledger)| {
                ledger.undraw().into_iter().map(|(line, quota, drawn)| (named(whose, line, quota), drawn))
            });
            each.collect()
        };
        let put_back = |(quota, drawn)| put_back(quotas, quota, drawn);
        stream::iter(undrawn).for_each_concurrent(PUT_BACK_AT_ONCE, put_back).await;
    }

    /// What is wanted of quotas.
    fn wants(&self) -> Vec<(Account, Want)> {
        let now = Instant::now();
        let mut state = self.lock();
        if state.is_closed {
            return Vec::new();
        }
        let wanted = state
            .ledgers
            .iter_mut()
            .flat_map(|(whose, ledger)| ledger.wants(now).into_iter().map(|want| (whose.clone(), want)));
        wanted.collect()
    }

    async fn draw(&self, quotas: &dyn Quotas, whose: Account, want: Want) {
        let quota = named(&whose, want.line, want.quota);
        let drawn = quotas.draw(&quota, want.count).await;
        let now = Instant::now();
        let drawn = drawn.map(|drawn| {
            let left = Duration::try_from(drawn.ends.duration_since(Timestamp::now())).unwrap_or_default();
            (drawn, now + left)
        });
        if let Err(error) = &drawn {
            tracing::warn!(%error, registry = whose.0, "a quota could not be drawn from");
        }
        {
            let mut state = self.lock();
            if !state.is_closed {
                if let Some(ledger) = state.ledgers.get_mut(&whose) {
                    ledger.drew(want, drawn.ok(), now);
                }
                return;
            }
        }
        if let Ok((drawn, _)) = drawn {
            put_back(quotas, quota, drawn).await;
        }
    }

    /// A worker's stream is there: what it asks for is told there.
    pub fn seat(&self, worker: u64, seat: &RemoteSeat) {
        let mut state = self.lock();
        state.seats.insert(worker, seat.clone());
        state.returned.insert(worker, HashSet::new());
    }

    /// A worker has said what it has. What it was leased on an earlier stream, and does not know of, is not its any more.
    pub fn settle(&self, worker: u64) {
        let mut state = self.lock();
        let Some(said) = state.returned.remove(&worker) else { return };
        for ((host, account), ledger) in &mut state.ledgers {
            for action in ledger::ACTIONS {
                if !said.contains(&Purpose { host: host.clone(), account: account.clone(), action }) {
                    ledger.reset(worker, action, 0);
                }
            }
        }
        drop(state);
        self.0.changed.notify_one();
    }

    /// A worker is gone, and its requests with it.
    pub fn leave(&self, worker: u64) {
        let mut state = self.lock();
        state.seats.remove(&worker);
        state.returned.remove(&worker);
        state.untold.retain(|(who, _), _| *who != worker);
        state.free.retain(|(who, _)| *who != worker);
        state.ledgers.values_mut().for_each(|ledger| ledger.leave(worker));
        drop(state);
        self.0.changed.notify_one();
    }

    /// What a worker says.
    pub fn used(&self, worker: u64, told: &BudgetUse) -> Result<(), &'static str> {
        let purpose = told.key.as_ref().and_then(purpose).ok_or("expected a key with an action")?;
        if purpose.host.len() > NAME_MAX || purpose.account.len() > NAME_MAX {
            return Err("expected a key of at most 256 bytes a name");
        }
        let now = Instant::now();
        let mut state = self.lock();
        if told.open.is_some() {
            // Whatever was to be told of it on another stream.
            state.untold.remove(&(worker, purpose.clone()));
            state.free.remove(&(worker, purpose.clone()));
            if let Some(said) = state.returned.get_mut(&worker) {
                said.insert(purpose.clone());
            }
        }
        let (action, ledger) = (purpose.action, state.ledger(&purpose, now));
        if let Some(open) = told.open {
            ledger.reset(worker, action, open as usize);
        }
        ledger.end(worker, action, told.ended as usize, told.unused as usize, now);
        ledger.taken(told.taken as usize, now);
        let duration = |time: prost_types::Duration| Duration::try_from(time).ok();
        for refusal in &told.refusals {
            let age = refusal.age.and_then(duration).unwrap_or_default();
            let sent = now.checked_sub(age).unwrap_or(now);
            ledger.refused(action, sent, refusal.retry_after.and_then(duration), now);
        }
        if let Some(limit) = told.limit {
            let left = RateLimit { remaining: limit.remaining, reset: limit.reset.and_then(duration) };
            ledger.left(action, left, now);
        }
        ledger.ask(worker, action, told.asked as usize, now);
        if told.asked > 0 && ledger.is_free(action, now) {
            // It is told anew, for how long it is so.
            state.free.remove(&(worker, purpose.clone()));
            state.untold.entry((worker, purpose)).or_default();
        }
        drop(state);
        self.0.metrics.budget_refused(told.refusals.len());
        self.0.changed.notify_one();
        Ok(())
    }

    /// What somebody's request to one of these registries waits for, where it has waited for a while.
    pub fn waits(&self, who: u64, hosts: &[&str]) -> Option<String> {
        let now = Instant::now();
        let since = now.checked_sub(NOTICED)?;
        let mut state = self.lock();
        let mut its = state.ledgers.iter_mut().filter(|((host, _), _)| hosts.contains(&host.as_str()));
        its.find_map(|((host, _), ledger)| {
            let obstacle: Obstacle = ledger.waits(who, since, now)?;
            Some(format!("waits for the registry {host}: {}", obstacle.describe(now)))
        })
    }

    /// What is limited now.
    pub fn limited(&self) -> Vec<Limited> {
        let state = self.lock();
        let all = state.ledgers.iter().map(|((host, account), ledger)| Limited {
            host: host.clone(),
            account: account.clone(),
            rate: ledger.rate(),
            waiting: ledger.waiting(),
        });
        all.filter(|limited| limited.rate.is_some() || limited.waiting > 0).collect()
    }

    /// Begins what may begin now, and says when to look again.
    fn lease(&self) -> Option<Instant> {
        let now = Instant::now();
        let (next, here) = self.lock().begin(now);
        for (purpose, since, waiting) in here {
            self.0.metrics.budget_waited(now.saturating_duration_since(since));
            // Who has stopped waiting gives it back by dropping it.
            let _ = waiting.send(self.permit(purpose));
        }
        next
    }

    /// The right to a request that has begun here.
    fn permit(&self, purpose: Purpose) -> Permit {
        let budgets = self.clone();
        Permit::new(move || {
            let now = Instant::now();
            budgets.lock().ledger(&purpose, now).end(HERE, purpose.action, 1, 0, now);
            budgets.0.changed.notify_one();
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The quota of a line, under the name that all coordinators know it by. Neither a host nor a line has a line feed.
fn named((host, account): &Account, line: LineName, (limit, time): (u64, Duration)) -> Quota {
    Quota { name: format!("{host}\n{account}\n{line}"), limit, time }
}

async fn put_back(quotas: &dyn Quotas, quota: Quota, drawn: Drawn) {
    if let Err(error) = quotas.put_back(&quota, drawn).await {
        tracing::warn!(%error, requests = drawn.count, "what was left of a quota is lost");
    }
}

/// A request of this process that has begun: for what, since when it waited, and where that is heard.
type Begun = (Purpose, Instant, oneshot::Sender<Permit>);

impl State {
    fn ledger(&mut self, purpose: &Purpose, now: Instant) -> &mut Ledger {
        if self.ledgers.len() >= LEDGERS_MAX {
            self.ledgers.retain(|_, ledger| !ledger.is_idle(now));
        }
        let Self { rules, coordinators, ledgers, .. } = self;
        ledgers.entry((purpose.host.clone(), purpose.account.clone())).or_insert_with(|| {
            Ledger::new(&purpose.host, rules.limits(&purpose.host, &purpose.account, *coordinators), now)
        })
    }

    /// Ledgers have the limits that are configured.
    fn share(&mut self) {
        let Self { rules, coordinators, ledgers, .. } = self;
        for ((host, account), ledger) in ledgers {
            ledger.set_limits(rules.limits(host, account, *coordinators), Instant::now());
        }
    }

    fn begin(&mut self, now: Instant) -> (Option<Instant>, Vec<Begun>) {
        let (mut next, mut here): (Option<Instant>, _) = (None, Vec::new());
        let Self { ledgers, waiting, untold, free, .. } = self;
        for ((host, account), ledger) in ledgers.iter_mut() {
            let of = |action| Purpose { host: host.clone(), account: account.clone(), action };
            loop {
                let (begun, due) = ledger.begin(now);
                let mut is_done = true;
                for (who, action) in begun {
                    let purpose = of(action);
                    if who != HERE {
                        *untold.entry((who, purpose)).or_default() += 1;
                        continue;
                    }
                    match waiting.get_mut(&purpose).and_then(VecDeque::pop_front) {
                        Some((since, waiter)) => here.push((purpose, since, waiter)),
                        None => {
                            ledger.end(HERE, action, 1, 1, now);
                            is_done = false;
                        }
                    }
                }
                if is_done {
                    next = [next, due].into_iter().flatten().min();
                    break;
                }
            }
            // What was free and is not any more.
            for (who, purpose) in
                free.iter().filter(|(_, purpose)| purpose.host == *host && purpose.account == *account)
            {
                if !ledger.is_free(purpose.action, now) {
                    untold.entry((*who, purpose.clone())).or_default();
                }
            }
        }
        waiting.retain(|_, waiting| !waiting.is_empty());
        if !self.tell(now) {
            next = [next, Some(now + AGAIN)].into_iter().flatten().min();
        }
        (next, here)
    }

    /// Tells workers what they have to hear. False: not all of them could be told.
    fn tell(&mut self, now: Instant) -> bool {
        let Self { ledgers, untold, free, seats, .. } = self;
        untold.retain(|(who, purpose), requests| {
            let Some(seat) = seats.get(who) else { return false };
            let ledger = ledgers.get(&(purpose.host.clone(), purpose.account.clone()));
            let is_free = ledger.is_some_and(|ledger| ledger.is_free(purpose.action, now));
            let lease = BudgetLease {
                key: Some(key(purpose)),
                requests: *requests,
                free_for: is_free.then(|| prost_types::Duration::try_from(FREE).ok()).flatten(),
            };
            if seat.lease(lease).is_err() {
                return true;
            }
            let whose = (*who, purpose.clone());
            if is_free {
                free.insert(whose)
            } else {
                free.remove(&whose)
            };
            false
        });
        untold.is_empty()
    }
}

#[async_trait::async_trait]
impl Budget for Budgets {
    fn is_there(&self) -> bool {
        true
    }

    async fn begin(&self, purpose: &Purpose) -> Result<Permit, String> {
        let (sender, leased) = oneshot::channel();
        let now = Instant::now();
        {
            let mut state = self.lock();
            state.waiting.entry(purpose.clone()).or_default().push_back((now, sender));
            state.ledger(purpose, now).ask(HERE, purpose.action, 1, now);
        }
        self.lease();
        // What may begin later has to be looked for.
        self.0.changed.notify_one();
        let _place = Waiting { budgets: self, purpose };
        match timeout(PATIENCE, leased).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err("the budget is gone".to_owned()),
            Err(_) => {
                let why = self.waits(HERE, &[&purpose.host]);
                Err(why.unwrap_or_else(|| format!("others were asked for {PATIENCE:?}")))
            }
        }
    }

    fn answered(&self, purpose: &Purpose, answer: Answer) {
        let now = Instant::now();
        let mut state = self.lock();
        let ledger = state.ledger(purpose, now);
        if answer.is_refusal {
            ledger.refused(purpose.action, answer.sent, answer.retry_after, now);
        } else {
            ledger.taken(1, now);
        }
        if let Some(left) = answer.left {
            ledger.left(purpose.action, left, now);
        }
        drop(state);
        if answer.is_refusal || answer.left.is_some() {
            self.0.metrics.budget_refused(usize::from(answer.is_refusal));
            self.0.changed.notify_one();
        }
    }
}

/// A request that waits, or has waited. Dropped, it is not asked for any more.
struct Waiting<'a> {
    budgets: &'a Budgets,
    purpose: &'a Purpose,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.budgets.lock();
        let Some(waiting) = state.waiting.get_mut(self.purpose) else { return };
        let before = waiting.len();
        waiting.retain(|(_, sender)| !sender.is_closed());
        let gone = before - waiting.len();
        state.ledger(self.purpose, Instant::now()).withdraw(HERE, self.purpose.action, gone);
    }
}
