//! What a request needs on its way, and its parts: `call.rs` has the way itself. Nothing here waits for Vault.
//!
//! Every time limit of a call, in the order in which it meets them:
//!
//! | Limit | Value | Where |
//! |---|---|---|
//! | the message arrives whole | `limits.request_timeout_ms` | `server/connection.rs` |
//! | the bot's deadline, from the arrival of the head | `grpc-timeout`, or `limits.default_deadline_ms` | `api/bots.rs` |
//! | the answer is given before that | 50 ms, or a tenth of the deadline where that is less | `api/bots.rs` |
//! | a connection is made, TLS included | `egress.connect_timeout_ms` | `egress.rs` |
//! | a name is looked up again after a failed connect | 1 s | `egress.rs` |
//! | the whole answer of the exchange | `egress.answer_timeout_ms` | `egress.rs` |
//! | another key proves itself, after a refused key | 5 s | `keyring.rs` |
//! | the exchange's time is asked for, after a refused timestamp | as any other request of the broker's own | `broker/probes.rs` |
//! | the bot takes the answer | 30 s | `server/connection.rs` |
//! | calls in flight end once the broker stops | `limits.drain_timeout_ms` | [`Broker::drain`] |

pub(crate) mod admission;
mod call;
mod error;
mod feedback;
mod gate;
pub(crate) mod probes;
mod retry;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::{Audit, CallContext, Ending};
use crate::base::ids::{AccountId, AdminId, BotId, Principal, RequestId};
use crate::base::lock::RwLock;
use crate::base::outcome::Reason;
use crate::clock::Clock;
use crate::egress::Egress;
use crate::egress::proof::Proof;
use crate::keyring::Keyring;
use crate::kucoin::code::RefusalCodes;
use crate::policy::Policy;
use crate::restrictions::Restrictions;
use crate::telemetry::Metrics;

use admission::Admission;
pub(crate) use call::{Call, Receipt, caught, micros};
pub(crate) use error::{BrokerError, Overload};
pub(crate) use feedback::UnknownCodes;
use probes::RecheckSignals;

/// Everything that a request needs on its way.
#[derive(Debug)]
pub(crate) struct Broker {
    /// The rules, until others take their place.
    pub(crate) policy: RwLock<Arc<Policy>>,
    /// The record.
    pub(crate) audit: Arc<Audit>,
    /// What admins have forbidden.
    pub(crate) restrictions: Arc<Restrictions>,
    /// The keys.
    pub(crate) keyring: Arc<Keyring>,
    /// The way to the exchange.
    pub(crate) egress: Egress,
    /// Whether that way starts at the right address.
    pub(crate) proof: Proof,
    /// The time.
    pub(crate) clock: Arc<Clock>,
    /// What calls for the broker's own questions.
    pub(crate) rechecks: RecheckSignals,
    /// The counters.
    pub(crate) metrics: Arc<Metrics>,
    /// Who has how many connections and calls.
    pub(crate) admission: Admission,
    /// What is in flight.
    pub(crate) calls: Calls,
    /// The operator's further refusals.
    pub(crate) refusal_codes: RefusalCodes,
    /// Codes that no table has.
    pub(crate) unknown_codes: UnknownCodes,
}

/// Calls in flight, and their end when the broker stops.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    count: AtomicU64,
    tasks: TaskTracker,
    give_up: CancellationToken,
    /// Calls that ended as `maybe_sent` after the stop began.
    unresolved: AtomicU64,
    /// Risk-increasing calls in flight per account: a halt waits until they have ended.
    risk_increasing: watch::Sender<BTreeMap<AccountId, u64>>,
}

impl Broker {
    /// The rules of this moment.
    pub(crate) fn policy(&self) -> Arc<Policy> {
        let policy = self.policy.read();
        Arc::clone(&policy)
    }

    /// Puts other rules in place; calls from now on go by them.
    pub(crate) fn set_policy(&self, policy: Arc<Policy>) {
        *self.policy.write() = policy;
    }

    /// Whether one more refusal of this caller is audited; counts it if not. Refusals cost a bot nothing and must not fill
    /// the disk.
    fn may_record_refusal(&self, who: &Principal) -> bool {
        let may_record = self.admission.record_refusal(who, self.clock.boot());
        if !may_record {
            self.metrics.refusals_unrecorded.inc();
        }
        may_record
    }

    /// Records a call that never became one (malformed, one too many), and returns the error for its bot.
    pub(crate) fn refuse(
        &self,
        bot: &BotId,
        request_id: &RequestId,
        error: BrokerError,
    ) -> BrokerError {
        let reason = error.reason();
        self.metrics.request(None, reason.outcome(), Some(reason));
        let who = Principal::Bot(bot.clone());
        if !self.may_record_refusal(&who) {
            return error;
        }
        let detail = error.for_the_record();
        tracing::info!(request.id = %request_id, bot.id = %bot, outcome = %reason.outcome(), %reason, detail, "call ended");
        self.audit_refusal(&who, request_id, reason, detail);
        error
    }

    /// Counts and audits a call of `admin` that never became one.
    pub(crate) fn refuse_admin(&self, admin: &AdminId, reason: Reason, detail: String) {
        let labels = [("reason", reason.as_str())];
        let refused = &self.metrics.admin_calls_refused;
        refused.get_or_create(&labels).inc();
        let who = Principal::Admin(admin.clone());
        if self.may_record_refusal(&who) {
            self.audit_refusal(&who, &RequestId::random(), reason, detail);
        }
    }

    fn audit_refusal(
        &self,
        who: &Principal,
        request_id: &RequestId,
        reason: Reason,
        detail: String,
    ) {
        let ending = Ending {
            outcome: Some(reason.outcome()),
            reason: Some(reason),
            detail: Some(detail),
            ..Ending::default()
        };
        let call_context = CallContext {
            who,
            request_id,
            call: self.calls.count.fetch_add(1, Ordering::Relaxed),
            place: None,
        };
        self.audit.denied(&call_context, None, &ending);
    }

    /// Takes no new calls, finishes those in flight within `limit`, and returns how many of them ended with nobody
    /// knowing whether they were executed.
    pub(crate) async fn drain(&self, limit: Duration) -> u64 {
        self.calls.tasks.close();
        if timeout(limit, self.calls.tasks.wait()).await.is_err() {
            tracing::warn!(
                in_flight = self.calls.tasks.len(),
                "drain timeout; aborting in-flight calls"
            );
            self.calls.give_up.cancel();
            self.calls.tasks.wait().await;
        }
        self.audit.sync();
        self.calls.unresolved.load(Ordering::Relaxed)
    }

    /// Whether the broker takes no new calls.
    pub(crate) fn is_draining(&self) -> bool {
        self.calls.tasks.is_closed()
    }
}
