//! The client against servers that do what real ones do on bad days.

mod auth;
mod blob_read;
mod foreign;
mod grant;
mod manifest;
mod mount;
pub(super) mod server;
mod transport;
mod upload_blob;
mod upload_log;
mod upload_stream;
