//! What the other tests stand on is itself tried, with skopeo in the place of the product.

use occy_tests::certificates::text;
use occy_tests::fixed::Fixed;
use occy_tests::http::{Delivery, Request, Response};
use occy_tests::image::{Family, Image};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::server::Server;
use occy_tests::token::{TokenServer, basic_header};
use occy_tests::tools::{Packing, run, sha256, tool, unpack, write};

fn small() -> Image {
    Image::docker(vec![
        Layer::of(&[Member::dir("etc"), Member::file("etc/a", "a")]),
        Layer::of(&[Member::file("etc/b", "b")]),
    ])
}

#[test]
fn skopeo_reads_what_the_registry_was_given() {
    let registry = Registry::start();
    for (family, packing) in [
        (Family::Docker, Packing::Gzip),
        (Family::Oci, Packing::Gzip),
        (Family::Oci, Packing::Zstd),
        (Family::Oci, Packing::Plain),
    ] {
        let layers = vec![Layer::of(&[Member::file("a", "a")]).packed(packing)];
        let image = Image::new(family, layers);
        registry.push(&image, "app", "1");
        assert_eq!(registry.pull("app", "1").digest, image.digest());
        judge::skopeo_reads(&format!("docker://{}/app:1", registry.host()));
        assert_eq!(skopeo_config_text(&registry), image.config);
    }
}

fn skopeo_config_text(registry: &Registry) -> Vec<u8> {
    let source = format!("docker://{}/app:1", registry.host());
    tool("skopeo", ["inspect", "--config", "--raw", "--tls-verify=false", &source]).into_bytes()
}

#[test]
fn skopeo_reads_every_saved_form() {
    let image = small();
    let directory = tempfile::tempdir().expect("a directory");
    for (form, members) in [
        ("v12", saved::docker_v12(&[(&image, &["app:1"])])),
        ("v25", saved::docker_v25(&[(&image, &["app:1"])])),
    ] {
        let path = directory.path().join(form);
        write(&path, tar(&members));
        judge::skopeo_reads(&format!("docker-archive:{}", text(&path)));
        assert_eq!(saved::read_saved(&path).config, image.config, "{form}");
    }
}

#[test]
fn a_registry_with_tokens_takes_those_of_the_token_server_only() {
    let tokens = TokenServer::with_user("ann", "secret");
    let registry = Registry::with_tokens(&tokens);
    registry.push(&small(), "app", "1");
    let source = format!("docker://{}/app:1", registry.host());
    let inspect = |credentials: &str| {
        run("skopeo", ["inspect", "--tls-verify=false", "--creds", credentials, &source], b"")
            .status
            .success()
    };
    assert!(inspect("ann:secret"));
    assert!(!inspect("ann:wrong"));
    assert!(tokens.requests() >= 2);
    tokens.change(|rules| rules.expired = 1);
    assert!(!inspect("ann:secret"), "a token that ran out");
}

#[test]
fn a_registry_with_passwords_takes_the_right_one_only() {
    let registry = Registry::with_htpasswd("ann", "secret");
    registry.push(&small(), "app", "1");
    let get = |authorization: &str| {
        let request = Request::new("GET", "/v2/app/manifests/1").header("Authorization", authorization);
        request.send(registry.host()).expect("an answer").status
    };
    assert_eq!(get(&basic_header("ann", "secret")), 200);
    assert_eq!(get(&basic_header("ann", "wrong")), 401);
}

#[test]
fn the_proxy_passes_on_strikes_and_counts() {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 10_000)]);
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    judge::skopeo_reads(&format!("docker://{}/app:1", proxy.host()));
    assert_eq!(proxy.count("GET", "/v2/app/blobs/sha256:*"), 2);

    let digest = &image.layer_digests()[0];
    let get = || Request::new("GET", &format!("/v2/app/blobs/{digest}")).send(&proxy.host());
    proxy.fault_after(1, 1, "GET", "/v2/app/blobs/*", proxy::status(503));
    assert_eq!([get(), get(), get()].map(|answer| answer.expect("an answer").status), [200, 503, 200]);
    proxy.fault(1, "GET", "/v2/app/blobs/*", proxy::corrupt(5000));
    assert_ne!(sha256(&get().expect("an answer").body), *digest);
    proxy.fault(1, "GET", "/v2/app/blobs/*", proxy::truncate(5000));
    assert_eq!(get().expect_err("cut short").kind(), std::io::ErrorKind::UnexpectedEof);
    proxy.fault(1, "GET", "/v2/app/blobs/*", proxy::reset());
    assert_eq!(get().expect_err("reset").kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.pending(), 0);

    let range = |proxy: &FaultProxy| {
        let request = Request::new("GET", &format!("/v2/app/blobs/{digest}")).header("Range", "bytes=100-");
        request.send(&proxy.host()).expect("an answer")
    };
    assert_eq!(range(&proxy).status, 206);
    proxy.fault(1, "GET", "*", proxy::ignore_range());
    assert_eq!(range(&proxy).status, 200);
    proxy.fault(1, "GET", "*", proxy::wrong_range(7));
    assert!(range(&proxy).get("Content-Range").is_some_and(|range| range.starts_with("bytes 107-")));
}

