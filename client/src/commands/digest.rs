//! `occyctl digest`: which manifest a name means.

use occy_pipeline::catalog::{Resolved, resolve};
use occy_pipeline::open;
use serde_json::json;

use super::{print_bytes, print_json};
use crate::Exit;
use crate::options::{DigestOf, Global, OutputFormat};
use crate::remote::{is_registry, names as remote};
use crate::settings::settings;

pub(crate) async fn run(options: &DigestOf, global: &Global) -> anyhow::Result<Exit> {
    let image = open::in_full(&options.image);
    let settings = settings(global, &image, None)?;
    let chosen = settings.platform.is_given().then(|| settings.platform.resolve());
    let platform = options.platform.clone().or(chosen);
    let store = open::store(&image, &settings)?;
    let resolved = match &global.coordinator {
        Some(_) if is_registry(&image) => remote::resolve(&image, platform.as_ref(), global).await?,
        _ => resolve(store.as_ref(), platform.as_ref()).await?,
    };
    let Resolved { digest, media_type, size } = resolved;
    match global.output_format {
        OutputFormat::Text => print_bytes(format!("{digest}\n").as_bytes()),
        OutputFormat::Json => print_json(&json!({
            "image": image,
            "platform": platform.map(|platform| platform.to_string()),
            "digest": digest,
            "media_type": media_type,
            "size": size,
        })),
    }
}
