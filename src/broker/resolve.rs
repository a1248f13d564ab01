//! Looks up orders that may have been placed, over the normal request path; `orders/resolve.rs` decides what the answers prove.
//!
//! An order is looked up once its call has a result: from then on nothing of the call is sent, and its connection is closed or
//! has delivered a complete answer. Lookups have limits of their own, so that they leave bots their rate limits at the
//! exchange. A stop ends them: the audit log has the order as `maybe_sent` then.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::Instrument;

use super::call::outcome_and_reason;
use super::claims::became;
use super::{Broker, BrokerError, Call, Receipt};
use crate::audit::CallContext;
use crate::base::ids::{AccountId, Principal, RequestId};
use crate::base::outcome::Outcome;
use crate::clock::HostId;
use crate::kucoin::lookup::{Lookup, LookupResult};
use crate::kucoin::placement::{Placement, placements};
use crate::kucoin::{Answer, BatchItem, Endpoint, Scope, UnsignedRequest, code};
use crate::orders::resolve::{FIRST_WAIT, Next, Resolution, Resolver, SentLookup, SignedFor};
use crate::orders::{Claims, Repeated, Settled};
use crate::policy::Permit;

/// Orders that wait until they are resolved. More than that are unknown at once.
const WAITING: usize = 1000;

/// Lookups at the same time.
const AT_ONCE: usize = 8;

/// The least time between two lookups: at most 5 per second.
const EVERY: Duration = Duration::from_millis(200);

/// Time limit of one lookup.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// The limits of lookups.
#[derive(Debug)]
pub(crate) struct LookupLimits {
    pub(super) waiting: Arc<Semaphore>,
    at_once: Semaphore,
    /// When the next one may be sent. The orders wait for it in turn.
    next: tokio::sync::Mutex<Instant>,
}

impl Default for LookupLimits {
    fn default() -> Self {
        Self {
            waiting: Arc::new(Semaphore::new(WAITING)),
            at_once: Semaphore::new(AT_ONCE),
            next: tokio::sync::Mutex::new(Instant::now()),
        }
    }
}

impl LookupLimits {
    /// How many orders are being looked up.
    pub(crate) fn orders(&self) -> usize {
        WAITING.saturating_sub(self.waiting.available_permits())
    }

    /// Waits until one more lookup may be sent. It counts until the result drops.
    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        let turn = self.at_once.acquire().await.ok();
        let mut next = self.next.lock().await;
        sleep_until(*next).await;
        *next = Instant::now() + EVERY;
        turn
    }
}

