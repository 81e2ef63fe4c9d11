//! What a registry takes of all who ask it together: a process that is one of many asks a [`Budget`] before each request, where a
//! process of its own keeps its [pace](super::Paces).
//!
//! Here is also what registries say of their limits by themselves, in `RateLimit-*`.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::Method;
use reqwest::header::HeaderMap;
use tokio::time::Instant;
use url::Url;

use super::credentials::Credentials;
use super::host::RegistryHost;
use crate::digest::Digest;

/// What kind of request it is, of those that registries limit apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// A manifest is read, which is what Docker Hub counts.
    Manifest,
    /// Something else is read.
    Pull,
    /// Something is written.
    Push,
}

/// What a request counts for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Purpose {
    /// The registry, as the user names it.
    pub host: String,
    /// Who we are there: a name, or a digest of what has none. Empty: nobody.
    pub account: String,
    /// What is done there.
    pub action: Action,
}

/// What a registry has answered.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// When the request went.
    pub sent: Instant,
    /// Whether it was not taken, because there were too many.
    pub is_refusal: bool,
    /// The pause that it asked for.
    pub retry_after: Option<Duration>,
    /// What it said of its limits.
    pub left: Option<RateLimit>,
}

/// What a registry says that is left of a limit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests that it still takes.
    pub remaining: u64,
    /// After which time it takes more again. None: it does not say.
    pub reset: Option<Duration>,
}

/// Whoever says when requests may go.
#[async_trait::async_trait]
pub trait Budget: fmt::Debug + Send + Sync {
    /// Whether it is there. Without it, a process keeps its own pace.
    fn is_there(&self) -> bool;

    /// Waits until a request may go, but not for ever: otherwise gives the reason, for people.
    ///
    /// # Cancel safety
    /// Dropped before it returns, the request counts for nothing.
    async fn begin(&self, purpose: &Purpose) -> Result<Permit, String>;

    /// Hears what a registry answered.
    fn answered(&self, purpose: &Purpose, answer: Answer);
}

/// The right to one request. Dropped, the request has ended, with the body of its answer.
pub struct Permit(Option<Box<dyn FnOnce() + Send + Sync>>);

impl Permit {
    /// One whose end `ended` hears.
    pub fn new(ended: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(ended)))
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(ended) = self.0.take() {
            ended();
        }
    }
}

/// A permit that an answer, or whoever goes on with it, holds.
pub(super) type Held = Arc<Permit>;

impl RegistryHost {
    /// What a request to the registry counts for.
    pub(super) fn purpose(&self, method: &Method, url: &Url) -> Purpose {
        let path = url.path();
        let reads = matches!(*method, Method::GET | Method::HEAD);
        let action = match method {
            &Method::GET if path.contains("/manifests/") => Action::Manifest,
            _ if reads && !path.contains("/blobs/uploads/") => Action::Pull,
            _ => Action::Push,
        };
        Purpose { host: self.name.clone(), account: self.known_account(), action }
    }

    /// Who we are there, as far as that is known.
    pub(super) fn known_account(&self) -> String {
        if let Some(account) = &self.options.account {
            return account.clone();
        }
        self.options.credentials.as_ref().or_else(|| self.auth.known_credentials()).map_or_else(
            String::new,
            |credentials| match credentials {
                Credentials::Basic { username, .. } => username.clone(),
                Credentials::IdentityToken { token, .. } => digest(token.expose()),
                Credentials::RegistryToken(token) => digest(token.expose()),
            },
        )
    }
}

/// By which a secret is known that must not be told.
fn digest(secret: &str) -> String {
    Digest::sha256(secret).hex()[..16].to_owned()
}

impl RateLimit {
    /// `RateLimit-Remaining` and `RateLimit-Reset` as Docker Hub and the IETF's drafts up to the sixth have them, `RateLimit` of the
    /// later ones, and the same with `X-` before it. Of several limits it is the one of which the least is left.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let get = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(limits) = get("ratelimit") {
            return Self::of_list(limits);
        }
        let either = |name: &str| get(name).or_else(|| get(&format!("x-{name}")));
        let number = |text: &str| text.split([';', ',']).next()?.trim().parse::<u64>().ok();
        let remaining = number(either("ratelimit-remaining")?)?;
        let reset = either("ratelimit-reset").and_then(number).map(|seconds| {
            // Some tell the time of the day, and not how long it is until then.
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let at = Duration::from_secs(seconds);
            if seconds > 1_000_000_000 { at.saturating_sub(now) } else { at }
        });
        Some(Self { remaining, reset })
    }

    /// `"default";r=50;t=30, "daily";r=900;t=3600`, or `limit=100, remaining=50, reset=30`.
    fn of_list(text: &str) -> Option<Self> {
        let value = |item: &str, name: &str| {
            let found =
                item.split([';', ',']).find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='));
            found.and_then(|number| number.trim().parse::<u64>().ok())
        };
        if let Some(remaining) = value(text, "remaining") {
            return Some(Self { remaining, reset: value(text, "reset").map(Duration::from_secs) });
        }
        let limits = text.split(',').filter_map(|item| {
            Some(Self { remaining: value(item, "r")?, reset: value(item, "t").map(Duration::from_secs) })
        });
        limits.min_by_key(|limit| limit.remaining)
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    fn read(headers: &[(&'static str, &'static str)]) -> Option<(u64, Option<u64>)> {
        let headers = headers
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        RateLimit::of(&headers).map(|limit| (limit.remaining, limit.reset.map(|reset| reset.as_secs())))
    }

    #[test]
    fn what_is_left_is_read_in_all_forms() {
        let hub = [("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "76;w=21600")];
        assert_eq!(read(&hub), Some((76, None)));
        assert_eq!(read(&[("ratelimit-remaining", "0"), ("ratelimit-reset", "30")]), Some((0, Some(30))));
        assert_eq!(
            read(&[("x-ratelimit-remaining", "5"), ("x-ratelimit-reset", "1000000001")]),
            Some((5, Some(0)))
        );
        assert_eq!(read(&[("ratelimit", "limit=100, remaining=50, reset=30")]), Some((50, Some(30))));
        assert_eq!(read(&[("ratelimit", "\"a\";r=50;t=30, \"day\";r=7;t=3600")]), Some((7, Some(3600))));
        for nothing in ["", "x", "-1", "\"a\";q=5"] {
            assert_eq!(read(&[("ratelimit-remaining", nothing)]), None, "{nothing}");
            assert_eq!(read(&[("ratelimit", nothing)]), None, "{nothing}");
        }
        assert_eq!(read(&[]), None);
    }
}
