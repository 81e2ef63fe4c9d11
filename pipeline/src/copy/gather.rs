//! What a copy consists of: every manifest that is reached from the one that was named, and what all of them name.
//!
//! Nothing is written here. What the destination has already is asked for, and then neither it nor what it names is copied.

use std::collections::HashSet;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryStreamExt};

use super::signatures::{Artifact, Change, Signature, SignaturePolicy, refuse_signed, signatures_of};
use super::subset::{self, Chosen, Made};
use super::{CopyPlan, DOCUMENTS_AT_ONCE, in_copy};
use crate::blob::{BlobError, BlobRef};
use crate::compression::Format;
use crate::digest::Digest;
use crate::element::Layer;
use crate::error::{Error, MAX_INDEX_DEPTH, MAX_MANIFESTS};
use crate::manifest::{self, Descriptor, ImageManifest, Index, ParsedManifest, media_type};
use crate::output::content::ContentOutput;
use crate::platform::Platform;
use crate::reference::Tag;
use crate::registry::{FetchedManifest, Repository};
use crate::source::stored::Store;

/// All manifests together, in bytes: they are held until their blobs are there.
const MANIFEST_BYTES: usize = 256 * 1024 * 1024;
/// How cosign calls what belongs to a manifest: `sha256-HEX` and one of these.
const COSIGN: [&str; 3] = ["sig", "att", "sbom"];

/// What has to be copied.
pub struct Gathered {
    /// The manifest that gets the destination's name.
    pub(super) root: FetchedManifest,
    /// Whether it has that name already.
    pub(super) is_named: bool,
    /// The others that the destination lacks, with how deep they lie.
    pub(super) manifests: Vec<(usize, FetchedManifest)>,
    /// Manifests that the destination has.
    pub(super) manifests_found: usize,
    /// Each blob once.
    pub(super) blobs: Vec<Layer>,
    /// What names a manifest as its subject: the manifest that it is, and how the source lists it.
    pub(super) referrers: Vec<Referrer>,
    /// Tags that are called like a digest, and what they name.
    pub(super) digest_tags: Vec<(Tag, FetchedManifest)>,
    /// Entries of indexes that are not copied.
    pub(super) left_out: Vec<Digest>,
    /// Signatures that stay with what they are about, which the destination has not.
    pub(super) kept: Vec<Signature>,
}

impl Gathered {
    /// The manifest that gets the destination's name.
    pub fn root(&self) -> &FetchedManifest {
        &self.root
    }

    /// Whether it has that name already.
    pub fn is_named(&self) -> bool {
        self.is_named
    }

    /// How many manifests have to be put, what belongs to them and the one that gets the name included.
    pub fn manifests(&self) -> usize {
        self.manifests.len() + usize::from(!self.is_named) + self.referrers.len() + self.digest_tags.len()
    }

    /// How many of the manifests that others name the destination lacks.
    pub fn missing(&self) -> usize {
        self.manifests.len()
    }

    /// What all of them take in memory, about, their blobs left out.
    pub fn size(&self) -> usize {
        let named = self.manifests.iter().map(|(_, manifest)| manifest);
        let belonging = self.referrers.iter().map(|referrer| &referrer.manifest);
        let tagged = self.digest_tags.iter().map(|(_, manifest)| manifest);
        let manifests = named.chain(belonging).chain(tagged).chain([&self.root]);
        manifests.map(|manifest| manifest.bytes.len()).sum()
    }

    /// The blobs that all of them name, each once, foreign ones included.
    pub fn blobs(&self) -> &[Layer] {
        &self.blobs
    }

    /// Those of them that move, foreign ones left out.
    pub fn own_blobs(&self) -> impl Iterator<Item = &Descriptor> {
        let own = self.blobs.iter().filter(|blob| !blob.is_foreign());
        own.filter_map(|blob| blob.descriptor.as_ref())
    }

