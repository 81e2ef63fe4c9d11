//! Progress on standard error: a bar for each layer on a terminal, a line every ten seconds elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle as BarStyle};
use occy_pipeline::progress::{LayerProgress, LayerState, Progress};
use occy_pipeline::tar::path::printable;

use crate::options::{Global, ProgressStyle};

const LINE_EVERY: Duration = Duration::from_secs(10);
const BARS_EVERY: Duration = Duration::from_millis(100);

/// Shows progress until it is dropped.
#[derive(Debug)]
pub(crate) struct Display(Option<tokio::task::JoinHandle<()>>);

impl Display {
    /// Begins to show `progress`.
    pub(crate) fn start(global: &Global, progress: Progress) -> Self {
        let bars = match global.progress {
            _ if global.quiet => return Self(None),
            ProgressStyle::None => return Self(None),
            ProgressStyle::Bars => true,
            ProgressStyle::Plain => false,
            ProgressStyle::Auto => std::io::stderr().is_terminal(),
        };
        Self(Some(if bars { tokio::spawn(show_bars(progress)) } else { tokio::spawn(print_lines(progress)) }))
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

async fn print_lines(progress: Progress) {
    let mut ticks = tokio::time::interval(LINE_EVERY);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        if let Some(line) = line(progress.layers()) {
            eprintln!("{line}");
        }
    }
}

/// `Progress: 2 of 5 layers done, 41943040 of 98765432 bytes read`.
fn line(layers: &[LayerProgress]) -> Option<String> {
    if layers.is_empty() {
        return None;
    }
    let is_done = |layer: &&LayerProgress| matches!(layer.state(), LayerState::Done | LayerState::Reused);
    let done = layers.iter().filter(is_done).count();
    let read = layers.iter().map(|layer| layer.bytes.get()).fold(0, u64::saturating_add);
    let mut totals =
        layers.iter().filter(|layer| layer.state() != LayerState::Reused).map(|layer| layer.total);
    let total = totals.try_fold(0, |sum: u64, total| Some(sum.saturating_add(total?)));
    let of = total.map(|total| format!(" of {total}")).unwrap_or_default();
    Some(format!("Progress: {done} of {} layers done, {read}{of} bytes read", layers.len()))
}

async fn show_bars(progress: Progress) {
    let bars = Bars::default();
    let mut ticks = tokio::time::interval(BARS_EVERY);
    let mut shown: Vec<ProgressBar> = Vec::new();
    loop {
        ticks.tick().await;
        let layers = progress.layers();
        if shown.is_empty() {
            shown = layers.iter().map(|layer| bars.add(layer)).collect();
        }
        for (layer, bar) in layers.iter().zip(&shown) {
            bar.set_position(layer.bytes.get());
            let word = match layer.state() {
                LayerState::Waiting => "waiting",
                LayerState::Running => "",
                LayerState::Done => "done",
                LayerState::Reused => "already there",
            };
            bar.set_message(word);
            if matches!(layer.state(), LayerState::Done | LayerState::Reused) && !bar.is_finished() {
                bar.finish_with_message(word);
            }
        }
    }
}

/// The bars on the terminal. Dropped with the task that draws them, they leave a clean last line.
#[derive(Debug, Default)]
struct Bars(MultiProgress);

impl Bars {
    fn add(&self, layer: &LayerProgress) -> ProgressBar {
        let template = match layer.total {
            Some(_) => "{prefix} [{bar:30}] {bytes:>10}/{total_bytes:<10} {bytes_per_sec:>12} {msg}",
            None => "{prefix} {spinner} {bytes:>10} {bytes_per_sec:>12} {msg}",
        };
        let bar = self.0.add(match layer.total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::no_length(),
        });
        bar.set_style(
            BarStyle::with_template(template).expect("the templates are fixed").progress_chars("=> "),
        );
        let label = layer.label.strip_prefix("sha256:").unwrap_or(&layer.label);
        bar.set_prefix(printable(format!("{label:.12}").as_bytes()));
        bar
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        let _ = self.0.clear();
    }
}
