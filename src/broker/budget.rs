//! The rate budgets of a call: which ones it needs, how long it waits for them, and what its answer says about them.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Broker, BrokerError, Call, Receipt};
use crate::base::outcome::Outcome;
use crate::budgets::{BudgetRequest, Charge, Priority, Subject};
use crate::kucoin::cancel_scope::{CancelScope, PendingOrders};
use crate::kucoin::quota::{Cost, Pool, WINDOW};
use crate::kucoin::{Answer, Endpoint, Scope, code, open_orders};
use crate::orders::OrderState;
use crate::policy::Permit;

/// How long a cancel waits for an order that it names by clientOid and that is in flight.
const OWN_ORDER_WITHIN: Duration = Duration::from_millis(200);

impl Broker {
    /// Takes the part of the rate budgets that a call needs, before its intent is recorded. It waits for at most `max_wait_ms`
    /// of its grant, and never past `not_after_ms`; a cancel, and a request of the broker or of an admin, until its deadline.
    ///
    /// # Errors
    /// When it does not fit in time, or the call ends meanwhile.
    pub(super) async fn take_budget(
        &self,
        call: &Call,
        permit: &Permit,
        reply: &mut oneshot::Sender<Result<Receipt, BrokerError>>,
    ) -> Result<Charge, BrokerError> {
        let request = self.budget_request(call, permit);
        if let Some(endpoint) = permit.endpoint()
            && let Some(cancel) = CancelScope::of(endpoint, &call.request)
        {
            self.budgets.cancel_waiting(&request, &cancel);
            self.wait_for_own_orders(call, endpoint).await;
        }
        let until_deadline = call.deadline.saturating_duration_since(Instant::now());
        let patience = match request.priority {
            Priority::Cancel | Priority::Internal => until_deadline,
            _ => permit.max_wait().min(until_deadline),
        };
        let patience = match call.not_after_ms {
            Some(not_after_ms) if permit.increases_risk() => {
                let latest_ms = self.clock.exchange(permit.destination()).latest_ms();
                let left_ms = not_after_ms.saturating_sub(latest_ms);
                patience.min(Duration::from_millis(
                    left_ms.try_into().unwrap_or_default(),
                ))
            }
            _ => patience,
        };
        // Another call can have begun to wait since the first check.
        if let Some(repeated) = self.waiting_order(call, permit.endpoint()) {
            return Err(BrokerError::Repeated(repeated));
        }
        if request.cost.is_weight_assumed {
            self.metrics.weights_assumed.inc();
        }
        let orders = || PendingOrders::of(permit.endpoint()?, &call.request);
        let ends_with_caller = !permit.changes() || permit.increases_risk();
        tokio::select! {
            biased;
            taken = self.budgets.take(request, patience, orders) => Ok(taken?),
            () = reply.closed(), if ends_with_caller => Err(BrokerError::CallerGone),
            () = sleep_until(call.deadline) => Err(BrokerError::DeadlineExceeded),
            () = self.calls.give_up.cancelled() => Err(BrokerError::ShuttingDown),
        }
    }

    /// Waits until the orders that a cancel names by clientOid are not in flight any more, so that it does not arrive before them;
    /// for at most [`OWN_ORDER_WITHIN`].
    async fn wait_for_own_orders(&self, call: &Call, endpoint: &Endpoint) {
        let (account, scope) = (&call.request.account, call.request.scope);
        let oids = endpoint.client_oids(&call.request);
        let is_in_flight = |oid: &&str| {
            let claimed = self.orders.claimed(account, scope, oid);
            claimed.is_some_and(|(state, _)| state == OrderState::InFlight)
        };
        let ended = async {
            loop {
                let settled = self.orders.settled();
                if !oids.iter().any(is_in_flight) {
                    return;
                }
                settled.await;
            }
        };
        let left = call.deadline.saturating_duration_since(Instant::now());
        let _ = timeout(OWN_ORDER_WITHIN.min(left / 2), ended).await;
    }

    fn budget_request(&self, call: &Call, permit: &Permit) -> BudgetRequest {
        let (account, endpoint) = (permit.account(), permit.endpoint());
        let mut cost = Cost::of(endpoint, permit.scope());
        // A key under test can belong to another account.
        cost.is_pool_assumed |= call.key.is_some();
        let priority = match call.principal.bot() {
            _ if self.passes_like_a_cancel(&call.request, endpoint) => Priority::Cancel,
            None => Priority::Internal,
            Some(_) if endpoint.is_some_and(open_orders::is_read_by) => Priority::OpenOrders,
            Some(_) if permit.increases_risk() => Priority::RiskIncreasing,
            Some(_) => Priority::Other,
        };
        let uid = self.uid_of_key(permit);
        let of_master = account.parent_uid.clone();
        let of_master = of_master.filter(|_| cost.pool == Pool::Unified);
        let subject = match (cost.pool, of_master.or_else(|| uid.clone())) {
            (Pool::Public, _) => Subject::Address,
            (_, Some(uid)) => Subject::Uid(uid),
            (_, None) => Subject::Account(account.id.clone()),
        };
        let bot = call.principal.bot();
        BudgetRequest {
            subject,
            account: account.id.clone(),
            uid,
            cost,
            vip: account.vip,
            bot: bot.map(|bot| (bot.clone(), permit.weight())),
            requests_per_s: permit.requests_per_s(),
            priority,
        }
    }

    /// The edge of the exchange has answered a request that was sent at `sent_at` (time since boot): it blocks the egress address
    /// for `time`.
    pub(super) fn edge_blocked(&self, time: Duration, sent_at: Duration) {
        if self.budgets.edge_blocked(time, sent_at) {
            self.metrics.edge_blocks.inc();
            tracing::warn!(
                retry_after_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
                "exchange blocks the egress address for too many requests; until then only one cancel per second is sent"
            );
        }
    }

    /// Applies an answer to the budgets.
    pub(super) fn apply_to_budgets(&self, charge: &mut Charge, permit: &Permit, answer: &Answer) {
        if let Some(time) = answer.edge_block() {
            charge.not_counted();
            if let Some(sent_at) = charge.sent_at() {
                self.edge_blocked(time, sent_at);
            }
            return;
        }
        if answer.outcome != Outcome::Rejected {
            charge.answered(answer.rate_limit);
            return;
        }
        let is_limited = answer.code == code::RATE_LIMITED || answer.is_unreadable_429();
        if is_limited {
            self.metrics.rate_limited_by_exchange.inc();
        }
        // The exchange is overloaded, which its code of a rate limit means, too, if there are no headers.
        let is_overloaded = code::BUSY.contains(&answer.code.as_str());
        match answer.rate_limit {
            Some(limit) if is_limited => {
                charge.answered(Some(limit));
                charge.used_up(limit.reset);
            }
            None if is_limited => charge.not_counted(),
            _ if is_overloaded => charge.not_counted(),
            limit => charge.answered(limit),
        }
        if answer.code == code::FUTURES_RATE_LIMITED && permit.scope() == Scope::Futures {
            charge.blocked(answer.retry_after.unwrap_or(WINDOW));
        }
    }
}
