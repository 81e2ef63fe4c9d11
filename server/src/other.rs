//! A filter that workers have and the coordinator has not: it is named here, and runs there.

use std::sync::Arc;

use occy_pipeline::filter::{
    FILTERS, Filter, FilterChain, FilterError, Finish, ImageFindings, LayerFilter, OutputFormat, Rendering,
    Report, SpecError, Target, Targets, Verdict, spec,
};
use occy_pipeline::layer::Keep;
use occy_pipeline::tar::{Limits, Member};
use occy_proto::v1::FilterCapability;

/// Such a filter.
#[derive(Debug)]
struct OtherFilter {
    /// As the client wrote it.
    text: String,
}

/// The filters of a spec. One that is not ours is taken as it is written, if `is_known` knows its name.
pub fn chain(texts: &[String], is_known: impl Fn(&str) -> bool) -> Result<FilterChain, SpecError> {
    let filters = texts.iter().map(|text| match spec::parse(text) {
        Err(SpecError::UnknownFilter { .. }) if is_known(name(text)) => {
            Ok(Arc::new(OtherFilter { text: text.clone() }) as Arc<dyn Filter>)
        }
        parsed => parsed,
    });
    Ok(FilterChain::new(filters.collect::<Result<_, _>>()?))
}

/// The name of a filter, in a text that names it.
pub fn name(text: &str) -> &str {
    text.split(':').next().unwrap_or_default()
}

/// Whether all filters of a chain are ours.
pub fn are_ours(chain: &FilterChain) -> bool {
    chain.specs().iter().all(|text| is_ours(text))
}

fn is_ours(text: &str) -> bool {
    FILTERS.iter().any(|kind| kind.name == name(text))
}

/// The versions of those filters of a chain that are not ours, of a worker that has these, in their order. None: it does not have all of them.
pub fn versions(chain: &FilterChain, has: &[FilterCapability]) -> Option<Vec<String>> {
    let specs = chain.specs();
    let others = specs.iter().filter(|text| !is_ours(text));
    let version = |text: &String| {
        has.iter().find(|filter| filter.name == name(text)).map(|filter| filter.version.clone())
    };
    others.map(version).collect()
}

impl Filter for OtherFilter {
    fn spec(&self) -> String {
        self.text.clone()
    }

    /// Nobody knows.
    fn edits(&self) -> bool {
        true
    }

    fn layer(&self, _targets: &Targets, _limits: &Limits) -> Box<dyn LayerFilter> {
        Box::new(Elsewhere(name(&self.text).to_owned()))
    }

    fn render(&self, image: &ImageFindings<'_>, _format: OutputFormat) -> Option<Rendering> {
        let texts = image.layers.iter().filter_map(|layer| match layer.report {
            Some(Report::Other { text }) => Some(text.as_str()),
            _ => None,
        });
        let text: String = texts.collect();
        (!text.is_empty()).then_some(Rendering { to: Target::Stdout, text })
    }
}

/// No worker of this process gets such a layer; one that did would refuse it.
struct Elsewhere(String);

impl LayerFilter for Elsewhere {
    fn member(&mut self, _member: &mut Member, _keep: &mut Keep) -> Result<Verdict, FilterError> {
        Err(FilterError::Elsewhere { filter: self.0.clone() })
    }

    fn finish(self: Box<Self>) -> Finish {
        Finish::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_versions_of_others_are_known_from_a_worker_that_has_them() {
        let chain = chain(&["exclude:pattern=a".to_owned(), "other:x=1".to_owned()], |_| true).unwrap();
        let filter = |name: &str, version: &str| FilterCapability {
            name: name.to_owned(),
            version: version.to_owned(),
            ..FilterCapability::default()
        };
        let has = [filter("exclude", "7"), filter("other", "2")];
        assert_eq!(versions(&chain, &has), Some(vec!["2".to_owned()]));
        assert_eq!(versions(&chain, &has[..1]), None);
        assert_eq!(versions(&FilterChain::default(), &[]), Some(Vec::new()));
    }

    #[test]
    fn a_filter_that_is_not_ours_keeps_its_words() {
        let texts = ["exclude:pattern=a".to_owned(), "Upper_Case: x=1,y".to_owned()];
        let chain_of = |known: &str| chain(&texts, |name| name == known);
        assert_eq!(chain_of("Upper_Case").unwrap().specs(), texts);
        assert!(matches!(chain_of("other"), Err(SpecError::UnknownFilter { .. })));
        // One of ours is never another's, and what is wrong with it is said.
        assert!(chain(&["exclude".to_owned()], |_| true).is_err());
    }
}
