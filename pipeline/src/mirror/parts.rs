//! What an image consists of that passes filters, and how each part of it gets to a target: known before anything of it has passed, for the
//! price.
//!
//! What filters change is not known then: each image is taken to become another one of the same size, and what belongs to it to go along
//! as if it did not.

use std::collections::HashSet;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryStreamExt};

use super::ASKED_AT_ONCE;
use super::config::Mirror;
use super::filtered::MadeOf;
use crate::copy::signatures::{Belonging, Change, beside};
use crate::copy::subset::{confirm, of_platforms};
use crate::copy::{SignaturePolicy, in_copy};
use crate::digest::Digest;
use crate::error::{Error, MAX_INDEX_DEPTH, MAX_MANIFESTS};
use crate::index::is_attestation;
use crate::manifest::{Annotations, Descriptor, ImageManifest, Index, ParsedManifest};
use crate::named::described;
use crate::output::content::ContentOutput;
use crate::output::manifest::ManifestFormat;
use crate::platform;
use crate::provenance::{self, Recipe};
use crate::registry::FetchedManifest;
use crate::source::stored::{SourceIndex, Store, parse};

/// What an image consists of, with all that belongs to it.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// Manifests that are put.
    pub(super) manifests: usize,
    /// Foreign ones left out. One may stand several times.
    pub(super) blobs: Vec<Part>,
}

/// A blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) digest: Digest,
    /// In bytes.
    pub(super) size: u64,
    pub(super) passage: Passage,
}

/// How a blob gets to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passage {
    /// A layer, through the filters, once in the whole mirror.
    Filtered,
    /// A layer of an attestation or artifact, past them, likewise.
    AsItIs,
    /// The config of an image, which changes with its layers.
    FilteredConfig,
    /// That of an attestation or artifact.
    Config,
    /// Of a referrer, or what else belongs to a manifest.
    Beside,
    /// Of what is made here, and comes from nowhere.
    MadeHere,
}

impl Parts {
    /// What the manifest that a source is named for consists of, as an entry of the configuration wants it. `output` is a target, which is
    /// asked nothing.
    pub(super) async fn of(
        store: &dyn Store,
        mirror: &Mirror,
        output: &dyn ContentOutput,
    ) -> Result<Self, Error> {
        let root = store.first().await?;
        let mut walk = Walk { store, parts: Self::default(), seen: HashSet::new(), images: Vec::new() };
        let mut is_index = false;
        match parse(store, &root)? {
            ParsedManifest::Index(parsed) => {
                let index = SourceIndex { name: store.name(), manifest: root.clone(), parsed };
                let index = match &mirror.platforms[..] {
                    [] => index,
                    platforms => of_platforms(store, index, platforms).await?,
                };
                walk.entries(&index.parsed, 0).await?;
                is_index = true;
            }
            ParsedManifest::Image(image) if image.is_artifact() => {
                let media_type = image.config.media_type.clone();
                return Err(Error::NotAnImage { image: store.shown(), media_type });
            }
            ParsedManifest::Image(image) => {
                if !mirror.platforms.is_empty() {
                    confirm(store, &image, &mirror.platforms).await?;
                }
                walk.image(&root, &image, false);
            }
            // Its layers' sizes are nowhere to be read, and it has no manifest that a statement could name.
            ParsedManifest::Schema1(_) if mirror.provenance => return Err(Error::NoSourceManifest),
            ParsedManifest::Schema1(image) => {
                if !mirror.platforms.is_empty() {
                    platform::confirm(&mirror.platforms, Some(&image.config))?;
                }
            }
        }
        let Walk { mut parts, seen, images, .. } = walk;
        // The root's own, which an image by itself is.
        parts.manifests = seen.len() + 1;
        let mut statements = Vec::new();
        if mirror.provenance {
            let told: Vec<_> = images.iter().map(|(_, told)| told.clone()).collect();
            let annotations = MadeOf::wanted(mirror, &root.digest).annotations();
            let of_image = recipe(store, mirror, &root);
            let of_root = if is_index {
                let (platforms, attestations) = (mirror.platforms.clone(), Some(mirror.attestations));
                Recipe { annotations, platforms, attestations, ..of_image }
            } else {
                Recipe { annotations, ..of_image }
            };
            statements.push(provenance::artifact(&of_root, &described(&root), &told));
            for (image, told) in images.iter().filter(|_| is_index) {
                let told = std::slice::from_ref(told);
                statements.push(provenance::artifact(&recipe(store, mirror, image), &described(image), told));
            }
        }
        let mut unchanged: Vec<Digest> =
            if mirror.referrers { seen.into_iter().collect() } else { Vec::new() };
        unchanged.sort();
        let keeps = mirror.signatures == SignaturePolicy::Keep;
        // With their referrers, images are taken to stay what they are.
        let others = images.iter().map(|(image, _)| image).filter(|_| is_index && !mirror.referrers);
        let changes = [&root].into_iter().chain(others).filter(|_| keeps);
        let changes: Vec<Change> =
            changes.map(|one| Change { source: one.digest.clone(), became: described(one) }).collect();
        let belonging = Belonging { changes: &changes, unchanged: &unchanged, artifacts: &statements };
        let (gathered, _) = beside(Some(store), output, root, belonging).await?;
        // The root is counted.
        parts.manifests += gathered.manifests() - 1;
        for layer in gathered.blobs().iter().filter(|layer| !layer.is_foreign()) {
            let passage = if layer.blob.is_at_hand() { Passage::MadeHere } else { Passage::Beside };
            parts.add(layer.descriptor.iter(), passage);
        }
        Ok(parts)
    }

