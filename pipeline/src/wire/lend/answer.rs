//! Layouts of this machine, for who asks: each ask is answered by a task of its own, so that none waits for another.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use occy_proto::v1::lend_answer::Answer;
use occy_proto::v1::lend_ask::What;
use occy_proto::v1::lend_layout_response::Part;
use occy_proto::v1::{
    LendAnswer, LendAsk, LendDone, LendEnd, LendLayoutRequest, LendOpened, LendWriteBlob, LentDestination,
    LentSource, lend_layout_request,
};
use serde_json::{Map, Value};
use tokio::sync::{OnceCell, mpsc, oneshot};
use tokio::task::JoinSet;

use super::line::{Event, Inlet, Line};
use super::{ASKS, ENTRY_MAX, failure};
use crate::blob::{
    BlobError, BlobRef, BlobSummary, BufferPool, ByteCount, ConsumerGone, LayerStream, LayerWriter,
};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::error::Error;
use crate::lent::LentError;
use crate::manifest::{Descriptor, MAX_DOCUMENT};
use crate::output::oci_layout::{LayoutOutput, Place};
use crate::output::{ImageOutput, LayerForm};
use crate::source::oci_layout::LayoutSource;
use crate::task::both;
use crate::wire::{WireError, convert};

/// Chunks between the stream and the layout.
const CHANNEL: usize = 4;
/// Asks that have not ended here: one that was answered may be heard of before its task is gone.
const MOST: usize = 2 * ASKS;

/// What is lent for one call, and what is being answered. Dropped, nothing is answered any more, and what was being stored is not kept.
pub struct Lender {
    ends: Ends,
    out: mpsc::Sender<LendLayoutRequest>,
    open: HashMap<u64, Open>,
    tasks: JoinSet<u64>,
}

/// An ask that is being answered.
struct Open {
    inlet: Inlet,
    /// Taken by the first word that it is not wanted.
    cancel: Option<oneshot::Sender<()>>,
}

#[derive(Clone)]
struct Ends {
    source: Option<Arc<LayoutSource>>,
    destination: Option<Arc<Destination>>,
}

struct Destination {
    output: LayoutOutput,
    names_many: OnceCell<bool>,
    /// What can be named once alone was.
    is_named: AtomicBool,
}

/// How an answer ends.
enum Said {
    Answer(Answer),
    /// Behind its bytes.
    End(BlobSummary, String),
}

impl Lender {
    /// Lends these, and answers into `out`.
    pub fn new(
        source: Option<LayoutSource>,
        output: Option<LayoutOutput>,
        out: mpsc::Sender<LendLayoutRequest>,
    ) -> Self {
        let destination =
            |output| Arc::new(Destination { output, names_many: OnceCell::new(), is_named: false.into() });
        let ends = Ends { source: source.map(Arc::new), destination: output.map(destination) };
        Self { ends, out, open: HashMap::new(), tasks: JoinSet::new() }
    }

    /// What the other side has to know of them beforehand.
    pub fn lent(&self) -> (Option<LentSource>, Option<LentDestination>) {
        let source = self.ends.source.as_ref().map(|source| {
            let (path, choice) = source.called();
            LentSource {
                path: path.display().to_string(),
                tag: choice.tag.clone().unwrap_or_default(),
                digest: choice.digest.as_ref().map(Digest::to_string).unwrap_or_default(),
            }
        });
        let destination = self.ends.destination.as_ref().map(|destination| {
            let output = &destination.output;
            let (path, tag) = output.called();
            let compression = match output.form() {
                LayerForm::Stored { compression } => compression,
                LayerForm::Tar | LayerForm::Nothing => None,
            };
            LentDestination {
                path: path.display().to_string(),
                tag: tag.unwrap_or_default().to_owned(),
                compression: compression.map(|compression| compression.to_string()).unwrap_or_default(),
                manifest_family: convert::manifest_family(output.format()).into(),
            }
        });
        (source, destination)
    }

    /// Takes what is said about what is lent; gives back all else. Waits for nothing.
    pub fn take(&mut self, part: Part) -> Result<Option<Part>, WireError> {
        while let Some(ended) = self.tasks.try_join_next() {
            match ended {
                Ok(id) => drop(self.open.remove(&id)),
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            }
        }
        let (id, event) = match part {
            Part::Ask(LendAsk { id, what }) => {
                self.begin(id, what)?;
                return Ok(None);
            }
            Part::Cancel(id) => {
                if let Some(cancel) = self.open.get_mut(&id).and_then(|open| open.cancel.take()) {
                    // It may have ended just now.
                    let _ = cancel.send(());
                }
                return Ok(None);
            }
            Part::Piece(piece) => (piece.ask, Event::Piece(piece.data)),
            Part::End(end) => (end.ask, Event::End(end)),
            Part::Credit(credit) => (credit.ask, Event::Credit(credit.bytes)),
            other => return Ok(Some(other)),
        };
        // What is no more open was answered while this was on its way.
        self.open.get(&id).map_or(Ok(()), |open| open.inlet.put(event))?;
        Ok(None)
    }

