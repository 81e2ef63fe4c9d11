//! The lines of the bars: which layers get one, and what fits into the width of the terminal. Nothing here draws.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use occy_pipeline::progress::{LayerProgress, LayerState};
use occy_pipeline::tar::path::printable;

/// A speed is that of the last seconds.
const SPEED_OVER: Duration = Duration::from_secs(5);
/// Before that much time a speed means nothing: the first bytes come out of buffers.
const SPEED_AFTER: Duration = Duration::from_secs(1);
const WIDEST_BAR: usize = 30;
const NARROWEST_BAR: usize = 8;

/// What the lines need to remember from one picture to the next.
#[derive(Debug, Default)]
pub(super) struct Bars(Vec<Speed>);

/// When a layer had how many bytes, oldest first.
#[derive(Debug, Default)]
struct Speed(VecDeque<(Instant, u64)>);

impl Bars {
    /// One line for each layer; where the terminal is not high enough, for those that are being worked on first, and a last
    /// line for the others.
    pub(super) fn lines(&mut self, layers: &[LayerProgress], columns: usize, rows: usize) -> Vec<String> {
        let now = Instant::now();
        self.0.resize_with(layers.len(), Speed::default);
        for (speed, layer) in self.0.iter_mut().zip(layers) {
            match layer.state() {
                LayerState::Running => speed.note(now, layer.bytes.get()),
                _ => speed.0.clear(),
            }
        }
        let room = rows.saturating_sub(2).max(1);
        let (shown, hidden) = chosen(layers, room);
        let names = layers.iter().filter_map(worker).map(|name| 1 + name.chars().count()).max().unwrap_or(0);
        let mut lines: Vec<String> = shown
            .into_iter()
            .map(|index| line(&layers[index], self.0[index].get(), columns, names))
            .collect();
        lines.extend(summary(&hidden, layers).map(|line| cut(&line, columns)));
        lines
    }
}

/// The layers that get a line, in their order, and those that do not.
fn chosen(layers: &[LayerProgress], room: usize) -> (Vec<usize>, Vec<usize>) {
    let mut order: Vec<usize> = (0..layers.len()).collect();
    if order.len() <= room {
        return (order, Vec::new());
    }
    order.sort_by_key(|&index| match layers[index].state() {
        LayerState::Running => 0,
        LayerState::Waiting => 1,
        LayerState::Done | LayerState::Reused => 2,
    });
    let hidden = order.split_off(room - 1);
    order.sort_unstable();
    (order, hidden)
}

/// `... and 12 more: 3 running, 4 waiting, 5 done`.
fn summary(hidden: &[usize], layers: &[LayerProgress]) -> Option<String> {
    let states: [(&str, &[LayerState]); 3] = [
        ("running", &[LayerState::Running]),
        ("waiting", &[LayerState::Waiting]),
        ("done", &[LayerState::Done, LayerState::Reused]),
    ];
    let counts = states.iter().filter_map(|(word, states)| {
        let count = hidden.iter().filter(|&&index| states.contains(&layers[index].state())).count();
        (count > 0).then(|| format!("{count} {word}"))
    });
    let counts = counts.collect::<Vec<_>>().join(", ");
    (!hidden.is_empty()).then(|| format!("... and {} more: {counts}", hidden.len()))
}

/// The worker that has a layer; so much of its name as there is room for.
fn worker(layer: &LayerProgress) -> Option<String> {
    layer.worker().map(|name| format!("{:.16}", printable(name.as_bytes())))
}

/// `8f2c91d0a5b7 [=====>        ]   12.3 MiB / 45.6 MiB   3.4 MiB/s worker-1`, or less of it. `names` are the columns that are
/// kept free for workers.
fn line(layer: &LayerProgress, speed: Option<u64>, columns: usize, names: usize) -> String {
    let label = layer.label.strip_prefix("sha256:").unwrap_or(&layer.label);
    let read = layer.bytes.get();
    let word = match layer.state() {
        LayerState::Waiting => "waiting".to_owned(),
        LayerState::Running => {
            let speed = speed.map(|speed| format!("{}/s", size(speed)));
            speed.into_iter().chain(worker(layer)).collect::<Vec<_>>().join(" ")
        }
        LayerState::Done => "done".to_owned(),
        LayerState::Reused => "already there".to_owned(),
    };
    let counts = match layer.total {
        Some(total) => format!("{:>10} / {:<10}", size(read), size(total)),
        None => format!("{:>10}", size(read)),
    };
    let text = format!("{:.12}", printable(label.as_bytes()));
    // The label with a space, the brackets with one, the counts with one, and the longest word.
    let taken = 13 + 3 + counts.len() + 1 + "already there".len() + names;
    let width = columns.saturating_sub(1 + taken).min(WIDEST_BAR);
    let line = match layer.total {
        Some(total) if width >= NARROWEST_BAR => {
            format!("{text:<12} [{}] {counts} {word}", bar(read, total, width))
        }
        Some(total) if columns < 13 + counts.len() + 1 + "already there".len() => {
            let word = if layer.state() == LayerState::Running { percent(read, total) } else { word };
            format!("{text:<12} {word}")
        }
        _ => format!("{text:<12} {counts} {word}"),
    };
    cut(line.trim_end(), columns)
}

