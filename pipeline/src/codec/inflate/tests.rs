//! What is read, and what is refused, is as zlib has it, whatever pieces the stream comes in and is taken in.

use std::ops::Range;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use proptest::prelude::*;

use super::{Inflate, Invalid, PRECODE_ORDER, Status};
use crate::codec::tests::corpus;

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// After so many bytes of input.
    Whole(usize),
    Truncated,
    Refused,
}

/// What zlib makes of a stream.
fn reference(deflated: &[u8]) -> (Vec<u8>, End) {
    let mut inflate = Decompress::new(false);
    let mut out = Vec::new();
    loop {
        out.reserve(64 * 1024);
        let used = usize::try_from(inflate.total_in()).expect("a short stream");
        let (before, size) = (inflate.total_in(), out.len());
        match inflate.decompress_vec(&deflated[used..], &mut out, FlushDecompress::None) {
            Ok(flate2::Status::StreamEnd) => {
                return (out, End::Whole(usize::try_from(inflate.total_in()).expect("a short stream")));
            }
            Err(_) => return (out, End::Refused),
            Ok(_) if inflate.total_in() == before && out.len() == size => return (out, End::Truncated),
            Ok(_) => {}
        }
    }
}

/// What we make of a stream that comes in pieces of these sizes and is read in pieces of those, in turn.
fn ours(deflated: &[u8], given: &[usize], taken: &[usize]) -> (Vec<u8>, End) {
    let mut inflate = Inflate::new();
    read_one(&mut inflate, deflated, given, taken)
}

fn read_one(inflate: &mut Inflate, deflated: &[u8], given: &[usize], taken: &[usize]) -> (Vec<u8>, End) {
    let (mut given, mut taken) = (given.iter().cycle(), taken.iter().cycle());
    let (mut used, mut out) = (0, Vec::new());
    let mut take = |inflate: &mut Inflate, at_most: usize| {
        let amount = inflate.unread().len().min(at_most);
        out.extend_from_slice(&inflate.unread()[..amount]);
        inflate.consume(amount);
    };
    let end = loop {
        let rest = &deflated[used..];
        let piece = &rest[..rest.len().min(*given.next().expect("a cycle"))];
        let (now, status) = inflate.inflate(piece);
        assert!(now <= piece.len());
        used += now;
        match status {
            Ok(Status::Ended) => break End::Whole(used),
            Ok(Status::NeedsInput) => {
                assert_eq!(now, piece.len(), "all input is used");
                if piece.len() == rest.len() {
                    break End::Truncated;
                }
            }
            Ok(Status::Full) => assert!(!inflate.unread().is_empty(), "there is something to read"),
            Err(Invalid) => break End::Refused,
        }
        take(inflate, *taken.next().expect("a cycle"));
    };
    take(inflate, usize::MAX);
    (out, end)
}

/// Checks that both make the same of a stream, and gives what it holds if it is valid.
fn agree_in(deflated: &[u8], given: &[usize], taken: &[usize]) -> Option<Vec<u8>> {
    let (expected, expected_end) = reference(deflated);
    let (out, end) = ours(deflated, given, taken);
    if let (End::Whole(_), _) | (_, End::Whole(_)) = (end, expected_end) {
        assert_eq!(end, expected_end);
        assert!(out == expected, "the same bytes");
        return Some(out);
    }
    // How far each came before it gave up is its own affair.
    let both = out.len().min(expected.len());
    assert!(out[..both] == expected[..both], "the same bytes before the error");
    None
}

fn agree(deflated: &[u8]) -> Option<Vec<u8>> {
    let whole = agree_in(deflated, &[usize::MAX], &[usize::MAX]);
    for size in [1, 2, 7, 23, 100] {
        assert!(agree_in(deflated, &[size], &[usize::MAX]) == whole);
    }
    // The fast loop begins with what every smaller piece leaves.
    agree_in(deflated, &[1, 40, 2, 3, 300], &[1, 100_000]);
    whole
}

/// Bits of a stream, written one by one.
#[derive(Clone, Default)]
struct Writer {
    bytes: Vec<u8>,
    count: usize,
}

/// A code's words, by symbol: bits, and how many.
type Code = Vec<(u32, u32)>;

