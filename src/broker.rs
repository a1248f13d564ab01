//! The request path.
//!
//! It decides nothing itself: each line of `Broker::attempt` is a module's question. It waits for no Vault, it sends
//! nothing that is not on record, and it lets no hang-up tear a send in two.

pub mod admission;
mod error;
mod gate;
pub mod halt;
pub mod probes;
pub mod trial;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, UNIX_EPOCH};

use futures_util::FutureExt;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::audit::{Audit, Caller, Ending, Recorded};
use crate::clock::{Clock, ClockUncertain};
use crate::egress::proof::Proof;
use crate::egress::{Answered, ConnectError, Egress, SendError};
use crate::ids::{AccountId, AdminId, BotId, KeyName, RequestId, Who};
use crate::keyring::usage::Refusal;
use crate::keyring::{KeyUnavailable, Keyring, Lent};
use crate::kucoin::code::{
    self, ADDRESS_REFUSED, CREDENTIALS_REFUSED, KEY_REFUSED, RefusalCode, RefusalCodes,
    TIMESTAMP_REFUSED,
};
use crate::kucoin::{
    self, Answer, Asked, Endpoint, Key, Product, Scope, UnsignedRequest, advice, question,
};
use crate::outcome::{Outcome, Reason};
use crate::policy::{Permit, Policy};
use crate::restrictions::{KeyDigest, Restrictions};
use crate::telemetry::{Metrics, chain};
use crate::text::clean;

use admission::{Admission, CallSlot};
pub use error::{BrokerError, Overload};
use gate::Gate;
use probes::Doubts;

/// Everything that a request needs on its way.
#[derive(Debug)]
pub struct Broker {
    /// The rules, until others take their place.
    pub policy: RwLock<Arc<Policy>>,
    /// The record.
    pub audit: Arc<Audit>,
    /// What admins have forbidden.
    pub restrictions: Arc<Restrictions>,
    /// The keys.
    pub keyring: Arc<Keyring>,
    /// The way to the exchange.
    pub egress: Egress,
    /// Whether that way starts at the right address.
    pub proof: Proof,
    /// The time.
    pub clock: Arc<Clock>,
    /// What calls for the broker's own questions.
    pub doubts: Doubts,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// Who has how many connections and calls.
    pub admission: Admission,
    /// What is in flight.
    pub calls: Calls,
    /// The operator's further refusals.
    pub refusal_codes: RefusalCodes,
    /// Codes that no table has.
    pub unknown_codes: UnknownCodes,
}

/// Unknown codes that have been logged: each is logged once in a run.
#[derive(Debug, Default)]
pub struct UnknownCodes(Mutex<BTreeSet<(Scope, Option<Product>, String)>>);

/// Past so many different ones nothing more is logged: the exchange chooses them, and the metric goes on counting.
const MAX_UNKNOWN_CODES: usize = 256;

impl UnknownCodes {
    /// Remembers the code; returns whether to log it.
    fn insert_if_new(&self, scope: Scope, product: Option<Product>, code: &str) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.len() < MAX_UNKNOWN_CODES && known.insert((scope, product, code.to_owned()))
    }
}

/// Calls in flight, and their end when the broker stops.
#[derive(Debug, Default)]
pub struct Calls {
    count: AtomicU64,
    tasks: TaskTracker,
    give_up: CancellationToken,
    /// Calls that ended after the stop began with nobody knowing whether they were executed.
    unresolved: AtomicU64,
    /// How many may be adding risk, per account: a halt waits for their end.
    adding_risk: watch::Sender<BTreeMap<AccountId, u64>>,
}

/// One call of a bot, or of an admin, or of the broker itself.
#[derive(Debug)]
pub struct Call {
    /// Who calls.
    pub who: Who,
    /// What for.
    pub request: UnsignedRequest,
    /// A key that is being tested, to sign with in place of the account's.
    pub key: Option<Arc<Key>>,
    /// When it came in.
    pub arrived: Instant,
    /// When the bot must have an answer.
    pub deadline: Instant,
    /// Its place among the calls in flight; free again once the call has ended, whatever its bot does meanwhile.
    pub slot: Option<CallSlot>,
}

