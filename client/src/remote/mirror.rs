//! A mirror that a coordinator makes: submitted as a job, and told of as one that is made here.

use std::collections::BTreeMap;
use std::time::Duration;

use occy_pipeline::mirror::config::Config;
use occy_pipeline::mirror::{Plan, Report};
use occy_pipeline::wire::{self, WireError, convert};
use occy_proto::v1::{
    ImageResult, MirrorImage, MirrorImages, MirrorOutcome, MirrorResult, MirrorSpec, SubmitMirrorRequest,
};

use super::connect::Coordinator;
use super::logins::logins_of_mirror;
use super::spec;
use super::watch::Watch;
use crate::options::{Global, Mirror, OutputFormat};
use crate::settings::Misused;
use crate::{Exit, say};

/// Has the coordinator make a mirror of what a file says, and watches it to its end.
pub(crate) async fn mirror(
    text: String,
    config: &Config,
    options: &Mirror,
    global: &Global,
) -> anyhow::Result<Exit> {
    let here = [("from", &options.from), ("to", &options.to)].map(|(name, given)| (name, given.is_some()));
    if let Some((name, _)) =
        here.into_iter().chain([("have", options.have.is_some())]).find(|(_, given)| *given)
    {
        let problem =
            format!("--{name} cannot be had with --coordinator: images are carried by this process only");
        return Err(Misused(problem).into());
    }
    spec::refuse_registry_options(global, &["registry://"])?;
    let mut coordinator = Coordinator::needed(global, "mirror").await?;
    let credentials = logins_of_mirror(global, &coordinator, config).await?;
    let spec = MirrorSpec {
        config: text,
        parallel: convert::count(global.parallel),
        dry_run: options.dry_run,
        // The text has a number for them.
        tell_unchanged: global.output_format == OutputFormat::Json,
    };
    let idempotency_key = options.idempotency_key.clone().unwrap_or_default();
    let request = SubmitMirrorRequest { spec: Some(spec), idempotency_key, credentials };
    let answered = coordinator.client.submit_mirror(request).await;
    let job = answered.map_err(|status| coordinator.error(status))?.into_inner().job.unwrap_or_default();
    if !global.quiet {
        say(&format!("Submitted job {}", job.id));
    }
    Watch::new(&coordinator, &job.id, 0, global).for_report().run().await
}

/// What is told of a mirror's images, by source and target.
#[derive(Default)]
pub(crate) struct Images(BTreeMap<(String, String), MirrorImage>);

impl Images {
    /// The mirror is begun, or begun again: what was not done is told of anew.
    pub(crate) fn begin(&mut self) {
        self.0.retain(|_, image| is_done(image));
    }

    pub(crate) fn take(&mut self, told: MirrorImages) {
        for image in told.images {
            let key = (image.source.clone(), image.target.clone());
            let is_known = self.0.get(&key).is_some_and(is_done);
            // By an earlier attempt of the same mirror: what it did is not undone by finding it done.
            if !(is_known && image.outcome() == MirrorOutcome::Unchanged) {
                self.0.insert(key, image);
            }
        }
    }

    /// The plan that they were, and what came of it.
    pub(crate) fn report(
        self,
        result: &ImageResult,
        mirror: &MirrorResult,
    ) -> Result<(Plan, Report), WireError> {
        let mut images: Vec<_> = self.0.into_values().collect();
        images.sort_by_key(|image| image.index);
        let images = images.into_iter().map(wire::mirror::of_image).collect::<Result<_, _>>()?;
        Ok(wire::mirror::of_result(images, mirror, Duration::from_millis(result.elapsed_millis)))
    }
}

fn is_done(image: &MirrorImage) -> bool {
    matches!(image.outcome(), MirrorOutcome::Copied | MirrorOutcome::Deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(images: &[(&str, MirrorOutcome)]) -> MirrorImages {
        let images = images.iter().map(|(source, outcome)| MirrorImage {
            source: (*source).to_owned(),
            outcome: (*outcome).into(),
            ..MirrorImage::default()
        });
        MirrorImages { images: images.collect() }
    }

    #[test]
    fn what_an_interrupted_attempt_did_counts_and_what_it_could_not_is_told_of_anew() {
        use MirrorOutcome::{Copied, Failed, Unchanged};
        let mut images = Images::default();
        images.begin();
        images.take(told(&[("a", Copied), ("b", Failed), ("c", Failed), ("d", Copied), ("e", Unchanged)]));
        images.begin();
        images.take(told(&[("a", Unchanged), ("b", Copied), ("d", Failed), ("e", Unchanged)]));
        let (_, report) = images.report(&ImageResult::default(), &MirrorResult::default()).unwrap();
        assert_eq!((report.done(), report.failed(), report.outcomes.len()), (2, 1, 4));
    }
}
