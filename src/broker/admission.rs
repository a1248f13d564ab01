//! Limits connections and calls in flight, so that one bot cannot use up the capacity of others, and counts risk-increasing
//! calls in flight, so that a halt can wait for them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Calls, Overload};
use crate::base::ids::{AccountId, BotId, Principal};
use crate::base::lock::Mutex;

/// Connections per bot beyond a limit whose calls are answered with `OVERLOADED`; further ones are closed without an answer.
const TURNED_AWAY: usize = 8;

/// Open health and reflection calls per bot. They can last long, so they have a limit of their own.
const HELPERS_OF_BOT: usize = 16;

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
    connections: Arc<Semaphore>,
    bots: Mutex<HashMap<BotId, Arc<OfBot>>>,
    refusals: Mutex<HashMap<Principal, Refusals>>,
}

/// The free slots of one bot.
#[derive(Debug)]
struct OfBot {
    calls: Arc<Semaphore>,
    connections: Arc<Semaphore>,
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

/// The slot of one call; free again when its last clone drops.
#[derive(Clone, Debug)]
pub(crate) struct CallSlot(#[expect(dead_code, reason = "held for its drop")] Arc<Held>);

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
            connections: Arc::new(Semaphore::new(limits.connections)),
            bots: Mutex::default(),
            refusals: Mutex::default(),
        }
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

    /// Admits a call of `bot`.
    ///
    /// # Errors
    /// When the bot, or all bots together, are at the limit of calls in flight.
    pub(crate) fn call(&self, bot: &BotId) -> Result<CallSlot, Overload> {
        let shared = take(&self.calls).ok_or(Overload::Calls(self.limits.calls))?;
        let of_bot = self.of_bot(bot);
        let own = take(&of_bot.calls).ok_or(Overload::CallsOfBot(self.limits.calls_per_bot))?;
        Ok(CallSlot(Arc::new((Some(shared), own, of_bot))))
    }

    /// Admits a health or reflection call of `bot`.
    ///
    /// # Errors
    /// When the bot is at its limit of them.
    pub(crate) fn helper(&self, bot: &BotId) -> Result<CallSlot, Overload> {
        let of_bot = self.of_bot(bot);
        let own = take(&of_bot.helpers).ok_or(Overload::HelpersOfBot(HELPERS_OF_BOT))?;
        Ok(CallSlot(Arc::new((None, own, of_bot))))
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

    /// The current connections and calls in flight.
    pub(crate) fn now(&self) -> (usize, usize) {
        let served = self.limits.connections - self.connections.available_permits();
        let turned_away =
            |of_bot: &Arc<OfBot>| TURNED_AWAY - of_bot.turned_away.available_permits();
        let turned_away: usize = self.bots.lock().values().map(turned_away).sum();
        let calls = self.limits.calls - self.calls.available_permits();
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
            calls: slots(self.limits.calls_per_bot),
            connections: slots(self.limits.connections_per_bot),
            turned_away: slots(TURNED_AWAY),
            helpers: slots(HELPERS_OF_BOT),
        });
        bots.insert(bot.clone(), Arc::clone(&of_bot));
        of_bot
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

fn take(slots: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(slots).try_acquire_owned().ok()
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[test]
    fn released_slots_can_be_used_again_and_unused_entries_are_removed() {
        let admission = Admission::new(AdmissionLimits {
            calls: 3,
            calls_per_bot: 2,
            connections: 100,
            connections_per_bot: 1,
        });
        let (one, two): (BotId, BotId) = ("one".parse().unwrap(), "two".parse().unwrap());
        let first = admission.call(&one).unwrap();
        let clone = first.clone();
        let second = admission.call(&one).unwrap();
        assert_eq!(admission.call(&one).unwrap_err(), Overload::CallsOfBot(2));
        let others = admission.call(&two).unwrap();
        assert_eq!(admission.call(&two).unwrap_err(), Overload::Calls(3));
        drop(first);
        assert_eq!(
            admission.call(&two).unwrap_err(),
            Overload::Calls(3),
            "a clone still uses the slot"
        );
        drop(clone);
        drop(admission.call(&one).unwrap());

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
        let _third = admission.call(&three).unwrap();
        assert_eq!(admission.bots.lock().keys().collect::<Vec<_>>(), [&three]);
    }

    #[test]
    fn a_thousand_refusals_per_bot_are_audited_and_then_twenty_per_second() {
        let admission = Admission::new(AdmissionLimits {
            calls: 1,
            calls_per_bot: 1,
            connections: 1,
            connections_per_bot: 1,
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
