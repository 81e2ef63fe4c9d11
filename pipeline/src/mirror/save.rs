//! Saves what is to be mirrored in a layout that can be carried to where its registries cannot be reached.
//!
//! Every image is there under its full name, and its manifests are there in any case. Blobs that all target registries are listed to
//! [have](Have) are left out. A directory keeps what it has, so another run fetches what is new; a tar is made of a directory beside
//! it, which a run that was killed leaves for the next one.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures_util::StreamExt;
use tokio::sync::Semaphore;

use super::Ends;
use super::config::Config;
use super::have::Have;
use super::image::{Documents, MirrorSource};
use super::lists::{Lists, Unlisted};
use super::plan::{Action, Plan, Price, What};
use super::progress::MirrorProgress;
use super::run::{IMAGES_AT_ONCE, Outcome, Report};
use super::survey::copy_plan;
use crate::blob::ByteCount;
use crate::copy::{CopyPlan, Gathered, SignaturePolicy, gather, write};
use crate::digest::Digest;
use crate::element::{ImageName, Layer};
use crate::error::Error;
use crate::layout::{INDEX, blob_path};
use crate::output::Moved;
use crate::output::content::ContentOutput;
use crate::output::oci_layout::{LayoutOptions, LayoutOutput, pack};
use crate::progress::Progress;
use crate::reference::{Reference, Tag};
use crate::registry::FetchedManifest;
use crate::uri::{Uri, UriError};

/// What is added to the name of a tar for the directory that it is made of.
const PARTS: &str = ".parts";

/// Where images are saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    path: PathBuf,
    is_tar: bool,
}

impl Destination {
    /// An `oci-layout://PATH`: a tar where that is called `.tar` or `?tar=true` says so, else a directory.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let uri = layout_uri(text, &["tar"])?;
        let path = PathBuf::from(&uri.rest);
        let is_named_so = path.extension().is_some_and(|extension| extension == "tar") && !path.is_dir();
        Ok(Self { is_tar: uri.flag("tar")? || is_named_so, path })
    }

    /// The directory that blobs go to.
    fn directory(&self) -> PathBuf {
        if !self.is_tar {
            return self.path.clone();
        }
        let mut name = self.path.clone().into_os_string();
        name.push(PARTS);
        name.into()
    }
}

/// A layout's URI with no more options than these. Standard input and output are none: a layout is read and written in no order.
pub(super) fn layout_uri(text: &str, options: &[&str]) -> Result<Uri, UriError> {
    let uri = Uri::parse(text)?;
    if uri.scheme != "oci-layout" {
        let expected = "oci-layout://PATH".to_owned();
        return Err(UriError::UnknownScheme {
            role: "place to carry images in",
            scheme: uri.scheme,
            expected,
        });
    }
    uri.only(options)?;
    if uri.rest == "-" {
        return Err(UriError::Empty(uri.scheme));
    }
    Ok(uri)
}

/// One image that is saved, for all entries of the configuration that want it.
struct Wanted {
    source: Reference,
    plan: CopyPlan,
    /// Whether it passes filters over there, which read what a target may have.
    is_read: bool,
}

struct Saving {
    directory: PathBuf,
    layout: LayoutOutput,
    dry_run: bool,
    have: Have,
    /// Registries that the blobs are for.
    hosts: Vec<String>,
    slots: Semaphore,
    state: Mutex<State>,
    progress: MirrorProgress,
}

#[derive(Default)]
struct State {
    /// What belongs into the layout.
    named: BTreeSet<Digest>,
    /// Blobs that have been priced.
    priced: HashSet<Digest>,
    /// One at a time brings a blob.
    bringing: HashMap<Digest, Arc<tokio::sync::Mutex<()>>>,
}

