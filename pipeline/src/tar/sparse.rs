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
    Map(MapReader),
    Data {
        /// Those that are not empty.
        segments: Vec<Segment>,
        /// The one that the next byte belongs to.
        current: usize,
        /// Bytes of it that were given.
        given: u64,
    },
}

/// The map of PAX 1.0 as far as it was read: decimal lines, the number of segments, then offset and length of each.
#[derive(Debug, Default)]
struct MapReader {
    /// Bytes taken, of whole blocks in the end.
    length: u64,
    line: Vec<u8>,
    count: Option<u64>,
    numbers: Vec<u64>,
}

impl MapReader {
    /// Takes bytes up to the end of the map's last block, and says how many. None is a malformed line.
    fn take(&mut self, bytes: &[u8]) -> Option<usize> {
        for (index, &byte) in bytes.iter().enumerate() {
            if self.is_complete() && self.length.is_multiple_of(BLOCK as u64) {
                return Some(index);
            }
            self.length += 1;
            if self.is_complete() {
                continue;
            }
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > 20 {
                    return None;
                }
                continue;
            }
            let number = number::decimal(&self.line)?;
            self.line.clear();
            match self.count {
                None => self.count = Some(number),
                Some(_) => self.numbers.push(number),
            }
        }
        Some(bytes.len())
    }

    fn is_complete(&self) -> bool {
        self.count.is_some_and(|count| (self.numbers.len() as u64) / 2 >= count)
    }
}

impl Expander {
    /// For a file of `size` bytes that the tar stores in `stored`; the map is at most `limit` bytes long.
    pub fn new(sparse: &Sparse, size: u64, stored: u64, limit: u64, offset: u64) -> Self {
        let state = match sparse {
            Sparse::InHeaders(segments) => State::data(segments.clone()),
            Sparse::InData => State::Map(MapReader::default()),
        };
        Self { offset, size, stored, limit, state, position: 0 }
    }

    /// Takes the next stored bytes.
    pub fn feed<E: From<TarError>>(
        &mut self,
        mut stored: &[u8],
        give: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if let State::Map(map) = &mut self.state {
            let fail = |what| TarError::Sparse { offset: self.offset, what };
            let taken = map.take(stored).ok_or(fail("the map is malformed"))?;
            if map.length > self.limit {
                let unit = "bytes of a sparse map";
                return Err(TarError::Limit { offset: self.offset, limit: self.limit, unit }.into());
            }
            stored = &stored[taken..];
            if !map.is_complete() || !map.length.is_multiple_of(BLOCK as u64) {
                return Ok(());
            }
            let (pairs, _) = map.numbers.as_chunks();
            let segments: Vec<Segment> =
                pairs.iter().map(|&[offset, length]| Segment { offset, length }).collect();
            let data = self.stored.checked_sub(map.length).ok_or(fail("the map is longer than the data"))?;
            validate(&segments, self.size, data, self.offset)?;
            self.state = State::data(segments);
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
            State::Data { segments, current, .. } => *current == segments.len(),
        };
        if !complete {
            return Err(TarError::Sparse { offset: self.offset, what: "data is missing" }.into());
        }
        zeros(self.size - self.position, give)
    }
}

impl State {
    fn data(mut segments: Vec<Segment>) -> Self {
        segments.retain(|segment| segment.length > 0);
        Self::Data { segments, current: 0, given: 0 }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(sparse: &Sparse, size: u64, stored: &[u8], piece: usize) -> Result<Vec<u8>, TarError> {
        let mut expanded = Vec::new();
        let mut give = |bytes: &[u8]| {
            expanded.extend_from_slice(bytes);
            Ok::<_, TarError>(())
        };
        let mut expander = Expander::new(sparse, size, stored.len() as u64, 4096, 0);
        for piece in stored.chunks(piece) {
            expander.feed(piece, &mut give)?;
        }
        expander.finish(&mut give)?;
        Ok(expanded)
    }

    #[test]
    fn holes_are_filled_however_the_data_comes() {
        let segments = [(0, 0), (3, 2), (5, 1), (100_000, 3), (100_010, 0)];
        let segments = segments.map(|(offset, length)| Segment { offset, length });
        let mut expected = vec![0; 100_010];
        expected[3..6].copy_from_slice(b"abc");
        expected[100_000..100_003].copy_from_slice(b"def");
        let lines: Vec<String> =
            segments.iter().map(|segment| format!("{}\n{}\n", segment.offset, segment.length)).collect();
        for piece in [1, 2, 5, 511, 512, 513, 5000] {
            let in_headers = Sparse::InHeaders(segments.to_vec());
            assert_eq!(expand(&in_headers, 100_010, b"abcdef", piece).unwrap(), expected);
            let mut stored = format!("5\n{}", lines.concat()).into_bytes();
            stored.resize(BLOCK, 0);
            stored.extend_from_slice(b"abcdef");
            assert_eq!(expand(&Sparse::InData, 100_010, &stored, piece).unwrap(), expected);
        }
        assert_eq!(expand(&Sparse::InHeaders(Vec::new()), 9, b"", 1).unwrap(), [0; 9]);
    }

    #[test]
    fn maps_may_take_several_blocks_within_the_limit() {
        let map = |segments: usize| {
            let mut stored = format!("{segments}\n").into_bytes();
            (0..segments)
                .for_each(|number| stored.extend_from_slice(format!("{:09}\n1\n", 2 * number).as_bytes()));
            stored.resize(stored.len().next_multiple_of(BLOCK), 0);
            stored.resize(stored.len() + segments, b'x');
            stored
        };
        assert_eq!(expand(&Sparse::InData, 200, &map(100), 100).unwrap(), b"x\0".repeat(100));
        assert!(matches!(expand(&Sparse::InData, 800, &map(400), 100), Err(TarError::Limit { .. })));
        let mut short = map(100);
        short.pop();
        assert!(matches!(expand(&Sparse::InData, 200, &short, 100), Err(TarError::Sparse { .. })));
    }
}
