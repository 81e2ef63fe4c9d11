//! What clients give to log in to registries with, for one job or one call: used at the host that it is for, and sealed where it
//! has to be kept.
//!
//! A job's credentials are in the engine under a key of `--secret-key-file`, bound to their job, and removed with its end. Without
//! such a file jobs with credentials are not accepted. Those of a call are in memory alone. Nothing here has a `Debug` that shows
//! them.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use occy_pipeline::digest::Digest;
use occy_pipeline::registry::Credentials;
use occy_pipeline::wire::convert;
use occy_proto::v1::RegistryCredentials;
use prost::Message;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

use crate::error::ServiceError;

/// Registries that one job or call may log in to.
const HOSTS_MAX: usize = 16;
/// Bytes of all that is said of one of them.
const LOGIN_MAX: usize = 32 * 1024;
/// Bytes of the file of keys that are read.
const FILE_MAX: u64 = 64 * 1024;
/// Bytes of a key.
const KEY_LEN: usize = 32;
/// Bytes of the name under which a key is known.
const ID_LEN: usize = 8;

/// The credentials of a job or a call.
#[derive(Clone, Default)]
pub struct Logins(Arc<[RegistryCredentials]>);

impl fmt::Debug for Logins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|one| &one.host)).finish()
    }
}

impl Logins {
    /// What a request brings, if it can be used.
    pub fn of(credentials: Vec<RegistryCredentials>) -> Result<Self, ServiceError> {
        let fail = |problem: String| ServiceError::Field { field: "credentials", problem };
        if credentials.len() > HOSTS_MAX {
            return Err(fail(format!("more than {HOSTS_MAX} registries")));
        }
        for (at, one) in credentials.iter().enumerate() {
            if one.host.is_empty() || one.login.is_none() {
                return Err(fail(format!("entry {at} lacks its host or its login")));
            }
            if one.encoded_len() > LOGIN_MAX {
                return Err(fail(format!("entry {at} has more than {LOGIN_MAX} bytes")));
            }
            if credentials[..at].iter().any(|earlier| earlier.host == one.host) {
                return Err(fail(format!("entry {at} has the host of an earlier one")));
            }
        }
        Ok(Self(credentials.into()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// By registry, as sources and destinations name them.
    pub fn by_host(&self) -> HashMap<String, Credentials> {
        let hosts = self.0.iter().map(|one| one.host.clone());
        hosts
            .filter_map(|host| Some((self.for_host(&host)?, host)))
            .map(|(login, host)| (host, login))
            .collect()
    }

    /// For a registry, as a source or destination names it.
    pub fn for_host(&self, host: &str) -> Option<Credentials> {
        self.0.iter().find(|one| one.host == host)?.login.clone().map(convert::credentials)
    }
}

/// Why the keys cannot be used, or what they sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The file of keys cannot be read.
    #[error("failed to read {}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is not one. Nothing of what it says is told.
    #[error("{}, line {line}: expected a key of 32 bytes in base64, as `openssl rand -base64 32` makes one", .path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where.
        line: usize,
    },
    /// There is no key in it.
    #[error("{} has no key", .0.display())]
    NoKey(PathBuf),
    /// The key that sealed something is not there any more.
    #[error("the key {0} that sealed the job's credentials is not in the coordinator's file of keys")]
    KeyGone(String),
    /// What was sealed is not what is there now, or is another job's.
    #[error("the job's credentials are not what was sealed")]
    Broken,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoRandom,
}

/// The keys that seal what is stored. The first seals; all open.
pub struct SecretKeys(Vec<SecretKey>);

struct SecretKey {
    /// Says nothing about the key.
    id: [u8; ID_LEN],
    key: LessSafeKey,
}

impl fmt::Debug for SecretKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| name(&key.id))).finish()
    }
}

impl SecretKeys {
    /// Reads a file of keys, a line each; empty lines and those that begin with `#` are none. Blocks.
    pub fn read(path: &Path) -> Result<Self, SealError> {
        let fail = |source| SealError::Io { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(fail)?.len() > FILE_MAX {
            return Err(fail(std::io::ErrorKind::FileTooLarge.into()));
        }
        Self::parse(path, &std::fs::read_to_string(path).map_err(fail)?)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, SealError> {
        let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let key = |(line, text)| {
            SecretKey::parse(text).ok_or_else(|| SealError::Syntax { path: path.to_owned(), line })
        };
        let keys: Vec<_> = lines.map(key).collect::<Result<_, _>>()?;
        if keys.is_empty() { Err(SealError::NoKey(path.to_owned())) } else { Ok(Self(keys)) }
    }

    /// Seals a job's credentials, so that they can be opened as that job's alone.
    ///
    /// A random nonce of 96 bits is good for four billion jobs a key.
    pub fn seal(&self, job: &str, logins: &Logins) -> Result<Vec<u8>, SealError> {
        let Some(SecretKey { id, key }) = self.0.first() else { unreachable!("there is one at least") };
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| SealError::NoRandom)?;
        let mut content = Vec::new();
        for one in logins.0.iter() {
            one.encode_length_delimited(&mut content).expect("a vector has room");
        }
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound(id, job), &mut content)
            .map_err(|_| SealError::Broken)?;
        Ok([&id[..], &nonce, &content].concat())
    }

