//! The real binary against real registries, with faults in between and independent tools to judge the outcome.

mod atomic;
mod auth;
mod beside_python;
mod carried;
mod check;
mod command_line;
mod conformance;
mod copy;
mod docker_output;
mod docker_source;
mod exclude;
mod fault_down;
mod fault_up;
mod filter_versions;
mod filtered_index;
mod forwarding;
mod from_dir;
mod from_tar;
mod harness;
mod hostile;
mod listing;
mod mirror;
mod mirror_filtered;
mod mirror_price;
mod mirror_provenance;
mod mirror_referrers;
mod normalize;
mod oci_layout;
mod platforms;
mod progress;
mod provenance;
mod push;
mod remote;
mod rewriting;
mod schedules;
mod schema1;
mod search;
mod service_access;
mod service_budgets;
mod service_calls;
mod service_credentials;
mod service_disk;
mod service_faults;
mod service_jobs;
mod service_lend;
mod service_mesh;
mod service_mirror;
mod service_replicas;
mod service_ruby;
mod service_rules;
mod service_schedule;
mod service_sharing;
mod service_telemetry;
mod service_whole;
mod signatures;
mod tls;
mod to_dir;
mod to_tar;
mod unpack;
mod whole;
mod worker_access;
mod worker_faults;
mod worker_fleets;
mod worker_jobs;
mod worker_python;
mod worker_uploads;

use std::path::Path;

use occy_tests::certificates::text;
use occy_tests::image::Image;
use occy_tests::layer::{Layer, Member};

/// Two layers that differ, the second of which hides a file of the first.
fn layers() -> Vec<Layer> {
    vec![
        Layer::of(&[
            Member::dir("etc"),
            Member::file("etc/app.conf", "one\n").owner(5, 6),
            Member::file("etc/draft.conf", "two"),
            Member::symlink("etc/link", "app.conf"),
        ]),
        Layer::of(&[
            Member::dir("etc"),
            Member::file("etc/.wh.draft.conf", ""),
            Member::file("etc/late", "three"),
        ]),
    ]
}

/// A small docker image.
fn small() -> Image {
    Image::docker(layers())
}

/// `tar://PATH`.
fn tar_uri(path: &Path) -> String {
    format!("tar://{}", text(path))
}

/// A temporary directory.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// What is in a directory.
fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}
