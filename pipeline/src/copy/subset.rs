//! Some platforms of an index: which of its entries that are, and an index of these alone.

use std::collections::HashMap;
use std::slice;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::signatures::Change;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{Error, MAX_INDEX_DEPTH};
use crate::manifest::{self, Descriptor, ImageManifest, Index, ParsedManifest, media_type};
use crate::platform::{self, Platform};
use crate::registry::FetchedManifest;
use crate::source::stored::{SourceIndex, Store, parse, read_document};

/// The annotation by which an entry says that it is an attestation of another one, as buildkit writes it.
pub(crate) const ATTESTED: &str = "vnd.docker.reference.digest";

/// Indexes that are made here, in the place of larger ones.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// By their digests.
    pub(super) indexes: HashMap<Digest, FetchedManifest>,
    /// What each was made of.
    pub(super) changes: Vec<Change>,
}

impl Made {
    fn add(&mut self, source: &Digest, made: &FetchedManifest) {
        self.indexes.insert(made.digest.clone(), made.clone());
        let became = Descriptor::new(&made.media_type, &made.digest, made.bytes.len() as u64);
        let change = Change { source: source.clone(), became };
        if !self.changes.contains(&change) {
            self.changes.push(change);
        }
    }
}

/// An entry that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    /// Its place in the index.
    pub(super) position: usize,
    /// The platforms that it is wanted for, where it is an index of its own. None: all.
    pub(super) platforms: Vec<Platform>,
}

/// The entries for some platforms, with their attestations; all, where no platform is named.
pub(super) async fn choose(
    store: &dyn Store,
    index: &Index,
    platforms: &[Platform],
) -> Result<Vec<Chosen>, Error> {
    let entries = &index.manifests;
    let mut wanted: Vec<Option<Vec<Platform>>> = vec![None; entries.len()];
    if platforms.is_empty() {
        wanted.fill(Some(Vec::new()));
    }
    for platform in platforms {
        let entry = platform::select(entries, platform)?;
        if entry.platform.is_none() && !is_index(entry) {
            let fetched = store.manifest(entry).await?;
            if let Ok(ParsedManifest::Image(image)) =
                manifest::parse(&fetched.bytes, Some(&fetched.media_type))
            {
                confirm(store, &image, slice::from_ref(platform)).await?;
            }
        }
        // An entry may stand twice. Both are the same.
        for (position, other) in entries.iter().enumerate() {
            if other.digest == entry.digest && other.platform == entry.platform {
                wanted[position].get_or_insert_default().push(platform.clone());
            }
        }
    }
    let attests = |entry: &Descriptor| {
        let attested = entry.annotations.get(ATTESTED)?.parse::<Digest>().ok()?;
        entries.iter().position(|other| other.digest == attested)
    };
    for position in 0..entries.len() {
        if let (None, Some(attested)) = (&wanted[position], attests(&entries[position]))
            && wanted[attested].is_some()
        {
            wanted[position] = Some(Vec::new());
        }
    }
    let chosen = wanted.into_iter().enumerate();
    Ok(chosen.filter_map(|(position, platforms)| Some(Chosen { position, platforms: platforms? })).collect())
}

/// Whether an image that stands alone, or in an index that does not say it, is for one of some platforms: its config has the word.
pub(crate) async fn confirm(
    store: &dyn Store,
    image: &ImageManifest,
    wanted: &[Platform],
) -> Result<(), Error> {
    let config = match image.is_artifact() {
        true => None,
        false => {
            let blob = store.blob(&image.config.digest, Some(image.config.size))?;
            let bytes = read_document(&blob, image.config.size).await?;
            ImageConfig::parse(&bytes).ok()
        }
    };
    Ok(platform::confirm(wanted, config.as_ref())?)
}

/// An index of some of another's platforms: the entries as they are, in their order, and everything else that it says. An index
/// within is reduced likewise, and goes into `made`.
pub(super) fn reduce<'a>(
    store: &'a dyn Store,
    fetched: &'a FetchedManifest,
    index: &'a Index,
    platforms: &'a [Platform],
    depth: usize,
    made: &'a mut Made,
) -> BoxFuture<'a, Result<FetchedManifest, Error>> {
    async move {
        if depth > MAX_INDEX_DEPTH {
            return Err(Error::IndexDepth(store.shown()));
        }
        let mut entries = Vec::new();
        for Chosen { position, platforms } in choose(store, index, platforms).await? {
            let entry = &index.manifests[position];
            let mut raw = entry.raw().clone();
            if is_index(entry) && !platforms.is_empty() {
                let inner = store.manifest(entry).await?;
                let reduced = match parse(store, &inner)? {
                    ParsedManifest::Index(index) => {
                        reduce(store, &inner, &index, &platforms, depth + 1, made).await?
                    }
                    ParsedManifest::Image(_) | ParsedManifest::Schema1(_) => inner,
                };
                if reduced.digest != entry.digest {
                    raw.insert("digest".to_owned(), reduced.digest.to_string().into());
                    raw.insert("size".to_owned(), reduced.bytes.len().into());
                    // An inline copy would be of the larger one.
                    raw.shift_remove("data");
                }
            }
            entries.push(serde_json::Value::Object(raw));
        }
        let mut document = index.raw().clone();
        if document.get("manifests").and_then(|all| all.as_array()) == Some(&entries) {
            return Ok(fetched.clone());
        }
        document.insert("manifests".to_owned(), entries.into());
        let bytes = manifest::to_bytes(&document);
        let media_type = index.family.index().to_owned();
        let reduced = FetchedManifest { digest: Digest::sha256(&bytes), bytes, media_type };
        made.add(&fetched.digest, &reduced);
        Ok(reduced)
    }
    .boxed()
}

/// The same, of an index that is made anew in any case: it says what is in it, and is still known as the whole one that it was.
pub(crate) async fn of_platforms(
    store: &dyn Store,
    index: SourceIndex,
    platforms: &[Platform],
) -> Result<SourceIndex, Error> {
    let mut made = Made::default();
    let reduced = reduce(store, &index.manifest, &index.parsed, platforms, 0, &mut made).await?;
    match parse(store, &reduced)? {
        // One within that was reduced is nowhere to be read.
        ParsedManifest::Index(parsed) if made.indexes.keys().all(|digest| *digest == reduced.digest) => {
            Ok(SourceIndex { parsed, ..index })
        }
        _ => Err(Error::NestedSubset(store.shown())),
    }
}

fn is_index(entry: &Descriptor) -> bool {
    [media_type::OCI_INDEX, media_type::DOCKER_MANIFEST_LIST].contains(&entry.media_type.as_str())
}
