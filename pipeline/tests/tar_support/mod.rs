//! What the tests of tars share: archives made byte by byte, passes over them, and what other tools make of the result.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use occy_pipeline::digest::Digest;
use occy_pipeline::filter::{Filter, FilterChain, FilterError, Finish, LayerFilter, Targets, Verdict};
use occy_pipeline::layer::{Keep, LayerError, LayerPass, LayerResult, Mode, PassOutcome, Plan};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::{Limits, Member};

pub const BLOCK: usize = 512;

/// Edits every member without changing it.
#[derive(Debug)]
pub struct ForceEncoding;

impl Filter for ForceEncoding {
    fn spec(&self) -> String {
        "force-encoding".to_owned()
    }

    fn edits(&self) -> bool {
        true
    }

    fn layer(&self, _targets: &Targets, _limits: &Limits) -> Box<dyn LayerFilter> {
        Box::new(Self)
    }
}

impl LayerFilter for ForceEncoding {
    fn member(&mut self, member: &mut Member, _keep: &mut Keep) -> Result<Verdict, FilterError> {
        member.force_encoding();
        Ok(Verdict::Keep)
    }

    fn finish(self: Box<Self>) -> Finish {
        Finish::default()
    }
}

pub fn chain(specs: &[&str]) -> FilterChain {
    FilterChain::parse(specs).unwrap()
}

pub fn force_encoding() -> FilterChain {
    FilterChain::new(vec![Arc::new(ForceEncoding)])
}

/// Rewrites with the default limits, starting again as often as the filters ask for it.
pub fn rewrite(chain: &FilterChain, tar: &[u8]) -> Result<(LayerResult, Vec<u8>), LayerError> {
    rewrite_within(chain, tar, &Limits::default()).map(|(result, written, _)| (result, written))
}

/// [`rewrite`] within limits; it also says how many passes there were.
pub fn rewrite_within(
    chain: &FilterChain,
    tar: &[u8],
    limits: &Limits,
) -> Result<(LayerResult, Vec<u8>, usize), LayerError> {
    let directory = tempfile::tempdir().unwrap();
    let mut plan = Plan::default();
    for passes in 1..=1 + Plan::most_restarts(chain) {
        let mut written = Vec::new();
        let spools = SpoolDir::new(directory.path(), u64::MAX);
        let pass = LayerPass::new(chain, Mode::Rewrite, limits, &spools).with_plan(plan);
        match pass.run(tar, &mut written)? {
            PassOutcome::Done(result) => {
                assert_eq!(result.input.digest, Digest::sha256(tar), "every byte of the input is hashed");
                assert_eq!(result.input.size, tar.len() as u64);
                assert_eq!(
                    result.output.digest,
                    Digest::sha256(&written),
                    "the output's digest is of its bytes"
                );
                assert_eq!(result.output.size, written.len() as u64);
                assert!(result.edited || written == tar, "unedited is unchanged");
                assert_eq!(
                    std::fs::read_dir(directory.path()).unwrap().count(),
                    0,
                    "no temporary file has a name"
                );
                return Ok((result, written, passes));
            }
            PassOutcome::NeedsRestart(next) => plan = next,
            PassOutcome::NeedsRewrite { .. } => panic!("only a scan asks for a rewrite"),
        }
    }
    panic!("the filters did not settle");
}

/// The bytes that a chain makes of a tar that must be readable.
pub fn rewritten(specs: &[&str], tar: &[u8]) -> Vec<u8> {
    rewrite(&chain(specs), tar).unwrap().1
}

pub fn observe(chain: &FilterChain, tar: &[u8]) -> Result<LayerResult, LayerError> {
    run(chain, Mode::Observe, tar).map(|outcome| match outcome {
        PassOutcome::Done(result) => result,
        other => panic!("unexpected outcome {other:?}"),
    })
}

pub fn run(chain: &FilterChain, mode: Mode, tar: &[u8]) -> Result<PassOutcome, LayerError> {
    let limits = Limits::default();
    let spools = SpoolDir::new(std::env::temp_dir(), u64::MAX);
    LayerPass::new(chain, mode, &limits, &spools).run(tar, &mut std::io::sink())
}

