//! `occyctl process`: an image from a source, through filters, to a destination.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use occy_pipeline::copy::SignaturePolicy;
use occy_pipeline::element::StoredLayer;
use occy_pipeline::error::Error;
use occy_pipeline::executor::LocalExecutor;
use occy_pipeline::filter::{self, FilterChain, Rendering, Target};
use occy_pipeline::index::{Attestations, DoneIndex, IndexPlan, StaleAttestation, process_index};
use occy_pipeline::manifest::Descriptor;
use occy_pipeline::named::{Attached, Beside, process_named};
use occy_pipeline::open::{self, Settings};
use occy_pipeline::output::{OUTPUTS, Receipt};
use occy_pipeline::process::{Outcome, Summary};
use occy_pipeline::progress::Progress;
use occy_pipeline::source::stored::SourceIndex;
use occy_pipeline::task::LayerPlan;
use occy_pipeline::uri::Uri;
use occy_pipeline::wire::convert;
use serde_json::json;

use super::{counted, kept_document, print_bytes, print_json, tell_kept};
use crate::display::Display;
use crate::options::{self, Global, OutputFormat, Process};
use crate::remote::call::{self, Sent};
use crate::remote::connect::Coordinator;
use crate::remote::logins::{Which, logins};
use crate::remote::{findings, is_registry, spec};
use crate::settings::{Misused, plan, settings};
use crate::{Exit, Untold, say};

pub(crate) async fn run(options: &Process, global: &Global) -> anyhow::Result<Exit> {
    let work = &options.work;
    let is_stdout = work.destination.ends_with("://-");
    if is_stdout && std::io::stdout().is_terminal() {
        let reason = format!("{} is a terminal here, which a tar would spoil: redirect it", work.destination);
        return Err(Misused(reason).into());
    }
    warn_of_idle(options);
    let told = match &global.coordinator {
        Some(_) => with_coordinator(options, global).await?.with(&Attached::default()),
        None => match here(options, global, is_stdout).await? {
            Some(told) => told,
            // An index was worked on as a whole, and has told of itself.
            None => return Ok(Exit::Done),
        },
    };
    // The destination itself is standard output: what else there is to say goes to standard error.
    told.tell(global, is_stdout).map_err(Untold)?;
    told.files.keep();
    Ok(Exit::Done)
}

fn opened(options: &Process, global: &Global) -> anyhow::Result<Settings> {
    let work = &options.work;
    let mut settings = settings(global, &work.source, Some(&work.destination))?;
    settings.compression = work.compression;
    settings.format = work.format.unwrap_or_default();
    settings.force = options.force;
    settings.verify = options.verify;
    settings.foreign_layers = work.foreign_layers;
    if replaces_source(&work.source, &work.destination, options.force) {
        let problem = format!("--force would replace {}, and the source is in it", work.destination);
        return Err(Misused(problem).into());
    }
    Ok(settings)
}

/// Whether a directory is to be replaced that has the source in it, or is the source.
fn replaces_source(source: &str, destination: &str, force: bool) -> bool {
    let (Ok(source), Ok(destination)) = (Uri::parse(source), Uri::parse(destination)) else { return false };
    // What is wrong with a flag is said where it is used.
    let is_set = |name: &str| destination.flag(name).unwrap_or_default();
    if !(force || is_set("force")) || is_set("unique_names") {
        return false;
    }
    let path = |uri: &Uri, schemes: &[&str]| {
        let is_path = schemes.contains(&uri.scheme.as_str());
        is_path.then(|| Path::new(&uri.rest).canonicalize().ok()).flatten()
    };
    let source = path(&source, &["tar", "dir", "oci-layout"]);
    let destination = path(&destination, &["dir", "oci"]);
    source.zip(destination).is_some_and(|(source, destination)| source.starts_with(destination))
}

