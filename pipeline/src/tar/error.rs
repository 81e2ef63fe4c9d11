//! Why a tar cannot be read.

use std::io;

/// Why a tar cannot be read. Offsets are in bytes from the beginning of the (uncompressed) tar.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// The bytes did not come.
    #[error("cannot read the tar at offset {offset}: {source}")]
    Read {
        /// Where reading stopped.
        offset: u64,
        /// What the input said.
        source: io::Error,
    },
    /// The input ended inside of something.
    #[error("truncated tar: it ends at offset {offset}, inside {inside}")]
    Truncated {
        /// Where the input ended.
        offset: u64,
        /// What was being read.
        inside: &'static str,
    },
    /// A header's checksum is neither the unsigned nor the signed sum of its bytes.
    #[error("invalid tar header at offset {offset}: its checksum does not match")]
    Checksum {
        /// The header's.
        offset: u64,
    },
    /// A number in a header or record is malformed or out of range.
    #[error("invalid tar header at offset {offset}: malformed {field}")]
    Number {
        /// The header's.
        offset: u64,
        /// The name of the field or record.
        field: &'static str,
    },
    /// The records of a PAX extended header do not parse.
    #[error("invalid PAX header at offset {offset}: {problem}")]
    Records {
        /// The extended header's.
        offset: u64,
        /// What is wrong.
        problem: super::InvalidRecords,
    },
    /// An extension header stands where none can.
    #[error("invalid tar at offset {offset}: an extension header without a member")]
    Dangling {
        /// Of what follows the extension header.
        offset: u64,
    },
    /// Readers in use understand these bytes in different ways, which is how members are hidden from one of them.
    #[error("ambiguous tar header at offset {offset}: {what}")]
    Ambiguous {
        /// The header's.
        offset: u64,
        /// Where readers would differ.
        what: &'static str,
    },
    /// The map of a sparse file contradicts itself or the file's sizes.
    #[error("invalid sparse file at offset {offset}: {what}")]
    Sparse {
        /// The member's.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// More than [`Limits`](super::Limits) allow.
    #[error("tar exceeds the limit of {limit} {unit} at offset {offset}")]
    Limit {
        /// Where it did.
        offset: u64,
        /// The limit.
        limit: u64,
        /// What is limited.
        unit: &'static str,
    },
}

impl TarError {
    /// Where in the tar it happened.
    pub fn offset(&self) -> u64 {
        match self {
            Self::Read { offset, .. }
            | Self::Truncated { offset, .. }
            | Self::Checksum { offset }
            | Self::Number { offset, .. }
            | Self::Records { offset, .. }
            | Self::Dangling { offset }
            | Self::Ambiguous { offset, .. }
            | Self::Sparse { offset, .. }
            | Self::Limit { offset, .. } => *offset,
        }
    }
}
