//! How fast a registry is asked: as fast as there is something to ask, until it says "Too Many Requests"; from then on about as fast as
//! it takes.
//!
//! The rate is found as TCP finds a connection's: a refusal cuts it, and time lets it grow, fast where it is far from the rate at which
//! the registry refused last, and slowly near it. So those who share a registry's patience without knowing of each other, as the
//! workers of a fleet do, come to share it about evenly. A refusal that asks for a pause pauses all requests to the registry, and not
//! only the one that was refused.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::StatusCode;
use tokio::time::{Instant, sleep_until};

use super::budget::{Answer, RateLimit};

/// Over how long it is counted how many requests a registry takes.
const WINDOW: Duration = Duration::from_secs(1);
/// Answers that are remembered for that: more a second are not told from so many.
const ANSWERS_MAX: usize = 4096;
/// What a refusal leaves of the rate.
const CUT: f64 = 0.8;
/// No cut goes below so many requests a second.
const SLOWEST: f64 = 0.5;
/// By how much the rate grows in a second: until a registry has refused what was sent at a rate; far from that rate; near it.
const GROWTH: (f64, f64, f64) = (1.0, 0.1, 0.01);
/// What is near that rate: from so much of it to so much of it.
const NEAR: (f64, f64) = (0.9, 1.1);
/// At so many times the rate at which it refused last, a registry is asked as fast as there is something to ask again.
const FORGOTTEN: f64 = 3.0;
/// A registry that asks for a longer pause has more in mind than our rate, and each request is told so for itself.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The paces of all registries. Clones are the same ones, so that all clients of a process can keep one pace together.
#[derive(Clone, Debug, Default)]
pub struct Paces(Arc<Mutex<HashMap<String, Pace>>>);

/// The pace of one registry.
#[derive(Clone, Debug)]
pub(super) struct Pace(Arc<Mutex<Rhythm>>);

/// How fast a registry is asked by all whose answers it hears of: what a pace is made of, without the waiting.
#[derive(Debug)]
pub struct Rhythm {
    host: String,
    /// None: as fast as there is something to ask.
    rate: Option<Rate>,
    /// When the next request may go, as the rate says.
    next: Instant,
    /// When any may go again, as the registry says.
    resume: Instant,
    /// When requests were answered, in the last window.
    answers: VecDeque<Instant>,
}

#[derive(Debug)]
struct Rate {
    /// Requests a second.
    now: f64,
    /// At which the registry refused.
    refused: f64,
    /// Whether requests were sent at that rate, and not all at once.
    is_tried: bool,
    /// When it was cut.
    cut: Instant,
    /// When it grew last.
    grown: Instant,
}

impl Paces {
    pub(super) fn of(&self, host: &str) -> Pace {
        let mut paces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paces.entry(host.to_owned()).or_insert_with(|| Pace::new(host)).clone()
    }
}

impl Pace {
    fn new(host: &str) -> Self {
        Self(Arc::new(Mutex::new(Rhythm::new(host, Instant::now()))))
    }

    /// Waits until a request may go, and says when it goes.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it has used up the place of one request.
    pub(super) async fn wait(&self) -> Instant {
        loop {
            let (now, place) = (Instant::now(), self.lock().place(Instant::now()));
            if place <= now {
                return now;
            }
            sleep_until(place).await;
            // A pause that was asked for meanwhile holds for this one too.
            if self.lock().resume <= place {
                return place;
            }
        }
    }

    /// What the registry said.
    pub(super) fn answered(&self, answer: &Answer) {
        self.lock().answered(Instant::now(), answer);
    }

    fn lock(&self) -> MutexGuard<'_, Rhythm> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an answer says that there were too many requests.
pub(super) fn is_refusal(status: StatusCode, retry_after: Option<Duration>) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::SERVICE_UNAVAILABLE && retry_after.is_some()
}

impl Rhythm {
    /// That of a registry of which nothing is known.
    pub fn new(host: &str, now: Instant) -> Self {
        Self { host: host.to_owned(), rate: None, next: now, resume: now, answers: VecDeque::new() }
    }

    /// Requests a second that the registry is asked at most. None: as many as there are.
    pub fn rate(&self) -> Option<f64> {
        self.rate.as_ref().map(|rate| rate.now)
    }

    /// Until when nothing is asked, because the registry wants it so.
    pub fn resume(&self) -> Instant {
        self.resume
    }

