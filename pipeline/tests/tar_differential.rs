//! Rewritten layers as GNU tar and Python's `tarfile` read them: these tools have the last word.

#![allow(clippy::unwrap_used)]

mod tar_support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use tar_support::{
    Archive, Entry, Header, chain, force_encoding, gnu_tar_lists, gnu_tar_packs, observe, python_reads,
    python_reads_all, python_writes, rewrite, rewritten,
};

/// A tree with everything that a tar can hold, as far as the user may make it.
fn tree(root: &Path) {
    let long = "long-name-".repeat(11);
    let deep: String = (0..12).map(|level| format!("directory-of-level-{level:02}/")).collect();
    fs::create_dir_all(root.join(&deep)).unwrap();
    fs::write(root.join(&deep).join("file"), b"deep").unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("block"), [b'b'; 512]).unwrap();
    fs::write(root.join("script"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(root.join("script"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::write(root.join("large"), vec![b'l'; 300_001]).unwrap();
    fs::write(root.join("größe-日本語"), b"unicode").unwrap();
    fs::write(root.join(OsStr::from_bytes(b"not-utf8-\xff\xfe")), b"bytes").unwrap();
    fs::write(root.join(&long), b"long").unwrap();
    fs::write(root.join(format!("{long}{long}")), b"very long").unwrap();
    fs::write(root.join("a space, a \\ and a\nline"), b"odd").unwrap();
    fs::hard_link(root.join(&long), root.join("hard-link-to-long")).unwrap();
    fs::hard_link(root.join("script"), root.join("script-again")).unwrap();
    symlink("script", root.join("link")).unwrap();
    symlink(format!("{deep}file"), root.join("long-link")).unwrap();
    symlink("größe-日本語", root.join("unicode-link")).unwrap();
    fs::create_dir(root.join("sticky")).unwrap();
    fs::set_permissions(root.join("sticky"), fs::Permissions::from_mode(0o1777)).unwrap();
    assert!(Command::new("mkfifo").arg(root.join("fifo")).status().unwrap().success());
    // Only root may do these, and only where the file system knows them.
    let _ = Command::new("mknod").arg(root.join("null")).args(["c", "1", "3"]).status();
    let _ = Command::new("mknod").arg(root.join("disk")).args(["b", "259", "300000"]).status();
    let _ = Command::new("setfattr")
        .args(["-n", "user.comment", "-v", "two words"])
        .arg(root.join("script"))
        .status();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"head", 0).unwrap();
    for stretch in 1..40_u64 {
        sparse.write_all_at(&[b's'; 4096], stretch * 8192).unwrap();
    }
    sparse.set_len(40 * 8192 + 1000).unwrap();
    let hole = fs::File::create(root.join("hole")).unwrap();
    hole.set_len(100_000).unwrap();
    fs::hard_link(root.join("sparse"), root.join("sparse-again")).unwrap();
    fs::hard_link(root.join("sparse"), root.join("sparse-once-more")).unwrap();
}

/// The same tree in every format that GNU tar writes.
fn gnu_archives() -> Vec<(&'static str, Vec<u8>)> {
    let directory = tempfile::tempdir().unwrap();
    tree(directory.path());
    [
        ("v7", &["--format=v7"][..]),
        ("ustar", &["--format=ustar"]),
        ("oldgnu", &["--format=oldgnu"]),
        ("gnu", &["--format=gnu"]),
        ("gnu sparse", &["--format=gnu", "--sparse"]),
        ("gnu numeric", &["--format=gnu", "--owner=:3000000", "--group=:4000000000", "--mtime=@-86400"]),
        ("posix", &["--format=posix"]),
        ("posix xattrs", &["--format=posix", "--xattrs", "--acls", "--selinux"]),
        ("posix deletes", &["--format=posix", "--pax-option=delete=atime,delete=ctime"]),
        (
            "posix fields",
            &["--format=posix", "--owner=größe:3000000", "--group=g:4000000000", "--mtime=@-1.5"],
        ),
        (
            "posix global",
            &["--format=posix", "--pax-option=globexthdr.name=g,comment=hello,mtime=1234567890"],
        ),
        ("sparse 0.0", &["--format=posix", "--sparse", "--sparse-version=0.0"]),
        ("sparse 0.1", &["--format=posix", "--sparse", "--sparse-version=0.1"]),
        ("sparse 1.0", &["--format=posix", "--sparse", "--sparse-version=1.0"]),
    ]
    .map(|(name, arguments)| (name, gnu_tar_packs(directory.path(), arguments)))
    .into()
}

/// Archives of Python's, in the formats that it writes.
fn python_archives() -> Vec<(&'static str, Vec<u8>)> {
    const SCRIPT: &str = r#"
with tarfile.open(sys.argv[1], 'w', format=tarfile.FORMAT, encoding='utf-8', errors='surrogateescape') as tar:
    def put(name, data=None, **fields):
        try: add(tar, name, data, **fields)
        except (ValueError, UnicodeEncodeError): pass
    D, C, B, F, L, S = tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
    put('.', type=D, mode=0o755)
    put('./etc', type=D, mode=0o755, uname='root', gname='root')
    put('./etc/passwd', b'root:x:0:0\n', mode=0o644, mtime=1700000000)
    put('etc/passwd', b'again\n', mode=0o600, uid=1000, gid=1000)
    put('dev/null', type=C, devmajor=1, devminor=3, mode=0o666)
    put('dev/sda', type=B, devmajor=8, devminor=2097151, mode=0o660)
    put('run/fifo', type=F)
    put('bin/a', b'#!/bin/true\n', mode=0o755, pax_headers={
        'SCHILY.xattr.security.capability': (b'\x01\0\0\x02\0\x20\0\0\0\0\0\0\xff\xfe\0\0\0\0\0\0').decode('utf-8', 'surrogateescape'),
        'SCHILY.acl.access': 'user::rwx,group::r-x,other::r-x', 'LIBARCHIVE.creationtime': '1700000003',
        'LIBARCHIVE.xattr.user.x': 'YQ', 'atime': '1700000001.5', 'ctime': '1700000002.25', 'comment': 'größe'})
    put('bin/b', type=L, linkname='bin/a')
    put('bin/' + 'n' * 95, type=L, linkname='bin/a')
    put('n' * 100, b'100')
    put('n' * 101, b'101')
    put('p' * 155 + '/' + 'n' * 100, b'256')
    put('p' * 156 + '/' + 'n' * 100, b'257')
    put('p' * 100 + '/' + 'd' * 120, type=D)
    put('l' * 100, type=S, linkname='t' * 100)
    put('l', type=S, linkname='t' * 300)
    put('ünïcödé', b'u', uname='jürgen', gname='日本')
    put('bytes-\udcff\udcfe', b'u')
    put('link-\udcff', type=S, linkname='\udcfe')
    put('owner', b'', uname='u' * 32, gname='g' * 33)
    put('owner31', b'', uname='u' * 31, gname='g' * 31)
    put('ids', b'', uid=2097151, gid=2097151)
    put('big-ids', b'', uid=2097152, gid=4294967294)
    put('old', b'', mtime=-1)
    put('fraction', b'', mtime=1700000000.123456)
    put('late', b'', mtime=8589934592)
    put('latest', b'', mtime=8589934591)
    put('.wh.gone', b'')
    put('dir/.wh..wh..opq', b'')
    put('contiguous', b'seven', type=tarfile.CONTTYPE)
    put('areg', b'zero', type=tarfile.AREGTYPE)
    put('vendor', b'vendor data', type=b'Q')
    put('trailing', b'x' * 511)
    put('exact', b'x' * 512)
"#;
    [("USTAR_FORMAT", "python ustar"), ("GNU_FORMAT", "python gnu"), ("PAX_FORMAT", "python pax")]
        .map(|(format, name)| {
            (name, python_writes(&SCRIPT.replace("tarfile.FORMAT", &format!("tarfile.{format}"))))
        })
        .into()
}

struct Original {
    name: &'static str,
    tar: Vec<u8>,
    entries: Vec<Entry>,
}

fn originals() -> &'static [Original] {
    static ORIGINALS: OnceLock<Vec<Original>> = OnceLock::new();
    ORIGINALS.get_or_init(|| {
        let archives = [gnu_archives(), python_archives()].concat();
        let tars: Vec<&[u8]> = archives.iter().map(|(_, tar)| tar.as_slice()).collect();
        let entries = python_reads_all(&tars).into_iter().map(Result::unwrap);
        let originals = archives.iter().zip(entries);
        originals.map(|((name, tar), entries)| Original { name, tar: tar.clone(), entries }).collect()
    })
}

/// Rewrites every archive and has what Python reads of it checked.
fn check(rewrite: impl Fn(&Original) -> Vec<u8>, check: impl Fn(&Original, Vec<Entry>)) {
    let written: Vec<Vec<u8>> = originals().iter().map(rewrite).collect();
    let tars: Vec<&[u8]> = written.iter().map(Vec::as_slice).collect();
    for (original, entries) in originals().iter().zip(python_reads_all(&tars)) {
        check(original, entries.unwrap_or_else(|error| panic!("{}: {error}", original.name)));
    }
}

/// What must be equal once every entry was encoded anew.
fn without_times(mut entries: Vec<Entry>) -> Vec<Entry> {
    for entry in &mut entries {
        entry.mtime = 0.0;
        for key in ["atime", "ctime", "LIBARCHIVE.creationtime"] {
            entry.pax.remove(key);
        }
    }
    entries
}

fn assert_entries(name: &str, actual: &[Entry], expected: &[Entry]) {
    for (actual, expected) in actual.iter().zip(expected) {
        assert_eq!(actual, expected, "{name}: {}", expected.name);
    }
    assert_eq!(actual.len(), expected.len(), "{name}");
}

#[test]
fn unedited_layers_are_copied_byte_for_byte() {
    for Original { name, tar, entries } in originals() {
        let (result, written) = rewrite(&chain(&["search:pattern=*", "inspect:file=x"]), tar).unwrap();
        assert!(written == *tar, "{name}");
        assert!(!result.edited);
        let observed = observe(&chain(&["search:pattern=*"]), tar).unwrap();
        assert_eq!(observed.input, result.input);
        let globals = usize::from(*name == "posix global");
        assert_eq!(observed.members, (entries.len() + globals) as u64, "{name}");
    }
}

#[test]
fn encoding_every_member_anew_changes_nothing_that_python_reads() {
    // Sparse files are regular files then, so nothing of their encoding is left.
    let trace = regex::bytes::Regex::new("GNU.sparse|GNUSparseFile|././@LongLink").unwrap();
    check(
        |Original { name, tar, .. }| {
            let (result, written) = rewrite(&force_encoding(), tar).unwrap();
            assert!(result.edited);
            assert!(!trace.is_match(&written), "{name}");
            let (again, twice) = rewrite(&force_encoding(), &written).unwrap();
            assert!(twice == written, "{name}: encoding is canonical");
            assert_eq!(again.input, result.output);
            written
        },
        |original, entries| assert_entries(original.name, &entries, &original.entries),
    );
}

#[test]
fn encoding_every_member_anew_changes_nothing_that_gnu_tar_lists() {
    for Original { name, tar, .. } in originals() {
        let (_, written) = rewrite(&force_encoding(), tar).unwrap();
        assert_eq!(gnu_tar_lists(&written), gnu_tar_lists(tar), "{name}");
    }
}

#[test]
fn normalized_times_are_what_python_and_gnu_tar_read() {
    for (seconds, day) in [
        (0, "1970-01-01 00:00:00"),
        (1_234_567_890, "2009-02-13 23:31:30"),
        // The first second that only a PAX record holds.
        (8_589_934_592_i64, "2242-03-16 12:56:32"),
    ] {
        let filter = format!("normalize-timestamps:ts={seconds}");
        check(
            |Original { name, tar, .. }| {
                let written = rewritten(&[&filter], tar);
                for line in gnu_tar_lists(&written).unwrap().iter().filter(|line| !line.starts_with("  ")) {
                    assert!(line.contains(day), "{name}: {line}");
                }
                let (again, _) = rewrite(&chain(&[&filter]), &written).unwrap();
                assert!(!again.edited, "{name}: a normalized layer needs no edit");
                written
            },
            |Original { name, entries: before, .. }, after| {
                for entry in &after {
                    assert_eq!(entry.mtime, seconds as f64, "{name}: {}", entry.name);
                    for key in ["atime", "ctime", "LIBARCHIVE.creationtime", "mtime"] {
                        assert!(!entry.pax.contains_key(key), "{name}: {} has {key}", entry.name);
                    }
                }
                assert_entries(name, &without_times(after), &without_times(before.clone()));
            },
        );
    }
}

#[test]
fn clamped_times_are_never_later_and_otherwise_kept() {
    check(
        |original| rewritten(&["normalize-timestamps:ts=1700000000:mode=clamp"], &original.tar),
        |Original { name, entries: before, .. }, after| {
            for (before, after) in before.iter().zip(&after) {
                assert_eq!(after.mtime, before.mtime.min(1_700_000_000.0), "{name}: {}", before.name);
            }
            assert_entries(name, &without_times(after), &without_times(before.clone()));
        },
    );
}

#[test]
fn excluded_entries_go_and_all_others_stay_as_they_were() {
    let stays = |entry: &&Entry| {
        let path = entry.name.trim_start_matches("./");
        let goes = path == "bin"
            || path.starts_with("bin/")
            || path.starts_with("script")
            || path.starts_with("directory-of-level-00/")
            || path.starts_with('n');
        !goes
    };
    check(
        |Original { name, tar, .. }| {
            let written = rewritten(&["exclude:pattern=bin,./script*,directory-of-level-00/**,n*"], tar);
            assert!(gnu_tar_lists(&written).is_ok(), "{name}");
            written
        },
        |original, entries| {
            let kept: Vec<Entry> = original.entries.iter().filter(stays).cloned().collect();
            assert!(!kept.is_empty() && kept.len() < original.entries.len());
            assert_entries(original.name, &entries, &kept);
        },
    );
}

#[test]
fn promoted_hard_links_hold_the_data_and_metadata_of_their_target() {
    let targets = ["script", "bin/a", "sparse"];
    check(
        |Original { name, tar, .. }| {
            let written = rewritten(&[&format!("exclude:pattern={}", targets.join(","))], tar);
            assert!(gnu_tar_lists(&written).is_ok(), "{name}");
            written
        },
        |Original { name, entries: before, .. }, after| {
            let mut promotions = 0;
            for original in
                before.iter().filter(|entry| targets.contains(&entry.name.trim_start_matches("./")))
            {
                let mut links =
                    before.iter().filter(|entry| entry.kind == "hardlink" && entry.link == original.name);
                let Some(first) = links.next() else { continue };
                promotions += 1;
                let promoted = after.iter().find(|entry| entry.name == first.name).unwrap();
                assert_eq!(promoted, &Entry { name: first.name.clone(), ..original.clone() }, "{name}");
                for later in links {
                    let later = after.iter().find(|entry| entry.name == later.name).unwrap();
                    assert_eq!((later.kind.as_str(), &later.link), ("hardlink", &first.name), "{name}");
                }
            }
            assert_eq!(promotions, if name.starts_with("python") { 1 } else { 2 }, "{name}");
            let expected = before.len() - promotions;
            assert_eq!(after.len(), expected, "{name}");
        },
    );
}

#[test]
fn gnu_access_times_in_headers_are_dropped_or_become_records() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), b"data").unwrap();
    let snapshot = tempfile::NamedTempFile::new().unwrap();
    let incremental = format!("--listed-incremental={}", snapshot.path().display());
    let tar = gnu_tar_packs(directory.path(), &["--format=gnu", &incremental]);
    // Python takes these fields for a ustar prefix and reads a wrong name.
    assert_ne!(python_reads(&tar).unwrap().last().unwrap().name, "./file");

    let normalized = rewritten(&["normalize-timestamps"], &tar);
    let file = python_reads(&normalized).unwrap().pop().unwrap();
    assert_eq!((file.name.as_str(), file.mtime), ("./file", 0.0));
    assert!(gnu_tar_lists(&normalized).is_ok());

    let encoded = rewrite(&force_encoding(), &tar).unwrap().1;
    let file = python_reads(&encoded).unwrap().pop().unwrap();
    assert_eq!(file.name, "./file");
    assert!(file.pax.contains_key("atime") && file.pax.contains_key("ctime"), "{:?}", file.pax);
}

#[test]
fn a_ustar_prefix_in_a_gnu_header_is_a_prefix() {
    // Go before 1.8, and so docker of that time, wrote these.
    let header = Header::new("name", b'0', 3).gnu().put(345, b"some/prefix");
    let tar = Archive::new().member(&header, "abc").end();
    assert_eq!(python_reads(&tar).unwrap()[0].name, "some/prefix/name");
    for written in [rewritten(&["normalize-timestamps"], &tar), rewrite(&force_encoding(), &tar).unwrap().1] {
        assert_eq!(python_reads(&written).unwrap()[0].name, "some/prefix/name");
    }
    let dropped = rewritten(&["exclude:pattern=some/prefix/name"], &tar);
    assert_eq!(python_reads(&dropped).unwrap(), []);
}
