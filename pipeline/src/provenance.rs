//! Provenance: what an image was made of, and how, so that anybody can make it again and compare.
//!
//! It is an in-toto statement (`https://in-toto.io/Statement/v1`) about the new manifest, in an artifact that has the manifest as its
//! subject. The predicate is [`PREDICATE_TYPE`], which has SLSA's `buildDefinition` and `runDetails` (slsa.dev/spec/v1.0/provenance)
//! and beside them `images`; README.md tells of its fields. It has no times and no names of the destination in it, so that the same
//! work makes the same statement. It is not signed: a signer signs the artifact, as everything else that has a digest.
//!
//! [`crate::verify`] reads it.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::compression::Compression;
use crate::copy::Artifact;
use crate::copy::signatures::SOURCE_DIGEST;
use crate::digest::Digest;
use crate::element::StoredLayer;
use crate::filter::{ENCODER_VERSION, FilterChain, REWRITER_VERSION};
use crate::index::Attestations;
use crate::manifest::{Annotations, Descriptor, ImageManifest};
use crate::output::manifest::ManifestFormat;
use crate::platform::Platform;
use crate::process::Outcome;
use crate::reference::Reference;
use crate::registry::FetchedManifest;

/// The media type of a statement, and of the artifact that holds it.
pub const STATEMENT: &str = "application/vnd.in-toto+json";
/// The type of statements.
pub const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// The type of the predicate.
pub const PREDICATE_TYPE: &str = "https://occystrap.dev/provenance/v1";
/// The annotation that names a statement's predicate, as buildkit and cosign write it.
pub const PREDICATE: &str = "in-toto.io/predicate-type";
/// How the URI of a repository begins.
const REGISTRY: &str = "registry://";
/// What was done: an image through filters.
const BUILD_TYPE: &str = "https://occystrap.dev/filter/v1";
/// Who did it.
const BUILDER: &str = "https://occystrap.dev/occystrap";

/// What an image, or an index of images, was made of, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// The repository, where it comes from a registry.
    pub source: Option<Reference>,
    /// The manifest that it was made of.
    pub manifest: Descriptor,
    /// The filters that edit, in canonical form. Those that only look do not change what becomes of an image.
    pub filters: Vec<String>,
    /// What every layer was made, if that was asked for.
    pub compression: Option<Compression>,
    /// The manifest's format.
    pub format: ManifestFormat,
    /// What the manifest got besides.
    pub annotations: Annotations,
    /// Of an index, the platforms whose images alone it was made of; none named, of all of them.
    pub platforms: Vec<Platform>,
    /// Of an index, what became of attestations of images that changed.
    pub attestations: Option<Attestations>,
}

/// The versions of what changes bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versions {
    /// Of the program, for people.
    pub occystrap: String,
    /// Equal ones make the same tars and configs.
    pub rewriter: String,
    /// Equal ones make the same compressed bytes of a tar.
    pub encoder: String,
}

impl Versions {
    /// This program's.
    pub fn own() -> Self {
        Self {
            occystrap: env!("CARGO_PKG_VERSION").to_owned(),
            rewriter: REWRITER_VERSION.to_string(),
            encoder: ENCODER_VERSION.to_string(),
        }
    }
}

/// A statement as it was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Provenance {
    /// The manifests that it is about.
    pub subjects: Vec<Digest>,
    /// What they were made of.
    pub recipe: Recipe,
    /// By which versions.
    pub versions: Versions,
    /// What it says of each image.
    pub images: Value,
}

/// The filters of a chain that edit.
pub fn editing(chain: &FilterChain) -> Vec<String> {
    chain.filters().iter().filter(|filter| filter.edits()).map(|filter| filter.spec()).collect()
}

/// What became of an image, for [`artifact`].
pub(crate) fn image(outcome: &Outcome) -> Value {
    let layers = outcome.image.layers.iter().zip(&outcome.layers).map(|(layer, written)| {
        let source = layer.descriptor.as_ref();
        let (digest, size) = match (&written.stored, source) {
            (StoredLayer::Written { digest, size, .. }, _) => (Some(digest), Some(*size)),
            (StoredLayer::Original, source) => {
                (source.map(|source| &source.digest), source.map(|source| source.size))
            }
        };
        json!({
            "source": {"digest": source.map(|source| &source.digest), "size": source.map(|source| source.size), "diffId": layer.diff_id},
            "result": {"digest": digest, "size": size, "diffId": written.diff_id},
            "edited": written.edited,
        })
    });
    json!({
        "source": outcome.image.manifest.as_ref().map(|manifest| &manifest.digest),
        "result": outcome.receipt.manifest_digest,
        "config": {"source": outcome.image.config.digest(), "result": Digest::sha256(&outcome.config)},
        "layers": layers.collect::<Vec<_>>(),
    })
}

