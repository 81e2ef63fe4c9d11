//! A task: from its message to the layer, the filters and the output that it names, and from what comes of them to its result.

use std::collections::HashMap;
use std::sync::Arc;

use occy_pipeline::blob::BlobRef;
use occy_pipeline::codec::Pool;
use occy_pipeline::compression::Format;
use occy_pipeline::digest::Digest;
use occy_pipeline::element::{Layer, StoredLayer, WrittenLayer};
use occy_pipeline::error::{Blame, Error};
use occy_pipeline::executor::LayerTask;
use occy_pipeline::filter::search::Search;
use occy_pipeline::filter::{Filter, FilterChain};
use occy_pipeline::manifest::{Annotations, Descriptor};
use occy_pipeline::output::ImageOutput;
use occy_pipeline::output::manifest::ManifestFormat;
use occy_pipeline::output::registry::RegistryOutput;
use occy_pipeline::progress::{LayerState, Progress};
use occy_pipeline::reference::Reference;
use occy_pipeline::registry::{Access, Budget, Client};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::Limits;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::wire::convert;
use occy_proto::v1::blob_service_client::BlobServiceClient;
use occy_proto::v1::task_result::Outcome;
use occy_proto::v1::{self, TaskDone, TaskError, TaskFault, TaskResult, task_destination, task_source};
use tokio::sync::Semaphore;
use tonic::transport::Channel;

use crate::access::Desk;
use crate::blobs::Blobs;
use crate::convert::layer_form;
use crate::uploads::Uploads;
use crate::verdict::{self, Verdict};

/// What all tasks of a worker share.
#[derive(Clone, Debug)]
pub struct Bench {
    /// How registries are spoken to, and who we are there where the client of a task is nobody: the worker's own credentials, as its
    /// operator configured them.
    pub registries: Client,
    /// Who says when requests may go.
    pub budget: Arc<dyn Budget>,
    /// The coordinator's bytes.
    pub blobs: BlobServiceClient<Channel>,
    /// Where temporary files go.
    pub spools: SpoolDir,
    /// The right to run a task. One coordinator knows how many there are; of several, none knows what the others use.
    pub slots: Arc<Semaphore>,
}

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// It says what this worker cannot understand.
    #[error("the task cannot be used: {0}")]
    Unusable(String),
    /// The pipeline.
    #[error(transparent)]
    Pipeline(#[from] Error),
}

impl Bench {
    /// Runs a task, when it has a slot. Its progress is the first layer's. Dropped, it stops.
    ///
    /// Rights at registries where the task's client has credentials of its own are had at the `desk`. Where the destination is a registry,
    /// `uploads` has what there is to go on with, and hears how far it has come.
    pub async fn run(
        &self,
        task: v1::Task,
        progress: Progress,
        desk: &Desk,
        uploads: &Uploads,
    ) -> TaskResult {
        let _slot = self.slots.acquire().await.expect("nobody closes it");
        let attempt = task.attempt.clone();
        let outcome = match self.done(task, &progress, desk, uploads).await {
            Ok(done) => Outcome::Done(done),
            Err(failure) => Outcome::Error(error(&failure)),
        };
        TaskResult { attempt, outcome: Some(outcome) }
    }

    /// Clients without credentials, by the accounts for which they get rights at the desk.
    fn granted(&self, task: &v1::Task, desk: &Desk) -> HashMap<String, Client> {
        let source = task.source.as_ref().and_then(|source| match &source.content {
            Some(task_source::Content::Registry(at)) => Some(at),
            _ => None,
        });
        let destination = task.destination.as_ref().and_then(|destination| match &destination.content {
            Some(task_destination::Content::Registry(at)) => Some(at),
            _ => None,
        });
        let ends = source.into_iter().chain(destination).filter(|at| at.ask_for_access);
        let granted = |at: &v1::RegistryRepository| {
            let client = self.registries.granted_by(desk.grantor(&task.attempt));
            (at.account.clone(), client.budgeted_by(&self.budget, Some(at.account.clone())))
        };
        ends.map(granted).collect()
    }

