//! `--signatures`: what becomes of the signatures of what changes on its way.

use occy_tests::conforming::{Conforming, Ways};
use occy_tests::coordinator::Coordinator;
use occy_tests::image::{Family, Image, Index, json_of};
use occy_tests::judge;
use occy_tests::layer::{Layer, Member};
use occy_tests::occyctl::occyctl;
use occy_tests::registry::Registry;
use occy_tests::tools::{sha256, write};
use serde_json::{Value, json};

use crate::scratch;

const NOTATION: &str = "application/vnd.cncf.notary.signature";
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const LINK: &str = "application/vnd.occystrap.source.v1+json";
const FILTER: [&str; 2] = ["-f", "exclude:pattern=*.key"];

fn image(architecture: &str, secret: bool) -> Image {
    let mut members = vec![Member::file("name", architecture)];
    if secret {
        members.push(Member::file("secret.key", "k"));
    }
    Image::on(Family::Oci, ("linux", architecture, None), vec![Layer::of(&members)])
}

fn cosign_tag(digest: &str) -> String {
    format!("{}.sig", digest.replace(':', "-"))
}

/// Two images, of which a filter changes the first, in an index.
fn index(registry: &Conforming) -> Index {
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let entries = vec![(platform("amd64"), image("amd64", true)), (platform("arm64"), image("arm64", false))];
    let index = Index::new(Family::Oci, entries);
    for image in &index.images {
        registry.add_image("app", &image.digest(), image);
    }
    registry.add_manifest("app", "1", Family::Oci.index(), &index.manifest);
    index
}

/// A signature as cosign keeps it.
fn cosign(registry: &Conforming, digest: &str) -> Image {
    let signature = Image::oci(vec![Layer::noise(9, 100)]);
    registry.add_image("app", &cosign_tag(digest), &signature);
    signature
}

/// How often signatures were asked for.
fn asked(registry: &Conforming) -> usize {
    registry.count("GET", "*/referrers/*") + registry.count("GET", "*.sig") + registry.count("GET", "*.att")
}

#[test]
fn an_index_of_which_something_signed_would_change_is_refused() {
    let destination = Registry::start();
    for what in ["image", "index", "other"] {
        let from = Conforming::start();
        let index = index(&from);
        let run = ["process", &from.uri("app:1"), &destination.uri("app:1"), "--all"];
        let run = [&run[..], &FILTER].concat();
        let digest = match what {
            "image" => index.images[0].digest(),
            "index" => sha256(&index.manifest),
            // It does not change.
            _ => index.images[1].digest(),
        };
        cosign(&from, &digest);
        if what == "other" {
            occyctl(run).ok();
            continue;
        }
        occyctl(run).fails(1).says(&["is signed as", &digest, &cosign_tag(&digest), "--signatures drop"]);
        assert!(!destination.has("app", "1"));
    }
    let from = Conforming::start();
    let index = index(&from);
    from.add_artifact("app", NOTATION, &index.images[0].manifest, Family::Oci.manifest());
    let run = ["process", &from.uri("app:1"), &destination.uri("new:1"), "--all"];
    occyctl([&run[..], &FILTER].concat()).fails(1).says(&[NOTATION]);
    // What is no signature hinders nobody, and where nothing changes nobody asks.
    let from = Conforming::start();
    self::index(&from);
    from.add_artifact("app", "application/spdx+json", &index.images[0].manifest, Family::Oci.manifest());
    occyctl([
        "process",
        &from.uri("app:1"),
        &destination.uri("same:1"),
        "--all",
        "-f",
        "exclude:pattern=*.x",
    ])
    .ok();
    assert_eq!(asked(&from), 0, "{}", from.story());
    let run = ["process", &from.uri("app:1"), &destination.uri("new:1"), "--all"];
    occyctl([&run[..], &FILTER].concat()).ok();
    assert_eq!(asked(&from), 6, "of the image, and of the index: {}", from.story());
}

#[test]
fn signatures_that_are_dropped_are_not_even_asked_for() {
    let (from, to) = (Conforming::start(), Registry::start());
    let index = index(&from);
    cosign(&from, &sha256(&index.manifest));
    let run = ["process", &from.uri("app:1"), &to.uri("app:1"), "--all", "--signatures", "drop"];
    occyctl([&run[..], &FILTER].concat()).ok();
    assert_eq!(asked(&from), 0, "{}", from.story());
    assert!(to.has("app", "1") && !to.has("app", &cosign_tag(&sha256(&index.manifest))));
}

/// The artifacts that lead from a manifest to what it was made of.
fn links(listed: &[Value]) -> Vec<&Value> {
    listed.iter().filter(|entry| entry["artifactType"] == LINK).collect()
}

