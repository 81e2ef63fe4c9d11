//! What one account may ask of one registry, and who of those that ask it is next: no lock, no waiting, and time only as it is told.
//!
//! A request passes every *line* that its action belongs to: the registry's, and that of reading, of reading manifests, or of writing.
//! A line has a rate, a number at once, and a quota, each where it is configured; the registry's line has the rate at which it was
//! found to refuse, too. Of a quota it has what was drawn for it, and says how much more it wants. Of those who wait, the one with the
//! fewest requests under way is next, and of these the one whose last turn was longer ago: so who asks for much takes turns with who asks
//! for little, and nobody waits for ever.
//!
//! Whoever begins and ends, in whatever order: at any time no more is under way than any line allows, and over any time no more has
//! begun than its rate and its quota allow. The tests try that.

use std::collections::BTreeMap;
use std::time::Duration;

use occy_pipeline::registry::{Action, Answer, RateLimit, Rhythm};
use tokio::time::Instant;

use crate::engine::quotas::Drawn;

/// A burst has so many seconds of a rate, and one request at least.
const BURST: f64 = 0.1;
/// A pause that is longer is that of one kind of requests, as when a quota is used up, and not of the registry.
const SHORT: Duration = Duration::from_secs(60);
/// No pause is believed that is longer.
const PAUSE_MAX: Duration = Duration::from_secs(24 * 3600);
/// No more of a quota is drawn than one request in so many, and one at least, that has not begun: so much is lost with a coordinator that
/// is killed, and kept from others by one whose requests wait for something else; besides what its workers have given back.
const DRAWN_AHEAD: u64 = 20;
/// When a quota is drawn from again that could not be.
const DRAWN_AGAIN: Duration = Duration::from_secs(1);

/// What is configured for one line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Requests a second.
    pub rate: Option<f64>,
    /// Requests at once.
    pub concurrency: Option<usize>,
    /// Requests in a time that begins with the first of them, of all coordinators together.
    pub quota: Option<(u64, Duration)>,
}

/// The lines of a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineName {
    /// All requests: rate and quota alone.
    All,
    /// Those that read a manifest.
    Manifest,
    /// Those that read anything.
    Pull,
    /// Those that write.
    Push,
}

const LINES: usize = 4;
const LINE_NAMES: [LineName; LINES] = [LineName::All, LineName::Manifest, LineName::Pull, LineName::Push];

impl std::fmt::Display for LineName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::All => "all",
            Self::Manifest => "manifest",
            Self::Pull => "pull",
            Self::Push => "push",
        })
    }
}

fn lines(action: Action) -> &'static [LineName] {
    match action {
        Action::Manifest => &[LineName::All, LineName::Pull, LineName::Manifest],
        Action::Pull => &[LineName::All, LineName::Pull],
        Action::Push => &[LineName::All, LineName::Push],
    }
}

/// The place of an action in a list of all.
pub fn place(action: Action) -> usize {
    match action {
        Action::Manifest => 0,
        Action::Pull => 1,
        Action::Push => 2,
    }
}

/// All of them.
pub const ACTIONS: [Action; 3] = [Action::Manifest, Action::Pull, Action::Push];

/// What one account may ask of one registry.
#[derive(Debug)]
pub struct Ledger {
    rhythm: Rhythm,
    lines: [Line; LINES],
    holders: BTreeMap<u64, Holder>,
    turn: u64,
}

#[derive(Debug)]
struct Line {
    limits: Limits,
    /// Requests that may begin at once.
    tokens: f64,
    /// When these were counted.
    at: Instant,
    open: usize,
    share: Share,
    /// Until when the registry wants none.
    resume: Instant,
}

/// What a line has of its quota.
#[derive(Debug, Default)]
struct Share {
    /// Requests that were drawn and have not begun.
    left: u64,
    /// Their time.
    time: Option<Time>,
    /// In that time there are no more.
    is_used_up: bool,
    /// So many requests that are under way may have begun before that time, as far as is known.
    earlier: usize,
    drawing: Drawing,
}

