//! The order in which the layers of an image are begun: any order that suits, or the one in which a source sends them.
//!
//! Some sources can be read only once and from front to back. Such a source says which layer is coming ([`Arrivals`]), and
//! waits until it was read or nobody wants it any more: so nothing has to be stored, and a slow reader slows the source.

use std::any::Any;
use std::collections::VecDeque;

use tokio::sync::mpsc;

use super::ImageSource;

/// The layers of an image that are yet to be begun.
#[derive(Debug)]
pub(crate) enum Coming {
    /// In an order that was chosen here.
    Chosen(VecDeque<usize>),
    /// As the source sends them.
    Arriving(Arrivals),
}

/// The layers that a source sends, each once.
#[derive(Debug)]
pub struct Arrivals(mpsc::Receiver<Arrival>);

/// A layer that can be read now. The source goes on when this is dropped, whether the layer was read or not.
pub struct Arrival {
    /// Which layer.
    pub index: usize,
    /// The source's own, told by its `drop` that the layer is no longer wanted.
    _held: Option<Box<dyn Any + Send>>,
}

impl Coming {
    /// As `source` sends them, or in the order of `chosen`.
    pub(crate) fn new(source: &dyn ImageSource, chosen: impl IntoIterator<Item = usize>) -> Self {
        match source.arrivals() {
            Some(arrivals) => Self::Arriving(arrivals),
            None => Self::Chosen(chosen.into_iter().collect()),
        }
    }

    /// The next layer; None when there is no more.
    ///
    /// # Cancel safety
    /// Cancelled before it returns, it has taken nothing.
    pub(crate) async fn next(&mut self) -> Option<Arrival> {
        match self {
            Self::Chosen(waiting) => waiting.pop_front().map(Arrival::new),
            Self::Arriving(arrivals) => arrivals.next().await,
        }
    }
}

impl Arrivals {
    /// What is sent to the other end. No more than one layer waits.
    pub(super) fn channel() -> (mpsc::Sender<Arrival>, Self) {
        let (sender, receiver) = mpsc::channel(1);
        (sender, Self(receiver))
    }

    /// The next layer; None when the source has sent all, or failed: then [`ImageSource::settle`] tells why.
    ///
    /// # Cancel safety
    /// Cancelled before it returns, it has taken nothing.
    pub async fn next(&mut self) -> Option<Arrival> {
        self.0.recv().await
    }
}

impl Arrival {
    fn new(index: usize) -> Self {
        Self { index, _held: None }
    }

    /// A layer whose source wants to know when it is done with.
    pub(super) fn held(index: usize, held: impl Any + Send) -> Self {
        Self { index, _held: Some(Box::new(held)) }
    }
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Arrival").field(&self.index).finish()
    }
}
