//! What an answer of the exchange means: envelope, outcome, rate limit.
//!
//! Source: KuCoin API documentation, "Error Code" and "Rate Limit"; an answer is judged by its code first, by its HTTP
//! status only where there is no code.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, Deserializer};

use super::Scope;
use crate::outcome::Outcome;

/// The code of a request that the exchange took.
const TAKEN: &str = "200000";

/// Codes that say that something inside the exchange failed, so that the request may or may not have been executed.
/// Source: KuCoin API documentation, "Error Code": internal error, busy, gateway timeout, unknown, network timeout.
const UNCLEAR: [&str; 7] = [
    "230005", "408000", "500000", "501000", "503000", "504000", "505000",
];

/// The same among the codes of the unified account: system error, busy, timeout.
const UNCLEAR_UNIFIED: [&str; 7] = [
    "106204", "109099", "110000", "110001", "112001", "112002", "112003",
];

/// The exchange refused the key, its passphrase or its signature; it executed nothing.
pub const CREDENTIALS_REFUSED: [&str; 3] = ["400003", "400004", "400005"];

/// How long the edge blocks an address after too many requests. Source: KuCoin API documentation, code 1015.
const EDGE_BLOCK: Duration = Duration::from_secs(30);

/// How long futures refuse after business code 200002. Source: KuCoin API documentation, futures error codes.
const FUTURES_BLOCK: Duration = Duration::from_secs(10);

/// A whole answer of the exchange.
#[derive(Clone)]
pub struct Answer {
    /// HTTP status.
    pub http_status: StatusCode,
    /// Body, byte for byte.
    pub body: Bytes,
    /// Content-Type; empty where none came.
    pub content_type: String,
    /// `code` of the envelope; empty where there is none.
    pub code: String,
    /// `msg` of the envelope; empty where there is none.
    pub msg: String,
    /// What it says about the request.
    pub outcome: Outcome,
    /// Quota of the pool, where the gateway told.
    pub rate_limit: Option<RateLimit>,
    /// How long to wait, where the exchange says so.
    pub retry_after: Option<Duration>,
}

/// Without the body: what an account holds is nobody's to read in a log.
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
pub struct RateLimit {
    /// Weight per window.
    pub limit: u64,
    /// Weight left in it.
    pub remaining: u64,
    /// Until the window ends.
    pub reset: Duration,
}

/// KuCoin's envelope, as far as every answer has it.
#[derive(Debug, Default, Deserialize)]
struct Envelope {
    #[serde(deserialize_with = "text")]
    code: String,
    #[serde(default, deserialize_with = "text")]
    msg: String,
}

/// Text, or a number as text: some gateways write `"code":404`.
fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Scalar {
        Null(()),
        Number(i64),
        Text(String),
    }
    Ok(match Scalar::deserialize(deserializer)? {
        Scalar::Number(number) => number.to_string(),
        Scalar::Text(text) => text,
        Scalar::Null(()) => String::new(),
    })
}

impl Answer {
    /// Reads an answer to a request in `scope`; `changes` says whether the request could change anything.
    pub fn read(
        http_status: StatusCode,
        headers: &HeaderMap,
        body: Bytes,
        scope: Scope,
        changes: bool,
    ) -> Self {
        let envelope: Option<Envelope> = serde_json::from_slice(&body).ok();
        let outcome = match &envelope {
            Some(envelope) => judge(http_status, envelope, scope),
            None => judge_bare(http_status),
        };
        // A read that failed changed nothing, however it failed.
        let outcome = if outcome == Outcome::MaybeSent && !changes {
            Outcome::Rejected
        } else {
            outcome
        };
        let Envelope { code, msg } = envelope.unwrap_or_default();
        let rate_limit = rate_limit(headers);
        let retry_after = retry_after(http_status, headers, &code, scope, rate_limit);
        let content_type = header_text(headers, &header::CONTENT_TYPE)
            .unwrap_or_default()
            .to_owned();
        Self {
            http_status,
            body,
            content_type,
            code,
            msg,
            outcome,
            rate_limit,
            retry_after,
        }
    }
}

fn judge(http_status: StatusCode, envelope: &Envelope, scope: Scope) -> Outcome {
    let Envelope { code, msg } = envelope;
    let unclear = UNCLEAR.contains(&code.as_str())
        || (scope == Scope::Unified && UNCLEAR_UNIFIED.contains(&code.as_str()));
    match code.as_str() {
        // "Position does not exist" has been seen under 200000: a message there contradicts the code.
        TAKEN if msg.is_empty() || msg.eq_ignore_ascii_case("success") => Outcome::Accepted,
        TAKEN | "" => Outcome::MaybeSent,
        _ if unclear
            || http_status.is_server_error()
            || http_status == StatusCode::REQUEST_TIMEOUT =>
        {
            Outcome::MaybeSent
        }
        _ => Outcome::Rejected,
    }
}

/// An answer without envelope comes from something before the exchange proper: a refusal there (4xx) executed nothing.
fn judge_bare(http_status: StatusCode) -> Outcome {
    if http_status.is_client_error() && http_status != StatusCode::REQUEST_TIMEOUT {
        Outcome::Rejected
    } else {
        Outcome::MaybeSent
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
        reset: Duration::from_millis(number("gw-ratelimit-reset")?),
    })
}

fn retry_after(
    http_status: StatusCode,
    headers: &HeaderMap,
    code: &str,
    scope: Scope,
    rate_limit: Option<RateLimit>,
) -> Option<Duration> {
    let told = header_text(headers, &header::RETRY_AFTER)
        .and_then(|text| text.parse().ok())
        .map(Duration::from_secs);
    told.or(match code {
        "429000" => rate_limit.map(|limit| limit.reset),
        "1015" => Some(EDGE_BLOCK),
        "200002" if scope == Scope::Futures => Some(FUTURES_BLOCK),
        "" if http_status == StatusCode::TOO_MANY_REQUESTS => Some(EDGE_BLOCK),
        _ => None,
    })
}

fn header_text<'h>(headers: &'h HeaderMap, name: &header::HeaderName) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(status: u16, body: &str) -> Answer {
        let status = StatusCode::from_u16(status).unwrap();
        Answer::read(
            status,
            &HeaderMap::new(),
            Bytes::from(body.to_owned()),
            Scope::SpotMargin,
            true,
        )
    }

    #[test]
    fn an_answer_is_judged_by_its_code_then_by_its_status() {
        let cases = [
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
        ];
        for (status, body, outcome) in cases {
            assert_eq!(order(status, body).outcome, outcome, "{status} {body}");
        }
    }

    #[test]
    fn a_read_that_failed_changed_nothing() {
        let read = Answer::read(
            StatusCode::BAD_GATEWAY,
            &HeaderMap::new(),
            Bytes::new(),
            Scope::SpotMargin,
            false,
        );
        assert_eq!(read.outcome, Outcome::Rejected);
    }

    #[test]
    fn rate_limits_and_waiting_times_are_numbers() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("gw-ratelimit-limit", "4000"),
            ("gw-ratelimit-remaining", "0"),
            ("gw-ratelimit-reset", "1234"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let body = Bytes::from_static(br#"{"code":"429000","msg":"x"}"#);
        let answer = Answer::read(
            StatusCode::TOO_MANY_REQUESTS,
            &headers,
            body,
            Scope::Futures,
            true,
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
            "on spot this code is another matter"
        );
    }
}
