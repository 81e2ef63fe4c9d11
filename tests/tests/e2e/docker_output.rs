//! Docker and Podman as destinations.

use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::text;
use occy_tests::engine::{Answers, Engine, FalseEngine, Store};
use occy_tests::http::{Delivery, Response};
use occy_tests::image::{Image, json_of};
use occy_tests::layer::Layer;
use occy_tests::occyctl::{kills, moment, occyctl, whole};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::tools::{Packing, is_installed, tool};

use crate::{layers, scratch, small};

const HELLO: &str = concat!("tar://", env!("CARGO_MANIFEST_DIR"), "/images/hello.tar");

/// Layers stored in every way, one twice, one empty.
fn varied() -> Image {
    let mut list = layers();
    list[1].packing = Packing::Zstd;
    list.push(list[0].clone());
    list.push(Layer::of(&[]).packed(Packing::Plain));
    list.push(Layer::noise(3, 700_000).packed(Packing::GzipMembers));
    Image::oci(list)
}

#[test]
fn an_engine_has_what_it_was_given() {
    let registry = Registry::start();
    let image = varied();
    let source = registry.push(&image, "app", "1");
    for mut engine in Engine::all("an_engine_has_what_it_was_given") {
        let name = engine.name("given");
        occyctl(["process", &source, &engine.uri(&name)]).ok();
        let inspected = engine.inspect(&name);
        assert_eq!(inspected["RootFS"]["Layers"], serde_json::json!(image.diff_ids()));
        assert_eq!(engine.id(&name), Some(image.config_digest()));
        let saved = engine.save(&name);
        assert_eq!(saved.config, image.config);
        assert_eq!(saved.tars, image.layers.iter().map(|layer| layer.tar.clone()).collect::<Vec<_>>());
        if is_installed("skopeo") && !engine.is_podman() {
            let host = format!("unix://{}", text(engine.socket()));
            let daemon = format!("docker-daemon:{name}");
            let config = tool("skopeo", ["inspect", "--daemon-host", &host, "--config", "--raw", &daemon]);
            assert_eq!(config.as_bytes(), image.config);
        }
    }
}

#[test]
fn a_real_image_runs_after_every_step() {
    for mut engine in Engine::all("a_real_image_runs_after_every_step") {
        let (first, second) = (engine.name("hello"), engine.name("hello"));
        occyctl(["process", HELLO, &engine.uri(&first)]).ok();
        occyctl([
            "process",
            &engine.uri(&first),
            &engine.uri(&second),
            "-f",
            "normalize-timestamps",
            "-f",
            "exclude:pattern=etc/hello.conf",
        ])
        .ok();
        let saved = engine.save(&second);
        assert_eq!(json_of(&saved.config)["created"], "1970-01-01T00:00:00Z");
        assert_ne!(engine.id(&first), engine.id(&second));
        if engine.is_podman() {
            // A service with a storage of its own has no network and no cgroups to run in.
            continue;
        }
        for name in [&first, &second] {
            let said = engine.client(["run", "--rm", "--network=none", name]);
            assert!(said.contains("Hello"), "{said}");
        }
    }
}

#[test]
fn a_destination_needs_a_tag() {
    for name in ["app", "localhost:5000/app", &format!("app@sha256:{}", "a".repeat(64))] {
        occyctl(["process", HELLO, &format!("docker://{name}")]).fails(1).says(&[name, "docker://IMAGE:TAG"]);
    }
}

#[test]
fn a_run_that_fails_leaves_the_tag_at_the_old_image() {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 300_000), Layer::noise(2, 300_000)]);
    let broken = image.layer_digests()[1].clone();
    let source = registry.push(&image, "app", "1");
    for mut engine in Engine::all("a_run_that_fails_leaves_the_tag_at_the_old_image") {
        let name = engine.load(&small(), "old");
        let proxy = FaultProxy::before(registry.host());
        proxy.fault(usize::MAX, "GET", &format!("/v2/app/blobs/{broken}"), proxy::corrupt(1000));
        let from = format!("registry://{}/app:1", proxy.host());
        occyctl(["process", &from, &engine.uri(&name)]).fails(1).says(&["layer 2 of 2", &broken]);
        assert_eq!(engine.id(&name), Some(small().config_digest()));

        let directory = scratch();
        let temp = text(directory.path());
        occyctl(["process", &source, &engine.uri(&name), "--spool-limit", "100K", "--temp-dir", &temp])
            .fails(1)
            .says(&["--spool-limit"]);
        assert_eq!(engine.id(&name), Some(small().config_digest()));
        assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);

        occyctl(["process", &source, &engine.uri(&name)]).ok();
        assert_eq!(engine.id(&name), Some(image.config_digest()));
    }
}

