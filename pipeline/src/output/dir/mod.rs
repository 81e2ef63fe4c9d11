//! `dir://PATH`: an image as files. The Python tool's form: `manifest.json`, the config as `<hash>.json`, every layer as
//! `<diff_id>/layer.tar`, and `catalog.json`, which says which manifest belongs to which image.
//!
//! - Plain, the directory is built beside its place and renamed into it, whole.
//! - With `expand=true` the layers are also merged into one tree of files ([`unpack`](crate::unpack)): `manifest/` beside
//!   `manifest.json`, and in a shared directory, beside the image's own manifest, a tree of the same name without `.json`:
//!   `manifest-IMAGE-TAG-VERSION/`.
//! - With `unique_names=true` it is shared by any number of images and of processes: layers are named by what they hold and
//!   stored once, each image has a manifest of its own ([`catalog`]), and a layer that is there is not fetched again
//!   ([`index`]). A layer's file gets its name when it is whole and on the disk; then config, tree, manifest and, last, the
//!   catalog's line. What a killed run leaves is a layer that nobody refers to, which the next image may need, and which is
//!   safe to remove when no manifest names it.
//!
//! # Where the Python tool differs
//! - It names layers by the digests of their compressed blobs; ours have the diff_ids, so that the same tar is stored once
//!   however it was compressed.
//! - It writes the config anew, so that the file does not have the hash that is its name; ours has the source's bytes.
//! - It leaves the registry out of the image's name in `catalog.json`, `ImageName` and `RepoTags`, and all but the last
//!   component out of `RepoTags`: two registries' images take each other's place. Ours are full names.
//! - Images whose names differ in `/` and `_` share a manifest there; here the second gets a name of its own.
//! - Its directory may be seen half written, and processes that write to one catalog lose each other's lines.
//! - Its trees follow links out of the tree, and an opaque whiteout in `etc/` also hides `etcetera/`.

pub mod catalog;
mod index;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use self::catalog::{CATALOG, Catalog, LOCK, to_json};
use self::index::Entry;
use super::merged::{Content, Keep, Merged, Order, report};
use super::staging::{StagedDir, fail, wait_for_others};
use super::{ExpectedLayer, FinishedImage, LayerForm, OutputError, OutputKind, Receipt, refuse_artifact};
use crate::atomic::{UnnamedFile, write_durably};
use crate::blob::{BlobSummary, ByteCount, LayerStream};
use crate::compression::Format;
use crate::digest::{Algorithm, Digest, Hasher};
use crate::element::{Image, Layer, StoredLayer, WrittenLayer};
use crate::error::Error;
use crate::filter::FilterChain;
use crate::tar::Limits;
use crate::thread::{self, blocking};
use crate::unpack;

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "dir",
    syntax: "dir://PATH",
    about: "a directory of plain layer tars; shared by images with unique_names=true, and unpacked with expand=true",
    options: &["unique_names", "expand", "force", "verify"],
};

/// How a directory is written.
#[derive(Clone, Debug, Default)]
pub struct DirOptions {
    /// Images share the directory and its layers.
    pub unique_names: bool,
    /// Merge the layers into a tree of files too.
    pub expand: bool,
    /// Replace what is at the destination.
    pub force: bool,
    /// Read the layers that are there already and need not be fetched, to see that they are whole.
    pub verify: bool,
    /// What a layer may demand of who unpacks it.
    pub limits: Limits,
}

/// A directory that an image is written to.
#[derive(Debug)]
pub struct DirOutput {
    path: PathBuf,
    options: DirOptions,
    /// Shared with the threads that write layers, the last of which removes what was not completed.
    place: Mutex<Option<Arc<Place>>>,
}

/// Where the files of a run go.
#[derive(Debug)]
struct Place {
    store: Store,
    tree: Option<Tree>,
}

#[derive(Debug)]
enum Store {
    /// A directory that has yet to get its name.
    Staged(StagedDir),
    /// One that others use at the same time.
    Shared(PathBuf),
}

