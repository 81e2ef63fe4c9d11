//! `dir://` as a source: what we and the Python tool write to directories, read back.

use std::path::Path;

use occy_tests::certificates::text;
use occy_tests::image::{Image, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member, tar};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::saved::{self, read_saved};
use occy_tests::tools::{hex, read, tool, write};
use serde_json::{Value, json};

use crate::{layers, scratch, small, tar_uri};

fn dir_uri(path: &Path) -> String {
    format!("dir://{}", text(path))
}

fn shared_uri(path: &Path) -> String {
    format!("{}?unique_names=true", dir_uri(path))
}

/// A directory of one image as `dir://` lays it out, for tests to damage.
fn laid_out(path: &Path, image: &Image) {
    let paths: Vec<String> =
        image.layers.iter().map(|layer| format!("{}/layer.tar", hex(&layer_id(layer)))).collect();
    for (layer, name) in image.layers.iter().zip(&paths) {
        write(path.join(name), &layer.tar);
    }
    let config = format!("{}.json", hex(&image.config_digest()));
    write(path.join(&config), &image.config);
    let manifest = json!([{"Config": config, "Layers": paths, "RepoTags": ["app:1"]}]);
    write(path.join("manifest.json"), manifest.to_string());
    write(path.join("catalog.json"), json!({"app": {"1": "manifest.json"}}).to_string());
}

fn layer_id(layer: &Layer) -> String {
    occy_tests::tools::sha256(&layer.tar)
}

#[test]
fn a_tar_through_a_directory_and_back_is_the_same() {
    let mut list = layers();
    list.push(list[0].clone());
    let image = Image::docker(list);
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    for (form, names) in
        [("one", &["localhost:5000/a/app:1"][..]), ("two", &["app:1", "b/app:2"]), ("none", &[])]
    {
        // Saved by another first: what we write ourselves is what has to come back.
        write(at("in.tar"), tar(&saved::docker_v12(&[(&image, names)])));
        let (first, again) = (at("first.tar"), at("again.tar"));
        occyctl(["process", &tar_uri(&at("in.tar")), &tar_uri(&first)]).ok();
        for uri in [dir_uri(&at(&format!("plain-{form}"))), shared_uri(&at(&format!("shared-{form}")))] {
            occyctl(["process", &tar_uri(&first), &uri]).ok();
            let source = uri.trim_end_matches("?unique_names=true");
            occyctl(["process", source, &tar_uri(&again)]).ok();
            assert_eq!(read_saved(&again).names.len(), names.len());
            assert!(read(&again) == read(&first), "{uri} of {form}");
            occyctl(["check", source]).ok();
        }
    }
}

#[test]
fn a_directory_goes_to_a_registry_and_is_searched_and_shown() {
    let registry = Registry::start();
    let image = small();
    let source = registry.push(&image, "team/app", "1");
    let directory = scratch();
    let (path, uri) = (directory.path().join("out"), dir_uri(&directory.path().join("out")));
    occyctl(["process", &source, &uri]).ok();
    occyctl(["process", &uri, &registry.uri("copy:1"), "-f", "exclude:pattern=no-such-file"]).ok();
    let pushed = registry.pull("copy", "1");
    assert_eq!(pushed.config, image.config);
    assert!(pushed.blobs.iter().all(|blob| blob[..2] == [0x1f, 0x8b]), "a registry gets gzip");
    judge::skopeo_reads(&format!("docker://{}/copy:1", registry.host()));

    let expected = occyctl(["search", &source, "*.conf", "--script-friendly"]).ok().text();
    assert_eq!(occyctl(["search", &uri, "*.conf", "--script-friendly"]).ok().text(), expected);
    let info = occyctl(["info", &uri, "--output-format", "json"]).ok().json();
    assert_eq!(info["name"], format!("{}/team/app:1", registry.host()));
    assert_eq!(info["config"]["digest"], image.config_digest());
    assert_eq!(info["layers"][1]["diff_id"], image.diff_ids()[1]);
    assert_eq!(info["layers"][1]["size"], image.layers[1].tar.len());

    let ended = occyctl(["check", &uri]).ok();
    assert!(ended.text().contains("2 verified"), "{}", ended.text());
    let layer = path.join(format!("{}/layer.tar", hex(&image.diff_ids()[1])));
    let mut damaged = read(&layer);
    damaged[1536] ^= 1;
    write(&layer, &damaged);
    let ended = occyctl(["check", &uri]).fails(3);
    assert!(ended.text().contains("layer 2 of 2: diff_id mismatch"), "{}", ended.text());
    occyctl(["process", &uri, &registry.uri("copy:2")]).fails(1).says(&["layer 2 of 2", "diff_id mismatch"]);
    assert!(!registry.has("copy", "2"));
}

