//! Blobs up, when the digest is known only at the end: POST, PATCH by PATCH, PUT (distribution-spec, "Pushing a blob in chunks").
//!
//! The stream cannot be read again, so every chunk is held until the registry has acknowledged it, and after a failure the
//! session is asked how far it got. While one chunk is on its way, the next is gathered: an upload holds two chunks at most.

use std::time::{Duration, SystemTime};

use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE};
use reqwest::{Method, Response};

use super::Repository;
use super::chunks::{Chunks, Pieces};
use super::error::{RegistryError, is_transient_status};
use super::manifest::announced_digest;
use super::retry::{Backoff, retry_after};
use super::session::{UploadSession, committed};
use super::transport::protocol;
use super::upload_log::Earlier;
use crate::blob::{BlobError, BlobSummary, ByteCount, LayerStream};
use crate::digest::{Algorithm, Digest, Hasher};

const OCTETS: &str = "application/octet-stream";

/// How far a session is.
enum State {
    Open,
    /// A PATCH was answered with 201: the registry takes the blob for complete.
    Accepted,
}

impl Repository {
    /// Stores a blob as a pipeline produces it.
    ///
    /// A session that the registry gives up (distribution does when a chunk breaks in the middle) is
    /// [`RegistryError::SessionLost`]: whoever can produce the bytes again may try again.
    ///
    /// An upload that is recorded ([`logging_to`](Self::logging_to)) goes on where an earlier one of the same bytes was: those that
    /// the registry has are read and compared by their hash, and not sent. If they are others, the session is lost.
    ///
    /// `progress` counts the bytes that the registry has acknowledged.
    ///
    /// # Cancel safety
    /// Cancelled, it asks the registry to forget the session, unless its log keeps it; nothing is stored under the digest.
    pub async fn upload_stream(
        &self,
        stream: LayerStream,
        progress: &ByteCount,
    ) -> Result<BlobSummary, BlobError> {
        let mut pieces = Pieces::of_layer(stream);
        if self.uploads.is_some() {
            pieces = pieces.hashed(Hasher::new(Algorithm::Sha256));
        }
        match self.earlier(None).await {
            Some(earlier) => self.go_on(earlier, pieces, progress).await,
            None => self.upload_pieces(pieces, None, true, progress).await,
        }
    }

    /// Brings the rest of what an earlier upload has begun. Whatever the registry has against it, or is found wrong with its bytes, the
    /// session is lost: from the start, and in another one, it may be right.
    pub(super) async fn go_on(
        &self,
        earlier: Earlier,
        mut pieces: Pieces,
        progress: &ByteCount,
    ) -> Result<BlobSummary, BlobError> {
        let Earlier { mut session, hasher, committed } = earlier;
        let result = match pieces.go_on_at(&hasher, committed).await {
            Ok(true) => {
                progress.add(committed);
                self.patch_all(&mut session, &mut pieces, committed, Chunks::default(), progress).await
            }
            Ok(false) => Err(session.lost("it was begun with other bytes".to_owned()).into()),
            Err(error @ (BlobError::Digest { .. } | BlobError::Size { .. })) => Err(error),
            // Nothing was sent: whoever produces the bytes again can still go on.
            Err(error) => {
                session.leave();
                return Err(error);
            }
        };
        let result = result.map_err(|error| match error {
            BlobError::Registry(error) if !error.is_transient() => session.lost(error.to_string()).into(),
            BlobError::Digest { .. } | BlobError::Size { .. } => session.lost(error.to_string()).into(),
            error => error,
        });
        Self::end(session, result).await
    }

