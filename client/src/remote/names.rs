//! `ls`, `tags`, `digest` and `delete` of what only the coordinator reaches.

use occy_pipeline::catalog::{Deleted, Resolved};
use occy_pipeline::open;
use occy_pipeline::platform::Platform;
use occy_pipeline::wire::{WireError, convert};
use occy_proto::v1::{self, ListNamesResponse};
use tonic::Streaming;

use super::connect::Coordinator;
use super::logins::{Which, logins, logins_of_place};
use super::spec;
use crate::options::Global;

/// A list of names that comes page by page.
pub(crate) struct Names {
    coordinator: Coordinator,
    answers: Streaming<ListNamesResponse>,
}

impl Names {
    /// The names that a place has.
    pub(crate) async fn of(place: &str, command: &str, global: &Global) -> anyhow::Result<Self> {
        let place = open::in_full(place);
        spec::refuse_registry_options(global, &[&place])?;
        let coordinator = Coordinator::needed(global, command).await?;
        let credentials = logins_of_place(global, &coordinator, &place).await?;
        let request = v1::ListNamesRequest { place, credentials };
        let answered = coordinator.client.clone().list_names(request).await;
        let answers = answered.map_err(|status| coordinator.error(status))?.into_inner();
        Ok(Self { coordinator, answers })
    }

    /// The next ones. None behind the last.
    pub(crate) async fn page(&mut self) -> anyhow::Result<Option<Vec<String>>> {
        let page = self.answers.message().await.map_err(|status| self.coordinator.error(status))?;
        Ok(page.map(|page| page.names))
    }
}

/// Which manifest a name means.
pub(crate) async fn resolve(
    image: &str,
    platform: Option<&Platform>,
    global: &Global,
) -> anyhow::Result<Resolved> {
    spec::refuse_registry_options(global, &[image])?;
    let coordinator = Coordinator::needed(global, "digest").await?;
    let credentials = logins(global, &coordinator, image, None, Which::All).await?;
    let platform = platform.cloned().map(convert::platform);
    let request = v1::ResolveImageRequest { image: image.to_owned(), platform, credentials };
    let answered = coordinator.client.clone().resolve_image(request).await;
    let answer = answered.map_err(|status| coordinator.error(status))?.into_inner();
    let v1::ResolveImageResponse { digest, media_type, size } = answer;
    Ok(Resolved { digest: parsed(&digest)?, media_type, size })
}

/// Deletes an image.
pub(crate) async fn delete(image: &str, all_tags: bool, global: &Global) -> anyhow::Result<Deleted> {
    spec::refuse_registry_options(global, &[image])?;
    let coordinator = Coordinator::needed(global, "delete").await?;
    let credentials = logins(global, &coordinator, "", Some(image), Which::All).await?;
    let request = v1::DeleteImageRequest { image: image.to_owned(), all_tags, credentials };
    let answered = coordinator.client.clone().delete_image(request).await;
    let answer = answered.map_err(|status| coordinator.error(status))?.into_inner();
    let v1::DeleteImageResponse { digest, tag_only, tags } = answer;
    Ok(Deleted { digest: parsed(&digest)?, tag_only, tags })
}

fn parsed(digest: &str) -> Result<occy_pipeline::digest::Digest, WireError> {
    digest.parse().map_err(|error| WireError::elements(format!("the manifest's digest: {error}")))
}
