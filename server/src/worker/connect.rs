//! WorkerService: a worker's streams, from its registration to its end.
//!
//! A worker whose stream breaks keeps its place, and its attempts, until its lease has run out: it comes back by naming them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use occy_pipeline::wire::convert;
use occy_proto::v1::connect_request::Message as Said;
use occy_proto::v1::connect_response::Message as Told;
use occy_proto::v1::worker_service_server::WorkerService;
use occy_proto::v1::{Compression, ConnectRequest, ConnectResponse, Register, Welcome};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::access;
use super::attempt::is_handed_back;
use super::seat::{Line, MESSAGES, MESSAGES_EACH, RemoteSeat, Requests};
use super::upload::is_bounded;
use crate::access::{Access, Scope};
use crate::admit;
use crate::error::ServiceError;
use crate::fleet::{About, Fleet, Membership};
use crate::other;
use crate::schedule::Capabilities;

/// Bytes of a worker's name, its version, and the name of anything that it offers.
const NAME_MAX: usize = 128;
/// Filters, and other things, that a worker may offer.
const OFFERS_MAX: usize = 256;
/// Layers that a worker may have at once.
const SLOTS_MAX: u32 = 1024;
/// Attempts with which a worker may come back: those that it has, and those whose results were not taken.
const ATTEMPTS_MAX: usize = 4096;
/// Why workers go when the coordinator does.
const STOPPED: &str = "the coordinator is being stopped";

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
        Ok(Response::new(self.accept(request.into_inner().boxed()).await?))
    }
}

impl Workers {
    /// Has a worker, who may be one, register and attends to it.
    pub(crate) async fn accept(
        &self,
        mut requests: Requests,
    ) -> Result<BoxStream<'static, Result<ConnectResponse, Status>>, Status> {
        let fleet = &self.fleet;
        let lease = fleet.patience().lease;
        let first = timeout(lease, requests.next()).await.map_err(|_| silent(lease))?.transpose()?;
        let Some(Said::Register(register)) = first.and_then(|request| request.message) else {
            return Err(bad("message", "the first one is the registration").into());
        };
        let attempts = register.attempts.clone();
        let (about, offers) = look_at(register)?;
        let (messages, told) = mpsc::channel(MESSAGES + MESSAGES_EACH * about.slots);
        let answers = ReceiverStream::new(told).boxed();
        let mut line = Line { requests, messages, attempts };
        if let Some(seat) = fleet.attempts().seat(&line.attempts) {
            match seat.come_back(line).await {
                Ok(()) => return Ok(answers),
                // It was given up in this moment.
                Err(given_back) => line = given_back,
            }
        }
        let (returned, returns) = mpsc::channel(1);
        let seat = RemoteSeat::new(returned);
        let member = fleet.join(about, offers, seat.clone())?;
        tracing::info!(worker = member.name(), "a worker has come");
        let (fleet, closed) = (fleet.clone(), fleet.closed());
        tokio::spawn(Attendant { fleet, member, seat, returns, closed }.attend(line));
        Ok(answers)
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
    let Register {
        name, version, encoder_version, filters, outputs, slots, asks_for_access, attempts, ..
    } = register;
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
    if attempts.len() > ATTEMPTS_MAX || attempts.iter().any(|attempt| attempt.len() > NAME_MAX) {
        return Err(bad("attempts", "a worker can come back with 4096 of them"));
    }
    let words = filters
        .iter()
        .flat_map(|filter| filter.options.iter().chain([&filter.name, &filter.about, &filter.version]));
    let words = words.chain(&outputs).chain([&version, &encoder_version]);
    if words.into_iter().any(|word| word.len() > NAME_MAX || word.chars().any(char::is_control)) {
        return Err(bad("filters", "expected words of at most 128 bytes that can be printed"));
    }
    let filters_offered = filters.iter().map(|filter| admit::filter_need(&filter.name));
    let offers: BTreeSet<_> = filters_offered
        .chain(filters.iter().filter_map(other::offered_version))
        .chain(outputs.iter().map(|scheme| admit::output_need(scheme)))
        .chain(codecs.into_iter().filter_map(convert::format).map(admit::codec_need))
        .chain((!encoder_version.is_empty()).then(|| admit::encoder_need(&encoder_version)))
        .chain(asks_for_access.then(|| admit::CREDENTIALS.to_owned()))
        .collect();
    let slots = slots as usize;
    Ok((About { name, version, filters, slots }, Arc::new(offers)))
}

