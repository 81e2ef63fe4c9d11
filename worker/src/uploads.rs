//! How far the upload of a task has come: as an earlier attempt has left it, as its registry acknowledges it, and as the coordinator is told
//! of it for the next attempt.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use occy_pipeline::digest::{Digest, Hasher};
use occy_pipeline::registry::{MIN_CHUNK_MAX, UploadLog, UploadState};
use occy_proto::v1;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Bytes of a session's URL.
pub const URL_MAX: usize = 4096;
/// Bytes of the state of a hash.
pub const HASH_STATE_MAX: usize = 256;

/// The upload of one task. Clones are handles on the same one.
#[derive(Clone)]
pub struct Uploads {
    latest: Arc<Mutex<Latest>>,
    /// Woken when there is something to tell.
    changed: Arc<Notify>,
    /// Whose only permit the piece has that is on its way. Closed, no other piece goes.
    turn: Arc<Semaphore>,
    /// Whether the coordinator passes it on.
    is_passed_on: bool,
}

struct Latest {
    state: Option<UploadState>,
    is_told: bool,
    /// Nobody goes on with it.
    is_unwanted: bool,
}

impl Uploads {
    /// That of a task, which may go on with an earlier one. `changed` hears whenever there is something to tell, where the coordinator passes
    /// it on.
    pub fn of(task: &v1::Task, changed: &Arc<Notify>, is_passed_on: bool) -> Self {
        let state = task.resume.as_ref().and_then(read);
        // Who gave it needs not to be told.
        let latest = Arc::new(Mutex::new(Latest { state, is_told: true, is_unwanted: false }));
        Self { latest, changed: Arc::clone(changed), turn: Arc::new(Semaphore::new(1)), is_passed_on }
    }

    /// Where it is recorded. None where nobody would go on with it.
    pub fn log(&self) -> Option<Arc<dyn UploadLog>> {
        self.is_passed_on.then(|| Arc::new(self.clone()) as _)
    }

    /// What the coordinator was not told yet. It counts as told from now on.
    pub fn untold(&self) -> Option<v1::UploadState> {
        let mut latest = self.lock();
        (!std::mem::replace(&mut latest.is_told, true))
            .then(|| latest.state.as_ref().map(written).unwrap_or_default())
    }

    /// What was told may not have arrived.
    pub fn tell_again(&self) {
        let mut latest = self.lock();
        latest.is_told &= latest.state.is_none();
        drop(latest);
        self.changed.notify_one();
    }

    /// Lets no other piece go, and waits until the one that is on its way, if there is one, has arrived or was given up.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it lets pieces go again.
    pub async fn pause(&self) {
        // Who waits stands in line, so that no piece comes between. An error says that this was done before.
        if let Ok(_turn) = self.turn.acquire().await {
            self.turn.close();
        }
    }

    /// Nobody wants the layer any more, so that its registry may forget the session when the task ends.
    pub fn give_up(&self) {
        self.lock().is_unwanted = true;
    }

    fn lock(&self) -> MutexGuard<'_, Latest> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl UploadLog for Uploads {
    fn latest(&self) -> Option<UploadState> {
        self.lock().state.clone()
    }

    async fn next_piece(&self) -> Option<OwnedSemaphorePermit> {
        match Arc::clone(&self.turn).acquire_owned().await {
            Ok(turn) => Some(turn),
            // Until the task is handed back.
            Err(_) => std::future::pending().await,
        }
    }

    fn record(&self, state: Option<UploadState>) {
        let mut latest = self.lock();
        latest.state = state.filter(|state| state.session.expose().len() <= URL_MAX);
        latest.is_told = false;
        drop(latest);
        self.changed.notify_one();
    }

    fn is_kept(&self) -> bool {
        !self.lock().is_unwanted
    }
}

impl fmt::Debug for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uploads").field("state", &self.lock().state).finish_non_exhaustive()
    }
}

fn written(state: &UploadState) -> v1::UploadState {
    v1::UploadState {
        session_url: state.session.expose().to_owned(),
        offset: state.hasher.size(),
        digest: state.digest.as_ref().map(Digest::to_string).unwrap_or_default(),
        hash_state: state.hasher.state().into(),
        min_chunk: state.min_chunk as u64,
    }
}

/// None of what cannot be used.
fn read(state: &v1::UploadState) -> Option<UploadState> {
    let digest = match state.digest.as_str() {
        "" => None,
        text => Some(text.parse().ok()?),
    };
    let hasher = Hasher::from_state(&state.hash_state).filter(|hasher| hasher.size() == state.offset)?;
    let min_chunk = usize::try_from(state.min_chunk).ok().filter(|&size| size <= MIN_CHUNK_MAX)?;
    let is_url = !state.session_url.is_empty() && state.session_url.len() <= URL_MAX;
    is_url.then(|| UploadState { session: state.session_url.clone().into(), digest, hasher, min_chunk })
}

