//! Uploads that another worker goes on with: those of workers that are killed, or stopped, between two pieces of a layer.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use occy_tests::conforming::{Conforming, Ways};
use occy_tests::coordinator::Coordinator;
use occy_tests::http::{Delivery, Request, Response};
use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member, noise, tar};
use occy_tests::proxy::{Fault, FaultProxy, slow};
use occy_tests::registry::Registry;
use occy_tests::tools::{sha256, tool};
use occy_tests::worker::{PythonWorker, Worker};
use serde_json::{Value, json};

use crate::service_jobs::{job, submit};
use crate::service_telemetry;

/// Bytes of the layer.
const SIZE: usize = 12_000_000;
/// The most that is in one piece: what was asked for, and one of the chunks in which bytes travel.
const PIECE: usize = 2 * 256 * 1024;
/// How workers are told to send so small a layer in pieces.
const PIECES: [&str; 4] = ["--upload-chunk", "256K", "--resumable-from", "1M"];

/// How long anything may take, with a layer of any size.
const LIMIT: Duration = Duration::from_secs(900);
/// How long a message may take from a worker to its coordinator.
const HEARD: Duration = Duration::from_secs(1);
/// How long a worker may be silent.
const LEASE: Duration = Duration::from_secs(3);

/// Pieces of a layer on their way to a registry. The one behind the first nine tenths, or so many bytes as are said, is held, and never
/// arrives unless that is said.
#[derive(Clone)]
struct Way {
    held_behind: usize,
    arrived: Arc<AtomicUsize>,
    largest: Arc<AtomicUsize>,
    is_held: Arc<AtomicBool>,
    is_free: Arc<AtomicBool>,
    /// Whether the one that is held arrives later.
    arrives: Arc<AtomicBool>,
}

impl Way {
    fn of(size: usize) -> Self {
        Self {
            held_behind: size / 10 * 9,
            arrived: Arc::default(),
            largest: Arc::default(),
            is_held: Arc::default(),
            is_free: Arc::default(),
            arrives: Arc::default(),
        }
    }

    fn fault(&self) -> Fault {
        let way = self.clone();
        Arc::new(move |request, upstream| {
            let is_behind = way.arrived.load(Ordering::SeqCst) >= way.held_behind;
            if is_behind && !way.is_free.load(Ordering::SeqCst) {
                way.is_held.store(true, Ordering::SeqCst);
                while !way.is_free.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                if !way.arrives.load(Ordering::SeqCst) {
                    return Response { delivery: Delivery::Reset(None), ..Response::status(500) };
                }
            }
            way.arrived.fetch_add(request.body.len(), Ordering::SeqCst);
            way.largest.fetch_max(request.body.len(), Ordering::SeqCst);
            upstream(request)
        })
    }

    fn arrived(&self) -> usize {
        self.arrived.load(Ordering::SeqCst)
    }

    /// Waits until a piece is held; by then the coordinator knows, or hears at once, of those before it.
    fn wait(&self) {
        eventually("a piece is held", || self.is_held.load(Ordering::SeqCst));
        std::thread::sleep(HEARD);
    }

    fn free(&self) {
        self.is_free.store(true, Ordering::SeqCst);
    }
}

#[track_caller]
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One layer of noise on its way from one registry to another.
struct Case {
    from: Conforming,
    before: FaultProxy,
    way: Way,
    image: Image,
    coordinator: Coordinator,
}

impl Case {
    /// To the registry at this address.
    fn to(host: &str) -> Self {
        Self::over(Way::of(SIZE), host)
    }

    /// The same, on this way.
    fn over(way: Way, host: &str) -> Self {
        let from = Conforming::start();
        let image = Image::docker(vec![Layer::of(&[Member::file("noise", noise(1, SIZE))])]);
        from.add_image("app", "1", &image);
        let before = FaultProxy::before(host);
        before.fault(usize::MAX, "PATCH", "*", way.fault());
        let lease = LEASE.as_secs().to_string();
        let coordinator = Coordinator::start(&["--embedded-workers", "0", "--lease", &lease]);
        Self { from, before, way, image, coordinator }
    }

