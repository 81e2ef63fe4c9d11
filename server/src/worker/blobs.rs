//! BlobService: bytes of layers, to and from the workers that have an attempt at them.
//!
//! Nothing is kept here: what is read comes from the layer's source, and what is written goes on to its destination, as fast as that
//! takes it.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use occy_pipeline::blob::{BlobError, BlobSummary, ByteStream, CHUNK};
use occy_pipeline::compression::Format;
use occy_pipeline::digest::{Algorithm, Hasher};
use occy_pipeline::wire::convert;
use occy_proto::v1::blob_service_server::BlobService;
use occy_proto::v1::write_blob_request::Part;
use occy_proto::v1::{
    BlobKind, BlobStatusRequest, BlobStatusResponse, ReadBlobRequest, ReadBlobResponse, WriteBlobRequest,
    WriteBlobResponse, WriteBlobStart,
};
use tonic::{Request, Response, Status, Streaming};

use super::attempt::{Attempt, Attempts, Incoming, LayerSink};

/// Bytes of what all filters together report of one layer: what one job may leave.
const REPORTS_MAX: usize = 64 * 1024 * 1024;

/// The service.
#[derive(Clone, Debug)]
pub struct Blobs(pub Attempts);

#[tonic::async_trait]
impl BlobService for Blobs {
    type ReadBlobStream = BoxStream<'static, Result<ReadBlobResponse, Status>>;

    async fn read_blob(
        &self,
        request: Request<ReadBlobRequest>,
    ) -> Result<Response<Self::ReadBlobStream>, Status> {
        let ReadBlobRequest { attempt, offset } = request.into_inner();
        let attempt = self.find(&attempt)?;
        if attempt.task.layer.origin.is_some() {
            return Err(Status::failed_precondition("the task's source is a registry"));
        }
        let blob = Arc::clone(&attempt.task.layer.blob);
        let opened = tokio::select! {
            opened = blob.open() => opened,
            () = attempt.closed() => return Err(ended()),
        };
        let bytes = opened.map_err(|error| source_failed(&attempt, error))?;
        let reading = Reading { attempt, bytes, current: Bytes::new(), skip: offset };
        let messages = stream::try_unfold(reading, |mut reading| async move {
            Ok(reading.next().await?.map(|data| (ReadBlobResponse { data }, reading)))
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn write_blob(
        &self,
        request: Request<Streaming<WriteBlobRequest>>,
    ) -> Result<Response<WriteBlobResponse>, Status> {
        let mut parts = request.into_inner();
        let Some(Part::Start(start)) = parts.message().await?.and_then(|request| request.part) else {
            return Err(Status::invalid_argument("the first message, and no other, is the start"));
        };
        let attempt = self.find(&start.attempt)?;
        let written = async {
            match start.kind() {
                BlobKind::Layer => {
                    write(&attempt, &start, &mut *attempt.layer.lock().await, &mut parts).await
                }
                BlobKind::Reports => {
                    write(&attempt, &start, &mut *attempt.reports.lock().await, &mut parts).await
                }
                BlobKind::Unspecified => Err(Status::invalid_argument("what is written is not known")),
            }
        };
        let committed_size = tokio::select! {
            written = written => written?,
            () = attempt.closed() => return Err(ended()),
        };
        Ok(Response::new(WriteBlobResponse { committed_size }))
    }

    async fn blob_status(
        &self,
        request: Request<BlobStatusRequest>,
    ) -> Result<Response<BlobStatusResponse>, Status> {
        let request = request.into_inner();
        let attempt = self.find(&request.attempt)?;
        // A stream that is still open, or is not yet known to be broken, is waited for.
        let status = async {
            match request.kind() {
                BlobKind::Layer => Ok(attempt.layer.lock().await.status()),
                BlobKind::Reports => Ok(attempt.reports.lock().await.status()),
                BlobKind::Unspecified => Err(Status::invalid_argument("what is written is not known")),
            }
        };
        let (committed_size, complete) = tokio::select! {
            status = status => status?,
            () = attempt.closed() => return Err(ended()),
        };
        Ok(Response::new(BlobStatusResponse { committed_size, complete }))
    }
}

impl Blobs {
    fn find(&self, token: &str) -> Result<Arc<Attempt>, Status> {
        self.0.find(token).ok_or_else(|| Status::not_found("there is no such attempt, or it has ended"))
    }
}

fn ended() -> Status {
    Status::aborted("the attempt has ended")
}

/// Why there is nothing to read. The worker needs to know no more: the attempt fails with the error itself.
fn source_failed(attempt: &Attempt, error: BlobError) -> Status {
    let status = Status::aborted(error.to_string());
    attempt.source_failed(error);
    status
}

/// A layer that is sent to its worker.
struct Reading {
    attempt: Arc<Attempt>,
    bytes: ByteStream,
    /// What of the last piece is still to be sent.
    current: Bytes,
    /// Bytes that the worker has already.
    skip: u64,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(self.current.len());
            drop(self.current.split_to(skipped));
            self.skip -= skipped as u64;
            if !self.current.is_empty() {
                return Ok(Some(self.current.split_to(CHUNK.min(self.current.len()))));
            }
            let piece = tokio::select! {
                piece = self.bytes.try_next() => piece,
                () = self.attempt.closed() => return Err(ended()),
            };
            match piece {
                Ok(Some(bytes)) => self.current = bytes,
                Ok(None) if self.skip > 0 => {
                    return Err(Status::out_of_range("the layer is not as long as that"));
                }
                Ok(None) => return Ok(None),
                Err(error) => return Err(source_failed(&self.attempt, error)),
            }
        }
    }
}

/// Where bytes from a worker go.
trait Sink: Sized + Send {
    /// Ready for the first byte.
    async fn begin(attempt: &Attempt, start: &WriteBlobStart) -> Result<Self, Status>;

