//! Container engines: the Docker Engine of this machine, a Podman service of the test's own, and a false Engine that answers
//! as the test tells it.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::certificates::{Certificates, text};
use crate::http::{Request, Response};
use crate::image::{Image, json_of};
use crate::layer::{Member, tar};
use crate::saved::{self, Saved, read_saved};
use crate::server::Server;
use crate::tools::{is_installed, run, write};

/// An engine that answers, and the images that a test has put there, which go with the value.
#[derive(Debug)]
pub struct Engine {
    kind: Kind,
    socket: PathBuf,
    names: Vec<String>,
    /// Of all images that had one of the names, for they lose it to later ones and stay.
    ids: Mutex<BTreeSet<String>>,
}

#[derive(Debug)]
enum Kind {
    Docker,
    Podman { service: Child, directory: TempDir },
}

impl Engine {
    /// Every engine that can be had. Where there is none, the test is not run, which CI does not accept.
    pub fn all(test: &str) -> Vec<Self> {
        Self::docker(test).into_iter().chain(Self::podman(test)).collect()
    }

    /// The Docker Engine of this machine.
    pub fn docker(test: &str) -> Option<Self> {
        let host = std::env::var("DOCKER_HOST").unwrap_or_else(|_| "unix:///var/run/docker.sock".to_owned());
        let found = is_installed("docker") && run("docker", ["info"], b"").status.success();
        let socket = host.strip_prefix("unix://").map(PathBuf::from).filter(|_| found);
        if socket.is_none() {
            not_run(test, "no Docker Engine at a socket");
        }
        Some(Self::new(Kind::Docker, socket?))
    }

