//! Who we say we are: explicit credentials, else docker's `config.json` with its credential helpers, else podman's `auth.json`,
//! which has the same form.
//!
//! The files' rules are docker's (`cli/config/configfile`). A helper is a program of the user's: it gets [`HELPER_TIMEOUT`], and
//! what it prints never reaches an error, because it may be a secret.

use std::ffi::OsString;
use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use super::docker_config::{Config, Lookup};
use crate::reference;

/// How long a helper may take. Some ask the user to unlock a store.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a configuration or of a helper's answer that are read.
const DOCUMENT_CAP: u64 = 1024 * 1024;
/// What helpers print when they have nothing for a host (docker-credential-helpers, `errCredentialsNotFoundMessage`).
const NOT_FOUND: &str = "credentials not found in native keychain";

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// How a registry or its token server can know us.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Credentials {
    /// A name and a password, or an access token in a password's place.
    Basic {
        /// The name.
        username: String,
        /// The password.
        password: Secret,
    },
    /// An OAuth2 refresh token, which a token server changes into access tokens.
    IdentityToken {
        /// The name that it belongs to, which may be empty.
        username: String,
        /// The token.
        token: Secret,
    },
    /// An access token for the registry itself.
    RegistryToken(Secret),
}

/// Where docker's configuration is read from.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum ConfigFile {
    /// `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`; what that does not have, in podman's file: `$REGISTRY_AUTH_FILE`,
    /// else `$XDG_RUNTIME_DIR/containers/auth.json`, then `~/.config/containers/auth.json`.
    #[default]
    Default,
    /// This file, or `config.json` in this directory.
    Path(PathBuf),
    /// Nowhere.
    None,
}

/// What was found for a host.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    pub(super) credentials: Option<Credentials>,
    /// Why there are none although the configuration seems to name some.
    pub(super) problem: Option<String>,
}

impl Secret {
    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// Looks up a host, as the user names it.
pub(super) async fn find(file: &ConfigFile, host: &str) -> Found {
    let (paths, must_exist) = match file {
        ConfigFile::None => (Vec::new(), false),
        ConfigFile::Path(path) if path.is_dir() => (vec![path.join("config.json")], true),
        ConfigFile::Path(path) => (vec![path.clone()], true),
        ConfigFile::Default => (usual_paths(|name| std::env::var_os(name)), false),
    };
    let mut all = Found::default();
    for path in paths {
        let found = find_in(&path, host, must_exist).await;
        if found.credentials.is_some() {
            return found;
        }
        // The first file's problem is the likeliest to be the user's.
        all.problem = all.problem.or(found.problem);
    }
    all
}

/// Docker's file, and then podman's (`containers-auth.json(5)`).
fn usual_paths(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let variable = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = variable("HOME");
    let below_home = |path| home.as_ref().map(|home| home.join(path));
    let docker =
        variable("DOCKER_CONFIG").or_else(|| below_home(".docker")).map(|dir| dir.join("config.json"));
    let podman = match variable("REGISTRY_AUTH_FILE") {
        Some(path) => vec![path],
        None => {
            let config = variable("XDG_CONFIG_HOME").or_else(|| below_home(".config"));
            let directories = [variable("XDG_RUNTIME_DIR"), config].into_iter().flatten();
            directories.map(|directory| directory.join("containers/auth.json")).collect()
        }
    };
    docker.into_iter().chain(podman).collect()
}

async fn find_in(path: &Path, host: &str, must_exist: bool) -> Found {
    let problem = |problem| Found { credentials: None, problem: Some(problem) };
    let config = match read_config(path).await {
        Ok(Some(config)) => config,
        Ok(None) if must_exist => return problem(format!("{} does not exist", path.display())),
        Ok(None) => return Found::default(),
        Err(error) => return problem(format!("cannot read {}: {error}", path.display())),
    };
    let helper = match config.lookup(host) {
        Lookup::Credentials(credentials) => {
            return Found { credentials: Some(credentials), problem: None };
        }
        Lookup::Nothing => return Found::default(),
        Lookup::Unusable => {
            return problem(format!("the entry of {host} in {} cannot be decoded", path.display()));
        }
        Lookup::Helper(helper) => helper,
    };
    match ask_helper(&helper, reference::credentials_key(host)).await {
        Ok(credentials) => Found { credentials, problem: None },
        Err(error) => problem(format!("credential helper docker-credential-{helper} {error}")),
    }
}

async fn read_config(path: &Path) -> Result<Option<Config>, String> {
    use tokio::io::AsyncReadExt as _;
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut text = Vec::new();
    file.take(DOCUMENT_CAP).read_to_end(&mut text).await.map_err(|error| error.to_string())?;
    // serde's message may quote the text, which may be a secret; its place is enough.
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        format!(
            "it is not a configuration of docker's or podman's (line {}, column {})",
            error.line(),
            error.column()
        )
    })
}

