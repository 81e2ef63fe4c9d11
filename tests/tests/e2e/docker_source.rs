//! Docker and Podman as sources: the real ones, and exports in forms that those installed here do not write.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use occy_tests::certificates::{Certificates, text};
use occy_tests::engine::{Answers, Engine, FalseEngine, Store, TlsFront};
use occy_tests::http::{Delivery, Response};
use occy_tests::image::Image;
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::{self, Run, kills, moment, occyctl};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::saved::{self, read_saved};
use occy_tests::tools::{hex, read, run, tool, write};

use crate::{layers, scratch, small, tar_uri};

/// One layer twice, one that is empty, one with a hard link whose target comes first.
fn varied() -> Image {
    let mut list = layers();
    list.push(list[0].clone());
    list.push(Layer::of(&[]));
    list.push(Layer::of(&[
        Member::file("a.conf", "linked"),
        Member::hardlink("b.txt", "a.conf"),
        Member::file("usr/share/data", vec![b'x'; 700_000]),
    ]));
    list.push(layers()[1].clone());
    Image::docker(list)
}

/// Runs with a false Engine.
fn with(engine: &FalseEngine, arguments: &[&str]) -> Run {
    occyctl(arguments).env("DOCKER_HOST", engine.host())
}

fn tars(image: &Image) -> Vec<Vec<u8>> {
    image.layers.iter().map(|layer| layer.tar.clone()).collect()
}

#[test]
fn an_engine_gives_the_image_that_it_has() {
    let registry = Registry::start();
    let image = varied();
    for mut engine in Engine::all("an_engine_gives_the_image_that_it_has") {
        let name = engine.load(&image, "source");
        let directory = scratch();
        let output = directory.path().join("out.tar");
        for parallel in ["1", "4"] {
            occyctl(["process", &engine.uri(&name), &tar_uri(&output), "-j", parallel]).ok();
            let saved = read_saved(&output);
            assert_eq!(saved.config, image.config, "-j {parallel}");
            assert_eq!(saved.tars, tars(&image), "-j {parallel}");
            assert_eq!(saved.names, [name.as_str()]);

            occyctl(["process", &engine.uri(&name), &registry.uri("app:1"), "-j", parallel]).ok();
            let pushed = registry.pull("app", "1");
            assert_eq!((pushed.config, pushed.tars), (image.config.clone(), tars(&image)));
            judge::skopeo_reads(&format!("docker://{}/app:1", registry.host()));
        }
        let checked = occyctl(["check", &engine.uri(&name)]).ok();
        assert!(checked.text().contains("6 layer(s), 6 verified"), "{}", checked.text());
        occyctl(["check", &engine.uri(&name), "--fast"]).ok();
        let id = engine.id(&name).expect("it was loaded");
        occyctl(["process", &engine.uri(&id), &tar_uri(&output)]).ok();
        assert_eq!(read_saved(&output).config, image.config, "by Id");
    }
}

