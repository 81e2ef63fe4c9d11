//! Rights at registries where the client of a task has credentials of its own: the coordinator, which alone has these, is asked for
//! what the registry has to be shown, over the worker's stream.
//!
//! Nothing of it outlives the task. Which rights a task has is not decided here.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use occy_pipeline::registry::{self, Denied, Grant, Grantor, Right, Secret};
use occy_proto::v1::access_answer::Access;
use occy_proto::v1::connect_request::Message;
use occy_proto::v1::{
    AccessAnswer, AccessDenied, AccessRequest, ConnectRequest, PasswordLogin, RepositoryAccess,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// How long the coordinator, which may have to ask a token server more than once, may take.
const PATIENCE: Duration = Duration::from_secs(150);

/// The requests that have no answer yet, on one connection after the other. Clones are handles on the same ones.
#[derive(Clone, Default)]
pub struct Desk(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    /// Where the worker speaks. None while there is no connection.
    said: Option<mpsc::Sender<ConnectRequest>>,
    last: u64,
    requests: HashMap<u64, Pending>,
}

/// A request, and where its answer goes.
struct Pending {
    request: AccessRequest,
    answer: oneshot::Sender<AccessAnswer>,
}

/// Asks for one attempt.
struct Applicant {
    desk: Desk,
    attempt: Secret,
}

/// A request that waits. Dropped, it does not wait any more.
struct Place<'a> {
    desk: &'a Desk,
    id: u64,
}

impl Desk {
    /// The worker speaks through `said` from now on. What has no answer yet is asked again.
    ///
    /// # Cancel safety
    /// Cancelled, some of that may not have been asked again until the next connection.
    pub async fn connect(&self, said: &mpsc::Sender<ConnectRequest>) {
        let unanswered: Vec<_> = {
            let mut waiting = self.lock();
            waiting.said = Some(said.clone());
            waiting.requests.values().map(|pending| pending.request.clone()).collect()
        };
        for request in unanswered {
            // A connection that is lost already is followed by another one.
            let _ = said.send(ConnectRequest { message: Some(Message::Access(request)) }).await;
        }
    }

    /// The connection is lost: requests wait for the next one.
    pub fn disconnect(&self) {
        self.lock().said = None;
    }

    /// Gets rights for an attempt.
    pub fn grantor(&self, attempt: &str) -> Arc<dyn Grantor> {
        Arc::new(Applicant { desk: self.clone(), attempt: attempt.to_owned().into() })
    }

