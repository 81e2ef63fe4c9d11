//! Which images there are: lists of repositories and tags, and what of them is wanted where.

use std::collections::{HashMap, HashSet};

use futures_util::StreamExt;

use super::config::{Config, Mirror, Source};
use super::origin::Origin;
use super::select::is_called_like_a_digest;
use super::{ASKED_AT_ONCE, template};
use crate::error::Error;
use crate::reference::{Reference, Tag};
use crate::registry::Client;

/// One tag of a source, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its entry in the configuration.
    pub(super) mirror: usize,
    pub(super) source: Reference,
    pub(super) target: Reference,
}

/// Something that cannot be said of any image: a list that was not to be had, a name that cannot be made.
#[derive(Debug)]
pub(super) struct Unlisted {
    pub(super) what: String,
    pub(super) problem: String,
}

/// A tag of a target that the source has lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lost {
    pub(super) mirror: usize,
    pub(super) source: Reference,
    pub(super) target: Reference,
}

#[derive(Debug, Default)]
pub(super) struct Lists {
    /// For each entry of the configuration, its repositories.
    repositories: Vec<Vec<Reference>>,
    /// By `HOST/REPOSITORY`; none of those that could not be had.
    tags: HashMap<String, Vec<String>>,
    pub(super) unlisted: Vec<Unlisted>,
}

impl Lists {
    /// Asks sources for all lists that the configuration needs, for each once.
    pub(super) async fn ask(config: &Config, source: &Origin) -> Self {
        let mut lists = Self::default();
        for mirror in &config.mirrors {
            let repositories = lists.repositories_of(mirror, source).await;
            lists.repositories.push(repositories);
        }
        let listed = config.mirrors.iter().zip(&lists.repositories);
        let listed = listed.filter(|(mirror, _)| mirror.needs_list());
        let sources: Vec<Reference> = listed.flat_map(|(_, repositories)| repositories.clone()).collect();
        lists.ask_for_tags(source, sources, false).await;
        lists
    }

    /// Asks targets for the lists without which nobody knows what the sources lost.
    pub(super) async fn ask_targets(&mut self, config: &Config, target: &Client) {
        let deleting = config.mirrors.iter().zip(&self.repositories);
        let deleting = deleting.filter(|(mirror, _)| mirror.deletion.is_some());
        let targets: Vec<Reference> = deleting
            .flat_map(|(mirror, repositories)| {
                let places = repositories.iter().flat_map(|source| {
                    mirror
                        .targets
                        .iter()
                        .map(move |target| template::place(&target.repository, &target.tag, source, "1"))
                });
                // A name that cannot be made is told of when its images are.
                places.filter_map(Result::ok).collect::<Vec<_>>()
            })
            .collect();
        self.ask_for_tags(&Origin::Registries(target.clone()), targets, true).await;
    }

    async fn repositories_of(&mut self, mirror: &Mirror, origin: &Origin) -> Vec<Reference> {
        let mut found: Vec<Reference> = Vec::new();
        for source in &mirror.sources {
            match source {
                Source::Repository(reference) => found.push(reference.clone()),
                Source::Catalog(registry, patterns) => match origin.repositories(registry).await {
                    Ok(names) => {
                        let is_wanted = |name: &&String| {
                            patterns.is_match(name.as_str())
                                && !mirror.exclude_repositories.is_match(name.as_str())
                        };
                        for name in names.iter().filter(is_wanted) {
                            match format!("{registry}/{name}").parse() {
                                Ok(reference) => found.push(reference),
                                Err(problem) => self.cannot(name, &problem),
                            }
                        }
                    }
                    Err(error) => {
                        self.cannot(&format!("the repositories of {registry}"), &error);
                    }
                },
            }
        }
        let mut seen = HashSet::new();
        found.retain(|reference| seen.insert(reference.name()));
        found
    }

    /// `may_be_missing`: a repository that does not exist has no tags.
    async fn ask_for_tags(&mut self, origin: &Origin, repositories: Vec<Reference>, may_be_missing: bool) {
        let mut seen = HashSet::new();
        let repositories: Vec<Reference> = repositories
            .into_iter()
            .filter(|reference| !self.tags.contains_key(&reference.name()) && seen.insert(reference.name()))
            .collect();
        let asked = repositories.into_iter().map(|reference| async move {
            let tags = origin.tags(&reference).await;
            (reference.name(), tags)
        });
        let asked: Vec<_> = futures_util::stream::iter(asked).buffered(ASKED_AT_ONCE).collect().await;
        for (name, tags) in asked {
            match tags {
                Ok(tags) => drop(self.tags.insert(name, tags)),
                Err(Error::Registry(error)) if may_be_missing && error.is_not_found() => {
                    self.tags.insert(name, Vec::new());
                }
                Err(error) => self.cannot(&format!("the tags of {name}"), &error),
            }
        }
    }

    fn cannot(&mut self, what: &str, problem: &dyn std::error::Error) {
        self.unlisted.push(Unlisted { what: what.to_owned(), problem: problem.to_string() });
    }

