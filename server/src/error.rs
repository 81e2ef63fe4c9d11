//! Why a call or a job failed, and what a client is told of it: one match from our errors to gRPC's codes.
//!
//! The details are google.rpc's: an ErrorInfo always, a BadRequest where a field is at fault, and a RetryInfo exactly where the
//! same request may succeed later.

use std::borrow::Cow;
use std::time::Duration;

use occy_pipeline::blob::BlobError;
use occy_pipeline::error::Error;
use occy_pipeline::wire::{WireError, convert};
use occy_proto::v1::{JobError, TaskError};
use occy_worker::verdict::{Verdict, registry};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::access::Scope;
use crate::credentials::SealError;
use crate::engine::EngineError;
use crate::engine::jetstream::JetStreamError;

/// The domain of every `google.rpc.ErrorInfo` of ours.
const DOMAIN: &str = "occystrap";
/// When a client had better try again what failed for a passing reason.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Bytes of a message that a client gets: headers are limited, and a message may quote what a stranger said.
const MESSAGE_MAX: usize = 2048;

/// Why a call or a job failed.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The pipeline did.
    #[error(transparent)]
    Pipeline(Error),
    /// The pipeline did, on a worker.
    #[error(transparent)]
    Remote(RemoteError),
    /// A layer failed by its workers' fault, as often as it may.
    #[error("{} attempts at it failed: {}", reasons.len(), reasons.join("; "))]
    Attempts {
        /// Of each attempt: the worker, and what became of it.
        reasons: Vec<String>,
    },
    /// No worker that could do the work has come in time.
    #[error("{missing}, and none came within {} seconds that does", after.as_secs())]
    Unoffered {
        /// What nobody offers.
        missing: String,
        /// How long was waited.
        after: Duration,
    },
    /// Layers were made by versions of filters that no worker has any more, and others are to be made.
    #[error("the workers have gone that have the versions of filters with which it was begun")]
    VersionsGone,
    /// A field of the request cannot be used.
    #[error("{field}: {problem}")]
    Field {
        /// Its name.
        field: &'static str,
        /// Why not.
        problem: String,
    },
    /// The request names what the coordinator's operator does not allow.
    #[error("{what} is not allowed by this coordinator")]
    Forbidden {
        /// What it names.
        what: String,
        /// How its operator could allow it.
        hint: &'static str,
    },
    /// The caller has not said who it is, where that is needed.
    #[error("the call is refused: {problem}")]
    Unauthenticated {
        /// Why not.
        problem: &'static str,
    },
    /// A job brings credentials, and nothing can seal them.
    #[error("this coordinator keeps no credentials")]
    NoSecretKey,
    /// They cannot be sealed, or opened again.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The caller may not do that.
    #[error("the token does not have the scope {0}")]
    ScopeMissing(Scope),
    /// Elements of an image came in an order or shape that they cannot have.
    #[error("the image on the stream cannot be used: {0}")]
    Elements(String),
    /// The stream of elements ended before its image did.
    #[error("the stream ended before the image did")]
    Truncated,
    /// No such job.
    #[error("there is no job {0:?}")]
    NoSuchJob(String),
    /// No such schedule.
    #[error("there is no schedule {0:?}")]
    NoSuchSchedule(String),
    /// Others have changed something, whenever it was to be changed.
    #[error("{what} is being changed by too many others")]
    Contended {
        /// What.
        what: &'static str,
    },
    /// An idempotency key was used before, for something else.
    #[error("the idempotency key {0:?} was used for another job")]
    KeyReused(String),
    /// The caller has seen events that did not happen.
    #[error("job {job} has {last} events, fewer than {after}")]
    BeyondEvents {
        /// Whose events.
        job: String,
        /// How many there are.
        last: u64,
        /// How many the caller has.
        after: u64,
    },
    /// There is as much of something as there may be.
    #[error("too many {what}: at most {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// Something is too large to be sent or stored.
    #[error("{what} would have more than {limit} bytes")]
    TooLarge {
        /// What.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The caller does not read any more.
    #[error("the caller is gone")]
    CallerGone,
    /// The caller's own deadline.
    #[error("the deadline has passed")]
    Deadline,
    /// The coordinator is being stopped.
    #[error("the coordinator is shutting down")]
    Draining,
    /// The job was cancelled or ended meanwhile, or has another owner: whoever runs it stops.
    #[error("the job has ended")]
    JobEnded,
    /// What is known of jobs could not be read or written.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A part of the coordinator panicked.
    #[error("the coordinator failed: {0}")]
    Panicked(String),
}

/// What a worker says of a layer that failed as it would anywhere.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    /// What a client is told.
    pub verdict: Verdict,
    /// For people.
    pub message: String,
    /// What can be done about it, where the worker knows.
    pub hint: Option<String>,
    /// The registry's host, where its answer was the error.
    pub registry: Option<String>,
    /// Its HTTP status, where there was one.
    pub http_status: Option<u32>,
}

