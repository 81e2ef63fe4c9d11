//! Whether an image is what its [`provenance`](crate::provenance) says: it is made again, and every digest compared.
//!
//! The statement is found as a referrer of the image. Its source is read by digest and passes the same filters into the same form;
//! nothing is stored. The manifest that was made has to be the image's, which names every byte of it by digest, and what the statement
//! claims has to be what was made. Only of an image by another version of the encoder more is asked than the manifest, for less.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use crate::check::{Finding, Severity, check};
use crate::copy::{SignaturePolicy, in_copy};
use crate::digest::Digest;
use crate::error::Error;
use crate::executor::Executor;
use crate::filter::FilterChain;
use crate::index::{IndexPlan, process_index};
use crate::manifest::{Descriptor, MAX_DOCUMENT, ParsedManifest};
use crate::named::{Beside, described, put_manifest};
use crate::output::derived::DerivedOutput;
use crate::process::process;
use crate::progress::Progress;
use crate::provenance::{self, PREDICATE, PREDICATE_TYPE, Provenance, STATEMENT, Versions};
use crate::registry::FetchedManifest;
use crate::source::ImageSource;
use crate::source::stored::{Store, parse, read_document};
use crate::task::LayerPlan;

/// Differences that are told of; the others are counted.
const TOLD: usize = 100;
/// Statements about one image: anybody who may write there can add one, and each is an image to be made.
const MOST_STATEMENTS: usize = 16;

/// A statement about an image, where it was found.
#[derive(Clone, Debug)]
pub struct Stated {
    /// The image.
    pub image: FetchedManifest,
    /// The artifact's manifest.
    pub digest: Digest,
    /// What it says.
    pub provenance: Provenance,
}

/// What came of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The image was made again, bit for bit.
    Same,
    /// An image that another version of the encoder has made: its config, and so every layer's tar, was made again bit for bit, and its
    /// layers were read and hold these tars. How they are compressed cannot be compared.
    SameContent,
    /// It is not what the statement says.
    Differs,
    /// Another version has made it, and this one makes something else of the source: that says nothing for it and nothing against it.
    Unknown,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Verified {
    /// What it comes to.
    pub verdict: Verdict,
    /// Whatever is not the same, at most [`TOLD`].
    pub differences: Vec<Difference>,
}

/// Something that is not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where: a document, and the path in it.
    pub place: String,
    /// What it says.
    pub found: String,
    /// What was made.
    pub derived: String,
}

/// The statements about an image, at least one and at most 16, of 4 MiB together.
pub async fn statements(store: &dyn Store) -> Result<Vec<Stated>, Error> {
    let image = store.first().await?;
    let mut stated = Vec::new();
    // Of all together: what they say is in memory, at many times its size.
    let mut bytes_left = MAX_DOCUMENT as u64;
    for listed in store.referrers(&image.digest).await? {
        let says = |key: &str| listed.raw().get(key).and_then(Value::as_str);
        let other = listed.annotations.get(PREDICATE).is_some_and(|predicate| predicate != PREDICATE_TYPE);
        if other || says("artifactType").is_some_and(|kind| kind != STATEMENT) {
            continue;
        }
        let artifact = in_copy(&listed.digest, store.manifest(&listed).await)?;
        let ParsedManifest::Image(parsed) = parse(store, &artifact)? else { continue };
        let is_ours = |layer: &&crate::manifest::Descriptor| {
            let predicate = layer.annotations.get(PREDICATE);
            layer.media_type == STATEMENT && predicate.is_some_and(|predicate| predicate == PREDICATE_TYPE)
        };
        let Some(layer) = parsed.layers.iter().find(is_ours) else { continue };
        let left = bytes_left.checked_sub(layer.size).filter(|_| stated.len() < MOST_STATEMENTS);
        bytes_left = left.ok_or_else(|| Error::ManyStatements(store.shown()))?;
        let blob = store.blob(&layer.digest, Some(layer.size))?;
        let bytes = in_copy(&layer.digest, read_document(&blob, layer.size).await)?;
        let digest = artifact.digest;
        let fail = |problem| Error::Provenance { digest: digest.clone(), problem };
        let provenance = Provenance::parse(&bytes).map_err(fail)?;
        stated.push(Stated { image: image.clone(), digest, provenance });
    }
    if stated.is_empty() { Err(Error::Unstated(store.shown())) } else { Ok(stated) }
}

