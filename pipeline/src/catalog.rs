//! What a registry or a layout has by name: which manifest an image's name means, and how one is deleted.
//!
//! Lists of names are the registry client's ([`Names`](crate::registry::Names)).

use std::slice;

use futures_util::{StreamExt, TryStreamExt};

use crate::copy::subset;
use crate::digest::Digest;
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::manifest::ParsedManifest;
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::platform::{self, Platform};
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::{ManifestHead, RegistryError, Repository};
use crate::source::stored::{self, Store};

/// Tags that are asked for at once.
const TAGS_AT_ONCE: usize = 8;

/// A manifest, by what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// In bytes.
    pub size: u64,
}

/// The manifest that a name means now: a HEAD, or a GET from a registry that answers one without the digest, or not at all. Of an
/// index and a platform, the manifest of the image for that.
pub async fn resolve(store: &dyn Store, platform: Option<&Platform>) -> Result<Resolved, Error> {
    if let (Some(repository), None) = (store.origin(), platform)
        && let Some(head) = head(&repository, store.wanted()).await?
    {
        return Ok(head);
    }
    let mut fetched = store.first().await?;
    for _ in 0..=MAX_INDEX_DEPTH {
        let parsed = stored::parse(store, &fetched)?;
        match (&parsed, platform) {
            (ParsedManifest::Index(index), Some(platform)) => {
                fetched = store.manifest(platform::select(&index.manifests, platform)?).await?;
                continue;
            }
            (ParsedManifest::Image(image), Some(platform)) => {
                subset::confirm(store, image, slice::from_ref(platform)).await?;
            }
            (ParsedManifest::Schema1(_), Some(_)) | (_, None) => {}
        }
        let (size, media_type) = (fetched.bytes.len() as u64, parsed.media_type().to_owned());
        return Ok(Resolved { digest: fetched.digest, media_type, size });
    }
    Err(Error::IndexDepth(store.shown()))
}

