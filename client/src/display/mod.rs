//! Progress on standard error: a bar for each layer on a terminal, a line every ten seconds elsewhere.
//!
//! A thread of its own draws, and whoever drops the [`Display`] waits until it has drawn for the last time: what is printed
//! after that stands on a clean line. What has to be said while bars are on the screen goes through [`Aside`].

mod bars;

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use occy_pipeline::progress::{LayerProgress, LayerState, Progress};
use occy_pipeline::spool::SpoolDir;
use occy_pipeline::tar::path::printable;

use crate::options::{Global, ProgressStyle};

const LINE_EVERY: Duration = Duration::from_secs(10);
const BARS_EVERY: Duration = Duration::from_millis(100);

/// Lines of bars that are on the screen now, right above the cursor.
static DRAWN: Mutex<usize> = Mutex::new(0);

/// Shows progress until it is dropped, and has left no bar behind then.
#[derive(Debug)]
pub(crate) struct Display(Option<Drawing>);

#[derive(Debug)]
struct Drawing {
    /// Nothing is sent: the thread ends when this is dropped.
    stop: SyncSender<()>,
    thread: JoinHandle<()>,
}

/// What can be shown.
pub(crate) trait Picture: Send + Sync {
    /// All of it in one line.
    fn line(&self) -> String;

    /// More of it, where a terminal has room for that; none where the line is all there is.
    fn lines(&self, _columns: usize, _rows: usize) -> Vec<String> {
        Vec::new()
    }
}

/// One image on its way.
pub(crate) struct ImagePicture {
    progress: Progress,
    /// What is being opened, for as long as there are no layers.
    source: String,
    /// Where it may be kept before its layers are known.
    spools: SpoolDir,
    bars: Mutex<bars::Bars>,
}

impl Display {
    /// Begins to show the `progress` of what comes from `source`.
    pub(crate) fn start(global: &Global, progress: Progress, source: &str, spools: &SpoolDir) -> Self {
        Self::of(global, Arc::new(ImagePicture::new(progress, source, spools)))
    }

    /// Begins to show anything.
    pub(crate) fn of(global: &Global, shown: Arc<dyn Picture>) -> Self {
        let is_terminal =
            || std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bars = match global.progress {
            _ if global.quiet => return Self(None),
            ProgressStyle::None => return Self(None),
            ProgressStyle::Plain => false,
            ProgressStyle::Auto | ProgressStyle::Bars => is_terminal(),
        };
        let (stop, stopped) = sync_channel(1);
        let draw = move || if bars { show_bars(&*shown, &stopped) } else { print_lines(&*shown, &stopped) };
        // Without a thread to spare there is work enough without a display.
        let thread = std::thread::Builder::new().name("display".to_owned()).spawn(draw);
        Self(thread.ok().map(|thread| Drawing { stop, thread }))
    }
}

/// Begins the display of an image.
pub(crate) type Begin = Arc<dyn Fn() -> Progress + Send + Sync>;

/// The display of images that follow each other, one at a time. Dropped, with what begins them, it has left no bar behind.
#[derive(Clone)]
pub(crate) struct Shown {
    global: Global,
    source: String,
    spools: SpoolDir,
    display: Arc<Mutex<Option<Display>>>,
}

impl Shown {
    /// Nothing yet, of what comes from `source`.
    pub(crate) fn new(global: &Global, source: &str, spools: &SpoolDir) -> Self {
        let (global, source, spools) = (global.clone(), source.to_owned(), spools.clone());
        Self { global, source, spools, display: Arc::default() }
    }

    /// What begins an image, and ends the one before it.
    pub(crate) fn begin_each(&self) -> Begin {
        let shown = self.clone();
        Arc::new(move || {
            let progress = Progress::default();
            let mut display = shown.display.lock().unwrap_or_else(PoisonError::into_inner);
            drop(display.take());
            *display = Some(Display::start(&shown.global, progress.clone(), &shown.source, &shown.spools));
            progress
        })
    }

