//! What each command does.

mod check;
mod copy;
mod delete;
mod digest;
mod info;
pub(crate) mod job;
pub(crate) mod mirror;
mod names;
pub(crate) mod process;
mod schedule;
mod search;
mod verify;
mod workers;

use std::io::Write;

use clap::CommandFactory;
use occy_pipeline::copy::Signature;
use occy_pipeline::tar::path::printable;
use serde_json::json;

use crate::Exit;
use crate::manual;
use crate::options::{Cli, Command};

/// Runs the command that the line names.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<Exit> {
    let global = &cli.global;
    match &cli.command {
        Command::Process(options) => process::run(options, global).await,
        Command::Search(options) => search::run(options, global).await,
        Command::Info(options) => info::run(options, global).await,
        Command::Check(options) => check::run(options, global).await,
        Command::Verify(options) => verify::run(options, global).await,
        Command::Copy(options) => copy::run(options, global).await,
        Command::Mirror(options) => mirror::run(options, global).await,
        Command::Ls(options) => names::list(options, global).await,
        Command::Tags(options) => names::tags(options, global).await,
        Command::Digest(options) => digest::run(options, global).await,
        Command::Delete(options) => delete::run(options, global).await,
        Command::Job(command) => job::run(command, global).await,
        Command::Workers => workers::run(global).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "occyctl", &mut script);
            print_bytes(&script)
        }
        Command::Man => print_bytes(manual::page(&mut Cli::command()).as_bytes()),
    }
}

/// Says which signatures are at the destination although what they are about is another manifest there.
pub(crate) fn tell_kept(kept: &[Signature]) {
    for Signature { subject, digest, kind } in kept {
        let kind = printable(kind.as_bytes());
        tracing::warn!(
            "kept the signature {digest} ({kind}): it is about {subject}, and not about what that became"
        );
    }
}

/// The same for programs.
pub(crate) fn kept_document(kept: &[Signature]) -> serde_json::Value {
    let kept = kept.iter().map(|one| json!({"digest": one.digest, "subject": one.subject, "kind": one.kind}));
    kept.collect()
}

/// Prints a result. A reader that has seen enough (`| head`) is no error.
pub(crate) fn print_bytes(bytes: &[u8]) -> anyhow::Result<Exit> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::from(error).context("failed to write to standard output"))
        }
        _ => Ok(Exit::Done),
    }
}

/// `1 blob`, `2 blobs`.
pub(crate) fn counted(count: usize, one: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {one}{plural}")
}

/// Prints a result as JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<Exit> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print_bytes(text.as_bytes())
}
