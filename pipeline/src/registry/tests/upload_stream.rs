//! Blobs up, PATCH by PATCH.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::server::{Head, Reply, Seen, TestServer, content, options};
use crate::blob::{BlobError, BlobSummary, BufferPool, ByteCount, LayerStream};
use crate::digest::Digest;
use crate::registry::{Options, RegistryError};

const SIZE: usize = 3_500_000;
const CHUNK: usize = 1_000_000;

/// A registry with one session, which does what it should.
#[derive(Default)]
struct Session {
    committed: Vec<u8>,
    stored: Option<(String, Vec<u8>)>,
    patches: usize,
}

type Shared = Arc<Mutex<Session>>;

impl Session {
    fn answer(&mut self, seen: &Seen) -> Reply {
        match seen.method.as_str() {
            "POST" => {
                self.committed.clear();
                Reply::new(202).header("Location", "/session?_state=0")
            }
            "PATCH" => self.patch(seen, usize::MAX),
            "PUT" => {
                self.committed.extend_from_slice(&seen.body);
                let digest = seen.query("digest").remove(0);
                if Digest::sha256(&self.committed).to_string() != digest {
                    return Reply::new(400);
                }
                self.stored = Some((digest, self.committed.clone()));
                Reply::new(201)
            }
            "GET" if seen.path() == "/session" => self.range(Reply::new(204)),
            "HEAD" => match &self.stored {
                Some((_, bytes)) => Reply::new(200).header("Content-Length", bytes.len().to_string()),
                None => Reply::new(404),
            },
            _ => Reply::new(204),
        }
    }

    /// Takes a chunk, or the first bytes of it.
    fn patch(&mut self, seen: &Seen, most: usize) -> Reply {
        self.patches += 1;
        let expected = format!("{}-{}", self.committed.len(), self.committed.len() + seen.body.len() - 1);
        if seen.header("content-range") != Some(&expected) {
            return self.range(Reply::new(416));
        }
        self.committed.extend_from_slice(&seen.body[..most.min(seen.body.len())]);
        self.range(Reply::new(202))
    }

    fn range(&self, reply: Reply) -> Reply {
        let size = self.committed.len();
        reply
            .header("Location", format!("/session?_state={size}"))
            .header("Range", format!("0-{}", size.saturating_sub(1)))
    }
}

/// A server with one session; `odd` answers what it wants to answer otherwise.
async fn registry(
    odd: impl Fn(&mut Session, &Seen) -> Option<Reply> + Send + Sync + 'static,
) -> (TestServer, Shared) {
    let session = Shared::default();
    let state = Arc::clone(&session);
    let server = TestServer::start(move |seen| {
        let mut session = state.lock().unwrap();
        odd(&mut session, seen).unwrap_or_else(|| session.answer(seen))
    })
    .await;
    (server, session)
}

fn chunked() -> Options {
    Options { upload_chunk: CHUNK, ..options() }
}

async fn upload(server: &TestServer, bytes: &[u8], options: Options) -> Result<BlobSummary, BlobError> {
    let summary = BlobSummary { digest: Digest::sha256(bytes), size: bytes.len() as u64 };
    upload_as(server, bytes, summary, options).await
}

async fn upload_as(
    server: &TestServer,
    bytes: &[u8],
    summary: BlobSummary,
    options: Options,
) -> Result<BlobSummary, BlobError> {
    let (writer, stream) = LayerStream::channel(2, BufferPool::default());
    let pieces: Vec<Bytes> = bytes.chunks(64 * 1024).map(Bytes::copy_from_slice).collect();
    let producer = tokio::spawn(async move {
        for piece in pieces {
            writer.send(piece).await?;
        }
        writer.finish(summary).await
    });
    let result = server.repository(options).upload_stream(stream, &ByteCount::default()).await;
    let _ = producer.await;
    result
}

/// Uploads, and checks that the registry has got every byte once.
async fn stored(server: &TestServer, session: &Shared, options: Options) {
    let (bytes, digest) = content(SIZE);
    let summary = upload(server, &bytes, options).await.unwrap();
    assert_eq!(summary, BlobSummary { digest: digest.clone(), size: SIZE as u64 });
    let stored = session.lock().unwrap().stored.clone().unwrap();
    assert_eq!(stored.0, digest.to_string());
    assert!(stored.1 == bytes);
}

