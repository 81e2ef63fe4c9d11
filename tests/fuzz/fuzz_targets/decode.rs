//! The decoder of gzip and zstd, all members and frames: it ends, within its limit.
#![no_main]

use std::io::Read;

use libfuzzer_sys::fuzz_target;
use occy_pipeline::codec::Decoder;

fuzz_target!(|bytes: &[u8]| {
    let mut out = Vec::new();
    let result = Decoder::new(bytes).limit(1 << 20).read_to_end(&mut out);
    assert!(out.len() <= 1 << 20, "the limit holds");
    if let Ok(count) = result {
        assert_eq!(count, out.len());
    }
});
