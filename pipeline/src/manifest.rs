//! Manifests: docker schema2 and OCI images, manifest lists and indexes, parsed from the bytes that a registry or a saved tar
//! holds.
//!
//! Pure: nothing here reads or writes. [`parse`] decides what a document is and refuses those that two readers could take
//! for two things; [`build_image_manifest`] writes a new one. Schema 1 is read in [`crate::schema1`]; which
//! entry of an index is wanted is [`crate::platform`]'s question.

mod build;
mod descriptor;
pub mod media_type;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Map, Value};

pub use build::{BuildError, ManifestLayer, build_image_manifest, family_for};
pub use descriptor::Descriptor;
pub use media_type::{Family, LayerType, ZstdInDocker};

use crate::digest::Digest;
use crate::schema1::{Schema1Error, Schema1Manifest};
use media_type::{DOCKER_MANIFEST, DOCKER_MANIFEST_LIST, DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED};

/// The most bytes that a manifest or a config may have, as registries limit them too (distribution-spec, "Pushing manifests").
pub const MAX_DOCUMENT: usize = 4 * 1024 * 1024;

/// A manifest of any kind that we read.
#[derive(Clone, Debug, PartialEq)]
pub enum ParsedManifest {
    /// One image, or an artifact in an image's clothes.
    Image(ImageManifest),
    /// Several images, usually one for each platform.
    Index(Index),
    /// One image in docker's first format.
    Schema1(Schema1Manifest),
}

impl ParsedManifest {
    /// What it is, also where its server did not say it.
    pub fn media_type(&self) -> &'static str {
        match self {
            Self::Image(image) => image.family.manifest(),
            Self::Index(index) => index.family.index(),
            Self::Schema1(_) => DOCKER_SCHEMA1,
        }
    }

    /// What it is about, where it is a signature, an SBOM, an attestation of another manifest.
    pub fn subject(&self) -> Option<Digest> {
        let raw = match self {
            Self::Image(image) => &image.raw,
            Self::Index(index) => &index.raw,
            Self::Schema1(_) => return None,
        };
        raw.get("subject")?.get("digest")?.as_str()?.parse().ok()
    }
}

/// A docker schema2 or OCI image manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageManifest {
    /// Whose vocabulary the document uses.
    pub family: Family,
    /// Of the config.
    pub config: Descriptor,
    /// In order, the lowest first; the same layer may stand twice.
    pub layers: Vec<Descriptor>,
    raw: Map<String, Value>,
}

impl ImageManifest {
    /// The document as it was parsed, with keys that we do not know and in its order.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// Not a container image, though it is stored as one: its config is not an image's, so it has no diff_ids.
    pub fn is_artifact(&self) -> bool {
        self.raw.get("artifactType").is_some_and(|kind| kind.as_str().is_some_and(|kind| !kind.is_empty()))
            || ![media_type::DOCKER_CONFIG, media_type::OCI_CONFIG, ""]
                .contains(&self.config.media_type.as_str())
    }
}

/// A docker manifest list or an OCI index.
#[derive(Clone, Debug, PartialEq)]
pub struct Index {
    /// Whose vocabulary the document uses.
    pub family: Family,
    /// In order. Entries may themselves be indexes.
    pub manifests: Vec<Descriptor>,
    raw: Map<String, Value>,
}

impl Index {
    /// The document as it was parsed, with keys that we do not know and in its order.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }
}

