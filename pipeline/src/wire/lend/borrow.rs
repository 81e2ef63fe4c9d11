//! Layouts that lie at the other side: each question is an ask, and each answer finds the ask that it is for.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::try_unfold;
use futures_util::{Stream, StreamExt};
use occy_proto::v1::lend_answer::Answer;
use occy_proto::v1::lend_ask::What;
use occy_proto::v1::{
    LendAnswer, LendAsk, LendEnd, LendFindNamed, LendHasBlob, LendLayoutRequest, LendLayoutResponse,
    LendName, LendOpen, LendReadBlob, LendReadIndex, LendWriteBlob, LentDestination, LentSource,
    lend_layout_request, lend_layout_response,
};
use serde_json::{Map, Value};
use tokio::sync::{Notify, OnceCell, OwnedSemaphorePermit, Semaphore, mpsc};

use super::line::{Event, Inlet, Line};
use super::{ASKS, ENTRY_MAX, lent_error};
use crate::blob::{Blob, BlobError, BlobRef, BlobSummary, ByteCount, ByteStream, LayerPiece, LayerStream};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::error::Error;
use crate::layout::Choice;
use crate::manifest::MAX_DOCUMENT;
use crate::output::manifest::ManifestFormat;
use crate::output::oci_layout::{LayoutOptions, LayoutOutput, Place};
use crate::platform::PlatformChoice;
use crate::registry::FetchedManifest;
use crate::source::oci_layout::{LayoutSource, Lent};
use crate::wire::{WireError, convert};

/// How long a caller may say nothing about an ask: it may have to write a large blob to a slow disk first.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a caller lends for one call. Clones are handles on the same.
#[derive(Clone, Debug)]
pub struct Borrowed(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The asks that were not answered yet. None: no more answers come.
    open: Mutex<Option<HashMap<u64, Open>>>,
    /// Something in it is not wanted any more.
    unwanted: Notify,
    last: AtomicU64,
    asks: Arc<Semaphore>,
    out: mpsc::Sender<LendLayoutResponse>,
}

/// An ask that was not answered yet.
#[derive(Debug)]
struct Open {
    inlet: Inlet,
    /// Whether its answer is of use, as far as the caller has not been told.
    is_wanted: bool,
    /// Kept until it is answered, be it wanted or not: what the caller has to do is bounded.
    _place: OwnedSemaphorePermit,
}

/// What hears the caller, for as long as it is polled.
#[derive(Debug)]
pub struct Hearing(Arc<Shared>);

/// What a caller lends that is asked by what goes into `out`.
pub fn borrow(out: mpsc::Sender<LendLayoutResponse>) -> (Borrowed, Hearing) {
    let shared = Arc::new(Shared {
        open: Mutex::new(Some(HashMap::new())),
        unwanted: Notify::new(),
        last: AtomicU64::new(0),
        asks: Arc::new(Semaphore::new(ASKS)),
        out,
    });
    (Borrowed(Arc::clone(&shared)), Hearing(shared))
}

impl Hearing {
    /// Hands on what the caller says, until it says what it may not, or says no more; or its stream breaks with that error. Dropped, all
    /// asks have failed.
    pub async fn hear<E>(
        self,
        mut requests: impl Stream<Item = Result<LendLayoutRequest, E>> + Unpin,
    ) -> Result<WireError, E> {
        let mut unwanted = VecDeque::new();
        loop {
            // No branch loses anything that was taken. What is to be said waits for room, and what is heard does not wait for that.
            tokio::select! {
                request = requests.next() => {
                    let Some(request) = request else { return Ok(WireError::Gone) };
                    if let Err(error) = self.0.take(request?) {
                        return Ok(error);
                    }
                }
                () = self.0.unwanted.notified() => unwanted.extend(self.0.take_unwanted()),
                room = self.0.out.reserve(), if !unwanted.is_empty() => {
                    let Ok(room) = room else { return Ok(WireError::Gone) };
                    let part = unwanted.pop_front().map(lend_layout_response::Part::Cancel);
                    room.send(LendLayoutResponse { part });
                }
            }
        }
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Option<HashMap<u64, Open>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        *self.open() = None;
        self.asks.close();
    }

