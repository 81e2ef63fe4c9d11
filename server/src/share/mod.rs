//! Layers that several jobs or calls want are done once: who gets a worker first does it, the others wait and then have it too.
//!
//! What has to be the same is in [`Key`]: the layer, all that is done with it, and the registry that it goes to. Who waits takes
//! no worker's slot; who finds that nobody is at work waits for a worker like everybody, so that no tenant's turn depends on
//! another's. When the one at work fails or is cancelled, the next one gets a worker and goes on from the start. A result is
//! believed by nobody: who wants it asks its own destination for the blob, which may be mounted there from the repository that
//! has it, with its own credentials; where that does not help, it does the layer by itself.
//!
//! A job comes here when its source was asked, with the credentials that it has, for the manifest that names the layer. That
//! says something only about the repository that was asked: anybody can write a manifest that names a stranger's layer, and would
//! learn here what filters found in it. So another tenant's result is shared only if both read it out of the same repository.
//!
//! All this is between the jobs and calls of one coordinator; a job's layers are shared with other coordinators' jobs too, by the same
//! rules: [`elsewhere`].

pub mod elsewhere;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use occy_pipeline::element::{Layer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::executor::LayerTask;
use occy_pipeline::output::LayerForm;
use occy_pipeline::progress::LayerState;
use tokio::sync::watch;

use self::elsewhere::{Elsewhere, EveryTurn};
use crate::metrics::{Metrics, SharedBy};
use crate::schedule::Tenant;

/// Results that are remembered when nobody waits for them any more.
const KEPT: usize = 1024;
/// Bytes of what filters reported of such a layer; results with more are forgotten.
const KEPT_REPORTS: usize = 32 * 1024;

/// The layers of a coordinator that are, or were, on their way. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct SharedLayers {
    state: Arc<Mutex<State>>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    layers: HashMap<Key, Vec<Shared>>,
    /// Results that nobody waits for, the one that was wanted last at the end.
    idle: BTreeMap<u64, (Key, u64)>,
    count: u64,
}

/// What has to be the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    digest: String,
    size: u64,
    media_type: String,
    diff_id: Option<String>,
    keep_stored: bool,
    /// The filters, and the version of what rewrites and compresses.
    chain: String,
    /// The versions of those filters that only workers have.
    others: Vec<String>,
    form: LayerForm,
    verify_diff_ids: bool,
    /// The registry.
    host: String,
}

/// In words that are equal where the keys are.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { digest, size, media_type, diff_id, keep_stored, .. } = self;
        let Self { chain, others, form, verify_diff_ids, host, .. } = self;
        let compression = match form {
            LayerForm::Stored { compression } => compression.map(|compression| compression.to_string()),
            LayerForm::Tar => Some("tar".to_owned()),
            LayerForm::Nothing => Some("nothing".to_owned()),
        };
        let layer = (digest, size, media_type, diff_id);
        let words = (layer, keep_stored, chain, others, compression, verify_diff_ids, host);
        f.write_str(&serde_json::to_string(&words).map_err(|_| fmt::Error)?)
    }
}

/// A layer, for those who may share it.
#[derive(Debug)]
struct Shared {
    id: u64,
    /// Whose it was first.
    tenant: Tenant,
    /// Where that tenant has read of it.
    source: Option<String>,
    stage: Arc<watch::Sender<Stage>>,
    /// How many want it now.
    claims: usize,
    /// Its place among those that nobody wants.
    idle: Option<u64>,
}

#[derive(Clone, Debug)]
enum Stage {
    /// Nobody is at work.
    Open,
    /// A worker is.
    Running,
    /// It was done.
    Done(Arc<Done>),
}

/// A layer that was done.
#[derive(Debug)]
struct Done {
    written: WrittenLayer,
    /// The repository that has it.
    repository: String,
}

/// Who wants a layer, of what is not said in its task.
#[derive(Debug)]
pub struct Wants<'a> {
    /// Whose it is.
    pub tenant: &'a Tenant,
    /// The versions of those of its filters that only workers have, which the worker has that it gets.
    pub others: Vec<String>,
    /// Of a job: how it is shared with other coordinators.
    pub elsewhere: Option<&'a Elsewhere>,
}

/// What comes of waiting for one's turn at a layer.
#[derive(Debug)]
pub enum Turn<L> {
    /// It is at the destination.
    Taken(WrittenLayer),
    /// It is to be done now, with this lease.
    Lead(L, Leader),
}

