//! Foreign layers, which a registry does not have.

use bytes::Bytes;
use futures_util::TryStreamExt as _;

use super::server::{Reply, TestServer, content, options};
use crate::blob::BlobError;
use crate::manifest::Descriptor;
use crate::registry::{Credentials, Options, RegistryError};

const SIZE: usize = 100_000;
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

/// A registry without any blob, and which wants to know who asks.
async fn empty_registry() -> TestServer {
    TestServer::start(|seen| match seen.header("authorization") {
        None => Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#),
        Some(_) => Reply::new(404),
    })
    .await
}

/// A server of foreign layers.
async fn elsewhere(bytes: Vec<u8>) -> TestServer {
    TestServer::start(move |seen| match seen.path() {
        "/layer" => Reply::new(200).body(bytes.clone()),
        _ => Reply::new(401).header("WWW-Authenticate", r#"Basic realm="x""#),
    })
    .await
}

/// Reads a layer that is said to be at these addresses.
async fn read(registry: &TestServer, urls: &[String], allowed: &[&str]) -> Result<Vec<u8>, BlobError> {
    let (_, digest) = content(SIZE);
    let mut descriptor = Descriptor::new(FOREIGN, &digest, SIZE as u64);
    descriptor.urls = urls.to_vec();
    let credentials = Credentials::Basic { username: "u".to_owned(), password: "p".to_owned().into() };
    let allow_networks = allowed.iter().map(|network| network.parse().unwrap()).collect();
    let options = Options { credentials: Some(credentials), allow_networks, ..options() };
    let layer = registry.repository(options).layer(&descriptor);
    assert_eq!((layer.size(), layer.identity()), (Some(SIZE as u64), digest.to_string()));
    let pieces: Vec<Bytes> = layer.open().await?.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test]
async fn a_layer_that_the_registry_lacks_comes_from_the_first_address_that_has_it_and_gets_no_credentials() {
    let (bytes, _) = content(SIZE);
    let (registry, other) = (empty_registry().await, elsewhere(bytes.clone()).await);
    let urls = ["/no", "/layer", "/never"].map(|path| other.foreign_url(path));
    assert_eq!(read(&registry, &urls, &["localhost"]).await.unwrap(), bytes);
    assert_eq!(other.lines(), ["GET /no", "GET /layer"]);
    assert!(other.seen().iter().all(|seen| seen.header("authorization").is_none()));
    assert!(registry.seen().iter().any(|seen| seen.header("authorization").is_some()));
}

#[tokio::test]
async fn the_registrys_own_copy_comes_first() {
    let (bytes, digest) = content(SIZE);
    let other = elsewhere(bytes.clone()).await;
    let registry = TestServer::start(move |_| Reply::new(200).body(bytes.clone())).await;
    read(&registry, &[other.foreign_url("/layer")], &["localhost"]).await.unwrap();
    assert_eq!(registry.lines(), [format!("GET /v2/app/blobs/{digest}")]);
    assert!(other.seen().is_empty());
}

#[tokio::test]
async fn only_the_bytes_that_the_manifest_promises_are_taken() {
    let registry = empty_registry().await;
    let (mut bytes, _) = content(SIZE);
    bytes[7] ^= 1;
    let other = elsewhere(bytes).await;
    let error = read(&registry, &[other.foreign_url("/layer")], &["localhost"]).await.unwrap_err();
    assert!(matches!(error, BlobError::Digest { .. }), "{error}");
    let other = elsewhere(content(SIZE + 1).0).await;
    let error = read(&registry, &[other.foreign_url("/layer")], &["localhost"]).await.unwrap_err();
    assert!(matches!(error, BlobError::Size { .. }), "{error}");
}

#[tokio::test]
async fn addresses_that_are_not_public_or_not_secure_are_refused() {
    let registry = empty_registry().await;
    let other = elsewhere(content(SIZE).0).await;
    for url in [other.foreign_url("/layer"), "https://10.0.0.1/layer".to_owned()] {
        let error = read(&registry, &[url], &[]).await.unwrap_err();
        assert!(matches!(error, BlobError::Registry(RegistryError::AddressRefused { .. })), "{error}");
    }
    let error = read(&registry, &["http://example.com/layer".to_owned()], &[]).await.unwrap_err();
    assert!(matches!(error, BlobError::Registry(RegistryError::PlainHttp { .. })), "{error}");
    for url in ["ftp://example.com/layer", "layer", ""] {
        let error = read(&registry, &[url.to_owned()], &[]).await.unwrap_err();
        assert!(matches!(error, BlobError::Registry(RegistryError::Protocol { .. })), "{error}");
    }
    assert!(other.seen().is_empty());
}

#[tokio::test]
async fn a_layer_that_is_nowhere_is_not_found_and_says_where_it_was_looked_for() {
    let (registry, other) = (empty_registry().await, elsewhere(Vec::new()).await);
    let error = read(&registry, &[], &[]).await.unwrap_err();
    assert!(matches!(&error, BlobError::Registry(error) if error.is_not_found()), "{error}");
    let urls = vec![other.foreign_url("/no"); 9];
    let error = read(&registry, &urls, &["localhost"]).await.unwrap_err();
    assert!(
        error.to_string().contains("get foreign layer") && error.to_string().contains("localhost:"),
        "{error}"
    );
    let BlobError::Registry(error) = error else { panic!("{error}") };
    assert_eq!(error.hint(), None, "nobody is to log in there");
    assert_eq!(other.seen().len(), 4);
}
