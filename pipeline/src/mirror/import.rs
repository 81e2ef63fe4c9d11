//! What others call a mirror: the files of `regsync` and of `skopeo sync --src yaml`, as files of ours.
//!
//! What cannot be carried over is named, and an entry that would then mirror something else is left out.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::config::{Config, ConfigError, parse_yaml};
use crate::duration;
use crate::reference::Reference;

/// A file of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The file; with a comment alone where no entry could be carried over.
    pub text: String,
    /// What could not be carried over, a sentence each.
    pub lost: Vec<String>,
}

/// One entry, or why there is none.
type Entry = Result<Map<String, Value>, String>;

#[derive(Default)]
struct Import {
    entries: Vec<Map<String, Value>>,
    /// When they are all made.
    schedule: Option<Value>,
    lost: Vec<String>,
}

impl Import {
    /// Takes an entry that our own parser takes; and says whether it did.
    fn add(&mut self, at: &str, entry: Entry) -> bool {
        let refused = |entry: &Map<String, Value>| {
            Config::parse(&json!({"mirrors": [entry]}).to_string()).err().map(|error| error.problem)
        };
        match entry.and_then(|entry| refused(&entry).map_or(Ok(entry), Err)) {
            Ok(entry) => self.entries.push(entry),
            Err(problem) => {
                self.lost.push(format!("{at} is left out: {problem}"));
                return false;
            }
        }
        true
    }

    /// Takes the schedule of an entry that was taken: a file of ours has one, for all of its entries.
    fn add_schedule(&mut self, at: &str, schedule: Result<Value, String>) {
        let refused = |schedule: &Value| {
            let file = json!({"mirrors": self.entries, "schedule": schedule});
            Config::parse(&file.to_string()).err().map(|error| error.problem)
        };
        match (schedule.and_then(|schedule| refused(&schedule).map_or(Ok(schedule), Err)), &self.schedule) {
            (Ok(schedule), None) => self.schedule = Some(schedule),
            (Ok(schedule), Some(taken)) if schedule == *taken => {}
            (Ok(schedule), Some(taken)) => self.lost.push(format!(
                "{at} is not carried over: a file has one schedule, which is {taken} here, and not {schedule}"
            )),
            (Err(problem), _) => self.lost.push(format!("{at} is not carried over: {problem}")),
        }
    }

    /// Names the keys of an object that are none of the known ones.
    fn only(&mut self, at: &str, object: &Value, known: &[&str]) {
        let keys = object.as_object().into_iter().flat_map(Map::keys);
        let others = keys.filter(|key| !known.contains(&key.as_str()));
        self.lost.extend(others.map(|key| format!("{at}.{key} is not carried over")));
    }