    /// Takes the next bytes.
    async fn take(&mut self, bytes: Bytes) -> Result<(), Status>;

    /// All bytes have come, and this is their sum; returns when they are stored.
    async fn finish(&mut self, summary: &BlobSummary) -> Result<(), Status>;
}

impl Sink for LayerSink {
    async fn begin(attempt: &Attempt, start: &WriteBlobStart) -> Result<Self, Status> {
        if attempt.task.output.repository().is_some() {
            return Err(Status::failed_precondition("the task's destination is a registry"));
        }
        attempt
            .begin_layer(convert::format(start.compression()).unwrap_or(Format::None))
            .await
            .ok_or_else(ended)
    }

    async fn take(&mut self, bytes: Bytes) -> Result<(), Status> {
        let writer = self.writer.as_ref().ok_or_else(ended)?;
        writer.send(bytes).await.map_err(|_| not_stored())
    }

    async fn finish(&mut self, summary: &BlobSummary) -> Result<(), Status> {
        // A commit that comes again, whose answer was lost, waits for what the first one began.
        if let Some(writer) = self.writer.take() {
            writer.finish(summary.clone()).await.map_err(|_| not_stored())?;
        }
        (&mut self.stored).await.map_err(|_| not_stored())
    }
}

impl Sink for Vec<u8> {
    async fn begin(_attempt: &Attempt, _start: &WriteBlobStart) -> Result<Self, Status> {
        Ok(Self::new())
    }

    async fn take(&mut self, bytes: Bytes) -> Result<(), Status> {
        if self.len() + bytes.len() > REPORTS_MAX {
            let problem = format!("the filters report more than {REPORTS_MAX} bytes of one layer");
            return Err(Status::resource_exhausted(problem));
        }
        self.extend_from_slice(&bytes);
        Ok(())
    }

    async fn finish(&mut self, _summary: &BlobSummary) -> Result<(), Status> {
        Ok(())
    }
}

/// The destination's own error is the attempt's.
fn not_stored() -> Status {
    Status::aborted("the destination does not take the layer")
}

impl<S> Incoming<S> {
    /// How many bytes have come, and whether they are all.
    fn status(&self) -> (u64, bool) {
        match self {
            Self::Nothing => (0, false),
            Self::Open { hasher, .. } => (hasher.size(), false),
            Self::Complete { size, .. } => (*size, true),
        }
    }
}

/// Takes one stream of a blob, to its commit.
///
/// # Cancel safety
/// Cancelled, it has counted exactly the bytes that were passed on.
async fn write<S: Sink>(
    attempt: &Attempt,
    start: &WriteBlobStart,
    incoming: &mut Incoming<S>,
    parts: &mut Streaming<WriteBlobRequest>,
) -> Result<u64, Status> {
    if start.offset == 0 {
        // First of all, so that whoever stores what came before hears that it does not count.
        *incoming = Incoming::Nothing;
        let sink = S::begin(attempt, start).await?;
        *incoming = Incoming::Open { sink, hasher: Box::new(Hasher::new(Algorithm::Sha256)) };
    }
    let has = incoming.status().0;
    let Incoming::Open { sink, hasher } = incoming else {
        return Err(Status::out_of_range("there is no blob that can go on: begin at 0"));
    };
    if has != start.offset {
        return Err(Status::out_of_range(format!(
            "{has} bytes have come, and the stream begins at {}",
            start.offset
        )));
    }
    let commit = loop {
        match parts.message().await?.map(|request| request.part) {
            Some(Some(Part::Data(bytes))) => {
                sink.take(bytes.clone()).await?;
                hasher.update(&bytes);
            }
            Some(Some(Part::Commit(commit))) => break commit,
            Some(Some(Part::Start(_)) | None) => {
                return Err(Status::invalid_argument("the first message, and no other, is the start"));
            }
            None => return Err(Status::aborted("the stream ended without a commit")),
        }
    };
    let summary = BlobSummary { size: hasher.size(), digest: Hasher::clone(hasher).finish() };
    if commit.digest != summary.digest.to_string() || commit.size != summary.size {
        let BlobSummary { digest, size } = &summary;
        let problem = format!("{size} bytes with the digest {digest} came, and others are committed");
        *incoming = Incoming::Nothing;
        return Err(Status::invalid_argument(problem));
    }
    sink.finish(&summary).await?;
    if let Incoming::Open { sink, .. } = std::mem::replace(incoming, Incoming::Nothing) {
        *incoming = Incoming::Complete { sink, size: summary.size };
    }
    Ok(summary.size)
}
