//! The request path: the parts that a call needs; `call.rs` runs it. Nothing here waits for Vault.
//!
//! The time limits of a call, in order:
//!
//! | Limit | Value | Where |
//! |---|---|---|
//! | the message arrives completely | `limits.request_timeout_ms` | `server/connection.rs` |
//! | the bot's deadline, counted from the arrival of the request headers | `grpc-timeout`, or `limits.default_deadline_ms` | `api/bots.rs` |
//! | the bot is answered this long before its deadline | 50 ms, or a tenth of the deadline if that is less | `api/bots.rs` |
//! | a risk-increasing request is written completely to its socket | `not_after_ms`, and the bot's deadline | `broker/not_after.rs`, `egress/send_guard.rs` |
//! | a request waits for its part of the rate budgets | `max_wait_ms` of its grant, and `not_after_ms` | `broker/budget.rs` |
//! | connect to the exchange, TLS included | `egress.connect_timeout_ms` | `egress.rs` |
//! | DNS lookup after a failed connect | 1 s | `egress.rs` |
//! | the complete answer of the exchange | `egress.answer_timeout_ms` | `egress.rs` |
//! | wait for the test of another key, after the exchange rejected the key | 5 s | `keyring.rs` |
//! | measure the exchange's time, after it rejected the timestamp | as for the broker's other time checks | `broker/probes.rs` |
//! | the orders of a call that may have been placed are resolved | `resolve_ms`, and the bot's deadline | `broker/resolve.rs` |
//! | the bot reads the whole answer | 30 s plus 1 s for each 256 KiB | `server/connection.rs` |
//! | calls in flight end after the broker begins to stop | `limits.drain_timeout_ms`; reads 1 s | `broker/drain.rs` |

pub(crate) mod admission;
pub(crate) mod answer_memory;
mod budget;
mod call;
mod claims;
pub(crate) mod dead_man;
pub(crate) mod drain;
mod earlier;
mod ending;
mod error;
mod feedback;
mod gate;
mod not_after;
mod outcomes;
pub(crate) mod probes;
pub(crate) mod resolve;
mod retry;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::{Audit, AuditLine, CallContext, CallEnd};
use crate::base::ids::{AccountId, AdminId, BotId, Principal, RequestId};
use crate::base::lock::RwLock;
use crate::base::outcome::Reason;
use crate::budgets::Budgets;
use crate::clock::Clock;
use crate::egress::Egress;
use crate::egress::proof::Proof;
use crate::keyring::Keyring;
use crate::kucoin::code::RefusalCodes;
use crate::kucoin::not_found::NotFoundAnswers;
use crate::kucoin::{Endpoint, UnsignedRequest};
use crate::orders::Orders;
use crate::policy::Policy;
use crate::restrictions::Restrictions;
use crate::telemetry::Metrics;

use admission::Admission;
pub(crate) use call::{Call, Receipt, catch_panic, micros};
use dead_man::DeadManSwitches;
use drain::{OpenCalls, Stage};
pub(crate) use error::{BrokerError, Overload};
pub(crate) use feedback::UnknownCodes;
use probes::RecheckSignals;
use resolve::LookupLimits;

/// Everything that a call needs.
#[derive(Debug)]
pub(crate) struct Broker {
    /// The current rules.
    pub(crate) policy: RwLock<Arc<Policy>>,
    /// The audit log.
    pub(crate) audit: Arc<Audit>,
    /// Blocks, halts and revocations.
    pub(crate) restrictions: Arc<Restrictions>,
    /// The keys.
    pub(crate) keyring: Arc<Keyring>,
    /// The connections to the exchange.
    pub(crate) egress: Egress,
    /// Whether requests leave from the expected egress address.
    pub(crate) proof: Proof,
    /// The system's and the exchange's time.
    pub(crate) clock: Arc<Clock>,
    /// Requests an early check of the egress address or of the exchange's time.
    pub(crate) rechecks: RecheckSignals,
    /// The metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// The limits of connections and calls.
    pub(crate) admission: Admission,
    /// Calls in flight.
    pub(crate) calls: Calls,
    /// The clientOids that have been used.
    pub(crate) orders: Orders,
    /// What may be sent to the exchange within its rate limits.
    pub(crate) budgets: Arc<Budgets>,
    /// The limits of lookups of orders that may have been placed.
    pub(crate) lookups: LookupLimits,
    /// The answers to lookups that mean "no such order".
    pub(crate) not_found: NotFoundAnswers,
    /// KuCoin's dead-man switches, as set by bots.
    pub(crate) dead_man: DeadManSwitches,
    /// Codes that the configuration adds to the known refusal codes.
    pub(crate) refusal_codes: RefusalCodes,
    /// Unknown codes that have been logged.
    pub(crate) unknown_codes: UnknownCodes,
}