/// Why bytes are not a manifest that we accept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Over [`MAX_DOCUMENT`].
    #[error("the manifest has {size} bytes, more than the {MAX_DOCUMENT} that are accepted")]
    TooLarge {
        /// Bytes that came.
        size: usize,
    },
    /// Not JSON, or not an object.
    #[error("the manifest is not a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// The type in the document is not the one that it was served with (CVE-2021-41190).
    #[error("the manifest was served as {content_type:?} but its mediaType is {media_type:?}")]
    MediaTypeMismatch {
        /// The `Content-Type`.
        content_type: String,
        /// The document's `mediaType`.
        media_type: String,
    },
    /// Two readers could take the document for two things (CVE-2021-41190).
    #[error("the manifest is ambiguous: {kind} with a {field:?} field")]
    Ambiguous {
        /// What its type says that it is.
        kind: &'static str,
        /// What it then must not have.
        field: &'static str,
    },
    /// Neither its type nor its fields say what it is.
    #[error("unknown manifest type {0:?}")]
    Unknown(String),
    /// A field is missing or wrong.
    #[error("the manifest's {field} {reason}")]
    Field {
        /// Its path in the document.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A broken schema 1 manifest.
    #[error(transparent)]
    Schema1(#[from] Schema1Error),
}

impl ManifestError {
    fn field(field: &str, reason: &str) -> Self {
        Self::Field { field: field.to_owned(), reason: reason.to_owned() }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Image(Family),
    Index(Family),
    Schema1,
}

impl Kind {
    fn of_media_type(name: &str) -> Option<Self> {
        match name {
            DOCKER_MANIFEST => Some(Self::Image(Family::Docker)),
            media_type::OCI_MANIFEST => Some(Self::Image(Family::Oci)),
            DOCKER_MANIFEST_LIST => Some(Self::Index(Family::Docker)),
            media_type::OCI_INDEX => Some(Self::Index(Family::Oci)),
            DOCKER_SCHEMA1 | DOCKER_SCHEMA1_SIGNED => Some(Self::Schema1),
            _ => None,
        }
    }

    /// For a document that nobody named the type of. Only OCI lets `mediaType` be absent.
    fn of_shape(raw: &Map<String, Value>) -> Option<Self> {
        match raw.get("schemaVersion").and_then(Value::as_u64) {
            Some(1) => Some(Self::Schema1),
            Some(2) if raw.contains_key("manifests") => Some(Self::Index(Family::Oci)),
            Some(2) if raw.contains_key("layers") => Some(Self::Image(Family::Oci)),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Image(_) => "an image manifest",
            Self::Index(_) => "an index",
            Self::Schema1 => "a schema 1 manifest",
        }
    }

    fn forbidden_fields(self) -> &'static [&'static str] {
        match self {
            Self::Image(_) => &["manifests", "fsLayers"],
            Self::Index(_) => &["layers", "config", "fsLayers"],
            Self::Schema1 => &["layers", "manifests", "config"],
        }
    }
}

/// Parses a manifest that was served as `content_type`; `None` where nobody says, as in a file.
///
/// A `Content-Type` that says nothing (`text/plain`, `application/json`, `application/octet-stream`: old registries and
/// static hosts send them) leaves the question to the document.
pub fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<ParsedManifest, ManifestError> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(ManifestError::TooLarge { size: bytes.len() });
    }
    let raw: Map<String, Value> = serde_json::from_slice(bytes)?;
    let kind = kind(&raw, content_type)?;
    if let Some(field) = kind.forbidden_fields().iter().find(|field| raw.contains_key(**field)) {
        return Err(ManifestError::Ambiguous { kind: kind.name(), field });
    }
    let version = if kind == Kind::Schema1 { 1 } else { 2 };
    if raw.get("schemaVersion").is_some_and(|found| found.as_u64() != Some(version)) {
        return Err(ManifestError::field("schemaVersion", &format!("is not {version}")));
    }
    match kind {
        Kind::Image(family) => Ok(ParsedManifest::Image(ImageManifest {
            family,
            config: Descriptor::parse(raw.get("config").unwrap_or(&Value::Null), "config")?,
            layers: descriptors(&raw, "layers")?,
            raw,
        })),
        Kind::Index(family) => {
            Ok(ParsedManifest::Index(Index { family, manifests: descriptors(&raw, "manifests")?, raw }))
        }
        Kind::Schema1 => Ok(ParsedManifest::Schema1(Schema1Manifest::parse(&raw, bytes)?)),
    }
}

fn kind(raw: &Map<String, Value>, content_type: Option<&str>) -> Result<Kind, ManifestError> {
    let served = content_type.map(essence).unwrap_or_default();
    let named = match raw.get("mediaType") {
        None | Some(Value::Null) => "",
        Some(Value::String(name)) => name.as_str(),
        Some(_) => return Err(ManifestError::field("mediaType", "is not a string")),
    };
    let says_nothing =
        ["", "text/plain", "application/json", "application/octet-stream"].contains(&served.as_str());
    if says_nothing {
        return match named {
            "" => Kind::of_shape(raw).ok_or_else(|| ManifestError::Unknown(short(&served))),
            name => Kind::of_media_type(name).ok_or_else(|| ManifestError::Unknown(short(name))),
        };
    }
    let kind = Kind::of_media_type(&served).ok_or_else(|| ManifestError::Unknown(short(&served)))?;
    // Signed and unsigned schema 1 differ in the type that they are served with only.
    let differs = !named.is_empty() && named != served && kind != Kind::Schema1;
    if differs || (kind == Kind::Schema1 && !named.is_empty() && Kind::of_media_type(named) != Some(kind)) {
        return Err(ManifestError::MediaTypeMismatch {
            content_type: short(&served),
            media_type: short(named),
        });
    }
    Ok(kind)
}

/// The media type without parameters such as `; charset=utf-8`.
fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// An error must not carry megabytes of a hostile document.
fn short(text: &str) -> String {
    text.chars().take(160).collect()
}

/// Go writes an empty list as `null`.
fn descriptors(raw: &Map<String, Value>, field: &'static str) -> Result<Vec<Descriptor>, ManifestError> {
    match raw.get(field) {
        Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values
            .iter()
            .enumerate()
            .map(|(index, value)| Descriptor::parse(value, &format!("{field}[{index}]")))
            .collect(),
        _ => Err(ManifestError::field(field, "is missing or not a list")),
    }
}

/// Annotations by their names.
pub type Annotations = BTreeMap<String, String>;

/// Gives a manifest or index these annotations too, in the place of those with their names.
///
/// Docker's formats say nothing of annotations, and their readers skip what they do not know.
pub(crate) fn annotate(document: &mut Map<String, Value>, annotations: &Annotations) {
    if annotations.is_empty() {
        return;
    }
    let own = document.entry("annotations").or_insert(Value::Null);
    if !own.is_object() {
        *own = Map::new().into();
    }
    if let Value::Object(own) = own {
        own.extend(annotations.iter().map(|(key, value)| (key.clone(), value.as_str().into())));
    }
}

/// Serialises a document compactly, in its key order.
pub(crate) fn to_bytes(document: &Map<String, Value>) -> Bytes {
    Bytes::from(serde_json::to_vec(document).expect("a JSON map with string keys serialises"))
}

#[cfg(test)]
mod tests;