#[test]
fn of_images_that_share_a_directory_one_must_be_chosen() {
    let registry = Registry::start();
    let (one, two) = (small(), Image::docker(vec![layers()[1].clone()]));
    let directory = scratch();
    let (path, output) = (directory.path().join("images"), directory.path().join("out.tar"));
    for (image, name, tag) in [(&one, "one", "1"), (&two, "one", "2"), (&two, "a/two", "latest")] {
        occyctl(["process", &registry.push(image, name, tag), &shared_uri(&path)]).ok();
    }
    let (uri, host) = (dir_uri(&path), registry.host());
    let all = [format!("{host}/one:1"), format!("{host}/one:2"), format!("{host}/a/two:latest")];
    let listed: Vec<&str> = all.iter().map(String::as_str).chain(["?image="]).collect();
    occyctl(["process", &uri, &tar_uri(&output)]).fails(1).says(&listed);
    occyctl(["check", &uri]).fails(1);
    for (options, image) in [
        (format!("image={host}/one&tag=1"), &one),
        (format!("tag=2&image={host}/one"), &two),
        (format!("image={host}/one:1"), &one),
        (format!("image={host}/a/two"), &two),
    ] {
        occyctl(["process", &format!("{uri}?{options}"), &tar_uri(&output)]).ok();
        let saved = read_saved(&output);
        assert_eq!(saved.config, image.config, "{options}");
        assert_eq!(saved.names.len(), 1, "{options}");
        assert!(all.contains(&saved.names[0]), "{options}: {:?}", saved.names);
        occyctl(["check", &format!("{uri}?{options}")]).ok();
    }
    for options in [format!("image={host}/one"), format!("image={host}/one&tag=3"), "image=one&tag=1".into()]
    {
        occyctl(["process", &format!("{uri}?{options}"), &tar_uri(&output)]).fails(1).says(&listed);
    }
    occyctl(["process", &format!("{uri}?tag=1"), &tar_uri(&output)]).fails(2).says(&["tag=1", "image="]);
    occyctl(["process", &format!("{uri}?img=1"), &tar_uri(&output)]).fails(2).says(&["image, tag"]);
}

#[test]
fn an_image_that_was_named_by_its_digest_comes_back() {
    let registry = Registry::start();
    let image = small();
    registry.push(&image, "app", "1");
    let directory = scratch();
    let (path, output) = (directory.path().join("images"), directory.path().join("out.tar"));
    let source = format!("registry://{}/app@{}", registry.host(), image.digest());
    occyctl(["process", &source, &shared_uri(&path)]).ok();
    for options in [String::new(), format!("?image={}/app&tag={}", registry.host(), image.digest())] {
        occyctl(["process", &format!("{}{options}", dir_uri(&path)), &tar_uri(&output)]).ok();
        assert_eq!(read_saved(&output).config, image.config);
        assert!(read_saved(&output).names.is_empty(), "a digest is no tag");
    }
}

