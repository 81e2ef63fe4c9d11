//! A run that is killed or interrupted leaves no half of anything under its final name.

use std::os::unix::fs::PermissionsExt;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use occy_tests::certificates::text;
use occy_tests::image::Image;
use occy_tests::layer::Layer;
use occy_tests::occyctl::{kills, moment, occyctl, whole};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::{Packing, read, tool, write};

use crate::{scratch, tar_uri};

fn large() -> Image {
    Image::docker((0..3).map(|seed| Layer::noise(seed, 1_000_000)).collect())
}

/// A proxy through which a layer takes half a second.
fn slow(registry: &Registry) -> FaultProxy {
    let proxy = FaultProxy::before(registry.host());
    proxy.fault(usize::MAX, "GET", "/v2/app/blobs/*", proxy::slow(10, Duration::from_millis(50)));
    proxy.fault(
        usize::MAX,
        "PATCH",
        "*",
        proxy::change(|answer| {
            sleep(Duration::from_millis(100));
            answer
        }),
    );
    proxy
}

/// A large image behind such a proxy, and where that is.
fn slow_source() -> (Registry, FaultProxy, String) {
    let registry = Registry::start();
    registry.push(&large(), "app", "1");
    let proxy = slow(&registry);
    let source = format!("registry://{}/app:1", proxy.host());
    (registry, proxy, source)
}

fn end(mut child: Child, signal: &str) -> std::process::ExitStatus {
    let id = child.id().to_string();
    tool("kill", [signal, &id]);
    child.wait().expect("a child can be waited for")
}

#[test]
fn a_killed_run_leaves_the_tar_as_it_was_or_complete() {
    let (_registry, _proxy, source) = slow_source();
    let directory = scratch();
    let path = directory.path().join("out.tar");
    let run = || occyctl(["process", &source, &tar_uri(&path)]);
    let time = whole(|| run().ok());
    let complete = read(&path);
    for kill in 0..kills() {
        write(&path, "what was there");
        let child = run().start();
        sleep(moment(time, kill));
        end(child, "-KILL");
        let found = read(&path);
        assert!(found == b"what was there" || found == complete, "kill {kill}: {} bytes", found.len());
        let files = std::fs::read_dir(directory.path()).expect("a directory").count();
        assert_eq!(files, 1, "kill {kill}: nothing else is left");
    }
    run().ok();
    assert!(read(&path) == complete);
}

#[test]
fn an_interrupted_run_leaves_the_tar_as_it_was() {
    let (_registry, _proxy, source) = slow_source();
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let directory = scratch();
        let path = directory.path().join("out.tar");
        write(&path, "what was there");
        let child = occyctl(["process", &source, &tar_uri(&path), "-j", "1"]).start();
        sleep(Duration::from_millis(250));
        assert_eq!(end(child, signal).code(), Some(code));
        assert_eq!(read(&path), b"what was there", "{signal}");
        let files = std::fs::read_dir(directory.path()).expect("a directory").count();
        assert_eq!(files, 1, "{signal}: nothing else is left");
    }
}

#[test]
fn an_interrupted_run_takes_its_half_of_a_directory_with_it() {
    let (_registry, _proxy, source) = slow_source();
    for form in ["dir://{}/out", "dir://{}/out?expand=true", "oci://{}/out?rootless=true"] {
        for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
            let directory = scratch();
            let destination = form.replace("{}", &text(directory.path()));
            let child = occyctl(["process", &source, &destination]).start();
            sleep(Duration::from_millis(450));
            assert_eq!(end(child, signal).code(), Some(code), "{destination}");
            let left: Vec<_> = std::fs::read_dir(directory.path()).expect("a directory").collect();
            assert!(left.is_empty(), "{destination} {signal}: {left:?}");
        }
    }
}

#[test]
fn a_signal_that_is_to_be_ignored_is() {
    let registry = Registry::start();
    registry.push(&large(), "app", "1");
    let proxy = slow(&registry);
    let program = text(occy_tests::occyctl::path());
    let command = format!("trap '' HUP; exec {program} info registry://{}/app:1 >/dev/null", proxy.host());
    proxy.fault(usize::MAX, "GET", "/v2/app/manifests/*", proxy::slow(10, Duration::from_millis(50)));
    let child = std::process::Command::new("sh").args(["-c", &command]).spawn().expect("sh starts");
    sleep(Duration::from_millis(300));
    assert_eq!(end(child, "-HUP").code(), Some(0));
}

#[test]
fn a_killed_run_leaves_no_temporary_files() {
    let (_registry, _proxy, source) = slow_source();
    let directory = scratch();
    let temp = text(directory.path());
    for filters in [&[][..], &["-f", "normalize-timestamps"]] {
        for kill in 0..kills() / 2 {
            let child =
                occyctl([&["process", &source, "tar://-", "--temp-dir", &temp], filters].concat()).start();
            sleep(moment(Duration::from_secs(1), kill));
            end(child, "-KILL");
            assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0, "kill {kill}");
        }
    }
}

#[test]
fn a_killed_push_leaves_the_tag_at_the_old_image_or_at_the_new_one() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&large(), "app", "1");
    let old = Image::docker(vec![Layer::noise(9, 100)]);
    for (name, filters) in [("plain", &[][..]), ("filtered", &["-f", "normalize-timestamps:ts=7"])] {
        let run = |host: &str, name: &str| {
            let target = format!("registry://{host}/{name}:1");
            occyctl([&["process", &source, &target], filters].concat())
        };
        let complete_name = format!("{name}-complete");
        let time = whole(|| run(&slow(&to).host(), &complete_name).ok());
        let complete = to.digest(&complete_name, "1");
        for kill in 0..kills() / 2 {
            // Blobs that a repository has need not be uploaded again.
            let name = format!("{name}-{kill}");
            to.push(&old, &name, "1");
            let proxy = slow(&to);
            let child = run(&proxy.host(), &name).start();
            sleep(moment(time, kill));
            end(child, "-KILL");
            let found = to.digest(&name, "1");
            assert!(found == old.digest() || found == complete, "{name}: {found}");
            // All that it names is there.
            to.pull(&name, "1");
            // What was left over does not stand in the way of the next run.
            run(to.host(), &name).ok();
            assert_eq!(to.pull(&name, "1").digest, complete, "{name}");
        }
    }
}

