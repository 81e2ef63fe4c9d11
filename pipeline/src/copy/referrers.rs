//! What names a copied manifest as its subject, at the destination.
//!
//! A registry that lists referrers says so when it takes one. For all others clients keep the list: an index under a tag that is
//! called like the subject (distribution-spec, "Referrers Tag Schema"). Nothing serialises clients there, so the index is read
//! again after it was written, and written again if somebody else's has taken its place.

use serde_json::{Value, json};

use super::gather::{Gathered, Referrer};
use super::{CopiedReferrer, in_copy};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::media_type::OCI_INDEX;
use crate::manifest::{self, Descriptor, ParsedManifest};
use crate::output::content::ContentOutput;
use crate::reference::Tag;
use crate::registry::{FetchedManifest, fallback_tag};

/// How often an index is written that others change too.
const ATTEMPTS: u32 = 5;

/// Puts the referrers, and the tags that are called like digests.
pub(super) async fn put(
    gathered: &Gathered,
    output: &dyn ContentOutput,
) -> Result<Vec<CopiedReferrer>, Error> {
    if gathered.referrers.is_empty() && gathered.digest_tags.is_empty() {
        return Ok(Vec::new());
    }
    let mut copied = Vec::new();
    let mut unlisted: Vec<(Digest, Vec<&Descriptor>)> = Vec::new();
    for Referrer { subject, listed, manifest } in &gathered.referrers {
        let answered = in_copy(&manifest.digest, output.put_manifest(manifest).await)?;
        let is_listed = answered.as_ref() == Some(subject);
        if !is_listed {
            match unlisted.iter_mut().find(|(other, _)| other == subject) {
                Some((_, list)) => list.push(listed),
                None => unlisted.push((subject.clone(), vec![listed])),
            }
        }
        copied.push(CopiedReferrer {
            digest: manifest.digest.clone(),
            subject: subject.clone(),
            artifact_type: listed.raw().get("artifactType").and_then(Value::as_str).map(str::to_owned),
            is_listed,
        });
    }
    for (subject, listed) in unlisted {
        list(&fallback_tag(&subject), &listed, output).await?;
    }
    for (tag, manifest) in &gathered.digest_tags {
        output.put_tagged(tag, manifest).await?;
    }
    Ok(copied)
}

/// Adds descriptors to the index under a subject's tag.
async fn list(tag: &Tag, listed: &[&Descriptor], output: &dyn ContentOutput) -> Result<(), Error> {
    for _ in 0..ATTEMPTS {
        let found = output.tagged(tag).await?;
        let Some(index) = extended(found.as_ref(), listed, tag)? else { return Ok(()) };
        output.put_tagged(tag, &index).await?;
    }
    Err(Error::Contended { tag: tag.to_string() })
}

/// The index with what it lacks of the descriptors; None where it lacks nothing.
fn extended(
    found: Option<&FetchedManifest>,
    listed: &[&Descriptor],
    tag: &Tag,
) -> Result<Option<FetchedManifest>, Error> {
    let mut document = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []})
        .as_object()
        .cloned()
        .unwrap_or_default();
    let mut entries: Vec<Value> = Vec::new();
    let mut missing: Vec<&Descriptor> = listed.to_vec();
    if let Some(found) = found {
        let fail = |source| Error::Manifest { image: format!("the index of referrers {tag}"), source };
        match manifest::parse(&found.bytes, Some(&found.media_type)).map_err(fail)? {
            ParsedManifest::Index(index) => {
                missing.retain(|listed| index.manifests.iter().all(|entry| entry.digest != listed.digest));
                entries = index.manifests.iter().map(|entry| entry.raw().clone().into()).collect();
                document = index.raw().clone();
            }
            ParsedManifest::Image(_) | ParsedManifest::Schema1(_) => {
                let source = manifest::ManifestError::Unknown(found.media_type.clone());
                return Err(fail(source));
            }
        }
    }
    if missing.is_empty() {
        return Ok(None);
    }
    entries.extend(missing.iter().map(|listed| Value::from(listed.raw().clone())));
    document.insert("manifests".to_owned(), entries.into());
    let bytes = manifest::to_bytes(&document);
    let (digest, media_type) = (Digest::sha256(&bytes), OCI_INDEX.to_owned());
    Ok(Some(FetchedManifest { bytes, media_type, digest }))
}
