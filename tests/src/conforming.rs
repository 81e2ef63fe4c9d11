//! A small registry that follows the distribution specification 1.1 to the letter, with what docker-registry 2.8 lacks: a list of
//! referrers, `OCI-Subject`, digests of SHA-512 for manifests, sparse indexes, tags that are deleted alone.
//!
//! Everything is in memory. It refuses what the specification has a registry refuse: a digest that is not that of the bytes, a
//! manifest whose blobs are not there, a chunk out of order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::http::{Request, Response};
use crate::image::Image;
use crate::server::Server;
use crate::tools::{pipe, sha256};

/// Where upload sessions are that are not beneath their repository.
const SESSIONS: &str = "/sessions/";

/// What this registry does in one of the ways that the specification leaves open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ways {
    /// It lists no referrers: a registry of version 1.0.
    pub no_referrers: bool,
    /// Referrers on one page of the list; 0 for all.
    pub referrers_page: usize,
    /// Names on one page of a list whatever is asked for; 0 for as many as are asked for.
    pub names_page: usize,
    /// It says no digest in answer to HEAD.
    pub silent_head: bool,
    /// It deletes nothing.
    pub no_delete: bool,
    /// It takes manifests whose blobs are not there.
    pub takes_sparse: bool,
    /// Bytes that each chunk of an upload has at least, but the last; 0 for any.
    pub min_chunk: usize,
    /// Its upload sessions are not beneath its repositories.
    pub sessions_elsewhere: bool,
}

/// The registry; dereferences to its [`Server`].
pub struct Conforming {
    server: Server,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    ways: Ways,
    repositories: BTreeMap<String, Repository>,
    uploads: HashMap<String, Vec<u8>>,
    /// Those whose last chunk has come: only that may be so short.
    ended: HashSet<String>,
    next: usize,
}

#[derive(Clone, Default)]
struct Repository {
    blobs: HashMap<String, Vec<u8>>,
    /// By every digest that they were put by, and by SHA-256: media type and bytes.
    manifests: BTreeMap<String, (String, Vec<u8>)>,
    tags: BTreeMap<String, String>,
}

impl Conforming {
    /// Starts with nothing in it.
    pub fn start() -> Self {
        Self::with(Ways::default())
    }

