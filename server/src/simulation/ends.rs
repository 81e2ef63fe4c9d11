//! Sources and destinations of a simulation: images of a few layers, and one registry that takes them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use occy_pipeline::blob::{ByteCount, LayerStream, MemoryBlob};
use occy_pipeline::codec::Pool;
use occy_pipeline::compression::Format;
use occy_pipeline::config::ImageConfig;
use occy_pipeline::digest::Digest;
use occy_pipeline::element::{ConfigFile, Image, ImageName, Layer, StoredLayer, WrittenLayer};
use occy_pipeline::error::Error;
use occy_pipeline::filter::{FilterChain, OutputFormat};
use occy_pipeline::manifest::{Annotations, Descriptor, Family};
use occy_pipeline::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Receipt};
use occy_pipeline::registry::{Access, Client, Options, Repository};
use occy_pipeline::source::ImageSource;
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::Limits;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::whole::Wanted;
use occy_proto::v1::{Job, PipelineSpec};
use tokio::time::{Instant, sleep};

use super::world::{Link, World};
use crate::admit::output_need;
use crate::credentials::Logins;
use crate::engine::jetstream::simulated::Nats;
use crate::error::ServiceError;
use crate::fleet::Origin;
use crate::job::runner::{Opened, Opener};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What becomes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It comes to its end.
    Good,
    /// Every worker fails at it.
    Poisonous,
    /// It fails as it would anywhere.
    Broken,
}

/// What is asked for: the layers' names instead of a source, and what a worker must offer for them instead of a compression.
pub(super) fn spec(layers: &[String], needs: &str, tag: &str) -> PipelineSpec {
    PipelineSpec {
        source: layers.join(" "),
        destination: format!("registry://to.io/{tag}:1"),
        compression: needs.to_owned(),
        ..PipelineSpec::default()
    }
}

/// The names of its layers.
pub(super) fn layers(spec: &PipelineSpec) -> Vec<&str> {
    spec.source.split(' ').collect()
}

/// The digest of a layer of that name.
pub(super) fn digest(layer: &str) -> Digest {
    Digest::sha256(layer)
}

/// What stands at the destination, and was put there when.
#[derive(Clone, Debug, Default)]
pub(super) struct Registry(Arc<Mutex<BTreeMap<String, Tag>>>);

#[derive(Debug, Default)]
struct Tag {
    /// Attempts at jobs whose manifest is on its way.
    coming: Vec<(String, u32)>,
    /// Those whose manifest came.
    came: Vec<(String, u32)>,
}

impl Registry {
    /// Whether the manifest of an attempt at a job came.
    pub(super) fn has(&self, tag: &str, job: &Job) -> bool {
        let tags = self.0.lock().unwrap();
        tags.get(tag).is_some_and(|tag| tag.came.contains(&(job.id.clone(), job.attempts)))
    }
}

/// Opens the ends of a coordinator's jobs.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    pub(super) world: World,
    pub(super) link: Link,
    pub(super) nats: Nats,
    pub(super) registry: Registry,
}

#[async_trait::async_trait]
impl Opener for Ends {
    async fn open(&self, job: &Job, _logins: &Logins) -> Result<Opened, ServiceError> {
        let spec = job.spec.clone().unwrap_or_default();
        let plan = LayerPlan {
            annotations: Annotations::default(),
            chain: FilterChain::default(),
            pool: Pool::shared().clone(),
            spools: SpoolDir::new("/tmp", 0),
            limits: Limits::default(),
            max_layer_size: 0,
            verify_diff_ids: false,
        };
        let needs = Arc::new([output_need(&spec.compression)].into_iter().collect());
        let destination = Destination {
            ends: self.clone(),
            job: job.id.clone(),
            attempt: job.attempts,
            tag: spec.destination.clone(),
            layers: layers(&spec).len(),
            repository: repositories().1.clone(),
        };
        Ok(Opened {
            source: Box::new(Source { link: self.link.clone(), spec }),
            output: Arc::new(destination),
            at_once: 4,
            plan: Arc::new(plan),
            needs,
            origin: Origin::default(),
            wanted: Wanted::default(),
            findings: OutputFormat::Text,
            client: None,
        })
    }
}

/// Where all images come from, and where they go. Nobody speaks to either.
fn repositories() -> &'static (Repository, Repository) {
    static REPOSITORIES: OnceLock<(Repository, Repository)> = OnceLock::new();
    REPOSITORIES.get_or_init(|| {
        let client = Client::new(Options::default()).unwrap();
        let named = |name: &str, access| client.repository(&name.parse().unwrap(), access);
        (named("r.io/app", Access::Pull), named("to.io/app", Access::Push))
    })
}

