//! What there is: at the sources, and at the targets. Nothing is written.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures_util::StreamExt;

use super::blobs::{self, Place};
use super::config::{Config, Mirror};
use super::image::{Documents, MirrorOutput, MirrorSource};
use super::lists::{Lists, Lost, Unlisted, Wanted};
use super::{ASKED_AT_ONCE, Ends};
use crate::catalog::digest_of;
use crate::copy::{CopyPlan, Gathered, gather};
use crate::digest::Digest;
use crate::error::Error;
use crate::reference::{ManifestRef, Reference};
use crate::registry::{Access, Client, Repository};

/// What a configuration finds at its registries.
pub struct Survey {
    /// In the order of the configuration.
    pub(super) images: Vec<Surveyed>,
    pub(super) lost: Vec<Lost>,
    pub(super) unlisted: Vec<Unlisted>,
    /// Of the blobs that are needed, those that are where they are.
    pub(super) present: HashSet<Place>,
}

pub(super) struct Surveyed {
    pub(super) wanted: Wanted,
    /// What the target's tag names.
    pub(super) was: Option<Digest>,
    pub(super) found: Found,
}

pub(super) enum Found {
    /// The target is as the source.
    Same,
    /// It is not, and this has to be copied.
    Differs(Gathered),
    /// It is not, and stays so.
    Refused { becomes: Option<Digest>, reason: String },
    /// It is not known.
    Failed(String),
}

/// What a tag names, for each that was asked for.
type Heads = HashMap<Reference, Result<Option<Digest>, String>>;

impl Survey {
    /// Asks.
    pub async fn make(config: &Config, ends: &Ends) -> Self {
        let mut lists = Lists::ask(config, ends).await;
        let wanted = lists.wanted(config);
        let lost = lists.lost(config, &wanted);
        let sources = heads(&ends.source, wanted.iter().map(|wanted| &wanted.source)).await;
        let targets = heads(&ends.target, wanted.iter().map(|wanted| &wanted.target)).await;
        let decisions = decide(config, wanted, &sources, &targets);
        let images = gather_all(config, ends, decisions).await;
        let present = present(ends, &images).await;
        Self { images, lost, unlisted: lists.unlisted, present }
    }
}

async fn heads(client: &Client, references: impl Iterator<Item = &Reference>) -> Heads {
    let distinct: HashSet<Reference> = references.cloned().collect();
    let asked = distinct.into_iter().map(|reference| async move {
        let repository = client.repository(&reference, Access::Pull);
        let head = match reference.manifest() {
            ManifestRef::Tag(tag) => digest_of(&repository, &tag).await.map_err(|error| error.to_string()),
            ManifestRef::Digest(digest) => Ok(Some(digest)),
        };
        (reference, head)
    });
    futures_util::stream::iter(asked).buffer_unordered(ASKED_AT_ONCE).collect().await
}

/// Whether an image has to be looked into.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// The source's digest.
    Look(Digest),
    Same,
    Refused(Option<Digest>, String),
    Failed(String),
}

/// What is known of each image by its tags alone.
fn decide(
    config: &Config,
    wanted: Vec<Wanted>,
    sources: &Heads,
    targets: &Heads,
) -> Vec<(Wanted, Option<Digest>, Decision)> {
    let mut first: HashMap<Reference, Reference> = HashMap::new();
    let mut decisions = Vec::with_capacity(wanted.len());
    for wanted in wanted {
        let mirror = &config.mirrors[wanted.mirror];
        let head = |heads: &Heads, reference: &Reference| heads.get(reference).cloned().unwrap_or(Ok(None));
        let (source, target) = (head(sources, &wanted.source), head(targets, &wanted.target));
        let was = target.as_ref().ok().cloned().flatten();
        let owner = first.entry(wanted.target.clone()).or_insert_with(|| wanted.source.clone());
        let decision = match (source, target) {
            _ if *owner != wanted.source => {
                Decision::Refused(None, format!("the same target is {owner}'s, which stands before it"))
            }
            (Err(error), _) | (_, Err(error)) => Decision::Failed(error),
            (Ok(None), Ok(_)) => Decision::Failed(format!("{} does not exist", wanted.source)),
            (Ok(Some(source)), Ok(target)) => of_digests(mirror, &wanted, source, target.as_ref()),
        };
        decisions.push((wanted, was, decision));
    }
    decisions
}

