//! Images: layers, a config and a manifest that fit together until a test changes one of them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::layer::Layer;
use crate::tools::{Packing, sha256};

/// Whose media types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Docker's, schema 2.
    Docker,
    /// OCI's.
    Oci,
}

impl Family {
    /// Of an image manifest.
    pub fn manifest(self) -> &'static str {
        match self {
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
        }
    }

    /// Of an index.
    pub fn index(self) -> &'static str {
        match self {
            Self::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
            Self::Oci => "application/vnd.oci.image.index.v1+json",
        }
    }

    /// Of a config.
    pub fn config(self) -> &'static str {
        match self {
            Self::Docker => "application/vnd.docker.container.image.v1+json",
            Self::Oci => "application/vnd.oci.image.config.v1+json",
        }
    }

    /// Of a layer.
    pub fn layer(self, packing: Packing, foreign: bool) -> String {
        let zstd = matches!(packing, Packing::Zstd | Packing::ZstdFrames);
        let plain = packing == Packing::Plain;
        match self {
            Self::Docker => format!(
                "application/vnd.docker.image.rootfs.{}diff.tar{}",
                if foreign { "foreign." } else { "" },
                if plain {
                    ""
                } else if zstd {
                    ".zstd"
                } else {
                    ".gzip"
                }
            ),
            Self::Oci => format!(
                "application/vnd.oci.image.layer.{}v1.tar{}",
                if foreign { "nondistributable." } else { "" },
                if plain {
                    ""
                } else if zstd {
                    "+zstd"
                } else {
                    "+gzip"
                }
            ),
        }
    }
}

/// An image with everything that a registry has of it.
#[derive(Clone, Debug)]
pub struct Image {
    /// Of the manifest.
    pub family: Family,
    /// The lowest first.
    pub layers: Vec<Layer>,
    /// The config as it is stored.
    pub config: Vec<u8>,
    /// The manifest as it is stored.
    pub manifest: Vec<u8>,
    /// By digest: config and layers, without foreign ones.
    pub blobs: BTreeMap<String, Vec<u8>>,
}

impl Image {
    /// An image for linux/amd64.
    pub fn new(family: Family, layers: Vec<Layer>) -> Self {
        Self::on(family, ("linux", "amd64", None), layers)
    }

    /// A gzipped docker image.
    pub fn docker(layers: Vec<Layer>) -> Self {
        Self::new(Family::Docker, layers)
    }

    /// A gzipped OCI image.
    pub fn oci(layers: Vec<Layer>) -> Self {
        Self::new(Family::Oci, layers)
    }

