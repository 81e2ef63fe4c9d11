//! Blobs down: a stream that survives broken connections and ends without an error only after the right bytes.
//!
//! A body that breaks is resumed with `Range`. Registries may ignore it (a 200: the bytes that were delivered already are read
//! again, compared by hash, and dropped) or answer with another range (which is then not tried again).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, HeaderMap, RANGE};
use reqwest::{Method, Response, StatusCode};

use super::budget::Held;
use super::error::{Operation, RegistryError};
use super::host::RegistryHost;
use super::manifest::content_length;
use super::retry::Backoff;
use super::transport::{Call, protocol};
use super::{Repository, http};
use crate::blob::{Blob, BlobError, BlobRef, ByteStream, CHUNK};
use crate::digest::{Digest, Hasher};

/// Bytes that must have come since the last failure for it to be forgotten.
const PROGRESS: u64 = 1024 * 1024;
/// How long the last bytes of a blob may take, which are only a hint.
const TAIL_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug)]
struct RegistryBlob {
    repository: Repository,
    digest: Digest,
    size: Option<u64>,
}

impl Repository {
    /// A blob of the repository. The size, where the descriptor has told it, is checked like the digest.
    pub fn blob(&self, digest: &Digest, size: Option<u64>) -> BlobRef {
        Arc::new(RegistryBlob { repository: self.clone(), digest: digest.clone(), size })
    }
}

#[async_trait::async_trait]
impl Blob for RegistryBlob {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let operation = Operation::GetBlob(self.digest.clone());
        let call = self.repository.call(Method::GET, &format!("blobs/{}", self.digest), operation).await?;
        read(Arc::clone(&self.repository.host), call, &self.digest, self.size).await
    }

    async fn open_behind(&self, read: &Hasher) -> Result<Option<ByteStream>, BlobError> {
        if read.algorithm() != self.digest.algorithm() || self.size.is_none_or(|size| size < read.size()) {
            return Ok(None);
        }
        let operation = Operation::GetBlob(self.digest.clone());
        let call = self.repository.call(Method::GET, &format!("blobs/{}", self.digest), operation).await?;
        let host = Arc::clone(&self.repository.host);
        read_behind(host, call, &self.digest, self.size, read.clone()).await.map(Some)
    }

    fn size(&self) -> Option<u64> {
        self.size
    }

    fn identity(&self) -> String {
        self.digest.to_string()
    }

    async fn tail(&self) -> Option<[u8; 4]> {
        // Nobody is to wait for a hint.
        tokio::time::timeout(TAIL_TIMEOUT, self.ask_for_tail()).await.ok()?
    }
}

impl RegistryBlob {
    async fn ask_for_tail(&self) -> Option<[u8; 4]> {
        let start = self.size?.checked_sub(4)?;
        let operation = Operation::GetBlob(self.digest.clone());
        let call =
            self.repository.call(Method::GET, &format!("blobs/{}", self.digest), operation).await.ok()?;
        let call =
            call.header(ACCEPT_ENCODING, "identity").header(RANGE, format!("bytes={start}-{}", start + 3));
        let mut response = self.repository.host.send_once(&call).await.ok()?;
        // A registry that ignores the range sends the whole blob, which is not waited for.
        if response.status() != StatusCode::PARTIAL_CONTENT || range_start(response.headers()) != Some(start)
        {
            return None;
        }
        let mut tail = Vec::new();
        while let Some(bytes) = response.chunk().await.ok()? {
            tail.extend_from_slice(&bytes);
            if tail.len() > 4 {
                return None;
            }
        }
        tail.try_into().ok()
    }
}

/// The bytes that `host` answers a call with, which have to be those of the digest and, where it is known, of the size.
pub(super) async fn read(
    host: Arc<RegistryHost>,
    call: Call,
    digest: &Digest,
    size: Option<u64>,
) -> Result<ByteStream, BlobError> {
    read_behind(host, call, digest, size, Hasher::new(digest.algorithm())).await
}

