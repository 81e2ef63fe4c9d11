//! `docker://IMAGE:TAG`: an image that a Docker Engine or Podman loads.
//!
//! The Engine gets the saved tar that [`super::tar`] writes, through a pipe and while it is written: each layer waits in a
//! spool until its size is known, and then goes to the Engine. The name is in the tar's `manifest.json`, its last member, so
//! that it keeps naming the old image until the Engine has all of the new one. A run that fails or is killed breaks the
//! request off before its end. Afterwards the Engine is asked whether it has what it was sent.

use std::io::{self, PipeWriter};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;

use super::tar::TarOutput;
use super::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, OutputError, OutputKind, Receipt};
use crate::blob::{ByteCount, CHUNK, LayerStream};
use crate::compression::Format;
use crate::digest::Digest;
use crate::element::{Image, StoredLayer};
use crate::engine::{Engine, EngineError, Options, Store};
use crate::error::Error;
use crate::reference::Reference;
use crate::spool::SpoolDir;

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "docker",
    syntax: "docker://IMAGE:TAG",
    about: "an image in a Docker Engine or in Podman",
    options: &["socket", "max_workers"],
};

/// How long the Engine may take to say why it stopped reading.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// An image that is being loaded into an Engine.
#[derive(Debug)]
pub struct DockerOutput {
    engine: Options,
    /// As it was written: Podman tells `app:1` from `docker.io/library/app:1`.
    name: String,
    tar: TarOutput,
    loading: Mutex<Option<Loading>>,
    /// Why the Engine stopped reading, as far as it says: every layer that finds the pipe broken waits for this.
    last_words: OnceCell<Option<EngineError>>,
}

/// A request that an Engine is reading.
#[derive(Debug)]
struct Loading {
    engine: Engine,
    request: Request,
    /// Held so that the pipe ends no sooner than it is known whether the tar is complete.
    pipe: PipeWriter,
    complete: Arc<AtomicBool>,
}

/// A request that is broken off when nobody waits for it any more.
#[derive(Debug)]
struct Request(JoinHandle<Result<(), EngineError>>);

impl Drop for Request {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl DockerOutput {
    /// An image that is to be called `name`, which has a tag and no digest. Layers wait in `spools`.
    pub fn new(engine: Options, name: &str, spools: SpoolDir) -> Result<Self, Error> {
        let reference: Reference = name.parse()?;
        let tagged = reference.tag().is_some_and(|tag| name.ends_with(&format!(":{tag}")));
        if reference.digest().is_some() || !tagged {
            return Err(OutputError::NoTag { name: name.to_owned() }.into());
        }
        let tar = TarOutput::to_pipe(format!("docker://{name}"), name.to_owned(), spools);
        Ok(Self {
            engine,
            name: name.to_owned(),
            tar,
            loading: Mutex::default(),
            last_words: OnceCell::new(),
        })
    }

    fn loading(&self) -> MutexGuard<'_, Option<Loading>> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the Engine says, where an error is only that it does not read on.
    async fn explained(&self, error: Error) -> Error {
        let broken = matches!(&error, Error::Output(OutputError::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe);
        if !broken {
            return error;
        }
        let said = self.last_words.get_or_init(|| async {
            let mut loading = self.loading().take()?;
            match tokio::time::timeout(LAST_WORDS, &mut loading.request.0).await {
                Ok(Ok(Err(said))) => Some(said),
                _ => None,
            }
        });
        said.await.clone().map_or(error, Error::from)
    }

    /// Whether the Engine has what it was sent.
    async fn verify(&self, engine: &Engine, finished: &FinishedImage<'_>) -> Result<(), Error> {
        let inspected = engine.inspect(&self.name).await?;
        let layers: Vec<_> = finished.layers.iter().filter_map(|layer| layer.diff_id.clone()).collect();
        let differs = |what, expected, actual| EngineError::Differs {
            image: self.name.clone(),
            what,
            expected,
            actual,
        };
        if inspected.diff_ids() != layers {
            return Err(differs("the layers", list(&layers), list(inspected.diff_ids())).into());
        }
        let config = Digest::sha256(&finished.config);
        // In containerd's store the Id is of a manifest that the Engine made.
        if inspected.digest().as_ref() != Some(&config) && engine.store().await? == Store::Unpacked {
            return Err(differs("the Id", config.to_string(), inspected.id).into());
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl ImageOutput for DockerOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Tar
    }

    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error> {
        let fail = |source| {
            Error::Output(OutputError::Io {
                what: "open a pipe for",
                path: format!("docker://{}", self.name).into(),
                source,
            })
        };
        let engine = Engine::new(&self.engine)?;
        // An Engine that is not there is told before anything is fetched.
        engine.ping().await?;
        let (reader, writer) = io::pipe().map_err(fail)?;
        let reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader)).map_err(fail)?;
        let complete = Arc::new(AtomicBool::new(false));
        let body = reqwest::Body::wrap_stream(body(reader, Arc::clone(&complete)));
        self.tar.begin_pipe(image, expected, writer.try_clone().map_err(fail)?)?;
        let request = {
            let engine = engine.clone();
            Request(tokio::spawn(async move { engine.load(body).await }))
        };
        *self.loading() = Some(Loading { engine, request, pipe: writer, complete });
        Ok(())
    }

