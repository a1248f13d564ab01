//! The unsigned request of a bot: checked field by field once, then taken as it is.

use std::collections::HashSet;
use std::fmt;

use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::target::{Target, TargetError};
use super::{Method, Scope};
use crate::ids::{AccountId, RequestId};

/// The one endpoint that takes a body on DELETE. Source: KuCoin API documentation, futures, "Batch Cancel Orders".
const DELETE_WITH_BODY: (Scope, &str) = (Scope::Futures, "/api/v1/orders/multi-cancel");

/// How large the parts of a request may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RequestLimits {
    /// Bytes of the path.
    pub path_bytes: usize,
    /// Bytes of all query names and values together, decoded.
    pub query_bytes: usize,
    /// Query parameters.
    pub query_parameters: usize,
    /// Bytes of the body.
    pub body_bytes: usize,
}

impl Default for RequestLimits {
    /// The longest path of the catalogue has 80 bytes; a batch of 20 orders has 8 KB of JSON. Ten times that each.
    fn default() -> Self {
        Self {
            path_bytes: 1024,
            query_bytes: 8192,
            query_parameters: 100,
            body_bytes: 128 * 1024,
        }
    }
}

/// A request as the bot means it, in normal form.
#[derive(Clone)]
pub struct UnsignedRequest {
    /// Whose key shall sign.
    pub account: AccountId,
    /// Which product family, and so which key and host.
    pub scope: Scope,
    /// HTTP method.
    pub method: Method,
    /// Path and query.
    pub target: Target,
    /// Body, sent byte for byte.
    pub body: Bytes,
    /// Name of the call in logs and in the audit file.
    pub id: RequestId,
    /// Every `clientOid` in the body, in order of appearance.
    pub body_client_oids: Vec<String>,
}

/// Without query and body: what a bot sends is nobody's to read in a log.
impl fmt::Debug for UnsignedRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            account,
            scope,
            method,
            target,
            id,
            ..
        } = self;
        write!(
            f,
            "UnsignedRequest({id}: {account} {scope} {method} {})",
            target.path()
        )
    }
}

/// A field that is not as it must be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Malformed {
    /// Name of the field in the proto.
    pub field: String,
    /// What was expected and what came.
    pub problem: String,
}

impl Malformed {
    /// A problem of `field`.
    pub fn new(field: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self {
            field: field.into(),
            problem: problem.to_string(),
        }
    }
}

/// Checks path and query; adds to `problems` and returns `None` where they are not as they must be.
pub fn target(
    path: &str,
    query: Vec<(String, String)>,
    limits: &RequestLimits,
    problems: &mut Vec<Malformed>,
) -> Option<Target> {
    let before = problems.len();
    let mut within = |field: &str, unit: &str, came: usize, limit: usize| {
        if came > limit {
            problems.push(Malformed::new(
                field,
                format_args!("expected at most {limit} {unit}, got {came}"),
            ));
        }
    };
    within("path", "bytes", path.len(), limits.path_bytes);
    within("query", "parameters", query.len(), limits.query_parameters);
    within(
        "query",
        "bytes",
        query
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum(),
        limits.query_bytes,
    );
    // The first will do: a status goes out in headers, and a hundred problems do not fit into them.
    let client_timestamp = query.iter().position(|(name, _)| is_client_timestamp(name));
    if let Some(index) = client_timestamp {
        problems.push(Malformed::new(
            format!("query[{index}].name"),
            CLIENT_TIMESTAMP,
        ));
    }
    if problems.len() > before {
        return None;
    }
    match Target::new(path, query) {
        Ok(target) => Some(target),
        Err(error) => {
            let field = match error {
                TargetError::Path => "path".to_owned(),
                TargetError::QueryControl(index) => format!("query[{index}]"),
                TargetError::QueryNameEmpty(index) => format!("query[{index}].name"),
            };
            problems.push(Malformed::new(field, error));
            None
        }
    }
}

/// Checks that a body may stand on this method and path, and is JSON that means one thing.
///
/// Returns every `clientOid` in it. A name that stands twice in one object is refused, because two readers may see two
/// different orders in it.
pub fn body(
    scope: Option<Scope>,
    method: Method,
    path: &str,
    body: &[u8],
    limits: &RequestLimits,
) -> Result<Vec<String>, Malformed> {
    let refuse = |problem: &dyn fmt::Display| Err(Malformed::new("body", problem));
    if body.is_empty() {
        return Ok(Vec::new());
    }
    if body.len() > limits.body_bytes {
        return refuse(&format_args!(
            "expected at most {} bytes, got {}",
            limits.body_bytes,
            body.len()
        ));
    }
    match method {
        Method::Get => return refuse(&"expected none on GET; parameters go into `query`"),
        Method::Delete if scope != Some(DELETE_WITH_BODY.0) || path != DELETE_WITH_BODY.1 => {
            return refuse(&"expected none on this DELETE; parameters go into `query`");
        }
        Method::Delete | Method::Post => {}
    }
    let mut client_oids = Vec::new();
    let mut json = serde_json::Deserializer::from_slice(body);
    let walked = Walk {
        client_oids: &mut client_oids,
        collect: false,
    }
    .deserialize(&mut json)
    .and_then(|()| json.end());
    match walked {
        Ok(()) if matches!(body.trim_ascii_start().first(), Some(b'{' | b'[')) => Ok(client_oids),
        Ok(()) => refuse(&"expected a JSON object or array"),
        Err(error) => refuse(&format_args!(
            "expected JSON without repeated names and `clientTimestamp`: {error}"
        )),
    }
}

