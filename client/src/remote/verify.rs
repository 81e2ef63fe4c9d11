//! `verify` of an image that only the coordinator reaches.

use occy_pipeline::open;
use occy_pipeline::wire::convert;
use occy_proto::v1::verify_image_response::Part;
use occy_proto::v1::{VerifiedStatement, VerifyImageRequest, VerifyResult};

use super::connect::Coordinator;
use super::error::RemoteError;
use super::logins::{Which, logins};
use super::{is_registry, show, spec};
use crate::display::Shown;
use crate::options::{Global, Verify};
use crate::settings::{Misused, settings};

/// What came of each statement, and what they are about.
pub(crate) async fn verify(
    image: &str,
    options: &Verify,
    global: &Global,
) -> anyhow::Result<(Vec<VerifiedStatement>, VerifyResult)> {
    let source = options.source.as_deref().map(open::in_full).unwrap_or_default();
    let ends: Vec<&str> = [image, &source].into_iter().filter(|end| !end.is_empty()).collect();
    if let Some(here) = ends.iter().find(|end| !is_registry(end)) {
        let problem =
            format!("`verify` with --coordinator is of images in registries, and {here} is on this machine");
        return Err(Misused(problem).into());
    }
    spec::refuse_registry_options(global, &ends)?;
    let spools = settings(global, image, None)?.spools;
    let coordinator = Coordinator::needed(global, "verify").await?;
    let request = VerifyImageRequest {
        image: image.to_owned(),
        parallel: convert::count(global.parallel),
        max_layer_size: global.max_layer_size,
        // The image is where it was written to, and what it was made of is the source.
        credentials: logins(global, &coordinator, &source, Some(image), Which::All).await?,
        source,
    };
    let shown = Shown::new(global, image, &spools);
    let begin = shown.begin_each();
    let (mut progress, mut number) = (begin(), 0);
    let answered = coordinator.client.clone().verify_image(request).await;
    let mut answers = answered.map_err(|status| coordinator.error(status))?.into_inner();
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