#[test]
fn skopeo_pushes_through_odd_locations() {
    let registry = Registry::start();
    let image = small();
    let source = registry.push(&image, "app", "1").replace("registry://", "docker://");
    let proxy = FaultProxy::before(registry.host());
    proxy.fault(usize::MAX, "*", "/v2/new/blobs/uploads/*", proxy::relative_location());
    let destination = format!("docker://{}/new:1", proxy.host());
    let flags = ["--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"];
    tool("skopeo", [&["copy"][..], &flags, &[&source, &destination]].concat());
    assert_eq!(registry.pull("new", "1").digest, image.digest());
    assert!(proxy.count("PATCH", "/v2/new/blobs/uploads/*") > 0);
}

#[test]
fn a_patch_that_is_accepted_early_stores_the_blob() {
    let registry = Registry::start();
    let proxy = FaultProxy::before(registry.host());
    proxy.fault(1, "PATCH", "*", proxy::accept_early());
    let started = Request::new("POST", "/v2/app/blobs/uploads/").send(&proxy.host()).expect("an answer");
    let location = started.get("Location").expect("a location");
    let path = &location[location.find("/v2/").expect("a path")..];
    let patched = Request::new("PATCH", path).body(b"abc").send(&proxy.host()).expect("an answer");
    assert_eq!(patched.status, 201);
    assert!(registry.has_blob("app", &sha256(b"abc")));
}

#[test]
fn bodies_come_whole_however_they_are_framed() {
    let server = Server::start(|request| Response::ok("x", request.body.clone()));
    let url = format!("http://{}/", server.host());
    let body = vec![7; 100_000];
    let file = tempfile::NamedTempFile::new().expect("a file");
    write(file.path(), &body);
    let data = format!("@{}", text(file.path()));
    for framing in ["X: y", "Transfer-Encoding: chunked"] {
        let echoed = occy_tests::tools::pipe(
            "curl",
            ["-sS", "-H", framing, "-H", "Expect:", "--data-binary", &data, &url],
            b"",
        );
        assert_eq!(echoed, body, "{framing}");
    }
    let slow = Server::start(|_| Response {
        delivery: Delivery::Slow(4, std::time::Duration::from_millis(5)),
        ..Response::ok("x", *b"slow")
    });
    assert_eq!(Request::new("GET", "/").send(&slow.host()).expect("an answer").body, b"slow");
}

#[test]
fn every_packing_unpacks_and_noise_repeats() {
    let tar = Layer::noise(3, 5000).tar;
    assert_eq!(tar, Layer::noise(3, 5000).tar);
    for packing in [Packing::Plain, Packing::Gzip, Packing::GzipMembers, Packing::Zstd, Packing::ZstdFrames] {
        assert_eq!(unpack(&packing.pack(&tar)), tar, "{packing:?}");
    }
}

#[test]
fn python_and_gnu_tar_read_the_tars_that_are_made_here() {
    let long = format!("{}/{}", "d".repeat(90), "ü".repeat(60));
    let made = tar(&[
        Member::dir("d").owner(1, 2).mode(0o700),
        Member::file("d/f", "data").xattr("user.x", b"\xff\x00y"),
        Member::hardlink("d/h", "d/f"),
        Member::symlink("d/s", "f"),
        Member::device("d/null", 1, 3),
        Member::fifo("d/p"),
        Member::file(&long, "long"),
    ]);
    let found = judge::names(&made);
    assert_eq!(found, ["d", "d/f", "d/h", "d/s", "d/null", "d/p", &long]);
    assert_eq!(judge::gnu_listing(&made).lines().count(), 7);
}

#[test]
fn a_fixed_registry_serves_an_image() {
    let image = small();
    let server = Fixed::default().image("app", "1", &image).serve();
    judge::skopeo_reads(&format!("docker://{}/app:1", server.host()));
}
