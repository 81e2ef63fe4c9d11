//! The caller as a source: its elements, checked as they come, with the layers in spools.
//!
//! The caller's bytes come once, and an attempt at a layer may need them again; so they wait in files without names, under the
//! coordinator's cap, until the image is complete. An image whose end does not come has never been there.

use std::io::Write;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use occy_pipeline::blob::BlobError;
use occy_pipeline::compression::Format;
use occy_pipeline::config::ImageConfig;
use occy_pipeline::digest::{Algorithm, Digest, Hasher};
use occy_pipeline::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use occy_pipeline::error::Error;
use occy_pipeline::manifest::{
    self, Descriptor, Family, ImageManifest, LayerType, MAX_DOCUMENT, ParsedManifest,
};
use occy_pipeline::source::ImageSource;
use occy_pipeline::spool::{FileRegion, Spool, SpoolDir};
use occy_proto::v1;
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{DocumentChunk, ImageStart, LayerEnd, LayerStart};

use tonic::Code;

use super::Elements;
use crate::error::ServiceError;

/// Layers that a caller's image may have.
const MAX_LAYERS: u32 = 2048;

/// A caller's image, complete.
#[derive(Debug)]
pub struct ClientImage {
    start: ImageStart,
    family: Family,
    manifest: Option<SourceManifest>,
    config: ConfigFile,
    layers: Vec<Layer>,
}

#[async_trait::async_trait]
impl ImageSource for ClientImage {
    async fn image(&self) -> Result<Image, Error> {
        Ok(Image {
            name: ImageName { repository: self.start.repository.clone(), tag: self.start.tag.clone() },
            aliases: Vec::new(),
            manifest: self.manifest.clone(),
            family: self.family,
            config: self.config.clone(),
            layers: self.layers.clone(),
        })
    }
}

/// Reads a caller's image to its end.
pub async fn receive(mut elements: Elements, spools: &SpoolDir) -> Result<ClientImage, ServiceError> {
    let mut image = Incoming::new(spools.clone());
    while let Some(element) = elements.next().await {
        let element = element.map_err(|status| broken(&status))?.element;
        let Some(element) = element else {
            // A kind of a later version; within a layer nothing may be skipped.
            if image.open.is_some() {
                return Err(wrong("an unknown element within a layer"));
            }
            continue;
        };
        match element {
            Element::Start(start) => image.start(start)?,
            _ if image.start.is_none() => return Err(wrong("it does not begin with its start")),
            Element::Manifest(chunk) => image.manifest.take(&chunk, "the manifest")?,
            Element::ConfigFile(chunk) => image.config.take(&chunk, "the config")?,
            Element::FinalConfigFile(chunk) => image.final_config.take(&chunk, "the final config")?,
            Element::LayerStart(start) => image.layer_start(&start)?,
            Element::LayerChunk(chunk) => image.layer_chunk(chunk.data).await?,
            Element::LayerEnd(end) => image.layer_end(&end)?,
            // What a filter found on the way to the caller is the caller's.
            Element::FilterOutput(_) => {}
            Element::End(_) => return image.finish(),
        }
    }
    Err(ServiceError::Truncated)
}

/// A stream that breaks was cut by the caller or the network, unless what came on it could not be used.
fn broken(status: &tonic::Status) -> ServiceError {
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange | Code::ResourceExhausted => wrong(status.message()),
        _ => ServiceError::Truncated,
    }
}

fn wrong(problem: impl Into<String>) -> ServiceError {
    ServiceError::Elements(problem.into())
}

/// A document that is coming in pieces.
#[derive(Debug, Default)]
struct Document {
    bytes: BytesMut,
    is_whole: bool,
}

impl Document {
    fn take(&mut self, chunk: &DocumentChunk, what: &'static str) -> Result<(), ServiceError> {
        if self.is_whole {
            return Err(wrong(format!("{what} comes twice")));
        }
        if self.bytes.len() + chunk.data.len() > MAX_DOCUMENT {
            return Err(ServiceError::TooLarge { what, limit: MAX_DOCUMENT });
        }
        self.bytes.extend_from_slice(&chunk.data);
        self.is_whole = chunk.last;
        Ok(())
    }

    fn finish(self, what: &str) -> Result<Option<Bytes>, ServiceError> {
        match self.is_whole {
            true => Ok(Some(self.bytes.freeze())),
            false if self.bytes.is_empty() => Ok(None),
            false => Err(wrong(format!("{what} has no end"))),
        }
    }
}

/// A layer that is coming.
#[derive(Debug)]
struct OpenLayer {
    index: u32,
    same_as: Option<u32>,
    /// Away while a thread writes to it.
    bytes: Option<(Spool, Hasher)>,
}

/// A layer that has come.
#[derive(Clone, Debug)]
struct ReceivedLayer {
    region: FileRegion,
    digest: Digest,
    size: u64,
    format: Format,
    diff_id: Option<Digest>,
    changed: bool,
}

