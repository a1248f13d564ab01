//! Path and ordered query of a request: built once, used for rules, signature and wire.

use std::fmt::Write;

/// Why a path or query is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TargetError {
    /// The path is not `/`-separated segments of the allowed characters.
    #[error(
        "expected segments of A-Z, a-z, 0-9, '.', '_', '~', '-', each after a single '/' and none of them '.' or '..'; \
         put query parameters into `query`"
    )]
    Path,
    /// The query parameter at this index has no name.
    #[error("expected a name")]
    QueryNameEmpty(usize),
    /// The query parameter at this index contains a control character.
    #[error("expected no control characters")]
    QueryControl(usize),
}

/// A normalized path and decoded query pairs in their order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    path: Box<str>,
    query: Vec<(String, String)>,
}

impl Target {
    /// Checks a path and decoded pairs.
    ///
    /// A path is `/`-separated segments of `[A-Za-z0-9._~-]`: it needs no encoding, so that the same bytes are checked
    /// against the rules, signed and sent.
    pub fn new(path: &str, query: Vec<(String, String)>) -> Result<Self, TargetError> {
        let Some(rest) = path.strip_prefix('/') else {
            return Err(TargetError::Path);
        };
        if !rest.split('/').all(is_segment) {
            return Err(TargetError::Path);
        }
        for (index, (name, value)) in query.iter().enumerate() {
            if name.is_empty() {
                return Err(TargetError::QueryNameEmpty(index));
            }
            if name.chars().chain(value.chars()).any(char::is_control) {
                return Err(TargetError::QueryControl(index));
            }
        }
        Ok(Self {
            path: path.into(),
            query,
        })
    }

    /// The path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The decoded pairs, in order.
    pub(crate) fn query(&self) -> &[(String, String)] {
        &self.query
    }

    /// Path and query for the string-to-sign: the query is *not* percent-encoded.
    ///
    /// Source: KuCoin API documentation, "Authentication".
    pub fn to_sign(&self) -> String {
        self.join(|value, out| out.push_str(value))
    }

    /// Path and query for the wire: the query is percent-encoded (RFC 3986: space `%20`, plus `%2B`).
    pub(crate) fn to_wire(&self) -> String {
        self.join(percent_encode)
    }

    /// The wire form for the audit log, with secret parameter values masked.
    pub(crate) fn masked(&self) -> String {
        let query = self.query.iter().map(|(name, value)| {
            let value = if may_be_secret(name) {
                "***"
            } else {
                value.as_str()
            };
            (name.clone(), value.to_owned())
        });
        // `*` is percent-encoded: %2A%2A%2A in the audit log was masked here, or sent as asterisks.
        Self {
            path: self.path.clone(),
            query: query.collect(),
        }
        .to_wire()
    }

    fn join(&self, add: impl Fn(&str, &mut String)) -> String {
        let mut joined = String::with_capacity(128);
        joined.push_str(&self.path);
        for (index, (name, value)) in self.query.iter().enumerate() {
            joined.push(if index == 0 { '?' } else { '&' });
            add(name, &mut joined);
            joined.push('=');
            add(value, &mut joined);
        }
        joined
    }
}

fn is_segment(segment: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    !matches!(segment, "" | "." | "..") && segment.bytes().all(fits)
}

fn percent_encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

/// Whether the value of this parameter may be a secret. The endpoint that deletes sub-account keys has `passphrase` in its
/// query; the other names are a precaution.
fn may_be_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["pass", "secret", "sign", "token"]
        .iter()
        .any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(query: &[(&str, &str)]) -> Vec<(String, String)> {
        query
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn path_is_accepted_only_in_normal_form() {
        for good in [
            "/api/v1/orders",
            "/a",
            "/a/B_c~d.e-f/...",
            "/api/v1/hf/orders/67fe",
        ] {
            assert!(Target::new(good, Vec::new()).is_ok(), "{good}");
        }
        let bad = [
            "",
            "/",
            "api/v1",
            "//host/x",
            "/a//b",
            "/a/",
            "/a/./b",
            "/a/../b",
            "/..",
            "/a%2fb",
            "/a/%2e%2e/b",
            "/a?b=c",
            "/a#b",
            "/a b",
            "/a\\b",
            "/a;b",
            "/é",
            "/a\r\nX: y",
            "/a\0",
            "http://evil/x",
            "@evil/x",
            "*",
        ];
        for bad in bad {
            assert_eq!(
                Target::new(bad, Vec::new()),
                Err(TargetError::Path),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn query_without_names_or_with_control_characters_is_refused() {
        assert_eq!(
            Target::new("/a", pairs(&[("b", ""), ("", "x")])),
            Err(TargetError::QueryNameEmpty(1))
        );
        for bad in ["\n", "a\rb", "\0", "\u{7f}", "\u{85}"] {
            assert_eq!(
                Target::new("/a", pairs(&[("b", bad)])),
                Err(TargetError::QueryControl(0)),
                "{bad:?}"
            );
            assert_eq!(
                Target::new("/a", pairs(&[(bad, "b")])),
                Err(TargetError::QueryControl(0)),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn values_of_secret_parameters_are_masked() {
        let query = pairs(&[
            ("apiKey", "k"),
            ("passphrase", "fake-pass"),
            ("NewPassword", "x"),
            ("a", "b"),
        ]);
        let masked = Target::new("/a", query).unwrap().masked();
        assert_eq!(
            masked,
            "/a?apiKey=k&passphrase=%2A%2A%2A&NewPassword=%2A%2A%2A&a=b"
        );
    }

    proptest! {
        #[test]
        fn any_query_survives_the_wire(query in proptest::collection::vec(("\\PC{1,8}", "\\PC{0,16}"), 0..6)) {
            let target = Target::new("/api/v1/x", query.clone()).unwrap();
            let wire = target.to_wire();
            prop_assert!(wire.bytes().all(|b| b.is_ascii_graphic()));
            // The independent form parser of the `url` crate checks the result.
            let url = url::Url::parse(&format!("http://host{wire}")).unwrap();
            let parsed: Vec<_> = url.query_pairs().into_owned().collect();
            prop_assert_eq!(parsed, query);
            let as_uri: http::uri::PathAndQuery = wire.parse().unwrap();
            prop_assert_eq!(as_uri.as_str(), wire);
        }
    }
}