    /// What names a manifest as its subject: the subject, and which it is.
    pub fn referrers(&self) -> impl Iterator<Item = (&Digest, &Digest)> {
        self.referrers.iter().map(|referrer| (&referrer.subject, &referrer.manifest.digest))
    }

    /// Signatures of what became something else, which go along as they are.
    pub fn kept(&self) -> &[Signature] {
        &self.kept
    }

    /// Tags that are called like a digest, and what they name.
    pub fn digest_tags(&self) -> impl Iterator<Item = (&Tag, &Digest)> {
        self.digest_tags.iter().map(|(tag, manifest)| (tag, &manifest.digest))
    }
}

pub(super) struct Referrer {
    pub(super) subject: Digest,
    pub(super) listed: Descriptor,
    pub(super) manifest: FetchedManifest,
}

pub(super) struct Gathering<'a> {
    source: &'a dyn Store,
    output: &'a dyn ContentOutput,
    plan: &'a CopyPlan,
    origin: Option<Repository>,
    /// Indexes that are made here, in the place of larger ones.
    made: Made,
    seen: HashSet<Digest>,
    /// Manifests in the order in which they were found: what may have referrers.
    order: Vec<Digest>,
    seen_blobs: HashSet<(Digest, bool)>,
    bytes: usize,
    manifests: Vec<(usize, FetchedManifest)>,
    manifests_found: usize,
    blobs: Vec<Layer>,
    left_out: Vec<Digest>,
}

/// An entry of an index, looked for at both ends.
enum Found {
    /// At the source, to be copied or looked into; it may be at the destination too.
    Manifest { fetched: FetchedManifest, is_here: bool },
    /// At the destination.
    Here,
    /// Nowhere.
    Missing,
}