/// The same, behind the bytes that `hasher` has taken.
async fn read_behind(
    host: Arc<RegistryHost>,
    call: Call,
    digest: &Digest,
    size: Option<u64>,
    hasher: Hasher,
) -> Result<ByteStream, BlobError> {
    let failed_at = hasher.size();
    let mut reader = Reader {
        backoff: Backoff::new(&host.options),
        host,
        hasher,
        digest: digest.clone(),
        size,
        // An intermediary must not encode what is hashed.
        call: call.header(ACCEPT_ENCODING, "identity"),
        body: None,
        done: false,
        ranges: true,
        failed_at,
    };
    if failed_at > 0 && size == Some(failed_at) {
        reader.check_digest()?;
        reader.done = true;
    } else {
        reader.connect().await?;
    }
    Ok(Box::pin(stream::try_unfold(reader, |mut reader| async move {
        Ok(reader.next().await?.map(|bytes| (bytes, reader)))
    })))
}

struct Reader {
    host: Arc<RegistryHost>,
    digest: Digest,
    size: Option<u64>,
    call: Call,
    /// Of all bytes that were delivered.
    hasher: Hasher,
    /// The connection, while there is one.
    body: Option<Body>,
    /// All was delivered and found right.
    done: bool,
    /// Whether this registry is still believed to answer `Range` rightly.
    ranges: bool,
    backoff: Backoff,
    failed_at: u64,
}

struct Body {
    response: Response,
    /// What came and is not delivered yet.
    pending: Bytes,
    skip: Option<Skip>,
}

/// Bytes that come again although they were delivered already.
struct Skip {
    left: u64,
    hasher: Hasher,
}