/// The one who does a layer. Dropped before it is done, it leaves it to the next one.
#[derive(Debug)]
pub struct Leader(Option<Box<Led>>);

#[derive(Debug)]
struct Led {
    claim: Claim,
    repository: String,
    /// The turn among all coordinators.
    everywhere: Option<EveryTurn>,
}

/// A place among those who want a layer.
#[derive(Debug)]
struct Claim {
    layers: SharedLayers,
    key: Key,
    id: u64,
    stage: Arc<watch::Sender<Stage>>,
    /// Whether the others wait for this one.
    is_awaited: bool,
}

/// What one's turn begins with.
enum Begun<L> {
    /// Another coordinator had the layer done.
    Taken(WrittenLayer),
    /// A worker is there.
    Leased(L),
}

impl SharedLayers {
    /// Those of a coordinator that counts them there.
    pub fn new(metrics: Metrics) -> Self {
        Self { state: Arc::default(), metrics }
    }

    /// Waits for a worker, or for somebody else who does the same: here, and for a job elsewhere.
    ///
    /// # Cancel safety
    /// Dropped, it wants the layer no more.
    pub async fn turn<L, F: Future<Output = Result<L, Error>>>(
        &self,
        wants: Wants<'_>,
        task: &LayerTask,
        lease: impl Fn() -> F,
    ) -> Result<Turn<L>, Error> {
        let Wants { tenant, others, elsewhere } = wants;
        let Some((key, repository)) = key(task, others) else {
            return Ok(Turn::Lead(lease().await?, Leader::alone()));
        };
        let source = task.layer.origin.as_ref().map(|origin| format!("{}/{}", origin.host(), origin.name()));
        let mut everywhere = elsewhere.map(|elsewhere| elsewhere.turn(&key, tenant, source.clone()));
        let mut claim = self.claim(tenant, source, key);
        let mut stage = claim.stage.subscribe();
        loop {
            let now = stage.borrow_and_update().clone();
            let is_open = match now {
                Stage::Open => true,
                Stage::Running => {
                    // The claim keeps the sender.
                    drop(stage.changed().await);
                    continue;
                }
                Stage::Done(done) => {
                    if let Some(written) = take(task, &done).await? {
                        self.metrics.layer_shared(SharedBy::Same);
                        return Ok(Turn::Taken(written));
                    }
                    false
                }
            };
            let begun = tokio::select! {
                biased;
                // Losing this branch leaves the line of those who wait for a worker, or gives the slot back.
                begun = self.begin(task, &mut everywhere, &lease) => begun?,
                // Losing this one loses nothing: the stage is looked at again. The claim keeps the sender.
                _ = stage.changed(), if is_open => continue,
            };
            let lease = match begun {
                Begun::Taken(written) => return Ok(Turn::Taken(written)),
                Begun::Leased(lease) => lease,
            };
            if is_open && !claim.begin() {
                continue;
            }
            if let Some(everywhere) = &mut everywhere
                && !everywhere.begin(&self.metrics).await
            {
                claim.leave();
                continue;
            }
            let led = Led { claim, repository, everywhere };
            return Ok(Turn::Lead(lease, Leader(Some(Box::new(led)))));
        }
    }

    /// Waits for other coordinators, and then for a worker.
    async fn begin<L, F: Future<Output = Result<L, Error>>>(
        &self,
        task: &LayerTask,
        everywhere: &mut Option<EveryTurn>,
        lease: impl Fn() -> F,
    ) -> Result<Begun<L>, Error> {
        if let Some(everywhere) = everywhere
            && let Some((done, by)) = everywhere.result().await
            && let Some(written) = take(task, &done).await?
        {
            self.metrics.layer_shared(by);
            return Ok(Begun::Taken(written));
        }
        Ok(Begun::Leased(lease().await?))
    }

