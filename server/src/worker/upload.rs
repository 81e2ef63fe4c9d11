//! How far the upload of a layer has come, over all attempts at it: what one worker says, the next one is told.
//!
//! It is kept here in memory, with the layer, and in no record: a coordinator that is started anew knows of none, and their registries
//! forget them in time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use occy_pipeline::registry::MIN_CHUNK_MAX;
use occy_proto::v1::UploadState;
use occy_worker::uploads::{HASH_STATE_MAX, URL_MAX};

/// Bytes of a digest.
const DIGEST_MAX: usize = 256;

/// The upload of one layer. Clones are handles on the same one.
#[derive(Clone, Debug, Default)]
pub struct Upload(Arc<Mutex<Option<UploadState>>>);

impl Upload {
    /// What the next attempt can go on with.
    pub fn get(&self) -> Option<UploadState> {
        self.lock().clone()
    }

    /// A worker says that it has come so far.
    pub(super) fn set(&self, state: UploadState) {
        *self.lock() = Some(state).filter(|state| !state.session_url.is_empty());
    }

    fn lock(&self) -> MutexGuard<'_, Option<UploadState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether it is as short, and asks for pieces as short, as it has to.
pub(super) fn is_bounded(state: &UploadState) -> bool {
    state.min_chunk <= MIN_CHUNK_MAX as u64
        && state.session_url.len() <= URL_MAX
        && state.hash_state.len() <= HASH_STATE_MAX
        && state.digest.len() <= DIGEST_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_counts_until_there_is_none() {
        let upload = Upload::default();
        let state = |offset| UploadState { session_url: "u".to_owned(), offset, ..UploadState::default() };
        upload.set(state(1));
        upload.set(state(2));
        assert_eq!(upload.clone().get(), Some(state(2)));
        upload.set(UploadState::default());
        assert_eq!(upload.get(), None);
    }

    #[test]
    fn what_is_too_much_is_found_out() {
        let long = |length| UploadState { session_url: "u".repeat(length), ..UploadState::default() };
        assert!(is_bounded(&long(4096)) && !is_bounded(&long(4097)));
        assert!(!is_bounded(&UploadState { hash_state: vec![0; 257].into(), ..UploadState::default() }));
        assert!(!is_bounded(&UploadState { digest: "d".repeat(257), ..UploadState::default() }));
        let pieces = |min_chunk| UploadState { min_chunk, ..UploadState::default() };
        assert!(is_bounded(&pieces(64 << 20)) && !is_bounded(&pieces((64 << 20) + 1)));
    }
}
