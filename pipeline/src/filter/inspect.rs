//! `inspect`: records each layer's digest and size as they are where the filter stands in the chain.
//!
//! One line of JSON per image is appended to a file, or, where that is `-`, printed. Its fields are the Python tool's (`Comment`, `Created`, `CreatedBy`,
//! `Id`, `Size`, `Tags`, newest layer first, tags on the first only) and two more: `DiffId`, which is the same as `Id`, and
//! `Digest`, the digest under which the source stores the layer, or null once a filter has edited it.
//!
//! `Id` is always the digest of the uncompressed tar as it would be written at this point. The Python tool's is the name that
//! its source gave the layer: before any rewriting filter, that is the digest of the compressed blob for a registry; and
//! a filter that rewrites changes it even when no member was edited, because that tool encodes every member anew.

use std::path::PathBuf;
use std::sync::Arc;

use super::{
    Filter, FilterError, FilterKind, Finish, ImageFindings, Key, LayerFilter, OutputFormat, Rendering,
    Report, Target, Targets, Verdict,
};
use crate::digest::Digest;
use crate::layer::Keep;
use crate::tar::{Limits, Member};

/// In the list of filters.
pub static KIND: FilterKind = FilterKind {
    name: "inspect",
    help: "append each layer's digest, size and history at this point of the chain to a JSONL file",
    keys: &[Key { names: &["file"], value: "PATH", help: "the file to append to; - is standard output" }],
    parse: |options| Ok(Arc::new(Inspect { file: options.required("file")?.into() })),
};

/// The filter.
#[derive(Debug)]
pub struct Inspect {
    file: PathBuf,
}

/// One layer where the filter stands.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// Of the tar as it would be written.
    pub diff_id: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Whether a filter before this one edited the layer.
    pub edited: bool,
}

impl Filter for Inspect {
    fn spec(&self) -> String {
        format!("inspect:file={}", self.file.display())
    }

    fn edits(&self) -> bool {
        false
    }

    fn taps(&self) -> bool {
        true
    }

    fn file(&self) -> Option<&std::path::Path> {
        (self.file.as_os_str() != "-").then_some(&*self.file)
    }

    fn layer(&self, _targets: &Targets, _limits: &Limits) -> Box<dyn LayerFilter> {
        Box::new(Tap)
    }

    fn render(&self, image: &ImageFindings<'_>, _format: OutputFormat) -> Option<Rendering> {
        let to = self.file().map_or(Target::Stdout, |file| Target::Append(file.to_owned()));
        Some(Rendering { to, text: line(image) })
    }
}

/// Sees nothing: the pass itself measures what flows by.
struct Tap;

impl LayerFilter for Tap {
    fn member(&mut self, _member: &mut Member, _keep: &mut Keep) -> Result<Verdict, FilterError> {
        Ok(Verdict::Keep)
    }

    fn finish(self: Box<Self>) -> Finish {
        Finish::default()
    }
}

#[derive(serde::Serialize)]
struct Line {
    layers: Vec<Layer>,
    name: String,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "PascalCase")]
struct Layer {
    comment: String,
    created: i64,
    created_by: String,
    diff_id: Option<Digest>,
    digest: Option<Digest>,
    id: Option<Digest>,
    size: u64,
    tags: Option<Vec<String>>,
}

/// The line for an image, with its line feed.
pub fn line(image: &ImageFindings<'_>) -> String {
    let name = match image.tag {
        "" => image.image.to_owned(),
        tag => format!("{}:{tag}", image.image),
    };
    let history = image.config.get("history").and_then(|history| history.as_array());
    let mut history = history
        .into_iter()
        .flatten()
        .filter(|entry| !entry.get("empty_layer").and_then(serde_json::Value::as_bool).unwrap_or(false));
    let mut layers: Vec<Layer> = image
        .layers
        .iter()
        .map(|layer| {
            let entry = history.next();
            let text = |key| {
                let value = entry.and_then(|entry| entry.get(key)).and_then(serde_json::Value::as_str);
                value.unwrap_or_default().to_owned()
            };
            let record = match layer.report {
                Some(Report::Inspect(record)) => Some(record),
                _ => None,
            };
            let diff_id = record.map(|record| record.diff_id.clone());
            Layer {
                comment: text("comment"),
                created: entry.and_then(|entry| entry.get("created")).map_or(0, created),
                created_by: text("created_by"),
                id: diff_id.clone(),
                diff_id,
                digest: layer.digest.filter(|_| !record.is_some_and(|record| record.edited)).cloned(),
                size: record.map_or(0, |record| record.size),
                tags: None,
            }
        })
        .collect();
    layers.reverse();
    if let Some(newest) = layers.first_mut().filter(|_| !name.is_empty()) {
        newest.tags = Some(vec![name.clone()]);
    }
    let mut line =
        serde_json::to_string(&Line { layers, name }).expect("strings and numbers are always JSON");
    line.push('\n');
    line
}

/// Seconds since 1970; zero for what is no time, as the Python tool has it.
fn created(value: &serde_json::Value) -> i64 {
    match value {
        serde_json::Value::String(text) => text.parse::<jiff::Timestamp>().map_or(0, |time| time.as_second()),
        value => value.as_i64().unwrap_or(0),
    }
}
