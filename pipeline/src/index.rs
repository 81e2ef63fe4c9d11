//! A whole index: every image of it, nested indexes included, and then the index itself: bit for bit, or, where filters changed an
//! image, rebuilt of what its images became.
//!
//! The images pass the filters one after the other, each like an image by itself. The new index has the old one's entries in their
//! order, with all that they and it say, but for the digests and sizes of what changed. What is no image is copied as it is. An
//! attestation is about one image's very bytes: where these changed, it is left out, or kept and said to be about the new ones,
//! as the caller decides.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::copy::Artifact;
use crate::copy::signatures::{Belonging, Change};
use crate::copy::subset::{ATTESTED, of_platforms};
use crate::digest::Digest;
use crate::error::{Error, MAX_INDEX_DEPTH, MAX_MANIFESTS};
use crate::executor::Executor;
use crate::filter::FilterChain;
use crate::manifest::{self, Annotations, Descriptor, ParsedManifest, media_type};
use crate::named::{Attached, Beside, change, described, recipe};
use crate::output::{ImageOutput, OutputError, Receipt};
use crate::platform::Platform;
use crate::process::{Outcome, Summary, process};
use crate::progress::Progress;
use crate::provenance::{self, Recipe};
use crate::registry::FetchedManifest;
use crate::source::ImageSource;
use crate::source::stored::SourceIndex;
use crate::task::LayerPlan;

/// The annotation of an entry that says what kind of thing it is about another entry, and the kind that attestations are.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
const ATTESTATION: &str = "attestation-manifest";

/// What came of an index.
#[derive(Debug)]
pub struct DoneIndex {
    /// What the output says of the index itself.
    pub receipt: Receipt,
    /// Its images in its order, those of nested indexes where these stand.
    pub images: Vec<DoneImage>,
    /// Manifests that were put, each once: it, and all that it names.
    pub manifests: usize,
    /// Attestations that were left out.
    pub dropped: Vec<StaleAttestation>,
    /// Attestations that were kept although their images changed.
    pub retargeted: Vec<StaleAttestation>,
    /// What was put beside the index and its images.
    pub attached: Attached,
    /// Of all images together.
    pub summary: Summary,
}

/// What came of one image of an index.
#[derive(Debug)]
pub struct DoneImage {
    /// As of any image.
    pub outcome: Outcome,
    /// Whether the filters have seen it. Attestations and artifacts pass by them.
    pub is_filtered: bool,
}

/// An attestation of an image that filters changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleAttestation {
    /// Of its manifest.
    pub digest: Digest,
    /// The image that its statements are about.
    pub image: Digest,
    /// What that became.
    pub became: Digest,
}

/// What becomes of the attestation of an image that filters change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attestations {
    /// It is left out: what it says is true of other bytes.
    #[default]
    Drop,
    /// It stays, bit for bit, as an attestation of the new image. Its statements still name the old one.
    Retarget,
}

impl std::fmt::Display for Attestations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Drop => "drop",
            Self::Retarget => "retarget",
        })
    }
}

impl std::str::FromStr for Attestations {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "drop" => Ok(Self::Drop),
            "retarget" => Ok(Self::Retarget),
            _ => Err("expected drop or retarget"),
        }
    }
}

/// How an index is processed.
#[derive(Clone)]
pub struct IndexPlan {
    /// What is done with every layer of an image.
    pub layers: Arc<LayerPlan>,
    /// The images for these platforms alone, with their attestations; all, where none is named.
    pub platforms: Vec<Platform>,
    /// What becomes of attestations.
    pub attestations: Attestations,
    /// What belongs to images that change, and to the index that they are in. Signatures are asked for where a manifest has changed:
    /// three or four requests to the source for each.
    pub beside: Beside,
    /// Where that is done.
    pub executor: Arc<dyn Executor>,
    /// Called before each image, for a display of its progress.
    pub begin: Arc<dyn Fn(&Descriptor) -> Progress + Send + Sync>,
}

