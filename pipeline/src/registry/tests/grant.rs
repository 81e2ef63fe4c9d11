//! A client without credentials, which asks one that has them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::super::{
    Access, Client, Credentials, Denied, Grant, Grantor, Options, RegistryError, Repository, Right,
};
use super::server::{Reply, TestServer, content, options};

/// Passes on what a repository's client with credentials gets.
#[derive(Debug)]
struct Shared {
    repository: Repository,
    asked: Mutex<Vec<(Vec<Right>, bool)>>,
}

#[async_trait::async_trait]
impl Grantor for Shared {
    async fn grant(&self, host: &str, rights: Vec<Right>, refused: bool) -> Result<Grant, Denied> {
        assert_eq!(host, self.repository.host());
        self.asked.lock().unwrap().push((rights.clone(), refused));
        let granted = self.repository.grant(&rights, refused).await;
        granted.map_err(|error| Denied { status: error.status(), message: error.to_string() })
    }
}

fn login() -> Credentials {
    Credentials::Basic { username: "ann".to_owned(), password: "secret".to_owned().into() }
}

/// A client that has the credentials, and one that asks it.
fn both(server: &TestServer) -> (Arc<Shared>, Repository) {
    let reference = format!("{}/app", server.host()).parse().unwrap();
    let knowing = Client::new(Options { credentials: Some(login()), ..options() }).unwrap();
    let repository = knowing.repository(&reference, Access::Pull);
    let shared = Arc::new(Shared { repository, asked: Mutex::default() });
    // It would use its own where it asked nobody.
    let own = Credentials::Basic { username: "own".to_owned(), password: "other".to_owned().into() };
    let client = Client::new(Options { credentials: Some(own), ..options() }).unwrap();
    let client = client.granted_by(shared.clone());
    (shared, client.repository(&reference, Access::Pull))
}

#[tokio::test]
async fn a_token_is_granted_kept_and_granted_anew_when_it_was_refused() {
    let tokens = Arc::new(AtomicUsize::new(0));
    let minted = Arc::clone(&tokens);
    let server = TestServer::start(move |seen| {
        let good = format!("Bearer token{}", minted.load(Ordering::SeqCst).max(2));
        if seen.path() == "/token" {
            assert_eq!(seen.header("authorization"), Some("Basic YW5uOnNlY3JldA=="));
            let number = minted.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200).body(format!(r#"{{"token": "token{number}", "expires_in": 300}}"#));
        }
        match seen.header("authorization") {
            Some(header) if header == good => Reply::new(200),
            _ => {
                let realm = format!("http://{}/token", seen.header("host").unwrap());
                let challenge = format!(r#"Bearer realm="{realm}",service="s",scope="repository:app:pull""#);
                Reply::new(401).header("WWW-Authenticate", challenge)
            }
        }
    })
    .await;
    let (shared, repository) = both(&server);
    let digest = content(1).1;
    for _ in 0..3 {
        repository.find_blob(&digest).await.unwrap();
    }
    // The first token is refused, the second one is kept.
    assert_eq!(tokens.load(Ordering::SeqCst), 2);
    let right = Right { repository: "app".to_owned(), access: Access::Pull };
    assert_eq!(*shared.asked.lock().unwrap(), [(vec![right.clone()], false), (vec![right], true)]);
}

#[tokio::test]
async fn a_password_is_granted_where_there_are_no_tokens() {
    let server = TestServer::start(|seen| match seen.header("authorization") {
        Some("Basic YW5uOnNlY3JldA==") => Reply::new(200),
        Some(_) => Reply::new(403),
        None => Reply::new(401).header("WWW-Authenticate", r#"Basic realm="r""#),
    })
    .await;
    let (shared, repository) = both(&server);
    let digest = content(1).1;
    for _ in 0..2 {
        repository.find_blob(&digest).await.unwrap();
    }
    assert_eq!(shared.asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn who_is_denied_hears_why() {
    let server = TestServer::start(|seen| match seen.path() {
        "/token" => Reply::new(403).body(r#"{"errors":[{"code":"DENIED","message":"not you"}]}"#),
        _ => {
            let realm = format!("http://{}/token", seen.header("host").unwrap());
            Reply::new(401).header("WWW-Authenticate", format!(r#"Bearer realm="{realm}""#))
        }
    })
    .await;
    let (_, repository) = both(&server);
    let error = repository.find_blob(&content(1).1).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Status { status: 403, .. }), "{error:?}");
    assert!(error.to_string().contains("not you"), "{error}");
}
