//! Manifests, indexes, schema 1, and configs.
#![no_main]

use libfuzzer_sys::fuzz_target;
use occy_pipeline::config::ImageConfig;
use occy_pipeline::manifest;

fuzz_target!(|bytes: &[u8]| {
    let _ = manifest::parse(bytes, None);
    for media_type in manifest::media_type::ACCEPTED_MANIFESTS {
        let _ = manifest::parse(bytes, Some(media_type));
    }
    if let Ok(config) = ImageConfig::parse(bytes) {
        let _ = (config.history(), config.platform(), config.check_history());
        if let Ok(written) = config.to_bytes() {
            let again = ImageConfig::parse(&written).expect("a config that was written parses");
            assert_eq!(again.diff_ids(), config.diff_ids());
        }
    }
});
