//! Lengths of time, as people write them: `90s`, `15m`, `6h`, `1d`.

use std::time::Duration;

/// The units, the largest first, and how many seconds each has.
const UNITS: [(char, u64); 4] = [('d', 24 * 3600), ('h', 3600), ('m', 60), ('s', 1)];
/// How many of a unit may be written.
const COUNT_MAX: u64 = 10_000;

/// What is written: a whole number from 1 to 10 000, and a unit. None: something else.
pub fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let (_, seconds) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
    let number = &text[..text.len() - unit.len_utf8()];
    let count: u64 = number.parse().ok().filter(|count| (1..=COUNT_MAX).contains(count))?;
    Some(Duration::from_secs(count * seconds))
}

/// The same, to be read again. None: it has parts of a second, or none that can be written so.
pub fn text(duration: Duration) -> Option<String> {
    let seconds = Some(duration).filter(|duration| duration.subsec_nanos() == 0)?.as_secs();
    let unit = UNITS.into_iter().find(|(_, unit)| seconds.is_multiple_of(*unit));
    let (name, count) = unit.map(|(name, unit)| (name, seconds / unit))?;
    (1..=COUNT_MAX).contains(&count).then(|| format!("{count}{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_written_again_in_the_largest_unit() {
        for (written, seconds, again) in [
            ("90s", 90, "90s"),
            ("120s", 120, "2m"),
            ("6h", 21_600, "6h"),
            ("24h", 86_400, "1d"),
            ("10000d", 864_000_000, "10000d"),
        ] {
            let duration = parse(written).unwrap();
            assert_eq!((duration.as_secs(), text(duration).unwrap().as_str()), (seconds, again), "{written}");
        }
        for bad in ["", "6", "h", "0s", "-1s", "1.5h", "1h30m", "6y", "10001s", " 1s", "1µ"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        for bad in [Duration::ZERO, Duration::from_millis(1500), Duration::from_secs(10_001)] {
            assert_eq!(text(bad), None, "{bad:?}");
        }
    }
}