/// The exchange's answer, and what the broker did for it.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// The answer.
    pub answer: Answer,
    /// The endpoint that was asked; `None` for one outside the catalogue.
    pub endpoint: Option<&'static Endpoint>,
    /// The scope of the request.
    pub scope: Scope,
    /// The timestamp that was signed, Unix milliseconds; 0 for a public request.
    pub timestamp_ms: i64,
    /// From the arrival of the call until signing began.
    pub waiting: Duration,
    /// Signing.
    pub signing: Duration,
    /// From handing the request to the connection until the answer was whole.
    pub exchange: Duration,
    /// The key that signed; none for a public request.
    pub lent: Option<Lent>,
}

impl Receipt {
    /// Since Vault last confirmed the key; zero while Vault answers, and for a public request.
    pub fn stale(&self) -> Duration {
        self.lent.as_ref().map_or(Duration::ZERO, |lent| lent.stale)
    }
}

/// What has become of a call so far; written by its attempt, read where it ends.
#[derive(Debug, Default)]
struct Progress {
    gate: Gate,
    permit: OnceLock<Permit>,
    recorded: OnceLock<()>,
    /// An answer that the exchange has given, until the request leaves once more for a better one.
    refused: Mutex<Option<Receipt>>,
}

/// What has been tried to mend a refusal or a failure; each helps once.
#[derive(Debug, Default)]
struct Remedies {
    /// Another key.
    key: bool,
    /// Once more as it was.
    repeated: bool,
    /// The exchange's time.
    time: bool,
}

impl Progress {
    fn keep(&self, refused: Option<Receipt>) -> Option<Receipt> {
        let mut kept = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *kept, refused)
    }
}

impl Broker {
    /// Signs a request, sends it, and returns the exchange's answer. A caller that stops waiting tears nothing.
    pub async fn sign_and_send(self: &Arc<Self>, call: Call) -> Result<Receipt, BrokerError> {
        let (tell, told) = oneshot::channel();
        let (bot, who) = (call.who.bot().map(BotId::as_str), call.who.other());
        let span = tracing::info_span!("call", request.id = %call.request.id, bot.id = bot, who);
        self.calls
            .tasks
            .spawn(Arc::clone(self).run(call, tell).instrument(span));
        told.await.unwrap_or(Err(BrokerError::Internal))
    }

    /// May this bot do this? On file before it leaves; then sent, and once more where that can do no harm.
    async fn attempt(
        self: &Arc<Self>,
        call: &Call,
        number: u64,
        progress: &Progress,
    ) -> Result<Receipt, BrokerError> {
        if self.calls.tasks.is_closed() {
            return Err(BrokerError::ShuttingDown);
        }
        let permit = self.policy().authorize(&call.who, &call.request)?;
        let permit = progress.permit.get_or_init(|| permit);
        self.log_permit(call, permit);
        self.check_surroundings(&call.who, permit)?;
        tracing::debug!(risk_increasing = permit.adds_risk(), "interlocks passed");
        let recorded = self
            .audit
            .intent(&caller(call, number), permit, &call.request)?;
        let _ = progress.recorded.set(());
        tracing::debug!("intent audited");
        let mut last = self.send(call, permit, &recorded, &progress.gate).await;
        let mut remedies = Remedies::default();
        while self
            .is_worth_another(call, permit, &last, progress, &mut remedies)
            .await
        {
            tracing::debug!(cause = why_again(&last), "sending again");
            match self.send(call, permit, &recorded, &progress.gate).await {
                // What this try did not send, the last one may have.
                Err(next) if is_unsent(&next) && !last.as_ref().is_err_and(is_unsent) => break,
                ended => last = ended,
            }
        }
        last
    }

