//! Command-line tools: started, fed, waited for, and believed only when they exit with 0.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use sha2::{Digest as _, Sha256};

/// `sha256:…` of bytes.
pub fn sha256(bytes: &[u8]) -> String {
    let mut text = "sha256:".to_owned();
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").expect("a string takes everything");
    }
    text
}

/// The hex part of a digest.
pub fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").expect("a sha256 digest")
}

/// Runs a tool with bytes on its standard input and gives its standard output. Panics when it fails.
pub fn pipe<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>, input: &[u8]) -> Vec<u8> {
    let output = run(program, arguments, input);
    assert!(
        output.status.success(),
        "{program}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Runs a tool and gives its standard output as text. Panics when it fails.
pub fn tool<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> String {
    String::from_utf8(pipe(program, arguments, b"")).expect("the tool writes UTF-8")
}

/// Runs a tool, whatever comes of it.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>, input: &[u8]) -> Output {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error} (tests/setup installs what the tests need)"));
    let mut stdin = child.stdin.take().expect("piped above");
    std::thread::scope(|scope| {
        // A tool that has seen enough may close its input: that is its business.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().expect("a child can be waited for")
    })
}

/// What makes a tar smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Nothing.
    Plain,
    /// One gzip member.
    Gzip,
    /// Two gzip members with a cut in the middle, as eStargz has many.
    GzipMembers,
    /// One zstd frame.
    Zstd,
    /// Two zstd frames behind a skippable one.
    ZstdFrames,
    /// xz, which only whole files are packed with.
    Xz,
    /// bzip2, likewise.
    Bzip2,
}

impl Packing {
    /// Packs with the command-line tool.
    pub fn pack(self, bytes: &[u8]) -> Vec<u8> {
        let (left, right) = bytes.split_at(bytes.len() / 2);
        match self {
            Self::Plain => bytes.to_vec(),
            Self::Gzip => pipe("gzip", ["-nc"], bytes),
            Self::GzipMembers => [Self::Gzip.pack(left), Self::Gzip.pack(right)].concat(),
            Self::Zstd => pipe("zstd", ["-qc"], bytes),
            Self::ZstdFrames => {
                let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, b'a', b'b', b'c'];
                [&skippable[..], &Self::Zstd.pack(left), &Self::Zstd.pack(right)].concat()
            }
            Self::Xz => pipe("xz", ["-c"], bytes),
            Self::Bzip2 => pipe("bzip2", ["-c"], bytes),
        }
    }
}

/// Unpacks with the command-line tool that the first bytes call for; gzip and zstd read all members and frames.
pub fn unpack(bytes: &[u8]) -> Vec<u8> {
    match bytes {
        [0x1f, 0x8b, ..] => pipe("gzip", ["-dc"], bytes),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => pipe("zstd", ["-qdc"], bytes),
        _ => bytes.to_vec(),
    }
}

/// Whether the tool is there at all.
pub fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Reads a file or says which one could not be.
pub fn read(path: impl AsRef<Path>) -> Vec<u8> {
    let path = path.as_ref();
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Writes a file or says which one could not be.
pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
    let path = path.as_ref();
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).unwrap_or_else(|error| panic!("{}: {error}", parent.display()));
    }
    std::fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