#[cfg(test)]
mod tests {
    use occy_pipeline::digest::Algorithm;

    use super::*;

    fn state(bytes: &[u8]) -> UploadState {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        let session = "http://registry.example/v2/app/blobs/uploads/1?_state=x".to_owned().into();
        UploadState { session, digest: Some(Digest::sha256("all")), hasher, min_chunk: 1 << 20 }
    }

    fn uploads(resume: Option<v1::UploadState>) -> Uploads {
        Uploads::of(&v1::Task { resume, ..v1::Task::default() }, &Arc::default(), true)
    }

    #[test]
    fn what_one_worker_tells_the_next_one_goes_on_with() {
        let first = uploads(None);
        assert!(first.latest().is_none() && first.untold().is_none());
        first.record(Some(state(b"some")));
        let told = first.untold().unwrap();
        assert!(first.untold().is_none(), "it is told once");
        assert!(told.hash_state.len() <= HASH_STATE_MAX);
        let second = uploads(Some(told.clone()));
        assert!(second.untold().is_none());
        let (latest, expected) = (second.latest().unwrap(), state(b"some"));
        assert_eq!(latest.session.expose(), expected.session.expose());
        assert_eq!((latest.digest, latest.min_chunk), (expected.digest, expected.min_chunk));
        assert_eq!(latest.hasher.finish(), Digest::sha256("some"));
        first.tell_again();
        assert_eq!(first.untold(), Some(told));
        first.record(None);
        assert_eq!(first.untold(), Some(v1::UploadState::default()));
        first.tell_again();
        assert!(first.untold().is_none(), "there is nothing that could have been lost");
    }

    #[test]
    fn what_cannot_be_used_is_as_nothing() {
        let good = || written(&state(b"some"));
        let none = [
            v1::UploadState::default(),
            v1::UploadState { session_url: String::new(), ..good() },
            v1::UploadState { session_url: "u".repeat(URL_MAX + 1), ..good() },
            v1::UploadState { offset: 5, ..good() },
            v1::UploadState { digest: "none".to_owned(), ..good() },
            v1::UploadState { hash_state: vec![1; 40].into(), ..good() },
            v1::UploadState { min_chunk: MIN_CHUNK_MAX as u64 + 1, ..good() },
            v1::UploadState { min_chunk: u64::MAX, ..good() },
        ];
        for bad in none {
            assert!(uploads(Some(bad.clone())).latest().is_none(), "{bad:?}");
        }
        let uploads = uploads(Some(good()));
        assert!(uploads.is_kept() && uploads.latest().is_some());
        uploads.give_up();
        assert!(!uploads.is_kept());
        let long = format!("http://{}", "u".repeat(URL_MAX));
        uploads.record(Some(UploadState { session: long.into(), ..state(b"") }));
        assert!(uploads.latest().is_none());
    }

    #[tokio::test]
    async fn a_pause_waits_for_the_piece_that_is_on_its_way_and_lets_no_other_go() {
        for is_recorded in [true, false] {
            let uploads = uploads(None);
            drop(uploads.next_piece().await);
            let turn = uploads.next_piece().await;
            let pausing = uploads.clone();
            let pause = tokio::spawn(async move { pausing.pause().await });
            tokio::task::yield_now().await;
            if is_recorded {
                uploads.record(Some(state(b"some")));
            }
            tokio::task::yield_now().await;
            assert!(!pause.is_finished(), "it is on its way");
            drop(turn);
            pause.await.unwrap();
            let next = tokio::time::timeout(std::time::Duration::from_millis(20), uploads.next_piece());
            assert!(next.await.is_err());
            // Where nothing is on its way there is nothing to wait for.
            uploads.pause().await;
        }
    }

    #[tokio::test]
    async fn a_pause_that_is_given_up_lets_pieces_go_again() {
        let uploads = uploads(None);
        let turn = uploads.next_piece().await;
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), uploads.pause()).await.is_err());
        drop(turn);
        assert!(uploads.next_piece().await.is_some());
    }

    #[test]
    fn nobody_sees_where_a_session_is() {
        let uploads = uploads(Some(written(&state(b"some"))));
        let shown = format!("{uploads:?} {:?}", written(&state(b"some")));
        assert!(!shown.contains("registry.example"), "{shown}");
    }
}