/// Processes an index that `source` was found to be.
///
/// Its images come first, one after the other, each found at the destination by its digest alone, and the index last: whoever
/// asks for its tag gets the old one or the whole new one. An entry that the source does not have is an error that names it.
pub async fn process_index(
    source: &dyn ImageSource,
    index: &SourceIndex,
    plan: &IndexPlan,
    output: &dyn ImageOutput,
) -> Result<DoneIndex, Error> {
    let start = Instant::now();
    let reduced = match &plan.platforms[..] {
        [] => None,
        platforms => {
            let store = source.store().ok_or(Error::NoSourceManifest)?;
            Some(of_platforms(store, index.clone(), platforms).await?)
        }
    };
    let index = reduced.as_ref().unwrap_or(index);
    let mut done = Done::default();
    let annotations = Annotations::default();
    let layers = LayerPlan { annotations, ..LayerPlan::clone(&plan.layers) };
    let copied = Arc::new(LayerPlan { chain: FilterChain::default(), ..layers.clone() });
    let work = Work { plan, layers: Arc::new(layers), copied };
    let content = match plan.beside.may_attach() {
        true => Some(plan.beside.content(output).await?),
        false => None,
    };
    let rebuilt = work.pass(source, index, output, 0, &mut done).await?;
    let (receipt, attached) = match content {
        Some(content) if plan.beside.provenance || plan.beside.referrers || !done.changes.is_empty() => {
            let below = output.entry_to_be().ok_or(OutputError::NoBelongings)?;
            let receipt = below.put_index(&rebuilt).await?;
            let artifacts = match plan.beside.provenance {
                true => work.provenance(source, index, output, &done, &described(&rebuilt.manifest)),
                false => Vec::new(),
            };
            let root = (rebuilt.manifest, &index.name);
            let unchanged = done.unchanged(index, &root.0.digest);
            let belonging =
                Belonging { changes: &done.changes, unchanged: &unchanged, artifacts: &artifacts };
            let attached = plan.beside.name(source, &content, root, belonging).await?;
            (Receipt { destination: content.destination(), ..receipt }, attached)
        }
        _ => (output.put_index(&rebuilt).await?, Attached::default()),
    };
    let manifests = 1 + done.became.len();
    let Done { images, dropped, retargeted, .. } = done;
    let outcomes = || images.iter().map(|image| &image.outcome);
    let bytes = outcomes().map(|image| image.summary.bytes).fold(0, u64::saturating_add);
    let layers = outcomes().map(|image| image.layers.len()).sum();
    let summary = Summary { bytes, layers, elapsed: start.elapsed() };
    Ok(DoneIndex { receipt, images, manifests, dropped, retargeted, attached, summary })
}

struct Work<'a> {
    plan: &'a IndexPlan,
    /// What is done with the layers of its images, whose manifests get no annotations.
    layers: Arc<LayerPlan>,
    /// The same without filters.
    copied: Arc<LayerPlan>,
}

/// What was done so far, of the whole index.
#[derive(Default)]
struct Done {
    /// What each entry became. One that stands twice, in different indexes too, is done once.
    became: HashMap<Digest, Became>,
    images: Vec<DoneImage>,
    dropped: Vec<StaleAttestation>,
    retargeted: Vec<StaleAttestation>,
    /// What became another manifest, indexes included.
    changes: Vec<Change>,
    /// Manifests that were found not to be signed, or may be.
    heeded: HashSet<Digest>,
}

/// What an entry is at the destination.
#[derive(Clone, Debug)]
struct Became {
    media_type: String,
    digest: Digest,
    size: u64,
}

