//! Signatures, and what becomes of them where the manifest that they are about changes on its way.
//!
//! A signature is about the bytes of one manifest: of an image that filters changed, of an index of fewer platforms, it says
//! nothing. What is a signature: what names the manifest as its subject and is of a type that signers use (notation, cosign,
//! sigstore's bundles, signed in-toto statements), and cosign's tags `sha256-HEX.sig` and `.att`.
//!
//! One that is kept stays as it is, about the original. Its `subject` then need not be at the destination: image-spec 1.1 calls that
//! association weak, and distribution-spec has registries take such a manifest ("Pushing Manifests with Subject"). What it must not
//! do is name the new manifest as its subject, for which it does not hold. From the new manifest leads an [`artifact`] to it, which
//! has the new one as its subject and names the original's digest: so it is found by a list of referrers, also of a docker schema2
//! image, whose manifest can have no subject itself, and the new image's bytes stay a matter of its filters alone.

use std::collections::HashSet;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::gather::{Gathered, Gathering, Referrer, as_layer};
use super::{CopyPlan, in_copy};
use crate::blob::MemoryBlob;
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::media_type::OCI_MANIFEST;
use crate::manifest::{self, Descriptor};
use crate::output::OutputError;
use crate::output::content::ContentOutput;
use crate::reference::Tag;
use crate::registry::FetchedManifest;
use crate::source::stored::Store;

/// The artifact that leads from a manifest to the one that it was made of, and so to that one's signatures.
pub const SOURCE_LINK: &str = "application/vnd.occystrap.source.v1+json";
/// The annotation that names the manifest that another one was made of.
pub const SOURCE_DIGEST: &str = "dev.occystrap.source.digest";

/// How the types of signatures begin: of notation, of cosign, of what sigstore's clients write today, of signed statements.
const SIGNATURE_TYPES: [&str; 6] = [
    "application/vnd.cncf.notary.signature",
    "application/vnd.dev.cosign.artifact.sig",
    "application/vnd.dev.cosign.artifact.att",
    "application/vnd.dev.cosign.simplesigning",
    "application/vnd.dev.sigstore.bundle",
    "application/vnd.dsse.envelope",
];
/// The ends of the tags under which cosign keeps signatures and signed statements.
const SIGNATURE_TAGS: [&str; 2] = ["sig", "att"];
/// What stands where an artifact has nothing to say (image-spec, "Guidance for an Empty Descriptor").
const EMPTY: (&str, &[u8]) = ("application/vnd.oci.empty.v1+json", b"{}");

/// What becomes of the signatures of a manifest that changes on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SignaturePolicy {
    /// What is signed is not changed: that is an error, and nothing gets a name.
    #[default]
    Refuse,
    /// They stay at the source. It is not even asked for them.
    Drop,
    /// They go along, as signatures of the original, to which the new manifest leads.
    Keep,
}

/// A manifest that is another one at the destination.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// What the source has.
    pub source: Digest,
    /// What it became.
    pub became: Descriptor,
}

/// A signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// What it is about.
    pub subject: Digest,
    /// Its manifest.
    pub digest: Digest,
    /// Its type, or the tag that it is found by.
    pub kind: String,
}

/// What a source has of the signatures of one manifest.
#[derive(Default)]
pub(crate) struct Found {
    pub(super) listed: Vec<Descriptor>,
    pub(super) tagged: Vec<(Tag, FetchedManifest)>,
}

impl Found {
    pub(crate) fn signatures(&self, subject: &Digest) -> Vec<Signature> {
        let listed = self.listed.iter().map(|listed| (&listed.digest, artifact_type(listed).to_owned()));
        let tagged = self.tagged.iter().map(|(tag, manifest)| (&manifest.digest, tag.to_string()));
        let signature = |(digest, kind): (&Digest, String)| Signature {
            subject: subject.clone(),
            digest: digest.clone(),
            kind,
        };
        listed.chain(tagged).map(signature).collect()
    }
}

/// Whether a type is one of a signature.
pub(crate) fn is_signature(artifact_type: &str) -> bool {
    SIGNATURE_TYPES.iter().any(|known| artifact_type.starts_with(known))
}

fn artifact_type(listed: &Descriptor) -> &str {
    listed.raw().get("artifactType").and_then(Value::as_str).unwrap_or_default()
}

