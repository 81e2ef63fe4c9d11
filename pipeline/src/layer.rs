//! One layer through all filters in one pass: read, filter, write, hash.
//!
//! ```text
//! input -> Walker -> filter -> filter -> ... -> output
//!            |          \________\______________ Stream: a tap, and its digest
//!            \__________________________________ digest of every input byte
//! ```
//!
//! Members that no filter edited are copied raw; see [`tar::encode`](crate::tar::encode) for the others. Each byte is
//! hashed once as long as output and input are equal, and once more in each stream that differs.
//!
//! All of this computes without waiting: it belongs on a blocking thread.

mod fuzz;
mod keep;
mod stream;

use std::io::{self, Read, Write};
use std::path::Path;

pub use fuzz::fuzz_layer;
pub use keep::Keep;

use self::keep::Spool;
use self::stream::{SOURCE, State, Stream};
use crate::blob::{BlobError, BlobSummary};
use crate::digest::Hasher;
use crate::filter::{FilterChain, FilterError, LayerFilter, Report, Targets, Verdict, inspect};
use crate::tar::{Limits, Member, TarError, Walker, encode, path};

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is written; filters report, and all digests are computed.
    Observe,
    /// Nothing is written; the pass stops at the first member that a filter edits or drops.
    Scan,
    /// Everything is written, edited or not.
    Rewrite,
    /// Everything is written as it is and hashed; neither the tar nor the filters are looked at.
    Copy,
}

/// How a pass over a layer ended.
#[derive(Debug)]
pub enum PassOutcome {
    /// All of it has passed.
    Done(LayerResult),
    /// [`Mode::Scan`] met the first edit.
    NeedsRewrite {
        /// Of the member that is edited or dropped, in the tar.
        offset: u64,
    },
    /// What was written is void: begin again with this plan.
    NeedsRestart(Plan),
}

/// What a complete pass found.
#[derive(Clone, Debug)]
pub struct LayerResult {
    /// diff_id and size of the tar that was read.
    pub input: BlobSummary,
    /// diff_id and size of the tar that was, or would be, written. Equal to the input's where nothing was edited.
    pub output: BlobSummary,
    /// Whether any filter edited or dropped a member.
    pub edited: bool,
    /// Members of the input, global headers included.
    pub members: u64,
    /// What each filter of the chain found, in its order.
    pub reports: Vec<Option<Report>>,
}

impl LayerResult {
    /// Of a tar that was passed on as it is, with no filter to look at it.
    pub(crate) fn untouched(tar: BlobSummary) -> Self {
        Self { input: tar.clone(), output: tar, edited: false, members: 0, reports: Vec::new() }
    }
}

/// What a pass must know from earlier ones over the same layer: for each filter, the members to keep aside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan(Vec<Targets>);

/// Why a layer could not be passed on. Except for `Output` and `Spool` it is the layer that is at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The tar is corrupt, hostile or incomplete, or its bytes did not come ([`TarError::Read`]).
    #[error("{source} (member {member}, near {path:?})")]
    Tar {
        /// How many members were read before.
        member: u64,
        /// The path of that member or the one before.
        path: String,
        /// What is wrong, and at which offset.
        source: TarError,
    },
    /// A filter gave up.
    #[error("{source} (at offset {offset})")]
    Filter {
        /// Of the member at which it did.
        offset: u64,
        /// Its own words.
        source: FilterError,
    },
    /// An edited member cannot be written.
    #[error("cannot write {path:?}: {source}")]
    Encode {
        /// The member's.
        path: String,
        /// Why.
        source: encode::TooManyRecords,
    },
    /// Sparse files would grow by more than [`Limits::holes`].
    #[error("the sparse file {path:?} and those before it have more than {limit} bytes of holes")]
    Holes {
        /// The member's.
        path: String,
        /// The limit.
        limit: u64,
    },
    /// More data would have to be kept aside than [`Limits::kept`].
    #[error("the hard link target {path:?} and those before it have more than {limit} bytes")]
    Kept {
        /// The member's.
        path: String,
        /// The limit.
        limit: u64,
    },
    /// The output did not take the bytes.
    #[error("cannot write the layer: {0}")]
    Output(#[source] io::Error),
    /// The temporary file failed.
    #[error("cannot keep data of a hard link's target aside: {0}")]
    Spool(#[source] io::Error),
    /// Filters kept asking for another pass.
    #[error("the filters did not settle after {passes} passes over the layer")]
    Restarts {
        /// How many there were.
        passes: usize,
    },
}

impl From<TarError> for LayerError {
    fn from(source: TarError) -> Self {
        Self::Tar { member: 0, path: String::new(), source }
    }
}

impl LayerError {
    /// Bytes of a tar that did not come, outside of a pass.
    pub(crate) fn read(offset: u64, source: io::Error) -> Self {
        TarError::Read { offset, source }.into()
    }

    /// The I/O error that it comes from, if it does.
    fn io(&self) -> Option<&io::Error> {
        match self {
            Self::Tar { source: TarError::Read { source, .. }, .. }
            | Self::Output(source)
            | Self::Spool(source) => Some(source),
            _ => None,
        }
    }

    /// What was wrong with the blob that the tar came from, or with the place that it went to.
    pub fn blob_error(&self) -> Option<&BlobError> {
        self.io()?.get_ref()?.downcast_ref()
    }

    /// Whether this machine is at fault: a temporary file.
    pub fn is_machine(&self) -> bool {
        matches!(self, Self::Spool(_))
    }

    /// Where in the tar it happened, if it is the tar's fault.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Tar { source, .. } => Some(source.offset()),
            Self::Filter { offset, .. } => Some(*offset),
            Self::Encode { .. }
            | Self::Holes { .. }
            | Self::Kept { .. }
            | Self::Output(_)
            | Self::Spool(_)
            | Self::Restarts { .. } => None,
        }
    }
}

