//! The servers, images and tools that the end-to-end tests share.
//!
//! Nothing of the product is linked in. [`occyctl`] runs the binary, and [`terminal`] shows what it leaves on one;
//! [`coordinator`] and [`worker`] run the service's, on a [`disk`] that can be full, [`nats`] what several coordinators share, each on a node of a [`network`] if need be,
//! [`client`] asks it in Python, and [`collector`] takes their spans;
//! [`registry`] starts real registries, [`conforming`] is one that follows the specification to the letter, [`fixed`] serves what
//! none would store, [`relay`] cuts connections, [`mesh`] sends streams to several coordinators, [`proxy`] puts faults before registries, which [`random`] draws from a
//! seed, [`limited`] limits, and [`token`] serves tokens;
//! [`engine`] has real engines and false ones; [`layer`], [`image`] and [`saved`] make images of every shape, and
//! [`conformance`] those of the specification's own suite; [`judge`] asks independent tools what they think of the outcome.

mod binary;
pub mod certificates;
pub mod client;
pub mod collector;
pub mod conformance;
pub mod conforming;
pub mod coordinator;
pub mod disk;
pub mod engine;
pub mod fixed;
pub mod http;
pub mod image;
pub mod judge;
pub mod layer;
pub mod limited;
pub mod mesh;
pub mod nats;
pub mod network;
pub mod occyctl;
pub mod older;
mod process;
pub mod proxy;
pub mod random;
pub mod registry;
pub mod relay;
pub mod saved;
pub mod server;
pub mod terminal;
pub mod token;
pub mod tools;
pub mod worker;
