//! Compiles the .proto files, without a `protoc` on the machine.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 5] = [
    "occy/v1/image.proto",
    "occy/v1/pipeline.proto",
    "occy/v1/schedule.proto",
    "occy/v1/blob.proto",
    "occy/v1/worker.proto",
];
const SECRET: [&str; 4] = [
    ".occy.v1.RegistryCredentials",
    ".occy.v1.PasswordLogin",
    ".occy.v1.AccessAnswer",
    ".occy.v1.UploadState",
];

fn main() -> Result<(), Box<dyn Error>> {
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("occy.v1.bin"), descriptors.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    // What is secret is shown nowhere: `src/lib.rs` says what is shown of it.
    config.skip_debug(SECRET);
    // Chunks of layers are passed on without a copy.
    tonic_prost_build::configure().bytes(".").compile_fds_with_config(descriptors, config)?;
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    Ok(())
}
