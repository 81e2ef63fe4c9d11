//! What holds for every tar: random members, random chains, random damage.

#![allow(clippy::unwrap_used)]

mod tar_support;

use std::io::{BufRead, Read};

use occy_pipeline::filter::Report;
use occy_pipeline::layer::{LayerPass, Mode, PassOutcome, fuzz_layer};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::{Content, Kind, Limits, Member, Time, Walker};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use tar_support::{
    Archive, BLOCK, Entry, Header, chain, force_encoding, gnu_tar_lists, python_reads_all, record, rewrite,
};

/// A member as it should be read.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    path: Vec<u8>,
    kind: Kind,
    link: Vec<u8>,
    mode: u32,
    uid: i64,
    gid: i64,
    uname: Vec<u8>,
    gname: Vec<u8>,
    mtime: Time,
    device: (i64, i64),
    records: Vec<(Vec<u8>, Vec<u8>)>,
    data: Vec<u8>,
}

fn flag(kind: Kind) -> u8 {
    match kind {
        Kind::Regular => b'0',
        Kind::HardLink => b'1',
        Kind::Symlink => b'2',
        Kind::CharacterDevice => b'3',
        Kind::BlockDevice => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
        Kind::Global => b'g',
        Kind::Other(flag) => flag,
    }
}

fn name(most: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        12 => select(&b"abcdefgh"[..]),
        3 => Just(b'/'),
        1 => Just(b'.'),
        1 => 1..=255_u8,
    ];
    vec(byte, 1..most)
}

fn records() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    let value = vec(any::<u8>(), 1..30);
    let key = select(vec![
        "SCHILY.xattr.user.a",
        "SCHILY.acl.access",
        "atime",
        "comment",
        "LIBARCHIVE.creationtime",
    ]);
    btree_map(key.prop_map(|key| key.as_bytes().to_owned()), value, 0..4)
        .prop_map(|map| map.into_iter().collect())
}

fn model() -> impl Strategy<Value = Model> {
    let kind = select(vec![
        Kind::Regular,
        Kind::Regular,
        Kind::HardLink,
        Kind::Symlink,
        Kind::CharacterDevice,
        Kind::BlockDevice,
        Kind::Directory,
        Kind::Fifo,
        Kind::Other(b'Q'),
    ]);
    let number = || prop_oneof![0..=0o7_777_777_i64, 0..i64::MAX];
    let time = prop_oneof![0..=0o77_777_777_777_i64, any::<i64>().prop_map(|seconds| seconds >> 20)];
    let nanoseconds = prop_oneof![3 => Just(0), 1 => 0..1_000_000_000_u32];
    (
        (prop_oneof![name(30), name(300)], kind, name(150), 0..=0o7_777_777_u32),
        (number(), number(), name(40), name(40)),
        (time, nanoseconds, 0..=0o7_777_777_i64, 0..=0o7_777_777_i64),
        (records(), vec(any::<u8>(), 0..2000)),
    )
        .prop_map(
            |(
                (path, kind, link, mode),
                (uid, gid, uname, gname),
                (seconds, nanoseconds, major, minor),
                rest,
            )| {
                let (records, data) = rest;
                let linked = matches!(kind, Kind::HardLink | Kind::Symlink);
                Model {
                    path,
                    kind,
                    link: if linked { link } else { Vec::new() },
                    mode,
                    uid,
                    gid,
                    uname,
                    gname,
                    mtime: Time { seconds, nanoseconds },
                    device: (major, minor),
                    records,
                    data: if kind.has_data() { data } else { Vec::new() },
                }
            },
        )
}

