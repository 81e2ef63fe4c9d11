//! A layer's tar through every filter: nothing panics, what could be read can be written, and a second pass changes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use occy_pipeline::layer::fuzz_layer;

fuzz_target!(|bytes: &[u8]| fuzz_layer(bytes));