impl Writer {
    /// A number, its lowest bit first, and zeros above it.
    fn number(&mut self, value: usize, bits: u32) -> &mut Self {
        for bit in 0..bits {
            if self.count.is_multiple_of(8) {
                self.bytes.push(0);
            }
            let last = self.bytes.last_mut().expect("just pushed");
            *last |= u8::from(value.checked_shr(bit).is_some_and(|rest| rest & 1 == 1)) << (self.count % 8);
            self.count += 1;
        }
        self
    }

    /// A codeword, its highest bit first.
    fn word(&mut self, (word, bits): (u32, u32)) -> &mut Self {
        for bit in (0..bits).rev() {
            self.number((word >> bit & 1) as usize, 1);
        }
        self
    }

    fn header(&mut self, is_last: bool, kind: usize) -> &mut Self {
        self.number(usize::from(is_last), 1).number(kind, 2)
    }

    fn stored(&mut self, is_last: bool, bytes: &[u8]) -> &mut Self {
        self.header(is_last, 0);
        self.count = self.bytes.len() * 8;
        self.number(bytes.len(), 16).number(!bytes.len() & 0xffff, 16);
        self.bytes.extend_from_slice(bytes);
        self.count = self.bytes.len() * 8;
        self
    }

    /// A dynamic block's header, in which each length stands for itself.
    fn dynamic(&mut self, litlen: &[u8], distance: &[u8]) -> &mut Self {
        self.header(true, 2).number(litlen.len() - 257, 5).number(distance.len() - 1, 5).number(15, 4);
        for symbol in PRECODE_ORDER {
            self.number(if symbol < 16 { 4 } else { 0 }, 3);
        }
        for &length in litlen.iter().chain(distance) {
            self.word((length.into(), 4));
        }
        self
    }

    fn agree(&self) -> Option<Vec<u8>> {
        agree(&self.bytes)
    }
}

/// The canonical code of these lengths (RFC 1951, 3.2.2).
fn code(lengths: &[u8]) -> Code {
    let mut words = vec![(0, 0); lengths.len()];
    let mut next = 0;
    for bits in 1..=15 {
        next <<= 1;
        for (word, _) in words.iter_mut().zip(lengths).filter(|(_, length)| **length == bits) {
            *word = (next, bits.into());
            next += 1;
        }
    }
    words
}

fn fixed() -> (Code, Code) {
    let mut lengths = [8; 288];
    lengths[144..256].fill(9);
    lengths[256..280].fill(7);
    (code(&lengths), code(&[5; 32]))
}

#[test]
fn empty_blocks_of_every_kind() {
    let (litlen, _) = fixed();
    let mut writer = Writer::default();
    writer.stored(false, b"").stored(false, b"one").stored(false, b"");
    for _ in 0..3 {
        writer.header(false, 1).word(litlen[256]);
    }
    writer.header(false, 1).word(litlen[usize::from(b'!')]).word(litlen[256]).stored(true, b"");
    assert_eq!(writer.agree().as_deref(), Some(&b"one!"[..]));
    assert_eq!(Writer::default().stored(true, b"").agree().as_deref(), Some(&b""[..]));
    assert_eq!(Writer::default().header(true, 1).word(litlen[256]).agree().as_deref(), Some(&b""[..]));
    assert_eq!(agree(b""), None);
}

#[test]
fn what_follows_the_stream_is_left() {
    let (litlen, _) = fixed();
    let mut writer = Writer::default();
    let stream = writer.header(true, 1).word(litlen[usize::from(b'x')]).word(litlen[256]).bytes.clone();
    let followed = [&stream[..], &[0xff; 100]].concat();
    assert_eq!(agree(&followed).as_deref(), Some(&b"x"[..]));
    for size in 1..200 {
        assert_eq!(ours(&followed, &[size], &[1]).1, End::Whole(stream.len()));
    }
}

#[test]
fn blocks_that_no_one_writes_are_refused() {
    assert_eq!(Writer::default().header(true, 3).number(0, 32).agree(), None);
    // The complement of a stored block's length.
    assert_eq!(
        Writer::default().header(true, 0).number(0, 5).number(3, 16).number(3, 16).number(0, 24).agree(),
        None
    );
    // Symbols that the fixed codes have and the format has not.
    let (litlen, distance) = fixed();
    for symbol in [286, 287] {
        let mut writer = Writer::default();
        writer.stored(false, b"abc").header(true, 1).word(litlen[symbol]).number(0, 200);
        assert_eq!(writer.agree(), None);
    }
    for symbol in [30, 31] {
        let mut writer = Writer::default();
        writer.stored(false, b"abc").header(true, 1).word(litlen[257]).word(distance[symbol]).number(0, 200);
        assert_eq!(writer.agree(), None);
    }
}