    /// Whether the request shall leave once more, signed anew: each remedy helps once, and only where it does no harm.
    async fn is_worth_another(
        self: &Arc<Self>,
        call: &Call,
        permit: &Permit,
        last: &Result<Receipt, BrokerError>,
        progress: &Progress,
        remedies: &mut Remedies,
    ) -> bool {
        let receipt = match last {
            Ok(receipt) if receipt.answer.outcome == Outcome::Rejected => receipt,
            Ok(_) => return false,
            Err(_) => {
                return !std::mem::replace(&mut remedies.repeated, true)
                    && may_go_again(last, permit, &progress.gate);
            }
        };
        let code = receipt.answer.code.as_str();
        let is_about_time = code == TIMESTAMP_REFUSED && !remedies.time;
        let is_about_key = KEY_REFUSED.contains(&code) && call.key.is_none() && !remedies.key;
        if !is_about_time && !is_about_key {
            return false;
        }
        // It counts as not sent any more, and whoever runs out of time before it leaves again is told this answer.
        progress.keep(Some(receipt.clone()));
        if !progress.gate.hand_back() {
            return false;
        }
        if is_about_time {
            remedies.time = true;
            let signed = receipt.signing + receipt.exchange;
            return self.refuted(permit.destination(), signed).await;
        }
        remedies.key = true;
        match &receipt.lent {
            Some(lent) => self.keyring.has_another(permit, &lent.key).await,
            None => false,
        }
    }

    /// Refuses what an admin has forbidden, and what adds risk while it is not certain from which address, or with which
    /// time, it would leave.
    fn check_surroundings(&self, who: &Who, permit: &Permit) -> Result<(), BrokerError> {
        self.restrictions
            .check(who, &permit.account().id, permit.adds_risk())?;
        if !permit.adds_risk() {
            return Ok(());
        }
        self.proof.check()?;
        let checked = self.clock.check(permit.destination());
        // A difference between the two clocks does not go away by measuring once more.
        checked.inspect_err(|error| {
            if !matches!(error, ClockUncertain::Different(_)) {
                self.doubts.time();
            }
        })?;
        Ok(())
    }

    /// Connection first, since it can take time; then key, time and signature; then nothing waits.
    async fn send(
        &self,
        call: &Call,
        permit: &Permit,
        recorded: &Recorded,
        gate: &Gate,
    ) -> Result<Receipt, BrokerError> {
        // A call that cannot be signed takes no connection away from one that can.
        self.key(call, permit)?;
        let connection = self
            .egress
            .connect(permit.destination(), permit.is_idempotent())
            .await
            .inspect_err(|error| tracing::debug!(error = chain(error), "connect failed"))?;
        tracing::debug!(
            peer = %connection.peer(),
            reused = connection.is_reused(),
            "connection ready"
        );
        // The rules may have changed meanwhile: the account may have another key now, and the bot less to say.
        let destination = permit.destination();
        let permit = &self.policy().authorize(&call.who, &call.request)?;
        if permit.destination() != destination {
            let moved = io::Error::other("the account has moved to another site meanwhile");
            return Err(ConnectError::Failed(moved).into());
        }
        // A halt that this check does not see yet sees this call.
        let account = &permit.account().id;
        let _adding = permit.adds_risk().then(|| self.calls.add_risk(account));
        self.check_surroundings(&call.who, permit)?;
        let signing = Instant::now();
        let lent = self.key(call, permit)?;
        let signed = self.sign(call, permit, lent.as_ref())?;
        let (timestamp_ms, sending) = (signed.timestamp_ms, Instant::now());
        // The clock too: a record that took long to write leaves the timer no turn before this.
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
        self.heed(call, permit, lent.as_ref(), &answer);
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
        let revoked = match permit.key_name().filter(|_| call.key.is_none()) {
            Some(name) => self.restrictions.revoked_in(account, name, key),
            None => self.restrictions.revoked(key),
        };
        match revoked {
            Some(_) => Err(KeyUnavailable::revoked(account)),
            None => Ok(Some(lent)),
        }
    }

    /// The key has just been taken, and is used without a pause: one that was replaced or revoked signs nothing more.
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

