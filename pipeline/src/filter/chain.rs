//! The filters of a job, in order.

use std::sync::Arc;

use super::{Filter, SpecError, spec};

/// Counts what changes the bytes of rewritten tars, how they are compressed, or the reports of filters: equal versions make the
/// same of the same layer. See [`FilterChain::fingerprint`].
pub const ENCODER_VERSION: u32 = 1;
/// Counts what of that changes the bytes of rewritten tars or configs: whoever raises it raises [`ENCODER_VERSION`] too. Equal versions
/// make the same diff_ids, whatever the layers are then compressed with.
pub const REWRITER_VERSION: u32 = 1;

/// The filters of a job, in the order in which elements pass through them.
#[derive(Clone, Debug, Default)]
pub struct FilterChain {
    filters: Vec<Arc<dyn Filter>>,
}

impl FilterChain {
    /// From filters at hand.
    pub fn new(filters: Vec<Arc<dyn Filter>>) -> Self {
        Self { filters }
    }

    /// From what was given with `-f`, in its order.
    pub fn parse<S: AsRef<str>>(specs: impl IntoIterator<Item = S>) -> Result<Self, SpecError> {
        let filters = specs.into_iter().map(|text| spec::parse(text.as_ref())).collect::<Result<_, _>>()?;
        Ok(Self { filters })
    }

    /// The filters.
    pub fn filters(&self) -> &[Arc<dyn Filter>] {
        &self.filters
    }

    /// The canonical form of each filter.
    pub fn specs(&self) -> Vec<String> {
        self.filters.iter().map(|filter| filter.spec()).collect()
    }

    /// What a layer's result depends on beside the layer itself: the filters in canonical form, in their order, and the
    /// version of what rewrites layers. Equal fingerprints give equal bytes and reports.
    pub fn fingerprint(&self) -> String {
        format!("{ENCODER_VERSION} {}", serde_json::Value::from(self.specs()))
    }

    /// Whether there are no filters.
    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// Whether any filter may change layers.
    pub fn edits(&self) -> bool {
        self.filters.iter().any(|filter| filter.edits())
    }

    /// Whether layers have commonly another size behind the filters.
    pub fn resizes(&self) -> bool {
        self.filters.iter().any(|filter| filter.resizes())
    }

    /// Has every filter change the config, and says whether one did.
    pub fn edit_config(&self, config: &mut serde_json::Value) -> bool {
        self.edit_config_before(self.filters.len(), config)
    }

    /// Has the filters before a position change the config: what a filter there would see.
    pub fn edit_config_before(&self, position: usize, config: &mut serde_json::Value) -> bool {
        self.filters[..position].iter().fold(false, |changed, filter| filter.edit_config(config) | changed)
    }
}
