//! What there is: at the sources, and at the targets. Nothing is written.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::StreamExt;

use super::blobs::{self, Place};
use super::config::{Config, Mirror};
use super::filtered::MadeOf;
use super::image::{Documents, MirrorOutput, MirrorSource};
use super::lists::{Lists, Lost, Unlisted, Wanted};
use super::origin::Origin;
use super::parts::Parts;
use super::{ASKED_AT_ONCE, Ends};
use crate::catalog::digest_of;
use crate::copy::signatures::refuse_signed;
use crate::copy::{CopyPlan, Gathered, SignaturePolicy, gather};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::reference::Reference;
use crate::registry::{Access, FetchedManifest, Repository};

/// What is kept of images until their turn comes is about so many bytes. What the plan needs of an image is kept in any case; its
/// manifests are while there is room, and are otherwise asked for again when its turn comes.
const KEPT_BYTES: usize = 32 * 1024 * 1024;
/// What a blob that was gathered takes beside its manifest, about.
const BLOB_BYTES: usize = 2 * 1024;
/// What the plan needs of a blob, about.
const NEEDED_BYTES: usize = 128;

/// How much is asked before anything is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Every blob at every place that it is needed at, so that the price of a plan is what it will take.
    Price,
    /// What must be known to move nothing that could be mounted. Whether other blobs are there is asked when they are brought; the
    /// price of a plan is the most that it may take.
    Need,
}

/// What a configuration finds at its registries.
pub struct Survey {
    /// In the order of the configuration.
    pub(super) images: Vec<Surveyed>,
    pub(super) lost: Vec<Lost>,
    pub(super) unlisted: Vec<Unlisted>,
    /// Of the blobs that are needed, those that are where they are, as far as that was asked.
    pub(super) present: HashSet<Place>,
    /// By registry and blob, a repository that is listed to have it.
    pub(super) holders: HashMap<(String, Digest), String>,
    /// Whether a registry can mount what it is the source of.
    pub(super) can_mount: bool,
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
    Differs(Box<Difference>),
    /// It was made of something else, or otherwise, and has to be made of this.
    MadeOfOther(Box<Making>),
    /// It is not, and stays so.
    Refused { becomes: Option<Digest>, reason: String },
    /// It is not known.
    Failed(String),
}

/// What has to be copied, of one image.
pub(super) struct Difference {
    /// The source's digest.
    pub(super) source: Digest,
    /// What the target's tag will name.
    pub(super) becomes: Digest,
    /// Manifests that have to be put.
    pub(super) manifests: usize,
    /// The blobs that all of them name, foreign ones left out.
    pub(super) blobs: Vec<(Digest, u64)>,
    /// All of it, unless that was too much to keep.
    pub(super) gathered: Option<Gathered>,
}

impl Difference {
    fn of(source: Digest, gathered: Gathered, kept: &Kept) -> Self {
        let blobs: Vec<_> = gathered.own_blobs().map(|blob| (blob.digest.clone(), blob.size)).collect();
        kept.add(NEEDED_BYTES * blobs.len());
        let size = gathered.size() + BLOB_BYTES * gathered.blobs().len();
        let (becomes, manifests) = (gathered.root().digest.clone(), gathered.manifests());
        let fits = kept.fits(size);
        Self { source, becomes, manifests, blobs, gathered: fits.then_some(gathered) }
    }
}

/// How many bytes are kept of images.
#[derive(Default)]
struct Kept(AtomicUsize);

impl Kept {
    /// Counts what is kept in any case.
    fn add(&self, size: usize) {
        self.0.fetch_add(size, Ordering::Relaxed);
    }

    /// Whether so many bytes more can be kept, which then they are.
    fn fits(&self, size: usize) -> bool {
        let fits = self.0.fetch_add(size, Ordering::Relaxed) + size <= KEPT_BYTES;
        if !fits {
            self.0.fetch_sub(size, Ordering::Relaxed);
        }
        fits
    }
}

/// What an image has to be made of that passes filters.
pub(super) struct Making {
    /// The source's digest.
    pub(super) source: Digest,
    /// What it consists of.
    pub(super) parts: Parts,
    /// What was read of it, for all its targets, unless that was too much to keep.
    pub(super) documents: Arc<Documents>,
}

impl Found {
    /// What the target's tag will name, of an image that is to be brought there and of which that is known.
    pub(super) fn becomes(&self) -> Option<&Digest> {
        match self {
            Self::Differs(difference) => Some(&difference.becomes),
            _ => None,
        }
    }

