//! The command line itself: exit codes, streams, help, environment.

use occy_tests::certificates::text;
use occy_tests::image::Image;
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::tools::Packing;

use crate::{layers, names, scratch, small, tar_uri};

#[test]
fn mistakes_on_the_command_line_end_with_2_and_say_what_is_right() {
    for (arguments, says) in [
        (&["process"][..], "SOURCE"),
        (&["process", "busybox", "tar://x"], "registry://"),
        (&["process", "docker-archive://x", "tar://x"], "docker-archive"),
        (&["process", "tar://x", "rsync://y"], "rsync"),
        (&["process", "tar://x?arch=arm64", "tar://y"], "arch"),
        (&["process", "tar://x", "registry://localhost:5000/UPPER/x"], "UPPER"),
        (&["process", "registry://localhost:5000/x:bad/tag/", "tar://y"], "bad"),
        (&["process", "tar://x", "tar://y", "--compression", "lz4"], "lz4"),
        (&["process", "tar://x", "registry://localhost/x?compression=gzip:99"], "gzip:99"),
        (&["process", "tar://x", "tar://y", "-j", "0"], "--parallel"),
        (&["process", "tar://x", "tar://y", "--format", "schema1"], "schema1"),
        (&["search", "tar://x", "["], "["),
        (&["info", "registry://localhost:5000"], "registry://localhost:5000/IMAGE"),
        (&["info", "tar://x", "--spool-limit", "1.5G"], "1.5G"),
        (&["frobnicate"], "frobnicate"),
        (&["info", "tar://x", "--client-cert", "a.pem"], "--client-key"),
    ] {
        occyctl(arguments).fails(2).says(&[says]);
    }
}

#[test]
fn a_password_in_a_uri_is_refused_and_not_repeated() {
    let uri = "registry://alice:s3cr3tpw@localhost:1/app:1";
    for arguments in [&["info", uri][..], &["process", uri, "tar://-"], &["process", "tar://x", uri]] {
        occyctl(arguments).fails(2).keeps("s3cr3tpw").says(&["--username"]);
    }
    occyctl(["info", &uri["registry://".len()..]]).fails(2).keeps("s3cr3tpw");
}

#[test]
fn help_teaches_and_goes_to_standard_output() {
    let help = occyctl(["--help"]).ok();
    for part in
        ["process", "search", "info", "check", "registry://", "tar://", "normalize-timestamps", "Exit"]
    {
        assert!(help.text().contains(part), "{part}\n{}", help.text());
    }
    assert!(help.stderr.is_empty());
    for command in ["process", "search", "info", "check"] {
        let help = occyctl([command, "--help"]).ok().text();
        assert!(help.contains("occyctl ") && help.contains("OCCYSTRAP_"), "{help}");
    }
    assert!(occyctl(["--version"]).ok().text().starts_with("occyctl "));
}

#[test]
fn completions_and_a_manual_are_generated() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(occyctl(["completions", shell]).ok().text().contains("occyctl"));
    }
    let manual = occyctl(["man"]).ok().text();
    assert!(manual.contains(".TH OCCYCTL") && manual.contains("occyctl process"), "{manual}");
    assert!(manual.contains("OCCYSTRAP_PARALLEL"), "{manual}");
}

#[test]
fn results_go_to_standard_output_and_the_rest_to_standard_error() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let out = tar_uri(&directory.path().join("out.tar"));
    let ended =
        occyctl(["process", &source, &out]).ok().says(&["Processed ", " bytes in 2 layers in ", " seconds"]);
    assert_eq!(ended.text(), "");
    let quiet = occyctl(["process", &source, &out, "--quiet"]).ok();
    assert_eq!((quiet.text(), quiet.stderr.as_str()), (String::new(), ""));
    let quiet = occyctl(["process", &source, &out, "-q", "-f", "search:pattern=late"]).ok();
    assert!(quiet.text().contains("etc/late"));
    let json = occyctl(["process", &source, &registry.uri("copy:1"), "--output-format", "json"]).ok().json();
    assert_eq!(json["manifest_digest"], small().digest());
    let loud = occyctl(["process", &source, &out, "-vvv"]).ok();
    assert_eq!(loud.text(), "");
    assert!(loud.stderr.lines().count() > 5, "{}", loud.stderr);
}

