//! `oci-layout://PATH`: an image in an OCI image layout, a directory or a tar of one.
//!
//! A tar is not unpacked: its members are found where they lie, as those of a saved tar ([`super::saved_tar`]). Every
//! document and blob is read against the digest that names it, `index.json` alone excepted, which nothing names.

mod audit;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt;
use tokio::sync::OnceCell;

use super::saved_tar::contents::{Contents, ContentsError};
use super::stored::{self, SourceIndex, Store, read_document};
use super::{ImageSource, SourceKind};
use crate::blob::{Blob, BlobError, BlobRef, ByteStream};
use crate::check::Finding;
use crate::digest::Digest;
use crate::element::{Image, ImageName};
use crate::error::Error;
use crate::layout::{Choice, Chosen, INDEX, MARKER, blob_path, names};
use crate::manifest::{self, Descriptor, Index, MAX_DOCUMENT, ParsedManifest, media_type};
use crate::platform::PlatformChoice;
use crate::reference::Tag;
use crate::registry::{FetchedManifest, fallback_tag};
use crate::spool::{FileRegion, SpoolDir};

/// This source's line in the table.
pub const KIND: SourceKind = SourceKind {
    scheme: "oci-layout",
    syntax: "oci-layout://PATH[?tag=TAG]",
    about: "an OCI image layout, a directory or a tar of one",
    options: &["tag", "digest", "os", "arch", "variant", "max_workers"],
};

/// Manifests that are read at once, where who has them may be far.
const DOCUMENTS_AT_ONCE: usize = 8;

/// Why a layout could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The operating system said no.
    #[error("failed to read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Its answer.
        source: io::Error,
    },
    /// It is something else.
    #[error("{path} is not an OCI image layout: {reason}")]
    NotALayout {
        /// The directory or tar.
        path: String,
        /// Why not.
        reason: String,
    },
    /// There are several images, or none by the given name.
    #[error("{path} holds {}: choose one with ?tag= or ?digest={}", .images.join(", "), wanted(.choice))]
    WhichImage {
        /// The directory or tar.
        path: String,
        /// What was asked for.
        choice: Choice,
        /// What there is.
        images: Vec<String>,
    },
}

impl LayoutError {
    /// Whether the machine failed, rather than the layout's content.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io { .. })
    }

    /// Whether the request fits no image that there is.
    pub fn is_choice(&self) -> bool {
        matches!(self, Self::WhichImage { .. })
    }
}

fn wanted(choice: &Choice) -> String {
    match (&choice.digest, &choice.tag) {
        (Some(digest), _) => format!(" ({digest} is none of them)"),
        (None, Some(tag)) => format!(" ({tag:?} does not name exactly one of them)"),
        (None, None) => String::new(),
    }
}

/// An image in a layout.
#[derive(Clone, Debug)]
pub struct LayoutSource {
    path: PathBuf,
    choice: Choice,
    platform: PlatformChoice,
    files: Whose,
    opened: Arc<OnceCell<Opened>>,
    /// An entry of an index inside, in the place of what `choice` means.
    entry: Option<Descriptor>,
}

/// Who has the files.
#[derive(Clone, Debug)]
enum Whose {
    /// This machine. What cannot be read twice from where it is goes there.
    Ours(SpoolDir),
    /// Somebody who lends them.
    Lent(Arc<dyn Lent>),
}

/// The files of a layout that somebody else has.
#[async_trait::async_trait]
pub trait Lent: std::fmt::Debug + Send + Sync {
    /// `index.json`, of what was found to be a layout of a version that is known here.
    async fn index(&self) -> Result<bytes::Bytes, Error>;

    /// A blob, which may turn out not to be there when it is opened. Whoever reads it checks its digest.
    fn blob(&self, digest: &Digest, size: Option<u64>) -> BlobRef;
}

/// A layout that has been looked into.
#[derive(Debug)]
struct Opened {
    files: Files,
    /// `index.json`, byte for byte.
    bytes: bytes::Bytes,
    index: Index,
    /// What `index.json` names and has a subject, by that.
    by_subject: OnceCell<HashMap<Digest, Vec<Descriptor>>>,
}

#[derive(Debug)]
enum Files {
    Directory(PathBuf),
    Tar(Contents),
    Lent(Arc<dyn Lent>),
}

impl LayoutSource {
    /// The image that `choice` means in the layout at `path`, in the variant for `platform` if that is an index. A path of `-`
    /// is a tar on standard input; what cannot be read twice from where it is goes into `spools`.
    pub fn new(path: impl Into<PathBuf>, choice: Choice, platform: PlatformChoice, spools: SpoolDir) -> Self {
        let files = Whose::Ours(spools);
        Self { path: path.into(), choice, platform, files, opened: Arc::default(), entry: None }
    }

