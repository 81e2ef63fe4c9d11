//! Whole images, indexes and artifacts from one place that keeps manifests to another.
//!
//! The coordinator moves the bytes by itself: nothing is computed but their digests.

use std::sync::Arc;

use occy_pipeline::copy::{self, Copied, CopiedReferrer, CopyPlan};
use occy_pipeline::open;
use occy_pipeline::output::content::ContentOutput;
use occy_pipeline::progress::ImagesProgress;
use occy_pipeline::source::stored::Store;
use occy_pipeline::wire::convert;
use occy_proto::v1::copy_image_response::Part;
use occy_proto::v1::{self, CopyResult};
use tokio::sync::mpsc;

use super::progress::{self, Workers};
use crate::admit::Work;
use crate::error::ServiceError;

/// Copies what the source names to what the destination names, and sends what that was.
pub async fn copy(work: Work, plan: CopyPlan, answers: mpsc::Sender<Part>) -> Result<(), ServiceError> {
    let source = open::store(&work.source, &work.settings)?;
    let output = open::content_output(&work.destination, &work.settings)?;
    between(source, output, plan, answers).await
}

/// The same with ends that are open.
pub(super) async fn between(
    source: Arc<dyn Store>,
    output: Arc<dyn ContentOutput>,
    plan: CopyPlan,
    answers: mpsc::Sender<Part>,
) -> Result<(), ServiceError> {
    let images = ImagesProgress::default();
    let progress = images.begin();
    let workers = Workers::default();
    let telling =
        progress::tell(&images, &workers, |progress| answers.try_send(Part::Progress(progress)).is_ok());
    let copied = tokio::select! {
        copied = copy::copy(source, output, &plan, &progress) => copied?,
        never = telling => match never {},
    };
    for part in parts(copied) {
        answers.send(part).await.map_err(|_| ServiceError::CallerGone)?;
    }
    Ok(())
}

fn parts(copied: Copied) -> impl Iterator<Item = Part> {
    let result = CopyResult {
        manifest_digest: copied.digest.to_string(),
        manifest_media_type: copied.media_type,
        destination: copied.destination,
        manifests: copied.manifests as u64,
        manifests_found: copied.manifests_found as u64,
        blobs: copied.blobs as u64,
        blobs_found: copied.blobs_found as u64,
        bytes: copied.bytes,
        elapsed_millis: u64::try_from(copied.elapsed.as_millis()).unwrap_or(u64::MAX),
    };
    let referrer = |CopiedReferrer { digest, subject, artifact_type, is_listed }| {
        Part::Referrer(v1::CopiedReferrer {
            digest: digest.to_string(),
            subject: subject.to_string(),
            artifact_type: artifact_type.unwrap_or_default(),
            listed: is_listed,
        })
    };
    let referrers = copied.referrers.into_iter().map(referrer);
    let kept = copied.kept.into_iter().map(|signature| Part::Kept(convert::kept_signature(signature)));
    let left_out = copied.left_out.into_iter().map(|digest| Part::LeftOut(digest.to_string()));
    referrers
        .chain(copied.digest_tags.into_iter().map(Part::DigestTag))
        .chain(kept)
        .chain(left_out)
        .chain([Part::Result(result)])
}
