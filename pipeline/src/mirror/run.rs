//! Does what is planned: images side by side, each whole or not at all, one's failure none of the others'; deletions last.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;

use super::blobs::Blobs;
use super::config::Config;
use super::filtered::{self, OncePerLayer};
use super::image::MirrorOutput;
use super::lists::Wanted;
use super::plan::{Action, Need, Plan, Price, What};
use super::progress::MirrorProgress;
use super::survey::{Candidate, Found, Making, Survey, Surveyed, copy_plan, signed};
use super::{Ends, locked};
use crate::catalog::{self, delete};
use crate::copy::{Copied, write};
use crate::digest::Digest;
use crate::element::ImageName;
use crate::error::Error;
use crate::manifest::media_type::ACCEPTED_MANIFESTS;
use crate::manifest::{self, ParsedManifest};
use crate::output::content::ContentOutput;
use crate::progress::Progress;
use crate::reference::{ManifestRef, Reference, Tag};
use crate::registry::Access;

/// Images that are copied at once. Their blobs are bounded by [`Ends::parallel`].
pub(super) const IMAGES_AT_ONCE: usize = 8;

/// What came of a plan.
#[derive(Debug)]
pub struct Report {
    /// Of each of the plan's actions.
    pub outcomes: Vec<Outcome>,
    /// What all of them took, of images that failed too, counted as the plan's price is. What was found where it was needed and requests
    /// are not counted. None: it is not known of a mirror that an earlier release has made, but for what follows.
    pub moved: Option<Price>,
    /// Bytes of blobs that came from sources.
    pub bytes_fetched: u64,
    /// Bytes of blobs that went to targets.
    pub bytes_uploaded: u64,
    /// Blobs that were mounted.
    pub mounted: usize,
    /// Of the run, without the survey.
    pub elapsed: Duration,
}

/// What came of an action.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// There was nothing to do.
    #[default]
    Nothing,
    /// The image is there.
    Copied {
        /// Blobs that were moved for it, or by it for others too.
        blobs: usize,
        /// Blobs that were there or mounted.
        blobs_found: usize,
        /// Manifests that were put.
        manifests: usize,
        /// What the tag names now, where that was not known before.
        made: Option<Digest>,
        /// Attestations that were left out, because filters changed their images.
        attestations_dropped: usize,
        /// Signatures of what changed that were kept beside it.
        signatures_kept: usize,
        /// The artifact that says how it was made, where that was wanted.
        provenance: Option<Digest>,
    },
    /// The tag is gone.
    Deleted,
    /// Nothing was done: a rule forbids it.
    Refused(String),
    /// The target is as it was before.
    Failed {
        /// Why.
        problem: String,
        /// What can be done about it.
        hint: Option<String>,
    },
}

impl Outcome {
    /// That of an image that was copied without filters.
    pub(super) fn of(copied: &Copied) -> Self {
        let (blobs, blobs_found) = (copied.blobs, copied.blobs_found);
        let manifests = copied.manifests + copied.digest_tags.len();
        let signatures_kept = copied.kept.len();
        Self::Copied {
            blobs,
            blobs_found,
            manifests,
            made: None,
            attestations_dropped: 0,
            signatures_kept,
            provenance: None,
        }
    }

    /// Whether the target is left otherwise than its source.
    pub(super) fn is_failure(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Failed { .. })
    }
}

impl Report {
    /// What `progress` has counted while this came of the actions.
    pub(super) fn of(outcomes: Vec<Outcome>, progress: &MirrorProgress, elapsed: Duration) -> Self {
        let manifests = outcomes.iter().map(|outcome| match outcome {
            Outcome::Copied { manifests, .. } => *manifests,
            _ => 0,
        });
        let moved = Price { manifests: manifests.sum(), ..progress.get().moved };
        let Price { bytes_fetched, bytes_uploaded, mounted, .. } = moved;
        Self { outcomes, moved: Some(moved), bytes_fetched, bytes_uploaded, mounted, elapsed }
    }

    /// How many of the actions changed something.
    pub fn done(&self) -> usize {
        let is_done = |outcome: &&Outcome| matches!(outcome, Outcome::Copied { .. } | Outcome::Deleted);
        self.outcomes.iter().filter(is_done).count()
    }

