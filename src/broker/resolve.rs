//! Looks up orders that may have been placed, over the normal request path; `orders/resolve.rs` decides what the answers prove.
//!
//! An order is looked up once its call has a result: from then on nothing of the call is sent, and its connection is closed or
//! has delivered a complete answer. Lookups have limits of their own, so that they leave bots their rate limits at the
//! exchange. A stop ends them; the next start goes on (`earlier.rs`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::Instrument;

use super::claims::became;
use super::ending::outcome_and_reason;
use super::gate::Gate;
use super::{Broker, BrokerError, Call, Receipt};
use crate::audit::CallContext;
use crate::base::ids::{AccountId, Principal, RequestId};
use crate::base::lock::Mutex;
use crate::base::outcome::Outcome;
use crate::clock::HostId;
use crate::kucoin::lookup::{Lookup, LookupResult};
use crate::kucoin::placement::{Placement, placements};
use crate::kucoin::{Answer, BatchItem, Endpoint, Scope, UnsignedRequest, code};
use crate::orders::resolve::{FIRST_WAIT, Next, Resolution, Resolver, SentLookup, SignedFor};
use crate::orders::{Claims, Repeated, Settled};
use crate::policy::Permit;

/// Orders of one account and host that wait until they are resolved. More than that are unknown at once.
const WAITING: usize = 1000;

/// Lookups of one account and host at the same time.
const AT_ONCE: usize = 8;

/// The least time between two of them: at most 5 per second, a fraction of what KuCoin allows each account.
const EVERY: Duration = Duration::from_millis(200);

/// How long a call waits for the lookup of an earlier order with its clientOid.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// The limits of lookups: of each account and host their own, as at KuCoin, so that one account takes nothing from another.
#[derive(Debug, Default)]
pub(crate) struct LookupLimits(Mutex<HashMap<(AccountId, HostId), Arc<AccountLimits>>>);

/// The limits of the lookups of one account and host.
#[derive(Debug)]
pub(super) struct AccountLimits {
    waiting: Arc<Semaphore>,
    /// Orders of earlier runs, so that these take nothing from those of this run.
    pub(super) earlier: Arc<Semaphore>,
    at_once: Semaphore,
    /// When the next one may be sent.
    next: Mutex<Instant>,
}

impl LookupLimits {
    pub(super) fn of(&self, account: &AccountId, host_id: HostId) -> Arc<AccountLimits> {
        let mut limits = self.0.lock();
        let of = limits.entry((account.clone(), host_id));
        Arc::clone(of.or_default())
    }

    /// How many orders are being looked up.
    pub(crate) fn orders(&self) -> usize {
        let limits = self.0.lock();
        let of = limits.values().flat_map(|of| [&of.waiting, &of.earlier]);
        of.map(|of| WAITING.saturating_sub(of.available_permits()))
            .sum()
    }
}

impl Default for AccountLimits {
    fn default() -> Self {
        Self {
            waiting: Arc::new(Semaphore::new(WAITING)),
            earlier: Arc::new(Semaphore::new(WAITING)),
            at_once: Semaphore::new(AT_ONCE),
            next: Mutex::new(Instant::now()),
        }
    }
}

impl AccountLimits {
    /// Waits until one more lookup may be sent. It counts until the result drops.
    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        let turn = self.at_once.acquire().await.ok();
        while let Err(next) = self.try_turn() {
            sleep_until(next).await;
        }
        turn
    }

    /// Takes the turn, or says when the next one comes.
    fn try_turn(&self) -> Result<(), Instant> {
        let mut next = self.next.lock();
        if Instant::now() < *next {
            return Err(*next);
        }
        *next = Instant::now() + EVERY;
        Ok(())
    }

    /// Sends none for this long, as the exchange requires.
    fn pause(&self, time: Duration) {
        let mut next = self.next.lock();
        *next = (*next).max(Instant::now() + time);
    }
}

/// A call whose orders may have been placed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended<'a> {
    pub(super) call: &'a Call,
    pub(super) number: u64,
    pub(super) permit: &'a Permit,
    pub(super) claims: &'a Claims,
    /// Has the timestamp that was signed last, and for which account.
    pub(super) gate: &'a Gate,
}

/// The orders of a call that may have been placed, in the order of the request.
#[derive(Debug, Default)]
pub(super) struct Resolving(Vec<(String, oneshot::Receiver<Resolution>)>);

/// What became of the orders of a call that may have been placed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ResolvedState {
    /// None was placed.
    Absent,
    /// At least one was placed, and what became of the others is known.
    Placed,
    /// It is unknown what became of at least one.
    Unknown,
}

