//! What is planned for the images of a mirror, and what came of it.

use std::time::Duration;

use occy_proto::v1::{MirrorAction, MirrorImage, MirrorOutcome, MirrorPrice, MirrorProgress, MirrorResult};

use super::WireError;
use super::convert::{count, split};
use crate::digest::Digest;
use crate::mirror::{Action, Counts, Outcome, Plan, Price, Report, What};
use crate::reference::InvalidReference;

/// Bytes of a problem or a hint, which may quote what a stranger said.
const TEXT_MAX: usize = 1024;

/// An image of a plan, and what came of it, where that is known.
pub fn image(index: usize, action: &Action, outcome: Option<&Outcome>) -> MirrorImage {
    let mut image = MirrorImage {
        index: count(index),
        source: action.source.clone(),
        target: action.target.as_ref().map(ToString::to_string).unwrap_or_default(),
        was: digest_text(action.was.as_ref()),
        becomes: digest_text(action.becomes.as_ref()),
        backup: action.backup.as_ref().map(ToString::to_string).unwrap_or_default(),
        price: Some(price(&action.price)),
        filtered: action.is_filtered,
        ..MirrorImage::default()
    };
    let planned = match &action.what {
        What::Nothing => MirrorAction::Nothing,
        What::Create => MirrorAction::Create,
        What::Update => MirrorAction::Update,
        What::Complete => MirrorAction::Complete,
        What::Delete => MirrorAction::Delete,
        What::Refuse(problem) => {
            image.problem = cut(problem);
            MirrorAction::Refuse
        }
        What::Fail(problem) => {
            image.problem = cut(problem);
            MirrorAction::Fail
        }
    };
    image.set_action(planned);
    let end = match outcome {
        None => MirrorOutcome::Unspecified,
        Some(Outcome::Nothing) => MirrorOutcome::Unchanged,
        Some(Outcome::Copied {
            blobs,
            blobs_found,
            manifests,
            made,
            attestations_dropped,
            signatures_kept,
            provenance,
        }) => {
            image.made = digest_text(made.as_ref());
            image.provenance = digest_text(provenance.as_ref());
            image.attestations_dropped = *attestations_dropped as u64;
            image.signatures_kept = *signatures_kept as u64;
            image.blobs = *blobs as u64;
            image.blobs_found = *blobs_found as u64;
            image.manifests = *manifests as u64;
            MirrorOutcome::Copied
        }
        Some(Outcome::Deleted) => MirrorOutcome::Deleted,
        Some(Outcome::Refused(problem)) => {
            image.problem = cut(problem);
            MirrorOutcome::Refused
        }
        Some(Outcome::Failed { problem, hint }) => {
            image.problem = cut(problem);
            image.hint = hint.as_deref().map(cut).unwrap_or_default();
            MirrorOutcome::Failed
        }
    };
    image.set_outcome(end);
    image
}

