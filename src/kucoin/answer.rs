//! Interprets an answer of the exchange: envelope, outcome, rate limit.
//!
//! Source: KuCoin API documentation, "Error Code" and "Rate Limit". Only a known refusal code, or an HTTP 4xx
//! status, shows that the exchange executed nothing; everything else leaves the outcome open.

use std::fmt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::code::{self, Class, RefusalCodes};
use super::{BatchItem, Endpoint, Scope};
use crate::base::outcome::Outcome;

/// The longest wait that a bot gets. Source: none of KuCoin's limits lasts longer than its window of 30 s; an hour leaves
/// room for maintenance that is announced with `retry-after`.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// How long the edge blocks an address after too many requests. Source: KuCoin API documentation, code 1015.
const EDGE_BLOCK: Duration = Duration::from_secs(30);

/// How long the futures host rejects requests after code 200002. Source: KuCoin API documentation, futures error codes.
const FUTURES_BLOCK: Duration = Duration::from_secs(10);

/// A complete answer of the exchange.
#[derive(Clone)]
pub(crate) struct Answer {
    /// HTTP status.
    pub(crate) http_status: StatusCode,
    /// Body, byte for byte.
    pub(crate) body: Bytes,
    /// Content-Type; empty if the answer has none.
    pub(crate) content_type: String,
    /// Content-Encoding of a body that could not be decoded; otherwise empty.
    pub(crate) content_encoding: String,
    /// `code` of the envelope; empty if there is none.
    pub(crate) code: String,
    /// What the code means for this host and product.
    pub(crate) class: Class,
    /// `msg` of the envelope; empty if there is none.
    pub(crate) msg: String,
    /// Whether the request was executed.
    pub(crate) outcome: Outcome,
    /// The outcome of each order of a batch, in the order of the request; empty for any other request, and if the exchange
    /// has not accepted the batch, so that `outcome` holds for each order.
    pub(crate) items: Vec<BatchItem>,
    /// Whether the outcome is open only because the code is in no table: as a refusal code it would settle the outcome.
    pub(crate) is_of_unknown_code: bool,
    /// Quota of the pool, if the gateway returned it.
    pub(crate) rate_limit: Option<RateLimit>,
    /// How long to wait, if the exchange requires it.
    pub(crate) retry_after: Option<Duration>,
}

/// Without the body, since balances do not belong in a log.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            http_status,
            code,
            outcome,
            ..
        } = self;
        write!(f, "Answer({http_status}, code {code:?}, {outcome})")
    }
}

/// A weighted quota.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct RateLimit {
    /// Weight per window.
    pub(crate) limit: u64,
    /// Weight left in it.
    pub(crate) remaining: u64,
    /// Time until the window ends.
    pub(crate) reset: Duration,
}

/// The parts of a request that its answer's meaning depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestContext<'a> {
    /// The endpoint; `None` if it is not in the catalogue.
    pub(crate) endpoint: Option<&'a Endpoint>,
    /// The scope of the request.
    pub(crate) scope: Scope,
    /// Whether the request could change anything.
    pub(crate) changes: bool,
    /// Further refusal codes from the configuration.
    pub(crate) refusal_codes: &'a RefusalCodes,
}

/// The fields of KuCoin's envelope that every answer may have.
#[derive(Debug, Default, Deserialize)]
struct Envelope {
    #[serde(default, deserialize_with = "code_text")]
    code: String,
    #[serde(default, deserialize_with = "message")]
    msg: String,
    /// Accompanies `code` in some answers.
    #[serde(default, deserialize_with = "flag")]
    success: Option<bool>,
}

/// A body, and whether its envelope can be read.
enum Content {
    /// A JSON object.
    Envelope(Envelope),
    /// An object that cannot be read, or a body that is still encoded: its code is unknown.
    Unreadable,
    /// HTML, text, another kind of JSON, or nothing: it has no code.
    Bare,
}

