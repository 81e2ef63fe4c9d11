//! Workers in processes of their own, and the coordinator's side of what they do.
//!
//! | what | where |
//! |---|---|
//! | a worker's stream: registration, heartbeats, results, and its end | `connect` |
//! | where a layer's worker is | `seat` |
//! | layers that workers have, by the tokens of their attempts; what is believed of a result | `attempt` |
//! | bytes that only the coordinator has, or that only it can store | `blobs` |

pub mod attempt;
pub mod blobs;
pub mod connect;
pub mod seat;
