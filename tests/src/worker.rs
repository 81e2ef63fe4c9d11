//! `occy-worker` as a process; and a worker in Python, written from the .proto files alone, in `client/worker.py`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, ExitStatus, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::binary;
use crate::client::script;
use crate::coordinator::Coordinator;
use crate::image::json_of;
use crate::network::Node;
use crate::process::{self, Process};

fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| binary::build("occy-worker"))
}

/// A worker. Its process ends with the value.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    stdout: BufReader<ChildStdout>,
    name: String,
    _directory: TempDir,
}

impl Worker {
    /// One that reaches registries on loopback addresses, with these arguments. It is registered when this returns.
    #[track_caller]
    pub fn start(coordinator: &Coordinator, arguments: &[&str]) -> Self {
        let url = format!("http://{}", coordinator.address());
        Self::at(&url, arguments)
    }

    /// The same, of the coordinator with this URL.
    #[track_caller]
    pub fn at(url: &str, arguments: &[&str]) -> Self {
        let mut worker = Self::begin(url, arguments);
        worker.registers_again();
        worker
    }

    /// The same, of one that is not waited for: its coordinator may not be there.
    pub fn begin(url: &str, arguments: &[&str]) -> Self {
        Self::begin_on(None, url, &[&["--allow-network", "127.0.0.0/8"], arguments].concat())
    }

    /// The same, on a node of a network if one is named, and with these arguments alone.
    pub fn begin_on(node: Option<&Node>, url: &str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut process = Process::new(node.cloned(), directory.path().join("log"));
        let stdout = process.start(path(), |command| {
            command.env("HOME", directory.path()).args(["--coordinator", url]).args(arguments);
        });
        Self { process, stdout, name: String::new(), _directory: directory }
    }

    /// What its coordinator calls it; empty before it has called it so.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until it has registered once more.
    #[track_caller]
    pub fn registers_again(&mut self) {
        self.name = self.process.says(&mut self.stdout, "registered as ");
    }

    /// Whether it was neither killed nor waited for.
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends it a signal: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        self.process.ended()
    }

    /// Whether these bytes are anywhere in what it holds in its memory.
    pub fn remembers(&self, secret: &str) -> bool {
        process::remembers(self.process.id(), secret)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }
}

/// A worker in Python, which has the filter `shout`: it writes the content of files in capitals. Its process ends with the value.
#[derive(Debug)]
pub struct PythonWorker {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl PythonWorker {
    /// Registered with these options.
    #[track_caller]
    pub fn start(coordinator: &Coordinator, options: &[&str]) -> Self {
        let mut command = script("worker.py");
        command.arg(coordinator.address()).args(options);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("python runs");
        let lines = BufReader::new(child.stdout.take().expect("piped above"));
        let mut worker = Self { child, lines };
        worker.wait_for("welcome");
        worker
    }

    /// The next thing that it tells under this key.
    #[track_caller]
    pub fn wait_for(&mut self, key: &str) -> Value {
        loop {
            let mut line = String::new();
            self.lines.read_line(&mut line).expect("a pipe can be read");
            assert!(!line.is_empty(), "the Python worker has ended before {key}");
            if let Some(value) = json_of(line.as_bytes()).get(key) {
                return value.clone();
            }
        }
    }
}

impl Drop for PythonWorker {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
