//! Ranges of versions, as people write them, and the versions that tags are.

use std::str::FromStr;

use semver::{Version, VersionReq};

/// A range of versions: `>=1.30, <2`, `1.2 - 1.4`, `~1.36 || ^2`. A version without an operator is that one alone, and one that
/// leaves parts out (`1.36`) stands for all that it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range(Vec<VersionReq>);

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |problem: String| format!("{text:?} is no range of versions: {problem}");
        let alternatives = text.split("||").map(|alternative| {
            VersionReq::parse(&comparators(alternative)).map_err(|error| fail(error.to_string()))
        });
        if text.trim().is_empty() {
            return Err(fail("it is empty".to_owned()));
        }
        alternatives.collect::<Result<_, _>>().map(Self)
    }
}

/// The comparators as [`VersionReq`] has them: divided by commas, each with its operator right before its version.
fn comparators(text: &str) -> String {
    const OPERATORS: [char; 6] = ['<', '>', '=', '~', '^', '!'];
    let mut found: Vec<String> = Vec::new();
    // What the next version has before it where it says nothing itself.
    let mut operator = "=".to_owned();
    for word in text.split([',', ' ', '\t']).filter(|word| !word.is_empty()) {
        let version = word.trim_start_matches(OPERATORS);
        let own = &word[..word.len() - version.len()];
        if let ("-", Some(first)) = (word, found.last_mut()) {
            // `1.2 - 1.4` is from the first to the last.
            *first = format!(">={}", first.trim_start_matches('='));
            "<=".clone_into(&mut operator);
        } else if version.is_empty() {
            own.clone_into(&mut operator);
        } else {
            let operator = std::mem::replace(&mut operator, "=".to_owned());
            let operator = if own.is_empty() { &operator } else { own };
            found.push(format!("{operator}{}", version.strip_prefix('v').unwrap_or(version)));
        }
    }
    found.join(", ")
}

impl Range {
    /// Whether a tag is a version within it. A pre-release (`2.0.0-rc1`, and by the same rule `1.36.1-musl`) is in a range only
    /// where a pre-release of the same version is named in it.
    pub fn contains(&self, tag: &str) -> bool {
        version(tag).is_some_and(|version| self.0.iter().any(|range| range.matches(&version)))
    }
}

/// The version that a tag is, with or without a `v` before it; parts that it leaves out are 0.
pub(super) fn version(tag: &str) -> Option<Version> {
    let text = tag.strip_prefix(['v', 'V']).unwrap_or(tag);
    let end = text.find(['-', '+']).unwrap_or(text.len());
    let (numbers, rest) = text.split_at(end);
    let missing = 2_usize.checked_sub(numbers.matches('.').count())?;
    Version::parse(&format!("{numbers}{}{rest}", ".0".repeat(missing))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(range: &str, inside: &[&str], outside: &[&str]) {
        let parsed: Range = range.parse().unwrap();
        for tag in inside {
            assert!(parsed.contains(tag), "{range}: {tag}");
        }
        for tag in outside {
            assert!(!parsed.contains(tag), "{range}: {tag}");
        }
    }

    #[test]
    fn tags_are_versions_within_ranges() {
        check(
            ">=1.30, <2",
            &["1.30", "1.36.1", "v1.30.0"],
            &["1.29.9", "2", "2.0.0-rc1", "latest", "1.31-musl"],
        );
        check(">= 3.12.0", &["3.12.0", "4"], &["3.11", "3.12.0-rc1"]);
        check(">=1.0.0 <2.0.0", &["1.5"], &["2.0.0", "0.9"]);
        check("1.2 - 1.4", &["1.2.0", "1.4", "1.4.9"], &["1.1", "1.5"]);
        check("~1.36 || ^2.1", &["1.36.9", "2.9"], &["1.37", "2.0", "3"]);
        check("1.36", &["1.36", "1.36.1"], &["1.37", "1.35"]);
        check("=1.36.1", &["1.36.1", "v1.36.1"], &["1.36.2"]);
        check(">=2.0.0-rc1", &["2.0.0-rc2", "2.0.0", "2.1"], &["2.0.0-beta1", "2.1.0-rc1"]);
        for wrong in ["", ">=x", "!=1.2", ">=1 ||", "1.2.3.4"] {
            assert!(wrong.parse::<Range>().unwrap_err().contains("no range"), "{wrong}");
        }
    }
}
