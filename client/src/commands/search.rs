//! `occyctl search`: the files of an image's layers that match a pattern.

use std::sync::Arc;

use occy_pipeline::executor::LocalExecutor;
use occy_pipeline::filter::FilterChain;
use occy_pipeline::filter::search::Search as SearchFilter;
use occy_pipeline::open;
use occy_pipeline::output::nothing::NoOutput;
use occy_pipeline::process::process;
use occy_pipeline::progress::Progress;

use super::process::{deliver, rendered};
use crate::Exit;
use crate::display::Display;
use crate::options::{Global, Search};
use crate::settings::{Misused, plan, settings};

pub(crate) async fn run(options: &Search, global: &Global) -> anyhow::Result<Exit> {
    let settings = settings(global)?;
    let filter = SearchFilter::new(&options.pattern, options.regex, options.script_friendly)
        .map_err(|reason| Misused(format!("invalid pattern {:?}: {reason}", options.pattern)))?;
    let source = open::source(&options.source, &settings)?;
    let parallel = source.max_workers.unwrap_or(settings.parallel);
    let plan = plan(global, &settings, FilterChain::new(vec![Arc::new(filter)]), false);
    let progress = Progress::default();
    let display = Display::start(global, progress.clone(), &options.source, &settings.spools);
    let executor = LocalExecutor::new(parallel);
    let outcome = process(source.end.as_ref(), plan.clone(), Arc::new(NoOutput), executor, &progress).await?;
    drop(display);
    for rendering in outcome.renderings(&plan.chain, rendered(global)) {
        deliver(&rendering, false)?;
    }
    Ok(Exit::Done)
}