/// The image of a plan that it is, and what came of it, where it says that.
pub fn of_image(image: MirrorImage) -> Result<(Action, Option<Outcome>), WireError> {
    let problem = image.problem.clone();
    let what = match image.action() {
        MirrorAction::Unspecified | MirrorAction::Nothing => What::Nothing,
        MirrorAction::Create => What::Create,
        MirrorAction::Update => What::Update,
        MirrorAction::Complete => What::Complete,
        MirrorAction::Delete => What::Delete,
        MirrorAction::Refuse => What::Refuse(problem.clone()),
        MirrorAction::Fail => What::Fail(problem.clone()),
    };
    let outcome = match image.outcome() {
        MirrorOutcome::Unspecified => None,
        MirrorOutcome::Unchanged => Some(Outcome::Nothing),
        MirrorOutcome::Copied => Some(Outcome::Copied {
            blobs: number(image.blobs),
            blobs_found: number(image.blobs_found),
            manifests: number(image.manifests),
            made: digest(&image.made)?,
            attestations_dropped: number(image.attestations_dropped),
            signatures_kept: number(image.signatures_kept),
            provenance: digest(&image.provenance)?,
        }),
        MirrorOutcome::Deleted => Some(Outcome::Deleted),
        MirrorOutcome::Refused => Some(Outcome::Refused(problem)),
        MirrorOutcome::Failed => {
            let hint = Some(image.hint).filter(|hint| !hint.is_empty());
            Some(Outcome::Failed { problem, hint })
        }
    };
    let fail = |error: InvalidReference| WireError::elements(error.to_string());
    let action = Action {
        target: named(&image.target).map(str::parse).transpose().map_err(fail)?,
        what,
        was: digest(&image.was)?,
        becomes: digest(&image.becomes)?,
        backup: named(&image.backup).map(str::parse).transpose().map_err(fail)?,
        price: image.price.as_ref().map(of_price).unwrap_or_default(),
        is_filtered: image.filtered,
        ..Action::impossible(&image.source, "")
    };
    Ok((action, outcome))
}

/// What came of a whole plan; of a dry run, how much of it cannot be done.
pub fn result(plan: &Plan, report: Option<&Report>) -> MirrorResult {
    let impossible =
        plan.actions.iter().filter(|action| matches!(action.what, What::Refuse(_) | What::Fail(_))).count();
    MirrorResult {
        done: report.map_or(0, Report::done) as u64,
        failed: report.map_or(impossible, Report::failed) as u64,
        images: plan.actions.len() as u64,
        bytes_fetched: report.map_or(0, |report| report.bytes_fetched),
        bytes_uploaded: report.map_or(0, |report| report.bytes_uploaded),
        blobs_mounted: report.map_or(0, |report| report.mounted as u64),
        moved: report.and_then(|report| report.moved.as_ref()).map(price),
        price: Some(price(&plan.price)),
        dry_run: report.is_none(),
    }
}

/// How far a mirror is, where anything can be told of it.
pub fn progress(counts: Counts) -> Option<MirrorProgress> {
    (counts.images > 0).then_some(MirrorProgress {
        images: counts.images,
        images_done: counts.done,
        images_failed: counts.failed,
        bytes_fetched: counts.moved.bytes_fetched,
        bytes_uploaded: counts.moved.bytes_uploaded,
        blobs_mounted: counts.moved.mounted as u64,
    })
}

/// How far a mirror is.
pub fn of_progress(told: &MirrorProgress) -> Counts {
    Counts {
        images: told.images,
        done: told.images_done,
        failed: told.images_failed,
        moved: Price {
            bytes_fetched: told.bytes_fetched,
            bytes_uploaded: told.bytes_uploaded,
            mounted: number(told.blobs_mounted),
            ..Price::default()
        },
    }
}

/// The plan that these images were, and what came of it.
pub fn of_result(
    images: Vec<(Action, Option<Outcome>)>,
    result: &MirrorResult,
    elapsed: Duration,
) -> (Plan, Report) {
    let (actions, outcomes): (Vec<_>, Vec<_>) = images.into_iter().unzip();
    let price = result.price.as_ref().map(of_price).unwrap_or_default();
    let report = Report {
        outcomes: outcomes.into_iter().map(Option::unwrap_or_default).collect(),
        moved: result.moved.as_ref().map(of_price),
        bytes_fetched: result.bytes_fetched,
        bytes_uploaded: result.bytes_uploaded,
        mounted: number(result.blobs_mounted),
        elapsed,
    };
    (Plan { actions, price, ..Plan::default() }, report)
}

fn price(price: &Price) -> MirrorPrice {
    MirrorPrice {
        fetched: price.fetched as u64,
        bytes_fetched: price.bytes_fetched,
        uploaded: price.uploaded as u64,
        bytes_uploaded: price.bytes_uploaded,
        mounted: price.mounted as u64,
        bytes_mounted: price.bytes_mounted,
        found: price.found as u64,
        manifests: price.manifests as u64,
        requests: price.requests as u64,
        filtered: price.filtered as u64,
        bytes_filtered: price.bytes_filtered,
    }
}

