//! `occyctl mirror`: many images of many repositories, kept elsewhere as they are.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use occy_pipeline::error::Error;
use occy_pipeline::mirror::config::{Config, ConfigError, SCHEMA, Source};
use occy_pipeline::mirror::import::{self, Imported};
use occy_pipeline::mirror::{
    Action, Carried, Counts, Destination, Detail, Ends, Have, MirrorProgress, Origin, Outcome, Plan, Price,
    Report, Survey, What, save,
};
use occy_pipeline::registry::{self, Client};
use occy_pipeline::tar::path::printable;
use serde_json::{Value, json};

use super::{counted, print_bytes, print_json, schedule};
use crate::display::{Display, Picture};
use crate::options::{Global, Mirror, MirrorCommand, OutputFormat};
use crate::settings::{Misused, settings};
use crate::{Exit, Untold, remote, say};

pub(crate) async fn run(options: &Mirror, global: &Global) -> anyhow::Result<Exit> {
    match (&options.command, &options.config) {
        (Some(MirrorCommand::Schema), _) => print_bytes(SCHEMA.as_bytes()),
        (Some(MirrorCommand::ImportRegsync { file }), _) => converted(file, import::regsync(&read(file)?)),
        (Some(MirrorCommand::ImportSkopeo { file, to }), _) => {
            converted(file, import::skopeo(&read(file)?, to))
        }
        (Some(MirrorCommand::Digests { places }), _) => digests(places, global).await,
        (Some(MirrorCommand::Schedule(command)), _) => schedule::run(command, global).await,
        (None, Some(path)) => mirror(path, options, global).await,
        // clap asks for the one or the other.
        (None, None) => Err(Misused("mirror needs --config FILE".to_owned()).into()),
    }
}

async fn mirror(path: &Path, options: &Mirror, global: &Global) -> anyhow::Result<Exit> {
    let (text, config) = read_config(path)?;
    if let Some(schedule) = config.schedule.as_ref().filter(|_| !global.quiet) {
        say(&format!(
            "The mirror is made once, now: its schedule ({}) is for coordinators, see `occyctl mirror schedule put`",
            printable(schedule.to_string().as_bytes())
        ));
    }
    if global.coordinator.is_some() {
        check_passwords(&config, global)?;
        return remote::mirror::mirror(text, &config, options, global).await;
    }
    if options.idempotency_key.is_some() {
        return Err(Misused("--idempotency-key says nothing without --coordinator".to_owned()).into());
    }
    let ends = ends(&config, options, global)?;
    let display = Display::of(global, Arc::new(ends.progress.clone()));
    if let Some(to) = &options.to {
        let destination = Destination::parse(to).map_err(Error::from)?;
        let (plan, report) = save(&config, &ends, &destination, options.dry_run).await?;
        drop(display);
        return tell(&plan, (!options.dry_run).then_some(&report), plan.actions.len() as u64, global);
    }
    let dry_run = options.dry_run;
    let detail = if dry_run { Detail::Price } else { Detail::Need };
    let survey = Survey::make(&config, &ends, detail).await;
    let plan = Plan::of(&config, &survey);
    let report = match dry_run {
        true => None,
        false => Some(survey.run(&config, &plan, &ends, |_, _| ()).await),
    };
    drop(display);
    tell(&plan, report.as_ref(), plan.actions.len() as u64, global)
}

impl Picture for MirrorProgress {
    /// `Progress: 12 of 340 images done, 1 failed, 41943040 bytes fetched, 83886080 uploaded`.
    fn line(&self) -> String {
        let Counts { images, done, failed, moved } = self.get();
        let Price { bytes_fetched, bytes_uploaded, .. } = moved;
        if images == 0 {
            return "Progress: asking registries what there is".to_owned();
        }
        let failed = if failed > 0 { format!(", {failed} failed") } else { String::new() };
        format!(
            "Progress: {done} of {images} images done{failed}, {bytes_fetched} bytes fetched, {bytes_uploaded} uploaded"
        )
    }
}

/// Prints what came of a plan of so many images, or, without that, the plan.
///
/// Images that are as their source need not be among its actions.
pub(crate) fn tell(plan: &Plan, report: Option<&Report>, all: u64, global: &Global) -> anyhow::Result<Exit> {
    match report {
        None => tell_plan(plan, all, global),
        Some(report) => tell_report(plan, report, all, global),
    }
}

