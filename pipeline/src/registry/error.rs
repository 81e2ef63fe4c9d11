//! Why a registry did not do what it was asked, with the facts that a user or a retry needs.
//!
//! No secret gets in here: URLs are named by host alone, and what a registry says is cut and cleaned before it is kept.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::digest::Digest;

/// Bytes of an error's body that are read.
pub(super) const ERROR_BODY_CAP: usize = 1024 * 1024;
/// Characters of a registry's own message that are kept.
const MESSAGE_MAX: usize = 300;

/// What was asked of which registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The host as the user names it, with its port.
    pub host: String,
    /// The repository, where one was concerned.
    pub repository: Option<String>,
    /// What it was asked.
    pub operation: Operation,
}

/// What a registry was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// To say how it is spoken to.
    Ping,
    /// To hand out a token.
    FetchToken,
    /// To deliver the manifest of this tag or digest.
    GetManifest(String),
    /// To say whether it has the manifest of this tag or digest.
    HeadManifest(String),
    /// To store a manifest under this tag or digest.
    PutManifest(String),
    /// To delete the manifest of this tag or digest.
    DeleteManifest(String),
    /// To list what names this manifest as its subject.
    ListReferrers(Digest),
    /// To list the tags of a repository.
    ListTags,
    /// To list its repositories.
    ListRepositories,
    /// To deliver a blob.
    GetBlob(Digest),
    /// To say where a foreign layer is; the host that this is.
    GetForeign(Digest, String),
    /// To say whether it has a blob.
    HeadBlob(Digest),
    /// To share a blob from another of its repositories.
    MountBlob(Digest),
    /// To take a blob; the digest where it is known beforehand.
    UploadBlob(Option<Digest>),
}

/// Why a registry did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// It answered with a status that is not the one of success.
    #[error("registry returned {status} for {request}{}", Detail(code.as_deref(), message.as_deref()))]
    Status {
        /// What was asked.
        request: Box<Request>,
        /// The HTTP status.
        status: u16,
        /// The first error's code in the answer, as `MANIFEST_UNKNOWN`.
        code: Option<String>,
        /// The first error's message, cut and cleaned.
        message: Option<String>,
        /// Why credentials were not found, where they were looked for in vain.
        credentials: Option<String>,
        /// Whether the user had passed credentials for this registry.
        has_explicit_credentials: bool,
    },
    /// No connection came about.
    #[error("cannot connect to {peer}{}: {cause}", purpose(.peer, .request))]
    Connect {
        /// What was asked.
        request: Box<Request>,
        /// The host that was connected to, which may be another than the registry's.
        peer: String,
        /// What the system or TLS said.
        cause: String,
        /// What kind of failure it was.
        kind: ConnectFailure,
    },
    /// The connection broke in the middle.
    #[error("connection broke for {request}: {cause}")]
    Broken {
        /// What was asked.
        request: Box<Request>,
        /// What the system or the HTTP implementation said.
        cause: String,
    },
    /// Nothing came for too long.
    #[error("no answer within {} seconds for {request}", after.as_secs_f32())]
    Timeout {
        /// What was asked.
        request: Box<Request>,
        /// How long was waited.
        after: Duration,
    },
    /// It may not be asked for now: others who share its patience ask it too.
    #[error("did not get its turn for {request}: {reason}")]
    NoTurn {
        /// What was to be asked.
        request: Box<Request>,
        /// What it waited for.
        reason: String,
    },
    /// The registry named a host that must not be connected to.
    #[error("refused to connect to {peer} ({address}), which {request} named: not a public address")]
    AddressRefused {
        /// What was asked.
        request: Box<Request>,
        /// The host that the registry named.
        peer: String,
        /// What it resolved to.
        address: IpAddr,
    },
    /// The registry named a host that would have to be spoken to without TLS.
    #[error("refused to speak plain HTTP to {peer}, which {request} named")]
    PlainHttp {
        /// What was asked.
        request: Box<Request>,
        /// The host that the registry named.
        peer: String,
    },
    /// The answer breaks the distribution protocol.
    #[error("unusable answer for {request}: {problem}")]
    Protocol {
        /// What was asked.
        request: Box<Request>,
        /// What is wrong with the answer.
        problem: String,
    },
    /// An upload session ended before its blob was stored.
    #[error("upload session lost for {request}: {problem}")]
    SessionLost {
        /// What was asked.
        request: Box<Request>,
        /// How it ended.
        problem: String,
    },
    /// An answer is larger than what it may be.
    #[error("answer for {request} is larger than {cap} bytes")]
    TooLarge {
        /// What was asked.
        request: Box<Request>,
        /// The largest that is read.
        cap: u64,
    },
    /// A manifest is not the one that was asked for or announced.
    #[error("digest mismatch for {request}: expected {expected}, computed {computed}")]
    Digest {
        /// What was asked.
        request: Box<Request>,
        /// What the request or the answer's header says.
        expected: Digest,
        /// What the bytes hash to.
        computed: Digest,
    },
    /// An option cannot be used: a certificate that cannot be read, and the like.
    #[error("cannot use {what}: {problem}")]
    Configuration {
        /// The option and its value.
        what: String,
        /// Why not.
        problem: String,
    },
}

