//! `search` and `inspect`, as filters and as a command.

use occy_tests::image::{Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::tools::{hex, read, tool, write};
use serde_json::Value;

use crate::{scratch, small, tar_uri};

#[test]
fn matches_are_grouped_by_layer_in_order() {
    let registry = Registry::start();
    let image = small();
    let source = registry.push(&image, "app", "1");
    let ids = image.diff_ids();
    let found = occyctl(["search", &source, "*.conf"]).ok();
    let expected = format!(
        "Layer: {}\n  etc/app.conf (file, 4 bytes)\n  etc/draft.conf (file, 3 bytes)\n\nLayer: {}\n  etc/.wh.draft.conf (file, 0 bytes)\n\n",
        hex(&ids[0]),
        hex(&ids[1])
    );
    let text = found.text();
    assert!(text.starts_with(&expected), "{text}");
    assert!(text.trim_end().ends_with("Found 3 matches in 2 layers."), "{text}");
    let link = occyctl(["search", &source, "link"]).ok();
    assert!(link.text().contains("  etc/link -> app.conf (symlink)\n"), "{}", link.text());
    assert!(link.text().contains("Found 1 match in 1 layer."), "{}", link.text());
    assert_eq!(occyctl(["search", &source, "*.exe"]).ok().text().trim_end(), "No matches found.");
}

#[test]
fn scripts_get_a_line_a_match() {
    let registry = Registry::start();
    let image = small();
    let source = registry.push(&image, "team/app", "v1");
    let ids = image.diff_ids();
    let found = occyctl(["search", &source, "**/*.conf", "--script-friendly"]).ok();
    let line =
        |layer: usize, path: &str| format!("{}/team/app:v1:{}:{path}\n", registry.host(), hex(&ids[layer]));
    let expected =
        [line(0, "etc/app.conf"), line(0, "etc/draft.conf"), line(1, "etc/.wh.draft.conf")].concat();
    assert_eq!(found.text(), expected);
    assert_eq!(occyctl(["search", &source, "*.exe", "--script-friendly"]).ok().text(), "");
}

#[test]
fn a_regular_expression_is_searched_for_in_the_path() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let lines = |pattern: &str| {
        occyctl(["search", &source, pattern, "--regex", "--script-friendly"]).ok().text().lines().count()
    };
    assert_eq!(lines(r"\.conf$"), 3);
    assert_eq!(lines(r"^etc/(app|late)"), 2);
    occyctl(["search", &source, "(", "--regex"]).fails(2);
}

#[test]
fn the_filter_says_what_the_command_says_and_passes_everything_on() {
    let registry = Registry::start();
    let mut layers = small().layers;
    layers.push(layers[0].clone());
    let image = Image::oci(layers);
    let source = registry.push(&image, "app", "1");
    let command = occyctl(["search", &source, "*.conf"]).ok();
    // A layer that stands twice reports twice; both reports stand under its one heading, as the Python tool has it.
    assert_eq!(command.text().matches("etc/app.conf").count(), 2, "{}", command.text());
    assert!(command.text().contains("Found 5 matches in 2 layers."), "{}", command.text());
    let filter =
        occyctl(["process", &source, &registry.uri("copy:1"), "-f", "search:pattern=*.conf", "-j", "8"]).ok();
    assert_eq!(filter.text(), command.text());
    assert_eq!(registry.digest("copy", "1"), image.digest());
    let again = occyctl(["process", &source, &registry.uri("copy:1"), "-f", "search:pattern=*.conf"]).ok();
    assert_eq!(again.text(), command.text(), "layers that are there already report too");
    let script =
        occyctl(["process", &source, "tar://-", "-f", "search:pattern=*.conf,script-friendly=true"]).ok();
    assert!(script.stderr.contains(":etc/app.conf"), "the tar has standard output: {}", script.stderr);
    let regex =
        occyctl(["process", &source, &registry.uri("copy:1"), "-f", r"search:pattern=^etc/a,regex=true"])
            .ok();
    assert!(regex.text().contains("Found 2 matches in 1 layer."), "{}", regex.text());
}

