//! A coordinator that knows nothing yet, as one of an earlier version: Python's, in `client/older.py`.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use crate::client::script;

/// The coordinator. Its process ends with the value.
#[derive(Debug)]
pub struct Older {
    child: Child,
    address: String,
}

impl Older {
    /// Starts one on a port of its own.
    pub fn start() -> Self {
        let mut command = script("older.py");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python runs");
        let mut address = String::new();
        let stdout = child.stdout.take().expect("piped above");
        BufReader::new(stdout).read_line(&mut address).expect("a pipe can be read");
        assert!(!address.is_empty(), "it does not start (tests/setup installs what it needs)");
        Self { child, address: address.trim().to_owned() }
    }

    /// For `occyctl --coordinator`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Older {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