/// The same of an image that is not made yet, as if it became one of the same size: for how large a statement will be.
pub(crate) fn foreseen(manifest: &FetchedManifest, image: &ImageManifest) -> Value {
    let layers = image.layers.iter().map(|layer| {
        // Of its diff_id only the config has the word: it is as long as its digest.
        let told = json!({"digest": layer.digest, "size": layer.size, "diffId": layer.digest});
        json!({"source": told, "result": told, "edited": true})
    });
    json!({
        "source": manifest.digest,
        "result": manifest.digest,
        "config": {"source": image.config.digest, "result": image.config.digest},
        "layers": layers.collect::<Vec<_>>(),
    })
}

/// The artifact that holds the statement that `became` was made by a recipe.
pub(crate) fn artifact(recipe: &Recipe, became: &Descriptor, images: &[Value]) -> Artifact {
    let Versions { occystrap, rewriter, encoder } = Versions::own();
    let mut parameters = json!({
        "filters": recipe.filters,
        "compression": recipe.compression.map(|compression| compression.to_string()),
        "format": recipe.format.to_string(),
    });
    if let Some(attestations) = recipe.attestations {
        parameters["attestations"] = attestations.to_string().into();
    }
    // What is not said of most is left out of theirs, so that it is the same statement that it always was.
    if !recipe.annotations.is_empty() {
        parameters["annotations"] = json!(recipe.annotations);
    }
    if !recipe.platforms.is_empty() {
        let mut platforms: Vec<_> = recipe.platforms.iter().map(ToString::to_string).collect();
        platforms.sort();
        parameters["platforms"] = json!(platforms);
    }
    let mut dependency = json!({
        "digest": digest_set(&recipe.manifest.digest),
        "mediaType": recipe.manifest.media_type,
        "annotations": {"size": recipe.manifest.size},
    });
    if let Some(source) = &recipe.source {
        dependency["uri"] = format!("{REGISTRY}{}", source.name()).into();
    }
    let statement = json!({
        "_type": STATEMENT_TYPE,
        "subject": [{"digest": digest_set(&became.digest)}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": parameters,
                "resolvedDependencies": [dependency],
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": {"occystrap": occystrap, "rewriter": rewriter, "encoder": encoder},
                },
            },
            "images": images,
        },
    });
    let bytes = Bytes::from(statement.to_string());
    let annotations = json!({PREDICATE: PREDICATE_TYPE, SOURCE_DIGEST: recipe.manifest.digest});
    let annotations: &Map<String, Value> = annotations.as_object().expect("it was just written as an object");
    Artifact::new(became, STATEMENT, Some((STATEMENT, bytes)), annotations)
}

/// `{"sha256": "HEX"}`.
fn digest_set(digest: &Digest) -> Value {
    json!({digest.algorithm().name(): digest.hex()})
}

impl Provenance {
    /// What a statement says; otherwise what keeps it from being one of ours.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let statement: Value = serde_json::from_slice(bytes).map_err(|error| format!("not JSON: {error}"))?;
        let text = |at: &Value, what: &str| {
            at.as_str().map(str::to_owned).ok_or_else(|| format!("{what} is missing or no text"))
        };
        for (field, expected) in [("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)] {
            let found = text(&statement[field], field)?;
            if found != expected {
                return Err(format!("{field} is {found:?}, and not {expected:?}"));
            }
        }
        let subjects = statement["subject"].as_array().map(Vec::as_slice).unwrap_or_default();
        let subjects = subjects.iter().map(|subject| of_digest_set(&subject["digest"]));
        let predicate = &statement["predicate"];
        let definition = &predicate["buildDefinition"];
        let build_type = text(&definition["buildType"], "buildType")?;
        if build_type != BUILD_TYPE {
            return Err(format!("buildType is {build_type:?}, and not {BUILD_TYPE:?}"));
        }
        let parameters = &definition["externalParameters"];
        let filters = parameters["filters"].as_array().ok_or("filters is missing or no list")?;
        let dependency = &definition["resolvedDependencies"][0];
        let size = dependency["annotations"]["size"].as_u64().ok_or("the source's size is missing")?;
        let media_type = text(&dependency["mediaType"], "the source's mediaType")?;
        let version = &predicate["runDetails"]["builder"]["version"];
        Ok(Self {
            subjects: subjects.collect::<Result<_, _>>()?,
            recipe: Recipe {
                source: dependency["uri"].as_str().map(repository).transpose()?,
                manifest: Descriptor::new(&media_type, &of_digest_set(&dependency["digest"])?, size),
                filters: filters.iter().map(|filter| text(filter, "a filter")).collect::<Result<_, _>>()?,
                compression: match &parameters["compression"] {
                    Value::Null => None,
                    compression => {
                        let compression = text(compression, "compression")?;
                        Some(compression.parse().map_err(|error| format!("{error}"))?)
                    }
                },
                format: text(&parameters["format"], "format")?.parse()?,
                annotations: match &parameters["annotations"] {
                    Value::Null => Annotations::default(),
                    annotations => serde_json::from_value(annotations.clone())
                        .map_err(|_| "annotations is no object of texts")?,
                },
                platforms: match &parameters["platforms"] {
                    Value::Null => Vec::new(),
                    platforms => {
                        let platforms = platforms.as_array().ok_or("platforms is no list")?;
                        let platform =
                            |one: &Value| text(one, "a platform")?.parse::<Platform>().map_err(str::to_owned);
                        platforms.iter().map(platform).collect::<Result<_, _>>()?
                    }
                },
                attestations: match &parameters["attestations"] {
                    Value::Null => None,
                    what => Some(text(what, "attestations")?.parse()?),
                },
            },
            versions: Versions {
                occystrap: text(&version["occystrap"], "the version of occystrap")?,
                rewriter: text(&version["rewriter"], "the rewriter's version")?,
                encoder: text(&version["encoder"], "the encoder's version")?,
            },
            images: predicate["images"].clone(),
        })
    }
}

