//! HAProxy between gRPC clients and coordinators, as a mesh's proxies are: it sends each stream to the next server, ends those that
//! are silent for too long, and all of them when it is told to.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long it may take to start.
const LIMIT: Duration = Duration::from_secs(20);

/// The proxy, on a loopback port of its own. It ends with the value.
#[derive(Debug)]
pub struct Mesh {
    child: Child,
    address: SocketAddr,
    servers: usize,
    directory: TempDir,
}

impl Mesh {
    /// Before the servers at these addresses. `idle` is for how long a stream may be silent.
    pub fn before(upstreams: &[&str], idle: Duration) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free loopback port");
        let address = listener.local_addr().expect("a bound address");
        let control = directory.path().join("control");
        let idle = idle.as_millis();
        let mut configuration = format!(
            "global\n stats socket {control} level admin\n\
             defaults\n mode http\n timeout connect 3s\n timeout client {idle}ms\n timeout server {idle}ms\n\
             frontend clients\n bind fd@0 proto h2\n default_backend coordinators\n\
             backend coordinators\n balance roundrobin\n",
            control = control.display(),
        );
        for (number, upstream) in upstreams.iter().enumerate() {
            writeln!(configuration, " server s{number} {upstream} proto h2").expect("a text");
        }
        let file = directory.path().join("haproxy.cfg");
        std::fs::write(&file, configuration).expect("a file");
        let mut command = Command::new("haproxy");
        let log = std::fs::File::create(directory.path().join("log")).expect("a file");
        command.arg("-db").arg("-f").arg(file).stdin(OwnedFd::from(listener));
        let child =
            command.stdout(Stdio::null()).stderr(log).spawn().expect("HAProxy (tests/setup installs it)");
        let mesh = Self { child, address, servers: upstreams.len(), directory };
        let start = Instant::now();
        while UnixStream::connect(mesh.control()).is_err() {
            assert!(start.elapsed() < LIMIT, "HAProxy does not start:\n{}", mesh.log());
            sleep(Duration::from_millis(10));
        }
        mesh
    }

    /// `http://IP:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Ends all streams.
    pub fn cut(&self) {
        for number in 0..self.servers {
            self.tell(&format!("shutdown sessions server coordinators/s{number}"));
        }
    }

    /// How many streams it has sent to each of its servers.
    pub fn streams(&self) -> Vec<u64> {
        let stat = self.tell("show stat");
        let (names, lines) = stat.trim_start_matches("# ").split_once('\n').expect("a table");
        let place = names.split(',').position(|name| name == "stot").expect("a column of sums");
        let is_server = |line: &&str| line.starts_with("coordinators,s");
        let sum = |line: &str| line.split(',').nth(place).and_then(|sum| sum.parse().ok()).expect("a sum");
        lines.lines().filter(is_server).map(sum).collect()
    }

    fn tell(&self, command: &str) -> String {
        let mut control = UnixStream::connect(self.control()).expect("it is there");
        writeln!(control, "{command}").expect("it listens");
        let mut answer = String::new();
        control.read_to_string(&mut answer).expect("it answers");
        answer
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
