//! Sizes as people write them.

/// What may stand behind the number, in any case. As for GNU's tools, `K` and `KiB` are 1024 bytes and `KB` is 1000.
const UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KiB", 1 << 10),
    ("KB", 1_000),
    ("M", 1 << 20),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("G", 1 << 30),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("T", 1 << 40),
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
];

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size: expected a whole number, and K, M, G or T (1024), or KB, MB, GB or TB (1000)")]
pub struct InvalidSize(String);

/// A number of bytes, such as `512`, `64K`, `1GiB`.
pub fn parse(text: &str) -> Result<u64, InvalidSize> {
    let fail = || InvalidSize(text.to_owned());
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: u64 = number.parse().map_err(|_| fail())?;
    let (_, bytes) = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(fail)?;
    number.checked_mul(*bytes).ok_or_else(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_unless_they_are_the_sis_own() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("7b", 7),
            ("3K", 3072),
            ("1k", 1024),
            ("1KiB", 1024),
            ("1kB", 1000),
            ("2M", 2 << 20),
            ("1GiB", 1 << 30),
            ("1GB", 1_000_000_000),
            ("1gb", 1_000_000_000),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in ["", "K", "-1", "1.5G", "1 K", "1Ki", "1KK", "1P", "99999999999T"] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }
}
