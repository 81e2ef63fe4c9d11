//! What is done, and its price: made of what is known, and of nothing else.

use std::collections::{HashMap, HashSet};

use super::config::{Config, Mirror};
use super::lists::Wanted;
use super::parts::{Part, Passage};
use super::survey::{Difference, Found, Making, Survey};
use crate::digest::Digest;
use crate::reference::{Reference, Tag};

/// How much of a digest names a backup, in hexadecimal digits.
const BACKUP_DIGITS: usize = 12;

/// What is done.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// In the order of the configuration; what is deleted, and what could not be listed, last.
    pub actions: Vec<Action>,
    /// Of all of them together.
    pub price: Price,
    /// For each blob that has to be fetched, one target of each registry where the same images need it.
    pub(crate) uploads: HashMap<(Need, Digest), Vec<Reference>>,
    /// By host, a repository that has a blob.
    pub(crate) holders: HashMap<(String, Digest), String>,
}

/// Which images need a blob: all of them do, wherever they go, or none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Need {
    /// What is copied as it is.
    Copied,
    /// What an entry of the configuration, by its number, makes of this source. Whether it needs what belongs to it is known when it is made.
    Made(usize, Digest),
}

/// What is done to one tag of one target.
#[derive(Clone, Debug)]
pub struct Action {
    /// Where the image comes from, or what could not be listed.
    pub source: String,
    /// Where it goes; nowhere, where a source could not be listed.
    pub target: Option<Reference>,
    /// What is done.
    pub what: What,
    /// What the target's tag names.
    pub was: Option<Digest>,
    /// What it will name, where that is known.
    pub becomes: Option<Digest>,
    /// The tag that the old manifest gets before.
    pub backup: Option<Tag>,
    /// What it takes.
    pub price: Price,
    /// Whether it passes filters on its way.
    pub is_filtered: bool,
    /// Its number in the survey, of images and of lost tags.
    pub(crate) number: usize,
}

/// What is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Nothing: the target is as the source.
    Nothing,
    /// The tag is new.
    Create,
    /// The tag is given to another manifest.
    Update,
    /// The tag stays; content that it names, or that belongs to it, is new.
    Complete,
    /// The tag is deleted.
    Delete,
    /// Nothing, although the target is not as the source: a rule forbids it.
    Refuse(String),
    /// Nothing: what there is could not be found out.
    Fail(String),
}

/// What something takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Price {
    /// Blobs that come from the source.
    pub fetched: usize,
    /// Their bytes.
    pub bytes_fetched: u64,
    /// Blobs that go to targets.
    pub uploaded: usize,
    /// Their bytes.
    pub bytes_uploaded: u64,
    /// Blobs that targets mount from another of their repositories.
    pub mounted: usize,
    /// Their bytes, which nobody moves.
    pub bytes_mounted: u64,
    /// Blobs that are where they are needed.
    pub found: usize,
    /// Manifests that are put.
    pub manifests: usize,
    /// Requests, if none has to be made twice.
    pub requests: usize,
    /// Of the blobs that are fetched, those that pass filters: each is decompressed, and what is changed is compressed again.
    pub filtered: usize,
    /// Their bytes, as they are fetched.
    pub bytes_filtered: u64,
}

impl Action {
    /// What cannot be said of any image.
    pub(crate) fn impossible(what: &str, problem: &str) -> Self {
        Self {
            source: what.to_owned(),
            target: None,
            what: What::Fail(problem.to_owned()),
            was: None,
            becomes: None,
            backup: None,
            price: Price::default(),
            is_filtered: false,
            number: 0,
        }
    }
}

impl Price {
    /// Adds a blob of so many bytes that comes from a source.
    pub(super) fn fetch(&mut self, size: u64) {
        self.fetched += 1;
        self.bytes_fetched = self.bytes_fetched.saturating_add(size);
    }

    /// Of these, one that passes filters.
    pub(super) fn filter(&mut self, size: u64) {
        self.filtered += 1;
        self.bytes_filtered = self.bytes_filtered.saturating_add(size);
    }

    /// One that goes to a target.
    pub(super) fn upload(&mut self, size: u64) {
        self.uploaded += 1;
        self.bytes_uploaded = self.bytes_uploaded.saturating_add(size);
    }

    /// One that a target mounts.
    pub(super) fn mount(&mut self, size: u64) {
        self.mounted += 1;
        self.bytes_mounted = self.bytes_mounted.saturating_add(size);
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.fetched += other.fetched;
        self.bytes_fetched = self.bytes_fetched.saturating_add(other.bytes_fetched);
        self.uploaded += other.uploaded;
        self.bytes_uploaded = self.bytes_uploaded.saturating_add(other.bytes_uploaded);
        self.mounted += other.mounted;
        self.bytes_mounted = self.bytes_mounted.saturating_add(other.bytes_mounted);
        self.found += other.found;
        self.manifests += other.manifests;
        self.requests += other.requests;
        self.filtered += other.filtered;
        self.bytes_filtered = self.bytes_filtered.saturating_add(other.bytes_filtered);
    }
}

