//! Many images of many repositories, kept at other registries as they are.
//!
//! [`config`] is what the user wants. A [`Survey`] asks registries what there is: lists of repositories and tags, one HEAD for each
//! tag at the source and at each target, and of what differs the manifests, and which of its blobs the targets have. A [`Plan`] is
//! made of that, and of nothing else: what is done to each tag, and its price. [`Survey::run`] does it, image by image as
//! [`crate::copy`] copies one; [`blobs`] sees to it that no blob is fetched twice.
//!
//! Nothing is kept between runs: the registries say all that there is to know.

mod blobs;
pub mod config;
mod image;
pub mod import;
mod lists;
mod plan;
mod range;
mod run;
mod select;
mod survey;
mod template;

use crate::registry::Client;
use crate::spool::SpoolDir;

pub use self::plan::{Action, Plan, Price, What};
pub use self::run::{Outcome, Report};
pub use self::survey::{Detail, Survey};

/// Requests for documents that are under way at once.
const ASKED_AT_ONCE: usize = 8;

/// How registries are spoken to.
#[derive(Clone, Debug)]
pub struct Ends {
    /// Where images come from.
    pub source: Client,
    /// Where they go.
    pub target: Client,
    /// Where a blob waits that several registries want.
    pub spools: SpoolDir,
    /// Blobs at once, in the whole mirror.
    pub parallel: usize,
}
