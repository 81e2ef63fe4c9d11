//! Blobs up, when digest and size are known before: one POST, and one PUT through which the content streams.
//!
//! Every attempt has a session of its own and opens the content again. Registries that refuse the form, and ways that break in
//! the middle of it more than once, get the content PATCH by PATCH; so does everybody where the upload of a large blob is recorded, for
//! nobody can go on with a PUT.

use std::time::{Duration, SystemTime};

use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};

use super::Repository;
use super::chunks::Pieces;
use super::error::{RegistryError, is_transient_status};
use super::manifest::announced_digest;
use super::retry::{Backoff, retry_after};
use super::sending::{Meter, metered};
use super::session::UploadSession;
use super::transport::protocol;
use super::upload_log::Earlier;
use crate::blob::{Blob, BlobError, BlobSummary, ByteCount};
use crate::digest::{Digest, Hasher};

/// After so many connections that broke in the middle of the content, it goes in pieces, which can be resumed.
const BROKEN_MAX: u32 = 2;

/// How an attempt ended that did not store the blob.
enum Failure {
    /// Another attempt may help, after what the registry asked for.
    Again(RegistryError, Option<Duration>),
    /// The registry does not take the blob in this form, and maybe in the other one.
    Refused(RegistryError),
    Final(BlobError),
}

/// Whether a registry may mean by that that it takes no pieces, or no second one; not where it has taken several.
fn is_refusal(error: &RegistryError, has_several: bool) -> bool {
    match error {
        RegistryError::SessionLost { .. } => !has_several,
        error => matches!(error.status(), Some(400 | 403 | 404 | 416)) && !has_several,
    }
}

