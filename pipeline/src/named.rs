//! An image or index that gets its name last: after the signatures of what it was, and whatever else belongs to it.
//!
//! The manifest is put by its digest. Only then is it known whether it is another one than the source's, and so whether a signature
//! would be broken; and what has it as its subject finds it there.

use std::sync::Arc;

use crate::copy::signatures::{Belonging, Change, beside, refuse_signed};
use crate::copy::{self, CopyPlan, Signature, SignaturePolicy};
use crate::digest::Digest;
use crate::element::ImageName;
use crate::error::Error;
use crate::executor::Executor;
use crate::manifest::Descriptor;
use crate::output::content::ContentOutput;
use crate::output::{ImageOutput, LayerForm, OutputError, Receipt};
use crate::process::{Outcome, process};
use crate::progress::Progress;
use crate::provenance::{self, Recipe};
use crate::registry::FetchedManifest;
use crate::source::ImageSource;
use crate::task::LayerPlan;

/// What belongs to an image that changes on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// What becomes of its signatures.
    pub signatures: SignaturePolicy,
    /// A statement of how it was made, also where it did not change.
    pub provenance: bool,
    /// Of an index, what names each image of it that did not change as its subject, and cosign's tags.
    pub referrers: bool,
}

/// What was put beside an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attached {
    /// Signatures of what changed, which are at the destination as they were.
    pub kept: Vec<Signature>,
    /// The artifact that says how the image or index was made.
    pub provenance: Option<Digest>,
    /// Manifests that were put for this, and for what belongs to what did not change. Nothing is told of it over the API.
    pub manifests: usize,
}

impl Beside {
    /// Whether something may have to be put beside what changes.
    pub fn may_attach(self) -> bool {
        self.signatures == SignaturePolicy::Keep || self.provenance || self.referrers
    }

    /// The destination's side that takes what belongs to an image.
    pub(crate) async fn content(self, output: &dyn ImageOutput) -> Result<Arc<dyn ContentOutput>, Error> {
        let content = output.content().ok_or(OutputError::NoBelongings)?;
        content.open().await?;
        if self.may_attach() && !content.names_many() {
            return Err(OutputError::OneName { destination: content.destination() }.into());
        }
        Ok(content)
    }

    /// Fails where what has changed is signed and may not be.
    pub(crate) async fn heed(
        self,
        source: &dyn ImageSource,
        name: &str,
        changed: &Digest,
    ) -> Result<(), Error> {
        match (self.signatures, source.store()) {
            (SignaturePolicy::Refuse, Some(store)) => refuse_signed(store, name, changed).await,
            // What no store holds has no signatures.
            _ => Ok(()),
        }
    }

    /// Puts what belongs to the manifests that are there, and gives `root`, which is one of them, the destination's name. Of the artifacts
    /// the first is `root`'s.
    pub(crate) async fn name(
        self,
        source: &dyn ImageSource,
        content: &Arc<dyn ContentOutput>,
        (root, name): (FetchedManifest, &ImageName),
        belonging: Belonging<'_>,
    ) -> Result<Attached, Error> {
        if let Some(expected) = content.wanted()
            && *expected != root.digest
        {
            let (expected, actual) = (expected.clone(), root.digest);
            return Err(OutputError::ByDigest { expected, actual }.into());
        }
        let Belonging { changes, unchanged, artifacts } = belonging;
        let belonging = Belonging {
            changes: if self.signatures == SignaturePolicy::Keep { changes } else { &[] },
            unchanged: if self.referrers { unchanged } else { &[] },
            artifacts,
        };
        let (gathered, kept) = beside(source.store(), content.as_ref(), root, belonging).await?;
        // All but `root`.
        let manifests = gathered.manifests() - 1;
        let plan = CopyPlan { parallel: 1, ..CopyPlan::default() };
        copy::write(gathered, name, content, &plan, &Progress::default()).await?;
        let provenance = artifacts.first().map(|artifact| artifact.digest().clone());
        Ok(Attached { kept, provenance, manifests })
    }
}

