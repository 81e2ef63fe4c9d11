//! What fuzzers call.

use super::{LayerPass, LayerResult, Mode, PassOutcome, Plan};
use crate::filter::FilterChain;
use crate::spool::SpoolDir;
use crate::tar::Limits;

/// Reads any bytes as a layer and rewrites them through a chain of all filters.
///
/// Nothing may panic; a layer that could be read can be written, what was written can be read, and doing it again changes
/// nothing any more.
#[doc(hidden)]
pub fn fuzz_layer(data: &[u8]) {
    let limits = Limits {
        members: 10_000,
        extension: 64 * 1024,
        path: 4096,
        holes: 1 << 22,
        kept: 1 << 22,
        report: 1 << 20,
    };
    let observing = FilterChain::parse(["search:pattern=*", "inspect:file=x"]).expect("the chain is valid");
    let editing = FilterChain::parse([
        "inspect:file=x",
        "exclude:pattern=a,**/b/**",
        "inspect:file=y",
        "normalize-timestamps:ts=1",
        "inspect:file=z",
        "exclude:pattern=c*",
    ])
    .expect("the chain is valid");

    let _ = run(&observing, &limits, data);
    let Some((first, written)) = run(&editing, &limits, data) else { return };
    assert_eq!(first.output.size, written.len() as u64);
    if !first.edited {
        assert_eq!(written, data);
    }
    let (second, again) = run(&editing, &limits, &written).expect("what was written can be read");
    assert_eq!(second.input, first.output);
    assert!(!second.edited, "a second pass changes nothing");
    assert_eq!(again, written);
}

fn run(chain: &FilterChain, limits: &Limits, data: &[u8]) -> Option<(LayerResult, Vec<u8>)> {
    let spools = SpoolDir::new(std::env::temp_dir(), u64::MAX);
    let mut plan = Plan::default();
    for _ in 0..=Plan::most_restarts(chain) {
        let mut written = Vec::new();
        let pass = LayerPass::new(chain, Mode::Rewrite, limits, &spools).with_plan(plan);
        match pass.run(data, &mut written) {
            Ok(PassOutcome::Done(result)) => return Some((result, written)),
            Ok(PassOutcome::NeedsRestart(next)) => plan = next,
            Ok(PassOutcome::NeedsRewrite { .. }) => unreachable!("only a scan asks for a rewrite"),
            Err(_) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #[test]
    fn nothing_is_a_layer_too() {
        super::fuzz_layer(b"");
    }

    #[test]
    fn what_fuzzing_found_stays_mended() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/seeds/layer");
        let mut count = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            super::fuzz_layer(&std::fs::read(seed.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "{seeds} has no seeds");
    }
}