/// Everything in records, nothing in the header: any reader of PAX must find it.
fn written(models: &[Model]) -> Vec<u8> {
    let mut tar = Archive::new();
    for model in models {
        let mut payload = Vec::new();
        let size = model.data.len().to_string();
        let (whole, nanoseconds) = match model.mtime {
            Time { seconds, nanoseconds } if seconds < 0 && nanoseconds > 0 => {
                (format!("-{}", (seconds + 1).unsigned_abs()), 1_000_000_000 - nanoseconds)
            }
            Time { seconds, nanoseconds } => (seconds.to_string(), nanoseconds),
        };
        for (key, value) in [
            ("path", &model.path[..]),
            ("linkpath", &model.link),
            ("size", size.as_bytes()),
            ("uid", model.uid.to_string().as_bytes()),
            ("gid", model.gid.to_string().as_bytes()),
            ("uname", &model.uname),
            ("gname", &model.gname),
            ("mtime", format!("{whole}.{nanoseconds:09}").as_bytes()),
        ] {
            if !value.is_empty() {
                payload.extend(record(key.as_bytes(), value));
            }
        }
        for (key, value) in &model.records {
            payload.extend(record(key, value));
        }
        let header = Header::new("x", flag(model.kind), 0)
            .put(100, format!("{:07o}\0", model.mode).as_bytes())
            .put(329, format!("{:07o}\0{:07o}\0", model.device.0, model.device.1).as_bytes());
        tar = tar.extension(b'x', &payload).member(&header, &model.data);
    }
    tar.end()
}

fn read(tar: &[u8]) -> Vec<Model> {
    let mut walker = Walker::new(tar, Limits::default());
    let mut member = Member::default();
    let mut models = Vec::new();
    while walker.read_member(&mut member).unwrap() {
        assert_eq!(member.content(), Content::Stored);
        let mirrors = ["path", "linkpath", "size", "uid", "gid", "uname", "gname", "mtime", "hdrcharset"];
        let mut model = Model {
            path: member.path().to_owned(),
            kind: member.kind(),
            link: member.link().to_owned(),
            mode: member.mode(),
            uid: member.uid(),
            gid: member.gid(),
            uname: member.uname().to_owned(),
            gname: member.gname().to_owned(),
            mtime: member.mtime(),
            device: member.device(),
            records: member
                .records()
                .iter()
                .filter(|(key, _)| !mirrors.iter().any(|mirror| mirror.as_bytes() == *key))
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
            data: Vec::new(),
        };
        while let Some(chunk) = walker.next_chunk().unwrap() {
            model.data.extend_from_slice(chunk.data());
        }
        models.push(model);
    }
    models
}

/// Gives a few bytes at a time.
struct Trickle<'a> {
    bytes: &'a [u8],
    piece: usize,
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
}

impl BufRead for Trickle<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        if self.piece == 0 {
            self.piece = self.bytes.len().min(*self.sizes.next().unwrap());
        }
        Ok(&self.bytes[..self.piece])
    }

    fn consume(&mut self, count: usize) {
        self.piece -= count;
        self.bytes = &self.bytes[count..];
    }
}

impl Read for Trickle<'_> {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        unreachable!("it is asked for what it holds")
    }
}

fn filters() -> impl Strategy<Value = Vec<&'static str>> {
    vec(
        select(vec![
            "normalize-timestamps:ts=7",
            "normalize-timestamps:ts=100:mode=clamp",
            "exclude:pattern=a*",
            "exclude:pattern=*b,c",
            "search:pattern=*a*",
            "inspect:file=x",
        ]),
        0..6,
    )
}

