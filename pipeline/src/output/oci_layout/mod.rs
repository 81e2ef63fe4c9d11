//! `oci-layout://PATH`: an OCI image layout, as a directory ([`directory`]) that any number of images and of processes share,
//! or as one tar ([`archive`]); or wherever else somebody keeps it ([`Place`]).
//!
//! Both keep blobs by their digests and name an image last: in a directory by its `index.json`, which is replaced in one step,
//! in a tar by the tar's own name, which it gets when it is whole.

mod archive;
mod directory;
mod place;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt;
use serde_json::{Map, Value, json};

use self::place::Local;
pub use self::place::Place;
use super::content::ContentOutput;
use super::manifest::{FinalManifest, ManifestFormat};
use super::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, OutputError, OutputKind, Receipt};
use crate::blob::{BlobError, BlobSummary, BufferPool, ByteCount, ConsumerGone, LayerStream, LayerWriter};
use crate::compression::{Compression, Format};
use crate::digest::Digest;
use crate::element::{Image, ImageName, Layer, StoredLayer};
use crate::error::Error;
use crate::layout::{IMAGE_NAME, REF_NAME};
use crate::manifest::Family;
use crate::platform::Platform;
use crate::reference::{Reference, Tag};
use crate::registry::FetchedManifest;
use crate::source::stored::SourceIndex;
use crate::spool::SpoolDir;
use crate::task::both;
use crate::thread::blocking;

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "oci-layout",
    syntax: "oci-layout://PATH[?tag=TAG]",
    about: "an OCI image layout: a directory that images share, or one tar; some readers want ?format=oci",
    options: &["tag", "tar", "compression", "format", "verify", "max_workers"],
};

/// Chunks between the reader of a blob and its writer.
const CHANNEL: usize = 4;

/// How a layout is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayoutOptions {
    /// What the image is called in it; unset, as its source calls it.
    pub tag: Option<String>,
    /// As a tar, even where the path does not look like one.
    pub tar: bool,
    /// What every layer becomes; unset, it keeps what it has.
    pub compression: Option<Compression>,
    /// The format of the manifest.
    pub format: ManifestFormat,
    /// Read the blobs that are there already and need not be fetched, to see that they are whole.
    pub verify: bool,
    /// Keep the bytes of foreign layers too.
    pub foreign_layers: bool,
}

/// An image or index that is being written to a layout.
#[derive(Clone, Debug)]
pub struct LayoutOutput {
    layout: Arc<Layout>,
    entry: Entry,
}

/// What is written: something with a name, or an entry of an index, which has none.
#[derive(Clone, Debug)]
enum Entry {
    Named,
    /// It must have this digest.
    Known(Digest),
    /// It may have any.
    ToBe,
}

#[derive(Debug)]
struct Layout {
    /// How messages call it.
    path: PathBuf,
    options: LayoutOptions,
    place: Arc<dyn Place>,
}

impl LayoutOutput {
    /// Writes to the layout at `path`: one tar if that ends with `.tar`, is a file, is `-` (standard output), or if so told, else
    /// a directory. What a tar has to wait for goes beside it, or into `spools`.
    pub fn new(path: impl Into<PathBuf>, options: LayoutOptions, spools: SpoolDir) -> Self {
        let path = path.into();
        let local = Local::new(path.clone(), options.tar, options.verify, spools);
        Self::at(Arc::new(local), path, options)
    }