impl Content {
    fn read(body: &[u8], is_encoded: bool) -> Self {
        match body.trim_ascii_start().first() {
            Some(_) if is_encoded => Self::Unreadable,
            // The first byte decides, since serde would read `["200000"]` as an envelope too.
            Some(b'{') => serde_json::from_slice(body).map_or(Self::Unreadable, Self::Envelope),
            _ => Self::Bare,
        }
    }
}

/// A string, or an integer as a string: some gateways write `"code":404`. Anything else is not a code.
fn code_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match scalar(<&RawValue>::deserialize(deserializer)?)? {
        Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Number(number)) if !number.is_f64() => Ok(number.to_string()),
        _ => Err(D::Error::custom("expected a string or an integer")),
    }
}

/// A string unchanged, any other value as JSON, so that it does not count as "no message".
fn message<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let raw = <&RawValue>::deserialize(deserializer)?;
    Ok(match scalar(raw)? {
        Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        _ => raw.get().to_owned(),
    })
}

/// A value that is no array or object: parsed, these would need many times the memory of their text.
fn scalar<E: Error>(raw: &RawValue) -> Result<Option<Value>, E> {
    if raw.get().starts_with(['[', '{']) {
        return Ok(None);
    }
    serde_json::from_str(raw.get()).map(Some).map_err(E::custom)
}

/// True or false; null is neither, and any other value counts as false.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    struct Flag;

    impl<'de> Visitor<'de> for Flag {
        type Value = Option<bool>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a boolean")
        }

        fn visit_bool<E>(self, is_true: bool) -> Result<Self::Value, E> {
            Ok(Some(is_true))
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
            Ok(Some(false))
        }

        fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
            Ok(Some(false))
        }

        fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
            Ok(Some(false))
        }

        fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
            Ok(Some(false))
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            Ok(Some(false))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            Ok(Some(false))
        }
    }

    deserializer.deserialize_any(Flag)
}

impl Answer {
    /// Stands for an answer that never came.
    pub(crate) fn missing() -> Self {
        Self {
            http_status: StatusCode::default(),
            body: Bytes::new(),
            content_type: String::new(),
            content_encoding: String::new(),
            code: String::new(),
            class: Class::Missing,
            msg: String::new(),
            outcome: Outcome::MaybeSent,
            items: Vec::new(),
            is_of_unknown_code: false,
            rate_limit: None,
            retry_after: None,
        }
    }

    /// Reads an answer to the request `asked`; `now` replaces the answer's date if it has none.
    ///
    /// A body that is still encoded (`content-encoding`) is not read, and neither is a JSON object with an invalid `code`: its
    /// code may be one that leaves the outcome open, so of all statuses only 401, 403, 404 and 429 settle the outcome.
    pub(crate) fn read(
        http_status: StatusCode,
        headers: &HeaderMap,
        body: Bytes,
        asked: RequestContext<'_>,
        now: impl FnOnce() -> SystemTime,
    ) -> Self {
        let text_of = |name| header_text(headers, &name).unwrap_or_default().to_owned();
        let content_encoding = text_of(header::CONTENT_ENCODING);
        let content = Content::read(&body, !content_encoding.is_empty());
        let (outcome, class, is_of_unknown_code) = match &content {
            Content::Envelope(envelope) => judge(http_status, envelope, asked),
            Content::Unreadable => (judge_unreadable(http_status), Class::Missing, false),
            Content::Bare => (judge_bare(http_status), Class::Missing, false),
        };
        // A failed read changed nothing.
        let outcome = if outcome == Outcome::MaybeSent && !asked.changes {
            Outcome::Rejected
        } else {
            outcome
        };
        let Envelope { code, msg, .. } = match content {
            Content::Envelope(envelope) => envelope,
            Content::Unreadable | Content::Bare => Envelope::default(),
        };
        let rate_limit = rate_limit(headers);
        let retry_after = retry_after(http_status, headers, &code, asked.scope, rate_limit, now);
        Self {
            http_status,
            body,
            content_type: text_of(header::CONTENT_TYPE),
            content_encoding,
            code,
            class,
            msg,
            outcome,
            items: Vec::new(),
            is_of_unknown_code: is_of_unknown_code && asked.changes,
            rate_limit,
            retry_after,
        }
    }
}

