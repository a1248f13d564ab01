//! Limits connections and calls in flight, so that one bot cannot use up the capacity of others, and counts risk-increasing
//! calls in flight, so that a halt can wait for them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::answer_memory::{AnswerBudget, AnswerMemory};
use super::error::AnswerLimit;
use super::{Calls, Overload};
use crate::base::ids::{AccountId, BotId, Principal};
use crate::base::lock::Mutex;

/// Connections per bot beyond a limit whose calls are answered with `OVERLOADED`; further ones are closed without an answer.
const TURNED_AWAY: usize = 8;

/// Open health and reflection calls per bot. They can last long, so they have a limit of their own.
const HELPERS_OF_BOT: usize = 16;

/// Bytes of requests of all bots that are being received. A call has no slot yet then, because only its message shows whether
/// it is a cancel.
const MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// The first bytes of each request, which are not counted: a cancel fits into them, and must not be refused because others
/// send long requests slowly. The number of requests limits them.
const UNCOUNTED_BYTES: usize = 4 * 1024;

/// Refusals of one caller that are audited: a burst, and a number per second; the rest is only counted. A bot in a loop must
/// not fill the disk that every order needs.
const RECORDED: (u64, u64) = (1000, 20);

/// The limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdmissionLimits {
    /// Calls in flight of all bots.
    pub(crate) calls: usize,
    /// Calls in flight of one bot.
    pub(crate) calls_per_bot: usize,
    /// Cancels in flight over all bots, beyond `calls`.
    pub(crate) cancels: usize,
    /// Cancels in flight of one bot, beyond `calls_per_bot`.
    pub(crate) cancels_per_bot: usize,
    /// Bytes of requests of one bot that are being received.
    pub(crate) message_bytes_per_bot: usize,
    /// Bytes of answers of all bots in memory.
    pub(crate) answer_bytes: usize,
    /// Bytes of answers of one bot in memory.
    pub(crate) answer_bytes_per_bot: usize,
    /// Connections of all bots.
    pub(crate) connections: usize,
    /// Connections of one bot.
    pub(crate) connections_per_bot: usize,
}

/// Enforces the limits.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: AdmissionLimits,
    calls: Arc<Semaphore>,
    /// A reserve that only cancels use, once `calls` has no free slot.
    cancels: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    message_bytes: Arc<Semaphore>,
    answers: Arc<AnswerBudget>,
    bots: Mutex<HashMap<BotId, Arc<OfBot>>>,
    refusals: Mutex<HashMap<Principal, Refusals>>,
}

/// The free slots of one bot.
#[derive(Debug)]
struct OfBot {
    /// How many slots `calls` has, with those in use.
    calls_limit: AtomicUsize,
    calls: Arc<Semaphore>,
    cancels: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    /// Requests that are being received.
    messages: Arc<Semaphore>,
    message_bytes: Arc<Semaphore>,
    answers: Arc<AnswerBudget>,
    /// Connections beyond a limit whose calls are answered with `OVERLOADED`.
    turned_away: Arc<Semaphore>,
    /// Health and reflection calls.
    helpers: Arc<Semaphore>,
}

/// How many refusals of one caller may still be audited, in thousandths, at a time since boot.
#[derive(Clone, Copy, Debug)]
struct Refusals {
    left: u64,
    at: Duration,
}

/// The decision about a connection.
#[derive(Debug)]
pub(crate) enum Admitted {
    /// It is within the limits.
    Served(ConnectionSlot),
    /// It is beyond a limit, and its calls get this error.
    TurnedAway(ConnectionSlot, Overload),
}

/// The slot of one connection; free again when it drops.
#[derive(Debug)]
pub(crate) struct ConnectionSlot(#[expect(dead_code, reason = "held for its drop")] Held);

/// What a call may do, as far as its limits depend on it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum CallKind {
    /// It cancels orders.
    Cancel,
    /// It changes nothing.
    Read,
    /// It may change something else, such as an order.
    Write,
}

