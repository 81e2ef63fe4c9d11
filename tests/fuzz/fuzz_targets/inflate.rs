//! Raw deflate in pieces of any size: what zlib-rs reads, with the same bytes and the same end, and nothing else.
#![no_main]

use flate2::{Decompress, FlushDecompress};
use libfuzzer_sys::fuzz_target;
use occy_pipeline::codec::inflate::{Inflate, Status};

/// More than the window of either.
const LIMIT: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    // The first byte says how large the pieces are.
    let Some((&size, stream)) = bytes.split_first() else { return };
    let size = 1 + usize::from(size).pow(2);
    let mut expected = Vec::with_capacity(LIMIT);
    let mut zlib = Decompress::new(false);
    let status = zlib.decompress_vec(stream, &mut expected, FlushDecompress::None);
    let is_whole = matches!(status, Ok(flate2::Status::StreamEnd));

    let mut inflate = Inflate::new();
    let (mut out, mut used) = (Vec::new(), 0);
    let ended = loop {
        let rest = &stream[used..];
        let (now, status) = inflate.inflate(&rest[..rest.len().min(size)]);
        used += now;
        let amount = inflate.unread().len();
        out.extend_from_slice(inflate.unread());
        inflate.consume(amount);
        match status {
            Ok(Status::Ended) => break true,
            Ok(Status::NeedsInput) if used == stream.len() => break false,
            Ok(_) if out.len() > LIMIT => break false,
            Ok(_) => {}
            Err(_) => break false,
        }
    };
    let both = out.len().min(expected.len());
    assert!(out[..both] == expected[..both], "the same bytes");
    // Of what is as long as the limit, zlib has perhaps not seen the end.
    if is_whole || expected.len() < LIMIT {
        assert_eq!(ended, is_whole, "both see the end");
    }
    if is_whole {
        assert_eq!((used as u64, out.len()), (zlib.total_in(), expected.len()));
    }
});
