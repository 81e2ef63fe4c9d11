//! Foreign layers: those that their owner wants nobody else to hand out. A registry may have no more of them than the addresses
//! where they can be had, in its manifests.
//!
//! Whoever wrote the manifest chose these addresses, so they are spoken to as any host that a registry sends us to: by TLS, and at
//! public addresses, unless the user allows more. Nothing of ours goes there, neither credentials nor a certificate, and nothing
//! comes from there but the bytes that the manifest promises.

use std::sync::Arc;

use reqwest::Method;

use super::blob_read::read;
use super::error::Operation;
use super::transport::{Call, protocol, sendable};
use super::{Repository, http};
use crate::blob::{Blob, BlobError, BlobRef, ByteStream};
use crate::digest::Hasher;
use crate::manifest::Descriptor;

/// So many of a layer's addresses are tried.
const ADDRESSES_MAX: usize = 4;

impl Repository {
    /// The bytes of a layer: the repository's blob, or, if it has no such blob and the layer is foreign, what its addresses yield.
    pub fn layer(&self, descriptor: &Descriptor) -> BlobRef {
        let stored = self.blob(&descriptor.digest, Some(descriptor.size));
        if !descriptor.is_foreign() {
            return stored;
        }
        Arc::new(ForeignLayer { stored, repository: self.clone(), descriptor: descriptor.clone() })
    }
}

#[derive(Debug)]
struct ForeignLayer {
    /// The registry's own copy, if it has one.
    stored: BlobRef,
    repository: Repository,
    descriptor: Descriptor,
}

impl ForeignLayer {
    async fn fetch(&self, address: &str) -> Result<ByteStream, BlobError> {
        let digest = self.descriptor.digest.clone();
        let url = address.parse().ok().and_then(sendable);
        let peer = url.as_ref().map(http::peer).unwrap_or_default();
        let request = self.repository.request(Operation::GetForeign(digest, peer));
        let Some(url) = url else {
            let problem = format!("the manifest says it is at {address:.300}, which is no URL of HTTP");
            return Err(protocol(&request, problem).into());
        };
        let host = Arc::new(self.repository.host.to_strangers());
        let call = Call::new(Method::GET, url, &[], request);
        read(host, call, &self.descriptor.digest, Some(self.descriptor.size)).await
    }
}

#[async_trait::async_trait]
impl Blob for ForeignLayer {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let mut failure = match self.stored.open().await {
            Err(BlobError::Registry(error)) if error.is_not_found() => BlobError::from(error),
            opened => return opened,
        };
        for address in self.descriptor.urls.iter().take(ADDRESSES_MAX) {
            tracing::info!("{failure}; trying another address of the layer");
            match self.fetch(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn open_behind(&self, read: &Hasher) -> Result<Option<ByteStream>, BlobError> {
        match self.stored.open_behind(read).await {
            Err(BlobError::Registry(error)) if error.is_not_found() => Ok(None),
            opened => opened,
        }
    }

    fn size(&self) -> Option<u64> {
        self.stored.size()
    }

    fn identity(&self) -> String {
        self.stored.identity()
    }
}