    /// The same in a layout that somebody else has, and calls `path`.
    pub fn lent(lent: Arc<dyn Lent>, path: PathBuf, choice: Choice, platform: PlatformChoice) -> Self {
        Self { path, choice, platform, files: Whose::Lent(lent), opened: Arc::default(), entry: None }
    }

    /// How messages call the layout, and which of its images is meant.
    pub(crate) fn called(&self) -> (&Path, &Choice) {
        (&self.path, &self.choice)
    }

    /// In which variant an image is wanted.
    pub fn platform(&self) -> &PlatformChoice {
        &self.platform
    }

    /// `index.json`, byte for byte.
    pub(crate) async fn index_bytes(&self) -> Result<bytes::Bytes, Error> {
        Ok(self.opened().await?.bytes.clone())
    }

    /// A blob of the layout, whatever names it.
    pub(crate) async fn any_blob(&self, digest: &Digest, size: Option<u64>) -> Result<BlobRef, Error> {
        self.found(self.opened().await?, digest, size)
    }

    fn path(&self) -> String {
        if self.path == Path::new("-") {
            "standard input".to_owned()
        } else {
            self.path.display().to_string()
        }
    }

    fn not_a_layout(&self, reason: impl Into<String>) -> Error {
        LayoutError::NotALayout { path: self.path(), reason: reason.into() }.into()
    }

    /// What its images are called; those without a name by their digests.
    pub async fn names(&self) -> Result<Vec<String>, Error> {
        let entries = self.opened().await?.index.manifests.iter();
        let name = |entry: &Descriptor| match names(entry).next() {
            Some(name) => name.to_owned(),
            None => entry.digest.to_string(),
        };
        Ok(entries.map(name).collect())
    }

    /// The entries of `index.json`.
    pub(crate) async fn entries(&self) -> Result<&[Descriptor], Error> {
        Ok(&self.opened().await?.index.manifests)
    }

    /// Another image of the same layout, which is opened once for all.
    pub(crate) fn at(&self, choice: Choice) -> Self {
        Self { choice, entry: None, ..self.clone() }
    }

    /// What an index in it names.
    pub(crate) fn within(&self, entry: &Descriptor) -> Self {
        // Whatever platform it is for.
        Self { entry: Some(entry.clone()), platform: PlatformChoice::default(), ..self.clone() }
    }

    async fn opened(&self) -> Result<&Opened, Error> {
        self.opened.get_or_try_init(|| self.open()).await
    }

    async fn open(&self) -> Result<Opened, Error> {
        match &self.files {
            Whose::Ours(spools) => self.open_ours(spools).await,
            Whose::Lent(lent) => self.looked_into(Files::Lent(Arc::clone(lent)), lent.index().await?),
        }
    }

    async fn open_ours(&self, spools: &SpoolDir) -> Result<Opened, Error> {
        let is_directory = tokio::fs::metadata(&self.path).await.is_ok_and(|metadata| metadata.is_dir());
        let files = if is_directory {
            Files::Directory(self.path.clone())
        } else {
            let contents = Contents::open(&self.path, spools).await;
            Files::Tar(contents.map_err(|error| self.contents_error(error))?)
        };
        let marker = self.small(&files, MARKER).await?;
        let marker: serde_json::Value = serde_json::from_slice(&marker)
            .map_err(|error| self.not_a_layout(format!("{MARKER}: {error}")))?;
        let version = marker.get("imageLayoutVersion").and_then(serde_json::Value::as_str);
        if !version.is_some_and(|version| version.starts_with("1.")) {
            return Err(self.not_a_layout(format!("{MARKER} does not say version 1")));
        }
        let bytes = self.small(&files, INDEX).await?;
        self.looked_into(files, bytes.into())
    }

    fn looked_into(&self, files: Files, bytes: bytes::Bytes) -> Result<Opened, Error> {
        let parsed = manifest::parse(&bytes, Some(media_type::OCI_INDEX));
        match parsed.map_err(|error| self.not_a_layout(format!("{INDEX}: {error}")))? {
            ParsedManifest::Index(index) => Ok(Opened { files, bytes, index, by_subject: OnceCell::new() }),
            _ => Err(self.not_a_layout(format!("{INDEX} is not an index"))),
        }
    }

    fn contents_error(&self, error: ContentsError) -> Error {
        match error {
            ContentsError::Io(source) => LayoutError::Io { path: self.path(), source }.into(),
            ContentsError::Tar(reason) => self.not_a_layout(reason),
        }
    }

