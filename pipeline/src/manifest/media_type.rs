//! The media types of manifests, configs and layers, and what each says.
//!
//! Names are image-spec's `media-types.md` and docker's `manifest-v2-2.md`; zstd in docker's name is containerd's invention,
//! which is read but never written.

use std::fmt;

use crate::compression::Format;

/// Docker image manifest, version 2, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_MANIFEST_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image manifest, schema 1, unsigned.
pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
/// Docker image manifest, schema 1, signed.
pub const DOCKER_SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// Every manifest type that we read, the preferred first: the parts of an `Accept` header.
pub const ACCEPTED_MANIFESTS: [&str; 6] =
    [OCI_INDEX, OCI_MANIFEST, DOCKER_MANIFEST_LIST, DOCKER_MANIFEST, DOCKER_SCHEMA1_SIGNED, DOCKER_SCHEMA1];

/// Which of the two vocabularies a document is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Docker's schema 2 and manifest lists.
    Docker,
    /// The OCI image-spec's.
    Oci,
}

impl Family {
    /// The media type of an image manifest.
    pub fn manifest(self) -> &'static str {
        match self {
            Self::Docker => DOCKER_MANIFEST,
            Self::Oci => OCI_MANIFEST,
        }
    }

    /// The media type of an index or manifest list.
    pub fn index(self) -> &'static str {
        match self {
            Self::Docker => DOCKER_MANIFEST_LIST,
            Self::Oci => OCI_INDEX,
        }
    }

    /// The media type of an image's config.
    pub fn config(self) -> &'static str {
        match self {
            Self::Docker => DOCKER_CONFIG,
            Self::Oci => OCI_CONFIG,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Docker => "docker",
            Self::Oci => "oci",
        })
    }
}

/// What a layer's media type says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerType {
    /// Whose name it is.
    pub family: Family,
    /// How the bytes claim to be compressed; the bytes themselves have the last word.
    pub format: Format,
    /// Docker's "foreign", OCI's "nondistributable": the bytes live at the descriptor's `urls`.
    pub foreign: bool,
}

/// Docker's media types have no name for a layer that is compressed with zstd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("docker schema2 cannot name zstd layers: choose gzip, or the oci format")]
pub struct ZstdInDocker;

const LAYER_TYPES: [(&str, LayerType); 12] = {
    const fn layer(family: Family, format: Format, foreign: bool) -> LayerType {
        LayerType { family, format, foreign }
    }
    use Family::{Docker, Oci};
    use Format::{Gzip, None, Zstd};
    [
        ("application/vnd.oci.image.layer.v1.tar", layer(Oci, None, false)),
        ("application/vnd.oci.image.layer.v1.tar+gzip", layer(Oci, Gzip, false)),
        ("application/vnd.oci.image.layer.v1.tar+zstd", layer(Oci, Zstd, false)),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", layer(Oci, None, true)),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", layer(Oci, Gzip, true)),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", layer(Oci, Zstd, true)),
        ("application/vnd.docker.image.rootfs.diff.tar", layer(Docker, None, false)),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", layer(Docker, Gzip, false)),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar", layer(Docker, None, true)),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", layer(Docker, Gzip, true)),
        // Read only: containerd writes these two, nothing else reads them.
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", layer(Docker, Zstd, false)),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.zstd", layer(Docker, Zstd, true)),
    ]
};

impl LayerType {
    /// What a media type says; `None` for one that is not a layer's, such as an encrypted layer's or an artifact's.
    pub fn of(media_type: &str) -> Option<Self> {
        LAYER_TYPES.iter().find(|(name, _)| *name == media_type).map(|(_, layer)| *layer)
    }

    /// A distributable layer.
    pub fn new(family: Family, format: Format) -> Self {
        Self { family, format, foreign: false }
    }

    /// The same layer in the other vocabulary.
    pub fn in_family(self, family: Family) -> Self {
        Self { family, ..self }
    }

    /// The media type.
    pub fn name(self) -> Result<&'static str, ZstdInDocker> {
        if (self.family, self.format) == (Family::Docker, Format::Zstd) {
            return Err(ZstdInDocker);
        }
        let (name, _) =
            LAYER_TYPES.iter().find(|(_, layer)| *layer == self).expect("the table names every combination");
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_type_but_dockers_zstd_has_a_name_that_reads_back() {
        for family in [Family::Docker, Family::Oci] {
            for format in [Format::None, Format::Gzip, Format::Zstd] {
                for foreign in [false, true] {
                    let layer = LayerType { family, format, foreign };
                    match layer.name() {
                        Ok(name) => assert_eq!(LayerType::of(name), Some(layer)),
                        Err(ZstdInDocker) => assert_eq!((family, format), (Family::Docker, Format::Zstd)),
                    }
                }
            }
        }
    }

    #[test]
    fn foreign_layers_are_recognised_in_both_families() {
        for name in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        ] {
            assert!(LayerType::of(name).is_some_and(|layer| layer.foreign), "{name}");
        }
    }

    #[test]
    fn encrypted_and_artifact_layers_are_not_image_layers() {
        for name in ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "application/wasm", ""] {
            assert_eq!(LayerType::of(name), None, "{name}");
        }
    }
}
