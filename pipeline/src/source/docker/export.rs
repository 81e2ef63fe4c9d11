//! An export on its way: the members of the saved tar that an Engine sends, each layer handed on while it arrives.
//!
//! One task reads the export from front to back. A layer whose place its name tells is offered as it comes, and the task waits
//! for its reader: a slow destination slows the Engine. A layer that only its bytes can tell the place of goes to a spool
//! first. Who wants a layer a second time gets it from its spool, or from an export of its own.

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::io::StreamReader;

use super::names::{Names, Role};
use crate::blob::{Blob, BlobError, ByteStream, CHUNK};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::engine::{Engine, EngineError, failure};
use crate::error::Error;
use crate::manifest::MAX_DOCUMENT;
use crate::source::arrivals::Arrival;
use crate::source::saved_tar::clean;
use crate::spool::{FileRegion, Spool, SpoolDir};

/// Chunks of a layer that wait for their reader: about a megabyte.
const CHANNEL: usize = 4;
/// An Engine that fails in the middle of an export writes the reason where the tar should go on. It is looked for in so many
/// of the last bytes.
const LAST_WORDS: usize = 4096;

/// What is exported, and where each of its layers is. Shared by the task that reads the export and the layers' openers.
#[derive(Debug)]
pub(super) struct Exported {
    pub(super) engine: Engine,
    /// As the Engine is asked for it: by Id, which always means the same image.
    pub(super) id: String,
    /// As messages call it.
    pub(super) name: String,
    pub(super) diff_ids: Vec<Digest>,
    pub(super) names: Names,
    pub(super) spools: SpoolDir,
    places: Mutex<HashMap<usize, Place>>,
}

/// A layer that has arrived.
#[derive(Debug)]
struct Place {
    size: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// It is arriving, and nobody reads it yet.
    Live(mpsc::Receiver<Piece>),
    /// It was kept.
    Spooled(FileRegion),
    /// It went by.
    Passed,
}

/// What a live layer consists of. Its end is explicit: a task that was stopped never looks like one.
#[derive(Debug)]
enum Piece {
    Data(Bytes),
    Failed(BlobError),
    End,
}

/// Gives up a live layer that nobody has begun to read.
struct Release(Arc<Exported>, usize);

/// A task that ends with its owner.
#[derive(Debug)]
pub(super) struct Task<T>(JoinHandle<T>);