#[test]
fn an_image_out_of_an_engine_is_the_one_that_is_saved() {
    let (one, two) = (Registry::start(), Registry::start());
    let image = varied();
    let filters: &[&[&str]] = &[
        &[],
        &["-f", "normalize-timestamps"],
        // Its target goes, so the link has to become a file: the layer is begun again.
        &["-f", "exclude:pattern=a.conf,etc/late"],
        &["-f", "search:pattern=*.conf", "-f", "inspect:file=records.jsonl"],
        &[
            "-f",
            "exclude:pattern=*.conf",
            "-f",
            "inspect:file=records.jsonl",
            "-f",
            "normalize-timestamps:ts=5",
        ],
    ];
    for mut engine in Engine::all("an_image_out_of_an_engine_is_the_one_that_is_saved") {
        let name = engine.load(&image, "filtered");
        let directory = scratch();
        let saved = directory.path().join("saved.tar");
        write(&saved, tar(&saved::docker_v12(&[(&image, &[&name])])));
        for filters in filters {
            let mut outcomes = Vec::new();
            for (source, registry, side) in
                [(engine.uri(&name), &one, "engine"), (tar_uri(&saved), &two, "saved")]
            {
                let side = directory.path().join(side);
                std::fs::create_dir_all(&side).expect("a directory");
                let output = side.join("out.tar");
                let run =
                    |to: &str| occyctl([&["process", &source, to], *filters].concat()).directory(&side).ok();
                let found = run(&tar_uri(&output)).stdout;
                run(&registry.uri("app:1"));
                let records = std::fs::read(side.join("records.jsonl")).unwrap_or_default();
                outcomes.push((read(&output), registry.digest("app", "1"), found, records));
            }
            let (engine, saved) = (&outcomes[0], &outcomes[1]);
            assert!(engine.0 == saved.0, "the tars: {filters:?}");
            assert_eq!((&engine.1, &engine.2), (&saved.1, &saved.2), "{filters:?}");
            assert_eq!(engine.3, saved.3, "what inspect wrote: {filters:?}");
        }
        let search = |source: &str| occyctl(["search", source, "*.conf", "--script-friendly"]).ok().text();
        assert_eq!(search(&engine.uri(&name)), search(&tar_uri(&saved)));
        let info = |source: &str| occyctl(["info", source]).ok().text();
        assert_eq!(info(&engine.uri(&name)), info(&tar_uri(&saved)));
    }
}

#[test]
fn layers_that_come_in_an_order_of_their_own_are_unpacked_in_theirs() {
    let image = varied();
    // The top layer comes first, and nobody may wait for the others before it has passed.
    let mut members = saved::docker_v25(&[(&image, &["app:1"])]);
    members.reverse();
    let engine = FalseEngine::start(Answers::of(&image, Store::Unpacked, &members));
    let directory = scratch();
    let saved = directory.path().join("saved.tar");
    write(&saved, tar(&saved::docker_v12(&[(&image, &["app:1"])])));
    for parallel in ["1", "4"] {
        let tree = |source: &str, side: &str| {
            let to = directory.path().join(format!("{side}-{parallel}"));
            let uri = format!("dir://{}?expand=true", text(&to));
            with(&engine, &["process", source, &uri, "-j", parallel]).ok();
            tool(
                "tar",
                ["--sort=name", "--mtime=@0", "-cf", "-", "-C", &text(&to), "--exclude=manifest*", "."],
            )
        };
        assert_eq!(tree("docker://app:1", "engine"), tree(&tar_uri(&saved), "saved"), "-j {parallel}");
    }
}

#[test]
fn layers_are_not_stored_on_their_way() {
    let registry = Registry::start();
    let image = varied();
    for mut engine in Engine::all("layers_are_not_stored_on_their_way") {
        let name = engine.load(&image, "live");
        let source = engine.uri(&name);
        occyctl(["process", &source, &registry.uri("app:1"), "--spool-limit", "0"]).ok();
        assert_eq!(registry.pull("app", "1").config, image.config);
    }
}

#[test]
fn an_upload_that_breaks_begins_again_with_an_export_of_its_own() {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 12_000_000), Layer::noise(2, 9_000)]);
    for mut engine in Engine::all("an_upload_that_breaks_begins_again_with_an_export_of_its_own") {
        let name = engine.load(&image, "again");
        let proxy = FaultProxy::before(registry.host());
        proxy.fault(1, "PATCH", "*", proxy::status(404));
        let target = format!("registry://{}/app:1", proxy.host());
        let ended = occyctl(["process", &engine.uri(&name), &target, "-v"]).here().ok();
        assert_eq!(proxy.pending(), 0, "{}", proxy.story());
        assert!(ended.stderr.contains("exporting the image again"), "{}", ended.stderr);
        assert_eq!(registry.pull("app", "1").tars, tars(&image));
    }
}