#[tokio::test]
async fn a_small_stream_is_one_post_and_one_put() {
    let (server, session) = registry(|_, _| None).await;
    let (bytes, digest) = content(1000);
    upload(&server, &bytes, options()).await.unwrap();
    assert_eq!(server.lines(), ["POST /v2/app/blobs/uploads/", "PUT /session"]);
    assert_eq!(server.seen()[1].target, format!("/session?_state=0&digest={digest}"));
    assert_eq!(session.lock().unwrap().stored.as_ref().unwrap().1, bytes);
    let (server, _) = registry(|_, _| None).await;
    upload(&server, b"", options()).await.unwrap();
}

#[tokio::test]
async fn a_small_stream_is_sent_again_from_its_start() {
    let (server, session) = registry(|session, seen| {
        session.patches += usize::from(seen.method == "PUT");
        match (seen.method.as_str(), session.patches) {
            ("PUT", 1) => Some(Reply::new(500)),
            ("PUT", 2) => Some(Reply::none()),
            ("PUT", 3) => Some(Reply::new(404)),
            _ => None,
        }
    })
    .await;
    let (bytes, _) = content(1000);
    upload(&server, &bytes, options()).await.unwrap();
    assert_eq!(session.lock().unwrap().stored.as_ref().unwrap().1, bytes);
    assert_eq!(server.seen().iter().filter(|seen| seen.method == "POST").count(), 4);
}

#[tokio::test]
async fn a_small_stream_goes_by_patch_where_the_put_is_refused() {
    let (server, session) =
        registry(|_, seen| (seen.method == "PUT" && !seen.body.is_empty()).then(|| Reply::new(413))).await;
    let (bytes, _) = content(1000);
    upload(&server, &bytes, options()).await.unwrap();
    assert_eq!(session.lock().unwrap().stored.as_ref().unwrap().1, bytes);
}

#[tokio::test]
async fn a_stream_goes_chunk_by_chunk() {
    let (server, session) = registry(|_, _| None).await;
    stored(&server, &session, chunked()).await;
    let seen = server.seen();
    let sizes: Vec<_> =
        seen.iter().filter(|seen| seen.method == "PATCH").map(|seen| seen.body.len()).collect();
    assert_eq!(sizes.len(), 4);
    assert!(sizes[..3].iter().all(|size| (CHUNK..CHUNK + 64 * 1024).contains(size)), "{sizes:?}");
    // Each request went where the answer before it said.
    assert_eq!(seen[2].target, format!("/session?_state={}", sizes[0]));
    assert!(seen.last().unwrap().body.is_empty());
}

#[tokio::test]
async fn chunks_are_as_long_as_the_registry_wants_them() {
    let (server, session) = registry(|_, seen| {
        (seen.method == "POST").then(|| {
            Reply::new(202)
                .header("Location", "/session?_state=0")
                .header("OCI-Chunk-Min-Length", (2 * CHUNK).to_string())
        })
    })
    .await;
    stored(&server, &session, chunked()).await;
    let sizes: Vec<_> =
        server.seen().iter().filter(|seen| seen.method == "PATCH").map(|seen| seen.body.len()).collect();
    assert_eq!(sizes.len(), 2);
    assert!(sizes[0] >= 2 * CHUNK, "{sizes:?}");
}

#[tokio::test]
async fn absurdly_long_chunks_are_refused() {
    let (server, _) = registry(|_, seen| {
        (seen.method == "POST").then(|| {
            Reply::new(202).header("Location", "/session").header("OCI-Chunk-Min-Length", "99999999999")
        })
    })
    .await;
    let error = upload(&server, &content(SIZE).0, chunked()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::Protocol { .. })), "{error:?}");
}

#[tokio::test]
async fn the_registrys_range_says_where_to_go_on() {
    let (server, session) = registry(|session, seen| {
        (seen.method == "PATCH" && session.patches % 2 == 0).then(|| session.patch(seen, 300_000))
    })
    .await;
    stored(&server, &session, chunked()).await;
    assert!(session.lock().unwrap().patches > 4);
}