impl Work<'_> {
    /// Brings everything that an index names to the output; gives the index as it has to be then, which is not put.
    fn pass<'a>(
        &'a self,
        source: &'a dyn ImageSource,
        index: &'a SourceIndex,
        output: &'a dyn ImageOutput,
        depth: usize,
        done: &'a mut Done,
    ) -> BoxFuture<'a, Result<SourceIndex, Error>> {
        async move {
            if depth > MAX_INDEX_DEPTH {
                return Err(Error::IndexDepth(index.name.to_string()));
            }
            let entries = &index.parsed.manifests;
            let mut rebuilt = vec![None; entries.len()];
            // An attestation may stand before its image, and what becomes of it depends on that.
            let order = entries.iter().enumerate();
            let (attestations, others): (Vec<_>, Vec<_>) =
                order.partition(|(_, entry)| is_attestation(entry));
            for (position, entry) in others {
                let became = self.entry(source, entry, index, output, depth, done).await?;
                rebuilt[position] = Some(replaced(entry, &became));
            }
            for (position, entry) in attestations {
                let image = attested(entry);
                let became = image.as_ref().and_then(|image| Some((image, &done.became.get(image)?.digest)));
                let stale = became.filter(|(image, became)| image != became).map(|(image, became)| {
                    StaleAttestation {
                        digest: entry.digest.clone(),
                        image: image.clone(),
                        became: became.clone(),
                    }
                });
                let Some(stale) = stale else {
                    self.as_it_is(source, entry, index, output, done).await?;
                    rebuilt[position] = Some(entry.raw().clone());
                    continue;
                };
                match self.plan.attestations {
                    Attestations::Drop => done.dropped.push(stale),
                    Attestations::Retarget => {
                        self.as_it_is(source, entry, index, output, done).await?;
                        rebuilt[position] = Some(about(entry, &stale.became));
                        done.retargeted.push(stale);
                    }
                }
            }
            let none = Annotations::default();
            let annotations = if depth == 0 { &self.plan.layers.annotations } else { &none };
            let rebuilt = rebuild(index, rebuilt, annotations)?;
            let digest = &index.manifest.digest;
            if rebuilt.manifest.digest != *digest {
                self.heed(source, index, digest, done).await?;
                done.changes.push(Change { source: digest.clone(), became: described(&rebuilt.manifest) });
            }
            Ok(rebuilt)
        }
        .boxed()
    }

    /// Brings what an entry names to the output.
    async fn entry(
        &self,
        source: &dyn ImageSource,
        entry: &Descriptor,
        index: &SourceIndex,
        output: &dyn ImageOutput,
        depth: usize,
        done: &mut Done,
    ) -> Result<Became, Error> {
        if let Some(became) = done.became.get(&entry.digest) {
            return Ok(became.clone());
        }
        let no_indexes = || OutputError::NoIndexes { index: index.name.to_string() };
        let within = source.entry(entry).ok_or_else(no_indexes)?;
        let became = match inner(within.as_ref(), entry).await? {
            Some(inner) => {
                let below = output.entry_to_be().ok_or_else(no_indexes)?;
                let inner = self.pass(within.as_ref(), &inner, output, depth + 1, done).await?;
                below.put_index(&inner).await?;
                Became {
                    media_type: inner.parsed.family.index().to_owned(),
                    digest: inner.manifest.digest.clone(),
                    size: inner.manifest.bytes.len() as u64,
                }
            }
            None => {
                let below = output.entry_to_be().ok_or_else(no_indexes)?;
                let progress = (self.plan.begin)(entry);
                let (layers, executor) = (Arc::clone(&self.layers), Arc::clone(&self.plan.executor));
                match process(within.as_ref(), layers, below, executor, &progress).await {
                    // It says so before anything is written.
                    Err(Error::NotAnImage { .. }) => {
                        return self.as_it_is(source, entry, index, output, done).await;
                    }
                    outcome => {
                        let outcome = outcome?;
                        let became = became(&outcome.receipt, entry);
                        let is_filtered = !self.plan.layers.chain.is_empty();
                        done.images.push(DoneImage { outcome, is_filtered });
                        became
                    }
                }
            }
        };
        if became.digest != entry.digest {
            self.heed(source, index, &entry.digest, done).await?;
            // It changes with its entry. To know now whether it may saves the way of all the others.
            self.heed(source, index, &index.manifest.digest, done).await?;
            let Became { media_type, digest, size } = &became;
            if done.changes.iter().all(|change| change.source != entry.digest) {
                let became = Descriptor::new(media_type, digest, *size);
                done.changes.push(Change { source: entry.digest.clone(), became });
            }
        }
        done.note(entry, became, index)
    }

    /// What says how the index was made, and how each image of it that changed.
    fn provenance(
        &self,
        source: &dyn ImageSource,
        index: &SourceIndex,
        output: &dyn ImageOutput,
        done: &Done,
        became: &Descriptor,
    ) -> Vec<Artifact> {
        let images: Vec<_> = done.images.iter().map(|image| provenance::image(&image.outcome)).collect();
        let whole = Recipe {
            platforms: self.plan.platforms.clone(),
            attestations: Some(self.plan.attestations),
            ..recipe(source, described(&index.manifest), &self.plan.layers, output)
        };
        let mut artifacts = vec![provenance::artifact(&whole, became, &images)];
        let recipe_of = |manifest: Descriptor| recipe(source, manifest, &self.layers, output);
        for (DoneImage { outcome, .. }, told) in done.images.iter().zip(&images) {
            let (Some(change), Some(manifest)) = (change(outcome), &outcome.image.manifest) else {
                continue;
            };
            let manifest =
                Descriptor::new(&manifest.media_type, &manifest.digest, manifest.bytes.len() as u64);
            let told = std::slice::from_ref(told);
            artifacts.push(provenance::artifact(&recipe_of(manifest), &change.became, told));
        }
        artifacts
    }

    /// Fails where a manifest that changes is signed and may not be.
    async fn heed(
        &self,
        source: &dyn ImageSource,
        index: &SourceIndex,
        digest: &Digest,
        done: &mut Done,
    ) -> Result<(), Error> {
        if done.heeded.insert(digest.clone()) {
            self.plan.beside.heed(source, &index.name.to_string(), digest).await?;
        }
        Ok(())
    }

    /// Copies what an entry names, past the filters.
    async fn as_it_is(
        &self,
        source: &dyn ImageSource,
        entry: &Descriptor,
        index: &SourceIndex,
        output: &dyn ImageOutput,
        done: &mut Done,
    ) -> Result<Became, Error> {
        if let Some(became) = done.became.get(&entry.digest) {
            return Ok(became.clone());
        }
        let no_indexes = || OutputError::NoIndexes { index: index.name.to_string() };
        let below = output.entry(&entry.digest).ok_or_else(no_indexes)?;
        let within = source.entry(entry).ok_or_else(no_indexes)?;
        let progress = (self.plan.begin)(entry);
        let (layers, executor) = (Arc::clone(&self.copied), Arc::clone(&self.plan.executor));
        let outcome = process(within.as_ref(), layers, below, executor, &progress).await?;
        let became = became(&outcome.receipt, entry);
        done.images.push(DoneImage { outcome, is_filtered: false });
        done.note(entry, became, index)
    }
}

