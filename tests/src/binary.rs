//! The binaries under test: built once, beside the test that asks.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The path of a binary of the workspace, from the package of that name. A variable with its name in capitals names another.
pub(crate) fn build(name: &str) -> PathBuf {
    let variable = name.to_uppercase().replace('-', "_");
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let test = std::env::current_exe().expect("the test's own path");
    let profile = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // All of them, with the features that the whole workspace gives its dependencies: one by one, each would have half of them
    // built anew.
    cargo.args(["build", "--quiet", "--workspace", "--bins"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    // What cargo tells a test of its package would count as a change to build scripts that read it, and half of the
    // dependencies would be built anew.
    for (name, _) in std::env::vars_os() {
        let is_of_package = |prefix| name.to_string_lossy().starts_with(prefix);
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_PRIMARY_", "CARGO_BIN_"]
            .into_iter()
            .any(is_of_package)
        {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "{name} does not build");
    profile.join(name)
}
