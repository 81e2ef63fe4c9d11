//! The names of members, as bytes: tars hold names in any encoding.

/// What a path means below the root of the layer: no leading `./` or `/`, no empty, `.` or `..` component, no trailing `/`.
/// A `..` that would leave the root stays at the root. The root itself is the empty path.
pub fn clean(path: &[u8], cleaned: &mut Vec<u8>) {
    cleaned.clear();
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                let end = cleaned.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                cleaned.truncate(end);
            }
            name => {
                if !cleaned.is_empty() {
                    cleaned.push(b'/');
                }
                cleaned.extend_from_slice(name);
            }
        }
    }
}

/// [`clean`] into a new vector.
pub fn cleaned(path: &[u8]) -> Vec<u8> {
    let mut cleaned = Vec::with_capacity(path.len());
    clean(path, &mut cleaned);
    cleaned
}

/// The last component of a cleaned path.
pub fn basename(cleaned: &[u8]) -> &[u8] {
    match cleaned.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => &cleaned[slash + 1..],
        None => cleaned,
    }
}

/// The parent of a cleaned path; a path without one is directly below the root.
pub fn parent(cleaned: &[u8]) -> Option<&[u8]> {
    cleaned.iter().rposition(|&byte| byte == b'/').map(|slash| &cleaned[..slash])
}

/// Whether a cleaned path is a whiteout (image-spec, `layer.md`): it says what the layer removes.
pub fn is_whiteout(cleaned: &[u8]) -> bool {
    basename(cleaned).starts_with(b".wh.")
}

/// For people: valid UTF-8 as it is, control characters and other bytes as escapes, so that a name can neither break a
/// line nor command a terminal.
pub fn printable(path: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleaned_paths_lie_below_the_root() {
        for (path, expected) in [
            ("usr/bin/env", "usr/bin/env"),
            ("./usr//bin/./env", "usr/bin/env"),
            ("/etc/", "etc"),
            ("a/../b", "b"),
            ("a/b/../c", "a/c"),
            ("../../evil", "evil"),
            ("./", ""),
            ("", ""),
            ("..", ""),
        ] {
            assert_eq!(cleaned(path.as_bytes()), expected.as_bytes(), "{path}");
        }
    }

    #[test]
    fn names_cannot_break_lines() {
        assert_eq!(printable(b"a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
        assert_eq!(printable("größe".as_bytes()), "größe");
        assert_eq!(printable(b"a\xffb"), "a\\xffb");
    }

    #[test]
    fn whiteouts_are_known_by_their_basename() {
        assert!(is_whiteout(b"etc/.wh.passwd"));
        assert!(is_whiteout(b".wh..wh..opq"));
        assert!(!is_whiteout(b"etc/.wh.d/passwd"));
    }
}
