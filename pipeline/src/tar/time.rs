//! Modification times, to the nanosecond.

use super::number;

/// Seconds since 1970, and nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// May be negative: the time is never before this second.
    pub seconds: i64,
    /// Below 10^9.
    pub nanoseconds: u32,
}

impl Time {
    /// A whole second.
    pub const fn from_seconds(seconds: i64) -> Self {
        Self { seconds, nanoseconds: 0 }
    }

    /// The value of a PAX record: `-?digits[.digits]`. Digits past the ninth are dropped.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let (whole, fraction) = match text.iter().position(|&byte| byte == b'.') {
            Some(dot) => (&text[..dot], &text[dot + 1..]),
            None => (text, &[][..]),
        };
        let seconds = number::signed_decimal(whole)?;
        let mut nanoseconds = 0_u32;
        for place in 0..9 {
            let digit = fraction.get(place).copied().unwrap_or(b'0');
            nanoseconds = nanoseconds * 10 + u32::from(digit.checked_sub(b'0').filter(|&digit| digit < 10)?);
        }
        if fraction.iter().any(|byte| !byte.is_ascii_digit()) {
            return None;
        }
        if nanoseconds > 0 && whole.starts_with(b"-") {
            return Some(Self { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds });
        }
        Some(Self { seconds, nanoseconds })
    }

    /// As a PAX record's value.
    pub(super) fn to_text(self) -> String {
        let (sign, seconds, nanoseconds) = match (self.seconds, self.nanoseconds) {
            (seconds @ ..0, nanoseconds @ 1..) => {
                ("-", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds)
            }
            (seconds, nanoseconds) => {
                (if seconds < 0 { "-" } else { "" }, seconds.unsigned_abs(), nanoseconds)
            }
        };
        let whole = format!("{sign}{seconds}");
        if nanoseconds == 0 {
            return whole;
        }
        format!("{whole}.{nanoseconds:09}").trim_end_matches('0').to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for (text, seconds, nanoseconds) in [
            ("0", 0, 0),
            ("1700000000.5", 1_700_000_000, 500_000_000),
            ("-1.5", -2, 500_000_000),
            ("-0.25", -1, 750_000_000),
            ("-7", -7, 0),
            ("1.000000001", 1, 1),
        ] {
            let time = Time::parse(text.as_bytes()).unwrap();
            assert_eq!(time, Time { seconds, nanoseconds }, "{text}");
            assert_eq!(time.to_text(), text);
        }
        assert_eq!(Time::parse(b"1."), Some(Time::from_seconds(1)));
        assert_eq!(Time::parse(b"1.0000000019"), Some(Time { seconds: 1, nanoseconds: 1 }));
        for bad in ["", ".", "x", "1e5", "nan", "1.x", "1.0000000000x", "1.-5", " 1"] {
            assert_eq!(Time::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
