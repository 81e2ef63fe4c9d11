//! Images as the service's API has them: the only place in the pipeline that names the messages of `occy/v1`, used by both ends of
//! a stream.
//!
//! | what | where |
//! |---|---|
//! | an image as elements | [`output`] |
//! | what stands before the layers, out of its elements | [`head`] |
//! | small documents in pieces | [`document`] |
//! | values that stand in both | [`convert`] |
//! | images of a mirror, and what came of them | [`mirror`] |
//! | layouts that one side lends to the other | [`lend`] |
//!
//! Layers that come are no business of this module: a coordinator keeps them until the image is complete, a client hands them on.

pub mod convert;
pub mod document;
pub mod head;
pub mod lend;
pub mod mirror;
pub mod output;

/// Bytes of data in one message.
pub const CHUNK: usize = 256 * 1024;

/// Why an image cannot be sent, or used as it came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The other side does not read any more; its own error says why.
    #[error("the other side of the stream is gone")]
    Gone,
    /// Elements came in an order or shape that they cannot have.
    #[error("the image on the stream cannot be used: {0}")]
    Elements(String),
    /// Something is larger than it may be.
    #[error("{what} would have more than {limit} bytes")]
    TooLarge {
        /// What.
        what: &'static str,
        /// In bytes.
        limit: usize,
    },
}

impl WireError {
    /// Elements that cannot be used.
    pub fn elements(problem: impl Into<String>) -> Self {
        Self::Elements(problem.into())
    }
}

impl From<WireError> for crate::error::Error {
    fn from(error: WireError) -> Self {
        Self::Host(Box::new(error))
    }
}