#[test]
fn every_form_of_export_gives_the_same_image() {
    let image = varied();
    let oci = Image::oci(varied().layers);
    let named: &saved::Named<'_> = &[(&image, &["app:1"])];
    let mut links = saved::docker_v12(named);
    let paths: Vec<String> =
        judge::names(&tar(&links)).into_iter().filter(|name| name.ends_with("layer.tar")).collect();
    let at = judge::names(&tar(&links)).iter().position(|name| *name == paths[2]).expect("the third layer");
    // A link may stand before what it leads to.
    links[at] = Member::symlink(&paths[2], &format!("../{}", paths[0]));
    links.swap(0, at);
    let mut backwards = saved::docker_v25(named);
    backwards.reverse();
    for (form, image, store, members) in [
        // The ids of this form are none that a real Engine would give: only the bytes tell which layer is which.
        ("docker before 25, unknown ids", &image, Store::Unpacked, saved::docker_v12(named)),
        ("docker before 25, links", &image, Store::Unpacked, links),
        ("docker since 25", &image, Store::Unpacked, saved::docker_v25(named)),
        ("docker since 25, backwards", &image, Store::Unpacked, backwards),
        ("containerd's store", &oci, Store::Containerd, saved::containerd(&[(&oci, &["app:1"])])),
        (
            "containerd's store, two platforms",
            &oci,
            Store::Containerd,
            saved::containerd(&[(&small(), &["app:1"]), (&oci, &["app:1"])]),
        ),
    ] {
        let engine = FalseEngine::start(Answers::of(image, store, &members));
        let directory = scratch();
        let output = directory.path().join("out.tar");
        with(&engine, &["process", "docker://app:1", &tar_uri(&output)]).ok();
        let saved = read_saved(&output);
        assert_eq!((&saved.config, &saved.tars), (&image.config, &tars(image)), "{form}");
        assert_eq!(saved.names, ["app:1"], "{form}");
        with(&engine, &["check", "docker://app:1"]).ok();
    }
}

#[test]
fn containerds_layers_and_manifest_are_pushed_as_the_engine_pulled_them() {
    let registry = Registry::start();
    let image = Image::oci(layers());
    let members = saved::containerd(&[(&image, &["app:1"])]);
    let engine = FalseEngine::start(Answers::of(&image, Store::Containerd, &members));
    with(&engine, &["process", "docker://app:1", &registry.uri("app:1")]).ok();
    let pushed = registry.pull("app", "1");
    assert_eq!(pushed.blobs, image.layers.iter().map(Layer::blob).collect::<Vec<_>>());
    with(&engine, &["process", "docker://app:1", &registry.uri("app:2"), "-f", "exclude:pattern=etc/late"])
        .ok();
    let filtered = registry.pull("app", "2");
    assert_eq!(filtered.blobs[0], pushed.blobs[0], "a layer without the file is left as it is");
    assert_ne!(filtered.blobs[1], pushed.blobs[1]);
}

#[test]
fn an_export_that_breaks_off_leaves_the_destination_as_it_was() {
    let image = Image::docker(vec![Layer::noise(1, 400_000), Layer::noise(2, 400_000)]);
    for (store, members) in [
        (Store::Unpacked, saved::docker_v25(&[(&image, &["app:1"])])),
        (Store::Unpacked, saved::docker_v12(&[(&image, &["app:1"])])),
        (Store::Containerd, saved::containerd(&[(&image, &["app:1"])])),
    ] {
        let whole = tar(&members);
        let answers = Answers::of(&image, store, &members);
        for at in [0, 700, whole.len() / 3, whole.len() / 2, whole.len() - 5000] {
            let words =
                b"{\"errorDetail\":{\"message\":\"the disk is gone\"},\"error\":\"the disk is gone\"}\r\n";
            let told = Response::ok("application/x-tar", [&whole[..at], words].concat());
            for (delivery, says) in [
                (Response { delivery: Delivery::Truncated(at), ..answers.export.clone() }, "export"),
                (Response { delivery: Delivery::Reset(Some(at)), ..answers.export.clone() }, "export"),
                (told, "the disk is gone"),
            ] {
                let engine = FalseEngine::start(answers.clone().exporting(|_| delivery));
                let directory = scratch();
                let output = directory.path().join("out.tar");
                write(&output, "what was there");
                with(&engine, &["process", "docker://app:1", &tar_uri(&output)]).fails(1).says(&[says]);
                assert_eq!(read(&output), b"what was there", "{store:?} at {at}");
                assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 1);
            }
        }
    }
}

