//! A registry that serves just what it is given.

use std::collections::HashMap;
use std::sync::Arc;

use crate::http::Response;
use crate::image::Image;
use crate::server::Server;
use crate::tools::sha256;

/// A registry that serves what it is given, true or not, and takes nothing.
#[derive(Clone, Debug, Default)]
pub struct Fixed {
    answers: HashMap<String, Response>,
}

impl Fixed {
    /// Serves a response at a path.
    #[must_use]
    pub fn at(mut self, path: &str, response: Response) -> Self {
        self.answers.insert(path.to_owned(), response);
        self
    }

    /// Serves a manifest under a tag and its digest.
    #[must_use]
    pub fn manifest(self, name: &str, tag: &str, media_type: &str, bytes: &[u8]) -> Self {
        let response = Response::ok(media_type, bytes).header("Docker-Content-Digest", &sha256(bytes));
        self.at(&format!("/v2/{name}/manifests/{tag}"), response.clone())
            .at(&format!("/v2/{name}/manifests/{}", sha256(bytes)), response)
    }

    /// Serves a blob under its digest.
    #[must_use]
    pub fn blob(self, name: &str, bytes: &[u8]) -> Self {
        self.at(
            &format!("/v2/{name}/blobs/{}", sha256(bytes)),
            Response::ok("application/octet-stream", bytes),
        )
    }

    /// Serves a whole image.
    #[must_use]
    pub fn image(self, name: &str, tag: &str, image: &Image) -> Self {
        image.blobs.values().fold(self, |fixed, blob| fixed.blob(name, blob)).manifest(
            name,
            tag,
            image.family.manifest(),
            &image.manifest,
        )
    }

    /// Starts to serve on 127.0.0.1.
    pub fn serve(self) -> Server {
        self.serve_on("127.0.0.1")
    }

    /// Starts to serve on the address.
    pub fn serve_on(self, ip: &str) -> Server {
        let answers = Arc::new(self.answers);
        Server::start_on(ip, move |request| {
            if request.path == "/v2/" {
                return Response::status(200);
            }
            let path = request.path.split('?').next().unwrap_or_default();
            match answers.get(path) {
                Some(response) if request.method == "GET" => response.clone(),
                Some(response) if request.method == "HEAD" => {
                    let length = response.body.len().to_string();
                    Response { body: Vec::new(), ..response.clone() }.header("Content-Length", &length)
                }
                _ => Response::status(404),
            }
        })
    }
}