fn bar(read: u64, total: u64, width: usize) -> String {
    let part = u128::from(read.min(total)) * width as u128 / u128::from(total.max(1));
    let filled = if total == 0 { width } else { usize::try_from(part).unwrap_or(width) };
    let head = if filled > 0 && filled < width { ">" } else { "" };
    format!("{:<width$}", "=".repeat(filled - head.len()) + head)
}

fn percent(read: u64, total: u64) -> String {
    format!("{}%", u128::from(read.min(total)) * 100 / u128::from(total.max(1)))
}

/// A line that a terminal of that width does not wrap.
pub(super) fn cut(line: &str, columns: usize) -> String {
    line.chars().map(|c| if c.is_control() { '?' } else { c }).take(columns.saturating_sub(1)).collect()
}

/// `12.3 MiB`: never more than ten columns.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let unit = usize::try_from((bytes.ilog2() / 10).saturating_sub(1)).unwrap_or_default().min(5);
    // Tenths, in whole numbers: the last digit is cut off, not rounded to a unit that it has not reached.
    let tenths = (u128::from(bytes) * 10) >> (10 * (unit + 1));
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

impl Speed {
    fn note(&mut self, now: Instant, bytes: u64) {
        if self.0.back().is_some_and(|&(_, before)| before > bytes) {
            // The layer was begun again.
            self.0.clear();
        }
        self.0.push_back((now, bytes));
        while self.0.get(1).is_some_and(|&(second, _)| now.duration_since(second) > SPEED_OVER) {
            self.0.pop_front();
        }
    }

    /// Bytes a second.
    fn get(&self) -> Option<u64> {
        let (&(start, before), &(now, bytes)) = (self.0.front()?, self.0.back()?);
        let elapsed = now.duration_since(start);
        if elapsed < SPEED_AFTER {
            return None;
        }
        u64::try_from(u128::from(bytes - before) * 1000 / elapsed.as_millis()).ok()
    }
}

#[cfg(test)]
mod tests {
    use occy_pipeline::progress::Progress;

    use super::*;

    fn progress(count: usize) -> Progress {
        let progress = Progress::default();
        progress.begin((0..count).map(|index| (format!("sha256:{index:064}"), Some(50 << 20))));
        progress
    }

    fn lines(progress: &Progress, columns: usize, rows: usize) -> Vec<String> {
        Bars::default().lines(progress.layers(), columns, rows)
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        let progress = progress(4);
        let states = [LayerState::Waiting, LayerState::Running, LayerState::Done, LayerState::Reused];
        for (layer, state) in progress.layers().iter().zip(states) {
            layer.set(state);
            layer.bytes.add(33 << 20);
        }
        for columns in 0..200 {
            for line in lines(&progress, columns, 24) {
                assert!(line.chars().count() < columns.max(1), "{columns}: {line}");
            }
        }
        assert_eq!(lines(&progress, 80, 24)[3].split(' ').next_back(), Some("there"));
        assert!(
            lines(&progress, 80, 24)[1].contains("[================>         ]"),
            "{:?}",
            lines(&progress, 80, 24)
        );
        assert_eq!(lines(&progress, 40, 24)[1], "000000000000 66%");
        assert_eq!(lines(&progress, 40, 24)[3], "000000000000 already there");
    }

    #[test]
    fn a_layer_that_a_worker_has_names_it_and_no_bar_is_longer_than_another() {
        let progress = progress(2);
        for layer in progress.layers() {
            layer.set(LayerState::Running);
        }
        progress.layers()[1].set_worker("embedded-1\u{1b}");
        let lines = lines(&progress, 100, 24);
        assert!(lines[1].ends_with("embedded-1\\u{1b}"), "{lines:?}");
        assert_eq!(lines[0].find(']'), lines[1].find(']'), "{lines:?}");
    }

    #[test]
    fn layers_that_are_worked_on_come_first_where_the_terminal_is_low() {
        let progress = progress(40);
        progress.layers()[3].set(LayerState::Done);
        progress.layers()[39].set(LayerState::Running);
        let shown = lines(&progress, 80, 10);
        assert_eq!(shown.len(), 8);
        assert!(shown[6].starts_with("000000000000 [") && !shown[6].contains("waiting"), "{shown:#?}");
        assert_eq!(shown[7], "... and 33 more: 32 waiting, 1 done");
        assert_eq!(lines(&progress, 80, 42).len(), 40);
        assert_eq!(lines(&progress, 80, 0).len(), 1);
    }

    #[test]
    fn a_speed_is_of_the_last_seconds_and_not_told_at_once() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut speed = Speed::default();
        speed.note(start, 0);
        speed.note(start + Duration::from_millis(1), 1 << 30);
        assert_eq!(speed.get(), None);
        for seconds in 1..20 {
            speed.note(at(seconds), (1 << 30) + seconds * 1000);
        }
        assert_eq!(speed.get(), Some(1000));
        speed.note(at(20), 5);
        assert_eq!(speed.get(), None, "begun again");
    }

    #[test]
    fn sizes_are_short() {
        let shown = [0, 1023, 1024, 1 << 20, (1 << 30) - 1, u64::MAX].map(size);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1023.9 MiB", "15.9 EiB"]);
    }
}
