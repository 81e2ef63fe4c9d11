//! A container engine as its own API shows it: Docker's Engine API, which Podman serves too.
//!
//! Four requests are all that is used: what an image is (`/images/NAME/json`), what the Engine keeps images in (`/info`), the
//! export of an image as a saved tar (`/images/NAME/get`), and the loading of one (`/images/load`). Paths have no version, so
//! that any Engine answers in the one that it speaks best. [`address`] finds the Engine.

mod address;
mod error;

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use serde_json::Value;

pub use self::address::{Address, Options};
pub use self::error::EngineError;
use crate::digest::Digest;

/// A local daemon answers at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// What an Engine says without work of its own comes within this time, or it hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// The largest answer that is read whole. An inspected image with thousands of labels is smaller.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

/// A connection to an Engine.
#[derive(Clone)]
pub struct Engine {
    client: reqwest::Client,
    address: Address,
}

/// What an Engine says of an image.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct InspectedImage {
    /// The digest of its config; in containerd's store, that of its manifest or index.
    pub id: String,
    /// Such as `amd64`.
    #[serde(default)]
    pub architecture: String,
    /// Such as `linux`.
    #[serde(default)]
    pub os: String,
    /// The file system.
    #[serde(rename = "RootFS", default)]
    pub root_fs: RootFs,
}

/// The layers of an inspected image.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RootFs {
    /// Their diff_ids, the lowest first.
    #[serde(default)]
    pub layers: Option<Vec<Digest>>,
}

/// What an Engine keeps images in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Unpacked: Docker's own store, and Podman's. An image's Id is the digest of its config.
    Unpacked,
    /// Containerd's: compressed blobs as they were pulled. An image's Id is the digest of its manifest or index.
    Containerd,
}

impl InspectedImage {
    /// The Id as a digest. Old Podmans write it without its algorithm.
    pub fn digest(&self) -> Option<Digest> {
        self.id.parse().ok().or_else(|| Digest::from_sha256_hex(&self.id).ok())
    }

    /// The layers' diff_ids, the lowest first.
    pub fn diff_ids(&self) -> &[Digest] {
        self.root_fs.layers.as_deref().unwrap_or_default()
    }
}

impl Engine {
    /// The Engine that `options` leads to. Nothing is sent yet.
    pub fn new(options: &Options) -> Result<Self, EngineError> {
        let address = options.address()?;
        let client = address.client(CONNECT_TIMEOUT)?;
        Ok(Self { client, address })
    }

    /// Whether the Engine answers at all.
    pub async fn ping(&self) -> Result<(), EngineError> {
        let what = || "speak to the container engine".to_owned();
        let response = self.send(Method::GET, "_ping", None, Some(ANSWER_TIMEOUT), &what).await?;
        succeeded(response, &what).await.map(drop)
    }

    /// What the Engine says of an image.
    pub async fn inspect(&self, image: &str) -> Result<InspectedImage, EngineError> {
        let what = || format!("inspect {image}");
        let response = self
            .send(Method::GET, &format!("images/{image}/json"), None, Some(ANSWER_TIMEOUT), &what)
            .await?;
        let response = self.of_image(response, image, &what).await?;
        let body = read_small(response, &what).await?;
        serde_json::from_slice(&body)
            .map_err(|error| EngineError::Protocol { what: what(), problem: error.to_string() })
    }

    /// What the Engine keeps its images in.
    pub async fn store(&self) -> Result<Store, EngineError> {
        let what = || "ask for the image store".to_owned();
        let response = self.send(Method::GET, "info", None, Some(ANSWER_TIMEOUT), &what).await?;
        let response = succeeded(response, &what).await?;
        let body = read_small(response, &what).await?;
        let info: Value = serde_json::from_slice(&body)
            .map_err(|error| EngineError::Protocol { what: what(), problem: error.to_string() })?;
        // `DriverStatus` is a list of pairs.
        let pairs = info.get("DriverStatus").and_then(Value::as_array).into_iter().flatten();
        let containerd = pairs.filter_map(Value::as_array).any(|pair| {
            pair.first().is_some_and(|key| key == "driver-type")
                && pair.get(1).and_then(Value::as_str).is_some_and(|kind| kind.starts_with("io.containerd."))
        });
        Ok(if containerd { Store::Containerd } else { Store::Unpacked })
    }

