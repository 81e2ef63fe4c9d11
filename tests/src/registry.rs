//! Debian's `docker-registry` on a loopback port, with its storage in a temporary directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::certificates::Certificates;
use crate::http::{Request, Response};
use crate::image::{Image, Index, json_of};
use crate::network::Node;
use crate::token::{ISSUER, SERVICE, TokenServer, basic_header, mint};
use crate::tools::{hex, pipe, read, sha256, tool, unpack, write};

/// How a registry is to be set up.
#[derive(Clone, Copy, Default)]
pub struct Setup<'a> {
    /// Basic authentication: user and password.
    pub htpasswd: Option<(&'a str, &'a str)>,
    /// Token authentication.
    pub token: Option<&'a TokenServer>,
    /// HTTPS with the test run's certificates.
    pub tls: bool,
    /// The certificate of these to show in place of `server`.
    pub certificate: Option<&'a str>,
    /// HTTPS for clients with a certificate of the run's authority only.
    pub client_certificates: bool,
    /// The address in place of 127.0.0.1.
    pub ip: Option<&'a str>,
    /// The node of a network on which it is, and whose address it has.
    pub node: Option<&'a Node>,
}

/// A running registry. It ends with the value.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    config: String,
    host: String,
    directory: TempDir,
    authorization: Option<String>,
    is_token: bool,
    tls: bool,
    node: Option<Node>,
    /// What was logged by those that were killed.
    past: String,
}

impl Registry {
    /// Open to all, without TLS.
    pub fn start() -> Self {
        Self::with(Setup::default())
    }

    /// With basic authentication.
    pub fn with_htpasswd(user: &str, password: &str) -> Self {
        Self::with(Setup { htpasswd: Some((user, password)), ..Setup::default() })
    }

    /// With token authentication.
    pub fn with_tokens(server: &TokenServer) -> Self {
        Self::with(Setup { token: Some(server), ..Setup::default() })
    }