    /// `session`: one that is there already. `whole`: whether content that fits into one chunk may go in one PUT.
    pub(super) async fn upload_pieces(
        &self,
        mut pieces: Pieces,
        session: Option<UploadSession>,
        whole: bool,
        progress: &ByteCount,
    ) -> Result<BlobSummary, BlobError> {
        let first = pieces.gather(self.host.options.upload_chunk).await?;
        if let Some(summary) = pieces.summary().filter(|_| whole)
            && self.upload_small(&first, &summary, progress).await?
        {
            return Ok(summary);
        }
        let mut session = match session {
            Some(session) => session,
            None => UploadSession::start(self, pieces.digest()).await?,
        };
        let result = self.patch_all(&mut session, &mut pieces, 0, first, progress).await;
        Self::end(session, result).await
    }

    async fn end(
        mut session: UploadSession,
        result: Result<BlobSummary, BlobError>,
    ) -> Result<BlobSummary, BlobError> {
        match &result {
            Ok(_) => session.close(),
            Err(error) => session.fail(error).await,
        }
        result
    }

    /// POST and PUT of what is in memory, from the start again as often as the options allow. False where the registry refuses
    /// this form.
    async fn upload_small(
        &self,
        content: &Chunks,
        summary: &BlobSummary,
        progress: &ByteCount,
    ) -> Result<bool, BlobError> {
        let mut backoff = Backoff::new(&self.host.options);
        loop {
            let mut session = UploadSession::start(self, Some(&summary.digest)).await?;
            let (error, asked) = match self.finish(&mut session, content.clone(), &summary.digest).await {
                Ok(()) => {
                    progress.add(summary.size);
                    session.close();
                    return Ok(true);
                }
                Err(failure) => failure,
            };
            session.delete().await;
            if matches!(error.status(), Some(405 | 411 | 413 | 415 | 501)) {
                return Ok(false);
            }
            // 404: a session that is gone while its blob is not there either.
            if !(error.is_transient() || error.is_not_found()) || !backoff.wait(&error, asked).await {
                return Err(error.into());
            }
            if self.blob_head(&summary.digest).await? == Some(summary.size) {
                progress.add(summary.size);
                return Ok(true);
            }
        }
    }

    async fn patch_all(
        &self,
        session: &mut UploadSession,
        pieces: &mut Pieces,
        mut offset: u64,
        first: Chunks,
        progress: &ByteCount,
    ) -> Result<BlobSummary, BlobError> {
        let wanted = self.host.options.upload_chunk.max(session.min_chunk());
        let blob = pieces.known_digest();
        let mut chunk = pieces.gather_onto(first, wanted).await?;
        while !chunk.is_empty() {
            let passed = pieces.hasher();
            let patched = async {
                // However this ends, the piece is not on its way any more.
                let _turn = match &self.uploads {
                    Some(log) => log.next_piece().await,
                    None => None,
                };
                let state = self.patch(session, &chunk, offset).await?;
                if let State::Open = state {
                    // At once, and not when there is more: a source may take its time.
                    session.record(blob.as_ref(), passed);
                }
                Ok::<_, BlobError>(state)
            };
            let (state, next) = tokio::try_join!(patched, pieces.gather(wanted))?;
            if let State::Accepted = state {
                return self.accepted_early(session, pieces).await;
            }
            offset += chunk.size();
            progress.add(chunk.size());
            chunk = next;
        }
        let Some(summary) = pieces.summary() else { return Err(BlobError::Interrupted) };
        self.close_session(session, &summary).await?;
        Ok(summary)
    }

