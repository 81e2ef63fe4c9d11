//! Where a layer's worker is: in this process, or behind a stream, which may be another one from time to time.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::BoxStream;
use occy_proto::v1::connect_response::Message;
use occy_proto::v1::{
    BudgetLease, CancelTask, ConnectRequest, ConnectResponse, Drain, ResultTaken, Task, Welcome,
};
use tokio::sync::mpsc;
use tonic::Status;

/// Messages to a worker that it has not read yet, beside [`MESSAGES_EACH`] for each of its slots.
pub const MESSAGES: usize = 64;
/// A task, its end, and that its result was taken.
pub const MESSAGES_EACH: usize = 3;

/// What a worker is told on a stream.
pub type Messages = mpsc::Sender<Result<ConnectResponse, Status>>;

/// What a worker says on a stream.
pub type Requests = BoxStream<'static, Result<ConnectRequest, Status>>;

/// A stream of a worker's, behind its registration.
pub struct Line {
    /// What it says.
    pub requests: Requests,
    /// What it is told.
    pub messages: Messages,
    /// The attempts that it says it has.
    pub attempts: Vec<String>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("attempts", &self.attempts).finish_non_exhaustive()
    }
}

/// Where a worker is.
#[derive(Clone, Debug)]
pub enum Seat {
    /// In this process.
    Here,
    /// Behind a stream.
    Remote(RemoteSeat),
}

/// A connected worker.
#[derive(Clone, Debug)]
pub struct RemoteSeat {
    /// None while it has no stream.
    messages: Arc<Mutex<Option<Messages>>>,
    returns: mpsc::Sender<Line>,
    is_lost: Arc<AtomicBool>,
}

/// The worker is gone, or does not read what it is told.
#[derive(Clone, Copy, Debug)]
pub struct NotTold;

impl Seat {
    /// Tells a connected worker that no more layers come.
    pub fn drain(&self) {
        if let Self::Remote(seat) = self {
            seat.drain();
        }
    }

    /// A connected worker was lost: whoever still comes to give it a layer finds it so.
    pub fn lose(&self) {
        if let Self::Remote(seat) = self {
            seat.is_lost.store(true, Ordering::SeqCst);
        }
    }
}

impl RemoteSeat {
    /// That of a worker without a stream yet. Whoever attends to it hears at the other end of `returns` when it comes back.
    pub fn new(returns: mpsc::Sender<Line>) -> Self {
        Self { messages: Arc::default(), returns, is_lost: Arc::default() }
    }

    /// Whether the worker was lost.
    pub fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::SeqCst)
    }

    /// The worker has come back, on this stream. Given back where nobody attends to it any more.
    pub async fn come_back(&self, line: Line) -> Result<(), Line> {
        self.returns.send(line).await.map_err(|mpsc::error::SendError(line)| line)
    }

    /// The worker is behind this stream from now on, and hears its welcome before anything else. The stream has room for [`MESSAGES`],
    /// and [`MESSAGES_EACH`] for each slot.
    pub fn connect(&self, messages: Messages, welcome: Welcome) {
        let mut line = self.line();
        // There is room for the first message, and who is gone is found out soon.
        let _ = messages.try_send(Ok(ConnectResponse { message: Some(Message::Welcome(welcome)) }));
        *line = Some(messages);
    }

    /// Its stream is broken. What it is told meanwhile it has to be told again.
    pub fn disconnect(&self) {
        self.line().take();
    }

    /// Gives it a layer; one without a stream, when it comes back.
    pub fn give(&self, task: Task) -> Result<(), NotTold> {
        self.tell(Message::Task(task))
    }

    /// Tells it that no more layers come.
    pub fn drain(&self) {
        // One that is gone needs not to know.
        let _ = self.tell(Message::Drain(Drain {}));
    }

    /// Takes a layer away again.
    pub fn cancel(&self, attempt: &str) {
        // One that is gone has stopped, or is told which attempts count still when it comes back.
        let _ = self.tell(Message::Cancel(CancelTask { attempt: attempt.to_owned() }));
    }

    /// Tells it that a result has come.
    pub fn taken(&self, attempt: String) {
        // One that does not hear it says the result again when it comes back.
        let _ = self.tell(Message::Taken(ResultTaken { attempt }));
    }

    /// Leases it requests to registries. One without a stream says again what it has when it comes back.
    pub fn lease(&self, lease: BudgetLease) -> Result<(), NotTold> {
        match &*self.line() {
            // Tasks and their ends go first: the last places are theirs.
            Some(messages) if messages.capacity() <= messages.max_capacity() / 2 => {
                // Who is gone takes nothing any more.
                if messages.is_closed() { Ok(()) } else { Err(NotTold) }
            }
            Some(messages) => {
                // It has room, and who is gone is found out soon.
                let _ = messages.try_send(Ok(ConnectResponse { message: Some(Message::Budget(lease)) }));
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn tell(&self, message: Message) -> Result<(), NotTold> {
        match &*self.line() {
            Some(messages) => {
                messages.try_send(Ok(ConnectResponse { message: Some(message) })).map_err(|_| NotTold)
            }
            None => Ok(()),
        }
    }

    fn line(&self) -> MutexGuard<'_, Option<Messages>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
