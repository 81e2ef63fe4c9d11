//! Image references: parsing never panics, and what is printed parses to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use occy_pipeline::reference::Reference;

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse::<Reference>().as_ref(), Ok(&reference));
    }
});