    /// Every image that is wanted, in the order of the configuration, each way from a source to a target once.
    pub(super) fn wanted(&mut self, config: &Config) -> Vec<Wanted> {
        let (mut wanted, mut problems) = (Vec::new(), Vec::new());
        let mut seen = HashSet::new();
        for (index, (mirror, repositories)) in config.mirrors.iter().zip(&self.repositories).enumerate() {
            for repository in repositories {
                let listed = match self.tags.get(&repository.name()) {
                    Some(listed) => listed.as_slice(),
                    // That it could not be listed has been noted.
                    None if mirror.needs_list() => continue,
                    None => &[],
                };
                for name in mirror.wanted(listed) {
                    let Ok(tag) = name.parse::<Tag>() else {
                        problems.push((format!("{}:{name}", repository.name()), "no tag".to_owned()));
                        continue;
                    };
                    let source = repository.with_tag(tag);
                    for target in &mirror.targets {
                        match template::place(&target.repository, &target.tag, repository, &name) {
                            Ok(target) if seen.insert((source.clone(), target.clone())) => {
                                wanted.push(Wanted { mirror: index, source: source.clone(), target });
                            }
                            Ok(_) => {}
                            Err(problem) => problems.push((source.to_string(), problem.to_string())),
                        }
                    }
                }
            }
        }
        let problems = problems.into_iter().map(|(what, problem)| Unlisted { what, problem });
        self.unlisted.extend(problems);
        wanted
    }

    /// The tags of targets that the source has lost: those that an entry with `deletion` would have put there, and that its source
    /// does not list. Not what is wanted from anywhere, what is immutable, a backup, or belongs to a manifest.
    pub(super) fn lost(&self, config: &Config, wanted: &[Wanted]) -> Vec<Lost> {
        let kept: HashSet<&Reference> = wanted.iter().map(|wanted| &wanted.target).collect();
        let (mut lost, mut seen) = (Vec::new(), HashSet::new());
        for (index, (mirror, repositories)) in config.mirrors.iter().zip(&self.repositories).enumerate() {
            if mirror.deletion.is_none() {
                continue;
            }
            for (repository, target) in
                repositories.iter().flat_map(|one| mirror.targets.iter().map(move |target| (one, target)))
            {
                let Some(listed) = self.tags.get(&repository.name()) else { continue };
                let Ok(place) = template::place(&target.repository, &target.tag, repository, "1") else {
                    continue;
                };
                for name in self.tags.get(&place.name()).into_iter().flatten() {
                    let Some(source_tag) = target.tag.tag_in(name) else { continue };
                    let is_backup =
                        mirror.backup.as_ref().is_some_and(|backup| backup.tag_in(name).is_some());
                    let is_ours = mirror.could_want(&source_tag) && !listed.contains(&source_tag);
                    if !is_ours
                        || is_backup
                        || mirror.immutable.is_match(name)
                        || is_called_like_a_digest(name)
                    {
                        continue;
                    }
                    let (Ok(tag), Ok(source_tag)) = (name.parse::<Tag>(), source_tag.parse::<Tag>()) else {
                        continue;
                    };
                    let target = place.with_tag(tag);
                    if !kept.contains(&target) && seen.insert(target.clone()) {
                        lost.push(Lost { mirror: index, source: repository.with_tag(source_tag), target });
                    }
                }
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn lost(more: &str, here: &[&str], there: &[&str]) -> Vec<String> {
        let text = format!(
            "mirrors: [{{sources: [a.example/x], targets: [b.example/x], deletion: {{max: 9}}{more}}}]"
        );
        let config = Config::parse(&text).unwrap();
        let tags = |tags: &[&str]| tags.iter().map(|tag| (*tag).to_owned()).collect();
        let mut lists = Lists {
            repositories: vec![vec!["a.example/x".parse().unwrap()]],
            tags: HashMap::from([
                ("a.example/x".to_owned(), tags(here)),
                ("b.example/x".to_owned(), tags(there)),
            ]),
            unlisted: Vec::new(),
        };
        let wanted = lists.wanted(&config);
        lists.lost(&config, &wanted).into_iter().map(|lost| lost.target.to_string()).collect()
    }

    #[test]
    fn only_what_the_entry_would_have_put_there_is_lost() {
        let gone = ["b.example/x:1".to_owned()];
        assert_eq!(lost("", &["2"], &["1", "2"]), gone);
        assert_eq!(lost(", tags: [{globs: ['1*']}]", &["2"], &["1", "2", "3"]), gone);
        assert_eq!(lost(", immutable: ['3']", &["2"], &["1", "2", "3"]), gone);
        assert_eq!(lost(", backup: 'old-{tag}'", &["2"], &["1", "2", "old-2"]), gone);
        // What is merely no longer among the newest is at the source still.
        assert_eq!(lost(", tags: [{newest: 1}]", &["2", "3"], &["1", "2", "3"]), gone);
        let signature = format!("sha256-{}.sig", "0".repeat(64));
        assert_eq!(lost("", &["2"], &["1", &signature]), gone);
    }
}