struct Source {
    link: Link,
    spec: PipelineSpec,
}

#[async_trait::async_trait]
impl ImageSource for Source {
    async fn image(&self) -> Result<Image, Error> {
        self.link.delay().await;
        let origin = &repositories().0;
        let layers = layers(&self.spec).into_iter().enumerate().map(|(index, name)| {
            let size = 1 + digest(name).to_string().bytes().map(u64::from).sum::<u64>() % 1000;
            Layer {
                index,
                blob: Arc::new(MemoryBlob::new(Bytes::copy_from_slice(name.as_bytes()))),
                descriptor: Some(Descriptor::new(LAYER, &digest(name), size)),
                format: Format::Gzip,
                diff_id: Some(digest(&format!("tar of {name}"))),
                origin: Some(origin.clone()),
                keep_stored: true,
                known_by_diff_id_alone: false,
            }
        });
        let layers: Vec<_> = layers.collect();
        let diff_ids: Vec<_> = layers.iter().filter_map(|layer| layer.diff_id.as_ref()).collect();
        let diff_ids: Vec<_> = diff_ids.iter().map(ToString::to_string).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = Bytes::from(config.to_string());
        Ok(Image {
            name: ImageName::of_tagged("r.io/app:1"),
            aliases: Vec::new(),
            manifest: None,
            family: Family::Oci,
            config: ConfigFile {
                document: Some(ImageConfig::parse(&config).expect("it is one")),
                original: Some(config),
                media_type: "application/vnd.oci.image.config.v1+json".to_owned(),
            },
            layers,
        })
    }
}

struct Destination {
    ends: Ends,
    job: String,
    attempt: u32,
    tag: String,
    layers: usize,
    repository: Repository,
}

#[async_trait::async_trait]
impl ImageOutput for Destination {
    fn form(&self) -> LayerForm {
        LayerForm::Stored { compression: None }
    }

    async fn begin(&self, _image: &Image, _expected: &[ExpectedLayer]) -> Result<(), Error> {
        Ok(())
    }

    async fn known_layer(&self, _layer: &Layer, _chain: &FilterChain) -> Result<Option<WrittenLayer>, Error> {
        Ok(None)
    }

    async fn has_layer(&self, layer: &Layer) -> Result<bool, Error> {
        self.ends.link.delay().await;
        let is_there = self.ends.world.has_blob(&layer.label());
        if is_there {
            self.ends.world.count("layers that were there");
        }
        Ok(is_there)
    }

    async fn write_layer(
        &self,
        _index: usize,
        _stream: LayerStream,
        _format: Format,
        _progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        unreachable!("workers write to the registry themselves")
    }

    fn repository(&self) -> Option<&Repository> {
        Some(&self.repository)
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let Self { ends: Ends { world, link, nats, registry }, job, attempt, tag, .. } = self;
        if finished.layers.len() != self.layers {
            world.violated(&format!("{job} is finalized without all of its layers"));
        }
        for layer in &finished.image.layers {
            // As long as a registry takes that is asked for a blob; a slow one at times.
            link.delay().await;
            if world.once_in(10) {
                sleep(world.milliseconds(100, 2000)).await;
                link.delay().await;
            }
            if !world.has_blob(&layer.label()) {
                world.violated(&format!("{job} is finalized and {} is not there", layer.label()));
            }
        }
        let asked = Instant::now();
        finished.permit.expect("a job has one").check().await?;
        if !nats.was_owned(job, *attempt, asked) {
            world
                .violated(&format!("attempt {attempt} at {job} made its image visible and had lost the job"));
        }
        let its = (job.clone(), *attempt);
        {
            let mut tags = registry.0.lock().unwrap();
            let place = tags.entry(tag.clone()).or_default();
            let now = Instant::now();
            if let Some((other, attempt)) =
                place.coming.iter().find(|(other, attempt)| nats.was_owned(other, *attempt, now))
            {
                world.violated(&format!("{job} and attempt {attempt} at {other} make {tag} visible at once"));
            }
            place.coming.push(its.clone());
        }
        world.event(&format!("manifest of {job}, attempt {attempt}, to {tag}"));
        link.delay().await;
        {
            let mut tags = registry.0.lock().unwrap();
            let place = tags.entry(tag.clone()).or_default();
            place.coming.retain(|coming| *coming != its);
            place.came.push(its);
        }
        world.count("manifests");
        link.delay().await;
        Ok(Receipt { destination: tag.clone(), ..Receipt::default() })
    }
}