    /// The whole of one of the documents that nothing gives a digest for.
    async fn small(&self, files: &Files, name: &str) -> Result<Vec<u8>, Error> {
        let missing = || self.not_a_layout(format!("it has no {name}"));
        let (blob, size): (BlobRef, _) = match files {
            Files::Directory(path) => {
                let path = path.join(name);
                let file = PathBlob { path: path.clone(), digest: None, size: None };
                let (file, size) = match tokio::task::spawn_blocking(move || file.region()).await {
                    Ok(Ok(region)) => region,
                    Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
                    Ok(Err(source)) => {
                        return Err(LayoutError::Io { path: path.display().to_string(), source }.into());
                    }
                    Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
                };
                (Arc::new(file), size)
            }
            Files::Tar(contents) => {
                let region = contents.region(name).ok_or_else(missing)?;
                let size = region.size().unwrap_or(u64::MAX);
                (Arc::new(region), size)
            }
            // Who lends them has looked at these by himself.
            Files::Lent(_) => return Err(missing()),
        };
        if size > MAX_DOCUMENT as u64 {
            return Err(self.not_a_layout(format!("{name} has {size} bytes, more than {MAX_DOCUMENT}")));
        }
        read_document(&blob, size).await
    }

    fn found(&self, opened: &Opened, digest: &Digest, size: Option<u64>) -> Result<BlobRef, Error> {
        match &opened.files {
            Files::Directory(path) => Ok(Arc::new(PathBlob {
                path: path.join(blob_path(digest)),
                digest: Some(digest.clone()),
                size,
            })),
            Files::Tar(contents) => match contents.region(&blob_path(digest)) {
                Some(region) => match (region.size(), size) {
                    (Some(actual), Some(expected)) if actual != expected => {
                        Err(BlobError::Size { expected, actual }.into())
                    }
                    _ => Ok(Arc::new(region.verified(digest.clone()))),
                },
                None => Ok(Arc::new(Absent { path: self.path(), digest: digest.clone(), size })),
            },
            Files::Lent(lent) => Ok(lent.blob(digest, size)),
        }
    }

    fn which(&self, index: &Index) -> LayoutError {
        let label = |entry: &Descriptor| match names(entry).next() {
            Some(name) => name.chars().take(200).collect(),
            None => entry.digest.to_string(),
        };
        let images = match index.manifests.as_slice() {
            [] => vec!["no image".to_owned()],
            entries => entries.iter().map(label).collect(),
        };
        LayoutError::WhichImage { path: self.path(), choice: self.choice.clone(), images }
    }

    /// The entries of `index.json` by what they name as their subject.
    async fn read_subjects(&self, index: &Index) -> Result<HashMap<Digest, Vec<Descriptor>>, Error> {
        let mut by_subject: HashMap<_, Vec<_>> = HashMap::new();
        let manifests: Vec<_> = index.manifests.iter().map(|entry| self.manifest(entry)).collect();
        let mut manifests = futures_util::stream::iter(manifests).buffered(DOCUMENTS_AT_ONCE);
        for entry in &index.manifests {
            // What cannot be read is nobody's referrer; whoever wants it is told why it cannot.
            let Some(Ok(fetched)) = manifests.next().await else { continue };
            let Ok(parsed) = manifest::parse(&fetched.bytes, None) else { continue };
            if let Some(subject) = parsed.subject() {
                by_subject.entry(subject).or_default().push(entry.clone());
            }
        }
        Ok(by_subject)
    }

    fn stem(&self) -> String {
        match self.path.file_stem() {
            Some(stem) if stem != "-" => stem.to_string_lossy().into_owned(),
            _ => "image".to_owned(),
        }
    }
}

#[async_trait::async_trait]
impl Store for LayoutSource {
    fn shown(&self) -> String {
        match (&self.entry, &self.choice.tag, &self.choice.digest) {
            (Some(entry), ..) => format!("{}@{}", self.path(), entry.digest),
            (None, _, Some(digest)) => format!("{}@{digest}", self.path()),
            (None, Some(tag), None) => format!("{}:{tag}", self.path()),
            (None, None, None) => self.path(),
        }
    }

    fn name(&self) -> ImageName {
        let index = self.opened.get().map(|opened| &opened.index);
        let chosen = index.and_then(|index| self.choice.among(&index.manifests));
        let name = match chosen {
            Some(Chosen::Entry(entry)) => names(entry).next(),
            _ => None,
        };
        match name {
            Some(name) if name.contains([':', '/']) => ImageName::of_tagged(name),
            tag => ImageName { repository: self.stem(), tag: tag.map(str::to_owned) },
        }
    }

    async fn first(&self) -> Result<FetchedManifest, Error> {
        if let Some(entry) = &self.entry {
            return self.manifest(entry).await;
        }
        let opened = self.opened().await?;
        match self.choice.among(&opened.index.manifests) {
            Some(Chosen::Entry(entry)) => self.manifest(entry).await,
            Some(Chosen::All) => Ok(FetchedManifest {
                digest: Digest::sha256(&opened.bytes),
                bytes: opened.bytes.clone(),
                media_type: media_type::OCI_INDEX.to_owned(),
            }),
            None => Err(self.which(&opened.index).into()),
        }
    }

