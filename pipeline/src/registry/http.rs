//! The HTTP clients underneath, chosen by what a connection may do, and what their errors mean.
//!
//! HTTP/1.1 only, on purpose: every blob gets a connection of its own, so that a slow one holds up no other, no flow-control
//! window bounds a fast one, and hyper's growing read buffer (to 400 KiB) makes few wakeups of many bytes.

use std::error::Error as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::Response;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::OnceCell;
use url::Url;

use super::address::{Guard, GuardedResolver, Refused, is_loopback};
use super::error::{ConnectFailure, RegistryError, Request};
use super::named::NamedAuthorities;
use super::options::{ClientCertificate, Options};

/// Reads and writes of one connection are few and large, so small idle pools do.
const IDLE_CONNECTIONS: usize = 16;

/// What is at fault when no single file is.
const TLS_CONFIGURATION: &str = "the TLS configuration";

/// What a connection may do.
#[derive(Clone, Copy, Debug)]
struct Kind {
    tls: Tls,
    /// To the registry's own host: with our certificate, and to wherever it is if the user named it. Others are guarded.
    own: bool,
    /// By the proxy that the environment names.
    proxied: bool,
}

#[derive(Clone, Copy, Debug)]
enum Tls {
    None,
    Verified,
    Unverified,
}

/// The clients, made when they are first needed: most runs need one, and reading the system's certificates takes a while.
#[derive(Debug)]
pub(super) struct HttpClients {
    options: Arc<Options>,
    guard: Guard,
    clients: [OnceCell<reqwest::Client>; 12],
}

impl HttpClients {
    pub(super) fn new(options: Arc<Options>) -> Self {
        let guard = Guard::new(&options.allow_networks);
        Self { options, guard, clients: Default::default() }
    }

    /// The client for a URL. `own`: its host is the registry's, and not one that the registry named.
    pub(super) async fn for_url(
        &self,
        url: &Url,
        own: bool,
        request: &Request,
    ) -> Result<&reqwest::Client, RegistryError> {
        let host = url.host_str().unwrap_or("");
        if !(own && self.options.trust_registry_host) {
            self.guard.check_url(url).map_err(|refused| address_refused(&refused, request))?;
        }
        let tls = match url.scheme() {
            "https" if self.is_insecure(url) => Tls::Unverified,
            "https" => Tls::Verified,
            // Whatever led here: a token's realm, a Location, a redirect.
            _ if is_loopback(host) || self.is_insecure(url) => Tls::None,
            _ => {
                let request = Box::new(request.clone());
                return Err(RegistryError::PlainHttp { request, peer: peer(url) });
            }
        };
        let kind = Kind { tls, own, proxied: !is_loopback(host) };
        self.clients[kind.index()].get_or_try_init(|| self.build(kind)).await
    }

    /// Whether the user said that this host may be spoken to without verified TLS.
    pub(super) fn is_insecure(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else { return false };
        self.options.insecure_hosts.iter().any(|insecure| {
            insecure.eq_ignore_ascii_case(host)
                || url.port_or_known_default().is_some_and(|port| {
                    insecure.rsplit_once(':').is_some_and(|(name, number)| {
                        name.eq_ignore_ascii_case(host) && number.parse() == Ok(port)
                    })
                })
        })
    }

    async fn build(&self, kind: Kind) -> Result<reqwest::Client, RegistryError> {
        let options = Arc::clone(&self.options);
        let guard = self.guard.clone();
        // Certificates are read from files.
        tokio::task::spawn_blocking(move || build(&options, guard, kind)).await.unwrap_or_else(|error| {
            Err(RegistryError::Configuration {
                what: "the HTTP client".to_owned(),
                problem: error.to_string(),
            })
        })
    }
}

impl Kind {
    fn index(self) -> usize {
        self.tls as usize * 4 + usize::from(self.own) * 2 + usize::from(self.proxied)
    }
}

