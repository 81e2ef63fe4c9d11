//! What goes wrong while an image is written to a registry.

use std::sync::Arc;

use occy_tests::http::Response;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::proxy::{self, Fault, FaultProxy};
use occy_tests::registry::Registry;

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
    fn new() -> Self {
        let (from, to) = (Registry::start(), Registry::start());
        let image = Image::docker(vec![Layer::noise(1, 1_500_000), Layer::noise(2, 300_000)]);
        let source = from.push(&image, "app", "1");
        let proxy = FaultProxy::before(to.host());
        Self { _from: from, to, source, image, proxy }
    }

    /// A plain copy, whose blobs are known before they are sent, or a rewrite, whose are not.
    fn run(&self, filtered: bool) -> Run {
        let target = format!("registry://{}/app:1", self.proxy.host());
        let filter: &[&str] = if filtered { &["-f", "normalize-timestamps"] } else { &[] };
        occyctl([&["process", &self.source, &target, "-v"], filter].concat())
    }

    fn is_right(&self, filtered: bool) {
        self.run(filtered).ok();
        let pushed = self.to.pull("app", "1");
        assert!(filtered || pushed.digest == self.image.digest());
        assert_eq!(pushed.tars.len(), 2);
    }
}

/// Method, path and fault.
type Once = (&'static str, &'static str, fn() -> Fault);

/// Each fault, once, against both ways to upload.
#[track_caller]
fn survives(faults: &[Once]) {
    for filtered in [false, true] {
        for (method, pattern, fault) in faults {
            let setting = Setting::new();
            setting.proxy.fault(1, method, pattern, fault());
            setting.is_right(filtered);
        }
    }
}

#[test]
fn passing_errors_are_tried_again_on_every_request_of_a_push() {
    survives(&[
        ("HEAD", "/v2/app/blobs/*", || proxy::status(503)),
        ("POST", UPLOADS, || proxy::status(500)),
        ("POST", UPLOADS, || proxy::too_many("1")),
        ("PATCH", UPLOADS, || proxy::status(503)),
        ("PUT", UPLOADS, || proxy::status(502)),
        ("PUT", "/v2/app/manifests/*", || proxy::too_many("1")),
        ("PUT", "/v2/app/manifests/*", || proxy::status(503)),
    ]);
}

#[test]
fn connections_lost_in_a_push_are_opened_again() {
    survives(&[
        ("POST", UPLOADS, proxy::reset),
        ("PATCH", UPLOADS, proxy::reset),
        ("PUT", UPLOADS, proxy::reset),
        ("PUT", "/v2/app/manifests/*", proxy::reset),
        // The registry has the bytes, but its answer is lost.
        ("PATCH", UPLOADS, || proxy::truncate(0)),
        ("PUT", UPLOADS, || {
            proxy::change(|answer| Response { delivery: occy_tests::http::Delivery::Reset(None), ..answer })
        }),
    ]);
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
        assert!(states, "{:#?}", setting.proxy.seen());
    }
}

#[test]
fn a_patch_may_be_accepted_early() {
    for filtered in [false, true] {
        let setting = Setting::new();
        setting.proxy.fault(1, "PATCH", UPLOADS, proxy::accept_early());
        setting.is_right(filtered);
    }
}

#[test]
fn an_upload_that_the_registry_forgot_starts_again() {
    survives(&[("PATCH", UPLOADS, || proxy::status(404)), ("PUT", UPLOADS, || proxy::status(404))]);
}

#[test]
fn a_registry_that_wants_another_range_is_asked_how_far_it_is() {
    for filtered in [false, true] {
        let setting = Setting::new();
        // The bytes arrive, but the registry says that they are not what it waited for.
        setting.proxy.fault(
            1,
            "PATCH",
            UPLOADS,
            Arc::new(|request, upstream| {
                let answer = upstream(request);
                Response::status(416)
                    .header("Location", answer.get("Location").unwrap_or_default())
                    .header("Range", answer.get("Range").unwrap_or_default())
            }),
        );
        setting.is_right(filtered);
    }
}

#[test]
fn a_minimum_chunk_is_honoured() {
    let setting = Setting::new();
    setting.proxy.fault(
        usize::MAX,
        "POST",
        UPLOADS,
        proxy::change(|answer| answer.header("OCI-Chunk-Min-Length", "400000")),
    );
    setting.is_right(true);
    // Every piece but a blob's last one is as large as was asked.
    let pieces: Vec<(String, usize)> = setting
        .proxy
        .seen()
        .iter()
        .filter(|seen| seen.is("PATCH", UPLOADS))
        .map(|seen| (seen.request.path.split('?').next().unwrap_or_default().to_owned(), seen.body))
        .collect();
    for pair in pieces.windows(2) {
        assert!(pair[0].0 != pair[1].0 || pair[0].1 >= 400_000, "{pieces:?}");
    }
}

#[test]
fn a_push_that_fails_leaves_the_tag_as_it_was() {
    for (method, pattern, filtered) in [
        // A blob that is known goes up in one PUT.
        ("PATCH", UPLOADS, true),
        ("PUT", UPLOADS, false),
        ("PUT", UPLOADS, true),
        ("PUT", "/v2/app/manifests/*", false),
        ("PUT", "/v2/app/manifests/*", true),
        ("POST", UPLOADS, false),
        ("POST", UPLOADS, true),
    ] {
        let setting = Setting::new();
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
        setting.run(false).fails(1);
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