    /// How many left a target otherwise than its source.
    pub fn failed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.is_failure()).count()
    }
}

impl Survey {
    /// Does what was planned of this survey, and tells of each of the plan's actions, by its number, what came of it when that is known.
    ///
    /// # Cancel safety
    /// Cancelled, it leaves each tag as it was or with the complete new image, and blobs that nobody names; another run goes on
    /// from there.
    pub async fn run(
        self,
        config: &Config,
        plan: &Plan,
        ends: &Ends,
        tell: impl Fn(usize, &Outcome) + Sync,
    ) -> Report {
        let start = Instant::now();
        ends.progress.change(|counts| counts.images = plan.actions.len() as u64);
        let tell = &|index, outcome: &Outcome| {
            ends.progress.take(outcome);
            tell(index, outcome);
        };
        let uploads = plan.uploads.iter().map(|(needed, targets)| {
            let targets = targets.iter().map(|target| ends.target.repository(target, Access::Push));
            (needed.clone(), targets.collect())
        });
        let blobs = Arc::new(Blobs::new(
            self.present,
            plan.holders.clone(),
            uploads.collect(),
            ends.spools.clone(),
            ends.parallel,
            ends.progress.clone(),
        ));
        let layers = Arc::new(OncePerLayer::new(ends));
        let mut images: HashMap<usize, Surveyed> = self.images.into_iter().enumerate().collect();
        let copies = plan.actions.iter().enumerate().filter_map(|(index, action)| {
            let is_copy = matches!(action.what, What::Create | What::Update | What::Complete);
            let image = is_copy.then(|| images.remove(&action.number)).flatten()?;
            let (blobs, layers) = (Arc::clone(&blobs), Arc::clone(&layers));
            Some(async move {
                let brought = async {
                    match &image.found {
                        Found::MadeOfOther(making) => {
                            make_image(config, ends, action, &image.wanted, making, (&layers, &blobs)).await
                        }
                        _ => copy_image(config, ends, action, image, blobs).await,
                    }
                };
                let outcome = told(action, brought.await);
                tell(index, &outcome);
                (index, outcome)
            })
        });
        let copies: Vec<_> = copies.collect();
        drop(images);
        let mut outcomes: HashMap<usize, Outcome> =
            futures_util::stream::iter(copies).buffer_unordered(IMAGES_AT_ONCE).collect().await;
        let deletions: HashSet<Reference> = plan
            .actions
            .iter()
            .filter(|action| action.what == What::Delete)
            .filter_map(|action| action.target.clone())
            .collect();
        for (index, action) in plan.actions.iter().enumerate() {
            if let (What::Delete, Some(target)) = (&action.what, &action.target) {
                let deleted = locked(ends.locks.as_ref(), target, delete_tag(ends, target, &deletions));
                let outcome = told(action, deleted.await);
                tell(index, &outcome);
                outcomes.insert(index, outcome);
            }
        }
        let outcomes = plan.actions.iter().enumerate().map(|(index, action)| {
            let known = outcomes.remove(&index);
            let outcome = match &action.what {
                What::Refuse(reason) => Outcome::Refused(reason.clone()),
                What::Fail(problem) => Outcome::Failed { problem: problem.clone(), hint: None },
                _ => match known {
                    Some(known) => return known,
                    None => Outcome::Nothing,
                },
            };
            tell(index, &outcome);
            outcome
        });
        Report::of(outcomes.collect(), &ends.progress, start.elapsed())
    }
}

fn told(action: &Action, outcome: Result<Outcome, Error>) -> Outcome {
    let target = action.target.as_ref().map(ToString::to_string).unwrap_or_default();
    match outcome {
        Ok(mut outcome) => {
            tracing::info!(source = action.source, target, "done");
            if let (Outcome::Copied { manifests, .. }, Some(_)) = (&mut outcome, &action.backup) {
                // What the tag named before got another one.
                *manifests += 1;
            }
            outcome
        }
        Err(error) => {
            tracing::info!(source = action.source, target, %error, "failed");
            if let Some(reason) = signed(&error) {
                return Outcome::Refused(reason);
            }
            Outcome::Failed { problem: error.to_string(), hint: error.hint() }
        }
    }
}

