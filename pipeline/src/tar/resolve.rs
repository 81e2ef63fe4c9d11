//! From raw headers to the metadata that they mean.

use super::header::{self, Block, Dialect, Numbers};
use super::member::{Content, Edits};
use super::pax::MIRRORS;
use super::sparse::{self, Segment, Sparse};
use super::{Kind, Limits, Member, Records, TarError, Time, number};

/// The extension headers before one member, as far as they were read.
pub(super) struct Extensions {
    offset: u64,
    records: bool,
    /// Solaris' `X` rather than `x`.
    solaris: bool,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
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
    /// One of a kind is all that any writer makes. Of two, Go takes the last and Python the first.
    pub(super) fn add(
        &mut self,
        flag: u8,
        payload: &[u8],
        rest: &[u8],
        offset: u64,
        member: &mut Member,
    ) -> Result<(), TarError> {
        let ambiguous = |what| Err(TarError::Ambiguous { offset, what });
        const TWICE: &str = "two extension headers of one kind before one member";
        if matches!(flag, b'x' | b'X') {
            if self.records {
                return ambiguous(TWICE);
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
        // Python reads on to the end of the block.
        if text.len() == payload.len() && rest.first().is_some_and(|&byte| byte != 0) {
            return ambiguous("a GNU long name that is longer than its size");
        }
        *name = Some(text.to_owned());
        Ok(())
    }

    /// The member is a global header.
    pub(super) fn global(
        &self,
        payload: &[u8],
        offset: u64,
        globals: &mut Records,
        member: &mut Member,
    ) -> Result<(), TarError> {
        if self.records || self.long_path.is_some() || self.long_link.is_some() {
            let what = "a global header behind an extension header";
            return Err(TarError::Ambiguous { offset, what });
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
        globals.merge(&member.records);
        member.kind = Kind::Global;
        member.flag = b'g';
        member.plain = false;
        member.stored = 0;
        member.size = 0;
        member.path.clear();
        member.link.clear();
        Ok(())
    }

    /// The member's own header.
    pub(super) fn resolve(
        &mut self,
        block: &Block,
        numbers: &Numbers,
        globals: &Records,
        member: &mut Member,
        limits: &Limits,
    ) -> Result<(), TarError> {
        let malformed = |field| TarError::Number { offset: self.offset, field };
        let dialect = Dialect::of(block);
        member.block = *block;
        member.dialect = dialect;
        member.plain = !self.records && self.long_path.is_none() && self.long_link.is_none();
        member.flag = block[header::FLAG];
        member.mode = u32::try_from(numbers.mode).map_err(|_| malformed("mode"))?;
        (member.uid, member.gid) = (numbers.uid, numbers.gid);
        (member.major, member.minor) = (numbers.major, numbers.minor);
        member.mtime = Time::from_seconds(numbers.mtime);
        let size = u64::try_from(numbers.size).map_err(|_| malformed("size"))?;
        set(&mut member.link, header::text(&block[header::LINK]));
        let owners = dialect != Dialect::V7;
        set(&mut member.uname, if owners { header::text(&block[header::UNAME]) } else { b"" });
        set(&mut member.gname, if owners { header::text(&block[header::GNAME]) } else { b"" });
        header_path(block, dialect, self.offset, member)?;
        self.apply_names(member)?;
        let size = self.apply_records(globals, member, size)?;
        self.apply_sparse(member, size)?;

        let slash = member.path.ends_with(b"/");
        member.kind = match member.flag {
            // Before POSIX, a trailing slash made a directory. Python looks at the header's name, Go at the resolved one.
            0 if slash || header::text(&block[header::NAME]).ends_with(b"/") => {
                if size > 0 && !(slash && header::text(&block[header::NAME]).ends_with(b"/")) {
                    return Err(self.ambiguous("an old-style directory with a size"));
                }
                Kind::Directory
            }
            0 | b'0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharacterDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        };
        member.stored = if member.kind.has_data() { size } else { 0 };
        if member.sparse.is_none() || !member.kind.has_data() {
            member.size = member.stored;
        }
        if member.sparse.is_some() && member.kind != Kind::Regular {
            return Err(TarError::Sparse { offset: self.offset, what: "only regular files can be sparse" });
        }
        if member.flag != b'S' {
            self.check_sparse(member)?;
        }
        if member.path.len().max(member.link.len()) > limits.path {
            return Err(TarError::Limit {
                offset: self.offset,
                limit: limits.path as u64,
                unit: "bytes of a path",
            });
        }
        Ok(())
    }

    /// Checks a map that is complete.
    pub(super) fn check_sparse(&self, member: &Member) -> Result<(), TarError> {
        match &member.sparse {
            Some(Sparse::InHeaders(segments)) => {
                sparse::validate(segments, member.size, member.stored, self.offset)
            }
            Some(Sparse::InData) | None => Ok(()),
        }
    }

    fn apply_names(&mut self, member: &mut Member) -> Result<(), TarError> {
        for (long, keys, name) in [
            (self.long_path.take(), &[&b"path"[..], b"GNU.sparse.name"][..], &mut member.path),
            (self.long_link.take(), &[b"linkpath"], &mut member.link),
        ] {
            let Some(long) = long else { continue };
            // Go prefers the GNU name, GNU tar the PAX one, Python the one that stands first.
            if keys.iter().any(|key| member.records.get(key).is_some_and(|value| value != long)) {
                return Err(self.ambiguous("a GNU long name and a PAX name that differ"));
            }
            *name = long;
        }
        Ok(())
    }

    /// Applies PAX records and gives the stored size.
    fn apply_records(&self, globals: &Records, member: &mut Member, size: u64) -> Result<u64, TarError> {
        let mut size = size;
        if member.records.is_empty() && globals.is_empty() {
            return Ok(size);
        }
        if let Some(text) = member.records.get(b"size") {
            let value = number::decimal(text)
                .filter(|&value| i64::try_from(value).is_ok())
                .ok_or(TarError::Number { offset: self.offset, field: "PAX size" })?;
            if value != size && (self.solaris || member.flag == b'S') {
                return Err(self.ambiguous("a size that only some readers apply"));
            }
            size = value;
        }
        let own = &member.records;
        // By POSIX an empty value deletes; Go falls back to the header's field, Python reads it as zero or nothing.
        if MIRRORS.iter().any(|key| own.get(key).is_some_and(<[u8]>::is_empty)) {
            return Err(self.ambiguous("an empty PAX record for a field"));
        }
        let find = |key: &[u8]| own.get(key).or_else(|| globals.get(key));
        let malformed = |field| TarError::Number { offset: self.offset, field };
        for (key, name) in [
            (&b"path"[..], &mut member.path),
            (b"linkpath", &mut member.link),
            (b"uname", &mut member.uname),
            (b"gname", &mut member.gname),
        ] {
            if let Some(value) = find(key) {
                set(name, value);
            }
        }
        if let Some(value) = find(b"uid") {
            member.uid = number::signed_decimal(value).ok_or(malformed("PAX uid"))?;
        }
        if let Some(value) = find(b"gid") {
            member.gid = number::signed_decimal(value).ok_or(malformed("PAX gid"))?;
        }
        if let Some(value) = find(b"mtime") {
            member.mtime = Time::parse(value).ok_or(malformed("PAX mtime"))?;
            member.mtime_is_global = own.get(b"mtime").is_none();
        }
        Ok(size)
    }

    fn apply_sparse(&self, member: &mut Member, stored: u64) -> Result<(), TarError> {
        if member.flag == b'S' {
            if member.dialect != Dialect::Gnu || self.records && has_sparse_records(&member.records) {
                return Err(self.ambiguous("a sparse file in two formats"));
            }
            member.size = number::field(&member.block[header::GNU_REAL_SIZE])
                .and_then(|size| u64::try_from(size).ok())
                .ok_or(TarError::Number { offset: self.offset, field: "real size" })?;
            member.sparse = Some(Sparse::InHeaders(Vec::new()));
            let block = member.block;
            return member.add_segments(&block[header::GNU_SPARSE]);
        }
        if member.records.is_empty() || !has_sparse_records(&member.records) {
            return Ok(());
        }
        let records = &member.records;
        let version = (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor"));
        let map = match version {
            (Some(b"1"), Some(b"0")) => Sparse::InData,
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {
                Sparse::InHeaders(self.record_segments(records)?)
            }
            _ => return Err(self.ambiguous("an unknown version of sparse files")),
        };
        let size = records.get(b"GNU.sparse.realsize").or(records.get(b"GNU.sparse.size"));
        member.size = match size {
            Some(size) => number::decimal(size)
                .filter(|&size| i64::try_from(size).is_ok())
                .ok_or(TarError::Number { offset: self.offset, field: "PAX real size" })?,
            None => stored,
        };
        if let Some(name) = records.get(b"GNU.sparse.name").filter(|name| !name.is_empty()) {
            set(&mut member.path, name);
        }
        member.sparse = Some(map);
        Ok(())
    }

    /// The map of PAX 0.0 (offset and numbytes in turn) or 0.1 (one list).
    fn record_segments(&self, records: &Records) -> Result<Vec<Segment>, TarError> {
        let fail = |what| TarError::Sparse { offset: self.offset, what };
        let number = |text| number::decimal(text).ok_or(fail("the map is malformed"));
        let mut numbers = Vec::new();
        if let Some(map) = records.get(b"GNU.sparse.map").filter(|map| !map.is_empty()) {
            for text in map.split(|&byte| byte == b',') {
                numbers.push(number(text)?);
            }
        } else {
            for (key, value) in records.iter() {
                let expected: &[u8] =
                    if numbers.len() % 2 == 0 { b"GNU.sparse.offset" } else { b"GNU.sparse.numbytes" };
                if key == expected {
                    numbers.push(number(value)?);
                } else if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                    return Err(fail("offsets and lengths do not alternate"));
                }
            }
        }
        let (pairs, rest) = numbers.as_chunks();
        if !rest.is_empty() {
            return Err(fail("an offset without a length"));
        }
        Ok(pairs.iter().map(|&[offset, length]| Segment { offset, length }).collect())
    }

    fn ambiguous(&self, what: &'static str) -> TarError {
        TarError::Ambiguous { offset: self.offset, what }
    }
}

impl Member {
    /// Adds the segments of one block of an old GNU sparse map. The first empty entry ends it, but Python parses all.
    pub(super) fn add_segments(&mut self, entries: &[u8]) -> Result<(), TarError> {
        let offset = self.offset;
        let Some(Sparse::InHeaders(segments)) = &mut self.sparse else { return Ok(()) };
        let (entries, _) = entries.as_chunks::<24>();
        let mut ended = false;
        for entry in entries {
            let (start, length) = entry.split_at(12);
            let number = |bytes| {
                let value = number::field(bytes).and_then(|value| u64::try_from(value).ok());
                value.ok_or(TarError::Number { offset, field: "sparse map" })
            };
            let segment = Segment { offset: number(start)?, length: number(length)? };
            ended |= entry[0] == 0;
            if !ended {
                segments.push(segment);
            }
        }
        Ok(())
    }
}

/// The path in the header itself, and the times that GNU and star headers hold.
fn header_path(block: &Block, dialect: Dialect, offset: u64, member: &mut Member) -> Result<(), TarError> {
    let mut prefix: &[u8] = b"";
    member.header_times = [None; 2];
    let times = match dialect {
        Dialect::V7 => None,
        Dialect::Ustar => {
            prefix = header::text(&block[header::PREFIX]);
            None
        }
        Dialect::Star => {
            prefix = header::text(&block[header::STAR_PREFIX]);
            Some([header::STAR_ATIME, header::STAR_CTIME])
        }
        Dialect::Gnu => Some([header::GNU_ATIME, header::GNU_CTIME]),
    };
    if let Some(ranges) = times {
        let mut valid = true;
        for (range, time) in ranges.into_iter().zip(&mut member.header_times) {
            if block[range.start] != 0 {
                *time = number::field(&block[range]);
                valid &= time.is_some();
            }
        }
        if !valid {
            if dialect == Dialect::Star {
                return Err(TarError::Number { offset, field: "star times" });
            }
            member.header_times = [None; 2];
            prefix = header::text(&block[header::PREFIX]);
            if !prefix.is_ascii() {
                prefix = b"";
            }
        }
    }
    member.path.clear();
    if !prefix.is_empty() {
        member.path.extend_from_slice(prefix);
        member.path.push(b'/');
    }
    member.path.extend_from_slice(header::text(&block[header::NAME]));
    Ok(())
}

fn has_sparse_records(records: &Records) -> bool {
    records.iter().any(|(key, _)| key.starts_with(b"GNU.sparse."))
}

fn set(name: &mut Vec<u8>, value: &[u8]) {
    name.clear();
    name.extend_from_slice(value);
}
