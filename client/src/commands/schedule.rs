//! `occyctl mirror schedule`: mirrors that a coordinator makes by itself.

use std::fmt::Write;

use occy_pipeline::wire::convert;
use occy_proto::v1::{self, JobState, MirrorSpec};
use serde_json::{Value, json};
use tonic::{Response, Status};

use super::job::{self, shown, time, word};
use super::{mirror, print_bytes, print_json};
use crate::options::{Global, OutputFormat, PutSchedule, RunSchedule, Schedule, ScheduleName};
use crate::remote::connect::Coordinator;
use crate::remote::logins::logins_of_mirror;
use crate::remote::spec;
use crate::remote::watch::Watch;
use crate::settings::Misused;
use crate::{Exit, say};

/// Schedules in one answer of a coordinator.
const PAGE: u32 = 200;

pub(crate) async fn run(command: &Schedule, global: &Global) -> anyhow::Result<Exit> {
    let name = match command {
        Schedule::Put(_) => "put",
        Schedule::Get(_) => "get",
        Schedule::List => "list",
        Schedule::Delete(_) => "delete",
        Schedule::Pause(_) => "pause",
        Schedule::Resume(_) => "resume",
        Schedule::Run(_) => "run",
    };
    let name = format!("mirror schedule {name}");
    let connected = Coordinator::needed(global, &name);
    match command {
        Schedule::Put(options) => put(options, connected, global).await,
        Schedule::Get(ScheduleName { name, tenant }) => {
            let mut coordinator = connected.await?;
            let request = v1::GetScheduleRequest { schedule_id: name.clone(), tenant: tenant.clone() };
            let answered = coordinator.schedules.get_schedule(request).await;
            show(&answer(answered, &coordinator)?.schedule.unwrap_or_default(), global)
        }
        Schedule::List => list(connected.await?, global).await,
        Schedule::Delete(ScheduleName { name, tenant }) => {
            let mut coordinator = connected.await?;
            let request = v1::DeleteScheduleRequest { schedule_id: name.clone(), tenant: tenant.clone() };
            let answered = coordinator.schedules.delete_schedule(request).await;
            let was = answer(answered, &coordinator)?.schedule.unwrap_or_default();
            match global.output_format {
                OutputFormat::Json => show(&was, global),
                OutputFormat::Text => print_bytes(format!("Deleted {}\n", shown(&was.id)).as_bytes()),
            }
        }
        Schedule::Pause(ScheduleName { name, tenant }) => {
            let mut coordinator = connected.await?;
            let request = v1::PauseScheduleRequest { schedule_id: name.clone(), tenant: tenant.clone() };
            let answered = coordinator.schedules.pause_schedule(request).await;
            show(&answer(answered, &coordinator)?.schedule.unwrap_or_default(), global)
        }
        Schedule::Resume(ScheduleName { name, tenant }) => {
            let mut coordinator = connected.await?;
            let request = v1::ResumeScheduleRequest { schedule_id: name.clone(), tenant: tenant.clone() };
            let answered = coordinator.schedules.resume_schedule(request).await;
            show(&answer(answered, &coordinator)?.schedule.unwrap_or_default(), global)
        }
        Schedule::Run(options) => run_now(options, connected.await?, global).await,
    }
}

fn answer<T>(answered: Result<Response<T>, Status>, coordinator: &Coordinator) -> anyhow::Result<T> {
    Ok(answered.map_err(|status| coordinator.error(status))?.into_inner())
}

async fn put(
    options: &PutSchedule,
    connected: impl Future<Output = anyhow::Result<Coordinator>>,
    global: &Global,
) -> anyhow::Result<Exit> {
    let (text, config) = mirror::read_config(&options.config)?;
    if config.schedule.is_none() {
        let problem = "it says no schedule: write `schedule` with cron or interval";
        return Err(Misused(format!("{}: {problem}", options.config.display())).into());
    }
    mirror::check_passwords(&config, global)?;
    spec::refuse_registry_options(global, &["registry://"])?;
    let mut coordinator = connected.await?;
    let credentials = logins_of_mirror(global, &coordinator, &config).await?;
    let spec = MirrorSpec {
        config: text,
        parallel: convert::count(global.parallel),
        dry_run: false,
        tell_unchanged: false,
    };
    let request = v1::PutScheduleRequest { schedule_id: options.name.clone(), spec: Some(spec), credentials };
    let answered = coordinator.schedules.put_schedule(request).await;
    show(&answer(answered, &coordinator)?.schedule.unwrap_or_default(), global)
}

