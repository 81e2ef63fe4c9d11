//! The conformance suite's data, copied from a registry that follows the specification to the letter to another one, to
//! docker-registry, and to a layout, and back, and compared byte for byte by the test itself.

use occy_tests::certificates::text;
use occy_tests::conformance::{self, Data};
use occy_tests::conforming::{Conforming, Ways};
use occy_tests::http::Request;
use occy_tests::judge;
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::tools::tool;

use crate::scratch;

/// A registry that takes what names more than is there, as the specification lets it.
const SPARSE: Ways = Ways {
    takes_sparse: true,
    no_referrers: false,
    referrers_page: 0,
    names_page: 0,
    silent_head: false,
    no_delete: false,
    min_chunk: 0,
    sessions_elsewhere: false,
};

/// `NAME:TAG` or `NAME@DIGEST`.
fn named(name: &str, root: &str) -> String {
    format!("{name}{}{root}", if root.contains(':') { '@' } else { ':' })
}

fn copy(source: &str, destination: &str, data: &Data) {
    let sparse: &[&str] = if data.is_sparse { &["--sparse"] } else { &[] };
    occyctl([&["copy", source, destination][..], sparse].concat()).ok();
}

/// Everything that the root leads to is there, byte for byte, and its tag means it.
#[track_caller]
fn compare(host: &str, name: &str, data: &Data, root: &str) {
    let get = |kind: &str, reference: &str| {
        let accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json";
        let request = Request::new("GET", &format!("/v2/{name}/{kind}/{reference}")).header("Accept", accept);
        let response = request.send(host).expect("an answer");
        assert_eq!(response.status, 200, "{} {kind} {reference}", data.name);
        response.body
    };
    for (digest, is_manifest, bytes) in data.reached(root) {
        let kind = if is_manifest { "manifests" } else { "blobs" };
        assert!(get(kind, &digest) == bytes, "{} {kind} {digest}", data.name);
    }
    let (_, _, expected) = data.reached(root).remove(0);
    assert!(get("manifests", root) == expected, "{} {root}", data.name);
}

#[test]
fn every_kind_of_data_is_copied_between_registries_that_follow_the_specification() {
    let (from, to) = (Conforming::start(), Conforming::with(SPARSE));
    for data in conformance::all() {
        data.put_into(&from);
        for root in &data.roots {
            let name = named(data.name, root);
            copy(&from.uri(&name), &to.uri(&name), &data);
            compare(&to.host(), data.name, &data, root);
            let digest = occyctl(["digest", &to.uri(&name)]).ok().text();
            assert_eq!(digest.trim(), data.digest(root), "{name}");
            // A second time nothing is written.
            to.forget();
            copy(&from.uri(&name), &to.uri(&name), &data);
            for method in ["POST", "PATCH", "PUT"] {
                let is_again = method == "PUT" && data.is_rare || data.is_sparse;
                assert!(is_again || to.count(method, "*") == 0, "{name} {method}");
            }
        }
    }
}

#[test]
fn every_kind_of_data_that_docker_registry_takes_passes_through_it() {
    let (from, through, to) = (Conforming::start(), Registry::start(), Conforming::start());
    for data in conformance::all() {
        data.put_into(&from);
        for root in &data.roots {
            let name = named(data.name, root);
            if data.is_sparse || data.is_rare {
                // docker-registry takes no index before its images, no image before its layers, and knows manifests by SHA-256.
                let options: &[&str] = if data.is_sparse { &["--sparse"] } else { &[] };
                occyctl([&["copy", &from.uri(&name), &through.uri(&name)][..], options].concat())
                    .fails(1)
                    .says(&["40"]);
                assert!(!through.has(data.name, root), "{name}");
                continue;
            }
            copy(&from.uri(&name), &through.uri(&name), &data);
            compare(through.host(), data.name, &data, root);
            copy(&through.uri(&name), &to.uri(&name), &data);
            compare(&to.host(), data.name, &data, root);
            let source = format!("docker://{}/{name}", through.host());
            let raw = tool("skopeo", ["inspect", "--raw", "--tls-verify=false", &source]);
            assert!(raw.as_bytes() == data.reached(root)[0].2, "{name}");
            if ["image", "image-uncompressed", "index", "no-layers", "custom-fields"].contains(&data.name) {
                judge::skopeo_reads(&source);
            }
        }
    }
}

