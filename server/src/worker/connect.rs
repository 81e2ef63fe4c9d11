//! WorkerService: a worker's stream, from its registration to its end.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use occy_pipeline::wire::convert;
use occy_proto::v1::connect_request::Message as Said;
use occy_proto::v1::connect_response::Message as Told;
use occy_proto::v1::worker_service_server::WorkerService;
use occy_proto::v1::{Compression, ConnectRequest, ConnectResponse, Register};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::access;
use super::attempt::is_handed_back;
use super::seat::{MESSAGES, Messages, RemoteSeat};
use crate::access::{Access, Scope};
use crate::admit;
use crate::error::ServiceError;
use crate::fleet::{About, Fleet, Membership};
use crate::schedule::Capabilities;

/// Bytes of a worker's name, its version, and the name of anything that it offers.
const NAME_MAX: usize = 128;
/// Filters, and other things, that a worker may offer.
const OFFERS_MAX: usize = 256;
/// Layers that a worker may have at once.
const SLOTS_MAX: u32 = 1024;

/// The service.
#[derive(Clone, Debug)]
pub struct Workers {
    /// Where they go.
    pub fleet: Fleet,
    /// Who may be one.
    pub access: Arc<Access>,
}

#[tonic::async_trait]
impl WorkerService for Workers {
    type ConnectStream = BoxStream<'static, Result<ConnectResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        self.access.authorize(&request, Scope::Worker)?;
        let fleet = &self.fleet;
        let mut requests = request.into_inner();
        let lease = fleet.patience().lease;
        let first = timeout(lease, requests.message()).await.map_err(|_| silent(lease))??;
        let Some(Said::Register(register)) = first.and_then(|request| request.message) else {
            return Err(bad("message", "the first one is the registration").into());
        };
        let (about, offers) = look_at(register)?;
        let (messages, told) = mpsc::channel(MESSAGES + 2 * about.slots);
        let heartbeat = welcome_interval(lease);
        let member = fleet.join(about, offers, |name| {
            let seat = RemoteSeat::new(messages.clone());
            seat.welcome(name, heartbeat);
            seat
        })?;
        tracing::info!(worker = member.name(), "a worker has come");
        tokio::spawn(listen(fleet.clone(), member, requests, messages));
        Ok(Response::new(ReceiverStream::new(told).boxed()))
    }
}

/// A worker may miss two heartbeats.
fn welcome_interval(lease: Duration) -> Duration {
    lease / 3
}

fn bad(field: &'static str, problem: &str) -> ServiceError {
    ServiceError::Field { field, problem: problem.to_owned() }
}

fn silent(lease: Duration) -> Status {
    Status::unavailable(format!("the worker was not heard of for {lease:?}"))
}

/// What a worker says of itself, and what it offers.
fn look_at(register: Register) -> Result<(About, Capabilities), ServiceError> {
    let codecs: Vec<Compression> = register.codecs().collect();
    let Register { name, version, encoder_version, filters, outputs, slots, asks_for_access, .. } = register;
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(bad("name", "expected one of 1 to 128 bytes that can be printed"));
    }
    if !(1..=SLOTS_MAX).contains(&slots) {
        return Err(bad("slots", "expected 1 to 1024"));
    }
    if filters.len().max(outputs.len()).max(codecs.len()) > OFFERS_MAX
        || filters.iter().any(|filter| filter.options.len() > OFFERS_MAX)
    {
        return Err(bad("filters", "a worker can offer 256 of anything"));
    }
    let words = filters.iter().flat_map(|filter| filter.options.iter().chain([&filter.name, &filter.about]));
    let words = words.chain(&outputs).chain([&version, &encoder_version]);
    if words.into_iter().any(|word| word.len() > NAME_MAX || word.chars().any(char::is_control)) {
        return Err(bad("filters", "expected words of at most 128 bytes that can be printed"));
    }
    let filters_offered = filters.iter().map(|filter| admit::filter_need(&filter.name));
    let offers: BTreeSet<_> = filters_offered
        .chain(outputs.iter().map(|scheme| admit::output_need(scheme)))
        .chain(codecs.into_iter().filter_map(convert::format).map(admit::codec_need))
        .chain((!encoder_version.is_empty()).then(|| admit::encoder_need(&encoder_version)))
        .chain(asks_for_access.then(|| admit::CREDENTIALS.to_owned()))
        .collect();
    let slots = slots as usize;
    Ok((About { name, version, filters, slots }, Arc::new(offers)))
}