#[test]
fn what_cannot_be_told_of_a_destination_that_was_written_has_a_code_of_its_own() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let path = directory.path().join("out.tar");
    let program = text(occy_tests::occyctl::path());
    for (arguments, whole) in [
        ("--output-format json >/dev/full", "standard output"),
        ("-f search:pattern=late >/dev/full", "standard output"),
        ("-f inspect:file=/dev/full", "/dev/full"),
        // The rest is told nevertheless.
        ("-f inspect:file=/dev/full -f search:pattern=late", "etc/late"),
    ] {
        let command = format!("{program} process {source} {} {arguments}", tar_uri(&path));
        let output = occy_tests::tools::run("sh", ["-c", &command], b"");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("the destination was written, but ") && said.contains(whole), "{said}");
        assert_eq!(occy_tests::saved::read_saved(&path).config, small().config);
        std::fs::remove_file(&path).expect("it was written");
    }
    // Nobody hears it, and nothing stops.
    let command = format!("{program} process {source} {} 2>/dev/full", tar_uri(&path));
    assert_eq!(occy_tests::tools::run("sh", ["-c", &command], b"").status.code(), Some(0));
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    use std::process::Stdio;
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let mut child = std::process::Command::new(occy_tests::occyctl::path())
        .args(["process", &source, "tar://-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !said.contains("panicked"), "{said}");
}

#[test]
fn options_come_from_the_environment_under_one_prefix() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let info = occyctl(["info", &source]).env("OCCYSTRAP_OUTPUT_FORMAT", "json").ok();
    assert_eq!(info.json()["manifest"]["digest"], small().digest());
    occyctl(["info", &source]).env("OCCYSTRAP_PARALLEL", "none").fails(2).says(&["none"]);
    occyctl(["info", &source]).env("OCCYSTRAP_PARALLEL", "2").ok();
    let zstd =
        occyctl(["process", &source, &registry.uri("copy:1")]).env("OCCYSTRAP_COMPRESSION", "zstd").ok();
    assert!(zstd.status.success());
    assert_eq!(registry.pull("copy", "1").blobs[0][..4], [0x28, 0xb5, 0x2f, 0xfd]);
}

#[test]
fn variables_are_read_as_users_write_them() {
    let hello = concat!("tar://", env!("CARGO_MANIFEST_DIR"), "/images/hello.tar");
    for (name, value) in [
        ("OCCYSTRAP_QUIET", "1"),
        ("OCCYSTRAP_QUIET", "yes"),
        ("OCCYSTRAP_QUIET", ""),
        ("OCCYSTRAP_PROGRESS", ""),
        ("OCCYSTRAP_PARALLEL", ""),
        // Nobody is logged in to.
        ("OCCYSTRAP_USERNAME", "ann"),
    ] {
        occyctl(["info", hello]).env(name, value).ok();
    }
    occyctl(["info", hello, "-v"]).env("OCCYSTRAP_QUIET", "0").ok();
    occyctl(["info", hello]).env("OCCYSTRAP_PARALLEL", "many").fails(2).says(&["OCCYSTRAP_PARALLEL"]);
    occyctl(["info", hello]).env("OCCYSTRAP_QUIET", "maybe").fails(2).says(&["OCCYSTRAP_QUIET"]);
    let given = occyctl(["info", hello, "-j", "many"]).env("OCCYSTRAP_PARALLEL", "3").fails(2);
    assert!(!given.stderr.contains("OCCYSTRAP"), "{}", given.stderr);
    occyctl(["info", "registry://localhost:1/x"])
        .env("OCCYSTRAP_USERNAME", "ann")
        .fails(2)
        .says(&["password"]);
}

#[test]
fn half_of_the_credentials_names_the_other_half() {
    let source = "registry://localhost:1/x";
    for (option, missing, variable) in [
        ("--username", "--password", "OCCYSTRAP_PASSWORD"),
        ("--password", "--username", "OCCYSTRAP_USERNAME"),
        ("--source-username", "--source-password", "OCCYSTRAP_SOURCE_PASSWORD"),
        ("--source-password", "--source-username", "OCCYSTRAP_SOURCE_USERNAME"),
    ] {
        occyctl(["info", source, option, "ann"]).fails(2).says(&[missing, variable]);
    }
}

#[test]
fn rejected_credentials_are_not_asked_for_again() {
    let registry = Registry::with_htpasswd("ann", "secret");
    let source = registry.push(&small(), "app", "1");
    let ended = occyctl(["info", &source, "--username", "ann", "--password", "wrong"])
        .fails(1)
        .says(&["401", "rejected the credentials"]);
    assert!(!ended.stderr.contains("--username"), "{}", ended.stderr);
}

