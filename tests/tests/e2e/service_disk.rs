//! A coordinator whose disk is full: it says so, nothing wrong becomes visible, and it goes on by itself when there is room again.

use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::text;
use occy_tests::coordinator::Coordinator;
use occy_tests::disk::SmallDisk;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::proxy::{Barrier, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::saved::read_saved;
use occy_tests::worker::Worker;
use serde_json::json;

use crate::service_jobs::{job, state, submit};
use crate::{names, scratch, small, tar_uri};

const MIB: u64 = 1024 * 1024;

#[test]
fn a_full_disk_is_told_for_what_cannot_be_stored_and_the_rest_goes_on() {
    let Some(disk) = SmallDisk::mount(16 * MIB, "a_full_disk_is_told_for_what_cannot_be_stored") else {
        return;
    };
    let (from, to) = (Registry::start(), Registry::start());
    let image = Image::docker(vec![Layer::noise(1, 3_000_000)]);
    let source = from.push(&image, "app", "1");
    let coordinator = Coordinator::on_disk(
        &disk,
        &["--embedded-workers", "0", "--max-attempts", "1", "--allow-path", &text(disk.path())],
    );
    let _worker = Worker::start(&coordinator, &[]);
    let directory = scratch();
    let elements = text(&directory.path().join("elements"));
    coordinator.call("ReadImage", &json!({"source": source})).with("save", &elements).run().one();
    let written = json!({"destination": to.uri("written:1")});
    let write = || coordinator.call("WriteImage", &written).with("elements", &elements).run();
    let file = disk.path().join("image.tar");
    let to_file = json!({"source": source, "destination": tar_uri(&file)});
    let id = submit(&coordinator, &json!({"source": source, "destination": to.uri("before:1")}));
    coordinator.ask("WatchJob", &id).all();
    let before = names(disk.path());

    // What the store needs for a job is there, and no room for a layer.
    disk.fill_but(3 * MIB / 2);
    write().fails("RESOURCE_EXHAUSTED", "STORAGE_FULL");
    let id = submit(&coordinator, &to_file);
    coordinator.ask("WatchJob", &id).all();
    let failed = job(&coordinator, &id);
    assert_eq!(
        (&failed["state"], &failed["error"]["reason"]),
        (&json!("JOB_STATE_FAILED"), &json!("STORAGE_FULL")),
        "{failed}"
    );
    assert_eq!((&failed["error"]["code"], &failed["error"]["retryable"]), (&json!(8), &json!(true)));
    assert!(!to.has("written", "1"));
    disk.free();
    assert_eq!(names(disk.path()), before, "nothing is left of what failed");

    assert_eq!(write().error, None);
    assert_eq!(to.digest("written", "1"), image.digest());
    let id = submit(&coordinator, &to_file);
    coordinator.ask("WatchJob", &id).all();
    assert_eq!(state(&coordinator, &id), "JOB_STATE_SUCCEEDED");
    assert_eq!(read_saved(&file).config, image.config);
}

#[test]
fn jobs_go_on_by_themselves_when_their_store_can_be_written_again() {
    let Some(disk) = SmallDisk::mount(16 * MIB, "jobs_go_on_by_themselves_when_their_store") else { return };
    let (from, to) = (Registry::start(), Registry::start());
    let image = small();
    let source = from.push(&image, "app", "1");
    let proxy = FaultProxy::before(from.host());
    let barrier = Barrier::default();
    proxy.fault(1, "GET", &format!("*/blobs/{}", image.layer_digests()[0]), barrier.fault());
    let through = source.replace(from.host(), &proxy.host());
    let mut coordinator = Coordinator::on_disk(&disk, &["--embedded-workers", "2"]);
    let spec = |destination: &str| json!({"source": through, "destination": to.uri(destination), "filters": ["normalize-timestamps"]});
    let id = submit(&coordinator, &spec("app:1"));
    let mut watcher = coordinator.call("WatchJob", &id).start();
    watcher.wait_for(|message| message["event"]["layer_changed"]["state"] == "LAYER_STATE_DONE");

    disk.fill();
    // There is some room in the file itself, at last for small jobs only; what is accepted ends at once.
    let many = format!("inspect:file={}", "x".repeat(2000));
    let mut accepted = 0;
    for filters in [vec![&*many; 8], Vec::new()] {
        let spec =
            json!({"source": from.uri("app:none"), "destination": to.uri("other:1"), "filters": filters});
        let refused = loop {
            assert!(accepted < 190, "the store is never full");
            let answer = coordinator.ask("SubmitJob", &json!({"spec": spec}));
            match &answer.error {
                None => accepted += 1,
                // A running job met the full disk first: it is to be tried again, as one that is told so would.
                Some(error) if error["code"] == "UNAVAILABLE" => sleep(Duration::from_millis(10)),
                Some(_) => break answer,
            }
        };
        refused.fails("RESOURCE_EXHAUSTED", "STORAGE_FULL");
    }
    // The last layer is done, and that cannot be written down: so nothing is visible, and the job has not ended.
    barrier.open();
    sleep(Duration::from_millis(700));
    assert!(!to.has("app", "1"));

    disk.free();
    wait_for(&coordinator, "all have ended", || state(&coordinator, &id) == "JOB_STATE_SUCCEEDED");
    wait_for(&coordinator, "those without a source, too", || {
        let failed = json!({"states": ["JOB_STATE_FAILED"], "page_size": 200});
        let failed = coordinator.ask("ListJobs", &failed).one();
        failed["jobs"].as_array().map(Vec::len) == Some(accepted)
    });
    assert!(coordinator.log().contains("opened anew"), "{}", coordinator.log());
    to.pull("app", "1");
    let id = submit(&coordinator, &spec("app:2"));
    coordinator.ask("WatchJob", &id).all();
    assert_eq!(to.digest("app", "2"), to.digest("app", "1"));
    // What it wrote then is there later, too.
    coordinator.kill();
    coordinator.restart();
    assert_eq!(state(&coordinator, &id), "JOB_STATE_SUCCEEDED");
}

#[track_caller]
fn wait_for(coordinator: &Coordinator, what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}: {}", coordinator.log());
        sleep(Duration::from_millis(100));
    }
}
