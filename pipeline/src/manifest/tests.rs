use super::*;
use crate::blob::BlobSummary;
use crate::compression::Format;
use crate::digest::Digest;
use proptest::prelude::*;
use serde_json::json;

const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

fn descriptor(media_type: &str, n: u8) -> Value {
    json!({"mediaType": media_type, "digest": Digest::sha256([n]), "size": n})
}

fn docker() -> Value {
    json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": descriptor(media_type::DOCKER_CONFIG, 0),
        "layers": [descriptor(DOCKER_GZIP, 1), descriptor(DOCKER_GZIP, 2)]})
}

fn oci() -> Value {
    json!({"schemaVersion": 2, "x-unknown": [1], "config": descriptor(media_type::OCI_CONFIG, 0),
        "layers": [descriptor(OCI_GZIP, 1), descriptor(OCI_GZIP, 2)], "annotations": {"a": "b"}})
}

fn read(document: &Value, content_type: Option<&str>) -> Result<ParsedManifest, ManifestError> {
    parse(document.to_string().as_bytes(), content_type)
}

fn image(document: &Value) -> ImageManifest {
    match read(document, None).expect("a manifest") {
        ParsedManifest::Image(image) => image,
        other => panic!("{other:?}"),
    }
}

fn summary(n: u8) -> BlobSummary {
    BlobSummary { digest: Digest::sha256([n]), size: n.into() }
}

fn kept(image: &ImageManifest) -> Vec<ManifestLayer<'_>> {
    image.layers.iter().map(ManifestLayer::Kept).collect()
}

