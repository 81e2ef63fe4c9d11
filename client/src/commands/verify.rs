//! `occyctl verify`: whether an image is what its provenance says.

use std::sync::Arc;

use occy_pipeline::error::Error;
use occy_pipeline::executor::LocalExecutor;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::open;
use occy_pipeline::progress::Progress;
use occy_pipeline::reference::Reference;
use occy_pipeline::source::ImageSource;
use occy_pipeline::tar::path::printable;
use occy_pipeline::verify::{Stated, statements, verify};
use occy_pipeline::wire::convert;
use occy_proto::v1::{ProvenanceVersions, Verdict, VerifiedStatement, VerifyResult};
use serde_json::{Value, json};

use super::{print_bytes, print_json};
use crate::Exit;
use crate::options::{Global, OutputFormat, Verify};
use crate::remote::{is_registry, verify as remote};
use crate::settings::{Misused, plan, settings};

pub(crate) async fn run(options: &Verify, global: &Global) -> anyhow::Result<Exit> {
    let image = open::in_full(&options.image);
    // The image is where it was written to, and what it was made of is the source.
    let both = settings(global, "registry://", Some("registry://"))?;
    let source = source_here(options, &both)?;
    let is_here = |end: &str| !is_registry(&open::in_full(end));
    // What is between two layouts of this machine needs nobody else.
    let is_all_here = is_here(&image) && options.source.as_deref().is_some_and(is_here);
    let (statements, result) = match &global.coordinator {
        Some(_) if !is_all_here => remote::verify(&image, options, global).await?,
        _ => here(&image, source, options, global, &both).await?,
    };
    match global.output_format {
        OutputFormat::Json => print_json(&document(&image, &statements, &result))?,
        OutputFormat::Text => print_bytes(text(&image, &statements, &result).as_bytes())?,
    };
    // Anybody who may write there can put another statement beside the image: one that is right excuses none that is wrong.
    let all_are = |verdicts: &[Verdict]| statements.iter().all(|one| verdicts.contains(&one.verdict()));
    Ok(if all_are(&[Verdict::Same]) {
        Exit::Done
    } else if all_are(&[Verdict::Same, Verdict::SameContent, Verdict::Unknown]) {
        Exit::Incomparable
    } else {
        Exit::Unsound
    })
}

/// The source that is named, if it is on this machine. Fails where it could not have the manifest that a statement names, whoever would
/// read it.
fn source_here(options: &Verify, settings: &open::Settings) -> anyhow::Result<Option<Box<dyn ImageSource>>> {
    let source = options.source.as_deref().map(open::in_full);
    let Some(source) = source.filter(|source| !is_registry(source)) else { return Ok(None) };
    let source = open::source(&source, settings)?.end;
    if source.store().is_none() {
        return Err(Error::NoSourceManifest.into());
    }
    Ok(Some(source))
}

/// In this process.
async fn here(
    image: &str,
    source: Option<Box<dyn ImageSource>>,
    options: &Verify,
    global: &Global,
    both: &open::Settings,
) -> anyhow::Result<(Vec<VerifiedStatement>, VerifyResult)> {
    let of_image = open::Settings { source_registry: both.destination_registry.clone(), ..both.clone() };
    let stated = statements(open::store(image, &of_image)?.as_ref()).await?;
    let made = open::source(image, &of_image)?.end;
    let mut verified = Vec::new();
    for stated in &stated {
        let named;
        let origin = match &source {
            Some(source) => source,
            None => {
                named = origin(options, global, stated, image, both)?;
                &named
            }
        };
        let plan = plan(global, both, FilterChain::default(), false);
        let executor = LocalExecutor::new(both.parallel);
        let begin = Arc::new(Progress::default);
        let one = verify(stated, made.as_ref(), origin.as_ref(), &plan, executor, begin).await?;
        verified.push(convert::verified_statement(stated, one));
    }
    Ok((verified, convert::verify_result(&stated)))
}

