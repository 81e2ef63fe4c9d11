//! Corrupt, truncated and hostile tars: read as Go and Python read them, or refused with the offset. Never a third way.

#![allow(clippy::unwrap_used)]

mod tar_support;

use occy_pipeline::filter::FilterChain;
use occy_pipeline::layer::{LayerError, PassOutcome, fuzz_layer};
use occy_pipeline::tar::{Limits, Member, TarError, Walker};
use tar_support::{
    Archive, BLOCK, Header, chain, force_encoding, observe, python_reads, python_reads_all, record,
    records_payload, rewrite, rewrite_within, rewritten, run,
};

/// Names and sizes as the walker reads them.
fn members(tar: &[u8]) -> Result<Vec<(String, u64)>, TarError> {
    let mut walker = Walker::new(tar, Limits::default());
    let mut member = Member::default();
    let mut members = Vec::new();
    while walker.read_member(&mut member)? {
        if !member.is_global() {
            members.push((String::from_utf8_lossy(member.path()).into_owned(), member.size()));
        }
    }
    while walker.next_tail()?.is_some() {}
    assert_eq!(walker.offset(), tar.len() as u64, "every byte is handed out");
    Ok(members)
}

/// The walker and Python read the same members, and rewriting keeps them.
fn check_members(tar: &[u8], expected: &[(&str, u64)]) {
    let expected: Vec<_> = expected.iter().map(|&(name, size)| (name.to_owned(), size)).collect();
    assert_eq!(members(tar).unwrap(), expected);
    let encoded = rewrite(&force_encoding(), tar).unwrap().1;
    let normalized = rewritten(&["normalize-timestamps"], tar);
    for entries in python_reads_all(&[tar, &encoded, &normalized]) {
        let entries = entries.unwrap().into_iter();
        assert_eq!(entries.map(|entry| (entry.name, entry.size as u64)).collect::<Vec<_>>(), expected);
    }
}