    /// Takes an answer. One that nobody waits for any more changes nothing.
    pub fn answer(&self, answer: AccessAnswer) {
        if let Some(pending) = self.lock().requests.remove(&answer.request_id) {
            // Who has stopped waiting in this moment does not need it.
            let _ = pending.answer.send(answer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Applicant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Applicant")
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.desk.lock().requests.remove(&self.id);
    }
}

#[async_trait::async_trait]
impl Grantor for Applicant {
    async fn grant(&self, host: &str, rights: Vec<Right>, refused: bool) -> Result<Grant, Denied> {
        let (answer, answered) = oneshot::channel();
        let repositories = rights.into_iter().map(|right| RepositoryAccess {
            repository: right.repository,
            push: right.access == registry::Access::Push,
        });
        let mut request = AccessRequest {
            attempt: self.attempt.expose().to_owned(),
            request_id: 0,
            host: host.to_owned(),
            repositories: repositories.collect(),
            refused,
        };
        let (id, said) = {
            let mut waiting = self.desk.lock();
            waiting.last += 1;
            request.request_id = waiting.last;
            waiting.requests.insert(request.request_id, Pending { request: request.clone(), answer });
            (request.request_id, waiting.said.clone())
        };
        let _place = Place { desk: &self.desk, id };
        if let Some(said) = said {
            // What a connection that is lost does not carry is asked again on the next one.
            let _ = said.send(ConnectRequest { message: Some(Message::Access(request)) }).await;
        }
        let answer =
            timeout(PATIENCE, answered).await.map_err(|_| denied("the coordinator did not answer"))?;
        let AccessAnswer { access, valid_for, .. } = answer.map_err(|_| denied("the coordinator is gone"))?;
        match access {
            None => Ok(Grant::Nothing),
            Some(Access::Token(token)) => {
                let valid_for = valid_for.and_then(|time| Duration::try_from(time).ok()).unwrap_or_default();
                Ok(Grant::Token(token.into(), valid_for))
            }
            Some(Access::Password(PasswordLogin { username, password })) => {
                Ok(Grant::Password { username, password: password.into() })
            }
            Some(Access::Denied(AccessDenied { message, http_status })) => {
                Err(Denied { status: u16::try_from(http_status).ok().filter(|&status| status != 0), message })
            }
        }
    }
}

fn denied(message: &str) -> Denied {
    Denied { status: None, message: message.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn connect(desk: &Desk) -> mpsc::Receiver<ConnectRequest> {
        let (said, heard) = mpsc::channel(4);
        desk.connect(&said).await;
        heard
    }

    async fn next(heard: &mut mpsc::Receiver<ConnectRequest>) -> AccessRequest {
        match heard.recv().await.and_then(|request| request.message) {
            Some(Message::Access(request)) => request,
            other => panic!("expected a request for access: {other:?}"),
        }
    }

    #[tokio::test]
    async fn answers_find_their_requests_in_any_order() {
        let desk = Desk::default();
        let mut heard = connect(&desk).await;
        let rights = |name: &str| vec![Right { repository: name.to_owned(), access: registry::Access::Push }];
        let ask = |name: &'static str| {
            let grantor = desk.grantor("attempt");
            let rights = rights(name);
            tokio::spawn(async move { grantor.grant("host", rights, name == "b").await })
        };
        let first = ask("a");
        let one = next(&mut heard).await;
        let second = ask("b");
        let two = next(&mut heard).await;
        assert_eq!((one.refused, two.refused), (false, true));
        assert_eq!(one.repositories, [RepositoryAccess { repository: "a".to_owned(), push: true }]);
        for (request, token) in [(&two, "for b"), (&one, "for a"), (&one, "again")] {
            desk.answer(AccessAnswer {
                request_id: request.request_id,
                access: Some(Access::Token(token.to_owned())),
                valid_for: Duration::from_secs(5).try_into().ok(),
                ..AccessAnswer::default()
            });
        }
        let granted = |token: &str| Ok(Grant::Token(token.to_owned().into(), Duration::from_secs(5)));
        assert_eq!(first.await.expect("it ran"), granted("for a"));
        assert_eq!(second.await.expect("it ran"), granted("for b"));
        assert!(desk.lock().requests.is_empty());
    }

    #[tokio::test]
    async fn who_does_not_wait_any_more_is_forgotten_and_who_does_asks_again_on_the_next_connection() {
        let desk = Desk::default();
        let mut heard = connect(&desk).await;
        let grantor = desk.grantor("attempt");
        let asking = tokio::spawn(async move { grantor.grant("host", Vec::new(), false).await });
        let request = next(&mut heard).await;
        asking.abort();
        assert!(asking.await.is_err());
        assert!(desk.lock().requests.is_empty());
        desk.answer(AccessAnswer { request_id: request.request_id, ..AccessAnswer::default() });
        drop(heard);
        let grantor = desk.grantor("attempt");
        let asking = tokio::spawn(async move { grantor.grant("host", Vec::new(), false).await });
        // It waits, whether it found out that the connection is lost or not.
        while desk.lock().requests.is_empty() {
            tokio::task::yield_now().await;
        }
        desk.disconnect();
        let mut heard = connect(&desk).await;
        let request = next(&mut heard).await;
        desk.answer(AccessAnswer { request_id: request.request_id, ..AccessAnswer::default() });
        assert_eq!(asking.await.expect("it ran"), Ok(Grant::Nothing));
    }
}