impl Done {
    fn note(&mut self, entry: &Descriptor, became: Became, index: &SourceIndex) -> Result<Became, Error> {
        self.became.insert(entry.digest.clone(), became.clone());
        if self.became.len() > MAX_MANIFESTS {
            return Err(Error::IndexSize(index.name.to_string()));
        }
        Ok(became)
    }

    /// What stayed as it is, of an index that is `root` now and of all that it names: sorted, so that requests come in one order.
    fn unchanged(&self, index: &SourceIndex, root: &Digest) -> Vec<Digest> {
        let entries = self.became.iter().filter(|(source, became)| **source == became.digest);
        let whole = Some(&index.manifest.digest).filter(|digest| *digest == root);
        let mut unchanged: Vec<Digest> = entries.map(|(source, _)| source).chain(whole).cloned().collect();
        unchanged.sort();
        unchanged
    }
}

/// What an output has of an image, in the words of an entry.
fn became(receipt: &Receipt, entry: &Descriptor) -> Became {
    Became {
        media_type: receipt.manifest_media_type.clone().unwrap_or_else(|| entry.media_type.clone()),
        digest: receipt.manifest_digest.clone().unwrap_or_else(|| entry.digest.clone()),
        size: receipt.manifest_size.unwrap_or(entry.size),
    }
}

/// The index that an entry names, if it names one. Its media type tells without a request.
async fn inner(source: &dyn ImageSource, entry: &Descriptor) -> Result<Option<SourceIndex>, Error> {
    match entry.media_type.as_str() {
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => Ok(None),
        _ => source.index().await,
    }
}

/// Whether an entry is an attestation of another one, as buildkit writes it; or for no platform at all, so that it is no image.
pub(crate) fn is_attestation(entry: &Descriptor) -> bool {
    entry.annotations.get(REFERENCE_TYPE).is_some_and(|kind| kind == ATTESTATION)
        || entry.platform.as_ref().is_some_and(Platform::is_unknown)
}

/// The entry that another is an attestation of.
fn attested(entry: &Descriptor) -> Option<Digest> {
    entry.annotations.get(ATTESTED)?.parse().ok()
}

