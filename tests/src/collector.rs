//! A collector of spans that is not ours: Python's, in `client/collector.py`.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Stdio};

use serde_json::Value;

use crate::client::script;
use crate::image::json_of;

/// A collector. Its process ends with the value.
#[derive(Debug)]
pub struct Collector {
    child: Child,
    lines: BufReader<ChildStdout>,
    endpoint: String,
}

impl Collector {
    /// Starts one on a port of its own.
    pub fn start() -> Self {
        let mut command = script("collector.py");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped above"));
        let mut address = String::new();
        lines.read_line(&mut address).expect("a pipe can be read");
        assert!(!address.is_empty(), "the collector does not start (tests/setup installs what it needs)");
        Self { child, lines, endpoint: format!("http://{}", address.trim()) }
    }

    /// Where spans are sent.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// All spans so far, in the order in which they came. What is to be seen must have ended.
    pub fn spans(mut self) -> Vec<Value> {
        drop(self.child.stdin.take());
        let lines = self.lines.by_ref().lines().map(|line| line.expect("a pipe can be read"));
        lines.map(|line| json_of(line.as_bytes())).collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