const CLIENT_TIMESTAMP: &str = "`clientTimestamp` must equal the signed timestamp, which the broker chooses last; leave it out";

/// Also other spellings, since some JSON readers match names loosely; Go's, for one, takes `ſ` (U+017F) for an s.
fn is_client_timestamp(name: &str) -> bool {
    let letters = name
        .chars()
        .filter(|c| !matches!(c, '-' | '_'))
        .flat_map(char::to_uppercase);
    letters.eq("CLIENTTIMESTAMP".chars())
}

/// Walks a JSON document without building it.
struct Walk<'a> {
    client_oids: &'a mut Vec<String>,
    /// Whether the value at hand is that of a `clientOid`.
    collect: bool,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if is_client_timestamp(&name) {
                return Err(A::Error::custom(CLIENT_TIMESTAMP));
            }
            map.next_value_seed(Walk {
                client_oids: self.client_oids,
                collect: name == "clientOid",
            })?;
            if let Some(name) = names.replace(name) {
                // Cut, because a name may be as long as the body and a status goes out in headers.
                let name: String = name.chars().take(80).collect();
                return Err(A::Error::custom(format_args!(
                    "the name {name:?} stands twice in one object"
                )));
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq
            .next_element_seed(Walk {
                client_oids: self.client_oids,
                collect: false,
            })?
            .is_some()
        {}
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if self.collect {
            self.client_oids.push(text.to_owned());
        }
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(text: &str) -> Result<Vec<String>, Malformed> {
        body(
            Some(Scope::SpotMargin),
            Method::Post,
            "/api/v1/hf/orders",
            text.as_bytes(),
            &RequestLimits::default(),
        )
    }

    #[test]
    fn a_client_timestamp_is_found_however_it_is_written() {
        let hidden = [
            r#"{"clientTimestamp":1}"#,
            r#"{"client\u0054imestamp":1}"#,
            r#"{"orderList":[{"a":1},{"clientTimestamp":1}]}"#,
            r#"{"ClientTimestamp":1}"#,
            r#"{"client_timestamp":1}"#,
            r#"{"clientTime\u017ftamp":1}"#,
            r#"[[{"x":{"clientTimestamp":null}}]]"#,
        ];
        for text in hidden {
            assert!(
                post(text)
                    .unwrap_err()
                    .problem
                    .contains("clientTimestamp` must equal"),
                "{text}"
            );
        }
        assert_eq!(post(r#"{"remark":"clientTimestamp"}"#), Ok(Vec::new()));
    }

    #[test]
    fn a_body_means_one_thing_or_is_refused() {
        let deep = "[".repeat(1000);
        let bad = [
            "{",
            "{}{}",
            r#"{"a":1,"a":2}"#,
            r#"{"a":{"b":1,"\u0062":2}}"#,
            "1",
            "\"x\"",
            "a=b",
            "\u{feff}{}",
            &deep,
        ];
        for text in bad {
            assert!(post(text).is_err(), "{text:.40}");
        }
        assert!(
            body(
                Some(Scope::SpotMargin),
                Method::Post,
                "/a",
                b"{\"a\":\"\xff\"}",
                &RequestLimits::default()
            )
            .is_err()
        );
    }

    #[test]
    fn client_oids_are_collected_in_order() {
        let oids = post(
            r#"{"orderList":[{"clientOid":"a","x":{"clientOid":"b"}},{"clientOid":"c"}],"clientOid":7}"#,
        );
        assert_eq!(
            oids,
            Ok(vec!["a".to_owned(), "b".to_owned(), "c".to_owned()])
        );
    }

    #[test]
    fn a_body_stands_on_post_and_on_one_delete() {
        let limits = RequestLimits::default();
        let on = |scope, method, path| body(Some(scope), method, path, b"{}", &limits).is_ok();
        assert!(on(
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders/multi-cancel"
        ));
        assert!(!on(
            Scope::SpotMargin,
            Method::Delete,
            "/api/v1/orders/multi-cancel"
        ));
        assert!(!on(Scope::Futures, Method::Delete, "/api/v1/orders"));
        assert!(!on(Scope::Futures, Method::Get, "/api/v1/orders"));
    }

    #[test]
    fn over_long_parts_are_named() {
        let mut problems = Vec::new();
        let long = "x".repeat(9000);
        let query = vec![("a".to_owned(), long.clone()); 101];
        assert!(
            target(
                &format!("/{long}"),
                query,
                &RequestLimits::default(),
                &mut problems
            )
            .is_none()
        );
        let fields: Vec<_> = problems.iter().map(|p| p.field.as_str()).collect();
        assert_eq!(fields, ["path", "query", "query"]);
        assert_eq!(problems[0].problem, "expected at most 1024 bytes, got 9001");
    }
}