/// Makes an image again by what a statement says, from `origin`, where its source is, and compares.
///
/// `image` is the image itself, whose layers are read only where their compressed bytes cannot be compared. An error says that it could
/// not be made again.
pub async fn verify(
    stated: &Stated,
    image: &dyn ImageSource,
    origin: &dyn ImageSource,
    layers: &LayerPlan,
    executor: Arc<dyn Executor>,
    begin: Arc<dyn Fn() -> Progress + Send + Sync>,
) -> Result<Verified, Error> {
    let provenance = &stated.provenance;
    let made = make(stated, origin, layers, &executor, begin).await?;
    let mut found = Differences::default();
    if !provenance.subjects.contains(&stated.image.digest) {
        let subjects: Vec<Value> = provenance.subjects.iter().map(|one| one.to_string().into()).collect();
        found.compare("the statement's subject", &subjects.into(), &stated.image.digest.to_string().into());
    }
    let own = Versions::own();
    let same_rewriter = own.rewriter == provenance.versions.rewriter;
    let same_version = same_rewriter && own.encoder == provenance.versions.encoder;
    let is_same = made.manifest.digest == stated.image.digest;
    let verdict = if is_same || same_version {
        found.compare("the statement's images", &provenance.images, &made.images);
        if !is_same {
            compare_documents(&mut found, stated, image, &made).await?;
        }
        if found.count == 0 { Verdict::Same } else { Verdict::Differs }
    } else if let (true, Some(config)) = (same_rewriter, &made.config) {
        found.compare("the statement's images", &content(&provenance.images), &content(&made.images));
        compare_content(&mut found, stated, image, &made.manifest, config, layers, &executor).await?;
        if found.count == 0 { Verdict::SameContent } else { Verdict::Differs }
    } else {
        compare_documents(&mut found, stated, image, &made).await?;
        Verdict::Unknown
    };
    Ok(Verified { verdict, differences: found.told })
}

/// What was made of a source.
struct Made {
    manifest: FetchedManifest,
    /// Of an image.
    config: Option<Bytes>,
    /// As a statement tells of them.
    images: Value,
}

async fn make(
    stated: &Stated,
    origin: &dyn ImageSource,
    layers: &LayerPlan,
    executor: &Arc<dyn Executor>,
    begin: Arc<dyn Fn() -> Progress + Send + Sync>,
) -> Result<Made, Error> {
    let recipe = &stated.provenance.recipe;
    let fail = |problem: String| Error::Provenance { digest: stated.digest.clone(), problem };
    let chain = FilterChain::parse(&recipe.filters).map_err(|error| fail(error.to_string()))?;
    if let Some(filter) = chain.filters().iter().find(|filter| !filter.edits()) {
        return Err(fail(format!("the filter {} changes nothing, and does not belong there", filter.spec())));
    }
    let annotations = recipe.annotations.clone();
    let layers = Arc::new(LayerPlan { chain, annotations, ..layers.clone() });
    let output = DerivedOutput { compression: recipe.compression, format: recipe.format };
    let source = origin.entry(&recipe.manifest).ok_or(Error::NoSourceManifest)?;
    let Some(index) = source.index().await? else {
        let executor = Arc::clone(executor);
        let outcome = process(source.as_ref(), layers, Arc::new(output), executor, &begin()).await?;
        let images = Value::from(vec![provenance::image(&outcome)]);
        return Ok(Made { manifest: put_manifest(&outcome.receipt)?, config: Some(outcome.config), images });
    };
    let plan = IndexPlan {
        layers,
        platforms: recipe.platforms.clone(),
        attestations: recipe.attestations.unwrap_or_default(),
        beside: Beside { signatures: SignaturePolicy::Drop, ..Beside::default() },
        executor: Arc::clone(executor),
        begin: Arc::new(move |_| begin()),
    };
    let done = process_index(source.as_ref(), &index, &plan, &output).await?;
    let images = done.images.iter().map(|image| provenance::image(&image.outcome)).collect();
    Ok(Made { manifest: put_manifest(&done.receipt)?, config: None, images })
}

/// Tells where the documents of an image and of what was made differ.
async fn compare_documents(
    found: &mut Differences,
    stated: &Stated,
    image: &dyn ImageSource,
    made: &Made,
) -> Result<(), Error> {
    found.documents("the manifest", &stated.image.bytes, &made.manifest.bytes);
    if let Some(config) = &made.config {
        compare_config(found, stated, image, config).await?;
    }
    found.digests("the manifest's digest", &stated.image.digest, &made.manifest.digest);
    Ok(())
}

async fn compare_config(
    found: &mut Differences,
    stated: &Stated,
    image: &dyn ImageSource,
    made: &Bytes,
) -> Result<(), Error> {
    let store = image.store().ok_or(Error::NoSourceManifest)?;
    let ParsedManifest::Image(parsed) = parse(store, &stated.image)? else { return Ok(()) };
    let blob = store.blob(&parsed.config.digest, Some(parsed.config.size))?;
    let bytes = in_copy(&parsed.config.digest, read_document(&blob, parsed.config.size).await)?;
    found.documents("the config", &bytes, made);
    found.digests("the config's digest", &Digest::sha256(&bytes), &Digest::sha256(made));
    Ok(())
}

