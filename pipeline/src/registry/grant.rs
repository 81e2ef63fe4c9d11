//! Rights that somebody else gets for us: a process without credentials asks one that has them.
//!
//! Who has the credentials answers [`Repository::grant`]: an access token where the registry knows tokens, with the scopes that were
//! asked for, and a password only where the registry knows nothing else. Who has none puts a [`Grantor`] into a
//! client, and asks it where it would have asked a token server. Who may ask for what is decided where the credentials are.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};

use super::auth::{Access, Issuer, Scheme, Scope, basic};
use super::credentials::{Credentials, Secret};
use super::error::{Operation, RegistryError, Request};
use super::host::RegistryHost;
use super::sending::Meter;
use super::token::{self, Token};
use super::transport::protocol;
use super::{Client, Options, Repository};

/// How long what was granted is used before it is asked for again, where it has no end that we know of: a password.
const UNKNOWN_LIFETIME: Duration = Duration::from_secs(3600);

/// What is to be done with one repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Right {
    /// Its path on its host.
    pub repository: String,
    /// What is to be done with it.
    pub access: Access,
}

/// What a registry is to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Nothing: it asks for nothing.
    Nothing,
    /// A token, and how long it can be used.
    Token(Secret, Duration),
    /// A name and a password, because it knows nothing else.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: Secret,
    },
}

/// Why a right was not granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The HTTP status with which the registry, or its token server, refused. None where it was not that.
    pub status: Option<u16>,
    /// The reason, for people.
    pub message: String,
}

/// Somebody who has credentials.
#[async_trait::async_trait]
pub trait Grantor: fmt::Debug + Send + Sync {
    /// Gets the rights to do something with repositories of one registry.
    ///
    /// With `refused`, the registry refused what was granted last, so that it has to be another.
    async fn grant(&self, host: &str, rights: Vec<Right>, refused: bool) -> Result<Grant, Denied>;
}

impl Client {
    /// A client that has no credentials, neither explicit ones nor those of files, and asks `grantor` for every right. It shares
    /// the connections, and nothing that this one is known by.
    #[must_use]
    pub fn granted_by(&self, grantor: Arc<dyn Grantor>) -> Self {
        let options = Options {
            grantor: Some(grantor),
            credentials: None,
            docker_config: super::ConfigFile::None,
            ..Options::clone(&self.options)
        };
        Self {
            options: Arc::new(options),
            logins: Arc::default(),
            http: Arc::clone(&self.http),
            hosts: Arc::default(),
        }
    }
}

impl Repository {
    /// Whether there are explicit credentials for its registry.
    pub fn has_credentials(&self) -> bool {
        self.host.options.credentials.is_some()
    }

    /// What its registry has to be shown by whoever uses these rights. Tokens are kept until they are due, or were `refused`.
    pub async fn grant(&self, rights: &[Right], refused: bool) -> Result<Grant, RegistryError> {
        let request = self.request(Operation::FetchToken);
        let scopes: Vec<_> = rights.iter().map(Scope::from).collect();
        let host = &self.host;
        if host.auth.scheme().is_none() {
            host.ask_how(&request).await?;
        }
        match host.auth.scheme() {
            None => Ok(Grant::Nothing),
            Some(Scheme::Basic) => Ok(match host.credentials().await {
                Some(Credentials::Basic { username, password }) => {
                    Grant::Password { username: username.clone(), password: password.clone() }
                }
                Some(Credentials::IdentityToken { .. } | Credentials::RegistryToken(_)) | None => {
                    Grant::Nothing
                }
            }),
            Some(Scheme::Tokens(Issuer::Grantor(_))) => {
                Err(protocol(&request, "rights that were granted are not passed on".to_owned()))
            }
            Some(Scheme::Tokens(issuer @ Issuer::Server(_))) => {
                let authorization = host.token_for_another(&issuer, &scopes, refused, &request).await?;
                // Of one that the client brought its owner alone knows how long it holds.
                let left = authorization
                    .valid_until()
                    .map_or(UNKNOWN_LIFETIME, |until| until.saturating_duration_since(Instant::now()));
                Ok(Grant::Token(authorization.token(), left))
            }
        }
    }
}

impl RegistryHost {
    /// Finds out what the registry wants to know from whoever comes.
    async fn ask_how(&self, request: &Request) -> Result<(), RegistryError> {
        let get = reqwest::Request::new(Method::GET, self.base().await?.clone());
        let response = self.execute(get, request, &Meter::default()).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let challenges = super::transport::challenges(&response);
            self.learn(&challenges, request).await?;
        }
        Ok(())
    }

    /// Asks for a right, and gives what is sent for it.
    pub(super) async fn granted(
        &self,
        grantor: &dyn Grantor,
        scopes: &[Scope],
        refused: bool,
        request: &Request,
    ) -> Result<Token, RegistryError> {
        let rights = scopes.iter().map(right).collect::<Option<Vec<_>>>().ok_or_else(|| {
            protocol(request, "the list of repositories is granted to nobody else".to_owned())
        })?;
        let asked_at = Instant::now();
        let grant =
            grantor.grant(&self.name, rights, refused).await.map_err(|denied| match denied.status {
                Some(status) => RegistryError::Status {
                    request: Box::new(self.request(None, Operation::FetchToken)),
                    status,
                    code: None,
                    message: Some(denied.message),
                    credentials: None,
                    has_explicit_credentials: true,
                },
                None => protocol(request, denied.message),
            })?;
        match grant {
            Grant::Nothing => {
                Err(protocol(request, "a challenge to whoever has the credentials too".to_owned()))
            }
            Grant::Token(token, valid_for) => {
                Ok(Token::new(token::header(token.expose(), request)?, asked_at + valid_for))
            }
            Grant::Password { username, password } => {
                let login = Credentials::Basic { username, password };
                let header = basic(Some(&login)).expect("a name and a password make a header").header();
                Ok(Token::new(header, asked_at + UNKNOWN_LIFETIME))
            }
        }
    }
}

/// The right that a scope is, if it is about a repository.
fn right(scope: &Scope) -> Option<Right> {
    match scope {
        Scope::Repository(repository, access) => {
            Some(Right { repository: repository.clone(), access: *access })
        }
        Scope::Catalog => None,
    }
}

impl From<&Right> for Scope {
    fn from(right: &Right) -> Self {
        Self::Repository(right.repository.clone(), right.access)
    }
}
