//! `occyctl job`: what a coordinator does on its own.

use std::fmt::Write;

use occy_pipeline::mirror::config::Config;
use occy_pipeline::tar::path::printable;
use occy_proto::v1::{self, JobState, ListJobsRequest, SubmitJobRequest};
use serde_json::json;

use super::{print_bytes, print_json};
use crate::options::{self, Global, Job, OutputFormat, SubmitJob};
use crate::remote::connect::Coordinator;
use crate::remote::logins::{Which, logins};
use crate::remote::spec;
use crate::remote::watch::{Watch, layer_document};
use crate::{Exit, say};

/// Jobs in one answer of a coordinator.
const PAGE: usize = 200;

pub(crate) async fn run(command: &Job, global: &Global) -> anyhow::Result<Exit> {
    match command {
        Job::Submit(options) => submit(options, global).await,
        Job::Get(options) => {
            let mut coordinator = Coordinator::needed(global, "job get").await?;
            let request = v1::GetJobRequest { job_id: options.id.clone() };
            let answered = coordinator.client.get_job(request).await;
            let job = answered.map_err(|status| coordinator.error(status))?.into_inner().job;
            show(&job.unwrap_or_default(), global)
        }
        Job::List(options) => list(options, global).await,
        Job::Watch(options) => {
            let coordinator = Coordinator::needed(global, "job watch").await?;
            Watch::new(&coordinator, &options.id, options.after, global).run().await
        }
        Job::Cancel(options) => {
            let mut coordinator = Coordinator::needed(global, "job cancel").await?;
            let request = v1::CancelJobRequest { job_id: options.id.clone() };
            let answered = coordinator.client.cancel_job(request).await;
            let job = answered.map_err(|status| coordinator.error(status))?.into_inner().job;
            let job = job.unwrap_or_default();
            show(&job, global)?;
            match job.state() {
                JobState::Cancelled => Ok(Exit::Done),
                state => {
                    say(&format!(
                        "error: job {} is {} and cannot be cancelled any more",
                        job.id,
                        word(state)
                    ));
                    Ok(Exit::Failed)
                }
            }
        }
    }
}

async fn submit(options: &SubmitJob, global: &Global) -> anyhow::Result<Exit> {
    let work = &options.work;
    spec::refuse_registry_options(global, &[&work.source, &work.destination])?;
    let spec = v1::PipelineSpec {
        source: work.source.clone(),
        destination: work.destination.clone(),
        priority: options.priority,
        ..spec::with_wanted(spec::of_work(work, global), options.whole.wanted())
    };
    let mut coordinator = Coordinator::needed(global, "job submit").await?;
    coordinator.needs(&spec::asked(options.whole.wanted())).await?;
    let idempotency_key = options.idempotency_key.clone().unwrap_or_default();
    let credentials =
        logins(global, &coordinator, &work.source, Some(&work.destination), Which::Given).await?;
    let request = SubmitJobRequest { spec: Some(spec), idempotency_key, credentials };
    let answered = coordinator.client.submit_job(request).await;
    let job = answered.map_err(|status| coordinator.error(status))?.into_inner().job.unwrap_or_default();
    if options.watch {
        if !global.quiet {
            say(&format!("Submitted job {}", job.id));
        }
        return Watch::new(&coordinator, &job.id, 0, global).for_submitter(&work.filters)?.run().await;
    }
    match global.output_format {
        OutputFormat::Json => print_json(&document(&job)),
        OutputFormat::Text => print_bytes(format!("{}\n", printable(job.id.as_bytes())).as_bytes()),
    }
}