impl ResolvedState {
    /// What it means for the bot.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::Absent => {
                "the exchange did not place the order and rejects this request from now on; its clientOid is free again: decide again whether to send the order"
            }
            Self::Placed => "a lookup found the order: it was placed or amended once",
            Self::Unknown => {
                "lookups did not show whether the order was placed; look it up, and do not send it again"
            }
        }
    }
}

/// The resolution of a call.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    /// What became of its orders.
    pub(crate) state: ResolvedState,
    /// The exchange's id of its only order.
    pub(crate) order_id: Option<String>,
    /// Whether the exchange has answered the request.
    pub(crate) is_answered: bool,
}

/// An order that may have been placed.
#[derive(Debug)]
pub(super) struct OpenOrder {
    pub(super) client_oid: String,
    pub(super) claim: Claims,
    /// The exchange's id of its account, if it was known both for the claim and for the signature.
    pub(super) uid: Option<String>,
    /// The timestamp that was signed last, or later; `None`: the exchange has an earlier order with this clientOid.
    pub(super) signed_ms: Option<i64>,
    /// The timestamp that was signed, or earlier; 0: an earlier order is looked up.
    pub(super) created_from_ms: i64,
    pub(super) host_id: HostId,
    pub(super) endpoint: &'static Endpoint,
    pub(super) principal: Principal,
    pub(super) account: AccountId,
    pub(super) scope: Scope,
    pub(super) request_id: RequestId,
    pub(super) call: u64,
    /// The run of the call, if it was an earlier one.
    pub(super) earlier_run: Option<String>,
}

impl Broker {
    /// Records what became of the orders of a call, and starts to look up those that may have been placed. The line of the result
    /// must be on its way to the audit log: once a clientOid is free, another call can use it.
    pub(super) fn settle(
        self: &Arc<Self>,
        ended: Ended<'_>,
        result: &Result<Receipt, BrokerError>,
    ) -> Resolving {
        let mut resolving = Resolving::default();
        let outcome = match result {
            Err(BrokerError::Repeated(_)) => Some(Outcome::Rejected),
            result => outcome_and_reason(result).0,
        };
        self.orders.end_call(ended.claims, outcome);
        let is_amendment = ended.permit.endpoint().is_some_and(Endpoint::amends);
        if ended.claims.is_empty() && !is_amendment {
            return resolving;
        }
        self.orders.settle(ended.claims, |oid| became(result, oid));
        let is_in_flight = matches!(result, Err(BrokerError::AnswerLate));
        let is_open = |oid: &str| became(result, oid) == Settled::MaybeSent;
        let Some(endpoint) = ended.permit.endpoint().filter(|_| !is_in_flight) else {
            return resolving;
        };
        let is_any_open = ended.claims.client_oids().any(is_open) || is_amendment && is_open("");
        if !is_any_open {
            return resolving;
        }
        let Ok(placements) = placements(endpoint, &ended.call.request) else {
            // Nothing can be looked up.
            self.orders
                .settle(ended.claims, |oid| match became(result, oid) {
                    Settled::MaybeSent => Settled::Unknown,
                    known => known,
                });
            return resolving;
        };
        for placement in placements {
            let is_open = match &placement.client_oid {
                Some(client_oid) => is_open(client_oid),
                // It is not looked up.
                None => is_amendment || is_open_without_client_oid(result),
            };
            if is_open {
                let resolution = self.resolve(ended, endpoint, &placement, result);
                let client_oid = placement.client_oid.unwrap_or_default();
                resolving.0.push((client_oid, resolution));
            }
        }
        resolving
    }

