//! The exchange behind both hosts: processes one request at a time.
//!
//! Order of the steps: edge limit, fault, endpoint lookup, checks of `auth`, quota of the pool, permission, product.
//! KuCoin does not document its order.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::accounts::{self, Accounts};
use super::answers::{self, Outcome, Refusal, refuse};
use super::auth::{self, KeyRules, SimKey};
use super::call::Call;
use super::catalog::{Catalog, Endpoint, Host, Route};
use super::faults::{FaultAction, Faults};
use super::limits::{Limits, Quota, Subject, Usage};
use super::orders::Order;
use super::record::{CreatedOrder, ReceivedRequest, Records, Signature};
use super::{conditional, futures, market, spot, unified};
use crate::http::Received;

/// Everything that both hosts share.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) accounts: Accounts,
    pub(super) clock: Clock,
    pub(super) faults: Faults,
    pub(super) key_rules: KeyRules,
    pub(super) keys: HashMap<String, SimKey>,
    pub(super) limits: Limits,
    pub(super) records: Records,
    /// The source address that every request seems to have; unset: the real one.
    pub(super) source_address: Option<IpAddr>,
    pub(super) usage: Usage,
}

/// The exchange's clock.
#[derive(Clone, Copy, Debug)]
pub(super) enum Clock {
    /// Stopped at this time.
    Fixed(i64),
    /// Ahead of this machine's clock by this many milliseconds; behind it if negative.
    Offset(i64),
}

impl Clock {
    /// Milliseconds since 1970.
    #[expect(
        clippy::disallowed_methods,
        reason = "the simulator has its own clock; the ban is for the broker, whose clock is in clock.rs"
    )]
    pub(super) fn now_ms(self) -> i64 {
        match self {
            Self::Fixed(ms) => ms,
            Self::Offset(ms) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                let now_ms =
                    now.map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX));
                now_ms.saturating_add(ms)
            }
        }
    }
}

/// A request that passed the edge.
#[derive(Debug)]
pub(super) struct Arrival {
    number: u64,
    /// The fault that hits it.
    pub(super) fault: Option<FaultAction>,
}

/// The edge blocks this address.
#[derive(Debug)]
pub(super) struct Blocked;

impl From<Blocked> for Response<Bytes> {
    fn from(_: Blocked) -> Self {
        let detail = "Error 1015: you are being rate limited";
        answers::html_page(StatusCode::TOO_MANY_REQUESTS, detail)
    }
}

impl Exchange {
    /// Records a request; fails if the edge blocks it.
    pub(super) fn arrive(
        &mut self,
        catalog: &Catalog,
        host: Host,
        request: &Received,
    ) -> Result<Arrival, Blocked> {
        let now_ms = self.clock.now_ms();
        let mut record = ReceivedRequest::new(host, request, now_ms);
        if !self
            .usage
            .passes_edge(&self.limits, self.seen_from(request), now_ms)
        {
            record.answered = Some((429, "1015".to_owned()));
            self.records.add(record);
            return Err(Blocked);
        }
        let path = request.head.uri.path();
        if let Some(route) = catalog.find(host, request.head.method.as_str(), path) {
            record.endpoint = Some(route.endpoint.id.clone());
            if route.endpoint.is_private() {
                match self.signed_by(request, now_ms) {
                    Ok(key) => {
                        record.uid = Some(key.uid);
                        record.signature = Signature::Verified;
                    }
                    Err(refusal) => record.signature = Signature::Refused(refusal.code),
                }
            }
        }
        let fault = self.faults.hit(host, request.head.method.as_str(), path);
        record.fault = fault.is_some();
        Ok(Arrival {
            number: self.records.add(record),
            fault,
        })
    }

    /// All orders of an account in their current state, oldest first.
    pub(super) fn orders(&mut self, uid: u64) -> &[Order] {
        self.accounts.apply_due_cancels(self.clock.now_ms());
        self.accounts.orders(uid)
    }

