//! TLS: whom we trust, and who we say we are.

use occy_tests::certificates::{Certificates, text};
use occy_tests::fixed::Fixed;
use occy_tests::http::Response;
use occy_tests::occyctl::occyctl;
use occy_tests::registry::{Registry, Setup};
use occy_tests::saved::read_saved;
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
fn a_self_signed_certificate_is_trusted_when_it_is_the_one_named() {
    let registry = Registry::with(Setup { tls: true, certificate: Some("self"), ..Setup::default() });
    let (named, other) = (path("self.crt"), path("other.crt"));
    let source = push(&registry, &["--ca-cert", &named]);
    let info = |uri: &str, options: &[&str]| {
        occyctl([&["info", uri, "--retries", "0"][..], options].concat()).fails(1).says(&["certificate"])
    };
    occyctl(["info", &source, "--ca-cert", &other, "--ca-cert", &named]).ok();
    info(&source, &[]);
    // Another of the same name, with another key.
    info(&source, &["--ca-cert", &other]);
    // The right one, but for another name.
    let elsewhere = info(&registry.uri("app:1"), &["--ca-cert", &named]);
    assert!(elsewhere.stderr.contains("not valid for name"), "{}", elsewhere.stderr);
}

/// An address of this machine that is not loopback, if it has one.
fn outer_address() -> Option<String> {
    // Nothing is sent: the system only says from where it would be.
    let found = || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect("192.0.2.1:9").ok()?;
        let address = socket.local_addr().ok()?.ip();
        (!address.is_loopback() && !address.is_unspecified()).then(|| address.to_string())
    };
    let found = found();
    if found.is_none() {
        eprintln!("NOT RUN: this machine has loopback addresses only");
        assert!(std::env::var_os("CI").is_none(), "CI must not skip what needs another address");
    }
    found
}

#[test]
fn an_unknown_authority_is_not_trusted_unless_the_host_is_insecure() {
    let Some(ip) = outer_address() else { return };
    let registry = Registry::with(Setup { tls: true, ip: Some(&ip), ..Setup::default() });
    let host = registry.host();
    let target = registry.uri("app:1");
    let open = Registry::start();
    let source = open.push(&small(), "app", "1");
    let ended = occyctl(["process", &source, &target, "--retries", "0"]).fails(1).says(&[host, "hint: "]);
    assert!(ended.stderr.contains("certificate"), "{}", ended.stderr);
    occyctl(["process", &source, &target, "--insecure", host]).ok();
    occyctl(["info", &target]).env("OCCYSTRAP_INSECURE", &ip).ok();
    // The authority is right, but the certificate is for other hosts.
    occyctl(["info", &target, "--ca-cert", &path("ca.crt"), "--retries", "0"])
        .fails(1)
        .says(&["certificate"]);
}

#[test]
fn plain_http_to_another_machine_needs_insecure() {
    let Some(ip) = outer_address() else { return };
    let server = Fixed::default().image("app", "1", &small()).serve_on(&ip);
    let source = format!("registry://{}/app:1", server.host());
    occyctl(["info", &source, "--retries", "0", "--username", "ann", "--password", "secret"])
        .fails(1)
        .says(&["hint: "]);
    assert!(server.seen().is_empty(), "{:#?}", server.seen());
    occyctl(["info", &source, "--insecure", &server.host()]).ok();
    let other = format!("{ip}:1");
    occyctl(["info", &source, "--insecure", &other, "--retries", "0"]).fails(1);
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
fn an_address_of_version_6_is_a_host() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("NOT RUN: this machine has no addresses of version 6");
        assert!(std::env::var_os("CI").is_none(), "CI must not skip what needs version 6");
        return;
    }
    let image = small();
    let server = Fixed::default().image("app", "1", &image).serve_on("::1");
    let directory = crate::scratch();
    let out = directory.path().join("out.tar");
    occyctl(["process", &format!("registry://{}/app:1", server.host()), &crate::tar_uri(&out)]).ok();
    assert_eq!(read_saved(&out).names, [format!("[::1]:{}/app:1", server.port())]);
}

#[test]
fn plain_http_to_this_machine_needs_nothing() {
    let server = Server::start(|_| Response::status(404));
    for host in ["127.0.0.1", "localhost"] {
        let target = format!("registry://{host}:{}/app:1", server.port());
        occyctl(["info", &target, "--retries", "0"]).fails(1).says(&["404"]);
    }
}