impl Plan {
    /// How often a pass may begin again: each time, the filters up to one more have settled.
    pub fn most_restarts(chain: &FilterChain) -> usize {
        chain.filters().len() + 1
    }

    fn targets(&self, filter: usize) -> Targets {
        self.0.get(filter).cloned().unwrap_or_default()
    }
}

/// One pass over one layer.
#[derive(Debug)]
pub struct LayerPass<'a> {
    chain: &'a FilterChain,
    mode: Mode,
    limits: &'a Limits,
    directory: &'a Path,
    plan: Plan,
}

impl<'a> LayerPass<'a> {
    /// Prepares a pass. `directory` is for the temporary file that [`exclude`](crate::filter::exclude) may need.
    pub fn new(chain: &'a FilterChain, mode: Mode, limits: &'a Limits, directory: &'a Path) -> Self {
        Self { chain, mode, limits, directory, plan: Plan::default() }
    }

    /// Begins again with what an earlier pass found to be needed.
    #[must_use]
    pub fn with_plan(self, plan: Plan) -> Self {
        Self { plan, ..self }
    }

    /// Reads the whole layer, uncompressed, and writes it to `out` if the mode says so.
    ///
    /// What was written before an error, [`PassOutcome::NeedsRewrite`] or [`PassOutcome::NeedsRestart`] is void.
    pub fn run(self, input: impl Read, out: &mut dyn Write) -> Result<PassOutcome, LayerError> {
        if self.mode == Mode::Copy {
            let mut walker = Walker::opaque(input);
            let mut stream = Stream::new(Some(out));
            while let Some(bytes) = walker.next_tail()? {
                stream.write_tail(bytes)?;
            }
            stream.finish(true)?;
            let input = summary(walker.into_hasher());
            let reports = self.chain.filters().iter().map(|_| None).collect();
            return Ok(PassOutcome::Done(LayerResult {
                output: input.clone(),
                input,
                edited: false,
                members: 0,
                reports,
            }));
        }
        let mut walker = Walker::new(input, self.limits.clone());
        let mut member = Member::default();
        let mut run = Run::new(&self, out);
        match run.drive(&mut walker, &mut member) {
            Ok(None) => run.finish(walker),
            Ok(Some(outcome)) => Ok(outcome),
            Err(LayerError::Tar { source, .. }) => {
                Err(LayerError::Tar { member: walker.members(), path: name(&member), source })
            }
            Err(error) => Err(error),
        }
    }
}

/// The moving parts of a pass.
struct Run<'a> {
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
    fn new(pass: &'a LayerPass<'_>, out: &'a mut dyn Write) -> Self {
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
            spool: Spool::new(pass.directory, pass.limits.kept),
            holes: 0,
            planning: false,
        }
    }

    /// Reads all members and the tail.
    fn drive<R: Read>(
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
    fn fork<R: Read>(&mut self, walker: &mut Walker<R>) -> Result<(), LayerError> {
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
    fn write<R: Read>(&mut self, walker: &mut Walker<R>, member: &Member) -> Result<(), LayerError> {
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

    fn finish<R: Read>(mut self, walker: Walker<R>) -> Result<PassOutcome, LayerError> {
        for stream in &mut self.streams {
            stream.finish(walker.has_end_marker())?;
        }
        let members = walker.members();
        let input = summary(walker.into_hasher());
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

fn summary(hasher: Hasher) -> BlobSummary {
    let size = hasher.size();
    BlobSummary { digest: hasher.finish(), size }
}

/// A member's path for an error.
fn name(member: &Member) -> String {
    let path = path::printable(member.path());
    match path.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &path[..end]),
        None => path,
    }
}