/// What kind of failure kept a connection from coming about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectFailure {
    /// The network or the peer: it may pass.
    Network,
    /// The name does not exist.
    UnknownHost,
    /// The peer's certificate, or its choice of TLS parameters, was not accepted.
    Tls,
    /// The peer wants a certificate of ours, or another than it got.
    ClientCertificate,
    /// The peer does not speak TLS.
    NotTls,
}

impl RegistryError {
    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => is_transient_status(*status),
            Self::Connect { kind: ConnectFailure::Network, .. }
            | Self::Broken { .. }
            | Self::Timeout { .. }
            | Self::NoTurn { .. }
            | Self::SessionLost { .. } => true,
            Self::Connect {
                kind:
                    ConnectFailure::UnknownHost
                    | ConnectFailure::Tls
                    | ConnectFailure::ClientCertificate
                    | ConnectFailure::NotTls,
                ..
            }
            | Self::AddressRefused { .. }
            | Self::PlainHttp { .. }
            | Self::Protocol { .. }
            | Self::TooLarge { .. }
            | Self::Digest { .. }
            | Self::Configuration { .. } => false,
        }
    }

    /// The HTTP status, where the registry's answer was the error.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// What was asked of which registry.
    pub fn request(&self) -> Option<&Request> {
        match self {
            Self::Status { request, .. }
            | Self::Connect { request, .. }
            | Self::Broken { request, .. }
            | Self::Timeout { request, .. }
            | Self::NoTurn { request, .. }
            | Self::AddressRefused { request, .. }
            | Self::PlainHttp { request, .. }
            | Self::Protocol { request, .. }
            | Self::SessionLost { request, .. }
            | Self::TooLarge { request, .. }
            | Self::Digest { request, .. } => Some(request),
            Self::Configuration { .. } => None,
        }
    }

    /// Whether the registry says that what was asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(404)
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        if let Some(host) = self.request().and_then(Request::host_in_vain) {
            return Some(format!(
                "if {host} is a registry, name an image in it: registry://{host}/IMAGE:TAG"
            ));
        }
        match self {
            // It is another host that answered, and it is sent no credentials.
            Self::Status { request, .. } if matches!(request.operation, Operation::GetForeign(..)) => None,
            Self::Status { request, status: 401 | 403, credentials: Some(problem), .. } => {
                Some(format!("no credentials were sent to {}: {problem}", request.host))
            }
            Self::Status { request, status: 401, has_explicit_credentials: true, .. } => {
                Some(format!("{} rejected the credentials that were passed", request.host))
            }
            // Right credentials without the right to do this are answered alike, so that the hint leaves room for both.
            Self::Status { request, status: 403, has_explicit_credentials: true, .. } => Some(format!(
                "{} rejected the credentials that were passed, or their account may lack the right to do this",
                request.host
            )),
            Self::Status { request, status: 401, .. } => {
                Some(format!("log in with `docker login {}`, or pass --username", request.host))
            }
            Self::Status { status: 403, .. } => {
                Some("the account that was used may lack the right to do this".to_owned())
            }
            Self::Status { request, status: 405, .. }
                if matches!(request.operation, Operation::DeleteManifest(_)) =>
            {
                Some(format!(
                    "{} lets nobody delete manifests; docker-registry does where storage.delete.enabled is set",
                    request.host
                ))
            }
            Self::Status { request, status: 404 | 405, .. }
                if request.operation == Operation::ListRepositories =>
            {
                Some(format!("{} keeps no list of its repositories; name one: HOST/IMAGE", request.host))
            }
            Self::Status { request, status: 404, .. } => match &request.operation {
                Operation::ListTags => Some("check the spelling of the repository".to_owned()),
                Operation::GetManifest(reference) => {
                    Some(format!("check the spelling of the repository and of {reference:?}"))
                }
                _ => None,
            },
            Self::Connect { peer, kind: ConnectFailure::NotTls, .. } => {
                Some(format!("it seems to speak plain HTTP; if that is right, pass --insecure {peer}"))
            }
            Self::Connect { peer, kind: ConnectFailure::Tls, .. } => Some(format!(
                "pass its certificate authority with --ca-cert, or --insecure {peer} to do without verification"
            )),
            Self::Connect { peer, kind: ConnectFailure::ClientCertificate, .. } => {
                Some(format!("pass a certificate that {peer} accepts with --client-cert and --client-key"))
            }
            Self::AddressRefused { address, .. } => {
                Some(format!("if this is right, pass --allow-network {address}"))
            }
            Self::PlainHttp { peer, .. } => Some(format!("if this is right, pass --insecure {peer}")),
            _ => None,
        }
    }
}

