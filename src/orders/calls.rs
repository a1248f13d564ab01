//! The table of calls: what became of each call that changes something, by the request id that its bot gave it. No I/O and no
//! clock.
//!
//! It is sized for a million calls. A bot that has used up its share loses its oldest entries first.

use std::collections::{HashMap, VecDeque};

use hashbrown::HashTable;

use super::guard::{ClaimKey, GuardLimits};
use crate::base::ids::BotId;

/// Calls with one request id that a lookup goes through, if a bot uses it for many.
const LOOK_AT: usize = 1000;

/// Entries that one call removes, at most.
const REMOVE_AT_ONCE: usize = 8;

/// What is known about a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CallState {
    /// The exchange accepted it.
    Accepted,
    /// It has not ended.
    InFlight,
    /// It may have been executed.
    MaybeSent,
    /// It may have been executed at first, and was not, as is known now.
    NotPlaced,
    /// It did not leave.
    NotSent,
    /// The exchange rejected it.
    Rejected,
}

/// A call in the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Call {
    /// Its request id: a keyed hash.
    pub(super) key: ClaimKey,
    /// Its claim, if it has exactly one.
    pub(super) claim: Option<ClaimKey>,
    /// Whether its claims do not show what became of it: it has several, or one that is not on the exchange's id of the account.
    pub(super) is_opaque: bool,
    /// Position of its endpoint in the catalogue.
    pub(super) endpoint: u16,
    pub(super) at_s: u32,
    pub(super) state: CallState,
}

/// Identifies a call in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallHandle {
    bot: usize,
    number: u32,
}

/// The calls of all bots.
#[derive(Debug)]
pub(super) struct CallTable {
    limits: GuardLimits,
    count: usize,
    bots: Vec<OfBot>,
    bot_numbers: HashMap<BotId, usize>,
}

/// The calls of one bot.
#[derive(Debug, Default)]
struct OfBot {
    /// From the oldest to the newest, with consecutive numbers.
    entries: VecDeque<Entry>,
    /// The number of the first one; numbers wrap around.
    first: u32,
    /// The number of the newest call with each request id.
    index: HashTable<u32>,
    /// Until then (seconds), entries of the window are missing.
    incomplete_until_s: u32,
}

#[derive(Debug)]
struct Entry {
    key: ClaimKey,
    /// Zeros: none.
    claim: ClaimKey,
    at_s: u32,
    /// How many numbers before this one the call before it with the same request id has; 0: there is none.
    back: u32,
    endpoint: u16,
    state: CallState,
    is_opaque: bool,
}

impl CallTable {
    pub(super) fn new(limits: GuardLimits) -> Self {
        Self {
            limits,
            count: 0,
            bots: Vec::new(),
            bot_numbers: HashMap::new(),
        }
    }

    /// Sets the limits of new calls; existing ones stay.
    pub(super) fn set_limits(&mut self, limits: GuardLimits) {
        self.limits = limits;
    }

    /// Adds a call of a bot. It cannot be found if a later one with its request id is in the table already.
    pub(super) fn begin(&mut self, bot: &BotId, call: Call) -> CallHandle {
        let bot = self.number_of_bot(bot);
        self.make_room(bot, call.at_s);
        self.count += 1;
        let window_s = self.limits.window_s;
        let of_bot = self.bots.get_mut(bot);
        let number = of_bot.map_or(0, |of_bot| of_bot.push(call, window_s));
        CallHandle { bot, number }
    }

    /// Sets what is known about a call.
    pub(super) fn set(&mut self, id: CallHandle, state: CallState) {
        let of_bot = self.bots.get_mut(id.bot);
        if let Some(entry) = of_bot.and_then(|of_bot| of_bot.entry_mut(id.number)) {
            entry.state = match (state, entry.state) {
                // Its bot has already got `maybe_sent`.
                (CallState::NotSent, CallState::MaybeSent) => CallState::NotPlaced,
                (state, _) => state,
            };
        }
    }

