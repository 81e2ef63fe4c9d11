//! The connection to a coordinator.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use occy_proto::v1::ListCapabilitiesRequest;
use occy_proto::v1::pipeline_service_client::PipelineServiceClient;
use occy_proto::v1::schedule_service_client::ScheduleServiceClient;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tonic::{Request, Status};

use super::error::RemoteError;
use crate::options::Global;
use crate::settings::Misused;

/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(10);
/// How often a connection that is silent is asked whether it still is there, and how long it may take to answer.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Bytes that may be on their way to us in one stream, and in all: what a layer needs to keep going over a distance.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// Calls to a coordinator.
pub(crate) type Client = PipelineServiceClient<InterceptedService<Channel, Bearer>>;

/// Calls about schedules.
pub(crate) type Schedules = ScheduleServiceClient<InterceptedService<Channel, Bearer>>;

/// A coordinator that answers.
#[derive(Clone)]
pub(crate) struct Coordinator {
    pub(crate) client: Client,
    /// Of few commands, which need not make all others larger.
    pub(crate) schedules: Box<Schedules>,
    pub(crate) url: String,
    /// Whether nobody on the way can read what is sent.
    pub(crate) is_private: bool,
}

/// Sends the token with every call. It has no `Debug`.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

impl Coordinator {
    /// The one that is named, if any is.
    pub(crate) async fn named(global: &Global) -> anyhow::Result<Option<Self>> {
        match &global.coordinator {
            Some(url) => Self::connect(url, global).await.map(Some),
            None => Ok(None),
        }
    }

    /// The one that has to be named for this command.
    pub(crate) async fn needed(global: &Global, command: &str) -> anyhow::Result<Self> {
        let named = Self::named(global).await?;
        named.ok_or_else(|| {
            let what =
                format!("{command} needs a coordinator: pass --coordinator URL or set OCCYSTRAP_COORDINATOR");
            Misused(what).into()
        })
    }

    async fn connect(url: &str, global: &Global) -> anyhow::Result<Self> {
        let (uri, is_tls) = parse(url)?;
        let is_private = is_tls || is_loopback(&uri);
        let bearer = Bearer(token(global, &uri, is_private)?);
        let mut endpoint = Endpoint::from(uri)
            .connect_timeout(CONNECT)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .tcp_nodelay(true);
        if is_tls {
            endpoint = endpoint.tls_config(tls(global)?).context("the TLS options cannot be used")?;
        } else if let Some(option) = tls_option(global) {
            let problem =
                format!("{option} means nothing to {url}: a coordinator with TLS is https://HOST:PORT");
            return Err(Misused(problem).into());
        }
        let channel = endpoint.connect().await;
        let channel = channel.with_context(|| format!("failed to reach the coordinator at {url}"))?;
        let schedules = ScheduleServiceClient::with_interceptor(channel.clone(), bearer.clone());
        let client = PipelineServiceClient::with_interceptor(channel, bearer);
        Ok(Self { client, schedules: Box::new(schedules), url: url.to_owned(), is_private })
    }

    /// Fails where it is of a version that would overlook one of these options, which are called as its fields are.
    pub(crate) async fn needs(&self, options: &[&str]) -> anyhow::Result<()> {
        if options.is_empty() {
            return Ok(());
        }
        let answered = self.client.clone().list_capabilities(ListCapabilitiesRequest {}).await;
        let known = answered.map_err(|status| self.error(status))?.into_inner().spec_fields;
        match options.iter().find(|option| known.iter().all(|known| known != *option)) {
            None => Ok(()),
            Some(option) => {
                let problem =
                    format!("the coordinator at {} is of a version that has no --{option}", self.url);
                Err(Misused(problem).into())
            }
        }
    }

    /// What a call failed with.
    pub(crate) fn error(&self, status: Status) -> RemoteError {
        RemoteError::new(&self.url, status)
    }
}

fn parse(url: &str) -> Result<(Uri, bool), Misused> {
    let fail = || {
        let expected = "expected http://HOST:PORT or https://HOST:PORT";
        Misused(format!("--coordinator {url:?}: {expected}"))
    };
    let uri: Uri = url.parse().map_err(|_| fail())?;
    let is_tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(fail()),
    };
    let is_plain = matches!(uri.path(), "" | "/") && uri.query().is_none() && !url.contains('@');
    if uri.host().is_some() && is_plain { Ok((uri, is_tls)) } else { Err(fail()) }
}

/// The token, unless whoever listens on the way could read it.
fn token(global: &Global, uri: &Uri, is_private: bool) -> anyhow::Result<Option<MetadataValue<Ascii>>> {
    let Some(path) = &global.token_file else { return Ok(None) };
    if !is_private {
        let problem = format!("--token-file: a token is sent over TLS only, and {uri} is not https");
        return Err(Misused(problem).into());
    }
    let token = read(path)?;
    let token = String::from_utf8(token).ok();
    let token = token.as_deref().map(str::trim).filter(|token| !token.is_empty());
    let value = token.and_then(|token| format!("Bearer {token}").parse::<MetadataValue<Ascii>>().ok());
    let mut value = value.with_context(|| format!("{} holds no token", path.display()))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn tls(global: &Global) -> anyhow::Result<ClientTlsConfig> {
    let config = match &global.tls_ca {
        Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    Ok(match (&global.tls_cert, &global.tls_key) {
        (Some(certificate), Some(key)) => config.identity(Identity::from_pem(read(certificate)?, read(key)?)),
        // clap has each require the other.
        _ => config,
    })
}

fn tls_option(global: &Global) -> Option<&'static str> {
    let options = [("--tls-ca", &global.tls_ca), ("--tls-cert", &global.tls_cert)];
    options.into_iter().find_map(|(option, value)| value.as_ref().map(|_| option))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("failed to read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_is_named_by_scheme_host_and_port() {
        assert!(!parse("http://localhost:7700").unwrap().1);
        assert!(parse("https://[::1]:7700/").unwrap().1);
        for bad in
            ["localhost:7700", "7700", "ftp://x", "http://", "http://x/y", "http://a:b@x", "http://x?y"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_this_machine_gets_a_token_without_tls() {
        let is_local = |url: &str| is_loopback(&url.parse().unwrap());
        assert!(
            is_local("http://localhost:1") && is_local("http://127.0.0.9:1") && is_local("http://[::1]:1")
        );
        assert!(!is_local("http://10.0.0.1:1") && !is_local("http://localhost.example.com:1"));
    }
}
