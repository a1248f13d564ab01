//! Runs one call: authorizes the request, sends it, audits the result and answers the bot.
//!
//! Functions are in the order in which a call runs them. Three rules connect them:
//!
//! - **Outcome.** Each error has one outcome. `DeadlineExceeded`, `NotAfter`, `CallerGone`, `ShuttingDown` and every refusal
//!   before the send mean `not_sent`: the request is never executed. A lost answer, `AnswerLate` and `Internal` mean
//!   `maybe_sent`: the bot has to look the order up. The result is audited before the bot gets it; refusals before the send
//!   are audited up to a limit per bot. `CallerGone` and `ReadDropped` end calls whose bot has gone; nobody gets them.
//! - **Gate.** [`Gate`] starts open. [`Gate::pass`] marks it as sent, right before the request goes to its connection.
//!   [`Gate::reopen`] takes that back if the request provably was not executed, and keeps the exchange's rejection if there
//!   is one. The deadline, a hang-up, or the end of a shutdown closes the gate, and its state decides the bot's answer:
//!   `not_sent`, the rejection, or `AnswerLate`. Nothing passes a closed gate. A risk-increasing request that has passed, but
//!   is not written completely yet, is stopped by its [`SendGuard`](crate::egress::SendGuard), which also stops it by itself
//!   once its time is up; any other one counts as sent.
//! - **Retry.** A request is sent again only if it was not executed: once if the connect failed or the connection gave the
//!   request back unsent, once if the exchange rejected the timestamp, once if it rejected the key. After a lost answer only
//!   an idempotent request is sent again, and no order is idempotent.

use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

use super::admission::CallSlot;
use super::ending::{call_context, ending, ending_of_error, log_end, outcome_and_reason};
use super::gate::{Closed, Gate};
use super::resolve::{Ended, Resolved, Resolving};
use super::retry::{self, Attempt, Retry, RetryBudget};
use super::{Broker, BrokerError};
use crate::audit::{Intent, Recorded};
use crate::base::ids::{BotId, KeyName, Principal};
use crate::base::outcome::Outcome;
use crate::base::text::clean;
use crate::budgets::Charge;
use crate::clock::ClockUncertain;
use crate::egress::{Answered, ConnectError, SendError};
use crate::keyring::{KeyLease, KeyUnavailable};
use crate::kucoin::{self, Answer, Endpoint, Key, RequestContext, Scope, UnsignedRequest, code};
use crate::orders::{Claims, Settled};
use crate::policy::Permit;
use crate::restrictions::KeyDigest;
use crate::telemetry::chain;

/// How long a dropped answer still counts against the memory for answers: a bot that polls large answers is refused before it
/// keeps the broker busy with receiving and dropping them. `RetryInfo` in the refusal has the same time.
const DROPPED_COUNTS_FOR: Duration = Duration::from_secs(1);

/// One call of a bot, of an admin, or of the broker itself.
#[derive(Debug)]
pub(crate) struct Call {
    /// The caller.
    pub(crate) principal: Principal,
    /// The request to sign.
    pub(crate) request: UnsignedRequest,
    /// The key under test, which signs in place of the account's key; `None` for every call of a bot.
    pub(crate) key: Option<Arc<Key>>,
    /// When the call arrived.
    pub(crate) arrived: Instant,
    /// When the caller must have an answer.
    pub(crate) deadline: Instant,
    /// Exchange time after which a risk-increasing request must not leave, in Unix milliseconds; `None`: no limit.
    pub(crate) not_after_ms: Option<i64>,
    /// How long the caller waits until it is known what became of an order that may have been placed; zero: not at all.
    pub(crate) resolve_within: Duration,
    /// The slot among the calls in flight, with the memory of the answer. It is released when [`Broker::run`] returns, after a late answer too; `None` for
    /// calls that are not limited.
    pub(crate) slot: Option<CallSlot>,
}

