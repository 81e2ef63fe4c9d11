//! What is mirrored where: the file, as people write it, and what it means.
//!
//! The file is YAML. What is wrong with it is told with line and column, before anything is asked of a registry. Its schema is
//! [`SCHEMA`], which a test holds to this parser.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use regex::RegexSet;
use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::range::Range;
use super::schedule::{self, Schedule};
use super::template::{self, Template};
use crate::copy::SignaturePolicy;
use crate::filter::{self, Filter, FilterChain};
use crate::index::Attestations;
use crate::open::names_registry;
use crate::platform::Platform;
use crate::reference::{Reference, RegistryName, Tag};

/// The JSON schema of the file.
pub const SCHEMA: &str = include_str!("schema.json");

/// What is mirrored where.
#[derive(Clone, Debug)]
pub struct Config {
    /// In the file's order, at least one.
    pub mirrors: Vec<Mirror>,
    /// When they are made by themselves, which a coordinator sees to.
    pub schedule: Option<Schedule>,
}

/// Some repositories, the tags of them that are wanted, and where they go.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Where it stands in the file, the first being 1.
    pub line: u64,
    /// At least one.
    pub sources: Vec<Source>,
    /// Repositories of a catalog that are left out.
    pub exclude_repositories: GlobSet,
    /// At least one.
    pub targets: Vec<Target>,
    /// A tag is wanted that one of them selects; all, where there is none.
    pub tags: Vec<Selection>,
    /// Of an index, these platforms alone; all, where none is named.
    pub platforms: Vec<Platform>,
    /// Keep an index as it is although not all of its platforms are copied.
    pub sparse: bool,
    /// Copy what names the manifests as its subject; of images that pass filters, those that these leave as they are.
    pub referrers: bool,
    /// The filters that every image passes, all of which edit.
    pub filters: FilterChain,
    /// What becomes of the attestations of images that filters change.
    pub attestations: Attestations,
    /// What becomes of the signatures of what changes on its way.
    pub signatures: SignaturePolicy,
    /// Put a statement of how it was made beside every image that passes filters.
    pub provenance: bool,
    /// The tag that a target's manifest gets before its own tag is given to another.
    pub backup: Option<Template>,
    /// Tags of targets that are never given to another manifest, nor deleted, once they are there.
    pub immutable: GlobSet,
    /// Delete the tags that the source lost, if they are no more than so many.
    pub deletion: Option<usize>,
}

/// Where images come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// One repository. Its tag says nothing.
    Repository(Reference),
    /// The repositories of a registry's catalog whose paths match.
    Catalog(RegistryName, GlobSet),
}

/// Where images go: a repository's name with a tag, in which `{registry}`, `{repository}`, `{name}` and `{tag}` stand for the
/// source's.
#[derive(Clone, Debug)]
pub struct Target {
    /// The registry.
    pub host: String,
    /// `HOST/REPOSITORY`.
    pub repository: Template,
    /// The tag.
    pub tag: Template,
}

/// Which tags of a repository: those with a name or pattern that is given, within one of the ranges, without what is excluded,
/// and of these the newest.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Exactly these.
    pub names: Vec<Tag>,
    /// The whole tag.
    pub globs: GlobSet,
    /// The whole tag.
    pub regexes: RegexSet,
    /// One of these; any tag, where there is none.
    pub semver: Vec<Range>,
    /// Not these.
    pub exclude: GlobSet,
    /// Nor these.
    pub exclude_regexes: RegexSet,
    /// So many versions, the highest.
    pub newest: Option<usize>,
}

/// What is wrong with the file, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", Place(*line, *column))]
pub struct ConfigError {
    /// The first is 1; 0 where it is not known.
    pub line: u64,
    /// In characters, the first is 1; 0 where it is not known.
    pub column: u64,
    /// What is wrong.
    pub problem: String,
}