/// A time of a quota, as its engine has it.
#[derive(Clone, Copy, Debug)]
struct Time {
    drawn: Drawn,
    /// When it ends by this process's clock.
    ends: Instant,
}

/// Whether more of a quota is being drawn.
#[derive(Clone, Copy, Debug, Default)]
enum Drawing {
    #[default]
    No,
    /// It has been asked for.
    Now,
    /// It could not be, and will be asked for again then.
    Again(Instant),
}

/// What a line wants of its quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Whose quota.
    pub line: LineName,
    /// Requests of all, in a time of that length.
    pub quota: (u64, Duration),
    /// So many of these.
    pub count: u64,
}

/// Somebody who asks.
#[derive(Debug, Default)]
struct Holder {
    waiting: [usize; 3],
    /// Since when, of those that have waited longest.
    since: [Option<Instant>; 3],
    open: [usize; 3],
    turn: u64,
}

/// What is in the way of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Obstacle {
    /// So many are under way.
    Concurrency(usize),
    /// So many a second, until then.
    Rate(f64, Instant),
    /// So many in a time, until then.
    Quota(u64, Duration, Instant),
    /// So many in a time, of which some are asked for. Until then: nobody could answer.
    Draw(u64, Duration, Option<Instant>),
    /// The registry wants none until then.
    Pause(Instant),
}

impl Obstacle {
    /// When it is away. None: when a request ends.
    fn until(&self) -> Option<Instant> {
        match self {
            Self::Concurrency(_) => None,
            Self::Rate(_, until) | Self::Quota(_, _, until) | Self::Pause(until) => Some(*until),
            Self::Draw(_, _, until) => *until,
        }
    }

    /// For people.
    pub fn describe(&self, now: Instant) -> String {
        let seconds = |until: &Instant| until.saturating_duration_since(now).as_secs() + 1;
        match self {
            Self::Concurrency(limit) => format!("{limit} requests at once are under way"),
            Self::Rate(rate, _) => format!("it takes {rate:.1} requests a second"),
            Self::Quota(limit, time, until) => {
                format!(
                    "its {limit} requests in {} s are used up, for another {} s",
                    time.as_secs(),
                    seconds(until)
                )
            }
            Self::Draw(limit, time, again) => format!(
                "what is left of its {limit} requests in {} s {}",
                time.as_secs(),
                again.map_or("is being asked for", |_| "could not be asked for")
            ),
            Self::Pause(until) => format!("it asked for a pause of another {} s", seconds(until)),
        }
    }
}

impl Line {
    fn burst(&self) -> f64 {
        self.limits.rate.map_or(0.0, |rate| (rate * BURST).max(1.0))
    }

    fn count(&mut self, now: Instant) {
        if let Some(rate) = self.limits.rate {
            let passed = now.saturating_duration_since(self.at).as_secs_f64();
            self.tokens = (self.tokens + passed * rate).min(self.burst());
        }
        self.at = now;
        self.share.count(now, self.open);
    }

    fn obstacle(&mut self, now: Instant) -> Option<Obstacle> {
        self.count(now);
        if self.resume > now {
            return Some(Obstacle::Pause(self.resume));
        }
        if let Some((limit, time)) = self.limits.quota.filter(|_| self.share.left == 0) {
            return Some(match (&self.share, self.share.drawing) {
                (Share { is_used_up: true, time: Some(Time { ends, .. }), .. }, _) => {
                    Obstacle::Quota(limit, time, *ends)
                }
                (_, Drawing::Again(again)) => Obstacle::Draw(limit, time, Some(again)),
                (_, Drawing::No | Drawing::Now) => Obstacle::Draw(limit, time, None),
            });
        }
        if let Some(limit) = self.limits.concurrency.filter(|&limit| self.open >= limit) {
            return Some(Obstacle::Concurrency(limit));
        }
        // What is counted in fractions is never quite whole.
        let rate = self.limits.rate.filter(|_| self.tokens < 1.0 - 1e-6)?;
        Some(Obstacle::Rate(rate, now + Duration::from_secs_f64((1.0 - self.tokens) / rate)))
    }