/// Members in every dialect, between headers that hold for all that follow.
fn dialects() -> impl Strategy<Value = Vec<u8>> {
    let name = select(vec!["a", "b", "c/a", "./b", "d/", "ab/"]);
    let target = select(vec!["a", "./a", "b", "c/a", "d"]);
    vec((name, target, 0..12_u8, 0..1500_usize), 0..10)
        .prop_flat_map(|members| {
            let mut tar = Archive::new();
            for (path, target, dialect, size) in members {
                let data = vec![b'0' + dialect; size];
                let header = Header::new(path, b'0', size);
                tar = match dialect {
                    0 => tar.hard_link(path, target),
                    1 => tar
                        .hard_link(path, target)
                        .pax(&[("mtime", "1.5"), ("comment", target)])
                        .file(path, data),
                    2 => tar.global(&[("mtime", "77"), ("comment", target)]),
                    3 => tar.global(&[("uname", path), ("atime", "5")]),
                    4 => {
                        tar.gnu_long_name(&format!("{path}{}", "n".repeat(size % 300))).member(&header, data)
                    }
                    // A GNU header with atime and ctime, and a time before 1970.
                    5 => {
                        tar.member(&header.gnu().put(345, b"00000000017\0").put(357, b"00000000020\0"), data)
                    }
                    6 => tar
                        .member(&header.put(136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xf0"), data),
                    7 => tar
                        .pax(&[("atime", "9"), ("ctime", "8"), ("mtime", "100.000000001"), ("path", path)])
                        .file("x", data),
                    8 => tar
                        .pax(&[("size", &size.to_string()), ("LIBARCHIVE.creationtime", "4")])
                        .member(&Header::new(path, b'0', 0), data),
                    9 => tar.member(&header.put(136, b"00000000007\0"), data),
                    10 => tar.directory(path),
                    _ => {
                        // A hole before the data, in the form of PAX.
                        let map = format!("1\n{}\n{size}\n", 512);
                        let mut stored = map.into_bytes();
                        stored.resize(BLOCK, 0);
                        stored.extend_from_slice(&data);
                        tar.pax(&[
                            ("GNU.sparse.major", "1"),
                            ("GNU.sparse.minor", "0"),
                            ("GNU.sparse.name", path.trim_end_matches('/')),
                            ("GNU.sparse.realsize", &(512 + size).to_string()),
                        ])
                        .file("GNUSparseFile.0/x", stored)
                    }
                };
            }
            // With an end marker, with more behind it, and without.
            (Just(tar.0), select(vec![0, 1024, 10_240]))
        })
        .prop_map(|(mut tar, end)| {
            tar.resize(tar.len() + end, 0);
            tar
        })
}

/// Members whose links often have targets that filters drop.
fn linked() -> impl Strategy<Value = Vec<u8>> {
    let member =
        (select(vec!["a", "b", "c/a", "d", "ab"]), select(vec!["a", "b", "c/a", "d"]), 0..5_u8, 0..700_usize);
    vec(member, 0..12).prop_map(|members| {
        let mut tar = Archive::new();
        for (path, target, kind, size) in members {
            tar = match kind {
                0 => tar.hard_link(path, target),
                1 => tar.symlink(path, target),
                2 => tar.pax(&[("SCHILY.xattr.user.a", target)]).file(path, vec![b'p'; size]),
                _ => tar.file(path, vec![b'0' + kind; size]),
            };
        }
        tar.end()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn members_are_read_as_written_and_encoded_as_read(models in vec(model(), 1..6)) {
        let tar = written(&models);
        prop_assert_eq!(read(&tar), models.clone());
        let (_, encoded) = rewrite(&force_encoding(), &tar).unwrap();
        prop_assert_eq!(read(&encoded), models);
        let (_, again) = rewrite(&force_encoding(), &encoded).unwrap();
        prop_assert_eq!(encoded, again);
    }

    #[test]
    fn a_chain_gives_the_same_bytes_however_the_input_comes(
        tar in linked(),
        specs in filters(),
        sizes in vec(1..5000_usize, 1..5),
    ) {
        let chain = chain(&specs);
        let (result, once) = rewrite(&chain, &tar).unwrap();
        let (again, twice) = rewrite(&chain, &tar).unwrap();
        prop_assert_eq!(&once, &twice);
        prop_assert_eq!(&result.reports, &again.reports);
        let (limits, spools) = (Limits::default(), SpoolDir::new(std::env::temp_dir(), u64::MAX));
        let pass = LayerPass::new(&chain, Mode::Observe, &limits, &spools)
            .run(Trickle { bytes: &tar, piece: 0, sizes: sizes.iter().cycle() }, &mut std::io::sink());
        if let PassOutcome::Done(observed) = pass.unwrap() {
            prop_assert_eq!(observed.output, result.output);
            prop_assert_eq!(observed.reports, result.reports);
        }
        let scan = LayerPass::new(&chain, Mode::Scan, &limits, &spools);
        match scan.run(&tar[..], &mut std::io::sink()).unwrap() {
            PassOutcome::NeedsRewrite { .. } => prop_assert!(result.edited),
            PassOutcome::Done(_) => prop_assert!(!result.edited),
            PassOutcome::NeedsRestart(_) => prop_assert!(false),
        }
    }

    #[test]
    fn a_chain_does_what_its_filters_do_one_after_the_other(
        tar in prop_oneof![linked(), dialects(), vec(model(), 1..5).prop_map(|models| written(&models))],
        specs in filters(),
    ) {
        let (result, written) = rewrite(&chain(&specs), &tar).unwrap();
        let (mut step, mut edited) = (tar, false);
        for (spec, report) in specs.iter().zip(&result.reports) {
            let (mut alone, next) = rewrite(&chain(&[spec]), &step).unwrap();
            if let Some(Report::Inspect(record)) = &mut alone.reports[0] {
                record.edited = edited;
            }
            prop_assert_eq!(&alone.reports[0], report, "{} of {:?}", spec, &specs);
            edited |= alone.edited;
            step = next;
        }
        prop_assert_eq!(result.edited, edited);
        prop_assert!(written == step, "{:?}: {}", &specs, first_difference(&written, &step));
    }

    #[test]
    fn no_link_that_survives_exclude_points_to_what_was_dropped(tar in linked()) {
        let (_, written) = rewrite(&chain(&["exclude:pattern=a"]), &tar).unwrap();
        let mut names = std::collections::HashSet::new();
        let before = read(&tar);
        for member in read(&written) {
            if member.kind == Kind::HardLink && member.link == b"a" {
                // Only where the tar had no such target before.
                let place = before.iter().position(|other| other.path == member.path && other.link == b"a").unwrap();
                let target = before[..place].iter().rfind(|other| other.path == b"a");
                prop_assert!(target.is_none_or(|target| target.kind == Kind::HardLink));
            }
            names.insert(member.path);
        }
        prop_assert!(!names.contains(&b"a"[..]));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..3000)) {
        fuzz_layer(&bytes);
    }

    #[test]
    fn damaged_tars_never_panic(tar in prop_oneof![linked(), vec(model(), 1..4).prop_map(|models| written(&models))],
        damage in vec((any::<Index>(), any::<u8>()), 0..4), end in any::<Index>(), cut in any::<bool>(), seal in any::<bool>())
    {
        let mut tar = tar;
        for (place, byte) in damage {
            let place = place.index(tar.len());
            tar[place] = byte;
            if seal {
                reseal(&mut tar, place);
            }
        }
        if cut {
            tar.truncate(end.index(tar.len()));
        }
        fuzz_layer(&tar);
    }
}

#[test]
fn members_that_straddle_buffers_are_read_like_any_other() {
    let mut tar = Archive::new();
    for number in 0..1500_usize {
        let value = "v".repeat(number * 37 % 5000);
        let name = format!("{number}-{}", "n".repeat(number % 130));
        tar = tar
            .pax(&[("path", &name), ("SCHILY.xattr.user.v", &value)])
            .file("x", vec![b'd'; number * 61 % 3000]);
    }
    let tar = tar.file("large", vec![b'l'; 1_000_001]).file("last", "x").end();
    assert!(tar.len() > 5 << 20);
    let models = read(&tar);
    assert_eq!(models.len(), 1502);
    let (_, encoded) = rewrite(&force_encoding(), &tar).unwrap();
    assert_eq!(read(&encoded), models);
    let chain =
        chain(&["inspect:file=a", "normalize-timestamps:ts=1", "inspect:file=b", "exclude:pattern=1*"]);
    let (expected, _) = rewrite(&chain, &tar).unwrap();
    let (limits, spools) = (Limits::default(), SpoolDir::new(std::env::temp_dir(), u64::MAX));
    for sizes in [&[1000, 7][..], &[262_143], &[262_145, 511]] {
        let input = Trickle { bytes: &tar, piece: 0, sizes: sizes.iter().cycle() };
        let pass = LayerPass::new(&chain, Mode::Observe, &limits, &spools);
        let PassOutcome::Done(observed) = pass.run(input, &mut std::io::sink()).unwrap() else { panic!() };
        assert_eq!((observed.output, observed.reports), (expected.output.clone(), expected.reports.clone()));
    }
}

/// Where two tars part, block by block.
fn first_difference(one: &[u8], other: &[u8]) -> String {
    let place =
        one.iter().zip(other).position(|(one, other)| one != other).unwrap_or(one.len().min(other.len()));
    let block = |tar: &[u8]| {
        let start = place / BLOCK * BLOCK;
        String::from_utf8_lossy(&tar[start.min(tar.len())..(start + BLOCK).min(tar.len())]).replace('\0', ".")
    };
    format!("at {place} of {} and {}:\n{}\n{}", one.len(), other.len(), block(one), block(other))
}

/// Makes the checksum of the block around a place right.
fn reseal(tar: &mut [u8], place: usize) {
    let start = place / BLOCK * BLOCK;
    if let Some(block) = tar.get_mut(start..start + BLOCK) {
        let header = Header(block.try_into().unwrap()).put(0, &[]);
        block.copy_from_slice(&header.0);
    }
}

/// A tar with every kind of header, to be damaged.
fn seed() -> Vec<u8> {
    let sparse = Header::new("sparse", b'S', 4)
        .gnu()
        .put(386, b"00000000000\x0000000000004\0")
        .put(483, b"00000000020\0");
    Archive::new()
        .pax(&[("path", "pax-name"), ("size", "3"), ("mtime", "1.5")])
        .member(&Header::new("a", b'0', 0), "abc")
        .gnu_long_name("gnu-name")
        .file("b", [7; 600])
        .hard_link("c", "a")
        .symlink("d", "a")
        .directory("e/")
        .member(&sparse, "data")
        .pax(&[("GNU.sparse.map", "0,2"), ("GNU.sparse.size", "9"), ("GNU.sparse.name", "f")])
        .file("g", "xy")
        .member(&Header::new("old", 0, 5), "12345")
        .file("inner.tar", Archive::new().file("hidden", "x").end())
        .end()
}

#[test]
fn damaged_tars_that_are_read_are_read_as_python_and_gnu_tar_read_them() {
    // Damage is mostly done to fields that matter, and the checksums are right.
    let seed = seed();
    let headers: Vec<usize> =
        (0..seed.len()).step_by(BLOCK).filter(|&at| &seed[at + 257..at + 262] == b"ustar").collect();
    let mut random = fastrand::Rng::with_seed(7);
    let mut read_tars = Vec::new();
    for _ in 0..4_000 {
        let mut tar = seed.clone();
        for _ in 0..random.usize(1..4) {
            let header = *random.choice(&headers).unwrap();
            match random.u32(0..8) {
                0 => tar[header + 156] = *random.choice(b"\x000123456789SLKxXgVDMNA").unwrap(),
                1 | 2 => {
                    let size = *random.choice(&[0, 1, 511, 512, 513, 1024, 2048]).unwrap();
                    tar[header + 124..header + 136].copy_from_slice(format!("{size:011o}\0").as_bytes());
                }
                3 => {
                    let other = *random.choice(&headers).unwrap();
                    tar.copy_within(other..other + BLOCK, header);
                }
                4 => tar[header + random.usize(0..257)] = *random.choice(b"\x00 0178/\x80\xffZ=").unwrap(),
                5 => tar[header + random.usize(386..496)] = *random.choice(b"\x00 0178\x80\xff").unwrap(),
                // Inside of records and data.
                6 => {
                    let place = header + BLOCK + random.usize(0..40);
                    if let Some(byte) = tar.get_mut(place) {
                        *byte = *random.choice(b"\x00 \n=0123456789a").unwrap();
                    }
                }
                _ => {
                    let key: &[u8] = random
                        .choice(&[
                            &b"size"[..],
                            b"path",
                            b"uid",
                            b"GNU.sparse.size",
                            b"GNU.sparse.map",
                            b"GNU.sparse.name",
                            b"GNU.sparse.major",
                            b"mtime",
                            b"uid",
                            b"linkpath",
                            b"hdrcharset",
                        ])
                        .unwrap();
                    let value: &[u8] =
                        random.choice(&[&b"0"[..], b"512", b"1", b"1024", b"00", b"-1", b""]).unwrap();
                    let payload = record(key, value);
                    tar[header..header + BLOCK].copy_from_slice(
                        &Header::new("x", *random.choice(b"xxxg").unwrap(), payload.len()).0,
                    );
                    if let Some(block) = tar.get_mut(header + BLOCK..header + BLOCK + payload.len()) {
                        block.copy_from_slice(&payload);
                    }
                }
            }
            reseal(&mut tar, header);
        }
        if let Some(members) = names_and_sizes(&tar) {
            read_tars.push((tar, members));
        }
    }
    assert!(read_tars.len() > 200, "{}", read_tars.len());
    let tars: Vec<&[u8]> = read_tars.iter().map(|(tar, _): &(Vec<u8>, _)| tar.as_slice()).collect();
    let mut differences = Vec::new();
    for ((tar, ours), entries) in read_tars.iter().zip(python_reads_all(&tars)) {
        let python = entries.map(|entries| {
            let entry = |entry: Entry| (entry.name.trim_end_matches('/').to_owned(), entry.size as u64);
            entries.into_iter().map(entry).collect::<Vec<_>>()
        });
        // Python wants a member behind a global header.
        let lonely_global = python.as_ref().is_err_and(|error| error.contains("end of file header"));
        if python.as_ref() != Ok(ours) && !lonely_global {
            differences.push(format!("{python:?}\n{ours:?}\n{}", dump(tar, differences.len())));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n\n"));
    for (tar, ours) in read_tars.iter().step_by(4) {
        // GNU tar alone looks for data behind links, directories and devices that claim a size.
        let sized = |block: &[u8]| matches!(block[156], b'2'..=b'6') && block[124..135] != *b"00000000000";
        if tar.chunks_exact(BLOCK).any(|block| &block[257..262] == b"ustar" && sized(block)) {
            continue;
        }
        let Ok(lines) = gnu_tar_lists(tar) else { continue };
        if lines.len() != ours.len() {
            differences.push(format!("{lines:#?}\n{ours:?}\n{}", dump(tar, differences.len())));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n\n"));
}

/// As the script that runs in Python prints them, without the slashes behind directories.
fn names_and_sizes(tar: &[u8]) -> Option<Vec<(String, u64)>> {
    let mut walker = Walker::new(tar, Limits::default());
    let mut member = Member::default();
    let mut members = Vec::new();
    while walker.read_member(&mut member).ok()? {
        if member.is_global() {
            continue;
        }
        let mut name = String::new();
        for chunk in member.path().utf8_chunks() {
            name.push_str(chunk.valid());
            name.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
        }
        members.push((name.trim_end_matches('/').to_owned(), member.size()));
    }
    Some(members)
}

fn dump(tar: &[u8], index: usize) -> String {
    let path = std::env::temp_dir().join(format!("differs-{index}.tar"));
    std::fs::write(&path, tar).unwrap();
    path.display().to_string()
}
