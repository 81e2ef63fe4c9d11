//! Retries, redirects, time-outs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::server::{Head, Reply, TestServer, options};
use crate::digest::Digest;
use crate::registry::{Credentials, Options, RegistryError};

async fn head(server: &TestServer, options: Options) -> Result<Option<u64>, RegistryError> {
    server.repository(options).blob_head(&Digest::sha256("x")).await
}

/// Fails first, then answers.
async fn flaky(failure: impl Fn() -> Reply + Send + Sync + 'static, times: usize) -> TestServer {
    let count = AtomicUsize::new(0);
    TestServer::start(move |seen| {
        if seen.target != "/v2/" && count.fetch_add(1, Ordering::SeqCst) < times {
            return failure();
        }
        Reply::new(200).body("x")
    })
    .await
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    for status in [408, 425, 429, 500, 502, 503, 504] {
        let server = flaky(move || Reply::new(status), 4).await;
        assert_eq!(head(&server, options()).await.unwrap(), Some(1), "{status}");
        assert_eq!(server.seen().len(), 5);
    }
    let server = flaky(Reply::none, 4).await;
    assert_eq!(head(&server, options()).await.unwrap(), Some(1));
}

#[tokio::test]
async fn attempts_are_bounded() {
    let server = flaky(|| Reply::new(503), 100).await;
    assert_eq!(head(&server, options()).await.unwrap_err().status(), Some(503));
    assert_eq!(server.seen().len(), 5);
}

#[tokio::test]
async fn what_will_not_pass_is_not_tried_again() {
    for status in [400, 403, 405, 413, 501] {
        let server = flaky(move || Reply::new(status), 100).await;
        assert_eq!(head(&server, options()).await.unwrap_err().status(), Some(status));
        assert_eq!(server.seen().len(), 1);
    }
}

#[tokio::test]
async fn retry_after_is_obeyed_in_both_forms() {
    let begin = Instant::now();
    let server = flaky(|| Reply::new(429).header("Retry-After", "1"), 1).await;
    head(&server, options()).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(1));

    // A date has whole seconds, so up to one is lost.
    let begin = Instant::now();
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2));
    let server = flaky(move || Reply::new(503).header("Retry-After", date.clone()), 1).await;
    head(&server, options()).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(900), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_retry_after_beyond_our_patience_ends_the_attempts() {
    let server = flaky(|| Reply::new(429).header("Retry-After", "86400"), 1).await;
    assert_eq!(head(&server, options()).await.unwrap_err().status(), Some(429));
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let server = TestServer::start_with(
        |seen| if seen.target == "/v2/" { Head::Read } else { Head::Stall },
        |_| Reply::new(200),
    )
    .await;
    let options = Options { read_timeout: Duration::from_millis(50), attempts: 2, ..options() };
    let error = head(&server, options).await.unwrap_err();
    assert!(matches!(error, RegistryError::Timeout { .. }), "{error}");
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn nothing_listens() {
    let reference = "127.0.0.1:1/app".parse().unwrap();
    let client = crate::registry::Client::new(options()).unwrap();
    let repository = client.repository(&reference, crate::registry::Access::Pull);
    let error = repository.blob_head(&Digest::sha256("x")).await.unwrap_err();
    assert!(matches!(error, RegistryError::Connect { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn the_authorization_stays_at_its_origin() {
    let storage = TestServer::start(|_| Reply::new(200).body("x")).await;
    let target = storage.url("/bucket/x?signature=secret");
    let server = TestServer::start(move |seen| match seen.header("authorization") {
        None => Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#),
        // The first hop stays, the second leaves.
        Some(_) if seen.path() == "/moved" => Reply::new(307).header("Location", target.clone()),
        Some(_) => Reply::new(307).header("Location", "/moved"),
    })
    .await;
    let credentials = Credentials::Basic { username: "u".to_owned(), password: "p".to_owned().into() };
    let options = Options { credentials: Some(credentials), ..options() };
    assert_eq!(head(&server, options).await.unwrap(), Some(1));
    assert!(
        server.seen().iter().any(|seen| seen.path() == "/moved" && seen.header("authorization").is_some())
    );
    assert_eq!(storage.seen().len(), 1);
    assert_eq!(storage.seen()[0].header("authorization"), None);
    assert_eq!(storage.seen()[0].target, "/bucket/x?signature=secret");
}

#[tokio::test]
async fn a_storage_that_asks_for_credentials_gets_none() {
    let storage =
        TestServer::start(|_| Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#)).await;
    let target = storage.url("/x");
    let server = TestServer::start(move |_| Reply::new(302).header("Location", target.clone())).await;
    let credentials = Credentials::Basic { username: "u".to_owned(), password: "p".to_owned().into() };
    let options = Options { credentials: Some(credentials), ..options() };
    assert_eq!(head(&server, options).await.unwrap_err().status(), Some(401));
    assert_eq!(storage.seen().len(), 1);
    assert!(storage.seen()[0].header("authorization").is_none());
}

#[tokio::test]
async fn redirects_are_bounded() {
    let server = TestServer::start(|_| Reply::new(307).header("Location", "/again")).await;
    let error = head(&server, options()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
    assert_eq!(server.seen().len(), 6);
}

#[tokio::test]
async fn a_redirect_to_an_address_that_is_not_public_is_refused() {
    let storage = TestServer::start(|_| Reply::new(200).body("x")).await;
    for target in ["http://10.0.0.1/x".to_owned(), storage.foreign_url("/x")] {
        let server = TestServer::start(move |_| Reply::new(307).header("Location", target.clone())).await;
        let error = head(&server, options()).await.unwrap_err();
        assert!(matches!(error, RegistryError::AddressRefused { .. }), "{error}");
    }
    assert_eq!(storage.seen().len(), 0);
}

#[tokio::test]
async fn a_long_error_is_cut() {
    let server = TestServer::start(|_| Reply::new(403).body(vec![b'x'; 2 * 1024 * 1024])).await;
    let reference = crate::reference::ManifestRef::Tag("t".parse().unwrap());
    let error = server.repository(options()).manifest(&reference, &[]).await.unwrap_err();
    assert_eq!(error.status(), Some(403));
    assert!(error.to_string().len() < 500);
}

#[tokio::test]
async fn a_signed_url_is_not_in_an_error() {
    let server =
        TestServer::start(|_| Reply::new(307).header("Location", "http://127.0.0.1:1/x?signature=secret"))
            .await;
    let error = head(&server, Options { attempts: 1, ..options() }).await.unwrap_err();
    assert!(matches!(error, RegistryError::Connect { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
}

#[tokio::test]
async fn we_say_who_we_are() {
    let server = TestServer::start(|_| Reply::new(200).body("x")).await;
    head(&server, options()).await.unwrap();
    let agent = server.seen()[0].header("user-agent").unwrap().to_owned();
    assert_eq!(agent, concat!("occystrap/", env!("CARGO_PKG_VERSION")));
}
