//! What every engine must do, whatever it is made of.
//!
//! Each test is a function over a [`Place`]: an engine that can be opened several times, one after the other or at once, as the
//! coordinators of one installation do.

use std::sync::Arc;
use std::time::Duration;

use occy_proto::v1::job_event::Event;
use occy_proto::v1::{Job, JobError, JobEvent, JobState, LayerState, LayerStatus, PipelineSpec};

use super::layers::{LayerResult, LayerTurn, SeenLayer, Sharer};
use super::{Applied, Claim, Engine, Limits, Submission, Submitted, Written};
use crate::job::state::Change;

/// Where an engine keeps what it knows.
#[async_trait::async_trait]
pub(super) trait Place: Send + Sync {
    /// A coordinator's engine.
    async fn open(&self, limits: Limits) -> Arc<dyn Engine>;

    /// The coordinator is killed: nobody hears of it any more, and its lease runs out. Gives the engine of the next one.
    async fn replace(&self, killed: Arc<dyn Engine>) -> Arc<dyn Engine>;
}

/// All of the contract's tests for a place.
macro_rules! contract {
    ($place:expr => $($name:ident),+ $(,)?) => {
        $(
            #[tokio::test]
            async fn $name() {
                crate::engine::contract::$name(&$place).await;
            }
        )+
    };
    ($place:expr) => {
        crate::engine::contract::contract!($place =>
            a_key_makes_one_job_and_keeps_its_meaning,
            tenants_have_keys_and_limits_of_their_own,
            changes_are_there_for_the_next_coordinator,
            events_come_once_and_in_order_however_many,
            the_oldest_that_have_ended_are_forgotten,
            a_job_has_one_owner,
            a_stale_claim_changes_nothing,
            a_job_whose_owner_is_gone_is_queued_again,
            a_cancelled_job_has_no_owner,
            who_waits_for_a_job_is_woken,
            one_job_at_a_time_makes_an_image_visible,
            one_job_at_a_time_does_a_layer,
            what_came_of_a_layer_is_there_for_those_who_may_share_it,
        );
    };
}
pub(super) use contract;

pub(super) const LIMITS: Limits = Limits { active: 3, active_each: 3, kept: 4 };

fn submission(tenant: &str, source: &str, key: &str) -> Submission {
    Submission {
        id: uuid::Uuid::now_v7().to_string(),
        tenant: tenant.into(),
        spec: PipelineSpec { source: source.to_owned(), ..PipelineSpec::default() },
        key: key.to_owned(),
        sealed: Some(b"sealed".to_vec()),
        trace: Some("trace".to_owned()),
    }
}

async fn submit(engine: &dyn Engine, source: &str, key: &str) -> Job {
    match engine.submit(submission("", source, key)).await.unwrap() {
        Submitted::New(job) => job,
        other => panic!("{other:?}"),
    }
}

async fn claim(engine: &dyn Engine, id: &str) -> Claim {
    engine.claim(id).await.unwrap().expect("it waits for an owner").0
}

async fn unowned(engine: &dyn Engine) -> Vec<String> {
    engine.unowned().await.unwrap().into_iter().map(|(id, _)| id).collect()
}

