//! Measures what each stage of a layer's way costs alone, in CPU seconds of one thread: the lower bound that a whole run is
//! compared with.
//!
//!     cargo run --release -p occy-pipeline --example stages -- LAYER.tar.gz [STAGE]...
//!
//! Prints one line of JSON for each stage, or for those named: `gunzip`, `sha256-stored`, `sha256-tar`, `crc32`, `pass`, `gzip`,
//! `gzip:1` to `gzip:9`, `zstd:1` to `zstd:19`. A pass is the walk over the tar with `normalize-timestamps`, and with two SHA-256:
//! of the tar as it was and of the tar as it becomes. Without names, zstd is measured at its default level and a few others only.

use std::error::Error;
use std::io::{self, BufRead};
use std::num::NonZeroUsize;
use std::time::Instant;

use bytes::Bytes;
use occy_pipeline::codec::{CodecError, Compressor, Decoder, Pool};
use occy_pipeline::compression::Compression;
use occy_pipeline::digest::{Algorithm, Hasher};
use occy_pipeline::filter::FilterChain;
use occy_pipeline::layer::{LayerPass, Mode, PassOutcome};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::Limits;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: stages LAYER [STAGE]...")?;
    let mut stages: Vec<String> = arguments.collect();
    if stages.is_empty() {
        stages = ["gunzip", "sha256-stored", "sha256-tar", "crc32", "pass"].map(String::from).into();
        stages.extend((1..=9).map(|level| Compression::Gzip { level }.to_string()));
        stages.extend(
            [1, Compression::DEFAULT_ZSTD_LEVEL, 9].map(|level| Compression::Zstd { level }.to_string()),
        );
    }
    let stored = std::fs::read(path)?;
    let mut tar = Vec::new();
    each_chunk(&stored, |bytes| tar.extend_from_slice(bytes))?;
    for stage in stages {
        let watch = Stopwatch::start();
        let (bytes_in, bytes_out) = match stage.as_str() {
            "gunzip" => {
                let mut size = 0;
                each_chunk(&stored, |bytes| size += bytes.len())?;
                (stored.len(), size)
            }
            "sha256-stored" => (stored.len(), sha256(&stored)),
            "sha256-tar" => (tar.len(), sha256(&tar)),
            "crc32" => {
                let mut crc = flate2::Crc::new();
                crc.update(&tar);
                std::hint::black_box(crc.sum());
                (tar.len(), 0)
            }
            "pass" => (tar.len(), pass(&tar)?),
            compression => (tar.len(), compress(compression.parse()?, &tar)?),
        };
        println!("{{\"stage\":\"{stage}\",{watch},\"bytes_in\":{bytes_in},\"bytes_out\":{bytes_out}}}");
    }
    Ok(())
}

fn each_chunk(stored: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut decoder = Decoder::new(stored);
    loop {
        let bytes = decoder.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        take(bytes);
        let size = bytes.len();
        decoder.consume(size);
    }
}

/// Edits every member, and says how large the tar is then.
fn pass(tar: &[u8]) -> Result<usize, Box<dyn Error>> {
    let (chain, limits) = (FilterChain::parse(["normalize-timestamps"])?, Limits::default());
    let spools = SpoolDir::new(std::env::temp_dir(), u64::MAX);
    let pass = LayerPass::new(&chain, Mode::Rewrite, &limits, &spools);
    match pass.run(tar, &mut io::sink())? {
        PassOutcome::Done(result) => Ok(usize::try_from(result.output.size)?),
        other => Err(format!("the pass ended with {other:?}").into()),
    }
}

/// Hashes the bytes, and says how many more there are now.
fn sha256(bytes: &[u8]) -> usize {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(bytes);
    std::hint::black_box(hasher.finish());
    0
}

fn compress(compression: Compression, tar: &[u8]) -> Result<usize, CodecError> {
    let pool = Pool::new(NonZeroUsize::MIN);
    let mut size = 0;
    let mut out = |chunk: Bytes| {
        size += chunk.len();
        Ok::<_, CodecError>(())
    };
    let mut compressor = Compressor::new(compression, &pool)?;
    for piece in tar.chunks(64 * 1024) {
        compressor.write(piece, &mut out)?;
    }
    compressor.finish(&mut out)?;
    Ok(size)
}

/// CPU time of the process, all threads together, and wall time.
struct Stopwatch {
    cpu: f64,
    wall: Instant,
}

impl Stopwatch {
    fn start() -> Self {
        Self { cpu: Self::cpu(), wall: Instant::now() }
    }

    /// User and system time as proc(5) has them, in hundredths of a second.
    fn cpu() -> f64 {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks = after_name.split_ascii_whitespace().skip(11).take(2);
        ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
    }
}

impl std::fmt::Display for Stopwatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wall = self.wall.elapsed().as_secs_f64();
        write!(f, "\"seconds\":{:.2},\"wall_seconds\":{wall:.2}", Self::cpu() - self.cpu)
    }
}
