//! `occyctl verify`: whether an image is what its provenance says.

use std::sync::Arc;

use occy_pipeline::executor::LocalExecutor;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::open;
use occy_pipeline::progress::Progress;
use occy_pipeline::provenance::{Recipe, Versions};
use occy_pipeline::reference::Reference;
use occy_pipeline::source::ImageSource;
use occy_pipeline::tar::path::printable;
use occy_pipeline::verify::{Stated, Verdict, Verified, statements, verify};
use serde_json::{Value, json};

use super::{print_bytes, print_json};
use crate::Exit;
use crate::options::{Global, OutputFormat, Verify};
use crate::settings::{Misused, plan, settings};

pub(crate) async fn run(options: &Verify, global: &Global) -> anyhow::Result<Exit> {
    if global.coordinator.is_some() {
        let problem = "`verify` cannot be had with --coordinator: it is done by this process only";
        return Err(Misused(problem.to_owned()).into());
    }
    let image = open::in_full(&options.image);
    // The image is where it was written to, and what it was made of is the source.
    let both = settings(global, "registry://", Some("registry://"))?;
    let of_image = open::Settings { source_registry: both.destination_registry.clone(), ..both.clone() };
    let stated = statements(open::store(&image, &of_image)?.as_ref()).await?;
    if stated.is_empty() {
        anyhow::bail!("{} has no provenance that says how it was made", printable(image.as_bytes()));
    }
    let made = open::source(&image, &of_image)?.end;
    let mut verified = Vec::new();
    for stated in &stated {
        let origin = origin(options, global, stated, &image, &both)?;
        let plan = plan(global, &both, FilterChain::default(), false);
        let executor = LocalExecutor::new(both.parallel);
        let begin = Arc::new(Progress::default);
        verified.push(verify(stated, made.as_ref(), origin.as_ref(), &plan, executor, begin).await?);
    }
    let told: Vec<_> = stated.iter().zip(&verified).collect();
    match global.output_format {
        OutputFormat::Json => print_json(&document(&image, &told))?,
        OutputFormat::Text => print_bytes(text(&image, &told).as_bytes())?,
    };
    // Anybody who may write there can put another statement beside the image: one that is right excuses none that is wrong.
    let any = |verdict: Verdict| verified.iter().any(|one| one.verdict == verdict);
    Ok(if any(Verdict::Differs) {
        Exit::Unsound
    } else if any(Verdict::SameContent) || any(Verdict::Unknown) {
        Exit::Incomparable
    } else {
        Exit::Done
    })
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

/// Where a recipe's source is, as it is named on a command line.
fn place(recipe: &Recipe) -> Option<String> {
    recipe.source.as_ref().map(|source| format!("registry://{}", source.name()))
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Same => "same",
        Verdict::SameContent => "same-content",
        Verdict::Differs => "differs",
        Verdict::Unknown => "unknown",
    }
}

fn text(image: &str, told: &[(&Stated, &Verified)]) -> String {
    let mut text = String::new();
    for (stated, verified) in told {
        let recipe = &stated.provenance.recipe;
        let made = &stated.provenance.versions;
        let own = Versions::own();
        text += &format!("{image} ({})\n", stated.image.digest);
        text += &format!("  provenance: {}\n", stated.digest);
        let source = place(recipe).unwrap_or_else(|| "a source without a name".to_owned());
        text += &format!("  made of {} in {source}\n", recipe.manifest.digest);
        for filter in &recipe.filters {
            text += &format!("  filter: {filter}\n");
        }
        for (what, made, own) in
            [("rewriter", &made.rewriter, &own.rewriter), ("encoder", &made.encoder, &own.encoder)]
        {
            if made != own {
                text += &format!("  made by version {made} of the {what}, and this is version {own}\n");
            }
        }
        for one in &verified.differences {
            text += &format!("  {}: {}, and made again: {}\n", one.place, one.found, one.derived);
        }
        text += match verified.verdict {
            Verdict::Same => "  the same, bit for bit\n",
            Verdict::SameContent => {
                "  the same config and the same tar in every layer; how these are compressed cannot be compared\n"
            }
            Verdict::Differs => "  NOT what its provenance says\n",
            Verdict::Unknown => "  not comparable: this version makes something else of the source\n",
        };
    }
    let lines = text.lines().map(|line| format!("{}\n", printable(line.as_bytes())));
    lines.collect()
}

fn document(image: &str, told: &[(&Stated, &Verified)]) -> Value {
    let versions = |versions: &Versions| json!({"occystrap": versions.occystrap, "rewriter": versions.rewriter, "encoder": versions.encoder});
    let statements = told.iter().map(|(stated, verified)| {
        let differences = verified.differences.iter();
        let differences =
            differences.map(|one| json!({"place": one.place, "found": one.found, "derived": one.derived}));
        let recipe = &stated.provenance.recipe;
        json!({
            "provenance": stated.digest,
            "verdict": word(verified.verdict),
            "source": {"uri": place(recipe), "digest": recipe.manifest.digest},
            "filters": recipe.filters,
            "made_by": versions(&stated.provenance.versions),
            "differences": differences.collect::<Vec<_>>(),
        })
    });
    json!({
        "image": image,
        "manifest_digest": told[0].0.image.digest,
        "versions": versions(&Versions::own()),
        "statements": statements.collect::<Vec<_>>(),
    })
}
