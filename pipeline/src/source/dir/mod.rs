//! `dir://PATH`: an image out of a directory, as [`output::dir`](crate::output::dir) and the Python tool write it, or as a saved
//! tar is when it was unpacked.
//!
//! `catalog.json` leads from an image and its tag to a manifest; a directory without one has a `manifest.json` alone.
//! [`members`] opens what these name and nothing else; [`manifest_json`](super::manifest_json) reads what they say. Layers are
//! plain tars here: what they were compressed with is gone, as it is in a saved tar.

mod members;
mod python_config;

use std::collections::BTreeMap;
use std::path::PathBuf;

use self::members::DirMembers;
use super::SourceKind;
use super::manifest_json::{
    FORM, MANIFEST, MemberError, Members, SavedImageError, SavedImages, Wanted, same_name,
};
use crate::digest::Digest;
use crate::element::{Image, ImageName};
use crate::error::Error;
use crate::manifest::MAX_DOCUMENT;
use crate::output::dir::catalog::CATALOG;

/// This source's line in the table.
pub const KIND: SourceKind = SourceKind {
    scheme: "dir",
    syntax: "dir://PATH[?image=NAME&tag=TAG]",
    about: "a directory that dir:// wrote; image= and tag= choose, where images share it",
    options: &["image", "tag"],
};

/// Which image of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirImage {
    /// Its name without the tag.
    pub name: String,
    /// Its tag. None where the image has one only.
    pub tag: Option<String>,
}

impl DirImage {
    /// From `?image=` and `?tag=`. The first may hold what the second says: `NAME:TAG`, `NAME@DIGEST`.
    pub fn new(image: &str, tag: Option<&str>) -> Self {
        if let Some(tag) = tag {
            return Self { name: image.to_owned(), tag: Some(tag.to_owned()) };
        }
        if let Some((name, digest)) = image.split_once('@') {
            return Self { name: name.to_owned(), tag: Some(digest.to_owned()) };
        }
        let ImageName { repository, tag } = ImageName::of_tagged(image);
        Self { name: repository, tag }
    }
}

impl std::fmt::Display for DirImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.tag {
            Some(tag) if is_digest(tag) => write!(f, "{}@{tag}", self.name),
            Some(tag) => write!(f, "{}:{tag}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// A directory of images.
#[derive(Clone, Debug)]
pub struct DirSource {
    path: PathBuf,
    image: Option<DirImage>,
}

impl DirSource {
    /// The image of that name, or the only one, in the directory at `path`.
    pub fn new(path: impl Into<PathBuf>, image: Option<DirImage>) -> Self {
        Self { path: path.into(), image }
    }

    fn path(&self) -> String {
        self.path.display().to_string()
    }

    fn find(&self) -> Result<Image, Error> {
        match self.find_once() {
            // Since the catalog was read, a writer may have replaced the image, and removed what it was before.
            Err(Error::SavedImage(SavedImageError::Missing { document, .. })) if document == CATALOG => {
                self.find_once()
            }
            found => found,
        }
    }

    fn find_once(&self) -> Result<Image, Error> {
        let members = DirMembers::open(&self.path)
            .map_err(|source| SavedImageError::Io { path: self.path(), source })?;
        let Some(entries) = self.catalog(&members)? else {
            let wanted = self.image.as_ref().map(ToString::to_string);
            let wanted = Wanted { image: wanted.as_deref(), ..Wanted::default() };
            return self.images(MANIFEST, FORM, &members).find(wanted);
        };
        let (entry, manifest) = self.choose(&entries)?;
        let image = self.images(&manifest, CATALOG, &members).find(Wanted::default())?;
        Ok(self.named(image, &entry, &manifest)?)
    }

    fn images<'a>(&self, document: &'a str, named_by: &'a str, members: &'a DirMembers) -> SavedImages<'a> {
        let stem = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        SavedImages { path: self.path(), stem, document, named_by, members }
    }

    /// The catalog's lines, where there is a catalog: an image, and the name of its manifest.
    fn catalog(&self, members: &DirMembers) -> Result<Option<Vec<(DirImage, String)>>, SavedImageError> {
        let region = match members.get(CATALOG) {
            Err(MemberError::Missing) => return Ok(None),
            region => region.map_err(|error| error.into_saved_image_error(&self.path(), FORM, CATALOG))?,
        };
        let bytes = region
            .read_small(MAX_DOCUMENT as u64)
            .map_err(|source| SavedImageError::Io { path: self.path(), source })?;
        let catalog: BTreeMap<String, BTreeMap<String, String>> =
            serde_json::from_slice(&bytes).map_err(|error| self.bad_catalog(error.to_string()))?;
        let lines = catalog.into_iter().flat_map(|(name, tags)| {
            let line = move |(tag, manifest)| (DirImage { name: name.clone(), tag: Some(tag) }, manifest);
            tags.into_iter().map(line)
        });
        Ok(Some(lines.collect()))
    }

