//! The service of the API: from its messages to calls and jobs, and back. No decision is made here.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use occy_pipeline::copy::CopyPlan;
use occy_pipeline::output::OUTPUTS;
use occy_pipeline::source::SOURCES;
use occy_pipeline::wire::convert;
use occy_proto::v1::lend_start::Work as Lend;
use occy_proto::v1::pipeline_service_server::PipelineService;
use occy_proto::v1::{
    self, lend_layout_request, lend_layout_response, process_image_request, process_image_response,
    write_image_request,
};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use crate::access::{Access, Caller, Scope};
use crate::admit::{self, Ends, Gate, Work};
use crate::call::lend::{self, Loan};
use crate::call::verify::{self, Verifying};
use crate::call::{self, Answer, Elements, copy, look, names};
use crate::client::Client;
use crate::credentials::Logins;
use crate::error::ServiceError;
use crate::fleet::{Fleet, WorkerStatus};
use crate::job::runner::Jobs;
use crate::job::watch::follow;

/// The largest message, in bytes, in either direction.
pub const MESSAGE_MAX: usize = 1024 * 1024;
/// Answers that wait for a slow caller: about a megabyte.
const ANSWERS: usize = 4;
/// Bytes of what filters found in the one answer of WriteImage.
const FOUND_IN_ANSWER: usize = 512 * 1024;
/// Bytes of filters in the answer of ListCapabilities.
const FILTERS_IN_ANSWER: usize = 256 * 1024;
/// Fields of [`v1::PipelineSpec`] that earlier versions did not have, and whose wish would be lost there.
const SPEC_FIELDS: [&str; 3] = ["signatures", "provenance", "all"];
/// Bytes of jobs in one page.
const PAGE_BYTES: usize = 640 * 1024;
/// Bytes of an idempotency key.
const KEY_MAX: usize = 128;

/// Everything that a call may need.
#[derive(Debug)]
pub struct Coordinator {
    /// What is allowed.
    pub gate: Arc<Gate>,
    /// Who may call.
    pub access: Arc<Access>,
    /// The workers.
    pub fleet: Fleet,
    /// The jobs.
    pub jobs: Jobs,
    /// Calls that may yet begin.
    pub calls: Arc<Semaphore>,
    /// Calls at once.
    pub max_calls: usize,
    /// Whether the coordinator is being stopped.
    pub draining: watch::Receiver<bool>,
}

/// The service.
#[derive(Clone, Debug)]
pub struct Api(pub Arc<Coordinator>);

