//! The client of the OCI distribution protocol.
//!
//! A [`Client`] hands out a [`Repository`], whose methods are the protocol's operations:
//!
//! | what | where |
//! |---|---|
//! | manifests: get, check, put, delete | `manifest` |
//! | what names a manifest as its subject | `referrers` |
//! | names of repositories and tags, page by page | `list` |
//! | blobs down: stream, resume, verify | `blob_read` |
//! | layers that may be elsewhere | `foreign` |
//! | blobs up: check, mount, sessions | `mount`, `session` |
//! | blobs up, digest known before: one PUT | `upload_blob` |
//! | blobs up, digest known at the end: PATCH by PATCH | `upload_stream` |
//! | blobs up, as far as another process brought them | `upload_log` |
//!
//! Below them, from the top down: `transport` sends a request, with its authorization, redirects and retries (`retry`); `sending`
//! times it, `pace` says when it may go, or `budget` where it is one of many processes that share one, and `traffic` counts; `auth`
//! and `token` answer challenges, and `grant` where somebody else has the credentials; `credentials` and `docker_config` find out who
//! we are; `host` finds out how a registry is spoken
//! to; `http` owns the connections; `named` says which certificates are trusted on them, and `address` where they may lead. Whoever fuzzes the answers of strangers starts at
//! [`challenge::parse`].
//!
//! Not here: which manifest of an index is meant, what a manifest's bytes say, and in which order blobs go.

mod address;
mod auth;
mod blob_read;
mod budget;
pub mod challenge;
mod chunks;
mod credentials;
mod docker_config;
mod error;
mod foreign;
mod grant;
mod host;
mod http;
mod list;
mod manifest;
mod mount;
mod named;
mod options;
mod pace;
mod referrers;
mod retry;
mod sending;
mod session;
#[cfg(test)]
mod tests;
mod token;
mod traffic;
mod transport;
mod upload_blob;
mod upload_log;
mod upload_stream;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Method;
use url::Url;

pub use self::address::{AllowedNetwork, InvalidNetwork, is_public};
pub use self::auth::Access;
use self::auth::Scope;
pub use self::budget::{Action, Answer, Budget, Permit, Purpose, RateLimit};
pub use self::credentials::{ConfigFile, Credentials, Secret};
pub use self::error::{ConnectFailure, Operation, RegistryError, Request};
pub use self::grant::{Denied, Grant, Grantor, Right};
use self::host::RegistryHost;
use self::http::HttpClients;
pub use self::list::Names;
pub use self::manifest::{FetchedManifest, ManifestHead, PutManifest};
pub use self::mount::Mount;
pub use self::options::{ClientCertificate, Options, RequestHook};
pub use self::pace::{Paces, Rhythm};
pub use self::referrers::{Referrers, fallback_tag};
pub use self::session::{MIN_CHUNK_MAX, UploadSession, uploads_ended};
pub use self::traffic::Traffic;
use self::transport::Call;
pub use self::upload_log::{UploadLog, UploadState};
use crate::reference::{Reference, RegistryName};

/// A client with one set of options and credentials. Clones share connections and tokens.
#[derive(Clone, Debug)]
pub struct Client {
    options: Arc<Options>,
    /// By host, what goes before the options' credentials.
    logins: Arc<HashMap<String, Credentials>>,
    http: Arc<HttpClients>,
    hosts: Arc<Mutex<HashMap<String, Arc<RegistryHost>>>>,
}

/// A repository of a registry. Clones are cheap.
#[derive(Clone, Debug)]
pub struct Repository {
    host: Arc<RegistryHost>,
    name: String,
    access: Access,
    /// Where uploads are recorded.
    uploads: Option<Arc<dyn UploadLog>>,
}

impl Client {
    /// A client that has not connected to anything yet.
    pub fn new(options: Options) -> Result<Self, RegistryError> {
        for file in options
            .ca_files
            .iter()
            .chain(options.client_certificate.iter().flat_map(|pair| [&pair.certificate, &pair.key]))
        {
            // Said now, and not in the middle of a job.
            std::fs::File::open(file).map_err(|error| RegistryError::Configuration {
                what: file.display().to_string(),
                problem: error.to_string(),
            })?;
        }
        let options = Arc::new(options);
        let http = Arc::new(HttpClients::new(Arc::clone(&options)));
        Ok(Self { options, logins: Arc::default(), http, hosts: Arc::default() })
    }

    /// The same client, which logs in to these hosts, as references name them, with these credentials. It shares the connections alone.
    #[must_use]
    pub fn with_logins(&self, logins: HashMap<String, Credentials>) -> Self {
        Self { logins: Arc::new(logins), hosts: Arc::default(), ..self.clone() }
    }

    /// The repository that a reference names, for this access.
    pub fn repository(&self, reference: &Reference, access: Access) -> Repository {
        Repository {
            host: self.host(reference.host()),
            name: reference.repository().to_owned(),
            access,
            uploads: None,
        }
    }

    /// The names of all repositories of a registry.
    pub fn repositories(&self, host: &RegistryName) -> Names {
        Names::of_repositories(self.host(host.as_str()))
    }

    /// The same client, whose requests `budget` lets go, and count for `account` if it is said. It shares the connections alone.
    #[must_use]
    pub fn budgeted_by(&self, budget: &Arc<dyn Budget>, account: Option<String>) -> Self {
        let options = Options { budget: Some(Arc::clone(budget)), account, ..Options::clone(&self.options) };
        Self { options: Arc::new(options), hosts: Arc::default(), ..self.clone() }
    }

    fn host(&self, name: &str) -> Arc<RegistryHost> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let host = hosts.entry(name.to_owned()).or_insert_with(|| {
            let options = match self.logins.get(name) {
                Some(login) => {
                    Arc::new(Options { credentials: Some(login.clone()), ..Options::clone(&self.options) })
                }
                None => Arc::clone(&self.options),
            };
            Arc::new(RegistryHost::new(name, options, Arc::clone(&self.http)))
        });
        Arc::clone(host)
    }
}

impl Repository {
    /// The registry's host, as the user names it.
    pub fn host(&self) -> &str {
        &self.host.name
    }

    /// The repository's path on its host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who we are at its registry, as far as that is known: what requests there count for. A name, or a digest of what has none.
    pub fn account(&self) -> String {
        self.host.known_account()
    }

    /// Another repository of the same registry.
    #[must_use]
    pub fn sibling(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }

    fn scope(&self) -> Scope {
        Scope::Repository(self.name.clone(), self.access)
    }

    fn request(&self, operation: Operation) -> Request {
        self.host.request(Some(&self.name), operation)
    }

    /// The URL of something in the repository. Its parts are well formed, so that they need no escaping.
    async fn url(&self, path: &str) -> Result<Url, RegistryError> {
        let base = self.host.base().await?;
        let mut url = base.clone();
        url.set_path(&format!("{}{}/{path}", base.path(), self.name));
        Ok(url)
    }

    async fn call(&self, method: Method, path: &str, operation: Operation) -> Result<Call, RegistryError> {
        let url = self.url(path).await?;
        Ok(Call::new(method, url, &[self.scope()], self.request(operation)))
    }
}