#[tokio::test]
async fn a_registry_that_says_no_range_has_taken_all() {
    let (server, session) = registry(|session, seen| {
        (seen.method == "PATCH").then(|| {
            session.committed.extend_from_slice(&seen.body);
            Reply::new(202).header("Location", "/session")
        })
    })
    .await;
    stored(&server, &session, chunked()).await;
}

#[tokio::test]
async fn after_a_416_the_session_is_asked() {
    let (server, session) = registry(|session, seen| {
        if seen.method == "PATCH" && session.patches == 1 {
            // It has more than we know, because an answer was lost.
            session.patches += 1;
            session.committed.extend_from_slice(&seen.body[..400_000]);
            return Some(Reply::new(416));
        }
        None
    })
    .await;
    stored(&server, &session, chunked()).await;
    assert!(server.lines().contains(&"GET /session".to_owned()));
}

#[tokio::test]
async fn after_failures_that_may_pass_the_session_is_asked() {
    let (server, session) = registry(|session, seen| {
        if seen.method != "PATCH" {
            return None;
        }
        session.patches += 1;
        match session.patches {
            2 => Some(Reply::new(500)),
            4 => {
                session.committed.extend_from_slice(&seen.body);
                Some(Reply::none())
            }
            6 => Some(Reply::new(429).header("Retry-After", "0")),
            _ => {
                session.patches -= 1;
                None
            }
        }
    })
    .await;
    stored(&server, &session, chunked()).await;
}

#[tokio::test]
async fn a_connection_that_breaks_in_a_chunk_is_resumed() {
    let session = Shared::default();
    let (on_head, on_request) = (Arc::clone(&session), Arc::clone(&session));
    let server = TestServer::start_with(
        move |seen| {
            let mut session = on_head.lock().unwrap();
            if seen.method == "PATCH" && session.patches == 1 {
                session.patches += 1;
                let taken = content(SIZE).0[session.committed.len()..][..250_000].to_vec();
                session.committed.extend(taken);
                return Head::CutBody(250_000);
            }
            Head::Read
        },
        move |seen| on_request.lock().unwrap().answer(seen),
    )
    .await;
    stored(&server, &session, chunked()).await;
}

#[tokio::test]
async fn a_session_that_does_not_advance_is_ended() {
    for claimed in ["0-0", "0-499999"] {
        let (server, _) = registry(move |session, seen| {
            (seen.method == "PATCH" && session.patches == 1)
                .then(|| Reply::new(202).header("Location", "/session").header("Range", claimed))
        })
        .await;
        let error = upload(&server, &content(SIZE).0, chunked()).await.unwrap_err();
        assert!(matches!(error, BlobError::Registry(RegistryError::SessionLost { .. })), "{error:?}");
        assert_eq!(server.lines().last().unwrap(), "DELETE /session");
    }
}

#[tokio::test]
async fn a_session_that_has_more_than_it_got_is_ended() {
    let (server, _) = registry(|_, seen| {
        (seen.method == "PATCH")
            .then(|| Reply::new(202).header("Location", "/session").header("Range", "0-99999999"))
    })
    .await;
    let error = upload(&server, &content(SIZE).0, chunked()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::SessionLost { .. })), "{error:?}");
}

#[tokio::test]
async fn a_session_that_lost_acknowledged_bytes_is_ended() {
    let (server, _) = registry(|session, seen| {
        (seen.method == "PATCH" && session.patches == 2).then(|| {
            session.committed.clear();
            Reply::new(500)
        })
    })
    .await;
    let error = upload(&server, &content(SIZE).0, chunked()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::SessionLost { .. })), "{error:?}");
}

#[tokio::test]
async fn a_session_that_is_gone_is_not_deleted() {
    let (server, _) =
        registry(|session, seen| (seen.method == "PATCH" && session.patches == 1).then(|| Reply::new(404)))
            .await;
    let error = upload(&server, &content(SIZE).0, chunked()).await.unwrap_err();
    assert!(matches!(&error, BlobError::Registry(error) if error.is_transient()), "{error:?}");
    assert!(!server.lines().iter().any(|line| line.starts_with("DELETE")));
}