/// A header block in any dialect, field by field.
#[derive(Clone)]
pub struct Header(pub [u8; BLOCK]);

impl Header {
    pub fn new(name: impl AsRef<[u8]>, flag: u8, size: usize) -> Self {
        let mut header = Self([0; BLOCK]);
        header.0[..name.as_ref().len()].copy_from_slice(name.as_ref());
        header.0[156] = flag;
        header.0[257..265].copy_from_slice(b"ustar\x0000");
        let header = header.put(100, b"0000644\0").put(108, b"0001750\0").put(116, b"0001751\0");
        header.put(124, format!("{size:011o}\0").as_bytes()).put(136, b"14567654321\0")
    }

    /// Sets bytes at an offset, and the checksum.
    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self.seal()
    }

    pub fn link(self, target: &str) -> Self {
        self.put(157, target.as_bytes())
    }

    pub fn gnu(self) -> Self {
        self.put(257, b"ustar  \0")
    }

    fn seal(mut self) -> Self {
        self.0[148..156].fill(b' ');
        let sum: u32 = self.0.iter().map(|&byte| u32::from(byte)).sum();
        self.0[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self
    }
}

/// A tar put together by hand.
#[derive(Clone, Default)]
pub struct Archive(pub Vec<u8>);

impl Archive {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn header(mut self, header: &Header) -> Self {
        self.0.extend_from_slice(&header.0);
        self
    }

    /// Data and its padding.
    pub fn data(mut self, data: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(data.as_ref());
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    pub fn member(self, header: &Header, data: impl AsRef<[u8]>) -> Self {
        self.header(header).data(data)
    }

    pub fn file(self, name: &str, data: impl AsRef<[u8]>) -> Self {
        let size = data.as_ref().len();
        self.member(&Header::new(name, b'0', size), data)
    }

    pub fn directory(self, name: &str) -> Self {
        self.header(&Header::new(name, b'5', 0))
    }

    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.header(&Header::new(name, b'1', 0).link(target))
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.header(&Header::new(name, b'2', 0).link(target))
    }

    /// An extended header with records.
    pub fn pax(self, records: &[(&str, &str)]) -> Self {
        self.extension(b'x', &records_payload(records))
    }

    pub fn global(self, records: &[(&str, &str)]) -> Self {
        self.extension(b'g', &records_payload(records))
    }

    pub fn extension(self, flag: u8, payload: &[u8]) -> Self {
        self.member(&Header::new("././@Extension", flag, payload.len()), payload)
    }

    pub fn gnu_long_name(self, name: &str) -> Self {
        let payload = [name.as_bytes(), b"\0"].concat();
        self.member(&Header::new("././@LongLink", b'L', payload.len()).gnu(), payload)
    }

    /// With the end-of-archive marker.
    pub fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 2 * BLOCK]);
        self.0
    }
}

pub fn records_payload(records: &[(&str, &str)]) -> Vec<u8> {
    records.iter().flat_map(|(key, value)| record(key.as_bytes(), value.as_bytes())).collect()
}

pub fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// One member as Python's `tarfile` reads it.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
pub struct Entry {
    pub name: String,
    pub kind: String,
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub uname: String,
    pub gname: String,
    pub size: i64,
    pub mtime: f64,
    pub link: String,
    pub device: (i64, i64),
    pub pax: serde_json::Map<String, serde_json::Value>,
    pub data: Option<String>,
}

