//! A request that passed the checks: its endpoint, parameters and sender.

use std::net::IpAddr;

use serde_json::Value;

use super::amount::Amount;
use super::answers::{Refusal, refuse};
use super::auth::{SimKey, form_decoded};
use super::catalog::{Endpoint, Route};
use crate::http::Received;

/// An accepted request.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// The catalogued endpoint.
    pub(super) endpoint: &'a Endpoint,
    /// Source address, as the exchange sees it.
    pub(super) from: IpAddr,
    /// The key that signed it; `None` on public endpoints.
    pub(super) key: Option<&'a SimKey>,
    /// Account of that key; 0 on public endpoints.
    pub(super) uid: u64,
    /// Time by the exchange's clock.
    pub(super) now_ms: i64,
    /// The JSON body; null if there is none.
    pub(super) body: Value,
    params: &'a [(String, String)],
    query: Vec<(String, String)>,
}

impl<'a> Call<'a> {
    /// Reads query and body. Fails if the body is not JSON.
    pub(super) fn new(
        route: &'a Route<'a>,
        request: &Received,
        key: Option<&'a SimKey>,
        from: IpAddr,
        now_ms: i64,
    ) -> Result<Self, Refusal> {
        let body = match request.body.as_ref() {
            [] => Value::Null,
            body => serde_json::from_slice(body)
                .map_err(|_| refuse("400100", "Parameter error: the body is not JSON"))?,
        };
        Ok(Self {
            endpoint: route.endpoint,
            from,
            key,
            uid: key.map_or(0, |key| key.uid),
            now_ms,
            body,
            params: &route.params,
            query: query_pairs(request.head.uri.query().unwrap_or_default()),
        })
    }

    /// Method and path template, to match on.
    pub(super) fn route(&self) -> (&'a str, &'a str) {
        (&self.endpoint.method, &self.endpoint.path)
    }

    /// A path parameter.
    pub(super) fn param(&self, name: &str) -> Option<&str> {
        value_of(self.params, name)
    }

    /// A query parameter, decoded.
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        value_of(&self.query, name)
    }

    /// Whether its `symbol` parameter is missing or equals this symbol.
    pub(super) fn matches_symbol(&self, symbol: &str) -> bool {
        self.query("symbol").is_none_or(|wanted| wanted == symbol)
    }

    /// A parameter of the path, the query or the body.
    pub(super) fn any(&self, name: &str) -> Option<&str> {
        self.param(name)
            .or_else(|| self.query(name))
            .or_else(|| text(&self.body, name))
    }
}

/// Name and value of each query parameter, decoded.
pub(super) fn query_pairs(query: &str) -> Vec<(String, String)> {
    let decoded = |text: &str| String::from_utf8_lossy(&form_decoded(text)).into_owned();
    query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            (decoded(name), decoded(value))
        })
        .collect()
}

fn value_of<'a>(pairs: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let (_, value) = pairs.iter().find(|(known, _)| known == name)?;
    Some(value)
}

/// A non-empty string member of an object.
pub(super) fn text<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    object.get(name)?.as_str().filter(|value| !value.is_empty())
}

/// An amount in an object, as a string or number; `None` if missing. Fails if it is not an amount.
pub(super) fn amount(object: &Value, name: &str) -> Result<Option<Amount>, Refusal> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(value) => Amount::from_json(value)
            .map(Some)
            .ok_or_else(|| refuse("400100", format!("Parameter error: {name}"))),
    }
}

/// Whether this flag is set.
pub(super) fn flag(object: &Value, name: &str) -> bool {
    object.get(name).and_then(Value::as_bool).unwrap_or(false)
}
