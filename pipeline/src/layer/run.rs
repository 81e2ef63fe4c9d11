//! The moving parts of a pass.

use std::io::{BufRead, Write};

use super::keep::Spool;
use super::stream::{SOURCE, State, Stream};
use super::{LayerError, LayerPass, LayerResult, Mode, PassOutcome, Plan};
use crate::blob::BlobSummary;
use crate::digest::{Digest, Hasher};
use crate::filter::{LayerFilter, Report, Verdict, inspect};
use crate::tar::{Limits, Member, Walker, path};

/// A pass over one layer.
pub(super) struct Run<'a> {
    mode: Mode,
    limits: &'a Limits,
    stages: Vec<Stage>,
    /// The taps of the chain in its order, and the output.
    streams: Vec<Stream<'a>>,
    spool: Spool<'a>,
    holes: u64,
    /// A filter asked for a restart.
    planning: bool,
}

struct Stage {
    layer: Box<dyn LayerFilter>,
    /// Its place among the streams.
    tap: Option<usize>,
}

impl<'a> Run<'a> {
    pub(super) fn new(pass: &'a LayerPass<'_>, out: &'a mut dyn Write) -> Self {
        let mut streams = Vec::new();
        let stages = pass
            .chain
            .filters()
            .iter()
            .enumerate()
            .map(|(index, filter)| Stage {
                layer: filter.layer(&pass.plan.targets(index), pass.limits),
                tap: filter.taps().then(|| {
                    streams.push(Stream::new(None));
                    streams.len() - 1
                }),
            })
            .collect();
        streams.push(Stream::new((pass.mode == Mode::Rewrite).then_some(out)));
        Self {
            mode: pass.mode,
            limits: pass.limits,
            stages,
            streams,
            spool: Spool::new(pass.spools, pass.limits.kept),
            holes: 0,
            planning: false,
        }
    }

    /// Reads all members and the tail.
    pub(super) fn drive<R: BufRead>(
        &mut self,
        walker: &mut Walker<R>,
        member: &mut Member,
    ) -> Result<Option<PassOutcome>, LayerError> {
        while walker.read_member(member)? {
            self.filter(member)?;
            if self.planning {
                continue;
            }
            if self.mode == Mode::Scan && self.streams.iter().any(|stream| stream.member != SOURCE) {
                return Ok(Some(PassOutcome::NeedsRewrite { offset: member.offset() }));
            }
            self.fork(walker)?;
            self.write(walker, member)?;
        }
        if self.planning {
            let plan = Plan(self.stages.drain(..).map(|stage| stage.layer.finish().targets).collect());
            return Ok(Some(PassOutcome::NeedsRestart(plan)));
        }
        while let Some(bytes) = walker.next_tail()? {
            for stream in &mut self.streams {
                stream.write_tail(bytes)?;
            }
        }
        Ok(None)
    }

    /// Shows the member to the filters, and notes what it is in each stream.
    fn filter(&mut self, member: &mut Member) -> Result<(), LayerError> {
        for stream in &mut self.streams {
            stream.member = State::Dropped;
        }
        for stage in &mut self.stages {
            let verdict = stage
                .layer
                .member(member, self.spool.keep())
                .map_err(|source| LayerError::Filter { offset: member.offset(), source })?;
            match verdict {
                Verdict::Keep => {}
                Verdict::Restart => self.planning = true,
                Verdict::Drop => return Ok(()),
            }
            if let Some(tap) = stage.tap.filter(|_| !self.planning) {
                self.streams[tap].note(member, self.limits, &mut self.holes)?;
            }
        }
        match self.streams.last_mut() {
            Some(output) if !self.planning => output.note(member, self.limits, &mut self.holes),
            _ => Ok(()),
        }
    }

