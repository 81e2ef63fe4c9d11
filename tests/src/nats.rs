//! Real NATS servers with JetStream.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::network::Node;
use crate::tools::tool;

/// How long it may take to start.
const LIMIT: Duration = Duration::from_secs(20);

/// The server, where `tests/setup` put it.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let target = std::env::current_exe().ok().and_then(|test| Some(test.ancestors().nth(3)?.to_owned()));
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let candidates = target.into_iter().chain([repository]);
        let mut found = candidates.map(|target| target.join("test-tools/venv/bin/nats-server"));
        found.find(|path| path.is_file()).expect("a NATS server (tests/setup installs it)")
    })
}

/// A server on a loopback port of its own. It ends with the value, and what it kept too.
#[derive(Debug)]
pub struct Nats {
    child: Child,
    address: String,
    directory: TempDir,
    node: Option<Node>,
}

impl Nats {
    /// With JetStream.
    pub fn start() -> Self {
        Self::with("")
    }

    /// With JetStream, and more lines in its configuration.
    pub fn with(configuration: &str) -> Self {
        let directory = configured(configuration);
        let (child, address) = run(directory.path(), None, "-1");
        Self { child, address, directory, node: None }
    }

    /// As many servers as there are nodes, which are one cluster. Each has the engine's usual port.
    pub fn cluster(nodes: &[Node]) -> Vec<Self> {
        let routes: Vec<_> = nodes.iter().map(|node| format!("nats://{}:6222", node.ip())).collect();
        let start = |(number, node): (usize, &Node)| {
            let directory = configured(&format!(
                "server_name: n{number}\ncluster {{ name: tests, listen: \"{}:6222\", routes: {routes:?} }}\n",
                node.ip()
            ));
            let (child, address) = run(directory.path(), Some(node), "4222");
            Self { child, address, directory, node: Some(node.clone()) }
        };
        nodes.iter().enumerate().map(start).collect()
    }

    /// Sends it a signal: `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        tool("kill", [format!("-{name}"), self.child.id().to_string()]);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Starts it where it was, with what it had kept.
    pub fn restart(&mut self) {
        let (_, port) = self.address.rsplit_once(':').expect("an address");
        let (child, address) = run(self.directory.path(), self.node.as_ref(), port);
        assert_eq!(address, self.address);
        self.child = child;
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// For `occy-server --engine`.
    pub fn url(&self) -> String {
        format!("jetstream://{}", self.address)
    }
}

/// A directory with a configuration.
fn configured(more: &str) -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let store = directory.path().join("store");
    let own = format!("jetstream {{ store_dir: {:?} }}\n", store.display().to_string());
    std::fs::write(directory.path().join("nats.conf"), own + more).expect("a file");
    directory
}

/// A server with the configuration that is in a directory, and its address.
fn run(directory: &Path, node: Option<&Node>, port: &str) -> (Child, String) {
    let path = program().to_str().expect("a path in UTF-8");
    let mut command = node.map_or_else(|| Command::new(path), |node| node.command(path));
    let ip = node.map_or("127.0.0.1", Node::ip);
    command.args(["--addr", ip, "--port", port, "--config"]).arg(directory.join("nats.conf"));
    command.arg("--ports_file_dir").arg(directory).arg("--log").arg(directory.join("log"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("a NATS server starts");
    let ports = directory.join(format!("nats-server_{}.ports", child.id()));
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        sleep(Duration::from_millis(10));
        let text = std::fs::read_to_string(&ports).unwrap_or_default();
        let ports: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        if let Some(url) = ports["nats"][0].as_str() {
            return (child, url.split_once("://").map_or(url, |(_, address)| address).to_owned());
        }
    }
    drop(child.kill());
    drop(child.wait());
    panic!("NATS does not start:\n{}", std::fs::read_to_string(directory.join("log")).unwrap_or_default());
}

impl Drop for Nats {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
