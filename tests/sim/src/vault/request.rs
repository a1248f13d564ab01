//! A parsed request: operation, decoded path, query, JSON body, token.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value};

use super::answer::Refusal;
use super::clock::parse_duration;
use crate::http::Received;

/// Vault's operations; POST and PUT are the same operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Operation {
    Delete,
    List,
    Other,
    Read,
    Write,
}

/// A parsed request.
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) method: String,
    /// Without `/v1/` and without slashes at the end, percent-decoded.
    pub(super) path: String,
    pub(super) query: Vec<(String, String)>,
    pub(super) body: Fields,
    pub(super) token: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) wrap_ttl: Option<Duration>,
    /// The client's certificates, its own first.
    pub(super) certificates: Arc<[CertificateDer<'static>]>,
    pub(super) peer: IpAddr,
    pub(super) now: SystemTime,
}

impl Request {
    /// Parses a request. Fails with the server's error 400 if the body is not JSON or a header is invalid.
    pub(super) fn read(received: &Received, now: SystemTime) -> Result<Self, Refusal> {
        let head = &received.head;
        let header = |name: &str| {
            let value = head.headers.get(name)?.to_str().ok()?.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let query: Vec<_> = head
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (decode(name), decode(value)))
            .collect();
        let listing = query
            .iter()
            .any(|(name, value)| name == "list" && value == "true");
        let operation = match head.method.as_str() {
            "DELETE" => Operation::Delete,
            "GET" | "HEAD" if listing => Operation::List,
            "GET" | "HEAD" => Operation::Read,
            "LIST" => Operation::List,
            "POST" | "PUT" => Operation::Write,
            _ => Operation::Other,
        };
        let wrap_ttl = match header("x-vault-wrap-ttl") {
            None => None,
            Some(text) => Some(
                parse_duration(&text)
                    .ok_or_else(|| Refusal::bad_request("error parsing X-Vault-Wrap-TTL header"))?,
            ),
        };
        Ok(Self {
            operation,
            method: head.method.to_string(),
            path: relative_path(head.uri.path()),
            query,
            body: Fields::read(&received.body)?,
            token: header("x-vault-token"),
            namespace: header("x-vault-namespace"),
            wrap_ttl,
            certificates: Arc::clone(&received.certificates),
            peer: received.peer.ip(),
            now,
        })
    }

    /// The value of a query parameter.
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(parameter, _)| parameter == name)?;
        Some(&found.1)
    }
}

/// The path below `/v1/`, percent-decoded, without slashes at the end.
pub(super) fn relative_path(path: &str) -> String {
    let path = path.strip_prefix("/v1/").unwrap_or(path);
    decode(path).trim_end_matches('/').to_owned()
}

/// The fields of a JSON body; empty if there is no body.
#[derive(Default)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    fn read(body: &[u8]) -> Result<Self, Refusal> {
        if body.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_slice(body).map(Self).map_err(|error| {
            let problem = if error.is_eof() {
                "unexpected EOF"
            } else {
                "invalid JSON object"
            };
            Refusal::bad_request(format!("failed to decode JSON input: {problem}"))
        })
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.get(name)?.as_str()
    }

    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        self.get(name)?.as_bool()
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.as_u64()
    }

    /// A list of strings, or one comma-separated string.
    pub(super) fn texts(&self, name: &str) -> Option<Vec<String>> {
        let texts = match self.get(name)? {
            Value::Array(items) => items
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            Value::String(text) => text
                .split(',')
                .map(|item| item.trim().to_owned())
                .filter(|item| !item.is_empty())
                .collect(),
            _ => return None,
        };
        Some(texts)
    }

    /// A duration: seconds, or text with units.
    pub(super) fn duration(&self, name: &str) -> Result<Option<Duration>, Refusal> {
        let parsed = match self.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) if text.is_empty() => return Ok(None),
            Some(Value::String(text)) => parse_duration(text),
            Some(value) => value.as_u64().map(Duration::from_secs),
        };
        match parsed {
            Some(duration) => Ok(Some(duration)),
            None => Err(Refusal::bad_request(format!(
                "error converting input for field {name:?}"
            ))),
        }
    }
}

/// Percent-decodes text; keeps a `%` that is not an escape.
fn decode(text: &str) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let escaped = tail
            .get(..2)
            .filter(|_| byte == b'%')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        decoded.push(escaped.unwrap_or(byte));
        rest = match escaped {
            Some(_) => tail.get(2..).unwrap_or_default(),
            None => tail,
        };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