type Answered<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl PipelineService for Api {
    type ReadImageStream = Answered<v1::ReadImageResponse>;
    type ProcessImageStream = Answered<v1::ProcessImageResponse>;
    type SearchImageStream = Answered<v1::SearchImageResponse>;
    type InspectImageStream = Answered<v1::InspectImageResponse>;
    type CheckImageStream = Answered<v1::CheckImageResponse>;
    type VerifyImageStream = Answered<v1::VerifyImageResponse>;
    type CopyImageStream = Answered<v1::CopyImageResponse>;
    type LendLayoutStream = Answered<v1::LendLayoutResponse>;
    type ListNamesStream = Answered<v1::ListNamesResponse>;
    type WatchJobStream = Answered<v1::WatchJobResponse>;

    async fn read_image(
        &self,
        request: Request<v1::ReadImageRequest>,
    ) -> Result<Response<Self::ReadImageStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        let v1::ReadImageRequest { source, filters, platform, layer_form, verify_diff_ids, credentials } =
            request.into_inner();
        let spec = v1::PipelineSpec {
            source,
            filters,
            platform,
            layer_form,
            verify_diff_ids,
            ..v1::PipelineSpec::default()
        };
        let work =
            self.0.gate.admit(&spec, Ends::SourceNamed, &caller.tenant, &Logins::of(credentials)?).await?;
        let fleet = self.0.fleet.clone();
        let answers = answer(place, deadline, move |answers| async move {
            call::run(work, &fleet, stream::empty().boxed(), answers).await
        });
        let answers = answers.try_filter_map(async |answer| match answer {
            Answer::Element(element) => Ok(Some(v1::ReadImageResponse { element: Some(element) })),
            Answer::Found(_)
            | Answer::Layer(_)
            | Answer::Progress(_)
            | Answer::Image(_)
            | Answer::Result(_) => Ok(None),
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn write_image(
        &self,
        request: Request<Streaming<v1::WriteImageRequest>>,
    ) -> Result<Response<v1::WriteImageResponse>, Status> {
        use write_image_request::Part;
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Write)?;
        let mut parts = request.into_inner();
        let Some(v1::WriteImageRequest { part: Some(Part::Spec(spec)), credentials }) =
            parts.message().await?
        else {
            return Err(no_spec());
        };
        let work = self
            .0
            .gate
            .admit(&spec, Ends::DestinationNamed, &caller.tenant, &Logins::of(credentials)?)
            .await?;
        let elements = parts.map(|part| match part?.part {
            Some(Part::Element(element)) => Ok(element),
            Some(Part::Spec(_)) => Err(no_spec()),
            None => Ok(v1::ImageElement::default()),
        });
        let (fleet, elements): (_, Elements) = (self.0.fleet.clone(), elements.boxed());
        let mut answers = answer(place, deadline, move |answers| async move {
            call::run(work, &fleet, elements, answers).await
        });
        let mut filter_outputs = Vec::new();
        let mut result = None;
        let mut found = 0;
        while let Some(answer) = answers.try_next().await? {
            match answer {
                Answer::Found(output) => {
                    found += output.encoded_len();
                    if found > FOUND_IN_ANSWER {
                        let what = "what the filters found";
                        return Err(ServiceError::TooLarge { what, limit: FOUND_IN_ANSWER }.into());
                    }
                    filter_outputs.push(output);
                }
                Answer::Result(came) => result = Some(came),
                Answer::Element(_) | Answer::Layer(_) | Answer::Progress(_) | Answer::Image(_) => {}
            }
        }
        Ok(Response::new(v1::WriteImageResponse { result, filter_outputs }))
    }

    async fn process_image(
        &self,
        request: Request<Streaming<v1::ProcessImageRequest>>,
    ) -> Result<Response<Self::ProcessImageStream>, Status> {
        use process_image_request::Part;
        let (caller, place, deadline) = self.begin(&request)?;
        let mut parts = request.into_inner();
        let Some(v1::ProcessImageRequest { part: Some(Part::Spec(spec)), credentials }) =
            parts.message().await?
        else {
            return Err(no_spec());
        };
        if spec.destination.is_empty() || !spec.source.is_empty() {
            caller.may(Scope::Read)?;
        }
        if !spec.destination.is_empty() {
            caller.may(Scope::Write)?;
        }
        let work = self.0.gate.admit(&spec, Ends::Any, &caller.tenant, &Logins::of(credentials)?).await?;
        let elements = parts.map(|part| match part?.part {
            Some(Part::Element(element)) => Ok(element),
            Some(Part::Spec(_)) => Err(no_spec()),
            None => Ok(v1::ImageElement::default()),
        });
        let (fleet, elements): (_, Elements) = (self.0.fleet.clone(), elements.boxed());
        let answers = answer(place, deadline, move |answers| async move {
            call::run(work, &fleet, elements, answers).await
        });
        Ok(Response::new(answers.map_ok(process_answer).boxed()))
    }

    async fn search_image(
        &self,
        request: Request<v1::SearchImageRequest>,
    ) -> Result<Response<Self::SearchImageStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        let v1::SearchImageRequest { source, pattern, regex, platform, credentials } = request.into_inner();
        let search = v1::SearchSpec { pattern, regex, script_friendly: false };
        let spec = v1::PipelineSpec { source, platform, search: Some(search), ..v1::PipelineSpec::default() };
        let work =
            self.0.gate.admit(&spec, Ends::SourceNamed, &caller.tenant, &Logins::of(credentials)?).await?;
        let fleet = self.0.fleet.clone();
        let pages =
            answer(place, deadline, move |hits| async move { call::search(work, &fleet, hits).await });
        Ok(Response::new(pages.map_ok(|hits| v1::SearchImageResponse { hits }).boxed()))
    }

    async fn inspect_image(
        &self,
        request: Request<v1::InspectImageRequest>,
    ) -> Result<Response<Self::InspectImageStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        let v1::InspectImageRequest { source, platform, credentials } = request.into_inner();
        let spec = v1::PipelineSpec { source, platform, ..v1::PipelineSpec::default() };
        let work =
            self.0.gate.admit(&spec, Ends::SourceNamed, &caller.tenant, &Logins::of(credentials)?).await?;
        let parts = answer(place, deadline, move |parts| look::inspect(work, parts));
        Ok(Response::new(parts.map_ok(|part| v1::InspectImageResponse { part: Some(part) }).boxed()))
    }

    async fn check_image(
        &self,
        request: Request<v1::CheckImageRequest>,
    ) -> Result<Response<Self::CheckImageStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        let v1::CheckImageRequest { source, platform, fast, parallel, max_layer_size, credentials } =
            request.into_inner();
        let spec = v1::PipelineSpec {
            source,
            platform,
            parallel,
            max_layer_size,
            verify_diff_ids: true,
            ..v1::PipelineSpec::default()
        };
        let work =
            self.0.gate.admit(&spec, Ends::SourceNamed, &caller.tenant, &Logins::of(credentials)?).await?;
        let parts = answer(place, deadline, move |parts| look::check(work, fast, parts));
        Ok(Response::new(parts.map_ok(|part| v1::CheckImageResponse { part: Some(part) }).boxed()))
    }

    async fn verify_image(
        &self,
        request: Request<v1::VerifyImageRequest>,
    ) -> Result<Response<Self::VerifyImageStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        let verifying = self.verifying(request.into_inner(), false, &caller).await?;
        let fleet = self.0.fleet.clone();
        let parts =
            answer(
                place,
                deadline,
                move |parts| async move { verify::verify(verifying, &fleet, parts).await },
            );
        Ok(Response::new(parts.map_ok(|part| v1::VerifyImageResponse { part: Some(part) }).boxed()))
    }

    async fn copy_image(
        &self,
        request: Request<v1::CopyImageRequest>,
    ) -> Result<Response<Self::CopyImageStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        caller.may(Scope::Write)?;
        let (work, plan) = self.copy_of(request.into_inner(), Ends::BothNamed, &caller).await?;
        let parts = answer(place, deadline, move |parts| copy::copy(work, plan, parts));
        Ok(Response::new(parts.map_ok(|part| v1::CopyImageResponse { part: Some(part) }).boxed()))
    }

    async fn lend_layout(
        &self,
        request: Request<Streaming<v1::LendLayoutRequest>>,
    ) -> Result<Response<Self::LendLayoutStream>, Status> {
        use lend_layout_request::Part;
        let (caller, place, deadline) = self.begin(&request)?;
        let mut requests = request.into_inner();
        let Some(v1::LendLayoutRequest { part: Some(Part::Start(start)) }) = requests.message().await? else {
            return Err(bad_start());
        };
        let v1::LendStart { work, source, destination } = start;
        let is_verify = matches!(work, Some(Lend::Verify(_)));
        if destination.is_some() || source.is_none() || is_verify {
            caller.may(Scope::Read)?;
        }
        if destination.is_none() && !is_verify {
            caller.may(Scope::Write)?;
        }
        let (loan, asked) = Loan::new(source, destination, requests.boxed())?;
        let answers = match work {
            Some(Lend::Copy(request)) => {
                let (work, plan) = self.copy_of(request, loan.ends(), &caller).await?;
                let parts = answer(place, deadline, move |parts| lend::copy(work, plan, loan, parts));
                let message =
                    |part| lend_layout_response::Part::Copy(v1::CopyImageResponse { part: Some(part) });
                parts.map_ok(message).boxed()
            }
            Some(Lend::Process(request)) => {
                let Some(process_image_request::Part::Spec(spec)) = request.part else {
                    return Err(no_spec());
                };
                let logins = Logins::of(request.credentials)?;
                let work = self.0.gate.admit(&spec, loan.ends(), &caller.tenant, &logins).await?;
                let fleet = self.0.fleet.clone();
                let answers = answer(place, deadline, move |answers| async move {
                    lend::process(work, &fleet, loan, answers).await
                });
                answers.map_ok(process_answer).map_ok(lend_layout_response::Part::Process).boxed()
            }
            Some(Lend::Verify(request)) => {
                if !loan.is_source() {
                    let problem = "of a verification the image or its source is lent".to_owned();
                    return Err(ServiceError::Field { field: "source", problem }.into());
                }
                let verifying = self.verifying(request, true, &caller).await?;
                let fleet = self.0.fleet.clone();
                let parts = answer(place, deadline, move |parts| async move {
                    lend::verify(verifying, &fleet, loan, parts).await
                });
                let message =
                    |part| lend_layout_response::Part::Verify(v1::VerifyImageResponse { part: Some(part) });
                parts.map_ok(message).boxed()
            }
            None => return Err(bad_start()),
        };
        let answers = answers.map_ok(|part| v1::LendLayoutResponse { part: Some(part) });
        Ok(Response::new(lend::with_asked(answers, asked)))
    }

    async fn list_names(
        &self,
        request: Request<v1::ListNamesRequest>,
    ) -> Result<Response<Self::ListNamesStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        let v1::ListNamesRequest { place: source, credentials } = request.into_inner();
        let spec = v1::PipelineSpec { source, ..v1::PipelineSpec::default() };
        let work =
            self.0.gate.admit(&spec, Ends::PlaceNamed, &caller.tenant, &Logins::of(credentials)?).await?;
        Ok(Response::new(answer(place, deadline, move |answers| names::list(work, answers))))
    }

    async fn resolve_image(
        &self,
        request: Request<v1::ResolveImageRequest>,
    ) -> Result<Response<v1::ResolveImageResponse>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Read)?;
        let v1::ResolveImageRequest { image: source, platform, credentials } = request.into_inner();
        let spec = v1::PipelineSpec { source, platform: platform.clone(), ..v1::PipelineSpec::default() };
        let work =
            self.0.gate.admit(&spec, Ends::SourceNamed, &caller.tenant, &Logins::of(credentials)?).await?;
        let platform = platform.map(|platform| admit::platform("platform", platform)).transpose()?;
        one(answer(place, deadline, move |answers| names::resolve(work, platform, answers))).await
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Delete)?;
        let v1::DeleteImageRequest { image: destination, all_tags, credentials } = request.into_inner();
        let spec = v1::PipelineSpec { destination, ..v1::PipelineSpec::default() };
        let logins = Logins::of(credentials)?;
        let work = self.0.gate.admit(&spec, Ends::DestinationNamed, &caller.tenant, &logins).await?;
        one(answer(place, deadline, move |answers| names::delete(work, all_tags, answers))).await
    }

    async fn submit_job(
        &self,
        request: Request<v1::SubmitJobRequest>,
    ) -> Result<Response<v1::SubmitJobResponse>, Status> {
        let caller = self.0.access.authorize(&request, Scope::Jobs)?;
        self.refuse_draining()?;
        let v1::SubmitJobRequest { spec, idempotency_key, credentials } = request.into_inner();
        check_key(&idempotency_key)?;
        let (spec, logins) = (spec.unwrap_or_default(), Logins::of(credentials)?);
        let job = self.0.jobs.submit(&caller.tenant, spec, &logins, idempotency_key).await?;
        Ok(Response::new(v1::SubmitJobResponse { job: Some(job) }))
    }

    async fn submit_mirror(
        &self,
        request: Request<v1::SubmitMirrorRequest>,
    ) -> Result<Response<v1::SubmitMirrorResponse>, Status> {
        let caller = self.0.access.authorize(&request, Scope::Jobs)?;
        self.refuse_draining()?;
        let v1::SubmitMirrorRequest { spec, idempotency_key, credentials } = request.into_inner();
        check_key(&idempotency_key)?;
        let (spec, logins) = (spec.unwrap_or_default(), Logins::of(credentials)?);
        let work = self.0.gate.admit_mirror(&spec, &caller.tenant, &logins).await?;
        if work.deletes() {
            caller.may(Scope::Delete)?;
        }
        let spec = v1::PipelineSpec { mirror: Some(spec), ..v1::PipelineSpec::default() };
        let job = self.0.jobs.submit_admitted(&caller.tenant, spec, &logins, idempotency_key).await?;
        Ok(Response::new(v1::SubmitMirrorResponse { job: Some(job) }))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::GetJobResponse>, Status> {
        let caller = self.0.access.authorize(&request, Scope::Jobs)?;
        let job = self.job(&caller, &request.into_inner().job_id).await?;
        Ok(Response::new(v1::GetJobResponse { job: Some(job) }))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let caller = self.0.access.authorize(&request, Scope::Jobs)?;
        let v1::ListJobsRequest { page_size, page_token, states } = request.into_inner();
        let bad = |field, problem: &str| ServiceError::Field { field, problem: problem.to_owned() };
        let before = match page_token.as_str() {
            "" => None,
            token if uuid::Uuid::try_parse(token).is_ok() => Some(page_token),
            _ => return Err(bad("page_token", "is not one of ours").into()),
        };
        let states = states.into_iter().map(v1::JobState::try_from).collect::<Result<_, _>>();
        let states = states.map_err(|_| bad("states", "has a value that is not known"))?;
        let count = match page_size {
            0 => 50,
            size => size.min(200) as usize,
        };
        let page = self.0.jobs.engine().list(caller.sees().cloned(), before, states, count).await;
        let (mut jobs, mut more) = page.map_err(ServiceError::from)?;
        let mut bytes = 0;
        let fits = jobs.iter().take_while(|job| {
            bytes += job.encoded_len();
            bytes <= PAGE_BYTES
        });
        let fits = fits.count().max(1);
        more |= fits < jobs.len();
        jobs.truncate(fits);
        let next_page_token = match jobs.last() {
            Some(job) if more => job.id.clone(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListJobsResponse { jobs, next_page_token }))
    }

    async fn watch_job(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let (caller, place, deadline) = self.begin(&request)?;
        caller.may(Scope::Jobs)?;
        let v1::WatchJobRequest { job_id, after_sequence } = request.into_inner();
        self.job(&caller, &job_id).await?;
        let coordinator = Arc::clone(&self.0);
        let events = answer(place, deadline, move |events| async move {
            let mut draining = coordinator.draining.clone();
            let jobs = &coordinator.jobs;
            tokio::select! {
                result = follow(jobs.engine(), jobs.live(), &job_id, after_sequence, &events) => result,
                // What is lost here is read again by a watcher that comes back.
                _ = draining.wait_for(|&draining| draining) => Err(ServiceError::Draining),
            }
        });
        Ok(Response::new(events.map_ok(|event| v1::WatchJobResponse { event: Some(event) }).boxed()))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::CancelJobResponse>, Status> {
        let caller = self.0.access.authorize(&request, Scope::Jobs)?;
        let id = request.into_inner().job_id;
        self.job(&caller, &id).await?;
        let job = self.0.jobs.cancel(&id).await?;
        Ok(Response::new(v1::CancelJobResponse { job: Some(job) }))
    }

    async fn list_capabilities(
        &self,
        request: Request<v1::ListCapabilitiesRequest>,
    ) -> Result<Response<v1::ListCapabilitiesResponse>, Status> {
        self.0.access.caller(&request)?;
        let end = |scheme: &str, syntax: &str, about: &str| {
            self.0.gate.allows_scheme(scheme).then(|| v1::EndCapability {
                scheme: scheme.to_owned(),
                syntax: syntax.to_owned(),
                about: about.to_owned(),
            })
        };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let workers = self.0.fleet.workers();
        // Workers offer what they like, and an answer has its limit.
        let mut filters: Vec<v1::FilterCapability> = Vec::new();
        let mut bytes = 0;
        for filter in workers.iter().flat_map(|worker| &worker.about.filters) {
            if filters.iter().all(|known| known.name != filter.name) {
                bytes += filter.encoded_len();
                filters.extend((bytes < FILTERS_IN_ANSWER).then(|| filter.clone()));
            }
        }
        let workers = workers.into_iter().map(|WorkerStatus { about, free }| v1::WorkerCapability {
            name: about.name,
            slots: convert::count(about.slots),
            free_slots: convert::count(free),
            version: about.version,
        });
        let response = v1::ListCapabilitiesResponse {
            filters,
            sources: SOURCES.iter().filter_map(|kind| end(kind.scheme, kind.syntax, kind.about)).collect(),
            destinations: OUTPUTS
                .iter()
                .filter_map(|kind| end(kind.scheme, kind.syntax, kind.about))
                .collect(),
            compressions: vec![v1::Compression::Gzip.into(), v1::Compression::Zstd.into()],
            workers: workers.collect(),
            version,
            spec_fields: SPEC_FIELDS.map(str::to_owned).to_vec(),
        };
        Ok(Response::new(response))
    }
}

impl Api {
    /// Who calls, a place among the calls at once, and the caller's deadline.
    fn begin<T>(&self, request: &Request<T>) -> Result<(Caller, Place, Option<Duration>), ServiceError> {
        let caller = self.0.access.caller(request)?;
        self.refuse_draining()?;
        let place = |calls: &Arc<Semaphore>, what, limit| {
            let place = Arc::clone(calls).try_acquire_owned();
            place.map_err(|_| ServiceError::TooMany { what, limit })
        };
        let clients = &self.0.gate.clients;
        let client = clients.get(&caller.tenant);
        let own = place(&client.calls, "calls of this client", clients.limits().calls)?;
        let all = place(&self.0.calls, "calls", self.0.max_calls)?;
        let deadline = request.metadata().get("grpc-timeout").and_then(|value| timeout(value.to_str().ok()?));
        Ok((caller, Place { _all: all, _own: own, _client: client }, deadline))
    }

    /// What a copy is, whose caller lends the ends that need not be named.
    async fn copy_of(
        &self,
        request: v1::CopyImageRequest,
        ends: Ends,
        caller: &Caller,
    ) -> Result<(Work, CopyPlan), ServiceError> {
        let signatures = convert::signatures(request.signatures());
        let spec = v1::PipelineSpec {
            source: request.source,
            destination: request.destination,
            foreign_layers: request.foreign_layers,
            parallel: request.parallel,
            ..v1::PipelineSpec::default()
        };
        let logins = Logins::of(request.credentials)?;
        let work = self.0.gate.admit(&spec, ends, &caller.tenant, &logins).await?;
        let plan = CopyPlan {
            platforms: admit::platforms(request.platforms)?,
            any_platform: false,
            sparse: request.sparse,
            referrers: request.referrers,
            preserve_digests: request.preserve_digests,
            signatures,
            parallel: work.settings.parallel,
        };
        Ok((work, plan))
    }

    /// What is to be verified, whose image or source the caller may lend.
    async fn verifying(
        &self,
        request: v1::VerifyImageRequest,
        is_lent: bool,
        caller: &Caller,
    ) -> Result<Verifying, ServiceError> {
        let v1::VerifyImageRequest { image, source, parallel, max_layer_size, credentials } = request;
        let logins = Logins::of(credentials)?;
        let is_source_lent = is_lent && !image.is_empty();
        if is_source_lent && !source.is_empty() {
            let problem = "is lent, and must not be set".to_owned();
            return Err(ServiceError::Field { field: "source", problem });
        }
        let ends = match is_lent && !is_source_lent {
            true => Ends::NotLent { source: true, destination: true },
            false => Ends::SourceNamed,
        };
        let spec =
            v1::PipelineSpec { source: image, parallel, max_layer_size, ..v1::PipelineSpec::default() };
        let image = self.0.gate.admit(&spec, ends, &caller.tenant, &logins).await?;
        Ok(Verifying { image, source, is_source_lent, gate: Arc::clone(&self.0.gate), logins })
    }

    /// A job, if there is one that the caller sees.
    async fn job(&self, caller: &Caller, id: &str) -> Result<v1::Job, ServiceError> {
        let job = self.0.jobs.engine().get(id).await?;
        let is_seen = |job: &v1::Job| caller.sees().is_none_or(|tenant| **tenant == *job.tenant);
        job.filter(is_seen).ok_or_else(|| ServiceError::NoSuchJob(id.to_owned()))
    }

    fn refuse_draining(&self) -> Result<(), ServiceError> {
        if *self.0.draining.borrow() { Err(ServiceError::Draining) } else { Ok(()) }
    }
}

/// A place among the calls at once: among everybody's, and among the client's own, which stays the same client meanwhile.
struct Place {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
    _client: Arc<Client>,
}

/// The value of `grpc-timeout` (gRPC over HTTP/2, "Requests"): up to eight digits and a unit.
fn timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number = Some(number).filter(|digits| (1..=8).contains(&digits.len()))?.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

fn check_key(key: &str) -> Result<(), ServiceError> {
    if key.len() > KEY_MAX {
        let problem = format!("has more than {KEY_MAX} bytes");
        return Err(ServiceError::Field { field: "idempotency_key", problem });
    }
    Ok(())
}

fn no_spec() -> Status {
    let problem = "the first message, and no other, is the spec".to_owned();
    ServiceError::Field { field: "part", problem }.into()
}

fn bad_start() -> Status {
    let problem = "the first message, and no other, says what is to be done".to_owned();
    ServiceError::Field { field: "start", problem }.into()
}

fn process_answer(answer: Answer) -> v1::ProcessImageResponse {
    let part = match answer {
        Answer::Element(element) => process_image_response::Part::Element(element),
        Answer::Found(output) => process_image_response::Part::FilterOutput(output),
        Answer::Layer(layer) => process_image_response::Part::Layer(layer),
        Answer::Progress(progress) => process_image_response::Part::Progress(progress),
        Answer::Image(image) => process_image_response::Part::Image(image),
        Answer::Result(result) => process_image_response::Part::Result(result),
    };
    v1::ProcessImageResponse { part: Some(part) }
}

/// Runs the work of a call on a task of its own, whose answers are the stream. A caller that goes away drops the stream, and
/// with it the work.
fn answer<A, P, W>(
    place: P,
    deadline: Option<Duration>,
    work: impl FnOnce(mpsc::Sender<A>) -> W,
) -> Answered<A>
where
    A: Send + 'static,
    P: Send + 'static,
    W: Future<Output = Result<(), ServiceError>> + Send + 'static,
{
    let (sender, answers) = mpsc::channel(ANSWERS);
    let work = work(sender);
    let work = work.in_current_span();
    let task = tokio::spawn(async move {
        let _place = place;
        match deadline {
            None => work.await,
            Some(deadline) => {
                tokio::time::timeout(deadline, work).await.unwrap_or(Err(ServiceError::Deadline))
            }
        }
    });
    let answering = Answering { answers, task: AbortOnDrop(task) };
    stream::unfold(Some(answering), |answering| async {
        let mut answering = answering?;
        if let Some(answer) = answering.answers.recv().await {
            return Some((Ok(answer), Some(answering)));
        }
        // The work has dropped its side: how it ended is the end of the stream.
        let end = match (&mut answering.task.0).await {
            Ok(Ok(())) => return None,
            Ok(Err(error)) => error,
            Err(error) => ServiceError::Panicked(error.to_string()),
        };
        Some((Err(end.status()), None))
    })
    .boxed()
}

/// The one answer of a call.
async fn one<T>(mut answers: Answered<T>) -> Result<Response<T>, Status> {
    let answer = answers.try_next().await?.ok_or_else(|| Status::internal("there is no answer"))?;
    Ok(Response::new(answer))
}

struct Answering<A> {
    answers: mpsc::Receiver<A>,
    task: AbortOnDrop,
}

struct AbortOnDrop(JoinHandle<Result<(), ServiceError>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_have_a_unit() {
        assert_eq!(timeout("10S"), Some(Duration::from_secs(10)));
        assert_eq!(timeout("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "S", "10", "123456789S", "1.5S", "1ü"] {
            assert_eq!(timeout(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn dropping_the_answers_stops_the_work() {
        let calls = Arc::new(Semaphore::new(1));
        let permit = Arc::clone(&calls).try_acquire_owned().unwrap();
        let mut answers = answer(permit, None, |answers: mpsc::Sender<u32>| async move {
            answers.send(7).await.map_err(|_| ServiceError::CallerGone)?;
            std::future::pending().await
        });
        assert_eq!(answers.next().await.unwrap().unwrap(), 7);
        drop(answers);
        let _again = tokio::time::timeout(Duration::from_secs(1), calls.acquire()).await.unwrap();
    }

    #[tokio::test]
    async fn a_deadline_ends_the_stream_with_its_own_code() {
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let work = |_answers: mpsc::Sender<u32>| std::future::pending();
        let mut answers = answer(permit, Some(Duration::from_millis(5)), work);
        let status = answers.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        assert!(answers.next().await.is_none());
    }
}
