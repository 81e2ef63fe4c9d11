//! `occyctl process`: an image from a source, through filters, to a destination.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use occy_pipeline::copy::Signature;
use occy_pipeline::error::Error;
use occy_pipeline::executor::LocalExecutor;
use occy_pipeline::filter::{self, FilterChain, Rendering, Target};
use occy_pipeline::index::{DoneIndex, StaleAttestation};
use occy_pipeline::manifest::media_type::{DOCKER_MANIFEST_LIST, OCI_INDEX};
use occy_pipeline::named::Attached;
use occy_pipeline::open::{self, Opened, Settings};
use occy_pipeline::output::{ImageOutput, OUTPUTS, OutputError, Receipt};
use occy_pipeline::process::{Outcome, Summary};
use occy_pipeline::source::ImageSource;
use occy_pipeline::source::stored::SourceIndex;
use occy_pipeline::uri::Uri;
use occy_pipeline::whole::{Done, Wanted, process_whole};
use occy_pipeline::wire::{WireError, convert};
use occy_proto::v1::{self, ImageResult, IndexResult, LayerStatus};
use serde_json::json;

use super::{counted, kept_document, print_bytes, print_json, tell_kept};
use crate::display::Shown;
use crate::options::{Global, OutputFormat, Process, Work};
use crate::remote::call::{self, Sent};
use crate::remote::connect::Coordinator;
use crate::remote::lend::Lent;
use crate::remote::logins::{Which, logins};
use crate::remote::{findings, is_registry, names, spec};
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
        Some(_) => with_coordinator(options, global).await?,
        None => here(options, global).await?,
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

/// In this process.
async fn here(options: &Process, global: &Global) -> anyhow::Result<Told> {
    let work = &options.work;
    let settings = opened(options, global)?;
    let chain = FilterChain::parse(&work.filters).map_err(Error::from)?;
    let source = open::source(&work.source, &settings)?;
    let output = open::output(&work.destination, &settings)?;
    let parallel = source.max_workers.max(output.max_workers).unwrap_or(settings.parallel);
    let files = Files::open(&chain)?;
    let plan = plan(global, &settings, chain, work.verify_diff_ids);
    let executor = LocalExecutor::new(parallel);
    let shown = Shown::new(global, &work.source, &settings.spools);
    let (wanted, begin) = (options.whole.wanted(), shown.begin_each());
    let done = process_whole(source.end.as_ref(), plan.clone(), output.end, executor, wanted, begin).await?;
    shown.end();
    let renderings = done.filtered().flat_map(|image| image.renderings(&plan.chain, rendered(global)));
    let renderings = renderings.collect();
    Ok(match done {
        Done::Image(outcome, attached) => Told::of(&outcome, attached, renderings, files),
        Done::Index(index, done) => Told::of_index(&index, *done, renderings, files),
    })
}

/// By a coordinator.
async fn with_coordinator(options: &Process, global: &Global) -> anyhow::Result<Told> {
    let work = &options.work;
    spec::refuse_registry_options(global, &[&work.source, &work.destination])?;
    let wanted = options.whole.wanted();
    let settings = opened(options, global)?;
    let chain = findings::chain(&work.filters).map_err(Error::from)?;
    // What is written wrongly is said before anything is opened, whosever it is.
    let (source, output) =
        (open::source(&work.source, &settings)?, open::output(&work.destination, &settings)?);
    let asked = spec::asked(wanted);
    let is_whole = !asked.is_empty() && source.end.store().is_some() && output.end.content().is_some();
    if !is_whole {
        refuse_whole(work, wanted, source.end.as_ref(), output.end.as_ref(), global).await?;
    }
    let lent = if is_whole { Lent::of(&work.source, &work.destination, &settings)? } else { None };
    let spec = spec_of(options, global, &source, &output, is_whole, lent.as_ref());
    let is_streamed = |end: &str| lent.is_none() && !is_registry(end);
    let source = is_streamed(&work.source).then_some(source);
    let output = is_streamed(&work.destination).then_some(output);
    let files = Files::open(&chain)?;
    let coordinator = Coordinator::needed(global, "process").await?;
    if is_whole && lent.is_none() {
        coordinator.needs(&asked).await?;
    }
    let shown = Shown::new(global, &work.source, &settings.spools);
    let logins = logins(global, &coordinator, &work.source, Some(&work.destination), Which::All).await?;
    let call = call::Plan {
        spec,
        logins,
        source: source.map(|source| source.end),
        lent,
        sending: plan(global, &settings, FilterChain::default(), false),
        chain: chain.clone(),
        format: rendered(global),
        begin: shown.begin_each(),
    };
    let told = match output {
        None => Told::of_sent(call::send(&coordinator, call).await?, files)?,
        Some(output) => {
            // What has passed the filters is looked at no more: only the output wants to know which they were.
            let layers = plan(global, &settings, chain, work.verify_diff_ids);
            let received = call::receive(&coordinator, call, layers, output.end, wanted.beside()).await?;
            let ((outcome, attached), renderings) = received;
            Told::of(&outcome, attached, renderings, files)
        }
    };
    shown.end();
    Ok(told)
}

