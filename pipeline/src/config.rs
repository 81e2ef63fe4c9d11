//! An image's config (image-spec, `config.md`): read for what the pipeline needs, patched without touching the rest.
//!
//! The document is kept as a JSON map with unknown keys and key order; it is written compactly. What JSON does not
//! distinguish may change its spelling when a patched config is written: escapes (`\u003c` becomes `<`), white space,
//! numbers with fractions. A config that nothing patched should be passed on as the bytes that it came in.

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::digest::{Digest, InvalidDigest};
use crate::manifest::{MAX_DOCUMENT, to_bytes};
use crate::platform::Platform;

/// A config, whose diff_ids may not be known yet: a schema 1 manifest does not have them.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageConfig {
    raw: Map<String, Value>,
    diff_ids: Vec<Option<Digest>>,
}

/// One entry of a config's `history`; fields that are missing are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistoryEntry {
    /// RFC 3339, as written.
    pub created: Option<String>,
    /// The command.
    pub created_by: String,
    /// Whatever the builder had to say.
    pub comment: String,
    /// The step made no layer.
    pub empty_layer: bool,
}

/// The history tells of more or fewer layers than there are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the config's history tells of {told} layers, but there are {layers}")]
pub struct HistoryMismatch {
    /// Entries that are not empty layers.
    pub told: usize,
    /// Layers of the image.
    pub layers: usize,
}

/// Why bytes are not a config, or why it cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Over [`MAX_DOCUMENT`].
    #[error("the config has {size} bytes, more than the {MAX_DOCUMENT} that are accepted")]
    TooLarge {
        /// Bytes that came.
        size: usize,
    },
    /// Not JSON, or not an object.
    #[error("the config is not a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// A field is missing or of the wrong kind.
    #[error("the config's {field} {reason}")]
    Field {
        /// Its path in the document.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A diff_id is not a digest.
    #[error("the config's rootfs.diff_ids[{index}]: {source}")]
    DiffId {
        /// Which layer, the lowest being 0.
        index: usize,
        /// What is wrong with it.
        source: InvalidDigest,
    },
    /// A layer that the config does not have.
    #[error("layer {index} is not one of the {layers} layers of the config")]
    NoSuchLayer {
        /// Which layer, the lowest being 0.
        index: usize,
        /// Layers of the config.
        layers: usize,
    },
    /// It cannot be written before every layer's diff_id is known.
    #[error("the diff_id of layer {index} is not known yet")]
    Incomplete {
        /// Which layer, the lowest being 0.
        index: usize,
    },
}

