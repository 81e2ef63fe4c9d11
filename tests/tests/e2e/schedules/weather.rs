//! What the proxies before the registries do to requests: they take their time, so that faults meet something that is going on, and
//! now and then one is struck.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use occy_tests::http::{Delivery, Response};
use occy_tests::proxy::{Fault, FaultProxy, lose_answer, reset, status, too_many};
use occy_tests::random::Random;
use occy_tests::registry::Registry;

use super::plan::Strike;

/// Over how many pieces the body of an answer is spread.
const PIECES: usize = 8;

/// What requests to one registry meet.
#[derive(Clone)]
pub(super) struct Weather(Arc<Mutex<State>>);

struct State {
    random: Random,
    is_slow: bool,
    strikes: VecDeque<Strike>,
}

impl Weather {
    /// A proxy before the registry, and its weather, which is fair.
    pub(super) fn before(registry: &Registry, seed: u64) -> (FaultProxy, Self) {
        let state = State { random: Random::new(seed), is_slow: false, strikes: VecDeque::new() };
        let weather = Self(Arc::new(Mutex::new(state)));
        let proxy = FaultProxy::before(registry.host());
        proxy.fault(usize::MAX, "*", "*", weather.fault());
        (proxy, weather)
    }

    /// From now on requests take their time.
    pub(super) fn slow(&self) {
        self.state().is_slow = true;
    }

    /// The next so many requests meet it.
    pub(super) fn strike(&self, strike: Strike, times: u64) {
        self.state().strikes.extend((0..times).map(|_| strike));
    }

    /// Everything goes well and fast again.
    pub(super) fn heal(&self) {
        let mut state = self.state();
        state.is_slow = false;
        state.strikes.clear();
    }

    fn fault(&self) -> Fault {
        let weather = self.clone();
        Arc::new(move |request, upstream| {
            let (strike, pause) = weather.next();
            sleep(pause);
            let response = match strike {
                None => upstream(request),
                Some(Strike::Reset) => reset()(request, upstream),
                Some(Strike::LoseAnswer) => lose_answer()(request, upstream),
                Some(Strike::TooMany) => too_many("0")(request, upstream),
                Some(Strike::Status(code)) => status(code)(request, upstream),
                Some(Strike::Cut) => {
                    let response = upstream(request);
                    let delivery = Delivery::Truncated(response.body.len() / 2);
                    return Response { delivery, ..response };
                }
            };
            // Its answer, too: what is lost after it was done differs from what never was.
            let pieces = u32::try_from(PIECES).expect("a few");
            match response.delivery {
                Delivery::Whole if !pause.is_zero() && response.body.is_empty() => {
                    sleep(pause);
                    response
                }
                Delivery::Whole if !pause.is_zero() => {
                    Response { delivery: Delivery::Slow(PIECES, pause * 2 / pieces), ..response }
                }
                _ => response,
            }
        })
    }

    fn next(&self) -> (Option<Strike>, Duration) {
        let mut state = self.state();
        let pause = if state.is_slow { state.random.between(5, 60) } else { 0 };
        (state.strikes.pop_front(), Duration::from_millis(pause))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