    fn worker(&self, name: &str, more: &[&str]) -> Worker {
        Worker::start(&self.coordinator, &[&["--name", name], PIECES.as_slice(), more].concat())
    }

    /// Begins the job, and waits until the first worker has brought nine tenths of the layer.
    fn begin(&self, filters: &[&str], more: &[&str]) -> (Worker, Value) {
        let first = self.worker("first", more);
        let destination = format!("registry://{}/app:1", self.before.host());
        let spec = json!({"source": self.from.uri("app:1"), "destination": destination, "filters": filters});
        let id = submit(&self.coordinator, &spec);
        self.way.wait();
        (first, id)
    }

    fn succeeds(&self, id: &Value) -> Value {
        self.coordinator.ask("WatchJob", id).all();
        let done = job(&self.coordinator, id);
        assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}\n{}", self.before.story());
        done
    }

    /// What the first worker did not bring, and a piece more.
    fn rest(&self) -> usize {
        assert!(self.way.largest.load(Ordering::SeqCst) <= PIECE);
        SIZE / 10 + SIZE / 100 + PIECE
    }
}

impl Drop for Case {
    /// A test that fails must not wait for ever for the piece that is held.
    fn drop(&mut self) {
        self.way.free();
    }
}

/// What the filters make of the image in one process.
fn made_locally(case: &Case, filters: &[&str]) -> Vec<u8> {
    let to = Conforming::start();
    let (source, destination) = (case.from.uri("app:1"), to.uri("app:1"));
    let mut arguments = vec!["process", &source, &destination];
    arguments.extend(filters.iter().flat_map(|filter| ["-f", filter]));
    occy_tests::occyctl::locally(arguments).ok();
    to.manifest("app", "1").expect("it was put").1
}

/// How the first worker comes to its end.
type End = fn(&mut Worker);

fn killed(worker: &mut Worker) {
    worker.kill();
}

fn stopped(worker: &mut Worker) {
    worker.signal("TERM");
    assert!(worker.ended().success());
}

#[test]
fn a_copied_layer_goes_on_at_another_worker_with_what_is_left_of_it() {
    for end in [killed as End, stopped] {
        let to = Conforming::start();
        let case = Case::to(&to.host());
        let (mut first, id) = case.begin(&[], &["--drain-timeout", "0"]);
        assert!(to.tags("app").is_empty());
        let _second = case.worker("second", &[]);
        end(&mut first);
        case.way.free();
        let (sent, read) = (case.way.arrived(), case.from.sent());
        let done = case.succeeds(&id);
        assert_eq!(done["layers"][0]["worker"], "second");
        assert_eq!(to.manifest("app", "1").expect("it was put").1, case.image.manifest);
        let (sent, read) = (case.way.arrived() - sent, case.from.sent() - read);
        assert!((1..=case.rest()).contains(&sent), "{sent}\n{}", case.before.story());
        // What was acknowledged last may not have been told.
        assert!(read <= (case.rest() + PIECE) as u64, "{read}\n{}", case.from.story());
        assert_eq!(case.before.count("POST", "*/blobs/uploads/"), 2, "of the layer and of the config");
    }
}

#[test]
fn a_layer_that_filters_make_goes_on_at_another_worker_with_what_is_left_of_it() {
    let filters = ["normalize-timestamps"];
    for end in [killed as End, stopped] {
        let to = Conforming::start();
        let case = Case::to(&to.host());
        let (mut first, id) = case.begin(&filters, &["--drain-timeout", "0"]);
        assert!(to.tags("app").is_empty());
        let _second = case.worker("second", &[]);
        end(&mut first);
        case.way.free();
        let sent = case.way.arrived();
        let done = case.succeeds(&id);
        assert_eq!(done["layers"][0]["worker"], "second");
        assert_eq!(to.manifest("app", "1").expect("it was put").1, made_locally(&case, &filters));
        let sent = case.way.arrived() - sent;
        assert!((1..=case.rest()).contains(&sent), "{sent}\n{}", case.before.story());
        assert_eq!(case.before.count("POST", "*/blobs/uploads/"), 2, "of the layer and of the config");
    }
}

