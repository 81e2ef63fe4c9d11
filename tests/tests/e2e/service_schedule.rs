//! Mirrors that coordinators make by themselves, at the times that their files say.

use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::text;
use occy_tests::coordinator::Coordinator;
use occy_tests::image::Image;
use occy_tests::nats::Nats;
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::write;
use serde_json::{Value, json};

use crate::mirror::mirror;
use crate::service_credentials::{is_clean, login};
use crate::service_jobs::state;
use crate::{scratch, small};

/// No worker: a mirror needs none.
const ALONE: [&str; 2] = ["--embedded-workers", "0"];
/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(120);

fn config(from: &str, to: &str, schedule: &str) -> String {
    format!("mirrors:\n  - sources: ['{from}/app']\n    targets: ['{to}/app']\nschedule: {{{schedule}}}\n")
}

fn put(coordinator: &Coordinator, text: &str) -> Value {
    let request = json!({"schedule_id": "often", "spec": {"config": text}});
    coordinator.ask("PutSchedule", &request).one()["schedule"].clone()
}

fn named() -> Value {
    json!({"schedule_id": "often"})
}

fn get(coordinator: &Coordinator) -> Value {
    coordinator.ask("GetSchedule", &named()).one()["schedule"].clone()
}

fn number(schedule: &Value, field: &str) -> u64 {
    schedule[field].as_str().expect("a number").parse().expect("a number")
}

/// The time of a field, in milliseconds.
fn millis(time: &Value) -> u64 {
    let time = time.as_str().expect("a time");
    let (day, clock) = time.trim_end_matches('Z').split_once('T').expect("a time");
    let day: Vec<u64> = day.split('-').map(|number| number.parse().expect("a number")).collect();
    // Days since the first of March of year 0, in which a year's last day is the one that may be missing.
    let (year, month) = if day[1] > 2 { (day[0], day[1] - 3) } else { (day[0] - 1, day[1] + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day[2];
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let seconds = clock.split(':').fold(0, |sum, number| 60 * sum + number.parse::<u64>().expect("a number"));
    let fraction: u64 = format!("{fraction:0<3}")[..3].parse().expect("a number");
    days * 86_400_000 + seconds * 1000 + fraction
}

/// Waits until the schedule is as wanted.
#[track_caller]
fn wait_for(coordinator: &Coordinator, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let schedule = get(coordinator);
        if wanted(&schedule) {
            return schedule;
        }
        assert!(start.elapsed() < LIMIT, "not {what}: {schedule}\n{}", coordinator.log());
        sleep(Duration::from_millis(100));
    }
}

fn wait_for_runs(coordinator: &Coordinator, count: u64) -> Value {
    wait_for(coordinator, &format!("{count} runs"), |schedule| number(schedule, "runs") >= count)
}

/// All jobs, the newest first.
fn jobs(coordinator: &Coordinator) -> Vec<Value> {
    let listed = coordinator.ask("ListJobs", &json!({"page_size": 200})).one();
    assert_eq!(listed["next_page_token"], "");
    listed["jobs"].as_array().expect("jobs").clone()
}

/// Stops the schedule, and compares what it says of its runs with the jobs that there are.
fn check_runs(coordinator: &Coordinator) {
    coordinator.ask("PauseSchedule", &named()).one();
    let schedule = wait_for(coordinator, "at rest", |schedule| !schedule["last_run"]["start_time"].is_null());
    let jobs = jobs(coordinator);
    assert_eq!(jobs.len() as u64, number(&schedule, "runs"), "{schedule}\n{jobs:#?}");
    assert_eq!(jobs[0]["id"], schedule["last_run"]["job_id"]);
    for job in &jobs {
        coordinator.ask("WatchJob", &json!({"job_id": job["id"]})).all();
        assert_eq!(state(coordinator, &json!({"job_id": job["id"]})), "JOB_STATE_SUCCEEDED");
    }
}

#[test]
fn an_interval_makes_runs_and_a_coordinator_that_is_killed_goes_on_with_them() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let mut coordinator = Coordinator::start(&ALONE);
    let made = put(&coordinator, &config(from.host(), to.host(), "interval: 1s"));
    assert_eq!((&made["timing"], number(&made, "runs")), (&json!("every 1s"), 0));
    assert_eq!(millis(&made["due_time"]) - millis(&made["create_time"]), 1000);
    wait_for_runs(&coordinator, 2);
    assert_eq!(to.digest("app", "1"), small().digest());
    for _ in 0..3 {
        coordinator.kill();
        coordinator.restart();
        let runs = number(&get(&coordinator), "runs");
        wait_for_runs(&coordinator, runs + 2);
    }
    // What is new at the source comes by itself.
    let late = Image::oci(vec![occy_tests::layer::Layer::noise(7, 1000)]);
    from.push(&late, "app", "2");
    let start = Instant::now();
    while !to.has("app", "2") {
        assert!(start.elapsed() < LIMIT, "{}", coordinator.log());
        sleep(Duration::from_millis(100));
    }
    check_runs(&coordinator);
}