/// Where blobs are, and will be when what was planned so far is done.
struct Places<'a> {
    survey: &'a Survey,
    /// `HOST/REPOSITORY` and a blob that will be there.
    brought: HashSet<(String, Digest)>,
    /// For each layer and the filters that it passes, the registries where what becomes of it will be, and repositories there.
    made: HashMap<(String, Digest), HashSet<(String, String)>>,
    /// For the filters that they pass, the configs of which something will be in a repository.
    made_configs: HashSet<(String, String, Digest)>,
    /// Registries that a blob goes to, and whether it comes from a source.
    arriving: HashSet<(String, Digest, bool)>,
    plan: Plan,
}

impl Plan {
    /// What a survey comes to.
    pub fn of(config: &Config, survey: &Survey) -> Self {
        let mut places = Places {
            survey,
            brought: HashSet::new(),
            made: HashMap::new(),
            made_configs: HashSet::new(),
            arriving: HashSet::new(),
            plan: Self::default(),
        };
        places.plan.holders.clone_from(&survey.holders);
        for (place, digest) in &survey.present {
            if let Some((host, repository)) = place.split_once('/') {
                let holder = places.plan.holders.entry((host.to_owned(), digest.clone()));
                // Always the same one, whatever the order of a set.
                let holder = holder.or_insert_with(|| repository.to_owned());
                if repository < holder.as_str() {
                    repository.clone_into(holder);
                }
            }
        }
        let targets: HashSet<&Reference> = survey.images.iter().map(|image| &image.wanted.target).collect();
        for (number, image) in survey.images.iter().enumerate() {
            let mirror = &config.mirrors[image.wanted.mirror];
            let mut action = Action {
                source: image.wanted.source.to_string(),
                target: Some(image.wanted.target.clone()),
                what: What::Nothing,
                was: image.was.clone(),
                becomes: image.was.clone(),
                backup: None,
                price: Price::default(),
                is_filtered: !mirror.filters.is_empty(),
                number,
            };
            match &image.found {
                Found::Same => {}
                Found::Refused { becomes, reason } => {
                    action.becomes.clone_from(becomes);
                    action.what = What::Refuse(reason.clone());
                }
                Found::Failed(problem) => {
                    action.becomes = None;
                    action.what = What::Fail(problem.clone());
                }
                Found::Differs(_) | Found::MadeOfOther(_) => {
                    let becomes = image.found.becomes();
                    action.becomes = becomes.cloned();
                    action.what = match &image.was {
                        None => What::Create,
                        was if was.as_ref() == becomes => What::Complete,
                        Some(_) => What::Update,
                    };
                    if let (What::Update, Some(backup), Some(was), Some(tag)) =
                        (&action.what, &mirror.backup, &image.was, image.wanted.target.tag())
                    {
                        let digits: String = was.hex().chars().take(BACKUP_DIGITS).collect();
                        let name = backup.expand(&[("tag", tag.as_str()), ("digest", &digits)]);
                        match name.parse::<Tag>() {
                            Ok(tag) if targets.contains(&image.wanted.target.with_tag(tag.clone())) => {
                                action.what =
                                    What::Refuse(format!("its backup {tag} is the target of another image"));
                            }
                            Ok(tag) => action.backup = Some(tag),
                            Err(_) => action.what = What::Refuse(format!("its backup {name:?} is no tag")),
                        }
                    }
                    if !matches!(action.what, What::Refuse(_)) {
                        action.price = places.price_of(mirror, &image.found, &image.wanted);
                        action.price.requests += 2 * usize::from(action.backup.is_some());
                        action.price.manifests += usize::from(action.backup.is_some());
                    }
                }
            }
            places.plan.price.add(&action.price);
            places.plan.actions.push(action);
        }
        places.plan.delete(config, survey);
        for unlisted in &survey.unlisted {
            places.plan.actions.push(Action::impossible(&unlisted.what, &unlisted.problem));
        }
        places.plan
    }

    fn delete(&mut self, config: &Config, survey: &Survey) {
        let mut of_entry: HashMap<usize, usize> = HashMap::new();
        for lost in &survey.lost {
            *of_entry.entry(lost.mirror).or_default() += 1;
        }
        for (number, lost) in survey.lost.iter().enumerate() {
            let max = config.mirrors[lost.mirror].deletion.unwrap_or_default();
            let count = of_entry[&lost.mirror];
            let what = if !survey.unlisted.is_empty() {
                What::Refuse("nothing is deleted while something cannot be listed".to_owned())
            } else if count > max {
                What::Refuse(format!("{count} tags would be deleted, and no more than {max} may be"))
            } else {
                What::Delete
            };
            // The tag, and what it names before and after.
            let price = Price { requests: 3 * usize::from(what == What::Delete), ..Price::default() };
            self.price.add(&price);
            self.actions.push(Action {
                source: lost.source.to_string(),
                target: Some(lost.target.clone()),
                what,
                was: None,
                becomes: None,
                backup: None,
                price,
                is_filtered: false,
                number,
            });
        }
    }

