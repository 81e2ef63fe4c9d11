//! The data of the distribution specification's own conformance suite (`conformance/run.go`), made here likewise: images, indexes
//! and artifacts of every shape that the specification allows, odd ones above all.

use serde_json::{Value, json};

use crate::conforming::{Conforming, digest_of};
use crate::image::Family;
use crate::layer::{Layer, Member};
use crate::tools::{Packing, sha256};

const EMPTY_JSON: &str = "application/vnd.oci.empty.v1+json";
const EXAMPLE: &str = "application/vnd.example.oci.conformance";

/// One set of the suite's data: a repository of it.
#[derive(Clone, Debug, Default)]
pub struct Data {
    /// What the suite calls it; the name of the repository too.
    pub name: &'static str,
    /// By digest.
    pub blobs: Vec<(String, Vec<u8>)>,
    /// Digest, media type and bytes; what others name comes before those.
    pub manifests: Vec<(String, &'static str, Vec<u8>)>,
    /// Tags, or digests of what has none, of what a client copies by itself.
    pub roots: Vec<String>,
    /// The digest of each tag.
    tags: Vec<(String, String)>,
    /// Whether it names what is not there.
    pub is_sparse: bool,
    /// Whether its manifests are called by digests that docker-registry does not know for manifests.
    pub is_rare: bool,
    algorithm: &'static str,
}

impl Data {
    fn new(name: &'static str) -> Self {
        Self { name, algorithm: "sha256", ..Self::default() }
    }

    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = digest_of(self.algorithm, bytes);
        if self.blobs.iter().all(|(other, _)| *other != digest) {
            self.blobs.push((digest.clone(), bytes.to_vec()));
        }
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    fn manifest(&mut self, media_type: &'static str, document: &Value) -> Value {
        let bytes = serde_json::to_vec(document).expect("JSON");
        let digest = digest_of(self.algorithm, &bytes);
        let size = bytes.len();
        self.manifests.push((digest.clone(), media_type, bytes));
        json!({"mediaType": media_type, "digest": digest, "size": size})
    }

