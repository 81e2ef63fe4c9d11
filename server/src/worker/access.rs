//! Rights at registries for workers: a task's client may have brought credentials, which stay here; its worker gets what the
//! registry has to be shown for what the task needs, for as long as the attempt goes on.

use occy_pipeline::registry::{Access, Grant, RegistryError, Repository, Right};
use occy_proto::v1::access_answer::Access as Answer;
use occy_proto::v1::{AccessAnswer, AccessDenied, AccessRequest, PasswordLogin};

use super::attempt::{Attempt, Attempts};

/// Repositories that one request may name.
const REPOSITORIES_MAX: usize = 4;

/// What a worker hears that asks for a right.
///
/// # Cancel safety
/// Dropped, it has told the worker nothing.
pub(super) async fn answer(attempts: &Attempts, worker: u64, request: AccessRequest) -> AccessAnswer {
    let told = AccessAnswer {
        attempt: request.attempt.clone(),
        request_id: request.request_id,
        ..AccessAnswer::default()
    };
    let Some(attempt) = attempts.find(&request.attempt).filter(|attempt| attempt.is_of(worker)) else {
        return AccessAnswer { access: Some(denied("the attempt has ended", 0)), ..told };
    };
    tokio::select! {
        granted = granted(&attempt, request) => match granted {
            Ok(Grant::Nothing) => told,
            Ok(Grant::Token(token, valid_for)) => AccessAnswer {
                access: Some(Answer::Token(token.expose().to_owned())),
                valid_for: prost_types::Duration::try_from(valid_for).ok(),
                ..told
            },
            Ok(Grant::Password { username, password }) => AccessAnswer {
                access: Some(Answer::Password(PasswordLogin { username, password: password.expose().to_owned() })),
                ..told
            },
            Err(denied) => AccessAnswer { access: Some(denied), ..told },
        },
        () = attempt.closed() => AccessAnswer { access: Some(denied("the attempt has ended", 0)), ..told },
    }
}

async fn granted(attempt: &Attempt, request: AccessRequest) -> Result<Grant, Answer> {
    let rights: Vec<_> = request.repositories.into_iter().map(right).collect();
    let (source, destination) = (attempt.task.layer.origin.as_ref(), attempt.task.output.repository());
    let needed = needed(source, destination, &request.host, &rights);
    let Some(repository) = needed.filter(|repository| repository.has_credentials()) else {
        tracing::warn!(host = request.host, ?rights, "a worker asked for what its task does not need");
        return Err(denied("the task does not need this", 0));
    };
    repository.grant(&rights, request.refused).await.map_err(|error| refused(&error))
}

/// The repository whose credentials the rights are asked for with. None if the task needs less.
fn needed<'a>(
    source: Option<&'a Repository>,
    destination: Option<&'a Repository>,
    host: &str,
    rights: &[Right],
) -> Option<&'a Repository> {
    let at = |repository: Option<&'a Repository>| repository.filter(|repository| repository.host() == host);
    let (source, destination) = (at(source), at(destination));
    let is_of = |right: &Right, repository: Option<&Repository>| {
        repository.is_some_and(|repository| repository.name() == right.repository)
    };
    let is_needed =
        |right: &Right| is_of(right, destination) || (right.access == Access::Pull && is_of(right, source));
    if rights.is_empty() || rights.len() > REPOSITORIES_MAX || !rights.iter().all(is_needed) {
        return None;
    }
    // A mount is asked for at the destination, whose client is that of both where both are one registry's.
    destination.filter(|_| rights.iter().any(|right| is_of(right, destination))).or(source)
}

fn right(asked: occy_proto::v1::RepositoryAccess) -> Right {
    let access = if asked.push { Access::Push } else { Access::Pull };
    Right { repository: asked.repository, access }
}

fn refused(error: &RegistryError) -> Answer {
    denied(&error.to_string(), error.status().map_or(0, u32::from))
}

fn denied(message: &str, http_status: u32) -> Answer {
    Answer::Denied(AccessDenied { message: message.to_owned(), http_status })
}

#[cfg(test)]
mod tests {
    use occy_pipeline::registry::{Client, Options};

    use super::*;

    #[test]
    fn a_task_needs_its_source_for_reading_and_its_destination_for_both() {
        let client = Client::new(Options::default()).expect("a client");
        let at =
            |reference: &str, access| client.repository(&reference.parse().expect("a reference"), access);
        let source = at("one.example/from", Access::Pull);
        let (other, same) = (at("two.example/to", Access::Push), at("one.example/to", Access::Push));
        let check =
            |destination: &Repository, host: &str, rights: &[(&str, Access)], expected: Option<&str>| {
                let right = |&(name, access): &(&str, Access)| Right { repository: name.to_owned(), access };
                let rights: Vec<_> = rights.iter().map(right).collect();
                let found = needed(Some(&source), Some(destination), host, &rights);
                assert_eq!(found.map(Repository::name), expected, "{host} {rights:?}");
            };
        use Access::{Pull, Push};
        check(&other, "one.example", &[("from", Pull)], Some("from"));
        check(&other, "two.example", &[("to", Push)], Some("to"));
        check(&other, "two.example", &[("to", Pull)], Some("to"));
        check(&same, "one.example", &[("to", Push), ("from", Pull)], Some("to"));
        check(&same, "one.example", &[("from", Pull)], Some("from"));
        for (host, rights) in [
            ("one.example", &[("from", Push)] as &[_]),
            ("one.example", &[("to", Push)]),
            ("one.example", &[("from", Pull), ("elsewhere", Pull)]),
            ("two.example", &[("from", Pull)]),
            ("two.example", &[("to", Push), ("from", Pull)]),
            ("three.example", &[("to", Push)]),
            ("two.example", &[]),
        ] {
            check(&other, host, rights, None);
        }
    }
}