/// Who hears a worker, on one stream after the other.
struct Attendant {
    fleet: Fleet,
    member: Membership,
    seat: RemoteSeat,
    /// Streams on which it comes back.
    returns: mpsc::Receiver<Line>,
    closed: watch::Receiver<bool>,
}

/// Why a stream is heard no more.
enum Silence {
    /// It broke, for that reason: the worker may come back.
    Broken(String),
    /// The worker has come back before that was known.
    Returned(Box<Line>),
    /// The worker is gone, for that reason.
    Gone(String),
}

impl Attendant {
    /// Hears the worker until it is silent for too long, or has left.
    async fn attend(mut self, mut line: Line) {
        let reason = loop {
            self.welcome(&line);
            let mut heard = Instant::now();
            line = match self.hear(line, &mut heard).await {
                Silence::Returned(line) => *line,
                Silence::Gone(reason) => break reason,
                Silence::Broken(reason) => match self.miss(reason, heard).await {
                    Ok(line) => line,
                    Err(reason) => break reason,
                },
            };
            tracing::info!(worker = self.member.name(), "a worker has come back");
        };
        tracing::info!(worker = self.member.name(), reason, "a worker has gone");
        self.fleet.budgets().leave(self.member.id());
        self.seat.disconnect();
        self.member.leave(&reason);
    }

    /// Tells the worker who it is, and what of all that it may have missed still counts.
    fn welcome(&self, line: &Line) {
        let (attempts, worker) = (self.fleet.attempts(), self.member.id());
        let is_its = |token: &String| attempts.find(token).is_some_and(|attempt| attempt.is_of(worker));
        let kept: Vec<_> = line.attempts.iter().filter(|token| is_its(token)).cloned().collect();
        let lease = self.fleet.patience().lease;
        let welcome = Welcome {
            worker_id: self.member.name().to_owned(),
            heartbeat_interval: prost_types::Duration::try_from(welcome_interval(lease)).ok(),
            attempts: kept.clone(),
            lease: prost_types::Duration::try_from(lease).ok(),
            leases_budgets: true,
            resumes_uploads: true,
        };
        self.fleet.budgets().seat(worker, &self.seat);
        self.seat.connect(line.messages.clone(), welcome);
        // What was given or taken away while nobody heard it. From here on it is told like everything else.
        let missed = attempts.of(worker).into_iter().filter(|task| !line.attempts.contains(&task.attempt));
        for task in missed {
            // There is room for a task in each slot.
            let _ = self.seat.give(task);
        }
        kept.iter().filter(|token| !is_its(token)).for_each(|token| self.seat.cancel(token));
        if self.fleet.is_draining() {
            self.seat.drain();
        }
        self.member.set_away(false);
    }