impl<'a> Gathering<'a> {
    pub(super) fn new(source: &'a dyn Store, output: &'a dyn ContentOutput, plan: &'a CopyPlan) -> Self {
        Self {
            source,
            output,
            plan,
            origin: source.origin(),
            made: Made::default(),
            seen: HashSet::new(),
            order: Vec::new(),
            seen_blobs: HashSet::new(),
            bytes: 0,
            manifests: Vec::new(),
            manifests_found: 0,
            blobs: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// Everything that is reached from `root`.
    pub(super) async fn all_of(mut self, root: FetchedManifest) -> Result<Gathered, Error> {
        let root = self.reduced(root).await?;
        if let Some(expected) = self.output.wanted()
            && *expected != root.digest
        {
            let (expected, actual) = (expected.clone(), root.digest);
            return Err(crate::output::OutputError::ByDigest { expected, actual }.into());
        }
        let parsed = self.parse(&root)?;
        let root = FetchedManifest { media_type: parsed.media_type().to_owned(), ..root };
        let is_named = self.output.is_named(&root.digest).await?;
        self.seen.insert(root.digest.clone());
        self.order.push(root.digest.clone());
        if !(is_named && matches!(parsed, ParsedManifest::Image(_))) {
            let platforms = if self.plan.sparse { self.plan.platforms.clone() } else { Vec::new() };
            self.content(parsed, &platforms, 1).await?;
        }
        self.manifests_found += usize::from(is_named);
        let (referrers, digest_tags) =
            if self.plan.referrers { self.belongings().await? } else { Default::default() };
        let mut gathered = Gathered {
            root,
            is_named,
            manifests: Vec::new(),
            manifests_found: 0,
            blobs: Vec::new(),
            referrers,
            digest_tags,
            left_out: Vec::new(),
            kept: Vec::new(),
        };
        if !is_named {
            self.heed_signatures(&mut gathered).await?;
        }
        Ok(Gathered {
            manifests: self.manifests,
            manifests_found: self.manifests_found,
            blobs: [self.blobs, gathered.blobs].concat(),
            left_out: self.left_out,
            ..gathered
        })
    }

    /// Does with the signatures of indexes that became others what the plan says.
    async fn heed_signatures(&mut self, gathered: &mut Gathered) -> Result<(), Error> {
        let changes = std::mem::take(&mut self.made.changes);
        match self.plan.signatures {
            SignaturePolicy::Drop => {}
            SignaturePolicy::Refuse => {
                for change in &changes {
                    refuse_signed(self.source, &self.source.shown(), &change.source).await?;
                }
            }
            SignaturePolicy::Keep => {
                let kept = self.keep_signatures(&changes, gathered).await?;
                for change in changes {
                    if kept.iter().any(|signature| signature.subject == change.source) {
                        gathered.add(&Artifact::link(&change));
                    }
                }
                gathered.kept = kept;
            }
        }
        Ok(())
    }

    /// Adds the signatures of manifests that changed, as they are; gives what they are.
    pub(super) async fn keep_signatures(
        &mut self,
        changes: &[Change],
        gathered: &mut Gathered,
    ) -> Result<Vec<Signature>, Error> {
        let mut kept = Vec::new();
        for Change { source: subject, .. } in changes {
            let found = signatures_of(self.source, subject).await?;
            kept.extend(found.signatures(subject));
            for listed in found.listed {
                let Some(manifest) = self.fetch(&listed).await? else {
                    let image = format!("the list of referrers of {subject}");
                    return Err(Error::MissingManifest { image, digest: listed.digest });
                };
                let manifest = self.belonging(manifest).await?;
                gathered.referrers.push(Referrer { subject: subject.clone(), listed, manifest });
            }
            for (tag, manifest) in found.tagged {
                let manifest = self.belonging(manifest).await?;
                gathered.digest_tags.push((tag, manifest));
            }
        }
        Ok(kept)
    }

    /// Adds what belongs to manifests that the destination has as the source has them, as a copy with referrers does.
    pub(super) async fn keep_belongings(
        &mut self,
        unchanged: &[Digest],
        gathered: &mut Gathered,
    ) -> Result<(), Error> {
        for subject in unchanged {
            self.is_new(subject)?;
        }
        let (referrers, digest_tags) = self.belongings().await?;
        gathered.referrers.extend(referrers);
        gathered.digest_tags.extend(digest_tags);
        Ok(())
    }

    /// The blobs that were found.
    pub(super) fn into_blobs(self) -> Vec<Layer> {
        self.blobs
    }

    /// The manifest that is to be named: of an index and some platforms, an index of these.
    async fn reduced(&mut self, root: FetchedManifest) -> Result<FetchedManifest, Error> {
        let platforms = &self.plan.platforms[..];
        if platforms.is_empty() {
            return Ok(root);
        }
        let index = match self.parse(&root)? {
            ParsedManifest::Index(index) => index,
            ParsedManifest::Image(image) => {
                let at_once = if self.plan.any_platform { platforms.len() } else { 1 };
                for platforms in platforms.chunks(at_once) {
                    subset::confirm(self.source, &image, platforms).await?;
                }
                return Ok(root);
            }
            ParsedManifest::Schema1(_) => return Err(Error::Schema1(self.source.shown())),
        };
        if self.plan.sparse {
            return Ok(root);
        }
        let reduced = subset::reduce(self.source, &root, &index, platforms, 0, &mut self.made).await?;
        if self.plan.preserve_digests && reduced.digest != root.digest {
            let reason = "it names some of the platforms only (--sparse keeps it as it is)";
            return Err(Error::DigestChange { image: self.source.shown(), changed: reduced.digest, reason });
        }
        Ok(reduced)
    }

    fn parse(&self, fetched: &FetchedManifest) -> Result<ParsedManifest, Error> {
        manifest::parse(&fetched.bytes, Some(&fetched.media_type)).map_err(|source| Error::Manifest {
            image: format!("{} ({})", self.source.shown(), fetched.digest),
            source,
        })
    }

    /// Notes a manifest that others name, and all that it names. One that was noted before is not looked at again.
    fn add<'b>(
        &'b mut self,
        fetched: FetchedManifest,
        is_here: bool,
        platforms: &'b [Platform],
        depth: usize,
    ) -> BoxFuture<'b, Result<(), Error>> {
        async move {
            if !self.is_new(&fetched.digest)? {
                return Ok(());
            }
            self.bytes += fetched.bytes.len();
            if depth > MAX_INDEX_DEPTH + 1 {
                return Err(Error::IndexDepth(self.source.shown()));
            }
            if self.bytes > MANIFEST_BYTES {
                return Err(Error::IndexSize(self.source.shown()));
            }
            let parsed = self.parse(&fetched)?;
            let media_type = parsed.media_type().to_owned();
            self.content(parsed, platforms, depth + 1).await?;
            if is_here {
                self.manifests_found += 1;
            } else {
                self.manifests.push((depth, FetchedManifest { media_type, ..fetched }));
            }
            Ok(())
        }
        .boxed()
    }

