//! Blobs up in one PUT.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::server::{Head, Reply, Seen, TestServer, content, options};
use crate::blob::{Blob, BlobError, BlobSummary, ByteCount, ByteStream};
use crate::digest::Digest;
use crate::registry::{Options, RegistryError};

/// Large enough that it does not fit into the sockets' buffers.
const SIZE: usize = 8_000_000;

/// Content in memory that counts how often it was opened.
#[derive(Debug)]
struct Content {
    bytes: Vec<u8>,
    opened: AtomicUsize,
    /// What ends the stream instead of its end.
    fails: bool,
    /// Wait before every piece.
    pace: Duration,
}

impl Content {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, opened: AtomicUsize::new(0), fails: false, pace: Duration::ZERO }
    }
}

#[async_trait::async_trait]
impl Blob for Content {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        let mut pieces: Vec<_> =
            self.bytes.chunks(100_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        if self.fails {
            pieces.pop();
            pieces.push(Err(BlobError::Size { expected: 1, actual: 2 }));
        }
        let pace = self.pace;
        Ok(Box::pin(stream::iter(pieces).then(move |piece| async move {
            if !pace.is_zero() {
                tokio::time::sleep(pace).await;
            }
            piece
        })))
    }

    fn size(&self) -> Option<u64> {
        Some(self.bytes.len() as u64)
    }

    fn identity(&self) -> String {
        String::new()
    }
}

fn session() -> Reply {
    Reply::new(202).header("Location", "/session/1?_state=a%2Fb")
}

async fn upload(server: &TestServer, blob: &Content, options: Options) -> Result<BlobSummary, BlobError> {
    let (size, digest) = (blob.bytes.len() as u64, Digest::sha256(&blob.bytes));
    server.repository(options).upload_blob(blob, &digest, size, None, &ByteCount::default()).await
}

fn answers(seen: &Seen, put: impl Fn(&Seen) -> Reply) -> Reply {
    match seen.method.as_str() {
        "POST" => session(),
        "PUT" => put(seen),
        "DELETE" => Reply::new(204),
        "HEAD" => Reply::new(404),
        _ => Reply::new(200),
    }
}

#[tokio::test]
async fn a_blob_goes_up_in_one_put() {
    let (bytes, digest) = content(SIZE);
    for absolute in [false, true] {
        let server = TestServer::start(move |seen| match seen.method.as_str() {
            "POST" if absolute => {
                let host = seen.header("host").unwrap();
                Reply::new(202).header("Location", format!("http://{host}/session/1?_state=a%2Fb"))
            }
            _ => answers(seen, |_| Reply::new(201)),
        })
        .await;
        let blob = Content::new(bytes.clone());
        let progress = ByteCount::default();
        let summary = server
            .repository(options())
            .upload_blob(&blob, &digest, SIZE as u64, None, &progress)
            .await
            .unwrap();
        assert_eq!(summary, BlobSummary { digest: digest.clone(), size: SIZE as u64 });
        assert_eq!(progress.get(), SIZE as u64);
        assert_eq!(server.lines(), ["POST /v2/app/blobs/uploads/", "PUT /session/1"]);
        let put = &server.seen()[1];
        assert_eq!(put.target, format!("/session/1?_state=a%2Fb&digest={digest}"));
        assert!(put.body == bytes);
    }
}

#[tokio::test]
async fn an_empty_blob_goes_up_too() {
    let server = TestServer::start(|seen| answers(seen, |_| Reply::new(201))).await;
    upload(&server, &Content::new(Vec::new()), options()).await.unwrap();
    assert_eq!(server.lines(), ["POST /v2/app/blobs/uploads/", "PUT /session/1"]);
}

#[tokio::test]
async fn each_attempt_has_its_own_session_and_its_own_content() {
    let count = AtomicUsize::new(0);
    let server = TestServer::start(move |seen| {
        answers(seen, |_| match count.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::new(500),
            1 => Reply::new(429).header("Retry-After", "0"),
            _ => Reply::new(201),
        })
    })
    .await;
    let (bytes, digest) = content(SIZE);
    let blob = Content::new(bytes);
    let progress = ByteCount::default();
    server.repository(options()).upload_blob(&blob, &digest, SIZE as u64, None, &progress).await.unwrap();
    assert_eq!(blob.opened.load(Ordering::SeqCst), 3);
    assert_eq!(progress.get(), SIZE as u64);
    let methods: Vec<_> = server.seen().into_iter().map(|seen| seen.method).collect();
    assert_eq!(methods, ["POST", "PUT", "DELETE", "HEAD", "POST", "PUT", "DELETE", "HEAD", "POST", "PUT"]);
}

