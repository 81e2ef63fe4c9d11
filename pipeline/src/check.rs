//! Everything that can be wrong with an image: recomputes each digest, diff_id and size, and reports all that does not agree.
//!
//! Reading goes on after a finding. Only what keeps us from looking (a network, a disk) is an error.

use std::sync::Arc;

use serde::Serialize;
use tokio::task::JoinSet;

use crate::digest::Digest;
use crate::element::{Image, Layer};
use crate::error::{Blame, Error};
use crate::progress::{LayerState, Progress};
use crate::source::ImageSource;
use crate::source::arrivals::Coming;
use crate::task::LayerPlan;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which layer, the lowest being 0; None where it is the image's as a whole.
    pub layer: Option<usize>,
    /// What it is, for people.
    pub message: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The image works, but something about it is not as it should be.
    Warning,
    /// The image is broken.
    Error,
}

/// What was looked at, and what is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// The image's name, where the source got as far as to say it.
    pub image: Option<String>,
    /// The digest of its manifest.
    pub manifest: Option<Digest>,
    /// The digest of its config.
    pub config: Option<Digest>,
    /// Layers in the image.
    pub layers: usize,
    /// Layers whose every byte was read and agrees.
    pub verified: usize,
    /// What is wrong, the image's own first, then by layer.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Whether nothing is broken.
    pub fn is_sound(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity < Severity::Error)
    }
}

impl Finding {
    fn image(severity: Severity, message: String) -> Self {
        Self { severity, layer: None, message }
    }
}

/// Checks an image. `fast` reads no layer: manifest and config have to agree, and every blob to be there in its size.
pub async fn check(
    source: &dyn ImageSource,
    plan: Arc<LayerPlan>,
    fast: bool,
    parallel: usize,
    progress: &Progress,
) -> Result<CheckReport, Error> {
    let mut image = match source.image().await {
        Ok(image) => image,
        Err(error) if error.blame() == Blame::Image || error.is_missing_blob() => {
            return Ok(CheckReport::of_unreadable(&error));
        }
        Err(error) => return Err(error),
    };
    progress.begin(image.layers.iter().map(|layer| (layer.label(), layer.blob.size())));
    let mut coming = Coming::new(source, 0..image.layers.len());
    let mut findings = Vec::new();
    let mut is_all = false;
    let mut running = JoinSet::new();
    let mut verified = 0;
    loop {
        // Either branch may be dropped: neither takes anything before it is ready.
        tokio::select! {
            next = coming.next(), if !is_all && running.len() < parallel.max(1) => {
                let Some(arrival) = next else {
                    is_all = true;
                    continue;
                };
                let layer = image.layers[arrival.index].clone();
                let (plan, progress, is_image) = (Arc::clone(&plan), progress.clone(), image.is_image());
                running.spawn(async move {
                    let _arrival = arrival;
                    let result = check_layer(&plan, &layer, fast, is_image, &progress).await;
                    (layer, result)
                });
            }
            Some(ended) = running.join_next(), if !running.is_empty() => match ended {
                Ok((layer, Ok(Checked { read, mut found }))) => {
                    verified += if read && found.is_empty() { places(&image, &layer, &coming) } else { 0 };
                    found.iter_mut().for_each(|finding| finding.layer = Some(layer.index));
                    findings.append(&mut found);
                }
                Ok((layer, Err(error))) if error.blame() == Blame::Image || error.is_missing_blob() => {
                    let message = error.to_string();
                    findings.push(Finding { severity: Severity::Error, layer: Some(layer.index), message });
                }
                Ok((layer, Err(error))) => {
                    return Err(Error::in_layer("check", layer.index, image.layers.len(), layer.label(), error));
                }
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            },
            else => break,
        }
    }
    match source.settle(&mut image).await {
        Ok(()) => findings.append(&mut check_documents(&image)),
        // A layer was told of it.
        Err(error) if error.is_interrupted() && !findings.is_empty() => {}
        Err(error) if error.blame() == Blame::Image => {
            findings.push(Finding::image(Severity::Error, error.to_string()));
        }
        Err(error) => return Err(error),
    }
    findings.append(&mut source.audit(!fast).await?);
    // Layers are done in any order; None, the image's own, sorts first.
    findings.sort_by_key(|finding| finding.layer);
    Ok(CheckReport {
        image: Some(image.name.to_string()),
        manifest: image.manifest.as_ref().map(|manifest| manifest.digest.clone()),
        config: image.config.digest(),
        layers: image.layers.len(),
        verified,
        findings,
    })
}