#[test]
fn signatures_that_are_kept_are_the_originals_to_which_the_new_image_leads() {
    let from = Conforming::start();
    let index = index(&from);
    let (old, image) = (sha256(&index.manifest), &index.images[0]);
    let signature = cosign(&from, &old);
    let bundle = from.add_artifact("app", BUNDLE, &image.manifest, Family::Oci.manifest());
    let (lists, other) = (Conforming::start(), Registry::start());
    let keep = ["--all", "--signatures", "keep", "--output-format", "json"];
    let process = |to: &str| {
        let run = occyctl([&["process", &from.uri("app:1"), to][..], &FILTER, &keep].concat()).ok();
        let said = run.json();
        run.says(&["kept the signature", &old]);
        said
    };
    let said = process(&lists.uri("app:1"));
    let kept = said["signatures_kept"].as_array().expect("a list").clone();
    assert_eq!(kept.len(), 2, "{said}");
    let new = said["manifest_digest"].as_str().expect("a digest");
    let rebuilt = json_of(&lists.manifest("app", "1").expect("an index").1);
    let new_image = rebuilt["manifests"][0]["digest"].as_str().expect("a digest");
    // They are bit for bit what they were, and found as what they are about is called.
    assert_eq!(lists.manifest("app", &cosign_tag(&old)).expect("cosign's").1, signature.manifest);
    assert_eq!(lists.referrers("app", &image.digest()), [sha256(&bundle)]);
    for (became, source) in [(new, &old), (new_image, &image.digest())] {
        let [link] = &lists.referrers("app", became)[..] else { panic!("one link to {source}") };
        let link = json_of(&lists.manifest("app", link).expect("it").1);
        assert_eq!(link["artifactType"], LINK);
        assert_eq!(link["subject"]["digest"], became);
        assert_eq!(link["annotations"]["dev.occystrap.source.digest"], *source);
        assert_eq!(lists.blob("app", &sha256(b"{}")).as_deref(), Some(&b"{}"[..]));
    }
    judge::skopeo_reads(&format!("docker://{}/app:1", lists.host()));
    // The same where the registry lists no referrers, and in a layout.
    process(&other.uri("app:1"));
    assert_eq!(other.digest("app", "1"), new);
    assert_eq!(other.digest("app", &cosign_tag(&old)), signature.digest());
    let tagged = |digest: &str| json_of(&other.manifest("app", &digest.replace(':', "-")).body);
    let listed = tagged(new)["manifests"].as_array().expect("a list").clone();
    assert_eq!(links(&listed)[0]["annotations"]["dev.occystrap.source.digest"], old);
    assert_eq!(tagged(&image.digest())["manifests"][0]["digest"], sha256(&bundle));
    let directory = scratch();
    let layout = format!("oci-layout://{}", directory.path().join("layout").display());
    process(&layout);
    let back = Conforming::start();
    occyctl(["copy", &layout, &back.uri("app:1"), "--referrers"]).ok();
    assert_eq!(back.referrers("app", new), lists.referrers("app", new));
    let tar = format!("oci-layout://{}", directory.path().join("layout.tar").display());
    let source = from.uri("app:1");
    occyctl([&["process", &source, &tar][..], &FILTER, &keep].concat()).fails(1).says(&["a directory can"]);
}

#[test]
fn of_one_image_signatures_are_asked_for_where_somebody_wants_to_know() {
    let (from, to) = (Conforming::start(), Conforming::with(Ways { no_referrers: true, ..Ways::default() }));
    let image = Image::docker(vec![Layer::of(&[Member::file("a.key", "k")])]);
    from.add_image("app", "1", &image);
    let signature = cosign(&from, &image.digest());
    let (source, destination) = (from.uri("app:1"), to.uri("app:1"));
    let process = |more: &[&str]| occyctl([&["process", &source, &destination][..], more].concat());
    process(&FILTER).ok();
    assert_eq!(asked(&from), 0, "{}", from.story());
    let before = to.manifest("app", "1");
    let refused = process(&["-f", "normalize-timestamps", "--signatures", "refuse"]).fails(1);
    refused.says(&[&image.digest(), &cosign_tag(&image.digest())]);
    assert_eq!(to.manifest("app", "1"), before);
    // Another format is another manifest; the same one is not.
    process(&["--format", "oci", "--signatures", "refuse"]).fails(1).says(&["is signed as"]);
    process(&["--signatures", "refuse"]).ok();
    assert_eq!(to.manifest("app", "1").expect("it").1, image.manifest);
    process(&[&FILTER[..], &["--signatures", "keep"]].concat()).ok();
    let new = to.manifest("app", "1").expect("it");
    assert_eq!(new.0, Family::Docker.manifest());
    assert_eq!(to.manifest("app", &cosign_tag(&image.digest())).expect("cosign's").1, signature.manifest);
    let listed = json_of(&to.manifest("app", &sha256(&new.1).replace(':', "-")).expect("the list").1);
    assert_eq!(links(listed["manifests"].as_array().expect("a list")).len(), 1);
    let directory = scratch();
    let tar = format!("tar://{}", directory.path().join("a.tar").display());
    occyctl(["process", &source, &tar, "--signatures", "refuse"]).fails(1).says(&["keeps no manifests"]);
}