    /// Sends one chunk until the registry has all of it.
    async fn patch(
        &self,
        session: &mut UploadSession,
        chunk: &Chunks,
        offset: u64,
    ) -> Result<State, RegistryError> {
        let end = offset + chunk.size();
        let mut at = offset;
        let mut backoff = Backoff::new(&self.host.options);
        loop {
            let rest = chunk.tail(at - offset);
            let call = session
                .call(Method::PATCH)
                .header(CONTENT_TYPE, OCTETS)
                .header(CONTENT_RANGE, format!("{at}-{}", end - 1))
                .body(rest);
            let (error, asked) = match self.host.send_once(&call).await {
                Ok(response) => match response.status().as_u16() {
                    201 => return Ok(State::Accepted),
                    200 | 202 | 204 => {
                        let now = acknowledged(session, &response, at, end)?;
                        if now == end {
                            return Ok(State::Open);
                        }
                        at = now;
                        backoff.reset();
                        continue;
                    }
                    404 => {
                        session.close();
                        return Err(session.lost("the registry does not know it any more".to_owned()));
                    }
                    status if status == 416 || is_transient_status(status) => {
                        let asked = retry_after(response.headers(), SystemTime::now());
                        (self.host.failure(response, session.request()).await, asked)
                    }
                    _ => return Err(self.host.failure(response, session.request()).await),
                },
                Err(error) if error.is_transient() => (error, None),
                Err(error) => return Err(error),
            };
            if !backoff.wait(&error, asked).await {
                return Err(error);
            }
            let now = session.committed().await?;
            if now < offset || now > end {
                return Err(session.lost(format!("it has {now} bytes, not {offset} to {end}")));
            }
            if now > at {
                backoff.reset();
            }
            at = now;
            if at == end {
                return Ok(State::Open);
            }
        }
    }

    /// Closes a session whose bytes are all there.
    async fn close_session(
        &self,
        session: &mut UploadSession,
        summary: &BlobSummary,
    ) -> Result<(), BlobError> {
        let mut backoff = Backoff::new(&self.host.options);
        loop {
            let (error, asked) = match self.finish(session, Chunks::default(), &summary.digest).await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            // The session may be gone because it was closed and only the answer was lost.
            if error.is_not_found() {
                if self.blob_head(&summary.digest).await? == Some(summary.size) {
                    return Ok(());
                }
                session.close();
                return Err(session.lost("the registry does not know it any more".to_owned()).into());
            }
            if !error.is_transient() || !backoff.wait(&error, asked).await {
                return Err(error.into());
            }
        }
    }

    /// One PUT that closes a session, with the content or what is left of it.
    async fn finish(
        &self,
        session: &mut UploadSession,
        content: Chunks,
        digest: &Digest,
    ) -> Result<(), (RegistryError, Option<Duration>)> {
        let mut call = session.call(Method::PUT).header(CONTENT_TYPE, OCTETS).body(content);
        call.url = session.closing_url(digest);
        let response = self.host.send_once(&call).await.map_err(|error| (error, None))?;
        if !matches!(response.status().as_u16(), 200 | 201 | 204) {
            let asked = retry_after(response.headers(), SystemTime::now());
            return Err((self.host.failure(response, session.request()).await, asked));
        }
        match announced_digest(response.headers()) {
            Some(stored) if stored.algorithm() == digest.algorithm() && stored != *digest => {
                Err((protocol(session.request(), format!("it stored the blob as {stored}")), None))
            }
            _ => Ok(()),
        }
    }

    /// Reads the stream to its end, which has the digest, and asks whether the registry has the blob under it.
    async fn accepted_early(
        &self,
        session: &mut UploadSession,
        pieces: &mut Pieces,
    ) -> Result<BlobSummary, BlobError> {
        session.close();
        while pieces.next().await?.is_some() {}
        let Some(summary) = pieces.summary() else { return Err(BlobError::Interrupted) };
        if self.blob_head(&summary.digest).await? == Some(summary.size) {
            return Ok(summary);
        }
        Err(session.lost("the registry accepted another blob".to_owned()).into())
    }
}

/// Where a session is after a PATCH from `at` to `end`.
fn acknowledged(
    session: &mut UploadSession,
    response: &Response,
    at: u64,
    end: u64,
) -> Result<u64, RegistryError> {
    session.moved(response)?;
    // A registry that says nothing has taken all.
    let now = committed(response.headers()).unwrap_or(end);
    if now <= at {
        return Err(session.lost(format!("it does not advance beyond {at} bytes")));
    }
    if now > end {
        return Err(session.lost(format!("it has {now} bytes, and got {end}")));
    }
    Ok(now)
}