struct Place(u64, u64);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(0, _) => Ok(()),
            Self(line, column) => write!(f, "line {line}, column {column}: "),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mirrors: Vec<Spanned<Entry>>,
    schedule: Option<Spanned<schedule::Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    sources: Vec<Spanned<String>>,
    #[serde(default)]
    exclude_repositories: Vec<Spanned<String>>,
    targets: Vec<Spanned<String>>,
    #[serde(default)]
    tags: Vec<Spanned<Tags>>,
    #[serde(default)]
    platforms: Vec<Spanned<String>>,
    sparse: Option<Spanned<bool>>,
    #[serde(default)]
    referrers: bool,
    #[serde(default)]
    filters: Vec<Spanned<String>>,
    attestations: Option<StaleAttestations>,
    signatures: Option<Signatures>,
    provenance: Option<Spanned<bool>>,
    backup: Option<Spanned<String>>,
    #[serde(default)]
    immutable: Vec<Spanned<String>>,
    deletion: Option<Deletion>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Signatures {
    Refuse,
    Drop,
    Keep,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum StaleAttestations {
    Drop,
    Retarget,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Deletion {
    max: Spanned<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tags {
    #[serde(default)]
    names: Vec<Spanned<String>>,
    #[serde(default)]
    globs: Vec<Spanned<String>>,
    #[serde(default)]
    regexes: Vec<Spanned<String>>,
    #[serde(default)]
    semver: Vec<Spanned<String>>,
    #[serde(default)]
    exclude: Vec<Spanned<String>>,
    #[serde(default)]
    exclude_regexes: Vec<Spanned<String>>,
    newest: Option<Spanned<usize>>,
}

impl Config {
    /// What a file says.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let file: File = parse_yaml(text)?;
        if file.mirrors.is_empty() {
            return Err(ConfigError { line: 1, column: 1, problem: "there is nothing to mirror".to_owned() });
        }
        let mirrors = file.mirrors.into_iter().map(Mirror::of).collect::<Result<_, _>>()?;
        Ok(Self { mirrors, schedule: file.schedule.map(Schedule::of).transpose()? })
    }

    /// The registries that images come from, each once, sorted.
    pub fn source_hosts(&self) -> Vec<String> {
        let hosts = self.mirrors.iter().flat_map(|mirror| &mirror.sources).map(Source::host);
        hosts.collect::<BTreeSet<_>>().into_iter().map(str::to_owned).collect()
    }

    /// The registries that images go to, each once, sorted.
    pub fn target_hosts(&self) -> Vec<String> {
        let hosts = self.mirrors.iter().flat_map(|mirror| &mirror.targets).map(|target| target.host.clone());
        hosts.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// What the parser says of its own types, and what that means to whoever writes the file.
const MEANT: [(&str, &str); 6] = [
    ("expected sequence start", "a list belongs here: [a, b]"),
    ("expected mapping start", "a mapping of keys to values belongs here"),
    ("expected string scalar", "text belongs here"),
    ("externally tagged enum expected scalar or mapping", "a single word belongs here"),
    ("invalid boolean", "true or false belongs here"),
    ("invalid u64", "a whole number belongs here"),
];

/// A YAML document, or what is wrong with it and where.
pub(super) fn parse_yaml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, ConfigError> {
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let place = error.location();
        let (line, column) = place.map_or((0, 0), |place| (place.line(), place.column()));
        let said = error.without_snippet().render_with_formatter(&serde_saphyr::UserMessageFormatter);
        // It says the place too, in its own form.
        let problem = said.split_once(" at line ").map_or(&*said, |(problem, _)| problem);
        let meant = MEANT.iter().find(|(words, _)| *words == problem);
        let problem = meant.map_or(problem, |(_, meant)| meant).to_owned();
        ConfigError { line, column, problem }
    })
}

pub(super) fn fail(at: Location, problem: impl Into<String>) -> ConfigError {
    ConfigError { line: at.line(), column: at.column(), problem: problem.into() }
}

impl Mirror {
    fn of(entry: Spanned<Entry>) -> Result<Self, ConfigError> {
        let Spanned { value: entry, referenced: at, .. } = entry;
        for (key, given) in [("sources", entry.sources.len()), ("targets", entry.targets.len())] {
            if given == 0 {
                return Err(fail(at, format!("{key} names nothing")));
            }
        }
        let sources = entry.sources.iter().map(source).collect::<Result<Vec<_>, _>>()?;
        let tags = entry.tags.into_iter().map(Selection::of).collect::<Result<Vec<_>, _>>()?;
        let is_one = matches!(&*sources, [Source::Repository(_)]);
        let is_one_tag = matches!(&*tags, [one] if one.is_names() && one.names.len() == 1);
        let target = |text: &Spanned<String>| target(text, is_one, is_one_tag);
        let targets = entry.targets.iter().map(target).collect::<Result<_, _>>()?;
        let platform = |text: &Spanned<String>| {
            text.value.parse::<Platform>().map_err(|problem| fail(text.referenced, problem.to_string()))
        };
        let platforms = entry.platforms.iter().map(platform).collect::<Result<Vec<_>, _>>()?;
        let filters = entry.filters.iter().map(filter).collect::<Result<Vec<_>, _>>()?;
        let filters = FilterChain::new(filters);
        let is_filtered = !filters.is_empty();
        let sparse = entry.sparse.filter(|sparse| sparse.value);
        if entry.signatures.is_some() && !is_filtered && (sparse.is_some() || platforms.is_empty()) {
            return Err(fail(
                at,
                "signatures says nothing without filters or platforms, or with sparse: no manifest changes",
            ));
        }
        if let Some(sparse) = sparse.as_ref().filter(|_| is_filtered) {
            let problem = "sparse keeps an index that names images which are not copied, and one that filters rebuild can only name \
                           images that have passed them";
            return Err(fail(sparse.referenced, problem));
        }
        if entry.attestations.is_some() && !is_filtered {
            return Err(fail(at, "attestations says nothing without filters"));
        }
        let provenance = entry.provenance.filter(|provenance| provenance.value);
        if let Some(provenance) = provenance.as_ref().filter(|_| !is_filtered) {
            let problem =
                "provenance says nothing without filters: what is copied as it is was not made here";
            return Err(fail(provenance.referenced, problem));
        }
        if let Some(sparse) = sparse.as_ref().filter(|_| platforms.is_empty()) {
            return Err(fail(sparse.referenced, "sparse says nothing without platforms"));
        }
        Ok(Self {
            line: at.line(),
            sources,
            exclude_repositories: globs(&entry.exclude_repositories)?,
            targets,
            tags,
            platforms,
            sparse: sparse.is_some(),
            referrers: entry.referrers,
            filters,
            attestations: match entry.attestations {
                None | Some(StaleAttestations::Drop) => Attestations::Drop,
                Some(StaleAttestations::Retarget) => Attestations::Retarget,
            },
            signatures: match entry.signatures {
                None | Some(Signatures::Refuse) => SignaturePolicy::Refuse,
                Some(Signatures::Drop) => SignaturePolicy::Drop,
                Some(Signatures::Keep) => SignaturePolicy::Keep,
            },
            provenance: provenance.is_some(),
            backup: entry.backup.as_ref().map(backup).transpose()?,
            immutable: globs(&entry.immutable)?,
            deletion: entry.deletion.map(|deletion| at_least_one(&deletion.max)).transpose()?,
        })
    }
}

impl Source {
    /// Repositories as the file has them: `HOST`, `HOST/PATTERN`, `HOST/REPOSITORY`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        source(&Spanned::new(text.to_owned(), Location::UNKNOWN, Location::UNKNOWN))
    }

    /// The registry.
    pub fn host(&self) -> &str {
        match self {
            Self::Repository(reference) => reference.host(),
            Self::Catalog(registry, _) => registry.as_str(),
        }
    }
}

fn filter(text: &Spanned<String>) -> Result<Arc<dyn Filter>, ConfigError> {
    let at = text.referenced;
    let filter = filter::spec::parse(&text.value).map_err(|error| fail(at, error.to_string()))?;
    match filter.edits() {
        true => Ok(filter),
        false => Err(fail(at, format!("{} changes nothing, and is not for mirrors", filter.spec()))),
    }
}

/// What is named, without the scheme that may be written before it.
fn in_registry(text: &Spanned<String>) -> Result<&str, ConfigError> {
    let name = text.value.strip_prefix("registry://").unwrap_or(&text.value);
    match name.split_once("://") {
        None => Ok(name),
        Some((scheme, _)) => Err(fail(
            text.referenced,
            format!("{scheme}:// names no registry, and only registries are mirrored, to registries"),
        )),
    }
}

fn source(text: &Spanned<String>) -> Result<Source, ConfigError> {
    let at = text.referenced;
    let name = in_registry(text)?.trim_end_matches('/');
    let registry = |host: &str| host.parse::<RegistryName>().map_err(|error| fail(at, error.to_string()));
    if names_registry(name) {
        return Ok(Source::Catalog(registry(name)?, globs(&[Spanned::new("**".to_owned(), at, at)])?));
    }
    if name.contains(['*', '?', '[', '{']) {
        let Some((host, pattern)) = name.split_once('/').filter(|(host, _)| names_registry(host)) else {
            return Err(fail(at, format!("{name:?} is no HOST/PATTERN: only a registry has a catalog")));
        };
        return Ok(Source::Catalog(registry(host)?, globs(&[Spanned::new(pattern.to_owned(), at, at)])?));
    }
    let reference: Reference = name.parse().map_err(|error| fail(at, format!("{error}")))?;
    let last = name.rsplit('/').next().unwrap_or(name);
    if last.contains([':', '@']) {
        return Err(fail(
            at,
            format!("{name:?} is one image: write its repository here, and its tag in tags"),
        ));
    }
    Ok(Source::Repository(reference))
}

fn target(text: &Spanned<String>, is_one: bool, is_one_tag: bool) -> Result<Target, ConfigError> {
    let at = text.referenced;
    let name = in_registry(text)?;
    let (repository, tag) = match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') && repository.contains('/') => (repository, tag),
        _ => (name, "{tag}"),
    };
    let parse = |text: &str, known: &[&str]| Template::parse(text, known).map_err(|error| fail(at, error));
    let repository = parse(repository, &template::OF_REPOSITORY)?;
    let tag = parse(tag, &template::OF_TAG)?;
    let Some((host, _)) = name.split_once('/').filter(|(host, _)| !host.contains('{')) else {
        return Err(fail(at, format!("{name:?} is no HOST/REPOSITORY")));
    };
    let host: RegistryName = host.parse().map_err(|error| fail(at, format!("{error}")))?;
    // Whatever the source is called, what a target is called is known to be well formed only then; what it says itself is now.
    let example: Reference = "registry.example/a/b".parse().map_err(|error| fail(at, format!("{error}")))?;
    template::place(&repository, &tag, &example, "1").map_err(|error| fail(at, error.to_string()))?;
    if !is_one && !repository.has("repository") && !repository.has("name") {
        let problem =
            format!("several repositories would become {name:?}: write {{repository}} or {{name}} in it");
        return Err(fail(at, problem));
    }
    if !is_one_tag && !tag.has("tag") {
        return Err(fail(
            at,
            format!("several tags would become {name:?}: write {{tag}} in it, or no tag at all"),
        ));
    }
    Ok(Target { host: host.to_string(), repository, tag })
}