/// The slot of one call, with the memory of its answer; free again when its last clone drops.
#[derive(Clone, Debug)]
pub(crate) struct CallSlot {
    _held: Arc<Held>,
    /// `None` for a health or reflection call.
    answer: Option<Arc<AnswerMemory>>,
}

/// The slot of a request that is being received, with the bytes that have arrived; free again when it drops.
#[derive(Debug)]
pub(crate) struct MessageSlot {
    shared_bytes: Arc<Semaphore>,
    of_bot: Arc<OfBot>,
    of_bot_limit: usize,
    _slot: OwnedSemaphorePermit,
    uncounted: usize,
    bytes: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
}

/// A slot of all bots, a slot of one bot, and the bot's entry.
type Held = (
    Option<OwnedSemaphorePermit>,
    OwnedSemaphorePermit,
    Arc<OfBot>,
);

impl Admission {
    /// All slots are free.
    pub(crate) fn new(limits: AdmissionLimits) -> Self {
        Self {
            limits,
            calls: Arc::new(Semaphore::new(limits.calls)),
            cancels: Arc::new(Semaphore::new(limits.cancels)),
            message_bytes: Arc::new(Semaphore::new(MESSAGE_BYTES)),
            answers: Arc::new(AnswerBudget::new(limits.answer_bytes)),
            connections: Arc::new(Semaphore::new(limits.connections)),
            bots: Mutex::default(),
            refusals: Mutex::default(),
        }
    }

    /// The limits.
    pub(crate) fn limits(&self) -> &AdmissionLimits {
        &self.limits
    }

    /// Admits a connection of `bot`. `None`: far beyond a limit, to be closed without an answer.
    pub(crate) fn connection(&self, bot: &BotId) -> Option<Admitted> {
        let of_bot = self.of_bot(bot);
        // Connections beyond a limit use no regular slot: else they would block others once slots are free.
        let refusal = match take(&of_bot.connections) {
            None => Overload::ConnectionsOfBot(self.limits.connections_per_bot),
            Some(own) => match take(&self.connections) {
                None => Overload::Connections(self.limits.connections),
                Some(shared) => {
                    let slot = ConnectionSlot((Some(shared), own, of_bot));
                    return Some(Admitted::Served(slot));
                }
            },
        };
        let own = take(&of_bot.turned_away)?;
        let slot = ConnectionSlot((None, own, of_bot));
        Some(Admitted::TurnedAway(slot, refusal))
    }

    /// Admits a call of `bot`. A cancel that finds no free slot gets one of the reserve. `calls_in_flight`: the limit of the bot in
    /// the rules, if it has one.
    ///
    /// # Errors
    /// When the bot, or all bots together, are at the limit of calls in flight, and a cancel also at that of cancels; a read
    /// also when answers use up the memory for them.
    pub(crate) fn call(
        &self,
        bot: &BotId,
        kind: CallKind,
        calls_in_flight: Option<usize>,
    ) -> Result<CallSlot, Overload> {
        let of_bot = self.of_bot(bot);
        let limits = &self.limits;
        let calls_per_bot = calls_in_flight.unwrap_or(limits.calls_per_bot);
        of_bot.limit_calls(calls_per_bot);
        let slots = take_both(
            (&self.calls, Overload::Calls(limits.calls)),
            (&of_bot.calls, Overload::CallsOfBot(calls_per_bot)),
        );
        let (shared, own) = match slots {
            Err(_) if kind == CallKind::Cancel => take_both(
                (&self.cancels, Overload::Cancels(limits.cancels)),
                (
                    &of_bot.cancels,
                    Overload::CancelsOfBot(limits.cancels_per_bot),
                ),
            ),
            slots => slots,
        }?;
        let is_read = kind == CallKind::Read;
        let answer = AnswerMemory::reserve(&of_bot.answers, &self.answers, is_read)
            .map_err(Overload::Answers)?;
        Ok(CallSlot {
            _held: Arc::new((Some(shared), own, of_bot)),
            answer: Some(Arc::new(answer)),
        })
    }