impl Request {
    /// What was perhaps meant for a registry's host and port, and was taken for an image on docker.io and its tag.
    fn host_in_vain(&self) -> Option<String> {
        let name =
            self.repository.as_deref().filter(|_| self.host == "docker.io")?.strip_prefix("library/")?;
        let Operation::GetManifest(tag) = &self.operation else { return None };
        tag.parse::<u16>().is_ok_and(|port| port >= 1000).then(|| format!("{name}:{tag}"))
    }
}

/// What a connection was for, where that is more than to find out whether anybody answers there.
fn purpose(peer: &str, request: &Request) -> String {
    let is_ping = matches!(request.operation, Operation::Ping) && request.host == peer;
    if is_ping { String::new() } else { format!(" for {request}") }
}

/// Statuses that say "not now".
pub(super) fn is_transient_status(status: u16) -> bool {
    // 501 says that the method will never be known.
    matches!(status, 408 | 425 | 429) || (500..600).contains(&status) && status != 501
}

struct Detail<'a>(Option<&'a str>, Option<&'a str>);

impl fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [self.0, self.1].into_iter().flatten() {
            write!(f, ": {part}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.host)?;
        if let Some(repository) = &self.repository {
            write!(f, "/{repository}")?;
        }
        write!(f, " ({})", self.operation)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ping => f.write_str("ping"),
            Self::FetchToken => f.write_str("fetch token"),
            Self::GetManifest(reference) => write!(f, "get manifest {reference}"),
            Self::HeadManifest(reference) => write!(f, "check manifest {reference}"),
            Self::PutManifest(reference) => write!(f, "put manifest {reference}"),
            Self::DeleteManifest(reference) => write!(f, "delete manifest {reference}"),
            Self::ListReferrers(digest) => write!(f, "list referrers of {digest}"),
            Self::ListTags => f.write_str("list tags"),
            Self::ListRepositories => f.write_str("list repositories"),
            Self::GetBlob(digest) => write!(f, "get blob {digest}"),
            Self::GetForeign(digest, host) => write!(f, "get foreign layer {digest} from {host}"),
            Self::HeadBlob(digest) => write!(f, "check blob {digest}"),
            Self::MountBlob(digest) => write!(f, "mount blob {digest}"),
            Self::UploadBlob(Some(digest)) => write!(f, "upload blob {digest}"),
            Self::UploadBlob(None) => f.write_str("upload blob"),
        }
    }
}