/// The outcome, the class of the code, and whether the outcome is open only because the code is in no table.
fn judge(
    http_status: StatusCode,
    envelope: &Envelope,
    asked: RequestContext<'_>,
) -> (Outcome, Class, bool) {
    let Envelope { code, msg, success } = envelope;
    let (product, success_codes) = asked.endpoint.map_or((None, &[][..]), |endpoint| {
        (Some(endpoint.product), &endpoint.success_codes[..])
    });
    let host = asked.scope.host();
    let class = code::class(host, product, code, success_codes, asked.refusal_codes);
    // "Position does not exist" has been seen with 200000: a message contradicts this code.
    let is_plain = msg.is_empty() || msg.eq_ignore_ascii_case("success");
    let outcome_of = |class| match class {
        Class::Success if http_status.is_success() && is_plain && success.unwrap_or(true) => {
            Outcome::Accepted
        }
        Class::Success | Class::Unclear => Outcome::MaybeSent,
        // HTTP 2xx and `success` with any other code: the answer contradicts itself.
        _ if *success == Some(true) && http_status.is_success() => Outcome::MaybeSent,
        Class::Refusal if http_status.is_success() => Outcome::Rejected,
        Class::Missing | Class::Refusal | Class::Unknown => judge_bare(http_status),
    };
    let outcome = outcome_of(class);
    let would_settle = || outcome_of(Class::Refusal) == Outcome::Rejected;
    let is_of_unknown_code =
        class == Class::Unknown && outcome == Outcome::MaybeSent && would_settle();
    (outcome, class, is_of_unknown_code)
}

/// If the code cannot be read, only the statuses with which a gateway rejects a request show that nothing was executed.
fn judge_unreadable(http_status: StatusCode) -> Outcome {
    match http_status {
        StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::TOO_MANY_REQUESTS => Outcome::Rejected,
        _ => Outcome::MaybeSent,
    }
}

/// If the code does not decide, an HTTP 4xx other than 408 shows that nothing was executed.
fn judge_bare(http_status: StatusCode) -> Outcome {
    if http_status.is_client_error() && http_status != StatusCode::REQUEST_TIMEOUT {
        Outcome::Rejected
    } else {
        Outcome::MaybeSent
    }
}

impl Answer {
    /// Whether the gateway rejected the request for its rate limit, with a body that cannot be read.
    pub(crate) fn is_unreadable_429(&self) -> bool {
        self.code.is_empty()
            && self.http_status == StatusCode::TOO_MANY_REQUESTS
            && self.rate_limit.is_some()
    }

    /// How long the edge of the exchange blocks the egress address: code 1015, or an answer that is not from the gateway. Source:
    /// KuCoin API documentation, code 1015; reports of its page with status 429 or 403 (mikekonan/exchange-proxy issue 14). Other
    /// pages with 403 can be about one request, and must not stop all others.
    pub(crate) fn edge_block(&self) -> Option<Duration> {
        let names_code = || {
            let code = code::EDGE_BLOCKED.as_bytes();
            self.body.windows(code.len()).any(|part| part == code)
        };
        let is_page = self.code.is_empty()
            && match self.http_status {
                // The gateway's answers have the headers.
                StatusCode::TOO_MANY_REQUESTS => self.rate_limit.is_none(),
                StatusCode::FORBIDDEN => self.content_type.starts_with("text/html") && names_code(),
                _ => false,
            };
        (is_page || self.code == code::EDGE_BLOCKED).then(|| self.retry_after.unwrap_or(EDGE_BLOCK))
    }
}

fn rate_limit(headers: &HeaderMap) -> Option<RateLimit> {
    let number = |name| {
        header_text(headers, &header::HeaderName::from_static(name))?
            .parse::<u64>()
            .ok()
    };
    Some(RateLimit {
        limit: number("gw-ratelimit-limit")?,
        remaining: number("gw-ratelimit-remaining")?,
        reset: Duration::from_millis(number("gw-ratelimit-reset")?).min(MAX_RETRY_AFTER),
    })
}

