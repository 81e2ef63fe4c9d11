//! Sparse files in GNU tar's formats: old GNU (type `S`), and PAX 0.0, 0.1 and 1.0.
//!
//! Raw copies never look into them. Only an edited sparse file is expanded, because it becomes a regular one.

use super::{BLOCK, Limits, Member, TarError, ZEROS, number};

/// A stretch of data in a file that has holes elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Of its first byte in the file.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
}

/// How a sparse file's data is spread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sparse {
    /// The headers hold the map: old GNU, PAX 0.0 and 0.1.
    InHeaders(Vec<Segment>),
    /// The data begins with the map: PAX 1.0.
    InData,
}

/// Checks that the segments are in order, inside the file, and as long together as the data that is stored for them.
pub(super) fn validate(segments: &[Segment], size: u64, stored: u64, offset: u64) -> Result<(), TarError> {
    let fail = |what| TarError::Sparse { offset, what };
    let mut end = 0_u64;
    let mut total = 0_u64;
    for segment in segments {
        if segment.offset < end {
            return Err(fail("segments overlap or are out of order"));
        }
        end = segment.offset.checked_add(segment.length).ok_or(fail("a segment is too long"))?;
        total += segment.length;
    }
    if end > size {
        return Err(fail("a segment lies past the end of the file"));
    }
    if total != stored {
        return Err(fail("the stored data is not as long as the segments"));
    }
    Ok(())
}

/// Takes the stored data of a sparse file, in order and in any pieces, and gives its contents.
#[derive(Debug)]
pub struct Expander {
    /// Of the member, for errors.
    offset: u64,
    size: u64,
    stored: u64,
    limit: u64,
    state: State,
    /// How much of the file was given.
    position: u64,
}

#[derive(Debug)]
enum State {
    /// The map of PAX 1.0 as far as it was read.
    Map(Vec<u8>),
    Data {
        segments: Vec<Segment>,
        /// The one that the next byte belongs to.
        current: usize,
        /// Bytes of it that were given.
        given: u64,
    },
}

impl Expander {
    /// For a file of `size` bytes that the tar stores in `stored`; the map is at most `limit` bytes long.
    pub fn new(sparse: &Sparse, size: u64, stored: u64, limit: u64, offset: u64) -> Self {
        let state = match sparse {
            Sparse::InHeaders(segments) => State::Data { segments: segments.clone(), current: 0, given: 0 },
            Sparse::InData => State::Map(Vec::new()),
        };
        Self { offset, size, stored, limit, state, position: 0 }
    }

    /// Takes the next stored bytes.
    pub fn feed<E: From<TarError>>(
        &mut self,
        mut stored: &[u8],
        give: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let State::Map(map) = &mut self.state {
            if stored.is_empty() {
                return Ok(());
            }
            let missing = BLOCK - map.len() % BLOCK;
            let (block, rest) = stored.split_at(missing.min(stored.len()));
            map.extend_from_slice(block);
            stored = rest;
            if map.len().is_multiple_of(BLOCK) {
                self.finish_map()?;
            }
        }
        while !stored.is_empty() {
            let State::Data { segments, current, given } = &mut self.state else {
                unreachable!("the map is read")
            };
            let Some(&segment) = segments.get(*current) else {
                let error = TarError::Sparse { offset: self.offset, what: "data behind the last segment" };
                return Err(error.into());
            };
            let left = segment.length - *given;
            let length = usize::try_from(left).map_or(stored.len(), |left| left.min(stored.len()));
            let (data, rest) = stored.split_at(length);
            if *given == 0 {
                let hole = segment.offset - self.position;
                zeros(hole, give)?;
                self.position = segment.offset;
            }
            give(data)?;
            *given += length as u64;
            self.position += length as u64;
            if *given == segment.length {
                *current += 1;
                *given = 0;
            }
            stored = rest;
        }
        Ok(())
    }

    /// All stored bytes were taken: gives the hole at the end.
    pub fn finish<E: From<TarError>>(self, give: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let complete = match &self.state {
            State::Map(_) => false,
            State::Data { segments, current, .. } => {
                segments[*current..].iter().all(|segment| segment.length == 0)
            }
        };
        if !complete {
            return Err(TarError::Sparse { offset: self.offset, what: "data is missing" }.into());
        }
        zeros(self.size - self.position, give)
    }

    /// Reads the map if all its lines are there: the number of segments, then offset and length of each.
    fn finish_map(&mut self) -> Result<(), TarError> {
        let fail = |what| TarError::Sparse { offset: self.offset, what };
        let State::Map(map) = &self.state else { return Ok(()) };
        if map.len() as u64 > self.limit {
            return Err(TarError::Limit {
                offset: self.offset,
                limit: self.limit,
                unit: "bytes of a sparse map",
            });
        }
        let mut lines =
            map.split_inclusive(|&byte| byte == b'\n').filter_map(|line| line.strip_suffix(b"\n"));
        let Some(count) = lines.next() else { return Ok(()) };
        let count = number::decimal(count).ok_or(fail("the map's count is malformed"))?;
        if count > map.len() as u64 {
            // More lines than bytes so far; the limit ends this.
            return Ok(());
        }
        let mut segments = Vec::new();
        for _ in 0..count {
            let (Some(offset), Some(length)) = (lines.next(), lines.next()) else { return Ok(()) };
            let number = |text| number::decimal(text).ok_or(fail("the map is malformed"));
            segments.push(Segment { offset: number(offset)?, length: number(length)? });
        }
        let data =
            self.stored.checked_sub(map.len() as u64).ok_or(fail("the map is longer than the data"))?;
        validate(&segments, self.size, data, self.offset)?;
        self.state = State::Data { segments, current: 0, given: 0 };
        self.skip_empty();
        Ok(())
    }

    fn skip_empty(&mut self) {
        if let State::Data { segments, .. } = &mut self.state {
            segments.retain(|segment| segment.length > 0);
        }
    }
}

impl Member {
    /// What turns the stored data into the file's contents, where they differ.
    pub fn expander(&self, limits: &Limits) -> Option<Expander> {
        let sparse = self.sparse()?;
        Some(Expander::new(sparse, self.size(), self.stored_size(), limits.extension, self.offset()))
    }
}

/// Gives `count` zeros.
fn zeros<E>(mut count: u64, give: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    while count > 0 {
        let length = usize::try_from(count).map_or(ZEROS.len(), |count| count.min(ZEROS.len()));
        give(&ZEROS[..length])?;
        count -= length as u64;
    }
    Ok(())
}