#[test]
fn the_longest_matches_and_distances() {
    let (litlen, distance) = fixed();
    let mut writer = Writer::default();
    writer.stored(false, b"x").header(true, 1);
    for _ in 0..2000 {
        writer.word(litlen[285]).word(distance[0]);
    }
    writer.word(litlen[256]);
    assert!(writer.agree() == Some(vec![b'x'; 1 + 2000 * 258]));

    let bytes = corpus(32_768);
    let mut writer = Writer::default();
    writer.stored(false, &bytes).header(true, 1);
    for _ in 0..300 {
        // 227 and 30 more, which is 257; 24577 and 8191 more, which is 32768.
        writer.word(litlen[284]).number(30, 5).word(distance[29]).number(8191, 13);
    }
    writer.word(litlen[256]);
    let expected: Vec<u8> = bytes.iter().copied().cycle().take(32_768 + 300 * 257).collect();
    assert!(writer.agree() == Some(expected));
}

#[test]
fn every_short_distance_repeats() {
    let (litlen, distance) = fixed();
    let seed = b"0123456789abcdefghijklmnopqrstuvwxyz";
    // Distance codes and their extra bits, for distances up to 32.
    let words = (1..=32).map(|away| match away {
        1..=4 => (away - 1, 0, 0),
        5..=8 => (4 + (away - 5) / 2, (away - 5) % 2, 1),
        9..=16 => (6 + (away - 9) / 4, (away - 9) % 4, 2),
        _ => (8 + (away - 17) / 8, (away - 17) % 8, 3),
    });
    for (away, (symbol, extra, bits)) in (1..).zip(words) {
        for length in 3..=10 {
            let mut writer = Writer::default();
            writer.stored(false, seed).header(true, 1);
            writer.word(litlen[254 + length]).word(distance[symbol]).number(extra, bits);
            writer.word(litlen[285]).word(distance[symbol]).number(extra, bits).word(litlen[256]);
            writer.stored(true, &[0; 64]);
            let mut expected = seed.to_vec();
            for _ in 0..length + 258 {
                expected.push(expected[expected.len() - away]);
            }
            assert!(writer.agree() == Some(expected), "{length} bytes, {away} back");
        }
    }
}

#[test]
fn matches_begin_within_the_stream() {
    let (litlen, distance) = fixed();
    let mut writer = Writer::default();
    writer.stored(false, b"x").header(true, 1).word(litlen[257]);
    let one = writer.clone().word(distance[0]).word(litlen[256]).number(0, 200).clone();
    assert_eq!(one.agree().as_deref(), Some(&b"xxxx"[..]));
    assert_eq!(writer.word(distance[1]).word(litlen[256]).number(0, 200).agree(), None);
    // What another stream left is not of this one.
    let mut inflate = Inflate::new();
    assert_eq!(read_one(&mut inflate, &one.bytes, &[9], &[9]).0, b"xxxx");
    inflate.restart();
    assert_eq!(read_one(&mut inflate, &writer.bytes, &[9], &[9]).1, End::Refused);
    inflate.restart();
    assert_eq!(read_one(&mut inflate, &one.bytes, &[9], &[9]).0, b"xxxx");
}

/// Lengths of which all are 0 but these.
fn lengths(symbols: usize, some: &[(usize, u8)]) -> Vec<u8> {
    let mut lengths = vec![0; symbols];
    for &(symbol, length) in some {
        lengths[symbol] = length;
    }
    lengths
}

