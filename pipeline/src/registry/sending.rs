//! A request on its way: how long it may take while its body is being sent.
//!
//! Only silence is timed. A slow uplink may need an hour for a body, and is well for as long as bytes move, or as long as it is our
//! own side that is waited for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use reqwest::{Method, Response};
use tracing::Instrument as _;

use super::budget::{Answer, Held, Purpose, RateLimit};
use super::error::{Operation, RegistryError, Request};
use super::host::RegistryHost;
use super::http::{self, describe};
use super::pace::is_refusal;
use super::retry::retry_after;
use super::traffic::Traffic;
use crate::blob::{BlobError, ByteCount};

/// Bodies go in pieces of at most this many bytes, so that a slow way is seen to move.
const PIECE: usize = 64 * 1024;
/// A registry that has got all may take so many times the usual, to hash or move it before it answers. What we have sent may still
/// be in the buffers of the way, too.
const PATIENCE_FOR_WHOLE: u32 = 5;

/// What passes through a body, seen from outside.
#[derive(Debug, Default)]
pub(super) struct Meter {
    progress: ByteCount,
    traffic: Traffic,
    /// All that is to be sent, in bytes.
    size: u64,
    sent: AtomicU64,
    /// The content's source, and not the registry, is waited for.
    starved: AtomicBool,
    error: Mutex<Option<BlobError>>,
}

impl Meter {
    /// Of a body of `size` bytes, which `progress` counts.
    pub(super) fn new(size: u64, progress: &ByteCount, traffic: &Traffic) -> Arc<Self> {
        Arc::new(Self { size, progress: progress.clone(), traffic: traffic.clone(), ..Self::default() })
    }

    /// What was wrong with the content.
    pub(super) fn take_error(&self) -> Option<BlobError> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn fail(&self, error: BlobError) -> std::io::Error {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        std::io::Error::other("the content failed")
    }

    /// Counts bytes that are sent next.
    fn pass(&self, bytes: Bytes) -> Result<Bytes, std::io::Error> {
        let sent = self.sent.load(Ordering::Relaxed) + bytes.len() as u64;
        if sent > self.size {
            return Err(self.fail(BlobError::Size { expected: self.size, actual: sent }));
        }
        self.sent.store(sent, Ordering::Relaxed);
        self.progress.add(bytes.len() as u64);
        self.traffic.add_sent(bytes.len());
        Ok(bytes)
    }

    fn end(&self) -> Option<Result<Bytes, std::io::Error>> {
        let actual = self.sent.load(Ordering::Relaxed);
        (actual < self.size).then(|| Err(self.fail(BlobError::Size { expected: self.size, actual })))
    }
}

/// A body of exactly the meter's size, or one that fails. None where that is nothing.
pub(super) fn metered<S>(content: S, meter: &Arc<Meter>) -> Option<reqwest::Body>
where
    S: Stream<Item = Result<Bytes, BlobError>> + Send + Unpin + 'static,
{
    let (meter, mut content) = (Arc::clone(meter), content);
    let mut rest = Bytes::new();
    let mut finished = false;
    (meter.size > 0).then(|| {
        reqwest::Body::wrap_stream(stream::poll_fn(move |context| {
            use std::task::Poll;
            if finished {
                return Poll::Ready(None);
            }
            let item = if rest.is_empty() {
                let polled = content.poll_next_unpin(context);
                meter.starved.store(polled.is_pending(), Ordering::Relaxed);
                match std::task::ready!(polled) {
                    Some(Ok(bytes)) => {
                        rest = bytes;
                        Some(meter.pass(rest.split_to(rest.len().min(PIECE))))
                    }
                    Some(Err(error)) => Some(Err(meter.fail(error))),
                    None => meter.end(),
                }
            } else {
                Some(meter.pass(rest.split_to(rest.len().min(PIECE))))
            };
            finished = !matches!(item, Some(Ok(_)));
            Poll::Ready(item)
        }))
    })
}

impl RegistryHost {
    /// Sends one HTTP request, whose body `meter` sees, and waits for the head of its answer.
    pub(super) async fn execute(
        &self,
        built: reqwest::Request,
        request: &Request,
        meter: &Meter,
    ) -> Result<Response, RegistryError> {
        self.execute_holding(None, built, request, meter).await
    }