    /// The newest call of a bot with this request id that left; if none did, the newest one. `None` if that is unknown.
    pub(super) fn find(&self, bot: &BotId, key: ClaimKey, now_s: u32) -> Option<Call> {
        let of_bot = self.bots.get(*self.bot_numbers.get(bot)?)?;
        let mut number = of_bot.newest(key)?;
        let mut unsent = None;
        for _ in 0..LOOK_AT {
            let entry = of_bot.entry(number)?;
            if self.is_expired(entry, now_s) {
                return unsent.filter(|_| now_s > of_bot.incomplete_until_s);
            }
            let call = entry.call();
            if call.state != CallState::NotSent {
                return Some(call);
            }
            unsent = unsent.or(Some(call));
            if entry.back == 0 {
                return unsent.filter(|_| now_s > of_bot.incomplete_until_s);
            }
            number = number.wrapping_sub(entry.back);
        }
        None
    }

    fn is_expired(&self, entry: &Entry, now_s: u32) -> bool {
        now_s.saturating_sub(entry.at_s) > self.limits.window_s
    }

    /// Removes calls that are older than the window, and the oldest ones if there are too many.
    fn make_room(&mut self, bot: usize, now_s: u32) {
        for _ in 0..REMOVE_AT_ONCE {
            let Some(of_bot) = self.bots.get(bot) else {
                return;
            };
            let is_full = of_bot.entries.len() >= self.limits.claims_per_bot.max(1);
            let first = of_bot.entries.front();
            if !is_full && !first.is_some_and(|entry| self.is_expired(entry, now_s)) {
                break;
            }
            self.remove_first(bot, now_s);
        }
        if self.count >= self.limits.claims {
            let by_count = |(_, of_bot): &(usize, &OfBot)| of_bot.entries.len();
            let largest = self.bots.iter().enumerate().max_by_key(by_count);
            if let Some((largest, _)) = largest {
                self.remove_first(largest, now_s);
            }
        }
    }

    fn remove_first(&mut self, bot: usize, now_s: u32) {
        let window_s = self.limits.window_s;
        let Some(of_bot) = self.bots.get_mut(bot) else {
            return;
        };
        let Some(entry) = of_bot.entries.pop_front() else {
            return;
        };
        let number = of_bot.first;
        of_bot.first = number.wrapping_add(1);
        if let Ok(found) = of_bot.index.find_entry(entry.key[0], |n| *n == number) {
            found.remove();
        }
        let until_s = entry.at_s.saturating_add(window_s);
        if until_s >= now_s {
            of_bot.incomplete_until_s = of_bot.incomplete_until_s.max(until_s);
        }
        self.count -= 1;
    }

    fn number_of_bot(&mut self, bot: &BotId) -> usize {
        if let Some(number) = self.bot_numbers.get(bot) {
            return *number;
        }
        let number = self.bots.len();
        self.bots.push(OfBot::default());
        self.bot_numbers.insert(bot.clone(), number);
        number
    }
}

impl OfBot {
    fn push(&mut self, call: Call, window_s: u32) -> u32 {
        let missing_until_s = call.at_s.saturating_add(window_s);
        let length = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        let number = self.first.wrapping_add(length);
        let before = self.newest(call.key);
        let is_late = before
            .and_then(|before| self.entry(before))
            .is_some_and(|before| before.at_s > call.at_s);
        let back = before.and_then(|before| {
            let (entry, distance) = (self.entry(before)?, number.wrapping_sub(before));
            match (entry.state, entry.back) {
                // Calls that did not leave are passed over, so that many of them with one request id cost nothing.
                (CallState::NotSent, 0) => None,
                (CallState::NotSent, back) => Some(distance.saturating_add(back)),
                _ => Some(distance),
            }
        });
        self.entries.push_back(Entry {
            key: call.key,
            claim: call.claim.unwrap_or_default(),
            at_s: call.at_s,
            back: back.unwrap_or(0),
            endpoint: call.endpoint,
            state: call.state,
            is_opaque: call.is_opaque,
        });
        let (entries, first, key) = (&self.entries, self.first, call.key);
        let of = |number: &u32| entries.get(number.wrapping_sub(first) as usize);
        let hash = |number: &u32| of(number).map_or(0, |entry| entry.key[0]);
        match before {
            // Lines of the audit log can be read in a wrong order, and while bots are served.
            Some(_) if is_late => {
                self.incomplete_until_s = self.incomplete_until_s.max(missing_until_s);
            }
            Some(before) => {
                if let Some(newest) = self.index.find_mut(key[0], |number| *number == before) {
                    *newest = number;
                }
            }
            None => {
                self.index.insert_unique(key[0], number, hash);
            }
        }
        number
    }