#[test]
fn an_export_that_ends_early_is_an_error_though_it_ends_as_a_tar_does() {
    let image = small();
    let members = saved::docker_v25(&[(&image, &["app:1"])]);
    let names = judge::names(&tar(&members));
    let wanted = [image.diff_ids(), vec![image.config_digest()]].concat();
    let is_wanted = |name: &String| wanted.iter().any(|digest| name.ends_with(hex(digest)));
    for kept in 0..=members.len() {
        let engine = FalseEngine::start(Answers::of(&image, Store::Unpacked, &members[..kept]));
        let run = with(&engine, &["process", "docker://app:1", "tar://-"]);
        if names[..kept].iter().filter(|name| is_wanted(name)).count() == wanted.len() {
            run.ok();
        } else {
            run.fails(1).says(&["the export of app:1 lacks"]);
        }
    }
}

#[test]
fn an_export_that_lies_is_refused_and_says_where() {
    let image = small();
    let good = saved::docker_v25(&[(&image, &["app:1"])]);
    let names = judge::names(&tar(&good));
    let at = |digest: &str| {
        names.iter().position(|name| name.ends_with(hex(digest))).expect("a member of that name")
    };
    let (config, layer) = (image.config_digest(), image.diff_ids()[0].clone());
    let with_member = |at: usize, member: Member| {
        let mut members = good.clone();
        members[at] = member;
        members
    };
    let path = |digest: &str| format!("blobs/sha256/{}", hex(digest));
    for (what, members, says) in [
        (
            "a layer of other bytes",
            with_member(at(&layer), Member::file(&path(&layer), tar(&[Member::file("x", "y")]))),
            vec!["layer 1 of 2", "diff_id mismatch"],
        ),
        (
            "a layer that is no tar",
            with_member(at(&layer), Member::file(&path(&layer), vec![7; 700])),
            vec!["layer 1 of 2"],
        ),
        (
            "a layer that is missing",
            with_member(at(&layer), Member::file("x", "")),
            vec!["lacks layer 1", &layer],
        ),
        (
            "a config of other bytes",
            with_member(at(&config), Member::file(&path(&config), "{}")),
            vec!["damaged", &config],
        ),
        (
            "a config that is missing",
            with_member(at(&config), Member::file("x", "")),
            vec!["lacks its config", &config],
        ),
    ] {
        let engine = FalseEngine::start(Answers::of(&image, Store::Unpacked, &members));
        let directory = scratch();
        let output = directory.path().join("out.tar");
        with(&engine, &["process", "docker://app:1", &tar_uri(&output), "-f", "normalize-timestamps"])
            .fails(1)
            .says(&says);
        assert!(!output.exists(), "{what}");
        // `check` says the same, as a finding.
        let checked = with(&engine, &["check", "docker://app:1"]).fails(3);
        assert!(checked.text().contains("BROKEN"), "{what}: {}", checked.text());
    }
    let engine = FalseEngine::start(
        Answers::of(&image, Store::Unpacked, &good)
            .exporting(|_| Response::ok("application/x-tar", "#!/bin/sh\n".repeat(100))),
    );
    with(&engine, &["process", "docker://app:1", "tar://-"]).fails(1).says(&["app:1", "not a tar"]);
}

#[test]
fn what_an_export_says_of_itself_changes_nothing() {
    let image = small();
    let elsewhere = scratch();
    let evil = text(&elsewhere.path().join("evil"));
    let mut members = saved::docker_v25(&[(&image, &["app:1"])]);
    let list = r#"[{"Config":"../../etc/passwd","RepoTags":["other:1"],"Layers":["../../etc/shadow"]}]"#;
    members.retain(|member| {
        !judge::names(&tar(std::slice::from_ref(member))).contains(&"manifest.json".to_owned())
    });
    members.insert(0, Member::file("manifest.json", list));
    members.insert(0, Member::file("../../../../tmp/occy-evil", "evil"));
    members.insert(0, Member::file(&evil, "evil"));
    members.insert(0, Member::symlink(&format!("blobs/sha256/{}", hex(&image.diff_ids()[0])), &evil));
    let engine = FalseEngine::start(Answers::of(&image, Store::Unpacked, &members));
    let directory = scratch();
    let output = directory.path().join("out.tar");
    with(&engine, &["process", "docker://app:1", &tar_uri(&output)]).ok();
    let saved = read_saved(&output);
    assert_eq!((saved.config, saved.tars), (image.config.clone(), tars(&image)));
    assert_eq!(saved.names, ["app:1"]);
    assert_eq!(std::fs::read_dir(elsewhere.path()).expect("a directory").count(), 0);
}

