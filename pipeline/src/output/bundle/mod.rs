//! `oci://PATH`: a runtime bundle (runtime-spec, `bundle.md`), which `runc run` starts: the layers merged into `rootfs/`, and
//! the image's config converted into `config.json` ([`spec`]).
//!
//! The bundle is built beside its place and renamed into it. Layers that arrive before their turn wait in unlinked files
//! there, so that they need not be copied between file systems, under the cap of all temporary files.
//!
//! With `rootless=true` the bundle is for the user who makes it: everything belongs to him, and the container's root is
//! mapped to him.

mod spec;
mod user;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::merged::{Keep, Merged, Order, report};
use super::staging::{StagedDir, fail, wait_for_others};
use super::{ExpectedLayer, FinishedImage, LayerForm, OutputError, OutputKind, Receipt, refuse_artifact};
use crate::atomic::parent;
use crate::blob::{BlobSummary, ByteCount, LayerStream};
use crate::compression::Format;
use crate::element::{Image, StoredLayer};
use crate::error::Error;
use crate::spool::SpoolDir;
use crate::tar::Limits;
use crate::thread::{self, blocking};
use crate::unpack;

pub use self::user::UserError;

/// This output's line in the table.
pub const KIND: OutputKind = OutputKind {
    scheme: "oci",
    syntax: "oci://PATH",
    about: "a runtime bundle for `runc run`",
    options: &["rootless", "force"],
};

/// How a bundle is made.
#[derive(Clone, Debug, Default)]
pub struct BundleOptions {
    /// For the user who makes it, without any right of root.
    pub rootless: bool,
    /// Replace what is at the destination.
    pub force: bool,
    /// What a layer may demand of who unpacks it.
    pub limits: Limits,
}

/// A bundle that an image is made into.
#[derive(Debug)]
pub struct BundleOutput {
    path: PathBuf,
    options: BundleOptions,
    spools: SpoolDir,
    /// Shared with the threads that unpack, the last of which removes what was not completed.
    bundle: Mutex<Option<Arc<Bundle>>>,
}

#[derive(Debug)]
struct Bundle {
    merged: Merged,
    spools: SpoolDir,
    staged: StagedDir,
}

/// The name of the tree in the bundle.
const ROOTFS: &str = "rootfs";

impl BundleOutput {
    /// A bundle at `path`. Its temporary files count as those of `spools`.
    pub fn new(path: impl Into<PathBuf>, options: BundleOptions, spools: SpoolDir) -> Self {
        Self { path: path.into(), options, spools, bundle: Mutex::new(None) }
    }

    fn bundle(&self) -> MutexGuard<'_, Option<Arc<Bundle>>> {
        self.bundle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BundleOutput {
    /// A run that failed may have threads that have yet to notice; what they write is to be removed before the process ends.
    fn drop(&mut self) {
        if let Some(bundle) = self.bundle().take() {
            bundle.merged.cancel();
            wait_for_others(&bundle);
        }
    }
}

#[async_trait::async_trait]
impl super::ImageOutput for BundleOutput {
    fn form(&self) -> LayerForm {
        LayerForm::Tar
    }

    async fn begin(&self, image: &Image, expected: &[ExpectedLayer]) -> Result<(), Error> {
        refuse_artifact(image, format!("oci://{}", self.path.display()))?;
        let (path, options, spools) = (self.path.clone(), self.options.clone(), self.spools.clone());
        let order = Order::of(image, expected);
        let bundle = blocking(move || {
            let staged = StagedDir::create(&path, options.force)?;
            let spools = spools.at(parent(staged.path()));
            let unpacking = unpack::Options { owners: !options.rootless, limits: options.limits };
            let merged = Merged::create(&staged.path().join(ROOTFS), order, unpacking)?;
            Ok::<_, Error>(Bundle { merged, spools, staged })
        });
        *self.bundle() = Some(Arc::new(bundle.await?));
        Ok(())
    }

    async fn write_layer(
        &self,
        index: usize,
        mut stream: LayerStream,
        _format: Format,
        progress: &ByteCount,
    ) -> Result<StoredLayer, Error> {
        let bundle = Arc::clone(self.bundle().as_ref().expect("begin ran before any layer"));
        let progress = progress.clone();
        thread::run("write", move || {
            let keep = Keep::Spool(&bundle.spools);
            let BlobSummary { digest, size } = bundle.merged.write(index, &mut stream, keep, &progress)?;
            Ok(StoredLayer::Written { digest, size, format: Format::None })
        })
        .await?
    }

    async fn finalize(&self, finished: FinishedImage<'_>) -> Result<Receipt, Error> {
        let bundle = self.bundle().take().expect("begin ran before finalize");
        let Bundle { merged, staged, .. } =
            Arc::into_inner(bundle).expect("every layer is unpacked before the image is finalized");
        let (config, options) = (finished.config.clone(), self.options.clone());
        blocking(move || {
            report(merged.finish()?);
            let config = serde_json::from_slice(&config).expect("the pipeline's own config parses");
            let rootfs = staged.path().join(ROOTFS);
            let spec = spec::runtime_config(&config, &rootfs, options.rootless).map_err(OutputError::from)?;
            let mut bytes = serde_json::to_vec_pretty(&spec).expect("a JSON value can be written");
            bytes.push(b'\n');
            let path = staged.path().join("config.json");
            std::fs::write(&path, bytes).map_err(fail("write", &path))?;
            staged.publish(options.force)?;
            Ok::<_, Error>(())
        })
        .await?;
        Ok(Receipt { destination: format!("oci://{}", self.path.display()), ..Receipt::default() })
    }
}