/// Processes an image like [`process`], and has it named only when all is there that belongs to it.
///
/// Signatures are asked for when the image has changed, and not before: three or four requests to the source.
pub async fn process_named(
    source: &dyn ImageSource,
    plan: Arc<LayerPlan>,
    output: Arc<dyn ImageOutput>,
    executor: Arc<dyn Executor>,
    wanted: Beside,
    progress: &Progress,
) -> Result<(Outcome, Attached), Error> {
    // Those are an index's.
    let wanted = Beside { referrers: false, ..wanted };
    if wanted.signatures == SignaturePolicy::Drop && !wanted.may_attach() {
        return Ok((process(source, plan, output, executor, progress).await?, Attached::default()));
    }
    let content = wanted.content(output.as_ref()).await?;
    if wanted.provenance && source.store().is_none() {
        return Err(Error::NoSourceManifest);
    }
    let below = output.entry_to_be().ok_or(OutputError::NoBelongings)?;
    let mut outcome = process(source, Arc::clone(&plan), below, executor, progress).await?;
    let manifest = put_manifest(&outcome.receipt)?;
    let changes: Vec<Change> = change(&outcome).into_iter().collect();
    for change in &changes {
        wanted.heed(source, &outcome.image.name.to_string(), &change.source).await?;
    }
    let mut artifacts = Vec::new();
    if wanted.provenance {
        let source_manifest = outcome.image.manifest.as_ref().ok_or(Error::NoSourceManifest)?;
        let (digest, size) = (&source_manifest.digest, source_manifest.bytes.len() as u64);
        let source_manifest = Descriptor::new(&source_manifest.media_type, digest, size);
        let recipe = recipe(source, source_manifest, &plan, output.as_ref());
        artifacts.push(provenance::artifact(&recipe, &described(&manifest), &[provenance::image(&outcome)]));
    }
    let name = outcome.image.name.clone();
    let belonging = Belonging { changes: &changes, unchanged: &[], artifacts: &artifacts };
    let attached = wanted.name(source, &content, (manifest, &name), belonging).await?;
    outcome.receipt.destination = content.destination();
    Ok((outcome, attached))
}

/// How an image of a source becomes what an output has of it, of all its platforms where it is an index.
pub(crate) fn recipe(
    source: &dyn ImageSource,
    manifest: Descriptor,
    plan: &LayerPlan,
    output: &dyn ImageOutput,
) -> Recipe {
    let compression = match output.form() {
        LayerForm::Stored { compression } => compression,
        LayerForm::Tar | LayerForm::Nothing => None,
    };
    Recipe {
        source: source.store().and_then(|store| store.repository()),
        manifest,
        filters: provenance::editing(&plan.chain),
        compression,
        format: output.format(),
        annotations: plan.annotations.clone(),
        platforms: Vec::new(),
        attestations: None,
    }
}

/// The manifest that an output says to have put.
pub(crate) fn put_manifest(receipt: &Receipt) -> Result<FetchedManifest, OutputError> {
    let manifest = receipt.manifest.clone().zip(receipt.manifest_digest.clone());
    let manifest = manifest.zip(receipt.manifest_media_type.clone());
    let ((bytes, digest), media_type) = manifest.ok_or(OutputError::NoBelongings)?;
    Ok(FetchedManifest { bytes, media_type, digest })
}

/// What became of an image, if it is another one now.
pub(crate) fn change(outcome: &Outcome) -> Option<Change> {
    let source = outcome.image.manifest.as_ref()?.digest.clone();
    let became = put_manifest(&outcome.receipt).ok()?;
    let is_other = became.digest != source;
    is_other.then(|| Change { source, became: described(&became) })
}

/// A manifest as others name it.
pub(crate) fn described(manifest: &FetchedManifest) -> Descriptor {
    Descriptor::new(&manifest.media_type, &manifest.digest, manifest.bytes.len() as u64)
}