/// Names as `surrogateescape` reads them, with a backslash for what is no UTF-8.
const READ: &str = r#"
import hashlib, json, sys, tarfile
def text(s): return s.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
kinds = {b'1': 'hardlink', b'2': 'symlink', b'3': 'chr', b'4': 'blk', b'5': 'dir', b'6': 'fifo'}
mirrors = ('path', 'linkpath', 'size', 'uid', 'gid', 'uname', 'gname', 'mtime', 'hdrcharset')
def read(path):
    with tarfile.open(path, 'r:', encoding='utf-8', errors='surrogateescape') as tar:
        for m in tar:
            data = None
            if m.isreg() or m.type not in tarfile.SUPPORTED_TYPES:
                digest, file = hashlib.sha256(), tar.extractfile(m)
                while True:
                    piece = file.read(1 << 20)
                    if not piece: break
                    digest.update(piece)
                data = digest.hexdigest()
            kind = 'file' if m.isreg() else kinds.get(m.type, m.type.decode('latin-1'))
            pax = {text(k): text(v) for k, v in m.pax_headers.items() if k not in mirrors and not k.startswith('GNU.sparse.')}
            device = (m.devmajor, m.devminor) if m.type in (b'3', b'4') else (0, 0)
            link = m.linkname if m.type in (b'1', b'2') else ''
            size = m.size if data is not None else 0
            yield dict(name=text(m.name), kind=kind, mode=m.mode, uid=m.uid, gid=m.gid, uname=text(m.uname),
                gname=text(m.gname), size=size, mtime=m.mtime, link=text(link), device=device, pax=pax, data=data)
for path in sys.argv[1:]:
    try: print(json.dumps(dict(Ok=list(read(path)))))
    except Exception as error: print(json.dumps(dict(Err=repr(error))))
"#;

/// What Python's `tarfile` reads; its error, if it cannot.
pub fn python_reads(tar: &[u8]) -> Result<Vec<Entry>, String> {
    python_reads_all(&[tar]).pop().unwrap()
}

/// [`python_reads`] for many archives in one process.
pub fn python_reads_all(tars: &[&[u8]]) -> Vec<Result<Vec<Entry>, String>> {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("python3");
    command.arg("-c").arg(READ);
    for (index, tar) in tars.iter().enumerate() {
        let path = directory.path().join(index.to_string());
        std::fs::write(&path, tar).unwrap();
        command.arg(path);
    }
    let output = command.stderr(Stdio::inherit()).output().expect("python3 runs");
    assert!(output.status.success());
    let lines = output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
}

/// What Python reads of two archives that it can read.
pub fn python_reads_both(before: &[u8], after: &[u8]) -> (Vec<Entry>, Vec<Entry>) {
    let mut entries = python_reads_all(&[before, after]).into_iter().map(Result::unwrap);
    (entries.next().unwrap(), entries.next().unwrap())
}

/// Runs a Python script that writes a tar to `sys.argv[1]`; `tarfile`, `io` and a function `add` are there.
pub fn python_writes(script: &str) -> Vec<u8> {
    const PRELUDE: &str = r#"
import io, os, sys, tarfile
def add(tar, name, data=None, **fields):
    info = tarfile.TarInfo(name)
    for key, value in fields.items(): setattr(info, key, value)
    if data is not None: info.size = len(data)
    tar.addfile(info, io.BytesIO(data) if data is not None else None)
"#;
    let file = tempfile::NamedTempFile::new().unwrap();
    let status = Command::new("python3")
        .arg("-c")
        .arg(format!("{PRELUDE}\n{script}"))
        .arg(file.path())
        .status()
        .expect("python3 runs");
    assert!(status.success(), "the script fails:\n{script}");
    std::fs::read(file.path()).unwrap()
}

/// What GNU tar lists, line by line: type, mode, owner, size, time, name, xattrs. Its error, if it cannot.
pub fn gnu_tar_lists(tar: &[u8]) -> Result<Vec<String>, String> {
    let mut child = Command::new("tar")
        .args(["--list", "--verbose", "--verbose", "--full-time", "--numeric-owner", "--xattrs", "--file=-"])
        .args(["--quoting-style=escape"])
        .env("TZ", "UTC")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("tar runs");
    let mut stdin = child.stdin.take().unwrap();
    let bytes = tar.to_owned();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&bytes);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// Packs a directory with GNU tar. Names that a format cannot hold are left out, as GNU tar does it.
pub fn gnu_tar_packs(directory: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--create", "--sort=name", "--file=-", "--directory"])
        .arg(directory)
        .args(arguments)
        .arg(".")
        .env("TZ", "UTC")
        .output()
        .expect("tar runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || errors.contains("not dumped"), "tar {arguments:?} fails: {errors}");
    output.stdout
}
