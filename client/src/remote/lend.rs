//! Calls to which image layouts of this machine are lent.

use occy_pipeline::error::Error;
use occy_pipeline::open::{self, Settings};
use occy_pipeline::output::oci_layout::LayoutOutput;
use occy_pipeline::source::oci_layout::LayoutSource;
use occy_pipeline::wire::lend::answer::Lender;
use occy_proto::v1::lend_layout_request::Part as Asked;
use occy_proto::v1::lend_layout_response::Part;
use occy_proto::v1::lend_start::Work;
use occy_proto::v1::{LendLayoutRequest, LendLayoutResponse, LendStart};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::connect::Coordinator;
use crate::settings::Misused;

/// Requests that wait to be sent: about a megabyte.
const REQUESTS: usize = 4;

/// What is lent.
pub(crate) struct Lent {
    pub(crate) source: Option<LayoutSource>,
    pub(crate) output: Option<LayoutOutput>,
}

impl Lent {
    /// Those of these ends that are layouts of this machine. None where neither is.
    pub(crate) fn of(source: &str, destination: &str, settings: &Settings) -> Result<Option<Self>, Error> {
        let source = open::lent_source(source, settings)?;
        let output = open::lent_output(destination, settings)?;
        Ok((source.is_some() || output.is_some()).then_some(Self { source, output }))
    }
}

/// What a call answers, whether something is lent to it or not.
pub(crate) enum Answered<T> {
    Plain(Box<Streaming<T>>),
    Lent(Box<Lending>, fn(Part) -> Option<T>),
}

impl<T> Answered<T> {
    /// The next answer. None behind the last. What is asked of what is lent is answered for as long as this is waited for.
    pub(crate) async fn message(&mut self) -> Result<Option<T>, Status> {
        match self {
            Self::Plain(answers) => answers.message().await,
            Self::Lent(lending, own) => loop {
                match lending.next().await? {
                    None => return Ok(None),
                    Some(part) => {
                        if let Some(answer) = own(part) {
                            return Ok(Some(answer));
                        }
                    }
                }
            },
        }
    }
}

/// A call to which something is lent.
pub(crate) struct Lending {
    answers: Streaming<LendLayoutResponse>,
    lender: Lender,
}

impl Lending {
    /// Begins it.
    pub(crate) async fn begin(coordinator: &Coordinator, lent: Lent, work: Work) -> anyhow::Result<Self> {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let lender = Lender::new(lent.source, lent.output, requests.clone());
        let (source, destination) = lender.lent();
        let start = Asked::Start(LendStart { work: Some(work), source, destination });
        requests.try_send(LendLayoutRequest { part: Some(start) }).expect("there is room for the first");
        let answered = coordinator.client.clone().lend_layout(ReceiverStream::new(receiver)).await;
        match answered {
            Ok(answers) => Ok(Self { answers: answers.into_inner(), lender }),
            Err(status) if status.code() == Code::Unimplemented => {
                let problem = format!(
                    "the coordinator at {} is of a version that cannot use image layouts of this machine",
                    coordinator.url
                );
                Err(Misused(problem).into())
            }
            Err(status) => Err(coordinator.error(status).into()),
        }
    }

    /// The next answer that is not about what is lent.
    async fn next(&mut self) -> Result<Option<Part>, Status> {
        while let Some(LendLayoutResponse { part }) = self.answers.message().await? {
            // A part of a later version is none.
            let Some(part) = part else { continue };
            let own = self.lender.take(part).map_err(|error| Status::aborted(error.to_string()))?;
            if own.is_some() {
                return Ok(own);
            }
        }
        Ok(None)
    }
}