    fn making_mut(&mut self) -> Option<&mut Making> {
        match self {
            Self::MadeOfOther(making) => Some(making),
            _ => None,
        }
    }
}

/// What a target's tag names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    digest: Digest,
    /// Where images pass filters: what this one says that it was made of.
    made_of: Option<MadeOf>,
}

/// What each tag of a target names.
type Targets = HashMap<Reference, Result<Option<Named>, String>>;

impl Survey {
    /// Asks.
    pub async fn make(config: &Config, ends: &Ends, detail: Detail) -> Self {
        let mut lists = Lists::ask(config, &ends.source).await;
        let wanted = lists.wanted(config);
        let mut lost = Vec::new();
        // What is not in a layout may be at its source: nothing says that it was lost.
        if let Origin::Registries(_) = ends.source {
            lists.ask_targets(config, &ends.target).await;
            lost = lists.lost(config, &wanted);
        }
        let targets = named_at_targets(config, ends, &wanted).await;
        let images = look_at_all(config, ends, wanted, &targets).await;
        let present = present(ends, &images, detail).await;
        let holders = ends.have.holders().collect();
        Self { images, lost, unlisted: lists.unlisted, present, holders, can_mount: ends.source.can_mount() }
    }
}

/// Asks targets what their tags name: for the digest alone, or, where images pass filters, for the manifest, which says what it was
/// made of.
async fn named_at_targets(config: &Config, ends: &Ends, wanted: &[Wanted]) -> Targets {
    let mut distinct: HashMap<Reference, bool> = HashMap::new();
    for wanted in wanted {
        *distinct.entry(wanted.target.clone()).or_default() |=
            !config.mirrors[wanted.mirror].filters.is_empty();
    }
    let asked = distinct.into_iter().map(|(target, is_filtered)| async move {
        let repository = ends.target.repository(&target, Access::Pull);
        let named = match (is_filtered, target.tag()) {
            (false, Some(tag)) => {
                let head = digest_of(&repository, tag).await;
                head.map(|head| head.map(|digest| Named { digest, made_of: None }))
            }
            _ => {
                let found = repository.find_manifest(&target.manifest(), &ACCEPTED_MANIFESTS).await;
                let named = |found: FetchedManifest| Named {
                    made_of: MadeOf::told(&found.bytes),
                    digest: found.digest,
                };
                found.map(|found| found.map(named)).map_err(Error::from)
            }
        };
        (target, named.map_err(|error| error.to_string()))
    });
    futures_util::stream::iter(asked).buffer_unordered(ASKED_AT_ONCE).collect().await
}

/// Whether an image has to be looked into.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// The source's digest.
    Look(Digest),
    /// The same, of an image that passes filters.
    Make(Digest),
    Same,
    Refused(Option<Digest>, String),
    Failed(String),
}

/// For each image, whose its target is, if that is another source's which stands before it.
fn owners(wanted: &[Wanted]) -> Vec<Option<Reference>> {
    let mut first: HashMap<&Reference, &Reference> = HashMap::new();
    let owner = wanted.iter().map(|wanted| {
        let owner = *first.entry(&wanted.target).or_insert(&wanted.source);
        (*owner != wanted.source).then(|| owner.clone())
    });
    owner.collect()
}

/// What is known of an image by its tags alone.
fn decide(
    config: &Config,
    wanted: &Wanted,
    owner: Option<&Reference>,
    source: &Result<Option<Digest>, String>,
    target: &Result<Option<Named>, String>,
) -> Decision {
    if let Some(owner) = owner {
        return Decision::Refused(None, format!("the same target is {owner}'s, which stands before it"));
    }
    match (source, target) {
        (Err(error), _) | (_, Err(error)) => Decision::Failed(error.clone()),
        (Ok(None), Ok(_)) => Decision::Failed(format!("{} does not exist", wanted.source)),
        (Ok(Some(source)), Ok(target)) => {
            of_names(&config.mirrors[wanted.mirror], wanted, source.clone(), target.as_ref())
        }
    }
}