    /// Likewise, in some other ways.
    pub fn with(ways: Ways) -> Self {
        let state = Arc::new(Mutex::new(State { ways, ..State::default() }));
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| shared.lock().expect("no handler panics").answer(request));
        Self { server, state }
    }

    /// `registry://IP:PORT/NAME`.
    pub fn uri(&self, name: &str) -> String {
        format!("registry://{}/{name}", self.host())
    }

    /// Puts a blob where it is, however it is called.
    pub fn add_blob(&self, name: &str, digest: &str, bytes: &[u8]) {
        let mut state = self.state.lock().expect("no handler panics");
        let repository = state.repositories.entry(name.to_owned()).or_default();
        repository.blobs.insert(digest.to_owned(), bytes.to_vec());
    }

    /// Puts a manifest under a digest or tag, whether its blobs are there or not.
    pub fn add_manifest(&self, name: &str, reference: &str, media_type: &str, bytes: &[u8]) {
        let mut state = self.state.lock().expect("no handler panics");
        state.repositories.entry(name.to_owned()).or_default().put(reference, media_type, bytes);
    }

    /// Puts an image under a tag, or one of its digests.
    pub fn add_image(&self, name: &str, reference: &str, image: &Image) {
        for (digest, blob) in &image.blobs {
            self.add_blob(name, digest, blob);
        }
        self.add_manifest(name, reference, image.family.manifest(), &image.manifest);
    }

    /// Puts an artifact of a type that names a manifest as its subject, by its digest; gives its manifest.
    pub fn add_artifact(&self, name: &str, kind: &str, subject: &[u8], subject_type: &str) -> Vec<u8> {
        let (config, content) = (b"{}", format!("{kind} of {}", sha256(subject)));
        self.add_blob(name, &sha256(config), config);
        self.add_blob(name, &sha256(content.as_bytes()), content.as_bytes());
        let manifest = "application/vnd.oci.image.manifest.v1+json";
        let document = json!({
            "schemaVersion": 2, "mediaType": manifest, "artifactType": kind,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(config), "size": config.len()},
            "layers": [{"mediaType": "text/plain", "digest": sha256(content.as_bytes()), "size": content.len()}],
            "subject": {"mediaType": subject_type, "digest": sha256(subject), "size": subject.len()},
            "annotations": {"kind": kind},
        });
        let bytes = document.to_string().into_bytes();
        self.add_manifest(name, &sha256(&bytes), manifest, &bytes);
        bytes
    }

    /// Loses a manifest.
    pub fn delete_manifest(&self, name: &str, reference: &str) {
        let mut state = self.state.lock().expect("no handler panics");
        let deleted = state.repositories.get_mut(name).is_some_and(|repository| repository.delete(reference));
        assert!(deleted, "{name} had {reference}");
    }

    /// How many uploads have begun and not ended.
    pub fn uploads(&self) -> usize {
        self.state.lock().expect("no handler panics").uploads.len()
    }

    /// Forgets all uploads that have begun.
    pub fn lose_uploads(&self) {
        self.state.lock().expect("no handler panics").uploads.clear();
    }

    /// A manifest's media type and bytes.
    pub fn manifest(&self, name: &str, reference: &str) -> Option<(String, Vec<u8>)> {
        self.state.lock().expect("no handler panics").repositories.get(name)?.manifest(reference).cloned()
    }

    /// A blob.
    pub fn blob(&self, name: &str, digest: &str) -> Option<Vec<u8>> {
        self.state.lock().expect("no handler panics").repositories.get(name)?.blobs.get(digest).cloned()
    }

    /// The tags of a repository.
    pub fn tags(&self, name: &str) -> Vec<String> {
        let state = self.state.lock().expect("no handler panics");
        state
            .repositories
            .get(name)
            .map(|repository| repository.tags.keys().cloned().collect())
            .unwrap_or_default()
    }

    /// The digests of all manifests and blobs of a repository.
    pub fn digests(&self, name: &str) -> Vec<String> {
        let state = self.state.lock().expect("no handler panics");
        let repository = state.repositories.get(name).cloned().unwrap_or_default();
        let mut digests: Vec<_> =
            repository.manifests.into_keys().chain(repository.blobs.into_keys()).collect();
        digests.sort();
        digests
    }

    /// The digests of what names a manifest as its subject.
    pub fn referrers(&self, name: &str, subject: &str) -> Vec<String> {
        let state = self.state.lock().expect("no handler panics");
        let found = state.repositories.get(name).map(|repository| repository.referrers(subject));
        found
            .unwrap_or_default()
            .iter()
            .filter_map(|entry| entry["digest"].as_str().map(str::to_owned))
            .collect()
    }
}

