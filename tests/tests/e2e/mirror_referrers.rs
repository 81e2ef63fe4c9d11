//! What belongs to images that pass filters in a mirror: of what these leave as it is all goes along, of what they change what
//! `process --all` takes along.

use std::path::Path;

use occy_tests::conforming::{Conforming, Ways};
use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::{Run, occyctl};
use occy_tests::tools::sha256;
use serde_json::json;

use crate::mirror::{JSON, mirror, report};
use crate::scratch;

const SBOM: &str = "application/spdx+json";
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

fn image(architecture: &str, secret: bool) -> Image {
    let mut members = vec![Member::file("name", architecture)];
    if secret {
        members.push(Member::file("secret.key", "k"));
    }
    Image::on(Family::Oci, ("linux", architecture, None), vec![Layer::of(&members)])
}

/// An index of two images, of which a filter changes the first; with SBOMs of both and of the index, and of the second one's also a
/// signature, and cosign's tags.
struct Source {
    registry: Conforming,
    index: Vec<u8>,
    changed: Image,
    kept: Image,
    sbom: Vec<u8>,
    of_sbom: Vec<u8>,
    bundle: Vec<u8>,
    cosign: Image,
}

impl Source {
    fn new() -> Self {
        let registry = Conforming::start();
        let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
        let (changed, kept) = (image("amd64", true), image("arm64", false));
        let entries = vec![(platform("amd64"), changed.clone()), (platform("arm64"), kept.clone())];
        let index = Index::new(Family::Oci, entries).manifest;
        for image in [&changed, &kept] {
            registry.add_image("app", &image.digest(), image);
        }
        registry.add_manifest("app", "1", Family::Oci.index(), &index);
        let add = |kind: &str, subject: &[u8], subject_type: &str| {
            registry.add_artifact("app", kind, subject, subject_type)
        };
        let manifest = Family::Oci.manifest();
        let sbom = add(SBOM, &kept.manifest, manifest);
        let of_sbom = add(BUNDLE, &sbom, manifest);
        let bundle = add(BUNDLE, &kept.manifest, manifest);
        add(SBOM, &changed.manifest, manifest);
        add(SBOM, &index, Family::Oci.index());
        let cosign = Image::oci(vec![Layer::noise(9, 100)]);
        for (image, end) in [(&kept, "sig"), (&kept, "sbom"), (&changed, "sbom")] {
            registry.add_image("app", &tag(&image.digest(), end), &cosign);
        }
        Self { registry, index, changed, kept, sbom, of_sbom, bundle, cosign }
    }

    fn mirror(&self, directory: &Path, to: &Conforming, more: &str, options: &[&str]) -> Run {
        let text = format!(
            "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    filters: ['exclude:pattern=*.key']\n    \
             referrers: true\n{more}",
            self.registry.host(),
            to.host()
        );
        mirror(directory, &text, &[&JSON[..], options].concat())
    }

    /// What belongs to the image that no filter changes is there, bit for bit, and nothing of what was about the others.
    fn check(&self, to: &Conforming) {
        let list = |subject: &str| {
            let mut listed = match to.manifest("app", &subject.replace(':', "-")) {
                Some((_, list)) => json_of(&list)["manifests"].as_array().expect("a list").clone(),
                None => Vec::new(),
            };
            let mut digests: Vec<String> = to.referrers("app", subject);
            digests.extend(listed.drain(..).map(|one| one["digest"].as_str().expect("a digest").to_owned()));
            digests.sort();
            digests.dedup();
            digests
        };
        let mut expected = [&self.sbom, &self.bundle].map(|manifest| sha256(manifest));
        expected.sort();
        assert_eq!(list(&self.kept.digest()), expected);
        assert_eq!(list(&sha256(&self.sbom)), [sha256(&self.of_sbom)]);
        for artifact in [&self.sbom, &self.of_sbom, &self.bundle] {
            let (_, there) = to.manifest("app", &sha256(artifact)).expect("it");
            assert_eq!(&there, artifact);
            let layer = json_of(artifact)["layers"][0]["digest"].as_str().expect("a digest").to_owned();
            assert_eq!(to.blob("app", &layer), self.registry.blob("app", &layer));
        }
        for end in ["sig", "sbom"] {
            let (_, there) = to.manifest("app", &tag(&self.kept.digest(), end)).expect("cosign's");
            assert_eq!(there, self.cosign.manifest);
        }
        assert_eq!(to.manifest("app", &tag(&self.changed.digest(), "sbom")), None);
        assert_eq!(list(&sha256(&self.index)), [""; 0]);
        judge::skopeo_reads(&format!("docker://{}/app:1", to.host()));
    }
}

