//! The Python tool (occystrap 0.4.17) beside ours, on the same images.
//!
//! [`matrix`] has every source, output and filter that both have: both do the same, but for what it names. [`differences`] has
//! the images with which the Python tool goes wrong, a test for each. `tests/DIFFERENCES.md` is the table of all of them, with
//! who is right by which specification.

mod differences;
mod matrix;

use std::process::Output;

use occy_tests::certificates::text;
use occy_tests::judge;
use occy_tests::tools::run;

/// The Python tool.
struct Python(String);

impl Python {
    fn find(test: &str) -> Option<Self> {
        judge::python_occystrap(test).map(|path| Self(text(&path)))
    }

    /// Runs it, whatever comes of it.
    fn run(&self, arguments: &[&str]) -> Output {
        run(&self.0, [&["--insecure"], arguments].concat(), b"")
    }

    /// `process`, with filters, which it says to have done; gives what it printed.
    #[track_caller]
    fn process(&self, source: &str, destination: &str, filters: &[&str]) -> String {
        let filters: Vec<&str> = filters.iter().flat_map(|filter| ["-f", filter]).collect();
        let output = self.run(&[&["process", source, destination], &filters[..]].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "occystrap process {source} {destination} {filters:?}: {said}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }
}
