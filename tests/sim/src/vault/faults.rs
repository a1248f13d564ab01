//! Faults on demand: what goes wrong, for which requests, and how often.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::{labelled, response};
use super::request::relative_path;
use crate::http::{Raw, Reply};

const API: &str = "/v1/";

/// What goes wrong. In JSON: `"kind"` in snake case, with the fields in the same object.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fault {
    /// The connection is closed without an answer; the request is not executed.
    Close,
    /// The request is executed and answered after a delay.
    Delay {
        /// The delay in real milliseconds.
        ms: u64,
    },
    /// Status 200 with a body that never ends; the request is not executed.
    Endless,
    /// The token of the request expires just before the request is executed.
    ExpireToken,
    /// The request is executed, half of the answer's body is sent, then the connection is closed.
    HalfBody,
    /// The connection stays open without an answer; the request is not executed.
    Hang,
    /// Status 200 with an HTML page, as a proxy would send it; the request is not executed.
    NotJson,
    /// Status 307 to the same path and query at another origin; the request is not executed.
    Redirect {
        /// Scheme, host and port.
        to: String,
    },
    /// This status with an `errors` body; the request is not executed.
    Status {
        /// 400 to 599.
        code: u16,
        /// The value of a Retry-After header.
        #[serde(default)]
        retry_after_s: Option<u32>,
    },
    /// The request is executed, and `data` of its answer is put inside a list.
    WrongJson,
}

/// A fault and the requests that it hits. If several rules match, the oldest applies.
#[derive(Clone, Debug, Deserialize)]
pub struct FaultRule {
    /// What goes wrong.
    #[serde(flatten)]
    pub fault: Fault,
    /// Method; `None`: every method.
    #[serde(default)]
    pub method: Option<String>,
    /// Start of the path, with or without `/v1/`; empty: every path.
    #[serde(default)]
    pub path: String,
    /// How many requests it hits; `None`: all until the faults are cleared.
    #[serde(default)]
    pub times: Option<u32>,
}

impl FaultRule {
    /// A rule that hits every request whose path starts with `path`, until the faults are cleared.
    pub fn new(path: &str, fault: Fault) -> Self {
        Self {
            fault,
            method: None,
            path: path.to_owned(),
            times: None,
        }
    }

    /// Limits the rule to this method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.method = Some(method.to_owned());
        self
    }

    /// Limits the rule to this many requests.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }
}

/// The active rules.
#[derive(Default)]
pub(super) struct Faults {
    rules: Vec<FaultRule>,
    /// How many requests were hit.
    pub(super) hits: u64,
}

impl Faults {
    pub(super) fn add(&mut self, mut rule: FaultRule) {
        if rule.path.starts_with(API) {
            rule.path.drain(..API.len());
        }
        self.rules.push(rule);
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// The fault that hits this request, if any; counts the request.
    pub(super) fn hit(&mut self, method: &str, path: &str) -> Option<Fault> {
        let path = relative_path(path);
        let rule = self.rules.iter_mut().find(|rule| {
            rule.times != Some(0)
                && path.starts_with(&rule.path)
                && rule.method.as_deref().is_none_or(|wanted| wanted == method)
        })?;
        if let Some(times) = &mut rule.times {
            *times -= 1;
        }
        self.hits += 1;
        Some(rule.fault.clone())
    }
}

impl Fault {
    /// The answer of a fault that replaces the execution of the request; `None` for other faults.
    pub(super) fn replacement(&self, path_and_query: &str) -> Option<Reply> {
        match self {
            Self::Close => Some(Reply::Close),
            Self::Endless => Some(Reply::Raw(endless())),
            Self::Hang => Some(Reply::Hang),
            Self::NotJson => {
                let page = "<html><body>simulated proxy error</body></html>\n".to_owned();
                Some(labelled(200, "text/html; charset=utf-8", page).into())
            }
            Self::Redirect { to } => Some(redirect(to, path_and_query).into()),
            Self::Status {
                code,
                retry_after_s,
            } => {
                let mut answer =
                    response(*code, &json!({ "errors": errors(*code, path_and_query) }));
                if let Some(seconds) = retry_after_s {
                    let headers = answer.headers_mut();
                    headers.insert(header::RETRY_AFTER, HeaderValue::from(*seconds));
                }
                Some(answer.into())
            }
            Self::Delay { .. } | Self::ExpireToken | Self::HalfBody | Self::WrongJson => None,
        }
    }

    /// How long to wait before the request is executed.
    pub(super) fn delay(&self) -> Duration {
        match self {
            Self::Delay { ms } => Duration::from_millis(*ms),
            _ => Duration::ZERO,
        }
    }

    /// Damages the answer of an executed request.
    pub(super) fn damage(&self, answer: Response<Bytes>) -> Reply {
        match self {
            Self::HalfBody => {
                let half = answer.body().len() / 2;
                Reply::CutShort(answer, half)
            }
            Self::WrongJson => {
                let mut body: Value = serde_json::from_slice(answer.body()).unwrap_or(json!({}));
                let data = [body.get("data").cloned().unwrap_or_default()];
                if let Some(body) = body.as_object_mut() {
                    body.insert("data".to_owned(), json!(data));
                }
                response(200, &body).into()
            }
            _ => answer.into(),
        }
    }
}

/// A JSON text of one string that never ends, in chunks of 16 KiB.
fn endless() -> Raw {
    let chunk = format!("4000\r\n{}\r\n", "x".repeat(0x4000));
    Raw {
        first: Bytes::from_static(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\
              x-credbroker-sim: 1\r\n\r\nb\r\n{\"data\": \"x\r\n",
        ),
        repeated: chunk.into(),
    }
}

/// A redirect (status 307) to the same path and query at `origin`.
pub(super) fn redirect(origin: &str, path_and_query: &str) -> Response<Bytes> {
    let mut response = response(307, &Value::Null);
    let location = format!("{}{path_and_query}", origin.trim_end_matches('/'));
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

fn errors(code: u16, path_and_query: &str) -> Vec<String> {
    let path = path_and_query.split('?').next().unwrap_or_default();
    match code {
        403 => vec!["permission denied".to_owned()],
        404 => Vec::new(),
        429 => vec![format!(
            "request path {:?}: rate limit quota exceeded",
            relative_path(path)
        )],
        503 => vec!["Vault is sealed".to_owned()],
        _ => vec![format!("simulated fault {code}")],
    }
}