fn tag(digest: &str, end: &str) -> String {
    format!("{}.{end}", digest.replace(':', "-"))
}

#[test]
fn what_filters_leave_as_it_is_keeps_all_that_belongs_to_it_and_a_warm_run_asks_no_more_for_that() {
    let source = Source::new();
    let directory = scratch();
    let by_hand = Conforming::start();
    let (from, hand) = (source.registry.uri("app:1"), by_hand.uri("app:1"));
    occyctl(["process", &from, &hand, "--all", "-f", "exclude:pattern=*.key"]).ok();
    for ways in [Ways::default(), Ways { no_referrers: true, ..Ways::default() }] {
        let to = Conforming::with(ways);
        let done = report(source.mirror(directory.path(), &to, "", &[]), 0);
        assert_eq!(done["done"], 1, "{done}");
        source.check(&to);
        // Of what changed as much as `process --all` brings: nothing, for none of it is a signature.
        let entries = |registry: &Conforming| {
            let (_, index) = registry.manifest("app", "1").expect("an index");
            json_of(&index)["manifests"].as_array().expect("entries").clone()
        };
        assert_eq!(entries(&to), entries(&by_hand));
        let new = entries(&to)[0]["digest"].as_str().expect("a digest").to_owned();
        for registry in [&to, &by_hand] {
            for subject in [&source.changed.digest(), &new] {
                assert_eq!(registry.referrers("app", subject), [""; 0]);
                assert_eq!(registry.manifest("app", &subject.replace(':', "-")), None);
            }
        }
        source.registry.forget();
        to.forget();
        let warm = report(source.mirror(directory.path(), &to, "", &[]), 0);
        assert_eq!((&warm["done"], &warm["bytes"]["fetched"]), (&json!(0), &json!(0)), "{warm}");
        let asked = |registry: &Conforming| {
            let seen = registry.seen().into_iter().map(|seen| seen.request);
            let asked = seen.filter(|request| request.path != "/v2/").map(|request| {
                format!("{} {}", request.method, request.path.split('?').next().unwrap_or_default())
            });
            asked.collect::<Vec<_>>()
        };
        assert_eq!(asked(&source.registry), ["GET /v2/app/tags/list", "HEAD /v2/app/manifests/1"]);
        assert_eq!(asked(&to), ["GET /v2/app/manifests/1"]);
    }
}

#[test]
fn referrers_that_are_wanted_later_come_although_the_image_is_there() {
    let source = Source::new();
    let (directory, to) = (scratch(), Conforming::start());
    let text = |more: &str| {
        let (from, to) = (source.registry.host(), to.host());
        format!(
            "mirrors: [{{sources: ['{from}/app'], targets: ['{to}/app'], filters: ['exclude:pattern=*.key']{more}}}]"
        )
    };
    let run = |more: &str| report(mirror(directory.path(), &text(more), &JSON), 0)["done"].clone();
    assert_eq!(run(""), 1);
    assert_eq!(to.referrers("app", &source.kept.digest()), [""; 0]);
    assert_eq!(run(", referrers: true"), 1);
    source.check(&to);
    assert_eq!(run(", referrers: true"), 0);
}

