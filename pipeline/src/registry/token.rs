//! Tokens of a registry's token server: distribution's "Token Authentication" and its OAuth2 variant.
//!
//! The realm is chosen by the registry, so it is treated as a stranger's: its address is guarded, its redirects are not followed,
//! its answer is capped, and credentials go there over TLS unless the registry itself has none.

use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use url::Url;
use url::form_urlencoded::Serializer;

use super::auth::basic_header;
use super::challenge::Challenge;
use super::credentials::Credentials;
use super::error::{Operation, RegistryError, Request};
use super::host::RegistryHost;
use super::http;
use super::retry::{Backoff, retry_after};
use super::sending::Meter;
use super::transport::{protocol, resolve};

/// The largest answer of a token server that is read, in bytes.
const TOKEN_BODY_CAP: usize = 64 * 1024;
/// How long a token holds where its server does not say (distribution, "Token Authentication").
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// A token is not used in the last part of its life, so that it does not end on its way.
const SLACK_MAX: Duration = Duration::from_secs(30);
/// What we are, in the OAuth2 variant.
const CLIENT_ID: &str = "occystrap";

/// Where tokens are had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bearer {
    realm: Url,
    service: Option<String>,
}

/// A token and its time.
#[derive(Clone, Debug)]
pub(super) struct Token {
    header: HeaderValue,
    valid_until: Instant,
}

impl Token {
    pub(super) fn new(header: HeaderValue, valid_until: Instant) -> Self {
        Self { header, valid_until }
    }

    pub(super) fn valid_until(&self) -> Instant {
        self.valid_until
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.header.clone()
    }

    pub(super) fn is_valid(&self, now: Instant) -> bool {
        now < self.valid_until
    }
}

impl Bearer {
    pub(super) fn from_challenge(
        challenge: &Challenge,
        base: &Url,
        request: &Request,
    ) -> Result<Self, RegistryError> {
        let realm = challenge
            .parameter("realm")
            .filter(|realm| realm.contains("://"))
            .and_then(|realm| resolve(base, realm))
            .ok_or_else(|| protocol(request, "a token realm that is not a URL of HTTP".to_owned()))?;
        if base.scheme() == "https" && realm.scheme() != "https" {
            return Err(protocol(
                request,
                format!("a token realm with plain HTTP at {}", http::peer(&realm)),
            ));
        }
        let service = challenge.parameter("service").filter(|service| !service.is_empty());
        Ok(Self { realm, service: service.map(str::to_owned) })
    }
}

/// The header that carries a token.
pub(super) fn header(token: &str, request: &Request) -> Result<HeaderValue, RegistryError> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| protocol(request, "a token with characters that no header can carry".to_owned()))?;
    header.set_sensitive(true);
    Ok(header)
}

impl RegistryHost {
    /// Asks the token server for a token, again where that may help.
    pub(super) async fn fetch_token(
        &self,
        bearer: &Bearer,
        scopes: &[String],
    ) -> Result<Token, RegistryError> {
        let request = self.request(None, Operation::FetchToken);
        let mut backoff = Backoff::new(&self.options);
        loop {
            let asked_at = Instant::now();
            let (error, asked) = match self.ask_token_server(bearer, scopes, &request).await {
                Ok(response) if response.status().is_success() => {
                    let body =
                        http::read_capped(response, TOKEN_BODY_CAP, self.options.read_timeout, &request)
                            .await?;
                    return parse_token(&body, asked_at, &request);
                }
                Ok(response) => {
                    let asked = retry_after(response.headers(), SystemTime::now());
                    (self.failure(response, &request).await, asked)
                }
                Err(error) => (error, None),
            };
            if !error.is_transient() || !backoff.wait(&error, asked).await {
                return Err(error);
            }
        }
    }

    /// An identity token goes by OAuth2 first; a server that does not know that way gets it as docker's older clients sent it.
    async fn ask_token_server(
        &self,
        bearer: &Bearer,
        scopes: &[String],
        request: &Request,
    ) -> Result<Response, RegistryError> {
        let basic = match self.credentials().await {
            None | Some(Credentials::RegistryToken(_)) => None,
            Some(Credentials::Basic { username, password }) => {
                Some(basic_header(username, password.expose()))
            }
            Some(Credentials::IdentityToken { username, token }) => {
                let response =
                    self.execute(oauth2(bearer, scopes, token.expose()), request, &Meter::default()).await?;
                if !matches!(response.status(), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED) {
                    return Ok(response);
                }
                let username = if username.is_empty() { "<token>" } else { username };
                Some(basic_header(username, token.expose()))
            }
        };
        let mut get = reqwest::Request::new(Method::GET, get_url(bearer, scopes, self.account().await));
        if let Some(basic) = basic {
            get.headers_mut().insert(AUTHORIZATION, basic);
        }
        self.execute(get, request, &Meter::default()).await
    }

    async fn account(&self) -> Option<&str> {
        match self.credentials().await? {
            Credentials::Basic { username, .. } => Some(username),
            Credentials::IdentityToken { .. } | Credentials::RegistryToken(_) => None,
        }
    }
}

fn get_url(bearer: &Bearer, scopes: &[String], account: Option<&str>) -> Url {
    let mut url = bearer.realm.clone();
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = &bearer.service {
            query.append_pair("service", service);
        }
        for scope in scopes.iter().flat_map(|scope| scope.split_ascii_whitespace()) {
            query.append_pair("scope", scope);
        }
        if let Some(account) = account {
            query.append_pair("account", account);
        }
    }
    if url.query() == Some("") {
        url.set_query(None);
    }
    url
}

fn oauth2(bearer: &Bearer, scopes: &[String], token: &str) -> reqwest::Request {
    let mut form = Serializer::new(String::new());
    form.append_pair("grant_type", "refresh_token");
    form.append_pair("service", bearer.service.as_deref().unwrap_or(""));
    form.append_pair("client_id", CLIENT_ID);
    form.append_pair("scope", &scopes.join(" "));
    form.append_pair("refresh_token", token);
    let mut post = reqwest::Request::new(Method::POST, bearer.realm.clone());
    post.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    *post.body_mut() = Some(form.finish().into());
    post
}

fn parse_token(body: &[u8], asked_at: Instant, request: &Request) -> Result<Token, RegistryError> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<f64>,
    }
    // serde's message may quote the token.
    let answer: Answer = serde_json::from_slice(body)
        .map_err(|_| protocol(request, "a token answer that is not understood".to_owned()))?;
    let given = |token: Option<String>| token.filter(|token| !token.is_empty());
    let token = given(answer.token)
        .or_else(|| given(answer.access_token))
        .ok_or_else(|| protocol(request, "a token answer without a token".to_owned()))?;
    // Counted from when it was asked for, on our own clock: the server's may be wrong.
    let lifetime = answer
        .expires_in
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|lifetime| !lifetime.is_zero())
        .unwrap_or(DEFAULT_LIFETIME)
        .min(Duration::from_secs(24 * 3600));
    let slack = SLACK_MAX.min(lifetime / 4);
    Ok(Token { header: header(&token, request)?, valid_until: asked_at + lifetime - slack })
}