#[test]
fn codes_of_one_symbol_are_incomplete_and_valid() {
    let litlens = lengths(258, &[(97, 2), (98, 2), (256, 2), (257, 2)]);
    let litlen = code(&litlens);
    let start = |distances: &[u8]| {
        let mut writer = Writer::default();
        writer.dynamic(&litlens, distances).word(litlen[97]);
        writer
    };
    for padding in [0, 300] {
        // One distance of one bit: 0 is it, 1 is nothing.
        let mut writer = start(&[1]);
        writer.word(litlen[257]).number(0, 1).word(litlen[256]).number(0, padding);
        assert_eq!(writer.agree().as_deref(), Some(&b"aaaa"[..]));
        assert_eq!(
            start(&[1]).word(litlen[257]).number(1, 1).word(litlen[256]).number(0, padding).agree(),
            None
        );
        // No distance at all.
        let mut writer = start(&[0]);
        assert_eq!(writer.word(litlen[256]).number(0, padding).agree().as_deref(), Some(&b"a"[..]));
        assert_eq!(
            start(&[0]).word(litlen[257]).number(0, 1).word(litlen[256]).number(0, padding).agree(),
            None
        );
        // Of two bits, or three codes where four fit.
        for distances in [&[2][..], &[2, 2, 2], &[1, 2]] {
            assert_eq!(start(distances).word(litlen[256]).number(0, padding).agree(), None);
        }
        // A block whose only symbol is its end.
        let end = lengths(257, &[(256, 1)]);
        let mut writer = Writer::default();
        assert_eq!(
            writer.dynamic(&end, &[0]).number(0, 1).number(0, padding).agree().as_deref(),
            Some(&b""[..])
        );
        assert_eq!(Writer::default().dynamic(&end, &[0]).number(1, 1).number(0, padding).agree(), None);
    }
}

#[test]
fn codes_that_cannot_be_are_refused() {
    let good = [(97, 1), (256, 1)];
    for (litlens, distances) in [
        // Over-subscribed.
        (lengths(257, &[(97, 1), (98, 1), (256, 1)]), vec![1]),
        (lengths(257, &good), vec![1, 1, 1]),
        // Incomplete.
        (lengths(257, &[(97, 2), (256, 2)]), vec![1]),
        // Without an end.
        (lengths(257, &[(97, 1), (98, 1)]), vec![1]),
        // More than there can be.
        (lengths(287, &good), vec![1]),
        (lengths(288, &good), vec![1]),
        (lengths(257, &good), lengths(31, &[(0, 1)])),
        (lengths(257, &good), lengths(32, &[(0, 1)])),
    ] {
        assert_eq!(Writer::default().dynamic(&litlens, &distances).number(usize::MAX, 60).agree(), None);
    }
    let most = (lengths(286, &good), lengths(30, &[(0, 1)]));
    let mut writer = Writer::default();
    assert_eq!(writer.dynamic(&most.0, &most.1).number(0b10, 2).agree().as_deref(), Some(&b"a"[..]));
}

/// The header of a dynamic block of 257 literals and lengths and so many distances, up to its precode, of these lengths.
fn precode(distances: usize, lengths: &[u8; 19]) -> Writer {
    let mut writer = Writer::default();
    writer.header(true, 2).number(0, 5).number(distances - 1, 5).number(15, 4);
    for symbol in PRECODE_ORDER {
        writer.number(lengths[usize::from(symbol)].into(), 3);
    }
    writer
}

#[test]
fn lengths_repeat_within_their_bounds() {
    // Of a precode there has to be all.
    let mut incomplete = [0; 19];
    assert_eq!(precode(1, &incomplete).number(0, 400).agree(), None);
    incomplete[1] = 1;
    assert_eq!(precode(1, &incomplete).number(0, 400).agree(), None);
    assert_eq!(precode(1, &[1; 19]).number(0, 400).agree(), None);

    let mut lengths = [0; 19];
    (lengths[0], lengths[1], lengths[16], lengths[18]) = (2, 2, 2, 2);
    let words = code(&lengths);
    // Nothing is before the first.
    assert_eq!(precode(1, &lengths).word(words[16]).number(0, 400).agree(), None);
    let zeros = |count: usize| (words[18], count - 11);
    let with_runs = |runs: &[usize]| {
        let mut writer = precode(1, &lengths);
        for (word, extra) in runs.iter().copied().map(zeros) {
            writer.word(word).number(extra, 7);
        }
        writer
    };
    // 255 zeros, two lengths of one bit, and no distance; the last run may not go on behind it.
    let mut writer = with_runs(&[138, 117]);
    writer.word(words[1]).word(words[1]).word(words[0]).number(0b10, 2);
    assert_eq!(writer.agree().as_deref(), Some(&b"\xff"[..]));
    // Nor may a repeated length.
    let mut writer = with_runs(&[138, 116]);
    writer.word(words[0]).word(words[1]).word(words[16]).number(0, 2).number(0, 400);
    assert_eq!(writer.agree(), None);
    let mut writer = with_runs(&[138, 116]);
    writer.word(words[1]).word(words[0]).word(words[1]).word(words[1]).number(0b10, 2).number(0, 400);
    assert_eq!(writer.agree().as_deref(), Some(&b"\xfe"[..]));
    let mut writer = with_runs(&[138, 117]);
    writer.word(words[1]).word(words[1]).word(words[18]).number(0, 7).number(0, 400);
    assert_eq!(writer.agree(), None);
}

