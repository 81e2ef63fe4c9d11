//! Platforms, and which entry of an index is the wanted one.
//!
//! Follows containerd's `platforms` package, without its leaps between architectures: `arm64` and `arm64/v8` are
//! one, `arm` is `arm/v7`, a variant falls back to lower ones (`arm/v7` to `v6` and `v5`, `amd64/v3` to `v2` and none), the highest
//! first; but `arm64` never falls back to `arm`, nor `amd64` to `386`.

use std::fmt;

use serde_json::{Map, Value};

use crate::config::ImageConfig;
use crate::manifest::Descriptor;

/// An operating system and processor, in Go's names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    /// Such as `linux`.
    pub os: String,
    /// Such as `amd64`.
    pub architecture: String,
    /// Such as `v8`; absent for most.
    pub variant: Option<String>,
}

/// What the user says of the platform that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlatformChoice {
    /// Unset: `linux`.
    pub os: Option<String>,
    /// Unset: this machine's.
    pub architecture: Option<String>,
    /// Unset: this machine's where the architecture is unset too, otherwise the architecture's usual one.
    pub variant: Option<String>,
    /// Whether an image that stands alone has to be for it too, and not only one that an index offers among others.
    pub required: bool,
}

/// No entry of an index, or not the one image that there is, is for a wanted platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no image for {}; there is {}", either(.wanted), list(.available))]
pub struct NoSuchPlatform {
    /// What was asked for: any of these.
    pub wanted: Vec<Platform>,
    /// What there is, in the index's order.
    pub available: Vec<String>,
}

impl Platform {
    /// Linux on this machine's architecture: what a container started here would need.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "powerpc64" => ("ppc64", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// From a `platform` object or an image's config; `None` without both `os` and `architecture`.
    pub fn from_map(map: &Map<String, Value>) -> Option<Self> {
        let field = |name| map.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        Some(Self {
            os: field("os")?.to_owned(),
            architecture: field("architecture")?.to_owned(),
            variant: field("variant").map(str::to_owned),
        })
    }

    /// Not a platform at all: build tools mark attestations, which no machine runs, with it.
    pub fn is_unknown(&self) -> bool {
        self.os == "unknown" && self.architecture == "unknown"
    }

    /// Other people's names and implied variants made Go's and explicit (containerd, `platforms/database.go`).
    fn normalized(&self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            os => os.to_owned(),
        };
        let variant = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) =
            match (self.architecture.to_ascii_lowercase().as_str(), variant.as_str()) {
                ("amd64" | "x86_64" | "x86-64", "v1") => ("amd64".to_owned(), String::new()),
                ("amd64" | "x86_64" | "x86-64", variant) => ("amd64".to_owned(), variant.to_owned()),
                ("386" | "i386" | "i686" | "x86", _) => ("386".to_owned(), String::new()),
                ("arm64" | "aarch64", "" | "8" | "v8" | "v8.0") => ("arm64".to_owned(), "v8".to_owned()),
                ("arm64" | "aarch64", "9" | "v9" | "9.0" | "v9.0") => ("arm64".to_owned(), "v9".to_owned()),
                ("arm64" | "aarch64", variant) => ("arm64".to_owned(), variant.to_owned()),
                ("armhf", _) | ("arm", "" | "7") => ("arm".to_owned(), "v7".to_owned()),
                ("armel", _) | ("arm", "6") => ("arm".to_owned(), "v6".to_owned()),
                ("arm", "5") => ("arm".to_owned(), "v5".to_owned()),
                ("arm", "8") => ("arm".to_owned(), "v8".to_owned()),
                (architecture, variant) => (architecture.to_owned(), variant.to_owned()),
            };
        Self { os, architecture, variant: Some(variant).filter(|variant| !variant.is_empty()) }
    }

    /// How well an image for `offered` serves a machine that is `self`: 0 is best, `None` not at all.
    fn rank(&self, offered: &Self) -> Option<usize> {
        if offered.is_unknown() {
            return None;
        }
        let (wanted, offered) = (self.normalized(), offered.normalized());
        if (&wanted.os, &wanted.architecture) != (&offered.os, &offered.architecture) {
            return None;
        }
        if wanted.variant == offered.variant {
            return Some(0);
        }
        let lower: &[Option<&str>] = match (wanted.architecture.as_str(), wanted.variant.as_deref()) {
            ("arm", Some("v8")) => &[Some("v7"), Some("v6"), Some("v5")],
            ("arm", Some("v7")) => &[Some("v6"), Some("v5")],
            ("arm", Some("v6")) => &[Some("v5")],
            ("arm64", Some(_)) => &[Some("v8")],
            ("amd64", Some("v4")) => &[Some("v3"), Some("v2"), None],
            ("amd64", Some("v3")) => &[Some("v2"), None],
            ("amd64", Some("v2")) => &[None],
            _ => &[],
        };
        lower.iter().position(|variant| *variant == offered.variant.as_deref()).map(|position| position + 1)
    }
}

