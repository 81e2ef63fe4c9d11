//! An upload session: where a blob's bytes go until its digest closes it.

use std::fmt;
use std::sync::LazyLock;
use std::time::Duration;

use reqwest::header::{HeaderMap, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::watch;
use url::Url;

use super::Repository;
use super::error::{Operation, RegistryError, Request};
use super::transport::{Call, location, protocol};
use super::upload_log::UploadState;
use crate::blob::BlobError;
use crate::digest::{Digest, Hasher};

/// How long the last word about an unwanted session may take.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest `OCI-Chunk-Min-Length` that is obeyed, in bytes: a chunk is held in memory.
pub const MIN_CHUNK_MAX: usize = 64 * 1024 * 1024;

/// An upload that a registry has begun. Dropped before its blob is stored, it is deleted, as well as that can be done, unless
/// its [`UploadLog`](super::UploadLog) says that somebody else goes on with it.
pub struct UploadSession {
    repository: Repository,
    request: Box<Request>,
    /// Where the next request goes. Each answer may move it.
    url: Url,
    /// The registry's `OCI-Chunk-Min-Length`, or 0.
    min_chunk: usize,
    /// While the registry still holds it, as far as we know.
    held: Option<Held>,
    /// Whether others may know of it: it is in the repository's log.
    is_recorded: bool,
}

/// How many sessions registries hold for this process.
static HELD: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// A session that is counted.
struct Held;

impl Held {
    fn new() -> Self {
        HELD.send_modify(|sessions| *sessions += 1);
        Self
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.send_modify(|sessions| *sessions -= 1);
    }
}

/// Waits until no registry holds an upload session of this process, or for so long at most.
///
/// A cancelled upload tells its registry in a task of its own. A program that ends calls this before it stops its runtime.
pub async fn uploads_ended(limit: Duration) {
    let mut held = HELD.subscribe();
    let ended = held.wait_for(|sessions| *sessions == 0);
    // In time or not: nobody can do more about it.
    let _ = tokio::time::timeout(limit, ended).await;
}

impl UploadSession {
    /// Begins an upload.
    pub(super) async fn start(
        repository: &Repository,
        digest: Option<&Digest>,
    ) -> Result<Self, RegistryError> {
        let operation = Operation::UploadBlob(digest.cloned());
        let call = repository.call(Method::POST, "blobs/uploads/", operation).await?;
        let response = repository.host.send(&call).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(repository.host.failure(response, &call.request).await);
        }
        Self::from_response(repository, &response, call.request)
    }

    /// The session of a 202.
    pub(super) fn from_response(
        repository: &Repository,
        response: &Response,
        request: Request,
    ) -> Result<Self, RegistryError> {
        let min_chunk = match response.headers().get("oci-chunk-min-length") {
            Some(value) => value.to_str().ok().and_then(|value| value.trim().parse().ok()).unwrap_or(0),
            None => 0,
        };
        let url = upload_location(response, &request)?;
        let request = Box::new(request);
        let session = Self {
            repository: repository.clone(),
            request,
            url,
            min_chunk,
            held: Some(Held::new()),
            is_recorded: false,
        };
        if min_chunk > MIN_CHUNK_MAX {
            let problem = format!("chunks of at least {min_chunk} bytes wanted");
            return Err(protocol(&session.request, problem));
        }
        Ok(session)
    }

    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    pub(super) fn min_chunk(&self) -> usize {
        self.min_chunk
    }

    /// The session of that URL, which another process has begun and been told the `OCI-Chunk-Min-Length` of, and how many bytes it has.
    /// None if nothing can be said of it.
    pub(super) async fn find(
        repository: &Repository,
        digest: Option<&Digest>,
        url: Url,
        min_chunk: usize,
    ) -> Option<(Self, u64)> {
        let request = Box::new(repository.request(Operation::UploadBlob(digest.cloned())));
        let mut session = Self {
            repository: repository.clone(),
            request,
            url,
            min_chunk,
            held: Some(Held::new()),
            is_recorded: true,
        };
        match session.committed().await {
            Ok(committed) => Some((session, committed)),
            Err(error) => {
                tracing::debug!(%error, "an earlier upload session is of no use");
                session.leave();
                None
            }
        }
    }

    /// The registry has acknowledged the bytes that the hasher has taken.
    pub(super) fn record(&mut self, digest: Option<&Digest>, hasher: Option<Hasher>) {
        let (Some(log), Some(hasher)) = (&self.repository.uploads, hasher) else { return };
        if self.repository.is_session(&self.url) {
            let session = self.url.to_string().into();
            let (digest, min_chunk) = (digest.cloned(), self.min_chunk);
            log.record(Some(UploadState { session, digest, hasher, min_chunk }));
            self.is_recorded = true;
        }
    }

    /// The registry has stored the blob, or has ended the session itself.
    pub(super) fn close(&mut self) {
        self.leave();
        self.forget();
    }

    /// Nothing more is done with it here.
    pub(super) fn leave(&mut self) {
        self.held = None;
    }

    /// Nobody else is to go on with it.
    fn forget(&mut self) {
        if std::mem::take(&mut self.is_recorded)
            && let Some(log) = &self.repository.uploads
        {
            log.record(None);
        }
    }

    /// Ends it after an error. One that was recorded may be somebody else's already, who is further, and so is not deleted; where it may
    /// be only for the moment, whoever tries again goes on with it.
    pub(super) async fn fail(mut self, error: &BlobError) {
        match error {
            _ if !self.is_recorded => self.delete().await,
            BlobError::Registry(RegistryError::SessionLost { .. }) => self.close(),
            BlobError::Registry(error) if error.is_transient() => self.leave(),
            _ => self.close(),
        }
    }

    /// Goes where the answer to a PATCH or a GET says.
    pub(super) fn moved(&mut self, response: &Response) -> Result<(), RegistryError> {
        if response.headers().contains_key(reqwest::header::LOCATION) {
            self.url = upload_location(response, &self.request)?;
        }
        Ok(())
    }

    /// The session's own URL, with its query as the registry gave it.
    pub(super) fn url(&self) -> &Url {
        &self.url
    }

    /// The URL that closes the session.
    pub(super) fn closing_url(&self, digest: &Digest) -> Url {
        closing_url(&self.url, digest)
    }

    pub(super) fn call(&self, method: Method) -> Call {
        Call::new(method, self.url.clone(), &[self.repository.scope()], (*self.request).clone())
    }

    /// Bytes that the registry has, asked for after something went wrong.
    pub(super) async fn committed(&mut self) -> Result<u64, RegistryError> {
        let response = self.repository.host.send(&self.call(Method::GET)).await?;
        match response.status() {
            StatusCode::NO_CONTENT | StatusCode::OK | StatusCode::ACCEPTED => {
                self.moved(&response)?;
                committed(response.headers())
                    .ok_or_else(|| self.lost("the registry does not say how much of it has come".to_owned()))
            }
            StatusCode::NOT_FOUND => {
                self.close();
                Err(self.lost("the registry does not know it any more".to_owned()))
            }
            _ => Err(self.repository.host.failure(response, &self.request).await),
        }
    }

    pub(super) fn lost(&self, problem: String) -> RegistryError {
        RegistryError::SessionLost { request: self.request.clone(), problem }
    }

    /// Tells the registry that nothing more will come. Best effort: registries forget sessions in time, too.
    pub(super) async fn delete(mut self) {
        self.forget();
        if let Some(held) = self.held.take() {
            delete(self.repository.clone(), self.call(Method::DELETE), held).await;
        }
    }
}

