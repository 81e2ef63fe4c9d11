//! The service's API, as code generated from `occy/v1/*.proto`. The comments there are the API's documentation.

/// The first version of the API.
pub mod v1 {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        reason = "generated: the .proto files document it"
    )]
    tonic::include_proto!("occy.v1");
}

/// The .proto files and what they import, compiled: what the reflection service answers from.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/occy.v1.bin"));
