//! What names a manifest as its `subject`: signatures, SBOMs, attestations (distribution-spec, "Listing Referrers").
//!
//! A registry that lists them itself is asked. One that does not has, by the specification's "Referrers Tag Schema", an index of
//! them under a tag that is called like the subject's digest, which clients keep: [`crate::copy`] does.

use std::collections::HashSet;

use reqwest::header::ACCEPT;
use reqwest::{Method, StatusCode};

use super::error::{Operation, RegistryError, Request};
use super::list::next_page;
use super::manifest::{MANIFEST_CAP, media_type};
use super::transport::{Call, protocol};
use super::{Repository, http};
use crate::digest::Digest;
use crate::error::MAX_MANIFESTS;
use crate::manifest::media_type::OCI_INDEX;
use crate::manifest::{self, Descriptor, ParsedManifest};
use crate::reference::{ManifestRef, Tag};

/// What names a manifest as its subject.
#[derive(Clone, Debug, PartialEq)]
pub struct Referrers {
    /// In the registry's order.
    pub manifests: Vec<Descriptor>,
    /// Whether the registry lists them itself. Otherwise they are those of the index under [`fallback_tag`].
    pub is_listed: bool,
}

/// The tag under which clients keep a subject's referrers where the registry lists none: `sha256-HEX`, cut to the length of a tag.
pub fn fallback_tag(subject: &Digest) -> Tag {
    let (algorithm, hex) = (subject.algorithm().name(), subject.hex());
    let tag: String = format!("{algorithm:.32}-{hex:.64}");
    tag.parse().expect("a digest's parts are made of a tag's characters")
}

impl Repository {
    /// What names this manifest as its subject.
    pub async fn referrers(&self, subject: &Digest) -> Result<Referrers, RegistryError> {
        if let Some(manifests) = self.listed_referrers(subject).await? {
            return Ok(Referrers { manifests, is_listed: true });
        }
        let tag = ManifestRef::Tag(fallback_tag(subject));
        let manifests = match self.find_manifest(&tag, &[OCI_INDEX]).await? {
            Some(index) => entries(&index.bytes, &self.request(Operation::GetManifest(tag.to_string())))?,
            None => Vec::new(),
        };
        Ok(Referrers { manifests, is_listed: false })
    }

    /// Those that the registry lists; None where it has no such list.
    async fn listed_referrers(&self, subject: &Digest) -> Result<Option<Vec<Descriptor>>, RegistryError> {
        let request = self.request(Operation::ListReferrers(subject.clone()));
        let mut next = Some(self.url(&format!("referrers/{subject}")).await?);
        let (mut found, mut asked) = (Vec::new(), HashSet::new());
        while let Some(url) = next {
            if !asked.insert(url.to_string()) || found.len() > MAX_MANIFESTS {
                return Err(protocol(&request, "a list of referrers that does not end".to_owned()));
            }
            let call =
                Call::new(Method::GET, url, &[self.scope()], request.clone()).header(ACCEPT, OCI_INDEX);
            let response = self.host.send(&call).await?;
            // Registries that know nothing of it answer so, and some with a page for people.
            let is_unknown = match response.status() {
                StatusCode::OK => media_type(response.headers()) != OCI_INDEX,
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST => true,
                _ => return Err(self.host.failure(response, &request).await),
            };
            if is_unknown {
                return if asked.len() == 1 {
                    Ok(None)
                } else {
                    Err(protocol(&request, "a next page of referrers that is none".to_owned()))
                };
            }
            next = next_page(response.headers(), &call.url);
            let patience = self.host.options.read_timeout;
            let body = http::read_capped(response, MANIFEST_CAP, patience, &request).await?;
            found.extend(entries(&body, &request)?);
        }
        Ok(Some(found))
    }
}

fn entries(bytes: &[u8], request: &Request) -> Result<Vec<Descriptor>, RegistryError> {
    match manifest::parse(bytes, Some(OCI_INDEX)) {
        Ok(ParsedManifest::Index(index)) => Ok(index.manifests),
        Ok(_) => Err(protocol(request, "no index".to_owned())),
        Err(error) => Err(protocol(request, error.to_string())),
    }
}