/// Saves all that a configuration wants, each image whole or not at all, one's failure none of the others'. With `dry_run` nothing is
/// written.
///
/// An error is the destination's.
///
/// # Cancel safety
/// Cancelled, it leaves blobs in a directory, which another run needs not fetch again.
pub async fn save(
    config: &Config,
    ends: &Ends,
    destination: &Destination,
    dry_run: bool,
) -> Result<(Plan, Report), Error> {
    let start = Instant::now();
    let directory = destination.directory();
    let layout = LayoutOutput::new(&directory, LayoutOptions::default(), ends.spools.clone());
    let saving = Arc::new(Saving {
        layout,
        dry_run,
        have: ends.have.clone(),
        hosts: config.target_hosts(),
        slots: Semaphore::new(ends.parallel.max(1)),
        state: Mutex::default(),
        progress: ends.progress.clone(),
        directory: directory.clone(),
    });
    if !dry_run {
        if destination.is_tar {
            // The names in it would be those of whatever an earlier run was to save.
            forget_names(&directory).await?;
        }
        ContentOutput::open(&saving.layout).await?;
    }
    let mut lists = Lists::ask(config, &ends.source).await;
    let wanted = wanted(config, &mut lists, ends.parallel);
    if !dry_run {
        ends.progress.change(|counts| counts.images = (wanted.len() + lists.unlisted.len()) as u64);
    }
    let mut documents: HashMap<String, Arc<Documents>> = HashMap::new();
    let saved = wanted.into_iter().map(|wanted| {
        let documents = Arc::clone(documents.entry(wanted.source.name()).or_default());
        save_image(ends, wanted, documents, Arc::clone(&saving))
    });
    let saved: Vec<_> = saved.collect();
    drop(documents);
    let saved: Vec<(Action, Outcome)> =
        futures_util::stream::iter(saved).buffered(IMAGES_AT_ONCE).collect().await;
    let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
    for (action, outcome) in saved {
        plan.price.add(&action.price);
        plan.actions.push(action);
        outcomes.push(outcome);
    }
    for Unlisted { what, problem } in &lists.unlisted {
        plan.actions.push(Action::impossible(what, problem));
        let failed = Outcome::Failed { problem: problem.clone(), hint: None };
        ends.progress.take(&failed);
        outcomes.push(failed);
    }
    let mut report = Report::of(outcomes, &ends.progress, start.elapsed());
    if destination.is_tar && !dry_run && report.done() > 0 {
        let named = std::mem::take(&mut saving.state().named);
        pack(&directory, named, &destination.path).await?;
        let removed = tokio::fs::remove_dir_all(&directory).await;
        removed.map_err(|error| io_error("remove", &directory, &error))?;
        report.elapsed = start.elapsed();
    }
    Ok((plan, report))
}

fn io_error(what: &str, path: &Path, error: &std::io::Error) -> Error {
    Error::Host(format!("failed to {what} {}: {error}", path.display()).into())
}

async fn forget_names(directory: &Path) -> Result<(), Error> {
    let index = directory.join(INDEX);
    match tokio::fs::remove_file(&index).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error("remove", &index, &error)),
        _ => Ok(()),
    }
}

/// Every source that is wanted, once. Of an index all images that any entry wants are saved, and the index as it is, so that each
/// entry finds there what it would have found at the source.
fn wanted(config: &Config, lists: &mut Lists, parallel: usize) -> Vec<Wanted> {
    let mut numbers: HashMap<Reference, usize> = HashMap::new();
    let mut all: Vec<Wanted> = Vec::new();
    for super::lists::Wanted { mirror, source, .. } in lists.wanted(config) {
        let mut plan = copy_plan(&config.mirrors[mirror], parallel);
        // Whether another manifest may be made is asked over there, where filters are passed too.
        let is_filtered = !config.mirrors[mirror].filters.is_empty();
        let may_change = is_filtered || (!plan.platforms.is_empty() && !plan.sparse);
        plan.referrers |= may_change && plan.signatures != SignaturePolicy::Drop;
        match numbers.get(&source) {
            Some(number) => {
                all[*number].is_read |= is_filtered;
                let merged = &mut all[*number].plan;
                merged.referrers |= plan.referrers;
                if plan.platforms.is_empty() {
                    merged.platforms.clear();
                } else if !merged.platforms.is_empty() {
                    merged.platforms.extend(plan.platforms);
                }
            }
            None => {
                numbers.insert(source.clone(), all.len());
                all.push(Wanted { source, plan, is_read: is_filtered });
            }
        }
    }
    for Wanted { plan, .. } in &mut all {
        plan.sparse = !plan.platforms.is_empty();
    }
    all
}

async fn save_image(
    ends: &Ends,
    wanted: Wanted,
    documents: Arc<Documents>,
    saving: Arc<Saving>,
) -> (Action, Outcome) {
    let source = &wanted.source;
    let mut action = Action {
        target: Some(source.clone()),
        what: What::Create,
        ..Action::impossible(&source.to_string(), "")
    };
    let outcome = match try_save(ends, &wanted, documents, saving, &mut action).await {
        Ok(outcome) => outcome,
        Err(error) => {
            action.what = What::Fail(error.to_string());
            Outcome::Failed { problem: error.to_string(), hint: error.hint() }
        }
    };
    ends.progress.take(&outcome);
    (action, outcome)
}

