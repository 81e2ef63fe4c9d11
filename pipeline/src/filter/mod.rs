//! Filters: what may look at, drop or edit the members of layers, and the times in configs.
//!
//! [`FILTERS`] is the list of all filters. A [`Filter`] is configured once for a job; for each attempt at a layer it makes a
//! fresh [`LayerFilter`], which sees the layer's members in order. A chain of filters costs one pass: see
//! [`layer`](crate::layer). How `-f` spells them is in [`spec`].

mod chain;
pub mod exclude;
mod glob;
pub mod inspect;
pub mod normalize_timestamps;
mod report;
pub mod search;
pub mod spec;

use std::collections::BTreeSet;
use std::fmt;

pub use chain::{ENCODER_VERSION, FilterChain, REWRITER_VERSION};
pub use report::{ImageFindings, LayerFindings, OutputFormat, Rendering, Report, Target};
pub use spec::{FilterKind, Key, SpecError};

use crate::layer::Keep;
use crate::tar::{Limits, Member};

/// All filters, in the order in which help lists them.
pub static FILTERS: &[&FilterKind] =
    &[&normalize_timestamps::KIND, &exclude::KIND, &search::KIND, &inspect::KIND];

/// One filter of a chain, configured.
pub trait Filter: Send + Sync + fmt::Debug {
    /// What was given with `-f`, in canonical form: parsing it gives an equal filter.
    fn spec(&self) -> String;

    /// Whether it may change layers. One that does not leaves an image's bytes and digests as they are.
    fn edits(&self) -> bool;

    /// Whether a layer that it changes has commonly another size then. This is for guesses alone, which may be wrong.
    fn resizes(&self) -> bool {
        self.edits()
    }

    /// Whether it wants to know size and digest of the tar as it would be written where the filter stands.
    fn taps(&self) -> bool {
        false
    }

    /// The file that its results are going to be appended to, which had better be opened before anything else is done.
    fn file(&self) -> Option<&std::path::Path> {
        None
    }

    /// Starts on a layer. `targets` are what an earlier pass over the same layer found to be needed.
    fn layer(&self, targets: &Targets, limits: &Limits) -> Box<dyn LayerFilter>;

    /// Changes the image's config, and says whether it did.
    fn edit_config(&self, config: &mut serde_json::Value) -> bool {
        let _ = config;
        false
    }

    /// What is to be printed or written when all layers are done.
    fn render(&self, image: &ImageFindings<'_>, format: OutputFormat) -> Option<Rendering> {
        let _ = (image, format);
        None
    }
}

/// A filter at work on one layer.
pub trait LayerFilter: Send {
    /// Sees the next member, in the order of the tar, global headers included.
    fn member(&mut self, member: &mut Member, keep: &mut Keep) -> Result<Verdict, FilterError>;

    /// The layer's end was reached.
    fn finish(self: Box<Self>) -> Finish;
}

/// What becomes of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on, as it is now.
    Keep,
    /// It goes no further.
    Drop,
    /// It needs an earlier member that was dropped and not kept aside. The pass cannot succeed; it goes on only to learn
    /// everything that the next one must keep aside.
    Restart,
}

/// Cleaned paths of members that a filter drops but must keep aside.
pub type Targets = BTreeSet<Vec<u8>>;

/// What is left of a [`LayerFilter`].
#[derive(Debug, Default)]
pub struct Finish {
    /// What it found.
    pub report: Option<Report>,
    /// What it must keep aside in the next pass, if there is one: all that it was given, and what it found missing.
    pub targets: Targets,
}

/// Why a filter gave up on a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// It would have to remember or report more than [`Limits::report`].
    #[error("{filter} would need more than {limit} bytes of memory for one layer")]
    Memory {
        /// Its name.
        filter: &'static str,
        /// The limit.
        limit: usize,
    },
    /// It can be named here, and runs elsewhere.
    #[error("this process does not have the filter {filter}")]
    Elsewhere {
        /// Its name.
        filter: String,
    },
}