impl Reader {
    /// The next piece, at most [`CHUNK`] bytes.
    ///
    /// The last piece of a blob whose size is known is handed out only once the digest is right, so that nobody downstream ever
    /// completes a blob of wrong bytes.
    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        loop {
            if self.done {
                return Ok(None);
            }
            let Some(Body { response, pending, .. }) = &mut self.body else {
                self.connect().await?;
                continue;
            };
            if !pending.is_empty() {
                let piece = pending.split_to(pending.len().min(CHUNK));
                let piece = self.skip(piece)?;
                if piece.is_empty() {
                    continue;
                }
                return self.deliver(piece).await.map(Some);
            }
            let patience = self.host.options.read_timeout;
            let failure = match tokio::time::timeout(patience, response.chunk()).await {
                Ok(Ok(Some(chunk))) => {
                    self.host.options.traffic.add_received(chunk.len());
                    *pending = chunk;
                    continue;
                }
                Ok(Ok(None)) if self.size.is_none_or(|size| size == self.hasher.size()) => {
                    self.check_digest()?;
                    self.call.held = None;
                    self.done = true;
                    continue;
                }
                Ok(Ok(None)) => RegistryError::Broken {
                    request: Box::new(self.call.request.clone()),
                    cause: "the body ended early".to_owned(),
                },
                Ok(Err(error)) => http::describe(error, &self.call.request, &self.call.url, patience),
                Err(_) => {
                    RegistryError::Timeout { request: Box::new(self.call.request.clone()), after: patience }
                }
            };
            self.failed(failure).await?;
        }
    }

    /// Waits before the next connection, unless there were too many without progress.
    async fn failed(&mut self, failure: RegistryError) -> Result<(), BlobError> {
        self.body = None;
        let at = self.hasher.size();
        if at - self.failed_at >= PROGRESS {
            self.backoff.reset();
        }
        self.failed_at = at;
        if self.backoff.wait(&failure, None).await {
            return Ok(());
        }
        match (self.size, failure) {
            // The registry believes that it delivered all.
            (Some(expected), RegistryError::Broken { cause, .. }) if cause == "the body ended early" => {
                Err(BlobError::Size { expected, actual: at })
            }
            (_, failure) => Err(failure.into()),
        }
    }

    /// Asks for the bytes from where we are.
    async fn connect(&mut self) -> Result<(), BlobError> {
        let at = self.hasher.size();
        loop {
            self.call.headers.remove(RANGE);
            let ranged = at > 0 && self.ranges;
            if ranged {
                let range =
                    format!("bytes={at}-").parse().unwrap_or_else(|_| unreachable!("digits are visible"));
                self.call.headers.insert(RANGE, range);
            }
            let response = self.host.send(&self.call).await?;
            self.call.held = response.extensions().get::<Held>().cloned();
            let skip = match response.status() {
                StatusCode::OK => {
                    self.check_length(&response)?;
                    (at > 0).then(|| Skip { left: at, hasher: Hasher::new(self.digest.algorithm()) })
                }
                StatusCode::PARTIAL_CONTENT if ranged && range_start(response.headers()) == Some(at) => None,
                StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE if ranged => {
                    self.ranges = false;
                    continue;
                }
                status if status.is_success() => {
                    return Err(protocol(&self.call.request, format!("status {}", status.as_u16())).into());
                }
                _ => return Err(self.host.failure(response, &self.call.request).await.into()),
            };
            self.body = Some(Body { response, pending: Bytes::new(), skip });
            return Ok(());
        }
    }

    /// A blob of another length than the descriptor's is the wrong one from the start.
    fn check_length(&mut self, response: &Response) -> Result<(), BlobError> {
        match (self.size, content_length(response.headers())) {
            (Some(expected), Some(actual)) if expected != actual => Err(BlobError::Size { expected, actual }),
            (None, length) => {
                self.size = length;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Drops what was delivered before, after a look at whether it is the same. Returns what follows it.
    fn skip(&mut self, mut piece: Bytes) -> Result<Bytes, BlobError> {
        let Some(Body { skip, .. }) = &mut self.body else { return Ok(piece) };
        let Some(Skip { left, hasher }) = skip else { return Ok(piece) };
        let known = piece.split_to(usize::try_from(*left).map_or(piece.len(), |left| left.min(piece.len())));
        hasher.update(&known);
        *left -= known.len() as u64;
        if *left == 0 {
            let (expected, computed) = (self.hasher.clone().finish(), hasher.clone().finish());
            if expected != computed {
                return Err(BlobError::Digest { expected, computed, size: hasher.size() });
            }
            *skip = None;
        }
        Ok(piece)
    }

    async fn deliver(&mut self, piece: Bytes) -> Result<Bytes, BlobError> {
        let end = self.hasher.size() + piece.len() as u64;
        if let Some(expected) = self.size
            && end > expected
        {
            return Err(BlobError::Size { expected, actual: end });
        }
        self.hasher.update(&piece);
        if self.size == Some(end) {
            self.check_digest()?;
            self.check_end(end).await?;
            self.body = None;
            self.call.held = None;
            self.done = true;
        }
        Ok(piece)
    }

    fn check_digest(&self) -> Result<(), BlobError> {
        let computed = self.hasher.clone().finish();
        if computed == self.digest {
            return Ok(());
        }
        Err(BlobError::Digest { expected: self.digest.clone(), computed, size: self.hasher.size() })
    }

    /// Nothing may follow. To read the end also lets the connection be used again.
    async fn check_end(&mut self, size: u64) -> Result<(), BlobError> {
        let Some(Body { response, pending, .. }) = &mut self.body else { return Ok(()) };
        let mut extra = pending.len();
        while extra == 0 {
            match tokio::time::timeout(self.host.options.read_timeout, response.chunk()).await {
                Ok(Ok(Some(chunk))) => extra = chunk.len(),
                // All bytes are here and right; how the connection ends is of no matter.
                Ok(Ok(None) | Err(_)) | Err(_) => return Ok(()),
            }
        }
        Err(BlobError::Size { expected: size, actual: size + extra as u64 })
    }
}

/// Where a partial answer starts: `Content-Range: bytes START-END/TOTAL`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?.trim();
    let (start, _) = value.strip_prefix("bytes")?.trim_start().split_once('-')?;
    start.trim().parse().ok()
}