#[tokio::test]
async fn an_answer_that_was_lost_is_found_by_a_head() {
    let server = TestServer::start(|seen| match seen.method.as_str() {
        "HEAD" => Reply::new(200).header("Content-Length", SIZE.to_string()),
        _ => answers(seen, |_| Reply::none()),
    })
    .await;
    let blob = Content::new(content(SIZE).0);
    upload(&server, &blob, options()).await.unwrap();
    assert_eq!(blob.opened.load(Ordering::SeqCst), 1);
}

/// A registry that takes chunks and remembers nothing of them but their number of bytes.
fn takes_chunks(seen: &Seen, committed: &AtomicUsize) -> Reply {
    match seen.method.as_str() {
        "PATCH" => {
            let now = committed.fetch_add(seen.body.len(), Ordering::SeqCst) + seen.body.len();
            Reply::new(202).header("Location", "/session/2").header("Range", format!("0-{}", now - 1))
        }
        _ => answers(seen, |_| Reply::new(201)),
    }
}

#[tokio::test]
async fn a_registry_that_takes_no_whole_blobs_gets_pieces() {
    for status in [307, 308, 404, 405, 411, 413, 415, 501] {
        let committed = AtomicUsize::new(0);
        let server = TestServer::start(move |seen| match seen.method.as_str() {
            "PUT" if !seen.body.is_empty() => Reply::new(status),
            _ => takes_chunks(seen, &committed),
        })
        .await;
        let (bytes, _) = content(1_000_000);
        let blob = Content::new(bytes.clone());
        upload(&server, &blob, Options { upload_chunk: 300_000, ..options() }).await.unwrap();
        let patched: Vec<u8> = server
            .seen()
            .into_iter()
            .filter(|seen| seen.method == "PATCH")
            .flat_map(|seen| seen.body)
            .collect();
        assert!(patched == bytes, "{status}");
    }
}

