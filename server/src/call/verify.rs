//! Images that are made again as the statements beside them say, by workers, and compared here.

use std::sync::Arc;

use occy_pipeline::error::Error;
use occy_pipeline::open;
use occy_pipeline::output::LayerForm;
use occy_pipeline::progress::ImagesProgress;
use occy_pipeline::source::ImageSource;
use occy_pipeline::source::oci_layout::LayoutSource;
use occy_pipeline::source::stored::Store;
use occy_pipeline::verify::{Stated, statements, verify as verify_one};
use occy_pipeline::wire::convert;
use occy_pipeline::wire::lend::LAYERS;
use occy_proto::v1::PipelineSpec;
use occy_proto::v1::verify_image_response::Part;
use tokio::sync::mpsc;

use super::CallWatcher;
use super::progress::{self, Workers};
use crate::admit::{Ends, Gate, Work};
use crate::credentials::Logins;
use crate::error::ServiceError;
use crate::executor::FleetExecutor;
use crate::fleet::Fleet;

/// An image that is to be verified.
pub struct Verifying {
    /// The image, whose layers pass no filter.
    pub image: Work,
    /// Where its source is. Empty: where its statements say, or lent.
    pub source: String,
    /// Whether the caller lends its source.
    pub is_source_lent: bool,
    /// What looks at the sources that statements name.
    pub gate: Arc<Gate>,
    /// What registries are logged in to with.
    pub logins: Logins,
}

impl Verifying {
    /// What a statement says that was done: as any request of a client, for anybody can have written it.
    async fn work(&self, stated: &Stated) -> Result<Work, ServiceError> {
        let recipe = &stated.provenance.recipe;
        let source = match (self.source.as_str(), &recipe.source) {
            _ if self.is_source_lent => String::new(),
            ("", Some(named)) => format!("registry://{}", named.name()),
            ("", None) => {
                let problem =
                    "its provenance does not say where its source is: name it with --source".to_owned();
                return Err(ServiceError::Field { field: "source", problem });
            }
            (source, _) => source.to_owned(),
        };
        let spec = PipelineSpec {
            source,
            filters: recipe.filters.clone(),
            max_layer_size: self.image.plan.max_layer_size,
            ..PipelineSpec::default()
        };
        let tenant = &self.image.client.tenant;
        let ends = match self.is_source_lent {
            true => Ends::NotLent { source: true, destination: true },
            false => Ends::SourceNamed,
        };
        let admitted = self.gate.admit(&spec, ends, tenant, &self.logins).await;
        admitted.map_err(|error| match error {
            // The statement's, and not the request's.
            ServiceError::Field { field: "filters", .. } | ServiceError::Pipeline(Error::Filter(_)) => {
                Error::Provenance { digest: stated.digest.clone(), problem: error.to_string() }.into()
            }
            error => error,
        })
    }
}

/// Verifies an image, and sends what came of each statement.
pub async fn verify(
    verifying: Verifying,
    fleet: &Fleet,
    answers: mpsc::Sender<Part>,
) -> Result<(), ServiceError> {
    let Work { source: name, settings, .. } = &verifying.image;
    let (store, image) = (open::store(name, settings)?, open::source(name, settings)?.end);
    verify_opened(verifying, (store.as_ref(), image.as_ref()), None, fleet, answers).await
}

/// The same of an image that is open, and maybe its source.
pub(super) async fn verify_opened(
    verifying: Verifying,
    (store, image): (&dyn Store, &dyn ImageSource),
    lent: Option<LayoutSource>,
    fleet: &Fleet,
    answers: mpsc::Sender<Part>,
) -> Result<(), ServiceError> {
    let Work { settings, plan, .. } = &verifying.image;
    let stated = statements(store).await?;
    let (progress, workers) = (ImagesProgress::default(), Workers::default());
    let work = async {
        for stated in &stated {
            let work = verifying.work(stated).await?;
            let (origin, max_workers) = match &lent {
                Some(lent) => {
                    let at_once = settings.parallel.min(LAYERS);
                    (Box::new(lent.clone()) as Box<dyn ImageSource>, Some(at_once))
                }
                None => {
                    let source = open::source(&work.source, &work.settings)?;
                    (source.end, source.max_workers)
                }
            };
            let form = LayerForm::Stored { compression: stated.provenance.recipe.compression };
            let queue = fleet.queue(&work.standing(), &work.needs(form), false).of(work.origin());
            let watcher = CallWatcher { workers: workers.clone(), to_caller: None };
            let at_once = max_workers.unwrap_or(settings.parallel);
            let executor = FleetExecutor::new(queue, at_once, Arc::new(watcher));
            let begin = progress::begin_each(&progress, &workers);
            let verified = verify_one(stated, image, origin.as_ref(), plan, executor, begin).await?;
            let part = Part::Statement(convert::verified_statement(stated, verified));
            answers.send(part).await.map_err(|_| ServiceError::CallerGone)?;
        }
        Ok::<_, ServiceError>(())
    };
    let telling = progress::tell(&progress, &workers, |told| answers.try_send(Part::Progress(told)).is_ok());
    tokio::select! {
        done = work => done?,
        never = telling => match never {},
    }
    let result = Part::Result(convert::verify_result(&stated));
    answers.send(result).await.map_err(|_| ServiceError::CallerGone)
}
