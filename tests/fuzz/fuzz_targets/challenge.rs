//! `WWW-Authenticate` headers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use occy_pipeline::registry::challenge;

fuzz_target!(|text: &str| {
    let _ = challenge::parse(text);
});
