//! The headers of edited members.
//!
//! # The canonical form
//! - Only the times of a member with one plain header changed: that header with its mtime patched (and a GNU header's
//!   atime and ctime blanked), if the new time is a whole second that fits. Everything else stays byte for byte.
//! - Otherwise a USTAR header where every field fits: ASCII names, owner names of 31 bytes at most, the path in 100 bytes or
//!   split at the first `/` that leaves at most 155 and 100, numbers as octal digits. What does not fit goes into a PAX
//!   header before it, and the header holds a stand-in. GNU long names are never written.
//! - All other PAX records of the member are kept, in their order, behind those that mirror fields (in the order path,
//!   linkpath, size, uid, gid, uname, gname, mtime). `hdrcharset=BINARY` stands first where a name is not UTF-8.
//! - The atime and ctime of a GNU header become PAX records when they are not removed.
//! - A sparse file becomes a regular one. Padding is zeros.
//! - Where a global header is in force that would override a field, the member says it in a record of its own.

use super::header::{self, Block};
use super::pax::{self, MIRRORS};
use super::{BLOCK, Kind, Member, Records, number};

/// A member whose records would exceed what readers accept (1 MiB in Go and libarchive).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the PAX records of an edited member would take {size} bytes, of at most {limit}")]
pub struct TooManyRecords {
    size: usize,
    limit: usize,
}

const LIMIT: usize = 1024 * 1024;

/// Appends all header blocks of an edited member.
///
/// `globals` are the global records in force where it will stand. A global header without any records left is nothing.
pub fn header(member: &Member, globals: &Records, output: &mut Vec<u8>) -> Result<(), TooManyRecords> {
    if member.kind() == Kind::Global {
        return global(member, output);
    }
    if let Some(block) = patched(member, globals) {
        output.extend_from_slice(&block);
        return Ok(());
    }
    let mut payload = Vec::new();
    let block = encoded(member, globals, &mut payload);
    if !payload.is_empty() {
        extension(b'x', &payload, output)?;
    }
    output.extend_from_slice(&block);
    Ok(())
}

/// The plain header with other times, where nothing else changed.
fn patched(member: &Member, globals: &Records) -> Option<Block> {
    let edits = member.edits;
    let fits = (0..=number::octal_max(12)).contains(&member.mtime.seconds) && member.mtime.nanoseconds == 0;
    if !member.plain || edits.other || member.sparse.is_some() || !fits || globals.get(b"mtime").is_some() {
        return None;
    }
    if member.dialect == header::Dialect::Star {
        return None;
    }
    let mut block = member.block;
    if edits.mtime {
        number::write_octal(&mut block[header::MTIME], member.mtime.seconds);
    }
    if member.dialect == header::Dialect::Gnu {
        for (range, time) in [header::GNU_ATIME, header::GNU_CTIME].into_iter().zip(member.header_times) {
            // Text in these fields is a ustar prefix, see the module `tar`.
            if time.is_none() && number::field(&block[range.clone()]).is_some() {
                block[range].fill(0);
            }
        }
    }
    header::seal(&mut block);
    Some(block)
}

/// A header from the resolved fields, and the records that it needs.
fn encoded(member: &Member, globals: &Records, payload: &mut Vec<u8>) -> Block {
    let mut block = [0; BLOCK];
    let mut records = Overflow { member, globals, payload };
    records.charset();

    records.path(&mut block);
    records.text(b"linkpath", &member.link, &mut block[header::LINK], 100);
    let size = if member.kind.has_data() { i64::try_from(member.size).unwrap_or(i64::MAX) } else { 0 };
    records.number(b"size", size, &mut block[header::SIZE]);
    records.number(b"uid", member.uid, &mut block[header::UID]);
    records.number(b"gid", member.gid, &mut block[header::GID]);
    // Their fields must end with a NUL.
    records.text(b"uname", &member.uname, &mut block[header::UNAME], 31);
    records.text(b"gname", &member.gname, &mut block[header::GNAME], 31);
    records.mtime(&mut block[header::MTIME]);
    records.others();

    let mode = i64::from(member.mode);
    number::write_octal(
        &mut block[header::MODE],
        if mode > number::octal_max(8) { mode & 0o7777 } else { mode },
    );
    block[header::FLAG] = match member.kind {
        Kind::Regular if member.flag == b'7' => b'7',
        Kind::Regular => b'0',
        Kind::Directory => b'5',
        _ => member.flag,
    };
    block[header::MAGIC].copy_from_slice(header::USTAR_MAGIC);
    device(&mut block[header::MAJOR], member.major);
    device(&mut block[header::MINOR], member.minor);
    header::seal(&mut block);
    block
}

/// What a header cannot hold, as records.
struct Overflow<'a> {
    member: &'a Member,
    globals: &'a Records,
    payload: &'a mut Vec<u8>,
}