impl From<TaskError> for RemoteError {
    fn from(error: TaskError) -> Self {
        let named = |text: String| Some(text).filter(|text| !text.is_empty());
        let code = match Code::from_i32(error.code) {
            // A worker that cannot say how it failed.
            Code::Ok => Code::Internal,
            code => code,
        };
        Self {
            verdict: Verdict { code, reason: error.reason.into(), retryable: error.retryable },
            message: error.message,
            hint: named(error.hint),
            registry: named(error.registry),
            http_status: Some(error.http_status).filter(|&status| status != 0),
        }
    }
}

impl From<Error> for ServiceError {
    /// An error of ours that went through the pipeline is ours again.
    fn from(error: Error) -> Self {
        match error {
            Error::Host(inner) => match inner.downcast::<Self>() {
                Ok(own) => *own,
                Err(inner) => match inner.downcast::<WireError>() {
                    Ok(error) => Self::from(*error),
                    Err(inner) => Self::Pipeline(Error::Host(inner)),
                },
            },
            // Told while bytes went by.
            Error::Blob(BlobError::Host(inner)) if inner.is::<WireError>() || inner.is::<Self>() => {
                Self::from(Error::Host(inner))
            }
            Error::Layer { action, number, total, label, source } if matches!(*source, Error::Host(_)) => {
                match Self::from(*source) {
                    // Told as if the layer had run here.
                    Self::Remote(error) => {
                        let source = Box::new(Error::Host(Box::new(error.clone())));
                        let message = Error::Layer { action, number, total, label, source }.to_string();
                        Self::Remote(RemoteError { message, ..error })
                    }
                    own => own,
                }
            }
            error => Self::Pipeline(error),
        }
    }
}

impl From<WireError> for ServiceError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Elements(problem) => Self::Elements(problem),
            WireError::TooLarge { what, limit } => Self::TooLarge { what, limit },
            // It has one other cause: whoever read is gone.
            _ => Self::CallerGone,
        }
    }
}

impl From<ServiceError> for Error {
    /// An error of ours on its way through the pipeline.
    fn from(error: ServiceError) -> Self {
        match error {
            ServiceError::Pipeline(error) => error,
            own => Self::Host(Box::new(own)),
        }
    }
}

impl ServiceError {
    /// What a client is told.
    pub fn verdict(&self) -> Verdict {
        let verdict = |code, reason| Verdict {
            code,
            reason: Cow::Borrowed(reason),
            retryable: code == Code::Unavailable,
        };
        match self {
            Self::Pipeline(error) => Verdict::of(error),
            Self::Remote(error) => error.verdict.clone(),
            Self::Attempts { .. } => verdict(Code::Internal, "ATTEMPTS_EXHAUSTED"),
            Self::Unoffered { .. } => verdict(Code::FailedPrecondition, "NOT_OFFERED"),
            Self::VersionsGone => verdict(Code::Unavailable, "FILTER_VERSIONS_GONE"),
            Self::Field { .. } => verdict(Code::InvalidArgument, "INVALID_FIELD"),
            Self::Forbidden { .. } => verdict(Code::PermissionDenied, "NOT_ALLOWED_HERE"),
            Self::Unauthenticated { .. } => verdict(Code::Unauthenticated, "UNAUTHENTICATED"),
            Self::NoSecretKey => verdict(Code::FailedPrecondition, "NO_SECRET_KEY"),
            Self::Seal(SealError::KeyGone(_)) => verdict(Code::FailedPrecondition, "SECRET_KEY_GONE"),
            Self::Seal(_) => verdict(Code::Internal, "SEAL"),
            Self::ScopeMissing(_) => verdict(Code::PermissionDenied, "SCOPE_MISSING"),
            Self::Elements(_) => verdict(Code::InvalidArgument, "INVALID_ELEMENTS"),
            Self::Truncated => verdict(Code::Aborted, "STREAM_TRUNCATED"),
            Self::NoSuchJob(_) => verdict(Code::NotFound, "NO_SUCH_JOB"),
            Self::NoSuchSchedule(_) => verdict(Code::NotFound, "NO_SUCH_SCHEDULE"),
            Self::Contended { .. } => verdict(Code::Unavailable, "CONTENDED"),
            Self::KeyReused(_) => verdict(Code::AlreadyExists, "IDEMPOTENCY_KEY_REUSED"),
            Self::BeyondEvents { .. } => verdict(Code::OutOfRange, "BEYOND_EVENTS"),
            Self::TooMany { .. } => {
                Verdict { retryable: true, ..verdict(Code::ResourceExhausted, "TOO_MANY") }
            }
            Self::TooLarge { .. } => verdict(Code::ResourceExhausted, "TOO_LARGE"),
            Self::CallerGone | Self::JobEnded => verdict(Code::Cancelled, "CANCELLED"),
            Self::Deadline => verdict(Code::DeadlineExceeded, "DEADLINE"),
            Self::Draining => verdict(Code::Unavailable, "SHUTTING_DOWN"),
            Self::Engine(EngineError::Store(error)) if error.is_full() => {
                Verdict { retryable: true, ..verdict(Code::ResourceExhausted, "STORAGE_FULL") }
            }
            Self::Engine(EngineError::Store(error)) if error.is_of_another() => {
                verdict(Code::Unavailable, "STORE")
            }
            Self::Engine(EngineError::Store(_)) => verdict(Code::Internal, "STORE"),
            Self::Engine(EngineError::JetStream(error)) => match error {
                JetStreamError::Unreachable { .. } | JetStreamError::Connect { .. } => {
                    verdict(Code::Unavailable, "ENGINE_UNAVAILABLE")
                }
                JetStreamError::TooLarge { .. } => verdict(Code::ResourceExhausted, "TOO_LARGE"),
                JetStreamError::Uri { .. }
                | JetStreamError::Credentials { .. }
                | JetStreamError::Server { .. }
                | JetStreamError::Bucket { .. }
                | JetStreamError::Foreign(_) => verdict(Code::Internal, "ENGINE"),
            },
            Self::Panicked(_) => verdict(Code::Internal, "PANICKED"),
        }
    }

