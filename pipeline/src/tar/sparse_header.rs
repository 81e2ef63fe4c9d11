//! What headers say of sparse files: which format, which size, and the map, unless it stands in the data.

use super::extension::Extensions;
use super::header::{self, Dialect};
use super::sparse::{self, Segment, Sparse};
use super::{Member, Records, TarError, number};

impl Extensions {
    /// Checks a map that is complete.
    pub(super) fn check_sparse(&self, member: &Member) -> Result<(), TarError> {
        match &member.sparse {
            Some(Sparse::InHeaders(segments)) => {
                sparse::validate(segments, member.size, member.stored, self.offset)
            }
            Some(Sparse::InData) | None => Ok(()),
        }
    }

    /// Recognizes a sparse file by its type or records, and resolves its size and name.
    pub(super) fn apply_sparse(&self, member: &mut Member) -> Result<(), TarError> {
        let has_records = member.records.iter().any(|(key, _)| key.starts_with(b"GNU.sparse."));
        if member.flag == b'S' {
            if member.dialect != Dialect::Gnu || has_records {
                return Err(self.ambiguous("a sparse file in an unknown format"));
            }
            member.size = number::field(&member.block[header::GNU_REAL_SIZE])
                .and_then(|size| u64::try_from(size).ok())
                .ok_or(TarError::Number { offset: self.offset, field: "real size" })?;
            member.sparse = Some(Sparse::InHeaders(Vec::new()));
            let block = member.block;
            return member.add_segments(&block[header::GNU_SPARSE]);
        }
        if !has_records {
            return Ok(());
        }
        let records = &member.records;
        let map = match (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")) {
            (Some(b"1"), Some(b"0")) => Sparse::InData,
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {
                Sparse::InHeaders(self.record_segments(records)?)
            }
            _ => return Err(self.ambiguous("a sparse file in an unknown format")),
        };
        let (real, size) = (records.get(b"GNU.sparse.realsize"), records.get(b"GNU.sparse.size"));
        if real.is_some() && size.is_some() && real != size {
            return Err(self.ambiguous("a sparse file with two sizes"));
        }
        member.size = real
            .or(size)
            .and_then(number::decimal)
            .filter(|&size| i64::try_from(size).is_ok())
            .ok_or(TarError::Number { offset: self.offset, field: "PAX real size" })?;
        match records.get(b"GNU.sparse.name") {
            Some(b"") => return Err(self.ambiguous("an empty PAX record for a field")),
            Some(name) => name.clone_into(&mut member.path),
            None => {}
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
        if numbers.is_empty() {
            // Go does not take this for a sparse file, Python does. GNU tar writes a map even for a single hole.
            return Err(self.ambiguous("a sparse file in an unknown format"));
        }
        let (pairs, rest) = numbers.as_chunks();
        if !rest.is_empty() {
            return Err(fail("an offset without a length"));
        }
        Ok(pairs.iter().map(|&[offset, length]| Segment { offset, length }).collect())
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