    /// Writes to a layout that is called `path` and lies elsewhere, which knows by itself whether it is a tar and is verified.
    pub fn at(place: Arc<dyn Place>, path: PathBuf, options: LayoutOptions) -> Self {
        Self { layout: Arc::new(Layout { path, options, place }), entry: Entry::Named }
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> &Arc<dyn Place> {
        &self.layout.place
    }

    /// How messages call that, and what the image is called in it.
    pub(crate) fn called(&self) -> (&Path, Option<&str>) {
        (&self.layout.path, self.layout.options.tag.as_deref())
    }

    fn destination(&self) -> String {
        format!("oci-layout://{}", self.layout.path.display())
    }

    /// The manifest that a full name means in a directory.
    pub(crate) async fn named(&self, name: &str) -> Result<Option<FetchedManifest>, Error> {
        self.place().named(IMAGE_NAME, name).await
    }

    fn refuse_other(&self, actual: &Digest) -> Result<(), OutputError> {
        match &self.entry {
            Entry::Known(expected) if expected != actual => {
                Err(OutputError::ByDigest { expected: expected.clone(), actual: actual.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Makes an image or index visible, all of whose content is there.
    async fn name(
        &self,
        manifest: FinalManifest,
        name: &ImageName,
        platform: Option<Platform>,
    ) -> Result<Receipt, Error> {
        let receipt = Receipt {
            manifest: Some(manifest.bytes.clone()),
            manifest_digest: Some(manifest.digest.clone()),
            manifest_media_type: Some(manifest.media_type.clone()),
            manifest_size: Some(manifest.bytes.len() as u64),
            destination: self.destination(),
            ..Receipt::default()
        };
        let entry = match self.entry {
            Entry::Known(_) | Entry::ToBe => None,
            Entry::Named => Some(entry(&manifest, self.layout.options.tag.as_deref(), name, platform)),
        };
        self.place().put(&manifest.digest, manifest.bytes).await?;
        if let Some(entry) = entry {
            self.place().name(entry, self.layout.options.tag.is_some()).await?;
        }
        Ok(receipt)
    }
}

/// Makes a tar of some blobs of a directory that is a layout, and of its names. It appears when it is whole.
pub(crate) async fn pack(directory: &Path, blobs: BTreeSet<Digest>, to: &Path) -> Result<(), Error> {
    let (directory, to) = (directory.to_owned(), to.to_owned());
    Ok(blocking(move || archive::pack(&directory, &blobs, &to)).await?)
}

#[async_trait::async_trait]
impl ImageOutput for LayoutOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Stored { compression: self.layout.options.compression }
    }

    fn format(&self) -> ManifestFormat {
        self.layout.options.format
    }

    async fn begin(&self, image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        FinalManifest::foresee(image, self.layout.options.format, self.layout.options.compression)?;
        self.place().open().await
    }

    async fn has_layer(&self, layer: &Layer) -> Result<bool, Error> {
        let Some(descriptor) = &layer.descriptor else { return Ok(false) };
        let is_elsewhere = layer.is_foreign() && !self.layout.options.foreign_layers;
        Ok(is_elsewhere || self.place().has(&descriptor.digest, descriptor.size).await?)
    }

    async fn copy_layer(&self, layer: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        if self.has_layer(layer).await? {
            return Ok(Moved::Nothing);
        }
        let descriptor = layer.descriptor.as_ref().expect("only a layer with a descriptor is copied");
        let summary = BlobSummary { digest: descriptor.digest.clone(), size: descriptor.size };
        let (writer, stream) = LayerStream::channel(CHANNEL, BufferPool::default());
        let stream = stream.by(descriptor.digest.algorithm());
        let (fed, stored) = tokio::join!(
            async { feed(layer, writer, summary).await.map_err(Error::from) },
            self.place().store(stream, progress.clone()),
        );
        both(fed, stored)?;
        Ok(Moved::Bytes)
    }

    async fn write_layer(
        &self,
        _index: usize,
        stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        let BlobSummary { digest, size } = self.place().store(stream, progress.clone()).await?;
        Ok(StoredLayer::Written { digest, size, format })
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let manifest = FinalManifest::of(&finished, self.layout.options.format)?;
        self.refuse_other(&manifest.digest)?;
        self.place().put(&Digest::sha256(&finished.config), finished.config.clone()).await?;
        let document = finished.image.config.document.as_ref();
        let platform = document.and_then(|config| config.platform());
        self.name(manifest, &finished.image.name, platform).await
    }

    fn entry(&self, digest: &Digest) -> Option<Arc<dyn ImageOutput>> {
        Some(Arc::new(Self { layout: Arc::clone(&self.layout), entry: Entry::Known(digest.clone()) }))
    }

    fn entry_to_be(&self) -> Option<Arc<dyn ImageOutput>> {
        Some(Arc::new(Self { layout: Arc::clone(&self.layout), entry: Entry::ToBe }))
    }

    fn content(&self) -> Option<Arc<dyn ContentOutput>> {
        Some(Arc::new(self.clone()))
    }

    async fn put_index(&self, index: &SourceIndex) -> Result<Receipt, Error> {
        self.refuse_other(&index.manifest.digest)?;
        // An index without images has begun none.
        self.place().open().await?;
        self.name(FinalManifest::of_index(index), &index.name, None).await
    }
}

#[async_trait::async_trait]
impl ContentOutput for LayoutOutput {
    fn destination(&self) -> String {
        self.destination()
    }

    fn wanted(&self) -> Option<&Digest> {
        None
    }

    fn names_many(&self) -> bool {
        self.place().names_many()
    }

    async fn open(&self) -> Result<(), Error> {
        self.place().open().await
    }

    async fn is_named(&self, _digest: &Digest) -> Result<bool, Error> {
        // To name it again costs less than to find out.
        Ok(false)
    }

    async fn has_manifest(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        self.place().has(digest, size).await
    }

    async fn put_blob(&self, blob: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        self.copy_layer(blob, progress).await
    }

    async fn put_manifest(&self, manifest: &FetchedManifest) -> Result<Option<Digest>, Error> {
        self.place().put(&manifest.digest, manifest.bytes.clone()).await?;
        Ok(None)
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        self.place().named(REF_NAME, tag.as_str()).await
    }

    async fn put_tagged(&self, tag: &Tag, manifest: &FetchedManifest) -> Result<(), Error> {
        let mut entry = bare_entry(&manifest.media_type, &manifest.digest, manifest.bytes.len());
        entry.insert("annotations".to_owned(), json!({REF_NAME: tag.as_str()}));
        self.place().put(&manifest.digest, manifest.bytes.clone()).await?;
        self.place().name(entry, true).await
    }

    async fn put_named(&self, manifest: &FetchedManifest, name: &ImageName) -> Result<(), Error> {
        let FetchedManifest { bytes, media_type, digest } = manifest.clone();
        self.name(FinalManifest { bytes, media_type, digest }, name, None).await?;
        Ok(())
    }
}

/// Sends a blob as it is; its reader checks that it is what its descriptor says.
async fn feed(layer: &Layer, writer: LayerWriter, summary: BlobSummary) -> Result<(), BlobError> {
    let gone = |ConsumerGone| BlobError::Interrupted;
    let mut blob = layer.blob.open().await?;
    while let Some(bytes) = blob.next().await {
        writer.send(bytes?).await.map_err(gone)?;
    }
    writer.finish(summary).await.map_err(gone)
}

/// The entry of `index.json`.
fn entry(
    manifest: &FinalManifest,
    tag: Option<&str>,
    name: &ImageName,
    platform: Option<Platform>,
) -> Map<String, Value> {
    let mut annotations = Map::new();
    if let Some(tag) = tag.or(name.tag.as_deref()) {
        if let Ok(reference) = format!("{}:{tag}", name.repository).parse::<Reference>() {
            annotations.insert(IMAGE_NAME.to_owned(), format!("{}:{tag}", reference.name()).into());
        }
        annotations.insert(REF_NAME.to_owned(), tag.into());
    }
    let mut entry = bare_entry(&manifest.media_type, &manifest.digest, manifest.bytes.len());
    if !annotations.is_empty() {
        entry.insert("annotations".to_owned(), annotations.into());
    }
    if let Some(platform) = platform {
        let mut value = json!({"architecture": platform.architecture, "os": platform.os});
        if let Some(variant) = platform.variant {
            value["variant"] = variant.into();
        }
        entry.insert("platform".to_owned(), value);
    }
    entry
}

fn bare_entry(media_type: &str, digest: &Digest, size: usize) -> Map<String, Value> {
    let entry = json!({"mediaType": media_type, "digest": digest, "size": size});
    entry.as_object().cloned().expect("it was just written as an object")
}

/// `index.json` with nothing in it.
fn empty_index() -> Map<String, Value> {
    let index = json!({
        "schemaVersion": 2,
        "mediaType": Family::Oci.index(),
        "manifests": [],
    });
    index.as_object().cloned().expect("it was just written as an object")
}
