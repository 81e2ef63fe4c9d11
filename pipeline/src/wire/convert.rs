//! From the pipeline's values to the API's, and back.

use occy_proto::v1::registry_credentials::Login;
use occy_proto::v1::{
    self, FileKind, FilterOutput, ImageResult, LayerState, LayerStatus, PasswordLogin, SearchHit,
};

use super::{CHUNK, WireError};
use crate::compression::Format;
use crate::copy::{Signature, SignaturePolicy};
use crate::digest::Digest;
use crate::element::{ImageName, Layer, StoredLayer, WrittenLayer};
use crate::filter::search::{Hit, HitKind};
use crate::filter::{FilterChain, OutputFormat, Target};
use crate::index::{Attestations, DoneIndex, StaleAttestation};
use crate::manifest::Family;
use crate::named::Attached;
use crate::output::Receipt;
use crate::output::manifest::ManifestFormat;
use crate::platform::Platform;
use crate::process::{Outcome, Summary};
use crate::progress::{self, Progress};
use crate::provenance::{Provenance, Versions};
use crate::registry::Credentials;
use crate::verify::{Difference, Stated, Verdict, Verified};
use crate::whole::Done;

/// Signatures that a result tells of: a source may list any number.
const MOST_KEPT: usize = 256;

/// What a registry is logged in to with.
pub fn login(credentials: Credentials) -> Login {
    match credentials {
        Credentials::Basic { username, password } => {
            Login::Password(PasswordLogin { username, password: password.expose().to_owned() })
        }
        Credentials::IdentityToken { token, .. } => Login::IdentityToken(token.expose().to_owned()),
        Credentials::RegistryToken(token) => Login::RegistryToken(token.expose().to_owned()),
    }
}

/// The same, back.
pub fn credentials(login: Login) -> Credentials {
    match login {
        Login::Password(PasswordLogin { username, password }) => {
            Credentials::Basic { username, password: password.into() }
        }
        Login::IdentityToken(token) => {
            Credentials::IdentityToken { username: String::new(), token: token.into() }
        }
        Login::RegistryToken(token) => Credentials::RegistryToken(token.into()),
    }
}

/// What becomes of signatures.
pub fn signatures(policy: v1::SignaturePolicy) -> SignaturePolicy {
    match policy {
        v1::SignaturePolicy::Unspecified | v1::SignaturePolicy::Refuse => SignaturePolicy::Refuse,
        v1::SignaturePolicy::Drop => SignaturePolicy::Drop,
        v1::SignaturePolicy::Keep => SignaturePolicy::Keep,
    }
}

/// The same, there.
pub fn signature_policy(policy: SignaturePolicy) -> v1::SignaturePolicy {
    match policy {
        SignaturePolicy::Refuse => v1::SignaturePolicy::Refuse,
        SignaturePolicy::Drop => v1::SignaturePolicy::Drop,
        SignaturePolicy::Keep => v1::SignaturePolicy::Keep,
    }
}

/// What came of an image.
pub fn image_result(outcome: &Outcome) -> ImageResult {
    result(&outcome.image.name, &outcome.receipt, outcome.summary)
}

/// What came of an image, or of an index.
pub fn whole_result(done: &Done) -> ImageResult {
    match done {
        Done::Image(outcome, attached) => with_attached(image_result(outcome), attached),
        Done::Index(index, done) => {
            let DoneIndex { receipt, images, dropped, retargeted, attached, summary, .. } = done.as_ref();
            let stale = |all: &[StaleAttestation]| all.iter().map(stale_attestation).collect();
            let index_result = v1::IndexResult {
                image_count: count(images.len()),
                dropped: stale(dropped),
                retargeted: stale(retargeted),
            };
            let result = result(&index.name, receipt, *summary);
            with_attached(ImageResult { index: Some(index_result), ..result }, attached)
        }
    }
}

fn result(name: &ImageName, receipt: &Receipt, summary: Summary) -> ImageResult {
    ImageResult {
        manifest_digest: receipt.manifest_digest.as_ref().map(Digest::to_string).unwrap_or_default(),
        manifest_media_type: receipt.manifest_media_type.clone().unwrap_or_default(),
        destination: receipt.destination.clone(),
        bytes: summary.bytes,
        layer_count: count(summary.layers),
        elapsed_millis: u64::try_from(summary.elapsed.as_millis()).unwrap_or(u64::MAX),
        image: name.to_string(),
        ..ImageResult::default()
    }
}

fn with_attached(result: ImageResult, attached: &Attached) -> ImageResult {
    ImageResult {
        signatures_kept: attached.kept.iter().take(MOST_KEPT).cloned().map(kept_signature).collect(),
        signatures_kept_count: attached.kept.len() as u64,
        provenance: attached.provenance.as_ref().map(Digest::to_string).unwrap_or_default(),
        ..result
    }
}

