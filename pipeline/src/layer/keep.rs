//! Data of members that were dropped but are needed later in the same layer.

use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use crate::spool::{self, SpoolDir};
use crate::tar::{Content, Member};

/// Held in memory before a file is made.
const MEMORY: usize = 1024 * 1024;

/// Where a filter asks for a member's data to be kept aside.
#[derive(Debug, Default)]
pub struct Keep {
    length: u64,
    asked: bool,
}

impl Keep {
    /// Keeps the data of the member at hand, and says where it will be found.
    pub fn keep(&mut self, member: &Member) -> Content {
        match member.content() {
            kept @ Content::Kept { .. } => kept,
            Content::Stored => {
                self.asked = true;
                Content::Kept { start: self.length, length: member.stored_size() }
            }
        }
    }
}

/// The bytes that are kept aside: a little in memory, more in a file without a name, never more than the limit.
pub(super) struct Spool<'a> {
    spools: &'a SpoolDir,
    limit: u64,
    keep: Keep,
    memory: Vec<u8>,
    file: Option<spool::Spool>,
}

impl<'a> Spool<'a> {
    pub(super) fn new(spools: &'a SpoolDir, limit: u64) -> Self {
        Self { spools, limit, keep: Keep::default(), memory: Vec::new(), file: None }
    }

    pub(super) fn keep(&mut self) -> &mut Keep {
        &mut self.keep
    }

    /// Whether the data of the member at hand is to be kept.
    pub(super) fn take_request(&mut self) -> bool {
        std::mem::take(&mut self.keep.asked)
    }

    /// Whether so many more bytes are within the limit.
    pub(super) fn allows(&self, bytes: u64) -> bool {
        self.keep.length.saturating_add(bytes) <= self.limit
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() && self.memory.len() + bytes.len() > MEMORY {
            let mut file = self.spools.create()?;
            file.write_all(&self.memory)?;
            self.memory = Vec::new();
            self.file = Some(file);
        }
        match &mut self.file {
            Some(file) => file.write_all(bytes)?,
            None => self.memory.extend_from_slice(bytes),
        }
        self.keep.length += bytes.len() as u64;
        Ok(())
    }

    /// Fills `buffer` from a place where bytes were appended.
    pub(super) fn read(&self, start: u64, buffer: &mut [u8]) -> io::Result<()> {
        match &self.file {
            Some(file) => file.file().read_exact_at(buffer, start),
            None => {
                let range = usize::try_from(start)
                    .ok()
                    .and_then(|start| self.memory.get(start..start + buffer.len()));
                buffer.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_counts_with_all_other_temporary_files() {
        let dir = tempfile::tempdir().unwrap();
        let spools = SpoolDir::new(dir.path(), 2 << 20);
        let mut other = spools.create().unwrap();
        other.write_all(&vec![0; 1 << 20]).unwrap();
        let mut kept = Spool::new(&spools, u64::MAX);
        kept.append(&vec![1; 1 << 20]).unwrap();
        let error = kept.append(&[2]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        drop(other);
        kept.append(&[2]).unwrap();
        let mut last = [0; 2];
        kept.read((1 << 20) - 1, &mut last).unwrap();
        assert_eq!(last, [1, 2]);
    }
}