/// Exports of which something has to be kept: its layers tell their places only by their bytes, or only in the end.
fn spooled() -> (Image, [Answers; 2]) {
    let image = Image::docker(vec![Layer::noise(1, 400_000), Layer::noise(2, 400_000)]);
    let unknown_ids = Answers::of(&image, Store::Unpacked, &saved::docker_v12(&[(&image, &["app:1"])]));
    let containerd = Answers::of(&image, Store::Containerd, &saved::containerd(&[(&image, &["app:1"])]));
    (image, [unknown_ids, containerd])
}

#[test]
fn what_is_kept_of_an_export_has_its_cap() {
    let registry = Registry::start();
    for answers in spooled().1 {
        let engine = FalseEngine::start(answers);
        with(&engine, &["process", "docker://app:1", &registry.uri("app:1"), "--spool-limit", "300K"])
            .fails(1)
            .says(&["--spool-limit"]);
        assert!(!registry.has("app", "1"));
    }
}

#[test]
fn a_killed_run_leaves_no_file_and_no_half_of_an_image() {
    let (image, answers) = spooled();
    for answers in answers {
        let registry = Registry::start();
        let slow = Delivery::Slow(20, Duration::from_millis(20));
        let engine = FalseEngine::start(answers.exporting(|export| Response { delivery: slow, ..export }));
        let directory = scratch();
        let (temp, target) = (text(directory.path()), registry.uri("app:1"));
        let arguments = ["process", "docker://app:1", &target, "--temp-dir", &temp];
        for kill in 0..kills() {
            let mut child = with(&engine, &arguments).start();
            std::thread::sleep(moment(Duration::from_millis(700), kill));
            tool("kill", ["-KILL", &child.id().to_string()]);
            child.wait().expect("a child can be waited for");
            assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0, "kill {kill}");
            if registry.has("app", "1") {
                assert_eq!(registry.pull("app", "1").config, image.config, "kill {kill}");
            }
        }
        with(&engine, &arguments).ok();
        assert_eq!(registry.pull("app", "1").tars, tars(&image));
    }
}

#[test]
fn what_is_not_there_is_named_with_a_hint() {
    for mut engine in Engine::all("what_is_not_there_is_named_with_a_hint") {
        let name = engine.name("missing");
        occyctl(["info", &engine.uri(&name)]).fails(1).says(&[&name, "hint:", "docker pull"]);
    }
    occyctl(["info", "docker://app:1?socket=/nonexistent/x.sock"]).fails(1).says(&[
        "/nonexistent/x.sock",
        "No such file",
        "hint:",
    ]);
    occyctl(["info", "docker://app:1"])
        .env("DOCKER_HOST", "tcp://127.0.0.1:1")
        .fails(1)
        .says(&["tcp://127.0.0.1:1", "hint:"]);
    occyctl(["info", "docker://app:1"])
        .env("DOCKER_HOST", "ssh://host")
        .fails(1)
        .says(&["ssh://host", "socket"]);
    occyctl(["info", "docker://app:1"])
        .env("DOCKER_HOST", "tcp://127.0.0.1:1")
        .env("DOCKER_TLS_VERIFY", "1")
        .env("DOCKER_CERT_PATH", "/nonexistent")
        .fails(1)
        .says(&["/nonexistent/ca.pem"]);
    occyctl(["info", "docker://App:1"]).fails(2).says(&["App:1"]);
}