#[test]
fn some_platforms_of_a_signed_index_are_another_index() {
    let (from, to) = (Conforming::start(), Conforming::start());
    let index = index(&from);
    let old = sha256(&index.manifest);
    let signature = cosign(&from, &old);
    // An image stays what it is.
    let own = cosign(&from, &index.images[1].digest());
    let copy = |more: &[&str]| {
        let run = ["copy", &from.uri("app:1"), &to.uri("app:1"), "--platform", "linux/arm64"];
        occyctl([&run[..], more].concat())
    };
    copy(&[]).fails(1).says(&["is signed as", &old, "--signatures"]);
    assert!(to.tags("app").is_empty());
    // Without a choice of platforms nothing changes.
    occyctl(["copy", &from.uri("app:1"), &to.uri("app:1"), "--signatures", "keep"]).fails(2);
    copy(&["--signatures", "keep", "--sparse"]).fails(2);
    // The coordinator does the same.
    let (coordinator, there) = (Coordinator::start(&[]), Conforming::start());
    let run = ["copy", &from.uri("app:1"), &there.uri("app:1"), "--platform", "linux/arm64", "--coordinator"];
    let by_it = |more: &[&str]| occyctl([&run[..], &[&coordinator.url()], more].concat());
    by_it(&[]).fails(1).says(&["is signed as", &old, "--signatures"]);
    assert!(there.tags("app").is_empty());
    by_it(&["--signatures", "drop"]).ok();
    assert_eq!(there.tags("app"), ["1"]);
    let there = Conforming::start();
    let run = ["copy", &from.uri("app:1"), &there.uri("app:1"), "--platform", "linux/arm64", "--coordinator"];
    let by_it = occyctl(
        [&run[..], &[&coordinator.url(), "--signatures", "keep", "--output-format", "json"]].concat(),
    )
    .ok();
    assert_eq!(by_it.json()["signatures_kept"][0]["subject"], old);
    by_it.says(&["kept the signature", &old]);
    assert_eq!(there.manifest("app", &cosign_tag(&old)).expect("cosign's").1, signature.manifest);
    let said = copy(&["--signatures", "keep", "--referrers", "--output-format", "json"]).ok().json();
    assert_eq!(said["signatures_kept"][0]["subject"], old, "{said}");
    let new = said["manifest_digest"].as_str().expect("a digest");
    assert_eq!(to.manifest("app", &cosign_tag(&old)).expect("cosign's").1, signature.manifest);
    assert_eq!(to.manifest("app", &cosign_tag(&index.images[1].digest())).expect("cosign's").1, own.manifest);
    let link = json_of(&to.manifest("app", &to.referrers("app", new)[0]).expect("a link").1);
    assert_eq!(link["annotations"]["dev.occystrap.source.digest"], old);
    // What is there is there, and nobody asks again.
    from.forget();
    copy(&[]).ok();
    assert_eq!(asked(&from), 0, "{}", from.story());
    // All of its platforms are the index itself.
    let run = ["copy", &from.uri("app:1"), &to.uri("all:1"), "--platform", "linux/arm64"];
    occyctl([&run[..], &["--platform", "linux/amd64"]].concat()).ok();
    assert_eq!(asked(&from), 0, "{}", from.story());
}

#[test]
fn a_mirror_of_some_platforms_refuses_what_is_signed_unless_told() {
    let (from, to) = (Conforming::start(), Conforming::start());
    let index = index(&from);
    let old = sha256(&index.manifest);
    cosign(&from, &old);
    let directory = scratch();
    let mirror = |more: &str| {
        let config = format!(
            "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    tags: [{{names: ['1']}}]\n    platforms: \
             [linux/arm64]\n{more}",
            from.host(),
            to.host()
        );
        let file = directory.path().join("mirror.yaml");
        write(&file, config);
        occyctl(["mirror", "-c", &file.display().to_string()])
    };
    mirror("").fails(1).says(&["is signed as", &old]);
    assert!(to.tags("app").is_empty());
    mirror("    signatures: keep\n").ok();
    assert_eq!(to.tags("app"), ["1", &cosign_tag(&old)]);
    from.forget();
    mirror("    signatures: keep\n").ok();
    assert_eq!(asked(&from), 0, "{}", from.story());
    mirror("    signatures: some\n").fails(2).says(&["line 6", "some"]);
    mirror("    sparse: true\n    signatures: drop\n").fails(2).says(&["signatures says nothing"]);
    // It is the same for what was carried.
    let there = Conforming::start();
    let config = directory.path().join("carried.yaml");
    let layout = format!("oci-layout://{}", directory.path().join("carried").display());
    let carried = |more: &str| {
        write(
            &config,
            format!(
                "mirrors:\n  - sources: ['{}/app']\n    targets: ['{}/app']\n    tags: [{{names: ['1']}}]\n    platforms: \
                 [linux/arm64]\n{more}",
                from.host(),
                there.host()
            ),
        );
        config.display().to_string()
    };
    occyctl(["mirror", "-c", &carried(""), "--to", &layout]).ok();
    occyctl(["mirror", "-c", &carried(""), "--from", &layout]).fails(1).says(&["is signed as", &old]);
    assert!(there.tags("app").is_empty());
    occyctl(["mirror", "-c", &carried("    signatures: keep\n"), "--from", &layout]).ok();
    assert_eq!(there.tags("app"), ["1", &cosign_tag(&old)]);
}