    /// Starts to look an order up, if it can be.
    fn resolve(
        self: &Arc<Self>,
        ended: Ended<'_>,
        endpoint: &'static Endpoint,
        placement: &Placement,
        result: &Result<Receipt, BrokerError>,
    ) -> oneshot::Receiver<Resolution> {
        let (reply, resolution) = oneshot::channel();
        let client_oid = placement.client_oid.as_deref().unwrap_or_default();
        let claim = ended.claims.of(client_oid);
        let &Ended { call, permit, .. } = &ended;
        let is_duplicate = is_duplicate_item(endpoint, result, client_oid);
        let signed_ms = ended.gate.signed_ms();
        let uid = ended.gate.signed_for();
        let order = OpenOrder {
            client_oid: client_oid.to_owned(),
            claim,
            uid: uid.filter(|uid| ended.claims.uid() == Some(uid)),
            signed_ms: (!is_duplicate).then_some(signed_ms),
            created_from_ms: signed_ms,
            host_id: permit.destination(),
            endpoint,
            principal: call.principal.clone(),
            account: call.request.account.clone(),
            scope: call.request.scope,
            request_id: call.request.id.clone(),
            call: ended.number,
            earlier_run: None,
        };
        let limits = self.lookups.of(&order.account, order.host_id);
        let waiting = Arc::clone(&limits.waiting).try_acquire_owned();
        let why = match (Lookup::new(endpoint, placement), waiting) {
            (Some(lookup), Ok(waiting)) => {
                let resolve = Arc::clone(self).resolve_order(order, lookup, waiting, reply);
                tokio::spawn(resolve.in_current_span());
                return resolution;
            }
            (Some(_), Err(_)) => format!("{WAITING} other orders are waiting to be looked up"),
            (None, _) => "no lookup finds it".to_owned(),
        };
        let unknown = Resolution::Unknown(why);
        self.record_resolution(&order, &unknown);
        let _ = reply.send(unknown);
        resolution
    }

    /// Looks an order up until it is known what became of it, or a stop ends that.
    pub(super) async fn resolve_order(
        self: Arc<Self>,
        order: OpenOrder,
        lookup: Lookup,
        _waiting: OwnedSemaphorePermit,
        reply: oneshot::Sender<Resolution>,
    ) {
        let limits = self.lookups.of(&order.account, order.host_id);
        let resolve = async {
            let mut resolver = Resolver::new(order.signed_ms, order.endpoint.amends());
            let mut wait = FIRST_WAIT;
            loop {
                sleep(wait).await;
                let turn = limits.turn().await;
                let (sent, result) = self.look_up(&order, &lookup).await;
                drop(turn);
                match resolver.next(sent, result) {
                    Next::AskAgain(next) => wait = next,
                    Next::Resolved(resolution) => break resolution,
                }
            }
        };
        let resolution = tokio::select! {
            biased;
            () = self.calls.give_up.cancelled() => return,
            resolution = resolve => resolution,
        };
        self.record_resolution(&order, &resolution);
        let _ = reply.send(resolution);
    }