fn of_names(mirror: &Mirror, wanted: &Wanted, source: Digest, target: Option<&Named>) -> Decision {
    let made_of = target.and_then(|target| target.made_of.as_ref());
    let target = target.map(|target| &target.digest);
    if !mirror.filters.is_empty() {
        if wanted.source == wanted.target {
            let reason = "its target is its source, of which filters would make another one each time";
            return Decision::Refused(None, reason.to_owned());
        }
        if made_of == Some(&MadeOf::wanted(mirror, &source)) {
            return Decision::Same;
        }
        return match refusal(mirror, wanted, target, None) {
            Some(reason) => Decision::Refused(None, reason),
            None => Decision::Make(source),
        };
    }
    // Some platforms of an index are another index, and what belongs to a manifest may have come after it.
    let is_whole = mirror.platforms.is_empty() && !mirror.referrers;
    if is_whole && target == Some(&source) {
        return Decision::Same;
    }
    match refusal(mirror, wanted, target, Some(&source)) {
        Some(reason) if mirror.platforms.is_empty() => Decision::Refused(Some(source), reason),
        _ => Decision::Look(source),
    }
}

/// Why a target's tag must not be given to another manifest; to a new one where it is not known which.
fn refusal(
    mirror: &Mirror,
    wanted: &Wanted,
    was: Option<&Digest>,
    becomes: Option<&Digest>,
) -> Option<String> {
    let tag = wanted.target.tag()?.as_str();
    let is_kept = was.is_some() && was != becomes && mirror.immutable.is_match(tag);
    is_kept.then(|| "the tag is immutable, and the source has another manifest for it".to_owned())
}

/// One image of a source, with all its targets: their places in the configuration's order.
struct Group {
    source: Reference,
    images: Vec<(usize, Wanted, Option<Reference>)>,
    documents: Arc<Documents>,
}

/// Asks the sources, image by image, and looks into those that differ.
async fn look_at_all(config: &Config, ends: &Ends, wanted: Vec<Wanted>, targets: &Targets) -> Vec<Surveyed> {
    let owners = owners(&wanted);
    let mut documents: HashMap<String, Arc<Documents>> = HashMap::new();
    let mut numbers: HashMap<Reference, usize> = HashMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for (number, (wanted, owner)) in wanted.into_iter().zip(owners).enumerate() {
        let at = *numbers.entry(wanted.source.clone()).or_insert_with(|| {
            let documents = Arc::clone(documents.entry(wanted.source.name()).or_default());
            groups.push(Group { source: wanted.source.clone(), images: Vec::new(), documents });
            groups.len() - 1
        });
        groups[at].images.push((number, wanted, owner));
    }
    // From here on a repository's documents are there until its last image was looked at.
    drop(documents);
    let kept = &Kept::default();
    let looked = groups.into_iter().map(|group| look_at(config, ends, group, targets, kept));
    let looked = futures_util::stream::iter(looked).buffered(ASKED_AT_ONCE).collect::<Vec<_>>().await;
    let mut images: Vec<(usize, Surveyed)> = looked.into_iter().flatten().collect();
    images.sort_by_key(|(number, _)| *number);
    images.into_iter().map(|(_, image)| image).collect()
}

async fn look_at(
    config: &Config,
    ends: &Ends,
    group: Group,
    targets: &Targets,
    kept: &Kept,
) -> Vec<(usize, Surveyed)> {
    let Group { source, images, documents } = group;
    let target = |wanted: &Wanted| targets.get(&wanted.target).cloned().unwrap_or(Ok(None));
    // What no target has will be read in any case: then that is the question too.
    let is_new = images.iter().any(|(_, wanted, owner)| owner.is_none() && target(wanted) == Ok(None));
    let named = match is_new {
        true => documents.named(&ends.source, &source).await,
        false => ends.source.digest_of(&source).await,
    };
    let named = named.map_err(|error| error.to_string());
    let mut surveyed = Vec::with_capacity(images.len());
    // Of what has to be made, for all targets: it is kept until then, and without what else was read of the repository.
    let mut own: Option<Arc<Documents>> = None;
    for (number, wanted, owner) in images {
        let target = target(&wanted);
        let was = target.as_ref().ok().and_then(Option::as_ref).map(|named| named.digest.clone());
        let refused = |error: Error| match signed(&error) {
            Some(reason) => Found::Refused { becomes: None, reason },
            None => Found::Failed(error.to_string()),
        };
        let found = match decide(config, &wanted, owner.as_ref(), &named, &target) {
            Decision::Same => Found::Same,
            Decision::Failed(error) => Found::Failed(error),
            Decision::Refused(becomes, reason) => Found::Refused { becomes, reason },
            Decision::Look(digest) => {
                let candidate =
                    Candidate { config, ends, wanted: &wanted, was: was.as_ref(), source: &digest };
                candidate.look(&documents, kept).await.unwrap_or_else(refused)
            }
            Decision::Make(digest) => {
                let candidate =
                    Candidate { config, ends, wanted: &wanted, was: was.as_ref(), source: &digest };
                let own = own.get_or_insert_with(|| Arc::new(documents.only(&digest)));
                candidate.making(own, kept).await.unwrap_or_else(refused)
            }
        };
        surveyed.push((number, Surveyed { wanted, was, found }));
    }
    if let Some(own) = own {
        let mut makings: Vec<_> =
            surveyed.iter_mut().filter_map(|(_, image)| image.found.making_mut()).collect();
        if !makings.is_empty() && !kept.fits(own.size()) {
            makings.iter_mut().for_each(|making| making.documents = Arc::default());
        }
    }
    surveyed
}