async fn try_save(
    ends: &Ends,
    Wanted { source, plan, is_read }: &Wanted,
    documents: Arc<Documents>,
    saving: Arc<Saving>,
    action: &mut Action,
) -> Result<Outcome, Error> {
    let Some(digest) = documents.named(&ends.source, source).await? else {
        return Err(Error::Host(format!("{source} does not exist").into()));
    };
    let store = MirrorSource::new(&ends.source, source, digest, documents);
    let output = Output { saving: Arc::clone(&saving), source: source.clone(), is_read: *is_read };
    let gathered = gather(&store, &output, plan).await?;
    action.becomes = Some(gathered.root().digest.clone());
    action.price = saving.price(&gathered, *is_read);
    if saving.dry_run {
        return Ok(Outcome::Nothing);
    }
    let name = ImageName { repository: source.name(), tag: source.tag().map(ToString::to_string) };
    let output: Arc<dyn ContentOutput> = Arc::new(output);
    let copied = write(gathered, &name, &output, plan, &Progress::default()).await?;
    Ok(Outcome::of(&copied))
}

impl Saving {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all that want a blob have it, and nobody has to read it on its way.
    fn need_not_be_carried(&self, digest: &Digest, is_read: bool) -> bool {
        !is_read && self.have.everywhere(digest, &self.hosts)
    }

    /// What it takes to save an image beside all that was priced before it.
    fn price(&self, gathered: &Gathered, is_read: bool) -> Price {
        let mut price = Price { manifests: gathered.manifests(), ..Price::default() };
        for descriptor in gathered.own_blobs() {
            let is_there = self.need_not_be_carried(&descriptor.digest, is_read) || {
                let blob = std::fs::metadata(self.directory.join(blob_path(&descriptor.digest)));
                blob.is_ok_and(|blob| blob.len() == descriptor.size)
            };
            if is_there || !self.state().priced.insert(descriptor.digest.clone()) {
                price.found += 1;
                continue;
            }
            price.fetch(descriptor.size);
            price.upload(descriptor.size);
        }
        price.requests = price.fetched;
        price
    }
}

/// The place of one image in the layout, under its source's full name.
struct Output {
    saving: Arc<Saving>,
    source: Reference,
    /// As in [`Wanted`].
    is_read: bool,
}

#[async_trait::async_trait]
impl ContentOutput for Output {
    fn destination(&self) -> String {
        format!("{} in {}", self.source, self.saving.directory.display())
    }

    fn wanted(&self) -> Option<&Digest> {
        None
    }

    fn names_many(&self) -> bool {
        true
    }

    async fn open(&self) -> Result<(), Error> {
        // It was opened for all of them.
        Ok(())
    }

    async fn is_named(&self, _digest: &Digest) -> Result<bool, Error> {
        Ok(false)
    }

    async fn has_manifest(&self, _digest: &Digest, _size: u64) -> Result<bool, Error> {
        // One that is there may be so without its blobs: an earlier run may have left out others.
        Ok(false)
    }

    async fn put_blob(&self, blob: &Layer, progress: &ByteCount) -> Result<Moved, Error> {
        let Some(descriptor) = blob.descriptor.as_ref().filter(|_| !blob.is_foreign()) else {
            return Ok(Moved::Nothing);
        };
        let (saving, digest) = (&self.saving, &descriptor.digest);
        if saving.need_not_be_carried(digest, self.is_read) {
            return Ok(Moved::Nothing);
        }
        let one = Arc::clone(saving.state().bringing.entry(digest.clone()).or_default());
        let _one = one.lock().await;
        let _slot = saving.slots.acquire().await.expect("it is never closed");
        let moved = saving.layout.put_blob(blob, progress).await?;
        saving.state().named.insert(digest.clone());
        if let Moved::Bytes = moved {
            saving.progress.fetched(descriptor.size);
            saving.progress.uploaded(descriptor.size);
        }
        Ok(moved)
    }

    async fn put_manifest(&self, manifest: &FetchedManifest) -> Result<Option<Digest>, Error> {
        let listed = self.saving.layout.put_manifest(manifest).await?;
        self.saving.state().named.insert(manifest.digest.clone());
        Ok(listed)
    }

    async fn tagged(&self, tag: &Tag) -> Result<Option<FetchedManifest>, Error> {
        self.saving.layout.named(&format!("{}:{tag}", self.source.name())).await
    }

    async fn put_tagged(&self, tag: &Tag, manifest: &FetchedManifest) -> Result<(), Error> {
        let name = ImageName { repository: self.source.name(), tag: Some(tag.to_string()) };
        self.put_named(manifest, &name).await
    }

    async fn put_named(&self, manifest: &FetchedManifest, name: &ImageName) -> Result<(), Error> {
        self.saving.layout.put_named(manifest, name).await?;
        self.saving.state().named.insert(manifest.digest.clone());
        Ok(())
    }
}
