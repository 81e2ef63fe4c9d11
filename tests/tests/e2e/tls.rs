//! TLS: whom we trust, and who we say we are.

use occy_tests::certificates::{Certificates, text};
use occy_tests::http::Response;
use occy_tests::occyctl::occyctl;
use occy_tests::registry::{Registry, Setup};
use occy_tests::server::Server;

use crate::small;

/// Pushes through `occyctl` itself, since the tests' own client does not speak TLS.
fn push(registry: &Registry, options: &[&str]) -> String {
    let open = Registry::start();
    let source = open.push(&small(), "app", "1");
    let target = registry.uri("app:1").replace("127.0.0.1", "localhost");
    occyctl([&["process", &source, &target][..], options].concat()).ok();
    target
}

fn path(name: &str) -> String {
    text(&Certificates::shared().path(name))
}

#[test]
fn a_private_authority_is_trusted_when_named() {
    let registry = Registry::with(Setup { tls: true, ..Setup::default() });
    let ca = path("ca.crt");
    let source = push(&registry, &["--ca-cert", &ca]);
    occyctl(["info", &source, "--ca-cert", &ca]).ok();
    occyctl(["info", &source]).env("OCCYSTRAP_CA_CERT", &ca).ok();
    let missing = occyctl(["info", &source, "--ca-cert", "/nonexistent/ca.crt"]).run();
    assert!(!missing.status.success());
    missing.says(&["/nonexistent/ca.crt"]);
}

#[test]
fn an_unknown_authority_is_not_trusted_unless_the_host_is_insecure() {
    let registry = Registry::with(Setup { tls: true, ..Setup::default() });
    let ca = path("ca.crt");
    let source = push(&registry, &["--ca-cert", &ca]);
    let host = source.trim_start_matches("registry://").split('/').next().expect("a host").to_owned();
    let _ = occyctl(["info", &source, "--retries", "0"]).run();
    occyctl(["info", &source, "--insecure", &host]).ok();
    occyctl(["info", &source]).env("OCCYSTRAP_INSECURE", &host).ok();
}

#[test]
fn a_client_certificate_is_shown() {
    let registry = Registry::with(Setup { client_certificates: true, ..Setup::default() });
    let (ca, certificate, key) = (path("ca.crt"), path("client.crt"), path("client.key"));
    let options = ["--ca-cert", &ca, "--client-cert", &certificate, "--client-key", &key];
    let source = push(&registry, &options);
    occyctl([&["info", &source][..], &options].concat()).ok();
    occyctl(["info", &source, "--ca-cert", &ca, "--retries", "0"]).fails(1);
    occyctl(["info", &source, "--ca-cert", &ca, "--client-cert", &certificate]).fails(2);
}

#[test]
fn plain_http_is_for_loopback_and_insecure_hosts() {
    // A name that is not loopback but leads to a server of ours: only the request's shape matters.
    let server = Server::start(|_| Response::status(404));
    let target = format!("registry://example.invalid:{}/app:1", server.port());
    occyctl(["info", &target, "--retries", "0"]).fails(1);
    assert!(server.seen().is_empty());
    for host in ["127.0.0.1", "localhost"] {
        occyctl(["info", &format!("registry://{host}:{}/app:1", server.port()), "--retries", "0"])
            .fails(1)
            .says(&["404"]);
    }
}
