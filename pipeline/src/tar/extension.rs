//! The extension headers before a member: PAX records, GNU long names, and global headers, which stand for themselves.

use super::header;
use super::member::{Content, Edits, Member};
use super::pax::{GLOBAL_RECORDS, MIRRORS};
use super::{Kind, Records, TarError};

const OVERLONG_RECORDS: &str = "PAX records that are longer than their size";

/// The extension headers before one member, as far as they were read.
pub(super) struct Extensions {
    pub(super) offset: u64,
    pub(super) records: bool,
    /// Solaris' `X` rather than `x`.
    pub(super) solaris: bool,
    pub(super) long_path: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
}

impl Extensions {
    /// Begins a member at an offset.
    pub(super) fn new(offset: u64, member: &mut Member) -> Self {
        member.offset = offset;
        member.records.clear();
        member.content = Content::Stored;
        member.edits = Edits::default();
        member.sparse = None;
        member.mtime_is_global = false;
        Self { offset, records: false, solaris: false, long_path: None, long_link: None }
    }

    /// Takes an extension header's payload, behind which `rest` pads its last block.
    ///
    /// One of a kind is all that any writer makes. Of two, Go takes the last and Python the first. Python also reads on to
    /// the end of the last block.
    pub(super) fn add(
        &mut self,
        flag: u8,
        payload: &[u8],
        rest: &[u8],
        offset: u64,
        member: &mut Member,
    ) -> Result<(), TarError> {
        let ambiguous = |what| Err(TarError::Ambiguous { offset, what });
        let overlong = rest.first().is_some_and(|&byte| byte != 0);
        const TWICE: &str = "two extension headers of one kind before one member";
        if matches!(flag, b'x' | b'X') {
            if self.records {
                return ambiguous(TWICE);
            }
            if overlong {
                return ambiguous(OVERLONG_RECORDS);
            }
            self.records = true;
            self.solaris = flag == b'X';
            return member.records.parse(payload).map_err(|problem| TarError::Records { offset, problem });
        }
        let name = if flag == b'L' { &mut self.long_path } else { &mut self.long_link };
        if name.is_some() {
            return ambiguous(TWICE);
        }
        let text = header::text(payload);
        if text.is_empty() {
            return ambiguous("an empty GNU long name");
        }
        if text.len() == payload.len() && overlong {
            return ambiguous("a GNU long name that is longer than its size");
        }
        *name = Some(text.to_owned());
        Ok(())
    }

    /// The member is a global header.
    pub(super) fn global(
        &self,
        payload: &[u8],
        rest: &[u8],
        offset: u64,
        globals: &mut Records,
        member: &mut Member,
    ) -> Result<(), TarError> {
        if self.records || self.long_path.is_some() || self.long_link.is_some() {
            let what = "a global header behind an extension header";
            return Err(TarError::Ambiguous { offset, what });
        }
        if rest.first().is_some_and(|&byte| byte != 0) {
            return Err(TarError::Ambiguous { offset, what: OVERLONG_RECORDS });
        }
        member.records.parse(payload).map_err(|problem| TarError::Records { offset, problem })?;
        for (key, value) in member.records.iter() {
            // Go ignores global records, GNU tar and Python apply them: that must not move or rename what follows.
            if matches!(key, b"path" | b"linkpath" | b"size") || key.starts_with(b"GNU.sparse.") {
                return Err(self.ambiguous("a global header with a name or size"));
            }
            if value.is_empty() && MIRRORS.contains(&key) {
                return Err(self.ambiguous("an empty PAX record for a field"));
            }
        }
        if !globals.merge(&member.records) {
            return Err(TarError::Limit { offset, limit: GLOBAL_RECORDS as u64, unit: "global records" });
        }
        member.kind = Kind::Global;
        member.flag = b'g';
        member.plain = false;
        member.stored = 0;
        member.size = 0;
        member.path.clear();
        member.link.clear();
        Ok(())
    }

    pub(super) fn ambiguous(&self, what: &'static str) -> TarError {
        TarError::Ambiguous { offset: self.offset, what }
    }
}
