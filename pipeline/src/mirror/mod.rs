//! Many images of many repositories, kept at other registries as they are.
//!
//! [`config`] is what the user wants. A [`Survey`] asks registries what there is: lists of repositories and tags, one HEAD for each
//! tag at the source and at each target, and of what differs the manifests, and which of its blobs the targets have. A [`Plan`] is
//! made of that, and of nothing else: what is done to each tag, and its price. [`Survey::run`] does it, image by image as
//! [`crate::copy`] copies one; [`blobs`] sees to it that no blob is fetched twice.
//!
//! Nothing is kept between runs: the registries say all that there is to know.
//!
//! Where no way leads from source to target, [`save()`] makes a layout of what is wanted, and the same configuration makes a mirror of
//! it where it is carried ([`Origin::Carried`]); [`Have`] is the list of what need not be carried.

mod blobs;
pub mod config;
mod filtered;
mod have;
mod image;
pub mod import;
mod lists;
mod origin;
mod parts;
mod plan;
mod progress;
mod range;
mod run;
mod save;
pub mod schedule;
mod select;
mod survey;
mod template;

use std::sync::Arc;

use crate::error::Error;
use crate::executor::Executor;
use crate::reference::Reference;
use crate::registry::Client;
use crate::spool::SpoolDir;

pub use self::have::{Have, HaveError};
pub use self::origin::{Carried, Origin};
pub use self::plan::{Action, Plan, Price, What};
pub use self::progress::{Counts, MirrorProgress};
pub use self::run::{Outcome, Report};
pub use self::save::{Destination, save};
pub use self::survey::{Detail, Survey};

/// Requests for documents that are under way at once.
const ASKED_AT_ONCE: usize = 8;

/// How registries are spoken to.
#[derive(Clone, Debug)]
pub struct Ends {
    /// Where images come from.
    pub source: Origin,
    /// Where they go.
    pub target: Client,
    /// What targets have, and need not be asked for.
    pub have: Have,
    /// Where a blob waits that several registries want.
    pub spools: SpoolDir,
    /// Blobs at once, in the whole mirror.
    pub parallel: usize,
    /// Who runs the layers that pass filters. None: this process.
    pub executor: Option<Arc<dyn Executor>>,
    /// None of these may be larger uncompressed, in bytes.
    pub max_layer_size: u64,
    /// Who is asked before a target's tag is changed. None: nobody.
    pub locks: Option<Arc<dyn TagLocks>>,
    /// How far the mirror is, of which there is one for these ends.
    pub progress: MirrorProgress,
}

/// Sees to it that one at a time changes a tag, where others may be about to.
#[async_trait::async_trait]
pub trait TagLocks: std::fmt::Debug + Send + Sync {
    /// Waits for the tag's turn, and fails if nothing may be changed any more. Whoever has it already may ask again.
    async fn lock(&self, tag: &Reference) -> Result<(), Error>;

    /// Lets others have it.
    async fn unlock(&self, tag: &Reference);
}

/// Changes a tag of a target, when it may be.
async fn locked<T>(
    locks: Option<&Arc<dyn TagLocks>>,
    tag: &Reference,
    change: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(locks) = locks else { return change.await };
    locks.lock(tag).await?;
    let changed = change.await;
    locks.unlock(tag).await;
    changed
}
