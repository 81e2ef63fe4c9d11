use serde_json::Value;

use super::*;

#[track_caller]
fn refused(text: &str, line: u64, column: u64, parts: &[&str]) {
    let error = Config::parse(text).unwrap_err();
    assert_eq!((error.line, error.column), (line, column), "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "{error}");
    }
}

const WHOLE: &str = r#"
mirrors:
  - sources: [docker.io/library/busybox, "localhost:5000/team/*", registry.example]
    exclude_repositories: ["**/old-*"]
    targets: ["mirror.example/{registry}/{repository}", "localhost:5001/{name}:{tag}-copy"]
    tags:
      - names: [latest, 1.10, 3]
      - globs: ["1.*"]
        regexes: ['v\d+']
        semver: [">=1.30, <2"]
        exclude: ["*-rc*"]
        exclude_regexes: [".*beta.*"]
        newest: 3
    platforms: [linux/amd64, linux/arm64]
    sparse: true
    referrers: true
    backup: before-{tag}-{digest}
    immutable: ["v*"]
    deletion: {max: 5}
schedule:
  cron: "0 3 * * 1-5"
  timezone: Europe/Berlin
  jitter: 10m
"#;

#[test]
fn everything_can_be_said() {
    let config = Config::parse(WHOLE).unwrap();
    let [mirror] = &*config.mirrors else { panic!("{config:?}") };
    assert!(matches!(&*mirror.sources, [Source::Repository(_), Source::Catalog(..), Source::Catalog(..)]));
    // Numbers are tags as they are written.
    let names: Vec<_> = mirror.tags[0].names.iter().map(Tag::to_string).collect();
    assert_eq!(names, ["latest", "1.10", "3"]);
    assert_eq!(mirror.tags[1].newest, Some(3));
    assert_eq!((mirror.sparse, mirror.referrers, mirror.deletion), (true, true, Some(5)));
    let schedule = config.schedule.unwrap().to_string();
    assert_eq!(schedule, "0 3 * * 1-5 Europe/Berlin, up to 10m later");
}

#[test]
fn anchors_and_merged_keys_save_words() {
    let config = Config::parse(
        "mirrors:\n  - &base\n    sources: [a.example/one]\n    targets: ['b.example/{repository}']\n  \
         - <<: *base\n    sources: [a.example/two]\n",
    );
    assert_eq!(config.unwrap().mirrors.len(), 2);
}

#[test]
fn what_is_wrong_is_told_with_its_place() {
    let with = |line: &str| {
        format!("mirrors:\n  - sources: [a.example/x]\n    targets: ['b.example/x']\n    {line}\n")
    };
    refused(&with("tag: []"), 4, 5, &["tag", "tags"]);
    refused(&with("referrers: maybe"), 4, 16, &[]);
    refused(&with("tags: [{globs: ['[']}]"), 4, 21, &["["]);
    refused(&with("tags: [{regexes: ['(']}]"), 4, 23, &["unclosed group"]);
    refused(&with("tags: [{semver: ['>=x']}]"), 4, 22, &[">=x"]);
    refused(&with("tags: [{names: ['a/b']}]"), 4, 21, &["a/b"]);
    refused(&with("tags: [{newest: 0}]"), 4, 21, &["from 1"]);
    refused(&with("tags: [{}]"), 4, 12, &["nothing is said"]);
    refused(&with("platforms: [linux]"), 4, 17, &["linux"]);
    refused(&with("sparse: true"), 4, 13, &["platforms"]);
    refused(&with("provenance: true"), 4, 17, &["filters"]);
    assert!(Config::parse(&with("provenance: false")).is_ok());
    let sparse = |filters: &str| with(&format!("platforms: [linux/amd64]\n    sparse: true{filters}"));
    assert!(Config::parse(&sparse("")).is_ok());
    let filtered = sparse("\n    filters: [normalize-timestamps]");
    refused(&filtered, 5, 13, &["sparse keeps an index", "can only name images that have passed them"]);
    assert!(Config::parse(&filtered.replace("sparse: true", "sparse: false")).is_ok());
    refused(&with("backup: old"), 4, 13, &["{tag}"]);
    refused(&with("backup: '{tag}'"), 4, 13, &["another name"]);
    refused(&with("backup: '{tag}-{date}'"), 4, 13, &["{date}", "{digest}"]);
    refused(&with("deletion: {max: 0}"), 4, 21, &["from 1"]);
    refused(&with("deletion: {}"), 4, 15, &["max"]);
    let when = |line: &str| with(&format!("referrers: true\nschedule:\n  {line}"));
    refused(&when("cron: 0 3 * *"), 6, 9, &["0 3 * *", "5 fields"]);
    refused(&when("cron: 0 0 3 * * *"), 6, 9, &["5 fields"]);
    refused(&when("cron: 61 3 * * *"), 6, 9, &["61"]);
    refused(&when("cron: 0 0 30 2 *"), 6, 9, &["never comes"]);
    refused(&when("{cron: 0 3 * * *, timezone: Europe/Nowhere}"), 6, 31, &["Europe/Nowhere"]);
    refused(&when("interval: 6"), 6, 13, &["6h"]);
    refused(&when("{interval: 6h, jitter: 7h}"), 6, 26, &["6h"]);
    refused(&when("{cron: 0 3 * * *, jitter: 2d}"), 6, 29, &["1d"]);
    refused(&when("{interval: 6h, timezone: UTC}"), 6, 28, &["cron"]);
    refused(&when("{cron: 0 3 * * *, interval: 6h}"), 6, 31, &["exclude"]);
    refused(&when("jitter: 1m"), 6, 3, &["cron or interval"]);
    refused("mirrors: [\n", 1, 10, &["unclosed"]);
    refused("mirrors: []\n", 1, 1, &["nothing"]);
    let of = |source: &str, target: &str| {
        format!("mirrors:\n  - sources: [{source}]\n    targets:\n      - '{target}'\n")
    };
    refused(&of("a.example/x:1", "b.example/x"), 2, 15, &["tags"]);
    refused(&of("'team/*'", "b.example/{name}"), 2, 15, &["HOST/PATTERN"]);
    refused(&of("a.example/X", "b.example/x"), 2, 15, &["lower case"]);
    refused(&of("'oci-layout:///x'", "b.example/x"), 2, 15, &["oci-layout://", "registries"]);
    refused(&of("a.example/x", "oci-layout:///x"), 4, 9, &["oci-layout://", "registries"]);
    refused(&of("a.example", "b.example/x"), 4, 9, &["{repository}"]);
    refused(&of("a.example/x", "b.example/x:1"), 4, 9, &["{tag}"]);
    refused(&of("a.example/x", "b.example/{path}"), 4, 9, &["{path}", "{repository}"]);
    refused(&of("a.example/x", "b.example/A"), 4, 9, &["lower case"]);
    refused(&of("a.example/x", "b.example"), 4, 9, &["HOST/REPOSITORY"]);
}