fn of_price(price: &MirrorPrice) -> Price {
    Price {
        fetched: number(price.fetched),
        bytes_fetched: price.bytes_fetched,
        uploaded: number(price.uploaded),
        bytes_uploaded: price.bytes_uploaded,
        mounted: number(price.mounted),
        bytes_mounted: price.bytes_mounted,
        found: number(price.found),
        manifests: number(price.manifests),
        requests: number(price.requests),
        filtered: number(price.filtered),
        bytes_filtered: price.bytes_filtered,
    }
}

fn number(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn named(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn digest_text(digest: Option<&Digest>) -> String {
    digest.map(ToString::to_string).unwrap_or_default()
}

fn digest(text: &str) -> Result<Option<Digest>, WireError> {
    let parsed = named(text).map(str::parse).transpose();
    parsed.map_err(|error| WireError::elements(format!("a digest: {error}")))
}

fn cut(text: &str) -> String {
    split(text, TEXT_MAX).0.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_of_an_image_comes_back() {
        let digest = |text: &str| Some(Digest::sha256(text));
        let action = Action {
            target: Some("b.example/x:1".parse().unwrap()),
            what: What::Update,
            was: digest("old"),
            becomes: digest("new"),
            backup: Some("before-1".parse().unwrap()),
            price: Price { fetched: 1, bytes_fetched: 2, requests: 3, ..Price::default() },
            ..Action::impossible("a.example/x:1", "")
        };
        let outcomes = [
            None,
            Some(Outcome::Nothing),
            Some(Outcome::Copied {
                blobs: 1,
                blobs_found: 2,
                manifests: 3,
                made: Some(Digest::sha256(b"made")),
                attestations_dropped: 4,
                signatures_kept: 5,
                provenance: Some(Digest::sha256(b"provenance")),
            }),
            Some(Outcome::Deleted),
            Some(Outcome::Refused("no".to_owned())),
            Some(Outcome::Failed { problem: "gone".to_owned(), hint: Some("look".to_owned()) }),
        ];
        for outcome in outcomes {
            let (action_back, outcome_back) = of_image(image(7, &action, outcome.as_ref())).unwrap();
            assert_eq!(format!("{action_back:?}"), format!("{action:?}"));
            assert_eq!(outcome_back, outcome);
        }
        let refused = Action { what: What::Refuse("no".to_owned()), ..action };
        assert_eq!(of_image(image(0, &refused, None)).unwrap().0.what, refused.what);
        assert!(of_image(MirrorImage { was: "x".to_owned(), ..MirrorImage::default() }).is_err());
    }

    #[test]
    fn what_an_earlier_release_has_not_counted_is_not_known() {
        let moved = Price { fetched: 2, bytes_fetched: 7, mounted: 3, ..Price::default() };
        let report = Report {
            outcomes: Vec::new(),
            moved: Some(moved),
            bytes_fetched: 7,
            bytes_uploaded: 0,
            mounted: 3,
            elapsed: Duration::ZERO,
        };
        let told = result(&Plan::default(), Some(&report));
        let back = |told: &MirrorResult| of_result(Vec::new(), told, Duration::ZERO).1;
        assert_eq!(back(&told).moved, Some(moved));
        let earlier = back(&MirrorResult { moved: None, ..told });
        assert_eq!((earlier.moved, earlier.bytes_fetched, earlier.mounted), (None, 7, 3));
    }

    #[test]
    fn a_problem_is_cut_between_characters() {
        let long = Action { what: What::Fail("ä".repeat(2000)), ..Action::impossible("x", "") };
        assert_eq!(image(0, &long, None).problem.len(), TEXT_MAX);
    }
}
