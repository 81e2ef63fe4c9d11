//! `occyctl --coordinator`: the same commands with the same results, whoever does the work.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::{Certificates, text};
use occy_tests::coordinator::Coordinator;
use occy_tests::engine::{Answers, Engine, FalseEngine, Store};
use occy_tests::image::{Family, Image, Index};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::{Ended, Run, locally};
use occy_tests::proxy::{FaultProxy, slow};
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::terminal::on_terminal;
use occy_tests::tools::{Packing, read, sha256, tool, write};
use serde_json::{Value, json};

use crate::{layers, scratch, small, tar_uri};

/// The chains that every way is tried with: none, one that edits, one that observes.
const CHAINS: [&[&str]; 3] = [
    &[],
    &["exclude:pattern=*.conf", "normalize-timestamps:ts=1000"],
    &["search:pattern=*.conf", "inspect:file=layers.jsonl"],
];

/// A run through the coordinator.
fn through(coordinator: &Coordinator, arguments: &[&str]) -> Run {
    locally(arguments).env("OCCYSTRAP_COORDINATOR", coordinator.url())
}

/// What is printed, without what no two runs have in common.
fn comparable(ended: &Ended) -> Value {
    let text = ended.text();
    let documents = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
    let parsed: Result<Vec<Value>, _> = documents.collect();
    match parsed {
        Ok(mut documents) => {
            for document in documents.iter_mut().filter_map(Value::as_object_mut) {
                document.remove("seconds");
            }
            documents.into()
        }
        Err(_) => text.into(),
    }
}

/// Every file below a directory, by what it holds.
fn files(root: &Path) -> BTreeMap<String, Value> {
    let tree = judge::tree(root);
    let entries = tree.as_object().expect("a tree").iter();
    let entries = entries.filter(|(path, _)| !path.contains("layer-index"));
    entries
        .map(|(path, entry)| {
            let kept = ["type", "mode", "owner", "sha256", "target"];
            (path.clone(), kept.iter().map(|key| (*key, entry[*key].clone())).collect())
        })
        .collect()
}