#[test]
fn a_repeated_length_passes_from_one_code_to_the_other() {
    let mut lengths = [0; 19];
    (lengths[0], lengths[2], lengths[16], lengths[18]) = (2, 2, 2, 2);
    let words = code(&lengths);
    let mut writer = precode(4, &lengths);
    // 253 zeros, and two bits for three literals, the end and four distances.
    writer.word(words[18]).number(127, 7).word(words[18]).number(104, 7);
    writer.word(words[2]).word(words[16]).number(3, 2).word(words[2]);
    writer.word((1, 2)).word((3, 2));
    assert_eq!(writer.agree().as_deref(), Some(&b"\xfe"[..]));
}

#[test]
fn codes_of_fifteen_bits() {
    // A comb: every length up to 15, and 15 twice.
    let comb: Vec<u8> = (1..=15).chain([15]).collect();
    let mut litlens = lengths(286, &[]);
    let symbols: Vec<usize> = (90..98).chain([256]).chain(279..286).collect();
    for (&symbol, &length) in symbols.iter().zip(&comb) {
        litlens[symbol] = length;
    }
    let distances: Vec<u8> = [&[0; 14][..], &comb].concat();
    let (litlen, distance) = (code(&litlens), code(&distances));
    let bytes = corpus(32_768);
    let mut writer = Writer::default();
    writer.stored(false, &bytes).dynamic(&litlens, &distances);
    for round in 0..400_usize {
        writer.word(litlen[90 + round % 8]).word(litlen[97 - round % 3]);
        let (symbol, away) = (279 + round % 6, 14 + round % 16);
        writer.word(litlen[symbol]).number(round, if symbol == 279 || symbol == 280 { 4 } else { 5 });
        writer.word(distance[away]).number(round * 31, away as u32 / 2 - 1);
    }
    writer.word(litlen[256]);
    let out = writer.agree().expect("valid");
    assert!(out.len() > 32_768 + 400 * 60);
}

/// Bytes of many kinds: noise, repetitions of all distances, and text.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let noise = prop::collection::vec(any::<u8>(), 0..300);
    let nibbles = prop::collection::vec(0_u8..8, 0..2000);
    let repeated = (prop::collection::vec(any::<u8>(), 1..40), 1..300_usize)
        .prop_map(|(unit, times)| unit.repeat(times));
    let text = (0..5000_usize).prop_map(corpus);
    let far = (20_000..40_000_usize).prop_map(|size| [corpus(size), corpus(300)].concat());
    let parts = prop_oneof![4 => noise, 4 => nibbles, 4 => repeated, 4 => text, 1 => far];
    prop::collection::vec(parts, 0..8).prop_map(|parts| parts.concat())
}

fn deflated(bytes: &[u8], level: u32, flush_every: usize) -> Vec<u8> {
    let mut compress = Compress::new(Compression::new(level), false);
    let mut out = Vec::with_capacity(2 * bytes.len() + 100_000);
    for piece in bytes.chunks(flush_every) {
        compress.compress_vec(piece, &mut out, FlushCompress::Sync).expect("compressed");
    }
    compress.compress_vec(&[], &mut out, FlushCompress::Finish).expect("compressed");
    out
}

