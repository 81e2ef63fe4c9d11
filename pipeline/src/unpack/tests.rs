//! Resolution below the root, by the kernel and by our own walk, which have to agree.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::root::Root;
use super::{LeftOut, Options, UnpackError, Unpacker};
use crate::tar::Limits;

/// A tar of members: kind, name, and data or a link's target.
fn tar(members: &[(u8, &str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, name, content) in members {
        let (link, data) = if matches!(kind, b'1' | b'2') { (*content, "") } else { ("", *content) };
        let mut header = [0_u8; 512];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, b"0000755\x000000000\x000000000\0");
        put(124, format!("{:011o}\0", data.len()).as_bytes());
        put(136, b"00000000007\0        ");
        put(156, &[*kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(data.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

fn unpacker(path: &Path, openat2: bool) -> Unpacker {
    let root = Root::open_at(path).unwrap();
    let root = if openat2 { root } else { root.without_openat2() };
    Unpacker::in_root(root, Options { owners: false, limits: Limits::default() }).unwrap()
}

/// Unpacks layers with and without `openat2`, and gives what both made of them: every path, and data or target.
fn unpack(layers: &[&[(u8, &str, &str)]]) -> Result<Vec<String>, String> {
    let [one, two] = [true, false].map(|openat2| {
        let outer = tempfile::tempdir().unwrap();
        std::fs::write(outer.path().join("secret"), "secret").unwrap();
        let path = outer.path().join("a/b/root");
        std::fs::create_dir_all(&path).unwrap();
        let mut unpacker = unpacker(&path, openat2);
        let result = layers
            .iter()
            .try_for_each(|layer| unpacker.apply(&tar(layer)[..]))
            .and_then(|()| unpacker.finish().map(|_| ()));
        let outside: Vec<_> = std::fs::read_dir(outer.path()).unwrap().collect();
        assert_eq!(outside.len(), 2, "nothing new outside");
        assert_eq!(std::fs::read(outer.path().join("secret")).unwrap(), b"secret");
        let mut found = Vec::new();
        list(&path, "", &mut found);
        found.sort();
        result.map(|()| found).map_err(|error| error.to_string())
    });
    assert_eq!(one, two, "the kernel and our walk agree");
    one
}

fn list(path: &Path, prefix: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.push(format!("{name}/"));
            list(&entry.path(), &format!("{name}/"), found);
        } else if kind.is_symlink() {
            found.push(format!("{name} -> {}", std::fs::read_link(entry.path()).unwrap().display()));
        } else {
            found.push(format!("{name}: {}", std::fs::read_to_string(entry.path()).unwrap()));
        }
    }
}

/// Does something as a user would who has no right over the modes of files, whoever runs the tests.
pub(crate) fn without_capabilities<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let none = CapabilitySet::empty();
    let thread = || {
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
            .unwrap();
        work()
    };
    // The kernel counts capabilities by thread.
    std::thread::scope(|scope| scope.spawn(thread).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn links_on_the_way_are_followed_as_by_a_process_in_the_tree() {
    let found = unpack(&[
        &[
            (b'5', "usr/lib/", ""),
            (b'2', "lib", "usr/lib"),
            (b'2', "absolute", "/usr/lib"),
            (b'2', "usr/up", "../../../../usr/./lib/"),
            (b'2', "chain", "absolute"),
            (b'2', "dangling", "made/on/demand"),
        ],
        &[
            (b'0', "lib/one", "1"),
            (b'0', "absolute/two", "2"),
            (b'0', "usr/up/three", "3"),
            (b'0', "chain/deep/four", "4"),
            (b'0', "dangling/five", "5"),
            (b'0', "../../lib/six", "6"),
        ],
    ])
    .unwrap();
    for expected in ["usr/lib/one: 1", "usr/lib/two: 2", "usr/lib/three: 3", "usr/lib/deep/four: 4"] {
        assert!(found.contains(&expected.to_owned()), "{expected}: {found:?}");
    }
    assert!(found.contains(&"made/on/demand/five: 5".to_owned()), "{found:?}");
    assert!(found.contains(&"usr/lib/six: 6".to_owned()), "{found:?}");
}

#[test]
fn nothing_leads_out_of_the_tree() {
    let links: &[(u8, &str, &str)] =
        &[(b'2', "up", "../../.."), (b'2', "all", "../../../../../../../../.."), (b'2', "root", "/")];
    for name in ["up", "all", "root", "up/up/all", "root/../root/up"] {
        let (file, whiteout) = (format!("{name}/secret"), format!("{name}/.wh.secret"));
        let found = unpack(&[links, &[(b'0', &file, "evil"), (b'0', &whiteout, "")]]).unwrap();
        assert!(found.contains(&"secret: evil".to_owned()), "{name}: {found:?}");
        unpack(&[links, &[(b'1', "link", &file)]]).expect_err("there is no such file in the tree");
    }
}

#[test]
fn loops_and_files_in_the_way_are_errors() {
    unpack(&[&[(b'2', "a", "b"), (b'2', "b", "a"), (b'0', "a/x", "")]]).expect_err("a loop");
    unpack(&[&[(b'0', "a", ""), (b'0', "a/b/c", "")]]).expect_err("a file");
    unpack(&[&[(b'9', "a", "")]]).expect_err("an unknown kind");
}

#[test]
fn what_was_replaced_is_not_remembered() {
    let found = unpack(&[
        &[(b'5', "one/", ""), (b'5', "two/", ""), (b'2', "link", "one"), (b'0', "link/a", "1")],
        &[(b'0', "link/b", "2"), (b'2', "link", "two"), (b'0', "link/c", "3")],
        &[(b'0', "two", "a file"), (b'5', "link/", ""), (b'0', "link/d", "4")],
    ])
    .unwrap();
    let expected = ["link/", "link/d: 4", "one/", "one/a: 1", "one/b: 2", "two: a file"];
    assert_eq!(found, expected);
}

#[test]
fn a_hard_link_to_itself_changes_nothing() {
    let found =
        unpack(&[&[(b'0', "a", "1"), (b'1', "a", "a"), (b'1', "b", "a"), (b'1', "b", "./a")]]).unwrap();
    assert_eq!(found, ["a: 1", "b: 1"]);
}

#[test]
fn a_tree_may_be_deeper_than_the_stack() {
    let outer = tempfile::tempdir().unwrap();
    let mut unpacker = unpacker(outer.path(), true);
    // A link leads to the end of what is there; each step goes a little deeper.
    let step = "d/".repeat(40);
    let target = |times: usize| step.repeat(times);
    for times in 1..100 {
        let link = format!("l{times}");
        let before = if times > 1 { format!("l{}/{step}", times - 1) } else { target(1) };
        unpacker
            .apply(&tar(&[(b'5', &before, ""), (b'2', &link, before.trim_end_matches('/'))])[..])
            .unwrap();
        if times >= 38 {
            break;
        }
    }
    assert_eq!(unpacker.finish().unwrap(), LeftOut::default());
    super::tree::remove(outer.path()).unwrap();
    std::fs::create_dir(outer.path()).unwrap();
}

#[test]
fn names_of_directories_cannot_fill_the_memory_of_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut unpacker = unpacker(dir.path(), true);
    let limits = Limits { members: 2, ..Limits::default() };
    unpacker.options.limits = limits;
    let error = unpacker.apply(&tar(&[(b'5', "a", ""), (b'5', "b", ""), (b'5', "c", "")])[..]).unwrap_err();
    assert!(matches!(error, UnpackError::Tar { .. }), "{error}");
}

#[test]
fn directories_that_no_layer_names_have_the_same_time_always() {
    let dir = tempfile::tempdir().unwrap();
    let mut unpacker = unpacker(dir.path(), true);
    unpacker.apply(&tar(&[(b'0', "made/up/file", "x")])[..]).unwrap();
    unpacker.finish().unwrap();
    for path in ["made/up", "made", "."] {
        let metadata = dir.path().join(path).metadata().unwrap();
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (0, 0), "{path}");
    }
}

/// A member of that mode, with nothing else to it.
fn with_mode(mut tar: Vec<u8>, mode: u32) -> Vec<u8> {
    tar[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
    tar[148..156].fill(b' ');
    let sum: u32 = tar[..512].iter().map(|byte| u32::from(*byte)).sum();
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar
}

#[test]
fn without_any_right_of_root_directories_may_shut_their_owner_out() {
    without_capabilities(|| {
        for mode in [0o000, 0o444, 0o600, 0o111, 0o500] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("root");
            std::fs::create_dir(&path).unwrap();
            let mut unpacker = unpacker(&path, true);
            unpacker.is_root_user = false;
            for name in ["./", "outer/", "outer/sealed/", "outer/sealed/empty/"] {
                unpacker.apply(&with_mode(tar(&[(b'5', name, "")]), mode)[..]).unwrap();
            }
            unpacker.apply(&tar(&[(b'0', "outer/sealed/file", "x"), (b'5', "other/", "")])[..]).unwrap();
            unpacker.finish().unwrap();
            // From the outside in, each lets us in only when its mode was seen.
            let mut at = path.clone();
            for name in ["", "outer", "sealed", "empty"] {
                at.push(name);
                assert_eq!(at.metadata().unwrap().mode() & 0o7777, mode, "{mode:o}: {}", at.display());
                std::fs::set_permissions(&at, PermissionsExt::from_mode(0o700)).unwrap();
            }
            assert_eq!(std::fs::read(path.join("outer/sealed/file")).unwrap(), b"x");
        }
    });
}

#[test]
fn links_to_devices_that_are_left_out_are_left_out_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut unpacker = unpacker(dir.path(), true);
    let lower = tar(&[(b'0', "dev/one", "a file"), (b'0', "dev/two", "a file")]);
    let upper = tar(&[
        (b'3', "dev/null", ""),
        (b'1', "dev/one", "dev/null"),
        (b'2', "devices", "dev"),
        (b'1', "three", "devices/one"),
    ]);
    unpacker.apply(&lower[..]).unwrap();
    unpacker.apply(&upper[..]).unwrap();
    unpacker.apply(&tar(&[(b'1', "dev/four", "three"), (b'1', "five", "dev/two")])[..]).unwrap();
    let error = unpacker.apply(&tar(&[(b'1', "six", "dev/none")])[..]).unwrap_err();
    assert!(matches!(error, UnpackError::Refused { .. }), "{error}");
    assert_eq!(unpacker.finish().unwrap().devices, 4);
    let mut found = Vec::new();
    list(dir.path(), "", &mut found);
    found.sort();
    assert_eq!(found, ["dev/", "dev/two: a file", "devices -> dev", "five: a file"]);
}

#[test]
fn what_aufs_kept_its_books_in_is_no_part_of_the_tree() {
    let books: &[(u8, &str, &str)] = &[
        (b'0', ".wh..wh.aufs", ""),
        (b'5', ".wh..wh.orph/", ""),
        (b'0', "./.wh..wh.orph/12", "x"),
        (b'5', ".wh..wh.plnk/", ""),
        (b'0', ".wh..wh.plnk/12.34", "linked"),
        (b'2', ".wh..wh.plnk/56.78", "/"),
        (b'0', ".wh..wh.plnk/deep/er", "x"),
        (b'0', "a/.wh..wh.plnk/9.9", "x"),
        (b'1', "one", ".wh..wh.plnk/12.34"),
        (b'1', "a/two", "./.wh..wh.plnk/12.34"),
    ];
    let expected = ["a/", "a/two: linked", "one: linked"];
    assert_eq!(unpack(&[books]).unwrap(), expected);
    let lower: &[(u8, &str, &str)] = &[(b'0', "a/below", ""), (b'0', "b", "")];
    let opaque = [books, &[(b'0', ".wh..wh..opq", "")]].concat();
    assert_eq!(unpack(&[lower, &opaque]).unwrap(), expected);
    assert_eq!(
        unpack(&[lower, books, &[(b'0', "a/.wh..wh..opq", "")]]).unwrap(),
        ["a/", "b: ", "one: linked"]
    );
}

#[test]
fn what_a_directory_gives_to_new_files_is_not_given_to_those_of_the_image() {
    /// `user::rwx,user:7:rwx,group::---,mask::rwx,other::---`, as the kernel stores it.
    const ACL: [(u16, u16, u32); 5] =
        [(1, 7, u32::MAX), (2, 7, 7), (4, 0, u32::MAX), (16, 7, u32::MAX), (32, 0, u32::MAX)];
    let entries = ACL.iter().flat_map(|(tag, rights, id)| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat()
    });
    let acl: Vec<u8> = 2_u32.to_le_bytes().into_iter().chain(entries).collect();
    let name = "system.posix_acl_default";
    let dir = tempfile::tempdir().unwrap();
    if rustix::fs::setxattr(dir.path(), name, &acl, rustix::fs::XattrFlags::empty()).is_err() {
        return; // A file system without ACLs.
    }
    let path = dir.path().join("root");
    // What is around the tree gives nothing either.
    rustix::fs::removexattr(dir.path(), name).unwrap();
    std::fs::create_dir(&path).unwrap();
    let record = [b"SCHILY.xattr.system.posix_acl_default=", &acl[..], b"\n"].concat();
    let record = [format!("{} ", record.len() + 3).as_bytes(), &record].concat();
    let mut layer = tar(&[(b'x', "pax", &"r".repeat(record.len())), (b'5', "d/", "")]);
    layer[512..512 + record.len()].copy_from_slice(&record);
    let mut unpacker = unpacker(&path, true);
    unpacker.apply(&layer[..]).unwrap();
    unpacker
        .apply(&tar(&[(b'0', "d/file", "x"), (b'5', "d/inner/", ""), (b'0', "d/made/file", "x")])[..])
        .unwrap();
    assert_eq!(unpacker.finish().unwrap(), LeftOut::default());
    let get = |at: &str, name: &str| {
        let mut value = vec![0; 1024];
        let length = rustix::fs::getxattr(path.join(at), name, &mut value[..]);
        length.map(|length| value[..length].to_vec())
    };
    assert_eq!(get("d", name).unwrap(), acl);
    for inside in ["d/file", "d/inner", "d/made", "d/made/file"] {
        for name in [name, "system.posix_acl_access"] {
            assert!(get(inside, name).is_err(), "{inside}: {name}");
        }
    }
}
