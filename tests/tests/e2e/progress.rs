//! What is said while it runs, and what it takes.

use std::time::Duration;

use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::{self, occyctl};
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::tools::run;

use crate::{scratch, tar_uri};

#[test]
fn without_a_terminal_there_is_a_line_every_ten_seconds() {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 100_000)]);
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    // The config comes first.
    proxy.fault_after(1, 1, "GET", "/v2/app/blobs/*", proxy::slow(21, Duration::from_millis(510)));
    let source = format!("registry://{}/app:1", proxy.host());
    let directory = scratch();
    let out = tar_uri(&directory.path().join("out.tar"));
    let ended = occyctl(["process", &source, &out]).ok();
    let lines = ended.stderr.lines().filter(|line| line.contains("of 1 layer")).count();
    assert_eq!(lines, 1, "{}\n{}", ended.stderr, proxy.story());
    assert!(!ended.stderr.contains('\x1b'), "{}", ended.stderr);
}

#[test]
fn on_a_terminal_every_layer_has_a_bar() {
    let registry = Registry::start();
    let image = Image::docker(vec![Layer::noise(1, 300_000), Layer::noise(2, 300_000)]);
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    proxy.fault(usize::MAX, "GET", "/v2/app/blobs/*", proxy::slow(10, Duration::from_millis(60)));
    let directory = scratch();
    let out = tar_uri(&directory.path().join("out.tar"));
    let command = format!("{} process registry://{}/app:1 {out}", occyctl::path().display(), proxy.host());
    let terminal = run("script", ["--quiet", "--return", "--command", &command, "/dev/null"], b"");
    let shown = String::from_utf8_lossy(&terminal.stdout);
    assert!(terminal.status.success(), "{shown}");
    for digest in image.layer_digests() {
        assert!(shown.contains(&digest[7..19]), "no bar for {digest} in {shown}");
    }
    assert!(shown.contains("Processed "), "{shown}");
}

#[test]
fn memory_does_not_grow_with_the_layer() {
    let registry = Registry::start();
    let zeros = Layer::from_tar(tar(&[Member::file("zeros", vec![0; 300 << 20])]));
    let source = registry.push(&Image::docker(vec![zeros]), "app", "1");
    let directory = scratch();
    let out = tar_uri(&directory.path().join("out.tar"));
    let mut child = occyctl(["process", &source, &out, "-f", "normalize-timestamps"]).start();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().expect("a child can be asked").is_none() {
        let status = std::fs::read_to_string(&status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = peak.max(kilobytes.unwrap_or_default());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(child.wait().expect("it ended").success());
    // 64 MB and 16 MB for the one layer; unoptimised code needs no more.
    assert!(peak > 0 && peak < 80 * 1024, "{peak} kB");
}