#[tokio::test]
async fn a_201_to_a_patch_is_believed_once_a_head_confirms_it() {
    for there in [true, false] {
        let (server, _) = registry(move |session, seen| match seen.method.as_str() {
            "PATCH" if session.patches == 3 => Some(Reply::new(201)),
            "HEAD" if there => Some(Reply::new(200).header("Content-Length", SIZE.to_string())),
            _ => None,
        })
        .await;
        let result = upload(&server, &content(SIZE).0, chunked()).await;
        assert_eq!(result.is_ok(), there, "{result:?}");
        assert!(!server.lines().iter().any(|line| line.starts_with("PUT")));
    }
}

#[tokio::test]
async fn an_answer_to_the_last_put_that_was_lost_is_found_by_a_head() {
    let (server, session) = registry(|session, seen| match seen.method.as_str() {
        "PUT" if session.stored.is_none() => {
            session.answer(seen);
            Some(Reply::none())
        }
        "PUT" => Some(Reply::new(404)),
        _ => None,
    })
    .await;
    stored(&server, &session, chunked()).await;
}

#[tokio::test]
async fn a_producer_that_stops_leaves_nothing() {
    let (server, session) = registry(|_, _| None).await;
    let (writer, stream) = LayerStream::channel(2, BufferPool::default());
    let producer = tokio::spawn(async move {
        let _ = writer.send(Bytes::from(vec![0; 2 * CHUNK])).await;
    });
    let error = server.repository(chunked()).upload_stream(stream, &ByteCount::default()).await.unwrap_err();
    producer.await.unwrap();
    assert!(matches!(error, BlobError::Interrupted), "{error:?}");
    assert_eq!(server.lines().last().unwrap(), "DELETE /session");
    assert!(session.lock().unwrap().stored.is_none());
}

#[tokio::test]
async fn a_sum_that_is_not_of_these_bytes_is_refused() {
    let (server, session) = registry(|_, _| None).await;
    let (bytes, digest) = content(SIZE);
    let summary = BlobSummary { digest, size: SIZE as u64 + 1 };
    let error = upload_as(&server, &bytes, summary, chunked()).await.unwrap_err();
    assert!(matches!(error, BlobError::Size { .. }), "{error:?}");
    let summary = BlobSummary { digest: Digest::sha256("other"), size: SIZE as u64 };
    let error = upload_as(&server, &bytes, summary, chunked()).await.unwrap_err();
    assert!(matches!(&error, BlobError::Registry(error) if error.status() == Some(400)), "{error:?}");
    assert!(session.lock().unwrap().stored.is_none());
}

#[tokio::test]
async fn a_slow_way_up_is_waited_for_as_long_as_bytes_move() {
    let session = Shared::default();
    let state = Arc::clone(&session);
    let slow = |seen: &Seen| match seen.method.as_str() {
        "PATCH" => Head::Slow(Duration::from_millis(25)),
        _ => Head::Read,
    };
    let server = TestServer::start_with(slow, move |seen| state.lock().unwrap().answer(seen)).await;
    let hurried = Options {
        read_timeout: Duration::from_secs(1),
        attempts: 1,
        upload_chunk: 8 * 1024 * 1024,
        ..options()
    };
    let (bytes, _) = content(9 * 1024 * 1024);
    let begin = Instant::now();
    upload(&server, &bytes, hurried.clone()).await.unwrap();
    assert!(begin.elapsed() > 2 * hurried.read_timeout, "it took longer than silence may last");
    assert!(session.lock().unwrap().stored.as_ref().unwrap().1 == bytes);
}

#[tokio::test]
async fn a_session_that_is_gone_when_it_is_to_be_closed_is_lost() {
    let (server, _) = registry(|_, seen| match seen.method.as_str() {
        "PUT" | "HEAD" => Some(Reply::new(404)),
        _ => None,
    })
    .await;
    let error = upload(&server, &content(SIZE).0, chunked()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::SessionLost { .. })), "{error:?}");
}

#[tokio::test]
async fn a_session_that_cannot_say_how_far_it_is_is_lost() {
    let (server, _) = registry(|_, seen| match (seen.method.as_str(), seen.path()) {
        ("PATCH", _) => Some(Reply::new(503)),
        ("GET", "/session") => Some(Reply::new(204)),
        _ => None,
    })
    .await;
    let error = upload(&server, &content(SIZE).0, chunked()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::SessionLost { .. })), "{error:?}");
}