    /// Admits a request of `bot` that is about to be received.
    ///
    /// # Errors
    /// When the bot is sending as many requests as it may have calls and cancels in flight.
    pub(crate) fn message(
        &self,
        bot: &BotId,
        calls_in_flight: Option<usize>,
    ) -> Result<MessageSlot, Overload> {
        let of_bot = self.of_bot(bot);
        if let Some(limit) = calls_in_flight {
            of_bot.limit_calls(limit);
        }
        let slot = take(&of_bot.messages).ok_or_else(|| {
            Overload::MessagesOfBot(self.limits.messages_per_bot(calls_in_flight))
        })?;
        Ok(MessageSlot {
            shared_bytes: Arc::clone(&self.message_bytes),
            of_bot,
            of_bot_limit: self.limits.message_bytes_per_bot,
            _slot: slot,
            uncounted: UNCOUNTED_BYTES,
            bytes: None,
        })
    }

    /// Admits a health or reflection call of `bot`.
    ///
    /// # Errors
    /// When the bot is at its limit of them.
    pub(crate) fn helper(&self, bot: &BotId) -> Result<CallSlot, Overload> {
        let of_bot = self.of_bot(bot);
        let own = take(&of_bot.helpers).ok_or(Overload::HelpersOfBot(HELPERS_OF_BOT))?;
        Ok(CallSlot {
            _held: Arc::new((None, own, of_bot)),
            answer: None,
        })
    }

    /// Whether to audit a refusal of `principal` at `now` (time since boot); false if it is only counted.
    pub(crate) fn record_refusal(&self, principal: &Principal, now: Duration) -> bool {
        let (burst, per_second) = RECORDED;
        let mut refusals = self.refusals.lock();
        let refreshed = |refusals: &Refusals| {
            let passed_ms = now.saturating_sub(refusals.at).as_millis();
            let more = u64::try_from(passed_ms)
                .unwrap_or(u64::MAX)
                .saturating_mul(per_second);
            refusals.left.saturating_add(more).min(burst * 1000)
        };
        // An entry with a full allowance is not needed.
        refusals.retain(|_, refusals| refreshed(refusals) < burst * 1000);
        let of_caller = refusals.entry(principal.clone()).or_insert(Refusals {
            left: burst * 1000,
            at: now,
        });
        let left = refreshed(of_caller);
        *of_caller = Refusals {
            left: left.checked_sub(1000).unwrap_or(left),
            at: now,
        };
        left >= 1000
    }

    /// The current connections and calls in flight, with the cancels of the reserve.
    pub(crate) fn now(&self) -> (usize, usize) {
        let served = self.limits.connections - self.connections.available_permits();
        let turned_away =
            |of_bot: &Arc<OfBot>| TURNED_AWAY - of_bot.turned_away.available_permits();
        let turned_away: usize = self.bots.lock().values().map(turned_away).sum();
        let calls = self.limits.calls - self.calls.available_permits();
        let calls = calls + self.limits.cancels - self.cancels.available_permits();
        (served + turned_away, calls)
    }

    /// The entry of `bot`. Adding one removes entries that are not in use.
    fn of_bot(&self, bot: &BotId) -> Arc<OfBot> {
        let mut bots = self.bots.lock();
        if let Some(of_bot) = bots.get(bot) {
            return Arc::clone(of_bot);
        }
        bots.retain(|_, of_bot| Arc::strong_count(of_bot) > 1);
        let slots = |count| Arc::new(Semaphore::new(count));
        let of_bot = Arc::new(OfBot {
            calls_limit: AtomicUsize::new(self.limits.calls_per_bot),
            calls: slots(self.limits.calls_per_bot),
            cancels: slots(self.limits.cancels_per_bot),
            messages: slots(self.limits.messages_per_bot(None)),
            message_bytes: slots(self.limits.message_bytes_per_bot),
            answers: Arc::new(AnswerBudget::new(self.limits.answer_bytes_per_bot)),
            connections: slots(self.limits.connections_per_bot),
            turned_away: slots(TURNED_AWAY),
            helpers: slots(HELPERS_OF_BOT),
        });
        bots.insert(bot.clone(), Arc::clone(&of_bot));
        of_bot
    }
}

