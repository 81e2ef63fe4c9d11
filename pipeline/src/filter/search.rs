//! `search`: finds members by name, changes nothing.
//!
//! A glob is matched against the path and against its last component, a regular expression is searched for in the path. What
//! is listed and how it is printed is the Python tool's: every member whose name matches, whiteouts included, under the name
//! that the tar gives it without a trailing `/`.

use std::fmt::Write as _;
use std::sync::Arc;

use super::glob::Patterns;
use super::{
    Filter, FilterError, FilterKind, Finish, ImageFindings, Key, LayerFilter, OutputFormat, Rendering,
    Report, Target, Targets, Verdict,
};
use crate::layer::Keep;
use crate::tar::{self, Limits, Member, path};

/// Bytes of a compiled regular expression. A few of them, `\w{60}` is one, need most of it and take a while to compile: no text of any
/// length may take longer.
const COMPILED_MAX: usize = 4 * 1024 * 1024;

/// In the list of filters.
pub static KIND: FilterKind = FilterKind {
    name: "search",
    help: "list the files whose path or name matches, and change nothing",
    keys: &[
        Key { names: &["pattern"], value: "PATTERN", help: "a glob for the path or its last component" },
        Key { names: &["regex"], value: "true|false", help: "the pattern is a regular expression" },
        Key {
            names: &["script-friendly", "script_friendly"],
            value: "true|false",
            help: "print image:tag:layer:path, one match a line",
        },
    ],
    parse: |options| {
        let pattern = options.required("pattern")?;
        let filter = Search::new(pattern, options.flag("regex")?, options.flag("script-friendly")?)
            .map_err(|reason| options.invalid("pattern", pattern, &reason))?;
        Ok(Arc::new(filter))
    },
};

/// The filter.
#[derive(Debug)]
pub struct Search {
    matcher: Matcher,
    script_friendly: bool,
}

impl Search {
    /// Searches for a glob, or for a regular expression; an error says why the pattern is neither.
    pub fn new(pattern: &str, regex: bool, script_friendly: bool) -> Result<Self, String> {
        let matcher = if regex {
            let regex = regex::bytes::RegexBuilder::new(pattern).size_limit(COMPILED_MAX).build();
            Matcher::Regex(regex.map_err(|error| error.to_string())?)
        } else if pattern.is_empty() {
            return Err("it is empty, which no path matches".to_owned());
        } else {
            Matcher::Glob(Patterns::one(pattern).map_err(|error| error.to_string())?)
        };
        Ok(Self { matcher, script_friendly })
    }
}

#[derive(Clone, Debug)]
enum Matcher {
    Glob(Patterns),
    Regex(regex::bytes::Regex),
}

/// What was found in a layer, in the order of its tar.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hits {
    /// The members that matched.
    pub hits: Vec<Hit>,
}

/// A member that matched.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hit {
    /// Its name, safe to print.
    pub path: String,
    /// What it is.
    #[serde(flatten)]
    pub kind: HitKind,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum HitKind {
    /// A regular file.
    File {
        /// In bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where to, safe to print.
        target: String,
    },
    /// A hard link.
    Hardlink {
        /// Where to, safe to print.
        target: String,
    },
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// Something else.
    Unknown,
}