/// An image that is coming.
#[derive(Debug)]
struct Incoming {
    spools: SpoolDir,
    start: Option<ImageStart>,
    manifest: Document,
    config: Document,
    final_config: Document,
    open: Option<OpenLayer>,
    layers: Vec<ReceivedLayer>,
}

impl Incoming {
    fn new(spools: SpoolDir) -> Self {
        Self {
            spools,
            start: None,
            manifest: Document::default(),
            config: Document::default(),
            final_config: Document::default(),
            open: None,
            layers: Vec::new(),
        }
    }

    fn start(&mut self, start: ImageStart) -> Result<(), ServiceError> {
        if self.start.is_some() {
            return Err(wrong("it begins twice"));
        }
        if start.layer_count > MAX_LAYERS {
            return Err(ServiceError::TooMany { what: "layers in an image", limit: MAX_LAYERS as usize });
        }
        self.start = Some(start);
        Ok(())
    }

    fn layer_start(&mut self, start: &LayerStart) -> Result<(), ServiceError> {
        let next = u32::try_from(self.layers.len()).unwrap_or(u32::MAX);
        if start.index != next {
            return Err(wrong(format!("layer {} begins where layer {next} should", start.index)));
        }
        let announced = self.start.as_ref().map_or(0, |start| start.layer_count);
        if start.index >= announced {
            return Err(wrong(format!("it has more than the {announced} layers that it announced")));
        }
        if start.same_as.is_some_and(|earlier| earlier >= next) {
            return Err(wrong(format!("layer {next} repeats a layer that has not come")));
        }
        let bytes = match start.same_as {
            Some(_) => None,
            None => Some((self.spool()?, Hasher::new(Algorithm::Sha256))),
        };
        self.open = Some(OpenLayer { index: next, same_as: start.same_as, bytes });
        Ok(())
    }

    fn spool(&self) -> Result<Spool, ServiceError> {
        self.spools.create().map_err(spooling)
    }

    async fn layer_chunk(&mut self, data: Bytes) -> Result<(), ServiceError> {
        let bytes = self.open.as_mut().and_then(|layer| layer.bytes.take());
        let Some((mut spool, mut hasher)) = bytes else {
            return Err(wrong("bytes of a layer come where none is open"));
        };
        let written = tokio::task::spawn_blocking(move || {
            spool.write_all(&data)?;
            hasher.update(&data);
            Ok((spool, hasher))
        });
        let written = written.await.map_err(|error| ServiceError::Panicked(error.to_string()))?;
        if let Some(layer) = &mut self.open {
            layer.bytes = Some(written.map_err(spooling)?);
        }
        Ok(())
    }

    fn layer_end(&mut self, end: &LayerEnd) -> Result<(), ServiceError> {
        let layer = self.open.take().filter(|layer| layer.index == end.index);
        let Some(layer) = layer else {
            return Err(wrong(format!("layer {} ends, and was not open", end.index)));
        };
        let received = match (layer.same_as, layer.bytes) {
            (Some(earlier), _) => self.layers[earlier as usize].clone(),
            (None, Some((spool, hasher))) => received(spool, hasher, end)?,
            (None, None) => unreachable!("the bytes are put back after each chunk"),
        };
        let promised = |text: &str| text.is_empty() || text == received.digest.to_string();
        if !promised(&end.digest) || (!end.digest.is_empty() && end.size != received.size) {
            return Err(wrong(format!(
                "layer {} is {} with {} bytes, not {} with {} bytes",
                end.index, received.digest, received.size, end.digest, end.size
            )));
        }
        self.layers.push(received);
        Ok(())
    }

    fn finish(self) -> Result<ClientImage, ServiceError> {
        let start = self.start.unwrap_or_default();
        if self.open.is_some() || self.layers.len() != start.layer_count as usize {
            return Err(wrong(format!(
                "it ends after {} of its {} layers",
                self.layers.len(),
                start.layer_count
            )));
        }
        let is_stored = start.layer_form() != v1::LayerForm::Tar;
        let manifest = match self.manifest.finish("the manifest")? {
            Some(bytes) => Some(source_manifest(bytes, &start)?),
            None => None,
        };
        let config = self.config.finish("the config")?;
        let final_config = self.final_config.finish("the final config")?;
        // Layers and config that filters have changed on their way are another image than the manifest's.
        let is_changed =
            final_config.is_some() || self.layers.iter().any(|layer| layer.changed) || !is_stored;
        let family = match (&manifest, start.family()) {
            (Some(manifest), _) => manifest.parsed.family,
            (None, v1::Family::Docker) => Family::Docker,
            (None, v1::Family::Oci | v1::Family::Unspecified) => Family::Oci,
        };
        let is_artifact = manifest.as_ref().is_some_and(|manifest| manifest.parsed.is_artifact());
        let manifest = manifest.filter(|_| !is_changed);
        let Some(config) = final_config.or(config) else { return Err(wrong("it has no config")) };
        if let Some(manifest) = &manifest {
            check_manifest(&manifest.parsed, &config, &self.layers)?;
        }
        let document = match is_artifact {
            true => None,
            false => {
                Some(ImageConfig::parse(&config).map_err(|error| wrong(format!("its config: {error}")))?)
            }
        };
        let diff_ids = document.as_ref().map(|document| document.diff_ids().to_vec()).unwrap_or_default();
        if document.is_some() && diff_ids.len() != self.layers.len() {
            let (layers, diff_ids) = (self.layers.len(), diff_ids.len());
            return Err(wrong(format!("it has {layers} layers, its config {diff_ids} diff_ids")));
        }
        let descriptors = manifest.as_ref().map(|manifest| manifest.parsed.layers.as_slice());
        let mut layers = Vec::new();
        for (index, received) in self.layers.into_iter().enumerate() {
            let diff_id = diff_ids.get(index).cloned().flatten();
            if received.diff_id.is_some() && diff_id.is_some() && received.diff_id != diff_id {
                return Err(wrong(format!("the config has another diff_id for layer {index}")));
            }
            layers.push(layer(index, received, diff_id, is_stored, family, descriptors)?);
        }
        let media_type = match start.config_media_type.as_str() {
            "" => family.config().to_owned(),
            named => named.to_owned(),
        };
        let config = ConfigFile { original: Some(config), media_type, document };
        Ok(ClientImage { start, family, manifest, config, layers })
    }
}

