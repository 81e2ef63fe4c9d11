//! The tokenizer of `WWW-Authenticate` (RFC 9110, 11.6.1).
//!
//! A tokenizer and not a pattern: schemes and parameter names come in any case and order, values may hold quoted commas or
//! nothing, and one header may carry several challenges. It is lenient where real registries are: URLs without quotes pass.

/// One way in which a server is ready to know who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

/// More challenges, or parameters of one, than this are not kept: no server has a use for them.
const MAX: usize = 32;

impl Challenge {
    /// The scheme, in lower case: `bearer`, `basic`.
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// The value of a parameter, whose name is given in lower case. The first one counts.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// All challenges of one header's value, in order. What cannot be understood is left out.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut rest = Cursor(header);
    let mut challenges: Vec<Challenge> = Vec::new();
    // A word that follows a scheme without a comma is its token68; one that follows a comma is another scheme.
    let mut after_scheme = false;
    loop {
        rest.skip(|c| c.is_ascii_whitespace());
        if rest.take(',') {
            after_scheme = false;
            continue;
        }
        let name = rest.word();
        if name.is_empty() {
            if !rest.advance() {
                return challenges;
            }
            continue;
        }
        rest.skip(|c| c.is_ascii_whitespace());
        if rest.take('=') {
            rest.skip(|c| c.is_ascii_whitespace());
            let value = rest.value();
            if let Some(challenge) = challenges.last_mut()
                && challenge.parameters.len() < MAX
            {
                challenge.parameters.push((name.to_ascii_lowercase(), value));
            }
            after_scheme = false;
        } else if after_scheme {
            after_scheme = false;
        } else if challenges.len() < MAX {
            challenges.push(Challenge { scheme: name.to_ascii_lowercase(), parameters: Vec::new() });
            after_scheme = true;
        } else {
            return challenges;
        }
    }
}

struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn skip(&mut self, unwanted: impl Fn(char) -> bool) {
        self.0 = self.0.trim_start_matches(unwanted);
    }

    fn take(&mut self, wanted: char) -> bool {
        match self.0.strip_prefix(wanted) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    /// Past one character of any kind. False at the end.
    fn advance(&mut self) -> bool {
        let mut chars = self.0.chars();
        let moved = chars.next().is_some();
        self.0 = chars.as_str();
        moved
    }

    fn until(&mut self, end: impl Fn(char) -> bool) -> &'a str {
        let (word, rest) = self.0.split_at(self.0.find(end).unwrap_or(self.0.len()));
        self.0 = rest;
        word
    }

    /// A token, or the start of a token68, whose further characters mean nothing to us.
    fn word(&mut self) -> &'a str {
        self.until(|c| c.is_ascii_whitespace() || matches!(c, ',' | '=' | '"'))
    }

    fn value(&mut self) -> String {
        if !self.take('"') {
            return self.until(|c| c.is_ascii_whitespace() || c == ',').to_owned();
        }
        let mut value = String::new();
        let mut chars = self.0.chars();
        while let Some(c) = chars.next() {
            match c {
                '"' => break,
                '\\' => value.extend(chars.next()),
                c => value.push(c),
            }
        }
        self.0 = chars.as_str();
        value
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parameters_come_in_any_case_and_order() {
        let all = parse(
            r#"BEARER Scope="repository:a/b:pull,push",SERVICE="s" , realm="https://auth.example/token""#,
        );
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].scheme(), "bearer");
        assert_eq!(all[0].parameter("realm"), Some("https://auth.example/token"));
        assert_eq!(all[0].parameter("service"), Some("s"));
        assert_eq!(all[0].parameter("scope"), Some("repository:a/b:pull,push"));
        assert_eq!(all[0].parameter("error"), None);
    }

    #[test]
    fn one_header_carries_several_challenges() {
        let all = parse(r#"Negotiate dG9rZW4=, Basic realm="a, b", Bearer realm=https://x/token,service="""#);
        let schemes: Vec<_> = all.iter().map(Challenge::scheme).collect();
        assert_eq!(schemes, ["negotiate", "basic", "bearer"]);
        assert_eq!(all[1].parameter("realm"), Some("a, b"));
        assert_eq!(all[2].parameter("realm"), Some("https://x/token"));
        assert_eq!(all[2].parameter("service"), Some(""));
    }

    #[test]
    fn quoted_pairs_and_empty_values_are_understood() {
        let all = parse(r#"Bearer realm="a\"b\\c",service=,scope="",error="x""#);
        assert_eq!(all[0].parameter("realm"), Some(r#"a"b\c"#));
        assert_eq!(all[0].parameter("service"), Some(""));
        assert_eq!(all[0].parameter("scope"), Some(""));
        assert_eq!(all[0].parameter("error"), Some("x"));
    }

    #[test]
    fn a_scheme_may_stand_alone() {
        assert_eq!(parse("Basic").len(), 1);
        assert_eq!(parse("Negotiate, NTLM").len(), 2);
        assert_eq!(parse(""), []);
        assert_eq!(parse(r#" , ,"#), []);
        assert_eq!(parse(r#"realm="orphan""#), []);
    }

    #[test]
    fn a_value_without_its_closing_quote_ends_with_the_header() {
        assert_eq!(parse(r#"Bearer realm="https://x"#)[0].parameter("realm"), Some("https://x"));
    }

    proptest! {
        #[test]
        fn any_header_is_read_to_its_end(header in "\\PC{0,200}") {
            prop_assert!(parse(&header).len() <= MAX);
        }

        #[test]
        fn values_survive_quoting(value in "[ -~]{0,40}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let all = parse(&format!("Bearer realm=\"{quoted}\", service=x"));
            prop_assert_eq!(all[0].parameter("realm"), Some(value.as_str()));
            prop_assert_eq!(all[0].parameter("service"), Some("x"));
        }
    }
}