    /// Opens what was sealed.
    pub fn open(&self, job: &str, sealed: &[u8]) -> Result<Logins, SealError> {
        let (id, rest) = sealed.split_first_chunk::<ID_LEN>().ok_or(SealError::Broken)?;
        let (nonce, content) = rest.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Broken)?;
        let key = self.0.iter().find(|key| key.id == *id).ok_or_else(|| SealError::KeyGone(name(id)))?;
        let mut content = content.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = key.key.open_in_place(nonce, bound(id, job), &mut content);
        let mut opened: &[u8] = opened.map_err(|_| SealError::Broken)?;
        let mut logins = Vec::new();
        while !opened.is_empty() {
            let one = RegistryCredentials::decode_length_delimited(&mut opened);
            logins.push(one.map_err(|_| SealError::Broken)?);
        }
        Ok(Logins(logins.into()))
    }
}

impl SecretKey {
    fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; KEY_LEN] = BASE64_STANDARD.decode(text).ok()?.try_into().ok()?;
        let hash = Digest::sha256([b"occystrap key id".as_slice(), &bytes].concat());
        let mut id = [0; ID_LEN];
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(hash.hex().get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(Self { id, key: LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &bytes).ok()?) })
    }
}

/// What the seal holds together: the key and the job.
fn bound(id: &[u8; ID_LEN], job: &str) -> Aad<Vec<u8>> {
    Aad::from([&id[..], job.as_bytes()].concat())
}

fn name(id: &[u8; ID_LEN]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use occy_proto::v1::PasswordLogin;
    use occy_proto::v1::registry_credentials::Login;

    use super::*;

    const OLD: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    const NEW: &str = "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

    fn keys(lines: &[&str]) -> SecretKeys {
        SecretKeys::parse(Path::new("keys"), &lines.join("\n")).unwrap()
    }

    fn logins() -> Logins {
        let login = PasswordLogin { username: "user".to_owned(), password: "hunter2".to_owned() };
        let one = RegistryCredentials { host: "r.io".to_owned(), login: Some(Login::Password(login)) };
        let two = Login::RegistryToken("token2".to_owned());
        Logins::of(vec![one, RegistryCredentials { host: "s.io".to_owned(), login: Some(two) }]).unwrap()
    }

    #[test]
    fn what_is_sealed_is_opened_with_its_key_as_its_jobs_alone() {
        let old = keys(&["# the old one", OLD]);
        let sealed = old.seal("job", &logins()).unwrap();
        assert!(!sealed.windows(7).any(|bytes| bytes == b"hunter2"));
        assert_ne!(sealed, old.seal("job", &logins()).unwrap(), "another nonce each time");
        let both = keys(&[NEW, "", OLD]);
        let opened = both.open("job", &sealed).unwrap();
        assert_eq!(opened.for_host("r.io"), logins().for_host("r.io"));
        assert_eq!(opened.for_host("s.io"), Some(Credentials::RegistryToken("token2".to_owned().into())));
        assert_eq!(opened.for_host("t.io"), None);
        assert!(matches!(both.open("another", &sealed), Err(SealError::Broken)));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(both.open("job", &changed).is_err(), "byte {at}");
        }
        assert!(both.open("job", &sealed[..sealed.len() - 1]).is_err());
        let rotated = keys(&[NEW]);
        assert!(matches!(rotated.open("job", &sealed), Err(SealError::KeyGone(_))));
        let sealed = both.seal("job", &logins()).unwrap();
        assert!(rotated.open("job", &sealed).is_ok(), "the first key seals");
    }

    #[test]
    fn a_file_of_keys_that_cannot_be_used_is_told_of_without_what_it_says() {
        let error = |text: &str| SecretKeys::parse(Path::new("keys"), text).unwrap_err().to_string();
        assert!(error("# none\n").contains("no key"));
        for bad in ["hunter2", "aHVudGVyMg==", "AAAA AAAA"] {
            let error = error(&format!("{OLD}\n{bad}\n"));
            assert!(error.contains("line 2") && !error.contains(bad), "{error}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?} {:?} {:?}", logins(), logins().0, keys(&[OLD]));
        assert!(!shown.contains("hunter2") && !shown.contains("token2") && !shown.contains(OLD), "{shown}");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let one = |host: &str, login| RegistryCredentials { host: host.to_owned(), login };
        let token = || Some(Login::RegistryToken("x".to_owned()));
        let long = Some(Login::RegistryToken("x".repeat(LOGIN_MAX)));
        for bad in [
            vec![one("", token())],
            vec![one("r.io", None)],
            vec![one("r.io", token()), one("r.io", token())],
            vec![one("r.io", long)],
            (0..=HOSTS_MAX).map(|host| one(&host.to_string(), token())).collect(),
        ] {
            assert!(matches!(Logins::of(bad), Err(ServiceError::Field { field: "credentials", .. })));
        }
    }
}