/// The tar is refused by every kind of pass, with this text in the error.
fn check_refused(tar: &[u8], message: &str) {
    let chains: [&FilterChain; 3] = [
        &chain(&["search:pattern=*"]),
        &chain(&["normalize-timestamps", "exclude:pattern=x"]),
        &force_encoding(),
    ];
    for chain in chains {
        let error = rewrite(chain, tar).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// A tar whose only file would be `hidden`, for hiding it.
fn inner() -> Vec<u8> {
    Archive::new().file("hidden", "secret").end()
}

#[test]
fn a_pax_size_overrides_a_header_size_of_zero() {
    let size = inner().len();
    let tar = Archive::new()
        .pax(&[("size", &size.to_string())])
        .header(&Header::new("outer.tar", b'0', 0))
        .data(inner())
        .file("after", "x")
        .end();
    check_members(&tar, &[("outer.tar", size as u64), ("after", 1)]);
}

#[test]
fn a_pax_size_before_a_gnu_long_name_is_the_members() {
    let size = inner().len();
    let tar = Archive::new()
        .pax(&[("size", &size.to_string())])
        .gnu_long_name("outer.tar")
        .header(&Header::new("short", b'0', 0))
        .data(inner())
        .file("after", "x")
        .end();
    check_members(&tar, &[("outer.tar", size as u64), ("after", 1)]);
}

#[test]
fn a_gnu_long_name_before_a_pax_size_changes_nothing() {
    let size = inner().len();
    let tar = Archive::new()
        .gnu_long_name("outer.tar")
        .pax(&[("size", &size.to_string())])
        .header(&Header::new("short", b'0', 0))
        .data(inner())
        .end();
    check_members(&tar, &[("outer.tar", size as u64)]);
}

#[test]
fn a_tar_inside_a_tar_is_data() {
    let inner = inner();
    let tar = Archive::new().file("outer.tar", &inner).file("after", "x").end();
    check_members(&tar, &[("outer.tar", inner.len() as u64), ("after", 1)]);
    let tail = [tar.as_slice(), &inner].concat();
    check_members(&tail, &[("outer.tar", inner.len() as u64), ("after", 1)]);
    assert!(rewritten(&["normalize-timestamps"], &tail).ends_with(&inner), "what follows the marker is kept");
}

#[test]
fn the_last_of_repeated_records_counts() {
    let size = inner().len();
    let payload = records_payload(&[("size", "1"), ("size", &size.to_string())]);
    let tar = Archive::new().extension(b'x', &payload).header(&Header::new("a", b'0', 0)).data(inner()).end();
    check_members(&tar, &[("a", size as u64)]);
}

#[test]
fn members_without_data_have_none_whatever_size_they_claim() {
    let size = inner().len();
    let sized = [("size", &*size.to_string())];
    let mut tar = Archive::new();
    for flag in b"123456" {
        tar = tar.header(&Header::new("a", *flag, size).link("b"));
        tar = tar.pax(&sized).header(&Header::new("c", *flag, 0).link("b"));
    }
    let mut expected = [("a", 0), ("c", 0)].repeat(6);
    expected.push(("d", 4));
    check_members(&tar.file("d", "data").end(), &expected);
}

#[test]
fn vendor_types_have_data() {
    let tar = Archive::new().member(&Header::new("v", b'V', 6), "volume").file("b", "data").end();
    check_members(&tar, &[("v", 6), ("b", 4)]);
}

#[test]
fn old_directories_end_with_a_slash() {
    let tar = Archive::new().header(&Header::new("dir/", 0, 0)).member(&Header::new("file", 0, 1), "x").end();
    let mut walker = Walker::new(&tar[..], Limits::default());
    let mut member = Member::default();
    assert!(walker.read_member(&mut member).unwrap());
    assert_eq!(member.kind(), occy_pipeline::tar::Kind::Directory);
    assert!(walker.read_member(&mut member).unwrap());
    assert_eq!(member.kind(), occy_pipeline::tar::Kind::Regular);
    let kinds =
        |tar: &[u8]| python_reads(tar).unwrap().into_iter().map(|entry| entry.kind).collect::<Vec<_>>();
    assert_eq!(kinds(&tar), ["dir", "file"]);
    assert_eq!(kinds(&rewrite(&force_encoding(), &tar).unwrap().1), ["dir", "file"]);
}

#[test]
fn what_readers_disagree_on_is_refused() {
    let file = Header::new("a", b'0', 0);
    let two =
        |one: &[(&str, &str)], other: &[(&str, &str)]| Archive::new().pax(one).pax(other).header(&file).end();
    let overlong = |flag: u8, payload: &[u8], rest: &[u8]| {
        let header = Header::new("x", flag, payload.len());
        Archive::new().header(&header).data([payload, rest].concat()).member(&file, [0; BLOCK]).end()
    };
    for tar in [
        // Go takes the last extended header, Python the first.
        two(&[("size", "0")], &[("size", "512")]),
        two(&[("comment", "a")], &[("comment", "a")]),
        Archive::new().gnu_long_name("x").gnu_long_name("y").header(&file).end(),
        // Go prefers the GNU name, GNU tar the PAX one.
        Archive::new().pax(&[("path", "x")]).gnu_long_name("y").header(&file).end(),
        // Python reads on behind the size of records and names, to the end of their block.
        overlong(b'x', b"13 comment=a\n", b"12 size=512\n"),
        overlong(b'g', b"13 comment=a\n", b"12 size=512\n"),
        overlong(b'L', b"name", b"-longer"),
        // Only some know X.
        Archive::new().extension(b'X', &records_payload(&[("size", "512")])).member(&file, [0; BLOCK]).end(),
        // Go ignores global records.
        Archive::new().global(&[("size", "512")]).member(&file, [0; BLOCK]).end(),
        Archive::new().global(&[("path", "x")]).header(&file).end(),
        Archive::new().pax(&[("comment", "a")]).global(&[("comment", "b")]).header(&file).end(),
        // Go takes an empty value for the header's, Python for zero.
        Archive::new().pax(&[("mtime", "")]).header(&file).end(),
        Archive::new().gnu_long_name("dir/").member(&Header::new("dir", 0, 512), [1; BLOCK]).end(),
        // GNU tar and Python stop at the zero block, others go on.
        Archive::new().header(&file).data([0; BLOCK]).header(&file).end(),
    ] {
        assert!(matches!(members(&tar), Err(TarError::Ambiguous { .. })), "{:?}", members(&tar));
        check_refused(&tar, "ambiguous");
    }
}

#[test]
fn extension_headers_need_a_member() {
    let x = Archive::new().pax(&[("comment", "a")]);
    check_refused(&x.clone().end(), "an extension header without a member");
    check_refused(&x.0, "an extension header without a member");
    check_refused(&Archive::new().gnu_long_name("x").end(), "an extension header without a member");
}

#[test]
fn endless_extension_headers_end_in_an_error() {
    let mut tar = Archive::new();
    for _ in 0..1000 {
        tar = tar.pax(&[("comment", "again")]);
    }
    check_refused(&tar.end(), "two extension headers");
}

#[test]
fn lying_records_are_refused() {
    for payload in [
        &b"30 comment=too long\n"[..],
        b"5 comment=too short\n",
        b"comment=no length\n",
        b"99999999999999999999999 a=b\n",
        b"6 a=b\n6 a=b",
        b"7 a=b\n\0",
        b"10 path=a\0\n",
    ] {
        let tar = Archive::new().extension(b'x', payload).header(&Header::new("a", b'0', 0)).end();
        check_refused(&tar, "invalid PAX header at offset 0");
    }
    for (key, value) in
        [("size", "-1"), ("size", "1e3"), ("size", "9223372036854775808"), ("uid", "root"), ("mtime", "nan")]
    {
        let tar = Archive::new().pax(&[(key, value)]).header(&Header::new("a", b'0', 0)).end();
        check_refused(&tar, &format!("malformed PAX {key}"));
    }
}

#[test]
fn garbage_headers_are_refused_with_their_offset() {
    let good = Archive::new().file("a", "x").file("b", "y");
    let mut bad_sum = good.clone().end();
    bad_sum[2 * BLOCK + 1] ^= 1;
    check_refused(&bad_sum, "at offset 1024: its checksum does not match");
    check_refused(&bad_sum, "member 1");
    check_refused(&[b'x'; BLOCK], "at offset 0: its checksum does not match");
    let number = |at, bytes: &[u8]| Archive::new().header(&Header::new("a", b'0', 0).put(at, bytes)).end();
    check_refused(&number(124, b"99999999999\0"), "malformed size");
    check_refused(&number(124, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), "malformed size");
    check_refused(&number(124, b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), "malformed size");
    check_refused(&number(136, b"yesterday\0\0\0"), "malformed mtime");
    check_refused(&number(108, b"root\0\0\0\0"), "malformed uid");
}

#[test]
fn sizes_past_the_end_are_truncations() {
    for size in [&b"00000002000\0"[..], b"77777777777\0", b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"] {
        let tar = Archive::new().header(&Header::new("a", b'0', 0).put(124, size)).data([1; BLOCK]);
        check_refused(&tar.0, "truncated tar: it ends at offset 1024, inside a member's data");
    }
}

#[test]
fn every_truncation_is_an_error_or_a_clean_end() {
    let sparse = Header::new("s", b'S', 4)
        .gnu()
        .put(386, b"00000000000\x0000000000004\x00")
        .put(483, b"00000000010\0");
    let tar = Archive::new()
        .file("a", "x")
        .pax(&[("path", "long"), ("SCHILY.xattr.user.a", "b")])
        .file("b", [1; 600])
        .gnu_long_name("c")
        .directory("c")
        .global(&[("comment", "g")])
        .member(&sparse, "data")
        .hard_link("h", "a")
        .end();
    let all = members(&tar).unwrap();
    let chain = chain(&["exclude:pattern=a", "normalize-timestamps", "inspect:file=x"]);
    let mut clean = Vec::new();
    let interesting = |length: &usize| matches!(length % BLOCK, 0..3 | 505..) || length.is_multiple_of(61);
    for length in (0..tar.len()).filter(interesting) {
        let part = &tar[..length];
        match (members(part), rewrite(&chain, part)) {
            (Ok(found), Ok(_)) => {
                assert_eq!(found[..], all[..found.len()]);
                clean.push((length, found.len()));
            }
            (Err(error), Err(_)) => assert!(error.offset() <= length as u64),
            (walked, rewritten) => panic!("{length}: {walked:?}, {rewritten:?}"),
        }
    }
    // Between members, inside the padding of one, and in the end marker.
    let lengths: Vec<usize> = clean.iter().map(|&(length, _)| length).collect();
    assert!([0, 513, 610, 1024].iter().all(|length| lengths.contains(length)));
    let marker = (tar.len() - BLOCK..tar.len()).filter(interesting);
    assert!(lengths.ends_with(&marker.collect::<Vec<_>>()));
    assert!(!lengths.contains(&1), "inside a header");
    assert!(!lengths.contains(&512), "inside data");
    assert!(!lengths.contains(&1536), "inside records");
    let members = |(_, count): &(usize, usize)| *count;
    assert!(clean.iter().map(members).is_sorted());
}

#[test]
fn a_layer_cut_between_members_gets_its_end_marker_when_it_is_edited() {
    let whole = Archive::new().file("a", "x").file("b", "y");
    for cut in [0, 511] {
        let part = &whole.0[..whole.0.len() - cut];
        let written = rewritten(&["exclude:pattern=a"], part);
        assert!(written.len().is_multiple_of(BLOCK) && written.ends_with(&[0; 2 * BLOCK]));
        let names: Vec<String> =
            python_reads(&written).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["b"]);
        let tapped = ["inspect:file=a", "normalize-timestamps", "inspect:file=b", "search:pattern=*"];
        assert!(
            rewritten(&tapped, part).ends_with(&[0; 2 * BLOCK]),
            "also where a tap has the output's hash"
        );
        assert_eq!(rewritten(&["exclude:pattern=c"], part), part, "an unedited one stays as it is");
        assert_eq!(python_reads(&rewritten(&["exclude:pattern=*"], part)).unwrap(), []);
    }
}

#[test]
fn one_zero_block_may_end_the_input() {
    let tar = Archive::new().file("a", "x");
    let one = [&tar.0[..], &[0; BLOCK]].concat();
    check_members(&one, &[("a", 1)]);
    let ragged = [&tar.0[..], &[0; BLOCK + 7]].concat();
    check_members(&ragged, &[("a", 1)]);
    check_members(&[&tar.0[..], &[0; 20 * BLOCK]].concat(), &[("a", 1)]);
}

#[test]
fn caps_end_in_errors() {
    let limits = Limits { members: 2, extension: 2048, path: 200, holes: 1 << 20, kept: 1000, report: 200 };
    let check = |specs: &[&str], tar: &[u8], message: &str| {
        let error = rewrite_within(&chain(specs), tar, &limits).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    let normalize = &["normalize-timestamps"][..];
    check(
        normalize,
        &Archive::new().directory("a").directory("b").directory("c").end(),
        "the limit of 2 members",
    );
    check(
        normalize,
        &Archive::new().pax(&[("c", &"x".repeat(2048))]).directory("a").end(),
        "bytes of an extension header",
    );
    check(
        normalize,
        &Archive::new().global(&[("c", &"x".repeat(2048))]).end(),
        "bytes of an extension header",
    );
    check(
        normalize,
        &Archive::new().gnu_long_name(&"x".repeat(3000)).directory("a").end(),
        "bytes of an extension header",
    );
    check(normalize, &Archive::new().gnu_long_name(&"x".repeat(201)).directory("a").end(), "bytes of a path");
    check(
        normalize,
        &Archive::new().pax(&[("linkpath", &"x".repeat(201))]).symlink("a", "b").end(),
        "bytes of a path",
    );
    let mut globals = Archive::new();
    let records: Vec<String> = (0..129).map(|number| format!("key{number}")).collect();
    let payload = |half: &str| -> Vec<u8> {
        records.iter().flat_map(|key| record(format!("{key}{half}").as_bytes(), b"x")).collect()
    };
    for half in ["a", "b"] {
        globals = globals.extension(b'g', &payload(half));
    }
    let error = rewrite(&chain(normalize), &globals.end()).unwrap_err().to_string();
    assert!(error.contains("the limit of 256 global records"), "{error}");
    let large = "x".repeat(65_536);
    let error = rewrite(&chain(normalize), &Archive::new().global(&[("a", &large)]).end()).unwrap_err();
    assert!(error.to_string().contains("global records"), "{error}");
    let long = "n".repeat(90);
    let many = Archive::new().directory(&long).directory(&long);
    check(&["search:pattern=*"], &many.end(), "search would need more than 200 bytes");
    let linked = Archive::new().file("a", [1; 1001]).hard_link("b", "a").end();
    check(&["exclude:pattern=a"], &linked, "exclude would need more than 200 bytes");
    let limits = Limits { report: 1 << 20, ..limits };
    let error = rewrite_within(&chain(&["exclude:pattern=a"]), &linked, &limits).unwrap_err();
    assert!(matches!(error, LayerError::Kept { limit: 1000, .. }), "{error}");
    let hole = Header::new("s", b'S', 0).gnu().put(483, b"00010000000\0");
    let error = rewrite_within(&chain(normalize), &Archive::new().header(&hole).end(), &limits).unwrap_err();
    assert!(matches!(error, LayerError::Holes { .. }), "{error}");
}

#[test]
fn a_huge_extension_is_refused_before_it_is_read() {
    let header = Header::new("x", b'x', 0).put(124, b"77777777777\0");
    let error = members(&Archive::new().header(&header).0).unwrap_err();
    assert!(matches!(error, TarError::Limit { limit: 1_048_576, .. }), "{error}");
}

fn old_sparse(segments: &[(u64, u64)], size: u64, stored: usize) -> Header {
    let mut header = Header::new("s", b'S', stored).gnu().put(483, format!("{size:011o}\0").as_bytes());
    for (index, (offset, length)) in segments.iter().enumerate() {
        header = header.put(386 + 24 * index, format!("{offset:011o}\0{length:011o}\0").as_bytes());
    }
    header
}

#[test]
fn sparse_maps_that_contradict_themselves_are_refused() {
    for (segments, size, stored) in [
        (&[(0, 10), (5, 10)][..], 100, 20),
        (&[(50, 10), (0, 10)], 100, 20),
        (&[(0, 10)], 5, 10),
        (&[(0, 10)], 100, 20),
        (&[(0, 30)], 100, 20),
        (&[(0o77_777_777_777, 0o77_777_777_777)], 100, 20),
    ] {
        let tar = Archive::new().member(&old_sparse(segments, size, stored), vec![1; stored]).end();
        check_refused(&tar, "invalid sparse file at offset 0");
    }
    for records in [
        &[("GNU.sparse.map", "0,1,2"), ("GNU.sparse.size", "10")][..],
        &[("GNU.sparse.map", "0,x"), ("GNU.sparse.size", "10")],
        &[("GNU.sparse.size", "10"), ("GNU.sparse.offset", "0"), ("GNU.sparse.offset", "0")],
        &[("GNU.sparse.size", "10"), ("GNU.sparse.numbytes", "0")],
        &[("GNU.sparse.size", "1"), ("GNU.sparse.offset", "0"), ("GNU.sparse.numbytes", "2")],
    ] {
        let tar = Archive::new().pax(records).file("s", "xx").end();
        check_refused(&tar, "invalid sparse file at offset 0");
    }
    for records in [
        &[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")][..],
        &[("GNU.sparse.name", "elsewhere")],
        &[("GNU.sparse.size", "10")],
    ] {
        let tar = Archive::new().pax(records).file("s", "").end();
        check_refused(&tar, "a sparse file in an unknown format");
    }
    let sizes = [("GNU.sparse.size", "10"), ("GNU.sparse.realsize", "11"), ("GNU.sparse.map", "0,0")];
    check_refused(&Archive::new().pax(&sizes).file("s", "").end(), "a sparse file with two sizes");
    check_refused(
        &Archive::new().pax(&[("GNU.sparse.size", "10")]).header(&old_sparse(&[], 0, 0)).end(),
        "an unknown",
    );
    let records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "1")];
    check_refused(&Archive::new().pax(&records).directory("s").end(), "only regular files can be sparse");
}

#[test]
fn lying_maps_inside_of_data_are_refused_when_the_file_is_expanded() {
    let records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "1000")];
    let file = |map: &str| {
        let mut data = map.as_bytes().to_owned();
        data.resize(BLOCK, 0);
        data.extend_from_slice(b"data");
        Archive::new().pax(&records).file("s", data).end()
    };
    let good = file("1\n10\n4\n");
    assert_eq!(python_reads(&rewrite(&force_encoding(), &good).unwrap().1).unwrap()[0].size, 1000);
    for map in
        ["", "1\n", "x\n", "1\n10\n5\n", "1\n998\n4\n", "2\n10\n2\n11\n2\n", "18446744073709551615\n", "-1\n"]
    {
        let tar = file(map);
        assert_eq!(rewritten(&["search:pattern=*"], &tar), tar, "a raw copy does not look into data");
        let error = rewrite(&force_encoding(), &tar).unwrap_err();
        assert!(error.to_string().contains("sparse file at offset 0"), "{map:?}: {error}");
    }
}

