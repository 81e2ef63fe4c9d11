//! Who may do what: answers to a registry's challenges, and the tokens that it handed out.
//!
//! Nothing is sent before a registry has asked for it. A token is kept for the set of scopes that it was asked for, and one that
//! is due is fetched once, however many wait for it.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::HeaderValue;
use tokio::sync::OnceCell;

use super::challenge::Challenge;
use super::credentials::{self, Credentials, Found, Secret};
use super::error::{RegistryError, Request};
use super::grant::Grantor;
use super::host::RegistryHost;
use super::token::{Bearer, Token};

/// Tokens for more scope sets than this are not kept.
const TOKENS_MAX: usize = 1024;
/// Scopes that a registry may add to what we ask for.
const EXTRA_SCOPES_MAX: usize = 8;

/// What is to be done with a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Pull,
    /// Read and write it.
    Push,
    /// Read it, and delete what is in it.
    Delete,
}

/// What a token is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// An access to a repository.
    Repository(String, Access),
    /// The names of all repositories.
    Catalog,
}

/// What one registry wants to know, and what it was told.
#[derive(Debug, Default)]
pub(super) struct Authenticator {
    scheme: Mutex<Option<Scheme>>,
    credentials: OnceCell<Found>,
    tokens: Mutex<HashMap<String, Arc<Slot>>>,
}

/// How the registry wants to be told who we are.
#[derive(Clone, Debug)]
pub(super) enum Scheme {
    Basic,
    Tokens(Issuer),
}

/// Where tokens come from.
#[derive(Clone, Debug)]
pub(super) enum Issuer {
    Server(Arc<Bearer>),
    /// Whoever grants rights. Whether what it grants are tokens is its own business.
    Grantor(Arc<dyn Grantor>),
}

/// The token of one set of scopes.
#[derive(Debug, Default)]
struct Slot {
    /// Counts fetches, so that who waited for one knows that it happened.
    fetches: AtomicU64,
    state: tokio::sync::Mutex<SlotState>,
}

#[derive(Debug, Default)]
struct SlotState {
    token: Option<(u64, Token)>,
    error: Option<RegistryError>,
    /// Scopes that the registry found missing. They go first: some token servers look at the first only.
    extra: Vec<String>,
}

/// The header that goes with a request.
#[derive(Clone, Debug)]
pub(super) struct Authorization {
    header: HeaderValue,
    /// Which fetch it came from; none for what cannot be fetched anew.
    fetch: Option<u64>,
    /// It is not from a cache, so if it is refused, another would be too.
    fresh: bool,
    /// None for what has no end that we know of.
    valid_until: Option<Instant>,
}

impl Authorization {
    fn new(header: HeaderValue, fetch: Option<u64>, fresh: bool) -> Self {
        Self { header, fetch, fresh, valid_until: None }
    }

    fn of(token: &Token, fetch: u64, fresh: bool) -> Self {
        Self { header: token.header(), fetch: Some(fetch), fresh, valid_until: Some(token.valid_until()) }
    }

    pub(super) fn valid_until(&self) -> Option<Instant> {
        self.valid_until
    }

    /// The token itself, where it is one.
    pub(super) fn token(&self) -> Secret {
        let text = self.header.to_str().unwrap_or_default();
        text.strip_prefix("Bearer ").unwrap_or_default().to_owned().into()
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.header.clone()
    }
}

impl Authenticator {
    /// Why there are no credentials, where some seemed to be configured.
    pub(super) fn credentials_problem(&self) -> Option<String> {
        self.credentials.get().and_then(|found| found.problem.clone())
    }

    /// The credentials, where they were looked up already.
    pub(super) fn known_credentials(&self) -> Option<&Credentials> {
        self.credentials.get().and_then(|found| found.credentials.as_ref())
    }

    pub(super) fn scheme(&self) -> Option<Scheme> {
        self.scheme.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn slot(&self, scopes: &str) -> Arc<Slot> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= TOKENS_MAX && !tokens.contains_key(scopes) {
            tokens.clear();
        }
        Arc::clone(tokens.entry(scopes.to_owned()).or_default())
    }
}