    /// Takes what an answer says about the broker itself: its time, its address, its key.
    fn heed(&self, call: &Call, permit: &Permit, lent: Option<&Lent>, answer: &Answer) {
        if let Some(lent) = lent {
            let refused = KEY_REFUSED.contains(&answer.code.as_str());
            if answer.outcome == Outcome::Accepted {
                lent.usage.accepted(self.clock.wall_ms());
            } else if answer.outcome == Outcome::Rejected && refused {
                let is_news = lent.usage.refused(Refusal {
                    code: answer.code.clone(),
                    advice: advice::for_bot(answer, permit.scope(), permit.endpoint()),
                    at_ms: self.clock.wall_ms(),
                });
                if is_news && call.key.is_none() {
                    self.keyring.look_again(permit);
                }
            }
        }
        if answer.is_of_unknown_code {
            self.note_unknown_code(permit, &answer.code);
        }
        match answer.code.as_str() {
            // Whoever tests a key is told what is wrong with it; it says nothing about the broker.
            code if code != TIMESTAMP_REFUSED && call.key.is_some() => {}
            ADDRESS_REFUSED => {
                let seen = question::address_in(&answer.msg);
                self.proof.refused(seen, self.clock.boot());
                self.metrics.address_refused();
                let seen = seen.map(|address| address.to_string());
                tracing::error!(
                    account.id = %permit.account().id,
                    seen,
                    "the exchange refuses the egress address for this key; compare the key's whitelist with egress.expected_ip"
                );
                self.doubts.address();
            }
            code if CREDENTIALS_REFUSED.contains(&code) => {
                self.metrics.credentials_refused();
                tracing::error!(
                    account.id = %permit.account().id,
                    code,
                    "the exchange refuses this key, its passphrase or its signature; compare what Vault holds with KuCoin's key page"
                );
            }
            TIMESTAMP_REFUSED => {
                self.metrics.timestamp_refused();
                self.doubts.time();
            }
            _ => {}
        }
    }

    /// Counts a code that leaves the outcome open, and logs it once.
    fn note_unknown_code(&self, permit: &Permit, full_code: &str) {
        self.metrics.code_unknown(permit.scope());
        let product = permit.endpoint().map(|endpoint| endpoint.product);
        let code: String = full_code.chars().take(code::MAX_CODE_CHARS).collect();
        if self
            .unknown_codes
            .insert_if_new(permit.scope(), product, &code)
        {
            let (endpoint, scope) = (permit.endpoint_id(), permit.scope());
            if let Ok(refusal) = RefusalCode::new(scope.host(), product, full_code) {
                tracing::warn!(
                    endpoint,
                    %scope,
                    code = ?code,
                    refusal_code = ?refusal.to_string(),
                    "unknown code; outcome is maybe_sent: if KuCoin documents it as a refusal, add it to exchange.refusal_codes"
                );
            } else {
                tracing::warn!(
                    endpoint,
                    %scope,
                    code = ?code,
                    "unknown code; outcome is maybe_sent: exchange.refusal_codes does not take it; report it as a defect of credbroker"
                );
            }
        }
    }