    /// Whether what is known of jobs could not be read or written at the moment, which is no job's fault.
    pub fn is_of_engine(&self) -> bool {
        matches!(
            self,
            Self::Engine(EngineError::Store(_) | EngineError::JetStream(JetStreamError::Unreachable { .. }))
        )
    }

    /// Whether a job that ends so is begun again, by whoever can: there is nothing wrong with it.
    pub fn begins_again(&self) -> bool {
        self.is_of_engine() || matches!(self, Self::VersionsGone)
    }

    /// What can be done about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Pipeline(error) => error.hint(),
            Self::Remote(error) => error.hint.clone(),
            Self::Forbidden { hint, .. } => Some((*hint).to_owned()),
            Self::NoSecretKey => {
                Some("its operator can give it a key to seal them with: --secret-key-file".to_owned())
            }
            Self::Unauthenticated { .. } => Some(
                "send a token that its operator has given you as `authorization: Bearer TOKEN`".to_owned(),
            ),
            _ => None,
        }
    }

    /// As the status of a call.
    pub fn status(&self) -> Status {
        let verdict = self.verdict();
        let mut details = ErrorDetails::new();
        let mut metadata = std::collections::HashMap::new();
        if let Some(hint) = self.hint() {
            metadata.insert("hint".to_owned(), hint);
        }
        if let Self::Pipeline(error) = self
            && let Some(error) = registry(error)
        {
            metadata.extend(error.status().map(|status| ("http_status".to_owned(), status.to_string())));
            metadata.extend(error.request().map(|request| ("registry".to_owned(), request.host.clone())));
        }
        if let Self::Remote(error) = self {
            metadata.extend(error.http_status.map(|status| ("http_status".to_owned(), status.to_string())));
            metadata.extend(error.registry.clone().map(|host| ("registry".to_owned(), host)));
        }
        details.set_error_info(verdict.reason.as_ref(), DOMAIN, metadata);
        if let Self::Field { field, problem } = self {
            details.add_bad_request_violation(*field, problem.clone());
        }
        if verdict.retryable {
            details.set_retry_info(Some(RETRY_AFTER));
        }
        Status::with_error_details(verdict.code, self.message(), details)
    }

    /// As the end of a job.
    pub fn job_error(&self) -> JobError {
        let verdict = self.verdict();
        JobError {
            code: verdict.code as i32,
            message: self.message(),
            hint: self.hint().unwrap_or_default(),
            reason: verdict.reason.into_owned(),
            retryable: verdict.retryable,
        }
    }

    fn message(&self) -> String {
        let message = self.to_string();
        match convert::split(&message, MESSAGE_MAX) {
            (_, "") => message,
            (start, _) => format!("{start}…"),
        }
    }
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        error.status()
    }
}

#[cfg(test)]
mod tests {
    use occy_pipeline::uri::UriError;

    use super::*;

    #[test]
    fn an_error_of_ours_comes_back_out_of_the_pipeline() {
        let through = Error::from(ServiceError::CallerGone);
        let nested = Error::Layer {
            action: "read",
            number: 1,
            total: 1,
            label: String::new(),
            source: Box::new(through),
        };
        assert!(matches!(ServiceError::from(nested), ServiceError::CallerGone));
    }

    #[test]
    fn what_may_be_retried_says_when() {
        for (error, code, retryable) in [
            (ServiceError::Draining, Code::Unavailable, true),
            (ServiceError::TooMany { what: "jobs", limit: 1 }, Code::ResourceExhausted, true),
            (ServiceError::Truncated, Code::Aborted, false),
            (Error::from(UriError::NoScheme("x".to_owned())).into(), Code::InvalidArgument, false),
        ] {
            let status = error.status();
            assert_eq!(status.code(), code);
            let details = status.get_error_details();
            assert_eq!(details.retry_info().is_some(), retryable, "{error}");
            assert_eq!(details.error_info().unwrap().domain, DOMAIN);
        }
    }
}
