//! Docker's first manifest format, which old registries still serve: read, never written.
//!
//! The document lists layers newest first and carries, instead of a config, one JSON text a layer (`v1Compatibility`).
//! A config is made of them as docker's `pull` and containers/image do; its diff_ids are not known before the layers
//! have been decompressed. Signatures are not verified: what vouches for the bytes is the digest of [`Schema1Manifest::payload`].

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use serde_json::{Map, Value};

use crate::config::ImageConfig;
use crate::digest::{Digest, InvalidDigest};

/// A schema 1 manifest, as far as a newer image can be made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Schema1Manifest {
    /// The repository that it was made for.
    pub name: String,
    /// The tag that it was made for.
    pub tag: String,
    /// In order, the lowest first, without the layers that only record a command. Always gzip; sizes are not known.
    pub layers: Vec<Digest>,
    /// The config, whose diff_ids are not known.
    pub config: ImageConfig,
    /// The bytes that the manifest's digest is of: a signed manifest without its signatures.
    pub payload: Bytes,
}

/// Why a schema 1 manifest cannot be made into an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Schema1Error {
    /// A field is missing or of the wrong kind.
    #[error("the schema 1 manifest's {field} {reason}")]
    Field {
        /// Its path in the document.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Layers and history are parallel lists.
    #[error("the schema 1 manifest has {layers} layers and {history} history entries")]
    Length {
        /// Entries of `fsLayers`.
        layers: usize,
        /// Entries of `history`.
        history: usize,
    },
    /// A layer's digest is not one.
    #[error("the schema 1 manifest's fsLayers[{index}]: {source}")]
    Digest {
        /// As listed, the newest being 0.
        index: usize,
        /// What is wrong with it.
        source: InvalidDigest,
    },
    /// A layer's JSON text is not an object.
    #[error("the schema 1 manifest's history[{index}].v1Compatibility is not a JSON object: {source}")]
    Compatibility {
        /// As listed, the newest being 0.
        index: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The chain from each layer to its parent is broken.
    #[error("the schema 1 manifest's history[{index}] is not the child of the entry after it")]
    Parent {
        /// As listed, the newest being 0.
        index: usize,
    },
}

/// One position of the two parallel lists.
struct Step {
    layer: Digest,
    v1: Map<String, Value>,
}

impl Step {
    fn text(&self, name: &str) -> &str {
        self.v1.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn is_throwaway(&self) -> bool {
        self.v1.get("throwaway").and_then(Value::as_bool).unwrap_or(false)
    }

    /// As containers/image writes it: fields without a value are left out.
    fn history(&self) -> Value {
        let mut entry = Map::new();
        entry.insert("created".to_owned(), self.text("created").into());
        let command =
            self.v1.get("container_config").and_then(|config| config.get("Cmd")).and_then(Value::as_array);
        let command: Vec<&str> = command.into_iter().flatten().filter_map(Value::as_str).collect();
        for (name, value) in [
            ("author", self.text("author")),
            ("created_by", &command.join(" ")),
            ("comment", self.text("comment")),
        ] {
            if !value.is_empty() {
                entry.insert(name.to_owned(), value.into());
            }
        }
        if self.is_throwaway() {
            entry.insert("empty_layer".to_owned(), true.into());
        }
        entry.retain(|_, value| value.as_str() != Some(""));
        entry.into()
    }
}

impl Schema1Manifest {
    pub(crate) fn parse(raw: &Map<String, Value>, bytes: &[u8]) -> Result<Self, Schema1Error> {
        let mut steps = steps(raw)?;
        check_chain(&mut steps)?;
        let newest = steps.first().ok_or(Schema1Error::Field { field: "history", reason: "is empty" })?;
        let mut config = newest.v1.clone();
        config.retain(|key, _| {
            !["id", "parent", "parent_id", "layer_id", "throwaway", "Size", "rootfs", "history"]
                .contains(&key.as_str())
        });
        if !config.contains_key("architecture")
            && let Some(architecture) = raw.get("architecture")
        {
            config.insert("architecture".to_owned(), architecture.clone());
        }
        config.entry("os").or_insert_with(|| "linux".into());
        let oldest_first = || steps.iter().rev();
        let layers: Vec<Digest> =
            oldest_first().filter(|step| !step.is_throwaway()).map(|step| step.layer.clone()).collect();
        config.insert("history".to_owned(), oldest_first().map(Step::history).collect());
        let text = |name| raw.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Self {
            name: text("name"),
            tag: text("tag"),
            config: ImageConfig::incomplete(config, layers.len()),
            layers,
            payload: payload(raw, bytes)?,
        })
    }
}

fn steps(raw: &Map<String, Value>) -> Result<Vec<Step>, Schema1Error> {
    let list = |field: &'static str| {
        raw.get(field)
            .and_then(Value::as_array)
            .ok_or(Schema1Error::Field { field, reason: "is missing or not a list" })
    };
    let (layers, history) = (list("fsLayers")?, list("history")?);
    if layers.len() != history.len() {
        return Err(Schema1Error::Length { layers: layers.len(), history: history.len() });
    }
    let step = |(index, (layer, entry)): (usize, (&Value, &Value))| {
        let text =
            |value: &Value, name| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let v1 = text(entry, "v1Compatibility");
        Ok(Step {
            layer: text(layer, "blobSum").parse().map_err(|source| Schema1Error::Digest { index, source })?,
            v1: serde_json::from_str(&v1).map_err(|source| Schema1Error::Compatibility { index, source })?,
        })
    };
    layers.iter().zip(history).enumerate().map(step).collect()
}