impl<T: Send + 'static> Task<T> {
    pub(super) fn spawn(work: impl Future<Output = T> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }

    pub(super) async fn join(mut self) -> T {
        match (&mut self.0).await {
            Ok(value) => value,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Exported {
    pub(super) fn new(
        engine: Engine,
        id: String,
        name: String,
        config: Option<Digest>,
        diff_ids: Vec<Digest>,
        spools: SpoolDir,
    ) -> Self {
        let names = Names::new(config, &diff_ids);
        Self { engine, id, name, diff_ids, names, spools, places: Mutex::default() }
    }

    /// Reads the whole export, offers each layer as it comes, and gives the config's bytes.
    pub(super) async fn read(
        self: Arc<Self>,
        config: Digest,
        arrivals: mpsc::Sender<Arrival>,
    ) -> Result<Bytes, Error> {
        let mut members = Members::open(&self).await?;
        let mut document = None;
        while let Some((role, mut member)) = members.next().await? {
            match role {
                Role::Config => {
                    let bytes = member.document().await?;
                    let computed = Digest::sha256(&bytes);
                    if computed != config {
                        let image = self.name.clone();
                        return Err(EngineError::Damaged { image, expected: config, computed }.into());
                    }
                    document = Some(bytes);
                }
                Role::Layer(index) if !self.has(index) => {
                    let (sender, receiver) = mpsc::channel(CHANNEL);
                    self.put(index, member.size, State::Live(receiver));
                    if arrivals.send(Arrival::held(index, Release(Arc::clone(&self), index))).await.is_err() {
                        return Err(BlobError::Interrupted.into());
                    }
                    member.send_to(&sender).await?;
                }
                Role::SomeLayer => {
                    let (region, digest) = member.spool(&self).await?;
                    if let Some(index) = self.names.layer(&digest).filter(|&index| !self.has(index)) {
                        self.put(index, member.size, State::Spooled(region));
                        if arrivals.send(Arrival::held(index, ())).await.is_err() {
                            return Err(BlobError::Interrupted.into());
                        }
                    }
                }
                Role::Layer(_) | Role::Description(_) | Role::Other => {}
            }
        }
        let image = || self.name.clone();
        let missing = (0..self.diff_ids.len()).find(|&index| !self.has(self.first(index)));
        if let Some(index) = missing {
            let diff_id = self.diff_ids[index].clone();
            return Err(EngineError::NoLayer { image: image(), index, diff_id }.into());
        }
        document.ok_or_else(|| EngineError::NoConfig { image: image(), digest: config }.into())
    }

    /// Sends one layer of a new export.
    async fn send_again(self: Arc<Self>, index: usize, sender: mpsc::Sender<Piece>) {
        let result = async {
            let mut members = Members::open(&self).await?;
            while let Some((role, mut member)) = members.next().await? {
                if role == Role::Layer(index) {
                    return member.send_to(&sender).await;
                }
            }
            let (image, diff_id) = (self.name.clone(), self.diff_ids[index].clone());
            Err(EngineError::NoLayer { image, index, diff_id }.into())
        };
        match result.await {
            // Whoever reads the layer has been told of it, or is gone.
            Ok(()) | Err(Error::Blob(BlobError::Interrupted)) => {}
            Err(Error::Blob(error)) => drop(sender.send(Piece::Failed(error)).await),
            Err(Error::Engine(error)) => drop(sender.send(Piece::Failed(error.into())).await),
            Err(error) => unreachable!("an export fails by the engine or by a spool: {error}"),
        }
    }

    /// The first place of the layer that stands at `index`: what stands twice in an image is sent once.
    pub(super) fn first(&self, index: usize) -> usize {
        self.names.layer(&self.diff_ids[index]).expect("every diff_id has its place")
    }

    pub(super) fn size(&self, index: usize) -> Option<u64> {
        self.places().get(&index).map(|place| place.size)
    }

    fn has(&self, index: usize) -> bool {
        self.places().contains_key(&index)
    }

    fn put(&self, index: usize, size: u64, state: State) {
        self.places().insert(index, Place { size, state });
    }

    fn places(&self) -> MutexGuard<'_, HashMap<usize, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_a_tar(&self, reason: String) -> Error {
        EngineError::NotATar { image: self.name.clone(), reason }.into()
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if let Some(place) = self.0.places().get_mut(&self.1)
            && matches!(place.state, State::Live(_))
        {
            place.state = State::Passed;
        }
    }
}

/// A layer of an export: live the first time, if it is opened when it comes; else out of its spool or a new export.
#[derive(Clone, Debug)]
pub(super) struct ExportedLayer {
    pub(super) exported: Arc<Exported>,
    pub(super) index: usize,
}

#[async_trait::async_trait]
impl Blob for ExportedLayer {
    async fn open(&self) -> Result<ByteStream, BlobError> {
        let spooled = match self.exported.places().get_mut(&self.index) {
            Some(Place { state: State::Spooled(region), .. }) => Some(region.clone()),
            Some(place) => match std::mem::replace(&mut place.state, State::Passed) {
                State::Live(receiver) => return Ok(pieces(receiver, None)),
                _ => None,
            },
            None => None,
        };
        if let Some(region) = spooled {
            return region.open().await;
        }
        tracing::info!(layer = self.index + 1, image = self.exported.name, "exporting the image again");
        let (sender, receiver) = mpsc::channel(CHANNEL);
        let task = Task::spawn(Arc::clone(&self.exported).send_again(self.index, sender));
        Ok(pieces(receiver, Some(task)))
    }

    fn size(&self) -> Option<u64> {
        self.exported.size(self.index)
    }

    fn identity(&self) -> String {
        self.exported.diff_ids[self.index].to_string()
    }
}

/// The bytes of a layer, as long as `task` lives if it is one of its own that sends them.
fn pieces(receiver: mpsc::Receiver<Piece>, task: Option<Task<()>>) -> ByteStream {
    stream::try_unfold((receiver, task), |(mut receiver, task)| async move {
        match receiver.recv().await {
            Some(Piece::Data(bytes)) => Ok(Some((bytes, (receiver, task)))),
            Some(Piece::End) => Ok(None),
            Some(Piece::Failed(error)) => Err(error),
            None => Err(BlobError::Interrupted),
        }
    })
    .boxed()
}

pub(super) type Body = StreamReader<stream::BoxStream<'static, std::io::Result<Bytes>>, Bytes>;

/// The last bytes of an export.
#[derive(Clone, Debug, Default)]
pub(super) struct LastWords(Arc<Mutex<Vec<u8>>>);

/// The members of an export, one after the other.
struct Members<'a> {
    exported: &'a Exported,
    names: Names,
    entries: tokio_tar::Entries<Body>,
    last_words: LastWords,
}