fn retry_after(
    http_status: StatusCode,
    headers: &HeaderMap,
    code: &str,
    scope: Scope,
    rate_limit: Option<RateLimit>,
    now: impl FnOnce() -> SystemTime,
) -> Option<Duration> {
    let requested = header_text(headers, &header::RETRY_AFTER)
        .and_then(|text| parse_retry_after(text, headers, now))
        .map(|wait| wait.min(MAX_RETRY_AFTER));
    requested.or(match code {
        code::RATE_LIMITED => rate_limit.map(|limit| limit.reset),
        code::EDGE_BLOCKED => Some(EDGE_BLOCK),
        code::FUTURES_RATE_LIMITED if scope == Scope::Futures => Some(FUTURES_BLOCK),
        "" if http_status == StatusCode::TOO_MANY_REQUESTS => Some(EDGE_BLOCK),
        _ => None,
    })
}

/// `retry-after` in either of its forms: seconds, or a date (RFC 9110, 10.2.3). A date is compared with the answer's own
/// date, since both come from the exchange's clock.
fn parse_retry_after(
    text: &str,
    headers: &HeaderMap,
    now: impl FnOnce() -> SystemTime,
) -> Option<Duration> {
    if text.bytes().all(|b| b.is_ascii_digit()) && !text.is_empty() {
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    let answered_at = header_text(headers, &header::DATE)
        .and_then(|date| httpdate::parse_http_date(date).ok())
        .unwrap_or_else(now);
    Some(until.duration_since(answered_at).unwrap_or_default())
}

fn header_text<'h>(headers: &'h HeaderMap, name: &header::HeaderName) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::super::{Catalog, Risk};
    use super::*;

    fn read(endpoint: &str, status: u16, headers: &HeaderMap, body: &str) -> Answer {
        let endpoint = Catalog::get().by_id(endpoint).unwrap();
        let asked = RequestContext {
            endpoint: Some(endpoint),
            scope: endpoint.scope.unwrap(),
            changes: !matches!(endpoint.risk, Risk::Public | Risk::Read),
            refusal_codes: &RefusalCodes::default(),
        };
        let status = StatusCode::from_u16(status).unwrap();
        let body = Bytes::from(body.to_owned());
        Answer::read(status, headers, body, asked, || SystemTime::UNIX_EPOCH)
    }

    fn order(status: u16, body: &str) -> Answer {
        read("spot.post.v1-hf-orders", status, &HeaderMap::new(), body)
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        let pairs =
            pairs.map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        pairs.collect()
    }

    #[test]
    fn pages_of_the_edge_are_blocks_and_other_pages_are_not() {
        let html = headers(&[("content-type", "text/html; charset=UTF-8")]);
        let page = "<html><title>Access denied</title><p>Error 1015: You are being rate limited</p></html>";
        for (status, body, is_block) in [
            (429, "<html></html>", true),
            (429, page, true),
            (403, page, true),
            (403, "<html>Forbidden</html>", false),
            (502, page, false),
            (200, r#"{"code":"1015","msg":"blocked"}"#, true),
            (429, r#"{"code":"429000","msg":"Too Many Requests"}"#, false),
            (403, r#"{"code":"400006","msg":"address 1.1015"}"#, false),
        ] {
            let answer = read("spot.post.v1-hf-orders", status, &html, body);
            assert_eq!(answer.edge_block().is_some(), is_block, "{status} {body}");
        }
        let of_gateway = headers(&[
            ("gw-ratelimit-limit", "2000"),
            ("gw-ratelimit-remaining", "0"),
            ("gw-ratelimit-reset", "1000"),
        ]);
        let answer = read("spot.post.v1-hf-orders", 429, &of_gateway, "{broken");
        assert_eq!(answer.edge_block(), None);
        assert!(answer.is_unreadable_429());
    }

    /// Answers to an order: HTTP status, body, expected outcome.
    const ORDERS: &[(u16, &str, Outcome)] = &[
        (200, r#"{"code":"200000","data":{}}"#, Outcome::Accepted),
        (
            200,
            r#"{"code":"200000","data":null,"msg":"Position does not exist"}"#,
            Outcome::MaybeSent,
        ),
        (
            200,
            r#"{"code":"400100","msg":"Order size below the minimum"}"#,
            Outcome::Rejected,
        ),
        (
            400,
            r#"{"code":"400002","msg":"KC-API-TIMESTAMP Invalid"}"#,
            Outcome::Rejected,
        ),
        (
            429,
            r#"{"code":"429000","msg":"Too Many Requests"}"#,
            Outcome::Rejected,
        ),
        (
            500,
            r#"{"code":"500000","msg":"Internal Server Error"}"#,
            Outcome::MaybeSent,
        ),
        (
            200,
            r#"{"code":"504000","msg":"gateway timeout"}"#,
            Outcome::MaybeSent,
        ),
        (
            404,
            r#"{"code":404,"msg":"Not Found","retry":false,"success":false}"#,
            Outcome::Rejected,
        ),
        (502, "<html>502</html>", Outcome::MaybeSent),
        (429, "<html>1015</html>", Outcome::Rejected),
        (403, "<html>blocked</html>", Outcome::Rejected),
        (408, "", Outcome::MaybeSent),
        (
            408,
            r#"{"code":"408","msg":"Request Timeout"}"#,
            Outcome::MaybeSent,
        ),
        (302, "", Outcome::MaybeSent),
        (200, "", Outcome::MaybeSent),
        (200, "{", Outcome::MaybeSent),
        (
            200,
            r#"{"code":"200000","code":"400100"}"#,
            Outcome::MaybeSent,
        ),
        (200, r#"{"code":null}"#, Outcome::MaybeSent),
        (200, r#"{"code":"200"}"#, Outcome::MaybeSent),
        (
            200,
            r#"{"success":true,"code":"200","msg":"success","data":{}}"#,
            Outcome::MaybeSent,
        ),
        (200, r#"{"code":"OK","success":true}"#, Outcome::MaybeSent),
        (200, r#"{"code":"999999","msg":"new"}"#, Outcome::MaybeSent),
        (400, r#"{"code":"999999","msg":"new"}"#, Outcome::Rejected),
        (400, r#"{"code":""}"#, Outcome::Rejected),
        (400, r#"{"code":"500000"}"#, Outcome::MaybeSent),
        (400, r#"{"code":"200000"}"#, Outcome::MaybeSent),
        (500, r#"{"code":"200000","data":{}}"#, Outcome::MaybeSent),
        (302, r#"{"code":"200000","data":{}}"#, Outcome::MaybeSent),
        (502, r#"{"code":"400100"}"#, Outcome::MaybeSent),
        (302, r#"{"code":"400100"}"#, Outcome::MaybeSent),
        (201, r#"{"code":400100}"#, Outcome::Rejected),
        (
            200,
            r#"{"code":"200000","success":false}"#,
            Outcome::MaybeSent,
        ),
        (
            200,
            r#"{"code":"200000","success":"no"}"#,
            Outcome::MaybeSent,
        ),
        (
            200,
            r#"{"code":"200000","success":{"x":[1]}}"#,
            Outcome::MaybeSent,
        ),
        (
            200,
            r#"{"code":"200000","success":null}"#,
            Outcome::Accepted,
        ),
        (200, r#"{"code":200000,"success":true}"#, Outcome::Accepted),
        (
            200,
            r#"{"code":"400100","success":false}"#,
            Outcome::Rejected,
        ),
        (
            200,
            r#"{"code":"400100","success":true}"#,
            Outcome::MaybeSent,
        ),
        (
            400,
            r#"{"code":"400100","success":true}"#,
            Outcome::Rejected,
        ),
        (
            400,
            r#"{"code":"500000","msg":{"a":1}}"#,
            Outcome::MaybeSent,
        ),
        (400, r#"{"code":"500000","msg":true}"#, Outcome::MaybeSent),
        (400, r#"{"code":500000.0}"#, Outcome::MaybeSent),
        (400, r#"{"code":["500000"]}"#, Outcome::MaybeSent),
        (
            400,
            r#"{"code":"400100","code":"500000"}"#,
            Outcome::MaybeSent,
        ),
        (400, r#"{"code":"500000""#, Outcome::MaybeSent),
        (401, r#"{"code":400003.0}"#, Outcome::Rejected),
        (403, r#"{"code":true}"#, Outcome::Rejected),
        (404, r#"{"code":404.0}"#, Outcome::Rejected),
        (429, r#"{"code":429000.0}"#, Outcome::Rejected),
        (400, r#"{"code":"400100","msg":{"a":1}}"#, Outcome::Rejected),
        (400, r#"{"msg":"no code"}"#, Outcome::Rejected),
        (400, r#"{"code":null}"#, Outcome::Rejected),
        (400, "<html>400</html>", Outcome::Rejected),
        (400, "Bad Request", Outcome::Rejected),
        (400, "", Outcome::Rejected),
        (
            200,
            r#"{"code":"200000","msg":{"a":1}}"#,
            Outcome::MaybeSent,
        ),
        (200, r#"{"code":"200000","msg":false}"#, Outcome::MaybeSent),
        (200, r#"["200000"]"#, Outcome::MaybeSent),
        (200, r#"["400100","no"]"#, Outcome::MaybeSent),
        (200, r#""200000""#, Outcome::MaybeSent),
    ];

    #[test]
    fn order_is_rejected_only_if_the_answer_shows_that_nothing_was_executed() {
        for (status, body, outcome) in ORDERS {
            assert_eq!(order(*status, body).outcome, *outcome, "{status} {body}");
        }
    }

    #[test]
    fn further_success_codes_count_only_for_their_endpoints() {
        let body =
            r#"{"success":true,"code":"200","msg":"success","retry":false,"data":{"orderId":"1"}}"#;
        let outcome = |endpoint, body| read(endpoint, 200, &HeaderMap::new(), body).outcome;
        for endpoint in [
            "futures.post.v2-order",
            "spot.post.v1-hf-orders-multi",
            "spot.post.v3-margin-borrow",
        ] {
            assert_eq!(outcome(endpoint, body), Outcome::Accepted, "{endpoint}");
            let contradicting = r#"{"success":false,"code":"200","msg":"success"}"#;
            assert_eq!(outcome(endpoint, contradicting), Outcome::MaybeSent);
        }
        assert_eq!(outcome("futures.post.v1-orders", body), Outcome::MaybeSent);
    }

    #[test]
    fn an_order_that_timed_out_inside_the_exchange_is_maybe_sent() {
        // From the documentation of this endpoint.
        let body =
            r#"{"success":false,"code":"100000","msg":"error.timeOut","retry":false,"data":null}"#;
        for status in [200, 400] {
            let answer = read("futures.post.v2-order", status, &HeaderMap::new(), body);
            assert_eq!(answer.outcome, Outcome::MaybeSent, "{status}");
            assert!(!answer.is_of_unknown_code);
        }
    }

    #[test]
    fn code_is_unknown_only_if_it_would_settle_the_outcome() {
        let is_unknown = |status, body| order(status, body).is_of_unknown_code;
        assert!(is_unknown(200, r#"{"code":"999999"}"#));
        assert!(is_unknown(200, r#"{"code":"999999","success":false}"#));
        for (status, body) in [
            (500, r#"{"code":"999999"}"#),
            (302, r#"{"code":"999999"}"#),
            (200, r#"{"code":"999999","success":true}"#),
            (200, r#"{"code":"400100"}"#),
            (200, r#"{"code":"500000"}"#),
            (400, r#"{"code":"999999"}"#),
            (502, "<html>"),
        ] {
            assert!(!is_unknown(status, body), "{status} {body}");
        }
        let read = read(
            "spot.get.v1-accounts",
            200,
            &HeaderMap::new(),
            r#"{"code":"999999"}"#,
        );
        assert_eq!(
            (read.outcome, read.is_of_unknown_code),
            (Outcome::Rejected, false)
        );
    }

    #[test]
    fn encoded_body_leaves_the_outcome_of_most_client_errors_open() {
        let encoded = headers(&[("content-encoding", "br")]);
        let body = r#"{"code":"200000"}"#;
        for (status, outcome) in [
            (200, Outcome::MaybeSent),
            (400, Outcome::MaybeSent),
            (401, Outcome::Rejected),
            (403, Outcome::Rejected),
            (404, Outcome::Rejected),
            (408, Outcome::MaybeSent),
            (415, Outcome::MaybeSent),
            (429, Outcome::Rejected),
        ] {
            let answer = read("spot.post.v1-hf-orders", status, &encoded, body);
            assert_eq!((answer.outcome, answer.code.as_str()), (outcome, ""));
            assert_eq!(answer.content_encoding, "br");
        }
        let empty = read("spot.post.v1-hf-orders", 400, &encoded, "");
        assert_eq!(empty.outcome, Outcome::Rejected, "nothing to decode");
    }

    #[test]
    fn message_that_is_not_a_string_is_shown_as_json() {
        let answer = order(400, r#"{"code":"400100","msg":{"size":"too small"}}"#);
        assert_eq!(answer.code, "400100");
        assert_eq!(answer.msg, r#"{"size":"too small"}"#);
        assert_eq!(order(400, r#"{"code":"400100","msg":null}"#).msg, "");
    }

    #[test]
    fn failed_read_is_rejected_not_maybe_sent() {
        let read = read("spot.get.v1-accounts", 502, &HeaderMap::new(), "");
        assert_eq!(read.outcome, Outcome::Rejected);
    }

    #[test]
    fn retry_after_is_read_in_both_forms_and_limited_to_an_hour() {
        const DATE: &str = "Sun, 29 Nov 2026 12:00:00 GMT";
        const LATER: &str = "Sun, 29 Nov 2026 12:00:20 GMT";
        let wait = |pairs: &[(&'static str, &str)], body| {
            let answer = read("spot.post.v1-hf-orders", 429, &headers(pairs), body);
            answer.retry_after.map(|wait| wait.as_secs())
        };
        for (pairs, expected) in [
            (&[("retry-after", "7")][..], Some(7)),
            (&[("retry-after", "3601")], Some(3600)),
            (&[("retry-after", "18446744073709551615")], Some(3600)),
            (&[("retry-after", "99999999999999999999999999")], Some(3600)),
            (&[("retry-after", LATER), ("date", DATE)], Some(20)),
            (&[("retry-after", DATE), ("date", LATER)], Some(0)),
            (
                &[
                    ("retry-after", "Fri, 01 Jan 2100 00:00:00 GMT"),
                    ("date", DATE),
                ],
                Some(3600),
            ),
            // The clock of this test is at 1970.
            (&[("retry-after", "Thu, 01 Jan 1970 00:00:09 GMT")], Some(9)),
            (&[("retry-after", "soon")], None),
            (&[("retry-after", "-1")], None),
        ] {
            assert_eq!(wait(pairs, r#"{"code":"400100"}"#), expected, "{pairs:?}");
        }
        let reset = [
            ("gw-ratelimit-limit", "4000"),
            ("gw-ratelimit-remaining", "0"),
            ("gw-ratelimit-reset", "18446744073709551615"),
        ];
        assert_eq!(wait(&reset, r#"{"code":"429000"}"#), Some(3600));
    }

    #[test]
    fn rate_limits_and_retry_times_are_read() {
        let headers = headers(&[
            ("gw-ratelimit-limit", "4000"),
            ("gw-ratelimit-remaining", "0"),
            ("gw-ratelimit-reset", "1234"),
        ]);
        let answer = read(
            "futures.post.v1-orders",
            429,
            &headers,
            r#"{"code":"429000","msg":"x"}"#,
        );
        let reset = Duration::from_millis(1234);
        assert_eq!(
            answer.rate_limit,
            Some(RateLimit {
                limit: 4000,
                remaining: 0,
                reset
            })
        );
        assert_eq!(answer.retry_after, Some(reset));
        assert_eq!(order(429, "<html>").retry_after, Some(EDGE_BLOCK));
        assert_eq!(
            order(200, r#"{"code":"200002"}"#).retry_after,
            None,
            "on spot this code means something else"
        );
    }
}