async fn digests(places: &[String], global: &Global) -> anyhow::Result<Exit> {
    if global.coordinator.is_some() {
        let problem =
            "`mirror digests` cannot be had with --coordinator: images are carried by this process only";
        return Err(Misused(problem.to_owned()).into());
    }
    let parse = |place: &String| Source::parse(place).map_err(|error| Misused(error.to_string()));
    let sources = places.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let settings = settings(global, "registry://", None)?;
    let hosts: BTreeSet<&str> = sources.iter().map(Source::host).collect();
    let hosts: Vec<String> = hosts.into_iter().map(str::to_owned).collect();
    let client = client(&settings.source_registry, &hosts, "source")?;
    let have = Have::of(&client, &sources).await?;
    print_bytes(have.to_string().as_bytes())
}

fn tell_plan(plan: &Plan, all: u64, global: &Global) -> anyhow::Result<Exit> {
    match global.output_format {
        OutputFormat::Json => print_json(&plan_document(plan))?,
        OutputFormat::Text => print_bytes(plan_text(plan, all, global.quiet).as_bytes())?,
    };
    for action in &plan.actions {
        if let What::Refuse(problem) | What::Fail(problem) = &action.what {
            complain(action, problem, None);
        }
    }
    let bad = |action: &&Action| matches!(action.what, What::Refuse(_) | What::Fail(_));
    Ok(exit(plan.actions.iter().filter(bad).count() as u64, all))
}

fn tell_report(plan: &Plan, report: &Report, all: u64, global: &Global) -> anyhow::Result<Exit> {
    for (action, outcome) in plan.actions.iter().zip(&report.outcomes) {
        match outcome {
            Outcome::Refused(problem) => complain(action, problem, None),
            Outcome::Failed { problem, hint } => complain(action, problem, hint.as_deref()),
            Outcome::Nothing | Outcome::Copied { .. } | Outcome::Deleted => {}
        }
    }
    let told = match global.output_format {
        OutputFormat::Json => print_json(&report_document(plan, report, all)),
        OutputFormat::Text => print_bytes(report_text(plan, report, all, global.quiet).as_bytes()),
    };
    if report.done() > 0 {
        told.map_err(Untold)?;
    } else {
        told?;
    }
    Ok(exit(report.failed() as u64, all))
}

/// Prints the file of another tool as one of ours.
fn converted(path: &Path, imported: Result<Imported, ConfigError>) -> anyhow::Result<Exit> {
    let imported = imported.map_err(|error| Misused(format!("{}: {error}", path.display())))?;
    for lost in &imported.lost {
        tracing::warn!("{}", printable(lost.as_bytes()));
    }
    print_bytes(imported.text.as_bytes())
}

/// How a mirror of so many images ends.
pub(crate) fn exit(failed: u64, all: u64) -> Exit {
    match failed {
        0 => Exit::Done,
        failed if failed == all => Exit::Failed,
        _ => Exit::Partial,
    }
}

/// The file of a mirror, and what it says.
pub(super) fn read_config(path: &Path) -> anyhow::Result<(String, Config)> {
    let text = read(path)?;
    let config = Config::parse(&text).map_err(|error| Misused(format!("{}: {error}", path.display())))?;
    Ok((text, config))
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))
}

fn client(options: &registry::Options, hosts: &[String], role: &str) -> anyhow::Result<Client> {
    check_password(options, hosts, role)?;
    Ok(Client::new(options.clone()).map_err(Error::from)?)
}

/// The same for both ends of a mirror that a coordinator makes.
pub(super) fn check_passwords(config: &Config, global: &Global) -> anyhow::Result<()> {
    let settings = settings(global, "registry://", Some("registry://"))?;
    check_password(&settings.source_registry, &config.source_hosts(), "source")?;
    check_password(&settings.destination_registry, &config.target_hosts(), "destination")?;
    Ok(())
}

/// A password is one registry's.
fn check_password(options: &registry::Options, hosts: &[String], role: &str) -> Result<(), Misused> {
    if options.credentials.is_some() && hosts.len() > 1 {
        let hosts = hosts.join(", ");
        let problem = format!(
            "a password of the command line would go to several {role} registries ({hosts}): log in to each instead"
        );
        return Err(Misused(problem));
    }
    Ok(())
}