    /// The same, of one that goes on with an answer, whose turn it has.
    pub(super) async fn execute_holding(
        &self,
        held: Option<&Held>,
        built: reqwest::Request,
        request: &Request,
        meter: &Meter,
    ) -> Result<Response, RegistryError> {
        // OpenTelemetry's names for what a client's span has. Without the query: a storage's holds a signature, an upload's its state.
        let span = tracing::trace_span!(
            "registry request",
            otel.kind = "client",
            http.request.method = %built.method(),
            server.address = http::peer(built.url()),
            url.path = built.url().path(),
            http.response.status_code = tracing::field::Empty,
        );
        self.execute_in(&span, held, built, request, meter).instrument(span.clone()).await
    }

    async fn execute_in(
        &self,
        span: &tracing::Span,
        held: Option<&Held>,
        mut built: reqwest::Request,
        request: &Request,
        meter: &Meter,
    ) -> Result<Response, RegistryError> {
        if let Some(hook) = &self.options.hook {
            hook.apply(built.headers_mut());
        }
        let (method, url) = (built.method().clone(), built.url().clone());
        let is_own = self.owns(&url);
        let client = self.http.for_url(&url, is_own, request).await?;
        let budget = self.options.budget.as_ref().filter(|budget| budget.is_there());
        // A token is fetched for a request, which may have its turn already, or wait for that of another one.
        let is_counted = is_own && (budget.is_none() || request.operation != Operation::FetchToken);
        let purpose = is_counted.then(|| self.purpose(&method, &url));
        let held = match &purpose {
            Some(purpose) => self.turn(purpose, held, request).await?,
            None => None,
        };
        let went = tokio::time::Instant::now();
        let mut answer = std::pin::pin!(client.execute(built));
        let patience = self.options.read_timeout;
        let (mut seen, mut idle) = (0, 0);
        let mut response = loop {
            // Losing the sleep costs nothing; the answer is polled again in the next round.
            if let Ok(answer) = tokio::time::timeout(patience, &mut answer).await {
                break answer
                    .map_err(|error| describe(error, request, &url, self.options.connect_timeout))?;
            }
            let sent = meter.sent.load(Ordering::Relaxed);
            let moving = sent != seen || sent < meter.size && meter.starved.load(Ordering::Relaxed);
            idle = if moving { 0 } else { idle + 1 };
            seen = sent;
            let is_whole = sent == meter.size && (sent > 0 || method == Method::PUT);
            let allowed = if is_whole { PATIENCE_FOR_WHOLE } else { 1 };
            if idle >= allowed {
                let request = Box::new(request.clone());
                return Err(RegistryError::Timeout { request, after: patience * allowed });
            }
        };
        self.options.traffic.answered(response.status());
        if let Some(purpose) = &purpose {
            let asked = retry_after(response.headers(), SystemTime::now());
            let answer = Answer {
                sent: went,
                is_refusal: is_refusal(response.status(), asked),
                retry_after: asked,
                left: RateLimit::of(response.headers()),
            };
            match budget {
                Some(budget) => budget.answered(purpose, answer),
                None => self.pace.answered(&answer),
            }
        }
        if let Some(held) = held {
            // Until its body was read, or is not wanted any more.
            response.extensions_mut().insert(held);
        }
        span.record("http.response.status_code", response.status().as_u16());
        tracing::debug!("{method} {}{}: {}", http::peer(&url), url.path(), response.status());
        Ok(response)
    }

    /// Waits until a request may go. Gives its turn, where there is a budget.
    pub(super) async fn turn(
        &self,
        purpose: &Purpose,
        held: Option<&Held>,
        request: &Request,
    ) -> Result<Option<Held>, RegistryError> {
        let Some(budget) = self.options.budget.as_ref().filter(|budget| budget.is_there()) else {
            self.pace.wait().await;
            return Ok(None);
        };
        if let Some(held) = held {
            return Ok(Some(Held::clone(held)));
        }
        match budget.begin(purpose).await {
            Ok(permit) => Ok(Some(Held::new(permit))),
            Err(reason) => Err(RegistryError::NoTurn { request: Box::new(request.clone()), reason }),
        }
    }
}
