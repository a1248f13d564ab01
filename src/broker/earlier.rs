//! Looks up orders of earlier runs that may have been placed: the audit log has their intent, but not what became of them.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::Broker;
use super::resolve::OpenOrder;
use crate::base::ids::RequestId;
use crate::kucoin::lookup::Lookup;
use crate::orders::Settled;
use crate::orders::replay::EarlierCall;

/// How often is checked whether an order can be looked up: whether a start has got its key and the exchange's time.
const CHECK_EVERY: Duration = Duration::from_millis(250);

impl Broker {
    /// Records calls of earlier runs that have no result, and looks up their orders, and those of calls that were `maybe_sent`.
    pub(crate) fn resolve_earlier(self: &Arc<Self>, calls: &[EarlierCall]) {
        let (mut without_result, mut orders) = (0_usize, Vec::new());
        for call in calls {
            if !call.has_outcome {
                without_result += 1;
                drop(self.audit.unresolved(call));
            }
            orders.extend(self.open_orders(call));
        }
        self.metrics.unresolved.inc_by(without_result as u64);
        if without_result > 0 {
            tracing::warn!(
                count = without_result,
                "an earlier run ended before it had the results of these requests; the audit log lists them as maybe_sent"
            );
        }
        if !orders.is_empty() {
            let count = orders.len();
            tracing::info!(
                count,
                "orders of earlier runs that may have been placed are looked up"
            );
        }
        for (order, lookup) in orders {
            let stopped = self.calls.give_up.clone();
            let resolve = Arc::clone(self).look_up_earlier(order, lookup);
            tokio::spawn(async move { stopped.run_until_cancelled(resolve).await });
        }
    }

    /// The orders of a call that may have been placed. Those that cannot be looked up any more are unknown.
    fn open_orders(&self, call: &EarlierCall) -> Vec<(OpenOrder, Lookup)> {
        let mut orders = Vec::new();
        for (record, claim) in call.open_orders() {
            let policy = self.policy();
            let (account, lookup) = (
                policy.account(&call.account),
                Lookup::of_record(call.endpoint, record),
            );
            let (Some(account), Some(lookup)) = (account, lookup) else {
                self.orders.settle(&claim, |_| Settled::Unknown);
                continue;
            };
            let context = call.context();
            let order = OpenOrder {
                client_oid: record.client_oid.clone(),
                // If the account has had several keys, it is not known which one has signed.
                uid: claim
                    .uid()
                    .filter(|_| self.orders.has_one_uid(&call.account, call.scope))
                    .map(str::to_owned),
                claim,
                signed_ms: None,
                created_from_ms: call.exchange_ms,
                host_id: (account.site, call.scope.host()),
                endpoint: call.endpoint,
                principal: call.principal.clone(),
                account: call.account.clone(),
                scope: call.scope,
                request_id: call.request_id.clone(),
                call: context.call,
                earlier_run: context.earlier_run.map(str::to_owned),
            };
            orders.push((order, lookup));
        }
        orders
    }

    /// Looks an order up, in turn with those of this run.
    async fn look_up_earlier(self: Arc<Self>, mut order: OpenOrder, lookup: Lookup) {
        order.signed_ms = Some(self.latest_signature(&order, &lookup).await);
        let limits = self.lookups.of(&order.account, order.host_id);
        let Ok(waiting) = Arc::clone(&limits.earlier).acquire_owned().await else {
            return;
        };
        let (reply, _) = oneshot::channel();
        self.resolve_order(order, lookup, waiting, reply).await;
    }

    /// Waits until an order can be looked up. Returns a time after the last timestamp that its run can have signed: now, since
    /// that run has ended.
    async fn latest_signature(&self, order: &OpenOrder, lookup: &Lookup) -> i64 {
        let request = lookup.request(order.account.clone(), RequestId::random());
        loop {
            let time = self.clock.exchange(order.host_id);
            if let Some(uncertainty) = time.uncertainty
                && self.uid_of_lookup(&request).is_some()
            {
                let uncertainty_ms = i64::try_from(uncertainty.as_millis()).unwrap_or(i64::MAX);
                return time.ms.saturating_add(uncertainty_ms);
            }
            sleep(CHECK_EVERY).await;
        }
    }
}