/// All events, page by page.
async fn events(engine: &dyn Engine, id: &str) -> Vec<JobEvent> {
    let mut all: Vec<JobEvent> = Vec::new();
    loop {
        let page = engine.events(id, all.last().map_or(0, |event| event.sequence)).await.unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

fn sequences(events: &[JobEvent]) -> Vec<u64> {
    events.iter().map(|event| event.sequence).collect()
}

fn layers(count: u32) -> Vec<LayerStatus> {
    let layer = |index| LayerStatus { index, state: LayerState::Waiting.into(), ..LayerStatus::default() };
    (0..count).map(layer).collect()
}

pub(super) async fn a_key_makes_one_job_and_keeps_its_meaning(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let job = submit(&*engine, "a", "key").await;
    let again = engine.submit(submission("", "a", "key")).await.unwrap();
    assert!(matches!(again, Submitted::Earlier(earlier) if earlier == job));
    assert!(matches!(engine.submit(submission("", "b", "key")).await.unwrap(), Submitted::KeyReused));
    assert_ne!(submit(&*engine, "a", "").await.id, submit(&*engine, "a", "").await.id);
    assert!(matches!(engine.submit(submission("", "a", "")).await.unwrap(), Submitted::Full));
    assert!(matches!(engine.submit(submission("", "a", "key")).await.unwrap(), Submitted::Earlier(_)));
}

pub(super) async fn tenants_have_keys_and_limits_of_their_own(place: &impl Place) {
    let engine = place.open(Limits { active_each: 1, ..LIMITS }).await;
    let submit = async |tenant: &str, source: &str| engine.submit(submission(tenant, source, "key")).await;
    let Submitted::New(job) = submit("one", "a").await.unwrap() else { panic!("it is new") };
    assert_eq!(job.tenant, "one");
    assert!(matches!(submit("two", "b").await.unwrap(), Submitted::New(_)));
    assert!(matches!(submit("two", "b").await.unwrap(), Submitted::Earlier(_)));
    let more = engine.submit(submission("one", "a", "")).await.unwrap();
    assert!(matches!(more, Submitted::FullForTenant));
    let (jobs, _) = engine.list(Some("one".into()), None, Vec::new(), 10).await.unwrap();
    assert_eq!(jobs, [job]);
}

pub(super) async fn changes_are_there_for_the_next_coordinator(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let job = submit(&*engine, "a", "").await;
    let id = job.id;
    let claim = claim(&*engine, &id).await;
    let written = Some(Written { layer: "layer".to_owned(), record: "record".to_owned() });
    let applied = engine.change(&claim, vec![Change::Plan(Vec::new())], written).await.unwrap();
    assert!(matches!(applied, Applied::Done(_)));
    let refused = engine.change(&claim, vec![Change::Finalize, Change::Begin], None).await.unwrap();
    assert!(matches!(refused, Applied::Refused(job) if job.state() == JobState::Running));
    let engine = place.replace(engine).await;
    let job = engine.get(&id).await.unwrap().unwrap();
    assert_eq!((job.state(), job.last_sequence, job.attempts), (JobState::Running, 2, 1));
    assert_eq!(job.spec.unwrap().source, "a");
    let all = engine.events(&id, 0).await.unwrap();
    assert_eq!(sequences(&all), [1, 2], "none of a change that was refused");
    assert_eq!(sequences(&engine.events(&id, 1).await.unwrap()), [2]);
    assert_eq!(engine.written(&id, "layer").await.unwrap().as_deref(), Some("record"));
    assert_eq!(engine.written(&id, "other").await.unwrap(), None);
    assert_eq!(engine.sealed(&id).await.unwrap().as_deref(), Some(&b"sealed"[..]));
    assert_eq!(engine.trace(&id).await.unwrap().as_deref(), Some("trace"));
    assert!(matches!(engine.cancel(&id).await.unwrap(), Applied::Done(_)));
    assert_eq!(engine.sealed(&id).await.unwrap(), None);
    assert_eq!(engine.trace(&id).await.unwrap(), None);
    assert_eq!(engine.written(&id, "layer").await.unwrap(), None);
    assert!(unowned(&*engine).await.is_empty());
    assert_eq!(engine.get(&uuid::Uuid::now_v7().to_string()).await.unwrap(), None);
    assert!(matches!(engine.cancel("00000000-0000-7000-8000-000000000000").await.unwrap(), Applied::Missing));
}

pub(super) async fn events_come_once_and_in_order_however_many(place: &impl Place) {
    const LAYERS: u32 = 300;
    let engine = place.open(LIMITS).await;
    let job = submit(&*engine, "a", "").await;
    let claim = claim(&*engine, &job.id).await;
    engine.change(&claim, vec![Change::Plan(layers(LAYERS))], None).await.unwrap();
    // The last of them large: what does not fit beside the others goes elsewhere.
    for changes in [0..LAYERS / 2, LAYERS / 2..LAYERS] {
        let text = |index| if index > 250 { "x".repeat(10_000) } else { String::new() };
        let done = changes.map(|index| {
            let layer = LayerStatus { index, label: text(index), ..LayerStatus::default() };
            Change::LayerDone(layer)
        });
        let applied = engine.change(&claim, done.collect(), None).await.unwrap();
        assert!(matches!(applied, Applied::Done(_)));
    }
    let all = events(&*engine, &job.id).await;
    assert_eq!(sequences(&all), (1..=u64::from(LAYERS) + 2).collect::<Vec<_>>());
    let done: Vec<_> = all
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::LayerChanged(layer)) => Some(layer.index),
            _ => None,
        })
        .collect();
    assert_eq!(done, (0..LAYERS).collect::<Vec<_>>());
    let engine = place.replace(engine).await;
    assert_eq!(events(&*engine, &job.id).await, all, "the next coordinator tells the same");
}