    /// The number of the newest call with this request id.
    fn newest(&self, key: ClaimKey) -> Option<u32> {
        let is_same = |number: &u32| self.entry(*number).is_some_and(|entry| entry.key == key);
        self.index.find(key[0], is_same).copied()
    }

    fn entry(&self, number: u32) -> Option<&Entry> {
        let index = number.wrapping_sub(self.first);
        self.entries.get(index as usize)
    }

    fn entry_mut(&mut self, number: u32) -> Option<&mut Entry> {
        let index = number.wrapping_sub(self.first);
        self.entries.get_mut(index as usize)
    }
}

impl Entry {
    fn call(&self) -> Call {
        Call {
            key: self.key,
            claim: Some(self.claim).filter(|claim| *claim != ClaimKey::default()),
            is_opaque: self.is_opaque,
            endpoint: self.endpoint,
            at_s: self.at_s,
            state: self.state,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: GuardLimits = GuardLimits {
        window_s: 1000,
        claims: 6,
        claims_per_bot: 4,
    };

    fn call(id: u64, at_s: u32) -> Call {
        Call {
            key: [id, id],
            claim: None,
            is_opaque: false,
            endpoint: 7,
            at_s,
            state: CallState::InFlight,
        }
    }

    fn bot(name: &str) -> BotId {
        name.parse().unwrap()
    }

    fn states(table: &CallTable, name: &str, ids: &[u64], now_s: u32) -> Vec<Option<CallState>> {
        let find = |id: &u64| Some(table.find(&bot(name), [*id, *id], now_s)?.state);
        ids.iter().map(find).collect()
    }

    #[test]
    fn newest_call_that_left_is_found() {
        let mut table = CallTable::new(LIMITS);
        let first = table.begin(&bot("a"), call(1, 10));
        table.set(first, CallState::Accepted);
        let second = table.begin(&bot("a"), call(1, 11));
        assert_eq!(states(&table, "a", &[1], 12), [Some(CallState::InFlight)]);
        table.set(second, CallState::NotSent);
        assert_eq!(states(&table, "a", &[1], 12), [Some(CallState::Accepted)]);
        let third = table.begin(&bot("a"), call(1, 12));
        table.set(third, CallState::Rejected);
        assert_eq!(states(&table, "a", &[1], 12), [Some(CallState::Rejected)]);
        // Of another bot, and another request id.
        assert_eq!(states(&table, "b", &[1], 12), [None]);
        assert_eq!(states(&table, "a", &[2], 12), [None]);
        let unsent = table.begin(&bot("a"), call(2, 12));
        table.set(unsent, CallState::NotSent);
        assert_eq!(states(&table, "a", &[2], 12), [Some(CallState::NotSent)]);
        assert_eq!(table.find(&bot("a"), [1, 1], 12).unwrap().endpoint, 7);
    }

    #[test]
    fn call_that_was_not_placed_after_all_did_leave() {
        let mut table = CallTable::new(LIMITS);
        let id = table.begin(&bot("a"), call(1, 10));
        table.set(id, CallState::MaybeSent);
        table.set(id, CallState::NotSent);
        assert_eq!(states(&table, "a", &[1], 12), [Some(CallState::NotPlaced)]);
    }

    #[test]
    fn calls_expire_and_oldest_ones_are_removed_when_there_are_too_many() {
        let mut table = CallTable::new(LIMITS);
        for id in 1..=5 {
            table.begin(&bot("a"), call(id, 10));
        }
        let found = states(&table, "a", &[1, 2, 5], 1010);
        let in_flight = Some(CallState::InFlight);
        assert_eq!(found, [None, in_flight, in_flight]);
        assert_eq!(states(&table, "a", &[5], 1011), [None]);
        // The limit of all bots: the bot with the most calls loses its oldest one.
        for id in 1..=4 {
            table.begin(&bot("b"), call(id, 11));
        }
        assert_eq!((table.count, table.bots[1].entries.len()), (6, 3));
        let next = table.begin(&bot("a"), call(9, 2000));
        assert_eq!((table.count, table.bots[0].entries.len()), (4, 1));
        // The number of a call that is gone changes nothing.
        table.set(CallHandle { bot: 0, number: 0 }, CallState::Accepted);
        table.set(next, CallState::Accepted);
        assert_eq!(states(&table, "a", &[9], 2001), [Some(CallState::Accepted)]);
    }

    #[test]
    fn unsent_call_is_unknown_while_an_earlier_one_may_have_been_removed() {
        let mut table = CallTable::new(LIMITS);
        let sent = table.begin(&bot("a"), call(1, 10));
        table.set(sent, CallState::MaybeSent);
        for id in 2..=5 {
            table.begin(&bot("a"), call(id, 20));
        }
        let again = table.begin(&bot("a"), call(1, 30));
        table.set(again, CallState::NotSent);
        assert_eq!(states(&table, "a", &[1], 40), [None]);
        assert_eq!(states(&table, "a", &[1], 1020), [None]);
        assert_eq!(states(&table, "a", &[1], 1021), [Some(CallState::NotSent)]);
    }

    #[test]
    fn request_id_of_many_calls_that_did_not_leave_costs_nothing() {
        let limits = GuardLimits {
            claims: 100_000,
            claims_per_bot: 100_000,
            ..LIMITS
        };
        let mut table = CallTable::new(limits);
        let sent = table.begin(&bot("a"), call(1, 10));
        table.set(sent, CallState::Accepted);
        for _ in 0..10 * LOOK_AT {
            let unsent = table.begin(&bot("a"), call(1, 11));
            table.set(unsent, CallState::NotSent);
        }
        assert_eq!(states(&table, "a", &[1], 12), [Some(CallState::Accepted)]);
        assert_eq!(table.bots[0].index.len(), 1);
    }

    #[test]
    fn call_that_is_added_after_a_later_one_does_not_replace_it() {
        let mut table = CallTable::new(LIMITS);
        let later = table.begin(&bot("a"), call(1, 20));
        let earlier = table.begin(&bot("a"), call(1, 10));
        table.set(earlier, CallState::Accepted);
        assert_eq!(states(&table, "a", &[1], 30), [Some(CallState::InFlight)]);
        table.set(later, CallState::NotSent);
        assert_eq!(states(&table, "a", &[1], 30), [None]);
        assert_eq!(states(&table, "a", &[1], 1011), [Some(CallState::NotSent)]);
    }

    #[test]
    fn numbers_wrap_around() {
        let mut table = CallTable::new(LIMITS);
        table.begin(&bot("a"), call(0, 10));
        table.bots[0] = OfBot {
            first: u32::MAX - 2,
            ..OfBot::default()
        };
        table.count = 0;
        for id in 1..=9 {
            let begun = table.begin(&bot("a"), call(id, 10));
            table.set(begun, CallState::Accepted);
        }
        let accepted = Some(CallState::Accepted);
        assert_eq!(
            states(&table, "a", &[5, 6, 9], 12),
            [None, accepted, accepted]
        );
    }
}
