//! Manifests: get, check, put, delete.

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap};
use reqwest::{Method, StatusCode};

use super::chunks::Chunks;
use super::error::{Operation, RegistryError, Request};
use super::retry::Backoff;
use super::{Repository, http};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::reference::ManifestRef;

/// The largest manifest that is read, in bytes. Distribution accepts no larger one either.
pub(crate) const MANIFEST_CAP: usize = 4 * 1024 * 1024;

/// A manifest as a registry delivered it.
#[derive(Clone, Debug)]
pub struct FetchedManifest {
    /// Exactly as they came.
    pub bytes: Bytes,
    /// The `Content-Type`, without parameters; empty where there was none.
    pub media_type: String,
    /// Computed here, with the algorithm that was asked by, else SHA-256.
    pub digest: Digest,
}

/// What a registry says about a manifest without delivering it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestHead {
    /// Where the registry says it.
    pub digest: Option<Digest>,
    /// The `Content-Type`, without parameters; empty where there was none.
    pub media_type: String,
    /// In bytes, where the registry says it.
    pub size: Option<u64>,
}

/// What a registry says of a manifest that it took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutManifest {
    /// Of the manifest, with the algorithm that it was put by, else SHA-256.
    pub digest: Digest,
    /// `OCI-Subject`: the registry lists the manifest among the referrers of this one. Where the manifest has a subject and the
    /// registry does not say so, whoever put it has to (distribution-spec, "Pushing Manifests with Subject").
    pub subject: Option<Digest>,
}

impl Repository {
    /// The manifest of a tag or digest, at most 4 MiB, in one of the accepted media types. Its digest is that which was asked for,
    /// and that which the registry announced.
    pub async fn manifest(
        &self,
        reference: &ManifestRef,
        accept: &[&str],
    ) -> Result<FetchedManifest, RegistryError> {
        let operation = Operation::GetManifest(reference.to_string());
        let call = self.call(Method::GET, &format!("manifests/{reference}"), operation).await?;
        let call = call.header(ACCEPT, accept.join(", "));
        let response = self.host.send(&call).await?;
        if response.status() != StatusCode::OK {
            return Err(self.host.failure(response, &call.request).await);
        }
        let media_type = media_type(response.headers());
        let announced = announced_digest(response.headers());
        let patience = self.host.options.read_timeout;
        let bytes = http::read_capped(response, MANIFEST_CAP, patience, &call.request).await?;
        let expected = match reference {
            ManifestRef::Digest(digest) => Some(digest.clone()),
            ManifestRef::Tag(_) => None,
        };
        // The digest of a signed schema 1 manifest is that of its payload.
        let digested = crate::schema1::digested(&bytes);
        for expected in expected.iter().chain(&announced) {
            check(expected, &digested, &call.request)?;
        }
        let algorithm = expected.map_or(Algorithm::Sha256, |digest| digest.algorithm());
        Ok(FetchedManifest { digest: hash(algorithm, &digested), bytes, media_type })
    }

    /// The manifest, if there is one.
    pub async fn find_manifest(
        &self,
        reference: &ManifestRef,
        accept: &[&str],
    ) -> Result<Option<FetchedManifest>, RegistryError> {
        match self.manifest(reference, accept).await {
            Ok(manifest) => Ok(Some(manifest)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the repository has a manifest, and what the registry says about it.
    pub async fn manifest_head(
        &self,
        reference: &ManifestRef,
        accept: &[&str],
    ) -> Result<Option<ManifestHead>, RegistryError> {
        let operation = Operation::HeadManifest(reference.to_string());
        let call = self.call(Method::HEAD, &format!("manifests/{reference}"), operation).await?;
        let call = call.header(ACCEPT, accept.join(", "));
        let response = self.host.send(&call).await?;
        match response.status() {
            StatusCode::OK => Ok(Some(ManifestHead {
                digest: announced_digest(response.headers()),
                media_type: media_type(response.headers()),
                size: content_length(response.headers()),
            })),
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(self.host.failure(response, &call.request).await),
        }
    }

    /// Stores a manifest under a tag or its digest. Sent again after a failure that may pass: the same bytes change nothing.
    pub async fn put_manifest(
        &self,
        reference: &ManifestRef,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<PutManifest, RegistryError> {
        let operation = Operation::PutManifest(reference.to_string());
        let call = self.call(Method::PUT, &format!("manifests/{reference}"), operation).await?;
        if let ManifestRef::Digest(expected) = reference {
            check(expected, &bytes, &call.request)?;
        }
        let call = call.header(CONTENT_TYPE, media_type).body(Chunks::from(bytes.clone()));
        let algorithm = match reference {
            ManifestRef::Digest(digest) => digest.algorithm(),
            ManifestRef::Tag(_) => Algorithm::Sha256,
        };
        let mut backoff = Backoff::new(&self.host.options);
        let response = loop {
            let response = self.host.send(&call).await?;
            if matches!(response.status(), StatusCode::CREATED | StatusCode::OK | StatusCode::NO_CONTENT) {
                break response;
            }
            let failure = self.host.failure(response, &call.request).await;
            // Of another algorithm's digest the same answer says that the registry does not know it.
            if algorithm != Algorithm::Sha256
                || !is_torn_read(&failure)
                || !backoff.wait(&failure, None).await
            {
                return Err(failure);
            }
        };
        if let Some(stored) = announced_digest(response.headers()) {
            check(&stored, &bytes, &call.request)?;
        }
        let subject = header_digest(response.headers(), "oci-subject");
        Ok(PutManifest { digest: hash(algorithm, &bytes), subject })
    }

    /// Deletes the manifest that a digest names, and with it every tag that names it; or a tag alone, of a registry that can. False
    /// where there is none.
    pub async fn delete_manifest(&self, reference: &ManifestRef) -> Result<bool, RegistryError> {
        let operation = Operation::DeleteManifest(reference.to_string());
        let call = self.call(Method::DELETE, &format!("manifests/{reference}"), operation).await?;
        let response = self.host.send(&call).await?;
        match response.status() {
            StatusCode::ACCEPTED | StatusCode::OK | StatusCode::NO_CONTENT => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.host.failure(response, &call.request).await),
        }
    }
}

/// Whether a registry read a link to one of the manifest's blobs while it wrote it.
///
/// docker-registry writes such a link anew when another client brings the same blob to the same repository; who puts a manifest in
/// that moment reads an empty one, and hears that the digest were wrong of bytes whose digest is right. It passes.
fn is_torn_read(failure: &RegistryError) -> bool {
    matches!(failure, RegistryError::Status { status: 400, code: Some(code), .. } if code == "DIGEST_INVALID")
}

fn hash(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new(algorithm);
    hasher.update(bytes);
    hasher.finish()
}

fn check(expected: &Digest, bytes: &[u8], request: &Request) -> Result<(), RegistryError> {
    let computed = hash(expected.algorithm(), bytes);
    if computed == *expected {
        return Ok(());
    }
    Err(RegistryError::Digest { request: Box::new(request.clone()), expected: expected.clone(), computed })
}

/// `Docker-Content-Digest`. One with an algorithm that we do not know says nothing to us.
pub(super) fn announced_digest(headers: &HeaderMap) -> Option<Digest> {
    header_digest(headers, "docker-content-digest")
}

fn header_digest(headers: &HeaderMap, name: &str) -> Option<Digest> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

pub(super) fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    value.split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}
