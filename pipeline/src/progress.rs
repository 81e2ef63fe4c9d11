//! What a display may ask while an image is processed. Nothing here prints.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::blob::ByteCount;

/// The progress of one image: empty until its layers are known.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<OnceLock<Vec<LayerProgress>>>);

/// The progress of one layer.
#[derive(Debug)]
pub struct LayerProgress {
    /// What to call it.
    pub label: String,
    /// Bytes to read, where the source knows them.
    pub total: Option<u64>,
    /// Bytes read so far, of the stored form.
    pub bytes: ByteCount,
    state: AtomicU8,
    worker: Mutex<Option<Arc<str>>>,
    reason: Mutex<Option<Arc<str>>>,
}

/// Where a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerState {
    /// Not begun.
    Waiting,
    /// Being read and written.
    Running,
    /// At its destination.
    Done,
    /// At its destination without having moved: it was there before, was mounted, or stands in the image twice.
    Reused,
}

impl Progress {
    /// The layers, lowest first; none while the source is still being asked.
    pub fn layers(&self) -> &[LayerProgress] {
        self.0.get().map_or(&[], Vec::as_slice)
    }

    /// Says which layers there are: what each is called, and the bytes to read where they are known.
    pub fn begin(&self, layers: impl Iterator<Item = (String, Option<u64>)>) {
        let layers = layers.map(|(label, total)| LayerProgress {
            label,
            total,
            bytes: ByteCount::default(),
            state: AtomicU8::new(LayerState::Waiting as u8),
            worker: Mutex::default(),
            reason: Mutex::default(),
        });
        // A second begin would be a second image on one display; the first stays.
        let _ = self.0.set(layers.collect());
    }
}

/// The progress of images that follow each other, like those of an index: of the one that is on its way. Clones are handles on the same
/// one.
#[derive(Clone, Debug, Default)]
pub struct ImagesProgress(Arc<Mutex<Current>>);

/// The image that is on its way.
#[derive(Clone, Debug, Default)]
pub struct Current {
    /// How many were begun before it.
    pub image: usize,
    /// How many layers these had.
    pub layers_before: usize,
    /// How far it is itself.
    pub progress: Progress,
    is_begun: bool,
}

impl ImagesProgress {
    /// Begins the next image.
    pub fn begin(&self) -> Progress {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if current.is_begun {
            current.image += 1;
            current.layers_before += current.progress.layers().len();
            current.progress = Progress::default();
        }
        current.is_begun = true;
        current.progress.clone()
    }

    /// The one that is on its way; before the first, one without layers.
    pub fn current(&self) -> Current {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl LayerProgress {
    /// Where it is now.
    pub fn state(&self) -> LayerState {
        const STATES: [LayerState; 4] =
            [LayerState::Waiting, LayerState::Running, LayerState::Done, LayerState::Reused];
        STATES[usize::from(self.state.load(Ordering::Relaxed))]
    }

    /// The worker that has it, or had it last, where that is not this process.
    pub fn worker(&self) -> Option<Arc<str>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says which worker has it.
    pub fn set_worker(&self, worker: &str) {
        *self.worker.lock().unwrap_or_else(PoisonError::into_inner) = Some(worker.into());
    }

    /// Says why it does not go on; empty, where it does. Whether that is another reason than it last had.
    pub fn set_reason(&self, reason: &str) -> bool {
        let mut last = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if reason.is_empty() || last.as_deref() == Some(reason) {
            return false;
        }
        *last = Some(reason.into());
        true
    }

    /// Says where it is now.
    pub fn set(&self, state: LayerState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }
}
