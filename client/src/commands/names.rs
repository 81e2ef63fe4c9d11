//! `occyctl ls` and `occyctl tags`: names, printed page by page as they come.

use occy_pipeline::catalog::sort_by_version;
use occy_pipeline::error::Error;
use occy_pipeline::open::{self, Place};
use occy_pipeline::registry::{Names, Repository};
use occy_pipeline::source::oci_layout::LayoutSource;
use occy_pipeline::tar::path::printable;
use occy_pipeline::uri::UriError;
use serde_json::json;

use super::{print_bytes, print_json, refuse_coordinator};
use crate::Exit;
use crate::options::{Global, Ls, Order, OutputFormat, Tags};
use crate::settings::settings;

pub(crate) async fn list(options: &Ls, global: &Global) -> anyhow::Result<Exit> {
    refuse_coordinator(global, "ls")?;
    match open_place(&options.name, global)? {
        Place::Registry(client, host) => match global.output_format {
            OutputFormat::Text => print_pages(client.repositories(&host)).await,
            OutputFormat::Json => {
                let repositories = client.repositories(&host).all().await.map_err(Error::from)?;
                print_json(&json!({"registry": host.as_str(), "repositories": repositories}))
            }
        },
        Place::Repository(repository) => tags_of(&repository, Order::Registry, global).await,
        Place::Layout(layout) => images_of(&layout, &options.name, Order::Registry, global).await,
    }
}

pub(crate) async fn tags(options: &Tags, global: &Global) -> anyhow::Result<Exit> {
    refuse_coordinator(global, "tags")?;
    match open_place(&options.repository, global)? {
        Place::Registry(_, host) => Err(Error::from(UriError::NoImage(host.to_string())).into()),
        Place::Repository(repository) => tags_of(&repository, options.sort, global).await,
        Place::Layout(layout) => images_of(&layout, &options.repository, options.sort, global).await,
    }
}

fn open_place(name: &str, global: &Global) -> anyhow::Result<Place> {
    let settings = settings(global, &open::in_full(name), None)?;
    Ok(open::place(name, &settings)?)
}

async fn tags_of(repository: &Repository, order: Order, global: &Global) -> anyhow::Result<Exit> {
    if (order, global.output_format) == (Order::Registry, OutputFormat::Text) {
        return print_pages(repository.tags()).await;
    }
    let tags = sorted(repository.tags().all().await.map_err(Error::from)?, order);
    match global.output_format {
        OutputFormat::Text => print_names(&tags),
        OutputFormat::Json => {
            let name = format!("{}/{}", repository.host(), repository.name());
            print_json(&json!({"repository": name, "tags": tags}))
        }
    }
}

async fn images_of(layout: &LayoutSource, name: &str, order: Order, global: &Global) -> anyhow::Result<Exit> {
    let images = sorted(layout.names().await?, order);
    match global.output_format {
        OutputFormat::Text => print_names(&images),
        OutputFormat::Json => print_json(&json!({"layout": name, "images": images})),
    }
}

fn sorted(mut names: Vec<String>, order: Order) -> Vec<String> {
    match order {
        Order::Registry => {}
        Order::Name => names.sort(),
        Order::Version => sort_by_version(&mut names),
    }
    names
}

async fn print_pages(mut names: Names) -> anyhow::Result<Exit> {
    while let Some(page) = names.page().await.map_err(Error::from)? {
        print_names(&page)?;
    }
    Ok(Exit::Done)
}

fn print_names(names: &[String]) -> anyhow::Result<Exit> {
    let lines: String = names.iter().map(|name| format!("{}\n", printable(name.as_bytes()))).collect();
    print_bytes(lines.as_bytes())
}