    /// Something that the caller says, for the ask that it is about.
    fn take(&self, request: LendLayoutRequest) -> Result<(), WireError> {
        use lend_layout_request::Part;
        let (id, event, is_last) = match request.part {
            Some(Part::Start(_)) => return Err(WireError::elements("it starts twice")),
            Some(Part::Answer(LendAnswer { ask, answer: Some(answer) })) => {
                (ask, Event::Answer(answer), true)
            }
            Some(Part::Answer(_)) => return Err(WireError::elements("an answer says nothing")),
            Some(Part::Piece(piece)) => (piece.ask, Event::Piece(piece.data), false),
            Some(Part::End(end)) => (end.ask, Event::End(end), true),
            Some(Part::Credit(credit)) => (credit.ask, Event::Credit(credit.bytes), false),
            // Of a later version.
            None => return Ok(()),
        };
        let mut open = self.open();
        let open = open.as_mut().ok_or(WireError::Gone)?;
        let Some(ask) = open.get(&id) else {
            return Err(WireError::elements(format!("it answers {id}, which was not asked")));
        };
        ask.inlet.put(event)?;
        if is_last {
            open.remove(&id);
        }
        Ok(())
    }

    /// The asks that are not wanted any more, each once.
    fn take_unwanted(&self) -> Vec<u64> {
        let mut open = self.open();
        let unwanted = open.iter_mut().flatten();
        unwanted
            .filter_map(|(id, ask)| (!std::mem::replace(&mut ask.is_wanted, true)).then_some(*id))
            .collect()
    }
}

/// Something that was asked. Dropped before it is answered, it is cancelled.
#[derive(Debug)]
struct Ask {
    line: Line<LendLayoutResponse>,
    shared: Arc<Shared>,
}

impl Drop for Ask {
    fn drop(&mut self) {
        if let Some(open) = self.shared.open().as_mut().and_then(|open| open.get_mut(&self.line.id)) {
            open.is_wanted = false;
            self.shared.unwanted.notify_one();
        }
    }
}

impl Ask {
    /// What comes next. A failure is the caller's own.
    async fn next(&mut self) -> Result<Event, BlobError> {
        match patiently(self.line.next()).await? {
            Event::Answer(answer) => Ok(Event::Answer(no_failure(answer)?)),
            event => Ok(event),
        }
    }

    async fn answer(mut self) -> Result<Answer, BlobError> {
        match self.next().await? {
            Event::Answer(answer) => Ok(answer),
            _ => Err(host(strange())),
        }
    }

    async fn done(self) -> Result<(), BlobError> {
        match self.answer().await? {
            Answer::Done(_) => Ok(()),
            _ => Err(host(strange())),
        }
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        match patiently(self.line.send_bytes(bytes)).await? {
            None => Ok(()),
            Some(answer) => Err(no_failure(answer).err().unwrap_or_else(|| host(strange()))),
        }
    }

    async fn send_end(&self, sum: &BlobSummary) -> Result<(), BlobError> {
        self.line.send_end(sum, String::new()).await.map_err(host)
    }

    /// The rest of a small document, and how it ended.
    async fn document(mut self, first: Option<Event>) -> Result<(Bytes, Digest, String), BlobError> {
        let mut document = BytesMut::new();
        let mut next = first;
        loop {
            let event = match next.take() {
                Some(event) => event,
                None => self.next().await?,
            };
            match event {
                Event::Piece(bytes) => {
                    if document.len() + bytes.len() > MAX_DOCUMENT {
                        let (expected, actual) = (MAX_DOCUMENT as u64, (document.len() + bytes.len()) as u64);
                        return Err(BlobError::Size { expected, actual });
                    }
                    document.extend_from_slice(&bytes);
                    self.line.took(bytes.len()).await.map_err(host)?;
                }
                Event::End(LendEnd { digest, size, media_type, .. }) => {
                    let said = parsed(&digest)?;
                    let mut hasher = Hasher::new(said.algorithm());
                    hasher.update(&document);
                    whole(hasher, &said, Some(size))?;
                    return Ok((document.freeze(), said, media_type));
                }
                _ => return Err(host(strange())),
            }
        }
    }
}

/// Whoever lends and says nothing keeps a worker waiting.
async fn patiently<T>(heard: impl Future<Output = Result<T, WireError>>) -> Result<T, BlobError> {
    let silent = |_| host(WireError::elements(format!("nothing was heard for {PATIENCE:?}")));
    tokio::time::timeout(PATIENCE, heard).await.map_err(silent)?.map_err(host)
}

fn no_failure(answer: Answer) -> Result<Answer, BlobError> {
    match answer {
        Answer::Failure(failure) => Err(lent_error(&failure).into()),
        answer => Ok(answer),
    }
}

