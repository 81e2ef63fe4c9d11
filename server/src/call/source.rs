//! The caller as a source: its elements, checked as they come, with the layers in spools.
//!
//! The caller's bytes come once, and an attempt at a layer may need them again; so they wait in files without names, under the
//! coordinator's cap, until the image is complete. An image whose end does not come has never been there.

use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use occy_pipeline::blob::{BlobError, BlobRef};
use occy_pipeline::compression::Format;
use occy_pipeline::config::ImageConfig;
use occy_pipeline::digest::{Algorithm, Digest, Hasher};
use occy_pipeline::element::{ConfigFile, Image, ImageName, Layer, SourceManifest};
use occy_pipeline::error::Error;
use occy_pipeline::manifest::{Descriptor, Family, ImageManifest, LayerType};
use occy_pipeline::source::ImageSource;
use occy_pipeline::spool::{FileRegion, Spool, SpoolDir};
use occy_pipeline::wire::convert;
use occy_pipeline::wire::document::Document;
use occy_pipeline::wire::head::{Documents, Elsewhere, Head};
use occy_proto::v1;
use occy_proto::v1::image_element::Element;
use occy_proto::v1::{LayerEnd, LayerStart};
use tonic::Code;

use super::Elements;
use crate::error::ServiceError;

/// A caller's image, complete.
#[derive(Debug)]
pub struct ClientImage {
    name: ImageName,
    aliases: Vec<String>,
    family: Family,
    manifest: Option<SourceManifest>,
    config: ConfigFile,
    layers: Vec<Layer>,
}

#[async_trait::async_trait]
impl ImageSource for ClientImage {
    async fn image(&self) -> Result<Image, Error> {
        Ok(Image {
            name: self.name.clone(),
            aliases: self.aliases.clone(),
            manifest: self.manifest.clone(),
            family: self.family,
            config: self.config.clone(),
            layers: self.layers.clone(),
        })
    }
}

/// Reads a caller's image to its end.
pub async fn receive(elements: &mut Elements, spools: &SpoolDir) -> Result<ClientImage, ServiceError> {
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
        match image.head.take(element)? {
            None => {}
            Some(Element::FinalConfigFile(chunk)) => image.final_config.take(&chunk, "the final config")?,
            Some(Element::LayerStart(start)) => image.layer_start(&start)?,
            Some(Element::LayerChunk(chunk)) => image.layer_chunk(chunk.data).await?,
            Some(Element::LayerEnd(end)) => image.layer_end(&end)?,
            Some(Element::End(_)) => return image.finish(),
            // What a filter found on the way to the caller is the caller's.
            Some(_) => {}
        }
    }
    Err(ServiceError::Truncated)
}

/// A stream that breaks was cut by the caller or the network, unless what came on it could not be used.
pub(super) fn broken(status: &tonic::Status) -> ServiceError {
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange | Code::ResourceExhausted => wrong(status.message()),
        _ => ServiceError::Truncated,
    }
}

fn wrong(problem: impl Into<String>) -> ServiceError {
    ServiceError::Elements(problem.into())
}

/// A layer that is coming.
#[derive(Debug)]
struct OpenLayer {
    index: usize,
    content: Content,
}

/// Where the bytes of a layer are.
#[derive(Debug)]
enum Content {
    /// They are those of an earlier one.
    SameAs(usize),
    /// They stay where the manifest says.
    Absent,
    /// They are coming; away while a thread writes them down.
    Coming(Option<Box<(Spool, Hasher)>>),
}

/// A layer that has come.
#[derive(Clone, Debug)]
struct ReceivedLayer {
    blob: BlobRef,
    is_absent: bool,
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
    head: Head,
    final_config: Document,
    open: Option<OpenLayer>,
    /// By index; None has not come.
    layers: Vec<Option<ReceivedLayer>>,
}

impl Incoming {
    fn new(spools: SpoolDir) -> Self {
        Self {
            spools,
            head: Head::default(),
            final_config: Document::default(),
            open: None,
            layers: Vec::new(),
        }
    }

    fn layer_start(&mut self, start: &LayerStart) -> Result<(), ServiceError> {
        let announced = self.head.layer_count();
        self.layers.resize(announced, None);
        let index = start.index as usize;
        match (&self.open, self.layers.get(index)) {
            (_, None) => {
                return Err(wrong(format!("it has more than the {announced} layers that it announced")));
            }
            (_, Some(Some(_))) => return Err(wrong(format!("layer {index} comes twice"))),
            (Some(open), _) if open.index != index => {
                return Err(wrong(format!("layer {index} begins within layer {}", open.index)));
            }
            _ => {}
        }
        let content = match start.same_as.map(|earlier| earlier as usize) {
            Some(earlier) if earlier >= index || self.layers[earlier].is_none() => {
                return Err(wrong(format!("layer {index} repeats a layer that has not come")));
            }
            Some(earlier) => Content::SameAs(earlier),
            None if start.absent => Content::Absent,
            None => Content::Coming(Some(Box::new((self.spool()?, Hasher::new(Algorithm::Sha256))))),
        };
        self.open = Some(OpenLayer { index, content });
        Ok(())
    }

    fn spool(&self) -> Result<Spool, ServiceError> {
        self.spools.create().map_err(spooling)
    }

    async fn layer_chunk(&mut self, data: Bytes) -> Result<(), ServiceError> {
        let Some(OpenLayer { content: Content::Coming(bytes), .. }) = &mut self.open else {
            return Err(wrong("bytes of a layer come where none is open"));
        };
        let mut writing = bytes.take().expect("the bytes are put back after each chunk");
        let written = tokio::task::spawn_blocking(move || {
            let (spool, hasher) = writing.as_mut();
            spool.write_all(&data)?;
            hasher.update(&data);
            Ok(writing)
        });
        let written = written.await.map_err(|error| ServiceError::Panicked(error.to_string()))?;
        *bytes = Some(written.map_err(spooling)?);
        Ok(())
    }

