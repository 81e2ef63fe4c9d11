//! What can go wrong between us and an Engine, and what the user can do about it.

use std::path::PathBuf;

use super::Address;
use crate::digest::Digest;
use crate::error::Blame;

/// Why an Engine did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// No socket is where engines have theirs.
    #[error("no container engine was found: there is no {}", .tried.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", no "))]
    NoSocket {
        /// Where it was looked for.
        tried: Vec<PathBuf>,
    },
    /// `DOCKER_HOST` makes no sense.
    #[error("DOCKER_HOST={text}: {reason}")]
    Address {
        /// As given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A certificate of a `tcp://` Engine.
    #[error("{}: {cause}", .path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// Nobody answers there.
    #[error("failed to connect to the container engine at {address}: {cause}")]
    Connect {
        /// Where.
        address: String,
        /// Why not.
        cause: String,
    },
    /// The Engine does not have the image.
    #[error("the container engine at {address} has no image {image}")]
    NoSuchImage {
        /// Which.
        image: String,
        /// Which Engine.
        address: String,
    },
    /// An answer that is a refusal.
    #[error("failed to {what}: the container engine answered {status}: {words}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The HTTP status.
        status: u16,
        /// The Engine's own words.
        words: String,
    },
    /// A failure that the Engine tells within an answer.
    #[error("failed to {what}: the container engine says: {words}")]
    Failed {
        /// What was asked for.
        what: String,
        /// The Engine's own words.
        words: String,
    },
    /// The connection broke.
    #[error("failed to {what}: the container engine broke the connection: {cause}")]
    Broken {
        /// What was asked for.
        what: String,
        /// How it broke.
        cause: String,
    },
    /// An answer that makes no sense.
    #[error("failed to {what}: {problem}")]
    Protocol {
        /// What was asked for.
        what: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// The export is no tar, or ended too early to be one.
    #[error("the export of {image} is not a tar that can be read: {reason}")]
    NotATar {
        /// Whose export.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The export lacks a layer that the Engine said the image has.
    #[error("the export of {image} lacks layer {} ({diff_id})", .index + 1)]
    NoLayer {
        /// Whose export.
        image: String,
        /// The layer's place, the lowest being 0.
        index: usize,
        /// Its diff_id.
        diff_id: Digest,
    },
    /// The export lacks the config.
    #[error("the export of {image} lacks its config, {digest}")]
    NoConfig {
        /// Whose export.
        image: String,
        /// The image's Id.
        digest: Digest,
    },
    /// The config is not the one that the Engine's Id names.
    #[error("the export of {image} is damaged: its config should be {expected} and is {computed}")]
    Damaged {
        /// Whose export.
        image: String,
        /// The image's Id.
        expected: Digest,
        /// What the bytes hash to.
        computed: Digest,
    },
    /// What the Engine has is not what it was given, or not what it said.
    #[error("{image} in the container engine has {what} {actual}, and should have {expected}")]
    Differs {
        /// Which image.
        image: String,
        /// What differs.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        actual: String,
    },
}

impl EngineError {
    pub(super) fn connect(address: &Address, error: &reqwest::Error) -> Self {
        Self::Connect { address: address.to_string(), cause: innermost(error) }
    }

    pub(super) fn broken(what: String, error: &reqwest::Error) -> Self {
        Self::Broken { what, cause: innermost(error) }
    }

    /// Whose it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NoSocket { .. }
            | Self::Address { .. }
            | Self::Certificate { .. }
            | Self::NoSuchImage { .. } => Blame::Caller,
            Self::Refused { status, .. } if *status < 500 => Blame::Caller,
            Self::Connect { .. } | Self::Refused { .. } | Self::Failed { .. } | Self::Broken { .. } => {
                Blame::Network
            }
            Self::Protocol { .. }
            | Self::NotATar { .. }
            | Self::NoLayer { .. }
            | Self::NoConfig { .. }
            | Self::Damaged { .. }
            | Self::Differs { .. } => Blame::Image,
        }
    }

    /// What the user can do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoSocket { .. } => Some(
                "start Docker, or `systemctl --user start podman.socket`; name another socket with DOCKER_HOST or ?socket=PATH"
                    .to_owned(),
            ),
            Self::Connect { cause, .. } if cause.contains("Permission denied") => {
                Some("join the group that owns the socket (docker), or run this as root".to_owned())
            }
            Self::Connect { .. } => {
                Some("is the engine running? DOCKER_HOST or ?socket=PATH name another one".to_owned())
            }
            Self::NoSuchImage { image, .. } => {
                Some(format!("`docker image ls` lists what there is; `docker pull {image}` fetches it"))
            }
            _ => None,
        }
    }
}

/// The innermost cause, which says most in fewest words.
pub(super) fn innermost(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