    async fn write_layer(
        &self,
        index: usize,
        stream: LayerStream,
        format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        match self.tar.write_layer(index, stream, format, progress).await {
            Err(error) => Err(self.explained(error).await),
            stored => stored,
        }
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let config = finished.config.clone();
        if let Err(error) = self.tar.finalize(FinishedImage { config, ..finished }).await {
            return Err(self.explained(error).await);
        }
        let Loading { engine, mut request, pipe, complete } =
            self.loading().take().expect("begin ran before finalize");
        complete.store(true, Ordering::Release);
        drop(pipe);
        match (&mut request.0).await {
            Ok(result) => result?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
        self.verify(&engine, &finished).await?;
        Ok(Receipt { destination: format!("docker://{}", self.name), ..Receipt::default() })
    }
}

/// What comes out of the pipe. Its end is the body's only when the tar is complete: else the request has to break.
fn body(pipe: pipe::Receiver, complete: Arc<AtomicBool>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::try_unfold((pipe, complete), |(mut pipe, complete)| async move {
        let mut bytes = BytesMut::with_capacity(CHUNK);
        match pipe.read_buf(&mut bytes).await? {
            0 if complete.load(Ordering::Acquire) => Ok(None),
            0 => Err(io::Error::other("the image is not complete")),
            _ => Ok(Some((bytes.freeze(), (pipe, complete)))),
        }
    })
}

fn list(digests: &[Digest]) -> String {
    let digests: Vec<_> = digests.iter().map(ToString::to_string).collect();
    format!("[{}]", digests.join(", "))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use futures_util::StreamExt;

    use super::*;

    #[test]
    fn a_destination_has_a_tag_and_no_digest() {
        let output = |name: &str| DockerOutput::new(Options::default(), name, SpoolDir::new("/tmp", 0));
        for good in ["app:1", "localhost:5000/a/b:c", "docker.io/library/app:latest"] {
            assert_eq!(output(good).unwrap().name, good);
        }
        let digest = format!("sha256:{}", "a".repeat(64));
        for bad in ["app", "localhost:5000/app", &format!("app@{digest}"), &format!("app:1@{digest}")] {
            let error = output(bad).unwrap_err();
            assert!(matches!(error, Error::Output(OutputError::NoTag { .. })), "{bad}: {error}");
        }
    }

    #[tokio::test]
    async fn every_layer_that_finds_the_pipe_broken_hears_why() {
        let output = DockerOutput::new(Options::default(), "app:1", SpoolDir::new("/tmp", 0)).unwrap();
        let (answer, answered) = tokio::sync::oneshot::channel();
        let request = Request(tokio::spawn(async { answered.await.expect("the Engine answers") }));
        let address = crate::engine::Options { socket: Some("/no/such/engine".into()), ..Options::default() };
        let engine = Engine::new(&address).unwrap();
        let (_reader, pipe) = io::pipe().unwrap();
        *output.loading() = Some(Loading { engine, request, pipe, complete: Arc::default() });
        let broken = || {
            let source = io::ErrorKind::BrokenPipe.into();
            Error::Output(OutputError::Io { what: "write", path: "docker://app:1".into(), source })
        };
        let said = || EngineError::Failed { what: "load".to_owned(), words: "no space left".to_owned() };
        let say = async {
            tokio::task::yield_now().await;
            answer.send(Err(said())).unwrap();
        };
        let (first, second, ()) = tokio::join!(output.explained(broken()), output.explained(broken()), say);
        let late = output.explained(broken()).await;
        for error in [first, second, late] {
            assert_eq!(error.to_string(), Error::from(said()).to_string());
        }
        let other = output.explained(Error::Output(OutputError::Spoiled)).await;
        assert!(matches!(other, Error::Output(OutputError::Spoiled)), "{other}");
    }

    #[tokio::test]
    async fn a_pipe_that_ends_early_is_no_body() {
        for whole in [true, false] {
            let (reader, mut writer) = io::pipe().unwrap();
            let complete = Arc::new(AtomicBool::new(false));
            let reader = pipe::Receiver::from_owned_fd(reader.into()).unwrap();
            let mut body = std::pin::pin!(body(reader, Arc::clone(&complete)));
            writer.write_all(b"half").unwrap();
            assert_eq!(body.next().await.unwrap().unwrap(), "half");
            complete.store(whole, Ordering::Release);
            drop(writer);
            match body.next().await {
                None => assert!(whole),
                Some(result) => assert!(result.is_err() && !whole),
            }
        }
    }
}