/// A call whose orders may have been placed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended<'a> {
    pub(super) call: &'a Call,
    pub(super) number: u64,
    pub(super) permit: &'a Permit,
    pub(super) claims: &'a Claims,
    /// The timestamp that was signed last, Unix milliseconds.
    pub(super) signed_ms: i64,
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
            Self::Placed => "a lookup found the order: it was placed once",
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
    pub(super) lookup: Lookup,
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
        self.orders
            .end_call(ended.claims, outcome_and_reason(result).0);
        if ended.claims.is_empty() {
            return resolving;
        }
        self.orders.settle(ended.claims, |oid| became(result, oid));
        let is_in_flight = matches!(result, Err(BrokerError::AnswerLate));
        let is_open = |oid: &str| became(result, oid) == Settled::MaybeSent;
        let Some(endpoint) = ended.permit.endpoint().filter(|_| !is_in_flight) else {
            return resolving;
        };
        if !ended.claims.client_oids().any(is_open) {
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
            // An order without one is not looked up.
            let client_oid = placement.client_oid.clone().unwrap_or_default();
            if is_open(&client_oid) {
                let resolution = self.resolve(ended, endpoint, &placement, result);
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
        let Some(lookup) = Lookup::new(endpoint, placement) else {
            self.orders.settle(&claim, |_| Settled::Unknown);
            let _ = reply.send(Resolution::Unknown("no lookup finds it".to_owned()));
            return resolution;
        };
        let &Ended { call, permit, .. } = &ended;
        let is_duplicate = is_duplicate_item(endpoint, result, client_oid);
        let signed_ms = (!is_duplicate).then_some(ended.signed_ms);
        let order = OpenOrder {
            client_oid: client_oid.to_owned(),
            claim,
            lookup,
            signed_ms,
            created_from_ms: signed_ms.unwrap_or_default(),
            host_id: permit.destination(),
            endpoint,
            principal: call.principal.clone(),
            account: call.request.account.clone(),
            scope: call.request.scope,
            request_id: call.request.id.clone(),
            call: ended.number,
            earlier_run: None,
        };
        if let Ok(waiting) = Arc::clone(&self.lookups.waiting).try_acquire_owned() {
            let resolve = Arc::clone(self).resolve_order(order, waiting, reply);
            tokio::spawn(resolve.in_current_span());
        } else {
            let why = format!("{WAITING} other orders are waiting to be looked up");
            let unknown = Resolution::Unknown(why);
            self.record_resolution(&order, &unknown);
            let _ = reply.send(unknown);
        }
        resolution
    }

    /// Looks an order up until it is known what became of it, or a stop ends that.
    pub(super) async fn resolve_order(
        self: Arc<Self>,
        order: OpenOrder,
        _waiting: OwnedSemaphorePermit,
        reply: oneshot::Sender<Resolution>,
    ) {
        let resolve = async {
            let mut resolver = Resolver::new(order.signed_ms);
            let mut wait = FIRST_WAIT;
            loop {
                sleep(wait).await;
                let turn = self.lookups.turn().await;
                let (sent, result) = self.look_up(&order).await;
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
    ) -> BoxFuture<'a, (SentLookup, LookupResult)> {
        async move {
            let request = order
                .lookup
                .request(order.account.clone(), RequestId::random());
            let uid_before = self.uid_of_lookup(&request);
            let exchange = self.clock.exchange(order.host_id);
            let (sent, arrived) = (self.clock.boot(), Instant::now());
            let answered = self
                .sign_and_send(Call {
                    principal: Principal::Broker,
                    request: request.clone(),
                    key: None,
                    arrived,
                    deadline: arrived + ANSWER_WITHIN,
                    not_after_ms: None,
                    resolve_within: Duration::ZERO,
                    slot: None,
                })
                .await;
            let result = match answered {
                Ok(receipt) => {
                    let from_ms = order.created_from_ms;
                    let (lookup, answer) = (&order.lookup, &receipt.answer);
                    lookup.judge(answer, from_ms, &self.not_found)
                }
                Err(error) => LookupResult::Unclear(error.of_repeatable_request()),
            };
            let uids = [uid_before, self.uid_of_lookup(&request)];
            let sent = SentLookup {
                sent,
                answered: self.clock.boot(),
                exchange,
                signed_for: signed_for(order.claim.uid(), &uids),
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
            let order = Lookup::new(endpoint, placement).map(|lookup| OpenOrder {
                client_oid: client_oid.to_owned(),
                claim: Claims::default(),
                lookup,
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
            });
            let found = match &order {
                None => None,
                Some(order) => {
                    let look_up = async {
                        let _turn = self.lookups.turn().await;
                        self.look_up(order).await.1
                    };
                    timeout(ANSWER_WITHIN, look_up).await.ok()
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
        timestamp_ms: ended.signed_ms,
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
    let (state, mut outcome) = if has(ResolvedState::Unknown) {
        (ResolvedState::Unknown, Outcome::MaybeSent)
    } else if has(ResolvedState::Placed) {
        (ResolvedState::Placed, Outcome::Accepted)
    } else {
        (ResolvedState::Absent, Outcome::Rejected)
    };
    let has_accepted = items.iter().any(|item| item.outcome == Outcome::Accepted);
    if outcome == Outcome::Rejected && has_accepted {
        outcome = Outcome::Accepted;
    }
    receipt.answer.outcome = outcome;
    receipt.resolution = Some(Resolved {
        state,
        order_id: last_id.filter(|_| !is_batch),
        is_answered,
    });
    receipt
}