    /// An image as a saved tar. Docker's own store writes all of it to a file of its own before the first byte comes, so this
    /// may take a while.
    pub async fn export(
        &self,
        image: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, EngineError>> + Send + use<>, EngineError> {
        let name = image.to_owned();
        let what = move || format!("export {name}");
        let response = self.send(Method::GET, &format!("images/{image}/get"), None, None, &what).await?;
        let response = self.of_image(response, image, &what).await?;
        Ok(response
            .bytes_stream()
            .map(move |piece| piece.map_err(|error| EngineError::broken(what(), &error))))
    }

    /// Loads a saved tar. Done is done only when the Engine says that it has loaded an image.
    pub async fn load(&self, tar: reqwest::Body) -> Result<(), EngineError> {
        let what = || "load the image".to_owned();
        let response = self.send(Method::POST, "images/load?quiet=1", Some(tar), None, &what).await?;
        let response = succeeded(response, &what).await?;
        let body = read_small(response, &what).await?;
        let mut loaded = false;
        for message in serde_json::Deserializer::from_slice(&body).into_iter::<Value>() {
            let message = message
                .map_err(|error| EngineError::Protocol { what: what(), problem: error.to_string() })?;
            if let Some(words) = failure(&message) {
                return Err(EngineError::Failed { what: what(), words });
            }
            let said = message.get("stream").and_then(Value::as_str).unwrap_or_default();
            loaded |= said.trim_start().starts_with("Loaded image");
        }
        let problem = || "the Engine did not say that it loaded an image".to_owned();
        if loaded { Ok(()) } else { Err(EngineError::Protocol { what: what(), problem: problem() }) }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<reqwest::Body>,
        timeout: Option<Duration>,
        what: &(dyn Fn() -> String + Sync),
    ) -> Result<Response, EngineError> {
        let mut request = self.client.request(method, format!("{}/{path}", self.address.base()));
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        if let Some(body) = body {
            request = request.header(reqwest::header::CONTENT_TYPE, "application/x-tar").body(body);
        }
        request.send().await.map_err(|error| {
            if error.is_connect() {
                EngineError::connect(&self.address, &error)
            } else {
                EngineError::broken(what(), &error)
            }
        })
    }

    async fn of_image(
        &self,
        response: Response,
        image: &str,
        what: &(dyn Fn() -> String + Sync),
    ) -> Result<Response, EngineError> {
        if response.status() == StatusCode::NOT_FOUND {
            let (image, address) = (image.to_owned(), self.address.to_string());
            return Err(EngineError::NoSuchImage { image, address });
        }
        succeeded(response, what).await
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("address", &self.address).finish_non_exhaustive()
    }
}

/// The Engine's own words in one message of an answer, if they tell of a failure.
pub(crate) fn failure(message: &Value) -> Option<String> {
    let detail = message.get("errorDetail").and_then(|detail| detail.get("message"));
    let words = detail.or_else(|| message.get("error"))?;
    Some(words.as_str().map_or_else(|| words.to_string(), str::to_owned))
}

async fn succeeded(response: Response, what: &(dyn Fn() -> String + Sync)) -> Result<Response, EngineError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = read_small(response, what).await?;
    let said = serde_json::from_slice::<Value>(&body).ok();
    let message = said.as_ref().and_then(|said| said.get("message")?.as_str());
    let words = message.map_or_else(|| String::from_utf8_lossy(&body).trim().to_owned(), str::to_owned);
    Err(EngineError::Refused { what: what(), status: status.as_u16(), words })
}

async fn read_small(
    mut response: Response,
    what: &(dyn Fn() -> String + Sync),
) -> Result<Vec<u8>, EngineError> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| EngineError::broken(what(), &error))? {
        if body.len() + piece.len() > MAX_ANSWER {
            let problem = format!("the answer is larger than {MAX_ANSWER} bytes");
            return Err(EngineError::Protocol { what: what(), problem });
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_with_and_without_its_algorithm() {
        let hex = "0e5079c2db5d2ee4e8c82be19eb92567539c0776c2121ea34f9a791557f9ad8e";
        for id in [hex.to_owned(), format!("sha256:{hex}")] {
            let inspected: InspectedImage =
                serde_json::from_value(serde_json::json!({"Id": id, "RootFS": {"Type": "layers"}})).unwrap();
            assert_eq!(inspected.digest().unwrap().hex(), hex);
            assert!(inspected.diff_ids().is_empty());
        }
    }

    #[test]
    fn a_failure_in_an_answer_is_told_in_the_engines_words() {
        let message = |text: &str| failure(&serde_json::from_str(text).unwrap());
        assert_eq!(message(r#"{"errorDetail":{"message":"no space"},"error":"x"}"#).unwrap(), "no space");
        assert_eq!(message(r#"{"error":"x"}"#).unwrap(), "x");
        assert_eq!(message(r#"{"stream":"Loaded image: error:1"}"#), None);
    }
}