/// Tells of options that mean nothing to the destination.
fn warn_of_idle(options: &Process) {
    let scheme = options.work.destination.split("://").next().unwrap_or_default();
    let Some(kind) = OUTPUTS.iter().find(|kind| kind.scheme == scheme) else { return };
    for (option, is_given) in [
        ("compression", options.work.compression.is_some()),
        ("format", options.work.format.is_some()),
        ("force", options.force),
        ("verify", options.verify),
    ] {
        if is_given && !kind.options.contains(&option) {
            tracing::warn!("--{option} means nothing to {scheme}://");
        }
    }
}

/// In this process. None for an index that was worked on as a whole.
async fn here(options: &Process, global: &Global, is_stdout: bool) -> anyhow::Result<Option<Told>> {
    let work = &options.work;
    let settings = opened(options, global)?;
    let chain = FilterChain::parse(&work.filters).map_err(Error::from)?;
    let source = open::source(&work.source, &settings)?;
    let output = open::output(&work.destination, &settings)?;
    let parallel = source.max_workers.max(output.max_workers).unwrap_or(settings.parallel);
    let files = Files::open(&chain)?;
    let plan = plan(global, &settings, chain, work.verify_diff_ids);
    let executor = LocalExecutor::new(parallel);
    if options.all
        && let Some(index) = source.end.index().await?
    {
        let attestations = match options.attestations {
            None | Some(options::Attestations::Drop) => Attestations::Drop,
            Some(options::Attestations::Retarget) => Attestations::Retarget,
        };
        let begin = display_each(global, &index.name.to_string(), &plan);
        let signatures = options.signatures.map(Into::into).unwrap_or_default();
        let beside = Beside { signatures, provenance: options.provenance };
        let plan = IndexPlan { layers: plan, attestations, beside, executor, begin: begin.1 };
        let done = process_index(source.end.as_ref(), &index, &plan, output.end.as_ref()).await?;
        drop(begin.0.lock().unwrap_or_else(PoisonError::into_inner).take());
        tell_index(&index, &done, &plan.layers.chain, global, is_stdout).map_err(Untold)?;
        files.keep();
        return Ok(None);
    }
    let progress = Progress::default();
    let display = Display::start(global, progress.clone(), &work.source, &settings.spools);
    let signatures = options.signatures.map_or(SignaturePolicy::Drop, Into::into);
    let beside = Beside { signatures, provenance: options.provenance };
    let (outcome, attached) =
        process_named(source.end.as_ref(), plan.clone(), output.end, executor, beside, &progress).await?;
    drop(display);
    let renderings = outcome.renderings(&plan.chain, rendered(global));
    tell_kept(&attached.kept);
    Ok(Some(Told::of(&outcome, renderings, files).with(&attached)))
}

/// By a coordinator.
async fn with_coordinator(options: &Process, global: &Global) -> anyhow::Result<Told> {
    let work = &options.work;
    spec::refuse_registry_options(global, &[&work.source, &work.destination])?;
    if options.all {
        let problem = "--all cannot be had with --coordinator: an index is copied whole by this process only";
        return Err(Misused(problem.to_owned()).into());
    }
    if options.signatures.is_some() || options.provenance {
        let problem =
            "--signatures and --provenance cannot be had with --coordinator: this process alone sees to them";
        return Err(Misused(problem.to_owned()).into());
    }
    let settings = opened(options, global)?;
    let chain = findings::chain(&work.filters).map_err(Error::from)?;
    let mut spec = spec::of_work(work, global);
    // What is written wrongly is said before anything is opened, whosever it is.
    let (source, output) =
        (open::source(&work.source, &settings)?, open::output(&work.destination, &settings)?);
    let source = (!is_registry(&work.source)).then_some(source);
    let output = (!is_registry(&work.destination)).then_some(output);
    if let Some(workers) = source.as_ref().and_then(|source| source.max_workers) {
        spec.parallel = convert::count(workers);
    }
    if let Some(output) = &output {
        spec = spec::to_here(spec, output.end.form());
    }
    let files = Files::open(&chain)?;
    let coordinator = Coordinator::needed(global, "process").await?;
    let progress = Progress::default();
    let display = Display::start(global, progress.clone(), &work.source, &settings.spools);
    let logins = logins(global, &coordinator, &work.source, Some(&work.destination), Which::All).await?;
    let call = call::Plan {
        spec,
        logins,
        source: source.map(|source| source.end),
        sending: plan(global, &settings, FilterChain::default(), false),
        chain: chain.clone(),
        format: rendered(global),
        progress,
    };
    let told = match output {
        None => Told::of_sent(call::send(&coordinator, call).await?, files),
        Some(output) => {
            // What has passed the filters is looked at no more: only the output wants to know which they were.
            let layers = plan(global, &settings, chain, work.verify_diff_ids);
            let (outcome, renderings) = call::receive(&coordinator, call, layers, output.end).await?;
            Told::of(&outcome, renderings, files)
        }
    };
    drop(display);
    Ok(told)
}