#[test]
fn what_was_due_while_no_coordinator_was_there_is_made_up_for_once() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let mut coordinator = Coordinator::start(&ALONE);
    let made = put(&coordinator, &config(from.host(), to.host(), "interval: 5s"));
    coordinator.kill();
    // Three times are due meanwhile.
    sleep(Duration::from_millis(15_500));
    coordinator.restart();
    let since = millis(&made["create_time"]);
    let due = |schedule: &Value| match &schedule["last_run"] {
        Value::Null => 0,
        run => (millis(&run["due_time"]) - since) / 5000,
    };
    let schedule = wait_for(&coordinator, "on time again", |schedule| due(schedule) >= 4);
    // Two of the times have come to nothing.
    let came = number(&schedule, "runs") + number(&schedule, "skips");
    let is_pending = schedule["last_run"]["start_time"].is_null();
    assert!(came + u64::from(is_pending) <= due(&schedule) - 2, "{schedule}");
    assert!(came > 0 && number(&schedule, "runs") > 0, "one was made up for: {schedule}");
    check_runs(&coordinator);
}

#[test]
fn of_two_coordinators_one_begins_each_run_and_the_other_goes_on_alone() {
    let nats = Nats::start();
    let engine = nats.url();
    let arguments = [&ALONE[..], &["--engine", &engine, "--engine-lease", "2"]].concat();
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let (mut one, two) = (Coordinator::start(&arguments), Coordinator::start(&arguments));
    put(&one, &config(from.host(), to.host(), "interval: 1s"));
    wait_for_runs(&two, 6);
    one.kill();
    let runs = number(&get(&two), "runs");
    wait_for_runs(&two, runs + 4);
    check_runs(&two);
    // What one has changed the other one does.
    one.restart();
    one.ask("ResumeSchedule", &named()).one();
    let runs = number(&get(&two), "runs");
    wait_for_runs(&two, runs + 2);
    two.ask("DeleteSchedule", &named()).one();
    one.ask("GetSchedule", &named()).fails("NOT_FOUND", "NO_SUCH_SCHEDULE");
}

/// A mirror whose only image waits behind the barrier.
struct Waiting {
    from: Registry,
    to: Registry,
    source: FaultProxy,
    barrier: Barrier,
}

impl Waiting {
    fn new() -> Self {
        let (from, to) = (Registry::start(), Registry::start());
        from.push(&small(), "app", "1");
        let (source, barrier) = (FaultProxy::before(from.host()), Barrier::default());
        source.fault(1, "GET", &format!("*/blobs/{}", small().layer_digests()[0]), barrier.fault());
        Self { from, to, source, barrier }
    }

    fn config(&self, schedule: &str) -> String {
        config(&self.source.host(), self.to.host(), schedule)
    }

    fn is_over(&self) {
        self.barrier.open();
        self.source.heal();
    }
}

#[test]
fn a_time_that_is_due_while_a_run_goes_on_is_skipped_and_said_so() {
    let case = Waiting::new();
    let coordinator = Coordinator::start(&ALONE);
    put(&coordinator, &case.config("interval: 1s"));
    let schedule = wait_for(&coordinator, "2 skips", |schedule| number(schedule, "skips") >= 2);
    assert_eq!(number(&schedule, "runs"), 1, "{schedule}");
    let (run, skip) = (&schedule["last_run"], &schedule["last_skip"]);
    assert_eq!(skip["reason"], "SCHEDULE_SKIP_REASON_OVERLAP");
    assert_eq!((&skip["job_id"], &run["state"]), (&run["job_id"], &json!("JOB_STATE_RUNNING")));
    assert!(millis(&skip["due_time"]) > millis(&run["due_time"]), "{schedule}");
    coordinator.wait_for_log("a scheduled run is skipped", LIMIT);
    // By hand neither.
    let asked = coordinator.ask("RunSchedule", &named()).one();
    assert_eq!((&asked["job"]["id"], &asked["started"]), (&run["job_id"], &json!(false)));
    assert_eq!(jobs(&coordinator).len(), 1);
    case.is_over();
    wait_for_runs(&coordinator, 2);
    assert_eq!(case.to.digest("app", "1"), case.from.digest("app", "1"));
    check_runs(&coordinator);
}