impl Deref for Conforming {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

/// The digest of bytes by an algorithm, computed by a tool of the system.
pub fn digest_of(algorithm: &str, bytes: &[u8]) -> String {
    if algorithm == "sha256" {
        return sha256(bytes);
    }
    let line = String::from_utf8(pipe(&format!("{algorithm}sum"), ["-"], bytes)).expect("hex");
    format!("{algorithm}:{}", line.split(' ').next().expect("a sum"))
}

fn is_right(digest: &str, bytes: &[u8]) -> bool {
    match digest.split_once(':') {
        Some((algorithm @ ("sha256" | "sha512"), _)) => digest_of(algorithm, bytes) == digest,
        _ => false,
    }
}

fn error(status: u16, code: &str) -> Response {
    let body = json!({"errors": [{"code": code, "message": code.to_lowercase().replace('_', " ")}]});
    Response::ok("application/json", body.to_string()).status_of(status)
}

impl State {
    fn answer(&mut self, request: &Request) -> Response {
        let path = request.path.split('?').next().unwrap_or_default();
        if let Some((name, upload)) = path.strip_prefix(SESSIONS).and_then(|rest| rest.rsplit_once('/')) {
            return self.upload(request, name, upload);
        }
        let Some(rest) = path.strip_prefix("/v2/") else { return Response::status(404) };
        if rest.is_empty() {
            return Response::status(200);
        }
        if rest == "_catalog" {
            let names: Vec<String> = self.repositories.keys().cloned().collect();
            return self.page(request, "/v2/_catalog", &names, |names| json!({"repositories": names}));
        }
        if let Some(name) = rest.strip_suffix("/tags/list") {
            let Some(repository) = self.repositories.get(name) else { return error(404, "NAME_UNKNOWN") };
            let tags: Vec<String> = repository.tags.keys().cloned().collect();
            return self.page(request, path, &tags, |tags| json!({"name": name, "tags": tags}));
        }
        if let Some((name, upload)) = rest.split_once("/blobs/uploads/") {
            return self.upload(request, name, upload);
        }
        let (name, kind, reference) = ["manifests", "blobs", "referrers"]
            .into_iter()
            .find_map(|kind| rest.split_once(&format!("/{kind}/")).map(|(name, what)| (name, kind, what)))
            .unwrap_or_default();
        match (request.method.as_str(), kind) {
            ("GET" | "HEAD", "blobs") => {
                match self.repositories.get(name).and_then(|r| r.blobs.get(reference)) {
                    Some(blob) => ranged(request, blob).header("Docker-Content-Digest", reference),
                    None => error(404, "BLOB_UNKNOWN"),
                }
            }
            ("GET" | "HEAD", "manifests") => self.get_manifest(request, name, reference),
            ("PUT", "manifests") => self.put_manifest(request, name, reference),
            ("DELETE", "manifests") if self.ways.no_delete => error(405, "UNSUPPORTED"),
            ("DELETE", "manifests") => match self.repositories.get_mut(name).map(|r| r.delete(reference)) {
                Some(true) => Response::status(202),
                _ => error(404, "MANIFEST_UNKNOWN"),
            },
            ("GET", "referrers") if !self.ways.no_referrers => self.list_referrers(request, name, reference),
            _ => Response::status(404),
        }
    }

    /// A page of names in their order, and with `Link` where the next one is ("Listing Tags").
    fn page(
        &self,
        request: &Request,
        path: &str,
        names: &[String],
        body: impl Fn(&[String]) -> Value,
    ) -> Response {
        let last = request.query("last").pop().unwrap_or_default();
        let asked = request.query("n").pop().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
        let size = if self.ways.names_page > 0 { self.ways.names_page.min(asked) } else { asked };
        let left: Vec<String> = names.iter().filter(|name| **name > last).cloned().collect();
        let page = &left[..size.min(left.len())];
        let response = Response::ok("application/json", body(page).to_string());
        match page.last() {
            Some(last) if page.len() < left.len() => {
                response.header("Link", &format!("<{path}?n={asked}&last={last}>; rel=\"next\""))
            }
            _ => response,
        }
    }

    fn get_manifest(&self, request: &Request, name: &str, reference: &str) -> Response {
        let repository = self.repositories.get(name);
        let Some((media_type, bytes)) = repository.and_then(|repository| repository.manifest(reference))
        else {
            return error(404, "MANIFEST_UNKNOWN");
        };
        let digest = if reference.contains(':') { reference.to_owned() } else { sha256(bytes) };
        let response = Response::ok(media_type, bytes.clone());
        if request.method == "HEAD" {
            let length = bytes.len().to_string();
            let response = response.with_body(Vec::new()).header("Content-Length", &length);
            return if self.ways.silent_head {
                response
            } else {
                response.header("Docker-Content-Digest", &digest)
            };
        }
        response.header("Docker-Content-Digest", &digest)
    }