    fn is_new(&mut self, digest: &Digest) -> Result<bool, Error> {
        let is_new = self.seen.insert(digest.clone());
        if is_new {
            self.order.push(digest.clone());
        }
        if self.seen.len() > MAX_MANIFESTS { Err(Error::IndexSize(self.source.shown())) } else { Ok(is_new) }
    }

    async fn content(
        &mut self,
        parsed: ParsedManifest,
        platforms: &[Platform],
        depth: usize,
    ) -> Result<(), Error> {
        match parsed {
            ParsedManifest::Image(image) => self.add_blobs(&image),
            ParsedManifest::Index(index) => self.add_entries(&index, platforms, depth).await,
            ParsedManifest::Schema1(_) => Err(Error::Schema1(self.source.shown())),
        }
    }

    fn add_blobs(&mut self, image: &ImageManifest) -> Result<(), Error> {
        for descriptor in std::iter::once(&image.config).chain(&image.layers) {
            if self.seen_blobs.insert((descriptor.digest.clone(), descriptor.is_foreign())) {
                let blob = self.source.layer(descriptor)?;
                self.blobs.push(as_layer(descriptor, blob, self.origin.clone()));
            }
        }
        Ok(())
    }

    async fn add_entries(
        &mut self,
        index: &Index,
        platforms: &[Platform],
        depth: usize,
    ) -> Result<(), Error> {
        let chosen = subset::choose(self.source, index, platforms).await?;
        for (position, entry) in index.manifests.iter().enumerate() {
            if !chosen.iter().any(|one| one.position == position) {
                self.left_out.push(entry.digest.clone());
            }
        }
        let gathering = &*self;
        let wanted = chosen.iter().map(|one| gathering.find(&index.manifests[one.position]));
        let found: Vec<Found> = futures_util::stream::iter(wanted.collect::<Vec<_>>())
            .buffered(DOCUMENTS_AT_ONCE)
            .try_collect()
            .await?;
        for (Chosen { position, platforms }, found) in chosen.iter().zip(found) {
            let digest = &index.manifests[*position].digest;
            match found {
                Found::Manifest { fetched, is_here } => self.add(fetched, is_here, platforms, depth).await?,
                Found::Here => self.manifests_found += usize::from(self.is_new(digest)?),
                Found::Missing if self.plan.sparse => self.left_out.push(digest.clone()),
                Found::Missing => {
                    let image = self.source.shown();
                    return Err(Error::MissingManifest { image, digest: digest.clone() });
                }
            }
        }
        Ok(())
    }

    async fn find(&self, entry: &Descriptor) -> Result<Found, Error> {
        if self.seen.contains(&entry.digest) {
            return Ok(Found::Here);
        }
        let made = self.made.indexes.get(&entry.digest).cloned();
        let size = made.as_ref().map_or(entry.size, |made| made.bytes.len() as u64);
        let is_here = self.output.has_manifest(&entry.digest, size).await?;
        // What an image's manifest names is where the manifest is. Of an index that cannot be said: it may be sparse there.
        let is_image =
            [media_type::OCI_MANIFEST, media_type::DOCKER_MANIFEST].contains(&entry.media_type.as_str());
        if is_image && is_here {
            return Ok(Found::Here);
        }
        let fetched = match made {
            Some(made) => Some(made),
            None => self.fetch(entry).await?,
        };
        Ok(fetched.map_or(Found::Missing, |fetched| Found::Manifest { fetched, is_here }))
    }

