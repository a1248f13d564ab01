//! A call from beginning to end: admitted, delivered, finished.
//!
//! Top to bottom as it happens. The intent is audited before the request leaves. The call is a task of its own, so it runs
//! to its end even if its bot hangs up. What a bot is told at its deadline stays true: once it is told `not_sent`, the
//! [`Gate`] lets nothing leave.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use super::admission::CallSlot;
use super::gate::{Closed, Gate};
use super::retry::{self, Attempt, Retry, RetryBudget};
use super::{Broker, BrokerError};
use crate::audit::{Caller, Ending, Recorded};
use crate::base::ids::{BotId, KeyName, Who};
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::clean;
use crate::clock::ClockUncertain;
use crate::egress::{Answered, ConnectError, SendError};
use crate::keyring::{KeyUnavailable, Lent};
use crate::kucoin::{self, Answer, Asked, Catalog, Endpoint, Key, Scope, UnsignedRequest, code};
use crate::policy::Permit;
use crate::restrictions::KeyDigest;
use crate::telemetry::chain;

/// One call of a bot, or of an admin, or of the broker itself.
#[derive(Debug)]
pub(crate) struct Call {
    /// Who calls.
    pub(crate) who: Who,
    /// What for.
    pub(crate) request: UnsignedRequest,
    /// A key that is being tested, to sign with in place of the account's.
    pub(crate) key: Option<Arc<Key>>,
    /// When it came in.
    pub(crate) arrived: Instant,
    /// When the bot must have an answer.
    pub(crate) deadline: Instant,
    /// Its place among the calls in flight; free again once the call has ended, whatever its bot does meanwhile.
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) slot: Option<CallSlot>,
}

/// The exchange's answer, and what the broker did for it.
#[derive(Clone, Debug)]
pub(crate) struct Receipt {
    /// The answer.
    pub(crate) answer: Answer,
    /// The endpoint that was asked; `None` for one outside the catalogue.
    pub(crate) endpoint: Option<&'static Endpoint>,
    /// The scope of the request.
    pub(crate) scope: Scope,
    /// The timestamp that was signed, Unix milliseconds; 0 for a public request.
    pub(crate) timestamp_ms: i64,
    /// From the arrival of the call until signing began.
    pub(crate) waiting: Duration,
    /// Signing.
    pub(crate) signing: Duration,
    /// From handing the request to the connection until the answer was whole.
    pub(crate) exchange: Duration,
    /// The key that signed; none for a public request.
    pub(crate) lent: Option<Lent>,
}

impl Receipt {
    /// Since Vault last confirmed the key; zero while Vault answers, and for a public request.
    pub(crate) fn stale(&self) -> Duration {
        self.lent.as_ref().map_or(Duration::ZERO, |lent| lent.stale)
    }
}

impl Broker {
    /// Signs a request, sends it, and returns the exchange's answer. The call runs to its end even if the caller stops
    /// waiting.
    pub(crate) async fn sign_and_send(
        self: &Arc<Self>,
        call: Call,
    ) -> Result<Receipt, BrokerError> {
        let (tell, told) = oneshot::channel();
        let (bot, who) = (call.who.bot().map(BotId::as_str), call.who.other());
        let span = tracing::info_span!("call", request.id = %call.request.id, bot.id = bot, who);
        self.calls
            .tasks
            .spawn(Arc::clone(self).run(call, tell).instrument(span));
        told.await.unwrap_or(Err(BrokerError::Internal))
    }

