//! `occyctl copy`: whole images, indexes and artifacts, bit for bit.

use occy_pipeline::copy::{Copied, CopyPlan, copy};
use occy_pipeline::open;
use occy_pipeline::progress::Progress;
use serde_json::json;

use super::{counted, kept_document, print_json, tell_kept};
use crate::display::Display;
use crate::options::{Copy, Global, OutputFormat};
use crate::remote::{copy as remote, is_registry};
use crate::settings::settings;
use crate::{Exit, Untold, say};

pub(crate) async fn run(options: &Copy, global: &Global) -> anyhow::Result<Exit> {
    let (from, to) = (open::in_full(&options.source), open::in_full(&options.destination));
    let mut settings = settings(global, &from, Some(&to))?;
    settings.foreign_layers = options.foreign_layers;
    let mut platforms = options.platforms.clone();
    if platforms.is_empty() && settings.platform.is_given() {
        platforms.push(settings.platform.resolve());
    }
    let plan = CopyPlan {
        platforms,
        any_platform: false,
        sparse: options.sparse,
        referrers: options.referrers,
        preserve_digests: options.preserve_digests,
        signatures: options.signatures.map(Into::into).unwrap_or_default(),
        parallel: settings.parallel,
    };
    let source = open::store(&from, &settings)?;
    let output = open::content_output(&to, &settings)?;
    let progress = Progress::default();
    let display = Display::start(global, progress.clone(), &from, &settings.spools);
    let copied = match &global.coordinator {
        // What is between two layouts of this machine needs nobody else.
        Some(_) if [&from, &to].into_iter().any(|end| is_registry(end)) => {
            remote::copy((&from, &to), &plan, &settings, &progress, global).await?
        }
        _ => copy(source, output, &plan, &progress).await?,
    };
    drop(display);
    tell(&copied, &from, global).map_err(Untold)?;
    Ok(Exit::Done)
}

fn tell(copied: &Copied, source: &str, global: &Global) -> anyhow::Result<()> {
    if global.output_format == OutputFormat::Json {
        print_json(&document(copied, source))?;
    }
    if global.quiet {
        return Ok(());
    }
    for digest in &copied.left_out {
        tracing::info!("{digest} stays named and was not copied");
    }
    tell_kept(&copied.kept);
    let left_out = copied.left_out.len();
    let sparse = if left_out == 0 { String::new() } else { format!(", without {left_out} of what it names") };
    if global.output_format == OutputFormat::Text {
        say(&format!("Copied {} ({}){sparse}", copied.destination, copied.digest));
        let (listed, tagged): (Vec<_>, Vec<_>) = copied.referrers.iter().partition(|one| one.is_listed);
        let digest_tags = copied.digest_tags.len();
        if copied.referrers.len() + digest_tags > 0 {
            say(&format!(
                "Referrers: {} that the destination lists, {} under tags of their subjects; {digest_tags} tags of cosign",
                listed.len(),
                tagged.len(),
            ));
        }
    }
    let Copied { bytes, blobs, blobs_found, manifests, manifests_found, elapsed, .. } = copied;
    say(&format!(
        "Moved {bytes} bytes in {} and {} in {:.1} seconds; {} and {} were there or mounted",
        counted(*blobs, "blob"),
        counted(*manifests, "manifest"),
        elapsed.as_secs_f64(),
        counted(*blobs_found, "blob"),
        counted(*manifests_found, "manifest"),
    ));
    Ok(())
}

fn document(copied: &Copied, source: &str) -> serde_json::Value {
    let referrers = copied.referrers.iter().map(|referrer| {
        json!({
            "digest": referrer.digest,
            "subject": referrer.subject,
            "artifact_type": referrer.artifact_type,
            "listed": referrer.is_listed,
        })
    });
    json!({
        "source": source,
        "destination": copied.destination,
        "manifest_digest": copied.digest,
        "manifest_media_type": copied.media_type,
        "manifests": {"written": copied.manifests, "found": copied.manifests_found},
        "blobs": {"moved": copied.blobs, "found": copied.blobs_found},
        "bytes": copied.bytes,
        "seconds": copied.elapsed.as_secs_f64(),
        "referrers": referrers.collect::<Vec<_>>(),
        "digest_tags": copied.digest_tags,
        "signatures_kept": kept_document(&copied.kept),
        "left_out": copied.left_out,
    })
}
