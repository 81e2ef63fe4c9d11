//! Names in which words in braces stand for parts of other names.

use crate::reference::{InvalidReference, Reference};

/// What may stand in the name of a target's repository: the source's host without its port, the path of its repository, and the
/// last part of that.
pub(super) const OF_REPOSITORY: [&str; 3] = ["registry", "repository", "name"];
/// What may stand in its tag: the source's.
pub(super) const OF_TAG: [&str; 1] = ["tag"];
/// What may stand in the tag of a backup: the tag that is given away, and the first 12 digits of the digest that it named.
pub(super) const OF_BACKUP: [&str; 2] = ["tag", "digest"];

/// A text with words in braces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Word(String),
}

impl Template {
    /// A text in which no other words stand than the known ones.
    pub(super) fn parse(text: &str, known: &[&str]) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once('{') {
            let Some((word, behind)) = behind.split_once('}') else {
                return Err(format!("{text:?} has a {{ without a }}"));
            };
            if !known.contains(&word) {
                let known: Vec<_> = known.iter().map(|word| format!("{{{word}}}")).collect();
                return Err(format!("{{{word}}} is not known here: expected {}", known.join(", ")));
            }
            pieces.extend((!before.is_empty()).then(|| Piece::Text(before.to_owned())));
            pieces.push(Piece::Word(word.to_owned()));
            rest = behind;
        }
        pieces.extend((!rest.is_empty()).then(|| Piece::Text(rest.to_owned())));
        Ok(Self(pieces))
    }

    /// Whether a word stands in it.
    pub(super) fn has(&self, word: &str) -> bool {
        self.0.iter().any(|piece| matches!(piece, Piece::Word(has) if has == word))
    }

    /// Whether it is one word and nothing else.
    pub(super) fn is_bare(&self) -> bool {
        matches!(&*self.0, [Piece::Word(_)])
    }

    /// The text with the words' values in their places.
    pub(super) fn expand(&self, values: &[(&str, &str)]) -> String {
        let value =
            |word: &str| values.iter().find(|(known, _)| *known == word).map_or("", |(_, value)| value);
        let text = |piece: &Piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Word(word) => value(word).to_owned(),
        };
        self.0.iter().map(text).collect()
    }

    /// What `{tag}` stood for in a text that this has become; a `{digest}` is 12 hexadecimal digits. None where it became another.
    pub(super) fn tag_in(&self, text: &str) -> Option<String> {
        let piece = |piece: &Piece| match piece {
            Piece::Text(text) => regex::escape(text),
            Piece::Word(word) if word == "digest" => "[0-9a-f]{12}".to_owned(),
            Piece::Word(_) => "(.+)".to_owned(),
        };
        let pattern: String = self.0.iter().map(piece).collect();
        let pattern = regex::Regex::new(&format!("^{pattern}$")).ok()?;
        Some(pattern.captures(text)?.get(1).map_or(text, |tag| tag.as_str()).to_owned())
    }
}

/// Where an image of a repository goes.
pub(super) fn place(
    repository: &Template,
    tag: &Template,
    source: &Reference,
    source_tag: &str,
) -> Result<Reference, InvalidReference> {
    let path = source.repository();
    // A port has a character that stands in no repository's path.
    let host = source.host().split(':').next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or(path);
    let repository = repository.expand(&[("registry", host), ("repository", path), ("name", name)]);
    format!("{repository}:{}", tag.expand(&[("tag", source_tag)])).parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_named_after_its_source() {
        let place = |repository: &str, tag: &str| {
            let repository = Template::parse(repository, &OF_REPOSITORY).unwrap();
            let source = "registry.example:5000/team/app".parse().unwrap();
            let tag = Template::parse(tag, &OF_TAG).unwrap();
            super::place(&repository, &tag, &source, "1.0").unwrap().to_string()
        };
        assert_eq!(place("b.example/{repository}", "{tag}"), "b.example/team/app:1.0");
        assert_eq!(place("b.example/{registry}/{name}", "v{tag}-x"), "b.example/registry.example/app:v1.0-x");
        assert_eq!(place("b.example/app", "stable"), "b.example/app:stable");
    }

    #[test]
    fn a_tag_is_found_in_the_name_that_was_made_of_it() {
        let tag = |template: &str, text: &str| Template::parse(template, &OF_BACKUP).unwrap().tag_in(text);
        assert_eq!(tag("{tag}-copy", "1.0-copy").as_deref(), Some("1.0"));
        assert_eq!(tag("{tag}-copy", "1.0"), None);
        assert_eq!(tag("old-{tag}-{digest}", "old-1.0-0123456789ab").as_deref(), Some("1.0"));
        assert_eq!(tag("old.{tag}", "oldx1"), None);
    }
}
