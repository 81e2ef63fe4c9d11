//! `occyctl`: the command line. It parses, runs the pipeline in this process, and prints: results to standard output,
//! everything else to standard error.

mod commands;
mod display;
mod options;
mod settings;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use occy_pipeline::error::Error;
use occy_pipeline::registry;
use occy_pipeline::tar::path::printable;
use tokio::signal::unix::{SignalKind, signal};

use crate::options::Cli;

/// How long a program that ends waits for registries to hear of it.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    /// All done.
    Done = 0,
    /// Something failed; the destination is as it was before.
    Failed = 1,
    /// The command line is wrong. clap itself exits with this number too.
    Usage = 2,
    /// `check` found the image broken.
    Unsound = 3,
    /// SIGINT came.
    Interrupted = 130,
    /// SIGTERM came.
    Terminated = 143,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    settings::start_logging(&cli.global);
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        unreachable!("nothing installs a provider before main does");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: failed to start: {error}");
            return ExitCode::from(Exit::Failed as u8);
        }
    };
    let exit = runtime.block_on(until_signal(commands::run(cli)));
    // What failed or was interrupted leaves registries with uploads that nobody will end.
    runtime.block_on(registry::uploads_ended(LAST_WORDS));
    // A thread may still wait for standard input; what it was to do is not wanted any more.
    runtime.shutdown_background();
    ExitCode::from(exit as u8)
}

/// Runs a command. A signal drops it, and with it all that has no name yet.
async fn until_signal(command: impl Future<Output = anyhow::Result<Exit>>) -> Exit {
    let (mut interrupt, mut terminate) =
        match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
            (Ok(interrupt), Ok(terminate)) => (interrupt, terminate),
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("error: failed to start: {error}");
                return Exit::Failed;
            }
        };
    tokio::select! {
        result = command => match result {
            Ok(exit) => exit,
            Err(error) => report(&error),
        },
        _ = interrupt.recv() => Exit::Interrupted,
        _ = terminate.recv() => Exit::Terminated,
    }
}

fn report(error: &anyhow::Error) -> Exit {
    match error.downcast_ref::<Error>() {
        // Its own words hold those of its causes, and of images and registries: none may command the terminal.
        Some(error) => eprintln!("error: {}", printable(error.to_string().as_bytes())),
        None => eprintln!("error: {error:#}"),
    }
    if error.is::<settings::Misused>() {
        return Exit::Usage;
    }
    let Some(error) = error.downcast_ref::<Error>() else { return Exit::Failed };
    if let Some(hint) = error.hint() {
        eprintln!("hint: {}", printable(hint.as_bytes()));
    }
    match error {
        Error::Uri(_) | Error::Reference(_) | Error::Filter(_) => Exit::Usage,
        _ => Exit::Failed,
    }
}