#[test]
fn results_in_json_are_one_document() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let found = occyctl(["search", &source, "*.conf", "--output-format", "json"]).ok().json();
    let text = found.to_string();
    assert!(text.contains("etc/app.conf") && text.contains("etc/.wh.draft.conf"), "{text}");
}

#[test]
fn the_python_tool_finds_the_same() {
    let Some(occystrap) = judge::python_occystrap("the_python_tool_finds_the_same") else { return };
    let hello = concat!("tar://", env!("CARGO_MANIFEST_DIR"), "/images/hello.tar");
    let directory = scratch();
    // Saved by us, a layer's path is its diff_id, which is what the Python tool shows.
    let tar = tar_uri(&directory.path().join("hello.tar"));
    occyctl(["process", hello, &tar]).ok();
    let program = occystrap.to_str().expect("UTF-8");
    for arguments in [
        &["*.conf"][..],
        &["usr/share/*"],
        &["--regex", "^etc/.*d"],
        &["--script-friendly", "*README*"],
        &["nothing"],
    ] {
        let python = tool(
            program,
            [&["search"][..], &arguments[..arguments.len() - 1], &[&tar, arguments[arguments.len() - 1]]]
                .concat(),
        );
        let ours = occyctl(
            [&["search", &tar, arguments[arguments.len() - 1]], &arguments[..arguments.len() - 1]].concat(),
        )
        .ok();
        assert_eq!(ours.text().trim_end(), python.trim_end(), "{arguments:?}");
    }
    let (theirs, ours) = (directory.path().join("python.jsonl"), directory.path().join("ours.jsonl"));
    let filter = |path: &std::path::Path| format!("inspect:file={}", path.display());
    let out = tar_uri(&directory.path().join("out.tar"));
    tool(program, ["process", &tar, &out, "-f", &filter(&theirs)]);
    occyctl(["process", &tar, &out, "-f", &filter(&ours)]).ok();
    let mut ours = json_of(&read(&ours));
    for layer in ours["layers"].as_array_mut().expect("a list") {
        let layer = layer.as_object_mut().expect("an object");
        layer.remove("DiffId");
        layer.remove("Digest");
    }
    assert_eq!(ours, json_of(&read(&theirs)));
}

fn inspected(path: &std::path::Path) -> Vec<Value> {
    String::from_utf8(read(path)).expect("JSON").lines().map(|line| json_of(line.as_bytes())).collect()
}

#[test]
fn inspect_appends_a_line_of_layers_newest_first() {
    let registry = Registry::start();
    let image = small();
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let path = directory.path().join("layers.jsonl");
    write(&path, "{\"there\": \"before\"}\n");
    let filter = format!("inspect:file={}", path.display());
    occyctl(["process", &source, &registry.uri("copy:1"), "-f", &filter]).ok();
    let lines = inspected(&path);
    assert_eq!(lines.len(), 2);
    let name = format!("{}/app:1", registry.host());
    assert_eq!(lines[1]["name"], name.as_str());
    let layers = lines[1]["layers"].as_array().expect("a list");
    for (layer, index) in layers.iter().zip([1, 0]) {
        assert_eq!(layer["Id"], image.diff_ids()[index], "{layer}");
        assert_eq!(layer["DiffId"], layer["Id"]);
        assert_eq!(layer["Digest"], image.layer_digests()[index]);
        assert_eq!(layer["Size"], image.layers[index].tar.len());
        assert_eq!(layer["CreatedBy"], format!("ADD layer {index}"));
        assert_eq!(layer["Created"], 1_700_000_000, "{layer}");
        assert_eq!(layer["Comment"], "");
    }
    assert_eq!(layers[0]["Tags"], Value::from(vec![name]));
    assert_eq!(layers[1]["Tags"], Value::Null);
}

#[test]
fn lines_of_processes_that_append_at_once_do_not_mix() {
    let registry = Registry::start();
    let source =
        registry.push(&Image::docker((0..6).map(|seed| Layer::noise(seed, 1000)).collect()), "app", "1");
    let directory = scratch();
    let path = directory.path().join("layers.jsonl");
    let filter = format!("inspect:file={}", path.display());
    std::thread::scope(|scope| {
        for copy in 0..6 {
            let target = registry.uri(&format!("copy-{copy}:1"));
            let (source, filter) = (&source, &filter);
            scope.spawn(move || occyctl(["process", source, &target, "-f", filter]).ok());
        }
    });
    let lines = inspected(&path);
    assert_eq!(lines.len(), 6);
    assert!(lines.iter().all(|line| *line == lines[0]));
}

