//! One layer through all filters in one pass: read, filter, write, hash.
//!
//! ```text
//! input -> Walker -> filter -> filter -> ... -> output
//!            |          \________\______________ Stream: a tap, and its digest
//!            \__________________________________ digest of every input byte
//! ```
//!
//! Members that no filter edited are copied raw; see [`tar::encode`](crate::tar::encode) for the others. Each byte is
//! hashed once as long as output and input are equal, and once more in each stream that differs.
//!
//! All of this computes without waiting: it belongs on a blocking thread.

mod error;
mod fuzz;
mod keep;
mod run;
mod stream;

use std::io::{BufRead, Write};

pub use error::LayerError;
pub use fuzz::fuzz_layer;
pub use keep::Keep;

use self::run::Run;
use crate::blob::BlobSummary;
use crate::digest::Digest;
use crate::filter::{FilterChain, Report, Targets};
use crate::spool::SpoolDir;
use crate::tar::{Limits, Member, Walker};

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is written; filters report, and all digests are computed.
    Observe,
    /// Nothing is written; the pass stops at the first member that a filter edits or drops.
    Scan,
    /// Everything is written, edited or not.
    Rewrite,
    /// Everything is written as it is and hashed; neither the tar nor the filters are looked at.
    Copy,
}

/// How a pass over a layer ended.
#[derive(Debug)]
pub enum PassOutcome {
    /// All of it has passed.
    Done(LayerResult),
    /// [`Mode::Scan`] met the first edit.
    NeedsRewrite {
        /// Of the member that is edited or dropped, in the tar.
        offset: u64,
    },
    /// What was written is void: begin again with this plan.
    NeedsRestart(Plan),
}

/// What a complete pass found.
#[derive(Clone, Debug)]
pub struct LayerResult {
    /// diff_id and size of the tar that was read.
    pub input: BlobSummary,
    /// diff_id and size of the tar that was, or would be, written. Equal to the input's where nothing was edited.
    pub output: BlobSummary,
    /// Whether any filter edited or dropped a member.
    pub edited: bool,
    /// Members of the input, global headers included.
    pub members: u64,
    /// What each filter of the chain found, in its order.
    pub reports: Vec<Option<Report>>,
}

impl LayerResult {
    /// Of a tar that was passed on as it is, with no filter to look at it.
    pub(crate) fn untouched(tar: BlobSummary) -> Self {
        Self { input: tar.clone(), output: tar, edited: false, members: 0, reports: Vec::new() }
    }
}

/// What a pass must know from earlier ones over the same layer: for each filter, the members to keep aside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan(Vec<Targets>);

impl Plan {
    /// How often a pass may begin again: each time, the filters up to one more have settled.
    pub fn most_restarts(chain: &FilterChain) -> usize {
        chain.filters().len() + 1
    }

    fn targets(&self, filter: usize) -> Targets {
        self.0.get(filter).cloned().unwrap_or_default()
    }
}

/// One pass over one layer.
#[derive(Debug)]
pub struct LayerPass<'a> {
    chain: &'a FilterChain,
    mode: Mode,
    limits: &'a Limits,
    spools: &'a SpoolDir,
    plan: Plan,
    known: Option<Digest>,
}

impl<'a> LayerPass<'a> {
    /// Prepares a pass. `spools` is for the temporary file that [`exclude`](crate::filter::exclude) may need.
    pub fn new(chain: &'a FilterChain, mode: Mode, limits: &'a Limits, spools: &'a SpoolDir) -> Self {
        Self { chain, mode, limits, spools, plan: Plan::default(), known: None }
    }

    /// Takes the tar's digest to be this one and hashes nothing, if none of the filters needs a digest that is not the tar's.
    #[must_use]
    pub fn with_known(self, diff_id: Option<Digest>) -> Self {
        let needs = self.chain.filters().iter().any(|filter| filter.edits() || filter.taps());
        Self { known: diff_id.filter(|_| !needs), ..self }
    }

    /// Begins again with what an earlier pass found to be needed.
    #[must_use]
    pub fn with_plan(self, plan: Plan) -> Self {
        Self { plan, ..self }
    }

    /// Reads the whole layer, uncompressed, and writes it to `out` if the mode says so.
    ///
    /// What was written before an error, [`PassOutcome::NeedsRewrite`] or [`PassOutcome::NeedsRestart`] is void.
    pub fn run(self, input: impl BufRead, out: &mut dyn Write) -> Result<PassOutcome, LayerError> {
        if self.mode == Mode::Copy {
            return run::copy(Walker::opaque(input), out, self.chain.filters().len());
        }
        let mut walker = match &self.known {
            None => Walker::new(input, self.limits.clone()),
            Some(_) => Walker::unhashed(input, self.limits.clone()),
        };
        let mut member = Member::default();
        let mut run = Run::new(&self, out);
        match run.drive(&mut walker, &mut member) {
            Ok(None) => run.finish(walker, self.known.clone()),
            Ok(Some(outcome)) => Ok(outcome),
            Err(LayerError::Tar { source, .. }) => {
                Err(LayerError::Tar { member: walker.members(), path: run::name(&member), source })
            }
            Err(error) => Err(error),
        }
    }
}