fn of_digests(mirror: &Mirror, wanted: &Wanted, source: Digest, target: Option<&Digest>) -> Decision {
    // Some platforms of an index are another index, and what belongs to a manifest may have come after it.
    let is_whole = mirror.platforms.is_empty() && !mirror.referrers;
    if is_whole && target == Some(&source) {
        return Decision::Same;
    }
    match refusal(mirror, wanted, target, &source) {
        Some(reason) if mirror.platforms.is_empty() => Decision::Refused(Some(source), reason),
        _ => Decision::Look(source),
    }
}

/// Why a target's tag must not be given to another manifest.
fn refusal(mirror: &Mirror, wanted: &Wanted, was: Option<&Digest>, becomes: &Digest) -> Option<String> {
    let tag = wanted.target.tag()?.as_str();
    let is_kept = was.is_some_and(|was| was != becomes) && mirror.immutable.is_match(tag);
    is_kept.then(|| "the tag is immutable, and the source has another manifest for it".to_owned())
}

async fn gather_all(
    config: &Config,
    ends: &Ends,
    decisions: Vec<(Wanted, Option<Digest>, Decision)>,
) -> Vec<Surveyed> {
    let mut documents: HashMap<String, Arc<Documents>> = HashMap::new();
    // The targets of one image stand together, and one after the other find its documents read.
    let mut groups: Vec<Vec<(Wanted, Option<Digest>, Decision)>> = Vec::new();
    for decision in decisions {
        match groups.last_mut() {
            Some(group) if group[0].0.source == decision.0.source => group.push(decision),
            _ => groups.push(vec![decision]),
        }
    }
    let gathered = groups.into_iter().map(|group| {
        let name = group[0].0.source.name();
        let documents = Arc::clone(documents.entry(name).or_default());
        async move {
            let mut images = Vec::with_capacity(group.len());
            for (wanted, was, decision) in group {
                let mirror = &config.mirrors[wanted.mirror];
                let found = match decision {
                    Decision::Same => Found::Same,
                    Decision::Failed(error) => Found::Failed(error),
                    Decision::Refused(becomes, reason) => Found::Refused { becomes, reason },
                    Decision::Look(digest) => {
                        let source =
                            MirrorSource::new(&ends.source, &wanted.source, digest, Arc::clone(&documents));
                        match look(mirror, ends, &wanted, was.clone(), &source).await {
                            Ok(found) => found,
                            Err(error @ Error::Signed { .. }) => {
                                Found::Refused { becomes: None, reason: error.to_string() }
                            }
                            Err(error) => Found::Failed(error.to_string()),
                        }
                    }
                };
                images.push(Surveyed { wanted, was, found });
            }
            images
        }
    });
    let gathered: Vec<_> =
        futures_util::stream::iter(gathered.collect::<Vec<_>>()).buffered(ASKED_AT_ONCE).collect().await;
    gathered.into_iter().flatten().collect()
}

/// What an entry of the configuration says of a copy.
pub(super) fn copy_plan(mirror: &Mirror, parallel: usize) -> CopyPlan {
    CopyPlan {
        platforms: mirror.platforms.clone(),
        sparse: mirror.sparse,
        referrers: mirror.referrers,
        preserve_digests: false,
        signatures: mirror.signatures,
        parallel,
    }
}

async fn look(
    mirror: &Mirror,
    ends: &Ends,
    wanted: &Wanted,
    was: Option<Digest>,
    source: &MirrorSource,
) -> Result<Found, Error> {
    let output = MirrorOutput::new(&ends.target, &wanted.target, was.clone(), None);
    let gathered = gather(source, &output, &copy_plan(mirror, ends.parallel)).await?;
    let becomes = gathered.root().digest.clone();
    if let Some(reason) = refusal(mirror, wanted, was.as_ref(), &becomes) {
        return Ok(Found::Refused { becomes: Some(becomes), reason });
    }
    let is_same = gathered.is_named() && gathered.missing() == 0;
    let target = ends.target.repository(&wanted.target, Access::Pull);
    if is_same && has_belongings(&gathered, &target).await? {
        return Ok(Found::Same);
    }
    Ok(Found::Differs(gathered))
}