#[test]
fn no_worker_sends_shorter_pieces_than_the_registry_takes() {
    const LEAST: usize = 1 << 20;
    for filters in [&[][..], &["normalize-timestamps"]] {
        let to = Conforming::with(Ways { min_chunk: LEAST, ..Ways::default() });
        let case = Case::over(Way { held_behind: SIZE / 2, ..Way::of(SIZE) }, &to.host());
        let (mut first, id) = case.begin(filters, &[]);
        let _second = case.worker("second", &[]);
        first.kill();
        case.way.free();
        let sent = case.way.arrived();
        let done = case.succeeds(&id);
        assert_eq!(done["layers"][0]["worker"], "second");
        let expected =
            if filters.is_empty() { case.image.manifest.clone() } else { made_locally(&case, filters) };
        assert_eq!(to.manifest("app", "1").expect("it was put").1, expected);
        // A session that had refused a piece would have been begun anew.
        assert_eq!(case.before.count("POST", "*/blobs/uploads/"), 2, "{}", case.before.story());
        let sent = case.way.arrived() - sent;
        assert!((1..=SIZE / 2 + SIZE / 100 + LEAST).contains(&sent), "{sent}\n{}", case.before.story());
    }
}

#[test]
fn dockers_registry_too_keeps_a_session_that_was_left_between_two_pieces() {
    for end in [killed as End, stopped] {
        let to = Registry::start();
        let case = Case::to(to.host());
        let (mut first, id) = case.begin(&[], &["--drain-timeout", "0"]);
        assert!(!to.has("app", "1"));
        let _second = case.worker("second", &[]);
        end(&mut first);
        case.way.free();
        let sent = case.way.arrived();
        case.succeeds(&id);
        assert_eq!(to.digest("app", "1"), case.image.digest());
        to.pull("app", "1");
        let sent = case.way.arrived() - sent;
        assert!((1..=case.rest()).contains(&sent), "{sent}\n{}", case.before.story());
    }
}

#[test]
fn a_stopped_worker_hands_an_upload_back_behind_the_piece_that_is_on_its_way() {
    is_handed_back_behind_a_piece_that_arrives_after(HEARD);
}

#[test]
fn a_stopped_worker_is_heard_of_as_long_as_a_piece_is_on_its_way() {
    is_handed_back_behind_a_piece_that_arrives_after(LEASE + Duration::from_millis(500));
}

fn is_handed_back_behind_a_piece_that_arrives_after(wait: Duration) {
    let to = Registry::start();
    let case = Case::to(to.host());
    let (mut first, id) = case.begin(&[], &["--drain-timeout", "0"]);
    first.signal("TERM");
    std::thread::sleep(wait);
    case.way.arrives.store(true, Ordering::SeqCst);
    case.way.free();
    assert!(first.ended().success());
    let sent = case.way.arrived();
    let _second = case.worker("second", &[]);
    case.succeeds(&id);
    assert_eq!(to.digest("app", "1"), case.image.digest());
    let sent = case.way.arrived() - sent;
    // Docker's registry knows its session by what it last said of it alone.
    assert!((1..=case.rest()).contains(&sent), "{sent}\n{}", case.before.story());
}

#[test]
fn a_stopped_worker_waits_for_no_piece_that_is_not_on_its_way() {
    let to = Conforming::with(Ways { sessions_elsewhere: true, ..Ways::default() });
    let case = Case::to(&to.host());
    let (source, layer) = (FaultProxy::before(&case.from.host()), case.image.layer_digests().remove(0));
    source.fault(1, "GET", &format!("*/blobs/{layer}"), slow(4, Duration::from_secs(20)));
    let mut first = case.worker("first", &["--drain-timeout", "0"]);
    let spec = json!({
        "source": format!("registry://{}/app:1", source.host()),
        "destination": format!("registry://{}/app:1", case.before.host()),
    });
    let id = submit(&case.coordinator, &spec);
    eventually("a quarter is there", || case.way.arrived() >= SIZE / 4 - PIECE);
    std::thread::sleep(HEARD);
    first.signal("TERM");
    let start = Instant::now();
    assert!(first.ended().success());
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}\n{}", start.elapsed(), first.log());
    case.way.free();
    let _second = case.worker("second", &[]);
    case.succeeds(&id);
    assert_eq!(to.manifest("app", "1").expect("it was put").1, case.image.manifest);
}

