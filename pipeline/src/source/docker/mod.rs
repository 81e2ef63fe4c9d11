//! `docker://IMAGE:TAG`: an image in a Docker Engine or in Podman, which can only export it whole.
//!
//! The Engine tells the layers' diff_ids beforehand, and then sends a saved tar: each layer is processed as it arrives, at the
//! index of its diff_id ([`export`]), and the config is known when all has been read. An Engine on containerd's store sends
//! the compressed blobs that it pulled, in the order of digests that nobody knows yet: that export is spooled, and is
//! read like any saved tar, so that its layers and its manifest are kept as they are.

mod export;
mod names;

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde_json::json;

use self::export::{Exported, ExportedLayer, Task};
use super::arrivals::Arrivals;
use super::{SourceKind, saved_tar};
use crate::compression::Format;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::element::{ConfigFile, Image, ImageName, Layer};
use crate::engine::{Engine, EngineError, InspectedImage, Options, Store};
use crate::error::Error;
use crate::manifest::{Family, media_type};
use crate::reference::Reference;
use crate::spool::SpoolDir;

/// This source's line in the table.
pub const KIND: SourceKind = SourceKind {
    scheme: "docker",
    syntax: "docker://IMAGE[:TAG|@DIGEST]",
    about: "an image in a Docker Engine or in Podman",
    options: &["socket", "max_workers"],
};

/// An image in an Engine.
#[derive(Debug)]
pub struct DockerSource {
    engine: Options,
    /// As the Engine is asked for it.
    image: String,
    name: ImageName,
    spools: SpoolDir,
    reading: Mutex<Option<Reading>>,
}

/// An export that is being read.
#[derive(Debug)]
struct Reading {
    exported: Arc<Exported>,
    /// Until somebody takes it.
    arrivals: Option<Arrivals>,
    /// Gives the config.
    task: Task<Result<Bytes, Error>>,
}

impl DockerSource {
    /// The image that an Engine calls `image`: a name, with a tag or a digest, or an Id. What has to wait is kept in `spools`.
    pub fn new(engine: Options, image: &str, spools: SpoolDir) -> Result<Self, Error> {
        let (image, name) = if is_id(image) {
            (image.to_owned(), ImageName { repository: image.to_owned(), tag: None })
        } else {
            let reference: Reference = image.parse()?;
            let tag = reference.tag().map(ToString::to_string);
            // As it was written: Podman tells `app` from `docker.io/library/app`.
            let written = image.split('@').next().unwrap_or(image);
            let repository = match &tag {
                Some(tag) => written.strip_suffix(&format!(":{tag}")).unwrap_or(written),
                None => written,
            };
            let name = ImageName { repository: repository.to_owned(), tag };
            match reference.digest() {
                Some(digest) => (format!("{repository}@{digest}"), name),
                None => (name.to_string(), name),
            }
        };
        Ok(Self { engine, image, name, spools, reading: Mutex::default() })
    }

