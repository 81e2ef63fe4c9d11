//! Mounts.

use super::server::{Reply, TestServer, options};
use crate::digest::Digest;
use crate::registry::Mount;

#[tokio::test]
async fn a_mounted_blob_is_there() {
    let server = TestServer::start(|_| Reply::new(201)).await;
    let digest = Digest::sha256("x");
    let mount = server.repository(options()).mount(&digest, "other/app").await;
    assert!(matches!(mount, Mount::Mounted), "{mount:?}");
    let seen = &server.seen()[0];
    assert_eq!(seen.line(), "POST /v2/app/blobs/uploads/");
    assert_eq!(
        (seen.query("mount"), seen.query("from")),
        (vec![digest.to_string()], vec!["other/app".to_owned()])
    );
}

#[tokio::test]
async fn a_mount_asks_for_the_right_to_read_its_source() {
    let server = TestServer::start(|seen| match (seen.path(), seen.header("authorization")) {
        ("/token", _) => Reply::new(200).body(r#"{"token":"good"}"#),
        (_, Some(_)) => Reply::new(201),
        _ => {
            let realm = format!("http://{}/token", seen.header("host").unwrap());
            Reply::new(401).header("WWW-Authenticate", format!(r#"Bearer realm="{realm}",service="s""#))
        }
    })
    .await;
    server.repository(options()).mount(&Digest::sha256("x"), "other/app").await;
    let token = server.seen().into_iter().find(|seen| seen.path() == "/token").unwrap();
    assert_eq!(token.query("scope"), ["repository:app:pull,push", "repository:other/app:pull"]);
}

#[tokio::test]
async fn a_session_instead_of_a_mount_is_used_or_deleted() {
    let server = TestServer::start(|seen| match seen.method.as_str() {
        "POST" => Reply::new(202).header("Location", "/session/1"),
        _ => Reply::new(204),
    })
    .await;
    let mount = server.repository(options()).mount(&Digest::sha256("x"), "other/app").await;
    assert!(matches!(mount, Mount::Session(_)), "{mount:?}");
    drop(mount);
    for _ in 0..100 {
        if server.lines().last().unwrap() == "DELETE /session/1" {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("{:?}", server.lines());
}

#[tokio::test]
async fn any_other_answer_means_to_upload() {
    for reply in [
        Reply::new(401),
        Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#),
        Reply::new(403),
        Reply::new(404),
        Reply::new(405),
        Reply::new(500),
        Reply::new(200),
        Reply::new(202), // without a Location
    ] {
        let answer = reply.clone();
        let server = TestServer::start(move |_| answer.clone()).await;
        let mount = server.repository(options()).mount(&Digest::sha256("x"), "other/app").await;
        assert!(matches!(mount, Mount::Unsupported), "{reply:?}: {mount:?}");
    }
}
