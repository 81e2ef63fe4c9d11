//! Which blobs registries have, as a list that is carried to where they cannot be asked.
//!
//! A line is a digest, a space, and a repository that has the blob: `sha256:9f2c... registry.example/team/app`. A blob stands once
//! for each registry. Empty lines and those that begin with `#` say nothing.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::str::FromStr;

use futures_util::{StreamExt, TryStreamExt};

use super::ASKED_AT_ONCE;
use super::config::Source;
use crate::digest::Digest;
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::manifest::{self, ParsedManifest};
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::{Access, Client, Repository};

/// Manifests of one repository that are looked into.
const MANIFESTS_MAX: usize = 1_000_000;

/// Blobs, and where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Have {
    /// By digest and registry, the path of a repository.
    holders: BTreeMap<Digest, BTreeMap<String, String>>,
}

/// What is wrong with a list, and in which line, the first being 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct HaveError {
    /// Where.
    pub line: usize,
    /// What.
    pub problem: String,
}

impl Have {
    /// What is listed.
    pub fn parse(text: &str) -> Result<Self, HaveError> {
        let mut have = Self::default();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fail = |problem: String| HaveError { line: number + 1, problem };
            let (digest, repository) =
                line.split_once(' ').ok_or_else(|| fail(format!("{line:?} is no digest and repository")))?;
            let digest = Digest::from_str(digest).map_err(|error| fail(error.to_string()))?;
            let repository = repository.trim();
            let reference: Reference = repository.parse().map_err(|error| fail(format!("{error}")))?;
            have.add(digest, reference.host(), reference.repository());
        }
        Ok(have)
    }

    fn add(&mut self, digest: Digest, host: &str, repository: &str) {
        let holders = self.holders.entry(digest).or_default();
        holders.entry(host.to_owned()).or_insert_with(|| repository.to_owned());
    }

    /// How many blobs are listed.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// Whether each of these registries has the blob.
    pub(super) fn everywhere(&self, digest: &Digest, hosts: &[String]) -> bool {
        let holders = self.holders.get(digest);
        holders.is_some_and(|holders| hosts.iter().all(|host| holders.contains_key(host)))
    }

    /// By registry and blob, a repository that has it.
    pub(super) fn holders(&self) -> impl Iterator<Item = ((String, Digest), String)> {
        self.holders.iter().flat_map(|(digest, holders)| {
            holders.iter().map(|(host, repository)| ((host.clone(), digest.clone()), repository.clone()))
        })
    }

    /// What all tags of some repositories consist of. A registry takes no manifest before what it names, so nothing else is asked.
    pub async fn of(client: &Client, places: &[Source]) -> Result<Self, Error> {
        let mut repositories: Vec<Reference> = Vec::new();
        for place in places {
            match place {
                Source::Repository(reference) => repositories.push(reference.clone()),
                Source::Catalog(registry, patterns) => {
                    for name in client.repositories(registry).all().await? {
                        if patterns.is_match(&name) {
                            repositories.push(format!("{registry}/{name}").parse()?);
                        }
                    }
                }
            }
        }
        let walked = repositories.iter().map(|reference| async move {
            let repository = client.repository(reference, Access::Pull);
            Ok::<_, Error>((reference, blobs_of(&repository).await?))
        });
        let walked = walked.collect::<Vec<_>>();
        let walked: Vec<_> = futures_util::stream::iter(walked).buffered(ASKED_AT_ONCE).try_collect().await?;
        let mut have = Self::default();
        for (reference, digests) in walked {
            for digest in digests {
                have.add(digest, reference.host(), reference.repository());
            }
        }
        Ok(have)
    }
}

impl fmt::Display for Have {
    /// The list, sorted.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (digest, holders) in &self.holders {
            for (host, repository) in holders {
                writeln!(f, "{digest} {host}/{repository}")?;
            }
        }
        Ok(())
    }
}

