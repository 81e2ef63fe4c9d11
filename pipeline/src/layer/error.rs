//! Why a layer could not be passed on.

use std::io;

use crate::blob::BlobError;
use crate::codec::CodecError;
use crate::filter::FilterError;
use crate::tar::{TarError, encode};

/// Why a layer could not be passed on. Except for `Output` and `Spool` it is the layer that is at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The tar is corrupt, hostile or incomplete, or its bytes did not come ([`TarError::Read`]).
    #[error("{source} (member {member}{})", near(.path))]
    Tar {
        /// How many members were read before.
        member: u64,
        /// The path of that member or the one before.
        path: String,
        /// What is wrong, and at which offset.
        source: TarError,
    },
    /// A filter gave up.
    #[error("{source} (at offset {offset})")]
    Filter {
        /// Of the member at which it did.
        offset: u64,
        /// Its own words.
        source: FilterError,
    },
    /// An edited member cannot be written.
    #[error("cannot write {path:?}: {source}")]
    Encode {
        /// The member's.
        path: String,
        /// Why.
        source: encode::TooManyRecords,
    },
    /// Sparse files would grow by more than [`Limits::holes`].
    #[error("the sparse file {path:?} and those before it have more than {limit} bytes of holes")]
    Holes {
        /// The member's.
        path: String,
        /// The limit.
        limit: u64,
    },
    /// More data would have to be kept aside than [`Limits::kept`].
    #[error("the hard link target {path:?} and those before it have more than {limit} bytes")]
    Kept {
        /// The member's.
        path: String,
        /// The limit.
        limit: u64,
    },
    /// The output did not take the bytes.
    #[error("cannot write the layer: {0}")]
    Output(#[source] io::Error),
    /// The temporary file failed.
    #[error("cannot keep data of a hard link's target aside: {0}")]
    Spool(#[source] io::Error),
    /// Filters kept asking for another pass.
    #[error("the filters did not settle after {passes} passes over the layer")]
    Restarts {
        /// How many there were.
        passes: usize,
    },
}

impl From<TarError> for LayerError {
    fn from(source: TarError) -> Self {
        Self::Tar { member: 0, path: String::new(), source }
    }
}

impl LayerError {
    /// Bytes of a tar that did not come, outside of a pass.
    pub(crate) fn read(offset: u64, source: io::Error) -> Self {
        TarError::Read { offset, source }.into()
    }

    /// What was wrong with the blob that the tar came from, or with the place that it went to; otherwise the error itself.
    pub(crate) fn into_blob_error(self) -> Result<BlobError, Self> {
        match self {
            Self::Tar { source: TarError::Read { source, .. }, .. } | Self::Output(source)
                if source.get_ref().is_some_and(|error| error.is::<BlobError>()) =>
            {
                let inner = source.into_inner().expect("it was there just now");
                Ok(*inner.downcast().expect("its type was found right"))
            }
            other => Err(other),
        }
    }

    /// The caller's limit, where the layer went beyond it.
    pub(crate) fn too_large(&self) -> Option<u64> {
        let Self::Tar { source: TarError::Read { source, .. }, .. } = self else { return None };
        match CodecError::inside(source)? {
            CodecError::TooLarge { limit, .. } => Some(*limit),
            _ => None,
        }
    }

    /// Whether this machine is at fault: a temporary file.
    pub fn is_machine(&self) -> bool {
        matches!(self, Self::Spool(_))
    }

    /// Where in the tar it happened, if it is the tar's fault.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Tar { source, .. } => Some(source.offset()),
            Self::Filter { offset, .. } => Some(*offset),
            Self::Encode { .. }
            | Self::Holes { .. }
            | Self::Kept { .. }
            | Self::Output(_)
            | Self::Spool(_)
            | Self::Restarts { .. } => None,
        }
    }
}

fn near(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(", near {path}") }
}