/// What the coordinator is asked for: with what is wanted besides the image, where both ends have room for that (`is_whole`).
fn spec_of(
    options: &Process,
    global: &Global,
    source: &Opened<Box<dyn ImageSource>>,
    output: &Opened<Arc<dyn ImageOutput>>,
    is_whole: bool,
    lent: Option<&Lent>,
) -> v1::PipelineSpec {
    let work = &options.work;
    let (from_here, to_here) = (!is_registry(&work.source), !is_registry(&work.destination));
    let mut spec = spec::of_work(work, global);
    if is_whole {
        spec = spec::with_wanted(spec, options.whole.wanted());
    }
    match lent {
        Some(lent) => spec = spec::with_lent(spec, lent),
        None if to_here => spec = spec::to_here(spec, output.end.form()),
        None => {}
    }
    // Of ends that it does not open, the coordinator is told how many layers at once they are for.
    let source_workers = source.max_workers.filter(|_| from_here);
    let output_workers = output.max_workers.filter(|_| to_here && lent.is_some());
    if let Some(workers) = source_workers.max(output_workers) {
        spec.parallel = convert::count(workers);
    }
    spec
}

/// Fails as without a coordinator where an end has no room for what is wanted besides the image. What [`call::receive`] puts
/// beside an image, it refuses by itself.
async fn refuse_whole(
    work: &Work,
    wanted: Wanted,
    source: &dyn ImageSource,
    output: &dyn ImageOutput,
    global: &Global,
) -> anyhow::Result<()> {
    if is_registry(&work.destination) {
        // A source without manifests has nothing that could be signed, or that a statement could name.
        let problem = (wanted.provenance && source.store().is_none()).then_some(Error::NoSourceManifest);
        return problem.map_or(Ok(()), |problem| Err(problem.into()));
    }
    if wanted.all && output.content().is_none() {
        let index = match source.store() {
            Some(store) if is_registry(&work.source) => {
                // Which of its images is no question.
                let name = work.source.split('?').next().unwrap_or_default();
                let resolved = names::resolve(name, None, global).await?;
                [OCI_INDEX, DOCKER_MANIFEST_LIST].contains(&&*resolved.media_type).then(|| store.name())
            }
            _ => source.index().await?.map(|index| index.name),
        };
        if let Some(index) = index.filter(|_| !wanted.beside().may_attach()) {
            return Err(Error::from(OutputError::NoIndexes { index: index.to_string() }).into());
        }
    }
    Ok(())
}

/// Everything that is to be told of an image or index.
struct Told {
    renderings: Vec<Rendering>,
    receipt: Receipt,
    summary: Summary,
    kept: Vec<Signature>,
    index: Option<ToldIndex>,
    document: serde_json::Value,
    files: Files,
}

/// What is to be told of an index besides.
struct ToldIndex {
    image_count: usize,
    dropped: Vec<StaleAttestation>,
    retargeted: Vec<StaleAttestation>,
}

impl Told {
    fn of(outcome: &Outcome, attached: Attached, renderings: Vec<Rendering>, files: Files) -> Self {
        let (receipt, summary) = (outcome.receipt.clone(), outcome.summary);
        Self {
            renderings,
            receipt,
            summary,
            document: document(outcome),
            kept: Vec::new(),
            index: None,
            files,
        }
        .with(attached)
    }

    fn of_index(index: &SourceIndex, done: DoneIndex, renderings: Vec<Rendering>, files: Files) -> Self {
        let DoneIndex { receipt, images, dropped, retargeted, attached, summary, .. } = done;
        let documents: Vec<_> = images.iter().map(|image| document(&image.outcome)).collect();
        let told = ToldIndex { image_count: images.len(), dropped, retargeted };
        Self::of_images(&index.name.to_string(), (receipt, summary), &documents, told, renderings, files)
            .with(attached)
    }

    /// Of an image or index that a coordinator has written.
    fn of_sent(sent: Sent, files: Files) -> anyhow::Result<Self> {
        let Sent { result, layers, images, renderings, elapsed } = sent;
        let attached = convert::attached(&result)?;
        let receipt = receipt(&result);
        let summary = Summary { elapsed, ..summary(&result) };
        let told = match &result.index {
            None => {
                let document = image_document(&result.image, &receipt, &summary, &layers);
                Self { renderings, receipt, summary, document, kept: Vec::new(), index: None, files }
            }
            Some(index) => {
                let documents = images.iter().map(|(image, layers)| {
                    image_document(&image.image, &self::receipt(image), &self::summary(image), layers)
                });
                let told = told_index(index, images.len())?;
                let (documents, ends): (Vec<_>, _) = (documents.collect(), (receipt, summary));
                Self::of_images(&result.image, ends, &documents, told, renderings, files)
            }
        };
        Ok(told.with(attached))
    }