#[test]
fn every_kind_of_data_passes_through_layouts() {
    let (from, to) = (Conforming::start(), Conforming::with(SPARSE));
    let directory = scratch();
    for data in conformance::all() {
        data.put_into(&from);
        for (number, root) in data.roots.iter().enumerate() {
            let name = named(data.name, root);
            for form in ["layout", "layout.tar"] {
                let path = directory.path().join(format!("{}-{number}-{form}", data.name));
                let layout = format!("oci-layout://{}", text(&path));
                copy(&from.uri(&name), &layout, &data);
                let copied = format!("{form}/{}", data.name);
                copy(&layout, &to.uri(&named(&copied, root)), &data);
                compare(&to.host(), &copied, &data, root);
            }
        }
    }
}

#[test]
fn what_is_missing_is_an_error_unless_it_may_be() {
    let (from, to) = (Conforming::start(), Conforming::start());
    for data in conformance::all().iter().filter(|data| data.is_sparse) {
        data.put_into(&from);
        let name = named(data.name, &data.roots[0]);
        let failed = occyctl(["copy", &from.uri(&name), &to.uri(&name)]).fails(1);
        assert!(failed.stderr.contains("sha256:"), "{}", failed.stderr);
        assert!(to.tags(data.name).is_empty(), "{name}");
        let said = occyctl(["copy", &from.uri(&name), &to.uri(&name), "--sparse", "--output-format", "json"]);
        // The registry refuses an image without its layer, and takes an index without its image.
        if data.name == "sparse-index" {
            assert_eq!(said.ok().json()["left_out"].as_array().map(Vec::len), Some(1));
        } else {
            said.fails(1).says(&["MANIFEST_BLOB_UNKNOWN"]);
        }
    }
}

#[test]
fn referrers_of_the_suite_follow_their_subjects_to_every_kind_of_registry() {
    let (from, docker) = (Conforming::with(Ways { referrers_page: 1, ..Ways::default() }), Registry::start());
    let (listing, tagging) =
        (Conforming::start(), Conforming::with(Ways { no_referrers: true, ..Ways::default() }));
    for data in conformance::all() {
        let root = match data.name {
            "artifacts-with-subject" => "image",
            "index-with-subject" => "index",
            _ => continue,
        };
        data.put_into(&from);
        let name = named(data.name, root);
        let subject = data.digest(root);
        let expected = from.referrers(data.name, &subject);
        assert!(!expected.is_empty());
        let hosts = [listing.host(), tagging.host(), docker.host().to_owned()];
        for (host, is_listed) in hosts.iter().zip([true, false, false]) {
            let destination = format!("{host}/{name}");
            let run = ["copy", &from.uri(&name), &destination, "--referrers", "--output-format", "json"];
            let said = occyctl(run).ok().json();
            let copied = said["referrers"].as_array().expect("a list").clone();
            assert_eq!(copied.len(), expected.len(), "{said}");
            assert!(
                copied.iter().all(|one| one["listed"] == is_listed && one["subject"] == subject),
                "{said}"
            );
            for digest in &expected {
                compare(host, data.name, &data, digest);
            }
            if !is_listed {
                let tag = subject.replace(':', "-");
                let request = Request::new("GET", &format!("/v2/{}/manifests/{tag}", data.name));
                let accept = "application/vnd.oci.image.index.v1+json";
                let index = request.header("Accept", accept).send(host).expect("an answer");
                let index: serde_json::Value = serde_json::from_slice(&index.body).expect("an index");
                let mut listed: Vec<_> = index["manifests"].as_array().expect("entries").clone();
                listed.sort_by_key(|entry| entry["digest"].to_string());
                assert_eq!(
                    listed
                        .iter()
                        .map(|entry| entry["digest"].as_str().expect("a digest"))
                        .collect::<Vec<_>>(),
                    expected
                );
                assert!(listed.iter().all(|entry| entry["artifactType"].is_string()), "{index}");
            }
        }
        assert_eq!(listing.referrers(data.name, &subject), expected);
        assert!(
            listing.tags(data.name).iter().all(|tag| !tag.starts_with("sha256-")),
            "no tag where it lists them"
        );
    }
}
