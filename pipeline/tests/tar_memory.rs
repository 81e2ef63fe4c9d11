//! Layers of any size pass in a little memory. Alone in its process, because it looks at the process's peak.

#![allow(clippy::unwrap_used)]

mod tar_support;

use std::io::Read;

use occy_pipeline::layer::{LayerPass, Mode, PassOutcome};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::Limits;
use tar_support::{Archive, Header, chain};

/// The largest resident size so far, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn large_files_and_large_holes_pass_in_constant_memory() {
    const GIGABYTE: u64 = 1 << 30;
    let large = Header::new("large", b'0', 0).put(124, format!("{GIGABYTE:011o}\0").as_bytes());
    let hole = Header::new("hole", b'S', 0).gnu().put(483, format!("{GIGABYTE:011o}\0").as_bytes());
    let start = Archive::new().header(&large).0;
    let end = Archive::new().header(&hole).hard_link("link", "large").end();
    let input = std::io::BufReader::new(start.chain(std::io::repeat(0).take(GIGABYTE)).chain(&end[..]));

    let before = peak();
    let (limits, spools) = (Limits::default(), SpoolDir::new(std::env::temp_dir(), u64::MAX));
    let chain = chain(&["normalize-timestamps", "inspect:file=x", "exclude:pattern=nothing"]);
    let pass = LayerPass::new(&chain, Mode::Rewrite, &limits, &spools);
    let PassOutcome::Done(result) = pass.run(input, &mut std::io::sink()).unwrap() else { panic!() };
    let grown = peak() - before;

    assert_eq!(result.input.size, GIGABYTE + 512 + end.len() as u64);
    assert_eq!(result.output.size, 2 * GIGABYTE + 512 + end.len() as u64);
    assert!(grown < 8 << 20, "{grown} bytes");
}