/// Whether a target lists all that belongs to the manifests of an image.
async fn has_belongings(gathered: &Gathered, target: &Repository) -> Result<bool, Error> {
    let mut listed: HashMap<&Digest, HashSet<Digest>> = HashMap::new();
    for (subject, referrer) in gathered.referrers() {
        if !listed.contains_key(subject) {
            let found = target.referrers(subject).await?.manifests;
            listed.insert(subject, found.into_iter().map(|entry| entry.digest).collect());
        }
        if !listed[subject].contains(referrer) {
            return Ok(false);
        }
    }
    for (tag, digest) in gathered.digest_tags() {
        if digest_of(target, tag).await?.as_ref() != Some(digest) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Which of the blobs that are needed are where they are needed.
async fn present(ends: &Ends, images: &[Surveyed]) -> HashSet<Place> {
    let mut seen = HashSet::new();
    let mut asked = Vec::new();
    for image in images {
        let Found::Differs(gathered) = &image.found else { continue };
        let repository = ends.target.repository(&image.wanted.target, Access::Push);
        for blob in gathered.blobs().iter().filter(|blob| !blob.is_foreign()) {
            let Some(descriptor) = &blob.descriptor else { continue };
            if seen.insert(blobs::place(&repository, &descriptor.digest)) {
                asked.push((repository.clone(), descriptor.digest.clone(), descriptor.size));
            }
        }
    }
    let asked = asked.into_iter().map(|(repository, digest, size)| async move {
        // Who cannot be asked will not take it either, and that is told then.
        let found = repository.blob_head(&digest).await.ok().flatten();
        (found == Some(size)).then(|| blobs::place(&repository, &digest))
    });
    let found: Vec<_> = futures_util::stream::iter(asked).buffer_unordered(ASKED_AT_ONCE).collect().await;
    found.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(tags: &[(&str, Option<&str>)]) -> Heads {
        let head = |(name, content): &(&str, Option<&str>)| {
            let digest = content.map(|content| Digest::sha256(content.as_bytes()));
            (name.parse().unwrap(), Ok(digest))
        };
        tags.iter().map(head).collect()
    }

    fn wanted(source: &str, target: &str) -> Wanted {
        Wanted { mirror: 0, source: source.parse().unwrap(), target: target.parse().unwrap() }
    }

    /// The decision for `a.example/x:1`, which is `one`, at a target that is `was`.
    #[track_caller]
    fn decision(more: &str, was: Option<&str>) -> Decision {
        let text = format!("mirrors: [{{sources: [a.example/x], targets: [b.example/x]{more}}}]");
        let config = Config::parse(&text).unwrap();
        let wanted = vec![wanted("a.example/x:1", "b.example/x:1")];
        let (sources, targets) = (heads(&[("a.example/x:1", Some("one"))]), heads(&[("b.example/x:1", was)]));
        decide(&config, wanted, &sources, &targets).remove(0).2
    }

    #[test]
    fn what_is_the_same_is_not_looked_into() {
        let look = Decision::Look(Digest::sha256(b"one"));
        assert_eq!(decision("", Some("one")), Decision::Same);
        assert_eq!(decision("", None), look);
        assert_eq!(decision("", Some("other")), look);
        assert_eq!(decision(", immutable: ['1']", Some("one")), Decision::Same);
        assert_eq!(decision(", immutable: ['1']", None), look);
        assert!(matches!(decision(", immutable: ['1']", Some("other")), Decision::Refused(Some(_), _)));
        assert_eq!(decision(", immutable: ['2']", Some("other")), look);
        // What these become is not known yet.
        assert_eq!(decision(", referrers: true", Some("one")), look);
        assert_eq!(decision(", platforms: [linux/amd64], immutable: ['1']", Some("other")), look);
    }

    #[test]
    fn one_target_is_one_sources() {
        let config = Config::parse("mirrors: [{sources: [a.example/x], targets: [b.example/x]}]").unwrap();
        let both = vec![wanted("a.example/x:1", "b.example/x:1"), wanted("a.example/y:1", "b.example/x:1")];
        let sources = heads(&[("a.example/x:1", Some("one")), ("a.example/y:1", Some("two"))]);
        let decided = decide(&config, both, &sources, &Heads::new());
        assert!(matches!(decided[0].2, Decision::Look(_)));
        assert!(matches!(&decided[1].2, Decision::Refused(_, reason) if reason.contains("a.example/x:1")));
    }
}