pub(super) async fn the_oldest_that_have_ended_are_forgotten(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let running = submit(&*engine, "running", "").await;
    let mut ended = Vec::new();
    for number in 0..6 {
        let job = submit(&*engine, "a", &format!("key {number}")).await;
        engine.cancel(&job.id).await.unwrap();
        ended.push(job.id);
    }
    let (jobs, more) = engine.list(None, None, Vec::new(), 10).await.unwrap();
    let ids: Vec<_> = jobs.iter().map(|job| &job.id).collect();
    assert_eq!(ids, [&ended[5], &ended[4], &ended[3], &running.id]);
    assert!(!more);
    assert_eq!(engine.get(&ended[0]).await.unwrap(), None);
    assert!(engine.events(&ended[0], 0).await.unwrap().is_empty());
    submit(&*engine, "another", "key 0").await;
    let before = Some(ended[5].clone());
    let (page, more) = engine.list(None, before, vec![JobState::Cancelled], 1).await.unwrap();
    assert_eq!((page[0].id.clone(), more), (ended[4].clone(), false));
}

pub(super) async fn a_job_has_one_owner(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let job = submit(&*engine, "a", "").await;
    assert_eq!(unowned(&*engine).await, std::slice::from_ref(&job.id));
    let (claim, running) = engine.claim(&job.id).await.unwrap().expect("it waits");
    assert_eq!((running.state(), running.attempts), (JobState::Running, 1));
    assert_eq!(engine.claim(&job.id).await.unwrap(), None);
    assert!(engine.holds(&claim).await.unwrap() && engine.extend(&claim).await.unwrap());
    assert!(unowned(&*engine).await.is_empty(), "it has an owner");
    assert_eq!(engine.get(&job.id).await.unwrap().unwrap().state(), JobState::Running);
    // Of many who try at once, one gets it.
    engine.release(&claim).await.unwrap();
    let (one, two, three) = tokio::join!(engine.claim(&job.id), engine.claim(&job.id), engine.claim(&job.id));
    let claims = [one, two, three].map(|claim| claim.unwrap().is_some());
    assert_eq!(claims.iter().filter(|&&is_owner| is_owner).count(), 1);
    assert_eq!(engine.get(&job.id).await.unwrap().unwrap().attempts, 2);
}

pub(super) async fn a_stale_claim_changes_nothing(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let job = submit(&*engine, "a", "").await;
    let stale = claim(&*engine, &job.id).await;
    engine.release(&stale).await.unwrap();
    for owner in [None, Some(claim(&*engine, &job.id).await)] {
        assert!(owner.as_ref().is_none_or(|owner| owner.epoch > stale.epoch));
        let before = engine.get(&job.id).await.unwrap().unwrap();
        let written = Some(Written { layer: "layer".to_owned(), record: "stale".to_owned() });
        for change in [Change::Plan(layers(1)), Change::Fail(JobError::default()), Change::Finalize] {
            let applied = engine.change(&stale, vec![change], written.clone()).await.unwrap();
            assert!(matches!(applied, Applied::Stale), "{applied:?}");
        }
        engine.release(&stale).await.unwrap();
        assert!(!engine.holds(&stale).await.unwrap() && !engine.extend(&stale).await.unwrap());
        assert_eq!(engine.get(&job.id).await.unwrap().unwrap(), before);
        assert_eq!(engine.written(&job.id, "layer").await.unwrap(), None);
        if let Some(owner) = owner {
            assert!(engine.holds(&owner).await.unwrap(), "the owner's claim is untouched");
        }
    }
}