async fn list(options: &options::ListJobs, global: &Global) -> anyhow::Result<Exit> {
    let mut coordinator = Coordinator::needed(global, "job list").await?;
    let states: Vec<i32> = options.states.iter().map(|state| wanted(*state).into()).collect();
    let (mut jobs, mut page_token) = (Vec::new(), String::new());
    while jobs.len() < options.limit {
        let page_size = PAGE.min(options.limit - jobs.len());
        let page_size = u32::try_from(page_size).expect("a page is small");
        let request = ListJobsRequest { page_size, page_token, states: states.clone() };
        let answered = coordinator.client.list_jobs(request).await;
        let page = answered.map_err(|status| coordinator.error(status))?.into_inner();
        jobs.extend(page.jobs);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    match global.output_format {
        OutputFormat::Json => print_json(&jobs.iter().map(document).collect::<Vec<_>>()),
        OutputFormat::Text => print_bytes(lines(&jobs)?.as_bytes()),
    }
}

fn wanted(state: options::JobState) -> JobState {
    match state {
        options::JobState::Queued => JobState::Queued,
        options::JobState::Running => JobState::Running,
        options::JobState::Finalizing => JobState::Finalizing,
        options::JobState::Succeeded => JobState::Succeeded,
        options::JobState::Failed => JobState::Failed,
        options::JobState::Cancelled => JobState::Cancelled,
    }
}

fn show(job: &v1::Job, global: &Global) -> anyhow::Result<Exit> {
    match global.output_format {
        OutputFormat::Json => print_json(&document(job)),
        OutputFormat::Text => print_bytes(text(job)?.as_bytes()),
    }
}

/// `JOB_STATE_RUNNING` as people read it.
pub(crate) fn word(state: JobState) -> String {
    state.as_str_name().trim_start_matches("JOB_STATE_").to_lowercase()
}

pub(super) fn time(time: Option<&prost_types::Timestamp>) -> String {
    time.map(ToString::to_string).unwrap_or_default()
}

pub(super) fn shown(text: &str) -> String {
    printable(text.as_bytes())
}

/// One job a line.
fn lines(jobs: &[v1::Job]) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    for job in jobs {
        let spec = job.spec.clone().unwrap_or_default();
        let (source, destination) = match &spec.mirror {
            None => (shown(&spec.source), shown(&spec.destination)),
            Some(mirror) => mirror_ends(mirror),
        };
        let state = match failed(job) {
            0 => word(job.state()),
            failed => format!("{failed} failed"),
        };
        let created = time(job.create_time.as_ref());
        let line = format!("{} {state:<10} {created:<30} {source} {destination}", shown(&job.id));
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(out)
}

/// The registries of a mirror. Of a file that only a later version understands, nothing but what it is.
fn mirror_ends(mirror: &v1::MirrorSpec) -> (String, String) {
    let Ok(config) = Config::parse(&mirror.config) else { return ("mirror".to_owned(), String::new()) };
    let hosts = |hosts: Vec<String>| shown(&hosts.join(","));
    (format!("mirror of {}", hosts(config.source_hosts())), format!("to {}", hosts(config.target_hosts())))
}

/// Images of a mirror that came to its end which failed or were refused.
fn failed(job: &v1::Job) -> u64 {
    job.result.as_ref().and_then(|result| result.mirror.as_ref()).map_or(0, |mirror| mirror.failed)
}

/// What was asked for besides source, destination and filters, in the words of `job submit`.
fn options(spec: &v1::PipelineSpec) -> Vec<String> {
    let mut options = Vec::new();
    if let Some(platform) = &spec.platform {
        let v1::Platform { os, architecture, variant, .. } = platform;
        let named = [("os", os), ("architecture", architecture), ("variant", variant)];
        let named = named.into_iter().filter(|(_, value)| !value.is_empty());
        options.extend(named.map(|(option, value)| format!("--{option} {value}")));
    }
    let policy = |name: &str, value: &str, unsaid: &str| {
        let value = value.trim_start_matches(unsaid).to_lowercase();
        (value != "unspecified").then(|| format!("--{name} {value}"))
    };
    options.extend(spec.all.then(|| "--all".to_owned()));
    options.extend(policy("attestations", spec.attestations().as_str_name(), "ATTESTATION_POLICY_"));
    options.extend(policy("signatures", spec.signatures().as_str_name(), "SIGNATURE_POLICY_"));
    options.extend(spec.provenance.then(|| "--provenance".to_owned()));
    options.extend((!spec.compression.is_empty()).then(|| format!("--compression {}", spec.compression)));
    options.extend(policy("format", spec.manifest_family().as_str_name(), "FAMILY_"));
    options.extend(spec.verify_diff_ids.then(|| "--verify-diff-ids".to_owned()));
    options.extend(spec.foreign_layers.then(|| "--foreign-layers".to_owned()));
    options.extend((spec.priority != 0).then(|| format!("--priority {}", spec.priority)));
    options
}

fn text(job: &v1::Job) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let spec = job.spec.clone().unwrap_or_default();
    writeln!(out, "Job:         {}", shown(&job.id))?;
    match failed(job) {
        0 => writeln!(out, "State:       {}", word(job.state()))?,
        failed => writeln!(out, "State:       {}, {failed} failed", word(job.state()))?,
    }
    match &spec.mirror {
        None => {
            writeln!(out, "Source:      {}", shown(&spec.source))?;
            writeln!(out, "Destination: {}", shown(&spec.destination))?;
        }
        Some(mirror) => {
            writeln!(out, "{}", if mirror.dry_run { "Mirror, dry run:" } else { "Mirror:" })?;
            for line in mirror.config.lines() {
                writeln!(out, "  {}", shown(line))?;
            }
        }
    }
    for filter in &spec.filters {
        writeln!(out, "Filter:      {}", shown(filter))?;
    }
    let options = options(&spec);
    if !options.is_empty() {
        writeln!(out, "Options:     {}", shown(&options.join(" ")))?;
    }
    writeln!(out, "Created:     {}", time(job.create_time.as_ref()))?;
    writeln!(out, "Updated:     {}", time(job.update_time.as_ref()))?;
    writeln!(out, "Attempts:    {}", job.attempts)?;
    let mirrored = job.result.as_ref().and_then(|result| result.mirror.as_ref());
    if let Some(mirrored) = mirrored {
        writeln!(out, "Result:      {}", mirror_text(mirrored))?;
    } else if let Some(result) = &job.result {
        writeln!(out, "Result:      {} ({})", shown(&result.destination), shown(&result.manifest_digest))?;
    }
    if let Some(error) = &job.error {
        writeln!(out, "Error:       {}", shown(&error.message))?;
    }
    if !job.layers.is_empty() {
        writeln!(out, "Layers:")?;
    }
    for layer in &job.layers {
        let state = layer.state().as_str_name().trim_start_matches("LAYER_STATE_").to_lowercase();
        let line =
            format!("  {:>3} {state:<8} {} {}", layer.index + 1, shown(&layer.label), shown(&layer.worker));
        writeln!(out, "{}", line.trim_end())?;
        if !layer.waiting_reason.is_empty() {
            writeln!(out, "      {}", shown(&layer.waiting_reason))?;
        }
    }
    Ok(out)
}

