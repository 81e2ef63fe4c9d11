//! `occyctl ls` and `occyctl tags`: names, printed page by page as they come, from here or through a coordinator.

use occy_pipeline::catalog::sort_by_version;
use occy_pipeline::error::Error;
use occy_pipeline::open::{self, Place};
use occy_pipeline::registry::{Names, Repository};
use occy_pipeline::source::oci_layout::LayoutSource;
use occy_pipeline::tar::path::printable;
use serde_json::json;

use super::{print_bytes, print_json};
use crate::Exit;
use crate::options::{Global, Ls, Order, OutputFormat, Tags};
use crate::remote::names as remote;
use crate::settings::{Misused, settings};

pub(crate) async fn list(options: &Ls, global: &Global) -> anyhow::Result<Exit> {
    match open_place(&options.name, global)? {
        Place::Registry(client, host) => {
            let mut pages = Pages::new(|| client.repositories(&host), &options.name, "ls", global).await?;
            match global.output_format {
                OutputFormat::Text => pages.print().await,
                OutputFormat::Json => {
                    let repositories = pages.all().await?;
                    print_json(&json!({"registry": host.as_str(), "repositories": repositories}))
                }
            }
        }
        Place::Repository(repository) => {
            let pages = Pages::new(|| repository.tags(), &options.name, "ls", global).await?;
            tags_of(&repository, pages, Order::Registry, global).await
        }
        Place::Layout(layout) => images_of(&layout, &options.name, Order::Registry, global).await,
    }
}

pub(crate) async fn tags(options: &Tags, global: &Global) -> anyhow::Result<Exit> {
    match open_place(&options.repository, global)? {
        Place::Registry(_, host) => Err(Misused(format!(
            "{host} is a registry: name one of its repositories, which `occyctl ls {host}` lists"
        ))
        .into()),
        Place::Repository(repository) => {
            let pages = Pages::new(|| repository.tags(), &options.repository, "tags", global).await?;
            tags_of(&repository, pages, options.sort, global).await
        }
        Place::Layout(layout) => images_of(&layout, &options.repository, options.sort, global).await,
    }
}

fn open_place(name: &str, global: &Global) -> anyhow::Result<Place> {
    let settings = settings(global, &open::in_full(name), None)?;
    Ok(open::place(name, &settings)?)
}

/// Where the names of a registry come from.
enum Pages {
    Here(Names),
    Coordinator(remote::Names),
}

impl Pages {
    /// Those of `here`, or of the same place as the coordinator sees it. A layout is always here.
    async fn new(
        here: impl FnOnce() -> Names,
        place: &str,
        command: &str,
        global: &Global,
    ) -> anyhow::Result<Self> {
        match &global.coordinator {
            None => Ok(Self::Here(here())),
            Some(_) => remote::Names::of(place, command, global).await.map(Self::Coordinator),
        }
    }

    /// The next ones. None behind the last.
    async fn page(&mut self) -> anyhow::Result<Option<Vec<String>>> {
        match self {
            Self::Here(names) => Ok(names.page().await.map_err(Error::from)?),
            Self::Coordinator(names) => names.page().await,
        }
    }

    async fn all(&mut self) -> anyhow::Result<Vec<String>> {
        let mut all = Vec::new();
        while let Some(page) = self.page().await? {
            all.extend(page);
        }
        Ok(all)
    }

    async fn print(&mut self) -> anyhow::Result<Exit> {
        while let Some(page) = self.page().await? {
            print_names(&page)?;
        }
        Ok(Exit::Done)
    }
}

async fn tags_of(
    repository: &Repository,
    mut pages: Pages,
    order: Order,
    global: &Global,
) -> anyhow::Result<Exit> {
    if (order, global.output_format) == (Order::Registry, OutputFormat::Text) {
        return pages.print().await;
    }
    let tags = sorted(pages.all().await?, order);
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

fn print_names(names: &[String]) -> anyhow::Result<Exit> {
    let lines: String = names.iter().map(|name| format!("{}\n", printable(name.as_bytes()))).collect();
    print_bytes(lines.as_bytes())
}
