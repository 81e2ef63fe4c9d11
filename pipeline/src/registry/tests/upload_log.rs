//! Uploads that go on where another process has left them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::server::{Reply, Seen, TestServer, content, options};
use crate::blob::{Blob, BlobError, BlobSummary, BufferPool, ByteCount, ByteStream, LayerStream};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::registry::{Options, Repository, UploadLog, UploadState};

const SIZE: usize = 1_000_000;
const CHUNK: usize = 100_000;

/// A registry with any number of sessions, and a blob that can be read.
#[derive(Default)]
struct Registry {
    sessions: HashMap<String, Vec<u8>>,
    begun: usize,
    stored: HashMap<String, Vec<u8>>,
    source: Vec<u8>,
    /// How many bytes of it were read.
    read: usize,
    /// It knows no ranges.
    is_whole: bool,
    /// Its `OCI-Chunk-Min-Length`; 0 for none.
    min_chunk: usize,
    /// Sessions that have got a shorter chunk, which was their last.
    short: HashSet<String>,
}

type Shared = Arc<Mutex<Registry>>;

impl Registry {
    fn answer(&mut self, seen: &Seen) -> Reply {
        let id = seen.path().rsplit('/').next().unwrap_or_default().to_owned();
        match seen.method.as_str() {
            "GET" if seen.path().starts_with("/v2/from/") => self.read(seen),
            "HEAD" => match self.stored.get(&id) {
                Some(bytes) => Reply::new(200).header("Content-Length", bytes.len().to_string()),
                None => Reply::new(404),
            },
            "POST" => {
                self.begun += 1;
                let id = format!("s{}", self.begun);
                self.sessions.insert(id.clone(), Vec::new());
                let reply = Reply::new(202).header("Location", format!("/v2/app/blobs/uploads/{id}"));
                match self.min_chunk {
                    0 => reply,
                    min_chunk => reply.header("OCI-Chunk-Min-Length", min_chunk.to_string()),
                }
            }
            "DELETE" => Reply::new(self.sessions.remove(&id).map_or(404, |_| 204)),
            _ => {
                let Some(bytes) = self.sessions.get_mut(&id) else { return Reply::new(404) };
                let start =
                    seen.header("content-range").and_then(|range| range.split('-').next()?.parse().ok());
                if start.is_some_and(|start: usize| start != bytes.len()) {
                    return Reply::new(416);
                }
                if seen.method == "PATCH" {
                    if self.short.contains(&id) {
                        return Reply::new(400);
                    }
                    if seen.body.len() < self.min_chunk {
                        self.short.insert(id.clone());
                    }
                }
                bytes.extend_from_slice(&seen.body);
                if seen.method != "PUT" {
                    return Reply::new(202)
                        .header("Location", seen.target.clone())
                        .header("Range", format!("0-{}", bytes.len().saturating_sub(1)));
                }
                let digest = seen.query("digest").remove(0);
                if Digest::sha256(&*bytes).to_string() != digest {
                    return Reply::new(400);
                }
                self.stored.insert(digest, self.sessions.remove(&id).unwrap());
                Reply::new(201)
            }
        }
    }

    fn read(&mut self, seen: &Seen) -> Reply {
        let range = seen.header("range").filter(|_| !self.is_whole);
        let start = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let bytes = self.source[start.unwrap_or(0)..].to_vec();
        self.read += bytes.len();
        match start {
            None => Reply::new(200).body(bytes),
            Some(start) => {
                let end = self.source.len();
                Reply::new(206)
                    .header("Content-Range", format!("bytes {start}-{}/{end}", end - 1))
                    .body(bytes)
            }
        }
    }

    /// A session with so many bytes.
    fn session(&mut self, bytes: &[u8]) {
        self.sessions.insert("earlier".to_owned(), bytes.to_vec());
    }
}

async fn registry() -> (TestServer, Shared) {
    let registry = Shared::default();
    registry.lock().unwrap().source = content(SIZE).0;
    let state = Arc::clone(&registry);
    (TestServer::start(move |seen| state.lock().unwrap().answer(seen)).await, registry)
}