    /// An image for a platform.
    pub fn on(family: Family, platform: (&str, &str, Option<&str>), layers: Vec<Layer>) -> Self {
        let diff_ids: Vec<String> = layers.iter().map(|layer| sha256(&layer.tar)).collect();
        let mut history: Vec<Value> = (0..layers.len())
            .map(|at| json!({"created": "2023-11-14T22:13:20Z", "created_by": format!("ADD layer {at}")}))
            .collect();
        history.push(json!({"created": "2023-11-14T22:13:21Z", "created_by": "CMD", "empty_layer": true}));
        // The key order is no writer's, and one key is nobody's: neither may change on the way.
        let mut config = json!({
            "os": platform.0, "architecture": platform.1, "created": "2023-11-14T22:13:20.123456789Z",
            "config": {"Cmd": ["/bin/hello"], "Env": ["PATH=/bin", "MARK=<&>"], "Labels": {"z": "1", "a": "2"}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history, "x-unknown": {"b": 1, "a": [1.5]},
        });
        if let Some(variant) = platform.2 {
            config["variant"] = variant.into();
        }
        let mut image =
            Self { family, layers, config: Vec::new(), manifest: Vec::new(), blobs: BTreeMap::new() };
        let mut descriptors = Vec::new();
        for layer in &image.layers {
            let blob = layer.blob();
            let digest = sha256(&blob);
            let foreign = !layer.urls.is_empty();
            let mut descriptor = json!({"mediaType": family.layer(layer.packing, foreign), "size": blob.len(), "digest": digest});
            if foreign {
                descriptor["urls"] = json!(layer.urls);
            } else {
                image.blobs.insert(digest, blob);
            }
            for (key, value) in &layer.annotations {
                descriptor["annotations"][key] = value.as_str().into();
            }
            descriptors.push(descriptor);
        }
        let config_type = json!({"mediaType": family.config()});
        let manifest = json!({"schemaVersion": 2, "mediaType": family.manifest(), "config": config_type, "layers": descriptors});
        image.manifest = pretty(&manifest);
        image.set_config(config.to_string().into_bytes());
        image
    }

    /// The digest of the manifest.
    pub fn digest(&self) -> String {
        sha256(&self.manifest)
    }

    /// The digest of the config.
    pub fn config_digest(&self) -> String {
        sha256(&self.config)
    }

    /// The digests of the layers' tars.
    pub fn diff_ids(&self) -> Vec<String> {
        self.layers.iter().map(|layer| sha256(&layer.tar)).collect()
    }

    /// The digests of the layers as stored.
    pub fn layer_digests(&self) -> Vec<String> {
        let manifest = json_of(&self.manifest);
        let layers = manifest["layers"].as_array().expect("a list of layers");
        layers.iter().map(|layer| layer["digest"].as_str().expect("a digest").to_owned()).collect()
    }

    /// Changes the config, and the manifest with it.
    #[must_use]
    pub fn edit_config(mut self, edit: impl FnOnce(&mut Value)) -> Self {
        let mut config = json_of(&self.config);
        edit(&mut config);
        self.set_config(config.to_string().into_bytes());
        self
    }

    /// Changes the manifest alone.
    #[must_use]
    pub fn edit_manifest(mut self, edit: impl FnOnce(&mut Value)) -> Self {
        let mut manifest = json_of(&self.manifest);
        edit(&mut manifest);
        self.manifest = pretty(&manifest);
        self
    }

    fn set_config(&mut self, bytes: Vec<u8>) {
        self.blobs.remove(&sha256(&self.config));
        let digest = sha256(&bytes);
        let mut manifest = json_of(&self.manifest);
        manifest["config"]["size"] = bytes.len().into();
        manifest["config"]["digest"] = digest.as_str().into();
        self.manifest = pretty(&manifest);
        self.blobs.insert(digest, bytes.clone());
        self.config = bytes;
    }
}

/// An index of images.
#[derive(Clone, Debug)]
pub struct Index {
    /// Of the index.
    pub family: Family,
    /// The images in order.
    pub images: Vec<Image>,
    /// The index as it is stored.
    pub manifest: Vec<u8>,
}

impl Index {
    /// An index of images, each with its `platform` object; `null` for none.
    pub fn new(family: Family, entries: Vec<(Value, Image)>) -> Self {
        let descriptors: Vec<Value> = entries
            .iter()
            .map(|(platform, image)| {
                let mut entry = json!({"mediaType": image.family.manifest(), "size": image.manifest.len(), "digest": image.digest()});
                if !platform.is_null() {
                    entry["platform"] = platform.clone();
                }
                entry
            })
            .collect();
        let manifest =
            pretty(&json!({"schemaVersion": 2, "mediaType": family.index(), "manifests": descriptors}));
        Self { family, images: entries.into_iter().map(|(_, image)| image).collect(), manifest }
    }
}

/// Parses JSON that a test knows to be JSON.
pub fn json_of(bytes: &[u8]) -> Value {
    if bytes.is_empty() {
        return json!({});
    }
    serde_json::from_slice(bytes)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(bytes)))
}

/// Not compact: who re-serialises it changes its digest.
pub fn pretty(value: &Value) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("a value serialises")
}