    fn put_manifest(&mut self, request: &Request, name: &str, reference: &str) -> Response {
        let bytes = &request.body;
        if reference.contains(':') && !is_right(reference, bytes) {
            return error(400, "DIGEST_INVALID");
        }
        let media_type = request.get("Content-Type").unwrap_or_default();
        let Ok(document) = serde_json::from_slice::<Value>(bytes) else {
            return error(400, "MANIFEST_INVALID");
        };
        if document["mediaType"].as_str().is_some_and(|named| named != media_type) {
            return error(400, "MANIFEST_INVALID");
        }
        let repository = self.repositories.entry(name.to_owned()).or_default();
        let layers = document["layers"].as_array().into_iter().flatten();
        for blob in layers.chain(document.get("config")).filter(|blob| blob["urls"].is_null()) {
            let digest = blob["digest"].as_str().unwrap_or_default();
            match repository.blobs.get(digest) {
                Some(bytes) if Some(bytes.len() as u64) == blob["size"].as_u64() => {}
                _ if self.ways.takes_sparse => {}
                _ => return error(404, "MANIFEST_BLOB_UNKNOWN"),
            }
        }
        repository.put(reference, media_type, bytes);
        let digest = if reference.contains(':') { reference.to_owned() } else { sha256(bytes) };
        let response = Response::status(201)
            .header("Location", &format!("/v2/{name}/manifests/{digest}"))
            .header("Docker-Content-Digest", &digest);
        match document["subject"]["digest"].as_str() {
            Some(subject) if !self.ways.no_referrers => response.header("OCI-Subject", subject),
            _ => response,
        }
    }

    fn list_referrers(&self, request: &Request, name: &str, subject: &str) -> Response {
        let found = self.repositories.get(name).map(|repository| repository.referrers(subject));
        let found = found.unwrap_or_default();
        let page = if self.ways.referrers_page == 0 { usize::MAX } else { self.ways.referrers_page };
        let start: usize = request.query("from").pop().and_then(|from| from.parse().ok()).unwrap_or(0);
        let end = start.saturating_add(page).min(found.len());
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": found[start..end]});
        let response = Response::ok(media_type, index.to_string());
        if end < found.len() {
            response.header("Link", &format!("</v2/{name}/referrers/{subject}?from={end}>; rel=\"next\""))
        } else {
            response
        }
    }

    /// Upload sessions: POST, PATCH, PUT, GET, DELETE.
    fn upload(&mut self, request: &Request, name: &str, session: &str) -> Response {
        let digest = request.query("digest").pop();
        if request.method == "POST" && session.is_empty() {
            if let (Some(mount), Some(from)) = (request.query("mount").pop(), request.query("from").pop())
                && let Some(blob) = self.repositories.get(&from).and_then(|r| r.blobs.get(&mount)).cloned()
            {
                return self.store(name, &mount, blob);
            }
            if let Some(digest) = digest {
                return self.store(name, &digest, request.body.clone());
            }
            self.next += 1;
            let session = format!("s{}", self.next);
            self.uploads.insert(session.clone(), Vec::new());
            let response = self.accepted(name, &session, 0);
            return match self.ways.min_chunk {
                0 => response,
                least => response.header("OCI-Chunk-Min-Length", &least.to_string()),
            };
        }
        let Some(mut bytes) = self.uploads.remove(session) else { return error(404, "BLOB_UPLOAD_UNKNOWN") };
        match request.method.as_str() {
            "PATCH" | "PUT" => {
                let start =
                    request.get("Content-Range").and_then(|range| range.split('-').next()?.parse().ok());
                if start.is_some_and(|start: usize| start != bytes.len()) {
                    let response = self.accepted(name, session, bytes.len());
                    self.uploads.insert(session.to_owned(), bytes);
                    return response.status_of(416);
                }
                if request.method == "PATCH" && self.ended.contains(session) {
                    self.uploads.insert(session.to_owned(), bytes);
                    return error(400, "BLOB_UPLOAD_INVALID");
                }
                if request.body.len() < self.ways.min_chunk {
                    self.ended.insert(session.to_owned());
                }
                bytes.extend_from_slice(&request.body);
                match digest {
                    Some(digest) if request.method == "PUT" => self.store(name, &digest, bytes),
                    _ if request.method == "PUT" => error(400, "DIGEST_INVALID"),
                    _ => {
                        let response = self.accepted(name, session, bytes.len());
                        self.uploads.insert(session.to_owned(), bytes);
                        response
                    }
                }
            }
            "DELETE" => Response::status(204),
            _ => {
                let response = self.accepted(name, session, bytes.len()).status_of(204);
                self.uploads.insert(session.to_owned(), bytes);
                response
            }
        }
    }

