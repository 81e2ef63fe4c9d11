//! Where the Engine is: the socket that a URI names, what `DOCKER_HOST` says, or the first of the usual sockets that is there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::EngineError;

/// How long a connection may be silent before its other end is asked for a sign of life.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Docker's socket.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// Podman's, when root runs it.
const PODMAN_SOCKET: &str = "/run/podman/podman.sock";

/// What tells where the Engine is.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `?socket=`: wins over everything.
    pub socket: Option<PathBuf>,
    /// As `DOCKER_HOST` has it: `unix://PATH`, or `tcp://HOST:PORT`.
    pub host: Option<String>,
    /// As `DOCKER_TLS_VERIFY`: speak TLS to a `tcp://` host.
    pub tls: bool,
    /// As `DOCKER_CERT_PATH`: the directory of `ca.pem`, `cert.pem` and `key.pem`.
    pub certificates: Option<PathBuf>,
    /// As `XDG_RUNTIME_DIR`: where the sockets of rootless engines are.
    pub runtime_dir: Option<PathBuf>,
}

/// Where an Engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// `HOST:PORT`.
        host: String,
        /// With TLS, by the certificates in this directory.
        certificates: Option<PathBuf>,
    },
}

impl Options {
    /// What the environment of this process says, in Docker's own variables.
    pub fn from_environment() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let home = variable("HOME").map(|home| PathBuf::from(home).join(".docker"));
        Self {
            socket: None,
            host: variable("DOCKER_HOST").map(|host| host.to_string_lossy().into_owned()),
            tls: variable("DOCKER_TLS_VERIFY").is_some(),
            certificates: variable("DOCKER_CERT_PATH").map(PathBuf::from).or(home),
            runtime_dir: variable("XDG_RUNTIME_DIR").map(PathBuf::from),
        }
    }

    /// The same, but at the socket that a URI names, if it names one.
    #[must_use]
    pub fn at(&self, socket: Option<&str>) -> Self {
        Self { socket: socket.map(PathBuf::from), ..self.clone() }
    }

    /// The Engine's address.
    pub fn address(&self) -> Result<Address, EngineError> {
        if let Some(socket) = &self.socket {
            return Ok(Address::Unix(socket.clone()));
        }
        if let Some(host) = &self.host {
            return self.parse(host);
        }
        let candidates = self.candidates();
        let found = candidates.iter().find(|path| path.exists()).cloned();
        found.map(Address::Unix).ok_or(EngineError::NoSocket { tried: candidates })
    }

    /// Where engines put their sockets, Docker's before Podman's.
    fn candidates(&self) -> Vec<PathBuf> {
        let rootless = |name: &str| self.runtime_dir.as_deref().map(|dir| dir.join(name));
        let mut candidates = vec![PathBuf::from(DOCKER_SOCKET)];
        candidates.extend(rootless("docker.sock"));
        candidates.extend(rootless("podman/podman.sock"));
        candidates.push(PathBuf::from(PODMAN_SOCKET));
        candidates
    }

    fn parse(&self, text: &str) -> Result<Address, EngineError> {
        let bad = |reason| EngineError::Address { text: text.to_owned(), reason };
        match text.split_once("://") {
            Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(PathBuf::from(path))),
            Some(("tcp", rest)) => {
                let host = rest.trim_end_matches('/');
                if host.is_empty() || host.contains(['/', '?', '#', '@']) {
                    return Err(bad("expected tcp://HOST:PORT"));
                }
                let default = if self.tls { 2376 } else { 2375 };
                // The last colon of `[::1]` is no port's.
                let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
                let host = if has_port { host.to_owned() } else { format!("{host}:{default}") };
                let certificates = self.tls.then(|| self.certificates.clone().unwrap_or_default());
                Ok(Address::Tcp { host, certificates })
            }
            Some(("ssh", _)) => {
                Err(bad("ssh is not spoken here; forward the Engine's socket with `ssh -L` instead"))
            }
            _ => Err(bad("expected unix://PATH or tcp://HOST:PORT")),
        }
    }
}