#[test]
fn a_registry_that_has_lost_the_session_gets_all_of_it_again() {
    for filters in [vec![], vec!["normalize-timestamps"]] {
        let to = Conforming::start();
        let case = Case::to(&to.host());
        let (mut first, id) = case.begin(&filters, &[]);
        let _second = case.worker("second", &[]);
        first.kill();
        to.lose_uploads();
        case.way.free();
        let sent = case.way.arrived();
        case.succeeds(&id);
        assert!(case.way.arrived() - sent >= SIZE, "{}", case.before.story());
        let expected =
            if filters.is_empty() { case.image.manifest.clone() } else { made_locally(&case, &filters) };
        assert_eq!(to.manifest("app", "1").expect("it was put").1, expected);
    }
}

#[test]
fn a_cancelled_jobs_session_is_forgotten_by_its_registry() {
    let to = Conforming::start();
    let case = Case::to(&to.host());
    let (_first, id) = case.begin(&[], &[]);
    case.coordinator.ask("CancelJob", &id).one();
    eventually("the session is forgotten", || case.before.count("DELETE", "*/blobs/uploads/*") > 0);
    case.way.free();
    assert_eq!(to.uploads(), 0);
    assert!(to.tags("app").is_empty());
}

#[test]
fn a_worker_that_knows_nothing_of_earlier_uploads_begins_anew() {
    let to = Conforming::start();
    let case = Case::to(&to.host());
    let (mut first, id) = case.begin(&[], &[]);
    let mut second = PythonWorker::start(&case.coordinator, &[]);
    first.kill();
    case.way.free();
    let task = second.wait_for("task");
    let digest = &case.image.layer_digests()[0];
    assert_eq!(task["resume"]["digest"], **digest);
    let offset: usize = task["resume"]["offset"].as_str().expect("a number").parse().expect("of bytes");
    assert!((SIZE / 10 * 9 - PIECE..=case.way.arrived()).contains(&offset), "{offset}");
    case.succeeds(&id);
    assert_eq!(to.manifest("app", "1").expect("it was put").1, case.image.manifest);
}

#[test]
fn what_a_worker_lies_of_an_upload_spoils_nothing() {
    let to = Conforming::start();
    let case = Case::to(&to.host());
    case.way.free();
    let victim = Image::docker(vec![Layer::noise(2, 1000)]);
    to.add_image("app2", "victim", &victim);
    // A session with wrong bytes, one of another repository, and what is no session at all.
    let session = |name: &str| {
        let begun = Request::new("POST", &format!("/v2/{name}/blobs/uploads/")).send(&to.host());
        let path = begun.expect("an answer").get("Location").expect("a session").to_owned();
        let patched = Request::new("PATCH", &path).body(b"bb").send(&to.host());
        assert_eq!(patched.expect("an answer").status, 202);
        path
    };
    let paths = [session("app0"), session("other"), "/v2/app2/manifests/victim".to_owned()];
    for (index, path) in paths.iter().enumerate() {
        let url = format!("http://{}{path}", case.before.host());
        let mut liar = PythonWorker::start(&case.coordinator, &["--hold", "--session", &url]);
        // Of its own, for what is at one place is mounted from there.
        let image = Image::docker(vec![Layer::noise(10 + index as u64, 2_000_000)]);
        case.from.add_image(&format!("app{index}"), "1", &image);
        let source = case.from.uri(&format!("app{index}:1"));
        let destination = format!("registry://{}/app{index}:1", case.before.host());
        let id = submit(&case.coordinator, &json!({"source": source, "destination": destination}));
        while liar.wait_for("said") != "heartbeat" {}
        std::thread::sleep(HEARD);
        drop(liar);
        let _honest = case.worker("honest", &[]);
        case.succeeds(&id);
        let (_, manifest) = to.manifest(&format!("app{index}"), "1").expect("it was put");
        assert_eq!(manifest, image.manifest);
        // The first one is looked at, and begun anew.
        assert_eq!(case.before.count("*", path) > 0, index == 0, "{}", case.before.story());
    }
    assert_eq!(to.manifest("app2", "victim").expect("it is there").1, victim.manifest);
}