    async fn done(
        &self,
        task: v1::Task,
        progress: &Progress,
        desk: &Desk,
        uploads: &Uploads,
    ) -> Result<TaskDone, Failure> {
        let ends = Ends {
            blobs: Blobs::new(self.blobs.clone(), task.attempt.clone().into()),
            own: &self.registries,
            granted: self.granted(&task, desk),
        };
        let layer = ends.layer(&task)?;
        let chain = chain(&task).await?;
        progress.begin([(layer.label(), layer.blob.size())].into_iter());
        let task = LayerTask {
            output: ends.output(&task, uploads)?,
            plan: Arc::new(LayerPlan {
                annotations: Annotations::default(),
                chain,
                pool: Pool::shared().clone(),
                spools: self.spools.clone(),
                limits: Limits::default(),
                max_layer_size: task.max_layer_size,
                verify_diff_ids: task.verify_diff_id,
            }),
            layer,
            progress: progress.clone(),
        };
        let written = task.run().await?;
        if written.reports.iter().any(Option::is_some) {
            let document = serde_json::to_vec(&written.reports).expect("reports are plain data");
            ends.blobs.write_reports(document.into()).await.map_err(Error::from)?;
        }
        Ok(done(written, task.layer_progress().state() == LayerState::Reused))
    }
}

/// Where the bytes of one task are, and where they go.
struct Ends<'a> {
    blobs: Blobs,
    /// Registries where we are who the worker's operator says.
    own: &'a Client,
    /// Those where we are who the task's client says.
    granted: HashMap<String, Client>,
}

impl Ends<'_> {
    /// The layer, which is alone in this process, and so has index 0.
    fn layer(&self, task: &v1::Task) -> Result<Layer, Failure> {
        let source = task.source.as_ref().ok_or_else(|| unusable("it has no source"))?;
        let digest = digest(&source.digest)?;
        let descriptor = match (&digest, source.size, source.media_type.as_str()) {
            (Some(digest), Some(size), media_type) if !media_type.is_empty() => {
                let mut descriptor = Descriptor::new(media_type, digest, size);
                descriptor.urls.clone_from(&source.urls);
                Some(descriptor)
            }
            (_, _, "") => None,
            _ => return Err(unusable("a media type without digest and size")),
        };
        let (blob, origin): (BlobRef, _) = match (&source.content, digest) {
            (Some(task_source::Content::Registry(at)), Some(digest)) => {
                let repository = self.registry(at).repository(&reference(at)?, Access::Pull);
                let blob = match &descriptor {
                    Some(descriptor) => repository.layer(descriptor),
                    None => repository.blob(&digest, source.size),
                };
                (blob, Some(repository))
            }
            (Some(task_source::Content::Coordinator(_)), digest) => {
                let name =
                    digest.map_or_else(|| format!("layer {}", task.layer_index), |digest| digest.to_string());
                (Arc::new(self.blobs.layer(name, source.size)), None)
            }
            _ => return Err(unusable("its source is in no place that is known, or has no name there")),
        };
        Ok(Layer {
            index: 0,
            blob,
            descriptor,
            format: convert::format(source.compression()).unwrap_or(Format::None),
            diff_id: self::digest(&source.diff_id)?,
            origin,
            keep_stored: source.keep_stored,
            known_by_diff_id_alone: source.known_by_diff_id_alone,
        })
    }

    fn output(&self, task: &v1::Task, uploads: &Uploads) -> Result<Arc<dyn ImageOutput>, Failure> {
        use task_destination::Content;
        let destination = task.destination.as_ref().ok_or_else(|| unusable("it has no destination"))?;
        let form = layer_form(destination.form(), &destination.compression)
            .ok_or_else(|| unusable("its destination's form is not known"))?;
        match (&destination.content, form) {
            (Some(Content::Registry(at)), occy_pipeline::output::LayerForm::Stored { compression }) => {
                let (registry, reference) = (self.registry(at), reference(at)?);
                let output = RegistryOutput::new(registry, reference, compression, ManifestFormat::Keep);
                let output = match uploads.log() {
                    Some(log) => output.with_upload_log(log),
                    None => output,
                };
                Ok(Arc::new(output.with_foreign_layers(destination.foreign_layers)))
            }
            (Some(Content::Coordinator(_)), form) => Ok(Arc::new(self.blobs.output(form))),
            _ => Err(unusable("its destination is in no place that is known")),
        }
    }

    fn registry(&self, at: &v1::RegistryRepository) -> &Client {
        if at.ask_for_access {
            // There is one for each account of the task's.
            &self.granted[&at.account]
        } else {
            self.own
        }
    }
}

