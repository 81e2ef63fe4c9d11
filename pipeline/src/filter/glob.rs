//! The glob patterns of `exclude` and `search`.
//!
//! `*` and `?` match any characters, `/` included, as the Python tool's `fnmatch` has it: `*.pyc` matches at any depth.
//! Beyond that, `**/` matches any number of directories, none included, `/**` everything below a directory, and `{a,b}`
//! either. `?` and `[...]` match one byte. A pattern is matched against a cleaned path; a `/` or `./` before it and a `/`
//! behind it are ignored.

use globset::{Candidate, GlobBuilder, GlobSet, GlobSetBuilder};

/// Patterns of which one must match.
#[derive(Clone, Debug)]
pub(super) struct Patterns {
    set: GlobSet,
    text: String,
}

impl Patterns {
    /// One pattern, for whole paths.
    pub(super) fn one(pattern: &str) -> Result<Self, globset::Error> {
        Self::new(&[pattern], false)
    }

    /// Patterns separated by commas, for paths and everything below them. A comma between braces belongs to its pattern.
    pub(super) fn subtrees(patterns: &str) -> Result<Self, globset::Error> {
        let mut depth = 0_usize;
        let parts: Vec<&str> = patterns
            .split(|character| {
                match character {
                    '{' => depth += 1,
                    '}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                character == ',' && depth == 0
            })
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .collect();
        Self::new(&parts, true)
    }

    fn new(patterns: &[&str], subtrees: bool) -> Result<Self, globset::Error> {
        let mut set = GlobSetBuilder::new();
        for pattern in patterns {
            let below_root = pattern.trim_start_matches("./").trim_start_matches('/');
            let cleaned = below_root.strip_suffix('/').unwrap_or(below_root);
            let glob =
                |text: &str| GlobBuilder::new(text).literal_separator(false).backslash_escape(true).build();
            set.add(glob(cleaned)?);
            if subtrees {
                set.add(glob(&format!("{cleaned}/**"))?);
            }
        }
        Ok(Self { set: set.build()?, text: patterns.join(",") })
    }

    /// Whether one of them matches.
    pub(super) fn matches(&self, path: &[u8]) -> bool {
        self.set.is_match_candidate(&Candidate::from_bytes(path))
    }

    /// As they were given.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.set.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_cross_directories_as_in_the_python_tool() {
        let check = |pattern: &str, path: &str, expected: bool| {
            assert_eq!(
                Patterns::subtrees(pattern).unwrap().matches(path.as_bytes()),
                expected,
                "{pattern} {path}"
            );
        };
        check("*.pyc", "a/b/c.pyc", true);
        check("*.pyc", "c.pyc", true);
        check("*.pyc", "c.py", false);
        check("*/__pycache__/*", "usr/lib/python3/__pycache__/x.pyc", true);
        check("core", "core", true);
        check("core", "usr/core", false);
        check("**/core", "core", true);
        check("**/.git/**", ".git/config", true);
        check("**/.git/**", "src/.git/refs/heads", true);
        check("**/.git/**", "src/.git", false);
        check("/etc/passwd", "etc/passwd", true);
        check("./etc/*", "etc/a/b", true);
        check("*.{pyc,pyo},*.log", "a.pyo", true);
        check("*.{pyc,pyo},*.log", "a.log", true);
        check("[!a]*", "b", true);
        check("[!a]*", "a", false);
        check("A", "a", false);
        check("a", "a/b\nc/d", true);
        check("a", "ab/c", false);
        check("{a,b}", "b/c", true);
        check("*.d", "etc/conf.d/file", true);
        check("etc/**", "etc/a/b", true);
        check("[!a]*/x", "b/x/y", true);
        assert!(Patterns::subtrees("f?o").unwrap().matches(b"f\xffo"));
    }
}
