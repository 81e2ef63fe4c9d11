//! The product: an image read from a source, passed through filters, written to an output.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::task::JoinSet;
use tracing::Instrument as _;

use crate::compression::Format;
use crate::config::ConfigError;
use crate::element::{Image, Layer, StoredLayer, WrittenLayer, distinct_layers};
use crate::error::Error;
use crate::executor::{Executor, LayerTask};
use crate::filter::{FilterChain, ImageFindings, LayerFindings, OutputFormat, Rendering};
use crate::output::{ExpectedLayer, FinishedImage, ImageOutput, LayerForm, Receipt};
use crate::progress::{LayerState, Progress};
use crate::source::ImageSource;
use crate::source::arrivals::Coming;
use crate::task::LayerPlan;

/// Sizes that are asked for at once.
const EXPECTED_AT_ONCE: usize = 8;

/// What came of an image.
#[derive(Debug)]
pub struct Outcome {
    /// As the source offered it.
    pub image: Image,
    /// Its layers as they were written, lowest first, with what the filters report of each.
    pub layers: Vec<WrittenLayer>,
    /// The final config.
    pub config: Bytes,
    /// What the output says.
    pub receipt: Receipt,
    /// The seed's summary.
    pub summary: Summary,
}

/// `Processed 12345678 bytes in 5 layers in 3.2 seconds`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Bytes of all layers in the form that the output stores, a layer that stands twice counted twice.
    pub bytes: u64,
    /// Layers in the image.
    pub layers: usize,
    /// From the first request to the finished output.
    pub elapsed: Duration,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { bytes, layers, elapsed } = self;
        let word = if *layers == 1 { "layer" } else { "layers" };
        write!(f, "Processed {bytes} bytes in {layers} {word} in {:.1} seconds", elapsed.as_secs_f64())
    }
}

/// Processes one image: its layers in parallel, each placed by its index, and the manifest once all of them are stored.
pub async fn process(
    source: &dyn ImageSource,
    plan: Arc<LayerPlan>,
    output: Arc<dyn ImageOutput>,
    executor: Arc<dyn Executor>,
    progress: &Progress,
) -> Result<Outcome, Error> {
    let start = Instant::now();
    let mut image = source.image().await?;
    refuse_artifact(&image, &plan, output.form())?;
    progress.begin(image.layers.iter().map(|layer| (layer.label(), layer.blob.size())));
    let distinct = distinct_layers(&image.layers);
    let written: Vec<usize> = (0..image.layers.len()).filter(|&index| distinct[index] == index).collect();
    output
        .begin(&image, &expected(&image, &written, &plan, output.as_ref(), executor.as_ref()).await)
        .await?;
    let coming = Coming::new(source, order(&image, written, output.as_ref(), executor.as_ref()));
    let done = run_layers(&image, coming, &plan, &output, &executor, progress).await?;
    source.settle(&mut image).await?;
    let layers = place(&image, &distinct, &done, progress);
    let config = match executor.final_config().await? {
        Some(config) => config,
        None => final_config(&image, &plan, &layers)?,
    };
    let finished = FinishedImage {
        image: &image,
        chain: &plan.chain,
        annotations: &plan.annotations,
        config: config.clone(),
        layers: &layers,
        permit: None,
    };
    let receipt = output.finalize(finished).await?;
    let bytes = layers.iter().map(|layer| stored_size(&image, layer)).fold(0, u64::saturating_add);
    let summary = Summary { bytes, layers: layers.len(), elapsed: start.elapsed() };
    Ok(Outcome { image, layers, config, receipt, summary })
}

fn refuse_artifact(image: &Image, plan: &LayerPlan, form: LayerForm) -> Result<(), Error> {
    let copied = matches!(form, LayerForm::Stored { compression: None });
    if image.is_image() || (copied && plan.chain.is_empty()) {
        return Ok(());
    }
    Err(Error::NotAnImage { image: image.name.to_string(), media_type: image.config.media_type.clone() })
}

/// What the output is told of the layers that it is going to get.
///
/// A plain tar's size helps an output of tars to place layers before they are read. The end of a gzip stream tells it, if the
/// stream is one member of less than 4 GiB; that it could be a tar's at all is checked here, and the rest by the output.
async fn expected(
    image: &Image,
    written: &[usize],
    plan: &LayerPlan,
    output: &dyn ImageOutput,
    executor: &dyn Executor,
) -> Vec<ExpectedLayer> {
    let guess = output.wants_tar_sizes() && !plan.chain.resizes() && written.len() > 1;
    let may_restart = plan.chain.edits() || executor.may_begin_anew();
    let sizes = written.iter().copied().map(|index| async move {
        let layer = &image.layers[index];
        let tar_size = match layer.format {
            _ if !guess => None,
            Format::None => layer.blob.size(),
            Format::Gzip => {
                let size = layer.blob.tail().await.map(|tail| u64::from(u32::from_le_bytes(tail)));
                size.filter(|&size| size % 512 == 0 && Some(size) > layer.blob.size())
            }
            Format::Zstd => None,
        };
        ExpectedLayer { index, tar_size, may_restart }
    });
    futures_util::stream::iter(sizes).buffered(EXPECTED_AT_ONCE).collect().await
}

/// The order in which layers are begun, where it is ours to choose.
fn order(
    image: &Image,
    mut written: Vec<usize>,
    output: &dyn ImageOutput,
    executor: &dyn Executor,
) -> Vec<usize> {
    if output.takes_any_order() && !executor.by_index() {
        // Where places do not matter, the largest first: the small ones then fill the gaps at the end.
        written.sort_by_key(|&index| std::cmp::Reverse(image.layers[index].blob.size()));
    }
    written
}