    fn begin(&mut self) {
        self.open += 1;
        self.tokens -= 1.0;
        self.share.left = self.share.left.saturating_sub(1);
    }

    /// So many have ended, of which some were never sent.
    fn end(&mut self, ended: usize, unused: usize, now: Instant) {
        self.count(now);
        self.tokens = (self.tokens + unused as f64).min(self.burst());
        if self.share.time.is_some() {
            // Which of those that are under way have ended nobody says: as many as may have begun in an earlier time are none of this one's.
            let earlier = unused.min(self.share.earlier);
            self.share.earlier -= earlier;
            self.share.left += (unused - earlier) as u64;
        }
        self.set_open(self.open - ended);
    }

    /// So many are under way.
    fn set_open(&mut self, open: usize) {
        // Those that are new here were begun elsewhere, nobody says when.
        self.share.earlier = (self.share.earlier + open.saturating_sub(self.open)).min(open);
        self.open = open;
    }
}

impl Share {
    fn count(&mut self, now: Instant, open: usize) {
        if self.time.is_some_and(|time| time.ends <= now) {
            *self = Self { earlier: open, drawing: self.drawing, ..Self::default() };
        }
        if matches!(self.drawing, Drawing::Again(again) if again <= now) {
            self.drawing = Drawing::No;
        }
    }
}

impl Ledger {
    /// Of a registry with these limits, in the order All, Manifest, Pull, Push.
    pub fn new(host: &str, limits: [Limits; LINES], now: Instant) -> Self {
        let line = |limits: Limits| {
            let mut line =
                Line { limits, tokens: 0.0, at: now, open: 0, share: Share::default(), resume: now };
            line.tokens = line.burst();
            line
        };
        Self { rhythm: Rhythm::new(host, now), lines: limits.map(line), holders: BTreeMap::new(), turn: 0 }
    }

    /// Its limits are others from now on.
    pub fn set_limits(&mut self, limits: [Limits; LINES], now: Instant) {
        for (line, limits) in self.lines.iter_mut().zip(limits) {
            line.count(now);
            line.limits = limits;
            line.tokens = line.tokens.min(line.burst());
        }
    }

    /// Whether nothing limits its requests of that kind, as far as is known.
    pub fn is_free(&self, action: Action, now: Instant) -> bool {
        self.rhythm.rate().is_none()
            && self.rhythm.resume() <= now
            && lines(action).iter().all(|&name| {
                let line = &self.lines[name as usize];
                line.limits == Limits::default() && line.resume <= now
            })
    }

    /// Whether nothing has to be remembered.
    pub fn is_idle(&self, now: Instant) -> bool {
        let is_at_rest = |holder: &Holder| holder.waiting == [0; 3] && holder.open == [0; 3];
        ACTIONS.iter().all(|&action| self.is_free(action, now)) && self.holders.values().all(is_at_rest)
    }

    /// Requests a second that may begin in all. None: nothing limits them.
    pub fn rate(&self) -> Option<f64> {
        let rates = [self.lines[LineName::All as usize].limits.rate, self.rhythm.rate()];
        rates.into_iter().flatten().min_by(f64::total_cmp)
    }

    /// Somebody asks for so many requests.
    pub fn ask(&mut self, who: u64, action: Action, count: usize, now: Instant) {
        let holder = self.holders.entry(who).or_default();
        holder.waiting[place(action)] += count;
        if count > 0 {
            holder.since[place(action)].get_or_insert(now);
        }
    }

    /// Somebody does not want so many any more.
    pub fn withdraw(&mut self, who: u64, action: Action, count: usize) {
        if let Some(holder) = self.holders.get_mut(&who) {
            let waiting = &mut holder.waiting[place(action)];
            *waiting = waiting.saturating_sub(count);
            if *waiting == 0 {
                holder.since[place(action)] = None;
            }
        }
    }