async fn list(mut coordinator: Coordinator, global: &Global) -> anyhow::Result<Exit> {
    let (mut schedules, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListSchedulesRequest { page_size: PAGE, page_token };
        let answered = coordinator.schedules.list_schedules(request).await;
        let page = answer(answered, &coordinator)?;
        schedules.extend(page.schedules);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    match global.output_format {
        OutputFormat::Json => print_json(&schedules.iter().map(document).collect::<Vec<_>>()),
        OutputFormat::Text => print_bytes(lines(&schedules)?.as_bytes()),
    }
}

async fn run_now(
    options: &RunSchedule,
    mut coordinator: Coordinator,
    global: &Global,
) -> anyhow::Result<Exit> {
    let ScheduleName { name, tenant } = &options.schedule;
    let request = v1::RunScheduleRequest { schedule_id: name.clone(), tenant: tenant.clone() };
    let answered = coordinator.schedules.run_schedule(request).await;
    let v1::RunScheduleResponse { job, started } = answer(answered, &coordinator)?;
    let job = job.unwrap_or_default();
    if !started && !global.quiet {
        say("A run goes on, and no other was begun");
    }
    if options.watch {
        if !global.quiet && started {
            say(&format!("Submitted job {}", shown(&job.id)));
        }
        return Watch::new(&coordinator, &job.id, 0, global).for_report().run().await;
    }
    match global.output_format {
        OutputFormat::Json => print_json(&job::document(&job)),
        OutputFormat::Text => print_bytes(format!("{}\n", shown(&job.id)).as_bytes()),
    }
}

fn show(schedule: &v1::Schedule, global: &Global) -> anyhow::Result<Exit> {
    match global.output_format {
        OutputFormat::Json => print_json(&document(schedule)),
        OutputFormat::Text => print_bytes(text(schedule)?.as_bytes()),
    }
}

/// What is due next, or why nothing is.
fn next(schedule: &v1::Schedule) -> String {
    match (&schedule.start_time, schedule.paused) {
        (Some(_), _) => time(schedule.start_time.as_ref()),
        (None, true) => "paused".to_owned(),
        (None, false) => "never".to_owned(),
    }
}

/// Where a run's job is.
fn state(run: &v1::ScheduleRun) -> String {
    match (run.state(), run.start_time) {
        (JobState::Unspecified, None) => "begins".to_owned(),
        (JobState::Unspecified, Some(_)) => "forgotten".to_owned(),
        (state, _) => word(state),
    }
}

/// The same in a word or two; of one that came to its end, how many images failed, if any did.
fn outcome(run: &v1::ScheduleRun) -> String {
    match &run.result {
        Some(result) if result.failed > 0 => format!("{} failed", result.failed),
        _ => state(run),
    }
}

/// One schedule a line.
fn lines(schedules: &[v1::Schedule]) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        "{:<20} {:<24} {:<36} {:<10} {:>6} {:>6} WHEN",
        "NAME", "NEXT", "LAST RUN", "STATE", "RUNS", "SKIPS"
    )?;
    for schedule in schedules {
        let (job, state) = match &schedule.last_run {
            Some(run) => (shown(&run.job_id), outcome(run)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let v1::Schedule { id, runs, skips, timing, tenant, .. } = schedule;
        let (id, next) = (shown(id), next(schedule));
        let (timing, tenant) = (shown(timing), shown(tenant));
        let line =
            format!("{id:<20} {next:<24} {job:<36} {state:<10} {runs:>6} {skips:>6} {timing} {tenant}");
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(out)
}

fn text(schedule: &v1::Schedule) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "Schedule:  {}", shown(&schedule.id))?;
    if !schedule.tenant.is_empty() {
        writeln!(out, "Tenant:    {}", shown(&schedule.tenant))?;
    }
    writeln!(out, "When:      {}", shown(&schedule.timing))?;
    writeln!(out, "Next:      {}", next(schedule))?;
    if let Some(run) = &schedule.last_run {
        let by_hand = if run.by_hand { ", by hand" } else { "" };
        let began = run.start_time.or(run.due_time);
        writeln!(
            out,
            "Last run:  job {} of {}{by_hand}: {}",
            shown(&run.job_id),
            time(began.as_ref()),
            state(run)
        )?;
    }
    if let Some(result) = schedule.last_run.as_ref().and_then(|run| run.result.as_ref()) {
        writeln!(out, "Result:    {}", job::mirror_text(result))?;
    }
    if let Some(skip) = &schedule.last_skip {
        writeln!(out, "Last skip: {}: {}", time(skip.due_time.as_ref()), shown(&skip.message))?;
    }
    writeln!(out, "Runs:      {}", schedule.runs)?;
    writeln!(out, "Skips:     {}", schedule.skips)?;
    writeln!(out, "Created:   {}", time(schedule.create_time.as_ref()))?;
    writeln!(out, "Updated:   {}", time(schedule.update_time.as_ref()))?;
    writeln!(out, "Mirror:")?;
    for line in schedule.spec.clone().unwrap_or_default().config.lines() {
        writeln!(out, "  {}", shown(line))?;
    }
    Ok(out)
}

