//! A registry that takes so many requests a second, and so many at once, and counts what it refused.

use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::http::{Request, Response};
use crate::server::Server;

/// What a registry takes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests a second.
    pub rate: f64,
    /// Requests beyond that rate, if none came before.
    pub burst: f64,
    /// How long each is under way at least.
    pub latency: Duration,
}

/// What a registry has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests, with those that were refused.
    pub requests: usize,
    /// Of these, those that were refused.
    pub refused: usize,
    /// The most that read at once.
    pub reading: usize,
    /// The most that wrote at once.
    pub writing: usize,
}

#[derive(Debug)]
struct State {
    count: Count,
    open: [usize; 2],
    left: f64,
    at: Instant,
}

/// The registry, before a real one; dereferences to its [`Server`].
#[derive(Debug)]
pub struct LimitedRegistry {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl LimitedRegistry {
    /// Before the registry at `upstream`.
    pub fn before(upstream: &str, limits: Limits) -> Self {
        let upstream = upstream.to_owned();
        let state = State { count: Count::default(), open: [0; 2], left: limits.burst, at: Instant::now() };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        let server = Server::start(move |request: &Request| {
            let reads = matches!(request.method.as_str(), "GET" | "HEAD")
                && !request.path.contains("/blobs/uploads/");
            let takes = shared.lock().expect("no handler panics").comes(limits, usize::from(reads));
            sleep(limits.latency);
            let answer = if takes {
                let answer = request.send(&upstream);
                answer.unwrap_or_else(|error| Response {
                    body: error.to_string().into(),
                    ..Response::status(502)
                })
            } else {
                Response::status(429)
            };
            shared.lock().expect("no handler panics").open[usize::from(reads)] -= 1;
            answer
        });
        Self { server, state }
    }

    /// What it has seen.
    pub fn counted(&self) -> Count {
        self.state.lock().expect("no handler panics").count
    }
}

impl State {
    fn comes(&mut self, limits: Limits, reads: usize) -> bool {
        let now = Instant::now();
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * limits.rate).min(limits.burst);
        self.at = now;
        let takes = self.left >= 1.0;
        if takes {
            self.left -= 1.0;
        }
        self.open[reads] += 1;
        self.count.requests += 1;
        self.count.refused += usize::from(!takes);
        self.count.writing = self.count.writing.max(self.open[0]);
        self.count.reading = self.count.reading.max(self.open[1]);
        takes
    }
}

impl Deref for LimitedRegistry {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}
