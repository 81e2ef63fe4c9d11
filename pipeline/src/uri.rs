//! The grammar in which sources and destinations are named: `SCHEME://REST[?KEY=VALUE[&KEY=VALUE]…]`.
//!
//! `REST` is a path or an image reference, as the scheme says. Percent escapes are decoded, so a path that holds a `?`
//! writes it `%3F`. Which keys exist is the scheme's own business ([`Uri::only`]); an unknown one is an error, never ignored.

use std::fmt;

use crate::reference::split_credentials;

/// A parsed source or destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// What stands before `://`.
    pub scheme: String,
    /// What stands between `://` and the first `?`, decoded.
    pub rest: String,
    options: Vec<(String, String)>,
}

/// Why a source or destination could not be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UriError {
    /// There is no `SCHEME://`.
    #[error("{0:?} has no scheme: write SCHEME://…, for example registry://HOST/IMAGE:TAG or tar://FILE")]
    NoScheme(String),
    /// Nothing of ours has that scheme.
    #[error("unknown {role} {scheme}://: expected one of {expected}")]
    UnknownScheme {
        /// `source` or `destination`.
        role: &'static str,
        /// What was given.
        scheme: String,
        /// What there is.
        expected: String,
    },
    /// Nothing stands after `://`.
    #[error("{0}:// names nothing")]
    Empty(String),
    /// A registry without an image in it.
    #[error("registry://{0} names a registry and no image: write registry://{0}/IMAGE:TAG")]
    NoImage(String),
    /// One image, where a repository of many is meant.
    #[error("{0} names one image: leave its tag or digest out")]
    OneImage(String),
    /// `%` without two hex digits after it, or bytes that are not UTF-8.
    #[error("{0:?} has a malformed percent escape; a literal % is written %25")]
    Escape(String),
    /// An option that the scheme does not have.
    #[error("{scheme}:// has no option {key:?}: expected {expected}")]
    UnknownOption {
        /// The scheme.
        scheme: String,
        /// The option as given.
        key: String,
        /// What there is.
        expected: String,
    },
    /// An option whose value makes no sense.
    #[error("option {key}={value}: {reason}")]
    BadValue {
        /// The option.
        key: String,
        /// Its value as given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Uri {
    /// Parses `SCHEME://REST[?OPTIONS]`.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| UriError::NoScheme(shown(text)))?;
        if scheme.is_empty() || !scheme.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') {
            return Err(UriError::NoScheme(shown(text)));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        if rest.is_empty() {
            return Err(UriError::Empty(scheme.to_owned()));
        }
        let mut options = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "true"));
            options.push((decode(key)?, decode(value)?));
        }
        Ok(Self { scheme: scheme.to_owned(), rest: decode(rest)?, options })
    }

    /// Refuses options that are not among `keys`, and an option that is given twice.
    pub fn only(&self, keys: &[&str]) -> Result<(), UriError> {
        for (position, (key, value)) in self.options.iter().enumerate() {
            if !keys.contains(&key.as_str()) {
                let expected = if keys.is_empty() { "none".to_owned() } else { keys.join(", ") };
                return Err(UriError::UnknownOption {
                    scheme: self.scheme.clone(),
                    key: shown(key),
                    expected,
                });
            }
            if self.options[..position].iter().any(|(earlier, _)| earlier == key) {
                return Err(self.bad(key, value, "given twice"));
            }
        }
        Ok(())
    }

    /// The value of an option.
    pub fn option(&self, key: &str) -> Option<&str> {
        self.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The value of an option, parsed.
    pub fn parsed<T>(&self, key: &str) -> Result<Option<T>, UriError>
    where
        T: std::str::FromStr,
        T::Err: fmt::Display,
    {
        self.option(key)
            .map(|value| value.parse().map_err(|error: T::Err| self.bad(key, value, &error.to_string())))
            .transpose()
    }

    /// Whether an option that is on or off is on. One without a value is.
    pub fn flag(&self, key: &str) -> Result<bool, UriError> {
        match self.option(key) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(value) => Err(self.bad(key, value, "expected true or false")),
        }
    }

    /// An error about the value of an option.
    pub(crate) fn bad(&self, key: &str, value: &str, reason: &str) -> UriError {
        UriError::BadValue { key: key.to_owned(), value: value.to_owned(), reason: reason.to_owned() }
    }
}

/// What a message repeats of a text that was not understood: no password that somebody wrote into it.
fn shown(text: &str) -> String {
    split_credentials(text).map_or_else(|| text.to_owned(), |(_, rest)| format!("…@{rest}"))
}

fn decode(text: &str) -> Result<String, UriError> {
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let fail = || UriError::Escape(shown(text));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(fail);
        let value = digit()? * 16 + digit()?;
        bytes.push(u8::try_from(value).expect("two hex digits fit in a byte"));
    }
    String::from_utf8(bytes).map_err(|_| fail())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_follow_the_first_question_mark() {
        let uri = Uri::parse("registry://[::1]:5000/a/b:t?os=linux&compression=zstd:3").unwrap();
        assert_eq!((uri.scheme.as_str(), uri.rest.as_str()), ("registry", "[::1]:5000/a/b:t"));
        assert_eq!(uri.option("compression"), Some("zstd:3"));
        assert_eq!(uri.option("arch"), None);
        assert!(uri.only(&["os", "compression"]).is_ok());
        assert!(matches!(uri.only(&["os"]), Err(UriError::UnknownOption { .. })));
    }

    #[test]
    fn percent_escapes_are_decoded_in_paths() {
        assert_eq!(Uri::parse("tar:///tmp/what%3F%20100%25.tar").unwrap().rest, "/tmp/what? 100%.tar");
        for bad in ["tar://100%", "tar://%zz", "tar://%ff"] {
            assert!(matches!(Uri::parse(bad), Err(UriError::Escape(_))), "{bad}");
        }
    }

    #[test]
    fn a_password_is_never_repeated() {
        for text in [
            "alice:s3cr3t@example.com/app",
            "HTTPS://alice:s3cr3t@example.com/app",
            "registry://a:s3cr3t%@example.com/app",
        ] {
            let error = Uri::parse(text).unwrap_err().to_string();
            assert!(!error.contains("s3cr3t") && error.contains("example.com"), "{error}");
        }
        let with_question_mark = Uri::parse("registry://alice:what?s3cr3t@example.com/app").unwrap();
        assert!(!with_question_mark.only(&[]).unwrap_err().to_string().contains("s3cr3t"));
    }

    #[test]
    fn what_is_no_uri_is_refused() {
        for bad in ["busybox", "tar:x", "://x", "TAR://x"] {
            assert!(matches!(Uri::parse(bad), Err(UriError::NoScheme(_))), "{bad}");
        }
        assert!(matches!(Uri::parse("tar://"), Err(UriError::Empty(_))));
        assert!(Uri::parse("tar://x?a=1&a=2").unwrap().only(&["a"]).is_err());
    }
}