fn backup(text: &Spanned<String>) -> Result<Template, ConfigError> {
    let at = text.referenced;
    let template = Template::parse(&text.value, &template::OF_BACKUP).map_err(|error| fail(at, error))?;
    if !template.has("tag") {
        return Err(fail(at, "the backups of all tags would be one: write {tag} in it"));
    }
    if template.expand(&[("tag", "1"), ("digest", "0123456789ab")]).parse::<Tag>().is_err() {
        return Err(fail(at, format!("{:?} makes no tag", text.value)));
    }
    if template.is_bare() {
        return Err(fail(at, "a backup needs another name than the tag's own"));
    }
    Ok(template)
}

fn at_least_one(number: &Spanned<usize>) -> Result<usize, ConfigError> {
    match number.value {
        0 => Err(fail(number.referenced, "expected a number from 1")),
        number => Ok(number),
    }
}

impl Selection {
    fn of(tags: Spanned<Tags>) -> Result<Self, ConfigError> {
        let Spanned { value: tags, referenced: at, .. } = tags;
        let name = |text: &Spanned<String>| {
            let refused = |_| fail(text.referenced, format!("{:?} is no tag", text.value));
            text.value.parse::<Tag>().map_err(refused)
        };
        let range = |text: &Spanned<String>| {
            text.value.parse::<Range>().map_err(|problem| fail(text.referenced, problem))
        };
        let selection = Self {
            names: tags.names.iter().map(name).collect::<Result<_, _>>()?,
            globs: globs(&tags.globs)?,
            regexes: regexes(&tags.regexes)?,
            semver: tags.semver.iter().map(range).collect::<Result<_, _>>()?,
            exclude: globs(&tags.exclude)?,
            exclude_regexes: regexes(&tags.exclude_regexes)?,
            newest: tags.newest.as_ref().map(at_least_one).transpose()?,
        };
        if selection.names.is_empty() && selection.is_names() {
            return Err(fail(at, "nothing is said of the tags: leave it out to have them all"));
        }
        Ok(selection)
    }

