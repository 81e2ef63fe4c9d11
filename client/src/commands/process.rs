//! `occyctl process`: an image from a source, through filters, to a destination.

use std::io::Write;

use anyhow::Context;
use occy_pipeline::filter::{self, FilterChain, Rendering, Target};
use occy_pipeline::open;
use occy_pipeline::process::{Outcome, process};
use occy_pipeline::progress::Progress;
use serde_json::json;

use super::{print_bytes, print_json};
use crate::Exit;
use crate::display::Display;
use crate::options::{Global, OutputFormat, Process};
use crate::settings::{plan, settings};

pub(crate) async fn run(options: &Process, global: &Global) -> anyhow::Result<Exit> {
    let mut settings = settings(global)?;
    settings.compression = options.compression;
    settings.format = options.format.unwrap_or_default();
    let chain = FilterChain::parse(&options.filters).map_err(occy_pipeline::error::Error::from)?;
    let source = open::source(&options.source, &settings)?;
    let output = open::output(&options.destination, &settings)?;
    let parallel = source.max_workers.max(output.max_workers).unwrap_or(settings.parallel);
    let plan = plan(global, &settings, chain, options.verify_diff_ids);
    let progress = Progress::default();
    let display = Display::start(global, progress.clone());
    let outcome = process(source.end.as_ref(), plan.clone(), output.end, parallel, &progress).await?;
    drop(display);
    // The destination itself is standard output: what else there is to say goes to standard error.
    let stdout_is_taken = options.destination == "tar://-";
    for rendering in outcome.renderings(&plan.chain, rendered(global)) {
        deliver(&rendering, stdout_is_taken)?;
    }
    match global.output_format {
        OutputFormat::Json if stdout_is_taken => eprintln!("{}", document(&outcome)),
        OutputFormat::Json => {
            print_json(&document(&outcome))?;
        }
        OutputFormat::Text if !global.quiet => {
            if let Some(digest) = &outcome.receipt.manifest_digest {
                eprintln!("Pushed {} ({digest})", outcome.receipt.destination);
            }
        }
        OutputFormat::Text => {}
    }
    if !global.quiet {
        eprintln!("{}", outcome.summary);
    }
    Ok(Exit::Done)
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
        Target::Stdout if stdout_is_taken => eprint!("{}", rendering.text),
        Target::Stdout => {
            print_bytes(rendering.text.as_bytes())?;
        }
        Target::Append(path) => {
            let mut file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("failed to open {}", path.display()))?;
            // One write: the lines of processes that append to the same file do not mix.
            file.write_all(rendering.text.as_bytes())
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