    fn bad_catalog(&self, reason: String) -> SavedImageError {
        SavedImageError::BadDocument { path: self.path(), document: CATALOG.to_owned(), reason }
    }

    /// The line that is wanted; that of another way to write the same name, where none has the very name.
    fn choose(&self, lines: &[(DirImage, String)]) -> Result<(DirImage, String), SavedImageError> {
        let (names, wanted) = (lines.iter().map(|(image, _)| image.to_string()).collect(), &self.image);
        let fits = |image: &DirImage, same: fn(&str, &str) -> bool| match wanted {
            None => true,
            Some(wanted) => {
                same(&image.name, &wanted.name) && (wanted.tag.is_none() || wanted.tag == image.tag)
            }
        };
        let mut found: Vec<_> =
            lines.iter().filter(|(image, _)| fits(image, |one, other| one == other)).collect();
        if found.is_empty() {
            found = lines.iter().filter(|(image, _)| fits(image, same_name)).collect();
        }
        match found[..] {
            [line] => Ok(line.clone()),
            _ => Err(SavedImageError::WhichImage {
                path: self.path(),
                wanted: wanted.as_ref().map(ToString::to_string),
                images: names,
            }),
        }
    }

    /// The image under the catalog's name, which is fuller than the manifest's where the Python tool wrote both.
    ///
    /// That tool lets several images write into one plain directory, where the last one's manifest replaces all others, and
    /// the catalog still tells of these.
    fn named(&self, image: Image, entry: &DirImage, manifest: &str) -> Result<Image, SavedImageError> {
        let own = image.name.tag.iter().map(|_| image.name.to_string());
        let names: Vec<String> = own.chain(image.aliases.iter().cloned()).collect();
        let tag = entry.tag.clone().filter(|tag| !names.is_empty() && !is_digest(tag));
        let name = ImageName { repository: entry.name.clone(), tag };
        let full = name.to_string();
        let short = full.rsplit('/').next().unwrap_or_default();
        if !names.is_empty()
            && name.tag.is_some()
            && !names.iter().any(|other| *other == full || other == short)
        {
            let names = names.join(", ");
            return Err(self.bad_catalog(format!("says that {entry} is in {manifest}, which is of {names}")));
        }
        let aliases = names.into_iter().filter(|other| *other != full && other != short).collect();
        Ok(Image { name, aliases, ..image })
    }
}

fn is_digest(tag: &str) -> bool {
    tag.parse::<Digest>().is_ok()
}

#[async_trait::async_trait]
impl super::ImageSource for DirSource {
    async fn image(&self) -> Result<Image, Error> {
        let source = self.clone();
        tokio::task::spawn_blocking(move || source.find()).await.expect("reading a directory does not panic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<(DirImage, String)> {
        let line =
            |name: &str, tag: &str, manifest: &str| (DirImage::new(name, Some(tag)), manifest.to_owned());
        vec![
            line("busybox", "1", "a"),
            line("docker.io/library/busybox", "1", "b"),
            line("localhost:5000/app", "1", "c"),
            line("localhost:5000/app", "2", "d"),
            line("library/nginx", "1", "e"),
        ]
    }

    fn chosen(image: &str, tag: Option<&str>) -> Option<String> {
        let source = DirSource::new("/x", Some(DirImage::new(image, tag)));
        source.choose(&lines()).ok().map(|(_, manifest)| manifest)
    }

    #[test]
    fn the_very_name_wins_and_then_any_way_to_write_it() {
        assert_eq!(chosen("busybox:1", None).as_deref(), Some("a"));
        assert_eq!(chosen("docker.io/library/busybox", None).as_deref(), Some("b"));
        assert_eq!(chosen("index.docker.io/library/nginx", Some("1")).as_deref(), Some("e"));
        assert_eq!(chosen("localhost:5000/app", Some("2")).as_deref(), Some("d"));
        assert_eq!(chosen("localhost:5000/app:1", None).as_deref(), Some("c"));
        for (image, tag) in [("localhost:5000/app", None), ("app", Some("1")), ("busybox", Some("2"))] {
            assert_eq!(chosen(image, tag), None, "{image} {tag:?}");
        }
        assert!(DirSource::new("/x", None).choose(&lines()).is_err(), "there are several");
        assert!(DirSource::new("/x", None).choose(&lines()[..1]).is_ok());
    }

    #[test]
    fn an_image_by_digest_is_written_as_it_is_listed() {
        let digest = Digest::sha256(b"").to_string();
        let image = DirImage::new("a/b", Some(&digest));
        assert_eq!(DirImage::new(&image.to_string(), None), image);
    }
}