#[test]
fn a_run_that_its_clients_limits_do_not_admit_is_skipped_and_comes_when_there_is_room() {
    let case = Waiting::new();
    let coordinator = Coordinator::start(&[&ALONE[..], &["--client-jobs", "1"]].concat());
    let text = case.config("interval: 1s");
    let once = coordinator.ask("SubmitMirror", &json!({"spec": {"config": text}})).one();
    put(&coordinator, &text);
    let schedule = wait_for(&coordinator, "2 skips", |schedule| number(schedule, "skips") >= 2);
    assert_eq!(
        (number(&schedule, "runs"), &schedule["last_skip"]["reason"]),
        (0, &json!("SCHEDULE_SKIP_REASON_REFUSED"))
    );
    let message = schedule["last_skip"]["message"].as_str().expect("a message");
    assert!(message.contains("jobs of this client"), "{message}");
    case.is_over();
    coordinator.ask("WatchJob", &json!({"job_id": once["job"]["id"]})).all();
    wait_for_runs(&coordinator, 1);
}

#[test]
fn a_schedules_credentials_are_kept_as_long_as_it_is() {
    let private = || Registry::with_htpasswd("user", "hunter2");
    let (from, to) = (private(), private());
    from.push(&small(), "app", "1");
    let text_of = config(from.host(), to.host(), "interval: 1s");
    let request = |hosts: &[&str]| {
        let credentials: Vec<_> = hosts.iter().map(|host| login(host)).collect();
        json!({"schedule_id": "often", "spec": {"config": text_of}, "credentials": credentials})
    };
    let keyless = Coordinator::start(&ALONE);
    keyless.ask("PutSchedule", &request(&[from.host()])).fails("FAILED_PRECONDITION", "NO_SECRET_KEY");
    keyless.ask("GetSchedule", &named()).fails("NOT_FOUND", "NO_SUCH_SCHEDULE");

    let directory = scratch();
    let keys = directory.path().join("keys");
    write(&keys, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n");
    let mut coordinator = Coordinator::start(&[&ALONE[..], &["--secret-key-file", &text(&keys)]].concat());
    let first = coordinator.ask("PutSchedule", &request(&[from.host()])).one()["schedule"].clone();
    let run = wait_for_runs(&coordinator, 1);
    let job = json!({"job_id": run["last_run"]["job_id"]});
    coordinator.ask("WatchJob", &job).all();
    assert!(!to.has("app", "1"), "it may not write there");
    let failed = wait_for(&coordinator, "a failure", |schedule| schedule["last_run"]["result"].is_object());
    let (run, result) = (&failed["last_run"], &failed["last_run"]["result"]);
    assert_eq!((&run["state"], &result["failed"]), (&json!("JOB_STATE_SUCCEEDED"), &json!("1")), "{failed}");
    // The next have both, after a restart too; and what was due stays due.
    let second =
        coordinator.ask("PutSchedule", &request(&[from.host(), to.host()])).one()["schedule"].clone();
    let since = millis(&first["create_time"]);
    assert_eq!((millis(&second["due_time"]) - since) % 1000, 0, "{second}");
    coordinator.kill();
    coordinator.restart();
    let start = Instant::now();
    while !to.has("app", "1") {
        assert!(start.elapsed() < LIMIT, "{}", coordinator.log());
        sleep(Duration::from_millis(100));
    }
    assert_eq!(to.digest("app", "1"), small().digest());
    let shown = json!([get(&coordinator), coordinator.ask("ListSchedules", &json!({})).one()]).to_string();
    assert!(!shown.contains("hunter2"), "{shown}");
    is_clean(coordinator.directory());

    coordinator.ask("DeleteSchedule", &named()).one();
    coordinator.ask("DeleteSchedule", &named()).fails("NOT_FOUND", "NO_SUCH_SCHEDULE");
    let before = jobs(&coordinator).len();
    coordinator.kill();
    coordinator.restart();
    sleep(Duration::from_secs(3));
    assert_eq!(jobs(&coordinator).len(), before, "nothing is begun any more");
    assert_eq!(coordinator.ask("ListSchedules", &json!({})).one()["schedules"], json!([]));
}

#[test]
fn a_client_has_schedules_of_its_own_and_an_administrator_everybodys() {
    let directory = scratch();
    let file = directory.path().join("tokens.toml");
    let tokens = [
        ("one", "\"jobs\""),
        ("two", "\"jobs\", \"delete\""),
        ("reader", "\"read\""),
        ("admin", "\"admin\""),
    ];
    let line = |(name, scopes)| {
        format!("[[token]]\nname = \"{name}\"\nvalue = \"{name}-hunter2-hunter2\"\nscopes = [{scopes}]\n")
    };
    write(&file, tokens.map(line).concat());
    let more = ["--tokens-file", &text(&file), "--max-schedules", "3", "--client-schedules", "2"];
    let coordinator = Coordinator::start(&[&ALONE[..], &more].concat());
    let ask = |name: &str, method: &str, request: &Value| {
        coordinator.call(method, request).with("token", format!("{name}-hunter2-hunter2")).run()
    };
    let spec = |more: &str| json!({"config": format!("mirrors:\n  - sources: [a.example/x]\n    targets: [b.example/x]\n{more}schedule: {{cron: '0 3 * * *'}}\n")});
    let put = |name: &str, id: &str| ask(name, "PutSchedule", &json!({"schedule_id": id, "spec": spec("")}));
    let all = ["GetSchedule", "DeleteSchedule", "PauseSchedule", "ResumeSchedule", "RunSchedule"];

    put("reader", "a").fails("PERMISSION_DENIED", "SCOPE_MISSING");
    coordinator.ask("ListSchedules", &json!({})).fails("UNAUTHENTICATED", "UNAUTHENTICATED");
    for method in all {
        ask("reader", method, &json!({"schedule_id": "a"})).fails("PERMISSION_DENIED", "SCOPE_MISSING");
    }
    put("one", "a").one();
    put("two", "a").one();
    put("one", "b").one();
    put("one", "c").fails("RESOURCE_EXHAUSTED", "TOO_MANY");
    put("two", "b").fails("RESOURCE_EXHAUSTED", "TOO_MANY");
    put("one", "b").one();
    let deletes = json!({"schedule_id": "a", "spec": spec("    deletion: {max: 1}\n")});
    ask("one", "PutSchedule", &deletes).fails("PERMISSION_DENIED", "SCOPE_MISSING");
    ask("two", "PutSchedule", &deletes).one();

    for (of, expected) in [(json!("token:one"), "NO_SUCH_SCHEDULE"), (json!(""), "NO_SUCH_SCHEDULE")] {
        for method in all {
            ask("two", method, &json!({"schedule_id": "b", "tenant": of})).fails("NOT_FOUND", expected);
        }
    }
    let listed = |name: &str, request: &Value| {
        let page = ask(name, "ListSchedules", request).one();
        let ids = page["schedules"].as_array().expect("schedules").iter();
        let ids: Vec<_> = ids
            .map(|one| {
                format!("{} {}", one["tenant"].as_str().expect("a name"), one["id"].as_str().expect("a name"))
            })
            .collect();
        (ids, page["next_page_token"].clone())
    };
    assert_eq!(listed("two", &json!({})).0, ["token:two a"]);
    let (first, token) = listed("admin", &json!({"page_size": 2}));
    assert_eq!(first, ["token:one a", "token:one b"]);
    assert_eq!(
        listed("admin", &json!({"page_size": 2, "page_token": token})),
        (vec!["token:two a".to_owned()], json!(""))
    );
    ask("admin", "ListSchedules", &json!({"page_token": "?"})).fails("INVALID_ARGUMENT", "INVALID_FIELD");
    ask("admin", "GetSchedule", &json!({"schedule_id": "a"})).fails("NOT_FOUND", "NO_SUCH_SCHEDULE");
    let paused = ask("admin", "PauseSchedule", &json!({"schedule_id": "a", "tenant": "token:one"})).one();
    assert_eq!(paused["schedule"]["paused"], true);
    assert_eq!(ask("one", "GetSchedule", &json!({"schedule_id": "a"})).one()["schedule"]["paused"], true);
    ask("admin", "DeleteSchedule", &json!({"schedule_id": "a", "tenant": "token:one"})).one();
    put("two", "b").one();
}

#[test]
fn what_cannot_be_scheduled_is_refused_at_once() {
    let coordinator = Coordinator::start(&ALONE);
    let refused = |id: &str, text: &str, part: &str| {
        let request = json!({"schedule_id": id, "spec": {"config": text}});
        let error = coordinator.ask("PutSchedule", &request).fails("INVALID_ARGUMENT", "INVALID_FIELD");
        assert!(error["message"].as_str().expect("a message").contains(part), "{error}");
    };
    let text = config("a.example", "b.example", "interval: 6h");
    for id in ["", "-a", "a b", "a/b", "\u{fc}", &"x".repeat(65)] {
        refused(id, &text, "schedule_id: ");
    }
    refused(
        "a",
        "mirrors:\n  - sources: [a.example/x]\n    targets: [b.example/x]\n",
        "config: it says no schedule",
    );
    refused("a", &config("a.example", "b.example", "cron: 0 3 * *"), "config: line 4, column 18: ");
    let request = json!({"schedule_id": "a", "spec": {"config": text, "parallel": 257}});
    coordinator.ask("PutSchedule", &request).fails("INVALID_ARGUMENT", "INVALID_FIELD");
    assert_eq!(coordinator.ask("ListSchedules", &json!({})).one()["schedules"], json!([]));
}

fn schedule(coordinator: &Coordinator, arguments: &[&str]) -> Run {
    occyctl([&["mirror", "schedule"], arguments, &["--coordinator", &coordinator.url()]].concat())
}

#[test]
fn the_command_line_gives_shows_runs_and_deletes_schedules() {
    let (from, to) = (Registry::start(), Registry::start());
    from.push(&small(), "app", "1");
    let coordinator = Coordinator::start(&ALONE);
    let directory = scratch();
    let file = directory.path().join("scheduled.yaml");
    write(&file, config(from.host(), to.host(), "cron: '0 3 29 2 *', timezone: Europe/Berlin, jitter: 10m"));
    let file = text(&file);
    let made = schedule(&coordinator, &["put", "leap", "-c", &file]).ok().text();
    for part in ["Schedule:  leap", "0 3 29 2 * Europe/Berlin, up to 10m later", "-02-29T02:", "Runs:      0"]
    {
        assert!(made.contains(part), "{part}: {made}");
    }
    let run = schedule(&coordinator, &["run", "leap", "--watch"]).ok();
    assert!(run.text().contains("1 done, 0 unchanged"), "{}", run.text());
    assert_eq!(to.digest("app", "1"), small().digest());
    let job = run.stderr.lines().find_map(|line| line.strip_prefix("Submitted job ")).expect("its name");
    let list = schedule(&coordinator, &["list"]).ok().text();
    let words: Vec<_> = list.lines().nth(1).expect("a schedule").split_whitespace().collect();
    assert_eq!(
        (words[0], words[2], words[3], words[4], words[5]),
        ("leap", job, "succeeded", "1", "0"),
        "{list}"
    );
    let got = schedule(&coordinator, &["get", "leap", "--output-format", "json"]).ok().json();
    assert_eq!((&got["last_run"]["job"], &got["last_run"]["by_hand"]), (&json!(job), &json!(true)), "{got}");
    assert_eq!(got["last_run"]["result"]["done"], 1, "{got}");
    assert!(got["config"].as_str().expect("a file").contains("schedule: "), "{got}");
    let paused = schedule(&coordinator, &["pause", "leap"]).ok().text();
    assert!(paused.contains("Next:      paused"), "{paused}");
    let resumed = schedule(&coordinator, &["resume", "leap"]).ok().text();
    assert!(resumed.contains("-02-29T02:"), "{resumed}");
    // By another name of the client's own it is not found; by its name it is deleted.
    schedule(&coordinator, &["get", "leap", "--tenant", "token:x"]).fails(1).says(&["leap"]);
    schedule(&coordinator, &["delete", "leap"]).ok();
    schedule(&coordinator, &["get", "leap"]).fails(1).says(&["there is no schedule \"leap\""]);

    // Without a schedule, or a coordinator, it says so.
    let plain =
        format!("mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n", from.host(), to.host());
    let other = directory.path().join("plain.yaml");
    write(&other, &plain);
    schedule(&coordinator, &["put", "leap", "-c", &text(&other)]).fails(2).says(&["says no schedule"]);
    occyctl(["mirror", "schedule", "list"]).fails(2).says(&["--coordinator"]);
    // A mirror that is made at once is made once, here and there, and says so.
    let scheduled = plain + "schedule: {interval: 6h}\n";
    let url = coordinator.url();
    for more in [&[][..], &["--coordinator", &url]] {
        let ended = mirror(directory.path(), &scheduled, more).ok();
        assert!(ended.stderr.contains("made once, now: its schedule (every 6h)"), "{}", ended.stderr);
        assert!(mirror(directory.path(), &scheduled, &[more, &["-q"]].concat()).ok().stderr.is_empty());
    }
    assert_eq!(coordinator.ask("ListSchedules", &json!({})).one()["schedules"], json!([]));
}