fn ends(config: &Config, options: &Mirror, global: &Global) -> anyhow::Result<Ends> {
    let settings = settings(global, "registry://", Some("registry://"))?;
    let have = match &options.have {
        Some(path) => {
            Have::parse(&read(path)?).map_err(|error| Misused(format!("{}: {error}", path.display())))?
        }
        None => Have::default(),
    };
    let source = match &options.from {
        Some(from) => {
            Origin::Carried(Carried::parse(from, settings.spools.clone()).map_err(Error::from)?.into())
        }
        None => Origin::Registries(client(&settings.source_registry, &config.source_hosts(), "source")?),
    };
    Ok(Ends {
        source,
        have,
        target: client(&settings.destination_registry, &config.target_hosts(), "destination")?,
        spools: settings.spools.clone(),
        parallel: settings.parallel,
        executor: None,
        max_layer_size: global.max_layer_size,
        locks: None,
        progress: MirrorProgress::default(),
    })
}

fn complain(action: &Action, problem: &str, hint: Option<&str>) {
    let named = match &action.target {
        Some(target) => format!("{target} (from {})", action.source),
        None => action.source.clone(),
    };
    say(&format!("error: {}: {}", printable(named.as_bytes()), printable(problem.as_bytes())));
    if let Some(hint) = hint {
        say(&format!("hint: {}", printable(hint.as_bytes())));
    }
}

/// A line of an action: what is done to which target. None where nothing is.
fn line(action: &Action) -> Option<String> {
    let target = action.target.as_ref()?;
    let becomes = action.becomes.as_ref().map(|digest| format!(" ({digest})")).unwrap_or_default();
    let filtered = if action.is_filtered { " through its filters" } else { "" };
    let line = match &action.what {
        What::Nothing | What::Refuse(_) | What::Fail(_) => return None,
        What::Create if action.source == target.to_string() => format!("save {target}{becomes}"),
        What::Create => format!("create {target} from {}{filtered}{becomes}", action.source),
        What::Complete => format!("complete {target} from {}{becomes}", action.source),
        What::Delete => format!("delete {target}, which {} no longer is", action.source),
        What::Update => {
            let was = action.was.as_ref().map(|digest| format!(", was {digest}")).unwrap_or_default();
            let backup =
                action.backup.as_ref().map(|tag| format!(" and is kept as :{tag}")).unwrap_or_default();
            format!("update {target} from {}{filtered}{becomes}{was}{backup}", action.source)
        }
    };
    Some(printable(line.as_bytes()).to_string())
}

fn price_text(price: &Price) -> String {
    let Price { fetched, bytes_fetched, uploaded, bytes_uploaded, mounted, bytes_mounted, .. } = price;
    let Price { found, manifests, requests, filtered, bytes_filtered, .. } = price;
    let filtered = filtered_text(*filtered, *bytes_filtered);
    format!(
        "fetch {bytes_fetched} bytes in {fetched} blobs{filtered}, upload {bytes_uploaded} bytes in {uploaded}, mount {bytes_mounted} \
         bytes in {mounted}, {found} blobs are there; {manifests} manifests; {requests} requests"
    )
}

/// Of the blobs that were just told of, those that pass filters, if any does.
fn filtered_text(filtered: usize, bytes_filtered: u64) -> String {
    match filtered {
        0 => String::new(),
        filtered => format!(", {bytes_filtered} bytes in {filtered} of them through filters"),
    }
}

fn plan_text(plan: &Plan, all: u64, quiet: bool) -> String {
    if quiet {
        return String::new();
    }
    let mut text = String::new();
    for action in &plan.actions {
        if let Some(line) = line(action) {
            text += &format!("{line}\n");
            if action.what != What::Delete {
                text += &format!("    {}\n", price_text(&action.price));
            }
        }
    }
    let count = |is: fn(&What) -> bool| plan.actions.iter().filter(|action| is(&action.what)).count();
    let changed = plan.actions.len() - count(|what| *what == What::Nothing);
    text += &format!(
        "{} to create, {} to update, {} to complete, {} to delete; {} unchanged, {} refused, {} failed\n",
        count(|what| *what == What::Create),
        count(|what| *what == What::Update),
        count(|what| *what == What::Complete),
        count(|what| *what == What::Delete),
        unchanged(all, changed),
        count(|what| matches!(what, What::Refuse(_))),
        count(|what| matches!(what, What::Fail(_))),
    );
    text + &format!("In all: {}\n", price_text(&plan.price))
}

