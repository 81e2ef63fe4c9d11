//! `occyctl delete`: an image away from its registry.

use occy_pipeline::catalog::{Deleted, delete};
use occy_pipeline::open;
use occy_pipeline::registry::Access;
use serde_json::json;

use super::print_json;
use crate::options::{Delete, Global, OutputFormat};
use crate::remote::names as remote;
use crate::settings::settings;
use crate::{Exit, Untold, say};

pub(crate) async fn run(options: &Delete, global: &Global) -> anyhow::Result<Exit> {
    let image = open::in_full(&options.image);
    // What is written to is a destination, for credentials too.
    let settings = settings(global, "", Some(&image))?;
    let (repository, reference) = open::image(&image, &settings, Access::Delete)?;
    let deleted = match &global.coordinator {
        Some(_) => remote::delete(&image, options.yes, global).await?,
        None => delete(&repository, &reference, options.yes).await?,
    };
    let Deleted { digest, tag_only, tags } = &deleted;
    match global.output_format {
        OutputFormat::Json => print_json(&json!({
            "image": reference.to_string(),
            "digest": digest,
            "deleted": if *tag_only { "tag" } else { "manifest" },
            "tags": tags,
        }))
        .map_err(Untold)
        .map(drop)?,
        OutputFormat::Text if global.quiet => {}
        OutputFormat::Text if *tag_only => {
            say(&format!("Deleted the tag {reference}; its manifest stays as {digest}"));
        }
        OutputFormat::Text => {
            let tags: String = tags.iter().map(|tag| format!(", :{tag}")).collect();
            say(&format!("Deleted {digest} from {}{tags}", reference.name()));
        }
    }
    Ok(Exit::Done)
}