    /// So many of somebody's requests have ended, of which some were never sent.
    pub fn end(&mut self, who: u64, action: Action, ended: usize, unused: usize, now: Instant) {
        let Some(holder) = self.holders.get_mut(&who) else { return };
        let open = &mut holder.open[place(action)];
        // Whoever says more than it was given ends nobody else's.
        let ended = ended.min(*open);
        *open -= ended;
        for &name in lines(action) {
            self.lines[name as usize].end(ended, unused.min(ended), now);
        }
    }

    /// Somebody has so many under way and asks for nothing else, whatever was known.
    pub fn reset(&mut self, who: u64, action: Action, open: usize) {
        let holder = self.holders.entry(who).or_default();
        let before = std::mem::replace(&mut holder.open[place(action)], open);
        (holder.waiting[place(action)], holder.since[place(action)]) = (0, None);
        for &name in lines(action) {
            let line = &mut self.lines[name as usize];
            line.set_open(line.open - before + open);
        }
    }

    /// Somebody is gone, and all that it had.
    pub fn leave(&mut self, who: u64) {
        for action in ACTIONS {
            self.reset(who, action, 0);
        }
        self.holders.remove(&who);
    }

    /// So many were answered, and not refused.
    pub fn taken(&mut self, count: usize, now: Instant) {
        self.rhythm.taken(now, count);
    }

    /// A request was refused.
    pub fn refused(&mut self, action: Action, sent: Instant, retry_after: Option<Duration>, now: Instant) {
        self.rhythm.answered(now, &Answer { sent, is_refusal: true, retry_after, left: None });
        if let Some(pause) = retry_after.filter(|pause| *pause > SHORT) {
            self.pause(action, pause, now);
        }
    }

    /// The registry said what is left of a limit.
    pub fn left(&mut self, action: Action, left: RateLimit, now: Instant) {
        if let RateLimit { remaining: 0, reset: Some(reset) } = left {
            self.pause(action, reset, now);
        }
    }

    /// The narrowest line waits.
    fn pause(&mut self, action: Action, pause: Duration, now: Instant) {
        if let Some(&name) = lines(action).last() {
            let line = &mut self.lines[name as usize];
            line.resume = line.resume.max(now + pause.min(PAUSE_MAX));
        }
    }

    /// What lines want of their quotas for those who wait, each of which is to be answered by [`Ledger::drew`].
    pub fn wants(&mut self, now: Instant) -> Vec<Want> {
        let waiting = ACTIONS.map(|action| {
            self.holders.values().map(|holder| holder.waiting[place(action)] as u64).sum::<u64>()
        });
        let mut wants = Vec::new();
        for name in LINE_NAMES {
            let line = &mut self.lines[name as usize];
            line.count(now);
            let Some(quota) = line.limits.quota else { continue };
            let its = ACTIONS.into_iter().filter(|&action| lines(action).contains(&name));
            let waiting: u64 = its.map(|action| waiting[place(action)]).sum();
            let count = waiting.min((quota.0 / DRAWN_AHEAD).max(1)).saturating_sub(line.share.left);
            if count > 0 && !line.share.is_used_up && matches!(line.share.drawing, Drawing::No) {
                line.share.drawing = Drawing::Now;
                wants.push(Want { line: name, quota, count });
            }
        }
        wants
    }

    /// What was drawn of what a line wants, and when its time ends by this process's clock. None: it could not be drawn.
    pub fn drew(&mut self, want: Want, drawn: Option<(Drawn, Instant)>, now: Instant) {
        let Line { share, open, .. } = &mut self.lines[want.line as usize];
        let Some((drawn, ends)) = drawn else {
            share.drawing = Drawing::Again(now + DRAWN_AGAIN);
            return;
        };
        share.drawing = Drawing::No;
        if share.time.is_none_or(|time| !time.drawn.is_of_the_time_of(&drawn)) {
            // What is left is of a time that has ended.
            *share = Share { earlier: *open, ..Share::default() };
        }
        share.left += drawn.count;
        share.is_used_up = drawn.count < want.count;
        share.time = Some(Time { drawn, ends });
        share.count(now, *open);
    }

