//! What a display may ask while a mirror is made. Nothing here prints.

use std::sync::{Arc, Mutex, PoisonError};

use super::plan::Price;
use super::run::Outcome;

/// How far a mirror is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Images at targets, those to be deleted too. 0 until it is known which there are.
    pub images: u64,
    /// Of these, how many are as they are wanted.
    pub done: u64,
    /// How many are not, and will not be.
    pub failed: u64,
    /// Blobs that came from sources, passed filters, are whole at targets, for which they went there, or were mounted. A blob that came
    /// is counted once, although one that passes filters is read twice where it has to move: for these to look, and to be moved.
    pub moved: Price,
}

/// The same, as it changes. Clones are handles on the same one.
#[derive(Clone, Debug, Default)]
pub struct MirrorProgress(Arc<Mutex<Counts>>);

impl MirrorProgress {
    /// How far it is now.
    pub fn get(&self) -> Counts {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how far it is, where another process makes the mirror.
    pub fn set(&self, counts: Counts) {
        self.change(|now| *now = counts);
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Counts a blob of so many bytes that came from a source.
    pub(super) fn fetched(&self, size: u64) {
        self.change(|counts| counts.moved.fetch(size));
    }

    /// Counts one that has passed filters.
    pub(super) fn filtered(&self, size: u64) {
        self.change(|counts| counts.moved.filter(size));
    }

    /// Counts one that went to a target.
    pub(super) fn uploaded(&self, size: u64) {
        self.change(|counts| counts.moved.upload(size));
    }

    /// Counts one that a target has mounted.
    pub(super) fn mounted(&self, size: u64) {
        self.change(|counts| counts.moved.mount(size));
    }

    /// Counts an image of which this came.
    pub(super) fn take(&self, outcome: &Outcome) {
        self.change(|counts| if outcome.is_failure() { counts.failed += 1 } else { counts.done += 1 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_a_rule_forbids_is_not_done() {
        let progress = MirrorProgress::default();
        let failed = Outcome::Failed { problem: "it is gone".to_owned(), hint: None };
        for outcome in [Outcome::Nothing, Outcome::Deleted, Outcome::Refused("a rule".to_owned()), failed] {
            progress.take(&outcome);
        }
        assert_eq!((progress.get().done, progress.get().failed), (2, 2));
    }
}
