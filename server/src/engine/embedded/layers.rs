//! Turns at layers, in memory: whoever could hear of them is in this process.

use std::collections::HashMap;

use crate::engine::Claim;
use crate::engine::layers::{LayerRecord, SeenLayer, Sharer};

/// Layers of which something is known while nobody is at work.
const KEPT: usize = 128;

/// What stands of each, and its revision.
#[derive(Debug, Default)]
pub(super) struct Layers {
    revision: u64,
    records: HashMap<String, (u64, LayerRecord)>,
}

impl Layers {
    pub(super) fn look(&self, layer: &str, who: &Sharer, holds: impl Fn(&Claim) -> bool) -> SeenLayer {
        let (revision, mut record) = self.records.get(layer).cloned().unwrap_or_default();
        let gone: Vec<_> = record.holders().into_iter().filter(|claim| !holds(claim)).collect();
        record.forget(&gone);
        SeenLayer::new(layer, record, revision, who)
    }

    pub(super) fn begin(&mut self, seen: SeenLayer, who: &Sharer, holds: impl Fn(&Claim) -> bool) -> bool {
        let SeenLayer { layer, mut record, revision, .. } = seen;
        if self.records.get(&layer).map_or(0, |(revision, _)| *revision) != revision {
            return false;
        }
        let is_free = record.begin(who);
        self.put(layer, record, holds);
        is_free
    }

    pub(super) fn end(
        &mut self,
        layer: &str,
        who: &Sharer,
        result: Option<String>,
        holds: impl Fn(&Claim) -> bool,
    ) {
        let (_, mut record) = self.records.get(layer).cloned().unwrap_or_default();
        record.end(who, result);
        self.put(layer.to_owned(), record, holds);
    }

    fn put(&mut self, layer: String, record: LayerRecord, holds: impl Fn(&Claim) -> bool) {
        self.revision += 1;
        self.records.insert(layer, (self.revision, record));
        if self.records.len() > KEPT {
            let idle = self.records.iter().filter(|(_, (_, record))| !record.holders().iter().any(&holds));
            let oldest = idle.min_by_key(|(_, (revision, _))| *revision).map(|(layer, _)| layer.clone());
            oldest.map(|layer| self.records.remove(&layer));
        }
    }
}
