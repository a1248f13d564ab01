//! `/_sim/...` on the spot host: lets another process control the simulator. Not part of KuCoin's API.
//!
//! | Request | Body or answer |
//! |---|---|
//! | `POST /_sim/keys` | a [`SimKey`] |
//! | `DELETE /_sim/keys?api_key=` | |
//! | `POST /_sim/balance` | `{"uid": 1, "wallet": "trade", "currency": "USDT", "amount": "10"}` |
//! | `POST /_sim/cancel-lag` | `{"ms": 300}`: how long after its acceptance a cancel-all takes effect |
//! | `POST /_sim/lookup-lag` | `{"ms": 3000}`: how long after its acceptance a lookup finds an order |
//! | `POST /_sim/fault` | a [`Fault`] to add |
//! | `DELETE /_sim/fault` | removes all faults |
//! | `GET /_sim/fault` | `{"hits": 3}`: how many requests faults have hit |
//! | `POST /_sim/limits` | [`Limits`]; missing fields get their default |
//! | `POST /_sim/source-address` | `{"address": "203.0.113.7"}`: the source address that every request seems to have; null: the real one |
//! | `POST /_sim/clock` | `{"offset_ms": -6000}` or `{"fixed_ms": 1735689600123}` |
//! | `GET /_sim/received` | `{"requests": [{method, path, code, signature, count}], "client_oids": [...]}` |
//! | `GET /_sim/placing` | the kept requests with a right signature whose body has clientOids, oldest first: `[{path, agent, at_ms, client_oids, created}]` |
//! | `GET /_sim/orders?uid=` | the account's orders, oldest first |

use std::collections::BTreeMap;
use std::net::IpAddr;

use bytes::Bytes;
use http::{Response, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::accounts::Wallet;
use super::amount::Amount;
use super::answers::json_answer;
use super::auth::SimKey;
use super::call::query_pairs;
use super::exchange::{Clock, Exchange};
use super::faults::Fault;
use super::limits::Limits;
use super::record::Signature;
use crate::http::Received;

/// The prefix of paths that belong to the simulator, not to KuCoin.
pub(super) const PREFIX: &str = "/_sim/";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetBalance {
    uid: u64,
    wallet: Wallet,
    currency: String,
    amount: Amount,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lag {
    ms: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceAddress {
    // Required, so that a misspelt field is an error and not null.
    #[serde(deserialize_with = "Option::deserialize")]
    address: Option<IpAddr>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum SetClock {
    FixedMs(i64),
    OffsetMs(i64),
}

/// Answers a control request.
pub(super) fn answer(exchange: &mut Exchange, request: &Received) -> Response<Bytes> {
    match execute(exchange, request) {
        Ok(answer) => json_answer(StatusCode::OK, &answer),
        Err(problem) => json_answer(StatusCode::BAD_REQUEST, &json!({"error": problem})),
    }
}

fn execute(exchange: &mut Exchange, request: &Received) -> Result<Value, String> {
    let query = query_pairs(request.head.uri.query().unwrap_or_default());
    let query = |wanted: &str| {
        let found = query.iter().find(|(name, _)| name == wanted);
        found
            .map(|(_, value)| value.clone())
            .ok_or_else(|| format!("the query has no {wanted}"))
    };
    match (request.head.method.as_str(), request.head.uri.path()) {
        ("POST", "/_sim/keys") => {
            let key: SimKey = body(request)?;
            exchange.keys.insert(key.api_key.clone(), key);
        }
        ("DELETE", "/_sim/keys") => {
            exchange.keys.remove(&query("api_key")?);
        }
        ("POST", "/_sim/balance") => {
            let new: SetBalance = body(request)?;
            let account = exchange.accounts.of(new.uid);
            account.set_available(new.wallet, &new.currency, new.amount);
        }
        ("POST", "/_sim/cancel-lag") => {
            exchange.accounts.cancel_lag_ms = i64::from(body::<Lag>(request)?.ms);
        }
        ("POST", "/_sim/lookup-lag") => {
            exchange.accounts.lookup_lag_ms = i64::from(body::<Lag>(request)?.ms);
        }
        ("POST", "/_sim/fault") => exchange.faults.add(body::<Fault>(request)?),
        ("DELETE", "/_sim/fault") => exchange.faults.clear(),
        ("GET", "/_sim/fault") => return Ok(json!({"hits": exchange.faults.hits})),
        ("POST", "/_sim/limits") => exchange.set_limits(body::<Limits>(request)?),
        ("POST", "/_sim/source-address") => {
            exchange.source_address = body::<SourceAddress>(request)?.address;
        }
        ("POST", "/_sim/clock") => {
            exchange.clock = match body(request)? {
                SetClock::FixedMs(ms) => Clock::Fixed(ms),
                SetClock::OffsetMs(ms) => Clock::Offset(ms),
            };
        }
        ("GET", "/_sim/received") => return Ok(received(exchange)),
        ("GET", "/_sim/placing") => return Ok(placing(exchange)),
        ("GET", "/_sim/orders") => {
            let uid = query("uid")?.parse().map_err(|_| "uid is not a number")?;
            return Ok(json!(exchange.orders(uid)));
        }
        (method, path) => return Err(format!("the simulator has no {method} {path}")),
    }
    Ok(json!({"ok": true}))
}

fn body<T: DeserializeOwned>(request: &Received) -> Result<T, String> {
    serde_json::from_slice(&request.body).map_err(|error| error.to_string())
}

fn received(exchange: &Exchange) -> Value {
    let mut counts = BTreeMap::<_, u64>::new();
    let mut client_oids = Vec::new();
    for request in exchange.records.iter() {
        let signature = match request.signature {
            Signature::Refused(_) => "refused",
            Signature::Unchecked => "unchecked",
            Signature::Verified => "verified",
        };
        let code = request.code().unwrap_or("none");
        let of = (request.method.as_str(), request.path(), code, signature);
        *counts.entry(of).or_default() += 1;
        client_oids.extend(
            request
                .created
                .iter()
                .filter_map(|order| order.client_oid.as_deref()),
        );
    }
    let requests: Vec<Value> = counts
        .into_iter()
        .map(|((method, path, code, signature), count)| {
            json!({"method": method, "path": path, "code": code, "signature": signature, "count": count})
        })
        .collect();
    json!({"requests": requests, "client_oids": client_oids})
}

fn placing(exchange: &Exchange) -> Value {
    let requests = exchange.records.iter();
    let verified = requests.filter(|request| request.signature == Signature::Verified);
    let placing = verified.filter_map(|request| {
        let client_oids = client_oids(&request.body);
        let created: Vec<_> = request.created.iter().map(|order| &order.id).collect();
        (!client_oids.is_empty()).then(|| {
            json!({
                "path": request.path(), "agent": request.header("user-agent"), "at_ms": request.at_ms,
                "client_oids": client_oids, "created": created,
            })
        })
    });
    placing.collect()
}

/// The clientOids in the body of a request that places one order, or a list of them.
fn client_oids(body: &[u8]) -> Vec<String> {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let list = body.as_array();
    let list = list.or_else(|| body.get("orderList").and_then(Value::as_array));
    let orders = list.map_or(std::slice::from_ref(&body), Vec::as_slice);
    let oids = orders.iter().filter_map(|order| order.get("clientOid"));
    oids.filter_map(Value::as_str).map(str::to_owned).collect()
}