/// `OS/ARCHITECTURE[/VARIANT]`.
impl std::str::FromStr for Platform {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant)),
            _ => return Err("expected OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/arm64"),
        };
        if parts.iter().any(|part| part.is_empty()) {
            return Err("a part of it is empty: expected such as linux/arm64 or linux/arm/v7");
        }
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        })
    }
}

impl PlatformChoice {
    /// Whether anything was said of it.
    pub fn is_given(&self) -> bool {
        self.os.is_some() || self.architecture.is_some() || self.variant.is_some()
    }

    /// The platform that is wanted.
    pub fn resolve(&self) -> Platform {
        let host = Platform::host();
        let variant = match (&self.variant, &self.architecture) {
            (Some(variant), _) => Some(variant.clone()),
            (None, Some(_)) => None,
            (None, None) => host.variant,
        };
        Platform {
            os: self.os.clone().unwrap_or(host.os),
            architecture: self.architecture.clone().unwrap_or(host.architecture),
            variant,
        }
    }

    /// Whether an image that no index offers for a platform may be taken. A config that says nothing contradicts nobody.
    pub fn admit(&self, config: Option<&ImageConfig>) -> Result<(), NoSuchPlatform> {
        match config.filter(|_| self.required) {
            None => Ok(()),
            config => confirm(&[self.resolve()], config),
        }
    }
}

/// The entry for the wanted platform: the best variant, and of equals the first.
///
/// An entry may lack `platform` (image-spec, `image-index.md`). When nothing that has one fits and exactly one lacks it, that one is meant:
/// what it is for, its config says. Attestations (`unknown/unknown`) are never chosen.
pub fn select<'a>(manifests: &'a [Descriptor], wanted: &Platform) -> Result<&'a Descriptor, NoSuchPlatform> {
    let best = manifests
        .iter()
        .filter_map(|entry| Some((wanted.rank(entry.platform.as_ref()?)?, entry)))
        .min_by_key(|(rank, _)| *rank);
    if let Some((_, entry)) = best {
        return Ok(entry);
    }
    let mut unlabelled = manifests.iter().filter(|entry| entry.platform.is_none());
    if let (Some(entry), None) = (unlabelled.next(), unlabelled.next()) {
        return Ok(entry);
    }
    let mut available = Vec::new();
    for entry in manifests {
        let name = match &entry.platform {
            Some(platform) if platform.is_unknown() => continue,
            Some(platform) => platform.to_string(),
            None => "one without a platform".to_owned(),
        };
        if !available.contains(&name) {
            available.push(name);
        }
    }
    Err(NoSuchPlatform { wanted: vec![wanted.clone()], available })
}

/// Whether an image whose entry in an index says nothing of a platform is for one of the wanted ones. A config that says nothing either
/// contradicts nobody; what has no config of an image runs nowhere.
pub fn confirm(wanted: &[Platform], config: Option<&ImageConfig>) -> Result<(), NoSuchPlatform> {
    let offered = match config.map(ImageConfig::platform) {
        Some(None) => return Ok(()),
        Some(Some(platform)) if wanted.iter().any(|wanted| wanted.rank(&platform).is_some()) => return Ok(()),
        Some(Some(platform)) => platform.to_string(),
        None => "an artifact".to_owned(),
    };
    Err(NoSuchPlatform { wanted: wanted.to_vec(), available: vec![offered] })
}