pub(super) async fn a_job_whose_owner_is_gone_is_queued_again(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let (first, second) = (submit(&*engine, "a", "").await, submit(&*engine, "b", "").await);
    let stale = claim(&*engine, &first.id).await;
    let finalize = vec![Change::Plan(Vec::new()), Change::Finalize];
    engine.change(&stale, finalize.clone(), None).await.unwrap();
    let engine = place.replace(engine).await;
    assert_eq!(unowned(&*engine).await, [first.id.clone(), second.id], "the oldest first");
    assert_eq!(engine.get(&first.id).await.unwrap().unwrap().state(), JobState::Queued);
    let owner = claim(&*engine, &first.id).await;
    engine.change(&owner, finalize, None).await.unwrap();
    let succeed = vec![Change::Succeed(Box::default())];
    assert!(matches!(engine.change(&owner, succeed, None).await.unwrap(), Applied::Done(_)));
    assert!(!engine.holds(&owner).await.unwrap(), "what has ended has no owner");
    let states: Vec<_> = events(&*engine, &first.id)
        .await
        .into_iter()
        .filter_map(|event| match event.event {
            Some(Event::StateChanged(change)) => Some(change.state()),
            _ => None,
        })
        .collect();
    use JobState::{Finalizing, Queued, Running, Succeeded};
    assert_eq!(states, [Running, Finalizing, Queued, Running, Finalizing, Succeeded]);
}

pub(super) async fn a_cancelled_job_has_no_owner(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let job = submit(&*engine, "a", "").await;
    let claim = claim(&*engine, &job.id).await;
    assert!(matches!(engine.cancel(&job.id).await.unwrap(), Applied::Done(_)));
    assert!(!engine.holds(&claim).await.unwrap() && !engine.extend(&claim).await.unwrap());
    let late = engine.change(&claim, vec![Change::Plan(Vec::new())], None).await.unwrap();
    assert!(!matches!(late, Applied::Done(_)), "{late:?}");
    let again = engine.cancel(&job.id).await.unwrap();
    assert!(matches!(again, Applied::Refused(job) if job.state() == JobState::Cancelled));
    assert_eq!(engine.claim(&job.id).await.unwrap(), None);
}

pub(super) async fn who_waits_for_a_job_is_woken(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let (job, other) = (submit(&*engine, "a", "").await, submit(&*engine, "b", "").await);
    let mut changed = engine.subscribe(&job.id);
    changed.mark_unchanged();
    let claim = claim(&*engine, &job.id).await;
    changed.changed().await.unwrap();
    engine.change(&claim, vec![Change::Plan(Vec::new())], None).await.unwrap();
    changed.changed().await.unwrap();
    assert_eq!(sequences(&events(&*engine, &job.id).await), [1, 2]);
    drop(other);
}

pub(super) async fn one_job_at_a_time_makes_an_image_visible(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let (one, two) = (submit(&*engine, "a", "").await.id, submit(&*engine, "b", "").await.id);
    let (one, two) = (claim(&*engine, &one).await, claim(&*engine, &two).await);
    assert!(engine.lock(&one, "here").await.unwrap());
    assert!(engine.lock(&one, "here").await.unwrap(), "it has it already");
    assert!(engine.lock(&two, "there").await.unwrap(), "another place");
    let waits = async |claim, unlock: Claim| {
        let waiting = tokio::time::timeout(Duration::from_millis(400), engine.lock(claim, "here")).await;
        assert!(waiting.is_err(), "it is another's");
        let (locked, unlocked) = tokio::join!(engine.lock(claim, "here"), engine.unlock(&unlock, "here"));
        unlocked.unwrap();
        locked.unwrap()
    };
    assert!(waits(&two, one.clone()).await);
    // The end of a job is the end of its lock.
    let again = tokio::time::timeout(Duration::from_millis(400), engine.lock(&one, "here")).await;
    assert!(again.is_err());
    engine.cancel(&two.id).await.unwrap();
    assert!(engine.lock(&one, "here").await.unwrap());
    assert!(!engine.lock(&two, "here").await.unwrap(), "it has ended");
}

fn sharer(claim: &Claim, tenant: &str) -> Sharer {
    Sharer {
        claim: claim.clone(),
        coordinator: format!("of {}", claim.id),
        tenant: tenant.into(),
        source: Some("r.io/app".to_owned()),
    }
}

async fn look(engine: &dyn Engine, who: &Sharer) -> SeenLayer {
    engine.layer_turn("layer", who).await.unwrap()
}