    /// Sends one lookup. Boxed, since calls wait for lookups, and lookups are calls.
    fn look_up<'a>(
        self: &'a Arc<Self>,
        order: &'a OpenOrder,
        lookup: &'a Lookup,
    ) -> BoxFuture<'a, (SentLookup, LookupResult)> {
        async move {
            let request = lookup.request(order.account.clone(), RequestId::random());
            let uid_before = self.uid_of_lookup(&request);
            let exchange = self.clock.exchange(order.host_id);
            let sent = self.clock.boot();
            let answered = self
                .send_request(Principal::Broker, request.clone(), None)
                .await;
            let result = match answered {
                Ok(receipt) => {
                    if let Some(time) = receipt.answer.retry_after {
                        let limits = self.lookups.of(&order.account, order.host_id);
                        limits.pause(time);
                    }
                    let (now_ms, from_ms) = (exchange.ms, order.created_from_ms);
                    lookup.judge(&receipt.answer, now_ms, from_ms, &self.not_found)
                }
                Err(error) => LookupResult::Unclear(error.of_repeatable_request()),
            };
            let uids = [uid_before, self.uid_of_lookup(&request)];
            let sent = SentLookup {
                sent,
                answered: self.clock.boot(),
                exchange,
                signed_for: signed_for(order.uid.as_deref(), &uids),
            };
            (sent, result)
        }
        .boxed()
    }

    /// The exchange's id of the account whose key the rules name for a lookup, if a key test has reported it.
    pub(super) fn uid_of_lookup(&self, request: &UnsignedRequest) -> Option<String> {
        let permit = self.policy().authorize(&Principal::Broker, request);
        self.uid_of_key(&permit.ok()?)
    }

    /// Audits, logs and counts what became of an order, and updates its claim: after the line is on its way to the audit log, so
    /// that the intent of another order with this clientOid comes after it.
    fn record_resolution(&self, order: &OpenOrder, resolution: &Resolution) {
        let context = CallContext {
            principal: &order.principal,
            request_id: &order.request_id,
            call: order.call,
            earlier_run: order.earlier_run.as_deref(),
            account_and_scope: Some((&order.account, order.scope)),
        };
        let endpoint = order.endpoint.id.as_str();
        let line = self
            .audit
            .resolved(&context, endpoint, &order.client_oid, resolution);
        // It is written even if nobody waits for it.
        drop(line);
        self.orders.settle(&order.claim, |_| match resolution {
            Resolution::Placed(id) => Settled::Accepted(Some(id.clone())),
            Resolution::Absent => Settled::NotPlaced,
            Resolution::Unknown(_) => Settled::Unknown,
        });
        self.metrics.order_resolved(resolution.as_str());
        let (account, scope, state) = (&order.account, order.scope, resolution.as_str());
        if let Resolution::Unknown(why) = resolution {
            tracing::warn!(account.id = %account, %scope, endpoint, state, exception.message = why, "cannot resolve order that may have been placed; look it up");
        } else {
            tracing::info!(account.id = %account, %scope, endpoint, state, "order resolved");
        }
    }

    /// Waits until the orders of a call that may have been placed are resolved, if its bot has asked for that: for as long as it
    /// has asked for, and not beyond its deadline. Returns the result for the bot: the same if they are not resolved by then.
    pub(super) async fn wait_for_resolution(
        &self,
        ended: Ended<'_>,
        mut result: Result<Receipt, BrokerError>,
        resolving: Resolving,
        gone: impl Future<Output = ()>,
    ) -> Result<Receipt, BrokerError> {
        let call = ended.call;
        if call.resolve_within.is_zero() || resolving.0.is_empty() {
            return result;
        }
        if let Ok(receipt) = &mut result {
            // A key that is removed meanwhile must not stay in memory.
            receipt.lease = None;
        }
        let until = call.deadline.min(Instant::now() + call.resolve_within);
        let (oids, resolutions): (Vec<_>, Vec<_>) = resolving.0.into_iter().unzip();
        let resolutions = tokio::select! {
            biased;
            resolutions = timeout_at(until, join_all(resolutions)) => resolutions,
            () = gone => return result,
        };
        // Without an answer: the broker stops.
        let resolutions: Option<Vec<_>> = resolutions
            .ok()
            .and_then(|all| all.into_iter().map(Result::ok).collect());
        match resolutions {
            Some(resolutions) => Ok(resolved(ended, result, oids.into_iter().zip(resolutions))),
            None => result,
        }
    }

    /// Whether the exchange has rejected the only order of a call because an earlier one has its clientOid.
    pub(super) fn is_duplicate(
        call: &Call,
        permit: &Permit,
        ended: &Result<Receipt, BrokerError>,
    ) -> bool {
        let (Ok(receipt), Some(endpoint)) = (ended, permit.endpoint()) else {
            return false;
        };
        let answer = &receipt.answer;
        answer.outcome == Outcome::Rejected
            && answer.items.is_empty()
            && endpoint.claims_client_oids()
            && call.principal.bot().is_some()
            && code::is_duplicate_client_oid(endpoint.product, &answer.code, &answer.msg)
    }

    /// The error for a call whose order the exchange has rejected because an earlier one has its clientOid: what a lookup finds of
    /// that. Boxed like [`Self::look_up`].
    pub(super) fn earlier_order<'a>(
        self: &'a Arc<Self>,
        call: &'a Call,
        permit: &'a Permit,
        rejected: Result<Receipt, BrokerError>,
    ) -> BoxFuture<'a, Result<Receipt, BrokerError>> {
        async move {
            let mut rejected = rejected?;
            let endpoint = permit.endpoint().ok_or(BrokerError::Internal)?;
            let placements = placements(endpoint, &call.request).unwrap_or_default();
            let [placement] = &placements[..] else {
                // A batch as a whole: the answer does not say which order it is about.
                rejected.answer.outcome = Outcome::MaybeSent;
                return Ok(rejected);
            };
            let client_oid = placement.client_oid.as_deref().unwrap_or_default();
            let order = OpenOrder {
                client_oid: client_oid.to_owned(),
                claim: Claims::default(),
                uid: None,
                signed_ms: None,
                created_from_ms: 0,
                host_id: permit.destination(),
                endpoint,
                principal: call.principal.clone(),
                account: call.request.account.clone(),
                scope: call.request.scope,
                request_id: call.request.id.clone(),
                call: 0,
                earlier_run: None,
            };
            let found = match &Lookup::new(endpoint, placement) {
                None => None,
                Some(lookup) => {
                    let answer = async {
                        let limits = self.lookups.of(&order.account, order.host_id);
                        let _turn = limits.turn().await;
                        self.look_up(&order, lookup).await.1
                    };
                    timeout(ANSWER_WITHIN, answer).await.ok()
                }
            };
            let order_id = match found {
                Some(LookupResult::Found { order_id, .. }) => Some(order_id),
                _ => None,
            };
            let earlier = Repeated::at_exchange(client_oid, order_id);
            Err(BrokerError::Repeated(Box::new(earlier)))
        }
        .boxed()
    }
}

