//! Reads a tar forward and yields its members with all their raw bytes.

use std::io::BufRead;

use super::extension::Extensions;
use super::header::{self, Block, Numbers};
use super::input::Input;
use super::{BLOCK, Kind, Limits, Member, Records, TarError, padding};
use crate::digest::Hasher;

/// A tar being read.
///
/// Call [`read_member`](Self::read_member) until it says that there is no more, then [`next_tail`](Self::next_tail) until
/// it yields nothing: then every byte of the input has passed. Memory is that of the reader and the headers of one member.
pub struct Walker<R> {
    input: Input<R>,
    limits: Limits,
    globals: Records,
    members: u64,
    /// Raw header bytes of the current member that are not consumed yet.
    header: usize,
    data: u64,
    padding: usize,
    ended: bool,
    marked: bool,
}

/// The next stored bytes of a member.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Data, and behind the last of it the padding up to the next block.
    pub bytes: &'a [u8],
    /// How many of the bytes are data.
    pub data: usize,
}

impl<'a> Chunk<'a> {
    /// The data without the padding.
    pub fn data(&self) -> &'a [u8] {
        &self.bytes[..self.data]
    }
}

impl<R: BufRead> Walker<R> {
    /// Begins to read.
    pub fn new(input: R, limits: Limits) -> Self {
        Self::with(Input::new(input), limits)
    }

    fn with(input: Input<R>, limits: Limits) -> Self {
        Self {
            input,
            limits,
            globals: Records::default(),
            members: 0,
            header: 0,
            data: 0,
            padding: 0,
            ended: false,
            marked: false,
        }
    }

    /// Begins to read what somebody else hashes.
    pub fn unhashed(input: R, limits: Limits) -> Self {
        Self::with(Input::unhashed(input), limits)
    }

    /// Takes all of the input for the tail, whatever it is.
    pub fn opaque(input: R) -> Self {
        Self { ended: true, marked: true, ..Self::new(input, Limits::default()) }
    }

    /// Reads the next member's headers into `member`. False says that the archive has ended: the tail is next.
    ///
    /// What was not read of the last member's data is skipped.
    pub fn read_member(&mut self, member: &mut Member) -> Result<bool, TarError> {
        self.skip_member()?;
        if self.ended {
            return Ok(false);
        }
        let offset = self.input.offset();
        let Some(length) = self.read_headers(member)? else {
            self.ended = true;
            return Ok(false);
        };
        self.members += 1;
        if self.members > self.limits.members {
            return Err(limit(offset, self.limits.members, "members"));
        }
        self.header = length;
        self.data = member.stored;
        self.padding = padding(member.stored);
        Ok(true)
    }

    /// The raw header blocks of the current member. To be asked for before its data is read.
    pub fn header(&mut self) -> &[u8] {
        self.input.peeked(self.header)
    }