fn spooling(source: std::io::Error) -> ServiceError {
    Error::from(BlobError::Io { what: "failed to keep a layer of the caller's".to_owned(), source }).into()
}

fn received(spool: Spool, hasher: Hasher, end: &LayerEnd) -> Result<ReceivedLayer, ServiceError> {
    let (size, digest) = (hasher.size(), hasher.finish());
    // Two layers with the same bytes have the same name, so that they are written once.
    let region = FileRegion::of_spool(Arc::new(spool), digest.to_string(), 0, size).map_err(spooling)?;
    let mut start = [0; 4];
    let format = Format::sniff(region.peek(&mut start).map_err(spooling)?);
    let diff_id = match end.diff_id.as_str() {
        "" => None,
        text => {
            Some(text.parse().map_err(|error| wrong(format!("diff_id of layer {}: {error}", end.index)))?)
        }
    };
    let region = region.verified(digest.clone());
    Ok(ReceivedLayer { region, digest, size, format, diff_id, changed: end.changed })
}

fn source_manifest(bytes: Bytes, start: &ImageStart) -> Result<SourceManifest, ServiceError> {
    let parsed = manifest::parse(&bytes, start.manifest_media_type.as_deref());
    match parsed.map_err(|error| wrong(error.to_string()))? {
        ParsedManifest::Image(parsed) => Ok(SourceManifest {
            digest: Digest::sha256(&bytes),
            media_type: match &start.manifest_media_type {
                Some(media_type) if !media_type.is_empty() => media_type.clone(),
                _ => parsed.family.manifest().to_owned(),
            },
            bytes,
            parsed,
        }),
        ParsedManifest::Index(_) => Err(wrong("its manifest is an index, not an image")),
        ParsedManifest::Schema1(_) => {
            Err(wrong("its manifest is of docker's first format, which is only read"))
        }
    }
}

/// What came is what the manifest names.
fn check_manifest(
    manifest: &ImageManifest,
    config: &Bytes,
    layers: &[ReceivedLayer],
) -> Result<(), ServiceError> {
    if manifest.config.digest != Digest::sha256(config) {
        return Err(wrong(format!("its config is not the manifest's {}", manifest.config.digest)));
    }
    if manifest.layers.len() != layers.len() {
        let (named, came) = (manifest.layers.len(), layers.len());
        return Err(wrong(format!("its manifest names {named} layers, and {came} came")));
    }
    for (index, (descriptor, layer)) in manifest.layers.iter().zip(layers).enumerate() {
        if descriptor.digest != layer.digest || descriptor.size != layer.size {
            let (expected, digest) = (&descriptor.digest, &layer.digest);
            return Err(wrong(format!("layer {index} is {digest}, not the manifest's {expected}")));
        }
    }
    Ok(())
}

fn layer(
    index: usize,
    received: ReceivedLayer,
    diff_id: Option<Digest>,
    is_stored: bool,
    family: Family,
    descriptors: Option<&[Descriptor]>,
) -> Result<Layer, ServiceError> {
    let ReceivedLayer { region, digest, size, format, .. } = received;
    let descriptor = match descriptors {
        _ if !is_stored => None,
        Some(descriptors) => Some(descriptors[index].clone()),
        None => {
            // Docker has no name for zstd; such an image becomes OCI, whose names are taken then.
            let kind = LayerType::new(family, format);
            let name = kind.name().or_else(|_| kind.in_family(Family::Oci).name());
            let name = name.map_err(|error| wrong(format!("layer {index}: {error}")))?;
            Some(Descriptor::new(name, &digest, size))
        }
    };
    Ok(Layer {
        index,
        blob: Arc::new(region),
        descriptor,
        format,
        diff_id,
        origin: None,
        keep_stored: is_stored,
    })
}
