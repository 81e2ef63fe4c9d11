//! Looking at an image without sending it anywhere: what it is made of, and what is wrong with it.
//!
//! Both are the coordinator's own work: what a check reads, it only hashes, and no worker is asked for a slot.

use std::sync::Arc;

use occy_pipeline::check::{self, CheckReport, Severity};
use occy_pipeline::digest::Digest;
use occy_pipeline::open;
use occy_pipeline::progress::ImagesProgress;
use occy_pipeline::wire::{convert, document, head};
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{self, ImageElement, ImageEnd, check_image_response, inspect_image_response};
use tokio::sync::mpsc;

use super::progress::{self, Workers};
use crate::admit::Work;
use crate::error::ServiceError;

/// Sends what an image is made of.
pub async fn inspect(
    work: Work,
    answers: mpsc::Sender<inspect_image_response::Part>,
) -> Result<(), ServiceError> {
    use inspect_image_response::Part;
    let send = async |part| answers.send(part).await.map_err(|_| ServiceError::CallerGone);
    let source = open::source(&work.source, &work.settings)?.end;
    let mut image = source.image().await?;
    source.settle(&mut image).await?;
    if let Some(index) = source.index().await? {
        send(Part::IndexMediaType(index.manifest.media_type)).await?;
        for piece in document::pieces(index.manifest.bytes) {
            send(Part::Index(piece)).await?;
        }
    }
    let end = Element::End(ImageEnd { layer_count: convert::count(image.layers.len()) });
    for element in head::elements(&image, v1::LayerForm::Stored).chain([end]) {
        send(Part::Element(ImageElement { element: Some(element) })).await?;
    }
    Ok(())
}

/// Checks an image, and sends what is wrong with it.
pub async fn check(
    work: Work,
    fast: bool,
    answers: mpsc::Sender<check_image_response::Part>,
) -> Result<(), ServiceError> {
    use check_image_response::Part;
    let source = open::source(&work.source, &work.settings)?;
    let parallel = source.max_workers.unwrap_or(work.settings.parallel);
    let images = ImagesProgress::default();
    let progress = images.begin();
    let workers = Workers::default();
    let telling =
        progress::tell(&images, &workers, |progress| answers.try_send(Part::Progress(progress)).is_ok());
    let report = tokio::select! {
        report = check::check(source.end.as_ref(), Arc::clone(&work.plan), fast, parallel, &progress) => report?,
        never = telling => match never {},
    };
    let (findings, result) = parts(report);
    for part in findings.into_iter().map(Part::Finding).chain([Part::Result(result)]) {
        answers.send(part).await.map_err(|_| ServiceError::CallerGone)?;
    }
    Ok(())
}

fn parts(report: CheckReport) -> (Vec<v1::CheckFinding>, v1::CheckResult) {
    let findings = report.findings.into_iter().map(|finding| v1::CheckFinding {
        severity: match finding.severity {
            Severity::Warning => v1::CheckSeverity::Warning,
            Severity::Error => v1::CheckSeverity::Error,
        }
        .into(),
        layer_index: finding.layer.map(convert::count),
        message: finding.message,
    });
    let text = |digest: Option<Digest>| digest.map(|digest| digest.to_string()).unwrap_or_default();
    let result = v1::CheckResult {
        image: report.image,
        manifest_digest: text(report.manifest),
        config_digest: text(report.config),
        layer_count: convert::count(report.layers),
        verified_count: convert::count(report.verified),
    };
    (findings.collect(), result)
}
