//! The layers of jobs among all coordinators that have the engine: one does a layer, the others wait, and take what came of it.
//!
//! Who waits here has no worker. He is woken when something happens to the job that has the turn, looks now and then besides, and waits for
//! as long as a layer of that size may take at most; then he does it himself. What another coordinator says is believed as
//! little as what is known here: what came of a layer counts when one's own destination has it.
//!
//! Nothing of this can fail: where the engine does not answer soon, a layer is done as if nobody else wanted it.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Done, KEPT_REPORTS, Key, reports_size};
use crate::engine::layers::{LayerResult, LayerTurn, SeenLayer, Sharer};
use crate::engine::{Claim, Engine, EngineError};
use crate::metrics::{Metrics, SharedBy};
use crate::schedule::Tenant;
use crate::written::Record;

/// How long the engine may take to answer.
const ANSWER: Duration = Duration::from_secs(3);
/// How often who waits looks, at least.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// And at most, however often the job changes that has the turn.
const PAUSE: Duration = Duration::from_millis(100);
/// How long another one's turn is waited for, at least.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a layer for which it is waited a second more.
const BYTES_A_SECOND: u64 = 4 * 1024 * 1024;

/// A job that shares its layers with those of other coordinators.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    /// What they have in common.
    pub engine: Arc<dyn Engine>,
    /// The right to the job.
    pub claim: Claim,
    /// What this coordinator is called.
    pub coordinator: String,
}

/// One's turn at a layer, among all coordinators.
#[derive(Debug)]
pub(super) struct EveryTurn {
    engine: Arc<dyn Engine>,
    who: Sharer,
    layer: String,
    patience: Duration,
    /// Until when others are waited for, since one was at work.
    until: Option<Instant>,
    /// How the layer was when nobody was at work, or what came of it is no use here. None: it is done without a turn.
    seen: Option<SeenLayer>,
    /// Whether it may be this one's turn, of whose end nobody was told.
    is_held: bool,
}

/// What came of a layer, for other coordinators.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    /// The repository that has it.
    repository: String,
    written: Record,
}

impl Elsewhere {
    /// The turn at a layer.
    pub(super) fn turn(&self, key: &Key, tenant: &Tenant, source: Option<String>) -> EveryTurn {
        let Self { engine, claim, coordinator } = self.clone();
        EveryTurn {
            engine,
            who: Sharer { claim, coordinator, tenant: Arc::clone(tenant), source },
            layer: key.to_string(),
            patience: PATIENCE + Duration::from_secs(key.size / BYTES_A_SECOND),
            until: None,
            seen: None,
            is_held: false,
        }
    }
}

impl EveryTurn {
    /// Waits as long as another job is at work, and gives what came of it and who says so; or None, when it is to be done here.
    ///
    /// # Cancel safety
    /// Dropped, it has waited, and that counts the next time.
    pub(super) async fn result(&mut self) -> Option<(Done, SharedBy)> {
        self.seen = None;
        let mut holder: Option<(Claim, watch::Receiver<u64>)> = None;
        while self.until.is_none_or(|until| Instant::now() < until) {
            let seen = answered(self.engine.layer_turn(&self.layer, &self.who)).await?;
            match &seen.turn {
                LayerTurn::Crowded => return None,
                LayerTurn::Free => {
                    self.seen = Some(seen);
                    return None;
                }
                LayerTurn::Done(result) => {
                    let result = self.read(result);
                    self.seen = Some(seen);
                    return result;
                }
                LayerTurn::Held(claim) => {
                    let until = *self.until.get_or_insert_with(|| Instant::now() + self.patience);
                    match &mut holder {
                        Some((known, changed)) if known == claim => {
                            sleep(PAUSE).await;
                            // Whichever comes first, it is only a reason to look again.
                            let _ =
                                timeout_at(until.min(Instant::now() + LOOK_EVERY), changed.changed()).await;
                        }
                        // What has happened meanwhile is seen by looking again.
                        _ => holder = Some((claim.clone(), self.engine.subscribe(&claim.id))),
                    }
                }
            }
        }
        None
    }

    /// Takes the turn for oneself. False: another job has taken it meanwhile.
    pub(super) async fn begin(&mut self, metrics: &Metrics) -> bool {
        match self.seen.take() {
            Some(seen) => {
                self.is_held = true;
                let is_taken = answered(self.engine.take_layer(seen, &self.who)).await;
                self.is_held = is_taken != Some(false);
                is_taken.unwrap_or(true)
            }
            None => {
                if self.until.is_some_and(|until| Instant::now() >= until) {
                    metrics.layer_repeated();
                }
                true
            }
        }
    }

    /// Says what came of it, if it is little enough to be kept.
    pub(super) async fn end(mut self, done: &Done) {
        let kept = Some(done).filter(|done| reports_size(&done.written) <= KEPT_REPORTS);
        let result = kept.map(|Done { written, repository }| {
            let told = Told { repository: repository.clone(), written: written.into() };
            serde_json::to_string(&told).expect("it is plain data")
        });
        answered(self.engine.end_layer(&self.layer, &self.who, result)).await;
        self.is_held = false;
    }

