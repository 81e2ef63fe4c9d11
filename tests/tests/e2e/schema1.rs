//! Docker's first manifest format, as registries of its time serve it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use occy_tests::fixed::Fixed;
use occy_tests::image::{Family, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::FaultProxy;
use occy_tests::registry::Registry;
use occy_tests::saved::read_saved;
use occy_tests::server::Server;
use occy_tests::tools::sha256;
use serde_json::{Value, json};

use crate::mirror::{JSON, mirror, report};
use crate::{layers, scratch, tar_uri};

/// The layers with a throwaway between them, newest first.
fn document(layers: &[Layer]) -> String {
    let v1 = |value: Value| json!({"v1Compatibility": value.to_string()});
    let empty = Layer::of(&[]).blob();
    json!({
        "schemaVersion": 1, "name": "app", "tag": "1", "architecture": "amd64",
        "fsLayers": [{"blobSum": sha256(&layers[1].blob())}, {"blobSum": sha256(&empty)}, {"blobSum": sha256(&layers[0].blob())}],
        "history": [
            v1(json!({"id": "c", "parent": "b", "created": "2015-01-03T00:00:00Z", "os": "linux", "architecture": "amd64",
                "config": {"Cmd": ["/bin/sh"]}, "container_config": {"Cmd": ["touch", "/late"]}})),
            v1(json!({"id": "b", "parent": "a", "created": "2015-01-02T00:00:00Z", "throwaway": true})),
            v1(json!({"id": "a", "created": "2015-01-01T00:00:00Z"})),
        ],
    })
    .to_string()
}

fn signed(payload: &str) -> String {
    let head = payload.strip_suffix('}').expect("an object");
    let protected =
        json!({"formatLength": head.len(), "formatTail": URL_SAFE_NO_PAD.encode("}")}).to_string();
    format!(
        r#"{head},"signatures":[{{"header":{{}},"signature":"x","protected":"{}"}}]}}"#,
        URL_SAFE_NO_PAD.encode(protected)
    )
}

fn serve(layers: &[Layer], content_type: &str, manifest: &str, digest: &str) -> Server {
    let fixed = layers.iter().fold(Fixed::default(), |fixed, layer| fixed.blob("app", &layer.blob()));
    let answer =
        occy_tests::http::Response::ok(content_type, manifest).header("Docker-Content-Digest", digest);
    fixed
        .blob("app", &Layer::of(&[]).blob())
        .at("/v2/app/manifests/1", answer.clone())
        .at(&format!("/v2/app/manifests/{digest}"), answer)
        .serve()
}

const SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
const UNSIGNED: &str = "application/vnd.docker.distribution.manifest.v1+json";

#[test]
fn layers_are_turned_round_and_history_becomes_a_config() {
    let layers = layers();
    let plain = document(&layers);
    let jws = signed(&plain);
    for (content_type, manifest) in [
        (UNSIGNED, &plain),
        (SIGNED, &jws),
        (UNSIGNED, &jws),
        ("text/plain; charset=utf-8", &jws),
        ("application/json", &plain),
    ] {
        let server = serve(&layers, content_type, manifest, &sha256(plain.as_bytes()));
        let source = format!("registry://{}/app:1", server.host());
        let directory = scratch();
        let path = directory.path().join("out.tar");
        occyctl(["process", &source, &tar_uri(&path)]).ok();
        let saved = read_saved(&path);
        assert_eq!(saved.tars, [layers[0].tar.clone(), layers[1].tar.clone()], "{content_type}");
        let config = json_of(&saved.config);
        assert_eq!(config["config"]["Cmd"], json!(["/bin/sh"]));
        let history = config["history"].as_array().expect("a list");
        assert_eq!(history.len(), 3);
        assert_eq!(history[1]["empty_layer"], true);
        assert_eq!(history[2]["created_by"], "touch /late");
    }
}

#[test]
fn a_push_writes_schema_2() {
    let layers = layers();
    let plain = document(&layers);
    let server = serve(&layers, SIGNED, &signed(&plain), &sha256(plain.as_bytes()));
    let source = format!("registry://{}/app:1", server.host());
    let to = Registry::start();
    for (tag, arguments) in [
        ("copy", &[][..]),
        ("filtered", &["-f", "normalize-timestamps"]),
        ("unchanged", &["-f", "exclude:pattern=*.none"]),
        ("oci", &["--format", "oci"]),
    ] {
        // Each where no layer is yet.
        occyctl([&["process", &source, &to.uri(&format!("{tag}:1"))], arguments].concat()).ok();
        let pushed = to.pull(tag, "1");
        let family = if tag == "oci" { Family::Oci } else { Family::Docker };
        assert_eq!(pushed.document["mediaType"], family.manifest());
        assert_eq!(pushed.tars.len(), 2);
        judge::skopeo_reads(&format!("docker://{}/{tag}:1", to.host()));
    }
    for tag in ["copy", "unchanged"] {
        assert_eq!(to.pull(tag, "1").blobs, [layers[0].blob(), layers[1].blob()], "not compressed again");
    }
}

#[test]
fn the_digest_of_a_signed_manifest_is_its_payloads() {
    let layers = vec![Layer::of(&[Member::file("a", "")]), Layer::of(&[Member::file("b", "")])];
    let plain = document(&layers);
    let digest = sha256(plain.as_bytes());
    let server = serve(&layers, SIGNED, &signed(&plain), &digest);
    occyctl(["info", &format!("registry://{}/app@{digest}", server.host())]).ok();
    let forged = plain.replace("/late", "/evil");
    let server = serve(&layers, SIGNED, &signed(&forged), &digest);
    occyctl(["info", &format!("registry://{}/app@{digest}", server.host()), "--retries", "0"])
        .fails(1)
        .says(&["digest"]);
}

#[test]
fn check_and_search_read_it() {
    let layers = layers();
    let plain = document(&layers);
    let server = serve(&layers, SIGNED, &signed(&plain), &sha256(plain.as_bytes()));
    let source = format!("registry://{}/app:1", server.host());
    occyctl(["check", &source]).ok();
    let found = occyctl(["search", &source, "*.conf"]).ok();
    assert!(found.text().contains("Found 3 matches in 2 layers."), "{}", found.text());
}

#[test]
fn a_mirror_that_is_to_say_how_it_was_made_fails_before_a_layer_moves() {
    let plain = document(&layers());
    let (from, to) = (serve(&layers(), UNSIGNED, &plain, &sha256(plain.as_bytes())), Registry::start());
    let far = FaultProxy::before(to.host());
    let directory = scratch();
    let text = format!(
        "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    tags: [{{names: ['1']}}]\n    \
         filters: ['exclude:pattern=*.key']\n    signatures: drop\n",
        from.host(),
        far.host()
    );
    let failed = report(mirror(directory.path(), &format!("{text}    provenance: true\n"), &JSON), 1);
    let problem = failed["images"][0]["problem"].as_str().expect("a problem");
    assert!(problem.contains("Docker schema 1"), "{failed}");
    assert_eq!(far.count("POST", "*") + far.count("PUT", "*"), 0, "{}", far.story());
    assert_eq!(report(mirror(directory.path(), &text, &JSON), 0)["done"], 1);
}
