//! What filters found, as a coordinator sends it.

use std::sync::Arc;

use anyhow::bail;
use occy_pipeline::filter::{self, Filter, FilterChain, LayerFilter, Rendering, SpecError, Target, Targets};
use occy_pipeline::tar::Limits;
use occy_proto::v1::FilterOutput;

/// Bytes of it that one call may send: as many as a coordinator of ours does.
const MOST: usize = 64 * 1024 * 1024;

/// The chain as far as it is known here: a filter that only the coordinator's workers have stands in it by its name.
pub(crate) fn chain(specs: &[String]) -> Result<FilterChain, SpecError> {
    let filters = specs.iter().map(|text| match filter::spec::parse(text) {
        Err(SpecError::UnknownFilter { .. }) => Ok(Arc::new(Foreign(text.clone())) as Arc<dyn Filter>),
        parsed => parsed,
    });
    Ok(FilterChain::new(filters.collect::<Result<_, _>>()?))
}

/// A filter that works elsewhere.
#[derive(Debug)]
struct Foreign(String);

impl Filter for Foreign {
    fn spec(&self) -> String {
        self.0.clone()
    }

    fn edits(&self) -> bool {
        true
    }

    fn layer(&self, _targets: &Targets, _limits: &Limits) -> Box<dyn LayerFilter> {
        unreachable!("layers pass through filters at the coordinator")
    }
}

/// Texts that come in pieces.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    texts: Vec<(FilterOutput, bool)>,
    bytes: usize,
}

impl Findings {
    /// The next piece.
    pub(crate) fn take(&mut self, piece: FilterOutput) -> anyhow::Result<()> {
        self.bytes += piece.text.len();
        if self.bytes > MOST {
            bail!("the coordinator sends more than {MOST} bytes of what filters found");
        }
        let last = piece.last;
        match self.texts.last_mut() {
            Some((text, is_whole)) if !*is_whole => {
                text.text.push_str(&piece.text);
                *is_whole = last;
            }
            _ => self.texts.push((piece, last)),
        }
        Ok(())
    }

    /// All texts, wherever they were to go.
    pub(crate) fn texts(&self) -> impl Iterator<Item = String> {
        self.texts.iter().map(|(output, _)| output.text.clone())
    }

    /// What is to be told of an image whose layers came here: what filters found is in `own`, but for those that we do not have.
    pub(crate) fn renderings_with(
        &self,
        chain: &FilterChain,
        own: Vec<(usize, Rendering)>,
    ) -> anyhow::Result<Vec<Rendering>> {
        let theirs = self.texts.iter().map(|(output, _)| output.filter as usize);
        let theirs: Vec<_> = theirs.zip(self.renderings(chain)?).collect();
        let ours: Vec<usize> = own.iter().map(|(place, _)| *place).collect();
        let theirs = theirs.into_iter().filter(|(place, _)| !ours.contains(place));
        let mut all: Vec<_> = theirs.chain(own).collect();
        all.sort_by_key(|(place, _)| *place);
        Ok(all.into_iter().map(|(_, rendering)| rendering).collect())
    }

    /// All texts. A file is written to only if one of our own filters names it.
    pub(crate) fn renderings(&self, chain: &FilterChain) -> anyhow::Result<Vec<Rendering>> {
        let texts = self.texts.iter().map(|(output, _)| {
            let to = match &output.append_to {
                None => Target::Stdout,
                Some(path) => {
                    let filter = chain.filters().get(output.filter as usize);
                    let own = filter.and_then(|filter| filter.file());
                    match own.filter(|own| own.display().to_string() == *path) {
                        Some(own) => Target::Append(own.to_owned()),
                        None => bail!("the coordinator wants {path:?} to be written, which no filter names"),
                    }
                }
            };
            Ok(Rendering { to, text: output.text.clone() })
        });
        texts.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(filter: u32, append_to: Option<&str>, text: &str, last: bool) -> FilterOutput {
        FilterOutput { filter, append_to: append_to.map(str::to_owned), text: text.to_owned(), last }
    }

    fn specs(texts: &[&str]) -> FilterChain {
        chain(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn texts_are_put_together() {
        let mut findings = Findings::default();
        for piece in [piece(0, None, "a", false), piece(0, None, "b", true), piece(1, Some("x"), "c", true)] {
            findings.take(piece).unwrap();
        }
        let renderings = findings.renderings(&specs(&["search:pattern=x", "inspect:file=x"])).unwrap();
        assert_eq!(renderings[0], Rendering { to: Target::Stdout, text: "ab".to_owned() });
        assert_eq!(renderings[1], Rendering { to: Target::Append("x".into()), text: "c".to_owned() });
    }

    #[test]
    fn a_coordinator_cannot_have_other_files_written() {
        for (filter, path) in [(0, "y"), (1, "x"), (7, "x")] {
            let mut findings = Findings::default();
            findings.take(piece(filter, Some(path), "c", true)).unwrap();
            assert!(findings.renderings(&specs(&["inspect:file=x", "made-by-others"])).is_err());
        }
    }

    #[test]
    fn filters_of_others_keep_their_place_and_bad_options_are_refused() {
        assert_eq!(specs(&["strip:x=1", "search:pattern=x"]).specs(), ["strip:x=1", "search:pattern=x"]);
        assert!(chain(&["search:patern=x".to_owned()]).is_err());
    }
}