    /// Hears what the worker says on one stream. `heard` is when it last said something.
    async fn hear(&mut self, line: Line, heard: &mut Instant) -> Silence {
        let Line { mut requests, messages, .. } = line;
        let (lease, worker) = (self.fleet.patience().lease, self.member.id());
        let attempts = self.fleet.attempts();
        // Ends with the stream.
        let mut asked: JoinSet<()> = JoinSet::new();
        let (reason, status) = loop {
            let message = tokio::select! {
                biased;
                // Whichever branch is lost is there again in the next round. What is rare comes first.
                Some(_) = asked.join_next() => continue,
                Some(line) = self.returns.recv() => return Silence::Returned(Box::new(line)),
                _ = self.closed.wait_for(|&closed| closed) => break (STOPPED.to_owned(), ServiceError::Draining.status()),
                message = timeout_at(*heard + lease, requests.next()) => message,
            };
            let message = match message {
                Ok(Some(Ok(ConnectRequest { message }))) => message,
                Ok(None) => return Silence::Broken("it has left".to_owned()),
                Ok(Some(Err(status))) => {
                    return Silence::Broken(format!("its connection broke: {}", status.message()));
                }
                Err(_) => break (format!("it was not heard of for {lease:?}"), silent(lease)),
            };
            *heard = Instant::now();
            match message {
                // There is room for as many answers.
                Some(Said::Access(_)) if asked.len() >= messages.max_capacity() => {
                    let error = bad("access", "more requests than its tasks can have");
                    break (error.to_string(), error.status());
                }
                Some(Said::Access(request)) => {
                    let (attempts, messages) = (attempts.clone(), messages.clone());
                    asked.spawn(async move {
                        let answer = access::answer(&attempts, worker, request).await;
                        // One that is gone needs it no more, or asks again.
                        let _ =
                            messages.send(Ok(ConnectResponse { message: Some(Told::Access(answer)) })).await;
                    });
                }
                Some(Said::Budget(told)) => {
                    if let Err(problem) = self.fleet.budgets().used(worker, &told) {
                        let error = bad("budget", problem);
                        break (error.to_string(), error.status());
                    }
                }
                Some(Said::Heartbeat(heartbeat)) => {
                    self.fleet.budgets().settle(worker);
                    if !heartbeat.tasks.iter().flat_map(|task| &task.upload).all(is_bounded) {
                        let error = bad("upload", "more than it may be");
                        break (error.to_string(), error.status());
                    }
                    for task in heartbeat.tasks {
                        if let Some(attempt) = attempts.find(&task.attempt).filter(|one| one.is_of(worker)) {
                            attempt.progress(task.bytes);
                            task.upload.into_iter().for_each(|state| attempt.uploaded(state));
                        }
                    }
                }
                Some(Said::Result(result)) => {
                    if is_handed_back(&result) {
                        self.member.retire();
                    }
                    let attempt = result.attempt.clone();
                    attempts.finish(worker, result);
                    self.seat.taken(attempt);
                }
                Some(Said::Draining(_)) => {
                    tracing::info!(worker = self.member.name(), "a worker is being stopped");
                    self.member.retire();
                }
                Some(Said::Register(_)) => {
                    let error = bad("message", "a worker registers once");
                    break (error.to_string(), error.status());
                }
                // A kind of message that is newer than this coordinator.
                None => {}
            }
        };
        // Why its stream ends, if it still reads.
        let _ = messages.try_send(Err(status));
        Silence::Gone(reason)
    }

    /// Waits until the worker, whose stream broke, comes back, as long as it has anything to come back with. Otherwise says why it is
    /// gone.
    async fn miss(&mut self, reason: String, heard: Instant) -> Result<Line, String> {
        self.seat.disconnect();
        self.member.set_away(true);
        if self.fleet.attempts().of(self.member.id()).is_empty() {
            return Err(reason);
        }
        tracing::info!(worker = self.member.name(), reason, "a worker is waited for");
        let lease = self.fleet.patience().lease;
        tokio::select! {
            biased;
            Some(line) = self.returns.recv() => Ok(line),
            () = sleep_until(heard + lease) => Err(format!("{reason}; it was not heard of for {lease:?}")),
            _ = self.closed.wait_for(|&closed| closed) => Err(STOPPED.to_owned()),
        }
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
            filters: vec![FilterCapability { version: "1".to_owned(), ..filter("shout") }, filter("exclude")],
            outputs: vec!["tar".to_owned()],
            codecs: vec![Compression::Zstd.into()],
            slots: 3,
            ..Register::default()
        };
        let (about, offers) = look_at(good()).unwrap();
        assert_eq!((about.name.as_str(), about.slots), ("one", 3));
        let offers: Vec<_> = offers.iter().map(String::as_str).collect();
        assert_eq!(
            offers,
            ["codec:zstd", "encoder:7", "filter:exclude", "filter:shout", "output:tar", "version:shout:1"]
        );
        for bad in [
            Register { name: String::new(), ..good() },
            Register { name: "two\nlines".to_owned(), ..good() },
            Register { slots: 0, ..good() },
            Register { slots: 1025, ..good() },
            Register { filters: vec![filter("f"); 257], ..good() },
            Register { filters: vec![filter(&"f".repeat(129))], ..good() },
            Register { outputs: vec!["o".repeat(129)], ..good() },
            Register { attempts: vec![String::new(); 4097], ..good() },
        ] {
            assert!(look_at(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
