//! How many connections and calls there may be at once, so that one bot cannot take the place of another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Overload;
use crate::ids::{BotId, Who};

/// So many connections beyond a limit are kept open for a moment, to tell why; any more are closed.
const TURNED_AWAY: usize = 8;

/// Calls for health and reflection that one bot may have open. They can last, and take nobody's place among the others.
const HELPERS_OF_BOT: usize = 16;

/// So many refusals of one bot are recorded in a row, and so many in a second after that; the rest is only counted. A
/// bot in a loop must not fill the disk that every order needs.
const RECORDED: (u64, u64) = (1000, 20);

/// The limits.
#[derive(Clone, Copy, Debug)]
pub struct AdmissionLimits {
    /// Calls in flight over all bots.
    pub calls: usize,
    /// Calls in flight of one bot.
    pub calls_per_bot: usize,
    /// Connections over all bots.
    pub connections: usize,
    /// Connections of one bot.
    pub connections_per_bot: usize,
}

/// Who has how much.
#[derive(Debug)]
pub struct Admission {
    limits: AdmissionLimits,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    bots: HashMap<BotId, OfBot>,
    refusals: HashMap<Who, Refusals>,
    calls: usize,
    served: usize,
    turned_away: usize,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct OfBot {
    calls: usize,
    /// Connections that are served.
    served: usize,
    /// Connections that are told that they are one too many.
    turned_away: usize,
    /// Calls for health and reflection.
    helpers: usize,
}

/// What may still be recorded of one bot's refusals, in thousandths, as of a time since boot.
#[derive(Clone, Copy, Debug)]
struct Refusals {
    left: u64,
    at: Duration,
}

/// What may become of a connection.
#[derive(Debug)]
pub enum Admitted {
    /// It is served.
    Served(ConnectionSlot),
    /// One too many: its calls are told so.
    TurnedAway(ConnectionSlot, Overload),
}

/// The place of one connection; free again when it drops.
#[derive(Debug)]
pub struct ConnectionSlot(#[expect(dead_code, reason = "held for its drop")] Holder);

/// The place of one call; free again when its last clone drops.
#[derive(Clone, Debug)]
pub struct CallSlot(#[expect(dead_code, reason = "held for its drop")] Arc<Holder>);

/// Gives back what it holds when it drops.
#[derive(Debug)]
struct Holder {
    admission: Arc<Admission>,
    bot: BotId,
    holds: OfBot,
}

impl Admission {
    /// Nobody is there yet.
    pub fn new(limits: AdmissionLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            counts: Mutex::default(),
        })
    }

    /// Takes a connection of `bot` in; `None` when there are so many that not even telling it helps.
    pub fn connection(self: &Arc<Self>, bot: &BotId) -> Option<Admitted> {
        let mut counts = self.counts();
        let now = counts.bots.get(bot).copied().unwrap_or_default();
        let limits = &self.limits;
        // Those that are turned away take no place: else they would keep each other out once places are free.
        let refusal = if now.served >= limits.connections_per_bot {
            Overload::ConnectionsOfBot(limits.connections_per_bot)
        } else if counts.served >= limits.connections {
            Overload::Connections(limits.connections)
        } else {
            let served = OfBot {
                served: 1,
                ..OfBot::default()
            };
            let slot = ConnectionSlot(self.hold(&mut counts, bot, served));
            return Some(Admitted::Served(slot));
        };
        if now.turned_away >= TURNED_AWAY {
            return None;
        }
        let turned_away = OfBot {
            turned_away: 1,
            ..OfBot::default()
        };
        let slot = ConnectionSlot(self.hold(&mut counts, bot, turned_away));
        Some(Admitted::TurnedAway(slot, refusal))
    }

    /// Takes a call of `bot` in.
    ///
    /// # Errors
    /// When it, or all bots together, have as many calls in flight as they may.
    pub fn call(self: &Arc<Self>, bot: &BotId) -> Result<CallSlot, Overload> {
        let mut counts = self.counts();
        if counts.calls >= self.limits.calls {
            return Err(Overload::Calls(self.limits.calls));
        }
        let of_bot = counts.bots.get(bot).map_or(0, |of_bot| of_bot.calls);
        if of_bot >= self.limits.calls_per_bot {
            return Err(Overload::CallsOfBot(self.limits.calls_per_bot));
        }
        let call = OfBot {
            calls: 1,
            ..OfBot::default()
        };
        Ok(CallSlot(Arc::new(self.hold(&mut counts, bot, call))))
    }

    /// Takes in a call for health or reflection.
    ///
    /// # Errors
    /// When the bot has as many open as it may.
    pub fn helper(self: &Arc<Self>, bot: &BotId) -> Result<CallSlot, Overload> {
        let mut counts = self.counts();
        let of_bot = counts.bots.get(bot).map_or(0, |of_bot| of_bot.helpers);
        if of_bot >= HELPERS_OF_BOT {
            return Err(Overload::HelpersOfBot(HELPERS_OF_BOT));
        }
        let helper = OfBot {
            helpers: 1,
            ..OfBot::default()
        };
        Ok(CallSlot(Arc::new(self.hold(&mut counts, bot, helper))))
    }

    /// Whether one more refusal of `who` is recorded at `now` (time since boot), or only counted.
    pub fn is_recorded(&self, who: &Who, now: Duration) -> bool {
        let (burst, per_second) = RECORDED;
        let mut counts = self.counts();
        let refreshed = |refusals: &Refusals| {
            let passed_ms = now.saturating_sub(refusals.at).as_millis();
            let more = u64::try_from(passed_ms)
                .unwrap_or(u64::MAX)
                .saturating_mul(per_second);
            refusals.left.saturating_add(more).min(burst * 1000)
        };
        // Whoever may do all again needs no place.
        counts
            .refusals
            .retain(|_, refusals| refreshed(refusals) < burst * 1000);
        let refusals = counts.refusals.entry(who.clone()).or_insert(Refusals {
            left: burst * 1000,
            at: now,
        });
        let left = refreshed(refusals);
        *refusals = Refusals {
            left: left.saturating_sub(1000),
            at: now,
        };
        left >= 1000
    }

    /// Connections and calls of now.
    pub fn now(&self) -> (usize, usize) {
        let counts = self.counts();
        (counts.served + counts.turned_away, counts.calls)
    }

    /// Gives `bot` more.
    fn hold(self: &Arc<Self>, counts: &mut Counts, bot: &BotId, holds: OfBot) -> Holder {
        counts.calls += holds.calls;
        counts.served += holds.served;
        counts.turned_away += holds.turned_away;
        let of_bot = counts.bots.entry(bot.clone()).or_default();
        of_bot.calls += holds.calls;
        of_bot.served += holds.served;
        of_bot.turned_away += holds.turned_away;
        of_bot.helpers += holds.helpers;
        Holder {
            admission: Arc::clone(self),
            bot: bot.clone(),
            holds,
        }
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let mut counts = self.admission.counts();
        counts.calls -= self.holds.calls;
        counts.served -= self.holds.served;
        counts.turned_away -= self.holds.turned_away;
        if let Some(of_bot) = counts.bots.get_mut(&self.bot) {
            of_bot.calls -= self.holds.calls;
            of_bot.served -= self.holds.served;
            of_bot.turned_away -= self.holds.turned_away;
            of_bot.helpers -= self.holds.helpers;
            if *of_bot == OfBot::default() {
                counts.bots.remove(&self.bot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_can_be_had_again_and_nothing_is_left_behind() {
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
            "a clone holds it"
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
            "those turned away take no place"
        );
        drop((served, turned, second, others));
        assert_eq!(admission.now(), (0, 0));
        assert!(admission.counts().bots.is_empty());
    }

    #[test]
    fn of_a_bots_refusals_a_thousand_are_recorded_and_then_twenty_in_a_second() {
        let admission = Admission::new(AdmissionLimits {
            calls: 1,
            calls_per_bot: 1,
            connections: 1,
            connections_per_bot: 1,
        });
        let [one, two] = ["one", "two"].map(|bot| Who::Bot(bot.parse().unwrap()));
        let recorded = |who, ms| admission.is_recorded(who, Duration::from_millis(ms));
        assert_eq!((0..5000).filter(|_| recorded(&one, 1500)).count(), 1000);
        assert!(recorded(&two, 1500), "another bot's are");
        assert_eq!((0..5000).filter(|_| recorded(&one, 2500)).count(), 20);
        assert_eq!((0..5000).filter(|_| recorded(&one, 600_000)).count(), 1000);
    }
}