/// The other way: what was put beside an image.
pub fn attached(result: &ImageResult) -> Result<Attached, WireError> {
    let kept = result.signatures_kept.iter().cloned().map(signature).collect::<Result<_, _>>()?;
    let provenance = match result.provenance.as_str() {
        "" => None,
        text => Some(digest(text)?),
    };
    Ok(Attached { kept, provenance, ..Attached::default() })
}

/// A signature that was kept.
pub fn kept_signature(signature: Signature) -> v1::KeptSignature {
    let Signature { subject, digest, kind } = signature;
    v1::KeptSignature { subject: subject.to_string(), digest: digest.to_string(), kind }
}

/// The same, back.
pub fn signature(kept: v1::KeptSignature) -> Result<Signature, WireError> {
    let v1::KeptSignature { subject, digest: own, kind } = kept;
    Ok(Signature { subject: digest(&subject)?, digest: digest(&own)?, kind })
}

/// An attestation whose image changed.
fn stale_attestation(stale: &StaleAttestation) -> v1::StaleAttestation {
    let StaleAttestation { digest, image, became } = stale;
    v1::StaleAttestation { digest: digest.to_string(), image: image.to_string(), became: became.to_string() }
}

/// The same, back.
pub fn stale(stale: &v1::StaleAttestation) -> Result<StaleAttestation, WireError> {
    let v1::StaleAttestation { digest: own, image, became } = stale;
    Ok(StaleAttestation { digest: digest(own)?, image: digest(image)?, became: digest(became)? })
}

/// A statement about an image, and what came of it.
pub fn verified_statement(stated: &Stated, verified: Verified) -> v1::VerifiedStatement {
    let Provenance { recipe, versions: made_by, .. } = &stated.provenance;
    let differences = verified
        .differences
        .into_iter()
        .map(|Difference { place, found, derived }| v1::VerifyDifference { place, found, derived });
    let source = recipe.source.as_ref().map(|source| format!("registry://{}", source.name()));
    v1::VerifiedStatement {
        provenance: stated.digest.to_string(),
        source: source.unwrap_or_default(),
        source_digest: recipe.manifest.digest.to_string(),
        filters: recipe.filters.clone(),
        platforms: recipe.platforms.iter().map(ToString::to_string).collect(),
        made_by: Some(versions(made_by)),
        verdict: match verified.verdict {
            Verdict::Same => v1::Verdict::Same,
            Verdict::SameContent => v1::Verdict::SameContent,
            Verdict::Differs => v1::Verdict::Differs,
            Verdict::Unknown => v1::Verdict::Unknown,
        }
        .into(),
        differences: differences.collect(),
    }
}

/// What was verified, by this program.
pub fn verify_result(stated: &[Stated]) -> v1::VerifyResult {
    let digest = stated.first().map(|stated| stated.image.digest.to_string());
    v1::VerifyResult {
        manifest_digest: digest.unwrap_or_default(),
        versions: Some(versions(&Versions::own())),
    }
}

fn versions(versions: &Versions) -> v1::ProvenanceVersions {
    let Versions { occystrap, rewriter, encoder } = versions.clone();
    v1::ProvenanceVersions { occystrap, rewriter, encoder }
}

/// A digest that a message has.
pub fn digest(text: &str) -> Result<Digest, WireError> {
    text.parse().map_err(|error| WireError::elements(format!("a digest: {error}")))
}

/// What becomes of attestations.
pub fn attestations(policy: v1::AttestationPolicy) -> Attestations {
    match policy {
        v1::AttestationPolicy::Unspecified | v1::AttestationPolicy::Drop => Attestations::Drop,
        v1::AttestationPolicy::Retarget => Attestations::Retarget,
    }
}

/// The same, there.
pub fn attestation_policy(attestations: Attestations) -> v1::AttestationPolicy {
    match attestations {
        Attestations::Drop => v1::AttestationPolicy::Drop,
        Attestations::Retarget => v1::AttestationPolicy::Retarget,
    }
}

/// A layer that its destination has.
pub fn layer_status(layer: &Layer, written: &WrittenLayer) -> LayerStatus {
    let descriptor = layer.descriptor.as_ref();
    let source_digest = descriptor.map(|descriptor| descriptor.digest.to_string()).unwrap_or_default();
    let (digest, size, format) = match &written.stored {
        StoredLayer::Written { digest, size, format } => (digest.to_string(), *size, *format),
        StoredLayer::Original => {
            let size = descriptor.map(|descriptor| descriptor.size).or(layer.blob.size());
            (source_digest.clone(), size.unwrap_or(0), layer.format)
        }
    };
    LayerStatus {
        index: count(written.index),
        state: LayerState::Done.into(),
        label: layer.label(),
        source_size: layer.blob.size(),
        digest,
        size,
        diff_id: written.diff_id.as_ref().map(Digest::to_string).unwrap_or_default(),
        changed: written.edited,
        worker: String::new(),
        waiting_reason: String::new(),
        compression: compression(format).into(),
        kept: written.stored == StoredLayer::Original,
        source_digest,
    }
}

