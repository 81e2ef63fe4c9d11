//! Turns at layers, a value for each layer: what stands there is [`layers`](crate::engine::layers)'s.
//!
//! As a lock is, a turn is the claim of its holder. Of two who take a turn at once, the bucket refuses one.

use prost::Message as _;

use super::connect::bucket;
use super::{JetStream, JetStreamError, Lost, hash, patiently};
use crate::engine::layers::{LayerRecord, SeenLayer, Sharer};

impl JetStream {
    /// What stands of a layer, for one who wants it.
    pub(super) async fn look_at_layer(&self, layer: &str, who: &Sharer) -> Result<SeenLayer, JetStreamError> {
        let (revision, value) = self.value(&subject(layer)).await?.unzip();
        let mut record = read(value);
        let mut gone = Vec::new();
        for holder in record.holders() {
            if holder != who.claim && !self.holds_now(&holder).await? {
                gone.push(holder);
            }
        }
        record.forget(&gone);
        Ok(SeenLayer::new(layer, record, revision.unwrap_or_default(), who))
    }

    /// Takes the turn at a layer that still is as it was seen.
    pub(super) async fn begin_layer(&self, seen: SeenLayer, who: &Sharer) -> Result<bool, JetStreamError> {
        let SeenLayer { layer, mut record, revision, .. } = seen;
        let is_free = record.begin(who);
        let (subject, value) = (subject(&layer), bytes::Bytes::from(record.encode_to_vec()));
        // Where the answer to a write was lost that came first, the turn is found to be its own by looking.
        let written = patiently("share a layer", || self.put_if(&subject, value.clone(), revision));
        Ok(written.await? && is_free)
    }

    /// Writes down what came of a layer.
    pub(super) async fn finish_layer(
        &self,
        layer: &str,
        who: &Sharer,
        result: Option<String>,
    ) -> Result<(), JetStreamError> {
        let end = |record: &mut LayerRecord| record.end(who, result.clone());
        self.change_value("share a layer", &subject(layer), Lost::Again, |value| Ok(read(value)), end).await
    }
}

/// What cannot be read was not written by a coordinator with which anything can be shared.
fn read(value: Option<bytes::Bytes>) -> LayerRecord {
    value.and_then(|value| LayerRecord::decode(value).ok()).unwrap_or_default()
}

/// Where a layer is, whose name may have any characters.
fn subject(layer: &str) -> String {
    bucket("layers") + &hash(&[layer])
}