/// Of so many images those that need nothing, where what was done in an earlier attempt may not be among them any more.
fn unchanged(all: u64, others: usize) -> u64 {
    all.saturating_sub(others as u64)
}

fn price_document(price: &Price) -> Value {
    let mut document = moved_document(price);
    document["found"] = json!({"blobs": price.found});
    document["requests"] = price.requests.into();
    document
}

/// What of a price moves, or has moved.
fn moved_document(price: &Price) -> Value {
    json!({
        "fetch": {"blobs": price.fetched, "bytes": price.bytes_fetched},
        "upload": {"blobs": price.uploaded, "bytes": price.bytes_uploaded},
        "mount": {"blobs": price.mounted, "bytes": price.bytes_mounted},
        "filter": {"blobs": price.filtered, "bytes": price.bytes_filtered},
        "manifests": price.manifests,
    })
}

pub(crate) fn action_document(action: &Action) -> Value {
    let (what, problem) = match &action.what {
        What::Nothing => ("nothing", None),
        What::Create => ("create", None),
        What::Update => ("update", None),
        What::Complete => ("complete", None),
        What::Delete => ("delete", None),
        What::Refuse(problem) => ("refuse", Some(problem)),
        What::Fail(problem) => ("fail", Some(problem)),
    };
    json!({
        "source": action.source,
        "target": action.target.as_ref().map(ToString::to_string),
        "action": what,
        "problem": problem,
        "was": action.was,
        "becomes": action.becomes,
        "backup": action.backup.as_ref().map(ToString::to_string),
        "filtered": action.is_filtered,
        "price": price_document(&action.price),
    })
}

fn plan_document(plan: &Plan) -> Value {
    let actions: Vec<Value> = plan.actions.iter().map(action_document).collect();
    json!({"actions": actions, "price": price_document(&plan.price)})
}

fn report_text(plan: &Plan, report: &Report, all: u64, quiet: bool) -> String {
    if quiet {
        return String::new();
    }
    let mut text = String::new();
    for (action, outcome) in plan.actions.iter().zip(&report.outcomes) {
        if let (Some(line), Outcome::Copied { .. } | Outcome::Deleted) = (line(action), outcome) {
            text += &format!("done: {line}{}\n", beside(outcome));
        }
    }
    let Report { bytes_fetched, bytes_uploaded, mounted, elapsed, .. } = report;
    let moved = match &report.moved {
        Some(Price { fetched, uploaded, manifests, filtered, bytes_filtered, .. }) => {
            let filtered = filtered_text(*filtered, *bytes_filtered);
            format!(
                "fetched {bytes_fetched} bytes in {fetched} blobs{filtered}, uploaded {bytes_uploaded} in {uploaded}, put {manifests} \
                 manifests, mounted {mounted} blobs"
            )
        }
        // An earlier release has counted no more.
        None => {
            format!("fetched {bytes_fetched} bytes, uploaded {bytes_uploaded}, mounted {mounted} blobs")
        }
    };
    let (done, failed) = (report.done(), report.failed());
    let unchanged = unchanged(all, done + failed);
    text + &format!(
        "{done} done, {unchanged} unchanged, {failed} failed or refused; {moved} in {:.1} seconds\n",
        elapsed.as_secs_f64()
    )
}

/// What became of what belongs to an image, where that is worth a word.
fn beside(outcome: &Outcome) -> String {
    let Outcome::Copied { attestations_dropped, signatures_kept, .. } = outcome else { return String::new() };
    let words = [(*attestations_dropped, "attestation", "left out"), (*signatures_kept, "signature", "kept")];
    let words = words.into_iter().filter(|(count, ..)| *count > 0);
    let words: Vec<_> = words.map(|(count, what, how)| format!("{} {how}", counted(count, what))).collect();
    if words.is_empty() { String::new() } else { format!("; {}", words.join(", ")) }
}