struct Stage {
    registry: Registry,
    coordinator: Coordinator,
    directory: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let registry = Registry::start();
        let coordinator = Coordinator::start(&["--embedded-workers", "2"]);
        Self { registry, coordinator, directory: scratch() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A place for each of both runs, where nothing is yet.
    fn place(&self, who: &str) -> PathBuf {
        let place = self.at(who);
        if place.exists() {
            std::fs::remove_dir_all(&place).expect("a directory can be removed");
        }
        std::fs::create_dir(&place).expect("a directory");
        place
    }

    /// Every kind of source that is not an Engine: an image with a layer that stands twice, and one with zstd.
    fn sources(&self) -> Vec<String> {
        let twice = Image::docker([layers(), layers()].concat());
        let zstd = Layer::noise(1, 300_000).packed(Packing::Zstd);
        let mixed = Image::oci(vec![zstd, Layer::noise(2, 9), Layer::of(&[Member::file("app.conf", "x")])]);
        let names: &[&str] = &["localhost:5000/app:1", "other:2"];
        write(self.at("v12.tar"), tar(&saved::docker_v12(&[(&twice, names)])));
        write(self.at("v25.tar"), tar(&saved::docker_v25(&[(&twice, names)])));
        write(self.at("containerd.tar"), tar(&saved::containerd(&[(&twice, names)])));
        let pushed = [self.registry.push(&twice, "app", "1"), self.registry.push(&mixed, "app", "2")];
        let [directory, layout] = ["dir", "layout"].map(|name| text(&self.at(name)));
        locally(["process", &pushed[0], &format!("dir://{directory}")]).ok();
        locally(["process", &pushed[1], &format!("oci-layout://{layout}")]).ok();
        let saved = ["v12.tar", "v25.tar", "containerd.tar"].map(|name| tar_uri(&self.at(name)));
        let own = [format!("dir://{directory}"), format!("oci-layout://{layout}")];
        [&pushed[..], &saved[..], &own[..]].concat()
    }

    /// Runs `process` both ways, and expects the same of them.
    fn compare(&self, source: &str, output: &str, filters: &[&str], format: &str) {
        let cell = format!("{source} {output} {filters:?} {format}");
        let flags: Vec<&str> = filters.iter().flat_map(|filter| ["-f", filter]).collect();
        let [here, there] = ["here", "there"].map(|who| {
            let place = self.place("place");
            let destination = match output {
                "registry" => self.registry.uri(&format!("{who}:1")),
                name => name.replace("PLACE", &text(&place.join("out"))),
            };
            let arguments =
                [&["process", source, &destination, "--output-format", format], &flags[..]].concat();
            let run = match who {
                "here" => locally(&arguments),
                _ => through(&self.coordinator, &arguments),
            };
            let ended = run.directory(&place).ok();
            let made = match output {
                "registry" => BTreeMap::from([("digest".to_owned(), self.registry.digest(who, "1").into())]),
                _ => files(&place),
            };
            let said: Vec<String> = ended.stderr.lines().map(|line| line.replace(who, "")).collect();
            // How long it took is the last thing that is said.
            let said: Vec<String> = said.iter().map(|line| line.split(" in ").take(2).collect()).collect();
            (comparable(&ended).to_string().replace(&format!("{who}:1"), "WHO"), said, made)
        });
        assert_eq!(here.0, there.0, "{cell}: printed");
        assert_eq!(here.1, there.1, "{cell}: said");
        assert_eq!(here.2, there.2, "{cell}: made");
    }
}

/// Each kind of destination that is not an Engine.
const OUTPUTS: [&str; 9] = [
    "registry",
    "tar://PATH",
    "dir://PATH",
    "dir://PATH?unique_names=true",
    "dir://PATH?expand=true",
    "oci://PATH",
    "oci-layout://PATH",
    "oci-layout://PATH?tar=true&compression=zstd",
    "oci-layout://PATH?format=oci",
];

#[test]
fn every_source_output_and_filter_gives_the_same_through_a_coordinator() {
    let stage = Stage::new();
    let all = std::env::var_os("OCCY_TEST_ALL").is_some();
    for (s, source) in stage.sources().iter().enumerate() {
        for (o, output) in OUTPUTS.iter().enumerate() {
            for (f, filters) in CHAINS.iter().enumerate() {
                // As many as hold each pair of two of the three.
                if all || f == (s + o) % CHAINS.len() {
                    let format = if (s + f) % 2 == 0 { "json" } else { "text" };
                    stage.compare(source, &output.replace("PATH", "PLACE"), filters, format);
                }
            }
        }
    }
}

#[test]
fn what_is_looked_for_and_looked_at_is_printed_the_same() {
    let stage = Stage::new();
    let broken = small().edit_config(|config| config["rootfs"]["diff_ids"][1] = sha256(b"other").into());
    let broken = stage.registry.push(&broken, "broken", "1");
    for source in stage.sources() {
        for arguments in [
            &["search", &source, "*.conf"][..],
            &["search", &source, "conf$", "--regex", "--script-friendly"],
            &["search", &source, " ,regex=true:pattern=[", "--output-format", "json"],
            &["search", &source, "*", "--output-format", "json"],
            &["info", &source],
            &["info", &source, "--output-format", "json"],
            &["check", &source],
            &["check", &source, "--fast", "--output-format", "json"],
        ] {
            let [here, there] = [locally(arguments), through(&stage.coordinator, arguments)].map(Run::run);
            assert_eq!(here.status, there.status, "{}\n{}", here.what, there.stderr);
            assert_eq!(here.text(), there.text(), "{}", here.what);
        }
    }
    for format in ["text", "json"] {
        let arguments = ["check", &broken, "--output-format", format];
        let [here, there] =
            [locally(arguments), through(&stage.coordinator, &arguments)].map(|run| run.fails(3));
        assert_eq!(here.text(), there.text());
    }
}

#[test]
fn standard_input_and_output_are_streamed_too() {
    let stage = Stage::new();
    let saved = tar(&saved::docker_v12(&[(&small(), &["app:1"])]));
    let arguments =
        ["process", "tar://-", "tar://-", "-f", "normalize-timestamps", "-f", "search:pattern=*.conf"];
    let [here, there] =
        [locally(arguments), through(&stage.coordinator, &arguments)].map(|run| run.input(&saved).ok());
    assert_eq!(here.stdout, there.stdout);
    there.says(&["etc/app.conf"]);
    assert!(here.stderr.contains("etc/app.conf"));
}

#[test]
fn an_engine_is_read_and_filled_where_the_client_is() {
    let stage = Stage::new();
    let image = Image::docker([layers(), vec![layers()[0].clone()]].concat());
    // Its layers come in the order of their names.
    let mut members = saved::docker_v25(&[(&image, &["app:1"])]);
    members.reverse();
    let engine = FalseEngine::start(Answers::of(&image, Store::Unpacked, &members));
    let [here, there] = ["here", "there"].map(|who| stage.registry.uri(&format!("{who}:1")));
    let filters = ["-f", "normalize-timestamps"];
    let arguments = |to| [&["process", "docker://app:1", to][..], &filters].concat();
    locally(arguments(&here)).env("DOCKER_HOST", engine.host()).ok();
    through(&stage.coordinator, &arguments(&there)).env("DOCKER_HOST", engine.host()).ok();
    assert_eq!(stage.registry.digest("here", "1"), stage.registry.digest("there", "1"));
    for mut engine in Engine::all("an_engine_is_read_and_filled_where_the_client_is") {
        let name = engine.name("remote");
        let source = stage.registry.push(&small(), "small", "1");
        through(&stage.coordinator, &["process", &source, &engine.uri(&name)]).ok();
        let back = stage.registry.uri("back:1");
        through(&stage.coordinator, &["process", &engine.uri(&name), &back]).ok();
        let pulled = stage.registry.pull("back", "1");
        assert_eq!(pulled.tars, small().layers.iter().map(|layer| layer.tar.clone()).collect::<Vec<_>>());
    }
}

#[test]
fn platforms_names_and_foreign_layers_are_the_same() {
    let stage = Stage::new();
    let on = |architecture| Image::on(Family::Oci, ("linux", architecture, None), layers());
    let entries = ["amd64", "arm64"].map(|architecture| {
        let platform = json!({"os": "linux", "architecture": architecture});
        (platform, on(architecture))
    });
    let index = occy_tests::image::Index::new(Family::Oci, entries.into());
    let source = stage.registry.push_index(&index, "multi", "1");
    for arguments in [
        &["info", &source, "--output-format", "json"][..],
        &["info", &source, "--architecture", "arm64"],
        &["info", &format!("{source}?arch=arm64")],
        &["info", &source, "--architecture", "s390x"],
    ] {
        let [here, there] = [locally(arguments), through(&stage.coordinator, arguments)].map(Run::run);
        assert_eq!((here.status, here.text()), (there.status, there.text()), "{}", here.what);
        assert_eq!(here.stderr, there.stderr);
    }
    let foreign = layers()[0].clone().foreign("http://192.0.2.1/layer");
    let image = Image::docker(vec![foreign, layers()[1].clone()]);
    let source = stage.registry.push(&image, "foreign", "1");
    let [here, there] = ["here", "there"].map(|who| format!("oci-layout://{}", text(&stage.at(who))));
    locally(["process", &source, &here]).ok();
    through(&stage.coordinator, &["process", &source, &there]).ok();
    assert_eq!(files(&stage.at("here")), files(&stage.at("there")));
    let back = stage.registry.uri("back:1");
    through(&stage.coordinator, &["process", &here, &back]).ok();
    assert_eq!(stage.registry.digest("back", "1"), image.digest());
}

#[test]
fn what_the_destination_has_is_not_fetched_and_nothing_is_before_it_is_ready() {
    let stage = Stage::new();
    stage.registry.push(&small(), "app", "1");
    let proxy = FaultProxy::before(stage.registry.host());
    let source = format!("registry://{}/app:1", proxy.host());
    let fetched = || {
        let digests = small().layer_digests();
        digests.iter().map(|digest| proxy.count("GET", &format!("/v2/app/blobs/{digest}"))).sum::<usize>()
    };
    let shared = format!("dir://{}?unique_names=true", text(&stage.at("shared")));
    let layout = format!("oci-layout://{}", text(&stage.at("layout")));
    let search = ["-f", "search:pattern=*.conf"];
    for (destination, filters) in [(&shared, &search[..]), (&shared, &[]), (&layout, &[])] {
        let before = fetched();
        let process =
            || through(&stage.coordinator, &[&["process", &source, destination], filters].concat()).ok();
        let first = process();
        assert_eq!(fetched(), before + 2, "{destination} {filters:?}");
        assert_eq!(process().text(), first.text(), "what is there reports all the same");
        assert_eq!(fetched(), before + 2, "{destination} {filters:?}");
    }
    let before = fetched();
    let nobody = format!("docker://app:1?socket={}", text(&stage.at("nobody.sock")));
    for taken in [&nobody, &format!("dir://{}", text(&stage.at("shared")))] {
        through(&stage.coordinator, &["process", &source, taken]).fails(1);
    }
    assert_eq!(fetched(), before, "{}", proxy.story());
}

#[test]
fn failures_are_told_the_same_with_the_same_exit_code() {
    let stage = Stage::new();
    let good = stage.registry.push(&small(), "app", "1");
    let missing = stage.registry.uri("missing:1");
    write(stage.at("broken.tar"), b"not a tar at all");
    let broken = tar_uri(&stage.at("broken.tar"));
    let out = tar_uri(&stage.at("out.tar"));
    let copy = stage.registry.uri("copy:1");
    for arguments in [
        &["process", &missing, &out][..],
        &["process", &missing, &copy],
        &["process", &broken, &copy],
        &["process", &good, "registry://UPPER/Case/"],
        &["process", "nonsense", &out],
        &["process", &good, &copy, "--compression", "zstd", "--format", "docker"],
        &["process", &good, &out, "-f", "strip"],
        &["process", &good, &out, "-f", "exclude"],
        // One at a time, so that the same is the first to fail.
        &["process", &good, &out, "--max-layer-size", "512", "-j", "1"],
        &["process", &good, "oci-layout:///proc/nowhere"],
        &["search", &good, "(", "--regex"],
        &["check", &missing],
        &["info", &missing],
    ] {
        let [here, there] = [locally(arguments), through(&stage.coordinator, arguments)].map(Run::run);
        assert!(!here.status.success(), "{}", here.what);
        assert_eq!(here.status, there.status, "{}\n{}\n{}", here.what, here.stderr, there.stderr);
        assert_eq!(here.stderr, there.stderr, "{}", here.what);
    }
    assert!(!stage.at("out.tar").exists() && !stage.registry.has("copy", "1"));
}

#[test]
fn names_are_listed_resolved_and_deleted_as_without_a_coordinator() {
    let stage = Stage::new();
    let host = stage.registry.host();
    for tag in ["1.10", "1.9", "latest"] {
        stage.registry.push(&small(), "team/app", tag);
    }
    stage.registry.push(&Image::new(Family::Oci, layers()), "other", "1");
    let (app, other) = (format!("{host}/team/app"), format!("registry://{host}/other:1"));
    let (tagged, missing) = (format!("{app}:latest"), format!("{app}:none"));
    let layout = format!("oci-layout://{}?tag=1", text(&stage.at("layout")));
    locally(["process", &other, &layout]).ok();
    let layout_place = format!("oci-layout://{}", text(&stage.at("layout")));
    let json = ["--output-format", "json"];
    for command in [
        &["ls", host][..],
        &["ls", &format!("registry://{host}/"), json[0], json[1]],
        &["ls", &app],
        &["tags", &app, "--sort", "version"],
        &["tags", &app, "--sort", "name", json[0], json[1]],
        &["ls", &layout_place],
        &["digest", &tagged],
        &["digest", &other, json[0], json[1]],
        &["digest", &other, "--platform", "linux/amd64", json[0], json[1]],
        &["digest", &layout],
        // What fails says the same.
        &["digest", &missing],
        &["digest", &other, "--platform", "linux/s390x"],
        &["tags", host],
        &["tags", &format!("{host}/none")],
        &["ls", &tagged],
        &["delete", &missing],
        // Other tags would go with it.
        &["delete", &tagged],
    ] {
        let (here, there) = (locally(command).run(), through(&stage.coordinator, command).run());
        assert_eq!(
            (here.text(), &here.stderr, here.status.code()),
            (there.text(), &there.stderr, there.status.code()),
            "{command:?}"
        );
    }
    // A deletion can be compared once for each of two images that are alike.
    for copy in ["here", "there"] {
        for tag in ["1", "2"] {
            stage.registry.push(&small(), copy, tag);
        }
    }
    let delete = |name: &str, run: &dyn Fn(&[&str]) -> Run| {
        let image = format!("{host}/{name}:1");
        let ended = run(&["delete", &image, "--yes", json[0], json[1]]).ok();
        assert!(!stage.registry.has(name, "1"));
        ended.text().replace(name, "NAME")
    };
    let (here, there) =
        (delete("here", &|run| locally(run)), delete("there", &|run| through(&stage.coordinator, run)));
    assert_eq!(here, there);
}

#[test]
fn whole_indexes_are_copied_as_without_a_coordinator() {
    let stage = Stage::new();
    let (from, to) = (Registry::start(), &stage.registry);
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let arm = Image::on(Family::Oci, ("linux", "arm64", None), vec![Layer::noise(4, 50_000)]);
    let index = Index::new(
        Family::Oci,
        vec![(platform("amd64"), Image::new(Family::Oci, layers())), (platform("arm64"), arm)],
    );
    let source = from.push_index(&index, "app", "1");
    for (name, options) in
        [("whole", &[][..]), ("one", &["--platform", "linux/arm64"]), ("sparse", &["--sparse"])]
    {
        let copy = |destination: &str, run: &dyn Fn(&[&str]) -> Run| {
            let to = to.uri(&format!("{name}/{destination}:1"));
            let ended = run(&[&["copy", &source, &to, "--output-format", "json"], options].concat()).ok();
            let mut said = ended.json();
            said.as_object_mut().expect("a document").remove("seconds");
            serde_json::to_string(&said).expect("JSON").replace(&format!("{name}/{destination}"), "NAME")
        };
        let here = copy("here", &|run| locally(run));
        let there = copy("there", &|run| through(&stage.coordinator, run));
        // The blobs are at the same registry by then, but nobody told either of them.
        assert_eq!(here, there);
        assert_eq!(to.digest(&format!("{name}/here"), "1"), to.digest(&format!("{name}/there"), "1"));
    }
    let missing = ["copy", &from.uri("none:1"), &to.uri("none:1")];
    let (here, there) = (locally(missing).run(), through(&stage.coordinator, &missing).run());
    assert_eq!((&here.stderr, here.status.code()), (&there.stderr, there.status.code()));
}

#[test]
fn what_only_this_process_could_do_is_refused_by_name() {
    let stage = Stage::new();
    let source = stage.registry.push(&small(), "app", "1");
    let ca = text(&Certificates::shared().path("ca.crt"));
    for (flag, value) in [
        ("--insecure", "localhost"),
        ("--ca-cert", &ca),
        ("--allow-network", "10.0.0.0/8"),
        ("--retries", "9"),
    ] {
        let arguments = ["search", &source, "*", flag, value];
        through(&stage.coordinator, &arguments).fails(2).says(&[flag, "coordinator"]);
        // Where no registry is named they mean as little as ever.
        write(stage.at("in.tar"), tar(&saved::docker_v12(&[(&small(), &["app:1"])])));
        through(&stage.coordinator, &["search", &tar_uri(&stage.at("in.tar")), "*", flag, value]).ok();
        for command in ["ls", "tags", "digest", "delete"] {
            let arguments = [command, &source.replace(":1", ""), flag, value];
            through(&stage.coordinator, &arguments).fails(2).says(&[flag, "coordinator"]);
        }
    }
    for command in [&["workers"][..], &["job", "list"], &["job", "watch", "x"]] {
        locally(command).fails(2).says(&["--coordinator", "OCCYSTRAP_COORDINATOR"]);
    }
}

#[test]
fn a_coordinator_logs_in_as_this_process_would() {
    let registry = Registry::with_htpasswd("alice", "hunter2");
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let keys = directory.path().join("keys");
    write(&keys, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n");
    let keeps = Coordinator::start(&["--secret-key-file", &text(&keys)]);
    let login = json!({"auths": {(registry.host()): {"auth": "YWxpY2U6aHVudGVyMg=="}}});
    let config = directory.path().join("config.json");
    write(&config, login.to_string());
    let docker = ["--docker-config".to_owned(), text(&config)];
    let given = ["--username".to_owned(), "alice".to_owned()];
    let copy = registry.uri("copy:1");
    for command in [
        vec!["info", &source],
        vec!["check", &source],
        vec!["search", &source, "*"],
        vec!["process", &source, &copy],
        vec!["process", &source, "tar://-"],
    ] {
        through(&keeps, &command).fails(1).says(&["401"]);
        let with = |options: &[String; 2]| {
            let options = options.iter().map(String::as_str);
            through(&keeps, &command.iter().copied().chain(options).collect::<Vec<_>>())
        };
        with(&docker).ok();
        with(&given).env("OCCYSTRAP_PASSWORD", "hunter2").ok();
        with(&given).env("OCCYSTRAP_PASSWORD", "swordfish").fails(1).says(&["401"]).keeps("swordfish");
    }
    let job = ["job", "submit", &source, &registry.uri("job:1"), "--watch", "--username", "alice"];
    through(&keeps, &job).env("OCCYSTRAP_PASSWORD", "hunter2").ok();
    assert!(registry.has("job", "1"));
    let forgets = Coordinator::start(&[]);
    through(&forgets, &job).env("OCCYSTRAP_PASSWORD", "hunter2").fails(1).keeps("hunter2");
    let two = ["--source-username", "alice", "--destination-username", "bob", "--destination-password", "x"];
    let two = [&["process", &source, &copy][..], &two].concat();
    through(&keeps, &two).env("OCCYSTRAP_SOURCE_PASSWORD", "hunter2").fails(2).says(&["one user only"]);
    assert!(!keeps.log().contains("hunter2") && !keeps.log().contains("swordfish"));
}

#[test]
fn a_coordinator_that_is_not_there_or_is_no_url_is_named() {
    let run = |url: &str| locally(["workers", "--coordinator", url]);
    run("http://127.0.0.1:1").fails(1).says(&["failed to reach the coordinator at http://127.0.0.1:1"]);
    run("localhost:7700").fails(2).says(&["http://HOST:PORT"]);
}

#[test]
fn a_connection_is_as_safe_as_it_was_asked_to_be() {
    let path = |name| text(&Certificates::shared().path(name));
    let (certificate, key, authority) = (path("server.crt"), path("server.key"), path("ca.crt"));
    let mutual =
        Coordinator::start(&["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &authority]);
    let url = mutual.url().replace("http://", "https://");
    let run = |more: &[&str]| locally([&["workers", "--coordinator", &url], more].concat());
    let (client, client_key) = (path("client.crt"), path("client.key"));
    let own = ["--tls-cert", &client, "--tls-key", &client_key];
    let token = scratch();
    let token = token.path().join("token");
    write(&token, "hunter2\n");
    let token = text(&token);
    run(&[&["--tls-ca", &authority, "--token-file", &token], &own[..]].concat()).ok().keeps("hunter2");
    run(&["--tls-ca", &authority]).fails(1);
    run(&own).fails(1);
    // Nothing is even connected to.
    let plain = ["workers", "--coordinator", "http://192.0.2.1:1", "--token-file", &token];
    locally(plain).fails(2).says(&["--token-file", "TLS"]).keeps("hunter2");
    locally(["workers", "--coordinator", "http://127.0.0.1:1", "--tls-ca", &authority])
        .fails(2)
        .says(&["--tls-ca", "https"]);
}

#[test]
fn jobs_are_submitted_watched_listed_and_cancelled() {
    let stage = Stage::new();
    let source = stage.registry.push(&small(), "app", "1");
    let (one, two) = (stage.registry.uri("one:1"), stage.registry.uri("two:1"));
    let job = |arguments: &[&str]| through(&stage.coordinator, &[&["job"], arguments].concat());
    let filters =
        ["-f", "normalize-timestamps", "-f", "search:pattern=*.conf", "-f", "inspect:file=out.jsonl"];
    let submit = [&["submit", &source, &one][..], &filters].concat();
    let watched = job(&[&submit[..], &["--watch"]].concat()).directory(stage.directory.path()).ok();
    let local = locally([&["process", &source, &two][..], &filters].concat());
    let local = local.directory(stage.place("local").as_path()).ok();
    assert_eq!(watched.text(), local.text());
    assert_eq!(read(stage.at("out.jsonl")), read(stage.at("local/out.jsonl")));
    assert_eq!(stage.registry.digest("one", "1"), stage.registry.digest("two", "1"));
    watched.says(&["Submitted job ", "Pushed registry://", "Processed "]);

    let again = [&submit[..], &["--idempotency-key", "k"]].concat();
    let id = job(&again).ok().text().trim().to_owned();
    assert_eq!(job(&again).ok().text().trim(), id, "the same submission");
    let watch = job(&["watch", &id]).directory(stage.place("elsewhere").as_path()).ok();
    assert!(watch.text().contains("etc/app.conf") && watch.text().contains("DiffId"), "{}", watch.text());
    assert!(files(&stage.at("elsewhere")).len() == 1, "who only watches writes no file");
    let events = job(&["watch", &id, "--output-format", "json"]).ok().text();
    let events: Vec<Value> = events.lines().map(|line| occy_tests::image::json_of(line.as_bytes())).collect();
    assert_eq!(events.last().expect("events")["state"], "succeeded");
    let last = events.last().expect("events")["sequence"].to_string();
    job(&["watch", &id, "--after", &last]).ok();
    let shown = job(&["get", &id, "--output-format", "json"]).ok().json();
    assert_eq!((&shown["state"], &shown["source"]), (&json!("succeeded"), &json!(source)));
    assert!(job(&["get", &id]).ok().text().contains("State:       succeeded"));
    let list = job(&["list", "--output-format", "json"]).ok().json();
    assert_eq!(list.as_array().map(Vec::len), Some(2));
    assert_eq!(job(&["list", "--limit", "1"]).ok().text().lines().count(), 1);
    assert_eq!(job(&["list", "--state", "failed"]).ok().text(), "");

    let missing = stage.registry.uri("missing:1");
    job(&["submit", &missing, &two, "--watch"]).fails(1).says(&["missing"]);
    job(&["submit", "tar:///etc/passwd", &two]).fails(1).says(&["not allowed", "hint: "]);
    job(&["submit", &source, &two, "-f", "strip"]).fails(2).says(&["strip"]);
    job(&["get", "nobody"]).fails(1).says(&["there is no job"]);
    job(&["cancel", &id]).fails(1).says(&["succeeded"]);

    let workers = through(&stage.coordinator, &["workers", "--output-format", "json"]).ok().json();
    assert_eq!(workers.as_array().map(Vec::len), Some(2));
    assert!(through(&stage.coordinator, &["workers"]).ok().text().contains("embedded-1"));
}

/// A source whose layer takes its time.
fn slow_source(registry: &Registry) -> (FaultProxy, String) {
    let image = Image::docker(vec![Layer::noise(1, 400_000)]);
    registry.push(&image, "slow", "1");
    let proxy = FaultProxy::before(registry.host());
    let layer = format!("*/blobs/{}", image.layer_digests()[0]);
    proxy.fault(9, "GET", &layer, slow(20, Duration::from_millis(200)));
    let source = format!("registry://{}/slow:1", proxy.host());
    (proxy, source)
}

fn free_slots(coordinator: &Coordinator) -> u64 {
    let workers = through(coordinator, &["workers", "--output-format", "json"]).ok().json();
    workers.as_array().into_iter().flatten().filter_map(|worker| worker["free_slots"].as_u64()).sum()
}

#[track_caller]
fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_interrupt_cancels_the_call_and_leaves_a_job_alone() {
    let registry = Registry::start();
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let (_proxy, source) = slow_source(&registry);
    let directory = scratch();
    let out = tar_uri(&directory.path().join("out.tar"));
    for destination in [&out, &registry.uri("copy:1")] {
        let mut child = through(&coordinator, &["process", &source, destination]).start();
        wait_for("the call begins", || free_slots(&coordinator) == 0);
        tool("kill", ["-INT", &child.id().to_string()]);
        assert_eq!(child.wait().expect("it ends").code(), Some(130));
        wait_for("its slot is given back", || free_slots(&coordinator) == 1);
    }
    assert!(!directory.path().join("out.tar").exists() && !registry.has("copy", "1"));
    let job = registry.uri("job:1");
    let id = through(&coordinator, &["job", "submit", &source, &job]).ok().text();
    let child = through(&coordinator, &["job", "watch", id.trim()]).start_saying();
    wait_for("the job begins", || free_slots(&coordinator) == 0);
    tool("kill", ["-INT", &child.id().to_string()]);
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(130));
    let said = String::from_utf8_lossy(&ended.stderr);
    let hint = format!("job {0} goes on; `occyctl job watch {0}` follows it", id.trim());
    assert!(said.contains(&hint) && said.ends_with("interrupted\n"), "{said}");
    through(&coordinator, &["job", "watch", id.trim()]).ok();
    assert!(registry.has("job", "1"));
    let other = registry.uri("other:1");
    // With a filter: what the job before has brought there would do for the layer as it is.
    let again = ["job", "submit", &source, &other, "-f", "normalize-timestamps"];
    let id = through(&coordinator, &again).ok().text();
    through(&coordinator, &["job", "cancel", id.trim()]).ok();
    through(&coordinator, &["job", "watch", id.trim()]).fails(1).says(&["cancelled"]);
    assert!(!registry.has("other", "1"));
}

#[test]
fn a_watch_goes_on_with_the_next_coordinator_and_a_call_says_what_to_do() {
    let registry = Registry::start();
    let mut coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let (_proxy, source) = slow_source(&registry);
    let id = through(&coordinator, &["job", "submit", &source, &registry.uri("job:1")]).ok().text();
    let watch = through(&coordinator, &["job", "watch", id.trim(), "--output-format", "json"]);
    let directory = scratch();
    let call = through(&coordinator, &["process", &source, &tar_uri(&directory.path().join("out.tar"))]);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch.ok());
        let call = scope.spawn(|| call.fails(1));
        wait_for("the job begins", || free_slots(&coordinator) == 0);
        sleep(Duration::from_millis(300));
        coordinator.kill();
        call.join().expect("a run").says(&["lost the coordinator", "hint: "]);
        coordinator.restart_there();
        let events = watch.join().expect("a run").text();
        let events: Vec<Value> =
            events.lines().map(|line| occy_tests::image::json_of(line.as_bytes())).collect();
        let sequences: Vec<u64> = events
            .iter()
            .filter_map(|event| event["sequence"].as_u64())
            .filter(|&sequence| sequence > 0)
            .collect();
        assert!(sequences.iter().copied().eq(1..=sequences.len() as u64), "each event once: {sequences:?}");
        assert_eq!(events.last().expect("events")["state"], "succeeded");
    });
    assert!(registry.has("job", "1") && !directory.path().join("out.tar").exists());
}