    /// The next stored bytes of the current member, none when all have passed.
    ///
    /// Only a tar that ends with a member's data may lack its padding; the last chunk is then without it.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk<'_>>, TarError> {
        self.input.consume(std::mem::take(&mut self.header));
        if self.data == 0 && self.padding == 0 {
            return Ok(None);
        }
        let wanted = self.data.saturating_add(self.padding as u64);
        let (data, padding, offset) = (self.data, self.padding, self.input.offset());
        let bytes = self.input.take(wanted)?;
        let length = bytes.len();
        let taken = usize::try_from(data).map_or(length, |data| data.min(length));
        self.data = data - taken as u64;
        if length == 0 {
            if data > 0 {
                return Err(TarError::Truncated { offset, inside: "a member's data" });
            }
            self.padding = 0;
            return Ok(None);
        }
        self.padding = padding - (length - taken);
        Ok(Some(Chunk { bytes, data: taken }))
    }

    /// The next bytes from the end-of-archive marker on, up to the end of the input.
    pub fn next_tail(&mut self) -> Result<Option<&[u8]>, TarError> {
        debug_assert!(self.ended);
        let bytes = self.input.take(u64::MAX)?;
        Ok((!bytes.is_empty()).then_some(bytes))
    }

    /// Whether the archive ended with a marker rather than with the input.
    pub fn has_end_marker(&self) -> bool {
        self.marked
    }

    /// Records of global headers that apply to the current member.
    pub fn globals(&self) -> &Records {
        &self.globals
    }

    /// Members read so far.
    pub fn members(&self) -> u64 {
        self.members
    }

    /// Of the next byte that was not handed out.
    pub fn offset(&self) -> u64 {
        self.input.offset()
    }

    /// The hash of all bytes before the current member, if asked before its data is read.
    pub fn fork_hasher(&mut self) -> Hasher {
        self.input.fork_hasher()
    }

    /// The hash of all bytes that were handed out.
    pub fn into_hasher(self) -> Hasher {
        self.input.into_hasher()
    }

    fn skip_member(&mut self) -> Result<(), TarError> {
        while self.next_chunk()?.is_some() {}
        Ok(())
    }

    /// Looks at all headers of the next member and gives their length, or nothing at the end of the archive.
    fn read_headers(&mut self, member: &mut Member) -> Result<Option<usize>, TarError> {
        let offset = self.input.offset();
        let mut extensions = Extensions::new(offset, member);
        let mut length = 0;
        loop {
            let at = offset + length as u64;
            let block = self.block(length)?.filter(|block| block.iter().any(|&byte| byte != 0));
            let Some(block) = block else {
                if length > 0 {
                    return Err(TarError::Dangling { offset: at });
                }
                self.check_end()?;
                return Ok(None);
            };
            if !header::checksum_matches(&block) {
                return Err(TarError::Checksum { offset: at });
            }
            let numbers = Numbers::parse(&block).map_err(|field| TarError::Number { offset: at, field })?;
            length += BLOCK;
            match block[header::FLAG] {
                flag @ (b'x' | b'X' | b'L' | b'K' | b'g') => {
                    let size = self.require_payload(numbers.size, at, length)?;
                    let padded = size.next_multiple_of(BLOCK);
                    let (payload, rest) = self.input.peeked(length + padded)[length..].split_at(size);
                    length += padded;
                    if flag == b'g' {
                        extensions.global(payload, rest, at, &mut self.globals, member)?;
                        member.block = block;
                        return Ok(Some(length));
                    }
                    extensions.add(flag, payload, rest, at, member)?;
                }
                flag => {
                    extensions.resolve(&block, &numbers, &self.globals, member, &self.limits)?;
                    if flag == b'S' {
                        length = self.sparse_blocks(&block, length, member)?;
                        extensions.check_sparse(member)?;
                    }
                    return Ok(Some(length));
                }
            }
        }
    }

    /// The block `at` bytes ahead; none at the end of the input.
    fn block(&mut self, at: usize) -> Result<Option<Block>, TarError> {
        let offset = self.input.offset();
        let bytes = self.input.peek(at + BLOCK)?;
        match bytes.len().saturating_sub(at) {
            0 => Ok(None),
            BLOCK => Ok(bytes[at..].first_chunk().copied()),
            _ => Err(TarError::Truncated { offset: offset + bytes.len() as u64, inside: "a header" }),
        }
    }

    /// Has an extension header's payload and padding there to be looked at, `length` bytes ahead.
    fn require_payload(&mut self, size: i64, at: u64, length: usize) -> Result<usize, TarError> {
        let offset = self.input.offset();
        let size = u64::try_from(size).map_err(|_| TarError::Number { offset: at, field: "size" })?;
        let size = usize::try_from(size).ok().filter(|_| size <= self.limits.extension);
        let size = size.ok_or(limit(at, self.limits.extension, "bytes of an extension header"))?;
        let wanted = length + size.next_multiple_of(BLOCK);
        let there = self.input.peek(wanted)?.len();
        if there < wanted {
            return Err(TarError::Truncated { offset: offset + there as u64, inside: "an extension header" });
        }
        Ok(size)
    }

    /// The blocks that continue an old GNU sparse map.
    fn sparse_blocks(
        &mut self,
        block: &Block,
        length: usize,
        member: &mut Member,
    ) -> Result<usize, TarError> {
        let mut length = length;
        let mut extended = block[header::GNU_SPARSE_EXTENDED] != 0;
        while extended {
            let Some(block) = self.block(length)? else {
                let offset = self.input.offset() + length as u64;
                return Err(TarError::Truncated { offset, inside: "a sparse map" });
            };
            member.add_segments(&block[header::CONTINUED_SPARSE])?;
            extended = block[header::CONTINUED_EXTENDED] != 0;
            length += BLOCK;
            if length as u64 > self.limits.extension + 4 * BLOCK as u64 && extended {
                return Err(limit(member.offset, self.limits.extension, "bytes of a sparse map"));
            }
        }
        Ok(length)
    }

    /// The input is at its end or at a zero block: nothing but another one, or the end, may follow.
    fn check_end(&mut self) -> Result<(), TarError> {
        let offset = self.input.offset();
        let blocks = self.input.peek(2 * BLOCK)?;
        if blocks.iter().any(|&byte| byte != 0) {
            return Err(TarError::Ambiguous {
                offset,
                what: "a single zero block with something else behind it",
            });
        }
        self.marked = !blocks.is_empty();
        Ok(())
    }
}

fn limit(offset: u64, limit: u64, unit: &'static str) -> TarError {
    TarError::Limit { offset, limit, unit }
}

impl<R> std::fmt::Debug for Walker<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walker")
            .field("members", &self.members)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Member {
    /// Whether it is a global header.
    pub fn is_global(&self) -> bool {
        self.kind == Kind::Global
    }
}