fn strange() -> WireError {
    WireError::elements("it answers something else than what was asked")
}

fn host(error: WireError) -> BlobError {
    BlobError::Host(Box::new(error))
}

fn parsed(digest: &str) -> Result<Digest, BlobError> {
    convert::digest(digest).map_err(host)
}

/// Fails where the bytes that came are not those that were promised.
fn whole(hasher: Hasher, digest: &Digest, size: Option<u64>) -> Result<(), BlobError> {
    let actual = hasher.size();
    if let Some(expected) = size.filter(|&expected| expected != actual) {
        return Err(BlobError::Size { expected, actual });
    }
    let computed = hasher.finish();
    match computed == *digest {
        true => Ok(()),
        false => Err(BlobError::Digest { expected: digest.clone(), computed, size: actual }),
    }
}

impl Borrowed {
    /// The image that is meant in the layout that is lent as the source, in the variant for `platform`.
    pub fn source(&self, lent: LentSource, platform: PlatformChoice) -> Result<LayoutSource, WireError> {
        let LentSource { path, tag, digest } = lent;
        let digest = match digest.as_str() {
            "" => None,
            text => Some(convert::digest(text)?),
        };
        let choice = Choice { tag: Some(tag).filter(|tag| !tag.is_empty()), digest };
        Ok(LayoutSource::lent(Arc::new(self.clone()), path.into(), choice, platform))
    }

    /// The layout that is lent as the destination. What is said of it goes before these options.
    pub fn output(
        &self,
        lent: &LentDestination,
        mut options: LayoutOptions,
    ) -> Result<LayoutOutput, WireError> {
        options.tag = Some(lent.tag.clone()).filter(|tag| !tag.is_empty());
        if !lent.compression.is_empty() {
            let compression = lent.compression.parse();
            let fail = |error| WireError::elements(format!("compression: {error}"));
            options.compression = Some(compression.map_err(fail)?);
        }
        let format = convert::manifest_format(lent.manifest_family());
        if format != ManifestFormat::Keep {
            options.format = format;
        }
        let place = LentPlace { borrowed: self.clone(), names_many: OnceCell::new() };
        Ok(LayoutOutput::at(Arc::new(place), lent.path.clone().into(), options))
    }

    /// Asks for something, when there is room for it.
    async fn ask(&self, what: What) -> Result<Ask, BlobError> {
        let gone = || host(WireError::Gone);
        let shared = &self.0;
        let place = Arc::clone(&shared.asks).acquire_owned().await.map_err(|_| gone())?;
        let room = shared.out.reserve().await.map_err(|_| gone())?;
        let id = shared.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (inlet, line) = Line::new(id, shared.out.clone());
        let ask = Open { inlet, is_wanted: true, _place: place };
        shared.open().as_mut().ok_or_else(gone)?.insert(id, ask);
        let part = lend_layout_response::Part::Ask(LendAsk { id, what: Some(what) });
        room.send(LendLayoutResponse { part: Some(part) });
        Ok(Ask { line, shared: Arc::clone(shared) })
    }
}

#[async_trait::async_trait]
impl Lent for Borrowed {
    async fn index(&self) -> Result<Bytes, Error> {
        let ask = self.ask(What::ReadIndex(LendReadIndex {})).await?;
        let (index, ..) = ask.document(None).await?;
        Ok(index)
    }

    fn blob(&self, digest: &Digest, size: Option<u64>) -> BlobRef {
        Arc::new(LentBlob { borrowed: self.clone(), digest: digest.clone(), size })
    }
}

/// A blob of the source.
#[derive(Debug)]
struct LentBlob {
    borrowed: Borrowed,
    digest: Digest,
    size: Option<u64>,
}

/// One that is being read.
struct Reading {
    ask: Ask,
    /// What came before anybody read it.
    first: Option<Event>,
    hasher: Hasher,
    digest: Digest,
    size: Option<u64>,
}

#[async_trait::async_trait]
impl Blob for LentBlob {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let digest = self.digest.to_string();
        let mut ask = self.borrowed.ask(What::ReadBlob(LendReadBlob { digest, size: self.size })).await?;
        // That it is not there is told now, as by a file.
        let first = Some(ask.next().await?);
        let hasher = Hasher::new(self.digest.algorithm());
        let reading = Reading { ask, first, hasher, digest: self.digest.clone(), size: self.size };
        Ok(try_unfold(Some(reading), Reading::next).boxed())
    }

    fn size(&self) -> Option<u64> {
        self.size
    }

    fn identity(&self) -> String {
        self.digest.to_string()
    }
}