/// A layer of the size that is asked for in the long run, 5 GB; a hundredth of it in a short one.
#[test]
fn a_layer_of_any_size_whose_worker_is_killed_moves_no_more_than_what_is_left() {
    let wanted = std::env::var("OCCY_TEST_LAYER").ok();
    let size: usize =
        wanted.map_or(50_000_000, |size| size.parse().expect("OCCY_TEST_LAYER is a number of bytes"));
    let piece = (size / 600).clamp(64 << 10, 8 << 20);
    let (from, to) = (Registry::start(), Registry::start());
    let source = noisy(&from, size);
    let (before, way) = (FaultProxy::before(to.host()), Way::of(size));
    before.fault(usize::MAX, "PATCH", "*", way.fault());
    let coordinator = Coordinator::start(&["--embedded-workers", "0", "--lease", "3"]);
    let piece_option = piece.to_string();
    let options =
        ["--upload-chunk", &piece_option, "--resumable-from", "16M", "--metrics-listen", "127.0.0.1:0"];
    let mut first = Worker::start(&coordinator, &options);
    let destination = format!("registry://{}/app:1", before.host());
    let id = submit(&coordinator, &json!({"source": source, "destination": destination}));
    way.wait();
    let second = Worker::start(&coordinator, &options);
    first.kill();
    way.free();
    let brought = way.arrived();
    coordinator.ask("WatchJob", &id).all();
    let done = job(&coordinator, &id);
    assert_eq!(done["state"], "JOB_STATE_SUCCEEDED", "{done}");
    assert_eq!(to.digest("app", "1"), from.digest("app", "1"));
    let metrics = service_telemetry::metrics_in(&second.log());
    let counted = |name: &str| service_telemetry::value(&metrics, name);
    let (read, sent) =
        (counted("occystrap_registry_received_bytes_total"), counted("occystrap_registry_sent_bytes_total"));
    println!(
        "| a layer of {size} bytes: {brought} before its worker was killed; behind that | {read} read | {sent} sent |"
    );
    // A chunk travels with a piece; the config is sent too; what was acknowledged last may not have been told.
    let piece = piece + 256 * 1024;
    assert!((1.0..=(size / 10 + piece + 10_000) as f64).contains(&sent), "{sent}");
    assert!((1.0..=(size / 10 + 2 * piece + 10_000) as f64).contains(&read), "{read}");
}

/// An image in a registry with a layer of so many bytes, a tar that nothing makes smaller; gives its URI.
fn noisy(registry: &Registry, size: usize) -> String {
    const PART: usize = 1 << 20;
    let path = registry.storage().join("layer");
    std::fs::create_dir_all(registry.storage()).expect("its storage");
    let mut file = std::fs::File::create(&path).expect("a file in it");
    let content = (size - 3 * 512) / 512 * 512;
    let mut header = tar(&[Member::file("noise", "").stating_size(content as u64)]);
    header.truncate(512);
    file.write_all(&header).expect("room on the disk");
    let mut part = noise(1, PART);
    for at in (0..content).step_by(PART) {
        // No two parts are the same.
        part[..8].copy_from_slice(&at.to_le_bytes());
        file.write_all(&part[..PART.min(content - at)]).expect("room on the disk");
    }
    file.write_all(&[0; 1024]).expect("room on the disk");
    let sum = tool("sha256sum", [&path]);
    let digest = format!("sha256:{}", sum.split(' ').next().expect("a sum"));
    registry.place_blob("app", &digest, &path);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [digest]}
    });
    let config = config.to_string().into_bytes();
    registry.push_blob("app", &config);
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": manifest_type,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(&config), "size": config.len()
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": content + 3 * 512
        }],
    });
    registry.push_manifest("app", "1", manifest_type, manifest.to_string().as_bytes());
    registry.uri("app:1")
}
