//! `occyctl process`: an image from a source, through filters, to a destination.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use occy_pipeline::executor::{Executor, LocalExecutor};
use occy_pipeline::filter::{self, FilterChain, Rendering, Target};
use occy_pipeline::index::{IndexPlan, process_index};
use occy_pipeline::manifest::Descriptor;
use occy_pipeline::open;
use occy_pipeline::output::{ImageOutput, OUTPUTS};
use occy_pipeline::process::{Outcome, process};
use occy_pipeline::progress::Progress;
use occy_pipeline::source::ImageSource;
use occy_pipeline::source::stored::SourceIndex;
use occy_pipeline::task::LayerPlan;
use serde_json::json;

use super::{print_bytes, print_json};
use crate::display::Display;
use crate::options::{Global, OutputFormat, Process};
use crate::settings::{Misused, plan, settings};
use crate::{Exit, Untold, say};

pub(crate) async fn run(options: &Process, global: &Global) -> anyhow::Result<Exit> {
    let mut settings = settings(global, &options.source, Some(&options.destination))?;
    settings.compression = options.compression;
    settings.format = options.format.unwrap_or_default();
    settings.force = options.force;
    settings.verify = options.verify;
    settings.foreign_layers = options.foreign_layers;
    let chain = FilterChain::parse(&options.filters).map_err(occy_pipeline::error::Error::from)?;
    if options.destination.ends_with("://-") && std::io::stdout().is_terminal() {
        let reason =
            format!("{} is a terminal here, which a tar would spoil: redirect it", options.destination);
        return Err(Misused(reason).into());
    }
    let source = open::source(&options.source, &settings)?;
    let output = open::output(&options.destination, &settings)?;
    let parallel = source.max_workers.max(output.max_workers).unwrap_or(settings.parallel);
    let files = Files::open(&chain)?;
    warn_of_idle(options);
    let plan = plan(global, &settings, chain, options.verify_diff_ids);
    if options.all
        && let Some(index) = source.end.index().await?
    {
        let executor = LocalExecutor::new(parallel);
        return copy_all(source.end.as_ref(), &index, plan, executor, output.end.as_ref(), global).await;
    }
    let progress = Progress::default();
    let display = Display::start(global, progress.clone(), &options.source, &settings.spools);
    let executor = LocalExecutor::new(parallel);
    let outcome = process(source.end.as_ref(), plan.clone(), output.end, executor, &progress).await?;
    drop(display);
    // The destination itself is standard output: what else there is to say goes to standard error.
    let stdout_is_taken = options.destination.ends_with("://-");
    tell(&outcome, &plan.chain, global, stdout_is_taken).map_err(Untold)?;
    files.keep();
    Ok(Exit::Done)
}

/// Tells of options that mean nothing to the destination.
fn warn_of_idle(options: &Process) {
    let scheme = options.destination.split("://").next().unwrap_or_default();
    let Some(kind) = OUTPUTS.iter().find(|kind| kind.scheme == scheme) else { return };
    for (option, is_given) in [
        ("compression", options.compression.is_some()),
        ("format", options.format.is_some()),
        ("force", options.force),
        ("verify", options.verify),
    ] {
        if is_given && !kind.options.contains(&option) {
            tracing::warn!("--{option} means nothing to {scheme}://");
        }
    }
}

/// Prints what came of an image. What cannot be told does not keep the rest from being told.
fn tell(
    outcome: &Outcome,
    chain: &FilterChain,
    global: &Global,
    stdout_is_taken: bool,
) -> anyhow::Result<()> {
    let mut told = Ok(());
    for rendering in outcome.renderings(chain, rendered(global)) {
        told = told.and(deliver(&rendering, stdout_is_taken));
    }
    match global.output_format {
        OutputFormat::Json if stdout_is_taken => say(&document(outcome).to_string()),
        OutputFormat::Json => told = told.and(print_json(&document(outcome)).map(drop)),
        OutputFormat::Text if !global.quiet => {
            if let Some(digest) = &outcome.receipt.manifest_digest {
                say(&format!("Pushed {} ({digest})", outcome.receipt.destination));
            }
        }
        OutputFormat::Text => {}
    }
    if !global.quiet {
        say(&outcome.summary.to_string());
    }
    told
}