impl RegistryHost {
    /// What to send with a request, by what the registry has asked for so far.
    pub(super) async fn authorization(
        &self,
        scopes: &[Scope],
        request: &Request,
    ) -> Result<Option<Authorization>, RegistryError> {
        match self.auth.scheme() {
            None => Ok(None),
            Some(Scheme::Basic) => Ok(basic(self.credentials().await)),
            Some(Scheme::Tokens(issuer)) => self.token(&issuer, scopes, None, None, request).await.map(Some),
        }
    }

    /// What to send with a request again, after it was refused with these challenges. None where nothing better is known.
    pub(super) async fn answer(
        &self,
        challenges: &[Challenge],
        scopes: &[Scope],
        used: Option<&Authorization>,
        request: &Request,
    ) -> Result<Option<Authorization>, RegistryError> {
        let other = match self.learn(challenges, request).await? {
            None => None,
            Some((Scheme::Basic, _)) => basic(self.credentials().await),
            Some((Scheme::Tokens(issuer), asked)) => {
                let missing = asked.filter(|scope| !covers(scopes, scope));
                Some(self.token(&issuer, scopes, used, missing, request).await?)
            }
        };
        Ok(other.filter(|other| used.is_none_or(|used| used.header != other.header)))
    }

    /// Remembers which of a registry's challenges is answered, and gives it with the scope that a token server has to hear of.
    pub(super) async fn learn<'a>(
        &self,
        challenges: &'a [Challenge],
        request: &Request,
    ) -> Result<Option<(Scheme, Option<&'a str>)>, RegistryError> {
        let by_scheme = |name| challenges.iter().find(|challenge| challenge.scheme() == name);
        let bearer = by_scheme("bearer").filter(|challenge| challenge.parameter("realm").is_some());
        let (scheme, asked) = match (&self.options.grantor, bearer, by_scheme("basic")) {
            (_, None, None) => return Ok(None),
            (Some(grantor), _, _) => (Scheme::Tokens(Issuer::Grantor(Arc::clone(grantor))), None),
            // Bearer first: it sends a password to fewer places.
            (None, Some(challenge), _) => {
                let bearer = Bearer::from_challenge(challenge, self.base().await?, request)?;
                (Scheme::Tokens(Issuer::Server(Arc::new(bearer))), challenge.parameter("scope"))
            }
            (None, None, Some(_)) => (Scheme::Basic, None),
        };
        self.remember(scheme.clone());
        Ok(Some((scheme, asked)))
    }

    fn remember(&self, scheme: Scheme) {
        *self.auth.scheme.lock().unwrap_or_else(PoisonError::into_inner) = Some(scheme);
    }

    /// The token for a set of scopes, for somebody else: another than the kept one, where that was refused.
    pub(super) async fn token_for_another(
        &self,
        issuer: &Issuer,
        scopes: &[Scope],
        refused: bool,
        request: &Request,
    ) -> Result<Authorization, RegistryError> {
        let kept = self.auth.slot(&joined(scopes)).fetches.load(Ordering::Acquire);
        let used = refused.then(|| Authorization::new(HeaderValue::from_static(""), Some(kept), false));
        self.token(issuer, scopes, used.as_ref(), None, request).await
    }

    /// Explicit credentials, else docker's configuration, looked up once.
    pub(super) async fn credentials(&self) -> Option<&Credentials> {
        let found = self.auth.credentials.get_or_init(|| async {
            if let Some(credentials) = self.options.credentials.clone() {
                return Found { credentials: Some(credentials), problem: None };
            }
            let found = credentials::find(&self.options.docker_config, &self.name).await;
            if let Some(problem) = &found.problem {
                tracing::warn!(host = self.name, "no credentials: {problem}");
            }
            found
        });
        found.await.credentials.as_ref()
    }

    /// The token for a set of scopes: the kept one unless it is due or was refused, else one that one of the waiters fetches.
    ///
    /// # Cancel safety
    /// Cancelled while it fetches, it leaves the fetch to the next in line.
    async fn token(
        &self,
        issuer: &Issuer,
        scopes: &[Scope],
        refused: Option<&Authorization>,
        missing: Option<&str>,
        request: &Request,
    ) -> Result<Authorization, RegistryError> {
        if let Some(Credentials::RegistryToken(token)) = self.credentials().await {
            let header = super::token::header(token.expose(), request)?;
            return Ok(Authorization::new(header, None, true));
        }
        let key = joined(scopes);
        let slot = self.auth.slot(&key);
        let seen = slot.fetches.load(Ordering::Acquire);
        let mut state = slot.state.lock().await;
        let waited = slot.fetches.load(Ordering::Acquire) != seen;
        let mut must_fetch = false;
        if let Some(missing) = missing
            && !state.extra.iter().any(|known| known == missing)
            && state.extra.len() < EXTRA_SCOPES_MAX
        {
            state.extra.insert(0, missing.to_owned());
            must_fetch = true;
        }
        if !must_fetch {
            if let (true, Some(error)) = (waited, &state.error) {
                return Err(error.clone());
            }
            let refused_fetch = refused.and_then(|refused| refused.fetch);
            // A token that was fetched for this very request and refused would be no better if it were fetched again.
            let give_up = refused.is_some_and(|refused| refused.fresh);
            if let Some((fetch, token)) = &state.token
                && token.is_valid(Instant::now())
                && (give_up || refused_fetch != Some(*fetch))
            {
                return Ok(Authorization::of(token, *fetch, waited));
            }
        }
        let result = match issuer {
            Issuer::Server(bearer) => {
                let wanted: Vec<String> =
                    state.extra.iter().cloned().chain(scopes.iter().map(Scope::to_string)).collect();
                self.fetch_token(bearer, &wanted).await
            }
            Issuer::Grantor(grantor) => {
                self.granted(grantor.as_ref(), scopes, refused.is_some(), request).await
            }
        };
        let fetch = slot.fetches.fetch_add(1, Ordering::AcqRel) + 1;
        match result {
            Ok(token) => {
                // What is granted may be a token that was kept elsewhere, unless that one had been refused.
                let fresh = matches!(issuer, Issuer::Server(_)) || refused.is_some();
                let authorization = Authorization::of(&token, fetch, fresh);
                state.error = None;
                state.token = Some((fetch, token));
                Ok(authorization)
            }
            Err(error) => {
                state.error = Some(error.clone());
                Err(error)
            }
        }
    }
}