fn build(options: &Options, guard: Guard, kind: Kind) -> Result<reqwest::Client, RegistryError> {
    // reqwest takes the process's provider. A program that has installed one keeps it.
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
    let mut builder = reqwest::Client::builder()
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .retry(reqwest::retry::never())
        .tcp_nodelay(true)
        .connect_timeout(options.connect_timeout)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .pool_idle_timeout(Duration::from_secs(30))
        .user_agent(&options.user_agent);
    if !(kind.own && options.trust_registry_host) {
        builder = builder.dns_resolver(GuardedResolver(guard));
    }
    if !kind.proxied {
        builder = builder.no_proxy();
    }
    let identity = match (&options.client_certificate, kind) {
        (Some(pair), Kind { own: true, tls: Tls::Verified | Tls::Unverified, .. }) => {
            Some(Identity::read(pair)?)
        }
        _ => None,
    };
    match kind.tls {
        // Without TLS no certificates are read.
        Tls::None => builder = builder.tls_certs_only([]),
        Tls::Unverified => {
            builder = builder.tls_danger_accept_invalid_certs(true);
            if let Some(identity) = &identity {
                let parsed = reqwest::Identity::from_pem(&identity.pem)
                    .map_err(|error| fail(identity.what(), cause(&error)))?;
                builder = builder.identity(parsed);
            }
        }
        Tls::Verified => {
            builder = builder.tls_backend_preconfigured(verified(&options.ca_files, identity.as_ref())?);
        }
    }
    builder.build().map_err(|error| fail(TLS_CONFIGURATION.to_owned(), cause(&error)))
}

/// TLS as reqwest would set it up, but with a verifier of ours.
fn verified(
    ca_files: &[PathBuf],
    identity: Option<&Identity<'_>>,
) -> Result<rustls::ClientConfig, RegistryError> {
    let unusable = |error: rustls::Error| fail(TLS_CONFIGURATION.to_owned(), error.to_string());
    let mut authorities = Vec::new();
    for file in ca_files {
        let what = || format!("certificate authorities {}", file.display());
        let pem = std::fs::read(file).map_err(|error| fail(what(), error.to_string()))?;
        let parsed = certificates(&pem).map_err(|error| fail(what(), error.to_string()))?;
        if parsed.is_empty() {
            return Err(fail(what(), "no certificate in it".to_owned()));
        }
        authorities.extend(parsed);
    }
    let builder = rustls::ClientConfig::builder();
    let provider = Arc::clone(builder.crypto_provider());
    let verifier = NamedAuthorities::new(authorities, provider).map_err(unusable)?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some(identity) => {
            let (chain, key) = identity.parse()?;
            builder.with_client_auth_cert(chain, key).map_err(unusable)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A client certificate and its key, as they were read.
struct Identity<'a> {
    pair: &'a ClientCertificate,
    /// One file's text after the other's.
    pem: Vec<u8>,
}

impl<'a> Identity<'a> {
    fn read(pair: &'a ClientCertificate) -> Result<Self, RegistryError> {
        let mut identity = Self { pair, pem: Vec::new() };
        identity.pem =
            std::fs::read(&pair.certificate).map_err(|error| fail(identity.what(), error.to_string()))?;
        let key = std::fs::read(&pair.key)
            .map_err(|error| fail(format!("client key {}", pair.key.display()), error.to_string()))?;
        identity.pem.push(b'\n');
        identity.pem.extend(key);
        Ok(identity)
    }

    fn what(&self) -> String {
        format!("client certificate {}", self.pair.certificate.display())
    }

    /// The last key counts, as it does for reqwest: the certificate's file may have one too.
    fn parse(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), RegistryError> {
        let invalid = |error: pem::Error| fail(self.what(), error.to_string());
        let chain = certificates(&self.pem).map_err(invalid)?;
        let key = PrivateKeyDer::pem_slice_iter(&self.pem).last().transpose().map_err(invalid)?;
        match key {
            Some(key) if !chain.is_empty() => Ok((chain, key)),
            _ => Err(fail(self.what(), "private key or certificate not found".to_owned())),
        }
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    CertificateDer::pem_slice_iter(pem).collect()
}

fn fail(what: String, problem: String) -> RegistryError {
    RegistryError::Configuration { what, problem }
}

/// What an error of the HTTP client means for a request. URLs stay out of it: their queries may be signatures.
pub(super) fn describe(
    error: reqwest::Error,
    request: &Request,
    url: &Url,
    connect_timeout: Duration,
) -> RegistryError {
    let error = error.without_url();
    let request = Box::new(request.clone());
    let mut kind = ConnectFailure::Network;
    let mut source: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(at) = source {
        if let Some(refused) = at.downcast_ref::<Refused>() {
            return address_refused(refused, &request);
        }
        if let Some(tls) = tls_error(at) {
            kind = tls_failure(tls);
        }
        if is_unknown_host(&at.to_string()) {
            kind = ConnectFailure::UnknownHost;
        }
        source = at.source();
    }
    if error.is_timeout() {
        return RegistryError::Timeout { request, after: connect_timeout };
    }
    let cause = cause(&error);
    // In TLS 1.3 a server looks at our certificate after the connection has come about.
    if error.is_connect() || kind == ConnectFailure::ClientCertificate {
        return RegistryError::Connect { request, peer: peer(url), cause, kind };
    }
    RegistryError::Broken { request, cause }
}

/// The TLS error in an error. An io::Error's source is that of the error in it and not that error, and they come nested.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    match error.downcast_ref::<std::io::Error>() {
        Some(io) => tls_error(io.get_ref()?),
        None => error.downcast_ref(),
    }
}

