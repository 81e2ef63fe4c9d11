//! Saved tars, in the forms that docker and containerd write, and as an independent tar reads what we wrote.

use std::path::Path;

use serde_json::{Value, json};

use crate::certificates::text;
use crate::image::{Image, json_of};
use crate::layer::Member;
use crate::tools::{hex, read, sha256, tool};

/// Images with their names.
pub type Named<'a> = [(&'a Image, &'a [&'a str])];

/// `docker save` before version 25: a directory a layer, `manifest.json` behind them.
pub fn docker_v12(images: &Named<'_>) -> Vec<Member> {
    let mut members = Vec::new();
    let mut list = Vec::new();
    for (image, names) in images {
        let mut layers = Vec::new();
        for (index, layer) in image.layers.iter().enumerate() {
            let id = sha256(format!("{index}{}", image.config_digest()).as_bytes());
            let id = hex(&id);
            members.push(Member::dir(id));
            members.push(Member::file(&format!("{id}/VERSION"), "1.0"));
            members.push(Member::file(&format!("{id}/json"), json!({"id": id}).to_string()));
            members.push(Member::file(&format!("{id}/layer.tar"), &layer.tar));
            layers.push(format!("{id}/layer.tar"));
        }
        let config = format!("{}.json", hex(&image.config_digest()));
        members.push(Member::file(&config, &image.config));
        list.push(json!({"Config": config, "RepoTags": names, "Layers": layers}));
    }
    members.push(Member::file("manifest.json", Value::from(list).to_string()));
    members.push(Member::file("repositories", "{}"));
    members
}

/// `docker save` from version 25 on: an OCI layout of uncompressed layers, with `manifest.json`.
pub fn docker_v25(images: &Named<'_>) -> Vec<Member> {
    layout(images, false)
}

/// `docker save` with the containerd image store: layers as stored, an index in the index.
pub fn containerd(images: &Named<'_>) -> Vec<Member> {
    layout(images, true)
}

fn layout(images: &Named<'_>, stored: bool) -> Vec<Member> {
    let mut members = vec![Member::dir("blobs"), Member::dir("blobs/sha256")];
    let mut blobs = std::collections::BTreeMap::new();
    let mut put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        blobs.insert(digest.clone(), bytes.to_vec());
        digest
    };
    let (mut list, mut top) = (Vec::new(), Vec::new());
    for (image, names) in images {
        let mut descriptors = Vec::new();
        for layer in &image.layers {
            let bytes = if stored { layer.blob() } else { layer.tar.clone() };
            let kind = if stored {
                "application/vnd.oci.image.layer.v1.tar+gzip"
            } else {
                "application/vnd.oci.image.layer.v1.tar"
            };
            descriptors.push(json!({"mediaType": kind, "size": bytes.len(), "digest": put(&bytes)}));
        }
        let config = put(&image.config);
        let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": image.config.len(), "digest": config},
            "layers": descriptors})
        .to_string();
        let mut entry = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": manifest.len(),
            "digest": put(manifest.as_bytes())});
        if stored {
            entry["platform"] = json!({"os": "linux", "architecture": "amd64"});
            let nested = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]});
            let nested = nested.to_string();
            entry = json!({"mediaType": "application/vnd.oci.image.index.v1+json", "size": nested.len(),
                "digest": put(nested.as_bytes())});
        }
        for name in *names {
            entry["annotations"] = json!({"io.containerd.image.name": format!("docker.io/library/{name}")});
            top.push(entry.clone());
        }
        let paths: Vec<String> = descriptors
            .iter()
            .map(|descriptor| {
                format!("blobs/sha256/{}", hex(descriptor["digest"].as_str().expect("a digest")))
            })
            .collect();
        list.push(
            json!({"Config": format!("blobs/sha256/{}", hex(&config)), "RepoTags": names, "Layers": paths}),
        );
    }
    for (digest, bytes) in &blobs {
        members.push(Member::file(&format!("blobs/sha256/{}", hex(digest)), bytes));
    }
    let index =
        json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": top});
    members.push(Member::file("index.json", index.to_string()));
    members.push(Member::file("manifest.json", Value::from(list).to_string()));
    members.push(Member::file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#));
    members
}

/// One image of a saved tar, found consistent.
#[derive(Clone, Debug)]
pub struct Saved {
    /// The names.
    pub names: Vec<String>,
    /// The config's bytes.
    pub config: Vec<u8>,
    /// The layers' paths in the tar, in order.
    pub paths: Vec<String>,
    /// The layers' tars, in order.
    pub tars: Vec<Vec<u8>>,
    /// All members' names, in the file's order.
    pub members: Vec<String>,
}

/// Unpacks a saved tar of one image with GNU tar; checks that the config's name is its hash and every diff_id its layer's.
pub fn read_saved(path: &Path) -> Saved {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (file, into) = (text(path), text(directory.path()));
    tool("tar", ["-xf", &file, "-C", &into]);
    let members = tool("tar", ["-tf", &file]).lines().map(str::to_owned).collect();
    let list = json_of(&read(directory.path().join("manifest.json")));
    let images = list.as_array().expect("manifest.json is a list");
    assert_eq!(images.len(), 1, "one image: {list}");
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let image = &images[0];
    let name = image["Config"].as_str().expect("a path");
    let config = read(directory.path().join(name));
    assert!(name.contains(hex(&sha256(&config))), "{name} is not named by its hash {}", sha256(&config));
    let paths = texts(&image["Layers"]);
    let tars: Vec<Vec<u8>> = paths.iter().map(|path| read(directory.path().join(path))).collect();
    let computed: Vec<String> = tars.iter().map(|tar| sha256(tar)).collect();
    assert_eq!(
        json_of(&config)["rootfs"]["diff_ids"],
        Value::from(computed),
        "diff_ids of {}",
        path.display()
    );
    Saved { names: texts(&image["RepoTags"]), config, paths, tars, members }
}