    fn finish(self) -> Imported {
        let mut text =
            if self.entries.is_empty() { "# nothing could be carried over\n" } else { "mirrors:\n" }
                .to_owned();
        for entry in &self.entries {
            for (number, (key, value)) in entry.iter().enumerate() {
                // What is JSON is YAML.
                text += &format!("  {} {key}: {value}\n", if number == 0 { "-" } else { " " });
            }
        }
        if let Some(schedule) = self.schedule {
            text += &format!("schedule: {schedule}\n");
        }
        Imported { text, lost: self.lost }
    }
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The file of `regsync`.
pub fn regsync(file: &str) -> Result<Imported, ConfigError> {
    let file: Value = parse_yaml(file)?;
    let mut import = Import::default();
    import.only("the file", &file, &["version", "defaults", "sync"]);
    const DEFAULTS: [&str; 5] = ["backup", "referrers", "digestTags", "schedule", "interval"];
    import.only("defaults", &file["defaults"], &DEFAULTS);
    for (number, sync) in list(&file["sync"]).iter().enumerate() {
        let at = format!("sync[{number}]");
        let own = ["source", "target", "type", "tags", "tagSets", "repos", "platform", "platforms"];
        import.only(&at, sync, &[&own[..], &DEFAULTS].concat());
        let value = |key: &str| if sync[key].is_null() { &file["defaults"][key] } else { &sync[key] };
        let mut entry = regsync_entry(sync);
        if let Ok(entry) = &mut entry {
            if value("referrers") == true || value("digestTags") == true {
                entry.insert("referrers".to_owned(), true.into());
            }
            let backup =
                text(value("backup")).replace("{{.Ref.Tag}}", "{tag}").replace("{{ .Ref.Tag }}", "{tag}");
            if backup.contains("{{")
                || backup.contains([':', '/'])
                || !backup.is_empty() && !backup.contains("{tag}")
            {
                import.lost.push(format!("{at}.backup is not carried over: no tags are kept"));
            } else if !backup.is_empty() {
                entry.insert("backup".to_owned(), backup.into());
            }
            if !sync["platform"].is_null() {
                import
                    .lost
                    .push(format!("{at}.platform becomes an index of one platform, and not its image"));
            }
        }
        if import.add(&at, entry) {
            // A schedule wins, wherever it is said.
            let times = ["schedule", "interval"].map(|key| (key, text(value(key))));
            if let Some((key, time)) = times.into_iter().find(|(_, time)| !time.is_empty()) {
                import.add_schedule(&format!("{at}.{key}"), regsync_schedule(key, &time));
            }
        }
    }
    Ok(import.finish())
}

/// `schedule` is cron's five fields, behind the name of a time zone or not, or `@every` and what `interval` is: Go's length of time.
fn regsync_schedule(key: &str, time: &str) -> Result<Value, String> {
    let time = time.trim();
    let every = if key == "interval" { Some(time) } else { time.strip_prefix("@every ") };
    if let Some(every) = every {
        let interval = go_duration(every.trim()).and_then(duration::text);
        let problem = || format!("{every:?} is no length of time of whole seconds that can be written here");
        return Ok(json!({"interval": interval.ok_or_else(problem)?}));
    }
    let zoned = ["CRON_TZ=", "TZ="].iter().find_map(|prefix| time.strip_prefix(prefix)?.split_once(' '));
    Ok(match zoned {
        Some((zone, cron)) => json!({"cron": cron.trim(), "timezone": zone}),
        None => json!({"cron": time}),
    })
}

/// `1h30m`, in Go's `time.ParseDuration`, of whole seconds.
fn go_duration(mut text: &str) -> Option<Duration> {
    let mut sum = Duration::ZERO;
    while !text.is_empty() {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let unit = text[digits..].find(|c: char| c.is_ascii_digit()).map_or(text.len(), |at| digits + at);
        let seconds = match &text[digits..unit] {
            "h" => 3600,
            "m" => 60,
            "s" => 1,
            _ => return None,
        };
        let count: u32 = text[..digits].parse().ok()?;
        sum = sum.checked_add(Duration::from_secs(u64::from(count) * seconds))?;
        text = &text[unit..];
    }
    Some(sum)
}

fn regsync_entry(sync: &Value) -> Entry {
    let (source, target) = (text(&sync["source"]), text(&sync["target"]));
    if [&source, &target].iter().any(|name| name.contains("{{") || name.starts_with("ocidir://")) {
        return Err("templates and layouts are not carried over".to_owned());
    }
    let mut entry = Map::new();
    let mut insert = |key: &str, value: Value| drop(entry.insert(key.to_owned(), value));
    match sync["type"].as_str() {
        Some("image") => {
            let image: Reference = source.parse().map_err(|error| format!("{error}"))?;
            let Some(tag) = image.tag().filter(|_| image.digest().is_none()) else {
                return Err("an image by its digest is not carried over".to_owned());
            };
            let copy: Reference = target.parse().map_err(|error| format!("{error}"))?;
            insert("sources", json!([image.name()]));
            insert("targets", json!([copy.to_string()]));
            insert("tags", json!([{"names": [tag.as_str()]}]));
        }
        Some("repository") => {
            insert("sources", json!([source]));
            insert("targets", json!([target]));
        }
        Some("registry") if sync["repos"].is_null() => {
            insert("sources", json!([source]));
            insert("targets", json!([format!("{}/{{repository}}", target.trim_end_matches('/'))]));
        }
        Some("registry") => return Err("repos are regular expressions, and ours are globs".to_owned()),
        other => return Err(format!("its type is {other:?}")),
    }
    let sets: Vec<Value> = list(&sync["tagSets"]).into_iter().chain([sync["tags"].clone()]).collect();
    let selections = sets.iter().filter_map(|set| {
        let keys = [("allow", "regexes"), ("deny", "exclude_regexes"), ("semverRange", "semver")];
        let said = keys.iter().filter(|(theirs, _)| !list(&set[theirs]).is_empty());
        let said: Map<String, Value> =
            said.map(|(theirs, ours)| ((*ours).to_owned(), set[theirs].clone())).collect();
        (!said.is_empty()).then(|| Value::from(said))
    });
    let selections: Vec<Value> = selections.collect();
    if !selections.is_empty() && sync["type"] != "image" {
        insert("tags", selections.into());
    }
    let mut platforms = list(&sync["platforms"]);
    platforms.extend(sync["platform"].as_str().map(Value::from));
    if !platforms.is_empty() {
        // Its index stays as it is, too.
        insert("sparse", sync["platform"].is_null().into());
        insert("platforms", platforms.into());
    }
    Ok(entry)
}

/// The file of `skopeo sync --src yaml`, whose destination, a registry with or without a path, is an argument there.
pub fn skopeo(file: &str, destination: &str) -> Result<Imported, ConfigError> {
    let file: Value = parse_yaml(file)?;
    let mut import = Import::default();
    let target = format!("{}/{{name}}", destination.trim_end_matches('/'));
    for (host, registry) in file.as_object().into_iter().flatten() {
        import.only(host, registry, &["images", "images-by-tag-regex", "images-by-semver"]);
        let of = |key: &str| registry[key].as_object().cloned().unwrap_or_default();
        let entry = |name: &str, selection: Option<Value>| {
            let mut entry = Map::new();
            entry.insert("sources".to_owned(), json!([format!("{host}/{name}")]));
            entry.insert("targets".to_owned(), json!([target]));
            entry.extend(selection.map(|selection| ("tags".to_owned(), json!([selection]))));
            entry
        };
        for (name, tags) in of("images") {
            let at = format!("{host}.images.{name}");
            let (digests, tags): (Vec<_>, Vec<_>) =
                list(&tags).into_iter().partition(|tag| tag.as_str().is_some_and(|tag| tag.contains(':')));
            let digest = |digest: &Value| format!("{at}: {} is a digest, and not carried over", text(digest));
            import.lost.extend(digests.iter().map(digest));
            match (tags.is_empty(), digests.is_empty()) {
                (true, false) => {}
                (true, true) => {
                    import.add(&at, Ok(entry(&name, None)));
                }
                (false, _) => {
                    import.add(&at, Ok(entry(&name, Some(json!({"names": tags})))));
                }
            }
        }
        for (name, pattern) in of("images-by-tag-regex") {
            // Theirs matches a part of a tag.
            let pattern = format!(".*(?:{}).*", text(&pattern));
            let at = format!("{host}.images-by-tag-regex.{name}");
            import.add(&at, Ok(entry(&name, Some(json!({"regexes": [pattern]})))));
        }
        for (name, range) in of("images-by-semver") {
            let at = format!("{host}.images-by-semver.{name}");
            import.add(&at, Ok(entry(&name, Some(json!({"semver": [text(&range)]})))));
        }
    }
    Ok(import.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_regsync_becomes_ours() {
        let imported = regsync(
            "version: 1\ncreds: [{registry: 'registry:5000', tls: disabled}]\ndefaults:\n  parallel: 2\n  \
             backup: 'bkup-{{.Ref.Tag}}'\nsync:\n  - {source: 'busybox:latest', target: 'registry:5000/b:stable', type: image}\n  \
             - source: alpine\n    target: registry:5000/alpine\n    type: repository\n    tags: {allow: ['3', '3\\.\\d+'], \
             deny: [old], semverRange: ['>=3.0 <4']}\n    schedule: daily\n    platforms: [linux/amd64]\n    digestTags: true\n  \
             - {source: a.example, target: 'b.example/x', type: registry}\n  \
             - {source: a.example, target: b.example, type: registry, repos: {allow: [x]}}\n",
        )
        .unwrap();
        let config = Config::parse(&imported.text).unwrap();
        assert_eq!(config.mirrors.len(), 3, "{}", imported.text);
        assert!(config.mirrors.iter().all(|mirror| mirror.backup.is_some()));
        assert!(config.mirrors[1].referrers && config.mirrors[1].sparse);
        let listed = ["3", "3.1", "3.1-x", "4"].map(str::to_owned);
        assert_eq!(config.mirrors[1].wanted(&listed), ["3", "3.1"]);
        for lost in ["the file.creds", "defaults.parallel", "sync[1].schedule", "sync[3] is left out"] {
            assert!(imported.lost.iter().any(|said| said.starts_with(lost)), "{lost}: {:?}", imported.lost);
        }
        assert_eq!(imported.lost.len(), 4, "{:?}", imported.lost);
    }

    #[test]
    fn when_regsync_copies_becomes_a_schedule() {
        let sync = |more: &str| {
            format!("  - {{source: a.example/x, target: b.example/x, type: repository{more}}}\n")
        };
        let imported = |defaults: &str, more: &[&str]| {
            let entries: String = more.iter().map(|more| sync(more)).collect();
            let imported =
                regsync(&format!("version: 1\ndefaults: {{{defaults}}}\nsync:\n{entries}")).unwrap();
            let schedule = Config::parse(&imported.text).unwrap().schedule;
            (schedule.map(|schedule| schedule.to_string()), imported.lost)
        };
        for (defaults, own, expected) in [
            ("", "", None),
            ("interval: 60m", "", Some("every 1h")),
            ("interval: 60m", ", interval: 1h30m", Some("every 90m")),
            ("interval: 60m", ", schedule: '0 3 * * *'", Some("0 3 * * * UTC")),
            ("schedule: '0 3 * * *'", ", interval: 5m", Some("0 3 * * * UTC")),
            ("", ", schedule: '@every 90s'", Some("every 90s")),
            ("", ", schedule: '@daily'", Some("@daily UTC")),
            ("", ", schedule: 'TZ=Europe/Berlin 30 2 * * 1-5'", Some("30 2 * * 1-5 Europe/Berlin")),
        ] {
            let (schedule, lost) = imported(defaults, &[own]);
            assert_eq!((schedule.as_deref(), &*lost), (expected, &[][..]), "{defaults}{own}");
        }
        let (schedule, lost) = imported("interval: 60m", &["", ", schedule: '0 3 * * *'", ", interval: 1h"]);
        assert_eq!(schedule.as_deref(), Some("every 1h"));
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert!(
            lost[0].starts_with("sync[1].schedule is not carried over: a file has one schedule"),
            "{lost:?}"
        );
        for bad in
            ["schedule: '0 3 * *'", "interval: 500ms", "interval: 1d", "interval: -1h", "interval: 3h4"]
        {
            let (schedule, lost) = imported("", &[&format!(", {bad}")]);
            assert_eq!(schedule, None, "{bad}");
            assert_eq!(lost.len(), 1, "{bad}: {lost:?}");
        }
    }

    #[test]
    fn a_file_of_skopeo_becomes_ours() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let imported = skopeo(
            &format!(
                "registry.example.com:\n  images:\n    busybox: []\n    redis: ['1.0', '{digest}']\n  \
                 images-by-tag-regex:\n    nginx: ^1\\.13\n  images-by-semver:\n    alpine: '>= 3.12.0'\n    bad: '!= 1'\n  \
                 credentials: {{username: john, password: s3cr3t}}\n  tls-verify: true\n"
            ),
            "mirror.example/repo/",
        )
        .unwrap();
        let config = Config::parse(&imported.text).unwrap();
        assert_eq!(config.mirrors.len(), 4, "{}", imported.text);
        let listed = ["1.13.1-x", "1.14", "3.12.0"].map(str::to_owned);
        assert_eq!(config.mirrors[2].wanted(&listed), ["1.13.1-x"]);
        assert_eq!(config.mirrors[3].wanted(&listed), ["3.12.0"]);
        assert!(imported.lost.iter().any(|said| said.contains(&digest)));
        assert_eq!(imported.lost.len(), 4, "{:?}", imported.lost);
        assert!(!format!("{imported:?}").contains("s3cr3t"));
    }
}