#[test]
fn progress_names_the_workers() {
    let registry = Registry::start();
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let (_proxy, source) = slow_source(&registry);
    let directory = scratch();
    let out = tar_uri(&directory.path().join("out.tar"));
    for arguments in
        [&["process", &source, &out][..], &["job", "submit", &source, &registry.uri("job:1"), "--watch"]]
    {
        let screen = on_terminal(100, 24, &[arguments, &["--coordinator", &coordinator.url()]].concat());
        assert_eq!(screen.code, Some(0), "{}", screen.written);
        assert!(screen.written.contains("] ") && screen.written.contains("embedded-1"), "{}", screen.written);
        assert!(screen.lines.iter().any(|line| line.starts_with("Processed ")), "{:#?}", screen.lines);
    }
}

#[test]
fn a_slow_reader_costs_nobody_memory() {
    const SIZE: usize = 320 * 1024 * 1024;
    let registry = Registry::start();
    let image =
        Image::docker(vec![Layer::of(&[Member::file("zeros", vec![0; SIZE])]).packed(Packing::Plain)]);
    let source = registry.push(&image, "app", "1");
    let coordinator = Coordinator::start(&["--embedded-workers", "1"]);
    let before = coordinator.peak_memory();
    let mut child = through(&coordinator, &["process", &source, "tar://-"]).start_writing(Stdio::piped());
    let mut stdout = child.stdout.take().expect("piped above");
    let mut buffer = vec![0; 1024 * 1024];
    let (mut came, mut peak) = (0, 0);
    loop {
        let count = stdout.read(&mut buffer).expect("a pipe can be read");
        if count == 0 {
            break;
        }
        came += count;
        peak = peak.max(occy_tests::coordinator::peak_memory(child.id()).unwrap_or(0));
        sleep(Duration::from_millis(1));
    }
    assert!(child.wait().expect("it ends").success());
    assert!(came > SIZE, "{came} bytes");
    let grown = coordinator.peak_memory() - before;
    assert!(grown < 40 * 1024 * 1024, "the coordinator: {grown} bytes for a layer of {SIZE}");
    assert!(peak < 64 * 1024 * 1024, "the client: {peak} bytes for a layer of {SIZE}");
}