/// The exchange's answer, with what was signed and how long it took.
#[derive(Clone, Debug)]
pub(crate) struct Receipt {
    /// The answer.
    pub(crate) answer: Answer,
    /// What became of the orders that may have been placed, if the caller has waited for that.
    pub(crate) resolution: Option<Resolved>,
    /// The endpoint; `None` if it is not in the catalogue.
    pub(crate) endpoint: Option<&'static Endpoint>,
    /// The scope of the request.
    pub(crate) scope: Scope,
    /// The timestamp that was signed, Unix milliseconds; 0 for a public request.
    pub(crate) timestamp_ms: i64,
    /// From the arrival of the call until the last attempt began to sign, earlier attempts included.
    pub(crate) waiting: Duration,
    /// Fetching the key and signing.
    pub(crate) signing: Duration,
    /// From handing the request to the connection until the answer was complete.
    pub(crate) exchange: Duration,
    /// How long ago Vault last confirmed the key; zero while Vault answers, and for a public request.
    pub(crate) stale: Duration,
    /// The key that signed; `None` for a public request.
    pub(crate) lease: Option<KeyLease>,
}

/// A call that is about to be delivered.
struct Admitted {
    permit: Permit,
    /// Lets a stop wait for the call.
    open: Option<TaskTrackerToken>,
    charge: Charge,
    claims: Claims,
    intent: Intent,
}

/// Turns a panic in a step of a call into [`BrokerError::Internal`]. Other calls go on.
pub(crate) fn catch_panic<T>(
    step: impl Future<Output = Result<T, BrokerError>>,
) -> impl Future<Output = Result<T, BrokerError>> {
    // Not an `async fn`, which would store `step` twice in the task of every call.
    AssertUnwindSafe(step)
        .catch_unwind()
        .map(|ended| ended.unwrap_or(Err(BrokerError::Internal)))
}

impl Broker {
    /// Signs a request, sends it and returns the exchange's answer. The call is a task of its own: it is audited even if the bot
    /// disconnects. A risk-increasing request that has not left yet is not sent then, and a read is dropped; any other call
    /// runs to its end.
    pub(crate) async fn sign_and_send(
        self: &Arc<Self>,
        call: Call,
    ) -> Result<Receipt, BrokerError> {
        let (reply, answer) = oneshot::channel();
        let (bot, principal) = (
            call.principal.bot().map(BotId::as_str),
            call.principal.other(),
        );
        let span =
            tracing::info_span!("call", request.id = %call.request.id, bot.id = bot, principal);
        self.calls
            .tasks
            .spawn(Arc::clone(self).run(call, reply).instrument(span));
        answer.await.unwrap_or(Err(BrokerError::Internal))
    }