    /// As described.
    pub fn with(setup: Setup<'_>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name);
        let mut config = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
             validation: {{manifests: {{urls: {{allow: [\".*\"]}}}}}}\nhttp:\n  addr: {}:0\n  secret: test\n",
            at("data").display(),
            setup.ip.or(setup.node.map(Node::ip)).unwrap_or("127.0.0.1")
        );
        let certificates = (setup.tls || setup.client_certificates).then(Certificates::shared);
        if let Some(certificates) = certificates {
            let path = |name: &str| certificates.path(name).display().to_string();
            let shown = setup.certificate.unwrap_or("server");
            config += &format!(
                "  tls:\n    certificate: {}\n    key: {}\n",
                path(&format!("{shown}.crt")),
                path(&format!("{shown}.key"))
            );
            if setup.client_certificates {
                config += &format!("    clientcas: [{}]\n", path("ca.crt"));
            }
        }
        if let Some((user, password)) = setup.htpasswd {
            write(at("htpasswd"), pipe("htpasswd", ["-Bbn", user, password], b""));
            config += &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", at("htpasswd").display());
        }
        if let Some(server) = setup.token {
            config += &format!(
                "auth: {{token: {{realm: '{}', service: {SERVICE}, issuer: {ISSUER}, rootcertbundle: {}}}}}\n",
                server.realm(),
                Certificates::shared().path("token.crt").display()
            );
        }
        let mut registry = Self {
            child: serve(directory.path(), &config, setup.node),
            config,
            host: String::new(),
            directory,
            authorization: setup.htpasswd.map(|(user, password)| basic_header(user, password)),
            is_token: setup.token.is_some(),
            tls: certificates.is_some(),
            node: setup.node.cloned(),
            past: String::new(),
        };
        registry.host = registry.wait_for_port();
        registry
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
        self.past += &self.logged();
    }

    /// Sends it a signal: `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        tool("kill", [format!("-{name}"), self.child.id().to_string()]);
    }

    fn logged(&self) -> String {
        String::from_utf8_lossy(&read(self.directory.path().join("log"))).into_owned()
    }

    /// How often each blob was stored by an upload, by repository and digest. A mount is none.
    pub fn uploads(&self) -> BTreeMap<(String, String), usize> {
        let mut uploads = BTreeMap::new();
        for line in self.past.lines().chain(self.logged().lines()) {
            let has = |part: &str| line.contains(part);
            if !(has("response completed")
                && has("http.request.method=PUT")
                && has("http.response.status=201"))
            {
                continue;
            }
            let Some((_, uri)) = line.split_once("http.request.uri=\"/v2/") else { continue };
            let Some((repository, rest)) = uri.split_once("/blobs/uploads/") else { continue };
            // As its client wrote it, which may have escaped it.
            let Some((_, digest)) = rest.split_once("digest=sha256") else { continue };
            let digest = digest.trim_start_matches(':').trim_start_matches("%3A");
            let digest = format!("sha256:{}", &digest[..64]);
            *uploads.entry((repository.to_owned(), digest)).or_default() += 1;
        }
        uploads
    }

    /// Starts it again where it was, with the storage that it had.
    pub fn restart(&mut self) {
        let (ip, _) = self.host.rsplit_once(':').expect("IP:PORT");
        let config =
            self.config.replace(&format!("\n  addr: {ip}:0\n"), &format!("\n  addr: {}\n", self.host));
        self.child = serve(self.directory.path(), &config, self.node.as_ref());
        assert_eq!(self.wait_for_port(), self.host);
    }

    fn wait_for_port(&mut self) -> String {
        let start = Instant::now();
        loop {
            let log = self.logged();
            // The log line is flushed in one write; what follows the port ends the word.
            if let Some((_, rest)) = log.split_once("listening on ")
                && let Some(end) = rest.find(['"', ','])
            {
                return rest[..end].to_owned();
            }
            let ended = self.child.try_wait().expect("a child can be asked");
            assert!(
                ended.is_none() && start.elapsed() < Duration::from_secs(20),
                "docker-registry did not start: {log}"
            );
            sleep(Duration::from_millis(5));
        }
    }

    /// `IP:PORT`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// `registry://IP:PORT/NAME`.
    pub fn uri(&self, name: &str) -> String {
        format!("registry://{}/{name}", self.host)
    }

    /// Where its storage lies.
    pub fn storage(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Sends a request as its owner.
    pub fn send(&self, request: Request) -> Response {
        assert!(!self.tls, "the test's own client does not speak TLS");
        let name = request.path.trim_start_matches("/v2/").split("/manifests/").next().unwrap_or_default();
        let name = name.split("/blobs/").next().unwrap_or_default().to_owned();
        let request = match &self.authorization {
            Some(basic) => request.header("Authorization", basic),
            None if self.is_token => {
                let token = mint(&[&format!("repository:{name}:pull,push,delete")], true, 300);
                request.header("Authorization", &format!("Bearer {token}"))
            }
            None => request,
        };
        request.send(&self.host).unwrap_or_else(|error| panic!("{}: {error}", self.host))
    }

    /// Stores a blob.
    pub fn push_blob(&self, name: &str, bytes: &[u8]) {
        let started = self.send(Request::new("POST", &format!("/v2/{name}/blobs/uploads/")));
        let location = started.get("Location").unwrap_or_else(|| panic!("an upload: {started:?}")).to_owned();
        let path = location.find("/v2/").map(|at| &location[at..]).expect("a path in the Location");
        let put = Request::new("PUT", &format!("{path}&digest={}", sha256(bytes))).body(bytes);
        let done = self.send(put.header("Content-Type", "application/octet-stream"));
        assert_eq!(done.status, 201, "{}", String::from_utf8_lossy(&done.body));
    }

    /// Stores a file as a blob, in the way of its storage: it may be larger than what a test has in memory.
    pub fn place_blob(&self, name: &str, digest: &str, file: &Path) {
        let root = self.storage().join("docker/registry/v2");
        let hex = hex(digest);
        let blob = root.join(format!("blobs/sha256/{}/{hex}", &hex[..2]));
        std::fs::create_dir_all(&blob).expect("a directory of the storage");
        std::fs::rename(file, blob.join("data")).expect("a file on the same disk");
        let link = root.join(format!("repositories/{name}/_layers/sha256/{hex}"));
        std::fs::create_dir_all(&link).expect("a directory of the storage");
        write(link.join("link"), digest);
    }

    /// Stores a manifest under a tag or digest.
    pub fn push_manifest(&self, name: &str, reference: &str, media_type: &str, bytes: &[u8]) {
        let put = Request::new("PUT", &format!("/v2/{name}/manifests/{reference}")).body(bytes);
        let done = self.send(put.header("Content-Type", media_type));
        assert_eq!(done.status, 201, "{}", String::from_utf8_lossy(&done.body));
    }

    /// Stores an image; gives its URI.
    pub fn push(&self, image: &Image, name: &str, reference: &str) -> String {
        for blob in image.blobs.values() {
            self.push_blob(name, blob);
        }
        self.push_manifest(name, reference, image.family.manifest(), &image.manifest);
        let separator = if reference.contains(':') { '@' } else { ':' };
        self.uri(&format!("{name}{separator}{reference}"))
    }

    /// Stores an index and its images; gives its URI.
    pub fn push_index(&self, index: &Index, name: &str, tag: &str) -> String {
        for image in &index.images {
            self.push(image, name, &image.digest());
        }
        self.push_manifest(name, tag, index.family.index(), &index.manifest);
        self.uri(&format!("{name}:{tag}"))
    }

    /// A manifest of any kind, whatever the status.
    pub fn manifest(&self, name: &str, reference: &str) -> Response {
        let accept = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json, \
                      application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.index.v1+json";
        self.send(Request::new("GET", &format!("/v2/{name}/manifests/{reference}")).header("Accept", accept))
    }

    /// Whether there is such a manifest.
    pub fn has(&self, name: &str, reference: &str) -> bool {
        self.manifest(name, reference).status == 200
    }

    /// The digest of the manifest under a tag.
    pub fn digest(&self, name: &str, tag: &str) -> String {
        let manifest = self.manifest(name, tag);
        assert_eq!(manifest.status, 200, "{name}:{tag}");
        sha256(&manifest.body)
    }

    /// Whether there is such a blob.
    pub fn has_blob(&self, name: &str, digest: &str) -> bool {
        self.send(Request::new("HEAD", &format!("/v2/{name}/blobs/{digest}"))).status == 200
    }

    /// Reads a whole image back and recomputes every digest, size and diff_id on the way.
    pub fn pull(&self, name: &str, reference: &str) -> Pulled {
        let mut manifest = self.manifest(name, reference);
        for _ in 0..20 {
            if manifest.status == 200 {
                break;
            }
            // docker-registry writes a tag's link in place, and goes on with a PUT whose client was killed: who asks while the link
            // is empty is told that there is no such tag.
            sleep(Duration::from_millis(50));
            manifest = self.manifest(name, reference);
        }
        assert_eq!(manifest.status, 200, "{name}:{reference}");
        let document = json_of(&manifest.body);
        assert_eq!(document["mediaType"].as_str(), manifest.get("Content-Type"), "of {name}:{reference}");
        let fetch = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().expect("a digest");
            let blob = self.send(Request::new("GET", &format!("/v2/{name}/blobs/{digest}")));
            assert_eq!(blob.status, 200, "{descriptor}");
            assert_eq!(Some(blob.body.len() as u64), descriptor["size"].as_u64(), "{descriptor}");
            assert_eq!(sha256(&blob.body), digest);
            blob.body
        };
        let config = fetch(&document["config"]);
        let layers = document["layers"].as_array().expect("a list of layers");
        let blobs: Vec<Vec<u8>> = layers.iter().filter(|layer| layer["urls"].is_null()).map(fetch).collect();
        let tars: Vec<Vec<u8>> = blobs.iter().map(|blob| unpack(blob)).collect();
        if blobs.len() == layers.len() {
            let computed: Vec<String> = tars.iter().map(|tar| sha256(tar)).collect();
            assert_eq!(
                json_of(&config)["rootfs"]["diff_ids"],
                Value::from(computed),
                "diff_ids of {name}:{reference}"
            );
        }
        Pulled { digest: sha256(&manifest.body), manifest: manifest.body, document, config, blobs, tars }
    }
}

/// Starts the program in its directory.
fn serve(directory: &Path, config: &str, node: Option<&Node>) -> Child {
    write(directory.join("config.yml"), config);
    let log = std::fs::File::create(directory.join("log")).expect("a log file");
    let program = "docker-registry";
    let mut command = node.map_or_else(|| Command::new(program), |node| node.command(program));
    command.arg("serve").arg(directory.join("config.yml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().unwrap_or_else(|error| panic!("docker-registry: {error} (tests/setup installs it)"))
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// An image as a registry gave it, found consistent.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// Of the manifest.
    pub digest: String,
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// The manifest.
    pub document: Value,
    /// The config's bytes.
    pub config: Vec<u8>,
    /// The layers as stored, without foreign ones.
    pub blobs: Vec<Vec<u8>>,
    /// The layers' tars.
    pub tars: Vec<Vec<u8>>,
}
