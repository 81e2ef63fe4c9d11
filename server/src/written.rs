//! What was written of a layer, in words that are kept in an engine: for a later attempt at the same job, or for other jobs.

use occy_pipeline::compression::Format;
use occy_pipeline::digest::Digest;
use occy_pipeline::element::{StoredLayer, WrittenLayer};
use occy_pipeline::filter::Report;
use serde::{Deserialize, Serialize};

/// What was written of a layer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// None: the source's blob as it is.
    stored: Option<StoredRecord>,
    diff_id: Option<Digest>,
    edited: bool,
    reports: Vec<Option<Report>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredRecord {
    digest: Digest,
    size: u64,
    format: String,
}

impl Record {
    /// A text that says it.
    pub(crate) fn text(&self) -> String {
        serde_json::to_string(self).expect("a record is plain data")
    }

    /// None for a text that another version wrote: its layer is done again.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The layer, at that place in an image. None where another version knows what this one does not.
    pub(crate) fn layer(self, index: usize) -> Option<WrittenLayer> {
        let stored = match self.stored {
            None => StoredLayer::Original,
            Some(StoredRecord { digest, size, format }) => {
                let format = [Format::None, Format::Gzip, Format::Zstd]
                    .into_iter()
                    .find(|known| known.to_string() == format)?;
                StoredLayer::Written { digest, size, format }
            }
        };
        let Self { diff_id, edited, reports, .. } = self;
        Some(WrittenLayer { index, stored, diff_id, edited, reports })
    }
}

impl From<&WrittenLayer> for Record {
    fn from(written: &WrittenLayer) -> Self {
        let stored = match &written.stored {
            StoredLayer::Original => None,
            StoredLayer::Written { digest, size, format } => {
                Some(StoredRecord { digest: digest.clone(), size: *size, format: format.to_string() })
            }
        };
        Self {
            stored,
            diff_id: written.diff_id.clone(),
            edited: written.edited,
            reports: written.reports.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_again() {
        let digest = Digest::sha256(b"x");
        for stored in [
            StoredLayer::Original,
            StoredLayer::Written { digest: digest.clone(), size: 7, format: Format::Zstd },
        ] {
            let written = WrittenLayer {
                index: 3,
                stored: stored.clone(),
                diff_id: Some(digest.clone()),
                edited: true,
                reports: vec![None],
            };
            let read = Record::parse(&Record::from(&written).text()).unwrap().layer(3).unwrap();
            assert_eq!((read.stored, read.diff_id, read.edited), (stored, Some(digest.clone()), true));
        }
        assert!(Record::parse("{}").is_none());
    }
}
