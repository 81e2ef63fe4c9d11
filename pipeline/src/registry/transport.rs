//! One request to a registry: authorized, redirected by hand, and sent again where that may help.

use std::time::SystemTime;

use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use super::auth::{Authorization, Scope};
use super::budget::Held;
use super::challenge::{self, Challenge};
use super::chunks::Chunks;
use super::error::{RegistryError, Request, is_transient_status};
use super::host::RegistryHost;
use super::http;
use super::retry::{Backoff, retry_after};
use super::sending::{Meter, metered};
use crate::blob::ByteCount;

/// How many redirects one request follows.
const REDIRECTS_MAX: usize = 5;
/// How often one request is sent with another authorization: without any, with a token that turns out stale, with a new one.
const AUTHORIZATIONS_MAX: usize = 3;

/// A request that can be sent again.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Chunks,
    /// What the token must allow.
    pub(super) scopes: Vec<Scope>,
    pub(super) request: Request,
    /// Held by who goes on with an answer that broke: it keeps its turn.
    pub(super) held: Option<Held>,
}

impl Call {
    pub(super) fn new(method: Method, url: Url, scopes: &[Scope], request: Request) -> Self {
        let mut headers = HeaderMap::new();
        if matches!(method, Method::POST | Method::PUT | Method::PATCH) {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
        }
        Self { method, url, headers, body: Chunks::default(), scopes: scopes.to_vec(), request, held: None }
    }

    pub(super) fn header(mut self, name: HeaderName, value: impl AsRef<str>) -> Self {
        // All that we send is made of well-formed parts; a part that is not is left out, and the registry says what it lacks.
        if let Ok(value) = HeaderValue::from_str(value.as_ref()) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(super) fn body(mut self, body: Chunks) -> Self {
        self.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.size()));
        self.body = body;
        self
    }
}

impl RegistryHost {
    /// Sends a call until it is answered with something else than "not now", at most as often as the options allow.
    pub(super) async fn send(&self, call: &Call) -> Result<Response, RegistryError> {
        let mut backoff = Backoff::new(&self.options);
        loop {
            let (error, asked) = match self.send_once(call).await {
                Ok(response) if is_transient_status(response.status().as_u16()) => {
                    let asked = retry_after(response.headers(), SystemTime::now());
                    (self.failure(response, &call.request).await, asked)
                }
                Ok(response) => return Ok(response),
                // Who got no turn has waited long enough.
                Err(error) if error.is_transient() && !matches!(error, RegistryError::NoTurn { .. }) => {
                    (error, None)
                }
                Err(error) => return Err(error),
            };
            if !backoff.wait(&error, asked).await {
                return Err(error);
            }
        }
    }

    /// Sends a call once, and again when the registry says that it wants (another) authorization.
    pub(super) async fn send_once(&self, call: &Call) -> Result<Response, RegistryError> {
        let mut authorization = self.authorization(&call.scopes, &call.request).await?;
        for _ in 1..AUTHORIZATIONS_MAX {
            let response = self.follow(call, authorization.as_ref()).await?;
            match self.reauthorize(&response, &call.scopes, authorization.as_ref(), &call.request).await? {
                Some(other) => authorization = Some(other),
                None => return Ok(response),
            }
        }
        self.follow(call, authorization.as_ref()).await
    }

    /// The authorization with which a refused request may be sent again, if there is one.
    pub(super) async fn reauthorize(
        &self,
        response: &Response,
        scopes: &[Scope],
        used: Option<&Authorization>,
        request: &Request,
    ) -> Result<Option<Authorization>, RegistryError> {
        // Only the registry itself may ask for our credentials, not a storage that it redirected to.
        if response.status() != StatusCode::UNAUTHORIZED || !self.is_own_origin(response.url()) {
            return Ok(None);
        }
        self.answer(&challenges(response), scopes, used, request).await
    }