    /// Whether there is nothing to do.
    pub fn is_done(&self) -> bool {
        self.actions.iter().all(|action| action.what == What::Nothing)
    }
}

impl Places<'_> {
    fn price_of(&mut self, mirror: &Mirror, found: &Found, wanted: &Wanted) -> Price {
        match found {
            Found::Differs(difference) => self.price(difference, &wanted.source, &wanted.target),
            Found::MadeOfOther(making) => self.price_made(mirror, making, wanted),
            Found::Same | Found::Refused { .. } | Found::Failed(_) => Price::default(),
        }
    }

    /// The most that it takes to make an image of another: as if each blob had become one of the same size, and no target had any of them.
    fn price_made(&mut self, mirror: &Mirror, making: &Making, wanted: &Wanted) -> Price {
        let Wanted { mirror: number, source, target } = wanted;
        let filters = mirror.filters.fingerprint();
        let mut price = Price { manifests: making.parts.manifests, ..Price::default() };
        for Part { digest, size, passage } in &making.parts.blobs {
            let place = (target.name(), digest.clone());
            let (is_fetched, is_uploaded) = match passage {
                Passage::Filtered | Passage::AsItIs => {
                    let passed = if *passage == Passage::Filtered { filters.clone() } else { String::new() };
                    let made = self.made.entry((passed, digest.clone())).or_default();
                    let is_on_host = made.iter().any(|(host, _)| host == target.host());
                    let is_new = made.is_empty();
                    let is_missing = made.insert((target.host().to_owned(), target.name()));
                    if is_missing && is_on_host {
                        price.mount(*size);
                        price.requests += 1;
                        continue;
                    }
                    if is_new && *passage == Passage::Filtered {
                        price.filter(*size);
                    }
                    (is_new, is_missing)
                }
                // It is read for each target: what becomes of it depends on what the layers become.
                Passage::FilteredConfig => {
                    (true, self.made_configs.insert((filters.clone(), place.0, place.1)))
                }
                Passage::Config => (true, self.brought.insert(place)),
                Passage::Beside | Passage::MadeHere => {
                    let need = Need::Made(*number, making.source.clone());
                    let from = Some((source, need)).filter(|_| *passage == Passage::Beside);
                    self.bring(&mut price, (digest, *size), from, target);
                    continue;
                }
            };
            if is_fetched {
                price.fetch(*size);
                price.requests += 1;
            }
            if is_uploaded {
                price.upload(*size);
                // One begins the upload, one brings the bytes.
                price.requests += 2;
            } else {
                price.found += 1;
            }
        }
        price.requests += price.manifests;
        price
    }

    /// What it takes to copy an image after all that was priced before it.
    fn price(&mut self, difference: &Difference, source: &Reference, target: &Reference) -> Price {
        let mut price = Price { manifests: difference.manifests, ..Price::default() };
        for (digest, size) in &difference.blobs {
            self.bring(&mut price, (digest, *size), Some((source, Need::Copied)), target);
        }
        price.requests += price.manifests;
        price
    }

    /// Adds a blob that a target needs, from a source or made here.
    fn bring(
        &mut self,
        price: &mut Price,
        (digest, size): (&Digest, u64),
        from: Option<(&Reference, Need)>,
        target: &Reference,
    ) {
        let host = target.host();
        let place = (target.name(), digest.clone());
        if self.survey.present.contains(&place) || !self.brought.insert(place) {
            price.found += 1;
            return;
        }
        let key = (host.to_owned(), digest.clone());
        let is_sure = self.plan.holders.contains_key(&key)
            || from.as_ref().is_some_and(|(source, _)| self.survey.can_mount && source.host() == host)
            || self.plan.uploads.get(&(Need::Copied, digest.clone())).is_some_and(|all| is_among(all, host));
        // What is made of an image, and what belongs to it, comes once to a host; a copy does not rely on that, since it may not come.
        let is_copied = matches!(from, Some((_, Need::Copied)));
        let is_new = self.arriving.insert((key.0, key.1, from.is_some()));
        let is_there = is_sure || !is_copied && !is_new;
        if let Some((_, need)) = from.filter(|_| !is_sure) {
            let uploads = self.plan.uploads.entry((need, digest.clone())).or_default();
            if uploads.is_empty() {
                price.fetch(size);
                price.requests += 1;
            }
            // What others only may bring there has to come with the rest if they do not.
            if !is_among(uploads, host) {
                uploads.push(target.clone());
            }
        }
        if is_there {
            price.mount(size);
            price.requests += 1;
            return;
        }
        price.upload(size);
        // One begins the upload, one brings the bytes.
        price.requests += 2;
    }
}

/// Whether one of them is of that registry.
fn is_among(targets: &[Reference], host: &str) -> bool {
    targets.iter().any(|target| target.host() == host)
}
