//! A filter that workers have and the coordinator has not: it is named here, and runs there. All layers of an image are made by one version
//! of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use occy_pipeline::filter::{
    FILTERS, Filter, FilterChain, FilterError, Finish, ImageFindings, LayerFilter, OutputFormat, Rendering,
    Report, SpecError, Target, Targets, Verdict, spec,
};
use occy_pipeline::layer::Keep;
use occy_pipeline::tar::{Limits, Member};
use occy_proto::v1::FilterCapability;

use crate::admit::{filter_of, version_need};
use crate::schedule::Capabilities;

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
    chain.specs().iter().all(|text| is_ours(name(text)))
}

fn is_ours(name: &str) -> bool {
    FILTERS.iter().any(|kind| kind.name == name)
}

/// What a worker offers besides, which has a version of a filter that is not ours.
pub fn offered_version(filter: &FilterCapability) -> Option<String> {
    (!is_ours(&filter.name)).then(|| version_need(&filter.name, &filter.version))
}

/// The versions of filters that are not ours, by the filters' names.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Versions(BTreeMap<String, String>);

impl Versions {
    /// Those of the filters that are needed, of a worker that has all of these.
    pub fn of(needs: &Capabilities, has: &[FilterCapability]) -> Self {
        let needed = |filter: &&FilterCapability| others(needs).any(|name| name == filter.name);
        let version = |filter: &FilterCapability| (filter.name.clone(), filter.version.clone());
        Self(has.iter().filter(needed).map(version).collect())
    }

    /// What a worker must offer that has them, and all that is needed besides.
    pub fn with(&self, needs: &Capabilities) -> Capabilities {
        if self.0.is_empty() {
            return Arc::clone(needs);
        }
        let versions = self.0.iter().map(|(name, version)| version_need(name, version));
        Arc::new(needs.iter().cloned().chain(versions).collect())
    }

    /// Those of the filters of a chain, in their order.
    pub fn in_chain(&self, chain: &FilterChain) -> Vec<String> {
        let specs = chain.specs();
        specs.iter().filter_map(|text| self.0.get(name(text)).cloned()).collect()
    }
}

/// Whether filters are needed that are not ours.
pub fn are_needed(needs: &Capabilities) -> bool {
    others(needs).next().is_some()
}

fn others(needs: &Capabilities) -> impl Iterator<Item = &str> {
    needs.iter().filter_map(|need| filter_of(need)).filter(|name| !is_ours(name))
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
    use std::collections::BTreeSet;

    use super::*;
    use crate::admit::filter_need;

    #[test]
    fn the_versions_of_others_are_known_from_a_worker_that_has_them() {
        let texts = ["exclude:pattern=a", "other:x=1", "third", "other:x=2"].map(str::to_owned);
        let chain = chain(&texts, |_| true).unwrap();
        let needs = |names: &[&str]| Arc::new(names.iter().map(|name| filter_need(name)).collect());
        let filter = |name: &str, version: &str| FilterCapability {
            name: name.to_owned(),
            version: version.to_owned(),
            ..FilterCapability::default()
        };
        let has = [filter("exclude", "7"), filter("other", "2"), filter("third", ""), filter("fourth", "4")];
        let needed = needs(&["exclude", "other", "third"]);
        assert!(are_needed(&needed));
        let versions = Versions::of(&needed, &has);
        assert_eq!(versions.in_chain(&chain), ["2", "", "2"]);
        assert!(versions.in_chain(&FilterChain::default()).is_empty());
        let offered: BTreeSet<_> = has.iter().filter_map(offered_version).collect();
        let with = versions.with(&needed);
        let more: Vec<_> = with.difference(&needed).collect();
        assert_eq!(more.len(), 2, "{more:?}");
        assert!(more.iter().all(|need| offered.contains(*need)), "{more:?} {offered:?}");
        let newer = [filter("other", "3"), filter("third", "")];
        assert!(!newer.iter().filter_map(offered_version).collect::<BTreeSet<_>>().contains(more[0]));
        // Of ours nothing is known but that they are.
        let ours = needs(&["exclude"]);
        assert!(!are_needed(&ours));
        assert_eq!(Versions::of(&ours, &has).with(&ours), ours);
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