    /// Follows redirects. The authorization stays behind where the origin changes, and does not come back.
    async fn follow(
        &self,
        call: &Call,
        authorization: Option<&Authorization>,
    ) -> Result<Response, RegistryError> {
        let mut url = call.url.clone();
        let mut authorization = authorization.filter(|_| self.is_own_origin(&url));
        for _ in 0..=REDIRECTS_MAX {
            let mut built = reqwest::Request::new(call.method.clone(), url.clone());
            *built.headers_mut() = call.headers.clone();
            let meter = Meter::new(call.body.size(), &ByteCount::default(), &self.options.traffic);
            *built.body_mut() = metered(call.body.stream(), &meter);
            if let Some(authorization) = authorization {
                built.headers_mut().insert(AUTHORIZATION, authorization.header());
            }
            let response = self.execute_holding(call.held.as_ref(), built, &call.request, &meter).await?;
            if !is_redirect(&call.method, response.status()) {
                return Ok(response);
            }
            let target = location(&response, &call.request)?;
            if url.scheme() == "https" && target.scheme() != "https" {
                return Err(protocol(
                    &call.request,
                    format!("a redirect to plain HTTP at {}", http::peer(&target)),
                ));
            }
            if url.origin() != target.origin() {
                authorization = None;
            }
            url = target;
        }
        Err(protocol(&call.request, format!("more than {REDIRECTS_MAX} redirects")))
    }

    /// Whether a URL is on the registry's own scheme, host and port, where our authorization may go.
    pub(super) fn is_own_origin(&self, url: &Url) -> bool {
        self.known_base().is_some_and(|base| base.origin() == url.origin())
    }
}

fn is_redirect(method: &Method, status: StatusCode) -> bool {
    match status.as_u16() {
        // These keep the method. With the others, what is not a GET would have to become one.
        307 | 308 => true,
        301..=303 => matches!(*method, Method::GET | Method::HEAD),
        _ => false,
    }
}

/// An answer's `Location`, resolved against the URL that was asked.
pub(super) fn location(response: &Response, request: &Request) -> Result<Url, RegistryError> {
    let text = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let text = text.ok_or_else(|| protocol(request, "no Location".to_owned()))?;
    resolve(response.url(), text)
        .ok_or_else(|| protocol(request, "a Location that is not a URL of HTTP".to_owned()))
}

/// Resolves a `Location` (RFC 9110, 10.2.2).
pub(super) fn resolve(base: &Url, location: &str) -> Option<Url> {
    sendable(base.join(location).ok()?)
}

/// A URL of HTTP without what must not be sent on.
pub(super) fn sendable(mut url: Url) -> Option<Url> {
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return None;
    }
    url.set_fragment(None);
    // A name and a password in a URL would be sent as credentials.
    url.set_username("").ok()?;
    url.set_password(None).ok()?;
    Some(url)
}

/// What the registry wants to know before it does what it refused.
pub(super) fn challenges(response: &Response) -> Vec<Challenge> {
    let headers = response.headers().get_all(reqwest::header::WWW_AUTHENTICATE);
    headers.iter().filter_map(|value| value.to_str().ok()).flat_map(challenge::parse).collect()
}

pub(super) fn protocol(request: &Request, problem: String) -> RegistryError {
    RegistryError::Protocol { request: Box::new(request.clone()), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved_and_keep_their_query() {
        let base = Url::parse("https://r.example:5000/v2/a/blobs/uploads/?x=y").unwrap();
        for (location, resolved) in [
            ("/v2/a/blobs/uploads/1?_state=abc", "https://r.example:5000/v2/a/blobs/uploads/1?_state=abc"),
            ("1?_state=a%2Bb", "https://r.example:5000/v2/a/blobs/uploads/1?_state=a%2Bb"),
            ("https://s.example/u?sig=1#top", "https://s.example/u?sig=1"),
            ("//s.example/u", "https://s.example/u"),
            ("https://user:secret@s.example/u", "https://s.example/u"),
        ] {
            assert_eq!(resolve(&base, location).unwrap().as_str(), resolved);
        }
        for bad in ["file:///etc/passwd", "data:x", "http://", "https://[::1"] {
            assert_eq!(resolve(&base, bad), None, "{bad}");
        }
    }
}