    /// The rules of this moment.
    pub fn policy(&self) -> Arc<Policy> {
        let policy = self.policy.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&policy)
    }

    /// Puts other rules in place; calls from now on go by them.
    pub fn set_policy(&self, policy: Arc<Policy>) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// Runs one call to its end: tells the bot in time, and writes what it was told.
    async fn run(self: Arc<Self>, call: Call, tell: oneshot::Sender<Result<Receipt, BrokerError>>) {
        let number = self.calls.count.fetch_add(1, Ordering::Relaxed);
        let progress = Progress::default();
        let mut attempt = pin!(caught(self.attempt(&call, number, &progress)));
        let cut_short = tokio::select! {
            biased;
            ended = &mut attempt => {
                self.settle(&call, number, &progress, &ended, "outcome");
                let _ = tell.send(ended);
                return;
            }
            () = sleep_until(call.deadline) => BrokerError::DeadlineExceeded,
            () = self.calls.give_up.cancelled() => BrokerError::ShuttingDown,
        };
        let is_sent = progress.gate.close();
        let ended = match progress.keep(None) {
            _ if is_sent => Err(BrokerError::AnswerLate),
            Some(refused) => Ok(refused),
            None => Err(cut_short),
        };
        self.settle(&call, number, &progress, &ended, "outcome");
        let _ = tell.send(ended);
        // Nobody wants to know how a question of the broker's own went on; a stop does not wait for it.
        if is_sent && call.who != Who::Broker {
            // The bot has its answer; the request goes on, and what is learnt of it is recorded too.
            let late = tokio::select! {
                late = &mut attempt => late,
                () = self.calls.give_up.cancelled() => Err(BrokerError::AnswerLate),
            };
            self.settle(&call, number, &progress, &late, "learnt");
        }
    }

    /// Writes how a call ended: audit line, log line, metrics.
    fn settle(
        &self,
        call: &Call,
        number: u64,
        progress: &Progress,
        ended: &Result<Receipt, BrokerError>,
        event: &'static str,
    ) {
        let (outcome, reason) = verdict(ended);
        let endpoint = progress.permit.get().map_or("", Permit::endpoint_id);
        let answer = ended.as_ref().ok();
        let ending = Ending {
            outcome: Some(outcome),
            reason,
            detail: ended.as_ref().err().map(ToString::to_string),
            http_status: answer.map(|receipt| receipt.answer.http_status.as_u16()),
            code: answer.map(|receipt| clean(&receipt.answer.code, code::MAX_CODE_CHARS)),
            timestamp_ms: answer.map(|receipt| receipt.timestamp_ms),
            duration_us: micros(call.arrived.elapsed()),
        };
        let caller = caller(call, number);
        match (event, progress.recorded.get()) {
            ("learnt", _) => self.audit.learnt(&caller, endpoint, &ending),
            (_, Some(())) => self.audit.outcome(&caller, endpoint, &ending),
            (_, None) if call.who.bot().is_none() || self.is_recorded(&call.who) => {
                self.audit.denied(&caller, Some(&call.request), &ending);
            }
            (_, None) => {
                self.metrics
                    .request(Some(call.request.scope), outcome, reason);
                return;
            }
        }
        let message = if event == "learnt" {
            "late answer"
        } else {
            "call ended"
        };
        // What nobody knows the end of is somebody's to look up.
        let is_loose = outcome == Outcome::MaybeSent;
        let error = ended.as_ref().err().map(|error| chain(error));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    account.id = %call.request.account,
                    scope = %call.request.scope,
                    endpoint,
                    %outcome,
                    reason = reason.map(Reason::as_str),
                    http.status = ending.http_status,
                    duration_ms = ending.duration_us / 1000,
                    error,
                    "{message}",
                )
            };
        }
        if call.who == Who::Broker {
            line!(debug);
        } else if is_loose {
            line!(warn);
        } else {
            line!(info);
        }
        if event == "outcome" && call.who.bot().is_some() {
            self.metrics
                .request(Some(call.request.scope), outcome, reason);
            if let Some(receipt) = answer {
                self.metrics.stage("waiting", receipt.waiting);
                self.metrics.stage("signing", receipt.signing);
                self.metrics.stage("exchange", receipt.exchange);
            }
        }
        let goes_on = event == "outcome" && matches!(ended, Err(BrokerError::AnswerLate));
        // The broker's own questions change nothing, so nobody has to look them up.
        let matters = is_loose && call.who != Who::Broker;
        if matters && !goes_on && self.calls.tasks.is_closed() {
            self.calls.unresolved.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether one more refusal of a bot goes on record: they cost the bot nothing, and must not fill the disk.
    fn is_recorded(&self, who: &Who) -> bool {
        let is_recorded = self.admission.is_recorded(who, self.clock.boot());
        if !is_recorded {
            self.metrics.refusal_unrecorded();
        }
        is_recorded
    }

    /// Records a call that never became one (malformed, one too many), and returns the error for its bot.
    pub fn refuse(&self, bot: &BotId, request_id: &RequestId, error: BrokerError) -> BrokerError {
        let reason = error.reason();
        self.metrics.request(None, reason.outcome(), Some(reason));
        let who = Who::Bot(bot.clone());
        if !self.is_recorded(&who) {
            return error;
        }
        let detail = error.for_the_record();
        tracing::info!(request.id = %request_id, bot.id = %bot, outcome = %reason.outcome(), %reason, detail, "call ended");
        self.audit_refusal(&who, request_id, reason, detail);
        error
    }

    /// Counts and audits a call of `admin` that never became one.
    pub fn refuse_admin(&self, admin: &AdminId, reason: Reason, detail: String) {
        self.metrics.admin_call_refused(reason);
        let who = Who::Admin(admin.clone());
        if self.is_recorded(&who) {
            self.audit_refusal(&who, &RequestId::random(), reason, detail);
        }
    }

    fn audit_refusal(&self, who: &Who, request_id: &RequestId, reason: Reason, detail: String) {
        let ending = Ending {
            outcome: Some(reason.outcome()),
            reason: Some(reason),
            detail: Some(detail),
            ..Ending::default()
        };
        let caller = Caller {
            who,
            request_id,
            call: self.calls.count.fetch_add(1, Ordering::Relaxed),
            place: None,
        };
        self.audit.denied(&caller, None, &ending);
    }

    /// Takes no new calls, finishes those in flight within `limit`, and returns how many of them ended with nobody
    /// knowing whether they were executed.
    pub async fn drain(&self, limit: Duration) -> u64 {
        self.calls.tasks.close();
        if timeout(limit, self.calls.tasks.wait()).await.is_err() {
            tracing::warn!(
                in_flight = self.calls.tasks.len(),
                "calls are still in flight; they end as they stand"
            );
            self.calls.give_up.cancel();
            self.calls.tasks.wait().await;
        }
        self.audit.sync();
        self.calls.unresolved.load(Ordering::Relaxed)
    }

    /// Whether the broker takes no new calls.
    pub fn is_draining(&self) -> bool {
        self.calls.tasks.is_closed()
    }
}