/// The layers merged into one tree.
#[derive(Debug)]
struct Tree {
    merged: Merged,
    /// In a shared directory, the tree gets its name by itself.
    staged: Option<StagedDir>,
}

impl Place {
    fn open(
        path: &Path,
        options: &DirOptions,
        (image, tag): &(String, String),
        order: Order,
    ) -> Result<Self, Error> {
        let store = match options.unique_names {
            true => open_shared(path, options.force).map(|()| Store::Shared(path.to_owned())),
            false => StagedDir::create(path, options.force).map(Store::Staged),
        }?;
        if !options.expand {
            return Ok(Self { store, tree: None });
        }
        let (root, staged) = match &store {
            Store::Staged(staged) => (staged.path().join("manifest"), None),
            Store::Shared(directory) => {
                // Under which name of the image's it is put there, its config will tell.
                let manifest = Catalog::lock(directory)?.manifest_name(image, tag, None);
                let staged = StagedDir::create(&directory.join(manifest), true)?;
                (staged.path().to_owned(), Some(staged))
            }
        };
        let unpacking = unpack::Options { owners: true, limits: options.limits.clone() };
        let merged = Merged::create(&root, order, unpacking)?;
        Ok(Self { store, tree: Some(Tree { merged, staged }) })
    }

    /// Where layers are stored.
    fn path(&self) -> &Path {
        match &self.store {
            Store::Staged(staged) => staged.path(),
            Store::Shared(path) => path,
        }
    }

    fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.path().join(diff_id.hex()).join(LAYER)
    }

    /// Stores a layer, and unpacks it if there is a tree.
    fn write(
        &self,
        index: usize,
        stream: &mut LayerStream,
        progress: &ByteCount,
        durable: bool,
    ) -> Result<BlobSummary, Error> {
        let file = LayerFile::create(self.path())?;
        let Some(tree) = &self.tree else {
            let summary = file.fill(stream, progress)?;
            file.publish(&summary, durable)?;
            return Ok(summary);
        };
        let written = tree.merged.write(index, stream, Keep::File(file.file.file()), progress)?;
        file.publish(&written, durable)?;
        tree.merged.arrived(index, Content::Stays(self.layer(&written.digest)))?;
        Ok(written)
    }
}

impl DirOutput {
    /// Writes to the directory at `path`.
    pub fn new(path: impl Into<PathBuf>, options: DirOptions) -> Self {
        Self { path: path.into(), options, place: Mutex::new(None) }
    }

    fn place(&self) -> std::sync::MutexGuard<'_, Option<Arc<Place>>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begun(&self) -> Arc<Place> {
        Arc::clone(self.place().as_ref().expect("begin ran before any layer"))
    }
}

impl Drop for DirOutput {
    /// A run that failed may have threads that have yet to notice; what they write is to be removed before the process ends.
    fn drop(&mut self) {
        if let Some(place) = self.place().take() {
            if let Some(tree) = &place.tree {
                tree.merged.cancel();
            }
            wait_for_others(&place);
        }
    }
}

