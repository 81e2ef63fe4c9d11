//! One registry as seen from here: how it is spoken to, and what it knows of us.

use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, Response, StatusCode};
use tokio::sync::OnceCell;
use url::Url;

use super::address::is_loopback;
use super::auth::Authenticator;
use super::credentials::ConfigFile;
use super::error::{ConnectFailure, ERROR_BODY_CAP, Operation, RegistryError, Request, error_detail};
use super::http::{self, HttpClients};
use super::options::Options;
use super::pace::Pace;
use super::retry::Backoff;
use crate::reference;

/// A registry, shared by all that talk to it.
#[derive(Debug)]
pub(super) struct RegistryHost {
    /// As the user names it: `docker.io`, `localhost:5000`.
    pub(super) name: String,
    pub(super) options: Arc<Options>,
    pub(super) http: Arc<HttpClients>,
    pub(super) auth: Authenticator,
    /// With all clients that have the same options.
    pub(super) pace: Pace,
    base: OnceCell<Url>,
}

impl RegistryHost {
    pub(super) fn new(name: &str, options: Arc<Options>, http: Arc<HttpClients>) -> Self {
        let (auth, pace) = (Authenticator::default(), options.paces.of(name));
        Self { name: name.to_owned(), options, http, auth, pace, base: OnceCell::new() }
    }

    /// For requests to hosts that this registry's documents name: with nothing of ours that is meant for the registry.
    pub(super) fn to_strangers(&self) -> Self {
        let options = Arc::new(Options {
            credentials: None,
            docker_config: ConfigFile::None,
            grantor: None,
            client_certificate: None,
            ..Options::clone(&self.options)
        });
        Self::new(&self.name, Arc::clone(&options), Arc::new(HttpClients::new(options)))
    }

    /// `scheme://host:port/v2/`. Found out once, and by one of those who ask at the same time.
    ///
    /// TLS with a verified certificate, except for two kinds of hosts. Loopback hosts are tried with plain HTTP first, then
    /// with TLS. Hosts that the user called insecure are tried with TLS first, without verification, so that nobody who only
    /// listens hears anything, then with plain HTTP.
    pub(super) async fn base(&self) -> Result<&Url, RegistryError> {
        self.base.get_or_try_init(|| self.find_base()).await
    }

    /// The base, where it is known already.
    pub(super) fn known_base(&self) -> Option<&Url> {
        self.base.get()
    }

    /// Whether a URL's host is the registry's own.
    pub(super) fn owns(&self, url: &Url) -> bool {
        self.url("https").is_ok_and(|own| own.host() == url.host())
    }

    pub(super) fn request(&self, repository: Option<&str>, operation: Operation) -> Request {
        Request { host: self.name.clone(), repository: repository.map(str::to_owned), operation }
    }

    /// The error that a response of no use is. Reads the registry's own words.
    pub(super) async fn failure(&self, response: Response, request: &Request) -> RegistryError {
        let status = response.status().as_u16();
        // A broken or endless body takes nothing from what the status says.
        let body = http::read_capped(response, ERROR_BODY_CAP, Duration::from_secs(10), request).await;
        let (code, message) = error_detail(&body.unwrap_or_default());
        let credentials = match status {
            401 | 403 => self.auth.credentials_problem(),
            _ => None,
        };
        let has_explicit_credentials = self.options.credentials.is_some();
        let request = Box::new(request.clone());
        RegistryError::Status { request, status, code, message, credentials, has_explicit_credentials }
    }

    fn url(&self, scheme: &str) -> Result<Url, RegistryError> {
        let authority = reference::registry_host(&self.name);
        Url::parse(&format!("{scheme}://{authority}/v2/")).map_err(|error| RegistryError::Configuration {
            what: format!("registry {}", self.name),
            problem: error.to_string(),
        })
    }