#[test]
fn warnings_look_like_errors_and_hosts_like_hosts() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let ended = occyctl(["process", &source, "tar://-", "--compression", "zstd"]).ok();
    assert!(ended.stderr.starts_with("warning: --compression"), "{}", ended.stderr);
    let directory = scratch();
    let path = text(directory.path());
    for (destination, idle) in [
        ("tar://-".to_owned(), &["--format", "--force", "--verify"][..]),
        (registry.uri("copy:1"), &["--force", "--verify"]),
        (format!("dir://{path}/dir"), &["--format"]),
        (format!("oci-layout://{path}/layout"), &["--force"]),
    ] {
        let all = ["process", &source, &destination, "--format", "docker", "--force", "--verify"];
        let said = occyctl(all).ok().stderr;
        let warned: Vec<_> =
            said.lines().filter_map(|line| line.strip_prefix("warning: ")?.split(' ').next()).collect();
        assert_eq!(warned, idle, "{destination}");
    }
    for host in ["", "*", "a b", "http://a"] {
        occyctl(["info", &source, "--insecure", host]).fails(2).says(&["HOST:PORT"]);
    }
    let terminal = occy_tests::terminal::on_terminal(80, 24, &["process", &source, "tar://-"]);
    assert_eq!(terminal.code, Some(2));
    assert!(terminal.written.contains("redirect it"), "{}", terminal.written);
}

#[test]
fn what_is_sent_again_or_not_at_all_is_told() {
    use occy_tests::proxy::{FaultProxy, status};
    let registry = Registry::start();
    registry.push(&small(), "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let source = format!("registry://{}/app:1", proxy.host());
    proxy.fault(1, "GET", "/v2/app/manifests/*", status(503));
    assert_eq!(occyctl(["info", &source]).here().ok().stderr, "");
    proxy.fault(1, "GET", "/v2/app/manifests/*", status(503));
    occyctl(["info", &source, "-v"]).here().ok().says(&["503", "trying again in ", "(2 of 5)"]);
    proxy.fault(2, "GET", "/v2/app/manifests/*", status(503));
    occyctl(["info", &source]).here().ok().says(&["warning: ", "503", "(3 of 5)"]);
    let copy = registry.uri("copy:1");
    occyctl(["process", &source, &copy]).ok();
    occyctl(["process", &source, &copy, "-v"]).here().ok().says(&["is there already"]);
}

#[test]
fn zstd_and_dockers_format_do_not_go_together_whoever_finds_it() {
    const WORDS: &str = "error: docker schema2 cannot name zstd layers: choose gzip, or the oci format\n";
    let registry = Registry::start();
    let docker = registry.push(&small(), "docker", "1");
    let zstd = layers().into_iter().map(|layer| layer.packed(Packing::Zstd)).collect();
    let zstd = registry.push(&Image::oci(zstd), "zstd", "1");
    let directory = scratch();
    for destination in
        [registry.uri("copy:1"), format!("oci-layout://{}", text(&directory.path().join("out")))]
    {
        for (source, options) in [(&docker, &["--compression", "zstd"][..]), (&zstd, &[])] {
            let run = [&["process", source, &destination, "--format", "docker"], options].concat();
            assert_eq!(occyctl(run).fails(2).stderr, WORDS, "{destination} {options:?}");
        }
    }
    assert!(names(directory.path()).is_empty() && !registry.has("copy", "1"));
}

#[test]
fn what_inspect_finds_is_printed_where_its_file_is_a_dash() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let run = |destination: &str, file: &str| {
        let filter = format!("inspect:file={file}");
        occyctl(["process", &source, destination, "-f", &filter]).directory(directory.path()).ok()
    };
    run("tar://out.tar", "lines");
    let line = run("tar://out.tar", "-").text();
    assert_eq!(line.as_bytes(), occy_tests::tools::read(directory.path().join("lines")));
    let ended = run("tar://-", "-");
    assert!(ended.stderr.contains(&line), "{}", ended.stderr);
    assert_eq!(names(directory.path()), ["lines", "out.tar"]);
}

#[test]
fn errors_stand_on_a_line_with_a_hint_below() {
    let registry = Registry::start();
    let ended = occyctl(["info", &registry.uri("no/such:image")]).fails(1);
    let first = ended.stderr.lines().next().unwrap_or_default();
    assert!(
        first.starts_with("error: ") && first.contains("404") && first.contains("no/such"),
        "{}",
        ended.stderr
    );
}

#[test]
fn temporary_files_go_where_they_are_told_and_are_gone_after() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let temp = text(directory.path());
    occyctl(["process", &source, "tar://-", "--temp-dir", &temp]).ok();
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);
    occyctl(["process", &source, "tar://-", "--temp-dir", "/nonexistent"]).fails(1).says(&["/nonexistent"]);
    occyctl(["process", &source, "tar://-", "--spool-limit", "1K"]).fails(1).says(&["1024"]);
}
