//! How a program of the service is configured: flags win over `OCCYSTRAP_*` variables, these over a TOML file, that over the
//! defaults. And what a coordinator and a worker are both told: how registries are reached, and where temporary files go.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser};
use occy_pipeline::registry::{AllowedNetwork, ConfigFile, Options, Traffic};
use occy_pipeline::size;
use occy_pipeline::spool::SpoolDir;

use crate::telemetry;

/// A program's options from the command line, the environment, and the file that `--config` names. Ends the process for `--help`
/// and for a wrong command line, as clap does.
pub fn load<S: Parser>(arguments: impl IntoIterator<Item = OsString> + Clone) -> anyhow::Result<S> {
    let matches = S::command().get_matches_from(arguments.clone());
    let Some(path) = matches.get_one::<PathBuf>("config") else {
        return Ok(S::from_arg_matches(&matches)?);
    };
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    let command = with_file(S::command(), &text).with_context(|| path.display().to_string())?;
    Ok(S::from_arg_matches(&command.get_matches_from(arguments))?)
}

/// The command with a TOML file's values as defaults, so that flags and variables win over them.
pub fn with_file(mut command: clap::Command, text: &str) -> anyhow::Result<clap::Command> {
    let table: toml::Table = text.parse()?;
    for (key, value) in table {
        let argument = command.get_arguments().find(|argument| argument.get_long() == Some(key.as_str()));
        let Some(id) = argument.map(|argument| argument.get_id().clone()).filter(|id| id != "config") else {
            bail!("unknown option {key:?}");
        };
        let values = match value {
            toml::Value::Array(values) => values.into_iter().map(|value| word(&key, value)).collect(),
            value => word(&key, value).map(|value| vec![value]),
        }?;
        // What the file says of them counts as given, so that what requires them is content.
        command = command.mut_arg(id, |argument| argument.default_values(values).required(false));
    }
    Ok(command)
}

fn word(key: &str, value: toml::Value) -> anyhow::Result<OsString> {
    match value {
        toml::Value::String(text) => Ok(OsStr::new(&text).to_owned()),
        toml::Value::Integer(number) => Ok(number.to_string().into()),
        toml::Value::Boolean(flag) => Ok(flag.to_string().into()),
        value => bail!("option {key:?} cannot be a {}", value.type_str()),
    }
}

/// How registries are reached.
#[derive(Args, Clone, Debug)]
pub struct RegistrySettings {
    /// Reach registries in this private network or on this host too; without it only public addresses are connected to.
    #[arg(long, value_name = "CIDR|HOST", value_delimiter = ',', env = "OCCYSTRAP_ALLOW_NETWORK")]
    pub allow_network: Vec<AllowedNetwork>,
    /// A registry that is spoken to without a trusted certificate, or without TLS at all. Loopback ones always may be.
    #[arg(long, value_name = "HOST[:PORT]", value_delimiter = ',', env = "OCCYSTRAP_INSECURE")]
    pub insecure: Vec<String>,
    /// Trust the certificate authorities in this PEM file too.
    #[arg(long, value_name = "FILE", value_delimiter = ',', env = "OCCYSTRAP_CA_CERT")]
    pub ca_cert: Vec<PathBuf>,
    /// Log in to registries with docker's config.json there, for every client. Without it nobody is logged in anywhere.
    #[arg(long, value_name = "PATH", env = "OCCYSTRAP_DOCKER_CONFIG")]
    pub docker_config: Option<PathBuf>,
    /// How often a request to a registry that failed for a passing reason is sent again.
    #[arg(long, value_name = "N", default_value_t = 4, env = "OCCYSTRAP_RETRIES")]
    pub retries: u32,
}

impl RegistrySettings {
    /// As the client of registries has it, which counts what it does in `traffic`.
    pub fn options(&self, traffic: &Traffic) -> Options {
        Options {
            insecure_hosts: self.insecure.clone(),
            ca_files: self.ca_cert.clone(),
            docker_config: match &self.docker_config {
                Some(path) => ConfigFile::Path(path.clone()),
                None => ConfigFile::None,
            },
            allow_networks: self.allow_network.clone(),
            // A client named it, and not who runs this process.
            trust_registry_host: false,
            attempts: self.retries.saturating_add(1),
            hook: Some(telemetry::request_hook()),
            traffic: traffic.clone(),
            ..Options::default()
        }
    }
}

/// Where temporary files go.
#[derive(Args, Clone, Debug)]
pub struct SpoolSettings {
    /// Where temporary files go. They have no names, and are gone when the process is [default: $TMPDIR, then /tmp].
    #[arg(long, value_name = "DIR", env = "OCCYSTRAP_TEMP_DIR")]
    pub temp_dir: Option<PathBuf>,
    /// All temporary files together may take this many bytes. K, M, G and T, or KiB..., are powers of 1024; KB, MB, GB and TB of
    /// 1000.
    #[arg(long, value_name = "SIZE", default_value = "64G", value_parser = size::parse, env = "OCCYSTRAP_SPOOL_LIMIT")]
    pub spool_limit: u64,
}

impl SpoolSettings {
    /// The directory and its cap.
    pub fn directory(&self) -> SpoolDir {
        SpoolDir::new(self.temp_dir.clone().unwrap_or_else(std::env::temp_dir), self.spool_limit)
    }
}

/// Seconds, at least a millisecond of them and at most a day.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok().filter(|seconds| (0.001..=86_400.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| format!("{text:?}: expected 0.001 to 86400 seconds"))
}
