//! Why an image was not processed: one error for the whole way, with the place where it happened and a word on what to do.

use std::io::ErrorKind;

use crate::blob::BlobError;
use crate::config::ConfigError;
use crate::digest::Digest;
use crate::engine::EngineError;
use crate::filter::SpecError;
use crate::layer::LayerError;
use crate::lent::LentFault;
use crate::manifest::{BuildError, ManifestError};
use crate::output::OutputError;
use crate::platform::NoSuchPlatform;
use crate::reference::InvalidReference;
use crate::registry::RegistryError;
use crate::source::manifest_json::SavedImageError;
use crate::source::oci_layout::LayoutError;
use crate::unpack::UnpackError;
use crate::uri::UriError;

/// Why an image was not processed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A source or destination is written wrongly.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// An image's name is.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// A filter is.
    #[error(transparent)]
    Filter(#[from] SpecError),
    /// The registry or the way to it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A container engine or the way to it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Content could not be read or stored.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A manifest that cannot be trusted or understood.
    #[error("{image}: {source}")]
    Manifest {
        /// Whose.
        image: String,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// A new manifest could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The index has no image for the wanted platform.
    #[error(transparent)]
    Platform(#[from] NoSuchPlatform),
    /// An index that leads to an index that leads to an index.
    #[error("{0}: indexes are nested more than {MAX_INDEX_DEPTH} deep")]
    IndexDepth(String),
    /// An index of more images than anybody means.
    #[error("{0}: the index leads to more than {MAX_MANIFESTS} manifests")]
    IndexSize(String),
    /// Filters read entries from where they are, and such an index would be nowhere.
    #[error("{0}: some platforms of an index within an index cannot pass filters")]
    NestedSubset(String),
    /// A config that cannot be understood.
    #[error("config of {image}: {source}")]
    Config {
        /// Whose.
        image: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// Manifest and config do not agree.
    #[error("{image}: the manifest has {layers} layers, the config {diff_ids} diff_ids")]
    LayerCount {
        /// Whose.
        image: String,
        /// In the manifest.
        layers: usize,
        /// In the config.
        diff_ids: usize,
    },
    /// A saved image that is none.
    #[error(transparent)]
    SavedImage(#[from] SavedImageError),
    /// An image layout that is none.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A manifest that an index names is not where the index is.
    #[error("{image} names {digest}, which the source does not have")]
    MissingManifest {
        /// The index.
        image: String,
        /// What it names.
        digest: Digest,
    },
    /// A copy would be another document, and was to be the same.
    #[error("{image} would become {changed}: {reason}")]
    DigestChange {
        /// What is copied.
        image: String,
        /// The digest of the copy.
        changed: Digest,
        /// Why it changes.
        reason: &'static str,
    },
    /// What is signed would change, and its signatures would not hold for what it becomes.
    #[error("{image} is signed as {digest} ({}), and would be changed", .signatures.join(", "))]
    Signed {
        /// What is worked on.
        image: String,
        /// The manifest that the signatures are about.
        digest: Digest,
        /// Their types, or the tags that they are found by.
        signatures: Vec<String>,
    },
    /// Nothing says what an image without a manifest was.
    #[error(
        "the source has no manifest whose digest its provenance could name: it needs an image of a registry or an OCI image layout, and none of Docker schema 1"
    )]
    NoSourceManifest,
    /// Nothing says how an image was made.
    #[error("{0} has no provenance that says how it was made")]
    Unstated(String),
    /// More statements than anybody means.
    #[error("{0} has more statements of how it was made than can be looked at")]
    ManyStatements(String),
    /// What says how an image was made cannot be used.
    #[error("the provenance {digest}: {problem}")]
    Provenance {
        /// Its manifest.
        digest: Digest,
        /// What is wrong with it.
        problem: String,
    },
    /// Docker's first format, which no registry takes any more.
    #[error("{0} is in docker's first format (schema 1), which cannot be copied as it is")]
    Schema1(String),
    /// Where that happened, in a copy.
    #[error("failed to copy {what}: {source}")]
    Copy {
        /// A blob or manifest, by its digest.
        what: String,
        /// What happened.
        source: Box<Error>,
    },
    /// The referrers of a manifest that other clients keep changing.
    #[error("the index of referrers under {tag} was changed by others again and again")]
    Contended {
        /// The subject's tag.
        tag: String,
    },
    /// A manifest that would be lost under other names too.
    #[error(
        "{image} can only be deleted as {digest}, and with it {}",
        .tags.iter().map(|tag| format!(":{tag}")).collect::<Vec<_>>().join(", ")
    )]
    SharedManifest {
        /// What was to be deleted.
        image: String,
        /// The manifest that it names.
        digest: Digest,
        /// The other tags that name it.
        tags: Vec<String>,
    },
    /// There is nothing to delete.
    #[error("{0} does not exist")]
    NoSuchImage(String),
    /// A registry that says to have deleted what it still has.
    #[error("{0} is still there, although the registry says that it was deleted")]
    StillThere(String),
    /// The destination.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A layer's bytes: not the promised ones, not a tar, not what its compression says.
    #[error(transparent)]
    LayerContent(LayerError),
    /// A layer that is larger than the caller allows. That says nothing against it.
    #[error("layer has more than {limit} bytes uncompressed; --max-layer-size allows more")]
    LayerTooLarge {
        /// In bytes.
        limit: u64,
    },
    /// A layer that no tree of files can be made of, or a file system that does not take it.
    #[error(transparent)]
    Unpack(UnpackError),
    /// The tar of a layer is not the one that the config names.
    #[error("diff_id mismatch: the config says {expected}, the uncompressed layer is {computed}")]
    DiffId {
        /// What the config says.
        expected: Digest,
        /// What the tar hashes to.
        computed: Digest,
    },
    /// Filters rewrite tars; an artifact's blobs are none.
    #[error(
        "{image} is an artifact ({media_type}), not an image: it can only be copied between registries, unfiltered"
    )]
    NotAnImage {
        /// Which.
        image: String,
        /// The media type of its config.
        media_type: String,
    },
    /// A foreign layer that would be stored in another form, although nobody but its owner is to hand it out.
    #[error(
        "layer is not distributable: its bytes are at {0}, and only an unfiltered copy to a registry can leave them there"
    )]
    Foreign(String),
    /// What runs the pipeline in a service of its own, its executor or its output, has an error of its own.
    #[error(transparent)]
    Host(Box<dyn std::error::Error + Send + Sync>),
    /// Where any of these happened.
    #[error("failed to {action} layer {number} of {total} ({label}): {source}")]
    Layer {
        /// What was being done.
        action: &'static str,
        /// The layer's place, the lowest being 1.
        number: usize,
        /// Layers in the image.
        total: usize,
        /// Its digest, or its name in the source.
        label: String,
        /// What happened.
        source: Box<Error>,
    },
}