type Raw = serde_json::Map<String, serde_json::Value>;

/// An entry with other content.
fn replaced(entry: &Descriptor, became: &Became) -> Raw {
    let mut raw = entry.raw().clone();
    if became.digest != entry.digest {
        raw.insert("mediaType".to_owned(), became.media_type.as_str().into());
        raw.insert("digest".to_owned(), became.digest.to_string().into());
        raw.insert("size".to_owned(), became.size.into());
        // Both are of the old bytes: an inline copy, and where they can be had.
        raw.retain(|key, _| key != "data" && key != "urls");
    }
    raw
}

/// An attestation's entry that says that it is about another image.
fn about(entry: &Descriptor, image: &Digest) -> Raw {
    let mut raw = entry.raw().clone();
    if let Some(annotations) = raw.get_mut("annotations").and_then(|value| value.as_object_mut()) {
        annotations.insert(ATTESTED.to_owned(), image.to_string().into());
    }
    raw
}

/// The index with other entries, and these annotations; as it is where that changes nothing.
fn rebuild(
    index: &SourceIndex,
    entries: Vec<Option<Raw>>,
    annotations: &Annotations,
) -> Result<SourceIndex, Error> {
    let mut document = index.parsed.raw().clone();
    let entries: Vec<_> = entries.into_iter().flatten().map(serde_json::Value::from).collect();
    document.insert("manifests".to_owned(), entries.into());
    manifest::annotate(&mut document, annotations);
    // Its own bytes: of some platforms alone, what was parsed is less than they are.
    if serde_json::from_slice::<Raw>(&index.manifest.bytes).is_ok_and(|own| own == document) {
        return Ok(index.clone());
    }
    let bytes = manifest::to_bytes(&document);
    let media_type = index.parsed.family.index().to_owned();
    let fail = |source| Error::Manifest { image: index.name.to_string(), source };
    match manifest::parse(&bytes, Some(&media_type)).map_err(fail)? {
        ParsedManifest::Index(parsed) => {
            let manifest = FetchedManifest { digest: Digest::sha256(&bytes), bytes, media_type };
            Ok(SourceIndex { name: index.name.clone(), manifest, parsed })
        }
        ParsedManifest::Image(_) | ParsedManifest::Schema1(_) => {
            unreachable!("what was just written as an index is one")
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::element::ImageName;
    use crate::manifest::Index;

    fn index(document: &[u8]) -> Index {
        match manifest::parse(document, Some(media_type::OCI_INDEX)).unwrap() {
            ParsedManifest::Index(index) => index,
            _ => panic!("no index"),
        }
    }

    #[test]
    fn an_index_of_which_nothing_changed_is_its_own_bytes_and_one_of_some_images_is_not() {
        let entry = |content: &str| json!({"mediaType": media_type::OCI_MANIFEST, "digest": Digest::sha256(content), "size": content.len()});
        let document = |entries: &[serde_json::Value]| {
            let index = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": entries});
            serde_json::to_vec_pretty(&index).unwrap()
        };
        let (both, one) = (document(&[entry("a"), entry("bc")]), document(&[entry("a")]));
        let source = |parsed: &[u8]| SourceIndex {
            name: ImageName { repository: "app".to_owned(), tag: None },
            manifest: FetchedManifest {
                bytes: Bytes::from(both.clone()),
                media_type: media_type::OCI_INDEX.to_owned(),
                digest: Digest::sha256(&both),
            },
            parsed: index(parsed),
        };
        let rebuilt = |source: &SourceIndex, annotations: &Annotations| {
            let entries = source.parsed.manifests.iter().map(|entry| Some(entry.raw().clone()));
            rebuild(source, entries.collect(), annotations).unwrap().manifest
        };
        let (whole, some) = (source(&both), source(&one));
        assert_eq!(rebuilt(&whole, &Annotations::default()).bytes, both);
        let annotated = rebuilt(&whole, &[("of".to_owned(), "it".to_owned())].into());
        assert_eq!(index(&annotated.bytes).raw()["annotations"], json!({"of": "it"}));
        let fewer = rebuilt(&some, &Annotations::default());
        assert_eq!(index(&fewer.bytes).manifests, some.parsed.manifests);
        assert_eq!(fewer.digest, Digest::sha256(&fewer.bytes));
    }
}