/// The first error's code and message in an error's body (distribution-spec, "Error Codes").
pub(super) fn error_detail(body: &[u8]) -> (Option<String>, Option<String>) {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        code: Option<serde_json::Value>,
        message: Option<String>,
    }
    let Ok(errors) = serde_json::from_slice::<Errors>(body) else {
        // A proxy's page of HTML says less than the status.
        let text = std::str::from_utf8(body).unwrap_or("");
        let text = clean(text);
        return (None, (!text.is_empty() && !text.starts_with('<')).then_some(text));
    };
    let Some(first) = errors.errors.into_iter().next() else {
        return (None, None);
    };
    let code = first.code.map(|code| match code {
        serde_json::Value::String(code) => clean(&code),
        other => clean(&other.to_string()),
    });
    (code, first.message.as_deref().map(clean).filter(|message| !message.is_empty()))
}

/// Text from outside, fit for one line of a terminal.
pub(super) fn clean(text: &str) -> String {
    let mut cleaned = String::new();
    for (index, c) in text.trim().chars().enumerate() {
        if index == MESSAGE_MAX {
            cleaned.push('…');
            break;
        }
        cleaned.push(if c.is_control() { ' ' } else { c });
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Box<Request> {
        Box::new(Request {
            host: "localhost:5000".to_owned(),
            repository: Some("app".to_owned()),
            operation: Operation::GetManifest("latest".to_owned()),
        })
    }

    fn status(status: u16, body: &[u8]) -> RegistryError {
        let (code, message) = error_detail(body);
        RegistryError::Status {
            request: request(),
            status,
            code,
            message,
            credentials: None,
            has_explicit_credentials: false,
        }
    }

    #[test]
    fn errors_say_what_was_asked_and_what_was_answered() {
        let error = status(404, br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#);
        assert_eq!(
            error.to_string(),
            "registry returned 404 for localhost:5000/app (get manifest latest): MANIFEST_UNKNOWN: manifest unknown"
        );
        assert!(error.is_not_found() && !error.is_transient());
    }

    #[test]
    fn what_a_registry_says_is_cut_and_cleaned() {
        let long = format!(r#"{{"errors":[{{"code":"A","message":"{}"}}]}}"#, "x".repeat(5000));
        assert!(status(500, long.as_bytes()).to_string().len() < 500);
        assert_eq!(status(500, b"\x1b[31mred\r\n").to_string().matches(char::is_control).count(), 0);
        assert!(!status(502, b"<html>").to_string().contains("html"));
    }

    #[test]
    fn a_refused_user_is_told_to_log_in() {
        let hint = status(401, b"").hint().unwrap();
        assert_eq!(hint, "log in with `docker login localhost:5000`, or pass --username");
    }

    #[test]
    fn a_port_that_was_taken_for_a_tag_is_told() {
        let mut error = status(401, b"");
        let RegistryError::Status { request, .. } = &mut error else { unreachable!() };
        request.host = "docker.io".to_owned();
        request.repository = Some("library/registry".to_owned());
        for (tag, told) in [("5000", true), ("16", false), ("20250101", false), ("latest", false)] {
            let RegistryError::Status { request, .. } = &mut error else { unreachable!() };
            request.operation = Operation::GetManifest(tag.to_owned());
            assert_eq!(
                error.hint().unwrap().contains(&format!("registry://registry:{tag}/IMAGE")),
                told,
                "{tag}"
            );
        }
    }

    #[test]
    fn only_statuses_that_may_pass_are_transient() {
        for (code, transient) in
            [(429, true), (500, true), (503, true), (501, false), (401, false), (413, false)]
        {
            assert_eq!(status(code, b"").is_transient(), transient, "{code}");
        }
    }
}
