//! Blobs down, from servers whose connections break and whose answers are wrong.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;

use super::server::{Reply, Seen, TestServer, content, options};
use crate::blob::BlobError;
use crate::digest::Digest;
use crate::registry::{Options, RegistryError};

const SIZE: usize = 3_000_000;

/// All that is delivered, and the error that ends it.
async fn read(
    server: &TestServer,
    digest: &Digest,
    size: Option<usize>,
    options: Options,
) -> (Vec<u8>, Option<BlobError>) {
    let blob = server.repository(options).blob(digest, size.map(|size| size as u64));
    let mut all = Vec::new();
    let mut stream = match blob.open().await {
        Ok(stream) => stream,
        Err(error) => return (all, Some(error)),
    };
    while let Some(piece) = stream.next().await {
        match piece {
            Ok(piece) => all.extend_from_slice(&piece),
            Err(error) => return (all, Some(error)),
        }
    }
    (all, None)
}

fn range_start(seen: &Seen) -> Option<usize> {
    seen.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

/// A good answer to what was asked.
fn ranged(seen: &Seen, bytes: &[u8]) -> Reply {
    match range_start(seen) {
        Some(start) => partial(bytes, start),
        None => Reply::new(200).body(bytes),
    }
}

fn partial(bytes: &[u8], start: usize) -> Reply {
    let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
    Reply::new(206).header("Content-Range", range).body(&bytes[start..])
}

/// A server whose connections break after so many bytes each.
async fn breaking(
    cuts: &'static [usize],
    answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
) -> TestServer {
    let count = AtomicUsize::new(0);
    TestServer::start(move |seen| {
        if seen.method != "GET" || seen.target == "/v2/" {
            return Reply::new(200);
        }
        match cuts.get(count.fetch_add(1, Ordering::SeqCst)) {
            Some(cut) => answer(seen).cut(*cut),
            None => answer(seen),
        }
    })
    .await
}

#[tokio::test]
async fn a_blob_is_streamed_and_verified() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = breaking(&[], move |seen| ranged(seen, &answer)).await;
    for size in [Some(SIZE), None] {
        let (all, error) = read(&server, &digest, size, options()).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!(all, bytes);
    }
    let answer = bytes.clone();
    let server = breaking(&[], move |seen| ranged(seen, &answer).chunked()).await;
    for size in [Some(SIZE), None] {
        let (all, error) = read(&server, &digest, size, options()).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!(all, bytes);
    }
}

#[tokio::test]
async fn an_empty_blob_has_a_digest_too() {
    let server = TestServer::start(|_| Reply::new(200)).await;
    for size in [Some(0), None] {
        let (all, error) = read(&server, &Digest::sha256(""), size, options()).await;
        assert!(error.is_none() && all.is_empty(), "{error:?}");
    }
    let (_, error) = read(&server, &Digest::sha256("x"), Some(0), options()).await;
    assert!(matches!(error, Some(BlobError::Digest { .. })), "{error:?}");
}

#[tokio::test]
async fn a_broken_body_is_resumed_where_it_broke() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = breaking(&[1_000_000, 0, 500_000], move |seen| ranged(seen, &answer)).await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
    let starts: Vec<_> = server.seen().iter().map(range_start).collect();
    assert_eq!(starts.len(), 4);
    assert_eq!(starts[0], None);
    assert!(starts[1..].iter().all(Option::is_some), "{starts:?}");
}

#[tokio::test]
async fn a_body_of_unknown_length_that_ends_early_is_resumed() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = TestServer::start(move |seen| match range_start(seen) {
        // It looks complete.
        None => Reply::new(200).body(&answer[..1_000_000]).chunked(),
        Some(start) => partial(&answer, start),
    })
    .await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
}

#[tokio::test]
async fn progress_makes_past_failures_forgotten() {
    const SIZE: usize = 12_000_000;
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = breaking(&[1_200_000; 9], move |seen| ranged(seen, &answer)).await;
    let (all, error) = read(&server, &digest, Some(SIZE), Options { attempts: 2, ..options() }).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
}

#[tokio::test]
async fn failures_without_progress_are_bounded() {
    let (bytes, digest) = content(SIZE);
    let server = breaking(&[1000; 100], move |seen| ranged(seen, &bytes)).await;
    let (_, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(matches!(error, Some(BlobError::Registry(RegistryError::Broken { .. }))), "{error:?}");
    assert_eq!(server.seen().len(), 5);
}

#[tokio::test]
async fn a_server_that_ignores_the_range_is_read_from_the_start_again() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = breaking(&[1_000_000, 2_000_000], move |_| Reply::new(200).body(answer.clone())).await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
}

#[tokio::test]
async fn a_start_that_has_changed_is_found_out() {
    let (bytes, digest) = content(SIZE);
    let mut other = bytes.clone();
    other[5] ^= 1;
    let count = AtomicUsize::new(0);
    let server = TestServer::start(move |seen| match (seen.method.as_str(), seen.target.as_str()) {
        ("GET", target) if target != "/v2/" && count.fetch_add(1, Ordering::SeqCst) == 0 => {
            Reply::new(200).body(other.clone()).cut(1_000_000)
        }
        _ => Reply::new(200).body(bytes.clone()),
    })
    .await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(matches!(error, Some(BlobError::Digest { .. })), "{error:?}");
    assert!(all.len() <= 1_000_000);
}

#[tokio::test]
async fn an_answer_with_another_range_is_not_used() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = breaking(&[1_000_000], move |seen| match range_start(seen) {
        Some(start) => partial(&answer, start - 1),
        None => Reply::new(200).body(answer.clone()),
    })
    .await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
    assert_eq!(range_start(server.seen().last().unwrap()), None);
}

