//! Who calls, and what they may do.
//!
//! With `--tokens-file` every call needs a token of that file, and has its scopes; without it everybody who can connect may do
//! what clients do. A caller's work belongs to its *tenant*: the token's name, else the subject of the certificate that it has
//! shown, else nobody, who is one tenant too. No tenant sees another's jobs.
//!
//! The file is read again whenever it changes. What is kept of a token is its digest, so that nothing here could be logged, and
//! all digests are compared, in a time that says nothing. Health and reflection are asked by nobody in particular.

use std::collections::HashSet;
use std::convert::Infallible;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use occy_pipeline::digest::Digest;
use serde::Deserialize;
use subtle::ConstantTimeEq;
use tonic::Request;
use x509_cert::der::Decode;

use crate::error::ServiceError;
use crate::schedule::Tenant;

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Bytes of the file that are read.
const FILE_MAX: u64 = 1024 * 1024;
/// Bytes of a token's name.
const NAME_MAX: usize = 128;
/// Bytes that a token must have at least. Its digest tells who has the file nothing, if it cannot be guessed.
const TOKEN_MIN: usize = 16;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Read images and lists of them: ReadImage, SearchImage, ListNames, ProcessImage to the caller.
    Read,
    /// Write images: WriteImage, ProcessImage to a destination.
    Write,
    /// Delete images: DeleteImage.
    Delete,
    /// Submit jobs, and see and cancel its own; and have schedules.
    Jobs,
    /// All of these, with everybody's jobs and schedules.
    Admin,
    /// Be a worker.
    Worker,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Delete => "delete",
            Self::Jobs => "jobs",
            Self::Admin => "admin",
            Self::Worker => "worker",
        })
    }
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Whose work it is.
    pub tenant: Tenant,
    /// What it may do. None: all but what only an administrator may.
    scopes: Option<Arc<HashSet<Scope>>>,
}

/// What of a file is wrong. Nothing of what it says is in it.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// It cannot be read.
    #[error("failed to read {}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is too large.
    #[error("{} has more than {FILE_MAX} bytes", .0.display())]
    TooLarge(PathBuf),
    /// It is not such a file.
    #[error(
        "{} is not a file of tokens, at line {line}: expected [[token]] with a name, a sha256 or a value, and scopes \
         of read, write, delete, jobs, admin and worker",
        .path.display()
    )]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where.
        line: usize,
    },
    /// A token of it cannot be used.
    #[error("{}: token {number} {problem}", .path.display())]
    Token {
        /// Which.
        path: PathBuf,
        /// Its place in the file, from 1 on.
        number: usize,
        /// Why not.
        problem: &'static str,
    },
}

/// Who may do what.
#[derive(Debug)]
pub struct Access {
    file: Option<TokensFile>,
}

#[derive(Debug)]
struct TokensFile {
    path: PathBuf,
    tokens: RwLock<Arc<[Token]>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Token {
    /// Hexadecimal, in small letters.
    sha256: String,
    caller: Caller,
}

impl Caller {
    /// One who has shown no token, where none is needed.
    pub fn without_token(tenant: Tenant) -> Self {
        Self { tenant, scopes: None }
    }

    /// Refuses what it may not do.
    pub fn may(&self, scope: Scope) -> Result<(), ServiceError> {
        let is_granted = match (&self.scopes, scope) {
            (None, Scope::Admin) => false,
            (None, _) => true,
            (Some(scopes), Scope::Worker) => scopes.contains(&scope),
            (Some(scopes), scope) => scopes.contains(&scope) || scopes.contains(&Scope::Admin),
        };
        if is_granted { Ok(()) } else { Err(ServiceError::ScopeMissing(scope)) }
    }

    /// Whose jobs it sees. None: everybody's.
    pub fn sees(&self) -> Option<&Tenant> {
        if self.may(Scope::Admin).is_ok() { None } else { Some(&self.tenant) }
    }
}

impl Access {
    /// By the tokens of a file, or for everybody.
    pub async fn new(tokens: Option<&Path>) -> Result<Self, TokensError> {
        let file = match tokens {
            Some(path) => {
                let tokens = RwLock::new(read(path).await?.into());
                Some(TokensFile { path: path.to_owned(), tokens })
            }
            None => None,
        };
        Ok(Self { file })
    }

