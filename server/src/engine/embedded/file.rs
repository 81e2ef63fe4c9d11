//! The file of the store: redb's, which is opened anew after its disk has failed.
//!
//! redb refuses everything from an error of the disk on, reads too, until the file is closed and opened again; then it has what was
//! committed. A disk that was full for a moment must not be the end of a coordinator: whoever meets the error closes the file, and
//! who comes next opens it. What is in it is known to `embedded` alone.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use redb::{Database, Error};

/// Why the store could not be used.
#[derive(Debug, thiserror::Error)]
#[error("failed to {what} the store of jobs: {cause}")]
pub struct StoreError {
    what: &'static str,
    cause: Box<Error>,
}

impl StoreError {
    /// Whether there is no room on the disk.
    pub fn is_full(&self) -> bool {
        let Error::Io(error) = &*self.cause else { return false };
        matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
    }

    /// Whether the disk had failed before, under somebody else.
    pub fn is_of_another(&self) -> bool {
        matches!(*self.cause, Error::PreviousIo)
    }

    fn is_of_disk(&self) -> bool {
        matches!(*self.cause, Error::Io(_) | Error::PreviousIo)
    }
}

/// What is done with an error of redb's.
pub(super) trait During<T> {
    fn during(self, what: &'static str) -> Result<T, StoreError>;
}

impl<T, E: Into<Error>> During<T> for Result<T, E> {
    fn during(self, what: &'static str) -> Result<T, StoreError> {
        self.map_err(|error| StoreError { what, cause: Box::new(error.into()) })
    }
}

/// The file.
#[derive(Debug)]
pub(super) struct StoreFile {
    path: PathBuf,
    /// None from an error of the disk on, until somebody needs it.
    database: RwLock<Option<Database>>,
}

impl StoreFile {
    /// Opens the file, or makes it. Blocks.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).during("open")?;
        Ok(Self { path: path.to_owned(), database: RwLock::new(Some(database)) })
    }

    /// Works with it. Blocks.
    pub(super) fn using<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let result = loop {
            let opened = self.opened();
            if let Some(database) = &*opened {
                break work(database);
            }
            drop(opened);
            self.open_anew()?;
        };
        if result.as_ref().is_err_and(StoreError::is_of_disk) {
            // Nobody is in the middle of anything: that holds the lock. One that was opened anew meanwhile is opened once more.
            *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        result
    }

    fn open_anew(&self) -> Result<(), StoreError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        if database.is_none() {
            *database = Some(Database::open(&self.path).during("open")?);
            tracing::warn!("the store of jobs was opened anew, after its disk had failed");
        }
        Ok(())
    }

    fn opened(&self) -> RwLockReadGuard<'_, Option<Database>> {
        self.database.read().unwrap_or_else(PoisonError::into_inner)
    }
}