    /// Runs one call to its end: tells the bot in time, and writes what it was told.
    async fn run(self: Arc<Self>, call: Call, tell: oneshot::Sender<Result<Receipt, BrokerError>>) {
        let number = self.calls.count.fetch_add(1, Ordering::Relaxed);
        let admitted = catch_unwind(AssertUnwindSafe(|| self.admit(&call, number)));
        let (permit, recorded) = match admitted.unwrap_or(Err(BrokerError::Internal)) {
            Ok(admitted) => admitted,
            Err(error) => {
                self.deny(&call, number, &error);
                let _ = tell.send(Err(error));
                return;
            }
        };
        let gate = Gate::default();
        let mut delivery = pin!(caught(self.deliver(&call, &permit, &recorded, &gate)));
        let cut_short = tokio::select! {
            biased;
            ended = &mut delivery => {
                self.finish(&call, number, &permit, &ended);
                let _ = tell.send(ended);
                return;
            }
            () = sleep_until(call.deadline) => BrokerError::DeadlineExceeded,
            () = self.calls.give_up.cancelled() => BrokerError::ShuttingDown,
        };
        let closed = gate.close();
        let is_sent = matches!(closed, Closed::Sent);
        let ended = match closed {
            Closed::NotSent => Err(cut_short),
            // The exchange refused an earlier try, and the next one has not left: that refusal is the answer.
            Closed::Refused(receipt) => Ok(*receipt),
            Closed::Sent => Err(BrokerError::AnswerLate),
        };
        self.finish(&call, number, &permit, &ended);
        let _ = tell.send(ended);
        // A late result of an internal request is of no use to anybody, and a shutdown does not wait for it.
        if is_sent && call.who != Who::Broker {
            // The bot has been answered. The request is still in flight, and its result is audited as well.
            let late = tokio::select! {
                late = &mut delivery => late,
                () = self.calls.give_up.cancelled() => Err(BrokerError::AnswerLate),
            };
            self.finish_late(&call, number, &permit, &late);
        }
    }

    /// Whether this call may be sent; if so, its intent is audited. Waits for nothing but the audit file.
    fn admit(&self, call: &Call, number: u64) -> Result<(Permit, Recorded), BrokerError> {
        if self.is_draining() {
            return Err(BrokerError::ShuttingDown);
        }
        let permit = self.clearance(call)?;
        self.log_permit(call, &permit);
        tracing::debug!(risk_increasing = permit.adds_risk(), "interlocks passed");
        let recorded = self
            .audit
            .intent(&caller(call, number), &permit, &call.request)?;
        tracing::debug!("intent audited");
        Ok((permit, recorded))
    }

    /// Checks the rules, then the restrictions that admins have set; for a risk-increasing request, also that the egress
    /// address is proven and the exchange's time known. Where it is not, it is measured again for the next call.
    fn clearance(&self, call: &Call) -> Result<Permit, BrokerError> {
        let permit = self.policy().authorize(&call.who, &call.request)?;
        let is_risk_increasing = permit.adds_risk();
        self.restrictions
            .check(&call.who, &permit.account().id, is_risk_increasing)?;
        if is_risk_increasing {
            self.proof.check()?;
            let checked = self.clock.check(permit.destination());
            // That the exchange's clock and the system's are far apart does not change by measuring again.
            checked.inspect_err(|error| {
                if !matches!(error, ClockUncertain::Different(_)) {
                    self.doubts.time();
                }
            })?;
        }
        Ok(permit)
    }

    /// Sends the request, and again where [`retry::next`] allows it, once per reason: where it was not sent or the exchange
    /// refused it, so that it was not executed; after a lost answer only what is idempotent, which no order is.
    async fn deliver(
        self: &Arc<Self>,
        call: &Call,
        permit: &Permit,
        recorded: &Recorded,
        gate: &Gate,
    ) -> Result<Receipt, BrokerError> {
        let (is_idempotent, has_own_key) = (permit.is_idempotent(), call.key.is_some());
        let mut last = self.send(call, permit, recorded, gate).await;
        let mut budget = RetryBudget::default();
        while let Some(retry) =
            retry::next(Attempt::of(&last), is_idempotent, has_own_key, &mut budget)
        {
            if !self.prepare(retry, permit, &last, gate).await {
                break;
            }
            tracing::debug!(cause = retry.cause(), "sending again");
            match self.send(call, permit, recorded, gate).await {
                // The try before may have been executed; that this one was not sent does not change it.
                Err(next) if is_unsent(&next) && !last.as_ref().is_err_and(is_unsent) => break,
                ended => last = ended,
            }
        }
        last
    }

