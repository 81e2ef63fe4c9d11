//! A whole index: every image of it, nested indexes included, and then the index itself, bit for bit.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::digest::Digest;
use crate::error::{Error, MAX_INDEX_DEPTH, MAX_MANIFESTS};
use crate::executor::Executor;
use crate::manifest::{Descriptor, media_type};
use crate::output::{ImageOutput, OutputError, Receipt};
use crate::process::{Outcome, Summary, process};
use crate::progress::Progress;
use crate::source::ImageSource;
use crate::source::stored::SourceIndex;
use crate::task::LayerPlan;

/// What came of an index.
#[derive(Debug)]
pub struct CopiedIndex {
    /// What the output says of the index itself.
    pub receipt: Receipt,
    /// Its images in its order, those of nested indexes where these stand.
    pub images: Vec<Outcome>,
    /// Of all images together.
    pub summary: Summary,
}

/// How an index is copied.
#[derive(Clone)]
pub struct IndexPlan {
    /// What is done with every layer; its chain is empty.
    pub layers: Arc<LayerPlan>,
    /// Where that is done.
    pub executor: Arc<dyn Executor>,
    /// Called before each image, for a display of its progress.
    pub begin: Arc<dyn Fn(&Descriptor) -> Progress + Send + Sync>,
}

/// Copies an index that `source` was found to be.
///
/// Its images come first, one after the other, each found at the destination by its digest alone, and the index last: whoever
/// asks for its tag gets the old one or the whole new one. An entry that the source does not have is an error that names it.
pub async fn process_index(
    source: &dyn ImageSource,
    index: &SourceIndex,
    plan: &IndexPlan,
    output: &dyn ImageOutput,
) -> Result<CopiedIndex, Error> {
    if !plan.layers.chain.is_empty() {
        return Err(Error::FilteredIndex(index.name.to_string()));
    }
    let start = Instant::now();
    let mut copied = Copied::default();
    let receipt = copy(source, index, plan, output, 0, &mut copied).await?;
    let images = copied.images;
    let bytes = images.iter().map(|image| image.summary.bytes).fold(0, u64::saturating_add);
    let layers = images.iter().map(|image| image.layers.len()).sum();
    Ok(CopiedIndex { receipt, images, summary: Summary { bytes, layers, elapsed: start.elapsed() } })
}

/// What was copied so far, of the whole index.
#[derive(Default)]
struct Copied {
    /// An entry that stands twice, in different indexes too, is copied once.
    seen: HashSet<Digest>,
    images: Vec<Outcome>,
}

fn copy<'a>(
    source: &'a dyn ImageSource,
    index: &'a SourceIndex,
    plan: &'a IndexPlan,
    output: &'a dyn ImageOutput,
    depth: usize,
    copied: &'a mut Copied,
) -> BoxFuture<'a, Result<Receipt, Error>> {
    async move {
        if depth > MAX_INDEX_DEPTH {
            return Err(Error::IndexDepth(index.name.to_string()));
        }
        for entry in &index.parsed.manifests {
            if !copied.seen.insert(entry.digest.clone()) {
                continue;
            }
            if copied.seen.len() > MAX_MANIFESTS {
                return Err(Error::IndexSize(index.name.to_string()));
            }
            let no_indexes = || OutputError::NoIndexes { index: index.name.to_string() };
            let output = output.entry(&entry.digest).ok_or_else(no_indexes)?;
            let source = source.entry(entry).ok_or_else(no_indexes)?;
            match inner(source.as_ref(), entry).await? {
                Some(inner) => {
                    copy(source.as_ref(), &inner, plan, output.as_ref(), depth + 1, copied).await?;
                }
                None => {
                    let (layers, executor) = (Arc::clone(&plan.layers), Arc::clone(&plan.executor));
                    let progress = (plan.begin)(entry);
                    let outcome = process(source.as_ref(), layers, output, executor, &progress).await?;
                    copied.images.push(outcome);
                }
            }
        }
        output.put_index(index).await
    }
    .boxed()
}

/// The index that an entry names, if it names one. Its media type tells without a request.
async fn inner(source: &dyn ImageSource, entry: &Descriptor) -> Result<Option<SourceIndex>, Error> {
    match entry.media_type.as_str() {
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => Ok(None),
        _ => source.index().await,
    }
}