/// A member that is being read.
struct Member<'a> {
    exported: &'a Exported,
    entry: tokio_tar::Entry<tokio_tar::Archive<Body>>,
    size: u64,
    last_words: LastWords,
}

impl<'a> Members<'a> {
    async fn open(exported: &'a Exported) -> Result<Self, Error> {
        let (body, last_words) = begin(&exported.engine, &exported.id).await?;
        let mut archive = tokio_tar::Archive::new(body);
        let entries = archive.entries().map_err(|error| exported.not_a_tar(error.to_string()))?;
        Ok(Self { exported, names: exported.names.clone(), entries, last_words })
    }

    /// The next regular member. Links are passed over: what they lead to is sent as itself.
    async fn next(&mut self) -> Result<Option<(Role, Member<'a>)>, Error> {
        while let Some(entry) = self.entries.next().await {
            let entry = entry.map_err(|error| self.last_words.explain(&self.exported.name, error))?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let path = entry.path_bytes().map_err(|error| self.exported.not_a_tar(error.to_string()))?;
            let path = clean(&String::from_utf8_lossy(&path));
            let size = entry.effective_size();
            let last_words = self.last_words.clone();
            let mut member = Member { exported: self.exported, entry, size, last_words };
            let role = self.names.role(&path);
            if let Role::Description(id) = &role
                && size <= MAX_DOCUMENT as u64
            {
                self.names.describe(id, &member.document().await?);
            }
            return Ok(Some((role, member)));
        }
        Ok(None)
    }
}

impl Member<'_> {
    /// The whole of a small member.
    async fn document(&mut self) -> Result<Bytes, Error> {
        if self.size > MAX_DOCUMENT as u64 {
            return Err(BlobError::Size { expected: MAX_DOCUMENT as u64, actual: self.size }.into());
        }
        let mut document = BytesMut::new();
        while let Some(bytes) = self.chunk().await? {
            document.extend_from_slice(&bytes);
        }
        Ok(document.freeze())
    }

    /// Passes the member on, for as long as there is somebody who reads it.
    async fn send_to(&mut self, sender: &mpsc::Sender<Piece>) -> Result<(), Error> {
        loop {
            let piece = match self.chunk().await {
                Ok(Some(bytes)) => Piece::Data(bytes),
                Ok(None) => Piece::End,
                Err(Error::Engine(error)) => {
                    // If nobody reads the layer any more, the error is the export's.
                    return match sender.send(Piece::Failed(error.into())).await {
                        Ok(()) => Err(BlobError::Interrupted.into()),
                        Err(mpsc::error::SendError(Piece::Failed(error))) => Err(error.into()),
                        Err(_) => unreachable!("a piece comes back as it was sent"),
                    };
                }
                Err(error) => return Err(error),
            };
            let is_last = matches!(piece, Piece::End);
            if sender.send(piece).await.is_err() || is_last {
                return Ok(());
            }
        }
    }

    /// Keeps the member, and tells what its bytes hash to.
    async fn spool(&mut self, exported: &Exported) -> Result<(FileRegion, Digest), Error> {
        let fail = |source| {
            let what = format!("failed to keep a layer of {}", exported.name);
            Error::Blob(BlobError::Io { what, source })
        };
        let mut spool = exported.spools.create().map_err(fail)?;
        let mut hasher = Hasher::new(Algorithm::Sha256);
        while let Some(bytes) = self.chunk().await? {
            hasher.update(&bytes);
            spool = tokio::task::spawn_blocking(move || spool.write_all(&bytes).map(|()| spool))
                .await
                .expect("writing a file does not panic")
                .map_err(fail)?;
        }
        let digest = hasher.finish();
        let spool: Arc<Spool> = Arc::new(spool);
        let size = spool.size();
        let name = format!("{}: {digest}", exported.name);
        Ok((FileRegion::of_spool(spool, name, 0, size).map_err(fail)?, digest))
    }

    /// The next bytes; None behind the last.
    async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        let mut bytes = BytesMut::with_capacity(CHUNK);
        while bytes.len() < CHUNK {
            let room = (&mut self.entry).take((CHUNK - bytes.len()) as u64).read_buf(&mut bytes).await;
            if room.map_err(|error| self.last_words.explain(&self.exported.name, error))? == 0 {
                break;
            }
        }
        Ok((!bytes.is_empty()).then(|| bytes.freeze()))
    }
}