/// Hears a worker until it is silent for too long, or its stream ends.
async fn listen(
    fleet: Fleet,
    member: Membership,
    mut requests: Streaming<ConnectRequest>,
    messages: Messages,
) {
    let lease = fleet.patience().lease;
    let mut closed = fleet.closed();
    let mut until = Instant::now() + lease;
    // Ends with the stream.
    let mut asked: JoinSet<()> = JoinSet::new();
    let (reason, status) = loop {
        let message = tokio::select! {
            // Whichever branch is lost is there again in the next round.
            Some(_) = asked.join_next() => continue,
            message = timeout_at(until, requests.message()) => message,
            _ = closed.wait_for(|&closed| closed) => break ("the coordinator is being stopped".to_owned(), Some(ServiceError::Draining.status())),
        };
        until = Instant::now() + lease;
        match message {
            Ok(Ok(Some(ConnectRequest { message }))) => match message {
                // There is room for as many answers.
                Some(Said::Access(_)) if asked.len() >= messages.max_capacity() => {
                    let error = bad("access", "more requests than its tasks can have");
                    break (error.to_string(), Some(error.status()));
                }
                Some(Said::Access(request)) => {
                    let (attempts, worker, messages) =
                        (fleet.attempts().clone(), member.id(), messages.clone());
                    asked.spawn(async move {
                        let answer = access::answer(&attempts, worker, request).await;
                        // One that is gone needs it no more.
                        let _ =
                            messages.send(Ok(ConnectResponse { message: Some(Told::Access(answer)) })).await;
                    });
                }
                Some(Said::Heartbeat(heartbeat)) => {
                    for task in heartbeat.tasks {
                        if let Some(attempt) =
                            fleet.attempts().find(&task.attempt).filter(|one| one.is_of(member.id()))
                        {
                            attempt.progress(task.bytes);
                        }
                    }
                }
                Some(Said::Result(result)) => {
                    if is_handed_back(&result) {
                        member.retire();
                    }
                    fleet.attempts().finish(member.id(), result);
                }
                Some(Said::Draining(_)) => {
                    tracing::info!(worker = member.name(), "a worker is being stopped");
                    member.retire();
                }
                Some(Said::Register(_)) => {
                    let error = bad("message", "a worker registers once");
                    break (error.to_string(), Some(error.status()));
                }
                // A kind of message that is newer than this coordinator.
                None => {}
            },
            Ok(Ok(None)) => break ("it has left".to_owned(), None),
            Ok(Err(status)) => break (format!("its connection broke: {}", status.message()), None),
            Err(_) => break (format!("it was not heard of for {lease:?}"), Some(silent(lease))),
        }
    };
    tracing::info!(worker = member.name(), reason, "a worker has gone");
    member.leave(&reason);
    if let Some(status) = status {
        // Why its stream ends, if it still reads.
        let _ = messages.try_send(Err(status));
    }
}

#[cfg(test)]
mod tests {
    use occy_proto::v1::FilterCapability;

    use super::*;

    #[test]
    fn a_registration_is_bounded_and_says_what_is_offered() {
        let filter = |name: &str| FilterCapability { name: name.to_owned(), ..FilterCapability::default() };
        let good = || Register {
            name: "one".to_owned(),
            encoder_version: "7".to_owned(),
            filters: vec![filter("shout")],
            outputs: vec!["tar".to_owned()],
            codecs: vec![Compression::Zstd.into()],
            slots: 3,
            ..Register::default()
        };
        let (about, offers) = look_at(good()).unwrap();
        assert_eq!((about.name.as_str(), about.slots), ("one", 3));
        let offers: Vec<_> = offers.iter().map(String::as_str).collect();
        assert_eq!(offers, ["codec:zstd", "encoder:7", "filter:shout", "output:tar"]);
        for bad in [
            Register { name: String::new(), ..good() },
            Register { name: "two\nlines".to_owned(), ..good() },
            Register { slots: 0, ..good() },
            Register { slots: 1025, ..good() },
            Register { filters: vec![filter("f"); 257], ..good() },
            Register { filters: vec![filter(&"f".repeat(129))], ..good() },
            Register { outputs: vec!["o".repeat(129)], ..good() },
        ] {
            assert!(look_at(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