    /// An image of so many layers; `edit` changes its manifest.
    fn image(
        &mut self,
        architecture: &str,
        packing: Packing,
        layers: u64,
        edit: impl FnOnce(&mut Value),
    ) -> Value {
        let seed = self.manifests.len() as u64 * 10;
        let layers: Vec<Layer> = (0..layers)
            .map(|at| {
                Layer::of(&[Member::file("file", format!("{} {}", self.name, seed + at))]).packed(packing)
            })
            .collect();
        let diff_ids: Vec<_> = layers.iter().map(|layer| digest_of(self.algorithm, &layer.tar)).collect();
        let config = json!({
            "author": "OCI Conformance Test", "os": "linux", "architecture": architecture,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob(Family::Oci.config(), config.to_string().as_bytes());
        let layers: Vec<_> =
            layers.iter().map(|layer| self.blob(&Family::Oci.layer(packing, false), &layer.blob())).collect();
        let mut document = json!({"schemaVersion": 2, "mediaType": Family::Oci.manifest(), "config": config, "layers": layers});
        edit(&mut document);
        let mut entry = self.manifest(Family::Oci.manifest(), &document);
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entry
    }

    fn plain(&mut self, architecture: &str) -> Value {
        self.image(architecture, Packing::Gzip, 2, |_| ())
    }

    /// An artifact, of one blob.
    fn artifact(&mut self, layer_type: &str, content: &[u8], edit: impl FnOnce(&mut Value)) -> Value {
        let config = self.blob(EMPTY_JSON, b"{}");
        let layer = self.blob(layer_type, content);
        let mut document = json!({
            "schemaVersion": 2, "mediaType": Family::Oci.manifest(), "artifactType": EXAMPLE, "config": config,
            "layers": [layer],
        });
        edit(&mut document);
        self.manifest(Family::Oci.manifest(), &document)
    }

    fn index(&mut self, manifests: &[Value], edit: impl FnOnce(&mut Value)) -> Value {
        let mut document =
            json!({"schemaVersion": 2, "mediaType": Family::Oci.index(), "manifests": manifests});
        edit(&mut document);
        self.manifest(Family::Oci.index(), &document)
    }

    fn tag(mut self, tag: &str, entry: &Value) -> Self {
        self.tags.push((tag.to_owned(), entry["digest"].as_str().expect("a digest").to_owned()));
        self.roots.push(tag.to_owned());
        self
    }

    fn sparse(self) -> Self {
        Self { is_sparse: true, ..self }
    }

    /// Puts it where it is, whatever is not there.
    pub fn put_into(&self, registry: &Conforming) {
        for (digest, bytes) in &self.blobs {
            registry.add_blob(self.name, digest, bytes);
        }
        for (digest, media_type, bytes) in &self.manifests {
            registry.add_manifest(self.name, digest, media_type, bytes);
            for (tag, _) in self.tags.iter().filter(|(_, named)| named == digest) {
                registry.add_manifest(self.name, tag, media_type, bytes);
            }
        }
    }

    /// The digest that a root means.
    pub fn digest(&self, root: &str) -> String {
        let tagged = self.tags.iter().find(|(tag, _)| tag == root);
        tagged.map_or(root, |(_, digest)| digest).to_owned()
    }

    /// Every manifest and blob that a root leads to and that there is: digest, whether it is a manifest, and bytes.
    pub fn reached(&self, root: &str) -> Vec<(String, bool, &[u8])> {
        let mut reached = Vec::new();
        let mut waiting = vec![self.digest(root)];
        while let Some(digest) = waiting.pop() {
            if let Some((_, _, bytes)) = self.manifests.iter().find(|(other, ..)| *other == digest) {
                let document: Value = serde_json::from_slice(bytes).expect("JSON");
                let lists =
                    ["manifests", "layers"].map(|key| document[key].as_array().cloned().unwrap_or_default());
                let named = lists.into_iter().flatten().chain(document.get("config").cloned());
                waiting.extend(named.filter_map(|one| one["digest"].as_str().map(str::to_owned)));
                reached.push((digest, true, bytes.as_slice()));
            } else if let Some((_, bytes)) = self.blobs.iter().find(|(other, _)| *other == digest) {
                reached.push((digest, false, bytes.as_slice()));
            }
        }
        reached
    }
}

/// All of the suite's data.
pub fn all() -> Vec<Data> {
    let mut all = vec![
        made("image", |data| vec![("image", data.plain("amd64"))]),
        made("image-uncompressed", |data| {
            vec![("image-uncompressed", data.image("amd64", Packing::Plain, 2, |_| ()))]
        }),
        made("large-manifest", |data| {
            let annotations: Value = (0..390)
                .map(|at| (format!("large-annotation-{at}"), Value::from("A".repeat(10_000))))
                .collect::<serde_json::Map<_, _>>()
                .into();
            vec![(
                "large-manifest",
                data.image("amd64", Packing::Gzip, 1, |image| image["annotations"] = annotations),
            )]
        }),
        made("index", |data| {
            let images = [data.plain("amd64"), data.plain("arm64")];
            vec![("index", data.index(&images, |_| ()))]
        }),
        made("nested-index", |data| {
            let images =
                [data.plain("amd64"), data.plain("arm64"), data.plain("s390x"), data.plain("ppc64le")];
            let indexes = [data.index(&images[..2], |_| ()), data.index(&images[2..], |_| ())];
            vec![("index-of-index", data.index(&indexes, |_| ()))]
        }),
        made("empty-index", |data| vec![("index", data.index(&[], |_| ()))]),
        made("artifact", |data| vec![("artifact", data.artifact(EXAMPLE, b"content", |_| ()))]),
        made("artifact-index", |data| {
            let artifacts = [data.artifact(EXAMPLE, b"one", |_| ()), data.artifact(EXAMPLE, b"two", |_| ())];
            vec![("artifact-index", data.index(&artifacts, |index| index["artifactType"] = EXAMPLE.into()))]
        }),
        made("artifact-without-layers", |data| {
            vec![("artifact-without-layers", data.artifact(EMPTY_JSON, b"{}", |_| ()))]
        }),
        made("artifacts-with-subject", |data| {
            let image = data.plain("amd64");
            let subject = subject_of(&image);
            let one = data.artifact(EXAMPLE, b"1", |artifact| artifact["subject"] = subject.clone());
            let two = data.artifact("application/octet-stream", b"2", |artifact| {
                artifact["subject"] = subject.clone();
                artifact["annotations"] = json!({"org.opencontainers.conformance": "hello conformance test"});
            });
            data.image("arm64", Packing::Gzip, 1, |image| image["subject"] = subject);
            vec![("image", image), ("tagged-artifact1", one), ("tagged-artifact2", two)]
        }),
        made("index-with-subject", |data| {
            let images = [data.plain("amd64"), data.plain("arm64")];
            let index = data.index(&images, |_| ());
            let artifacts = [data.artifact(EXAMPLE, b"sbom", |_| ())];
            let subject = subject_of(&index);
            let tagged = data.index(&artifacts, |index| {
                index["artifactType"] = EXAMPLE.into();
                index["subject"] = subject;
            });
            vec![("index", index), ("tagged-artifact", tagged)]
        }),
        made("missing-subject", |data| {
            let subject = json!({
                "mediaType": Family::Oci.manifest(), "size": 123, "digest": sha256(b"missing content"),
            });
            let artifact = data.artifact(EXAMPLE, b"content", |artifact| artifact["subject"] = subject);
            vec![("tagged-artifact", artifact)]
        }),
        made("data-field", |data| {
            let entry = data.artifact(EMPTY_JSON, b"{}", |artifact| {
                artifact["config"]["data"] = "e30=".into();
                artifact["layers"][0]["data"] = "e30=".into();
            });
            vec![("data-field", entry)]
        }),
        made("non-distributable-layers", |data| {
            let elsewhere = |bytes: &[u8], packing| {
                json!({"mediaType": Family::Oci.layer(packing, true), "digest": sha256(bytes), "size": 12345,
                       "urls": [format!("https://store.example.com/blobs/{}", sha256(bytes))]})
            };
            let layers = [elsewhere(b"gzipped", Packing::Gzip), elsewhere(b"plain", Packing::Plain)];
            let entry = data.image("amd64", Packing::Gzip, 1, |image| {
                let list = image["layers"].as_array_mut().expect("a list");
                list.splice(0..0, layers);
            });
            vec![("non-distributable-image", entry)]
        }),
        made("custom-fields", |data| {
            let custom = |document: &mut Value| {
                document["org.example.custom"] = json!({"b": [1.50, null], "a": "<&>"});
                if let Some(config) = document.get_mut("config") {
                    config["org.example.custom"] = "in a descriptor".into();
                }
            };
            let images =
                ["amd64", "arm64"].map(|architecture| data.image(architecture, Packing::Gzip, 1, custom));
            vec![("custom-fields", data.index(&images, custom))]
        }),
        made("no-layers", |data| vec![("no-layers", data.image("amd64", Packing::Gzip, 0, |_| ()))]),
        made("empty-blob", |data| vec![("empty-blob", data.artifact(EXAMPLE, b"", |_| ()))]),
        made("sparse-index", |data| {
            let gone = json!({"mediaType": Family::Oci.manifest(), "size": 1024, "digest": sha256(b"gone"),
                              "platform": {"os": "linux", "architecture": "arm64"}});
            let images = [data.plain("amd64"), gone];
            vec![("sparse-index", data.index(&images, |_| ()))]
        })
        .sparse(),
    ];
    let mut sparse_image = made("sparse-image", |data| vec![("sparse-image", data.plain("amd64"))]).sparse();
    // The last blob is a layer's.
    sparse_image.blobs.pop();
    all.push(sparse_image);
    let mut rare = Data { algorithm: "sha512", is_rare: true, ..Data::new("sha512") };
    let images = [rare.plain("amd64"), rare.plain("arm64")];
    let index = rare.index(&images, |_| ());
    // A tag is only ever the name of a manifest by the registry's own algorithm.
    rare.roots.push(index["digest"].as_str().expect("a digest").to_owned());
    all.push(rare);
    let mut blobs = Data { algorithm: "sha512", ..Data::new("sha512-blobs") };
    let image = blobs.plain("amd64");
    let (_, media_type, bytes) = blobs.manifests.pop().expect("the image");
    blobs.manifests.push((sha256(&bytes), media_type, bytes));
    drop(image);
    let entry = json!({"digest": blobs.manifests[0].0});
    all.push(blobs.tag("sha512-blobs", &entry));
    all
}

fn made(name: &'static str, make: impl FnOnce(&mut Data) -> Vec<(&'static str, Value)>) -> Data {
    let mut data = Data::new(name);
    let tagged = make(&mut data);
    tagged.iter().fold(data, |data, (tag, entry)| data.tag(tag, entry))
}

fn subject_of(entry: &Value) -> Value {
    json!({"mediaType": entry["mediaType"], "digest": entry["digest"], "size": entry["size"]})
}