    /// When the next request may go.
    pub fn due(&mut self, now: Instant) -> Instant {
        let due = now.max(self.resume);
        let Some(rate) = &mut self.rate else { return due };
        rate.grow(now);
        if rate.is_tried && rate.now > rate.refused * FORGOTTEN {
            self.rate = None;
            return due;
        }
        due.max(self.next)
    }

    /// A request goes at that time, which was found due.
    pub fn goes(&mut self, at: Instant) {
        if let Some(rate) = &self.rate {
            self.next = at + Duration::from_secs_f64(1.0 / rate.now);
        }
    }

    /// What the registry said.
    pub fn answered(&mut self, now: Instant, answer: &Answer) {
        if let Some(RateLimit { remaining: 0, reset: Some(reset) }) = answer.left
            && reset <= PAUSE_MAX
        {
            self.resume = self.resume.max(now + reset);
        }
        if answer.is_refusal {
            self.refused(now, answer.sent, answer.retry_after);
        } else {
            self.taken(now, 1);
        }
    }

    /// So many requests were answered, and not refused.
    pub fn taken(&mut self, now: Instant, count: usize) {
        self.answers.extend(std::iter::repeat_n(now, count.min(ANSWERS_MAX)));
        self.forget(now);
    }

    /// The place of the next request in time.
    fn place(&mut self, now: Instant) -> Instant {
        let place = self.due(now);
        self.goes(place);
        place
    }

    fn refused(&mut self, now: Instant, sent: Instant, retry_after: Option<Duration>) {
        if let Some(pause) = retry_after.filter(|pause| *pause <= PAUSE_MAX) {
            self.resume = self.resume.max(now + pause);
        }
        // What was sent before the last cut knows nothing of it, and what was sent just after it met those.
        if self.rate.as_ref().is_some_and(|rate| sent < rate.cut + WINDOW) {
            return;
        }
        self.forget(now);
        // What it takes is what it took while it refused. Too few, the first time: a window may not have passed.
        let taken = self.answers.len() as f64 / WINDOW.as_secs_f64();
        let refused = taken.max(SLOWEST / CUT);
        let (rate, is_tried) = (refused * CUT, self.rate.is_some());
        self.rate = Some(Rate { now: rate, refused, is_tried, cut: now, grown: now });
        self.next = now + Duration::from_secs_f64(1.0 / rate);
        tracing::info!(
            "{} takes no more requests for now; it is asked {rate:.1} times a second from here",
            self.host
        );
    }

    fn forget(&mut self, now: Instant) {
        while self.answers.len() > ANSWERS_MAX
            || self.answers.front().is_some_and(|answer| now.duration_since(*answer) > WINDOW)
        {
            self.answers.pop_front();
        }
    }
}