/// What was provably not sent, unless the bot has been told otherwise, and what may be executed twice.
fn may_go_again(first: &Result<Receipt, BrokerError>, permit: &Permit, gate: &Gate) -> bool {
    match first {
        Err(BrokerError::Connect(_)) => true,
        Err(BrokerError::Send(SendError::HandedBack(_))) => gate.hand_back(),
        Err(BrokerError::Send(SendError::AnswerLost(_) | SendError::AnswerTimeout(_))) => {
            permit.is_idempotent()
        }
        _ => false,
    }
}

/// Why a request leaves once more; for the log.
fn why_again(last: &Result<Receipt, BrokerError>) -> &'static str {
    match last {
        Ok(receipt) if receipt.answer.code == TIMESTAMP_REFUSED => "timestamp refused",
        Ok(_) => "key refused",
        Err(BrokerError::Connect(_)) => "connect failed",
        Err(BrokerError::Send(SendError::HandedBack(_))) => "connection closed before the send",
        Err(_) => "answer lost, and the request may be repeated",
    }
}

fn is_unsent(error: &BrokerError) -> bool {
    error.reason().outcome() == Outcome::NotSent
}

/// Runs a step of a call; a panic in it ends the call as [`BrokerError::Internal`], and nothing else.
pub fn caught<T>(
    step: impl Future<Output = Result<T, BrokerError>>,
) -> impl Future<Output = Result<T, BrokerError>> {
    // No `async fn`: that would hold `step` twice, and every call is a task of this size.
    AssertUnwindSafe(step)
        .catch_unwind()
        .map(|ended| ended.unwrap_or(Err(BrokerError::Internal)))
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

/// Whole microseconds.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_its_call_as_internal_and_nothing_else() {
        let ended: Result<(), _> = caught(async { panic!("a defect") }).await;
        let error = ended.unwrap_err();
        assert_eq!(error.reason(), Reason::Internal);
        assert_eq!(error.reason().outcome(), Outcome::MaybeSent);
    }
}