/// Calls in flight, and how they end when the broker stops.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    count: AtomicU64,
    tasks: TaskTracker,
    stage: watch::Sender<Stage>,
    /// Those that were admitted before the stop began.
    open: OpenCalls,
    /// Those that were admitted in its first step, and later.
    late: OpenCalls,
    last: OpenCalls,
    give_up: CancellationToken,
    /// Calls that ended as `maybe_sent` after the stop began.
    unresolved: AtomicU64,
    /// Risk-increasing calls in flight per account: a halt waits until they have ended.
    risk_increasing: watch::Sender<BTreeMap<AccountId, u64>>,
}

impl Calls {
    /// The number of the next call in this run.
    fn next_number(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }
}

impl Broker {
    /// Returns the current rules.
    pub(crate) fn policy(&self) -> Arc<Policy> {
        let policy = self.policy.read();
        Arc::clone(&policy)
    }

    /// Replaces the rules. Calls in flight check them once more before they send.
    pub(crate) fn set_policy(&self, policy: Arc<Policy>) {
        self.orders.share(policy.bots_count());
        *self.policy.write() = policy;
    }

    /// Whether a request passes like a cancel: it cancels orders, or keeps the protection of KuCoin's dead-man switch.
    pub(crate) fn is_cancel(&self, request: &UnsignedRequest) -> bool {
        self.passes_like_a_cancel(request, request.endpoint())
    }

    /// The same for a request whose endpoint is known.
    pub(crate) fn passes_like_a_cancel(
        &self,
        request: &UnsignedRequest,
        endpoint: Option<&Endpoint>,
    ) -> bool {
        endpoint.is_some_and(Endpoint::is_cancel) || self.dead_man.is_renewal(request, endpoint)
    }

    /// Whether one more refusal of this caller is audited and logged; counts it if not. A caller in a loop must not fill the
    /// disk.
    fn may_record_refusal(&self, principal: &Principal) -> bool {
        let may_record = self.admission.record_refusal(principal, self.clock.boot());
        if !may_record {
            self.metrics.refusals_unrecorded.inc();
        }
        may_record
    }

    /// Counts, logs and audits a call that was refused before it ran (malformed, over a limit). Returns its error.
    pub(crate) async fn refuse(
        &self,
        bot: &BotId,
        request_id: &RequestId,
        error: BrokerError,
    ) -> BrokerError {
        let reason = error.reason();
        self.metrics.request(None, reason.outcome(), Some(reason));
        let principal = Principal::Bot(bot.clone());
        if !self.may_record_refusal(&principal) {
            return error;
        }
        let detail = error.audit_detail();
        tracing::info!(request.id = %request_id, bot.id = %bot, outcome = reason.outcome().map(tracing::field::display), %reason, detail, "call ended");
        let line = self.audit_refusal(&principal, request_id, reason, detail);
        line.written().await;
        error
    }

    /// Counts and audits a call of `admin` that was refused before it ran.
    pub(crate) async fn refuse_admin(&self, admin: &AdminId, reason: Reason, detail: String) {
        let labels = [("reason", reason.as_str())];
        let refused = &self.metrics.admin_calls_refused;
        refused.get_or_create(&labels).inc();
        let principal = Principal::Admin(admin.clone());
        if self.may_record_refusal(&principal) {
            let line = self.audit_refusal(&principal, &RequestId::random(), reason, detail);
            line.written().await;
        }
    }

    fn audit_refusal(
        &self,
        principal: &Principal,
        request_id: &RequestId,
        reason: Reason,
        detail: String,
    ) -> AuditLine {
        let ending = CallEnd {
            outcome: reason.outcome(),
            reason: Some(reason),
            detail: Some(detail),
            ..CallEnd::default()
        };
        let call_context = CallContext {
            principal,
            request_id,
            call: self.calls.next_number(),
            earlier_run: None,
            account_and_scope: None,
        };
        self.audit.denied(&call_context, None, &ending)
    }
}