    /// An image in an unpacked store: its export is read from now on.
    fn begin(&self, engine: Engine, inspected: &InspectedImage) -> Result<Image, Error> {
        let diff_ids = inspected.diff_ids().to_vec();
        let Some(config) = inspected.digest() else {
            let problem = format!("its Id is {:?}, which is no digest", inspected.id);
            return Err(EngineError::Protocol { what: format!("inspect {}", self.image), problem }.into());
        };
        let exported = Arc::new(Exported::new(
            engine,
            inspected.id.clone(),
            self.image.clone(),
            Some(config.clone()),
            diff_ids.clone(),
            self.spools.clone(),
        ));
        let (sender, arrivals) = Arrivals::channel();
        let task = Task::spawn(Arc::clone(&exported).read(config, sender));
        let layer = |(index, diff_id): (usize, &Digest)| Layer {
            index,
            blob: Arc::new(ExportedLayer { index: exported.first(index), exported: Arc::clone(&exported) }),
            descriptor: None,
            format: Format::None,
            diff_id: Some(diff_id.clone()),
            origin: None,
            keep_stored: false,
            known_by_diff_id_alone: true,
        };
        let layers = diff_ids.iter().enumerate().map(layer).collect();
        // What is known of the config before it comes. `settle` puts the real one in its place.
        let known = json!({"architecture": inspected.architecture, "os": inspected.os,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let image = Image {
            name: self.name.clone(),
            aliases: Vec::new(),
            manifest: None,
            family: Family::Docker,
            config: ConfigFile {
                original: None,
                media_type: media_type::DOCKER_CONFIG.to_owned(),
                document: Some(self.config(known.to_string().as_bytes())?),
            },
            layers,
        };
        *self.reading() = Some(Reading { exported, arrivals: Some(arrivals), task });
        Ok(image)
    }

    /// An image in containerd's store, out of a whole export.
    async fn spooled(&self, engine: &Engine, inspected: &InspectedImage) -> Result<Image, Error> {
        let (body, last_words) = export::begin(engine, &self.image).await?;
        let what = format!("the export of {}", self.image);
        let read = saved_tar::from_stream(body, &what, inspected.diff_ids(), self.spools.clone()).await;
        let image = read.map_err(|error| match last_words.failure(&self.image) {
            Some(failure) if matches!(error, Error::SavedImage(_)) => failure.into(),
            _ => error,
        })?;
        let document = image.config.document.as_ref();
        self.check_layers(document.map(ImageConfig::diff_ids).unwrap_or_default(), inspected.diff_ids())?;
        Ok(Image { name: self.name.clone(), aliases: Vec::new(), ..image })
    }

    /// Whether the config has the layers that the Engine says the image has.
    fn check_layers(&self, config: &[Option<Digest>], told: &[Digest]) -> Result<(), EngineError> {
        let named = config.iter().flatten();
        if named.clone().eq(told) {
            return Ok(());
        }
        let (expected, actual) = (list(told), list(named));
        let what = "a config with the layers";
        Err(EngineError::Differs { image: self.image.clone(), what, expected, actual })
    }

    fn config(&self, bytes: &[u8]) -> Result<ImageConfig, Error> {
        ImageConfig::parse(bytes).map_err(|source| Error::Config { image: self.image.clone(), source })
    }

    fn reading(&self) -> std::sync::MutexGuard<'_, Option<Reading>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl super::ImageSource for DockerSource {
    async fn image(&self) -> Result<Image, Error> {
        let engine = Engine::new(&self.engine)?;
        let inspected = engine.inspect(&self.image).await?;
        match engine.store().await? {
            Store::Unpacked => self.begin(engine, &inspected),
            Store::Containerd => self.spooled(&engine, &inspected).await,
        }
    }

    fn arrivals(&self) -> Option<Arrivals> {
        self.reading().as_mut()?.arrivals.take()
    }

    async fn settle(&self, image: &mut Image) -> Result<(), Error> {
        let Some(reading) = self.reading().take() else { return Ok(()) };
        if let Some(mut arrivals) = reading.arrivals {
            // Nobody reads the layers; what comes behind them is wanted.
            while arrivals.next().await.is_some() {}
        }
        let bytes = reading.task.join().await?;
        let document = self.config(&bytes)?;
        self.check_layers(document.diff_ids(), &reading.exported.diff_ids)?;
        image.config.document = Some(document);
        image.config.original = Some(bytes);
        Ok(())
    }
}

/// Whether this is an image's Id rather than its name, which no repository may look like.
fn is_id(text: &str) -> bool {
    Digest::from_sha256_hex(text.strip_prefix("sha256:").unwrap_or(text)).is_ok()
}

fn list<'a>(digests: impl IntoIterator<Item = &'a Digest>) -> String {
    let digests: Vec<_> = digests.into_iter().map(ToString::to_string).collect();
    format!("[{}]", digests.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(image: &str) -> DockerSource {
        DockerSource::new(Options::default(), image, SpoolDir::new("/tmp", 0)).unwrap()
    }

    #[test]
    fn an_image_is_called_as_it_was_written() {
        let hex = "a".repeat(64);
        for (text, asked, repository, tag) in [
            ("app", "app:latest", "app", Some("latest")),
            ("app:1", "app:1", "app", Some("1")),
            ("docker.io/library/app:1", "docker.io/library/app:1", "docker.io/library/app", Some("1")),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c", "localhost:5000/a/b", Some("c")),
            (&format!("app@sha256:{hex}"), &format!("app@sha256:{hex}"), "app", None),
            (&format!("app:1@sha256:{hex}"), &format!("app@sha256:{hex}"), "app", Some("1")),
            (&format!("sha256:{hex}"), &format!("sha256:{hex}"), &format!("sha256:{hex}"), None),
            (&hex, &hex, &hex, None),
        ] {
            let source = source(text);
            assert_eq!(source.image, asked);
            assert_eq!((source.name.repository.as_str(), source.name.tag.as_deref()), (repository, tag));
        }
        assert!(DockerSource::new(Options::default(), "App:1/x y", SpoolDir::new("/tmp", 0)).is_err());
    }
}
