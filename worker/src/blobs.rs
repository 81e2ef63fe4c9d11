//! Bytes that only the coordinator has, and a destination that only it can write: BlobService, as a layer's blob and as an output.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use occy_pipeline::blob::{
    Blob, BlobError, BlobSummary, BufferPool, ByteCount, ByteStream, CHUNK, LayerPiece, LayerStream,
};
use occy_pipeline::compression::Format;
use occy_pipeline::digest::Digest;
use occy_pipeline::element::{Image, Layer, StoredLayer};
use occy_pipeline::error::Error;
use occy_pipeline::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Moved, Receipt};
use occy_pipeline::registry::Secret;
use occy_pipeline::wire::convert;
use occy_proto::v1::blob_service_client::BlobServiceClient;
use occy_proto::v1::write_blob_request::Part;
use occy_proto::v1::{
    BlobKind, BlobStatusRequest, BlobStatusResponse, ReadBlobRequest, ReadBlobResponse, WriteBlobCommit,
    WriteBlobRequest, WriteBlobStart,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// How often reading goes on after it broke, without a byte between.
const RETRIES: u32 = 4;
/// The wait before the first of these; it doubles from then on.
const BACKOFF: Duration = Duration::from_millis(200);
/// Messages that wait for the connection: about a megabyte.
const MESSAGES: usize = 4;
/// Bytes of an upload that are kept until later ones are sent. A stream that breaks goes on where it was if no more than that was lost
/// on its way, which is more than connections hold.
const KEPT: u64 = 8 * 1024 * 1024;

/// The bytes of one attempt, at its coordinator. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Blobs {
    client: BlobServiceClient<Channel>,
    attempt: Secret,
}

/// The coordinator did not give or take bytes.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator {did}: {}", .status.message())]
pub struct BlobServiceError {
    did: &'static str,
    #[source]
    status: Box<Status>,
}

impl BlobServiceError {
    fn of(did: &'static str, status: Status) -> BlobError {
        BlobError::Host(Box::new(Self { did, status: Box::new(status) }))
    }
}

impl Blobs {
    /// Those of the attempt with this token.
    pub fn new(client: BlobServiceClient<Channel>, attempt: Secret) -> Self {
        Self { client, attempt }
    }

    /// The layer that the task is about. `identity` is its name.
    pub fn layer(&self, identity: String, size: Option<u64>) -> CoordinatorBlob {
        CoordinatorBlob { blobs: self.clone(), identity, size }
    }

    /// The task's destination, which takes layers in this form.
    pub fn output(&self, form: LayerForm) -> CoordinatorOutput {
        CoordinatorOutput { blobs: self.clone(), form }
    }

    async fn read(&self, offset: u64) -> Result<Streaming<ReadBlobResponse>, Status> {
        let request = ReadBlobRequest { attempt: self.attempt.expose().to_owned(), offset };
        Ok(self.client.clone().read_blob(request).await?.into_inner())
    }

    /// Writes what filters report.
    pub async fn write_reports(&self, document: Bytes) -> Result<(), BlobError> {
        let (writer, stream) = LayerStream::channel(1, BufferPool::default());
        let feed = async move {
            let summary = BlobSummary { digest: Digest::sha256(&document), size: document.len() as u64 };
            let mut rest = document;
            while !rest.is_empty() {
                writer.send(rest.split_to(CHUNK.min(rest.len()))).await?;
            }
            writer.finish(summary).await
        };
        let ignored = ByteCount::default();
        // Whoever does not take the bytes has the error.
        let (_, written) = tokio::join!(feed, self.write(BlobKind::Reports, Format::None, stream, &ignored));
        written.map(drop)
    }