    /// Whether every caller needs a token.
    pub fn needs_tokens(&self) -> bool {
        self.file.is_some()
    }

    /// Who calls, if they may do this.
    pub fn authorize<T>(&self, request: &Request<T>, scope: Scope) -> Result<Caller, ServiceError> {
        let caller = self.caller(request)?;
        caller.may(scope)?;
        Ok(caller)
    }

    /// Who calls, whatever they want.
    pub fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        let Some(file) = &self.file else {
            let certificates = request.peer_certs();
            let subject = certificates.as_deref().and_then(|chain| Some(subject(chain.first()?)));
            return Ok(Caller::without_token(subject.unwrap_or_default().into()));
        };
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let token = header.and_then(|header| header.split_once(' '));
        let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) =
            token.ok_or(ServiceError::Unauthenticated { problem: "it comes without a token" })?;
        let tokens = Arc::clone(&file.tokens.read().unwrap_or_else(PoisonError::into_inner));
        let caller = find(&tokens, token.trim()).cloned();
        caller.ok_or(ServiceError::Unauthenticated { problem: "its token is not known" })
    }

    /// Reads the file again whenever it changes. One that cannot be used is told of, and changes nothing.
    pub async fn keep_reading(&self) -> Infallible {
        let Some(file) = &self.file else { return std::future::pending().await };
        let mut seen = stamp(&file.path).await;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = stamp(&file.path).await;
            if now == seen {
                continue;
            }
            seen = now;
            match read(&file.path).await {
                Ok(tokens) => {
                    tracing::info!(tokens = tokens.len(), "the file of tokens was read again");
                    *file.tokens.write().unwrap_or_else(PoisonError::into_inner) = tokens.into();
                }
                Err(error) => tracing::error!(%error, "the tokens stay as they were"),
            }
        }
    }
}

/// By which a changed file is known. None: it is not there.
async fn stamp(path: &Path) -> Option<(u64, u64, Option<SystemTime>)> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some((metadata.ino(), metadata.len(), metadata.modified().ok()))
}

/// The token's caller. All are looked at, whichever it is.
fn find<'a>(tokens: &'a [Token], token: &str) -> Option<&'a Caller> {
    let digest = Digest::sha256(token);
    tokens.iter().fold(None, |found, known| {
        let is_equal = known.sha256.as_bytes().ct_eq(digest.hex().as_bytes());
        if is_equal.into() { Some(&known.caller) } else { found }
    })
}

/// The subject of a certificate that the handshake has checked.
fn subject(certificate: &[u8]) -> String {
    match x509_cert::Certificate::from_der(certificate) {
        Ok(parsed) => format!("certificate:{}", parsed.tbs_certificate().subject()),
        // What TLS could read and this cannot still is one client's.
        Err(_) => format!("certificate:{}", Digest::sha256(certificate)),
    }
}

/// The file, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    token: Vec<WrittenToken>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenToken {
    name: String,
    sha256: Option<String>,
    value: Option<String>,
    scopes: HashSet<Scope>,
}

async fn read(path: &Path) -> Result<Vec<Token>, TokensError> {
    let fail = |source| TokensError::Io { path: path.to_owned(), source };
    if tokio::fs::metadata(path).await.map_err(fail)?.len() > FILE_MAX {
        return Err(TokensError::TooLarge(path.to_owned()));
    }
    parse(path, &tokio::fs::read_to_string(path).await.map_err(fail)?)
}

fn parse(path: &Path, text: &str) -> Result<Vec<Token>, TokensError> {
    // The parser's own message quotes the file.
    let written: Written = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = 1 + text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
        TokensError::Syntax { path: path.to_owned(), line }
    })?;
    let mut names = HashSet::new();
    let tokens = written.token.into_iter().enumerate().map(|(at, token)| {
        let is_new = names.insert(token.name.clone());
        let fail = |problem| TokensError::Token { path: path.to_owned(), number: at + 1, problem };
        accept(token, is_new).map_err(fail)
    });
    tokens.collect()
}

