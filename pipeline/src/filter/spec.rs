//! The grammar of `-f`: `NAME[:key=value[:key=value | ,key=value]...]`.
//!
//! A `:` or `,` begins another option only where one of the filter's own keys and `=` follow it. Everything else belongs to
//! the value: `exclude:pattern=*.pyc,*.log` is one option with two patterns, and regular expressions may hold `,`, `:` and `=`.

use std::sync::Arc;

use super::{FILTERS, Filter};

/// A filter that can be named.
#[derive(Debug)]
pub struct FilterKind {
    /// Its name in `-f`.
    pub name: &'static str,
    /// One line for help.
    pub help: &'static str,
    /// Its options.
    pub keys: &'static [Key],
    /// Makes one from its options.
    pub parse: fn(&Options<'_>) -> Result<Arc<dyn Filter>, SpecError>,
}

/// An option of a filter.
#[derive(Debug)]
pub struct Key {
    /// Its name, and behind it what else it is called.
    pub names: &'static [&'static str],
    /// What stands for its value in help.
    pub value: &'static str,
    /// One line for help.
    pub help: &'static str,
}

/// The options given to one filter.
#[derive(Debug)]
pub struct Options<'a> {
    kind: &'static FilterKind,
    values: Vec<(&'static str, &'a str)>,
}

/// Why something given with `-f` is no filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// No filter has this name.
    #[error("unknown filter {name:?}: expected one of {known}")]
    UnknownFilter {
        /// What was given.
        name: String,
        /// All names.
        known: String,
    },
    /// The filter has no such option.
    #[error("filter {filter} has no option {key:?}: expected {known}")]
    UnknownKey {
        /// The filter's name.
        filter: &'static str,
        /// What was given.
        key: String,
        /// All its options.
        known: String,
    },
    /// An option was given twice.
    #[error("option {key} of filter {filter} is given twice")]
    Twice {
        /// The filter's name.
        filter: &'static str,
        /// The option's name.
        key: &'static str,
    },
    /// An option that the filter cannot do without is missing.
    #[error("filter {filter} needs {key}={value}")]
    Missing {
        /// The filter's name.
        filter: &'static str,
        /// The option's name.
        key: &'static str,
        /// What its value is.
        value: &'static str,
    },
    /// A value means nothing to its option.
    #[error("invalid value {value:?} for option {key} of filter {filter}: {reason}")]
    Value {
        /// The filter's name.
        filter: &'static str,
        /// The option's name.
        key: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Makes a filter from what was given with `-f`.
pub fn parse(text: &str) -> Result<Arc<dyn Filter>, SpecError> {
    let (name, rest) = match text.split_once(':') {
        Some((name, rest)) => (name, Some(rest)),
        None => (text, None),
    };
    let canonical = name.trim().to_ascii_lowercase().replace('_', "-");
    let kind = FILTERS.iter().find(|kind| kind.name == canonical).ok_or_else(|| {
        SpecError::UnknownFilter { name: name.to_owned(), known: join(FILTERS.iter().map(|kind| kind.name)) }
    })?;
    let options = Options::split(kind, rest.unwrap_or_default())?;
    (kind.parse)(&options)
}

impl<'a> Options<'a> {
    fn split(kind: &'static FilterKind, mut rest: &'a str) -> Result<Self, SpecError> {
        let mut values: Vec<(&'static str, &'a str)> = Vec::new();
        while !rest.trim().is_empty() {
            let Some((key, value)) = kind.option(rest) else {
                let end = rest.find(['=', ':', ',']).unwrap_or(rest.len());
                return Err(SpecError::UnknownKey {
                    filter: kind.name,
                    key: rest[..end].trim().to_owned(),
                    known: join(kind.keys.iter().map(|key| key.names[0])),
                });
            };
            if values.iter().any(|(given, _)| *given == key) {
                return Err(SpecError::Twice { filter: kind.name, key });
            }
            let next =
                value.match_indices([':', ',']).find(|(at, _)| kind.option(&value[at + 1..]).is_some());
            let end = next.map_or(value.len(), |(at, _)| at);
            values.push((key, value[..end].trim()));
            rest = next.map_or("", |(at, _)| &value[at + 1..]);
        }
        Ok(Self { kind, values })
    }

    /// The value of an option, by the first of its names.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        debug_assert!(self.kind.keys.iter().any(|known| known.names[0] == key));
        self.values.iter().find(|(given, _)| *given == key).map(|(_, value)| *value)
    }

    /// The value of an option that must be given and not be empty.
    pub fn required(&self, key: &str) -> Result<&'a str, SpecError> {
        self.get(key).filter(|value| !value.is_empty()).ok_or_else(|| {
            let key = self.key(key);
            SpecError::Missing { filter: self.kind.name, key: key.names[0], value: key.value }
        })
    }

    /// `true` or `false`, or what the Python tool takes for these; false where it is not given.
    pub fn flag(&self, key: &str) -> Result<bool, SpecError> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => match value.to_ascii_lowercase().as_str() {
                "true" | "yes" | "1" => Ok(true),
                "false" | "no" | "0" => Ok(false),
                _ => Err(self.invalid(key, value, &"expected true or false")),
            },
        }
    }

    /// The error for a value.
    pub fn invalid(&self, key: &str, value: &str, reason: &dyn std::fmt::Display) -> SpecError {
        let (filter, key) = (self.kind.name, self.key(key).names[0]);
        SpecError::Value { filter, key, value: value.to_owned(), reason: reason.to_string() }
    }

    fn key(&self, name: &str) -> &'static Key {
        self.kind.keys.iter().find(|key| key.names[0] == name).expect("filters ask for their own keys")
    }
}