    fn of_images(
        name: &str,
        (receipt, summary): (Receipt, Summary),
        images: &[serde_json::Value],
        told: ToldIndex,
        renderings: Vec<Rendering>,
        files: Files,
    ) -> Self {
        let stale = |all: &[StaleAttestation]| {
            let all =
                all.iter().map(|one| json!({"digest": one.digest, "image": one.image, "became": one.became}));
            all.collect::<Vec<_>>()
        };
        let document = json!({
            "image": name,
            "destination": receipt.destination,
            "manifest_digest": receipt.manifest_digest,
            "manifest_media_type": receipt.manifest_media_type,
            "bytes": summary.bytes,
            "seconds": summary.elapsed.as_secs_f64(),
            "images": images,
            "attestations": {"dropped": stale(&told.dropped), "retargeted": stale(&told.retargeted)},
        });
        Self { renderings, receipt, summary, document, kept: Vec::new(), index: Some(told), files }
    }

    /// With what was put beside it.
    fn with(mut self, attached: Attached) -> Self {
        self.document["signatures_kept"] = kept_document(&attached.kept);
        self.document["provenance"] = json!(attached.provenance);
        self.kept = attached.kept;
        self
    }

    /// Prints it. What cannot be told does not keep the rest from being told.
    fn tell(&self, global: &Global, stdout_is_taken: bool) -> anyhow::Result<()> {
        let mut told = Ok(());
        for rendering in &self.renderings {
            told = told.and(deliver(rendering, stdout_is_taken));
        }
        tell_kept(&self.kept);
        if let Some(index) = &self.index {
            index.tell();
        }
        match global.output_format {
            OutputFormat::Json if stdout_is_taken => say(&self.document.to_string()),
            OutputFormat::Json => told = told.and(print_json(&self.document).map(drop)),
            OutputFormat::Text if !global.quiet => {
                if let Some(digest) = &self.receipt.manifest_digest {
                    let image_count = self.index.as_ref().map(|index| index.image_count);
                    say(&pushed(&self.receipt.destination, &digest.to_string(), image_count));
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

impl ToldIndex {
    /// Warns of attestations that are not what they were.
    fn tell(&self) {
        for stale in &self.dropped {
            tracing::warn!(
                "left out the attestation {}: it is about {}, which the filters made {}",
                stale.digest,
                stale.image,
                stale.became
            );
        }
        for stale in &self.retargeted {
            tracing::warn!(
                "kept the attestation {} for {}: its statements still name {}",
                stale.digest,
                stale.became,
                stale.image
            );
        }
    }
}

/// The line that says what there is now: an image, or an index of so many.
pub(crate) fn pushed(destination: &str, digest: &str, image_count: Option<usize>) -> String {
    let count = image_count.map(|count| format!(", {}", counted(count, "image"))).unwrap_or_default();
    format!("Pushed {destination} ({digest}){count}")
}

/// Of how many images an index is that a coordinator has written.
pub(crate) fn image_count(result: &ImageResult) -> Option<usize> {
    result.index.as_ref().map(|index| index.image_count as usize)
}

/// Warns of what belongs to something that a coordinator has written, and is not what it was.
pub(crate) fn tell_beside(result: &ImageResult) -> anyhow::Result<()> {
    tell_kept(&convert::attached(result)?.kept);
    if let Some(index) = &result.index {
        told_index(index, 0)?.tell();
    }
    Ok(())
}

fn told_index(index: &IndexResult, image_count: usize) -> Result<ToldIndex, WireError> {
    let stale = |all: &[v1::StaleAttestation]| all.iter().map(convert::stale).collect::<Result<Vec<_>, _>>();
    Ok(ToldIndex { image_count, dropped: stale(&index.dropped)?, retargeted: stale(&index.retargeted)? })
}

fn receipt(result: &ImageResult) -> Receipt {
    Receipt {
        manifest_digest: result.manifest_digest.parse().ok(),
        manifest_media_type: named(&result.manifest_media_type),
        destination: result.destination.clone(),
        ..Receipt::default()
    }
}

fn summary(result: &ImageResult) -> Summary {
    let elapsed = Duration::from_millis(result.elapsed_millis);
    Summary { bytes: result.bytes, layers: result.layer_count as usize, elapsed }
}

fn named(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
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
    let layers = outcome.image.layers.iter().zip(&outcome.layers);
    let layers: Vec<_> = layers.map(|(layer, written)| convert::layer_status(layer, written)).collect();
    image_document(&outcome.image.name.to_string(), &outcome.receipt, &outcome.summary, &layers)
}

fn image_document(
    image: &str,
    receipt: &Receipt,
    summary: &Summary,
    layers: &[LayerStatus],
) -> serde_json::Value {
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
