//! What stands before the layers of an image: its start, its documents, and what the source says of each layer.

use std::sync::Arc;

use bytes::Bytes;
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{self, ImageStart, SourceLayer};

use super::document::{self, Document};
use super::{WireError, convert};
use crate::blob::{Blob, BlobError, ByteStream};
use crate::compression::Format;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use crate::manifest::{self, Descriptor, Family, ParsedManifest};

/// Layers that an image on a stream may have.
pub const MAX_LAYERS: usize = 2048;

/// The elements before the layers.
pub fn elements(image: &Image, form: v1::LayerForm) -> impl Iterator<Item = Element> + use<> {
    let platform = image.config.document.as_ref().and_then(|config| config.platform());
    let start = ImageStart {
        repository: image.name.repository.clone(),
        tag: image.name.tag.clone(),
        manifest_media_type: image.manifest.as_ref().map(|manifest| manifest.media_type.clone()),
        config_media_type: image.config.media_type.clone(),
        family: convert::family(image.family).into(),
        layer_form: form.into(),
        layer_count: convert::count(image.layers.len()),
        platform: platform.map(convert::platform),
        aliases: image.aliases.clone(),
    };
    let manifest = image.manifest.iter().flat_map(|manifest| document::pieces(manifest.bytes.clone()));
    let config: Vec<Element> = match (&image.config.original, &image.config.document) {
        (Some(original), _) => document::pieces(original.clone()).map(Element::ConfigFile).collect(),
        (None, Some(draft)) => {
            let draft = serde_json::to_vec(draft.raw()).expect("a JSON map can be written");
            document::pieces(draft.into()).map(Element::DraftConfigFile).collect()
        }
        (None, None) => Vec::new(),
    };
    let manifest: Vec<Element> = manifest.map(Element::Manifest).collect();
    let layers: Vec<Element> = image.layers.iter().map(source_layer).map(Element::SourceLayer).collect();
    std::iter::once(Element::Start(start)).chain(manifest).chain(config).chain(layers)
}

fn source_layer(layer: &Layer) -> SourceLayer {
    let descriptor = layer.descriptor.as_ref();
    SourceLayer {
        index: convert::count(layer.index),
        identity: layer.blob.identity(),
        digest: descriptor.map(|descriptor| descriptor.digest.to_string()).unwrap_or_default(),
        size: descriptor.map(|descriptor| descriptor.size).or(layer.blob.size()),
        media_type: descriptor.map(|descriptor| descriptor.media_type.clone()).unwrap_or_default(),
        compression: convert::compression(layer.format).into(),
        diff_id: layer.diff_id.as_ref().map(Digest::to_string).unwrap_or_default(),
        keep_stored: layer.keep_stored,
    }
}

/// What has come of the elements before the layers.
#[derive(Debug, Default)]
pub struct Head {
    start: Option<ImageStart>,
    manifest: Document,
    config: Document,
    draft: Document,
    layers: Vec<SourceLayer>,
}

/// The documents of a head, whole.
#[derive(Debug)]
pub struct Documents {
    /// The start.
    pub start: ImageStart,
    /// Whose media types the image uses.
    pub family: Family,
    /// The manifest, where one came.
    pub manifest: Option<SourceManifest>,
    /// The config's bytes, where they came.
    pub config: Option<Bytes>,
    /// What is known of a config that comes later.
    pub draft: Option<Bytes>,
    /// What the source says of its layers: of all or of none.
    pub layers: Vec<SourceLayer>,
}