    /// Parts streams that this member makes different.
    fn fork<R: BufRead>(&mut self, walker: &mut Walker<R>) -> Result<(), LayerError> {
        let mut before = SOURCE;
        for index in 0..self.streams.len() {
            let (earlier, rest) = self.streams.split_at_mut(index);
            let stream = &mut rest[0];
            stream.fork(before, || {
                for earlier in earlier.iter_mut().rev() {
                    if let Some(hasher) = earlier.fork_hasher()? {
                        return Ok(hasher);
                    }
                }
                Ok(walker.fork_hasher())
            })?;
            before = stream.member;
        }
        Ok(())
    }

    /// Passes the member's bytes to all streams that need them.
    fn write<R: BufRead>(&mut self, walker: &mut Walker<R>, member: &Member) -> Result<(), LayerError> {
        let kept = self.spool.take_request();
        if kept && !self.spool.allows(member.stored_size()) {
            return Err(LayerError::Kept { path: name(member), limit: self.limits.kept });
        }
        if !kept && !self.streams.iter().any(Stream::is_live) {
            return Ok(());
        }
        for stream in &mut self.streams {
            stream.write_header(walker.header())?;
        }
        while let Some(chunk) = walker.next_chunk()? {
            for stream in &mut self.streams {
                stream.write_chunk(chunk.bytes, chunk.data)?;
            }
            if kept {
                self.spool.append(chunk.data()).map_err(LayerError::Spool)?;
            }
        }
        for stream in &mut self.streams {
            if let Some((start, length)) = stream.kept() {
                let mut buffer = vec![0; 64 * 1024];
                let mut done = 0;
                while done < length {
                    let size =
                        usize::try_from(length - done).map_or(buffer.len(), |left| left.min(buffer.len()));
                    self.spool.read(start + done, &mut buffer[..size]).map_err(LayerError::Spool)?;
                    stream.write_data(&buffer[..size])?;
                    done += size as u64;
                }
            }
            stream.finish_member()?;
        }
        Ok(())
    }

    /// Ends the pass over a tar, whose digest may be `known` and was not computed then.
    pub(super) fn finish<R: BufRead>(
        mut self,
        walker: Walker<R>,
        known: Option<Digest>,
    ) -> Result<PassOutcome, LayerError> {
        let mut size = 0;
        for stream in &mut self.streams {
            size = stream.finish(walker.has_end_marker(), size)?;
        }
        let members = walker.members();
        let input = match known {
            Some(digest) => BlobSummary { digest, size: walker.offset() },
            None => summary(walker.into_hasher()),
        };
        let mut summaries = Vec::new();
        let mut before = input.clone();
        for stream in &mut self.streams {
            if let Some(hasher) = stream.fork_hasher()? {
                before = summary(hasher);
            }
            summaries.push((before.clone(), stream.is_edited()));
        }
        let reports = self
            .stages
            .into_iter()
            .map(|stage| match stage.tap {
                Some(tap) => {
                    let (BlobSummary { digest, size }, edited) = summaries[tap].clone();
                    Some(Report::Inspect(inspect::Record { diff_id: digest, size, edited }))
                }
                None => stage.layer.finish().report,
            })
            .collect();
        let (output, edited) = summaries.pop().expect("the output is always a stream");
        Ok(PassOutcome::Done(LayerResult { input, output, edited, members, reports }))
    }
}

/// Passes everything on as it is, past so many filters.
pub(super) fn copy<R: BufRead>(
    mut walker: Walker<R>,
    out: &mut dyn Write,
    filters: usize,
) -> Result<PassOutcome, LayerError> {
    let mut stream = Stream::new(Some(out));
    while let Some(bytes) = walker.next_tail()? {
        stream.write_tail(bytes)?;
    }
    stream.finish(true, 0)?;
    let tar = summary(walker.into_hasher());
    Ok(PassOutcome::Done(LayerResult { reports: vec![None; filters], ..LayerResult::untouched(tar) }))
}

fn summary(hasher: Hasher) -> BlobSummary {
    let size = hasher.size();
    BlobSummary { digest: hasher.finish(), size }
}

/// A member's path for an error.
pub(super) fn name(member: &Member) -> String {
    let path = path::printable(member.path());
    match path.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &path[..end]),
        None => path,
    }
}
