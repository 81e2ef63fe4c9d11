//! What is read, and what is refused.

use std::io::{BufReader, Read as _, Write as _};

use super::*;
use crate::codec::tests::{compress, corpus};
use crate::compression::Compression;

fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    Decoder::new(bytes).read_to_end(&mut out)?;
    Ok(out)
}

fn error(bytes: &[u8]) -> CodecError {
    let error = read(bytes).expect_err("refused");
    CodecError::inside(&error).expect("the codec's own error").clone()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    compress(Compression::GZIP, 1, bytes, usize::MAX)
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    compress(Compression::ZSTD, 1, bytes, usize::MAX)
}

/// A skippable frame, as zstd:chunked has them (RFC 8878, 3.1.2).
const SKIPPABLE: &[u8] = b"\x5a\x2a\x4d\x18\x03\0\0\0abc";

#[test]
fn all_members_and_frames_are_read() {
    let one = corpus(100_000);
    let two = corpus(300_000);
    let both = [&one[..], &two].concat();
    assert!(read(&[gzip(&one), gzip(b""), gzip(&two)].concat()).expect("read") == both);
    assert!(
        read(&[zstd(&one), SKIPPABLE.to_vec(), zstd(b""), zstd(&two), SKIPPABLE.to_vec()].concat())
            .expect("read")
            == both
    );
    assert!(read(&[SKIPPABLE, &zstd(&one)].concat()).expect("read") == one);
    assert!(read(&one).expect("read") == one);
    assert_eq!(read(b"").expect("read"), b"");
    assert_eq!(read(b"\x1f").expect("read"), b"\x1f");
}

#[test]
fn input_may_come_byte_by_byte_and_output_be_taken_so() {
    let bytes = corpus(5000);
    for stored in [gzip(&bytes), [zstd(&bytes), SKIPPABLE.to_vec()].concat(), bytes.clone()] {
        let decoder = Decoder::new(BufReader::with_capacity(1, &stored[..]));
        assert!(decoder.bytes().collect::<io::Result<Vec<u8>>>().expect("read") == bytes);
    }
}

#[test]
fn the_format_is_known_before_anything_is_read() {
    for (stored, format) in
        [(gzip(b"x"), Format::Gzip), (zstd(b"x"), Format::Zstd), (b"x".to_vec(), Format::None)]
    {
        let mut decoder = Decoder::new(BufReader::with_capacity(3, &stored[..]));
        assert_eq!(decoder.format().expect("sniffed"), format);
        let mut out = String::new();
        decoder.read_to_string(&mut out).expect("read");
        assert_eq!(
            (out.as_str(), decoder.compressed(), decoder.uncompressed()),
            ("x", stored.len() as u64, 1)
        );
        assert_eq!(decoder.format().expect("known"), format);
    }
}

