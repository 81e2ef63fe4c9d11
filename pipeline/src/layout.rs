//! OCI image layouts (image-spec, `image-layout.md`): what a directory or tar of blobs is called inside, and which of the
//! entries of its `index.json` a name means. Pure: [`crate::source::oci_layout`] reads layouts, [`crate::output::oci_layout`]
//! writes them.

use crate::digest::Digest;
use crate::manifest::Descriptor;
use crate::reference::Reference;

/// The file that says that a directory is a layout, and of which version.
pub const MARKER: &str = "oci-layout";
/// What stands in it.
pub const MARKER_CONTENT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
/// The file that names the images.
pub const INDEX: &str = "index.json";
/// The annotation of an entry with its tag, or whatever else it was called by.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation of an entry with its name in full, which containerd and Docker write and read.
pub const IMAGE_NAME: &str = "io.containerd.image.name";

/// Where a blob lies in a layout. A digest is well formed, so this cannot lead anywhere else.
pub fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// Which of a layout's images is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Its tag, or its name in full.
    pub tag: Option<String>,
    /// The digest of its manifest.
    pub digest: Option<Digest>,
}

/// What a [`Choice`] means in an `index.json`.
#[derive(Clone, Debug, PartialEq)]
pub enum Chosen<'a> {
    /// One entry.
    Entry(&'a Descriptor),
    /// All of them: entries that nothing names are the images of one index.
    All,
}

impl Choice {
    /// What is meant among `entries`; None where that is nothing, or not clear.
    ///
    /// A tag means the entry that is called so, by itself or at the end of its full name. Without a tag the only entry is
    /// meant, or all, if none has a name; what is called like the digest of another belongs to that, and is not looked at.
    pub fn among<'a>(&self, entries: &'a [Descriptor]) -> Option<Chosen<'a>> {
        if let Some(digest) = &self.digest {
            return entries.iter().find(|entry| entry.digest == *digest).map(Chosen::Entry);
        }
        if let Some(tag) = &self.tag {
            let exact: Vec<_> = entries.iter().filter(|entry| names(entry).any(|name| name == tag)).collect();
            let means = |entry: &&Descriptor| names(entry).any(|name| is_called(name, tag));
            let found = if exact.is_empty() { entries.iter().filter(means).collect() } else { exact };
            let first = *found.first()?;
            return found.iter().all(|other| other.digest == first.digest).then_some(Chosen::Entry(first));
        }
        let own: Vec<&Descriptor> = entries.iter().filter(|entry| !belongs_to_another(entry)).collect();
        match own.as_slice() {
            [entry] => Some(Chosen::Entry(entry)),
            [first, rest @ ..] if rest.iter().all(|entry| entry.digest == first.digest) => {
                Some(Chosen::Entry(first))
            }
            [_, ..] if entries.iter().all(|entry| names(entry).next().is_none()) => Some(Chosen::All),
            _ => None,
        }
    }
}

/// Whether an entry is the index of another's referrers (`sha256-HEX`), or one of cosign's (`sha256-HEX.sig`).
fn belongs_to_another(entry: &Descriptor) -> bool {
    names(entry).next().is_some()
        && names(entry).all(|name| {
            let name = name.split_once('.').map_or(name, |(name, _)| name);
            let (algorithm, hex) = name.split_once('-').unwrap_or_default();
            ["sha256", "sha512"].contains(&algorithm)
                && hex.len() == 64
                && hex.bytes().all(|b| b.is_ascii_hexdigit())
        })
}

/// What an entry is called.
pub fn names(entry: &Descriptor) -> impl Iterator<Item = &str> {
    [IMAGE_NAME, REF_NAME].into_iter().filter_map(|key| entry.annotations.get(key)).map(String::as_str)
}