/// Compares all of an image but how its layers are compressed, and reads these.
async fn compare_content(
    found: &mut Differences,
    stated: &Stated,
    image: &dyn ImageSource,
    made: &FetchedManifest,
    config: &Bytes,
    layers: &LayerPlan,
    executor: &Arc<dyn Executor>,
) -> Result<(), Error> {
    found.compare("the manifest", &uncompressed(&stated.image.bytes), &uncompressed(&made.bytes));
    compare_config(found, stated, image, config).await?;
    let own = image.entry(&described(&stated.image)).ok_or(Error::NoSourceManifest)?;
    let plan = Arc::new(LayerPlan { chain: FilterChain::default(), ..layers.clone() });
    let report = check(own.as_ref(), plan, false, executor.at_once(), &Progress::default()).await?;
    for Finding { layer, message, .. } in report.findings.iter().filter(|one| one.severity == Severity::Error)
    {
        let place = layer.map_or_else(|| "the image".to_owned(), |layer| format!("the layer {layer}"));
        found.note(&place, message, "nothing of the kind");
    }
    Ok(())
}

/// A manifest without what compression makes of it. Foreign layers are compared by their digests: nobody reads them.
fn uncompressed(manifest: &[u8]) -> Value {
    let mut manifest = value(manifest);
    for layer in manifest["layers"].as_array_mut().into_iter().flatten() {
        let is_foreign = Descriptor::of(layer).is_ok_and(|layer| layer.is_foreign());
        if let Some(layer) = layer.as_object_mut().filter(|_| !is_foreign) {
            layer.retain(|key, _| key != "digest" && key != "size");
        }
    }
    manifest
}

fn value(document: &[u8]) -> Value {
    serde_json::from_slice(document).unwrap_or_default()
}

/// What a statement says of images, without what compression makes of it: the digests and sizes of layers and manifests.
fn content(images: &Value) -> Value {
    let mut images = images.clone();
    for image in images.as_array_mut().into_iter().flatten() {
        let Some(image) = image.as_object_mut() else { continue };
        image.remove("result");
        for layer in image.get_mut("layers").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(result) = layer.get_mut("result").and_then(Value::as_object_mut) {
                result.retain(|key, _| key == "diffId");
            }
        }
    }
    images
}

#[derive(Default)]
struct Differences {
    told: Vec<Difference>,
    count: usize,
}

impl Differences {
    fn documents(&mut self, place: &str, found: &[u8], derived: &[u8]) {
        self.compare(place, &value(found), &value(derived));
    }

    /// Of documents, whose values may not show it: they can be written otherwise.
    fn digests(&mut self, place: &str, found: &Digest, derived: &Digest) {
        self.compare(place, &found.to_string().into(), &derived.to_string().into());
    }

    fn compare(&mut self, place: &str, found: &Value, derived: &Value) {
        match (found, derived) {
            (Value::Object(left), Value::Object(right)) => {
                let others = right.keys().filter(|key| !left.contains_key(*key));
                for key in left.keys().chain(others) {
                    let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                    self.compare(&format!("{place}.{key}"), &of(left), &of(right));
                }
            }
            (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
                for (index, (left, right)) in left.iter().zip(right).enumerate() {
                    self.compare(&format!("{place}[{index}]"), left, right);
                }
            }
            _ if found == derived => {}
            _ => self.note(place, &short(found), &short(derived)),
        }
    }

    fn note(&mut self, place: &str, found: &str, derived: &str) {
        self.count += 1;
        if self.told.len() < TOLD {
            let (found, derived) = (found.to_owned(), derived.to_owned());
            self.told.push(Difference { place: place.to_owned(), found, derived });
        }
    }
}

/// A value in a line.
fn short(value: &Value) -> String {
    let text = match value {
        Value::Null => return "nothing".to_owned(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_told_by_its_path() {
        let mut found = Differences::default();
        found.compare("m", &json!({"a": [1, {"b": 2}], "c": 3}), &json!({"a": [1, {"b": 4}], "d": 5}));
        let told: Vec<_> =
            found.told.iter().map(|one| format!("{}: {} {}", one.place, one.found, one.derived)).collect();
        assert_eq!(told, ["m.a[1].b: 2 4", "m.c: 3 nothing", "m.d: nothing 5"]);
    }

    #[test]
    fn a_foreign_layer_is_no_encoders() {
        let manifest = |foreign: &str, layer: &str| {
            let descriptor = |kind: &str, content: &str| json!({"mediaType": kind, "digest": Digest::sha256(content), "size": content.len()});
            json!({"layers": [
                descriptor("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", foreign),
                descriptor("application/vnd.oci.image.layer.v1.tar+gzip", layer),
            ]})
            .to_string()
        };
        let uncompressed = |foreign, layer| uncompressed(manifest(foreign, layer).as_bytes());
        assert_eq!(uncompressed("a", "b"), uncompressed("a", "c"));
        assert_ne!(uncompressed("a", "b"), uncompressed("c", "b"));
    }

    #[test]
    fn content_is_what_no_encoder_changes() {
        let image = |layer: &str, manifest: &str| {
            json!([{"source": "s", "result": manifest, "config": {"result": "c"},
                "layers": [{"source": {"digest": "x"}, "result": {"digest": layer, "size": 1, "diffId": "t"}}]}])
        };
        assert_eq!(content(&image("a", "m")), content(&image("b", "n")));
        assert_ne!(image("a", "m"), image("b", "n"));
        assert_eq!(content(&image("a", "m"))[0]["layers"][0]["result"], json!({"diffId": "t"}));
    }
}
