//! What filters found, as it travels with a layer and is printed at the end.

use std::path::PathBuf;

use super::{exclude, inspect, normalize_timestamps, search};
use crate::digest::Digest;

/// What one filter found in one layer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "filter", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Report {
    /// Of `normalize-timestamps`.
    NormalizeTimestamps(normalize_timestamps::Counts),
    /// Of `exclude`.
    Exclude(exclude::Counts),
    /// Of `search`.
    Search(search::Hits),
    /// Of `inspect`.
    Inspect(inspect::Record),
    /// Of a filter that is none of ours: what is printed.
    Other {
        /// Whole lines.
        text: String,
    },
}

/// What one filter found in all layers of an image, and what is known of the image where the filter stands.
#[derive(Clone, Debug)]
pub struct ImageFindings<'a> {
    /// The image's name without its tag.
    pub image: &'a str,
    /// Its tag.
    pub tag: &'a str,
    /// The config with what the filters before this one changed.
    pub config: &'a serde_json::Value,
    /// In the order of the manifest.
    pub layers: &'a [LayerFindings<'a>],
}

/// What one filter found in one layer.
#[derive(Clone, Debug)]
pub struct LayerFindings<'a> {
    /// The hex by which the layer is shown to people.
    pub hex: &'a str,
    /// The digest under which the source stores the layer.
    pub digest: Option<&'a Digest>,
    /// The report; a layer that was not looked at has none.
    pub report: Option<&'a Report>,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Something to print or write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendering {
    /// Where to.
    pub to: Target,
    /// Whole lines.
    pub text: String,
}

/// Where a result goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// The end of a file, which is created where it is missing.
    Append(PathBuf),
}