    fn layer_end(&mut self, end: &LayerEnd) -> Result<(), ServiceError> {
        let layer = self.open.take().filter(|layer| layer.index == end.index as usize);
        let Some(layer) = layer else {
            return Err(wrong(format!("layer {} ends, and was not open", end.index)));
        };
        let received = match layer.content {
            Content::SameAs(earlier) => self.layers[earlier].clone().expect("it was there at the start"),
            Content::Absent => absent(end)?,
            Content::Coming(bytes) => {
                let (spool, hasher) = *bytes.expect("the bytes are put back after each chunk");
                received(spool, hasher, end)?
            }
        };
        let promised = |text: &str| text.is_empty() || text == received.digest.to_string();
        if !promised(&end.digest) || (!end.digest.is_empty() && end.size != received.size) {
            return Err(wrong(format!(
                "layer {} is {} with {} bytes, not {} with {} bytes",
                end.index, received.digest, received.size, end.digest, end.size
            )));
        }
        self.layers[layer.index] = Some(received);
        Ok(())
    }

    fn finish(self) -> Result<ClientImage, ServiceError> {
        let announced = self.head.layer_count();
        let received: Vec<_> = self.layers.into_iter().flatten().collect();
        if self.open.is_some() || received.len() != announced {
            return Err(wrong(format!("it ends after {} of its {announced} layers", received.len())));
        }
        let mut documents = self.head.finish()?;
        let final_config = self.final_config.finish("the final config")?;
        let is_stored = documents.start.layer_form() != v1::LayerForm::Tar;
        let is_artifact = documents.is_artifact();
        // Layers and config that filters have changed on their way are another image than the manifest's.
        if final_config.is_some() || received.iter().any(|layer| layer.changed) || !is_stored {
            documents.manifest = None;
        }
        let config = final_config.or(documents.config.take());
        let Some(config) = config else { return Err(wrong("it has no config")) };
        if let Some(manifest) = &documents.manifest {
            check_manifest(&manifest.parsed, &config, &received)?;
        }
        let document = match is_artifact {
            true => None,
            false => {
                Some(ImageConfig::parse(&config).map_err(|error| wrong(format!("its config: {error}")))?)
            }
        };
        let diff_ids = document.as_ref().map(|document| document.diff_ids().to_vec()).unwrap_or_default();
        if document.is_some() && diff_ids.len() != received.len() {
            let (layers, diff_ids) = (received.len(), diff_ids.len());
            return Err(wrong(format!("it has {layers} layers, its config {diff_ids} diff_ids")));
        }
        let mut layers = Vec::new();
        for (index, received) in received.into_iter().enumerate() {
            let diff_id = diff_ids.get(index).cloned().flatten();
            if received.diff_id.is_some() && diff_id.is_some() && received.diff_id != diff_id {
                return Err(wrong(format!("the config has another diff_id for layer {index}")));
            }
            layers.push(layer(index, received, diff_id, is_stored, &documents)?);
        }
        let config =
            ConfigFile { original: Some(config), media_type: documents.config_media_type(), document };
        Ok(ClientImage {
            name: documents.name(),
            aliases: documents.start.aliases,
            family: documents.family,
            manifest: documents.manifest,
            config,
            layers,
        })
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
    let blob = Arc::new(region.verified(digest.clone()));
    Ok(ReceivedLayer { blob, is_absent: false, digest, size, format, diff_id, changed: end.changed })
}

/// A layer whose bytes nobody has: it can only be named, as its manifest names it.
fn absent(end: &LayerEnd) -> Result<ReceivedLayer, ServiceError> {
    let digest = end.digest.parse().map_err(|error| wrong(format!("layer {}: {error}", end.index)))?;
    Ok(ReceivedLayer {
        blob: Arc::new(Elsewhere { identity: end.digest.clone(), size: Some(end.size) }),
        is_absent: true,
        digest,
        size: end.size,
        format: convert::format(end.compression()).unwrap_or(Format::None),
        diff_id: None,
        changed: false,
    })
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
    documents: &Documents,
) -> Result<Layer, ServiceError> {
    let ReceivedLayer { blob, is_absent, digest, size, format, .. } = received;
    let described = documents.layers.get(index).filter(|_| is_stored);
    let stated = described.and_then(|described| convert::format(described.compression()));
    let format = stated.unwrap_or(format);
    let descriptor = match (described, &documents.manifest) {
        _ if !is_stored => None,
        (_, Some(manifest)) => Some(manifest.parsed.layers[index].clone()),
        // A plain tar that its source knows by its diff_id alone.
        (Some(described), None) if described.digest.is_empty() => None,
        (_, None) => {
            // Docker has no name for zstd; such an image becomes OCI, whose names are taken then.
            let kind = LayerType::new(documents.family, format);
            let name = kind.name().or_else(|_| kind.in_family(Family::Oci).name());
            let name = name.map_err(|error| wrong(format!("layer {index}: {error}")))?;
            Some(Descriptor::new(name, &digest, size))
        }
    };
    if is_absent && !descriptor.as_ref().is_some_and(Descriptor::is_foreign) {
        return Err(wrong(format!("layer {index} has no bytes, and is not one that could be elsewhere")));
    }
    Ok(Layer {
        index,
        blob,
        keep_stored: is_stored && (described.is_none_or(|described| described.keep_stored)),
        known_by_diff_id_alone: documents.manifest.is_none(),
        descriptor,
        format,
        diff_id,
        origin: None,
    })
}