impl Address {
    /// What request URLs begin with.
    pub(super) fn base(&self) -> String {
        match self {
            // Nobody resolves this name: the socket is the address.
            Self::Unix(_) => "http://docker".to_owned(),
            Self::Tcp { host, certificates: None } => format!("http://{host}"),
            Self::Tcp { host, certificates: Some(_) } => format!("https://{host}"),
        }
    }

    /// An HTTP client that speaks to this address alone.
    pub(super) fn client(&self, connect_timeout: Duration) -> Result<reqwest::Client, EngineError> {
        // reqwest takes the process's provider. A program that has installed one keeps it.
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let mut builder = reqwest::Client::builder()
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(connect_timeout)
            // There is no telling how long an Engine works before it answers, but whether its machine is still there.
            .tcp_keepalive(KEEPALIVE);
        match self {
            Self::Unix(path) => builder = builder.unix_socket(path.as_path()).tls_certs_only([]),
            Self::Tcp { certificates: None, .. } => builder = builder.tls_certs_only([]),
            Self::Tcp { certificates: Some(directory), .. } => {
                let authorities = reqwest::Certificate::from_pem_bundle(&read(directory, "ca.pem")?)
                    .map_err(|error| unusable(directory, "ca.pem", &error))?;
                let mut pem = read(directory, "cert.pem")?;
                pem.push(b'\n');
                pem.extend(read(directory, "key.pem")?);
                let identity = reqwest::Identity::from_pem(&pem)
                    .map_err(|error| unusable(directory, "cert.pem and key.pem", &error))?;
                builder = builder.tls_certs_only(authorities).identity(identity);
            }
        }
        builder.build().map_err(|error| EngineError::connect(self, &error))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, .. } => write!(f, "tcp://{host}"),
        }
    }
}

fn read(directory: &Path, name: &str) -> Result<Vec<u8>, EngineError> {
    let path = directory.join(name);
    std::fs::read(&path).map_err(|error| EngineError::Certificate { path, cause: error.to_string() })
}

fn unusable(directory: &Path, name: &str, error: &reqwest::Error) -> EngineError {
    EngineError::Certificate { path: directory.join(name), cause: super::error::innermost(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: &str, tls: bool) -> Result<Address, String> {
        let certificates = Some(PathBuf::from("/certs"));
        let options = Options { host: Some(host.to_owned()), tls, certificates, ..Options::default() };
        options.address().map_err(|error| error.to_string())
    }

    #[test]
    fn docker_host_is_a_socket_or_a_port() {
        assert_eq!(address("unix:///run/x.sock", false).unwrap(), Address::Unix("/run/x.sock".into()));
        let tcp = |host: &str, tls: bool| Address::Tcp {
            host: host.to_owned(),
            certificates: tls.then(|| PathBuf::from("/certs")),
        };
        assert_eq!(address("tcp://10.0.0.1:99", false).unwrap(), tcp("10.0.0.1:99", false));
        assert_eq!(address("tcp://engine", false).unwrap(), tcp("engine:2375", false));
        assert_eq!(address("tcp://engine/", true).unwrap(), tcp("engine:2376", true));
        assert_eq!(address("tcp://[::1]", true).unwrap(), tcp("[::1]:2376", true));
        for bad in ["unix://", "tcp://", "tcp://a/b", "/run/x.sock", "npipe:////./pipe/x", "ssh://host"] {
            assert!(address(bad, false).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn a_socket_in_the_uri_wins_and_otherwise_the_first_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            host: Some("tcp://elsewhere".to_owned()),
            runtime_dir: Some(dir.path().to_owned()),
            ..Options::default()
        };
        assert_eq!(options.at(Some("/x")).address().unwrap(), Address::Unix("/x".into()));
        let candidates = options.candidates();
        assert_eq!(candidates.len(), 4);
        assert!(candidates.contains(&dir.path().join("podman/podman.sock")));
    }
}