impl ImageConfig {
    /// Parses a config. One without `rootfs.diff_ids` is an error: such are artifacts' configs, which nothing patches.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() > MAX_DOCUMENT {
            return Err(ConfigError::TooLarge { size: bytes.len() });
        }
        let raw: Map<String, Value> = serde_json::from_slice(bytes)?;
        let diff_ids = match raw.get("rootfs").and_then(|rootfs| rootfs.get("diff_ids")) {
            Some(Value::Array(values)) => values.iter().enumerate().map(diff_id).collect::<Result<_, _>>()?,
            // Go writes an empty list as `null`.
            Some(Value::Null) => Vec::new(),
            Some(_) => return Err(ConfigError::Field { field: "rootfs.diff_ids", reason: "is not a list" }),
            None => return Err(ConfigError::Field { field: "rootfs.diff_ids", reason: "is missing" }),
        };
        if !matches!(raw.get("history"), None | Some(Value::Null | Value::Array(_))) {
            return Err(ConfigError::Field { field: "history", reason: "is not a list" });
        }
        Ok(Self { raw, diff_ids })
    }

    /// A config made here, whose diff_ids have yet to be computed; `rootfs` and whatever it holds is replaced.
    pub fn incomplete(raw: Map<String, Value>, layers: usize) -> Self {
        Self { raw, diff_ids: vec![None; layers] }
    }

    /// The document, where `rootfs.diff_ids` may be out of date.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// One for each layer, the lowest first; `None` where it is not known yet.
    pub fn diff_ids(&self) -> &[Option<Digest>] {
        &self.diff_ids
    }

    /// Sets the diff_id of the layer at `index`.
    pub fn patch_diff_id(&mut self, index: usize, diff_id: Digest) -> Result<(), ConfigError> {
        let layers = self.diff_ids.len();
        let place = self.diff_ids.get_mut(index).ok_or(ConfigError::NoSuchLayer { index, layers })?;
        *place = Some(diff_id);
        Ok(())
    }

    /// What the image runs on; `None` where the config does not say.
    pub fn platform(&self) -> Option<Platform> {
        Platform::from_map(&self.raw)
    }

    /// When the image was made: RFC 3339, as written.
    pub fn created(&self) -> Option<&str> {
        self.raw.get("created")?.as_str()
    }

    /// The steps that made the image, the oldest first; empty where the config has none.
    pub fn history(&self) -> Vec<HistoryEntry> {
        self.raw
            .get("history")
            .and_then(Value::as_array)
            .map(|steps| steps.iter().map(history_entry).collect())
            .unwrap_or_default()
    }

    /// Whether the history, where there is one, tells of as many layers as the image has.
    pub fn check_history(&self) -> Result<(), HistoryMismatch> {
        let history = self.history();
        let told = history.iter().filter(|entry| !entry.empty_layer).count();
        let layers = self.diff_ids.len();
        if history.is_empty() || told == layers { Ok(()) } else { Err(HistoryMismatch { told, layers }) }
    }

    /// Passes `created` and every `history[].created` through `rewrite`; those for which it gives `None` stay.
    pub fn rewrite_times(&mut self, mut rewrite: impl FnMut(&str) -> Option<String>) {
        let mut pass = |map: &mut Map<String, Value>| {
            if let Some(Value::String(time)) = map.get_mut("created")
                && let Some(new) = rewrite(time)
            {
                *time = new;
            }
        };
        pass(&mut self.raw);
        let history = self.raw.get_mut("history").and_then(Value::as_array_mut);
        history.into_iter().flatten().filter_map(Value::as_object_mut).for_each(pass);
    }

    /// The config as JSON without white space, its keys in their order.
    pub fn to_bytes(&self) -> Result<Bytes, ConfigError> {
        let mut diff_ids = Vec::with_capacity(self.diff_ids.len());
        for (index, diff_id) in self.diff_ids.iter().enumerate() {
            let diff_id = diff_id.as_ref().ok_or(ConfigError::Incomplete { index })?;
            diff_ids.push(Value::String(diff_id.to_string()));
        }
        let mut raw = self.raw.clone();
        let rootfs = raw.entry("rootfs").or_insert_with(|| Value::Object(Map::new()));
        if !rootfs.is_object() {
            *rootfs = Value::Object(Map::new());
        }
        let rootfs = rootfs.as_object_mut().expect("made an object above");
        rootfs.entry("type").or_insert_with(|| "layers".into());
        rootfs.insert("diff_ids".to_owned(), diff_ids.into());
        Ok(to_bytes(&raw))
    }
}

fn diff_id((index, value): (usize, &Value)) -> Result<Option<Digest>, ConfigError> {
    let text = value.as_str().unwrap_or_default();
    text.parse().map(Some).map_err(|source| ConfigError::DiffId { index, source })
}