#[test]
fn signatures_of_what_filters_change_are_as_the_policy_says_and_others_go_along() {
    let source = Source::new();
    let registry = &source.registry;
    let signature = registry.add_artifact("app", BUNDLE, &source.changed.manifest, Family::Oci.manifest());
    let directory = scratch();
    let to = Conforming::start();
    let refused = report(source.mirror(directory.path(), &to, "", &[]), 1);
    let problem = refused["images"][0]["problem"].as_str().expect("a problem");
    assert!(problem.contains("is signed as") && problem.contains(&source.changed.digest()), "{refused}");
    assert!(to.tags("app").is_empty());
    report(source.mirror(directory.path(), &to, "    signatures: drop\n", &[]), 0);
    source.check(&to);
    assert_eq!(to.referrers("app", &source.changed.digest()), [""; 0]);
    let to = Conforming::start();
    let kept = report(source.mirror(directory.path(), &to, "    signatures: keep\n", &[]), 0);
    assert_eq!(kept["images"][0]["copied"]["signatures_kept"], 1, "{kept}");
    source.check(&to);
    assert_eq!(to.referrers("app", &source.changed.digest()), [sha256(&signature)]);
    let (_, index) = to.manifest("app", "1").expect("an index");
    let new = json_of(&index)["manifests"][0]["digest"].as_str().expect("a digest").to_owned();
    let [link] = &to.referrers("app", &new)[..] else { panic!("one link of {new}") };
    let link = json_of(&to.manifest("app", link).expect("it").1);
    assert_eq!(link["annotations"]["dev.occystrap.source.digest"], source.changed.digest());
    // What was carried is the same where it arrives.
    let (there, layout) = (Conforming::start(), directory.path().join("carried"));
    let layout = format!("oci-layout://{}", layout.display());
    let carried = |end: &str| {
        let more = "    signatures: keep\n";
        report(source.mirror(directory.path(), &there, more, &[end, &layout]), 0)
    };
    carried("--to");
    carried("--from");
    source.check(&there);
    assert_eq!(there.manifest("app", "1"), to.manifest("app", "1"));
    assert_eq!(there.referrers("app", &source.changed.digest()), [sha256(&signature)]);
    assert_eq!(there.referrers("app", &new).len(), 1);
}

#[test]
fn what_belongs_to_an_image_goes_nowhere_but_to_where_the_image_stays_as_it_is_and_comes_once() {
    let source = Source::new();
    let registry = &source.registry;
    let sbom_of = |image: &Image| sha256(format!("{SBOM} of {}", image.digest()).as_bytes());
    let directory = scratch();
    let [changing, copying, one, two] = [(); 4].map(|()| Conforming::start());
    let entry = |to: &[&Conforming], more: &str| {
        let to: Vec<_> = to.iter().map(|to| format!("'{}/app'", to.host())).collect();
        let (from, to) = (registry.host(), to.join(", "));
        format!(
            "  - {{sources: ['{from}/app'], tags: [{{names: ['1']}}], targets: [{to}], referrers: true{more}}}\n"
        )
    };
    let filters = ", filters: ['exclude:pattern=*.key']";
    let text = format!("mirrors:\n{}{}", entry(&[&changing], filters), entry(&[&copying], ""));
    let done = report(mirror(directory.path(), &text, &JSON), 0);
    assert_eq!(done["done"], 2, "{done}");
    source.check(&changing);
    assert!(copying.blob("app", &sbom_of(&source.changed)).is_some());
    assert_eq!(changing.blob("app", &sbom_of(&source.changed)), None, "{}", changing.story());
    // Where all need it, it comes once for all.
    registry.forget();
    let text = format!("mirrors:\n{}", entry(&[&one, &two], filters));
    let done = report(mirror(directory.path(), &text, &JSON), 0);
    source.check(&one);
    source.check(&two);
    let fetched = registry.count("GET", &format!("*/blobs/{}", sbom_of(&source.kept)));
    assert_eq!(fetched, 1, "{done}: {}", registry.story());
}
