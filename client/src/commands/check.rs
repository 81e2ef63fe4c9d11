//! `occyctl check`: whether every digest, diff_id and size of an image agrees.

use std::fmt::Write;

use occy_pipeline::check::{self, CheckReport, Severity};
use occy_pipeline::filter::FilterChain;
use occy_pipeline::open;
use occy_pipeline::progress::Progress;
use occy_pipeline::tar::path::printable;

use super::{print_bytes, print_json};
use crate::Exit;
use crate::display::Display;
use crate::options::{Check, Global, OutputFormat};
use crate::remote::{is_registry, look};
use crate::settings::{plan, settings};

pub(crate) async fn run(options: &Check, global: &Global) -> anyhow::Result<Exit> {
    // An image that is here is read here: to send it away would prove nothing more.
    let report = match &global.coordinator {
        Some(_) if is_registry(&options.source) => look::check(options, global).await?,
        _ => here(options, global).await?,
    };
    match global.output_format {
        OutputFormat::Json => print_json(&report)?,
        OutputFormat::Text => print_bytes(text(&report, options)?.as_bytes())?,
    };
    Ok(if report.is_sound() { Exit::Done } else { Exit::Unsound })
}

async fn here(options: &Check, global: &Global) -> anyhow::Result<CheckReport> {
    let settings = settings(global, &options.source, None)?;
    let source = open::source(&options.source, &settings)?;
    let parallel = source.max_workers.unwrap_or(settings.parallel);
    let plan = plan(global, &settings, FilterChain::default(), true);
    let progress = Progress::default();
    let _display = Display::start(global, progress.clone(), &options.source, &settings.spools);
    Ok(check::check(source.end.as_ref(), plan, options.fast, parallel, &progress).await?)
}

fn text(report: &CheckReport, options: &Check) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        match finding.layer {
            Some(index) => {
                writeln!(
                    out,
                    "{severity}: layer {} of {}: {}",
                    index + 1,
                    report.layers,
                    printable(finding.message.as_bytes())
                )?;
            }
            None => writeln!(out, "{severity}: {}", printable(finding.message.as_bytes()))?,
        }
    }
    let image = printable(report.image.as_deref().unwrap_or(&options.source).as_bytes());
    let errors = report.findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    let read =
        if options.fast { "not read (--fast)".to_owned() } else { format!("{} verified", report.verified) };
    match errors {
        0 => writeln!(out, "OK: {image}: {} layer(s), {read}", report.layers)?,
        errors => writeln!(out, "BROKEN: {image}: {errors} error(s); {} layer(s), {read}", report.layers)?,
    }
    Ok(out)
}
