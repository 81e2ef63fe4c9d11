//! The tar as it is at one place of the chain: what is written, and its digest.
//!
//! A stream that equals the one before it costs nothing: its digest is that one's. At the first member where they differ,
//! it takes over a copy of the other's hash and goes its own way.

use std::io::Write;

use super::LayerError;
use crate::digest::Hasher;
use crate::tar::encode;
use crate::tar::sparse::Expander;
use crate::tar::{BLOCK, Content, Limits, Member, Records, ZEROS, padding};

/// Smaller writes are collected up to this size, larger ones pass without a copy.
const COLLECT: usize = 128 * 1024;
const DIRECT: usize = 32 * 1024;

/// One place of the chain.
pub(super) struct Stream<'o> {
    /// Its own hash, from the first difference on.
    hasher: Option<Hasher>,
    out: Option<&'o mut dyn Write>,
    collected: Vec<u8>,
    /// Global records in force here.
    globals: Records,
    /// Whether any member is not as in the source.
    edited: bool,
    pub(super) member: State,
    /// The encoded headers of the member at hand.
    header: Vec<u8>,
    expander: Option<Expander>,
    content: Content,
    /// Bytes of padding behind its data.
    padding: usize,
}

/// What became of the member at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It is as it was after so many changes: none is as in the source.
    Present(u32),
    /// It was dropped.
    Dropped,
}

/// A member as the source has it.
pub(super) const SOURCE: State = State::Present(0);

impl<'o> Stream<'o> {
    pub(super) fn new(out: Option<&'o mut dyn Write>) -> Self {
        Self {
            hasher: None,
            out,
            collected: Vec::new(),
            globals: Records::default(),
            edited: false,
            member: SOURCE,
            header: Vec::new(),
            expander: None,
            content: Content::Stored,
            padding: 0,
        }
    }

    /// Whether bytes given to it are needed by anyone.
    pub(super) fn is_live(&self) -> bool {
        self.hasher.is_some() || self.out.is_some()
    }

    pub(super) fn is_edited(&self) -> bool {
        self.edited
    }

    /// Notes a member that has come this far.
    pub(super) fn note(
        &mut self,
        member: &Member,
        limits: &Limits,
        holes: &mut u64,
    ) -> Result<(), LayerError> {
        self.member = State::Present(member.edit_count());
        if member.is_global() {
            self.globals.merge(member.records());
        }
        if !member.is_edited() {
            return Ok(());
        }
        self.header.clear();
        encode::header(member, &self.globals, &mut self.header)
            .map_err(|source| LayerError::Encode { path: super::run::name(member), source })?;
        self.content = member.content();
        self.padding = padding(member.size());
        self.expander = member.expander(limits);
        if self.expander.is_some() {
            *holes = holes.saturating_add(member.size().saturating_sub(member.stored_size()));
            if *holes > limits.holes {
                return Err(LayerError::Holes { path: super::run::name(member), limit: limits.holes });
            }
        }
        Ok(())
    }

    /// Goes its own way from here on, if the member at hand makes a difference to `before`.
    pub(super) fn fork(
        &mut self,
        before: State,
        hasher: impl FnOnce() -> Result<Hasher, LayerError>,
    ) -> Result<(), LayerError> {
        self.edited |= self.member != SOURCE;
        if self.member != before && self.hasher.is_none() {
            self.flush()?;
            self.hasher = Some(hasher()?);
        }
        Ok(())
    }

    /// A copy of its hash after all bytes so far.
    pub(super) fn fork_hasher(&mut self) -> Result<Option<Hasher>, LayerError> {
        self.flush()?;
        Ok(self.hasher.clone())
    }

    /// Writes the member's headers: `raw` if they are as in the source.
    pub(super) fn write_header(&mut self, raw: &[u8]) -> Result<(), LayerError> {
        match self.member {
            State::Dropped => Ok(()),
            SOURCE => self.write(raw),
            State::Present(_) => {
                let header = std::mem::take(&mut self.header);
                self.write(&header)?;
                self.header = header;
                Ok(())
            }
        }
    }

    /// Takes the next stored bytes of the member at hand, `data` of them data.
    pub(super) fn write_chunk(&mut self, bytes: &[u8], data: usize) -> Result<(), LayerError> {
        match self.member {
            State::Dropped => Ok(()),
            SOURCE => self.write(bytes),
            State::Present(_) if self.content == Content::Stored => self.write_data(&bytes[..data]),
            State::Present(_) => Ok(()),
        }
    }

    /// What it takes from the bytes kept aside instead.
    pub(super) fn kept(&self) -> Option<(u64, u64)> {
        match (self.member, self.content) {
            (State::Present(1..), Content::Kept { start, length }) => Some((start, length)),
            _ => None,
        }
    }

    /// Writes data of an edited member.
    pub(super) fn write_data(&mut self, data: &[u8]) -> Result<(), LayerError> {
        match self.expander.take() {
            None => self.write(data),
            Some(mut expander) => {
                let result = expander.feed(data, &mut |data| self.write(data));
                self.expander = Some(expander);
                result
            }
        }
    }

    /// All data of the member at hand has passed.
    pub(super) fn finish_member(&mut self) -> Result<(), LayerError> {
        if matches!(self.member, State::Present(1..)) {
            if let Some(expander) = self.expander.take() {
                expander.finish(&mut |data| self.write(data))?;
            }
            self.write(&ZEROS[..self.padding])?;
        }
        Ok(())
    }

    /// Takes bytes from behind the last member.
    pub(super) fn write_tail(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.write(bytes)
    }

    /// Ends the tar, and says how long it is. One that was edited always gets its end-of-archive marker, and padding
    /// before it where the source's last member lacks it.
    pub(super) fn finish(&mut self, has_end_marker: bool, before: u64) -> Result<u64, LayerError> {
        let size = self.fork_hasher()?.map_or(before, |hasher| hasher.size());
        if !self.edited || has_end_marker {
            return Ok(size);
        }
        let end = padding(size) + 2 * BLOCK;
        self.write(&ZEROS[..end])?;
        self.flush()?;
        Ok(size)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        if !self.is_live() {
            return Ok(());
        }
        if bytes.len() < DIRECT {
            self.collected.extend_from_slice(bytes);
            if self.collected.len() < COLLECT { Ok(()) } else { self.flush() }
        } else {
            self.flush()?;
            self.pass(bytes)
        }
    }

    fn flush(&mut self) -> Result<(), LayerError> {
        if self.collected.is_empty() {
            return Ok(());
        }
        let collected = std::mem::take(&mut self.collected);
        self.pass(&collected)?;
        self.collected = collected;
        self.collected.clear();
        Ok(())
    }

    fn pass(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        match &mut self.out {
            Some(out) => out.write_all(bytes).map_err(LayerError::Output),
            None => Ok(()),
        }
    }
}
