//! Answers of handlers: envelopes, refusals and their HTTP form.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

/// A handler's result.
pub(super) type Outcome = Result<Answer, Refusal>;

/// An answer without its request id.
pub(super) enum Answer {
    /// Status 204.
    Empty,
    /// An answer in the envelope of logical requests.
    Logical(Logical),
    /// JSON without the envelope (sys/health, sys/init, seal status).
    Plain(u16, Value),
}

/// The fields of the envelope that vary.
#[derive(Clone)]
pub(super) struct Logical {
    pub(super) status: u16,
    pub(super) data: Value,
    pub(super) auth: Value,
    pub(super) warnings: Vec<String>,
}

impl Logical {
    pub(super) fn data(data: Value) -> Self {
        Self {
            status: 200,
            data,
            auth: Value::Null,
            warnings: Vec::new(),
        }
    }

    pub(super) fn auth(auth: Value) -> Self {
        Self {
            status: 200,
            data: Value::Null,
            auth,
            warnings: Vec::new(),
        }
    }

    /// The accessor that a wrapped answer shows: of the token or `secret_id` inside.
    pub(super) fn accessor(&self) -> Option<&Value> {
        self.auth
            .get("accessor")
            .or_else(|| self.data.get("secret_id_accessor"))
    }

    /// The body; `request_id` is empty if the answer is wrapped.
    pub(super) fn envelope(self, request_id: &str) -> Value {
        json!({
            "request_id": request_id,
            "lease_id": "",
            "renewable": false,
            "lease_duration": 0,
            "data": self.data,
            "wrap_info": null,
            "warnings": if self.warnings.is_empty() { Value::Null } else { json!(self.warnings) },
            "auth": self.auth,
        })
    }
}

impl From<Logical> for Answer {
    fn from(logical: Logical) -> Self {
        Self::Logical(logical)
    }
}

/// An error status with its messages.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) errors: Vec<String>,
}

impl Refusal {
    pub(super) fn new(status: u16, error: impl Into<String>) -> Self {
        Self {
            status,
            errors: vec![error.into()],
        }
    }

    /// An error in the format of errors that passed the server's router.
    pub(super) fn routed(status: u16, error: &str) -> Self {
        Self::new(status, format!("1 error occurred:\n\t* {error}\n\n"))
    }

    pub(super) fn bad_request(error: impl Into<String>) -> Self {
        Self::new(400, error)
    }

    /// The error for a token that is missing, unknown, expired or revoked.
    pub(super) fn invalid_token() -> Self {
        Self::new(403, "permission denied")
    }

    /// The error for a valid token that a policy denies.
    pub(super) fn denied() -> Self {
        Self::routed(403, "permission denied")
    }

    /// Status 404 without a message: nothing at this path.
    pub(super) fn missing() -> Self {
        Self {
            status: 404,
            errors: Vec::new(),
        }
    }

    pub(super) fn no_route(path: &str) -> Self {
        let error = format!("no handler for route {path:?}. route entry not found.");
        Self::new(404, error)
    }

    pub(super) fn unsupported_operation() -> Self {
        Self::routed(405, "unsupported operation")
    }

    pub(super) fn unsupported_path() -> Self {
        Self::routed(404, "unsupported path")
    }

    pub(super) fn body(&self) -> Value {
        json!({ "errors": self.errors })
    }
}

/// An HTTP answer with JSON (empty for null), marked as not cacheable and as simulated.
pub(super) fn response(status: u16, body: &Value) -> Response<Bytes> {
    let text = if body.is_null() {
        String::new()
    } else {
        format!("{body}\n")
    };
    labelled(status, "application/json", text)
}

/// An HTTP answer of any content type, with the headers that all answers have.
pub(super) fn labelled(status: u16, content_type: &'static str, body: String) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body));
    // Handlers use valid constants; a health query or a fault can request an invalid status.
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-credbroker-sim", HeaderValue::from_static("1"));
    response
}
