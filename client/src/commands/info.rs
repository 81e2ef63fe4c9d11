//! `occyctl info`: what an image is made of, as its manifest and config say.

use std::fmt::Write;

use occy_pipeline::element::{Image, Layer};
use occy_pipeline::open;
use occy_pipeline::progress::Progress;
use occy_pipeline::source::stored::SourceIndex;
use occy_pipeline::tar::path::printable;
use serde_json::json;

use super::{print_bytes, print_json};
use crate::Exit;
use crate::display::Display;
use crate::options::{Global, Info, OutputFormat};
use crate::remote::{is_registry, look};
use crate::settings::settings;

pub(crate) async fn run(options: &Info, global: &Global) -> anyhow::Result<Exit> {
    // An image that is here is looked at here: no coordinator could say anything else of it.
    let (image, index) = match &global.coordinator {
        Some(_) if is_registry(&options.source) => look::inspect(&options.source, global).await?,
        _ => here(options, global).await?,
    };
    match global.output_format {
        OutputFormat::Json => {
            let mut document = document(&image);
            document["index"] = index.as_ref().map(index_document).unwrap_or_default();
            print_json(&document)
        }
        OutputFormat::Text => {
            let mut text = text(&image)?;
            if let Some(index) = &index {
                text.push_str(&index_text(index)?);
            }
            print_bytes(text.as_bytes())
        }
    }
}

async fn here(options: &Info, global: &Global) -> anyhow::Result<(Image, Option<SourceIndex>)> {
    let settings = settings(global, &options.source, None)?;
    let source = open::source(&options.source, &settings)?;
    let _display = Display::start(global, Progress::default(), &options.source, &settings.spools);
    let mut image = source.end.image().await?;
    // An engine tells the config only behind the layers of its export.
    source.end.settle(&mut image).await?;
    Ok((image, source.end.index().await?))
}

/// The index that the image was chosen from.
fn index_document(index: &SourceIndex) -> serde_json::Value {
    let entries = index.parsed.manifests.iter();
    json!({
        "digest": index.manifest.digest,
        "media_type": index.parsed.family.index(),
        "manifests": entries.map(|entry| json!({
            "platform": entry.platform.as_ref().map(ToString::to_string),
            "digest": entry.digest,
            "media_type": entry.media_type,
            "size": entry.size,
        })).collect::<Vec<_>>(),
    })
}

fn index_text(index: &SourceIndex) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "Index:     {}", index.manifest.digest)?;
    for entry in &index.parsed.manifests {
        let platform = entry.platform.as_ref().map(ToString::to_string).unwrap_or_else(|| "any".to_owned());
        writeln!(out, "  {:<16} {}", printable(platform.as_bytes()), entry.digest)?;
    }
    Ok(out)
}

fn document(image: &Image) -> serde_json::Value {
    let config = image.config.document.as_ref();
    let layers: Vec<_> = image.layers.iter().map(layer_document).collect();
    let history: Vec<_> = config.map(|config| config.history()).unwrap_or_default();
    json!({
        "name": image.name.to_string(),
        "manifest": image.manifest.as_ref().map(|manifest| json!({
            "digest": manifest.digest,
            "media_type": manifest.media_type,
            "size": manifest.bytes.len(),
        })),
        "config": {
            "digest": image.config.digest(),
            "media_type": image.config.media_type,
            "size": image.config.original.as_ref().map(|bytes| bytes.len()),
        },
        "platform": config.and_then(|config| config.platform()).map(|platform| json!({
            "os": platform.os,
            "architecture": platform.architecture,
            "variant": platform.variant,
        })),
        "created": config.and_then(|config| config.created()),
        "size": stored_size(image),
        "layers": layers,
        "history": history.iter().map(|step| json!({
            "created": step.created,
            "created_by": step.created_by,
            "comment": step.comment,
            "empty_layer": step.empty_layer,
        })).collect::<Vec<_>>(),
    })
}

fn layer_document(layer: &Layer) -> serde_json::Value {
    let descriptor = layer.descriptor.as_ref();
    json!({
        "index": layer.index,
        "digest": descriptor.map(|descriptor| &descriptor.digest),
        "media_type": descriptor.map(|descriptor| &descriptor.media_type),
        "size": layer.blob.size(),
        "diff_id": layer.diff_id,
        "compression": layer.format.to_string(),
    })
}

/// Bytes of all layers as stored, if all are known.
fn stored_size(image: &Image) -> Option<u64> {
    image
        .layers
        .iter()
        .map(|layer| layer.blob.size())
        .try_fold(0, |sum: u64, size| Some(sum.saturating_add(size?)))
}

fn text(image: &Image) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "Name:      {}", shown(&image.name.to_string()))?;
    if let Some(manifest) = &image.manifest {
        writeln!(out, "Manifest:  {}", manifest.digest)?;
        writeln!(out, "           {}", shown(&manifest.media_type))?;
    }
    if let Some(digest) = image.config.digest() {
        writeln!(out, "Config:    {digest}")?;
    }
    let config = image.config.document.as_ref();
    match config.and_then(|config| config.platform()) {
        Some(platform) => writeln!(out, "Platform:  {}", shown(&platform.to_string()))?,
        None if config.is_none() => writeln!(out, "Artifact:  {}", shown(&image.config.media_type))?,
        None => {}
    }
    if let Some(created) = config.and_then(|config| config.created()) {
        writeln!(out, "Created:   {}", shown(created))?;
    }
    let size = stored_size(image).map(|size| format!(", {size} bytes")).unwrap_or_default();
    writeln!(out, "Layers:    {}{size}", image.layers.len())?;
    for layer in &image.layers {
        let size =
            layer.blob.size().map(|size| format!("{size:>12}")).unwrap_or_else(|| format!("{:>12}", "?"));
        writeln!(out, "  {:>3} {size} {:<4} {}", layer.index + 1, layer.format, shown(&layer.label()))?;
    }
    let history = config.map(|config| config.history()).unwrap_or_default();
    if !history.is_empty() {
        writeln!(out, "History:")?;
    }
    for step in history {
        let mark = if step.empty_layer { ' ' } else { '*' };
        let created_by = step.created_by.split_whitespace().collect::<Vec<_>>().join(" ");
        let created = shown(step.created.as_deref().unwrap_or("-"));
        writeln!(out, "  {mark} {created} {}", shown(&created_by))?;
    }
    Ok(out)
}

/// What an image says of itself, fit for a terminal.
fn shown(text: &str) -> String {
    printable(text.as_bytes())
}