/// The places of the image for which a layer was read: a source that sends its layers sends what stands twice once.
fn places(image: &Image, layer: &Layer, coming: &Coming) -> usize {
    match coming {
        Coming::Chosen(_) => 1,
        Coming::Arriving(_) => {
            let identity = layer.blob.identity();
            image.layers.iter().filter(|other| other.blob.identity() == identity).count()
        }
    }
}

/// What came of one layer.
struct Checked {
    read: bool,
    found: Vec<Finding>,
}

async fn check_layer(
    plan: &LayerPlan,
    layer: &Layer,
    fast: bool,
    is_image: bool,
    progress: &Progress,
) -> Result<Checked, Error> {
    let state = &progress.layers()[layer.index];
    let mut found = Vec::new();
    if layer.is_foreign() {
        let message = "is not distributable: its bytes are elsewhere and were not read".to_owned();
        found.push(Finding::image(Severity::Warning, message));
        return Ok(Checked { read: false, found });
    }
    state.set(LayerState::Running);
    if fast {
        if let (Some(origin), Some(descriptor)) = (&layer.origin, &layer.descriptor) {
            let message = match origin.blob_head(&descriptor.digest).await? {
                None => Some("is missing".to_owned()),
                Some(size) if size != descriptor.size => Some(format!(
                    "size mismatch: the manifest says {} bytes, the registry has {size}",
                    descriptor.size
                )),
                Some(_) => None,
            };
            found.extend(message.map(|message| Finding::image(Severity::Error, message)));
        }
        state.set(LayerState::Done);
        return Ok(Checked { read: false, found });
    }
    if !is_image {
        plan.read_blob(layer, state).await?;
        state.set(LayerState::Done);
        return Ok(Checked { read: true, found });
    }
    let (summary, format) = plan.observe(layer, None, None, state).await?;
    if let Some(expected) = &layer.diff_id
        && *expected != summary.input.digest
    {
        let error = Error::DiffId { expected: expected.clone(), computed: summary.input.digest };
        found.push(Finding::image(Severity::Error, error.to_string()));
    }
    state.set(LayerState::Done);
    let stated = layer.descriptor.as_ref().and_then(|descriptor| descriptor.layer_type());
    match (&layer.descriptor, stated) {
        (Some(descriptor), None) => {
            let message = format!("the media type {:?} is not one of a layer", descriptor.media_type);
            found.push(Finding::image(Severity::Warning, message));
        }
        (Some(descriptor), Some(stated)) if stated.format != format => {
            let message = format!(
                "the media type {:?} says {}, the bytes are {format}",
                descriptor.media_type, stated.format
            );
            found.push(Finding::image(Severity::Error, message));
        }
        _ => {}
    }
    Ok(Checked { read: true, found })
}

/// What manifest and config say of each other.
fn check_documents(image: &Image) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(config) = &image.config.document else { return findings };
    if let Err(mismatch) = config.check_history() {
        findings.push(Finding::image(Severity::Error, mismatch.to_string()));
    }
    if config.platform().is_none() {
        let message =
            "the config does not say which operating system and architecture the image is for".to_owned();
        findings.push(Finding::image(Severity::Warning, message));
    }
    if let Some(manifest) = &image.manifest {
        let expected = manifest.parsed.family.config();
        if manifest.parsed.config.media_type != expected {
            let message = format!(
                "the config's media type is {:?} in a manifest of the {} format",
                manifest.parsed.config.media_type, manifest.parsed.family
            );
            findings.push(Finding::image(Severity::Warning, message));
        }
    }
    findings
}

impl CheckReport {
    fn of_unreadable(error: &Error) -> Self {
        Self {
            image: None,
            manifest: None,
            config: None,
            layers: 0,
            verified: 0,
            findings: vec![Finding::image(Severity::Error, error.to_string())],
        }
    }
}
