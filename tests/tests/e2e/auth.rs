//! Who one is to a registry: passwords, tokens, docker's config.json, and what must not be told to whom.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use occy_tests::http::{Request, Response};
use occy_tests::image::Image;
use occy_tests::layer::{Layer, noise};
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::token::{TokenRules, TokenServer};
use occy_tests::tools::{Packing, write};
use serde_json::json;

use crate::{scratch, small};

const SECRET: &str = "hunter2-secret";

/// Runs `info` on the image with everything that may be said, which must not be the secret.
fn info(uri: &str) -> Run {
    occyctl(["info", uri, "-vvv", "--retries", "0"])
}

#[test]
fn basic_passwords_come_from_options_or_the_environment() {
    let registry = Registry::with_htpasswd("ann", SECRET);
    let source = registry.push(&small(), "app", "1");
    occyctl(["info", &source, "-vvv", "--username", "ann", "--password", SECRET]).ok().keeps(SECRET);
    info(&source).env("OCCYSTRAP_USERNAME", "ann").env("OCCYSTRAP_PASSWORD", SECRET).ok().keeps(SECRET);
    occyctl(["info", &source, "-vvv", "--source-username", "ann", "--source-password", SECRET])
        .ok()
        .keeps(SECRET);
    occyctl(["info", &source, "--username", "ann", "--password", "wrong-secret", "-vvv"])
        .fails(1)
        .says(&["401", registry.host(), "hint: "])
        .keeps("wrong-secret");
    info(&source).fails(1).says(&["401", "hint: ", "docker login", "--username"]);
    occyctl(["info", &source, "--username", "ann"]).run();
}

#[test]
fn source_and_destination_have_credentials_of_their_own() {
    let from = Registry::with_htpasswd("ann", SECRET);
    let to = Registry::with_htpasswd("bob", "other-secret");
    let source = from.push(&small(), "app", "1");
    let target = to.uri("app:1");
    let command = ["process", &source, &target, "-vvv"];
    let own = [
        "--source-username",
        "ann",
        "--source-password",
        SECRET,
        "--destination-username",
        "bob",
        "--destination-password",
        "other-secret",
    ];
    occyctl([&command[..], &own].concat()).ok().keeps(SECRET).keeps("other-secret");
    assert_eq!(to.pull("app", "1").digest, small().digest());
    let swapped = ["--source-username", "bob", "--source-password", "other-secret"];
    occyctl([&command[..], &swapped].concat()).fails(1).says(&["401"]).keeps("other-secret");
}

fn docker_config(directory: &Path, config: &serde_json::Value) {
    write(directory.join("config.json"), config.to_string());
}

#[test]
fn dockers_config_file_is_read() {
    let registry = Registry::with_htpasswd("ann", SECRET);
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let auth = STANDARD.encode(format!("ann:{SECRET}"));
    docker_config(directory.path(), &json!({"auths": {registry.host(): {"auth": auth}}}));
    info(&source).env("DOCKER_CONFIG", directory.path()).ok().keeps(SECRET).keeps(&auth);
    docker_config(
        directory.path(),
        &json!({"auths": {format!("http://{}/v1/", registry.host()): {"auth": auth}}}),
    );
    info(&source).env("DOCKER_CONFIG", directory.path()).ok().keeps(SECRET);
    docker_config(directory.path(), &json!({"auths": {"example.com": {"auth": auth}}}));
    info(&source).env("DOCKER_CONFIG", directory.path()).fails(1).says(&["hint: "]);
    let home = scratch();
    docker_config(&home.path().join(".docker"), &json!({"auths": {registry.host(): {"auth": auth}}}));
    info(&source).env("HOME", home.path()).ok();
}

#[test]
fn podmans_file_is_read_where_dockers_says_nothing() {
    let registry = Registry::with_htpasswd("ann", SECRET);
    let source = registry.push(&small(), "app", "1");
    let (docker, podman) = (scratch(), scratch());
    let auths = |password: &str| {
        let auth = STANDARD.encode(format!("ann:{password}"));
        json!({"auths": {registry.host(): {"auth": auth}}}).to_string()
    };
    write(podman.path().join("containers/auth.json"), auths(SECRET));
    info(&source).env("XDG_RUNTIME_DIR", podman.path()).ok().keeps(SECRET);
    info(&source).env("XDG_CONFIG_HOME", podman.path()).ok();
    let file = podman.path().join("containers/auth.json");
    docker_config(docker.path(), &json!({"auths": {"elsewhere.example": {"auth": "!"}}}));
    info(&source).env("REGISTRY_AUTH_FILE", &file).env("DOCKER_CONFIG", docker.path()).ok();
    write(docker.path().join("config.json"), auths("wrong-secret"));
    info(&source)
        .env("REGISTRY_AUTH_FILE", &file)
        .env("DOCKER_CONFIG", docker.path())
        .fails(1)
        .keeps("wrong-secret");
    // A file that was named is the only one.
    let named = ["info", &source, "--docker-config", &docker.path().display().to_string()];
    occyctl(named).env("REGISTRY_AUTH_FILE", &file).fails(1);
}