#[derive(Debug, Default)]
struct Log {
    latest: Mutex<Option<UploadState>>,
    /// What the offsets were that were told; None where there was no session any more.
    told: Mutex<Vec<Option<u64>>>,
    drops: bool,
}

impl UploadLog for Log {
    fn latest(&self) -> Option<UploadState> {
        self.latest.lock().unwrap().clone()
    }

    fn record(&self, state: Option<UploadState>) {
        self.told.lock().unwrap().push(state.as_ref().map(|state| state.hasher.size()));
        *self.latest.lock().unwrap() = state;
    }

    fn is_kept(&self) -> bool {
        !self.drops
    }
}

impl Log {
    /// That these bytes were acknowledged at the session.
    fn of(server: &TestServer, bytes: &[u8], digest: Option<Digest>) -> Arc<Self> {
        Self::at(&server.url("/v2/app/blobs/uploads/earlier"), bytes, digest)
    }

    fn at(url: &str, bytes: &[u8], digest: Option<Digest>) -> Arc<Self> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        let state = UploadState { session: url.to_owned().into(), digest, hasher, min_chunk: 0 };
        Arc::new(Self { latest: Mutex::new(Some(state)), ..Self::default() })
    }

    fn told(&self) -> Vec<Option<u64>> {
        self.told.lock().unwrap().clone()
    }
}

fn repository(server: &TestServer, log: &Arc<Log>) -> Repository {
    let options = Options { upload_chunk: CHUNK, resumable_from: SIZE as u64, ..options() };
    server.repository(options).logging_to(log.clone())
}

/// What is produced, in pieces of `CHUNK` bytes.
fn produced(bytes: &[u8]) -> LayerStream {
    let (writer, stream) = LayerStream::channel(2, BufferPool::default());
    let summary = BlobSummary { digest: Digest::sha256(bytes), size: bytes.len() as u64 };
    let pieces: Vec<_> = bytes.chunks(CHUNK).map(Bytes::copy_from_slice).collect();
    tokio::spawn(async move {
        for piece in pieces {
            writer.send(piece).await?;
        }
        writer.finish(summary).await
    });
    stream
}

/// How many bytes each PATCH had.
fn patches(server: &TestServer) -> Vec<usize> {
    server.seen().iter().filter(|seen| seen.method == "PATCH").map(|seen| seen.body.len()).collect()
}

/// The bytes of all PATCHes.
fn patched(server: &TestServer) -> usize {
    patches(server).iter().sum()
}

/// Begins to upload what is produced, and is cancelled when the registry has acknowledged these bytes.
async fn begin(repository: &Repository, log: &Log, bytes: &[u8]) {
    let (writer, stream) = LayerStream::channel(2, BufferPool::default());
    let ignored = ByteCount::default();
    let mut upload = std::pin::pin!(repository.upload_stream(stream, &ignored));
    let first = async {
        writer.send(Bytes::copy_from_slice(bytes)).await.unwrap();
        while log.latest().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        result = &mut upload => panic!("{result:?}"),
        () = first => {}
    }
}

fn stored(registry: &Shared) -> Vec<u8> {
    registry.lock().unwrap().stored[&content(SIZE).1.to_string()].clone()
}

/// Copies the registry's own blob, from another of its repositories.
async fn copy(server: &TestServer, log: &Arc<Log>) -> Result<BlobSummary, BlobError> {
    let (digest, repository) = (content(SIZE).1, repository(server, log));
    let blob = repository.sibling("from").blob(&digest, Some(SIZE as u64));
    repository.upload_blob(blob.as_ref(), &digest, SIZE as u64, None, &ByteCount::default()).await
}

