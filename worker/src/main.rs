//! `occy-worker`: a worker's process. It configures itself, works until SIGTERM or SIGINT, and drains.

use std::process::ExitCode;
use std::time::Duration;

use occy_pipeline::registry;
use occy_worker::config;
use occy_worker::run::work;
use occy_worker::settings::Settings;
use tokio::signal::unix::{SignalKind, signal};

/// How long registries may take to forget the uploads of tasks that were cancelled.
const LAST_WORDS: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let settings: Settings = config::load(std::env::args_os().collect::<Vec<_>>())?;
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        unreachable!("nothing installs a provider before main does");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // The exporter of spans lives on the runtime.
    let exporting = runtime.block_on(async { settings.telemetry.start("occy-worker") })?;
    let worked = runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        // Standard output tells who started it that there is a coordinator now, and what it calls this worker.
        let worked = work(&settings, stop, |name| println!("registered as {name}")).await;
        registry::uploads_ended(LAST_WORDS).await;
        worked
    });
    exporting.finish();
    // What still runs on blocking threads has nobody who waits for it.
    runtime.shutdown_background();
    worked
}
