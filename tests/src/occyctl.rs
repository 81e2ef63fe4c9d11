//! The binary under test: built once, run in a clean environment, never longer than a minute.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::binary;
use crate::coordinator::Coordinator;
use crate::image::json_of;

const LIMIT: Duration = Duration::from_secs(60);

/// The binary's path.
pub fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| binary::build("occyctl"))
}

/// How often a test kills a run: more often in `tests/soak/run`, which sets `OCCY_TEST_KILLS`.
pub fn kills() -> u32 {
    let wanted = std::env::var("OCCY_TEST_KILLS").ok();
    wanted.map_or(10, |kills| kills.parse().expect("OCCY_TEST_KILLS is a number"))
}

/// How long a run takes that is not killed, without the building of the binary.
pub fn whole<T>(run: impl FnOnce() -> T) -> Duration {
    path();
    let start = Instant::now();
    run();
    start.elapsed()
}

/// A part of `whole` for the kill with that number: moments all over it, the next one always far from the last.
pub fn moment(whole: Duration, kill: u32) -> Duration {
    whole.mul_f64((f64::from(kill) * 0.618_034).fract())
}

/// A run in preparation.
#[derive(Debug)]
pub struct Run {
    command: Command,
    input: Vec<u8>,
    what: String,
    /// Whether a coordinator of the kit's is to do it.
    is_shared: bool,
    /// How long it may run.
    limit: Duration,
}

/// Prepares to run `occyctl` with the arguments: in its own process, or, where `OCCY_TEST_COORDINATOR` is set and they are of a
/// command that a coordinator can do, by a coordinator that starts for this test. What only one's own process can do, what speaks
/// to registries in one's own way, stays there.
pub fn occyctl<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Run {
    let arguments: Vec<_> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
    let is_shared = arguments.first().is_some_and(|command| {
        ["process", "search", "info", "check", "copy", "verify", "ls", "tags", "digest", "delete"]
            .iter()
            .any(|shared| command == *shared)
    });
    let is_own = |argument: &OsString| {
        let name = argument.to_string_lossy();
        let name = name.strip_prefix("--");
        OWN.iter().any(|own| name.is_some_and(|name| name.starts_with(own)))
    };
    let run = locally(&arguments);
    match std::env::var_os("OCCY_TEST_COORDINATOR") {
        Some(_) if is_shared && !arguments.iter().any(is_own) => {
            let url = COORDINATOR.with(Coordinator::url);
            Run { is_shared: true, ..run.env("OCCYSTRAP_COORDINATOR", url) }
        }
        _ => run,
    }
}

/// Options, and variables in capitals, that a coordinator has no use for.
const OWN: [&str; 11] = [
    "username",
    "password",
    "source-",
    "destination-",
    "docker-config",
    "insecure",
    "ca-cert",
    "client-",
    "allow-network",
    "retries",
    "temp-dir",
];

thread_local! {
    /// One for each test, which has a thread of its own; it ends with it.
    static COORDINATOR: Coordinator = Coordinator::start(&["--allow-network", "::1"]);
}

/// Prepares to run `occyctl` with the arguments, in its own process unless they say otherwise. No setting of the user's, of
/// docker or of a proxy reaches it.
pub fn locally<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Run {
    // Whoever runs the tests in the background ignores signals, and what is started from there would too.
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP,INT,TERM").arg(path()).args(arguments);
    command.env_clear().stdin(Stdio::null());
    for kept in ["PATH", "TMPDIR", "LLVM_PROFILE_FILE"] {
        if let Some(value) = std::env::var_os(kept) {
            command.env(kept, value);
        }
    }
    command.env("HOME", "/nonexistent").env("RUST_BACKTRACE", "1");
    let what = format!("{command:?}").split("occyctl").skip(1).collect::<Vec<_>>().join("occyctl");
    Run { command, input: Vec::new(), what: format!("occyctl {what}"), is_shared: false, limit: LIMIT }
}