    /// Makes ready for another try; false where it would not help, or the bot has been told how its call ended.
    async fn prepare(
        self: &Arc<Self>,
        retry: Retry,
        permit: &Permit,
        last: &Result<Receipt, BrokerError>,
        gate: &Gate,
    ) -> bool {
        // `hand_back` opens the gate again for a request that was not executed. If the deadline passes before the next try
        // leaves, the bot is told what stands in the gate: the refusal, or that nothing was sent.
        let receipt = last.as_ref().ok();
        match (retry, receipt) {
            (Retry::NotConnected | Retry::AnswerLost, _) => true,
            (Retry::HandedBack, _) => gate.hand_back(None),
            (Retry::TimestampRefused, Some(receipt)) => {
                let signed = receipt.signing + receipt.exchange;
                gate.hand_back(Some(receipt)) && self.refuted(permit.destination(), signed).await
            }
            (Retry::KeyRefused, Some(receipt)) => match &receipt.lent {
                Some(lent) if gate.hand_back(Some(receipt)) => {
                    self.keyring.has_another(permit, &lent.key).await
                }
                _ => false,
            },
            (Retry::TimestampRefused | Retry::KeyRefused, None) => false,
        }
    }

    /// One try. Connection first, since it can take time; then key, time and signature; then nothing waits.
    async fn send(
        &self,
        call: &Call,
        permit: &Permit,
        recorded: &Recorded,
        gate: &Gate,
    ) -> Result<Receipt, BrokerError> {
        // Only a check: a call without a key must not take a connection away from one that can be signed.
        self.key(call, permit)?;
        let destination = permit.destination();
        let connection = self
            .egress
            .connect(destination, permit.is_idempotent())
            .await
            .inspect_err(|error| tracing::debug!(error = chain(error), "connect failed"))?;
        tracing::debug!(
            peer = %connection.peer(),
            reused = connection.is_reused(),
            "connection ready"
        );
        // Registered before the check: a halt that comes too late for the check waits for this call to end.
        let account = &permit.account().id;
        let _adding = permit.adds_risk().then(|| self.calls.add_risk(account));
        // Connecting took time: the rules, the key's name and the restrictions may have changed.
        let permit = &self.clearance(call)?;
        if permit.destination() != destination {
            let moved = io::Error::other("the account has moved to another site meanwhile");
            return Err(ConnectError::Failed(moved).into());
        }
        let signing = Instant::now();
        let lent = self.key(call, permit)?;
        let signed = self.sign(call, permit, lent.as_ref())?;
        let (timestamp_ms, sending) = (signed.timestamp_ms, Instant::now());
        // Also by the clock: the timer of the deadline has had no chance to fire since the last wait.
        if sending >= call.deadline || !gate.take() {
            return Err(BrokerError::DeadlineExceeded);
        }
        let key = permit.key_name().filter(|_| lent.is_some());
        tracing::debug!(
            key.name = key.map(KeyName::as_str),
            key.vault_version = lent.as_ref().and_then(|lent| lent.version),
            timestamp_ms,
            "request signed"
        );
        let answered = self
            .egress
            .send(connection, signed, recorded)
            .await
            .inspect_err(|error| tracing::debug!(error = chain(error), "send failed"))?;
        let answer = self.read(call, permit, answered)?;
        tracing::debug!(
            http.status = answer.http_status.as_u16(),
            code = %clean(&answer.code, code::MAX_CODE_CHARS),
            outcome = %answer.outcome,
            exchange_us = micros(sending.elapsed()),
            "answer received"
        );
        self.apply_feedback(call, permit, lent.as_ref(), &answer);
        Ok(Receipt {
            answer,
            endpoint: permit.endpoint(),
            scope: permit.scope(),
            timestamp_ms,
            waiting: signing - call.arrived,
            signing: sending - signing,
            exchange: sending.elapsed(),
            lent,
        })
    }

    /// The key that signs, unless none has to; never one that is revoked, wherever it comes from.
    fn key(&self, call: &Call, permit: &Permit) -> Result<Option<Lent>, KeyUnavailable> {
        if !permit.is_private() {
            return Ok(None);
        }
        let account = &permit.account().id;
        let lent = match &call.key {
            Some(key) => Lent::of_a_test(Arc::clone(key)),
            None => self.keyring.key(permit)?,
        };
        let key = KeyDigest(lent.key.id_sha256());
        let slot = permit.key_name().filter(|_| call.key.is_none());
        let slot = slot.map(|name| (account, name));
        if self.restrictions.is_revoked(key, slot) {
            return Err(KeyUnavailable::revoked(account));
        }
        Ok(Some(lent))
    }