impl Reading {
    async fn next(reading: Option<Self>) -> Result<Option<(Bytes, Option<Self>)>, BlobError> {
        let Some(mut reading) = reading else { return Ok(None) };
        let event = match reading.first.take() {
            Some(event) => event,
            None => reading.ask.next().await?,
        };
        match event {
            Event::Piece(bytes) => {
                reading.hasher.update(&bytes);
                if reading.size.is_some_and(|expected| reading.hasher.size() >= expected) {
                    // Whoever counts them has a whole blob with the last ones: these have to be right.
                    whole(reading.hasher.clone(), &reading.digest, reading.size)?;
                }
                reading.ask.line.took(bytes.len()).await.map_err(host)?;
                Ok(Some((bytes, Some(reading))))
            }
            Event::End(end) => {
                whole(reading.hasher, &reading.digest, reading.size.or(Some(end.size)))?;
                Ok(None)
            }
            _ => Err(host(strange())),
        }
    }
}

/// The layout that is written.
#[derive(Debug)]
struct LentPlace {
    borrowed: Borrowed,
    names_many: OnceCell<bool>,
}

impl LentPlace {
    async fn opened(&self) -> Result<bool, BlobError> {
        match self.borrowed.ask(What::Open(LendOpen {})).await?.answer().await? {
            Answer::Opened(opened) => Ok(opened.names_many),
            _ => Err(host(strange())),
        }
    }

    async fn write(&self, document: bool, algorithm: Algorithm) -> Result<Ask, BlobError> {
        let algorithm = algorithm.name().to_owned();
        self.borrowed.ask(What::WriteBlob(LendWriteBlob { document, algorithm })).await
    }
}

#[async_trait::async_trait]
impl Place for LentPlace {
    async fn open(&self) -> Result<(), Error> {
        let opened = self.names_many.get_or_try_init(|| self.opened());
        opened.await?;
        Ok(())
    }

    fn names_many(&self) -> bool {
        *self.names_many.get().expect("it is opened before anything else")
    }

    async fn has(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        let ask = What::HasBlob(LendHasBlob { digest: digest.to_string(), size });
        match self.borrowed.ask(ask).await?.answer().await? {
            Answer::Found(found) => Ok(found),
            _ => Err(strange().into()),
        }
    }

    async fn store(&self, mut stream: LayerStream, progress: ByteCount) -> Result<BlobSummary, Error> {
        let mut ask = self.write(false, stream.algorithm()).await?;
        loop {
            match stream.next().await? {
                LayerPiece::Data(bytes) => {
                    let size = bytes.len() as u64;
                    ask.send(bytes).await?;
                    progress.add(size);
                }
                LayerPiece::End(sum) => {
                    ask.send_end(&sum).await?;
                    ask.done().await?;
                    return Ok(sum);
                }
            }
        }
    }

    async fn put(&self, digest: &Digest, bytes: Bytes) -> Result<(), Error> {
        let sum = BlobSummary { digest: digest.clone(), size: bytes.len() as u64 };
        let mut ask = self.write(true, digest.algorithm()).await?;
        ask.send(bytes).await?;
        ask.send_end(&sum).await?;
        Ok(ask.done().await?)
    }

    async fn named(&self, annotation: &str, name: &str) -> Result<Option<FetchedManifest>, Error> {
        let (annotation, name) = (annotation.to_owned(), name.to_owned());
        let mut ask = self.borrowed.ask(What::FindNamed(LendFindNamed { annotation, name })).await?;
        let first = match ask.next().await? {
            Event::Answer(Answer::Found(false)) => return Ok(None),
            event => event,
        };
        let (bytes, digest, media_type) = ask.document(Some(first)).await?;
        Ok(Some(FetchedManifest { bytes, media_type, digest }))
    }

    async fn name(&self, entry: Map<String, Value>, by_tag: bool) -> Result<(), Error> {
        let entry = serde_json::to_vec(&entry).expect("a JSON map can be written");
        if entry.len() > ENTRY_MAX {
            return Err(WireError::TooLarge { what: "the entry of index.json", limit: ENTRY_MAX }.into());
        }
        let ask = What::Name(LendName { entry: entry.into(), by_tag });
        Ok(self.borrowed.ask(ask).await?.done().await?)
    }
}
