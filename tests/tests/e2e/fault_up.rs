//! What goes wrong while an image is written to a registry.

use occy_tests::http::Response;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::proxy::{self, Fault, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::Packing;

const UPLOADS: &str = "/v2/app/blobs/uploads/*";

/// Two registries, the second behind a proxy.
struct Setting {
    _from: Registry,
    to: Registry,
    source: String,
    image: Image,
    proxy: FaultProxy,
}

impl Setting {
    /// Layers that go up in one PUT each.
    fn new() -> Self {
        Self::with(Image::docker(vec![Layer::noise(1, 1_500_000), Layer::noise(2, 300_000)]))
    }

    /// A layer that goes up in several PATCHes when its digest is not known before.
    fn large() -> Self {
        Self::with(Image::oci(vec![Layer::noise(1, 20_000_000).packed(Packing::Plain)]))
    }

    fn with(image: Image) -> Self {
        let (from, to) = (Registry::start(), Registry::start());
        let source = from.push(&image, "app", "1");
        let proxy = FaultProxy::before(to.host());
        Self { _from: from, to, source, image, proxy }
    }

    /// The next so many requests that fit meet a fault, each its own.
    fn faults(self, faults: &[Once]) -> Self {
        for (method, pattern, fault) in faults {
            self.proxy.fault(1, method, pattern, fault());
        }
        self
    }

    /// A plain copy, whose blobs are known before they are sent, or a rewrite, whose are not.
    fn run(&self, filtered: bool) -> Run {
        let target = format!("registry://{}/app:1", self.proxy.host());
        let filter: &[&str] =
            if filtered { &["-f", "normalize-timestamps", "--compression", "zstd"] } else { &[] };
        occyctl([&["process", &self.source, &target, "-v"], filter].concat())
    }

    fn is_right(&self, filtered: bool) {
        let ended = self.run(filtered).ok();
        let pushed = self.to.pull("app", "1");
        assert!(filtered || pushed.digest == self.image.digest());
        assert_eq!(pushed.tars.len(), self.image.layers.len());
        assert_eq!(self.proxy.pending(), 0, "every fault struck: {}\n{}", ended.stderr, self.proxy.story());
    }
}

/// Method, path and fault.
type Once = (&'static str, &'static str, fn() -> Fault);

#[test]
fn passing_errors_are_tried_again_on_every_request_of_a_push() {
    for filtered in [false, true] {
        let mut faults: Vec<Once> = vec![
            ("POST", UPLOADS, || proxy::status(500)),
            ("POST", UPLOADS, || proxy::too_many("1")),
            ("PUT", UPLOADS, || proxy::status(502)),
            ("PUT", UPLOADS, || proxy::too_many("1")),
            ("PUT", "/v2/app/manifests/*", || proxy::too_many("1")),
            ("PUT", "/v2/app/manifests/*", || proxy::status(503)),
        ];
        if !filtered {
            faults.push(("HEAD", "/v2/app/blobs/*", || proxy::status(503)));
        }
        Setting::new().faults(&faults).is_right(filtered);
    }
}

#[test]
fn connections_lost_in_a_push_are_opened_again() {
    for filtered in [false, true] {
        let faults: &[Once] = &[
            ("POST", UPLOADS, proxy::reset),
            ("PUT", UPLOADS, proxy::reset),
            // The registry has the bytes, but its answer is lost.
            ("PUT", UPLOADS, proxy::lose_answer),
            ("PUT", "/v2/app/manifests/*", proxy::reset),
            ("PUT", "/v2/app/manifests/*", proxy::lose_answer),
        ];
        Setting::new().faults(faults).is_right(filtered);
    }
}

#[test]
fn a_chunked_upload_goes_on_where_it_was() {
    let faults: &[Once] = &[
        ("PATCH", UPLOADS, || proxy::status(503)),
        ("PATCH", UPLOADS, proxy::reset),
        ("PATCH", UPLOADS, || proxy::too_many("1")),
        ("GET", UPLOADS, || proxy::status(500)),
        ("PUT", UPLOADS, || proxy::status(503)),
        ("PUT", UPLOADS, proxy::lose_answer),
    ];
    let setting = Setting::large().faults(faults);
    setting.is_right(true);
    let sessions = setting.proxy.seen().iter().filter(|seen| seen.is("POST", UPLOADS)).count();
    assert_eq!(sessions, 2, "one for the layer, one for the config: {}", setting.proxy.story());
}

#[test]
fn a_chunk_whose_answer_was_lost_is_not_stored_twice() {
    // docker-registry gives a session up that is not where its client thinks it is; the layer then starts again.
    Setting::large().faults(&[("PATCH", UPLOADS, proxy::lose_answer)]).is_right(true);
}

#[test]
fn a_whole_put_that_keeps_breaking_becomes_chunks() {
    let faults: &[Once] = &[("PUT", UPLOADS, proxy::reset), ("PUT", UPLOADS, proxy::reset)];
    let setting = Setting::large().faults(faults);
    setting.is_right(false);
    assert!(setting.proxy.count("PATCH", UPLOADS) > 1, "{}", setting.proxy.story());
}

#[test]
fn locations_may_be_relative_and_keep_their_query() {
    for filtered in [false, true] {
        let setting = Setting::new();
        setting.proxy.fault(usize::MAX, "*", UPLOADS, proxy::relative_location());
        setting.is_right(filtered);
        let states = setting
            .proxy
            .seen()
            .iter()
            .filter(|seen| seen.is("PUT", UPLOADS))
            .all(|seen| !seen.request.query("_state").is_empty());
        assert!(states, "{}", setting.proxy.story());
    }
}

#[test]
fn a_patch_may_be_accepted_early() {
    // A blob that fits in a chunk is PUT; so a chunk that is the whole blob is one that the registry wanted that large.
    let setting = Setting::large();
    let minimum = proxy::change(|answer| answer.header("OCI-Chunk-Min-Length", "30000000"));
    setting.proxy.fault(1, "POST", UPLOADS, minimum);
    setting.proxy.fault(1, "PATCH", UPLOADS, proxy::accept_early());
    setting.is_right(true);
}

#[test]
fn an_upload_that_the_registry_forgot_starts_again() {
    for filtered in [false, true] {
        Setting::new().faults(&[("PUT", UPLOADS, || proxy::status(404))]).is_right(filtered);
    }
    Setting::large().faults(&[("PATCH", UPLOADS, || proxy::status(404))]).is_right(true);
}

#[test]
fn a_registry_that_wants_another_range_is_asked_how_far_it_is() {
    // The bytes arrive, but the registry says that they are not what it waited for.
    let unwanted: fn() -> Fault = || {
        proxy::change(|answer| {
            let said = |name| answer.get(name).unwrap_or_default().to_owned();
            Response::status(416).header("Location", &said("Location")).header("Range", &said("Range"))
        })
    };
    Setting::large().faults(&[("PATCH", UPLOADS, unwanted)]).is_right(true);
}

#[test]
fn a_minimum_chunk_is_honoured() {
    const MINIMUM: usize = 9_000_000;
    let setting = Setting::large();
    let minimum = proxy::change(|answer| answer.header("OCI-Chunk-Min-Length", &MINIMUM.to_string()));
    setting.proxy.fault(1, "POST", UPLOADS, minimum);
    setting.is_right(true);
    let seen = setting.proxy.seen();
    let chunks: Vec<usize> =
        seen.iter().filter(|seen| seen.is("PATCH", UPLOADS)).map(|seen| seen.body).collect();
    let (_, all_but_last) = chunks.split_last().expect("chunks");
    assert!(chunks.len() > 1 && all_but_last.iter().all(|size| *size >= MINIMUM), "{chunks:?}");
}

#[test]
fn a_push_that_fails_leaves_the_tag_as_it_was() {
    for (method, pattern, filtered) in [
        ("PUT", UPLOADS, false),
        ("PUT", UPLOADS, true),
        ("PUT", "/v2/app/manifests/*", false),
        ("PUT", "/v2/app/manifests/*", true),
        ("POST", UPLOADS, false),
        ("POST", UPLOADS, true),
        ("PATCH", UPLOADS, true),
    ] {
        let setting = if method == "PATCH" { Setting::large() } else { Setting::new() };
        let old = Image::docker(vec![Layer::noise(9, 100)]);
        setting.to.push(&old, "app", "1");
        setting.proxy.fault(usize::MAX, method, pattern, proxy::status(400));
        setting.run(filtered).fails(1).says(&["400"]);
        assert_eq!(setting.to.digest("app", "1"), old.digest(), "{method}");
    }
}

#[test]
fn the_manifest_comes_last_and_once() {
    for filtered in [false, true] {
        let setting = Setting::new();
        setting.is_right(filtered);
        let seen = setting.proxy.seen();
        let manifests: Vec<usize> =
            (0..seen.len()).filter(|at| seen[*at].is("PUT", "/v2/app/manifests/*")).collect();
        assert_eq!(manifests.len(), 1, "{seen:#?}");
        let after = &seen[manifests[0] + 1..];
        assert!(
            after.iter().all(|seen| seen.request.method == "GET" || seen.request.method == "HEAD"),
            "{after:#?}"
        );
    }
}

#[test]
fn an_upload_location_on_a_private_host_is_refused() {
    let trap = occy_tests::server::Server::start_on("127.0.0.2", |_| Response::status(201));
    for location in [
        format!("http://127.0.0.2:{}/upload", trap.port()),
        "http://169.254.169.254/upload".into(),
        "http://10.0.0.1/upload".into(),
    ] {
        let setting = Setting::new();
        setting.proxy.fault(
            usize::MAX,
            "POST",
            UPLOADS,
            proxy::answer(Response::status(202).header("Location", &location)),
        );
        setting.run(false).here().fails(1);
        assert!(!setting.to.has("app", "1"));
    }
    assert!(trap.seen().is_empty(), "{:#?}", trap.seen());
}

#[test]
fn what_the_registry_says_is_shown_and_shortened() {
    let setting = Setting::new();
    let mut body = br#"{"errors":[{"code":"DENIED","message":"the quota of team is used up"}]}"#.to_vec();
    setting.proxy.fault(
        usize::MAX,
        "PUT",
        "/v2/app/manifests/*",
        proxy::answer(Response::ok("application/json", body.clone()).status_of(403)),
    );
    setting.run(false).fails(1).says(&["403", "DENIED", "the quota of team is used up"]);
    setting.proxy.heal();
    body = vec![b'x'; 3_000_000];
    setting.proxy.fault(
        usize::MAX,
        "PUT",
        "/v2/app/manifests/*",
        proxy::answer(Response::ok("text/html", body).status_of(400)),
    );
    let ended = setting.run(false).fails(1).says(&["400"]);
    assert!(ended.stderr.len() < 20_000, "{}", ended.stderr.len());
}
