//! `info` and `check` of an image that only the coordinator reaches: what it says of it, as our own words would have it.

use occy_pipeline::check::{CheckReport, Finding, Severity};
use occy_pipeline::digest::Digest;
use occy_pipeline::element::Image;
use occy_pipeline::manifest::{self, ParsedManifest};
use occy_pipeline::progress::Progress;
use occy_pipeline::registry::FetchedManifest;
use occy_pipeline::source::stored::SourceIndex;
use occy_pipeline::wire::document::Document;
use occy_pipeline::wire::head::Head;
use occy_pipeline::wire::{WireError, convert};
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{self, check_image_response, inspect_image_response};

use super::connect::Coordinator;
use super::error::RemoteError;
use super::logins::{Which, logins};
use super::{show, spec};
use crate::display::Display;
use crate::options::{Check, Global};
use crate::settings::settings;

/// What an image is made of.
pub(crate) async fn inspect(source: &str, global: &Global) -> anyhow::Result<(Image, Option<SourceIndex>)> {
    use inspect_image_response::Part;
    spec::refuse_registry_options(global, &[source])?;
    let spools = settings(global, source, None)?.spools;
    let coordinator = Coordinator::needed(global, "info").await?;
    let _display = Display::start(global, Progress::default(), source, &spools);
    let platform = Some(spec::platform(global, source));
    let credentials = logins(global, &coordinator, source, None, Which::All).await?;
    let request = v1::InspectImageRequest { source: source.to_owned(), platform, credentials };
    let answered = coordinator.client.clone().inspect_image(request).await;
    let mut answers = answered.map_err(|status| coordinator.error(status))?.into_inner();
    let (mut head, mut index, mut index_type) = (Head::default(), Document::default(), String::new());
    loop {
        let answer = answers.message().await.map_err(|status| coordinator.error(status))?;
        match answer.ok_or_else(|| RemoteError::truncated(&coordinator.url))?.part {
            Some(Part::IndexMediaType(media_type)) => index_type = media_type,
            Some(Part::Index(piece)) => index.take(&piece, "the index")?,
            Some(Part::Element(v1::ImageElement { element: Some(Element::End(_)) })) => break,
            Some(Part::Element(v1::ImageElement { element: Some(element) })) => drop(head.take(element)?),
            Some(Part::Element(v1::ImageElement { element: None })) | None => {}
        }
    }
    let image = head.finish()?.into_image()?;
    let index = match index.finish("the index")? {
        None => None,
        Some(bytes) => match manifest::parse(&bytes, Some(&index_type))? {
            ParsedManifest::Index(parsed) => {
                let digest = Digest::sha256(&bytes);
                let manifest = FetchedManifest { bytes, media_type: index_type, digest };
                Some(SourceIndex { name: image.name.clone(), manifest, parsed })
            }
            _ => return Err(WireError::elements("its index is none").into()),
        },
    };
    Ok((image, index))
}

/// What is wrong with an image.
pub(crate) async fn check(options: &Check, global: &Global) -> anyhow::Result<CheckReport> {
    use check_image_response::Part;
    spec::refuse_registry_options(global, &[&options.source])?;
    let spools = settings(global, &options.source, None)?.spools;
    let coordinator = Coordinator::needed(global, "check").await?;
    let progress = Progress::default();
    let _display = Display::start(global, progress.clone(), &options.source, &spools);
    let credentials = logins(global, &coordinator, &options.source, None, Which::All).await?;
    let request = v1::CheckImageRequest {
        source: options.source.clone(),
        platform: Some(spec::platform(global, &options.source)),
        fast: options.fast,
        parallel: convert::count(global.parallel),
        max_layer_size: global.max_layer_size,
        credentials,
    };
    let answered = coordinator.client.clone().check_image(request).await;
    let mut answers = answered.map_err(|status| coordinator.error(status))?.into_inner();
    let mut findings = Vec::new();
    loop {
        let answer = answers.message().await.map_err(|status| coordinator.error(status))?;
        match answer.ok_or_else(|| RemoteError::truncated(&coordinator.url))?.part {
            Some(Part::Finding(found)) => findings.push(finding(found)),
            Some(Part::Progress(told)) => show(&progress, &told, true),
            Some(Part::Result(result)) => return Ok(report(result, findings)),
            None => {}
        }
    }
}

fn finding(found: v1::CheckFinding) -> Finding {
    Finding {
        severity: match found.severity() {
            v1::CheckSeverity::Warning => Severity::Warning,
            v1::CheckSeverity::Error | v1::CheckSeverity::Unspecified => Severity::Error,
        },
        layer: found.layer_index.map(|index| index as usize),
        message: found.message,
    }
}

fn report(result: v1::CheckResult, findings: Vec<Finding>) -> CheckReport {
    CheckReport {
        image: result.image,
        manifest: result.manifest_digest.parse().ok(),
        config: result.config_digest.parse().ok(),
        layers: result.layer_count as usize,
        verified: result.verified_count as usize,
        findings,
    }
}