    async fn fetch(&self, entry: &Descriptor) -> Result<Option<FetchedManifest>, Error> {
        let fetched = match self.source.manifest(entry).await {
            Ok(fetched) => fetched,
            Err(error) if error.is_missing() => return Ok(None),
            Err(error) => return in_copy(&entry.digest, Err(error)),
        };
        let actual = fetched.bytes.len() as u64;
        if actual != entry.size {
            let error = BlobError::Size { expected: entry.size, actual };
            return in_copy(&entry.digest, Err(error.into()));
        }
        Ok(Some(fetched))
    }

    /// What names the manifests as its subject, what names that, and what is kept under tags that are called like them.
    async fn belongings(&mut self) -> Result<(Vec<Referrer>, Vec<(Tag, FetchedManifest)>), Error> {
        let (mut referrers, mut digest_tags) = (Vec::new(), Vec::new());
        let mut from = 0;
        // Each round is about what the one before has found.
        for _ in 0..=MAX_INDEX_DEPTH {
            let subjects = self.order[from..].to_vec();
            from = self.order.len();
            let asked = subjects.iter().filter(|subject| !self.made.indexes.contains_key(subject)).cloned();
            let gathering = &*self;
            let asked = asked.map(|subject| gathering.belonging_to(subject)).collect::<Vec<_>>();
            let found: Vec<_> =
                futures_util::stream::iter(asked).buffered(DOCUMENTS_AT_ONCE).try_collect().await?;
            for (subject, listed, tagged) in found {
                for listed in listed {
                    let Some(manifest) = self.fetch(&listed).await? else {
                        let image = format!("the list of referrers of {subject}");
                        return Err(Error::MissingManifest { image, digest: listed.digest });
                    };
                    let manifest = self.belonging(manifest).await?;
                    referrers.push(Referrer { subject: subject.clone(), listed, manifest });
                }
                for (tag, manifest) in tagged {
                    let manifest = self.belonging(manifest).await?;
                    digest_tags.push((tag, manifest));
                }
            }
            if from == self.order.len() {
                return Ok((referrers, digest_tags));
            }
        }
        Err(Error::IndexDepth(self.source.shown()))
    }

    /// Notes what a manifest names that is put by itself.
    async fn belonging(&mut self, manifest: FetchedManifest) -> Result<FetchedManifest, Error> {
        let parsed = self.parse(&manifest)?;
        let media_type = parsed.media_type().to_owned();
        if self.is_new(&manifest.digest)? {
            self.content(parsed, &[], 1).await?;
        }
        Ok(FetchedManifest { media_type, ..manifest })
    }

    async fn belonging_to(
        &self,
        subject: Digest,
    ) -> Result<(Digest, Vec<Descriptor>, Vec<(Tag, FetchedManifest)>), Error> {
        let referrers = in_copy(&subject, self.source.referrers(&subject).await)?;
        let mut tagged = Vec::new();
        for suffix in COSIGN {
            let tag = format!("{}-{}.{suffix}", subject.algorithm().name(), subject.hex());
            // The name of a longer digest is no tag.
            let Ok(tag) = tag.parse::<Tag>() else { continue };
            if let Some(manifest) = in_copy(&subject, self.source.tagged(&tag).await)? {
                tagged.push((tag, manifest));
            }
        }
        Ok((subject, referrers, tagged))
    }
}

/// A blob of any kind as outputs take layers.
pub(super) fn as_layer(descriptor: &Descriptor, blob: BlobRef, origin: Option<Repository>) -> Layer {
    Layer {
        index: 0,
        blob,
        descriptor: Some(descriptor.clone()),
        format: Format::None,
        diff_id: None,
        origin,
        keep_stored: true,
        known_by_diff_id_alone: false,
    }
}