impl Rate {
    fn grow(&mut self, now: Instant) {
        let is_near = (self.refused * NEAR.0..self.refused * NEAR.1).contains(&self.now);
        let growth = match (self.is_tried, is_near) {
            (false, _) => GROWTH.0,
            (true, false) => GROWTH.1,
            (true, true) => GROWTH.2,
        };
        // In small steps, of which a long silence makes one: what nobody has tried is not known to be taken.
        let seconds = now.duration_since(self.grown).as_secs_f64().min(1.0);
        self.now *= 1.0 + growth * seconds;
        self.grown = now;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::time::sleep;

    use super::*;

    fn answer(sent: Instant, status: StatusCode, retry_after: Option<Duration>) -> Answer {
        Answer { sent, is_refusal: is_refusal(status, retry_after), retry_after, left: None }
    }

    /// A registry that takes so many requests a second, and so many at once that nobody has used.
    struct Limited {
        rate: f64,
        burst: f64,
        state: Mutex<(f64, Instant)>,
        refused: AtomicU32,
    }

    impl Limited {
        fn new(rate: f64, burst: f64) -> Arc<Self> {
            let state = Mutex::new((burst, Instant::now()));
            Arc::new(Self { rate, burst, state, refused: AtomicU32::new(0) })
        }

        async fn ask(&self) -> StatusCode {
            sleep(Duration::from_millis(fastrand::u64(5..20))).await;
            let mut state = self.state.lock().unwrap();
            let now = Instant::now();
            let (left, at) = *state;
            let left = (left + now.duration_since(at).as_secs_f64() * self.rate).min(self.burst);
            let takes = left >= 1.0;
            *state = (left - if takes { 1.0 } else { 0.0 }, now);
            self.refused.fetch_add(u32::from(!takes), Ordering::Relaxed);
            if takes { StatusCode::OK } else { StatusCode::TOO_MANY_REQUESTS }
        }
    }

    /// So many clients, who keep `paces` paces, have so many requests answered. Gives the seconds.
    async fn all_answered(registry: &Arc<Limited>, paces: usize, clients: usize, requests: u32) -> f64 {
        let paces: Vec<_> = (0..paces).map(|_| Paces::default()).collect();
        let left = Arc::new(AtomicU32::new(requests));
        let start = Instant::now();
        let clients = (0..clients).map(|client| {
            let (pace, registry, left) =
                (paces[client % paces.len()].of("registry"), Arc::clone(registry), Arc::clone(&left));
            tokio::spawn(async move {
                while left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                    .is_ok()
                {
                    loop {
                        let sent = pace.wait().await;
                        let status = registry.ask().await;
                        pace.answered(&answer(sent, status, None));
                        if status == StatusCode::OK {
                            break;
                        }
                        sleep(Duration::from_millis(fastrand::u64(250..500))).await;
                    }
                }
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.unwrap();
        }
        start.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn one_process_finds_the_rate_that_is_taken() {
        fastrand::seed(1);
        let registry = Limited::new(100.0, 20.0);
        let seconds = all_answered(&registry, 1, 16, 6000).await;
        let refused = registry.refused.load(Ordering::Relaxed);
        assert!(seconds < 60.0 * 1.2, "{seconds} s");
        assert!(refused < 120, "{refused} of 6000 refused");
    }

    #[tokio::test(start_paused = true)]
    async fn processes_that_know_nothing_of_each_other_share_it() {
        fastrand::seed(1);
        let registry = Limited::new(100.0, 20.0);
        let seconds = all_answered(&registry, 5, 20, 6000).await;
        let refused = registry.refused.load(Ordering::Relaxed);
        assert!(seconds < 60.0 * 1.2, "{seconds} s");
        assert!(refused < 120, "{refused} of 6000 refused");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_never_refused_never_waits() {
        let (pace, start) = (Paces::default().of("registry"), Instant::now());
        for _ in 0..10_000 {
            let sent = pace.wait().await;
            pace.answered(&answer(sent, StatusCode::OK, None));
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_that_is_asked_for_is_everybodys() {
        let paces = Paces::default();
        let (pace, other, start) = (paces.of("a"), paces.of("b"), Instant::now());
        let sent = pace.wait().await;
        pace.answered(&answer(sent, StatusCode::TOO_MANY_REQUESTS, Some(Duration::from_secs(7))));
        // Another client of the process, at the same registry and at another one.
        other.wait().await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        paces.of("a").wait().await;
        assert_eq!(start.elapsed(), Duration::from_secs(7));
        // Who waits already waits longer.
        let waiting = tokio::spawn({
            let pace = pace.clone();
            async move { pace.wait().await }
        });
        tokio::task::yield_now().await;
        let sent = Instant::now();
        pace.answered(&answer(sent, StatusCode::SERVICE_UNAVAILABLE, Some(Duration::from_secs(5))));
        assert!(waiting.await.unwrap() >= sent + Duration::from_secs(5));
        // One that nobody would wait for is not waited for here.
        let sent = pace.wait().await;
        pace.answered(&answer(sent, StatusCode::TOO_MANY_REQUESTS, Some(Duration::from_secs(6 * 3600))));
        let before = Instant::now();
        pace.wait().await;
        assert!(before.elapsed() < PAUSE_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn one_refusal_of_many_on_their_way_cuts_once() {
        let pace = Paces::default().of("registry");
        for _ in 0..100 {
            let sent = pace.wait().await;
            pace.answered(&answer(sent, StatusCode::OK, None));
        }
        let sent = pace.wait().await;
        sleep(Duration::from_millis(10)).await;
        for _ in 0..50 {
            pace.answered(&answer(sent, StatusCode::TOO_MANY_REQUESTS, None));
        }
        let rate = pace.lock().rate.as_ref().unwrap().now;
        assert!((rate - 100.0 * CUT).abs() < 1.0, "{rate}");
    }

    #[tokio::test(start_paused = true)]
    async fn when_the_last_request_of_a_limit_was_taken_its_reset_is_waited_for() {
        let (pace, start) = (Paces::default().of("registry"), Instant::now());
        for (reset, waits) in [(None, 0), (Some(4), 4), (Some(21_600), 4)] {
            let sent = pace.wait().await;
            let left = Some(RateLimit { remaining: 0, reset: reset.map(Duration::from_secs) });
            pace.answered(&Answer { left, ..answer(sent, StatusCode::OK, None) });
            pace.wait().await;
            assert_eq!(start.elapsed(), Duration::from_secs(waits), "{reset:?}");
        }
    }
}
