//! What a source is, whole: one image, or, where all of it is wanted, the index that it turns out to be.

use std::sync::Arc;

use crate::copy::SignaturePolicy;
use crate::error::Error;
use crate::executor::Executor;
use crate::index::{Attestations, DoneIndex, IndexPlan, process_index};
use crate::named::{Attached, Beside, process_named};
use crate::output::ImageOutput;
use crate::process::Outcome;
use crate::progress::Progress;
use crate::source::ImageSource;
use crate::source::stored::SourceIndex;
use crate::task::LayerPlan;

/// What is wanted besides the image itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// An index as a whole, where the source is one.
    pub all: bool,
    /// What becomes of attestations in it.
    pub attestations: Attestations,
    /// What becomes of signatures. None: in an index they are not to be broken; of an image they stay where they are.
    pub signatures: Option<SignaturePolicy>,
    /// A statement of how it was made.
    pub provenance: bool,
}

impl Wanted {
    /// What is wanted beside an image by itself.
    pub fn beside(self) -> Beside {
        let signatures = self.signatures.unwrap_or(SignaturePolicy::Drop);
        Beside { signatures, provenance: self.provenance, referrers: false }
    }
}

/// What came of it.
#[derive(Debug)]
pub enum Done {
    /// One image, with what was put beside it.
    Image(Box<Outcome>, Attached),
    /// All of an index.
    Index(Box<SourceIndex>, Box<DoneIndex>),
}

impl Done {
    /// The images that have passed the filters.
    pub fn filtered(&self) -> impl Iterator<Item = &Outcome> {
        let (one, all) = match self {
            Self::Image(outcome, _) => (Some(outcome.as_ref()), &[][..]),
            Self::Index(_, done) => (None, &done.images[..]),
        };
        one.into_iter().chain(all.iter().filter(|image| image.is_filtered).map(|image| &image.outcome))
    }
}

/// Processes a source. `begin` is called before each image, for a display of its progress.
///
/// Whether the source is an index is asked only where that matters.
pub async fn process_whole(
    source: &dyn ImageSource,
    layers: Arc<LayerPlan>,
    output: Arc<dyn ImageOutput>,
    executor: Arc<dyn Executor>,
    wanted: Wanted,
    begin: Arc<dyn Fn() -> Progress + Send + Sync>,
) -> Result<Done, Error> {
    let Wanted { all, attestations, signatures, .. } = wanted;
    let index = if all { source.index().await? } else { None };
    let Some(index) = index else {
        let beside = wanted.beside();
        let (outcome, attached) = process_named(source, layers, output, executor, beside, &begin()).await?;
        return Ok(Done::Image(Box::new(outcome), attached));
    };
    let beside = Beside { signatures: signatures.unwrap_or(SignaturePolicy::Refuse), ..wanted.beside() };
    let begin = Arc::new(move |_: &_| begin());
    let plan = IndexPlan { layers, platforms: Vec::new(), attestations, beside, executor, begin };
    let done = process_index(source, &index, &plan, output.as_ref()).await?;
    Ok(Done::Index(Box::new(index), Box::new(done)))
}
