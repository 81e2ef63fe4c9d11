//! Mirrors that the fleet makes meanwhile: however many runs it takes, in the end everything is at the target as it would be if nothing
//! had failed, and nothing else was ever to be seen there.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use occy_tests::image::{Family, Image, Index};
use occy_tests::layer::Layer;
use occy_tests::occyctl::{Run, locally};
use occy_tests::registry::Registry;
use occy_tests::tools::{sha256, write};
use serde_json::json;

use super::{Fleet, Happened, print_faults};
use crate::schedules::number;
use crate::schedules::prober::{Prober, Tag};
use crate::schedules::stage::SetWhenDropped;
use crate::scratch;

/// Tags of a repository, the last of which is an index.
const TAGS: usize = 5;
/// So many runs have to find or make everything right, the later ones with nothing to do.
const RUNS: usize = 4;
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(600);

#[test]
fn a_fleet_mirrors_everything_whoever_fails_and_whoever_is_cut_off() {
    let Some(mut fleet) = Fleet::start("a_fleet_mirrors_everything_whoever_fails") else { return };
    let (seed, count) = (number("OCCY_TEST_SEED", 1), number("OCCY_TEST_FLEET_JOBS", 24));
    eprintln!("--- OCCY_TEST_SEED={seed} OCCY_TEST_FLEET_JOBS={count} runs it again");
    let repositories = usize::try_from(count).expect("a number of images").div_ceil(TAGS);
    let (from, to) = (&fleet.registries[0].1, &fleet.registries[1].1);
    let names = filled(from, repositories);
    // What a mirror that nothing disturbs has made of it.
    let right = Registry::start();
    let directory = scratch();
    let config = |target: &Registry, name: &str| -> PathBuf {
        let path = directory.path().join(name);
        let (from, to) = (from.host(), target.host());
        let text = format!(
            "mirrors:\n  - sources: ['{from}/of/*']\n    targets: ['{to}/{{repository}}:{{tag}}']\n\
             \x20 - sources: ['{from}/of/*']\n    targets: ['{to}/filtered/{{repository}}:{{tag}}']\n    filters: [normalize-timestamps]\n"
        );
        write(&path, text);
        path
    };
    mirror(&config(&right, "right.yaml")).env("OCCYSTRAP_INSECURE", from.host()).ok();
    let tags = tags(&right, to, &names);
    let (path, urls) = (config(to, "mirror.yaml"), fleet.urls());
    let (is_over, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut happened = Happened::new();
    let start = Instant::now();
    let (runs, readings) = std::thread::scope(|scope| {
        let _stopping = SetWhenDropped(&stop);
        let _over = SetWhenDropped(&is_over);
        let prober = Prober::new(tags, Vec::new());
        let probing = scope.spawn(|| prober.run(&stop));
        let mirroring = scope.spawn(|| {
            let _over = SetWhenDropped(&is_over);
            let (mut runs, mut whole) = (0, 0);
            while whole < RUNS {
                let run = mirror(&path).env("OCCYSTRAP_COORDINATOR", &urls[runs % urls.len()]);
                let run = run.within(LIMIT).run();
                runs += 1;
                match run.status.code() {
                    Some(0) => whole += 1,
                    // Some images failed, and it says which; or nobody knows what came of it.
                    Some(5 | 1) => {}
                    code => panic!("{code:?}: {}\n{}", run.text(), run.stderr),
                }
                assert!(start.elapsed() < LIMIT, "after {runs} runs: {}\n{}", run.text(), run.stderr);
            }
            runs
        });
        fleet.suffer(seed, &is_over, &mut happened);
        let runs = mirroring.join().expect("a mirror is made");
        stop.store(true, Ordering::Relaxed);
        (runs, probing.join().expect("what is under a tag is whole").readings)
    });
    let to = &fleet.registries[1].1;
    for (repository, tag) in &names {
        for repository in [repository.clone(), format!("filtered/{repository}")] {
            assert_eq!(
                to.manifest(&repository, tag).body,
                right.manifest(&repository, tag).body,
                "{repository}:{tag}"
            );
            if *tag != last() {
                to.pull(&repository, tag);
            }
        }
    }
    println!("| of a fleet that mirrors {} tags twice | times |\n|---|---|", names.len());
    print_faults(&happened);
    println!("| mirrors made, with {RUNS} that ended well | {runs} |");
    println!("| images read from tags meanwhile | {readings} |");
    println!("| seconds | {:.0} |", start.elapsed().as_secs_f64());
}

fn mirror(config: &std::path::Path) -> Run {
    locally([std::ffi::OsStr::new("mirror"), "-c".as_ref(), config.as_os_str()])
}

/// The tag of the index.
fn last() -> String {
    format!("t{}", TAGS - 1)
}

/// Repositories with tags that have layers in common; gives all of these.
fn filled(registry: &Registry, repositories: usize) -> Vec<(String, String)> {
    let shared: Vec<Layer> = (0..4).map(|seed| Layer::noise(9000 + seed, 80_000)).collect();
    let mut names = Vec::new();
    for repository in 0..repositories {
        let name = format!("of/r{repository}");
        for tag in 0..TAGS {
            let number = (repository * TAGS + tag) as u64;
            let own = Layer::noise(number, 30_000);
            let base = shared[(repository + tag) % shared.len()].clone();
            let image = Image::oci(vec![base, own]);
            if tag + 1 < TAGS {
                registry.push(&image, &name, &format!("t{tag}"));
            } else {
                let other = Image::oci(vec![shared[0].clone(), Layer::noise(number + 5000, 20_000)]);
                let entry =
                    |architecture, image| (json!({"os": "linux", "architecture": architecture}), image);
                let entries = vec![entry("amd64", image), entry("arm64", other)];
                registry.push_index(&Index::new(Family::Oci, entries), &name, &last());
            }
            names.push((name.clone(), format!("t{tag}")));
        }
    }
    names
}

/// What may be at the target.
fn tags(right: &Registry, to: &Registry, names: &[(String, String)]) -> Vec<Tag> {
    let images = names.iter().filter(|(_, tag)| *tag != last());
    let both = images.flat_map(|(repository, tag)| {
        [repository.clone(), format!("filtered/{repository}")].map(|repository| (repository, tag.clone()))
    });
    let tag = |(repository, tag): (String, String)| {
        let manifest = right.manifest(&repository, &tag);
        assert_eq!(manifest.status, 200, "{repository}:{tag}");
        let allowed = HashSet::from([sha256(&manifest.body)]);
        Tag { host: to.host().to_owned(), repository, tag, allowed, is_there: false }
    };
    both.map(tag).collect()
}