/// Whether `wanted` means `name`: `1.0` and `app:1.0` both mean `docker.io/library/app:1.0`.
fn is_called(name: &str, wanted: &str) -> bool {
    let Ok(name) = name.parse::<Reference>() else { return false };
    name.tag().is_some_and(|tag| tag.as_str() == wanted)
        || wanted.contains([':', '/']) && wanted.parse::<Reference>().is_ok_and(|wanted| wanted == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{ParsedManifest, parse};
    use serde_json::json;

    fn entries(annotations: &[serde_json::Value]) -> Vec<Descriptor> {
        let manifests: Vec<_> = annotations
            .iter()
            .enumerate()
            .map(|(number, annotations)| {
                json!({
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "digest": Digest::sha256([u8::try_from(number).unwrap()]),
                    "size": 1,
                    "annotations": annotations,
                })
            })
            .collect();
        let index = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
        match parse(index.as_bytes(), None).unwrap() {
            ParsedManifest::Index(index) => index.manifests,
            other => panic!("{other:?}"),
        }
    }

    fn chosen(entries: &[Descriptor], tag: Option<&str>) -> Option<usize> {
        let choice = Choice { tag: tag.map(str::to_owned), digest: None };
        match choice.among(entries)? {
            Chosen::Entry(entry) => entries.iter().position(|other| other == entry),
            Chosen::All => Some(usize::MAX),
        }
    }

    #[test]
    fn a_tag_means_the_entry_that_is_called_so_alone_or_in_full() {
        let entries = entries(&[
            json!({REF_NAME: "1.0"}),
            json!({REF_NAME: "2.0", IMAGE_NAME: "docker.io/library/app:2.0"}),
            json!({REF_NAME: "localhost:5000/other:3.0"}),
        ]);
        assert_eq!(chosen(&entries, Some("1.0")), Some(0));
        assert_eq!(chosen(&entries, Some("2.0")), Some(1));
        assert_eq!(chosen(&entries, Some("app:2.0")), Some(1));
        assert_eq!(chosen(&entries, Some("3.0")), Some(2));
        assert_eq!(chosen(&entries, Some("localhost:5000/other:3.0")), Some(2));
        assert_eq!(chosen(&entries, Some("4.0")), None);
        assert_eq!(chosen(&entries, None), None, "three images, and no word on which");
    }

    #[test]
    fn a_tag_that_two_images_have_is_not_clear() {
        let entries = entries(&[json!({IMAGE_NAME: "a.io/x:1"}), json!({IMAGE_NAME: "b.io/x:1"})]);
        assert_eq!(chosen(&entries, Some("1")), None);
        assert_eq!(chosen(&entries, Some("b.io/x:1")), Some(1));
        // Neither when both are also called so alone.
        let both = |name: &str| json!({IMAGE_NAME: name, REF_NAME: "1"});
        let entries = self::entries(&[both("a.io/x:1"), both("b.io/x:1")]);
        assert_eq!(chosen(&entries, Some("1")), None);
        assert_eq!(chosen(&entries, Some("b.io/x:1")), Some(1));
    }

    #[test]
    fn the_only_entry_needs_no_name_and_nameless_ones_are_one_index() {
        assert_eq!(chosen(&entries(&[json!({REF_NAME: "x"})]), None), Some(0));
        assert_eq!(chosen(&entries(&[json!({}), json!({})]), None), Some(usize::MAX));
        assert_eq!(chosen(&[], None), None);
        let hex = "a".repeat(64);
        let (referrers, signature) = (format!("sha256-{hex}"), format!("sha256-{hex}.sig"));
        let signed =
            entries(&[json!({REF_NAME: referrers}), json!({REF_NAME: "1"}), json!({REF_NAME: signature})]);
        assert_eq!(chosen(&signed, None), Some(1));
        assert_eq!(chosen(&signed, Some(&referrers)), Some(0));
    }

    #[test]
    fn a_digest_wins() {
        let entries = entries(&[json!({REF_NAME: "a"}), json!({REF_NAME: "b"})]);
        let choice = Choice { tag: Some("a".to_owned()), digest: Some(Digest::sha256([1])) };
        assert_eq!(choice.among(&entries), Some(Chosen::Entry(&entries[1])));
        let choice = Choice { tag: None, digest: Some(Digest::sha256([9])) };
        assert_eq!(choice.among(&entries), None);
    }
}
