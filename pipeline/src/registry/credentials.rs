//! Who we say we are: explicit credentials, else docker's `config.json` with its credential helpers.
//!
//! The file's rules are docker's (`cli/config/configfile`). A helper is a program of the user's: it gets [`HELPER_TIMEOUT`], and
//! what it prints never reaches an error, because it may be a secret.

use std::collections::HashMap;
use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

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
    /// `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`, where it exists.
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

/// Looks up a host, as the user names it, in docker's configuration.
pub(super) async fn find(file: &ConfigFile, host: &str) -> Found {
    let problem = |problem| Found { credentials: None, problem: Some(problem) };
    let Some(path) = config_path(file) else {
        return Found::default();
    };
    let config = match read_config(&path).await {
        Ok(Some(config)) => config,
        Ok(None) if matches!(file, ConfigFile::Default) => return Found::default(),
        Ok(None) => return problem(format!("{} does not exist", path.display())),
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

fn config_path(file: &ConfigFile) -> Option<PathBuf> {
    let directory = match file {
        ConfigFile::None => return None,
        ConfigFile::Path(path) if path.is_dir() => path.clone(),
        ConfigFile::Path(path) => return Some(path.clone()),
        ConfigFile::Default => match std::env::var_os("DOCKER_CONFIG").filter(|value| !value.is_empty()) {
            Some(directory) => PathBuf::from(directory),
            None => Path::new(&std::env::var_os("HOME")?).join(".docker"),
        },
    };
    Some(directory.join("config.json"))
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
        format!("it is not docker's configuration (line {}, column {})", error.line(), error.column())
    })
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: HashMap<String, Entry>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Lookup {
    Credentials(Credentials),
    Helper(String),
    Unusable,
    Nothing,
}

impl Config {
    /// A host's own helper comes first, then what stands in the file, then the common store.
    fn lookup(&self, host: &str) -> Lookup {
        if let Some(helper) = find_host(&self.cred_helpers, host).filter(|helper| !helper.is_empty()) {
            return Lookup::Helper(helper.clone());
        }
        match find_host(&self.auths, host).map(Entry::credentials) {
            Some(Ok(Some(credentials))) => return Lookup::Credentials(credentials),
            Some(Err(Undecodable)) => return Lookup::Unusable,
            // An entry without content says that the store has it.
            Some(Ok(None)) | None => {}
        }
        match self.creds_store.as_ref().filter(|store| !store.is_empty()) {
            Some(store) => Lookup::Helper(store.clone()),
            None => Lookup::Nothing,
        }
    }
}

/// An entry by its exact key, else by the host in a key that is a URL.
fn find_host<'a, T>(entries: &'a HashMap<String, T>, host: &str) -> Option<&'a T> {
    let names = [reference::credentials_key(host), host, reference::registry_host(host)];
    if let Some(entry) = names.iter().find_map(|name| entries.get(*name)) {
        return Some(entry);
    }
    let host_of = |key: &'a str| {
        let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
        key.split_once('/').map_or(key, |(host, _)| host)
    };
    let mut keys: Vec<_> = entries.keys().collect();
    keys.sort(); // The same key on every run.
    keys.into_iter()
        .find(|key| {
            let key = host_of(key);
            key.eq_ignore_ascii_case(host)
                || (host == "docker.io" && matches!(key, "index.docker.io" | "registry-1.docker.io"))
        })
        .and_then(|key| entries.get(key))
}

struct Undecodable;

impl Entry {
    fn credentials(&self) -> Result<Option<Credentials>, Undecodable> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = given(&self.registrytoken) {
            return Ok(Some(Credentials::RegistryToken(token.into())));
        }
        let (username, password) = match given(&self.auth) {
            Some(auth) => decode_auth(&auth)?,
            None => (given(&self.username).unwrap_or_default(), given(&self.password).unwrap_or_default()),
        };
        if let Some(token) = given(&self.identitytoken) {
            return Ok(Some(Credentials::IdentityToken { username, token: token.into() }));
        }
        if username.is_empty() && password.is_empty() {
            return Ok(None);
        }
        Ok(Some(Credentials::Basic { username, password: password.into() }))
    }
}

fn decode_auth(auth: &str) -> Result<(String, String), Undecodable> {
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let decoded = LENIENT.decode(auth.trim()).map_err(|_| Undecodable)?;
    let decoded = String::from_utf8(decoded).map_err(|_| Undecodable)?;
    let (username, password) = decoded.split_once(':').ok_or(Undecodable)?;
    // Docker pads with NULs and cuts them off again.
    Ok((username.to_owned(), password.trim_end_matches('\0').to_owned()))
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

    fn lookup(config: &str, host: &str) -> Lookup {
        serde_json::from_str::<Config>(config).unwrap().lookup(host)
    }

    fn basic(username: &str, password: &str) -> Lookup {
        Lookup::Credentials(Credentials::Basic {
            username: username.to_owned(),
            password: password.to_owned().into(),
        })
    }

    #[test]
    fn entries_are_found_by_host_however_docker_wrote_the_key() {
        let auth = "dXNlcjpwYXNzOndvcmQ="; // user:pass:word
        for (key, host) in [
            ("localhost:5000", "localhost:5000"),
            ("https://localhost:5000", "localhost:5000"),
            ("http://localhost:5000/v2/", "localhost:5000"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("docker.io", "docker.io"),
            ("registry-1.docker.io", "docker.io"),
            ("index.docker.io", "docker.io"),
        ] {
            let config = format!(r#"{{"auths":{{"{key}":{{"auth":"{auth}"}}}}}}"#);
            assert_eq!(lookup(&config, host), basic("user", "pass:word"), "{key}");
            assert_eq!(lookup(&config, "elsewhere.example"), Lookup::Nothing, "{key}");
        }
    }

    #[test]
    fn a_hosts_helper_comes_before_its_entry_and_the_store_after_it() {
        let config = r#"{
            "auths": {"a.example": {"username": "u", "password": "p"}, "b.example": {}},
            "credsStore": "store", "credHelpers": {"c.example": "own"}, "HttpHeaders": {"x": "y"}}"#;
        assert_eq!(lookup(config, "a.example"), basic("u", "p"));
        assert_eq!(lookup(config, "b.example"), Lookup::Helper("store".to_owned()));
        assert_eq!(lookup(config, "c.example"), Lookup::Helper("own".to_owned()));
        assert_eq!(lookup(r#"{"auths":{"b.example":{}}}"#, "b.example"), Lookup::Nothing);
    }

    #[test]
    fn tokens_and_broken_entries_are_told_apart() {
        let identity = r#"{"auths":{"x.io":{"auth":"PHRva2VuPjo=","identitytoken":"id"}}}"#;
        assert_eq!(
            lookup(identity, "x.io"),
            Lookup::Credentials(Credentials::IdentityToken {
                username: "<token>".to_owned(),
                token: "id".to_owned().into()
            })
        );
        let registry = r#"{"auths":{"x.io":{"registrytoken":"t"}}}"#;
        assert_eq!(
            lookup(registry, "x.io"),
            Lookup::Credentials(Credentials::RegistryToken("t".to_owned().into()))
        );
        assert_eq!(lookup(r#"{"auths":{"x.io":{"auth":"!"}}}"#, "x.io"), Lookup::Unusable);
    }

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