/// What a HEAD says, if it says all of it.
async fn head(repository: &Repository, wanted: Option<ManifestRef>) -> Result<Option<Resolved>, Error> {
    let Some(wanted) = wanted else { return Ok(None) };
    match repository.manifest_head(&wanted, &ACCEPTED_MANIFESTS).await {
        Ok(Some(ManifestHead { digest: Some(digest), media_type, size: Some(size) })) => {
            Ok(Some(Resolved { digest, media_type, size }))
        }
        // The answer to a GET says in words what is wrong.
        Ok(_) => Ok(None),
        Err(error) if knows_no_head(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether a registry answers a HEAD as one that only knows GET.
fn knows_no_head(error: &RegistryError) -> bool {
    matches!(error.status(), Some(400 | 405 | 501))
}

/// What was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// What the name meant.
    pub digest: Digest,
    /// The tag alone; the manifest is still there, under its digest and its other tags.
    pub tag_only: bool,
    /// The tags that went with the manifest, that which was named among them.
    pub tags: Vec<String>,
}

/// Deletes an image from a registry.
///
/// A tag is deleted alone where the registry can do that. Where it deletes manifests only, all tags of the manifest go with it:
/// then this refuses if there are others than the one that was named, unless `all_tags` says that this is meant.
pub async fn delete(
    repository: &Repository,
    reference: &Reference,
    all_tags: bool,
) -> Result<Deleted, Error> {
    let named = reference.manifest();
    let missing = || Error::NoSuchImage(reference.to_string());
    let digest = match &named {
        ManifestRef::Digest(digest) => digest.clone(),
        ManifestRef::Tag(tag) => digest_of(repository, tag).await?.ok_or_else(missing)?,
    };
    if let ManifestRef::Tag(tag) = &named
        && delete_tag(repository, tag).await?
    {
        if digest_of(repository, tag).await?.is_some() {
            return Err(Error::StillThere(reference.to_string()));
        }
        let manifest = ManifestRef::Digest(digest.clone());
        let is_kept = repository.manifest_head(&manifest, &ACCEPTED_MANIFESTS).await?.is_some();
        return Ok(Deleted { digest, tag_only: is_kept, tags: vec![tag.to_string()] });
    }
    let tags = match tags_of(repository, &digest).await {
        Ok(tags) => tags,
        // Whoever does not care which they are need not know them.
        Err(error) if all_tags => {
            tracing::warn!("cannot tell which tags go with it: {error}");
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    let is_other = |tag: &&String| !matches!(&named, ManifestRef::Tag(named) if named.as_str() == **tag);
    let others: Vec<String> = tags.iter().filter(is_other).cloned().collect();
    if !others.is_empty() && !all_tags {
        return Err(Error::SharedManifest { image: reference.to_string(), digest, tags: others });
    }
    match repository.delete_manifest(&ManifestRef::Digest(digest.clone())).await? {
        true => Ok(Deleted { digest, tag_only: false, tags }),
        false => Err(missing()),
    }
}

/// Deletes a tag alone. False where the registry cannot: it says so in many ways.
pub(crate) async fn delete_tag(repository: &Repository, tag: &Tag) -> Result<bool, Error> {
    match repository.delete_manifest(&ManifestRef::Tag(tag.clone())).await {
        Ok(deleted) => Ok(deleted),
        Err(error) if matches!(error.status(), Some(400 | 404 | 405 | 501)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The tags that name a manifest.
async fn tags_of(repository: &Repository, digest: &Digest) -> Result<Vec<String>, Error> {
    let tags = repository.tags().all().await?;
    let asked = tags.iter().map(|name| async move {
        let Ok(tag) = name.parse::<Tag>() else { return Ok::<_, Error>(None) };
        let named = digest_of(repository, &tag).await?;
        Ok((named.as_ref() == Some(digest)).then(|| name.clone()))
    });
    let asked = futures_util::stream::iter(asked.collect::<Vec<_>>()).buffered(TAGS_AT_ONCE);
    let mut found: Vec<String> = asked.try_filter_map(|tag| async move { Ok(tag) }).try_collect().await?;
    found.sort();
    Ok(found)
}

/// What a tag names now.
pub(crate) async fn digest_of(repository: &Repository, tag: &Tag) -> Result<Option<Digest>, Error> {
    let tag = ManifestRef::Tag(tag.clone());
    match repository.manifest_head(&tag, &ACCEPTED_MANIFESTS).await {
        Ok(None) => return Ok(None),
        Ok(Some(ManifestHead { digest: Some(digest), .. })) => return Ok(Some(digest)),
        // It does not say enough.
        Ok(Some(_)) => {}
        Err(error) if knows_no_head(&error) => {}
        Err(error) => return Err(error.into()),
    }
    let fetched = repository.find_manifest(&tag, &ACCEPTED_MANIFESTS).await?;
    Ok(fetched.map(|manifest| manifest.digest))
}

/// Sorts tags as people count: numbers by their value, a version before what comes after it and behind its own pre-releases.
pub fn sort_by_version(tags: &mut [String]) {
    tags.sort_by_cached_key(|tag| version_key(tag));
}

/// A part of a tag, in the order in which parts stand in lists. The end of a tag stands behind a pre-release (`1.0-rc1` before
/// `1.0`) and before everything else (`1.0` before `1.0.1`).
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    PreRelease,
    End,
    Number(usize, String),
    Text(String),
}

fn version_key(tag: &str) -> (Vec<Part>, String) {
    let text = match tag.strip_prefix(['v', 'V']) {
        Some(rest) if rest.starts_with(|first: char| first.is_ascii_digit()) => rest,
        _ => tag,
    };
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_digit = first.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != is_digit).unwrap_or(rest.len());
        let (part, behind) = rest.split_at(end);
        rest = behind;
        if is_digit {
            // By length and then by digits is by value, however many digits there are.
            let digits = part.trim_start_matches('0').to_owned();
            parts.push(Part::Number(digits.len(), digits));
        } else {
            if is_pre_release(part) {
                parts.push(Part::PreRelease);
            }
            parts.push(Part::Text(part.to_owned()));
        }
    }
    parts.push(Part::End);
    (parts, tag.to_owned())
}

/// Semantic versioning puts everything behind a `-` before the version itself. Tags say so much else there (`1.36-musl`) that only
/// the usual words count.
fn is_pre_release(part: &str) -> bool {
    let word = part.trim_matches(['-', '.', '_']).to_ascii_lowercase();
    part.starts_with('-') && ["alpha", "beta", "rc", "pre", "preview", "dev", "snapshot"].contains(&&*word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_sorted_as_people_count() {
        let sorted = [
            "0.9",
            "1.0-alpha",
            "1.0-beta.2",
            "1.0-rc1",
            "1.0-rc2",
            "1.0-rc10",
            "1.0",
            "1.0-musl",
            "1.0.1",
            "1.2",
            "1.10",
            "v2.0.0",
            "10.0",
            "edge",
            "latest",
        ];
        let mut tags: Vec<String> = sorted.iter().rev().map(ToString::to_string).collect();
        sort_by_version(&mut tags);
        assert_eq!(tags, sorted);
    }
}
