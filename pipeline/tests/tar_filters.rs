//! What each filter does to a layer, to the config, and to its neighbours in a chain.

#![allow(clippy::unwrap_used)]

mod tar_support;

use occy_pipeline::digest::Digest;
use occy_pipeline::filter::{
    FilterChain, ImageFindings, LayerFindings, OutputFormat, Report, Target, exclude,
};
use occy_pipeline::layer::{Mode, PassOutcome};
use occy_pipeline::tar::Limits;
use serde_json::{Value, json};
use tar_support::{
    Archive, BLOCK, Entry, Header, chain, observe, python_reads, rewrite, rewrite_within, rewritten, run,
};

/// `name=data`, `name>target` for links, or the bare name, of every entry that Python reads.
fn listing(tar: &[u8]) -> Vec<String> {
    let describe = |entry: Entry| match entry.kind.as_str() {
        "hardlink" | "symlink" => format!("{}>{}", entry.name, entry.link),
        "file" => format!("{}={}", entry.name, data(tar, &entry)),
        _ => entry.name,
    };
    python_reads(tar).unwrap().into_iter().map(describe).collect()
}

/// The data of a small file, found by its digest.
fn data(tar: &[u8], entry: &Entry) -> String {
    let digest = entry.data.as_deref().unwrap();
    let size = usize::try_from(entry.size).unwrap();
    let found = tar
        .chunks(BLOCK)
        .filter_map(|block| block.get(..size))
        .find(|data| Digest::sha256(data).hex() == digest);
    found.map_or_else(|| format!("{size} bytes"), |data| String::from_utf8_lossy(data).into_owned())
}

fn check_exclude(pattern: &str, tar: Archive, expected: &[&str]) {
    let written = rewritten(&[&format!("exclude:pattern={pattern}")], &tar.end());
    assert_eq!(listing(&written), expected, "{pattern}");
}

#[test]
fn normalize_changes_nothing_but_the_time_in_a_plain_header() {
    for header in
        [Header::new("a", b'0', 1), Header::new("a", b'0', 1).gnu(), Header::new("a", 0, 1).put(257, &[0; 8])]
    {
        // Owners and modes that an encoder would write in another way.
        let header = header.put(100, b"   644 \0").put(108, b"\x80\0\0\0\0\0\x04\0");
        let tar = Archive::new().member(&header, "x").end();
        let written = rewritten(&["normalize-timestamps:ts=8"], &tar);
        assert_eq!(written.len(), tar.len());
        let changed = (0..tar.len()).filter(|&at| tar[at] != written[at]).collect::<Vec<_>>();
        assert!(changed.iter().all(|at| (136..156).contains(at)), "{changed:?}");
        assert_eq!(&written[136..148], b"00000000010\0");
        assert_eq!(python_reads(&written).unwrap()[0].mtime, 8.0);
    }
}

#[test]
fn normalize_drops_time_records_and_keeps_all_others() {
    let records = [
        ("mtime", "1700000000.5"),
        ("atime", "1"),
        ("SCHILY.xattr.security.capability", "\u{1}\0\0\u{2}\0"),
        ("SCHILY.acl.access", "user::rwx"),
        ("ctime", "1"),
        ("LIBARCHIVE.creationtime", "1"),
        ("path", "usr/bin/nsenter"),
    ];
    let tar = Archive::new().pax(&records).file("short", "x").end();
    let written = rewritten(&["normalize-timestamps:ts=42"], &tar);
    let entry = python_reads(&written).unwrap().pop().unwrap();
    assert_eq!((entry.name.as_str(), entry.mtime), ("usr/bin/nsenter", 42.0));
    assert_eq!(
        entry.pax.keys().collect::<Vec<_>>(),
        ["SCHILY.xattr.security.capability", "SCHILY.acl.access"]
    );
    assert_eq!(entry.pax["SCHILY.xattr.security.capability"], "\u{1}\0\0\u{2}\0");
}

