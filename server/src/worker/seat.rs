//! Where a layer's worker is: in this process, or behind a stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use occy_proto::v1::connect_response::Message;
use occy_proto::v1::{CancelTask, ConnectResponse, Drain, Task, Welcome};
use tokio::sync::mpsc;
use tonic::Status;

/// Messages to a worker that it has not read yet, beside two for each of its slots.
pub const MESSAGES: usize = 16;

/// A worker's stream.
pub type Messages = mpsc::Sender<Result<ConnectResponse, Status>>;

/// Where a worker is.
#[derive(Clone, Debug)]
pub enum Seat {
    /// In this process.
    Here,
    /// Behind this stream.
    Remote(RemoteSeat),
}

/// A connected worker.
#[derive(Clone, Debug)]
pub struct RemoteSeat {
    messages: Messages,
    is_lost: Arc<AtomicBool>,
}

/// The worker is gone, or does not read what it is told.
#[derive(Clone, Copy, Debug)]
pub struct NotTold;

impl Seat {
    /// Tells a connected worker that no more layers come.
    pub fn drain(&self) {
        if let Self::Remote(seat) = self {
            // One that is gone needs not to know.
            let _ = seat.tell(Message::Drain(Drain {}));
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
    /// The worker behind a stream that has room for [`MESSAGES`] and two for each slot.
    pub fn new(messages: Messages) -> Self {
        Self { messages, is_lost: Arc::default() }
    }

    /// Whether the worker was lost.
    pub fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::SeqCst)
    }

    /// Tells it its name, before anything else, and how often it has to be heard of.
    pub fn welcome(&self, name: &str, heartbeat: Duration) {
        let heartbeat_interval = prost_types::Duration::try_from(heartbeat).ok();
        let welcome = Welcome { worker_id: name.to_owned(), heartbeat_interval };
        // There is room for the first message, and who is gone is found out soon.
        let _ = self.tell(Message::Welcome(welcome));
    }

    /// Gives it a layer.
    pub fn give(&self, task: Task) -> Result<(), NotTold> {
        self.tell(Message::Task(task))
    }

    /// Takes a layer away again.
    pub fn cancel(&self, attempt: &str) {
        // One that is gone has stopped, or will be told that it has nothing when it comes back.
        let _ = self.tell(Message::Cancel(CancelTask { attempt: attempt.to_owned() }));
    }

    fn tell(&self, message: Message) -> Result<(), NotTold> {
        self.messages.try_send(Ok(ConnectResponse { message: Some(message) })).map_err(|_| NotTold)
    }
}