#[test]
fn credential_helpers_are_asked() {
    use std::os::unix::fs::PermissionsExt;
    let registry = Registry::with_htpasswd("ann", SECRET);
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let helper = directory.path().join("docker-credential-fake");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = get ] || exit 1\nread -r host\n[ \"$host\" = '{}' ] || {{ echo 'credentials not found in native keychain'; exit 1; }}\n\
         printf '{{\"ServerURL\":\"%s\",\"Username\":\"ann\",\"Secret\":\"{SECRET}\"}}' \"$host\"\n",
        registry.host()
    );
    write(&helper, script);
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).expect("an executable");
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").expect("a PATH"));
    for config in [json!({"credHelpers": {registry.host(): "fake"}}), json!({"credsStore": "fake"})] {
        docker_config(directory.path(), &config);
        info(&source).env("DOCKER_CONFIG", directory.path()).env("PATH", &path).ok().keeps(SECRET);
    }
}

#[test]
fn tokens_are_fetched_with_a_password_and_shared() {
    let tokens = TokenServer::with_user("ann", SECRET);
    let registry = Registry::with_tokens(&tokens);
    let source = registry.push(&small(), "app", "1");
    let target = registry.uri("team/copy:1");
    let login = ["--username", "ann", "--password", SECRET, "-vvv"];
    let ended = occyctl([&["process", &source, &target][..], &login].concat()).ok().keeps(SECRET);
    assert_eq!(registry.pull("team/copy", "1").digest, small().digest());
    assert!(
        tokens.requests() <= 5,
        "one token serves many requests: {}\n{}",
        tokens.requests(),
        ended.stderr
    );
    assert!(!ended.stderr.contains("eyJ"), "a token is in the log:\n{}", ended.stderr);
    info(&source).fails(1).says(&["401", "hint: "]);
    occyctl(["info", &source, "--username", "ann", "--password", "wrong"]).fails(1).says(&["401"]);
}

#[test]
fn anonymous_tokens_pull_and_do_not_push() {
    let tokens =
        TokenServer::start(TokenRules { anonymous_pull: true, access_token: true, ..TokenRules::default() });
    let registry = Registry::with_tokens(&tokens);
    let source = registry.push(&small(), "app", "1");
    info(&source).ok();
    occyctl(["process", &source, &registry.uri("copy:1"), "--retries", "0"]).fails(1).says(&["hint: "]);
    assert!(!registry.has("copy", "1"));
}

#[test]
fn an_identity_token_is_exchanged() {
    for no_post in [false, true] {
        let tokens = TokenServer::start(TokenRules {
            identity_tokens: vec!["identity-secret".into()],
            users: [("<token>".to_owned(), "identity-secret".to_owned())].into(),
            no_post,
            ..TokenRules::default()
        });
        let registry = Registry::with_tokens(&tokens);
        let source = registry.push(&small(), "app", "1");
        let directory = scratch();
        let auth = STANDARD.encode("<token>:");
        docker_config(
            directory.path(),
            &json!({"auths": {registry.host(): {"auth": auth, "identitytoken": "identity-secret"}}}),
        );
        let ended = info(&source).env("DOCKER_CONFIG", directory.path()).run().keeps("identity-secret");
        assert_eq!(tokens.count("POST", "/token"), 1, "{}", ended.stderr);
        // A server without OAuth2 may know the token as a password; that it was asked by GET is what matters.
        assert_eq!(tokens.count("GET", "/token") > 0, no_post, "{}", ended.stderr);
        assert!(ended.status.success() || no_post, "{}", ended.stderr);
    }
}

