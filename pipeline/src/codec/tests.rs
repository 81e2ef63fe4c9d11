//! What holds for the module as a whole.
use std::io::Read as _;
use std::num::NonZeroUsize;

use bytes::Bytes;

use super::*;
use crate::compression::Compression;

/// Text-like, repetitive and random stretches, the same on every machine.
pub(super) fn corpus(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<Vec<u8>> = (0..512)
        .map(|_| {
            let length = 2 + next() % 9;
            (0..length).map(|_| b'a' + u8::try_from(next() % 26).expect("a letter")).collect()
        })
        .collect();
    let mut bytes = Vec::with_capacity(size + 4096);
    while bytes.len() < size {
        match next() % 8 {
            0 => bytes.extend((0..next() % 3000).map(|_| next().to_le_bytes()[0])),
            1 => bytes.extend(std::iter::repeat_n(0, usize::try_from(next() % 3000).expect("small"))),
            _ => {
                for _ in 0..next() % 400 {
                    let index = next() % 512 * (next() % 512) / 512;
                    bytes.extend_from_slice(&words[usize::try_from(index).expect("small")]);
                    bytes.push(b' ');
                }
            }
        }
    }
    bytes.truncate(size);
    bytes
}

pub(super) fn compress(compression: Compression, threads: usize, bytes: &[u8], piece: usize) -> Vec<u8> {
    let pool = Pool::new(NonZeroUsize::new(threads).expect("some threads"));
    let mut compressor = Compressor::new(compression, &pool).expect("a compressor");
    let mut compressed = Vec::new();
    let mut out = |chunk: Bytes| {
        compressed.extend_from_slice(&chunk);
        Ok::<_, CodecError>(())
    };
    for piece in bytes.chunks(piece) {
        compressor.write(piece, &mut out).expect("written");
    }
    compressor.finish(&mut out).expect("finished");
    compressed
}

fn decompress(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    Decoder::new(bytes).read_to_end(&mut out)?;
    Ok(out)
}

#[test]
fn output_is_the_same_for_any_number_of_threads_and_any_cut_of_the_writes() {
    let bytes = corpus(5_000_000);
    for compression in [Compression::GZIP, Compression::ZSTD] {
        let expected = compress(compression, 1, &bytes, bytes.len());
        assert!(decompress(&expected).expect("decompressed") == bytes);
        for (threads, piece) in [(1, 4096), (2, 1 << 20), (3, 100_003), (8, 65_536), (8, 777)] {
            assert!(
                compress(compression, threads, &bytes, piece) == expected,
                "{compression} {threads} {piece}"
            );
        }
    }
}

#[test]
fn any_size_round_trips() {
    let bytes = corpus(3 * deflate::BLOCK);
    for compression in [Compression::GZIP, Compression::ZSTD] {
        for size in [
            0,
            1,
            2,
            100,
            deflate::BLOCK - 1,
            deflate::BLOCK,
            deflate::BLOCK + 1,
            2 * deflate::BLOCK,
            bytes.len(),
        ] {
            let compressed = compress(compression, 2, &bytes[..size], 1 << 20);
            assert!(decompress(&compressed).expect("decompressed") == bytes[..size], "{compression} {size}");
        }
    }
}
