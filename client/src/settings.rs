//! What the global options mean for the pipeline.

use std::sync::Arc;

use occy_pipeline::codec::Pool;
use occy_pipeline::engine;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::manifest::Annotations;
use occy_pipeline::open::Settings;
use occy_pipeline::output::manifest::ManifestFormat;
use occy_pipeline::platform::PlatformChoice;
use occy_pipeline::registry::{self, AllowedNetwork, ClientCertificate, ConfigFile, Credentials, Paces};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::Limits;
use occy_pipeline::task::LayerPlan;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::display::Aside;
use crate::options::Global;

/// Options that make no sense together, or in themselves.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Misused(pub(crate) String);

/// Log lines to standard error: warnings by default, more with `-v`. `OCCYSTRAP_LOG` overrides it in tracing's own syntax.
pub(crate) fn start_logging(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "warn,occy_pipeline=info,occyctl=info",
        (false, 2) => "warn,occy_pipeline=debug,occyctl=debug",
        (false, _) => "debug,occy_pipeline=trace,occyctl=trace",
    };
    let filter = EnvFilter::try_from_env("OCCYSTRAP_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Aside)
        .with_target(false)
        // It would be told on standard error too, and a closed one panics there.
        .log_internal_errors(false);
    if global.verbose == 0 && std::env::var_os("OCCYSTRAP_LOG").is_none() {
        subscriber.event_format(Plain).init();
    } else {
        subscriber.init();
    }
}

/// Warnings as they stand beside our other messages: `warning: TEXT`.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let level = if *event.metadata().level() == Level::ERROR { "error" } else { "warning" };
        write!(writer, "{level}: ")?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Everything that a source and an output are opened with.
/// Options of registries count only where one is named.
pub(crate) fn settings(
    global: &Global,
    source_uri: &str,
    destination_uri: Option<&str>,
) -> Result<Settings, Misused> {
    // Both may be the same registry's.
    let paces = Paces::default();
    let registry = |uri: Option<&str>, own, role| {
        let is_registry = uri.is_some_and(|uri| uri.starts_with("registry://"));
        let options =
            if is_registry { registry_options(global, own, role)? } else { registry::Options::default() };
        Ok(registry::Options { paces: paces.clone(), ..options })
    };
    let source = (global.source_username.as_ref(), global.source_password.as_ref());
    let destination = (global.destination_username.as_ref(), global.destination_password.as_ref());
    Ok(Settings {
        platform: platform(global),
        parallel: global.parallel,
        compression: None,
        format: ManifestFormat::Keep,
        source_registry: registry(Some(source_uri), source, "source")?,
        destination_registry: registry(destination_uri, destination, "destination")?,
        engine: engine::Options::from_environment(),
        force: false,
        verify: false,
        foreign_layers: false,
        confirm: false,
        spools: SpoolDir::new(global.temp_dir.clone().unwrap_or_else(std::env::temp_dir), global.spool_limit),
    })
}

/// The platform that was asked for, which then is required.
pub(crate) fn platform(global: &Global) -> PlatformChoice {
    let choice = PlatformChoice {
        os: global.os.clone(),
        architecture: global.architecture.clone(),
        variant: global.variant.clone(),
        required: false,
    };
    PlatformChoice { required: choice.is_given(), ..choice }
}

fn registry_options(
    global: &Global,
    own: (Option<&String>, Option<&String>),
    role: &str,
) -> Result<registry::Options, Misused> {
    // Both halves from the same place: a password must not go out with another account's name, to another registry.
    let (credentials, prefix) = match own {
        (None, None) => ((global.username.as_ref(), global.password.as_ref()), String::new()),
        own => (own, format!("{role}-")),
    };
    let missing = |given: &str, half: &str| {
        let option = format!("{prefix}{half}");
        let variable = option.to_uppercase().replace('-', "_");
        Misused(format!(
            "a {given} for the {role}'s registry needs a {half} too: pass --{option} or set OCCYSTRAP_{variable}"
        ))
    };
    let credentials = match credentials {
        (Some(username), Some(password)) => {
            Some(Credentials::Basic { username: username.clone(), password: password.clone().into() })
        }
        (None, None) => None,
        (Some(_), None) => return Err(missing("username", "password")),
        (None, Some(_)) => return Err(missing("password", "username")),
    };
    let allow_networks = global
        .allow_network
        .iter()
        .map(|network| network.parse::<AllowedNetwork>())
        .collect::<Result<_, _>>()
        .map_err(|error| Misused(format!("--allow-network: {error}")))?;
    let client_certificate = match (&global.client_cert, &global.client_key) {
        (Some(certificate), Some(key)) => {
            Some(ClientCertificate { certificate: certificate.clone(), key: key.clone() })
        }
        // clap has each require the other.
        _ => None,
    };
    Ok(registry::Options {
        insecure_hosts: global.insecure.clone(),
        ca_files: global.ca_cert.clone(),
        client_certificate,
        credentials,
        docker_config: match &global.docker_config {
            Some(path) => ConfigFile::Path(path.clone()),
            None => ConfigFile::Default,
        },
        allow_networks,
        attempts: global.retries + 1,
        ..registry::Options::default()
    })
}

/// What is done with every layer.
pub(crate) fn plan(
    global: &Global,
    settings: &Settings,
    chain: FilterChain,
    verify_diff_ids: bool,
) -> Arc<LayerPlan> {
    Arc::new(LayerPlan {
        chain,
        annotations: Annotations::default(),
        pool: Pool::shared().clone(),
        spools: settings.spools.clone(),
        max_layer_size: global.max_layer_size,
        limits: Limits::default(),
        verify_diff_ids,
    })
}