fn document(schedule: &v1::Schedule) -> Value {
    let timestamp = |at: Option<prost_types::Timestamp>| at.map(|at| at.to_string());
    let last_run = schedule.last_run.as_ref().map(|run| {
        json!({
            "job": run.job_id,
            "due": timestamp(run.due_time),
            "started": timestamp(run.start_time),
            "by_hand": run.by_hand,
            "state": state(run),
            "result": run.result.as_ref().map(job::mirror_document),
        })
    });
    let last_skip = schedule.last_skip.as_ref().map(|skip| {
        let reason = skip.reason().as_str_name().trim_start_matches("SCHEDULE_SKIP_REASON_").to_lowercase();
        json!({
            "due": timestamp(skip.due_time),
            "reason": reason,
            "message": skip.message,
            "job": Some(&skip.job_id).filter(|job| !job.is_empty()),
        })
    });
    let config = schedule.spec.as_ref().map(|spec| &spec.config).filter(|config| !config.is_empty());
    json!({
        "id": schedule.id,
        "tenant": schedule.tenant,
        "when": schedule.timing,
        "paused": schedule.paused,
        "due": timestamp(schedule.due_time),
        "starts": timestamp(schedule.start_time),
        "last_run": last_run,
        "last_skip": last_skip,
        "runs": schedule.runs,
        "skips": schedule.skips,
        "created": timestamp(schedule.create_time),
        "updated": timestamp(schedule.update_time),
        "config": config,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_when_it_is_due_what_came_of_the_last_run_and_how_often_it_was_skipped() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let run = v1::ScheduleRun {
            job_id: "j1".to_owned(),
            start_time: at(0),
            state: JobState::Succeeded.into(),
            ..v1::ScheduleRun::default()
        };
        let one = v1::Schedule {
            id: "nightly".to_owned(),
            start_time: at(86_400),
            last_run: Some(run),
            skips: 3,
            timing: "0 3 * * * UTC".to_owned(),
            ..v1::Schedule::default()
        };
        let two = v1::Schedule { id: "b".to_owned(), paused: true, ..v1::Schedule::default() };
        let mut three = one.clone();
        let result = v1::MirrorResult { failed: 2, ..v1::MirrorResult::default() };
        three.last_run.as_mut().unwrap().result = Some(result);
        let lines = lines(&[one.clone(), two, three]).unwrap();
        let words: Vec<Vec<&str>> = lines.lines().map(|line| line.split_whitespace().collect()).collect();
        let expected =
            ["nightly", "1970-01-02T00:00:00Z", "j1", "succeeded", "0", "3", "0", "3", "*", "*", "*", "UTC"];
        assert_eq!(words[1], expected);
        assert_eq!(words[2], ["b", "paused", "-", "-", "0", "0"]);
        assert_eq!(words[3][2..5], ["j1", "2", "failed"]);
        let document = document(&one);
        assert_eq!((&document["last_run"]["job"], &document["skips"]), (&json!("j1"), &json!(3)));
        assert_eq!((&document["due"], &document["config"]), (&Value::Null, &Value::Null));
    }
}
