//! Many images of many repositories, kept at other registries as they are.

pub mod config;
mod range;
mod select;
mod template;
