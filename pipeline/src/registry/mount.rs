//! Whether a repository has a blob already, or can have it from another one of the same registry.

use reqwest::{Method, StatusCode};

use super::Repository;
use super::auth::{Access, Scope};
use super::error::{Operation, RegistryError};
use super::manifest::content_length;
use super::session::UploadSession;
use crate::digest::Digest;

/// What came of asking a registry to share a blob.
#[derive(Debug)]
pub enum Mount {
    /// The repository has the blob now.
    Mounted,
    /// It does not, but an upload may begin.
    Session(UploadSession),
    /// It does not.
    Unsupported,
}

impl Repository {
    /// The size of a blob, if the repository has it. A registry that does not say the size is taken not to have it: what follows
    /// is an upload that was not needed, and not a blob of unknown size.
    pub async fn blob_head(&self, digest: &Digest) -> Result<Option<u64>, RegistryError> {
        Ok(self.find_blob(digest).await?.flatten())
    }

    /// Whether the repository has a blob, and its size, if the registry says that too.
    pub async fn find_blob(&self, digest: &Digest) -> Result<Option<Option<u64>>, RegistryError> {
        let operation = Operation::HeadBlob(digest.clone());
        let call = self.call(Method::HEAD, &format!("blobs/{digest}"), operation).await?;
        let response = self.host.send(&call).await?;
        match response.status() {
            StatusCode::OK => Ok(Some(content_length(response.headers()))),
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(self.host.failure(response, &call.request).await),
        }
    }

    /// Asks the registry to take a blob from another of its repositories (distribution-spec, "Mounting a blob"). From this one, that
    /// asks whether it is there, and begins an upload where it is not: both with one request.
    ///
    /// It never fails: whatever is wrong, an upload will tell, or do without.
    pub async fn mount(&self, digest: &Digest, from: &str) -> Mount {
        match self.try_mount(digest, from).await {
            Ok(mount) => mount,
            Err(error) => {
                tracing::debug!(%error, "mount failed");
                Mount::Unsupported
            }
        }
    }

    async fn try_mount(&self, digest: &Digest, from: &str) -> Result<Mount, RegistryError> {
        let operation = Operation::MountBlob(digest.clone());
        let mut call = self.call(Method::POST, "blobs/uploads/", operation).await?;
        call.url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        if from != self.name() {
            // The token must allow to read there.
            call.scopes.push(Scope::Repository(from.to_owned(), Access::Pull));
        }
        let response = self.host.send(&call).await?;
        match response.status() {
            StatusCode::CREATED => Ok(Mount::Mounted),
            StatusCode::ACCEPTED => {
                UploadSession::from_response(self, &response, call.request).map(Mount::Session)
            }
            status => {
                tracing::debug!(status = status.as_u16(), "mount refused");
                Ok(Mount::Unsupported)
            }
        }
    }
}