impl Matcher {
    fn matches(&self, path: &[u8], cleaned: &[u8]) -> bool {
        match self {
            Self::Glob(glob) => {
                glob.matches(cleaned)
                    || glob.matches(path::basename(cleaned))
                    || (path != cleaned && glob.matches(path))
            }
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

impl Filter for Search {
    fn spec(&self) -> String {
        let (pattern, regex) = match &self.matcher {
            Matcher::Glob(glob) => (glob.text(), ""),
            Matcher::Regex(regex) => (regex.as_str(), ":regex=true"),
        };
        let script_friendly = if self.script_friendly { ":script-friendly=true" } else { "" };
        format!("search:pattern={pattern}{regex}{script_friendly}")
    }

    fn edits(&self) -> bool {
        false
    }

    fn layer(&self, _targets: &Targets, limits: &Limits) -> Box<dyn LayerFilter> {
        Box::new(Layer {
            matcher: self.matcher.clone(),
            limit: limits.report,
            used: 0,
            cleaned: Vec::new(),
            hits: Hits::default(),
        })
    }

    fn render(&self, image: &ImageFindings<'_>, format: OutputFormat) -> Option<Rendering> {
        let text = match format {
            OutputFormat::Json => json(image),
            OutputFormat::Text if self.script_friendly => script_friendly(image),
            OutputFormat::Text => text(image),
        };
        Some(Rendering { to: Target::Stdout, text })
    }
}

struct Layer {
    matcher: Matcher,
    limit: usize,
    used: usize,
    cleaned: Vec<u8>,
    hits: Hits,
}

impl LayerFilter for Layer {
    fn member(&mut self, member: &mut Member, _keep: &mut Keep) -> Result<Verdict, FilterError> {
        if member.is_global() {
            return Ok(Verdict::Keep);
        }
        path::clean(member.path(), &mut self.cleaned);
        let path = trim_slashes(member.path());
        if self.matcher.matches(path, &self.cleaned) {
            let hit = Hit { path: path::printable(path), kind: kind(member) };
            self.used += size_of::<Hit>() + path.len() + member.link().len();
            if self.used > self.limit {
                return Err(FilterError::Memory { filter: KIND.name, limit: self.limit });
            }
            self.hits.hits.push(hit);
        }
        Ok(Verdict::Keep)
    }

    fn finish(self: Box<Self>) -> Finish {
        Finish { report: Some(Report::Search(self.hits)), ..Finish::default() }
    }
}

fn trim_slashes(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    &path[..end]
}

fn kind(member: &Member) -> HitKind {
    let target = || path::printable(member.link());
    match member.kind() {
        tar::Kind::Regular => HitKind::File { size: member.size() },
        tar::Kind::Symlink => HitKind::Symlink { target: target() },
        tar::Kind::HardLink => HitKind::Hardlink { target: target() },
        tar::Kind::Directory => HitKind::Directory,
        tar::Kind::Fifo => HitKind::Fifo,
        tar::Kind::CharacterDevice => HitKind::CharacterDevice,
        tar::Kind::BlockDevice => HitKind::BlockDevice,
        tar::Kind::Global | tar::Kind::Other(_) => HitKind::Unknown,
    }
}

/// The hits of each layer that has some. A layer that stands twice is one group, as in the Python tool.
fn groups<'a>(image: &ImageFindings<'a>) -> Vec<(&'a str, Vec<&'a Hit>)> {
    let mut groups: Vec<(&str, Vec<&Hit>)> = Vec::new();
    for layer in image.layers {
        let Some(Report::Search(Hits { hits })) = layer.report else { continue };
        if hits.is_empty() {
            continue;
        }
        match groups.iter_mut().find(|(hex, _)| *hex == layer.hex) {
            Some((_, group)) => group.extend(hits),
            None => groups.push((layer.hex, hits.iter().collect())),
        }
    }
    groups
}

/// For people.
pub fn text(image: &ImageFindings<'_>) -> String {
    let groups = groups(image);
    if groups.is_empty() {
        return "No matches found.\n".to_owned();
    }
    let mut text = String::new();
    let mut found = 0;
    for (hex, hits) in &groups {
        let _ = writeln!(text, "Layer: {hex}");
        found += hits.len();
        for Hit { path, kind } in hits {
            let _ = match kind {
                HitKind::File { size } => writeln!(text, "  {path} (file, {size} bytes)"),
                HitKind::Symlink { target } => writeln!(text, "  {path} -> {target} (symlink)"),
                HitKind::Hardlink { target } => writeln!(text, "  {path} -> {target} (hardlink)"),
                HitKind::Directory => writeln!(text, "  {path} (directory)"),
                HitKind::Fifo => writeln!(text, "  {path} (fifo)"),
                HitKind::CharacterDevice => writeln!(text, "  {path} (character device)"),
                HitKind::BlockDevice => writeln!(text, "  {path} (block device)"),
                HitKind::Unknown => writeln!(text, "  {path} (unknown)"),
            };
        }
        text.push('\n');
    }
    let (matches, layers) = (if found == 1 { "" } else { "es" }, if groups.len() == 1 { "" } else { "s" });
    let _ = writeln!(text, "Found {found} match{matches} in {} layer{layers}.", groups.len());
    text
}

/// `image:tag:layer:path`, one match a line.
pub fn script_friendly(image: &ImageFindings<'_>) -> String {
    let (name, tag) = (path::printable(image.image.as_bytes()), path::printable(image.tag.as_bytes()));
    let mut text = String::new();
    for layer in image.layers {
        let Some(Report::Search(Hits { hits })) = layer.report else { continue };
        for hit in hits {
            let _ = writeln!(text, "{name}:{tag}:{}:{}", layer.hex, hit.path);
        }
    }
    text
}

/// For programs: one object a line.
pub fn json(image: &ImageFindings<'_>) -> String {
    let layers: Vec<_> = image
        .layers
        .iter()
        .filter_map(|layer| match layer.report {
            Some(Report::Search(Hits { hits })) if !hits.is_empty() => {
                Some(serde_json::json!({ "layer": layer.hex, "matches": hits }))
            }
            _ => None,
        })
        .collect();
    format!("{}\n", serde_json::json!({ "image": image.image, "tag": image.tag, "layers": layers }))
}
