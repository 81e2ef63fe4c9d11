//! What holds for all compressors.

use std::io::Read as _;
use std::num::NonZeroUsize;

use bytes::Bytes;

use super::deflate::BLOCK;
use super::{CodecError, Compressor, Decoder, Pool};
use crate::compression::Compression;
use crate::digest::Digest;

/// Text-like, repetitive and random stretches, the same on every machine.
pub(super) fn corpus(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut below = move |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).expect("31 bits") % limit
    };
    let letters = b"etaoinshrdlucmfwypvbgkqjxz";
    let words: Vec<Vec<u8>> = (0..512)
        .map(|_| {
            let length = 2 + below(9);
            (0..length).map(|_| letters[below(26).min(below(26))]).collect()
        })
        .collect();
    let mut bytes = Vec::with_capacity(size + 4096);
    while bytes.len() < size {
        match below(8) {
            0 => bytes.extend((0..below(3000)).map(|_| below(256).to_le_bytes()[0])),
            1 => bytes.extend(std::iter::repeat_n(0, below(3000))),
            _ => {
                for _ in 0..below(400) {
                    bytes.extend_from_slice(&words[below(512).min(below(512))]);
                    bytes.push(b' ');
                }
            }
        }
    }
    bytes.truncate(size);
    bytes
}

/// Compresses bytes that are written in pieces, on a pool of their own.
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

fn decompress(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Decoder::new(bytes).read_to_end(&mut out).expect("decompressed");
    out
}

#[test]
fn output_is_the_same_for_any_number_of_threads_and_any_cut_of_the_writes() {
    let bytes = corpus(6 * BLOCK + 12345);
    for compression in [Compression::GZIP, Compression::ZSTD] {
        let expected = compress(compression, 1, &bytes, bytes.len());
        assert!(decompress(&expected) == bytes);
        for (threads, piece) in [(1, 4096), (2, 1 << 20), (3, 100_003), (8, 777)] {
            assert!(
                compress(compression, threads, &bytes, piece) == expected,
                "{compression} {threads} {piece}"
            );
        }
    }
}

#[test]
fn any_size_round_trips() {
    let bytes = corpus(3 * BLOCK);
    for compression in [Compression::GZIP, Compression::ZSTD] {
        for size in [0, 1, 2, 100, BLOCK - 1, BLOCK, BLOCK + 1, bytes.len()] {
            assert!(
                decompress(&compress(compression, 2, &bytes[..size], 1 << 20)) == bytes[..size],
                "{size}"
            );
        }
    }
}

#[test]
fn empty_writes_change_nothing() {
    for compression in [Compression::GZIP, Compression::ZSTD] {
        let expected = compress(compression, 1, b"", 1);
        let mut compressor = Compressor::new(compression, Pool::shared()).expect("a compressor");
        let mut compressed = Vec::new();
        let mut out = |chunk: Bytes| {
            compressed.extend_from_slice(&chunk);
            Ok::<_, CodecError>(())
        };
        compressor.write(b"", &mut out).expect("written");
        compressor.write(b"", &mut out).expect("written");
        compressor.finish(&mut out).expect("finished");
        assert_eq!(compressed, expected);
    }
}

#[test]
fn a_consumer_that_fails_ends_the_work_and_not_the_pool() {
    let pool = Pool::new(NonZeroUsize::new(2).expect("two"));
    let bytes = corpus(4 * BLOCK);
    for compression in [Compression::GZIP, Compression::ZSTD] {
        let mut compressor = Compressor::new(compression, &pool).expect("a compressor");
        let mut fail = |_: Bytes| Err(CodecError::Zstd("the consumer's own error"));
        let mut result = Ok(());
        while result.is_ok() {
            result = compressor.write(&bytes, &mut fail);
        }
        assert_eq!(result, Err(CodecError::Zstd("the consumer's own error")));
        drop(compressor);
        let unfinished = Compressor::new(compression, &pool).expect("a compressor");
        drop(unfinished);
    }
    let mut compressor = Compressor::new(Compression::GZIP, &pool).expect("a compressor");
    let mut size = 0;
    let mut out = |chunk: Bytes| {
        size += chunk.len();
        Ok::<_, CodecError>(())
    };
    compressor.write(&bytes, &mut out).expect("written");
    compressor.finish(&mut out).expect("finished");
    assert!(size > 0);
}

/// What these bytes are compressed to is part of what we promise: a layer that is written again, on another machine or by another
/// release, keeps its digest. A change here is a change of every digest that users have stored.
#[test]
fn output_never_changes() {
    let bytes = corpus(BLOCK + 50_000);
    assert_eq!(Digest::sha256(&bytes).hex(), CORPUS, "the corpus");
    let mut found = Vec::new();
    for (compression, _) in GOLDEN {
        let compressed = compress(compression.parse().expect("valid"), 2, &bytes, 65536);
        assert!(decompress(&compressed) == bytes);
        found.push((*compression, Digest::sha256(&compressed).hex().to_owned()));
    }
    let expected: Vec<_> =
        GOLDEN.iter().map(|(compression, digest)| (*compression, (*digest).to_owned())).collect();
    assert_eq!(found, expected);
}

const CORPUS: &str = "6c9462553af49793f8e168f4f5c7551a025e1e673772d84f4e4879a42f18a636";
const GOLDEN: &[(&str, &str)] = &[
    ("gzip:1", "b5b0b67e72d34f12b4a893cb570e8c56eab94a8f6b900a54f3027b850416f9f9"),
    ("gzip:2", "f4cd92f076417efc9cbacfcf06064194e3aa094d914716acb4290700f853565e"),
    ("gzip:3", "a43fa22ef251726cf951c7eacfac3c2421b5029d43d53a8aae46732405edfe61"),
    ("gzip:4", "2a40bb1eb2f65a4fdffbbc8eaec1f7629dc06339e131f2649bf77c75330b2aea"),
    ("gzip:5", "af798de96a389767d962317e484a3b3616725771b1f3f182e200a76fd621cf7c"),
    ("gzip:6", "989a72124c2f7e9bb852fb08f79be46c2825af4f265422160d3cb532280136ff"),
    ("gzip:7", "daee9d71d70a2d98396468d6986ea41257503457da959cf996b922d81782d4a8"),
    ("gzip:8", "b61db59181ded1c6c940a6db95bccb3e96c4190cf88fd58f4ce57af5443591da"),
    ("gzip:9", "7bba97d59ba7441b580efc8a3b04c4634f9b40e18c5630fa491438b15916c2bb"),
    ("zstd:1", "2f3bc0b675d50d6b37229e9b038f76d230fb6c8754b9823ba95a5e846e697528"),
    ("zstd:3", "a67a9cebecbb6126ab51c23c9a46af9d08e36beda896934d6b6e9621871ad990"),
    ("zstd:9", "c2579b2ef29609e83300cfeb5f60fd719fab7b17fb3618743f9685e857bc3600"),
    ("zstd:19", "d4b39b0d7666dc5f1f1dd15ca09826140e555edd253ed1de3ba9c40772cf8adc"),
];