pub(super) fn basic(credentials: Option<&Credentials>) -> Option<Authorization> {
    match credentials? {
        Credentials::Basic { username, password } => {
            Some(Authorization::new(basic_header(username, password.expose()), None, true))
        }
        Credentials::IdentityToken { .. } | Credentials::RegistryToken(_) => None,
    }
}

/// RFC 7617.
pub(super) fn basic_header(username: &str, password: &str) -> HeaderValue {
    let encoded = STANDARD.encode(format!("{username}:{password}"));
    let mut header = HeaderValue::from_str(&format!("Basic {encoded}"))
        .unwrap_or_else(|_| unreachable!("base64 is made of visible characters"));
    header.set_sensitive(true);
    header
}

fn joined(scopes: &[Scope]) -> String {
    scopes.iter().map(Scope::to_string).collect::<Vec<_>>().join(" ")
}

/// Whether our scopes contain all that a challenge's scope names.
fn covers(scopes: &[Scope], wanted: &str) -> bool {
    wanted.split_ascii_whitespace().all(|wanted| {
        scopes.iter().any(|scope| {
            let own = scope.to_string();
            match (own.rsplit_once(':'), wanted.rsplit_once(':')) {
                (Some((name, own)), Some((wanted_name, wanted))) => {
                    name == wanted_name
                        && wanted.split(',').all(|action| own.split(',').any(|own| own == action))
                }
                _ => false,
            }
        })
    })
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Repository(name, access) = self else { return f.write_str("registry:catalog:*") };
        let actions = match access {
            Access::Pull => "pull",
            Access::Push => "pull,push",
            Access::Delete => "pull,delete",
        };
        write!(f, "repository:{name}:{actions}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wider_scope_covers_a_narrower_one_of_the_same_repository() {
        let scopes = [
            Scope::Repository("a/b".to_owned(), Access::Push),
            Scope::Repository("source".to_owned(), Access::Pull),
        ];
        for (wanted, covered) in [
            ("repository:a/b:pull", true),
            ("repository:a/b:push,pull", true),
            ("repository:a/b:pull repository:source:pull", true),
            ("", true),
            ("repository:a/b:delete", false),
            ("repository:a/b:*", false),
            ("repository:source:push", false),
            ("repository:project/a/b:pull", false),
            ("registry:catalog:*", false),
        ] {
            assert_eq!(covers(&scopes, wanted), covered, "{wanted}");
        }
    }
}