/// What is to be said of something signed that was not to be changed, if that is what is wrong.
pub(super) fn signed(error: &Error) -> Option<String> {
    matches!(error, Error::Signed { .. }).then(|| {
        format!(
            "{error}; `signatures: drop` in the file leaves its signatures behind, `keep` takes them along"
        )
    })
}

/// What an entry of the configuration says of a copy.
pub(super) fn copy_plan(mirror: &Mirror, parallel: usize) -> CopyPlan {
    CopyPlan {
        platforms: mirror.platforms.clone(),
        any_platform: true,
        sparse: mirror.sparse,
        referrers: mirror.referrers,
        preserve_digests: false,
        signatures: mirror.signatures,
        parallel,
    }
}

/// An image whose tags do not say that its target is as its source.
pub(super) struct Candidate<'a> {
    pub(super) config: &'a Config,
    pub(super) ends: &'a Ends,
    pub(super) wanted: &'a Wanted,
    /// What the target's tag names.
    pub(super) was: Option<&'a Digest>,
    /// What the source names.
    pub(super) source: &'a Digest,
}

impl Candidate<'_> {
    fn mirror(&self) -> &Mirror {
        &self.config.mirrors[self.wanted.mirror]
    }

    /// What the image consists of, of which the target is asked what it has.
    pub(super) async fn gather(&self, documents: &Arc<Documents>) -> Result<Gathered, Error> {
        let Self { ends, wanted, was, source, .. } = self;
        let source =
            MirrorSource::new(&ends.source, &wanted.source, (*source).clone(), Arc::clone(documents));
        let output = MirrorOutput::new(ends, &wanted.target, was.cloned(), None);
        gather(&source, &output, &copy_plan(self.mirror(), ends.parallel)).await
    }

    /// What an image is made of that passes filters. It is read before anything is done, and not again when that is.
    async fn making(&self, documents: &Arc<Documents>, kept: &Kept) -> Result<Found, Error> {
        let Self { ends, wanted, source, .. } = self;
        let store = ends.source.source(&wanted.source, source, Arc::clone(documents));
        let store = store.store().ok_or(Error::NoSourceManifest)?;
        if self.mirror().signatures == SignaturePolicy::Refuse {
            // It will be another manifest in any case, so that nothing need be moved to know.
            refuse_signed(store, &wanted.source.to_string(), source).await?;
        }
        let output = MirrorOutput::new(ends, &wanted.target, None, None);
        let parts = Parts::of(store, self.mirror(), &output).await?;
        kept.add(NEEDED_BYTES * parts.blobs.len());
        let documents = Arc::clone(documents);
        Ok(Found::MadeOfOther(Box::new(Making { source: (*source).clone(), parts, documents })))
    }

    async fn look(&self, documents: &Arc<Documents>, kept: &Kept) -> Result<Found, Error> {
        let gathered = self.gather(documents).await?;
        let becomes = gathered.root().digest.clone();
        if let Some(reason) = refusal(self.mirror(), self.wanted, self.was, Some(&becomes)) {
            return Ok(Found::Refused { becomes: Some(becomes), reason });
        }
        let is_same = gathered.is_named() && gathered.missing() == 0;
        let target = self.ends.target.repository(&self.wanted.target, Access::Pull);
        if is_same && has_belongings(&gathered, &target).await? {
            return Ok(Found::Same);
        }
        Ok(Found::Differs(Box::new(Difference::of(self.source.clone(), gathered, kept))))
    }
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
async fn present(ends: &Ends, images: &[Surveyed], detail: Detail) -> HashSet<Place> {
    // By blob, the repositories that need it.
    let mut needed: HashMap<&Digest, HashMap<String, (&Reference, u64)>> = HashMap::new();
    let mut known: HashSet<String> = HashSet::new();
    for image in images {
        let target = &image.wanted.target;
        if image.was.is_some() {
            known.insert(target.name());
        }
        let Found::Differs(difference) = &image.found else { continue };
        for (digest, size) in &difference.blobs {
            needed.entry(digest).or_default().insert(target.name(), (target, *size));
        }
    }
    let mut asked = Vec::new();
    for (digest, places) in needed {
        let hosts: HashSet<&str> = places.values().map(|(target, _)| target.host()).collect();
        for (name, (target, size)) in &places {
            let on_host = places.values().filter(|(other, _)| other.host() == target.host()).count();
            // One place alone is asked when it gets the blob. Of several the first that has it saves the upload to the others; a
            // repository of which no tag is there is not that.
            if detail == Detail::Price || hosts.len() > 1 || on_host > 1 && known.contains(name) {
                asked.push((ends.target.repository(target, Access::Push), digest.clone(), *size));
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

    fn source(content: Option<&str>) -> Result<Option<Digest>, String> {
        Ok(content.map(|content| Digest::sha256(content.as_bytes())))
    }

    fn named(content: Option<&str>) -> Result<Option<Named>, String> {
        Ok(source(content)?.map(|digest| Named { digest, made_of: None }))
    }

    fn wanted(source: &str, target: &str) -> Wanted {
        Wanted { mirror: 0, source: source.parse().unwrap(), target: target.parse().unwrap() }
    }

    /// The decision for `a.example/x:1`, which is `one`, at a target that is `was`.
    #[track_caller]
    fn decision(more: &str, was: Option<&str>) -> Decision {
        let text = format!("mirrors: [{{sources: [a.example/x], targets: [b.example/x]{more}}}]");
        let config = Config::parse(&text).unwrap();
        let wanted = wanted("a.example/x:1", "b.example/x:1");
        decide(&config, &wanted, None, &source(Some("one")), &named(was))
    }

    #[test]
    fn what_passes_filters_is_known_by_what_it_says_that_it_was_made_of() {
        let text = "mirrors: [{sources: [a.example/x], targets: [b.example/x], filters: [normalize-timestamps], \
                    immutable: ['2']}]";
        let config = Config::parse(text).unwrap();
        let made_of = |source: &str| MadeOf::wanted(&config.mirrors[0], &Digest::sha256(source.as_bytes()));
        let decision = |tag: &str, was: Option<&str>| {
            let target =
                was.map(|was| Named { digest: Digest::sha256(b"made"), made_of: Some(made_of(was)) });
            let wanted = wanted("a.example/x:1", &format!("b.example/x:{tag}"));
            decide(&config, &wanted, None, &source(Some("one")), &Ok(target))
        };
        assert_eq!(decision("1", Some("one")), Decision::Same);
        assert_eq!(decision("1", Some("other")), Decision::Make(Digest::sha256(b"one")));
        assert_eq!(decision("1", None), Decision::Make(Digest::sha256(b"one")));
        assert_eq!(decision("2", Some("one")), Decision::Same);
        assert!(matches!(decision("2", Some("other")), Decision::Refused(None, _)));
        // The source itself has passed no filter.
        let wanted = wanted("a.example/x:1", "b.example/x:1");
        let made = decide(&config, &wanted, None, &source(Some("one")), &named(Some("one")));
        assert_eq!(made, Decision::Make(Digest::sha256(b"one")));
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
    fn what_is_kept_in_any_case_leaves_less_room_and_what_does_not_fit_takes_none() {
        let kept = Kept::default();
        kept.add(KEPT_BYTES - 2);
        assert!(!kept.fits(3));
        assert!(kept.fits(2) && !kept.fits(1));
    }

    #[test]
    fn one_target_is_one_sources() {
        let config = Config::parse("mirrors: [{sources: [a.example/x], targets: [b.example/x]}]").unwrap();
        let both = [wanted("a.example/x:1", "b.example/x:1"), wanted("a.example/y:1", "b.example/x:1")];
        let owners = owners(&both);
        let decide = |number: usize| {
            decide(&config, &both[number], owners[number].as_ref(), &source(Some("one")), &named(None))
        };
        assert!(matches!(decide(0), Decision::Look(_)));
        assert!(matches!(decide(1), Decision::Refused(_, reason) if reason.contains("a.example/x:1")));
    }
}