impl OfBot {
    /// Changes the limit of calls in flight, and with it that of requests that are being received. Slots in use count until they are
    /// free.
    fn limit_calls(&self, limit: usize) {
        let now = self.calls_limit.load(Ordering::Relaxed);
        if now == limit {
            return;
        }
        if limit > now {
            self.calls.add_permits(limit - now);
            self.messages.add_permits(limit - now);
            self.calls_limit.store(limit, Ordering::Relaxed);
            return;
        }
        let removed = self.calls.forget_permits(now - limit);
        self.messages.forget_permits(removed);
        self.calls_limit.store(now - removed, Ordering::Relaxed);
    }
}

/// One attempt of a risk-increasing call, registered from before its last authorization until it has ended.
#[derive(Debug)]
pub(super) struct RiskIncreasing<'c> {
    calls: &'c Calls,
    account: &'c AccountId,
}

impl Calls {
    /// Counts a risk-increasing attempt on an account until the guard drops.
    pub(super) fn begin_risk_increasing<'c>(
        &'c self,
        account: &'c AccountId,
    ) -> RiskIncreasing<'c> {
        self.risk_increasing.send_modify(|counts| {
            *counts.entry(account.clone()).or_default() += 1;
        });
        RiskIncreasing {
            calls: self,
            account,
        }
    }

    /// Whether no risk-increasing attempt is in flight on the account.
    pub(crate) fn is_quiescent(&self, account: &AccountId) -> bool {
        !self.risk_increasing.borrow().contains_key(account)
    }

    /// Returns once no risk-increasing attempt is in flight on the account.
    pub(crate) async fn quiescent(&self, account: &AccountId) {
        let mut counts = self.risk_increasing.subscribe();
        // An error means that the broker has been dropped.
        let _ = counts
            .wait_for(|counts| !counts.contains_key(account))
            .await;
    }
}

impl Drop for RiskIncreasing<'_> {
    fn drop(&mut self) {
        self.calls.risk_increasing.send_modify(|counts| {
            if let Some(count) = counts.get_mut(self.account) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(self.account);
                }
            }
        });
    }
}

impl AdmissionLimits {
    /// Requests of one bot that may be received at the same time: as many as it may have in flight.
    pub(crate) fn messages_per_bot(&self, calls_in_flight: Option<usize>) -> usize {
        calls_in_flight.unwrap_or(self.calls_per_bot) + self.cancels_per_bot
    }
}

impl CallSlot {
    /// The memory of the answer, which stays counted until the last clone drops; `None` for a health or reflection call.
    pub(super) fn answer_memory(&self) -> Option<Arc<AnswerMemory>> {
        self.answer.clone()
    }

    /// Counts `count` bytes of the call's answer that have arrived.
    ///
    /// # Errors
    /// When the answer to a read would use more memory than is left for answers.
    pub(crate) fn add_answer(&self, count: usize) -> Result<(), AnswerLimit> {
        self.answer
            .as_ref()
            .map_or(Ok(()), |answer| answer.add(count))
    }
}

impl MessageSlot {
    /// Counts `count` bytes that have arrived.
    ///
    /// # Errors
    /// When the bot, or all bots together, are sending too many bytes at the same time.
    pub(crate) fn add(&mut self, count: usize) -> Result<(), Overload> {
        let uncounted = count.min(self.uncounted);
        self.uncounted -= uncounted;
        let count = u32::try_from(count - uncounted).unwrap_or(u32::MAX);
        let take = |bytes: &Arc<Semaphore>| Arc::clone(bytes).try_acquire_many_owned(count).ok();
        let own = take(&self.of_bot.message_bytes)
            .ok_or(Overload::MessageBytesOfBot(self.of_bot_limit))?;
        let shared = take(&self.shared_bytes).ok_or(Overload::MessageBytes(MESSAGE_BYTES))?;
        match &mut self.bytes {
            Some(bytes) => {
                bytes.0.merge(shared);
                bytes.1.merge(own);
            }
            None => self.bytes = Some((shared, own)),
        }
        Ok(())
    }
}