    /// Takes away what was drawn and has not begun: nobody will begin it.
    pub fn undraw(&mut self) -> Vec<(LineName, (u64, Duration), Drawn)> {
        let mut undrawn = Vec::new();
        for name in LINE_NAMES {
            let Line { share, limits, .. } = &mut self.lines[name as usize];
            let left = std::mem::take(&mut share.left);
            if let (1.., Some(Time { drawn, .. }), Some(quota)) = (left, share.time, limits.quota) {
                undrawn.push((name, quota, Drawn { count: left, ..drawn }));
            }
        }
        undrawn
    }

    /// Begins what may begin. Gives whose it is, and when there may be more if nothing happens until then.
    pub fn begin(&mut self, now: Instant) -> (Vec<(u64, Action)>, Option<Instant>) {
        let mut begun = Vec::new();
        loop {
            let mut next = None;
            let mut possible = Vec::new();
            for action in ACTIONS {
                if !self.holders.values().any(|holder| holder.waiting[place(action)] > 0) {
                    continue;
                }
                match self.obstacle(action, now) {
                    None => possible.push(action),
                    Some(obstacle) => next = [next, obstacle.until()].into_iter().flatten().min(),
                }
            }
            let candidates = self.holders.iter().flat_map(|(&who, holder)| {
                let waiting = possible.iter().filter(|&&action| holder.waiting[place(action)] > 0);
                waiting.map(move |&action| {
                    (
                        (holder.open.iter().sum::<usize>(), holder.turn, holder.since[place(action)]),
                        who,
                        action,
                    )
                })
            });
            let Some((_, who, action)) = candidates.min_by(|one, two| one.0.cmp(&two.0)) else {
                return (begun, next);
            };
            self.turn += 1;
            let turn = self.turn;
            let holder = self.holders.entry(who).or_default();
            holder.turn = turn;
            holder.open[place(action)] += 1;
            holder.waiting[place(action)] -= 1;
            // Those behind it have waited as long, as far as is known.
            if holder.waiting[place(action)] == 0 {
                holder.since[place(action)] = None;
            } else {
                holder.since[place(action)] = Some(now);
            }
            for &name in lines(action) {
                self.lines[name as usize].begin();
            }
            self.rhythm.goes(now);
            begun.push((who, action));
        }
    }

    fn obstacle(&mut self, action: Action, now: Instant) -> Option<Obstacle> {
        if let Some(obstacle) = lines(action).iter().find_map(|&name| self.lines[name as usize].obstacle(now))
        {
            return Some(obstacle);
        }
        let due = self.rhythm.due(now);
        (due > now).then(|| match self.rhythm.rate() {
            Some(rate) if self.rhythm.resume() <= now => Obstacle::Rate(rate, due),
            _ => Obstacle::Pause(due),
        })
    }