/// Where the image that a statement names as its source is.
fn origin(
    options: &Verify,
    global: &Global,
    stated: &Stated,
    image: &str,
    both: &open::Settings,
) -> anyhow::Result<Box<dyn ImageSource>> {
    let recipe = &stated.provenance.recipe;
    let (uri, settings) = match (&options.source, &recipe.source) {
        (Some(source), _) => (open::in_full(source), both.clone()),
        (None, Some(named)) => {
            let mut settings = both.clone();
            let of_image =
                image.strip_prefix("registry://").and_then(|image| image.parse::<Reference>().ok());
            // The statement names this registry, and not the user, who has logged in to that of the image.
            if of_image.is_none_or(|image| image.host() != named.host()) {
                settings.source_registry.trust_registry_host = false;
                if global.source_username.is_none() {
                    settings.source_registry.credentials = None;
                }
            }
            (format!("registry://{}", named.name()), settings)
        }
        (None, None) => {
            let problem = "its provenance does not say where its source is: name it with --source";
            return Err(Misused(problem.to_owned()).into());
        }
    };
    Ok(open::source(&uri, &settings)?.end)
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Same => "same",
        Verdict::SameContent => "same-content",
        Verdict::Differs => "differs",
        Verdict::Unknown | Verdict::Unspecified => "unknown",
    }
}

fn text(image: &str, statements: &[VerifiedStatement], result: &VerifyResult) -> String {
    let mut text = String::new();
    let own = result.versions.clone().unwrap_or_default();
    for one in statements {
        let made = one.made_by.clone().unwrap_or_default();
        text += &format!("{image} ({})\n", result.manifest_digest);
        text += &format!("  provenance: {}\n", one.provenance);
        let source = if one.source.is_empty() { "a source without a name" } else { &one.source };
        text += &format!("  made of {} in {source}\n", one.source_digest);
        if !one.platforms.is_empty() {
            text += &format!("  of its images those for {} alone\n", one.platforms.join(", "));
        }
        for filter in &one.filters {
            text += &format!("  filter: {filter}\n");
        }
        for (what, made, own) in
            [("rewriter", &made.rewriter, &own.rewriter), ("encoder", &made.encoder, &own.encoder)]
        {
            if made != own {
                text += &format!("  made by version {made} of the {what}, and this is version {own}\n");
            }
        }
        for one in &one.differences {
            text += &format!("  {}: {}, and made again: {}\n", one.place, one.found, one.derived);
        }
        text += match one.verdict() {
            Verdict::Same => "  the same, bit for bit\n",
            Verdict::SameContent => {
                "  the same config and the same tar in every layer; how these are compressed cannot be compared\n"
            }
            Verdict::Differs => "  NOT what its provenance says\n",
            Verdict::Unknown | Verdict::Unspecified => {
                "  not comparable: this version makes something else of the source\n"
            }
        };
    }
    let lines = text.lines().map(|line| format!("{}\n", printable(line.as_bytes())));
    lines.collect()
}

fn document(image: &str, statements: &[VerifiedStatement], result: &VerifyResult) -> Value {
    let versions = |versions: &Option<ProvenanceVersions>| {
        let ProvenanceVersions { occystrap, rewriter, encoder } = versions.clone().unwrap_or_default();
        json!({"occystrap": occystrap, "rewriter": rewriter, "encoder": encoder})
    };
    let statements = statements.iter().map(|one| {
        let differences = one.differences.iter();
        let differences =
            differences.map(|one| json!({"place": one.place, "found": one.found, "derived": one.derived}));
        let source = Some(&one.source).filter(|source| !source.is_empty());
        json!({
            "provenance": one.provenance,
            "verdict": word(one.verdict()),
            "source": {"uri": source, "digest": one.source_digest},
            "filters": one.filters,
            "platforms": one.platforms,
            "made_by": versions(&one.made_by),
            "differences": differences.collect::<Vec<_>>(),
        })
    });
    json!({
        "image": image,
        "manifest_digest": result.manifest_digest,
        "versions": versions(&result.versions),
        "statements": statements.collect::<Vec<_>>(),
    })
}