#[test]
fn what_the_python_tool_writes_is_read() {
    let Some(python) = judge::python_occystrap("what_the_python_tool_writes_is_read") else { return };
    let program = text(&python);
    let registry = Registry::start();
    let image = small().edit_config(|config| config["config"]["Labels"]["ü\u{7f}"] = "\u{1f600}\n".into());
    let source = registry.push(&image, "a/app", "1");
    let directory = scratch();
    let output = directory.path().join("out.tar");
    for options in ["", "?unique_names=true"] {
        let path = directory.path().join(format!("theirs{}", options.len()));
        tool(&program, ["--insecure", "process", &source, &format!("{}{options}", dir_uri(&path))]);
        let said = occyctl(["process", &dir_uri(&path), &tar_uri(&output)]).ok();
        said.says(&["config was written anew", "digest are lost"]);
        let saved = read_saved(&output);
        assert_eq!(json_of(&saved.config), json_of(&image.config));
        assert_ne!(saved.config, image.config, "its bytes are not in the directory");
        assert_eq!(saved.tars, image.layers.iter().map(|layer| layer.tar.clone()).collect::<Vec<_>>());
        assert_eq!(saved.names, ["a/app:1"]);
        occyctl(["check", &format!("{}?image=a/app&tag=1", dir_uri(&path))]).ok();
        // Its own form of a document is the only excuse for bytes that are not those of the name.
        let config = path.join(format!("{}.json", hex(&image.config_digest())));
        write(&config, read(&config).strip_suffix(b"}").expect("an object"));
        occyctl(["check", &dir_uri(&path)]).fails(3);
        write(&config, [read(&config), b"} ".to_vec()].concat());
        let ended = occyctl(["check", &dir_uri(&path)]).fails(3);
        assert!(ended.text().contains("is damaged"), "{}", ended.text());
    }
}

#[test]
fn an_image_that_another_one_replaced_is_not_mistaken_for_it() {
    let Some(python) = judge::python_occystrap("an_image_that_another_one_replaced") else { return };
    let program = text(&python);
    let registry = Registry::start();
    let directory = scratch();
    let (path, output) = (directory.path().join("theirs"), directory.path().join("out.tar"));
    for name in ["old", "new"] {
        let source = registry.push(&small(), name, "1");
        tool(&program, ["--insecure", "process", &source, &dir_uri(&path)]);
    }
    let uri = |name: &str| format!("{}?image={name}&tag=1", dir_uri(&path));
    occyctl(["process", &uri("new"), &tar_uri(&output)]).ok();
    occyctl(["process", &uri("old"), &tar_uri(&output)]).fails(1).says(&["catalog.json", "old:1", "new:1"]);
}

#[test]
fn a_saved_tar_that_was_unpacked_is_a_directory_like_any() {
    let (one, two) = (small(), Image::docker(vec![layers()[1].clone()]));
    let directory = scratch();
    let output = directory.path().join("out.tar");
    for (form, members) in [
        ("v12", saved::docker_v12(&[(&one, &["one:1"]), (&two, &["two:2"])])),
        ("v25", saved::docker_v25(&[(&one, &["one:1"]), (&two, &["two:2"])])),
        ("containerd", saved::containerd(&[(&one, &["one:1"]), (&two, &["two:2"])])),
    ] {
        let (file, path) = (directory.path().join("in.tar"), directory.path().join(form));
        write(&file, tar(&members));
        std::fs::create_dir(&path).expect("a new directory");
        tool("tar", ["-xf", &text(&file), "-C", &text(&path)]);
        occyctl(["process", &dir_uri(&path), &tar_uri(&output)]).fails(1).says(&["one:1", "two:2"]);
        occyctl(["process", &format!("{}?image=two&tag=2", dir_uri(&path)), &tar_uri(&output)]).ok();
        assert_eq!(read_saved(&output).config, two.config, "{form}");
        occyctl(["check", &format!("{}?image=one:1", dir_uri(&path))]).ok();
    }
}

