//! Jobs: work that outlives the call that asked for it.
//!
//! | what | where |
//! |---|---|
//! | what may happen to a job, pure | `state` |
//! | what is known of it, durable | `store`, in a `file` |
//! | its events, past and to come | `watch` |
//! | who runs it | `runner` |
//! | what it knows of its layers from an earlier attempt | `output` |

mod file;
pub mod output;
pub mod runner;
pub mod state;
pub mod store;
pub mod watch;