    async fn write(
        &self,
        kind: BlobKind,
        format: Format,
        stream: LayerStream,
        progress: &ByteCount,
    ) -> Result<BlobSummary, BlobError> {
        let mut upload = Upload::new(stream, progress);
        let (mut offset, mut failures) = (0, 0);
        loop {
            let (sender, messages) = mpsc::channel(MESSAGES);
            let start = WriteBlobStart {
                attempt: self.attempt.expose().to_owned(),
                kind: kind.into(),
                offset,
                compression: convert::compression(format).into(),
            };
            let mut client = self.client.clone();
            let (fed, answered) =
                tokio::join!(upload.feed(start, sender), client.write_blob(ReceiverStream::new(messages)));
            let status = match (fed, answered) {
                (Ok(summary), Ok(_)) => return Ok(summary),
                // It stopped to take the bytes, and says why.
                (Ok(_) | Err(BlobError::Interrupted), Err(status)) => status,
                (Err(error), _) => return Err(error),
            };
            let failed = |status| BlobServiceError::of("does not take the layer", status);
            if !is_passing(&status) {
                return Err(failed(status));
            }
            tracing::debug!(%status, offset, "writing to the coordinator broke");
            let BlobStatusResponse { committed_size, complete } =
                self.committed(kind, &mut failures).await.map_err(failed)?;
            match &upload.summary {
                // Only the answer was lost.
                Some(summary) if complete => return Ok(summary.clone()),
                _ if upload.kept_from(committed_size).is_none() => return Err(failed(status)),
                _ => {}
            }
            if committed_size > offset {
                failures = 0;
            }
            offset = committed_size;
        }
    }

    /// How much has come of a blob whose stream broke. Counts the failures.
    async fn committed(&self, kind: BlobKind, failures: &mut u32) -> Result<BlobStatusResponse, Status> {
        let request = BlobStatusRequest { attempt: self.attempt.expose().to_owned(), kind: kind.into() };
        loop {
            tokio::time::sleep(BACKOFF * 2_u32.pow(*failures)).await;
            *failures += 1;
            match self.client.clone().blob_status(request.clone()).await {
                Ok(answer) if *failures <= RETRIES => return Ok(answer.into_inner()),
                Err(status) if is_passing(&status) && *failures < RETRIES => {}
                Ok(_) => return Err(Status::unavailable("no byte of it arrives")),
                Err(status) => return Err(status),
            }
        }
    }
}

/// A blob on its way to the coordinator, in one stream after the other.
struct Upload<'a> {
    stream: LayerStream,
    progress: &'a ByteCount,
    /// The latest of the bytes that were sent: of these, some may not have arrived.
    kept: VecDeque<Bytes>,
    /// Where in the blob the first of them stands.
    start: u64,
    /// How many there have been.
    end: u64,
    /// Set when they are all.
    summary: Option<BlobSummary>,
}

impl<'a> Upload<'a> {
    fn new(stream: LayerStream, progress: &'a ByteCount) -> Self {
        Self { stream, progress, kept: VecDeque::new(), start: 0, end: 0, summary: None }
    }

    fn keep(&mut self, bytes: Bytes) {
        self.end += bytes.len() as u64;
        self.kept.push_back(bytes);
        while let Some(first) = self.kept.front()
            && self.end - self.start - first.len() as u64 >= KEPT
        {
            self.start += first.len() as u64;
            self.kept.pop_front();
        }
    }

    /// What was sent from there on. None where that is not kept any more.
    fn kept_from(&self, offset: u64) -> Option<Vec<Bytes>> {
        let mut skip = offset.checked_sub(self.start).filter(|_| offset <= self.end)?;
        let rest = self.kept.iter().map(|bytes| {
            let skipped = skip.min(bytes.len() as u64);
            skip -= skipped;
            bytes.slice(usize::try_from(skipped).unwrap_or(bytes.len())..)
        });
        Some(rest.filter(|bytes| !bytes.is_empty()).collect())
    }

    /// Sends everything from the start's offset on, which must be kept, to the commit.
    async fn feed(
        &mut self,
        start: WriteBlobStart,
        sender: mpsc::Sender<WriteBlobRequest>,
    ) -> Result<BlobSummary, BlobError> {
        let send = async |part| {
            let sent = sender.send(WriteBlobRequest { part: Some(part) }).await;
            sent.map_err(|_| BlobError::Interrupted)
        };
        let again = self.kept_from(start.offset).unwrap_or_default();
        send(Part::Start(start)).await?;
        for bytes in again {
            send(Part::Data(bytes)).await?;
        }
        let summary = loop {
            if let Some(summary) = &self.summary {
                break summary.clone();
            }
            match self.stream.next().await? {
                LayerPiece::Data(mut bytes) => {
                    self.progress.add(bytes.len() as u64);
                    // All of it is kept before any of it can be lost.
                    let mut pieces = Vec::new();
                    while !bytes.is_empty() {
                        let piece = bytes.split_to(CHUNK.min(bytes.len()));
                        self.keep(piece.clone());
                        pieces.push(piece);
                    }
                    for piece in pieces {
                        send(Part::Data(piece)).await?;
                    }
                }
                LayerPiece::End(summary) => self.summary = Some(summary),
            }
        };
        let (digest, size) = (summary.digest.to_string(), summary.size);
        send(Part::Commit(WriteBlobCommit { digest, size })).await?;
        Ok(summary)
    }
}

