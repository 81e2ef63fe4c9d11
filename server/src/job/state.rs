//! What may happen to a job, in which state: pure, so that every order of events can be tried.
//!
//! A job moves from queued over running and finalizing to one of three ends, which it never leaves. Only a coordinator that
//! starts moves it back: what it finds running or finalizing was interrupted, and is queued again.

use occy_proto::v1::job_event::Event;
use occy_proto::v1::{
    FilterOutput, ImageResult, Job, JobError, JobState, JobStateChanged, LayerState, LayerStatus,
    LayersPlanned, MirrorImages,
};
use prost_types::Timestamp;

/// Something that happens to a job.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A runner takes it.
    Begin,
    /// The source was asked: these are the layers of its image; of an index, of its next image.
    Plan(Vec<LayerStatus>),
    /// A worker took a layer.
    LayerBegun {
        /// Its place.
        index: u32,
        /// The worker's name.
        worker: String,
    },
    /// A layer waits, and not only for its turn.
    LayerWaiting {
        /// Its place.
        index: u32,
        /// Why; empty when that is over.
        reason: String,
    },
    /// The worker that has a layer waits.
    LayerHeld {
        /// Its place.
        index: u32,
        /// Why; empty when that is over.
        reason: String,
    },
    /// A layer is at the destination.
    LayerDone(LayerStatus),
    /// All layers are; the image is about to be made visible.
    Finalize,
    /// A filter's finding about the whole image.
    Found(FilterOutput),
    /// Images of a mirror are done.
    Mirrored(MirrorImages),
    /// The image is at its destination.
    Succeed(Box<ImageResult>),
    /// It is not, and will not be.
    Fail(JobError),
    /// Nobody wants it any more.
    Cancel,
    /// A coordinator that starts found it interrupted.
    Requeue,
}

/// The job is in a state in which that cannot happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a job that is {0:?} cannot change so")]
pub struct Refused(pub JobState);