/// Asks for an export.
pub(super) async fn begin(engine: &Engine, image: &str) -> Result<(Body, LastWords), EngineError> {
    let last_words = LastWords::default();
    let body = listening(engine.export(image).await?, last_words.clone());
    Ok((StreamReader::new(body.map_err(std::io::Error::other).boxed()), last_words))
}

/// Remembers the last bytes of a body.
fn listening(
    body: impl Stream<Item = Result<Bytes, EngineError>>,
    last_words: LastWords,
) -> impl Stream<Item = Result<Bytes, EngineError>> {
    body.inspect_ok(move |bytes| {
        let mut last = last_words.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = &bytes[bytes.len().saturating_sub(LAST_WORDS)..];
        let kept = last.len().min(LAST_WORDS - new.len());
        let dropped = last.len() - kept;
        last.drain(..dropped);
        last.extend_from_slice(new);
    })
}

impl LastWords {
    /// What an error of the tar's reader means: the connection's own, one that the Engine wrote into the tar, or a broken tar.
    pub(super) fn explain(&self, image: &str, error: std::io::Error) -> Error {
        let error = match error.downcast::<EngineError>() {
            Ok(error) => return error.into(),
            Err(error) => error,
        };
        // The tar's reader wraps what it got, with words about the place.
        let mut cause: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|inner| inner as _);
        while let Some(at) = cause {
            if let Some(EngineError::Broken { what, cause }) = at.downcast_ref() {
                return EngineError::Broken { what: what.clone(), cause: cause.clone() }.into();
            }
            cause = match at.downcast_ref::<std::io::Error>() {
                Some(io) => io.get_ref().map(|inner| inner as _),
                None => at.source(),
            };
        }
        let (image, reason) = (image.to_owned(), error.to_string());
        self.failure(&image).unwrap_or(EngineError::NotATar { image, reason }).into()
    }

    /// What the Engine wrote where the tar should have gone on, if it wrote anything.
    pub(super) fn failure(&self, image: &str) -> Option<EngineError> {
        let words = words(&self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        Some(EngineError::Failed { what: format!("export {image}"), words })
    }
}

/// The Engine's own words at the end of what it sent, if it sent any.
fn words(end: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(end);
    let start = text.rfind(r#"{"errorDetail""#).or_else(|| text.rfind(r#"{"message""#))?;
    let message: Value = serde_json::Deserializer::from_str(&text[start..]).into_iter().next()?.ok()?;
    failure(&message).or_else(|| message.get("message")?.as_str().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_last_words_are_found_behind_what_it_sent_before() {
        let mut end = vec![0; 2000];
        end.extend_from_slice(
            b"{\"errorDetail\":{\"message\":\"no space left\"},\"error\":\"no space left\"}\r\n",
        );
        assert_eq!(words(&end).unwrap(), "no space left");
        assert_eq!(words(br#"..{"cause":"x","message":"y"}"#), None, "cut in the middle");
        assert_eq!(words(br#"{"message":"y"}"#).unwrap(), "y");
        assert_eq!(words(&[0; 100]), None);
    }

    #[tokio::test]
    async fn only_the_last_bytes_are_remembered() {
        let last = LastWords::default();
        let pieces = [vec![b'a'; 3000], vec![b'b'; 3000], vec![b'c'; 5], vec![b'd'; 9000]];
        let body = stream::iter(pieces.map(|piece| Ok(Bytes::from(piece))));
        let mut body = std::pin::pin!(listening(body, last.clone()));
        let mut kept = Vec::new();
        while body.next().await.is_some() {
            kept.push(last.0.lock().unwrap().len());
        }
        assert_eq!(kept, [3000, LAST_WORDS, LAST_WORDS, LAST_WORDS]);
        assert!(last.0.lock().unwrap().iter().all(|&byte| byte == b'd'));
    }
}
