//! Both sides of a loan, with nothing between them but two channels.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt, TryStreamExt};
use occy_proto::v1::lend_ask::What;
use occy_proto::v1::lend_layout_response::Part;
use occy_proto::v1::{
    LendAnswer, LendAsk, LendLayoutRequest, LendLayoutResponse, LendName, LendOpen, LendReadIndex,
    LendWriteBlob, lend_answer, lend_layout_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::answer::Lender;
use super::borrow::{Borrowed, borrow};
use super::line::WINDOW;
use super::*;
use crate::blob::{Blob, BlobError, BlobSummary, BufferPool, ByteCount, LayerStream};
use crate::digest::Digest;
use crate::error::Error;
use crate::layout::{Choice, INDEX, MARKER, MARKER_CONTENT, blob_path};
use crate::output::oci_layout::{LayoutOptions, LayoutOutput, Place};
use crate::platform::PlatformChoice;
use crate::source::oci_layout::{LayoutSource, Lent};
use crate::spool::SpoolDir;
use crate::wire::WireError;

/// A layout with a blob of each of these.
fn layout(blobs: &[&[u8]]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    std::fs::create_dir_all(at("blobs/sha256")).unwrap();
    std::fs::write(at(MARKER), MARKER_CONTENT).unwrap();
    std::fs::write(at(INDEX), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
    for blob in blobs {
        std::fs::write(at(&blob_path(&Digest::sha256(blob))), blob).unwrap();
    }
    directory
}

fn source(path: &Path) -> LayoutSource {
    let spools = SpoolDir::new(path, 1 << 20);
    LayoutSource::new(path, Choice::default(), PlatformChoice::default(), spools)
}

fn output(path: &Path) -> LayoutOutput {
    LayoutOutput::new(path, LayoutOptions::default(), SpoolDir::new(path, 1 << 20))
}

/// Both sides of a loan, at work for as long as the test's runtime is there.
struct Loan {
    borrowed: Borrowed,
    place: Arc<dyn Place>,
}

fn loan(from: &Path, to: &Path) -> Loan {
    let (asking, mut asked) = mpsc::channel(4);
    let (answering, answers) = mpsc::channel(4);
    let (borrowed, hearing) = borrow(asking);
    let mut lender = Lender::new(Some(source(from)), Some(output(to)), answering);
    let (_, destination) = lender.lent();
    let place = borrowed.output(&destination.unwrap(), LayoutOptions::default()).unwrap();
    tokio::spawn(async move {
        while let Some(LendLayoutResponse { part }) = asked.recv().await {
            assert!(lender.take(part.unwrap()).unwrap().is_none());
        }
    });
    tokio::spawn(hearing.hear(ReceiverStream::new(answers).map(Ok::<_, ()>)));
    Loan { borrowed, place: Arc::clone(place.place()) }
}

async fn read(borrowed: &Borrowed, bytes: &[u8]) -> Result<Vec<u8>, BlobError> {
    let blob = borrowed.blob(&Digest::sha256(bytes), Some(bytes.len() as u64));
    let pieces: Vec<_> = Blob::open(blob.as_ref()).await?.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test]
async fn many_blobs_are_read_at_once_and_one_that_is_slow_holds_up_none() {
    let blobs: Vec<Vec<u8>> = (0..100_u8).map(|seed| vec![seed; 30_000 * (1 + usize::from(seed))]).collect();
    let from = layout(&blobs.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let to = tempfile::tempdir().unwrap();
    let Loan { borrowed, .. } = loan(from.path(), to.path());
    // One whose reader takes its first piece and no more.
    let last = blobs.last().unwrap();
    let slow = borrowed.blob(&Digest::sha256(last), None);
    let mut slow = Blob::open(slow.as_ref()).await.unwrap();
    let mut first = slow.next().await.unwrap().unwrap().to_vec();
    let reads = blobs.iter().map(|blob| read(&borrowed, blob));
    let all: Vec<_> = futures_util::stream::iter(reads).buffered(100).try_collect().await.unwrap();
    assert!(all == blobs);
    for piece in slow.try_collect::<Vec<_>>().await.unwrap() {
        first.extend_from_slice(&piece);
    }
    assert!(first == *last);
}

#[tokio::test]
async fn what_is_not_wanted_any_more_leaves_its_place_to_others() {
    let large = vec![7; 3 * usize::try_from(WINDOW).unwrap()];
    let from = layout(&[&large, b"small"]);
    let to = tempfile::tempdir().unwrap();
    let Loan { borrowed, place } = loan(from.path(), to.path());
    place.open().await.unwrap();
    for _ in 0..3 * ASKS {
        let blob = borrowed.blob(&Digest::sha256(&large), None);
        drop(Blob::open(blob.as_ref()).await.unwrap());
        let (writer, stream) = LayerStream::channel(4, BufferPool::default());
        let mut store = Box::pin(place.store(stream, ByteCount::default()));
        writer.send(bytes::Bytes::from_static(b"half")).await.unwrap();
        assert!((&mut store).now_or_never().is_none());
    }
    assert_eq!(read(&borrowed, b"small").await.unwrap(), b"small");
    let blobs = std::fs::read_dir(to.path().join("blobs")).unwrap();
    assert_eq!(blobs.count(), 0, "nothing that is not whole is kept");
}

#[tokio::test]
async fn what_is_written_is_what_was_promised_or_not_kept() {
    let (from, to) = (layout(&[]), tempfile::tempdir().unwrap());
    let Loan { place, .. } = loan(from.path(), to.path());
    place.open().await.unwrap();
    assert!(place.names_many());
    let blob = vec![3; 5_000_000];
    for (said, is_right) in [(Digest::sha256(b"other"), false), (Digest::sha256(&blob), true)] {
        let (writer, stream) = LayerStream::channel(4, BufferPool::default());
        let (digest, size) = (said.clone(), blob.len() as u64);
        let fed = async {
            for piece in blob.chunks(700_000) {
                writer.send(bytes::Bytes::copy_from_slice(piece)).await.unwrap();
            }
            writer.finish(BlobSummary { digest, size }).await.unwrap();
        };
        let (_, stored) = tokio::join!(fed, place.store(stream, ByteCount::default()));
        match stored {
            Ok(_) => assert!(is_right),
            Err(Error::Blob(BlobError::Lent(error))) => {
                assert!(!is_right && error.fault == LentFault::Broken, "{error}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(place.has(&said, size).await.unwrap(), is_right);
        assert_eq!(to.path().join(blob_path(&said)).exists(), is_right);
    }
}

#[tokio::test]
async fn what_the_lender_fails_in_is_told_in_its_words() {
    let blob = vec![1; 100_000];
    let (from, to) = (layout(&[&blob]), tempfile::tempdir().unwrap());
    std::fs::write(to.path().join("file"), "x").unwrap();
    let Loan { borrowed, place } = loan(from.path(), to.path());
    let (Err(here), Err(there)) = (output(to.path()).place().open().await, place.open().await) else {
        panic!("a directory with other things is no layout");
    };
    assert_eq!(
        (there.to_string(), there.hint(), there.blame()),
        (here.to_string(), here.hint(), here.blame())
    );
    std::fs::write(from.path().join(blob_path(&Digest::sha256(&blob))), vec![2; 100_000]).unwrap();
    for wanted in [blob.as_slice(), b"missing"] {
        let digest = Digest::sha256(wanted);
        let own = source(from.path()).any_blob(&digest, None).await.unwrap();
        let own = async { Blob::open(own.as_ref()).await?.try_collect::<Vec<_>>().await };
        let (here, there) = (Error::from(own.await.unwrap_err()), read(&borrowed, wanted).await.unwrap_err());
        let there = Error::from(there);
        assert_eq!((there.to_string(), there.blame()), (here.to_string(), here.blame()));
        assert_eq!(there.is_missing_blob(), here.is_missing_blob());
    }
}

#[tokio::test]
async fn who_asks_hears_when_nobody_answers_any_more() {
    let (asking, mut asked) = mpsc::channel(4);
    let (answering, answers) = mpsc::channel::<LendLayoutRequest>(4);
    let (borrowed, hearing) = borrow(asking);
    let hearing = tokio::spawn(hearing.hear(ReceiverStream::new(answers).map(Ok::<_, ()>)));
    let reading = tokio::spawn(async move { borrowed.index().await });
    assert!(asked.recv().await.is_some());
    drop(answering);
    assert!(matches!(hearing.await.unwrap(), Ok(WireError::Gone)));
    let reading = tokio::time::timeout(Duration::from_secs(30), reading);
    assert!(reading.await.unwrap().unwrap().is_err());
}

#[tokio::test]
async fn an_answer_to_what_was_not_asked_ends_the_call() {
    let (asking, _asked) = mpsc::channel(4);
    let (answering, answers) = mpsc::channel(4);
    let (_borrowed, hearing) = borrow(asking);
    let answer = LendAnswer { ask: 1, answer: Some(lend_answer::Answer::Found(true)) };
    let part = Some(lend_layout_request::Part::Answer(answer));
    answering.send(LendLayoutRequest { part }).await.unwrap();
    let error = hearing.hear(ReceiverStream::new(answers).map(Ok::<_, ()>)).await;
    assert!(matches!(error, Ok(WireError::Elements(_))), "{error:?}");
    let (_borrowed, hearing) = borrow(mpsc::channel(4).0);
    let broken = hearing.hear(futures_util::stream::iter([Err::<LendLayoutRequest, _>("broken")])).await;
    assert!(matches!(broken, Err("broken")), "what is wrong with the stream is told");
}

/// What a lender of a tar answers to these, one after the other; None for what is done.
async fn answered(asks: Vec<What>) -> Vec<Option<String>> {
    let directory = tempfile::tempdir().unwrap();
    let (answering, mut answers) = mpsc::channel(4);
    let mut lender = Lender::new(None, Some(output(&directory.path().join("a.tar"))), answering);
    let mut said = Vec::new();
    for (id, what) in (1..).zip(asks) {
        lender.take(Part::Ask(LendAsk { id, what: Some(what) })).unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(30), answers.recv()).await.unwrap();
        let answer = answer.unwrap().part.unwrap();
        let lend_layout_request::Part::Answer(LendAnswer { answer, .. }) = answer else {
            panic!("{answer:?}")
        };
        said.push(match answer.unwrap() {
            lend_answer::Answer::Failure(failure) => Some(failure.message),
            _ => None,
        });
    }
    said
}

#[tokio::test]
async fn who_asks_for_what_is_not_lent_or_not_open_harms_nothing() {
    let digest = Digest::sha256(b"missing");
    let entry = format!(
        r#"{{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "{digest}", "size": 7}}"#
    );
    let name = || What::Name(LendName { entry: entry.clone().into(), by_tag: false });
    let write =
        |algorithm: &str| What::WriteBlob(LendWriteBlob { document: true, algorithm: algorithm.to_owned() });
    let said = answered(vec![
        What::ReadIndex(LendReadIndex {}),
        write("sha256"),
        name(),
        What::Open(LendOpen {}),
        write("md5"),
        What::Name(LendName { entry: "[".into(), by_tag: false }),
        What::Name(LendName { entry: "{}".into(), by_tag: false }),
        name(),
        name(),
    ])
    .await;
    let failed: Vec<_> = said.iter().map(Option::is_some).collect();
    assert_eq!(failed, [true, true, true, false, true, true, true, false, true], "{said:?}");
    assert!(said[8].as_ref().is_some_and(|said| said.contains("two images in a tar")), "{said:?}");
    // In a directory there are other images, which nothing may spoil.
    let (from, to) = (layout(&[]), tempfile::tempdir().unwrap());
    let Loan { place, .. } = loan(from.path(), to.path());
    place.open().await.unwrap();
    let before = std::fs::read(to.path().join("index.json")).ok();
    let entry = serde_json::from_str(&entry).unwrap();
    let error = place.name(entry, false).await.unwrap_err();
    assert!(error.to_string().contains("is not there"), "{error}");
    assert_eq!(std::fs::read(to.path().join("index.json")).ok(), before);
}

#[tokio::test]
async fn who_asks_for_too_much_at_once_is_refused() {
    let (answering, _answers) = mpsc::channel(1);
    let mut lender = Lender::new(None, None, answering);
    let mut ask = |id| lender.take(Part::Ask(LendAsk { id, what: None }));
    assert!(ask(1).is_ok() && ask(1).is_err(), "no two have the same id");
    let refused = (2..).find(|&id| ask(id).is_err()).unwrap();
    assert_eq!(refused, 2 * ASKS as u64 + 1);
}
