//! Image references, by the rules of `distribution/reference` (`normalize.go`, `regexp.go`).
//!
//! `HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`, where docker's short forms are filled in: `busybox` is
//! `docker.io/library/busybox:latest`. A [`Reference`] that exists is well formed, so its parts may be joined into URLs and
//! scopes without another check.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

/// The host under which images without a host live, as users name it.
const DEFAULT_HOST: &str = "docker.io";
/// Another name of it, which older configurations use.
const LEGACY_DEFAULT_HOST: &str = "index.docker.io";
/// Where it answers the distribution protocol.
const DEFAULT_REGISTRY_HOST: &str = "registry-1.docker.io";
/// Its key in docker's `config.json`.
const DEFAULT_CREDENTIALS_KEY: &str = "https://index.docker.io/v1/";
/// What a single path component on docker.io gains.
const OFFICIAL_PREFIX: &str = "library/";
/// `reference.RepositoryNameTotalLengthMax`.
const REPOSITORY_MAX: usize = 255;
/// The longest host that DNS knows, with brackets and a port.
const HOST_MAX: usize = 255 + 8;

/// Which image, and where.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<Tag>,
    digest: Option<Digest>,
}

/// A registry's host as users name it, with its port: `docker.io`, `localhost:5000`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryName(String);

/// A well-formed tag: a letter, digit or underscore, then up to 127 of those, dots and dashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(String);

/// Which manifest of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ManifestRef {
    /// The one that a tag names now.
    Tag(Tag),
    /// The one with these bytes.
    Digest(Digest),
}

/// Why a string is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid reference {text:?}: {reason}")]
pub struct InvalidReference {
    text: String,
    reason: &'static str,
}

impl Reference {
    /// The host as the user means it, with its port: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository's path on its host: `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag. `latest` where the text had neither tag nor digest.
    pub fn tag(&self) -> Option<&Tag> {
        self.tag.as_ref()
    }

    /// The digest, which wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Which manifest is meant: the digest's where there is one, else the tag's.
    pub fn manifest(&self) -> ManifestRef {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => ManifestRef::Digest(digest.clone()),
            (None, Some(tag)) => ManifestRef::Tag(tag.clone()),
            (None, None) => ManifestRef::Tag(Tag::latest()),
        }
    }

    /// The same repository at another tag.
    #[must_use]
    pub fn with_tag(&self, tag: Tag) -> Self {
        Self { tag: Some(tag), digest: None, ..self.clone() }
    }

    /// The same repository at a digest.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The host to connect to, with its port: `registry-1.docker.io` for docker.io.
    pub fn registry_host(&self) -> &str {
        registry_host(&self.host)
    }

    /// The key of the host's entry in docker's `config.json`.
    pub fn credentials_key(&self) -> &str {
        credentials_key(&self.host)
    }

    /// `HOST/REPOSITORY`, in full.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// The name as docker shows it: without `docker.io/` and `docker.io/library/`.
    pub fn familiar_name(&self) -> String {
        if self.host != DEFAULT_HOST {
            return self.name();
        }
        match self.repository.strip_prefix(OFFICIAL_PREFIX) {
            // `library/a/b` stays as it is: `a/b` would mean another repository.
            Some(rest) if !rest.contains('/') => rest.to_owned(),
            _ => self.repository.clone(),
        }
    }

    /// The entry of a saved tar's `RepoTags`, with the name in full: `docker.io/library/busybox:latest`.
    ///
    /// Docker normalizes what it reads, so that it shows `busybox:latest` for it; skopeo writes the same form because other
    /// readers do not normalize. None for a reference by digest alone, which tags nothing.
    pub fn repo_tag(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}:{tag}", self.name()))
    }
}

/// The host to connect to for a host as the user means it.
pub(crate) fn registry_host(host: &str) -> &str {
    if host == DEFAULT_HOST { DEFAULT_REGISTRY_HOST } else { host }
}