    /// Sets the limits and resets the counters.
    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.usage.clear();
    }

    /// Checks a request, executes it and answers it.
    pub(super) fn process(
        &mut self,
        catalog: &Catalog,
        host: Host,
        arrival: &Arrival,
        request: &Received,
    ) -> Response<Bytes> {
        let method = request.head.method.as_str();
        let Some(route) = catalog.find(host, method, request.head.uri.path()) else {
            self.record_answer(arrival, 404, "404", Vec::new());
            return answers::not_found();
        };
        let (outcome, quota, created) = self.execute(host, &route, request);
        let mut response = answers::envelope(&outcome);
        if let Some(quota) = quota {
            quota.label(&mut response);
        }
        let code = outcome
            .as_ref()
            .map_or_else(|refusal| refusal.code, |_| "200000");
        self.record_answer(arrival, response.status().as_u16(), code, created);
        response
    }

    fn record_answer(
        &mut self,
        arrival: &Arrival,
        status: u16,
        code: &str,
        created: Vec<CreatedOrder>,
    ) {
        if let Some(record) = self.records.get_mut(arrival.number) {
            record.answered = Some((status, code.to_owned()));
            record.created = created;
        }
    }

    fn signed_by(&self, request: &Received, now_ms: i64) -> Result<&SimKey, Refusal> {
        let from = self.seen_from(request);
        auth::check(&self.keys, self.key_rules, request, from, now_ms)
    }

    /// The source address that a request seems to have.
    fn seen_from(&self, request: &Received) -> IpAddr {
        self.source_address.unwrap_or_else(|| request.peer.ip())
    }

    fn execute(
        &mut self,
        host: Host,
        route: &Route<'_>,
        request: &Received,
    ) -> (Outcome, Option<Quota>, Vec<CreatedOrder>) {
        let now_ms = self.clock.now_ms();
        let endpoint = route.endpoint;
        let key = match endpoint
            .is_private()
            .then(|| self.signed_by(request, now_ms))
        {
            None => None,
            Some(Ok(key)) => Some(key.clone()),
            Some(Err(refusal)) => return (Err(refusal), None, Vec::new()),
        };
        let from = self.seen_from(request);
        let subject = match &key {
            // Sub-accounts share the unified pool of their master account.
            Some(key) if endpoint.pool() == Some("Unified") => {
                Subject::Account(key.parent_uid.unwrap_or(key.uid))
            }
            Some(key) => Subject::Account(key.uid),
            None => Subject::Address(from),
        };
        let quota = endpoint.pool().and_then(|pool| {
            let weight = endpoint.weight();
            self.usage
                .charge(&self.limits, pool, subject, weight, now_ms)
        });
        if quota.is_some_and(|quota| quota.exceeded) {
            return (Err(too_many()), quota, Vec::new());
        }
        if let Some(key) = &key
            && !key.has_permission(endpoint.permission())
        {
            let msg = "Access denied, require more permission.";
            return (Err(refuse("400007", msg)), quota, Vec::new());
        }
        let uid = key.as_ref().map_or(0, |key| key.uid);
        self.accounts.apply_due_cancels(now_ms);
        let before = self.accounts.orders(uid).len();
        let outcome = Call::new(route, request, key.as_ref(), from, now_ms)
            .and_then(|call| self.product(host, &call));
        let created = self.accounts.orders(uid).iter().skip(before);
        let created = created
            .map(|order| CreatedOrder {
                id: order.id.clone(),
                client_oid: order.client_oid.clone(),
            })
            .collect();
        (outcome, quota, created)
    }

    fn product(&mut self, host: Host, call: &Call<'_>) -> Outcome {
        let accounts = &mut self.accounts;
        market::answer(call)
            .or_else(|| accounts::answer(accounts, call))
            .or_else(|| match host {
                Host::Futures => futures::answer(accounts, call),
                Host::Spot => spot::answer(accounts, call)
                    .or_else(|| conditional::answer(accounts, call))
                    .or_else(|| unified::answer(accounts, call)),
            })
            .unwrap_or_else(|| Ok(unsimulated(call.endpoint)))
    }
}

/// The refusal for a request over the quota.
pub(super) fn too_many() -> Refusal {
    refuse("429000", "Too many requests")
}

/// The answer of an endpoint that is in the catalogue but not simulated: well-formed and empty.
fn unsimulated(endpoint: &Endpoint) -> Value {
    let listing = endpoint.method == "GET" && endpoint.path.ends_with('s');
    if listing { json!([]) } else { json!({}) }
}