pub(super) async fn one_job_at_a_time_does_a_layer(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let (one, two) = (submit(&*engine, "a", "").await.id, submit(&*engine, "b", "").await.id);
    let (one, two) = (claim(&*engine, &one).await, claim(&*engine, &two).await);
    let (first, second) = (sharer(&one, ""), sharer(&two, ""));
    // Both see that nobody is at work, and one gets the turn.
    let (here, there) = tokio::join!(look(&*engine, &first), look(&*engine, &second));
    assert_eq!((&here.turn, &there.turn), (&LayerTurn::Free, &LayerTurn::Free));
    assert!(engine.take_layer(here.clone(), &first).await.unwrap());
    assert!(!engine.take_layer(there, &second).await.unwrap());
    assert!(!engine.take_layer(here, &first).await.unwrap(), "it is not as it was");
    assert_eq!(look(&*engine, &second).await.turn, LayerTurn::Held(one.clone()));
    let other = engine.layer_turn("another layer", &second).await.unwrap();
    assert_eq!(other.turn, LayerTurn::Free);
    // Who has it may begin it again.
    let again = look(&*engine, &first).await;
    assert!(engine.take_layer(again, &first).await.unwrap());
    // The end of its claim is the end of its turn; its job in its next attempt is one who wants it like others.
    engine.release(&one).await.unwrap();
    let seen = look(&*engine, &second).await;
    assert_eq!(seen.turn, LayerTurn::Free);
    assert!(engine.take_layer(seen, &second).await.unwrap());
    let one = sharer(&claim(&*engine, &one.id).await, "");
    assert_eq!(look(&*engine, &one).await.turn, LayerTurn::Held(two.clone()));
    engine.cancel(&two.id).await.unwrap();
    let seen = look(&*engine, &one).await;
    assert!(engine.take_layer(seen, &one).await.unwrap());
    // So is that of a coordinator that is killed, when its jobs were found without an owner.
    let engine = place.replace(engine).await;
    unowned(&*engine).await;
    let last = sharer(&claim(&*engine, &one.claim.id).await, "");
    assert_eq!(look(&*engine, &last).await.turn, LayerTurn::Free);
}

pub(super) async fn what_came_of_a_layer_is_there_for_those_who_may_share_it(place: &impl Place) {
    let engine = place.open(LIMITS).await;
    let (one, two) = (submit(&*engine, "a", "").await.id, submit(&*engine, "b", "").await.id);
    let (one, two) = (claim(&*engine, &one).await, claim(&*engine, &two).await);
    let (first, second) = (sharer(&one, "one"), sharer(&two, "two"));
    let stranger = Sharer { source: None, ..sharer(&two, "three") };
    let done = |record: &str| {
        LayerTurn::Done(LayerResult { coordinator: first.coordinator.clone(), record: record.to_owned() })
    };
    let seen = look(&*engine, &first).await;
    assert!(engine.take_layer(seen, &first).await.unwrap());
    engine.end_layer("layer", &first, Some("made".to_owned())).await.unwrap();
    assert_eq!(look(&*engine, &second).await.turn, done("made"));
    assert_eq!(look(&*engine, &stranger).await.turn, LayerTurn::Free);
    // It outlives the job that made it.
    engine.cancel(&one.id).await.unwrap();
    let seen = look(&*engine, &second).await;
    assert_eq!(seen.turn, done("made"));
    // Who cannot use it does it again, once.
    assert!(engine.take_layer(seen.clone(), &second).await.unwrap());
    assert!(!engine.take_layer(seen, &second).await.unwrap());
    let third = sharer(&one, "one");
    assert_eq!(look(&*engine, &third).await.turn, LayerTurn::Held(two.clone()));
    // What somebody does beside him is there at once.
    engine.end_layer("layer", &third, Some("beside".to_owned())).await.unwrap();
    assert_eq!(look(&*engine, &second).await.turn, done("beside"));
    let seen = look(&*engine, &third).await;
    assert!(!engine.take_layer(seen, &third).await.unwrap(), "it is another's turn");
    assert_eq!(look(&*engine, &third).await.turn, LayerTurn::Held(two));
    // What is of no use for others is the next one's to do.
    engine.end_layer("layer", &second, None).await.unwrap();
    assert_eq!(look(&*engine, &third).await.turn, LayerTurn::Free);
}