/// The key of a host's entry in docker's `config.json`.
pub(crate) fn credentials_key(host: &str) -> &str {
    if host == DEFAULT_HOST { DEFAULT_CREDENTIALS_KEY } else { host }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The text may be a hostile document's; an error must not carry megabytes of it.
        let fail = |reason| InvalidReference { text: text.chars().take(300).collect(), reason };
        if let Some((_, shown)) = split_credentials(text) {
            let text = format!("…@{}", shown.chars().take(300).collect::<String>());
            return Err(InvalidReference { text, reason: "credentials do not belong in it; use --username" });
        }
        if text.is_empty() {
            return Err(fail("it is empty"));
        }
        if is_bare_identifier(text) {
            return Err(fail("64 hex digits alone are an image's id, not a name"));
        }
        let (host, rest) = split_host(text);
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(digest.parse().map_err(|_| fail("the digest is not well formed"))?))
            }
            None => (rest, None),
        };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag.parse().map_err(|_| fail("the tag is not well formed"))?)),
            None => (rest, None),
        };
        let repository = match path {
            path if host == DEFAULT_HOST && !path.contains('/') => format!("{OFFICIAL_PREFIX}{path}"),
            path => path.to_owned(),
        };
        if path.chars().any(|c| c.is_ascii_uppercase()) {
            return Err(fail("the repository must be lower case"));
        }
        if repository.len() > REPOSITORY_MAX {
            return Err(fail("the repository is longer than 255 characters"));
        }
        if !repository.split('/').all(is_path_component) {
            return Err(fail("the repository is not well formed"));
        }
        if !is_host(host) {
            return Err(fail("the host is not well formed"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(Tag::latest()),
            (tag, _) => tag,
        };
        Ok(Self { host: host.to_owned(), repository, tag, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl RegistryName {
    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RegistryName {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let host = if text == LEGACY_DEFAULT_HOST { DEFAULT_HOST } else { text };
        match is_host(host) {
            true => Ok(Self(host.to_owned())),
            false => Err(InvalidReference {
                text: text.chars().take(300).collect(),
                reason: "the host is not well formed",
            }),
        }
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Tag {
    /// The tag that is meant where none is named.
    pub fn latest() -> Self {
        Self("latest".to_owned())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let good = text.len() <= 128
            && text.bytes().next().is_some_and(word)
            && text.bytes().all(|b| word(b) || b == b'.' || b == b'-');
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidReference {
                text: text.chars().take(300).collect(),
                reason: "not a tag: at most 128 letters, digits, underscores, dots and dashes",
            })
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ManifestRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

/// The `USER:PASSWORD` before an `@` that is no digest's, which nobody may be shown, and what follows it. Only a digest stands
/// behind an `@` in a reference, and it has no slash and names its algorithm.
pub(crate) fn split_credentials(text: &str) -> Option<(&str, &str)> {
    let (credentials, rest) = text.rsplit_once('@')?;
    let is_digest = !rest.contains('/') && (rest.starts_with("sha") || !credentials.contains(':'));
    (!is_digest).then_some((credentials, rest))
}

fn is_bare_identifier(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// `splitDockerDomain`: the first component is a host only if it looks like one.
fn split_host(text: &str) -> (&str, &str) {
    match text.split_once('/') {
        Some((LEGACY_DEFAULT_HOST, rest)) => (DEFAULT_HOST, rest),
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.chars().any(|c| c.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_HOST, text),
    }
}

/// `[a-z0-9]+((?:[._]|__|[-]+)[a-z0-9]+)*`
fn is_path_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    if !bytes.first().is_some_and(|b| alphanumeric(*b)) || !bytes.last().is_some_and(|b| alphanumeric(*b)) {
        return false;
    }
    bytes.split(|b| alphanumeric(*b)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
    })
}

/// `domainAndPort`: a DNS name, an IPv4 address or an IPv6 address in brackets, and a port.
fn is_host(text: &str) -> bool {
    if text.len() > HOST_MAX {
        return false;
    }
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port))
                if address.parse::<std::net::Ipv6Addr>().is_ok() && !address.contains('.') =>
            {
                (None, port)
            }
            _ => return false,
        },
        None => match text.find(':') {
            Some(colon) => (Some(&text[..colon]), &text[colon..]),
            None => (Some(text), ""),
        },
    };
    let label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.first().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
    };
    let port_is_good = match port.strip_prefix(':') {
        Some(digits) => digits.bytes().all(|b| b.is_ascii_digit()) && digits.parse::<u16>().is_ok(),
        None => port.is_empty(),
    };
    port_is_good && name.is_none_or(|name| name.split('.').all(label))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(text: &str) -> Reference {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn short_forms_are_filled_in_as_docker_does() {
        let digest = format!("sha256:{HEX}");
        for (text, host, repository, tag, by_digest) in [
            ("busybox", "docker.io", "library/busybox", Some("latest"), false),
            ("busybox:1.36", "docker.io", "library/busybox", Some("1.36"), false),
            ("docker.io/x", "docker.io", "library/x", Some("latest"), false),
            ("index.docker.io/x", "docker.io", "library/x", Some("latest"), false),
            ("index.docker.io/fooo/bar", "docker.io", "fooo/bar", Some("latest"), false),
            ("a/b", "docker.io", "a/b", Some("latest"), false),
            ("test_com/foo", "docker.io", "test_com/foo", Some("latest"), false),
            ("library/foo/bar", "docker.io", "library/foo/bar", Some("latest"), false),
            ("localhost/x", "localhost", "x", Some("latest"), false),
            ("[::1]:5000/x", "[::1]:5000", "x", Some("latest"), false),
            ("[fc00::1]/docker/docker:t", "[fc00::1]", "docker/docker", Some("t"), false),
            ("host:5000/x", "host:5000", "x", Some("latest"), false),
            ("Foo/bar", "Foo", "bar", Some("latest"), false),
            ("xn--n3h.com:18080/foo", "xn--n3h.com:18080", "foo", Some("latest"), false),
            ("192.168.0.1", "docker.io", "library/192.168.0.1", Some("latest"), false),
            ("192.168.0.1:80", "docker.io", "library/192.168.0.1", Some("80"), false),
            ("192.168.0.1:8/debian", "192.168.0.1:8", "debian", Some("latest"), false),
            ("dock__er/docker---rules", "docker.io", "dock__er/docker---rules", Some("latest"), false),
            (&format!("x@{digest}"), "docker.io", "library/x", None, true),
            (&format!("x:t@{digest}"), "docker.io", "library/x", Some("t"), true),
            (&format!("docker.io/{HEX}"), "docker.io", &format!("library/{HEX}"), Some("latest"), false),
        ] {
            let reference = parse(text);
            assert_eq!(reference.host(), host, "{text}");
            assert_eq!(reference.repository(), repository, "{text}");
            assert_eq!(reference.tag().map(Tag::as_str), tag, "{text}");
            assert_eq!(reference.digest().is_some(), by_digest, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_reference_is_refused() {
        let long_tag = format!("x:{}", "t".repeat(129));
        let long_name = format!("{}/docker", "a".repeat(256));
        for text in [
            "",
            HEX,
            &long_tag,
            &long_name,
            "x:",
            "x@",
            "x@sha256:abc",
            "x@md5:00000000000000000000000000000000",
            ":tag",
            "/x",
            "x/",
            "docker.io/",
            "docker/Docker",
            "https://github.com/docker/docker",
            "-docker",
            "docker-/docker",
            "-docker.io/docker/docker",
            "docker///docker",
            "_docker/_docker",
            "____/____",
            "dock..er/docker",
            "dock_.er/docker",
            "dock___er/docker",
            "[fc00::1]",
            "[fc00::1]:5000",
            "fc00::1:5000/debian",
            "[fe80::1%eth0]:5000/debian",
            "[2001:db8:3:4::192.0.2.33]:5000/debian",
            "host:99999/x",
            "host:/x",
            "a b",
            "a/b?c",
            "a/../b",
            "x:t@sha256:abc@sha256:abc",
            "user@host/x",
            "ümlaut",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
        assert!(format!("x:{}", "t".repeat(128)).parse::<Reference>().is_ok());
    }

    #[test]
    fn credentials_in_a_reference_are_refused_and_never_repeated() {
        for text in [
            "alice:s3cr3t@localhost:5000/app:1",
            "alice:s3cr3t@localhost:5000",
            "alice:a/s3cr3t@b@localhost:5000/app",
            "s3cr3t@example.com/app",
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(!error.contains("s3cr3t") && error.contains("--username"), "{error}");
        }
        let error = "app:1@sha256:short".parse::<Reference>().unwrap_err().to_string();
        assert!(error.contains("app:1@sha256:short"), "{error}");
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let digest: Digest = format!("sha256:{HEX}").parse().unwrap();
        assert_eq!(parse(&format!("x:t@{digest}")).manifest(), ManifestRef::Digest(digest));
        assert_eq!(parse("x:t").manifest(), ManifestRef::Tag("t".parse().unwrap()));
    }

    #[test]
    fn docker_io_has_other_names_for_other_uses() {
        let reference = parse("busybox");
        assert_eq!(reference.registry_host(), "registry-1.docker.io");
        assert_eq!(reference.credentials_key(), "https://index.docker.io/v1/");
        assert_eq!(reference.repo_tag().as_deref(), Some("docker.io/library/busybox:latest"));
        assert_eq!(reference.familiar_name(), "busybox");
        let reference = parse("localhost:5000/app:v1");
        assert_eq!(reference.registry_host(), "localhost:5000");
        assert_eq!(reference.credentials_key(), "localhost:5000");
        assert_eq!(reference.repo_tag().as_deref(), Some("localhost:5000/app:v1"));
    }

    #[test]
    fn familiar_names_mean_the_same_repository() {
        for (text, familiar) in [
            ("docker.io/library/redis", "redis"),
            ("docker.io/dmcgowan/myapp", "dmcgowan/myapp"),
            ("docker.io/library/foo/bar", "library/foo/bar"),
            ("example.com/library/foo", "example.com/library/foo"),
        ] {
            let reference = parse(text);
            assert_eq!(reference.familiar_name(), familiar);
            assert_eq!(parse(familiar), reference);
        }
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_to_the_same(
            host in "(docker\\.io/|localhost/|[a-z0-9]{1,8}\\.[A-Za-z0-9]{1,8}(:[0-9]{1,4})?/|\\[::[0-9a-f]{1,4}\\]:[0-9]{1,4}/|[A-Z]{1,5}/|index\\.docker\\.io/)",
            path in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,6}){0,2}",
            tag in "(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,20})?",
            digest in "(@sha256:[0-9a-f]{64})?",
        ) {
            let text = format!("{host}{path}{tag}{digest}");
            let reference: Reference = text.parse().unwrap();
            prop_assert_eq!(&reference.to_string().parse::<Reference>().unwrap(), &reference);
            if digest.is_empty() {
                prop_assert!(reference.tag().is_some());
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,80}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }

        #[test]
        fn no_text_of_likely_characters_makes_the_parser_panic(text in "[a-zA-Z0-9.:/@_\\[\\]-]{0,60}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