pub(super) fn document(job: &v1::Job) -> serde_json::Value {
    let spec = job.spec.clone().unwrap_or_default();
    json!({
        "id": job.id,
        "state": word(job.state()),
        "source": spec.source,
        "destination": spec.destination,
        "filters": spec.filters,
        "options": options(&spec),
        "priority": spec.priority,
        "mirror": spec.mirror.map(|mirror| json!({"config": mirror.config, "dry_run": mirror.dry_run})),
        "created": time(job.create_time.as_ref()),
        "updated": time(job.update_time.as_ref()),
        "attempts": job.attempts,
        "last_sequence": job.last_sequence,
        "layers": job.layers.iter().map(layer_document).collect::<Vec<_>>(),
        "result": job.result.as_ref().map(result_document),
        "error": job.error.as_ref().map(error_document),
    })
}

pub(crate) fn result_document(result: &v1::ImageResult) -> serde_json::Value {
    let kept =
        |one: &v1::KeptSignature| json!({"digest": one.digest, "subject": one.subject, "kind": one.kind});
    let stale =
        |one: &v1::StaleAttestation| json!({"digest": one.digest, "image": one.image, "became": one.became});
    let index = result.index.as_ref().map(|index| {
        json!({
            "images": index.image_count,
            "dropped": index.dropped.iter().map(stale).collect::<Vec<_>>(),
            "retargeted": index.retargeted.iter().map(stale).collect::<Vec<_>>(),
        })
    });
    json!({
        "image": result.image,
        "destination": result.destination,
        "manifest_digest": result.manifest_digest,
        "manifest_media_type": result.manifest_media_type,
        "bytes": result.bytes,
        "layers": result.layer_count,
        "mirror": result.mirror.as_ref().map(mirror_document),
        "signatures_kept": result.signatures_kept.iter().map(kept).collect::<Vec<_>>(),
        "provenance": Some(&result.provenance).filter(|digest| !digest.is_empty()),
        "index": index,
        "seconds": std::time::Duration::from_millis(result.elapsed_millis).as_secs_f64(),
    })
}

