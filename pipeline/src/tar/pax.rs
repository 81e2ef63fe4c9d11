//! PAX records: `length key=value\n`, as POSIX.1-2001 (pax, "Extended header") defines them.

use std::ops::Range;

use super::number;

/// Records in their order. Where a key stands more than once, the last one counts.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// Keys and values, as `records` point to them.
    bytes: Vec<u8>,
    records: Vec<Record>,
}

#[derive(Clone, Debug)]
struct Record {
    key: Range<usize>,
    value: Range<usize>,
}

/// What is wrong with the records of an extended header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRecords {
    /// A record does not begin with its length in decimal digits and a space.
    #[error("a record without a length")]
    Length,
    /// A record's length leads past the header's end, or not to a line feed.
    #[error("a record whose length is wrong")]
    Bounds,
    /// A record without `=`.
    #[error("a record without a key")]
    Key,
    /// A NUL where readers disagree on what it means.
    #[error("a NUL in a key or name")]
    Nul,
}

/// Global records that may be in force at once, and their bytes: each member looks through them.
pub(super) const GLOBAL_RECORDS: usize = 256;
pub(super) const GLOBAL_BYTES: usize = 64 * 1024;

/// Keys that mirror a field of the header. They are applied to the member and written anew where it needs them.
pub(super) const MIRRORS: [&[u8]; 8] =
    [b"path", b"linkpath", b"size", b"uid", b"gid", b"uname", b"gname", b"mtime"];

/// Whether a record says how its archive was written rather than something about the file.
pub(super) fn is_encoding(key: &[u8]) -> bool {
    key == b"hdrcharset" || key.starts_with(b"GNU.sparse.")
}