    fn begin(&mut self, id: u64, what: Option<What>) -> Result<(), WireError> {
        if self.open.len() >= MOST || self.open.contains_key(&id) {
            return Err(WireError::elements("it asks for too much at once"));
        }
        let (inlet, mut line) = Line::new(id, self.out.clone());
        let (cancel, cancelled) = oneshot::channel();
        self.open.insert(id, Open { inlet, cancel: Some(cancel) });
        let ends = self.ends.clone();
        self.tasks.spawn(async move {
            // Whatever an answer has done by then is not kept: blobs get their names when they are whole.
            let said = tokio::select! {
                biased;
                Ok(()) = cancelled => Ok(Said::Answer(Answer::Done(LendDone {}))),
                said = ends.answer(what, &mut line) => said,
            };
            let said =
                said.unwrap_or_else(|error| Said::Answer(Answer::Failure(failure(LentError::of(&error)))));
            // Nobody may be left to hear it.
            let _ = match said {
                Said::End(sum, media_type) => line.send_end(&sum, media_type).await,
                Said::Answer(answer) => {
                    let answer = LendAnswer { ask: id, answer: Some(answer) };
                    let part = Some(lend_layout_request::Part::Answer(answer));
                    line.send(LendLayoutRequest { part }).await
                }
            };
            id
        });
        Ok(())
    }
}

impl Ends {
    async fn answer(&self, what: Option<What>, line: &mut Line<LendLayoutRequest>) -> Result<Said, Error> {
        let done = Said::Answer(Answer::Done(LendDone {}));
        match what {
            Some(What::ReadIndex(_)) => {
                let index = self.source()?.index_bytes().await?;
                let digest = Digest::sha256(&index);
                send_document(index, digest, String::new(), line).await
            }
            Some(What::ReadBlob(wanted)) => {
                let digest = convert::digest(&wanted.digest)?;
                let blob = self.source()?.any_blob(&digest, wanted.size).await?;
                send_blob(&blob, digest, line).await
            }
            Some(What::Open(_)) => {
                let names_many = self.destination()?.open().await?;
                Ok(Said::Answer(Answer::Opened(LendOpened { names_many })))
            }
            Some(What::HasBlob(wanted)) => {
                let digest = convert::digest(&wanted.digest)?;
                Ok(Said::Answer(Answer::Found(self.place()?.has(&digest, wanted.size).await?)))
            }
            Some(What::WriteBlob(LendWriteBlob { document, algorithm })) => {
                let (place, algorithm) = (self.place()?, named(&algorithm)?);
                match document {
                    true => receive_document(place.as_ref(), algorithm, line).await?,
                    false => receive_blob(place.as_ref(), algorithm, line).await?,
                }
                Ok(done)
            }
            Some(What::FindNamed(wanted)) => {
                match self.place()?.named(&wanted.annotation, &wanted.name).await? {
                    Some(found) => send_document(found.bytes, found.digest, found.media_type, line).await,
                    None => Ok(Said::Answer(Answer::Found(false))),
                }
            }
            Some(What::Name(name)) => {
                self.destination()?.name(&name.entry, name.by_tag).await?;
                Ok(done)
            }
            None => Err(WireError::elements("it asks for what is not known here").into()),
        }
    }

    fn source(&self) -> Result<&LayoutSource, WireError> {
        self.source.as_deref().ok_or_else(not_lent)
    }

    fn destination(&self) -> Result<&Destination, WireError> {
        self.destination.as_deref().ok_or_else(not_lent)
    }

    /// The destination, when it was opened.
    fn place(&self) -> Result<&Arc<dyn Place>, WireError> {
        let destination = self.destination()?;
        match destination.names_many.get() {
            Some(_) => Ok(destination.output.place()),
            None => Err(WireError::elements("it asks of what it has not opened")),
        }
    }
}

impl Destination {
    async fn open(&self) -> Result<bool, Error> {
        Ok(*self.names_many.get_or_try_init(|| self.opened()).await?)
    }

    async fn opened(&self) -> Result<bool, Error> {
        self.output.place().open().await?;
        Ok(self.output.place().names_many())
    }

    async fn name(&self, entry: &[u8], by_tag: bool) -> Result<(), Error> {
        let Some(&names_many) = self.names_many.get() else {
            return Err(WireError::elements("it names something in what it has not opened").into());
        };
        if entry.len() > ENTRY_MAX {
            return Err(WireError::TooLarge { what: "the entry of index.json", limit: ENTRY_MAX }.into());
        }
        let wrong = |problem: String| WireError::elements(format!("the entry of index.json: {problem}"));
        let entry: Map<String, Value> =
            serde_json::from_slice(entry).map_err(|error| wrong(error.to_string()))?;
        let named = Descriptor::of(&entry.clone().into()).map_err(|error| wrong(error.to_string()))?;
        if !names_many && self.is_named.swap(true, Ordering::Relaxed) {
            return Err(WireError::elements("it names two images in a tar").into());
        }
        // Whoever reads the layout finds what is named there. A tar is put together in the end, and is lost as a whole.
        if names_many && !self.output.place().has(&named.digest, named.size).await? {
            return Err(wrong(format!("{} is not there", named.digest)).into());
        }
        self.output.place().name(entry, by_tag).await
    }
}