#[tokio::test]
async fn each_acknowledged_chunk_is_recorded_and_at_the_end_nothing() {
    let (bytes, digest) = content(SIZE);
    let (server, registry) = registry().await;
    let log = Arc::<Log>::default();
    repository(&server, &log).upload_stream(produced(&bytes), &ByteCount::default()).await.unwrap();
    let expected: Vec<_> = (1..=10).map(|chunk| Some(chunk * CHUNK as u64)).chain([None]).collect();
    assert_eq!(log.told(), expected);
    registry.lock().unwrap().stored.clear();
    let log = Arc::<Log>::default();
    copy(&server, &log).await.unwrap();
    let told = log.told();
    assert_eq!(told[told.len() - 2..], [Some(SIZE as u64), None]);
    assert!(told.len() > 5 && told[..told.len() - 1].is_sorted_by(|one, next| one < next), "{told:?}");
    assert!(stored(&registry) == bytes);
    // Without a log there is one PUT, and of what is smaller likewise.
    let patches = patched(&server);
    let blob = server.repository(options()).sibling("from").blob(&digest, Some(SIZE as u64));
    for (repository, size) in [
        (server.repository(options()), SIZE as u64),
        (
            server.repository(Options { resumable_from: SIZE as u64 + 1, ..options() }).logging_to(log),
            SIZE as u64,
        ),
    ] {
        repository.upload_blob(blob.as_ref(), &digest, size, None, &ByteCount::default()).await.unwrap();
    }
    assert_eq!(patched(&server), patches);
}

#[tokio::test]
async fn what_was_produced_before_is_not_sent_again() {
    let (bytes, _) = content(SIZE);
    // As much as was recorded, a chunk more, and all.
    for committed in [900_000, 950_000, SIZE] {
        let (server, registry) = registry().await;
        registry.lock().unwrap().session(&bytes[..committed]);
        let log = Log::of(&server, &bytes[..900_000], None);
        let progress = ByteCount::default();
        repository(&server, &log).upload_stream(produced(&bytes), &progress).await.unwrap();
        assert!(stored(&registry) == bytes);
        assert_eq!((patched(&server), progress.get()), (SIZE - committed, SIZE as u64));
        assert_eq!(registry.lock().unwrap().begun, 0);
        assert!(log.latest().is_none());
    }
}

#[tokio::test]
async fn a_copied_blob_is_read_and_sent_from_where_its_upload_was() {
    let (bytes, digest) = content(SIZE);
    for (committed, read) in [(900_000, 100_000), (950_000, 100_000)] {
        let (server, registry) = registry().await;
        registry.lock().unwrap().session(&bytes[..committed]);
        let log = Log::of(&server, &bytes[..900_000], Some(digest.clone()));
        copy(&server, &log).await.unwrap();
        assert!(stored(&registry) == bytes);
        assert_eq!((patched(&server), registry.lock().unwrap().read), (SIZE - committed, read));
        assert_eq!(registry.lock().unwrap().begun, 0);
    }
    // All of it was there, and only the end was missing.
    let (server, registry) = registry().await;
    registry.lock().unwrap().session(&bytes);
    copy(&server, &Log::of(&server, &bytes, Some(digest))).await.unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!((patched(&server), registry.lock().unwrap().read), (0, 0));
}

#[tokio::test]
async fn a_source_that_cannot_be_read_from_there_is_read_and_skipped() {
    let (bytes, digest) = content(SIZE);
    // A registry that knows no ranges.
    let (server, registry) = registry().await;
    registry.lock().unwrap().session(&bytes[..900_000]);
    registry.lock().unwrap().is_whole = true;
    copy(&server, &Log::of(&server, &bytes[..900_000], Some(digest.clone()))).await.unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!((patched(&server), registry.lock().unwrap().read), (100_000, SIZE));

    // A source of another kind.
    let (server, registry) = self::registry().await;
    registry.lock().unwrap().session(&bytes[..900_000]);
    let log = Log::of(&server, &bytes[..900_000], Some(digest.clone()));
    let blob = Pieces(bytes.clone());
    repository(&server, &log)
        .upload_blob(&blob, &digest, SIZE as u64, None, &ByteCount::default())
        .await
        .unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!(patched(&server), 100_000);
}

/// Content that is opened from its first byte only.
#[derive(Debug)]
struct Pieces(Vec<u8>);

