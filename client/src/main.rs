//! `occyctl`: the command line. It parses, runs the pipeline in this process or has a coordinator run it ([`remote`]), and prints:
//! results to standard output, everything else to standard error.

mod commands;
mod display;
mod environment;
mod manual;
mod options;
mod remote;
mod settings;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use occy_pipeline::error::Error;
use occy_pipeline::output::remove_unpublished;
use occy_pipeline::registry;
use occy_pipeline::tar::path::printable;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::display::Aside;
use crate::remote::error::RemoteError;

/// What is not whole is removed by whoever wrote it, for as long; after that by us.
const PATIENCE: Duration = Duration::from_secs(5);
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
    /// `check` found the image broken, or `verify` another than its provenance says.
    Unsound = 3,
    /// The destination was written, but what was to be told of it was not.
    Untold = 4,
    /// `mirror` left some targets otherwise than their sources.
    Partial = 5,
    /// `verify` could not compare all: another version has made the image.
    Incomparable = 6,
    /// SIGHUP came.
    HungUp = 129,
    /// SIGINT came.
    Interrupted = 130,
    /// SIGTERM came.
    Terminated = 143,
}

/// Results that could not be printed, or appended to a filter's file, when the destination had been written already.
#[derive(Debug, thiserror::Error)]
#[error("the destination was written, but {0:#}")]
struct Untold(anyhow::Error);

fn main() -> ExitCode {
    let cli = environment::parse();
    settings::start_logging(&cli.global);
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        unreachable!("nothing installs a provider before main does");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("error: failed to start: {error}"));
            return ExitCode::from(Exit::Failed as u8);
        }
    };
    let exit = runtime.block_on(until_signal(commands::run(cli)));
    // What failed or was interrupted leaves registries with uploads that nobody else will end.
    runtime.block_on(registry::uploads_ended(LAST_WORDS));
    remove_unpublished(PATIENCE);
    // A thread may still wait for standard input; what it was to do is not wanted any more.
    runtime.shutdown_background();
    ExitCode::from(exit as u8)
}

/// Says something on standard error. That nobody can hear it stops no work.
fn say(text: &str) {
    let _ = writeln!(Aside, "{text}");
}

/// Runs a command. A signal drops it, and with it all that has no name yet.
async fn until_signal(command: impl Future<Output = anyhow::Result<Exit>>) -> Exit {
    let kinds = (SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup());
    let (interrupt, terminate, hangup) = match (listen(kinds.0), listen(kinds.1), listen(kinds.2)) {
        (Ok(interrupt), Ok(terminate), Ok(hangup)) => (interrupt, terminate, hangup),
        (Err(error), _, _) | (_, Err(error), _) | (_, _, Err(error)) => {
            say(&format!("error: failed to start: {error}"));
            return Exit::Failed;
        }
    };
    // A branch that is not taken loses a signal that has not come.
    let exit = tokio::select! {
        result = command => return match result {
            Ok(exit) => exit,
            Err(error) => report(&error),
        },
        () = came(interrupt) => Exit::Interrupted,
        () = came(terminate) => Exit::Terminated,
        () = came(hangup) => Exit::HungUp,
    };
    say("interrupted");
    exit
}

fn listen(kind: SignalKind) -> std::io::Result<Option<Signal>> {
    if is_ignored(kind) { Ok(None) } else { signal(kind).map(Some) }
}

async fn came(signal: Option<Signal>) {
    match signal {
        Some(mut signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether whoever started us wants the signal to do nothing, as `nohup` does and a shell for what runs in its background.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask & (1 << (kind.as_raw_value() - 1)) != 0
}

fn report(error: &anyhow::Error) -> Exit {
    // Words of images, registries and coordinators may not command the terminal. Such errors hold those of their causes.
    let foreign = error.downcast_ref::<Error>().map(ToString::to_string);
    match foreign.or_else(|| error.downcast_ref::<RemoteError>().map(ToString::to_string)) {
        Some(text) => say(&format!("error: {}", printable(text.as_bytes()))),
        None => say(&format!("error: {error:#}")),
    }
    if error.is::<settings::Misused>() {
        return Exit::Usage;
    }
    if error.is::<Untold>() {
        return Exit::Untold;
    }
    if let Some(remote) = error.downcast_ref::<RemoteError>() {
        hint(remote.hint());
        return if remote.is_misuse() { Exit::Usage } else { Exit::Failed };
    }
    let Some(error) = error.downcast_ref::<Error>() else { return Exit::Failed };
    hint(error.hint());
    if error.is_misuse() { Exit::Usage } else { Exit::Failed }
}

fn hint(hint: Option<String>) {
    if let Some(hint) = hint {
        say(&format!("hint: {}", printable(hint.as_bytes())));
    }
}