/// The filters of a task, whose patterns are compiled where that keeps nobody waiting.
async fn chain(task: &v1::Task) -> Result<FilterChain, Failure> {
    let (filters, search) = (task.filters.clone(), task.search.clone());
    let compile = move || {
        let filters = FilterChain::parse(&filters).map_err(Error::from)?;
        let Some(v1::SearchSpec { pattern, regex, script_friendly }) = search else { return Ok(filters) };
        let search = Search::new(&pattern, regex, script_friendly).map_err(|problem| unusable(&problem))?;
        let search: Arc<dyn Filter> = Arc::new(search);
        Ok(FilterChain::new(filters.filters().iter().cloned().chain([search]).collect()))
    };
    match tokio::task::spawn_blocking(compile).await {
        Ok(chain) => chain,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn reference(at: &v1::RegistryRepository) -> Result<Reference, Failure> {
    format!("{}/{}", at.host, at.repository)
        .parse()
        .map_err(|error| Failure::Pipeline(Error::Reference(error)))
}

fn digest(text: &str) -> Result<Option<Digest>, Failure> {
    match text {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|error: occy_pipeline::digest::InvalidDigest| unusable(&error.to_string())),
    }
}

fn unusable(problem: &str) -> Failure {
    Failure::Unusable(problem.to_owned())
}

fn done(written: WrittenLayer, reused: bool) -> TaskDone {
    let done = TaskDone {
        diff_id: written.diff_id.as_ref().map(Digest::to_string).unwrap_or_default(),
        changed: written.edited,
        reused,
        ..TaskDone::default()
    };
    match written.stored {
        StoredLayer::Original => TaskDone { original: true, ..done },
        StoredLayer::Written { digest, size, format } => {
            let compression = convert::compression(format).into();
            TaskDone { digest: digest.to_string(), size, compression, ..done }
        }
    }
}

/// An error as the coordinator is told of it. Its own words for what happened to its bytes are better than ours.
fn error(failure: &Failure) -> TaskError {
    let error = match failure {
        Failure::Pipeline(error) => error,
        Failure::Unusable(_) => {
            return TaskError {
                fault: TaskFault::Worker.into(),
                message: failure.to_string(),
                ..TaskError::default()
            };
        }
    };
    let Verdict { code, reason, retryable } = Verdict::of(error);
    let registry = verdict::registry(error);
    TaskError {
        fault: match error.blame() {
            Blame::Machine => TaskFault::Worker,
            Blame::Caller | Blame::Image | Blame::Network => TaskFault::Task,
        }
        .into(),
        code: code.into(),
        reason: reason.into_owned(),
        message: error.to_string(),
        hint: error.hint().unwrap_or_default(),
        retryable,
        registry: registry
            .and_then(|error| error.request())
            .map(|request| request.host.clone())
            .unwrap_or_default(),
        http_status: registry.and_then(|error| error.status()).map(u32::from).unwrap_or_default(),
    }
}
