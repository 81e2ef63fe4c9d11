//! From raw headers to the metadata that they mean.

use super::extension::Extensions;
use super::header::{self, Block, Dialect, Numbers};
use super::pax::MIRRORS;
use super::{Kind, Limits, Member, Records, TarError, Time, number};

impl Extensions {
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
        self.apply_sparse(member)?;

        let slashes = [&member.path[..], header::text(&block[header::NAME])].map(|name| name.ends_with(b"/"));
        member.kind = match member.flag {
            // Before POSIX, a trailing slash made a directory. Go looks at the resolved name, Python at the header's.
            0 if slashes[0] || size == 0 && slashes[1] => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharacterDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        };
        if member.flag == 0 && size > 0 && slashes[0] != slashes[1] {
            return Err(self.ambiguous("an old-style directory with a size"));
        }
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
        // By POSIX an empty value deletes; Go falls back to the header's field, Python reads it as zero or nothing. They agree
        // on a name that the header lacks too: so a member says that a global header's name is not its own.
        let is_no_name = |key: &[u8]| match key {
            b"uname" => member.uname.is_empty(),
            b"gname" => member.gname.is_empty(),
            _ => false,
        };
        if MIRRORS.iter().any(|key| own.get(key).is_some_and(<[u8]>::is_empty) && !is_no_name(key)) {
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

fn set(name: &mut Vec<u8>, value: &[u8]) {
    name.clear();
    name.extend_from_slice(value);
}
