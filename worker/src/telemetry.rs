//! What the process says of itself while it works: logs on standard error, and spans for a collector.
//!
//! Spans are made whether or not a collector is named: a caller's trace (W3C Trace Context) goes through this process to the
//! registries either way. Nothing that is secret is ever a span's or an event's field.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use occy_pipeline::registry::RequestHook;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tonic::codegen::http::{HeaderMap, HeaderName, HeaderValue, Request};
use tracing::Span;
use tracing::level_filters::LevelFilter;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer};

/// The header of W3C Trace Context that alone says which trace it is.
const TRACEPARENT: &str = "traceparent";
/// How long the last spans may take to reach the collector.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// What is logged and exported.
#[derive(Clone, Debug, clap::Args)]
pub struct Telemetry {
    /// What is logged, in tracing's syntax: `info`, `debug`, `warn,occy_pipeline=debug`.
    #[arg(long, value_name = "FILTER", default_value = "info", env = "OCCYSTRAP_LOG")]
    pub log: String,
    /// How it is logged: lines for people, or one JSON object a line.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "text", env = "OCCYSTRAP_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// Send spans to the OpenTelemetry collector at this URL, by OTLP over gRPC: `http://localhost:4317`.
    #[arg(long, value_name = "URL", env = "OCCYSTRAP_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Answer Prometheus there, at `/metrics`. Port 0 takes a free one, which is logged.
    #[arg(long, value_name = "ADDRESS", env = "OCCYSTRAP_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
}

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Spans on their way to a collector.
#[derive(Debug)]
pub struct Exporting(SdkTracerProvider);

impl Exporting {
    /// Sends what is left. Blocks for two seconds at most.
    pub fn finish(self) {
        if let Err(error) = self.0.shutdown_with_timeout(LAST_SPANS) {
            tracing::debug!(%error, "the last spans are lost");
        }
    }
}

impl Telemetry {
    /// Starts logs and spans for the whole process. Call it once, within the runtime.
    pub fn start(&self, service: &'static str) -> anyhow::Result<Exporting> {
        let resource = Resource::builder().with_service_name(service).build();
        let mut provider = SdkTracerProvider::builder().with_resource(resource);
        if let Some(endpoint) = &self.otlp_endpoint {
            let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
            provider = provider
                .with_batch_exporter(exporter.with_context(|| format!("failed to export to {endpoint:?}"))?);
        }
        let provider = provider.build();
        let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer(service)).with_filter(spans());
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
        // It would be told on standard error too, and a closed one panics there: whoever reads logs may be started anew.
        let lines = lines.log_internal_errors(false);
        let lines = match self.log_format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().boxed(),
        };
        let lines = lines.with_filter(EnvFilter::try_new(&self.log).context("--log")?);
        tracing_subscriber::registry().with(spans).with(lines).try_init()?;
        Ok(Exporting(provider))
    }
}

/// Our own spans, whatever is logged, and those of single requests to registries.
fn spans() -> Targets {
    Targets::new()
        .with_target("occy", LevelFilter::INFO)
        .with_target("occy_pipeline::registry::sending", LevelFilter::TRACE)
}

/// The span of a gRPC call, which goes on with the caller's trace.
pub fn call_span(request: &Request<()>) -> Span {
    let path = request.uri().path().trim_start_matches('/');
    let span = tracing::info_span!("call", otel.name = path, otel.kind = "server", rpc.system.name = "grpc");
    let propagator = TraceContextPropagator::new();
    let _ = span.set_parent(propagator.extract(&Headers(request.headers())));
    span
}

/// The `traceparent` with which others go on with the trace that we are in; None where there is none.
pub fn traceparent() -> Option<String> {
    let mut headers = HeaderMap::new();
    inject(&mut headers);
    Some(headers.get(TRACEPARENT)?.to_str().ok()?.to_owned())
}

/// Makes a span part of the trace that a [`traceparent`] names. What is not one is ignored.
pub fn go_on(span: &Span, traceparent: &str) {
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(traceparent) {
        headers.insert(TRACEPARENT, value);
        let _ = span.set_parent(TraceContextPropagator::new().extract(&Headers(&headers)));
    }
}

/// Tells registries which trace a request belongs to.
pub fn request_hook() -> RequestHook {
    RequestHook::new(inject)
}

fn inject(headers: &mut HeaderMap) {
    let context = Span::current().context();
    if context.span().span_context().is_valid() {
        TraceContextPropagator::new().inject_context(&context, &mut HeadersMut(headers));
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (key.parse::<HeaderName>(), HeaderValue::from_str(&value)) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_trace_goes_through() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test")).with_filter(spans());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let request = Request::builder().uri("/occy.v1.PipelineService/GetJob");
            let span = call_span(&request.header(TRACEPARENT, PARENT).body(()).unwrap());
            let ours = span.in_scope(traceparent).unwrap();
            assert_eq!((&ours[..36], &ours[52..]), (&PARENT[..36], "-01"), "the same trace");
            assert_ne!(ours, PARENT, "another span");
            let job = tracing::info_span!("job");
            go_on(&job, &ours);
            assert_eq!(job.in_scope(traceparent).unwrap()[..36], ours[..36]);
            let other = tracing::info_span!("job");
            go_on(&other, "nothing of the kind");
            assert_ne!(other.in_scope(traceparent).unwrap()[..36], ours[..36]);
        });
        assert_eq!(traceparent(), None);
    }
}
