//! A server of the product as a process: started, signalled, waited for.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::network::Node;
use crate::tools::{read, tool};

/// How long it may take to start or to stop.
const LIMIT: Duration = Duration::from_secs(20);

/// A program with default signals and no environment: who runs the tests in the background ignores signals, and what is started
/// from there would too.
pub(crate) fn command(program: &Path) -> Command {
    command_on(None, program)
}

/// The same, on a node of a network.
fn command_on(node: Option<&Node>, program: &Path) -> Command {
    let mut command = node.map_or_else(|| Command::new("env"), |node| node.command("env"));
    command.arg("--default-signal=HUP,INT,TERM").arg(program);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// A process that logs into a file. It ends with the value.
#[derive(Debug)]
pub(crate) struct Process {
    child: Option<Child>,
    log: PathBuf,
    node: Option<Node>,
}

impl Process {
    /// Nothing yet, that will log there; on a node of a network if one is named.
    pub(crate) fn new(node: Option<Node>, log: PathBuf) -> Self {
        Self { child: None, log, node }
    }

    /// Starts a program with default signals and no environment but what `configure` gives it. What it prints is returned.
    pub(crate) fn start(
        &mut self,
        program: &Path,
        configure: impl FnOnce(&mut Command),
    ) -> BufReader<ChildStdout> {
        assert!(self.child.is_none(), "it is running");
        let log = std::fs::File::options().create(true).append(true).open(&self.log);
        let mut command = command_on(self.node.as_ref(), program);
        command.env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log.expect("a log file"));
        configure(&mut command);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let stdout = child.stdout.take().expect("piped above");
        self.child = Some(child);
        BufReader::new(stdout)
    }

    /// What follows `prefix` in the next line that it prints.
    #[track_caller]
    pub(crate) fn says(&self, stdout: &mut impl BufRead, prefix: &str) -> String {
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a pipe can be read");
        let rest = line.trim().strip_prefix(prefix);
        rest.unwrap_or_else(|| panic!("it does not start:\n{}", self.log())).to_owned()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it is running");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// Sends it a signal: `TERM`, `STOP`, `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        tool("kill", [format!("-{name}"), self.id().to_string()]);
    }

    /// Whether it was neither killed nor waited for.
    pub(crate) fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Its id.
    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().expect("it is running").id()
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub(crate) fn ended(&mut self) -> ExitStatus {
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

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&read(&self.log)).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
        if std::thread::panicking() {
            eprintln!("--- the log in {}:\n{}", self.log.display(), self.log());
        } else {
            assert!(!self.log().contains("panicked"), "{}", self.log());
        }
    }
}

/// Whether these bytes are anywhere in what a child process holds in its memory.
///
/// Its program's file and whatever else it has mapped to read only is left out.
pub(crate) fn remembers(id: u32, secret: &str) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{id}/maps")).expect("it is running");
    let memory = std::fs::File::open(format!("/proc/{id}/mem")).expect("a parent may read its child");
    maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with("rw"))).any(
        |line| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
            let [from, to] =
                [range.0, range.1].map(|text| u64::from_str_radix(text, 16).expect("an address"));
            let mut bytes = vec![0; usize::try_from(to - from).expect("it fits")];
            // What is not readable after all, as a guard page, holds nothing.
            memory.read_exact_at(&mut bytes, from).is_ok()
                && bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
        },
    )
}
