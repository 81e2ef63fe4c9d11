//! Jobs: work that outlives the call that asked for it.
//!
//! | what | where |
//! |---|---|
//! | what may happen to a job, pure | `state` |
//! | its events, past and to come | `watch` |
//! | who runs it | `runner` |
//! | what it knows of its layers from an earlier attempt | `output` |
//! | those that are mirrors, and have no layers | `mirror` |
//!
//! What is known of them, durable, is the `engine`'s.

pub mod mirror;
pub mod output;
pub mod runner;
pub mod state;
pub mod watch;