fn build(family: Family, source: Option<&ImageManifest>, layers: &[ManifestLayer<'_>]) -> Value {
    let document = build_image_manifest(family, source, &summary(9), layers).expect("it can be written");
    let bytes = to_bytes(&document);
    serde_json::from_slice(&bytes).expect("json")
}

#[test]
fn both_families_are_read_with_and_without_a_content_type() {
    for (document, family) in [(docker(), Family::Docker), (oci(), Family::Oci)] {
        for content_type in
            [None, Some(family.manifest()), Some("text/plain"), Some("application/json; charset=utf-8")]
        {
            match read(&document, content_type).expect("a manifest") {
                ParsedManifest::Image(image) => {
                    assert_eq!((image.family, image.layers.len()), (family, 2));
                    assert!(!image.is_artifact());
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn indexes_of_both_families_are_read() {
    for family in [Family::Docker, Family::Oci] {
        let mut document = json!({"schemaVersion": 2, "manifests": [descriptor(family.manifest(), 1)]});
        if family == Family::Docker {
            document["mediaType"] = family.index().into();
        }
        match read(&document, None).expect("an index") {
            ParsedManifest::Index(index) => assert_eq!((index.family, index.manifests.len()), (family, 1)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_media_type_that_is_not_the_content_type_is_refused() {
    let error = read(&docker(), Some(media_type::OCI_MANIFEST)).expect_err("it says that it is docker's");
    assert!(matches!(error, ManifestError::MediaTypeMismatch { .. }), "{error}");
}

#[test]
fn a_document_with_both_layers_and_manifests_is_refused_whatever_it_is_served_as() {
    let mut both = oci();
    both["manifests"] = json!([]);
    for content_type in [None, Some(media_type::OCI_MANIFEST), Some(media_type::OCI_INDEX)] {
        assert!(
            matches!(read(&both, content_type), Err(ManifestError::Ambiguous { .. })),
            "{content_type:?}"
        );
    }
}

#[test]
fn unknown_types_and_wrong_fields_are_named() {
    for (document, content_type, expected) in [
        (json!({}), None, r#"unknown manifest type """#),
        (docker(), Some("text/html"), r#"unknown manifest type "text/html""#),
        (json!({"schemaVersion": 2, "layers": []}), None, "the manifest's config is not an object"),
        (
            json!({"schemaVersion": 2, "manifests": {}}),
            None,
            "the manifest's manifests is missing or not a list",
        ),
        (
            json!({"schemaVersion": 1, "config": {}, "layers": []}),
            Some(media_type::OCI_MANIFEST),
            "the manifest's schemaVersion is not 2",
        ),
    ] {
        assert_eq!(read(&document, content_type).expect_err("not a manifest").to_string(), expected);
    }
    let mut negative = docker();
    negative["layers"][1]["size"] = (-1).into();
    let error = read(&negative, None).expect_err("a negative size").to_string();
    assert_eq!(error, "the manifest's layers[1].size is missing or not a number of bytes");
}

#[test]
fn over_4_mib_is_refused_unread() {
    let bytes = vec![b'{'; MAX_DOCUMENT + 1];
    assert!(matches!(parse(&bytes, None), Err(ManifestError::TooLarge { .. })));
}

#[test]
fn artifacts_are_recognised() {
    let mut helm = oci();
    helm["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
    assert!(image(&helm).is_artifact());
    let mut typed = oci();
    typed["artifactType"] = "application/vnd.example".into();
    assert!(image(&typed).is_artifact());
}

#[test]
fn a_repeated_layer_keeps_both_positions() {
    let mut document = oci();
    document["layers"][1] = document["layers"][0].clone();
    let image = image(&document);
    assert_eq!(image.layers.len(), 2);
    let built = build(Family::Oci, Some(&image), &kept(&image));
    assert_eq!(built["layers"], document["layers"]);
}

#[test]
fn patching_keeps_unknown_keys_annotations_key_order_and_kept_descriptors() {
    let mut document = oci();
    document["layers"][0]["annotations"] = json!({"kept": "yes"});
    document["layers"][1]["annotations"] = json!({"toc": "of the old bytes"});
    document["config"]["annotations"] = json!({"stays": "too"});
    document["config"]["data"] = "b2xk".into();
    let source = image(&document);
    let layers = [
        ManifestLayer::Kept(&source.layers[0]),
        ManifestLayer::Written { format: Format::Gzip, blob: summary(7) },
    ];
    let mut expected = document.clone();
    expected["config"] = json!({"mediaType": media_type::OCI_CONFIG, "digest": summary(9).digest, "size": 9,
        "annotations": {"stays": "too"}});
    expected["layers"][1] = descriptor(OCI_GZIP, 7);
    let document =
        build_image_manifest(Family::Oci, Some(&source), &summary(9), &layers).expect("it can be written");
    let found = Value::from(document);
    assert_eq!(found, expected);
    let keys: Vec<_> = found.as_object().expect("an object").keys().cloned().collect();
    assert_eq!(keys, ["schemaVersion", "x-unknown", "config", "layers", "annotations"]);
}

#[test]
fn media_types_are_converted_between_the_families_and_back() {
    let docker_image = image(&docker());
    let as_oci = build(Family::Oci, Some(&docker_image), &kept(&docker_image));
    assert_eq!(as_oci["mediaType"], media_type::OCI_MANIFEST);
    assert_eq!(as_oci["config"]["mediaType"], media_type::OCI_CONFIG);
    assert_eq!(as_oci["layers"][0]["mediaType"], OCI_GZIP);

    let mut annotated = oci();
    annotated["layers"][0]["annotations"] = json!({"a": "b"});
    let oci_image = image(&annotated);
    let as_docker = build(Family::Docker, Some(&oci_image), &kept(&oci_image));
    let mut expected = docker();
    expected["config"] =
        json!({"mediaType": media_type::DOCKER_CONFIG, "digest": summary(9).digest, "size": 9});
    expected["x-unknown"] = json!([1]);
    assert_eq!(as_docker, expected);
}

#[test]
fn zstd_never_goes_into_docker_schema2() {
    let mut document = oci();
    document["layers"][1]["mediaType"] = OCI_ZSTD.into();
    let source = image(&document);
    assert_eq!(family_for(Family::Docker, &kept(&source)), Family::Oci);
    let error = build_image_manifest(Family::Docker, Some(&source), &summary(9), &kept(&source));
    assert!(matches!(error, Err(BuildError::Zstd(_))), "{error:?}");
    let written = [ManifestLayer::Written { format: Format::Zstd, blob: summary(1) }];
    assert_eq!(family_for(Family::Docker, &written), Family::Oci);
    assert!(build_image_manifest(Family::Docker, None, &summary(9), &written).is_err());
    assert_eq!(build(Family::Oci, None, &written)["layers"][0]["mediaType"], OCI_ZSTD);
}

#[test]
fn foreign_layers_keep_their_urls_in_either_family() {
    let mut document = docker();
    document["layers"][0]["mediaType"] = DOCKER_FOREIGN.into();
    document["layers"][0]["urls"] = json!(["https://example.com/layer"]);
    let source = image(&document);
    assert!(source.layers[0].is_foreign());
    assert_eq!(source.layers[0].urls, ["https://example.com/layer"]);
    let converted = build(Family::Oci, Some(&source), &kept(&source));
    assert_eq!(
        converted["layers"][0]["mediaType"],
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
    );
    assert_eq!(converted["layers"][0]["urls"], document["layers"][0]["urls"]);
}

#[test]
fn layers_of_an_unknown_type_stay_in_oci_and_have_no_place_in_docker() {
    let mut document = oci();
    document["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into();
    let source = image(&document);
    assert_eq!(build(Family::Oci, Some(&source), &kept(&source))["layers"], document["layers"]);
    let error = build_image_manifest(Family::Docker, Some(&source), &summary(9), &kept(&source));
    assert!(matches!(error, Err(BuildError::NoCounterpart { index: 0, .. })), "{error:?}");
}

#[test]
fn a_manifest_made_from_nothing_is_read_back() {
    let layers = [ManifestLayer::Written { format: Format::None, blob: summary(1) }];
    for family in [Family::Docker, Family::Oci] {
        let found = image(&build(family, None, &layers));
        assert_eq!((found.family, found.config.size, found.layers[0].size), (family, 9, 1));
    }
}

/// JSON of any shape that is made of the words that manifests are made of.
fn manifest_like() -> impl Strategy<Value = Value> {
    let key = proptest::sample::select(vec![
        "schemaVersion",
        "mediaType",
        "config",
        "layers",
        "manifests",
        "fsLayers",
        "history",
        "signatures",
        "digest",
        "size",
        "platform",
        "os",
        "architecture",
        "v1Compatibility",
        "blobSum",
        "protected",
        "urls",
        "annotations",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        (-1..4_i64).prop_map(Value::from),
        Just(Value::from(DOCKER_MANIFEST)),
        Just(Value::from(media_type::OCI_INDEX)),
        Just(Value::from(Digest::sha256([]).to_string())),
        Just(Value::from("{}")),
        Just(Value::from("eyJmb3JtYXRMZW5ndGgiOjk5OTk5OTk5OSwiZm9ybWF0VGFpbCI6IiJ9")),
    ];
    leaf.prop_recursive(5, 64, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((key.clone(), inner), 0..6)
                .prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = parse(&bytes, None);
    }

    #[test]
    fn arbitrary_documents_never_panic_and_images_are_rebuilt(document in manifest_like()) {
        for content_type in ACCEPTED.iter().map(|name| Some(*name)).chain([None]) {
            if let Ok(ParsedManifest::Image(image)) = read(&document, content_type) {
                for family in [Family::Docker, Family::Oci] {
                    let _ = build_image_manifest(family, Some(&image), &summary(9), &kept(&image));
                }
            }
        }
    }
}

const ACCEPTED: [&str; 6] = media_type::ACCEPTED_MANIFESTS;