    /// None: another version said it.
    fn read(&self, result: &LayerResult) -> Option<(Done, SharedBy)> {
        let Told { repository, written } = serde_json::from_str(&result.record).ok()?;
        let is_own = result.coordinator == self.who.coordinator;
        let by = if is_own { SharedBy::Same } else { SharedBy::Other };
        // Where it stands in an image is the taker's to say.
        Some((Done { written: written.layer(0)?, repository }, by))
    }
}

/// The job goes on, and this layer of it does not: who waits must not wait for the job's end.
impl Drop for EveryTurn {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_held {
            let (engine, layer, who) = (Arc::clone(&self.engine), self.layer.clone(), self.who.clone());
            runtime.spawn(async move { answered(engine.end_layer(&layer, &who, None)).await });
        }
    }
}

/// What the engine answers, if it does so soon.
async fn answered<T>(answer: impl Future<Output = Result<T, EngineError>>) -> Option<T> {
    match timeout(ANSWER, answer).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::warn!(%error, "a layer is not shared with other coordinators");
            None
        }
        Err(_) => {
            tracing::warn!(
                "a layer is not shared with other coordinators: the engine did not answer for {ANSWER:?}"
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use futures_util::future::{Either, select};
    use occy_pipeline::element::WrittenLayer;
    use occy_pipeline::executor::LayerTask;
    use occy_pipeline::filter::Report;
    use occy_proto::v1::PipelineSpec;
    use tempfile::TempDir;

    use super::*;
    use crate::engine::embedded::Store;
    use crate::engine::jetstream::simulated::Nats;
    use crate::engine::{Limits, Submission, Submitted};
    use crate::share::tests::{SOON, task, written};
    use crate::share::{Leader, SharedLayers, Turn, Wants};
    use crate::simulation::world::{Link, World};

    const LIMITS: Limits = Limits { active: 9, active_each: 9, kept: 9 };

    /// An engine that several coordinators have.
    fn engine() -> (TempDir, Arc<dyn Engine>) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("jobs"), LIMITS).unwrap();
        (directory, Arc::new(store))
    }

    /// A coordinator with one job.
    struct Coordinator {
        layers: SharedLayers,
        job: Elsewhere,
    }

    impl Coordinator {
        async fn new(engine: &Arc<dyn Engine>, name: &str) -> Self {
            let submission = Submission {
                id: uuid::Uuid::now_v7().to_string(),
                tenant: "".into(),
                spec: PipelineSpec::default(),
                key: String::new(),
                sealed: None,
                trace: None,
            };
            let Submitted::New(job) = engine.submit(submission).await.unwrap() else { panic!("it is new") };
            let (claim, _) = engine.claim(&job.id).await.unwrap().expect("it waits");
            let job = Elsewhere { engine: Arc::clone(engine), claim, coordinator: name.to_owned() };
            Self { layers: SharedLayers::new(Metrics::default()), job }
        }

        async fn turn(&self, task: &LayerTask) -> Turn<()> {
            self.turn_of("", task).await
        }

        async fn turn_of(&self, tenant: &str, task: &LayerTask) -> Turn<()> {
            let lease = || std::future::ready(Ok(()));
            let wants = Wants { tenant: &tenant.into(), others: Vec::new(), elsewhere: Some(&self.job) };
            self.layers.turn(wants, task, lease).await.unwrap()
        }

        async fn lead(&self, task: &LayerTask) -> Leader {
            match timeout(SOON, self.turn(task)).await.expect("nobody else is at work") {
                Turn::Lead((), leader) => leader,
                Turn::Taken(_) => panic!("somebody else has done it"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_while_another_coordinator_is_at_work_waits_and_takes_what_came_of_it() {
        let (_directory, engine) = engine();
        let (one, two) = (Coordinator::new(&engine, "one").await, Coordinator::new(&engine, "two").await);
        let (first, second) = (task("r.io/a", "to.io/first").0, task("r.io/b", "to.io/second").0);
        let leader = one.lead(&first).await;
        let mut waiting = std::pin::pin!(two.turn(&second));
        assert!(timeout(SOON, &mut waiting).await.is_err(), "it waits");
        leader.done(&written()).await;
        assert!(matches!(waiting.await, Turn::Taken(taken) if taken.stored == written().stored));
        // Later too, and who has read of it in the same place, but no stranger.
        let three = Coordinator::new(&engine, "three").await;
        assert!(matches!(three.turn(&second).await, Turn::Taken(_)));
        assert!(matches!(three.turn_of("another", &first).await, Turn::Taken(_)));
        assert!(matches!(three.turn_of("another", &second).await, Turn::Lead(..)));
        // What is done with it, and where it goes, is another layer.
        drop(three.lead(&task("r.io/a", "other.io/first").0).await);
    }

    #[tokio::test(start_paused = true)]
    async fn when_the_one_at_work_has_lost_its_job_the_next_goes_on_and_only_one() {
        let (_directory, engine) = engine();
        let (one, two) = (Coordinator::new(&engine, "one").await, Coordinator::new(&engine, "two").await);
        let three = Coordinator::new(&engine, "three").await;
        let layer = task("r.io/a", "to.io/first").0;
        let _killed = one.lead(&layer).await;
        let (mut second, mut third) = (Box::pin(two.turn(&layer)), Box::pin(three.turn(&layer)));
        assert!(timeout(SOON, select(&mut second, &mut third)).await.is_err());
        engine.cancel(&one.job.claim.id).await.unwrap();
        let next = select(second, third).await;
        let (Either::Left((turn, mut waiting)) | Either::Right((turn, mut waiting))) = next;
        let Turn::Lead((), leader) = turn else { panic!("nobody had done it") };
        assert!(timeout(SOON, &mut waiting).await.is_err(), "it waits again");
        leader.done(&written()).await;
        assert!(matches!(waiting.await, Turn::Taken(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn when_a_layer_fails_and_its_job_goes_on_the_next_one_need_not_wait_for_its_end() {
        let (_directory, engine) = engine();
        let (one, two) = (Coordinator::new(&engine, "one").await, Coordinator::new(&engine, "two").await);
        let layer = task("r.io/a", "to.io/first").0;
        let failed = one.lead(&layer).await;
        let mut waiting = std::pin::pin!(two.turn(&layer));
        assert!(timeout(SOON, &mut waiting).await.is_err(), "it waits");
        drop(failed);
        let soon = timeout(2 * LOOK_EVERY, waiting).await.expect("it does not wait for the job");
        assert!(matches!(soon, Turn::Lead(..)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_result_that_the_destination_does_not_have_is_made_again_once() {
        let (_directory, engine) = engine();
        let (one, two) = (Coordinator::new(&engine, "one").await, Coordinator::new(&engine, "two").await);
        let (layer, output) = task("r.io/a", "to.io/first");
        one.lead(&layer).await.done(&written()).await;
        output.has_layers.store(false, Ordering::Relaxed);
        let leader = two.lead(&layer).await;
        let mut waiting = std::pin::pin!(one.turn(&layer));
        assert!(timeout(SOON, &mut waiting).await.is_err(), "it is made by the other one");
        output.has_layers.store(true, Ordering::Relaxed);
        leader.done(&written()).await;
        assert!(matches!(waiting.await, Turn::Taken(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_filters_found_is_not_kept_if_it_is_large() {
        let (_directory, engine) = engine();
        let (one, two) = (Coordinator::new(&engine, "one").await, Coordinator::new(&engine, "two").await);
        let layer = task("r.io/a", "to.io/first").0;
        let found = |size| WrittenLayer {
            reports: vec![Some(Report::Other { text: "x".repeat(size) })],
            ..written()
        };
        one.lead(&layer).await.done(&found(KEPT_REPORTS)).await;
        // It need not wait for anybody.
        two.lead(&layer).await.done(&found(KEPT_REPORTS - 100)).await;
        let three = Coordinator::new(&engine, "three").await;
        assert!(matches!(three.turn(&layer).await, Turn::Taken(taken) if taken.reports.len() == 1));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_waited_for_as_long_as_it_may_take_does_it_too() {
        let (_directory, engine) = engine();
        let (one, two) = (Coordinator::new(&engine, "one").await, Coordinator::new(&engine, "two").await);
        let mut layer = task("r.io/a", "to.io/first").0;
        if let Some(descriptor) = &mut layer.layer.descriptor {
            descriptor.size = 10 * BYTES_A_SECOND;
        }
        let slow = one.lead(&layer).await;
        let start = Instant::now();
        let Turn::Lead((), leader) = two.turn(&layer).await else { panic!("nobody has done it") };
        let waited = start.elapsed();
        assert!((70..72).contains(&waited.as_secs()), "{waited:?}");
        // Whose is there first is everybody's.
        leader.done(&written()).await;
        let three = Coordinator::new(&engine, "three").await;
        let last = task("r.io/a", "to.io/first").0;
        assert!(matches!(three.turn(&layer).await, Turn::Taken(_)));
        drop(three.lead(&last).await);
        slow.done(&written()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_layer_does_not_wait_for_an_engine_that_does_not_answer() {
        let world = World::new(1, false);
        let link = Link::new(&world, 0);
        let engine = Nats::new(&world, Duration::from_secs(10)).open(&link, LIMITS).await.unwrap();
        let engine: Arc<dyn Engine> = Arc::new(engine);
        let one = Coordinator::new(&engine, "one").await;
        let layer = task("r.io/a", "to.io/first").0;
        link.cut(Duration::from_secs(1000));
        let start = Instant::now();
        let Turn::Lead((), leader) = one.turn(&layer).await else { panic!("nobody has done it") };
        leader.done(&written()).await;
        let took = start.elapsed();
        assert!(took >= ANSWER && took < ANSWER * 3, "{took:?}");
    }
}