    async fn manifest(&self, entry: &Descriptor) -> Result<FetchedManifest, Error> {
        let blob = self.found(self.opened().await?, &entry.digest, Some(entry.size))?;
        let bytes = read_document(&blob, entry.size).await?;
        let (media_type, digest) = (entry.media_type.clone(), entry.digest.clone());
        Ok(FetchedManifest { bytes: bytes.into(), media_type, digest })
    }

    fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<BlobRef, Error> {
        let opened = self.opened.get().expect("a manifest has been read from it");
        self.found(opened, digest, size)
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        let entries = &self.opened().await?.index.manifests;
        match entries.iter().find(|entry| names(entry).any(|name| name == tag.as_str())) {
            Some(entry) => Ok(Some(self.manifest(entry).await?)),
            None => Ok(None),
        }
    }

    /// Those of an index under the subject's tag, as regctl and [`crate::copy`] keep them, and those that stand in `index.json`
    /// themselves, as oras writes them.
    async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        let mut found = Vec::new();
        if let Some(tagged) = self.tagged(&fallback_tag(subject)).await? {
            let parsed = manifest::parse(&tagged.bytes, Some(media_type::OCI_INDEX));
            match parsed.map_err(|error| self.not_a_layout(format!("{}: {error}", fallback_tag(subject))))? {
                ParsedManifest::Index(index) => found = index.manifests,
                _ => return Err(self.not_a_layout(format!("{} is not an index", fallback_tag(subject)))),
            }
        }
        let opened = self.opened().await?;
        let by_subject = opened.by_subject.get_or_try_init(|| self.read_subjects(&opened.index)).await?;
        for entry in by_subject.get(subject).into_iter().flatten() {
            if found.iter().all(|other| other.digest != entry.digest) {
                found.push(entry.clone());
            }
        }
        Ok(found)
    }
}

#[async_trait::async_trait]
impl ImageSource for LayoutSource {
    async fn image(&self) -> Result<Image, Error> {
        stored::image(self, &self.platform).await
    }

    async fn index(&self) -> Result<Option<SourceIndex>, Error> {
        stored::index(self).await
    }

    async fn audit(&self, deep: bool) -> Result<Vec<Finding>, Error> {
        self.audited(deep).await
    }

    fn entry(&self, entry: &Descriptor) -> Option<Box<dyn ImageSource>> {
        Some(Box::new(self.within(entry)))
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }
}

/// A file of a directory, opened when it is read.
#[derive(Clone, Debug)]
struct PathBlob {
    path: PathBuf,
    /// What it has to hash to.
    digest: Option<Digest>,
    size: Option<u64>,
}

impl PathBlob {
    fn region(&self) -> io::Result<(FileRegion, u64)> {
        // A pipe that lies in the place of a blob must not hold anybody up.
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(&self.path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
        }
        let (size, name) = (metadata.len(), self.path.display().to_string());
        let region = FileRegion::new(Arc::new(file), name, 0, size);
        let region = match &self.digest {
            Some(digest) => region.verified(digest.clone()),
            None => region,
        };
        Ok((region, size))
    }

    async fn opened(&self) -> Result<FileRegion, BlobError> {
        let blob = self.clone();
        let opened =
            tokio::task::spawn_blocking(move || blob.region()).await.expect("opening does not panic");
        let path = || self.path.display().to_string();
        let (region, actual) = opened.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => BlobError::Missing { what: path() },
            _ => BlobError::Io { what: format!("failed to open {}", path()), source },
        })?;
        match self.size {
            Some(expected) if expected != actual => Err(BlobError::Size { expected, actual }),
            _ => Ok(region),
        }
    }
}

#[async_trait::async_trait]
impl Blob for PathBlob {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        self.opened().await?.open().await
    }

    fn size(&self) -> Option<u64> {
        self.size
    }

    fn identity(&self) -> String {
        self.path.display().to_string()
    }

    async fn tail(&self) -> Option<[u8; 4]> {
        self.opened().await.ok()?.tail().await
    }
}

/// A blob that is named and not there: no harm until it is read.
#[derive(Clone, Debug)]
struct Absent {
    path: String,
    digest: Digest,
    size: Option<u64>,
}

#[async_trait::async_trait]
impl Blob for Absent {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        Err(BlobError::Missing { what: format!("{} of {}", blob_path(&self.digest), self.path) })
    }

    fn size(&self) -> Option<u64> {
        self.size
    }

    fn identity(&self) -> String {
        self.digest.to_string()
    }
}