/// Everything that is to be told of an image.
struct Told {
    renderings: Vec<Rendering>,
    receipt: Receipt,
    summary: Summary,
    document: serde_json::Value,
    files: Files,
}

impl Told {
    fn of(outcome: &Outcome, renderings: Vec<Rendering>, files: Files) -> Self {
        let (receipt, summary) = (outcome.receipt.clone(), outcome.summary);
        Self { renderings, receipt, summary, document: document(outcome), files }
    }

    /// With what was put beside the image.
    fn with(mut self, attached: &Attached) -> Self {
        self.document["signatures_kept"] = kept_document(&attached.kept);
        self.document["provenance"] = json!(attached.provenance);
        self
    }

    /// Of an image that a coordinator has written.
    fn of_sent(sent: Sent, files: Files) -> Self {
        let Sent { result, layers, renderings, elapsed } = sent;
        let named = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let receipt = Receipt {
            manifest_digest: result.manifest_digest.parse().ok(),
            manifest_media_type: named(&result.manifest_media_type),
            manifest_size: None,
            manifest: None,
            destination: result.destination,
        };
        let summary = Summary { bytes: result.bytes, layers: result.layer_count as usize, elapsed };
        let layers = layers.iter().map(|layer| {
            let compression = convert::format(layer.compression()).map(|format| format.to_string());
            json!({
                "index": layer.index,
                "source": named(&layer.source_digest),
                "stored": (!layer.kept)
                    .then(|| json!({"digest": layer.digest, "size": layer.size, "compression": compression})),
                "diff_id": named(&layer.diff_id),
                "edited": layer.changed,
            })
        });
        let document = image_document(&result.image, &receipt, &summary, layers);
        Self { renderings, receipt, summary, document, files }
    }

    /// Prints it. What cannot be told does not keep the rest from being told.
    fn tell(&self, global: &Global, stdout_is_taken: bool) -> anyhow::Result<()> {
        let mut told = Ok(());
        for rendering in &self.renderings {
            told = told.and(deliver(rendering, stdout_is_taken));
        }
        match global.output_format {
            OutputFormat::Json if stdout_is_taken => say(&self.document.to_string()),
            OutputFormat::Json => told = told.and(print_json(&self.document).map(drop)),
            OutputFormat::Text if !global.quiet => {
                if let Some(digest) = &self.receipt.manifest_digest {
                    say(&format!("Pushed {} ({digest})", self.receipt.destination));
                }
            }
            OutputFormat::Text => {}
        }
        if !global.quiet {
            say(&self.summary.to_string());
        }
        told
    }
}

/// A display that is shown.
type Shown = Arc<Mutex<Option<Display>>>;
/// Begins the display of an entry of an index.
type Begin = Arc<dyn Fn(&Descriptor) -> Progress + Send + Sync>;

/// One display at a time: that of an image ends where the next one's begins.
fn display_each(global: &Global, name: &str, plan: &LayerPlan) -> (Shown, Begin) {
    let display = Shown::default();
    let (shown, global, name, spools) =
        (Arc::clone(&display), global.clone(), name.to_owned(), plan.spools.clone());
    let begin = move |_: &Descriptor| {
        let progress = Progress::default();
        let mut display = shown.lock().unwrap_or_else(PoisonError::into_inner);
        drop(display.take());
        *display = Some(Display::start(&global, progress.clone(), &name, &spools));
        progress
    };
    (display, Arc::new(begin))
}