impl From<LayerError> for Error {
    /// What was wrong with the blob or its destination is told as that, and not as the tar's end that it looks like from inside.
    fn from(error: LayerError) -> Self {
        match error.into_blob_error() {
            Ok(error) => Self::Blob(error),
            Err(error) => match error.too_large() {
                Some(limit) => Self::LayerTooLarge { limit },
                None => Self::LayerContent(error),
            },
        }
    }
}

impl From<UnpackError> for Error {
    /// A tar that is wrong is told as it is everywhere else.
    fn from(error: UnpackError) -> Self {
        match error {
            UnpackError::Tar { member, path, source } => LayerError::Tar { member, path, source }.into(),
            error => Self::Unpack(error),
        }
    }
}

/// How deep indexes may lead to indexes.
pub const MAX_INDEX_DEPTH: usize = 4;
/// To how many manifests an index may lead, those that its indexes name included.
pub const MAX_MANIFESTS: usize = 10_000;

/// Whose an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The request: a name, an option, a credential, a destination.
    Caller,
    /// The image: its bytes are not what they claim to be.
    Image,
    /// The network or the other side; it may be retried.
    Network,
    /// This machine: a disk, a file.
    Machine,
}

impl Error {
    /// Whose it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Uri(_)
            | Self::Reference(_)
            | Self::Filter(_)
            | Self::Platform(_)
            | Self::NotAnImage { .. }
            | Self::Foreign(_)
            | Self::DigestChange { .. }
            | Self::Signed { .. }
            | Self::NoSourceManifest
            | Self::SharedManifest { .. }
            | Self::NoSuchImage(_)
            | Self::Unstated(_)
            | Self::Schema1(_)
            | Self::LayerTooLarge { .. }
            | Self::Build(_) => Blame::Caller,
            Self::Registry(error) => registry(error),
            Self::Engine(error) => error.blame(),
            Self::Blob(error) => blob(error),
            Self::Manifest { .. }
            | Self::IndexDepth(_)
            | Self::IndexSize(_)
            | Self::NestedSubset(_)
            | Self::Config { .. }
            | Self::LayerCount { .. }
            | Self::MissingManifest { .. }
            | Self::ManyStatements(_)
            | Self::Provenance { .. }
            | Self::DiffId { .. } => Blame::Image,
            Self::SavedImage(error) if error.is_choice() => Blame::Caller,
            Self::SavedImage(error) => {
                if error.is_io() {
                    Blame::Machine
                } else {
                    Blame::Image
                }
            }
            Self::Layout(error) if error.is_io() => Blame::Machine,
            Self::Layout(error) if error.is_choice() => Blame::Caller,
            Self::Layout(_) => Blame::Image,
            Self::Output(error) => match error {
                OutputError::Io { .. } => Blame::Machine,
                OutputError::User(_) => Blame::Image,
                OutputError::Spoiled | OutputError::BlobLost { .. } => Blame::Network,
                OutputError::NotAnImage { .. }
                | OutputError::NoTag { .. }
                | OutputError::Taken { .. }
                | OutputError::Catalog { .. }
                | OutputError::NoIndexes { .. }
                | OutputError::OneName { .. }
                | OutputError::NoBelongings
                | OutputError::NotALayout { .. }
                | OutputError::ByDigest { .. } => Blame::Caller,
            },
            Self::Unpack(error) => {
                if error.is_machine() {
                    Blame::Machine
                } else {
                    Blame::Image
                }
            }
            Self::LayerContent(error) => {
                if error.is_machine() {
                    Blame::Machine
                } else {
                    Blame::Image
                }
            }
            Self::Host(_) => Blame::Machine,
            Self::Contended { .. } | Self::StillThere(_) => Blame::Network,
            Self::Layer { source, .. } | Self::Copy { source, .. } => source.blame(),
        }
    }

    /// Whether the request is written wrongly, or asks for what cannot go together.
    pub fn is_misuse(&self) -> bool {
        matches!(self, Self::Uri(_) | Self::Reference(_) | Self::Filter(_) | Self::Build(BuildError::Zstd(_)))
    }

    /// An error of the layer at `index`, of `total`.
    pub(crate) fn in_layer(
        action: &'static str,
        index: usize,
        total: usize,
        label: String,
        error: Self,
    ) -> Self {
        if matches!(error, Self::Layer { .. }) {
            // Another layer's, which was waiting for this one.
            return error;
        }
        Self::Layer { action, number: index + 1, total, label, source: Box::new(error) }
    }

    /// Whether it only says that another part of the same work stopped, whose own error tells why.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, Self::Blob(BlobError::Interrupted))
    }

    /// Whether the source says that it does not have the manifest that was asked for.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Registry(error) if error.is_not_found()) || self.is_missing_blob()
    }

    /// Whether the source says that it does not have a blob that the manifest names.
    pub(crate) fn is_missing_blob(&self) -> bool {
        match self {
            Self::Blob(BlobError::Registry(error)) => error.is_not_found(),
            Self::Blob(BlobError::Missing { .. }) => true,
            Self::Blob(BlobError::Lent(error)) => error.fault == LentFault::Missing,
            _ => false,
        }
    }

    /// Whether a disk is full, here or where something is lent.
    pub fn is_storage_full(&self) -> bool {
        let io = match self {
            Self::Layer { source, .. } | Self::Copy { source, .. } => return source.is_storage_full(),
            Self::Blob(BlobError::Lent(error)) => return error.fault == LentFault::Full,
            Self::Blob(BlobError::Io { source, .. })
            | Self::LayerContent(LayerError::Spool(source))
            | Self::Output(OutputError::Io { source, .. }) => source,
            _ => return false,
        };
        matches!(io.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
    }

    /// Whether the same request may succeed when it is made again.
    pub fn is_transient(&self) -> bool {
        self.blame() == Blame::Network
    }

    /// Whether beginning the layer anew may help where its single requests, which were sent again already, did not: an upload
    /// whose session the registry gave up, or which broke with bytes on their way.
    pub(crate) fn is_worth_a_new_attempt(&self) -> bool {
        matches!(
            self,
            Self::Registry(RegistryError::SessionLost { .. } | RegistryError::Broken { .. })
                | Self::Blob(BlobError::Registry(
                    RegistryError::SessionLost { .. } | RegistryError::Broken { .. }
                ))
        )
    }

    /// What the user can do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Registry(error) | Self::Blob(BlobError::Registry(error)) => error.hint(),
            Self::Engine(error) | Self::Blob(BlobError::Engine(error)) => error.hint(),
            Self::Blob(BlobError::Lent(error)) => error.hint.clone(),
            Self::Layer { source, .. } | Self::Copy { source, .. } => source.hint(),
            Self::MissingManifest { .. } => {
                Some("--sparse copies the index as it is, with the images that are there".to_owned())
            }
            Self::Signed { .. } => Some(
                "--signatures drop leaves its signatures behind; --signatures keep takes them along, as the original's"
                    .to_owned(),
            ),
            Self::SharedManifest { .. } => Some("--yes deletes it under all of these names".to_owned()),
            Self::Schema1(_) => Some("`occyctl process` makes an image of today of it".to_owned()),
            Self::Output(OutputError::Taken { .. }) => {
                Some("choose another directory, or replace what is there with --force".to_owned())
            }
            Self::SavedImage(SavedImageError::NotSaved { is_layout: true, .. }) => {
                Some("it is an OCI image layout, which oci-layout:// reads".to_owned())
            }
            Self::Platform(_) => Some(
                "choose what is there with --os, --architecture and --variant, or with --platform of copy and digest".to_owned(),
            ),
            Self::DiffId { .. } => {
                Some("`occyctl check` lists everything that is wrong with an image".to_owned())
            }
            _ => None,
        }
    }
}

fn registry(error: &RegistryError) -> Blame {
    match error {
        // A document that is not the one that was named.
        RegistryError::Digest { .. } | RegistryError::TooLarge { .. } => Blame::Image,
        error if error.is_transient() => Blame::Network,
        _ => Blame::Caller,
    }
}

fn blob(error: &BlobError) -> Blame {
    match error {
        BlobError::Registry(error) => registry(error),
        BlobError::Engine(error) => error.blame(),
        BlobError::Lent(error) => error.blame(),
        BlobError::Io { .. } => Blame::Machine,
        BlobError::Digest { .. } | BlobError::Size { .. } | BlobError::Missing { .. } => Blame::Image,
        // The producer's own error is what the user sees; this one only stops the consumer.
        BlobError::Interrupted | BlobError::Host(_) => Blame::Machine,
    }
}