async fn run_layers(
    image: &Image,
    mut coming: Coming,
    plan: &Arc<LayerPlan>,
    output: &Arc<dyn ImageOutput>,
    executor: &Arc<dyn Executor>,
    progress: &Progress,
) -> Result<HashMap<usize, WrittenLayer>, Error> {
    let mut running = JoinSet::new();
    let mut done = HashMap::new();
    let mut is_all = false;
    loop {
        // Either branch may be dropped: neither takes anything before it is ready.
        tokio::select! {
            biased;
            next = coming.next(), if !is_all && running.len() < executor.at_once().max(1) => {
                let Some(arrival) = next else {
                    is_all = true;
                    continue;
                };
                let index = arrival.index;
                let task = LayerTask {
                    layer: image.layers[index].clone(),
                    plan: Arc::clone(plan),
                    output: Arc::clone(output),
                    progress: progress.clone(),
                };
                let executor = Arc::clone(executor);
                let total = image.layers.len();
                let run = async move {
                    let _arrival = arrival;
                    let (label, action) = (task.layer.label(), task.output.action());
                    let result = executor.run(task).await;
                    result.map_err(|error| Error::in_layer(action, index, total, label, error))
                };
                running.spawn(run.in_current_span());
            }
            Some(ended) = running.join_next(), if !running.is_empty() => match ended {
                Ok(Ok(written)) => {
                    done.insert(written.index, written);
                }
                Ok(Err(error)) => {
                    // The first failure ends every other layer that is on its way, before the output cleans up behind them.
                    running.shutdown().await;
                    return Err(error);
                }
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            },
            else => return Ok(done),
        }
    }
}

/// Every position of the image, by index: a repeated layer gets what its first occurrence got, reports included.
fn place(
    image: &Image,
    distinct: &[usize],
    done: &HashMap<usize, WrittenLayer>,
    progress: &Progress,
) -> Vec<WrittenLayer> {
    let positions = distinct.iter().enumerate();
    positions
        .map(|(index, first)| {
            if index != *first {
                progress.layers()[index].set(LayerState::Reused);
            }
            WrittenLayer { index: image.layers[index].index, ..done[first].clone() }
        })
        .collect()
}

/// The config with the diff_ids as they are now and the filters' own edits; the source's bytes where that changes nothing.
fn final_config(image: &Image, plan: &LayerPlan, layers: &[WrittenLayer]) -> Result<Bytes, Error> {
    let original = &image.config.original;
    let Some(document) = &image.config.document else {
        // An artifact's config is copied as it is.
        return Ok(original.clone().unwrap_or_default());
    };
    let fail = |source: ConfigError| Error::Config { image: image.name.to_string(), source };
    let mut patched = document.clone();
    for layer in layers {
        if let Some(diff_id) = &layer.diff_id {
            patched.patch_diff_id(layer.index, diff_id.clone()).map_err(fail)?;
        }
    }
    let bytes = patched.to_bytes().map_err(fail)?;
    let mut config = serde_json::from_slice(&bytes).expect("what was just written parses");
    match original {
        _ if plan.chain.edit_config(&mut config) => {
            Ok(serde_json::to_vec(&config).expect("a JSON value can be written").into())
        }
        Some(original) if patched == *document => Ok(original.clone()),
        _ => Ok(bytes),
    }
}

impl Outcome {
    /// What the filters have to say, in their order: to be printed, or appended to files.
    pub fn renderings(&self, chain: &FilterChain, format: OutputFormat) -> Vec<Rendering> {
        self.placed_renderings(chain, format).into_iter().map(|(_, rendering)| rendering).collect()
    }

    /// The same, each with the place of its filter in the chain.
    pub fn placed_renderings(&self, chain: &FilterChain, format: OutputFormat) -> Vec<(usize, Rendering)> {
        let mut renderings = Vec::new();
        let source = self.image.config.document.as_ref();
        let raw = source.map(|config| serde_json::Value::Object(config.raw().clone())).unwrap_or_default();
        for (position, filter) in chain.filters().iter().enumerate() {
            let mut config = raw.clone();
            chain.edit_config_before(position, &mut config);
            let hexes: Vec<String> = self.image.layers.iter().map(shown_hex).collect();
            let layers = self.layers.iter().zip(&self.image.layers).zip(&hexes);
            let layers: Vec<_> = layers
                .map(|((written, layer), hex)| LayerFindings {
                    hex,
                    digest: layer.descriptor.as_ref().map(|descriptor| &descriptor.digest),
                    report: written.reports.get(position).and_then(Option::as_ref),
                })
                .collect();
            let findings = ImageFindings {
                image: &self.image.name.repository,
                tag: self.image.name.tag.as_deref().unwrap_or_default(),
                config: &config,
                layers: &layers,
            };
            renderings.extend(filter.render(&findings, format).map(|rendering| (position, rendering)));
        }
        renderings
    }
}

/// The hex by which people know a layer: of the diff_id, which is the same in a saved tar and in a registry.
fn shown_hex(layer: &Layer) -> String {
    match (&layer.diff_id, &layer.descriptor) {
        (Some(digest), _) => digest.hex().to_owned(),
        (None, Some(descriptor)) => descriptor.digest.hex().to_owned(),
        (None, None) => layer.index.to_string(),
    }
}

fn stored_size(image: &Image, layer: &WrittenLayer) -> u64 {
    match &layer.stored {
        StoredLayer::Written { size, .. } => *size,
        StoredLayer::Original => image.layers[layer.index].blob.size().unwrap_or(0),
    }
}
