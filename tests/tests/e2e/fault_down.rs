//! What goes wrong while an image is read: every case ends right, or with the right error and nothing written.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use occy_tests::http::{Delivery, Response};
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::occyctl::{Ended, Run, occyctl};
use occy_tests::proxy::{self, Fault, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::saved::read_saved;
use occy_tests::tools::{sha256, tool};

use crate::{scratch, tar_uri};

const LAYER: &str = "/v2/app/blobs/sha256:*";
const MANIFEST: &str = "/v2/app/manifests/*";
const SIZE: usize = 2_000_000;

/// A registry with one image of one large layer behind a proxy.
struct Setting {
    _registry: Registry,
    image: Image,
    proxy: FaultProxy,
    directory: tempfile::TempDir,
}

impl Setting {
    fn new() -> Self {
        let registry = Registry::start();
        let image = Image::docker(vec![Layer::noise(1, SIZE)]);
        registry.push(&image, "app", "1");
        let proxy = FaultProxy::before(registry.host());
        Self { _registry: registry, image, proxy, directory: scratch() }
    }

    /// A fault that strikes requests for the layer, not those for the config before it.
    fn layer_fault(&self, times: usize, fault: Fault) {
        let digest = self.image.layer_digests().remove(0);
        let pattern = format!("/v2/app/blobs/{digest}");
        self.proxy.fault(times, "GET", &pattern, fault);
    }

    fn run(&self) -> Run {
        let source = format!("registry://{}/app:1", self.proxy.host());
        occyctl(["process", &source, &tar_uri(&self.directory.path().join("out.tar")), "-v"])
    }

    fn is_right(&self) -> Ended {
        let ended = self.run().ok();
        let saved = read_saved(&self.directory.path().join("out.tar"));
        assert_eq!(sha256(&saved.tars[0]), self.image.diff_ids()[0]);
        assert_eq!(self.proxy.pending(), 0, "every fault struck: {}", self.proxy.story());
        ended
    }

    fn fails(&self, says: &[&str]) -> Ended {
        let ended = self.run().fails(1).says(says);
        assert!(!self.directory.path().join("out.tar").exists());
        assert_eq!(std::fs::read_dir(self.directory.path()).expect("a directory").count(), 0);
        ended
    }

    fn layer_requests(&self) -> usize {
        let digest = self.image.layer_digests().remove(0);
        self.proxy.count("GET", &format!("/v2/app/blobs/{digest}"))
    }
}

#[test]
fn too_many_requests_are_waited_out_by_seconds_and_by_date() {
    let setting = Setting::new();
    let start = Instant::now();
    setting.proxy.fault(1, "GET", MANIFEST, proxy::too_many("1"));
    setting.layer_fault(1, proxy::too_many("1"));
    setting.is_right();
    assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
    let in_two = SystemTime::now() + Duration::from_secs(3);
    let seconds = in_two.duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let date = tool("date", ["-u", "-d", &format!("@{seconds}"), "+%a, %d %b %Y %H:%M:%S GMT"]);
    let start = Instant::now();
    setting.layer_fault(1, proxy::too_many(date.trim()));
    setting.is_right();
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn server_errors_are_tried_again() {
    let setting = Setting::new();
    setting.proxy.fault(1, "GET", MANIFEST, proxy::status(500));
    setting.proxy.fault(1, "GET", MANIFEST, proxy::status(502));
    setting.layer_fault(1, proxy::status(503));
    setting.layer_fault(1, proxy::status(504));
    setting.is_right();
}

#[test]
fn errors_that_stay_end_in_an_error_that_names_them() {
    let setting = Setting::new();
    setting.layer_fault(usize::MAX, proxy::answer(Response::ok("x", *b"no storage today").status_of(503)));
    let digest = setting.image.layer_digests().remove(0);
    let ended = setting.run_with_retries(1).fails(1).says(&["layer 1 of 1", &digest, "503"]);
    let error = ended.stderr.lines().find(|line| line.starts_with("error: ")).expect("an error");
    assert_eq!(error.matches("returned 503").count(), 1, "said once: {error}");
    assert_eq!(setting.layer_requests(), 2, "one retry was allowed: {}", ended.stderr);
}

#[test]
fn what_is_not_there_is_not_asked_for_again() {
    let setting = Setting::new();
    setting.layer_fault(usize::MAX, proxy::status(404));
    let digest = setting.image.layer_digests().remove(0);
    setting.fails(&["layer 1 of 1", &digest, "404"]);
    assert_eq!(setting.layer_requests(), 1);
}

#[test]
fn a_broken_body_is_resumed_where_it_broke() {
    let setting = Setting::new();
    setting.layer_fault(1, proxy::truncate(700_000));
    setting.layer_fault(1, proxy::deliver(Delivery::Reset(Some(600_000))));
    setting.is_right();
    let ranges: Vec<String> =
        setting.proxy.seen().iter().filter_map(|seen| seen.request.get("Range").map(str::to_owned)).collect();
    assert_eq!(ranges.len(), 2, "{}", setting.proxy.story());
    assert!(ranges[0].starts_with("bytes=") && ranges[0].ends_with('-'), "{ranges:?}");
}

#[test]
fn a_rewrite_is_right_whatever_breaks_on_its_way() {
    let to = Registry::start();
    let faults: [fn() -> Fault; 6] = [
        || proxy::truncate(700_000),
        || proxy::deliver(Delivery::Reset(Some(1_000_000))),
        proxy::reset,
        || proxy::status(503),
        proxy::ignore_range,
        || proxy::wrong_range(512),
    ];
    let mut digests = Vec::new();
    // The n-th request for the layer and the one after it meet a fault, also when the layer is read a second time.
    for (skip, pair) in [(0, [0, 1]), (0, [0, 4]), (0, [1, 5]), (1, [0, 0]), (1, [2, 3]), (9, [0, 0])] {
        let setting = Setting::new();
        let digest = setting.image.layer_digests().remove(0);
        let pattern = format!("/v2/app/blobs/{digest}");
        for (nth, fault) in pair.into_iter().enumerate() {
            setting.proxy.fault_after(skip + nth.min(skip), 1, "GET", &pattern, faults[fault]());
        }
        let source = format!("registry://{}/app:1", setting.proxy.host());
        occyctl([
            "process",
            &source,
            &to.uri("app:1"),
            "-f",
            "normalize-timestamps",
            "--compression",
            "zstd",
        ])
        .ok();
        digests.push(to.pull("app", "1").digest);
    }
    digests.dedup();
    assert_eq!(digests.len(), 1);
}

#[test]
fn wrong_bytes_in_a_rewrite_leave_the_tag_as_it_was() {
    let to = Registry::start();
    let old = Image::docker(vec![Layer::noise(9, 100)]);
    to.push(&old, "app", "1");
    for at in [100, 1_000_000, 1_999_000] {
        let setting = Setting::new();
        setting.layer_fault(usize::MAX, proxy::corrupt(at));
        let source = format!("registry://{}/app:1", setting.proxy.host());
        let digest = setting.image.layer_digests().remove(0);
        let command = ["process", &source, &to.uri("app:1"), "-f", "normalize-timestamps"];
        occyctl(command).fails(1).says(&["layer 1 of 1", &digest]);
        assert_eq!(to.digest("app", "1"), old.digest());
    }
}

#[test]
fn a_registry_that_ignores_ranges_sends_all_again() {
    let setting = Setting::new();
    setting.layer_fault(1, proxy::truncate(700_000));
    setting.layer_fault(1, proxy::ignore_range());
    setting.is_right();
}

#[test]
fn a_wrong_range_is_never_taken_for_the_right_one() {
    for by in [1, 512, 100_000] {
        let setting = Setting::new();
        setting.layer_fault(1, proxy::truncate(700_000));
        setting.layer_fault(1, proxy::wrong_range(by));
        let ended = setting.run().run();
        let out = setting.directory.path().join("out.tar");
        match ended.status.code() {
            Some(0) => assert_eq!(sha256(&read_saved(&out).tars[0]), setting.image.diff_ids()[0]),
            code => assert!(code == Some(1) && !out.exists(), "{}", ended.stderr),
        }
    }
}

#[test]
fn connections_that_are_reset_or_closed_are_opened_again() {
    let setting = Setting::new();
    setting.proxy.fault(1, "GET", MANIFEST, proxy::reset());
    setting.layer_fault(1, proxy::reset());
    setting.layer_fault(1, proxy::truncate(0));
    setting.is_right();
}

#[test]
fn a_slow_body_is_waited_for() {
    let setting = Setting::new();
    setting.layer_fault(1, proxy::slow(20, Duration::from_millis(30)));
    setting.is_right();
    assert_eq!(setting.layer_requests(), 1);
}

#[test]
fn wrong_bytes_are_an_error_that_names_layer_and_digests() {
    let digest = |setting: &Setting| setting.image.layer_digests().remove(0);
    let setting = Setting::new();
    setting.layer_fault(usize::MAX, proxy::corrupt(1_000_000));
    setting.fails(&["layer 1 of 1", &digest(&setting)]);
    // Shorter and longer than the manifest says, though whole by their own length.
    for change in [|body: &mut Vec<u8>| body.truncate(1000), |body: &mut Vec<u8>| body.extend([0; 1000])] {
        let setting = Setting::new();
        setting.layer_fault(
            usize::MAX,
            proxy::change(move |mut answer| {
                let mut body = std::mem::take(&mut answer.body);
                change(&mut body);
                answer.with_body(body)
            }),
        );
        setting.fails(&["layer 1 of 1", &digest(&setting)]);
    }
}

#[test]
fn wrong_bytes_are_found_in_an_unfiltered_copy_too() {
    let setting = Setting::new();
    let to = Registry::start();
    setting.layer_fault(usize::MAX, proxy::corrupt(1_000_000));
    let source = format!("registry://{}/app:1", setting.proxy.host());
    let digest = setting.image.layer_digests().remove(0);
    occyctl(["process", &source, &to.uri("app:1")]).fails(1).says(&["layer 1 of 1", &digest]);
    assert!(!to.has("app", "1"));
    assert!(!to.has_blob("app", &digest));
}

#[test]
fn a_manifest_or_config_of_other_bytes_is_refused() {
    let setting = Setting::new();
    let by_digest = format!("registry://{}/app@{}", setting.proxy.host(), setting.image.digest());
    setting.proxy.fault(
        usize::MAX,
        "GET",
        MANIFEST,
        proxy::change(|answer| {
            let body = [&answer.body[..], b"\n"].concat();
            answer.with_body(body)
        }),
    );
    occyctl(["info", &by_digest, "--retries", "0"]).fails(1).says(&[&setting.image.digest()]);
    setting.proxy.heal();
    let lie = sha256(b"something else");
    setting.proxy.fault(
        usize::MAX,
        "GET",
        MANIFEST,
        proxy::change(move |answer| answer.replace("Docker-Content-Digest", &lie)),
    );
    setting.fails(&["digest"]);
    setting.proxy.heal();
    setting.proxy.fault(usize::MAX, "GET", LAYER, proxy::corrupt(20));
    setting.fails(&["digest", &setting.image.config_digest()]);
}

impl Setting {
    fn run_with_retries(&self, retries: usize) -> Run {
        let source = format!("registry://{}/app:1", self.proxy.host());
        let out = tar_uri(&self.directory.path().join("out.tar"));
        occyctl(["process", &source, &out, "--retries", &retries.to_string()])
    }
}