    /// Signs with the exchange's time of this moment. Nothing waits between [`Self::key`] and here, so that no key signs
    /// after it was replaced or revoked.
    fn sign(
        &self,
        call: &Call,
        permit: &Permit,
        lent: Option<&Lent>,
    ) -> Result<kucoin::SignedRequest, BrokerError> {
        let (request, site) = (&call.request, permit.account().site);
        let mut signed = match lent {
            None => kucoin::unsigned(request, site)?,
            Some(lent) => {
                let now_ms = self.clock.exchange(permit.destination()).ms;
                // A key that is only tested need not be a partner's.
                let partner = permit.partner().filter(|_| call.key.is_none());
                kucoin::sign(request, site, &lent.key, partner, now_ms)?
            }
        };
        if call.who == Who::Broker {
            signed.is_own();
        }
        Ok(signed)
    }

    /// Reads an answer; one that belongs to another request is shown to nobody, and its connection is closed.
    fn read(&self, call: &Call, permit: &Permit, answered: Answered) -> Result<Answer, SendError> {
        let endpoint = permit.endpoint();
        let is_of_another = endpoint.is_some_and(|endpoint| {
            permit.changes()
                && endpoint.has_foreign_client_oid(&call.request, answered.response.body())
        });
        if is_of_another {
            tracing::error!(
                account.id = %permit.account().id,
                endpoint = permit.endpoint_id(),
                "answer has a different clientOid than the request; connection closed, outcome maybe_sent"
            );
            return Err(SendError::AnswerOfAnother);
        }
        let (head, body) = answered.keep().into_parts();
        let asked = Asked {
            endpoint,
            scope: permit.scope(),
            changes: permit.changes(),
            refusal_codes: &self.refusal_codes,
        };
        let now = || {
            let ms = self.clock.exchange(permit.destination()).ms;
            UNIX_EPOCH + Duration::from_millis(u64::try_from(ms).unwrap_or_default())
        };
        Ok(Answer::read(head.status, &head.headers, body, asked, now))
    }

    /// Writes that a call was refused before its intent was audited: audit line, log line, metrics. Of one bot's refusals a
    /// bounded number is audited and logged.
    fn deny(&self, call: &Call, number: u64, error: &BrokerError) {
        let ending = ending_of_error(call, error);
        if call.who.bot().is_none() || self.is_recorded(&call.who) {
            self.audit
                .denied(&caller(call, number), Some(&call.request), &ending);
            let UnsignedRequest {
                scope,
                method,
                target,
                ..
            } = &call.request;
            let endpoint = Catalog::get().route(Some(*scope), *method, target.path());
            let endpoint = endpoint.map_or("", |endpoint| endpoint.id.as_str());
            log_end(call, endpoint, &ending, Some(error), "call ended");
        }
        if call.who.bot().is_some() {
            let (outcome, reason) = (error.reason().outcome(), error.reason());
            let scope = Some(call.request.scope);
            self.metrics.request(scope, outcome, Some(reason));
        }
    }

    /// Writes how a call ended for its bot: audit line, log line, metrics.
    fn finish(
        &self,
        call: &Call,
        number: u64,
        permit: &Permit,
        ended: &Result<Receipt, BrokerError>,
    ) {
        let endpoint = permit.endpoint_id();
        let ending = ending(call, ended);
        self.audit.outcome(&caller(call, number), endpoint, &ending);
        log_end(call, endpoint, &ending, ended.as_ref().err(), "call ended");
        if call.who.bot().is_some() {
            let (outcome, reason) = verdict(ended);
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
            self.count_unresolved(call, ended);
        }
    }

    /// Writes how a request ended whose bot has been answered already, with [`BrokerError::AnswerLate`], a `maybe_sent`.
    fn finish_late(
        &self,
        call: &Call,
        number: u64,
        permit: &Permit,
        late: &Result<Receipt, BrokerError>,
    ) {
        let endpoint = permit.endpoint_id();
        let ending = ending(call, late);
        self.audit.learnt(&caller(call, number), endpoint, &ending);
        log_end(call, endpoint, &ending, late.as_ref().err(), "late answer");
        self.count_unresolved(call, late);
    }