/// Whether a job in this state will not change any more.
pub fn is_final(state: JobState) -> bool {
    matches!(state, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}

/// Changes the job, and gives the event that tells of it. A change that is refused leaves the job as it was.
pub fn apply(job: &mut Job, change: Change, now: Timestamp) -> Result<Event, Refused> {
    use JobState::{Cancelled, Failed, Finalizing, Queued, Running, Succeeded};
    let state = job.state();
    let event = match (state, change) {
        (Queued, Change::Begin) => {
            job.attempts += 1;
            job.layers.clear();
            enter(job, Running)
        }
        (Running, Change::Plan(layers)) if follow(&job.layers, &layers) => {
            job.layers.extend_from_slice(&layers);
            Event::LayersPlanned(LayersPlanned { layers })
        }
        (Running, Change::LayerBegun { index, worker }) => {
            let layer = layer(job, index).ok_or(Refused(state))?;
            if layer.state() == LayerState::Done {
                return Err(Refused(state));
            }
            layer.set_state(LayerState::Running);
            layer.worker = worker;
            layer.waiting_reason.clear();
            Event::LayerChanged(layer.clone())
        }
        (Running, Change::LayerWaiting { index, reason }) => {
            let layer = layer(job, index).ok_or(Refused(state))?;
            if layer.state() == LayerState::Done {
                return Err(Refused(state));
            }
            layer.set_state(LayerState::Waiting);
            layer.waiting_reason = reason;
            Event::LayerChanged(layer.clone())
        }
        (Running, Change::LayerHeld { index, reason }) => {
            let layer = layer(job, index).ok_or(Refused(state))?;
            if layer.state() != LayerState::Running {
                return Err(Refused(state));
            }
            layer.waiting_reason = reason;
            Event::LayerChanged(layer.clone())
        }
        (Running, Change::LayerDone(done)) => {
            let layer = layer(job, done.index).ok_or(Refused(state))?;
            *layer = LayerStatus {
                state: LayerState::Done.into(),
                worker: std::mem::take(&mut layer.worker),
                ..done
            };
            Event::LayerChanged(layer.clone())
        }
        (Running, Change::Finalize) if job.layers.iter().all(|layer| layer.state() == LayerState::Done) => {
            enter(job, Finalizing)
        }
        (Running, Change::Mirrored(images)) => Event::MirrorImages(images),
        (Finalizing, Change::Found(output)) => Event::FilterOutput(output),
        (Finalizing, Change::Succeed(result)) => {
            job.result = Some(ImageResult::clone(&result));
            job.set_state(Succeeded);
            changed(Succeeded, Some(*result), None)
        }
        (Queued | Running | Finalizing, Change::Fail(error)) => {
            job.error = Some(error.clone());
            job.set_state(Failed);
            changed(Failed, None, Some(error))
        }
        (Queued | Running, Change::Cancel) => enter(job, Cancelled),
        (Running | Finalizing, Change::Requeue) => enter(job, Queued),
        (state, _) => return Err(Refused(state)),
    };
    job.last_sequence += 1;
    job.update_time = Some(now);
    Ok(event)
}

fn enter(job: &mut Job, state: JobState) -> Event {
    job.set_state(state);
    changed(state, None, None)
}

/// Whether the layers of a further image are numbered as those that come next.
fn follow(before: &[LayerStatus], layers: &[LayerStatus]) -> bool {
    layers.iter().zip(before.len()..).all(|(layer, place)| usize::try_from(layer.index) == Ok(place))
}

fn changed(state: JobState, result: Option<ImageResult>, error: Option<JobError>) -> Event {
    Event::StateChanged(JobStateChanged { state: state.into(), result, error })
}

fn layer(job: &mut Job, index: u32) -> Option<&mut LayerStatus> {
    job.layers.get_mut(usize::try_from(index).ok()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_change() -> impl Strategy<Value = Change> {
        let layer =
            |index| LayerStatus { index, state: LayerState::Waiting.into(), ..LayerStatus::default() };
        prop_oneof![
            3 => Just(Change::Begin),
            3 => (0u32..3).prop_map(move |count| Change::Plan((0..count).map(layer).collect())),
            1 => (0u32..4).prop_map(move |next| Change::Plan(vec![layer(next)])),
            3 => (0u32..3).prop_map(|index| Change::LayerBegun { index, worker: "w".to_owned() }),
            2 => (0u32..3).prop_map(|index| Change::LayerWaiting { index, reason: "w".to_owned() }),
            6 => (0u32..3).prop_map(move |index| Change::LayerDone(layer(index))),
            3 => Just(Change::Finalize),
            1 => Just(Change::Found(FilterOutput::default())),
            1 => Just(Change::Mirrored(MirrorImages::default())),
            1 => Just(Change::Succeed(Box::default())),
            1 => Just(Change::Fail(JobError::default())),
            1 => Just(Change::Cancel),
            1 => Just(Change::Requeue),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order, a late result of an earlier attempt included.
        #[test]
        fn an_end_is_final_and_success_comes_through_finalizing_alone(
            changes in prop::collection::vec(any_change(), 0..60)
        ) {
            let mut job = Job { state: JobState::Queued.into(), ..Job::default() };
            let mut ends = 0;
            for change in changes {
                let before = job.clone();
                let result = apply(&mut job, change.clone(), Timestamp::default());
                match result {
                    Err(Refused(state)) => {
                        prop_assert_eq!(state, before.state());
                        prop_assert_eq!(&job, &before, "a refused change changes nothing");
                    }
                    Ok(_) => {
                        prop_assert!(!is_final(before.state()), "{change:?} changed a job that had ended");
                        prop_assert_eq!(job.last_sequence, before.last_sequence + 1, "sequences have no gaps");
                    }
                }
                ends += usize::from(is_final(job.state()) && !is_final(before.state()));
                if job.state() == JobState::Succeeded && before.state() != JobState::Succeeded {
                    prop_assert_eq!(before.state(), JobState::Finalizing);
                }
                let places = job.layers.iter().map(|layer| layer.index);
                prop_assert!(places.eq(0..u32::try_from(job.layers.len()).unwrap()), "layers have their places");
                if job.state() == JobState::Finalizing {
                    prop_assert!(job.layers.iter().all(|layer| layer.state() == LayerState::Done));
                }
                prop_assert_eq!(job.result.is_some(), job.state() == JobState::Succeeded);
                prop_assert_eq!(job.error.is_some(), job.state() == JobState::Failed);
            }
            prop_assert!(ends <= 1);
        }
    }

    #[test]
    fn a_job_that_is_made_visible_cannot_be_cancelled() {
        let mut job = Job { state: JobState::Finalizing.into(), ..Job::default() };
        let refused = apply(&mut job, Change::Cancel, Timestamp::default());
        assert_eq!(refused, Err(Refused(JobState::Finalizing)));
    }
}
