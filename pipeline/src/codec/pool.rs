//! The threads that compress, shared by all layers of the process.

use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};

/// A fixed number of threads on which blocks are compressed. A clone is another handle on the same threads.
#[derive(Clone, Debug)]
pub struct Pool {
    threads: Arc<rayon::ThreadPool>,
}

impl Pool {
    /// As many threads as asked for.
    ///
    /// # Panics
    /// When the operating system gives no threads.
    pub fn new(threads: NonZeroUsize) -> Self {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .thread_name(|index| format!("compress-{index}"))
            .build()
            .expect("the operating system starts the compression threads");
        Self { threads: Arc::new(threads) }
    }

    /// The process's own pool, with a thread for each available core, started when first asked for.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Pool> = OnceLock::new();
        SHARED.get_or_init(|| {
            Self::new(std::thread::available_parallelism().unwrap_or(const { NonZeroUsize::new(2).unwrap() }))
        })
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Queues work behind what other callers have queued. The work must not panic.
    pub(super) fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        self.threads.spawn_fifo(work);
    }
}