fn not_lent() -> WireError {
    WireError::elements("it asks for what is not lent")
}

fn named(name: &str) -> Result<Algorithm, WireError> {
    let known = [Algorithm::Sha256, Algorithm::Sha512];
    let found = known.into_iter().find(|known| known.name() == name);
    found.ok_or_else(|| WireError::elements("it has blobs by an algorithm that is not known here"))
}

async fn send_document(
    bytes: Bytes,
    digest: Digest,
    media_type: String,
    line: &mut Line<LendLayoutRequest>,
) -> Result<Said, Error> {
    let sum = BlobSummary { digest, size: bytes.len() as u64 };
    line.send_bytes(bytes).await?;
    Ok(Said::End(sum, media_type))
}

/// Sends a blob, whose reader checks that it is what it is called.
async fn send_blob(
    blob: &BlobRef,
    digest: Digest,
    line: &mut Line<LendLayoutRequest>,
) -> Result<Said, Error> {
    let mut stream = blob.open().await?;
    let mut size = 0;
    while let Some(bytes) = stream.next().await {
        let bytes = bytes?;
        size += bytes.len() as u64;
        line.send_bytes(bytes).await?;
    }
    Ok(Said::End(BlobSummary { digest, size }, String::new()))
}

async fn receive_document(
    place: &dyn Place,
    algorithm: Algorithm,
    line: &mut Line<LendLayoutRequest>,
) -> Result<(), Error> {
    let mut document = BytesMut::new();
    let mut coming = Coming { line, hasher: Hasher::new(algorithm) };
    loop {
        match coming.next().await? {
            Came::Bytes(bytes) => {
                let actual = (document.len() + bytes.len()) as u64;
                if actual > MAX_DOCUMENT as u64 {
                    return Err(BlobError::Size { expected: MAX_DOCUMENT as u64, actual }.into());
                }
                document.extend_from_slice(&bytes);
            }
            Came::End(end) => return place.put(&coming.whole(&end)?.digest, document.freeze()).await,
        }
    }
}

async fn receive_blob(
    place: &dyn Place,
    algorithm: Algorithm,
    line: &mut Line<LendLayoutRequest>,
) -> Result<(), Error> {
    let (writer, stream) = LayerStream::channel(CHANNEL, BufferPool::default());
    let coming = Coming { line, hasher: Hasher::new(algorithm) };
    let fed = async { feed(coming, writer).await.map_err(Error::from) };
    let stored = place.store(stream.by(algorithm), ByteCount::default());
    let (fed, stored) = tokio::join!(fed, stored);
    both(fed, stored)?;
    Ok(())
}

async fn feed(mut coming: Coming<'_>, writer: LayerWriter) -> Result<(), BlobError> {
    let gone = |ConsumerGone| BlobError::Interrupted;
    loop {
        match coming.next().await? {
            Came::Bytes(bytes) => writer.send(bytes).await.map_err(gone)?,
            Came::End(end) => return writer.finish(coming.whole(&end)?).await.map_err(gone),
        }
    }
}

/// Bytes that come to be stored.
struct Coming<'a> {
    line: &'a mut Line<LendLayoutRequest>,
    hasher: Hasher,
}

enum Came {
    Bytes(Bytes),
    End(LendEnd),
}

impl Coming<'_> {
    async fn next(&mut self) -> Result<Came, BlobError> {
        match self.line.next().await.map_err(host)? {
            Event::Piece(bytes) => {
                self.hasher.update(&bytes);
                self.line.took(bytes.len()).await.map_err(host)?;
                Ok(Came::Bytes(bytes))
            }
            Event::End(end) => Ok(Came::End(end)),
            Event::Credit(_) | Event::Answer(_) => {
                Err(host(WireError::elements("something else comes where bytes are written")))
            }
        }
    }

    /// What has come, if it is what was promised.
    fn whole(&self, end: &LendEnd) -> Result<BlobSummary, BlobError> {
        let expected = convert::digest(&end.digest).map_err(host)?;
        let (size, computed) = (self.hasher.size(), self.hasher.clone().finish());
        match expected == computed && size == end.size {
            true => Ok(BlobSummary { digest: computed, size }),
            false => Err(BlobError::Digest { expected, computed, size }),
        }
    }
}

fn host(error: WireError) -> BlobError {
    BlobError::Host(Box::new(error))
}