fn accept(token: WrittenToken, is_new: bool) -> Result<Token, &'static str> {
    let WrittenToken { name, sha256, value, scopes } = token;
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        return Err("has no name of 1 to 128 bytes that can be printed");
    }
    if !is_new {
        return Err("has the name of an earlier one");
    }
    let sha256 = match (sha256, value) {
        (Some(hex), None) => hex.to_ascii_lowercase(),
        (None, Some(value)) if value.len() >= TOKEN_MIN => Digest::sha256(value).hex().to_owned(),
        (None, Some(_)) => return Err("has a value of less than 16 bytes"),
        _ => return Err("has not one of sha256 and value"),
    };
    if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err("has a sha256 that is not 64 hexadecimal digits");
    }
    if scopes.is_empty() {
        return Err("has no scopes");
    }
    let tenant = format!("token:{name}").into();
    Ok(Token { sha256, caller: Caller { tenant, scopes: Some(Arc::new(scopes)) } })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &str = "0123456789abcdef";

    fn tokens(text: &str) -> Result<Vec<Token>, TokensError> {
        parse(Path::new("tokens.toml"), text)
    }

    fn one(scopes: &str) -> Caller {
        let text = format!("[[token]]\nname = \"ci\"\nvalue = \"{VALUE}\"\nscopes = [{scopes}]\n");
        let tokens = tokens(&text).unwrap();
        assert_eq!(find(&tokens, "another"), None);
        find(&tokens, VALUE).unwrap().clone()
    }

    #[test]
    fn a_value_and_its_digest_are_the_same_token() {
        let hex = Digest::sha256(VALUE).hex().to_ascii_uppercase();
        let text = format!("[[token]]\nname = \"ci\"\nsha256 = \"{hex}\"\nscopes = [\"read\"]\n");
        assert_eq!(find(&tokens(&text).unwrap(), VALUE), Some(&one("\"read\"")));
    }

    #[test]
    fn scopes_are_what_was_granted_and_an_administrator_has_all_but_a_workers() {
        let all = [Scope::Read, Scope::Write, Scope::Jobs, Scope::Admin, Scope::Worker];
        let granted = |caller: &Caller| all.map(|scope| caller.may(scope).is_ok());
        assert_eq!(granted(&one("\"read\", \"jobs\"")), [true, false, true, false, false]);
        assert_eq!(granted(&one("\"admin\"")), [true, true, true, true, false]);
        assert_eq!(granted(&one("\"worker\"")), [false, false, false, false, true]);
        assert_eq!(granted(&Caller::without_token("".into())), [true, true, true, false, true]);
        assert_eq!(one("\"admin\"").sees(), None);
        assert_eq!(one("\"jobs\"").sees().map(|tenant| &**tenant), Some("token:ci"));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_without_what_it_says() {
        let token = |name: &str, rest: &str| format!("[[token]]\nname = \"{name}\"\n{rest}\n");
        let good = format!("value = \"{VALUE}\"\nscopes = [\"read\"]");
        for (text, told) in [
            (format!("\n[[token]]\nname = \"x\"\nvalue = {VALUE}\n"), "line 4"),
            (token("a", "value = \"0123456789abcdef\"\nscopes = [\"root\"]"), "line 4"),
            (token("a", "token = \"0123456789abcdef\""), "line 3"),
            (token("", &good), "name"),
            (token("a", &good) + &token("a", &good), "token 2"),
            (token("a", "scopes = [\"read\"]"), "sha256 and value"),
            (token("a", "value = \"0123456789\"\nscopes = [\"read\"]"), "16 bytes"),
            (token("a", "sha256 = \"0123456789abcdef\"\nscopes = [\"read\"]"), "64"),
            (token("a", "value = \"0123456789abcdef\"\nscopes = []"), "no scopes"),
        ] {
            let error = tokens(&text).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
            assert!(!error.contains("0123456789"), "{error}");
        }
        assert_eq!(tokens("").unwrap(), []);
    }
}