fn history_entry(value: &Value) -> HistoryEntry {
    let text = |name| value.get(name).and_then(Value::as_str);
    HistoryEntry {
        created: text("created").map(str::to_owned),
        created_by: text("created_by").unwrap_or_default().to_owned(),
        comment: text("comment").unwrap_or_default().to_owned(),
        empty_layer: value.get("empty_layer").and_then(Value::as_bool).unwrap_or(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn digest(text: &str) -> Digest {
        text.parse().expect("a digest")
    }

    fn parse(value: &Value) -> Result<ImageConfig, ConfigError> {
        ImageConfig::parse(value.to_string().as_bytes())
    }

    #[test]
    fn patching_keeps_unknown_keys_and_key_order() {
        let text = format!(
            r#"{{"zebra":{{"b":1,"a":[2.5,null]}},"os":"linux","rootfs":{{"x":1,"diff_ids":["{A}","{A}"],"type":"layers"}},"architecture":"amd64","an unknown key":18446744073709551615}}"#
        );
        let mut config = ImageConfig::parse(text.as_bytes()).expect("a config");
        assert_eq!(config.to_bytes().expect("complete"), text.as_bytes());
        config.patch_diff_id(1, digest(B)).expect("layer 1 exists");
        let expected = text.replace(&format!(r#""{A}"]"#), &format!(r#""{B}"]"#));
        assert_eq!(config.to_bytes().expect("complete"), expected.as_bytes());
    }

    #[test]
    fn diff_ids_are_patched_by_index_whatever_the_order_of_arrival() {
        let mut config = ImageConfig::incomplete(Map::new(), 2);
        config.patch_diff_id(1, digest(B)).expect("layer 1 exists");
        assert!(matches!(config.to_bytes(), Err(ConfigError::Incomplete { index: 0 })));
        config.patch_diff_id(0, digest(A)).expect("layer 0 exists");
        let expected = json!({"rootfs": {"type": "layers", "diff_ids": [A, B]}}).to_string();
        assert_eq!(config.to_bytes().expect("complete"), expected.as_bytes());
        assert!(matches!(
            config.patch_diff_id(2, digest(A)),
            Err(ConfigError::NoSuchLayer { index: 2, layers: 2 })
        ));
    }

    #[test]
    fn an_image_without_layers_may_have_null_lists() {
        let config = parse(&json!({"rootfs": {"type": "layers", "diff_ids": null}, "history": null}))
            .expect("a config");
        assert!(config.diff_ids().is_empty());
        assert_eq!(config.check_history(), Ok(()));
    }

    #[test]
    fn what_is_not_an_image_config_is_refused_by_field() {
        for (document, expected) in [
            (json!({}), "the config's rootfs.diff_ids is missing"),
            (json!({"rootfs": []}), "the config's rootfs.diff_ids is missing"),
            (json!({"rootfs": {"diff_ids": A}}), "the config's rootfs.diff_ids is not a list"),
            (json!({"rootfs": {"diff_ids": []}, "history": {}}), "the config's history is not a list"),
        ] {
            assert_eq!(parse(&document).expect_err("not a config").to_string(), expected);
        }
        let bad = parse(&json!({"rootfs": {"diff_ids": [A, "sha256:../../etc/passwd"]}}))
            .expect_err("a bad diff_id");
        assert!(matches!(bad, ConfigError::DiffId { index: 1, .. }), "{bad}");
        assert!(matches!(ImageConfig::parse(b"[]"), Err(ConfigError::Json(_))));
        let huge = vec![b' '; MAX_DOCUMENT + 1];
        assert!(matches!(ImageConfig::parse(&huge), Err(ConfigError::TooLarge { .. })));
    }

    #[test]
    fn a_history_with_other_than_one_entry_a_layer_is_found() {
        let history = |empty: bool| {
            json!({"rootfs": {"diff_ids": [A]},
                "history": [{"created_by": "ADD"}, {"created_by": "ENV", "empty_layer": empty}]})
        };
        assert_eq!(parse(&history(true)).expect("a config").check_history(), Ok(()));
        let found = parse(&history(false)).expect("a config").check_history();
        assert_eq!(found, Err(HistoryMismatch { told: 2, layers: 1 }));
    }

    #[test]
    fn every_time_passes_through_the_rewrite() {
        let old = "2024-01-01T00:00:00Z";
        let mut config = parse(&json!({"created": old, "rootfs": {"diff_ids": []},
            "history": [{"created": old, "empty_layer": true}, {"empty_layer": true}, 7]}))
        .expect("a config");
        config.rewrite_times(|time| (time == old).then(|| "1970-01-01T00:00:00Z".to_owned()));
        assert_eq!(config.created(), Some("1970-01-01T00:00:00Z"));
        assert_eq!(config.history()[0].created.as_deref(), Some("1970-01-01T00:00:00Z"));
        assert_eq!(config.history()[1].created, None);
    }

    #[test]
    fn the_platform_is_read_where_the_config_says_it() {
        let config = parse(
            &json!({"os": "linux", "architecture": "arm", "variant": "v7", "rootfs": {"diff_ids": []}}),
        );
        assert_eq!(config.expect("a config").platform().expect("a platform").to_string(), "linux/arm/v7");
        assert_eq!(parse(&json!({"rootfs": {"diff_ids": []}})).expect("a config").platform(), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = ImageConfig::parse(&bytes);
        }

        #[test]
        fn a_complete_config_reads_back_as_itself(layers in 0..20_usize, keys in proptest::collection::btree_map("[a-z]{1,8}", any::<i64>(), 0..8)) {
            let raw: Map<String, Value> = keys.into_iter()
                .filter(|(key, _)| !["rootfs", "history"].contains(&key.as_str()))
                .map(|(key, value)| (key, value.into())).collect();
            let mut config = ImageConfig::incomplete(raw, layers);
            for index in (0..layers).rev() {
                config.patch_diff_id(index, Digest::sha256(index.to_le_bytes())).expect("it has the layer");
            }
            let bytes = config.to_bytes().expect("complete");
            let again = ImageConfig::parse(&bytes).expect("a config");
            prop_assert_eq!(again.diff_ids(), config.diff_ids());
            prop_assert_eq!(again.to_bytes().expect("complete"), bytes);
        }
    }
}
