//! By whose fault the pipeline failed, in gRPC's words: the same for a layer that ran in the coordinator's process and for one that
//! ran on a worker.

use std::borrow::Cow;

use occy_pipeline::blob::BlobError;
use occy_pipeline::error::{Blame, Error};
use occy_pipeline::output::OutputError;
use occy_pipeline::registry::RegistryError;
use tonic::Code;

/// What a client is told of an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The gRPC code.
    pub code: Code,
    /// The ErrorInfo's reason.
    pub reason: Cow<'static, str>,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

impl Verdict {
    /// By whose fault it is; a registry's answer and a full disk say it more closely.
    pub fn of(error: &Error) -> Self {
        let verdict =
            |code, reason| Self { code, reason: Cow::Borrowed(reason), retryable: error.is_transient() };
        match registry(error) {
            Some(RegistryError::AddressRefused { .. } | RegistryError::PlainHttp { .. }) => {
                return verdict(Code::PermissionDenied, "NETWORK_NOT_ALLOWED");
            }
            Some(error) if matches!(error.status(), Some(401 | 403)) => {
                return verdict(Code::PermissionDenied, "REGISTRY_REFUSED");
            }
            Some(error) if error.is_not_found() => return verdict(Code::NotFound, "NOT_IN_REGISTRY"),
            _ => {}
        }
        if error.is_storage_full() {
            return Self { retryable: true, ..verdict(Code::ResourceExhausted, "STORAGE_FULL") };
        }
        match (error.blame(), innermost(error)) {
            (_, Error::Output(OutputError::BlobLost { .. })) => verdict(Code::Unavailable, "BLOB_LOST"),
            (Blame::Caller, error) if error.is_misuse() => verdict(Code::InvalidArgument, "MALFORMED"),
            (Blame::Caller, Error::Platform(_)) => verdict(Code::NotFound, "NO_SUCH_PLATFORM"),
            (Blame::Caller, Error::Unstated(_)) => verdict(Code::NotFound, "NO_PROVENANCE"),
            (Blame::Caller, Error::Blob(BlobError::Lent(_))) => {
                verdict(Code::FailedPrecondition, "NOT_POSSIBLE")
            }
            (Blame::Caller, Error::Registry(_) | Error::Blob(_)) => {
                verdict(Code::FailedPrecondition, "REGISTRY")
            }
            (
                Blame::Caller,
                Error::NotAnImage { .. }
                | Error::Foreign(_)
                | Error::Build(_)
                | Error::Signed { .. }
                | Error::Output(_),
            ) => verdict(Code::FailedPrecondition, "NOT_POSSIBLE"),
            (Blame::Caller, _) => verdict(Code::InvalidArgument, "INVALID"),
            (Blame::Image, _) => verdict(Code::FailedPrecondition, "IMAGE_BROKEN"),
            (Blame::Network, _) => verdict(Code::Unavailable, "NETWORK"),
            (Blame::Machine, _) => verdict(Code::Internal, "MACHINE"),
        }
    }
}

/// The registry's part in an error, where it has one.
pub fn registry(error: &Error) -> Option<&RegistryError> {
    match innermost(error) {
        Error::Registry(error) | Error::Blob(BlobError::Registry(error)) => Some(error),
        _ => None,
    }
}

fn innermost(error: &Error) -> &Error {
    match error {
        Error::Layer { source, .. } | Error::Copy { source, .. } => innermost(source),
        error => error,
    }
}