    /// A Podman service with a storage of its own.
    pub fn podman(test: &str) -> Option<Self> {
        if !is_installed("podman") {
            not_run(test, "no podman");
            return None;
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let socket = directory.path().join("podman.sock");
        let service = podman(directory.path())
            .args(["system", "service", "--time", "0", &format!("unix://{}", text(&socket))])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("podman starts");
        let engine = Self::new(Kind::Podman { service, directory }, socket);
        let start = Instant::now();
        while !engine.socket.exists() {
            assert!(start.elapsed() < Duration::from_secs(30), "podman's service does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(engine)
    }

    fn new(kind: Kind, socket: PathBuf) -> Self {
        Self { kind, socket, names: Vec::new(), ids: Mutex::default() }
    }

    /// Whether it is Podman.
    pub fn is_podman(&self) -> bool {
        matches!(self.kind, Kind::Podman { .. })
    }

    /// The engine's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A name of an image that nobody else uses; whatever gets it is removed with the value.
    pub fn name(&mut self, stem: &str) -> String {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("localhost/occy-test-{stem}-{}-{number}:1", std::process::id());
        self.names.push(name.clone());
        name
    }

    /// `docker://NAME` of this engine.
    pub fn uri(&self, name: &str) -> String {
        format!("docker://{name}?socket={}", text(&self.socket))
    }

    /// Runs the engine's own client, whatever comes of it.
    pub fn try_client<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Output {
        let mut command = match &self.kind {
            Kind::Docker => {
                let mut docker = Command::new("docker");
                docker.args(["--host", &format!("unix://{}", text(&self.socket))]);
                docker
            }
            Kind::Podman { directory, .. } => podman(directory.path()),
        };
        command.args(arguments).stdin(Stdio::null()).output().expect("the client starts")
    }

    /// Runs the engine's own client and expects success.
    #[track_caller]
    pub fn client<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> String {
        let output = self.try_client(arguments);
        assert!(output.status.success(), "{:?}: {}", self.kind, String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Loads an image by the engine's own client, under a name of its own.
    #[track_caller]
    pub fn load(&mut self, image: &Image, stem: &str) -> String {
        let name = self.name(stem);
        self.load_as(image, &name);
        name
    }

    /// The same under a name that there is already.
    #[track_caller]
    pub fn load_as(&mut self, image: &Image, name: &str) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image.tar");
        write(&path, tar(&saved::docker_v12(&[(image, &[name])])));
        self.client(["load", "--quiet", "--input", &text(&path)]);
        self.ids.lock().expect("nobody panics with it").insert(image.config_digest());
    }

    /// What the engine's own client says of an image.
    #[track_caller]
    pub fn inspect(&self, name: &str) -> Value {
        json_of(self.client(["image", "inspect", name]).as_bytes())[0].clone()
    }

    /// The digest of an image's config, as its Id has it; None where there is no such image.
    pub fn id(&self, name: &str) -> Option<String> {
        let output = self.try_client(["image", "inspect", "--format", "{{.Id}}", name]);
        let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let id = output.status.success().then(|| format!("sha256:{}", id.trim_start_matches("sha256:")));
        self.ids.lock().expect("nobody panics with it").extend(id.clone());
        id
    }

    /// An image as the engine's own client saves it.
    #[track_caller]
    pub fn save(&self, name: &str) -> Saved {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("saved.tar");
        self.client(["save", "--output", &text(&path), name]);
        read_saved(&path)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for name in &self.names {
            // Whether it is there is not what the test is about.
            drop(self.try_client(["image", "rm", "--force", name]));
        }
        let ids = self.ids.lock().map(|ids| ids.clone()).unwrap_or_default();
        for id in ids {
            // An image of the same content that another test has loaded has a name.
            let tags = self.try_client(["image", "inspect", "--format", "{{len .RepoTags}}", &id]).stdout;
            if String::from_utf8_lossy(&tags).trim() == "0" {
                drop(self.try_client(["image", "rm", &id]));
            }
        }
        if let Kind::Podman { service, .. } = &mut self.kind {
            drop(service.kill());
            drop(service.wait());
        }
    }
}

fn podman(directory: &Path) -> Command {
    let mut podman = Command::new("podman");
    for (option, name) in [("--root", "root"), ("--runroot", "run")] {
        podman.arg(option).arg(directory.join(name));
    }
    podman.args(["--storage-driver", "vfs"]);
    podman
}

fn not_run(test: &str, why: &str) {
    eprintln!("NOT RUN: {test}: {why}");
    assert!(std::env::var_os("CI").is_none(), "CI must not skip {test}");
}

/// What a false Engine keeps images in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Docker's own before version 25, Docker's own since then.
    Unpacked,
    /// Containerd's.
    Containerd,
}

/// A false Engine at a loopback port, for exports of every form and for answers that no real one gives at will.
#[derive(Debug)]
pub struct FalseEngine {
    server: Server,
}

/// What a false Engine answers where it matters.
#[derive(Clone, Debug)]
pub struct Answers {
    /// To `GET /images/NAME/json`.
    pub inspected: Response,
    /// To `GET /images/NAME/get`.
    pub export: Response,
    /// To `POST /images/load`.
    pub load: Response,
    /// In `GET /info`.
    pub store: Store,
}

impl Answers {
    /// Those of an Engine that has `image` and exports it as these members.
    pub fn of(image: &Image, store: Store, members: &[Member]) -> Self {
        // In containerd's store the Id is a manifest's.
        let id = if store == Store::Containerd { image.digest() } else { image.config_digest() };
        let inspected = json!({"Id": id, "RepoTags": ["app:1"], "Architecture": "amd64", "Os": "linux",
            "RootFS": {"Type": "layers", "Layers": image.diff_ids()}});
        Self {
            inspected: Response::ok("application/json", inspected.to_string()),
            export: Response::ok("application/x-tar", tar(members)),
            load: Response::ok("application/json", "{\"stream\":\"Loaded image: app:1\\n\"}\r\n"),
            store,
        }
    }

    /// The same with another export.
    #[must_use]
    pub fn exporting(self, change: impl FnOnce(Response) -> Response) -> Self {
        Self { export: change(self.export), ..self }
    }
}

impl FalseEngine {
    /// Starts to answer.
    pub fn start(answers: Answers) -> Self {
        let server = Server::start(move |request: &Request| {
            let path = request.path.split('?').next().unwrap_or_default();
            match (request.method.as_str(), path) {
                ("GET", "/_ping") => Response::ok("text/plain", "OK"),
                ("GET", "/info") => {
                    let status = match answers.store {
                        Store::Unpacked => json!([["Backing Filesystem", "extfs"]]),
                        Store::Containerd => json!([["driver-type", "io.containerd.snapshotter.v1"]]),
                    };
                    Response::ok("application/json", json!({"DriverStatus": status}).to_string())
                }
                ("GET", path) if path.ends_with("/json") => answers.inspected.clone(),
                ("GET", path) if path.ends_with("/get") => answers.export.clone(),
                ("POST", "/images/load") => answers.load.clone(),
                _ => Response::ok("application/json", r#"{"message":"page not found"}"#).status_of(404),
            }
        });
        Self { server }
    }

    /// For `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("tcp://{}", self.server.host())
    }

    /// The port, for a server that stands before it.
    pub fn port(&self) -> u16 {
        self.server.port()
    }

    /// How many requests so far fit.
    pub fn count(&self, method: &str, pattern: &str) -> usize {
        self.server.count(method, pattern)
    }
}

/// A server with TLS before one without, which wants a client certificate; ends with the value.
#[derive(Debug)]
pub struct TlsFront {
    process: Child,
    port: u16,
}

impl TlsFront {
    /// Before the server at `port` of this machine, with the certificates of this test run.
    pub fn before(port: u16) -> Self {
        let path = |name: &str| text(&Certificates::shared().path(name));
        let mut process = Command::new("python3")
            .args([
                "-c",
                TLS_FRONT,
                &path("ca.crt"),
                &path("server.crt"),
                &path("server.key"),
                &port.to_string(),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3 starts");
        let mut line = String::new();
        let stdout = process.stdout.take().expect("piped above");
        BufReader::new(stdout).read_line(&mut line).expect("a port");
        Self { process, port: line.trim().parse().expect("a port") }
    }

    /// The port with TLS.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

const TLS_FRONT: &str = r#"
import select, socket, ssl, sys, threading
ca, certificate, key, port = sys.argv[1:]
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
context.load_cert_chain(certificate, key)
context.verify_mode = ssl.CERT_REQUIRED
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def serve(connection):
    try:
        outer = context.wrap_socket(connection, server_side=True)
        inner = socket.create_connection(("127.0.0.1", int(port)))
        while True:
            for ready in [outer] if outer.pending() else select.select([outer, inner], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                (inner if ready is outer else outer).sendall(data)
    except OSError:
        pass
    finally:
        connection.close()
while True:
    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
"#;