impl Repository {
    /// Stores a blob whose digest and size are known, reading it from `blob` as often as needed.
    ///
    /// `session` is one that a [mount](Repository::mount) has left. `progress` counts the bytes of the current attempt.
    ///
    /// An upload that is recorded ([`logging_to`](Self::logging_to)) goes on where an earlier one of the blob was, and reads the blob from
    /// there on if it can be read so. Where that leads to nothing, it begins anew.
    ///
    /// # Cancel safety
    /// Cancelled, it asks the registry to forget the session, unless its log keeps it; nothing is stored under the digest.
    pub async fn upload_blob(
        &self,
        blob: &dyn Blob,
        digest: &Digest,
        size: u64,
        session: Option<UploadSession>,
        progress: &ByteCount,
    ) -> Result<BlobSummary, BlobError> {
        let summary = BlobSummary { digest: digest.clone(), size };
        let mut session = session;
        let mut backoff = Backoff::new(&self.host.options);
        let mut broken = 0;
        let is_resumable = self.uploads.is_some() && size >= self.host.options.resumable_from;
        let is_recorded = self.recorded(Some(digest)).is_some();
        let mut in_pieces = is_resumable || is_recorded;
        // The other form, if it was not tried yet.
        let mut other = Some(!in_pieces);
        let mut refuses_pieces = false;
        loop {
            progress.reset();
            let attempt = if in_pieces {
                self.put_in_pieces(session.take(), blob, digest, size, progress).await
            } else {
                let session = match session.take() {
                    Some(session) => session,
                    None => UploadSession::start(self, Some(digest)).await?,
                };
                self.put_whole(session, blob, digest, size, progress).await
            };
            // Where nobody but us has chosen pieces.
            let is_own_choice = in_pieces && is_resumable && !is_recorded && other.is_some();
            let attempt = attempt.map_err(|failure| match failure {
                Failure::Again(error, _) | Failure::Final(BlobError::Registry(error))
                    if is_own_choice
                        && is_refusal(&error, progress.get() > self.host.options.upload_chunk as u64) =>
                {
                    Failure::Refused(error)
                }
                failure => failure,
            });
            let (error, asked) = match attempt {
                Ok(()) => return Ok(summary),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Refused(error)) => {
                    tracing::debug!(%error, in_pieces, "uploading in another form");
                    refuses_pieces |= in_pieces;
                    let Some(other) = other.take() else { return Err(error.into()) };
                    in_pieces = other;
                    continue;
                }
                Err(Failure::Again(error, asked)) => (error, asked),
            };
            if !backoff.wait(&error, asked).await {
                return Err(error.into());
            }
            // The answer may have been lost, and not the blob.
            if self.blob_head(digest).await? == Some(size) {
                return Ok(summary);
            }
            broken += u32::from(matches!(error, RegistryError::Broken { .. }));
            in_pieces |= broken >= BROKEN_MAX && !refuses_pieces;
        }
    }

    async fn put_in_pieces(
        &self,
        session: Option<UploadSession>,
        blob: &dyn Blob,
        digest: &Digest,
        size: u64,
        progress: &ByteCount,
    ) -> Result<(), Failure> {
        let uploaded = match self.earlier(Some(digest)).await {
            Some(earlier) => self.go_on_with_blob(earlier, blob, digest, size, progress).await,
            None => {
                let content = blob.open().await.map_err(Failure::Final)?;
                let mut pieces = Pieces::of_blob(content, digest, size);
                if self.uploads.is_some() {
                    pieces = pieces.hashed(Hasher::new(digest.algorithm()));
                }
                self.upload_pieces(pieces, session, false, progress).await
            }
        };
        match uploaded {
            Ok(_) => Ok(()),
            // Not every registry can go on with a session whose chunk broke: distribution gives it up.
            Err(BlobError::Registry(error)) if error.is_transient() => Err(Failure::Again(error, None)),
            Err(BlobError::Registry(error))
                if matches!(error.status(), Some(405 | 411 | 413 | 415 | 501)) =>
            {
                Err(Failure::Refused(error))
            }
            Err(error) => Err(Failure::Final(error)),
        }
    }

    /// Brings the rest of a blob, and reads no more of it where that can be had.
    async fn go_on_with_blob(
        &self,
        earlier: Earlier,
        blob: &dyn Blob,
        digest: &Digest,
        size: u64,
        progress: &ByteCount,
    ) -> Result<BlobSummary, BlobError> {
        let (hasher, opened) = match blob.open_behind(&earlier.hasher).await {
            Ok(Some(content)) => (earlier.hasher.clone(), Ok(content)),
            Ok(None) => (Hasher::new(digest.algorithm()), blob.open().await),
            Err(error) => (earlier.hasher.clone(), Err(error)),
        };
        // An error of the source's is that of a source without a byte.
        let content = opened.unwrap_or_else(|error| stream::iter([Err(error)]).boxed());
        self.go_on(earlier, Pieces::of_blob(content, digest, size).hashed(hasher), progress).await
    }

    async fn put_whole(
        &self,
        mut session: UploadSession,
        blob: &dyn Blob,
        digest: &Digest,
        size: u64,
        progress: &ByteCount,
    ) -> Result<(), Failure> {
        let result = self.try_put_whole(&mut session, blob, digest, size, progress).await;
        match &result {
            Ok(()) => session.close(),
            Err(_) => session.delete().await,
        }
        result
    }

    async fn try_put_whole(
        &self,
        session: &mut UploadSession,
        blob: &dyn Blob,
        digest: &Digest,
        size: u64,
        progress: &ByteCount,
    ) -> Result<(), Failure> {
        let request = session.request().clone();
        let content = blob.open().await.map_err(Failure::Final)?;
        let scopes = [self.scope()];
        let authorization = self
            .host
            .authorization(&scopes, &request)
            .await
            .map_err(|error| Failure::Final(error.into()))?
            .filter(|_| self.host.is_own_origin(session.url()));
        let mut put = reqwest::Request::new(Method::PUT, session.closing_url(digest));
        put.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(size));
        put.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if let Some(authorization) = &authorization {
            put.headers_mut().insert(AUTHORIZATION, authorization.header());
        }
        let meter = Meter::new(size, progress, &self.host.options.traffic);
        *put.body_mut() = metered(content, &meter);

        let answered = self.host.execute(put, &request, &meter).await;
        // What is wrong with the content says more than that its transfer broke.
        if let Some(error) = meter.take_error() {
            return Err(Failure::Final(error));
        }
        let response = answered.map_err(|error| match error {
            error if error.is_transient() => Failure::Again(error, None),
            error => Failure::Final(error.into()),
        })?;
        match response.status().as_u16() {
            200 | 201 | 204 => match announced_digest(response.headers()) {
                Some(stored) if stored.algorithm() == digest.algorithm() && stored != *digest => {
                    let problem = format!("it stored the blob as {stored}");
                    Err(Failure::Final(protocol(&request, problem).into()))
                }
                _ => Ok(()),
            },
            // The content of a redirected PUT would have to be read again. In pieces, each of which is at hand, it need not.
            307 | 308 | 404 | 405 | 411 | 413 | 415 | 501 => {
                Err(Failure::Refused(self.host.failure(response, &request).await))
            }
            401 => {
                let other = self.host.reauthorize(&response, &scopes, authorization.as_ref(), &request).await;
                let error = self.host.failure(response, &request).await;
                match other {
                    Ok(Some(_)) => Err(Failure::Again(error, None)),
                    Ok(None) => Err(Failure::Final(error.into())),
                    Err(error) => Err(Failure::Final(error.into())),
                }
            }
            status => {
                let asked = retry_after(response.headers(), SystemTime::now());
                let error = self.host.failure(response, &request).await;
                if is_transient_status(status) {
                    Err(Failure::Again(error, asked))
                } else {
                    Err(Failure::Final(error.into()))
                }
            }
        }
    }
}
