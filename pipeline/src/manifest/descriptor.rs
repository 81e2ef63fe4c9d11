//! Descriptors: what a manifest says about content that lies elsewhere (image-spec, `descriptor.md`).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::ManifestError;
use super::media_type::LayerType;
use crate::digest::Digest;
use crate::platform::Platform;

/// Media type, digest and size of a blob or manifest, with what else its document says of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Descriptor {
    /// As written; empty where a sloppy writer left it out.
    pub media_type: String,
    /// Of the bytes as stored.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// Where a foreign layer can be had.
    pub urls: Vec<String>,
    /// Those whose values are strings, as the spec wants them all to be.
    pub annotations: BTreeMap<String, String>,
    /// Of an index entry; image-spec lets it be absent.
    pub platform: Option<Platform>,
    raw: Map<String, Value>,
}

impl Descriptor {
    /// A descriptor of content that no document has described yet.
    pub fn new(media_type: &str, digest: &Digest, size: u64) -> Self {
        let value = serde_json::json!({"mediaType": media_type, "size": size, "digest": digest});
        Self::parse(&value, "descriptor").expect("it was just written as one")
    }

    /// What a value says, if it is a descriptor.
    pub fn of(value: &Value) -> Result<Self, ManifestError> {
        Self::parse(value, "descriptor")
    }

    /// The descriptor as the document has it, with keys that we do not know and in its order.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// What the media type says, if it is a layer's.
    pub fn layer_type(&self) -> Option<LayerType> {
        LayerType::of(&self.media_type)
    }

    /// A layer whose bytes are not meant to be pushed to a registry: they live at its `urls`.
    pub fn is_foreign(&self) -> bool {
        self.layer_type().is_some_and(|layer| layer.foreign)
    }

    /// Reads a descriptor that stands at `at` in its document.
    pub(super) fn parse(value: &Value, at: &str) -> Result<Self, ManifestError> {
        let raw = value.as_object().ok_or_else(|| ManifestError::field(at, "is not an object"))?;
        let digest = raw
            .get("digest")
            .and_then(Value::as_str)
            .ok_or_else(|| ManifestError::field(&format!("{at}.digest"), "is missing or not a string"))?
            .parse()
            .map_err(|error: crate::digest::InvalidDigest| {
                ManifestError::field(&format!("{at}.digest"), &error.to_string())
            })?;
        let size = raw.get("size").and_then(Value::as_u64).ok_or_else(|| {
            ManifestError::field(&format!("{at}.size"), "is missing or not a number of bytes")
        })?;
        let media_type = match raw.get("mediaType") {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(name)) => name.clone(),
            Some(_) => return Err(ManifestError::field(&format!("{at}.mediaType"), "is not a string")),
        };
        Ok(Self {
            media_type,
            digest,
            size,
            urls: raw.get("urls").and_then(Value::as_array).map(|urls| strings(urls)).unwrap_or_default(),
            annotations: raw
                .get("annotations")
                .and_then(Value::as_object)
                .map(string_map)
                .unwrap_or_default(),
            platform: raw.get("platform").and_then(Value::as_object).and_then(Platform::from_map),
            raw: raw.clone(),
        })
    }
}

fn strings(values: &[Value]) -> Vec<String> {
    values.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn string_map(map: &Map<String, Value>) -> BTreeMap<String, String> {
    map.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}
