//! Whether an image is what its [`provenance`](crate::provenance) says: it is made again, and every digest compared.
//!
//! The statement is found as a referrer of the image. Its source is read by digest and passes the same filters into the same form;
//! nothing is stored. What the statement claims, what was made, and what the image's own documents say have to be one.

use std::sync::Arc;

use serde_json::Value;

use crate::copy::in_copy;
use crate::digest::Digest;
use crate::error::Error;
use crate::executor::Executor;
use crate::filter::FilterChain;
use crate::index::{IndexPlan, process_index};
use crate::manifest::ParsedManifest;
use crate::named::{Beside, put_manifest};
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
    /// It was made by another version of the encoder: what its layers hold is the same, and how that is compressed cannot be compared.
    SameContent,
    /// It is not what the statement says.
    Differs,
    /// It was made by another version of the rewriter and differs from what this one makes: that says nothing against it.
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

/// The statements about an image.
pub async fn statements(store: &dyn Store) -> Result<Vec<Stated>, Error> {
    let image = store.first().await?;
    let mut stated = Vec::new();
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
        let blob = store.blob(&layer.digest, Some(layer.size))?;
        let bytes = in_copy(&layer.digest, read_document(&blob, layer.size).await)?;
        let digest = artifact.digest;
        let fail = |problem| Error::Provenance { digest: digest.clone(), problem };
        let provenance = Provenance::parse(&bytes).map_err(fail)?;
        stated.push(Stated { image: image.clone(), digest, provenance });
    }
    Ok(stated)
}

/// Makes an image again by what a statement says, from `origin`, where its source is, and compares.
///
/// `store` has the image. An error says that it could not be made again.
pub async fn verify(
    stated: &Stated,
    store: &dyn Store,
    origin: &dyn ImageSource,
    layers: &LayerPlan,
    executor: Arc<dyn Executor>,
    begin: Arc<dyn Fn() -> Progress + Send + Sync>,
) -> Result<Verified, Error> {
    let provenance = &stated.provenance;
    let recipe = &provenance.recipe;
    let fail = |problem: String| Error::Provenance { digest: stated.digest.clone(), problem };
    let chain = FilterChain::parse(&recipe.filters).map_err(|error| fail(error.to_string()))?;
    let layers = Arc::new(LayerPlan { chain, ..layers.clone() });
    let output = DerivedOutput { compression: recipe.compression, format: recipe.format };
    let source = origin.entry(&recipe.manifest).ok_or(Error::NoSourceManifest)?;
    let (made, config, images) = match source.index().await? {
        Some(index) => {
            let plan = IndexPlan {
                layers,
                attestations: recipe.attestations.unwrap_or_default(),
                beside: Beside { signatures: crate::copy::SignaturePolicy::Drop, provenance: false },
                executor,
                begin: Arc::new(move |_| begin()),
            };
            let done = process_index(source.as_ref(), &index, &plan, &output).await?;
            let filtered = done.images.iter().filter(|image| image.is_filtered);
            let images = filtered.map(|image| provenance::image(&image.outcome)).collect::<Vec<_>>();
            (put_manifest(&done.receipt)?, None, Value::from(images))
        }
        None => {
            let outcome = process(source.as_ref(), layers, Arc::new(output), executor, &begin()).await?;
            let images = Value::from(vec![provenance::image(&outcome)]);
            (put_manifest(&outcome.receipt)?, Some(outcome.config), images)
        }
    };
    let own = Versions::own();
    let same_encoder = own.encoder == provenance.versions.encoder;
    let same_rewriter = own.rewriter == provenance.versions.rewriter;
    let mut found = Differences::default();
    if !provenance.subjects.contains(&stated.image.digest) {
        let subjects: Vec<Value> = provenance.subjects.iter().map(|one| one.to_string().into()).collect();
        found.compare("the statement's subject", &subjects.into(), &stated.image.digest.to_string().into());
    }
    if same_encoder {
        found.compare("the statement's images", &provenance.images, &images);
        if made.digest != stated.image.digest {
            found.documents("the manifest", &stated.image.bytes, &made.bytes);
            found.certainly("the manifest's digest", &stated.image.digest, &made.digest);
        }
    } else {
        found.compare("the statement's images", &content(&provenance.images), &content(&images));
    }
    if let (ParsedManifest::Image(image), Some(config)) = (parse(store, &stated.image)?, config) {
        let blob = store.blob(&image.config.digest, Some(image.config.size))?;
        let bytes = in_copy(&image.config.digest, read_document(&blob, image.config.size).await)?;
        if bytes != config {
            found.documents("the config", &bytes, &config);
            found.certainly("the config's digest", &Digest::sha256(&bytes), &Digest::sha256(&config));
        }
        // What cannot be made again must at least be what the statement says.
        let stated: Vec<Value> = layers_of(&provenance.images);
        let named: Vec<Value> = image.layers.iter().map(|layer| layer.digest.to_string().into()).collect();
        found.compare("the manifest's layers and the statement's", &named.into(), &stated.into());
    }
    let verdict = match (found.count, same_rewriter, same_encoder) {
        (0, true, true) => Verdict::Same,
        (0, ..) => Verdict::SameContent,
        (_, true, _) => Verdict::Differs,
        (_, false, _) => Verdict::Unknown,
    };
    Ok(Verified { verdict, differences: found.told })
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

/// The digests of the layers of the one image that a statement is about.
fn layers_of(images: &Value) -> Vec<Value> {
    let layers = images[0]["layers"].as_array().into_iter().flatten();
    layers.map(|layer| layer["result"]["digest"].clone()).collect()
}

#[derive(Default)]
struct Differences {
    told: Vec<Difference>,
    count: usize,
}

impl Differences {
    fn documents(&mut self, place: &str, found: &[u8], derived: &[u8]) {
        let value = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap_or_default();
        self.compare(place, &value(found), &value(derived));
    }

    /// Notes digests that differ, which their documents' values may not show: they can be written otherwise.
    fn certainly(&mut self, place: &str, found: &Digest, derived: &Digest) {
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
            _ => {
                self.count += 1;
                if self.told.len() < TOLD {
                    let (found, derived) = (short(found), short(derived));
                    self.told.push(Difference { place: place.to_owned(), found, derived });
                }
            }
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