#[async_trait::async_trait]
impl super::ImageOutput for DirOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Tar
    }

    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error> {
        refuse_artifact(image, format!("dir://{}", self.path.display()))?;
        let (path, options) = (self.path.clone(), self.options.clone());
        let (name, order) = (name_of(image), Order::of(image, expected));
        let place = blocking(move || Place::open(&path, &options, &name, order)).await?;
        *self.place() = Some(Arc::new(place));
        Ok(())
    }

    async fn known_layer(&self, layer: &Layer, chain: &FilterChain) -> Result<Option<WrittenLayer>, Error> {
        if !self.options.unique_names {
            return Ok(None);
        }
        let (place, verify) = (self.begun(), self.options.verify);
        let (layer, chain) = (layer.clone(), chain.clone());
        blocking(move || {
            let entry = Entry::find(place.path(), &layer, &chain);
            let Some(entry) = entry.filter(|entry| is_whole(place.path(), entry, verify)) else {
                return Ok(None);
            };
            if let Some(tree) = &place.tree {
                tree.merged.arrived(layer.index, Content::Stays(place.layer(&entry.diff_id)))?;
            }
            Ok(Some(entry.into_written(layer.index)))
        })
        .await
    }

    async fn write_layer(
        &self,
        index: usize,
        mut stream: LayerStream,
        _format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        let (place, durable) = (self.begun(), self.options.unique_names);
        let progress = progress.clone();
        thread::run("write", move || {
            let BlobSummary { digest, size } = place.write(index, &mut stream, &progress, durable)?;
            Ok(StoredLayer::Written { digest, size, format: Format::None })
        })
        .await?
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let place = self.place().take().expect("begin ran before finalize");
        let place = Arc::into_inner(place).expect("every layer is written before the image is finalized");
        let replace = self.options.force;
        let names = Names::of(&finished);
        let layers: Vec<_> =
            finished.image.layers.iter().cloned().zip(finished.layers.iter().cloned()).collect();
        let chain = finished.chain.clone();
        blocking(move || {
            let Place { store, tree } = place;
            if let Some(tree) = &tree {
                report(tree.merged.finish()?);
            }
            match store {
                Store::Staged(staged) => names.write_plain(staged, replace)?,
                Store::Shared(directory) => {
                    for (layer, written) in &layers {
                        Entry::note(&directory, layer, &chain, written)?;
                    }
                    names.write_shared(&directory, tree.and_then(|tree| tree.staged))?;
                }
            }
            Ok::<_, Error>(())
        })
        .await?;
        Ok(Receipt { destination: format!("dir://{}", self.path.display()), ..Receipt::default() })
    }
}

/// The image's name and tag, as the catalog has them.
fn name_of(image: &Image) -> (String, String) {
    let by_digest = || image.manifest.as_ref().map(|manifest| manifest.digest.to_string());
    let tag = image.name.tag.clone().or_else(by_digest).unwrap_or_else(|| "latest".to_owned());
    (image.name.repository.clone(), tag)
}

/// What stands in the documents of an image.
struct Names {
    image: String,
    tag: String,
    repo_tags: Vec<String>,
    config: bytes::Bytes,
    layers: Vec<String>,
}

impl Names {
    fn of(finished: &FinishedImage<'_>) -> Self {
        let image = finished.image;
        let mut repo_tags: Vec<String> = image.name.tag.iter().map(|_| image.name.to_string()).collect();
        repo_tags.extend(image.aliases.iter().cloned());
        let layers = finished.layers.iter().map(|layer| match &layer.stored {
            StoredLayer::Written { digest, .. } => format!("{}/{LAYER}", digest.hex()),
            StoredLayer::Original => unreachable!("a directory takes layers as plain tars"),
        });
        let (image, tag) = name_of(image);
        Self { image, tag, repo_tags, config: finished.config.clone(), layers: layers.collect() }
    }

    fn config_name(&self) -> String {
        format!("{}.json", Digest::sha256(&self.config).hex())
    }

    fn manifest(&self) -> serde_json::Value {
        serde_json::json!([{
            "Config": self.config_name(),
            "Layers": self.layers,
            "RepoTags": self.repo_tags,
        }])
    }

    /// Completes a directory of one image and puts it in its place.
    fn write_plain(&self, staged: StagedDir, replace: bool) -> Result<(), OutputError> {
        let write = |name: &str, bytes: &[u8]| {
            let path = staged.path().join(name);
            std::fs::write(&path, bytes).map_err(fail("write", &path))
        };
        write(&self.config_name(), &self.config)?;
        write("manifest.json", &to_json(&self.manifest()))?;
        write(CATALOG, &to_json(&serde_json::json!({ &self.image: { &self.tag: "manifest.json" } })))?;
        staged.publish(replace)
    }