#[test]
fn a_run_that_is_given_up_ends_its_uploads() {
    let (from, to) = (Registry::start(), Registry::start());
    let source = from.push(&large(), "app", "1");
    let proxy = FaultProxy::before(to.host());
    proxy.fault(usize::MAX, "PUT", "/v2/app/blobs/uploads/*", proxy::status(400));
    let target = format!("registry://{}/app:1", proxy.host());
    occyctl(["process", &source, &target, "-j", "1"]).fails(1);
    assert!(proxy.count("DELETE", "/v2/app/blobs/uploads/*") > 0, "{}", proxy.story());
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let registry = Registry::start();
    let source = registry.push(&large(), "app", "1");
    occyctl(["process", &source, "tar:///dev/full"]).fails(1).says(&["/dev/full"]);
}

#[test]
fn what_could_not_be_written_in_the_end_is_refused_before_a_layer_is_fetched() {
    let registry = Registry::start();
    registry.push(&Image::docker(vec![Layer::noise(1, 1000)]), "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let source = format!("registry://{}/app:1", proxy.host());
    let directory = scratch();
    let at = |name: &str| text(&directory.path().join(name));
    let shared =
        [format!("oci-layout://{}", at("layout")), format!("dir://{}?unique_names=true", at("images"))];
    for uri in &shared {
        occyctl(["process", &source, uri]).ok();
    }
    std::os::unix::fs::symlink("nothing", at("dangling")).expect("a link");
    std::fs::create_dir(at("sealed")).expect("a directory");
    for name in ["layout", "images", "sealed"] {
        std::fs::set_permissions(at(name), PermissionsExt::from_mode(0o555)).expect("a directory");
    }
    let mut refused = vec!["dir:///proc".to_owned(), "oci:///proc".to_owned()];
    for name in ["dangling", &"x".repeat(256), "sealed/new"] {
        let path = at(name);
        let tar = format!("oci-layout://{path}?tar=true");
        refused.extend([format!("dir://{path}"), format!("oci://{path}"), format!("tar://{path}"), tar]);
    }
    refused.extend(shared);
    // Root may write anywhere.
    let powerless = ["--bounding-set=-all", "--inh-caps=-all"];
    for uri in refused {
        let before = proxy.count("GET", "/v2/app/blobs/*");
        let program = text(occy_tests::occyctl::path());
        let run = [&powerless[..], &[&program, "process", &source, &uri, "--force", "-q"]].concat();
        let output = occy_tests::tools::run("setpriv", run, b"");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{uri}: {said}");
        assert_eq!(proxy.count("GET", "/v2/app/blobs/*") - before, 1, "{uri}: the config alone; {said}");
    }
}

#[test]
fn a_run_that_waits_for_the_other_end_of_a_pipe_can_be_interrupted() {
    let registry = Registry::start();
    let source = registry.push(&large(), "app", "1");
    let directory = scratch();
    let pipe = directory.path().join("pipe");
    tool("mkfifo", [pipe.as_os_str()]);
    for (from, to) in [(tar_uri(&pipe), registry.uri("copy:1")), (source, tar_uri(&pipe))] {
        for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
            let mut child = occyctl(["process", &from, &to]).start();
            sleep(Duration::from_millis(700));
            tool("kill", [signal, &child.id().to_string()]);
            let start = Instant::now();
            let status = loop {
                match child.try_wait().expect("a child can be asked") {
                    None if start.elapsed() < Duration::from_secs(10) => sleep(Duration::from_millis(10)),
                    status => break status,
                }
            };
            if status.is_none() {
                child.kill().expect("a child can be killed");
            }
            assert_eq!(status.and_then(|status| status.code()), Some(code), "{from} to {to}");
        }
    }
}

#[test]
fn an_interrupted_push_leaves_no_upload_behind() {
    const UPLOADS: &str = "/v2/copy/blobs/uploads/*";
    for signal in ["-INT", "-TERM"] {
        let (from, to) = (Registry::start(), Registry::start());
        let image = Image::oci(vec![Layer::noise(1, 20_000_000).packed(Packing::Plain)]);
        let source = from.push(&image, "app", "1");
        let proxy = FaultProxy::before(to.host());
        let late = proxy::change(|answer| {
            sleep(Duration::from_secs(3));
            answer
        });
        proxy.fault(usize::MAX, "PATCH", UPLOADS, late);
        let target = format!("registry://{}/copy:1", proxy.host());
        let child =
            occyctl(["process", &source, &target, "-f", "normalize-timestamps", "--compression", "zstd"])
                .start();
        let start = Instant::now();
        while proxy.count("POST", UPLOADS) == 0 && start.elapsed() < Duration::from_secs(20) {
            sleep(Duration::from_millis(10));
        }
        sleep(Duration::from_millis(200));
        assert!(!end(child, signal).success());
        let started = proxy.count("POST", UPLOADS);
        assert!(started > 0, "{signal}: {}", proxy.story());
        // A coordinator goes on to end them when its client is gone.
        let start = Instant::now();
        while proxy.count("DELETE", UPLOADS) != started {
            assert!(start.elapsed() < Duration::from_secs(5), "{signal}: {}", proxy.story());
            sleep(Duration::from_millis(10));
        }
    }
}
