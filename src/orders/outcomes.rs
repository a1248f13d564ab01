//! What is known about an earlier call or order, for bots that ask.

use std::hash::BuildHasher;

use super::calls::{Call, CallHandle, CallState};
use super::guard::{Claim, ClaimKey};
use super::{Claims, OrderState, Orders, Readiness, seconds};
use crate::base::ids::{AccountId, BotId, RequestId};
use crate::base::outcome::Outcome;
use crate::kucoin::{Catalog, Endpoint, Scope};

/// What is known about a call or an order.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) state: KnownState,
    /// The exchange's id of the order, if known.
    pub(crate) order_id: Option<String>,
    /// The endpoint, if known.
    pub(crate) endpoint: Option<&'static Endpoint>,
}

/// Whether a call was executed, or an order was placed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum KnownState {
    /// The exchange accepted it.
    Accepted,
    /// Its call has not ended.
    InFlight,
    /// It may have been executed.
    MaybeSent,
    /// It was not executed, and nothing of it is in flight.
    NotPlaced,
    /// The exchange rejected it.
    Rejected,
    /// Nothing is known.
    Unknown,
}

impl From<KnownState> for Known {
    fn from(state: KnownState) -> Self {
        Self {
            state,
            order_id: None,
            endpoint: None,
        }
    }
}

impl From<Claim> for Known {
    fn from(claim: Claim) -> Self {
        Self {
            state: match claim.state {
                OrderState::InFlight => KnownState::InFlight,
                OrderState::Accepted => KnownState::Accepted,
                // It may exist, although nothing looks it up any more.
                OrderState::MaybeSent | OrderState::Unknown => KnownState::MaybeSent,
            },
            order_id: claim.order_id,
            endpoint: Catalog::get().by_number(claim.endpoint),
        }
    }
}

impl From<Option<Outcome>> for CallState {
    fn from(outcome: Option<Outcome>) -> Self {
        match outcome {
            Some(Outcome::Accepted) => Self::Accepted,
            Some(Outcome::MaybeSent) | None => Self::MaybeSent,
            Some(Outcome::NotSent) => Self::NotSent,
            Some(Outcome::Rejected) => Self::Rejected,
        }
    }
}

impl Orders {
    /// Adds a call that changes something and is about to be sent. `claims`: those of its orders. `now_ms`: the exchange's time.
    pub(crate) fn begin_call(
        &self,
        bot: &BotId,
        id: &RequestId,
        endpoint: Option<&Endpoint>,
        claims: &mut Claims,
        now_ms: i64,
    ) {
        // A call and its claim have the same time.
        let at_ms = if claims.is_empty() {
            now_ms
        } else {
            claims.at_ms
        };
        let is_opaque = claims.orders.len() > 1 || !claims.is_empty() && claims.uid.is_none();
        let keys: Vec<_> = claims.orders.iter().map(|(_, key)| *key).collect();
        claims.call = Some(self.add_call(bot, id, endpoint, (&keys, is_opaque), at_ms));
    }

    /// `claims`: of its orders, and whether they do not show what became of it.
    pub(super) fn add_call(
        &self,
        bot: &BotId,
        id: &RequestId,
        endpoint: Option<&Endpoint>,
        (claims, is_opaque): (&[ClaimKey], bool),
        at_ms: i64,
    ) -> CallHandle {
        let call = Call {
            key: self.call_key(id),
            claim: claims.first().copied().filter(|_| !is_opaque),
            is_opaque,
            endpoint: number(endpoint),
            at_s: seconds(at_ms),
            state: CallState::InFlight,
        };
        self.calls.lock().begin(bot, call)
    }

    fn call_key(&self, id: &RequestId) -> ClaimKey {
        self.request_ids
            .each_ref()
            .map(|hash| hash.hash_one(id.as_str()))
    }

    /// Records the outcome of a call, before its claims are freed: a lookup takes a freed claim for proof that the call was not
    /// executed.
    pub(crate) fn end_call(&self, claims: &Claims, outcome: Option<Outcome>) {
        if let Some(call) = claims.call {
            self.calls.lock().set(call, outcome.into());
        }
    }

    /// What is known about the newest call of `bot` with this request id that left.
    pub(crate) fn known_call(&self, bot: &BotId, id: &RequestId, now_ms: i64) -> Known {
        let now = seconds(now_ms);
        let readiness = self.readiness();
        // The newest calls are read last.
        if readiness == Readiness::Reading {
            return KnownState::Unknown.into();
        }
        let key = self.call_key(id);
        // Held, so that the call and its claim are read at the same time.
        let calls = self.calls.lock();
        let Some(call) = calls.find(bot, key, now) else {
            return KnownState::Unknown.into();
        };
        let guard = self.guard.lock();
        let claim = call.claim.and_then(|key| guard.find(key, now));
        let is_complete = readiness == Readiness::Ready && guard.is_complete(now);
        drop(guard);
        drop(calls);
        let is_claimed = claim.is_some();
        // A later call may have the claim.
        let own_claim = claim.filter(|claim| claim.at_s == call.at_s);
        let state = match (call.state, own_claim) {
            (CallState::Accepted | CallState::InFlight | CallState::MaybeSent, Some(claim)) => {
                return claim.into();
            }
            (CallState::Accepted, None) => KnownState::Accepted,
            (CallState::Rejected, _) => KnownState::Rejected,
            (CallState::InFlight, None) if call.claim.is_none() => KnownState::InFlight,
            (CallState::MaybeSent, None) if call.claim.is_none() => KnownState::MaybeSent,
            // It did not leave, or its claim was freed since. Another call may have placed the order.
            _ if is_claimed || call.is_opaque || !is_complete => KnownState::Unknown,
            _ => KnownState::NotPlaced,
        };
        Known {
            endpoint: Catalog::get().by_number(call.endpoint),
            ..state.into()
        }
    }

    /// What is known about the order with this clientOid.
    pub(crate) fn known_order(
        &self,
        account: &AccountId,
        scope: Scope,
        client_oid: &str,
        now_ms: i64,
    ) -> Known {
        let now = seconds(now_ms);
        let readiness = self.readiness();
        // The results of calls are read after the calls.
        if readiness == Readiness::Reading {
            return KnownState::Unknown.into();
        }
        let uid = self.uid(account, scope);
        let keys = self.keys(account, scope, &[client_oid]);
        let guard = self.guard.lock();
        let mut keys = keys.iter().flatten();
        match keys.find_map(|key| guard.find(*key, now)) {
            Some(claim) => claim.into(),
            // Without the uid, a claim through another name of the same account is not found.
            None if readiness == Readiness::Ready && guard.is_complete(now) && uid.is_some() => {
                KnownState::NotPlaced.into()
            }
            None => KnownState::Unknown.into(),
        }
    }
}

/// The position of an endpoint in the catalogue; none has the last one.
pub(super) fn number(endpoint: Option<&Endpoint>) -> u16 {
    endpoint.map_or(u16::MAX, |endpoint| endpoint.number)
}