    fn add<'a>(&mut self, blobs: impl Iterator<Item = &'a Descriptor>, passage: Passage) {
        let own = blobs.filter(|blob| !blob.is_foreign());
        self.blobs.extend(own.map(|blob| Part { digest: blob.digest.clone(), size: blob.size, passage }));
    }
}

/// How an image of an index becomes what filters make of it.
fn recipe(store: &dyn Store, mirror: &Mirror, image: &FetchedManifest) -> Recipe {
    Recipe {
        source: store.repository(),
        manifest: described(image),
        filters: provenance::editing(&mirror.filters),
        compression: None,
        format: ManifestFormat::Keep,
        annotations: Annotations::default(),
        platforms: Vec::new(),
        attestations: None,
    }
}

/// A way through an index.
struct Walk<'a> {
    store: &'a dyn Store,
    parts: Parts,
    /// Entries.
    seen: HashSet<Digest>,
    /// What passes filters, with what a statement would tell of it.
    images: Vec<(FetchedManifest, serde_json::Value)>,
}

impl Walk<'_> {
    fn entries<'a>(&'a mut self, index: &'a Index, depth: usize) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            if depth > MAX_INDEX_DEPTH {
                return Err(Error::IndexDepth(self.store.shown()));
            }
            let entries = index.manifests.iter().filter(|entry| self.seen.insert(entry.digest.clone()));
            let entries: Vec<&Descriptor> = entries.collect();
            if self.seen.len() > MAX_MANIFESTS {
                return Err(Error::IndexSize(self.store.shown()));
            }
            let store = self.store;
            let read = entries.into_iter().map(|entry| async move {
                Ok::<_, Error>((entry, in_copy(&entry.digest, store.manifest(entry).await)?))
            });
            let read: Vec<_> = read.collect();
            let read: Vec<_> = futures_util::stream::iter(read).buffered(ASKED_AT_ONCE).try_collect().await?;
            for (entry, manifest) in read {
                match parse(store, &manifest)? {
                    ParsedManifest::Index(inner) => self.entries(&inner, depth + 1).await?,
                    ParsedManifest::Image(image) => {
                        self.image(&manifest, &image, is_attestation(entry) || image.is_artifact());
                    }
                    ParsedManifest::Schema1(_) => {}
                }
            }
            Ok(())
        }
        .boxed()
    }

    fn image(&mut self, manifest: &FetchedManifest, image: &ImageManifest, is_copied: bool) {
        let (config, layers) = match is_copied {
            true => (Passage::Config, Passage::AsItIs),
            false => (Passage::FilteredConfig, Passage::Filtered),
        };
        self.parts.add(image.layers.iter(), layers);
        self.parts.add(std::iter::once(&image.config), config);
        if !is_copied {
            self.images.push((manifest.clone(), provenance::foreseen(manifest, image)));
        }
    }
}