/// The signatures of a manifest. It costs three requests, and one more where a registry lists no referrers or lists some without
/// their types.
pub(crate) async fn signatures_of(store: &dyn Store, subject: &Digest) -> Result<Found, Error> {
    let mut found = Found::default();
    for listed in in_copy(subject, store.referrers(subject).await)? {
        let is_one = match artifact_type(&listed) {
            "" => {
                let manifest = in_copy(&listed.digest, store.manifest(&listed).await)?;
                is_signature(&type_in(&manifest.bytes))
            }
            named => is_signature(named),
        };
        if is_one {
            found.listed.push(listed);
        }
    }
    for end in SIGNATURE_TAGS {
        let tag = format!("{}-{}.{end}", subject.algorithm().name(), subject.hex());
        // The name of a longer digest is no tag.
        let Ok(tag) = tag.parse::<Tag>() else { continue };
        if let Some(manifest) = in_copy(subject, store.tagged(&tag).await)? {
            found.tagged.push((tag, manifest));
        }
    }
    Ok(found)
}

/// The type of an artifact by its manifest: what it says, or else its config's.
fn type_in(manifest: &[u8]) -> String {
    let document: Value = serde_json::from_slice(manifest).unwrap_or_default();
    let named = document["artifactType"].as_str().filter(|named| !named.is_empty());
    named.or_else(|| document["config"]["mediaType"].as_str()).unwrap_or_default().to_owned()
}

/// Fails where a manifest that changes is signed; `shown` is what people know it by.
pub(crate) async fn refuse_signed(store: &dyn Store, shown: &str, subject: &Digest) -> Result<(), Error> {
    let signatures = signatures_of(store, subject).await?.signatures(subject);
    if signatures.is_empty() {
        return Ok(());
    }
    let kinds = signatures.into_iter().map(|signature| signature.kind).collect();
    Err(Error::Signed { image: shown.to_owned(), digest: subject.clone(), signatures: kinds })
}

/// A manifest that is about another one, and what it consists of.
#[derive(Clone, Debug)]
pub struct Artifact {
    subject: Digest,
    manifest: FetchedManifest,
    listed: Descriptor,
    blobs: Vec<(Descriptor, Bytes)>,
}

impl Artifact {
    /// One about `subject`, of a document, or of nothing but its annotations.
    pub(crate) fn new(
        subject: &Descriptor,
        artifact_type: &str,
        document: Option<(&str, Bytes)>,
        annotations: &Map<String, Value>,
    ) -> Self {
        let empty = Bytes::from_static(EMPTY.1);
        let config = described(EMPTY.0, &empty);
        let (media_type, content) = document.unwrap_or((EMPTY.0, empty.clone()));
        let mut layer = described(media_type, &content);
        let mut blobs = vec![(config.clone(), empty)];
        if content != blobs[0].1 {
            blobs.push((layer.clone(), content));
            let mut raw = layer.raw().clone();
            raw.insert("annotations".to_owned(), annotations.clone().into());
            layer = descriptor(&raw.into());
        }
        let of_subject =
            json!({"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size});
        let document = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": config.raw(),
            "layers": [layer.raw()],
            "subject": of_subject,
            "annotations": annotations,
        });
        let bytes = manifest::to_bytes(document.as_object().expect("it was just written as an object"));
        let digest = Digest::sha256(&bytes);
        let listed = descriptor(&json!({
            "mediaType": OCI_MANIFEST, "digest": digest, "size": bytes.len(), "artifactType": artifact_type,
            "annotations": annotations,
        }));
        let manifest = FetchedManifest { bytes, media_type: OCI_MANIFEST.to_owned(), digest };
        Self { subject: subject.digest.clone(), manifest, listed, blobs }
    }

    /// One that leads from a manifest to the one that it was made of.
    pub(crate) fn link(change: &Change) -> Self {
        let annotations = json!({SOURCE_DIGEST: change.source});
        let annotations = annotations.as_object().expect("it was just written as an object");
        Self::new(&change.became, SOURCE_LINK, None, annotations)
    }

    /// What it is about.
    pub fn subject(&self) -> &Digest {
        &self.subject
    }

    /// The document that it holds; of a link, nothing.
    pub fn document(&self) -> &[u8] {
        self.blobs.last().map(|(_, bytes)| bytes.as_ref()).unwrap_or_default()
    }

    /// Its manifest's digest.
    pub fn digest(&self) -> &Digest {
        &self.manifest.digest
    }
}

fn described(media_type: &str, bytes: &Bytes) -> Descriptor {
    Descriptor::new(media_type, &Digest::sha256(bytes), bytes.len() as u64)
}

fn descriptor(value: &Value) -> Descriptor {
    Descriptor::of(value).expect("it was just written as one")
}

