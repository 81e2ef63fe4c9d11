//! Independent tools that have the last word: skopeo, Docker or podman, Python's tarfile, the Python occystrap.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use crate::certificates::text;
use crate::image::json_of;
use crate::tools::{is_installed, pipe, run, tool};

/// `skopeo copy`: reads the whole image, checks its digests on the way, writes it to a directory.
pub fn skopeo_reads(source: &str) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let into = format!("dir:{}", text(directory.path()));
    tool("skopeo", ["copy", "--quiet", "--all", "--src-tls-verify=false", source, &into]);
}

/// `skopeo inspect --config`: the config as skopeo sees it.
pub fn skopeo_config(source: &str) -> Value {
    json_of(tool("skopeo", ["inspect", "--config", "--raw", "--tls-verify=false", source]).as_bytes())
}

/// Every member of a tar as Python's tarfile reads it: an object with names, modes, owners, PAX records and content's hash.
pub fn members(tar: &[u8]) -> Vec<Value> {
    // The system's own starts faster than one behind a version manager.
    let python = if Path::new("/usr/bin/python3").is_file() { "/usr/bin/python3" } else { "python3" };
    let lines = pipe(python, ["-S", "-c", MEMBERS], tar);
    String::from_utf8(lines).expect("JSON").lines().map(|line| json_of(line.as_bytes())).collect()
}

const MEMBERS: &str = r#"
import hashlib, json, sys, tarfile
def text(s):
    try:
        s.encode("utf-8")
        return s
    except UnicodeEncodeError:
        return "bytes:" + s.encode("utf-8", "surrogateescape").hex()
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
    for m in tar:
        f = tar.extractfile(m) if m.isreg() else None
        print(json.dumps({
            "name": text(m.name), "type": m.type.decode(), "mode": m.mode, "uid": m.uid, "gid": m.gid,
            "uname": m.uname, "gname": m.gname, "size": m.size, "mtime": m.mtime, "link": text(m.linkname),
            "major": m.devmajor, "minor": m.devminor, "sparse": m.sparse,
            "pax": {text(k): text(v) for k, v in sorted(m.pax_headers.items())},
            "sha256": hashlib.sha256(f.read()).hexdigest() if f else None,
        }))
"#;

/// The names of a tar's members, as Python's tarfile reads them.
pub fn names(tar: &[u8]) -> Vec<String> {
    members(tar).iter().map(|member| member["name"].as_str().expect("a name").to_owned()).collect()
}

/// What GNU tar says of a tar: a line a member, with times in full.
pub fn gnu_listing(tar: &[u8]) -> String {
    let lines = pipe("tar", ["--utc", "--full-time", "--numeric-owner", "-tvf", "-"], tar);
    String::from_utf8(lines).expect("UTF-8 names")
}

/// A daemon, or what does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A Docker Engine answers.
    Docker,
    /// There is podman.
    Podman,
}

impl Engine {
    /// Docker where it answers, otherwise podman; where neither is, the test is not run, which CI does not accept.
    pub fn find(test: &str) -> Option<Self> {
        static FOUND: OnceLock<Option<Engine>> = OnceLock::new();
        let found = *FOUND.get_or_init(|| {
            if is_installed("docker") && run("docker", ["info"], b"").status.success() {
                Some(Self::Docker)
            } else {
                is_installed("podman").then_some(Self::Podman)
            }
        });
        if found.is_none() {
            eprintln!("NOT RUN: {test}: neither a Docker Engine nor podman");
            assert!(std::env::var_os("CI").is_none(), "CI must not skip {test}");
        }
        found
    }

    fn program(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
        }
    }

    /// Loads a saved tar; gives the image, which is removed with the value.
    pub fn load(self, path: &Path, name: &str) -> Loaded {
        tool(self.program(), ["load", "--quiet", "--input", &text(path)]);
        let inspected = tool(self.program(), ["image", "inspect", name]);
        Loaded { engine: self, name: name.to_owned(), inspected: json_of(inspected.as_bytes())[0].clone() }
    }
}