#[tokio::test]
async fn a_way_that_breaks_twice_is_gone_in_pieces() {
    let committed = AtomicUsize::new(0);
    let server = TestServer::start_with(
        |seen| {
            if seen.method == "PUT" && seen.header("content-length") != Some("0") {
                Head::CutBody(100_000)
            } else {
                Head::Read
            }
        },
        move |seen| takes_chunks(seen, &committed),
    )
    .await;
    let blob = Content::new(content(SIZE).0);
    upload(&server, &blob, options()).await.unwrap();
    assert_eq!(blob.opened.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn pieces_start_again_when_the_registry_gives_their_session_up() {
    let (committed, patches) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let server = TestServer::start(move |seen| match seen.method.as_str() {
        "PUT" if !seen.body.is_empty() => Reply::new(413),
        "PATCH" if patches.fetch_add(1, Ordering::SeqCst) == 1 => Reply::new(404),
        "POST" => {
            committed.store(0, Ordering::SeqCst);
            session()
        }
        _ => takes_chunks(seen, &committed),
    })
    .await;
    let blob = Content::new(content(1_000_000).0);
    let progress = ByteCount::default();
    let (repository, digest) =
        (server.repository(Options { upload_chunk: 300_000, ..options() }), Digest::sha256(&blob.bytes));
    repository.upload_blob(&blob, &digest, 1_000_000, None, &progress).await.unwrap();
    assert_eq!(blob.opened.load(Ordering::SeqCst), 3);
    assert_eq!(progress.get(), 1_000_000);
}

#[tokio::test]
async fn a_refused_blob_is_not_sent_again_and_its_session_deleted() {
    let server = TestServer::start(|seen| answers(seen, |_| Reply::new(400))).await;
    let error = upload(&server, &Content::new(content(SIZE).0), options()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(error) if error.status() == Some(400)));
    assert_eq!(server.lines(), ["POST /v2/app/blobs/uploads/", "PUT /session/1", "DELETE /session/1"]);
}

#[tokio::test]
async fn what_is_wrong_with_the_content_is_what_is_said() {
    let server = TestServer::start(|seen| answers(seen, |_| Reply::new(201))).await;
    let blob = Content { fails: true, ..Content::new(content(SIZE).0) };
    let error = upload(&server, &blob, options()).await.unwrap_err();
    assert!(matches!(error, BlobError::Size { expected: 1, actual: 2 }), "{error:?}");
    assert_eq!(blob.opened.load(Ordering::SeqCst), 1);
    assert_eq!(server.lines().last().unwrap(), "DELETE /session/1");
}

#[tokio::test]
async fn content_of_another_size_is_not_stored() {
    let server = TestServer::start(|seen| answers(seen, |_| Reply::new(201))).await;
    let (bytes, digest) = content(SIZE);
    let blob = Content::new(bytes);
    for size in [SIZE as u64 - 1, SIZE as u64 + 1] {
        let repository = server.repository(options());
        let error =
            repository.upload_blob(&blob, &digest, size, None, &ByteCount::default()).await.unwrap_err();
        assert!(matches!(error, BlobError::Size { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_token_that_ends_before_the_content_is_sent_is_renewed() {
    let count = AtomicUsize::new(0);
    let server = TestServer::start(move |seen| {
        if seen.path() == "/token" {
            let token = count.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200).body(format!(r#"{{"token":"t{token}","expires_in":300}}"#));
        }
        let good = match seen.method.as_str() {
            "PUT" => seen.header("authorization") == Some("Bearer t2"),
            _ => seen.header("authorization").is_some(),
        };
        if good {
            return answers(seen, |_| Reply::new(201));
        }
        let realm = format!("http://{}/token", seen.header("host").unwrap());
        Reply::new(401).header("WWW-Authenticate", format!(r#"Bearer realm="{realm}""#))
    })
    .await;
    let blob = Content::new(content(SIZE).0);
    upload(&server, &blob, options()).await.unwrap();
    assert_eq!(blob.opened.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_location_at_an_address_that_is_not_public_is_refused() {
    let elsewhere = TestServer::start(|_| Reply::new(201)).await;
    for target in ["http://10.0.0.1/session".to_owned(), elsewhere.foreign_url("/session")] {
        let server = TestServer::start(move |seen| match seen.method.as_str() {
            "POST" => Reply::new(202).header("Location", target.clone()),
            _ => answers(seen, |_| Reply::new(201)),
        })
        .await;
        let error = upload(&server, &Content::new(content(10).0), options()).await.unwrap_err();
        assert!(matches!(error, BlobError::Registry(RegistryError::AddressRefused { .. })), "{error:?}");
    }
    assert_eq!(elsewhere.seen().len(), 0);
}

#[tokio::test]
async fn a_location_elsewhere_gets_no_authorization() {
    let elsewhere = TestServer::start(|_| Reply::new(201)).await;
    let target = elsewhere.url("/session?sig=x");
    let server = TestServer::start(move |seen| match seen.header("authorization") {
        Some(_) => Reply::new(202).header("Location", target.clone()),
        None => Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#),
    })
    .await;
    let credentials =
        crate::registry::Credentials::Basic { username: "u".to_owned(), password: "p".to_owned().into() };
    let options = Options { credentials: Some(credentials), ..options() };
    upload(&server, &Content::new(content(10).0), options).await.unwrap();
    assert_eq!(elsewhere.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn a_registry_that_stored_something_else_is_found_out() {
    let server = TestServer::start(|seen| {
        answers(seen, |_| Reply::new(201).header("Docker-Content-Digest", content(1).1.to_string()))
    })
    .await;
    let error = upload(&server, &Content::new(content(10).0), options()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::Protocol { .. })), "{error:?}");
}

#[tokio::test]
async fn a_slow_source_is_waited_for_and_a_stalled_registry_is_not() {
    let hurried = || Options { read_timeout: Duration::from_millis(60), attempts: 1, ..options() };
    let server = TestServer::start(|seen| answers(seen, |_| Reply::new(201))).await;
    let slow = Content { pace: Duration::from_millis(200), ..Content::new(content(300_000).0) };
    upload(&server, &slow, hurried()).await.unwrap();

    let server = TestServer::start_with(
        |seen| if seen.method == "PUT" { Head::Stall } else { Head::Read },
        |seen| answers(seen, |_| Reply::new(201)),
    )
    .await;
    let error = upload(&server, &Content::new(content(SIZE).0), hurried()).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::Timeout { .. })), "{error:?}");
}

#[tokio::test]
async fn a_cancelled_upload_deletes_its_session() {
    let server = TestServer::start_with(
        |seen| if seen.method == "PUT" { Head::Stall } else { Head::Read },
        |seen| answers(seen, |_| Reply::new(201)),
    )
    .await;
    let blob = Arc::new(Content::new(content(SIZE).0));
    let cancelled = tokio::time::timeout(Duration::from_millis(300), upload(&server, &blob, options())).await;
    assert!(cancelled.is_err());
    for _ in 0..100 {
        if server.lines().last().unwrap() == "DELETE /session/1" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", server.lines());
}