/// Every entry's parent is the one after it, and the last has none. An entry that repeats the one after it is dropped: old
/// versions of docker wrote such (containers/image, `fixManifestLayers`).
fn check_chain(steps: &mut Vec<Step>) -> Result<(), Schema1Error> {
    steps.dedup_by(|newer, older| !newer.text("id").is_empty() && newer.text("id") == older.text("id"));
    for (index, step) in steps.iter().enumerate() {
        let parent = steps.get(index + 1).map(|parent| parent.text("id")).unwrap_or_default();
        if step.text("parent") != parent {
            return Err(Schema1Error::Parent { index });
        }
    }
    Ok(())
}

/// The bytes that the digest of a document is of: a signed schema 1 manifest without its signatures, anything else as it is.
///
/// Of signatures that do not fit their document, or of no JSON at all, the document itself, so that a digest does not match.
pub fn digested(document: &[u8]) -> Bytes {
    serde_json::from_slice::<Map<String, Value>>(document)
        .ok()
        .filter(|raw| raw.get("schemaVersion").and_then(Value::as_u64) == Some(1))
        .and_then(|raw| payload(&raw, document).ok())
        .unwrap_or_else(|| Bytes::copy_from_slice(document))
}

/// The signed bytes, which every signature's `protected` header cuts out of the document (RFC 7515 in docker's "pretty" form).
fn payload(raw: &Map<String, Value>, bytes: &[u8]) -> Result<Bytes, Schema1Error> {
    let Some(signature) = raw.get("signatures").and_then(Value::as_array).and_then(|list| list.first())
    else {
        return Ok(Bytes::copy_from_slice(bytes));
    };
    let wrong =
        || Schema1Error::Field { field: "signatures[0].protected", reason: "is not a protected header" };
    let protected = signature.get("protected").and_then(Value::as_str).ok_or_else(wrong)?;
    let protected = URL_SAFE_NO_PAD.decode(protected).map_err(|_| wrong())?;
    let protected: Map<String, Value> = serde_json::from_slice(&protected).map_err(|_| wrong())?;
    let length = protected.get("formatLength").and_then(Value::as_u64).ok_or_else(wrong)?;
    let tail = protected.get("formatTail").and_then(Value::as_str).ok_or_else(wrong)?;
    let tail = URL_SAFE_NO_PAD.decode(tail).map_err(|_| wrong())?;
    let head = usize::try_from(length).ok().and_then(|length| bytes.get(..length)).ok_or_else(wrong)?;
    let payload = [head, &tail].concat();
    // What is read must be what was signed: the rest of the document may add signatures and nothing else.
    let mut unsigned = raw.clone();
    unsigned.shift_remove("signatures");
    match serde_json::from_slice::<Map<String, Value>>(&payload) {
        Ok(signed) if signed == unsigned => Ok(payload.into()),
        _ => Err(Schema1Error::Field { field: "signatures", reason: "are of another document" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{ManifestError, ParsedManifest, media_type, parse};
    use serde_json::json;

    const PLAIN: Option<&str> = Some("application/json");

    fn digest(n: u8) -> Digest {
        Digest::sha256([n])
    }

    /// Newest first, as the format lists them: a throwaway `ENV` between two layers.
    fn document() -> Value {
        let v1 = |value: Value| json!({"v1Compatibility": value.to_string()});
        json!({
            "schemaVersion": 1, "name": "app", "tag": "latest", "architecture": "amd64",
            "fsLayers": [{"blobSum": digest(2)}, {"blobSum": digest(0)}, {"blobSum": digest(1)}],
            "history": [
                v1(json!({"id": "c", "parent": "b", "created": "2015-01-03T00:00:00Z", "os": "linux", "Size": 3,
                    "architecture": "amd64", "config": {"Cmd": ["sh"]},
                    "container_config": {"Cmd": ["/bin/sh", "-c", "touch /x"]}})),
                v1(json!({"id": "b", "parent": "a", "created": "2015-01-02T00:00:00Z", "throwaway": true})),
                v1(json!({"id": "a", "created": "2015-01-01T00:00:00Z", "comment": "base"})),
            ],
        })
    }

    fn read(document: &Value) -> Result<Schema1Manifest, ManifestError> {
        match parse(document.to_string().as_bytes(), PLAIN)? {
            ParsedManifest::Schema1(manifest) => Ok(manifest),
            other => panic!("{other:?}"),
        }
    }

    /// As docker signed: the signatures are spliced in before the closing brace.
    fn signed(payload: &str) -> String {
        let head = payload.strip_suffix('}').expect("an object");
        let protected = json!({"formatLength": head.len(), "formatTail": URL_SAFE_NO_PAD.encode("}"), "time": "2015-01-01T00:00:00Z"});
        let protected = URL_SAFE_NO_PAD.encode(protected.to_string());
        format!(r#"{head},"signatures":[{{"header":{{}},"signature":"x","protected":"{protected}"}}]}}"#)
    }

    #[test]
    fn layers_are_turned_round_and_throwaways_dropped() {
        let manifest = read(&document()).expect("a manifest");
        assert_eq!(manifest.layers, [digest(1), digest(2)]);
        assert_eq!(manifest.config.diff_ids(), [None, None]);
    }

    #[test]
    fn the_newest_entry_becomes_the_config_and_all_become_history() {
        let mut config = read(&document()).expect("a manifest").config;
        config.patch_diff_id(0, digest(8)).expect("layer 0");
        config.patch_diff_id(1, digest(9)).expect("layer 1");
        let expected = json!({
            "created": "2015-01-03T00:00:00Z", "os": "linux", "architecture": "amd64", "config": {"Cmd": ["sh"]},
            "container_config": {"Cmd": ["/bin/sh", "-c", "touch /x"]},
            "history": [
                {"created": "2015-01-01T00:00:00Z", "comment": "base"},
                {"created": "2015-01-02T00:00:00Z", "empty_layer": true},
                {"created": "2015-01-03T00:00:00Z", "created_by": "/bin/sh -c touch /x"},
            ],
            "rootfs": {"type": "layers", "diff_ids": [digest(8), digest(9)]},
        });
        let bytes = config.to_bytes().expect("complete");
        assert_eq!(serde_json::from_slice::<Value>(&bytes).expect("json"), expected);
        assert_eq!(config.check_history(), Ok(()));
    }

    #[test]
    fn a_signed_manifest_has_the_digest_of_what_was_signed() {
        let payload = document().to_string();
        for content_type in
            [media_type::DOCKER_SCHEMA1_SIGNED, media_type::DOCKER_SCHEMA1, "text/plain; charset=utf-8"]
        {
            match parse(signed(&payload).as_bytes(), Some(content_type)).expect(content_type) {
                ParsedManifest::Schema1(manifest) => assert_eq!(manifest.payload, payload.as_bytes()),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(digested(signed(&payload).as_bytes()), payload.as_bytes());
        for same in [payload.as_str(), "not json", r#"{"schemaVersion":1,"signatures":[{}]}"#] {
            assert_eq!(digested(same.as_bytes()), same.as_bytes());
        }
    }

    #[test]
    fn a_document_that_is_not_the_signed_one_is_refused() {
        let payload = document().to_string();
        // A second `tag` after the signed part: what is read would not be what the digest is of.
        let forged = signed(&payload).replace(r#","signatures""#, r#","tag":"other","signatures""#);
        let error = parse(forged.as_bytes(), PLAIN).expect_err("forged");
        assert!(error.to_string().contains("another document"), "{error}");
    }

    #[test]
    fn repeated_entries_are_dropped_and_broken_chains_refused() {
        let mut twice = document();
        for list in ["fsLayers", "history"] {
            let first = twice[list][0].clone();
            twice[list].as_array_mut().expect("a list").insert(0, first);
        }
        assert_eq!(read(&twice).expect("a manifest").layers.len(), 2);
        let mut broken = document();
        broken["history"].as_array_mut().expect("a list").swap(0, 1);
        assert!(matches!(read(&broken), Err(ManifestError::Schema1(Schema1Error::Parent { index: 0 }))));
        let mut shorter = document();
        shorter["history"].as_array_mut().expect("a list").pop();
        assert!(matches!(
            read(&shorter),
            Err(ManifestError::Schema1(Schema1Error::Length { layers: 3, history: 2 }))
        ));
    }
}
