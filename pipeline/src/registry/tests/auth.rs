//! Challenges, tokens, credentials.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::server::{Reply, Seen, TestServer, options};
use crate::digest::Digest;
use crate::registry::{Credentials, Options, RegistryError};

/// A registry that wants the token `good`, with the token server beside it.
fn registry(seen: &Seen, token: impl Fn() -> Reply) -> Reply {
    if seen.path() == "/token" {
        return token();
    }
    if seen.header("authorization") == Some("Bearer good") {
        return Reply::new(200).body("x");
    }
    challenge(seen, "/token")
}

fn challenge(seen: &Seen, realm: &str) -> Reply {
    let realm = match realm.strip_prefix('/') {
        Some(path) => format!("http://{}/{path}", seen.header("host").unwrap()),
        None => realm.to_owned(),
    };
    let value = format!(r#"BEARER scope="repository:app:pull",Service="the, service",realm="{realm}""#);
    Reply::new(401).header("WWW-Authenticate", value)
}

fn good() -> Reply {
    Reply::new(200).body(r#"{"token":"good","expires_in":300}"#)
}

fn with(credentials: Credentials) -> Options {
    Options { credentials: Some(credentials), ..options() }
}

fn basic() -> Options {
    with(Credentials::Basic { username: "user".to_owned(), password: "hunter2".to_owned().into() })
}

fn identity() -> Options {
    with(Credentials::IdentityToken { username: String::new(), token: "identity".to_owned().into() })
}

async fn head(server: &TestServer, options: Options) -> Result<Option<u64>, RegistryError> {
    server.repository(options).blob_head(&Digest::sha256("x")).await
}

fn tokens(server: &TestServer) -> Vec<Seen> {
    server.seen().into_iter().filter(|seen| seen.path() == "/token").collect()
}

#[tokio::test]
async fn an_anonymous_token_is_fetched_when_the_registry_asks_for_one() {
    for body in [r#"{"token":"good"}"#, r#"{"access_token":"good"}"#, r#"{"token":"","access_token":"good"}"#]
    {
        let server = TestServer::start(move |seen| registry(seen, || Reply::new(200).body(body))).await;
        assert_eq!(head(&server, options()).await.unwrap(), Some(1));
        let token = &tokens(&server)[0];
        assert_eq!(token.header("authorization"), None);
        assert_eq!(token.query("service"), ["the, service"]);
        assert_eq!(token.query("scope"), ["repository:app:pull,push"]);
    }
}

#[tokio::test]
async fn credentials_go_to_the_token_server_and_not_to_the_registry() {
    let server = TestServer::start(|seen| registry(seen, good)).await;
    assert_eq!(head(&server, basic()).await.unwrap(), Some(1));
    let token = &tokens(&server)[0];
    assert_eq!(token.method, "GET");
    assert_eq!(token.header("authorization"), Some("Basic dXNlcjpodW50ZXIy"));
    assert_eq!(token.query("account"), ["user"]);
    let others = server.seen().into_iter().filter(|seen| seen.path() != "/token");
    assert!(
        others.filter_map(|seen| seen.header("authorization").map(str::to_owned)).all(|a| a == "Bearer good")
    );
}

#[tokio::test]
async fn a_scope_that_the_registry_misses_is_asked_for_first() {
    let server = TestServer::start(|seen| match seen.path() {
        "/token" => {
            let first =
                seen.query("scope").first().is_some_and(|scope| scope == "repository:project/app:pull");
            Reply::new(200).body(if first { r#"{"token":"good"}"# } else { r#"{"token":"other"}"# })
        }
        _ if seen.header("authorization") == Some("Bearer good") => Reply::new(200).body("x"),
        _ => {
            let realm = format!("http://{}/token", seen.header("host").unwrap());
            let value = format!("Bearer realm={realm},scope=repository:project/app:pull");
            Reply::new(401).header("WWW-Authenticate", value)
        }
    })
    .await;
    let repository = server.repository(options());
    let digest = Digest::sha256("x");
    assert_eq!(repository.blob_head(&digest).await.unwrap(), Some(1));
    assert_eq!(
        tokens(&server)[0].query("scope"),
        ["repository:project/app:pull", "repository:app:pull,push"]
    );
    // The next request knows it all.
    assert_eq!(repository.blob_head(&digest).await.unwrap(), Some(1));
    assert_eq!(server.seen().len(), 4);
}

#[tokio::test]
async fn an_identity_token_is_posted() {
    let server = TestServer::start(|seen| {
        registry(seen, || Reply::new(200).body(r#"{"access_token":"good","expires_in":60}"#))
    })
    .await;
    assert_eq!(head(&server, identity()).await.unwrap(), Some(1));
    let token = &tokens(&server)[0];
    assert_eq!(token.method, "POST");
    assert_eq!(
        String::from_utf8_lossy(&token.body),
        "grant_type=refresh_token&service=the%2C+service&client_id=occystrap\
         &scope=repository%3Aapp%3Apull%2Cpush&refresh_token=identity"
    );
}

#[tokio::test]
async fn a_token_server_that_knows_no_post_is_asked_with_get() {
    for status in [404, 405] {
        let server = TestServer::start(move |seen| match (seen.path(), seen.method.as_str()) {
            ("/token", "POST") => Reply::new(status),
            _ => registry(seen, good),
        })
        .await;
        assert_eq!(head(&server, identity()).await.unwrap(), Some(1));
        let seen = tokens(&server);
        assert_eq!((seen[0].method.as_str(), seen[1].method.as_str()), ("POST", "GET"));
        assert!(seen[1].header("authorization").is_some_and(|value| value.starts_with("Basic ")));
    }
}

#[tokio::test]
async fn a_token_that_ended_early_is_fetched_once_more_and_the_request_sent_again() {
    let generation = Arc::new(AtomicUsize::new(0));
    let current = Arc::clone(&generation);
    let server = TestServer::start(move |seen| {
        if seen.path() == "/token" {
            let token = current.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200).body(format!(r#"{{"token":"t{token}","expires_in":300}}"#));
        }
        let token = format!("Bearer t{}", current.load(Ordering::SeqCst));
        if seen.header("authorization") == Some(&token) {
            return Reply::new(200).body("x");
        }
        challenge(seen, "/token")
    })
    .await;
    let repository = server.repository(options());
    let digest = Digest::sha256("x");
    repository.blob_head(&digest).await.unwrap();
    generation.fetch_add(1, Ordering::SeqCst);
    repository.blob_head(&digest).await.unwrap();
    assert_eq!(tokens(&server).len(), 2);
    assert_eq!(server.seen().len(), 6);
}

#[tokio::test]
async fn a_fresh_token_that_is_refused_is_not_fetched_again() {
    let server = TestServer::start(|seen| {
        registry(seen, || Reply::new(200).body(r#"{"token":"bad","expires_in":300}"#))
    })
    .await;
    let error = head(&server, options()).await.unwrap_err();
    assert_eq!(error.status(), Some(401));
    assert!(error.hint().unwrap().starts_with("log in with `docker login 127.0.0.1:"));
    assert_eq!(tokens(&server).len(), 1);
}

#[tokio::test]
async fn a_token_is_not_used_when_it_is_about_to_end() {
    let server = TestServer::start(|seen| {
        registry(seen, || Reply::new(200).body(r#"{"token":"good","expires_in":0.2}"#))
    })
    .await;
    let repository = server.repository(options());
    repository.blob_head(&Digest::sha256("x")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(180)).await;
    repository.blob_head(&Digest::sha256("x")).await.unwrap();
    assert_eq!(tokens(&server).len(), 2);
    // It was fetched before it was refused.
    assert_eq!(server.seen().len(), 5);
}

#[tokio::test]
async fn one_refresh_is_shared_by_all_that_wait_for_it() {
    let server = TestServer::start(|seen| registry(seen, || good().after(Duration::from_millis(100)))).await;
    let repository = server.repository(options());
    let digest = Digest::sha256("x");
    let requests = (0..20).map(|_| repository.blob_head(&digest));
    for answer in futures_util::future::join_all(requests).await {
        assert_eq!(answer.unwrap(), Some(1));
    }
    assert_eq!(tokens(&server).len(), 1);
}

#[tokio::test]
async fn a_failed_refresh_is_shared_too() {
    let server =
        TestServer::start(|seen| registry(seen, || Reply::new(403).after(Duration::from_millis(100)))).await;
    let repository = server.repository(options());
    let digest = Digest::sha256("x");
    let requests = (0..20).map(|_| repository.blob_head(&digest));
    for answer in futures_util::future::join_all(requests).await {
        assert_eq!(answer.unwrap_err().status(), Some(403));
    }
    assert!(tokens(&server).len() <= 2, "{}", tokens(&server).len());
}

#[tokio::test]
async fn a_token_server_that_is_busy_is_asked_again() {
    let busy = AtomicBool::new(true);
    let server = TestServer::start(move |seen| {
        registry(seen, || if busy.swap(false, Ordering::SeqCst) { Reply::new(503) } else { good() })
    })
    .await;
    assert_eq!(head(&server, options()).await.unwrap(), Some(1));
}

#[tokio::test]
async fn an_endless_token_is_not_read() {
    let body = format!(r#"{{"token":"{}"}}"#, "x".repeat(64 * 1024));
    for chunked in [false, true] {
        let body = body.clone();
        let server = TestServer::start(move |seen| {
            let reply = Reply::new(200).body(body.clone());
            registry(seen, || if chunked { reply.clone().chunked() } else { reply.clone() })
        })
        .await;
        let error = head(&server, options()).await.unwrap_err();
        assert!(matches!(error, RegistryError::TooLarge { cap: 65536, .. }), "{error}");
    }
}

#[tokio::test]
async fn no_redirect_of_a_token_is_followed() {
    let server =
        TestServer::start(|seen| registry(seen, || Reply::new(307).header("Location", "/elsewhere"))).await;
    assert_eq!(head(&server, basic()).await.unwrap_err().status(), Some(307));
    assert!(!server.lines().iter().any(|line| line.ends_with("elsewhere")));
}

#[tokio::test]
async fn a_realm_at_an_address_that_is_not_public_is_refused() {
    for realm in ["http://169.254.169.254/token", "http://[fd00:ec2::254]/token", "http://localhost:1/token"]
    {
        let server = TestServer::start(move |seen| challenge(seen, realm)).await;
        let error = head(&server, basic()).await.unwrap_err();
        assert!(matches!(error, RegistryError::AddressRefused { .. }), "{realm}: {error}");
        assert!(error.hint().unwrap().contains("--allow-network"), "{realm}");
    }
}

#[tokio::test]
async fn a_realm_in_an_allowed_network_is_used() {
    let tokens = TestServer::start(|_| good()).await;
    let realm = tokens.foreign_url("/token");
    let server = TestServer::start(move |seen| match seen.header("authorization") {
        Some("Bearer good") => Reply::new(200).body("x"),
        _ => challenge(seen, &realm),
    })
    .await;
    for allowed in ["127.0.0.0/8", "localhost"] {
        let allow_networks = vec![allowed.parse().unwrap(), "::1".parse().unwrap()];
        let options = Options { allow_networks, ..options() };
        assert_eq!(head(&server, options).await.unwrap(), Some(1), "{allowed}");
    }
}

#[tokio::test]
async fn a_registry_that_nobody_here_named_must_be_public_or_allowed() {
    let server = TestServer::start(|_| Reply::new(200).body("x")).await;
    let strict = || Options { trust_registry_host: false, ..options() };
    let error = head(&server, strict()).await.unwrap_err();
    assert!(matches!(error, RegistryError::AddressRefused { .. }), "{error}");
    assert_eq!(server.seen().len(), 0);
    let allowed = Options { allow_networks: vec!["127.0.0.1".parse().unwrap()], ..strict() };
    assert_eq!(head(&server, allowed).await.unwrap(), Some(1));
}

#[tokio::test]
async fn credentials_do_not_leave_the_machine_without_tls() {
    let server = TestServer::start(|seen| challenge(seen, "http://auth.example.com/token")).await;
    let error = head(&server, basic()).await.unwrap_err();
    assert!(matches!(&error, RegistryError::PlainHttp { peer, .. } if peer == "auth.example.com"), "{error}");
    assert!(error.hint().unwrap().contains("--insecure auth.example.com"));
}

#[tokio::test]
async fn realms_that_are_not_of_http_are_refused() {
    for realm in ["file:///etc/passwd", "token", "ftp://x/y"] {
        let server = TestServer::start(move |seen| challenge(seen, realm)).await;
        let error = head(&server, options()).await.unwrap_err();
        assert!(matches!(error, RegistryError::Protocol { .. }), "{realm}: {error}");
    }
}

#[tokio::test]
async fn basic_is_sent_where_it_is_asked_for() {
    let server = TestServer::start(|seen| match seen.header("authorization") {
        Some("Basic dXNlcjpodW50ZXIy") => Reply::new(200).body("x"),
        _ => Reply::new(401)
            .header("WWW-Authenticate", "Negotiate")
            .header("WWW-Authenticate", r#"basic realm="a, b""#),
    })
    .await;
    let repository = server.repository(basic());
    for _ in 0..2 {
        assert_eq!(repository.blob_head(&Digest::sha256("x")).await.unwrap(), Some(1));
    }
    assert_eq!(server.seen().len(), 3);
    assert_eq!(head(&server, options()).await.unwrap_err().status(), Some(401));
}

#[tokio::test]
async fn a_wrong_password_is_sent_once() {
    let server =
        TestServer::start(|_| Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#)).await;
    assert_eq!(head(&server, basic()).await.unwrap_err().status(), Some(401));
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn bearer_is_chosen_over_basic() {
    let server = TestServer::start(|seen| {
        let reply = registry(seen, good);
        if seen.path() == "/token" { reply } else { reply.header("WWW-Authenticate", r#"Basic realm="x""#) }
    })
    .await;
    assert_eq!(head(&server, basic()).await.unwrap(), Some(1));
    assert_eq!(tokens(&server).len(), 1);
}

#[tokio::test]
async fn a_credential_helper_that_fails_is_named_when_the_registry_refuses() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), r#"{"credsStore":"occy-absent"}"#).unwrap();
    let docker_config = crate::registry::ConfigFile::Path(directory.path().to_owned());
    let server =
        TestServer::start(|_| Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#)).await;
    let error = head(&server, Options { docker_config, ..options() }).await.unwrap_err();
    assert!(error.hint().unwrap().contains("docker-credential-occy-absent"), "{:?}", error.hint());
}

#[tokio::test]
async fn secrets_are_not_in_what_can_be_printed() {
    let server = TestServer::start(|seen| registry(seen, good)).await;
    let repository = server.repository(basic());
    repository.blob_head(&Digest::sha256("x")).await.unwrap();
    let text = format!("{repository:?}");
    for secret in ["hunter2", "dXNlcjpodW50ZXIy", "good"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}
