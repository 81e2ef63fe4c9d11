//! One ask, as one of its two sides sees it: what comes for it, and what is sent for it.
//!
//! Whoever sends bytes has a credit, which whoever takes them renews: what has come and was not taken is never more than that. So the
//! side that reads the stream hands on what comes without waiting for anybody, and one ask that is slow holds up no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use occy_proto::v1::lend_answer::Answer;
use occy_proto::v1::{LendCredit, LendEnd, LendPiece};
use tokio::sync::mpsc;

use crate::blob::BlobSummary;
use crate::wire::{CHUNK, WireError};

/// Bytes of one ask that may have been sent and not been taken yet.
pub(super) const WINDOW: u64 = 1024 * 1024;
/// What a smaller piece counts as: it takes a place too.
const LEAST: u64 = 4096;
/// As soon as so many bytes were taken, the other side hears of it.
const RENEWED: u64 = WINDOW / 4;
/// What may have come for one ask: pieces, the credit for as many as were sent, and its end.
const EVENTS: usize = 264;
const _: () = assert!(EVENTS as u64 > WINDOW / LEAST + WINDOW / RENEWED + 1);

/// What one side sends.
pub(super) trait Frame: Send + Sized + 'static {
    fn piece(piece: LendPiece) -> Self;
    fn end(end: LendEnd) -> Self;
    fn credit(credit: LendCredit) -> Self;
}

/// What comes for an ask.
#[derive(Debug)]
pub(super) enum Event {
    /// The next bytes.
    Piece(Bytes),
    /// All of them have come.
    End(LendEnd),
    /// So many more may be sent.
    Credit(u64),
    /// An answer without bytes.
    Answer(Answer),
}

/// What a piece counts as.
fn cost(bytes: usize) -> u64 {
    (bytes as u64).max(LEAST)
}

/// Where whoever reads the stream puts what comes for an ask.
#[derive(Debug)]
pub(super) struct Inlet {
    events: mpsc::Sender<Event>,
    /// What may still come.
    open: Arc<AtomicU64>,
}

impl Inlet {
    /// Hands on what came. What nobody wants any more is dropped; what is more than was allowed is an error.
    pub(super) fn put(&self, event: Event) -> Result<(), WireError> {
        if let Event::Piece(bytes) = &event {
            if bytes.is_empty() || bytes.len() > CHUNK {
                return Err(WireError::elements(format!("a piece has {} bytes", bytes.len())));
            }
            let spent = self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| {
                open.checked_sub(cost(bytes.len()))
            });
            // Where nobody takes them any more, nobody counts them either.
            if spent.is_err() && !self.events.is_closed() {
                return Err(WireError::elements("more bytes came than there was credit for"));
            }
        }
        match self.events.try_send(event) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(WireError::elements("more came than was asked for"))
            }
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }
}

/// One side of an ask.
#[derive(Debug)]
pub(super) struct Line<M> {
    pub(super) id: u64,
    events: mpsc::Receiver<Event>,
    open: Arc<AtomicU64>,
    /// Of what came, what was taken and the other side has not heard of.
    taken: u64,
    /// What may be sent.
    credit: u64,
    out: mpsc::Sender<M>,
}

impl<M: Frame> Line<M> {
    /// A side that sends into `out`.
    pub(super) fn new(id: u64, out: mpsc::Sender<M>) -> (Inlet, Self) {
        let (sender, events) = mpsc::channel(EVENTS);
        let open = Arc::new(AtomicU64::new(WINDOW));
        let inlet = Inlet { events: sender, open: Arc::clone(&open) };
        (inlet, Self { id, events, open, taken: 0, credit: WINDOW, out })
    }

    /// What comes next; credit for what is sent is taken on the way.
    ///
    /// # Cancel safety
    /// Cancelled before it returns, it has taken nothing but credit.
    pub(super) async fn next(&mut self) -> Result<Event, WireError> {
        loop {
            match self.events.recv().await.ok_or(WireError::Gone)? {
                Event::Credit(bytes) => self.allow(bytes)?,
                event => return Ok(event),
            }
        }
    }

    /// Says that so many bytes that came in one piece are taken.
    pub(super) async fn took(&mut self, bytes: usize) -> Result<(), WireError> {
        self.taken += cost(bytes);
        if self.taken < RENEWED {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.taken);
        self.open.fetch_add(bytes, Ordering::Relaxed);
        self.send(M::credit(LendCredit { ask: self.id, bytes })).await
    }

    /// Sends bytes, waiting for credit. Gives an answer that came in the place of credit: no more are wanted then.
    pub(super) async fn send_bytes(&mut self, mut bytes: Bytes) -> Result<Option<Answer>, WireError> {
        while !bytes.is_empty() {
            while let Ok(event) = self.events.try_recv() {
                if let Some(answer) = self.heed(event)? {
                    return Ok(Some(answer));
                }
            }
            let size = bytes.len().min(CHUNK).min(usize::try_from(self.credit).unwrap_or(CHUNK));
            if self.credit < cost(size) {
                let event = self.events.recv().await.ok_or(WireError::Gone)?;
                if let Some(answer) = self.heed(event)? {
                    return Ok(Some(answer));
                }
                continue;
            }
            self.credit -= cost(size);
            let data = bytes.split_to(size);
            self.send(M::piece(LendPiece { ask: self.id, data })).await?;
        }
        Ok(None)
    }

