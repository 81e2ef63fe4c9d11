//! When a request is sent again: the waits between attempts, and what `Retry-After` asks for.

use std::fmt;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};

use super::options::Options;
use super::traffic::Traffic;

/// The longest single wait that is our own idea.
const BACKOFF_MAX: Duration = Duration::from_secs(20);

/// The attempts that are left, and how long they may still wait.
#[derive(Debug)]
pub(super) struct Backoff {
    attempts_left: u32,
    wait_left: Duration,
    next: Duration,
    attempts: u32,
    first: Duration,
    wait: Duration,
    traffic: Traffic,
}

impl Backoff {
    pub(super) fn new(options: &Options) -> Self {
        let mut backoff = Self {
            attempts_left: 0,
            wait_left: Duration::ZERO,
            next: Duration::ZERO,
            attempts: options.attempts.max(1),
            first: options.backoff,
            wait: options.retry_wait,
            traffic: options.traffic.clone(),
        };
        backoff.reset();
        backoff
    }

    /// Forgets past failures, because there was progress since.
    pub(super) fn reset(&mut self) {
        self.attempts_left = self.attempts - 1;
        self.wait_left = self.wait;
        self.next = self.first;
    }

    /// The wait before the next attempt, or None when there must not be one.
    ///
    /// A server's `Retry-After` is obeyed or, where it asks for more patience than is left, ends the attempts: to come back
    /// earlier would only be refused again.
    pub(super) fn next(&mut self, retry_after: Option<Duration>) -> Option<Duration> {
        self.attempts_left = self.attempts_left.checked_sub(1)?;
        // Between half and all of it, so that those who failed together do not come back together.
        let own = self.next.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.next = (self.next * 2).min(BACKOFF_MAX);
        let wait = retry_after.map_or(own, |asked| asked.max(own));
        self.wait_left = self.wait_left.checked_sub(wait)?;
        Some(wait)
    }

    /// Says what failed and waits before the next attempt. False when there must not be one.
    ///
    /// A first failure is nobody's worry; those that follow tell a user why nothing seems to happen.
    pub(super) async fn wait(
        &mut self,
        failure: &(dyn fmt::Display + Sync),
        retry_after: Option<Duration>,
    ) -> bool {
        match self.next(retry_after) {
            Some(wait) => {
                let (again, of) = (self.attempts - self.attempts_left, self.attempts);
                let seconds = wait.as_secs_f32();
                if again == 2 {
                    tracing::info!("{failure}; trying again in {seconds:.1} s ({again} of {of})");
                } else {
                    tracing::warn!("{failure}; trying again in {seconds:.1} s ({again} of {of})");
                }
                tokio::time::sleep(wait).await;
                self.traffic.retried();
                true
            }
            None => false,
        }
    }
}

/// `Retry-After` in either of its forms: seconds, or a date (RFC 9110, 10.2.3).
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    // A date in the past means now.
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn options() -> Options {
        Options { attempts: 3, backoff: Duration::from_secs(1), ..Options::default() }
    }

    #[test]
    fn waits_grow_and_attempts_end() {
        let mut backoff = Backoff::new(&options());
        let first = backoff.next(None).unwrap();
        let second = backoff.next(None).unwrap();
        assert!(first >= Duration::from_millis(500) && first <= Duration::from_secs(1), "{first:?}");
        assert!(second >= Duration::from_secs(1) && second <= Duration::from_secs(2), "{second:?}");
        assert_eq!(backoff.next(None), None);
        backoff.reset();
        assert!(backoff.next(None).is_some());
    }

    #[test]
    fn a_server_that_asks_for_more_patience_than_is_left_is_not_asked_again() {
        let mut backoff = Backoff::new(&options());
        assert_eq!(backoff.next(Some(Duration::from_secs(90))), Some(Duration::from_secs(90)));
        assert_eq!(backoff.next(Some(Duration::from_secs(90))), None);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Fri, 31 Dec 1999 23:59:29 GMT").unwrap();
        for (text, seconds) in [
            ("120", Some(120)),
            (" 0 ", Some(0)),
            ("Fri, 31 Dec 1999 23:59:59 GMT", Some(30)),
            ("Fri, 31 Dec 1999 23:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            assert_eq!(retry_after(&headers, now), seconds.map(Duration::from_secs), "{text}");
        }
    }
}
