//! `occy-server` as a process: started, killed, started again on the same state.

use std::ffi::OsString;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, ExitStatus};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::binary;
use crate::certificates::text;
use crate::client::{Answers, Call};
use crate::disk::SmallDisk;
use crate::network::Node;
use crate::process::{self, Process};

fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| binary::build("occy-server"))
}

/// The program, not started.
pub fn command() -> Command {
    process::command(path())
}

/// A coordinator. Its process ends with the value, and its state too.
#[derive(Debug)]
pub struct Coordinator {
    /// Before the directory, in which its log is looked at when it ends.
    process: Process,
    directory: TempDir,
    /// Where its state is.
    state: PathBuf,
    arguments: Vec<OsString>,
    variables: Vec<(String, OsString)>,
    /// Its own, without a port.
    ip: String,
    address: String,
    /// What it prints, where that is not waited for yet.
    starting: Option<BufReader<ChildStdout>>,
}

impl Coordinator {
    /// With registries on loopback addresses allowed, and these arguments.
    pub fn start(arguments: &[&str]) -> Self {
        let mut all = vec!["--allow-network", "127.0.0.0/8"];
        all.extend(arguments);
        Self::strict(&all, &[])
    }

    /// With nothing allowed but what these arguments and variables allow.
    pub fn strict(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let state = directory.path().join("state");
        Self::in_directories(None, directory, state, arguments, variables)
    }

    /// On a node of a network, with nothing allowed but what these arguments allow.
    pub fn on_node(node: &Node, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let state = directory.path().join("state");
        Self::in_directories(Some(node), directory, state, arguments, &[])
    }

    /// With its state and its temporary files on a disk of its own, registries on loopback addresses allowed, and these arguments.
    pub fn on_disk(disk: &SmallDisk, arguments: &[&str]) -> Self {
        let temporary = text(disk.path());
        let all = [&["--allow-network", "127.0.0.0/8", "--temp-dir", &temporary], arguments].concat();
        let directory = tempfile::tempdir().expect("a temporary directory");
        Self::in_directories(None, directory, disk.path().join("state"), &all, &[])
    }

    fn in_directories(
        node: Option<&Node>,
        directory: TempDir,
        state: PathBuf,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut coordinator = Self {
            process: Process::new(node.cloned(), directory.path().join("log")),
            directory,
            state,
            arguments: arguments.iter().map(OsString::from).collect(),
            variables: variables.iter().map(|(name, value)| ((*name).to_owned(), value.into())).collect(),
            ip: node.map_or("127.0.0.1", Node::ip).to_owned(),
            address: String::new(),
            starting: None,
        };
        coordinator.restart();
        coordinator
    }

    /// Starts it on the state of the one before, on another port.
    pub fn restart(&mut self) {
        self.start_on(&format!("{}:0", self.ip));
    }

    /// Starts it on the state of the one before, where that was.
    pub fn restart_there(&mut self) {
        let address = self.address.clone();
        self.start_on(&address);
    }

    /// The same, without waiting for it: its engine may not be there.
    pub fn begin_there(&mut self) {
        let address = self.address.clone();
        self.begin_on(&address);
    }

    /// Waits for what was begun, if anything was.
    pub fn has_begun(&mut self) {
        if let Some(mut stdout) = self.starting.take() {
            self.address = self.process.says(&mut stdout, "listening on ");
        }
    }

    fn start_on(&mut self, address: &str) {
        self.begin_on(address);
        self.has_begun();
    }

    fn begin_on(&mut self, address: &str) {
        let stdout = self.process.start(path(), |command| {
            command
                .env("HOME", self.directory.path())
                .envs(self.variables.iter().map(|(name, value)| (name, value)))
                .args(["--listen", address, "--state-dir"])
                .arg(&self.state)
                .args(&self.arguments);
        });
        self.starting = Some(stdout);
    }

    /// Where clients connect.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where its state and its log are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// For `occyctl --coordinator`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A call in preparation.
    pub fn call(&self, method: &str, request: &serde_json::Value) -> Call {
        Call::new(&self.address, method, request)
    }

    /// A call that is made, with all that it answers.
    pub fn ask(&self, method: &str, request: &serde_json::Value) -> Answers {
        self.call(method, request).run()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.starting = None;
        self.process.kill();
    }

    /// Sends it a signal: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.process.signal("TERM");
    }

    /// SIGSTOP.
    pub fn pause(&self) {
        self.process.signal("STOP");
    }

    /// SIGCONT.
    pub fn proceed(&self) {
        self.process.signal("CONT");
    }

    /// Waits until it has logged that.
    #[track_caller]
    pub fn wait_for_log(&self, words: &str, limit: Duration) {
        let start = Instant::now();
        while !self.log().contains(words) {
            assert!(start.elapsed() < limit, "it does not say {words:?}:\n{}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    /// Whether it was neither killed nor waited for.
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// Waits until it has ended by itself.
    pub fn ended(&mut self) -> ExitStatus {
        self.process.ended()
    }

    /// The most memory that it has had at once, in bytes.
    pub fn peak_memory(&self) -> u64 {
        peak_memory(self.process.id()).expect("a peak")
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }
}

/// The most memory that a process has had at once, in bytes; None for one that has ended.
pub fn peak_memory(id: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    Some(kib * 1024)
}
