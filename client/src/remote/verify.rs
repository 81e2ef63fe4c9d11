//! `verify` by a coordinator, of images in registries, or with a layout of this machine that is lent to it.

use occy_pipeline::error::Error;
use occy_pipeline::open;
use occy_pipeline::wire::convert;
use occy_proto::v1::lend_start::Work;
use occy_proto::v1::verify_image_response::Part;
use occy_proto::v1::{
    VerifiedStatement, VerifyImageRequest, VerifyImageResponse, VerifyResult, lend_layout_response,
};

use super::connect::Coordinator;
use super::error::RemoteError;
use super::lend::{Answered, Lending, Lent};
use super::logins::{Which, logins};
use super::{is_registry, show, spec, told};
use crate::display::Shown;
use crate::options::{Global, Verify};
use crate::settings::settings;

/// What came of each statement, and what they are about.
pub(crate) async fn verify(
    image: &str,
    options: &Verify,
    global: &Global,
) -> anyhow::Result<(Vec<VerifiedStatement>, VerifyResult)> {
    let source = options.source.as_deref().map(open::in_full).unwrap_or_default();
    let ends: Vec<&str> = [image, &source].into_iter().filter(|end| !end.is_empty()).collect();
    spec::refuse_registry_options(global, &ends)?;
    let settings = settings(global, image, None)?;
    // What cannot be either is said as it is without a coordinator.
    open::store(image, &settings)?;
    let here = ends.iter().find(|end| !is_registry(end));
    let lent = here.map(|here| open::lent_source(here, &settings)).transpose()?;
    // Only a layout keeps manifests here.
    let lent = lent.map(|lent| lent.ok_or(Error::NoSourceManifest)).transpose()?;
    let coordinator = Coordinator::needed(global, "verify").await?;
    let request = VerifyImageRequest {
        image: told(image),
        parallel: convert::count(global.parallel),
        max_layer_size: global.max_layer_size,
        // The image is where it was written to, and what it was made of is the source.
        credentials: logins(global, &coordinator, &source, Some(image), Which::All).await?,
        source: told(&source),
    };
    let shown = Shown::new(global, image, &settings.spools);
    let begin = shown.begin_each();
    let (mut progress, mut number) = (begin(), 0);
    let mut answers = match lent {
        None => {
            let answered = coordinator.client.clone().verify_image(request).await;
            Answered::Plain(Box::new(answered.map_err(|status| coordinator.error(status))?.into_inner()))
        }
        Some(source) => {
            let lent = Lent { source: Some(source), output: None };
            let lending = Lending::begin(&coordinator, lent, Work::Verify(request)).await?;
            Answered::Lent(Box::new(lending), verify_answer)
        }
    };
    let mut statements = Vec::new();
    loop {
        let answer = answers.message().await.map_err(|status| coordinator.error(status))?;
        match answer.ok_or_else(|| RemoteError::truncated(&coordinator.url))?.part {
            Some(Part::Statement(statement)) => statements.push(statement),
            Some(Part::Progress(told)) => {
                if told.image != number {
                    (progress, number) = (begin(), told.image);
                }
                show(&progress, &told, true);
            }
            Some(Part::Result(result)) => {
                shown.end();
                return Ok((statements, result));
            }
            None => {}
        }
    }
}

fn verify_answer(part: lend_layout_response::Part) -> Option<VerifyImageResponse> {
    match part {
        lend_layout_response::Part::Verify(answer) => Some(answer),
        _ => None,
    }
}
