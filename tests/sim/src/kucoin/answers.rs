//! Answers in KuCoin's format: the envelope, its refusals with their HTTP status, and answers without an envelope.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::http::Raw;

/// Marks every answer as simulated.
const LABEL: HeaderName = HeaderName::from_static("x-credbroker-sim");

/// Why a request was not accepted: code and message of the envelope.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    /// The envelope's code.
    pub(super) code: &'static str,
    /// The envelope's message.
    pub(super) msg: String,
}

/// The result of a request: the envelope's `data`, or a refusal.
pub(super) type Outcome = Result<Value, Refusal>;

/// Makes a refusal.
pub(super) fn refuse(code: &'static str, msg: impl Into<String>) -> Refusal {
    Refusal {
        code,
        msg: msg.into(),
    }
}

impl Refusal {
    /// The HTTP status of a code.
    ///
    /// 400002, 400003 to 400006 and 429000 are seen in public issue threads; the other codes of the gateway are assumed
    /// by their meaning. Everything else has status 200, as the old documentation says.
    pub(super) fn status(&self) -> StatusCode {
        match self.code {
            "400002" | "400008" | "400009" => StatusCode::BAD_REQUEST,
            "400001" | "400003" | "400004" | "400005" => StatusCode::UNAUTHORIZED,
            "400006" | "400007" | "400200" | "400201" => StatusCode::FORBIDDEN,
            "404" => StatusCode::NOT_FOUND,
            "415000" => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "429000" => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::OK,
        }
    }
}

/// The answer for an outcome.
pub(super) fn envelope(outcome: &Outcome) -> Response<Bytes> {
    match outcome {
        Ok(data) => json_answer(StatusCode::OK, &json!({"code": "200000", "data": data})),
        Err(refusal) => json_answer(
            refusal.status(),
            &json!({"code": refusal.code, "msg": refusal.msg}),
        ),
    }
}

/// The gateway's answer for an unknown URL.
pub(super) fn not_found() -> Response<Bytes> {
    let body = json!({"code": "404", "msg": "Not Found", "retry": false, "success": false});
    json_answer(StatusCode::NOT_FOUND, &body)
}

/// An answer with this status and JSON.
pub(super) fn json_answer(status: StatusCode, body: &Value) -> Response<Bytes> {
    answer(
        status,
        "application/json;charset=UTF-8",
        Bytes::from(body.to_string()),
    )
}

/// An HTML page as Cloudflare or a load balancer sends it: no envelope, no gateway headers.
pub(super) fn html_page(status: StatusCode, detail: &str) -> Response<Bytes> {
    let title = format!(
        "{} {}",
        status.as_u16(),
        status.canonical_reason().unwrap_or("Error")
    );
    let body = format!(
        "<!DOCTYPE html>\n<html><head><title>{title}</title></head>\
         <body><h1>{title}</h1><p>{detail}</p><hr>cloudflare (simulated)</body></html>\n"
    );
    answer(status, "text/html; charset=UTF-8", Bytes::from(body))
}

/// Informational answers without end, a hundred at a time (RFC 8297).
pub(super) fn early_hints() -> Raw {
    let hint =
        format!("HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n{LABEL}: 1\r\n\r\n");
    Raw {
        first: Bytes::new(),
        repeated: hint.repeat(100).into(),
    }
}

/// A well-formed envelope with filler, as [`filled`], in chunks of one byte.
pub(super) fn one_byte_chunks(kilobytes: usize) -> Raw {
    let chunks = |text: &str| {
        let chunks = text.chars().map(|byte| format!("1\r\n{byte}\r\n"));
        chunks.collect::<Vec<_>>().concat()
    };
    let filler = chunks("x").repeat(kilobytes.saturating_mul(1000));
    let (before, after) = (chunks(BEFORE_FILLER), chunks(AFTER_FILLER));
    let first = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\
         connection: close\r\n{LABEL}: 1\r\n\r\n{before}{filler}{after}0\r\n\r\n"
    );
    Raw {
        first: first.into(),
        repeated: Bytes::new(),
    }
}

const BEFORE_FILLER: &str = r#"{"code":"200000","data":{"filler":""#;
const AFTER_FILLER: &str = r#""}}"#;

/// A well-formed envelope with this many bytes of filler. Not through a JSON library, which would keep the simulator from
/// answering other requests in time.
pub(super) fn filled(bytes: usize) -> Response<Bytes> {
    let filler = "x".repeat(bytes);
    let body = format!("{BEFORE_FILLER}{filler}{AFTER_FILLER}");
    answer(
        StatusCode::OK,
        "application/json;charset=UTF-8",
        body.into(),
    )
}

/// The answer with other ids of orders.
pub(super) fn of_other_order(answer: &Response<Bytes>) -> Response<Bytes> {
    let mut body: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    set_other_ids(&mut body);
    json_answer(answer.status(), &body)
}

fn set_other_ids(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(set_other_ids),
        Value::Object(fields) => {
            for (name, value) in fields {
                match name.as_str() {
                    "clientOid" => *value = json!("of-another-order"),
                    "orderId" => *value = json!("599999999999999999"),
                    _ => set_other_ids(value),
                }
            }
        }
        _ => {}
    }
}

fn answer(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(LABEL, HeaderValue::from_static("1"));
    response
}