#[test]
fn normalize_leaves_what_is_normal_untouched() {
    let header = Header::new("a", b'5', 0).put(136, b"00000000000\0");
    let tar = Archive::new()
        .header(&header)
        .pax(&[("mtime", "0.000"), ("SCHILY.xattr.user.a", "b")])
        .directory("b")
        .gnu_long_name(&"n".repeat(200))
        .header(&header)
        .end();
    let (result, written) = rewrite(&chain(&["normalize-timestamps"]), &tar).unwrap();
    assert!(!result.edited);
    assert_eq!(written, tar, "GNU long names of unedited members stay");
    assert!(matches!(run(&chain(&["normalize-timestamps"]), Mode::Scan, &tar), Ok(PassOutcome::Done(_))));
}

#[test]
fn normalize_clamps_later_times_only() {
    let at = |name: &str, time: &[u8]| Header::new(name, b'5', 0).put(136, time);
    let tar = Archive::new()
        .header(&at("early", b"00000000001\0"))
        .header(&at("late", b"00000000100\0"))
        .header(&at("before-1970", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
        .pax(&[("mtime", "7.75")])
        .directory("fraction")
        .pax(&[("mtime", "8.0000000001")])
        .directory("barely-later")
        .end();
    let written = rewritten(&["normalize-timestamps:ts=8:mode=clamp"], &tar);
    let times: Vec<f64> = python_reads(&written).unwrap().into_iter().map(|entry| entry.mtime).collect();
    assert_eq!(times, [1.0, 8.0, -1.0, 7.75, 8.000_000_000_1]);
    let written = rewritten(&["normalize-timestamps:ts=7:mode=clamp"], &tar);
    let times: Vec<f64> = python_reads(&written).unwrap().into_iter().map(|entry| entry.mtime).collect();
    assert_eq!(times, [1.0, 7.0, -1.0, 7.0, 7.0]);
}

#[test]
fn normalize_takes_times_out_of_global_headers() {
    let tar = Archive::new()
        .global(&[("mtime", "1000"), ("atime", "5"), ("comment", "kept")])
        .file("a", "x")
        .pax(&[("mtime", "3")])
        .file("b", "x")
        .global(&[("ctime", "5")])
        .file("c", "x")
        .end();
    for (filter, expected) in [
        ("normalize-timestamps:ts=9", [9.0, 9.0, 9.0]),
        // With the global time, which Go ignores and others apply, 1000 is the time of `a` and `c`.
        ("normalize-timestamps:ts=500:mode=clamp", [500.0, 3.0, 500.0]),
        ("normalize-timestamps:ts=2000:mode=clamp", [1000.0, 3.0, 1000.0]),
    ] {
        let written = rewritten(&[filter], &tar);
        let entries = python_reads(&written).unwrap();
        assert_eq!(entries.iter().map(|entry| entry.mtime).collect::<Vec<_>>(), expected, "{filter}");
        assert_eq!(entries[0].pax.keys().collect::<Vec<_>>(), ["comment"]);
        // The header of `a` says the same to those who ignore global headers, and the empty one is gone.
        let a = written.chunks(BLOCK).position(|block| block.starts_with(b"a\0")).unwrap() * BLOCK;
        let octal = std::str::from_utf8(&written[a + 136..a + 147]).unwrap();
        assert_eq!(i64::from_str_radix(octal, 8).unwrap() as f64, expected[0]);
        assert_eq!(written.chunks(BLOCK).filter(|block| block[156] == b'g').count(), 1);
        assert!(!rewrite(&chain(&[filter]), &written).unwrap().0.edited);
    }
}

#[test]
fn edited_members_say_themselves_what_a_global_header_would_override() {
    let tar = Archive::new()
        .global(&[("uid", "7"), ("gname", "wheel")])
        .pax(&[("uid", "8")])
        .file("a", "x")
        .file("b", "x")
        .end();
    let written = rewritten(&["normalize-timestamps"], &tar);
    let owners = |tar: &[u8]| -> Vec<(i64, String)> {
        python_reads(tar).unwrap().into_iter().map(|entry| (entry.uid, entry.gname)).collect()
    };
    assert_eq!(owners(&tar), [(8, "wheel".to_owned()), (7, "wheel".to_owned())]);
    assert_eq!(owners(&written), owners(&tar));
}

#[test]
fn normalize_sets_the_times_of_the_config_too() {
    let config = json!({
        "zebra": 1,
        "created": "2024-05-01T10:00:00.123456789Z",
        "history": [
            { "created_by": "a", "created": "2001-01-01T00:00:00+01:00" },
            { "created": "2024-05-01T10:00:00Z", "empty_layer": true },
            { "created": "yesterday" },
            { "comment": "none" }
        ],
        "alpha": { "created": "2024-05-01T10:00:00Z" }
    });
    let edit = |filter: &str| {
        let mut config = config.clone();
        let changed = chain(&[filter]).edit_config(&mut config);
        let times =
            config["history"].as_array().unwrap().iter().map(|entry| entry["created"].clone()).collect();
        assert_eq!(config["alpha"]["created"], "2024-05-01T10:00:00Z");
        assert_eq!(
            config.as_object().unwrap().keys().collect::<Vec<_>>(),
            ["zebra", "created", "history", "alpha"]
        );
        (changed, config["created"].clone(), Value::Array(times))
    };
    let epoch = "1970-01-01T00:00:00Z";
    assert_eq!(edit("normalize-timestamps"), (true, json!(epoch), json!([epoch, epoch, epoch, null])));
    assert_eq!(
        edit("normalize-timestamps:ts=1000000000:mode=clamp"),
        (
            true,
            json!("2001-09-09T01:46:40Z"),
            json!(["2001-01-01T00:00:00+01:00", "2001-09-09T01:46:40Z", "yesterday", null])
        )
    );
    assert!(!edit("normalize-timestamps:ts=2000000000:mode=clamp").0);
    assert!(!edit("exclude:pattern=a").0);
}

#[test]
fn exclude_drops_the_subtree_of_a_directory_wherever_its_entry_stands() {
    let tar = Archive::new()
        .file("var/cache/before", "x")
        .directory("var/cache/")
        .file("./var/cache/a/b", "x")
        .file("var/cached", "x")
        .file("/var/lib/../cache/c", "x");
    check_exclude("var/cache", tar.clone(), &["var/cached=x"]);
    check_exclude("var/cache/", tar.clone(), &["var/cached=x"]);
    check_exclude("./var/cache/**", tar.clone(), &["var/cache", "var/cached=x"]);
    let without_entry =
        Archive::new().file("a/.git/config", "x").file("a/.gitignore", "x").file(".git/HEAD", "x");
    check_exclude("**/.git/**", without_entry, &["a/.gitignore=x"]);
    check_exclude(
        "*.pyc,var/lib",
        Archive::new().file("a/b.pyc", "x").file("var/lib/x", "x").directory("b.pyc"),
        &[],
    );
}

#[test]
fn exclude_keeps_whiteouts_and_the_root() {
    let tar = Archive::new().directory("./").file("a/.wh.b", "").file("a/.wh..wh..opq", "").file("a/b", "x");
    check_exclude("*", tar.clone(), &[".", "a/.wh.b=", "a/.wh..wh..opq="]);
    check_exclude("a", tar, &[".", "a/.wh.b=", "a/.wh..wh..opq="]);
}

#[test]
fn exclude_keeps_order_duplicates_and_prefixes_of_what_stays() {
    let tar =
        Archive::new().file("./b", "1").file("x", "x").file("a", "2").file("./b", "3").symlink("l", "x");
    check_exclude("x", tar, &["./b=1", "a=2", "./b=3", "l>x"]);
}

#[test]
fn exclude_promotes_the_first_surviving_hard_link_to_the_file() {
    let tar = Archive::new()
        .pax(&[("SCHILY.xattr.user.a", "b"), ("mtime", "1.5")])
        .member(&Header::new("bin/busybox", b'0', 4).put(100, b"0004755\0"), "code")
        .hard_link("./bin/sh", "bin/busybox")
        .hard_link("bin/ls", "./bin/busybox")
        .hard_link("bin/busybox.old", "bin/busybox")
        .end();
    let (result, written, passes) =
        rewrite_within(&chain(&["exclude:pattern=bin/busybox*"]), &tar, &Limits::default()).unwrap();
    assert_eq!(passes, 2, "the first pass learns what the second one must keep aside");
    assert_eq!(listing(&written), ["./bin/sh=code", "bin/ls>./bin/sh"]);
    let promoted = &python_reads(&written).unwrap()[0];
    assert_eq!((promoted.mode, promoted.mtime), (0o4755, 1.5));
    assert_eq!(promoted.pax["SCHILY.xattr.user.a"], "b");
    assert_eq!(result.reports, [Some(Report::Exclude(exclude::Counts { dropped: 2, promoted: 1 }))]);
}

#[test]
fn exclude_needs_one_pass_where_no_link_survives_its_target() {
    for tar in [
        Archive::new().file("a", "x").hard_link("a.link", "a").file("b", "y").end(),
        Archive::new().file("x", "x").file("a", "x").hard_link("b", "c").end(),
        // The target is in a lower layer, and nothing of this one was dropped.
        Archive::new().hard_link("b", "a").file("c", "x").end(),
    ] {
        let (_, _, passes) =
            rewrite_within(&chain(&["exclude:pattern=a*"]), &tar, &Limits::default()).unwrap();
        assert_eq!(passes, 1);
    }
}

#[test]
fn exclude_follows_links_to_links() {
    let tar =
        Archive::new().file("x1", "data").hard_link("x2", "x1").hard_link("x3", "x2").hard_link("a", "x3");
    check_exclude("x*", tar.clone().hard_link("b", "x1").hard_link("c", "x2"), &["a=data", "b>a", "c>a"]);
    // A dropped link to a file that stays: what linked to it links to the file.
    check_exclude("x2,x3", tar, &["x1=data", "a>x1"]);
}

#[test]
fn exclude_links_to_what_the_target_was_at_that_place() {
    let tar = Archive::new()
        .file("x", "old")
        .hard_link("a", "x")
        .file("x", "new")
        .hard_link("b", "x")
        .directory("x")
        .hard_link("c", "x")
        .symlink("x", "elsewhere")
        .hard_link("d", "x")
        .hard_link("e", "x");
    check_exclude("x", tar, &["a=old", "b=new", "c>x", "d>elsewhere", "e>d"]);
}

#[test]
fn exclude_leaves_links_into_lower_layers() {
    let tar = Archive::new().file("x/other", "x").hard_link("a", "x/lower");
    check_exclude("x", tar, &["a>x/lower"]);
}

#[test]
fn exclude_promotes_files_larger_than_memory_is_given() {
    let big: Vec<u8> = (0..3_000_001_u32).flat_map(|number| number.to_le_bytes()).take(3_000_001).collect();
    let tar = Archive::new()
        .file("x/small", "first")
        .member(&Header::new("x/big", b'0', big.len()), &big)
        .file("x/last", "last")
        .hard_link("c", "x/last")
        .hard_link("b", "x/big")
        .hard_link("a", "x/small")
        .end();
    let written = rewritten(&["exclude:pattern=x"], &tar);
    assert_eq!(listing(&written), ["c=last", "b=3000001 bytes", "a=first"]);
    assert_eq!(python_reads(&written).unwrap()[1].data.as_deref(), Some(Digest::sha256(&big).hex()));
}

#[test]
fn a_file_without_an_owners_name_keeps_none_behind_a_global_one() {
    // Its link becomes the file where the global header holds.
    let tar =
        Archive::new().file("x", "data").global(&[("uname", "u"), ("gname", "g")]).hard_link("l", "x").end();
    let written = rewritten(&["exclude:pattern=x"], &tar);
    assert_eq!(listing(&written), ["l=data"]);
    let entry = &python_reads(&written).unwrap()[0];
    assert_eq!((entry.uname.as_str(), entry.gname.as_str()), ("", ""));
    assert_eq!(rewritten(&["exclude:pattern=y"], &written), written, "we read what we write");
}

#[test]
fn filters_after_exclude_see_promoted_files() {
    let tar =
        Archive::new().file("x", "data").hard_link("a", "x").hard_link("b", "x").hard_link("c", "x").end();
    // The second filter drops the promoted file, so its own first link is promoted in turn.
    let specs = ["exclude:pattern=x", "exclude:pattern=a", "normalize-timestamps:ts=5", "search:pattern=*"];
    let (result, written, passes) = rewrite_within(&chain(&specs), &tar, &Limits::default()).unwrap();
    assert_eq!(listing(&written), ["b=data", "c>b"]);
    assert_eq!(passes, 3);
    assert!(python_reads(&written).unwrap().iter().all(|entry| entry.mtime == 5.0));
    let Some(Report::Search(hits)) = &result.reports[3] else { panic!() };
    assert_eq!(hits.hits.len(), 2);
}

#[test]
fn a_scan_stops_at_the_first_edit_and_says_where() {
    let tar = Archive::new().file("a", "x").file("b", "y").file("c", "z").end();
    let offset = |specs: &[&str]| match run(&chain(specs), Mode::Scan, &tar).unwrap() {
        PassOutcome::NeedsRewrite { offset } => Some(offset),
        PassOutcome::Done(result) => {
            assert!(!result.edited && result.output == result.input);
            None
        }
        PassOutcome::NeedsRestart(_) => panic!(),
    };
    assert_eq!(offset(&["exclude:pattern=b"]), Some(1024));
    assert_eq!(offset(&["search:pattern=*", "exclude:pattern=b", "normalize-timestamps"]), Some(0));
    assert_eq!(offset(&["exclude:pattern=d", "inspect:file=x"]), None);
    // A tar that is corrupt behind the first edit is found corrupt by the rewrite.
    assert_eq!(offset(&["exclude:pattern=a"]), Some(0));
}

#[test]
fn inspect_records_the_tar_as_it_would_be_written_at_its_place() {
    let tar = Archive::new()
        .file("a", vec![1; 300_000])
        .file("x", "x")
        .hard_link("l", "x")
        .member(&Header::new("zero-time", b'0', 1).put(136, b"00000000000\0"), "z")
        .global(&[("comment", "c")])
        .file("b", vec![2; 40_000])
        .end();
    let filters =
        ["exclude:pattern=nothing", "exclude:pattern=x", "normalize-timestamps", "exclude:pattern=b"];
    let mut specs = vec!["inspect:file=0"];
    for filter in filters {
        specs.extend([filter, "inspect:file=n", "search:pattern=*"]);
    }
    let (result, _) = rewrite(&chain(&specs), &tar).unwrap();
    let observed =
        match run(&chain(&["inspect:file=0", "exclude:pattern=nothing", "inspect:file=1"]), Mode::Scan, &tar)
        {
            Ok(PassOutcome::Done(observed)) => observed,
            other => panic!("{other:?}"),
        };
    let records: Vec<_> = result
        .reports
        .iter()
        .filter_map(|report| match report {
            Some(Report::Inspect(record)) => Some(record),
            _ => None,
        })
        .collect();
    assert_eq!(records.len(), 5);
    for (position, record) in records.into_iter().enumerate() {
        let (prefix, written) = rewrite(&chain(&filters[..position]), &tar).unwrap();
        assert_eq!(record.diff_id, Digest::sha256(&written), "after {position} filters");
        assert_eq!(record.size, written.len() as u64);
        assert_eq!(record.edited, prefix.edited);
        assert_eq!(record.edited, position >= 2);
    }
    let Some(Report::Inspect(record)) = &observed.reports[2] else { panic!() };
    assert_eq!((&record.diff_id, record.edited), (&Digest::sha256(&tar), false));
}

/// An image of these layers, the first twice, as seen by the only filter of a chain.
fn render(spec: &str, tars: &[&[u8]], format: OutputFormat) -> (Target, String) {
    let chain = chain(&[spec]);
    let results: Vec<_> = tars.iter().map(|tar| observe(&chain, tar).unwrap()).collect();
    let layers: Vec<_> = results
        .iter()
        .map(|result| LayerFindings {
            hex: &result.input.digest.hex()[..6],
            digest: Some(&result.input.digest),
            report: result.reports[0].as_ref(),
        })
        .collect();
    let config = json!({ "history": [
        { "created": "2025-01-15T10:00:00Z", "created_by": "one" },
        { "created": "2025-01-15T10:00:00Z", "created_by": "nothing", "empty_layer": true },
        { "created": "2025-06-15T14:30:45.999999999+02:00", "created_by": "two", "comment": "buildkit" },
        { "created_by": "three" }
    ] });
    let image = ImageFindings { image: "library/app", tag: "v1", config: &config, layers: &layers };
    let rendering = chain.filters()[0].render(&image, format).unwrap();
    (rendering.to, rendering.text)
}

fn searched() -> (Vec<u8>, Vec<u8>) {
    let first = Archive::new()
        .directory("etc/")
        .file("etc/app.conf", "12345")
        .file("./etc/b.conf", "")
        .symlink("etc/c.conf", "app.conf")
        .hard_link("etc/d.conf", "etc/app.conf")
        .directory("etc/e.conf/")
        .header(&Header::new("f.conf", b'6', 0))
        .header(&Header::new("g.conf", b'3', 0))
        .header(&Header::new("h.conf", b'4', 0))
        .member(&Header::new("v.conf", b'V', 1), "x")
        .file("etc/.wh.old.conf", "")
        .file("line\nfeed.conf", "")
        .global(&[("comment", "x.conf")])
        .end();
    (first, Archive::new().file("none", "").end())
}

#[test]
fn search_prints_what_the_python_tool_prints() {
    let (first, second) = searched();
    let hex = &Digest::sha256(&first).hex()[..6].to_owned();
    let (to, text) = render("search:pattern=*.conf", &[&first, &second], OutputFormat::Text);
    assert_eq!(to, Target::Stdout);
    assert_eq!(
        text,
        format!(
            "Layer: {hex}
  etc/app.conf (file, 5 bytes)
  ./etc/b.conf (file, 0 bytes)
  etc/c.conf -> app.conf (symlink)
  etc/d.conf -> etc/app.conf (hardlink)
  etc/e.conf (directory)
  f.conf (fifo)
  g.conf (character device)
  h.conf (block device)
  v.conf (unknown)
  etc/.wh.old.conf (file, 0 bytes)
  line\\nfeed.conf (file, 0 bytes)

Found 11 matches in 1 layer.
"
        )
    );
    let (_, text) = render("search:pattern=none", &[&first, &second], OutputFormat::Text);
    assert!(text.ends_with("  none (file, 0 bytes)\n\nFound 1 match in 1 layer.\n"), "{text}");
    let (_, text) = render("search:pattern=*none*,*", &[&first, &second], OutputFormat::Text);
    assert_eq!(text, "No matches found.\n", "a search has one pattern");
    let (_, text) = render("search:pattern=none:script-friendly=true", &[&first], OutputFormat::Text);
    assert_eq!(text, "", "nothing is printed for scripts");
    let (_, text) =
        render("search:pattern=app*:script-friendly=true", &[&second, &first], OutputFormat::Text);
    assert_eq!(text, format!("library/app:v1:{hex}:etc/app.conf\n"));
    let (_, text) = render("search:pattern=app*", &[&first, &second, &first], OutputFormat::Text);
    assert_eq!(text.matches("Layer:").count(), 1);
    assert!(text.ends_with("Found 2 matches in 1 layer.\n"));
}

#[test]
fn search_matches_the_path_or_its_last_component() {
    let (first, _) = searched();
    let found = |spec: &str| {
        let (_, text) = render(spec, &[&first], OutputFormat::Text);
        text.lines().filter_map(|line| line.strip_prefix("  ").map(str::to_owned)).collect::<Vec<_>>()
    };
    assert_eq!(found("search:pattern=etc/b.conf"), ["./etc/b.conf (file, 0 bytes)"]);
    assert_eq!(found("search:pattern=b.conf"), ["./etc/b.conf (file, 0 bytes)"]);
    assert_eq!(found("search:pattern=./etc/b.conf"), ["./etc/b.conf (file, 0 bytes)"]);
    assert_eq!(found("search:pattern=^etc/[ab]:regex=true"), ["etc/app.conf (file, 5 bytes)"]);
    assert_eq!(found(r"search:pattern=b\.conf$:regex=true"), ["./etc/b.conf (file, 0 bytes)"]);
    assert_eq!(found("search:pattern=etc"), ["etc (directory)"]);
}

#[test]
fn search_speaks_json() {
    let (first, second) = searched();
    let (_, text) = render("search:pattern=etc/[ace]*", &[&first, &second], OutputFormat::Json);
    let hex = Digest::sha256(&first).hex()[..6].to_owned();
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap(),
        json!({ "image": "library/app", "tag": "v1", "layers": [{ "layer": hex, "matches": [
            { "path": "etc/app.conf", "type": "file", "size": 5 },
            { "path": "etc/c.conf", "type": "symlink", "target": "app.conf" },
            { "path": "etc/e.conf", "type": "directory" }
        ] }] })
    );
}

#[test]
fn inspect_writes_one_line_newest_layer_first() {
    let (first, second) = searched();
    let (to, text) = render("inspect:file=out.jsonl", &[&first, &second], OutputFormat::Text);
    assert_eq!(to, Target::Append("out.jsonl".into()));
    let id = |tar: &[u8]| Digest::sha256(tar).to_string();
    assert_eq!(
        text,
        format!(
            concat!(
                r#"{{"layers":[{{"Comment":"buildkit","Created":1749990645,"CreatedBy":"two","DiffId":"{1}","#,
                r#""Digest":"{1}","Id":"{1}","Size":{3},"Tags":["library/app:v1"]}},"#,
                r#"{{"Comment":"","Created":1736935200,"CreatedBy":"one","DiffId":"{0}","#,
                r#""Digest":"{0}","Id":"{0}","Size":{2},"Tags":null}}],"name":"library/app:v1"}}"#,
                "\n"
            ),
            id(&first),
            id(&second),
            first.len(),
            second.len()
        )
    );
}

#[test]
fn inspect_tells_the_tar_from_the_blob_that_holds_it() {
    // The Python tool gives the name that its source gave the layer: of a registry's, the blob's digest.
    let tar = Archive::new().file("a", "x").end();
    let blob = Digest::sha256("the same, compressed");
    // A filter that edits nothing leaves both; the Python tool encodes every member anew, and so changes its `Id`.
    for specs in [&["inspect:file=x"][..], &["exclude:pattern=nothing", "inspect:file=x"]] {
        let chain = chain(specs);
        let (result, _) = rewrite(&chain, &tar).unwrap();
        let last = specs.len() - 1;
        let layers = [LayerFindings { hex: "", digest: Some(&blob), report: result.reports[last].as_ref() }];
        let image = ImageFindings { image: "a", tag: "b", config: &Value::Null, layers: &layers };
        let text = chain.filters()[last].render(&image, OutputFormat::Text).unwrap().text;
        let layer = &serde_json::from_str::<Value>(&text).unwrap()["layers"][0];
        assert_eq!(layer["Id"], Digest::sha256(&tar).to_string());
        assert_eq!(layer["DiffId"], layer["Id"]);
        assert_eq!(layer["Digest"], blob.to_string());
    }
}

#[test]
fn inspect_knows_no_digest_of_an_edited_layer() {
    let tar = Archive::new().file("a", "x").end();
    let chain = chain(&["normalize-timestamps", "inspect:file=x"]);
    let (result, written) = rewrite(&chain, &tar).unwrap();
    let layers =
        [LayerFindings { hex: "", digest: Some(&result.input.digest), report: result.reports[1].as_ref() }];
    let image = ImageFindings { image: "a", tag: "", config: &Value::Null, layers: &layers };
    let line: Value =
        serde_json::from_str(&chain.filters()[1].render(&image, OutputFormat::Text).unwrap().text).unwrap();
    let layer = &line["layers"][0];
    assert_eq!(layer["Digest"], Value::Null);
    assert_eq!(layer["Id"], Digest::sha256(&written).to_string());
    assert_eq!((&layer["Created"], &layer["CreatedBy"]), (&json!(0), &json!("")));
    assert_eq!((&line["name"], &layer["Tags"]), (&json!("a"), &json!(["a"])));
}

#[test]
fn reports_travel_as_json() {
    let tar = Archive::new().file("a.conf", "x").symlink("b.conf", "a").end();
    let specs = ["normalize-timestamps", "search:pattern=*", "inspect:file=x", "exclude:pattern=b.conf"];
    let (result, _) = rewrite(&chain(&specs), &tar).unwrap();
    let text = serde_json::to_string(&result.reports).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Option<Report>>>(&text).unwrap(), result.reports);
    assert!(result.reports.iter().all(Option::is_some));
    assert!(FilterChain::default().is_empty() && chain(&specs).edits() && !chain(&specs[1..3]).edits());
}