impl Records {
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.records.clear();
    }

    /// Adds the records of an extended header's payload.
    pub(super) fn parse(&mut self, payload: &[u8]) -> Result<(), InvalidRecords> {
        let base = self.bytes.len();
        self.bytes.extend_from_slice(payload);
        let mut start = 0;
        while start < payload.len() {
            let rest = &payload[start..];
            let digits = rest.iter().take(21).position(|&byte| byte == b' ').ok_or(InvalidRecords::Length)?;
            let length = number::decimal(&rest[..digits]).ok_or(InvalidRecords::Length)?;
            let length = usize::try_from(length).map_err(|_| InvalidRecords::Bounds)?;
            if length < digits + 2 || rest.len() < length || rest[length - 1] != b'\n' {
                return Err(InvalidRecords::Bounds);
            }
            let body = &rest[digits + 1..length - 1];
            let equals = body.iter().position(|&byte| byte == b'=').ok_or(InvalidRecords::Key)?;
            let (key, value) = (&body[..equals], &body[equals + 1..]);
            let named = matches!(key, b"path" | b"linkpath" | b"uname" | b"gname" | b"GNU.sparse.name");
            if key.contains(&0) || (named && value.contains(&0)) {
                return Err(InvalidRecords::Nul);
            }
            if key.is_empty() {
                return Err(InvalidRecords::Key);
            }
            let key_start = base + start + digits + 1;
            let key = key_start..key_start + equals;
            let value = key.end + 1..base + start + length - 1;
            self.records.push(Record { key, value });
            start += length;
        }
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// All records in their order, repeated keys included.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.records.iter().map(|record| (&self.bytes[record.key.clone()], &self.bytes[record.value.clone()]))
    }

    /// The value that counts for a key.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        if self.records.is_empty() {
            return None;
        }
        self.records
            .iter()
            .rev()
            .find(|record| &self.bytes[record.key.clone()] == key)
            .map(|record| &self.bytes[record.value.clone()])
    }

    /// Removes every record of a key and says whether there was one.
    pub(super) fn remove(&mut self, key: &[u8]) -> bool {
        let before = self.records.len();
        let bytes = &self.bytes;
        self.records.retain(|record| &bytes[record.key.clone()] != key);
        self.records.len() != before
    }

    /// Sets a key's only value.
    fn set(&mut self, key: &[u8], value: &[u8]) {
        self.remove(key);
        self.append(key, value);
    }

    /// Takes over a newer global header's records, which override those that are here; an empty value deletes its key.
    /// False says that more would be held than any tar needs.
    pub(crate) fn merge(&mut self, newer: &Self) -> bool {
        if newer.records.len() > GLOBAL_RECORDS || newer.bytes.len() > 2 * GLOBAL_BYTES {
            return false;
        }
        let mut merged = Self::default();
        for (key, value) in self.iter().filter(|(key, _)| newer.get(key).is_none()) {
            merged.append(key, value);
        }
        for (key, value) in newer.iter().filter(|(_, value)| !value.is_empty()) {
            merged.set(key, value);
        }
        *self = merged;
        self.records.len() <= GLOBAL_RECORDS && self.bytes.len() <= GLOBAL_BYTES
    }

    fn append(&mut self, key: &[u8], value: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value);
        let middle = start + key.len();
        self.records.push(Record { key: start..middle, value: middle..self.bytes.len() });
    }

    /// Bytes in use.
    pub(super) fn size(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes one record.
pub(super) fn write(payload: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // The length counts its own digits.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + digits(rest);
    length = rest + digits(length);
    payload.extend_from_slice(length.to_string().as_bytes());
    payload.push(b' ');
    payload.extend_from_slice(key);
    payload.push(b'=');
    payload.extend_from_slice(value);
    payload.push(b'\n');
}

fn digits(number: usize) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(payload: &[u8]) -> Result<Records, InvalidRecords> {
        let mut records = Records::default();
        records.parse(payload)?;
        Ok(records)
    }

    #[test]
    fn records_of_every_length_are_read_back() {
        for size in (0..120).chain(970..1010).chain(9980..10_010) {
            let value = vec![b'v'; size];
            let mut payload = Vec::new();
            write(&mut payload, b"key", &value);
            write(&mut payload, b"other", b"=\n=");
            let records = parse(&payload).unwrap();
            assert_eq!(records.get(b"key"), Some(&value[..]), "{size}");
            assert_eq!(records.get(b"other"), Some(&b"=\n="[..]));
        }
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let records = parse(b"8 a=one\n8 a=two\n").unwrap();
        assert_eq!(records.get(b"a"), Some(&b"two"[..]));
        assert_eq!(records.iter().count(), 2);
    }

    #[test]
    fn lying_lengths_are_refused() {
        use InvalidRecords::{Bounds, Key, Length, Nul};
        for (payload, problem) in [
            (&b"7 a=one\n"[..], Bounds),
            (b"9 a=one\n", Bounds),
            (b"999999999999999999999 a=one\n", Length),
            (b"18446744073709551615 a=one\n", Bounds),
            (b"0 a=one\n", Bounds),
            (b"1 a=one\n", Bounds),
            (b"2 a=one\n", Bounds),
            (b"-8 a=one\n", Length),
            (b"+8 a=one\n", Length),
            (b" 8 a=one\n", Length),
            (b"8 a=one\n\0", Length),
            (b"\n", Length),
            (b"6 aone\n", Bounds),
            (b"7 aone\n", Key),
            (b"6 =one\n", Bounds),
            (b"7 =one\n", Key),
            (b"9 a\0=one\n", Nul),
            (b"11 path=a\0\n", Nul),
        ] {
            assert_eq!(parse(payload).unwrap_err(), problem, "{:?}", String::from_utf8_lossy(payload));
        }
    }

    #[test]
    fn newer_global_records_override_and_delete() {
        let mut old = parse(b"8 a=one\n8 b=two\n").unwrap();
        old.merge(&parse(b"5 a=\n9 b=four\n").unwrap());
        assert_eq!(old.iter().collect::<Vec<_>>(), [(&b"b"[..], &b"four"[..])]);
    }
}