/// For which account a lookup was signed, by the accounts of the key before and after it.
fn signed_for(of_order: Option<&str>, uids: &[Option<String>; 2]) -> SignedFor {
    let Some(of_order) = of_order else {
        return SignedFor::Untested;
    };
    if uids.iter().flatten().any(|uid| uid != of_order) {
        SignedFor::Other
    } else if uids.iter().all(Option::is_some) {
        SignedFor::Same
    } else {
        SignedFor::Untested
    }
}

/// Whether an order without a clientOid may have been placed.
fn is_open_without_client_oid(result: &Result<Receipt, BrokerError>) -> bool {
    match result {
        Ok(Receipt { answer, .. }) if !answer.items.is_empty() => {
            let mut items = answer.items.iter();
            items.any(|item| item.client_oid.is_empty() && item.outcome == Outcome::MaybeSent)
        }
        result => became(result, "") == Settled::MaybeSent,
    }
}

/// Whether the exchange has rejected an order of a batch because an earlier one has its clientOid, or a whole batch for that.
fn is_duplicate_item(
    endpoint: &Endpoint,
    result: &Result<Receipt, BrokerError>,
    client_oid: &str,
) -> bool {
    let Ok(Receipt { answer, .. }) = result else {
        return false;
    };
    let is = |code: &str, msg: &str| code::is_duplicate_client_oid(endpoint.product, code, msg);
    let mut items = answer.items.iter();
    is(&answer.code, &answer.msg)
        || items.any(|item| item.client_oid == client_oid && is(&item.code, &item.msg))
}

/// The result for the bot once the orders of its call are resolved.
fn resolved(
    ended: Ended<'_>,
    result: Result<Receipt, BrokerError>,
    orders: impl Iterator<Item = (String, Resolution)>,
) -> Receipt {
    let endpoint = ended.permit.endpoint();
    let form = endpoint.and_then(|endpoint| endpoint.order.as_ref());
    let is_batch = form.is_some_and(|form| form.results.is_some());
    let is_answered = result.is_ok();
    let mut receipt = result.unwrap_or_else(|_| Receipt {
        answer: Answer::missing(),
        resolution: None,
        endpoint,
        scope: ended.permit.scope(),
        timestamp_ms: ended.gate.signed_ms(),
        waiting: Duration::ZERO,
        signing: Duration::ZERO,
        exchange: Duration::ZERO,
        stale: Duration::ZERO,
        lease: None,
    });
    let (mut states, mut last_id) = (Vec::new(), None);
    let items = &mut receipt.answer.items;
    let is_listed = !items.is_empty();
    for (client_oid, resolution) in orders {
        let (state, outcome, order_id) = match resolution {
            Resolution::Absent => (ResolvedState::Absent, Outcome::Rejected, None),
            Resolution::Placed(id) => (ResolvedState::Placed, Outcome::Accepted, Some(id)),
            Resolution::Unknown(_) => (ResolvedState::Unknown, Outcome::MaybeSent, None),
        };
        states.push(state);
        if is_listed {
            let of_order = |item: &&mut BatchItem| {
                item.client_oid == client_oid && item.outcome == Outcome::MaybeSent
            };
            for item in items.iter_mut().filter(of_order) {
                item.outcome = outcome;
                item.order_id = order_id.clone().unwrap_or_default();
            }
        } else if is_batch {
            items.push(BatchItem {
                client_oid,
                order_id: order_id.clone().unwrap_or_default(),
                outcome,
                code: String::new(),
                msg: String::new(),
            });
        }
        last_id = order_id;
    }
    let has = |state| states.contains(&state);
    let (mut state, mut outcome) = if has(ResolvedState::Unknown) {
        (ResolvedState::Unknown, Outcome::MaybeSent)
    } else if has(ResolvedState::Placed) {
        (ResolvedState::Placed, Outcome::Accepted)
    } else {
        (ResolvedState::Absent, Outcome::Rejected)
    };
    let has_accepted = items.iter().any(|item| item.outcome == Outcome::Accepted);
    if state == ResolvedState::Absent && has_accepted {
        (state, outcome) = (ResolvedState::Placed, Outcome::Accepted);
    }
    receipt.answer.outcome = outcome;
    receipt.resolution = Some(Resolved {
        state,
        order_id: last_id.filter(|_| !is_batch),
        is_answered,
    });
    receipt
}