    async fn find_base(&self) -> Result<Url, RegistryError> {
        let (secure, plain) = (self.url("https")?, self.url("http")?);
        let insecure = self.http.is_insecure(&secure) || self.http.is_insecure(&plain);
        if secure.host_str().is_some_and(is_loopback) {
            return match self.ping(&plain).await {
                // What servers say to plain HTTP on a port for TLS: "400", or something that is not HTTP.
                Ok(StatusCode::BAD_REQUEST) | Err(RegistryError::Broken { .. }) => {
                    match self.ping(&secure).await {
                        Err(RegistryError::Connect { kind: ConnectFailure::NotTls, .. }) => Ok(plain),
                        Err(error) => Err(error),
                        Ok(_) => Ok(secure),
                    }
                }
                Ok(_) => Ok(plain),
                Err(error) => Err(error),
            };
        }
        if !insecure {
            return Ok(secure);
        }
        let mut backoff = Backoff::new(&self.options);
        loop {
            let error = match self.ping(&secure).await {
                Ok(_) => return Ok(secure),
                Err(RegistryError::Connect {
                    kind: ConnectFailure::NotTls | ConnectFailure::Tls | ConnectFailure::Network,
                    ..
                }) => match self.ping(&plain).await {
                    Ok(_) => return Ok(plain),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if !error.is_transient() || !backoff.wait(&error, None).await {
                return Err(error);
            }
        }
    }

    /// Whether a registry answers there; what it answers is of no matter yet.
    async fn ping(&self, url: &Url) -> Result<StatusCode, RegistryError> {
        let request = self.request(None, Operation::Ping);
        let client = self.http.for_url(url, true, &request).await?;
        // Until the answer is there: nobody reads its body.
        let _turn = self.turn(&self.purpose(&Method::GET, url), None, &request).await?;
        let answer = tokio::time::timeout(self.options.read_timeout, client.get(url.clone()).send())
            .await
            .map_err(|_| RegistryError::Timeout {
                request: Box::new(request.clone()),
                after: self.options.read_timeout,
            })?;
        answer
            .map(|response| response.status())
            .map_err(|error| http::describe(error, &request, url, self.options.connect_timeout))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::server::{Reply, TestServer, options};
    use super::*;

    fn host(server: &TestServer) -> RegistryHost {
        let options = Arc::new(options());
        let http = Arc::new(HttpClients::new(Arc::clone(&options)));
        RegistryHost::new(&server.host(), options, http)
    }

    #[tokio::test]
    async fn a_peer_without_tls_is_told_from_one_with_a_bad_certificate() {
        let server = TestServer::start(|_| Reply::new(200)).await;
        let host = host(&server);
        let error = host.ping(&host.url("https").unwrap()).await.unwrap_err();
        assert!(matches!(error, RegistryError::Connect { kind: ConnectFailure::NotTls, .. }), "{error:?}");
        assert!(error.hint().unwrap().contains(&format!("--insecure {}", server.host())));
    }

    #[tokio::test]
    async fn a_loopback_registry_is_spoken_to_with_plain_http() {
        // 400 is what a server with TLS says to plain HTTP, so it is looked at twice.
        for status in [200, 401, 404, 400] {
            let server = TestServer::start(move |_| Reply::new(status)).await;
            assert_eq!(host(&server).base().await.unwrap().as_str(), server.url("/v2/"), "{status}");
        }
    }

    #[tokio::test]
    async fn other_registries_are_spoken_to_with_tls_without_a_look() {
        let options = Arc::new(options());
        let http = Arc::new(HttpClients::new(Arc::clone(&options)));
        for (name, base) in [
            ("docker.io", "https://registry-1.docker.io/v2/"),
            ("registry.invalid:5000", "https://registry.invalid:5000/v2/"),
        ] {
            let host = RegistryHost::new(name, Arc::clone(&options), Arc::clone(&http));
            assert_eq!(host.base().await.unwrap().as_str(), base);
        }
    }
}
