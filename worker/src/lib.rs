//! The worker: runs layers for a coordinator, and keeps nothing.
//!
//! [`run`] connects, registers and hears of tasks; [`task`] makes a [`LayerTask`](occy_pipeline::executor::LayerTask) of each,
//! which runs as it does anywhere: between registries by itself, and through [`blobs`] where only the coordinator has the bytes or
//! can store them. Rights at registries that only the coordinator can get come by [`access`]; requests to
//! registries go when the coordinator leases them, by [`budget`]. [`settings`] and [`connect`] say where
//! coordinators are, and how they are reached.
//!
//! [`config`], [`convert`], [`verdict`], [`telemetry`] and [`metrics`] are what a coordinator needs as well: how both are configured,
//! how what happens here is told there, and what both say and count while they work.
//!
//! Not here: which task goes where, and what becomes of an image as a whole. That is the coordinator's.

pub mod access;
pub mod blobs;
pub mod budget;
pub mod config;
pub mod connect;
pub mod convert;
pub mod metrics;
pub mod run;
pub mod settings;
pub mod task;
pub mod telemetry;
pub mod uploads;
pub mod verdict;