#[test]
fn a_killed_run_leaves_the_tag_at_the_old_image_or_at_the_new_one() {
    let registry = Registry::start();
    // Nobody else's: what other tests remove of one that they have too is removed from this one.
    let old = Image::docker(vec![Layer::noise(77, 1000)]);
    let image = Image::docker((0..3).map(|seed| Layer::noise(seed, 600_000)).collect());
    let source = registry.push(&image, "app", "1");
    for mut engine in Engine::all("a_killed_run_leaves_the_tag_at_the_old_image_or_at_the_new_one") {
        let name = engine.load(&old, "killed");
        let time = whole(|| occyctl(["process", &source, &engine.uri(&name)]).ok());
        let directory = scratch();
        let temp = text(directory.path());
        for kill in 0..kills() {
            engine.load_as(&old, &name);
            let mut child = occyctl(["process", &source, &engine.uri(&name), "--temp-dir", &temp]).start();
            sleep(moment(time, kill));
            tool("kill", ["-KILL", &child.id().to_string()]);
            child.wait().expect("a child can be waited for");
            // An Engine goes on with what it has, and takes a tag from one image before it gives it to the other.
            let soon = Instant::now() + Duration::from_secs(20);
            let id = loop {
                match engine.id(&name) {
                    Some(id) => break id,
                    None if Instant::now() < soon => {}
                    None => {
                        let inspected = engine.try_client(["image", "inspect", &name]);
                        panic!("kill {kill}: {inspected:?}\n{:?}", engine.try_client(["images", "--all"]));
                    }
                }
                sleep(Duration::from_millis(50));
            };
            assert!([old.config_digest(), image.config_digest()].contains(&id), "kill {kill}: {id}");
            assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0, "kill {kill}");
        }
        occyctl(["process", &source, &engine.uri(&name)]).ok();
        assert_eq!(engine.id(&name), Some(image.config_digest()));
    }
}

#[test]
fn what_the_engine_says_is_what_happened() {
    let image = small();
    let members = saved::docker_v25(&[(&image, &["app:1"])]);
    let right = Answers::of(&image, Store::Unpacked, &members);
    let registry = Registry::start();
    let source = registry.push(&image, "app", "1");
    let json = |text: &str| Response::ok("application/json", text);
    let other = Answers::of(&Image::docker(vec![layers()[0].clone()]), Store::Unpacked, &members);
    let other_config =
        Answers::of(&image.clone().edit_config(|config| config["x"] = 1.into()), Store::Unpacked, &members);
    for (what, answers, says) in [
        ("all is well", right.clone(), None),
        (
            "the Id of containerd's store is a manifest's",
            Answers::of(&image, Store::Containerd, &members),
            None,
        ),
        (
            "an error in the stream",
            Answers {
                load: json(
                    r#"{"status":"x"}{"errorDetail":{"message":"no space left"},"error":"no space left"}"#,
                ),
                ..right.clone()
            },
            Some("no space left"),
        ),
        (
            "a refusal",
            Answers { load: json(r#"{"message":"go away"}"#).status_of(500), ..right.clone() },
            Some("500: go away"),
        ),
        ("nothing", Answers { load: json(""), ..right.clone() }, Some("did not say that it loaded")),
        ("no JSON", Answers { load: json("<html>"), ..right.clone() }, Some("load the image")),
        (
            "half an answer",
            Answers {
                load: Response { delivery: Delivery::Truncated(10), ..right.load.clone() },
                ..right.clone()
            },
            Some("broke the connection"),
        ),
        (
            "no answer",
            Answers {
                load: Response { delivery: Delivery::Reset(None), ..right.load.clone() },
                ..right.clone()
            },
            Some("broke the connection"),
        ),
        ("other layers", Answers { inspected: other.inspected, ..right.clone() }, Some("the layers")),
        ("another config", Answers { inspected: other_config.inspected, ..right.clone() }, Some("the Id")),
        (
            "no image",
            Answers { inspected: json(r#"{"message":"no such image"}"#).status_of(404), ..right.clone() },
            Some("no image app:1"),
        ),
    ] {
        let engine = FalseEngine::start(answers);
        let run = occyctl(["process", &source, "docker://app:1"]).env("DOCKER_HOST", engine.host());
        match says {
            None => drop(run.ok()),
            Some(says) => drop(run.fails(1).says(&[says])),
        }
        assert_eq!(engine.count("POST", "/images/load"), 1, "{what}");
    }
}

#[test]
fn an_engine_that_is_not_there_is_told_before_anything_is_fetched() {
    let registry = Registry::start();
    registry.push(&small(), "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let source = format!("registry://{}/app:1", proxy.host());
    occyctl(["process", &source, "docker://app:1?socket=/nonexistent/x.sock"])
        .fails(1)
        .says(&["/nonexistent/x.sock", "hint:"]);
    for layer in small().layer_digests() {
        assert_eq!(proxy.count("GET", &format!("/v2/app/blobs/{layer}")), 0, "{}", proxy.story());
    }
}