/// What belongs to manifests that are at their destination, by their digests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Belonging<'a> {
    /// What became other manifests, whose signatures are kept.
    pub(crate) changes: &'a [Change],
    /// What stayed as it is, and keeps all that names it.
    pub(crate) unchanged: &'a [Digest],
    /// What was made here.
    pub(crate) artifacts: &'a [Artifact],
}

/// What has to be put of it; then `root` gets its name, with [`write`](super::write). `root` is there already, by its digest.
///
/// What names a changed manifest and is no signature of it stays at the source: an SBOM is of the old bytes too.
pub(crate) async fn beside(
    store: Option<&dyn Store>,
    output: &dyn ContentOutput,
    root: FetchedManifest,
    belonging: Belonging<'_>,
) -> Result<(Gathered, Vec<Signature>), Error> {
    let Belonging { changes, unchanged, artifacts } = belonging;
    let mut gathered = Gathered::of(root);
    let mut kept = Vec::new();
    if let Some(store) = store {
        let plan = CopyPlan::default();
        let mut gathering = Gathering::new(store, output, &plan);
        // These first: all that was noted until then is looked at for what names it in its turn.
        gathering.keep_belongings(unchanged, &mut gathered).await?;
        kept = gathering.keep_signatures(changes, &mut gathered).await?;
        gathered.blobs.extend(gathering.into_blobs());
    }
    let linked: HashSet<&Digest> = artifacts.iter().map(Artifact::subject).collect();
    let signed: HashSet<&Digest> = kept.iter().map(|signature| &signature.subject).collect();
    let is_due =
        |change: &&Change| signed.contains(&change.source) && !linked.contains(&change.became.digest);
    let links: Vec<Artifact> = changes.iter().filter(is_due).map(Artifact::link).collect();
    for artifact in artifacts.iter().chain(&links) {
        gathered.add(artifact);
    }
    let has_names = !gathered.referrers.is_empty() || !gathered.digest_tags.is_empty();
    if has_names && !output.names_many() {
        return Err(OutputError::OneName { destination: output.destination() }.into());
    }
    Ok((gathered, kept))
}

impl Gathered {
    /// Nothing but a manifest that is to be named.
    fn of(root: FetchedManifest) -> Self {
        Self {
            root,
            is_named: false,
            manifests: Vec::new(),
            manifests_found: 0,
            blobs: Vec::new(),
            referrers: Vec::new(),
            digest_tags: Vec::new(),
            left_out: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// An artifact with its blobs.
    pub(super) fn add(&mut self, artifact: &Artifact) {
        for (descriptor, bytes) in &artifact.blobs {
            let is_known = |blob: &&crate::element::Layer| {
                blob.descriptor.as_ref().is_some_and(|other| other.digest == descriptor.digest)
            };
            if !self.blobs.iter().any(|blob| is_known(&blob)) {
                let blob = std::sync::Arc::new(MemoryBlob::new(bytes.clone()));
                self.blobs.push(as_layer(descriptor, blob, None));
            }
        }
        let (subject, listed) = (artifact.subject.clone(), artifact.listed.clone());
        self.referrers.push(Referrer { subject, listed, manifest: artifact.manifest.clone() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_signers_write_is_known_and_what_others_write_is_not() {
        for kind in [
            "application/vnd.cncf.notary.signature",
            "application/vnd.dev.cosign.artifact.sig.v1+json",
            "application/vnd.dev.sigstore.bundle.v0.3+json",
            "application/vnd.dev.sigstore.bundle+json;version=0.1",
        ] {
            assert!(is_signature(kind), "{kind}");
        }
        for kind in ["", "application/spdx+json", "application/vnd.in-toto+json", SOURCE_LINK] {
            assert!(!is_signature(kind), "{kind}");
        }
        let of_config =
            json!({"artifactType": "", "config": {"mediaType": "application/vnd.cncf.notary.signature"}});
        assert!(is_signature(&type_in(of_config.to_string().as_bytes())));
    }

    #[test]
    fn a_link_is_an_artifact_of_image_spec_about_the_new_manifest() {
        let became = Descriptor::new(OCI_MANIFEST, &Digest::sha256("new"), 3);
        let link = Artifact::link(&Change { source: Digest::sha256("old"), became });
        let document: Value = serde_json::from_slice(&link.manifest.bytes).unwrap();
        assert_eq!(document["subject"]["digest"], Digest::sha256("new").to_string());
        assert_eq!(document["annotations"][SOURCE_DIGEST], Digest::sha256("old").to_string());
        assert_eq!(document["config"]["digest"], document["layers"][0]["digest"]);
        assert_eq!(link.listed.digest, Digest::sha256(&link.manifest.bytes));
        assert_eq!(link.blobs.len(), 1);
    }
}