#[test]
fn errors_of_the_input_keep_their_cause() {
    struct Broken(usize);
    impl std::io::Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::Error::other("connection reset"));
            }
            self.0 -= 1;
            buffer[..BLOCK].copy_from_slice(&Header::new("a", b'5', 0).0);
            Ok(BLOCK)
        }
    }
    let mut walker = Walker::new(std::io::BufReader::new(Broken(3)), Limits::default());
    for _ in 0..3 {
        assert!(walker.read_member(&mut Member::default()).unwrap());
    }
    let error = walker.read_member(&mut Member::default()).unwrap_err();
    assert!(
        matches!(&error, TarError::Read { offset: 1536, source } if source.to_string() == "connection reset")
    );
}

#[test]
fn copies_do_not_look_at_the_tar() {
    use occy_pipeline::layer::Mode;
    let garbage = vec![7; 300_000];
    let Ok(PassOutcome::Done(result)) = run(&FilterChain::default(), Mode::Copy, &garbage) else { panic!() };
    assert_eq!(result.input, result.output);
    assert_eq!(result.input.size, 300_000);
    assert!(observe(&FilterChain::default(), &garbage).is_err());
}

#[test]
fn the_fuzzers_entry_takes_known_attacks() {
    let nested = inner();
    for tar in [
        inner(),
        Archive::new().pax(&[("size", "1024")]).header(&Header::new("b", b'0', 0)).data(&nested).end(),
        Archive::new().file("a", "x").hard_link("d", "a").hard_link("c", "d").hard_link("e", "c").end(),
        Archive::new().file("a", "x").hard_link("a", "a").hard_link("d", "a").end(),
        Archive::new().extension(b'x', &record(b"SCHILY.xattr.user.\xff", b"\0\xff\n")).directory("a").end(),
    ] {
        fuzz_layer(&tar);
    }
}
