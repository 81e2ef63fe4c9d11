//! Where a registry may send us, and what must not go there.

use occy_tests::fixed::Fixed;
use occy_tests::http::Response;
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::FaultProxy;
use occy_tests::registry::Registry;
use occy_tests::server::Server;

use crate::{scratch, small};

const SECRET: &str = "hunter2-secret";

#[test]
fn credentials_do_not_follow_a_redirect_to_another_host() {
    let registry = Registry::with_htpasswd("ann", SECRET);
    let image = small();
    registry.push(&image, "app", "1");
    let storage = Fixed::default().image("app", "1", &image).serve();
    let proxy = FaultProxy::before(registry.host());
    let elsewhere = format!("http://localhost:{}", storage.port());
    proxy.fault(
        usize::MAX,
        "GET",
        "/v2/app/blobs/*",
        std::sync::Arc::new(move |request, upstream| {
            let checked = upstream(request);
            if checked.status == 200 || checked.status == 206 {
                let signed = format!("{elsewhere}{}?X-Amz-Signature=signed-secret", request.path);
                Response::status(307).header("Location", &signed)
            } else {
                checked
            }
        }),
    );
    let source = format!("registry://{}/app:1", proxy.host());
    let directory = scratch();
    let out = crate::tar_uri(&directory.path().join("out.tar"));
    let login = ["--username", "ann", "--password", SECRET, "-vvv"];
    // Another name is another host, also where both lead to this machine.
    occyctl([&["process", &source, &out][..], &login].concat())
        .fails(1)
        .says(&["localhost", "--allow-network"]);
    assert!(storage.seen().is_empty());
    occyctl([&["process", &source, &out, "--allow-network", "127.0.0.0/8,::1"][..], &login].concat())
        .ok()
        .keeps("signed-secret")
        .keeps(SECRET);
    assert!(storage.seen().len() >= 2, "config and layers: {:#?}", storage.seen());
    for seen in storage.seen() {
        assert_eq!(seen.request.get("Authorization"), None, "{seen:#?}");
    }
}

#[test]
fn realms_in_private_networks_are_refused() {
    let trap = Server::start_on("127.0.0.2", |_| Response::ok("application/json", r#"{"token":"x"}"#));
    for realm in [
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "http://10.0.0.1/token".to_owned(),
        "http://192.168.1.1/token".to_owned(),
        "http://[fd00::1]/token".to_owned(),
        "http://[::ffff:10.0.0.1]/token".to_owned(),
        format!("http://127.0.0.2:{}/token", trap.port()),
        format!("http://0x7f.2:{}/token", trap.port()),
        "file:///etc/passwd".to_owned(),
    ] {
        let challenge = format!(r#"Bearer realm="{realm}",service="x""#);
        let server = Server::start(move |_| Response::status(401).header("WWW-Authenticate", &challenge));
        let source = format!("registry://{}/app:1", server.host());
        occyctl(["info", &source, "--username", "ann", "--password", SECRET, "--retries", "0"])
            .fails(1)
            .keeps(SECRET);
    }
    assert!(trap.seen().is_empty(), "{:#?}", trap.seen());
}

#[test]
fn a_token_servers_redirect_is_not_followed() {
    let trap = Server::start(|_| Response::ok("application/json", r#"{"token":"x"}"#));
    let elsewhere = format!("http://{}/token", trap.host());
    let tokens = Server::start(move |_| Response::status(307).header("Location", &elsewhere));
    let challenge = format!(r#"Bearer realm="http://{}/token",service="x""#, tokens.host());
    let server = Server::start(move |_| Response::status(401).header("WWW-Authenticate", &challenge));
    let source = format!("registry://{}/app:1", server.host());
    occyctl(["info", &source, "--username", "ann", "--password", SECRET, "--retries", "0"]).fails(1);
    assert!(!tokens.seen().is_empty());
    assert!(trap.seen().is_empty(), "{:#?}", trap.seen());
}

#[test]
fn redirects_of_blobs_into_private_networks_are_refused() {
    let trap = Server::start_on("127.0.0.2", |_| Response::ok("x", *b"x"));
    let registry = Registry::start();
    registry.push(&small(), "app", "1");
    for location in [
        "http://169.254.169.254/latest".to_owned(),
        "http://10.0.0.1/".into(),
        format!("http://127.0.0.2:{}/", trap.port()),
    ] {
        let proxy = FaultProxy::before(registry.host());
        let redirect = Response::status(307).header("Location", &location);
        proxy.fault(usize::MAX, "GET", "/v2/app/blobs/*", occy_tests::proxy::answer(redirect));
        let source = format!("registry://{}/app:1", proxy.host());
        occyctl(["info", &source, "--retries", "0"]).fails(1).says(&["hint: "]);
    }
    assert!(trap.seen().is_empty(), "{:#?}", trap.seen());
}

#[test]
fn redirects_that_go_round_end() {
    let registry = Registry::start();
    registry.push(&small(), "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let round: occy_tests::proxy::Fault =
        std::sync::Arc::new(|request, _| Response::status(307).header("Location", &request.path));
    proxy.fault(usize::MAX, "GET", "/v2/app/blobs/*", round);
    let source = format!("registry://{}/app:1", proxy.host());
    occyctl(["info", &source, "--retries", "0"]).fails(1).says(&["redirect"]);
    assert!(proxy.seen().len() < 30, "{}", proxy.story());
}