#[test]
fn a_directory_that_lies_is_refused_and_says_where() {
    let image = small();
    let outer = scratch();
    let secret = outer.path().join("secret");
    write(&secret, tar(&[Member::file("secret", "s")]));
    let layer = format!("{}/layer.tar", hex(&image.diff_ids()[0]));
    let config = format!("{}.json", hex(&image.config_digest()));
    let manifest = |edit: &dyn Fn(&mut Value)| {
        let mut manifest = json!([{"Config": config, "RepoTags": ["app:1"],
            "Layers": image.diff_ids().iter().map(|id| format!("{}/layer.tar", hex(id))).collect::<Vec<_>>()}]);
        edit(&mut manifest);
        ("manifest.json", manifest.to_string())
    };
    let catalog = |name: &str| ("catalog.json", json!({"app": {"1": name}}).to_string());
    let out = "leads out of the directory";
    let cases: Vec<(&str, (&str, String), Vec<&str>)> = vec![
        ("a layer above", manifest(&|m| m[0]["Layers"][0] = "../secret".into()), vec!["../secret", out]),
        ("a layer far above", manifest(&|m| m[0]["Layers"][0] = "a/../../secret".into()), vec![out]),
        ("an absolute layer", manifest(&|m| m[0]["Layers"][0] = text(&secret).into()), vec![out]),
        (
            "an absolute config",
            manifest(&|m| m[0]["Config"] = "/etc/passwd".into()),
            vec!["/etc/passwd", out],
        ),
        ("a config above", manifest(&|m| m[0]["Config"] = "../secret".into()), vec![out]),
        (
            "a directory for a layer",
            manifest(&|m| m[0]["Layers"][0] = hex(&image.diff_ids()[0]).into()),
            vec!["no regular file"],
        ),
        (
            "a missing layer",
            manifest(&|m| m[0]["Layers"][0] = "x/layer.tar".into()),
            vec!["\"x/layer.tar\"", "not there"],
        ),
        (
            "fewer layers",
            manifest(&|m| m[0]["Layers"] = json!([layer])),
            vec!["manifest.json: 1 layers", "2 diff_ids"],
        ),
        (
            "swapped layers",
            manifest(&|m| m[0]["Layers"].as_array_mut().expect("a list").reverse()),
            vec!["diff_id mismatch"],
        ),
        ("another's config", manifest(&|m| m[0]["Config"] = layer.as_str().into()), vec!["config of"]),
        ("no list", ("manifest.json", "{}".into()), vec!["manifest.json: "]),
        (
            "two images",
            manifest(&|m| {
                let one = m[0].clone();
                m.as_array_mut().expect("a list").push(one);
            }),
            vec!["choose one"],
        ),
        ("no image", ("manifest.json", "[]".into()), vec!["no image"]),
        ("a catalog that is none", ("catalog.json", "[]".into()), vec!["catalog.json: "]),
        ("an empty catalog", ("catalog.json", "{}".into()), vec!["no image"]),
        ("a manifest above", catalog("../secret"), vec!["../secret", out]),
        ("an absolute manifest", catalog("/etc/passwd"), vec!["/etc/passwd", out]),
        (
            "a missing manifest",
            catalog("manifest-app-1.json"),
            vec!["catalog.json names \"manifest-app-1.json\"", "not there"],
        ),
    ];
    for (what, (name, content), says) in &cases {
        let path = outer.path().join(what.replace(' ', "-"));
        laid_out(&path, &image);
        occyctl(["check", &dir_uri(&path)]).ok();
        write(path.join(name), content);
        refused(&path, what, says);
    }
    for (what, name) in [
        ("layer", layer.as_str()),
        ("config", &config),
        ("manifest", "manifest.json"),
        ("catalog", "catalog.json"),
    ] {
        let path = outer.path().join(format!("linked-{what}"));
        laid_out(&path, &image);
        std::fs::rename(path.join(name), outer.path().join(what)).expect("a file");
        std::os::unix::fs::symlink(outer.path().join(what), path.join(name)).expect("a link");
        refused(&path, what, &[name, "symbolic links are not followed"]);
    }
    let path = outer.path().join("linked-directory");
    laid_out(&path, &image);
    let id = hex(&image.diff_ids()[0]).to_owned();
    std::fs::rename(path.join(&id), outer.path().join("elsewhere")).expect("a directory");
    std::os::unix::fs::symlink("../elsewhere", path.join(&id)).expect("a link");
    refused(&path, "a linked directory", &[&layer, "symbolic links are not followed"]);
    occyctl(["process", "dir:///nonexistent/x", "tar://-"]).fails(1).says(&["/nonexistent/x"]);
    occyctl(["process", &dir_uri(&secret), "tar://-"]).fails(1).says(&["secret"]);
    let empty = outer.path().join("empty");
    std::fs::create_dir(&empty).expect("a new directory");
    occyctl(["process", &dir_uri(&empty), "tar://-"]).fails(1).says(&["no manifest.json"]);
}

#[track_caller]
fn refused(path: &Path, what: &str, says: &[&str]) {
    let output = path.join("out.tar");
    let ended = occyctl(["process", &dir_uri(path), &tar_uri(&output)]).fails(1);
    assert!(!output.exists(), "{what}");
    ended.says(says);
    // That one of several is meant, or none is there, is nothing wrong with an image.
    let is_choice = ["choose one", "no image"].iter().any(|word| says.contains(word));
    occyctl(["check", &dir_uri(path)]).fails(if is_choice { 1 } else { 3 });
}