fn either(wanted: &[Platform]) -> String {
    wanted.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

fn list(available: &[String]) -> String {
    if available.is_empty() { "none that can run".to_owned() } else { available.join(", ") }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::manifest::{ParsedManifest, parse};
    use proptest::prelude::*;
    use serde_json::json;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform {
            os: parts.next().expect("an os"),
            architecture: parts.next().expect("an architecture"),
            variant: parts.next(),
        }
    }

    /// An index whose entries are named by their position; `-` has no platform.
    fn index(platforms: &[&str]) -> Vec<Descriptor> {
        let entries: Vec<_> = platforms
            .iter()
            .enumerate()
            .map(|(position, name)| {
                let mut entry = json!({"mediaType": "m", "digest": Digest::sha256([0]), "size": position});
                if *name != "-" {
                    let Platform { os, architecture, variant } = platform(name);
                    entry["platform"] = json!({"os": os, "architecture": architecture});
                    if let Some(variant) = variant {
                        entry["platform"]["variant"] = variant.into();
                    }
                }
                entry
            })
            .collect();
        let document = json!({"schemaVersion": 2, "manifests": entries}).to_string();
        match parse(document.as_bytes(), None).expect("an index") {
            ParsedManifest::Index(index) => index.manifests,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn check(platforms: &[&str], wanted: &str, expected: Option<u64>) {
        let manifests = index(platforms);
        let found = select(&manifests, &platform(wanted)).ok().map(|entry| entry.size);
        assert_eq!(found, expected, "{wanted} in {platforms:?}");
    }

    #[test]
    fn the_first_match_wins() {
        check(&["linux/amd64", "linux/arm64", "linux/amd64"], "linux/amd64", Some(0));
        check(&["windows/amd64", "linux/amd64", "linux/amd64"], "linux/amd64", Some(1));
    }

    #[test]
    fn arm64_matches_variant_v8_both_ways() {
        check(&["linux/amd64", "linux/arm64/v8"], "linux/arm64", Some(1));
        check(&["linux/arm64"], "linux/arm64/v8", Some(0));
        check(&["linux/arm64/v8", "linux/arm64/v9"], "linux/arm64/v9", Some(1));
        check(&["linux/arm64/v8"], "linux/arm64/v9", Some(0));
        check(&["linux/arm64/v9"], "linux/arm64", None);
    }

    #[test]
    fn arm_falls_back_to_lower_variants_never_to_higher() {
        let all = ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7", "linux/arm/v8"];
        check(&all, "linux/arm", Some(2));
        check(&all, "linux/arm/v6", Some(1));
        check(&all[..2], "linux/arm/v7", Some(1));
        check(&all[2..], "linux/arm/v6", None);
        check(&["linux/arm/v7"], "linux/arm64", None);
    }

    #[test]
    fn an_image_that_stands_alone_is_held_to_a_platform_that_is_required() {
        let config = |text: &str| ImageConfig::parse(text.as_bytes()).expect("a config");
        let arm = config(
            r#"{"os":"linux","architecture":"arm64","variant":"v8","rootfs":{"type":"layers","diff_ids":[]}}"#,
        );
        let silent = config(r#"{"rootfs":{"type":"layers","diff_ids":[]}}"#);
        for (architecture, is_admitted) in
            [("arm64", true), ("aarch64", true), ("amd64", false), ("arm", false)]
        {
            let said = PlatformChoice {
                os: Some("linux".to_owned()),
                architecture: Some(architecture.to_owned()),
                ..PlatformChoice::default()
            };
            assert_eq!(said.admit(Some(&arm)), Ok(()), "{said:?}");
            let required = PlatformChoice { required: true, ..said };
            assert_eq!(required.admit(Some(&arm)).is_ok(), is_admitted, "{required:?}");
            assert_eq!(required.admit(Some(&silent)), Ok(()), "{required:?}");
            assert_eq!(required.admit(None), Ok(()), "{required:?}");
        }
    }

    #[test]
    fn amd64_levels_fall_back_and_a_plain_amd64_takes_no_higher_one() {
        check(&["linux/amd64", "linux/amd64/v2"], "linux/amd64/v3", Some(1));
        check(&["linux/amd64/v1"], "linux/amd64", Some(0));
        check(&["linux/amd64/v3"], "linux/amd64", None);
    }

    #[test]
    fn attestations_are_never_chosen_nor_listed() {
        check(&["unknown/unknown", "linux/amd64"], "linux/amd64", Some(1));
        check(&["unknown/unknown"], "unknown/unknown", None);
        let manifests = index(&["linux/s390x", "unknown/unknown", "linux/s390x", "linux/arm/v7"]);
        let error = select(&manifests, &platform("linux/amd64")).expect_err("no such platform");
        assert_eq!(error.to_string(), "no image for linux/amd64; there is linux/s390x, linux/arm/v7");
    }

    #[test]
    fn a_single_entry_without_a_platform_is_meant_when_nothing_fits() {
        check(&["-"], "linux/amd64", Some(0));
        check(&["-", "unknown/unknown"], "linux/amd64", Some(0));
        check(&["-", "linux/amd64"], "linux/amd64", Some(1));
        check(&["-", "-"], "linux/amd64", None);
        check(&[], "linux/amd64", None);
    }

    #[test]
    fn naming_an_architecture_forgets_the_hosts_variant() {
        let choice = PlatformChoice { architecture: Some("s390x".to_owned()), ..PlatformChoice::default() };
        assert_eq!(choice.resolve().to_string(), "linux/s390x");
        assert_eq!(PlatformChoice::default().resolve(), Platform::host());
    }

    proptest! {
        #[test]
        fn whatever_is_selected_runs_on_the_wanted_os_and_architecture(
            names in proptest::collection::vec("(linux|windows|unknown)/(amd64|arm64|arm|unknown)(/v[0-9])?", 0..8),
            wanted in "(linux|windows)/(amd64|arm64|arm)(/v[0-9])?",
        ) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let wanted = platform(&wanted);
            if let Ok(entry) = select(&index(&names), &wanted) {
                let chosen = entry.platform.as_ref().expect("every entry has one");
                prop_assert_eq!((&chosen.os, &chosen.architecture), (&wanted.os, &wanted.architecture));
            }
        }
    }
}