impl FilterKind {
    /// The key and the rest, if an option of this filter stands at the beginning.
    fn option<'a>(&self, text: &'a str) -> Option<(&'static str, &'a str)> {
        let (name, value) = text.split_once('=')?;
        let name = name.trim();
        let key = self.keys.iter().find(|key| key.names.contains(&name))?;
        Some((key.names[0], value))
    }
}

fn join<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> String {
        parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).spec()
    }

    fn error(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_seeds_examples_parse() {
        for (text, canonical) in [
            ("normalize-timestamps", "normalize-timestamps:ts=0:mode=set"),
            ("normalize-timestamps:ts=1234567890", "normalize-timestamps:ts=1234567890:mode=set"),
            ("normalize_timestamps:timestamp=5,mode=clamp", "normalize-timestamps:ts=5:mode=clamp"),
            ("normalize-timestamps:mode=clamp:ts=5", "normalize-timestamps:ts=5:mode=clamp"),
            ("search:pattern=*.conf", "search:pattern=*.conf"),
            (r"search:pattern=\.sh$:regex=true", r"search:pattern=\.sh$:regex=true"),
            ("search:pattern=a,script-friendly=true", "search:pattern=a:script-friendly=true"),
            ("search:regex=1:pattern=a{1,3}:b=c", "search:pattern=a{1,3}:b=c:regex=true"),
            ("exclude:pattern=**/.git/**", "exclude:pattern=**/.git/**"),
            ("exclude:pattern=*.pyc,*.log", "exclude:pattern=*.pyc,*.log"),
            ("exclude:pattern=a, b=c", "exclude:pattern=a,b=c"),
            ("inspect:file=layers.jsonl", "inspect:file=layers.jsonl"),
            ("inspect:file=/a:b,c", "inspect:file=/a:b,c"),
        ] {
            assert_eq!(spec(text), canonical, "{text}");
            assert_eq!(spec(canonical), canonical);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_what_would_be_right() {
        for (text, message) in [
            ("", r#"unknown filter "": expected one of normalize-timestamps, exclude, search, inspect"#),
            (
                "strip",
                r#"unknown filter "strip": expected one of normalize-timestamps, exclude, search, inspect"#,
            ),
            ("exclude", "filter exclude needs pattern=GLOB[,GLOB]..."),
            ("exclude:pattern=", "filter exclude needs pattern=GLOB[,GLOB]..."),
            ("exclude:*.pyc", r#"filter exclude has no option "*.pyc": expected pattern"#),
            (
                "search:patern=x",
                r#"filter search has no option "patern": expected pattern, regex, script-friendly"#,
            ),
            ("search:pattern=a:pattern=b", "option pattern of filter search is given twice"),
            (
                "normalize-timestamps:ts=now",
                r#"invalid value "now" for option ts of filter normalize-timestamps: expected seconds since 1970, up to 253402300799"#,
            ),
            (
                "search:pattern=a:regex=maybe",
                r#"invalid value "maybe" for option regex of filter search: expected true or false"#,
            ),
            (
                "normalize-timestamps:mode=min",
                r#"invalid value "min" for option mode of filter normalize-timestamps: expected set or clamp"#,
            ),
        ] {
            assert_eq!(error(text), message, "{text}");
        }
        assert!(error("search:pattern=(:regex=true").contains("unclosed group"));
        assert!(error("exclude:pattern=[").contains("unclosed character class"));
    }
}