    fn accepted(&self, name: &str, session: &str, committed: usize) -> Response {
        let location = match self.ways.sessions_elsewhere {
            true => format!("{SESSIONS}{name}/{session}"),
            false => format!("/v2/{name}/blobs/uploads/{session}"),
        };
        Response::status(202)
            .header("Location", &location)
            .header("Range", &format!("0-{}", committed.saturating_sub(1)))
    }

    fn store(&mut self, name: &str, digest: &str, bytes: Vec<u8>) -> Response {
        if !is_right(digest, &bytes) {
            return error(400, "DIGEST_INVALID");
        }
        self.repositories.entry(name.to_owned()).or_default().blobs.insert(digest.to_owned(), bytes);
        Response::status(201)
            .header("Location", &format!("/v2/{name}/blobs/{digest}"))
            .header("Docker-Content-Digest", digest)
    }
}

fn ranged(request: &Request, blob: &[u8]) -> Response {
    if request.method == "HEAD" {
        return Response::ok("application/octet-stream", Vec::new())
            .header("Content-Length", &blob.len().to_string());
    }
    let range = request.get("Range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let Some((start, end)) = range else { return Response::ok("application/octet-stream", blob) };
    let start: usize = start.parse().unwrap_or(usize::MAX);
    let end = end.parse::<usize>().map_or(blob.len(), |end| (end + 1).min(blob.len()));
    if start >= end {
        return Response::status(416);
    }
    let shown = format!("bytes {start}-{}/{}", end - 1, blob.len());
    Response::ok("application/octet-stream", &blob[start..end]).status_of(206).header("Content-Range", &shown)
}

impl Repository {
    fn manifest(&self, reference: &str) -> Option<&(String, Vec<u8>)> {
        self.manifests.get(self.tags.get(reference).map_or(reference, String::as_str))
    }

    fn put(&mut self, reference: &str, media_type: &str, bytes: &[u8]) {
        let digest = sha256(bytes);
        self.manifests.insert(digest.clone(), (media_type.to_owned(), bytes.to_vec()));
        if reference.contains(':') {
            self.manifests.insert(reference.to_owned(), (media_type.to_owned(), bytes.to_vec()));
        } else {
            self.tags.insert(reference.to_owned(), digest);
        }
    }

    /// A tag alone; a digest with all tags that name it ("Deleting Manifests", "Deleting Tags").
    fn delete(&mut self, reference: &str) -> bool {
        if !reference.contains(':') {
            return self.tags.remove(reference).is_some();
        }
        self.tags.retain(|_, digest| digest != reference);
        self.manifests.remove(reference).is_some()
    }

    /// As "Listing Referrers" has them: with `artifactType`, which is that of the config where the manifest has none.
    fn referrers(&self, subject: &str) -> Vec<Value> {
        let mut found = Vec::new();
        for (digest, (media_type, bytes)) in &self.manifests {
            let document: Value = serde_json::from_slice(bytes).unwrap_or_default();
            // One that was put by another algorithm's digest is known by SHA-256 too.
            if document["subject"]["digest"] != subject || *digest != sha256(bytes) {
                continue;
            }
            let mut entry = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
            let artifact_type =
                document["artifactType"].as_str().or(document["config"]["mediaType"].as_str());
            if let Some(artifact_type) = artifact_type {
                entry["artifactType"] = artifact_type.into();
            }
            if !document["annotations"].is_null() {
                entry["annotations"] = document["annotations"].clone();
            }
            found.push(entry);
        }
        found
    }
}
