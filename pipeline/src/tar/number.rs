//! The numbers of tar headers: octal text, GNU's base-256, and the decimals of PAX records.

/// A header field: octal text, or base-256 where its first byte is 0x80 (positive) or 0xff (negative).
///
/// Text ends at the first NUL and may stand between spaces; no digits are zero. Go and Python agree on all that is accepted.
pub(super) fn field(bytes: &[u8]) -> Option<i64> {
    match bytes {
        [0x80, rest @ ..] => base256(rest, 0),
        [0xff, rest @ ..] => base256(rest, -1),
        _ => octal(bytes),
    }
}

/// Octal text alone, as checksums are written.
pub(super) fn octal(bytes: &[u8]) -> Option<i64> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let (text, rest) = bytes.split_at(end);
    let text = text.trim_ascii();
    // Python reads a field that begins with a NUL as zero, Go skips the NULs.
    if text.is_empty() && rest.iter().any(|byte| !matches!(byte, 0 | b' ')) {
        return None;
    }
    text.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

fn base256(bytes: &[u8], start: i64) -> Option<i64> {
    bytes.iter().try_fold(start, |value, &byte| Some(value.checked_mul(256)? | i64::from(byte)))
}

/// Decimal digits and nothing else.
pub(super) fn decimal(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() {
        return None;
    }
    bytes.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// Decimal digits after an optional minus.
pub(super) fn signed_decimal(bytes: &[u8]) -> Option<i64> {
    match bytes {
        [b'-', digits @ ..] => 0_i64.checked_sub_unsigned(decimal(digits)?),
        digits => i64::try_from(decimal(digits)?).ok(),
    }
}

/// The largest number that fits into a field of `width` bytes as octal digits and a NUL.
pub(super) const fn octal_max(width: usize) -> i64 {
    (1 << (3 * (width - 1))) - 1
}

/// Writes `value`, which must fit, as octal digits and a NUL.
pub(super) fn write_octal(field: &mut [u8], value: i64) {
    debug_assert!((0..=octal_max(field.len())).contains(&value));
    let mut rest = value;
    let (last, digits) = field.split_last_mut().expect("fields are not empty");
    *last = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest & 7) as u8;
        rest >>= 3;
    }
}

/// Writes `value` as base-256, for fields that have no PAX record to overflow into.
pub(super) fn write_base256(field: &mut [u8], value: i64) {
    let mut rest = value;
    for byte in field.iter_mut().rev() {
        *byte = (rest & 0xff) as u8;
        rest >>= 8;
    }
    field[0] = if value < 0 { 0xff } else { 0x80 };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_octal_or_base_256() {
        for (bytes, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644 \0\0\0\0", Some(0o644)),
            (b"00000644", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"644\0junk", Some(0o644)),
            (b"\x80\0\0\0\0\0\x01\x02", Some(258)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\0", Some(-256)),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"0000648\0", None),
            (b"-000644\0", None),
            (b"6 44\0\0\0\0", None),
            (b"\x81\0\0\0\0\0\0\x01", None),
            (b"\x00000644\x00", None),
        ] {
            assert_eq!(field(bytes), value, "{bytes:?}");
        }
    }

    #[test]
    fn decimals_are_digits_only() {
        assert_eq!(decimal(b"0042"), Some(42));
        assert_eq!(decimal(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!(signed_decimal(b"-7"), Some(-7));
        assert_eq!(signed_decimal(b"-9223372036854775808"), Some(i64::MIN));
        for bad in ["", "+1", " 1", "1 ", "1_0", "18446744073709551616", "0x1"] {
            assert_eq!(decimal(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(signed_decimal(b"--1"), None);
        assert_eq!(signed_decimal(b"9223372036854775808"), None);
    }

    #[test]
    fn what_is_written_is_read() {
        let mut field_bytes = [b'x'; 8];
        for value in [0, 1, 0o644, octal_max(8)] {
            write_octal(&mut field_bytes, value);
            assert_eq!(field(&field_bytes), Some(value));
        }
        for value in [-1, i64::from(u32::MAX), -70_000] {
            write_base256(&mut field_bytes, value);
            assert_eq!(field(&field_bytes), Some(value));
        }
    }
}
