//! Which tags of a repository are wanted.

use std::collections::BTreeSet;

use super::config::{Mirror, Selection};
use crate::catalog::sort_by_version;

impl Mirror {
    /// Whether the source has to list its tags before it is known which are wanted.
    pub(super) fn needs_list(&self) -> bool {
        self.deletion.is_some() || self.tags.is_empty() || !self.tags.iter().all(Selection::is_names)
    }

    /// The wanted tags, sorted as people count, of those that the source lists. What is named is wanted in any case.
    pub(super) fn wanted(&self, listed: &[String]) -> Vec<String> {
        let mut wanted: BTreeSet<String> = BTreeSet::new();
        if self.tags.is_empty() {
            wanted.extend(listed.iter().filter(|tag| !is_called_like_a_digest(tag)).cloned());
        }
        for selection in &self.tags {
            wanted.extend(selection.choose(listed));
        }
        let mut wanted: Vec<String> = wanted.into_iter().collect();
        sort_by_version(&mut wanted);
        wanted
    }

    /// Whether a tag of a source would be wanted if it were there, whatever is newer.
    pub(super) fn could_want(&self, tag: &str) -> bool {
        let is_selected = self.tags.is_empty() || self.tags.iter().any(|selection| selection.matches(tag));
        is_selected && !is_called_like_a_digest(tag)
    }
}

impl Selection {
    fn choose(&self, listed: &[String]) -> Vec<String> {
        if self.is_names() {
            return self.names.iter().map(ToString::to_string).collect();
        }
        let matching = listed.iter().filter(|tag| self.matches(tag) && !is_called_like_a_digest(tag));
        let mut chosen: Vec<String> = matching.cloned().collect();
        if let Some(newest) = self.newest {
            // Of what is no version nobody can say how new it is.
            chosen.retain(|tag| is_version(tag));
            sort_by_version(&mut chosen);
            chosen.drain(..chosen.len().saturating_sub(newest));
        }
        chosen
    }

    fn matches(&self, tag: &str) -> bool {
        let has_patterns = !self.names.is_empty() || !self.globs.is_empty() || !self.regexes.is_empty();
        let is_called = self.names.iter().any(|name| name.as_str() == tag)
            || self.globs.is_match(tag)
            || self.regexes.is_match(tag);
        (is_called || !has_patterns)
            && (self.semver.is_empty() || self.semver.iter().any(|range| range.contains(tag)))
            && !self.exclude.is_match(tag)
            && !self.exclude_regexes.is_match(tag)
    }
}

fn is_version(tag: &str) -> bool {
    tag.strip_prefix(['v', 'V']).unwrap_or(tag).starts_with(|first: char| first.is_ascii_digit())
}

/// `sha256-HEX`, `sha256-HEX.sig`: what clients keep beside a manifest under the name of its digest. It goes with its manifest,
/// and is no image of its own.
pub(super) fn is_called_like_a_digest(tag: &str) -> bool {
    let Some((algorithm, hex)) = tag.split_once('-') else { return false };
    let hex = hex.split('.').next().unwrap_or_default();
    ["sha256", "sha512"].contains(&algorithm)
        && hex.len() >= 64
        && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::super::config::Config;

    const LISTED: [&str; 12] = [
        "latest",
        "edge",
        "1.9",
        "1.10",
        "1.10-rc1",
        "1.11",
        "2.0",
        "v2.1",
        "2.1-musl",
        "nightly-2026",
        "3.0-beta",
        "sha256-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.sig",
    ];

    #[track_caller]
    fn check(tags: &str, expected: &[&str]) {
        let text = format!("mirrors: [{{sources: [a.example/x], targets: [b.example/x], tags: {tags}}}]");
        let config = Config::parse(&text).unwrap();
        let listed = LISTED.map(str::to_owned);
        assert_eq!(config.mirrors[0].wanted(&listed), expected, "{tags}");
    }

    #[test]
    fn tags_are_selected_by_what_is_said_of_them() {
        check("[{names: [latest, gone]}]", &["gone", "latest"]);
        check("[{globs: ['1.*']}]", &["1.9", "1.10-rc1", "1.10", "1.11"]);
        check("[{globs: ['1.*'], exclude: ['*-rc*']}]", &["1.9", "1.10", "1.11"]);
        check("[{regexes: ['\\d+\\.\\d+']}]", &["1.9", "1.10", "1.11", "2.0"]);
        check("[{semver: ['>=1.10, <3']}]", &["1.10", "1.11", "2.0", "v2.1"]);
        check("[{newest: 2, exclude_regexes: ['.*-.*']}]", &["2.0", "v2.1"]);
        check("[{globs: ['1.*'], names: [edge], semver: ['<1.11']}]", &["1.9", "1.10"]);
        check("[{names: [latest]}, {semver: ['1'], newest: 1}]", &["1.11", "latest"]);
    }

    #[test]
    fn all_tags_are_wanted_where_nothing_is_said_but_for_those_of_digests() {
        let config = Config::parse("mirrors: [{sources: [a.example/x], targets: [b.example/x]}]").unwrap();
        let listed = LISTED.map(str::to_owned);
        assert_eq!(config.mirrors[0].wanted(&listed).len(), LISTED.len() - 1);
    }
}
