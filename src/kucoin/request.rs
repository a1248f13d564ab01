//! The unsigned request of a bot: every field is checked once.

use std::collections::HashSet;
use std::fmt;
use std::sync::LazyLock;

use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::order_form::ClientOidLocation;
use super::pointer::{self, At, Pointer};
use super::target::{Target, TargetError};
use super::{Catalog, Effect, Endpoint, Method, Scope};
use crate::base::ids::{AccountId, RequestId};

/// The only DELETE endpoint that accepts a body. Source: KuCoin API documentation, futures, "Batch Cancel Orders".
const DELETE_WITH_BODY: (Scope, &str) = (Scope::Futures, "/api/v1/orders/multi-cancel");

/// Size limits of the parts of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RequestLimits {
    /// Bytes of the path.
    pub(crate) path_bytes: usize,
    /// Bytes of all query names and values together, decoded.
    pub(crate) query_bytes: usize,
    /// Number of query parameters.
    pub(crate) query_parameters: usize,
    /// Bytes of the body.
    pub(crate) body_bytes: usize,
}

impl Default for RequestLimits {
    /// About ten times the longest path of the catalogue (80 bytes) and the JSON of a batch of 20 orders (8 KB).
    fn default() -> Self {
        Self {
            path_bytes: 1024,
            query_bytes: 8192,
            query_parameters: 100,
            body_bytes: 128 * 1024,
        }
    }
}

/// The request of a bot, in normal form.
#[derive(Clone)]
pub struct UnsignedRequest {
    /// The account whose key signs.
    pub account: AccountId,
    /// The product family; it decides the key and the host.
    pub scope: Scope,
    /// HTTP method.
    pub method: Method,
    /// Path and query.
    pub target: Target,
    /// Body, sent byte for byte.
    pub body: Bytes,
    /// Id of the call in logs and the audit log.
    pub id: RequestId,
    /// The clientOids in the body, at the location from the catalogue, in order of appearance.
    pub body_client_oids: Vec<String>,
}

impl UnsignedRequest {
    /// The endpoint; `None` if it is not in the catalogue.
    pub(crate) fn endpoint(&self) -> Option<&'static Endpoint> {
        Catalog::get().route(Some(self.scope), self.method, self.target.path())
    }
}

/// Without query and body, since orders do not belong in a log.
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

/// An invalid field.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Malformed {
    /// Name of the field in the proto.
    pub(crate) field: String,
    /// The expected and the actual value.
    pub(crate) problem: String,
}

impl Malformed {
    /// A problem of `field`.
    pub(crate) fn new(field: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self {
            field: field.into(),
            problem: problem.to_string(),
        }
    }
}