#[test]
fn a_format_that_was_promised_is_demanded() {
    for format in [Format::Gzip, Format::Zstd] {
        for bytes in [&b"plain text"[..], b""] {
            let mut decoder = Decoder::with_format(bytes, format).expect("a decoder");
            let error = decoder.read_to_end(&mut Vec::new()).expect_err("refused");
            let error = CodecError::inside(&error).expect("the codec's own error");
            assert!(
                matches!(error, CodecError::Corrupt { .. } | CodecError::Truncated { compressed: 0, .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn truncated_input_names_where_it_ends() {
    let bytes = corpus(20_000);
    for (stored, format) in [(gzip(&bytes), Format::Gzip), (zstd(&bytes), Format::Zstd)] {
        for cut in (4..stored.len()).step_by(97).chain(stored.len() - 9..stored.len()) {
            match error(&stored[..cut]) {
                CodecError::Truncated { format: found, compressed, uncompressed } => {
                    assert_eq!((found, compressed), (format, cut as u64));
                    assert!(uncompressed <= bytes.len() as u64);
                }
                other => panic!("{cut}: {other}"),
            }
        }
    }
}

#[test]
fn an_error_stays() {
    let stored = gzip(b"text");
    let mut decoder = Decoder::new(&stored[..stored.len() - 1]);
    for _ in 0..3 {
        let error = decoder.fill_buf().expect_err("truncated");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(matches!(CodecError::inside(&error), Some(CodecError::Truncated { .. })));
    }
}

#[test]
fn after_gzip_there_may_be_zeros_and_nothing_else() {
    let stored = gzip(b"text");
    let end = stored.len() as u64;
    for zeros in [1, 511, 100_000] {
        assert_eq!(read(&[&stored[..], &vec![0; zeros]].concat()).expect("read"), b"text");
    }
    for garbage in [&b"garbage"[..], b"\0\0garbage", b"\0\x1f\x8b\x08", &[&[0; 600][..], b"x"].concat()] {
        match error(&[&stored[..], garbage].concat()) {
            CodecError::Trailing { format: Format::Gzip, compressed, uncompressed: 4 } => {
                assert_eq!(compressed, end);
            }
            other => panic!("{other}"),
        }
    }
    // What looks like another member has to be one.
    assert!(matches!(error(&[&stored[..], b"\x1f"].concat()), CodecError::Truncated { .. }));
    assert!(matches!(error(&[&stored[..], b"\x1f and so on"].concat()), CodecError::Corrupt { .. }));
}

#[test]
fn after_zstd_there_are_only_frames() {
    let stored = zstd(b"text");
    for garbage in [&b"garbage"[..], b"\0\0\0\0", &gzip(b"text")] {
        match error(&[&stored[..], garbage].concat()) {
            CodecError::Trailing { format: Format::Zstd, compressed, uncompressed: 4 } => {
                assert_eq!(compressed, stored.len() as u64);
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_changed_byte_is_found() {
    let bytes = corpus(3000);
    let stored = gzip(&bytes);
    // No checksum covers the ten bytes of the header, nor the bits that fill the last byte before the trailer.
    for at in (10..stored.len()).filter(|at| at + 9 != stored.len()) {
        let mut changed = stored.clone();
        changed[at] ^= 0x10;
        assert!(read(&changed).is_err(), "byte {at}");
    }
    let stored = zstd(&bytes);
    let mut changed = stored.clone();
    *changed.last_mut().expect("not empty") ^= 1;
    assert!(matches!(error(&changed), CodecError::Corrupt { format: Format::Zstd, .. }));
}

#[test]
fn every_field_of_a_gzip_header_is_understood() {
    let plain = gzip(b"text");
    let fields = flate2::GzBuilder::new().filename("name").comment("comment").extra(*b"extra").mtime(7);
    let mut writer = fields.write(Vec::new(), flate2::Compression::fast());
    writer.write_all(b"text").expect("written");
    assert_eq!(read(&writer.finish().expect("finished")).expect("read"), b"text");

    let mut header = plain[..10].to_vec();
    header[3] = FHCRC | FNAME;
    header.extend(b"name\0");
    let mut crc = flate2::Crc::new();
    crc.update(&header);
    let crc = crc.sum().to_le_bytes();
    let with_crc = [&header[..], &crc[..2], &plain[10..]].concat();
    assert_eq!(read(&with_crc).expect("read"), b"text");
    let wrong = [&header[..], &[!crc[0], crc[1]], &plain[10..]].concat();
    assert!(matches!(error(&wrong), CodecError::Corrupt { .. }));
    let mut reserved = plain;
    reserved[3] = 0x80;
    assert!(matches!(error(&reserved), CodecError::Corrupt { .. }));
}
const FHCRC: u8 = 2;
const FNAME: u8 = 8;

#[test]
fn expansion_is_capped() {
    let bytes = vec![0; 1_000_000];
    for stored in [gzip(&bytes), zstd(&bytes), bytes.clone()] {
        assert!(Decoder::new(&stored[..]).limit(1_000_000).read_to_end(&mut Vec::new()).is_ok());
        let mut out = Vec::new();
        let error = Decoder::new(&stored[..]).limit(999_999).read_to_end(&mut out).expect_err("too large");
        assert!(out.len() <= 999_999);
        assert!(
            matches!(CodecError::inside(&error), Some(CodecError::TooLarge { limit: 999_999, .. })),
            "{error}"
        );
    }
}

#[test]
fn a_zstd_frame_may_not_ask_for_any_amount_of_memory() {
    // A window of 2^28 bytes and an empty last block (RFC 8878, 3.1.1).
    let frame = b"\x28\xb5\x2f\xfd\x00\x90\x01\0\0";
    assert_eq!(error(frame), CodecError::Window { max_log: 27, compressed: 0 });
    // Of 2^27, the most that is accepted.
    assert_eq!(read(b"\x28\xb5\x2f\xfd\x00\x88\x01\0\0").expect("read"), b"");
}

#[test]
fn errors_of_the_reader_pass_through() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::new(io::ErrorKind::ConnectionReset, "reset"))
        }
    }
    let stored = gzip(&corpus(10_000));
    let reader = BufReader::new(stored[..stored.len() / 2].chain(Broken));
    let error = Decoder::new(reader).read_to_end(&mut Vec::new()).expect_err("broken");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(CodecError::inside(&error).is_none());
}