pub(crate) fn image_document(action: &Action, outcome: &Outcome) -> Value {
    let (end, facts, problem) = match outcome {
        Outcome::Nothing => ("unchanged", None, None),
        Outcome::Copied {
            blobs,
            blobs_found,
            manifests,
            attestations_dropped,
            signatures_kept,
            provenance,
            ..
        } => {
            let facts = json!({
                "blobs": {"moved": blobs, "found": blobs_found},
                "manifests": manifests,
                "attestations_dropped": attestations_dropped,
                "signatures_kept": signatures_kept,
                "provenance": provenance,
            });
            ("copied", Some(facts), None)
        }
        Outcome::Deleted => ("deleted", None, None),
        Outcome::Refused(problem) => ("refused", None, Some(problem)),
        Outcome::Failed { problem, .. } => ("failed", None, Some(problem)),
    };
    let mut document = action_document(action);
    if let Outcome::Copied { made: Some(made), .. } = outcome {
        document["becomes"] = json!(made);
    }
    document["result"] = end.into();
    document["copied"] = facts.unwrap_or_default();
    document["problem"] = problem.cloned().into();
    document
}

fn report_document(plan: &Plan, report: &Report, all: u64) -> Value {
    let (done, failed) = (report.done(), report.failed());
    let images = plan.actions.iter().zip(&report.outcomes);
    let images = images.map(|(action, outcome)| image_document(action, outcome));
    json!({
        "images": images.collect::<Vec<_>>(),
        "done": done,
        "failed": failed,
        // Of a scheduled run those are counted that `images` leaves out.
        "unchanged": unchanged(all, done + failed),
        // Null where it is not known.
        "moved": report.moved.as_ref().map(moved_document),
        "bytes": {"fetched": report.bytes_fetched, "uploaded": report.bytes_uploaded},
        "blobs_mounted": report.mounted,
        "seconds": report.elapsed.as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_became_of_attestations_and_signatures() {
        let copied = |attestations_dropped, signatures_kept| Outcome::Copied {
            blobs: 1,
            blobs_found: 0,
            manifests: 1,
            made: None,
            attestations_dropped,
            signatures_kept,
            provenance: None,
        };
        assert_eq!(beside(&copied(0, 0)), "");
        assert_eq!(beside(&copied(2, 0)), "; 2 attestations left out");
        assert_eq!(beside(&copied(1, 1)), "; 1 attestation left out, 1 signature kept");
        assert_eq!(beside(&Outcome::Deleted), "");
    }

    #[test]
    fn what_an_earlier_release_has_not_counted_is_not_told_as_nothing() {
        let elapsed = std::time::Duration::ZERO;
        let report = Report {
            outcomes: Vec::new(),
            moved: None,
            bytes_fetched: 7,
            bytes_uploaded: 9,
            mounted: 1,
            elapsed,
        };
        let text = report_text(&Plan::default(), &report, 0, false);
        assert!(text.ends_with("; fetched 7 bytes, uploaded 9, mounted 1 blobs in 0.0 seconds\n"), "{text}");
        let document = report_document(&Plan::default(), &report, 0);
        assert_eq!((&document["moved"], &document["bytes"]["fetched"]), (&Value::Null, &json!(7)));
        let report = Report { moved: Some(Price { fetched: 2, ..Price::default() }), ..report };
        assert!(report_text(&Plan::default(), &report, 0, false).contains("fetched 7 bytes in 2 blobs, "));
    }

    #[test]
    fn a_mirror_says_how_far_it_is() {
        let progress = MirrorProgress::default();
        assert_eq!(progress.line(), "Progress: asking registries what there is");
        let moved = Price { bytes_fetched: 7, ..Price::default() };
        let counts = Counts { images: 3, done: 1, moved, ..Counts::default() };
        progress.set(counts);
        assert_eq!(progress.line(), "Progress: 1 of 3 images done, 7 bytes fetched, 0 uploaded");
        progress.set(Counts { failed: 2, moved: Price { bytes_uploaded: 9, ..moved }, ..counts });
        assert_eq!(progress.line(), "Progress: 1 of 3 images done, 2 failed, 7 bytes fetched, 9 uploaded");
    }
}
