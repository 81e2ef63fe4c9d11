//! Threads for work that lasts as long as a layer does.
//!
//! The runtime's pool of blocking threads is bounded, and what waits for one of its threads waits for ever when those that hold
//! all of them wait for each other: a decoder for its walker, a walker for its output. So whatever waits on a channel for another
//! stage gets a thread of its own, which begins at once, and the pool is left to work that ends by itself.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use tokio::sync::oneshot;

use crate::blob::BlobError;

/// Runs `work` on a thread of its own, whose name is `name`, and continues its panic here.
///
/// # Cancel safety
/// Cancelled, it leaves the thread alone, which ends when it finds the channels closed that it reads or writes.
pub(crate) async fn run<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BlobError> {
    let (sender, receiver) = oneshot::channel();
    let body = move || {
        // Nobody may be left to hear it.
        let _ = sender.send(catch_unwind(AssertUnwindSafe(work)));
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|source| BlobError::Io { what: "failed to start a thread".to_owned(), source })?;
    match receiver.await.expect("the thread sends what came of its work, a panic too") {
        Ok(value) => Ok(value),
        Err(panic) => resume_unwind(panic),
    }
}

/// Runs what waits for the disk on the runtime's pool, where that holds nobody up, and continues its panic here.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    /// A pool of one thread stands for one of 512 that a wide image fills.
    #[test]
    fn stages_that_wait_for_each_other_all_begin() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).build();
        runtime.unwrap().block_on(async {
            let (sender, receiver) = sync_channel(0);
            let (got, sent) =
                tokio::join!(run("reads", move || receiver.recv()), run("writes", move || sender.send(7)));
            assert_eq!(got.unwrap(), Ok(7));
            sent.unwrap().unwrap();
        });
    }

    #[tokio::test]
    #[should_panic = "the work's own words"]
    async fn a_panic_comes_home() {
        let _ = run("panics", || panic!("the work's own words")).await;
    }
}