/// `--all`: tells of a whole index.
fn tell_index(
    index: &SourceIndex,
    done: &DoneIndex,
    chain: &FilterChain,
    global: &Global,
    stdout_is_taken: bool,
) -> anyhow::Result<()> {
    let mut told = Ok(());
    for image in done.images.iter().filter(|image| image.is_filtered) {
        for rendering in image.outcome.renderings(chain, rendered(global)) {
            told = told.and(deliver(&rendering, stdout_is_taken));
        }
    }
    for stale in &done.dropped {
        tracing::warn!(
            "left out the attestation {}: it is about {}, which the filters made {}",
            stale.digest,
            stale.image,
            stale.became
        );
    }
    tell_kept(&done.attached.kept);
    for stale in &done.retargeted {
        tracing::warn!(
            "kept the attestation {} for {}: its statements still name {}",
            stale.digest,
            stale.became,
            stale.image
        );
    }
    let stale = |all: &[StaleAttestation]| {
        let all =
            all.iter().map(|one| json!({"digest": one.digest, "image": one.image, "became": one.became}));
        all.collect::<Vec<_>>()
    };
    match global.output_format {
        OutputFormat::Json => {
            let images: Vec<_> = done.images.iter().map(|image| document(&image.outcome)).collect();
            let document = json!({
                "image": index.name.to_string(),
                "destination": done.receipt.destination,
                "manifest_digest": done.receipt.manifest_digest,
                "manifest_media_type": done.receipt.manifest_media_type,
                "bytes": done.summary.bytes,
                "seconds": done.summary.elapsed.as_secs_f64(),
                "images": images,
                "signatures_kept": kept_document(&done.attached.kept),
                "provenance": done.attached.provenance,
                "attestations": {"dropped": stale(&done.dropped), "retargeted": stale(&done.retargeted)},
            });
            match stdout_is_taken {
                true => say(&document.to_string()),
                false => told = told.and(print_json(&document).map(drop)),
            }
        }
        OutputFormat::Text if !global.quiet => {
            if let Some(digest) = &done.receipt.manifest_digest {
                let count = counted(done.images.len(), "image");
                say(&format!("Pushed {} ({digest}), {count}", done.receipt.destination));
            }
        }
        OutputFormat::Text => {}
    }
    if !global.quiet {
        say(&done.summary.to_string());
    }
    told
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
pub(crate) fn rendered(global: &Global) -> filter::OutputFormat {
    match global.output_format {
        OutputFormat::Text => filter::OutputFormat::Text,
        OutputFormat::Json => filter::OutputFormat::Json,
    }
}

/// Prints what a filter found, or appends it to its file.
pub(crate) fn deliver(rendering: &Rendering, stdout_is_taken: bool) -> anyhow::Result<()> {
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
    let layers = outcome.layers.iter().map(|layer| {
        json!({
            "index": layer.index,
            "source": outcome.image.layers[layer.index].descriptor.as_ref().map(|descriptor| &descriptor.digest),
            "stored": match &layer.stored {
                StoredLayer::Original => json!(null),
                StoredLayer::Written { digest, size, format } => {
                    json!({"digest": digest, "size": size, "compression": format.to_string()})
                }
            },
            "diff_id": layer.diff_id,
            "edited": layer.edited,
        })
    });
    image_document(&outcome.image.name.to_string(), &outcome.receipt, &outcome.summary, layers)
}

fn image_document(
    image: &str,
    receipt: &Receipt,
    summary: &Summary,
    layers: impl Iterator<Item = serde_json::Value>,
) -> serde_json::Value {
    json!({
        "image": image,
        "destination": receipt.destination,
        "manifest_digest": receipt.manifest_digest,
        "manifest_media_type": receipt.manifest_media_type,
        "bytes": summary.bytes,
        "seconds": summary.elapsed.as_secs_f64(),
        "layers": layers.collect::<Vec<_>>(),
    })
}