#[async_trait::async_trait]
impl Blob for Pieces {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let pieces: Vec<_> = self.0.chunks(70_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        Ok(stream::iter(pieces).boxed())
    }

    fn size(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }

    fn identity(&self) -> String {
        String::new()
    }
}

#[tokio::test]
async fn a_session_that_is_gone_or_lost_bytes_or_is_no_session_is_begun_anew_without_a_word() {
    let (bytes, digest) = content(SIZE);
    for (committed, url) in [
        (None, "/v2/app/blobs/uploads/earlier"),
        (Some(800_000), "/v2/app/blobs/uploads/earlier"),
        (Some(900_000), "/v2/app/blobs/uploads/../earlier"),
        (Some(900_000), "/v2/app/blobs/uploads/%2e%2e/earlier"),
        (Some(900_000), "/v2/app/blobs/uploads/..%2fearlier"),
        (Some(900_000), "/v2/other/blobs/uploads/earlier"),
        (Some(900_000), "/v2/app/manifests/earlier"),
        (Some(900_000), "/session/earlier"),
    ] {
        for is_copied in [true, false] {
            let (server, registry) = registry().await;
            if let Some(committed) = committed {
                registry.lock().unwrap().session(&bytes[..committed]);
            }
            let log = Log::at(&server.url(url), &bytes[..900_000], is_copied.then(|| digest.clone()));
            if is_copied {
                copy(&server, &log).await.unwrap();
            } else {
                repository(&server, &log)
                    .upload_stream(produced(&bytes), &ByteCount::default())
                    .await
                    .unwrap();
            }
            assert!(stored(&registry) == bytes, "{url}");
            assert_eq!((patched(&server), registry.lock().unwrap().begun), (SIZE, 1), "{url}");
            // Nothing is asked for at a place that is no session's.
            let is_asked = server.lines().iter().any(|line| line.ends_with("/earlier"));
            assert_eq!(is_asked, url == "/v2/app/blobs/uploads/earlier", "{url}: {:?}", server.lines());
        }
    }
}

#[tokio::test]
async fn a_session_of_another_registrys_is_not_asked_for() {
    let (bytes, digest) = content(SIZE);
    let (server, registry) = registry().await;
    let (other, _) = self::registry().await;
    let log = Log::of(&other, &bytes[..900_000], Some(digest));
    copy(&server, &log).await.unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!(other.lines().len(), 0);
}

#[tokio::test]
async fn what_is_recorded_of_other_bytes_is_of_no_use() {
    let (bytes, digest) = content(SIZE);
    let (server, registry) = registry().await;
    registry.lock().unwrap().session(&bytes[..900_000]);
    // A blob's state does not tell of what filters make, and the other way round.
    let log = Log::of(&server, &bytes[..900_000], Some(digest));
    repository(&server, &log).upload_stream(produced(&bytes), &ByteCount::default()).await.unwrap();
    registry.lock().unwrap().stored.clear();
    copy(&server, &Log::of(&server, &bytes[..900_000], None)).await.unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!(registry.lock().unwrap().begun, 2);
}

#[tokio::test]
async fn wrong_bytes_in_a_session_are_never_stored_and_a_copy_begins_anew() {
    let (bytes, digest) = content(SIZE);
    let mut wrong = bytes[..900_000].to_vec();
    wrong[5] ^= 1;
    // The session's bytes, and those that were said to be there.
    for (sent, said) in [(&wrong[..], &bytes[..900_000]), (&bytes[..900_000], &wrong[..]), (&wrong, &wrong)] {
        let (server, registry) = registry().await;
        registry.lock().unwrap().session(sent);
        copy(&server, &Log::of(&server, said, Some(digest.clone()))).await.unwrap();
        assert!(stored(&registry) == bytes);
        assert_eq!(registry.lock().unwrap().begun, 1);

        // What is produced has to be produced again, by whoever can.
        let (server, registry) = self::registry().await;
        registry.lock().unwrap().session(sent);
        let log = Log::of(&server, said, None);
        let repository = repository(&server, &log);
        let error =
            repository.upload_stream(produced(&bytes), &ByteCount::default()).await.map(drop).unwrap_err();
        assert!(crate::error::Error::from(error).is_worth_a_new_attempt());
        assert!(registry.lock().unwrap().stored.is_empty() && log.latest().is_none());
        repository.upload_stream(produced(&bytes), &ByteCount::default()).await.unwrap();
        assert!(stored(&registry) == bytes);
    }
}

