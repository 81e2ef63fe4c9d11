//! `exclude`: drops what matches, and everything below a directory that matches.
//!
//! - Patterns are matched against the cleaned path and each of its parents: a matching directory takes its subtree with it,
//!   whether or not the layer has an entry for the directory, and wherever that stands.
//! - Whiteouts stay, or files that the image has deleted would reappear. So does the root's own entry.
//! - A hard link that survives its target becomes the file: the first such link takes the target's data and metadata, later
//!   ones point to the first. The target's data has passed by then. So the first pass over such a layer ends with
//!   [`Verdict::Restart`] and the names of all such targets, and the second one keeps their data aside.

use std::collections::HashMap;
use std::sync::Arc;

use super::glob::Patterns;
use super::{Filter, FilterError, FilterKind, Finish, Key, LayerFilter, Report, Targets, Verdict};
use crate::layer::Keep;
use crate::tar::{Content, Kind, Limits, Member, path};

/// In the list of filters.
pub static KIND: FilterKind = FilterKind {
    name: "exclude",
    help: "drop the files and directories that match",
    keys: &[Key {
        names: &["pattern"],
        value: "GLOB[,GLOB]...",
        help: "globs for the path, in which * also matches /",
    }],
    parse: |options| {
        let text = options.required("pattern")?;
        let patterns = Patterns::subtrees(text).map_err(|error| options.invalid("pattern", text, &error))?;
        if patterns.is_empty() {
            return Err(options.invalid("pattern", text, &"expected a pattern"));
        }
        Ok(Arc::new(Exclude { patterns }))
    },
};

/// The filter.
#[derive(Debug)]
pub struct Exclude {
    patterns: Patterns,
}

/// What it did to a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Members that were dropped.
    pub dropped: u64,
    /// Hard links that became the file whose name was dropped.
    pub promoted: u64,
}

impl Filter for Exclude {
    fn spec(&self) -> String {
        format!("exclude:pattern={}", self.patterns.text())
    }

    fn edits(&self) -> bool {
        true
    }

    fn layer(&self, targets: &Targets, limits: &Limits) -> Box<dyn LayerFilter> {
        Box::new(Layer {
            patterns: self.patterns.clone(),
            counts: Counts::default(),
            path: Vec::new(),
            target: Vec::new(),
            limit: limits.report,
            remembered: 0,
            links: HashMap::new(),
            targets: targets.clone(),
            wanted: Targets::new(),
            names: HashMap::new(),
            files: Vec::new(),
        })
    }
}

struct Layer {
    patterns: Patterns,
    counts: Counts,
    /// Cleaned paths of the member at hand and of its target.
    path: Vec<u8>,
    target: Vec<u8>,
    limit: usize,
    remembered: usize,
    /// Dropped hard links and their targets.
    links: HashMap<Vec<u8>, Vec<u8>>,
    /// What this pass keeps aside.
    targets: Targets,
    /// What it should have.
    wanted: Targets,
    /// Dropped names of the files that were kept aside.
    names: HashMap<Vec<u8>, usize>,
    files: Vec<File>,
}

/// Where the contents of a dropped name are now.
enum File {
    /// Kept aside, until the first link takes them.
    Kept(Box<Member>, Content),
    /// In a member of this name.
    Named(Vec<u8>),
}

impl LayerFilter for Layer {
    fn member(&mut self, member: &mut Member, keep: &mut Keep) -> Result<Verdict, FilterError> {
        if member.is_global() {
            return Ok(Verdict::Keep);
        }
        path::clean(member.path(), &mut self.path);
        if self.drops(&self.path) {
            self.counts.dropped += 1;
            self.drop_member(member, keep)?;
            return Ok(Verdict::Drop);
        }
        if member.kind() == Kind::HardLink && self.counts.dropped > 0 {
            path::clean(member.link(), &mut self.target);
            if self.drops(&self.target) {
                return self.relink(member);
            }
        }
        Ok(Verdict::Keep)
    }

    fn finish(mut self: Box<Self>) -> Finish {
        self.wanted.append(&mut self.targets);
        Finish { report: Some(Report::Exclude(self.counts)), targets: self.wanted }
    }
}

impl Layer {
    /// Whether a member of this cleaned path is dropped.
    fn drops(&self, cleaned: &[u8]) -> bool {
        !cleaned.is_empty() && !path::is_whiteout(cleaned) && self.patterns.matches(cleaned)
    }

    /// Remembers of a dropped member what links to it may need.
    fn drop_member(&mut self, member: &Member, keep: &mut Keep) -> Result<(), FilterError> {
        let is_link = member.kind() == Kind::HardLink;
        if is_link {
            path::clean(member.link(), &mut self.target);
            self.remember(self.path.len() + self.target.len() + 2 * size_of::<Vec<u8>>())?;
            self.links.insert(self.path.clone(), self.target.clone());
        } else if !self.links.is_empty() {
            self.links.remove(&self.path);
        }
        if !self.targets.contains(&self.path) {
            return Ok(());
        }
        let file = if is_link {
            if self.drops(&self.target) {
                self.names.get(&self.target).copied()
            } else {
                self.files.push(File::Named(member.link().to_owned()));
                Some(self.files.len() - 1)
            }
        } else if member.kind() == Kind::Directory {
            None
        } else {
            self.remember(member.memory())?;
            self.files.push(File::Kept(Box::new(member.clone()), keep.keep(member)));
            Some(self.files.len() - 1)
        };
        match file {
            Some(file) => self.names.insert(self.path.clone(), file),
            None => self.names.remove(&self.path),
        };
        Ok(())
    }

    /// A link survives whose target, if the layer had it, was dropped.
    fn relink(&mut self, member: &mut Member) -> Result<Verdict, FilterError> {
        if !self.targets.contains(&self.target) {
            self.want()?;
            return Ok(Verdict::Restart);
        }
        // A link to a file of a lower layer stays as it is: there is nothing here that it could become.
        let Some(&file) = self.names.get(&self.target) else { return Ok(Verdict::Keep) };
        match &self.files[file] {
            File::Named(name) => member.set_link(name),
            File::Kept(kept, content) => {
                member.become_copy_of(kept, *content);
                self.counts.promoted += 1;
                self.files[file] = File::Named(member.path().to_owned());
            }
        }
        Ok(Verdict::Keep)
    }

    /// Wants the target, and what that is a link to.
    fn want(&mut self) -> Result<(), FilterError> {
        let mut target = self.target.clone();
        loop {
            let next = self.links.get(&target).filter(|next| self.drops(next)).cloned();
            self.remember(target.len() + 2 * size_of::<Vec<u8>>())?;
            if !self.wanted.insert(target) {
                return Ok(());
            }
            match next {
                Some(next) => target = next,
                None => return Ok(()),
            }
        }
    }

    fn remember(&mut self, bytes: usize) -> Result<(), FilterError> {
        self.remembered += bytes;
        if self.remembered > self.limit {
            return Err(FilterError::Memory { filter: KIND.name, limit: self.limit });
        }
        Ok(())
    }
}
