//! `normalize-timestamps`: gives every member one modification time, or none later than it, and drops all other times.
//!
//! Dropped are atime, ctime and LIBARCHIVE.creationtime, as PAX records and in GNU headers. A member that is so already is
//! not edited. In the config, `created` and each `history[].created` follow the same rule.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::{Filter, FilterError, FilterKind, Finish, Key, LayerFilter, Report, Targets, Verdict};
use crate::layer::Keep;
use crate::tar::{Limits, Member, Time};

/// In the list of filters.
pub static KIND: FilterKind = FilterKind {
    name: "normalize-timestamps",
    help: "set every file's time, and the times in the config, to one value",
    keys: &[
        Key { names: &["ts", "timestamp"], value: "SECONDS", help: "seconds since 1970 (default: 0)" },
        Key {
            names: &["mode"],
            value: "set|clamp",
            help: "set every time, or lower only those that are later (default: set)",
        },
    ],
    parse: |options| {
        let time = match options.get("ts") {
            None => 0,
            Some(text) => text.parse().ok().filter(|time| (0..=LATEST).contains(time)).ok_or_else(|| {
                options.invalid("ts", text, &format_args!("expected seconds since 1970, up to {LATEST}"))
            })?,
        };
        let mode = match options.get("mode") {
            None | Some("set") => Mode::Set,
            Some("clamp") => Mode::Clamp,
            Some(other) => return Err(options.invalid("mode", other, &"expected set or clamp")),
        };
        Ok(Arc::new(NormalizeTimestamps { time, mode }))
    },
};

/// The end of the year 9999, which is as far as RFC 3339 goes.
const LATEST: i64 = 253_402_300_799;

/// PAX records that hold times other than the modification time.
const TIMES: [&[u8]; 3] = [b"atime", b"ctime", b"LIBARCHIVE.creationtime"];

/// The filter.
#[derive(Clone, Copy, Debug)]
pub struct NormalizeTimestamps {
    /// Seconds since 1970.
    time: i64,
    mode: Mode,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Set,
    /// The rule of `SOURCE_DATE_EPOCH`: only later times change.
    Clamp,
}

/// What it did to a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Members whose times changed.
    pub edited: u64,
}

impl Filter for NormalizeTimestamps {
    fn spec(&self) -> String {
        let mode = match self.mode {
            Mode::Set => "set",
            Mode::Clamp => "clamp",
        };
        format!("normalize-timestamps:ts={}:mode={mode}", self.time)
    }

    fn edits(&self) -> bool {
        true
    }

    /// A time is as long as another in a header; only where one stood in an extended header the member gets shorter.
    fn resizes(&self) -> bool {
        false
    }

    fn layer(&self, _targets: &Targets, _limits: &Limits) -> Box<dyn LayerFilter> {
        Box::new(Layer { filter: *self, counts: Counts::default() })
    }

    fn edit_config(&self, config: &mut Value) -> bool {
        let mut changed = config.get_mut("created").is_some_and(|created| self.edit_created(created));
        let history = config.get_mut("history").and_then(Value::as_array_mut);
        for entry in history.into_iter().flatten() {
            changed |= entry.get_mut("created").is_some_and(|created| self.edit_created(created));
        }
        changed
    }
}

impl NormalizeTimestamps {
    /// A time that is no RFC 3339 is set, but not clamped: nothing says that it is later.
    fn edit_created(&self, created: &mut Value) -> bool {
        let target = Timestamp::from_second(self.time).expect("parsing checked the range");
        let current = created.as_str().and_then(|text| text.parse::<Timestamp>().ok());
        let change = match self.mode {
            Mode::Set => current != Some(target),
            Mode::Clamp => current.is_some_and(|current| current > target),
        };
        if change {
            *created = Value::String(target.to_string());
        }
        change
    }
}

struct Layer {
    filter: NormalizeTimestamps,
    counts: Counts,
}

impl LayerFilter for Layer {
    fn member(&mut self, member: &mut Member, _keep: &mut Keep) -> Result<Verdict, FilterError> {
        let before = member.edit_count();
        if member.is_global() {
            // Every member gets its own time below, which readers that ignore global headers see as well.
            member.remove_record(b"mtime");
            member.remove_global_time();
        } else {
            let target = match self.filter.mode {
                Mode::Set => Time::from_seconds(self.filter.time),
                Mode::Clamp => member.mtime().min(Time::from_seconds(self.filter.time)),
            };
            if member.mtime() != target || member.mtime_is_global() {
                member.set_mtime(target);
            }
            member.remove_header_times();
        }
        for key in TIMES {
            member.remove_record(key);
        }
        if member.edit_count() != before {
            self.counts.edited += 1;
        }
        Ok(Verdict::Keep)
    }

    fn finish(self: Box<Self>) -> Finish {
        Finish { report: Some(Report::NormalizeTimestamps(self.counts)), ..Finish::default() }
    }
}
