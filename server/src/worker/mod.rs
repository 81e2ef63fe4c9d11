//! Workers in processes of their own, and the coordinator's side of what they do.
//!
//! | what | where |
//! |---|---|
//! | a worker's stream: registration, heartbeats, results, and its end | `connect` |
//! | where a layer's worker is | `seat` |
//! | layers that workers have, by the tokens of their attempts; what is believed of a result | `attempt` |
//! | how far the upload of a layer has come, from one attempt to the next | `upload` |
//! | rights at registries for which the client has the credentials | `access` |
//! | bytes that only the coordinator has, or that only it can store | `blobs` |

mod access;
pub mod attempt;
pub mod blobs;
pub mod connect;
pub mod seat;
pub mod upload;