fn sizes(range: Range<usize>) -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1..30_usize, range], 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_stream_in_any_pieces(
        bytes in bytes(),
        level in 0..=9_u32,
        flush_every in prop_oneof![1000..5000_usize, Just(usize::MAX)],
        given in sizes(1..70_000),
        taken in sizes(1..200_000),
    ) {
        let stream = deflated(&bytes, level, flush_every);
        prop_assert!(agree_in(&stream, &given, &taken) == Some(bytes));
    }

    #[test]
    fn any_damage(
        bytes in bytes(),
        level in 0..=9_u32,
        damage in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u32), 1..4),
        early in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
        given in sizes(1..70_000),
        taken in sizes(1..200_000),
    ) {
        let mut stream = deflated(&bytes, level, usize::MAX);
        // Half of the damage is where headers are.
        let reach = if early { stream.len().min(100) } else { stream.len() };
        for (at, bit) in damage {
            stream[at.index(reach)] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            stream.truncate(cut.index(stream.len()));
        }
        agree_in(&stream, &given, &taken);
    }

    #[test]
    fn any_bits(
        is_last in any::<bool>(),
        kind in 1..3_usize,
        bits in prop::collection::vec(any::<u8>(), 0..2000),
        given in sizes(1..70),
    ) {
        let mut writer = Writer::default();
        writer.stored(false, &corpus(300)).header(is_last, kind);
        for byte in bits {
            writer.number(byte.into(), 8);
        }
        agree_in(&writer.bytes, &given, &[usize::MAX]);
    }

    #[test]
    fn any_codes(
        litlens in tree(286),
        distances in tree(30),
        symbols in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u16>()), 0..600),
        given in sizes(1..700),
    ) {
        // The end of the block needs a code: it takes that of the last symbol that has one.
        let mut litlens = litlens;
        if litlens[256] == 0 {
            let last = litlens.iter().rposition(|&length| length > 0).expect("a code");
            litlens.swap(256, last);
        }
        let (litlen, distance) = (code(&litlens), code(&distances));
        let used = |code: &Code| -> Vec<usize> { (0..code.len()).filter(|&symbol| code[symbol].1 > 0).collect() };
        let (used_litlen, used_distance) = (used(&litlen), used(&distance));
        let mut writer = Writer::default();
        writer.stored(false, &corpus(33_000)).dynamic(&litlens, &distances);
        for (first, second, extra) in symbols {
            let symbol = used_litlen[first.index(used_litlen.len())];
            if symbol == 256 {
                continue;
            }
            writer.word(litlen[symbol]);
            if symbol > 256 {
                let bits = if (265..285).contains(&symbol) { (symbol as u32 - 261) / 4 } else { 0 };
                let away = used_distance[second.index(used_distance.len())];
                writer.number(extra.into(), bits).word(distance[away]);
                writer.number(usize::from(extra) >> 3, (away as u32 / 2).saturating_sub(1));
            }
        }
        writer.word(litlen[256]);
        prop_assert!(agree_in(&writer.bytes, &given, &[usize::MAX]).is_some());
    }
}

/// Lengths of a complete code of some of so many symbols: leaves of a tree that is split anywhere.
fn tree(symbols: usize) -> impl Strategy<Value = Vec<u8>> {
    let splits = prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..symbols - 1);
    (splits, any::<prop::sample::Index>()).prop_map(move |(splits, shift)| {
        let mut leaves = vec![1_u8, 1];
        for (at, deepest) in splits {
            let open: Vec<usize> = (0..leaves.len()).filter(|&leaf| leaves[leaf] < 15).collect();
            let Some(last) = open.len().checked_sub(1) else { break };
            // Half of them deepen the tree, so that long codes are common.
            let leaf = open[if deepest { last } else { at.index(open.len()) }];
            leaves[leaf] += 1;
            leaves.push(leaves[leaf]);
        }
        leaves.resize(symbols, 0);
        leaves.rotate_right(shift.index(symbols));
        leaves
    })
}

#[test]
fn a_long_stream_passes_through_the_window() {
    let bytes = corpus(1_500_000);
    let stream = deflated(&bytes, 6, usize::MAX);
    for (given, taken) in [(usize::MAX, usize::MAX), (65_536, 16_384), (1000, 200_000), (5, 1_000_000)] {
        assert!(agree_in(&stream, &[given], &[taken]).as_ref() == Some(&bytes));
    }
    let bytes = corpus(600_000);
    let stream = deflated(&bytes, 0, usize::MAX);
    assert!(agree_in(&stream, &[10_000], &[100_000]) == Some(bytes));
}