#[test]
fn the_engine_is_where_docker_host_says() {
    for mut engine in Engine::all("the_engine_is_where_docker_host_says") {
        let name = engine.load(&small(), "host");
        let host = format!("unix://{}", text(engine.socket()));
        occyctl(["info", &format!("docker://{name}")]).env("DOCKER_HOST", host).ok();
    }
}

/// Runs `occyctl info` where `/run` is empty, as it is on a machine without an Engine of root's.
fn info_without_engines(image: &str, runtime: &Path) -> Output {
    let script = r#"mount -t tmpfs none /run && exec env -u DOCKER_HOST XDG_RUNTIME_DIR="$1" "$0" info "$2""#;
    let (binary, runtime) = (text(occyctl::path()), text(runtime));
    run("unshare", ["--mount", "sh", "-c", script, &binary, &runtime, &format!("docker://{image}")], b"")
}

#[test]
fn podman_is_found_where_there_is_no_docker() {
    let test = "podman_is_found_where_there_is_no_docker";
    if !run("unshare", ["--mount", "mount", "-t", "tmpfs", "none", "/run"], b"").status.success() {
        eprintln!("NOT RUN: {test}: this user may not mount");
        return;
    }
    let runtime = scratch();
    let nothing = info_without_engines("app:1", runtime.path());
    let said = String::from_utf8_lossy(&nothing.stderr).into_owned();
    for part in ["no container engine", "/var/run/docker.sock", "podman/podman.sock", "hint:", "DOCKER_HOST"]
    {
        assert!(!nothing.status.success() && said.contains(part), "{part}: {said}");
    }
    let Some(mut podman) = Engine::podman(test) else { return };
    let name = podman.load(&small(), "found");
    std::fs::create_dir(runtime.path().join("podman")).expect("a directory");
    std::os::unix::fs::symlink(podman.socket(), runtime.path().join("podman/podman.sock")).expect("a link");
    let found = info_without_engines(&name, runtime.path());
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    assert!(String::from_utf8_lossy(&found.stdout).contains(&small().config_digest()));
}

#[test]
fn an_engine_behind_tls_wants_and_shows_certificates() {
    let image = small();
    let engine =
        FalseEngine::start(Answers::of(&image, Store::Unpacked, &saved::docker_v25(&[(&image, &["app:1"])])));
    let front = TlsFront::before(engine.port());
    let (certificates, directory) = (Certificates::shared(), scratch());
    for (name, source) in [("ca.pem", "ca.crt"), ("cert.pem", "client.crt"), ("key.pem", "client.key")] {
        write(directory.path().join(name), read(certificates.path(source)));
    }
    let run = |host: &str| {
        occyctl(["process", "docker://app:1", &tar_uri(&directory.path().join("out.tar"))])
            .env("DOCKER_HOST", format!("tcp://{host}:{}", front.port()))
            .env("DOCKER_CERT_PATH", text(directory.path()))
    };
    run("localhost").env("DOCKER_TLS_VERIFY", "1").ok();
    assert_eq!(read_saved(&directory.path().join("out.tar")).config, image.config);
    run("localhost").fails(1);
    // A certificate of another authority.
    write(directory.path().join("ca.pem"), read(certificates.path("token.crt")));
    run("localhost").env("DOCKER_TLS_VERIFY", "1").fails(1).says(&["certificate", "localhost"]);
}

#[test]
fn a_run_that_is_interrupted_stops_the_export() {
    let image = Image::docker(vec![Layer::noise(1, 8_000_000)]);
    let slow = Delivery::Slow(40, Duration::from_millis(100));
    let answers = Answers::of(&image, Store::Unpacked, &saved::docker_v25(&[(&image, &["app:1"])]));
    let engine = FalseEngine::start(answers.exporting(|export| Response { delivery: slow, ..export }));
    let directory = scratch();
    let output = directory.path().join("out.tar");
    let mut child = with(&engine, &["process", "docker://app:1", &tar_uri(&output)]).start();
    std::thread::sleep(Duration::from_millis(600));
    let start = std::time::Instant::now();
    tool("kill", ["-INT", &child.id().to_string()]);
    let status = child.wait().expect("a child can be waited for");
    assert_eq!(status.code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(2), "the rest of the export was waited for");
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);
}
