//! `occyctl search`: the files of an image's layers that match a pattern.

use std::sync::Arc;

use occy_pipeline::executor::LocalExecutor;
use occy_pipeline::filter::search::Search as SearchFilter;
use occy_pipeline::filter::{FilterChain, Rendering};
use occy_pipeline::open;
use occy_pipeline::output::LayerForm;
use occy_pipeline::output::nothing::NoOutput;
use occy_pipeline::process::process;
use occy_pipeline::progress::Progress;
use occy_pipeline::wire::convert;
use occy_proto::v1::{PipelineSpec, SearchSpec};

use super::process::{deliver, rendered};
use crate::Exit;
use crate::display::{Display, Shown};
use crate::options::{Global, Search};
use crate::remote::connect::Coordinator;
use crate::remote::logins::{Which, logins};
use crate::remote::{call, is_registry, spec};
use crate::settings::{Misused, plan, settings};

pub(crate) async fn run(options: &Search, global: &Global) -> anyhow::Result<Exit> {
    let filter = SearchFilter::new(&options.pattern, options.regex, options.script_friendly)
        .map_err(|reason| Misused(format!("invalid pattern {:?}: {reason}", options.pattern)))?;
    let renderings = match &global.coordinator {
        Some(_) => with_coordinator(options, global).await?,
        None => here(options, filter, global).await?,
    };
    for rendering in renderings {
        deliver(&rendering, false)?;
    }
    Ok(Exit::Done)
}

async fn here(options: &Search, filter: SearchFilter, global: &Global) -> anyhow::Result<Vec<Rendering>> {
    let settings = settings(global, &options.source, None)?;
    let source = open::source(&options.source, &settings)?;
    let parallel = source.max_workers.unwrap_or(settings.parallel);
    let plan = plan(global, &settings, FilterChain::new(vec![Arc::new(filter)]), false);
    let progress = Progress::default();
    let _display = Display::start(global, progress.clone(), &options.source, &settings.spools);
    let executor = LocalExecutor::new(parallel);
    let outcome = process(source.end.as_ref(), plan.clone(), Arc::new(NoOutput), executor, &progress).await?;
    Ok(outcome.renderings(&plan.chain, rendered(global)))
}

async fn with_coordinator(options: &Search, global: &Global) -> anyhow::Result<Vec<Rendering>> {
    spec::refuse_registry_options(global, &[&options.source])?;
    let settings = settings(global, &options.source, None)?;
    let opened = open::source(&options.source, &settings)?;
    let (own, source) = match is_registry(&options.source) {
        true => (None, options.source.clone()),
        false => (Some(opened), String::new()),
    };
    let parallel = own.as_ref().and_then(|source| source.max_workers).unwrap_or(settings.parallel);
    let spec = PipelineSpec {
        source,
        platform: Some(spec::platform(global, &options.source)),
        parallel: convert::count(parallel),
        max_layer_size: global.max_layer_size,
        findings: spec::findings(global).into(),
        search: Some(SearchSpec {
            pattern: options.pattern.clone(),
            regex: options.regex,
            script_friendly: options.script_friendly,
        }),
        ..PipelineSpec::default()
    };
    let coordinator = Coordinator::needed(global, "search").await?;
    let shown = Shown::new(global, &options.source, &settings.spools);
    let logins = logins(global, &coordinator, &options.source, None, Which::All).await?;
    let call = call::Plan {
        logins,
        spec: spec::to_here(spec, LayerForm::Nothing),
        source: own.map(|source| source.end),
        lent: None,
        sending: plan(global, &settings, FilterChain::default(), false),
        chain: FilterChain::default(),
        format: rendered(global),
        begin: shown.begin_each(),
    };
    Ok(call::send(&coordinator, call).await?.renderings)
}