#[tokio::test]
async fn a_partial_answer_without_a_content_range_is_not_used() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = breaking(&[1_000_000], move |seen| match range_start(seen) {
        Some(start) => Reply::new(206).body(&answer[start..]),
        None => Reply::new(200).body(answer.clone()),
    })
    .await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
}

#[tokio::test]
async fn a_server_that_refuses_ranges_is_read_from_the_start_again() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = breaking(&[1_000_000], move |seen| match range_start(seen) {
        Some(_) => Reply::new(416),
        None => Reply::new(200).body(answer.clone()),
    })
    .await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
}

#[tokio::test]
async fn a_partial_answer_that_nobody_asked_for_is_refused() {
    let (bytes, digest) = content(1000);
    let server = TestServer::start(move |_| partial(&bytes, 0)).await;
    let (all, error) = read(&server, &digest, Some(1000), options()).await;
    assert!(matches!(error, Some(BlobError::Registry(RegistryError::Protocol { .. }))), "{error:?}");
    assert!(all.is_empty());
}

#[tokio::test]
async fn another_length_than_the_descriptors_is_refused() {
    for (got, chunked) in [(SIZE - 1, false), (SIZE - 1, true), (SIZE + 1, false), (SIZE + 1, true)] {
        let (bytes, _) = content(got);
        let (_, digest) = content(SIZE);
        let server = TestServer::start(move |_| {
            let reply = Reply::new(200).body(bytes.clone());
            if chunked { reply.chunked() } else { reply }
        })
        .await;
        let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
        assert!(matches!(error, Some(BlobError::Size { .. })), "{got} {chunked}: {error:?}");
        assert!(all.len() <= SIZE);
    }
}

#[tokio::test]
async fn bytes_after_the_right_ones_are_an_error() {
    let (mut bytes, digest) = content(SIZE);
    bytes.extend_from_slice(b"more");
    let server = TestServer::start(move |_| Reply::new(200).body(bytes.clone()).chunked()).await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(matches!(error, Some(BlobError::Size { .. })), "{error:?}");
    assert!(all.len() < SIZE);
}

#[tokio::test]
async fn wrong_bytes_are_never_delivered_to_their_end() {
    let (mut bytes, digest) = content(SIZE);
    bytes[SIZE / 2] ^= 1;
    let server = TestServer::start(move |_| Reply::new(200).body(bytes.clone())).await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(matches!(error, Some(BlobError::Digest { .. })), "{error:?}");
    assert!(all.len() < SIZE);
    let (_, error) = read(&server, &digest, None, options()).await;
    assert!(matches!(error, Some(BlobError::Digest { .. })), "{error:?}");
}

#[tokio::test]
async fn a_blob_that_is_not_there_is_said_at_once() {
    let server = TestServer::start(|_| Reply::new(404)).await;
    let (_, error) = read(&server, &Digest::sha256("x"), Some(1), options()).await;
    assert!(matches!(error, Some(BlobError::Registry(error)) if error.is_not_found()));
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_token_that_ends_in_the_middle_of_a_blob_is_renewed() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let token = AtomicUsize::new(0);
    let server = TestServer::start(move |seen| {
        if seen.path() == "/token" {
            let token = token.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200).body(format!(r#"{{"token":"t{token}","expires_in":300}}"#));
        }
        let wanted = format!("Bearer t{}", if seen.header("range").is_some() { 2 } else { 1 });
        if seen.header("authorization") != Some(&wanted) {
            let realm = format!("http://{}/token", seen.header("host").unwrap());
            return Reply::new(401).header("WWW-Authenticate", format!(r#"Bearer realm="{realm}""#));
        }
        let reply = ranged(seen, &answer);
        if seen.header("range").is_some() { reply } else { reply.cut(1_000_000) }
    })
    .await;
    let (all, error) = read(&server, &digest, Some(SIZE), options()).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
}

#[tokio::test]
async fn a_body_that_stalls_is_resumed() {
    let (bytes, digest) = content(SIZE);
    let answer = bytes.clone();
    let server = TestServer::start(move |seen| {
        if range_start(seen).is_some() {
            return ranged(seen, &answer);
        }
        // The rest of the announced length never comes, and the connection stays.
        Reply::new(200).header("Content-Length", SIZE.to_string()).body(&answer[..1_000_000])
    })
    .await;
    let options = Options { read_timeout: std::time::Duration::from_millis(100), ..options() };
    let (all, error) = read(&server, &digest, Some(SIZE), options).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all == bytes);
}

#[tokio::test]
async fn the_last_bytes_are_a_hint_that_nobody_waits_for() {
    let digest = Digest::sha256("x");
    // Two of four bytes, and then nothing.
    let stalled = TestServer::start(|_| {
        Reply::new(206).header("Content-Range", "bytes 6-9/10").header("Content-Length", "4").body("ab")
    })
    .await;
    let patient = Options { read_timeout: Duration::from_secs(600), ..options() };
    let tail = stalled.repository(patient).blob(&digest, Some(10));
    let tail = tokio::time::timeout(Duration::from_secs(20), tail.tail()).await;
    assert_eq!(tail.expect("it is given up"), None);

    let busy = TestServer::start(|_| Reply::new(503)).await;
    assert_eq!(busy.repository(options()).blob(&digest, Some(10)).tail().await, None);
    assert_eq!(busy.seen().len(), 1, "it is not asked for again");
}
