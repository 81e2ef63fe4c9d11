//! `copy` by a coordinator, from one registry to another, or with a layout of this machine that is lent to it.

use std::time::Duration;

use occy_pipeline::copy::{Copied, CopiedReferrer, CopyPlan};
use occy_pipeline::digest::Digest;
use occy_pipeline::open::Settings;
use occy_pipeline::progress::Progress;
use occy_pipeline::wire::convert::{self, digest};
use occy_proto::v1::copy_image_response::Part;
use occy_proto::v1::lend_start::Work;
use occy_proto::v1::{self, CopyImageResponse, CopyResult, lend_layout_response};

use super::connect::Coordinator;
use super::error::RemoteError;
use super::lend::{Answered, Lending, Lent};
use super::logins::{Which, logins};
use super::{show, spec, told};
use crate::options::Global;

/// Copies, and says what that was.
pub(crate) async fn copy(
    (source, destination): (&str, &str),
    plan: &CopyPlan,
    settings: &Settings,
    progress: &Progress,
    global: &Global,
) -> anyhow::Result<Copied> {
    spec::refuse_registry_options(global, &[source, destination])?;
    let coordinator = Coordinator::needed(global, "copy").await?;
    let request = v1::CopyImageRequest {
        source: told(source),
        destination: told(destination),
        platforms: plan.platforms.iter().cloned().map(convert::platform).collect(),
        sparse: plan.sparse,
        referrers: plan.referrers,
        preserve_digests: plan.preserve_digests,
        signatures: convert::signature_policy(plan.signatures).into(),
        foreign_layers: settings.foreign_layers,
        parallel: convert::count(plan.parallel),
        credentials: logins(global, &coordinator, source, Some(destination), Which::All).await?,
    };
    let mut answers = match Lent::of(source, destination, settings)? {
        None => {
            let answered = coordinator.client.clone().copy_image(request).await;
            Answered::Plain(Box::new(answered.map_err(|status| coordinator.error(status))?.into_inner()))
        }
        Some(lent) => {
            let lending = Lending::begin(&coordinator, lent, Work::Copy(request)).await?;
            Answered::Lent(Box::new(lending), copy_answer)
        }
    };
    let (mut referrers, mut digest_tags, mut kept, mut left_out) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    loop {
        let answer = answers.message().await.map_err(|status| coordinator.error(status))?;
        match answer.ok_or_else(|| RemoteError::truncated(&coordinator.url))?.part {
            Some(Part::Progress(told)) => show(progress, &told, true),
            Some(Part::Referrer(referrer)) => referrers.push(CopiedReferrer {
                digest: digest(&referrer.digest)?,
                subject: digest(&referrer.subject)?,
                artifact_type: Some(referrer.artifact_type).filter(|kind| !kind.is_empty()),
                is_listed: referrer.listed,
            }),
            Some(Part::DigestTag(tag)) => digest_tags.push(tag),
            Some(Part::Kept(signature)) => kept.push(convert::signature(signature)?),
            Some(Part::LeftOut(left)) => left_out.push(digest(&left)?),
            Some(Part::Result(result)) => {
                return Ok(Copied { kept, ..copied(result, referrers, digest_tags, left_out)? });
            }
            None => {}
        }
    }
}

fn copy_answer(part: lend_layout_response::Part) -> Option<CopyImageResponse> {
    match part {
        lend_layout_response::Part::Copy(answer) => Some(answer),
        _ => None,
    }
}

fn copied(
    result: CopyResult,
    referrers: Vec<CopiedReferrer>,
    digest_tags: Vec<String>,
    left_out: Vec<Digest>,
) -> anyhow::Result<Copied> {
    let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    Ok(Copied {
        digest: digest(&result.manifest_digest)?,
        media_type: result.manifest_media_type,
        destination: result.destination,
        manifests: count(result.manifests),
        manifests_found: count(result.manifests_found),
        blobs: count(result.blobs),
        blobs_found: count(result.blobs_found),
        bytes: result.bytes,
        referrers,
        digest_tags,
        kept: Vec::new(),
        left_out,
        elapsed: Duration::from_millis(result.elapsed_millis),
    })
}