    /// Runs one call to its end. The caller gets its answer by the deadline. A request that changes something and is still in
    /// flight then keeps its slot until its late result has been audited. A read ends with its caller: at the deadline, or
    /// as soon as the caller is gone, its request is dropped. A risk-increasing request whose caller is gone is stopped if it
    /// has not left; if it has, its result is audited once it is known.
    async fn run(
        self: Arc<Self>,
        call: Call,
        mut reply: oneshot::Sender<Result<Receipt, BrokerError>>,
    ) {
        let number = self.calls.next_number();
        let admitted = catch_panic(self.admit(&call, number, &mut reply)).await;
        let Admitted {
            permit,
            open,
            charge,
            claims,
            intent,
        } = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                self.deny(&call, number, &error).await;
                let _ = reply.send(Err(error));
                return;
            }
        };
        let gate = Gate::default();
        let ends_with_caller = !permit.changes() || permit.increases_risk();
        let delivery = self.deliver(&call, &permit, charge, intent, &gate);
        let mut delivery = pin!(catch_panic(delivery));
        let stopped_by = tokio::select! {
            biased;
            // First, so that the delivery does not send after a hang-up.
            () = reply.closed(), if ends_with_caller => BrokerError::CallerGone,
            result = &mut delivery => {
                let ended = Ended { call: &call, number, permit: &permit, claims: &claims, gate: &gate };
                let resolving = self.finish(ended, &result).await;
                if matches!(result, Err(BrokerError::AnswerDropped(_))) {
                    self.hold_answer_memory(&call);
                }
                // A stop does not wait for lookups.
                drop(open);
                let result = self.wait_for_resolution(ended, result, resolving, reply.closed()).await;
                let _ = reply.send(result);
                return;
            }
            () = sleep_until(call.deadline) => BrokerError::DeadlineExceeded,
            () = self.calls.give_up.cancelled() => BrokerError::ShuttingDown,
        };
        let is_abandoned = matches!(stopped_by, BrokerError::CallerGone);
        let result = match gate.close() {
            Closed::NotSent => Err(stopped_by),
            // The exchange rejected an earlier attempt, and the next one was not sent: the rejection is the answer.
            Closed::Refused(receipt) => Ok(*receipt),
            Closed::Sent if is_abandoned && !permit.changes() => Err(BrokerError::ReadDropped),
            Closed::Sent if is_abandoned => self.late(delivery.as_mut()).await,
            Closed::Sent => Err(BrokerError::AnswerLate),
        };
        let is_in_flight = matches!(result, Err(BrokerError::AnswerLate));
        let ended = Ended {
            call: &call,
            number,
            permit: &permit,
            claims: &claims,
            gate: &gate,
        };
        self.finish(ended, &result).await;
        let _ = reply.send(result);
        // The gate is closed, so nothing more can be sent. Wait for a request that is in flight and may change something, and
        // audit its late result; that of a request of the broker itself is not needed.
        if is_in_flight && permit.changes() && call.principal != Principal::Broker {
            let late = self.late(delivery).await;
            self.finish_late(ended, &late).await;
        }
    }

    /// Waits for the result of a request that was sent and whose caller does not wait any more; a shutdown ends the wait.
    async fn late(
        &self,
        delivery: Pin<&mut impl Future<Output = Result<Receipt, BrokerError>>>,
    ) -> Result<Receipt, BrokerError> {
        tokio::select! {
            biased;
            late = delivery => late,
            () = self.calls.give_up.cancelled() => Err(BrokerError::AnswerLate),
        }
    }

    /// Keeps the memory of a dropped answer counted for [`DROPPED_COUNTS_FOR`] after its call.
    fn hold_answer_memory(&self, call: &Call) {
        let memory = call.slot.as_ref().and_then(CallSlot::answer_memory);
        let give_up = self.calls.give_up.clone();
        self.calls.tasks.spawn(async move {
            let _ = timeout(DROPPED_COUNTS_FOR, give_up.cancelled()).await;
            drop(memory);
        });
    }

    /// Authorizes the call, waits until it fits into the rate budgets, claims its clientOids and queues its intent for the audit
    /// log.
    async fn admit(
        &self,
        call: &Call,
        number: u64,
        reply: &mut oneshot::Sender<Result<Receipt, BrokerError>>,
    ) -> Result<Admitted, BrokerError> {
        if !self.is_served(call) {
            return Err(BrokerError::ShuttingDown);
        }
        let permit = self.authorize(call)?;
        let open = self.calls.track(call, permit.changes());
        let charge = match self.take_budget(call, &permit, reply).await {
            Ok(charge) if self.is_served(call) => charge,
            ended => {
                // Another call may have sent the order meanwhile.
                self.check_repeated(call, permit.endpoint())?;
                return Err(ended.err().unwrap_or(BrokerError::ShuttingDown));
            }
        };
        self.log_permit(call, &permit);
        tracing::debug!(
            risk_increasing = permit.increases_risk(),
            "pre-send checks passed"
        );
        let mut claims = self.claim(call, &permit)?;
        let context = call_context(call, number);
        let intent = self
            .audit
            .intent(&context, &permit, &call.request, claims.recorded());
        let intent = intent.inspect_err(|_| {
            self.orders.settle(&claims, |_| Settled::NotPlaced);
        })?;
        self.begin_call(call, &permit, &mut claims);
        Ok(Admitted {
            permit,
            open,
            charge,
            claims,
            intent,
        })
    }

    /// Checks the rules, then the restrictions that admins have set. A risk-increasing request also needs a proven egress
    /// address, a known exchange time, and that its `not_after_ms` has not passed.
    fn authorize(&self, call: &Call) -> Result<Permit, BrokerError> {
        let mut permit = self.policy().authorize(&call.principal, &call.request)?;
        if self.dead_man.is_renewal(&call.request, permit.endpoint()) {
            permit.pass_like_a_cancel();
        }
        let is_risk_increasing = permit.increases_risk();
        self.restrictions
            .check(&call.principal, &permit.account().id, is_risk_increasing)?;
        if is_risk_increasing {
            self.proof.check()?;
            let checked = self.clock.check(permit.destination());
            checked.inspect_err(|error| {
                // Clocks that are more than a day apart stay apart, so measuring again is useless.
                if !matches!(error, ClockUncertain::Different(_)) {
                    self.rechecks.time();
                }
            })?;
            self.orders.check_known()?;
            self.check_not_after(call, permit.destination())?;
        }
        Ok(permit)
    }

    /// Audits, logs and counts a call that [`Self::admit`] refused. Audit and log lines are limited per bot: a bot in a loop
    /// must not fill the disk.
    pub(super) async fn deny(&self, call: &Call, number: u64, error: &BrokerError) {
        let ending = ending_of_error(call, error);
        let mut line = None;
        if call.principal.bot().is_none() || self.may_record_refusal(&call.principal) {
            let context = call_context(call, number);
            line = Some(self.audit.denied(&context, Some(&call.request), &ending));
            let endpoint = call.request.endpoint();
            let endpoint = endpoint.map_or("", |endpoint| endpoint.id.as_str());
            log_end(call, endpoint, &ending, Some(error), "call ended");
        }
        if call.principal.bot().is_some() {
            let (outcome, reason) = (error.outcome(), error.reason());
            let scope = Some(call.request.scope);
            self.metrics.request(scope, outcome, Some(reason));
        }
        if let Some(line) = line {
            line.written_by(call.deadline).await;
        }
    }

    /// Waits until the intent is written. Then sends the request, and again where [`retry::next`] allows it.
    async fn deliver(
        self: &Arc<Self>,
        call: &Call,
        permit: &Permit,
        mut charge: Charge,
        intent: Intent,
        gate: &Gate,
    ) -> Result<Receipt, BrokerError> {
        let charge = &mut charge;
        let recorded = &intent.recorded(&self.audit, call.deadline).await?;
        tracing::debug!("intent audited");
        let (is_idempotent, has_own_key) = (permit.is_idempotent(), call.key.is_some());
        let mut last = self.attempt(call, permit, recorded, charge, gate).await;
        let mut budget = RetryBudget::default();
        while let Some(retry) =
            retry::next(Attempt::of(&last), is_idempotent, has_own_key, &mut budget)
        {
            if !self.prepare(retry, permit, &last, gate).await {
                break;
            }
            tracing::debug!(cause = retry.cause(), "sending again");
            let was_sent = !last.as_ref().is_err_and(is_unsent);
            match self.attempt(call, permit, recorded, charge, gate).await {
                // A rejection or a lost answer is never replaced by "not sent".
                Err(next) if was_sent && is_unsent(&next) => break,
                ended => last = ended,
            }
        }
        if Self::is_duplicate(call, permit, &last) {
            return self.earlier_order(call, permit, last).await;
        }
        last
    }

    /// Prepares a retry: reopens the gate if the request was sent, and measures the exchange's time or waits for another key.
    /// Returns false if a retry would be useless.
    async fn prepare(
        self: &Arc<Self>,
        retry: Retry,
        permit: &Permit,
        last: &Result<Receipt, BrokerError>,
        gate: &Gate,
    ) -> bool {
        let receipt = last.as_ref().ok();
        match (retry, receipt) {
            (Retry::NotConnected | Retry::AnswerLost, _) => true,
            (Retry::NotWritten, _) => gate.reopen(None),
            (Retry::TimestampRefused, Some(receipt)) => {
                let since_signing = receipt.signing + receipt.exchange;
                gate.reopen(Some(receipt))
                    && self.resync_time(permit.destination(), since_signing).await
            }
            (Retry::KeyRefused, Some(receipt)) => match &receipt.lease {
                Some(lease) => {
                    gate.reopen(Some(receipt))
                        && self.keyring.wait_for_other_key(permit, &lease.key).await
                }
                None => false,
            },
            (Retry::TimestampRefused | Retry::KeyRefused, None) => false,
        }
    }

    /// Makes one attempt, and gives its part of the rate budgets back if it was not sent.
    async fn attempt(
        &self,
        call: &Call,
        permit: &Permit,
        recorded: &Recorded,
        charge: &mut Charge,
        gate: &Gate,
    ) -> Result<Receipt, BrokerError> {
        let before = charge.attempts();
        let ended = self.send(call, permit, recorded, charge, gate).await;
        if charge.attempts() > before && ended.as_ref().is_err_and(is_unsent) {
            charge.not_sent();
        }
        ended
    }

    /// Connects, authorizes again, signs and sends. Nothing is awaited between the second authorization
    /// and the send.
    async fn send(
        &self,
        call: &Call,
        admitted: &Permit,
        recorded: &Recorded,
        charge: &mut Charge,
        gate: &Gate,
    ) -> Result<Receipt, BrokerError> {
        // Fail early: a call that cannot be signed must not use a connection. The rules may name another key by now: writing
        // the intent took time, as does what comes before another attempt.
        if self.signing_key(call, admitted).is_err() {
            self.signing_key(call, &self.authorize(call)?)?;
        }
        let destination = admitted.destination();
        let connection = self
            .egress
            .connect(destination, admitted.is_idempotent())
            .await
            .inspect_err(|error| {
                tracing::debug!(exception.message = chain(error), "connect failed");
            })?;
        tracing::debug!(
            network.peer.address = %connection.peer().ip(),
            network.peer.port = connection.peer().port(),
            reused = connection.is_reused(),
            "connection ready"
        );
        // Register first: a halt before the authorization below refuses the request, and a halt after it waits until this
        // attempt has ended. Whether it is risk-increasing depends on its endpoint; a setting of the dead-man switch can change its class.
        let account = &admitted.account().id;
        let _registered = admitted
            .endpoint()
            .is_none_or(Endpoint::increases_risk)
            .then(|| self.calls.begin_risk_increasing(account));
        // Connecting took time: the rules, the key's name and the restrictions may have changed.
        let permit = &self.authorize(call)?;
        if permit.destination() != destination {
            let moved = io::Error::other(
                "the rules moved the account to another site while the broker was connecting",
            );
            return Err(ConnectError::Failed(moved).into());
        }
        charge.check_edge()?;
        let signing = Instant::now();
        let lease = self.signing_key(call, permit)?;
        let signed = self.sign(call, permit, lease.as_ref())?;
        let (timestamp_ms, sending) = (signed.timestamp_ms, Instant::now());
        let is_guarded = permit.increases_risk();
        if is_guarded {
            gate.signs_for(self.uid_of_key(permit));
        }
        let guard = is_guarded.then(|| self.send_guard(call, destination));
        // The deadline's timer fires only at an await, so compare the clock too.
        if sending >= call.deadline || !gate.pass(guard.clone(), timestamp_ms) {
            return Err(BrokerError::DeadlineExceeded);
        }
        charge.begin_attempt();
        let key = permit.key_name().filter(|_| lease.is_some());
        tracing::debug!(
            key.name = key.map(KeyName::as_str),
            key.vault_version = lease.as_ref().and_then(|lease| lease.version),
            timestamp_ms,
            "request signed"
        );
        let answered = self
            .egress
            .send(connection, signed, recorded, guard, |bytes| {
                let counted = call.slot.as_ref().map(|slot| slot.add_answer(bytes));
                counted
                    .unwrap_or(Ok(()))
                    .map_err(BrokerError::AnswerDropped)
            })
            .await
            .inspect_err(|error| {
                tracing::debug!(exception.message = chain(error), "send failed");
            })
            .map_err(|error| self.with_limit(error, call, destination))?;
        let answer = self.read(call, permit, answered)?;
        tracing::debug!(
            http.response.status_code = answer.http_status.as_u16(),
            exchange.code = %clean(&answer.code, code::MAX_CODE_CHARS),
            outcome = %answer.outcome,
            exchange_us = micros(sending.elapsed()),
            "answer received"
        );
        self.apply_feedback(call, permit, lease.as_ref(), &answer);
        self.apply_to_budgets(charge, permit, &answer);
        Ok(Receipt {
            answer,
            resolution: None,
            endpoint: permit.endpoint(),
            scope: permit.scope(),
            timestamp_ms,
            waiting: signing - call.arrived,
            signing: sending - signing,
            exchange: sending.elapsed(),
            stale: lease.as_ref().map_or(Duration::ZERO, |lease| lease.stale),
            lease,
        })
    }

    /// The key that signs: the one under test, or the account's; `None` for a public request. A revoked key is an error.
    fn signing_key(
        &self,
        call: &Call,
        permit: &Permit,
    ) -> Result<Option<KeyLease>, KeyUnavailable> {
        if !permit.is_private() {
            return Ok(None);
        }
        let account = &permit.account().id;
        let lease = match &call.key {
            Some(key) => KeyLease::for_test(Arc::clone(key)),
            None => self.keyring.key(permit)?,
        };
        let digest = KeyDigest(lease.key.id_sha256());
        let name = permit.key_name().filter(|_| call.key.is_none());
        if self
            .restrictions
            .is_revoked(digest, name.map(|name| (account, name)))
        {
            return Err(KeyUnavailable::revoked(account));
        }
        Ok(Some(lease))
    }

    /// Signs with the exchange's current time.
    fn sign(
        &self,
        call: &Call,
        permit: &Permit,
        lease: Option<&KeyLease>,
    ) -> Result<kucoin::OutboundRequest, BrokerError> {
        let (request, site) = (&call.request, permit.account().site);
        let mut signed = match lease {
            None => kucoin::unsigned(request, site)?,
            Some(lease) => {
                let now_ms = self.clock.exchange(permit.destination()).ms;
                // A key under test is signed without the partner headers: it may belong to no partner.
                let partner = permit.partner().filter(|_| call.key.is_none());
                kucoin::sign(request, site, &lease.key, partner, now_ms)?
            }
        };
        if call.principal == Principal::Broker {
            signed.mark_internal();
        }
        Ok(signed)
    }

    /// Parses the answer. One with a clientOid that is not in the request belongs to another request: it is an error, and its
    /// connection is closed.
    fn read(&self, call: &Call, permit: &Permit, answered: Answered) -> Result<Answer, SendError> {
        let endpoint = permit.endpoint();
        let is_foreign = endpoint.is_some_and(|endpoint| {
            permit.changes()
                && endpoint.has_foreign_client_oid(&call.request, answered.response.body())
        });
        if is_foreign {
            tracing::error!(
                account.id = %permit.account().id,
                endpoint = permit.endpoint_id(),
                "answer has a different clientOid than the request; connection closed, outcome maybe_sent"
            );
            return Err(SendError::WrongAnswer);
        }
        let (head, body) = answered.keep().into_parts();
        let asked = RequestContext {
            endpoint,
            scope: permit.scope(),
            changes: permit.changes(),
            refusal_codes: &self.refusal_codes,
        };
        let now = || self.clock.exchange(permit.destination()).as_system_time();
        let answer = Answer::read(head.status, &head.headers, body, asked, now);
        Ok(answer.judge_batch(endpoint, &call.request, &self.refusal_codes))
    }

    /// Audits, logs and counts the result of a call, which the bot gets unless it waits for more. Returns its orders that are
    /// looked up from now on.
    async fn finish(
        self: &Arc<Self>,
        finished: Ended<'_>,
        ended: &Result<Receipt, BrokerError>,
    ) -> Resolving {
        let Ended {
            call,
            number,
            permit,
            ..
        } = finished;
        let endpoint = permit.endpoint_id();
        let ending = ending(call, ended);
        let line = self
            .audit
            .outcome(&call_context(call, number), permit, &ending);
        let resolving = self.settle(finished, ended);
        log_end(call, endpoint, &ending, ended.as_ref().err(), "call ended");
        // Of a read; nobody gets them, and nothing was changed.
        let is_abandoned = !permit.changes()
            && matches!(
                ended,
                Err(BrokerError::CallerGone | BrokerError::ReadDropped)
            );
        if call.principal.bot().is_some() && !is_abandoned {
            let (outcome, reason) = outcome_and_reason(ended);
            let scope = Some(call.request.scope);
            self.metrics.request(scope, outcome, reason);
            if let Ok(receipt) = ended {
                self.metrics.stage("waiting", receipt.waiting);
                self.metrics.stage("signing", receipt.signing);
                self.metrics.stage("exchange", receipt.exchange);
            }
        }
        let is_still_in_flight = matches!(ended, Err(BrokerError::AnswerLate));
        if !is_still_in_flight {
            self.count_unresolved(call, permit, ended);
        }
        line.written_by(call.deadline).await;
        resolving
    }

    /// Audits and logs the result of a request whose bot was answered with [`BrokerError::AnswerLate`]: the late answer, or the
    /// same error again if the broker stopped waiting for it.
    async fn finish_late(
        self: &Arc<Self>,
        finished: Ended<'_>,
        late: &Result<Receipt, BrokerError>,
    ) {
        let Ended {
            call,
            number,
            permit,
            ..
        } = finished;
        let endpoint = permit.endpoint_id();
        let ending = ending(call, late);
        let line = self
            .audit
            .late_answer(&call_context(call, number), permit, &ending);
        drop(self.settle(finished, late));
        log_end(call, endpoint, &ending, late.as_ref().err(), "late answer");
        self.count_unresolved(call, permit, late);
        line.written().await;
    }

    /// Counts a call that ends as `maybe_sent` while the broker stops, since the order must be looked up. Reads, and the
    /// requests of the broker itself, change nothing and are not counted.
    fn count_unresolved(&self, call: &Call, permit: &Permit, ended: &Result<Receipt, BrokerError>) {
        let is_unresolved = outcome_and_reason(ended).0 == Some(Outcome::MaybeSent)
            && permit.changes()
            && call.principal != Principal::Broker;
        if is_unresolved && self.is_draining() {
            self.calls.unresolved.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Logs at debug which lines of the rules allow a bot's call.
    fn log_permit(&self, call: &Call, permit: &Permit) {
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        let rules = call.principal.bot().and_then(|bot| {
            let (policy, request) = (self.policy(), &call.request);
            let &UnsignedRequest {
                ref account,
                scope,
                method,
                ref target,
                ..
            } = request;
            let explained = policy.explain(bot, account, scope, method, target.path());
            let by = explained.verdict.ok()?.by.into_iter();
            let by = by.map(|rule| format!("line {}: {rule}", rule.line));
            Some(by.collect::<Vec<_>>().join(", "))
        });
        tracing::debug!(
            account.id = %permit.account().id,
            scope = %permit.scope(),
            endpoint = permit.endpoint_id(),
            rules,
            "call authorized"
        );
    }
}

fn is_unsent(error: &BrokerError) -> bool {
    error.outcome() == Some(Outcome::NotSent)
}

/// Whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;
    use http::{HeaderMap, StatusCode};

    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::kucoin::code::RefusalCodes;

    /// The receipt of a request that the exchange rejected.
    pub(in crate::broker) fn refused() -> Receipt {
        let asked = RequestContext {
            endpoint: None,
            scope: Scope::SpotMargin,
            changes: true,
            refusal_codes: &RefusalCodes::default(),
        };
        let body = Bytes::from_static(br#"{"code":"400002","msg":"KC-API-TIMESTAMP Invalid"}"#);
        let answer = Answer::read(StatusCode::OK, &HeaderMap::new(), body, asked, || {
            UNIX_EPOCH
        });
        assert_eq!(answer.outcome, Outcome::Rejected);
        Receipt {
            answer,
            resolution: None,
            endpoint: None,
            scope: Scope::SpotMargin,
            timestamp_ms: 0,
            waiting: Duration::ZERO,
            signing: Duration::ZERO,
            exchange: Duration::ZERO,
            stale: Duration::ZERO,
            lease: None,
        }
    }

    #[tokio::test]
    async fn panic_in_a_call_is_internal_and_maybe_sent() {
        let ended: Result<(), _> = catch_panic(async { panic!("a defect") }).await;
        let error = ended.unwrap_err();
        assert_eq!(error.reason(), crate::base::outcome::Reason::Internal);
        assert_eq!(error.outcome(), Some(Outcome::MaybeSent));
    }
}