    /// Nothing more.
    pub(crate) fn end(&self) {
        drop(self.display.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(Drawing { stop, thread }) = self.0.take() {
            drop(stop);
            // A display that panicked has nothing left to draw.
            let _ = thread.join();
        }
    }
}

/// Whether it is time for the next picture, and not for the end.
fn next(stopped: &Receiver<()>, every: Duration) -> bool {
    matches!(stopped.recv_timeout(every), Err(RecvTimeoutError::Timeout))
}

fn print_lines(shown: &dyn Picture, stopped: &Receiver<()>) {
    while next(stopped, LINE_EVERY) {
        let _ = writeln!(Aside, "{}", shown.line());
    }
}

fn show_bars(shown: &dyn Picture, stopped: &Receiver<()>) {
    while next(stopped, BARS_EVERY) {
        let (columns, rows) = terminal_size::terminal_size_of(std::io::stderr())
            .map_or((80, 24), |(columns, rows)| (usize::from(columns.0), usize::from(rows.0)));
        let mut lines = shown.lines(columns, rows);
        if lines.is_empty() {
            lines.push(bars::cut(&shown.line(), columns));
        }
        let mut drawn = DRAWN.lock().unwrap_or_else(PoisonError::into_inner);
        // One write: no other text gets between the lines.
        let text = erased(*drawn) + &lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        *drawn = lines.len();
        // Nobody can be told that the terminal is gone.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    let _ = Aside.write_all(b"");
}

/// What takes that many lines above the cursor off the screen.
fn erased(lines: usize) -> String {
    if lines == 0 { String::new() } else { format!("\r\x1b[{lines}A\x1b[J") }
}

/// Standard error for what is said while bars may be on the screen: they are taken off before, and drawn again below.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Aside;

impl Write for Aside {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let mut drawn = DRAWN.lock().unwrap_or_else(PoisonError::into_inner);
        let erase = erased(std::mem::take(&mut *drawn));
        std::io::stderr().write_all(&[erase.as_bytes(), bytes].concat())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

impl ImagePicture {
    /// The `progress` of what comes from `source`.
    pub(crate) fn new(progress: Progress, source: &str, spools: &SpoolDir) -> Self {
        Self { progress, source: source.to_owned(), spools: spools.clone(), bars: Mutex::default() }
    }
}

impl Picture for ImagePicture {
    fn lines(&self, columns: usize, rows: usize) -> Vec<String> {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        match self.progress.layers() {
            [] => Vec::new(),
            layers => bars.lines(layers, columns, rows),
        }
    }

    /// `Progress: 2 of 5 layers done, 41943040 of 98765432 bytes read`.
    fn line(&self) -> String {
        let layers = self.progress.layers();
        if layers.is_empty() {
            return match self.spools.used() {
                0 => format!("Progress: opening {}", self.source),
                kept => format!("Progress: opening {}, {kept} bytes kept so far", self.source),
            };
        }
        let done = layers.iter().filter(|layer| is_done(layer)).count();
        let read = layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.bytes.get()));
        let moved = || layers.iter().filter(|layer| layer.state() != LayerState::Reused);
        let total = moved().try_fold(0_u64, |sum, layer| Some(sum.saturating_add(layer.total?)));
        let of = total.map(|total| format!(" of {total}")).unwrap_or_default();
        let count = match layers.len() {
            1 => "1 layer".to_owned(),
            count => format!("{count} layers"),
        };
        let at_work = at_work(layers);
        format!("Progress: {done} of {count} done, {read}{of} bytes read{at_work}")
    }
}

/// `; layer 3 at worker-1, layer 4 at worker-2`, where others than this process work.
fn at_work(layers: &[LayerProgress]) -> String {
    let running = layers.iter().enumerate().filter(|(_, layer)| layer.state() == LayerState::Running);
    let workers = running.filter_map(|(index, layer)| {
        let worker = layer.worker()?;
        Some(format!("layer {} at {}", index + 1, printable(worker.as_bytes())))
    });
    let workers: Vec<_> = workers.collect();
    if workers.is_empty() { String::new() } else { format!("; {}", workers.join(", ")) }
}

fn is_done(layer: &LayerProgress) -> bool {
    matches!(layer.state(), LayerState::Done | LayerState::Reused)
}
