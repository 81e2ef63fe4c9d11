//! Calls whose caller lends image layouts: what is read and written there is asked of it, while all else is as in other calls.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use occy_pipeline::compression::Compression;
use occy_pipeline::copy::CopyPlan;
use occy_pipeline::digest::Digest;
use occy_pipeline::open;
use occy_pipeline::output::ImageOutput;
use occy_pipeline::output::content::ContentOutput;
use occy_pipeline::output::oci_layout::{LayoutOptions, LayoutOutput};
use occy_pipeline::source::ImageSource;
use occy_pipeline::source::oci_layout::LayoutSource;
use occy_pipeline::source::stored::Store;
use occy_pipeline::wire::WireError;
use occy_pipeline::wire::lend::LAYERS;
use occy_pipeline::wire::lend::borrow::{Borrowed, Hearing, borrow};
use occy_proto::v1::{Family, LendLayoutRequest, LendLayoutResponse, LentDestination, LentSource};
use occy_proto::v1::{copy_image_response, verify_image_response};
use tokio::sync::mpsc;
use tonic::Status;

use super::progress::Workers;
use super::source::broken;
use super::verify::{Verifying, verify_opened};
use super::{Answers, CallWatcher, copy, executor, told_whole, whole};
use crate::admit::{Ends, Work};
use crate::error::ServiceError;
use crate::fleet::Fleet;

/// Asks, and pieces of what is written, that wait for a slow caller: about a megabyte.
const ASKED: usize = 4;
/// Bytes of what a layout is called, or an image in it.
const TEXT_MAX: usize = 4096;

/// What a caller says.
pub type Requests = BoxStream<'static, Result<LendLayoutRequest, Status>>;

/// What a caller lends for a call.
pub struct Loan {
    source: Option<LentSource>,
    destination: Option<LentDestination>,
    borrowed: Borrowed,
    hearing: Hearing,
    requests: Requests,
}

impl Loan {
    /// These layouts, of which is asked by what comes out of the receiver, and whose caller answers in `requests`.
    pub fn new(
        source: Option<LentSource>,
        destination: Option<LentDestination>,
        requests: Requests,
    ) -> Result<(Self, mpsc::Receiver<LendLayoutResponse>), ServiceError> {
        let fail = |field, problem: String| Err(ServiceError::Field { field, problem });
        if source.is_none() && destination.is_none() {
            return fail("start", "lends neither the source nor the destination".to_owned());
        }
        let is_long = |texts: &[&String]| texts.iter().any(|text| text.len() > TEXT_MAX);
        let too_long = || format!("has a text of more than {TEXT_MAX} bytes");
        if source.as_ref().is_some_and(|lent| is_long(&[&lent.path, &lent.tag, &lent.digest])) {
            return fail("source", too_long());
        }
        if destination.as_ref().is_some_and(|lent| is_long(&[&lent.path, &lent.tag, &lent.compression])) {
            return fail("destination", too_long());
        }
        if let Some(LentSource { digest, .. }) = source.as_ref().filter(|lent| !lent.digest.is_empty())
            && let Err(error) = digest.parse::<Digest>()
        {
            return fail("source.digest", error.to_string());
        }
        if let Some(LentDestination { compression, manifest_family, .. }) = &destination {
            let is_unread = !compression.is_empty() && compression.parse::<Compression>().is_err();
            if is_unread {
                return fail("destination.compression", format!("{compression:?} is none that is known"));
            }
            if Family::try_from(*manifest_family).is_err() {
                return fail(
                    "destination.manifest_family",
                    format!("{manifest_family} is none that is known"),
                );
            }
        }
        let (asking, asked) = mpsc::channel(ASKED);
        let (borrowed, hearing) = borrow(asking);
        Ok((Self { source, destination, borrowed, hearing, requests }, asked))
    }

    /// Whether it is a source alone.
    pub fn is_source(&self) -> bool {
        self.source.is_some() && self.destination.is_none()
    }

    /// The ends that the caller's request has to name.
    pub fn ends(&self) -> Ends {
        Ends::NotLent { source: self.source.is_some(), destination: self.destination.is_some() }
    }

    fn source(&self, work: &Work) -> Result<Option<LayoutSource>, ServiceError> {
        let source = self.source.clone();
        let source = source.map(|lent| self.borrowed.source(lent, work.settings.platform.clone()));
        Ok(source.transpose()?)
    }