pub(super) fn mirror_text(mirror: &v1::MirrorResult) -> String {
    let v1::MirrorResult { done, failed, images, .. } = mirror;
    format!("{done} of {images} images done, {failed} failed or refused")
}

pub(super) fn mirror_document(mirror: &v1::MirrorResult) -> serde_json::Value {
    json!({
        "done": mirror.done,
        "failed": mirror.failed,
        "images": mirror.images,
        "bytes": {"fetched": mirror.bytes_fetched, "uploaded": mirror.bytes_uploaded},
        "blobs_mounted": mirror.blobs_mounted,
        "dry_run": mirror.dry_run,
    })
}

pub(crate) fn error_document(error: &v1::JobError) -> serde_json::Value {
    json!({
        "message": error.message,
        "hint": error.hint,
        "reason": error.reason,
        "retryable": error.retryable,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_says_what_it_was_asked_for_and_how_many_images_failed() {
        let spec = v1::PipelineSpec {
            source: "registry://a.io/b:1".to_owned(),
            platform: Some(v1::Platform { os: "linux".to_owned(), ..v1::Platform::default() }),
            all: true,
            attestations: v1::AttestationPolicy::Retarget.into(),
            signatures: v1::SignaturePolicy::Keep.into(),
            provenance: true,
            priority: -3,
            ..v1::PipelineSpec::default()
        };
        let said = "--os linux --all --attestations retarget --signatures keep --provenance --priority -3";
        assert_eq!(options(&spec).join(" "), said);
        let job = v1::Job { spec: Some(spec), state: JobState::Running.into(), ..v1::Job::default() };
        assert!(text(&job).unwrap().contains(&format!("Options:     {said}\n")));
        assert_eq!(options(&v1::PipelineSpec::default()), [""; 0]);

        let config = "mirrors: [{sources: [a.io/b], targets: ['c.io/{repository}:{tag}']}]";
        let mirror = v1::MirrorSpec { config: config.to_owned(), ..v1::MirrorSpec::default() };
        let result = v1::MirrorResult { failed: 2, images: 3, ..v1::MirrorResult::default() };
        let job = v1::Job {
            spec: Some(v1::PipelineSpec { mirror: Some(mirror), ..v1::PipelineSpec::default() }),
            state: JobState::Succeeded.into(),
            result: Some(v1::ImageResult { mirror: Some(result), ..v1::ImageResult::default() }),
            ..v1::Job::default()
        };
        let line = lines(std::slice::from_ref(&job)).unwrap();
        assert!(line.contains(" 2 failed ") && line.ends_with(" mirror of a.io to c.io\n"), "{line}");
        assert!(text(&job).unwrap().contains("State:       succeeded, 2 failed\n"));
    }
}
