//! Images that are made again as the statements beside them say, by workers, and compared here.

use std::sync::Arc;

use occy_pipeline::error::Error;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::open;
use occy_pipeline::output::LayerForm;
use occy_pipeline::progress::ImagesProgress;
use occy_pipeline::verify::{Stated, statements, verify as verify_one};
use occy_pipeline::wire::convert;
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
    /// Where its source is. Empty: where its statements say.
    pub source: String,
    /// What looks at the sources that statements name.
    pub gate: Arc<Gate>,
    /// What registries are logged in to with.
    pub logins: Logins,
}

impl Verifying {
    /// What a statement says that was done: as any request of a client, for anybody can have written it.
    async fn work(&self, stated: &Stated) -> Result<Work, ServiceError> {
        let recipe = &stated.provenance.recipe;
        if let Err(error) = FilterChain::parse(&recipe.filters) {
            let (digest, problem) = (stated.digest.clone(), error.to_string());
            return Err(Error::Provenance { digest, problem }.into());
        }
        let source = match (self.source.as_str(), &recipe.source) {
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
        self.gate.admit(&spec, Ends::SourceNamed, tenant, &self.logins).await
    }
}

/// Verifies an image, and sends what came of each statement.
pub async fn verify(
    verifying: Verifying,
    fleet: &Fleet,
    answers: mpsc::Sender<Part>,
) -> Result<(), ServiceError> {
    let Work { source: name, settings, plan, .. } = &verifying.image;
    let stated = statements(open::store(name, settings)?.as_ref()).await?;
    let image = open::source(name, settings)?.end;
    let (progress, workers) = (ImagesProgress::default(), Workers::default());
    let work = async {
        for stated in &stated {
            let work = verifying.work(stated).await?;
            let source = open::source(&work.source, &work.settings)?;
            let form = LayerForm::Stored { compression: stated.provenance.recipe.compression };
            let queue = fleet.queue(&work.standing(), &work.needs(form), false).of(work.origin());
            let watcher = CallWatcher { workers: workers.clone(), to_caller: None };
            let at_once = source.max_workers.unwrap_or(settings.parallel);
            let executor = FleetExecutor::new(queue, at_once, Arc::new(watcher));
            let (origin, begin) = (source.end.as_ref(), progress::begin_each(&progress, &workers));
            let verified = verify_one(stated, image.as_ref(), origin, plan, executor, begin).await?;
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