/// Makes an image by filters.
async fn make_image(
    config: &Config,
    ends: &Ends,
    action: &Action,
    wanted: &Wanted,
    making: &Making,
    shared: (&Arc<OncePerLayer>, &Arc<Blobs>),
) -> Result<Outcome, Error> {
    if let Some(backup) = &action.backup {
        back_up(ends, action, &wanted.target, backup).await?;
    }
    filtered::make(ends, &config.mirrors[wanted.mirror], wanted, making, shared).await
}

async fn copy_image(
    config: &Config,
    ends: &Ends,
    action: &Action,
    image: Surveyed,
    blobs: Arc<Blobs>,
) -> Result<Outcome, Error> {
    let Surveyed { wanted, was, found } = image;
    let Found::Differs(difference) = found else { return Ok(Outcome::Nothing) };
    let gathered = match difference.gathered {
        Some(gathered) => gathered,
        None => {
            let source = &difference.source;
            let candidate = Candidate { config, ends, wanted: &wanted, was: was.as_ref(), source };
            candidate.gather(&Arc::default()).await?
        }
    };
    let plan = copy_plan(&config.mirrors[wanted.mirror], ends.parallel);
    let blobs = Some((blobs, Need::Copied));
    let output: Arc<dyn ContentOutput> = Arc::new(MirrorOutput::new(ends, &wanted.target, was, blobs));
    if let Some(backup) = &action.backup {
        back_up(ends, action, &wanted.target, backup).await?;
    }
    let tag = wanted.source.tag().map(ToString::to_string);
    let name = ImageName { repository: wanted.source.name(), tag };
    let copied = write(gathered, &name, &output, &plan, &Progress::default()).await?;
    Ok(Outcome::of(&copied))
}

/// Gives the manifest that a tag is about to be taken from another one. If that fails, the tag stays.
async fn back_up(ends: &Ends, action: &Action, target: &Reference, backup: &Tag) -> Result<(), Error> {
    let Some(was) = &action.was else { return Ok(()) };
    let repository = ends.target.repository(target, Access::Push);
    let old = repository.manifest(&ManifestRef::Digest(was.clone()), &ACCEPTED_MANIFESTS).await?;
    repository.put_manifest(&ManifestRef::Tag(backup.clone()), &old.media_type, old.bytes).await?;
    Ok(())
}

/// Deletes a tag, alone, or with others that are to be deleted too. Not as a manifest that an index which stays is made of.
async fn delete_tag(ends: &Ends, target: &Reference, all: &HashSet<Reference>) -> Result<Outcome, Error> {
    let repository = ends.target.repository(target, Access::Delete);
    let is_lost = |tag: &String| tag.parse::<Tag>().is_ok_and(|tag| all.contains(&target.with_tag(tag)));
    let Some(tag) = target.tag() else { return Ok(Outcome::Nothing) };
    if catalog::delete_tag(&repository, tag).await? {
        return Ok(Outcome::Deleted);
    }
    let Some(digest) = catalog::digest_of(&repository, tag).await? else { return Ok(Outcome::Deleted) };
    for name in repository.tags().all().await?.iter().filter(|name| !is_lost(name)) {
        let Ok(other) = name.parse::<Tag>() else { continue };
        let found = repository.find_manifest(&ManifestRef::Tag(other), &ACCEPTED_MANIFESTS).await?;
        let Some(found) = found.filter(|found| found.digest != digest) else { continue };
        if let Ok(ParsedManifest::Index(index)) = manifest::parse(&found.bytes, Some(&found.media_type))
            && index.manifests.iter().any(|entry| entry.digest == digest)
        {
            let problem = format!("it can only be deleted as {digest}, which the index {name} is made of");
            return Err(Error::Host(problem.into()));
        }
    }
    let deleted = match delete(&repository, target, false).await {
        Err(Error::SharedManifest { tags, .. }) if tags.iter().all(is_lost) => {
            delete(&repository, target, true).await
        }
        deleted => deleted,
    };
    match deleted {
        Ok(_) | Err(Error::NoSuchImage(_)) => Ok(Outcome::Deleted),
        Err(error) => Err(error),
    }
}
