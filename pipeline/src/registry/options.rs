//! How registries are spoken to: what the command line, the environment or a server's configuration chooses.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::HeaderMap;

use super::address::AllowedNetwork;
use super::budget::Budget;
use super::credentials::{self, ConfigFile, Credentials};
use super::grant::Grantor;
use super::pace::Paces;
use super::traffic::Traffic;

/// The choices for one [`Client`](super::Client). Source and destination have a client each, so that each has its own credentials.
#[derive(Clone, Debug)]
pub struct Options {
    /// Hosts, with or without a port, that may be spoken to without verified TLS: first TLS without verification, then, where
    /// TLS is not spoken, plain HTTP. Docker's `insecure-registries` means the same.
    pub insecure_hosts: Vec<String>,
    /// PEM files of certificate authorities that are trusted beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// What a registry that asks for a certificate is shown. Other hosts, to which it may redirect, never see it.
    pub client_certificate: Option<ClientCertificate>,
    /// Credentials that were given explicitly. They win over docker's configuration.
    pub credentials: Option<Credentials>,
    /// Docker's `config.json`.
    pub docker_config: ConfigFile,
    /// Who is asked for every right, in the place of a token server. Then there should be no credentials.
    pub grantor: Option<Arc<dyn Grantor>>,
    /// Private networks and hosts that may be connected to although a registry, and not the user, named them.
    pub allow_networks: Vec<AllowedNetwork>,
    /// Whether the registry's own host is trusted to be anywhere, because the user of this very process named it. A server
    /// whose clients name the registries says false: then `allow_networks` counts for the registry's host too.
    pub trust_registry_host: bool,
    /// How often a request is sent, the first time included.
    pub attempts: u32,
    /// The longest that all waits between the attempts of one request may take together.
    pub retry_wait: Duration,
    /// The wait before the second attempt, about; it doubles from then on.
    pub backoff: Duration,
    /// The longest that a connection may take to come about.
    pub connect_timeout: Duration,
    /// The longest that nothing may come, or be taken, in the middle of an exchange.
    pub read_timeout: Duration,
    /// What the registry is told of us.
    pub user_agent: String,
    /// The size of the pieces, in bytes, in which a blob of unknown size is uploaded. Each is held until it is acknowledged.
    pub upload_chunk: usize,
    /// From this size on, in bytes, a blob goes up in such pieces if its upload is recorded (`Repository::logging_to`), so that
    /// there is something to go on with. Each piece waits for its answer; below 256 MiB, 32 pieces, to send all again costs little more.
    pub resumable_from: u64,
    /// What is added to every request.
    pub hook: Option<RequestHook>,
    /// Where what is sent and received is counted.
    pub traffic: Traffic,
    /// How fast registries are asked that have asked for patience.
    pub paces: Paces,
    /// Who says when a request may go, in the place of `paces`, where other processes ask the same registries.
    pub budget: Option<Arc<dyn Budget>>,
    /// Whose requests they are there, where credentials do not tell.
    pub account: Option<String>,
}

/// Adds headers to a request before it is sent: those of a distributed trace, which this crate knows nothing of. It is called in
/// the request's own [span](tracing::Span).
#[derive(Clone)]
pub struct RequestHook(Arc<dyn Fn(&mut HeaderMap) + Send + Sync>);

impl RequestHook {
    /// Calls `hook` for every request. It must return at once.
    pub fn new(hook: impl Fn(&mut HeaderMap) + Send + Sync + 'static) -> Self {
        Self(Arc::new(hook))
    }

    pub(super) fn apply(&self, headers: &mut HeaderMap) {
        (self.0)(headers);
    }
}

impl fmt::Debug for RequestHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RequestHook")
    }
}

/// A certificate and its private key.
#[derive(Clone, Debug)]
pub struct ClientCertificate {
    /// The PEM file of the certificate and its chain.
    pub certificate: PathBuf,
    /// The PEM file of the key.
    pub key: PathBuf,
}

impl Options {
    /// What a registry, as the user names it, is logged in to with: the explicit credentials, else docker's.
    pub async fn credentials_for(&self, host: &str) -> Option<Credentials> {
        if let Some(explicit) = &self.credentials {
            return Some(explicit.clone());
        }
        let found = credentials::find(&self.docker_config, host).await;
        if let Some(problem) = found.problem {
            tracing::warn!("no credentials for {host}: {problem}");
        }
        found.credentials
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            insecure_hosts: Vec::new(),
            ca_files: Vec::new(),
            client_certificate: None,
            credentials: None,
            docker_config: ConfigFile::Default,
            grantor: None,
            allow_networks: Vec::new(),
            trust_registry_host: true,
            attempts: 5,
            retry_wait: Duration::from_secs(120),
            backoff: Duration::from_millis(500),
            connect_timeout: Duration::from_secs(15),
            read_timeout: Duration::from_secs(60),
            user_agent: concat!("occystrap/", env!("CARGO_PKG_VERSION")).to_owned(),
            upload_chunk: 8 * 1024 * 1024,
            resumable_from: 256 * 1024 * 1024,
            hook: None,
            traffic: Traffic::default(),
            paces: Paces::default(),
            budget: None,
            account: None,
        }
    }
}