    /// Whether it says no more than names, and no list of tags is needed to know what it selects.
    pub(super) fn is_names(&self) -> bool {
        let Self { names: _, globs, regexes, semver, exclude, exclude_regexes, newest } = self;
        let patterns = globs.len() + exclude.len() + regexes.len() + exclude_regexes.len() + semver.len();
        patterns == 0 && newest.is_none()
    }
}

/// `*` stands for anything but a `/`, `**` for anything.
fn globs(patterns: &[Spanned<String>]) -> Result<GlobSet, ConfigError> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let glob = GlobBuilder::new(&pattern.value).literal_separator(true).backslash_escape(true).build();
        set.add(glob.map_err(|error| fail(pattern.referenced, error.to_string()))?);
    }
    let at = patterns.first().map_or(Location::UNKNOWN, |first| first.referenced);
    set.build().map_err(|error| fail(at, error.to_string()))
}

/// Of whole tags.
fn regexes(patterns: &[Spanned<String>]) -> Result<RegexSet, ConfigError> {
    for pattern in patterns {
        if let Err(error) = regex::Regex::new(&pattern.value) {
            let problem = format!("{:?} is no regular expression: {}", pattern.value, last_line(&error));
            return Err(fail(pattern.referenced, problem));
        }
    }
    let at = patterns.first().map_or(Location::UNKNOWN, |first| first.referenced);
    let whole = patterns.iter().map(|pattern| format!("^(?:{})$", pattern.value));
    RegexSet::new(whole).map_err(|error| fail(at, last_line(&error)))
}

/// What a regular expression is wrong with, without the picture of it.
fn last_line(error: &regex::Error) -> String {
    let text = error.to_string();
    text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests;
