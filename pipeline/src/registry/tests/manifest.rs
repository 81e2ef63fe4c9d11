//! Manifests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::server::{Reply, TestServer, content, options};
use crate::digest::Digest;
use crate::reference::ManifestRef;
use crate::registry::{Options, RegistryError};

const MANIFEST: &[u8] = br#"{"schemaVersion":2}"#;
const MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

fn latest() -> ManifestRef {
    ManifestRef::Tag("latest".parse().unwrap())
}

#[tokio::test]
async fn a_manifest_comes_with_its_media_type_and_our_digest() {
    let server = TestServer::start(|_| {
        Reply::new(200)
            .header("Content-Type", format!("{MEDIA_TYPE}; charset=utf-8"))
            .header("Docker-Content-Digest", Digest::sha256(MANIFEST).to_string())
            .body(MANIFEST)
    })
    .await;
    let manifest = server.repository(options()).manifest(&latest(), &["a/b", "c/d"]).await.unwrap();
    assert_eq!(manifest.bytes, MANIFEST);
    assert_eq!(manifest.media_type, MEDIA_TYPE);
    assert_eq!(manifest.digest, Digest::sha256(MANIFEST));
    assert_eq!(server.seen()[0].header("accept"), Some("a/b, c/d"));
    assert_eq!(server.lines(), ["GET /v2/app/manifests/latest"]);
}

#[tokio::test]
async fn other_bytes_than_those_that_were_asked_for_or_announced_are_refused() {
    let server = TestServer::start(|_| Reply::new(200).body(MANIFEST)).await;
    let other = ManifestRef::Digest(Digest::sha256("other"));
    let error = server.repository(options()).manifest(&other, &[]).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
    let server = TestServer::start(|_| {
        let announced = Digest::sha256("other").to_string();
        Reply::new(200).header("Docker-Content-Digest", announced).body(MANIFEST)
    })
    .await;
    let error = server.repository(options()).manifest(&latest(), &[]).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
}

#[tokio::test]
async fn a_manifest_larger_than_its_cap_is_not_read() {
    for chunked in [false, true] {
        let server = TestServer::start(move |_| {
            let reply = Reply::new(200).body(vec![b' '; 4 * 1024 * 1024 + 1]);
            if chunked { reply.chunked() } else { reply }
        })
        .await;
        let error = server.repository(options()).manifest(&latest(), &[]).await.unwrap_err();
        assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_manifest_that_is_not_there_is_none_for_head_and_an_error_for_get() {
    let server = TestServer::start(|_| Reply::new(404)).await;
    let repository = server.repository(options());
    assert_eq!(repository.manifest_head(&latest(), &[]).await.unwrap(), None);
    assert!(repository.manifest(&latest(), &[]).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_head_says_what_the_registry_says() {
    let server = TestServer::start(|_| {
        Reply::new(200)
            .header("Content-Type", MEDIA_TYPE)
            .header("Docker-Content-Digest", Digest::sha256(MANIFEST).to_string())
            .body(MANIFEST)
    })
    .await;
    let head = server.repository(options()).manifest_head(&latest(), &[]).await.unwrap().unwrap();
    assert_eq!(head.digest, Some(Digest::sha256(MANIFEST)));
    assert_eq!(head.size, Some(MANIFEST.len() as u64));
    assert_eq!(head.media_type, MEDIA_TYPE);
}

#[tokio::test]
async fn a_manifest_is_put_again_after_a_failure_that_passes() {
    let count = AtomicUsize::new(0);
    let server = TestServer::start(move |seen| match seen.method.as_str() {
        "PUT" => match count.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::new(429).header("Retry-After", "0"),
            1 => Reply::new(500),
            2 => Reply::none(),
            _ => Reply::new(201).header("Docker-Content-Digest", Digest::sha256(&seen.body).to_string()),
        },
        _ => Reply::new(200),
    })
    .await;
    let put = server
        .repository(options())
        .put_manifest(&latest(), MEDIA_TYPE, Bytes::from(MANIFEST))
        .await
        .unwrap();
    assert_eq!(put.digest, Digest::sha256(MANIFEST));
    let seen = server.seen();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|seen| seen.body == MANIFEST && seen.header("content-type") == Some(MEDIA_TYPE)));
}

#[tokio::test]
async fn a_manifest_is_put_again_when_the_registry_read_a_link_while_it_wrote_it() {
    let count = AtomicUsize::new(0);
    let invalid = r#"{"errors":[{"code":"DIGEST_INVALID","message":"provided digest did not match"}]}"#;
    let server = TestServer::start(move |seen| match seen.method.as_str() {
        "PUT" => match count.fetch_add(1, Ordering::SeqCst) {
            1 | 3.. => Reply::new(400).body(invalid),
            _ => Reply::new(201),
        },
        _ => Reply::new(200),
    })
    .await;
    let repository = server.repository(options());
    let tag = latest();
    let put = || repository.put_manifest(&tag, MEDIA_TYPE, Bytes::from(MANIFEST));
    put().await.unwrap();
    put().await.unwrap();
    let puts = || server.seen().iter().filter(|seen| seen.method == "PUT").count();
    assert_eq!(puts(), 3);
    // Not forever: a registry that means it is believed in the end.
    let error = put().await.unwrap_err();
    assert!(error.to_string().contains("DIGEST_INVALID"), "{error}");
    assert!(puts() > 4);
}

#[tokio::test]
async fn a_registry_that_stored_something_else_is_found_out() {
    let server =
        TestServer::start(|_| Reply::new(201).header("Docker-Content-Digest", content(10).1.to_string()))
            .await;
    let repository = server.repository(options());
    let error = repository.put_manifest(&latest(), MEDIA_TYPE, Bytes::from(MANIFEST)).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
}

#[tokio::test]
async fn a_document_that_comes_byte_by_byte_is_not_waited_for() {
    let server =
        TestServer::start(|_| Reply::new(200).body([b' '; 1000]).drip(Duration::from_millis(20))).await;
    let hurried = Options { read_timeout: Duration::from_millis(100), attempts: 1, ..options() };
    let begin = Instant::now();
    let error = server.repository(hurried).manifest(&latest(), &[]).await.unwrap_err();
    assert!(matches!(error, RegistryError::Timeout { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10));
}
