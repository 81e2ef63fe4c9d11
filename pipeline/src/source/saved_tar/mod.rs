//! `tar://PATH`: an image out of a saved tar, in every form that `docker save`, `podman save` and their kin write.
//!
//! All of them have a `manifest.json` that names a config and layers (docker's v1.2); Docker 25 and later put these under
//! `blobs/sha256/`, and a save from containerd's store keeps the layers compressed and the registry's own manifest beside
//! them. [`contents`] finds the members; [`manifest_json`](super::manifest_json) reads what they say.

pub(super) mod contents;

use std::path::{Path, PathBuf};

pub(super) use self::contents::clean;
use self::contents::{Contents, ContentsError};
use super::SourceKind;
use super::manifest_json::{FORM, MANIFEST, MemberError, Members, SavedImageError, SavedImages, Wanted};
use crate::digest::Digest;
use crate::element::Image;
use crate::error::Error;
use crate::spool::{FileRegion, SpoolDir};
use crate::thread;

/// This source's line in the table.
pub const KIND: SourceKind = SourceKind {
    scheme: "tar",
    syntax: "tar://PATH[?image=NAME:TAG]",
    about: "a saved tar, plain or compressed; tar://- is standard input",
    options: &["image"],
};

/// A saved tar.
#[derive(Debug)]
pub struct SavedTarSource {
    path: PathBuf,
    image: Option<String>,
    spools: SpoolDir,
}

/// The image with these diff_ids out of a saved tar that comes in a stream and is kept in `spools`; `name` is for messages.
pub(super) async fn from_stream(
    stream: impl tokio::io::AsyncRead + Send + Unpin + 'static,
    name: &str,
    diff_ids: &[Digest],
    spools: SpoolDir,
) -> Result<Image, Error> {
    let contents = Contents::read(stream, name, &spools).await.map_err(|error| fail(error, name))?;
    let (path, diff_ids) = (name.to_owned(), diff_ids.to_vec());
    thread::run("find", move || {
        let wanted = Wanted { diff_ids: Some(&diff_ids), ..Wanted::default() };
        find(Path::new(&path), &path, &contents, wanted)
    })
    .await?
}

impl SavedTarSource {
    /// The image called `image`, or the only one, of the tar at `path`, or of standard input when that is `-`. What cannot
    /// be read twice from where it is (a pipe, a compressed file) is kept in `spools`.
    pub fn new(path: impl Into<PathBuf>, image: Option<String>, spools: SpoolDir) -> Self {
        Self { path: path.into(), image, spools }
    }

    fn path(&self) -> String {
        if self.path.as_os_str() == "-" {
            "standard input".to_owned()
        } else {
            self.path.display().to_string()
        }
    }
}

#[async_trait::async_trait]
impl super::ImageSource for SavedTarSource {
    async fn image(&self) -> Result<Image, Error> {
        let path = self.path();
        let contents = Contents::open(&self.path, &self.spools).await.map_err(|error| fail(error, &path))?;
        let (file, image) = (self.path.clone(), self.image.clone());
        // Layers whose names are not their digests are hashed.
        thread::run("find", move || {
            find(&file, &path, &contents, Wanted { image: image.as_deref(), ..Wanted::default() })
        })
        .await?
    }
}

fn find(path: &Path, name: &str, contents: &Contents, wanted: Wanted<'_>) -> Result<Image, Error> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let stem = if stem == "-" { "stdin".to_owned() } else { stem.into_owned() };
    SavedImages { path: name.to_owned(), stem, document: MANIFEST, named_by: FORM, members: contents }
        .find(wanted)
}

fn fail(error: ContentsError, path: &str) -> SavedImageError {
    error.into_saved_image_error(path.to_owned())
}

impl Members for Contents {
    fn get(&self, name: &str) -> Result<FileRegion, MemberError> {
        self.region(name).ok_or(MemberError::Missing)
    }
}