/// Without the URL, whose query may be a signature.
impl fmt::Debug for UploadSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UploadSession").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Drop for UploadSession {
    fn drop(&mut self) {
        let is_kept = || self.repository.uploads.as_ref().is_some_and(|log| log.is_kept());
        if let Some(held) = self.held.take()
            && !(self.is_recorded && is_kept())
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            // It ends by itself within its time-outs, or with the runtime.
            runtime.spawn(delete(self.repository.clone(), self.call(Method::DELETE), held));
        }
    }
}

async fn delete(repository: Repository, call: Call, _held: Held) {
    match tokio::time::timeout(DELETE_TIMEOUT, repository.host.send_once(&call)).await {
        Ok(Ok(response)) => tracing::debug!(status = response.status().as_u16(), "upload session deleted"),
        Ok(Err(error)) => tracing::debug!(%error, "upload session not deleted"),
        Err(_) => tracing::debug!("upload session not deleted in time"),
    }
}

/// The `Location` of an upload.
///
/// A registry behind a proxy that ends TLS may name itself with plain HTTP; that is mended. Any other way from TLS to plain HTTP
/// is refused.
fn upload_location(response: &Response, request: &Request) -> Result<Url, RegistryError> {
    let mut url = location(response, request)?;
    let asked = response.url();
    if asked.scheme() == "https" && url.scheme() == "http" {
        if asked.host() != url.host() {
            return Err(protocol(request, "an upload Location with plain HTTP".to_owned()));
        }
        // Neither can fail: both URLs are of HTTP and have a host.
        let _ = url.set_scheme("https");
        let _ = url.set_port(asked.port());
    }
    Ok(url)
}

/// The last byte of `Range: 0-N`, plus one. Both forms are in use: with and without `bytes=`.
pub(super) fn committed(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(RANGE)?.to_str().ok()?.trim();
    let value = value.strip_prefix("bytes=").unwrap_or(value);
    let (start, end) = value.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    // `0-0` is one byte in the specification and none in distribution; nobody uploads a byte at a time.
    if start == 0 { Some(if end == 0 { 0 } else { end + 1 }) } else { None }
}

/// Appends `digest=` and leaves the rest of the query as it is, byte by byte: it may be signed.
fn closing_url(url: &Url, digest: &Digest) -> Url {
    let mut url = url.clone();
    let query = match url.query() {
        Some(query) if !query.is_empty() => format!("{query}&digest={digest}"),
        _ => format!("digest={digest}"),
    };
    url.set_query(Some(&query));
    url
}
