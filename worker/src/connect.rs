//! Connections to the coordinator: one for tasks and heartbeats, and one for bytes, so that these never wait behind those.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Uri};

use crate::settings::Settings;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a connection that is silent is asked whether it still is there, and how long it may take to answer.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Bytes that may be on their way to us in one stream, and in all streams of a connection: what a layer needs to keep going over a
/// distance, and no more.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// The coordinator with this URL, which is spoken to as the settings say. Nothing is connected yet.
pub async fn endpoint(url: &str, settings: &Settings) -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::from_shared(url.to_owned()).with_context(|| format!("{url:?} is not a URL"))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    match endpoint.uri().scheme_str() {
        Some("http") if settings.tls_ca.is_some() || settings.tls_cert.is_some() => {
            bail!("{url} is a coordinator without TLS: write https://, or leave the certificates out")
        }
        Some("http") if settings.token_file.is_some() && !is_loopback(endpoint.uri()) => {
            bail!("--token-file: a token is sent over TLS only, and {url} is not https")
        }
        Some("http") => Ok(endpoint),
        Some("https") => Ok(endpoint.tls_config(tls(settings).await?)?),
        _ => bail!("{url:?} is not the URL of a coordinator: expected http://HOST:PORT or https://HOST:PORT"),
    }
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The token in a file, as a call carries it. No error says anything of it.
pub async fn token(path: &Path) -> anyhow::Result<MetadataValue<Ascii>> {
    let text = String::from_utf8(read(path).await?).ok();
    let token = text.as_deref().map(str::trim).filter(|token| !token.is_empty());
    let value = token.and_then(|token| format!("Bearer {token}").parse::<MetadataValue<Ascii>>().ok());
    let mut value = value.with_context(|| format!("{} holds no token", path.display()))?;
    value.set_sensitive(true);
    Ok(value)
}

async fn tls(settings: &Settings) -> anyhow::Result<ClientTlsConfig> {
    let config = match &settings.tls_ca {
        Some(authorities) => {
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(authorities).await?))
        }
        None => ClientTlsConfig::new().with_native_roots(),
    };
    Ok(match (&settings.tls_cert, &settings.tls_key) {
        (Some(certificate), Some(key)) => {
            config.identity(Identity::from_pem(read(certificate).await?, read(key).await?))
        }
        _ => config,
    })
}

async fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    tokio::fs::read(path).await.with_context(|| format!("failed to read {}", path.display()))
}
