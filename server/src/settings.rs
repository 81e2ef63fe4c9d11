//! The coordinator's own options.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use occy_pipeline::size;
use occy_worker::config::{RegistrySettings, SpoolSettings, seconds};
use occy_worker::telemetry::Telemetry;

use crate::budget::rules::Rule;

/// The coordinator: reads, filters and writes container images for clients over gRPC.
///
/// Every option can be set in the environment, and in a TOML file under its name without dashes in front.
#[derive(Debug, Parser)]
#[command(name = "occy-server", version, max_term_width = 120)]
pub struct Settings {
    /// A TOML file with any of these options: `listen = "0.0.0.0:7700"`, `allow-network = ["10.0.0.0/8"]`.
    #[arg(long, value_name = "FILE", env = "OCCYSTRAP_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where clients connect. Port 0 takes a free one, which is printed.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7700", env = "OCCYSTRAP_LISTEN")]
    pub listen: SocketAddr,
    /// Where the jobs are kept, without --engine. One coordinator at a time.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/occystrap", env = "OCCYSTRAP_STATE_DIR")]
    pub state_dir: PathBuf,
    /// Keep the jobs in NATS JetStream, which other coordinators have too: `jetstream://HOST:PORT,HOST:PORT`. Without it they are in
    /// the state directory.
    #[arg(long, value_name = "URI", env = "OCCYSTRAP_ENGINE")]
    pub engine: Option<String>,
    /// Connect to the engine encrypted or not at all. So do the next two options.
    #[arg(long, requires = "engine", env = "OCCYSTRAP_ENGINE_TLS")]
    pub engine_tls: bool,
    /// Trust the certificate authorities in this PEM file too, when connecting to the engine.
    #[arg(long, value_name = "FILE", requires = "engine", env = "OCCYSTRAP_ENGINE_CA_CERT")]
    pub engine_ca_cert: Option<PathBuf>,
    /// Show the engine the certificate in this PEM file.
    #[arg(long, value_name = "FILE", requires_all = ["engine", "engine_key"], env = "OCCYSTRAP_ENGINE_CERT")]
    pub engine_cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "engine_cert", env = "OCCYSTRAP_ENGINE_KEY")]
    pub engine_key: Option<PathBuf>,
    /// Log in to the engine with this file of NATS credentials.
    #[arg(long, value_name = "FILE", requires = "engine", env = "OCCYSTRAP_ENGINE_CREDENTIALS")]
    pub engine_credentials: Option<PathBuf>,
    /// On how many servers the engine keeps everything. All coordinators say the same.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5), env = "OCCYSTRAP_ENGINE_REPLICAS")]
    pub engine_replicas: u8,
    /// A coordinator that the engine has not heard of for so long has lost its jobs to the others. All coordinators say the same.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, env = "OCCYSTRAP_ENGINE_LEASE")]
    pub engine_lease: Duration,
    /// Seal the credentials that jobs bring with the first key of this file, and open them with any of it: a line each, 32 bytes in
    /// base64. Without it such jobs are refused.
    #[arg(long, value_name = "FILE", env = "OCCYSTRAP_SECRET_KEY_FILE")]
    pub secret_key_file: Option<PathBuf>,
    /// Workers in this process, each of which works on one layer at a time [default: one for each core].
    /// 0: only those that connect.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(..=1024), env = "OCCYSTRAP_EMBEDDED_WORKERS")]
    pub embedded_workers: Option<u16>,
    /// A worker that was not heard of for so long is lost, and its layers go to others.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, env = "OCCYSTRAP_LEASE")]
    pub lease: Duration,
    /// How often a layer is begun that fails by the fault of the workers that have it.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100), env = "OCCYSTRAP_MAX_ATTEMPTS")]
    pub max_attempts: u16,
    /// How long a layer waits while no worker offers the filters or the destination that it needs.
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds, env = "OCCYSTRAP_UNOFFERED_DEADLINE")]
    pub unoffered_deadline: Duration,
    /// Show clients the certificate in this PEM file; without one, connections are not encrypted.
    #[arg(long, value_name = "FILE", requires = "tls_key", env = "OCCYSTRAP_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "OCCYSTRAP_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Accept only clients with a certificate of an authority in this PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "OCCYSTRAP_TLS_CLIENT_CA")]
    pub tls_client_ca: Option<PathBuf>,
    /// Let only those in who send a token of this TOML file, which is read again when it changes: [[token]] with name, sha256 (or
    /// value) and scopes of read, write, delete, jobs, admin, worker.
    #[arg(long, value_name = "FILE", env = "OCCYSTRAP_TOKENS_FILE")]
    pub tokens_file: Option<PathBuf>,
    /// Calls at once. More are refused.
    #[arg(long, value_name = "N", default_value_t = 64, env = "OCCYSTRAP_MAX_CALLS")]
    pub max_calls: usize,
    /// Jobs that have not ended. More are refused.
    #[arg(long, value_name = "N", default_value_t = 1000, env = "OCCYSTRAP_MAX_JOBS")]
    pub max_jobs: usize,
    /// Calls at once of one client, which is known by its token or certificate [default: as --max-calls].
    #[arg(long, value_name = "N", env = "OCCYSTRAP_CLIENT_CALLS")]
    pub client_calls: Option<usize>,
    /// Jobs of one client that have not ended [default: as --max-jobs].
    #[arg(long, value_name = "N", env = "OCCYSTRAP_CLIENT_JOBS")]
    pub client_jobs: Option<usize>,
    /// Schedules. More are refused.
    #[arg(long, value_name = "N", default_value_t = 1000, env = "OCCYSTRAP_MAX_SCHEDULES")]
    pub max_schedules: usize,
    /// Schedules of one client [default: as --max-schedules].
    #[arg(long, value_name = "N", env = "OCCYSTRAP_CLIENT_SCHEDULES")]
    pub client_schedules: Option<usize>,
    /// Bytes of temporary files at once for one client [default: as --spool-limit].
    #[arg(long, value_name = "SIZE", value_parser = size::parse, env = "OCCYSTRAP_CLIENT_SPOOL")]
    pub client_spool: Option<u64>,
    /// Jobs that run at once; the others wait for their turn.
    #[arg(long, value_name = "N", default_value_t = 16, env = "OCCYSTRAP_RUNNING_JOBS")]
    pub running_jobs: usize,
    /// Jobs that are remembered; beyond it the oldest that have ended are forgotten.
    #[arg(long, value_name = "N", default_value_t = 10_000, env = "OCCYSTRAP_KEEP_JOBS")]
    pub keep_jobs: usize,
    /// When it is stopped, layers that are running have so many seconds to come to their end.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, env = "OCCYSTRAP_DRAIN_TIMEOUT")]
    pub drain_timeout: u64,
    /// Let clients name files under this directory as sources and destinations.
    #[arg(long, value_name = "DIR", value_delimiter = ',', env = "OCCYSTRAP_ALLOW_PATH")]
    pub allow_path: Vec<PathBuf>,
    /// What all workers and this coordinator together may ask of a registry: `[ACCOUNT@]HOST[/manifest|/pull|/push] rate=N
    /// concurrency=N quota=N/TIME`, requests a second, at once, and in a time such as 6h. `docker.io/manifest quota=100/6h` is Docker
    /// Hub's for those who are not logged in. Each account has it by itself, unless one is named; reading and writing have a concurrency
    /// each. What a registry refuses, and what it says of its limits, is heeded besides. Coordinators with one engine share it.
    #[arg(long, value_name = "RULE", value_delimiter = ',', env = "OCCYSTRAP_REGISTRY_BUDGET")]
    pub registry_budget: Vec<Rule>,
    /// How registries are reached.
    #[command(flatten)]
    pub registry: RegistrySettings,
    /// Layers of one image at once, where a client does not say it.
    #[arg(short = 'j', long, value_name = "N", default_value_t = 4, env = "OCCYSTRAP_PARALLEL")]
    pub parallel: usize,
    /// Where temporary files go.
    #[command(flatten)]
    pub spool: SpoolSettings,
    /// A layer that is larger uncompressed is refused.
    #[arg(long, value_name = "SIZE", default_value = "1T", value_parser = size::parse, env = "OCCYSTRAP_MAX_LAYER_SIZE")]
    pub max_layer_size: u64,
    /// Logs, spans, metrics.
    #[command(flatten)]
    pub telemetry: Telemetry,
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use clap::{CommandFactory, FromArgMatches};
    use occy_worker::config::with_file;

    use super::*;

    fn from(file: &str, arguments: &[&str]) -> anyhow::Result<Settings> {
        let command = with_file(Settings::command(), file)?;
        let arguments = ["occy-server"].iter().chain(arguments);
        Ok(Settings::from_arg_matches(&command.try_get_matches_from(arguments)?)?)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Settings::command().debug_assert();
    }

    #[test]
    fn every_option_has_its_variable() {
        for argument in Settings::command().get_arguments() {
            let name = argument.get_id().as_str();
            let variable = format!("OCCYSTRAP_{}", name.to_uppercase());
            assert_eq!(argument.get_env().and_then(OsStr::to_str), Some(variable.as_str()), "{name}");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = "max-calls = 7\nspool-limit = \"1K\"\nallow-network = [\"10.0.0.0/8\", \"registry\"]\n";
        let settings = from(file, &["--max-calls", "8"]).unwrap();
        assert_eq!((settings.max_calls, settings.spool.spool_limit, settings.parallel), (8, 1024, 4));
        assert_eq!(settings.registry.allow_network.len(), 2);
        let settings = from(file, &["--allow-network", "localhost"]).unwrap();
        assert_eq!((settings.max_calls, settings.registry.allow_network.len()), (7, 1));
    }

    #[test]
    fn what_the_file_gets_wrong_is_named() {
        for (file, part) in [
            ("lisen = \"x\"", "lisen"),
            ("listen = \"nowhere\"", "nowhere"),
            ("max-jobs = 1.5", "max-jobs"),
            ("config = \"x\"", "config"),
            ("listen", "listen"),
        ] {
            assert!(format!("{:#}", from(file, &[]).unwrap_err()).contains(part), "{file}");
        }
    }
}
