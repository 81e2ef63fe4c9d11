//! `occy-server` as a process: started, killed, started again on the same state.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::binary;
use crate::client::{Answers, Call};
use crate::tools::read;

/// How long it may take to start or to stop.
const LIMIT: Duration = Duration::from_secs(20);

fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| binary::build("occy-server"))
}

/// A coordinator. Its process ends with the value, and its state too.
#[derive(Debug)]
pub struct Coordinator {
    directory: TempDir,
    arguments: Vec<OsString>,
    variables: Vec<(String, OsString)>,
    child: Option<Child>,
    address: String,
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
        let mut coordinator = Self {
            directory: tempfile::tempdir().expect("a temporary directory"),
            arguments: arguments.iter().map(OsString::from).collect(),
            variables: variables.iter().map(|(name, value)| ((*name).to_owned(), value.into())).collect(),
            child: None,
            address: String::new(),
        };
        coordinator.restart();
        coordinator
    }

    /// Starts it on the state of the one before, on another port.
    pub fn restart(&mut self) {
        self.start_on("127.0.0.1:0");
    }

    /// Starts it on the state of the one before, where that was.
    pub fn restart_there(&mut self) {
        let address = self.address.clone();
        self.start_on(&address);
    }

    fn start_on(&mut self, address: &str) {
        assert!(self.child.is_none(), "it is running");
        let log = std::fs::File::options().create(true).append(true).open(self.log_path());
        // Whoever runs the tests in the background ignores signals, and what is started from there would too.
        let mut command = Command::new("env");
        command.arg("--default-signal=HUP,INT,TERM").arg(path());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("RUST_BACKTRACE", "1").env("HOME", self.directory.path());
        let mut child = command
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .args(["--listen", address, "--state-dir"])
            .arg(self.directory.path().join("state"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.expect("a log file"))
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", path().display()));
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped above");
        BufReader::new(stdout).read_line(&mut line).expect("a pipe can be read");
        self.child = Some(child);
        let address = line.trim().strip_prefix("listening on ");
        self.address = address.unwrap_or_else(|| panic!("it does not start:\n{}", self.log())).to_owned();
    }

    /// Where clients connect.
    pub fn address(&self) -> &str {
        &self.address
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
        let mut child = self.child.take().expect("it is running");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        let id = self.child.as_ref().expect("it is running").id().to_string();
        crate::tools::tool("kill", ["-TERM", &id]);
    }

    /// Waits until it has ended by itself.
    pub fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("it is running");
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("a child can be asked") {
                return status;
            }
            if start.elapsed() > LIMIT {
                drop(child.kill());
                drop(child.wait());
                panic!("it does not end:\n{}", self.log());
            }
            sleep(Duration::from_millis(5));
        }
    }

    /// The most memory that it has had at once, in bytes.
    pub fn peak_memory(&self) -> u64 {
        peak_memory(self.child.as_ref().expect("it is running").id()).expect("a peak")
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&read(self.log_path())).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

/// The most memory that a process has had at once, in bytes; None for one that has ended.
pub fn peak_memory(id: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    Some(kib * 1024)
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
        if std::thread::panicking() {
            eprintln!("--- the coordinator's log:\n{}", self.log());
        } else {
            assert!(!self.log().contains("panicked"), "{}", self.log());
        }
    }
}
