//! The same image comes of it whoever does the work: this process, or fleets of 1, 2 and 5 workers.

use std::path::Path;

use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image};
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::locally;
use occy_tests::registry::Registry;
use occy_tests::saved;
use occy_tests::tools::{Packing, read, sha256, write};
use occy_tests::worker::Worker;

use crate::{layers, scratch, tar_uri};

/// Where a case's image is, and where it goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Registry,
    /// A file that only the client has.
    File,
}

/// What is done, from where to where, with which options.
const CASES: [(&str, End, End, &[&str]); 9] = [
    ("copy", End::Registry, End::Registry, &[]),
    ("timestamps", End::Registry, End::Registry, &["-f", "normalize-timestamps:ts=1000"]),
    ("exclude", End::Registry, End::Registry, &["-f", "exclude:pattern=*.conf"]),
    ("zstd", End::Registry, End::Registry, &["-f", "normalize-timestamps", "--compression", "zstd:5"]),
    (
        "observed",
        End::Registry,
        End::Registry,
        &["-f", "search:pattern=*.conf", "-f", "exclude:pattern=etc/late"],
    ),
    ("from-a-file", End::File, End::Registry, &[]),
    (
        "from-a-file-edited",
        End::File,
        End::Registry,
        &["-f", "exclude:pattern=*.conf", "-f", "normalize-timestamps"],
    ),
    ("to-a-file", End::Registry, End::File, &["-f", "normalize-timestamps"]),
    ("file-to-file", End::File, End::File, &["-f", "exclude:pattern=*.conf"]),
];

/// Eight layers: large and small, one that stands twice, and some that nothing or zstd has packed.
fn image() -> Image {
    let own = [
        Layer::noise(1, 200_000),
        Layer::noise(2, 80_000).packed(Packing::Zstd),
        Layer::noise(3, 20_000).packed(Packing::Plain),
        Layer::of(&[Member::dir("etc"), Member::file("etc/more.conf", "x".repeat(50_000))]),
    ];
    Image::new(Family::Oci, [&own[..], &layers(), &own[..1], &[Layer::noise(4, 9)]].concat())
}

#[test]
fn one_process_and_fleets_of_1_2_and_5_workers_make_the_same_of_every_case() {
    let (from, to) = (Registry::start(), Registry::start());
    let directory = scratch();
    let source = from.push(&image(), "app", "1");
    let saved = directory.path().join("saved.tar");
    write(&saved, tar(&saved::docker_v25(&[(&image(), &["app:1"])])));
    let run = |who: &str, coordinator: Option<&Coordinator>| {
        CASES.map(|(name, at, target, options)| {
            let source = if at == End::File { tar_uri(&saved) } else { source.clone() };
            let file = directory.path().join(format!("{who}-{name}.tar"));
            let destination =
                if target == End::File { tar_uri(&file) } else { to.uri(&format!("{who}:{name}")) };
            let run = locally([&["process", &source, &destination, "-j", "8"], options].concat());
            let run = match coordinator {
                Some(coordinator) => run.env("OCCYSTRAP_COORDINATOR", coordinator.url()),
                None => run,
            };
            run.directory(directory.path()).ok();
            (name, if target == End::File { of_file(&file) } else { to.pull(who, name).digest })
        })
    };
    let expected = run("here", None);
    for count in [1, 2, 5] {
        // Nobody in its own process could do it.
        let coordinator = Coordinator::start(&["--embedded-workers", "0"]);
        let start = |_| Worker::start(&coordinator, &["--slots", "1"]);
        let workers: Vec<_> = (0..count).map(start).collect();
        assert_eq!(run(&format!("fleet-{count}"), Some(&coordinator)), expected, "{count} workers");
        // Each that there is was given something to do.
        for worker in workers {
            assert!(worker.log().contains("task begins"), "{} of {count}: {}", worker.name(), worker.log());
        }
    }
}

fn of_file(path: &Path) -> String {
    sha256(&read(path))
}