/// A slot of all bots and a slot of one bot, or the limit that was reached.
fn take_both(
    (shared, shared_limit): (&Arc<Semaphore>, Overload),
    (own, own_limit): (&Arc<Semaphore>, Overload),
) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit), Overload> {
    let own = take(own).ok_or(own_limit)?;
    let shared = take(shared).ok_or(shared_limit)?;
    Ok((shared, own))
}

fn take(slots: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(slots).try_acquire_owned().ok()
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::CallKind::{Cancel, Write};
    use super::*;

    const LIMITS: AdmissionLimits = AdmissionLimits {
        calls: 1,
        calls_per_bot: 1,
        cancels: 1,
        cancels_per_bot: 1,
        message_bytes_per_bot: 8 * 1024 * 1024,
        answer_bytes: 64 * 1024 * 1024,
        answer_bytes_per_bot: 16 * 1024 * 1024,
        connections: 1,
        connections_per_bot: 1,
    };

    #[test]
    fn released_slots_can_be_used_again_and_unused_entries_are_removed() {
        let admission = Admission::new(AdmissionLimits {
            calls: 3,
            calls_per_bot: 2,
            cancels: 3,
            cancels_per_bot: 2,
            connections: 100,
            ..LIMITS
        });
        let (one, two): (BotId, BotId) = ("one".parse().unwrap(), "two".parse().unwrap());
        let first = admission.call(&one, Write, None).unwrap();
        let clone = first.clone();
        let second = admission.call(&one, Write, None).unwrap();
        assert_eq!(
            admission.call(&one, Write, None).unwrap_err(),
            Overload::CallsOfBot(2)
        );
        let others = admission.call(&two, Write, None).unwrap();
        assert_eq!(
            admission.call(&two, Write, None).unwrap_err(),
            Overload::Calls(3)
        );
        drop(first);
        assert_eq!(
            admission.call(&two, Write, None).unwrap_err(),
            Overload::Calls(3),
            "a clone still uses the slot"
        );
        drop(clone);
        drop(admission.call(&one, Write, None).unwrap());

        let served = admission.connection(&one).unwrap();
        assert!(matches!(served, Admitted::Served(_)));
        let turned: Vec<_> = (0..TURNED_AWAY)
            .map(|_| admission.connection(&one).unwrap())
            .collect();
        assert!(
            turned
                .iter()
                .all(|one| matches!(one, Admitted::TurnedAway(..)))
        );
        assert!(admission.connection(&one).is_none());
        assert_eq!(admission.now(), (1 + TURNED_AWAY, 2));
        drop(served);
        let served = admission.connection(&one).unwrap();
        assert!(
            matches!(served, Admitted::Served(_)),
            "connections beyond the limit use no slot"
        );
        drop((served, turned, second, others));
        assert_eq!(admission.now(), (0, 0));
        let three: BotId = "three".parse().unwrap();
        let _third = admission.call(&three, Write, None).unwrap();
        assert_eq!(admission.bots.lock().keys().collect::<Vec<_>>(), [&three]);
    }

    #[test]
    fn a_thousand_refusals_per_bot_are_audited_and_then_twenty_per_second() {
        let admission = Admission::new(AdmissionLimits {
            cancels: 3,
            cancels_per_bot: 2,
            ..LIMITS
        });
        let [one, two] = ["one", "two"].map(|bot| Principal::Bot(bot.parse().unwrap()));
        let recorded =
            |principal, ms| admission.record_refusal(principal, Duration::from_millis(ms));
        assert_eq!((0..5000).filter(|_| recorded(&one, 1500)).count(), 1000);
        assert!(recorded(&two, 1500), "refusals of another bot");
        assert_eq!((0..5000).filter(|_| recorded(&one, 2500)).count(), 20);
        // One every ten milliseconds: refusals that are not audited do not count against the limit.
        let flood = (2500..12_500).step_by(10);
        assert_eq!(flood.filter(|&ms| recorded(&one, ms)).count(), 199);
        assert_eq!((0..5000).filter(|_| recorded(&one, 600_000)).count(), 1000);
    }

    #[test]
    fn cancels_have_a_reserve_that_other_calls_cannot_use() {
        let admission = Admission::new(AdmissionLimits {
            calls: 2,
            cancels: 3,
            cancels_per_bot: 2,
            ..LIMITS
        });
        let [one, two, three] = ["one", "two", "three"].map(|bot| bot.parse::<BotId>().unwrap());
        let read = admission.call(&one, Write, None).unwrap();
        let refused = |bot, kind| admission.call(bot, kind, None).unwrap_err();
        assert_eq!(refused(&one, Write), Overload::CallsOfBot(1));
        let cancels = [(); 2].map(|()| admission.call(&one, Cancel, None).unwrap());
        assert_eq!(refused(&one, Cancel), Overload::CancelsOfBot(2));
        assert_eq!(refused(&one, Write), Overload::CallsOfBot(1));
        // A cancel uses a regular slot while one is free.
        let regular = admission.call(&two, Cancel, None).unwrap();
        assert_eq!(refused(&three, Write), Overload::Calls(2));
        let last = admission.call(&three, Cancel, None).unwrap();
        assert_eq!(refused(&two, Cancel), Overload::Cancels(3));
        drop(cancels);
        drop(admission.call(&two, Cancel, None).unwrap());
        drop((read, regular, last));
        drop(admission.call(&three, Write, None).unwrap());
    }

    #[test]
    fn bytes_of_requests_being_received_are_limited_per_bot_and_for_all_bots() {
        let admission = Admission::new(LIMITS);
        let bot = |number: usize| format!("bot-{number}").parse::<BotId>().unwrap();
        let (of_bot, of_all) = (admission.limits.message_bytes_per_bot, MESSAGE_BYTES);
        let receive = |number| {
            let mut slot = admission.message(&bot(number), None).unwrap();
            slot.add(UNCOUNTED_BYTES).unwrap();
            slot
        };
        let (mut first, mut second) = (receive(0), receive(0));
        assert_eq!(
            admission.message(&bot(0), None).unwrap_err(),
            Overload::MessagesOfBot(2)
        );
        first.add(of_bot - 10).unwrap();
        second.add(10).unwrap();
        assert_eq!(second.add(1), Err(Overload::MessageBytesOfBot(of_bot)));
        // A short request is never refused for its bytes.
        drop(first);
        let mut short = admission.message(&bot(0), None).unwrap();
        short.add(of_bot - 10 + UNCOUNTED_BYTES).unwrap();
        drop(second);
        let mut cancel = receive(0);
        assert_eq!(cancel.add(11), Err(Overload::MessageBytesOfBot(of_bot)));
        cancel.add(10).unwrap();
        let mut others: Vec<_> = (1..of_all / of_bot).map(receive).collect();
        assert!(others.iter_mut().all(|slot| slot.add(of_bot).is_ok()));
        let mut late = receive(99);
        assert_eq!(late.add(1), Err(Overload::MessageBytes(of_all)));
        drop(short);
        late.add(of_bot - 10).unwrap();
        cancel.add(1).unwrap_err();
    }

    #[tokio::test]
    async fn account_is_quiescent_once_its_last_risk_increasing_call_has_ended() {
        let calls = Calls::default();
        let (one, other) = ("one".parse().unwrap(), "other".parse().unwrap());
        let (first, second) = (
            calls.begin_risk_increasing(&one),
            calls.begin_risk_increasing(&one),
        );
        assert!(!calls.is_quiescent(&one) && calls.is_quiescent(&other));
        drop(first);
        let within = Duration::from_millis(20);
        timeout(within, calls.quiescent(&one)).await.unwrap_err();
        drop(second);
        calls.quiescent(&one).await;
        assert!(calls.risk_increasing.borrow().is_empty());
    }
}