    /// What somebody has waited for since then, or longer.
    pub fn waits(&mut self, who: u64, since: Instant, now: Instant) -> Option<Obstacle> {
        let holder = self.holders.get(&who)?;
        let action = ACTIONS
            .into_iter()
            .find(|&action| holder.since[place(action)].is_some_and(|began| began <= since))?;
        self.obstacle(action, now)
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.holders.values().map(|holder| holder.waiting.iter().sum::<usize>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::engine::quotas::{Quota, QuotaRecord};

    /// What an engine keeps of the quotas of a ledger's lines, and where time began.
    struct Records([QuotaRecord; LINES], Instant);

    impl Records {
        fn new(start: Instant) -> Self {
            Self(Default::default(), start)
        }

        fn draw(&mut self, want: Want, now: Instant) -> (Drawn, Instant) {
            let (limit, time) = want.quota;
            let quota = Quota { name: want.line.to_string(), limit, time };
            let began = Timestamp::from_second(1000).unwrap();
            let drawn =
                self.0[want.line as usize].draw(&quota, want.count, began + now.duration_since(self.1));
            (drawn, self.1 + Duration::try_from(drawn.ends.duration_since(began)).unwrap())
        }

        /// Begins what may begin, as somebody does who draws from the quotas at once.
        fn begin(&mut self, ledger: &mut Ledger, now: Instant) -> (Vec<(u64, Action)>, Option<Instant>) {
            let mut all = Vec::new();
            loop {
                let (begun, next) = ledger.begin(now);
                all.extend(begun);
                let wants = ledger.wants(now);
                if wants.is_empty() {
                    return (all, next);
                }
                for want in wants {
                    let drawn = self.draw(want, now);
                    ledger.drew(want, Some(drawn), now);
                }
            }
        }
    }

    /// Something that happens to a ledger, after so many milliseconds.
    #[derive(Clone, Debug)]
    enum Event {
        Ask(u64, usize),
        Withdraw(u64),
        End(usize, bool),
        Leave(u64),
        Refuse(usize, Option<u64>),
        Pass,
    }

    fn any_event() -> impl Strategy<Value = (u64, Event)> {
        let event = prop_oneof![
            6 => (0u64..4, 1usize..9).prop_map(|(who, count)| Event::Ask(who, count)),
            1 => (0u64..4).prop_map(Event::Withdraw),
            6 => (0usize..9, prop::bool::weighted(0.1)).prop_map(|(at, unused)| Event::End(at, unused)),
            1 => (0u64..4).prop_map(Event::Leave),
            1 => (0usize..3, prop::option::of(0u64..90)).prop_map(|(action, pause)| Event::Refuse(action, pause)),
            4 => Just(Event::Pass),
        ];
        (0u64..400, event)
    }

    fn any_limits() -> impl Strategy<Value = Limits> {
        let rate = prop::option::of(1.0f64..50.0);
        let quota = prop::option::of((1u64..20, (1u64..5).prop_map(Duration::from_secs)));
        (rate, prop::option::of(1usize..5), quota).prop_map(|(rate, concurrency, quota)| Limits {
            rate,
            concurrency,
            quota,
        })
    }

    proptest! {
        /// Whoever asks, ends, leaves and is refused: no line is ever passed by more than it allows.
        #[test]
        fn no_limit_is_passed(
            all in any_limits(), manifest in any_limits(), pull in any_limits(), push in any_limits(),
            events in prop::collection::vec(any_event(), 1..120),
        ) {
            let start = Instant::now();
            let limits = [all, manifest, pull, push];
            let mut records = Records::new(start);
            let mut ledger = Ledger::new("registry", limits, start);
            let (mut now, mut open): (_, Vec<(u64, Action, Instant)>) = (start, Vec::new());
            // Of each line: when what was sent began.
            let mut sent: [VecDeque<Instant>; LINES] = Default::default();
            for (number, (pause, event)) in events.into_iter().enumerate() {
                now += Duration::from_millis(pause);
                match event {
                    Event::Ask(who, count) => ledger.ask(who, ACTIONS[number % 3], count, now),
                    Event::Withdraw(who) => ledger.withdraw(who, ACTIONS[number % 3], 2),
                    Event::End(at, unused) if at < open.len() => {
                        let (who, action, began) = open.remove(at);
                        ledger.end(who, action, 1, usize::from(unused), now);
                        for &name in lines(action).iter().filter(|_| unused) {
                            let its = sent[name as usize].iter().position(|at| *at == began);
                            sent[name as usize].remove(its.expect("it has begun"));
                        }
                    }
                    Event::Leave(who) => {
                        ledger.leave(who);
                        open.retain(|(whose, ..)| *whose != who);
                    }
                    Event::Refuse(action, pause) => {
                        ledger.refused(ACTIONS[action], now, pause.map(Duration::from_secs), now);
                    }
                    Event::End(..) | Event::Pass => {}
                }
                let (begun, next) = records.begin(&mut ledger, now);
                prop_assert!(next.is_none_or(|next| next > now));
                for (who, action) in begun {
                    open.push((who, action, now));
                    lines(action).iter().for_each(|&name| sent[name as usize].push_back(now));
                }
                for (line, limits) in limits.iter().enumerate() {
                    let is_its = |action: &Action| lines(*action).iter().any(|&name| name as usize == line);
                    let at_once = open.iter().filter(|(_, action, _)| is_its(action)).count();
                    prop_assert!(limits.concurrency.is_none_or(|limit| at_once <= limit));
                    if let Some((limit, _)) = limits.quota {
                        let began = records.0[line].began();
                        let at = |sent: &&Instant| Timestamp::from_second(1000).unwrap() + sent.duration_since(start) >= began;
                        let in_time = sent[line].iter().filter(at).count();
                        prop_assert!(in_time as u64 <= limit, "{in_time} of {limit}");
                    }
                    if let Some(rate) = limits.rate {
                        for (place, from) in sent[line].iter().enumerate() {
                            let count = sent[line].len() - place;
                            let allowed = now.duration_since(*from).as_secs_f64() * rate + (rate * BURST).max(1.0);
                            prop_assert!(count as f64 <= allowed + 1.001, "{count} of {allowed}");
                        }
                    }
                }
            }
        }

        /// Who waits gets its turn, however much others ask for.
        #[test]
        fn nobody_waits_for_ever(concurrency in 1usize..4, others in 1u64..6) {
            let mut now = Instant::now();
            let limits = Limits { concurrency: Some(concurrency), ..Limits::default() };
            let none = Limits::default();
            let mut ledger = Ledger::new("registry", [none, none, limits, none], now);
            (1..=others).for_each(|who| ledger.ask(who, Action::Pull, 1000, now));
            let mut open: VecDeque<_> = ledger.begin(now).0.into();
            ledger.ask(0, Action::Pull, 1, now);
            for _ in 0..=others + concurrency as u64 {
                now += Duration::from_millis(1);
                let (who, action) = open.pop_front().expect("something is under way");
                ledger.end(who, action, 1, 0, now);
                open.extend(ledger.begin(now).0);
                if open.iter().any(|(who, _)| *who == 0) {
                    return Ok(());
                }
            }
            prop_assert!(false, "it starves");
        }
    }

    #[test]
    fn a_quota_is_used_up_and_comes_back() {
        let start = Instant::now();
        let quota = Limits { quota: Some((3, Duration::from_secs(60))), ..Limits::default() };
        let none = Limits::default();
        let mut records = Records::new(start);
        let mut ledger = Ledger::new("registry", [none, quota, none, none], start);
        ledger.ask(1, Action::Manifest, 5, start);
        ledger.ask(1, Action::Push, 1, start);
        let (begun, next) = records.begin(&mut ledger, start);
        assert_eq!((begun.len(), next), (4, Some(start + Duration::from_secs(60))));
        // Of these, one was never sent.
        ledger.end(1, Action::Manifest, 2, 1, start);
        assert_eq!(records.begin(&mut ledger, start).0, [(1, Action::Manifest)]);
        let waits = ledger.waits(1, start, start).unwrap().describe(start);
        assert!(waits.contains("3 requests in 60 s are used up"), "{waits}");
        let later = start + Duration::from_secs(60);
        assert_eq!(records.begin(&mut ledger, later).0.len(), 1);
        // What was never sent of the earlier time leaves nothing for the later one.
        ledger.ask(1, Action::Manifest, 5, later);
        assert_eq!(records.begin(&mut ledger, later).0.len(), 2);
        ledger.end(1, Action::Manifest, 2, 2, later);
        assert_eq!(records.begin(&mut ledger, later).0, []);
        // What was never sent of the later one does, although others of it are under way.
        ledger.end(1, Action::Manifest, 2, 2, later);
        assert_eq!(records.begin(&mut ledger, later).0.len(), 2);
    }

    #[test]
    fn who_waits_for_something_else_keeps_no_more_of_a_quota_than_a_part() {
        let now = Instant::now();
        let quota = Limits { quota: Some((100, Duration::from_secs(60))), ..Limits::default() };
        let slow = Limits { concurrency: Some(1), ..Limits::default() };
        let mut records = Records::new(now);
        let [mut one, mut other] = [(); 2]
            .map(|()| Ledger::new("registry", [quota, Limits::default(), slow, Limits::default()], now));
        one.ask(1, Action::Pull, 200, now);
        assert_eq!(records.begin(&mut one, now).0.len(), 1);
        other.ask(1, Action::Push, 200, now);
        assert_eq!(records.begin(&mut other, now).0.len(), 94, "5 are kept by the one, and 1 has begun");
    }

    #[test]
    fn nothing_begins_before_it_was_drawn_nor_after_it_was_taken_away() {
        let start = Instant::now();
        let quota = Limits { quota: Some((100, Duration::from_secs(60))), ..Limits::default() };
        let none = Limits::default();
        let mut records = Records::new(start);
        let mut ledger = Ledger::new("registry", [quota, none, none, none], start);
        ledger.ask(1, Action::Pull, 30, start);
        assert_eq!(ledger.begin(start), (Vec::new(), None));
        assert!(ledger.waits(1, start, start).unwrap().describe(start).contains("is being asked for"));
        // A part of it at a time, and one draw after the other.
        let want = Want { line: LineName::All, quota: quota.quota.unwrap(), count: 5 };
        assert_eq!(ledger.wants(start), [want]);
        assert_eq!(ledger.wants(start), []);
        // The engine does not answer.
        ledger.drew(want, None, start);
        assert!(ledger.waits(1, start, start).unwrap().describe(start).contains("could not be asked for"));
        let again = start + DRAWN_AGAIN;
        assert_eq!((ledger.wants(start), ledger.begin(start)), (Vec::new(), (Vec::new(), Some(again))));
        assert_eq!(ledger.wants(again), [want]);
        let drawn = records.draw(want, again);
        ledger.withdraw(1, Action::Pull, 27);
        ledger.drew(want, Some(drawn), again);
        assert_eq!(ledger.begin(again).0.len(), 3);
        let left = Drawn { count: 2, ..drawn.0 };
        assert_eq!(ledger.undraw(), [(LineName::All, quota.quota.unwrap(), left)]);
        assert_eq!(ledger.undraw(), []);
        ledger.ask(1, Action::Pull, 1, again);
        assert_eq!(ledger.begin(again).0, []);
    }

    #[test]
    fn what_the_registry_says_of_itself_holds_for_all() {
        let now = Instant::now();
        let mut ledger = Ledger::new("registry", Default::default(), now);
        assert!(ledger.is_free(Action::Pull, now) && ledger.is_idle(now));
        // A quota of manifests keeps no blob waiting.
        ledger.refused(Action::Manifest, now, Some(Duration::from_secs(3600)), now);
        let later = now + Duration::from_secs(10);
        (0..2).for_each(|who| ledger.ask(who, Action::Manifest, 1, later));
        ledger.ask(1, Action::Pull, 1, later);
        assert_eq!(ledger.begin(later).0, [(1, Action::Pull)]);
        assert!(matches!(ledger.waits(0, later, later), Some(Obstacle::Pause(_))));
        // A short pause is everybody's.
        let mut ledger = Ledger::new("registry", Default::default(), now);
        ledger.refused(Action::Pull, now, Some(Duration::from_secs(5)), now);
        ledger.ask(1, Action::Push, 1, now);
        assert_eq!(ledger.begin(now), (Vec::new(), Some(now + Duration::from_secs(5))));
        // And so is the end of a limit that was told.
        let mut ledger = Ledger::new("registry", Default::default(), now);
        ledger.left(Action::Push, RateLimit { remaining: 0, reset: Some(Duration::from_secs(9)) }, now);
        ledger.ask(1, Action::Push, 1, now);
        ledger.ask(1, Action::Pull, 1, now);
        assert_eq!(ledger.begin(now), (vec![(1, Action::Pull)], Some(now + Duration::from_secs(9))));
    }
}