    /// Counts a call that ends as `maybe_sent` while the broker stops: somebody has to look it up. The broker's own questions
    /// change nothing and do not count.
    fn count_unresolved(&self, call: &Call, ended: &Result<Receipt, BrokerError>) {
        let is_unresolved = verdict(ended).0 == Outcome::MaybeSent;
        if is_unresolved && call.who != Who::Broker && self.is_draining() {
            self.calls.unresolved.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Logs at debug which lines of the rules allow a bot's call.
    fn log_permit(&self, call: &Call, permit: &Permit) {
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        let rules = call.who.bot().and_then(|bot| {
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

/// Runs a step of a call; a panic in it ends the call as [`BrokerError::Internal`], and nothing else.
pub(crate) fn caught<T>(
    step: impl Future<Output = Result<T, BrokerError>>,
) -> impl Future<Output = Result<T, BrokerError>> {
    // No `async fn`: that would hold `step` twice, and every call is a task of this size.
    AssertUnwindSafe(step)
        .catch_unwind()
        .map(|ended| ended.unwrap_or(Err(BrokerError::Internal)))
}

fn is_unsent(error: &BrokerError) -> bool {
    error.reason().outcome() == Outcome::NotSent
}

fn caller(call: &Call, number: u64) -> Caller<'_> {
    let Call { who, request, .. } = call;
    let place = Some((&request.account, request.scope));
    Caller {
        who,
        request_id: &request.id,
        call: number,
        place,
    }
}

fn verdict(ended: &Result<Receipt, BrokerError>) -> (Outcome, Option<Reason>) {
    match ended {
        Ok(receipt) => (receipt.answer.outcome, None),
        Err(error) => (error.reason().outcome(), Some(error.reason())),
    }
}

fn ending<'a>(call: &Call, ended: &'a Result<Receipt, BrokerError>) -> Ending<'a> {
    match ended {
        Err(error) => ending_of_error(call, error),
        Ok(receipt) => Ending {
            outcome: Some(receipt.answer.outcome),
            reason: None,
            detail: None,
            http_status: Some(receipt.answer.http_status.as_u16()),
            code: Some(clean(&receipt.answer.code, code::MAX_CODE_CHARS)),
            timestamp_ms: Some(receipt.timestamp_ms),
            duration_us: micros(call.arrived.elapsed()),
        },
    }
}

fn ending_of_error(call: &Call, error: &BrokerError) -> Ending<'static> {
    Ending {
        outcome: Some(error.reason().outcome()),
        reason: Some(error.reason()),
        detail: Some(error.to_string()),
        duration_us: micros(call.arrived.elapsed()),
        ..Ending::default()
    }
}

fn log_end(
    call: &Call,
    endpoint: &str,
    ending: &Ending<'_>,
    error: Option<&BrokerError>,
    message: &str,
) {
    let error = error.map(|error| chain(error));
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                account.id = %call.request.account,
                scope = %call.request.scope,
                endpoint,
                outcome = ending.outcome.map(tracing::field::display),
                reason = ending.reason.map(Reason::as_str),
                http.status = ending.http_status,
                duration_ms = ending.duration_us / 1000,
                error,
                "{message}",
            )
        };
    }
    if call.who == Who::Broker {
        line!(debug);
    } else if ending.outcome == Some(Outcome::MaybeSent) {
        // A call that ended as `maybe_sent` has to be looked up.
        line!(warn);
    } else {
        line!(info);
    }
}

/// Whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;
    use http::{HeaderMap, StatusCode};

    use super::*;
    use crate::kucoin::code::RefusalCodes;

    /// The receipt of a request that the exchange refused.
    pub(in crate::broker) fn refused() -> Receipt {
        let asked = Asked {
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
            endpoint: None,
            scope: Scope::SpotMargin,
            timestamp_ms: 0,
            waiting: Duration::ZERO,
            signing: Duration::ZERO,
            exchange: Duration::ZERO,
            lent: None,
        }
    }

    #[tokio::test]
    async fn a_panic_ends_its_call_as_internal_and_nothing_else() {
        let ended: Result<(), _> = caught(async { panic!("a defect") }).await;
        let error = ended.unwrap_err();
        assert_eq!(error.reason(), Reason::Internal);
        assert_eq!(error.reason().outcome(), Outcome::MaybeSent);
    }
}
