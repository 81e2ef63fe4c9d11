//! `occyctl workers`: who works for a coordinator.

use std::fmt::Write;

use occy_pipeline::tar::path::printable;
use occy_proto::v1::{ListCapabilitiesRequest, WorkerCapability};
use serde_json::json;

use super::{print_bytes, print_json};
use crate::Exit;
use crate::options::{Global, OutputFormat};
use crate::remote::connect::Coordinator;

pub(crate) async fn run(global: &Global) -> anyhow::Result<Exit> {
    let mut coordinator = Coordinator::needed(global, "workers").await?;
    let answered = coordinator.client.list_capabilities(ListCapabilitiesRequest {}).await;
    let workers = answered.map_err(|status| coordinator.error(status))?.into_inner().workers;
    match global.output_format {
        OutputFormat::Json => print_json(&workers.iter().map(document).collect::<Vec<_>>()),
        OutputFormat::Text => print_bytes(text(&workers)?.as_bytes()),
    }
}

fn document(worker: &WorkerCapability) -> serde_json::Value {
    json!({
        "name": worker.name,
        "slots": worker.slots,
        "free_slots": worker.free_slots,
        "version": worker.version,
    })
}

fn text(workers: &[WorkerCapability]) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "{:<24} {:>5} {:>5} VERSION", "NAME", "SLOTS", "FREE")?;
    for worker in workers {
        let (name, version) = (printable(worker.name.as_bytes()), printable(worker.version.as_bytes()));
        writeln!(out, "{name:<24} {:>5} {:>5} {version}", worker.slots, worker.free_slots)?;
    }
    Ok(out)
}