/// How far the layers are that are running, of an image before whose layers there are so many others.
pub fn running(progress: &Progress, before: usize) -> Vec<v1::LayerProgress> {
    let layers = progress.layers().iter().enumerate();
    let running = layers.filter(|(_, layer)| layer.state() == progress::LayerState::Running);
    running
        .map(|(index, layer)| v1::LayerProgress { index: count(before + index), bytes: layer.bytes.get() })
        .collect()
}

/// What filters print or append, in pieces; at most `limit` bytes of it.
pub fn filter_outputs(
    outcome: &Outcome,
    chain: &FilterChain,
    format: OutputFormat,
    limit: usize,
) -> Result<impl Iterator<Item = FilterOutput> + use<>, WireError> {
    let renderings = outcome.placed_renderings(chain, format);
    if renderings.iter().map(|(_, rendering)| rendering.text.len()).sum::<usize>() > limit {
        return Err(WireError::TooLarge { what: "what the filters found", limit });
    }
    Ok(renderings.into_iter().flat_map(|(filter, rendering)| {
        let append_to = match rendering.to {
            Target::Stdout => None,
            Target::Append(path) => Some(path.display().to_string()),
        };
        let pieces = pieces(&rendering.text);
        let last = pieces.len() - 1;
        pieces.into_iter().enumerate().map(move |(at, text)| FilterOutput {
            filter: count(filter),
            append_to: append_to.clone(),
            text,
            last: at == last,
        })
    }))
}

/// A text in pieces of [`CHUNK`] bytes at most, none of which ends in the middle of a character. At least one.
fn pieces(mut text: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    while text.len() > CHUNK {
        let (piece, rest) = split(text, CHUNK);
        pieces.push(piece.to_owned());
        text = rest;
    }
    pieces.push(text.to_owned());
    pieces
}

/// Cuts a text behind `most` bytes, or before the character that stands there.
pub fn split(text: &str, most: usize) -> (&str, &str) {
    let at = (0..=most.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    text.split_at(at.unwrap_or(0))
}

/// What a search found in one layer.
pub fn hits(layer_index: usize, layer: &str, hits: &[Hit]) -> Vec<SearchHit> {
    let hit = |hit: &Hit| {
        let (kind, size, target) = match &hit.kind {
            HitKind::File { size } => (FileKind::Regular, *size, ""),
            HitKind::Symlink { target } => (FileKind::Symlink, 0, target.as_str()),
            HitKind::Hardlink { target } => (FileKind::Hardlink, 0, target.as_str()),
            HitKind::Directory => (FileKind::Directory, 0, ""),
            HitKind::Fifo => (FileKind::Fifo, 0, ""),
            HitKind::CharacterDevice => (FileKind::CharacterDevice, 0, ""),
            HitKind::BlockDevice => (FileKind::BlockDevice, 0, ""),
            HitKind::Unknown => (FileKind::Unspecified, 0, ""),
        };
        SearchHit {
            layer_index: count(layer_index),
            layer: layer.to_owned(),
            path: hit.path.clone(),
            kind: kind.into(),
            size,
            target: target.to_owned(),
        }
    };
    hits.iter().map(hit).collect()
}

/// What stored bytes are compressed with.
pub fn compression(format: Format) -> v1::Compression {
    match format {
        Format::None => v1::Compression::None,
        Format::Gzip => v1::Compression::Gzip,
        Format::Zstd => v1::Compression::Zstd,
    }
}

/// The same, back; None where it is not said.
pub fn format(compression: v1::Compression) -> Option<Format> {
    match compression {
        v1::Compression::Unspecified => None,
        v1::Compression::None => Some(Format::None),
        v1::Compression::Gzip => Some(Format::Gzip),
        v1::Compression::Zstd => Some(Format::Zstd),
    }
}

/// An operating system and processor.
pub fn platform(platform: Platform) -> v1::Platform {
    let Platform { os, architecture, variant } = platform;
    v1::Platform { os, architecture, variant: variant.unwrap_or_default(), required: false }
}

/// Whose media types an image uses.
pub fn family(family: Family) -> v1::Family {
    match family {
        Family::Docker => v1::Family::Docker,
        Family::Oci => v1::Family::Oci,
    }
}

/// The format of a manifest that is written.
pub fn manifest_family(format: ManifestFormat) -> v1::Family {
    match format {
        ManifestFormat::Keep => v1::Family::Unspecified,
        ManifestFormat::Always(kept) => family(kept),
    }
}

/// The same, back.
pub fn manifest_format(family: v1::Family) -> ManifestFormat {
    match family {
        v1::Family::Unspecified => ManifestFormat::Keep,
        v1::Family::Docker => ManifestFormat::Always(Family::Docker),
        v1::Family::Oci => ManifestFormat::Always(Family::Oci),
    }
}

/// A number of layers or filters.
pub fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_characters_and_make_up_the_text() {
        assert_eq!(pieces(""), [""]);
        let text = "ü".repeat(CHUNK);
        let pieces = pieces(&format!("x{text}"));
        assert!(pieces.iter().all(|piece| piece.len() <= CHUNK));
        assert_eq!(pieces.concat(), format!("x{text}"));
    }
}