/// `--all`: a whole index.
async fn copy_all(
    source: &dyn ImageSource,
    index: &SourceIndex,
    layers: Arc<LayerPlan>,
    executor: Arc<dyn Executor>,
    output: &dyn ImageOutput,
    global: &Global,
) -> anyhow::Result<Exit> {
    // One display at a time: that of an image ends where the next one's begins.
    let display = Arc::new(Mutex::new(None));
    let (shown, shared) = (global.clone(), Arc::clone(&display));
    let (name, spools) = (index.name.to_string(), layers.spools.clone());
    let begin = move |_: &Descriptor| {
        let progress = Progress::default();
        let mut display = shared.lock().unwrap_or_else(PoisonError::into_inner);
        drop(display.take());
        *display = Some(Display::start(&shown, progress.clone(), &name, &spools));
        progress
    };
    let plan = IndexPlan { layers, executor, begin: Arc::new(begin) };
    let copied = process_index(source, index, &plan, output).await?;
    drop(display.lock().unwrap_or_else(PoisonError::into_inner).take());
    match global.output_format {
        OutputFormat::Json => {
            let images: Vec<_> = copied.images.iter().map(document).collect();
            print_json(&json!({
                "image": index.name.to_string(),
                "destination": copied.receipt.destination,
                "manifest_digest": copied.receipt.manifest_digest,
                "manifest_media_type": copied.receipt.manifest_media_type,
                "bytes": copied.summary.bytes,
                "seconds": copied.summary.elapsed.as_secs_f64(),
                "images": images,
            }))
            .map_err(Untold)?;
        }
        OutputFormat::Text if !global.quiet => {
            if let Some(digest) = &copied.receipt.manifest_digest {
                let count = copied.images.len();
                say(&format!("Pushed {} ({digest}), {count} images", copied.receipt.destination));
            }
        }
        OutputFormat::Text => {}
    }
    if !global.quiet {
        say(&copied.summary.to_string());
    }
    Ok(Exit::Done)
}

/// The files that filters append to, opened before anything is written elsewhere: one that cannot be opened stops the run while
/// the destination is still as it was. Those that this run created are removed again when it fails.
struct Files(Vec<PathBuf>);

impl Files {
    fn open(chain: &FilterChain) -> anyhow::Result<Self> {
        let mut created = Self(Vec::new());
        for path in chain.filters().iter().filter_map(|filter| filter.file()) {
            let is_new = !path.exists();
            append(path)?;
            if is_new {
                created.0.push(path.to_owned());
            }
        }
        Ok(created)
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            if path.metadata().is_ok_and(|metadata| metadata.len() == 0) {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

fn append(path: &Path) -> anyhow::Result<File> {
    let file = File::options().create(true).append(true).open(path);
    file.with_context(|| format!("failed to open {}", path.display()))
}

/// The form in which filters print.
pub(super) fn rendered(global: &Global) -> filter::OutputFormat {
    match global.output_format {
        OutputFormat::Text => filter::OutputFormat::Text,
        OutputFormat::Json => filter::OutputFormat::Json,
    }
}

/// Prints what a filter found, or appends it to its file.
pub(super) fn deliver(rendering: &Rendering, stdout_is_taken: bool) -> anyhow::Result<()> {
    match &rendering.to {
        Target::Stdout if stdout_is_taken => say(rendering.text.trim_end_matches('\n')),
        Target::Stdout => {
            print_bytes(rendering.text.as_bytes())?;
        }
        Target::Append(path) => {
            // One write: the lines of processes that append to the same file do not mix.
            append(path)?
                .write_all(rendering.text.as_bytes())
                .with_context(|| format!("failed to write to {}", path.display()))?;
        }
    }
    Ok(())
}

fn document(outcome: &Outcome) -> serde_json::Value {
    json!({
        "image": outcome.image.name.to_string(),
        "destination": outcome.receipt.destination,
        "manifest_digest": outcome.receipt.manifest_digest,
        "manifest_media_type": outcome.receipt.manifest_media_type,
        "bytes": outcome.summary.bytes,
        "seconds": outcome.summary.elapsed.as_secs_f64(),
        "layers": outcome.layers.iter().map(|layer| json!({
            "index": layer.index,
            "source": outcome.image.layers[layer.index].descriptor.as_ref().map(|descriptor| &descriptor.digest),
            "stored": match &layer.stored {
                occy_pipeline::element::StoredLayer::Original => json!(null),
                occy_pipeline::element::StoredLayer::Written { digest, size, format } => {
                    json!({"digest": digest, "size": size, "compression": format.to_string()})
                }
            },
            "diff_id": layer.diff_id,
            "edited": layer.edited,
        })).collect::<Vec<_>>(),
    })
}
