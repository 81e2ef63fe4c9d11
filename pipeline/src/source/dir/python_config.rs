//! Configs as the Python tool writes them to a directory: not the image's bytes, but the same document with sorted keys, four
//! spaces a level and nothing but ASCII, under the name that the image's bytes would have.
//!
//! So such a file is not named by its hash although nothing is damaged. What tells the two apart is that writing the document
//! again in that form gives the very same bytes.

use serde_json::Value;

use crate::output::dir::catalog::to_json;

/// Whether the bytes are a document in the Python tool's form.
pub(super) fn is_rewritten(bytes: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return false };
    let text = String::from_utf8(to_json(&value)).expect("JSON is UTF-8");
    escaped(&text).as_bytes() == bytes
}

/// Everything that is not printable ASCII as `\uXXXX`, in pairs beyond the first plane. The line feeds between the values are
/// the only such characters outside of strings, and no string has one.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            ' '..='~' | '\n' => escaped.push(character),
            character => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    escaped.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_writes_is_known_and_nothing_else() {
        // json.dumps(..., indent=4, sort_keys=True), as Python 3.11 prints it.
        let python = "{\n    \"a\": [\n        1.5,\n        \"\\u00fc \\ud83d\\ude00 \\u007f \\t\\\"\"\n    ],\n    \
                      \"b\": {},\n    \"c\": []\n}";
        assert!(is_rewritten(python.as_bytes()));
        for other in [
            "{\"a\":1}",
            "{\n    \"b\": 1,\n    \"a\": 2\n}",
            "{\n  \"a\": 1\n}",
            "{\n    \"a\": \"ü\"\n}",
            "{\n    \"a\": 1\n}\n",
            "no JSON",
        ] {
            assert!(!is_rewritten(other.as_bytes()), "{other}");
        }
    }
}
