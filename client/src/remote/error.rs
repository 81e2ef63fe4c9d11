//! What a coordinator says when something fails, as the same failure is told without one.

use std::fmt;

use occy_pipeline::error::Error;
use occy_proto::v1::JobError;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// A call that failed.
#[derive(Debug)]
pub(crate) struct RemoteError {
    /// Whose call it was.
    url: String,
    status: Status,
    reason: Option<String>,
    hint: Option<String>,
}

impl std::error::Error for RemoteError {}

impl RemoteError {
    pub(crate) fn new(url: &str, status: Status) -> Self {
        let info = status.get_details_error_info().filter(|info| info.domain == "occystrap");
        let (reason, hint) = match info {
            Some(mut info) => (Some(info.reason), info.metadata.remove("hint")),
            None => (None, None),
        };
        Self { url: url.to_owned(), status, reason, hint }
    }

    /// A stream that ended where something had to follow.
    pub(crate) fn truncated(url: &str) -> Self {
        Self::new(url, Status::unavailable("its answer has no end"))
    }

    /// An error as it is to be told: the coordinator's own, if that is what went through the pipeline here.
    pub(crate) fn told(error: Error) -> anyhow::Error {
        match Self::within(error) {
            Ok(own) => anyhow::Error::from(*own),
            Err(error) => error.into(),
        }
    }

    /// Why a job failed.
    pub(crate) fn of_job(url: &str, error: JobError) -> Self {
        let JobError { code, message, hint, reason, retryable: _ } = error;
        let hint = Some(hint).filter(|hint| !hint.is_empty());
        Self { url: url.to_owned(), status: Status::new(code.into(), message), reason: Some(reason), hint }
    }

    fn within(error: Error) -> Result<Box<Self>, Error> {
        match error {
            Error::Host(inner) => inner.downcast::<Self>().map_err(Error::Host),
            Error::Layer { action, number, total, label, source } => match Self::within(*source) {
                Ok(own) => Ok(own),
                Err(source) => Err(Error::Layer { action, number, total, label, source: Box::new(source) }),
            },
            error => Err(error),
        }
    }

    /// Whether the coordinator itself said it, and not the way to it.
    fn is_answer(&self) -> bool {
        self.reason.is_some()
    }

    /// Whether the same command would be refused without a coordinator because it is written wrongly.
    pub(crate) fn is_misuse(&self) -> bool {
        matches!(self.reason.as_deref(), Some("MALFORMED" | "INVALID_FIELD"))
    }

    /// Whether the stream of elements ended too early: whoever sent them has the reason.
    pub(crate) fn is_truncated_upload(&self) -> bool {
        self.reason.as_deref() == Some("STREAM_TRUNCATED")
    }

    /// Whether the connection is gone, or the coordinator is about to be: a later one may answer.
    pub(crate) fn is_lost(&self) -> bool {
        match self.status.code() {
            Code::Unavailable => true,
            // What tonic makes of a connection that breaks.
            Code::Unknown | Code::Internal | Code::Cancelled => !self.is_answer(),
            _ => false,
        }
    }

    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        if self.reason.as_deref() == Some("NETWORK_NOT_ALLOWED") {
            // Its own hint is for whoever has started what refused.
            return Some(
                "if this is right, the coordinator's operator can allow it: --allow-network of occy-server, and of its workers"
                    .to_owned(),
            );
        }
        if let Some(hint) = &self.hint {
            return Some(hint.clone());
        }
        match self.status.code() {
            Code::Unauthenticated => {
                Some("pass a token that the coordinator knows with --token-file".to_owned())
            }
            Code::Unimplemented => Some("the coordinator may be older than this occyctl".to_owned()),
            _ if self.is_lost() => Some(
                "the destination is as it was before, or complete; the same command may be run again"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.status.message();
        match self.status.code() {
            _ if self.is_answer() => f.write_str(message),
            _ if self.is_lost() => write!(f, "lost the coordinator at {}: {message}", self.url),
            code => write!(f, "the coordinator at {}: {code}: {message}", self.url),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn answered(reason: &str) -> RemoteError {
        let hint = HashMap::from([("hint".to_owned(), "do it".to_owned())]);
        let details = ErrorDetails::with_error_info(reason, "occystrap", hint);
        RemoteError::new("http://x", Status::with_error_details(Code::InvalidArgument, "no", details))
    }

    #[test]
    fn what_the_coordinator_says_is_told_as_it_is() {
        let error = answered("MALFORMED");
        assert_eq!((error.to_string().as_str(), error.hint().as_deref()), ("no", Some("do it")));
        assert!(error.is_misuse() && !error.is_lost());
    }

    #[test]
    fn what_the_way_to_it_says_names_it() {
        let error = RemoteError::new("http://x", Status::unknown("transport error"));
        assert!(error.is_lost() && error.to_string().contains("http://x"));
        assert!(error.hint().is_some());
    }

    #[test]
    fn it_is_found_within_the_error_of_a_layer() {
        let host = Error::Host(Box::new(answered("IMAGE_BROKEN")));
        let layer = Error::Layer {
            action: "push",
            number: 1,
            total: 1,
            label: String::new(),
            source: Box::new(host),
        };
        assert_eq!(RemoteError::told(layer).downcast::<RemoteError>().unwrap().to_string(), "no");
    }
}
