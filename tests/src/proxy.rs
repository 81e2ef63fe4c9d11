//! A proxy before a real registry that does what networks, load balancers and odd registries do.
//!
//! A [`Fault`] stands between request and answer: it may answer itself, change the request, or change the answer.
//! Every request is recorded, so that a test can count them.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use crate::http::{Delivery, Request, Response};
use crate::server::{Server, fits};
use crate::tools::sha256;

/// Asks the registry itself.
pub type Upstream<'a> = dyn Fn(&Request) -> Response + 'a;

/// What stands between request and answer.
pub type Fault = Arc<dyn Fn(&Request, &Upstream<'_>) -> Response + Send + Sync>;

struct Rule {
    method: String,
    pattern: String,
    skip: usize,
    times: usize,
    fault: Fault,
}

/// The proxy; dereferences to its [`Server`].
pub struct FaultProxy {
    server: Server,
    rules: Arc<Mutex<Vec<Rule>>>,
}

impl FaultProxy {
    /// A proxy without faults before the registry at `upstream`.
    pub fn before(upstream: &str) -> Self {
        let upstream = upstream.to_owned();
        let rules = Arc::new(Mutex::new(Vec::<Rule>::new()));
        let shared = Arc::clone(&rules);
        let server = Server::start(move |request| {
            let ask = |request: &Request| {
                let response = request.send(&upstream);
                response.unwrap_or_else(|error| Response {
                    body: error.to_string().into(),
                    ..Response::status(502)
                })
            };
            let due = shared.lock().expect("no fault panics").iter_mut().find_map(|rule| rule.due(request));
            due.map_or_else(|| ask(request), |fault| fault(request, &ask))
        });
        Self { server, rules }
    }

    /// The next `times` requests that fit meet the fault. Of several rules that fit, the first that is not used up counts.
    pub fn fault(&self, times: usize, method: &str, pattern: &str, fault: Fault) {
        self.fault_after(0, times, method, pattern, fault);
    }

    /// Likewise, after `skip` requests that fit were left alone.
    pub fn fault_after(&self, skip: usize, times: usize, method: &str, pattern: &str, fault: Fault) {
        self.rules.lock().expect("no fault panics").push(Rule {
            method: method.to_owned(),
            pattern: pattern.to_owned(),
            skip,
            times,
            fault,
        });
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        self.rules.lock().expect("no fault panics").clear();
    }

    /// How many times faults have yet to strike; those that strike always do not count.
    pub fn pending(&self) -> usize {
        let rules = self.rules.lock().expect("no fault panics");
        rules.iter().map(|rule| rule.times).filter(|times| *times < usize::MAX / 2).sum()
    }
}

impl Rule {
    fn due(&mut self, request: &Request) -> Option<Fault> {
        if !fits(request, &self.method, &self.pattern) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times = self.times.checked_sub(1)?;
        Some(Arc::clone(&self.fault))
    }
}

impl Deref for FaultProxy {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

/// Requests wait while it is shut.
#[derive(Clone, Debug, Default)]
pub struct Barrier(Arc<AtomicBool>);

impl Barrier {
    /// What requests wait at.
    pub fn fault(&self) -> Fault {
        let open = Arc::clone(&self.0);
        Arc::new(move |request, upstream| {
            while !open.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(5));
            }
            upstream(request)
        })
    }

    /// Lets them go on, and all that come.
    pub fn open(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Drop for Barrier {
    /// A test that fails must not leave threads behind that wait for ever.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.open();
        }
    }
}

/// The proxy answers itself; the registry never hears of it.
pub fn answer(response: Response) -> Fault {
    Arc::new(move |_, _| response.clone())
}

/// A bare status.
pub fn status(code: u16) -> Fault {
    answer(Response::status(code))
}

/// 429 with a `Retry-After`.
pub fn too_many(retry_after: &str) -> Fault {
    answer(Response::status(429).header("Retry-After", retry_after))
}

/// The registry's answer, changed.
pub fn change(change: impl Fn(Response) -> Response + Send + Sync + 'static) -> Fault {
    Arc::new(move |request, upstream| change(upstream(request)))
}

/// The registry's answer, delivered badly.
pub fn deliver(delivery: Delivery) -> Fault {
    change(move |response| Response { delivery, ..response })
}

/// The body ends after so many bytes.
pub fn truncate(at: usize) -> Fault {
    deliver(Delivery::Truncated(at))
}

/// The connection is reset; the registry never hears of the request.
pub fn reset() -> Fault {
    answer(Response { delivery: Delivery::Reset(None), ..Response::status(500) })
}

/// The registry does what it is asked, but its answer is lost.
pub fn lose_answer() -> Fault {
    deliver(Delivery::Reset(None))
}

/// The body comes in so many pieces with pauses.
pub fn slow(pieces: usize, pause: Duration) -> Fault {
    deliver(Delivery::Slow(pieces, pause))
}

/// A byte of the body is another one.
pub fn corrupt(at: usize) -> Fault {
    change(move |mut response| {
        if let Some(byte) = response.body.get_mut(at) {
            *byte ^= 1;
        }
        response
    })
}

/// `Range` is not understood: the whole body comes with 200.
pub fn ignore_range() -> Fault {
    Arc::new(|request, upstream| {
        let mut request = request.clone();
        request.remove("Range");
        upstream(&request)
    })
}

/// The answer to a `Range` is of another range, and says so.
pub fn wrong_range(by: u64) -> Fault {
    Arc::new(move |request, upstream| {
        let mut request = request.clone();
        let start: u64 = request
            .get("Range")
            .and_then(|range| range.strip_prefix("bytes=")?.trim_end_matches('-').parse().ok())
            .unwrap_or_default();
        request.remove("Range");
        upstream(&request.header("Range", &format!("bytes={}-", start + by)))
    })
}

/// `Location` without scheme and host.
pub fn relative_location() -> Fault {
    change(|response| {
        match response.get("Location").and_then(|url| url.split_once("://")?.1.split_once('/')) {
            Some((_, path)) => {
                let path = format!("/{path}");
                response.replace("Location", &path)
            }
            None => response,
        }
    })
}

/// A PATCH that brings the whole blob is answered with 201: the registry is content.
pub fn accept_early() -> Fault {
    Arc::new(|request, upstream| {
        let accepted = upstream(request);
        let location = accepted.get("Location").unwrap_or_default().to_owned();
        let path = location.split_once("://").and_then(|(_, rest)| rest.find('/').map(|at| &rest[at..]));
        let digest = sha256(&request.body);
        let put = Request::new("PUT", &format!("{}&digest={digest}", path.unwrap_or(&location)));
        upstream(&Request { headers: request.headers.clone(), ..put })
    })
}