impl Overflow<'_> {
    /// Names that are not UTF-8 need to be announced (POSIX.1-2008).
    fn charset(&mut self) {
        let member = self.member;
        let names = [&member.path, &member.link, &member.uname, &member.gname];
        if names.into_iter().any(|name| std::str::from_utf8(name).is_err()) {
            pax::write(self.payload, b"hdrcharset", b"BINARY");
        }
    }

    fn path(&mut self, block: &mut Block) {
        let path = &self.member.path;
        match split(path) {
            Some((prefix, name)) => {
                block[header::NAME][..name.len()].copy_from_slice(name);
                block[header::PREFIX][..prefix.len()].copy_from_slice(prefix);
            }
            None => {
                stand_in(path, &mut block[header::NAME]);
                pax::write(self.payload, b"path", path);
            }
        }
    }

    fn text(&mut self, key: &[u8], value: &[u8], field: &mut [u8], most: usize) {
        let fits = value.is_ascii() && value.len() <= most;
        if fits {
            field[..value.len()].copy_from_slice(value);
        } else {
            stand_in(value, &mut field[..most]);
        }
        if !fits || self.globals.get(key).is_some() {
            pax::write(self.payload, key, value);
        }
    }

    fn number(&mut self, key: &[u8], value: i64, field: &mut [u8]) {
        let fits = (0..=number::octal_max(field.len())).contains(&value);
        number::write_octal(field, if fits { value } else { 0 });
        if !fits || self.globals.get(key).is_some() {
            pax::write(self.payload, key, value.to_string().as_bytes());
        }
    }

    fn mtime(&mut self, field: &mut [u8]) {
        let mtime = self.member.mtime;
        let fits = (0..=number::octal_max(field.len())).contains(&mtime.seconds);
        number::write_octal(field, if fits { mtime.seconds } else { 0 });
        let fits = fits && mtime.nanoseconds == 0;
        let source = self.member.records.get(b"mtime").filter(|text| !text.is_empty());
        if fits && self.globals.get(b"mtime").is_none() {
            return;
        }
        match source {
            // The source's own text may be more precise than nanoseconds.
            Some(text) if !self.member.edits.mtime => pax::write(self.payload, b"mtime", text),
            _ => pax::write(self.payload, b"mtime", mtime.to_text().as_bytes()),
        }
    }

    fn others(&mut self) {
        let member = self.member;
        for (key, time) in [&b"atime"[..], b"ctime"].into_iter().zip(member.header_times) {
            if let Some(time) = time.filter(|_| member.records.get(key).is_none()) {
                pax::write(self.payload, key, time.to_string().as_bytes());
            }
        }
        for (key, value) in member.records.iter() {
            if !MIRRORS.contains(&key) && !pax::is_encoding(key) {
                pax::write(self.payload, key, value);
            }
        }
    }
}

/// Prefix and name of a path that USTAR can hold.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    const NAME: usize = header::NAME.end - header::NAME.start;
    const PREFIX: usize = header::PREFIX.end - header::PREFIX.start;
    if !path.is_ascii() {
        return None;
    }
    if path.len() <= NAME {
        return Some((b"", path));
    }
    // Neither part may be empty; the name may take 100 bytes, the slash between them is not stored.
    let earliest = (path.len() - NAME - 1).max(1);
    let slash = earliest + path.get(earliest..path.len() - 1)?.iter().position(|&byte| byte == b'/')?;
    (slash <= PREFIX).then(|| (&path[..slash], &path[slash + 1..]))
}

/// Fills a field with what readers without PAX may make do with.
fn stand_in(value: &[u8], field: &mut [u8]) {
    for (place, &byte) in field.iter_mut().zip(value) {
        *place = if byte.is_ascii() { byte } else { b'?' };
    }
}

/// Device numbers have no PAX record that all readers know; GNU's base-256 is the only other way.
fn device(field: &mut [u8], value: i64) {
    if (0..=number::octal_max(field.len())).contains(&value) {
        number::write_octal(field, value);
    } else {
        number::write_base256(field, value);
    }
}

fn global(member: &Member, output: &mut Vec<u8>) -> Result<(), TooManyRecords> {
    let mut payload = Vec::new();
    for (key, value) in member.records.iter() {
        pax::write(&mut payload, key, value);
    }
    if payload.is_empty() {
        return Ok(());
    }
    extension(b'g', &payload, output)
}

fn extension(flag: u8, payload: &[u8], output: &mut Vec<u8>) -> Result<(), TooManyRecords> {
    if payload.len() > LIMIT {
        return Err(TooManyRecords { size: payload.len(), limit: LIMIT });
    }
    let mut block = [0; BLOCK];
    let name = b"././@PaxHeader";
    block[..name.len()].copy_from_slice(name);
    number::write_octal(&mut block[header::MODE], 0o644);
    for field in [header::UID, header::GID, header::MTIME, header::MAJOR, header::MINOR] {
        number::write_octal(&mut block[field], 0);
    }
    number::write_octal(&mut block[header::SIZE], i64::try_from(payload.len()).unwrap_or(i64::MAX));
    block[header::FLAG] = flag;
    block[header::MAGIC].copy_from_slice(header::USTAR_MAGIC);
    header::seal(&mut block);
    output.extend_from_slice(&block);
    output.extend_from_slice(payload);
    output.resize(output.len().next_multiple_of(BLOCK), 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_where_ustar_allows() {
        let check = |path: &str, expected: Option<(&str, &str)>| {
            let parts = split(path.as_bytes());
            assert_eq!(parts, expected.map(|(prefix, name)| (prefix.as_bytes(), name.as_bytes())), "{path}");
        };
        let (n100, n101, n155, n156) = ("n".repeat(100), "n".repeat(101), "p".repeat(155), "p".repeat(156));
        check("a/b", Some(("", "a/b")));
        check(&n100, Some(("", &n100)));
        check(&n101, None);
        check(&format!("p/{n100}"), Some(("p", &n100)));
        check(&format!("{n155}/{n100}"), Some((&n155, &n100)));
        check(&format!("{n156}/{n100}"), None);
        check(&format!("{n155}/{n101}"), None);
        check(&format!("a/b/{n100}"), Some(("a/b", &n100)));
        check(&format!("/{n100}"), None);
        check(&format!("{n100}/"), None);
        check(&format!("p/{}/", "n".repeat(99)), Some(("p", &format!("{}/", "n".repeat(99)))));
        check("größe", None);
    }
}
