//! The coordinator: runs the pipeline for clients over gRPC, as calls and as jobs, on the workers that it has.
//!
//! A request comes in at [`grpc`]; [`access`] says whose it is and [`admit`] whether it may be. It runs `occy_pipeline::process` with one end or both at the
//! caller ([`call`]), or as a job that outlives the call ([`job`], kept by an [`engine`]). Either way each layer waits in the [`fleet`] for a worker,
//! as [`schedule`] decides, and runs through the [`executor`]: here, or on a [`worker`] that has connected; unless another one brings
//! it there ([`share`]). Mirrors that are made at certain times are the [`timetable`]'s, which submits jobs. What all of them ask of registries is in one [`budget`]. [`error`] says what a client is told when something fails, and
//! [`serve`] starts and stops it all.
//!
//! Not here: anything of how images are read, filtered and written, which is `occy-pipeline`'s; and the API itself, whose words
//! are `proto/occy/v1/*.proto`.

pub mod access;
pub mod admit;
pub mod budget;
pub mod call;
pub mod client;
pub mod credentials;
pub mod engine;
pub mod error;
pub mod executor;
pub mod fleet;
pub mod grpc;
pub mod job;
pub mod metrics;
pub mod other;
pub mod schedule;
pub mod serve;
pub mod settings;
pub mod share;
#[cfg(test)]
mod simulation;
pub mod timetable;
pub mod worker;
mod written;