    fn destination(&self, work: &Work) -> Result<Option<LayoutOutput>, ServiceError> {
        let options = LayoutOptions {
            compression: work.settings.compression,
            format: work.settings.format,
            foreign_layers: work.settings.foreign_layers,
            ..LayoutOptions::default()
        };
        Ok(self.destination.as_ref().map(|lent| self.borrowed.output(lent, options)).transpose()?)
    }

    /// Works for as long as the caller answers.
    async fn during(self, work: impl Future<Output = Result<(), ServiceError>>) -> Result<(), ServiceError> {
        tokio::select! {
            // Who has the result may say no more.
            biased;
            done = work => done,
            error = self.hearing.hear(self.requests) => Err(match error {
                Ok(WireError::Gone) => ServiceError::Truncated,
                Ok(error) => error.into(),
                Err(status) => broken(&status),
            }),
        }
    }
}

/// Copies, as a call without a loan does.
pub async fn copy(
    work: Work,
    plan: CopyPlan,
    loan: Loan,
    answers: mpsc::Sender<copy_image_response::Part>,
) -> Result<(), ServiceError> {
    let source: Arc<dyn Store> = match loan.source(&work)? {
        Some(lent) => Arc::new(lent),
        None => open::store(&work.source, &work.settings)?,
    };
    let output: Arc<dyn ContentOutput> = match loan.destination(&work)? {
        Some(lent) => Arc::new(lent),
        None => open::content_output(&work.destination, &work.settings)?,
    };
    let plan = CopyPlan { parallel: plan.parallel.min(LAYERS), ..plan };
    loan.during(copy::between(source, output, plan, answers)).await
}

/// Processes an image or index, as a call without a loan does.
pub async fn process(work: Work, fleet: &Fleet, loan: Loan, answers: Answers) -> Result<(), ServiceError> {
    let (source, source_workers): (Box<dyn ImageSource>, _) = match loan.source(&work)? {
        Some(lent) => (Box::new(lent), None),
        None => {
            let source = open::source(&work.source, &work.settings)?;
            (source.end, source.max_workers)
        }
    };
    let (output, output_workers): (Arc<dyn ImageOutput>, _) = match loan.destination(&work)? {
        Some(lent) => (Arc::new(lent), None),
        None => {
            let output = open::output(&work.destination, &work.settings)?;
            (output.end, output.max_workers)
        }
    };
    let at_once = source_workers.max(output_workers).unwrap_or(work.settings.parallel).min(LAYERS);
    let workers = Workers::default();
    let watcher = CallWatcher { workers: workers.clone(), to_caller: None };
    let executor = executor(&work, fleet, output.form(), at_once, watcher);
    let processing = async {
        let done = whole(&work, source.as_ref(), output, executor, &workers, &answers).await?;
        told_whole(&work, &done, &answers).await
    };
    loan.during(processing).await
}

/// Verifies, as a call without a loan does: what is lent is the image, or its source.
pub async fn verify(
    verifying: Verifying,
    fleet: &Fleet,
    loan: Loan,
    answers: mpsc::Sender<verify_image_response::Part>,
) -> Result<(), ServiceError> {
    let Work { source: name, settings, .. } = &verifying.image;
    let lent = loan.source(&verifying.image)?;
    match lent.as_ref().filter(|_| !verifying.is_source_lent) {
        Some(image) => {
            let image = image.clone();
            loan.during(verify_opened(verifying, (&image, &image), None, fleet, answers)).await
        }
        None => {
            let (store, image) = (open::store(name, settings)?, open::source(name, settings)?.end);
            let ends = (store.as_ref(), image.as_ref());
            loan.during(verify_opened(verifying, ends, lent, fleet, answers)).await
        }
    }
}

/// The answers of a call, and between them what it asks. Ends with the answers.
pub fn with_asked(
    answers: impl Stream<Item = Result<LendLayoutResponse, Status>> + Send + Unpin + 'static,
    asked: mpsc::Receiver<LendLayoutResponse>,
) -> BoxStream<'static, Result<LendLayoutResponse, Status>> {
    stream::unfold((answers, asked), |(mut answers, mut asked)| async {
        // Neither branch loses anything that was taken.
        let next = tokio::select! {
            Some(asked) = asked.recv() => Some(Ok(asked)),
            answer = answers.next() => answer,
        };
        next.map(|next| (next, (answers, asked)))
    })
    .boxed()
}
