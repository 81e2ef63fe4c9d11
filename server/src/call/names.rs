//! Images by name: what a place has of them, which manifest one means, and how one is deleted. No layer is looked at.

use occy_pipeline::catalog::{self, Deleted, Resolved};
use occy_pipeline::error::Error;
use occy_pipeline::open::{self, Place};
use occy_pipeline::platform::Platform;
use occy_pipeline::registry::{Access, Names};
use occy_proto::v1::{DeleteImageResponse, ListNamesResponse, ResolveImageResponse};
use tokio::sync::mpsc;

use crate::admit::Work;
use crate::error::ServiceError;

/// Bytes of names in one message.
const NAMES_AT_ONCE: usize = 512 * 1024;

/// Sends the names that the source has as a place.
pub async fn list(work: Work, answers: mpsc::Sender<ListNamesResponse>) -> Result<(), ServiceError> {
    match open::place(&work.source, &work.settings)? {
        Place::Registry(client, host) => pages(client.repositories(&host), &answers).await,
        Place::Repository(repository) => pages(repository.tags(), &answers).await,
        Place::Layout(layout) => send(layout.names().await?, &answers).await,
    }
}

async fn pages(mut names: Names, answers: &mpsc::Sender<ListNamesResponse>) -> Result<(), ServiceError> {
    while let Some(page) = names.page().await.map_err(Error::from)? {
        send(page, answers).await?;
    }
    Ok(())
}

async fn send(names: Vec<String>, answers: &mpsc::Sender<ListNamesResponse>) -> Result<(), ServiceError> {
    let mut rest = names.into_iter().peekable();
    while rest.peek().is_some() {
        let names = portion(&mut rest);
        answers.send(ListNamesResponse { names }).await.map_err(|_| ServiceError::CallerGone)?;
    }
    Ok(())
}

/// As many as fit into a message, and one at least.
fn portion(names: &mut std::iter::Peekable<impl Iterator<Item = String>>) -> Vec<String> {
    let mut bytes = 0;
    let mut taken: Vec<String> = names.next().into_iter().collect();
    while let Some(name) = names.next_if(|name| {
        // With what says how long it is.
        bytes += name.len() + 8;
        bytes <= NAMES_AT_ONCE
    }) {
        taken.push(name);
    }
    taken
}

/// Sends which manifest the source means; of an index and a platform, the one of the image for that.
pub async fn resolve(
    work: Work,
    platform: Option<Platform>,
    answers: mpsc::Sender<ResolveImageResponse>,
) -> Result<(), ServiceError> {
    let store = open::store(&work.source, &work.settings)?;
    let Resolved { digest, media_type, size } = catalog::resolve(store.as_ref(), platform.as_ref()).await?;
    let answer = ResolveImageResponse { digest: digest.to_string(), media_type, size };
    answers.send(answer).await.map_err(|_| ServiceError::CallerGone)
}

/// Deletes the destination, and sends what that was.
pub async fn delete(
    work: Work,
    all_tags: bool,
    answers: mpsc::Sender<DeleteImageResponse>,
) -> Result<(), ServiceError> {
    let (repository, reference) = open::image(&work.destination, &work.settings, Access::Delete)?;
    let Deleted { digest, tag_only, tags } = catalog::delete(&repository, &reference, all_tags).await?;
    let tags = portion(&mut tags.into_iter().peekable());
    let answer = DeleteImageResponse { digest: digest.to_string(), tag_only, tags };
    answers.send(answer).await.map_err(|_| ServiceError::CallerGone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sent_in_messages_of_a_bounded_size_and_none_is_lost() {
        let names: Vec<String> = (0..10_000).map(|number| format!("{number:0>200}")).collect();
        let mut rest = names.clone().into_iter().peekable();
        let mut all = Vec::new();
        while rest.peek().is_some() {
            let some = portion(&mut rest);
            assert!(!some.is_empty() && some.iter().map(String::len).sum::<usize>() <= NAMES_AT_ONCE + 200);
            all.extend(some);
        }
        assert_eq!(all, names);
    }
}