    /// Says that all bytes were sent.
    pub(super) async fn send_end(&self, sum: &BlobSummary, media_type: String) -> Result<(), WireError> {
        let BlobSummary { digest, size } = sum;
        self.send(M::end(LendEnd { ask: self.id, digest: digest.to_string(), size: *size, media_type })).await
    }

    /// Sends something, waiting for room.
    pub(super) async fn send(&self, message: M) -> Result<(), WireError> {
        self.out.send(message).await.map_err(|_| WireError::Gone)
    }

    fn heed(&mut self, event: Event) -> Result<Option<Answer>, WireError> {
        match event {
            Event::Credit(bytes) => self.allow(bytes).map(|()| None),
            Event::Answer(answer) => Ok(Some(answer)),
            Event::Piece(_) | Event::End(_) => Err(WireError::elements("bytes come where they are sent")),
        }
    }

    fn allow(&mut self, bytes: u64) -> Result<(), WireError> {
        self.credit = self.credit.saturating_add(bytes);
        match self.credit > WINDOW {
            true => Err(WireError::elements("credit came for more than was sent")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use occy_proto::v1::lend_layout_request::Part;
    use occy_proto::v1::{LendDone, LendLayoutRequest};

    use super::*;

    fn line() -> (Inlet, Line<LendLayoutRequest>, mpsc::Receiver<LendLayoutRequest>) {
        let (out, sent) = mpsc::channel(1024);
        let (inlet, line) = Line::new(7, out);
        (inlet, line, sent)
    }

    /// The bytes that were sent, and the credit.
    fn sent(messages: &mut mpsc::Receiver<LendLayoutRequest>) -> (usize, u64) {
        let (mut bytes, mut credit) = (0, 0);
        while let Ok(message) = messages.try_recv() {
            match message.part.unwrap() {
                Part::Piece(piece) => {
                    assert!(piece.ask == 7 && (1..=CHUNK).contains(&piece.data.len()));
                    bytes += piece.data.len();
                }
                Part::Credit(given) => credit += given.bytes,
                other => panic!("{other:?}"),
            }
        }
        (bytes, credit)
    }

    #[tokio::test]
    async fn no_more_is_sent_than_there_is_credit_for() {
        let (inlet, mut line, mut messages) = line();
        let all = Bytes::from(vec![1; 2 << 20]);
        let mut sending = std::pin::pin!(line.send_bytes(all));
        assert!(sending.as_mut().now_or_never().is_none());
        assert_eq!(sent(&mut messages).0 as u64, WINDOW);
        assert!(sending.as_mut().now_or_never().is_none());
        assert_eq!(sent(&mut messages).0, 0);
        inlet.put(Event::Credit(100_000)).unwrap();
        assert!(sending.as_mut().now_or_never().is_none());
        assert_eq!(sent(&mut messages).0, 100_000);
        inlet.put(Event::Credit(WINDOW)).unwrap();
        assert!(matches!(sending.now_or_never(), Some(Ok(None))));
    }

    #[tokio::test]
    async fn who_waits_for_credit_hears_that_no_more_is_wanted() {
        let (inlet, mut line, _messages) = line();
        inlet.put(Event::Answer(Answer::Done(LendDone {}))).unwrap();
        let all = Bytes::from(vec![1; 2 << 20]);
        assert_eq!(line.send_bytes(all).await.unwrap(), Some(Answer::Done(LendDone {})));
    }

    #[tokio::test]
    async fn credit_for_more_than_was_sent_is_refused() {
        let (inlet, mut line, _messages) = line();
        inlet.put(Event::Credit(1)).unwrap();
        assert!(matches!(line.next().await, Err(WireError::Elements(_))));
    }

    #[tokio::test]
    async fn what_came_and_was_not_taken_is_never_more_than_the_window() {
        let (inlet, mut line, mut messages) = line();
        let piece = || Event::Piece(Bytes::from(vec![1; CHUNK]));
        for _ in 0..4 {
            inlet.put(piece()).unwrap();
        }
        assert!(matches!(inlet.put(Event::Piece(Bytes::from_static(b"x"))), Err(WireError::Elements(_))));
        assert!(matches!(line.next().await.unwrap(), Event::Piece(_)));
        line.took(CHUNK).await.unwrap();
        assert_eq!(sent(&mut messages).1, CHUNK as u64);
        inlet.put(piece()).unwrap();
        inlet.put(piece()).unwrap_err();
    }

    #[test]
    fn the_smallest_pieces_take_a_place_too() {
        let (inlet, line, _messages) = line();
        let taken = (0..).take_while(|_| inlet.put(Event::Piece(Bytes::from_static(b"x"))).is_ok()).count();
        assert_eq!(taken as u64, WINDOW / LEAST);
        drop(line);
        // What nobody wants does no harm.
        inlet.put(Event::Piece(Bytes::from_static(b"x"))).unwrap();
        for bad in [Bytes::new(), Bytes::from(vec![0; CHUNK + 1])] {
            inlet.put(Event::Piece(bad)).unwrap_err();
        }
    }
}
