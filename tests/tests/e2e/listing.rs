//! `ls`, `tags`, `digest` and `delete`: what is in a registry by name, and away with it.

use occy_tests::certificates::text;
use occy_tests::conforming::{Conforming, Ways};
use occy_tests::http::Response;
use occy_tests::image::{Family, Image, Index};
use occy_tests::layer::Layer;
use occy_tests::occyctl::occyctl;
use occy_tests::proxy::{self, FaultProxy};
use occy_tests::registry::Registry;
use occy_tests::server::Server;
use occy_tests::token::TokenServer;
use occy_tests::tools::{sha256, tool};
use serde_json::json;

use crate::{scratch, small};

fn lines(command: &[&str]) -> Vec<String> {
    occyctl(command).ok().text().lines().map(str::to_owned).collect()
}

/// `HOST/NAME`, which needs no scheme here.
fn bare(registry: &Registry, name: &str) -> String {
    format!("{}/{name}", registry.host())
}

#[test]
fn repositories_and_tags_are_listed_page_by_page() {
    let registry = Registry::start();
    let names: Vec<String> = (0..7).map(|number| format!("team/app{number}")).collect();
    for name in &names {
        registry.push(&small(), name, "1");
    }
    let tags = ["1.0-rc1", "1.0", "1.9", "1.10", "latest"];
    for tag in tags {
        registry.push(&small(), "many", tag);
    }
    // docker-registry gives all tags at once, and of repositories as many as are asked for.
    let proxy = FaultProxy::before(registry.host());
    let two = |request: &occy_tests::http::Request, upstream: &proxy::Upstream<'_>| {
        let path = request.path.replace("n=1000", "n=2");
        upstream(&occy_tests::http::Request { path, ..request.clone() })
    };
    proxy.fault(usize::MAX, "GET", "/v2/_catalog", std::sync::Arc::new(two));
    let all = [&["many".to_owned()][..], &names].concat();
    assert_eq!(lines(&["ls", &proxy.host()]), all);
    assert_eq!(proxy.count("GET", "/v2/_catalog"), 4, "{}", proxy.story());
    let said =
        occyctl(["ls", &format!("registry://{}", registry.host()), "--output-format", "json"]).ok().json();
    assert_eq!(said, json!({"registry": registry.host(), "repositories": all}));

    let many = bare(&registry, "many");
    for command in ["ls", "tags"] {
        let mut listed = lines(&[command, &many]);
        listed.sort();
        let mut expected = tags.map(str::to_owned);
        expected.sort();
        assert_eq!(listed, expected, "{command}");
    }
    assert_eq!(lines(&["tags", &many, "--sort", "version"]), tags);
    assert_eq!(lines(&["tags", &many, "--sort", "name"]), ["1.0", "1.0-rc1", "1.10", "1.9", "latest"]);
    let said = occyctl(["tags", &many, "--sort", "version", "--output-format", "json"]).ok().json();
    assert_eq!(said, json!({"repository": many, "tags": tags}));
    // skopeo has the last word.
    let skopeo = tool("skopeo", ["list-tags", "--tls-verify=false", &format!("docker://{many}")]);
    let skopeo: serde_json::Value = serde_json::from_str(&skopeo).expect("JSON");
    let mut theirs: Vec<_> =
        skopeo["Tags"].as_array().expect("tags").iter().filter_map(|tag| tag.as_str()).collect();
    theirs.sort_unstable();
    let mut expected = tags;
    expected.sort_unstable();
    assert_eq!(theirs, expected);
}

#[test]
fn pages_of_a_registry_that_gives_few_at_once_are_all_read() {
    let registry = Conforming::with(Ways { names_page: 3, ..Ways::default() });
    let tags: Vec<String> = (10..30).map(|number| format!("1.{number}")).collect();
    for tag in &tags {
        registry.add_manifest("app", tag, Family::Oci.manifest(), b"{}");
    }
    let name = format!("{}/app", registry.host());
    assert_eq!(lines(&["tags", &name]), tags);
    assert_eq!(registry.count("GET", "/v2/app/tags/list"), 7);
}

