//! What outlives an upload that breaks off together with its process, so that another process goes on with it: where its session is,
//! and what the registry has of it.
//!
//! Who runs the upload says where that is kept ([`Repository::logging_to`]). What it gets back from there is a stranger's word: a
//! session is only believed at the place where the registry has its own, the registry says how much it has, and at the end
//! the digest of all bytes is checked as ever.

use std::fmt;
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use url::Url;

use super::Repository;
use super::credentials::Secret;
use super::session::UploadSession;
use crate::digest::{Digest, Hasher};

/// How far an upload has come: as far as the registry has acknowledged it.
#[derive(Clone, Debug)]
pub struct UploadState {
    /// The session's URL. Who knows it may be able to write there.
    pub session: Secret,
    /// The digest of the blob, where it was known before. None: the bytes come out of filters, or of another compression, and so do
    /// those of whoever goes on with them.
    pub digest: Option<Digest>,
    /// Of the bytes that are there: its size is the session's.
    pub hasher: Hasher,
    /// The registry's `OCI-Chunk-Min-Length` in bytes, at most [`MIN_CHUNK_MAX`](super::MIN_CHUNK_MAX); 0 where it said none. It says so when
    /// a session begins, and not again.
    pub min_chunk: usize,
}

/// Keeps the state of the upload of one layer.
#[async_trait::async_trait]
pub trait UploadLog: Send + Sync + fmt::Debug {
    /// The state that was recorded last, maybe by an earlier attempt at the same layer.
    fn latest(&self) -> Option<UploadState>;

    /// Waits until another piece may be sent: a session is better left between two pieces than in one, with which some registries give it up.
    /// What it gives, if anything, is held until the piece has arrived and is recorded, or is given up.
    async fn next_piece(&self) -> Option<OwnedSemaphorePermit> {
        None
    }

    /// The upload has come so far. None: there is no session any more that could be gone on with.
    fn record(&self, state: Option<UploadState>);

    /// Whether the registry is to keep a recorded session whose upload is cancelled: somebody else goes on with it.
    fn is_kept(&self) -> bool;
}

/// An upload that was begun before.
pub(super) struct Earlier {
    pub(super) session: UploadSession,
    /// Of the first bytes that the session has.
    pub(super) hasher: Hasher,
    /// How many bytes it has, which are not fewer.
    pub(super) committed: u64,
}

impl Repository {
    /// The same, where uploads are recorded in `log`, and go on with what was recorded there: those of one layer.
    #[must_use]
    pub fn logging_to(self, log: Arc<dyn UploadLog>) -> Self {
        Self { uploads: Some(log), ..self }
    }

    /// What is recorded of an upload of the blob, or, without a digest, of what is produced.
    pub(super) fn recorded(&self, digest: Option<&Digest>) -> Option<UploadState> {
        self.uploads.as_ref()?.latest().filter(|state| state.digest.as_ref() == digest)
    }

    /// The upload that is recorded of it, if it can be gone on with.
    pub(super) async fn earlier(&self, digest: Option<&Digest>) -> Option<Earlier> {
        let UploadState { session, hasher, min_chunk, .. } = self.recorded(digest)?;
        let found = match self.session_url(&session).await {
            Some(url) => UploadSession::find(self, digest, url, min_chunk).await,
            None => None,
        };
        match found {
            Some((session, committed)) if committed >= hasher.size() => {
                tracing::info!(committed, "going on with an upload that was begun before");
                Some(Earlier { session, hasher, committed })
            }
            // It has lost something of what it had; or it is not there any more, which is not worth a word.
            Some((session, _)) => {
                session.delete().await;
                None
            }
            None => {
                tracing::debug!("an upload that was begun before cannot be gone on with");
                self.uploads.as_ref()?.record(None);
                None
            }
        }
    }

    async fn session_url(&self, text: &Secret) -> Option<Url> {
        // Only a registry that is known has a place of its own. What is wrong with it will be said by what follows.
        self.host.base().await.ok()?;
        Url::parse(text.expose()).ok().filter(|url| self.is_session(url))
    }

    /// Whether a URL is where the registry itself has the upload sessions of this repository, as most do. What somebody says is a
    /// session gets nothing of ours anywhere else, be it a request.
    pub(super) fn is_session(&self, url: &Url) -> bool {
        let Some(base) = self.host.known_base() else { return false };
        let sessions = format!("{}{}/blobs/uploads/", base.path(), self.name);
        let id = url.path().strip_prefix(&sessions);
        self.host.is_own_origin(url) && id.is_some_and(|id| !id.is_empty() && !id.contains(['/', '%']))
    }
}
