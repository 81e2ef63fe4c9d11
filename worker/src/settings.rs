//! The worker's own options.

use std::path::PathBuf;

use clap::Parser;
use occy_pipeline::filter::FILTERS;
use occy_pipeline::output::OUTPUTS;
use occy_pipeline::size;

use crate::config::{RegistrySettings, SpoolSettings};
use crate::telemetry::Telemetry;

/// A worker: runs layers for coordinators. It keeps nothing, and may be stopped or killed at any time.
///
/// Every option can be set in the environment, and in a TOML file under its name without dashes in front.
#[derive(Clone, Debug, Parser)]
#[command(name = "occy-worker", version, max_term_width = 120)]
pub struct Settings {
    /// A TOML file with any of these options: `coordinator = "https://occy.example:7700"`, `slots = 8`.
    #[arg(long, value_name = "FILE", env = "OCCYSTRAP_CONFIG")]
    pub config: Option<PathBuf>,
    /// The coordinator: `http://HOST:PORT`, or with TLS `https://HOST:PORT`. Several that share their jobs, with commas between them:
    /// each can then give the worker layers, as many at once as it has slots in all.
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:7700",
        env = "OCCYSTRAP_COORDINATOR"
    )]
    pub coordinator: Vec<String>,
    /// What it is called in jobs and logs [default: the name of this machine].
    #[arg(long, value_name = "NAME", env = "OCCYSTRAP_NAME")]
    pub name: Option<String>,
    /// Layers at once [default: one for each core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), env = "OCCYSTRAP_SLOTS")]
    pub slots: Option<u16>,
    /// Only these filters [default: all].
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = filter, env = "OCCYSTRAP_FILTERS")]
    pub filters: Vec<String>,
    /// Only destinations with these schemes, as `registry` [default: all].
    #[arg(long, value_name = "SCHEME", value_delimiter = ',', value_parser = output, env = "OCCYSTRAP_OUTPUTS")]
    pub outputs: Vec<String>,
    /// Trust the coordinator's certificate if it is of an authority in this PEM file, and not if it is of one of the system's.
    #[arg(long, value_name = "FILE", env = "OCCYSTRAP_TLS_CA")]
    pub tls_ca: Option<PathBuf>,
    /// Show the coordinator the certificate in this PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_key", env = "OCCYSTRAP_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "OCCYSTRAP_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Send the coordinator the token in this file, which needs the scope worker. It is read for each connection.
    #[arg(long, value_name = "FILE", env = "OCCYSTRAP_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// When it is stopped, layers that are running have so many seconds to come to their end; what is left is handed back.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, env = "OCCYSTRAP_DRAIN_TIMEOUT")]
    pub drain_timeout: u64,
    /// Layers go up in pieces of so many bytes, from 64K to 64M, and another worker goes on behind the last one that the registry has
    /// acknowledged. Each slot holds two of them in memory.
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = upload_chunk, env = "OCCYSTRAP_UPLOAD_CHUNK")]
    pub upload_chunk: u64,
    /// A layer that is copied as it is goes up whole, and cannot be gone on with, if it is smaller than this: pieces wait for their
    /// answers, which costs more than to send it again.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse, env = "OCCYSTRAP_RESUMABLE_FROM")]
    pub resumable_from: u64,
    /// How registries are reached.
    #[command(flatten)]
    pub registry: RegistrySettings,
    /// Where temporary files go.
    #[command(flatten)]
    pub spool: SpoolSettings,
    /// Logs, spans, metrics.
    #[command(flatten)]
    pub telemetry: Telemetry,
}

fn upload_chunk(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    let is_fit = (64 << 10..=64 << 20).contains(&bytes);
    is_fit.then_some(bytes).ok_or_else(|| format!("{text:?}: expected 64K to 64M"))
}

fn filter(name: &str) -> Result<String, String> {
    one_of(name, FILTERS.iter().map(|filter| filter.name))
}

fn output(scheme: &str) -> Result<String, String> {
    one_of(scheme, OUTPUTS.iter().map(|output| output.scheme))
}

fn one_of(given: &str, known: impl Iterator<Item = &'static str> + Clone) -> Result<String, String> {
    match known.clone().find(|known| *known == given) {
        Some(known) => Ok(known.to_owned()),
        None => Err(format!("expected one of {}", known.collect::<Vec<_>>().join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use clap::{CommandFactory, FromArgMatches};

    use super::*;
    use crate::config::with_file;

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
    fn pieces_of_uploads_are_neither_tiny_nor_huge() {
        assert_eq!(upload_chunk("64K"), Ok(65_536));
        for bad in ["65535", "65M", "much"] {
            assert!(upload_chunk(bad).unwrap_err().contains(bad));
        }
    }

    #[test]
    fn the_file_names_what_a_worker_offers_and_nothing_unknown() {
        let from = |file: &str| {
            let command = with_file(Settings::command(), file).unwrap();
            let matches = command.try_get_matches_from(["occy-worker"])?;
            Settings::from_arg_matches(&matches)
        };
        let settings = from("filters = [\"exclude\", \"search\"]\nslots = 3\n").unwrap();
        assert_eq!(
            (settings.filters, settings.slots),
            (vec!["exclude".to_owned(), "search".to_owned()], Some(3))
        );
        let error = from("filters = \"strip\"").unwrap_err().to_string();
        assert!(error.contains("expected one of normalize-timestamps"), "{error}");
    }
}
