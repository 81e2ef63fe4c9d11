//! What a command asks a coordinator for, and which of its options it cannot have there.

use occy_pipeline::output::LayerForm;
use occy_pipeline::platform::{Platform, PlatformChoice};
use occy_pipeline::uri::Uri;
use occy_pipeline::whole::Wanted;
use occy_pipeline::wire::convert;
use occy_proto::v1::{self, PipelineSpec};

use super::lend::Lent;
use super::{is_registry, told};
use crate::options::{Global, OutputFormat, Work};
use crate::settings::{self, Misused};

/// Refuses options that say how this process would speak to a registry, where the coordinator is the one who does.
pub(crate) fn refuse_registry_options(global: &Global, ends: &[&str]) -> Result<(), Misused> {
    if !ends.iter().any(|end| is_registry(end)) {
        return Ok(());
    }
    let given = [
        ("insecure", !global.insecure.is_empty()),
        ("ca-cert", !global.ca_cert.is_empty()),
        ("client-cert", global.client_cert.is_some()),
        ("allow-network", !global.allow_network.is_empty()),
        ("retries", global.retries != Global::RETRIES),
    ];
    match given.into_iter().find(|(_, is_given)| *is_given) {
        None => Ok(()),
        Some((option, _)) => {
            let variable = option.to_uppercase().replace('-', "_");
            Err(Misused(format!(
                "--{option} (OCCYSTRAP_{variable}) cannot be had with --coordinator: it is the coordinator that speaks to \
                 registries, as its operator has set it up"
            )))
        }
    }
}

/// What is done with an image whose ends are these. An end that is here is empty.
pub(crate) fn of_work(work: &Work, global: &Global) -> PipelineSpec {
    PipelineSpec {
        source: told(&work.source),
        destination: told(&work.destination),
        filters: work.filters.clone(),
        platform: Some(platform(global, &work.source)),
        compression: work.compression.map(|compression| compression.to_string()).unwrap_or_default(),
        manifest_family: convert::manifest_family(work.format.unwrap_or_default()).into(),
        verify_diff_ids: work.verify_diff_ids,
        parallel: convert::count(global.parallel),
        foreign_layers: work.foreign_layers,
        max_layer_size: global.max_layer_size,
        findings: findings(global).into(),
        ..PipelineSpec::default()
    }
}

/// The same, with what is wanted besides the image itself.
pub(crate) fn with_wanted(spec: PipelineSpec, wanted: Wanted) -> PipelineSpec {
    let Wanted { all, attestations, signatures, provenance } = wanted;
    let unsaid = v1::AttestationPolicy::Unspecified;
    PipelineSpec {
        all,
        attestations: if all { convert::attestation_policy(attestations) } else { unsaid }.into(),
        signatures: signatures.map(convert::signature_policy).unwrap_or_default().into(),
        provenance,
        ..spec
    }
}

/// The options that it was asked for with: those that an old coordinator would not know.
pub(crate) fn asked(wanted: Wanted) -> Vec<&'static str> {
    let Wanted { all, signatures, provenance, .. } = wanted;
    let options = [("signatures", signatures.is_some()), ("provenance", provenance), ("all", all)];
    options.into_iter().filter_map(|(option, is_asked)| is_asked.then_some(option)).collect()
}

/// The same, for an image that comes here and goes to an output of that form.
///
/// Layers of a registry that no filter looks at come as they are stored there, and are decompressed here: there are fewer bytes of
/// them, and nobody else has to touch them.
pub(crate) fn to_here(spec: PipelineSpec, form: LayerForm) -> PipelineSpec {
    if form == LayerForm::Tar && !spec.source.is_empty() && spec.filters.is_empty() && spec.search.is_none() {
        return PipelineSpec {
            // What is decompressed is checked here, whether or not somebody asked for it.
            verify_diff_ids: false,
            // Those that another place has are needed too.
            foreign_layers: true,
            ..to_here(spec, LayerForm::Stored { compression: None })
        };
    }
    let (form, compression) = match form {
        LayerForm::Tar => (v1::LayerForm::Tar, None),
        LayerForm::Stored { compression } => (v1::LayerForm::Stored, compression),
        LayerForm::Nothing => (v1::LayerForm::None, None),
    };
    PipelineSpec {
        layer_form: form.into(),
        caller_chooses: form != v1::LayerForm::None,
        compression: compression.map(|compression| compression.to_string()).unwrap_or_default(),
        // The manifest is made where the destination is.
        manifest_family: v1::Family::Unspecified.into(),
        ..spec
    }
}

/// The same, for layouts of this machine that are lent.
pub(crate) fn with_lent(mut spec: PipelineSpec, lent: &Lent) -> PipelineSpec {
    if let Some(source) = &lent.source {
        spec.platform = Some(chosen(source.platform()));
    }
    if lent.output.is_some() {
        // What is lent says it itself: its URI goes before what was given besides.
        spec.manifest_family = v1::Family::Unspecified.into();
        spec.compression.clear();
    }
    spec
}

fn chosen(choice: &PlatformChoice) -> v1::Platform {
    v1::Platform { required: choice.required, ..convert::platform(choice.resolve()) }
}

/// How what filters find is printed.
pub(crate) fn findings(global: &Global) -> v1::FindingsFormat {
    match global.output_format {
        OutputFormat::Text => v1::FindingsFormat::Text,
        OutputFormat::Json => v1::FindingsFormat::Json,
    }
}

/// The platform that is wanted: where nothing is said this machine's, and not the coordinator's. What the source's URI says of
/// the architecture goes before both, and then its variant is not this machine's either.
pub(crate) fn platform(global: &Global, source: &str) -> v1::Platform {
    let choice = settings::platform(global);
    let names_architecture = Uri::parse(source).is_ok_and(|uri| uri.option("arch").is_some());
    let required = choice.required;
    let platform = match names_architecture {
        false => choice.resolve(),
        true => Platform {
            os: choice.os.unwrap_or_default(),
            architecture: choice.architecture.unwrap_or_default(),
            variant: choice.variant,
        },
    };
    v1::Platform { required, ..convert::platform(platform) }
}
