//! What is written can be read again, by another implementation.

use flate2::{Decompress, FlushDecompress, Status};
use proptest::prelude::*;

use super::{BLOCK, Encoder, Window};

fn inflate(deflated: &[u8]) -> Vec<u8> {
    let mut inflate = Decompress::new(false);
    let mut out = Vec::with_capacity(4 * BLOCK);
    let status = inflate.decompress_vec(deflated, &mut out, FlushDecompress::Finish);
    assert!(matches!(status, Ok(Status::StreamEnd)), "{status:?}");
    assert_eq!(inflate.total_in(), deflated.len() as u64, "nothing follows");
    out
}

/// Deflates pieces, each a block with those before it as dictionary.
fn deflate(level: u8, pieces: &[Vec<u8>]) -> Vec<u8> {
    let mut encoder = Encoder::new(level);
    let mut window = Window::new();
    let mut deflated = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        assert_eq!(window.fill(piece), piece.len());
        deflated.extend_from_slice(encoder.compress_block(&window, index + 1 == pieces.len()));
        let mut next = Window::new();
        next.restart(&window);
        window = next;
    }
    deflated
}

fn check(level: u8, pieces: &[Vec<u8>]) -> usize {
    let deflated = deflate(level, pieces);
    assert!(inflate(&deflated) == pieces.concat(), "level {level}");
    deflated.len()
}

/// Bytes that a generator gives, incompressible.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

#[test]
fn every_level_writes_every_short_input() {
    let text = b"abcabcabcabcdabcdabcde, and the same again: abcabcabcabcdabcdabcde";
    for level in 1..=9 {
        for size in 0..text.len() {
            check(level, &[text[..size].to_vec()]);
        }
    }
}

#[test]
fn sizes_around_the_bounds_of_views_and_segments() {
    let mut bytes = noise(40_000);
    bytes.extend_from_within(5..);
    bytes.extend_from_within(..20_000);
    for level in [1, 3, 6] {
        for bound in [8192, 32_768, 65_536, 98_304] {
            for size in [bound - 12, bound - 5, bound - 4, bound - 1, bound, bound + 1, bound + 13] {
                check(level, &[bytes[..size].to_vec(), bytes[..300].to_vec()]);
            }
        }
    }
}

#[test]
fn noise_is_stored() {
    for level in 1..=9 {
        let size = check(level, &[noise(100_000)]);
        assert!(size <= 100_000 + 2 * 5, "level {level}: {size}");
    }
}

#[test]
fn runs_take_next_to_nothing() {
    for level in 1..=9 {
        let size = check(level, &[vec![0; BLOCK]]);
        assert!(size < 600, "level {level}: {size}");
    }
}

#[test]
fn matches_reach_32_kib_back_into_the_block_before_and_no_farther() {
    for level in 1..=9 {
        let piece = noise(32 * 1024 - 300);
        let alone = check(level, std::slice::from_ref(&piece));
        let near = check(level, &[piece.clone(), piece.clone()]);
        assert!(near < alone + 1000, "level {level}: {near}");
        let far = check(level, &[[&piece[..], &[7; 600]].concat(), piece.clone()]);
        assert!(far > 2 * piece.len() - 1000, "level {level}: {far}");
    }
}

#[test]
fn as_many_short_matches_as_can_be() {
    let words = noise(300);
    let bytes: Vec<u8> =
        noise(80_000).iter().flat_map(|&at| &words[usize::from(at)..][..3]).copied().collect();
    for level in 1..=9 {
        check(level, std::slice::from_ref(&bytes));
    }
}

#[test]
fn an_encoder_forgets_what_it_wrote_before() {
    let mut encoder = Encoder::new(2);
    let mut first = Window::new();
    first.fill(&noise(70_000));
    let mut second = Window::new();
    second.fill(&noise(90_000)[30_000..]);
    let expected = Encoder::new(2).compress_block(&second, true).to_vec();
    encoder.compress_block(&first, false);
    assert!(encoder.compress_block(&second, true) == expected);
}

#[test]
fn what_stands_after_the_input_is_of_no_influence() {
    let bytes = noise(1000).repeat(3);
    let mut clean = Window::new();
    clean.fill(&bytes);
    let mut used = Window::new();
    used.fill(&[&bytes[..], &bytes].concat());
    used.restart(&Window::new());
    used.fill(&bytes);
    for level in 1..=9 {
        let expected = Encoder::new(level).compress_block(&clean, true).to_vec();
        assert!(Encoder::new(level).compress_block(&used, true) == expected, "level {level}");
    }
}

/// A stretch of input of one kind.
#[derive(Clone, Debug)]
enum Stretch {
    Noise(Vec<u8>),
    Run(u8, usize),
    /// What stood so far back, as long.
    Copy(usize, usize),
    Text(String),
}

fn stretches() -> impl Strategy<Value = Vec<u8>> {
    let stretch = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..2000).prop_map(Stretch::Noise),
        (any::<u8>(), 0_usize..3000).prop_map(|(byte, size)| Stretch::Run(byte, size)),
        (1_usize..60_000, 1_usize..1000).prop_map(|(back, size)| Stretch::Copy(back, size)),
        "[a-e ]{0,800}".prop_map(Stretch::Text),
    ];
    prop::collection::vec(stretch, 0..60).prop_map(|stretches| {
        let mut bytes = Vec::new();
        for stretch in stretches {
            match stretch {
                Stretch::Noise(noise) => bytes.extend(noise),
                Stretch::Run(byte, size) => bytes.extend(std::iter::repeat_n(byte, size)),
                Stretch::Copy(back, size) => {
                    for _ in 0..size {
                        bytes.push(bytes.len().checked_sub(back).map_or(0, |at| bytes[at]));
                    }
                }
                Stretch::Text(text) => bytes.extend(text.into_bytes()),
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn anything_round_trips(pieces in prop::collection::vec(stretches(), 1..4), level in 1_u8..=9) {
        check(level, &pieces);
    }
}