    /// Adds an image to a shared directory that has its layers.
    fn write_shared(&self, directory: &Path, tree: Option<StagedDir>) -> Result<(), OutputError> {
        let write = |name: &str, bytes: &[u8]| {
            let path = directory.join(name);
            write_durably(&path, bytes).map_err(fail("write", &path))
        };
        write(&self.config_name(), &self.config)?;
        let catalog = Catalog::lock(directory)?;
        let version = tree.is_some().then(|| Digest::sha256(&self.config));
        let stem = catalog.manifest_name(&self.image, &self.tag, version.as_ref());
        let name = format!("{stem}.json");
        let mut manifest = self.manifest();
        manifest[0]["ImageName"] = self.image.as_str().into();
        if let Some(tree) = tree {
            tree.destined(directory.join(stem)).publish_tree()?;
        }
        write(&name, &to_json(&manifest))?;
        catalog.publish(&self.image, &self.tag, name)
    }
}

/// The name of a layer's file in its directory.
const LAYER: &str = "layer.tar";

/// A layer's file, which gets its name when it is whole.
struct LayerFile {
    file: UnnamedFile,
    directory: PathBuf,
}

impl LayerFile {
    fn create(directory: &Path) -> Result<Self, Error> {
        let file = new_layer(directory)?;
        Ok(Self { file, directory: directory.to_owned() })
    }

    fn fill(&self, stream: &mut LayerStream, progress: &ByteCount) -> Result<BlobSummary, Error> {
        let mut file = self.file.file();
        stream.blocking_store(progress, |bytes| {
            file.write_all(bytes).map_err(fail("write a layer to", &self.directory))?;
            Ok(())
        })
    }

    /// Names the file by what it holds; if it is to be durable, only once it is on the disk.
    fn publish(self, summary: &BlobSummary, durable: bool) -> Result<(), OutputError> {
        let directory = self.directory.join(summary.digest.hex());
        std::fs::create_dir_all(&directory).map_err(fail("create", &directory))?;
        let path = directory.join(LAYER);
        if durable {
            self.file.file().sync_data().map_err(fail("write", &path))?;
        }
        self.file.destined(path.clone()).publish(summary.size).map_err(fail("create", &path))?;
        if durable {
            for directory in [&directory, &self.directory] {
                let synced = File::open(directory).and_then(|directory| directory.sync_all());
                synced.map_err(fail("write", directory))?;
            }
        }
        Ok(())
    }
}

fn new_layer(directory: &Path) -> Result<UnnamedFile, OutputError> {
    UnnamedFile::create_in(directory, LAYER).map_err(fail("create a layer in", directory))
}

/// Prepares a directory that images share. One that is not empty has to look like ours, unless it is forced.
fn open_shared(path: &Path, force: bool) -> Result<(), OutputError> {
    std::fs::create_dir_all(path).map_err(fail("create", path))?;
    let is_ours = || [CATALOG, LOCK].iter().any(|name| path.join(name).exists());
    let is_empty = std::fs::read_dir(path).map_err(fail("read", path))?.next().is_none();
    if !is_empty && !is_ours() && !force {
        return Err(OutputError::Taken { path: path.to_owned() });
    }
    // One that cannot be written to is told of now, and what killed runs left goes.
    drop(new_layer(path)?);
    // From here on others see that it is ours.
    let lock = path.join(LOCK);
    File::options().create(true).append(true).open(&lock).map_err(fail("create", &lock))?;
    Ok(())
}

/// Whether the layer that an entry tells of is there.
fn is_whole(directory: &Path, entry: &Entry, verify: bool) -> bool {
    let path = directory.join(entry.diff_id.hex()).join(LAYER);
    let Ok(file) = File::open(&path) else { return false };
    if file.metadata().map(|metadata| metadata.len()).ok() != Some(entry.size) {
        return false;
    }
    let whole = !verify || hash(&file, entry.size).is_ok_and(|digest| digest == entry.diff_id);
    if !whole {
        tracing::warn!("{} is not what its name says; fetching the layer again", path.display());
    }
    whole
}

fn hash(file: &File, size: u64) -> std::io::Result<Digest> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut buffer = vec![0; crate::blob::CHUNK];
    while hasher.size() < size {
        match file.read_at(&mut buffer, hasher.size())? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    Ok(hasher.finish())
}
