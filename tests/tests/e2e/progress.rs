//! What is said while it runs, and what it takes.

use std::time::Duration;

use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::terminal::on_terminal;
use occy_tests::tools::{sha256, write};

use crate::{scratch, small, tar_uri};

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
fn on_a_terminal_every_layer_has_a_bar_as_far_as_there_is_room() {
    let registry = Registry::start();
    let image = Image::docker((0..8).map(|seed| Layer::noise(seed, 100_000)).collect());
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    proxy.fault(usize::MAX, "GET", "/v2/app/blobs/*", proxy::slow(5, Duration::from_millis(60)));
    let directory = scratch();
    let out = tar_uri(&directory.path().join("out.tar"));
    let source = format!("registry://{}/app:1", proxy.host());
    let process = ["process", &source, &out, "-j", "3"];
    let wide = on_terminal(80, 24, &process);
    for digest in image.layer_digests() {
        assert!(wide.written.contains(&digest[7..19]), "no bar for {digest} in {}", wide.written);
    }
    let low = on_terminal(50, 6, &process);
    assert!(low.written.contains("... and 5 more: "), "{}", low.written);
    for screen in [wide, low] {
        assert_eq!(screen.code, Some(0), "{}", screen.written);
        assert!(!screen.wrapped, "{}", screen.written);
        assert!(
            matches!(&screen.lines[..], [summary, end] if summary.starts_with("Processed ") && end.is_empty()),
            "{:#?}",
            screen.lines
        );
    }
}

#[test]
fn on_a_terminal_results_stand_below_what_the_bars_have_left() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let missing = registry.uri("app:2");
    let copy = registry.uri("copy:1");
    let directory = scratch();
    let path = directory.path().join("wrong.tar");
    let wrong = small().edit_config(|config| config["rootfs"]["diff_ids"][1] = sha256(b"other").into());
    write(&path, tar(&saved::docker_v12(&[(&wrong, &["app:1"])])));
    let wrong = tar_uri(&path);
    // Slow enough for bars to be there, and at different moments.
    let proxy = FaultProxy::before(registry.host());
    let slow = format!("registry://{}/app:1", proxy.host());
    for wait in [30, 60, 90] {
        proxy.fault(usize::MAX, "GET", "/v2/app/blobs/*", proxy::slow(3, Duration::from_millis(wait)));
        for source in [&source, &slow] {
            for (arguments, code, shown) in [
                (&["search", source, "late"][..], 0, &["etc/late"][..]),
                (&["check", source], 0, &["OK: "]),
                (
                    &["process", source, &copy, "-f", "search:pattern=late"],
                    0,
                    &["etc/late", "Pushed ", "Processed "],
                ),
                (&["process", &wrong, &copy], 1, &["error: ", "hint: "]),
                (&["check", &missing], 1, &["error: "]),
            ] {
                let screen = on_terminal(200, 24, arguments);
                assert_eq!(screen.code, Some(code), "{arguments:?}\n{}", screen.written);
                let text = screen.lines.join("\n");
                assert!(
                    shown.iter().all(|part| text.contains(part)),
                    "{arguments:?}\n{text}\n{:?}",
                    screen.written
                );
                assert!(!text.contains("waiting") && !text.contains(" / "), "{arguments:?}\n{text}");
            }
        }
    }
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