#[test]
fn a_list_that_does_not_end_is_left() {
    let server = Server::start(|request| match request.path.as_str() {
        "/v2/" => Response::status(200),
        _ => Response::ok("application/json", r#"{"name":"app","tags":["1"]}"#)
            .header("Link", "</v2/app/tags/list?last=1>; rel=\"next\""),
    });
    occyctl(["tags", &format!("{}/app", server.host())]).fails(1).says(&["does not end"]);
    assert!(server.count("GET", "/v2/app/tags/list") <= 3);
}

#[test]
fn a_next_page_is_asked_of_the_registry_itself_wherever_the_link_leads() {
    let elsewhere = Server::start(|_| Response::ok("application/json", r#"{"tags":["stolen"]}"#));
    let link = format!("<http://{}/v2/app/tags/list?last=1>; rel=\"next\"", elsewhere.host());
    let server = Server::start(move |request| match request.path.as_str() {
        "/v2/" => Response::status(200),
        path if path.contains("last=1") => Response::ok("application/json", r#"{"tags":["2"]}"#),
        _ => Response::ok("application/json", r#"{"tags":["1"]}"#).header("Link", &link),
    });
    assert_eq!(lines(&["tags", &format!("{}/app", server.host())]), ["1", "2"]);
    assert!(elsewhere.seen().is_empty());
}

#[test]
fn listing_and_deleting_ask_a_token_server_for_just_that() {
    let tokens = TokenServer::with_user("ann", "secret");
    let registry = Registry::with_tokens(&tokens);
    registry.push(&small(), "app", "1");
    let login = ["--username", "ann", "--password", "secret"];
    let app = bare(&registry, "app");
    assert_eq!(lines(&[&["ls", registry.host()], &login[..]].concat()), ["app"]);
    assert_eq!(lines(&[&["tags", &app], &login[..]].concat()), ["1"]);
    let digest = lines(&[&["digest", &format!("{app}:1")], &login[..]].concat());
    assert_eq!(digest, [small().digest()]);
    occyctl([&["delete", &format!("{app}:1")], &login[..]].concat()).ok();
    assert!(!registry.has("app", "1"));
    let scopes: Vec<_> = tokens.seen().iter().flat_map(|seen| seen.request.query("scope")).collect();
    for scope in ["registry:catalog:*", "repository:app:pull", "repository:app:pull,delete"] {
        assert!(scopes.iter().any(|asked| asked == scope), "{scope}: {scopes:?}");
    }
}

#[test]
fn names_that_mean_something_else_are_refused_with_words() {
    let registry = Registry::start();
    for (command, name, words) in [
        ("tags", "localhost:1/app:1".to_owned(), "one image"),
        ("tags", registry.host().to_owned(), "is a registry: name one"),
        ("ls", "tar://x".to_owned(), "unknown place tar://"),
        ("digest", "tar://x".to_owned(), "unknown source of whole images tar://"),
        ("digest", registry.host().to_owned(), "names a registry and no image"),
        ("delete", "oci-layout://x".to_owned(), "unknown registry oci-layout://"),
        ("delete", "localhost:1/App:1".to_owned(), "lower case"),
    ] {
        let ended = occyctl([command, &name]).fails(2);
        assert!(ended.stderr.contains(words), "{command} {name}: {}", ended.stderr);
    }
    occyctl(["tags", &bare(&registry, "none")]).fails(1).says(&["404", "spelling of the repository"]);
    occyctl(["digest", &bare(&registry, "none:1")]).fails(1).says(&["404", "none"]);
    occyctl(["delete", &bare(&registry, "none:1")]).fails(1).says(&["none:1 does not exist"]);
    let no_catalog =
        Server::start(|request| Response::status(if request.path == "/v2/" { 200 } else { 404 }));
    occyctl(["ls", &no_catalog.host()]).fails(1).says(&["keeps no list of its repositories"]);
}

#[test]
fn a_digest_costs_a_head_and_a_get_only_where_that_is_not_answered() {
    let registry = Registry::start();
    let image = small();
    registry.push(&image, "app", "1");
    let proxy = FaultProxy::before(registry.host());
    let name = format!("{}/app:1", proxy.host());
    assert_eq!(lines(&["digest", &name]), [image.digest()]);
    assert_eq!((proxy.count("HEAD", "*"), proxy.count("GET", "*/manifests/*")), (1, 0), "{}", proxy.story());
    for status in [400, 405, 501] {
        proxy.fault(1, "HEAD", "/v2/app/manifests/1", proxy::status(status));
        assert_eq!(lines(&["digest", &name]), [image.digest()], "{status}");
    }
    let silent = Conforming::with(Ways { silent_head: true, ..Ways::default() });
    silent.add_manifest("app", "1", Family::Docker.manifest(), &image.manifest);
    assert_eq!(lines(&["digest", &format!("{}/app:1", silent.host())]), [image.digest()]);
    let said = occyctl(["digest", &name, "--output-format", "json"]).ok().json();
    assert_eq!(said["digest"], image.digest());
    assert_eq!(said["media_type"], Family::Docker.manifest());
    assert_eq!(said["size"], image.manifest.len());
}

#[test]
fn the_digest_of_an_index_or_of_one_of_its_platforms() {
    let registry = Registry::start();
    let image = |architecture, seed| {
        let layers = vec![Layer::noise(seed, 500)];
        let platform = json!({"os": "linux", "architecture": architecture});
        (platform, Image::on(Family::Oci, ("linux", architecture, None), layers))
    };
    let index = Index::new(Family::Oci, vec![image("amd64", 1), image("arm64", 2)]);
    let uri = registry.push_index(&index, "multi", "1");
    let directory = scratch();
    let layout = format!("oci-layout://{}", text(&directory.path().join("layout")));
    occyctl(["copy", &uri, &layout]).ok();
    for place in [uri, layout.clone()] {
        assert_eq!(lines(&["digest", &place]), [sha256(&index.manifest)]);
        for options in [&["--platform", "linux/arm64"][..], &["--architecture", "arm64"]] {
            let found = lines(&[&["digest", &place][..], options].concat());
            assert_eq!(found, [index.images[1].digest()], "{options:?}");
        }
        let missing = occyctl(["digest", &place, "--platform", "linux/s390x"]).fails(1);
        missing.says(&["linux/s390x", "linux/amd64, linux/arm64"]);
    }
    occyctl(["digest", "localhost:1/x", "--platform", "arm64"]).fails(2).says(&["OS/ARCHITECTURE"]);
    assert_eq!(lines(&["ls", &layout]), [format!("{}/multi:1", registry.host())]);
}

#[test]
fn a_registry_that_deletes_manifests_only_loses_no_other_tag_unasked() {
    let registry = Registry::start();
    let image = small();
    for tag in ["1", "2", "3"] {
        registry.push(&image, "app", tag);
    }
    registry.push(&Image::docker(vec![Layer::noise(1, 100)]), "app", "other");
    let one = bare(&registry, "app:1");
    let refused = occyctl(["delete", &one]).fails(1);
    refused.says(&[":2, :3", "--yes", &image.digest()]);
    for tag in ["1", "2", "3", "other"] {
        assert!(registry.has("app", tag), "{tag}");
    }
    let by_digest = bare(&registry, &format!("app@{}", image.digest()));
    occyctl(["delete", &by_digest]).fails(1).says(&[":1, :2, :3"]);
    let said = occyctl(["delete", &one, "--yes", "--output-format", "json"]).ok().json();
    assert_eq!(said["deleted"], "manifest");
    assert_eq!(said["digest"], image.digest());
    assert_eq!(said["tags"], json!(["1", "2", "3"]));
    for tag in ["1", "2", "3"] {
        assert!(!registry.has("app", tag), "{tag}");
    }
    occyctl(["delete", &bare(&registry, "app:other")]).ok().says(&["Deleted", ":other"]);
    assert!(!registry.has("app", "other"));
}

#[test]
fn a_registry_that_deletes_tags_keeps_the_manifest_and_its_other_tags() {
    let registry = Conforming::start();
    let image = small();
    for tag in ["1", "2"] {
        registry.add_manifest("app", tag, Family::Docker.manifest(), &image.manifest);
    }
    let app = format!("{}/app", registry.host());
    occyctl(["delete", &format!("{app}:1")]).ok().says(&["Deleted the tag", "stays as", &image.digest()]);
    assert_eq!(registry.tags("app"), ["2"]);
    occyctl(["delete", &format!("{app}@{}", image.digest())]).fails(1).says(&[":2"]);
    occyctl(["delete", &format!("{app}@{}", image.digest()), "--yes"]).ok();
    assert!(registry.manifest("app", &image.digest()).is_none() && registry.tags("app").is_empty());
}

#[test]
fn a_registry_that_deletes_nothing_is_named() {
    let registry = Conforming::with(Ways { no_delete: true, ..Ways::default() });
    registry.add_manifest("app", "1", Family::Docker.manifest(), &small().manifest);
    let refused = occyctl(["delete", &format!("{}/app:1", registry.host())]).fails(1);
    refused.says(&["405", "lets nobody delete manifests", "storage.delete.enabled"]);
    assert_eq!(registry.tags("app"), ["1"]);
}

#[test]
fn a_registry_that_says_to_have_deleted_a_tag_and_has_not_is_not_believed() {
    let registry = Conforming::start();
    registry.add_manifest("app", "1", Family::Docker.manifest(), &small().manifest);
    let proxy = FaultProxy::before(&registry.host());
    proxy.fault(1, "DELETE", "*", proxy::status(202));
    occyctl(["delete", &format!("{}/app:1", proxy.host())]).fails(1).says(&["still there"]);
}