    /// A place at the layer, if there is one that this tenant may share, or at one of its own.
    fn claim(&self, tenant: &Tenant, source: Option<String>, key: Key) -> Claim {
        let mut state = self.lock();
        let State { layers, idle, count } = &mut *state;
        let layers = layers.entry(key.clone()).or_default();
        let may_share = |shared: &&mut Shared| {
            shared.tenant == *tenant || (shared.source.is_some() && shared.source == source)
        };
        let (id, stage) = match layers.iter_mut().find(may_share) {
            Some(shared) => {
                shared.claims += 1;
                if let Some(place) = shared.idle.take() {
                    idle.remove(&place);
                }
                (shared.id, Arc::clone(&shared.stage))
            }
            None => {
                *count += 1;
                let stage = Arc::new(watch::Sender::new(Stage::Open));
                layers.push(Shared {
                    id: *count,
                    tenant: Arc::clone(tenant),
                    source,
                    stage: Arc::clone(&stage),
                    claims: 1,
                    idle: None,
                });
                (*count, stage)
            }
        };
        Claim { layers: self.clone(), key, id, stage, is_awaited: false }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// One who wanted the layer does not any more.
    fn give_up(&mut self, key: &Key, id: u64) {
        let Some(shared) =
            self.layers.get_mut(key).and_then(|layers| layers.iter_mut().find(|at| at.id == id))
        else {
            return;
        };
        shared.claims -= 1;
        if shared.claims > 0 {
            return;
        }
        let is_kept = match &*shared.stage.borrow() {
            Stage::Done(done) => reports_size(&done.written) <= KEPT_REPORTS,
            Stage::Open | Stage::Running => false,
        };
        if !is_kept {
            return self.forget(key, id);
        }
        self.count += 1;
        shared.idle = Some(self.count);
        self.idle.insert(self.count, (key.clone(), id));
        if self.idle.len() > KEPT
            && let Some((_, (key, id))) = self.idle.pop_first()
        {
            self.forget(&key, id);
        }
    }

    fn forget(&mut self, key: &Key, id: u64) {
        if let Some(layers) = self.layers.get_mut(key) {
            layers.retain(|shared| shared.id != id);
            if layers.is_empty() {
                self.layers.remove(key);
            }
        }
    }
}

impl Claim {
    /// Whether this is the one who does it.
    fn begin(&mut self) -> bool {
        self.is_awaited = self.stage.send_if_modified(|stage| {
            let is_open = matches!(stage, Stage::Open);
            if is_open {
                *stage = Stage::Running;
            }
            is_open
        });
        self.is_awaited
    }

    /// It is, and leaves it to the next one.
    fn leave(&mut self) {
        if std::mem::take(&mut self.is_awaited) {
            self.stage.send_replace(Stage::Open);
        }
    }

    /// It is, and has done it.
    fn end(&mut self, done: Arc<Done>) {
        self.is_awaited = false;
        self.stage.send_replace(Stage::Done(done));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.leave();
        self.layers.lock().give_up(&self.key, self.id);
    }
}

impl Leader {
    /// Of a layer that is shared with nobody.
    pub fn alone() -> Self {
        Self(None)
    }