/// Checks path and query; if they are invalid, adds to `problems` and returns `None`.
pub(crate) fn target(
    path: &str,
    query: Vec<(String, String)>,
    limits: &RequestLimits,
    problems: &mut Vec<Malformed>,
) -> Option<Target> {
    let before = problems.len();
    let mut within = |field: &str, unit: &str, actual: usize, limit: usize| {
        if actual > limit {
            problems.push(Malformed::new(
                field,
                format_args!("expected at most {limit} {unit}, got {actual}"),
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
    // Only the first one: the status is sent in headers, which have no room for a hundred problems.
    let guard = query.iter().position(|(name, _)| is_client_guard(name));
    if let Some(index) = guard {
        problems.push(Malformed::new(format!("query[{index}].name"), CLIENT_GUARD));
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

/// Location of the clientOid in bodies for which the catalogue has none.
static DEFAULT_CLIENT_OID_POINTER: LazyLock<Pointer> =
    LazyLock::new(|| Pointer::new(None, "/clientOid"));

/// Most characters of a clientOid. Source: KuCoin API documentation, "Add Order".
const MAX_CLIENT_OID_CHARS: usize = 40;

/// Why `client_oid` cannot identify an order: lookups and cancels have it in their path.
///
/// Source: KuCoin API documentation, "Add Order": letters, digits, `_` and `-`, at most 40 characters.
fn client_oid_problem(client_oid: &str) -> Option<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let chars = client_oid.chars().count();
    if (1..=MAX_CLIENT_OID_CHARS).contains(&chars) && client_oid.chars().all(fits) {
        return None;
    }
    let shown: String = client_oid.chars().take(80).collect();
    Some(format!(
        "expected a clientOid of 1 to {MAX_CLIENT_OID_CHARS} letters, digits, '_' or '-', got {shown:?} ({chars} characters); \
         with any other clientOid, it would be impossible to look up or cancel the order"
    ))
}

/// Checks that this method and path allow a body, and that the body is unambiguous JSON.
///
/// Returns the clientOids in it, at the location that the catalogue has for `endpoint`. A duplicate name in an object is
/// refused, because two parsers may read two different orders from it.
pub(crate) fn body(
    endpoint: Option<&Endpoint>,
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
        Method::Get => return refuse(&"expected no body on GET; put parameters into `query`"),
        Method::Delete if scope != Some(DELETE_WITH_BODY.0) || path != DELETE_WITH_BODY.1 => {
            return refuse(&"expected no body on this DELETE; put parameters into `query`");
        }
        Method::Delete | Method::Post => {}
    }
    let location = endpoint.and_then(|endpoint| endpoint.order.as_ref()?.client_oid.as_ref());
    let (pointer, is_new) = match (location, endpoint) {
        (Some(ClientOidLocation::Body(pointer)), Some(endpoint)) => (
            pointer,
            matches!(endpoint.effect, Effect::Place | Effect::Test),
        ),
        _ => (&*DEFAULT_CLIENT_OID_POINTER, false),
    };
    let mut found = ClientOids {
        is_new,
        texts: Vec::new(),
        problem: None,
    };
    let mut json = serde_json::Deserializer::from_slice(body);
    let walked = Walk {
        found: &mut found,
        at: Some(pointer.start()),
        index: None,
    }
    .deserialize(&mut json)
    .and_then(|()| json.end());
    match walked {
        Ok(()) if !matches!(body.trim_ascii_start().first(), Some(b'{' | b'[')) => {
            refuse(&"expected a JSON object or array")
        }
        Ok(()) => match found.problem {
            Some((index, problem)) => {
                refuse(&format_args!("{}: {problem}", pointer.of_item(index)))
            }
            None => Ok(found.texts),
        },
        // A duplicate name, or a field of KuCoin's own guard.
        Err(error) if error.is_data() => refuse(&error),
        Err(error) => refuse(&format_args!("invalid JSON: {error}")),
    }
}

/// The clientOids of a body.
struct ClientOids {
    /// Whether they are of new orders. A cancel may be for an order with any clientOid, placed elsewhere or before this
    /// check existed, and must not fail because of its characters.
    is_new: bool,
    texts: Vec<String>,
    /// The first invalid one: the index of its item, and the problem.
    problem: Option<(Option<usize>, String)>,
}

impl ClientOids {
    fn text(&mut self, index: Option<usize>, text: &str) {
        match client_oid_problem(text).filter(|_| self.is_new) {
            Some(problem) => self.problem(index, problem),
            // Some clients send an empty one together with the order id.
            None if text.is_empty() => {}
            None => self.texts.push(text.to_owned()),
        }
    }

    fn other(&mut self, index: Option<usize>, kind: &str) {
        self.problem(index, format!("expected clientOid as a string, got {kind}"));
    }

    fn problem(&mut self, index: Option<usize>, problem: String) {
        self.problem.get_or_insert((index, problem));
    }
}

const CLIENT_GUARD: &str = "`clientTimestamp` must equal the signed timestamp, which the broker sets when it signs, and `allowMaxTimeWindow` has no effect without it; leave both out and set `not_after_ms`";

/// Whether this is a field of KuCoin's own guard against late orders. The broker does not fill in `clientTimestamp`: it would
/// send, with each attempt, another body than the one that the bot wrote and that is audited.
///
/// Also matches other spellings, since some JSON parsers match names loosely: Go's reads `ſ` (U+017F) as an s.
fn is_client_guard(name: &str) -> bool {
    let letters = || {
        name.chars()
            .filter(|c| !matches!(c, '-' | '_'))
            .flat_map(char::to_uppercase)
    };
    letters().eq("CLIENTTIMESTAMP".chars()) || letters().eq("ALLOWMAXTIMEWINDOW".chars())
}

/// Walks through a JSON document without building it.
struct Walk<'a> {
    found: &'a mut ClientOids,
    /// Position of the current value on the pointer to the clientOids; at its end, the value is a clientOid.
    at: At<'a>,
    /// Index of the current item in a list of orders.
    index: Option<usize>,
}

impl Walk<'_> {
    fn is_client_oid(&self) -> bool {
        self.at.is_some_and(<[_]>::is_empty)
    }

    /// Records a value that is not a string where a clientOid is expected.
    fn other(self, kind: &str) {
        if self.is_client_oid() {
            self.found.other(self.index, kind);
        }
    }
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
            if is_client_guard(&name) {
                return Err(A::Error::custom(CLIENT_GUARD));
            }
            map.next_value_seed(Walk {
                found: &mut *self.found,
                at: pointer::under(self.at, &name),
                index: self.index,
            })?;
            if let Some(name) = names.replace(name) {
                // Cut, because a name may be as long as the body, and the status is sent in headers.
                let name: String = name.chars().take(80).collect();
                return Err(A::Error::custom(format_args!(
                    "duplicate name {name:?} in an object"
                )));
            }
        }
        self.other("an object");
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let at = pointer::each(self.at);
        let mut index = 0;
        while seq
            .next_element_seed(Walk {
                found: &mut *self.found,
                at,
                index: at.map_or(self.index, |_| Some(index)),
            })?
            .is_some()
        {
            index += 1;
        }
        self.other("a list");
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if self.is_client_oid() {
            self.found.text(self.index, text);
        }
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.other("a boolean");
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.other("a number");
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        self.other("a number");
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.other("a number");
        Ok(())
    }

    /// Null counts as absent.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    fn post(text: &str) -> Result<Vec<String>, Malformed> {
        send("spot.post.v1-hf-orders", text)
    }

    fn send(endpoint: &str, text: &str) -> Result<Vec<String>, Malformed> {
        let endpoint = Catalog::get().by_id(endpoint).unwrap();
        body(
            Some(endpoint),
            endpoint.scope,
            endpoint.method,
            &endpoint.path,
            text.as_bytes(),
            &RequestLimits::default(),
        )
    }

    #[test]
    fn fields_of_kucoins_own_guard_are_found_in_any_spelling() {
        let hidden = [
            r#"{"clientTimestamp":1}"#,
            r#"{"client\u0054imestamp":1}"#,
            r#"{"orderList":[{"a":1},{"clientTimestamp":1}]}"#,
            r#"{"ClientTimestamp":1}"#,
            r#"{"client_timestamp":1}"#,
            r#"{"clientTime\u017ftamp":1}"#,
            r#"[[{"x":{"clientTimestamp":null}}]]"#,
            r#"{"allowMaxTimeWindow":1}"#,
            r#"{"orderList":[{"a":1},{"allow_max_time_window":1}]}"#,
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
        assert_eq!(post(r#"{"remark":"allowMaxTimeWindow"}"#), Ok(Vec::new()));
    }

    #[test]
    fn ambiguous_or_invalid_body_is_refused() {
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
                None,
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
    fn client_oids_are_read_at_the_location_from_the_catalogue() {
        let batch = r#"{"orderList":[{"clientOid":"a","x":{"clientOid":"b:c"}},{"side":"buy"},{"clientOid":"c"}],"clientOid":7}"#;
        let list = r#"[{"clientOid":"a"},{"clientOid":"b"}]"#;
        let named = r#"{"orderIdsList":["1"],"clientOidsList":[{"symbol":"X","clientOid":"a"}]}"#;
        for (endpoint, text, expected) in [
            (
                "spot.post.v1-hf-orders",
                r#"{"x":{"clientOid":7},"clientOid":"a"}"#,
                &["a"][..],
            ),
            ("spot.post.v1-hf-orders", r#"{"clientOid":null}"#, &[]),
            ("spot.post.v1-hf-orders", "[]", &[]),
            ("spot.post.v1-hf-orders-multi", batch, &["a", "c"]),
            (
                "spot.post.ua-v1-account-mode-order-place-batch",
                batch,
                &["a", "c"],
            ),
            ("futures.post.v1-orders-multi", list, &["a", "b"]),
            ("futures.delete.v1-orders-multi-cancel", named, &["a"]),
            (
                "spot.post.v1-convert-order",
                r#"{"clientOrderId":"a","clientOid":":"}"#,
                &["a"],
            ),
            ("futures.post.v2-order", r#"{"clientOid":"a"}"#, &["a"]),
            (
                "spot.post.v1-hf-orders-test",
                r#"{"clientOid":"a"}"#,
                &["a"],
            ),
            (
                "spot.post.ua-v2-unified-order-cancel",
                r#"{"orderId":"1","clientOid":""}"#,
                &[],
            ),
            // Transfers: they are not looked up by clientOid, and KuCoin checks its characters.
            (
                "spot.post.v3-accounts-universal-transfer",
                r#"{"clientOid":"a:b"}"#,
                &["a:b"],
            ),
        ] {
            assert_eq!(send(endpoint, text).unwrap(), expected, "{endpoint} {text}");
        }
    }

    #[test]
    fn error_for_an_invalid_client_oid_names_it_and_its_location() {
        let problem = |endpoint, text: &str| send(endpoint, text).unwrap_err().problem;
        let long = "x".repeat(41);
        for (oid, got) in [
            ("run7:42", "got \"run7:42\" (7 characters)"),
            ("run7.42", "got \"run7.42\""),
            ("", "got \"\" (0 characters)"),
            (&long, "(41 characters)"),
        ] {
            let text = format!(r#"{{"clientOid":"{oid}"}}"#);
            let problem = problem("spot.post.v1-hf-orders", &text);
            assert!(
                problem.starts_with(
                    "/clientOid: expected a clientOid of 1 to 40 letters, digits, '_' or '-', "
                ),
                "{problem}"
            );
            assert!(problem.contains(got), "{problem}");
        }
        assert!(post(&format!(r#"{{"clientOid":"{}"}}"#, "x".repeat(40))).is_ok());
        for (value, kind) in [
            ("7", "a number"),
            ("7.5", "a number"),
            ("-7", "a number"),
            ("true", "a boolean"),
            ("{}", "an object"),
            ("[\"a\"]", "a list"),
        ] {
            let problem = problem(
                "spot.post.v1-hf-orders",
                &format!(r#"{{"clientOid":{value}}}"#),
            );
            assert_eq!(
                problem,
                format!("/clientOid: expected clientOid as a string, got {kind}")
            );
        }
        let batch = r#"{"orderList":[{"clientOid":"a"},{"clientOid":"b c"},{"clientOid":"d e"}]}"#;
        assert!(
            problem("spot.post.v1-hf-orders-multi", batch)
                .starts_with("/orderList/1/clientOid: expected")
        );
        let transfer = problem(
            "spot.post.v3-accounts-universal-transfer",
            r#"{"clientOid":7}"#,
        );
        assert_eq!(
            transfer,
            "/clientOid: expected clientOid as a string, got a number"
        );
    }

    #[test]
    fn only_new_orders_need_a_client_oid_that_fits_into_a_path() {
        let bad = "run7:42";
        let mut new_orders = 0;
        for endpoint in Catalog::get().endpoints() {
            let order = endpoint.order.as_ref();
            let Some(ClientOidLocation::Body(pointer)) =
                order.and_then(|order| order.client_oid.as_ref())
            else {
                continue;
            };
            let text = pointer.of_item(Some(0));
            let steps: Vec<_> = text.split('/').skip(1).collect();
            let json = steps
                .iter()
                .rev()
                .fold(format!("\"{bad}\""), |inner, step| {
                    if *step == "0" {
                        format!("[{inner}]")
                    } else {
                        format!("{{\"{step}\":{inner}}}")
                    }
                });
            let sent = send(&endpoint.id, &json);
            if matches!(endpoint.effect, Effect::Place | Effect::Test) {
                new_orders += 1;
                let problem = sent.unwrap_err().problem;
                assert!(problem.contains(bad), "{}: {problem}", endpoint.id);
            } else {
                assert_eq!(sent.unwrap(), [bad], "{}", endpoint.id);
            }
        }
        assert!(new_orders > 20, "{new_orders}");
    }

    #[test]
    fn body_is_allowed_on_post_and_on_one_delete() {
        let limits = RequestLimits::default();
        let is_allowed =
            |scope, method, path| body(None, Some(scope), method, path, b"{}", &limits).is_ok();
        assert!(is_allowed(
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders/multi-cancel"
        ));
        assert!(!is_allowed(
            Scope::SpotMargin,
            Method::Delete,
            "/api/v1/orders/multi-cancel"
        ));
        assert!(!is_allowed(
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders"
        ));
        assert!(!is_allowed(Scope::Futures, Method::Get, "/api/v1/orders"));
    }

    #[test]
    fn parts_that_are_too_long_are_reported_together() {
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
