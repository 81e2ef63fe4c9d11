//! What a process counts, and the HTTP port where Prometheus reads it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse as _;
use axum::routing::get;
use occy_pipeline::registry::Traffic;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;

/// The format that [`encode`] writes.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An empty list of metrics, whose names begin with `occystrap_`, but for what registries were asked.
pub fn registry(traffic: Traffic) -> Registry {
    let mut all = Registry::with_prefix("occystrap");
    all.register_collector(Box::new(Registries(traffic)));
    all
}

/// Listens where Prometheus is to find metrics, if anywhere.
pub async fn listen(address: Option<SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("failed to listen on {address}"))?;
    tracing::info!(address = %listener.local_addr()?, "Prometheus finds metrics at /metrics");
    Ok(Some(listener))
}

/// Answers `GET /metrics` until it is dropped, if it listens anywhere. It ends with an error only.
pub async fn serve(listener: Option<TcpListener>, all: Registry) -> anyhow::Result<()> {
    let Some(listener) = listener else { return std::future::pending().await };
    let all = Arc::new(all);
    let scrape = move || async move {
        let mut text = String::new();
        match encode(&mut text, &all) {
            Ok(()) => ([(CONTENT_TYPE, OPENMETRICS)], text).into_response(),
            Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    };
    let router = axum::Router::new().route("/metrics", get(scrape));
    axum::serve(listener, router).await.context("failed to serve metrics")
}

/// Writes a metric whose value is known now.
pub fn put<M: EncodeMetric + TypedMetric>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &M,
) -> Result<(), fmt::Error> {
    metric.encode(to.encode_descriptor(name, help, unit, M::TYPE)?)
}

/// What this process has asked of registries.
#[derive(Debug)]
struct Registries(Traffic);

impl Collector for Registries {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (to, Self(traffic)) = (&mut encoder, self);
        let help = "Requests that registries answered to this process";
        put(to, "registry_requests", help, None, &ConstCounter::new(traffic.requests()))?;
        let help = "Requests to registries that were sent again after a wait";
        put(to, "registry_retries", help, None, &ConstCounter::new(traffic.retries()))?;
        let help = "Answers of registries that there were too many requests";
        put(to, "registry_throttled", help, None, &ConstCounter::new(traffic.throttled()))?;
        let help = "Bytes of blobs that came from registries";
        put(to, "registry_received", help, Some(&Unit::Bytes), &ConstCounter::new(traffic.received()))?;
        let help = "Bytes that were sent to registries";
        put(to, "registry_sent", help, Some(&Unit::Bytes), &ConstCounter::new(traffic.sent()))
    }
}