impl Head {
    /// Takes an element that belongs to the head; gives back one that does not.
    pub fn take(&mut self, element: Element) -> Result<Option<Element>, WireError> {
        match element {
            Element::Start(_) if self.start.is_some() => return Err(WireError::elements("it begins twice")),
            Element::Start(start) => {
                if start.layer_count as usize > MAX_LAYERS {
                    let problem = format!("it has more than {MAX_LAYERS} layers");
                    return Err(WireError::Elements(problem));
                }
                self.start = Some(start);
            }
            _ if self.start.is_none() => return Err(WireError::elements("it does not begin with its start")),
            Element::Manifest(chunk) => self.manifest.take(&chunk, "the manifest")?,
            Element::ConfigFile(chunk) => self.config.take(&chunk, "the config")?,
            Element::DraftConfigFile(chunk) => self.draft.take(&chunk, "the draft of the config")?,
            Element::SourceLayer(layer) => {
                let next = self.layers.len();
                if layer.index as usize != next || next >= self.layer_count() {
                    let problem = format!("layer {} is described where layer {next} should be", layer.index);
                    return Err(WireError::Elements(problem));
                }
                self.layers.push(layer);
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// How many layers are to come.
    pub fn layer_count(&self) -> usize {
        self.start.as_ref().map_or(0, |start| start.layer_count as usize)
    }

    /// Whether nothing of it is missing, where that can be told: layers are described last.
    pub fn is_whole(&self) -> bool {
        !self.layers.is_empty() && self.layers.len() == self.layer_count()
    }

    /// The documents, parsed as far as they have to be.
    pub fn finish(self) -> Result<Documents, WireError> {
        let Some(start) = self.start else {
            return Err(WireError::elements("it does not begin with its start"));
        };
        if !self.layers.is_empty() && self.layers.len() != start.layer_count as usize {
            let described = self.layers.len();
            let problem = format!("{described} of its {} layers are described", start.layer_count);
            return Err(WireError::Elements(problem));
        }
        let manifest = match self.manifest.finish("the manifest")? {
            Some(bytes) => Some(source_manifest(bytes, &start)?),
            None => None,
        };
        let family = match (&manifest, start.family()) {
            (Some(manifest), _) => manifest.parsed.family,
            (None, v1::Family::Docker) => Family::Docker,
            (None, v1::Family::Oci | v1::Family::Unspecified) => Family::Oci,
        };
        let config = self.config.finish("the config")?;
        let draft = self.draft.finish("the draft of the config")?;
        Ok(Documents { start, family, manifest, config, draft, layers: self.layers })
    }
}

impl Documents {
    /// What the image is called.
    pub fn name(&self) -> ImageName {
        ImageName { repository: self.start.repository.clone(), tag: self.start.tag.clone() }
    }

    /// The media type of the config.
    pub fn config_media_type(&self) -> String {
        match self.start.config_media_type.as_str() {
            "" => self.family.config().to_owned(),
            named => named.to_owned(),
        }
    }

    /// Whether the manifest is no image's.
    pub fn is_artifact(&self) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| manifest.parsed.is_artifact())
    }

    /// The image as its source offers it; its layers can be looked at, and not be opened.
    pub fn into_image(self) -> Result<Image, WireError> {
        let bad = |what: &str, error: &dyn std::fmt::Display| WireError::elements(format!("{what}: {error}"));
        let layers = self.layers.iter().map(|described| self.layer(described));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let document = match (&self.config, &self.draft) {
            _ if self.is_artifact() => None,
            (Some(bytes), _) => Some(ImageConfig::parse(bytes).map_err(|error| bad("its config", &error))?),
            (None, Some(draft)) => {
                let raw = serde_json::from_slice(draft).map_err(|error| bad("its config", &error))?;
                Some(ImageConfig::incomplete(raw, layers.len()))
            }
            (None, None) => return Err(WireError::elements("it has no config")),
        };
        Ok(Image {
            name: self.name(),
            aliases: self.start.aliases.clone(),
            family: self.family,
            config: ConfigFile { media_type: self.config_media_type(), original: self.config, document },
            manifest: self.manifest,
            layers,
        })
    }

    fn layer(&self, described: &SourceLayer) -> Result<Layer, WireError> {
        let index = described.index as usize;
        let bad =
            |error: crate::digest::InvalidDigest| WireError::elements(format!("layer {index}: {error}"));
        let diff_id = match described.diff_id.as_str() {
            "" => None,
            text => Some(text.parse().map_err(bad)?),
        };
        let format = convert::format(described.compression()).unwrap_or(Format::None);
        Ok(Layer {
            index,
            blob: Arc::new(Elsewhere { identity: described.identity.clone(), size: described.size }),
            descriptor: self.descriptor(described)?,
            format,
            diff_id,
            origin: None,
            keep_stored: described.keep_stored,
            known_by_diff_id_alone: self.manifest.is_none(),
        })
    }

    /// The descriptor of a layer: the manifest's, or what its source made of it.
    pub fn descriptor(&self, described: &SourceLayer) -> Result<Option<Descriptor>, WireError> {
        let index = described.index as usize;
        if let Some(manifest) = &self.manifest {
            let descriptor = manifest.parsed.layers.get(index).cloned();
            return match descriptor {
                Some(descriptor) => Ok(Some(descriptor)),
                None => Err(WireError::elements(format!("its manifest has no layer {index}"))),
            };
        }
        match described.digest.as_str() {
            "" => Ok(None),
            text => {
                let digest: Digest =
                    text.parse().map_err(|error| WireError::elements(format!("layer {index}: {error}")))?;
                Ok(Some(Descriptor::new(&described.media_type, &digest, described.size.unwrap_or(0))))
            }
        }
    }
}

fn source_manifest(bytes: Bytes, start: &ImageStart) -> Result<SourceManifest, WireError> {
    let parsed = manifest::parse(&bytes, start.manifest_media_type.as_deref());
    match parsed.map_err(|error| WireError::elements(error.to_string()))? {
        ParsedManifest::Image(parsed) => Ok(SourceManifest {
            digest: Digest::sha256(&bytes),
            media_type: match &start.manifest_media_type {
                Some(media_type) if !media_type.is_empty() => media_type.clone(),
                _ => parsed.family.manifest().to_owned(),
            },
            bytes,
            parsed,
        }),
        ParsedManifest::Index(_) => Err(WireError::elements("its manifest is an index, not an image")),
        ParsedManifest::Schema1(_) => {
            Err(WireError::elements("its manifest is of docker's first format, which is only read"))
        }
    }
}

/// The content of a layer that is known here, and whose bytes are on a stream, or nowhere that could be read.
#[derive(Debug)]
pub struct Elsewhere {
    /// What its source calls it.
    pub identity: String,
    /// In bytes, where that is known.
    pub size: Option<u64>,
}

#[async_trait::async_trait]
impl Blob for Elsewhere {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        Err(BlobError::Missing { what: self.identity.clone() })
    }

    fn size(&self) -> Option<u64> {
        self.size
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }
}