fn tls_failure(error: &rustls::Error) -> ConnectFailure {
    use rustls::AlertDescription as Alert;
    match error {
        // Bytes that are no TLS at all.
        rustls::Error::InvalidMessage(_) => ConnectFailure::NotTls,
        rustls::Error::AlertReceived(
            Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::CertificateRequired,
        ) => ConnectFailure::ClientCertificate,
        _ => ConnectFailure::Tls,
    }
}

/// `getaddrinfo`'s ways to say that a name does not exist, against those that say "not now".
fn is_unknown_host(message: &str) -> bool {
    ["Name or service not known", "Name does not resolve", "No address associated with hostname"]
        .iter()
        .any(|known| message.contains(known))
}

/// The innermost cause, which says most in fewest words.
fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    super::error::clean(&innermost.to_string())
}

/// A URL's host and, where it is not the scheme's own, port.
pub(super) fn peer(url: &Url) -> String {
    let host = url.host_str().unwrap_or("");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn address_refused(refused: &Refused, request: &Request) -> RegistryError {
    RegistryError::AddressRefused {
        request: Box::new(request.clone()),
        peer: refused.host.clone(),
        address: refused.address,
    }
}

/// A small document may take so many times the longest silence in all, so that nobody can draw it out byte by byte.
const DOCUMENT_PATIENCE: u32 = 5;

/// A body that must be small.
pub(super) async fn read_capped(
    response: Response,
    cap: usize,
    patience: Duration,
    request: &Request,
) -> Result<Bytes, RegistryError> {
    let all = patience * DOCUMENT_PATIENCE;
    let reading = read_in_pieces(response, cap, patience, request);
    tokio::time::timeout(all, reading)
        .await
        .unwrap_or_else(|_| Err(RegistryError::Timeout { request: Box::new(request.clone()), after: all }))
}

async fn read_in_pieces(
    mut response: Response,
    cap: usize,
    patience: Duration,
    request: &Request,
) -> Result<Bytes, RegistryError> {
    let url = response.url().clone();
    let too_large = || RegistryError::TooLarge { request: Box::new(request.clone()), cap: cap as u64 };
    if response.content_length().is_some_and(|length| length > cap as u64) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    loop {
        let chunk = tokio::time::timeout(patience, response.chunk())
            .await
            .map_err(|_| RegistryError::Timeout { request: Box::new(request.clone()), after: patience })?;
        match chunk.map_err(|error| describe(error, request, &url, patience))? {
            Some(chunk) if body.len() + chunk.len() > cap => return Err(too_large()),
            Some(chunk) if body.is_empty() => body = BytesMut::from(chunk),
            Some(chunk) => body.extend_from_slice(&chunk),
            None => return Ok(body.freeze()),
        }
    }
}