/// A layer whose stored bytes are the coordinator's.
#[derive(Debug)]
pub struct CoordinatorBlob {
    blobs: Blobs,
    identity: String,
    size: Option<u64>,
}

#[async_trait::async_trait]
impl Blob for CoordinatorBlob {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let reader = Reader { blobs: self.blobs.clone(), body: None, offset: 0, failures: 0 };
        Ok(stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|bytes| (bytes, reader)))
        })
        .boxed())
    }

    fn size(&self) -> Option<u64> {
        self.size
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }
}

/// Reads a blob, and goes on where a connection broke. That the bytes are the right ones is checked at the coordinator.
struct Reader {
    blobs: Blobs,
    body: Option<Streaming<ReadBlobResponse>>,
    offset: u64,
    /// Since the last byte.
    failures: u32,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        loop {
            match self.message().await {
                Ok(None) => return Ok(None),
                Ok(Some(ReadBlobResponse { data })) => {
                    self.offset += data.len() as u64;
                    self.failures = 0;
                    return Ok(Some(data));
                }
                Err(status) if is_passing(&status) && self.failures < RETRIES => {
                    tracing::debug!(%status, offset = self.offset, "reading from the coordinator broke");
                    self.body = None;
                    tokio::time::sleep(BACKOFF * 2_u32.pow(self.failures)).await;
                    self.failures += 1;
                }
                Err(status) => return Err(BlobServiceError::of("does not give the layer", status)),
            }
        }
    }

    async fn message(&mut self) -> Result<Option<ReadBlobResponse>, Status> {
        let body = match &mut self.body {
            Some(body) => body,
            None => self.body.insert(self.blobs.read(self.offset).await?),
        };
        body.message().await
    }
}

/// Whether the connection failed, and not what was asked for. The coordinator's own words are the other codes.
fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled)
}

/// A destination that the coordinator writes. What nobody edits does not come this way: the coordinator copies it itself, when it
/// hears that the layer stays as it is.
#[derive(Debug)]
pub struct CoordinatorOutput {
    blobs: Blobs,
    form: LayerForm,
}

#[async_trait::async_trait]
impl ImageOutput for CoordinatorOutput {
    fn form(&self) -> LayerForm {
        self.form
    }

    async fn begin(&self, _image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        Ok(())
    }

    async fn copy_layer(&self, _layer: &Layer, _progress: &ByteCount) -> Result<Moved, Error> {
        Ok(Moved::Bytes)
    }

    async fn has_layer(&self, layer: &Layer) -> Result<bool, Error> {
        // It will have: only a layer that nothing describes cannot be named in the result, and has to be written.
        Ok(layer.descriptor.is_some())
    }

    async fn write_layer(
        &self,
        _index: usize,
        stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        let BlobSummary { digest, size } =
            self.blobs.write(BlobKind::Layer, format, stream, progress).await?;
        Ok(StoredLayer::Written { digest, size, format })
    }

    async fn finalize(&self, _finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        unreachable!("an image is finished by its coordinator")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_upload_keeps_the_latest_bytes_and_gives_them_from_any_of_them_on() {
        let (_writer, stream) = LayerStream::channel(1, BufferPool::default());
        let ignored = ByteCount::default();
        let mut upload = Upload::new(stream, &ignored);
        assert_eq!(upload.kept_from(0), Some(Vec::new()));
        assert_eq!(upload.kept_from(1), None);
        upload.keep("abc".into());
        upload.keep("de".into());
        assert_eq!(upload.kept_from(1).map(|bytes| bytes.concat()), Some(b"bcde".to_vec()));
        assert_eq!(upload.kept_from(5), Some(Vec::new()));
        assert_eq!(upload.kept_from(6), None);
        for _ in 0..100 {
            upload.keep(vec![0; CHUNK].into());
        }
        let all: usize = upload.kept.iter().map(Bytes::len).sum();
        assert!((KEPT..KEPT + CHUNK as u64).contains(&(all as u64)), "{all}");
        assert_eq!(upload.kept_from(0), None);
        assert_eq!(upload.kept_from(upload.start).map(|bytes| bytes.concat().len()), Some(all));
    }
}
