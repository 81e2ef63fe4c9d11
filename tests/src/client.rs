//! A client in Python, whose code is generated from the .proto files alone. What it checks by itself is in `client/client.py`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::certificates::text;
use crate::image::json_of;

/// A call in preparation.
#[derive(Debug)]
pub struct Call {
    command: Command,
}

/// Everything that a call has answered.
#[derive(Debug)]
pub struct Answers {
    /// A JSON document for each message, and for an image of many.
    pub messages: Vec<Value>,
    /// How it ended, if not well: `code`, `message` and google.rpc's `details`.
    pub error: Option<Value>,
}

/// A call that is going on. Its process ends with the value.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: BufReader<ChildStdout>,
}

/// The interpreter with grpcio, where `tests/setup` put it.
fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let target = std::env::current_exe().ok().and_then(|test| Some(test.ancestors().nth(3)?.to_owned()));
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let candidates = target.into_iter().chain([repository]);
        let mut found = candidates.map(|target| target.join("test-tools/venv/bin/python"));
        found.find(|path| path.is_file()).expect("a Python with grpcio (tests/setup installs it)")
    })
}

/// What grpcio's tools make of the .proto files.
fn generated() -> &'static Path {
    static GENERATED: OnceLock<TempDir> = OnceLock::new();
    let directory = GENERATED.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let out = text(directory.path());
        let status = Command::new(python())
            .args(["-m", "grpc_tools.protoc", "-I", "."])
            .args([format!("--python_out={out}"), format!("--grpc_python_out={out}")])
            .args(
                ["image", "pipeline", "schedule", "worker", "blob"]
                    .map(|name| format!("occy/v1/{name}.proto")),
            )
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto"))
            .status();
        assert!(status.expect("python runs").success(), "grpcio-tools does not take the .proto files");
        directory
    });
    directory.path()
}

/// A program in `client/`, with what is generated from the .proto files at hand.
pub(crate) fn script(name: &str) -> Command {
    let mut command = Command::new(python());
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("client").join(name))
        .env("PYTHONPATH", generated())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null());
    command
}

impl Call {
    pub(crate) fn new(address: &str, method: &str, request: &Value) -> Self {
        let mut command = script("client.py");
        command.args([address, method, &request.to_string()]);
        Self { command }
    }

    /// With an option of the client's.
    #[must_use]
    pub fn with(mut self, option: &str, value: impl std::fmt::Display) -> Self {
        self.command.arg(format!("--{option}={value}"));
        self
    }

    /// With a switch of the client's.
    #[must_use]
    pub fn switch(mut self, name: &str) -> Self {
        self.command.arg(format!("--{name}"));
        self
    }

    /// Makes the call and waits for its end.
    pub fn run(mut self) -> Answers {
        let output = self.command.output().expect("python runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the client found something wrong:\n{said}");
        let mut messages: Vec<Value> =
            output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(json_of).collect();
        let error = messages.last().and_then(|last| last.get("error")).cloned();
        if error.is_some() {
            messages.pop();
        }
        Answers { messages, error }
    }

    /// Begins the call.
    pub fn start(mut self) -> Running {
        let mut child = self.command.stdout(Stdio::piped()).spawn().expect("python runs");
        let lines = BufReader::new(child.stdout.take().expect("piped above"));
        Running { child, lines }
    }
}

impl Running {
    /// The next message or error, as soon as it is there; None at the end.
    pub fn next_message(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a pipe can be read");
        (!line.is_empty()).then(|| json_of(line.as_bytes()))
    }

    /// The next message that is as wanted.
    pub fn wait_for(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let message = self.next_message().expect("the wanted message comes before the end");
            if wanted(&message) {
                return message;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Answers {
    /// The only message of a call that went well.
    #[track_caller]
    pub fn one(mut self) -> Value {
        assert!(self.error.is_none(), "{:?}", self.error);
        assert_eq!(self.messages.len(), 1, "{:?}", self.messages);
        self.messages.remove(0)
    }

    /// All messages of a call that went well.
    #[track_caller]
    pub fn all(self) -> Vec<Value> {
        assert!(self.error.is_none(), "{:?}", self.error);
        self.messages
    }

    /// The error of a call that failed so.
    #[track_caller]
    pub fn fails(self, code: &str, reason: &str) -> Value {
        let error = self.error.unwrap_or_else(|| panic!("it went well: {:?}", self.messages));
        assert_eq!(error["code"], code, "{error}");
        assert_eq!(error["details"]["ErrorInfo"]["reason"], reason, "{error}");
        let retryable = error["details"].get("RetryInfo").is_some();
        assert_eq!(retryable, matches!(code, "UNAVAILABLE" | "RESOURCE_EXHAUSTED") && reason != "TOO_LARGE");
        error
    }
}