impl Run {
    /// With a variable in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let option = name.trim_start_matches("OCCYSTRAP_").to_lowercase().replace('_', "-");
        let is_own = OWN.iter().any(|own| option.starts_with(own))
            || name == "DOCKER_CONFIG"
            || name.ends_with("_PROXY");
        if self.is_shared && is_own {
            self.command.env_remove("OCCYSTRAP_COORDINATOR");
        }
        self.command.env(name, value);
        self
    }

    /// It may run for so long.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// In its own process in any case: for what is said or done there only.
    #[must_use]
    pub fn here(mut self) -> Self {
        self.command.env_remove("OCCYSTRAP_COORDINATOR");
        self
    }

    /// In a directory.
    #[must_use]
    pub fn directory(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// With bytes on its standard input.
    #[must_use]
    pub fn input(mut self, bytes: &[u8]) -> Self {
        self.input = bytes.to_vec();
        self.command.stdin(Stdio::piped());
        self
    }

    /// Starts it, for a test that means to kill it. Its output goes nowhere.
    pub fn start(self) -> Child {
        self.start_writing(Stdio::null())
    }

    /// Starts it with that standard output, for a test that reads it in its own way.
    pub fn start_writing(mut self, stdout: Stdio) -> Child {
        self.command.stdout(stdout).stderr(Stdio::null()).spawn().expect("occyctl starts")
    }

    /// Starts it with its messages in a pipe, for a test that means to stop it.
    pub fn start_saying(mut self) -> Child {
        self.command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("occyctl starts")
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Ended {
        let child = self.command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{}: {error}", path().display()));
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let input = std::mem::take(&mut self.input);
        let (status, stdout, stderr) = thread::scope(|scope| {
            // A run that fails early may leave its input unread.
            scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
            let stdout = scope.spawn(move || drain(stdout.expect("piped above")));
            let stderr = scope.spawn(move || drain(stderr.expect("piped above")));
            let status = wait(&mut child, self.limit);
            (status, stdout.join().expect("a reader"), stderr.join().expect("a reader"))
        });
        let stderr = String::from_utf8(stderr).expect("messages are UTF-8");
        let status =
            status.unwrap_or_else(|| panic!("{} ran for over {:?}: {stderr}", self.what, self.limit));
        Ended { what: self.what, status, stdout, stderr }
    }

    /// Runs it and expects success.
    #[track_caller]
    pub fn ok(self) -> Ended {
        let ended = self.run();
        assert!(ended.status.success(), "{}\nended with {}\n{}", ended.what, ended.status, ended.stderr);
        ended
    }

    /// Runs it and expects the exit code of a failure, and no panic.
    #[track_caller]
    pub fn fails(self, code: i32) -> Ended {
        let ended = self.run();
        assert_eq!(ended.status.code(), Some(code), "{}\n{}\n{}", ended.what, ended.text(), ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{}\n{}", ended.what, ended.stderr);
        ended
    }
}

fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be asked") {
            return Some(status);
        }
        if start.elapsed() > limit {
            drop(child.kill());
            drop(child.wait());
            return None;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn drain(mut reader: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).expect("a pipe can be read");
    bytes
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ended {
    /// The command line.
    pub what: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Results.
    pub stdout: Vec<u8>,
    /// Everything else.
    pub stderr: String,
}

impl Ended {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output as JSON.
    pub fn json(&self) -> Value {
        json_of(&self.stdout)
    }

    /// Expects every part in what was said on standard error.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "{}\ndoes not say {part:?} but:\n{}", self.what, self.stderr);
        }
        self
    }

    /// Expects that a secret is nowhere in what was said.
    #[track_caller]
    pub fn keeps(self, secret: &str) -> Self {
        let said = format!("{}{}", self.text(), self.stderr);
        assert!(!said.contains(secret), "{} tells the secret {secret:?}:\n{said}", self.what);
        self
    }
}