/// Every blob that the tags of a repository name, foreign ones left out.
async fn blobs_of(repository: &Repository) -> Result<HashSet<Digest>, Error> {
    let mut blobs = HashSet::new();
    let mut seen: HashSet<Digest> = HashSet::new();
    let tags = repository.tags().all().await?;
    let tags = tags.iter().filter_map(|tag| tag.parse::<Tag>().ok()).map(ManifestRef::Tag);
    let mut waiting: Vec<ManifestRef> = tags.collect();
    for _ in 0..=MAX_INDEX_DEPTH {
        let asked = std::mem::take(&mut waiting)
            .into_iter()
            .map(|wanted| async move { repository.find_manifest(&wanted, &ACCEPTED_MANIFESTS).await });
        let mut asked = futures_util::stream::iter(asked.collect::<Vec<_>>()).buffer_unordered(ASKED_AT_ONCE);
        while let Some(fetched) = asked.next().await {
            // A sparse index names what is not there.
            let Some(fetched) = fetched? else { continue };
            if !seen.insert(fetched.digest.clone()) {
                continue;
            }
            match manifest::parse(&fetched.bytes, Some(&fetched.media_type)) {
                Ok(ParsedManifest::Image(image)) => {
                    let named = [image.config].into_iter().chain(image.layers);
                    blobs.extend(named.filter(|blob| !blob.is_foreign()).map(|blob| blob.digest));
                }
                Ok(ParsedManifest::Index(index)) => {
                    waiting
                        .extend(index.manifests.into_iter().map(|entry| ManifestRef::Digest(entry.digest)));
                }
                Ok(ParsedManifest::Schema1(_)) => {}
                Err(source) => {
                    let image = format!("{}/{}@{}", repository.host(), repository.name(), fetched.digest);
                    return Err(Error::Manifest { image, source });
                }
            }
        }
        drop(asked);
        waiting.retain(|wanted| !matches!(wanted, ManifestRef::Digest(digest) if seen.contains(digest)));
        if waiting.is_empty() {
            return Ok(blobs);
        }
        if seen.len() + waiting.len() > MANIFESTS_MAX {
            let (host, name) = (repository.host(), repository.name());
            return Err(Error::Host(format!("{host}/{name} has more than {MANIFESTS_MAX} manifests").into()));
        }
    }
    Err(Error::IndexDepth(format!("{}/{}", repository.host(), repository.name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(content: &str) -> Digest {
        Digest::sha256(content)
    }

    #[test]
    fn a_list_is_read_as_it_is_written() {
        let text = format!(
            "# of today\n\n{} b.example:5000/team/app\n{0} c.example/x\n{} b.example:5000/other\n",
            digest("one"),
            digest("two")
        );
        let have = Have::parse(&text).unwrap();
        assert_eq!(have.len(), 2);
        assert_eq!(Have::parse(&have.to_string()), Ok(have.clone()));
        let hosts = |hosts: &[&str]| hosts.iter().map(|host| (*host).to_owned()).collect::<Vec<_>>();
        assert!(have.everywhere(&digest("one"), &hosts(&["b.example:5000", "c.example"])));
        assert!(!have.everywhere(&digest("two"), &hosts(&["b.example:5000", "c.example"])));
        assert!(have.everywhere(&digest("two"), &hosts(&["b.example:5000"])));
        let holder = ((("b.example:5000").to_owned(), digest("one")), "team/app".to_owned());
        assert!(have.holders().any(|other| other == holder));
    }

    #[test]
    fn what_is_no_list_is_told_with_its_line() {
        let wrong = |text: &str| Have::parse(text).unwrap_err().to_string();
        assert!(wrong("# x\nsha256:abc b.example/x").starts_with("line 2: "));
        let alone = wrong(&digest("one").to_string());
        assert!(alone.contains("no digest and repository"), "{alone}");
        assert!(wrong(&format!("{} b.example/UPPER", digest("one"))).contains("lower case"));
    }
}