#[test]
fn a_token_that_runs_out_in_the_middle_of_a_blob_is_renewed() {
    let tokens = TokenServer::with_user("ann", SECRET);
    let registry = Registry::with_tokens(&tokens);
    let image = Image::oci(vec![Layer::noise(1, 20_000_000).packed(Packing::Plain)]);
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let challenge = Request::new("GET", "/v2/app/manifests/1").send(registry.host()).expect("an answer");
    let challenge = challenge.get("WWW-Authenticate").expect("a challenge").to_owned();
    let expired = Response::status(401).header("WWW-Authenticate", &challenge);
    let login = ["--username", "ann", "--password", SECRET];
    let source = format!("registry://{}/app:1", proxy.host());
    // Down: the body breaks off, and the request for the rest finds the token gone.
    let layer = "/v2/app/blobs/sha256:*";
    proxy.fault_after(1, 1, "GET", layer, proxy::truncate(1_000_000));
    proxy.fault_after(1, 1, "GET", layer, proxy::answer(expired.clone()));
    let directory = scratch();
    let out = crate::tar_uri(&directory.path().join("out.tar"));
    occyctl([&["process", &source, &out][..], &login].concat()).ok();
    assert_eq!(proxy.pending(), 0, "{}", proxy.story());
    // Up: the same in the middle of an upload.
    proxy.fault(1, "PATCH", "*", proxy::answer(expired.clone()));
    proxy.fault(1, "PUT", "/v2/copy/blobs/*", proxy::answer(expired.clone()));
    proxy.fault(1, "PUT", "/v2/copy/manifests/*", proxy::answer(expired));
    let direct = registry.uri("app:1");
    let target = format!("registry://{}/copy:1", proxy.host());
    occyctl(
        [&["process", &direct, &target, "-f", "normalize-timestamps", "--compression", "zstd"][..], &login]
            .concat(),
    )
    .ok();
    assert_eq!(proxy.pending(), 0, "{}", proxy.story());
    registry.pull("copy", "1");
}

#[test]
fn a_token_that_is_never_good_ends_in_an_error() {
    let tokens = TokenServer::with_user("ann", SECRET);
    let registry = Registry::with_tokens(&tokens);
    let source = registry.push(&small(), "app", "1");
    tokens.change(|rules| rules.expired = usize::MAX);
    occyctl(["info", &source, "--username", "ann", "--password", SECRET])
        .fails(1)
        .says(&["401"])
        .keeps(SECRET);
    assert!(tokens.requests() < 10, "{}", tokens.requests());
}

#[test]
fn a_token_body_is_capped_and_must_be_json() {
    let tokens = TokenServer::with_user("ann", SECRET);
    let registry = Registry::with_tokens(&tokens);
    let source = registry.push(&small(), "app", "1");
    for body in [noise(1, 2_000_000), b"{}".to_vec(), b"<html>".to_vec()] {
        tokens.change(|rules| rules.body = Some(body));
        occyctl(["info", &source, "--username", "ann", "--password", SECRET, "--retries", "0"])
            .fails(1)
            .says(&["token"])
            .keeps(SECRET);
    }
}

#[test]
fn odd_challenges_are_understood() {
    let tokens = TokenServer::start(TokenRules { anonymous_pull: true, ..TokenRules::default() });
    let registry = Registry::with_tokens(&tokens);
    registry.push(&small(), "app", "1");
    let realm = tokens.realm();
    for challenge in [
        format!(
            r#"bEaReR  service="occy test registry" , scope="repository:app:pull",realm="{realm}",error="""#
        ),
        format!(
            r#"Basic realm="x, y", Bearer realm="{realm}",service="occy test registry",scope="repository:app:pull""#
        ),
        format!(
            r#"Negotiate, Bearer realm="{realm}",service="occy test registry",scope="repository:app:pull""#
        ),
    ] {
        let proxy = FaultProxy::before(registry.host());
        let text = challenge.clone();
        proxy.fault(
            usize::MAX,
            "*",
            "*",
            proxy::change(move |answer| {
                if answer.status == 401 { answer.replace("WWW-Authenticate", &text) } else { answer }
            }),
        );
        occyctl(["info", &format!("registry://{}/app:1", proxy.host()), "--retries", "0"]).ok();
    }
}

#[test]
fn halves_of_two_credentials_are_not_put_together() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    for halves in [
        ["--username", "ann", "--source-password", SECRET],
        ["--source-username", "bob", "--password", SECRET],
    ] {
        let run = occyctl([&["info", &source][..], &halves].concat());
        run.fails(2).says(&["source"]).keeps(SECRET);
        let both = ["--username", "ann", "--password", SECRET, "--source-username", "bob"];
        occyctl([&["info", &source][..], &both].concat()).fails(2).says(&["needs a password"]).keeps(SECRET);
    }
}
