//! `--coordinator`: the same commands, done by a coordinator and its workers.
//!
//! `registry://` ends are the coordinator's. Every other end is here: a source's elements are sent ([`upload`]), and an image that
//! comes back goes through the pipeline's own [`process`](occy_pipeline::process::process) into the same outputs as ever, with
//! the coordinator as its source and its executor ([`call`]). Whole images and indexes, and what belongs to them, are read from
//! layouts of this machine, and written to them, by the coordinator itself, to which they are lent ([`lend`]). What filters find is printed by whoever has run them, so that the
//! text is the same whoever that is.

pub(crate) mod call;
pub(crate) mod connect;
pub(crate) mod copy;
pub(crate) mod error;
pub(crate) mod findings;
pub(crate) mod lend;
pub(crate) mod logins;
pub(crate) mod look;
pub(crate) mod mirror;
pub(crate) mod names;
pub(crate) mod spec;
pub(crate) mod upload;
pub(crate) mod verify;
pub(crate) mod watch;

use occy_pipeline::progress::{LayerProgress, LayerState, Progress};
use occy_pipeline::tar::path::printable;
use occy_proto::v1::{self, CallProgress};

/// Whether an end is the coordinator's.
pub(crate) fn is_registry(uri: &str) -> bool {
    uri.starts_with("registry://")
}

/// An end as the coordinator is told of it: empty where it is here.
fn told(uri: &str) -> String {
    if is_registry(uri) { uri.to_owned() } else { String::new() }
}

/// Shows what a coordinator tells of a call. Bytes that are sent from here are counted here.
fn show(progress: &Progress, told: &CallProgress, counts_bytes: bool) {
    if progress.layers().is_empty() {
        progress.begin(told.layers.iter().map(|layer| (layer.label.clone(), layer.source_size)));
    }
    for status in &told.layers {
        let Some(layer) = progress.layers().get(status.index as usize) else { continue };
        match status.state() {
            v1::LayerState::Running => layer.set(LayerState::Running),
            v1::LayerState::Done => {
                layer.set(LayerState::Done);
                // Between two words of it the last bytes went by.
                layer.bytes.set(layer.total.unwrap_or(layer.bytes.get()));
            }
            v1::LayerState::Reused => layer.set(LayerState::Reused),
            v1::LayerState::Waiting | v1::LayerState::Unspecified => {}
        }
        tell_place(layer, status);
    }
    for running in told.running.iter().filter(|_| counts_bytes) {
        if let Some(layer) = progress.layers().get(running.index as usize) {
            layer.bytes.set(running.bytes);
        }
    }
}

/// Shows which worker has a layer, and says why it does not go on, once for each reason.
fn tell_place(layer: &LayerProgress, status: &v1::LayerStatus) {
    if !status.worker.is_empty() {
        layer.set_worker(&status.worker);
    }
    if layer.set_reason(&status.waiting_reason) {
        let reason = printable(status.waiting_reason.as_bytes());
        tracing::warn!("layer {} waits: {reason}", status.index + 1);
    }
}