#[test]
fn inspect_sees_the_layers_as_they_are_where_it_stands() {
    let registry = Registry::start();
    let image = Image::docker(vec![
        Layer::of(&[Member::file("a", "a"), Member::file("b", "b")]),
        Layer::of(&[Member::file("c", "c")]),
    ]);
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let paths = ["0", "1", "2"].map(|name| directory.path().join(name));
    let filters = paths.each_ref().map(|path| format!("inspect:file={}", path.display()));
    let target = registry.uri("copy:1");
    occyctl([
        "process",
        &source,
        &target,
        "-f",
        &filters[0],
        "-f",
        "exclude:pattern=a",
        "-f",
        &filters[1],
        "-f",
        "normalize-timestamps",
        "-f",
        &filters[2],
    ])
    .ok();
    let copied = registry.pull("copy", "1");
    let ids = |path: &std::path::Path| -> Vec<Value> {
        let line = inspected(path).remove(0);
        line["layers"].as_array().expect("a list").iter().rev().map(|layer| layer["Id"].clone()).collect()
    };
    assert_eq!(ids(&paths[0]), image.diff_ids());
    assert_ne!(ids(&paths[1])[0], image.diff_ids()[0], "an entry is gone");
    assert_eq!(ids(&paths[1])[1], image.diff_ids()[1], "not yet edited");
    let last: Vec<String> = copied.tars.iter().map(|tar| occy_tests::tools::sha256(tar)).collect();
    assert_eq!(ids(&paths[2]), last);
    let digests = |path: &std::path::Path| inspected(path)[0]["layers"][1]["Digest"].clone();
    assert_eq!(digests(&paths[0]), image.layer_digests()[0]);
    assert_eq!(digests(&paths[1]), Value::Null);
}

#[test]
fn filters_work_in_the_order_given() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let (before, after) = (registry.uri("copy:1"), registry.uri("copy:2"));
    let first =
        occyctl(["process", &source, &before, "-f", "search:pattern=late", "-f", "exclude:pattern=**/late"])
            .ok();
    assert!(first.text().contains("Found 1 match in 1 layer."), "{}", first.text());
    let second =
        occyctl(["process", &source, &after, "-f", "exclude:pattern=**/late", "-f", "search:pattern=late"])
            .ok();
    assert_eq!(second.text().trim_end(), "No matches found.");
    assert_eq!(registry.digest("copy", "1"), registry.digest("copy", "2"));
}

#[test]
fn a_failed_run_writes_no_inspect_line() {
    let registry = Registry::start();
    let image = small()
        .edit_config(|config| config["rootfs"]["diff_ids"][1] = config["rootfs"]["diff_ids"][0].clone());
    let source = registry.push(&image, "app", "1");
    let directory = scratch();
    let path = directory.path().join("layers.jsonl");
    let filter = format!("inspect:file={}", path.display());
    let out = directory.path().join("out.tar");
    occyctl(["process", &source, &tar_uri(&out), "-f", &filter]).fails(1).says(&["layer 2 of 2", "diff_id"]);
    assert!(!path.exists() || read(&path).is_empty());
    assert!(!out.exists());
    let copy = registry.uri("copy:1");
    occyctl(["process", &source, &copy, "-f", "normalize-timestamps"]).fails(1).says(&["layer 2 of 2"]);
    assert!(!registry.has("copy", "1"));
}

#[test]
fn an_inspect_file_that_cannot_be_written_stops_the_run_before_it_changes_anything() {
    let registry = Registry::start();
    let source = registry.push(&small(), "app", "1");
    let directory = scratch();
    let out = directory.path().join("out.tar");
    for target in [registry.uri("copy:1"), tar_uri(&out)] {
        let command = ["process", &source, &target, "-f", "inspect:file=/nonexistent/layers.jsonl"];
        occyctl(command).fails(1).says(&["/nonexistent/layers.jsonl"]);
    }
    assert!(!registry.has("copy", "1"));
    assert!(!out.exists());
}