/// Runs `docker-credential-NAME get`. The thread that reads is not the runtime's: a helper that hangs in a grandchild must not
/// keep the process from ending.
async fn ask_helper(helper: &str, server: &str) -> Result<Option<Credentials>, String> {
    if helper.contains(['/', '\0']) {
        return Err("is not the name of a program".to_owned());
    }
    let mut child = Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let pipes = (child.stdin.take(), child.stdout.take());
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let server = server.to_owned();
    std::thread::spawn(move || {
        let (Some(mut stdin), Some(stdout)) = pipes else { return };
        let mut answer = Vec::new();
        // A helper that does not read its input may still answer.
        let _ = stdin.write_all(server.as_bytes());
        drop(stdin);
        let _ = stdout.take(DOCUMENT_CAP).read_to_end(&mut answer);
        let _ = sender.send(answer);
    });
    let mut child = Reaped(child);
    let answer = match tokio::time::timeout(HELPER_TIMEOUT, receiver).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => return Err("gave no answer".to_owned()),
        Err(_) => return Err(format!("took longer than {} seconds", HELPER_TIMEOUT.as_secs())),
    };
    let succeeded = child.succeeded().await;
    helper_answer(&answer, succeeded)
}

/// A child that does not outlive its use.
struct Reaped(Child);

impl Reaped {
    /// Its output has ended, so it is about to end too.
    async fn succeeded(&mut self) -> bool {
        for _ in 0..100 {
            match self.0.try_wait() {
                Ok(Some(status)) => return status.success(),
                Ok(None) => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(_) => return false,
            }
        }
        false
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn helper_answer(answer: &[u8], succeeded: bool) -> Result<Option<Credentials>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    if !succeeded {
        let says = String::from_utf8_lossy(answer);
        return if says.contains(NOT_FOUND) { Ok(None) } else { Err("failed".to_owned()) };
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(answer) else {
        return Err("gave an answer that is not understood".to_owned());
    };
    Ok(match answer.username.as_str() {
        "" if answer.secret.is_empty() => None,
        "<token>" => {
            Some(Credentials::IdentityToken { username: String::new(), token: answer.secret.into() })
        }
        _ => Some(Credentials::Basic { username: answer.username, password: answer.secret.into() }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_answer_with_a_password_a_token_or_nothing() {
        let answer = helper_answer(br#"{"ServerURL":"x","Username":"u","Secret":"s"}"#, true);
        assert!(matches!(answer, Ok(Some(Credentials::Basic { .. }))));
        let answer = helper_answer(br#"{"Username":"<token>","Secret":"s"}"#, true);
        assert!(matches!(answer, Ok(Some(Credentials::IdentityToken { .. }))));
        assert_eq!(helper_answer(b"credentials not found in native keychain\n", false), Ok(None));
        assert!(helper_answer(b"hunter2", false).unwrap_err().find("hunter2").is_none());
        assert!(helper_answer(b"hunter2", true).unwrap_err().find("hunter2").is_none());
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials =
            Credentials::Basic { username: "u".to_owned(), password: "hunter2".to_owned().into() };
        assert!(!format!("{credentials:?}").contains("hunter2"));
    }

    #[test]
    fn podmans_file_is_looked_for_behind_dockers() {
        let paths = |variables: &[(&str, &str)]| -> Vec<String> {
            let value =
                |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
            usual_paths(value).iter().map(|path| path.display().to_string()).collect()
        };
        let home = ("HOME", "/home/ann");
        let (docker, podman) = ("/home/ann/.docker/config.json", "/home/ann/.config/containers/auth.json");
        assert_eq!(paths(&[home]), [docker, podman]);
        assert_eq!(
            paths(&[
                home,
                ("XDG_RUNTIME_DIR", "/run/user/1"),
                ("DOCKER_CONFIG", "/d"),
                ("XDG_CONFIG_HOME", "")
            ]),
            ["/d/config.json", "/run/user/1/containers/auth.json", podman]
        );
        assert_eq!(paths(&[home, ("REGISTRY_AUTH_FILE", "/a"), ("XDG_RUNTIME_DIR", "/r")]), [docker, "/a"]);
        assert!(paths(&[]).is_empty());
    }

    #[tokio::test]
    async fn a_missing_helper_is_a_problem_and_a_missing_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let missing = find(&ConfigFile::Path(directory.path().join("absent")), "x.io").await;
        assert!(missing.problem.is_some());
        std::fs::write(directory.path().join("config.json"), r#"{"credsStore":"occy-absent"}"#).unwrap();
        let found = find(&ConfigFile::Path(directory.path().to_owned()), "x.io").await;
        assert!(found.credentials.is_none());
        assert!(found.problem.unwrap().contains("docker-credential-occy-absent"));
        assert!(find(&ConfigFile::None, "x.io").await.problem.is_none());
    }
}
