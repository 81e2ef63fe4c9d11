//! What fails at somebody else's, who lends a layout: told here as it would be told there.

use crate::blob::BlobError;
use crate::error::{Blame, Error};

/// Why something could not be done with what is lent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LentError {
    /// For people.
    pub message: String,
    /// What can be done about it, where that is known.
    pub hint: Option<String>,
    /// What kind of failure it is.
    pub fault: LentFault,
}

/// By what something fails with what is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LentFault {
    /// There is no such blob.
    Missing,
    /// A blob is not what its digest says, or the layout is none.
    Broken,
    /// It is none that this could be done with.
    Refused,
    /// A disk or a file.
    Machine,
    /// The disk is full.
    Full,
}

impl LentError {
    /// An error, for somebody else.
    pub fn of(error: &Error) -> Self {
        let fault = match error.blame() {
            _ if error.is_missing_blob() => LentFault::Missing,
            _ if error.is_storage_full() => LentFault::Full,
            Blame::Image => LentFault::Broken,
            Blame::Caller => LentFault::Refused,
            Blame::Network | Blame::Machine => LentFault::Machine,
        };
        Self { message: error.to_string(), hint: error.hint(), fault }
    }

    /// Whose the error is.
    pub fn blame(&self) -> Blame {
        match self.fault {
            LentFault::Missing | LentFault::Broken => Blame::Image,
            LentFault::Refused => Blame::Caller,
            LentFault::Machine | LentFault::Full => Blame::Machine,
        }
    }
}

impl From<LentError> for Error {
    fn from(error: LentError) -> Self {
        Self::Blob(BlobError::Lent(error))
    }
}