    /// It is done, and others may have it.
    pub async fn done(self, written: &WrittenLayer) {
        let Some(led) = self.0 else { return };
        let Led { mut claim, repository, everywhere } = *led;
        let done = Arc::new(Done { written: written.clone(), repository });
        claim.end(Arc::clone(&done));
        if let Some(everywhere) = everywhere {
            everywhere.end(&done).await;
        }
    }
}

/// What has to be the same for a layer to be shared, and the repository that it goes to. None for what is not shared: what does
/// not go to a registry, and what no digest describes for certain.
fn key(task: &LayerTask, others: Vec<String>) -> Option<(Key, String)> {
    let LayerTask { layer, plan, output, .. } = task;
    let repository = output.repository()?;
    let descriptor = layer.descriptor.as_ref()?;
    if layer.known_by_diff_id_alone || layer.is_foreign() {
        return None;
    }
    let key = Key {
        digest: descriptor.digest.to_string(),
        size: descriptor.size,
        media_type: descriptor.media_type.clone(),
        diff_id: layer.diff_id.as_ref().map(ToString::to_string),
        keep_stored: layer.keep_stored,
        chain: plan.chain.fingerprint(),
        others,
        form: output.form(),
        verify_diff_ids: plan.verify_diff_ids,
        host: repository.host().to_owned(),
    };
    Some((key, repository.name().to_owned()))
}

/// What somebody else did, if the destination has it or can be given it.
async fn take(task: &LayerTask, done: &Done) -> Result<Option<WrittenLayer>, Error> {
    let LayerTask { layer, output, .. } = task;
    let descriptor = done.written.stored.descriptor(layer);
    let origin = output.repository().map(|repository| repository.sibling(&done.repository));
    if !output.has_layer(&Layer { descriptor, origin, ..layer.clone() }).await? {
        return Ok(None);
    }
    tracing::info!("layer {} was brought there for somebody else", layer.label());
    task.layer_progress().set(LayerState::Reused);
    Ok(Some(WrittenLayer { index: layer.index, ..done.written.clone() }))
}

/// About how much memory the reports take.
fn reports_size(written: &WrittenLayer) -> usize {
    serde_json::to_string(&written.reports).map_or(usize::MAX, |text| text.len())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use bytes::Bytes;
    use occy_pipeline::blob::{ByteCount, LayerStream, MemoryBlob};
    use occy_pipeline::codec::Pool;
    use occy_pipeline::compression::Format;
    use occy_pipeline::digest::Digest;
    use occy_pipeline::element::{Image, StoredLayer};
    use occy_pipeline::filter::FilterChain;
    use occy_pipeline::manifest::{Annotations, Descriptor};
    use occy_pipeline::output::{ExpectedLayer, FinishedImage, ImageOutput, Moved, Receipt};
    use occy_pipeline::progress::Progress;
    use occy_pipeline::registry::{Access, Client, Options, Repository};
    use occy_pipeline::spool::SpoolDir;
    use occy_pipeline::tar::Limits;
    use occy_pipeline::task::LayerPlan;
    use tokio::time::timeout;

    use super::*;

    pub(super) const SOON: Duration = Duration::from_millis(20);

    fn repository(name: &str) -> Repository {
        let client = Client::new(Options::default()).unwrap();
        client.repository(&name.parse().unwrap(), Access::Push)
    }

    /// A destination that is only asked whether it has layers.
    pub(super) struct Asked {
        repository: Repository,
        pub(super) has_layers: AtomicBool,
    }

    #[async_trait::async_trait]
    impl ImageOutput for Asked {
        fn form(&self) -> LayerForm {
            LayerForm::Stored { compression: None }
        }

        async fn begin(&self, _image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
            unreachable!()
        }

        async fn copy_layer(&self, _layer: &Layer, _progress: &ByteCount) -> Result<Moved, Error> {
            unreachable!()
        }

        async fn has_layer(&self, layer: &Layer) -> Result<bool, Error> {
            assert_eq!(
                layer.descriptor.as_ref().map(|descriptor| descriptor.size),
                Some(7),
                "what was written"
            );
            assert_eq!(layer.origin.as_ref().map(Repository::name), Some("first"), "where it was written");
            Ok(self.has_layers.load(Ordering::Relaxed))
        }

        async fn write_layer(
            &self,
            _index: usize,
            _stream: LayerStream,
            _format: Format,
            _progress: &ByteCount,
        ) -> Result<StoredLayer, Error> {
            unreachable!()
        }

        fn repository(&self) -> Option<&Repository> {
            Some(&self.repository)
        }

        async fn finalize(&self, _finished: FinishedImage<'_>) -> Result<Receipt, Error> {
            unreachable!()
        }
    }

    pub(super) fn task(source: &str, destination: &str) -> (LayerTask, Arc<Asked>) {
        let output =
            Arc::new(Asked { repository: repository(destination), has_layers: AtomicBool::new(true) });
        let progress = Progress::default();
        progress.begin(std::iter::once((String::new(), None)));
        let plan = LayerPlan {
            annotations: Annotations::default(),
            chain: FilterChain::default(),
            pool: Pool::shared().clone(),
            spools: SpoolDir::new("/tmp", 0),
            limits: Limits::default(),
            max_layer_size: 0,
            verify_diff_ids: false,
        };
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        let layer = Layer {
            index: 0,
            blob: Arc::new(MemoryBlob::new(Bytes::new())),
            descriptor: Some(Descriptor::new(media_type, &Digest::sha256("layer"), 9)),
            format: Format::Gzip,
            diff_id: None,
            origin: Some(repository(source)),
            keep_stored: true,
            known_by_diff_id_alone: false,
        };
        (LayerTask { layer, plan: Arc::new(plan), output: Arc::clone(&output) as _, progress }, output)
    }

    pub(super) fn written() -> WrittenLayer {
        let stored = StoredLayer::Written { digest: Digest::sha256("made"), size: 7, format: Format::Gzip };
        WrittenLayer { index: 0, stored, diff_id: None, edited: true, reports: Vec::new() }
    }

    async fn turn(layers: &SharedLayers, tenant: &str, task: &LayerTask) -> Turn<()> {
        turn_of(layers, tenant, task, "1").await
    }

    async fn turn_of(layers: &SharedLayers, tenant: &str, task: &LayerTask, version: &str) -> Turn<()> {
        let others = vec![version.to_owned()];
        let wants = Wants { tenant: &tenant.into(), others, elsewhere: None };
        layers.turn(wants, task, || std::future::ready(Ok(()))).await.unwrap()
    }

    async fn lead(layers: &SharedLayers, tenant: &str, task: &LayerTask) -> Leader {
        match timeout(SOON, turn(layers, tenant, task)).await.expect("nobody else is at work") {
            Turn::Lead((), leader) => leader,
            Turn::Taken(_) => panic!("somebody else has done it"),
        }
    }

    #[tokio::test]
    async fn who_comes_while_another_is_at_work_waits_and_takes_what_came_of_it() {
        let layers = SharedLayers::new(Metrics::default());
        let (first, second) = (task("r.io/a", "to.io/first").0, task("r.io/b", "to.io/second").0);
        let leader = lead(&layers, "one", &first).await;
        let mut waiting = std::pin::pin!(turn(&layers, "one", &second));
        assert!(timeout(SOON, &mut waiting).await.is_err(), "it waits");
        leader.done(&written()).await;
        assert!(matches!(waiting.await, Turn::Taken(taken) if taken.stored == written().stored));
        assert!(matches!(turn(&layers, "one", &second).await, Turn::Taken(_)), "and who comes later");
        let elsewhere = task("r.io/a", "other.io/first").0;
        drop(lead(&layers, "one", &elsewhere).await);
    }

    #[tokio::test]
    async fn when_the_one_at_work_fails_the_next_goes_on_and_only_one() {
        let layers = SharedLayers::new(Metrics::default());
        let (first, other) = (task("r.io/a", "to.io/first").0, task("r.io/a", "to.io/second").0);
        let leader = lead(&layers, "one", &first).await;
        let (mut second, mut third) =
            (Box::pin(turn(&layers, "one", &first)), Box::pin(turn(&layers, "one", &other)));
        assert!(timeout(SOON, futures_util::future::select(&mut second, &mut third)).await.is_err());
        drop(leader);
        let Turn::Lead((), leader) = second.await else { panic!("nobody had done it") };
        assert!(timeout(SOON, &mut third).await.is_err(), "it waits again");
        leader.done(&written()).await;
        assert!(matches!(third.await, Turn::Taken(_)));
    }

    #[tokio::test]
    async fn another_tenant_shares_what_both_have_read_of_in_the_same_repository() {
        let layers = SharedLayers::new(Metrics::default());
        let first = task("r.io/a", "to.io/first").0;
        lead(&layers, "one", &first).await.done(&written()).await;
        assert!(matches!(turn(&layers, "two", &first).await, Turn::Taken(_)));
        // Whoever writes a manifest of his own can name any layer in it.
        drop(lead(&layers, "two", &task("evil.io/a", "to.io/second").0).await);
        drop(lead(&layers, "two", &task("r.io/b", "to.io/second").0).await);
    }

    #[tokio::test]
    async fn a_result_that_the_destination_does_not_have_is_made_again_without_waiting() {
        let layers = SharedLayers::new(Metrics::default());
        let (first, output) = task("r.io/a", "to.io/first");
        lead(&layers, "one", &first).await.done(&written()).await;
        output.has_layers.store(false, Ordering::Relaxed);
        let (one, another) = (lead(&layers, "one", &first).await, lead(&layers, "one", &first).await);
        drop(one);
        another.done(&written()).await;
        output.has_layers.store(true, Ordering::Relaxed);
        assert!(matches!(turn(&layers, "one", &first).await, Turn::Taken(_)));
    }

    #[tokio::test]
    async fn what_another_version_of_a_workers_filter_made_is_not_taken() {
        let layers = SharedLayers::new(Metrics::default());
        let first = task("r.io/a", "to.io/first").0;
        lead(&layers, "one", &first).await.done(&written()).await;
        let Turn::Lead((), leader) = turn_of(&layers, "one", &first, "2").await else { panic!("it is old") };
        leader.done(&written()).await;
        assert!(matches!(turn_of(&layers, "one", &first, "2").await, Turn::Taken(_)));
        assert!(matches!(turn(&layers, "one", &first).await, Turn::Taken(_)));
    }

    #[tokio::test]
    async fn little_is_kept_of_what_nobody_wants() {
        let layers = SharedLayers::new(Metrics::default());
        for number in 0..=KEPT {
            let mut one = task("r.io/a", "to.io/first").0;
            one.layer.diff_id = Some(Digest::sha256(number.to_string()));
            drop(lead(&layers, "one", &one).await);
            lead(&layers, "one", &one).await.done(&written()).await;
        }
        let state = layers.lock();
        assert_eq!((state.layers.len(), state.idle.len()), (KEPT, KEPT));
    }
}
