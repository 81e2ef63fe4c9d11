//! `occy-server`: the coordinator's process. It configures itself, serves until SIGTERM or SIGINT, and drains.

use std::process::ExitCode;

use occy_server::serve::serve;
use occy_server::settings::Settings;
use occy_worker::config;
use tokio::signal::unix::{SignalKind, signal};

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
    let exporting = runtime.block_on(async { settings.telemetry.start("occy-server") })?;
    let served = runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        // Standard output tells who started it where it can be reached: the port may have been the system's choice.
        serve(&settings, stop, |address| println!("listening on {address}")).await
    });
    exporting.finish();
    // What still runs on blocking threads has nobody who waits for it.
    runtime.shutdown_background();
    served
}