/// What the parser says to a key that it does not know, of the object at `path` in the whole example.
fn known_keys(path: &[&str]) -> BTreeSet<String> {
    let mut document: Value = serde_saphyr::from_str(WHOLE).unwrap();
    let mut at = &mut document;
    for step in path {
        at = match step.parse::<usize>() {
            Ok(index) => &mut at[index],
            Err(_) => &mut at[step],
        };
    }
    at.as_object_mut().unwrap().insert("x-unknown".to_owned(), Value::Null);
    let said = Config::parse(&document.to_string()).unwrap_err().to_string();
    let (_, expected) = said.split_once("expected").unwrap_or_else(|| panic!("{said}"));
    let is_word = |word: &&str| !word.is_empty() && *word != "one" && *word != "of";
    let words = expected.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(is_word).map(str::to_owned).collect()
}

#[test]
fn the_schema_and_the_parser_know_the_same_keys_and_types() {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let objects: [(&[&str], &str); 5] = [
        (&[], ""),
        (&["mirrors", "0"], "/properties/mirrors/items"),
        (&["mirrors", "0", "tags", "1"], "/properties/mirrors/items/properties/tags/items"),
        (&["mirrors", "0", "deletion"], "/properties/mirrors/items/properties/deletion"),
        (&["schedule"], "/properties/schedule"),
    ];
    for (path, pointer) in objects {
        let object = schema.pointer(pointer).unwrap();
        assert_eq!(object["additionalProperties"], false, "{pointer}");
        let properties = object["properties"].as_object().unwrap();
        let keys: BTreeSet<String> = properties.keys().cloned().collect();
        assert_eq!(keys, known_keys(path), "{pointer}");
        let required: Vec<&str> =
            object["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for (key, property) in properties {
            assert!(property["description"].is_string(), "{pointer}/{key}");
            let replaced = |value: Option<Value>| {
                let mut document: Value = serde_saphyr::from_str(WHOLE).unwrap();
                // A tag that is a number is read back as one.
                document["mirrors"][0]["tags"][0]["names"] = serde_json::json!(["latest"]);
                let pointer: String = path.iter().map(|step| format!("/{step}")).collect();
                let object = document.pointer_mut(&pointer).unwrap().as_object_mut().unwrap();
                match value {
                    Some(value) => object.insert(key.clone(), value),
                    None => object.remove(key),
                };
                Config::parse(&document.to_string())
            };
            let wrong = match property["type"].as_str().unwrap() {
                "array" => serde_json::json!({"x": "y"}),
                "string" => serde_json::json!(["x"]),
                "boolean" | "integer" => serde_json::json!("x"),
                "object" => serde_json::json!("x"),
                other => panic!("{other}"),
            };
            let wrong = replaced(Some(wrong)).unwrap_err().to_string();
            assert!(wrong.contains("belongs here"), "{pointer}/{key}: {wrong}");
            let missing = replaced(None).err().map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(
                required.contains(&&**key),
                missing.contains("missing field"),
                "{pointer}/{key}: {missing}"
            );
        }
    }
}
