//! What is configured of registries' limits: `docker.io/manifest quota=100/6h`, `ci@ghcr.io rate=20 concurrency=8`.

use occy_pipeline::duration;

use super::ledger::{Limits, LineName};

/// The limits of a registry, or of one of its lines, for each account or for one.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    account: Option<String>,
    host: String,
    line: LineName,
    limits: Limits,
}

/// All rules, in their order: of several that set the same, the last counts.
#[derive(Clone, Debug, Default)]
pub struct Rules(pub Vec<Rule>);

impl Rules {
    /// The limits of an account at a registry, where so many coordinators share them: in the order All, Manifest, Pull, Push.
    pub fn limits(&self, host: &str, account: &str, coordinators: usize) -> [Limits; 4] {
        let mut all = [Limits::default(); 4];
        let is_its =
            |rule: &&Rule| rule.host == host && rule.account.as_ref().is_none_or(|own| own == account);
        for rule in self.0.iter().filter(is_its) {
            let shared = rule.limits.shared(coordinators);
            let line = &mut all[rule.line as usize];
            line.rate = shared.rate.or(line.rate);
            line.quota = shared.quota.or(line.quota);
            // Reading and writing have each their own number: who reads and writes at once must not wait for itself.
            let lines: &[LineName] = match rule.line {
                LineName::All => &[LineName::Pull, LineName::Push],
                ref line => std::slice::from_ref(line),
            };
            for &line in lines {
                let line = &mut all[line as usize];
                line.concurrency = shared.concurrency.or(line.concurrency);
            }
        }
        all
    }
}

impl Limits {
    /// What one of so many coordinators has of them: one at once at least. From a quota all of them draw.
    fn shared(self, coordinators: usize) -> Self {
        let count = coordinators.max(1);
        Self {
            rate: self.rate.map(|rate| rate / count as f64),
            concurrency: self.concurrency.map(|limit| (limit / count).max(1)),
            quota: self.quota,
        }
    }
}

impl std::str::FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split_whitespace();
        let place = words.next().ok_or("expected [ACCOUNT@]HOST[/ACTION] and limits")?;
        let (account, place) = match place.rsplit_once('@') {
            Some((account, place)) => (Some(account.to_owned()), place),
            None => (None, place),
        };
        let (host, line) = match place.split_once('/') {
            None => (place, LineName::All),
            Some((host, "manifest")) => (host, LineName::Manifest),
            Some((host, "pull")) => (host, LineName::Pull),
            Some((host, "push")) => (host, LineName::Push),
            Some((_, action)) => {
                return Err(format!("unknown action {action:?}: expected manifest, pull or push"));
            }
        };
        if host.is_empty() {
            return Err("expected a registry's host".to_owned());
        }
        let mut limits = Limits::default();
        for word in words {
            let bad = || format!("{word:?}: expected rate=N, concurrency=N or quota=N/TIME, as 100/6h");
            let (name, value) = word.split_once('=').ok_or_else(bad)?;
            match name {
                "rate" => {
                    let rate = value.parse().ok().filter(|rate| (0.001..=1e6).contains(rate));
                    limits.rate = Some(rate.ok_or_else(bad)?);
                }
                "concurrency" => {
                    limits.concurrency = Some(value.parse().ok().filter(|&limit| limit > 0).ok_or_else(bad)?);
                }
                "quota" => {
                    let (count, time) = value.split_once('/').ok_or_else(bad)?;
                    let count = count.parse().ok().filter(|&count| count > 0).ok_or_else(bad)?;
                    limits.quota = Some((count, duration::parse(time).ok_or_else(bad)?));
                }
                _ => return Err(bad()),
            }
        }
        if limits == Limits::default() {
            return Err(format!("{text:?} has no limits: expected rate=N, concurrency=N or quota=N/TIME"));
        }
        Ok(Self { account, host: host.to_owned(), line, limits })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn rules(texts: &[&str]) -> Rules {
        Rules(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn rules_say_what_an_account_may_ask_of_a_registry() {
        let rules = rules(&[
            "docker.io/manifest quota=100/6h",
            "docker.io rate=20 concurrency=4",
            "ci@docker.io/manifest quota=200/6h",
            "docker.io/push concurrency=1",
        ]);
        let [all, manifest, pull, push] = rules.limits("docker.io", "", 1);
        assert_eq!((all.rate, all.concurrency), (Some(20.0), None));
        assert_eq!(manifest.quota, Some((100, Duration::from_secs(6 * 3600))));
        assert_eq!((pull.concurrency, push.concurrency), (Some(4), Some(1)));
        let [all, manifest, pull, push] = rules.limits("docker.io", "ci", 2);
        assert_eq!((all.rate, manifest.quota.map(|(count, _)| count)), (Some(10.0), Some(200)));
        assert_eq!((pull.concurrency, push.concurrency), (Some(2), Some(1)));
        assert_eq!(rules.limits("ghcr.io", "ci", 1), [Limits::default(); 4]);
    }

    #[test]
    fn what_a_rule_gets_wrong_is_named() {
        for (text, part) in [
            ("", "HOST"),
            ("docker.io", "no limits"),
            ("docker.io/delete rate=1", "delete"),
            ("@/pull rate=1", "host"),
            ("docker.io rate=0", "rate=0"),
            ("docker.io rate=NaN", "rate=NaN"),
            ("docker.io concurrency=0", "concurrency=0"),
            ("docker.io quota=5", "quota=5"),
            ("docker.io quota=5/6y", "quota=5/6y"),
            ("docker.io speed=5", "speed=5"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