/// The repository that a URI names. No other URI is followed: a file or socket of whoever verifies is none of a statement's business.
fn repository(uri: &str) -> Result<Reference, String> {
    let name = uri.strip_prefix(REGISTRY).and_then(|name| name.parse::<Reference>().ok());
    let is_name = |name: &Reference| format!("{REGISTRY}{}", name.name()) == uri;
    name.filter(is_name).ok_or_else(|| format!("the source's uri {uri:?} is no {REGISTRY}HOST/REPOSITORY"))
}

fn of_digest_set(set: &Value) -> Result<Digest, String> {
    let found = set.as_object().and_then(|set| set.iter().next());
    let (algorithm, hex) = found.ok_or("a digest is missing")?;
    let digest = format!("{algorithm}:{}", hex.as_str().unwrap_or_default());
    digest.parse().map_err(|error| format!("{digest:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Family;
    use crate::manifest::media_type::OCI_MANIFEST;

    #[test]
    fn a_statement_says_what_it_was_made_of() {
        let recipe = Recipe {
            source: Some("localhost:5000/app".parse().unwrap()),
            manifest: Descriptor::new(OCI_MANIFEST, &Digest::sha256("old"), 3),
            filters: vec!["exclude:pattern=*.key".to_owned()],
            compression: Some(Compression::ZSTD),
            format: ManifestFormat::Always(Family::Docker),
            annotations: [("of".to_owned(), "it".to_owned())].into(),
            platforms: vec!["linux/amd64".parse().unwrap(), "linux/arm64/v8".parse().unwrap()],
            attestations: Some(Attestations::Retarget),
        };
        let became = Descriptor::new(OCI_MANIFEST, &Digest::sha256("new"), 3);
        let images = [json!({"layers": []})];
        let artifact = artifact(&recipe, &became, &images);
        let provenance = Provenance::parse(artifact.document()).unwrap();
        assert_eq!(provenance.recipe, recipe);
        assert_eq!(provenance.versions, Versions::own());
        assert_eq!((provenance.subjects, provenance.images), (vec![became.digest], json!(images)));
        assert!(Provenance::parse(b"{}").unwrap_err().contains("_type"));
        let text = std::str::from_utf8(artifact.document()).unwrap();
        for (right, wrong, problem) in [
            (r#"{"of":"it"}"#, r#"{"of":1}"#, "annotations is no object of texts"),
            (r#"["linux/amd64","linux/arm64/v8"]"#, r#"["linux"]"#, "expected OS/ARCHITECTURE"),
            (r#"["linux/amd64","linux/arm64/v8"]"#, r#""linux/amd64""#, "platforms is no list"),
        ] {
            assert!(text.contains(right), "{text}");
            let error = Provenance::parse(text.replace(right, wrong).as_bytes()).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
        for uri in [
            "tar:///etc/passwd",
            "registry://localhost:5000/app:1",
            "registry://localhost:5000/app?os=x",
            "app",
        ] {
            let forged = text.replace("registry://localhost:5000/app", uri);
            assert!(Provenance::parse(forged.as_bytes()).unwrap_err().contains(uri), "{uri}");
        }
    }
}