#[tokio::test]
async fn a_session_with_more_than_all_bytes_is_of_no_use() {
    let (bytes, digest) = content(SIZE);
    let (server, registry) = registry().await;
    registry.lock().unwrap().session(&[bytes.as_slice(), b"more"].concat());
    copy(&server, &Log::of(&server, &bytes[..900_000], Some(digest))).await.unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!(registry.lock().unwrap().begun, 1);
}

#[tokio::test]
async fn a_producer_that_stops_before_it_was_there_leaves_the_session() {
    let (bytes, _) = content(SIZE);
    let (server, registry) = registry().await;
    registry.lock().unwrap().session(&bytes[..900_000]);
    let log = Log::of(&server, &bytes[..900_000], None);
    let repository = repository(&server, &log);
    let (writer, stream) = LayerStream::channel(1, BufferPool::default());
    writer.send(Bytes::copy_from_slice(&bytes[..CHUNK])).await.unwrap();
    drop(writer);
    let error = repository.upload_stream(stream, &ByteCount::default()).await.unwrap_err();
    assert!(matches!(error, BlobError::Interrupted), "{error:?}");
    repository.upload_stream(produced(&bytes), &ByteCount::default()).await.unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!(patched(&server), 100_000);
}

#[tokio::test]
async fn a_registry_that_takes_no_pieces_gets_the_whole() {
    for status in [405, 400, 403, 404, 416] {
        let registry = Shared::default();
        registry.lock().unwrap().source = content(SIZE).0;
        let state = Arc::clone(&registry);
        let server = TestServer::start(move |seen| match seen.method.as_str() {
            "PATCH" => Reply::new(status),
            _ => state.lock().unwrap().answer(seen),
        })
        .await;
        copy(&server, &Arc::default()).await.unwrap();
        assert!(stored(&registry) == content(SIZE).0, "{status}");
    }
}

#[tokio::test]
async fn a_cancelled_upload_leaves_its_session_where_somebody_goes_on_with_it() {
    let (bytes, _) = content(SIZE);
    for drops in [false, true] {
        let (server, registry) = registry().await;
        let log = Arc::new(Log { drops, ..Log::default() });
        let repository = repository(&server, &log);
        begin(&repository, &log, &bytes[..2 * CHUNK]).await;
        if drops {
            while !registry.lock().unwrap().sessions.is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            continue;
        }
        repository.upload_stream(produced(&bytes), &ByteCount::default()).await.unwrap();
        assert!(stored(&registry) == bytes);
        assert_eq!((patched(&server), registry.lock().unwrap().begun), (SIZE, 1));
        assert!(!server.lines().iter().any(|line| line.starts_with("DELETE")));
    }
}

#[tokio::test]
async fn who_goes_on_sends_no_shorter_chunks_than_the_registry_takes() {
    let (bytes, _) = content(SIZE);
    let (server, registry) = registry().await;
    registry.lock().unwrap().min_chunk = 3 * CHUNK;
    let log = Arc::<Log>::default();
    let repository = repository(&server, &log);
    begin(&repository, &log, &bytes[..3 * CHUNK]).await;
    repository.upload_stream(produced(&bytes), &ByteCount::default()).await.unwrap();
    assert!(stored(&registry) == bytes);
    assert_eq!(patches(&server), [3 * CHUNK, 3 * CHUNK, 3 * CHUNK, CHUNK]);
    assert_eq!(registry.lock().unwrap().begun, 1);
}

#[tokio::test]
async fn nobody_sees_where_a_session_is() {
    let (server, _) = registry().await;
    let state = Log::of(&server, b"x", None).latest().unwrap();
    assert!(!format!("{state:?}").contains("earlier"), "{state:?}");
}