/// An image in an engine.
#[derive(Debug)]
pub struct Loaded {
    engine: Engine,
    name: String,
    /// What `image inspect` says.
    pub inspected: Value,
}

impl Loaded {
    /// Runs the image and gives its standard output.
    pub fn run(&self) -> String {
        let program = self.engine.program();
        tool(program, ["run", "--rm", "--network=none", &self.name])
    }

    /// The layers' diff_ids.
    pub fn diff_ids(&self) -> Vec<String> {
        let layers = self.inspected["RootFS"]["Layers"].as_array();
        layers.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // Whether it can be removed is not what the test is about.
        drop(run(self.engine.program(), ["image", "rm", "--force", &self.name], b""));
    }
}

/// A name for an image that no other test or run uses.
pub fn unique_name(stem: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("occy-test-{stem}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The Python tool, where `tests/setup` or `OCCYSTRAP_PY` put it.
pub fn python_occystrap(test: &str) -> Option<PathBuf> {
    let target = std::env::current_exe().ok()?.ancestors().nth(3)?.to_owned();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let named = std::env::var_os("OCCYSTRAP_PY").map(PathBuf::from);
    let found = named
        .into_iter()
        .chain([target, repository].map(|target| target.join("test-tools/venv/bin/occystrap")))
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("NOT RUN: {test}: no Python occystrap (tests/setup installs it)");
        assert!(std::env::var_os("CI").is_none(), "CI must not skip {test}");
    }
    found
}

/// `occystrap check` of the Python tool must find nothing wrong.
pub fn python_checks(occystrap: &Path, source: &str) {
    let output = Command::new(occystrap).args(["--insecure", "check", source]).output().expect("it runs");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "occystrap check {source}: {said}");
}

/// `umoci unpack`: the bundle that it makes of an image in a registry.
pub fn umoci_unpacks(source: &str, bundle: &Path) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let layout = format!("{}/layout:image", text(directory.path()));
    let into = format!("oci:{layout}");
    tool("skopeo", ["copy", "--quiet", "--src-tls-verify=false", source, &into]);
    tool("umoci", ["unpack", "--image", &layout, &text(bundle)]);
}

/// Every file of a tree by its path: type, mode, owner, size and hash, link's target, device, xattrs, times, number of links.
pub fn tree(root: &Path) -> Value {
    let python = if Path::new("/usr/bin/python3").is_file() { "/usr/bin/python3" } else { "python3" };
    json_of(&pipe(python, ["-S", "-c", TREE, &text(root)], b""))
}

const TREE: &str = r#"
import hashlib, json, os, stat, sys
root = os.fsencode(sys.argv[1])
def text(b):
    try:
        return b.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + b.hex()
found = {}
def look(path):
    st = os.lstat(path)
    kind = stat.S_IFMT(st.st_mode)
    entry = {
        "type": "%o" % kind, "mode": "%o" % stat.S_IMODE(st.st_mode), "owner": [st.st_uid, st.st_gid],
        "mtime": st.st_mtime_ns,
        "xattrs": {text(os.fsencode(n)): os.getxattr(path, n, follow_symlinks=False).hex() for n in sorted(os.listxattr(path, follow_symlinks=False))},
    }
    if stat.S_ISREG(st.st_mode):
        entry["size"] = st.st_size
        entry["sha256"] = hashlib.sha256(open(path, "rb").read()).hexdigest()
    if not stat.S_ISDIR(st.st_mode):
        entry["links"] = st.st_nlink
    if stat.S_ISLNK(st.st_mode):
        entry["target"] = text(os.readlink(path))
    if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode):
        entry["device"] = [os.major(st.st_rdev), os.minor(st.st_rdev)]
    found[text(os.path.relpath(path, root))] = entry
    if stat.S_ISDIR(st.st_mode):
        for name in sorted(os.listdir(path)):
            look(os.path.join(path, name))
look(root)
json.dump(found, sys.stdout)
"#;
